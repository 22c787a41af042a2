"""Who is told what a run is at."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

__all__ = ["Reporter", "Silent"]


class Reporter(Protocol):
    """Told what goes on."""

    def phase(self, name: str, total: int | None) -> AbstractContextManager[Any]:
        """Enter a phase of ``total`` steps."""

    def advance(self, n: int) -> None:
        """Count ``n`` steps of the current phase."""

    def note(self, text: str) -> None:
        """Say how the current phase stands."""

    def say(self, text: str) -> None:
        """Say something that stays to be read: what a run will take."""


class Silent:
    """A reporter that says nothing."""

    def phase(self, name: str, total: int | None) -> AbstractContextManager[Any]:
        """Do nothing."""
        return nullcontext()

    def advance(self, n: int) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""
