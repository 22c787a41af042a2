"""Nodes that do the same work: they read the same senders and are read by the same receivers."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from graphs.circuit import Circuit
from graphs.graph import Graph, parse_node
from graphs.select import Mask
from graphs.sites import parse_latent
from graphs.spans import split_span

__all__ = ["Likeness", "similar_nodes"]

_APART = 2.0
"""Distance of nodes that are never put together: more than that of opposite ones, which is 1."""
_MOST = 1_500


def similar_nodes(
    circuit: Circuit, mask: Mask, *, least: float = 0.5, one_layer: bool = False
) -> list[tuple[str, ...]]:
    """Return sets of at least two nodes with similar neighbours, the largest scores first.

    Parameters
    ----------
    circuit, mask, one_layer
        As of :class:`Likeness`.
    least
        Similarity that every two nodes of a set have.
    """
    return Likeness(circuit, mask, one_layer=one_layer).sets(least)


class Likeness:
    """How similar the neighbours of nodes are.

    Two nodes are as similar as the mean of two cosines: of the scores of their edges in, by sender
    and port, and of those of their edges out, by receiver.

    Parameters
    ----------
    circuit
        With its scores.
    mask
        ``[edge]``: what counts.
    one_layer
        Whether sets stay within a layer.
    """

    def __init__(self, circuit: Circuit, mask: Mask, *, one_layer: bool = False) -> None:
        graph = circuit.graph
        edges = np.flatnonzero(mask)
        inputs = _Inputs(graph, edges)
        outputs: dict[str, dict[str, float]] = defaultdict(dict)
        for edge, score in zip(edges.tolist(), circuit.scores[edges].tolist(), strict=True):
            sender = graph.senders[graph.edge_sender[edge]]
            receiver = int(graph.edge_receiver[edge])
            outputs[sender][graph.receivers[receiver]] = score
            inputs.add(sender, receiver, score)
        self._order = graph.sender_index
        names = [name for name in outputs if name in inputs.of and _kind(name) is not None]
        self._worth = {name: sum(map(abs, outputs[name].values())) for name in names}
        self._names = names = sorted(names, key=lambda name: -self._worth[name])[:_MOST]
        if len(names) < 2:
            return
        place = np.array([inputs.of[name] for name in names])
        into = _cosines(inputs.scores)[np.ix_(place, place)]
        alike = (into + _cosines([outputs[name] for name in names])) / 2
        distance = 1 - np.clip(alike, 0, 1)
        kinds = [_kind(name, one_layer) for name in names]
        numbers = np.array([kinds.index(kind) for kind in kinds])
        distance[numbers[:, None] != numbers] = _APART
        joined = np.array([[name in senders for senders in inputs.senders] for name in names])
        joined = joined[:, place]
        distance[joined | joined.T] = _APART
        np.fill_diagonal(distance, 0)
        from scipy.cluster.hierarchy import linkage  # half a second that few pictures need

        self._tree = linkage(distance[np.triu_indices(len(names), 1)], "complete")

    def sets(self, least: float) -> list[tuple[str, ...]]:
        """Return sets of at least two nodes, the largest scores first.

        Nodes of a set are in the graph's order.  Every two of them are as similar as ``least``
        (complete linkage), of one kind and at one span, and no edge joins them.
        """
        if len(self._names) < 2:
            return []
        from scipy.cluster.hierarchy import fcluster

        sets: dict[int, list[str]] = defaultdict(list)
        numbers = fcluster(self._tree, 1 - least, "distance").tolist()
        for name, number in zip(self._names, numbers, strict=True):
            sets[number].append(name)
        found = [
            tuple(sorted(members, key=self._order.__getitem__))
            for members in sets.values()
            if len(members) > 1
        ]
        return sorted(found, key=lambda members: -sum(map(self._worth.__getitem__, members)))


class _Inputs:
    """Scores of edges in, once for all nodes that the same receivers feed: latents are many.

    Attributes
    ----------
    of
        Node -> place of what it reads.
    scores, senders
        By place: scores by sender and port, and who sends.
    """

    def __init__(self, graph: Graph, edges: NDArray[np.int64]) -> None:
        self._graph = graph
        receivers: dict[int, list[int]] = defaultdict(list)  # of a node
        for receiver in np.unique(graph.edge_receiver[edges]).tolist():
            for node in graph.fed_by(receiver).tolist():
                receivers[node].append(receiver)
        places: dict[tuple[int, ...], int] = {}
        self.of = {
            graph.nodes[node]: places.setdefault(tuple(read), len(places))
            for node, read in receivers.items()
        }
        self.scores: list[dict[str, float]] = [{} for _ in places]
        self.senders: list[set[str]] = [set() for _ in places]
        self._places: dict[int, list[int]] = defaultdict(list)  # of a receiver
        for read, place in places.items():
            for receiver in read:
                self._places[receiver].append(place)

    def add(self, sender: str, receiver: int, score: float) -> None:
        """Take an edge in."""
        for place in self._places[receiver]:
            self.scores[place][f"{sender}{self._graph.port[receiver]}"] = score
            self.senders[place].add(sender)


def _kind(name: str, with_layer: bool = False) -> tuple[object, ...] | None:
    """What nodes of a set agree in; None for nodes that stay alone."""
    component, span = split_span(name)
    latent = parse_latent(component)
    kind, layer, _ = parse_node(component)
    where = latent[1] if latent else ""
    if kind in ("input", "logits", "cut", "error", "router"):
        return None
    return (kind, where, span, layer if with_layer else None)


def _cosines(rows: list[dict[str, float]]) -> NDArray[np.float64]:
    """``[row, row]`` cosines of sparse rows; 0 where one is empty."""
    columns = {name: i for i, name in enumerate(dict.fromkeys(n for row in rows for n in row))}
    values = np.zeros((len(rows), len(columns)))
    for i, row in enumerate(rows):
        for name, value in row.items():
            values[i, columns[name]] = value
    largest = np.abs(values).max(axis=1, keepdims=True, initial=0.0)
    values = np.divide(values, largest, out=values, where=largest > 0)  # squares stay finite
    length = np.linalg.norm(values, axis=1, keepdims=True)
    unit = np.divide(values, length, out=np.zeros_like(values), where=length > 0)
    return unit @ unit.T
