"""Running the model with only a circuit's edges intact: any mask or weights, one pass, by stage.

A receiver reads ::

    input_v = sum over u of ablated_u + sum over edges of weight * (current_u - ablated_u) + b_O's

where an edge that is in has the weight 1 and all others 0; trained masks have weights between.
In a graph split by spans, an edge counts at the positions of its span alone.  In models with a
norm on the sum of the heads (Gemma-2) the stream reads each layer's heads through that norm, so
the sums of heads are taken per layer inside it (as in EAP-IG).

Senders that are vectors lie side by side, so that a stage reads them in one product; latents are
read block by block.  Receivers with the same edges are read once, and stages and heads from which
no kept path leads to ``logits`` are neither computed nor kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.batch import Batch
from acdc.engine.experiment import Experiment
from acdc.engine.program import Program
from acdc.engine.stages import (
    Heads,
    Inputs,
    LatentHeads,
    Reconstructed,
    Stage,
    Transcoder,
)
from acdc.engine.values import Block, Values, coefficients
from graphs import Graph
from graphs.errors import GraphError
from graphs.kernels import reach_backward

__all__ = [
    "EdgeWeights",
    "Edges",
    "PatchedModel",
    "PatchedRun",
    "PlainRuns",
    "alive_before_logits",
    "metric_of_circuit",
]

_FEWEST = 4
"""Prompts that are run together at least: products with fewer rows differ in the last bit."""
_ROWS_BYTES = 128 << 20
"""Inputs of the latents of a transcoder are read in parts of this size."""
_CUTS_BYTES = 64 << 20
"""Streams of many cuts at the logits are measured in parts of this size."""

Mask = NDArray[np.bool_]


class PatchedModel:
    """Evaluates circuits; plain runs are done once and kept while they fit into memory.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention, direction and dictionaries.
    memory
        Bytes: a half for plain runs that are kept (beyond that they are run anew for every
        circuit), a half for the pass, of prompts in parts that fit.  0: nothing is kept; None: the
        experiment's.
    """

    def __init__(self, experiment: Experiment, memory: int | None = None) -> None:
        self.experiment = experiment
        self.memory = experiment.memory if memory is None else memory
        self._kept: dict[int, PlainRuns] = {}

    def metric(self, mask: Bool[np.ndarray, " edge"]) -> float:
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
    def values(self, mask: Bool[np.ndarray, " edge"]) -> Float[np.ndarray, " prompt"]:
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
        weights = _Mask(self.edges, mask)

        def rows(i: int) -> Tensor:
            return torch.cat(
                [PatchedRun(runs, weights, weights.alive).rows()[0] for runs in self._runs(i)]
            )

        experiment = self.experiment
        return experiment.per_prompt(experiment.by_batch(rows, about=[mask.tobytes()]))

    @torch.no_grad()
    def values_at_logits(
        self, mask: Bool[np.ndarray, " edge"], cuts: Bool[np.ndarray, "cut sender"]
    ) -> Float[np.ndarray, "cut prompt"]:
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
        weights = _Mask(self.edges, mask)

        def rows(i: int) -> Tensor:
            parts = [PatchedRun(runs, weights, weights.alive).rows(cuts) for runs in self._runs(i)]
            return torch.cat(parts, dim=1)

        experiment = self.experiment
        found = experiment.by_batch(rows, about=[mask.tobytes(), cuts.tobytes()])
        return np.stack(
            [experiment.per_prompt([of[cut] for of in found]) for cut in range(len(cuts))]
        )

    def full_values(self) -> Float[np.ndarray, " prompt"]:
        """Metric of each prompt with every edge in, candidate or not, ``[prompt]``."""
        if self.experiment.is_partial:
            noising = self.experiment.direction == "noising"
            return self.experiment.plain_values("clean" if noising else "corrupt")
        return self.values(np.ones(self.experiment.graph.n_edges, dtype=bool))

    def rows(
        self, i: int, weights: Float[Tensor, "*prompt unit"], *, of_senders: bool = False
    ) -> Float[Tensor, " row"]:
        """Metric of every scored row of a batch, with weights of edges and gradients to them.

        Parameters
        ----------
        i
            Which of ``experiment.batches``.
        weights
            ``[edge]``, or ``[prompt, edge]`` of the batch, in [0, 1]; may require a gradient.
            Weights of 0 and 1 give what :meth:`values` gives.
        of_senders
            Weights are ``[sender]`` or ``[prompt, sender]``: all edges out of a sender have its
            weight, so what a stage reads is read once.

        Returns
        -------
        Tensor
            ``[row]``.
        """
        with torch.no_grad():
            plain = self.plain(i)
        weights = weights.expand(plain.batch.n_prompts, -1)
        kind = _SenderWeights if of_senders else EdgeWeights
        return PatchedRun(plain, kind(self.edges, weights)).rows()[0]

    def states(self, i: int) -> Iterator[tuple[Stage, Inputs, dict[int, Tensor], Values]]:
        """Run a batch with every edge of the graph intact, stage by stage.

        Parameters
        ----------
        i
            Which of ``experiment.batches``.

        Yields
        ------
        tuple
            The stage; what its receivers read; of that, by layer and as ``Inputs.distinct``, what
            passes the layer's post-norm; and the values of the blocks that it writes.
        """
        every = np.ones(self.experiment.graph.n_edges, dtype=bool)
        return PatchedRun(self.plain(i), _Mask(self.edges, every)).states()

    @cached_property
    def edges(self) -> Edges:
        """Where its edges stand."""
        return Edges(self.experiment)

    def plain(self, i: int) -> PlainRuns:
        """Plain runs of ``experiment.batches[i]``."""
        if i in self._kept:
            return self._kept[i]
        runs = PlainRuns(self.experiment, self.experiment.batches[i])
        if sum(r.n_bytes for r in self._kept.values()) + runs.n_bytes <= self.memory // 2:
            self._kept[i] = runs
        return runs

    def _runs(self, i: int) -> Iterator[PlainRuns]:
        """Plain runs of a batch; of parts of it where the memory is too small for the whole."""
        batch = self.experiment.batches[i]
        each = self.experiment.footprint.evaluation(batch.clean.shape[1])
        most = max(_FEWEST, self.memory // 2 // max(1, each))
        if self.memory == 0 or batch.n_prompts < 2 * most:
            yield self.plain(i)
            return
        for part in batch.even(most):
            yield PlainRuns(self.experiment, part)

    def bytes_per_prompt(self, n_pos: int) -> int:
        """Memory that a prompt takes until its gradient is taken, roughly.

        Each read keeps the change of every sender that it sees, and each write a copy of the
        senders up to its own; of a receiver's input about three tensors are kept.
        """
        program, model = self.experiment.program, self.experiment.model
        n_numbers = 0
        for stage in program.stages:
            seen = [program.blocks[b] for b in stage.seen]
            vectors = sum(len(block) for block in seen if not block.narrow)
            latents = sum(len(self.edges.senders(stage, b)) for b in seen if b.narrow)
            n_numbers += (2 * vectors + 3 * stage.n_receivers) * model.d_model
            n_numbers += stage.n_receivers * latents
        return n_numbers * n_pos * model.W_U.element_size()


def metric_of_circuit(experiment: Experiment, mask: Bool[np.ndarray, " edge"]) -> float:
    """Mean metric with every edge outside ``mask`` ablated; see :class:`PatchedModel`."""
    return PatchedModel(experiment, memory=0).metric(mask)


def alive_before_logits(graph: Graph, mask: Mask) -> Mask:
    """``[node]``: some path of kept edges leads from it to ``logits``."""
    if len(mask) != graph.n_edges:
        raise GraphError(f"a mask of {len(mask)} edges for a graph of {graph.n_edges}")
    found: Mask = reach_backward(
        mask, graph.edge_sender, graph.edge_receiver, graph.feeds_start, graph.feeds, graph.n_nodes
    )
    return found


# -- which edges are in -------------------------------------------------------------------------


class Edges:
    """Where the edges of an experiment's graph stand in the matrices of its stages."""

    def __init__(self, experiment: Experiment) -> None:
        self.graph, self.program = experiment.graph, experiment.program
        self.n_spans = self.graph.shape.n_spans
        self._span, self._receiver, self._sender = experiment.edge_place
        self._found: dict[int, tuple[slice, tuple[int, ...], NDArray[np.int64]]] = {}
        self._read: dict[tuple[int, int], Tensor] = {}

    def of(self, stage: Stage) -> tuple[slice, tuple[int, ...], NDArray[np.int64]]:
        """Edges into a stage, shape ``[span, receiver, sender seen]``, and their flat places."""
        if stage.first_receiver not in self._found:
            low, high = self.program.senders_seen(stage)
            shape = self.n_spans, stage.n_receivers, high - low
            edges = slice(*np.searchsorted(self._receiver, (stage.ports.start, stage.ports.stop)))
            at = self._span[edges], self._receiver[edges] - stage.ports.start
            place = np.ravel_multi_index((*at, self._sender[edges] - low), shape)
            self._found[stage.first_receiver] = edges, shape, place
        return self._found[stage.first_receiver]

    def senders(self, stage: Stage, block: Block) -> Tensor:
        """Senders of a block that an edge into a stage leaves, counted within the block."""
        key = stage.first_receiver, block.start
        if key not in self._read:
            edges, _, _ = self.of(stage)
            found = np.unique(self._sender[edges])
            inside = found[(block.start <= found) & (found < block.stop)]
            self._read[key] = torch.from_numpy(inside - block.start)
        return self._read[key]


class _Mask:
    """Edges that are in, ``[edge]``."""

    def __init__(self, edges: Edges, mask: Mask) -> None:
        self.edges, self._mask = edges, mask
        alive = alive_before_logits(edges.graph, mask)
        # (sender of the components)
        self.alive: Mask = np.any(alive[:-1].reshape(-1, edges.n_spans), axis=1)

    def matters(self, senders: slice) -> bool:
        """Whether a kept path leads from one of some senders to ``logits``."""
        return bool(self.alive[senders].any())

    def rows(
        self,
        stage: Stage,
        cuts: Mask | None = None,
        receivers: Sequence[int] | None = None,
    ) -> tuple[Tensor, NDArray[np.int64]]:
        """Different rows ``[1, span, row, sender seen]``, and which each receiver (or cut) has.

        ``receivers``: of these alone, ascending; others have the row -1, which means nothing.
        """
        edges, shape, place = self.edges.of(stage)
        kept = np.zeros(shape, dtype=bool)
        kept.reshape(-1)[place] = self._mask[edges]
        if receivers is not None:
            found = np.full(shape[1], -1)
            some = kept[:, receivers]
            rows, found[receivers] = _distinct(some.transpose(1, 0, 2).reshape(len(receivers), -1))
            few = rows.reshape(len(rows), shape[0], shape[2]).transpose(1, 0, 2)
            return torch.from_numpy(np.ascontiguousarray(few))[None], found
        if cuts is not None:
            low, high = self.edges.program.senders_seen(stage)
            kept = np.where(cuts[:, low:high], False, kept)
        rows, index = _distinct(kept.transpose(1, 0, 2).reshape(kept.shape[1], -1))
        few = rows.reshape(len(rows), shape[0], shape[2]).transpose(1, 0, 2)
        return torch.from_numpy(np.ascontiguousarray(few))[None], index


class EdgeWeights:
    """Weights of edges, ``[prompt, edge]``, with gradients."""

    def __init__(self, edges: Edges, weights: Tensor) -> None:
        self.edges, self._weights = edges, weights

    def matters(self, senders: slice) -> bool:
        """Any sender may."""
        return True

    def rows(
        self, stage: Stage, cuts: Mask | None = None, receivers: Sequence[int] | None = None
    ) -> tuple[Tensor, NDArray[np.int64]]:
        """``[prompt, span, receiver, sender seen]``, and every receiver's index."""
        edges, shape, place = self.edges.of(stage)
        device = self._weights.device
        flat = self._weights.new_zeros(len(self._weights), int(np.prod(shape)))
        at = torch.as_tensor(place, device=device)
        full = flat.index_copy(1, at, self._weights[:, edges]).unflatten(1, shape)
        return full, np.arange(stage.n_receivers)


class _SenderWeights(EdgeWeights):
    """Weights of senders, ``[prompt, sender]``, with gradients."""

    def rows(
        self, stage: Stage, cuts: Mask | None = None, receivers: Sequence[int] | None = None
    ) -> tuple[Tensor, NDArray[np.int64]]:
        """``[prompt, span, 1, sender seen]``, which every receiver has."""
        by_span = self._weights.unflatten(1, (-1, self.edges.n_spans)).movedim(2, 1)
        low, high = self.edges.program.senders_seen(stage)
        return by_span[:, :, None, low:high], np.zeros(stage.n_receivers, dtype=np.int64)


def _distinct(rows: Mask) -> tuple[Mask, NDArray[np.int64]]:
    """Different rows, and which of them each row is."""
    if len(rows) == 1:
        return rows, np.zeros(1, dtype=np.int64)
    packed = np.ascontiguousarray(np.packbits(rows, axis=1))
    keys = packed.view(np.dtype((np.void, packed.shape[1])))[:, 0]
    _, first, index = np.unique(keys, return_index=True, return_inverse=True)
    return (rows, np.arange(len(rows))) if len(first) == len(rows) else (rows[first], index)


# -- one pass -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Senders that a stage reads, as they are or through one post-norm.

    Parameters
    ----------
    post
        Layer of the post-norm, or None.
    vectors
        Places in the buffer of the group's senders that are vectors.
    columns
        Which of the senders seen these are.
    narrow
        Blocks of latents.
    """

    post: int | None
    vectors: slice
    columns: slice | Tensor
    narrow: tuple[int, ...]


class _Layout:
    """Where senders that are vectors stand, side by side, and what each stage reads of them.

    Parameters
    ----------
    program
        Stages and blocks.
    alive
        ``[sender]``: which senders that are vectors are kept; None: all.

    Attributes
    ----------
    size
        By post-norm, how many there are.
    place
        By block, where its senders stand.
    members
        By block, which of its senders those are; None: all.
    """

    def __init__(self, program: Program, alive: Mask | None = None) -> None:
        self.program = program
        self.size: dict[int | None, int] = {}
        self.place: dict[int, slice] = {}
        self.members: dict[int, NDArray[np.int64] | None] = {}
        self._ids: dict[int, NDArray[np.int64]] = {}
        for b, block in enumerate(program.blocks):
            start = self.size.setdefault(block.post, 0)
            if block.narrow:
                continue
            own = np.arange(len(block))
            some = own if alive is None else np.flatnonzero(alive[block.start : block.stop])
            self.members[b] = None if len(some) == len(own) else some
            self.place[b] = slice(start, start + len(some))
            self.size[block.post] += len(some)
            self._ids[b] = block.start + some
        self._groups: dict[int, tuple[_Group, ...]] = {}

    def groups(self, stage: Stage) -> tuple[_Group, ...]:
        """What a stage reads."""
        if stage.ports.start not in self._groups:
            self._groups[stage.ports.start] = tuple(self._read(stage))
        return self._groups[stage.ports.start]

    def _read(self, stage: Stage) -> Iterator[_Group]:
        blocks = self.program.blocks
        low, _ = self.program.senders_seen(stage)
        for post in dict.fromkeys(blocks[b].post for b in stage.seen):
            inside = [b for b in stage.seen if blocks[b].post == post]
            wide = [b for b in inside if not blocks[b].narrow]
            narrow = tuple(b for b in inside if blocks[b].narrow and len(blocks[b]))
            ids = np.concatenate([self._ids[b] for b in wide]) - low
            in_a_row = len(ids) and ids[-1] - ids[0] + 1 == len(ids)
            columns = slice(ids[0], ids[-1] + 1) if in_a_row else torch.from_numpy(ids)
            places = slice(self.place[wide[0]].start, self.place[wide[-1]].stop)
            yield _Group(post, places, columns, narrow)


class PlainRuns:
    """What the embeddings write in the run that ablation starts from, and ablated edges carry.

    Attributes
    ----------
    ablated
        Values by block: what ablated edges carry.
    embeds
        By how much the embeddings differ from that, in the run that ablation starts from.
    """

    def __init__(self, experiment: Experiment, batch: Batch) -> None:
        self.experiment, self.batch = experiment, batch
        model, (tokens, others) = experiment.model, experiment.runs(batch)
        self.program = experiment.program
        if experiment.holds_base:
            self.program = experiment.program_on(batch, model.forward(tokens))
        other = experiment.written(others)
        self.ablated: Values = experiment.ablated_values(other, other)
        self.embeds = torch.stack(model.embed(tokens))[:, None] - self.ablated[0]
        self.layout = _Layout(self.program)
        self._totals: dict[int, dict[int | None, Tensor]] = {}
        n_sums = len(self.program.stages) + len(self.program.blocks)
        n_numbers = sum(x.nelement() for x in self.ablated) + n_sums * self.embeds[0].nelement()
        self.n_bytes = n_numbers * self.embeds.element_size()

    @cached_property
    def _sums(self) -> Values:
        pairs = zip(self.program.blocks, self.ablated, strict=True)
        return [block.sum(value) for block, value in pairs]

    def totals(self, stage: Stage) -> dict[int | None, Tensor]:
        """By group, ``[1, batch, pos, d_model]``: what a receiver without edges reads of it."""
        if stage.ports.start not in self._totals:
            blocks, layers = self.program.blocks, self.program.model.layers
            sums: dict[int | None, Tensor] = {}
            for b in stage.seen:
                post, own = blocks[b].post, self._sums[b]
                if blocks[b].growing is not None:
                    own = blocks[b].read_after(stage.n_mlps).sum(self.ablated[b])
                sums[post] = sums[post] + own if post in sums else own
            direct = [layers[i].attention.b_O for i in stage.constants]
            inside = {i: layers[i].attention.b_O for i in sums if i is not None}
            for post, b_O in [*((None, b_O) for b_O in direct), *inside.items()]:
                if b_O is not None:
                    sums[post] = sums[post] + b_O
            self._totals[stage.ports.start] = sums
        return self._totals[stage.ports.start]


class PatchedRun:
    """One pass over one batch.

    Without gradients, changes are written into one buffer; with them, what was read stays as it
    was, and blocks that are read later are put beside it.

    Parameters
    ----------
    plain
        Runs of the batch.
    weights
        Of edges.
    alive
        ``[sender]``: heads that are computed; None: all.
    """

    def __init__(
        self, plain: PlainRuns, weights: _Mask | EdgeWeights, alive: Mask | None = None
    ) -> None:
        self.plain, self.weights, self.program = plain, weights, plain.program
        self.layout = plain.layout if alive is None else _Layout(plain.program, alive)
        shape, gradients = plain.embeds.shape[1:], torch.is_grad_enabled()
        self.vectors = {
            post: plain.embeds.new_zeros(0 if gradients else n, *shape)
            for post, n in self.layout.size.items()
        }
        self.latents: dict[int, Tensor] = {}
        self._reconstructed = Reconstructed()
        self.write(0, self._members(0, plain.embeds))

    def rows(self, cuts: Mask | None = None) -> Tensor:
        """Metric of every scored row of the batch, ``[1 or cut, row]``."""
        *stages, logits = self.program.stages
        for stage in stages:
            if any(map(self.weights.matters, self.program.senders_computed(stage))):
                heads = self._heads(stage)
                if heads is not None and isinstance(stage, Heads):
                    self.run_heads(stage, heads)
                else:
                    self.run(stage, *self.weights.rows(stage))
        batch, experiment = self.plain.batch, self.plain.experiment
        weights, index = self.weights.rows(logits, cuts)
        each = batch.n_rows * self.plain.embeds.shape[-1] * self.plain.embeds.element_size()
        parts = [
            experiment.measure_rows(
                self.read(logits, some, batch.scored).flatten(1, 3), batch, self.program.model
            )
            for some in weights.split(max(1, _CUTS_BYTES // each), dim=2)
        ]
        return torch.cat(parts)[torch.as_tensor(index)]

    def states(self) -> Iterator[tuple[Stage, Inputs, dict[int, Tensor], Values]]:
        """Run stage by stage, see :meth:`PatchedModel.states`."""
        for stage in self.program.stages:
            weights, index = self.weights.rows(stage)
            sums = self.sums(stage, weights)
            raw = {layer: x for layer, x in sums.items() if layer is not None}
            inputs = Inputs(self._through_posts(sums), index)
            yield stage, inputs, raw, self.compute(stage, inputs)

    def run(self, stage: Stage, weights: Tensor, index: NDArray[np.int64]) -> None:
        """Read rows, compute what a stage writes, and record it."""
        n_numbers = self.plain.embeds[0].nelement()
        most = max(1, _ROWS_BYTES // (n_numbers * self.plain.embeds.element_size()))
        n_rows = weights.shape[2]
        if n_rows <= most or torch.is_grad_enabled() or not isinstance(stage, Transcoder):
            self.compute(stage, Inputs(self.read(stage, weights), index))
            return
        found: Values | None = None
        for start in range(0, n_rows, most):
            part = slice(start, start + most)
            inside = np.flatnonzero((start <= index) & (index < start + most))
            x = self.read(stage, weights[:, :, part])
            found = stage.compute_some(x, index[inside] - start, inside, found)
        assert found is not None
        self._record(stage, found)

    def run_heads(self, stage: Heads, heads: list[int]) -> None:
        """Read, compute and record some heads of a layer; nothing reads the others."""
        weights, index = self.weights.rows(stage, receivers=stage.read_by(heads))
        (b,) = stage.blocks
        z = stage.compute_heads(Inputs(self.read(stage, weights), index), heads)
        block = self.program.blocks[b].some(torch.as_tensor(heads))
        self.write(b, block.vectors(z - self._members(b, self.plain.ablated[b])))

    def _heads(self, stage: Stage) -> list[int] | None:
        """Heads of a stage that are computed alone; None where the stage is computed whole."""
        if not isinstance(stage, Heads) or isinstance(stage, LatentHeads):
            return None
        some = self.layout.members.get(stage.blocks[0])
        return None if some is None else some.tolist()

    def _members(self, b: int, value: Tensor) -> Tensor:
        """Values of the senders of a block that are kept."""
        some = self.layout.members.get(b)
        return value if some is None else value[torch.as_tensor(some)]

    def compute(self, stage: Stage, inputs: Inputs) -> Values:
        """Compute the values of the blocks that a stage writes, and record them."""
        return self._record(stage, stage.compute(inputs))

    def _record(self, stage: Stage, values: Values) -> Values:
        """Record what a stage writes, and return it."""
        values = self._reconstructed.leave(stage, values)
        for b, value in zip(stage.blocks, values, strict=True):
            change = self._members(b, value) - self._members(b, self.plain.ablated[b])
            block = self.program.blocks[b]
            some = self.layout.members.get(b)
            block = block if some is None else block.some(torch.as_tensor(some))
            self.write(b, block.parts(change))
        return values

    def write(self, b: int, change: Tensor) -> None:
        """Record by how much the senders of a block differ from what ablated edges carry."""
        block, places = self.program.blocks[b], self.layout.place.get(b)
        if places is None:
            self.latents[b] = change
        elif torch.is_grad_enabled():
            self.vectors[block.post] = torch.cat([self.vectors[block.post], change])
        else:
            self.vectors[block.post][places] = change

    def read(self, stage: Stage, weights: Tensor, positions: Tensor | None = None) -> Tensor:
        """``[row, 1, batch, pos, d_model]`` of ``weights [prompt, span, row, sender seen]``."""
        return self._through_posts(self.sums(stage, weights, positions), positions)

    def sums(
        self, stage: Stage, weights: Tensor, positions: Tensor | None = None
    ) -> dict[int | None, Tensor]:
        """As :meth:`read`, by post-norm and in front of it."""
        return self.mixed(stage, weights, positions, self.plain.totals(stage))

    def mixed(
        self,
        stage: Stage,
        weights: Tensor,
        positions: Tensor | None = None,
        totals: dict[int | None, Tensor] | None = None,
    ) -> dict[int | None, Tensor]:
        """Weighted sums of the changes that were written, by post-norm and in front of it.

        Parameters
        ----------
        stage, weights
            What reads, and ``[prompt, span, row, sender seen]``.
        positions
            Some of them; None: all.
        totals
            What is added, see :meth:`PlainRuns.totals`; None: nothing.

        Returns
        -------
        dict
            ``[row, 1, batch, pos, d_model]`` each.
        """
        low, _ = self.program.senders_seen(stage)
        weights = weights.to(self.plain.embeds)
        sums: dict[int | None, Tensor] = {}
        for group in self.layout.groups(stage):
            change = self.vectors[group.post][group.vectors]
            x = self._mix(_at(change, positions), weights[..., group.columns], positions)
            if totals is not None:
                x += _at(totals[group.post], positions)
            for b in group.narrow:
                if b in self.latents:
                    block = self.program.blocks[b].read_after(stage.n_mlps)
                    own = weights[..., block.start - low : block.stop - low]
                    x = self._add_latents(x, stage, b, block, own, positions)
            sums[group.post] = x
        return sums

    def _through_posts(
        self, sums: dict[int | None, Tensor], positions: Tensor | None = None
    ) -> Tensor:
        """Add sums at all or some positions up, each through its post-norm."""
        at = slice(None) if positions is None else positions
        found: Tensor | None = None
        for layer, x in sums.items():
            post = None if layer is None else self.program.model.layers[layer].attention_post
            part = x if post is None else post.at(at)(x)
            found = part if found is None else found + part
        assert found is not None
        return found

    def _mix(self, change: Tensor, weights: Tensor, positions: Tensor | None) -> Tensor:
        """Weighted sums of vectors ``[sender, 1, batch, pos, d_model]``."""
        per_prompt, per_span = len(weights) > 1, weights.shape[1] > 1
        if per_span:
            weights = weights[:, self._spans(positions)]  # (prompt, pos, row, sender)
        if not per_prompt:
            weights = weights[0]
        if not per_span:
            weights = weights.squeeze(-3)
        axes = "b" * per_prompt + "p" * per_span
        return torch.einsum(f"{axes}rs,skbpd->rkbpd", weights, change)

    def _add_latents(
        self,
        x: Tensor,
        stage: Stage,
        b: int,
        block: Block,
        weights: Tensor,
        positions: Tensor | None,
    ) -> Tensor:
        """Add weighted sums of the latents of a block to ``x [row, 1, batch, pos, d_model]``."""
        parts = _at(self.latents[b], positions)
        read = self.weights.edges.senders(stage, block)
        if len(read) < len(block):
            block, parts, weights = block.some(read), parts[read], weights[..., read]
        spans = self._spans(positions)
        if isinstance(self.weights, EdgeWeights):
            each = weights[:, spans] if weights.shape[1] > 1 else weights
            rows = each.movedim(2, 0) * coefficients(parts)  # (row, batch, pos, latent)
            return x + (rows @ block.directions)[:, None]
        if self.weights.edges.n_spans == 1:
            return x.add_(block.mix(parts, weights[0, 0]))
        for span in np.unique(spans):
            at = torch.from_numpy(np.flatnonzero(spans == span))
            x[..., at, :] += block.mix(parts[..., at, :], weights[0, span])
        return x

    def _spans(self, positions: Tensor | None) -> NDArray[np.int64]:
        """Span of each position, of all or some."""
        spans = np.array(self.plain.batch.spans)
        return spans if positions is None else spans[positions.cpu().numpy()]


def _at(x: Tensor, positions: Tensor | None) -> Tensor:
    """``[..., pos, width]`` at some positions."""
    return x if positions is None else x[..., positions, :]
