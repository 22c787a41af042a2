"""Positions of prompts by name: the task's labels where it has them, numbers where not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from acdc.errors import OptionError
from acdc.settings import POSITIONS
from acdc.tasks.base import REST, Pair, Task
from acdc.tasks.positions import Positions, find_positions

__all__ = ["Places", "find_places"]

_FIRST = "p0"


@dataclass(frozen=True)
class Places:
    """Names of the positions of a task's prompts.

    Parameters
    ----------
    names
        In order.
    positions
        What gives them; None where they are counted from the end, ``end`` being the last.
    """

    names: tuple[str, ...]
    positions: Positions | None

    def of(self, pair: Pair) -> NDArray[np.int64]:
        """``[pos]``: index of the name of each position of a pair's prompts."""
        if self.positions is None:
            return np.arange(len(pair.clean))[::-1].copy()
        index = self.positions.of(pair)
        if self.positions.kind == "token":
            return index
        own = np.array([self.names.index(name) for name in self.positions.spans])[index]
        if _FIRST in self.names and self.positions.spans[index[0]] == REST:
            own[0] = self.names.index(_FIRST)
        return own


def find_places(task: Task, by: str | None = None) -> Places:
    """Return what to call the positions of a task's prompts.

    Parameters
    ----------
    task
        Prompts.
    by
        ``span``: the task's labels, ``p0`` for a first position without one, ``rest`` for all
        others.  ``token``: ``p0``, ``p1`` and so on; prompts have to be equally long.  None:
        labels if there are any, else numbers, of prompts of several lengths from the end
        (``end``, ``end-1``).

    Raises
    ------
    OptionError
        If there is no such kind, or the prompts do not have it.
    """
    if by is not None and by not in POSITIONS:
        raise OptionError(f"positions {by!r}: expected {' or '.join(POSITIONS)}")
    lengths = {len(pair.clean) for pair in task.pairs}
    if by is None:
        by = "span" if task.pairs[0].spans else "token" if len(lengths) == 1 else None
    if by is None:
        names = ("end", *(f"end-{i}" for i in range(1, max(lengths))))
        return Places(names, None)
    positions = find_positions(task, by)
    names = positions.spans
    bare = any(not any(0 in at for at in pair.spans.values()) for pair in task.pairs)
    if by == "span" and bare and _FIRST not in names:
        names = (_FIRST, *names)
    return Places(names, positions)
