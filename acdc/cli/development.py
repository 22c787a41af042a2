"""``acdc develop``: a task's circuit through the checkpoints of a model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from acdc.cli import options as opt
from acdc.cli.answers import answer
from acdc.cli.asked import takes
from acdc.cli.inputs import to_bytes

__all__ = ["develop"]


@takes("model", "method", "selection", "prompts", "computing", "ablation", "nodes",
       leave=("model",), methods=True, method="eap-ig")  # fmt: skip
def develop(
    task: opt.Task,
    models: Annotated[
        str,
        typer.Option(
            "--models",
            help="Checkpoints, separated by commas, the final one last (NAME@STEP in any order); "
            "or one model or folder, all of whose checkpoints are taken.",
        ),
    ],
    n_random: Annotated[
        int, typer.Option("--n-random", help="Random circuits that overlaps are compared with.")
    ] = 200,
    memory: opt.Memory = 1.0,
    as_json: opt.Json = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write (default: runs/develop-<task>-<time>)."),
    ] = None,
    overwrite: opt.Overwrite = False,
    **asked: Any,
) -> None:
    """Follow a circuit through training: when its edges appear, and the behaviour of heads.

    Every checkpoint is searched with the same settings on the same prompts, for as many edges as
    the final checkpoint's circuit has.

    Example: acdc develop induction --models training/checkpoints --out runs/develop

    Example: acdc develop ioi --models m@step1000,m@step4000,m@step143000 --edges 200
    """
    from acdc.evidence.development import develop as follow
    from acdc.runs.folder import check_output
    from acdc.terminal.console import TerminalReporter
    from acdc.terminal.development import development_tables

    n_bytes = to_bytes(memory)
    folder = out or Path("runs") / f"develop-{Path(task).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_output(folder, overwrite=overwrite)
    reporter = TerminalReporter()
    found = follow(task, models, n_random=n_random, memory=n_bytes, reporter=reporter, **asked)
    with reporter.phase("draw and write", None):
        found.save(folder, overwrite=overwrite)
    names = "development.json, checkpoints.csv, edges.csv, heads.csv, development.svg and .png"
    answer(
        found.summary,
        lambda: development_tables(found),
        found.warnings,
        as_json=as_json,
        written=f"written to {folder}: {names}, and each run",
    )
