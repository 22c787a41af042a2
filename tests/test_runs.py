"""Settings that check themselves, and run folders that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import acdc
from acdc.engine.constants import Constants
from acdc.errors import CircuitFileError, InputError, OptionError, OutputError
from acdc.measure.evaluation import Evaluation
from acdc.runs import folder as runs
from acdc.runs.checks import check_settings
from acdc.runs.claim import Claim
from acdc.runs.folder import Run, Timer, check_output, read_run, run_constants
from acdc.settings import Settings
from graphs import Circuit, GraphShape, component_graph

FILES = {"circuit.dot", "circuit.json", "circuit.png", "circuit.svg", "run.json"}
KEYS = {
    "method", "metric", "model", "task", "n_edges_total", "n_edges_kept", "metric_full",
    "metric_empty", "metric_circuit", "faithfulness", "timings", "seed", "device", "prepend_bos",
    "versions",
}  # fmt: skip


@pytest.fixture
def run() -> Run:
    graph = component_graph(GraphShape(n_layers=2, n_heads=2))
    rng = np.random.default_rng(0)
    scores = rng.normal(size=graph.n_edges)
    circuit = Circuit(graph, scores, np.abs(scores) > 0.5, {"method": "eap", "metric": "kl"})
    settings = Settings("pairs.jsonl", "ln2", method="eap", metric="kl", n_edges=9, seed=3)
    seen, unseen = Evaluation(0.5, 2.5, 1.0, 0.75), Evaluation(0.4, 2.4, 1.2, 0.6)
    prompts, able = {"fit": 7, "select": 0, "test": 40}, {"doubts": []}
    claim = Claim(unseen, seen, (0.5, 0.7), prompts, able, ("one",))
    return Run(settings, circuit, claim, {"load": 1.5}, {"n_prompts": 7})


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- settings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size 0: expected at least 1"),
        ({"n_prompts": 0}, "n_prompts 0: expected at least 1"),
        ({"n_prompts": -4}, "n_prompts -4: expected at least 1"),
        ({"seed": -1}, "seed -1: expected at least 0"),
        (
            {"intervention": "median"},
            "intervention 'median': expected one of resample, zero, mean.*",
        ),
        ({"direction": "up"}, "direction 'up': expected one of noising, denoising"),
        ({"task": Path("x.jsonl")}, r"task is .*Path\('x.jsonl'\): expected str"),
        ({"model": 3}, "model is 3: expected str or None"),
        ({"batch_size": "32"}, "batch_size is '32': expected int"),
        ({"seed": None}, "seed is None: expected int"),
        ({"threshold": "0.1"}, "threshold is '0.1': expected float or None"),
        ({"prepend_bos": "no"}, "prepend_bos is 'no': expected bool"),
    ],
)
def test_settings_refuse(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}$"):
        Settings(**{"task": "ioi", **change})


def test_settings_accept() -> None:
    settings = Settings("ioi", threshold=1, seed=0, n_prompts=1, batch_size=1)
    assert replace(settings, threshold=0.5).threshold == 0.5
    with pytest.raises(OptionError):
        replace(settings, seed=-1)


def test_settings_from_a_summary_with_more_in_it() -> None:
    settings = Settings(
        "ioi", "m", method="exact", metric="kl", corruption="abc", options={"steps": 9}
    )
    assert Settings.read({**asdict(settings), "faithfulness": 1.0, "versions": {}}) == settings
    assert Settings.read({"task": "ioi"}) == Settings("ioi")


# --- run folders --------------------------------------------------------------------------


def test_round_trip(run: Run, tmp_path: Path) -> None:
    folder = run.save(tmp_path / "deep" / "er" / "run")
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["run"]
    settings, circuit, summary = read_run(folder)
    assert settings == replace(run.settings, n_prompts=7)
    assert circuit.graph.shape == run.circuit.graph.shape
    assert (circuit.scores == run.circuit.scores).all()
    assert (circuit.in_circuit == run.circuit.in_circuit).all()
    assert circuit.info == run.circuit.info
    assert summary == json.loads(json.dumps(run.summary()))


def test_summary(run: Run, tmp_path: Path) -> None:
    run.save(tmp_path / "run")
    summary = run.summary()
    assert summary.keys() >= KEYS
    assert summary["n_edges_total"] == run.circuit.graph.n_edges
    assert summary["n_edges_kept"] == run.circuit.in_circuit.sum()
    assert summary["timings"].keys() == {"load", "render"}
    assert summary["faithfulness"] == run.faithfulness == 0.6
    assert summary["faithfulness_interval"] == [0.5, 0.7]
    assert summary["faithfulness_seen"] == run.evaluation.faithfulness == 0.75
    assert summary["metric_full"] == 0.4
    assert summary["metric_seen"] == {"full": 0.5, "empty": 2.5, "circuit": 1.0}
    assert summary["prompts"] == {"fit": 7, "select": 0, "test": 40}
    assert summary["warnings"] == ["one"]


def test_nothing_is_claimed(run: Run) -> None:
    """Where the model does not do the task, or no prompt is unseen."""
    doubtful = replace(run.claim, ability={"doubts": ["it does not"]})
    summary = replace(run, claim=doubtful).summary()
    assert [summary[f"faithfulness{of}"] for of in ("", "_interval", "_seen")] == [None] * 3
    alone = replace(run, claim=Claim.of_seen(run.evaluation, 7))
    summary = alone.summary()
    assert [summary[f"faithfulness{of}"] for of in ("", "_interval", "_seen")] == [None, None, 0.75]
    assert alone.faithfulness is None


def test_numbers_that_json_lacks(run: Run, tmp_path: Path) -> None:
    odd = replace(run, claim=Claim.of_seen(Evaluation(math.nan, math.inf, 1.0, None), 7))
    text = (odd.save(tmp_path / "run") / "run.json").read_text()
    summary = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert summary["metric_full"] is None
    assert summary["metric_empty"] is None
    assert summary["faithfulness"] is None


def test_overwriting_keeps_unknown_files(run: Run, tmp_path: Path) -> None:
    folder = run.save(tmp_path / "run")
    (folder / "notes.txt").write_text("mine")
    (folder / "more").mkdir()
    before = snapshot(folder)
    with pytest.raises(OutputError, match="exists and is not empty"):
        run.save(folder)
    assert snapshot(folder) == before
    replace(run, settings=replace(run.settings, seed=4)).save(folder, overwrite=True)
    assert {path.name for path in folder.iterdir()} == FILES | {"notes.txt", "more"}
    assert (folder / "notes.txt").read_text() == "mine"
    assert read_run(folder)[0].seed == 4


def test_constants_of_an_overwritten_run_are_gone(run: Run, tmp_path: Path) -> None:
    constants = Constants("mean", "noising", {None: [torch.zeros(1, 1, 1, 1, 3)]})
    settings = run.settings.replace(intervention="mean")
    folder = replace(run, settings=settings, constants=constants).save(tmp_path / "run")
    assert run_constants(folder, run.settings) is not None
    run.save(folder, overwrite=True)
    assert run_constants(folder, run.settings) is None
    assert snapshot(folder).keys() == FILES


def test_an_empty_folder_may_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert snapshot(run.save(tmp_path / "run")).keys() == FILES


def full_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def bad_picture(*args: Any) -> None:
    raise InputError("Graphviz could not draw")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5])
def test_a_full_disk_leaves_all_as_it_was(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, nth: int
) -> None:
    if overwrite:
        run.save(tmp_path / "run")
    before, calls, sync = snapshot(tmp_path), [], os.fsync

    def fail_once(descriptor: int) -> None:
        calls.append(descriptor)
        (full_disk if len(calls) == nth else sync)(descriptor)

    monkeypatch.setattr("graphs.files.whole.os.fsync", fail_once)
    with pytest.raises(InputError, match=r"cannot write .*: No space left on device"):
        run.save(tmp_path / "run", overwrite=overwrite)
    assert len(calls) == nth
    assert snapshot(tmp_path) == before
    assert (tmp_path / "run").exists() == overwrite


@pytest.mark.parametrize("name", ["render", "to_dot", "save_circuit"])
def test_a_failing_step_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(runs, name, bad_picture)
    with pytest.raises(InputError, match="Graphviz"):
        run.save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_scores_that_are_no_numbers_leave_nothing(run: Run, tmp_path: Path) -> None:
    scores = np.full(run.circuit.graph.n_edges, np.nan)
    bad = replace(run, circuit=Circuit(run.circuit.graph, scores, run.circuit.in_circuit))
    with pytest.raises(CircuitFileError, match="is nan, expected a finite number"):
        bad.save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for path, message in (
        ("file", "'.*file' is a file"),
        ("file/run", "'.*file' is a file"),
        ("file/deep/run", "'.*file' is a file"),
        ("n" * 300, "too long"),
    ):
        for write in (check_output, run.save):
            with pytest.raises(OutputError, match=message):
                write(tmp_path / path, overwrite=True)  # type: ignore[operator]
    monkeypatch.setattr("acdc.runs.folder.os.access", lambda path, mode: False)
    with pytest.raises(OutputError, match="may not be written"):
        check_output(tmp_path / "new", overwrite=False)
    assert snapshot(tmp_path) == {"file": b"x"}


def test_a_folder_that_cannot_be_made(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acdc.runs.folder.new_files", lambda folder, then: full_disk())
    with pytest.raises(OutputError, match=r"cannot write .*run: No space left"):
        run.save(tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; give the folder of a run"),
        ("", "no JSON that can be read"),
        ("{", "no JSON that can be read"),
        ("3", "is no run.json"),
        ('{"method": "eap"}', "no key 'task'"),
        ('{"task": "ioi", "seed": -1}', "seed -1"),
        ('{"task": null}', "task is None: expected str"),
    ],
)
def test_runs_that_cannot_be_read(
    run: Run, tmp_path: Path, content: str | None, message: str
) -> None:
    path = run.save(tmp_path / "run") / "run.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_run(tmp_path / "run")


def test_timer_adds_up() -> None:
    timer = Timer()
    with timer.phase("a"):
        pass
    first = timer.seconds["a"]
    with pytest.raises(KeyError), timer.phase("a"):
        raise KeyError
    assert timer.seconds["a"] > first


@pytest.mark.parametrize(
    ("task", "given", "metric"),
    [
        ("ioi", None, "logit_diff"),
        ("greater-than", None, "prob_diff"),
        ("greater-than", "kl", "kl"),
    ],
)
def test_the_metric_is_the_task_s_unless_one_is_named(
    task: str, given: str | None, metric: str
) -> None:
    assert check_settings(Settings(task, metric=given)).metric == metric


@pytest.mark.parametrize(("metric", "method", "direction"), [
    ("logit_diff", "acdc", "noising"), ("logit_diff", "exact", "denoising"),
    ("kl", "exact", "noising"), ("logit_diff", "eap-ig", "denoising"),
])  # fmt: skip
def test_a_circuit_says_which_sign_of_a_score_helps(
    metric: str, method: str, direction: str
) -> None:
    """Without its best edge alone the metric is worse (denoising: with it, better)."""
    run = acdc.discover(
        "ioi", method=method, metric=metric, direction=direction, n_prompts=8, n_test=16,
        **({"threshold": 0.2} if method == "acdc" else {"n_edges": 40}),
    )  # fmt: skip
    helps = run.circuit.info["helps"]
    assert helps in (-1, 1)
    best = int(np.abs(run.circuit.scores).argmax())
    assert helps * run.circuit.scores[best] > 0
