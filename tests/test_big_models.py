"""What makes models of billions of parameters practical: nothing is held or computed twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import oracle as o
import pytest
import torch

from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import PatchedModel, alive_before_logits
from acdc.engine.stages import Heads
from acdc.methods.eap import eap
from acdc.models.lowering.model import LoweredModel


def experiment_of(family: str) -> Experiment:
    """A small random model on random prompts."""
    model, task = o.small_model(family, 0, n_layers=3), o.small_task(0)
    return Experiment(model, task, get_metric("logit_diff"))


@pytest.mark.parametrize("family", ["LN", "grouped rotary", "Qwen3"])
def test_weights_of_heads_are_views_of_the_models_own(family: str) -> None:
    """No second copy by head: a matrix of a head lies in that of all heads."""
    attention = o.small_model(family, 0).layers[0].attention
    for W in (*attention.W.values(), attention.W_O):
        assert W.untyped_storage().nbytes() >= len(W) * W[0].nbytes
        assert W._base is not None  # a view
    projected = attention.project("q", torch.ones(1, 3, attention.W["q"].shape[1]))
    assert projected.shape == (1, attention.n_heads, 3, attention.W["q"].shape[2])


@pytest.mark.parametrize("family", ["LN", "grouped rotary", "Qwen3", "Gemma2"])
def test_a_circuit_computes_its_living_heads_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads from which no kept path leads to the logits are not run, and do not change it."""
    experiment = experiment_of(family)
    graph, rng = experiment.graph, np.random.default_rng(1)
    mask = rng.random(graph.n_edges) < 0.08
    alive = alive_before_logits(graph, mask)
    ran: dict[int, list[int]] = {}
    compute = Heads.compute_heads

    def recorded(self: Heads, inputs: Any, heads: Any) -> Any:
        ran[self.layer] = list(heads)
        return compute(self, inputs, heads)

    monkeypatch.setattr(Heads, "compute_heads", recorded)
    few = PatchedModel(experiment).values(mask)
    for layer, heads in ran.items():
        names = [f"a{layer}.h{head}" for head in range(experiment.model.shape.n_heads)]
        assert heads == [h for h, name in enumerate(names) if alive[graph.senders.index(name)]]
    n_alive = sum(alive[i] for i, name in enumerate(graph.senders) if name.startswith("a"))
    assert n_alive < graph.shape.n_layers * graph.shape.n_heads
    monkeypatch.setattr("acdc.engine.patched.PatchedRun._heads", lambda self, stage: None)
    np.testing.assert_allclose(few, PatchedModel(experiment).values(mask), rtol=1e-5, atol=1e-6)


def _passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count passes through the model, of any number of prompts."""
    n = [0]
    forward = LoweredModel.forward

    def counted(self: LoweredModel, *args: Any, **options: Any) -> Any:
        n[0] += 1
        return forward(self, *args, **options)

    monkeypatch.setattr(LoweredModel, "forward", counted)
    return n


def test_passes_are_not_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """EAP runs both prompts once; a circuit needs one plain run, and what is frozen one more."""
    experiment = experiment_of("LN")
    _ = experiment.batches
    n, n_batches = _passes(monkeypatch), len(experiment.batches)
    eap(experiment)
    assert n[0] == 2 * n_batches
    patched, mask = PatchedModel(experiment), np.zeros(experiment.graph.n_edges, dtype=bool)
    patched.values(mask)
    assert n[0] == 3 * n_batches
    frozen = replace(experiment, norms="frozen")
    PatchedModel(frozen).values(mask)
    assert n[0] == 5 * n_batches
