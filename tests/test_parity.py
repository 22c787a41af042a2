"""Two small trained models: the numbers that EAP-IG 2.0 and the original ACDC code give."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import PatchedModel
from acdc.methods.acdc import acdc
from acdc.methods.eap import Integration, clean_corrupted, eap, eap_ig
from acdc.methods.exact import exact
from acdc.models import load_model
from acdc.tasks.base import Pair, Task

DATA = Path(__file__).parent / "data" / "parity"
MODELS = ("ln2", "attn3")
SCORES = {
    "eap_logit_diff": (eap, "logit_diff"),
    "eap_ig_inputs_5_logit_diff": (functools.partial(eap_ig, options=Integration(5)), "logit_diff"),
    "eap_ig_inputs_5_kl": (functools.partial(eap_ig, options=Integration(5)), "kl"),
    "clean_corrupted_logit_diff": (clean_corrupted, "logit_diff"),
    "exact_logit_diff": (exact, "logit_diff"),
}
RUNS = [
    (metric, tau) for metric in ("kl", "logit_diff") for tau in ("0.001", "0.01", "0.05", "0.2")
]


@functools.cache
def expected(model: str) -> dict[str, Any]:
    return json.loads((DATA / model / "expected.json").read_text())


@functools.cache
def experiment(model: str, metric: str) -> Experiment:
    batch = {k: v.tolist() for k, v in load_file(DATA / model / "batch.safetensors").items()}
    rows = zip(batch["clean"], batch["corrupt"], batch["answer"], batch["wrong"], strict=True)
    pairs = [Pair(tuple(c), tuple(k), (a,), (w,)) for c, k, a, w in rows]
    lowered, _ = load_model(str(DATA / model))
    return Experiment(lowered, Task(model, tuple(pairs)), get_metric(metric))


@pytest.mark.parametrize("model", MODELS)
def test_plain_runs_equal_the_stored_logits(model: str) -> None:
    case = experiment(model, "logit_diff")
    stored = load_file(DATA / model / "batch.safetensors")
    for which in ("clean", "corrupt"):
        final = case.model.forward(stored[which]).final
        assert final is not None
        logits = case.model.unembed(final)[:, -1]
        stored_logits = stored[f"{which}_logits"]
        stored_logits = stored_logits if stored_logits.ndim == 2 else stored_logits[:, -1]
        assert float((logits - stored_logits).abs().max()) < 1e-4


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("model", MODELS)
def test_scores(model: str, name: str) -> None:
    method, metric = SCORES[name]
    case = experiment(model, metric)
    found = dict(zip(case.graph.edge_names(), method(case), strict=True))
    wanted = expected(model)["scores"][name]
    assert set(found) == set(wanted)
    largest = max(map(abs, wanted.values()))
    assert max(abs(found[edge] - wanted[edge]) for edge in wanted) < 1e-4 * largest


@pytest.mark.parametrize(("metric", "tau"), RUNS)
@pytest.mark.parametrize("model", MODELS)
def test_acdc_keeps_exactly_the_listed_edges(model: str, metric: str, tau: str) -> None:
    case = experiment(model, metric)
    wanted = expected(model)["acdc"][f"{metric}|{tau}"]
    circuit, _ = acdc(case, float(tau))
    assert set(circuit.edges()) == set(wanted["kept"])
    final = case.metric.sign * PatchedModel(case).metric(circuit.in_circuit)
    assert final == pytest.approx(wanted["final_metric"], abs=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_listed_circuits_have_the_listed_logit_differences(model: str) -> None:
    case = experiment(model, "logit_diff")
    patched = PatchedModel(case)
    for circuit in expected(model)["circuits_logit_diff"]:
        value = patched.metric(case.graph.edge_mask(circuit["edges"]))
        assert value == pytest.approx(circuit["logit_diff"], abs=1e-3)


def test_the_expected_numbers_are_no_trivial_ones() -> None:
    for model in MODELS:
        kept = [len(run["kept"]) for run in expected(model)["acdc"].values()]
        assert len(kept) == 8
        assert len(set(kept)) > 4
        scores = np.array([list(s.values()) for s in expected(model)["scores"].values()])
        assert (np.abs(scores) > 1e-3).mean() > 0.3
