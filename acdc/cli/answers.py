"""What a command says in the end: JSON or tables, and where it wrote what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

from acdc.cli.processes import is_first

__all__ = ["answer"]


def answer(
    summary: Callable[[], Mapping[str, Any]],
    parts: Callable[[], Iterable[Any]],
    warnings: Iterable[str] = (),
    *,
    as_json: bool,
    out: Path | None = None,
    written: str | None = None,
) -> None:
    """Print a result, and write it as JSON if a file was asked for.

    Parameters
    ----------
    summary
        Gives what JSON holds.
    parts
        Gives what the terminal shows.
    warnings
        What one should know before believing it; with ``as_json`` they are in the summary.
    as_json
        Whether the summary is printed, and nothing else on standard output.
    out
        File for the summary, checked before the work began; None: none.
    written
        Of a command that wrote a folder: which, and what is in it.
    """
    from acdc.terminal.console import say, show, warn
    from graphs.files.whole import json_indented, write_json

    if out is not None:
        if is_first():
            write_json(out, summary())
        written = f"written to {out}"
    if as_json:
        typer.echo(json_indented(summary()))
    else:
        show(*parts())
        warn(warnings)
    if written is not None:
        say(written, stderr=as_json)
