"""Attribution over many latents: seconds of one core, bytes, and no array of pairs."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from acdc.dictionaries import Dictionary, Hook
from acdc.dictionaries.attach import attach
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.methods.eap import eap
from benchmarks.measure import Peak
from benchmarks.subjects import Size, random_model, random_task

CPU = torch.device("cpu")


def with_dictionaries(model: Any, size: Size, n_latents: int, k: int) -> Experiment:
    """Random top-k SAEs on every MLP."""
    generator = torch.Generator().manual_seed(0)
    plain = Experiment(model, random_task(size), get_metric("logit_diff"))
    found = []
    for layer in range(size.n_layers):
        W = torch.randn(n_latents, size.d_model, generator=generator) / size.d_model**0.5
        hook, zero = Hook(layer, "mlp_out"), torch.zeros(size.d_model)
        bias = torch.zeros(n_latents)
        found.append(Dictionary("topk", hook, hook, W.T.contiguous(), W, zero, b_enc=bias, k=k))
    return attach(plain, found).experiment


def measured(size: Size, n_latents: int, k: int) -> tuple[Experiment, float, int]:
    with random_model(size, "cpu") as model, Peak(CPU) as peak:
        started = time.process_time()
        experiment = with_dictionaries(model, size, n_latents, k)
        scores = eap(experiment)
        seconds = time.process_time() - started
    assert np.isfinite(scores).all()
    assert (scores != 0).any()
    assert peak.n_bytes is not None
    return experiment, seconds, peak.n_bytes


def test_memory_is_far_below_an_array_of_pairs() -> None:
    size = Size(n_layers=3, d_model=64, n_heads=4, d_vocab=200, n_prompts=16)
    experiment, _, n_bytes = measured(size, 4096, 16)
    n = experiment.graph.n_senders
    assert n > 4000
    assert n_bytes < n * n * 4


@pytest.mark.slow
def test_20_000_latents_and_5_million_edges_in_two_minutes() -> None:
    size = Size(n_prompts=32)
    experiment, seconds, n_bytes = measured(size, 3500, 48)
    latents = sum(len(a.latents) for a in experiment.attachments)
    print(
        f"{latents:,} latents, {experiment.graph.n_edges:,} edges: "
        f"{seconds:.0f} s, {n_bytes / 2**30:.2f} GiB"
    )
    assert latents >= 20_000
    assert experiment.graph.n_edges >= 4_500_000
    assert seconds < 120
    assert n_bytes < 4 << 30
