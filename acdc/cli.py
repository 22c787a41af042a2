"""The command line.  Nothing heavy is imported before a command runs."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from acdc.engine.constants import Constants
    from acdc.runs import Settings
    from graphs import Ablation, Circuit

__all__ = ["app", "main"]

# click's UsageError; typer has it from click or from a copy of its own, depending on its version.
_UsageError: Any = typer.BadParameter.__mro__[1]

_TOP_LATENTS, _TOP_ON_PAGE = 10, 200

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    help="Find circuits in transformers.\n\nExample: acdc discover ioi",
)

Task = Annotated[str, typer.Argument(help="Built-in task (acdc list tasks) or a file of pairs.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="Bundled model, folder or Hugging Face name (default: the task's)."
    ),
]
Metric = Annotated[
    str | None, typer.Option("--metric", help="See acdc list metrics (default: the task's).")
]
NPrompts = Annotated[
    int | None,
    typer.Option("--n-prompts", help="Prompt pairs (default: 64; of a file all not held out)."),
]
Holdout = Annotated[
    float | None,
    typer.Option("--holdout", help="Share of a file's rows left to evaluation (default: 0.25)."),
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Prompts run together.")]
Seed = Annotated[
    int, typer.Option("--seed", help="Seed of a built-in task's prompts and of a method's noise.")
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or float64.")]
Bos = Annotated[
    bool, typer.Option("--prepend-bos/--no-prepend-bos", help="Put BOS before both prompts.")
]
Corruption = Annotated[
    str | None, typer.Option("--corruption", help="How a built-in task corrupts (acdc list tasks).")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model's folder run its own code.")
]
Memory = Annotated[
    float, typer.Option("--memory", help="GiB for the largest working set beside the weights.")
]
Intervention = Annotated[
    str,
    typer.Option(
        "--intervention",
        help="What ablated edges carry: resample, zero, mean, mean-positional or optimal.",
    ),
]
Direction = Annotated[
    str, typer.Option("--direction", help="noising (ablate) or denoising (restore).")
]
MeanOver = Annotated[
    str | None,
    typer.Option(
        "--mean-over",
        help="Task or file of prompts that means are over (default: those that edges come from).",
    ),
]
OptimalSteps = Annotated[
    int, typer.Option("--optimal-steps", help="Training steps of optimal constants.")
]
SplitQkv = Annotated[
    bool, typer.Option("--split-qkv/--no-split-qkv", help="Query, key and value apart.")
]
SplitEmbed = Annotated[
    bool, typer.Option("--split-embed/--no-split-embed", help="Token and position apart.")
]
Positions = Annotated[
    str,
    typer.Option(
        "--positions", help="Split nodes and edges: none, by token, or by span of the task."
    ),
]
Guess = Annotated[
    str,
    typer.Option("--guess", help="What acdc expects (speed only): removed, eap or eap-ig."),
]
Saes = Annotated[
    str | None,
    typer.Option(
        "--saes",
        help="Dictionaries whose latents are nodes, separated by commas: folders, hub names, "
        "bundled or bundled-transcoders.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that has files.")]


@app.command()
def discover(
    task: Task,
    model: Model = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="See acdc list methods (default: acdc; with --saes or --neurons eap-ig).",
        ),
    ] = None,
    metric: Metric = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="tau of acdc, or least absolute score.")
    ] = None,
    edges: Annotated[int | None, typer.Option("--edges", help="At most so many edges.")] = None,
    ranking: Annotated[
        str | None,
        typer.Option("--ranking", help="Rank scores by absolute or signed value."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Integration steps of eap-ig.")] = 5,
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
    n_prompts: NPrompts = None,
    holdout: Holdout = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    corruption: Corruption = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    prepend_bos: Bos = False,
    intervention: Intervention = "resample",
    direction: Annotated[
        str,
        typer.Option(
            "--direction", help="noising (ablate), denoising (restore), or both and compare."
        ),
    ] = "noising",
    mean_over: MeanOver = None,
    optimal_steps: OptimalSteps = 50,
    split_qkv: SplitQkv = True,
    split_embed: SplitEmbed = False,
    positions: Positions = "none",
    trust_remote_code: Trust = False,
    saes: Saes = None,
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
    guess: Guess = "removed",
    memory: Memory = 1.0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder to write (default: runs/<task>-<time>). The same command with the "
            "folder of a killed acdc run goes on with it.",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Find the circuit of a task in a model, measure it and draw it.

    Example: acdc discover ioi --method eap-ig --edges 60 --out runs/ioi
    """
    from acdc.pipeline import check_discovery
    from acdc.pipeline import discover as find
    from acdc.runs import Settings, check_output
    from acdc.terminal import TerminalReporter, edges_table, run_table, show

    n_bytes, both = _bytes(memory), direction == "both"
    settings = Settings(
        task=task, model=model, metric=metric,
        method=method or ("eap-ig" if saes or neurons else "acdc"),
        threshold=threshold, n_edges=edges,
        ranking=ranking,
        steps=steps, floor=floor, sparsity=sparsity, mask_steps=mask_steps,
        learning_rate=learning_rate,
        n_prompts=n_prompts, holdout=holdout, batch_size=batch_size, seed=seed,
        corruption=corruption,
        device=device, dtype=dtype, prepend_bos=prepend_bos, intervention=intervention,
        direction="noising" if both else direction,
        split_qkv=split_qkv, split_embed=split_embed,
        positions=positions, trust_remote_code=trust_remote_code, saes=saes, neurons=neurons,
        max_latents=max_latents, candidates=candidates, mean_over=mean_over,
        optimal_steps=optimal_steps,
    )  # fmt: skip
    settings = check_discovery(settings)
    folder = out or _default_folder(Path(task).stem)
    if both:
        _discover_both(settings, folder, memory=n_bytes, guess=guess, overwrite=overwrite)
        return
    check_output(folder, overwrite=overwrite)
    options = {name: value for name, value in vars(settings).items() if name != "task"}
    reporter = TerminalReporter()
    run = find(task, reporter=reporter, memory=n_bytes, guess=guess, checkpoint=folder, **options)
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
    options = {name: value for name, value in vars(settings).items() if name != "task"}
    found = discover_both(
        settings.task, reporter=reporter, memory=memory, guess=guess, checkpoint=folder, **options
    )
    with reporter.phase("draw and write", None):
        found.save(folder, overwrite=overwrite)
    for run in found.runs:
        show(run_table(run.summary(), f"circuit of {settings.task}, {run.settings.direction}"))
    show(*directions_tables(found))
    show(f"written to {folder}: noising, denoising, directions.json, directions.svg and .png")


@app.command()
def sweep(
    task: Task,
    model: Model = None,
    thresholds: Annotated[
        str | None,
        typer.Option(
            "--thresholds", help="Taus, as 0.1,0.03,0.01 (default: ten, 10 % to 0.1 % of the gap)."
        ),
    ] = None,
    metric: Metric = None,
    n_prompts: NPrompts = None,
    holdout: Holdout = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    corruption: Corruption = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    prepend_bos: Bos = False,
    intervention: Intervention = "resample",
    direction: Direction = "noising",
    mean_over: MeanOver = None,
    optimal_steps: OptimalSteps = 50,
    split_qkv: SplitQkv = True,
    split_embed: SplitEmbed = False,
    positions: Positions = "none",
    trust_remote_code: Trust = False,
    guess: Guess = "removed",
    memory: Memory = 1.0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write (default: runs/sweep-<task>-<time>)."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Run ACDC over thresholds: size and faithfulness of every circuit, as table and plot.

    Example: acdc sweep ioi --thresholds 0.3,0.1,0.03 --out runs/frontier
    """
    from acdc.frontier import check_thresholds
    from acdc.frontier import sweep as run_sweep
    from acdc.runs import check_output
    from acdc.terminal import TerminalReporter, frontier_table, show

    n_bytes = _bytes(memory)
    taus = None if thresholds is None else check_thresholds(_numbers(thresholds))
    folder = out or _default_folder(f"sweep-{Path(task).stem}")
    check_output(folder, overwrite=overwrite)
    reporter = TerminalReporter()
    frontier = run_sweep(
        task, taus, reporter=reporter, memory=n_bytes, guess=guess, model=model, metric=metric,
        n_prompts=n_prompts, holdout=holdout, batch_size=batch_size, seed=seed,
        corruption=corruption,
        device=device, dtype=dtype, prepend_bos=prepend_bos, intervention=intervention,
        direction=direction, split_qkv=split_qkv, split_embed=split_embed,
        positions=positions, trust_remote_code=trust_remote_code, mean_over=mean_over,
        optimal_steps=optimal_steps,
    )  # fmt: skip
    with reporter.phase("draw and write", None):
        frontier.save(folder, overwrite=overwrite)
    show(frontier_table(frontier.rows(), f"ACDC on {task}, {frontier.settings.model}"))
    files = "sweep.json, frontier.csv, frontier.svg, frontier.png, circuit-<tau>.json"
    show(f"written to {folder}: {files}")


@app.command()
def evaluate(
    circuit: Annotated[Path, typer.Argument(help="Folder of a run, or a circuit file.")],
    task: Annotated[str | None, typer.Option("--task", help="Task (default: the run's).")] = None,
    model: Model = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="Metric (default: the run's).")
    ] = None,
    n_prompts: NPrompts = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed (default: the run's).")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Prompts run together.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:N or mps.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16, float16 or float64.")
    ] = None,
    prepend_bos: Annotated[
        bool | None,
        typer.Option("--prepend-bos/--no-prepend-bos", help="Put BOS before both prompts."),
    ] = None,
    corruption: Corruption = None,
    intervention: Annotated[
        str | None,
        typer.Option("--intervention", help="resample, zero, mean, mean-positional or optimal."),
    ] = None,
    direction: Annotated[
        str | None, typer.Option("--direction", help="noising or denoising.")
    ] = None,
    mean_over: MeanOver = None,
    optimal: Annotated[
        bool,
        typer.Option("--optimal", help="Train optimal constants and measure under them too."),
    ] = False,
    optimal_steps: Annotated[
        int | None, typer.Option("--optimal-steps", help="Training steps of optimal constants.")
    ] = None,
    memory: Memory = 1.0,
    saes: Saes = None,
    brief: Annotated[
        bool,
        typer.Option(
            "--brief", help="Metric and faithfulness alone, on discovery's prompts (or --seed's)."
        ),
    ] = False,
    seen: Annotated[
        bool,
        typer.Option("--seen/--unseen", help="Evaluate on the prompts that discovery saw."),
    ] = False,
    tests: Annotated[
        bool, typer.Option("--tests/--no-tests", help="The tests of a circuit (README).")
    ] = True,
    alpha: Annotated[float, typer.Option("--alpha", help="Level of the tests.")] = 0.05,
    epsilon: Annotated[
        float, typer.Option("--epsilon", help="Equivalence: how far from even odds may be.")
    ] = 0.1,
    quantile: Annotated[
        float, typer.Option("--quantile", help="Share of random circuits or edges to surpass.")
    ] = 0.9,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Completeness: share of the gap to be apart.")
    ] = 0.1,
    n_random: Annotated[
        int, typer.Option("--n-random", help="Random circuits, and random added edges.")
    ] = 100,
    n_permutations: Annotated[
        int, typer.Option("--n-permutations", help="Of the test of independence.")
    ] = 1000,
    n_knockouts: Annotated[
        int, typer.Option("--n-knockouts", help="Random knock-outs of nodes.")
    ] = 20,
    n_resamples: Annotated[
        int, typer.Option("--n-resamples", help="Of the bootstrap over prompts.")
    ] = 1000,
    test_edges: Annotated[
        int | None,
        typer.Option("--test-edges", help="Edges that minimality tests, drawn (default: all)."),
    ] = None,
    test_seed: Annotated[
        int, typer.Option("--test-seed", help="Seed of all that the tests draw.")
    ] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
) -> None:
    """Measure and test a circuit, on prompts that discovery has not seen.

    Faithfulness with its interval under every ablation, CPR and CMD, and tests that a wrong
    circuit fails: equivalence, independence, minimality, sufficiency, necessity, completeness.
    Options that are not given are the run's own.

    Example: acdc evaluate runs/ioi --metric logit_diff --out verdicts.json

    Example: acdc evaluate runs/ioi --brief --seed 1
    """
    from acdc.assessment import assess
    from acdc.errors import OptionError
    from acdc.runs import run_constants
    from acdc.terminal import (
        TerminalReporter,
        ablations_table,
        effects_table,
        run_table,
        show,
        verdicts_table,
    )
    from acdc.verdicts import Trials

    trials = Trials(
        alpha=alpha, epsilon=epsilon, quantile=quantile, tolerance=tolerance, n_random=n_random,
        n_permutations=n_permutations, n_knockouts=n_knockouts, n_edges=test_edges, seed=test_seed,
    )  # fmt: skip
    found, settings, discovery = _circuit_and_settings(
        circuit,
        task=task, model=model, metric=metric, n_prompts=n_prompts, seed=seed,
        batch_size=batch_size, device=device, dtype=dtype, prepend_bos=prepend_bos,
        corruption=corruption, intervention=intervention, direction=direction, saes=saes,
        mean_over=mean_over, optimal_steps=optimal_steps,
    )  # fmt: skip
    constants = run_constants(circuit, settings)
    n_bytes = _bytes(memory)
    title = f"evaluation of {circuit}"
    if out is not None:
        _check_file(out, overwrite)
    if brief:
        if out is not None or seen:
            raise OptionError(f"--brief with {'--out' if out else '--seen'}: leave one of them out")
        show(run_table(_brief(found, settings, constants), title))
        return
    if discovery is not None and seed == discovery.seed and task is None and not seen:
        raise OptionError(
            f"seed {seed} is that of discovery: choose another, or say --seen to evaluate on "
            "the prompts that it saw"
        )
    assessment = assess(
        found, settings, discovery=discovery, seen=seen, trials=trials, tests=tests,
        n_resamples=n_resamples, constants=constants, optimal=optimal, memory=n_bytes,
        reporter=TerminalReporter(),
    )  # fmt: skip
    if out is not None:
        assessment.save(out)
    summary = assessment.summary()
    show(run_table(summary, title), ablations_table(summary))
    if assessment.judgement is not None:
        show(verdicts_table(assessment.judgement), effects_table(assessment.judgement))
    if out is not None:
        show(f"written to {out}")


def _brief(circuit: Circuit, settings: Settings, constants: Constants | None) -> dict[str, Any]:
    """What ``run_table`` shows of a circuit measured again."""
    from dataclasses import asdict

    from acdc.pipeline import evaluate as measure

    evaluation, n_pairs = measure(circuit, settings, constants)
    return {
        **asdict(settings),
        **asdict(evaluation),
        "method": circuit.info.get("method", settings.method),
        "n_prompts": n_pairs,
        "n_edges_kept": circuit.n_edges,
        "n_edges_total": circuit.graph.n_edges,
    }


@app.command()
def stability(
    task: Annotated[str, typer.Argument(help="Built-in task (acdc list tasks).")],
    seeds: Annotated[int, typer.Option("--seeds", help="Runs, each with prompts of its own.")] = 5,
    model: Model = None,
    method: Annotated[str, typer.Option("--method", help="See acdc list methods.")] = "acdc",
    metric: Metric = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="tau of acdc, or least absolute score.")
    ] = None,
    edges: Annotated[int | None, typer.Option("--edges", help="At most so many edges.")] = None,
    ranking: Annotated[
        str | None, typer.Option("--ranking", help="Rank scores by absolute or signed value.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Integration steps of eap-ig.")] = 5,
    n_prompts: NPrompts = None,
    holdout: Holdout = None,
    batch_size: BatchSize = 32,
    seed: Annotated[int, typer.Option("--seed", help="The first seed; the others follow.")] = 0,
    corruption: Corruption = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    prepend_bos: Bos = False,
    intervention: Intervention = "resample",
    direction: Direction = "noising",
    mean_over: MeanOver = None,
    optimal_steps: OptimalSteps = 50,
    positions: Positions = "none",
    trust_remote_code: Trust = False,
    memory: Memory = 1.0,
    at_least: Annotated[
        float, typer.Option("--at-least", help="Draw edges kept in this share of the runs.")
    ] = 0.5,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write (default: runs/stability-<task>-<time>)."),
    ] = None,
    overwrite: Overwrite = False,
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
    n_bytes = _bytes(memory)
    folder = out or _default_folder(f"stability-{Path(task).stem}")
    check_output(folder, overwrite=overwrite)
    reporter = TerminalReporter()
    found = repeat(
        task, seeds, reporter=reporter, memory=n_bytes, model=model, method=method, metric=metric,
        threshold=threshold, n_edges=edges, ranking=ranking, steps=steps, n_prompts=n_prompts,
        holdout=holdout,
        batch_size=batch_size, seed=seed, corruption=corruption, device=device, dtype=dtype,
        prepend_bos=prepend_bos, intervention=intervention, direction=direction,
        mean_over=mean_over, optimal_steps=optimal_steps, positions=positions,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    with reporter.phase("draw and write", None):
        found.save(folder, at_least=at_least, overwrite=overwrite)
    show(*stability_tables(found))
    show(f"written to {folder}: stability.json, edges.csv, circuit.json, circuit.svg, circuit.png")


@app.command(name="self-repair")
def self_repair(
    circuit: Annotated[Path, typer.Argument(help="Folder of a run, or a circuit file.")],
    role: Annotated[
        list[str] | None,
        typer.Option(
            "--role",
            help="A role's heads, as mover=a4.h1,a5.h0, or a role of --reference (repeatable; "
            "default: the circuit's heads with an edge into logits).",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="Take roles of this reference (acdc list references)."),
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="Task (default: the run's).")] = None,
    model: Model = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="Metric (default: the run's).")
    ] = None,
    n_prompts: NPrompts = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Prompts run together.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:N or mps.")
    ] = None,
    intervention: Annotated[
        str | None, typer.Option("--intervention", help="What ablated edges carry.")
    ] = None,
    direction: Annotated[
        str | None, typer.Option("--direction", help="noising or denoising.")
    ] = None,
    seen: Annotated[
        bool,
        typer.Option("--seen/--unseen", help="Measure on the prompts that discovery saw."),
    ] = True,
    min_share: Annotated[
        float,
        typer.Option("--min-share", help="Of what was taken, what a backup gives back at least."),
    ] = 0.1,
    n_resamples: Annotated[
        int, typer.Option("--n-resamples", help="Of the bootstrap over prompts.")
    ] = 1000,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
) -> None:
    """Find backup heads: each head's direct effect before and after others are ablated.

    For a head of a role the others of the role are ablated, for every other head the whole role.

    Example: acdc self-repair runs/ioi --role mover=a4.h1,a5.h0 --out repair.json
    """
    from acdc.references import load_reference
    from acdc.self_repair import parse_roles
    from acdc.self_repair import self_repair as measure
    from acdc.terminal import TerminalReporter, self_repair_tables, show

    known = None if reference is None else load_reference(reference)
    roles = parse_roles(role, known) if role else known
    found, settings, discovery = _circuit_and_settings(
        circuit,
        task=task, model=model, metric=metric, n_prompts=n_prompts, batch_size=batch_size,
        device=device, intervention=intervention, direction=direction,
    )  # fmt: skip
    if out is not None:
        _check_file(out, overwrite)
    repair = measure(
        found, settings, roles, discovery=discovery, seen=seen, min_share=min_share,
        n_resamples=n_resamples, reporter=TerminalReporter(),
    )  # fmt: skip
    if out is not None:
        repair.save(out)
    show(*self_repair_tables(repair, f"self-repair in {circuit}"))
    if out is not None:
        show(f"written to {out}")


@app.command()
def export(
    circuit: Annotated[Path, typer.Argument(help="Folder of a run, or a circuit file.")],
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="svg, png, pdf, dot, json, graphml or pt (default: as --out ends, or svg).",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write (default: beside the circuit).")
    ] = None,
    max_edges: Annotated[
        int | None, typer.Option("--max-edges", help="Draw at most so many edges.")
    ] = None,
    negate: Annotated[
        bool,
        typer.Option(
            "--negate/--no-negate",
            help="Turn the scores' sign (json, pt): MIB ranks by signed scores, highest first; "
            "ours of logit_diff are negative where an edge helps.",
        ),
    ] = False,
    error_nodes: Annotated[
        bool,
        typer.Option(
            "--error-nodes/--no-error-nodes",
            help="With the edges of error nodes (circuits with latents), or without.",
        ),
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
) -> None:
    """Write a circuit as a picture, as DOT, GraphML, or JSON and .pt in EAP-IG's and MIB's layout.

    Example: acdc export runs/ioi --format pdf --out ioi.pdf
    """
    from dataclasses import replace

    from acdc.errors import OptionError
    from graphs.draw import FORMATS, render
    from graphs.formats import write_dot, write_graphml, write_json

    formats = (*FORMATS, "dot", "json", "graphml", "pt")
    format = format or (out.suffix[1:].lower() if out else "") or "svg"
    if format not in formats:
        raise OptionError(f"format {format!r}: expected one of {', '.join(formats)}")
    if max_edges is not None and max_edges < 1:
        raise OptionError(f"max-edges {max_edges}: expected at least 1")
    if negate and format not in ("json", "pt"):
        raise OptionError(f"--negate with format {format}: it is for json and pt")
    if negate and out is None:
        raise OptionError("--negate: say with --out where the other scores go")
    source = _circuit_file(circuit)
    found = _load(source)
    if negate:
        found = replace(found, scores=-found.scores)
    if not error_nodes:
        from acdc.latents.faithfulness import error_edges  # torch takes seconds

        if out is None or not found.graph.shape.sites:
            raise OptionError("--no-error-nodes: it is for circuits with latents, and needs --out")
        found = replace(found, in_circuit=found.in_circuit & ~error_edges(found.graph))
    target = out or source.with_suffix(f".{format}")
    if out is None and target == source:
        typer.echo(f"{source} is {format} already")
        return
    derived = out is None and (source.suffix == ".json" or format in FORMATS)
    _check_file(target, overwrite or derived)
    limits: dict[str, Any] = {} if max_edges is None else {"max_edges": max_edges}
    if format in FORMATS:
        render(found, target, format, **limits)
    elif format == "dot":
        write_dot(found, target, **limits)
    elif format == "graphml":
        write_graphml(found, target)
    elif format == "pt":
        from acdc.mib import write_pt  # torch takes seconds

        write_pt(found, target)
    else:
        write_json(found, target)
    typer.echo(f"written to {target}")


@app.command()
def latents(
    run: Annotated[Path, typer.Argument(help="Folder of a run that was found with --saes.")],
    top: Annotated[
        int | None,
        typer.Option("--top", help="Latents to show (default: 10; 200 on a page)."),
    ] = None,
    prompts: Annotated[int, typer.Option("--prompts", help="Prompts to show of each latent.")] = 5,
    clusters: Annotated[
        int | None,
        typer.Option("--clusters", help="Put latents that are active together into so many sets."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page (.html) that needs no network.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
) -> None:
    """Show the latents of a circuit: what they fire on, what they write, and their edges.

    Example: acdc latents runs/ioi --top 5

    Example: acdc latents runs/ioi --clusters 8 --html latents.html
    """
    from acdc.errors import OptionError
    from acdc.looking import gallery_parts, look, to_html
    from acdc.terminal import TerminalReporter, show
    from graphs.files import write_whole

    if html is not None:
        if html.suffix.lower() not in (".html", ".htm"):
            raise OptionError(f"page {str(html)!r}: expected a name ending in .html")
        _check_file(html, overwrite)
    n_shown = top if top is not None else (_TOP_LATENTS if html is None else _TOP_ON_PAGE)
    with TerminalReporter().phase("look at latents", None):
        gallery = look(run, top=n_shown, n_examples=prompts, clusters=clusters)
    if html is None:
        show(*gallery_parts(gallery))
    else:
        write_whole(html, to_html(gallery))
        typer.echo(f"written to {html}: {len(gallery.latents)} of {gallery.n_latents} latents")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Page to write (default: RUN/report.html).")
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--evaluation",
            help="What acdc evaluate wrote (default: RUN/evaluation.json, or done now).",
        ),
    ] = None,
    stability: Annotated[
        Path | None,
        typer.Option(
            "--stability", help="What acdc stability wrote (default: RUN/stability.json)."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", help="Reference circuit: name or file (default: the model's own)."
        ),
    ] = None,
    tests: Annotated[
        bool, typer.Option("--tests/--no-tests", help="The tests of a circuit (README).")
    ] = True,
    prompts: Annotated[
        int, typer.Option("--prompts", help="Prompt pairs to show attention patterns on.")
    ] = 3,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
) -> None:
    """Write a run as one HTML page that needs no network: circuit, tests, curves, timings.

    Example: acdc report runs/ioi

    Example: acdc report runs/ioi --stability runs/stable/stability.json --out ioi.html
    """
    from acdc.errors import CircuitFileError, OptionError
    from acdc.report import gather, to_html
    from acdc.terminal import TerminalReporter
    from graphs.files import write_whole

    page = out or run / "report.html"
    if not run.is_dir():
        raise CircuitFileError(f"{run}: no such folder; give the folder of a run")
    if page.suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"page {str(page)!r}: expected a name ending in .html")
    _check_file(page, overwrite)
    found = gather(
        run, evaluation=evaluation, stability=stability, reference=reference, tests=tests,
        n_prompts=prompts, reporter=TerminalReporter(),
    )  # fmt: skip
    write_whole(page, to_html(found))
    typer.echo(f"written to {page}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a run, or a circuit file.")],
    second: Annotated[
        Path | None, typer.Argument(help="What it is compared with (or give --reference).")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="Reference circuit: name (acdc list references) or file."),
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option("--role", help="Show the nodes of this role of the reference (repeatable)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Picture of both (.svg, .png, .pdf or .dot).")
    ] = None,
    list_edges: Annotated[
        bool, typer.Option("--list/--no-list", help="List the edges in one and not the other.")
    ] = True,
    faithfulness: Annotated[
        float,
        typer.Option(
            "--faithfulness", help="Runs over different bases: sizes at this faithfulness."
        ),
    ] = 0.9,
    as_json: Annotated[
        bool, typer.Option("--json/--no-json", help="Print JSON instead of tables.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
) -> None:
    """Compare two circuits, or one with a reference: overlap, differing edges, one diagram.

    Circuits over different bases (heads and MLPs, latents of other dictionaries) are compared by
    the components that their nodes stand for and, for runs, by size at equal faithfulness.

    Example: acdc compare runs/acdc runs/eap-ig --out both.svg

    Example: acdc compare runs/ioi --reference ioi --out both.svg
    """
    from acdc.errors import OptionError

    if (second is None) == (reference is None):
        got = "Missing argument 'second'" if second is None else "both 'second' and --reference"
        raise OptionError(f"{got}: give a second circuit, or --reference with a name or file")
    if role and reference is None:
        raise OptionError(f"role {role[0]!r} without a reference: give --reference")
    if out is not None and out.suffix not in (".svg", ".png", ".pdf", ".dot"):
        raise OptionError(
            f"picture {str(out)!r}: expected a name ending in .svg, .png, .pdf or .dot"
        )
    if out is not None:
        _check_file(out, overwrite)
    if second is not None:
        draw = _compare_circuits(first, second, list_edges, faithfulness, as_json, out)
    else:
        assert reference is not None
        draw = _compare_reference(first, reference, role or [], list_edges, as_json)
    if out is not None:
        _write_picture(draw(), out)
        typer.echo(f"written to {out}", err=as_json)


def _compare_circuits(
    first: Path,
    second: Path,
    list_edges: bool,
    faithfulness: float,
    as_json: bool,
    out: Path | None,
) -> Callable[[], str]:
    """Show how two circuits compare; return what draws both."""
    from acdc.terminal import comparison_table, show
    from graphs.compare import compare as overlap
    from graphs.compare import to_dot_comparison

    a, b = _load(_circuit_file(first)), _load(_circuit_file(second))
    labels = (str(first), str(second))
    if a.graph.shape.sites != b.graph.shape.sites:
        return _compare_bases((a, b), (first, second), list_edges, faithfulness, as_json, out)
    found = overlap(a, b)
    if as_json:
        _print_json(found)
        return lambda: to_dot_comparison(a, b, labels)
    show(comparison_table(found, labels))
    if list_edges:
        for label, names in zip(labels, (found.edges.only_a, found.edges.only_b), strict=True):
            show(f"only in {label}: " + (", ".join(names) or "nothing"))
    return lambda: to_dot_comparison(a, b, labels)


def _compare_bases(
    circuits: tuple[Circuit, Circuit],
    paths: tuple[Path, Path],
    list_edges: bool,
    faithfulness: float,
    as_json: bool,
    out: Path | None,
) -> Callable[[], str]:
    """Show how circuits over different bases compare; there is no one diagram of both."""
    from acdc.bases import sizes_at
    from acdc.errors import OptionError
    from acdc.terminal import TerminalReporter, bases_tables, show
    from graphs.bases import compare_bases

    if out is not None:
        raise OptionError(
            f"picture {str(out)!r}: circuits over different bases have no common diagram; draw "
            "each with acdc export"
        )
    found = compare_bases(*circuits)
    sizes = None
    if all(path.is_dir() for path in paths):
        with TerminalReporter().phase("size at equal faithfulness", None):
            sizes = sizes_at(paths, faithfulness)
    if as_json:
        _print_json({"comparison": found, "sizes": sizes})
    else:
        show(*bases_tables(found, sizes, (str(paths[0]), str(paths[1])), list_edges=list_edges))
    return lambda: ""


def _print_json(value: Any) -> None:
    import json
    from dataclasses import asdict, is_dataclass

    def plain(one: Any) -> Any:
        if is_dataclass(one) and not isinstance(one, type):
            return asdict(one)
        raise TypeError(f"{type(one).__name__} is no plain value")

    typer.echo(json.dumps(value, default=plain, indent=1))


def _compare_reference(
    path: Path, name: str, roles: list[str], list_edges: bool, as_json: bool
) -> Callable[[], str]:
    """Show how a circuit compares with a reference; return what draws both."""
    from acdc.references import ablation_warning, check_roles, load_reference
    from acdc.terminal import reference_table, roles_table, show
    from graphs.compare import compare_reference, to_dot_reference

    reference = load_reference(name)
    check_roles(reference, roles)
    circuit, ablation = _circuit_and_ablation(path)
    found = compare_reference(circuit, reference)
    if warning := ablation_warning(reference, ablation):
        typer.echo(f"acdc: warning: {warning}", err=True)
    if as_json:
        _print_json(found)
        return lambda: to_dot_reference(circuit, reference, str(path))
    show(reference_table(found, reference, str(path)))
    if reference.roles:
        show(roles_table(found, roles))
    if list_edges:
        overlap, what = (found.nodes, "nodes") if found.edges is None else (found.edges, "edges")
        show(f"missed {what}: " + (", ".join(overlap.only_b) or "none"))
        show(f"extra {what}: " + (", ".join(overlap.only_a) or "none"))
    return lambda: to_dot_reference(circuit, reference, str(path))


def _circuit_and_ablation(path: Path) -> tuple[Circuit, Ablation]:
    """A circuit, and under which ablation it was found as far as its files say."""
    from acdc.errors import CircuitFileError, GraphError
    from acdc.runs import load_run
    from graphs.reference import Ablation

    if path.is_dir():
        settings, circuit, _ = load_run(path)
        return circuit, Ablation(settings.intervention, settings.direction)
    circuit = _load(_circuit_file(path))
    try:
        ablation = Ablation(circuit.info.get("intervention"), circuit.info.get("direction"))
    except GraphError as error:
        raise CircuitFileError(f"{path}: {error}") from error
    return circuit, ablation


def _write_picture(dot: str, out: Path) -> None:
    from graphs.draw import render
    from graphs.files import write_whole

    if out.suffix == ".dot":
        write_whole(out, dot)
    else:
        render(dot, out)


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="models, tasks, methods, metrics or references.")],
) -> None:
    """List what there is: models, tasks, methods, metrics or references.

    Example: acdc list methods
    """
    from acdc.errors import UnknownNameError
    from acdc.listing import LISTS
    from acdc.terminal import show

    if what not in LISTS:
        raise UnknownNameError("list", what, LISTS)
    show(LISTS[what]())


def _bytes(memory: float) -> int:
    from acdc.errors import OptionError

    if not 0 < memory < math.inf:
        raise OptionError(f"memory {memory:g}: expected GiB above 0, as 1")
    return int(memory * 2**30)


def _numbers(text: str) -> list[float]:
    from acdc.errors import OptionError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"thresholds {text!r}: expected numbers, as 0.1,0.03,0.01") from None


def _default_folder(name: str) -> Path:
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _circuit_file(path: Path) -> Path:
    from acdc.errors import CircuitFileError

    if not path.exists():
        raise CircuitFileError(f"{path}: no such folder or file; give a run or a circuit file")
    return path / "circuit.json" if path.is_dir() else path


def _load(path: Path) -> Circuit:
    if path.suffix.lower() == ".pt":
        from acdc.mib import read_pt  # torch takes seconds

        return read_pt(path)
    from graphs.formats import load_circuit

    return load_circuit(path)


def _check_file(path: Path, overwrite: bool) -> None:
    from acdc.errors import OutputError

    if path.exists() and not overwrite:
        raise OutputError(f"{str(path)!r} exists: choose another with --out or pass --overwrite")
    if not path.parent.is_dir():
        raise OutputError(f"folder {str(path.parent)!r} does not exist: create it first")


def _circuit_and_settings(path: Path, **given: Any) -> tuple[Circuit, Settings, Settings | None]:
    """A circuit, the settings of its run with those given on top, and its run's alone."""
    from acdc.errors import OptionError
    from acdc.pipeline import check_settings
    from acdc.runs import load_run, read_settings
    from acdc.tasks import is_task_file

    discovery = None
    if _circuit_file(path) != path:
        discovery, circuit, summary = load_run(path)
    else:
        circuit, summary = _load(path), {}
        if given["task"] is None:
            raise OptionError(f"{path} is a circuit file: say with --task what to measure it on")
    chosen = {name: value for name, value in given.items() if value is not None}
    if "task" in chosen and chosen["task"] != summary.get("task"):
        summary.pop("corruption", None)
        summary["holdout"] = 0.0 if is_task_file(chosen["task"]) else None
        if "n_prompts" not in chosen:
            summary.pop("n_prompts", None)
    return circuit, check_settings(read_settings({**summary, **chosen})), discovery


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line on standard error and status 2."""
    # Before torch is loaded: idle OpenMP threads sleep instead of spinning.  On a busy machine
    # small models run ten times faster so.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _add_plugins()
    command = typer.main.get_command(app)
    try:
        status = command.main(args=arguments, prog_name="acdc", standalone_mode=False)
    except ValueError as error:
        from graphs.errors import InputError  # not at the top: graphs brings in numba

        if not isinstance(error, InputError):
            raise
        _fail(str(error))
    except _UsageError as error:
        _fail(f"{error.format_message() or 'no command'} (see acdc --help)")
    except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError
        if not isinstance(error, MemoryError) and " memory" not in str(error):
            raise
        _fail("out of memory: lower --batch-size, --memory or --n-prompts")
    except OSError as error:  # a name too long, a full disk, a folder that may not be read
        _fail(f"{error.filename or 'file'}: {error.strerror or error}")
    else:
        if status == 130:
            typer.echo("acdc: stopped", err=True)
        sys.exit(status if isinstance(status, int) else 0)


def _add_plugins() -> None:
    """Add the commands that other packages offer under the entry point ``acdc.commands``."""
    known = {group.name for group in app.registered_groups}
    for point in entry_points(group="acdc.commands"):
        if point.name not in known:
            app.add_typer(point.load(), name=point.name)


def _fail(message: str) -> None:
    typer.echo("acdc: " + " ".join(message.split()), err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
