"""``acdc interactions``: which edges act together, and as which gate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from acdc.cli import options as opt
from acdc.cli.answers import answer
from acdc.cli.asked import takes
from acdc.cli.inputs import check_file, to_bytes

__all__ = ["interactions"]


@takes("model", "method", "prompts", "computing", "ablation",
       leave=("method", "holdout", "n_select", "n_test", "direction"), of_run=True)  # fmt: skip
def interactions(
    run: Annotated[
        Path,
        typer.Argument(help="Folder of a run, or of both directions, or a circuit file."),
    ],
    task: opt.RunTask = None,
    edge: Annotated[
        list[str] | None,
        typer.Option("--edge", help="Test all pairs of these (repeatable), not of the circuit's."),
    ] = None,
    max_pairs: Annotated[
        int, typer.Option("--max-pairs", help="Test at most so many, of the largest scores.")
    ] = 200,
    alpha: Annotated[
        float, typer.Option("--alpha", help="Chance of calling any pair a gate that is none.")
    ] = 0.01,
    seen: Annotated[
        bool,
        typer.Option("--seen/--unseen", help="Measure on the prompts that discovery saw."),
    ] = False,
    n_resamples: opt.NResamples = 1000,
    memory: opt.Memory = 1.0,
    as_json: opt.Json = False,
    out: opt.JsonFile = None,
    overwrite: opt.Replace = False,
    **asked: Any,
) -> None:
    """Test which edges act together: AND, OR, XOR, inhibition, or a sum.

    Pairs of edges into one node are ablated alone and together, in noising and in denoising.
    Their interaction on the metric has an interval that holds for all pairs together.

    Example: acdc interactions runs/both --out gates.json

    Example: acdc interactions runs/ioi --edge "a0.h1->m0" --edge "a0.h2->m0"
    """
    from acdc.evidence.interactions import interactions as measure
    from acdc.terminal.backups import interactions_tables
    from acdc.terminal.console import TerminalReporter

    n_bytes = to_bytes(memory)
    if out is not None:
        check_file(out, overwrite)
    found = measure(
        run, edge or (), task=task, seen=seen, max_pairs=max_pairs, alpha=alpha,
        n_resamples=n_resamples, memory=n_bytes, reporter=TerminalReporter(), **asked,
    )  # fmt: skip
    answer(
        found.summary,
        lambda: interactions_tables(found, f"interactions in {run}"),
        found.warnings,
        as_json=as_json,
        out=out,
    )
