"""What a picture leaves out: lines are put together before any edge is dropped.

In this order, and no further than is needed: the q, k and v lines from one sender to one head
become one; nodes of a layer that read and are read alike become one; the weakest edges go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from graphs.circuit import Circuit
from graphs.select import Mask
from graphs.similar import Likeness

__all__ = ["Simplified", "simplify"]

_ALIKE = (0.9, 0.8, 0.7, 0.6)
"""Similarity of nodes that are drawn as one, the first that is enough: see
:class:`graphs.similar.Likeness`."""


@dataclass(frozen=True)
class Simplified:
    """What is drawn of a circuit.

    Parameters
    ----------
    mask
        ``[edge]``: the edges that lines stand for.
    merge
        Whether the q, k and v lines from one sender to one head are one.
    groups
        Nodes that are drawn as one: the first of them -> all of them.
    """

    mask: Mask
    merge: bool = False
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def stands_for(self) -> dict[str, str]:
        """Node -> the node that it is drawn as, for those that are not drawn as themselves."""
        return {name: first for first, names in self.groups.items() for name in names[1:]}


def simplify(circuit: Circuit, kept: Mask, most: int | None) -> Simplified:
    """Choose what is drawn, as at most so many lines.

    Parameters
    ----------
    circuit
        With its scores.
    kept
        ``[edge]``: what could be drawn, every edge on a path.
    most
        Lines; None: every edge is drawn as it is.
    """
    if most is None or kept.sum() <= most:
        return Simplified(kept)
    if _n_lines(circuit, kept, {}) <= most:
        return Simplified(kept, merge=True)
    whole = Simplified(kept, merge=True)
    columns = bool(circuit.graph.shape.spans)  # have no room for nodes with many names
    likeness = Likeness(circuit, kept, one_layer=True)
    for least in () if columns else _ALIKE:
        alike = likeness.sets(least)
        whole = Simplified(kept, merge=True, groups={names[0]: names for names in alike})
        if _n_lines(circuit, kept, whole.stands_for) <= most:
            return whole
    chosen = _story(circuit, kept, most, whole.stands_for)
    return Simplified(chosen, merge=True, groups=_drawn(circuit, chosen, whole.groups))


def _n_lines(circuit: Circuit, mask: Mask, stands_for: Mapping[str, str]) -> int:
    """How many lines edges are, those between the same two drawn nodes as one."""
    return len(set(map(_Lines(circuit, stands_for), np.flatnonzero(mask).tolist())))


class _Lines:
    """Which line an edge is part of, as its two drawn nodes."""

    def __init__(self, circuit: Circuit, stands_for: Mapping[str, str]) -> None:
        self._graph, self._stands_for = circuit.graph, stands_for

    def __call__(self, edge: int) -> tuple[str, str]:
        sender = self._graph.senders[self._graph.edge_sender[edge]]
        node = self._graph.receiver_node(int(self._graph.edge_receiver[edge]))
        return self._stands_for.get(sender, sender), self._stands_for.get(node, node)


def _story(circuit: Circuit, kept: Mask, most: int, stands_for: Mapping[str, str]) -> Mask:
    """The strongest edges, each with the strongest way through it, in at most so many lines.

    Every edge is on a path: it comes with the way from the embeddings and the way to ``logits``
    whose weakest edges are strongest.  An edge whose way finds no room is passed over.
    """
    way = _Ways(circuit, kept)
    line = _Lines(circuit, stands_for)
    chosen: set[int] = set()
    lines: set[tuple[str, str]] = set()
    edges = np.flatnonzero(kept)
    for edge in edges[np.argsort(-np.abs(circuit.scores[edges]), kind="stable")].tolist():
        if edge in chosen:
            continue
        through = way.through(edge)
        more = lines | set(map(line, through))
        if len(more) <= most:
            chosen.update(through)
            lines = more
    mask = np.zeros_like(kept)
    mask[list(chosen)] = True
    return mask


class _Ways:
    """Ways from the embeddings to nodes, and on to ``logits``, with the strongest weakest edge."""

    def __init__(self, circuit: Circuit, kept: Mask) -> None:
        graph = self._graph = circuit.graph
        worth = np.abs(circuit.scores)
        edges = np.flatnonzero(kept).tolist()  # by receiver, so in topological order
        before = np.where(graph.source, np.inf, -1.0)
        after = np.full(graph.n_nodes, -1.0)
        after[graph.n_senders] = np.inf
        self._into: dict[int, int] = {}
        self._out: dict[int, int] = {}
        for edge in edges:
            least = min(before[graph.edge_sender[edge]], worth[edge])
            for node in graph.fed_by(int(graph.edge_receiver[edge])).tolist():
                if least > before[node]:
                    before[node], self._into[node] = least, edge
        for edge in reversed(edges):
            sender = int(graph.edge_sender[edge])
            least = min(after[graph.fed_by(int(graph.edge_receiver[edge]))].max(), worth[edge])
            if least > after[sender]:
                after[sender], self._out[sender] = least, edge
        self._after = after

    def through(self, edge: int) -> list[int]:
        """Return the edges of the best way that an edge is on."""
        found, graph = [edge], self._graph
        node = int(graph.edge_sender[edge])
        while node in self._into:
            found.append(self._into[node])
            node = int(graph.edge_sender[found[-1]])
        node = self._fed(edge)
        while node in self._out:
            found.append(self._out[node])
            node = self._fed(found[-1])
        return found

    def _fed(self, edge: int) -> int:
        """The node, of those that an edge leads to, from which the way on is best."""
        fed = self._graph.fed_by(int(self._graph.edge_receiver[edge]))
        return int(fed[self._after[fed].argmax()])


def _drawn(
    circuit: Circuit, mask: Mask, groups: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Groups of the nodes that some drawn edge touches, where at least two of them are left."""
    graph = circuit.graph
    touched = {graph.senders[i] for i in np.unique(graph.edge_sender[mask]).tolist()}
    for receiver in np.unique(graph.edge_receiver[mask]).tolist():
        touched.add(graph.receiver_node(receiver))
    left = (tuple(name for name in names if name in touched) for names in groups.values())
    return {names[0]: names for names in left if len(names) > 1}
