"""Discovery repeated: over draws, directions, thresholds, groups of prompts and conditions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from acdc.terminal.tables import TOP_EDGES, number, with_interval

if TYPE_CHECKING:
    from acdc.evidence.conditions import Conditions
    from acdc.evidence.directions import BothDirections
    from acdc.evidence.groups import Groups
    from acdc.evidence.sources import Source
    from acdc.evidence.stability import Stability

__all__ = [
    "conditions_tables",
    "directions_tables",
    "frontier_table",
    "groups_tables",
    "stability_tables",
]


def groups_tables(found: Groups, title: str) -> tuple[Table, ...]:
    """Tables of groups of prompts, and of every circuit on every group's fresh prompts."""
    table = Table(title=escape(title), title_justify="left")
    for column in ("group", "prompts", "fresh", "edges", "faithfulness", "such as"):
        table.add_column(column)
    summary = found.summary()
    for place, group in enumerate(summary["groups"]):
        low, high = group["faithfulness_interval"] or (None, None)
        row = group | {"faithfulness_low": low, "faithfulness_high": high}
        table.add_row(
            str(place), f"{group['n_fit']:,}", f"{group['n_test']:,}", f"{group['n_edges']:,}",
            with_interval(row), escape(group["examples"][0]),
        )  # fmt: skip
    if not found.crosses:
        return (table,)
    crosses = Table(title="every circuit on the other groups", title_justify="left")
    for column in (
        "circuit of",
        "prompts of",
        "faithfulness",
        "farther from 1 than theirs",
        "fails",
    ):
        crosses.add_column(column)
    for cross in found.crosses:
        ends = f" [{number(cross.low)}, {number(cross.high)}]"
        less = number(cross.loss) + ("" if cross.loss is None else ends)
        crosses.add_row(
            str(cross.circuit), str(cross.prompts), number(cross.faithfulness), less,
            {True: "yes", False: "no", None: "-"}[cross.fails],
        )  # fmt: skip
    return table, crosses


def directions_tables(found: BothDirections, n: int = 15) -> tuple[Table, Table | str]:
    """Tables of what each direction finds, and of candidates for gates; a line if none is one."""
    edges = found.comparison.edges
    counts = Table(title="edges by direction", title_justify="left", show_header=False)
    for name, some in (
        ("in both", edges.common),
        ("only in noising (candidates for AND)", edges.only_a),
        ("only in denoising (candidates for OR)", edges.only_b),
    ):
        counts.add_row(name, f"{len(some):,}")
    if not found.candidates:
        return counts, "no node reads an edge of one direction alone beside another edge: no gates"
    title = "nodes that may combine their inputs as a gate"
    hidden = len(found.candidates) - n
    gates = Table(title=title + (f" (first {n})" if hidden > 0 else ""), title_justify="left")
    for column in ("receiver", "may be", "found by one direction", "by both"):
        gates.add_column(column)
    for candidate in found.candidates[:n]:
        only, partners = ", ".join(candidate.only), ", ".join(candidate.partners)
        gates.add_row(
            escape(candidate.receiver), candidate.gate, escape(only), escape(partners) or "-"
        )
    return counts, gates


def stability_tables(found: Stability, n: int = TOP_EDGES) -> tuple[Any, ...]:
    """A line, and tables of edges by the runs that kept them and of those kept most often.

    Where more than prompts was varied a table of what the differences come from.
    """
    summary = found.summary()
    n_seeds, what = len(found.seeds), "runs" if found.factors else "seeds"
    said = f"edges over {n_seeds} {what}; two runs share {found.overlap:.1%} (mean Jaccard)"
    counts = Table()
    for column in ("kept in", "edges"):
        counts.add_column(column, justify="right")
    for k, n_edges in summary["n_edges_by_count"].items():
        counts.add_row(f"{k} of {n_seeds} runs", f"{n_edges:,}")
    edges = Table(title="edges kept most often", title_justify="left")
    edges.add_column("edge")
    edges.add_column("runs", justify="right")
    for name, count in list(summary["edges"].items())[:n]:
        edges.add_row(escape(name), f"{count} of {n_seeds}")
    return said, counts, edges, *([_sources_table(found.sources)] if found.sources else [])


def _sources_table(sources: Sequence[Source]) -> Table:
    table = Table(title="what the differences come from", title_justify="left")
    for column in ("source", "levels", "share of the variance", "of the sum of squares", "df"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for source in sources:
        name = "other interactions" if source.name == "rest" else source.name
        table.add_row(
            name, str(source.n_levels or "-"), f"{source.variance:.1%}", f"{source.squares:.1%}",
            str(source.df),
        )  # fmt: skip
    return table


def frontier_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Table of a sweep, one row per threshold."""
    table = Table(title=escape(title), title_justify="left")
    for column in ("threshold", "edges kept", "share", "metric", "faithfulness", "seen"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            number(row["threshold"]),
            f"{row['n_edges_kept']:,}",
            f"{100 * row['n_edges_kept'] / row['n_edges_total']:.1f} %",
            number(row["metric_circuit"]),
            number(row["faithfulness"]),
            number(row["faithfulness_seen"]),
        )
    return table


def conditions_tables(found: Conditions, *, list_edges: bool = True, n: int = 25) -> Iterator[Any]:
    """Yield how circuits under several conditions overlap, and which edges come and go."""
    edges, labels = found.found.edges, found.labels
    numbers = [str(i) for i in range(1, len(labels) + 1)]
    title = f"circuits by condition: {len(edges.common):,} edges in all; numbers: Jaccard of two"
    table = Table(title=title, title_justify="left")
    columns = ("", "condition", "edges", "faithfulness", "seen", "alone", *numbers)
    for column in columns:
        table.add_column(column, justify="left" if column == "condition" else "right")
    for i, (label, run) in enumerate(zip(labels, found.runs, strict=True)):
        values = number(run.faithfulness), number(run.claim.faithfulness_seen)
        alike = [f"{edges.jaccard(i, j):.2f}" for j in range(len(labels))]
        cells = (f"{run.circuit.n_edges:,}", *values, f"{len(edges.only(i)):,}", *alike)
        table.add_row(numbers[i], escape(label), *cells)
    yield table
    if not list_edges:
        return
    yield "edges of all: " + (", ".join(edges.common) or "none")
    moving = {name: at for name, at in edges.members.items() if len(at) < len(labels)}
    order = sorted(moving, key=lambda name: -len(moving[name]))
    more = f" (first {n} of {len(order):,})" if len(order) > n else ""
    come_and_go = Table(title=f"edges that come and go{more}", title_justify="left")
    come_and_go.add_column("edge")
    for column in numbers:
        come_and_go.add_column(column, justify="center")
    for name in order[:n]:
        marks = ("x" if i in moving[name] else "" for i in range(len(labels)))
        come_and_go.add_row(escape(name), *marks)
    yield come_and_go if order else "no edge comes and goes"
