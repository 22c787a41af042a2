"""``bench calibration``: known chances come true, a test that rejects too often is seen."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from acdc.errors import OutputError
from acdc.evidence import verdicts
from acdc.evidence.verdicts import TESTS
from benchmarks.calibration import Row, binomial_interval, markdown, sample
from benchmarks.calibration_scenes import Plan, drawn_scenes
from benchmarks.cli import app

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "calibration"
NAMES = {field.name for field in fields(Row)}


def rows_of(folder: Path) -> list[Row]:
    content = json.loads((folder / "results.json").read_text())
    assert set(content) == {"format", "version", "conditions", "plan", "seed", "rows"}
    for row in content["rows"]:
        assert set(row) == NAMES | {"share"}
        assert row["share"] == pytest.approx(row["n_rejected"] / row["n"])
    return [Row(**{name: row[name] for name in NAMES}) for row in content["rows"]]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], Path, str]:
    """Return the rows of a quick run, its folder, and what it printed."""
    folder: Path = tmp_path_factory.mktemp("bench") / "calibration"
    arguments = ["calibration", "--quick", "--out", str(folder)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return rows_of(folder), folder, result.output


def check(rows: list[Row]) -> None:
    """Every test is seen both ways, holds its level, and does what theory says."""
    for test in TESTS:
        for subject in ("drawn", "ioi-small"):
            assert any(row.null for row in rows if (row.test, row.subject) == (test, subject))
        assert any(not row.null for row in rows if row.test == test)
    level = 0.01 / sum(row.theory is not None for row in rows)
    for row in rows:
        assert (row.low, row.high) == binomial_interval(row.n_rejected, row.n)
        assert row.holds, row
        assert row.n_rejected + row.n_untold <= row.n
        if row.theory is not None:
            assert stats.binomtest(row.n_rejected, row.n, row.theory).pvalue > level, row


def test_a_quick_run(quick: tuple[list[Row], Path, str]) -> None:
    rows, folder, printed = quick
    check(rows)
    text = (folder / "results.md").read_text()
    assert text == markdown(rows)
    for row in rows:
        says = row.says.replace("<", "&lt;")
        assert f"| {row.test} | {row.subject} | {says} |" in text
    assert "None of" in text
    assert "written to" in printed
    whole = {row.test: row for row in rows if row.says == "the whole model"}
    assert whole["equivalence"].n_untold == 0
    assert all(whole[test].n_untold == whole[test].n for test in ("sufficiency", "necessity"))
    shared = next(row for row in rows if row.says.startswith("values go together"))
    assert shared.n_untold == shared.n


def test_the_results_in_the_repository() -> None:
    rows = rows_of(RESULTS)
    check(rows)
    assert (RESULTS / "results.md").read_text() == markdown(rows)
    scenes = {(scene.test, scene.says, scene.theory) for scene in drawn_scenes(Plan())}
    assert scenes == {(row.test, row.says, row.theory) for row in rows if row.subject == "drawn"}
    assert {row.n for row in rows} == {Plan().n_samples, Plan().n_slow}


def test_the_same_seeds_give_the_same_row() -> None:
    plan = Plan.quick()
    scene = drawn_scenes(plan)[-1]
    assert sample(scene, plan) == sample(scene, plan)


def test_a_test_that_rejects_too_often_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The t-test that completeness once was."""

    def t_test(values: Any, bound: float) -> float:
        if np.ptp(values) == 0:
            return float(values[0] <= bound)
        return float(stats.ttest_1samp(values, bound, alternative="greater").pvalue)

    monkeypatch.setattr(verdicts, "mean_above_p_value", t_test)
    (scene,) = (s for s in drawn_scenes(Plan()) if "a little above" in s.says)
    row = sample(scene, Plan.quick())
    assert not row.holds
    assert "rejected too often: completeness" in markdown([row])


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("")
    with pytest.raises(OutputError, match="is a file, give a folder"):
        CliRunner().invoke(app, ["calibration", "--out", str(place)], catch_exceptions=False)
