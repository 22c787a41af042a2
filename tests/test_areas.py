"""``acdc bench areas``: differences are paired, verdicts follow intervals, the table is its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from acdc.cli import main
from acdc.errors import UnknownNameError
from acdc.methods import METHODS
from benchmarks.areas import WAYS, Area, Plan, Row, markdown, summary

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "areas"


def test_a_small_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "areas"
    asked = ["bench", "areas", "--tasks", "docstring", "--ways", "eap-ig,eap-ig + milp"]
    with pytest.raises(SystemExit) as stop:
        main([*asked, "--n-fit", "6", "--n-test", "8", "--out", str(out)])
    assert stop.value.code == 0
    found = json.loads((out / "results.json").read_text())
    base, milp = found["rows"]
    assert (base["task"], base["way"], base["n_fit"], base["n_test"]) == ("docstring", *base_of())
    for name, area in base["areas"].items():
        assert area["low"] <= area["value"] <= area["high"], name
        assert (area["more"], area["more_low"], area["more_high"]) == (0, 0, 0)
    for name, area in milp["areas"].items():
        more = area["value"] - base["areas"][name]["value"]
        assert area["more"] == pytest.approx(more, abs=1e-4)
        assert area["more_low"] <= area["more"] <= area["more_high"]
    assert "eap-ig + milp" in capsys.readouterr().out


def base_of() -> tuple[str, int, int]:
    return "eap-ig", 6, 8


def test_every_method_is_a_way() -> None:
    assert set(METHODS) == {way.method for way in WAYS.values()}
    with pytest.raises(UnknownNameError, match="eap-ig"):
        Plan(("ioi",), ("eap-gi",))


def test_verdicts() -> None:
    area = Area(0.9, 0.8, 1.0, 0.1, 0.05, 0.15)
    assert (area.verdict("CPR"), area.verdict("CMD")) == ("better", "worse")
    assert Area(0.9, 0.8, 1.0, 0.1, -0.05, 0.15).verdict("CPR log") == ""
    areas = dict.fromkeys(("CPR", "CMD", "CPR log", "CMD log"), area)
    lines = summary([Row("ioi", "gim", 6, 8, 1.0, areas)])
    assert lines[0].endswith("worse on none: gim (1).")
    assert lines[1].endswith("worse on none: no way.")


def test_the_committed_table_is_made_from_its_figures() -> None:
    found = json.loads((RESULTS / "results.json").read_text())
    plan = Plan(**{k: tuple(v) if isinstance(v, list) else v for k, v in found["plan"].items()})
    rows = [
        Row(**row | {"areas": {name: Area(**area) for name, area in row["areas"].items()}})
        for row in found["rows"]
    ]
    assert (RESULTS / "results.md").read_text() == markdown(rows, plan)
