"""Graphs split by spans: an explicit construction from names, networkx, and files."""

from __future__ import annotations

import json
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs import (
    Circuit,
    CircuitFileError,
    GraphError,
    GraphShape,
    coarsen,
    component_graph,
    joined_shape,
    load_circuit,
    prune,
    save_circuit,
    select_greedy,
    select_top,
)
from graphs.coarse import coarse_edges
from graphs.graph import parse_node, shape_from_config, shape_to_config
from graphs.known.roc import items
from graphs.order import edge_order, receiver_order
from graphs.sample import PathSampler
from graphs.spans import split_span

IOI = ("rest", "S1", "S1+1", "IO", "S2", "END")
NAMES = ("a", "b+1", "p2", "d")


@st.composite
def split_shapes(draw):
    kv_heads = draw(st.integers(1, 2))
    n_spans = draw(st.integers(1, 4))
    spans = NAMES[:n_spans]
    scored = draw(st.sets(st.sampled_from(spans), min_size=1))
    pairs = [(s, t) for s in range(n_spans) for t in range(n_spans)]
    return GraphShape(
        n_layers=draw(st.integers(0, 3)),
        n_heads=kv_heads * draw(st.integers(1, 2)),
        n_kv_heads=kv_heads,
        has_mlp=draw(st.booleans()),
        parallel=draw(st.booleans()),
        split_qkv=draw(st.booleans()),
        split_embed=draw(st.booleans()),
        spans=spans,
        scored_spans=tuple(scored),
        reaches=draw(st.none() | st.sets(st.sampled_from(pairs)).map(tuple)),
    )


@st.composite
def graphs_and_masks(draw):
    graph = component_graph(draw(split_shapes()))
    density = draw(st.sampled_from([0.02, 0.1, 0.3, 0.9]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return graph, rng.random(graph.n_edges) < density


def readable(shape: GraphShape, s: str, t: str) -> bool:
    i, j = shape.spans.index(s), shape.spans.index(t)
    return i == j or (i < j if shape.reaches is None else (i, j) in shape.reaches)


def explicit_fed(shape: GraphShape, receiver: str) -> set[str]:
    """Nodes that a receiver feeds, from its name alone."""
    component, span = split_span(receiver)
    if component == "logits":
        return {"logits"}
    if component[0] == "m":
        return {receiver}
    node, _, kind = component.rstrip(">").partition("<")
    layer, head = node.split(".")
    heads = [node]
    if head.startswith("kv"):
        group = shape.n_heads // shape.kv_heads
        heads = [f"{layer}.h{int(head[2:]) * group + i}" for i in range(group)]
    key_or_value = kind in ("k", "v") or (kind == "" and (not shape.grouped or "kv" in head))
    spans = [t for t in shape.spans if t == span or (key_or_value and readable(shape, span, t))]
    return {f"{h}@{t}" for h in heads for t in spans}


@given(split_shapes())
@settings(max_examples=80, deadline=None)
def test_edges_and_their_number_are_those_of_the_formula(shape):
    graph, whole = component_graph(shape), component_graph(shape.unsplit)
    expected = {
        f"{u}@{span}->{v}@{span}"
        for u, v in (name.split("->") for name in whole.edge_names())
        for span in (shape.scored_spans if v == "logits" else shape.spans)
    }
    assert set(graph.edge_names()) == expected
    assert len(expected) == graph.n_edges
    into_logits = sum(name.endswith("->logits") for name in whole.edge_names())
    assert graph.n_edges == (
        len(shape.spans) * (whole.n_edges - into_logits) + len(shape.scored_spans) * into_logits
    )


@given(split_shapes())
@settings(max_examples=80, deadline=None)
def test_receivers_feed_what_their_names_say(shape):
    graph = component_graph(shape)
    for v, name in enumerate(graph.receivers):
        fed = [graph.nodes[node] for node in graph.fed_by(v)]
        assert set(fed) == explicit_fed(shape, name)
        assert len(fed) == len(set(fed))
    assert graph.nodes[graph.n_senders] == "logits"
    assert graph.nodes.count("logits") == 1
    sources = {n for n, is_source in zip(graph.nodes, graph.source, strict=True) if is_source}
    embeddings = ("tok", "pos") if shape.split_embed else ("input",)
    assert sources == {f"{name}@{span}" for name in embeddings for span in shape.spans}


@given(split_shapes())
@settings(max_examples=60, deadline=None)
def test_arrays_are_topological_and_map_to_components(shape):
    graph = component_graph(shape)
    whole = graph.components
    key = graph.edge_receiver.astype(np.int64) * graph.n_senders + graph.edge_sender
    assert (np.diff(key) > 0).all()
    first_read = np.full(graph.n_nodes, len(graph.receivers))
    np.minimum.at(first_read, graph.edge_sender, graph.edge_receiver)
    for v in range(len(graph.receivers)):
        assert (first_read[graph.fed_by(v)] > v).all()
    for names, wholes, component, span in (
        (graph.senders, whole.senders, graph.sender_component, graph.sender_span),
        (graph.receivers, whole.receivers, graph.receiver_component, graph.receiver_span),
    ):
        assert names == tuple(
            f"{wholes[c]}@{shape.spans[s]}" for c, s in zip(component, span, strict=True)
        )
    for part in (graph, graph.subgraph(np.arange(graph.n_edges) % 3 == 0)):
        for e, name in enumerate(part.edge_names()):
            u, v = (split_span(end)[0] for end in name.split("->"))
            assert whole.edge_name(int(part.edge_component[e])) == f"{u}->{v}"
            assert name.endswith("@" + shape.spans[part.edge_span[e]])


def test_an_unsplit_graph_maps_to_itself():
    graph = component_graph(GraphShape(2, 4, 2))
    assert graph.components is graph
    assert graph.shape.n_spans == 1
    assert (graph.edge_component == np.arange(graph.n_edges)).all()
    assert (graph.sender_component == np.arange(graph.n_senders)).all()
    assert not (graph.edge_span.any())
    assert not (graph.sender_span.any())
    assert not (graph.receiver_span.any())


def test_gpt2_small_at_fifteen_positions():
    # FACTS.md: AutoCircuit counts 487,365 = 15 * 32,491, logits at every position.
    spans = tuple(f"p{i}" for i in range(15))
    shape = GraphShape(12, 12, spans=spans, scored_spans=spans)
    assert component_graph(shape).n_edges == 487_365
    assert component_graph(replace(shape, scored_spans=("p14",))).n_edges == 487_365 - 14 * 157


def on_paths(graph, mask) -> set[str]:
    view = nx.DiGraph()
    view.add_nodes_from(graph.nodes)
    for name in graph.receivers:
        view.add_edges_from((f"in:{name}", node) for node in explicit_fed(graph.shape, name))
    for name in graph.edge_names(np.flatnonzero(mask)):
        u, v = name.split("->")
        view.add_edge(u, f"in:{v}")
    starts = [n for n in graph.nodes if parse_node(n)[0] == "input"]
    forward = set(starts).union(*(nx.descendants(view, s) for s in starts))
    return forward & ({"logits"} | nx.ancestors(view, "logits"))


@given(graphs_and_masks())
@settings(max_examples=100, deadline=None)
def test_alive_nodes_and_prune_agree_with_networkx(case):
    graph, mask = case
    through = on_paths(graph, mask)
    assert Circuit(graph, np.zeros(graph.n_edges), mask).nodes() == [
        n for n in graph.nodes if n in through
    ]
    ends = [(name, *name.split("->")) for name in graph.edge_names(np.flatnonzero(mask))]
    kept = {name for name, u, v in ends if u in through and f"in:{v}" in through}
    assert set(graph.edge_names(np.flatnonzero(prune(graph, mask)))) == kept


@given(graphs_and_masks(), st.integers(0, 30))
@settings(max_examples=40, deadline=None)
def test_selections_are_connected(case, n):
    graph, mask = case
    scores = np.where(mask, np.arange(graph.n_edges) % 7 + 1.0, 0.0)
    n = min(n, graph.n_edges)
    for chosen in (select_top(graph, scores, n), select_greedy(graph, scores, n)):
        assert chosen.sum() <= n
        assert (prune(graph, chosen) == chosen).all()


def test_a_key_of_one_span_keeps_the_head_of_a_later_one_alive():
    shape = GraphShape(2, 1, has_mlp=False, spans=("IO", "S2", "END"), scored_spans=("END",))
    graph = component_graph(shape)
    moved = ["input@IO->a1.h0<v>@IO", "a1.h0@END->logits@END"]
    assert Circuit.from_edges(graph, moved).nodes() == ["input@IO", "a1.h0@END", "logits"]
    backwards = component_graph(replace(shape, scored_spans=("IO",)))
    later = ["input@END->a1.h0<v>@END", "a1.h0@IO->logits@IO"]
    assert Circuit.from_edges(backwards, later).nodes() == []
    both = component_graph(replace(backwards.shape, reaches=((0, 1), (2, 0))))
    assert Circuit.from_edges(both, later).nodes() == ["input@END", "a1.h0@IO", "logits"]


def test_order_of_acdc_goes_through_spans_from_the_last():
    shape = GraphShape(1, 2, spans=("S1", "END"), scored_spans=("END",))
    graph = component_graph(shape)
    assert [graph.receivers[v] for v in receiver_order(graph)] == [
        "logits@END", "m0@END", "m0@S1",
        "a0.h1<v>@END", "a0.h1<v>@S1", "a0.h0<v>@END", "a0.h0<v>@S1",
        "a0.h1<k>@END", "a0.h1<k>@S1", "a0.h0<k>@END", "a0.h0<k>@S1",
        "a0.h1<q>@END", "a0.h1<q>@S1", "a0.h0<q>@END", "a0.h0<q>@S1",
    ]  # fmt: skip
    into = graph.edge_names(edge_order(graph, graph.receiver_index["m0@S1"]))
    assert into == ["a0.h0@S1->m0@S1", "a0.h1@S1->m0@S1", "input@S1->m0@S1"]


@given(split_shapes())
@settings(max_examples=40, deadline=None)
def test_order_is_that_of_the_components_and_reverse_topological(shape):
    graph = component_graph(shape)
    order = receiver_order(graph)
    assert sorted(order) == list(range(len(graph.receivers)))
    components = list(dict.fromkeys(graph.receiver_component[order].tolist()))
    assert components == receiver_order(graph.components)
    if shape.split_qkv:
        assert order == list(range(len(graph.receivers)))[::-1]
    for v in order:
        edges = edge_order(graph, v)
        assert sorted(edges) == list(range(*graph.receiver_start[v : v + 2]))
        whole = edge_order(graph.components, int(graph.receiver_component[v]))
        assert (graph.edge_component[edges] == whole).all()


@given(split_shapes(), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_random_paths_lead_to_the_logits(shape, seed):
    graph, rng = component_graph(shape), np.random.default_rng(seed)
    sampler, every = PathSampler(graph), prune(graph, np.ones(graph.n_edges, dtype=bool))
    for edge in rng.choice(np.flatnonzero(every), size=5).tolist():
        mask = np.zeros(graph.n_edges, dtype=bool)
        mask[sampler.path(edge, rng)] = True
        assert mask[edge]
        assert (prune(graph, mask) == mask).all()
    assert (sampler.circuit(int(every.sum()), rng) == every).all()
    half = sampler.circuit(int(every.sum()) // 2, rng)
    assert half.sum() >= every.sum() // 2
    assert (prune(graph, half) == half).all()
    with pytest.raises(GraphError, match="a random circuit of"):
        sampler.circuit(int(every.sum()) + 1, rng)


@given(graphs_and_masks())
@settings(max_examples=40, deadline=None)
def test_joined_spans_are_the_component_circuit(case):
    graph, mask = case
    circuit = Circuit(graph, np.random.default_rng(0).normal(size=graph.n_edges), mask)
    joined = coarsen(circuit, graph.shape.unsplit)
    assert (coarse_edges(graph, joined.graph) == graph.edge_component).all()
    names = {"->".join(split_span(end)[0] for end in name.split("->")) for name in circuit.edges()}
    assert set(joined.edges()) == names
    for e in range(joined.graph.n_edges):
        parts = circuit.scores[graph.edge_component == e]
        assert joined.scores[e] == parts[np.abs(parts).argmax()]
    if graph.shape.split_qkv and not graph.shape.grouped:
        pairs = coarsen(circuit, joined_shape(graph.shape, qkv=True))
        assert {name.partition("->")[0] for name in pairs.edges()} == {
            name.partition("->")[0] for name in circuit.edges()
        }
        assert all("<" not in name and "@" in name for name in pairs.edges())


def test_node_pairs_stay_in_the_span_of_their_edges():
    graph = component_graph(GraphShape(1, 1, spans=("S1", "END"), scored_spans=("END",)))
    pairs = items(graph, "node pairs")
    assert set(pairs.names) == {
        "input@S1->a0.h0@S1", "input@END->a0.h0@END",
        "input@S1->m0@S1", "input@END->m0@END", "a0.h0@S1->m0@S1", "a0.h0@END->m0@END",
        "input@END->logits", "a0.h0@END->logits", "m0@END->logits",
    }  # fmt: skip
    key = graph.edge_mask(["input@S1->a0.h0<k>@S1"])
    assert [pairs.names[i] for i in np.flatnonzero(pairs.mask(key))] == ["input@S1->a0.h0@S1"]
    nodes = items(graph, "nodes")
    assert [nodes.names[i] for i in np.flatnonzero(nodes.mask(key))] == ["a0.h0@S1", "a0.h0@END"]


REACHES = ((0, 0), (1, 1), (2, 2), (0, 2), (2, 0))
FILE_SHAPES = [
    GraphShape(2, 2, spans=IOI, scored_spans=("END",)),
    GraphShape(1, 4, 2, spans=("x", "5", "true"), scored_spans=("x", "true"), reaches=REACHES),
    GraphShape(1, 2, split_qkv=False, split_embed=True, spans=("END",), scored_spans=("END",)),
]


@pytest.mark.parametrize("shape", FILE_SHAPES, ids=["spans", "reaches", "one span"])
@pytest.mark.parametrize("suffix", [".json", ".graphml", ".dot"])
def test_files_give_back_the_split_circuit(shape, suffix, tmp_path):
    graph = component_graph(shape)
    rng = np.random.default_rng(1)
    inside = rng.random(graph.n_edges) < 0.4
    circuit = Circuit(graph, rng.normal(size=graph.n_edges) * inside, inside, {"task": "ioi"})
    save_circuit(circuit, tmp_path / f"circuit{suffix}")
    again = load_circuit(tmp_path / f"circuit{suffix}")
    assert again.graph.shape == shape
    assert (again.in_circuit == inside).all()
    assert (again.scores == circuit.scores).all()
    assert again.info == circuit.info


def test_json_says_the_spans_and_leaves_out_what_scores_nothing(tmp_path):
    shape = GraphShape(1, 1, spans=("S1", "END"), scored_spans=("END",))
    edges = ["input@S1->a0.h0<v>@S1", "a0.h0@END->logits@END"]
    save_circuit(Circuit.from_edges(component_graph(shape), edges), tmp_path / "c.json")
    data = json.loads((tmp_path / "c.json").read_text())
    assert data["cfg"]["spans"] == "S1,END"
    assert data["cfg"]["scored_spans"] == "END"
    assert list(data["edges"]) == edges
    data["edges"]["input@S1->a0.h0<v>@END"] = {"score": 0.0, "in_graph": True}
    (tmp_path / "c.json").write_text(json.dumps(data))
    with pytest.raises(CircuitFileError, match="an edge stays in one span"):
        load_circuit(tmp_path / "c.json")


@given(split_shapes())
@settings(max_examples=60, deadline=None)
def test_config_gives_back_the_shape(shape):
    config = json.loads(json.dumps(shape_to_config(shape)))
    assert shape_from_config(config) == shape


def test_reaches_that_only_repeat_the_order_are_the_default():
    shape = GraphShape(1, 1, spans=("a", "b"), scored_spans=("b",))
    assert replace(shape, reaches=((0, 1),)) == shape
    assert replace(shape, reaches=((0, 1), (1, 0))) != shape


BAD = [
    ({"spans": ("a b",), "scored_spans": ("a b",)}, "span 'a b': expected a name of letters"),
    ({"spans": ("a", "a"), "scored_spans": ("a",)}, "span 'a' is listed twice"),
    ({"spans": ("a",), "scored_spans": ("b",)}, "scored span 'b' is no span; known: a"),
    ({"spans": ("a",)}, "no span is scored"),
    ({"scored_spans": ("a",)}, "name the spans, or leave out"),
    (
        {"spans": ("a",), "scored_spans": ("a",), "reaches": ((0, 1),)},
        r"reaches has \(0, 1\): expected pairs of span indices, 0 to 0",
    ),
]


@pytest.mark.parametrize(("fields", "words"), BAD)
def test_a_wrong_shape_is_refused_in_one_line(fields, words):
    with pytest.raises(GraphError, match=words) as caught:
        GraphShape(1, 1, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        ({"spans": ["a"]}, r"circuit cfg has spans=\"\['a'\]\": expected one word"),
        ({"spans": "a", "scored_spans": "a", "reaches": "0-0"}, "expected span:spans"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(cfg, words):
    with pytest.raises(GraphError, match=words):
        shape_from_config({"n_layers": 1, "n_heads": 1, **cfg})


def test_too_many_positions_are_refused():
    spans = tuple(f"p{i}" for i in range(2_000))
    with pytest.raises(GraphError, match="expected at most 50,000,000 of each; use fewer spans"):
        component_graph(GraphShape(12, 12, spans=spans, scored_spans=spans[-1:]))
