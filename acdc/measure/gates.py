"""Do two edges act together?  Their interaction, its test, and what gate it looks like.

Of two edges a and b there are four values of the metric, ``f[i, j]``: a carries what it does in the
clean run (i = 1) or what an ablated edge carries (i = 0), b likewise; where what is ablated is of
neither run, i = 1 is intact and i = 0 ablated.  Their interaction

    I = f[1, 1] - f[0, 1] - f[1, 0] + f[0, 0]

is 0 where the two add up.  Per prompt it is one number, and whether its mean over prompts is 0 is
tested with simultaneous intervals: over resamples of the prompts the largest studentised deviation
of any pair has a distribution, whose quantile is how far each pair may be off (the single-step
max-T procedure of Westfall and Young 1993, "Resampling-Based Multiple Testing").  So the chance
that *any* additive pair is called a gate is the level, however many pairs there are, provided that
the quantile is one of enough resamples (:func:`check_resamples`) of enough prompts.

An interaction is named by what the edges do alone, ``f[1, j] - f[0, j]`` and ``f[i, 1] - f[i, 0]``:

===========  ===================================================================================
AND          both work in one direction, and more so where the other is there
OR           both work in one direction, and less so where the other is there
XOR          each works in opposite directions with and without the other
INHIBITION   they work in opposite directions, and one does so only with (or without) the other
additive     no interaction was found; with few prompts there may be one
none         neither does anything, alone or together
===========  ===================================================================================

The scale is the metric's: two heads that add to a logit difference need not add to a probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from acdc.errors import OptionError

__all__ = [
    "FEWEST_PROMPTS",
    "KINDS",
    "Gate",
    "check_prompts",
    "check_resamples",
    "combined",
    "name_gates",
]

KINDS = ("AND", "OR", "XOR", "INHIBITION", "additive", "none")
FEWEST_PROMPTS = 32
"""Fewer differences say too little of their spread for the level to hold."""

_BEYOND = 10
"""Resamples that lie beyond the quantile at the least."""

_LEAST_SPREAD = 0.25
"""Of a resample, as a share of the sample's: where few prompts differ some lack them all."""

_ROUNDING = 1e-5
_FLIP = 0.25

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Gate:
    """How two edges act together.

    Parameters
    ----------
    kind
        One of :data:`KINDS`.
    interaction, low, high
        Mean over prompts, in the metric's unit, and its interval; all pairs that were tested lie
        in theirs together.
    neither, only_b, only_a, both
        Mean metric by which of the two is clean (or intact): ``f[0, 0]``, ``f[0, 1]``,
        ``f[1, 0]`` and ``f[1, 1]``.
    """

    kind: str
    interaction: float
    low: float
    high: float
    neither: float
    only_b: float
    only_a: float
    both: float

    @property
    def is_gate(self) -> bool:
        """Whether an interaction was found."""
        return self.kind not in ("additive", "none")


def name_gates(
    values: Values, *, alpha: float = 0.01, n_resamples: int = 1000, seed: int = 0
) -> list[Gate]:
    """Test the interactions of pairs of edges, and name them.

    Parameters
    ----------
    values
        ``[pair, i, j, prompt]``: ``f``.
    alpha
        Chance of calling any additive pair a gate.
    n_resamples, seed
        Of the bootstrap over prompts.

    Raises
    ------
    OptionError
        If there are fewer than :data:`FEWEST_PROMPTS` prompts.
    """
    check_prompts(values.shape[-1])
    if not len(values):
        return []
    rounding = _ROUNDING * np.abs(values).max(axis=(1, 2, 3))
    interactions = values[:, 1, 1] - values[:, 0, 1] - values[:, 1, 0] + values[:, 0, 0]
    off = _how_far(interactions, alpha, n_resamples, np.random.default_rng(seed))
    off = np.maximum(off, rounding)
    means = interactions.mean(-1)
    cells = values.mean(-1)
    found = np.abs(means) > off
    return [
        Gate(
            _kind(cells[i], float(rounding[i])) if found[i] else _no_gate(values[i], rounding[i]),
            float(means[i]),
            float(means[i] - off[i]),
            float(means[i] + off[i]),
            *(float(x) for x in cells[i].ravel()),
        )
        for i in range(len(values))
    ]


def check_prompts(n_prompts: int) -> None:
    """Raise OptionError if there are fewer than :data:`FEWEST_PROMPTS` prompts."""
    if n_prompts < FEWEST_PROMPTS:
        raise OptionError(
            f"{n_prompts} prompts: the spread of interactions needs at least {FEWEST_PROMPTS}, ask "
            "for more (n_prompts)"
        )


def check_resamples(n_resamples: int, alpha: float) -> None:
    """Raise OptionError if too few of the resamples lie beyond the quantile of a level."""
    fewest = math.ceil(_BEYOND / alpha - 1e-6)
    if n_resamples < fewest:
        raise OptionError(
            f"n_resamples {n_resamples} at alpha {alpha:g}: expected at least {fewest:,} "
            f"({_BEYOND} / alpha), fewer do not hold that level"
        )


def combined(kinds: Sequence[str]) -> str:
    """What a pair is, given its kind in each direction: ``mixed`` where two gates disagree.

    A direction that finds no interaction does not contradict one that does: the rest of the
    model is clean in one and corrupt in the other, and may hide it.

    Examples
    --------
    >>> combined(["AND", "additive"]), combined(["AND", "OR"]), combined(["none", "additive"])
    ('AND', 'mixed', 'additive')
    """
    gates = {kind for kind in kinds if kind not in ("additive", "none")}
    if len(gates) > 1:
        return "mixed"
    return next(iter(gates), "additive" if "additive" in kinds else "none")


def _how_far(
    interactions: Values, alpha: float, n_resamples: int, rng: np.random.Generator
) -> Values:
    """``[pair]``: half widths of simultaneous intervals of the means of ``[pair, prompt]``."""
    n = interactions.shape[-1]
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples) / n  # [resample, prompt]
    centred = interactions - interactions.mean(-1, keepdims=True)
    error = interactions.std(-1, ddof=1) / np.sqrt(n)
    varies = error > _ROUNDING * np.abs(interactions).max(initial=0.0)
    if not varies.any():
        return error
    means = drawn @ centred[varies].T  # [resample, pair]
    spread = np.sqrt(np.maximum(drawn @ (centred[varies] ** 2).T - means**2, 0) / (n - 1))
    spread = np.maximum(spread, _LEAST_SPREAD * error[varies])
    largest = (np.abs(means) / spread).max(-1)
    return np.where(varies, np.quantile(largest, 1 - alpha, method="higher") * error, error)


def _kind(cells: Values, rounding: float) -> str:
    """Name an interaction by the mean values ``[i, j]``."""
    a_without, a_with = cells[1] - cells[0]  # what a does, b ablated and b there
    b_without, b_with = cells[:, 1] - cells[:, 0]
    if _flips(a_without, a_with, rounding) and _flips(b_without, b_with, rounding):
        return "XOR"
    a, b = a_without + a_with, b_without + b_with
    if a * b < 0:
        return "INHIBITION"
    interaction = cells[1, 1] - cells[0, 1] - cells[1, 0] + cells[0, 0]
    return "AND" if interaction * (a + b) > 0 else "OR"


def _flips(without: float, with_: float, rounding: float) -> bool:
    """Whether an effect has both signs, neither of them next to nothing."""
    small, large = sorted((abs(without), abs(with_)))
    return without * with_ < 0 and small > max(_FLIP * large, rounding)


def _no_gate(values: Values, rounding: float) -> str:
    """Whether ``[i, j, prompt]`` differ at all."""
    moved = np.abs(values - values[1, 1]).max()
    return "additive" if moved > rounding else "none"
