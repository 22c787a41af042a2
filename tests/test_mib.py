"""``.pt`` files: EAP-IG's layout, round trips, and what a damaged file says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import small_model, small_task
from test_parity import DATA

from acdc.cli import main
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import metric_of_circuit
from acdc.measure.evaluation import Evaluator
from acdc.methods.eap import eap
from acdc.runs.building import with_means
from acdc.runs.pt import group_heads, read_pt, write_pt
from graphs import Circuit, CircuitFileError, GraphError, GraphShape, component_graph, load_circuit

SHAPES = {
    "plain": GraphShape(2, 2),
    "parallel": GraphShape(2, 3, parallel=True),
    "grouped": GraphShape(2, 4, n_kv_heads=2),
    "one key": GraphShape(1, 4, n_kv_heads=1),
    "attention-only": GraphShape(3, 2, has_mlp=False),
}


def some_circuit(shape: GraphShape, seed: int = 0) -> Circuit:
    graph, rng = component_graph(shape), np.random.default_rng(seed)
    scores = rng.normal(size=graph.n_edges).astype(np.float32).astype(np.float64)
    info = {"d_model": 16, "method": "eap", "faithfulness": None, "list": [1, "a"]}
    return Circuit(graph, scores, rng.random(graph.n_edges) < 0.4, info)


def forward_index(name: str, n_layers: int, n_heads: int) -> int:
    """EAP-IG's index of a source node, from its documentation."""
    if name == "input":
        return 0
    if name.startswith("m"):
        return 1 + int(name[1:]) * (n_heads + 1) + n_heads
    layer, head = re.fullmatch(r"a(\d+)\.h(\d+)", name).groups()
    return 1 + int(layer) * (n_heads + 1) + int(head)


def backward_index(name: str, n_layers: int, n_heads: int) -> int:
    """EAP-IG's index of a destination: q, k and v blocks, then the MLP, layer by layer."""
    if name == "logits":
        return n_layers * (3 * n_heads + 1)
    if name.startswith("m"):
        return int(name[1:]) * (3 * n_heads + 1) + 3 * n_heads
    layer, head, kind = re.fullmatch(r"a(\d+)\.h(\d+)<([qkv])>", name).groups()
    return int(layer) * (3 * n_heads + 1) + "qkv".index(kind) * n_heads + int(head)


@pytest.mark.parametrize("name", SHAPES)
def test_round_trip(tmp_path: Path, name: str) -> None:
    circuit = some_circuit(SHAPES[name])
    write_pt(circuit, tmp_path / "c.pt")
    again = read_pt(tmp_path / "c.pt")
    assert again.graph.shape == circuit.graph.shape
    np.testing.assert_allclose(again.scores, circuit.scores, rtol=1e-6)
    np.testing.assert_array_equal(again.in_circuit, circuit.in_circuit)
    assert again.info == circuit.info
    write_pt(again, tmp_path / "d.pt")
    assert (tmp_path / "c.pt").read_bytes() == (tmp_path / "d.pt").read_bytes()


@pytest.mark.parametrize("name", ["plain", "parallel"])
def test_layout_is_eap_igs(tmp_path: Path, name: str) -> None:
    circuit = some_circuit(SHAPES[name])
    write_pt(circuit, tmp_path / "c.pt")
    data = torch.load(tmp_path / "c.pt", weights_only=True)
    n_layers, n_heads = circuit.graph.shape.n_layers, circuit.graph.shape.n_heads
    n_forward, n_backward = 1 + n_layers * (n_heads + 1), n_layers * (3 * n_heads + 1) + 1
    assert data["cfg"]["n_layers"] == n_layers
    assert data["cfg"]["parallel_attn_mlp"] == circuit.graph.shape.parallel
    assert data["cfg"]["d_model"] == 16
    assert len(data["src_nodes"]) == n_forward
    assert len(data["dst_nodes"]) == n_backward
    for f, node in enumerate(data["src_nodes"]):
        assert forward_index(node, n_layers, n_heads) == f
    for b, node in enumerate(data["dst_nodes"]):
        assert backward_index(node, n_layers, n_heads) == b
    assert data["edges_scores"].shape == data["edges_in_graph"].shape == (n_forward, n_backward)
    assert (data["edges_scores"].dtype, data["edges_in_graph"].dtype) == (torch.float32, torch.bool)
    assert (data["nodes_in_graph"].shape, data["nodes_in_graph"].dtype) == (
        (n_forward,),
        torch.bool,
    )
    for edge, full_name in enumerate(circuit.graph.edge_names()):
        sender, receiver = full_name.split("->")
        at = forward_index(sender, n_layers, n_heads), backward_index(receiver, n_layers, n_heads)
        assert float(data["edges_scores"][at]) == circuit.scores[edge]
        assert bool(data["edges_in_graph"][at]) == circuit.in_circuit[edge]
    assert int(data["edges_in_graph"].sum()) == circuit.n_edges  # nothing where no edge is
    assert int((data["edges_scores"] != 0).sum()) == circuit.graph.n_edges
    alive = [
        node for node, kept in zip(data["src_nodes"], data["nodes_in_graph"], strict=True) if kept
    ]
    assert alive == [node for node in circuit.nodes() if node != "logits"]


def test_a_shared_head_is_written_for_each_of_its_heads(tmp_path: Path) -> None:
    graph = component_graph(GraphShape(1, 4, n_kv_heads=2))
    circuit = Circuit.from_edges(graph, ["input->a0.kv1<v>", "input->a0.h0<q>"])
    write_pt(circuit, tmp_path / "c.pt")
    data = torch.load(tmp_path / "c.pt", weights_only=True)
    row = dict(zip(data["dst_nodes"], data["edges_scores"][0].tolist(), strict=True))
    assert {name: score for name, score in row.items() if score} == {
        "a0.h0<q>": 1.0, "a0.h2<v>": 0.5, "a0.h3<v>": 0.5
    }  # fmt: skip


def eap_ig_file(path: Path, **changes: Any) -> Path:
    """A file as EAP-IG's to_pt writes it for two layers of two heads, no keys of ours in it."""
    n_forward, n_backward = 7, 15
    rng = np.random.default_rng(4)
    data = {
        "cfg": {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8},
        "src_nodes": ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"],
        "dst_nodes": [
            *[f"a0.h{h}<{x}>" for x in "qkv" for h in range(2)], "m0",
            *[f"a1.h{h}<{x}>" for x in "qkv" for h in range(2)], "m1", "logits",
        ],
        "edges_scores": torch.tensor(rng.normal(size=(n_forward, n_backward))).float(),
        "edges_in_graph": torch.ones(n_forward, n_backward, dtype=torch.bool),
        "nodes_in_graph": torch.ones(n_forward, dtype=torch.bool),
    }  # fmt: skip
    data |= changes
    torch.save({key: value for key, value in data.items() if value is not None}, path)
    return path


def test_a_file_of_eap_ig_is_read(tmp_path: Path) -> None:
    path = eap_ig_file(tmp_path / "c.pt", nodes_scores=torch.zeros(7))
    circuit, data = read_pt(path), torch.load(path, weights_only=True)
    assert circuit.graph.shape == GraphShape(2, 2)
    assert circuit.in_circuit.all()  # entries where no edge is (m1 into a0.h0) are not edges
    assert circuit.info == {"d_model": 8}
    at = circuit.graph.edge_index("a0.h1->a1.h0<k>")
    assert circuit.scores[at] == float(data["edges_scores"][2, 9])
    order = [3, 0, 2, 1, 6, 5, 4]  # read by name, whatever the order
    moved = {
        "src_nodes": [data["src_nodes"][i] for i in order],
        "edges_scores": data["edges_scores"][order],
    }
    np.testing.assert_array_equal(
        read_pt(eap_ig_file(tmp_path / "d.pt", **moved)).scores, circuit.scores
    )


# --- shared key-value heads ---------------------------------------------------------------


def test_scores_of_an_ungrouped_file_add_up() -> None:
    shape = GraphShape(1, 4, n_kv_heads=2, has_mlp=False)
    wide = component_graph(GraphShape(1, 4, has_mlp=False))
    scores = np.zeros(wide.n_edges)
    for head, value in ((2, 1.5), (3, -0.25), (0, 4.0)):
        scores[wide.edge_index(f"input->a0.h{head}<k>")] = value
    circuit = Circuit(wide, scores, wide.edge_mask(["input->a0.h3<k>", "a0.h1->logits"]))
    grouped = group_heads(circuit, shape)
    assert grouped.edges() == ["input->a0.kv1<k>", "a0.h1->logits"]
    assert grouped.scores[grouped.graph.edge_index("input->a0.kv1<k>")] == 1.25
    assert grouped.scores[grouped.graph.edge_index("input->a0.kv0<k>")] == 4.0
    with pytest.raises(GraphError, match=r"is not .* without shared key-value heads"):
        group_heads(circuit, GraphShape(2, 4, n_kv_heads=2, has_mlp=False))


def test_a_grouped_model_evaluates_a_file_of_eap_ig(tmp_path: Path) -> None:
    model = small_model("grouped rotary", 0, n_layers=1, n_heads=4)
    experiment = Experiment(model, small_task(0), get_metric("logit_diff"))
    shape = experiment.graph.shape
    assert shape.grouped
    circuit = Circuit(experiment.graph, eap(experiment), experiment.graph.edge_sender > 0)
    write_pt(circuit, tmp_path / "c.pt")
    data = torch.load(tmp_path / "c.pt", weights_only=True)
    for key in ("n_key_value_heads", "attn_only", "split_qkv", "split_embed"):
        del data["cfg"][key]  # as EAP-IG would have written it
    torch.save(data, tmp_path / "theirs.pt")
    theirs = read_pt(tmp_path / "theirs.pt")
    assert not theirs.graph.shape.grouped
    grouped = group_heads(theirs, shape)
    np.testing.assert_allclose(grouped.scores, circuit.scores, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(grouped.in_circuit, circuit.in_circuit)
    assert metric_of_circuit(experiment, grouped.in_circuit) == metric_of_circuit(
        experiment, circuit.in_circuit
    )


# --- bad files ----------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def no_pickle(path: Path) -> None:
    path.write_bytes(b"not a zip")


def empty(path: Path) -> None:
    path.write_bytes(b"")


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("harmed",)


def harmful(path: Path) -> None:
    torch.save({"cfg": Harmful()}, path)


@pytest.mark.parametrize("damage", [cut, no_pickle, empty, harmful])
def test_damaged_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = eap_ig_file(tmp_path / "c.pt")
    damage(path)
    with pytest.raises(
        CircuitFileError, match=r"c\.pt cannot be read as plain tensors: .*truncated"
    ):
        read_pt(path)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges_scores": None}, "no 'edges_scores'; expected the keys cfg, src_nodes"),
        ({"cfg": [1]}, "'cfg' is a list, expected a dict"),
        ({"cfg": {"n_layers": 2}}, "cfg has n_heads=None: expected a whole number"),
        ({"src_nodes": ["input", "a9.h0"]}, "'src_nodes' has 'a9.h0', which the graph of its cfg"),
        ({"src_nodes": ["input"]}, "'src_nodes' has 1 names, expected the 7 of its cfg, once each"),
        ({"dst_nodes": 3}, "'dst_nodes' is no list of names"),
        (
            {"edges_scores": torch.zeros(7, 14)},
            "'edges_scores' is [7, 14], expected a tensor of [7",
        ),
        ({"edges_in_graph": "all"}, "'edges_in_graph' is str, expected a tensor of [7, 15]"),
        (
            {"edges_scores": torch.full((7, 15), torch.nan)},
            "the score of 'input->a0.h0<q>' is nan, expected a finite number",
        ),
        ({"nodes_in_graph": torch.ones(6)}, "'nodes_in_graph' is [6], expected a tensor of [7]"),
        ({"neurons_in_graph": [1]}, "'neurons_in_graph' is list, expected a tensor of [7, 8]"),
        ({"info": "mine"}, "'info' is a str, expected a dict"),
        (
            {"neurons_in_graph": torch.arange(56).reshape(7, 8) != 9},
            "it keeps only some neurons of 'a0.h0'",
        ),
        (
            {"cfg": {"n_layers": 2, "n_heads": 2, "attn_only": True}},
            "edge 'input->m0' is in, but the model of its cfg is attention-only",
        ),
    ],
)
def test_wrong_contents(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = eap_ig_file(tmp_path / "c.pt", **changes)
    with pytest.raises(CircuitFileError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)):
        read_pt(path)


def test_files_that_are_not_there_or_no_dict(tmp_path: Path) -> None:
    with pytest.raises(CircuitFileError, match=r"cannot read .*gone\.pt: No such file"):
        read_pt(tmp_path / "gone.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CircuitFileError, match="holds a list, expected the dict of an EAP-IG"):
        read_pt(tmp_path / "list.pt")


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        (GraphShape(1, 2, split_qkv=False), "q, k and v joined"),
        (GraphShape(1, 2, split_embed=True), "the embeddings split"),
    ],
)
def test_what_the_layout_cannot_say_is_not_written(
    tmp_path: Path, shape: GraphShape, what: str
) -> None:
    with pytest.raises(CircuitFileError, match=f"EAP-IG's layout has no graph with {what}"):
        write_pt(some_circuit(shape), tmp_path / "c.pt")
    circuit = some_circuit(SHAPES["plain"])
    circuit.scores[3] = np.inf
    with pytest.raises(CircuitFileError, match="is inf, expected a finite number"):
        write_pt(circuit, tmp_path / "c.pt")
    assert list(tmp_path.iterdir()) == []


# --- the command line ---------------------------------------------------------------------


def status_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def test_commands_write_and_take_pt_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"clean": [1, 2, 3], "corrupt": [4, 2, 3], "answers": [1], "wrong_answers": [2]}]
    Path("task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ("--model", DATA / "ln2", "--batch-size", 4)
    assert status_of("discover", "task.jsonl", *model, "--method", "eap", "--edges", 20,
                     "--out", "run") == 0  # fmt: skip
    assert status_of("export", "run", "--format", "pt") == 0
    assert status_of("export", "run", "--out", "other.pt", "--negate") == 0
    assert status_of("export", "run", "--out", "other.json", "--negate") == 0
    wanted, other = load_circuit("run/circuit.json"), load_circuit("other.json")
    np.testing.assert_array_equal(other.scores, -wanted.scores)
    assert (wanted.info["helps"], other.info["helps"]) in ((1, -1), (-1, 1))
    other = read_pt("other.pt")
    np.testing.assert_allclose(other.scores, -wanted.scores, rtol=1e-6)
    np.testing.assert_array_equal(other.in_circuit, wanted.in_circuit)
    assert status_of("export", "other.pt", "--format", "json", "--out", "back.json") == 0
    capsys.readouterr()
    assert status_of("compare", "run", "run/circuit.pt") == 0
    assert re.search(r"edges .*1\.000", capsys.readouterr().out)
    assert status_of("evaluate", "run/circuit.pt", "--task", "task.jsonl", *model) == 0
    from_pt = capsys.readouterr().out
    assert status_of("evaluate", "run") == 0
    line = re.compile(r"faithfulness\W+([\d.]+)")
    assert line.search(from_pt)[1] == line.search(capsys.readouterr().out)[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--format", "svg", "--negate", "--out", "x.svg"), "--negate with format svg"),
        (("--format", "pt", "--negate"), "--negate: say with --out where"),
        (("--format", "pt", "--out", "c.pt"), "'c.pt' exists"),
    ],
)
def test_export_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    eap_ig_file(tmp_path / "c.pt")
    assert status_of("export", "c.pt", *arguments) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


# --- where numbers differ from EAP-IG's ---------------------------------------------------


@pytest.mark.parametrize("intervention", ["resample", "zero", "mean", "mean-positional"])
def test_positions_are_ablated_here_and_never_by_eap_ig(intervention: Any) -> None:
    """Their ``input`` is ``tok`` of the split graph with every edge out of ``pos`` in."""
    joined, split = (
        Experiment(
            small_model("LN", 3, split_embed=embed),
            small_task(3, n_prompts=4),
            get_metric("logit_diff"),
            intervention=intervention,
        )
        for embed in (False, True)
    )
    joined, split = map(with_means, (joined, split))
    inside = np.random.default_rng(3).random(joined.graph.n_edges) < 0.5
    kept = dict(zip(joined.graph.edge_names(), inside.tolist(), strict=True))
    ours, theirs = (
        np.array([kept.get(name.replace("tok->", "input->").replace(pos, "input->"), True)
                  for name in split.graph.edge_names()])
        for pos in ("pos->", "never->")
    )  # fmt: skip
    assert (~theirs).sum() < (~ours).sum()
    values = Evaluator(joined).values(inside)
    assert Evaluator(split).values(ours) == pytest.approx(values, abs=1e-5)
    same = Evaluator(split).values(theirs) == pytest.approx(values, abs=1e-5)
    assert same == (intervention in ("resample", "mean-positional"))
