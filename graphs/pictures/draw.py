"""Pictures of circuits: DOT text, and SVG, PNG or PDF files made from it by Graphviz."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from graphs.circuit import Circuit
from graphs.errors import GraphError, InputError, did_you_mean
from graphs.files.whole import json_text, write_whole
from graphs.pictures.diagram import (
    BLUE,
    GREY,
    VERMILION,
    Caption,
    Line,
    diagram,
    group_edges,
    swatch,
)
from graphs.pictures.rendering import FORMATS, draw_dot
from graphs.select import Mask, prune, select_top

__all__ = ["render", "styled_lines", "to_dot", "to_svg"]

DRAWN_EDGES = 60
"""Edges of a picture that a reader takes in; more on demand."""

MERGE_ABOVE = 220


def to_dot(
    circuit: Circuit,
    *,
    title: str | None = None,
    max_edges: int | None = DRAWN_EDGES,
    highlight: Iterable[str] = (),
) -> str:
    """Return the picture of a circuit as DOT text.

    Layers run from bottom to top.  A line is blue where the edge helps and vermilion where it
    hurts (``circuit.info["helps"]`` is the sign of a score that helps; without it the colour is
    the score's sign), and its width is the score's size; it ends in the q, k or v port of a head.
    Above 220 lines the q, k and v lines from one sender to one head are merged into one, whose
    port then reads ``qk``.

    Parameters
    ----------
    circuit
        What is drawn, pruned: edges on no path from the embeddings to ``logits`` are not shown.
    title
        The bold first line; by default the task and model in ``circuit.info``.  Empty for a
        picture without title and legend.
    max_edges
        Draw at most so many edges (those that :func:`graphs.select_top` gives); None for all.
    highlight
        Names of nodes to give a heavy outline.

    Returns
    -------
    str
        DOT text.  It also holds the edges that are not drawn, so that
        :func:`graphs.read_dot` gives the circuit back exactly.

    Raises
    ------
    GraphError
        If ``highlight`` names a node that the graph does not have.
    """
    graph = circuit.graph
    marked = list(highlight)
    for name in marked:
        if name not in graph.nodes:
            raise GraphError(f"highlight {name!r}: no such node; {did_you_mean(name, graph.nodes)}")
    drawn = _drawn_edges(circuit, max_edges)
    lines = styled_lines(circuit, drawn)
    caption = Caption() if title == "" else _caption(circuit, drawn, title)
    return diagram(
        graph,
        lines,
        caption=caption,
        attributes=_data(circuit, drawn),
        highlight=marked,
    )


def to_svg(circuit: Circuit, **options: Any) -> str:
    """Return the picture of a circuit as SVG text; options as of :func:`to_dot`."""
    return draw_dot(to_dot(circuit, **options), "svg").decode()


def render(
    drawing: Circuit | str, path: str | os.PathLike[str], format: str | None = None, **options: Any
) -> None:
    """Write a picture file.

    The same circuit gives the same bytes on every machine, see :mod:`graphs.pictures.rendering`.

    Parameters
    ----------
    drawing
        A circuit, or DOT text.
    path
        Where the picture goes; written whole or not at all.
    format
        ``svg``, ``png`` or ``pdf``; by default the ending of ``path``.
    **options
        For a circuit: what :func:`to_dot` takes.

    Raises
    ------
    InputError
        If the format is none of these, or Graphviz refuses the text.
    """
    chosen = (Path(path).suffix[1:] if format is None else format).lower()
    if chosen not in FORMATS:
        raise InputError(f"picture format {chosen!r}: expected one of {', '.join(FORMATS)}")
    text = to_dot(drawing, **options) if isinstance(drawing, Circuit) else drawing
    write_whole(path, draw_dot(text, chosen))


def _drawn_edges(circuit: Circuit, max_edges: int | None) -> Mask:
    kept = prune(circuit.graph, circuit.in_circuit)
    if max_edges is None or kept.sum() <= max_edges:
        return kept
    ranked = np.where(kept, np.abs(circuit.scores), -1.0)
    return kept & select_top(circuit.graph, ranked, max_edges, absolute=False)


def _data(circuit: Circuit, drawn: Mask) -> dict[str, str]:
    """Graph attributes that hold what the lines do not: other edges, and the circuit's info."""
    edges = np.flatnonzero(circuit.in_circuit & ~drawn)
    names = circuit.graph.edge_names(edges)
    scores = circuit.scores[edges].tolist()
    undrawn = " ".join(f"{name}={score!r}" for name, score in zip(names, scores, strict=True))
    # Percent signs instead of quotes and backslashes, which DOT would read in its own way.
    info = urllib.parse.quote(json_text(circuit.info), safe=" {}[]:,.+-_") if circuit.info else ""
    return {key: text for key, text in (("undrawn", undrawn), ("info", info)) if text}


def styled_lines(circuit: Circuit, drawn: Mask) -> list[Line]:
    """Return the lines of some edges, coloured by sign and sized by score.

    Parameters
    ----------
    circuit
        Whose scores are shown.
    drawn
        ``[edge]``; above 220 lines those of q, k and v from one sender to one head are merged.
    """
    graph, edges = circuit.graph, np.flatnonzero(drawn)
    groups = group_edges(graph, edges, merge=False)
    if len(groups) > MERGE_ABOVE:
        groups = group_edges(graph, edges, merge=True)
    crowd = float(np.clip(np.sqrt(80 / max(len(groups), 1)), 0.35, 1.0))
    largest = float(np.abs(circuit.scores[edges]).max(initial=0.0))
    uniform = _uniform(circuit, drawn)
    lines = []
    for (sender, node, port), group in groups.items():
        scores = circuit.scores[group]
        strongest = float(scores[np.abs(scores).argmax()])
        size = 0.25 if uniform or largest == 0 else float(np.sqrt(abs(strongest) / largest))
        lines.append(
            Line(
                sender,
                node,
                port,
                tuple(graph.receivers[graph.edge_receiver[e]] for e in group),
                tuple(scores.tolist()),
                color=GREY if uniform else _shade(strongest * (_helps(circuit) or 1), size),
                width=crowd * (0.5 + 3.2 * size),
            )
        )
    return lines


def _uniform(circuit: Circuit, drawn: Mask) -> bool:
    """Whether the drawn scores say nothing: all the same."""
    scores = circuit.scores[drawn]
    return bool(len(scores) == 0 or (scores == scores[0]).all())


def _helps(circuit: Circuit) -> int | None:
    """Sign of the scores of edges that help; 0 where they have none, None where nobody said."""
    says = circuit.info.get("helps")
    return int(says) if says in (-1, 0, 1) else None


def _shade(score: float, size: float) -> str:
    """Blue above 0 and vermilion below, paler for smaller scores."""
    base = BLUE if score > 0 else VERMILION if score < 0 else GREY
    strength = 0.4 + 0.6 * size
    channels = (int(base[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - strength * (255 - c)):02X}" for c in channels)


def _caption(circuit: Circuit, drawn: Mask, title: str | None) -> Caption:
    info, graph = circuit.info, circuit.graph
    named = [str(info[key]) for key in ("task", "model") if info.get(key)]
    kept = int(prune(graph, circuit.in_circuit).sum())
    parts = [f"{circuit.n_edges:,} of {graph.n_edges:,} edges"]
    if kept < circuit.n_edges:
        parts.append(f"{circuit.n_edges - kept:,} on no path not drawn")
    if drawn.sum() < kept:
        parts.append(f"the {int(drawn.sum()):,} strongest drawn")
    parts += [str(info[key]) for key in ("method", "metric") if info.get(key)]
    if isinstance(info.get("faithfulness"), int | float):
        parts.append(f"faithfulness {info['faithfulness']:.3f}")
    return Caption(
        title=" \u00b7 ".join(named) if title is None else title,
        subtitle=" \u00b7 ".join(parts),
        legend=_legend(circuit, drawn),
    )


def _legend(circuit: Circuit, drawn: Mask) -> tuple[str, ...]:
    if _uniform(circuit, drawn):
        return ()
    scores = circuit.scores[drawn]
    widest = f"width: |score|, at most {np.abs(scores).max():.3g}"
    helps = _helps(circuit)
    if helps == 0:
        return (swatch(BLUE, "in the circuit (its score has no sign)"), widest)
    above, below = ("score > 0", "score < 0") if helps is None else ("helps", "hurts")
    signed = scores * (helps or 1)
    entries = []
    if (signed > 0).any():
        entries.append(swatch(BLUE, above))
    if (signed < 0).any():
        entries.append(swatch(VERMILION, below))
    return (*entries, widest)
