"""Arguments and options that several commands share.

Those that begin with ``Run`` are for commands that take up a run: not given, they are None and the
run's own setting holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__: list[str] = []

# --- model and task -----------------------------------------------------------------------

Task = Annotated[str, typer.Argument(help="Built-in task (acdc list tasks) or a file of pairs.")]
RunTask = Annotated[str | None, typer.Option("--task", help="Task (default: the run's).")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="Bundled model, folder or Hugging Face name (default: the task's)."
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model's folder run its own code.")
]
Metric = Annotated[
    str | None, typer.Option("--metric", help="See acdc list metrics (default: the task's).")
]
RunMetric = Annotated[str | None, typer.Option("--metric", help="Metric (default: the run's).")]
Saes = Annotated[
    str | None,
    typer.Option(
        "--saes",
        help="Dictionaries whose latents are nodes, separated by commas: folders, hub names, "
        "bundled or bundled-transcoders.",
    ),
]

# --- prompts ------------------------------------------------------------------------------

NPrompts = Annotated[
    int | None,
    typer.Option("--n-prompts", help="Prompt pairs (default: 64; of a file all not held out)."),
]
Holdout = Annotated[
    float | None,
    typer.Option("--holdout", help="Share of a file's rows left to evaluation (default: 0.25)."),
]
Seed = Annotated[
    int, typer.Option("--seed", help="Seed of a built-in task's prompts and of a method's noise.")
]
Corruption = Annotated[
    str | None, typer.Option("--corruption", help="How a built-in task corrupts (acdc list tasks).")
]

_BOS = typer.Option("--prepend-bos/--no-prepend-bos", help="Put BOS before both prompts.")
Bos = Annotated[bool, _BOS]
RunBos = Annotated[bool | None, _BOS]

# --- where and how it is computed ---------------------------------------------------------

_BATCH_SIZE = typer.Option("--batch-size", help="Prompts run together.")
BatchSize = Annotated[int, _BATCH_SIZE]
RunBatchSize = Annotated[int | None, _BATCH_SIZE]

_DEVICE = typer.Option("--device", help="cpu, cuda, cuda:N or mps.")
Device = Annotated[str, _DEVICE]
RunDevice = Annotated[str | None, _DEVICE]

_DTYPE = typer.Option("--dtype", help="float32, bfloat16, float16 or float64.")
Dtype = Annotated[str, _DTYPE]
RunDtype = Annotated[str | None, _DTYPE]

Memory = Annotated[
    float, typer.Option("--memory", help="GiB for the largest working set beside the weights.")
]

# --- ablation -----------------------------------------------------------------------------

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
RunDirection = Annotated[str | None, typer.Option("--direction", help="noising or denoising.")]
MeanOver = Annotated[
    str | None,
    typer.Option(
        "--mean-over",
        help="Task or file of prompts that means are over (default: those that edges come from).",
    ),
]

_OPTIMAL_STEPS = typer.Option("--optimal-steps", help="Training steps of optimal constants.")
OptimalSteps = Annotated[int, _OPTIMAL_STEPS]
RunOptimalSteps = Annotated[int | None, _OPTIMAL_STEPS]

# --- the graph ----------------------------------------------------------------------------

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

# --- the search ---------------------------------------------------------------------------

Threshold = Annotated[
    float | None, typer.Option("--threshold", help="tau of acdc, or least absolute score.")
]
Edges = Annotated[int | None, typer.Option("--edges", help="At most so many edges.")]
Ranking = Annotated[
    str | None, typer.Option("--ranking", help="Rank scores by absolute or signed value.")
]
Steps = Annotated[int, typer.Option("--steps", help="Integration steps of eap-ig.")]
Guess = Annotated[
    str, typer.Option("--guess", help="What acdc expects (speed only): removed, eap or eap-ig.")
]

# --- evidence -----------------------------------------------------------------------------

Tests = Annotated[bool, typer.Option("--tests/--no-tests", help="The tests of a circuit (README).")]
NResamples = Annotated[int, typer.Option("--n-resamples", help="Of the bootstrap over prompts.")]

# --- files --------------------------------------------------------------------------------

CircuitPath = Annotated[Path, typer.Argument(help="Folder of a run, or a circuit file.")]
JsonFile = Annotated[Path | None, typer.Option("--out", help="JSON file to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that has files.")]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]
