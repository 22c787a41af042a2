"""Commands that find circuits: ``discover``, ``sweep`` and ``stability``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from acdc.cli import options as opt
from acdc.cli.inputs import to_bytes

if TYPE_CHECKING:
    from acdc.runs import Settings

__all__ = ["discover", "stability", "sweep"]


def discover(
    task: opt.Task,
    model: opt.Model = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="See acdc list methods (default: acdc; with --saes or --neurons eap-ig).",
        ),
    ] = None,
    metric: opt.Metric = None,
    threshold: opt.Threshold = None,
    edges: opt.Edges = None,
    ranking: opt.Ranking = None,
    steps: opt.Steps = 5,
    floor: Annotated[
        float | None,
        typer.Option("--floor", help="eap-acdc tests edges of at least this absolute score."),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option("--sparsity", help="Share of masks to drop (edge-pruning), as 0.95."),
    ] = None,
    mask_steps: Annotated[
        int | None, typer.Option("--mask-steps", help="Training steps of masks (default: 500).")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Of masks (default: 0.3).")
    ] = None,
    n_prompts: opt.NPrompts = None,
    holdout: opt.Holdout = None,
    batch_size: opt.BatchSize = 32,
    seed: opt.Seed = 0,
    corruption: opt.Corruption = None,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    prepend_bos: opt.Bos = False,
    intervention: opt.Intervention = "resample",
    direction: Annotated[
        str,
        typer.Option(
            "--direction", help="noising (ablate), denoising (restore), or both and compare."
        ),
    ] = "noising",
    mean_over: opt.MeanOver = None,
    optimal_steps: opt.OptimalSteps = 50,
    split_qkv: opt.SplitQkv = True,
    split_embed: opt.SplitEmbed = False,
    positions: opt.Positions = "none",
    trust_remote_code: opt.Trust = False,
    saes: opt.Saes = None,
    neurons: Annotated[
        bool, typer.Option("--neurons", help="The neurons of every MLP are nodes (m3.n12).")
    ] = False,
    max_latents: Annotated[
        int | None,
        typer.Option(
            "--max-latents",
            help="Nodes for at most so many latents (default: active) or neurons (1000).",
        ),
    ] = None,
    candidates: Annotated[
        int,
        typer.Option("--candidates", help="With latents: edges that acdc and exact try at most."),
    ] = 3000,
    guess: opt.Guess = "removed",
    memory: opt.Memory = 1.0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder to write (default: runs/<task>-<time>). The same command with the "
            "folder of a killed acdc run goes on with it.",
        ),
    ] = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Find the circuit of a task in a model, measure it and draw it.

    Example: acdc discover ioi --method eap-ig --edges 60 --out runs/ioi
    """
    from acdc.errors import OptionError
    from acdc.pipeline import check_discovery
    from acdc.pipeline import discover as find
    from acdc.runs import Settings, check_output
    from acdc.terminal import TerminalReporter, edges_table, run_table, show

    if direction not in ("noising", "denoising", "both"):
        raise OptionError(f"direction {direction!r}: expected noising, denoising or both")
    n_bytes, both = to_bytes(memory), direction == "both"
    settings = Settings(
        task=task, model=model, metric=metric,
        method=method or ("eap-ig" if saes or neurons else "acdc"),
        threshold=threshold, n_edges=edges, ranking=ranking, steps=steps, floor=floor,
        sparsity=sparsity, mask_steps=mask_steps, learning_rate=learning_rate,
        n_prompts=n_prompts, holdout=holdout, batch_size=batch_size, seed=seed,
        corruption=corruption, device=device, dtype=dtype, prepend_bos=prepend_bos,
        intervention=intervention, direction="noising" if both else direction,
        mean_over=mean_over, optimal_steps=optimal_steps,
        split_qkv=split_qkv, split_embed=split_embed, positions=positions,
        trust_remote_code=trust_remote_code,
        saes=saes, neurons=neurons, max_latents=max_latents, candidates=candidates,
    )  # fmt: skip
    settings = check_discovery(settings)
    folder = out or _default_folder(Path(task).stem)
    if both:
        _discover_both(settings, folder, memory=n_bytes, guess=guess, overwrite=overwrite)
        return
    check_output(folder, overwrite=overwrite)
    reporter = TerminalReporter()
    run = find(
        task, reporter=reporter, memory=n_bytes, guess=guess, checkpoint=folder,
        **_options(settings),
    )  # fmt: skip
    with reporter.phase("draw and write", None):
        run.save(folder, overwrite=overwrite)
    show(run_table(run.summary(), f"circuit of {task}"), edges_table(run.circuit))
    show(f"written to {folder}: run.json, circuit.json, circuit.dot, circuit.svg, circuit.png")


def _discover_both(
    settings: Settings, folder: Path, *, memory: int, guess: str, overwrite: bool
) -> None:
    """Discover in both directions, and show what only one of them finds."""
    from acdc.directions import check_folder, discover_both
    from acdc.terminal import TerminalReporter, directions_tables, run_table, show

    check_folder(folder, overwrite=overwrite)
    reporter = TerminalReporter()
    found = discover_both(
        settings.task, reporter=reporter, memory=memory, guess=guess, checkpoint=folder,
        **_options(settings),
    )  # fmt: skip
    with reporter.phase("draw and write", None):
        found.save(folder, overwrite=overwrite)
    for run in found.runs:
        show(run_table(run.summary(), f"circuit of {settings.task}, {run.settings.direction}"))
    show(*directions_tables(found))
    show(f"written to {folder}: noising, denoising, directions.json, directions.svg and .png")


def sweep(
    task: opt.Task,
    model: opt.Model = None,
    thresholds: Annotated[
        str | None,
        typer.Option(
            "--thresholds", help="Taus, as 0.1,0.03,0.01 (default: ten, 10 % to 0.1 % of the gap)."
        ),
    ] = None,
    metric: opt.Metric = None,
    n_prompts: opt.NPrompts = None,
    holdout: opt.Holdout = None,
    batch_size: opt.BatchSize = 32,
    seed: opt.Seed = 0,
    corruption: opt.Corruption = None,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    prepend_bos: opt.Bos = False,
    intervention: opt.Intervention = "resample",
    direction: opt.Direction = "noising",
    mean_over: opt.MeanOver = None,
    optimal_steps: opt.OptimalSteps = 50,
    split_qkv: opt.SplitQkv = True,
    split_embed: opt.SplitEmbed = False,
    positions: opt.Positions = "none",
    trust_remote_code: opt.Trust = False,
    guess: opt.Guess = "removed",
    memory: opt.Memory = 1.0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write (default: runs/sweep-<task>-<time>)."),
    ] = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Run ACDC over thresholds: size and faithfulness of every circuit, as table and plot.

    Example: acdc sweep ioi --thresholds 0.3,0.1,0.03 --out runs/frontier
    """
    from acdc.frontier import check_thresholds
    from acdc.frontier import sweep as run_sweep
    from acdc.runs import check_output
    from acdc.terminal import TerminalReporter, frontier_table, show

    n_bytes = to_bytes(memory)
    taus = None if thresholds is None else check_thresholds(_numbers(thresholds))
    folder = out or _default_folder(f"sweep-{Path(task).stem}")
    check_output(folder, overwrite=overwrite)
    reporter = TerminalReporter()
    frontier = run_sweep(
        task, taus, reporter=reporter, memory=n_bytes, guess=guess, model=model, metric=metric,
        n_prompts=n_prompts, holdout=holdout, batch_size=batch_size, seed=seed,
        corruption=corruption, device=device, dtype=dtype, prepend_bos=prepend_bos,
        intervention=intervention, direction=direction,
        mean_over=mean_over, optimal_steps=optimal_steps,
        split_qkv=split_qkv, split_embed=split_embed, positions=positions,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    with reporter.phase("draw and write", None):
        frontier.save(folder, overwrite=overwrite)
    show(frontier_table(frontier.rows(), f"ACDC on {task}, {frontier.settings.model}"))
    files = "sweep.json, frontier.csv, frontier.svg, frontier.png, circuit-<tau>.json"
    show(f"written to {folder}: {files}")


def stability(
    task: Annotated[str, typer.Argument(help="Built-in task (acdc list tasks).")],
    seeds: Annotated[int, typer.Option("--seeds", help="Runs, each with prompts of its own.")] = 5,
    model: opt.Model = None,
    method: Annotated[str, typer.Option("--method", help="See acdc list methods.")] = "acdc",
    metric: opt.Metric = None,
    threshold: opt.Threshold = None,
    edges: opt.Edges = None,
    ranking: opt.Ranking = None,
    steps: opt.Steps = 5,
    n_prompts: opt.NPrompts = None,
    holdout: opt.Holdout = None,
    batch_size: opt.BatchSize = 32,
    seed: Annotated[int, typer.Option("--seed", help="The first seed; the others follow.")] = 0,
    corruption: opt.Corruption = None,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    prepend_bos: opt.Bos = False,
    intervention: opt.Intervention = "resample",
    direction: opt.Direction = "noising",
    mean_over: opt.MeanOver = None,
    optimal_steps: opt.OptimalSteps = 50,
    positions: opt.Positions = "none",
    trust_remote_code: opt.Trust = False,
    memory: opt.Memory = 1.0,
    at_least: Annotated[
        float, typer.Option("--at-least", help="Draw edges kept in this share of the runs.")
    ] = 0.5,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write (default: runs/stability-<task>-<time>)."),
    ] = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Repeat discovery over draws of prompts: count in how many runs each edge was kept.

    Example: acdc stability ioi --seeds 5 --method eap-ig --out runs/stable
    """
    from acdc.errors import OptionError
    from acdc.runs import check_output
    from acdc.stability import stability as repeat
    from acdc.terminal import TerminalReporter, show, stability_tables

    if not 0 < at_least <= 1:
        raise OptionError(f"at-least {at_least:g}: expected a share above 0, at most 1")
    n_bytes = to_bytes(memory)
    folder = out or _default_folder(f"stability-{Path(task).stem}")
    check_output(folder, overwrite=overwrite)
    reporter = TerminalReporter()
    found = repeat(
        task, seeds, reporter=reporter, memory=n_bytes, model=model, method=method, metric=metric,
        threshold=threshold, n_edges=edges, ranking=ranking, steps=steps,
        n_prompts=n_prompts, holdout=holdout, batch_size=batch_size, seed=seed,
        corruption=corruption, device=device, dtype=dtype, prepend_bos=prepend_bos,
        intervention=intervention, direction=direction,
        mean_over=mean_over, optimal_steps=optimal_steps,
        positions=positions, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    with reporter.phase("draw and write", None):
        found.save(folder, at_least=at_least, overwrite=overwrite)
    show(*stability_tables(found))
    show(f"written to {folder}: stability.json, edges.csv, circuit.json, circuit.svg, circuit.png")


def _options(settings: Settings) -> dict[str, Any]:
    """Settings as keyword arguments of a search, which takes the task by itself."""
    return {name: value for name, value in vars(settings).items() if name != "task"}


def _numbers(text: str) -> list[float]:
    from acdc.errors import OptionError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"thresholds {text!r}: expected numbers, as 0.1,0.03,0.01") from None


def _default_folder(name: str) -> Path:
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
