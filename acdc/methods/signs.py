"""Which scores have a sign that other prompts would give them too.

Nikankin et al. 2025, arXiv 2510.25786, leave out edges whose attribution is not consistent over
bootstrap resamples of the prompts.  Here the prompts are cut into at most :data:`PARTS` parts, the
method scores each, and parts are drawn with replacement: an edge is stable if the mean of its
scores has the sign of its score in a given share of the draws.  That costs as many passes as the
scores themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.errors import OptionError

__all__ = ["DRAWS", "PARTS", "agreeing", "stable_signs"]

Mask = NDArray[np.bool_]
Scores = NDArray[np.float64]

PARTS = 32
"""Parts of the prompts, at most."""
DRAWS = 1000
"""Resamples of the parts."""

_AT_ONCE = 50  # draws whose sums are held together


def stable_signs(
    experiment: Experiment,
    score: Callable[[Experiment], Scores],
    scores: Scores,
    share: float,
    seed: int = 0,
) -> Mask:
    """Return which edges keep the sign of their score.

    Parameters
    ----------
    experiment
        Prompts that are resampled.
    score
        Gives scores ``[edge]``, a mean over rows, of the experiment on some of its prompts.
    scores
        ``[edge]``: of all prompts.
    share
        Of the draws in which a sign must be the same.
    seed
        Of the draws.

    Raises
    ------
    OptionError
        If there is one prompt alone.
    """
    pairs = experiment.task.pairs
    if len(pairs) < 2:
        raise OptionError("stable: one prompt cannot be resampled; take more, or leave it out")
    known = experiment.pinned()  # parts share constants that ablated edges carry
    sums = []
    for part in np.array_split(np.arange(len(pairs)), min(PARTS, len(pairs))):
        few = known.on(replace(experiment.task, pairs=tuple(pairs[i] for i in part)))
        sums.append(few.n_rows * score(few))
    return agreeing(np.stack(sums), np.sign(scores), seed) >= share


def agreeing(sums: NDArray[np.float64], sign: NDArray[np.float64], seed: int = 0) -> Scores:
    """Share of the draws in which the sum over parts has a sign: ``[edge]``.

    Parameters
    ----------
    sums
        ``[part, edge]``: score times rows.
    sign
        ``[edge]``: -1, 0 or 1.
    seed
        Of the draws.
    """
    n_parts = len(sums)
    counts = np.random.default_rng(seed).multinomial(n_parts, np.full(n_parts, 1 / n_parts), DRAWS)
    agree = np.zeros(sums.shape[1])
    for some in np.array_split(counts, -(-DRAWS // _AT_ONCE)):
        agree += (np.sign(some @ sums) == sign).sum(0)
    return agree / DRAWS
