"""Attribution of nodes: what ablating all that a sender writes does to the metric.

``score(u) = sum over pos of (ablated_u - base_u) . d metric / d u``, where the gradient is of
everything that reads ``u``: the sum of the scores of the edges out of ``u``.  The backward pass
stops at the heads' z and the MLPs' outputs, so it costs less than that of edges, and it tells
prompts apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.attribution import Differences, Point, bytes_per_prompt
from acdc.engine.experiment import Batch, Experiment
from acdc.lowering.model import Trace

__all__ = ["integrate_nodes"]


def integrate_nodes(
    experiment: Experiment,
    points: Callable[[Batch, Trace, Trace], Iterator[Point]],
    n_points: int,
    memory: int,
    progress: Callable[[int], None],
) -> NDArray[np.float64]:
    """Mean attribution over the points at which the gradient is taken, prompt by prompt.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    points
        ``(batch, base, other) -> points``; each credits every sender.
    n_points
        By how many the sum is divided.
    memory
        Bytes that the activations of one pass may take; prompts are run in parts that fit.
    progress
        Called with the number of prompts after each pass.

    Returns
    -------
    ndarray
        ``[prompt, sender]`` in the order of ``experiment.batches``, summed over the positions of
        the sender's span and over the scored positions of a prompt.
    """
    found = []
    for whole in experiment.batches:
        n_prompts = max(1, memory // bytes_per_prompt(experiment, whole.clean.shape[1]))
        for batch in whole.split(n_prompts):
            base_tokens, other_tokens = experiment.runs(batch)
            with torch.no_grad():
                base = experiment.model.forward(base_tokens)
                other = experiment.model.forward(other_tokens)
                differences = Differences(experiment, base, other)
            components = experiment.graph.components
            total = np.zeros((batch.n_prompts, components.n_senders, batch.clean.shape[1]))
            for point in points(batch, base, other):
                total += _products(experiment, batch, point, differences)
                progress(batch.n_prompts)
            inside = np.eye(experiment.graph.shape.n_spans)[list(batch.spans)]  # (pos, span)
            found.append((total @ inside).reshape(batch.n_prompts, -1) / n_points)
    return np.concatenate(found)


def _products(
    experiment: Experiment, batch: Batch, point: Point, differences: Differences
) -> NDArray[np.float64]:
    """``[prompt, sender, pos]``: differences times gradients at one point."""
    model = experiment.model
    embeds = model.embed(point.tokens) if point.embeds is None else point.embeds
    with torch.enable_grad():
        embeds = [embeds[0].detach().requires_grad_(True), *embeds[1:]]
        trace = model.forward(point.tokens, embeds)
        assert trace.final is not None
        total = experiment.measure(trace.final[:, batch.scored].flatten(0, 1), batch)
        written = [embeds[0], *trace.z, *trace.mlp_out]
        into_embeds, *rest = torch.autograd.grad(total, written)
    n_layers = len(model.layers)
    into_z, into_mlp = rest[:n_layers], rest[n_layers:]
    # token and position embeddings are added: they share a gradient
    columns = [_dot(d, into_embeds)[:, None] for d in differences.embeds]
    for layer in range(n_layers):
        columns.append(_dot(differences.z[layer], into_z[layer]))  # (batch, head, pos)
        if into_mlp:
            columns.append(_dot(differences.mlp_out[layer], into_mlp[layer])[:, None])
    return torch.cat(columns, 1).cpu().numpy()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """``[..., pos]`` of ``[..., pos, d]``."""
    return torch.linalg.vecdot(a, b).double()
