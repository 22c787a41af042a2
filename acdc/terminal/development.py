"""The development of a circuit on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from acdc.evidence.development import BEHAVIOURS, Development
from acdc.terminal.tables import number

__all__ = ["development_tables"]


def development_tables(found: Development) -> Iterator[Any]:
    """Yield what :func:`acdc.terminal.console.show` prints: the task, circuits, heads."""
    summary = found.summary()
    yield _task_table(summary)
    yield _circuits_table(found, summary)
    if any(summary["best_heads"].values()):
        yield _heads_table(found)
    if not all(row["does_task"] for row in summary["checkpoints"]):
        yield "checkpoints that do not do the task have a circuit that is not claimed"


def _task_table(summary: dict[str, Any]) -> Table:
    title = f"{summary['task']} by checkpoint, on {summary['n_prompts']:,} prompts"
    table = _table(title, "does it", "metric", "right", "corrupt", "loss")
    for row in summary["checkpoints"]:
        table.add_row(
            escape(row["label"]),
            "yes" if row["does_task"] else "no",
            number(row["metric"]),
            _percent(row["accuracy"]),
            _percent(row["accuracy_corrupt"]),
            number(row["loss"]),
        )
    return table


def _circuits_table(found: Development, summary: dict[str, Any]) -> Table:
    title = (
        f"circuits, and the final one's {found.final.n_edges:,} edges: overlap (Jaccard, beside "
        "95 % of random ones), faithfulness, and how many come to stay"
    )
    columns = ("edges", "faithful", "overlap", "random", "final's", "born")
    table = _table(title, *columns)
    born = Counter(birth["circuit"] for birth in found.births.values())
    for row in summary["checkpoints"]:
        high = row["jaccard_chance_high"]
        table.add_row(
            escape(row["label"]),
            f"{row['n_edges']:,}",
            number(row["faithfulness"]),
            f"{row['jaccard']:.2f}",
            "-" if high is None else f"{high:.2f}",
            number(row["faithfulness_of_final"]),
            f"{born[row['label']]:,}" if row["does_task"] else "-",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left")
    table.add_column("checkpoint")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _heads_table(found: Development) -> Table:
    behaviours = [name for name in BEHAVIOURS if found.best_heads(name)]
    table = _table("best head of every behaviour, and its attention", *behaviours)
    best = [found.best_heads(name) for name in behaviours]
    for label, *heads in zip(found.labels, *best, strict=True):
        table.add_row(escape(label), *(f"{head} {score:.2f}" for head, score in heads))
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
