"""Why heads attend, on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from acdc.evidence.head_reasons import HeadReasons
from acdc.evidence.head_words import head_words
from acdc.evidence.heads import Heads

__all__ = ["heads_tables"]


def heads_tables(found: Heads, title: str) -> Iterator[Any]:
    """Yield what was measured on, roles in the whole model, and a table per head."""
    which = "" if found.prompt is None else f"prompt {found.prompt} of "
    yield (
        f"{title}: {which}{found.n_prompts} prompts ({found.task_info['prompts']}), direct effects "
        f"on {found.metric} ({found.metric_value:.3g} on the clean run)"
    )
    if found.prompt is not None:
        yield " ".join(f"p{i}:{token.strip()}" for i, token in enumerate(found.tokens))
    if found.soft_cap:
        yield "the model caps its scores; what is explained is the score before the cap"
    known = [f"{role}: {', '.join(heads)}" for role, heads in found.roles.items() if heads]
    yield "roles by behaviour, of all heads: " + ("; ".join(known) or "none")
    for one in found.heads:
        yield _head(one, found)
    if found.n_left_out:
        yield f"{found.n_left_out} more heads are in the circuit: ask with --head or --max-heads"


def _head(one: HeadReasons, found: Heads) -> Table:
    place = f"largest score {one.strength:.3g}" if one.in_circuit else "not in the circuit"
    table = Table(
        title=f"[bold]{escape(one.head)}[/bold]  {place}",
        title_justify="left", title_style="", show_header=False, box=None, padding=(0, 1),
    )  # fmt: skip
    table.add_column(no_wrap=True, style="dim")
    table.add_column()
    for heading, text in head_words(one, found.metric, found.metric_value):
        table.add_row(heading, escape(text))
    return table
