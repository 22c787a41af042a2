"""Attribution over many latents: seconds of one core, bytes, and no array of pairs."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Cost:
    n_senders: int
    n_edges: int
    n_latents: int
    seconds: float
    n_bytes: int


def _cost(size: Size, n_latents: int, k: int) -> Cost:
    with random_model(size, "cpu") as model, Peak(CPU) as peak:
        started = time.process_time()
        experiment = with_dictionaries(model, size, n_latents, k)
        scores = eap(experiment)
        seconds = time.process_time() - started
    assert np.isfinite(scores).all()
    assert (scores != 0).any()
    assert peak.n_bytes is not None
    graph = experiment.graph
    n_kept = sum(len(a.latents) for a in experiment.attachments)
    return Cost(graph.n_senders, graph.n_edges, n_kept, seconds, peak.n_bytes)


def measured(size: Size, n_latents: int, k: int) -> Cost:
    """In a process of its own, whose memory no other test has torn into pieces.

    What is imported and compiled at first use is not counted: a small one goes before.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        small = Size(n_layers=1, d_model=8, n_heads=2, d_vocab=200, n_prompts=2)
        pool.submit(_cost, small, 16, 4).result()
        return pool.submit(_cost, size, n_latents, k).result()


def test_memory_is_far_below_an_array_of_pairs() -> None:
    size = Size(n_layers=3, d_model=64, n_heads=4, d_vocab=200, n_prompts=16)
    cost = measured(size, 4096, 16)
    assert cost.n_senders > 4000
    assert cost.n_bytes < cost.n_senders**2 * 4


@pytest.mark.slow
def test_20_000_latents_and_5_million_edges_in_two_minutes() -> None:
    cost = measured(Size(n_prompts=32), 3500, 48)
    print(
        f"{cost.n_latents:,} latents, {cost.n_edges:,} edges: "
        f"{cost.seconds:.0f} s, {cost.n_bytes / 2**30:.2f} GiB"
    )
    assert cost.n_latents >= 20_000
    assert cost.n_edges >= 4_500_000
    assert cost.seconds < 120
    assert cost.n_bytes < 4 << 30
