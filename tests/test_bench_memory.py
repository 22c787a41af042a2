"""The benchmark of memory: what it foretells of big models, and what it measures of a tiny one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from acdc.cli import main
from benchmarks import extent, memory
from benchmarks.memory import LLAMAS, Llama, Plan, markdown, measure, write


def test_eight_billion_on_paper(tmp_path: Path) -> None:
    rows = list(measure(Plan(sizes=())))
    assert len(rows) == 9
    by = {(row.arithmetic, row.what): row for row in rows}
    full = by["float32", "eap"]
    assert 8.0e9 < full.weights / 4 < 8.1e9  # Llama-3-8B has 8.03 billion parameters
    assert by["bfloat16", "eap"].weights * 2 == full.weights
    assert all(row.weights < row.foretold < row.allowed for row in rows)
    assert all(row.measured is None for row in rows)
    assert by["bfloat16", "eap"].foretold < by["bfloat16 weights, float32", "eap"].foretold
    assert "| 8 | float32 | eap | 30,633 |" in markdown(rows, Plan())
    write(tmp_path, rows, Plan())
    assert json.loads((tmp_path / "results.json").read_text())["format"] == memory.FORMAT


@pytest.mark.slow
def test_a_tiny_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LLAMAS, "0.1", Llama(512, 64, 128, 4, 8, 4, head_dim=8))
    plan = Plan(("0.1",), ("float32",), repeats=1, acdc=True)
    rows = [row for row in measure(plan) if row.measured]
    assert [row.what for row in rows] == ["eap", "eap-ig", "circuit", "acdc"]
    assert rows[-1].unit.startswith("forward; ")
    for row in rows:
        assert row.ratio is not None
        assert row.measured is not None
        assert row.weights < row.measured


@pytest.mark.parametrize(("option", "value", "line"), [
    ("--sizes", "3", "acdc: unknown size '3': known: 0.1, 0.4, 1.2"),
    ("--sizes", "8", "acdc: unknown size '8': known: 0.1, 0.4, 1.2"),
    ("--arithmetic", "float33", "acdc: unknown arithmetic 'float33': did you mean float32"),
])  # fmt: skip
def test_what_is_not_there_is_refused(
    option: str, value: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["bench", "memory", option, value, "--out", str(tmp_path / "out")])
    assert done.value.code == 2
    assert capsys.readouterr().err.startswith(line)
    assert not (tmp_path / "out").exists()


def test_many_prompts_are_the_same_again() -> None:
    size = replace(extent._SHORT, n_prompts=1200)
    pairs = extent.repeated_task(size).pairs
    assert len(pairs) == 1200
    assert len(set(pairs)) == 500
    assert pairs[500:1000] == pairs[:500]
    assert pairs[1000:] == pairs[:200]


@pytest.mark.slow
def test_many_prompts_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", "memory", "--prompts", "8,16", "--tokens", "20", "--methods", "eap,acdc"]
    monkey = replace(extent._LONG, n_layers=1, d_model=32, n_heads=2, d_vocab=50, n_ctx=32)
    with mock.patch.object(extent, "_LONG", monkey), pytest.raises(SystemExit) as done:
        main([*asked, "--out", str(tmp_path)])
    assert done.value.code == 0
    content = json.loads((tmp_path / "extent.json").read_text())
    rows = content["rows"]
    assert [(row["method"], row["n_prompts"]) for row in rows] == [
        ("eap", 8), ("eap", 16), ("eap", 2), ("acdc", 8), ("acdc", 16), ("acdc", 2)
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["measured"] < row["allowed"]
        assert (row["n_kept"] is None) == (row["method"] == "eap")
    assert "| acdc | random 4 x 128, HF init | 16 | 12 | 2,048 |" in (
        (tmp_path / "extent.md").read_text()
    )


@pytest.mark.parametrize(("option", "value", "line"), [
    ("--prompts", "0", "prompts '0': expected numbers from 1"),
    ("--tokens", "many", "tokens 'many': expected numbers from 1"),
    ("--methods", "eep", "unknown method 'eep'"),
])  # fmt: skip
def test_numbers_of_prompts_that_are_none_are_refused(
    option: str, value: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--prompts", "8"] if option == "--methods" else []
    with pytest.raises(SystemExit) as done:
        main(["bench", "memory", *more, option, value, "--out", str(tmp_path / "out")])
    assert done.value.code == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
