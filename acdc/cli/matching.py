"""``acdc match``: circuits of one task in two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from acdc.cli import options as opt
from acdc.cli.answers import answer
from acdc.cli.inputs import check_file

__all__ = ["match"]


def match(
    one: Annotated[Path, typer.Argument(help="Folder of a run.")],
    other: Annotated[Path, typer.Argument(help="Folder of a run of the task in another model.")],
    limit: Annotated[
        float,
        typer.Option("--limit", help="Distance from which on nodes are not matched (0 to 1)."),
    ] = 0.25,
    n_random: Annotated[
        int, typer.Option("--n-random", help="Random matchings that common edges stand beside.")
    ] = 1000,
    list_edges: Annotated[
        bool, typer.Option("--list/--no-list", help="List the edges that both have.")
    ] = True,
    as_json: opt.Json = False,
    trust_remote_code: opt.Trust = False,
    out: opt.JsonFile = None,
    overwrite: opt.Replace = False,
) -> None:
    """Match the circuits of a task in two models: heads by what they do, not by their numbers.

    The models may differ in shape, or be two seeds of one.  Nodes are matched by role, attention on
    the task and on repeated tokens, direct effect and relative depth; then edges between them.

    Example: acdc match runs/seed0 runs/seed1 --out match.json
    """
    from acdc.evidence.matching import match as match_runs
    from acdc.terminal.console import TerminalReporter
    from acdc.terminal.matching import matching_tables

    if out is not None:
        check_file(out, overwrite)
    found = match_runs(
        one, other, limit=limit, n_random=n_random, trust_remote_code=trust_remote_code,
        reporter=TerminalReporter(),
    )  # fmt: skip
    answer(
        found.summary,
        lambda: matching_tables(found, list_edges=list_edges),
        found.warnings,
        as_json=as_json,
        out=out,
    )
