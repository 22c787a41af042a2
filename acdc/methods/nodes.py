"""From scores of nodes to scores of edges, and to a circuit: for every method that scores nodes.

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

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from acdc.curves import RANKINGS, ranked_scores
from acdc.engine.experiment import Experiment
from acdc.methods.base import Found, Search, from_scores

__all__ = ["edge_scores", "from_node_scores"]

Scores = NDArray[np.float64]


def edge_scores(experiment: Experiment, scores: Scores, ranking: str = "absolute") -> Scores:
    """Score of each edge: that of the end which ranks lower.

    Parameters
    ----------
    experiment
        Its graph, and what ``signed`` means.
    scores
        ``[sender]``, change of the metric when the sender is ablated.
    ranking
        ``absolute`` or ``signed``, see :func:`acdc.curves.ranked_scores`.

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


def from_node_scores(experiment: Experiment, scores: Scores, search: Search) -> Found:
    """Turn scores of senders into a circuit as the search asks.

    Parameters
    ----------
    experiment
        Model, prompts and metric.
    scores
        ``[sender]``.
    search
        Threshold or number of *edges*; ranked by absolute value unless it says otherwise.

    Returns
    -------
    Found
        Its details hold ``node_scores`` by name.
    """
    ranking = search.ranking or RANKINGS[0]
    edges = edge_scores(experiment, scores, ranking)
    found = from_scores(experiment, edges, replace(search, ranking=ranking))
    by_name = dict(zip(experiment.graph.senders, scores.tolist(), strict=True))
    return replace(found, details={**found.details, "node_scores": by_name})
