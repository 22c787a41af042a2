"""``bench accuracy``: a tiny table, stopping and going on, and the table in the docs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from acdc.errors import OutputError, UnknownNameError
from acdc.methods import METHODS
from benchmarks import accuracy, accuracy_report
from benchmarks.accuracy import Plan, Table, measure, read_cells, subjects
from benchmarks.accuracy_report import (
    BEGIN,
    END,
    markdown,
    readme_table,
    run_table,
    update_readme,
)
from benchmarks.cli import app
from graphs.known.roc import Roc

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results" / "accuracy" / "results.json"
MODELS = ["tracr-reverse-zero", "tracr-xproportion-resample"]
SOME = ["acdc", "eap-ig"]


def tiny(methods: list[str] = SOME) -> Plan:
    plan = replace(Plan.full(), n_resamples=20, n_prompts=10, thresholds=(0.3, 0.01, 1e-4))
    return plan.only(MODELS, methods)


def without_time(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in cell.items() if key != "seconds"} for cell in cells]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Cells of one run without a stop."""
    folder: Path = tmp_path_factory.mktemp("whole")
    list(measure(tiny(), Table(folder)))
    return read_cells(folder / "results.json")


# --- what is measured ---------------------------------------------------------------------


def test_every_cell_is_there_and_says_what_it_used(whole: list[dict[str, Any]]) -> None:
    assert [(c["subject"], c["method"]) for c in whole] == [(s, m) for s in MODELS for m in SOME]
    for cell in whole:
        asked = cell["request"]
        assert asked["metric"] == "mse"
        assert asked["intervention"] == cell["subject"].rsplit("-", 1)[1]
        assert (asked["direction"], asked["seed"], asked["n_prompts"]) == ("noising", 0, 10)
        assert ("thresholds" in asked) == (cell["method"] == "acdc")
        assert asked["options"]["steps"] == 5
        assert {"torch", "numpy", "acdc-circuits"} <= set(asked["versions"])
        assert set(asked["files"]) == {
            "config.json", "model.safetensors", "pairs.jsonl", "reference"
        }  # fmt: skip
        assert cell["seconds"] >= 0


def test_acdc_finds_the_circuits_that_the_paper_says_it_finds(whole: list[dict[str, Any]]) -> None:
    for cell in whole:
        if cell["method"] == "acdc":
            assert cell["edges"]["auroc"] == 1
            assert cell["edges"]["average_precision"] == 1
            assert (cell["edges"]["missed"], cell["edges"]["extra"]) == ([], [])
            assert cell["nodes"]["auroc"] == 1
            assert cell["edges"]["roc"] == {"stairs": True, "fpr": [0, 0, 1], "tpr": [0, 1, 1]}


def test_random_scores_stand_beside(whole: list[dict[str, Any]]) -> None:
    for cell in whole:
        assert cell["edges"]["random"]["auroc"] == pytest.approx(0.5, abs=0.06)
        share = cell["edges"]["n_true"] / cell["edges"]["n_items"]
        assert cell["edges"]["random"]["average_precision"] == pytest.approx(share, abs=0.2)
        older = json.loads(json.dumps(cell))
        for part in ("edges", "nodes"):
            older[part].pop("random", None)
        assert accuracy.add_random(subjects()[cell["subject"]], older)
        assert older == cell  # a stored cell gets what a measured one has
        assert not accuracy.add_random(subjects()[cell["subject"]], older)
    assert "*random scores*" in readme_table(whole)


def test_areas_of_every_convention(whole: list[dict[str, Any]]) -> None:
    for cell in whole:
        rankings = {"sweep"} if cell["method"] == "acdc" else {"signed", "absolute"}
        assert set(cell["curves"]) == rankings
        assert len(cell["areas"]) == 8 * len(rankings)
        for value, low, high in cell["areas"].values():
            assert low <= value <= high
        for curve in cell["curves"].values():
            assert curve["faithfulness"][-1] == 1
            assert len(curve["fraction"]) == 10
        assert cell["sizes"]["0.9"]["n_edges"] <= cell["sizes"]["0.95"]["n_edges"]
        assert cell["sizes"]["0.95"]["missed_nodes"] == []


def test_missed_and_extra_items_are_named() -> None:
    found = accuracy._Found(np.array([3.0, 1.0, 2.0]))
    scored = accuracy.Items("edges", ("a", "b", "c"), np.arange(3), np.arange(3))
    agreement = accuracy._agreement(scored, np.array([True, True, False]), found)
    assert agreement["auroc"] == 0.5
    assert agreement["average_precision"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert (agreement["missed"], agreement["extra"]) == ([], ["c"])  # F1 4/5 against 2/3
    assert agreement["best_f1"] == 0.8
    masks = (np.array([True, False, True]), np.array([False, False, True]))
    swept = accuracy._agreement(
        scored, np.array([True, True, False]), accuracy._Found(found.scores, masks)
    )
    assert (swept["missed"], swept["extra"]) == (["b"], ["c"])
    nothing = accuracy._agreement(scored, np.array([True, True, True]), found)
    assert (nothing["auroc"], nothing["n_true"], nothing["n_items"]) == (None, 3, 3)


def test_corners_keep_the_area() -> None:
    rng = np.random.default_rng(0)
    truth, scores = rng.random(300) < 0.1, rng.normal(size=300)
    curve = accuracy.roc_curve(truth, scores)
    kept = accuracy._corners(curve)
    assert len(kept["fpr"]) < len(curve.fpr) / 3
    again = Roc(np.array(kept["fpr"]), np.array(kept["tpr"]), kept["stairs"])
    assert again.area == pytest.approx(curve.area)
    # a point on the diagonal is a step of stairs, and no point of a straight line
    stairs = accuracy.sweep_roc(np.array([True, True, False, False]), [np.array([1, 0, 1, 0]) > 0])
    kept = accuracy._corners(stairs)
    again = Roc(np.array(kept["fpr"]), np.array(kept["tpr"]), kept["stairs"])
    assert again.area == stairs.area == 0.25


def test_models_without_a_known_circuit_get_faithfulness_only(tmp_path: Path) -> None:
    plan = replace(Plan.quick(), n_prompts=2, n_resamples=5).only(["ioi-small"], ["eap"])
    (cell,) = measure(plan, Table(tmp_path))
    assert "edges" not in cell
    assert "nodes" not in cell
    assert len(cell["areas"]) == 16
    assert "missed_nodes" not in cell["sizes"]["0.9"]
    assert markdown([cell]).count("ioi-small") == 1


def test_subjects_are_the_models_that_are_here() -> None:
    found = subjects()
    assert {"tracr-reverse-zero", "tracr-reverse-resample", "ioi-small"} <= set(found)
    assert "ioi" not in found  # published; its model is elsewhere
    for subject in found.values():
        assert (subject.model / "config.json").is_file()
    assert set(Plan.quick().subjects) < set(found)
    assert found["tracr-reverse-zero"].splits == {"split_qkv": True, "split_embed": True}


def test_a_quick_run_trains_no_masks_unless_asked_to() -> None:
    quick = Plan.quick()
    assert {"acdc", "eap-ig", "exact"} <= set(quick.methods) < set(Plan.full().methods)
    assert not {"edge-pruning", "subnetwork-probing"} & set(quick.methods)
    assert quick.only(None, ["edge-pruning", "acdc"]).methods == ("acdc", "edge-pruning")
    with pytest.raises(UnknownNameError, match="did you mean"):
        quick.only(None, ["edge-prunning"])


def test_a_model_without_its_task_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "compiled" / "models" / "toy"
    source = subjects()["tracr-reverse-zero"].model
    shutil.copytree(source, folder)
    (folder / "pairs.jsonl").unlink()
    with pytest.raises(OutputError, match=r"toy/pairs\.jsonl: no such file"):
        subjects({"toy": folder / "reference-zero.json"})


# --- stopping and going on ----------------------------------------------------------------


def test_a_stopped_run_goes_on_where_it_was(whole: list[dict[str, Any]], tmp_path: Path) -> None:
    running = measure(tiny(), Table(tmp_path))
    next(running)
    running.close()  # as if killed after the first cell
    assert len(read_cells(tmp_path / "results.json")) == 1
    again = list(measure(tiny(), Table(tmp_path)))
    assert [(c["subject"], c["method"]) for c in again] == [
        (c["subject"], c["method"]) for c in whole[1:]
    ]
    assert without_time(read_cells(tmp_path / "results.json")) == without_time(whole)
    assert list(measure(tiny(), Table(tmp_path))) == []


def test_only_what_changed_is_measured_again(whole: list[dict[str, Any]], tmp_path: Path) -> None:
    list(measure(tiny(["eap-ig"]), Table(tmp_path)))
    other = replace(tiny(), thresholds=(0.3, 1e-4))
    again = list(measure(other, Table(tmp_path)))
    assert {c["method"] for c in again} == {"acdc"}
    assert len(read_cells(tmp_path / "results.json")) == 4
    again = list(measure(tiny(), Table(tmp_path)))
    assert {c["method"] for c in again} == {"acdc"}
    assert without_time(read_cells(tmp_path / "results.json")) == without_time(whole)


def test_a_changed_reference_is_measured_again(tmp_path: Path) -> None:
    plan = tiny(["eap"])
    subject = plan.subjects[MODELS[0]]
    assert subject.reference is not None
    fewer = replace(subject.reference, edges=subject.reference.edges[:-1])
    changed = replace(subject, reference=fewer)
    assert plan.request(subject, "eap", "cpu") == plan.request(subject, "eap", "cpu")
    assert plan.request(subject, "eap", "cpu") != plan.request(changed, "eap", "cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": "acdc-bench-acc', "no JSON that can be read"),
        ("[]", "holds no results of this benchmark"),
        ('{"format": "acdc-bench-speed", "version": 1}', "holds no results of this benchmark"),
        ('{"format": "acdc-bench-accuracy", "version": 0, "cells": []}', "version 1"),
    ],
)
def test_other_files_are_refused_and_left_alone(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(OutputError, match=message):
        Table(tmp_path)
    assert path.read_text() == content
    with pytest.raises(OutputError, match="is a file, give a folder"):
        Table(path)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="plan 'tracr-revers': did you mean tracr-"):
        Plan.full().only(["tracr-revers"], None)
    with pytest.raises(UnknownNameError, match="unknown method 'eapig': did you mean eap-ig"):
        Plan.full().only(None, ["eapig"])
    both = Plan.full().only(["tracr-reverse"], ["exact"])
    assert set(both.subjects) == {"tracr-reverse-zero", "tracr-reverse-resample"}
    assert both.methods == ("exact",)


# --- what is shown ------------------------------------------------------------------------


def test_markdown_lists_where_methods_fail(whole: list[dict[str, Any]]) -> None:
    text = markdown(whole)
    assert "| tracr-reverse-zero | 11 of 94 | 1.000 (1.00) |" in text
    failing = [c for c in whole if c["edges"]["auroc"] < 1]
    for cell in failing:
        (line,) = [
            line for line in text.splitlines()
            if line.startswith(f"- {cell['subject']}, {cell['method']}:") and "over edges" in line
        ]  # fmt: skip
        for name in (*cell["edges"]["missed"][:12], *cell["edges"]["extra"][:12]):
            assert f"`{name}`" in line
    perfect = [c for c in whole if c["edges"]["auroc"] == 1 and c["nodes"]["auroc"] == 1]
    assert "Nowhere: every AUROC is 1." in markdown(perfect)


def test_mean_of_a_method_and_of_the_best(whole: list[dict[str, Any]]) -> None:
    cells = json.loads(json.dumps(whole))
    for cell, value in zip(cells, (1.0, 0.8, 0.5, 0.9), strict=True):
        cell["edges"] |= {"auroc": value, "average_precision": value}
    text = markdown(cells)
    assert "| **mean** |  | **0.750 (0.75)** | **0.850 (0.85)** |" in text
    assert "mean AUROC 0.950, least 0.900" in text


def test_the_readme_has_means_of_groups_of_models(whole: list[dict[str, Any]]) -> None:
    cells = json.loads(json.dumps(whole))
    for cell, value in zip(cells, (1.0, 0.8, 0.5, 0.9), strict=True):
        cell["edges"] |= {"auroc": value, "average_precision": value}
        if "nodes" in cell:
            cell["nodes"] |= {"auroc": value}
    head, _, *rows = readme_table(cells).splitlines()[:4]
    groups = [title.strip() for title in head.split("|")[2:4]]
    assert sorted(groups) == ["compiled, resample (1)", "compiled, zero (1)"]
    by_method = {row.split("|")[1].strip(): row for row in rows}
    assert by_method.keys() == set(SOME)
    for method, row in by_method.items():
        values = [c["edges"]["auroc"] for c in cells if c["method"] == method]
        in_groups = " | ".join(f"{v:.3f} ({v:.2f})" for v in values)
        mean = sum(values) / len(values)
        nodes = [c["nodes"]["auroc"] for c in cells if c["method"] == method]
        assert row == (
            f"| {method} | {in_groups} | **{mean:.3f} ({mean:.2f})** | {min(values):.3f} | "
            f"{sum(nodes) / len(nodes):.3f} |"
        )


def test_readme_is_changed_between_its_markers_only(
    whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    update_readme(whole, path)
    assert path.read_text() == f"before\n{BEGIN}\n{readme_table(whole)}{END}\nafter\n"
    update_readme(whole, path)
    assert path.read_text().count("| acdc |") == 1
    for text in ("none", f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"):
        path.write_text(text)
        with pytest.raises(
            OutputError, match=r"README\.md: expected the lines <!-- accuracy:begin"
        ):
            update_readme(whole, path)
        assert path.read_text() == text
    with pytest.raises(OutputError, match="cannot read"):
        accuracy_report.check_readme(tmp_path / "gone.md")


def test_the_table_of_the_docs_is_that_of_the_stored_results() -> None:
    readme = (ROOT / "docs" / "explanation" / "accuracy.md").read_text(encoding="utf-8")
    cells = read_cells(STORED)
    assert readme.split(BEGIN)[1].split(END)[0] == f"\n{readme_table(cells)}"
    assert (STORED.parent / "results.md").read_text(encoding="utf-8") == markdown(cells)
    assert {cell["method"] for cell in cells} <= set(METHODS)
    assert {cell["subject"] for cell in cells} == set(subjects())


def test_the_command_writes_everything(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    arguments = [
        "accuracy", "--quick", "--models", "tracr-xproportion-resample", "--methods", "acdc,eap",
        "--out", str(tmp_path / "out"), "--readme", str(readme),
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "results.json", "results.md", "roc-edges.png", "roc-edges.svg", "roc-nodes.png",
        "roc-nodes.svg",
    ]  # fmt: skip
    cells = read_cells(tmp_path / "out" / "results.json")
    assert len(cells) == 2
    for word in ("tracr-xproportion-resample", "acdc", "eap", "1.000", "0.500"):
        assert word in result.output
    assert "…" not in result.output  # nothing is cut off
    assert "tracr-xproportion-resample" in (tmp_path / "out" / "roc-edges.svg").read_text()
    assert readme_table(cells) in readme.read_text()
    assert run_table(cells).row_count == 3


def test_bad_requests_write_nothing(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    for arguments, error in (
        (["--readme", str(readme)], OutputError),
        (["--models", "gpt9"], UnknownNameError),
        (["--methods", "guess"], UnknownNameError),
    ):
        result = CliRunner().invoke(
            app, ["accuracy", "--quick", "--out", str(tmp_path / "out"), *arguments]
        )
        assert isinstance(result.exception, error)
    assert list(tmp_path.iterdir()) == [readme]
