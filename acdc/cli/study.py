"""``acdc study``: a grid of runs, one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from acdc.cli import options as opt
from acdc.cli.answers import answer
from acdc.cli.asked import takes

__all__ = ["study"]

_LISTS = {"task": str, "model": str, "method": str, "n_edges": int}


@takes("model", "method", "selection", "prompts", "computing", "ablation", "nodes",
       leave=("model", "method", "n_edges"), methods=True, given_alone=True)  # fmt: skip
def study(
    file: Annotated[
        Path | None,
        typer.Argument(help="TOML file: options of acdc discover, each a value or a list."),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Tasks or files of pairs, separated by commas.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Models, separated by commas (default: the task's)."),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="Methods, separated by commas (default: acdc).")
    ] = None,
    n_edges: Annotated[
        str | None, typer.Option("--edges", help="Sizes of circuits, separated by commas.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", help="So many, counted up from --seed.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option("--memory", help="GiB for each run's largest working set.")
    ] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict", help="Refuse models that do not do the task.")
    ] = None,
    jobs: opt.Jobs = None,
    executor: opt.Executor = None,
    address: opt.Address = None,
    gpus: opt.Gpus = None,
    as_json: opt.Json = False,
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the study; one that is there goes on.")
    ] = Path("runs") / "study",
    **asked: Any,
) -> None:
    """Run a grid of searches: every run a folder, one table of all, and a page.

    A study that was killed goes on with the same command; what it has stays when the grid grows.

    Example: acdc study --task ioi,docstring --method eap,eap-ig --seeds 5 --edges 300 --jobs 2

    Example: acdc study grid.toml --executor ray --address auto --out runs/grid
    """
    from acdc.errors import OptionError
    from acdc.evidence.study import study as run
    from acdc.pages.study import save_page
    from acdc.terminal.console import TerminalReporter
    from acdc.terminal.study import study_tables

    if file is None and task is None:
        raise OptionError("nothing to run: give a FILE.toml, or --task with names of tasks")
    given = {"task": task, "model": model, "method": method, "n_edges": n_edges}
    lists = {name: _list(name, text) for name, text in given.items() if text is not None}
    own = {"seeds": seeds, "memory": memory, "strict": strict}
    asked |= lists | {name: value for name, value in own.items() if value is not None}
    found = run(
        file or {}, out, jobs=jobs, executor=executor, address=address, gpus=gpus,
        reporter=TerminalReporter(), **asked,
    )  # fmt: skip
    save_page(found)
    answer(
        found.summary,
        lambda: study_tables(found),
        as_json=as_json,
        written=f"written to {out}: results.csv, overlap.csv, study.html, and each run in cells",
    )


def _list(name: str, text: str) -> list[Any]:
    from acdc.errors import OptionError

    try:
        return [_LISTS[name](part.strip()) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"{name} {text!r}: expected whole numbers, as 30,60,120") from None
