"""Circuits of which it is known whether the null hypothesis of a test is true.

===========  =====================================================================================
drawn        values are drawn from known distributions, random circuits from a pool in which the
             circuit's place is known
a model      values are those of a bundled model; pools are of random circuits of it, so that the
             circuit's place among them is known exactly, and all knock-outs are counted out
===========  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import comb, sqrt
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from acdc.engine.experiment import Experiment
from acdc.evidence.verdicts import (
    Candidate,
    Trials,
    Verdict,
    completeness,
    equivalence,
    equivalence_p_value,
    independence,
    minimality,
    necessity,
    sufficiency,
)
from acdc.measure.evaluation import Evaluator
from acdc.methods.eap import eap_ig
from graphs import Graph, GraphShape, component_graph
from graphs.sample import PathSampler
from graphs.select import select_top

__all__ = ["SEED", "Plan", "Scene", "drawn_scenes", "model_scenes"]

SEED = 0

Mask = NDArray[np.bool_]
Values = NDArray[np.float64]
Generator = np.random.Generator
_Test = Callable[[Candidate, Trials], Verdict]
_Draw = Callable[[Generator, Trials], Verdict]


@dataclass(frozen=True)
class Plan:
    """Sample sizes.

    Parameters
    ----------
    n_samples
        Of each scene.
    n_slow
        Of scenes of independence, whose permutations take time.
    n_pool
        Random circuits of the bundled model from which scenes draw.
    n_edges
        Edges of the bundled model's circuit whose effects are compared with those of others.
    n_prompts
        Of a drawn scene: the number that ``acdc discover`` takes of a task.
    n_model_prompts
        Of the bundled model.
    """

    n_samples: int = 2000
    n_slow: int = 1000
    n_pool: int = 1000
    n_edges: int = 200
    n_prompts: int = 64
    n_model_prompts: int = 32

    @classmethod
    def quick(cls) -> Plan:
        """Sizes for trying it."""
        return cls(n_samples=60, n_slow=20, n_pool=40, n_edges=50, n_prompts=32, n_model_prompts=8)


@dataclass(frozen=True)
class Scene:
    """A circuit of which it is known whether H0 of one test is true.

    Parameters
    ----------
    test, subject
        What is tested, and on what: ``drawn`` or a model.
    says
        What is true, in words.
    null
        Whether H0 is; also where it is not, but through no fault of the circuit's.
    draw
        Gives the verdict on one sample; its second argument are trials with a seed of its own.
    trials
        Levels and sample sizes.
    theory
        Probability that H0 is rejected; None where it is not known.
    """

    test: str
    subject: str
    says: str
    null: bool
    draw: _Draw
    trials: Trials = field(default_factory=Trials)
    theory: float | None = None


# --- drawn values -------------------------------------------------------------------------


class Given(Evaluator):
    """An evaluator whose values are given; full is 1 more than empty on average.

    Parameters
    ----------
    full, empty
        ``[prompt]``: metric with every edge and with none.
    values
        Metric ``[prompt]`` of a circuit ``[edge]``.
    graph
        The graph of the circuits.
    """

    def __init__(
        self, full: Values, empty: Values, values: Callable[[Mask], Values], graph: Graph
    ) -> None:
        metric = SimpleNamespace(name="drawn")
        self.experiment: Any = SimpleNamespace(graph=graph, metric=metric)
        self._full, self._empty, self._values = full, empty, values

    @property
    def full_values(self) -> Values:  # type: ignore[override]  # drawn, not cached
        """``[prompt]``: metric with every edge in."""
        return self._full

    @property
    def empty_values(self) -> Values:  # type: ignore[override]  # likewise
        """``[prompt]``: metric with no edge in."""
        return self._empty

    def values(self, mask: Mask) -> Values:
        """``[prompt]``: metric of a circuit."""
        return self._values(mask)


class Pool(PathSampler):
    """Draws from given circuits, each equally likely: what they are like is known exactly.

    Parameters
    ----------
    graph
        The graph.
    circuits
        ``[circuit, edge]``; added to a circuit that is to be inflated.
    """

    def __init__(self, graph: Graph, circuits: Mask) -> None:
        super().__init__(graph)
        self.circuits = circuits

    def circuit(self, n_edges: int, rng: Generator, avoid: Mask | None = None) -> Mask:
        """Return one of the circuits, of whatever size."""
        return np.array(self.circuits[rng.integers(len(self.circuits))])

    def inflated(self, mask: Mask, rng: Generator) -> Mask:
        """Return a circuit and one of the pool's."""
        more: Mask = mask | self.circuit(0, rng)
        return more


TOY = component_graph(GraphShape(3, 4))
"""Graph of the drawn scenes."""


def numbered(n: int, start: int) -> Mask:
    """``[circuit, edge]``: n different circuits of edge ``start`` and some of the next ten."""
    bits = np.arange(n)[:, None] >> np.arange(10) & 1
    masks = np.zeros((n, TOY.n_edges), dtype=bool)
    masks[:, start] = True
    masks[:, start + 1 : start + 11] = bits == 1
    return masks


def drawn_scenes(plan: Plan) -> list[Scene]:
    """Scenes of known distributions."""
    return [
        *_equivalence_scenes(plan.n_prompts),
        *_independence_scenes(plan.n_prompts),
        *_random_circuit_scenes(),
        *_minimality_scenes(),
        *_completeness_scenes(),
    ]


def _equivalence_scenes(n_prompts: int) -> list[Scene]:
    def scene(says: str, null: bool, above: float, equal: float = 0) -> Scene:
        def draw(rng: Generator, trials: Trials) -> Verdict:
            sign = rng.choice([1, 0, -1], n_prompts, p=[above, equal, 1 - above - equal])
            model = 1 + rng.normal(0, 0.1, n_prompts)
            circuit = model + sign * (0.1 + rng.exponential(0.3, n_prompts))
            zeros = np.zeros(n_prompts)
            given = Given(model, zeros, lambda mask: circuit, TOY)
            return equivalence(Candidate(given, numbered(1, 0)[0]), trials)

        theory = None if equal else equivalence_power(n_prompts, above, Trials())
        return Scene("equivalence", "drawn", says, null, draw, theory=theory)

    return [
        scene("above the model on 60 % of prompts, the end of H0", True, 0.6),
        scene("above on 45 %, equal on 30 %: with half of the ties 60 %", True, 0.45, 0.3),
        scene("above on 50 %", True, 0.5),
        scene("above on 80 %", False, 0.8),
    ]


def equivalence_power(n: int, odds: float, trials: Trials) -> float:
    """Probability that equivalence is rejected without ties."""
    k = range(n + 1)
    p_values = np.array([equivalence_p_value(wins, n, trials.epsilon) for wins in k])
    return float(stats.binom.pmf(k, n, odds)[p_values < trials.alpha].sum())


def _independence_scenes(n: int) -> list[Scene]:
    """Values of model, of what is left without the circuit, and without any edge."""

    def scene(says: str, null: bool, values: Callable[[Generator], Sequence[Values]]) -> Scene:
        def draw(rng: Generator, trials: Trials) -> Verdict:
            model, left, nothing = values(rng)
            given = Given(model + 10, nothing, lambda mask: left, TOY)
            return independence(Candidate(given, numbered(1, 0)[0]), trials)

        return Scene("independence", "drawn", says, null, draw)

    def heavy(rng: Generator) -> list[Values]:
        return [np.round(rng.standard_t(2, n)), *rng.standard_t(2, (2, n))]

    def shared(rng: Generator) -> list[Values]:
        prompt, *rest = rng.normal(size=(4, n))
        return [prompt + 0.5 * value for value in rest]

    def left_over(rng: Generator) -> list[Values]:
        model, noise, nothing = rng.normal(size=(3, n))
        return [model, model + sqrt(3) * noise, nothing]

    return [
        scene("normal values that are independent", True, lambda rng: [*rng.normal(size=(3, n))]),
        scene("heavy-tailed values that are independent, the model's with ties", True, heavy),
        scene("values go together by the prompt alone, also without any edge", True, shared),
        scene("correlation of 0.5 with what is left", False, left_over),
    ]


def _random_circuit_scenes() -> list[Scene]:
    """Sufficiency and necessity: the circuit's place among 1,000 random circuits is set."""
    pool, own = numbered(1000, 0), numbered(1, 100)[0]

    def scene(test: str, says: str, null: bool, surpassed: int, equal: int = 0) -> Scene:
        far = np.arange(1, 1001) / 1000  # distances of random circuits from the model
        place = far[-surpassed] - 0.0005 if test == "sufficiency" else far[surpassed - 1] + 0.0005
        if equal:
            tied = slice(1000 - surpassed - equal, 1000 - surpassed)
            place = far[tied] = far[tied].mean()
        distance = dict(zip(map(np.ndarray.tobytes, pool), far.tolist(), strict=True))
        distance[own.tobytes()] = place

        def values(mask: Mask) -> Values:
            circuit = mask if test == "sufficiency" else ~mask
            return np.full(4, 1 - sqrt(distance[circuit.tobytes()]))

        def draw(rng: Generator, trials: Trials) -> Verdict:
            candidate = Candidate(Given(np.ones(4), np.zeros(4), values, TOY), own)
            candidate.sampler = Pool(TOY, pool)
            return _AGAINST_RANDOM[test](candidate, trials)

        theory = random_power(surpassed / 1000, Trials())
        return Scene(test, "drawn", says, null, draw, theory=theory)

    found = []
    for test in _AGAINST_RANDOM:
        found += [
            scene(test, "surpasses 90 % of random circuits, the end of H0", True, 900),
            scene(test, "surpasses 50 %", True, 500),
            scene(test, "surpasses 98 %", False, 980),
        ]
    ties = scene("sufficiency", "surpasses 88 %, equals 10 %", True, 880, 100)
    return [found[0], ties, *found[1:]]


_AGAINST_RANDOM: dict[str, _Test] = {
    "sufficiency": sufficiency,
    "necessity": necessity,
}


def random_power(share: float, trials: Trials) -> float:
    """Probability of rejection of a circuit that surpasses a share of random ones."""
    k = np.arange(trials.n_random + 1)
    p_values = stats.binom.sf(k - 1, trials.n_random, trials.quantile)
    chance = stats.binom.pmf(k, trials.n_random, share)
    return float(chance[p_values < trials.alpha].sum())


def edge_power(share: float, trials: Trials, n_edges: int = 1) -> float:
    """Probability that an edge that surpasses a share of added ones is called superfluous."""
    k = np.arange(trials.n_random + 1)
    p_values = stats.binom.cdf(k, trials.n_random, trials.quantile)
    chance = stats.binom.pmf(k, trials.n_random, share)
    return float(chance[p_values < trials.alpha / n_edges].sum())


def _minimality_scenes() -> list[Scene]:
    """Edges add what they weigh; what a random one of 200 others weighs is known."""
    n_others = 200
    others = np.arange(TOY.n_edges) - 40
    others = np.where((others >= 0) & (others < n_others), others + 1, 0)
    pool = np.eye(TOY.n_edges, dtype=bool)[others > 0]

    def scene(says: str, null: bool, shares: Sequence[float], theory: float | None) -> Scene:
        weights = others / n_others
        weights[: len(shares)] = np.array(shares) + 0.5 / n_others
        own = np.arange(TOY.n_edges) < len(shares)

        def draw(rng: Generator, trials: Trials) -> Verdict:
            given = Given(np.ones(4), np.zeros(4), lambda mask: np.full(4, weights @ mask), TOY)
            candidate = Candidate(given, own)
            candidate.sampler = Pool(TOY, pool)
            return _minimality(candidate, trials)

        return Scene("minimality", "drawn", says, null, draw, theory=theory)

    trials = Trials()
    alone, together = edge_power(0.9, trials), edge_power(0.9, trials, 20)
    return [
        scene("its one edge surpasses 90 % of added ones, the end of H0", True, [0.9], alone),
        scene("each of its 20 edges surpasses 90 %", True, [0.9] * 20, together),
        scene("each of its 20 edges surpasses all", True, [1.0] * 20, 0.0),
        scene(
            "19 of 20 edges surpass all, one 70 %",
            False, [0.7] + [1.0] * 19, edge_power(0.7, trials, 20),
        ),
    ]  # fmt: skip


def _completeness_scenes() -> list[Scene]:
    """Differences of circuit and model without random parts follow a known distribution."""
    tolerance = Trials().tolerance

    def scene(says: str, null: bool, difference: Callable[[Generator], float]) -> Scene:
        def draw(rng: Generator, trials: Trials) -> Verdict:
            def values(mask: Mask) -> Values:
                return np.full(4, 1 - (mask.sum() <= own.sum()) * tolerance * difference(rng))

            own = TOY.edge_mask(["input->a0.h0<v>", "a0.h0->m1", "m1->logits"])
            return completeness(
                Candidate(Given(np.ones(4), np.zeros(4), values, TOY), own), trials
            )[0]

        return Scene("completeness", "drawn", says, null, draw)

    at_end = "mean the tolerance, the end of H0"
    return [
        scene(f"exponential differences, {at_end}", True, lambda rng: rng.exponential()),
        scene(f"even differences, {at_end}", True, lambda rng: rng.uniform(0, 2)),
        scene(f"0 or twice the mean, {at_end}", True, lambda rng: 2.0 * int(rng.integers(2))),
        scene(f"0 once in 20, else a little above, {at_end}", True, _rarely_nothing),
        scene("exponential, mean twice the tolerance", False, lambda rng: rng.exponential(2)),
        scene("even, mean twice the tolerance", False, lambda rng: rng.uniform(0, 4)),
    ]


def _rarely_nothing(rng: Generator) -> float:
    return (rng.random() < 0.95) / 0.95


# --- a bundled model ----------------------------------------------------------------------


class Remembered(Evaluator):
    """An evaluator that evaluates each circuit once."""

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self._seen: dict[bytes, Values] = {}

    def values(self, mask: Mask) -> Values:
        """``[prompt]``: metric of a circuit."""
        key = np.packbits(mask).tobytes()
        if key not in self._seen:
            self._seen[key] = super().values(mask)
        return self._seen[key]


class Studied:
    """A model, circuits found in it, and what random ones are like.

    Parameters
    ----------
    experiment
        Model, prompts and metric.
    plan
        How many random circuits, how many edges.
    """

    def __init__(self, experiment: Experiment, plan: Plan) -> None:
        self.graph = experiment.graph
        self.evaluator = Remembered(experiment)
        self.n_pool, self.n_edges = plan.n_pool, plan.n_edges
        self.scores = eap_ig(experiment)
        self.rng = np.random.default_rng([SEED, 1])

    def top(self, n_edges: int) -> Candidate:
        """Return the circuit of the largest scores."""
        return Candidate(self.evaluator, select_top(self.graph, self.scores, n_edges))

    def among(self, mask: Mask, pool: Mask) -> Candidate:
        """Return a circuit whose random circuits are those of a pool."""
        candidate = Candidate(self.evaluator, mask)
        candidate.sampler = Pool(self.graph, pool)
        return candidate

    def random(self, n_edges: int, avoid: Mask | None = None) -> Mask:
        """``[circuit, edge]``: a pool of random circuits."""
        sampler = PathSampler(self.graph)
        return np.array([sampler.circuit(n_edges, self.rng, avoid) for _ in range(self.n_pool)])

    def surpassed(self, test: str, pool: Mask) -> Values:
        """``[circuit]``: share of a pool that each of its circuits surpasses in a test."""
        model = Candidate(self.evaluator, pool[0])
        kept = pool if test == "sufficiency" else ~pool
        far = np.array([model.distance(self.evaluator.values(mask), model.model) for mask in kept])
        better = far[:, None] < far if test == "sufficiency" else far[:, None] > far
        return np.asarray(better.mean(1))

    def added(self, candidate: Candidate) -> tuple[Mask, list[Values]]:
        """Return circuits with a random path more, and what each edge that it adds does there."""
        sampler, masks, effects = PathSampler(self.graph), [], []
        values = self.evaluator.values
        for _ in range(max(1, self.n_pool // 4)):
            more = sampler.inflated(candidate.mask, self.rng)
            found = []
            for edge in np.flatnonzero(more & ~candidate.mask):
                less = more.copy()
                less[edge] = False
                found.append(candidate.distance(values(more), values(less)))
            masks.append(more)
            effects.append(np.array(found))
        return np.array(masks), effects

    def mean_difference(self, candidate: Candidate) -> float:
        """Return what share of the gap circuit and model differ by, over all knock-outs."""
        senders = np.unique(self.graph.edge_sender[candidate.mask])
        inner = senders[~self.graph.source[senders]].tolist()
        n, mean = len(inner), 0.0
        for size in range(n + 1):  # each size is equally likely, as is each set of that size
            for nodes in combinations(inner, size):
                kept = ~np.isin(self.graph.edge_sender, nodes)
                circuit = candidate.share(self.evaluator.values(candidate.mask & kept))
                model = candidate.share(self.evaluator.values(kept))
                mean += abs(circuit - model) / ((n + 1) * comb(n, size))
        return mean


def _of(verdict: _Test, candidate: Candidate) -> _Draw:
    """One and the same circuit, with other seeds."""
    return lambda rng, trials: verdict(candidate, trials)


def _minimality(candidate: Candidate, trials: Trials) -> Verdict:
    return minimality(candidate, trials)[0]


def _completeness(candidate: Candidate, trials: Trials) -> Verdict:
    return completeness(candidate, trials)[0]


def model_scenes(experiment: Experiment, plan: Plan) -> Iterator[Scene]:
    """Scenes of a model's own values."""
    studied = Studied(experiment, plan)
    for scenes in (
        _whole,
        _unpaired,
        _random_of_the_model,
        _found_in_the_model,
        _edges,
        _knockouts,
    ):
        for scene in scenes(studied):
            yield replace(scene, subject=experiment.model.name)


def _whole(studied: Studied) -> Iterator[Scene]:
    whole = Candidate(studied.evaluator, np.ones(studied.graph.n_edges, dtype=bool))
    for test, verdict in {"equivalence": equivalence, **_AGAINST_RANDOM}.items():
        yield Scene(
            test,
            "",
            "the whole model",
            True,
            _of(verdict, whole),
            theory=0.0,
        )


def _unpaired(studied: Studied) -> Iterator[Scene]:
    candidate = studied.top(60)
    values = candidate.model, candidate.complement, studied.evaluator.empty_values

    def draw(rng: Generator, trials: Trials) -> Verdict:
        model, left, nothing = map(rng.permutation, values)
        given = Given(model, nothing, lambda mask: left, studied.graph)
        return independence(Candidate(given, candidate.mask), trials)

    yield Scene("independence", "", "its own values, of different prompts", True, draw)


def _random_of_the_model(studied: Studied) -> Iterator[Scene]:
    """Large random circuits: smaller ones mostly do nothing, which is a tie."""
    pool = studied.random(studied.graph.n_edges * 2 // 5)
    for test, verdict in _AGAINST_RANDOM.items():
        shares = studied.surpassed(test, pool)
        at = int(np.argmax(np.where(shares <= Trials().quantile, shares, -1)))
        at_the_end = _of(verdict, studied.among(pool[at], pool))

        def any_of_them(rng: Generator, trials: Trials, verdict: _Test = verdict) -> Verdict:
            return verdict(studied.among(pool[rng.integers(len(pool))], pool), trials)

        theory = random_power(float(shares[at]), Trials())
        says = f"a random circuit that surpasses {shares[at]:.1%} of {len(pool):,}"
        yield Scene(test, "", says, True, at_the_end, theory=theory)
        theory = float(np.mean([random_power(share, Trials()) for share in shares]))
        says = "a random circuit among random ones (H0 is true of 90 %)"
        yield Scene(test, "", says, True, any_of_them, theory=theory)


def _found_in_the_model(studied: Studied) -> Iterator[Scene]:
    found = studied.top(60)
    for test, verdict in _AGAINST_RANDOM.items():
        avoid = None if test == "sufficiency" else found.mask
        candidate = studied.among(found.mask, studied.random(found.size, avoid))
        says = f"{found.size} edges found by eap-ig among as large random circuits"
        yield Scene(
            test,
            "",
            says,
            False,
            _of(verdict, candidate),
        )


def _edges(studied: Studied) -> Iterator[Scene]:
    """One edge of a large circuit, by its place among edges that random paths add."""
    whole = studied.top(studied.n_edges)
    pool, effects = studied.added(whole)
    edges = np.flatnonzero(whole.mask)
    shares = np.zeros(len(edges))
    for i, edge in enumerate(edges):
        less = whole.mask.copy()
        less[edge] = False
        effect = whole.distance(whole.circuit, studied.evaluator.values(less))
        shares[i] = np.mean([(effect > others).mean() for others in effects])
    quantile = Trials().quantile
    for null, wanted in ((True, quantile), (False, 0.7)):
        fits = shares >= quantile if null else shares < quantile
        if not fits.any():
            continue
        at = int(np.argmin(np.where(fits, abs(shares - wanted), 2)))
        candidate = studied.among(whole.mask, pool)
        candidate.counted = np.arange(studied.graph.n_edges) == edges[at]
        name = studied.graph.edge_name(int(edges[at]))
        yield Scene(
            "minimality",
            "",
            f"{name} of {whole.size} edges surpasses {shares[at]:.1%} of added ones",
            null,
            _of(_minimality, candidate),
            theory=edge_power(float(shares[at]), Trials()),
        )


def _knockouts(studied: Studied) -> Iterator[Scene]:
    """All knock-outs of a small circuit are counted out, so that their mean is known."""
    candidate = studied.top(12)
    mean = studied.mean_difference(candidate)
    for null, times in ((True, 1), (False, 2)):
        end = "mean the tolerance, the end of H0" if null else "mean twice the tolerance"
        yield Scene(
            "completeness",
            "",
            f"{candidate.size} edges found by eap-ig, {end}",
            null,
            _of(_completeness, candidate),
            Trials(tolerance=mean / times),
        )
