"""``acdc bench``: nothing heavy is imported before a command runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from acdc.cli import options as opt
from acdc.cli.inputs import to_resources

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["app"]

TABLE_WIDTH = 190
"""Columns that the table takes; narrower terminals wrap its lines."""

app = typer.Typer(no_args_is_help=True, help="Measure how fast and how right this package is.")


@app.callback()
def bench() -> None:
    """Measure how fast and how right this package is.

    Example: acdc bench speed --quick --out speed.json
    """


@app.command()
def speed(
    quick: Annotated[
        bool, typer.Option("--quick", help="Toy sizes: seconds, for trying the benchmark.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="JSON file to write.")] = Path("runs")
    / "speed.json",
    layers: Annotated[
        str | None, typer.Option("--layers", help="Layers of the growing models: 4,12,24.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N or mps.")] = "cpu",
    peers: Annotated[
        Path | None,
        typer.Option("--peers", help="Rows of other packages, from benchmarks/peers.sh."),
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option("--before", help="Compare with this worktree; --out: a folder."),
    ] = None,
    parts: Annotated[
        str,
        typer.Option("--parts", help="Of --before: bundled, growth, acdc, MODEL:TASK:METRIC:TAU."),
    ] = "bundled,growth,acdc",
) -> None:
    """Time ACDC and attribution as multiples of the model's own passes.

    Example: acdc bench speed --out speed.json

    Example: acdc bench speed --before ../old --parts bundled,language-small:pronoun:kl:0.0005
    """
    if before is not None:
        _compare(before, _names(parts) or [], device, quick, out)
        return
    from acdc.terminal.console import SafeConsole, say
    from benchmarks.speed import Plan, Row, measure, read_peers, run_table, write

    sizes = () if layers is None else (_layers(layers),)
    plan = (Plan.quick if quick else Plan.full)(*sizes)
    others = read_peers(peers) if peers is not None else []
    rows = list[Row]()
    for row in measure(plan, device):
        rows.append(row)
        line = f"{row.group}: {row.model}, {row.method}: {row.ratio:.3g} x {row.unit}"
        say(line, stderr=True)
    rows += others
    write(out, rows, device, plan)
    console = SafeConsole()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(run_table(rows))
    say(f"written to {out}")


@app.command()
def cuda(
    quick: Annotated[
        bool, typer.Option("--quick", help="Toy sizes: seconds, for trying the benchmark.")
    ] = False,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            help="Measure this one; repeat it (default: every CUDA device, and all as one).",
        ),
    ] = None,
    offloaded: Annotated[
        list[str] | None,
        typer.Option(
            "--offloaded",
            help="Measure this one with weights in the host's memory; repeat it (default: the "
            "first CUDA device).",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write (default: runs/cuda).")
    ] = None,
) -> None:
    """Compare GPUs with the CPU: the same answers, in which time and memory, in which precision.

    On a bare machine: benchmarks/cuda.sh installs wheels that were carried along, and runs this.

    Example: acdc bench cuda --out cuda

    Example: acdc bench cuda --device cuda:0 --device cuda:0,cuda:1 --out cuda

    Example: acdc bench cuda --quick --device cpu
    """
    from acdc.terminal.console import say
    from benchmarks.cuda import Plan, Row, cuda_devices, measure, run_table, write
    from benchmarks.results import check_folder

    devices = device or ([] if offloaded else cuda_devices())
    offloaded = offloaded or ([] if device else devices[:1])
    folder, plan = check_folder(out or Path("runs") / "cuda"), Plan.quick() if quick else Plan()
    rows = list[Row]()
    for row in measure(plan, devices, offloaded):
        rows.append(row)
        say(f"{row.what} on {row.device} in {row.dtype}: {row.seconds:.3g} s", stderr=True)
    _show(run_table(rows), folder, write(folder, rows, plan, [*devices, *offloaded][0]))


@app.command()
def accuracy(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small graphs, few thresholds, no trained masks.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder to write (default: runs/accuracy, or runs/accuracy-quick)."
        ),
    ] = None,
    models: Annotated[
        str | None, typer.Option("--models", help="Only these, as tracr-reverse,ioi-small.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Only these, as acdc,eap-ig.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N or mps.")] = "cpu",
    jobs: opt.Jobs = None,
    executor: opt.Executor = None,
    address: opt.Address = None,
    gpus: opt.Gpus = None,
    readme: Annotated[
        Path | None,
        typer.Option("--readme", help="Put the table between the markers of this file, too."),
    ] = None,
) -> None:
    """Compare every method with every known circuit; resumes where it was stopped.

    Writes results.json after each method and model, then results.md and ROC plots. What is in the
    folder already, from the same settings, versions and files, is not measured again.

    Example: acdc bench accuracy --quick --out accuracy
    """
    from acdc.terminal.console import say
    from benchmarks.accuracy import Plan, Table, measure
    from benchmarks.accuracy_report import check_readme, run_table, update_readme, write_report

    if readme is not None:
        check_readme(readme)
    plan = (Plan.quick if quick else Plan.full)().only(_names(models), _names(methods))
    folder = out or Path("runs") / ("accuracy-quick" if quick else "accuracy")
    table = Table(folder)
    resources = to_resources(executor, jobs, address, gpus)
    for cell in measure(plan, table, device, resources):
        say(f"{cell['subject']}, {cell['method']}: {cell['seconds']:.1f} s", stderr=True)
    cells = list(table.cells.values())
    files = write_report(cells, folder)
    if readme is not None:
        update_readme(cells, readme)
    _show(run_table(cells), folder, ["results.json", *files])


@app.command()
def calibration(
    quick: Annotated[
        bool, typer.Option("--quick", help="Few samples: under a minute, for trying it.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder to write (default: runs/calibration, or runs/calibration-quick)."
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N or mps.")] = "cpu",
) -> None:
    """Count how often the tests of `acdc evaluate` reject what is true, and what is false.

    Example: acdc bench calibration --quick --out calibration
    """
    from acdc.terminal.console import say
    from benchmarks.calibration import Row, measure, run_table, write
    from benchmarks.calibration_scenes import Plan
    from benchmarks.results import check_folder

    folder = check_folder(out or Path("runs") / ("calibration-quick" if quick else "calibration"))
    plan, rows = (Plan.quick if quick else Plan)(), list[Row]()
    for row in measure(plan, device):
        rows.append(row)
        say(f"{row.test}, {row.subject}: {row.says}: {row.share:.1%}", stderr=True)
    _show(run_table(rows), folder, write(folder, rows, plan, device))


@app.command()
def unseen(
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Only these, as ioi,pronoun.")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="See acdc list methods.")] = "acdc",
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of each task.", min=1)] = 5,
    prompts: Annotated[
        int, typer.Option("--n-fresh", help="Prompts that circuits are measured on.", min=2)
    ] = 1000,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write (default: runs/unseen).")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N or mps.")] = "cpu",
) -> None:
    """Measure default circuits on prompts that their runs never had.

    Example: acdc bench unseen --tasks ioi --seeds 2 --out unseen
    """
    from acdc.methods import METHODS
    from acdc.terminal.console import say
    from benchmarks.results import check_folder
    from benchmarks.unseen import Plan, Row, bundled_tasks, measure, run_table, write

    folder, rows = check_folder(out or Path("runs") / "unseen"), list[Row]()
    plan = Plan(tuple(_names(tasks) or bundled_tasks()), METHODS[method].name, seeds, prompts)
    for row in measure(plan, device):
        rows.append(row)
        say(f"{row.task}, seed {row.seed}: {row.seconds:.1f} s", stderr=True)
    _show(run_table(rows), folder, write(folder, rows, plan, device))


@app.command()
def areas(
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Only these, as ioi,pronoun.")
    ] = None,
    ways: Annotated[
        str | None, typer.Option("--ways", help="Only these, as relp,eap-ig + milp.")
    ] = None,
    fit: Annotated[int, typer.Option("--n-fit", help="Prompts that scores see.", min=2)] = 64,
    test: Annotated[int, typer.Option("--n-test", help="Unseen prompts.", min=2)] = 256,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write (default: runs/areas).")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N or mps.")] = "cpu",
) -> None:
    """Measure CPR and CMD of methods, ensembles and selections on prompts that scores never saw.

    Example: acdc bench areas --tasks ioi --ways eap-ig,relp --out areas
    """
    from acdc.terminal.console import say
    from benchmarks.areas import WAYS, Plan, Row, measure, run_table, write
    from benchmarks.results import check_folder
    from benchmarks.unseen import bundled_tasks

    folder, rows = check_folder(out or Path("runs") / "areas"), list[Row]()
    chosen = tuple(_names(ways) or WAYS)
    plan = Plan(tuple(_names(tasks) or bundled_tasks()), chosen, fit, test)
    for row in measure(plan, device):
        rows.append(row)
        say(f"{row.task}, {row.way}: {row.seconds:.1f} s", stderr=True)
    _show(run_table(rows), folder, write(folder, rows, plan, device))


@app.command()
def memory(
    sizes: Annotated[
        str | None, typer.Option("--sizes", help="Billions of parameters, as 0.1,0.4,1.2.")
    ] = None,
    arithmetic: Annotated[
        str | None, typer.Option("--arithmetic", help="Only these, as float32,bfloat16.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Times each is timed.", min=0)] = 3,
    acdc: Annotated[
        bool,
        typer.Option("--acdc", help="Time ACDC's search for 100 edges, too: minutes to hours."),
    ] = False,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", help="Numbers of prompts of 12 tokens, as 2500,5000,10000."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Tokens of two prompts each, as 1000,2000.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="With --prompts or --tokens: these (default: eap,acdc)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write (default: runs/memory).")
    ] = None,
) -> None:
    """Compare the memory that is foretold of a search with what it takes, on random Llamas.

    With --prompts or --tokens: of many or long prompts, on random GPT-2s, with their time.

    Example: acdc bench memory --sizes 0.1 --repeats 0 --out memory

    Example: acdc bench memory --prompts 2500,5000,10000 --out memory
    """
    if prompts is not None or tokens is not None:
        _extent(_counts("prompts", prompts), _counts("tokens", tokens), _names(methods), out)
        return
    from acdc.terminal.console import say
    from benchmarks.memory import Plan, Row, measure, run_table, write
    from benchmarks.results import check_folder

    folder, rows, usual = check_folder(out or Path("runs") / "memory"), list[Row](), Plan()
    chosen = tuple(_names(sizes) or usual.sizes), tuple(_names(arithmetic) or usual.arithmetics)
    plan = Plan(*chosen, repeats=repeats, acdc=acdc)
    for row in measure(plan):
        rows.append(row)
        say(f"{row.model} billion, {row.arithmetic}, {row.what}", stderr=True)
        write(folder, rows, plan)
    _show(run_table(rows), folder, write(folder, rows, plan))


def _extent(
    prompts: tuple[int, ...], tokens: tuple[int, ...], methods: list[str] | None, out: Path | None
) -> None:
    """Measure many prompts, and long ones."""
    from acdc.terminal.console import say
    from benchmarks.extent import Plan, Row, measure, run_table, write
    from benchmarks.results import check_folder

    folder, rows = check_folder(out or Path("runs") / "memory"), list[Row]()
    plan = Plan(prompts, tokens, tuple(methods or Plan.methods))
    for row in measure(plan):
        rows.append(row)
        say(f"{row.method}: {row.n_prompts:,} prompts of {row.n_pos:,} tokens", stderr=True)
        write(folder, rows, plan)
    _show(run_table(rows), folder, write(folder, rows, plan))


def _compare(before: Path, parts: list[str], device: str, quick: bool, out: Path) -> None:
    """Measure two worktrees in turn."""
    from acdc.terminal.console import say
    from benchmarks.before import Pair, compare, table, write
    from benchmarks.results import check_folder

    folder, pairs, files = check_folder(out.with_suffix("")), list[Pair](), list[str]()
    for part, found in compare(before, parts, device, quick=quick):
        pairs += found
        times = ", ".join(f"{pair.now.method} {pair.times:.2f}" for pair in found)
        say(f"{part}: times faster: {times}", stderr=True)
        files = write(folder, pairs, device)  # a run that is stopped leaves what it has measured
    _show(table(pairs), folder, files)


def _show(table: Table, folder: Path, files: Sequence[str]) -> None:
    """Print a wide table, and what was written."""
    from acdc.terminal.console import SafeConsole, say

    console = SafeConsole()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(table)
    say(f"written to {folder}: {', '.join(files)}")


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",")]


def _counts(name: str, text: str | None) -> tuple[int, ...]:
    """Read ``2500,5000``; nothing where it is not given."""
    parts = [] if text is None else text.split(",")
    if not all(re.fullmatch(r" *0*[1-9][0-9]{0,6} *", part) for part in parts):
        raise typer.BadParameter(
            f"{name} {text!r}: expected numbers from 1 to 9999999, as 1000,2000"
        )
    return tuple(int(part) for part in parts)


def _layers(text: str) -> tuple[int, ...]:
    """Read ``4,12,24``."""
    parts = text.split(",")
    if not all(re.fullmatch(r" *0*[1-9][0-9]{0,2} *", part) for part in parts):
        raise typer.BadParameter(f"layers {text!r}: expected numbers from 1 to 999, as 4,12,24")
    return tuple(int(part) for part in parts)


if __name__ == "__main__":
    app()
