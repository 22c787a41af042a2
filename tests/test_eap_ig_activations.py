"""Integrated gradients over activations: each group of senders adds up to its own effect."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from grids import each_level
from test_parity import experiment as parity_experiment

from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import metric_of_circuit
from acdc.engine.work import Work
from acdc.methods.eap import Integration, eap, eap_ig, eap_ig_activations
from graphs.graph import parse_node


def group_of(sender: str) -> tuple[str, int]:
    return parse_node(sender)[:2]


@pytest.mark.parametrize(
    ("name", "intervention"),
    each_level(["ln2", "attn3"], ["resample", "zero", "mean", "mean-positional"]),
)
def test_edges_out_of_a_group_add_up_to_its_effect(name: str, intervention: str) -> None:
    experiment = replace(parity_experiment(name, "logit_diff"), intervention=intervention)
    graph = experiment.graph
    scores = eap_ig_activations(experiment, Integration(100))
    full = metric_of_circuit(experiment, np.ones(graph.n_edges, dtype=bool))
    groups = np.array([hash(group_of(graph.senders[u])) for u in graph.edge_sender])
    for group in {group_of(s) for s in graph.senders}:
        if (intervention, group[0]) == ("zero", "input"):
            continue  # the norms are singular where the whole stream is zero: no sum converges
        out = groups == hash(group)
        effect = metric_of_circuit(experiment, ~out) - full
        assert scores[out].sum() == pytest.approx(effect, abs=0.02 * abs(effect) + 0.02)


@pytest.mark.parametrize("memory", [1, 1 << 16, 1 << 22])
def test_memory_bound_gives_the_same_scores(memory: int) -> None:
    """Parts of one prompt and one token give the same sums."""
    experiment = parity_experiment("attn3", "kl")
    for method in (
        eap,
        lambda e, **k: eap_ig(e, Integration(3), **k),
        lambda e, **k: eap_ig_activations(e, Integration(2), **k),
    ):
        whole = method(experiment)
        parts = method(experiment, work=Work(memory))
        np.testing.assert_allclose(parts, whole, atol=1e-5 * max(np.abs(whole).max(), 1e-3))


@pytest.mark.parametrize("family", ["Gemma2", "GPTNeoX", "grouped"])
def test_families_add_up(family: str) -> None:
    """Post-norms, parallel blocks and grouped heads: edges out of the last heads."""
    model = oracle.small_model(family, 3)
    experiment = Experiment(model, oracle.small_task(3), get_metric("logit_diff"))
    graph = experiment.graph
    last = f"a{model.shape.n_layers - 1}."
    out = np.array([graph.senders[u].startswith(last) for u in graph.edge_sender])
    scores = eap_ig_activations(experiment, Integration(100))
    full = metric_of_circuit(experiment, np.ones(graph.n_edges, dtype=bool))
    effect = metric_of_circuit(experiment, ~out) - full
    assert scores[out].sum() == pytest.approx(effect, abs=0.02 * abs(effect) + 0.02)
