"""A task over the checkpoints of a model: births of edges, overlap, behaviour of heads."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import pytest
from by_hand import circuit_edges, save_induction

import acdc
from acdc.cli import main
from acdc.errors import ModelError, OptionError
from acdc.evidence.development import Development, checkpoint_names
from acdc.measure.roles import measure_repeats
from acdc.models import load_model

QUICK = {"n_prompts": 12, "n_test": 12, "n_random": 20}
STEPS = {0: (0.0, 0.0), 100: (1.0, 0.0), 300: (1.0, 0.3), 1000: (1.0, 1.0)}


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of checkpoints: first there is a previous-token head, then induction."""
    folder = tmp_path_factory.mktemp("training")
    for step, strength in STEPS.items():
        save_induction(folder / "checkpoints" / f"{step:06}", strength=strength)
    return folder


@pytest.fixture(scope="module")
def found(training: Path) -> Development:
    return acdc.develop("induction", training, n_edges=4, **QUICK)


# --- which checkpoints --------------------------------------------------------------------


def test_a_folder_gives_its_steps_in_order(training: Path) -> None:
    assert checkpoint_names(training) == [f"{training}@{step}" for step in STEPS]
    shuffled = [f"{training}@1000", f"{training}@0"]
    assert checkpoint_names(", ".join(shuffled)) == shuffled[::-1]
    assert checkpoint_names(["b", "a"]) == ["b", "a"]


def test_what_are_no_checkpoints_is_refused(training: Path, tmp_path: Path) -> None:
    for models, message in (
        (f"{training}@0", "no known model and no folder"),
        (f"{training}@0,{training}@0", "expected names of checkpoints, each once"),
        (f"{training}@0,", "expected names of checkpoints, each once"),
        (tmp_path, "0 checkpoint; give two or more"),
    ):
        with pytest.raises(OptionError, match=re.escape(message)):
            acdc.develop("induction", models, **QUICK)
    with pytest.raises(ModelError, match="has no step '7': it has 0, 100, 300, 1000"):
        acdc.develop("induction", f"{training}@7,{training}@100", **QUICK)


def test_checkpoints_of_two_models_are_refused(training: Path, tmp_path: Path) -> None:
    other = save_induction(tmp_path / "other", n_heads=2)
    with pytest.raises(OptionError, match="are no checkpoints of one model"):
        acdc.develop("induction", [str(other), f"{training}@1000"], n_edges=4, **QUICK)


# --- what is found ------------------------------------------------------------------------


def test_what_the_model_does_by_step(found: Development) -> None:
    assert found.labels == ("0", "100", "300", "1000")
    assert [one.step for one in found.checkpoints] == list(STEPS)
    assert [one.does_task for one in found.checkpoints] == [False, False, True, True]
    last = found.checkpoints[-1]
    assert last.plain()["accuracy"] == 1
    assert last.metric == pytest.approx(8, rel=0.01)  # the answer's logit, by hand
    assert last.loss == pytest.approx(math.log1p(39 * math.exp(-8)), rel=0.05)
    for before in found.checkpoints[:2]:
        assert before.loss == pytest.approx(math.log(40), rel=1e-3)  # nothing is written


def test_when_edges_are_born(found: Development) -> None:
    assert set(found.final.edges()) == circuit_edges()
    births = {edge: birth["circuit"] for edge, birth in found.births.items()}
    assert births == dict.fromkeys(circuit_edges(), "300")  # before, the task is not done
    assert found.there("circuit") == [0, 0, 1, 1]
    top = found.there("top")
    assert top == sorted(top)
    assert top[-2:] == [1, 1]


def test_overlap_with_the_final_circuit(found: Development) -> None:
    assert found.checkpoints[-1].jaccard == found.checkpoints[-2].jaccard == 1
    final = found.checkpoints[-1]
    assert final.chance is not None
    assert final.chance.mean < 0.5
    assert final.final.faithfulness == final.run.faithfulness
    assert final.run.faithfulness == pytest.approx(1, abs=0.02)
    assert found.checkpoints[0].final.faithfulness is None  # no gap to recover


def test_behaviour_of_heads_by_step(found: Development) -> None:
    previous, induction = (found.best_heads(name) for name in ("previous", "induction"))
    assert [head for head, _ in previous[1:]] == ["a0.h0"] * 3
    assert previous[0][1] < 0.3 < 0.99 < previous[1][1]
    assert [score > 0.8 for _, score in induction] == [False, False, True, True]
    assert induction[-1][0] == "a1.h1"


def test_warnings_name_the_steps(found: Development) -> None:
    assert any(warning.startswith("0, 100: ") or warning.startswith("0: ")
               for warning in found.warnings)  # fmt: skip


def test_a_threshold_is_the_same_for_all(training: Path) -> None:
    models = [f"{training}@300", f"{training}@1000"]
    by = acdc.develop("induction", models, method="acdc", threshold=0.5, **{**QUICK, "n_random": 0})
    assert [one.run.settings.threshold for one in by.checkpoints] == [0.5, 0.5]
    assert circuit_edges() <= set(by.final.edges())
    assert by.checkpoints[0].chance is None
    assert all(birth["top"] is None for birth in by.births.values())  # no ranking chose them


def test_a_size_that_the_final_circuit_has(training: Path) -> None:
    models = [f"{training}@300", f"{training}@1000"]
    chosen = acdc.develop("induction", models, n_select=12, **QUICK)
    first, last = (one.run for one in chosen.checkpoints)
    assert last.settings.n_edges is None
    assert first.settings.n_edges == last.circuit.n_edges
    assert first.details["task_info"] == last.details["task_info"]  # the same prompts


# --- files --------------------------------------------------------------------------------


def test_a_folder_with_everything(found: Development, tmp_path: Path) -> None:
    folder = found.save(tmp_path / "out")
    content = json.loads((folder / "development.json").read_text())
    assert content["births"] == found.births
    assert [row["label"] for row in content["checkpoints"]] == list(found.labels)
    with (folder / "edges.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["edge"] for row in rows if row["in_final"] == "1"} == circuit_edges()
    with (folder / "heads.csv").open() as file:
        heads = {
            (row["behaviour"], row["head"]): float(row["1000"]) for row in csv.DictReader(file)
        }
    assert max(heads, key=lambda key: heads[key] * (key[0] == "induction")) == (
        "induction",
        "a1.h1",
    )
    with (folder / "checkpoints.csv").open() as file:
        assert [row["does_task"] for row in csv.DictReader(file)] == [
            "False",
            "False",
            "True",
            "True",
        ]
    for name in ("development.svg", "development.png", "300/run.json", "1000/circuit.svg"):
        assert (folder / name).stat().st_size > 0
    assert "training step" in (folder / "development.svg").read_text()
    assert acdc.load_run(folder / "300").settings.model == found.checkpoints[2].name


def test_the_command(training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["develop", "induction", "--models", f"{training}@100,{training}@1000", "--edges", "4",
              "--n-prompts", "12", "--n-test", "12", "--n-random", "0",
              "--out", str(tmp_path / "out")])  # fmt: skip
    assert status.value.code == 0
    said = capsys.readouterr().out
    assert "that do not do the task have a circuit that is not claimed" in said
    assert "a1.h1 0.95" in said
    assert (tmp_path / "out" / "development.json").is_file()


# --- behaviour on repeated tokens ---------------------------------------------------------


def test_heads_on_repeated_tokens(training: Path) -> None:
    model, _ = load_model(f"{training}@1000")
    scores = measure_repeats(model, seed=3)
    assert scores["previous"][0, 0] > 0.99
    # before the first token is itself: of its ten copies the first is taken for what followed
    assert scores["induction"][1, 1] == pytest.approx(0.95, abs=0.005)
    assert scores["duplicate"].max() < 0.2
    after = measure_repeats(model, beginning=(5,), seed=3)
    assert after["induction"][1, 1] > 0.99  # here the beginning is
