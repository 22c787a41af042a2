"""The terminal: lines, tables and progress, safe for whatever names hold."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from acdc.terminal.loudness import Loudness, loudness
from graphs.text import printable

if TYPE_CHECKING:
    pass

__all__ = ["SafeConsole", "TerminalReporter", "say", "show", "warn", "warnings_lines"]


class TerminalReporter:
    """Progress bars on standard error."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    @contextmanager
    def phase(self, name: str, total: int | None) -> Iterator[None]:
        """Show a bar of ``total`` steps, or a spinner-like bar without an end.

        It disappears when the block raises, so that an error's message stands alone; where
        standard error is no terminal, only finished bars are printed.
        """
        if loudness() is Loudness.QUIET:
            yield
            return
        console, started = SafeConsole(stderr=True), time.perf_counter()
        columns = [
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        ]
        if total is not None:
            columns.insert(2, MofNCompleteColumn())
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as self._progress:
            task = self._progress.add_task(name, total=total, note="")
            yield
            self._progress.update(task, total=total or 1, completed=total or 1)
        console.print(self._progress.get_renderable())
        if loudness() is Loudness.VERBOSE:
            took = time.perf_counter() - started
            say(f"  {name}: {took:.2f} s, {_peak_memory()} at most so far", stderr=True)

    def advance(self, n: int) -> None:
        """Count ``n`` steps."""
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0], n)

    def note(self, text: str) -> None:
        """Say beside the bar how the phase stands."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], note=text)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if loudness() is Loudness.QUIET:
            return
        if self._progress is None:
            say(text, stderr=True)
        else:
            console = self._progress.console
            console.print(text, highlight=False, markup=False, soft_wrap=True)


def _peak_memory() -> str:
    """Most memory that the process has held."""
    if sys.platform == "win32":
        return "memory unknown on Windows"
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return f"{most / (2**30 if sys.platform == 'darwin' else 2**20):.2f} GiB"


class SafeConsole(Console):
    """A console that shows control characters in texts as escapes (:mod:`graphs.text`)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]  # it has fewer
        """Return what every text passes through, in tables too."""
        return super().render_str(printable(text, keep="\n\t"), **options)


def say(line: str, *, stderr: bool = False) -> None:
    """Print one line, however long, to standard output or standard error."""
    SafeConsole(stderr=stderr).print(line, highlight=False, markup=False, soft_wrap=True)


def show(*parts: Any) -> None:
    """Print tables and text to standard output; a text as it is, those in tables as markup.

    Nothing where one is told to be quiet.
    """
    if loudness() is not Loudness.QUIET:
        _print(parts)


def _print(parts: Iterable[Any]) -> None:
    console = SafeConsole()
    for part in parts:
        console.print(part, highlight=False, markup=not isinstance(part, str))


def warn(warnings: Iterable[str]) -> None:
    """Say what one should know before believing a result, a line each."""
    _print(warnings_lines(warnings))


def warnings_lines(warnings: Iterable[str]) -> Iterator[str]:
    """Yield warnings as they are shown."""
    return (f"warning: {warning}" for warning in warnings)
