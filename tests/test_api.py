"""What a Python user sees: light imports, explicit names, and no global state touched."""

from __future__ import annotations

import ast
import importlib
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import acdc
import graphs
from acdc.methods import METHODS
from acdc.tasks import TASKS, load_task

ROOT = Path(graphs.__file__).parent.parent
PATHS = [path for name in ("graphs", "acdc") for path in sorted((ROOT / name).rglob("*.py"))]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def defined(path: Path) -> set[str]:
    """Public functions and classes of a module."""
    return {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }


def imported(path: Path) -> set[str]:
    return {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize("path", PATHS, ids=module_name)
def test_public_names(path: Path) -> None:
    module = importlib.import_module(module_name(path))
    assert module.__doc__
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names))
    assert defined(path) <= set(names)
    if path.name != "__init__.py" and path.name != "errors.py":
        assert not set(names) & imported(path), "exported from where it is not defined"
    for name in names:
        getattr(module, name)
    for name in defined(path):
        check_documented(module, name)


def check_documented(module: ModuleType, name: str) -> None:
    value = getattr(module, name)
    assert value.__doc__, name
    if isinstance(value, type):
        for method, function in vars(value).items():
            if not method.startswith("_") and callable(function):
                assert function.__doc__, f"{name}.{method}"


def test_names_of_the_package() -> None:
    assert acdc.__all__ == sorted(acdc.__all__)
    assert dir(acdc) == acdc.__all__
    for name in acdc.__all__:
        assert getattr(acdc, name).__doc__
    with pytest.raises(AttributeError, match="module 'acdc' has no attribute 'discovr'"):
        acdc.discovr  # noqa: B018


def test_import_is_light() -> None:
    code = "import sys, acdc; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    heavy = {"torch", "transformers", "transformer_lens", "numba", "numpy", "networkx", "typer"}
    assert not heavy & set(done.stdout.split())


# --- six lines of Python ------------------------------------------------------------------


@pytest.fixture(scope="module")
def ln2(data: Path) -> str:
    return str(data / "parity" / "ln2")


@pytest.fixture(scope="module")
def pairs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a task file of six pairs of parity/ln2."""
    batch = load_file(data / "parity" / "ln2" / "batch.safetensors")
    columns = (batch[key][:6].tolist() for key in ("clean", "corrupt", "answer", "wrong"))
    path = tmp_path_factory.mktemp("api") / "pairs.jsonl"
    keys = ("clean", "corrupt", "answers", "wrong_answers")
    rows = (dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_discover_save_load_evaluate(ln2: str, pairs: str, tmp_path: Path) -> None:
    run = acdc.discover(pairs, model=ln2, method="eap-ig", n_edges=30)
    assert 0 < run.circuit.n_edges <= 30
    assert (run.settings.holdout, run.details["n_prompts"]) == (0.25, 5)
    run.save(tmp_path / "run")
    settings, circuit, summary = acdc.load_run(tmp_path / "run")
    evaluation, n_prompts = acdc.evaluate(circuit, settings)
    assert n_prompts == summary["n_prompts"] == 5
    assert evaluation.faithfulness == pytest.approx(run.faithfulness)


def test_reporter_counts_every_step(ln2: str, pairs: str) -> None:
    class Counting(acdc.runs.discover.Silent):
        def __init__(self) -> None:
            self.phases: list[tuple[str, int | None]] = []
            self.count = 0

        def phase(self, name: str, total: int | None) -> Any:
            self.phases.append((name, total))
            return super().phase(name, total)

        def advance(self, n: int) -> None:
            self.count += n

    for method in METHODS:
        reporter = Counting()
        options: dict[str, Any] = {"threshold": 0.1} if method in ("acdc", "eap-acdc") else {}
        acdc.discover(pairs, model=ln2, method=method, reporter=reporter, **options)
        names = [name for name, _ in reporter.phases]
        assert names == ["load model and task", f"discover ({method})", "evaluate"]
        assert reporter.count == reporter.phases[1][1], method


def test_wrong_settings_are_errors_of_python_too(ln2: str, pairs: str) -> None:
    for options, words in (
        ({"method": "acd"}, "did you mean acdc"),
        ({"threshold": float("nan")}, "finite"),
        ({"threshold": 1.0, "n_edges": 3}, "one of them"),
        ({"model": "nowhere"}, "unknown model"),
    ):
        with pytest.raises(ValueError, match=words):
            acdc.discover(pairs, **{"model": ln2, **options})
    with pytest.raises(ValueError, match="takes no edges"):
        acdc.discover(pairs, model=ln2, edges=3)


# --- randomness ---------------------------------------------------------------------------


def global_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), name, keys.tobytes(), *rest, torch.get_rng_state().numpy().tobytes()


@pytest.fixture
def untouched() -> Any:
    before = global_state()
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    dtype = torch.get_default_dtype()
    yield
    assert global_state() == before
    assert torch.is_grad_enabled() == grad
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == dtype


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("method", METHODS)
def test_discover_leaves_the_global_state(
    ln2: str, pairs: str, tmp_path: Path, method: str
) -> None:
    acdc.discover(pairs, model=ln2, method=method, n_prompts=2).save(tmp_path / "run")


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("task", TASKS)
def test_tasks_leave_the_global_state(data: Path, task: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data / "gpt2-tokenizer")
    first, again, other = (
        load_task(task, tokenizer, n_prompts=8, seed=seed).pairs for seed in (1, 1, 2)
    )
    assert first == again != other


def test_the_result_ignores_the_global_state(ln2: str, pairs: str) -> None:
    scores = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            run = acdc.discover(pairs, model=ln2, method="eap-ig", n_edges=9)
        scores.append(run.circuit.scores)
    assert (scores[0] == scores[1]).all()
