"""Information flow routes: how much of what a receiver reads came from each sender.

Ferrando & Voita 2024, arXiv 2403.00824, on this graph as EAP-IG's authors take it there: for a
receiver that reads ``y = sum_u z_u`` at one position, sender u has the share ::

    max(|y|_1 - |y - z_u|_1, 0)

of the sum over its senders; the score of an edge is the mean share over positions (in a graph split
by spans those of its span), then over prompts.  Nothing is ablated and no metric enters: scores say
where information flows on these prompts, not what the task needs.  q, k and v of a head read the
same stream and have one score.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.attribution import Tokens, token_chunks
from acdc.engine.experiment import Experiment, iter_layers
from acdc.engine.work import Work
from acdc.lowering import LoweredModel
from acdc.lowering.attention import KINDS
from acdc.lowering.model import Trace
from acdc.methods.base import NoOptions, Score, method

__all__ = ["ifr"]

_NONE, _WORK = NoOptions(), Work()


@method(
    "ifr",
    "information flow routes: shares of what receivers read, no metric (Ferrando & Voita 2024)",
    score=Score.MAGNITUDE,
)
@torch.no_grad()
def ifr(
    experiment: Experiment, options: NoOptions = _NONE, work: Work = _WORK
) -> NDArray[np.float64]:
    """Mean share of every edge in what its receiver reads, in the base run.

    Parameters
    ----------
    experiment
        Model and prompts; its direction says which run is the base.
    options
        None.
    work
        Memory for one chunk of tokens; told of prompts.

    Returns
    -------
    ndarray
        ``[edge]`` in [0, 1]; the edges into a receiver add up to 1 (to less where nothing that is
        read comes near the sum).
    """
    graph, model = experiment.graph, experiment.model
    scores, n_prompts = np.zeros(graph.n_edges), np.zeros(graph.shape.n_spans)
    n_senders = graph.components.n_senders
    chunk = max(1, work.memory // (3 * n_senders * model.d_model * model.W_U.element_size()))
    for batch in experiment.batches:
        trace = model.forward(experiment.runs(batch)[0])
        n_prompts[list(set(batch.spans))] += batch.n_prompts
        for span, tokens in token_chunks(batch.spans, batch.n_prompts, chunk, batch.clean.device):
            weight = 1 / batch.spans.count(span)  # a prompt's positions count as much as another's
            parts = _written(model, trace, tokens)
            for components, stream in _streams(experiment, trace):
                receivers = experiment.receiver_at[span, components]
                if receivers[0] < 0:  # logits where none is scored
                    continue
                low, high = graph.receiver_start[receivers[0] : receivers[0] + 2]
                n_seen = int(high - low)
                shares = _shares(parts[:n_seen], stream.flatten(0, 1)[tokens])
                for low in graph.receiver_start[receivers]:
                    scores[low : low + n_seen] += weight * shares
        work.progress(batch.n_prompts)
    return scores / n_prompts[graph.edge_span]


def _shares(parts: Tensor, whole: Tensor) -> NDArray[np.float64]:
    """``[sender]``: shares of ``parts [sender, token, d_model]``, summed over tokens."""
    near = torch.stack([whole.abs().sum(-1) - (whole - part).abs().sum(-1) for part in parts])
    near = near.clamp(min=0)
    total = near.sum(0)
    return (near / total.where(total > 0, 1)).sum(1).double().cpu().numpy()


def _written(model: LoweredModel, trace: Trace, tokens: Tokens) -> Tensor:
    """What senders write, ``[sender, token, d_model]``; heads through a post-norm of their sum."""
    blocks = [x.flatten(0, 1)[None, tokens] for x in trace.embeds]
    for i, layer in enumerate(model.layers):
        heads = trace.z[i].transpose(0, 1).flatten(1, 2)[:, tokens] @ layer.attention.W_O
        if layer.attention_post is not None:  # linear in each head once its scale is known
            point = trace.attention_out[i].flatten(0, 1)[tokens]
            heads = replace(layer.attention_post, frozen=True).jvp(point, heads)
        blocks.append(heads)
        if layer.mlp is not None:
            blocks.append(trace.mlp_out[i].flatten(0, 1)[None, tokens])
    return torch.cat(blocks)


def _streams(experiment: Experiment, trace: Trace) -> list[tuple[list[int], Tensor]]:
    """Receivers that read one stream, and the stream, ``[batch, pos, d_model]``."""
    found: list[tuple[list[int], Tensor]] = []
    graph = experiment.graph.components
    for layer, receivers in iter_layers(graph):
        heads = sorted({int(v) for kind in KINDS for v in receivers[kind]})
        found.append((heads, trace.attention_in[layer]))
        if "mlp" in receivers:
            found.append((receivers["mlp"].tolist(), trace.mlp_in[layer]))
    assert trace.final is not None
    return [*found, ([graph.receiver_index["logits"]], trace.final)]
