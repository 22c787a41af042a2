"""How sure a guess of a decision is: how often guesses like it were right in the run so far."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["N_KINDS", "Doubt", "best_length"]

_BOUNDS = np.array([0.25, 0.5, 0.8, 1.25, 2.0, 4.0])
"""Expected changes are told apart by what share of tau they are."""

_PRIOR = np.array([
    [0.10, 0.15, 0.25, 0.40, 0.35, 0.30, 0.30],
    [0.01, 0.03, 0.15, 0.40, 0.15, 0.05, 0.02],
])  # fmt: skip
"""How often guesses are wrong, before any was made: from elsewhere, and measured in this run."""

_WEIGHT = 4.0
"""Decisions that this counts as much as."""

N_KINDS = _PRIOR.size


class Doubt:
    """How often guesses are wrong, by what is expected of the edge and where that comes from.

    Attributes
    ----------
    wrong, n
        ``[kind]``: guesses that were wrong, and guesses.
    """

    def __init__(self) -> None:
        self.n = np.full(N_KINDS, _WEIGHT)
        self.wrong = _PRIOR.ravel() * _WEIGHT

    def kinds(
        self, cost: NDArray[np.float64], tau: float, measured: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """``[edge]``: kind of each guess.

        Parameters
        ----------
        cost
            ``[edge]``: what is held against tau.
        tau
            Threshold.
        measured
            ``[edge]``: whether this run has measured it, other edges of the receiver being as
            they were guessed.
        """
        share = cost / tau if tau > 0 else np.where(cost < tau, 0.0, np.inf)
        place: NDArray[np.int64] = np.searchsorted(_BOUNDS, share, side="right")
        return place + measured * len(_PRIOR[0])

    def of(self, kinds: NDArray[np.int64]) -> NDArray[np.float64]:
        """``[edge]``: how likely each guess is wrong."""
        found: NDArray[np.float64] = self.wrong[kinds] / self.n[kinds]
        return found

    def learn(self, kinds: NDArray[np.int64], wrong: bool) -> None:
        """Record guesses that were decided, all right but the last one if that was wrong."""
        np.add.at(self.n, kinds, 1.0)
        if wrong:
            self.wrong[kinds[-1]] += 1.0


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
