"""Tests of circuits: p-values by hand, a toy by theory, a compiled model's true circuit."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from test_compiled import experiment

from acdc.errors import OptionError
from acdc.evidence.verdicts import (
    TESTS,
    Candidate,
    Judgement,
    Trials,
    completeness,
    equivalence,
    equivalence_p_value,
    hsic_test,
    independence,
    judge,
    mean_above_p_value,
    minimality,
    n_evaluations,
    necessity,
    sufficiency,
)
from acdc.measure.evaluation import Evaluator
from benchmarks.compiled import MODELS
from graphs import GraphShape, component_graph, read_reference
from graphs.sample import PathSampler

Mask = NDArray[np.bool_]

# --- p-values -----------------------------------------------------------------------------


def test_equivalence_p_value_by_hand() -> None:
    assert equivalence_p_value(10, 10, 0.1) == pytest.approx(0.6**10 + 0.4**10)
    assert equivalence_p_value(0, 10, 0.1) == pytest.approx(0.6**10 + 0.4**10)
    assert equivalence_p_value(5, 10, 0.1) == pytest.approx(1)
    one_off = sum(stats.binom.pmf(k, 4, 0.7) for k in (0, 1, 3, 4))
    assert equivalence_p_value(3, 4, 0.2) == pytest.approx(one_off)
    assert equivalence_p_value(2.5, 4, 0.2) == pytest.approx(one_off)  # a tie is half a win


def test_equivalence_p_value_holds_its_level() -> None:
    """At the worst odds of H0 it rejects at most alpha of all samples."""
    n, epsilon = 40, 0.1
    p_values = np.array([equivalence_p_value(k, n, epsilon) for k in range(n + 1)])
    for odds in (0.4, 0.5, 0.6):
        assert stats.binom.pmf(np.arange(n + 1), n, odds)[p_values < 0.05].sum() < 0.05


def test_hsic_sees_dependence_without_correlation() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, 60)
    assert hsic_test(x, x**2, 200, rng) == pytest.approx(1 / 201)


def test_hsic_holds_its_level() -> None:
    rng = np.random.default_rng(1)
    found = [hsic_test(rng.normal(size=15), rng.normal(size=15), 59, rng) for _ in range(200)]
    assert 0.01 <= np.mean(np.array(found) <= 0.05) <= 0.1
    assert np.mean(found) == pytest.approx(0.5, abs=0.07)


def test_a_mean_is_tested_by_bets() -> None:
    """One value of twice the bound: 20 bettors of stakes 0.05 to 1 win 0.525 of what they own."""
    assert mean_above_p_value(np.array([0.2]), 0.1) == pytest.approx(1 / 1.525)
    both = np.mean([(1 + w) * (1 - w) for w in np.arange(1, 21) / 20])
    assert both < 1
    assert mean_above_p_value(np.array([0.2, 0]), 0.1) == pytest.approx(1 / 1.525)
    assert mean_above_p_value(np.array([0, 0.2]), 0.1) == 1  # nobody was ever ahead
    assert mean_above_p_value(np.full(9, 0.1), 0.1) == 1
    assert mean_above_p_value(np.full(2, 1e300), 1e-9) == 0
    assert np.isnan(mean_above_p_value(np.array([np.nan]), 0.1))


def test_the_bets_hold_their_level_where_a_t_test_does_not() -> None:
    """19 of 20 values a little above the mean: a third of all samples never see the others."""
    rng = np.random.default_rng(0)
    samples = (rng.random((400, 20)) < 0.95) * 0.1 / 0.95
    spread = np.ptp(samples, axis=1) > 0
    t_test = stats.ttest_1samp(samples[spread], 0.1, axis=1, alternative="greater").pvalue
    assert (~spread).sum() + (t_test < 0.05).sum() > 100
    assert sum(mean_above_p_value(sample, 0.1) < 0.05 for sample in samples) <= 20


# --- a toy: every edge adds what it weighs ------------------------------------------------


SHAPE = GraphShape(2, 2)


class Additive:
    """An evaluator of a model whose metric is a sum over its edges: all is known by hand."""

    def __init__(
        self, weights: NDArray[np.float64], base: NDArray[np.float64], shape: GraphShape = SHAPE
    ) -> None:
        """Take ``weights [prompt, edge]`` and ``base [prompt]``."""
        self.weights, self.base = weights, base
        graph = component_graph(shape)
        assert weights.shape == (len(base), graph.n_edges)
        metric = SimpleNamespace(name="toy")
        self.experiment: Any = SimpleNamespace(graph=graph, metric=metric)
        self.calls = 0
        every = np.ones(graph.n_edges, dtype=bool)
        self.full_values, self.empty_values = self.values(every), self.values(~every)
        self.full, self.empty = self.full_values.mean(), self.empty_values.mean()
        self.has_gap = self.full != self.empty

    def values(self, mask: Mask) -> NDArray[np.float64]:
        self.calls += 1
        return self.base + self.weights @ mask


N_PROMPTS = 40


@cache
def toy() -> tuple[Any, Mask]:
    """A model that uses six edges, and these."""
    graph = component_graph(GraphShape(2, 2))
    rng = np.random.default_rng(5)
    names = "input->a0.h0<v> a0.h0->m0 m0->a1.h1<v> a1.h1->logits m0->m1 m1->logits"
    truth = graph.edge_mask(names.split())
    weights = truth * rng.normal(1, 0.3, (N_PROMPTS, graph.n_edges))
    weights[:, graph.edge_index("m0->m1")] *= 2
    return Additive(weights, rng.normal(0, 0.1, N_PROMPTS)), truth


TRIALS = Trials(tolerance=0.05, n_random=60, n_permutations=200, n_knockouts=20)


@cache
def toy_judgement(which: str) -> Judgement:
    evaluator, truth = toy()
    graph = evaluator.experiment.graph
    mask = {
        "truth": truth,
        "cut": truth & ~graph.edge_mask(["m0->m1"]),
        "more": truth | graph.edge_mask(["input->logits"]),
        "random": PathSampler(graph).circuit(int(truth.sum()), np.random.default_rng(0)),
        "full": np.ones(graph.n_edges, dtype=bool),
        "empty": np.zeros(graph.n_edges, dtype=bool),
        "loose": graph.edge_mask(["m0->m1"]),
    }[which]
    return judge(evaluator, mask, TRIALS)


THEORY = {
    #          equivalence independence sufficiency necessity minimality completeness
    "truth": (True, True, True, True, True, True),
    "cut": (False, False, True, True, True, False),
    "more": (True, True, True, True, False, True),
    "random": (False, False, False, False, False, False),
    "full": (True, True, None, None, None, True),
    "empty": (False, False, None, None, None, None),
}


@pytest.mark.parametrize("which", THEORY)
def test_verdicts_of_theory(which: str) -> None:
    judgement = toy_judgement(which)
    said = {verdict.test: verdict.passed for verdict in judgement.verdicts}
    assert said == dict(zip(TESTS, THEORY[which], strict=True)), judgement.verdicts


def test_the_edges_of_minimality() -> None:
    evaluator, truth = toy()
    edges = toy_judgement("more").edges
    assert (edges[0].edge, edges[0].effect, edges[0].surpassed) == ("input->logits", 0, 0)
    assert edges[0].p_value == pytest.approx(0.1**60)
    for edge in edges[1:]:
        index = evaluator.experiment.graph.edge_index(edge.edge)
        assert edge.effect == pytest.approx(np.square(evaluator.weights[:, index]).mean())
        assert (edge.surpassed, edge.p_value) == (1, pytest.approx(1))
    assert toy_judgement("more")["minimality"].level == pytest.approx(0.05 / 7)
    few = minimality(Candidate(evaluator, truth), Trials(n_edges=2))[1]
    assert len(few) == 2


def test_the_complement_and_the_knockouts() -> None:
    evaluator, _ = toy()
    cut = toy_judgement("cut")
    index = evaluator.experiment.graph.edge_index("m0->m1")
    missing = evaluator.weights[:, index].mean() / (evaluator.full - evaluator.empty)
    assert cut.complement == pytest.approx(missing)
    assert toy_judgement("truth").complement == pytest.approx(0, abs=1e-9)
    for knockout in cut.knockouts:  # what both lose is the same; the missing edge leaves m0
        assert knockout.difference == pytest.approx(0 if "m0" in knockout.nodes else missing)
    worst = [knockout.difference for knockout in cut.knockouts]
    assert worst == sorted(worst, reverse=True)
    assert "at most" in cut["completeness"].says


def test_progress_counts_every_evaluation() -> None:
    evaluator, truth = toy()
    for mask in (truth, np.ones_like(truth), np.zeros_like(truth)):
        counted: list[int] = []
        judge(evaluator, mask, TRIALS, counted.append)
        assert sum(counted) == n_evaluations(mask, TRIALS)


def test_seeds_decide() -> None:
    evaluator, truth = toy()
    again, other = (judge(evaluator, truth, replace(TRIALS, seed=seed)) for seed in (0, 1))
    assert again.as_dict() == judge(evaluator, truth, TRIALS).as_dict()
    assert other.knockouts != again.knockouts


def test_samples_too_small_to_say_no_say_so() -> None:
    evaluator, truth = toy()
    few = Candidate(evaluator, truth)
    assert sufficiency(few, Trials(n_random=28)).passed is None  # 0.9^28 > 0.05
    enough = sufficiency(few, Trials(n_random=29))
    assert (enough.passed, enough.p_value) == (True, pytest.approx(0.9**29))
    assert necessity(few, Trials(n_random=28)).says.startswith("cannot tell: 28 random circuits")
    assert minimality(few, Trials(n_random=2))[0].passed is None  # 0.1^2 > 0.05 / 6
    assert independence(few, Trials(n_permutations=19)).passed is None
    small = Additive(evaluator.weights[:5], evaluator.base[:5])
    assert equivalence(Candidate(small, truth), Trials()).passed is None  # 0.6^5 > 0.05
    nodeless = evaluator.experiment.graph.edge_mask(["input->logits"])
    assert completeness(Candidate(evaluator, nodeless), Trials())[0].passed is None


def test_mistakes() -> None:
    evaluator, truth = toy()
    bad: dict[str, tuple[float, ...]] = {
        "alpha": (0, 1, -0.1, float("nan")),
        "epsilon": (0, 0.5),
        "quantile": (0, 1),
        "tolerance": (0, -1),
        "n_random": (0, -5),
        "n_permutations": (0,),
        "n_knockouts": (1,),
        "n_edges": (0,),
        "seed": (-1,),
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(OptionError, match=f"{name} {value:g}"):
                Trials(**{name: value})  # type: ignore[arg-type]
    flat = Additive(np.zeros_like(evaluator.weights), evaluator.base)
    with pytest.raises(OptionError, match=r"'toy' is .* with every edge and with none"):
        Candidate(flat, truth)


# --- what cannot be told ------------------------------------------------------------------


def test_a_metric_without_gap_says_so_in_every_verdict() -> None:
    evaluator, truth = toy()
    counted: list[int] = []
    flat = Additive(np.zeros_like(evaluator.weights), evaluator.base)
    judgement = judge(flat, truth, TRIALS, counted.append)
    assert tuple(verdict.test for verdict in judgement.verdicts) == TESTS
    for verdict in judgement.verdicts:
        assert (verdict.passed, verdict.p_value) == (None, None)
        assert "with every edge and with none" in verdict.says
    assert (judgement.edges, judgement.knockouts, judgement.complement) == ((), (), None)
    assert (judgement.n_edges, judgement.n_on_path) == (6, 6)
    assert sum(counted) == n_evaluations(truth, TRIALS)


def test_the_reasons_where_nothing_can_be_drawn() -> None:
    full, empty = toy_judgement("full"), toy_judgement("empty")
    for test, words in (
        ("sufficiency", "the only random circuit of its size is itself"),
        ("necessity", "only 0 edges on paths are outside"),
        ("minimality", "none to add"),
    ):
        assert full[test].says.startswith("cannot tell: ")
        assert words in full[test].says
        assert empty[test].says == (
            "cannot tell: no edge of the circuit is on a path from the embeddings to logits"
        )
    assert (empty.n_edges, empty.n_on_path) == (0, 0)
    loose = toy_judgement("loose")
    assert (loose.n_edges, loose.n_on_path) == (1, 0)


def test_ties_of_an_exact_circuit_are_no_fault_of_its() -> None:
    """Of nearly every edge: most random circuits are exact too, but not one that lacks an edge."""
    evaluator, truth = toy()
    idle, used = np.flatnonzero(~truth)[0], np.flatnonzero(truth)[0]
    exact, wrong = (np.arange(len(truth)) != edge for edge in (idle, used))
    verdict = sufficiency(Candidate(evaluator, exact), TRIALS)
    assert (verdict.passed, verdict.p_value) == (None, None)
    assert re.search(r"exactly, but so do \d\d of 60 random circuits", verdict.says)
    assert sufficiency(Candidate(evaluator, wrong), TRIALS).passed is False


def test_what_prompts_share_says_nothing_against_a_circuit() -> None:
    """Values that go together without any edge are no sign of what the complement knows."""
    evaluator, truth = toy()
    alike = Additive(evaluator.weights, 50 * evaluator.base)
    cut = truth & ~component_graph(SHAPE).edge_mask(["m0->m1"])
    for mask in (truth, cut, np.zeros_like(truth)):
        verdict = independence(Candidate(alike, mask), TRIALS)
        assert (verdict.passed, verdict.p_value) == (None, None)
        assert "without any edge tells of how it does, too" in verdict.says
    assert independence(Candidate(evaluator, cut), TRIALS).passed is False


SPLIT = GraphShape(2, 2, spans=("A", "END"), scored_spans=("END",))


def test_edges_on_no_path_do_not_count() -> None:
    """At a span that is not scored the last MLP writes to nobody."""
    graph = component_graph(SPLIT)
    sampler = PathSampler(graph)
    on_path = sampler.on_path
    assert 0 < (~on_path).sum() < on_path.sum()
    rng = np.random.default_rng(0)
    weights = on_path * rng.normal(1, 0.3, (N_PROMPTS, graph.n_edges))
    evaluator: Any = Additive(weights, rng.normal(0, 0.1, N_PROMPTS), SPLIT)
    some = sampler.circuit(int(on_path.sum()) * 55 // 100, rng)
    outside = on_path & ~some
    assert outside.sum() < some.sum() < (~some).sum()  # enough edges are outside, but idle ones
    judgement = judge(evaluator, some, TRIALS)
    assert judgement["necessity"].passed is None
    words = (
        f"only {outside.sum()} edges on paths are outside, no choice of circuits of {some.sum()}"
    )
    assert words in judgement["necessity"].says
    assert all(judgement[test].passed is not None for test in TESTS if test != "necessity")

    every = judge(evaluator, on_path, TRIALS)  # nothing can be added, though edges are left
    assert "none to add" in every["minimality"].says
    assert "is itself" in every["sufficiency"].says
    few = sampler.circuit(10, rng)
    both = judge(evaluator, few | ~on_path, TRIALS)
    assert both["minimality"].n == few.sum()
    assert both["sufficiency"].p_value == judge(evaluator, few, TRIALS)["sufficiency"].p_value
    assert (both.n_edges, both.n_on_path) == (few.sum() + (~on_path).sum(), few.sum())
    nothing = judge(evaluator, ~on_path, TRIALS)
    assert "no edge of the circuit is on a path" in nothing["minimality"].says


# --- compiled models: the true circuit is known -------------------------------------------


@cache
def compiled_judgement(which: str) -> Judgement:
    evaluator = Evaluator(experiment("tracr-sort", "resample"))
    graph = evaluator.experiment.graph
    truth = graph.edge_mask(read_reference(MODELS["tracr-sort"] / "reference-resample.json").edges)
    cut = truth.copy()
    cut[graph.edge_index("a2.h0->logits")] = False
    assert cut.sum() == truth.sum() - 1
    mask = {
        "truth": truth,
        "cut": cut,
        "random": PathSampler(graph).circuit(int(truth.sum()), np.random.default_rng(0)),
        "full": np.ones_like(truth),
    }[which]
    return judge(evaluator, mask, Trials(n_random=29, n_knockouts=4))


@pytest.mark.parametrize(
    ("which", "passed", "failed"),
    [
        ("truth", ["equivalence", "sufficiency", "necessity", "minimality", "completeness"], []),
        ("cut", [], ["equivalence", "sufficiency", "minimality"]),
        ("random", [], ["equivalence", "sufficiency", "minimality"]),
        ("full", ["equivalence", "completeness"], []),
    ],
)
def test_verdicts_of_a_compiled_model(which: str, passed: list[str], failed: list[str]) -> None:
    judgement = compiled_judgement(which)
    for name in passed:
        assert judgement[name].passed is True, judgement[name]
    for name in failed:
        assert judgement[name].passed is False, judgement[name]
    # mse of the model itself is 0 everywhere: nothing can depend on it
    assert judgement["independence"].passed is None
    assert "choose another metric" in judgement["independence"].says
