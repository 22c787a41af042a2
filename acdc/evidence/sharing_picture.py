"""The picture of what tasks share: nodes by task, and how much every two tasks have in common."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["draw"]

MOST_NODES = 60
_DOT = " \u2022"


def draw(summary: Mapping[str, Any], kind: str) -> bytes:
    """Return the picture as SVG or PNG.

    Left: nodes by task, coloured by the share of the task's circuit that leaves a node; a dot
    follows the names of nodes that are shared beyond chance.  Right: Jaccard indices of every two
    tasks' edges, and what random circuits share.

    Parameters
    ----------
    summary
        As of :meth:`acdc.evidence.sharing.SharedCircuits.summary`.
    kind
        ``svg`` or ``png``.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    nodes, labels = _shown(summary), summary["labels"]
    n = len(labels)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "acdc", "font.size": 8}):
        size = (3.2 + 0.95 * n, max(3.2, 1.4 + 0.17 * len(nodes)))
        figure = Figure(figsize=size, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1, 1])
        _draw_nodes(left, nodes, summary)
        _draw_pairs(right, summary)
        together = summary["together"]
        figure.suptitle(
            f"{together['n_edges']:,} of {together['n_edges_total']:,} edges serve a task "
            f"(random: {together['n_edges_expected']:,.0f})",
            fontsize=9,
        )
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def _shown(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Nodes in the order of the graph; of very many those of most tasks, then of most weight."""
    nodes = list(summary["nodes"])
    if len(nodes) <= MOST_NODES:
        return nodes
    order = sorted(nodes, key=lambda row: (-len(row["tasks"]), -max(row["shares"])))
    chosen = {row["name"] for row in order[:MOST_NODES]}
    return [row for row in nodes if row["name"] in chosen]


def _draw_nodes(panel: Any, nodes: list[dict[str, Any]], summary: Mapping[str, Any]) -> None:
    labels = summary["labels"]
    shares = np.array([row["shares"] for row in nodes])
    inside = np.array([[label in row["tasks"] for label in labels] for row in nodes])
    values = np.where(inside, np.sqrt(shares), np.nan)  # the root shows small ones, too
    panel.imshow(values, aspect="auto", cmap="viridis_r", vmin=0, interpolation="nearest")
    beyond = set(summary["nodes_beyond_chance"])
    names = [row["name"] + (_DOT if row["name"] in beyond else "") for row in nodes]
    panel.set_yticks(range(len(nodes)), names)
    panel.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    more = len(summary["nodes"]) - len(nodes)
    left_out = f", {more} more left out" if more else ""
    says = f"nodes: the darker, the more of the circuit\n({_DOT.strip()} beyond chance{left_out})"
    panel.set_title(says, fontsize=8)
    panel.tick_params(length=0)


def _draw_pairs(panel: Any, summary: Mapping[str, Any]) -> None:
    labels = summary["labels"]
    n = len(labels)
    values = np.eye(n)
    for pair in summary["pairs"]:
        i, j = labels.index(pair["one"]), labels.index(pair["other"])
        values[i, j] = values[j, i] = pair["jaccard"]
        text = f"{pair['jaccard']:.2f}\n{pair['n_common']} edges\n(random {pair['expected']:.0f})"
        for at in ((j, i), (i, j)):
            dark = "white" if pair["jaccard"] > 0.5 else "black"
            panel.text(*at, text, ha="center", va="center", fontsize=7, color=dark)
    for i, task in enumerate(summary["tasks"]):
        panel.text(i, i, f"{task['n_edges']}\nedges", ha="center", va="center", color="white")
    panel.imshow(values, cmap="Blues", vmin=0, vmax=1)
    panel.set_xticks(range(n), labels, rotation=45, ha="right")
    panel.set_yticks(range(n), labels)
    panel.set_title("edges of two tasks: Jaccard", fontsize=8)
    panel.tick_params(length=0)
