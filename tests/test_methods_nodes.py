"""Scores of nodes: against finite differences, against sums of edges, and as edges."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
from oracle import FAMILIES, Oracle
from test_attribution import STEP, build
from test_parity import experiment as parity_experiment

from acdc.engine.experiment import Experiment
from acdc.engine.work import Work
from acdc.errors import OptionError
from acdc.methods import METHODS, Score
from acdc.methods.eap import Integration, eap, eap_ig
from acdc.methods.hisp import hisp
from acdc.methods.nap import nap, nap_ig
from acdc.methods.select import edge_scores
from acdc.tasks.base import Task
from graphs import prune

STEPS = {"nap": 1, "nap-ig": 5, "hisp": 1}


def node_derivatives(slow: Oracle, eps: float = 1e-2) -> dict[str, float]:
    """Derivative of the metric as all edges out of a sender start to be ablated."""
    edges: dict[str, list[str]] = {}
    for edge in oracle.edges_in_acdc_order(slow.shape):
        edges.setdefault(edge.split("->")[0], []).append(edge)

    def central(sender: str, step: float) -> float:
        up, down = (slow.metric(dict.fromkeys(edges[sender], s)) for s in (step, -step))
        return (up - down) / (2 * step)

    return {u: (4 * central(u, eps) - central(u, 2 * eps)) / 3 for u in edges}


def by_name(experiment: Experiment, scores: np.ndarray) -> dict[str, float]:
    return dict(zip(experiment.graph.senders, scores.tolist(), strict=True))


def assert_close(found: dict[str, float], wanted: dict[str, float]) -> None:
    largest = max(map(abs, wanted.values()))
    assert largest > 1e-3, "the case shows nothing"
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert abs(found[name] - value) < 1e-3 * largest, name


@pytest.mark.parametrize("options", [{}, {"direction": "denoising", "intervention": "zero"}])
@pytest.mark.parametrize("family", FAMILIES)
def test_nap_is_the_derivative_of_ablating_a_node(family: str, options: dict[str, str]) -> None:
    experiment, slow = build(family, **options)
    eps = STEP.get(family, 3e-3)
    assert_close(by_name(experiment, nap(experiment)), node_derivatives(slow, eps))


@pytest.mark.parametrize("intervention", ["resample", "zero"])
def test_hisp_is_the_mean_absolute_derivative_of_the_prompts(intervention: str) -> None:
    task = oracle.small_task(3, 4, (4, 5))
    experiment, _ = build("LN", 3, task=task, intervention=intervention)
    alone = []
    for pair in task.pairs:
        one = Task("one", (pair,))
        slow = Oracle(experiment.model, one, "logit_diff", intervention)
        alone.append(node_derivatives(slow))
    wanted = {u: float(np.mean([abs(a[u]) for a in alone])) for u in alone[0]}
    found = by_name(experiment, hisp(experiment))
    assert_close(found, wanted)
    signed = by_name(experiment, nap(experiment))
    assert_close(signed, {u: float(np.mean([a[u] for a in alone])) for u in wanted})
    assert any(found[u] > 1.1 * abs(signed[u]) for u in found), "signs differ between prompts"


@pytest.mark.parametrize(
    ("nodes", "edges"),
    [(nap, eap), (lambda e: nap_ig(e, Integration(3)), lambda e: eap_ig(e, Integration(3)))],
    ids=["nap", "nap-ig"],
)
@pytest.mark.parametrize("options", [{}, {"split_embed": True}])
@pytest.mark.parametrize("family", ["LN", "grouped", "GPTNeoX", "Gemma2"])
def test_a_node_scores_what_the_edges_out_of_it_do(
    family: str, options: dict[str, bool], nodes: Callable[..., Any], edges: Callable[..., Any]
) -> None:
    experiment, _ = build(family, 2, **options)
    graph = experiment.graph
    sums = np.bincount(graph.edge_sender, edges(experiment), graph.n_senders)
    np.testing.assert_allclose(nodes(experiment), sums, atol=2e-6 * np.abs(sums).max())


@pytest.mark.parametrize("method", [nap, nap_ig, hisp], ids=lambda m: m.__name__)
def test_memory_bound_gives_the_same_scores(method: Callable[..., Any]) -> None:
    experiment = parity_experiment("ln2", "logit_diff")
    whole = method(experiment)
    np.testing.assert_allclose(method(experiment, work=Work(1)), whole, atol=1e-5)


# --- edges of nodes -----------------------------------------------------------------------


@pytest.mark.parametrize("ranking", ["absolute", "signed"])
@pytest.mark.parametrize("family", ["LN", "grouped", "GPTNeoX"])
def test_the_edges_of_a_set_of_nodes_are_those_between_them(family: str, ranking: str) -> None:
    experiment, _ = build(family, 1)
    graph = experiment.graph
    scores = np.random.default_rng(0).normal(size=graph.n_senders)
    ranked = np.abs(scores) if ranking == "absolute" else experiment.minimised_sign * scores
    edges = edge_scores(experiment, scores, ranking)
    ranked_edges = np.abs(edges) if ranking == "absolute" else experiment.minimised_sign * edges
    for n in range(1, graph.n_senders):
        chosen = np.argsort(-ranked)[:n]
        inside = {graph.senders[u] for u in chosen} | {"input", "logits"}
        between = [
            graph.senders[u] in inside
            and any(graph.nodes[node] in inside for node in graph.fed_by(v))
            for u, v in zip(graph.edge_sender, graph.edge_receiver, strict=True)
        ]
        cut = ranked[chosen[-1]]
        np.testing.assert_array_equal(ranked_edges >= cut, between)


def test_edge_scores_by_hand() -> None:
    experiment = parity_experiment("ln2", "logit_diff")
    graph = experiment.graph
    scores = np.full(graph.n_senders, 1.0)
    for name, value in {"a0.h0": 5.0, "a1.h1": -3.0, "m0": -7.0, "input": 0.0}.items():
        scores[graph.sender_index[name]] = value
    edges = edge_scores(experiment, scores)
    for name, value in {
        "a0.h0->a1.h1<q>": -3.0, "a0.h0->a1.h1<v>": -3.0, "a0.h0->m0": 5.0, "a0.h0->logits": 5.0,
        "input->a1.h1<k>": -3.0, "input->logits": -7.0, "m0->m1": 1.0,
    }.items():  # fmt: skip
        assert edges[graph.edge_index(name)] == value, name


@pytest.mark.parametrize("name", STEPS)
def test_circuits(name: str) -> None:
    experiment = parity_experiment("ln2", "logit_diff")
    method = METHODS[name]
    counted: list[int] = []
    found = method.find(experiment, Work(progress=counted.append), n_edges=60)
    assert sum(counted) == method.n_units(experiment) == 24 * STEPS[name]
    assert 0 < found.circuit.n_edges <= 60
    np.testing.assert_array_equal(
        prune(experiment.graph, found.circuit.in_circuit), found.circuit.in_circuit
    )
    assert list(found.details["node_scores"]) == list(experiment.graph.senders)
    assert found.details["ranking"] == "absolute"
    by_sign = {"n_edges": 60, "ranking": "signed"}
    if method.score is not Score.MAGNITUDE:
        found = method.find(experiment, **by_sign)
        assert found.details["ranking"] == "signed"
    else:
        with pytest.raises(OptionError, match="scores without a sign"):
            method.find(experiment, **by_sign)


def test_same_prompts_have_no_scores() -> None:
    experiment, _ = build("LN", 2)
    pairs = tuple(dataclasses.replace(p, corrupt=p.clean) for p in experiment.task.pairs)
    same = dataclasses.replace(experiment, task=Task("same", pairs))
    assert not nap(same).any()
    assert not hisp(same).any()
