"""Which threshold: ACDC is run at several until the circuit is as asked for."""

from __future__ import annotations

import math
from collections.abc import Callable

from acdc.engine.experiment import Experiment
from acdc.measure.evaluation import DEFAULT_FAITHFULNESS, Evaluator
from acdc.methods.base import Found

__all__ = ["DEFAULT", "at_threshold", "n_searches"]

_TAUS = tuple(scale / 10**power for power in range(2, 7) for scale in (3.0, 1.0))
"""Thresholds that are tried by default, as fractions of the metric's gap: 3 %, 1 %, 0.3 % ..."""

_FIRST = _TAUS.index(0.003)
"""Which is tried first: what most circuits need is not far from it."""

_BISECTIONS, _REFINEMENTS = 12, 3

DEFAULT = (
    "default tau: the largest of 3 %, 1 %, 0.3 %, ... of the metric's gap whose circuit has "
    f"faithfulness {DEFAULT_FAITHFULNESS}"
)
"""What happens without a threshold and a number of edges."""


def at_threshold(
    experiment: Experiment,
    threshold: float | None,
    n_edges: int | None,
    run: Callable[[float], Found],
) -> Found:
    """Run at the threshold that is asked for, or look for one.

    Parameters
    ----------
    experiment
        What circuits are measured on.
    threshold
        Tau, in the metric's unit.
    n_edges
        Look for the largest circuit of at most so many edges.  With neither: for the smallest
        that is faithful.
    run
        ``tau -> Found``.
    """
    if n_edges is not None:
        return _of_size(experiment, n_edges, run)
    if threshold is None:
        return _of_faithfulness(experiment, run)
    return run(threshold)


def n_searches(threshold: float | None, n_edges: int | None) -> int:
    """At how many thresholds :func:`at_threshold` runs at most."""
    if threshold is not None:
        return 1
    return _BISECTIONS if n_edges is not None else len(_TAUS) + _REFINEMENTS


def _gap(experiment: Experiment) -> float:
    """What faithfulness is a share of, in the metric's unit."""
    evaluator = Evaluator(experiment)
    return abs(evaluator.full - evaluator.empty)


def _of_faithfulness(experiment: Experiment, run: Callable[[float], Found]) -> Found:
    """Raise tau while the circuit is faithful, or lower it until it is; then halve the last step.

    Where none is: the one that comes nearest.
    """
    gap = _gap(experiment)
    evaluator = Evaluator(experiment.selection)
    distances: list[tuple[float, int, Found]] = []

    def attempt(tau: float) -> tuple[Found, bool]:
        found = run(tau)
        mask = found.circuit.in_circuit
        value = evaluator.faithfulness(mask)
        distances.append((0.0 if value is None else abs(value - 1), len(distances), found))
        return found, evaluator.is_surely_faithful(mask, DEFAULT_FAITHFULNESS)

    taus = [fraction * gap for fraction in _TAUS]
    tried: dict[int, tuple[Found, bool]] = {}

    def is_faithful(i: int) -> bool:
        if i not in tried:
            tried[i] = attempt(taus[i])
        return tried[i][1]

    i = _FIRST
    while i > 0 and is_faithful(i) and is_faithful(i - 1):
        i -= 1
    while not is_faithful(i):
        if i == len(taus) - 1:
            return min(distances)[-1]
        i += 1
    best, low, high = tried[i][0], taus[i], taus[i - 1] if i else 2 * taus[0]
    for _ in range(_REFINEMENTS):
        middle = math.sqrt(high * low)
        found, faithful = attempt(middle)
        if faithful:
            low, best = middle, found
        else:
            high = middle
    return best


def _of_size(experiment: Experiment, n_edges: int, run: Callable[[float], Found]) -> Found:
    """Bisect tau (on a log scale) for the largest circuit of at most ``n_edges`` edges."""
    gap = _gap(experiment)
    low, high = 1e-6 * gap, 2 * gap  # thresholds that keep too many, few enough
    best: Found | None = None
    for _ in range(_BISECTIONS):
        tau = math.sqrt(low * high)
        found = run(tau)
        if found.circuit.n_edges <= n_edges:
            high = tau
            if best is None or found.circuit.n_edges >= best.circuit.n_edges:
                best = found
            if found.circuit.n_edges == n_edges:
                break
        else:
            low = tau
    return run(high) if best is None else best
