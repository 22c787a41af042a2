"""``acdc bench unseen``: its figures are those of runs, and the committed table is its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from acdc.cli import main
from benchmarks.unseen import Plan, Row, markdown, summary

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "unseen"


def test_a_small_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "unseen"
    asked = ["bench", "unseen", "--tasks", "pronoun", "--method", "eap", "--seeds", "1"]
    with pytest.raises(SystemExit) as stop:
        main([*asked, "--n-fresh", "20", "--out", str(out)])
    assert stop.value.code == 0
    found = json.loads((out / "results.json").read_text())
    (row,) = found["rows"]
    assert (row["task"], row["method"], row["n_fresh"]) == ("pronoun", "eap", 20)
    assert row["claimed"] is not None
    assert "pronoun" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fresh", "holds", "covered"), [(0.84, False, False), (0.9, True, True), (1.2, False, False)]
)
def test_what_holds(fresh: float, holds: bool, covered: bool) -> None:
    row = Row("ioi", 0, "acdc", 9, 1.0, 0.9, 0.86, 0.95, fresh, 1000, 1.0, ())
    assert (row.holds, row.covered) == (holds, covered)
    assert summary([row])[0].endswith(f"{int(holds)} hold, {int(covered)} are covered.")


def test_the_committed_table_is_made_from_its_figures() -> None:
    found = json.loads((RESULTS / "results.json").read_text())
    plan = Plan(**found["plan"] | {"tasks": tuple(found["plan"]["tasks"])})
    rows = [Row(**row | {"warnings": tuple(row["warnings"])}) for row in found["rows"]]
    assert (RESULTS / "results.md").read_text() == markdown(rows, plan)
    assert len(rows) == len(plan.tasks) * plan.n_seeds
