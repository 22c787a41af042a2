"""``bench speed --before``: rows of two worktrees side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from acdc.errors import OptionError
from benchmarks import before
from benchmarks.cli import app
from benchmarks.speed import Row

ROW = Row(
    group="bundled", model="ioi-small", method="acdc", metric="logit_diff", unit="forward",
    forward_seconds=0.5, forward_backward_seconds=None, seconds=30.0, ratio=60.0, error=0.0,
    n_edges=100, n_prompts=8, n_pos=12, threshold=0.1, n_kept=12, n_evaluations=80,
)  # fmt: skip
NOW = replace(
    ROW, forward_seconds=0.25, seconds=10.0, ratio=40.0, n_evaluations=70, threshold=0.1 + 1e-9
)


@pytest.fixture
def worktree(tmp_path: Path) -> Path:
    """A folder with a benchmark that cannot be run."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "speed.py").write_text("raise ValueError('too old')")
    return tmp_path


def test_rows_of_two_worktrees(
    worktree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def measured(root: Path, part: str, *rest: Any) -> list[Row]:
        asked.append((root == worktree, part))
        return [ROW, replace(ROW, method="gone")] if root == worktree else [NOW]

    monkeypatch.setattr(before, "_measured", measured)
    out = tmp_path / "out"
    arguments = ["speed", "--before", str(worktree), "--parts", "bundled,x:ioi:kl:1", "--out", out]
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    parts = "bundled", "x:ioi:kl:1"
    assert asked == [(old, part) for part in parts for old in (True, False)]
    text = (out / "results.md").read_text()
    assert "| ioi-small: acdc, logit_diff | 12 | 80 → 70 | 30 → 10 | 60 → 40 | 3.00 |" in text
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["times"] for row in rows] == [3.0, 3.0]
    assert rows[0]["before"]["seconds"] == 30.0


@pytest.mark.parametrize(
    ("part", "line"),
    [("growth", "ValueError: too old"), ("fast", "'fast' is unknown, choose from bundled, growth")],
)
def test_what_cannot_be_measured(part: str, line: str, worktree: Path) -> None:
    with pytest.raises(OptionError, match=line):
        list(before.compare(worktree, [part], "cpu", quick=True))


def test_a_folder_without_a_benchmark(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there, give a worktree"):
        list(before.compare(tmp_path, ["growth"], "cpu", quick=True))


@pytest.mark.slow
def test_this_worktree_with_itself() -> None:
    here = Path(before.__file__).parents[1]
    ((part, pairs),) = before.compare(here, ["growth"], "cpu", quick=True)
    assert part == "growth"
    assert {pair.now.method for pair in pairs} == {"eap", "acdc"}
    assert all(pair.before.n_kept == pair.now.n_kept for pair in pairs)
    assert all(pair.times > 0 for pair in pairs)
