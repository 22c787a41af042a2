"""What is left of a model, on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from acdc.evidence.circuit_model import CircuitModel
from acdc.terminal.tables import number

__all__ = ["circuit_model_parts"]


def circuit_model_parts(found: CircuitModel) -> Iterator[Any]:
    """Yield what :func:`acdc.terminal.console.show` prints of a model that was written."""
    n, about = len(found.kept) + len(found.replaced), found.about
    table = Table(title=f"written to {escape(str(found.folder))}", title_justify="left",
                  caption_justify="left")  # fmt: skip
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("heads and MLPs", f"{n:,}", f"{len(found.kept):,}")
    table.add_row("parameters in use", f"{found.n_parameters:,}", f"{found.n_left:,}")
    table.add_row(
        escape(f"{about['metric']}, task"), number(found.metric_before), number(found.metric_after)
    )
    table.add_row("loss, ordinary text", number(found.loss_before), number(found.loss_after))
    table.caption = (
        f"{found.n_bytes:,} bytes, what is gone being zeros or {about['intervention']} constants; "
        f"loss in nats over {found.n_tokens:,} tokens of {escape(about['text'])}; as the run with "
        f"these nodes ablated to {found.difference:.1g}"
    )
    yield table
    yield (
        f"All edges between the nodes left stay; with the circuit's edges alone, others ablated by "
        f"{about['intervention']}, {about['metric']} is {number(found.metric_circuit)}"
    )
