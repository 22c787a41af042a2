"""Low precision gives the circuits of float32; a GPU gives those of the CPU."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_parity import DATA, experiment

from acdc.engine.experiment import Experiment
from acdc.methods.acdc import acdc
from acdc.methods.eap import eap, eap_ig
from acdc.methods.sweep import sweep
from acdc.models import load_model
from acdc.runs.building import build_experiment
from acdc.runs.checks import check_settings
from acdc.runs.discover import discover
from acdc.settings import Settings
from graphs import Circuit

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


@functools.cache
def bundled(metric: str, dtype: str) -> Experiment:
    settings = Settings("ioi", metric=metric, n_prompts=8, dtype=dtype)
    return build_experiment(check_settings(settings))


def differing(a: Circuit, b: Circuit) -> int:
    return int((a.in_circuit != b.in_circuit).sum())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_gives_the_circuits_of_float32(dtype: str) -> None:
    """The referee's part shows in that the same runs without it differ."""
    without_referee = 0
    for metric in ("logit_diff", "kl"):
        exact, low = bundled(metric, "float32"), bundled(metric, dtype)
        gap = abs(exact.plain("clean") - exact.plain("corrupt"))
        for tau in (0.01 * gap, 0.003 * gap):
            wanted, _ = acdc(exact, tau)
            found, work = acdc(low, tau)
            assert differing(found, wanted) == 0
            assert 16 <= work.n_reviewed < work.n_decisions
            alone, blind = acdc(replace(low, in_float32=None), tau)
            assert blind.n_reviewed == 0
            without_referee += differing(alone, wanted)
    assert without_referee > 0


def test_float32_needs_no_referee() -> None:
    exact = bundled("kl", "float32")
    assert exact.in_float32 is None
    assert acdc(exact, 0.1)[1].n_reviewed == 0


@pytest.mark.parametrize("two_sided", [False, True])
def test_a_low_precision_sweep_gives_the_circuits_of_float32(two_sided: bool) -> None:
    exact, low = bundled("logit_diff", "float32"), bundled("logit_diff", "bfloat16")
    gap = abs(exact.plain("clean") - exact.plain("corrupt"))
    taus = [0.03 * gap, 0.01 * gap, 0.003 * gap]
    circuits, work = sweep(low, taus, two_sided=two_sided)
    assert work.n_reviewed > 0
    for tau in taus:
        assert differing(circuits[tau], acdc(exact, tau, two_sided=two_sided)[0]) == 0


def test_run_json_counts_what_float32_decided() -> None:
    run = discover("ioi", n_prompts=4, threshold=0.05, dtype="bfloat16")
    work = run.details["work"]
    assert work["n_reviewed"] >= 16
    assert work["n_overruled"] <= work["n_reviewed"]


@gpu
@pytest.mark.parametrize("model", ["ln2", "attn3"])
@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
def test_cuda_gives_the_results_of_the_cpu(model: str, metric: str) -> None:
    cpu = experiment(model, metric)
    cuda = replace(cpu, model=load_model(str(DATA / model), device="cuda")[0])
    for method in (eap, eap_ig):
        scores, wanted = method(cuda), method(cpu)
        assert np.abs(scores - wanted).max() < 1e-4 * np.abs(wanted).max()
    for tau in (0.001, 0.01, 0.05, 0.2):
        assert differing(acdc(cuda, tau)[0], acdc(cpu, tau)[0]) == 0


@gpu
def test_low_precision_on_cuda() -> None:
    settings = Settings("ioi", n_prompts=8, dtype="bfloat16", device="cuda")
    low, exact = build_experiment(check_settings(settings)), bundled("logit_diff", "float32")
    gap = abs(exact.plain("clean") - exact.plain("corrupt"))
    assert differing(acdc(low, 0.01 * gap)[0], acdc(exact, 0.01 * gap)[0]) == 0
