"""What tasks share, on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from acdc.evidence.sharing import SharedCircuits
from acdc.terminal.tables import number

__all__ = ["sharing_tables"]

_MOST = 30


def sharing_tables(found: SharedCircuits, *, list_edges: bool = True) -> Iterator[Any]:
    """Yield what :func:`acdc.terminal.console.show` prints: tasks, pairs, nodes, edges."""
    summary = found.summary()
    yield _tasks_table(summary)
    yield _pairs_table(summary)
    together = summary["together"]
    yield (
        f"all tasks together use {together['n_edges']:,} of {together['n_edges_total']:,} edges "
        f"(random circuits of these sizes: {together['n_edges_expected']:,.0f}, at least "
        f"{together['n_edges_low']:,.0f}) and {together['n_nodes']:,} of "
        f"{together['n_nodes_total']:,} nodes"
    )
    yield _nodes_table(found, summary)
    if list_edges:
        beyond = summary["edges_beyond_chance"]
        yield f"edges shared beyond chance: {', '.join(beyond) or 'none'}"


def _tasks_table(summary: dict[str, Any]) -> Table:
    table = _table("circuits of tasks", "edges", "nodes", "edges alone", "random", "faithfulness")
    for task in summary["tasks"]:
        table.add_row(
            escape(task["label"]),
            f"{task['n_edges']:,}",
            f"{task['n_nodes']:,}",
            f"{len(task['edges_alone']):,}",
            f"{task['n_edges_alone_expected']:,.0f}",
            number(task["faithfulness"]),
        )
    return table


def _pairs_table(summary: dict[str, Any]) -> Table:
    title = "edges of two tasks, beside random circuits of the same sizes"
    table = _table(title, "both", "Jaccard", "random", "95 %", "p", "hypergeometric p")
    for pair in summary["pairs"]:
        table.add_row(
            escape(f"{pair['one']}, {pair['other']}"),
            f"{pair['n_common']:,}",
            f"{pair['jaccard']:.2f}",
            f"{pair['expected']:,.1f}",
            f"{pair['high']:,.0f}",
            f"{pair['p']:.2g}",
            f"{pair['p_hypergeometric']:.2g}",
        )
    return table


def _nodes_table(found: SharedCircuits, summary: dict[str, Any]) -> Table:
    nodes, shares = found.found.nodes, found.node_shares
    order = np.lexsort((-shares.max(1), nodes.q, -nodes.counts))
    more = f" (first {_MOST} of {len(order):,})" if len(order) > _MOST else ""
    title = f"nodes: share of each task's circuit that leaves them{more}"
    table = _table(title, *map(escape, found.labels), "q", "")
    beyond = set(summary["nodes_beyond_chance"])
    for i in order[:_MOST]:
        cells = (
            f"{100 * share:.1f} %" if inside else ""
            for share, inside in zip(shares[i], nodes.inside[i], strict=True)
        )
        name = nodes.names[i]
        says = "beyond chance" if name in beyond else ""
        table.add_row(escape(name), *cells, f"{nodes.q[i]:.2g}", says)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table
