"""Two circuits, or a circuit and a reference: what they share, and one diagram of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from graphs.circuit import Circuit
from graphs.coarse import coarsen, joined_shape, with_spans
from graphs.errors import GraphError
from graphs.graph import Graph, GraphShape
from graphs.known.reference import Reference, inner_nodes
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
from graphs.select import Mask, prune
from graphs.spans import span_name, split_span

__all__ = [
    "Comparison",
    "Overlap",
    "ReferenceComparison",
    "RoleCount",
    "common_form",
    "compare",
    "compare_reference",
    "counted_edges",
    "differing_shapes",
    "same_graph",
    "to_dot_comparison",
    "to_dot_reference",
]

MERGE_ABOVE = 220
_STYLES = {  # colour, line style, relative width, stroke in the legend: distinct in grey as well
    "common": (GREY, "solid", 1.0, "\u2014"),
    "a": (BLUE, "dashed", 1.5, "- -"),
    "b": (VERMILION, "dotted", 1.9, "\u00b7 \u00b7 \u00b7"),
}


@dataclass(frozen=True)
class Overlap:
    """How a set of names compares with a second one, which counts as the reference.

    Where both sets are empty all four numbers are 1; where only a denominator is, they are 0.
    """

    common: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    def __repr__(self) -> str:
        counts = f"{len(self.common):,} common, {len(self.only_a):,} and {len(self.only_b):,} not"
        return f"<Overlap: {counts}>"

    @property
    def precision(self) -> float:
        """Share of a that is in b."""
        return self._ratio(len(self.common) + len(self.only_a))

    @property
    def recall(self) -> float:
        """Share of b that is in a."""
        return self._ratio(len(self.common) + len(self.only_b))

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return self._ratio(len(self.common) + (len(self.only_a) + len(self.only_b)) / 2)

    @property
    def jaccard(self) -> float:
        """Size of the intersection over the size of the union."""
        return self._ratio(len(self.common) + len(self.only_a) + len(self.only_b))

    def _ratio(self, whole: float) -> float:
        if not (self.common or self.only_a or self.only_b):
            return 1.0
        return len(self.common) / whole if whole else 0.0


@dataclass(frozen=True)
class Comparison:
    """Overlap of two circuits, in edges and in nodes.

    Edges are those in each circuit; nodes those that its edges connect to both the embeddings
    and ``logits`` (:meth:`graphs.Circuit.nodes`).

    Parameters
    ----------
    edges, nodes
        Names in graph order.
    joined
        Whether spans were joined, as the two are not split by the same ones.
    """

    edges: Overlap
    nodes: Overlap
    joined: bool = False

    def __repr__(self) -> str:
        return f"<Comparison: edges {self.edges!r}, nodes {self.nodes!r}>"


def compare(a: Circuit, b: Circuit) -> Comparison:
    """Compare a circuit with a second one, the reference.

    Circuits that are not split by the same spans are joined to components first.

    Parameters
    ----------
    a, b
        Circuits of graphs of equal shape but for spans.

    Returns
    -------
    Comparison
        ``.edges`` and ``.nodes``, each with ``common``, ``only_a``, ``only_b`` (names in graph
        order) and ``precision``, ``recall``, ``f1``, ``jaccard``.

    Raises
    ------
    GraphError
        If the graphs differ; the message names what differs.
    """
    joined = a.graph.shape.spans != b.graph.shape.spans
    a, b = same_graph(a, b)
    return Comparison(
        edges=_overlap(a.graph.edge_names(), a.in_circuit, b.in_circuit),
        nodes=_overlap(a.graph.nodes, _node_mask(a), _node_mask(b)),
        joined=joined,
    )


def to_dot_comparison(
    a: Circuit, b: Circuit, labels: tuple[str, str] = ("a", "b"), *, title: str | None = None
) -> str:
    """Return one diagram of two circuits as DOT text, for :func:`graphs.render`.

    Edges of both are solid grey, of the first alone dashed blue, of the second alone dotted
    vermilion, so that the picture survives greyscale.  Each circuit is drawn pruned.

    Parameters
    ----------
    a, b
        Circuits of graphs of equal shape but for spans.
    labels
        What to call them in the legend.
    title
        Over the picture; None for the two labels.

    Raises
    ------
    GraphError
        If the graphs differ.
    """
    a, b = same_graph(a, b)
    title = f"{labels[0]} and {labels[1]}" if title is None else title
    masks = prune(a.graph, a.in_circuit), prune(b.graph, b.in_circuit)
    texts = {"common": "in both", "a": f"only {labels[0]}", "b": f"only {labels[1]}"}
    return _draw_both(a, b, masks, title, compare(a, b).edges, texts)


@dataclass(frozen=True)
class RoleCount:
    """Which nodes of a role a circuit has."""

    found: tuple[str, ...]
    missed: tuple[str, ...]

    def __str__(self) -> str:
        return f"{len(self.found)} of {len(self.found) + len(self.missed)}"


@dataclass(frozen=True)
class ReferenceComparison:
    """What a circuit found of a reference.

    In each overlap ``common`` was found, ``only_a`` is extra and ``only_b`` was missed.

    Parameters
    ----------
    edges
        Edges of the coarser of the two graphs, node pairs where the reference fixes no more;
        None for a reference that names nodes alone.
    nodes
        Heads and MLPs; embeddings and ``logits``, which every circuit has, are not counted.
    roles
        Role -> its nodes that were found and missed.
    positions
        ``spans``: edges and nodes count per span; ``joined``: the circuit's spans were joined, as
        the reference has no positions at all or others; empty for a circuit that is not split.
    """

    edges: Overlap | None
    nodes: Overlap
    roles: Mapping[str, RoleCount]
    positions: str = ""

    def __repr__(self) -> str:
        edges = "" if self.edges is None else f"edges {self.edges!r}, "
        return f"<ReferenceComparison: {edges}nodes {self.nodes!r}>"


def compare_reference(circuit: Circuit, reference: Reference) -> ReferenceComparison:
    """Compare a circuit with a reference.

    Where one keeps q, k and v (or token and position embeddings) apart and the other does not,
    they are joined in both: an edge is in if one of its parts is.  Spans of the circuit stay
    apart where the reference says at which of them its nodes read and write; a node of a role
    then counts as found only at a span of its own.  Otherwise spans are joined as well.  Optional
    nodes of the reference and their edges are not counted.

    Parameters
    ----------
    circuit
        What was found.  Its nodes are those that its edges connect to both the embeddings and
        ``logits``.
    reference
        What counts as true.

    Raises
    ------
    GraphError
        If the reference is of another model's graph; the message names what differs.
    """
    found, true = common_form(circuit, reference)
    by_span = bool(true.graph.shape.spans)
    nodes, wanted = set(circuit.nodes()), set(true.nodes() if by_span else reference.nodes)
    if not by_span:
        nodes = {split_span(name)[0] for name in nodes}
    counted = [
        name
        for name in inner_nodes(true.graph)
        if split_span(name)[0] not in reference.optional_nodes
    ]

    def is_found(name: str) -> bool:
        if not by_span:
            return name in nodes
        spans = reference.positions.get(name, true.graph.shape.spans)
        return any(span_name(name, span) in nodes for span in spans)

    return ReferenceComparison(
        edges=None
        if reference.granularity == "nodes"
        else _overlap(found.graph.edge_names(), found.in_circuit, true.in_circuit),
        nodes=_overlap(
            counted,
            np.array([name in nodes for name in counted], dtype=bool),
            np.array([name in wanted for name in counted], dtype=bool),
        ),
        roles={
            role: RoleCount(
                tuple(name for name in names if is_found(name)),
                tuple(name for name in names if not is_found(name)),
            )
            for role, names in reference.roles.items()
        },
        positions="spans" if by_span else "joined" if circuit.graph.shape.spans else "",
    )


def to_dot_reference(
    circuit: Circuit, reference: Reference, label: str = "circuit", *, note: str = ""
) -> str:
    """Return one diagram of a circuit and a reference as DOT text, for :func:`graphs.render`.

    Found edges are solid grey, extra ones dashed blue, missed ones dotted vermilion: all that
    :func:`compare_reference` counts, nothing pruned.  For a reference that names nodes alone the
    circuit is drawn with those nodes outlined.

    Parameters
    ----------
    circuit, reference
        As for :func:`compare_reference`.
    label
        What to call the circuit in the title.
    note
        End of the title.

    Raises
    ------
    GraphError
        If the reference is of another model's graph.
    """
    found, true = common_form(circuit, reference)
    title = f"{label} and the reference {reference.name}{note}"
    comparison = compare_reference(circuit, reference)
    if comparison.edges is None:
        kept = found.in_circuit
        lines = _lines(found, true, "common", kept, int(kept.sum()) > MERGE_ABOVE)
        texts = {"common": f"edges of {label}"}
        caption = _caption(title, "nodes", comparison.nodes, {"common": kept}, texts)
        nodes = true.nodes() if true.graph.shape.spans else reference.nodes
        return diagram(found.graph, lines, caption=caption, highlight=nodes)
    masks = found.in_circuit, true.in_circuit
    texts = {"common": "found", "a": "extra", "b": "missed"}
    return _draw_both(found, true, masks, title, comparison.edges, texts)


def common_form(
    circuit: Circuit, reference: Reference, *, optional: bool = True
) -> tuple[Circuit, Circuit]:
    """Return the circuit and the reference in the finest graph that both can be put in.

    Edges of the reference's optional nodes are out of both, unless ``optional`` is False.

    Raises
    ------
    GraphError
        If the reference is of another model's graph; the message names what differs.
    """
    ours, true = circuit.graph.shape, reference.circuit.graph.shape
    by_span = (
        bool(reference.positions)
        and reference.spans <= set(ours.spans)
        and reference.granularity != "nodes"
    )
    shape = joined_shape(
        ours, qkv=not true.split_qkv, embed=not true.split_embed, spans=not by_span
    )
    other = joined_shape(true, qkv=not ours.split_qkv, embed=not ours.split_embed)
    other = with_spans(other, shape)
    if differing := differing_shapes(
        shape, other, "the circuit", f"the reference ({reference.model})"
    ):
        raise GraphError(
            f"reference {reference.name!r} is of another graph: {differing}; compare it with a "
            "circuit of its own model"
        )
    known = reference.split(ours) if by_span else reference.circuit
    pair = coarsen(circuit, shape), coarsen(known, shape)
    if not optional:
        return pair
    return _without(pair[0], reference.optional_nodes), _without(pair[1], reference.optional_nodes)


def _without(circuit: Circuit, nodes: Sequence[str]) -> Circuit:
    """Take out the edges that leave or enter some nodes."""
    if not nodes:
        return circuit
    return replace(circuit, in_circuit=circuit.in_circuit & counted_edges(circuit.graph, nodes))


def counted_edges(graph: Graph, optional: Sequence[str]) -> Mask:
    """``[edge]``: edges that neither leave nor enter one of some nodes, at any span."""
    senders = np.array([split_span(name)[0] in optional for name in graph.senders])
    read = [split_span(graph.receiver_node(v))[0] for v in range(len(graph.receivers))]
    receivers = np.array([name in optional for name in read])
    return ~(senders[graph.edge_sender] | receivers[graph.edge_receiver])


def differing_shapes(a: GraphShape, b: GraphShape, first: str, second: str) -> str:
    """Return in words what differs between two shapes; empty where nothing does.

    ``reaches`` does not count: it changes no edge.
    """
    differing = [
        f"{f.name} is {getattr(a, f.name)} in {first} and {getattr(b, f.name)} in {second}"
        for f in fields(a)
        if f.name not in ("sites", "reaches") and getattr(a, f.name) != getattr(b, f.name)
    ]
    one, other = a.site_at, b.site_at
    differing += [
        f"the latents of {name} differ"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]
    return "; ".join(differing)


def same_graph(a: Circuit, b: Circuit) -> tuple[Circuit, Circuit]:
    """Both circuits in one graph; joined to components unless they are split by the same spans."""
    if a.graph.shape.spans != b.graph.shape.spans:
        a, b = coarsen(a, a.graph.shape.unsplit), coarsen(b, b.graph.shape.unsplit)
    if differing := differing_shapes(a.graph.shape, b.graph.shape, "one", "the other"):
        raise GraphError(
            f"the circuits are of different graphs: {differing}; "
            "compare circuits of one model at one granularity"
        )
    if a.graph.senders != b.graph.senders or a.graph.receivers != b.graph.receivers:
        raise GraphError("the circuits are of different graphs: their nodes differ")
    return a, b


def _node_mask(circuit: Circuit) -> Mask:
    names = set(circuit.nodes())
    return np.array([name in names for name in circuit.graph.nodes])


def _overlap(names: Sequence[str], a: Mask, b: Mask) -> Overlap:
    def named(mask: Mask) -> tuple[str, ...]:
        return tuple(names[i] for i in np.flatnonzero(mask).tolist())

    return Overlap(named(a & b), named(a & ~b), named(b & ~a))


def _lines(a: Circuit, b: Circuit, key: str, mask: Mask, merge: bool) -> list[Line]:
    color, style, wide, _ = _STYLES[key]
    scores = b.scores if key == "b" else a.scores
    graph = a.graph
    return [
        Line(
            sender,
            node,
            port,
            tuple(graph.receivers[graph.edge_receiver[e]] for e in group),
            tuple(scores[group].tolist()),
            color=color,
            style=style,
            width=wide * (0.7 if merge else 1.0),
        )
        for (sender, node, port), group in group_edges(
            graph, np.flatnonzero(mask), merge=merge
        ).items()
    ]


def _draw_both(
    a: Circuit,
    b: Circuit,
    masks: tuple[Mask, Mask],
    title: str,
    overlap: Overlap,
    texts: Mapping[str, str],
) -> str:
    """One diagram of the edges in two masks; ``texts`` says what their classes are called."""
    in_a, in_b = masks
    classes = {"common": in_a & in_b, "a": in_a & ~in_b, "b": in_b & ~in_a}
    merge = int((in_a | in_b).sum()) > MERGE_ABOVE
    lines = [line for key, mask in classes.items() for line in _lines(a, b, key, mask, merge)]
    return diagram(a.graph, lines, caption=_caption(title, "edges", overlap, classes, texts))


def _caption(
    title: str,
    what: str,
    overlap: Overlap,
    classes: Mapping[str, Mask],
    texts: Mapping[str, str],
) -> Caption:
    return Caption(
        title=title,
        subtitle=f"{what}: precision {overlap.precision:.2f} \u00b7 recall {overlap.recall:.2f} "
        f"\u00b7 F1 {overlap.f1:.2f} \u00b7 Jaccard {overlap.jaccard:.2f}",
        legend=tuple(
            swatch(_STYLES[key][0], f"{text}: {int(classes[key].sum())}", _STYLES[key][3])
            for key, text in texts.items()
        ),
    )
