"""How much a command says beside its result: ``--quiet`` and ``--verbose``."""

from __future__ import annotations

from contextvars import ContextVar
from enum import IntEnum

__all__ = ["Loudness", "loudness", "set_loudness"]


class Loudness(IntEnum):
    """From least to most.

    ``QUIET``: warnings, errors and where the result was written; ``NORMAL``: progress and tables,
    too; ``VERBOSE``: also the seconds and memory of every phase, and where an error came from.
    """

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


_now: ContextVar[Loudness] = ContextVar("loudness", default=Loudness.NORMAL)


def loudness() -> Loudness:
    """Return how much is to be said."""
    return _now.get()


def set_loudness(wanted: Loudness) -> None:
    """Say how much is to be said from now on."""
    _now.set(wanted)
