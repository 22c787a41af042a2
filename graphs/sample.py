"""Random circuits: unions of paths from the embeddings to ``logits``.

They are what a circuit is compared with.  Edges drawn one by one would mostly hang in the air
and do nothing; edges on whole paths all carry something.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from graphs.errors import GraphError
from graphs.graph import Graph
from graphs.select import alive_nodes, prune

__all__ = ["PathSampler"]

Mask = NDArray[np.bool_]


class PathSampler:
    """Draws paths and circuits of one graph.

    A path goes through an edge that the circuit lacks, each such edge equally likely, and from
    its ends on by random walks, each next edge equally likely.  So a draw always adds
    something, however full the circuit is already.  Edges on no path at all, as those into the
    last MLP at a span that is not scored, are never drawn.

    Parameters
    ----------
    graph
        Graph of E edges.

    Attributes
    ----------
    on_path
        ``[edge]``: edges on a path from the embeddings to ``logits``, all that is ever drawn.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        every = np.ones(graph.n_edges, dtype=bool)
        self.on_path, self._alive = prune(graph, every), alive_nodes(graph, every)
        edges = np.flatnonzero(self.on_path)
        self._by_sender = edges[np.argsort(graph.edge_sender[edges], kind="stable")]
        counts = np.bincount(graph.edge_sender[edges], minlength=graph.n_senders)
        self._out_start = np.concatenate([[0], np.cumsum(counts)])
        self._readers: list[list[int]] = [[] for _ in graph.nodes]
        for receiver in range(len(graph.receivers)):
            for node in graph.fed_by(receiver).tolist():
                self._readers[node].append(receiver)

    def path(self, edge: int, rng: np.random.Generator) -> list[int]:
        """Return the edges of a random path from the embeddings to ``logits`` through ``edge``."""
        return [*self._upwards(edge, rng), edge, *self._downwards(edge, rng)]

    def circuit(self, n_edges: int, rng: np.random.Generator, avoid: Mask | None = None) -> Mask:
        """Return ``[edge]``: a union of random paths of at least ``n_edges`` edges.

        The last path enters whole, so there may be a few more.

        Parameters
        ----------
        n_edges
            0 to the number of edges on paths that are not avoided.
        rng
            What draws them.
        avoid
            ``[edge]``: edges that are left out of the paths, and not counted.

        Raises
        ------
        GraphError
            If there are not so many edges.
        """
        free = self.on_path.copy() if avoid is None else self.on_path & ~avoid
        if not 0 <= n_edges <= free.sum():
            raise GraphError(f"a random circuit of {n_edges} edges: expected 0 to {free.sum()}")
        if n_edges == free.sum():
            return free
        mask = np.zeros(self.graph.n_edges, dtype=bool)
        # the next of a random order that is not in yet: any of those is equally likely
        order, n_left = iter(rng.permutation(np.flatnonzero(free)).tolist()), n_edges
        while n_left > 0:
            edge = next(order)
            if not mask[edge]:
                path = np.array(self.path(edge, rng))
                path = path[free[path] & ~mask[path]]  # an edge is on a path at most once
                mask[path] = True
                n_left -= len(path)
        return mask

    def inflated(self, mask: Mask, rng: np.random.Generator) -> Mask:
        """Return ``[edge]``: a circuit and one random path, which adds at least one edge.

        Raises
        ------
        GraphError
            If every edge on a path is in the circuit already.
        """
        outside = np.flatnonzero(self.on_path & ~mask)
        if not len(outside):
            raise GraphError("a circuit of every edge cannot be inflated: leave one out")
        more = mask.copy()
        more[self.path(_one_of(outside, rng), rng)] = True
        return more

    def _upwards(self, edge: int, rng: np.random.Generator) -> list[int]:
        """Edges from the embeddings to the sender of ``edge``."""
        graph, walk = self.graph, []
        node = int(graph.edge_sender[edge])
        while not graph.source[node]:
            receiver = _one_of(self._readers[node], rng)
            start, stop = graph.receiver_start[receiver : receiver + 2].tolist()
            walk.append(int(rng.integers(start, stop)))
            node = int(graph.edge_sender[walk[-1]])
        return walk[::-1]

    def _downwards(self, edge: int, rng: np.random.Generator) -> list[int]:
        """Edges from the receiver of ``edge`` to ``logits``."""
        graph, walk = self.graph, []
        node = self._fed(edge, rng)
        while node != graph.n_senders:
            start, stop = self._out_start[node : node + 2].tolist()
            walk.append(int(self._by_sender[rng.integers(start, stop)]))
            node = self._fed(walk[-1], rng)
        return walk

    def _fed(self, edge: int, rng: np.random.Generator) -> int:
        """Return a random one of the nodes that an edge feeds, of those that reach ``logits``."""
        fed = self.graph.fed_by(int(self.graph.edge_receiver[edge]))
        return _one_of(fed[self._alive[fed]], rng)


def _one_of(values: Sequence[int] | NDArray[np.integer], rng: np.random.Generator) -> int:
    # rng.choice draws the same, several times slower
    return int(values[int(rng.integers(len(values)))])
