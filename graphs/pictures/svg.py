"""Pictures of circuits as parts of a web page, in which a script finds lines and nodes.

Graphviz lays out what :mod:`graphs.pictures.diagram` describes; its SVG is stripped to shapes and
texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from xml.etree import ElementTree

from graphs.graph import Graph
from graphs.pictures.diagram import Caption, Line, diagram
from graphs.pictures.rendering import draw_dot

__all__ = ["Drawing", "to_svg"]

_SVG = "{http://www.w3.org/2000/svg}"
_TOOLTIP = "{http://www.w3.org/1999/xlink}title"
_SHAPES = ("path", "polygon", "polyline", "ellipse", "text")
_ATTRIBUTES = {
    "cx", "cy", "d", "fill", "fill-opacity", "font-size", "font-weight", "points", "rx", "ry",
    "stroke", "stroke-dasharray", "stroke-opacity", "stroke-width", "text-anchor", "x", "y",
}  # fmt: skip
"""What a shape keeps; a ``style`` would be against the policy of the pages."""


@dataclass(frozen=True)
class Drawing:
    """A picture for the body of a page.

    Parameters
    ----------
    svg
        An ``svg`` element.
    nodes
        Names of the nodes on it.
    aspect
        Width over height.
    """

    svg: str
    nodes: tuple[str, ...]
    aspect: float


def to_svg(graph: Graph, lines: Sequence[Line]) -> Drawing:
    """Draw some lines.

    Parameters
    ----------
    graph
        The graph that the lines are of.
    lines
        What is drawn, as for :func:`graphs.pictures.diagram.diagram`.

    Returns
    -------
    Drawing
        In its SVG ``<g class="line" data-line="3">`` is ``lines[3]``, ``<g class="node"
        data-node="a0.h1">`` a node, ``<g class="feed" data-from="a0.kv1" data-to="a0.h2">`` the
        dotted line between a receiver and a node that is computed from it.
    """
    root = ElementTree.fromstring(
        draw_dot(diagram(graph, list(lines), caption=Caption()), "svg").decode()
    )
    index = {
        ", ".join(f"{line.sender}->{receiver}" for receiver in line.receivers): i
        for i, line in enumerate(lines)
    }
    whole = root.find(f"{_SVG}g")
    assert whole is not None
    groups = whole.findall(f"{_SVG}g")
    parts = "".join(_part(group, index) for group in groups)
    box = str(root.get("viewBox"))
    width, height = map(float, box.split()[2:])
    return Drawing(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">'
        f'<g transform="{whole.get("transform")}">{parts}</g></svg>',
        tuple(_title(group) for group in groups if _kind(group) == "node"),
        width / height,
    )


def _title(group: ElementTree.Element) -> str:
    return group.findtext(f"{_SVG}title") or ""


def _kind(group: ElementTree.Element) -> str:
    """``node``, ``edge``, ``cluster``, or ``axis``: the label of a layer."""
    return "axis" if _title(group).startswith("axis") else group.get("class", "")


def _part(group: ElementTree.Element, index: dict[str, int]) -> str:
    """One line, node, label or background of Graphviz's picture."""
    name, shapes = escape(_title(group)), "".join(_shape(one) for one in group.iter())
    kind = _kind(group)
    if kind == "node":
        return f'<g class="node" data-node="{name}" tabindex="0"><title>{name}</title>{shapes}</g>'
    if kind != "edge":
        return f'<g class="{kind}">{shapes}</g>'
    tooltip = next((a.get(_TOOLTIP, "") for a in group.iter(f"{_SVG}a")), "")
    says = f"<title>{escape(tooltip)}</title>"
    edges = tooltip.rpartition(": ")[0]
    if edges in index:
        return f'<g class="line" data-line="{index[edges]}">{says}{shapes}</g>'
    start, end = (escape(part.partition(":")[0]) for part in _title(group).split("->"))
    return f'<g class="feed" data-from="{start}" data-to="{end}">{says}{shapes}</g>'


def _shape(element: ElementTree.Element) -> str:
    tag = element.tag.removeprefix(_SVG)
    if tag not in _SHAPES:
        return ""
    known = "".join(
        f' {name}="{escape(value)}"' for name, value in element.items() if name in _ATTRIBUTES
    )
    return f"<{tag}{known}>{escape(element.text or '')}</{tag}>"
