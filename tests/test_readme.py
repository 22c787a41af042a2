"""The README's Python block runs, and what it and the page of tests print is what comes out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from acdc.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EVIDENCE = (ROOT / "docs" / "explanation" / "evidence.md").read_text(encoding="utf-8")
COMMANDS = set(
    re.findall(r"`acdc ([a-z-]+)", (ROOT / "docs" / "reference" / "commands.md").read_text())
)


def test_the_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "my-ioi" / "run.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("shipped")
def test_the_first_command_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["discover", "ioi", "--out", "out"])
    assert stop.value.code == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert f"{run['n_edges_kept']} of {run['n_edges_total']:,}" in README
    assert f"│ {run['faithfulness']:.4g}" in README


def test_its_table_has_the_rows_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["discover", "ioi", "--threshold", "0.1", "--n-prompts", "16", "--out", "out"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for name in ("model", "task", "method", "metric", "edges kept", "faithfulness", "threshold"):
        assert f"│ {name} " in printed
        assert f"│ {name} " in README


def test_commands_of_the_table_have_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"discover", "sweep", "evaluate", "compare", "export", "list"} <= COMMANDS
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
    assert "Example" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("shipped")
def test_the_tests_of_the_default_circuit_are_those_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["discover", "ioi", "--out", "run"], ["evaluate", "run", "--out", "said.json"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 0
    said = json.loads((tmp_path / "said.json").read_text())
    low, high = said["faithfulness_low"], said["faithfulness_high"]
    assert (
        f"faithfulness  {said['faithfulness']:.4g} (95 % interval {low:.4g} to {high:.4g})"
        in EVIDENCE
    )
    for verdict in said["tests"]["verdicts"]:
        word = "pass" if verdict["passed"] else "FAIL"
        start = rf"{verdict['test']} +{word} +p {verdict['p_value']:.2g} +"
        (shown,) = re.findall(rf"^{start}(.+?)(?: \.\.\.)?$", EVIDENCE, re.MULTILINE)
        assert verdict["says"].startswith(shown)
