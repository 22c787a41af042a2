"""The search for a threshold: what it returns, and in how many searches."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import quick

from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.measure.evaluation import Evaluator, is_faithful, standard_error
from acdc.methods import METHODS, tau
from acdc.methods.acdc import acdc
from acdc.methods.base import Found
from acdc.models import load_model
from acdc.tasks import load_task
from acdc.tasks.split import some_prompts


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    model, tokenizer = load_model(quick.MODELS["docstring"])
    task = load_task("docstring", tokenizer, n_prompts=16)
    other = load_task("docstring", tokenizer, n_prompts=16, seed=1)
    return Experiment(model, task, get_metric("logit_diff"), select_on=other)


@pytest.mark.parametrize("method", ["acdc", "eap-acdc"])
def test_the_default_circuit_is_of_its_tau_and_as_the_rule_says(
    experiment: Experiment, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[float] = []
    judge, roughly = tau._judge, tau._roughly

    def counting(evaluator: Evaluator, at: float, found: Found) -> Any:
        assert evaluator.experiment.task is experiment.select_on  # rough circuits, too
        whole.append(at)
        return judge(evaluator, at, found)

    def forgetting(*args: Any) -> float:
        at = roughly(*args)
        whole.clear()
        return at

    monkeypatch.setattr(tau, "_judge", counting)
    monkeypatch.setattr(tau, "_roughly", forgetting)
    found = METHODS[method].find(experiment)
    threshold, mask = found.details["threshold"], found.circuit.in_circuit
    assert threshold in whole
    assert len(whole) <= 3
    if method != "eap-acdc":
        alone, _ = acdc(experiment, threshold)
        np.testing.assert_array_equal(alone.in_circuit, mask)
    evaluator = Evaluator(experiment.selection)
    value, values = evaluator.faithfulness(mask), evaluator.values(mask)
    assert value is not None
    error = standard_error(values, evaluator.full_values, evaluator.empty_values)
    assert is_faithful(value, 0.9, error)
    too_large = [at for at in whole if at > threshold]
    assert value - error <= 0.95 or min(too_large) <= 1.15 * threshold


def judged(monkeypatch: pytest.MonkeyPatch, faithfulness: Any) -> list[float]:
    """Let a formula say how faithful the circuit of a tau is, the gap being 1; return the taus."""
    tried: list[float] = []

    def judge(_: object, at: float, found: Found) -> tau._Try:
        tried.append(at)
        value = faithfulness(at)
        ok = 0.9 <= value <= 1.1
        spare = value - 0.9
        return tau._Try(at, found, ok, spare if ok else min(spare, -0.03), abs(value - 1))

    monkeypatch.setattr(tau, "_judge", judge)
    monkeypatch.setattr(tau, "_gap", lambda _: 1.0)
    monkeypatch.setattr(tau, "Evaluator", lambda _: None)
    return tried


def search(monkeypatch: pytest.MonkeyPatch, faithfulness: Any) -> tuple[float, list[float]]:
    tried = judged(monkeypatch, faithfulness)
    experiment: Any = SimpleNamespace(selection=None)
    found: Any = tau.at_threshold(experiment, None, None, lambda at: at)  # type: ignore[arg-type, return-value]
    return found, tried


@pytest.mark.parametrize("edge", [1e-5, 1e-3, 3e-3, 0.2])
@pytest.mark.parametrize("slope", [0.1, 0.5, 3.0])
def test_the_edge_of_faithfulness_is_found_wherever_it_is(
    monkeypatch: pytest.MonkeyPatch, edge: float, slope: float
) -> None:
    def faithfulness(at: float) -> float:
        return min(1.0, 0.9 - slope * math.log(at / edge))

    found, tried = search(monkeypatch, faithfulness)
    assert 0.9 <= faithfulness(found) <= 0.95 or min(t for t in tried if t > found) <= 1.15 * found
    assert len(tried) <= 13


@pytest.mark.parametrize(
    ("faithfulness", "value"),
    [
        (lambda at: 0.1, 0.1),  # nowhere: the nearest
        (lambda at: 0.5 if at < 1e-4 else 0.2, 0.5),
        (lambda at: 1.0, 1.0),  # everywhere: the largest tau
        (lambda at: 1.3 if at > 1e-3 else 1.0, 1.0),  # what overshoots is not faithful
    ],
)
def test_taus_end(monkeypatch: pytest.MonkeyPatch, faithfulness: Any, value: float) -> None:
    found, tried = search(monkeypatch, faithfulness)
    assert faithfulness(found) == value
    assert len(tried) <= 13
    assert 1e-6 <= min(tried) <= max(tried) <= 1.0


def test_some_prompts_are_of_the_commonest_lengths(experiment: Experiment) -> None:
    task = experiment.task
    few = some_prompts(task, 6)
    lengths = [len(pair.clean) for pair in task.pairs]
    assert len(few) == 6
    assert set(few.pairs) <= set(task.pairs)
    assert len({len(pair.clean) for pair in few.pairs}) <= 2
    assert lengths.count(len(few.pairs[0].clean)) == max(map(lengths.count, lengths))
    assert some_prompts(task, 100) is task
