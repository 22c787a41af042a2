"""Commands that find circuits: ``discover``, ``sweep``, ``stability`` and ``conditions``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from acdc.cli import options as opt
from acdc.cli.answers import answer
from acdc.cli.asked import takes
from acdc.cli.inputs import to_bytes, to_resources

if TYPE_CHECKING:
    from acdc.settings import Settings

__all__ = ["conditions", "discover", "stability", "sweep"]

_EVERY = ("model", "method", "selection", "prompts", "computing", "ablation", "nodes")


@takes(*_EVERY, leave=("direction",), methods=True, method=None)
def discover(
    task: opt.Task,
    direction: Annotated[
        str,
        typer.Option(
            "--direction", help="noising (ablate), denoising (restore), or both and compare."
        ),
    ] = "noising",
    memory: opt.Memory = 1.0,
    as_json: opt.Json = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder to write (default: runs/<task>-<time>). The same command with the "
            "folder of a killed acdc run goes on with it.",
        ),
    ] = None,
    overwrite: opt.Overwrite = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a model that does not do the task.")
    ] = False,
    **asked: Any,
) -> None:
    """Find the circuit of a task in a model, measure it and draw it.

    Example: acdc discover ioi --method eap-ig --out runs/ioi
    """
    from acdc.errors import OptionError
    from acdc.runs.checks import check_discovery
    from acdc.runs.discover import discover as find
    from acdc.runs.folder import check_output
    from acdc.settings import Settings
    from acdc.terminal.console import TerminalReporter
    from acdc.terminal.tables import edges_table, run_table

    if direction not in ("noising", "denoising", "both"):
        raise OptionError(f"direction {direction!r}: expected noising, denoising or both")
    n_bytes, both = to_bytes(memory), direction == "both"
    asked.setdefault("method", _default_method(asked))
    settings = check_discovery(
        Settings.of(task, **asked, direction="noising" if both else direction)
    )
    folder = out or _default_folder(Path(task).stem)
    if both:
        _discover_both(settings, folder, as_json, overwrite, memory=n_bytes, strict=strict)
        return
    check_output(folder, overwrite=overwrite)
    reporter = TerminalReporter()
    run = find(
        reporter=reporter, memory=n_bytes, checkpoint=folder, strict=strict, **vars(settings)
    )
    with reporter.phase("draw and write", None):
        run.save(folder, overwrite=overwrite)
    answer(
        run.summary,
        lambda: (run_table(run.summary(), f"circuit of {task}"), edges_table(run.circuit)),
        run.claim.warnings,
        as_json=as_json,
        written=(
            f"written to {folder}: run.json, circuit.json, circuit.dot, circuit.svg, circuit.png"
        ),
    )


def _default_method(asked: dict[str, Any]) -> str:
    return "eap-ig" if asked.get("saes") or asked.get("neurons") else "acdc"


def _discover_both(
    settings: Settings, folder: Path, as_json: bool, overwrite: bool, *, memory: int, strict: bool
) -> None:
    """Discover in both directions, and show what only one of them finds."""
    from acdc.evidence.directions import check_folder, discover_both
    from acdc.terminal.console import TerminalReporter, warnings_lines
    from acdc.terminal.repeated import directions_tables
    from acdc.terminal.tables import run_table

    check_folder(folder, overwrite=overwrite)
    reporter = TerminalReporter()
    found = discover_both(
        reporter=reporter, memory=memory, checkpoint=folder, strict=strict, **vars(settings)
    )
    with reporter.phase("draw and write", None):
        found.save(folder, overwrite=overwrite)

    def parts() -> Iterator[Any]:
        for run in found.runs:
            which = run.settings.direction
            yield run_table(run.summary(), f"circuit of {settings.task}, {which}")
            yield from warnings_lines(run.claim.warnings)
        yield from directions_tables(found)
        if found.candidates:
            yield f"candidates, not yet tested: acdc interactions {folder}"

    names = "noising, denoising, directions.json, directions.svg and .png"
    answer(found.summary, parts, as_json=as_json, written=f"written to {folder}: {names}")


@takes(
    "model",
    "method",
    "prompts",
    "computing",
    "ablation",
    "nodes",
    leave=("method",),
)
def sweep(
    task: opt.Task,
    thresholds: Annotated[
        str | None,
        typer.Option(
            "--thresholds", help="Taus, as 0.1,0.03,0.01 (default: ten, 10 % to 0.1 % of the gap)."
        ),
    ] = None,
    guess: opt.Guess = "removed",
    candidates: Annotated[
        int, typer.Option("--candidates", help="With latents: edges that are tried at most.")
    ] = 3000,
    memory: opt.Memory = 1.0,
    as_json: opt.Json = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write (default: runs/sweep-<task>-<time>)."),
    ] = None,
    overwrite: opt.Overwrite = False,
    jobs: opt.Jobs = None,
    executor: opt.Executor = None,
    address: opt.Address = None,
    gpus: opt.Gpus = None,
    **asked: Any,
) -> None:
    """Run ACDC over thresholds: size and faithfulness of every circuit, as table and plot.

    Example: acdc sweep ioi --thresholds 0.3,0.1,0.03 --out runs/frontier
    """
    from acdc.evidence.frontier import check_thresholds
    from acdc.evidence.frontier import sweep as run_sweep
    from acdc.runs.folder import check_output
    from acdc.terminal.console import TerminalReporter
    from acdc.terminal.repeated import frontier_table

    n_bytes = to_bytes(memory)
    taus = None if thresholds is None else check_thresholds(_numbers(thresholds))
    resources = to_resources(executor, jobs, address, gpus)
    folder = out or _default_folder(f"sweep-{Path(task).stem}")
    check_output(folder, overwrite=overwrite)
    reporter = TerminalReporter()
    frontier = run_sweep(
        task, taus, resources=resources, reporter=reporter, memory=n_bytes, guess=guess,
        candidates=candidates, **asked,
    )  # fmt: skip
    with reporter.phase("draw and write", None):
        frontier.save(folder, overwrite=overwrite)
    title = f"ACDC on {task}, {frontier.settings.model}"
    files = "sweep.json, frontier.csv, frontier.svg, frontier.png, circuit-<tau>.json"
    answer(
        frontier.summary,
        lambda: (frontier_table(frontier.rows(), title),),
        as_json=as_json,
        written=f"written to {folder}: {files}",
    )


@takes(*_EVERY, methods=True, method=None)
def stability(
    task: Annotated[str, typer.Argument(help="Built-in task (acdc list tasks).")],
    seeds: Annotated[int, typer.Option("--seeds", help="Runs, each with prompts of its own.")] = 5,
    corruptions: Annotated[
        str | None,
        typer.Option("--corruptions", help="Vary the corruption, too: by name, or all."),
    ] = None,
    templates: Annotated[
        int, typer.Option("--templates", help="Vary the template, too: so many of the task's.")
    ] = 1,
    method_seeds: Annotated[
        int, typer.Option("--method-seeds", help="Vary the method's own seed, too.")
    ] = 1,
    memory: opt.Memory = 1.0,
    as_json: opt.Json = False,
    at_least: Annotated[
        float, typer.Option("--at-least", help="Draw edges kept in this share of the runs.")
    ] = 0.5,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write (default: runs/stability-<task>-<time>)."),
    ] = None,
    overwrite: opt.Overwrite = False,
    jobs: opt.Jobs = None,
    executor: opt.Executor = None,
    address: opt.Address = None,
    gpus: opt.Gpus = None,
    **asked: Any,
) -> None:
    """Repeat discovery over draws of prompts: count in how many runs each edge was kept.

    With --corruptions, --templates or --method-seeds under every combination: then a table says
    which of these the differences between circuits come from.

    Example: acdc stability ioi --seeds 5 --method eap-ig --out runs/stable

    Example: acdc stability ioi --seeds 3 --corruptions all --templates 3 --method eap-ig
    """
    from acdc.errors import OptionError
    from acdc.evidence.stability import stability as repeat
    from acdc.runs.folder import check_output
    from acdc.terminal.console import TerminalReporter
    from acdc.terminal.repeated import stability_tables

    if not 0 < at_least <= 1:
        raise OptionError(f"at-least {at_least:g}: expected a share above 0, at most 1")
    n_bytes = to_bytes(memory)
    resources = to_resources(executor, jobs, address, gpus)
    folder = out or _default_folder(f"stability-{Path(task).stem}")
    check_output(folder, overwrite=overwrite)
    reporter = TerminalReporter()
    asked.setdefault("method", _default_method(asked))
    found = repeat(
        task, seeds, corruptions=_words(corruptions), n_templates=templates,
        n_method_seeds=method_seeds, resources=resources, reporter=reporter, memory=n_bytes,
        **asked,
    )  # fmt: skip
    with reporter.phase("draw and write", None):
        found.save(folder, at_least=at_least, overwrite=overwrite)
    names = "stability.json, edges.csv, circuit.json, circuit.svg, circuit.png"
    answer(
        found.summary,
        lambda: stability_tables(found),
        found.warnings,
        as_json=as_json,
        written=f"written to {folder}: {names}",
    )


@takes(*_EVERY, leave=("corruption", "intervention"), methods=True, method=None)
def conditions(
    task: opt.Task,
    corruptions: Annotated[
        str | None,
        typer.Option("--corruptions", help="By name, as abc,swapped, or all of the task's."),
    ] = None,
    interventions: Annotated[
        str | None,
        typer.Option("--interventions", help="By name, as resample,mean,zero, or all untrained."),
    ] = None,
    memory: opt.Memory = 1.0,
    as_json: opt.Json = False,
    list_edges: Annotated[
        bool, typer.Option("--list/--no-list", help="List the edges that come and go.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write (default: runs/conditions-<task>-<time>)."),
    ] = None,
    overwrite: opt.Overwrite = False,
    **asked: Any,
) -> None:
    """Find a circuit per corruption and intervention: which edges stay, which come and go.

    Example: acdc conditions docstring --corruptions all --method eap-ig

    Example: acdc conditions ioi --corruptions abc,swapped --interventions resample,zero
    """
    from acdc.evidence.conditions import conditions as compare_conditions
    from acdc.runs.folder import check_output
    from acdc.terminal.console import TerminalReporter
    from acdc.terminal.repeated import conditions_tables

    n_bytes = to_bytes(memory)
    folder = out or _default_folder(f"conditions-{Path(task).stem}")
    check_output(folder, overwrite=overwrite)
    reporter = TerminalReporter()
    asked.setdefault("method", _default_method(asked))
    found = compare_conditions(
        task, _words(corruptions), _words(interventions), reporter=reporter, memory=n_bytes,
        **asked,
    )  # fmt: skip
    with reporter.phase("draw and write", None):
        found.save(folder, overwrite=overwrite)
    names = "conditions.json, edges.csv, conditions.svg and .png, and each run"
    answer(
        found.summary,
        lambda: conditions_tables(found, list_edges=list_edges),
        found.warnings,
        as_json=as_json,
        written=f"written to {folder}: {names}",
    )


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


def _numbers(text: str) -> list[float]:
    from acdc.errors import OptionError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"thresholds {text!r}: expected numbers, as 0.1,0.03,0.01") from None


def _default_folder(name: str) -> Path:
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
