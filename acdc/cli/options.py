"""Arguments and options that several commands share and that are no settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from acdc.cli.completion import listed

__all__: list[str] = []


def _known_task(name: str) -> str:
    """Refuse a mistyped task before what takes seconds is imported."""
    from acdc.errors import UnknownNameError
    from acdc.tasks import TASKS, is_task_file

    if name not in TASKS and not is_task_file(name):
        raise UnknownNameError("task", name, TASKS)
    return name


Task = Annotated[
    str,
    typer.Argument(
        help="Built-in task (acdc list tasks) or a file of pairs.",
        callback=_known_task,
        autocompletion=listed("tasks"),
    ),
]
RunTask = Annotated[
    str | None,
    typer.Option("--task", help="Task (default: the run's).", autocompletion=listed("tasks")),
]
CircuitPath = Annotated[Path, typer.Argument(help="Folder of a run, or a circuit file.")]

Memory = Annotated[
    float, typer.Option("--memory", help="GiB for the largest working set beside the weights.")
]
Guess = Annotated[
    str, typer.Option("--guess", help="What acdc expects (speed only): removed, eap or eap-ig.")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model's folder run its own code.")
]
Tests = Annotated[bool, typer.Option("--tests/--no-tests", help="The tests of a circuit.")]
OtherModel = Annotated[
    bool,
    typer.Option("--other-model", help="Use a reference of another model; the result says so."),
]
NResamples = Annotated[int, typer.Option("--n-resamples", help="Of the bootstrap over prompts.")]

Json = Annotated[bool, typer.Option("--json/--no-json", help="Print JSON instead of tables.")]
JsonFile = Annotated[Path | None, typer.Option("--out", help="JSON file to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that has files.")]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]

_RUNS = "Many runs"
Jobs = Annotated[
    int | None, typer.Option("--jobs", help="Runs at a time (default: 1).", rich_help_panel=_RUNS)
]
Executor = Annotated[
    str | None,
    typer.Option(
        "--executor",
        help="Where: processes (default with jobs), here, ray, slurm, or slurm-local.",
        rich_help_panel=_RUNS,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", help="Of a Ray cluster (default: one of its own).", rich_help_panel=_RUNS
    ),
]
Gpus = Annotated[
    float | None,
    typer.Option(
        "--gpus", help="Of each run, on Ray (fractions too) and Slurm.", rich_help_panel=_RUNS
    ),
]
