"""``acdc demo``, and what is said where nothing is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Call


@pytest.mark.slow
def test_the_whole_story_in_one_command(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = call("demo", "docstring")
    assert said.status == 0
    for step in ("discover docstring", "evaluate runs/demo", "report runs/demo"):
        assert f"acdc {step}" in said.out
    files = (Path("runs/demo") / name for name in ("run.json", "evaluation.json"))
    run, tested = (json.loads(file.read_text()) for file in files)
    assert run["n_edges_kept"] == tested["n_edges_kept"] > 0
    assert tested["tests"]
    assert Path("runs/demo/report.html").stat().st_size > 10_000


def test_what_is_there_is_not_written_over(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/mine").touch()
    for arguments, why in ((("demo",), "--overwrite"), (("demo", "icl"), "icl")):
        said = call(*arguments)
        assert said.status == 2
        assert why in said.err
    assert sorted(path.name for path in Path("runs").rglob("*")) == ["demo", "mine"]


@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_equal_prompts_are_told_to_differ(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path, method: str
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"clean": [5, 6, 7, 8], "corrupt": [5, 6, 7, 8], "answers": [1], "wrong_answers": [2]}
    Path("same.jsonl").write_text(json.dumps(row) + "\n")
    said = call("discover", "same.jsonl", "--model", data / "parity" / "ln2", "--method", method,
                "--holdout", "0", "--edges", "9")  # fmt: skip
    assert said.status == 2
    assert "clean and corrupt prompts are the same" in said.err
    assert "choose eap-ig" not in said.err


@pytest.mark.usefixtures("place")
def test_what_was_evaluated_is_kept_with_the_run_and_not_measured_again(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--n-random", 9, "--n-permutations", 9, "--n-knockouts", 2, "--test-edges", 2)
    kept = Path("run/evaluation.json")
    for other in (("--seen",), ("--no-tests",), ("--metric", "mse"), ("--brief",)):
        assert call("evaluate", "run", *(() if "--brief" in other else few), *other).status == 0
        assert not kept.exists()
    said = call("evaluate", "run", *few)
    assert f"written to {kept}" in said.out
    assert json.loads(kept.read_text())["tests"]
    monkeypatch.setattr("acdc.pages.contents.assess", None)  # what measures again
    assert call("report", "run").status == 0
