"""Diagrams in DOT: nodes on one rank per layer, lines that end in q, k and v ports.

:mod:`graphs.pictures.draw` and :mod:`graphs.known.compare` decide which lines there are and how
they look; this module places them.  All colours are from Okabe and Ito's colour-blind-safe palette.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from graphs.graph import Graph, parse_node, shape_to_config
from graphs.pictures.layout import PORT_WIDTH, Placement, place, place_by_span
from graphs.sites import parse_latent, sites_to_text
from graphs.spans import split_span

__all__ = [
    "BLUE",
    "GREY",
    "VERMILION",
    "Caption",
    "Line",
    "diagram",
    "group_edges",
    "plain",
    "swatch",
]

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#5F5F5F"
OPENING = "digraph circuit {"
FONT = "DejaVu Sans,Verdana,sans-serif"  # the drawn one (see rendering), and one as wide
HEAD_FILL, MLP_FILL, END_FILL, KV_FILL = "#FBF3CF", "#D5EEE4", "#E6E6E6", "#F6F6F6"
CUT_FILL, ERROR_FILL = "#E3DDF1", "#EDEDED"
LATENT_FILL = {"a": HEAD_FILL, "m": MLP_FILL, "r": CUT_FILL, "rmid": CUT_FILL}
OUTLINE, HIGHLIGHT, AXIS, PALE, BAND = "#6B6B6B", "#000000", "#8A8A8A", "#C4C4C4", "#F3F4F6"
HEADING = 22  # points over the highest node of a band
PORT_FILL = {"q": "#E3B4D1", "k": "#A5D8F3", "v": "#F3C77A"}
MERGED_FILL = "#D9D9D9"
CROWDED, DENSE = 40, 250  # lines, above which another layout is used
_WIDEST = 14  # latents side by side
_MOST_NAMES, _NAMES_IN_ROW = 9, 3  # of nodes that are drawn as one
_MOST_FEEDS = 300  # lines from components to their latents, above which they are left out

_KV = re.compile(r"a(\d+)\.kv(\d+)")
_PORT = re.compile(r"<([qkv])>")


@dataclass(frozen=True)
class Line:
    """One drawn line: edges from one sender that end in one port.

    Parameters
    ----------
    sender, node
        Names of the drawn nodes at the two ends.
    port
        ``q``, ``k``, ``v``, a merged ``qk``, or empty where the node has no ports.
    receivers, scores
        The edges that the line stands for.
    color, width, style
        How it looks; styles are Graphviz's ``solid``, ``dashed`` and ``dotted``.
    senders
        Of each edge, where the line joins groups of nodes; such a line is no part of what is read
        back.
    """

    sender: str
    node: str
    port: str
    receivers: tuple[str, ...]
    scores: tuple[float, ...]
    color: str = GREY
    width: float = 1.0
    style: str = "solid"
    senders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Caption:
    """Text over the picture: a bold title, a plain line, and legend entries in DOT's HTML.

    ``widths`` are of strokes in the legend, with what a line of that width says.
    """

    title: str = ""
    subtitle: str = ""
    legend: tuple[str, ...] = ()
    widths: tuple[tuple[float, str], ...] = ()


@dataclass
class _Row:
    """One rank of the picture: its label on the left and the nodes on it."""

    label: str
    nodes: list[str] = field(default_factory=list)


def group_edges(
    graph: Graph,
    edges: Iterable[int],
    *,
    merge: bool,
    stands_for: Mapping[str, str] | None = None,
) -> dict[tuple, list[int]]:
    """Group edge indices into lines, keyed by ``(sender, node, port)``.

    With ``merge``, the q, k and v edges from one sender to one head become one line.
    ``stands_for`` names nodes that are drawn as another one.
    """
    lines: dict[tuple, list[int]] = {}
    drawn_as = stands_for or {}
    for edge in edges:
        name = graph.receivers[graph.edge_receiver[edge]]
        sender, node = graph.senders[graph.edge_sender[edge]], _PORT.sub("", name)
        sender, node = drawn_as.get(sender, sender), drawn_as.get(node, node)
        lines.setdefault((sender, node, "" if merge else _port(name)), []).append(int(edge))
    if not merge:
        return lines
    return {
        (
            sender,
            node,
            "".join(sorted({*map(_port, _receivers(graph, group))}, key="qkv".find)),
        ): group
        for (sender, node, _), group in lines.items()
    }


def diagram(
    graph: Graph,
    lines: list[Line],
    *,
    caption: Caption,
    attributes: Mapping[str, str] | None = None,
    highlight: Iterable[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Return the DOT text of a picture.

    Parameters
    ----------
    graph
        The graph that the lines are of.
    lines
        What is drawn; nodes that no line touches are left out, but for the embeddings and
        ``logits``.
    caption
        What stands over the picture.
    attributes
        Further graph attributes to write, as text.
    highlight
        Names of nodes with a heavy outline.
    groups
        Nodes that are drawn as one: the first of them, which lines name, -> all of them.

    Returns
    -------
    str
        A digraph that ``dot`` lays out with layers from bottom to top.  Every line carries its
        ``receiver`` and ``score`` (lists separated by spaces) as attributes.
    """
    ports = _ports(lines)
    rows = _rows(graph, lines)
    together = dict(groups or {})
    fed = _fed_heads(graph, lines, together)
    if len(fed) > _MOST_FEEDS:
        fed = [pair for pair in fed if _is_kv(pair[0]) or _is_move(*pair)]
    marked, senders = set(highlight), {line.sender for line in lines}
    placement = None
    if graph.shape.spans or len(lines) > DENSE:
        placement = _placement(rows, lines, ports, graph.shape.spans)
    if any(_is_move(*pair) for pair in fed) and caption.title:
        moves = swatch(AXIS, "keys and values read at another span", "- - \u25b8")
        caption = replace(caption, legend=(*caption.legend, moves))
    if any(not _is_move(*pair) for pair in fed) and caption.title:
        fed_by = swatch(AXIS, "what it reads feeds", "\u00b7 \u00b7 \u00b7")
        caption = replace(caption, legend=(*caption.legend, fed_by))
    text = [OPENING]
    text += _graph_settings(graph, len(lines), placement, caption, attributes or {})
    text += _axis(rows, placement)
    text += _bands(placement)
    text += _stripes(rows, placement)
    for i, row in enumerate(rows):
        text.append(f"  {{ rank=same; axis{i};")
        text += [
            f"    {_node(name, look, placement)}"
            for name in row.nodes
            for look in [
                _Look(
                    ports.get(name, ()),
                    name in senders,
                    bool(marked & {name, *together.get(name, ())}),
                    tuple(together.get(name, (name,))),
                )
            ]
        ]
        text.append("  }")
    text += [_edge(line, placement, len(lines)) for line in lines]
    text += [_feed(kv, head, placement) for kv, head in fed]
    return "\n".join([*text, "}", ""])


def plain(text: str) -> str:
    """Escape text for a DOT HTML label; characters that XML forbids become spaces."""
    return html.escape("".join(c if c.isprintable() else " " for c in text))


def swatch(color: str, text: str, stroke: str = "\u2014") -> str:
    """Return a legend entry: a stroke of a colour, then what it means."""
    return f'<FONT COLOR="{color}"><B>{stroke}</B></FONT> {plain(text)}'


def _port(receiver: str) -> str:
    match = _PORT.search(receiver)
    return match[1] if match else ""


def _receivers(graph: Graph, edges: Iterable[int]) -> list[str]:
    return [graph.receivers[graph.edge_receiver[e]] for e in edges]


def _ports(lines: list[Line]) -> dict[str, tuple[str, ...]]:
    """Ports in use at each node, in the order q, k, v."""
    used: dict[str, set[str]] = {}
    for line in lines:
        if line.port:
            used.setdefault(line.node, set()).add(line.port)
    order = ["q", "qk", "qv", "qkv", "k", "kv", "v"]
    return {node: tuple(sorted(names, key=order.index)) for node, names in used.items()}


def _fed_heads(
    graph: Graph, lines: list[Line], groups: Mapping[str, Sequence[str]]
) -> list[tuple[str, str]]:
    """Pairs of a drawn node and another drawn one, a sender, that it feeds.

    The first are shared key-value heads, heads, MLPs and cuts that feed latents, and heads at the
    span of their keys and values, which feed themselves at the spans that read them.
    """
    senders = {line.sender for line in lines}
    drawn_as = {name: first for first, names in groups.items() for name in names}
    pairs: dict[tuple[str, str], None] = {}
    for line in sorted(lines, key=lambda line: _place(line.node)):
        for receiver in line.receivers:
            nodes = (graph.nodes[i] for i in graph.fed_by(graph.receiver_index[receiver]))
            fed = (drawn_as.get(name, name) for name in nodes)
            pairs |= {(line.node, name): None for name in fed if name in senders - {line.node}}
    return list(pairs)


def _is_kv(name: str) -> bool:
    return _KV.fullmatch(split_span(name)[0]) is not None


def _is_move(node: str, fed: str) -> bool:
    return split_span(node)[1] != split_span(fed)[1]


def _place(name: str) -> tuple[int, int, int]:
    """Sort key of a drawn node: layer, kind within the layer, number."""
    name, _ = split_span(name)
    if match := _KV.fullmatch(name):
        return int(match[1]), 0, int(match[2])
    if latent := parse_latent(name):
        kind, where, layer, number = latent
        row = _CUT_ROW[where] if kind == "cut" else _LATENT_ROW[where]
        return layer, row, number if number >= 0 else 10**9
    kind, layer, head = parse_node(name)
    return {
        "input": (-1, 0, 0 if name != "pos" else 1),
        "head": (layer, 1, head),
        "mlp": (layer, 5, 0),
        "logits": (10**9, 0, 0),
    }[kind]


_CUT_ROW = {"r": -2, "rmid": 3}
_LATENT_ROW = {"r": -1, "a": 2, "rmid": 4, "m": 6}
"""Rows of a layer; between them stand key-value heads (0), heads (1) and the MLP (5)."""


def _rows(graph: Graph, lines: list[Line]) -> list[_Row]:
    """Ranks from bottom to top, each with its nodes; layers without a node have none."""
    names = {line.sender for line in lines} | {line.node for line in lines}
    sources = [s for s, source in zip(graph.nodes, graph.source, strict=True) if source]
    if not graph.shape.spans:
        names |= {"logits", *sources}
    elif not names:
        end = f"@{graph.shape.scored_spans[-1]}"
        names = {f"logits{end}", *(s for s in sources if s.endswith(end))}
    rows: dict[tuple[int, int], list[_Row]] = {}
    labelled: set[int] = set()
    for name in sorted(names, key=_place):
        layer, kind, _ = _place(name)
        ranks = rows.setdefault((layer, kind), [])
        if not ranks or (kind in _LATENT_ROW.values() and len(ranks[-1].nodes) == _WIDEST):
            known = layer in labelled or not 0 <= layer < graph.shape.n_layers
            ranks.append(_Row("" if known else f"layer {layer}"))
            labelled.add(layer)
        ranks[-1].nodes.append(name)
    return [row for ranks in rows.values() for row in ranks]


def _placement(
    rows: list[_Row],
    lines: list[Line],
    ports: Mapping[str, tuple[str, ...]],
    spans: Sequence[str],
) -> Placement:
    names = [name for row in rows for name in row.nodes]
    spine = frozenset(name for name in names if _in_spine(name))
    links = [(line.sender, line.node) for line in lines]
    if spans:
        return place_by_span([row.nodes for row in rows], spine, ports, links, spans)
    return place([row.nodes for row in rows], spine, ports, links)


def _in_spine(name: str) -> bool:
    """Whether a node stands in the column: all but heads and latents."""
    latent = parse_latent(name)
    return name[0] != "a" if latent is None else latent[0] == "cut"


def _graph_settings(
    graph: Graph,
    n_lines: int,
    placement: Placement | None,
    caption: Caption,
    attributes: Mapping[str, str],
) -> list[str]:
    crowded = n_lines > CROWDED
    settings = {
        "rankdir": "BT",
        "outputorder": "edgesfirst",
        "nodesep": "0.05" if crowded else "0.16",
        "ranksep": "0.6" if crowded else "0.5",
        "pad": "0.15",
        "bgcolor": "white",
        "fontname": FONT,
        "labelloc": "t",
    }
    if placement is not None:
        above = placement.top + 62 + (HEADING if placement.bands else 0)
        above += 14 if caption.widths else 0
        settings |= {"layout": "nop2", "lp": f"{placement.middle:.0f},{above:.0f}"}
    for key, value in shape_to_config(graph.shape).items():
        settings[key] = str(value).lower() if isinstance(value, bool) else str(value)
    if graph.shape.sites:
        settings["sites"] = sites_to_text(graph.shape.sites)
    settings |= attributes
    listed = [f"    {key}={_quoted(value)}" for key, value in settings.items()]
    return [
        "  graph [",
        ",\n".join([*listed, f"    label={_caption(caption)}"]),
        "  ];",
        f'  node [fontname="{FONT}", fontsize=11, shape=plain, color="{OUTLINE}"];',
        f'  edge [fontname="{FONT}", fontsize=8, arrowsize=0.45, arrowhead=normal];',
    ]


def _quoted(text: str) -> str:
    """Quote text without quotes in it; Graphviz takes at most 16,384 characters at a time."""
    pieces = [text[i : i + 8_000] for i in range(0, len(text), 8_000)] or [""]
    return " + ".join(f'"{piece}"' for piece in pieces)


def _caption(caption: Caption) -> str:
    rows = []
    if caption.title:
        rows.append(f'<FONT POINT-SIZE="13"><B>{plain(caption.title)}</B></FONT>')
    if caption.subtitle:
        rows.append(f'<FONT POINT-SIZE="10">{plain(caption.subtitle)}</FONT>')
    if caption.legend:
        rows.append(f'<FONT POINT-SIZE="9">{"&#160;&#160; ".join(caption.legend)}</FONT>')
    if caption.widths:
        rows.append(_widths(caption.widths))
    if not rows:
        return '""'
    cells = "".join(f"<TR><TD>{row}</TD></TR>" for row in rows)
    return f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="1" CELLPADDING="1">{cells}</TABLE>>'


def _widths(widths: Sequence[tuple[float, str]]) -> str:
    """Strokes as wide as lines are, each with what it says."""
    cells = "".join(
        f'<TD><TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0"><TR><TD WIDTH="26" '
        f'HEIGHT="{max(1, round(width))}" FIXEDSIZE="TRUE" BGCOLOR="{AXIS}"></TD></TR></TABLE></TD>'
        f'<TD ALIGN="LEFT"><FONT POINT-SIZE="9">{plain(says)}&#160;&#160;</FONT></TD>'
        for width, says in widths
    )
    return (
        '<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="2" CELLPADDING="0"><TR>'
        f'<TD><FONT POINT-SIZE="9">|score|&#160;</FONT></TD>{cells}</TR></TABLE>'
    )


def _axis(rows: list[_Row], placement: Placement | None) -> list[str]:
    """Layer labels; an invisible chain of them keeps the ranks in order."""
    text = []
    for i, row in enumerate(rows):
        at = ""
        if placement is not None:
            at = f', pos="{placement.left:.1f},{placement.centre[row.nodes[0]][1]:.1f}"'
        text.append(
            f'  axis{i} [label="{row.label}", shape=plaintext, fontsize=9, fontcolor="{AXIS}", '
            f'width=0.5, height=0.1, margin=0, group="axis"{at}];'
        )
    if placement is not None:
        return text
    chain = " -> ".join(f"axis{i}" for i in range(len(rows)))
    return [*text, f"  {chain} [style=invis, weight=100];"]


def _bands(placement: Placement | None) -> list[str]:
    """A pale box behind each span, headed by its name."""
    text = []
    for i, band in enumerate(placement.bands if placement else ()):
        assert placement is not None
        middle, top = (band.left + band.right) / 2, placement.top + 34
        text.append(
            f'  subgraph cluster_span{i} {{ graph [bb="{band.left:.1f},-30,{band.right:.1f},'
            f'{top + HEADING:.1f}", label="{band.span}", lp="{middle:.1f},{top + 10:.1f}", '
            f'fontsize=12, style="filled,rounded", color="{BAND}", fillcolor="{BAND}"]; }}'
        )
    return text


def _stripes(rows: list[_Row], placement: Placement | None) -> list[str]:
    """A pale stripe behind every other layer, where nodes are placed and no span has a band."""
    if placement is None or placement.bands:
        return []
    heights: dict[int, list[float]] = {}
    for row in rows:
        layer = _place(row.nodes[0])[0]
        heights.setdefault(layer, []).append(placement.centre[row.nodes[0]][1])
    right = max(x for x, _ in placement.centre.values()) + 60
    return [
        f'  subgraph cluster_layer{layer} {{ graph [bb="{placement.left - 30:.1f},'
        f'{min(ys) - 32:.1f},{right:.1f},{max(ys) + 32:.1f}", style="filled,rounded", '
        f'color="{BAND}", fillcolor="{BAND}"]; }}'
        for i, (layer, ys) in enumerate(sorted(heights.items()))
        if i % 2 and 0 <= layer < 10**9
    ]


@dataclass(frozen=True)
class _Look:
    """Of one node: its ports, whether it writes here, its outline, and the nodes that it is."""

    ports: tuple[str, ...]
    writes: bool
    marked: bool
    names: tuple[str, ...]


def _node(name: str, what: _Look, placement: Placement | None) -> str:
    """Text of one node; heads that only read here, for another span, are pale."""
    pen = 2.0 if what.marked else 0.8
    color = HIGHLIGHT if what.marked else OUTLINE
    rows = _label_rows(what.names)
    if _KV.fullmatch(split_span(name)[0]):
        look = f"label={_table(rows, what.ports, KV_FILL, color, pen)}"
    elif latent := parse_latent(name):
        look = _latent_look(rows, latent[0], latent[1], color, pen)
    elif name[0] == "a":
        fill = HEAD_FILL if what.writes or not split_span(name)[1] else KV_FILL
        look = f"label={_table(rows, what.ports, fill, color, pen)}"
    else:
        shape = 'hexagon, margin="0.02,0.02", width=0.62, height=0.32'
        if name[0] != "m":
            shape = 'box, margin="0.12,0.04", height=0.3'
        fill = MLP_FILL if name[0] == "m" else END_FILL
        look = f'label="{split_span(name)[0]}", shape={shape}, style=filled, fillcolor="{fill}", '
        look += f'color="{color}", penwidth={pen}'
    if placement is not None:
        x, y = placement.centre[name]
        look += f', pos="{x:.1f},{y:.1f}"'
    return f'"{name}" [{look}, tooltip="{", ".join(what.names)}"];'


def _label_rows(names: Sequence[str]) -> list[str]:
    """Names of the nodes that are drawn as one, a few in a row: ``a4.h1, h4, h6``."""
    first, *others = (split_span(name)[0] for name in names)
    shown = [first, *(name.partition(".")[2] for name in others)]
    if len(shown) > _MOST_NAMES:
        shown = [*shown[: _MOST_NAMES - 1], f"{len(shown) - _MOST_NAMES + 1} more"]
    rows = [shown[i : i + _NAMES_IN_ROW] for i in range(0, len(shown), _NAMES_IN_ROW)]
    return [", ".join(row) + ("," if row is not rows[-1] else "") for row in rows]


def _latent_look(rows: Sequence[str], kind: str, where: str, color: str, pen: float) -> str:
    """Small boxes for latents, dashed grey ones for error nodes, flat ones for cuts."""
    label, size = "\\n".join(rows), 'margin="0.04,0.02", width=0.2, height=0.18, fontsize=8'
    fill, style = LATENT_FILL[where], "filled"
    if kind == "cut":
        size, style = 'margin="0.12,0.02", width=1.2, height=0.18, fontsize=9', "filled,rounded"
    if kind == "error":
        fill, style = ERROR_FILL, "filled,dashed"
    return (
        f'label="{label}", shape=box, {size}, style="{style}", fillcolor="{fill}", '
        f'color="{color}", penwidth={pen}'
    )


def _table(rows: Sequence[str], ports: tuple[str, ...], fill: str, color: str, pen: float) -> str:
    """Label of a head, or of some drawn as one: the names over the ports in use."""
    label = "<BR/>".join(rows)
    cells = "".join(
        f'<TD PORT="{p}" BGCOLOR="{PORT_FILL.get(p, MERGED_FILL)}" BORDER="0" CELLPADDING="1" '
        f'WIDTH="{PORT_WIDTH[len(p)]}" HEIGHT="11"><FONT POINT-SIZE="8">{p}</FONT></TD>'
        for p in ports
    )
    span = f' COLSPAN="{len(ports)}"' if ports else ""
    row = f"<TR>{cells}</TR>" if cells else ""
    return (
        f'<<TABLE STYLE="ROUNDED" BORDER="{pen:.0f}" CELLBORDER="0" CELLSPACING="2" '
        f'CELLPADDING="1" BGCOLOR="{fill}" COLOR="{color}">'
        f'<TR><TD{span} WIDTH="30">{label}</TD></TR>{row}</TABLE>>'
    )


def _edge(line: Line, placement: Placement | None, n_lines: int) -> str:
    tail = f'"{line.sender}":n' if n_lines > CROWDED else f'"{line.sender}"'
    head = f'"{line.node}":{line.port}:s' if line.port else f'"{line.node}":s'
    senders = line.senders or (line.sender,) * len(line.receivers)
    names = ", ".join(f"{u}->{v}" for u, v in zip(senders, line.receivers, strict=True))
    shown = ", ".join(f"{score:.4g}" for score in line.scores)
    color = line.color + ("B0" if placement is not None else "")
    look = f'color="{color}", penwidth={line.width:.2f}'
    if line.style != "solid":
        look += f", style={line.style}"
    if placement is not None:
        look += f', pos="{placement.path(line.sender, line.node, line.port)}"'
    if line.senders:
        return f'  {tail} -> {head} [{look}, tooltip="{names}: {shown}"];'
    return (
        f'  {tail} -> {head} [{look}, tooltip="{names}: {shown}", '
        f'receiver="{" ".join(line.receivers)}", score="{" ".join(map(repr, line.scores))}"];'
    )


def _feed(kv: str, head: str, placement: Placement | None) -> str:
    """Line without a score: to a head of a key-value head's group, to a latent or a span."""
    if placement is not None and _is_move(kv, head):
        return (
            f'  "{kv}" -> "{head}" [style=dashed, color="{AXIS}", penwidth=1.1, '
            f'tooltip="{head} reads {kv}", pos="{placement.move(kv, head)}"];'
        )
    at = f', pos="{placement.path(kv, head, "")}"' if placement is not None else ""
    color = AXIS if parse_latent(head) is None else PALE
    return (
        f'  "{kv}" -> "{head}" [style=dotted, color="{color}", arrowhead=none, '
        f'tooltip="{kv} serves {head}"{at}];'
    )
