"""Circuits as circuit-tracer's and Neuronpedia's graph JSON, and such files as circuits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from graphs import (
    Circuit,
    CircuitFileError,
    GraphShape,
    component_graph,
    load_circuit,
    write_attribution_graph,
)
from graphs.sites import Site

SCHEMA = json.loads((Path(__file__).parent / "data/attribution-graph.schema.json").read_text())
SHAPES = {
    "grouped heads": GraphShape(2, 4, 2),
    "split embeddings": GraphShape(2, 2, split_embed=True),
    "nothing": GraphShape(0, 1),
    "spans": GraphShape(2, 4, 2, spans=("BOS", "IO", "END"), scored_spans=("IO", "END")),
    "one span": GraphShape(1, 1, spans=("ALL",), scored_spans=("ALL",)),
    "dictionaries": GraphShape(
        3, 4, 2,
        sites=(
            Site("mlp_out", 0, (1, 5)), Site("transcoder", 1, (2, 7)), Site("attn_z", 2, (0, 3)),
            Site("resid_pre", 2, (1,)), Site("resid_mid", 2, (4,)),
        ),
    ),
    "cross-layer": GraphShape(
        2, 2, sites=(Site("cross_layer", 0, (1,)), Site("cross_layer", 1, (1, 5)))
    ),
    "neurons and experts": GraphShape(
        2, 2, sites=(Site("neurons", 0, (1,)), Site("routed", 1, (1, 2)))
    ),
}  # fmt: skip


def whole(shape: GraphShape, **info: Any) -> Circuit:
    graph = component_graph(shape)
    scores = np.random.default_rng(0).normal(size=graph.n_edges)
    return Circuit(graph, scores, np.ones(graph.n_edges, dtype=bool), info)


def written(circuit: Circuit, place: Path) -> dict[str, Any]:
    write_attribution_graph(circuit, place / "mine.json")
    return json.loads((place / "mine.json").read_text())


@pytest.mark.parametrize("name", SHAPES)
def test_files_are_as_viewers_read_them_and_give_the_circuit_back(
    tmp_path: Path, name: str
) -> None:
    circuit = whole(SHAPES[name], model="some/model", task="ioi", helps=-1)
    data = written(circuit, tmp_path)
    jsonschema.validate(data, SCHEMA)
    ids = [node["node_id"] for node in data["nodes"]]
    assert len({*ids}) == len(ids)
    # the viewer takes nodes that agree in these for one
    assert len({(n["layer"], n["feature"], n["ctx_idx"]) for n in data["nodes"]}) == len(ids)
    assert {link[end] for link in data["links"] for end in ("source", "target")} <= {*ids}
    assert all(node["ctx_idx"] < len(data["metadata"]["prompt_tokens"]) for node in data["nodes"])
    again = load_circuit(tmp_path / "mine.json")
    assert again.graph.shape == circuit.graph.shape
    assert (again.scores == circuit.scores).all()
    assert again.in_circuit.all()
    assert again.info == circuit.info


def weights(data: dict[str, Any]) -> dict[tuple[str, str], float]:
    label = {n["node_id"]: n["clerp"].removeprefix('Output "').split('"')[0] for n in data["nodes"]}
    return {(label[x["source"]], label[x["target"]]): x["weight"] for x in data["links"]}


def test_weights_are_sums_over_ports_and_positive_where_they_help(tmp_path: Path) -> None:
    graph = component_graph(GraphShape(1, 2))
    edges = {"input->a0.h1<q>": -1.0, "input->a0.h1<v>": -3.0, "a0.h1->logits": 2.0,
             "input->m0": -5.0}  # fmt: skip
    scores = np.zeros(graph.n_edges)
    for name, score in edges.items():
        scores[graph.edge_index(name)] = score
    circuit = Circuit(graph, scores, graph.edge_mask(edges), {"helps": -1})
    # m0 leads nowhere and is left out; read back it is there
    found = weights(written(circuit, tmp_path))
    assert found == {("input", "a0.h1"): 4.0, ("a0.h1", "logits"): -2.0}
    assert load_circuit(tmp_path / "mine.json").n_edges == 4


def test_shared_keys_are_divided_among_the_heads_of_the_circuit(tmp_path: Path) -> None:
    graph = component_graph(GraphShape(1, 4, 1))
    names = ["input->a0.kv0<k>", "a0.h1->logits", "a0.h3->logits"]
    found = weights(written(Circuit.from_edges(graph, names), tmp_path))
    assert found["input", "a0.h1"] == found["input", "a0.h3"] == 0.5
    assert ("input", "a0.h0") not in found


def test_nothing_is_written_of_scores_that_are_no_numbers(tmp_path: Path) -> None:
    circuit = whole(GraphShape(1, 1))
    circuit.scores[3] = np.inf
    with pytest.raises(CircuitFileError, match=r"score of .* is inf"):
        write_attribution_graph(circuit, tmp_path / "mine.json")
    assert not (tmp_path / "mine.json").exists()


# --- files of others ----------------------------------------------------------------------


def node(identity: str, layer: str, kind: str, **more: Any) -> dict[str, Any]:
    own = {"node_id": identity, "feature": 1, "layer": layer, "ctx_idx": 0, "jsNodeId": identity}
    return {**own, "feature_type": kind, "clerp": "", **more}


def theirs() -> dict[str, Any]:
    """A file as circuit-tracer writes it: two positions, two logits, both forms of an error."""
    feature, error = "cross layer transcoder", "mlp reconstruction error"
    nodes = [
        node("E_11_0", "E", "embedding"), node("E_12_1", "E", "embedding"),
        node("0_7_0", "0", feature), node("0_7_1", "0", feature), node("2_40_1", "2", feature),
        node("0_1_1", "1", error), node("1_-1_0", "1", error),
        node("4_5_1", "4", "logit", token_prob=0.6, clerp='Output "4" (p=0.600)'),
        node("4_6_1", "4", "logit", token_prob=0.2, clerp='Output "6" (p=0.200)'),
    ]  # fmt: skip
    links = {
        ("E_11_0", "0_7_0"): 1.0, ("E_12_1", "0_7_1"): 2.0, ("0_7_0", "2_40_1"): -3.0,
        ("0_1_1", "2_40_1"): 0.5, ("1_-1_0", "2_40_1"): 0.25,
        ("2_40_1", "4_5_1"): 8.0, ("2_40_1", "4_6_1"): 4.0,
    }  # fmt: skip
    return {
        "metadata": {"slug": "a", "scan": "gemma-2-2b", "transcoder_list": [],
                     "prompt_tokens": ["<bos>", "1"], "prompt": "<bos>1"},
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "",
                    "sg_pos": ""},
        "nodes": nodes,
        "links": [{"source": u, "target": v, "weight": w} for (u, v), w in links.items()],
    }  # fmt: skip


def test_graphs_of_circuit_tracer_are_circuits(tmp_path: Path) -> None:
    jsonschema.validate(theirs(), SCHEMA)
    (tmp_path / "a.json").write_text(json.dumps(theirs()))
    circuit = load_circuit(tmp_path / "a.json")
    assert dict(zip(circuit.edges(), circuit.scores[circuit.in_circuit], strict=True)) == {
        "input->m0.f7": 3.0,
        "m0.f7->m2.f40": -3.0,
        "m1.err->m2.f40": 0.75,
        "m2.f40->logits": pytest.approx(0.75 * 8 + 0.25 * 4),
    }
    assert circuit.graph.shape.n_layers == 3
    assert circuit.info["model"] == "gemma-2-2b"
    jsonschema.validate(written(circuit, tmp_path), SCHEMA)


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *way, last = path.split(".")

    def apply(data: Any) -> None:
        for step in way:
            data = data[int(step) if isinstance(data, list) else step]
        data[int(last) if isinstance(data, list) else last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("nodes", {}, "'nodes' is no list of objects"),
        ("nodes.2", 7, "'nodes' is no list of objects"),
        ("nodes.2.feature_type", "lorsa", "expected a transcoder's feature"),
        ("nodes.2.layer", "9" * 5000, "expected a transcoder's feature"),
        ("nodes.2.layer", "99999999", "expected 1 to 10,000"),
        ("nodes.2.node_id", ["0_7_0"], "expected a transcoder's feature"),
        ("nodes.7.token_prob", 10**400, "token_prob 1000"),
        ("links", None, "'links' is no list of objects"),
        ("links.0.source", ["E"], "expected two of its nodes"),
        ("links.0.target", "nowhere", "expected two of its nodes"),
        ("links.0.weight", "1", "expected two of its nodes and a weight"),
        ("links.0.weight", 10**400, "expected two of its nodes and a weight"),
        ("links.2.target", "0_7_1", "before 'm0.f7' writes"),
        ("circuit", [], "has no object 'cfg'"),
        ("circuit", {"cfg": {}, "edges": {}, "info": {}}, "n_layers"),
    ],
)
def test_graphs_that_are_none(tmp_path: Path, path: str, value: Any, words: str) -> None:
    data = theirs()
    change(path, value)(data)
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(CircuitFileError, match=words):
        load_circuit(tmp_path / "a.json")
