"""Several circuits of one graph: which edges are common, which come and go, in one diagram."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from graphs.circuit import Circuit
from graphs.errors import GraphError
from graphs.graph import Graph
from graphs.known.bases import Shared, shared
from graphs.known.compare import MERGE_ABOVE, same_graph
from graphs.pictures.diagram import (
    BLUE,
    GREY,
    VERMILION,
    Caption,
    Line,
    diagram,
    group_edges,
    swatch,
)
from graphs.select import prune

__all__ = ["Several", "compare_several", "to_dot_several"]

_STYLES = {  # colour, line style, relative width, stroke in the legend: distinct in grey as well
    "all": (GREY, "solid", 1.9, "\u2014"),
    "some": (BLUE, "dashed", 1.4, "- -"),
    "one": (VERMILION, "dotted", 1.2, "\u00b7 \u00b7 \u00b7"),
}


@dataclass(frozen=True)
class Several:
    """In which of several circuits edges and nodes are.

    Parameters
    ----------
    edges, nodes
        Of the circuits, pruned; nodes without embeddings and ``logits``.  Names in the order of
        the first circuit that has them.
    """

    edges: Shared
    nodes: Shared

    def __repr__(self) -> str:
        return f"<Several: edges {self.edges!r}, nodes {self.nodes!r}>"


def compare_several(*circuits: Circuit) -> Several:
    """Compare circuits of one graph.

    Parameters
    ----------
    *circuits
        Two or more; what is on no path from the embeddings to ``logits`` is left out.

    Raises
    ------
    GraphError
        If they are fewer than two, or of different graphs; the message names what differs.
    """
    masks = _pruned(circuits)
    graph = circuits[0].graph
    outer = {*(graph.nodes[i] for i in np.flatnonzero(graph.source)), "logits"}
    nodes = [
        [name for name in replace(circuit, in_circuit=mask).nodes() if name not in outer]
        for circuit, mask in zip(circuits, masks, strict=True)
    ]
    edges = [graph.edge_names(np.flatnonzero(mask)) for mask in masks]
    return Several(shared(edges), shared(nodes))


def to_dot_several(circuits: Sequence[Circuit], *, title: str = "") -> str:
    """Return one diagram of several circuits as DOT text, for :func:`graphs.render`.

    Edges of all are solid grey, of some dashed blue, of one alone dotted vermilion; of those the
    wider ones are in more of them, and an edge's score is the share of the circuits that have it.
    Each circuit is drawn pruned.

    Parameters
    ----------
    circuits
        Two or more of one graph.
    title
        Over the picture.

    Raises
    ------
    GraphError
        As :func:`compare_several`.
    """
    masks = _pruned(circuits)
    graph, n = circuits[0].graph, len(circuits)
    counts = masks.sum(0)
    classes = {"all": counts == n, "some": (counts > 1) & (counts < n), "one": counts == 1}
    texts = {"all": f"in all {n}", "some": "in some", "one": "in one alone"}
    merge = int((counts > 0).sum()) > MERGE_ABOVE
    lines = [
        line
        for key, mask in classes.items()
        for line in _lines(graph, key, mask, counts / n, merge)
    ]
    legend = tuple(
        swatch(_STYLES[key][0], f"{text}: {int(classes[key].sum())}", _STYLES[key][3])
        for key, text in texts.items()
    )
    either = int((counts > 0).sum())
    subtitle = f"edges: {int(classes['all'].sum())} of {either} in all {n} circuits"
    return diagram(graph, lines, caption=Caption(title, subtitle, legend))


def _lines(
    graph: Graph, key: str, mask: NDArray[np.bool_], shares: NDArray[np.float64], merge: bool
) -> list[Line]:
    color, style, wide, _ = _STYLES[key]
    groups = group_edges(graph, np.flatnonzero(mask).tolist(), merge=merge)
    return [
        Line(
            sender,
            node,
            port,
            tuple(graph.receivers[graph.edge_receiver[e]] for e in group),
            tuple(shares[group].tolist()),
            color=color,
            style=style,
            width=wide * (0.7 if merge else 1.0) * (0.6 + 0.4 * float(shares[group].max())),
        )
        for (sender, node, port), group in groups.items()
    ]


def _pruned(circuits: Sequence[Circuit]) -> NDArray[np.bool_]:
    """``[circuit, edge]``, once it is clear that all are of one graph."""
    if len(circuits) < 2:
        raise GraphError(f"{len(circuits)} circuits: expected at least 2 to compare")
    for other in circuits[1:]:
        if other.graph.shape.spans != circuits[0].graph.shape.spans:
            raise GraphError("the circuits are of different graphs: they have other spans")
        same_graph(circuits[0], other)
    return np.stack([prune(circuit.graph, circuit.in_circuit) for circuit in circuits])
