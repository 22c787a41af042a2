"""Pictures of circuits split by spans: a column per span, moves between columns."""

from __future__ import annotations

import re

import pygraphviz
import pytest

from graphs import (
    Circuit,
    GraphShape,
    Reference,
    component_graph,
    prune,
    read_dot,
    render,
    to_dot,
    to_dot_comparison,
    to_dot_reference,
)
from graphs.sample import PathSampler
from graphs.spans import split_span

SPANS = ("rest", "S1", "IO", "S2", "END")
SHAPE = GraphShape(3, 2, spans=SPANS, scored_spans=("END",))
EDGES = [
    "input@S1->a0.h1<k>@S1",
    "input@S1->a0.h1<v>@S1",
    "input@S2->a0.h1<q>@S2",
    "a0.h1@S2->m0@S2",
    "m0@S2->a1.h0<v>@S2",
    "input@IO->a2.h1<k>@IO",
    "a1.h0@END->a2.h1<q>@END",
    "input@END->a2.h1<v>@END",
    "a2.h1@END->logits@END",
]
MOVES = {("a0.h1@S1", "a0.h1@S2"), ("a1.h0@S2", "a1.h0@END"), ("a2.h1@IO", "a2.h1@END")}


@pytest.fixture
def circuit() -> Circuit:
    return Circuit.from_edges(component_graph(SHAPE), EDGES, task="ioi", model="toy")


def drawn(dot: str) -> pygraphviz.AGraph:
    return pygraphviz.AGraph(string=dot)


def places(view: pygraphviz.AGraph) -> dict[str, tuple[float, float]]:
    return {
        str(node): tuple(map(float, node.attr["pos"].split(",")))
        for node in view.nodes()
        if not str(node).startswith("axis")
    }


def bands(view: pygraphviz.AGraph) -> dict[str, tuple[float, ...]]:
    return {
        part.graph_attr["label"]: tuple(map(float, part.graph_attr["bb"].split(",")))
        for part in view.subgraphs()
        if (part.name or "").startswith("cluster_span")
    }


def moves(view: pygraphviz.AGraph) -> set[tuple[str, str]]:
    return {
        (str(e[0]), str(e[1]))
        for e in view.edges()
        if e.attr["style"] == "dashed" and not e.attr["receiver"]
    }


def test_every_span_with_nodes_is_a_column_in_order(circuit):
    view = drawn(to_dot(circuit))
    found = bands(view)
    assert list(found) == ["S1", "IO", "S2", "END"]  # nothing is drawn at rest
    edges = [x for box in found.values() for x in (box[0], box[2])]
    assert edges == sorted(edges)
    assert len(set(edges)) == len(edges)
    for name, (x, y) in places(view).items():
        left, low, right, high = found[split_span(name)[1]]
        assert left < x < right
        assert low < y < high


def test_components_stand_at_the_same_height_in_every_column(circuit):
    heights: dict[str, set[float]] = {}
    for name, (_, y) in places(drawn(to_dot(circuit))).items():
        heights.setdefault(split_span(name)[0], set()).add(y)
    assert all(len(ys) == 1 for ys in heights.values())
    order = ["input", "a0.h1", "m0", "a1.h0", "a2.h1", "logits"]
    assert sorted(heights, key=lambda name: min(heights[name])) == order


def test_moves_join_a_head_to_itself_at_the_span_that_reads(circuit):
    dot = to_dot(circuit)
    view = drawn(dot)
    assert moves(view) == MOVES
    assert "keys and values read at another span" in dot
    at = places(view)
    for source, target in MOVES:
        path = view.get_edge(source, target).attr["pos"]
        points = [tuple(map(float, p.split(","))) for p in path.split()[1:]]
        tip = tuple(map(float, path.split()[0].removeprefix("e,").split(",")))
        assert at[source][0] < points[0][0] < tip[0] < at[target][0]


def test_a_move_may_go_to_the_left():
    shape = GraphShape(1, 1, spans=("S1", "IO"), scored_spans=("S1",), reaches=((1, 0),))
    edges = ["input@IO->a0.h0<v>@IO", "a0.h0@S1->logits@S1"]
    view = drawn(to_dot(Circuit.from_edges(component_graph(shape), edges)))
    assert moves(view) == {("a0.h0@IO", "a0.h0@S1")}
    path = view.get_edge("a0.h0@IO", "a0.h0@S1").attr["pos"].split()
    at = places(view)
    start, tip = (float(p.removeprefix("e,").split(",")[0]) for p in (path[1], path[0]))
    assert at["a0.h0@S1"][0] < tip < start < at["a0.h0@IO"][0]


def test_heads_that_only_read_for_another_span_are_pale(circuit):
    view = drawn(to_dot(circuit))
    fills = {
        str(n): re.search(r'BGCOLOR="(#\w+)" COLOR', n.attr["label"])[1]
        for n in view.nodes()
        if str(n).startswith("a") and not str(n).startswith("axis")
    }
    reading = {source for source, _ in MOVES}
    assert len({fills[name] for name in reading}) == 1
    assert {fills[name] for name in fills.keys() - reading} == {"#FBF3CF"}
    assert fills["a0.h1@S1"] != "#FBF3CF"


def test_labels_leave_the_span_to_the_column(circuit):
    view = drawn(to_dot(circuit))
    labels = {str(n): n.attr["label"] for n in view.nodes()}
    assert labels["logits@END"] == "logits"
    assert labels["input@S1"] == "input"
    assert labels["m0@S2"] == "m0"


def test_shared_heads_keep_their_line_to_the_group_and_move_too():
    shape = GraphShape(1, 2, 1, spans=("IO", "END"), scored_spans=("END",))
    edges = ["input@IO->a0.kv0<v>@IO", "input@END->a0.kv0<k>@END", "a0.h1@END->logits@END"]
    view = drawn(to_dot(Circuit.from_edges(component_graph(shape), edges)))
    assert moves(view) == {("a0.kv0@IO", "a0.h1@END")}
    assert view.get_edge("a0.kv0@END", "a0.h1@END").attr["style"] == "dotted"


def test_a_picture_without_title_has_no_legend_and_one_without_edges_is_drawn(circuit):
    assert "read at another span" not in to_dot(circuit, title="")
    shape = GraphShape(1, 1, spans=("S1", "IO"), scored_spans=("S1",))
    view = drawn(to_dot(Circuit.from_edges(component_graph(shape), [])))
    assert set(places(view)) == {"input@S1", "logits@S1"}


def test_large_circuits_are_drawn_and_read_back(tmp_path):
    import numpy as np

    graph = component_graph(GraphShape(6, 4, 2, spans=SPANS, scored_spans=("S2", "END")))
    rng = np.random.default_rng(0)
    mask = PathSampler(graph).circuit(400, rng)
    circuit = Circuit(graph, rng.normal(size=graph.n_edges) * mask, mask)
    (tmp_path / "c.dot").write_text(to_dot(circuit))
    again = read_dot(tmp_path / "c.dot")
    assert (again.in_circuit == mask).all()
    assert (again.scores == circuit.scores).all()
    view = drawn(to_dot(circuit, max_edges=None))
    assert {"logits@S2", "logits@END"} <= set(places(view))
    reading = {
        (graph.receiver_node(int(v)), graph.nodes[n])
        for v in np.unique(graph.edge_receiver[prune(graph, mask)])
        for n in graph.fed_by(int(v))
    }
    senders = {graph.senders[u] for u in np.unique(graph.edge_sender[prune(graph, mask)])}
    expected = {(u, v) for u, v in reading if v in senders and split_span(u)[1] != split_span(v)[1]}
    assert moves(view) == expected


@pytest.mark.parametrize("format", ["svg", "png", "pdf"])
def test_pictures_are_rendered(circuit, tmp_path, format):
    render(circuit, tmp_path / f"c.{format}")
    content = (tmp_path / f"c.{format}").read_bytes()
    assert content.startswith({"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[format])
    if format == "svg":
        assert all(f">{span}<".encode() in content for span in ("S1", "IO", "S2", "END"))


def test_comparisons_are_drawn_by_span(circuit):
    other = Circuit.from_edges(circuit.graph, EDGES[2:])
    dot = to_dot_comparison(circuit, other, ("acdc", "eap"))
    assert "only acdc: 2" in dot
    assert list(bands(drawn(dot))) == ["S1", "IO", "S2", "END"]
    whole = Circuit.from_edges(circuit.graph.components, ["input->logits"])
    assert not bands(drawn(to_dot_comparison(circuit, whole)))
    reference = Reference(
        name="r", description="-", model="m", task="t", citation="-", open="-",
        graph=circuit.graph.components,
        edges=("input->a2.h1<k>", "a2.h1->logits"),
        positions={"a2.h1": ("END",), "a2.h1<k>": ("IO",)},
    )  # fmt: skip
    dot = to_dot_reference(circuit, reference)
    assert "found: 2" in dot
    assert set(bands(drawn(dot))) == {"S1", "IO", "S2", "END"}
