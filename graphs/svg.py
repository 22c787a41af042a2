"""Pictures of circuits as parts of a web page, in which a script finds lines and nodes.

Graphviz lays out what :mod:`graphs.diagram` describes; its SVG is stripped to shapes and texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from xml.etree import ElementTree

from graphs.diagram import Caption, Line, diagram
from graphs.draw import draw_dot
from graphs.graph import Graph

__all__ = ["to_svg"]

_SVG = "{http://www.w3.org/2000/svg}"
_TOOLTIP = "{http://www.w3.org/1999/xlink}title"
_SHAPES = ("path", "polygon", "polyline", "ellipse", "text")


def to_svg(graph: Graph, lines: Sequence[Line]) -> str:
    """Return the picture of some lines as an ``svg`` element for the body of a page.

    Parameters
    ----------
    graph
        The graph that the lines are of.
    lines
        What is drawn, as for :func:`graphs.diagram.diagram`.

    Returns
    -------
    str
        ``<g class="line" data-line="3">`` is ``lines[3]``, ``<g class="node"
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
    parts = [_part(group, index) for group in whole.findall(f"{_SVG}g")]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{root.get("viewBox")}">'
        f'<g transform="{whole.get("transform")}">{"".join(parts)}</g></svg>'
    )


def _part(group: ElementTree.Element, index: dict[str, int]) -> str:
    """One line, node or label of Graphviz's picture."""
    name = group.findtext(f"{_SVG}title") or ""
    tooltip = next((a.get(_TOOLTIP, "") for a in group.iter(f"{_SVG}a")), "")
    shapes = "".join(_shape(one) for one in group.iter())
    if group.get("class") == "edge":
        edges = tooltip.rpartition(": ")[0]
        if edges in index:
            return (
                f'<g class="line" data-line="{index[edges]}"><title>{escape(tooltip)}</title>'
                f"{shapes}</g>"
            )
        ends = (end.partition(":")[0] for end in name.split("->"))
        start, end = map(escape, ends)
        return f'<g class="feed" data-from="{start}" data-to="{end}">{shapes}</g>'
    if name.startswith("axis"):
        return f'<g class="axis">{shapes}</g>'
    shown = escape(name)
    return f'<g class="node" data-node="{shown}" tabindex="0"><title>{shown}</title>{shapes}</g>'


def _shape(element: ElementTree.Element) -> str:
    tag = element.tag.removeprefix(_SVG)
    if tag not in _SHAPES:
        return ""
    known = "".join(
        f' {name}="{escape(value)}"'
        for name, value in element.items()
        if name != "font-family" and not name.startswith("{")  # xml:space, of another namespace
    )
    return f"<{tag}{known}>{escape(element.text or '')}</{tag}>"
