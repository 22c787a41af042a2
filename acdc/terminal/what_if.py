"""What the model says before and after, on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from acdc.evidence.what_if import Looked, WhatIf
from acdc.tasks.texts import visible
from acdc.terminal.tables import number

__all__ = ["what_if_parts"]


def what_if_parts(found: WhatIf, title: str) -> Iterator[Any]:
    """Yield what :func:`acdc.terminal.console.show` prints, part by part."""
    yield f"{title}: {'; '.join(found.actions)}"
    yield (
        f"{found.about['metric']} on {found.n_prompts:,} prompts of the task, "
        f"{found.about['prompts']}: {number(found.metric_before)} before, "
        f"{number(found.metric_after)} after"
    )
    for one in found.looked:
        yield from _prompt(one)


def _prompt(one: Looked) -> Iterator[Any]:
    yield ""
    yield f"prompt: {visible(one.prompt)}"
    if one.corrupt is not None:
        yield f"corrupt: {visible(one.corrupt)}"
    table = Table(title_justify="left", caption_justify="left")
    table.add_column("next token", no_wrap=True)
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    table.caption = f"KL of after from before: {one.divergence:.3g} nats"
    for row in one.tokens:
        change = 100 * (row.after - row.before)
        table.add_row(
            escape(repr(visible(row.text))), _percent(row.before), _percent(row.after),
            f"{change:+.1f}",
        )  # fmt: skip
    yield table
    if one.before is not None and one.after is not None:
        yield f"text before: {visible(one.before)}"
        yield f"text after:  {visible(one.after)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
