"""The process at hand, one call after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from acdc.executors.base import Lost

__all__ = ["Here"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Here:
    """An executor without workers.

    What is called may be any object, and its exceptions are the caller's.
    """

    def run(
        self, call: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result | Lost]]:
        """Call a function with each item, see :meth:`acdc.executors.base.Executor.run`."""
        for place, item in enumerate(items):
            yield place, call(item)
