"""Attribution proposes, ACDC decides: which edges are tested, and the bound on what that missed."""

from __future__ import annotations

import json
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_parity import DATA
from test_parity import experiment as parity_experiment

from acdc.engine.patched import PatchedModel
from acdc.engine.work import Work
from acdc.errors import OptionError
from acdc.methods import METHODS
from acdc.methods.acdc import acdc
from acdc.methods.eap import eap_ig
from acdc.methods.eap_acdc import SAMPLE, audit, most_in_all
from acdc.methods.exact import exact
from acdc.runs.discover import discover
from acdc.tasks.base import Task
from graphs.order import edge_order, receiver_order

METHOD = METHODS["eap-acdc"]


def ignore(n: int) -> None:
    pass


def sequential(case: Any, tau: float, candidates: np.ndarray) -> np.ndarray:
    """ACDC by whole runs, with edges that are removed untested."""
    patched, kept = PatchedModel(case), np.ones(case.graph.n_edges, dtype=bool)
    sign = case.minimised_sign
    for receiver in receiver_order(case.graph):
        edges = edge_order(case.graph, receiver)
        kept[edges[~candidates[edges]]] = False
        current = sign * patched.metric(kept)
        for edge in edges[candidates[edges]]:
            kept[edge] = False
            value = sign * patched.metric(kept)
            if value - current < tau:
                current = value
            else:
                kept[edge] = True
    return kept


@pytest.mark.parametrize(("model", "metric"), [("ln2", "logit_diff"), ("attn3", "kl")])
def test_decisions_are_those_of_whole_runs(model: str, metric: str) -> None:
    case = parity_experiment(model, metric)
    case = replace(case, task=Task("few", case.task.pairs[:3]))
    scores = np.abs(eap_ig(case))
    tau = 0.03
    candidates = scores >= np.quantile(scores, 0.85)
    circuit, work = acdc(case, tau, candidates=candidates)
    np.testing.assert_array_equal(circuit.in_circuit, sequential(case, tau, candidates))
    assert not circuit.scores[~candidates].any()
    whole, more = acdc(case, tau)
    assert work.n_decisions < more.n_decisions
    assert not np.array_equal(whole.in_circuit, circuit.in_circuit), "the case shows nothing"


def test_a_floor_of_zero_is_acdc() -> None:
    case = parity_experiment("ln2", "kl")
    found = METHOD.find(case, threshold=0.01, floor=0.0)
    circuit, _ = acdc(case, 0.01)
    np.testing.assert_array_equal(found.circuit.in_circuit, circuit.in_circuit)
    assert found.details["n_skipped"] == 0
    assert found.details["audit"] is None


def test_the_default_floor_is_a_tenth_of_tau() -> None:
    case = parity_experiment("ln2", "logit_diff")
    counted: list[int] = []
    asked = {"threshold": 0.3, "seed": 3}
    found = METHOD.find(case, Work(progress=counted.append), **asked)
    assert sum(counted) == METHOD.n_units(case, **asked)
    skipped = np.abs(eap_ig(case)) < 0.03
    assert found.details["floor"] == pytest.approx(0.03)
    assert found.details["n_skipped"] == skipped.sum() > SAMPLE
    assert not found.circuit.in_circuit[skipped].any()
    report = found.details["audit"]
    assert report["n_sampled"] == SAMPLE
    assert report["seed"] == 3
    # ln2 is small and smooth: what has no score does nothing alone
    assert report["taken_out"]["largest"] < 0.3
    assert report["taken_out"]["n_at_least_tau"] == 0


def test_sizes_and_defaults_as_for_acdc() -> None:
    case = parity_experiment("ln2", "logit_diff")
    found = METHOD.find(case, n_edges=40)
    assert 0 < found.circuit.n_edges <= 40
    assert found.details["floor"] == pytest.approx(found.details["threshold"] / 10)


# --- the audit ----------------------------------------------------------------------------


def test_effects_are_those_of_whole_runs() -> None:
    case = parity_experiment("ln2", "logit_diff")
    patched, sign = PatchedModel(case), case.minimised_sign
    circuit, _ = acdc(case, 0.3)
    skipped = ~circuit.in_circuit
    found = audit(case, circuit.in_circuit, skipped, 0.01, seed=1, n_sampled=9)
    again = audit(case, circuit.in_circuit, skipped, 0.01, seed=1, n_sampled=9)
    assert found is not None
    assert found == again
    assert found != audit(case, circuit.in_circuit, skipped, 0.01, seed=2, n_sampled=9)
    sample = np.random.default_rng(1).choice(np.flatnonzero(skipped), 9, replace=False)
    every = np.ones_like(skipped)
    full, alone = patched.metric(every), patched.metric(circuit.in_circuit)
    out, back = [], []
    for edge in sample:
        one = np.arange(len(skipped)) == edge
        out.append(sign * (patched.metric(every & ~one) - full))
        back.append(sign * (alone - patched.metric(circuit.in_circuit | one)))
    for effects, values in ((found.taken_out, out), (found.put_back, back)):
        assert effects.largest == pytest.approx(max(values), abs=1e-5)
        assert effects.mean == pytest.approx(np.mean(values), abs=1e-5)
        assert effects.n_at_least_tau == sum(v >= 0.01 for v in values)
        assert effects.n_at_least_tau <= effects.n_at_least_tau_in_all <= skipped.sum()


def test_all_of_them_leave_nothing_to_chance() -> None:
    case = parity_experiment("attn3", "logit_diff")
    skipped = np.zeros(case.graph.n_edges, dtype=bool)
    skipped[::15] = True
    tau = 0.01
    found = audit(case, ~skipped, skipped, tau, n_sampled=10**6)
    assert found is not None
    assert found.n_sampled == found.n_skipped == skipped.sum()
    effects = case.minimised_sign * exact(case)[skipped]
    assert found.taken_out.n_at_least_tau_in_all == (effects >= tau).sum()
    assert found.n_above_largest_in_all == 0


def test_some_edges_of_exact() -> None:
    case = parity_experiment("ln2", "kl")
    chosen = np.zeros(case.graph.n_edges, dtype=bool)
    chosen[3::7] = True
    counted: list[int] = []
    found = exact(case, only=chosen, progress=counted.append)
    np.testing.assert_allclose(found[chosen], exact(case)[chosen], atol=1e-6)
    assert not found[~chosen].any()
    assert sum(counted) == case.graph.n_edges


@pytest.mark.parametrize(("n_all", "n_sampled"), [(30, 10), (12, 11), (7, 7), (50, 1)])
def test_the_bound_counts_samples(n_all: int, n_sampled: int) -> None:
    for n_seen in range(min(3, n_sampled) + 1):
        possible = [
            marked
            for marked in range(n_seen, n_all - n_sampled + n_seen + 1)
            if sum(comb(marked, k) * comb(n_all - marked, n_sampled - k) for k in range(n_seen + 1))
            > 0.05 * comb(n_all, n_sampled) * (1 + 1e-12)
        ]
        assert most_in_all(n_seen, n_sampled, n_all) == max(possible)


# --- asking for it ------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    case = parity_experiment("ln2", "kl")
    rows = [
        {
            "clean": p.clean,
            "corrupt": p.corrupt,
            "answers": p.answers,
            "wrong_answers": p.wrong_answers,
        }
        for p in case.task.pairs[:4]
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_run_json_says_what_was_skipped(pairs: str, tmp_path: Path) -> None:
    options = {"method": "eap-acdc", "threshold": 0.05, "seed": 5}
    run = discover(pairs, model=str(DATA / "ln2"), metric="logit_diff", **options)
    run.save(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    assert summary["n_skipped"] == summary["audit"]["n_skipped"] > 0
    assert summary["audit"]["seed"] == 5
    assert set(summary["audit"]["put_back"]) == {
        "largest", "mean", "n_at_least_tau", "n_at_least_tau_in_all"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "eap-acdc", "floor": -1.0}, r"floor -1\.0: expected at least 0"),
        ({"method": "eap-acdc", "floor": float("nan")}, "floor nan"),
        ({"method": "eap", "floor": 0.1}, "method 'eap' takes no floor"),
    ],
)
def test_bad_floors(pairs: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        discover(pairs, model=str(DATA / "ln2"), **options)
