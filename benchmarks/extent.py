"""Thousands of prompts, and prompts of thousands of tokens: what they take beside the weights.

Each figure is of a process of its own, on a random GPT-2: the most that it held (``VmHWM``) less
what it held before the computation began, and the CPU seconds of user and system.  More prompts are
the same 500 again and again, so that ``acdc`` has the same decisions before it, and its time has to
grow as their number does.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from acdc.engine.allocator import keep_large_pieces_apart
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.work import Work
from acdc.errors import UnknownNameError
from acdc.methods import METHODS
from acdc.runs.forecast import batch_size_of, foresee
from acdc.settings import Settings
from acdc.tasks import Task
from benchmarks.memory import process_bytes
from benchmarks.results import markdown_table, terminal_table, write_results
from benchmarks.subjects import Size, random_model, random_task

__all__ = ["Plan", "Row", "markdown", "measure", "run_table", "write"]

FORMAT, VERSION = "acdc-bench-extent", 1

_DISTINCT = 500
"""Prompts that differ."""
_SHORT = Size(n_layers=4, d_model=128, n_heads=2, d_vocab=1000, n_ctx=32, n_pos=12)
_LONG = Size(n_ctx=4096)


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Parameters
    ----------
    prompts
        How many, of 12 tokens, for a model of 4 layers and width 128.
    tokens
        Of two prompts each, for a model as GPT-2 small.
    methods
        Searches, by name; UnknownNameError if there is none of it.
    threshold, long_threshold
        Tau of ``acdc`` on many and on long prompts; of the latter a single decision takes seconds,
        so that it is to take everything out.
    memory
        GiB beside the weights.
    """

    prompts: tuple[int, ...] = (2500, 5000, 10_000)
    tokens: tuple[int, ...] = ()
    methods: tuple[str, ...] = ("eap", "acdc")
    threshold: float = 2e-5
    long_threshold: float = 1e3
    memory: float = 2.0

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                raise UnknownNameError("method", name, sorted(METHODS))

    @property
    def sizes(self) -> Iterator[Size]:
        """Models and prompts."""
        for n in self.prompts:
            yield replace(_SHORT, n_prompts=n)
        for n in self.tokens:
            yield replace(_LONG, n_prompts=2, n_pos=n, n_ctx=max(n, _LONG.n_ctx))


@dataclass(frozen=True)
class Row:
    """One search.

    Parameters
    ----------
    method, model, n_prompts, n_pos
        What was run on what.
    allowed, foretold, measured
        Bytes beside the weights: ``--memory``, what the forecast says, and the peak.
    user_seconds, system_seconds
        Of the CPU.
    is_streamed
        Whether the state lay in files.
    n_evaluations, n_kept, n_edges
        Scenarios of ``acdc``, edges that it kept, and all; None for other methods.
    """

    method: str
    model: str
    n_prompts: int
    n_pos: int
    allowed: int
    foretold: int
    measured: int
    user_seconds: float
    system_seconds: float
    is_streamed: bool
    n_evaluations: int | None = None
    n_kept: int | None = None
    n_edges: int | None = None

    @property
    def milliseconds(self) -> float:
        """Of the CPU, for each prompt."""
        return 1000 * (self.user_seconds + self.system_seconds) / self.n_prompts


def measure(plan: Plan) -> Iterator[Row]:
    """Yield a row for each method and number of prompts or tokens."""
    for method in plan.methods:
        for size in plan.sizes:
            asked: dict[str, Any] = {"method": method, "size": asdict(size)}
            is_long = size.n_pos != _SHORT.n_pos
            threshold = plan.long_threshold if is_long else plan.threshold
            asked |= {"threshold": threshold, "memory": int(plan.memory * 2**30)}
            code = "import sys; from benchmarks.extent import child; child(sys.argv[1])"
            done = subprocess.run(
                [sys.executable, "-c", code, json.dumps(asked)],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            yield Row(**json.loads(done.stdout.splitlines()[-1]))


def child(asked: str) -> None:
    """Measure one search in a process of its own, and print it as JSON."""
    keep_large_pieces_apart()  # as the command line does
    torch.set_num_threads(1)
    plain = json.loads(asked)
    size, method, memory = Size(**plain["size"]), METHODS[plain["method"]], plain["memory"]
    with random_model(size, "cpu") as model:
        experiment = Experiment(model, repeated_task(size), get_metric("logit_diff"), memory=memory)
    taus: dict[str, Any] = (
        {"threshold": plain["threshold"]} if method.keeps_state else {"n_edges": 50}
    )
    settings = Settings.of("random", method=method.name, **taus)
    lengths = [size.n_pos] * size.n_prompts
    forecast = foresee(experiment.footprint, lengths, settings, method, memory)
    experiment = experiment.in_batches_of(batch_size_of(forecast, settings, lengths))
    before, started = process_bytes("VmRSS"), resource.getrusage(resource.RUSAGE_SELF)
    found = _search(experiment, method, settings, memory)
    ended = resource.getrusage(resource.RUSAGE_SELF)
    row: dict[str, Any] = {
        "method": method.name, "model": size.name, "n_prompts": size.n_prompts,
        "n_pos": size.n_pos, "allowed": memory, "foretold": forecast.peak - forecast.weights,
        "measured": process_bytes("VmHWM") - before,
        "user_seconds": ended.ru_utime - started.ru_utime,
        "system_seconds": ended.ru_stime - started.ru_stime,
        "is_streamed": forecast.is_streamed, **found,
    }  # fmt: skip
    print(json.dumps(row))


def repeated_task(size: Size) -> Task:
    """Return random pairs, from some number on the same again."""
    task = random_task(replace(size, n_prompts=min(size.n_prompts, _DISTINCT)))
    times = -(-size.n_prompts // len(task.pairs))
    return replace(task, pairs=(task.pairs * times)[: size.n_prompts])


def _search(experiment: Experiment, method: Any, settings: Settings, memory: int) -> dict[str, Any]:
    """Run a search; say what became of it where that is asked."""
    if not method.keeps_state:
        method.scores(experiment, None, Work(memory))
        return {}
    found = method.search(experiment, settings, Work(memory))
    circuit = found.circuit
    n_evaluations = found.details["work"]["n_evaluations"]
    return {
        "n_evaluations": n_evaluations, "n_kept": circuit.n_edges, "n_edges": circuit.graph.n_edges
    }  # fmt: skip


_COLUMNS = (
    "method", "model", "prompts", "tokens", "memory", "foretold", "measured", "state", "user s",
    "system s", "ms a prompt", "scenarios", "edges kept",
)  # fmt: skip


def run_table(rows: Sequence[Row]) -> Table:
    """Return the rows as a table."""
    return terminal_table("beside the weights, MiB", _COLUMNS, map(_cells, rows), n_texts=2)


def markdown(rows: Sequence[Row], plan: Plan) -> str:
    """Return ``extent.md``."""
    return (
        f"## Many prompts, long prompts\n\n{__doc__}\n"
        "MiB beside the weights: what `--memory` allows, what is foretold (of the search, the "
        "evaluation that follows it, which is not measured here, and the 64 MiB of code and lists "
        "that a process takes besides), the peak measured of the search. `acdc` with the logit "
        f"difference and tau {plan.threshold:g}; on long prompts {plan.long_threshold:g}, where "
        "everything is taken out and nothing comes to the state. Written by `acdc bench memory "
        f"--prompts` and `--tokens`.\n\n{markdown_table(_COLUMNS, map(_cells, rows))}"
    )


def _cells(row: Row) -> list[str]:
    mib = [f"{n / 2**20:,.0f}" for n in (row.allowed, row.foretold, row.measured)]
    circuit = ["", ""] if row.n_kept is None else [f"{row.n_evaluations}", _share(row)]
    state = "" if row.n_kept is None else "in files" if row.is_streamed else "in memory"
    return [
        row.method, row.model, f"{row.n_prompts:,}", f"{row.n_pos:,}", *mib, state,
        f"{row.user_seconds:.1f}", f"{row.system_seconds:.1f}", f"{row.milliseconds:.1f}", *circuit,
    ]  # fmt: skip


def _share(row: Row) -> str:
    return f"{row.n_kept} of {row.n_edges}"


def write(folder: Path, rows: Sequence[Row], plan: Plan) -> list[str]:
    """Write ``extent.json`` and ``extent.md``; return their names."""
    head = {"format": FORMAT, "version": VERSION, "plan": asdict(plan)}
    text = markdown(rows, plan)
    return write_results(folder, head, map(asdict, rows), text, "cpu", name="extent")
