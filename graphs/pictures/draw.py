"""Pictures of circuits: DOT text, and SVG, PNG or PDF files made from it by Graphviz."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
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
from graphs.pictures.simplify import Simplified, simplify
from graphs.select import Mask, prune

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
    Where there are more lines than asked for, the q, k and v lines from one sender to one head
    are merged into one, whose port then reads ``qk``; then nodes of a layer that read and are read
    alike are drawn as one; and only then the weakest edges are left out
    (:mod:`graphs.pictures.simplify`).  Above 220 lines q, k and v are merged anyway.

    Parameters
    ----------
    circuit
        What is drawn.  Edges on no path from the embeddings to ``logits`` are dotted, and left out
        where other edges are, too.
    title
        The bold first line; by default the task and model in ``circuit.info``.  Empty for a
        picture without title and legend.
    max_edges
        Draw at most so many lines; None for all edges, each as it is.
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
    kept = prune(graph, circuit.in_circuit)
    shown = simplify(circuit, kept, max_edges)
    lines = styled_lines(circuit, shown.mask, merge=shown.merge, stands_for=shown.stands_for)
    loose = _on_no_path(circuit, kept, shown, max_edges)
    caption = Caption() if title == "" else _caption(circuit, kept, shown, loose, lines, title)
    written = {f"{line.sender}->{v}" for line in lines if not line.senders for v in line.receivers}
    return diagram(
        graph,
        [*lines, *(replace(line, **_LOOSE) for line in styled_lines(circuit, loose))],
        caption=caption,
        attributes=_data(circuit, circuit.graph.edge_mask(written) | loose),
        highlight=marked,
        groups=shown.groups,
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


_LOOSE: dict[str, Any] = {"style": "dotted", "color": GREY, "width": 0.9}
"""How lines of edges on no path look."""


def _on_no_path(circuit: Circuit, kept: Mask, shown: Simplified, most: int | None) -> Mask:
    """Edges on no path, if the picture has all others and room for them; none otherwise."""
    loose = circuit.in_circuit & ~kept
    room = most is None or int(circuit.in_circuit.sum()) <= most
    fits = room and bool((shown.mask == kept).all()) and not circuit.graph.shape.spans
    return loose if fits else np.zeros_like(loose)


def _data(circuit: Circuit, drawn: Mask) -> dict[str, str]:
    """Graph attributes that hold what the lines do not: other edges, and the circuit's info."""
    edges = np.flatnonzero(circuit.in_circuit & ~drawn)
    names = circuit.graph.edge_names(edges)
    scores = circuit.scores[edges].tolist()
    undrawn = " ".join(f"{name}={score!r}" for name, score in zip(names, scores, strict=True))
    # Percent signs instead of quotes and backslashes, which DOT would read in its own way.
    info = urllib.parse.quote(json_text(circuit.info), safe=" {}[]:,.+-_") if circuit.info else ""
    return {key: text for key, text in (("undrawn", undrawn), ("info", info)) if text}


def styled_lines(
    circuit: Circuit,
    drawn: Mask,
    *,
    merge: bool = False,
    stands_for: Mapping[str, str] | None = None,
) -> list[Line]:
    """Return the lines of some edges, coloured by sign and sized by score.

    Parameters
    ----------
    circuit
        Whose scores are shown.
    drawn
        ``[edge]``.
    merge
        Whether those of q, k and v from one sender to one head are one; above 220 they are.
    stands_for
        Nodes that are drawn as another one.
    """
    graph, edges = circuit.graph, np.flatnonzero(drawn)
    groups = group_edges(graph, edges, merge=merge, stands_for=stands_for)
    if len(groups) > MERGE_ABOVE:
        groups = group_edges(graph, edges, merge=True, stands_for=stands_for)
    joined = {*(stands_for or {}), *(stands_for or {}).values()}
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
                senders=tuple(graph.senders[graph.edge_sender[e]] for e in group)
                if joined & {sender, node}
                else (),
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


def _caption(
    circuit: Circuit,
    kept: Mask,
    shown: Simplified,
    loose: Mask,
    lines: Sequence[Line],
    title: str | None,
) -> Caption:
    info, graph = circuit.info, circuit.graph
    named = [str(info[key]) for key in ("task", "model") if info.get(key)]
    n_kept, n_drawn = int(kept.sum()), int(shown.mask.sum())
    parts = [f"{circuit.n_edges:,} of {graph.n_edges:,} edges"]
    if n_kept < circuit.n_edges:
        how = "dotted" if loose.any() else "not drawn"
        parts.append(f"{circuit.n_edges - n_kept:,} on no path {how}")
    if n_drawn < n_kept:
        parts.append(f"the {n_drawn:,} strongest drawn, {n_kept - n_drawn:,} left out")
    parts += [str(info[key]) for key in ("method", "metric") if info.get(key)]
    if isinstance(info.get("faithfulness"), int | float):
        parts.append(f"faithfulness {info['faithfulness']:.3f}")
    legend = list(_legend(circuit, shown.mask))
    widths = () if _uniform(circuit, shown.mask) else _widths(circuit, shown.mask, lines)
    if len({round(width) for width, _ in widths}) == 1:  # strokes too thin to be told apart
        legend.append(f"width: |score|, at most {widths[0][1]}")
        widths = ()
    if graph.shape.spans:
        legend.append("pale: only read here, by a later column")
    if shown.groups:
        legend.append("several names: nodes that read and are read alike; a line: of at least one")
    if loose.any():
        legend.append(swatch(GREY, "on no path", "\u00b7 \u00b7 \u00b7"))
    return Caption(
        title=" \u00b7 ".join(named) if title is None else title,
        subtitle=" \u00b7 ".join(parts),
        legend=tuple(legend),
        widths=widths,
    )


def _widths(circuit: Circuit, drawn: Mask, lines: Sequence[Line]) -> tuple[tuple[float, str], ...]:
    """Three widths of the legend: of the largest score, a quarter and a sixteenth of it."""
    largest = float(np.abs(circuit.scores[drawn]).max())
    widest = max(line.width for line in lines)
    narrow = widest * 0.5 / 3.7  # the width of a score of 0
    shares = (1.0, 0.25, 0.0625)
    return tuple(
        (narrow + (widest - narrow) * share**0.5, f"{float(f'{largest * share:.2g}'):,g}")
        for share in shares
    )


def _legend(circuit: Circuit, drawn: Mask) -> tuple[str, ...]:
    if _uniform(circuit, drawn):
        return ()
    scores = circuit.scores[drawn]
    helps = _helps(circuit)
    if helps == 0:
        return (swatch(BLUE, "in the circuit (its score has no sign)"),)
    above, below = ("score > 0", "score < 0") if helps is None else ("helps", "hurts")
    signed = scores * (helps or 1)
    entries = []
    if (signed > 0).any():
        entries.append(swatch(BLUE, above))
    if (signed < 0).any():
        entries.append(swatch(VERMILION, below))
    return tuple(entries)
