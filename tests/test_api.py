"""What a Python user sees: light imports, explicit names, and no global state touched."""

from __future__ import annotations

import ast
import importlib
import json
import random
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from parity_pairs import jsonl, parity_rows

import acdc
import graphs
from acdc.engine.metrics import METRICS
from acdc.errors import CircuitFileError, OptionError, OutputError, TaskError
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
    path = tmp_path_factory.mktemp("api") / "pairs.jsonl"
    path.write_text(jsonl(parity_rows(data / "parity" / "ln2", 6)))
    return str(path)


def test_discover_save_load_evaluate(ln2: str, pairs: str, tmp_path: Path) -> None:
    run = acdc.discover(pairs, model=ln2, method="eap-ig", n_edges=30)
    assert 0 < run.circuit.n_edges <= 30
    assert (run.settings.holdout, run.details["n_prompts"]) == (0.25, 5)
    run.save(tmp_path / "run")
    again = acdc.load_run(tmp_path / "run")
    found = acdc.evaluate(again, tests=False, seen=True)
    assert found.n_prompts == again.details["n_prompts"] == 5
    measured = found.measured[0].evaluation
    assert measured.metric_circuit == pytest.approx(run.evaluation.metric_circuit)
    assert measured.faithfulness is run.claim.faithfulness_seen is None  # random weights
    assert found.warnings[0] in run.claim.warnings


def few_steps(method: str) -> dict[str, int]:
    """Options that make the training of masks short."""
    options = {one.name for one in fields(METHODS[method].options)}
    return {"mask_steps": 20} if "mask_steps" in options else {}


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
        chooses = method in ("acdc", "acdc-two-sided", "eap-acdc")
        options: dict[str, Any] = {"threshold": 0.1} if chooses else few_steps(method)
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


# --- names, paths and objects -------------------------------------------------------------

FEW: dict[str, Any] = {"method": "eap", "n_edges": 30}


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def asked(ln2: str, pairs: str) -> dict[str, tuple[Any, Any]]:
    """Return a task, a model, a metric and a method by name, and as objects."""
    difference = METRICS["logit_diff"]
    return {
        "task": (pairs, load_task(rows_of(pairs))),
        "model": (ln2, acdc.load_model(ln2)),
        "metric": ("logit_diff", replace(difference, name="my-difference")),
        "method": ("eap", replace(METHODS["eap"], name="my-eap")),
    }


@pytest.fixture(scope="module")
def by_name(asked: dict[str, tuple[Any, Any]]) -> acdc.Run:
    return acdc.discover(**{name: named for name, (named, _) in asked.items()}, n_edges=30)


@pytest.mark.parametrize("which", ["task", "model", "metric", "method"])
def test_an_object_does_what_its_name_does(
    asked: dict[str, tuple[Any, Any]], by_name: acdc.Run, tmp_path: Path, which: str
) -> None:
    given = {name: both[name == which] for name, both in asked.items()}
    run = acdc.discover(**given, n_edges=30)
    assert (run.circuit.scores == by_name.circuit.scores).all()
    assert (run.circuit.in_circuit == by_name.circuit.in_circuit).all()
    run.save(tmp_path / "run")
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    assert list(said["given"]) == [which]
    assert said[which] in said["given"][which]
    again = {} if which == "method" else {which: given[which]}
    if again:
        with pytest.raises(ValueError, match=f"{which} .* was given in Python, .* {which}=..."):
            acdc.evaluate(tmp_path / "run", tests=False, n_resamples=20)
        with pytest.raises(ValueError, match=f"give it again, {which}=..."):
            acdc.report(tmp_path / "run", tests=False)
    elsewhere = acdc.evaluate(tmp_path / "run", tests=False, n_resamples=20, **again)
    here = acdc.evaluate(run, tests=False, n_resamples=20)
    named = acdc.evaluate(by_name, tests=False, n_resamples=20)
    for found in (elsewhere, here):
        assert found.n_prompts == named.n_prompts == 1
        assert found.task_info["seen"] is named.task_info["seen"] is False
        assert found.measured[0].evaluation == named.measured[0].evaluation
    page = acdc.report(tmp_path / "run", tests=False, **again)
    assert page.save(tmp_path / "run").name == "report.html"


def test_rows_are_a_task(ln2: str, pairs: str, tmp_path: Path) -> None:
    rows = rows_of(pairs)
    one, other = (acdc.discover(task, model=ln2, **FEW) for task in (rows, pairs))
    assert (one.circuit.scores == other.circuit.scores).all()
    assert one.summary()["given"] == {"task": "a list of 6 rows"}
    folder = one.save(tmp_path / "run")
    found = acdc.evaluate(folder, task=rows, tests=False, n_resamples=20)
    assert (found.n_prompts, found.task_info["seen"]) == (1, False)
    with pytest.raises(TaskError, match="row 1: key 'corrupt' is missing"):
        acdc.discover([{"clean": [1]}], model=ln2, **FEW)
    with pytest.raises(TaskError, match="no rows"):
        acdc.discover([], model=ln2, **FEW)


def test_a_bridge_is_a_model(ln2: str, pairs: str) -> None:
    from acdc.models.folder import ModelFolder
    from acdc.models.native import load_native

    bridge, _ = load_native(ModelFolder(Path(ln2)), torch.device("cpu"), torch.float32)
    one, other = (acdc.discover(pairs, model=model, **FEW) for model in (bridge, Path(ln2)))
    assert (one.circuit.scores == other.circuit.scores).all()
    with pytest.raises(OptionError, match="dtype 'float64' was asked for, the model given has"):
        acdc.discover(pairs, model=bridge, dtype="float64", **FEW)


def test_what_is_no_object_of_its_kind_is_refused(ln2: str, pairs: str) -> None:
    for wrong, words in (
        ({"metric": 3}, "metric is given as int: expected a name or a Metric"),
        ({"method": len}, "method is given as builtin_function_or_method: expected a name or"),
        ({"model": 3}, "model is given as int: expected a name, a folder, a TransformerBridge"),
        ({"task": 3}, "task is given as int: expected a name, a file, a Task or a list of rows"),
    ):
        with pytest.raises(ValueError, match=words):
            acdc.discover(**{"task": pairs, "model": ln2, **FEW, **wrong})
    with pytest.raises(CircuitFileError, match="a run is given as int: expected its folder"):
        acdc.evaluate(3)


def test_a_run_is_a_folder_a_file_or_itself(ln2: str, pairs: str, tmp_path: Path) -> None:
    run = acdc.discover(pairs, model=ln2, **FEW)
    folder = run.save(tmp_path / "run")
    again = acdc.load_run(folder)
    assert json.loads(json.dumps(again.summary())) == json.loads((folder / "run.json").read_text())
    few: dict[str, Any] = {"tests": False, "n_resamples": 20}
    wanted = acdc.evaluate(folder, **few).measured
    assert acdc.evaluate(run, **few).measured == acdc.evaluate(again, **few).measured == wanted
    alone: dict[str, Any] = {"task": pairs, "model": ln2, **few}
    for circuit in (folder / "circuit.json", acdc.load_circuit(folder)):
        assert acdc.evaluate(circuit, **alone).n_prompts == 6  # which were seen is not known
        with pytest.raises(OptionError, match="say with --task what to measure it on"):
            acdc.evaluate(circuit, **few)
    with pytest.raises(OptionError, match="seed 0 is that of discovery"):
        acdc.evaluate(run, seed=0, **few)


def test_results_are_short_and_saved(ln2: str, pairs: str, tmp_path: Path) -> None:
    run = acdc.discover(pairs, model=ln2, method="eap", n_edges=60)
    common: dict[str, Any] = {"model": ln2, "n_edges": 30}
    trials = acdc.evidence.verdicts.Trials(n_random=5, n_permutations=9, n_knockouts=2, n_edges=2)
    results = {
        "run": run,
        "both": acdc.discover_both(pairs, method="eap", **common),
        "stable": acdc.stability(pairs, 2, method="eap", **common),
        "sweep": acdc.sweep(pairs, [0.1, 1.0], model=ln2),
        "evaluation": acdc.evaluate(run, trials=trials, n_resamples=20),
        "repair": acdc.self_repair(run, {"some": ("a0.h0", "a0.h1")}, n_resamples=20),
    }
    results["page"] = acdc.report(
        run, evaluation=results["evaluation"], stability=results["stable"]
    )
    for name, found in results.items():
        files = found.save(tmp_path / name)
        assert files.exists()
        with pytest.raises(OutputError, match="exists"):
            found.save(tmp_path / name)
        assert found.save(tmp_path / name, overwrite=True) == files
    more = [run.circuit, run.circuit.graph, run.evaluation, load_task(rows_of(pairs))]
    more += [results["both"].comparison, *acdc.load_model(ln2)[:1], results["sweep"].points[0]]
    more += [results["evaluation"].judgement, results["page"].contents, run.settings.given]
    for found in (*results.values(), *more):
        assert 0 < len(repr(found)) <= 160, type(found)
        assert "\n" not in repr(found)


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
    run = acdc.discover(pairs, model=ln2, method=method, n_prompts=2, **few_steps(method))
    run.save(tmp_path / "run")


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
