"""Circuit files: layout, exact round trips, and every error with its words."""

from __future__ import annotations

import json
import math
import os
import stat

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
    InputError,
    component_graph,
    from_networkx,
    load_circuit,
    read_circuit_json,
    read_dot,
    read_graphml,
    save_circuit,
    to_networkx,
    write_circuit_json,
    write_dot,
    write_graphml,
    write_whole,
)

infos = st.dictionaries(
    st.text(max_size=8),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12) | st.lists(st.integers(), max_size=3),
    max_size=4,
)  # fmt: skip


@st.composite
def circuits(draw):
    kv_heads = draw(st.integers(1, 2))
    graph = component_graph(
        GraphShape(
            n_layers=draw(st.integers(0, 3)),
            n_heads=kv_heads * draw(st.integers(1, 2)),
            n_kv_heads=kv_heads,
            has_mlp=draw(st.booleans()),
            parallel=draw(st.booleans()),
            split_qkv=draw(st.booleans()),
            split_embed=draw(st.booleans()),
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.normal(size=graph.n_edges) * 10.0 ** rng.integers(-300, 300, graph.n_edges)
    scores[: min(3, graph.n_edges)] = [0.0, -0.0, 5e-324][: min(3, graph.n_edges)]
    mask = rng.random(graph.n_edges) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return Circuit(graph, scores, mask, draw(infos))


def assert_same(got: Circuit, expected: Circuit, *, only_in: bool) -> None:
    """Shapes, masks and bits of scores are equal (those of edges outside too, or else 0)."""
    assert got.graph.shape == expected.graph.shape
    assert (got.in_circuit == expected.in_circuit).all()
    scores = np.where(expected.in_circuit, expected.scores, 0.0) if only_in else expected.scores
    assert got.scores.tobytes() == scores.tobytes()
    assert got.info == expected.info


@given(circuits())
@settings(max_examples=40, deadline=None)
def test_json_round_trip_is_exact(tmp_path_factory, circuit):
    path = tmp_path_factory.mktemp("json") / "circuit.json"
    write_circuit_json(circuit, path)
    assert_same(read_circuit_json(path), circuit, only_in=False)
    data = json.loads(path.read_text())
    assert list(data["edges"]) == circuit.graph.edge_names()
    assert list(data["nodes"]) == list(circuit.graph.nodes)


@given(circuits(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_graphml_and_networkx_round_trips_are_exact(tmp_path_factory, circuit, all_edges):
    path = tmp_path_factory.mktemp("graphml") / "circuit.graphml"
    write_graphml(circuit, path, all_edges=all_edges)
    assert_same(read_graphml(path), circuit, only_in=not all_edges)
    view = to_networkx(circuit, all_edges=all_edges)
    assert_same(from_networkx(view), circuit, only_in=not all_edges)


@given(circuits(), st.sampled_from([0, 3, 1000, None]))
@settings(max_examples=30, deadline=None)
def test_dot_round_trip_is_exact(tmp_path_factory, circuit, max_edges):
    path = tmp_path_factory.mktemp("dot") / "circuit.dot"
    write_dot(circuit, path, max_edges=max_edges)
    assert_same(read_dot(path), circuit, only_in=True)


def test_dot_holds_circuits_larger_than_its_strings_may_be(tmp_path):
    graph = component_graph(GraphShape(12, 12))
    scores = np.random.default_rng(0).normal(size=graph.n_edges)
    circuit = Circuit(graph, scores, np.ones(graph.n_edges, dtype=bool), {"task": "x" * 40_000})
    write_dot(circuit, tmp_path / "c.dot", title="all of it")
    assert_same(read_dot(tmp_path / "c.dot"), circuit, only_in=True)


GOLDEN = """\
{"cfg": {"n_layers": 1, "n_heads": 1, "n_key_value_heads": 1, "attn_only": false, \
"parallel_attn_mlp": false, "split_qkv": true, "split_embed": false, "d_model": 8},
"nodes": {
"input": {"in_graph": true},
"a0.h0": {"in_graph": false},
"m0": {"in_graph": true},
"logits": {"in_graph": true}
},
"edges": {
"input->a0.h0<q>": {"score": 0.0, "in_graph": false},
"input->a0.h0<k>": {"score": 0.0, "in_graph": false},
"input->a0.h0<v>": {"score": 0.0, "in_graph": false},
"input->m0": {"score": 0.1, "in_graph": true},
"a0.h0->m0": {"score": -2.5e-07, "in_graph": false},
"input->logits": {"score": 0.0, "in_graph": false},
"a0.h0->logits": {"score": 0.0, "in_graph": false},
"m0->logits": {"score": 0.30000000000000004, "in_graph": true}
},
"info": {"d_model": 8, "method": "acdc", "kl": null}}
"""


def tiny() -> Circuit:
    graph = component_graph(GraphShape(1, 1))
    scores = np.zeros(8)
    scores[[3, 4, 7]] = 0.1, -2.5e-07, 0.1 + 0.2
    mask = graph.edge_mask(["input->m0", "m0->logits"])
    return Circuit(graph, scores, mask, {"d_model": 8, "method": "acdc", "kl": math.nan})


def test_json_layout(tmp_path):
    write_circuit_json(tiny(), tmp_path / "circuit.json")
    assert (tmp_path / "circuit.json").read_text() == GOLDEN


def test_a_file_of_eap_ig_is_read(tmp_path):
    """Its cfg has four keys, nodes may have scores, and edges that are missing are out."""
    data = {
        "cfg": {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 8},
        "nodes": {"m0": {"in_graph": True, "score": 1.5}},
        "edges": {"input->m0": {"score": 2, "in_graph": True, "neurons": [1]}},
        "neurons": {},
    }
    (tmp_path / "c.json").write_text(json.dumps(data))
    circuit = read_circuit_json(tmp_path / "c.json")
    assert circuit.edges() == ["input->m0"]
    assert circuit.scores.tolist() == [0, 0, 0, 2, 0, 0, 0, 0]
    assert circuit.info == {"d_model": 8}


def changed(tmp_path, *keys, value=None, delete=False):
    data = json.loads(GOLDEN)
    place = data
    for key in keys[:-1]:
        place = place[key]
    if delete:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("edges", "input->m7"), {"score": 1, "in_graph": True}, "edge 'input->m7': no receiver"),
        (("edges", "m0->m0"), {"score": 1, "in_graph": True}, "edge 'm0->m0' does not exist"),
        (("edges", "m0"), {"score": 1, "in_graph": True}, "'m0' is no edge name"),
        (("edges", "input->m0", "score"), None, "edge 'input->m0' has score None, expected a fin"),
        (("edges", "input->m0", "score"), math.nan, "edge 'input->m0' has score nan"),
        (("edges", "input->m0", "score"), -math.inf, "edge 'input->m0' has score -inf"),
        (("edges", "input->m0", "score"), "0.1", "edge 'input->m0' has score '0.1'"),
        (("edges", "input->m0", "score"), True, "edge 'input->m0' has score True"),
        (("edges", "input->m0", "score"), 10**400, "edge 'input->m0' has score 1000"),
        (("edges", "input->m0", "in_graph"), 1, "edge 'input->m0' has in_graph 1, expected true"),
        (("edges", "input->m0"), 0.1, "edge 'input->m0' is 0.1, expected {\"score\": number"),
        (("edges", "input->m0"), {"score": 1}, "edge 'input->m0' is {\"score\": 1}, expected"),
        (("nodes", "m7"), {"in_graph": True}, "node 'm7' is not in the graph of this cfg; did you"),
        (("nodes", "m0"), {"in_graph": 1}, "node 'm0' is {\"in_graph\": 1}, expected"),
        (("nodes",), [], "'nodes' is a list; expected the objects 'cfg', 'nodes' and 'edges'"),
        (("cfg",), None, "'cfg' is null; expected"),
        (("cfg", "n_layers"), "1", "circuit cfg has n_layers='1': expected a whole number"),
        (("cfg", "n_heads"), 0, "a graph of 1 layers and 0 heads"),
        (("info",), "x", "'info' is a text, expected an object"),
    ],
)
def test_json_errors(tmp_path, keys, value, message):
    path = changed(tmp_path, *keys, value=value)
    with pytest.raises(CircuitFileError) as error:
        read_circuit_json(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["cfg", "nodes", "edges"])
def test_json_with_a_missing_key(tmp_path, key):
    with pytest.raises(CircuitFileError, match=f"no '{key}'; expected the objects"):
        read_circuit_json(changed(tmp_path, key, delete=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOLDEN[:200].encode(), "no JSON that can be read .*; is the file truncated?"),
        (b"", "no JSON that can be read"),
        (b"\xff\xfe\x00", "no JSON that can be read"),
        (b"[" * 200_000, "no JSON that can be read"),
        (b"[1]", "holds a list, expected the object of a circuit file"),
        (b"null", "holds null, expected"),
        (b"3", "holds a number, expected"),
    ],
)
def test_files_that_are_no_circuit_json(tmp_path, content, message):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(CircuitFileError, match=message):
        read_circuit_json(tmp_path / "bad.json")


@pytest.mark.parametrize("name", ["c.json", "c.graphml", "c.dot"])
def test_a_file_that_is_not_there(tmp_path, name):
    with pytest.raises(CircuitFileError, match=f"cannot read .*{name}: No such file"):
        load_circuit(tmp_path / name)


@pytest.mark.parametrize("name", ["c.json", "c.graphml", "c.DOT"])
def test_save_and_load_go_by_suffix(tmp_path, name):
    circuit = Circuit.from_edges(component_graph(GraphShape(2, 2)), ["input->m1", "m1->logits"])
    save_circuit(circuit, tmp_path / name)
    assert load_circuit(tmp_path / name).edges() == circuit.edges()


@pytest.mark.parametrize("name", ["c.txt", "c"])
def test_unknown_suffix(tmp_path, name):
    message = "no circuit format has the suffix .*; use .json, .graphml, .dot"
    with pytest.raises(CircuitFileError, match=message):
        load_circuit(tmp_path / name)
    with pytest.raises(CircuitFileError, match=message):
        save_circuit(tiny(), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["c.json", "c.graphml", "c.dot"])
def test_a_score_that_is_not_finite_is_not_written(tmp_path, name):
    circuit = tiny()
    circuit.scores[3] = math.nan
    with pytest.raises(CircuitFileError, match="not written: the score of 'input->m0' is nan"):
        save_circuit(circuit, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("<graphml", "<graphm"), "no GraphML that can be read"),
        (("</graphml>", ""), "no GraphML that can be read"),
        ((">m0<", ">m9<"), "edge 'input->m9': no receiver"),
        ((">0.1<", ">inf<"), "edge 'input->m0' has score inf, expected a finite number"),
        ((">0.1<", ">x<"), "no GraphML that can be read"),
        ((">1<", ">-1<"), "a graph of -1 layers"),
    ],
)
def test_graphml_errors(tmp_path, change, message):
    path = tmp_path / "bad.graphml"
    write_graphml(tiny(), path)
    text = path.read_text()
    for old, new in zip(change[::2], change[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    with pytest.raises(CircuitFileError, match=message):
        read_graphml(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("digraph circuit {", "digraph circuit"), "no DOT that can be read"),
        (('receiver="m0"', 'receiver="m9"'), "edge 'input->m9': no receiver 'm9'"),
        (('score="0.1"', 'score="x"'), "edge 'input->m0' has score 'x', expected a finite number"),
        (('score="0.1"', 'score="0.1 2"'), "line 'input' -> 'm0' has 1 receivers and 2 scores"),
        (('n_layers="1"', 'n_layers="one"'), "n_layers='one': expected a whole number"),
        (('info="{', 'info="['), "'info': no JSON that can be read"),
    ],
)
def test_dot_errors(tmp_path, change, message, capfd):
    path = tmp_path / "bad.dot"
    write_dot(tiny(), path)
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(CircuitFileError, match=message):
        read_dot(path)


def test_dot_of_someone_else(tmp_path):
    (tmp_path / "other.dot").write_text("digraph { a -> b }")
    with pytest.raises(CircuitFileError, match="n_layers=None: expected a whole number"):
        read_dot(tmp_path / "other.dot")


def test_networkx_view():
    graph = component_graph(GraphShape(2, 4, 2))
    names = ["input->a0.kv1<v>", "input->a0.h3<q>", "a0.h3->m1", "m1->logits"]
    view = to_networkx(Circuit.from_edges(graph, names, d_model=16))
    assert isinstance(view, nx.MultiDiGraph)
    assert set(view) == {"input", "a0.kv1", "a0.h3", "m1", "logits"}
    assert view.nodes["a0.h3"] == {"kind": "head", "layer": 0, "head": 3}
    assert view.nodes["a0.kv1"] == {"kind": "kv", "layer": 0, "head": 1}
    assert view.nodes["m1"] == {"kind": "mlp", "layer": 1, "head": -1}
    assert view["input"]["a0.kv1"]["input->a0.kv1<v>"] == {
        "receiver": "a0.kv1<v>", "score": 1.0, "in_graph": True,
    }  # fmt: skip
    assert view["a0.kv1"]["a0.h3"]["a0.kv1->a0.h3"] == {"feeds": True}
    assert (view.graph["n_heads"], view.graph["n_key_value_heads"]) == (4, 2)
    assert (view.graph["d_model"], view.graph["info"]) == (16, {"d_model": 16})
    assert nx.has_path(view, "input", "logits")


def test_networkx_errors():
    view = to_networkx(tiny())
    view.add_edge("m0", "input", receiver="input", score=1.0, in_graph=True)
    with pytest.raises(GraphError, match="edge 'm0->input': no receiver 'input'"):
        from_networkx(view)
    with pytest.raises(GraphError, match="n_layers=None: expected a whole number"):
        from_networkx(nx.MultiDiGraph())


def test_write_whole_replaces_or_leaves(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_whole(path, "first")
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match=r"cannot write .*file.txt: No space left on device"):
        write_whole(path, "third")
    assert path.read_bytes() == b"second"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_write_whole_into_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*: No such file or directory"):
        write_whole(tmp_path / "no" / "file.txt", "x")
