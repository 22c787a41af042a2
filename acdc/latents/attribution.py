"""Node and edge attribution with latents, from ordinary forward and backward passes.

``score(u->v) = sum over batch and pos of (ablated_u - base_u) . d metric / d input_v`` as in
:mod:`acdc.engine.attribution`, and ``score(u)`` likewise with the gradient at what ``u`` writes.

With every node in, the parts of a site add up to what the model writes there, so one plain
backward pass gives every gradient: a component's receivers have the gradients they have without
dictionaries, a cut has the gradient of the stream, and a transcoder's latent ``i`` has
``(g . direction_i) * d coefficient_i / d stream``, the rest of the MLP's being its error node's.

A latent differs between the runs, or is active, on few tokens.  Its scores are summed over these
alone: per chunk of tokens, the differing latents of a block are gathered ``[token, slot, d_model]``
and multiplied with the gradients; what comes out is added up by latent.  No array holds an entry
for every pair of latents but the scores themselves, ``[edge]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.attribution import Point
from acdc.engine.experiment import Batch, Experiment
from acdc.engine.program import Program
from acdc.engine.stages import Cut, Heads, Mlp, Stage, Transcoder
from acdc.engine.values import Block, coefficients
from acdc.lowering.attention import KINDS
from acdc.lowering.model import LoweredModel, Trace
from graphs import Graph

if TYPE_CHECKING:
    from acdc.latents.experiment import LatentExperiment

__all__ = ["edge_scores", "node_scores"]

Points = Callable[[Batch, Trace, Trace], Iterator[Point]]
Scores = NDArray[np.float64]
_MOST_TOKENS = 64
"""Tokens of one chunk: with more, latents that few of them share fill the gathered arrays."""


@dataclass(frozen=True, eq=False)
class _Gradients:
    """``d metric / d x`` of one pass, tokens flattened.

    Parameters
    ----------
    trace
        The pass, detached.
    at_heads
        Per layer and kind, ``[head, token, d_head]``.
    mlp_in
        Per layer, of the branch that the MLP reads, ``[token, d_model]``.
    stream
        In front of each layer and behind the last, ``[token, d_model]``.
    """

    trace: Trace
    at_heads: list[dict[str, Tensor]]
    mlp_in: list[Tensor]
    stream: list[Tensor]

    def after_attention(self, model: LoweredModel, layer: int) -> Tensor:
        """At what the attention of a layer writes, ``[token, d_model]``."""
        after = self.stream[layer + 1]
        if model.layers[layer].mlp is None or model.shape.parallel:
            return after
        return after + self.mlp_in[layer]


def _gradients(experiment: Experiment, batch: Batch, point: Point) -> _Gradients:
    """Run forward and backward once."""
    assert point.replaced is None, "a method that does not know latents"
    model = experiment.model
    embeds = model.embed(point.tokens) if point.embeds is None else point.embeds
    with torch.enable_grad():
        embeds = [embeds[0].detach().requires_grad_(True), *embeds[1:]]
        trace = model.forward(point.tokens, embeds)
        final = trace.final
        assert final is not None
        total = experiment.measure(final[:, batch.scored].flatten(0, 1), batch)
        by_kind = [getattr(trace, kind) for kind in KINDS]
        wanted = [*by_kind[0], *by_kind[1], *by_kind[2], *trace.mlp_in, *trace.attention_in, final]
        found = list(torch.autograd.grad(total, wanted))
    n = len(model.layers)
    heads = [x.transpose(0, 1).flatten(1, 2) for x in found[: 3 * n]]
    flat = [x.flatten(0, 1) for x in found[3 * n :]]
    lists = {
        name: [x.detach() for x in value]
        for name, value in vars(trace).items()
        if isinstance(value, list)
    }
    return _Gradients(
        Trace(**lists, final=final.detach()),
        [{kind: heads[k * n + i] for k, kind in enumerate(KINDS)} for i in range(n)],
        flat[: len(trace.mlp_in)],
        flat[len(trace.mlp_in) :],
    )


@dataclass(frozen=True, eq=False)
class _Slots:
    """Latents of a block that matter on each token of a chunk, padded to equally many.

    Parameters
    ----------
    index
        ``[token, slot]``: which latent of the block.
    value
        ``[token, slot]``: its value; 0 where there is none.
    """

    index: Tensor
    value: Tensor

    @classmethod
    def of(cls, dense: Tensor) -> _Slots:
        """Gather the entries of ``dense [token, latent]`` that are not zero."""
        token, latent = dense.nonzero(as_tuple=True)
        counts = torch.bincount(token, minlength=len(dense))
        slot = torch.arange(len(token), device=dense.device)
        slot = slot - (counts.cumsum(0) - counts)[token]
        width = int(counts.max()) if len(token) else 0
        index = torch.zeros(len(dense), width, dtype=torch.long, device=dense.device)
        value = dense.new_zeros(len(dense), width)
        index[token, slot], value[token, slot] = latent, dense[token, latent]
        return cls(index, value)


class _Differences:
    """``ablated_u - base_u`` of all senders of a batch, tokens flattened."""

    def __init__(
        self, experiment: LatentExperiment, program: Program, base: Trace, other: Trace
    ) -> None:
        self.program = program
        values = program.values(base)
        runs = zip(values, experiment.ablated_values(program.values(other), values), strict=True)
        self.values: list[Tensor] = []
        for block, (b, a) in zip(program.blocks, runs, strict=True):
            change = block.parts(a - b)
            if block.narrow:  # (latent, 1, batch, pos, 1) -> (token, latent)
                self.values.append(coefficients(change).flatten(0, 2))
            else:  # (sender, 1, batch, pos, d) -> (sender, token, d)
                self.values.append(change.flatten(1, 3))

    def chunk(self, b: int, tokens: slice, at: Trace) -> Tensor | tuple[_Slots, Tensor]:
        """Vectors ``[sender, token, d_model]``, or slots and ``[token, slot, d_model]``."""
        block, value = self.program.blocks[b], self.values[b]
        if not block.narrow:
            return self._post(block, value[:, tokens], tokens, at)
        slots = _Slots.of(value[tokens])
        vectors = block.directions[slots.index] * slots.value[..., None]
        return slots, self._post(block, vectors.transpose(0, 1), tokens, at).transpose(0, 1)

    def _post(self, block: Block, change: Tensor, tokens: slice, at: Trace) -> Tensor:
        """Map a change ``[n, token, d_model]`` through the post-norm that the stream has."""
        if block.post is None:
            return change
        norm = self.program.model.layers[block.post].attention_post
        assert norm is not None
        return norm.jvp(at.attention_out[block.post].flatten(0, 1)[tokens], change)


def node_scores(
    experiment: LatentExperiment,
    program: Program,
    points: Points,
    n_points: int,
    memory: int,
    progress: Callable[[int], None] = lambda n: None,
) -> Scores:
    """Estimated change of the metric when a node alone is ablated.

    Parameters
    ----------
    experiment, program
        Model, prompts, metric; its stages.
    points, n_points
        Where gradients are taken, see :func:`acdc.engine.attribution.integrate`.
    memory
        Bytes that the activations of one pass may take.
    progress
        Called with the number of prompts after each pass.

    Returns
    -------
    ndarray
        ``[sender]``: the sum of the scores of its edges.
    """
    scores = np.zeros(program.n_senders)
    for batch, differences, point in _passes(experiment, program, points, memory):
        found = _gradients(experiment, batch, point)
        for block, change, g in _written(program, differences, found):
            if not block.narrow:
                part = torch.einsum("std,td->s", change, g)
            else:
                part = (change * (g @ block.directions.T)).sum(0)
            scores[block.start : block.stop] += part.double().cpu().numpy() / n_points
        progress(batch.n_prompts)
    return scores / experiment.n_rows


def _written(
    program: Program, differences: _Differences, found: _Gradients
) -> Iterator[tuple[Block, Tensor, Tensor]]:
    """Yield every block, its differences and the gradient at what it writes."""
    yield program.blocks[0], differences.values[0], found.stream[0]
    model = program.model
    for stage in program.stages[:-1]:
        if isinstance(stage, Heads):
            g = found.after_attention(model, stage.layer)
        elif isinstance(stage, Mlp):
            g = found.stream[stage.layer + 1]
        else:
            g = _cut_gradient(stage, model, found)
        for b in stage.blocks:
            block, at = program.blocks[b], g
            if block.post is not None:
                norm = model.layers[block.post].attention_post
                assert norm is not None
                at = norm.vjp(found.trace.attention_out[block.post].flatten(0, 1), g)
            yield block, differences.values[b], at


def _cut_gradient(stage: Stage, model: LoweredModel, found: _Gradients) -> Tensor:
    assert isinstance(stage, Cut)
    if stage.attachment.site.kind == "resid_mid":
        return found.after_attention(model, stage.layer)
    return found.stream[stage.layer]


def _passes(
    experiment: LatentExperiment, program: Program, points: Points, memory: int
) -> Iterator[tuple[Batch, _Differences, Point]]:
    """Yield every part of the prompts with its differences, once per point."""
    model = experiment.model
    for whole in experiment.batches:
        n_pos = whole.clean.shape[1]
        numbers = n_pos * (
            model.shape.n_layers * (40 * model.d_model + 4 * n_pos * model.shape.n_heads)
        )
        numbers += 4 * n_pos * (program.n_senders + len(program.blocks) * model.d_model)
        n_prompts = max(1, memory // (numbers * model.W_U.element_size()))
        for batch in whole.split(n_prompts):
            base_tokens, other_tokens = experiment.runs(batch)
            with torch.no_grad():
                base, other = model.forward(base_tokens), model.forward(other_tokens)
                differences = _Differences(experiment, program, base, other)
            for point in points(batch, base, other):
                yield batch, differences, point


def edge_scores(
    experiment: LatentExperiment,
    program: Program,
    graph: Graph,
    points: Points,
    n_points: int,
    memory: int,
    progress: Callable[[int], None] = lambda n: None,
) -> Scores:
    """Estimated change of the metric when an edge alone is ablated.

    Parameters
    ----------
    experiment, program, graph
        Model, prompts, metric; its stages; the graph with every edge.
    points, n_points, memory, progress
        As in :func:`node_scores`.

    Returns
    -------
    ndarray
        ``[edge]``, means over scored rows.
    """
    scores = torch.zeros(graph.n_edges, dtype=torch.float64)
    for batch, differences, point in _passes(experiment, program, points, memory):
        found = _gradients(experiment, batch, point)
        with torch.no_grad():
            for tokens in _chunks(program, differences, memory):
                _Chunk(program, graph, differences, found, tokens).add_to(scores, 1 / n_points)
        progress(batch.n_prompts)
    return scores.numpy() / experiment.n_rows


def _chunks(program: Program, differences: _Differences, memory: int) -> Iterator[slice]:
    """Yield tokens in parts whose gathered vectors fit."""
    n_tokens = differences.values[0].shape[1]
    slots = 0
    for block, value in zip(program.blocks, differences.values, strict=True):
        slots += len(value) if not block.narrow else int((value != 0).sum(1).max())
    each = 3 * slots * program.model.d_model * program.model.W_U.element_size()
    size = max(1, min(_MOST_TOKENS, memory // each))
    for start in range(0, n_tokens, size):
        yield slice(start, min(start + size, n_tokens))


class _Chunk:
    """Scores that some tokens contribute."""

    def __init__(
        self,
        program: Program,
        graph: Graph,
        differences: _Differences,
        found: _Gradients,
        tokens: slice,
    ) -> None:
        self.program, self.graph, self.found, self.tokens = program, graph, found, tokens
        n = len(program.blocks)
        self.changes = [differences.chunk(b, tokens, found.trace) for b in range(n)]

    def add_to(self, scores: Tensor, weight: float) -> None:
        """Add the weighted scores of every edge, stage by stage."""
        start = self.graph.receiver_start
        for stage in self.program.stages:
            low = self.program.blocks[stage.seen[0]].start
            high = self.program.blocks[stage.seen[-1]].stop
            first, n = stage.first_receiver, stage.n_receivers
            own = scores[start[first] : start[first + n]].view(n, high - low)
            if isinstance(stage, Transcoder):
                slots, latent, error = self._transcoder(stage)
                self._add_sparse(own[:-1], stage, slots, latent, weight)
                self._add(own[-1:], stage, error[None], weight)
            else:
                self._add(own, stage, self._gradient(stage), weight)

    def _add(self, own: Tensor, stage: Stage, g: Tensor, weight: float) -> None:
        """Add scores of receivers with gradients ``[receiver, token, d_model]``."""
        low = self.program.blocks[stage.seen[0]].start
        for b in stage.seen:
            block, change = self.program.blocks[b], self.changes[b]
            columns = own[:, block.start - low : block.stop - low]
            if isinstance(change, Tensor):
                columns += weight * (g.flatten(1) @ change.flatten(1).T).double().cpu()
                continue
            slots, vectors = change
            products = torch.bmm(vectors, g.permute(1, 2, 0))  # (token, slot, receiver)
            total = products.new_zeros(len(block), len(g))
            total.index_add_(0, slots.index.flatten(), products.flatten(0, 1))
            columns += weight * total.T.double().cpu()

    def _add_sparse(
        self, own: Tensor, stage: Stage, active: _Slots, g: Tensor, weight: float
    ) -> None:
        """Add scores of latents' receivers with gradients ``[token, slot, d_model]``."""
        low, n = self.program.blocks[stage.seen[0]].start, len(own)
        if not active.index.numel():
            return
        for b in stage.seen:
            block, change = self.program.blocks[b], self.changes[b]
            columns = own[:, block.start - low : block.stop - low]
            if isinstance(change, Tensor):
                products = torch.bmm(g, change.permute(1, 2, 0))  # (token, slot, sender)
                total = products.new_zeros(n, len(block))
                total.index_add_(0, active.index.flatten(), products.flatten(0, 1))
            else:
                slots, vectors = change
                products = torch.bmm(g, vectors.transpose(1, 2))  # (token, slot, slot)
                pair = active.index[:, :, None] * len(block) + slots.index[:, None, :]
                total = products.new_zeros(n * len(block))
                total.index_add_(0, pair.flatten(), products.flatten())
                total = total.view(n, len(block))
            columns += weight * total.double().cpu()

    def _gradient(self, stage: Stage) -> Tensor:
        """``[receiver, token, d_model]`` of a stage whose receivers all read on every token."""
        model, found, tokens = self.program.model, self.found, self.tokens
        if isinstance(stage, Heads):
            return self._heads(stage)
        if isinstance(stage, Mlp):
            return found.mlp_in[stage.layer][None, tokens]
        if isinstance(stage, Cut):
            return _cut_gradient(stage, model, found)[None, tokens]
        return found.stream[-1][None, tokens]

    def _heads(self, stage: Stage) -> Tensor:
        model, layer = self.program.model, self.program.model.layers[stage.layer]
        point = self.found.trace.attention_in[stage.layer].flatten(0, 1)[self.tokens]
        q, k, v = (
            g[:, self.tokens] @ layer.attention.W[kind].transpose(1, 2)
            for kind, g in self.found.at_heads[stage.layer].items()
        )
        if model.shape.split_qkv:
            mapped = torch.cat([q, k, v])
        elif model.shape.grouped:
            mapped = torch.cat([q, k + v])
        else:
            mapped = q + k + v
        return layer.ln1.vjp(point, mapped)

    def _transcoder(self, stage: Transcoder) -> tuple[_Slots, Tensor, Tensor]:
        """Active latents, their receivers' gradients, and the error node's."""
        attachment, tokens = stage.attachment, self.tokens
        stream = self.found.trace.mlp_in[stage.layer].flatten(0, 1)[tokens]
        active = attachment.coefficients(attachment.read_stream(stream)) != 0
        effect = self.found.stream[stage.layer + 1][tokens] @ attachment.directions.T
        slots = _Slots.of(torch.where(active, effect, 0.0))
        g = attachment.gradients(stream, slots.index.T).transpose(0, 1) * slots.value[..., None]
        return slots, g, self.found.mlp_in[stage.layer][tokens] - g.sum(1)
