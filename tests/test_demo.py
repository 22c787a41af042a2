"""``acdc demo``, and what is said where nothing is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_cli
from test_cli import Call

call = test_cli.call


def test_the_whole_story_in_one_command(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = call("demo", "docstring")
    assert said.status == 0
    for command in ("acdc discover docstring", "acdc evaluate runs/demo", "acdc report runs/demo"):
        assert command in said.out
    run, tested = (
        json.loads(Path(f"runs/demo/{n}.json").read_text()) for n in ("run", "evaluation")
    )
    assert run["n_edges_kept"] == tested["n_edges_kept"] > 0
    assert tested["tests"]
    assert Path("runs/demo/report.html").stat().st_size > 10_000
    again = call("demo", "docstring")
    assert again.status == 2
    assert "--overwrite" in again.err


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
