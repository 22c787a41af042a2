"""From scores to a circuit: scores of nodes to scores of edges, and which edges are in.

A set of nodes is the circuit of all edges between them (as Conmy et al. 2023, arXiv 2304.14997,
compare methods over nodes with ACDC).  So an edge is in as soon as both its ends are, and its
score is that of the end which enters last: of its sender, or of the node that its receiver feeds,
whichever ranks lower.  Three details:

* the embeddings and ``logits`` are in every circuit, so they rank with the highest node;
* a receiver that feeds several nodes (a key or value of grouped-query attention) ranks with the
  highest of them;
* q, k and v of a head are ports of one node: their edges from one sender have one score.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.errors import OptionError
from acdc.measure.curves import ranked_scores, smallest_faithful
from acdc.measure.evaluation import Evaluator
from acdc.settings import RANKINGS
from graphs import select_threshold, select_top

__all__ = ["Selection", "edge_scores", "select"]

Scores = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Selection:
    """Which edges are in.

    Parameters
    ----------
    threshold
        Smallest ranked score that is kept.
    n_edges
        At most this many edges.  With neither: the smallest circuit that is faithful.
    ranking
        ``absolute``, or ``signed`` (edges whose ablation makes the metric worse come first).
        None: by absolute value where a threshold or a number is given, otherwise whichever gives
        the smaller circuit.
    """

    threshold: float | None = None
    n_edges: int | None = None
    ranking: str | None = None


def select(experiment: Experiment, scores: Scores, selection: Selection) -> tuple[Mask, str]:
    """Return the mask ``[edge]`` that a selection makes of scores ``[edge]``, and the ranking.

    Raises
    ------
    OptionError
        If every score is 0.
    """
    graph = experiment.graph
    if not scores.any():
        raise OptionError(
            f"every edge has score 0 under metric {experiment.metric.name!r}: the method sees "
            "nothing there (kl and mse are flat at the clean run); choose eap-ig or another metric"
        )
    if selection.threshold is None and selection.n_edges is None:
        return _smallest(experiment, scores, selection.ranking)
    ranking = selection.ranking or RANKINGS[0]
    values = ranked_scores(experiment, scores, ranking)
    if selection.threshold is not None:
        return select_threshold(graph, values, selection.threshold, absolute=False), ranking
    n_edges = min(selection.n_edges or 0, graph.n_edges)
    return select_top(graph, values, n_edges, absolute=False), ranking


def _smallest(experiment: Experiment, scores: Scores, ranking: str | None) -> tuple[Mask, str]:
    """The smallest circuit that is faithful on the prompts kept for that."""
    evaluator = Evaluator(experiment.selection)
    masks = {
        name: smallest_faithful(evaluator, ranked_scores(experiment, scores, name), surely=True)
        for name in ([ranking] if ranking else RANKINGS)
    }
    best = min(masks, key=lambda name: int(masks[name].sum()))
    return masks[best], best


def edge_scores(experiment: Experiment, scores: Scores, ranking: str = "absolute") -> Scores:
    """Score of each edge: that of the end which ranks lower.

    Parameters
    ----------
    experiment
        Its graph, and what ``signed`` means.
    scores
        ``[sender]``, change of the metric when the sender is ablated.
    ranking
        ``absolute`` or ``signed``, see :func:`acdc.measure.curves.ranked_scores`.

    Returns
    -------
    ndarray
        ``[edge]``, in the unit and with the sign of the node's score.
    """
    graph = experiment.graph
    by_rank = np.argsort(ranked_scores(experiment, scores, ranking), kind="stable")
    rank = np.empty(graph.n_nodes, dtype=np.int64)
    rank[by_rank] = np.arange(graph.n_senders)
    rank[graph.source] = graph.n_senders - 1
    rank[graph.n_senders] = graph.n_senders - 1  # logits
    of_receiver = np.maximum.reduceat(rank[graph.feeds], graph.feeds_start[:-1])
    lower = np.minimum(rank[graph.edge_sender], of_receiver[graph.edge_receiver])
    return scores[by_rank][lower]
