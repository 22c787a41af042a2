"""Graphs with latents: names, edges, files, pictures."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from graphs import (
    Circuit,
    GraphError,
    GraphShape,
    compare,
    component_graph,
    from_networkx,
    load_circuit,
    prune,
    save_circuit,
    select_top,
    to_dot,
    to_networkx,
)
from graphs.graph import parse_node, shape_from_config, shape_to_config
from graphs.order import edge_order, receiver_order
from graphs.sites import Site, parse_latent, sites_from_text, sites_to_text

SITES = (Site("attn_z", 0, (4, 7)), Site("transcoder", 0, (2, 3)), Site("resid_pre", 1, (1,)),
         Site("mlp_out", 1, ()))  # fmt: skip
SHAPE = GraphShape(2, 2, sites=SITES)


def test_edges_by_hand() -> None:
    graph = component_graph(SHAPE)
    expected = [f"input->a0.h{h}<{kind}>" for kind in "qkv" for h in range(2)]
    parts = ["a0.f4", "a0.f7", "a0.err"]
    nodes = ["m0.f2", "m0.f3", "m0.err"]
    expected += [f"{u}->{v}" for v in nodes for u in ["input", *parts]]
    expected += [f"{u}->r1" for u in ["input", *parts, *nodes]]
    cut = ["r1.f1", "r1.err"]
    expected += [f"{u}->a1.h{h}<{kind}>" for kind in "qkv" for h in range(2) for u in cut]
    heads = ["a1.h0", "a1.h1"]
    expected += [f"{u}->m1" for u in cut + heads]
    expected += [f"{u}->logits" for u in [*cut, *heads, "m1.err"]]
    assert graph.edge_names() == expected
    feeds = {r: [graph.nodes[i] for i in graph.fed_by(v)] for v, r in enumerate(graph.receivers)}
    assert feeds["a0.h1<v>"] == parts
    assert feeds["m0.f3"] == ["m0.f3"]
    assert feeds["r1"] == cut
    assert feeds["m1"] == ["m1.err"]
    assert feeds["logits"] == ["logits"]


def test_order_of_acdc() -> None:
    graph = component_graph(SHAPE)
    receivers = [graph.receivers[v] for v in receiver_order(graph)]
    assert receivers == list(graph.receivers[::-1])
    cut = graph.receiver_index["r1"]
    senders = [graph.edge_name(int(e)).split("->")[0] for e in edge_order(graph, cut)]
    assert senders == ["m0.f2", "m0.f3", "m0.err", "a0.f4", "a0.f7", "a0.err", "input"]


def test_pruning_follows_what_feeds_what() -> None:
    graph = component_graph(SHAPE)
    path = ["input->a0.h1<v>", "a0.f7->m0.f2", "m0.f2->r1", "r1.f1->logits"]
    loose = ["input->m0.f3", "a0.f4->m0.err", "r1.err->m1"]
    mask = graph.edge_mask([*path, *loose])
    assert graph.edge_names(np.flatnonzero(prune(graph, mask))) == path


def test_component_graphs_are_as_they_were() -> None:
    assert component_graph(GraphShape(12, 12)).n_edges == 32_491
    assert "sites" not in shape_to_config(GraphShape(2, 2))


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("m3.f12", ("latent", 3, 12)), ("a0.err", ("error", 0, -1)), ("r4", ("cut", 4, -1)),
        ("r4mid.f1", ("latent", 4, 1)), ("m3", ("mlp", 3, -1)), ("a1.h2", ("head", 1, 2)),
    ],
)  # fmt: skip
def test_names(name: str, parsed: tuple[str, int, int]) -> None:
    assert parse_node(name) == parsed


@pytest.mark.parametrize("name", ["m3mid.f1", "x3.f1", "m3.f", "a2.error", "r.f1"])
def test_names_of_nothing(name: str) -> None:
    assert parse_latent(name) is None
    with pytest.raises(GraphError, match="is no node name"):
        parse_node(name)


def test_sites_in_files() -> None:
    assert sites_from_text(sites_to_text(SITES)) == SITES
    assert shape_from_config(shape_to_config(SHAPE)) == SHAPE


@pytest.mark.parametrize("suffix", ["json", "graphml", "dot"])
def test_files_give_the_circuit_back(tmp_path: Path, suffix: str) -> None:
    graph = component_graph(SHAPE)
    scores = np.random.default_rng(0).normal(size=graph.n_edges)
    mask = select_top(graph, scores, 20)
    circuit = Circuit(graph, np.where(mask, scores, 0.0), mask, {"task": "toy"})
    path = tmp_path / f"circuit.{suffix}"
    save_circuit(circuit, path)
    again = load_circuit(path)
    assert again.graph.shape == SHAPE
    assert again.edges() == circuit.edges()
    np.testing.assert_array_equal(again.scores, circuit.scores)
    assert compare(circuit, again).edges.f1 == 1.0


def test_networkx_joins_components_to_their_latents() -> None:
    graph = component_graph(SHAPE)
    every = np.ones(graph.n_edges, dtype=bool)
    view = to_networkx(Circuit(graph, every.astype(float), every))
    assert view.nodes["m0.f3"] == {"kind": "latent", "layer": 0, "head": -1, "latent": 3}
    assert view.edges["a0.h1", "a0.f7", "a0.h1->a0.f7"] == {"feeds": True}
    assert view.edges["r1", "r1.err", "r1->r1.err"] == {"feeds": True}
    assert from_networkx(view).n_edges == graph.n_edges


def test_picture_shows_latents_and_marks_errors() -> None:
    graph = component_graph(SHAPE)
    every = np.ones(graph.n_edges, dtype=bool)
    dot = to_dot(Circuit(graph, every.astype(float), every))
    for name in graph.nodes:
        assert f'"{name}" [label=' in dot
    errors = [line for line in dot.splitlines() if '.err" [label' in line]
    assert len(errors) == 4
    assert all("dashed" in line for line in errors)
    assert '"m1" -> "m1.err" [style=dotted' in dot


def test_different_latents_are_different_graphs() -> None:
    a = component_graph(SHAPE)
    b = component_graph(GraphShape(2, 2, sites=(Site("attn_z", 0, (4, 8)), *SITES[1:])))
    circuits = [Circuit.from_edges(g, ["input->r1"]) for g in (a, b)]
    with pytest.raises(GraphError, match="the latents of a0 differ"):
        compare(*circuits)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ((Site("mlp_out", 2, ()),), "site mlp_out of layer 2: the graph has 2 layers"),
        ((Site("resid_pre", 3, ()),), "expected 0 to 2"),
        ((Site("mlp_out", 0, ()), Site("transcoder", 0, (1,))), "two sites at m0"),
    ],
)
def test_sites_that_the_graph_lacks(sites: tuple[Site, ...], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        GraphShape(2, 2, sites=sites)


def test_sites_that_are_none() -> None:
    with pytest.raises(GraphError, match="site kind 'mlp': expected one of"):
        Site("mlp", 0, ())
    with pytest.raises(GraphError, match="different numbers from 0, ascending"):
        Site("mlp_out", 0, (3, 1))
    with pytest.raises(GraphError, match="the model has no MLPs"):
        GraphShape(2, 2, has_mlp=False, sites=(Site("mlp_out", 0, ()),))
    with pytest.raises(GraphError, match="nothing lies between"):
        GraphShape(2, 2, parallel=True, sites=(Site("resid_mid", 0, ()),))
    with pytest.raises(GraphError, match="expected kind:layer:latents"):
        sites_from_text("mlp_out")
    for value in ({}, [3], [{"kind": "mlp_out", "layer": "0", "latents": []}]):
        with pytest.raises(GraphError, match="circuit cfg has"):
            shape_from_config({"n_layers": 1, "n_heads": 1, "sites": value})
    many = tuple(Site("transcoder", layer, tuple(range(4000))) for layer in range(4))
    with pytest.raises(GraphError, match="keep fewer latents"):
        component_graph(GraphShape(4, 4, sites=many))


def test_a_graph_of_20_000_latents_is_built_in_seconds() -> None:
    sites = tuple(Site("mlp_out", layer, tuple(range(1700))) for layer in range(12))
    started = time.perf_counter()
    graph = component_graph(GraphShape(12, 12, sites=sites))
    assert graph.n_edges > 4_000_000
    assert prune(graph, np.ones(graph.n_edges, dtype=bool)).all()
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    "site",
    [
        7,
        {"layer": 0, "latents": ["a"]},
        {"kind": ["mlp_out"], "layer": 0, "latents": [1]},
        {"kind": "mlp_out", "layer": "0", "latents": [1]},
        {"kind": "mlp_out", "layer": 0, "latents": [1.5]},
    ],
)
def test_a_site_in_a_file_that_is_none(site: object) -> None:
    config = shape_to_config(GraphShape(n_layers=1, n_heads=1)) | {"sites": [site]}
    with pytest.raises(GraphError, match="circuit cfg"):
        shape_from_config(config)
