"""A study on the terminal: a row for every variant of every task and model, and what failed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from acdc.evidence.study import SECONDS, Study, Variant
from acdc.terminal.tables import number

__all__ = ["study_tables"]

_MOST_FAILURES = 10


def study_tables(found: Study) -> Iterator[Any]:
    """Yield what :func:`acdc.terminal.console.show` prints."""
    n_failed = len(found.failures)
    if n_failed < len(found.rows):
        yield _summary(found)
    if n_failed:
        yield _failures(found)


def _summary(found: Study) -> Table:
    n_done = len(found.rows) - len(found.failures)
    title = f"{n_done:,} of {len(found.rows):,} runs, on the mean"
    table = Table(title=title, title_justify="left")
    several = len({model for _, model in found.groups}) > 1
    for column in ("task", "model", "") if several else ("task", ""):
        table.add_column(column)
    for column in ("runs", "edges", "unseen", "overlap", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for (task, model), rows in found.groups.items():
        for variant in found.same_but_seed(rows):
            models = (Path(model).name,) if several else ()
            words = (Path(task).stem, *models, variant.label)
            table.add_row(*map(escape, words), *_numbers(variant))
    return table


def _numbers(variant: Variant) -> Iterator[str]:
    edges, overlap = variant.mean("n_edges_kept"), variant.overlap(variant)
    yield f"{len(variant.rows):,}"
    yield "-" if edges is None else f"{edges:,.0f}"
    yield number(variant.mean("faithfulness"))
    yield "-" if overlap is None else f"{overlap:.2f}"
    yield f"{sum(variant.mean(name) or 0.0 for name in SECONDS):.3g}"


def _failures(found: Study) -> Table:
    table = Table(title=f"{len(found.failures):,} runs failed", title_justify="left")
    table.add_column("runs", justify="right")
    table.add_column("why")
    reasons = list(found.failures_by_reason.items())
    for why, rows in reasons[:_MOST_FAILURES]:
        name = rows[0].cell.name
        table.add_row(f"{len(rows):,}", escape(f"{why} ({name}{', ...' if rows[1:] else ''})"))
    if len(reasons) > _MOST_FAILURES:
        table.add_row("...", "see results.csv")
    return table
