"""A study as one HTML page: small multiples of every task and model, and what failed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from acdc.evidence.study import SECONDS, Row, Study, Variant
from acdc.pages.page import page
from acdc.pages.plots import Axis, Plot
from graphs.files.whole import write_whole
from graphs.text import said

__all__ = ["save_page", "study_html"]

_SIZES = ("n_edges", "threshold")
_N_COLORS = 8
_BESIDE = 0.05
"""How far a series is drawn beside the next one, as a share of the size: none hides another."""
_MOST_CELLS_NAMED = 12
"""Rows and columns of an overlap whose cells have room for numbers."""

_STYLE = """
h1 { font-size: 1.6rem; } section { border-top: 1px solid var(--line); margin-top: 1.6rem;
  padding-top: .9rem; } h2 { margin: 0 0 .4rem; } .soft { max-width: 62rem; }
.facts { display: flex; flex-wrap: wrap; gap: .5rem 2.2rem; margin: .8rem 0 0; }
.facts dt { color: var(--soft); font-size: .8rem; } .facts dd { margin: 0; font-size: 1.05rem; }
.panels { display: flex; flex-wrap: wrap; gap: 1rem 1.6rem; margin-top: .6rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .2rem; }
figcaption span { font-weight: 400; color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem .6rem; margin: .6rem 0; }
.legend button { font: inherit; color: var(--fg); background: var(--card); cursor: pointer;
  border: 1px solid var(--line); border-radius: 1rem; padding: .1rem .7rem; }
.legend button.away { opacity: .4; text-decoration: line-through; }
.legend svg { vertical-align: -1px; margin-right: .4rem; }
svg.plot { max-width: 100%; height: auto; display: block; }
svg.plot text { fill: var(--fg); font: 12px system-ui, sans-serif; }
svg.plot .tick, svg.plot .name { fill: var(--soft); }
svg.plot .grid { stroke: var(--line); stroke-width: .7; } svg.plot polyline { fill: none; }
svg.plot .whole { stroke: var(--soft); stroke-dasharray: 3 3; }
svg.plot .mean { stroke: var(--c); stroke-width: 1.8; } svg.plot .dot { fill: var(--c); }
svg.plot .own { stroke: var(--bg); stroke-width: 1.2; } svg.plot .small { opacity: .55; }
svg.plot .range { stroke: var(--c); stroke-width: 1; opacity: .4; }
.s0 { --c: #0072b2; } .s1 { --c: #d55e00; } .s2 { --c: #009e73; } .s3 { --c: #cc79a7; }
.s4 { --c: #56b4e9; } .s5 { --c: #e69f00; } .s6 { --c: #7a5195; } .s7 { --c: #8a8a8a; }
.legend circle { fill: var(--c); }
svg.heat .cell { fill: #1f5f99; } svg.heat text.in { fill: #fff; }
svg.heat .frame { fill: none; stroke: var(--line); }
.t0 { fill: #9db7cc; } .t1 { fill: #2f6f9f; } .t2 { fill: #d9a441; } .t3 { fill: #b9b9b9; }
.failed td { overflow-wrap: anywhere; } .failed summary { cursor: pointer; color: var(--soft); }
th[data-by] { cursor: pointer; }
th[data-by]:hover { color: var(--fg); } .wide table { font-size: .86rem; }
""" + "".join(f".off{k} svg.plot .s{k} {{ display: none; }}\n" for k in range(_N_COLORS))

_SCRIPT = """
for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    document.body.classList.toggle("off" + button.dataset.series);
    button.classList.toggle("away");
  });
}
const value = (row, at) => {
  const cell = row.cells[at], known = cell.dataset.v ?? cell.textContent;
  return cell.classList.contains("n") ? (known === "" ? -Infinity : Number(known)) : known;
};
for (const head of document.querySelectorAll("th[data-by]")) {
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], at = head.cellIndex;
    const down = head.dataset.by = head.dataset.by === "up" ? "down" : "up";
    const sign = down === "up" ? 1 : -1;
    [...body.rows].sort((a, b) => {
      const x = value(a, at), y = value(b, at);
      return sign * (x < y ? -1 : x > y ? 1 : 0);
    }).forEach(row => body.append(row));
  });
}
"""


def save_page(found: Study) -> Path:
    """Write ``study.html`` into the folder of a study; return its path."""
    path = found.folder / "study.html"
    write_whole(path, study_html(found))
    return path


def study_html(found: Study) -> str:
    """Return a study as a page that needs no network; it links to the runs beside it."""
    groups = {key: found.same_but_seed(rows) for key, rows in found.groups.items() if rows}
    series = _series(groups.values())
    parts = [
        f"<h1>Study {escape(found.folder.name)}</h1>",
        _facts(found),
        _section("Summary", _SUMMARY, _summary(groups, series)),
        _section("Size against unseen faithfulness", _FRONTIER,
                 _legend(series) + _panels(groups, lambda g: _frontier(g, groups, series))),
        _section("Overlap of circuits", _OVERLAP, _panels(groups, _overlap)),
        _section("Time", _TIME, _panels(groups, lambda g: _time(g, groups))),
        _section("What failed", "", _failures(found)),
        _section("Every run", _RUNS, _runs(found)),
    ]  # fmt: skip
    return page(f"Study {found.folder.name}", "\n".join(parts), style=_STYLE, script=_SCRIPT)


_SUMMARY = (
    "Means over seeds; in brackets the least and the most. Overlap: mean Jaccard index of the "
    "edges of two seeds’ circuits. Seconds: load, search and evaluation of one run."
)
_FRONTIER = (
    "Faithfulness on prompts that no run has seen, over the edges that its circuit keeps. Small "
    "dots: runs, with their 95 % interval; large ones: means over seeds; methods are drawn side by "
    "side. All panels have the same "
    "axes; what lies outside of -0.5 to 1.5 is at the frame. Click a name to hide it."
)
_OVERLAP = (
    "Mean Jaccard index of the edges of two circuits, the darker the more; on the diagonal between "
    "seeds."
)
_TIME = (
    "Seconds of one run, on the mean: <svg width='10' height='10'><rect class='t0' width='10' "
    "height='10'/></svg> load, <svg width='10' height='10'><rect class='t1' width='10' "
    "height='10'/></svg> search, <svg width='10' height='10'><rect class='t2' width='10' "
    "height='10'/></svg> evaluate, <svg width='10' height='10'><rect class='t3' width='10' "
    "height='10'/></svg> pictures. All panels have the same scale."
)
_RUNS = "Click a heading to sort; a name leads to the circuit’s picture."

Groups = dict[tuple[str, str], tuple[Variant, ...]]


def _section(title: str, lead: str, body: str) -> str:
    says = f'<p class="soft">{lead}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{says}{body}</section>"


def _facts(found: Study) -> str:
    n_failed = len(found.failures)
    facts = {"runs": f"{len(found.rows) - n_failed:,} of {len(found.rows):,}"}
    facts["failed"] = f"{n_failed:,}"
    for name, values in found.grid.asked.items():
        shown = [str(value) for value in values]
        words = ", ".join(shown) if len(shown) <= 8 else f"{len(shown)}: {shown[0]} … {shown[-1]}"
        facts[name] = words
    for method, options in found.grid.by_method.items():
        facts[method] = ", ".join(f"{name} {value}" for name, value in options.items())
    facts["seconds, all runs"] = f"{sum(row.seconds for row in found.rows):,.0f}"
    return (
        '<dl class="facts">'
        + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
        + "</dl>"
    )


def _of_series(variant: Variant) -> str:
    """What a variant is called without its size: sizes of one series make one line."""
    names = [name for name in variant.values if name not in _SIZES]
    return variant.called(names) or str(variant.rows[0].found["method"])


def _series(groups: Iterable[Sequence[Variant]]) -> dict[str, int]:
    """Series -> number of its colour."""
    names = dict.fromkeys(_of_series(variant) for group in groups for variant in group)
    return {name: i % _N_COLORS for i, name in enumerate(names)}


def _legend(series: dict[str, int]) -> str:
    buttons = (
        f'<button type="button" class="s{color}" data-series="{color}"><svg width="10" height="10">'
        f'<circle cx="5" cy="5" r="5"/></svg>{escape(name)}</button>'
        for name, color in series.items()
    )
    return f'<div class="legend">{"".join(buttons)}</div>'


def _panels(groups: Groups, draw: Any) -> str:
    panels = (
        f"<figure><figcaption>{escape(Path(task).stem)} <span>{escape(Path(model).name)}</span>"
        f"</figcaption>{draw(variants)}</figure>"
        for (task, model), variants in groups.items()
    )
    return f'<div class="panels">{"".join(panels)}</div>'


# --- size and faithfulness ----------------------------------------------------------------


def _frontier(variants: Sequence[Variant], groups: Groups, series: dict[str, int]) -> str:
    plot = Plot(*_axes(groups), "faithfulness over edges", width=390, height=270)
    plot.line([(plot.x.low, 1), (plot.x.high, 1)], "whole")
    means: dict[str, list[tuple[float, float, str]]] = {}
    for variant in variants:
        name = _of_series(variant)
        beside = 1 + _BESIDE * (list(series).index(name) - (len(series) - 1) / 2)
        for row in variant.rows:
            _run_dot(plot, row, variant.label, f"s{series[name]}", beside)
        edges, value = variant.mean("n_edges_kept"), variant.mean("faithfulness")
        if edges is not None and value is not None:
            says = f"{variant.label}: {edges:,.0f} edges, faithfulness {value:.3f} on the mean"
            means.setdefault(name, []).append((max(edges, 1) * beside, _limited(value), says))
    for name, points in means.items():
        color = f"s{series[name]}"
        plot.line([(x, y) for x, y, _ in sorted(points)], f"mean {color}")
        for x, y, says in points:
            plot.dot(x, y, f"own {color}", says)
    silent = sum(row.found.get("faithfulness") is None for v in variants for row in v.rows)
    what = "run claims" if silent == 1 else "runs claim"
    note = f'<p class="soft">{silent:,} {what} no faithfulness</p>' if silent else ""
    return f"{plot.svg()}{note}"


def _run_dot(plot: Plot, row: Row, label: str, color: str, beside: float) -> None:
    value = row.found.get("faithfulness")
    if value is None:
        return
    n_edges = row.found["n_edges_kept"]
    x = max(n_edges, 1) * beside
    low, high = row.found["faithfulness_low"], row.found["faithfulness_high"]
    says = f"{label}, seed {row.found['seed']}: {n_edges:,} edges, faithfulness {value:.3f}"
    if low is not None and high is not None:
        plot.line([(x, _limited(low)), (x, _limited(high))], f"range {color}")
        says += f" ({low:.3f} to {high:.3f})"
    plot.dot(x, _limited(value), f"small {color}", says)


def _axes(groups: Groups) -> tuple[Axis, Axis]:
    """The same axes for all panels."""
    rows = [row for group in groups.values() for variant in group for row in variant.rows]
    sizes = [max(row.found["n_edges_kept"], 1) for row in rows] or [1]
    low, high = min(sizes) / 1.25, max(sizes) * 1.25
    ends = [row.found.get(name) for row in rows for name in ("faithfulness_low",
            "faithfulness_high", "faithfulness")]  # fmt: skip
    y = Axis.around((_limited(value) for value in ends if value is not None), "faithfulness")
    return Axis(low, high, tuple(_round_sizes(low, high)), "edges kept (logarithmic)", log=True), y


def _round_sizes(low: float, high: float) -> Iterator[float]:
    """1, 2, 5, 10, ... between two sizes; of many decades the powers alone."""
    digits = (1, 2, 5) if high / low < 300 else (1,)
    for power in range(int(math.log10(high)) + 1):
        yield from (d * 10.0**power for d in digits if low <= d * 10**power <= high)


def _limited(value: float) -> float:
    return max(-0.5, min(1.5, value))


# --- overlap and time ---------------------------------------------------------------------


def _overlap(variants: Sequence[Variant]) -> str:
    """Mean Jaccard indices of every two variants, as a heat map."""
    n, size, left = len(variants), 46 if len(variants) <= _MOST_CELLS_NAMED else 16, 150
    top, width = 8, left + n * size + 8
    parts = []
    for i, one in enumerate(variants):
        y = top + i * size
        parts.append(
            f'<text x="{left - 8}" y="{y + size / 2 + 4:.0f}" text-anchor="end">'
            f"{escape(one.label)}</text>"
        )
        for j, other in enumerate(variants):
            parts.append(_heat(left + j * size, y, size, one, other))
    for j, one in enumerate(variants):
        x, y = left + j * size + size / 2 + 4, top + n * size + 10
        parts.append(
            f'<text transform="translate({x:.0f} {y:.0f}) rotate(-40)" text-anchor="end">'
            f"{escape(one.label)}</text>"
        )
    height = top + n * size + 110
    return (
        f'<svg class="plot heat" role="img" aria-label="overlap" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">{"".join(parts)}</svg>'
    )


def _heat(x: float, y: float, size: float, one: Variant, other: Variant) -> str:
    value = one.overlap(other)
    frame = f'<rect class="frame" x="{x}" y="{y}" width="{size}" height="{size}"/>'
    if value is None:
        return frame
    says = f"{one.label} and {other.label}: {value:.3f} (random edges {_chance(one, other):.3f})"
    words = ""
    if size > 30:
        inside = ' class="in"' if value > 0.5 else ""
        words = (
            f'<text{inside} x="{x + size / 2:.0f}" y="{y + size / 2 + 4:.0f}" '
            f'text-anchor="middle">{value:.2f}</text>'
        )
    return (
        f'<g><title>{escape(says)}</title><rect class="cell" x="{x}" y="{y}" width="{size}" '
        f'height="{size}" fill-opacity="{value:.3f}"/>{frame}{words}</g>'
    )


def _chance(one: Variant, other: Variant) -> float:
    """About the Jaccard index of random edges, as many as two variants keep on the mean."""
    n, a, b = (v.mean(c) or 0.0 for v, c in ((one, "n_edges_total"), (one, "n_edges_kept"),
               (other, "n_edges_kept")))  # fmt: skip
    common = a * b / n
    return common / (a + b - common) if a + b else 1.0


def _time(variants: Sequence[Variant], groups: Groups) -> str:
    """Seconds of a run by phase, a bar for every variant."""
    most = max(_seconds(v) for group in groups.values() for v in group) or 1.0
    left, width, row = 150, 390, 24
    scale = (width - left - 60) / most
    parts = []
    for i, variant in enumerate(variants):
        y, x = 4 + i * row, float(left)
        parts.append(
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(variant.label)}</text>'
        )
        for k, name in enumerate(SECONDS):
            seconds = variant.mean(name) or 0.0
            says = f"{variant.label}: {name.removeprefix('seconds_')} {seconds:.2f} s"
            parts.append(
                f'<rect class="t{k}" x="{x:.1f}" y="{y}" width="{seconds * scale:.1f}" '
                f'height="{row - 8}"><title>{escape(says)}</title></rect>'
            )
            x += seconds * scale
        parts.append(
            f'<text class="tick" x="{x + 6:.1f}" y="{y + 13}">{_seconds(variant):.3g}</text>'
        )
    height = 8 + row * len(variants)
    return (
        f'<svg class="plot" role="img" aria-label="seconds" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">{"".join(parts)}</svg>'
    )


def _seconds(variant: Variant) -> float:
    return sum(variant.mean(name) or 0.0 for name in SECONDS)


# --- tables -------------------------------------------------------------------------------


def _summary(groups: Groups, series: dict[str, int]) -> str:
    heads = ("task", "model", "", "runs", "edges", "faithfulness, unseen", "seen", "overlap",
             "seconds")  # fmt: skip
    rows = (
        (
            Path(task).stem,
            Path(model).name,
            variant.label,
            f"{len(variant.rows):,}",
            _span(variant, "n_edges_kept", ",.0f"),
            _span(variant, "faithfulness", ".3f"),
            _span(variant, "faithfulness_seen", ".3f"),
            _number(variant.overlap(variant)),
            f"{sum(variant.mean(name) or 0.0 for name in SECONDS[:3]):.3g}",
        )
        for (task, model), variants in groups.items()
        for variant in variants
    )
    return _table(heads, rows, n_words=3)


def _span(variant: Variant, column: str, how: str) -> str:
    known = [row.found[column] for row in variant.rows if row.found.get(column) is not None]
    if not known:
        return "-"
    low, high = min(known), max(known)
    of = f" of {len(known)} runs" if len(known) < len(variant.rows) else ""
    ends = f" ({low:{how}} to {high:{how}})" if len(known) > 1 and low < high else ""
    return f"{sum(known) / len(known):{how}}{ends}{of}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], n_words: int) -> str:
    """A table whose first columns are words and whose others are numbers."""
    kinds = ["" if i < n_words else ' class="n"' for i in range(len(heads))]
    top = "".join(f"<th{kind}>{escape(h)}</th>" for kind, h in zip(kinds, heads, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{escape(c)}</td>" for kind, c in zip(kinds, cells, strict=True))
        + "</tr>"
        for cells in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _failures(found: Study) -> str:
    """Every line once, with the runs that it is of."""
    if not found.failures:
        return "<p>Nothing.</p>"
    shown = "".join(
        f'<tr><td class="n">{len(rows):,} {"runs" if len(rows) > 1 else "run"}</td><td>'
        f"{escape(why)}<details><summary>which</summary>"
        f'<span class="mono">{escape(", ".join(row.cell.name for row in rows))}</span></details>'
        "</td></tr>"
        for why, rows in found.failures_by_reason.items()
    )
    return f'<table class="failed"><tbody>{shown}</tbody></table>'


def _runs(found: Study) -> str:
    """Every run that did not fail, sortable."""
    varied = [name for name in found.grid.varied if name not in ("task", "model")]
    words = ("task", "model", *varied)
    numbers = ("n_edges_kept", "faithfulness", "faithfulness_seen", "metric_circuit", "forwards")
    says = {"n_edges_kept": "edges kept", "faithfulness_seen": "seen", "metric_circuit": "metric"}
    heads = "".join(
        f'<th data-by=""{" class=n" if name in (*numbers, "seconds") else ""}>'
        f"{escape(says.get(name, name))}</th>"
        for name in ("run", *words, *numbers, "seconds")
    )
    rows = "".join(_run_row(row, words, numbers) for rows in found.groups.values() for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
        "</div>"
    )


def _run_row(row: Row, words: Sequence[str], numbers: Sequence[str]) -> str:
    address = f"cells/{quote(row.cell.name)}/circuit.svg"
    cells = [f'<td class="mono"><a href="{address}">{escape(row.cell.name)}</a></td>']
    for name in words:
        value = row.found[name]
        text = Path(value).name if name in ("task", "model") else str(value)
        cells.append(f"<td>{escape(text)}</td>")
    for name in numbers:
        value = row.found.get(name)
        data = "" if value is None else repr(value)
        cells.append(
            f'<td class="n" data-v="{data}">{said(value) if value is not None else "-"}</td>'
        )
    cells.append(f'<td class="n" data-v="{row.seconds!r}">{row.seconds:.3g}</td>')
    return f"<tr>{''.join(cells)}</tr>"
