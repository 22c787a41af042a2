"""The search for a threshold that keeps a number of edges: what it returns, and how soon."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import quick
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.methods import METHODS, sizes
from acdc.methods.acdc import acdc
from acdc.methods.base import Found
from acdc.models import load_model
from acdc.tasks import load_task
from graphs import Circuit, Graph

Changes = Callable[[float], NDArray[np.float64]]


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    model, tokenizer = load_model(quick.MODELS["docstring"])
    return Experiment(
        model, load_task("docstring", tokenizer, n_prompts=16), get_metric("logit_diff")
    )


@pytest.fixture(scope="module")
def graph(experiment: Experiment) -> Graph:
    return experiment.graph


def search(graph: Graph, changes: Changes, n_edges: int) -> tuple[Circuit, list[float]]:
    """Let a formula say what the removal of each edge changes at a tau; return the taus, too."""
    tried: list[float] = []

    def circuit(tau: float) -> Circuit:
        return Circuit(graph, changes(tau), changes(tau) >= tau, {"threshold": tau})

    def run(tau: float) -> Found:
        tried.append(tau)
        return Found(circuit(tau))

    return sizes.of_size(1.0, n_edges, run, None).circuit, tried


@pytest.mark.parametrize("n_edges", [1, 7, 100, 500])
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_changes_that_do_not_depend_on_tau_say_where_it_is(
    graph: Graph, n_edges: int, spread: float
) -> None:
    rng = np.random.default_rng(0)
    changes = np.exp(spread * rng.normal(size=graph.n_edges) - 6)
    circuit, tried = search(graph, lambda _: changes, n_edges)
    assert 0.98 * n_edges <= circuit.n_edges <= n_edges
    assert len(tried) <= 4


def test_scores_say_where_to_begin(graph: Graph) -> None:
    """A third of the edges expected stay at first: three times as many are to be expected."""
    scores = np.linspace(1, 0, graph.n_edges)
    tried = sizes._Sizes(1.0, 30, -scores)
    assert np.count_nonzero(scores > tried.tau) == 30
    few = scores > scores[10]
    tried.add(Circuit(graph, np.where(few, scores, 0), few))
    assert np.count_nonzero(scores > tried.tau) == pytest.approx(90, abs=2)


@pytest.mark.parametrize("n_edges", [30, 300])
def test_changes_that_depend_on_tau_take_a_few_more(graph: Graph, n_edges: int) -> None:
    def changes(tau: float) -> NDArray[np.float64]:
        other = np.random.default_rng(int(1e9 * tau)).normal(size=graph.n_edges)
        return np.exp(always + 0.3 * other)

    always = 2 * np.random.default_rng(0).normal(size=graph.n_edges) - 6
    circuit, tried = search(graph, changes, n_edges)
    assert circuit.n_edges <= n_edges
    assert circuit.n_edges >= 0.98 * n_edges or len(tried) <= sizes.MOST
    assert len(tried) <= 12


def test_a_number_that_no_tau_keeps_ends_the_search(graph: Graph) -> None:
    """Edges with equal changes stay or go together: the largest circuit that is small enough."""
    changes = np.where(np.arange(graph.n_edges) < 20, 0.5, np.where(
        np.arange(graph.n_edges) < 90, 0.01, 0.0))  # fmt: skip
    circuit, tried = search(graph, lambda _: changes, 60)
    assert circuit.n_edges == 20
    taken = circuit.info["threshold"]
    assert taken <= 1.01 * max(tau for tau in tried if tau < taken)
    assert len(tried) <= sizes.MOST


def test_bounds_end_the_search(graph: Graph) -> None:
    everything = np.ones(graph.n_edges)
    circuit, tried = search(graph, lambda _: everything, graph.n_edges + 5)
    assert circuit.n_edges == graph.n_edges
    assert len(tried) <= 6
    circuit, _ = search(graph, lambda _: np.full(graph.n_edges, 9.0), 5)
    assert circuit.n_edges == graph.n_edges  # no tau is large enough: that of the largest
    assert circuit.info["threshold"] == 2.0


def test_the_circuit_is_that_of_its_tau_and_takes_few_searches(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, begins = list[int](), list[bool]()
    add = sizes._Sizes.add

    def counting(self: sizes._Sizes, circuit: Circuit) -> None:
        whole.append(circuit.n_edges)
        begins.append(self._scores is not None)
        add(self, circuit)

    monkeypatch.setattr(sizes._Sizes, "add", counting)
    found = METHODS["acdc"].find(experiment, n_edges=40)
    assert 40 >= found.circuit.n_edges >= 0.98 * 40
    assert len(whole) <= 9  # 12 whole ones, where tau was bisected; four of these are rough
    assert begins[0]  # where scores say
    alone, _ = acdc(experiment, found.details["threshold"])
    np.testing.assert_array_equal(alone.in_circuit, found.circuit.in_circuit)


def test_prompts_that_do_not_differ_end_at_once(graph: Graph) -> None:
    tried: list[float] = []

    def run(tau: float) -> Found:
        tried.append(tau)
        return Found(Circuit(graph, np.zeros(graph.n_edges), np.ones(graph.n_edges, dtype=bool)))

    sizes.of_size(0.0, 5, run, pytest.fail)  # and no rough search
    assert tried == [0.0]
