"""``acdc what-if``: act on nodes and edges, and look at what the model says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from acdc.cli import options as opt
from acdc.cli.answers import answer
from acdc.cli.asked import takes
from acdc.cli.inputs import check_file, to_bytes

__all__ = ["what_if"]


@takes("model", "method", "prompts", "computing", "ablation",
       leave=("method", "holdout", "n_select", "n_test", "direction", "norms"),
       of_run=True)  # fmt: skip
def what_if(
    run: opt.CircuitPath,
    ablate: Annotated[
        list[str] | None,
        typer.Option("--ablate", help="Node or edge that carries its mean, or zero (repeatable)."),
    ] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option("--scale", help="NODE=FACTOR or EDGE=FACTOR: multiply it (repeatable)."),
    ] = None,
    patch: Annotated[
        list[str] | None,
        typer.Option("--patch", help="Node or edge that carries the corrupt run's value."),
    ] = None,
    steer: Annotated[
        list[str] | None,
        typer.Option(
            "--steer", help="NODE=FACTOR: add so much of its mean difference, clean - corrupt."
        ),
    ] = None,
    only_circuit: Annotated[
        bool,
        typer.Option("--only-circuit/--whole-model", help="Ablate every edge outside the circuit."),
    ] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="Look at this prompt (repeatable; default: the task's)."),
    ] = None,
    corrupt: Annotated[
        list[str] | None,
        typer.Option("--corrupt", help="Corruption of a --prompt, in the same order."),
    ] = None,
    generate: Annotated[
        int, typer.Option("--generate", help="Tokens of text to generate, greedily.")
    ] = 0,
    top: Annotated[int, typer.Option("--top", help="Next tokens to show.")] = 5,
    show: Annotated[int, typer.Option("--show", help="Prompts of the task to show.")] = 3,
    task: opt.RunTask = None,
    seen: Annotated[
        bool,
        typer.Option("--seen/--unseen", help="Measure on the prompts that discovery saw."),
    ] = False,
    memory: opt.Memory = 1.0,
    as_json: opt.Json = False,
    out: opt.JsonFile = None,
    overwrite: opt.Replace = False,
    **asked: Any,
) -> None:
    """Ablate, scale, patch or steer nodes and edges; show what the model then says.

    Next tokens and generated text before and after, and the metric on the task's prompts.

    Example: acdc what-if runs/ioi --scale a4.h2=0 --prompt "When Mary and John went home"

    Example: acdc what-if runs/ioi --only-circuit --generate 20
    """
    from acdc.evidence.what_if import what_if as look
    from acdc.terminal.console import TerminalReporter
    from acdc.terminal.what_if import what_if_parts

    factors = {"scale": _factors("scale", scale or ()), "steer": _factors("steer", steer or ())}
    n_bytes = to_bytes(memory)
    if out is not None:
        check_file(out, overwrite)
    found = look(
        run, ablate=ablate or (), patch=patch or (), only_circuit=only_circuit,
        prompts=prompt or (), corrupt=corrupt or (), generate=generate, top=top, show=show,
        task=task, seen=seen, memory=n_bytes, reporter=TerminalReporter(), **factors, **asked,
    )  # fmt: skip
    answer(
        found.summary,
        lambda: what_if_parts(found, f"what if in {run}"),
        found.warnings,
        as_json=as_json,
        out=out,
    )


def _factors(option: str, given: Sequence[str]) -> dict[str, float]:
    """Read NAME=FACTOR, each name once."""
    from acdc.errors import OptionError

    found: dict[str, float] = {}
    for text in given:
        name, _, factor = text.rpartition("=")
        try:
            value = float(factor)
        except ValueError:
            value = None
        if not name or value is None:
            raise OptionError(
                f"--{option} {text!r}: expected a node or edge and a number, as m0=0.5"
            )
        if name in found:
            raise OptionError(f"--{option} {name} is given twice: give it once")
        found[name] = value
    return found
