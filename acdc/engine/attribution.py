"""Edge attribution from ordinary forward and backward passes, without splitting q, k and v.

``score(u->v) = sum over batch and pos of (ablated_u - base_u) . d metric / d input_v``, divided
by the number of scored rows: a first-order estimate of what ablating the edge does to the
metric (Nanda 2023; Syed et al. 2023, arXiv 2310.10348).

The backward pass gives gradients at q, k and v (``[batch, head, pos, d_head]``) and at the MLP
inputs; the former are mapped back through W_Q, W_K, W_V and the norm's Jacobian.  One matrix
product per layer between the senders' differences and these vectors gives the scores.  The
products are streamed over layers and over chunks of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.experiment import Batch, Experiment, iter_layers
from acdc.lowering.attention import KINDS
from acdc.lowering.model import Trace
from graphs import Graph

__all__ = [
    "Differences",
    "Gradients",
    "Point",
    "Tokens",
    "accumulate_scores",
    "bytes_per_prompt",
    "gradients",
    "integrate",
    "token_chunks",
]

Tokens = slice | Tensor
"""Index into the flattened batch and positions."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """``d metric / d x`` of one pass, metric summed over rows.

    Parameters
    ----------
    trace
        The pass that was differentiated (detached).
    q, k, v
        One ``[batch, head, pos, d_head]`` per layer.
    mlp_in
        One ``[batch, pos, d_model]`` per layer.
    final
        ``[batch, pos, d_model]``.
    """

    trace: Trace
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    mlp_in: list[Tensor]
    final: Tensor


@dataclass(frozen=True, eq=False)
class Point:
    """Where a gradient is taken.

    Parameters
    ----------
    tokens
        ``[batch, pos]``.
    embeds, replaced
        Values to use instead of the run's own, see :meth:`LoweredModel.forward`.
    senders
        Which senders (whatever their span) the gradient is credited to; None for all.
    """

    tokens: Tensor
    embeds: list[Tensor] | None = None
    replaced: dict[tuple[str, int], Tensor] | None = None
    senders: slice | None = None


def gradients(experiment: Experiment, batch: Batch, point: Point) -> Gradients:
    """Run forward and backward once.

    Parameters
    ----------
    experiment, batch
        The metric and what it compares with.
    point
        Where.
    """
    model = experiment.model
    embeds = model.embed(point.tokens) if point.embeds is None else point.embeds
    with torch.enable_grad():
        embeds = [embeds[0].detach().requires_grad_(True), *embeds[1:]]
        trace = model.forward(point.tokens, embeds, point.replaced)
        final = trace.final
        assert final is not None
        total = experiment.measure(final[:, batch.scored].flatten(0, 1), batch)
        wanted = [*trace.q, *trace.k, *trace.v, *trace.mlp_in, final]
        cut = point.replaced is not None  # what feeds a replaced output has no gradient
        found = torch.autograd.grad(total, wanted, allow_unused=cut, materialize_grads=cut)
    n = len(model.layers)
    q, k, v = (list(found[i * n : (i + 1) * n]) for i in range(3))
    return Gradients(_detached(trace), q, k, v, list(found[3 * n : -1]), found[-1])


def _detached(trace: Trace) -> Trace:
    assert trace.final is not None
    lists = {
        name: [x.detach() for x in value]
        for name, value in vars(trace).items()
        if isinstance(value, list)
    }
    return Trace(**lists, final=trace.final.detach())


class Differences:
    """Senders' differences ``ablated_u - base_u``, kept small: heads before W_O.

    Parameters
    ----------
    experiment
        Says what ablated edges carry.
    base, other
        Plain runs.
    """

    def __init__(self, experiment: Experiment, base: Trace, other: Trace) -> None:
        self.model = experiment.model
        to = experiment.ablated(other, base)
        self.embeds = [a - b for a, b in zip(to.embeds, base.embeds, strict=True)]
        self.z = [a - b for a, b in zip(to.z, base.z, strict=True)]
        self.mlp_out = [a - b for a, b in zip(to.mlp_out, base.mlp_out, strict=True)]

    def rows(self, tokens: Tokens, at: Trace) -> Tensor:
        """``[sender, token, d_model]`` for some tokens of the flattened batch and positions.

        ``at`` is the pass at whose point post-norms are linearised.
        """
        model = self.model
        blocks = [x.flatten(0, 1)[None, tokens] for x in self.embeds]
        for i, layer in enumerate(model.layers):
            z = self.z[i].transpose(0, 1).flatten(1, 2)[:, tokens]  # (head, token, d_head)
            heads = z @ layer.attention.W_O
            if layer.attention_post is not None:
                point = at.attention_out[i].flatten(0, 1)[tokens]
                heads = layer.attention_post.jvp(point, heads)
            blocks.append(heads)
            if layer.mlp is not None:
                blocks.append(self.mlp_out[i].flatten(0, 1)[None, tokens])
        return torch.cat(blocks)


def accumulate_scores(
    experiment: Experiment,
    found: Gradients,
    differences: Differences,
    spans: Sequence[int],
    scores: NDArray[np.float64],
    weight: float,
    memory: int,
    senders: slice | None = None,
) -> None:
    """Add ``weight * score`` of one batch and one pass to ``scores [edge]``.

    Parameters
    ----------
    experiment
        Model and graph.
    found
        Gradients of one pass over the batch.
    differences
        Of the batch's senders.
    spans
        ``[pos]``: index of the span of each position of the batch.
    scores
        ``[edge]``, changed in place.
    weight
        Of this pass in the mean over passes.
    memory
        Bytes that the differences of one chunk of tokens may take.
    senders
        Which senders (whatever their span) are scored; None for all.
    """
    graph, model = experiment.graph, experiment.model
    credited = np.zeros(graph.components.n_senders)
    credited[slice(None) if senders is None else senders] = weight
    widest = len(credited) + 3 * model.shape.n_heads
    chunk = max(1, memory // (widest * model.d_model * found.final.element_size()))
    for span, tokens in token_chunks(spans, len(found.final), chunk, found.final.device):
        rows = differences.rows(tokens, found.trace)
        for components, wanted in _receiver_gradients(experiment, found, tokens):
            receivers = experiment.receiver_at[span, components]
            if receivers[0] < 0:  # logits where none is scored
                continue
            n_seen = _n_seen(graph.components, int(components[0]))
            products = _products(rows[:n_seen], wanted)
            for receiver, column in zip(receivers, products, strict=True):
                low, high = graph.receiver_start[receiver : receiver + 2]
                index = graph.sender_component[graph.edge_sender[low:high]]
                scores[low:high] += credited[index] * column[index]


def _n_seen(graph: Graph, receiver: int) -> int:
    """How many senders there are up to the last one that a receiver reads."""
    return int(graph.edge_sender[graph.receiver_start[receiver + 1] - 1]) + 1


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


def _products(rows: Tensor, wanted: Tensor) -> NDArray[np.float64]:
    """``[receiver, sender]`` sums over tokens and d_model."""
    product = wanted.flatten(1) @ rows.flatten(1).T
    return product.double().cpu().numpy()


def _receiver_gradients(
    experiment: Experiment, found: Gradients, tokens: Tokens
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield receivers and ``d metric / d input``, ``[receiver, token, d_model]``, by layer."""
    model, graph = experiment.model, experiment.graph.components
    for layer, receivers in iter_layers(graph):
        block = model.layers[layer]
        point = found.trace.attention_in[layer].flatten(0, 1)[tokens]
        mapped = []
        for kind, at_projection in (("q", found.q), ("k", found.k), ("v", found.v)):
            g = at_projection[layer].transpose(0, 1).flatten(1, 2)[:, tokens]
            mapped.append(g @ block.attention.W[kind].transpose(1, 2))  # (head, token, d_model)
        heads = np.concatenate([receivers[kind] for kind in KINDS])
        yield heads, block.ln1.vjp(point, torch.cat(mapped))
        if block.mlp is not None:
            yield receivers["mlp"], found.mlp_in[layer].flatten(0, 1)[None, tokens]
    yield np.array([graph.receiver_index["logits"]]), found.final.flatten(0, 1)[None, tokens]


def integrate(
    experiment: Experiment,
    points: Callable[[Batch, Trace, Trace], Iterator[Point]],
    n_points: int,
    memory: int,
    progress: Callable[[int], None],
) -> NDArray[np.float64]:
    """Mean attribution over the points at which the gradient is taken.

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
    for whole in experiment.batches:
        n_prompts = max(1, memory // bytes_per_prompt(experiment, whole.clean.shape[1]))
        for batch in whole.split(n_prompts):
            base_tokens, other_tokens = experiment.runs(batch)
            with torch.no_grad():
                base = experiment.model.forward(base_tokens)
                other = experiment.model.forward(other_tokens)
                differences = Differences(experiment, base, other)
            for point in points(batch, base, other):
                found = gradients(experiment, batch, point)
                with torch.no_grad():
                    accumulate_scores(
                        experiment,
                        found,
                        differences,
                        batch.spans,
                        scores,
                        1 / n_points,
                        memory,
                        point.senders,
                    )
                del found
                progress(batch.n_prompts)
    return scores / experiment.n_rows


def bytes_per_prompt(experiment: Experiment, n_pos: int) -> int:
    """What a forward and backward pass keeps for one prompt, roughly (measured on GPT-2)."""
    shape, model = experiment.model.shape, experiment.model
    stream = 40 * n_pos * model.d_model
    pattern = 4 * shape.n_heads * n_pos * n_pos
    rows = 6 * model.d_vocab_out if experiment.metric.whole_vocab else 0
    return model.W_U.element_size() * (shape.n_layers * (stream + pattern) + rows)
