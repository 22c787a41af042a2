"""Patch each edge alone: what EAP approximates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.engine.incremental import IncrementalRun
from acdc.engine.patched import PatchedModel
from acdc.engine.work import Work
from acdc.methods.base import method
from acdc.methods.candidates import Candidates, narrow
from graphs.order import edge_order, receiver_order

__all__ = ["exact"]


def exact(
    experiment: Experiment,
    *,
    only: NDArray[np.bool_] | None = None,
    memory: int = 1 << 30,
    progress: Callable[[int], None] = lambda n_edges: None,
) -> NDArray[np.float64]:
    """Change of the metric when one edge alone is ablated, for every edge.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    only
        ``[edge]``: the edges to ablate; the others score 0.  None: every edge.
    memory
        Bytes that the scenarios of one evaluation may take.
    progress
        Called with the number of edges done since the last call.

    Returns
    -------
    ndarray
        ``[edge]``: metric with the edge ablated minus metric of the base run (the metric's
        own sign).  Blind to edges that stand in for each other (an OR of two).
    """
    if experiment.crosses_layers:
        return _by_whole_passes(experiment, only, memory, progress)
    graph = experiment.graph
    run = IncrementalRun(experiment, memory)
    base = run.metric()
    scores = np.zeros(graph.n_edges)
    for receiver in receiver_order(graph):
        edges = edge_order(graph, receiver)
        wanted = edges if only is None else edges[only[edges]]
        rest = wanted[run.can_change(wanted)] if len(wanted) else wanted
        progress(len(edges) - len(rest))
        while len(rest):
            now = rest[: run.capacity(rest)]
            values, _ = run.evaluate(now, np.eye(len(now), dtype=bool))
            scores[now] = values - base
            rest = rest[len(now) :]
            progress(len(now))
        run.finish(receiver, edges)
    return scores


def _by_whole_passes(
    experiment: Experiment,
    only: NDArray[np.bool_] | None,
    memory: int,
    progress: Callable[[int], None],
) -> NDArray[np.float64]:
    """Scores as :func:`exact`, a whole patched pass for each edge."""
    n_edges = experiment.graph.n_edges
    patched, mask, scores = (
        PatchedModel(experiment, memory),
        np.ones(n_edges, bool),
        np.zeros(n_edges),
    )
    base = patched.metric(mask)
    wanted = np.arange(n_edges) if only is None else np.flatnonzero(only)
    progress(n_edges - len(wanted))
    for edge in wanted:
        mask[edge] = False
        scores[edge] = patched.metric(mask) - base
        mask[edge] = True
        progress(1)
    return scores


@method(
    "exact",
    "ablate each edge alone",
    Candidates,
    passes=lambda experiment, options: options.n_tried(experiment),
    keeps_state=True,
)
def _exact(experiment: Experiment, options: Candidates, work: Work) -> NDArray[np.float64]:
    narrowed = narrow(experiment, options.candidates, work.memory)
    only = None if narrowed is None else narrowed[1]
    return exact(experiment, only=only, memory=work.memory, progress=work.progress)
