"""The benchmark of CUDA devices, on the CPU: the same code, and a line where there is no GPU."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmarks.cuda
from acdc.cli import main
from acdc.errors import DeviceError
from benchmarks.cuda import Plan, cuda_devices, measure, write
from benchmarks.speed import WrongAnswerError

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
SCRIPT = Path(benchmarks.cuda.__file__).with_suffix(".sh")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as done:
        main(["bench", "cuda", "--out", str(tmp_path / "cuda")])
    assert done.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("acdc: this machine has no CUDA device")
    assert not (tmp_path / "cuda").exists()
    with pytest.raises(DeviceError, match="'cuda:7' is not there"):
        next(measure(Plan.quick(), ["cuda:7"]))


@pytest.mark.slow
def test_the_cpu_gives_what_the_cpu_gives(tmp_path: Path) -> None:
    plan = Plan.quick()
    rows = list(measure(plan, ["cpu"]))
    n = len(plan.searches) + 1
    assert [row.dtype for row in rows] == ["float32"] * 2 * n + ["bfloat16"] * n
    base, same, low = rows[:n], rows[n : 2 * n], rows[2 * n :]
    assert [row.what for row in base] == [row.what for row in same] == [row.what for row in low]
    assert {row.error for row in same} == {0.0}
    assert {row.differing for row in same} == {0, None}
    for row in low:
        assert 0 <= row.error < 0.5
        assert row.what.startswith("evaluate") or row.error > 0, row.what
        assert row.seconds > 0
        assert row.ratio > 0
    assert write(tmp_path, rows, plan, "cpu") == ["results.json", "results.md"]
    content = json.loads((tmp_path / "results.json").read_text())
    assert len(content["rows"]) == len(rows)
    assert (tmp_path / "results.md").read_text().count("\n| ") == len(rows) + 1


def test_weights_in_the_memory_of_the_host_are_a_place_of_their_own() -> None:
    plan = replace(Plan.quick(), dtypes=("float32",))
    plan = replace(plan, searches=plan.searches[:1])
    rows = list(measure(plan, [], ["cpu"]))
    assert [row.device for row in rows] == ["cpu"] * 2 + ["cpu, offload cpu"] * 2
    assert {row.error for row in rows} == {0.0}


def test_several_gpus_are_measured_as_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cuda_devices() == ["cuda:0", "cuda:1", "cuda:0,cuda:1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cuda_devices() == ["cuda:0"]


def test_a_wrong_answer_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.cuda, "_EXACT", -1.0)
    with pytest.raises(WrongAnswerError, match="eap, logit_diff"):
        list(measure(Plan.quick(), ["cpu"]))


def test_the_script_says_how(tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cuda.sh run WHEELS OUT" in done.stdout


@gpu
def test_every_gpu_gives_what_the_cpu_gives() -> None:
    for row in measure(Plan.quick(), cuda_devices()):
        assert row.differing in (0, None) or row.dtype != "float32"
