"""Positions for pictures too dense for Graphviz's own layout: a spine with arcs.

Embeddings, MLPs and ``logits`` stand in one column, the heads of each layer in a row to its
right.  Lines between members of the column are arcs on its left; all others leave upwards and
arrive from below.  Graphviz then only draws (``layout=nop2``); units are points.

A circuit split by spans has such a column, with its heads, for every span, side by side, and
*moves* between them: from where a head's keys and values are to where it reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphs.spans import split_span

__all__ = ["Band", "Placement", "place", "place_by_span"]

ROW = 64.0
FIRST_HEAD = 160.0
FIRST_IN_BAND = 92.0
SLOT = 80.0
GAP = 24.0
ARROW = 5.0
PORT_WIDTH = {1: 13, 2: 17, 3: 22}  # by the letters in its name


@dataclass(frozen=True)
class Band:
    """The part of a picture that a span has: its name, and from where to where it goes."""

    span: str
    left: float
    right: float


@dataclass(frozen=True)
class Placement:
    """Where nodes stand: centres ``(x, y)``, the ports of each, and bands if split by spans."""

    centre: Mapping[str, tuple[float, float]]
    ports: Mapping[str, tuple[str, ...]]
    spine: frozenset[str]
    bands: tuple[Band, ...] = ()

    @property
    def left(self) -> float:
        """Where the labels of layers stand, left of all arcs."""
        if self.bands:
            return self.bands[0].left - 28
        return -_bow(max((y for _, y in self.centre.values()), default=0.0)) - 30

    @property
    def top(self) -> float:
        """Height of the highest node."""
        return max((y for _, y in self.centre.values()), default=0.0)

    @property
    def middle(self) -> float:
        """Centre between the outermost arcs and the last head."""
        if self.bands:
            return (self.bands[0].left + self.bands[-1].right) / 2
        return (self.left + max((x for x, _ in self.centre.values()), default=0.0)) / 2

    def path(self, sender: str, node: str, port: str) -> str:
        """Return a line's ``pos`` attribute: one cubic curve with an arrow tip."""
        x0, y0 = self.centre[sender]
        x1, y1 = self.centre[node]
        start = (x0, y0 + self._half(sender))
        tip = (x1 + self._port_offset(node, port), y1 - self._half(node))
        rise = tip[1] - start[1]
        if {sender, node} <= self.spine and self._between(x0, y0, y1):
            bow = _bow(rise)
            start, tip = (x0 - 14, y0 + 6), (x1 - 14, y1 - 6)
            end = (tip[0] - ARROW * 0.9, tip[1] - ARROW * 0.5)
            bends = [(x0 - 1.3 * bow, y0 + 0.2 * rise), (x1 - 1.3 * bow, y1 - 0.2 * rise)]
        else:
            end = (tip[0], tip[1] - ARROW)
            reach = min(max(16.0, 0.4 * rise), 90.0)
            bends = [(start[0], start[1] + reach), (end[0], end[1] - reach)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (start, *bends, end))
        return f"e,{tip[0]:.1f},{tip[1]:.1f} {points}"

    def move(self, source: str, target: str) -> str:
        """Return the ``pos`` attribute of a move between bands, in one row."""
        (x0, y0), (x1, y1) = self.centre[source], self.centre[target]
        side = 1.0 if x1 > x0 else -1.0
        start = (x0 + side * self._half_width(source), y0)
        tip = (x1 - side * self._half_width(target), y1)
        low, high = sorted((x0, x1))
        crowded = any(y == y0 and low < x < high for x, y in self.centre.values())
        rise = ROW * 0.62 if crowded else 10.0
        end = (tip[0] - side * ARROW * 0.8, tip[1] + (ARROW * 0.6 if crowded else 0.0))
        reach = 0.25 * (tip[0] - start[0])
        points = (start, (start[0] + reach, y0 + rise), (end[0] - reach, y1 + rise), end)
        return f"e,{tip[0]:.1f},{tip[1]:.1f} " + " ".join(f"{x:.1f},{y:.1f}" for x, y in points)

    def _between(self, x: float, low: float, high: float) -> bool:
        """Whether another node of the column at ``x`` stands between two heights."""
        heights = (self.centre[n][1] for n in self.spine if abs(self.centre[n][0] - x) < SLOT)
        return any(low < height < high for height in heights)

    def _half_width(self, node: str) -> float:
        """Half the width of a drawn head."""
        return max(24.0, sum(_port_widths(self.ports.get(node, ()))) / 2 + 4)

    def _half(self, node: str) -> float:
        """Half the height of a drawn node."""
        if node in self.spine:
            return 11.0
        return 17.0 if self.ports.get(node) else 11.0

    def _port_offset(self, node: str, port: str) -> float:
        """How far right of its node's centre a port's middle is."""
        names = self.ports.get(node, ())
        if port not in names:
            return 0.0
        widths = _port_widths(names)
        at = names.index(port)
        return sum(widths[:at]) + widths[at] / 2 - sum(widths) / 2


def place(
    rows: Sequence[Sequence[str]],
    spine: frozenset[str],
    ports: Mapping[str, tuple[str, ...]],
    links: Sequence[tuple[str, str]],
    *,
    first_head: float = FIRST_HEAD,
) -> Placement:
    """Choose a place for every node.

    Parameters
    ----------
    rows
        Names of the nodes on each rank, from bottom to top.
    spine
        Which of them stand in the column.
    ports
        Ports in use at each node.
    links
        ``(sender, node)`` of the lines; heads are put near the heads that they read.
    first_head
        How far right of the column the heads begin.
    """
    below: dict[str, list[str]] = {}
    for sender, node in links:
        below.setdefault(node, []).append(sender)
    centre: dict[str, tuple[float, float]] = {}
    for i, row in enumerate(rows):
        beside = [name for name in row if name not in spine]
        column = [name for name in row if name in spine]
        for j, name in enumerate(column):
            centre[name] = ((j - (len(column) - 1) / 2) * SLOT, i * ROW)
        stagger = SLOT / 2 if i % 4 >= 2 else 0.0
        left = first_head + stagger - SLOT / 2
        for name in sorted(beside, key=lambda n: _mean_x(below.get(n, ()), centre)):
            width = max(SLOT, sum(_port_widths(ports.get(name, ()))) + GAP)
            centre[name] = (left + width / 2, i * ROW)
            left += width
    return Placement(centre, ports, spine)


def place_by_span(
    rows: Sequence[Sequence[str]],
    spine: frozenset[str],
    ports: Mapping[str, tuple[str, ...]],
    links: Sequence[tuple[str, str]],
    spans: Sequence[str],
) -> Placement:
    """Choose a place for every node: a band for each span that has nodes, in their order.

    Parameters
    ----------
    rows, spine, ports, links
        As for :func:`place`; names carry their span.
    spans
        In order from left to right.
    """
    centre: dict[str, tuple[float, float]] = {}
    bands: list[Band] = []
    left = 0.0
    for span in spans:
        own = [[name for name in row if split_span(name)[1] == span] for row in rows]
        if not any(own):
            continue
        inside = [link for link in links if split_span(link[0])[1] == span]
        part = place(own, spine & {n for row in own for n in row}, ports, inside,
                     first_head=FIRST_IN_BAND)  # fmt: skip
        low, high = _extent(part, inside)
        shift = left - low
        centre |= {name: (x + shift, y) for name, (x, y) in part.centre.items()}
        bands.append(Band(span, left, max(left + high - low, left + SLOT)))
        left = bands[-1].right + GAP
    return Placement(centre, ports, spine, tuple(bands))


def _extent(part: Placement, links: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """From where to where a band's nodes and arcs go."""
    rises = [part.centre[v][1] - part.centre[u][1] for u, v in links if {u, v} <= part.spine]
    left = min((x - 40 for x, _ in part.centre.values()), default=0.0)
    if rises:
        left = min(left, -_bow(max(rises)) - 24)
    return left, max((x + part._half_width(n) + 14 for n, (x, _) in part.centre.items()))


def _port_widths(names: Sequence[str]) -> list[float]:
    return [PORT_WIDTH[len(name)] + 2.0 for name in names]


def _mean_x(senders: Sequence[str], centre: Mapping[str, tuple[float, float]]) -> float:
    known = [centre[s][0] for s in senders if s in centre]
    return sum(known) / len(known) if known else 0.0


def _bow(rise: float) -> float:
    """How far an arc of this height leans out."""
    return 24.0 + 0.17 * rise
