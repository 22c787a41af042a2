"""What a benchmark leaves behind: a folder with ``results.json`` and ``results.md``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from acdc.errors import OutputError
from acdc.models.devices import resolve_placement
from benchmarks.measure import conditions
from graphs.files.whole import json_text, write_whole

__all__ = ["check_folder", "markdown_table", "terminal_table", "write_results"]


def check_folder(folder: Path) -> Path:
    """Return a folder that may be written into; OutputError if it is a file."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output {str(folder)!r} is a file, give a folder")
    return folder


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for ``results.md``."""
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def terminal_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], n_texts: int = 1
) -> Table:
    """Return a table for terminals; all columns but the first ``n_texts`` are numbers."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < n_texts else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def write_results(
    folder: Path,
    head: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    text: str,
    device: str,
    name: str = "results",
) -> list[str]:
    """Write a benchmark's results; return the names of the files.

    Parameters
    ----------
    folder
        Made if it is not there.
    head
        What comes first in ``results.json``: ``format``, ``version`` and what was asked for.  The
        conditions of the measurement come after it.
    rows
        Plain values, a line each.
    text
        ``results.md``.
    device
        What it was measured on.
    name
        Of the files.
    """
    whole = json_text({**head, "conditions": conditions(resolve_placement(device).device)})
    lines = ",\n".join(json_text(row) for row in rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{name}.json", f'{whole[:-1]},\n"rows": [\n{lines}\n]}}\n')
    write_whole(folder / f"{name}.md", text)
    return [f"{name}.json", f"{name}.md"]
