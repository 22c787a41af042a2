"""Which threshold: ACDC is run at several until the circuit is as asked for.

Without a threshold and a number of edges tau is searched for on a log scale.  Where circuits become
faithful is found by rough searches first: on a few of the prompts, of the edges with the largest
attribution scores alone (:mod:`acdc.methods.rough`); they are judged as all circuits are.  From
there on every search is a whole one, and the circuit is exactly the one that ACDC finds at the tau
that is returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from acdc.engine.experiment import Experiment
from acdc.measure.evaluation import (
    DEFAULT_FAITHFULNESS,
    Evaluator,
    is_faithful,
    standard_error,
)
from acdc.methods.base import Found
from acdc.methods.rough import Rough
from acdc.methods.sizes import MOST, of_size
from graphs import Circuit

__all__ = ["DEFAULT", "at_threshold", "n_searches"]

_FIRST, _TOP, _BOTTOM = 0.003, 1.0, 1e-6
"""Tau that is tried first, and between which: fractions of the metric's gap."""

_CLOSE = 0.05
"""A circuit is small enough whose faithfulness is at most so much above what it has to be."""

_AIM = _CLOSE / 2
"""What is aimed at."""

_NEAR = 1.15
"""Or one that is not faithful was found at a tau at most so many times as large."""

_SLOPES = 0.3, 0.45
"""What faithfulness falls by where tau is e times as large, where it is faithful or not."""

_MOST = 13
"""Searches at most."""

_ROUGH, _MOST_ROUGH = 0.075, 4
"""How near to faithful a rough search has to come for the tau to be guessed from it, and how many
there are at most."""

DEFAULT = (
    "default tau: searched on a log scale, first roughly, for a circuit of faithfulness "
    f"{DEFAULT_FAITHFULNESS} (with a standard error to spare) and at most {_CLOSE:g} more; or "
    f"until a tau at most {_NEAR:g} times as large is too large"
)
"""What happens without a threshold and a number of edges."""


def at_threshold(
    experiment: Experiment,
    threshold: float | None,
    n_edges: int | None,
    run: Callable[[float], Found],
    rough: Callable[[], Rough] | None = None,
) -> Found:
    """Run at the threshold that is asked for, or look for one.

    Parameters
    ----------
    experiment
        What circuits are measured on.
    threshold
        Tau, in the metric's unit.
    n_edges
        Look for the largest circuit of at most so many edges, see :mod:`acdc.methods.sizes`.
        With neither: for the smallest that is faithful.
    run
        ``tau -> Found``.
    rough
        Returns what finds about what ``run`` finds, in a fraction of the time, from few of the
        prompts; None: the first tau is the same for all.
    """
    if n_edges is not None:
        return of_size(_gap(experiment), n_edges, run, rough)
    if threshold is None:
        return _of_faithfulness(experiment, run, rough)
    return run(threshold)


def n_searches(threshold: float | None, n_edges: int | None) -> int:
    """At how many thresholds :func:`at_threshold` runs at most."""
    if threshold is not None:
        return 1
    return MOST if n_edges is not None else _MOST


def _gap(experiment: Experiment) -> float:
    """What faithfulness is a share of, in the metric's unit."""
    evaluator = Evaluator(experiment)
    return abs(evaluator.full - evaluator.empty)


@dataclass(frozen=True, eq=False)
class _Try:
    """A circuit, and how good it is.

    Parameters
    ----------
    tau, found
        What it was found at, and what was found.
    faithful
        Whether it is, with a standard error to spare.
    spare
        By how much its faithfulness is above what it has to be, negative where it is not faithful.
    distance
        How far its faithfulness is from 1.
    """

    tau: float
    found: Found
    faithful: bool
    spare: float
    distance: float


def _judge(evaluator: Evaluator, tau: float, found: Found) -> _Try:
    """Measure a circuit."""
    values = evaluator.values(found.circuit.in_circuit)
    value = evaluator.evaluation(values).faithfulness
    if value is None:
        return _Try(tau, found, True, 0.0, 0.0)
    level = DEFAULT_FAITHFULNESS
    full, empty = evaluator.full_values, evaluator.empty_values
    error = standard_error(values, full, empty)
    faithful = is_faithful(value, level, error)
    spare = value - min(error, 1 - level) - level
    if not faithful:  # also one that overshoots
        spare = min(spare, 2 - level - value - _AIM, -0.005)
    return _Try(tau, found, faithful, spare, abs(value - 1))


class _Bracket:
    """Taus between which circuits cease to be faithful.

    Parameters
    ----------
    gap
        Of the metric.

    Attributes
    ----------
    low, high
        The largest tau whose circuit is faithful, the smallest one above it whose circuit is not.
    nearest
        Of all that were tried, the one whose faithfulness is nearest to 1.
    least
        The least step where all that were tried are faithful, or all are not: twice the last.
    """

    def __init__(self, gap: float) -> None:
        self.gap = gap
        self.low: _Try | None = None
        self.high: _Try | None = None
        self.nearest: _Try | None = None
        self.least = math.log(_NEAR)

    def add(self, tried: _Try) -> None:
        """Narrow it."""
        if tried.faithful:
            self.low = tried
        else:
            self.high = tried
        if self.nearest is None or tried.distance < self.nearest.distance:
            self.nearest = tried

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to try."""
        if self.low is not None and self.high is not None:
            return self.high.tau <= _NEAR * self.low.tau
        if self.low is not None:
            return self.low.tau >= _TOP * self.gap
        return self.high is not None and self.high.tau <= _BOTTOM * self.gap

    def between(self) -> float:
        """Where a circuit is expected to be just faithful."""
        if self.low is not None and self.high is not None:
            width = math.log(self.high.tau / self.low.tau)
            share = (self.low.spare - _AIM) / (self.low.spare - self.high.spare)
            return self.low.tau * math.exp(width * min(max(share, 0.3), 0.7))
        one = self.low or self.high
        assert one is not None
        step = max(abs(one.spare - _AIM) / _SLOPES[not one.faithful], self.least)
        self.least *= 2
        tau = one.tau * math.exp(min(step, math.log(10)) * (1 if one.faithful else -1))
        return min(max(tau, _BOTTOM * self.gap), _TOP * self.gap)


def _of_faithfulness(
    experiment: Experiment,
    run: Callable[[float], Found],
    rough: Callable[[], Rough] | None,
) -> Found:
    """Look for the smallest faithful circuit, see :data:`DEFAULT`.

    Where none is: the one that comes nearest.
    """
    gap, evaluator = _gap(experiment), Evaluator(experiment.selection)
    tau = _FIRST * gap if rough is None or not gap else _roughly(gap, evaluator, rough())
    bracket = _Bracket(gap)
    for _ in range(_MOST):
        tried = _judge(evaluator, tau, run(tau))
        bracket.add(tried)
        if (tried.faithful and tried.spare <= _CLOSE) or bracket.is_done:
            break
        tau = bracket.between()
    best = bracket.low or bracket.nearest
    assert best is not None
    return best.found


def _roughly(gap: float, evaluator: Evaluator, search: Callable[[float], Circuit]) -> float:
    """Tau at which rough circuits are just faithful, on the prompts that whole ones are judged on.

    On the few prompts that it is found on a circuit is far more faithful than on others.
    """
    bracket, tau = _Bracket(gap), _FIRST * gap
    for _ in range(_MOST_ROUGH):
        tried = _judge(evaluator, tau, Found(search(tau)))
        bracket.add(tried)
        tau = bracket.between()
        if abs(tried.spare - _AIM) <= _ROUGH or bracket.is_done:
            break
    return tau
