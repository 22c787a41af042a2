"""Scores against a known circuit: ROC, AUROC, average precision.

What is scored (:class:`Items`) are edges, pairs of nodes with query, key and value joined, or
nodes.  Three ROC curves exist in the field, and they are not comparable:

=================  =============================================  ===========================
function           points                                         between points
=================  =============================================  ===========================
:func:`roc_curve`  every cut of a ranking, ties cut together      straight lines (textbook)
:func:`sweep_roc`  one per circuit, as of ACDC over thresholds    stairs, the pessimistic way
:func:`mib_roc`    ten sizes of the greedy circuit                straight lines, no anchors
=================  =============================================  ===========================

The edges of a circuit are rare: a ranking with AUROC 0.99 can still put a hundred wrong edges
before the tenth right one.  Average precision shows that; read both.

References
----------
Conmy et al. 2023, arXiv 2304.14997, section 4 (stairs between Pareto-optimal points);
Mueller et al. 2025, arXiv 2504.13151, and its code (:func:`mib_roc`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from graphs.errors import GraphError, did_you_mean
from graphs.graph import Graph
from graphs.known.reference import GRANULARITIES
from graphs.select import select_greedy

__all__ = [
    "MIB_FRACTIONS",
    "Counts",
    "Items",
    "Roc",
    "auroc",
    "average_precision",
    "best_circuit",
    "best_cut",
    "counts",
    "fed_nodes",
    "items",
    "mib_roc",
    "roc_curve",
    "sweep_roc",
    "sweep_scores",
]

Mask = NDArray[np.bool_]
Scores = NDArray[np.float64]
MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The circuit sizes of the MIB benchmark, as fractions of all edges."""


@dataclass(frozen=True, eq=False)
class Items:
    """What counts as found or missed, and the edges that each item stands for.

    Parameters
    ----------
    granularity
        ``edges``; ``node pairs``: (sender node, receiver node), query, key and value joined;
        ``nodes``: all but the embeddings and ``logits``, which are in every circuit.
    names
        ``[item]``: ``a0.h1->a2.h3<k>``, ``a0.h1->a2.h3`` or ``a0.h1``.
    edge, item
        ``[incidence]``: edge ``edge[i]`` belongs to item ``item[i]``.  An edge belongs to one
        pair (to several where a shared key-value head feeds several heads), and to both of
        its nodes.  Split by spans, a pair stays in the span of its edges, and an edge belongs to
        its nodes in all spans that read it.
    """

    granularity: str
    names: tuple[str, ...]
    edge: NDArray[np.int64]
    item: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    def scores(self, scores: ArrayLike, *, absolute: bool = True) -> Scores:
        """Score of each item: the largest of its edges', by absolute or by signed value.

        Parameters
        ----------
        scores
            ``[edge]``; higher means more important (where the sign says so, see the method).
        absolute
            Whether the absolute values count.

        Returns
        -------
        ndarray
            ``[item]``.
        """
        values = np.asarray(scores, dtype=np.float64)
        found = np.full(len(self), -np.inf)
        np.maximum.at(found, self.item, (np.abs(values) if absolute else values)[self.edge])
        return found

    def mask(self, mask: Mask) -> Mask:
        """``[item]``: items of which at least one edge is in ``mask [edge]``."""
        found = np.zeros(len(self), dtype=bool)
        found[self.item[mask[self.edge]]] = True
        return found

    def named(self, names: Iterable[str]) -> Mask:
        """``[item]`` mask of names; a name that is no item raises GraphError."""
        index = {name: i for i, name in enumerate(self.names)}
        found = np.zeros(len(self), dtype=bool)
        for name in names:
            if name not in index:
                raise GraphError(
                    f"{name!r} is none of the {self.granularity} that are scored; "
                    f"{did_you_mean(name, self.names)}"
                )
            found[index[name]] = True
        return found


def items(graph: Graph, granularity: str, optional: Iterable[str] = ()) -> Items:
    """Return what is scored in a graph.

    Parameters
    ----------
    graph
        Any graph.
    granularity
        ``edges``, ``node pairs`` or ``nodes``.
    optional
        Nodes that count neither as right nor as wrong: they are left out, and so are the edges
        that leave or enter them.

    Raises
    ------
    GraphError
        If the granularity or an optional node is unknown.
    """
    if granularity not in GRANULARITIES:
        raise GraphError(f"granularity {granularity!r}: expected {', '.join(GRANULARITIES)}")
    left_out = _node_mask(graph, optional)
    edge, node = fed_nodes(graph)
    sender = graph.edge_sender[edge].astype(np.int64)
    keep = ~(left_out[sender] | left_out[node])
    edge, node, sender = edge[keep], node[keep], sender[keep]
    if granularity == "nodes":
        return _nodes(graph, edge, sender, node, ~(graph.source | left_out))
    if granularity == "edges":
        kept, item = np.unique(edge, return_inverse=True)
        return Items(granularity, tuple(graph.edge_names(kept)), edge, item)
    if graph.shape.spans:  # a key is read in several spans, but the pair is of its own
        head = node // graph.shape.n_spans * graph.shape.n_spans + graph.edge_span[edge]
        once = np.unique(np.stack([edge, np.where(node < graph.n_senders, head, node)]), axis=1)
        edge, node = once
        sender = graph.edge_sender[edge].astype(np.int64)
    pairs, item = np.unique(node * graph.n_senders + sender, return_inverse=True)
    ends = zip(*(part.tolist() for part in np.divmod(pairs, graph.n_senders)), strict=True)
    names = tuple(f"{graph.nodes[u]}->{graph.nodes[v]}" for v, u in ends)
    return Items(granularity, names, edge, item)


def _nodes(
    graph: Graph,
    edge: NDArray[np.int64],
    sender: NDArray[np.int64],
    node: NDArray[np.int64],
    scored: Mask,
) -> Items:
    scored = scored.copy()
    scored[graph.n_senders] = False  # logits
    place = np.cumsum(scored) - 1
    edges, nodes = np.concatenate([edge, edge]), np.concatenate([sender, node])
    keep = scored[nodes]
    names = tuple(name for name, is_scored in zip(graph.nodes, scored, strict=True) if is_scored)
    return Items("nodes", names, edges[keep], place[nodes[keep]])


def fed_nodes(graph: Graph) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return ``[incidence]`` edges and the nodes that their receivers feed."""
    starts, counts_ = graph.feeds_start[:-1], np.diff(graph.feeds_start)
    n_fed = counts_[graph.edge_receiver]
    edge = np.repeat(np.arange(graph.n_edges), n_fed)
    nth = np.arange(len(edge)) - np.repeat(np.cumsum(n_fed) - n_fed, n_fed)
    return edge, graph.feeds[starts[graph.edge_receiver[edge]] + nth].astype(np.int64)


def _node_mask(graph: Graph, names: Iterable[str]) -> Mask:
    index = {name: i for i, name in enumerate(graph.nodes)}
    mask = np.zeros(graph.n_nodes, dtype=bool)
    for name in names:
        if name not in index:
            raise GraphError(f"no node {name!r}; {did_you_mean(name, graph.nodes)}")
        mask[index[name]] = True
    return mask


@dataclass(frozen=True)
class Counts:
    """How a found set compares with the true one.

    Parameters
    ----------
    true_positives, false_positives, false_negatives, true_negatives
        Numbers of items.
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    @property
    def tpr(self) -> float:
        """True positive rate, recall."""
        return self.true_positives / (self.true_positives + self.false_negatives)

    @property
    def fpr(self) -> float:
        """False positive rate."""
        return self.false_positives / (self.false_positives + self.true_negatives)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        wrong = self.false_positives + self.false_negatives
        return self.true_positives / (self.true_positives + wrong / 2)


def counts(truth: Mask, found: Mask) -> Counts:
    """Compare a found mask ``[item]`` with the true one."""
    truth, found = _checked_truth(truth), np.asarray(found)
    if found.shape != truth.shape:
        raise GraphError(f"a mask of shape {found.shape} for {len(truth)} items: give one of each")
    return Counts(
        int((truth & found).sum()),
        int((~truth & found).sum()),
        int((truth & ~found).sum()),
        int((~truth & ~found).sum()),
    )


@dataclass(frozen=True, eq=False)
class Roc:
    """Points of a ROC curve by ascending false positive rate.

    Parameters
    ----------
    fpr, tpr
        ``[point]``.
    stairs
        False: straight lines between points.  True: the true positive rate rises only at the
        next point (the lowest curve through the points).
    """

    fpr: Scores
    tpr: Scores
    stairs: bool = False

    @property
    def area(self) -> float:
        """Area under the curve."""
        if self.stairs:
            return float((np.diff(self.fpr) * self.tpr[:-1]).sum())
        return float((np.diff(self.fpr) * (self.tpr[1:] + self.tpr[:-1]) / 2).sum())


def roc_curve(truth: Mask, scores: ArrayLike) -> Roc:
    """ROC curve of a ranking, from (0, 0) to (1, 1); items of equal score enter together.

    Parameters
    ----------
    truth
        ``[item]``: which are in the true circuit.
    scores
        ``[item]``, finite; the highest enter first.

    Raises
    ------
    GraphError
        If lengths differ, a score is not finite, or all items are true or none is.
    """
    hits, n_taken = _cuts(truth, scores)
    n_true = hits[-1]
    return Roc((n_taken - hits) / (n_taken[-1] - n_true), hits / n_true)


def auroc(truth: Mask, scores: ArrayLike) -> float:
    """Area under :func:`roc_curve`.

    It is the probability that a random true item scores above a random false one, a tie
    counting half (the Mann-Whitney statistic).  Parameters and errors as there.

    Examples
    --------
    >>> auroc(np.array([True, False, True, False]), [3, 2, 2, 1])
    0.875
    """
    return roc_curve(truth, scores).area


def average_precision(truth: Mask, scores: ArrayLike) -> float:
    """Mean precision at the ranks where true items enter: ``sum (R_i - R_(i-1)) P_i``.

    No interpolation; items of equal score enter together.  A random ranking has the share of
    true items, not 0.5.  Parameters and errors as :func:`roc_curve`.
    """
    hits, n_taken = _cuts(truth, scores)
    return float((np.diff(hits) * hits[1:] / n_taken[1:]).sum() / hits[-1])


def best_cut(truth: Mask, scores: ArrayLike) -> Mask:
    """``[item]`` mask of the cut of a ranking with the largest F1 (the smallest of equals).

    Parameters and errors as :func:`roc_curve`.
    """
    hits, n_taken = _cuts(truth, scores)
    best = 1 + int(np.argmax(hits[1:] / (n_taken[1:] + hits[-1])))
    values = np.asarray(scores, dtype=np.float64)
    return values >= np.sort(values)[::-1][int(n_taken[best]) - 1]


def best_circuit(truth: Mask, masks: Sequence[Mask]) -> int:
    """Index of the circuit with the largest F1; of equals, the first one.

    Parameters
    ----------
    truth
        ``[item]``.
    masks
        One ``[item]`` mask per circuit, at least one.
    """
    return int(np.argmax([counts(truth, mask).f1 for mask in masks]))


def sweep_roc(truth: Mask, masks: Sequence[Mask]) -> Roc:
    """ROC curve of separate circuits, as ACDC finds them over thresholds.

    Each circuit is a point; the empty and the full one, (0, 0) and (1, 1), are added.  As in
    the ACDC paper a dominated point (another one has a lower false and a higher true positive
    rate) does not count, and between points the curve is the pessimistic one: it keeps the
    lower true positive rate until the next point.  The area is therefore that under
    ``max(TPR of the circuits with FPR <= x)``.

    Parameters
    ----------
    truth
        ``[item]``.
    masks
        One ``[item]`` mask per circuit.

    Raises
    ------
    GraphError
        If lengths differ, or all items are true or none is.
    """
    found = [counts(truth, mask) for mask in masks]
    points = [(0.0, 0.0), *sorted((c.fpr, c.tpr) for c in found), (1.0, 1.0)]
    frontier = [points[0]]
    for fpr, tpr in points[1:]:
        if tpr > frontier[-1][1]:
            frontier.append((fpr, tpr))
    if frontier[-1][0] < 1:
        frontier.append((1.0, 1.0))
    fpr, tpr = np.array(frontier).T
    return Roc(fpr, tpr, stairs=True)


def sweep_scores(thresholds: Sequence[float], masks: Sequence[Mask]) -> Scores:
    """Score edges by the largest threshold whose circuit has them: the ranking of a sweep.

    Parameters
    ----------
    thresholds
        One per circuit, above 0.
    masks
        ``[edge]`` masks; a larger threshold need not give a subset.

    Returns
    -------
    ndarray
        ``[edge]``; 0 for edges that are in no circuit.
    """
    if not masks or len(masks) != len(thresholds) or min(thresholds) <= 0:
        raise GraphError(
            f"{len(thresholds)} thresholds and {len(masks)} circuits: expected one circuit for "
            "each threshold, and thresholds above 0"
        )
    return np.max([tau * mask for tau, mask in zip(thresholds, masks, strict=True)], axis=0)


def mib_roc(
    graph: Graph,
    truth: Mask,
    scores: ArrayLike,
    *,
    absolute: bool = True,
    fractions: Sequence[float] = MIB_FRACTIONS,
) -> Roc:
    """ROC curve as the code of the MIB benchmark draws it.

    At each fraction k the greedy circuit of ``ceil(k * n_edges)`` edges is taken
    (:func:`graphs.select.select_greedy`, pruned).  False positive rates are divided by the
    last one, and neither (0, 0) nor (1, 1) is added: ten points, however fine the ranking, so
    that the area of a perfect ranking depends on where the grid meets it.

    Parameters
    ----------
    graph
        The graph of the edges.
    truth, scores
        ``[edge]``.
    absolute
        Whether absolute values are ranked (MIB's default).
    fractions
        Ascending.

    Raises
    ------
    GraphError
        As :func:`roc_curve`.
    """
    values = _checked_scores(_checked_truth(truth), scores)
    found = [
        counts(
            truth,
            select_greedy(graph, values, math.ceil(k * graph.n_edges), absolute=absolute),
        )
        for k in fractions
    ]
    fpr = np.array([c.fpr for c in found])
    last = fpr[-1] if fpr[-1] > 0 else 1.0
    return Roc(fpr / last, np.array([c.tpr for c in found]))


def _cuts(truth: Mask, scores: ArrayLike) -> tuple[Scores, Scores]:
    """True items and items above each distinct score, from none to all: ``[cut]`` each."""
    truth = _checked_truth(truth)
    values = _checked_scores(truth, scores)
    order = np.argsort(-values, kind="stable")
    last_of_ties = np.append(np.diff(values[order]) != 0, True)
    hits = np.cumsum(truth[order])[last_of_ties]
    n_taken = 1 + np.flatnonzero(last_of_ties)
    return np.append(0.0, hits), np.append(0.0, n_taken)


def _checked_truth(truth: Mask) -> Mask:
    mask = np.asarray(truth)
    if mask.ndim != 1 or mask.dtype != bool:
        raise GraphError(f"truth of shape {mask.shape} and type {mask.dtype}: expected [item] bool")
    if not mask.any() or mask.all():
        raise GraphError(
            f"{int(mask.sum())} of {len(mask)} items are in the true circuit: rates need at least "
            "one that is and one that is not"
        )
    return mask


def _checked_scores(truth: Mask, scores: ArrayLike) -> Scores:
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != truth.shape:
        raise GraphError(f"scores of shape {values.shape} for {len(truth)} items: give one of each")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise GraphError(f"score {bad[0]} is {values[bad[0]]}: expected finite numbers")
    return values
