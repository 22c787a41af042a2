"""What a computation may use and whom it tells: nothing in it changes a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from acdc.engine.checkpoint import Checkpoint

__all__ = ["Work"]


def _ignore(_: Any) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Work:
    """Means of a computation.

    Parameters
    ----------
    memory
        Bytes that its largest working set may take beside weights and plain runs.
    progress
        Told how many units are done since the last call.
    note
        Told in words how it stands.
    checkpoint
        Where a killed search left off, and where it keeps what is decided; None: nowhere.
    """

    memory: int = 1 << 30
    progress: Callable[[int], None] = _ignore
    note: Callable[[str], None] = _ignore
    checkpoint: Checkpoint | None = None
