"""What a command says in the end: a JSON file if one was asked for, and JSON or tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer

__all__ = ["answer"]


def answer(found: Any, parts: Callable[[], Iterable[Any]], out: Path | None, as_json: bool) -> None:
    """Write and print a result.

    Parameters
    ----------
    found
        Has ``summary()``, what JSON holds, and ``warnings``.
    parts
        Gives what the terminal shows.
    out
        File for the summary, checked before the work began; None: none.
    as_json
        Whether the summary is printed, and nothing else on standard output.
    """
    from acdc.terminal.tables import say, show, warn
    from graphs.files.whole import json_indented, write_json

    if out is not None:
        write_json(out, found.summary())
    if as_json:
        typer.echo(json_indented(found.summary()))
    else:
        show(*parts())
        warn(found.warnings)
    if out is not None:
        say(f"written to {out}", stderr=as_json)
