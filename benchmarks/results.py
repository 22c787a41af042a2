"""What a benchmark leaves behind: a folder with ``results.json`` and ``results.md``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from acdc.errors import OutputError
from acdc.models.devices import resolve_placement
from benchmarks.measure import conditions
from graphs.files.whole import json_text, write_whole

__all__ = ["check_folder", "write_results"]


def check_folder(folder: Path) -> Path:
    """Return a folder that may be written into; OutputError if it is a file."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output {str(folder)!r} is a file, give a folder")
    return folder


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
