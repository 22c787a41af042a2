"""Small plots as SVG, drawn by hand: they take their colours from the page and need no fonts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from acdc.measure.curves import Point
from acdc.pages.evidence import Ablated
from graphs.known.roc import Roc

__all__ = ["Axis", "Plot", "ablations_plot", "bars", "frontier_plot", "roc_plot"]


@dataclass(frozen=True)
class Axis:
    """One axis of a plot.

    Parameters
    ----------
    low, high
        Ends, in the data's unit.
    ticks
        Where its marks are.
    name
        What it says beside them.
    log
        Whether it is logarithmic.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    name: str
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], name: str) -> Axis:
        """Return an axis with round marks that holds all values, 0 and 1."""
        known = [0.0, 1.0, *values]
        low, high = min(known), max(known)
        step = next(s for s in _STEPS if (high - low) / s <= 7)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = tuple(round(i * step, 10) for i in range(first, last + 1))
        return cls(ticks[0], ticks[-1], ticks, name)

    @classmethod
    def sizes(cls, most: int, name: str) -> Axis:
        """Return a logarithmic axis from 1 to a number of edges."""
        ticks = tuple(10.0**power for power in range(math.floor(math.log10(most)) + 1))
        return cls(1, most, ticks, name, log=True)

    def share(self, value: float) -> float:
        """How far along the axis a value is, from 0 to 1."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = (math.log(max(x, 1e-9)) for x in (low, high, value))
        return (at - low) / (high - low) if high > low else 0.5


_STEPS = tuple(digit * 10.0**power for power in range(-2, 9) for digit in (1, 2, 5))


class Plot:
    """A frame with two axes, and marks in it.

    Parameters
    ----------
    x, y
        The axes.
    label
        What a screen reader says.
    width, height
        Of the whole, in pixels.
    left, right, bottom
        Room beside the frame.
    """

    def __init__(
        self,
        x: Axis,
        y: Axis,
        label: str,
        *,
        width: int = 470,
        height: int = 290,
        left: int = 52,
        right: int = 14,
        bottom: int = 44,
    ) -> None:
        self.x, self.y = x, y
        self._size, self._label = (width, height), label
        self._box = (left, 12, width - right, height - bottom)  # left, top, right, bottom
        self._parts: list[str] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        left, top, right, bottom = self._box
        across, up = self.x.share(x), self.y.share(y)
        return left + across * (right - left), bottom - up * (bottom - top)

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """Draw a line of a CSS class through points."""
        at = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*p) for p in points))
        self._parts.append(f'<polyline class="{kind}" points="{at}"/>')

    def band(self, points: Sequence[tuple[float, float, float]]) -> None:
        """Shade between the low and the high of ``(x, low, high)``."""
        around = [(x, low) for x, low, _ in points] + [(x, high) for x, _, high in points[::-1]]
        at = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*p) for p in around))
        self._parts.append(f'<polygon class="band" points="{at}"/>')

    def dot(self, x: float, y: float, kind: str, title: str) -> None:
        """Draw a point that says something when pointed at."""
        across, down = self.at(x, y)
        size = 3 if kind.startswith("small") else 5
        self._parts.append(
            f'<circle class="dot {kind}" cx="{across:.1f}" cy="{down:.1f}" r="{size}">'
            f"<title>{escape(title)}</title></circle>"
        )

    def text(self, x: float, y: float, words: str, *, anchor: str = "start", dx: float = 0) -> None:
        """Write at a point, centred on its height."""
        across, down = self.at(x, y)
        self._parts.append(
            f'<text x="{across + dx:.1f}" y="{down + 4:.1f}" text-anchor="{anchor}">'
            f"{escape(words)}</text>"
        )

    def svg(self) -> Markup:
        """Return the whole plot; texts in it are escaped."""
        width, height = self._size
        return Markup(
            f'<svg class="plot" role="img" aria-label="{escape(self._label)}" '
            f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
            f"{self._grid()}{''.join(self._parts)}</svg>"
        )

    def _grid(self) -> str:
        left, top, right, bottom = self._box
        parts = []
        for tick in self.x.ticks:
            at = left + self.x.share(tick) * (right - left)
            parts.append(
                f'<line class="grid" x1="{at:.1f}" y1="{top}" x2="{at:.1f}" y2="{bottom}"/>'
            )
            parts.append(
                f'<text class="tick" x="{at:.1f}" y="{bottom + 15}" text-anchor="middle">'
                f"{tick:,.6g}</text>"
            )
        for tick in self.y.ticks:
            at = bottom - self.y.share(tick) * (bottom - top)
            parts.append(
                f'<line class="grid" x1="{left}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>'
            )
            parts.append(
                f'<text class="tick" x="{left - 7}" y="{at + 4:.1f}" text-anchor="end">'
                f"{tick:,.6g}</text>"
            )
        middle = (left + right) / 2
        parts.append(
            f'<text class="name" x="{middle:.0f}" y="{bottom + 34}" text-anchor="middle">'
            f"{escape(self.x.name)}</text>"
        )
        if self.y.name:
            turned = f"translate(13 {(top + bottom) / 2:.0f}) rotate(-90)"
            parts.append(
                f'<text class="name" transform="{turned}" text-anchor="middle">'
                f"{escape(self.y.name)}</text>"
            )
        return "".join(parts)


def frontier_plot(
    points: Sequence[Point], n_edges: int, n_total: int, measured: Sequence[tuple[str, Ablated]]
) -> Markup:
    """Plot faithfulness over the number of edges.

    Parameters
    ----------
    points
        Circuits along the ranking.
    n_edges, n_total
        Edges of the circuit, and of the graph.
    measured
        The circuit's own faithfulness, each with a name: the first one is drawn full.
    """
    shown = [p for p in points if p.n_edges > 0]
    ends = [v for p in shown for v in (p.low, p.high)]
    ends += [v for _, m in measured for v in (m.faithfulness, m.low, m.high) if v is not None]
    plot = Plot(
        Axis.sizes(max(n_total, 2), "edges (logarithmic)"),
        Axis.around(map(_limited, ends), "faithfulness"),
        "faithfulness against number of edges",
    )
    plot.line([(1, 1), (max(n_total, 2), 1)], "whole")
    plot.band([(p.n_edges, _limited(p.low), _limited(p.high)) for p in shown])
    plot.line([(p.n_edges, _limited(p.faithfulness)) for p in shown], "curve")
    for p in shown:
        says = f"{p.n_edges:,} edges: {p.faithfulness:.3f} ({p.low:.3f} to {p.high:.3f})"
        plot.dot(p.n_edges, _limited(p.faithfulness), "small", says)
    for i, (name, m) in enumerate(measured):
        if m.faithfulness is None or not n_edges:
            continue
        if m.low is not None and m.high is not None:
            ends_of = (_limited(m.low), _limited(m.high))
            plot.line([(n_edges, end) for end in ends_of], "whisker")
        says = f"{name}: {m.faithfulness:.3f}"
        plot.dot(n_edges, _limited(m.faithfulness), "hollow" if i else "own", says)
    return plot.svg()


def ablations_plot(ablations: Sequence[Ablated]) -> Markup:
    """Plot faithfulness with its interval under each ablation, one row each.

    What lies outside of -1 to 2 ends at the frame; the numbers stand beside it.
    """
    n = len(ablations)
    ends = [v for a in ablations for v in (a.faithfulness, a.low, a.high) if v is not None]
    plot = Plot(
        Axis.around(map(_limited, ends), "faithfulness"),
        Axis(-0.5, n - 0.5, (), ""),
        "faithfulness under every ablation",
        width=710,
        height=62 + 27 * n,
        left=190,
        right=195,
    )
    for i, a in enumerate(ablations):
        row = n - 1 - i
        plot.text(plot.x.low, row, f"{a.intervention}, {a.direction}", anchor="end", dx=-12)
        if a.faithfulness is None:
            plot.text(plot.x.high, row, "undefined", dx=12)
            continue
        says = f"{a.faithfulness:.3g}"
        if a.low is not None and a.high is not None:
            plot.line([(_limited(a.low), row), (_limited(a.high), row)], "whisker")
            says += f" ({a.low:.3g} to {a.high:.3g})"
        plot.dot(_limited(a.faithfulness), row, "hollow" if i else "own", says)
        plot.text(plot.x.high, row, says, dx=12)
    return plot.svg()


def roc_plot(roc: Roc, point: tuple[float, float] | None) -> Markup:
    """Plot true against false positive rate, and where the circuit itself is."""
    unit = Axis(0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1), "false positive rate")
    rates = Axis(0, 1, unit.ticks, "true positive rate")
    plot = Plot(unit, rates, "ROC curve", width=330, height=310)
    plot.line([(0, 0), (1, 1)], "whole")
    plot.line(list(zip(roc.fpr.tolist(), roc.tpr.tolist(), strict=True)), "curve")
    if point is not None:
        says = f"the circuit: {point[1]:.3f} of the true ones, {point[0]:.3g} of the others"
        plot.dot(*point, "own", says)
    return plot.svg()


def bars(rows: Sequence[tuple[str, float, str]]) -> Markup:
    """Return rows of a name, a bar as long as its value, and what it says."""
    most = max((value for _, value, _ in rows), default=0.0) or 1.0
    row = Markup(
        '<div class="bar"><span>{}</span>'
        '<svg class="track"><rect width="{:.1f}%" height="9" rx="3"/></svg><span>{}</span></div>'
    )
    return Markup("").join(row.format(name, 100 * value / most, says) for name, value, says in rows)


def _limited(value: float) -> float:
    """A faithfulness where a plot can show it."""
    return max(-1.0, min(2.0, value))
