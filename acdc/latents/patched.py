"""Patched runs of a model with dictionaries: any mask, and many scenarios of one receiver.

A receiver reads ``sum of ablated_u + sum over edges that are in of (current_u - ablated_u)`` and
the constant b_O.  Stages run in order; receivers with the same edges are read once, and nodes
from which no kept edge path leads to ``logits`` are not computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.experiment import Batch, Experiment
from acdc.engine.patched import distinct_rows
from acdc.engine.stages import Inputs, Stage
from acdc.lowering.model import LoweredLayer

__all__ = ["BatchRuns", "Scenarios"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Scenarios:
    """Edges of one receiver that are ablated on top of a mask.

    Parameters
    ----------
    edges
        ``[edge]``.
    ablated
        ``[scenario, edge]``: which of them each scenario ablates.
    """

    edges: NDArray[np.int64]
    ablated: Mask


class BatchRuns:
    """Plain runs of one batch, and patched runs on top of them.

    Parameters
    ----------
    experiment
        Model, metric, intervention, direction and dictionaries.
    batch
        Prompts of one length.
    """

    def __init__(self, experiment: Experiment, batch: Batch) -> None:
        self.experiment, self.batch = experiment, batch
        self.graph, self.program = experiment.graph, experiment.program
        program = self.program
        base, other = (program.values(program.model.forward(t)) for t in experiment.runs(batch))
        ablated = experiment.ablated_values(other, base)
        self.ablated, self.base = (
            [block.parts(value) for block, value in zip(program.blocks, values, strict=True)]
            for values in (ablated, base)
        )
        pairs = zip(program.blocks, self.ablated, strict=True)
        self._totals = [block.total(value) for block, value in pairs]
        self.n_bytes = 2 * sum(x.nelement() * x.element_size() for x in self.base)

    def rows(
        self,
        mask: Mask,
        alive: Mask,
        scenarios: Scenarios | None = None,
        upstream: list[Tensor | None] | None = None,
    ) -> Tensor:
        """Metric of the rows of the batch, ``[scenario, row]``.

        Parameters
        ----------
        mask
            ``[edge]``: edges that stay intact.
        alive
            ``[node]``: from which nodes kept edges lead to ``logits``; the others are left out.
        scenarios
            Edges of one receiver to ablate on top.
        upstream
            Changes of the blocks in front of that receiver, from :meth:`changes`.
        """
        first = 0
        if scenarios is not None:
            first = self.program.stage_of(int(self.graph.edge_receiver[scenarios.edges[0]]))
        changes = self.changes(mask, alive, scenarios, upstream, first)
        final = self._inputs(self.program.stages[-1], changes, mask, scenarios).all()[0]
        rows = final[:, :, self.batch.scored].flatten(1, 2)
        return self.experiment.measure_rows(rows, self.batch)

    def changes(
        self,
        mask: Mask,
        alive: Mask,
        scenarios: Scenarios | None = None,
        upstream: list[Tensor | None] | None = None,
        first: int = 0,
    ) -> list[Tensor | None]:
        """``current - ablated`` of every block; None where it is zero or does not matter."""
        program = self.program
        changes: list[Tensor | None] = [None] * len(program.blocks)
        changes[0] = self.base[0] - self.ablated[0]
        if upstream is not None:
            for stage in program.stages[:first]:
                for b in stage.blocks:
                    changes[b] = upstream[b]
        for stage in program.stages[first:-1]:
            written = slice(*self._span(stage))
            if not alive[written].any():
                continue
            inputs = self._inputs(stage, changes, mask, scenarios)
            for b, value in zip(stage.blocks, stage.compute(inputs), strict=True):
                changes[b] = program.blocks[b].parts(value) - self.ablated[b]
        return changes

    def _span(self, stage: Stage) -> tuple[int, int]:
        blocks = self.program.blocks
        return blocks[stage.blocks[0]].start, blocks[stage.blocks[-1]].stop

    def _inputs(
        self,
        stage: Stage,
        changes: list[Tensor | None],
        mask: Mask,
        scenarios: Scenarios | None,
    ) -> Inputs:
        """What the receivers of a stage read."""
        rows = self._rows(stage, mask)
        distinct, index = distinct_rows(rows)
        x = self._read(stage, changes, distinct)
        if scenarios is None:
            return Inputs(x, index)
        tested = int(self.graph.edge_receiver[scenarios.edges[0]]) - stage.first_receiver
        if not 0 <= tested < stage.n_receivers:
            return Inputs(x, index)
        each = np.repeat(rows[tested][None], len(scenarios.ablated), axis=0)
        low = self.program.blocks[stage.seen[0]].start
        each[:, self.graph.edge_sender[scenarios.edges] - low] &= ~scenarios.ablated
        few, which = distinct_rows(each)
        read = self._read(stage, changes, few)[torch.as_tensor(which)]
        return Inputs(x, index, tested, read[:, 0])

    def _rows(self, stage: Stage, mask: Mask) -> Mask:
        """``[receiver, sender seen]``: which edges of the stage are in."""
        graph, blocks = self.graph, self.program.blocks
        low, high = blocks[stage.seen[0]].start, blocks[stage.seen[-1]].stop
        ends = graph.receiver_start[
            [stage.first_receiver, stage.first_receiver + stage.n_receivers]
        ]
        edges = slice(*ends)
        rows = np.zeros((stage.n_receivers, high - low), dtype=bool)
        receiver = graph.edge_receiver[edges] - stage.first_receiver
        rows[receiver, graph.edge_sender[edges] - low] = mask[edges]
        return rows

    def _read(self, stage: Stage, changes: list[Tensor | None], rows: Mask) -> Tensor:
        """``[row, scenario, batch, pos, d_model]`` of rows over the senders that are seen."""
        blocks, model = self.program.blocks, self.program.model
        low = blocks[stage.seen[0]].start
        weights = torch.as_tensor(rows, device=model.device).to(model.dtype)
        sums: dict[int | None, Tensor] = {}
        for b in stage.seen:
            block, change = blocks[b], changes[b]
            part = self._totals[b][None]
            if change is not None and len(block):
                own = weights[:, block.start - low : block.stop - low]
                if own.any():
                    part = part + block.mix(change, own)
            sums[block.post] = sums[block.post] + part if block.post in sums else part
        biases = [model.layers[i].attention.b_O for i in stage.constants]
        x = sums.pop(None, torch.zeros_like(self._totals[0])[None])
        x = x + sum(b for b in biases if b is not None)
        for layer, heads in sums.items():
            assert layer is not None
            x = x + _post_norm(model.layers[layer], heads)
        return x.expand(len(rows), -1, -1, -1, -1)


def _post_norm(layer: LoweredLayer, heads: Tensor) -> Tensor:
    assert layer.attention_post is not None
    b_O = layer.attention.b_O
    return layer.attention_post(heads if b_O is None else heads + b_O)
