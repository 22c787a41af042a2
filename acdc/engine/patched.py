"""Running the model with only a circuit's edges intact: any mask, one pass, layer by layer.

A receiver reads the current value of the senders whose edge is in the circuit and the ablated
value of the others::

    input_v = sum_in current_u + sum_out ablated_u + sum of the b_O below

In models with a norm on the sum of the heads (Gemma-2) the stream reads each layer's heads
through that norm, so the sums of heads are taken per layer inside it (as in EAP-IG).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.experiment import Batch, Experiment, iter_layers
from acdc.lowering.attention import KINDS
from acdc.lowering.model import LoweredLayer

__all__ = ["PatchedModel", "SoftPatchedModel", "metric_of_circuit"]

_CUTS_BYTES = 64 << 20
"""Streams of many cuts at the logits are measured in parts of this size."""


class PatchedModel:
    """Evaluates circuits; plain runs are done once and kept while they fit into memory.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    memory
        Bytes of plain runs to keep; beyond that they are run anew for every circuit.
    """

    def __init__(self, experiment: Experiment, memory: int = 2 << 30) -> None:
        self.experiment, self.memory = experiment, memory
        self._kept: dict[int, _PlainRuns] = {}

    def metric(self, mask: NDArray[np.bool_]) -> float:
        """Mean metric of the model when every edge outside ``mask`` is ablated.

        Parameters
        ----------
        mask
            ``[edge]``: edges that stay intact.

        Returns
        -------
        float
            In the metric's own unit (not negated).
        """
        return float(self.values(mask).mean())

    @torch.no_grad()
    def values(self, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Metric of each prompt when every edge outside ``mask`` is ablated.

        Parameters
        ----------
        mask
            ``[edge]``: edges that stay intact.

        Returns
        -------
        ndarray
            ``[prompt]``, see :meth:`Experiment.per_prompt`; its mean is :meth:`metric`.
        """
        rows = [
            _PatchedRun(self.experiment, batch, self._plain(i), self._matrix(mask)).rows()
            for i, batch in enumerate(self.experiment.batches)
        ]
        return self.experiment.per_prompt(rows)

    @torch.no_grad()
    def values_at_logits(
        self, mask: NDArray[np.bool_], cuts: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        """Metric of each prompt with further edges into ``logits`` ablated: one pass for all cuts.

        Parameters
        ----------
        mask
            ``[edge]``: edges that stay intact in front of ``logits``, and there but for the cuts.
        cuts
            ``[cut, sender]``: senders whose edge into ``logits`` each cut ablates besides, whatever
            their span.

        Returns
        -------
        ndarray
            ``[cut, prompt]``, otherwise as :meth:`values`.
        """
        matrix = self._matrix(mask)
        rows = [
            _PatchedRun(self.experiment, batch, self._plain(i), matrix).rows_at_logits(cuts)
            for i, batch in enumerate(self.experiment.batches)
        ]
        return np.stack(
            [self.experiment.per_prompt([of[cut] for of in rows]) for cut in range(len(cuts))]
        )

    def full_values(self) -> NDArray[np.float64]:
        """Metric of each prompt with every edge in, ``[prompt]``."""
        return self.values(np.ones(self.experiment.graph.n_edges, dtype=bool))

    def _matrix(self, mask: NDArray[np.bool_]) -> Tensor:
        """``[span, receiver, sender] bool``: which edges are in."""
        matrix = torch.as_tensor(self.experiment.by_component(mask))
        return matrix.to(self.experiment.model.device)

    def _plain(self, i: int) -> _PlainRuns:
        if i in self._kept:
            return self._kept[i]
        runs = _PlainRuns.of(self.experiment, self.experiment.batches[i])
        if sum(r.n_bytes for r in self._kept.values()) + runs.n_bytes <= self.memory:
            self._kept[i] = runs
        return runs


class SoftPatchedModel(PatchedModel):
    """The same with weights in [0, 1] instead of a mask, and gradients to them.

    A receiver reads ``weight * current_u + (1 - weight) * ablated_u`` of each sender; weights of
    0 and 1 give what :class:`PatchedModel` gives.  Parameters as there.
    """

    def rows(self, i: int, weights: Tensor) -> Tensor:
        """Metric of every scored row of a batch.

        Parameters
        ----------
        i
            Which of ``experiment.batches``.
        weights
            ``[edge]``, or ``[prompt, edge]`` of the batch, in [0, 1]; may require a gradient.

        Returns
        -------
        Tensor
            ``[row]``.
        """
        graph, batch = self.experiment.graph, self.experiment.batches[i]
        with torch.no_grad():
            plain = self._plain(i)
        weights = weights.expand(batch.n_prompts, -1)
        shape = graph.shape.n_spans, len(graph.components.receivers), graph.components.n_senders
        place = np.ravel_multi_index(self.experiment.edge_place, shape)
        matrix = weights.new_zeros(len(weights), math.prod(shape))
        matrix = matrix.index_copy(1, torch.as_tensor(place, device=weights.device), weights)
        matrix = matrix.unflatten(1, shape)
        return _SoftPatchedRun(self.experiment, batch, plain, matrix).rows()

    def bytes_per_prompt(self, n_pos: int) -> int:
        """Memory that a prompt takes until its gradient is taken, roughly.

        Each read keeps the change of every sender that it sees, and each write a copy of the
        senders up to its own; of a receiver's input about three tensors are kept.
        """
        model, shape = self.experiment.model, self.experiment.model.shape
        n_vectors, seen = 0, 2 if shape.split_embed else 1
        for _ in range(shape.n_layers):
            n_vectors += 3 * (seen + 3 * shape.n_heads)  # q, k, v
            n_vectors += (seen := seen + shape.n_heads)
            if shape.has_mlp:
                n_vectors += seen + 3
                n_vectors += (seen := seen + 1)
        return (n_vectors + seen) * n_pos * model.d_model * model.W_U.element_size()


def metric_of_circuit(experiment: Experiment, mask: NDArray[np.bool_]) -> float:
    """Mean metric with every edge outside ``mask`` ablated; see :class:`PatchedModel`."""
    return PatchedModel(experiment, memory=0).metric(mask)


@dataclass(frozen=True, eq=False)
class _PlainRuns:
    """Senders of the run that ablation starts from, and what ablated edges carry."""

    out: Tensor  # (sender, batch, pos, d_model)
    ablated: Tensor  # likewise

    @classmethod
    def of(cls, experiment: Experiment, batch: Batch) -> _PlainRuns:
        model = experiment.model
        base, other = (model.forward(tokens) for tokens in experiment.runs(batch))
        return cls(model.senders(base), model.senders(experiment.ablated(other, base)))

    @property
    def n_bytes(self) -> int:
        return 2 * self.out.nelement() * self.out.element_size()


class _PatchedRun:
    """One pass over one batch."""

    def __init__(
        self, experiment: Experiment, batch: Batch, plain: _PlainRuns, kept: Tensor
    ) -> None:
        self.experiment, self.batch = experiment, batch
        self.model, self.graph = experiment.model, experiment.graph.components
        self.ablated = plain.ablated
        self.current = plain.out.clone()  # replaced layer by layer
        self.n_sources = 2 if self.model.shape.split_embed else 1
        self.kept = kept  # (span, receiver, sender), in soft runs (batch, span, receiver, sender)
        self.spans = np.array(batch.spans)  # of the positions in current and ablated

    def rows(self) -> Tensor:
        """Metric of every scored row of the batch: ``[row]``."""
        self._run_layers()
        return self._measured(self._logits)[0]

    def rows_at_logits(self, cuts: NDArray[np.bool_]) -> Tensor:
        """``[cut, row]``: as :meth:`rows`, ``logits`` not reading the senders of each cut."""
        self._run_layers()
        cut = torch.from_numpy(cuts).to(self.kept.device)
        self.kept = self.kept[:, self._logits] & ~cut  # in place of the graph's receivers
        n_bytes = self.batch.n_rows * self.current.shape[-1] * self.current.element_size()
        each = max(1, _CUTS_BYTES // n_bytes)
        parts = np.array_split(np.arange(len(cuts)), -(-len(cuts) // each))
        return torch.cat([self._measured(part) for part in parts])

    @property
    def _logits(self) -> NDArray[np.int64]:
        return np.array([self.graph.receiver_index["logits"]])

    def _measured(self, receivers: NDArray[np.int64]) -> Tensor:
        """Metric of what receivers of every sender read, ``[receiver, row]``."""
        final = self._read(receivers, self.graph.n_senders, len(self.model.layers))
        return self.experiment.measure_rows(final.flatten(1, 2), self.batch)

    def _run_layers(self) -> None:
        """Replace what every sender writes, and keep it at the scored positions."""
        heads, parallel = self.model.shape.n_heads, self.model.shape.parallel
        for layer, receivers in iter_layers(self.graph):
            block = self.model.layers[layer]
            start = self._start(layer)
            self._run_heads(block, layer, receivers, start)
            if block.mlp is not None:
                below = layer if parallel else layer + 1
                x = self._read(receivers["mlp"], start if parallel else start + heads, below)[0]
                self._write(start + heads, block.mlp(x)[None])
        scored = self.batch.scored
        self.current, self.ablated = self.current[:, :, scored], self.ablated[:, :, scored]
        self.spans = self.spans[scored.cpu().numpy()]

    def _start(self, layer: int) -> int:
        """First sender of a layer."""
        return self.n_sources + layer * (self.model.shape.n_heads + int(self.model.shape.has_mlp))

    def _run_heads(
        self, block: LoweredLayer, layer: int, receivers: dict[str, NDArray[np.int64]], start: int
    ) -> None:
        attention = block.attention
        n_pos = self.current.shape[2]
        placed = {}
        for kind in KINDS:
            x = block.ln1(self._read(receivers[kind], start, layer))
            heads = attention.project_split(kind, x.flatten(1, 2)).unflatten(1, x.shape[1:3])
            placed[kind] = attention.place(kind, heads, slice(0, n_pos))  # (head batch pos d_head)
        if attention.group > 1:
            for kind in ("k", "v"):
                placed[kind] = placed[kind].repeat_interleave(attention.group, dim=0)
        mask = attention.mask(n_pos, self.current.device)
        z = attention.attend(placed["q"], placed["k"], placed["v"], mask)
        self._write(start, z @ attention.W_O[:, None])

    def _write(self, start: int, out: Tensor) -> None:
        """Replace the outputs of some senders."""
        self.current[start : start + len(out)] = out

    def _read(self, receivers: NDArray[np.int64], n_seen: int, below: int) -> Tensor:
        """Inputs of receivers that read the first ``n_seen`` senders: ``[receiver, b, p, d]``.

        ``below`` counts the layers whose attention they read.
        """
        kept = self.kept[..., torch.as_tensor(receivers), :n_seen].to(self.current.dtype)
        layers = [block.attention for block in self.model.layers[:below]]
        if not self.model.has_post_norm:
            out = self._mix(kept, slice(0, n_seen))
            biases = [a.b_O for a in layers if a.b_O is not None]
            return out + torch.stack(biases).sum(0) if biases else out
        heads = self.model.shape.n_heads
        mlps = [self._start(i) + heads for i in range(len(self.model.layers))]
        direct = [*range(self.n_sources), *(u for u in mlps if u < n_seen)]
        out = self._mix(kept[..., direct], torch.tensor(direct, device=self.current.device))
        for layer, attention in enumerate(layers):
            nodes = slice(self._start(layer), self._start(layer) + heads)
            raw = self._mix(kept[..., nodes], nodes)
            post = self.model.layers[layer].attention_post
            assert post is not None
            out = out + post(raw if attention.b_O is None else raw + attention.b_O)
        return out

    def _mix(self, kept: Tensor, senders: slice | Tensor) -> Tensor:
        """``sum_in current + sum_out ablated`` of some senders: ``[receiver, b, p, d]``."""
        current, ablated = self.current[senders], self.ablated[senders]
        if len(kept) == 1:
            kept, sums = kept[0], "rs,sbpd->rbpd"
        else:
            kept, sums = kept[self.spans], "prs,sbpd->rbpd"
        return torch.einsum(sums, kept, current) + torch.einsum(sums, 1 - kept, ablated)


class _SoftPatchedRun(_PatchedRun):
    """A pass that leaves what it has read as it was, so that gradients can be taken."""

    def _write(self, start: int, out: Tensor) -> None:
        self.current = torch.cat([self.current[:start], out])  # later senders are not read yet

    def _mix(self, kept: Tensor, senders: slice | Tensor) -> Tensor:
        ablated = self.ablated[senders]
        change = self.current[senders] - ablated
        if kept.shape[1] == 1:
            kept, sums = kept[:, 0], "brs,sbpd->rbpd"
        else:
            kept, sums = kept[:, self.spans], "bprs,sbpd->rbpd"
        return torch.einsum(sums, kept, change) + ablated.sum(0)
