"""Rows of a task file that discovery leaves to evaluation.

A built-in task gives as many prompts as one asks for; a file has only its rows, so discovery
keeps off a share of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acdc.errors import OptionError
from acdc.tasks.base import Pair, Task

__all__ = ["check_holdout", "held_out", "select_pairs", "some_prompts"]


def check_holdout(share: float) -> None:
    """Raise OptionError if a share of rows makes no sense."""
    if not 0 <= share < 1:
        raise OptionError(
            f"holdout {share}: expected the share of rows left to evaluation, at least 0 and "
            "below 1, as 0.25"
        )


def held_out(n_rows: int, share: float, seed: int) -> NDArray[np.bool_]:
    """Draw the rows that discovery does not see.

    Parameters
    ----------
    n_rows
        Rows of the file.
    share
        Of them; what it gives is rounded down, so that of fewer than ``1 / share`` rows none
        is left out.
    seed
        Of the draw: another seed leaves out others.

    Returns
    -------
    ndarray
        ``[row]`` bool.

    Examples
    --------
    >>> int(held_out(10, 0.25, seed=0).sum())
    2
    """
    check_holdout(share)
    mask = np.zeros(n_rows, dtype=bool)
    drawn = np.random.default_rng(seed).permutation(n_rows)
    mask[drawn[: int(n_rows * share)]] = True
    return mask


def select_pairs(task: Task, pairs: tuple[Pair, ...], **info: Any) -> Task:
    """Return the task with these of its pairs alone; ``info`` says more about them."""
    lengths = Counter(len(pair.clean) for pair in pairs)
    about = {name: value for name, value in task.info.items() if name != "templates"}
    about |= {
        "n_prompts": len(pairs),
        "lengths": {str(length): lengths[length] for length in sorted(lengths)},
    }
    return replace(task, pairs=pairs, info=about | info)


def some_prompts(task: Task, n_prompts: int) -> Task:
    """Return the task with at most so many of its pairs, of few lengths: quick to run.

    Up to half of them are of the length that is most common, up to half of the next one, ...; in
    each, the first.
    """
    if len(task) <= n_prompts:
        return task
    alike = defaultdict[tuple[int, tuple[int, ...]], list[Pair]](list)
    for pair in task.pairs:
        alike[len(pair.clean), pair.scored].append(pair)
    chosen: list[Pair] = []
    for pairs in sorted(alike.values(), key=len, reverse=True):
        chosen += pairs[: (n_prompts + 1) // 2 if len(alike) > 1 else n_prompts]
    return replace(task, pairs=tuple(chosen[:n_prompts]))
