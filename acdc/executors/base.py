"""What every executor does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

__all__ = ["TRIES", "Executor", "Lost"]

Item = TypeVar("Item")
Result = TypeVar("Result")

TRIES = 2
"""How often a call is begun whose workers die."""


@dataclass(frozen=True)
class Lost:
    """What stands in the place of a result that there is none of.

    Parameters
    ----------
    why
        In one line.
    """

    why: str


class Executor(Protocol):
    """Runs one function on many things."""

    def run(
        self, call: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result | Lost]]:
        """Call a function with each of some items.

        Parameters
        ----------
        call
            A function of a module (or :func:`functools.partial` of one), which other processes
            import.
        items
            Can be pickled, as what ``call`` returns.

        Yields
        ------
        tuple
            Place among the items, and the result; in the order in which they come.  An exception
            of ``call``, and a worker that died twice, is a :class:`Lost`.
        """
