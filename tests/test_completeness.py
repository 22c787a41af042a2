"""Attribution on the bundled models: finite differences, and what integrated gradients add up to.


Completeness (Sundararajan et al. 2017): along a straight path of some variables alone, the
attributions of these variables add up to the difference of the metric between its ends.

* ``eap-ig`` and ``nap-ig`` go from one run's embeddings to the other's, so the edges out of the
  embeddings (the node ``input``) add up to the metric of the corrupt run less that of the clean
  one.  The other edges do not: inner activations do not move on straight lines there.
* ``eap-ig-activations`` moves one group of senders at a time (embeddings, the heads of a layer,
  an MLP), so the edges out of each group add up to the effect of ablating all of them.

What remains at 50 steps is the error of the sum that stands for the integral.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from oracle import Oracle

from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import metric_of_circuit
from acdc.methods.eap import Integration, eap_ig, eap_ig_activations
from acdc.methods.hisp import hisp
from acdc.methods.nap import nap, nap_ig
from acdc.models import load_model
from acdc.tasks import load_task
from acdc.tasks.base import Task
from graphs.graph import parse_node

STEPS = 50
TASKS = {"ioi-small": "ioi", "docstring-small": "docstring"}


def bundled(model: str, metric: str, n_prompts: int, **options: Any) -> Experiment:
    lowered, tokenizer = load_model(model)
    task = load_task(TASKS[model], tokenizer, n_prompts=n_prompts, seed=0)
    return Experiment(lowered, task, get_metric(metric), **options)


def gap(experiment: Experiment) -> float:
    """Change of the metric from the run that ablation starts from to the other one."""
    full, empty = experiment.plain("clean"), experiment.plain("corrupt")
    return empty - full if experiment.direction == "noising" else full - empty


@pytest.mark.parametrize(("metric", "direction"), [("logit_diff", "noising"), ("kl", "denoising")])
@pytest.mark.parametrize("model", TASKS)
def test_node_attribution_of_the_embeddings_is_complete(
    model: str, metric: str, direction: str
) -> None:
    experiment = bundled(model, metric, 16, direction=direction)
    found = nap_ig(experiment, Integration(STEPS))[experiment.graph.sender_index["input"]]
    assert abs(gap(experiment)) > 1
    assert found == pytest.approx(gap(experiment), rel=0.02)


@pytest.mark.parametrize("model", TASKS)
def test_edges_out_of_the_embeddings_are_complete(model: str) -> None:
    experiment = bundled(model, "logit_diff", 8)
    graph = experiment.graph
    scores = eap_ig(experiment, Integration(STEPS))
    from_input = graph.source[graph.edge_sender]
    assert scores[from_input].sum() == pytest.approx(gap(experiment), rel=0.02)
    assert abs(scores.sum() / gap(experiment)) > 1.5, "all edges are no such sum"


@pytest.mark.slow
@pytest.mark.parametrize("model", TASKS)
def test_edges_out_of_each_group_are_complete(model: str) -> None:
    experiment = bundled(model, "logit_diff", 16)
    graph = experiment.graph
    scores = eap_ig_activations(experiment, Integration(STEPS))
    full = metric_of_circuit(experiment, np.ones(graph.n_edges, dtype=bool))
    group = [parse_node(graph.senders[u])[:2] for u in graph.edge_sender]
    for name in dict.fromkeys(group):
        out = np.array([g == name for g in group])
        effect = metric_of_circuit(experiment, ~out) - full
        assert scores[out].sum() == pytest.approx(effect, abs=0.02 * abs(gap(experiment))), name


@pytest.mark.parametrize("model", TASKS)
def test_nodes_score_what_finite_differences_say(model: str) -> None:
    """Node attribution and HISP, of the nodes that score highest and of some others."""
    experiment = bundled(model, "logit_diff", 2)
    graph = experiment.graph
    alone = [replace(experiment, task=Task("one", (p,))) for p in experiment.task.pairs]
    slow = [Oracle(experiment.model, one.task, "logit_diff") for one in alone]
    scores, importance = nap(experiment), hisp(experiment)
    order = np.argsort(-np.abs(scores))
    for u in (*order[:5], *order[5::9]):
        edges = [e for e in graph.edge_names() if e.startswith(f"{graph.senders[u]}->")]
        found = np.array([derivative(oracle, edges) for oracle in slow])
        wanted = found.mean(), np.abs(found).mean()
        got = scores[u], importance[u]
        assert got == pytest.approx(wanted, abs=1e-3 * np.abs(scores).max()), graph.senders[u]


def derivative(slow: Oracle, edges: list[str], eps: float = 1e-2) -> float:
    """Derivative of the metric as some edges start to be ablated."""
    ends = {s: slow.metric(dict.fromkeys(edges, s * eps)) for s in (-2, -1, 1, 2)}
    return (8 * (ends[1] - ends[-1]) - (ends[2] - ends[-2])) / (12 * eps)
