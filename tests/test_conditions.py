"""One task under several corruptions and interventions, edge by edge and in one diagram."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import acdc
from acdc.cli import main
from acdc.errors import OptionError, UnknownNameError
from acdc.evidence.conditions import Conditions
from acdc.settings import Settings
from acdc.tasks import TASKS
from graphs import Circuit, GraphError, GraphShape, component_graph
from graphs.known.several import compare_several, to_dot_several

QUICK = {"n_prompts": 12, "n_test": 12, "n_edges": 40, "method": "eap"}
GRAPH = component_graph(GraphShape(n_layers=2, n_heads=2))
PATHS = {
    "a": ("input->a0.h0<v>", "a0.h0->logits"),
    "b": ("input->m0", "m0->logits"),
    "c": ("input->a1.h1<v>", "a1.h1->logits"),
}


def circuit(*paths: str) -> Circuit:
    return Circuit.from_edges(GRAPH, [edge for path in paths for edge in PATHS[path]])


# --- several circuits of one graph --------------------------------------------------------


def test_edges_are_counted_by_circuit() -> None:
    found = compare_several(circuit("a", "b"), circuit("a", "c"), circuit("a", "b"))
    assert set(found.edges.common) == set(PATHS["a"])
    assert found.nodes.common == ("a0.h0",)
    assert set(found.edges.only(1)) == set(PATHS["c"])
    assert found.edges.jaccard(0, 2) == 1
    assert found.edges.jaccard(0, 1) == pytest.approx(2 / 6)


def test_what_is_on_no_path_does_not_count() -> None:
    loose = Circuit.from_edges(GRAPH, [*PATHS["a"], "input->m1"])
    assert set(compare_several(loose, loose).edges.members) == set(PATHS["a"])


def test_the_diagram_has_three_kinds_of_lines() -> None:
    dot = to_dot_several([circuit("a", "b"), circuit("a", "b"), circuit("a", "c")], title="three")
    assert "in all 3: 2" in dot
    assert "in some: 2" in dot
    assert "in one alone: 2" in dot
    for style in ("dashed", "dotted"):
        assert style in dot
    assert "three" in dot


def test_one_circuit_or_two_graphs_are_refused() -> None:
    with pytest.raises(GraphError, match="1 circuits: expected at least 2"):
        compare_several(circuit("a"))
    larger = component_graph(GraphShape(n_layers=3, n_heads=2))
    every = np.ones(larger.n_edges, dtype=bool)
    with pytest.raises(GraphError, match="n_layers is 2 in one and 3"):
        compare_several(circuit("a"), Circuit(larger, every.astype(float), every))


# --- of a task ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corruptions() -> Conditions:
    return acdc.conditions("docstring", ("all",), **QUICK)


def test_every_corruption_has_a_run(corruptions: Conditions) -> None:
    assert corruptions.labels == tuple(TASKS["docstring"].corruptions)
    for label, run in zip(corruptions.labels, corruptions.runs, strict=True):
        assert run.details["task_info"]["corruption"] == label
        alone = acdc.discover("docstring", corruption=label, **QUICK)
        assert (alone.circuit.in_circuit == run.circuit.in_circuit).all()
    found = corruptions.found.edges
    assert 0 < len(found.common) < 40
    masks = [set(run.circuit.edges()) for run in corruptions.runs]
    assert set(found.common) <= set.intersection(*masks)


def test_the_folder_holds_runs_and_one_diagram(corruptions: Conditions, tmp_path: Path) -> None:
    corruptions.save(tmp_path / "new")
    found = json.loads((tmp_path / "new" / "conditions.json").read_text())
    assert [one["label"] for one in found["conditions"]] == list(corruptions.labels)
    assert sum(found["n_edges_by_count"].values()) == len(found["edges"])
    for i in range(4):
        assert found["jaccard"][i][i] == 1
    svg = (tmp_path / "new" / "conditions.svg").read_text()
    assert "in all 4" in svg
    rows = (tmp_path / "new" / "edges.csv").read_text().splitlines()
    assert rows[0] == "edge,n_conditions," + ",".join(corruptions.labels)
    assert len(rows) == len(found["edges"]) + 1
    again = acdc.load_run(tmp_path / "new" / "random_doc")
    assert again.settings.corruption == "random_doc"


def test_corruptions_by_interventions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--n-prompts",
        "8",
        "--n-test",
        "8",
        "--edges",
        "30",
        "--method",
        "eap",
        "--seed",
        "1",
    ]
    command = ["conditions", "pronoun", "--corruptions", "other_gender,other_noun"]
    command += ["--interventions", "resample,zero", *options, "--out", str(tmp_path / "new")]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "edges of all:" in said
    assert "edges that come and go" in said
    labels = [f"{c}-{i}" for c in ("other_gender", "other_noun") for i in ("resample", "zero")]
    assert sorted(p.name for p in (tmp_path / "new").iterdir() if p.is_dir()) == sorted(labels)


@pytest.mark.parametrize(
    ("corruptions", "interventions", "error", "words"),
    [
        (None, None, OptionError, "1 condition: give two"),
        (("abc",), None, OptionError, "1 condition"),
        (("abc", "abd"), None, UnknownNameError, "unknown corruption of task ioi 'abd'"),
        (("abc", "abc"), None, OptionError, "give each once"),
        (None, ("zero", "nothing"), UnknownNameError, "unknown intervention 'nothing'"),
    ],
)
def test_bad_conditions(
    corruptions: tuple[str, ...] | None,
    interventions: tuple[str, ...] | None,
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        acdc.conditions("ioi", corruptions, interventions, **QUICK)


def test_what_a_model_does_not_do_is_said_of_its_conditions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["conditions", "induction", "--corruptions", "random_first,other_before"]
    command += ["--method", "eap", "--edges", "30", "--n-prompts", "64", "--n-test", "32"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--out", str(tmp_path / "new")])
    assert not ended.value.code
    said = " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "new" / "conditions.json").read_text())
    for text in found["warnings"]:
        assert f"warning: {text}" in said
    (undone,) = (text for text in found["warnings"] if "the corrupt prompts are answered" in text)
    assert undone.startswith("other_before: ")


def test_options_of_an_intervention_go_to_it_alone(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("Then , Mary and John went to the store .\n" * 3)
    quick = {**QUICK, "n_prompts": 4, "n_test": 4, "mean_over": str(tmp_path / "texts.txt")}
    found = acdc.conditions("ioi", None, ("zero", "mean"), **quick)
    assert [run.settings.mean_over for run in found.runs] == [None, quick["mean_over"]]
    assert [run.settings.intervention for run in found.runs] == ["zero", "mean"]
    assert found.settings.intervention == "zero"
    with pytest.raises(OptionError, match=r"mean_over .* choose the intervention mean"):
        acdc.conditions("ioi", None, ("zero", "resample"), **quick)


def test_training_steps_go_to_what_is_trained() -> None:
    quick = {**QUICK, "n_prompts": 4, "n_test": 4, "optimal_steps": 7}
    found = acdc.conditions("ioi", None, ("optimal", "zero"), **quick)
    assert [run.settings.optimal_steps for run in found.runs] == [7, Settings.optimal_steps]
    with pytest.raises(OptionError, match="optimal_steps 7 does nothing without intervention"):
        acdc.conditions("ioi", None, ("zero", "resample"), **quick)


def test_a_file_has_no_corruptions_of_its_own(tmp_path: Path) -> None:
    row = {"clean": [1, 2], "corrupt": [1, 3], "answers": [4], "wrong_answers": [5]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    with pytest.raises(OptionError, match="brings its own corrupted prompts"):
        acdc.conditions(tmp_path / "rows.jsonl", ("all",), model="ioi-small")
