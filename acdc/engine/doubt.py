"""Guesses of decisions: what became, in the run so far, of edges of which as much was expected.

What is expected of an edge, as attribution scores say, is in the metric's unit, but its scale can
be far off: with a KL divergence most edges are removed whose score is four times tau.  So a guess
does not compare it with tau.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["N_KINDS", "Doubt", "best_length"]

_OCTAVES = 2.0 ** np.arange(-5, 8)
_BOUNDS = np.concatenate([[-np.finfo(float).max], -_OCTAVES[::-1], [0.0], _OCTAVES])
"""Expected changes are told apart by what share of tau they are; of some nothing is expected."""

_N_SHARES = len(_BOUNDS) + 1

_WEIGHT = 2.0
"""Decisions that a prior counts as much as."""

_NOTHING = 0.1
"""How often an edge is kept of which nothing is known, before any was decided."""

N_KINDS = 2 * _N_SHARES


def _prior() -> NDArray[np.float64]:
    """``[kind]``: how often edges are kept, before any was decided."""
    middle = (_BOUNDS[1:-1] + _BOUNDS[2:]) / 2
    share = np.maximum([0.0, 0.0, *middle, 2 * _BOUNDS[-1]], 0.0)
    told, measured = (share**p / (1 + share**p) for p in (1, 3))
    found = 0.02 + 0.96 * np.concatenate([told, measured])
    found[0] = _NOTHING
    return found


def _likeness() -> NDArray[np.float64]:
    """``[kind, kind]``: how much a decision says of edges of another kind.

    Neighbours are alike, unless tau or 0 lies between them; of what was measured in this run no
    kind is like another.
    """
    place = np.arange(_N_SHARES)
    first = np.searchsorted(_BOUNDS, [_BOUNDS[0], 0.0, 1.0], side="right")
    side = np.searchsorted(first, place, side="right")
    near = np.exp(-((place[:, None] - place) ** 2) / 2)
    found = np.eye(N_KINDS)
    found[:_N_SHARES, :_N_SHARES] = np.where(side[:, None] == side, near, 0.0)
    return found


_PRIOR, _LIKENESS = _prior(), _likeness()


class Doubt:
    """How often edges are kept, by what is expected of them and where that comes from.

    Attributes
    ----------
    kept, n
        ``[kind]``: edges that were kept, and decided.
    """

    def __init__(self) -> None:
        self.n, self.kept = np.zeros(N_KINDS), np.zeros(N_KINDS)

    def kinds(
        self, expected: NDArray[np.float64], tau: float, measured: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """``[edge]``: kind of each edge.

        Parameters
        ----------
        expected
            ``[edge]``: what is held against tau; minus infinity where nothing is known.
        tau
            Threshold.
        measured
            ``[edge]``: whether this run has measured it, other edges of the receiver being as
            they were guessed.
        """
        share = expected / tau if tau > 0 else np.where(expected < tau, -1.0, 1.0) * np.inf
        place: NDArray[np.int64] = np.searchsorted(_BOUNDS, share, side="right")
        return place + measured * _N_SHARES

    def kept_of(self, kinds: NDArray[np.int64]) -> NDArray[np.float64]:
        """``[edge]``: how likely each is kept."""
        n, kept = _LIKENESS @ self.n + _WEIGHT, _LIKENESS @ self.kept + _WEIGHT * _PRIOR
        found: NDArray[np.float64] = (kept / n)[kinds]
        return found

    def learn(self, kinds: NDArray[np.int64], kept: NDArray[np.bool_]) -> None:
        """Record decisions."""
        np.add.at(self.n, kinds, 1.0)
        np.add.at(self.kept, kinds, kept)


def best_length(doubts: NDArray[np.float64], overhead: float) -> int:
    """How many decisions to evaluate together: so that most are made in a time.

    Parameters
    ----------
    doubts
        ``[edge]``: how likely each guess is wrong, in the order of decision.
    overhead
        What starting a batch takes, in scenarios.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> sure, unsure = np.full(40, 0.001), np.full(40, 0.3)
    >>> best_length(sure, 4.0), best_length(unsure, 4.0)
    (40, 4)
    """
    reached = np.cumprod(np.concatenate([[1.0], 1.0 - doubts[:-1]]))
    decided = np.cumsum(reached)
    return 1 + int(np.argmax(decided / (overhead + np.arange(1, len(doubts) + 1))))
