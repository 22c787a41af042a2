"""ACDC with latents: scenarios as plain patched runs, stacked on an axis.

The same interface as :class:`acdc.engine.incremental.IncrementalRun`.  Receivers are finished in
reverse topological order, so what lies in front of the receiver under test is as it was at the
start; it is computed once.  Behind it, nodes from which no kept edge leads to ``logits`` are left
out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.experiment import Experiment
from acdc.engine.incremental import Work
from acdc.engine.moved import Read
from acdc.engine.patched import alive_before_logits
from acdc.latents.patched import BatchRuns, Scenarios

__all__ = ["LatentRun"]

Edges = NDArray[np.int64]
_STAGE_SECONDS, _NUMBERS_PER_SECOND = 5e-4, 2e8


class LatentRun:
    """The current circuit on all prompts, and what ablating edges of a receiver would do.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention, direction and dictionaries.
    memory
        Bytes that one evaluation's scenarios may take.
    """

    def __init__(self, experiment: Experiment, memory: int = 1 << 30) -> None:
        self.experiment, self.graph, self.memory = experiment, experiment.graph, memory
        self.work = Work()
        self.mask = np.ones(self.graph.n_edges, dtype=bool)
        everything = np.ones(self.graph.n_nodes, dtype=bool)
        with torch.no_grad():
            self._runs = [BatchRuns(experiment, batch) for batch in experiment.batches]
            self._upstream = [runs.changes(self.mask, everything) for runs in self._runs]
        self._differs = np.any([_differs(c) for c in self._upstream], axis=0)
        self._alive: NDArray[np.bool_] | None = None

    @property
    def alive(self) -> NDArray[np.bool_]:
        """``[node]``: from which edges that are in lead to ``logits``."""
        if self._alive is None:
            self._alive = alive_before_logits(self.graph, self.mask)
        return self._alive

    def can_change(self, edges: Edges) -> NDArray[np.bool_]:
        """``[edge]``: False where ablating the edge changes the metric by exactly zero."""
        fed = self.graph.fed_by(int(self.graph.edge_receiver[edges[0]]))
        if not self.alive[fed].any():
            return np.zeros(len(edges), dtype=bool)
        return self._differs[self.graph.edge_sender[edges]]

    def finish(self, receiver: int, kept_edges: Edges) -> None:
        """Record which edges of a receiver stay."""
        low, high = self.graph.receiver_start[receiver : receiver + 2]
        self.mask[low:high] = False
        self.mask[kept_edges] = True
        self._alive = None

    def keep(self) -> Iterator[NDArray[np.generic]]:
        """Yield nothing: the edges that are finished say where the search is."""
        return iter(())

    def restore(self, read: Read) -> None:
        """Read nothing, see :meth:`keep`."""

    def capacity(self, edges: Edges) -> int:
        """How many scenarios over these edges fit into the memory bound."""
        return max(1, self.memory // (4 * self._numbers(edges)))

    def overhead(self, edges: Edges) -> float:
        """How many scenarios cost as much as starting a batch of them, roughly."""
        n_stages = len(self.experiment.program.stages) - self._first_stage(edges)
        seconds = _STAGE_SECONDS * n_stages * len(self._runs)
        return max(1.0, seconds * _NUMBERS_PER_SECOND / self._numbers(edges))

    def _first_stage(self, edges: Edges) -> int:
        return self.experiment.program.stage_of(int(self.graph.edge_receiver[edges[0]]))

    def _numbers(self, edges: Edges) -> int:
        """Numbers that one scenario holds, roughly."""
        program, model = self.experiment.program, self.experiment.model
        first = self._first_stage(edges)
        start = program.stages[first].blocks
        width = 0
        for block in program.blocks[start[0] if start else len(program.blocks) :]:
            width += len(block) * (1 if block.narrow else model.d_model)
        width += 4 * model.shape.n_heads * model.d_model
        total = 0
        for runs in self._runs:
            n_prompts, n_pos = runs.batch.clean.shape
            total += n_prompts * n_pos * (width + model.shape.n_heads * n_pos)
            if self.experiment.metric.whole_vocab:
                total += 3 * runs.batch.n_rows * model.d_vocab
        return total

    @torch.no_grad()
    def evaluate(
        self, edges: Edges, scenarios: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], list[Scenarios]]:  # type: ignore[override]
        """Mean metric of every scenario, and what is needed to commit one.

        Parameters
        ----------
        edges
            ``[edge]``: edges of one receiver.
        scenarios
            ``[scenario, edge]``: which of them a scenario ablates on top of the current state.
        """
        asked = Scenarios(edges, scenarios)
        total = np.zeros(len(scenarios))
        for runs, upstream in zip(self._runs, self._upstream, strict=True):
            values = runs.rows(self.mask, self.alive, asked, upstream).sum(-1)
            total += values.double().cpu().numpy()
        self.work.n_evaluations += len(scenarios)
        return total / self.experiment.n_rows, [asked]

    def commit(self, outcomes: Sequence[Scenarios], scenario: int) -> None:
        """Make one evaluated scenario the current state."""
        (asked,) = outcomes
        self.mask[asked.edges[asked.ablated[scenario]]] = False
        self._alive = None

    def fork(self) -> LatentRun:
        """Copy the state, sharing what never changes and the count of work."""
        twin = copy.copy(self)
        twin.mask = self.mask.copy()
        return twin

    @torch.no_grad()
    def metric(self) -> float:
        """Mean metric of the current circuit."""
        total = sum(float(runs.rows(self.mask, self.alive)[0].sum()) for runs in self._runs)
        return total / self.experiment.n_rows


def _differs(changes: list[Tensor | None]) -> NDArray[np.bool_]:
    """``[sender]``: whether it differs anywhere from what an ablated edge carries."""
    found = []
    for change in changes:
        assert change is not None
        different = change.ne(0).flatten(1).any(1)
        found.append(different.cpu().numpy())
    return np.concatenate(found)
