"""A sweep gives exactly the circuits of single runs, and shares what the thresholds share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parity import experiment as parity_experiment

from acdc.engine.incremental import IncrementalRun
from acdc.engine.speculation import Speculation
from acdc.methods.acdc import acdc
from acdc.methods.sweep import sweep


@pytest.mark.parametrize(("name", "metric", "intervention"), [
    ("ln2", "kl", "resample"), ("ln2", "logit_diff", "zero"), ("attn3", "kl", "zero"),
    ("attn3", "logit_diff", "resample"),
])  # fmt: skip
def test_sweep_equals_single_runs(name: str, metric: str, intervention: str) -> None:
    experiment = replace(parity_experiment(name, metric), intervention=intervention)
    taus = [0.2, 0.001, 0.05, 0.01]
    circuits, work = sweep(experiment, taus)
    singles = [acdc(experiment, tau) for tau in taus]
    assert list(circuits) == taus
    for tau, (single, _) in zip(taus, singles, strict=True):
        np.testing.assert_array_equal(circuits[tau].in_circuit, single.in_circuit)
        np.testing.assert_allclose(circuits[tau].scores, single.scores, atol=1e-4)
    assert work.n_decisions < sum(w.n_decisions for _, w in singles)


def test_nothing_is_left_after_a_split_on_the_last_edge() -> None:
    run = IncrementalRun(parity_experiment("ln2", "logit_diff"))
    assert list(Speculation(run, (0.1,)).decide(np.zeros(0, dtype=np.int64))) == []


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-4, 3.0), min_size=1, max_size=6, unique=True))
def test_any_thresholds(taus: list[float]) -> None:
    experiment = parity_experiment("ln2", "logit_diff")
    circuits, _ = sweep(experiment, taus)
    for tau in taus:
        single, _ = acdc(experiment, tau)
        near = np.abs(np.stack([single.scores, circuits[tau].scores]) - tau).min()
        if near > 1e-5:  # else rounding decides
            np.testing.assert_array_equal(circuits[tau].in_circuit, single.in_circuit)


def test_after_a_split_the_batch_goes_on() -> None:
    """A split costs no evaluation, and what one threshold measures guesses for the next."""
    experiment = parity_experiment("attn3", "logit_diff")
    full = abs(experiment.plain("clean") - experiment.plain("corrupt"))
    taus = [float(x) * full for x in np.geomspace(0.1, 0.001, 10)]
    _, work = sweep(experiment, taus)
    singles = [acdc(experiment, tau)[1] for tau in taus]
    assert work.n_decisions < sum(w.n_decisions for w in singles)
    assert work.n_evaluations <= work.n_decisions + work.n_wasted
    assert work.n_wasted < sum(w.n_wasted for w in singles) / 4


@pytest.mark.parametrize("guess", [-np.inf, 0.05, np.inf])
def test_expectations_do_not_change_a_sweep(guess: float) -> None:
    experiment = parity_experiment("ln2", "kl")
    taus = [0.001, 0.02, 0.3]
    circuits, _ = sweep(experiment, taus)
    others, _ = sweep(experiment, taus, expected=np.full(experiment.graph.n_edges, guess))
    for tau in taus:
        np.testing.assert_array_equal(circuits[tau].in_circuit, others[tau].in_circuit)
        np.testing.assert_allclose(circuits[tau].scores, others[tau].scores, atol=1e-5)


def test_equal_thresholds_cost_one_run() -> None:
    experiment = parity_experiment("attn3", "kl")
    circuits, work = sweep(experiment, [0.05, 0.05 + 1e-12])
    _, single = acdc(experiment, 0.05)
    assert len(circuits) == 2
    assert work.n_evaluations == single.n_evaluations


def test_thresholds_of_both_signs_are_refused() -> None:
    experiment = parity_experiment("ln2", "kl")
    with pytest.raises(ValueError, match="both signs"):
        sweep(experiment, [-1.0, 1.0])
