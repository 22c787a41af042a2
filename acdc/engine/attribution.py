"""Attribution of edges and nodes from ordinary forward and backward passes.

The score of an edge is a first-order estimate of what ablating it does to the metric (Nanda 2023;
Syed et al. 2023, arXiv 2310.10348), and that of a node the sum over the edges out of it::

    score(u->v) = sum over batch and pos of (ablated_u - base_u) . d metric / d input_v
    score(u)    = sum over batch and pos of (ablated_u - base_u) . d metric / d u

divided by the number of scored rows.  The gradient is mapped back by each stage
(:meth:`acdc.engine.stages.Stage.pull`): through W_Q, W_K, W_V and the norm for heads, so that no
pass with q, k and v split is needed.  A latent differs between the runs, or is active, on few
tokens: its products are taken on these alone.

Products are streamed over chunks of tokens and over stages.  No array holds an entry for every
pair of sender and receiver but the scores themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.experiment import Batch, Experiment
from acdc.engine.program import Program
from acdc.engine.stages import Gradients
from acdc.engine.values import Rows, Sparse, Values, coefficients, product
from acdc.models.lowering.model import Key, LoweredModel, Trace

__all__ = [
    "Point",
    "Points",
    "Tokens",
    "Written",
    "bytes_per_prompt",
    "chunk_size",
    "gradients",
    "integrate",
    "integrate_nodes",
    "node_scores",
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

    tokens: Tensor
    embeds: list[Tensor] | None = None
    replaced: dict[Key, Tensor] | None = None
    blocks: tuple[int, ...] | None = None


Points = Callable[[Batch, Trace, Trace], Iterator[Point]]
"""``(batch, base, other) -> points``."""


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
) -> NDArray[np.float64]:
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
    program, graph = experiment.program, experiment.graph
    keys = tuple(key for stage in program.stages for key in stage.sees_gradients)
    scores = torch.zeros(graph.shape.n_spans, experiment.components.n_edges, dtype=torch.double)
    for batch, program, base, other, differences in _parts(experiment, memory):
        chunk = chunk_size(program, differences, memory)
        for point in points(batch, base, other):
            found = gradients(experiment, batch, point, keys, program.model)
            with torch.no_grad():
                device = batch.clean.device
                for span, tokens in token_chunks(batch.spans, batch.n_prompts, chunk, device):
                    rows = Written(program, differences, tokens, found.trace, point.blocks)
                    start = experiment.components.receiver_start
                    _accumulate(program, start, found, rows, scores[span], 1 / n_points)
            del found
            progress(batch.n_prompts)
    return scores.numpy()[graph.edge_span, experiment.edge_component] / experiment.n_rows


def _accumulate(
    program: Program,
    start: NDArray[np.int64],
    found: Gradients,
    rows: Written,
    scores: Tensor,
    weight: float,
) -> None:
    """Add ``weight * score`` of some tokens to ``scores [edge of the components]``.

    ``start`` has the first edge of each receiver.
    """
    for stage in program.stages:
        low, high = program.senders_seen(stage)
        seen = list(rows.between(low, high))
        if not seen:
            continue
        for port, pulled in stage.pull(found, rows.tokens):
            first = int(start[stage.first_receiver + port])
            n = pulled.n if isinstance(pulled, Sparse) else len(pulled)
            own = scores[first : first + n * (high - low)].view(n, high - low)
            for columns, written in seen:
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
    ) -> None:
        self.tokens = tokens
        dense, ids = [], []
        self._sparse: list[tuple[int, Sparse]] = []
        for b in range(len(values)) if blocks is None else blocks:
            block = program.blocks[b]
            rows = program.through_post(block, block.rows(values[b], tokens), tokens, at, frozen)
            if isinstance(rows, Sparse):
                self._sparse.append((block.start, rows))
            else:
                dense.append(rows)
                ids.append(np.arange(block.start, block.stop))
        self._dense = torch.cat(dense) if dense else None
        self._ids = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int64)

    def between(self, low: int, high: int) -> Iterator[tuple[slice | Tensor, Rows]]:
        """Yield places, counted from ``low``, and rows of the senders ``low .. high - 1``."""
        first, last = np.searchsorted(self._ids, (low, high))
        if self._dense is not None and first < last:
            ids = self._ids[first:last] - low
            in_a_row = ids[-1] - ids[0] + 1 == len(ids)
            places = slice(ids[0], ids[-1] + 1) if in_a_row else torch.as_tensor(ids)
            yield places, self._dense[first:last]
        for start, rows in self._sparse:
            if low <= start < high:
                yield slice(start - low, start - low + rows.n), rows


def integrate_nodes(
    experiment: Experiment,
    points: Points,
    n_points: int,
    memory: int,
    progress: Callable[[int], None] = lambda n_prompts: None,
) -> NDArray[np.float64]:
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
    totals = []
    for batch, own, base, other, differences in _parts(experiment, memory):
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
            progress(batch.n_prompts)
        totals.append(total.flatten(1))
    return torch.cat(totals).numpy()


def node_scores(
    experiment: Experiment,
    points: Points,
    n_points: int,
    memory: int = 1 << 30,
    progress: Callable[[int], None] = lambda n_prompts: None,
) -> NDArray[np.float64]:
    """``[sender]``: mean of :func:`integrate_nodes` over scored rows; parameters as there."""
    found = integrate_nodes(experiment, points, n_points, memory, progress)
    return found.sum(0) / experiment.n_rows


def _parts(
    experiment: Experiment, memory: int
) -> Iterator[tuple[Batch, Program, Trace, Trace, Values]]:
    """Yield parts of the prompts that fit: program, plain runs and senders' differences.

    Differences ``ablated_u - base_u`` are ``[sender, token, width]`` by block.
    """
    program = experiment.program
    for whole in experiment.batches:
        n_prompts = max(1, memory // bytes_per_prompt(experiment, whole.clean.shape[1]))
        for batch in whole.split(n_prompts):
            with torch.no_grad():
                base, other = (experiment.model.forward(x) for x in experiment.runs(batch))
                values = program.values(base)
                ablated = experiment.ablated_values(program.values(other), values)
                pairs = zip(ablated, values, strict=True)
                differences = [(a - b).flatten(1, 3) for a, b in pairs]
                own = experiment.program_on(batch, base)
            yield batch, own, base, other, differences


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
        for tokens in torch.nonzero(of_token == span)[:, 0].split(chunk):
            yield span, tokens


def bytes_per_prompt(experiment: Experiment, n_pos: int) -> int:
    """What a forward and backward pass keeps for one prompt, roughly (measured on GPT-2)."""
    shape, model = experiment.model.shape, experiment.model
    stream = 40 * n_pos * model.d_model
    pattern = 4 * shape.n_heads * n_pos * n_pos
    rows = 6 * model.d_vocab_out if experiment.metric.whole_vocab else 0
    latents = 4 * n_pos * sum(len(block) for block in experiment.program.blocks if block.narrow)
    return model.W_U.element_size() * (shape.n_layers * (stream + pattern) + rows + latents)
