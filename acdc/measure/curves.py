"""Faithfulness over circuit size, and the areas that the MIB benchmark reports of it.

At each fraction k of the grid the circuit is the top ``floor(k * n_edges)`` edges of a ranking,
pruned of what is disconnected; f(k) is its faithfulness.  Then, by the trapezoid rule between
the points of the grid, with no point (0, 0) added::

    CPR = integral of f(k)        higher is better; f = 1 everywhere gives 0.999
    CMD = integral of |1 - f(k)|  0 is perfect

What such an area means hangs on choices that are seldom stated, so each number here says which
it used (:class:`Area`):

========  =====================================================================================
ranking   ``signed`` or ``absolute`` scores (MIB: CPR by signed, CMD by absolute ones);
          ``sweep``: circuits of ACDC over thresholds, the largest of at most that size
axis      ``linear``: sizes as they are, so that k from 0.5 to 1 is half of the area (MIB);
          ``log``: natural logarithm, total width ln 1000 = 6.908
size      ``nominal``: the fraction asked for (MIB); ``actual``: the edges left after pruning,
          over all edges (on the log axis a circuit of no edge counts as one of one edge)
========  =====================================================================================

References
----------
Mueller et al. 2025, "MIB: a mechanistic interpretability benchmark", arXiv 2504.13151.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.errors import OptionError
from acdc.measure.evaluation import (
    DEFAULT_FAITHFULNESS,
    Evaluator,
    interval,
    is_faithful,
    resampled_faithfulness,
)
from acdc.settings import RANKINGS
from graphs.known.roc import MIB_FRACTIONS
from graphs.select import prune, select_top, top_edges

__all__ = [
    "AXES",
    "MEASURES",
    "SIZES",
    "Area",
    "Curve",
    "Point",
    "choice_curve",
    "ranked_scores",
    "score_curve",
    "smallest_faithful",
    "sweep_curve",
    "trapezoid",
]

Mask = NDArray[np.bool_]
Scores = NDArray[np.float64]

MEASURES = ("CPR", "CMD")
AXES = ("linear", "log")
SIZES = ("nominal", "actual")


@dataclass(frozen=True)
class Area:
    """One area, with the choices that it depends on.

    Parameters
    ----------
    measure
        ``CPR`` or ``CMD``.
    ranking, axis, size
        See the module.
    value
        Of all prompts.
    low, high
        95 % percentile bootstrap interval over prompts.
    """

    measure: str
    ranking: str
    axis: str
    size: str
    value: float
    low: float
    high: float

    @property
    def is_mib(self) -> bool:
        """Whether it is what MIB's leaderboard shows."""
        ranking = "signed" if self.measure == "CPR" else "absolute"
        return (self.ranking, self.axis, self.size) == (ranking, "linear", "nominal")


@dataclass(frozen=True)
class Point:
    """One circuit of a curve.

    Parameters
    ----------
    fraction
        Share of all edges that was asked for.
    n_asked
        ``floor(fraction * n_edges)``.
    n_edges
        Edges that are left after pruning.
    metric, faithfulness
        Of all prompts.
    low, high
        95 % bootstrap interval of the faithfulness.
    """

    fraction: float
    n_asked: int
    n_edges: int
    metric: float
    faithfulness: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Curve:
    """Metric values of every prompt at every size.

    Parameters
    ----------
    ranking
        ``absolute``, ``signed`` or ``sweep``.
    fractions
        ``[point]`` ascending, above 0.
    n_asked, n_edges
        ``[point]``: edges asked for, and left after pruning.
    n_total
        Edges of the graph.
    values
        ``[point, prompt]``, in the metric's own unit.
    full, empty
        ``[prompt]``: with every edge, with none.
    n_resamples, seed
        Of the bootstrap.
    """

    ranking: str
    fractions: tuple[float, ...]
    n_asked: tuple[int, ...]
    n_edges: tuple[int, ...]
    n_total: int
    values: Scores
    full: Scores
    empty: Scores
    n_resamples: int = 1000
    seed: int = 0

    @cached_property
    def faithfulness(self) -> Scores:
        """``[point]``: ratio of means over the prompts."""
        empty = self.empty.mean()
        return (self.values.mean(1) - empty) / (self.full.mean() - empty)

    @cached_property
    def resampled(self) -> Scores:
        """``[resample, point]``: faithfulness on prompts drawn with replacement."""
        return resampled_faithfulness(
            self.values, self.full, self.empty, self.n_resamples, self.seed
        )

    def points(self) -> tuple[Point, ...]:
        """The circuits, from small to large."""
        low, high = interval(self.resampled)
        columns = (
            self.fractions,
            self.n_asked,
            self.n_edges,
            self.values.mean(1).tolist(),
            self.faithfulness.tolist(),
            low.tolist(),
            high.tolist(),
        )
        return tuple(Point(*row) for row in zip(*columns, strict=True))

    def area(self, measure: str, axis: str = "linear", size: str = "nominal") -> Area:
        """Return one area.

        Parameters
        ----------
        measure
            One of :data:`MEASURES`.
        axis
            One of :data:`AXES`.
        size
            One of :data:`SIZES`.
        """
        for name, value, known in (
            ("measure", measure, MEASURES), ("axis", axis, AXES), ("size", size, SIZES),
        ):  # fmt: skip
            if value not in known:
                raise OptionError(f"{name} {value!r}: expected {' or '.join(known)}")
        x = self._sizes(axis, size)
        rows = np.vstack([self.faithfulness, self.resampled])
        heights = rows if measure == "CPR" else np.abs(1 - rows)
        areas = trapezoid(x, heights)
        low, high = interval(areas[1:])
        return Area(measure, self.ranking, axis, size, float(areas[0]), float(low), float(high))

    def areas(self) -> tuple[Area, ...]:
        """All eight: CPR and CMD, on both axes, over both sizes."""
        return tuple(self.area(m, axis, size) for m in MEASURES for axis in AXES for size in SIZES)

    def _sizes(self, axis: str, size: str) -> Scores:
        if size == "nominal":
            x = np.array(self.fractions)
        else:
            least = 1 if axis == "log" else 0
            x = np.maximum(np.array(self.n_edges), least) / self.n_total
        return np.log(x) if axis == "log" else x


def trapezoid(x: Scores, y: Scores) -> Scores:
    """Area under ``y [..., point]`` over ``x [point]`` by the trapezoid rule: ``[...]``."""
    return (np.diff(x) * (y[..., 1:] + y[..., :-1]) / 2).sum(-1)


def ranked_scores(experiment: Experiment, scores: Scores, ranking: str) -> Scores:
    """Scores so that the edges to keep have the largest.

    Parameters
    ----------
    experiment
        Its metric and direction decide the sign.
    scores
        ``[edge]`` of an attribution method: estimated change of the metric when ablated.
    ranking
        ``absolute``, or ``signed``: edges whose ablation makes the metric worse come first.
    """
    if ranking not in RANKINGS:
        raise OptionError(f"ranking {ranking!r}: expected {' or '.join(RANKINGS)}")
    return np.abs(scores) if ranking == "absolute" else experiment.minimised_sign * scores


def score_curve(
    evaluator: Evaluator,
    scores: Scores,
    ranking: str = "absolute",
    *,
    fractions: Sequence[float] = MIB_FRACTIONS,
    n_resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] = lambda n_circuits: None,
) -> Curve:
    """Measure the circuits of a ranking at every size of the grid.

    Parameters
    ----------
    evaluator
        Model, prompts, metric and ablation.
    scores
        ``[edge]``, see :func:`ranked_scores`.
    ranking
        ``absolute`` or ``signed``.
    fractions
        Sizes as shares of all edges, ascending, above 0 and at most 1.
    n_resamples, seed
        Of the bootstrap over prompts.
    progress
        Called with 1 after each circuit.

    Raises
    ------
    OptionError
        If faithfulness is undefined (the metric is the same with every edge and with none), or
        the fractions are not as above.
    """
    graph = evaluator.experiment.graph
    ranked = ranked_scores(evaluator.experiment, scores, ranking)

    def circuit(n: int) -> Mask:
        return prune(graph, top_edges(ranked, n))

    return _curve(evaluator, ranking, circuit, fractions, n_resamples, seed, progress)


def choice_curve(
    evaluator: Evaluator,
    choose: Callable[[int], Mask],
    ranking: str,
    *,
    fractions: Sequence[float] = MIB_FRACTIONS,
    n_resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] = lambda n_circuits: None,
) -> Curve:
    """Measure the circuits of at most so many edges that a function gives.

    Parameters
    ----------
    choose
        ``n -> mask [edge]``, as :class:`acdc.methods.select.Chooser`.
    ranking
        What it goes by, as the curve says.
    evaluator, fractions, n_resamples, seed, progress
        As in :func:`score_curve`, and so are the errors.
    """
    return _curve(evaluator, ranking, choose, fractions, n_resamples, seed, progress)


def sweep_curve(
    evaluator: Evaluator,
    masks: Iterable[Mask],
    *,
    fractions: Sequence[float] = MIB_FRACTIONS,
    n_resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] = lambda n_circuits: None,
) -> Curve:
    """Measure separate circuits at every size of the grid, as MIB takes binary circuits.

    At each fraction the circuit is the largest of at most that many edges (the first of
    equals); the empty and the full circuit are always among them.

    Parameters
    ----------
    masks
        ``[edge]`` each, as of ACDC over thresholds; they are pruned.
    evaluator, fractions, n_resamples, seed, progress
        As in :func:`score_curve`, and so are the errors.
    """
    graph = evaluator.experiment.graph
    pruned = [prune(graph, mask) for mask in masks]
    every = np.ones(graph.n_edges, dtype=bool)
    known = [*pruned, ~every, every]

    def circuit(n: int) -> Mask:
        return max((m for m in known if m.sum() <= n), key=lambda m: int(m.sum()))

    return _curve(evaluator, "sweep", circuit, fractions, n_resamples, seed, progress)


def _curve(
    evaluator: Evaluator,
    ranking: str,
    circuit: Callable[[int], Mask],
    fractions: Sequence[float],
    n_resamples: int,
    seed: int,
    progress: Callable[[int], None],
) -> Curve:
    if not fractions or not all(0 < k <= 1 for k in fractions) or np.any(np.diff(fractions) <= 0):
        raise OptionError(f"fractions {fractions}: expected ascending numbers above 0, at most 1")
    if not evaluator.has_gap:
        raise OptionError(
            f"metric {evaluator.experiment.metric.name!r} is {evaluator.full:g} with every edge "
            "and with none: faithfulness is undefined; choose another metric or task"
        )
    n_total = evaluator.experiment.graph.n_edges
    sizes = [math.floor(k * n_total) for k in fractions]
    masks = [circuit(n) for n in sizes]
    known = {
        np.zeros(n_total, dtype=bool).tobytes(): evaluator.empty_values,
        np.ones(n_total, dtype=bool).tobytes(): evaluator.full_values,
    }
    for mask in masks:
        if mask.tobytes() not in known:
            known[mask.tobytes()] = evaluator.values(mask)
        progress(1)
    return Curve(
        ranking,
        tuple(fractions),
        tuple(sizes),
        tuple(int(mask.sum()) for mask in masks),
        n_total,
        np.stack([known[mask.tobytes()] for mask in masks]),
        evaluator.full_values,
        evaluator.empty_values,
        n_resamples,
        seed,
    )


def smallest_faithful(
    evaluator: Evaluator,
    ranked: Scores,
    faithfulness: float = DEFAULT_FAITHFULNESS,
    *,
    surely: bool = False,
    choose: Callable[[int], Mask] | None = None,
    below: int | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Mask:
    """Return the smallest circuit along a ranking that is faithful.

    It grows by a quarter until it is, then the last step is halved until it is at most 2 %.
    Faithfulness need not rise with size: what is found is the first size at which it was met, on
    either side of 1 (:func:`acdc.measure.evaluation.is_faithful`).

    Parameters
    ----------
    evaluator
        Model, prompts, metric and ablation.
    ranked
        ``[edge]``, the edges to keep highest (:func:`ranked_scores`).
    faithfulness
        What the circuit must reach, and exceed 1 by no more than 1 by that; where it is undefined
        every circuit counts as faithful.
    surely
        With a standard error to spare, so that it is about as faithful on other prompts.
    choose
        Gives the circuit of at most so many edges; None: the largest connected one that the
        ranking gives (:func:`graphs.select_top`).
    below
        Size from which on circuits are of no interest; None: of any size.
    note
        Told in words which size is looked at.

    Returns
    -------
    ndarray
        ``[edge]`` mask; its sum is the size.  Every edge, if no circuit ``below`` is faithful.
    """
    graph = evaluator.experiment.graph
    choose = choose or (lambda n: select_top(graph, ranked, n, absolute=False))

    def faithful(n: int) -> bool:
        note(f"trying {n:,} edges")
        mask = choose(n)
        if surely:
            return evaluator.is_surely_faithful(mask, faithfulness)
        return is_faithful(evaluator.faithfulness(mask), faithfulness)

    low, high = 0, 1
    while high < graph.n_edges and not faithful(high):
        low, high = high, min(graph.n_edges, int(high * 1.25) + 1)
        if below is not None and low >= below - 1:
            return np.ones(graph.n_edges, dtype=bool)
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if faithful(middle) else (middle, high)
    return choose(high)
