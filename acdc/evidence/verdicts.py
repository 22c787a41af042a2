"""Tests that a circuit can fail: hypothesis tests of Shi et al., completeness of Wang et al.

Write C for the circuit, M for the model (every edge in), -C for the complement of C, s(.) for
the metric of one prompt, and L(C) for the mean of (s(C) - s(M))^2 over the prompts.

============  ===================================================  ======================
test          null hypothesis H0                                   C passes if H0 is
============  ===================================================  ======================
equivalence   ``|P(s(C) > s(M)) - 1/2| <= epsilon``                kept
independence  s(-C) and s(M) are independent                       kept
minimality    for every edge e of C: P(d(e) > d(r)) >= quantile    kept
sufficiency   P(L(C) < L(R)) <= quantile                           rejected
necessity     P(L(-C) > L(-R')) <= quantile                        rejected
completeness  mean over K of ``|F(C-K) - F(M-K)|`` <= tolerance    kept
============  ===================================================  ======================

R is a random circuit of at least as many edges (:class:`graphs.sample.PathSampler`), R' one of
edges outside C; d(e) is the mean of (s(C) - s(C-e))^2, d(r) the same for a random edge that a
random path adds to C; K is a random set of C's heads and MLPs, F the mean metric as a share of
the gap between M and nothing.  Where edges are counted, drawn or tested one by one, only those
count that are on a path from the embeddings to ``logits`` in the whole graph: no circuit can use
the others (as at spans that are not scored).

A test that keeps its H0 has found nothing against the circuit, which is weaker than a proof and
depends on the sample: each verdict says how large that was.  Where a test cannot be done, or its
answer would be the same for a good and a bad circuit, its verdict is that nothing can be said, and
why; the others are not touched by that:

- a sample is too small to reject H0, or there is nothing to draw it from: a circuit of every edge
  has no other of its size, none outside it and none to add;
- C agrees with the model exactly, but so do many of the R, so that sufficiency is kept: the p-value
  is then that of *any* exact circuit.  Other ties count against C, so that whatever the ties at
  most 1 - quantile of all random circuits surpass the quantile of them;
- independence is rejected, but so is that of s(nothing) and s(M): the prompts alone (a name, a
  template that both prompts of a pair share) make the two go together, whatever the circuit.

The first five are those of Shi et al., who call the fifth partial necessity (and draw R' from all
edges or, as an option, as here).  These choices are ours: ties count half in equivalence (the
authors' test rejects a circuit that agrees with the model exactly); a permutation's p-value
counts the observed order; a random path goes through a random edge that is not in yet (theirs
may add nothing); and the dashes above.  Wang et al. search for the worst K, here K is drawn and the
mean is tested, by bets (:func:`mean_above_p_value`): a t-test rejects a true H0 in up to a third of
all samples where the differences are skewed to the left.

How often each test rejects a true H0, and a stated false one, is measured by
``acdc bench calibration``.

References
----------
Shi et al. 2024, "Hypothesis testing the circuit hypothesis in LLMs", arXiv 2410.13032, sections
3 and 4.  Wang et al. 2022, "Interpretability in the wild", arXiv 2211.00593, section 4.
Gretton et al. 2007, "A kernel statistical test of independence".  Waudby-Smith & Ramdas 2024,
"Estimating means of bounded random variables by betting", arXiv 2010.09686.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from acdc.errors import OptionError
from acdc.measure.evaluation import Evaluator
from acdc.settings import MOST_REPEATS, check_count
from acdc.terminal.shown import Shown
from graphs.sample import PathSampler
from graphs.select import prune

__all__ = [
    "TESTS",
    "Candidate",
    "EdgeEffect",
    "Judgement",
    "Knockout",
    "Trials",
    "Verdict",
    "completeness",
    "equivalence",
    "equivalence_p_value",
    "hsic_test",
    "independence",
    "judge",
    "mean_above_p_value",
    "minimality",
    "n_evaluations",
    "necessity",
    "sufficiency",
]

Mask = NDArray[np.bool_]
Values = NDArray[np.float64]
Progress = Callable[[int], None]

_TIE = 1e-4
"""Differences of a metric below this share of the gap are rounding: they count as none."""

_STAKES = np.arange(1, 21) / 20
"""Shares of what a bettor owns that the test of completeness stakes."""

TESTS = (
    "equivalence",
    "independence",
    "sufficiency",
    "necessity",
    "minimality",
    "completeness",
)
"""In the order in which they are run and shown."""

_CIRCUITS = "random circuits"
_NO_EDGE = "no edge of the circuit is on a path from the embeddings to logits"


@dataclass(frozen=True)
class Trials:
    """How the tests are run.

    Parameters
    ----------
    alpha
        Level of every test, in (0, 1).
    epsilon
        Equivalence: how far from even the odds may be, in (0, 0.5).
    quantile
        Sufficiency, necessity, minimality: the share of random circuits or edges that C is to
        surpass, in (0, 1).
    tolerance
        Completeness: how far C and M may be apart under knock-outs, as a share of the gap, above 0.
    n_random
        Random circuits, and random added edges.
    n_permutations
        Of the test of independence.
    n_knockouts
        Random sets of nodes.
    n_edges
        Minimality tests at most so many edges, drawn at random; None: all.
    seed
        Of all that is drawn.

    Raises
    ------
    OptionError
        If a value is not as above.
    """

    alpha: float = 0.05
    epsilon: float = 0.1
    quantile: float = 0.9
    tolerance: float = 0.1
    n_random: int = 100
    n_permutations: int = 1000
    n_knockouts: int = 20
    n_edges: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, high in (
            ("alpha", 1),
            ("epsilon", 0.5),
            ("quantile", 1),
            ("tolerance", math.inf),
        ):
            value = getattr(self, name)
            if not 0 < value < high:
                raise OptionError(
                    f"{name} {value:g}: expected a number above 0"
                    + (f" and below {high:g}" if high < math.inf else "")
                )
        for name, low, high in (
            ("n_random", 1, MOST_REPEATS),
            ("n_permutations", 1, MOST_REPEATS),
            ("n_knockouts", 2, MOST_REPEATS),
            ("n_edges", 1, 2**63 - 1),
            ("seed", 0, 2**63 - 1),
        ):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), at_least=low, at_most=high)


@dataclass(frozen=True)
class Verdict:
    """What one test says.

    Parameters
    ----------
    test
        Its name.
    passed
        Whether the circuit passes; None where the test cannot tell.
    p_value
        Of H0; for minimality the least of all edges.  None where there is none.
    level
        The p-value below which H0 is rejected: alpha, for minimality alpha over the number of
        edges that were tested (Bonferroni).
    n
        Size of the sample.
    unit
        What is counted by ``n``.
    says
        The verdict in plain words.
    """

    test: str
    passed: bool | None
    p_value: float | None
    level: float
    n: int
    unit: str
    says: str


@dataclass(frozen=True)
class EdgeEffect:
    """One edge in the test of minimality.

    Parameters
    ----------
    edge
        Its name.
    effect
        d(e): mean squared change of the metric when it is taken out of C.
    surpassed
        Share of random added edges with a smaller effect.
    p_value
        Of H0 for this edge alone; small where the edge looks superfluous.
    """

    edge: str
    effect: float
    surpassed: float
    p_value: float


@dataclass(frozen=True)
class Knockout:
    """One set K of nodes in the test of completeness; shares of the gap.

    Parameters
    ----------
    nodes
        Names of K.
    circuit, model
        Faithfulness of C without K, and of M without K.
    """

    nodes: tuple[str, ...]
    circuit: float
    model: float

    @property
    def difference(self) -> float:
        """What C misses: ``|F(C-K) - F(M-K)|``."""
        return abs(self.circuit - self.model)


@dataclass(frozen=True)
class Judgement(Shown):
    """All tests of one circuit.

    Parameters
    ----------
    trials
        How they were run.
    verdicts
        One per test.
    edges
        Every edge that minimality tested, the most superfluous first.
    knockouts
        Every set that completeness tried, the worst first.
    complement
        Faithfulness of the complement of C: near 0 if C is all there is.  None where the metric
        has no gap.
    n_edges
        Of C.
    n_on_path
        Those on a path from the embeddings to ``logits`` that is in C from end to end; under
        resample ablation the others carry nothing.
    """

    trials: Trials
    verdicts: tuple[Verdict, ...]
    edges: tuple[EdgeEffect, ...]
    knockouts: tuple[Knockout, ...]
    complement: float | None
    n_edges: int
    n_on_path: int

    def __repr__(self) -> str:
        words = {True: "pass", False: "fail", None: "cannot tell"}
        counts = Counter(words[verdict.passed] for verdict in self.verdicts)
        return f"<Judgement: {', '.join(f'{n} {word}' for word, n in counts.items())}>"

    def __getitem__(self, test: str) -> Verdict:
        """Return the verdict of one test."""
        return next(verdict for verdict in self.verdicts if verdict.test == test)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        return asdict(self)


class Candidate:
    """A circuit to be tested, and what all tests need of it.

    Parameters
    ----------
    evaluator
        Model, prompts, metric and ablation.
    mask
        ``[edge]``: the edges of the circuit.

    Raises
    ------
    OptionError
        If the metric is the same with every edge and with none.
    """

    def __init__(self, evaluator: Evaluator, mask: Mask) -> None:
        if not evaluator.has_gap:
            raise OptionError(_no_gap(evaluator))
        self.evaluator, self.mask = evaluator, mask
        self.graph = evaluator.experiment.graph
        self.model: Values = evaluator.full_values
        self.gap = abs(evaluator.full - evaluator.empty)
        self.tie = _TIE * self.gap

    @cached_property
    def circuit(self) -> Values:
        """``[prompt]``: s(C)."""
        return self.evaluator.values(self.mask)

    @cached_property
    def complement(self) -> Values:
        """``[prompt]``: s(-C)."""
        return self.evaluator.values(~self.mask)

    @cached_property
    def sampler(self) -> PathSampler:
        """Of the graph's paths."""
        return PathSampler(self.graph)

    @cached_property
    def counted(self) -> Mask:
        """``[edge]``: edges of the circuit that are on a path of the whole graph."""
        return self.mask & self.sampler.on_path

    @property
    def size(self) -> int:
        """How many edges of the circuit count."""
        return int(self.counted.sum())

    @property
    def n_outside(self) -> int:
        """How many edges on a path the circuit leaves out."""
        return int(self.sampler.on_path.sum()) - self.size

    def distance(self, a: Values, b: Values) -> float:
        """Mean squared difference over the prompts; 0 where it is rounding."""
        value = float(np.square(a - b).mean())
        return 0.0 if value <= self.tie**2 else value

    def share(self, values: Values) -> float:
        """Faithfulness of ``values [prompt]``."""
        evaluator = self.evaluator
        return (float(values.mean()) - evaluator.empty) / (evaluator.full - evaluator.empty)


def _no_gap(evaluator: Evaluator) -> str:
    return (
        f"metric {evaluator.experiment.metric.name!r} is {evaluator.full:g} with every "
        "edge and with none: a circuit cannot be told from the model, choose another metric"
    )


def n_evaluations(mask: Mask, trials: Trials) -> int:
    """How many circuits :func:`judge` counts as progress: all that may have to be evaluated."""
    return 2 + 4 * trials.n_random + _n_tested(mask, trials) + 2 * trials.n_knockouts


def _n_tested(mask: Mask, trials: Trials) -> int:
    """Return how many edges minimality tests at most."""
    return min(int(mask.sum()), trials.n_edges or len(mask))


def judge(
    evaluator: Evaluator,
    mask: Mask,
    trials: Trials | None = None,
    progress: Progress = lambda n_evaluations: None,
) -> Judgement:
    """Run every test; what one of them cannot tell never costs the others.

    Parameters
    ----------
    evaluator
        Model, prompts, metric and ablation; better with prompts that discovery has not seen.
    mask
        ``[edge]``: the circuit.  Where it is empty, or every edge, most tests cannot tell.
    trials
        Levels and sample sizes.
    progress
        Called with the number of circuits evaluated, or passed over (:func:`n_evaluations` in
        all).
    """
    trials = trials or Trials()
    n_edges, n_on_path = int(mask.sum()), int(prune(evaluator.experiment.graph, mask).sum())
    if not evaluator.has_gap:
        progress(n_evaluations(mask, trials))
        return Judgement(trials, _all_alike(evaluator, trials), (), (), None, n_edges, n_on_path)
    candidate = Candidate(evaluator, mask)
    verdicts = [equivalence(candidate, trials)]
    progress(1)
    verdicts.append(independence(candidate, trials))
    progress(1)
    verdicts.append(sufficiency(candidate, trials, progress))
    verdicts.append(necessity(candidate, trials, progress))
    minimal, edges = minimality(candidate, trials, progress)
    complete, knockouts = completeness(candidate, trials, progress)
    complement = candidate.share(candidate.complement)
    found = (*verdicts, minimal, complete)
    return Judgement(trials, found, edges, knockouts, complement, n_edges, n_on_path)


def _all_alike(evaluator: Evaluator, trials: Trials) -> tuple[Verdict, ...]:
    """Return the verdicts where the metric has no gap."""
    why, n = _no_gap(evaluator), len(evaluator.full_values)
    return tuple(_cannot(test, trials.alpha, n, "prompts", why) for test in TESTS)


# --- the idealised tests ------------------------------------------------------------------


def equivalence(candidate: Candidate, trials: Trials) -> Verdict:
    """Test whether circuit and model are equally often the better one.

    The p-value is that of ``|k/n - 1/2|``, k of n prompts being won by the circuit, under the
    least favourable odds that H0 allows, 1/2 + epsilon.
    """
    difference = candidate.circuit - candidate.model
    n = len(difference)
    ties = int((np.abs(difference) <= candidate.tie).sum())
    wins = float((difference > candidate.tie).sum()) + ties / 2
    p_value = equivalence_p_value(wins, n, trials.epsilon)
    said = f"above the model's metric on {wins - ties / 2:.0f} of {n} prompts, equal on {ties}"
    least = equivalence_p_value(n, n, trials.epsilon)
    if least >= trials.alpha:
        return _cannot("equivalence", trials.alpha, n, "prompts", f"{n} prompts are too few")
    passed = p_value >= trials.alpha
    end = "no sign that it does another thing" if passed else "it does not do what the model does"
    return Verdict(
        "equivalence", passed, p_value, trials.alpha, n, "prompts", f"{said}: {end}"
    )  # fmt: skip


def equivalence_p_value(wins: float, n: int, epsilon: float) -> float:
    """``P(|K/n - 1/2| >= |wins/n - 1/2|)`` for K binomial with n and 1/2 + epsilon."""
    k = np.arange(n + 1)
    as_far = np.abs(k / n - 0.5) >= abs(wins / n - 0.5) - 1e-12
    return min(1.0, float(stats.binom.pmf(k, n, 0.5 + epsilon)[as_far].sum()))


def independence(candidate: Candidate, trials: Trials) -> Verdict:
    """Test whether what is left without the circuit still knows how the model does.

    Where it does, so may what is left without any edge at all, by what both prompts of a pair
    share: then the rejection is no fault of the circuit's, and nothing can be said.
    """
    name, n = "independence", len(candidate.model)
    if np.ptp(candidate.model) <= candidate.tie:
        metric = candidate.evaluator.experiment.metric.name
        why = f"the model's {metric} is the same on every prompt: choose another metric"
        return _cannot(name, trials.alpha, n, "prompts", why)
    if 1 / (1 + trials.n_permutations) >= trials.alpha or n < 4:
        why = f"{n} prompts and {trials.n_permutations} permutations are too few"
        return _cannot(name, trials.alpha, n, "prompts", why)
    if np.ptp(candidate.complement) <= candidate.tie:
        says = "without the circuit every prompt has the same metric: nothing of the task is left"
        return Verdict(name, True, 1.0, trials.alpha, n, "prompts", says)
    p_value = _dependence(candidate, candidate.complement, trials, 1)
    passed = p_value >= trials.alpha
    if not passed:
        of_nothing = _dependence(candidate, candidate.evaluator.empty_values, trials, 6)
        if of_nothing < trials.alpha:
            why = (
                f"how the model does without any edge tells of how it does, too (p {of_nothing:.2g}"
                f", without the circuit {p_value:.2g}): the prompts make them go together"
            )
            return _cannot(name, trials.alpha, n, "prompts", why)
    end = "tells nothing of" if passed else "still tells of"
    says = f"how the model does without the circuit {end} how it does with it"
    return Verdict(name, passed, p_value, trials.alpha, n, "prompts", says)


def _dependence(candidate: Candidate, values: Values, trials: Trials, stream: int) -> float:
    """P-value of the independence of ``values [prompt]`` and the model's."""
    if np.ptp(values) <= candidate.tie:
        return 1.0
    rng = np.random.default_rng([trials.seed, stream])
    return hsic_test(candidate.model, values, trials.n_permutations, rng)


def hsic_test(x: Values, y: Values, n_permutations: int, rng: np.random.Generator) -> float:
    """P-value of independence of paired samples by the Hilbert-Schmidt criterion.

    Parameters
    ----------
    x, y
        ``[sample]`` each.  Gaussian kernels, as wide as the median distance of two samples.
    n_permutations
        Random orders of ``y``.
    rng
        What draws them.

    Returns
    -------
    float
        Share of orders, the observed one among them, whose criterion is at least the observed.
    """
    k, m = _centred(_kernel(x)), _kernel(y)
    observed = float((k * m).sum())
    as_large = 1
    for _ in range(n_permutations):
        order = rng.permutation(len(y))
        as_large += float((k * m[np.ix_(order, order)]).sum()) >= observed * (1 - 1e-9)
    return as_large / (1 + n_permutations)


def _kernel(x: Values) -> Values:
    distance = np.abs(x[:, None] - x[None, :])
    apart = distance[np.triu_indices(len(x), 1)]
    width = float(np.median(apart)) or float(apart.mean())
    return np.exp(-np.square(distance / width) / 2)


def _centred(k: Values) -> Values:
    return k - k.mean(0) - k.mean(1)[:, None] + k.mean()


def minimality(
    candidate: Candidate, trials: Trials, progress: Progress = lambda n: None
) -> tuple[Verdict, tuple[EdgeEffect, ...]]:
    """Test whether each edge does more than edges that a random path would add.

    Returns
    -------
    tuple
        The verdict, and the edges tested, the most superfluous first.
    """
    test, n_tested = "minimality", _n_tested(candidate.mask, trials)
    if why := _NO_EDGE if not candidate.size else _nothing_to_add(candidate):
        progress(2 * trials.n_random + n_tested)
        return _cannot(test, trials.alpha, 0, "edges", why), ()
    rng = np.random.default_rng([trials.seed, 2])
    null = np.array([_random_effect(candidate, rng, progress) for _ in range(trials.n_random)])
    edges = np.flatnonzero(candidate.counted)
    if trials.n_edges is not None and trials.n_edges < len(edges):
        edges = np.sort(rng.choice(edges, trials.n_edges, replace=False))
    found = []
    for edge in edges.tolist():
        effect = candidate.distance(candidate.circuit, _without(candidate, candidate.mask, edge))
        progress(1)
        k = int((effect > null).sum())
        p_value = float(stats.binom.cdf(k, len(null), trials.quantile))
        name = candidate.graph.edge_name(edge)
        found.append(EdgeEffect(name, effect, k / len(null), p_value))
    progress(n_tested - len(edges))
    found.sort(key=lambda e: (e.p_value, e.effect))
    return _minimality_verdict(found, trials), tuple(found)


def _nothing_to_add(candidate: Candidate) -> str | None:
    # compared with one another, nine edges in ten would fail by construction
    return None if candidate.n_outside else "every edge on a path is in, there is none to add"


def _minimality_verdict(found: list[EdgeEffect], trials: Trials) -> Verdict:
    """Return the verdict on the edges tested, the most superfluous first."""
    test, n, level = "minimality", len(found), trials.alpha / len(found)
    unit = f"edges, {trials.n_random} random ones"
    if (1 - trials.quantile) ** trials.n_random >= level:
        return _cannot(test, level, n, unit, f"{trials.n_random} random edges are too few")
    idle = [e.edge for e in found if e.p_value < level]
    says = (
        f"{len(idle)} of {n} edges do no more than added ones, as {idle[0]}"
        if idle
        else f"each of {n} edges may do more than {trials.quantile:.0%} of added ones"
    )
    return Verdict(test, not idle, found[0].p_value, level, n, unit, says)


def _random_effect(candidate: Candidate, rng: np.random.Generator, progress: Progress) -> float:
    """d(r) of a random edge that a random path adds to the circuit."""
    more = candidate.sampler.inflated(candidate.mask, rng)
    edge = int(rng.choice(np.flatnonzero(more & ~candidate.mask)))
    values = candidate.evaluator.values(more)
    effect = candidate.distance(values, _without(candidate, more, edge))
    progress(2)
    return effect


def _without(candidate: Candidate, mask: Mask, edge: int) -> Values:
    fewer = mask.copy()
    fewer[edge] = False
    return candidate.evaluator.values(fewer)


# --- against random circuits --------------------------------------------------------------


def sufficiency(
    candidate: Candidate, trials: Trials, progress: Progress = lambda n: None
) -> Verdict:
    """Test whether the circuit is nearer to the model than random ones of its size."""
    test = "sufficiency"
    if why := _NO_EDGE if not candidate.size else _only_one(candidate):
        progress(trials.n_random)
        return _cannot(test, trials.alpha, 0, _CIRCUITS, why)
    own = candidate.distance(candidate.circuit, candidate.model)
    rng = np.random.default_rng([trials.seed, 3])
    random = _random_distances(candidate, trials, rng, progress, without=False)
    n_surpassed, n_exact = int((own < random).sum()), int((random == 0).sum())
    verdict = _against_random(test, n_surpassed, trials, "nearer to the model than")
    if own == 0 and verdict.passed is False:
        n, why = trials.n_random, "it agrees with the model exactly, but so do"
        why = f"{why} {n_exact} of {n} random circuits of its size"
        return _cannot(test, trials.alpha, n, _CIRCUITS, why)
    return verdict


def _only_one(candidate: Candidate) -> str | None:
    if candidate.n_outside:
        return None
    return "every edge on a path is in, the only random circuit of its size is itself"


def necessity(candidate: Candidate, trials: Trials, progress: Progress = lambda n: None) -> Verdict:
    """Test whether losing the circuit hurts more than losing as many random edges outside it.

    Called partial necessity by Shi et al.
    """
    test = "necessity"
    if why := _NO_EDGE if not candidate.size else _too_few_outside(candidate):
        progress(trials.n_random)
        return _cannot(test, trials.alpha, 0, _CIRCUITS, why)
    own = candidate.distance(candidate.complement, candidate.model)
    rng = np.random.default_rng([trials.seed, 4])
    random = _random_distances(candidate, trials, rng, progress, without=True)
    n_surpassed = int((own > random).sum())
    return _against_random(test, n_surpassed, trials, "its loss hurts more than that of")


def _too_few_outside(candidate: Candidate) -> str | None:
    outside, size = candidate.n_outside, candidate.size
    if outside > size:
        return None
    return f"only {outside:,} edges on paths are outside, no choice of circuits of {size:,}"


def _random_distances(
    candidate: Candidate,
    trials: Trials,
    rng: np.random.Generator,
    progress: Progress,
    *,
    without: bool,
) -> Values:
    """``[circuit]``: L(R) of random circuits of the candidate's size, or L(-R')."""
    size, found = candidate.size, []
    for _ in range(trials.n_random):
        mask = candidate.sampler.circuit(size, rng, candidate.mask if without else None)
        values = candidate.evaluator.values(~mask if without else mask)
        found.append(candidate.distance(values, candidate.model))
        progress(1)
    return np.array(found)


def _against_random(test: str, n_surpassed: int, trials: Trials, words: str) -> Verdict:
    n, unit = trials.n_random, _CIRCUITS
    if trials.quantile**n >= trials.alpha:
        return _cannot(test, trials.alpha, n, unit, f"{n} random circuits are too few")
    p_value = float(stats.binom.sf(n_surpassed - 1, n, trials.quantile))
    says = f"{words} {n_surpassed} of {n} random circuits of its size"
    return Verdict(test, p_value < trials.alpha, p_value, trials.alpha, n, unit, says)


# --- completeness -------------------------------------------------------------------------


def completeness(
    candidate: Candidate, trials: Trials, progress: Progress = lambda n: None
) -> tuple[Verdict, tuple[Knockout, ...]]:
    """Test whether circuit and model agree when parts of the circuit are knocked out of both.

    K has any number of the circuit's heads and MLPs, each number equally likely, none among
    them; all that they write is ablated.  What takes over in the model but is missing from the
    circuit shows here.

    Returns
    -------
    tuple
        The verdict, and the sets tried, the worst first.
    """
    graph, rng = candidate.graph, np.random.default_rng([trials.seed, 5])
    senders = np.unique(graph.edge_sender[candidate.mask])
    inner = senders[~graph.source[senders]]
    unit, test = "knock-outs", "completeness"
    if not len(inner):
        progress(2 * trials.n_knockouts)
        why = "no head and no MLP is in the circuit: there is nothing to knock out"
        return _cannot(test, trials.alpha, 0, unit, why), ()
    found = []
    for _ in range(trials.n_knockouts):
        nodes = np.sort(rng.choice(inner, rng.integers(len(inner) + 1), replace=False))
        kept = ~np.isin(graph.edge_sender, nodes)
        circuit, model = (
            candidate.share(candidate.evaluator.values(mask & kept))
            for mask in (candidate.mask, np.ones_like(candidate.mask))
        )
        progress(2)
        found.append(Knockout(tuple(graph.nodes[node] for node in nodes), circuit, model))
    differences = np.array([k.difference for k in found])
    p_value = mean_above_p_value(differences, trials.tolerance)
    mean, worst = differences.mean(), differences.max()
    found.sort(key=lambda k: -k.difference)
    says = f"without random parts of it, circuit and model differ by {mean:.3g} of the gap"
    verdict = Verdict(
        test, p_value >= trials.alpha, p_value, trials.alpha, len(found), unit,
        f"{says} (at most {worst:.3g})",
    )  # fmt: skip
    return verdict, tuple(found)


def mean_above_p_value(values: Values, bound: float) -> float:
    """P-value of H0 that values of at least 0 have a mean of at most ``bound``; always valid.

    A bettor stakes a share w of what it owns on each value x in turn and then owns
    ``1 + w (x / bound - 1)`` times as much.  While H0 is true that is a factor of at most 1 on
    average, so that what 20 bettors with different stakes own together reaches k times what they
    began with in at most 1 of k samples (Ville), however the values are distributed.

    Parameters
    ----------
    values
        ``[sample]``, at least 0, independent draws in the order in which they were made.
    bound
        Above 0.

    References
    ----------
    Waudby-Smith & Ramdas 2024, arXiv 2010.09686, section 4.
    """
    with np.errstate(over="ignore"):
        factors = 1 + _STAKES[:, None] * (values / bound - 1)  # [stake, sample]
        most = np.cumprod(factors, axis=1).mean(0).max()
    return float(np.minimum(1, 1 / most))


def _cannot(test: str, level: float, n: int, unit: str, why: str) -> Verdict:
    return Verdict(test, None, None, level, n, unit, f"cannot tell: {why}")
