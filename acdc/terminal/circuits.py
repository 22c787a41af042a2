"""Circuits beside one another, or beside a reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from acdc.terminal.tables import number

if TYPE_CHECKING:
    from acdc.evidence.bases import SizeAt
    from acdc.evidence.comparison import Cost
    from graphs.known.bases import BasesComparison, Shared
    from graphs.known.chance import AtChance, Chance
    from graphs.known.compare import Comparison, Overlap, ReferenceComparison
    from graphs.known.reference import Reference

__all__ = ["bases_tables", "comparison_table", "reference_table", "roles_table"]

_TOP_REFINED, _TOP_OWN = 15, 4

_COUNTED = {"": "", "spans": ", by span", "joined": ", spans joined"}
"""Ends of titles: how a circuit split by positions was compared."""


def comparison_table(
    comparison: Comparison, labels: tuple[str, str], chance: AtChance | None = None
) -> Table:
    """Table of the overlap of two circuits, in edges and nodes, and of random circuits' overlap."""
    end = _COUNTED["joined" if comparison.joined else ""]
    counts = ("both", "only 1st", "only 2nd")
    table = _overlaps_table(f"{labels[0]} against {labels[1]}{end}", counts, chance)
    table.add_row("edges", *_overlap_cells(comparison.edges))
    _add_chance(table, None if chance is None else chance.edges)
    table.add_row("nodes", *_overlap_cells(comparison.nodes))
    _add_chance(table, None if chance is None else chance.nodes)
    return table


def _overlaps_table(title: str, counts: Sequence[str], chance: AtChance | None) -> Table:
    table = Table(title=escape(title), title_justify="left", caption_justify="left")
    for column in ("", *counts, "precision", "recall", "F1", "Jaccard"):
        table.add_column(column, justify="right" if column else "left")
    if chance is not None:
        table.caption = (
            f"random: mean of {chance.n_circuits:,} random circuits of {chance.n_edges:,} edges; "
            "95 %: what as many of them do not exceed"
        )
    return table


def _add_chance(table: Table, chances: Mapping[str, Chance] | None) -> None:
    """Add rows of what random circuits get, if it is known."""
    if chances is not None:
        means, highs = ([f"{x:.3f}" for x in some] for some in zip(
            *((c.mean, c.high) for c in chances.values()), strict=True
        ))  # fmt: skip
        table.add_row("  random", "", "", "", *means, style="dim")
        table.add_row("  95 %", "", "", "", *highs, style="dim")


def bases_tables(
    comparison: BasesComparison,
    sizes: Sequence[SizeAt] | None,
    costs: Sequence[Cost],
    labels: Sequence[str],
    *,
    list_edges: bool = True,
) -> Iterator[Any]:
    """Yield tables of circuits over different bases.

    Parameters
    ----------
    comparison
        In component form.
    sizes
        At equal faithfulness, one of each; None for circuits that are no runs.
    costs
        What finding them took.
    labels
        What to call them.
    list_edges
        Also list what refines what, and the component edges of one alone.
    """
    circuits = comparison.circuits
    table = Table(title=escape(" against ".join(labels)), title_justify="left")
    for column in ("", *labels):
        table.add_column(escape(column))
    rows: dict[str, list[str]] = {
        "basis": [x.basis for x in circuits],
        "edges": [f"{x.n_edges:,}" for x in circuits],
        "nodes": [f"{x.n_nodes:,}, {x.n_latents:,} of them latents" for x in circuits],
        "components": [f"{len(x.components):,}" for x in circuits],
        "component edges": [f"{len(x.edges):,}" for x in circuits],
        "of them by error nodes alone": [f"{len(x.by_errors):,}" for x in circuits],
        "edges in component edges of all": [f"{len(x.shared):,}" for x in circuits],
        "edges outside them": [f"{len(x.other):,}" for x in circuits],
    }
    if sizes is not None:
        level = f"{sizes[0].level:g}"
        rows[f"edges for faithfulness {level}"] = [
            f"{s.n_edges:,} of {s.n_edges_total:,} ({number(s.faithfulness)})" for s in sizes
        ]
        rows[f"nodes for faithfulness {level}"] = [
            f"{s.n_nodes:,} of {s.n_nodes_total:,} ({s.ranking} ranking)" for s in sizes
        ]
    rows["found by"] = [cost.method for cost in costs]
    rows["seconds"] = ["" if c.seconds is None else f"{c.seconds:.3g}" for c in costs]
    rows["forward passes of a prompt"] = [
        "" if c.forwards is None else f"{c.forwards:,}" for c in costs
    ]
    for name, cells in rows.items():
        table.add_row(name, *map(escape, cells))
    yield table
    if sizes is None:
        yield "sizes at equal faithfulness: give the folders of runs"
    shared = {"components": comparison.components, "component edges": comparison.edges}
    for name, names in shared.items():
        yield _shared_table(name, names, labels)
    if list_edges:
        yield "components of all: " + (", ".join(comparison.components.common) or "none")
        yield _refinements_table(comparison, labels)
        for i, label in enumerate(labels):
            only = comparison.edges.only(i)
            yield f"component edges only in {label}: " + (", ".join(only) or "none")


def _shared_table(name: str, names: Shared, labels: Sequence[str]) -> Table:
    """How many names two circuits share, as a share of those of either."""
    title = f"{name}: {len(names.common):,} in all, Jaccard index of two"
    table = Table(title=title, title_justify="left")
    for column in ("", *labels, "in it alone"):
        table.add_column(escape(column), justify="right" if column else "left")
    for i, label in enumerate(labels):
        cells = [number(names.jaccard(i, j)) for j in range(len(labels))]
        table.add_row(escape(label), *cells, f"{len(names.only(i)):,}")
    return table


def _refinements_table(comparison: BasesComparison, labels: Sequence[str]) -> Table:
    """Component edges of all, those with the most own edges first."""
    edges = [x.edges for x in comparison.circuits]
    shared = sorted(comparison.edges.common, key=lambda edge: -sum(len(x[edge]) for x in edges))
    more = len(shared) - _TOP_REFINED
    title = "what refines the component edges of all" + (f" ({more:,} more)" if more > 0 else "")
    table = Table(title=title, title_justify="left")
    for column in ("component edge", *labels):
        table.add_column(escape(column))
    for edge in shared[:_TOP_REFINED]:
        table.add_row(escape(edge), *(escape(_own_edges(x[edge])) for x in edges))
    return table


def _own_edges(names: Sequence[str]) -> str:
    more = len(names) - _TOP_OWN
    return ", ".join(names[:_TOP_OWN]) + (f", {more:,} more" if more > 0 else "")


def reference_table(
    comparison: ReferenceComparison,
    reference: Reference,
    label: str,
    chance: AtChance | None = None,
) -> Table:
    """Table of what a circuit found of a reference, in edges and in nodes (heads and MLPs).

    Of a circuit split by positions it says whether they were compared per span, or joined.  Below
    each row stands what random circuits of the same size get.
    """
    title = f"{label} against the reference {reference.name} ({reference.model})"
    title += _COUNTED[comparison.positions]
    table = _overlaps_table(title, ("found", "extra", "missed"), chance)
    what = "node pairs" if reference.granularity == "node pairs" else "edges"
    if comparison.edges is not None:
        table.add_row(what, *_overlap_cells(comparison.edges))
        _add_chance(table, None if chance is None else chance.edges)
    table.add_row("nodes", *_overlap_cells(comparison.nodes))
    _add_chance(table, None if chance is None else chance.nodes)
    return table


def roles_table(
    comparison: ReferenceComparison, chosen: Sequence[str] = (), chance: AtChance | None = None
) -> Table:
    """Table of the nodes found and missed by role, of all roles or of those chosen.

    ``random``: how many a random circuit has on the mean, and which share of them has as many.
    """
    table = Table(title="by role", title_justify="left")
    columns = ["role", "found", "found nodes", "missed nodes"]
    if chance is not None:
        columns[2:2] = ["random", "as many"]
    for column in columns:
        table.add_column(column, no_wrap=column in ("role", "found", "random"))
    for role, count in comparison.roles.items():
        if not chosen or role in chosen:
            names = (", ".join(count.found) or "-", ", ".join(count.missed) or "-")
            cells = [escape(role), str(count), *names]
            if chance is not None:
                by_chance = chance.roles[role]
                cells[2:2] = [f"{by_chance.mean:.1f}", f"{by_chance.as_good:.0%}"]
            table.add_row(*cells)
    return table


def _overlap_cells(overlap: Overlap) -> list[str]:
    counts = (overlap.common, overlap.only_a, overlap.only_b)
    ratios = (overlap.precision, overlap.recall, overlap.f1, overlap.jaccard)
    return [str(len(c)) for c in counts] + [f"{r:.3f}" for r in ratios]
