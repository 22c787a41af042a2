"""The connected circuit with the largest summed score, by integer programming.

Nikankin et al. 2025, "BlackboxNLP-2025 MIB shared task: improving circuit faithfulness via better
edge selection", arXiv 2510.25786, choose edges so instead of greedily; the program here is ours.
With ``x_e`` in {0, 1} for every edge and ``y_v`` in {0, 1} for every node but the embeddings and
``logits``::

    maximise    sum_e s_e x_e
    such that   sum_e x_e <= n
                x_e <= y_u                    u the sender of e
                x_e <= sum of y_v             over the nodes v that the receiver of e feeds
                y_v <= sum of x_e             over the edges e into v
                y_v <= sum of x_e             over the edges e out of v

The graph has no cycle, so a node that is in (``y_v = 1``) is on a path from the embeddings to
``logits``, and with it every edge that is in: pruning leaves the circuit as it is.

Without connectivity the best that a circuit with edge ``e`` can have is ``s_e`` and the ``n - 1``
largest other scores.  An edge for which that is less than what a greedy circuit has is in no better
one: such edges are left out of the program, which on large graphs leaves a small part of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from graphs.errors import GraphError
from graphs.graph import Graph
from graphs.select import prune, select_greedy, select_top

__all__ = ["Optimal", "select_optimal"]

Mask = NDArray[np.bool_]
Scores = NDArray[np.float64]

_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Optimal:
    """A circuit, and how much better another could be.

    Parameters
    ----------
    mask
        ``[edge]``: connected.
    score
        Its summed score.
    bound
        No connected circuit of so many edges has more.
    heuristic
        The summed score of the best circuit found without the program: the pruned top edges, edges
        added greedily from ``logits``, or the highest edges with ends joined on.
    n_variables
        Edges and nodes of the program.
    seconds
        That it took.
    """

    mask: Mask
    score: float
    bound: float
    heuristic: float
    n_variables: int
    seconds: float

    @property
    def is_optimal(self) -> bool:
        """Whether none has more, up to rounding."""
        return self.gap <= 1e-6

    @property
    def gap(self) -> float:
        """By what share of the score the bound exceeds it."""
        if self.bound <= self.score:
            return 0.0
        return (self.bound - self.score) / max(abs(self.score), _TOLERANCE)


def select_optimal(
    graph: Graph,
    scores: Scores,
    n: int,
    *,
    most: Sequence[tuple[Mask, int]] = (),
    seconds: float = 60.0,
) -> Optimal:
    """Return the connected circuit of at most ``n`` edges with the largest summed score.

    Parameters
    ----------
    graph
        Graph of E edges.
    scores
        ``[edge]``: what each edge is worth; the larger the better.
    n
        At most this many edges, 0 to E.
    most
        Kinds of edges, a mask ``[edge]`` each, and how many of each may be in.
    seconds
        Time limit of the solver (HiGHS).  When it is reached the best circuit so far is returned,
        with the bound that is proven by then.

    Raises
    ------
    GraphError
        If ``n`` is out of bounds.
    """
    if not 0 <= n <= graph.n_edges:
        raise GraphError(f"{n} edges asked for: expected 0 to {graph.n_edges}, the graph's edges")
    begun = time.perf_counter()
    scale = float(np.abs(scores).max()) or 1.0
    worth = scores / scale
    best = _quick(graph, worth, n, most)
    least = float(worth[best].sum())
    can = prune(graph, _worth_trying(worth, n, least))
    mask, bound, n_variables = _solve(graph, worth, n, can, most, seconds)
    if mask is None or float(worth[mask].sum()) < least:
        mask = best
    score = float(worth[mask].sum())
    return Optimal(
        mask,
        score * scale,
        max(bound, least) * scale,
        least * scale,
        n_variables,
        time.perf_counter() - begun,
    )


def _quick(graph: Graph, worth: Scores, n: int, most: Sequence[tuple[Mask, int]]) -> Mask:
    """The best of a few circuits that are quickly found, the empty one among them."""
    found = [np.zeros(graph.n_edges, dtype=bool)]
    for choose in (select_top, select_greedy):
        mask = choose(graph, worth, n, absolute=False)
        found += [mask, prune(graph, mask & (worth > 0))]
    found.append(_with_ends(graph, worth, n))
    allowed = [m for m in found if all((m & kind).sum() <= limit for kind, limit in most)]
    return max(allowed, key=lambda mask: float(worth[mask].sum()))


def _with_ends(graph: Graph, worth: Scores, n: int) -> Mask:
    """The highest edges, each joined to the embeddings and to ``logits`` by the best edge there is.

    Most nodes of a transformer have both edges, so that two more make a path of any edge.
    """
    mask, inside = np.zeros(graph.n_edges, dtype=bool), np.zeros(graph.n_nodes, dtype=bool)
    inside[graph.source], inside[graph.n_senders] = True, True
    first, last = _end_edges(graph, worth)
    left = n
    for edge in np.argsort(-worth, kind="stable").tolist():
        if left == 0 or worth[edge] <= 0:
            break
        sender, fed = int(graph.edge_sender[edge]), graph.fed_by(int(graph.edge_receiver[edge]))
        new = [edge] if inside[sender] else [edge, int(first[sender])]
        reader = next((int(v) for v in fed if inside[v]), int(fed[0]))
        new += [] if inside[reader] else [int(last[reader])]
        new = [e for e in dict.fromkeys(new) if e < 0 or not mask[e]]
        if min(new, default=0) < 0 or len(new) > left or worth[new].sum() <= 0:
            continue
        mask[new], left = True, left - len(new)
        inside[[sender, reader]] = True
    return prune(graph, mask)


def _end_edges(graph: Graph, worth: Scores) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``[node]``: the best edge from an embedding into it, and from it to ``logits``; or -1."""
    first, last = (np.full(graph.n_nodes, -1) for _ in range(2))
    for edge in np.argsort(worth, kind="stable"):  # the best comes last, and stays
        fed = graph.fed_by(int(graph.edge_receiver[edge]))
        if graph.source[graph.edge_sender[edge]]:
            first[fed] = edge
        if graph.n_senders in fed:
            last[graph.edge_sender[edge]] = edge
    return first, last


def _worth_trying(worth: Scores, n: int, least: float) -> Mask:
    """``[edge]``: whether it can be in a circuit of ``n`` edges with more than ``least``."""
    if n == 0:
        return np.zeros(len(worth), dtype=bool)
    top = np.sort(np.maximum(worth, 0))[::-1][:n]
    others = np.where(worth >= top[-1], top.sum() - np.maximum(worth, 0), top[:-1].sum())
    return others + worth >= least - _TOLERANCE


def _solve(
    graph: Graph,
    worth: Scores,
    n: int,
    can: Mask,
    most: Sequence[tuple[Mask, int]],
    seconds: float,
) -> tuple[Mask | None, float, int]:
    """The best circuit among the edges that can be in, its bound, and the program's variables."""
    edges = np.flatnonzero(can)
    if not len(edges) or n == 0:
        return np.zeros(graph.n_edges, dtype=bool), 0.0, 0
    rows, columns, values, n_nodes = _program(graph, edges)
    n_variables = len(edges) + n_nodes
    shape = (int(rows.max()) + 1 if len(rows) else 0, n_variables)
    cost = np.concatenate([-worth[edges], np.zeros(n_nodes)])
    every = np.ones(graph.n_edges, dtype=bool)
    constraints = [
        LinearConstraint(np.concatenate([kind[edges], np.zeros(n_nodes)])[None], ub=limit)
        for kind, limit in [(every, n), *most]
    ]
    if shape[0]:
        matrix = coo_array((values, (rows, columns)), shape=shape).tocsr()
        constraints.append(LinearConstraint(matrix, ub=0))
    found = milp(
        cost,
        integrality=np.ones(n_variables),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    bound = -found.mip_dual_bound if found.mip_dual_bound is not None else np.inf
    bound = min(bound, float(np.sort(np.maximum(worth[edges], 0))[::-1][:n].sum()))
    if found.x is None:
        return None, bound, n_variables
    mask = np.zeros(graph.n_edges, dtype=bool)
    mask[edges[found.x[: len(edges)] > 0.5]] = True
    return prune(graph, mask), bound, n_variables


def _program(
    graph: Graph, edges: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], int]:
    """Connectivity as ``A z <= 0`` with ``z = (x of the edges, y of the nodes)``: entries of A."""
    sender, receiver = graph.edge_sender[edges], graph.edge_receiver[edges]
    ends = np.diff(graph.feeds_start)[receiver]
    at = np.repeat(np.arange(len(edges)), ends)  # each edge, once for every node that it feeds
    offset = np.arange(len(at)) - np.repeat(np.cumsum(ends) - ends, ends)
    fed = graph.feeds[graph.feeds_start[receiver][at] + offset].astype(np.int64)
    inner = np.unique(np.concatenate([sender[~graph.source[sender]], fed[fed < graph.n_senders]]))
    place = np.full(graph.n_nodes, -1)
    place[inner] = np.arange(len(inner))
    y = len(edges) + place
    n_inner = len(inner)
    from_inner = np.flatnonzero(~graph.source[sender])
    into_logits = np.zeros(len(edges), dtype=bool)
    into_logits[at[fed == graph.n_senders]] = True
    into_inner = ~into_logits[at]
    reads = np.flatnonzero(~into_logits)
    row_of = np.full(len(edges), -1)
    row_of[reads] = np.arange(len(reads))
    start = np.cumsum([0, len(from_inner), len(reads), n_inner])
    one = np.ones
    entries = [
        # x_e - y_u <= 0
        (start[0] + np.arange(len(from_inner)), from_inner, one(len(from_inner))),
        (start[0] + np.arange(len(from_inner)), y[sender[from_inner]], -one(len(from_inner))),
        # x_e - sum of y_v <= 0
        (start[1] + row_of[reads], reads, one(len(reads))),
        (start[1] + row_of[at[into_inner]], y[fed[into_inner]], -one(int(into_inner.sum()))),
        # y_v - sum of x_e into v <= 0
        (start[2] + np.arange(n_inner), len(edges) + np.arange(n_inner), one(n_inner)),
        (start[2] + place[fed[into_inner]], at[into_inner], -one(int(into_inner.sum()))),
        # y_v - sum of x_e out of v <= 0
        (start[3] + np.arange(n_inner), len(edges) + np.arange(n_inner), one(n_inner)),
        (start[3] + place[sender[from_inner]], from_inner, -one(len(from_inner))),
    ]
    rows, columns, values = (np.concatenate(part) for part in zip(*entries, strict=True))
    return rows, columns, values, n_inner
