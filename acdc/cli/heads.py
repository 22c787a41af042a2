"""``acdc heads``: why the heads of a circuit attend where they do."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from acdc.cli import options as opt
from acdc.cli.answers import answer
from acdc.cli.asked import takes
from acdc.cli.inputs import check_file

__all__ = ["heads"]


@takes("model", "method", "prompts", "computing",
       leave=("method", "holdout", "n_select", "n_test", "direction"), of_run=True)  # fmt: skip
def heads(
    run: opt.CircuitPath,
    task: opt.RunTask = None,
    head: Annotated[
        list[str] | None,
        typer.Option("--head", help="Explain these (repeatable), in the circuit or not."),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option("--by", help="Name positions by token or span (default: labels if any)."),
    ] = None,
    query: Annotated[
        str | None,
        typer.Option("--query", help="Explain the attention from this place (with --key)."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", help="Explain the attention to this place (with --query)."),
    ] = None,
    prompt: Annotated[
        int | None, typer.Option("--prompt", help="Explain one prompt, from 0 (default: the mean).")
    ] = None,
    max_heads: Annotated[
        int, typer.Option("--max-heads", help="Explain at most so many, of the largest scores.")
    ] = 20,
    seen: Annotated[
        bool,
        typer.Option("--seen/--unseen", help="Measure on the prompts that discovery saw."),
    ] = False,
    as_json: opt.Json = False,
    out: opt.JsonFile = None,
    overwrite: opt.Replace = False,
    **asked: Any,
) -> None:
    """Explain where heads attend, pair by pair of what they read, and what they carry.

    Scores before the softmax are exact sums over pairs of senders (query side x key side); values
    are taken apart in the same way, towards the logits and towards later heads.

    Example: acdc heads runs/ioi

    Example: acdc heads runs/ioi --head a1.h4 --query END --key S1 --prompt 0
    """
    from acdc.errors import OptionError
    from acdc.evidence.heads import heads as explain
    from acdc.terminal.console import TerminalReporter
    from acdc.terminal.heads import heads_tables

    if (query is None) != (key is None):
        raise OptionError("--query and --key go together: give both, or neither")
    at = None if query is None or key is None else (query, key)
    if out is not None:
        check_file(out, overwrite)
    found = explain(
        run, head or (), task=task, by=by, at=at, prompt=prompt, seen=seen, max_heads=max_heads,
        reporter=TerminalReporter(), **asked,
    )  # fmt: skip
    answer(
        found.summary,
        lambda: heads_tables(found, f"heads in {run}"),
        found.warnings,
        as_json=as_json,
        out=out,
    )
