"""Latents, neurons and transcoders in graphs split by positions, against a slow explicit pass."""

from __future__ import annotations

from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch
from grids import each_level
from latent_oracle import NEURON_INPUTS, NEURONS, LatentOracle, place
from oracle import labelled, sequential_acdc, small_model, small_task
from test_latents import FLOAT32_INSIDE, IDS, dictionaries_of, tolerance

from acdc.dictionaries.attach import attach, attach_neurons
from acdc.engine.attribution import node_scores
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import PatchedModel
from acdc.engine.work import Work
from acdc.measure.error_nodes import error_edges
from acdc.methods.acdc import acdc
from acdc.methods.eap import Integration, between_inputs, eap, eap_ig
from acdc.methods.exact import exact
from acdc.methods.sweep import sweep
from acdc.settings import Direction
from acdc.tasks.positions import find_positions
from graphs.order import edge_order, receiver_order

KINDS = ("outputs", "transcoders", "cuts", NEURONS, NEURON_INPUTS)
ABLATIONS = tuple(product(("resample", "zero", "mean", "mean-positional"), get_args(Direction)))


def build(
    kind: str, family: str = "LN", positions: str | None = "span", metric: str = "logit_diff",
    **options: Any,
) -> tuple[Experiment, LatentOracle]:  # fmt: skip
    """Return a split experiment with few latents or neurons of every layer, and its oracle."""
    dtype = torch.float32 if family in FLOAT32_INSIDE else torch.float64
    model = small_model(family, 0, dtype=dtype)
    lengths = (4,) if positions == "token" else (4, 5)
    task = labelled(small_task(0, 3, lengths), 0)
    causal = all(layer.attention.causal for layer in model.layers)
    split = None if positions is None else find_positions(task, positions, causal=causal)
    plain = Experiment(model, task, get_metric(metric), positions=split, **options)
    nodes: dict[str, Any]
    if kind in (NEURONS, NEURON_INPUTS):
        ids = {layer: (1, 4 + layer) for layer in range(model.shape.n_layers)}
        found = attach_neurons(plain, neurons=ids, alone=kind == NEURON_INPUTS).experiment
        nodes = {f"m{layer}": (kind, some) for layer, some in ids.items()}
    else:
        dictionaries, some = dictionaries_of(model, kind), IDS[:2]
        found = attach(plain, dictionaries, latents=[some] * len(dictionaries)).experiment
        nodes = {place(d): (d, some) for d in dictionaries}
    return found, LatentOracle(model, task, metric, nodes, positions=positions, **options)


@pytest.mark.parametrize("family", ["LN", "grouped rotary", "GPTNeoX", "Gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_node_in_gives_the_model_and_masks_the_oracle(kind: str, family: str) -> None:
    for positions in ("span", "token"):
        experiment, slow = build(kind, family, positions)
        graph, close = experiment.graph, tolerance(experiment)
        order = [e for v in receiver_order(graph) for e in graph.edge_names(edge_order(graph, v))]
        assert order == slow.edges
        patched = PatchedModel(experiment)
        every = np.ones(graph.n_edges, dtype=bool)
        assert patched.metric(every) == pytest.approx(experiment.plain("clean"), abs=close)
        assert patched.metric(~every) == pytest.approx(experiment.plain("corrupt"), abs=close)
        rng = np.random.default_rng(1)
        for part in (0.1, 0.5, 0.9):
            mask = rng.random(graph.n_edges) < part
            wanted = slow.without(graph.edge_names(np.flatnonzero(~mask)))
            assert patched.metric(mask) == pytest.approx(wanted, abs=close)


@pytest.mark.parametrize(("kind", "ablation"), each_level(KINDS, ABLATIONS))
def test_circuits_under_every_ablation(kind: str, ablation: tuple[str, str]) -> None:
    """Random circuits, EAP and a search."""
    intervention, direction = ablation
    experiment, slow = build(kind, intervention=intervention, direction=direction)
    graph = experiment.graph
    mask = np.random.default_rng(2).random(graph.n_edges) < 0.6
    wanted = slow.without(graph.edge_names(np.flatnonzero(~mask)))
    assert PatchedModel(experiment).metric(mask) == pytest.approx(wanted, abs=1e-7)
    derivatives = slow.derivatives()
    np.testing.assert_allclose(eap(experiment), [derivatives[e] for e in graph.edge_names()],
                               atol=1e-7)  # fmt: skip
    check_acdc(experiment, slow, 0.02)


def check_acdc(experiment: Experiment, slow: LatentOracle, tau: float) -> None:
    """Compare edges, changes and the metric with those of the sequential search."""
    exactly = experiment.model.dtype == torch.float64
    close = 1e-7 if exactly else 1e-5
    wanted = sequential_acdc(slow, tau)
    assert wanted.margin > (1e-7 if exactly else 3e-6), "a tie: choose another tau"
    circuit, _ = acdc(experiment, tau)
    assert set(circuit.edges()) == wanted.kept
    assert 0 < circuit.n_edges < experiment.graph.n_edges
    found = dict(zip(experiment.graph.edge_names(), circuit.scores, strict=True))
    assert found == pytest.approx(wanted.changes, abs=close)
    value = PatchedModel(experiment).metric(circuit.in_circuit)
    assert value == pytest.approx(wanted.metric, abs=close)


@pytest.mark.parametrize(
    ("family", "kind"), each_level(["grouped rotary", "GPTNeoX", "Gemma2"], KINDS)
)
def test_acdc_in_other_families(family: str, kind: str) -> None:
    experiment, slow = build(kind, family, metric="kl")
    check_acdc(experiment, slow, 0.002)


@pytest.mark.parametrize("kind", ["outputs", "transcoders", NEURONS])
def test_acdc_by_token_and_its_sweep(kind: str) -> None:
    experiment, slow = build(kind, positions="token")
    check_acdc(experiment, slow, 0.02)
    circuits, _ = sweep(experiment, (0.02, 0.1))
    assert set(circuits[0.02].edges()) == set(acdc(experiment, 0.02)[0].edges())


@pytest.mark.parametrize("kind", KINDS)
def test_exact_is_one_patch_per_edge(kind: str) -> None:
    experiment, slow = build(kind)
    base, found = slow.without(()), exact(experiment)
    for e in np.random.default_rng(0).choice(len(found), 40, replace=False):
        wanted = slow.without([experiment.graph.edge_name(e)]) - base
        assert found[e] == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("family", ["LN", "grouped rotary", "GPTNeoX", "Gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_eap_is_the_derivative_of_ablating_an_edge(kind: str, family: str) -> None:
    experiment, slow = build(kind, family)
    wanted = slow.derivatives()
    largest = max(map(abs, wanted.values()))
    assert largest > 1e-2
    part = 1e-6 if experiment.model.dtype == torch.float64 else 1e-3
    names = experiment.graph.edge_names()
    for memory in (1 << 30, 1 << 12):
        for edge, score in zip(names, eap(experiment, work=Work(memory=memory)), strict=True):
            assert abs(score - wanted[edge]) < part * largest, edge


@pytest.mark.parametrize("kind", KINDS)
def test_a_nodes_score_is_the_sum_of_its_edges(kind: str) -> None:
    experiment, _ = build(kind, "Gemma2")
    edges = eap_ig(experiment, Integration(3))
    total = np.bincount(experiment.graph.edge_sender, edges, experiment.graph.n_senders)
    nodes = node_scores(experiment, between_inputs(experiment, 3), 3)
    np.testing.assert_allclose(nodes, total, atol=2e-5 * np.abs(nodes).max())


def test_latents_are_chosen_whatever_the_positions() -> None:
    model = small_model("LN", 0, dtype=torch.float64)
    task = labelled(small_task(0, 3), 0)
    plain = Experiment(model, task, get_metric("logit_diff"))
    split = Experiment(
        model, task, get_metric("logit_diff"), positions=find_positions(task, "span")
    )
    for give in (
        lambda e: attach_neurons(e, max_neurons=5),
        lambda e: attach(e, dictionaries_of(model, "transcoders"), max_latents=5),
    ):
        one, other = give(plain), give(split)
        assert one.experiment.components.senders == other.experiment.components.senders
        assert one.folded_share == pytest.approx(other.folded_share)
        names = np.array(other.experiment.graph.edge_names())
        assert set(names[error_edges(other.experiment.graph)]) == {e for e in names if ".err" in e}
