"""Circuits of two models on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from acdc.evidence.matching import Matched

__all__ = ["matching_tables"]


def matching_tables(found: Matched, *, list_edges: bool = True) -> Iterator[Any]:
    """Yield what :func:`acdc.terminal.console.show` prints: pairs of nodes, the rest, edges."""
    one, other = found.labels
    yield f"1st: {one}; 2nd: {other}"
    title = "nodes that do the same: distance from 0 to 1, and in which respect it is largest"
    table = Table(title=title, title_justify="left")
    for column in ("1st", "2nd", "role"):
        table.add_column(column)
    for column in ("distance", "next best", "largest"):
        table.add_column(column, justify="right")
    for pair in found.pairs:
        respect = max(pair.parts, key=lambda name: pair.parts[name])
        table.add_row(
            escape(pair.one),
            escape(pair.other),
            escape(", ".join(pair.roles)),
            f"{pair.distance:.3f}",
            "-" if pair.next_best is None else f"{pair.next_best:.3f}",
            f"{respect} {pair.parts[respect]:.2f}",
        )
    yield table
    for which, names in zip(("1st", "2nd"), found.unmatched, strict=True):
        yield f"nodes of the {which} alone: {', '.join(names) or 'none'}"
    random = "" if found.expected is None else f" (random matchings: {found.expected:.1f}"
    random += "" if found.p is None else f", p {found.p:.2g})"
    only = [len(names) for names in found.only]
    yield (
        f"edges between matched nodes: {len(found.common):,} in both{random}, {only[0]:,} in the "
        f"1st alone, {only[1]:,} in the 2nd alone; {found.loose[0]:,} and {found.loose[1]:,} more "
        "touch a node without a partner"
    )
    if list_edges:
        yield f"in both, by the 1st's names: {', '.join(found.common) or 'none'}"
