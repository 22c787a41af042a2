"""Sweeps, stability and the benchmark on an executor: what they find in this process, they find."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity_pairs import jsonl, parity_rows

import acdc
from acdc.cli import main
from acdc.errors import InputError, OptionError, ProcessError, UnknownNameError
from acdc.evidence.frontier import sweep
from acdc.evidence.stability import stability
from acdc.executors import HERE, Processes, Resources, resources_of
from acdc.runs.many import all_of
from benchmarks.accuracy import Plan, Table, measure
from benchmarks.shortcuts import MODELS as SHORTCUTS

TWO = Resources("processes", 2)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Workers have as many threads as this process: with others the last digits differ."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pairs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a task file of a few pairs, and the model that it is of."""
    path = tmp_path_factory.mktemp("many") / "pairs.jsonl"
    path.write_text(jsonl(parity_rows(data / "parity" / "ln2", 8)))
    return {"task": str(path), "model": str(data / "parity" / "ln2"), "holdout": 0.5}


def test_stability_is_the_same(pairs: dict[str, Any]) -> None:
    options = {**pairs, "method": "eap", "n_edges": 30}
    here, there = (stability(n_seeds=3, resources=r, **options) for r in (Resources(HERE), TWO))
    assert np.array_equal(here.masks, there.masks)
    assert (here.seeds, here.faithfulness) == (there.seeds, there.faithfulness)
    assert len({mask.tobytes() for mask in here.masks}) > 1  # seeds are not one another's


def test_stability_over_corruptions_is_the_same() -> None:
    options = {"model": str(SHORTCUTS["ioi-small"]), "method": "eap", "n_edges": 30, "n_prompts": 4}
    here, there = (
        stability("ioi", 1, corruptions=("abc", "swapped"), resources=r, **options)
        for r in (Resources(HERE), TWO)
    )
    assert np.array_equal(here.masks, there.masks)
    assert here.factors == there.factors
    assert (here.masks[0] != here.masks[1]).any()


def test_sweeps_are_the_same(pairs: dict[str, Any]) -> None:
    here, there = (sweep(resources=r, **pairs) for r in (Resources(HERE), TWO))
    assert [p.threshold for p in here.points] == [p.threshold for p in there.points]
    for one, other in zip(here.points, there.points, strict=True):
        assert np.array_equal(one.circuit.in_circuit, other.circuit.in_circuit)
        assert one.row() == other.row()
    assert len({p.circuit.n_edges for p in here.points}) > 1
    assert set(here.details["work"]) == set(there.details["work"])


def test_the_benchmark_is_the_same(tmp_path: Path) -> None:
    plan = replace(Plan.quick(), n_resamples=20).only(["ioi-small"], ["eap", "nap"])
    found = []
    for name, resources in (("here", Resources(HERE)), ("there", TWO)):
        table = Table(tmp_path / name)
        list(measure(plan, table, resources=resources))
        found.append({key: {**c, "seconds": 0} for key, c in table.cells.items()})
    assert len(found[0]) == 2
    assert found[0] == found[1]


def test_what_is_asked_decides_where() -> None:
    assert resources_of({}, HERE) == resources_of({"jobs": 1}, HERE) == Resources(HERE)
    assert resources_of({}) == Resources("processes")
    assert resources_of({"jobs": 2, "name": None}, HERE) == TWO
    assert resources_of({"name": "processes"}, HERE) == Resources("processes")
    with pytest.raises(OptionError, match="jobs 2: executor 'here' runs one"):
        resources_of({"name": HERE, "jobs": 2})


# --- what goes wrong ----------------------------------------------------------------------


def _wrong(item: int) -> int:
    if item == 1:
        raise UnknownNameError("thing", "abd", ["abc"])
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 3:
        raise KeyError("three")
    return item


def test_errors_of_workers_are_the_callers() -> None:
    assert all_of(_wrong, [0, 4, 5], TWO) == [0, 4, 5]
    with pytest.raises(UnknownNameError, match=r"^unknown thing 'abd': did you mean abc"):
        all_of(_wrong, [0, 1], TWO)
    with pytest.raises(ProcessError, match="run 2 of 2: its process was killed by signal 9, 2 tim"):
        all_of(_wrong, [0, 2], TWO)
    with pytest.raises(ProcessError, match="run 1 of 1: KeyError: 'three'"):
        all_of(_wrong, [3], TWO)
    assert next(Processes(1).run(_wrong, [0])) == (0, 0)


def test_objects_stay_in_this_process(pairs: dict[str, Any]) -> None:
    model, _ = acdc.load_model(pairs["model"])
    asked = {**pairs, "model": (model, None), "method": "eap", "n_edges": 20}
    with pytest.raises(OptionError, match="model was given as an object, which stays in this"):
        stability(n_seeds=2, resources=TWO, **asked)
    asked = {name: asked[name] for name in ("task", "model", "holdout")}
    with pytest.raises(OptionError, match="model was given as an object, which stays in this"):
        sweep(thresholds=[0.1], resources=TWO, **asked)


def test_the_commands_take_them(
    pairs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [pairs["task"], "--model", pairs["model"], "--jobs", "2", "--out", str(tmp_path / "a")]
    with pytest.raises(SystemExit) as done:
        main(["sweep", *words, "--thresholds", "0.3,0.1"])
    assert done.value.code == 0
    assert (tmp_path / "a" / "sweep.json").is_file()
    words[-1] = str(tmp_path / "b")
    for more, line in (
        (["--address", "auto"], "acdc: address 'auto': executor 'processes' has none, ray has"),
        (["--executor", "rays"], "acdc: unknown executor 'rays': did you mean ray"),
    ):
        for command in ("sweep", "stability"):
            capsys.readouterr()
            with pytest.raises(SystemExit) as done:
                main([command, *words, *more])
            assert done.value.code == 2
            assert capsys.readouterr().err.startswith(line)
    assert not (tmp_path / "b").exists()


def test_an_error_is_the_same_on_the_other_side() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(UnknownNameError("thing", "abd", ["abc"])))
    assert (type(error), str(error)) == (
        UnknownNameError,
        "unknown thing 'abd': did you mean abc?",
    )
    assert isinstance(error, InputError)
