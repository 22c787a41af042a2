"""Another package's method, metric, task, ablation and reference, wherever ours can be named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
PLUGIN = Path(__file__).parent / "plugin"
LN2 = Path(__file__).parent / "data" / "parity" / "ln2"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages with the plug-in, and a model with its reference in it."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(PLUGIN, site, dirs_exist_ok=True)
    model = site / "echo-heads"
    shutil.copytree(LN2, model)
    config = json.loads((model / "config.json").read_text())
    reference = {
        "name": "echo-heads", "description": "heads of layer 1", "model": "echo-heads",
        "task": "pairs.jsonl", "ablation": {"intervention": "resample", "direction": "noising"},
        "granularity": "edges", "citation": "this test", "open": "all of it", "roles": {},
        "graph": {
            "n_layers": config["n_layers"], "n_heads": config["n_heads"], "attn_only": False,
            "parallel_attn_mlp": False, "split_qkv": True, "split_embed": False,
        },
        "edges": ["input->m0", "m0->m1", "m1->logits", "m0->a1.h1<v>", "a1.h1->logits"],
    }  # fmt: skip
    (model / "reference.json").write_text(json.dumps(reference))
    rows = [
        {"clean": [4, 5, 6, 7], "corrupt": [8, 5, 6, 7], "answers": [4], "wrong_answers": [8]},
        {"clean": [9, 5, 6, 7], "corrupt": [3, 5, 6, 7], "answers": [9], "wrong_answers": [3]},
    ]
    (model / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return site


SEVERAL = """
import contextlib, io, json, sys
from acdc.cli import main
for arguments in json.loads(sys.stdin.read()):
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as stop:
            status = stop.code or 0
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""
"""Commands one after the other in one process: what takes longest is to import torch."""


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(site: Path, *commands: Sequence[object]) -> list[Done]:
    """Run commands in a process in which the packages of a site are installed."""
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "COLUMNS": "200"}
    asked = json.dumps([[str(argument) for argument in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL], input=asked, capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Done(*json.loads(line)) for line in done.stdout.splitlines()]


def test_it_is_listed(site: Path) -> None:
    kinds = {
        "methods": "gradient-size", "metrics": "answer_logit", "tasks": "echo",
        "ablations": "half", "references": "echo-heads",
    }  # fmt: skip
    for name, done in zip(kinds.values(), run(site, *(["list", k] for k in kinds)), strict=True):
        assert done.returncode == 0, done.stderr
        assert name in done.stdout


def test_it_is_on_the_command_line(site: Path, tmp_path: Path) -> None:
    asked = ["discover", "echo", "--method", "gradient-size", "--metric", "answer_logit"]
    asked += ["--n-test", 4, "--model", LN2, "--power", 0.5, "--edges", 20, "--n-prompts", 4]
    found, compared, helped, refused = run(
        site,
        [*asked, "--out", tmp_path / "run"],
        ["compare", tmp_path / "run", "--reference", "echo-heads"],
        ["discover", "--help"],
        [*asked[:-6], "--power", -1, "--out", tmp_path / "no"],
    )
    assert found.returncode == 0, found.stderr
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (summary["method"], summary["options"]) == ("gradient-size", {"power": 0.5})
    assert summary["metric"] == "answer_logit"
    assert compared.returncode == 0, compared.stderr
    assert "--power" in helped.stdout
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "power -1.0: expected a number above 0, as 0.5" in refused.stderr


def test_its_ablation_is_one_of_ours(site: Path, tmp_path: Path) -> None:
    out, both, seen = tmp_path / "run", tmp_path / "both", tmp_path / "seen.json"
    asked = ["discover", "echo", "--method", "eap", "--model", LN2, "--edges", 20]
    asked += ["--n-prompts", 4, "--n-test", 4, "--batch-size", 2]
    *found, refused = run(
        site,
        [*asked, "--intervention", "half", "--out", out],
        [*asked, "--intervention", "mean", "--direction", "both", "--out", both],
        ["evaluate", out, "--seen", "--out", seen, "--no-tests"],
        [*asked, "--intervention", "third", "--out", tmp_path / "no"],
    )
    for done in found:
        assert done.returncode == 0, done.stderr
    summary = json.loads((out / "run.json").read_text())
    assert summary["intervention"] == "half"
    assert summary["constants"] == {"n_prompts": 8}
    with safe_open(out / "constants.safetensors", "pt") as file:
        carried, about = file.get_tensor("all.0"), file.metadata()
    assert about["intervention"] == "half"
    means = {}
    for direction in ("noising", "denoising"):
        with safe_open(both / direction / "constants.safetensors", "pt") as file:
            means[direction] = file.get_tensor("all.0")
    torch.testing.assert_close(carried, (means["noising"] + means["denoising"]) / 2)
    assert not torch.allclose(carried, means["noising"], atol=1e-3)

    rows = json.loads(seen.read_text())["ablations"]
    circuits = {(row["intervention"], row["direction"]): row["metric_circuit"] for row in rows}
    assert circuits["half", "noising"] == pytest.approx(summary["metric_seen"]["circuit"])
    assert {"half", "zero", "mean"} <= {intervention for intervention, _ in circuits}
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "intervention 'third': expected one of resample, zero, mean, " in refused.stderr
    assert "half" in refused.stderr


def test_it_is_in_the_benchmark(site: Path, tmp_path: Path) -> None:
    asked = ["bench", "accuracy", "--models", "echo-heads", "--methods", "gradient-size,eap"]
    (done,) = run(site, [*asked, "--out", tmp_path / "accuracy"])
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "accuracy" / "results.json").read_text())["cells"]
    found = {cell["method"]: cell["edges"]["auroc"] for cell in cells}
    assert found["gradient-size"] == pytest.approx(found["eap"])


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ("gradient-size = acdc_plugin_example:nothing", "cannot be loaded"),
        ("gradient-size = nowhere:nothing", "cannot be loaded"),
        ("gradient-size = acdc_plugin_example:ECHO", "gives TaskSpec for method"),
    ],
)
def test_a_broken_one_is_named(site: Path, tmp_path: Path, point: str, words: str) -> None:
    broken = tmp_path / "site"
    shutil.copytree(site, broken)
    points = broken / "acdc_plugin_example-0.0.1.dist-info" / "entry_points.txt"
    points.write_text(f"[acdc.methods]\n{point}\n")
    (done,) = run(broken, ["list", "methods"])
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert words in done.stderr
    assert "acdc-plugin-example" in done.stderr
