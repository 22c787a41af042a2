"""``acdc dose``: patching with a coefficient."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from acdc.cli import options as opt
from acdc.cli.answers import answer
from acdc.cli.asked import takes
from acdc.cli.inputs import check_file, to_bytes

__all__ = ["dose"]


@takes("model", "method", "prompts", "computing", "ablation",
       leave=("method", "holdout", "n_select", "n_test"), of_run=True)  # fmt: skip
def dose(
    run: opt.CircuitPath,
    edges: Annotated[
        bool, typer.Option("--edges/--nodes", help="Measure the circuit's edges, or its nodes.")
    ] = False,
    node: Annotated[
        list[str] | None,
        typer.Option("--node", help="Measure this node (repeatable), in the circuit or not."),
    ] = None,
    edge: Annotated[
        list[str] | None,
        typer.Option("--edge", help="Measure this edge (repeatable), in the circuit or not."),
    ] = None,
    task: opt.RunTask = None,
    seen: Annotated[
        bool,
        typer.Option("--seen/--unseen", help="Measure on the prompts that discovery saw."),
    ] = False,
    per_unit: Annotated[
        int, typer.Option("--per-unit", help="Coefficients per unit, from -1 to 2.")
    ] = 8,
    bend: Annotated[
        float,
        typer.Option("--bend", help="Share off the straight line from which on a curve bends."),
    ] = 0.2,
    most: Annotated[
        int, typer.Option("--max", help="Measure at most so many, of the largest scores.")
    ] = 100,
    memory: opt.Memory = 1.0,
    as_json: opt.Json = False,
    out: opt.JsonFile = None,
    overwrite: opt.Replace = False,
    **asked: Any,
) -> None:
    """Patch each node or edge with a coefficient from -1 to 2, and name the curve's shape.

    0 is the base run, 1 full patching. A curve's slope at 0 is the attribution score. What is
    written to RUN/dose.json is drawn in the run's report.

    Example: acdc dose runs/ioi --out runs/ioi/dose.json

    Example: acdc dose runs/ioi --edge "a4.h1->logits" --per-unit 20
    """
    from acdc.errors import OptionError
    from acdc.evidence.doses import dose as measure
    from acdc.terminal.console import TerminalReporter
    from acdc.terminal.doses import doses_parts

    if node and (edge or edges):
        raise OptionError("--node with edges: nodes and edges are measured in runs of their own")
    n_bytes = to_bytes(memory)
    if out is not None:
        check_file(out, overwrite)
    found = measure(
        run, edge or node or (), edges=edges or bool(edge), task=task, seen=seen,
        per_unit=per_unit, bend=bend, most=most, memory=n_bytes,
        reporter=TerminalReporter(), **asked,
    )  # fmt: skip
    answer(
        found.summary,
        lambda: doses_parts(found, f"doses of {run}"),
        found.warnings,
        as_json=as_json,
        out=out,
    )
