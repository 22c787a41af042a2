"""Attribution of edges and nodes from ordinary forward and backward passes.

The score of an edge is a first-order estimate of what ablating it does to the metric (Nanda 2023;
Syed et al. 2023, arXiv 2310.10348), and that of a node the sum over the edges out of it::

    score(u->v) = sum over batch and pos of (ablated_u - base_u) . d metric / d input_v
    score(u)    = sum over batch and pos of (ablated_u - base_u) . d metric / d u

divided by the number of scored rows.  The gradient is mapped back by each stage
(:meth:`acdc.engine.stages.Stage.pull`): through W_Q, W_K, W_V and the norm for heads, so that no
pass with q, k and v split is needed.  A latent differs between the runs, or is active, on few
tokens: its products are taken on these alone.

Products are streamed over chunks of tokens and over stages, for as many points at a time as fit:
what is written is the same at all of them, so gradients are added up first.  No array holds an
entry for every pair of sender and receiver but the scores themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.allocator import give_back
from acdc.engine.batch import Batch
from acdc.engine.experiment import Experiment
from acdc.engine.processes import Told
from acdc.engine.program import Program
from acdc.engine.stages import Gradients, Stage
from acdc.engine.values import (
    Block,
    Rows,
    Sparse,
    Values,
    add_product,
    coefficients,
    gather,
    product,
)
from acdc.models.lowering.model import Key, LoweredModel, Trace
from graphs.select import top_edges

__all__ = [
    "AtBase",
    "OfInputs",
    "Point",
    "Points",
    "Room",
    "Tokens",
    "Written",
    "chunk_size",
    "gradients",
    "integrate",
    "integrate_nodes",
    "node_scores",
    "parts_of",
    "strongest",
    "token_chunks",
]

Tokens = slice | Tensor
"""Index into the flattened batch and positions."""

_MOST_TOKENS = 64
"""Tokens of one chunk with latents: with more, those that few of them share fill the arrays."""


@dataclass(frozen=True, eq=False)
class Point:
    """Where a gradient is taken.

    Parameters
    ----------
    tokens
        ``[batch, pos]``.
    embeds, replaced
        Values to use instead of the run's own, see :meth:`LoweredModel.forward`.
    blocks
        Positions in :attr:`Program.blocks` of the senders that the gradient is credited to; None
        for all.
    """

    tokens: Int[Tensor, "batch pos"]
    embeds: list[Float[Tensor, "batch pos d_model"]] | None = None
    replaced: dict[Key, Tensor] | None = None
    blocks: tuple[int, ...] | None = None


Points = Callable[[Batch, Trace, Trace], Iterator[Point]]
"""``(batch, base, other) -> points``."""


@dataclass(frozen=True, eq=False)
class AtBase:
    """The one point of plain attribution: the base run, which is made once for both."""

    experiment: Experiment

    def __call__(self, batch: Batch, base: Trace, other: Trace) -> Iterator[Point]:
        """Yield it, see :data:`Points`."""
        yield Point(self.experiment.runs(batch)[0])


@dataclass(frozen=True, eq=False)
class OfInputs:
    """Points that are made of prompts and embeddings alone: plain runs are not kept for them."""

    points: Points

    def __call__(self, batch: Batch, base: Trace, other: Trace) -> Iterator[Point]:
        """Yield them, see :data:`Points`."""
        return self.points(batch, base, other)


Room = dict[int, Tensor]
"""Memory that is used again, by the number of its rows."""


def gradients(
    experiment: Experiment,
    batch: Batch,
    point: Point,
    keys: Sequence[Key],
    model: LoweredModel | None = None,
) -> Gradients:
    """Run forward and backward once.

    Parameters
    ----------
    experiment, batch
        The metric and what it compares with.
    point
        Where.
    keys
        What gradients are wanted at.
    model
        That of the batch, if its norms are held; None: the experiment's.
    """
    model = model or experiment.model
    embeds = model.embed(point.tokens) if point.embeds is None else point.embeds
    with torch.enable_grad():
        embeds = [embeds[0].detach().requires_grad_(True), *embeds[1:]]
        replaced = {
            key: x.detach().requires_grad_(True) for key, x in (point.replaced or {}).items()
        }  # behind a cut nothing else has a gradient
        trace = model.forward(point.tokens, embeds, replaced)
        final = trace.at(("final", 0))
        total = experiment.measure(final[:, batch.scored].flatten(0, 1), batch, model)
        cut = point.replaced is not None  # what feeds a replaced output has no gradient
        found = torch.autograd.grad(
            total, [trace.at(key) for key in keys], allow_unused=cut, materialize_grads=cut
        )
    return Gradients(trace.detached(), dict(zip(keys, found, strict=True)))


def integrate(
    experiment: Experiment,
    points: Points,
    n_points: int,
    memory: int,
    progress: Callable[[int], None] = lambda n_prompts: None,
) -> Float[np.ndarray, " edge"]:
    """Mean attribution of edges over the points at which the gradient is taken.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    points
        ``(batch, base, other) -> points``.
    n_points
        By how many the sum is divided.
    memory
        Bytes that the activations of one pass, and the products of one chunk, may take;
        prompts are run in parts that fit.
    progress
        Called with the number of prompts after each pass.

    Returns
    -------
    ndarray
        ``[edge]`` scores, means over scored rows.
    """
    scores = np.zeros(experiment.graph.n_edges)
    span, place = experiment.graph.edge_span, experiment.edge_component
    for first, found in _sums(experiment, points, n_points, memory, progress):
        own = (first <= place) & (place < first + found.shape[1])
        scores[own] = found[span[own], place[own] - first]
    return scores / experiment.n_rows


def strongest(
    experiment: Experiment,
    points: Points,
    n_points: int,
    n_edges: int,
    memory: int,
) -> Int[np.ndarray, " edge"]:
    """Places of the edges with the largest absolute attribution, of a graph of any size.

    Scores are those of :func:`integrate`.  They are computed for the receivers of some stages at a
    time, and all but the largest so far are forgotten.

    Parameters
    ----------
    experiment, points, n_points, memory
        As of :func:`integrate`; the experiment's graph is never asked for.
    n_edges
        How many; ties go to the lower places.

    Returns
    -------
    ndarray
        ``[edge]`` places in ``experiment.outline``, ascending.
    """
    places, size = np.zeros(0, dtype=np.int64), np.zeros(0)
    for first, found in _sums(experiment, points, n_points, memory, lambda n_prompts: None):
        new = np.abs(found[0], out=found[0])
        if len(size) == n_edges:  # a tie goes to the lower place, which is there already
            best = np.flatnonzero(new > size.min())
        else:
            best = np.flatnonzero(top_edges(new, min(n_edges, len(new))))
        places, size = np.append(places, first + best), np.append(size, new[best])
        best = np.flatnonzero(top_edges(size, min(n_edges, len(size))))
        places, size = places[best], size[best]
    return places


def _sums(
    experiment: Experiment,
    points: Points,
    n_points: int,
    memory: int,
    progress: Callable[[int], None],
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield sums over scored rows for the edges of some stages at a time.

    Each time the first place in :attr:`Experiment.outline`, and ``[span, place]`` of those that
    follow.  Stages whose edges fit into a quarter of the memory (one at least) are done together;
    the passes are made anew for the next.
    """
    groups = _stage_groups(experiment, memory // (4 * 8 * experiment.n_spans))
    for n, group in enumerate(groups):
        first = experiment.outline.start[experiment.program.stages[group.start].ports.start]
        tell = Told(progress if n == len(groups) - 1 else lambda n_prompts: None)
        of = partial(_scores, experiment, points, group, 1 / n_points, memory, tell)
        yield int(first), experiment.sum_of_batches(of, told=tell).numpy()


def _keeps_runs(points: Points) -> bool:
    """Whether points are made of what plain runs leave, beyond their embeddings."""
    return not isinstance(points, AtBase | OfInputs)


def _stage_groups(experiment: Experiment, most: int) -> list[range]:
    """Neighbouring stages with at most so many edges, or one."""
    start, stages = experiment.outline.start, experiment.program.stages
    sizes = [int(start[stage.ports.stop] - start[stage.ports.start]) for stage in stages]
    groups, n_edges = [range(0, 0)], 0
    for i, size in enumerate(sizes):
        if groups[-1] and n_edges + size > most:
            groups.append(range(i, i))
            n_edges = 0
        groups[-1], n_edges = range(groups[-1].start, i + 1), n_edges + size
    return groups


def _scores(
    experiment: Experiment,
    points: Points,
    group: range,
    weight: float,
    memory: int,
    progress: Callable[[int], None],
    i: int,
) -> Tensor:
    """Weighted sums over the prompts of batch ``i``, ``[span, place]`` of a group of stages."""
    start = experiment.outline.start
    keys = tuple(key for stage in experiment.program.stages for key in stage.sees_gradients)
    stages = experiment.program.stages[group.start : group.stop]
    places = start - start[stages[0].ports.start]
    n_places = int(places[stages[-1].ports.stop])
    scores = torch.zeros(experiment.n_spans, n_places, dtype=torch.double)
    at_base: list[Gradients] = []

    def base_run(batch: Batch) -> Trace:
        at_base.append(gradients(experiment, batch, Point(experiment.runs(batch)[0]), keys))
        return at_base[-1].trace

    shares = isinstance(points, AtBase) and not experiment.holds_base
    most = experiment.footprint.tokens_of_part(experiment.batches[i].clean.shape[1])
    keeps = _keeps_runs(points)
    together = experiment.footprint.points_at_once(
        experiment.batches[i].clean.shape[1], round(1 / weight), keeps_runs=keeps
    )
    parts = parts_of(
        experiment, i, memory, base_run if shares else None, together, keeps_runs=keeps
    )
    for batch, program, base, other, differences in parts:
        own = program.stages[group.start : group.stop]
        is_dense = not any(block.narrow for block in program.blocks)
        chunk = most if is_dense else min(most, chunk_size(program, differences, memory))
        room: Room = {}
        for some in _together(points(batch, base, other), together):
            found = []
            for point in some:
                one = at_base.pop() if at_base else None
                found.append(one or gradients(experiment, batch, point, keys, program.model))
                progress(batch.n_prompts)
            with torch.no_grad():
                device = batch.clean.device
                for span, tokens in token_chunks(batch.spans, batch.n_prompts, chunk, device):
                    rows = Written(
                        program, differences, tokens, found[0].trace, some[0].blocks, room=room
                    )
                    for stage in own:
                        seen = program.senders_seen(stage)
                        _accumulate(stage, seen, places, found, rows, scores[span], weight)
            del found, rows, one  # before the next gradients are taken
        del base, other, differences, some  # before the next part is run
    return scores


def _together(points: Iterable[Point], most: int) -> Iterator[list[Point]]:
    """Yield at most so many points at a time that the same senders are credited with."""
    some: list[Point] = []
    for point in points:
        if some and (len(some) == most or point.blocks != some[0].blocks):
            yield some
            some = []
        some.append(point)
    if some:
        yield some


def _pulled(stage: Stage, found: Sequence[Gradients], tokens: Tokens) -> Iterator[tuple[int, Rows]]:
    """Yield what adds up to :meth:`Stage.pull` at several points: sums of what is dense."""
    first, *others = (stage.pull(one, tokens) for one in found)
    for port, total in first:
        for other in others:
            _, rows = next(other)
            if isinstance(rows, Sparse) or isinstance(total, Sparse):
                yield port, rows
            else:
                total = total + rows
        yield port, total


def _accumulate(
    stage: Stage,
    senders: tuple[int, int],
    start: NDArray[np.int64],
    found: Sequence[Gradients],
    rows: Written,
    scores: Tensor,
    weight: float,
) -> None:
    """Add ``weight * score`` of the edges into a stage, on some tokens.

    Parameters
    ----------
    stage, senders
        What reads, and the range of senders that it reads.
    start
        ``[receiver]``: where its edges begin in the scores.
    found, rows
        Gradients at some points, and what senders write.
    scores
        ``[place]``.
    weight
        Factor.
    """
    low, high = senders
    seen = list(rows.between(low, high, stage.n_mlps))
    if not seen:
        return
    for port, pulled in _pulled(stage, found, rows.tokens):
        first = int(start[stage.first_receiver + port])
        n = pulled.n if isinstance(pulled, Sparse) else len(pulled)
        own = scores[first : first + n * (high - low)].view(n, high - low)
        for columns, written in seen:
            if isinstance(pulled, Sparse) and isinstance(written, Sparse):
                assert isinstance(columns, slice)
                add_product(own, columns.start, pulled, written, weight)
            else:
                own[:, columns] += weight * product(pulled, written).double().cpu()


class Written:
    """What senders write on some tokens, or by how much that differs.

    Parameters
    ----------
    program
        Stages of the model.
    values
        By block, ``[sender, token, width]``.
    tokens
        Which of them.
    at
        The pass at whose point post-norms are linear.
    blocks
        Positions of some blocks; None: all.
    frozen
        Whether a post-norm's scale is a constant.
    room
        Where vectors are put: those of the last chunk are overwritten.  None: in new memory.
    """

    def __init__(
        self,
        program: Program,
        values: Values,
        tokens: Tokens,
        at: Trace,
        blocks: Sequence[int] | None = None,
        *,
        frozen: bool = False,
        room: Room | None = None,
    ) -> None:
        self.tokens = tokens
        dense, ids = [], []
        self._sparse: list[tuple[int, Sparse]] = []
        self._growing: list[tuple[Block, Tensor, Tensor]] = []
        for b in range(len(values)) if blocks is None else blocks:
            block = program.blocks[b]
            if block.growing is not None:
                self._growing.append((block, *gather(coefficients(values[b])[tokens])))
                continue
            rows = program.through_post(block, block.rows(values[b], tokens), tokens, at, frozen)
            if isinstance(rows, Sparse):
                self._sparse.append((block.start, rows))
            else:
                dense.append(rows)
                ids.append(np.arange(block.start, block.stop))
        self._dense = _side_by_side(dense, {} if room is None else room) if dense else None
        self._ids = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int64)

    def between(self, low: int, high: int, n_mlps: int) -> Iterator[tuple[slice | Tensor, Rows]]:
        """Yield places, counted from ``low``, and rows of the senders ``low .. high - 1``.

        Rows are as read where ``n_mlps`` MLPs have written.
        """
        first, last = np.searchsorted(self._ids, (low, high))
        if self._dense is not None and first < last:
            ids = self._ids[first:last] - low
            in_a_row = ids[-1] - ids[0] + 1 == len(ids)
            places = slice(ids[0], ids[-1] + 1) if in_a_row else torch.as_tensor(ids)
            yield places, self._dense[first:last]
        for start, rows in self._sparse:
            if low <= start < high:
                yield slice(start - low, start - low + rows.n), rows
        for block, index, slots in self._growing:
            if low <= block.start < high:
                directions = block.read_after(n_mlps).directions
                rows = Sparse(len(block), index, directions[index] * slots[..., None])
                yield slice(block.start - low, block.stop - low), rows


def integrate_nodes(
    experiment: Experiment,
    points: Points,
    n_points: int,
    memory: int,
    progress: Callable[[int], None] = lambda n_prompts: None,
) -> Float[np.ndarray, "prompt sender"]:
    """Mean attribution of nodes over the points, prompt by prompt.

    The backward pass stops at what the senders write, so it costs less than that of edges.

    Parameters
    ----------
    experiment, points, n_points, memory, progress
        As of :func:`integrate`; each point credits every sender.

    Returns
    -------
    ndarray
        ``[prompt, sender]`` in the order of ``experiment.batches``, summed over the positions of
        the sender's span and over the scored positions of a prompt.
    """
    program, n_spans = experiment.program, experiment.graph.shape.n_spans
    writing = [stage for stage in program.stages if stage.blocks]
    keys: list[Key] = [("embeds", 0), *(stage.written_at for stage in writing)]
    tell = Told(progress)

    def of(i: int) -> Tensor:
        totals = []
        parts = parts_of(experiment, i, memory, keeps_runs=_keeps_runs(points))
        for batch, own, base, other, differences in parts:
            total = torch.zeros(batch.n_prompts, program.n_senders, n_spans, dtype=torch.double)
            inside = torch.eye(n_spans, dtype=torch.double)[list(batch.spans)]  # (pos, span)
            for point in points(batch, base, other):
                found = gradients(experiment, batch, point, keys, own.model)
                # token and position embeddings are added: they share a gradient
                effects = [program.blocks[0].pull(found.tokens(("embeds", 0)))]
                for stage in writing:
                    effects += stage.effects(found, [program.blocks[b] for b in stage.blocks])
                for block, change, g in zip(program.blocks, differences, effects, strict=True):
                    each = torch.linalg.vecdot(change, g).unflatten(1, batch.clean.shape)
                    by_span = each.double().cpu() @ inside  # (sender, batch, span)
                    total[:, block.start : block.stop] += by_span.transpose(0, 1) / n_points
                del found, effects, g  # before the next gradient is taken
                tell(batch.n_prompts)
            totals.append(total.flatten(1))
            del base, other, differences  # before the next part is run
        return torch.cat(totals)

    return torch.cat(experiment.by_batch(of, told=tell)).numpy()


def node_scores(
    experiment: Experiment,
    points: Points,
    n_points: int,
    memory: int = 1 << 30,
    progress: Callable[[int], None] = lambda n_prompts: None,
) -> Float[np.ndarray, " sender"]:
    """``[sender]``: mean of :func:`integrate_nodes` over scored rows; parameters as there."""
    found = integrate_nodes(experiment, points, n_points, memory, progress)
    return found.sum(0) / experiment.n_rows


def _side_by_side(parts: list[Tensor], room: Room) -> Tensor:
    """Concatenate parts ``[row, token, d_model]`` where the last ones stood, if they fit."""
    n = sum(map(len, parts))
    if n not in room or room[n].shape[1] < parts[0].shape[1]:
        room[n] = parts[0].new_empty(n, *parts[0].shape[1:])
    return torch.cat(parts, out=room[n][:, : parts[0].shape[1]])


def parts_of(
    experiment: Experiment,
    i: int,
    memory: int,
    base_run: Callable[[Batch], Trace] | None = None,
    together: int = 1,
    *,
    keeps_runs: bool = True,
) -> Iterator[tuple[Batch, Program, Trace, Trace, Values]]:
    """Yield parts of a batch that fit: prompts, program, plain runs and senders' differences.

    Differences ``ablated_u - base_u`` are ``[sender, token, width]`` by block.  ``base_run`` makes
    the run that ablation starts from; None: an ordinary pass.  The gradients of ``together`` points
    are held at once; of the plain runs all, or the embeddings alone.  How many prompts fit:
    :meth:`Footprint.prompts_at_once`.
    """
    program, whole = experiment.program, experiment.batches[i]
    n_prompts = experiment.footprint.prompts_at_once(
        whole.clean.shape[1], memory, together, keeps_runs=keeps_runs
    )
    for batch in whole.split(n_prompts):
        with torch.no_grad():
            tokens, others = experiment.runs(batch)
            other = experiment.model.forward(others)  # first: little is kept of it beside the base
            written = program.values(other)
            if not keeps_runs:
                other = Trace(other.embeds)
            base = experiment.model.forward(tokens) if base_run is None else base_run(batch)
            differences = _differences(experiment, written, program.values(base))
            own = experiment.program_on(batch, base)
            if not keeps_runs:
                base = Trace(base.embeds)
            del written
        yield batch, own, base, other, differences
        del base, other, differences
        give_back()


def _differences(experiment: Experiment, other: Values, base: Values) -> Values:
    """``ablated - base`` by block, ``[sender, token, width]``, given what is written in both runs.

    Both lists are emptied, so that what is done with is not held.
    """
    ablated = experiment.ablated_values(other, base)
    ablated.reverse()
    base.reverse()
    found = []
    while base:
        found.append((ablated.pop() - base.pop()).flatten(1, 3))
    return found


def chunk_size(program: Program, differences: Values, memory: int) -> int:
    """How many tokens' vectors fit."""
    model, rows, narrow = program.model, 3 * program.shape.n_heads, False
    for block, change in zip(program.blocks, differences, strict=True):
        if block.narrow:
            rows += 3 * int((coefficients(change) != 0).sum(1).max())
            narrow = True
        else:
            rows += len(block)
    size = max(1, memory // (rows * model.d_model * model.W_U.element_size()))
    return min(size, _MOST_TOKENS) if narrow else size


def token_chunks(
    spans: Sequence[int], n_prompts: int, chunk: int, device: torch.device
) -> Iterator[tuple[int, Tokens]]:
    """Yield ``(span, tokens)``: all tokens of a batch, no two spans and at most ``chunk`` together.

    Parameters
    ----------
    spans
        ``[pos]``: index of the span of each position.
    n_prompts
        Prompts in the batch; tokens are indices into the flattened ``[batch, pos]``.
    chunk
        Most tokens at once.
    device
        Of the indices.
    """
    if len(set(spans)) == 1:
        n_tokens = n_prompts * len(spans)
        for start in range(0, n_tokens, chunk):
            yield spans[0], slice(start, min(start + chunk, n_tokens))
        return
    of_token = torch.tensor(spans, device=device).repeat(n_prompts)
    for span in sorted(set(spans)):
        size = max(1, chunk // len(spans)) * spans.count(span)  # of as many prompts
        for tokens in torch.nonzero(of_token == span)[:, 0].split(min(size, chunk)):
            yield span, tokens
