"""``acdc groups``: more than one mechanism in a task's prompts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from acdc.cli import options as opt
from acdc.cli.answers import answer
from acdc.cli.asked import takes
from acdc.cli.inputs import to_bytes

__all__ = ["groups"]


@takes("model", "method", "selection", "prompts", "computing", "ablation", "nodes",
       methods=True, method=None, leave=("n_select",))  # fmt: skip
def groups(
    task: opt.Task,
    n_groups: Annotated[
        int | None,
        typer.Option("--groups", help="How many (default: as many as the silhouettes say)."),
    ] = None,
    profile: Annotated[
        str, typer.Option("--profile", help="Method whose scores, prompt by prompt, are compared.")
    ] = "eap-ig",
    n_resamples: opt.NResamples = 1000,
    memory: opt.Memory = 1.0,
    as_json: opt.Json = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write (default: runs/groups-<task>-<time>)."),
    ] = None,
    overwrite: opt.Overwrite = False,
    **asked: Any,
) -> None:
    """Group prompts by how the model processes them; find a circuit for each group.

    Says whether the groups differ: whether the circuit of one fails on the other's fresh prompts.

    Example: acdc groups mixed.jsonl --model ioi-small --out runs/groups
    """
    from acdc.evidence.groups import groups as find
    from acdc.runs.folder import check_output
    from acdc.terminal.console import TerminalReporter
    from acdc.terminal.repeated import groups_tables

    n_bytes = to_bytes(memory)
    folder = out or Path("runs") / f"groups-{Path(task).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_output(folder, overwrite=overwrite)
    reporter = TerminalReporter()
    asked.setdefault("method", "eap-ig" if asked.get("saes") or asked.get("neurons") else "acdc")
    found = find(
        task, n_groups, profile=profile, n_resamples=n_resamples, memory=n_bytes,
        reporter=reporter, **asked,
    )  # fmt: skip
    with reporter.phase("draw and write", None):
        found.save(folder, overwrite=overwrite)
    answer(
        found.summary,
        lambda: groups_tables(found, f"groups of {task}"),
        found.warnings,
        as_json=as_json,
        written=f"written to {folder}: groups.json, and of each group prompts, circuit and picture",
    )
