"""ACDC on latents, neurons, transcoders and cuts against a slow search that knows no increments.

The slow search runs the whole model, patched, for every edge; these runs are held against a pass
in which every edge is explicit in ``test_latents.py``, and some searches are here, too.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch
from grids import each_level
from oracle import sequential_acdc, small_model, small_task
from test_latents import FLOAT32_INSIDE, build

from acdc.dictionaries.attach import attach_neurons
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import PatchedModel
from acdc.methods.acdc import acdc
from acdc.settings import Direction
from graphs.order import edge_order, receiver_order

KINDS = ("outputs", "transcoders", "cuts", "neurons")
TAU = 0.02


class Patched:
    """An experiment as an oracle: edges by name, every evaluation a whole patched pass."""

    def __init__(self, experiment: Experiment) -> None:
        self.graph, self._patched = experiment.graph, PatchedModel(experiment)
        self.sign = experiment.minimised_sign
        graph = self.graph
        order = [edge_order(graph, v) for v in receiver_order(graph)]
        self.edges = graph.edge_names(np.concatenate(order))

    def without(self, edges: Any) -> float:
        return self._patched.metric(~self.graph.edge_mask(edges))


def experiment_of(kind: str, family: str = "LN", metric: str = "logit_diff", **options: Any) -> Any:
    """Return an experiment with dictionaries, or neurons, on a small random model."""
    if kind != "neurons":
        return build(family, kind, metric, **options)[0]
    dtype = torch.float32 if family in FLOAT32_INSIDE else torch.float64
    split = options.pop("split_qkv", True)
    model = small_model(family, 0, dtype=dtype, split_qkv=split)
    plain = Experiment(model, small_task(0, 3), get_metric(metric), **options)
    return attach_neurons(plain, max_neurons=9).experiment


def check(experiment: Experiment, tau: float = TAU) -> None:
    """Compare a search with the slow one: which edges stay, and what each changes."""
    wanted = sequential_acdc(Patched(experiment), tau)
    exact = experiment.model.dtype == torch.float64
    assert wanted.margin > (1e-7 if exact else 3e-6), "a tie: choose another tau"
    circuit, work = acdc(experiment, tau)
    assert set(circuit.edges()) == wanted.kept
    assert 0 < circuit.n_edges < experiment.graph.n_edges
    names = experiment.graph.edge_names()
    changes = [wanted.changes[name] for name in names]
    np.testing.assert_allclose(circuit.scores, changes, atol=1e-7 if exact else 1e-5)
    assert work.n_nodes > 0


ABLATIONS = tuple(product(("resample", "zero", "mean", "mean-positional"), get_args(Direction)))


@pytest.mark.parametrize(("kind", "ablation"), each_level(KINDS, ABLATIONS))
def test_every_kind_of_node_and_ablation(kind: str, ablation: tuple[str, Direction]) -> None:
    intervention, direction = ablation
    check(experiment_of(kind, intervention=intervention, direction=direction))


@pytest.mark.parametrize(
    ("family", "kind"), each_level(["grouped rotary", "GPTNeoX", "Gemma2"], KINDS)
)
def test_families(family: str, kind: str) -> None:
    """Shared keys and values, parallel blocks, post-norms."""
    check(experiment_of(kind, family, metric="kl"), tau=0.002)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_ablation_with_post_norms(kind: str) -> None:
    check(experiment_of(kind, "Gemma2", intervention="zero"))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_not_split(kind: str) -> None:
    """One receiver per head, or per head and per group of keys and values."""
    check(experiment_of(kind, "LN", metric="kl", split_qkv=False), tau=0.002)
    check(experiment_of(kind, "grouped rotary", split_qkv=False), tau=0.003)


@pytest.mark.parametrize(("kind", "family", "intervention"), [
    ("outputs", "LN", "resample"), ("transcoders", "Gemma2", "zero"), ("cuts", "LN", "zero"),
    ("neurons", "Gemma2", "resample"),
])  # fmt: skip
def test_candidates_alone(kind: str, family: str, intervention: str) -> None:
    """The search starts from the circuit of all candidates, the other edges being ablated."""
    whole = experiment_of(kind, family, intervention=intervention)
    some = np.random.default_rng(2).random(whole.graph.n_edges) < 0.5
    check(replace(whole, candidates=some), tau=0.003)
