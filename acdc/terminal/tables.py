"""Tables of a run, and how numbers are written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from graphs import Circuit

__all__ = ["TOP_EDGES", "edges_table", "number", "run_table", "with_interval"]

TOP_EDGES = 10
"""Edges that are listed where nothing else is asked for."""


def number(value: float | None) -> str:
    """Four significant digits, or a dash for None."""
    return "-" if value is None else f"{value:.4g}"


def run_table(summary: dict[str, Any], title: str) -> Table:
    """Table of the content of a ``run.json``."""
    table = Table(title=escape(title), show_header=False, title_justify="left")
    kept, total = summary["n_edges_kept"], summary["n_edges_total"]
    share = f" ({100 * kept / total:.1f} %)" if total else ""
    over = f" over {summary['mean_over']}" if summary.get("mean_over") is not None else ""
    ablation = f"{summary['direction']}, {summary['intervention']} ablation{over}"
    if summary.get("positions", "none") != "none":
        share += f", split by {summary['positions']}"
    rows = {
        "model": summary["model"],
        "task": f"{summary['task']}, {summary['n_prompts']} prompt pairs, seed {summary['seed']}",
        "method": f"{summary['method']} ({ablation})",
        "metric": summary["metric"],
        "edges kept": f"{kept:,} of {total:,}{share}",
        "metric: full, circuit, empty": ", ".join(
            number(summary[f"metric_{which}"]) for which in ("full", "circuit", "empty")
        ),
        "faithfulness": _faithfulness(summary),
    }
    mixtures = summary.get("mixtures")
    if isinstance(mixtures, dict):
        rows["router of experts"] = mixtures["router"]
    norms = summary.get("faithfulness_by_norms")
    if norms is not None:
        rows["faithfulness: norms frozen, live"] = ", ".join(
            number(norms[which]) for which in ("frozen", "live")
        )
    if "faithfulness_seen" in summary:
        rows["faithfulness, prompts seen"] = number(summary["faithfulness_seen"])
    if summary.get("saes") is not None:
        rows["dictionaries"] = summary["saes"]
    prompts = summary.get("prompts")
    if isinstance(prompts, dict):
        rows["prompts"] = ", ".join(f"{n:,} to {what}" for what, n in prompts.items() if n)
    elif prompts is not None:
        rows["prompts"] = prompts
    rows |= _latent_rows(summary.get("latents"))
    if summary.get("audit") is not None:
        rows["untested"] = _untested(summary["audit"])
    if summary.get("threshold") is not None:
        rows["threshold"] = number(summary["threshold"])
    if "timings" in summary:
        rows["seconds"] = ", ".join(f"{k} {v:.1f}" for k, v in summary["timings"].items())
    for name, value in rows.items():
        table.add_row(name, escape(str(value)))
    return table


def _latent_rows(latents: dict[str, Any] | None) -> dict[str, str]:
    """Rows about latents, none where there are none."""
    if latents is None:
        return {}
    errors = latents["error_nodes"]
    which = ("with_errors", "without_errors")
    return {
        "latents": f"{latents['n_kept']:,} of {latents['n_active']:,} active are nodes "
        f"({100 * latents['folded_share']:.1f} % of attribution folded)",
        "faithfulness: error nodes in, out": ", ".join(number(errors[w]) for w in which),
        "complement: error nodes in, out": ", ".join(
            number(errors[f"complement_{w}"]) for w in which
        ),
    }


def _untested(audit: dict[str, Any]) -> str:
    """How many edges eap-acdc skipped, and what that may have missed (the worse of two ways)."""
    ways = [audit[way] for way in ("taken_out", "put_back")]
    reach = max(way["n_at_least_tau"] for way in ways)
    at_most = max(way["n_at_least_tau_in_all"] for way in ways)
    return (
        f"{audit['n_skipped']:,} edges; of {audit['n_sampled']:,} sampled {reach:,} reach the "
        f"threshold alone, at most {at_most:,} of all do ({audit['confidence']:.0%} confidence)"
    )


def _faithfulness(summary: dict[str, Any]) -> str:
    """What is claimed of a run's circuit, or that nothing is; of an evaluation as it is."""
    ends = summary.get("faithfulness_interval")
    if ends is None:
        return with_interval(summary)
    said = f"{number(summary['faithfulness'])} (95 % interval {' to '.join(map(number, ends))})"
    return f"{said}, {summary['prompts']['test']:,} unseen prompts"


def with_interval(row: dict[str, Any]) -> str:
    """Faithfulness, with its interval where there is one."""
    said = number(row["faithfulness"])
    if row.get("faithfulness_low") is None:
        return said
    ends = (number(row[f"faithfulness_{end}"]) for end in ("low", "high"))
    return f"{said} (95 % interval {' to '.join(ends)})"


def edges_table(circuit: Circuit, n: int = TOP_EDGES) -> Table | str:
    """Table of the circuit's edges with the largest absolute scores; a line if it has none."""
    inside = np.flatnonzero(circuit.in_circuit)
    if not len(inside):
        return (
            "no edge was kept: those that the selection allows form no path from the embeddings "
            "to the logits; allow more --edges, or lower --threshold"
        )
    order = inside[np.argsort(-np.abs(circuit.scores[inside]), kind="stable")][:n]
    table = Table(title="most important edges", title_justify="left")
    table.add_column("edge")
    table.add_column("score", justify="right")
    for edge in order:
        name = circuit.graph.edge_name(int(edge))
        table.add_row(escape(name), f"{circuit.scores[edge]:+.4g}")
    return table
