"""``acdc shared``: what the circuits of several tasks in one model have in common."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from acdc.cli import options as opt
from acdc.cli.answers import answer

__all__ = ["shared"]


def shared(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs in one model, or circuit files: two or more."),
    ],
    n_random: Annotated[
        int, typer.Option("--n-random", help="Random circuits that each is compared with.")
    ] = 200,
    seed: Annotated[int, typer.Option("--seed", help="Of these.")] = 0,
    list_edges: Annotated[
        bool, typer.Option("--list/--no-list", help="List the edges that are shared.")
    ] = True,
    as_json: opt.Json = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write (default: runs/shared-<time>).")
    ] = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Compare circuits of several tasks in one model: what they share beyond chance.

    Which nodes and edges more tasks have than random circuits of the same sizes would, which serve
    one task alone, and how much of the model all use together.

    Example: acdc shared runs/ioi runs/pronoun runs/induction --out runs/shared
    """
    from acdc.evidence.sharing import shared as compare_tasks
    from acdc.runs.folder import check_output
    from acdc.terminal.console import TerminalReporter
    from acdc.terminal.sharing import sharing_tables

    folder = out or Path("runs") / f"shared-{time.strftime('%Y%m%d-%H%M%S')}"
    check_output(folder, overwrite=overwrite)
    with TerminalReporter().phase("draw random circuits", None):
        found = compare_tasks(*runs, n_random=n_random, seed=seed)
        found.save(folder, overwrite=overwrite)
    names = "shared.json, nodes.csv, edges.csv, overlap.csv, shared.svg and .png"
    answer(
        found.summary,
        lambda: sharing_tables(found, list_edges=list_edges),
        found.warnings,
        as_json=as_json,
        written=f"written to {folder}: {names}",
    )
