"""Whether default circuits hold: what a run claims, beside many prompts that it never had.

``acdc discover TASK`` is run with nothing else said, over several seeds.  Each circuit is then
measured on fresh prompts, none of which fit, selected or tested: is its faithfulness there near 1,
and in the interval that the run stated?
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from acdc.measure.evaluation import Evaluator
from acdc.models import MODELS
from acdc.runs.building import load_experiment
from acdc.runs.discover import discover
from acdc.runs.prompts import draw, split_prompts
from acdc.tasks import TASKS
from benchmarks.results import markdown_table, terminal_table, write_results

__all__ = ["FRESH_SEED", "Plan", "Row", "markdown", "measure", "run_table", "write"]

FORMAT, VERSION = "acdc-bench-unseen", 1

FRESH_SEED = 10**15
"""Of the fresh prompts; no run draws from it or from what follows it."""

LOW, HIGH = 0.85, 1.15
"""Between which a default circuit should be."""

_COLUMNS = (
    "task", "seed", "edges", "seen", "claimed", "interval", "fresh", "prompts", "holds",
    "covered", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is run.

    Parameters
    ----------
    tasks
        Built-in ones whose model is bundled.
    method
        Of the search.
    n_seeds
        Runs of each task.
    n_fresh
        Prompts that a circuit is measured on.
    """

    tasks: tuple[str, ...]
    method: str = "acdc"
    n_seeds: int = 5
    n_fresh: int = 1000


@dataclass(frozen=True)
class Row:
    """A run, and its circuit on fresh prompts.

    Parameters
    ----------
    task, seed, method
        Of the run.
    n_edges
        Of its circuit.
    seen, claimed, low, high
        Faithfulness on the prompts it was found on, what the run claims, and its interval; None
        where it claims nothing.
    fresh, n_fresh
        Faithfulness on fresh prompts, and how many there were (a task may have no more).
    seconds
        Of the search.
    warnings
        What the run says against itself.
    """

    task: str
    seed: int
    method: str
    n_edges: int
    seen: float | None
    claimed: float | None
    low: float | None
    high: float | None
    fresh: float | None
    n_fresh: int
    seconds: float
    warnings: tuple[str, ...]

    @property
    def holds(self) -> bool | None:
        """Whether the circuit is about as faithful as the model; None if nothing is claimed."""
        if self.claimed is None or self.fresh is None:
            return None
        return LOW <= self.fresh <= HIGH

    @property
    def covered(self) -> bool | None:
        """Whether the stated interval has the fresh figure."""
        if self.low is None or self.high is None or self.fresh is None:
            return None
        return self.low <= self.fresh <= self.high


def measure(plan: Plan, device: str = "cpu") -> Iterator[Row]:
    """Run every task and seed."""
    for task in plan.tasks:
        for seed in range(plan.n_seeds):
            yield _row(task, seed, plan, device)


def bundled_tasks() -> tuple[str, ...]:
    """Tasks whose own model is at hand."""
    return tuple(name for name, spec in TASKS.items() if spec.model in MODELS)


def _row(task: str, seed: int, plan: Plan, device: str) -> Row:
    run = discover(task, method=plan.method, seed=seed, device=device)
    experiment, tokenizer = load_experiment(run.settings)
    split = split_prompts(run.settings, experiment, tokenizer)
    had = [t for t in (experiment.task, split.select, split.test) if t is not None]
    known = [pair.clean for one in had for pair in one.pairs]
    seeds = iter(range(FRESH_SEED, FRESH_SEED + 100))
    fresh = draw(run.settings, experiment.model, tokenizer, plan.n_fresh, known, seeds)
    value = None
    if fresh is not None:
        value = Evaluator(experiment.on(fresh)).faithfulness(run.circuit.in_circuit)
    low, high = run.claim.interval or (None, None)
    claims = run.faithfulness is not None
    return Row(
        task, seed, plan.method, run.circuit.n_edges, run.claim.faithfulness_seen,
        run.faithfulness, low if claims else None, high if claims else None, value,
        0 if fresh is None else len(fresh), run.timings["discover"], run.claim.warnings,
    )  # fmt: skip


# --- what is written ----------------------------------------------------------------------


def run_table(rows: Sequence[Row]) -> Table:
    """Return the table of the terminal."""
    return terminal_table("default circuits on fresh prompts", _COLUMNS, map(_texts, rows))


def markdown(rows: Sequence[Row], plan: Plan) -> str:
    """Return ``results.md``."""
    lines = [
        "# Default circuits on prompts that their runs never had",
        "",
        f"Made by `acdc bench unseen`: `acdc discover TASK --method {plan.method} --seed S`, "
        "nothing else said; `results.json` has the conditions. Seen: faithfulness on the prompts "
        "that the search saw. Claimed: what the run says, on prompts that nothing was chosen on, "
        "with its 95 % interval. Fresh: on others again. Holds: fresh lies between "
        f"{LOW} and {HIGH}; covered: in the interval. A dash: nothing is claimed.",
        "",
        markdown_table(_COLUMNS, map(_texts, rows)),
        *(f"- {line}" for line in summary(rows)),
        "",
    ]
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> list[str]:
    """One line a task: in how many runs the claim held."""
    lines = []
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        claimed = [row for row in own if row.claimed is not None]
        holds, covered = (
            sum(bool(getattr(r, key)) for r in claimed) for key in ("holds", "covered")
        )
        lines.append(
            f"{task}: {len(claimed)} of {len(own)} runs claim something; {holds} hold, {covered} "
            "are covered."
        )
    return lines


def _texts(row: Row) -> list[str]:
    def said(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    words = {True: "yes", False: "no", None: "-"}
    return [
        row.task, str(row.seed), f"{row.n_edges:,}", said(row.seen), said(row.claimed),
        "-" if row.low is None else f"{said(row.low)} to {said(row.high)}", said(row.fresh),
        f"{row.n_fresh:,}", words[row.holds], words[row.covered], f"{row.seconds:.1f}",
    ]  # fmt: skip


def write(folder: Path, rows: Sequence[Row], plan: Plan, device: str) -> list[str]:
    """Write ``results.json`` and ``results.md``; return their names."""
    head = {"format": FORMAT, "version": VERSION, "plan": asdict(plan)}
    return write_results(folder, head, map(asdict, rows), markdown(rows, plan), device)
