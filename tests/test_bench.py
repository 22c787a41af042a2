"""``bench speed --quick``: the layout of what it writes, and that its figures are figures."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import speed
from benchmarks.cli import app
from benchmarks.measure import Peak
from benchmarks.subjects import CORRUPTED, Size, random_task

PEER = {
    "group": "peers", "model": "m", "method": "auto-circuit ACDC", "metric": "kl",
    "unit": "forward", "forward_seconds": 0.1, "forward_backward_seconds": None,
    "seconds": 5.0, "ratio": 50.0, "error": None, "n_edges": 10, "n_prompts": 1, "n_pos": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Return what one quick run wrote and printed."""
    folder: Path = tmp_path_factory.mktemp("bench")
    peers = folder / "peers.json"
    peers.write_text(json.dumps({"rows": [PEER]}))
    out = folder / "new" / "speed.json"
    arguments = ["speed", "--quick", "--layers", "1", "--out", str(out), "--peers", str(peers)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(out.read_text()), result.output


def test_layout(written: tuple[dict[str, Any], str]) -> None:
    content, _ = written
    assert set(content) == {"format", "version", "conditions", "units", "plan", "rows"}
    assert (content["format"], content["version"]) == (speed.FORMAT, 1)
    assert {"date", "versions", "device", "threads", "load_average"} <= set(content["conditions"])
    assert content["plan"]["growth"] == [1]
    names = {field.name for field in fields(speed.Row)}
    for row in content["rows"]:
        assert set(row) == names


def test_figures_are_finite(written: tuple[dict[str, Any], str]) -> None:
    for row in written[0]["rows"]:
        for name, value in row.items():
            assert not isinstance(value, float) or math.isfinite(value), (name, row)
        assert row["ratio"] > 0
        assert row["seconds"] > 0


def test_every_kind_of_run_is_there(written: tuple[dict[str, Any], str]) -> None:
    rows = written[0]["rows"]
    groups = {row["group"] for row in rows}
    assert groups == {"ACDC", "attribution", "growth", "bundled", "peers"}
    assert {row["metric"] for row in rows if row["group"] == "ACDC"} == {"kl", "logit_diff"}
    methods = {row["method"] for row in rows}
    assert {
        "acdc",
        "acdc sweep, 10 thresholds",
        "eap",
        "eap-ig, 5 steps",
        "TransformerLens attribution_patch",
    } <= methods
    assert rows[-1] == {**{field.name: None for field in fields(speed.Row)}, **PEER}


def test_counts_of_acdc_add_up(written: tuple[dict[str, Any], str]) -> None:
    for row in written[0]["rows"]:
        if row["method"] != "acdc":
            continue
        assert row["n_evaluations"] == row["n_decisions"] + row["n_wasted"]
        assert row["n_decisions"] + row["n_dead"] == row["n_edges"]
        assert 0 <= row["n_kept"] <= row["n_edges"]
        assert row["n_nodes"] >= row["n_evaluations"]
        assert 0 < row["acceptance"] <= 1


def test_latents_are_timed(written: tuple[dict[str, Any], str]) -> None:
    (row,) = (row for row in written[0]["rows"] if "SAEs" in row["model"])
    assert row["method"] == "acdc"
    assert row["n_edges"] <= 40
    assert row["n_kept"] > 0


def test_table_shows_every_method(written: tuple[dict[str, Any], str]) -> None:
    content, output = written
    for row in content["rows"]:
        assert row["method"] in output


def test_layers_must_be_numbers() -> None:
    result = CliRunner().invoke(app, ["speed", "--quick", "--layers", "4,x"])
    assert result.exit_code == 2
    assert "4,12,24" in result.output


def test_prompts_are_those_of_the_claim() -> None:
    task = random_task(Size())
    assert len(task) == 16
    for pair in task.pairs:
        differing = [
            i for i, (a, b) in enumerate(zip(pair.clean, pair.corrupt, strict=True)) if a != b
        ]
        assert len(pair.clean) == 15
        assert differing == list(CORRUPTED)
    assert random_task(Size()) == task


def test_wrong_answer_is_refused() -> None:
    with pytest.raises(speed.WrongAnswerError, match=r"acdc: relative error 2\.00e-03"):
        speed._confirm("acdc", 2e-3, 1e-3)
    with pytest.raises(speed.WrongAnswerError, match="nan"):
        speed._confirm("acdc", math.nan, 1e-3)


def test_peak_sees_a_large_tensor() -> None:
    with Peak(torch.device("cpu")) as peak:
        held = torch.ones(64 << 20, dtype=torch.uint8)  # freed at once, it can fall between samples
    del held
    if peak.n_bytes is None:
        pytest.skip("this system does not tell the resident set")
    assert 60 << 20 < peak.n_bytes < 200 << 20
