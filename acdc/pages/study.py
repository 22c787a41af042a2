"""A study as one HTML page: small multiples of every task and model, and what failed.

What the page says is put together here and laid out by ``templates/study.html``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from acdc.evidence.study import SECONDS, Row, Study, Variant
from acdc.pages.filling import fill, resource
from acdc.pages.page import page
from acdc.pages.plots import Axis, Plot
from graphs.files.whole import write_whole
from graphs.text import said

__all__ = ["save_page", "study_html"]

_SIZES = ("n_edges", "threshold")
_N_COLORS = 8
"""As many as ``study.css`` has."""
_BESIDE = 0.05
"""How far a series is drawn beside the next one, as a share of the size: none hides another."""
_PHASES = dict(zip(SECONDS, ("load", "search", "evaluation", "pictures"), strict=True))
_NUMBERS = {
    "n_edges_kept": "edges kept",
    "faithfulness": "faithfulness",
    "faithfulness_seen": "seen",
    "metric_circuit": "metric",
    "forwards": "forwards",
}
"""Columns of every run, and what the page calls them."""

Groups = dict[tuple[str, str], tuple[Variant, ...]]


def save_page(found: Study) -> Path:
    """Write ``study.html`` into the folder of a study; return its path."""
    path = found.folder / "study.html"
    write_whole(path, study_html(found))
    return path


def study_html(found: Study) -> str:
    """Return a study as a page that needs no network; it links to the runs beside it."""
    groups = {key: found.same_but_seed(rows) for key, rows in found.groups.items() if rows}
    series = _series(groups.values())
    title = f"Study {found.folder.name}"
    varied = [name for name in found.grid.varied if name not in ("task", "model")]
    words = ("task", "model", *varied)
    body = fill(
        "study.html",
        title=title,
        facts=_facts(found),
        panels=_panels(groups, series),
        series=series,
        numbers=_numbers,
        chance=_chance,
        phases=_PHASES.values(),
        most_seconds=max((_seconds(v) for group in groups.values() for v in group), default=0) or 1,
        failures=found.failures_by_reason,
        columns=dict.fromkeys(("run", *words), False)
        | dict.fromkeys((*_NUMBERS.values(), "seconds"), True),
        runs=[_run(row, words) for rows in found.groups.values() for row in rows],
    )
    return page(title, body, style=resource("study.css"), script=resource("study.js"))


@dataclass(frozen=True)
class _Panel:
    """One task in one model."""

    task: str
    model: str
    variants: tuple[Variant, ...]
    frontier: Markup

    @property
    def n_silent(self) -> int:
        """Runs that claim no faithfulness."""
        return sum(row.found.get("faithfulness") is None for v in self.variants for row in v.rows)

    @property
    def bars(self) -> list[dict[str, Any]]:
        """Mean seconds of every variant by phase."""
        return [
            {
                "label": variant.label,
                "seconds": {name: variant.mean(c) or 0.0 for c, name in _PHASES.items()},
            }
            for variant in self.variants
        ]


def _panels(groups: Groups, series: dict[str, int]) -> list[_Panel]:
    axes = _axes(groups)
    return [
        _Panel(Path(task).stem, Path(model).name, variants, _frontier(variants, axes, series))
        for (task, model), variants in groups.items()
    ]


def _facts(found: Study) -> dict[str, str]:
    n_failed = len(found.failures)
    facts = {
        "runs": f"{len(found.rows) - n_failed:,} of {len(found.rows):,}",
        "failed": f"{n_failed:,}",
    }
    for name, values in found.grid.asked.items():
        shown = [str(value) for value in values]
        words = ", ".join(shown) if len(shown) <= 8 else f"{len(shown)}: {shown[0]} … {shown[-1]}"
        facts[name] = words
    for method, options in found.grid.by_method.items():
        facts[method] = ", ".join(f"{name} {value}" for name, value in options.items())
    facts["seconds, all runs"] = f"{sum(row.seconds for row in found.rows):,.0f}"
    return facts


def _of_series(variant: Variant) -> str:
    """What a variant is called without its size: sizes of one series make one line."""
    names = [name for name in variant.values if name not in _SIZES]
    return variant.called(names) or str(variant.rows[0].found["method"])


def _series(groups: Iterable[Sequence[Variant]]) -> dict[str, int]:
    """Series -> number of its colour."""
    names = dict.fromkeys(_of_series(variant) for group in groups for variant in group)
    return {name: i % _N_COLORS for i, name in enumerate(names)}


def _seconds(variant: Variant) -> float:
    return sum(variant.mean(name) or 0.0 for name in SECONDS)


def _chance(one: Variant, other: Variant) -> float:
    """About the Jaccard index of random edges, as many as two variants keep on the mean."""
    n, a, b = (v.mean(c) or 0.0 for v, c in ((one, "n_edges_total"), (one, "n_edges_kept"),
               (other, "n_edges_kept")))  # fmt: skip
    common = a * b / n
    return common / (a + b - common) if a + b else 1.0


# --- size and faithfulness ----------------------------------------------------------------


def _frontier(
    variants: Sequence[Variant], axes: tuple[Axis, Axis], series: dict[str, int]
) -> Markup:
    plot = Plot(*axes, "faithfulness over edges", width=390, height=270)
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
    return plot.svg()


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


# --- tables -------------------------------------------------------------------------------


def _numbers(variant: Variant) -> tuple[str, ...]:
    """A variant's row of the summary."""
    overlap = variant.overlap(variant)
    return (
        f"{len(variant.rows):,}",
        _span(variant, "n_edges_kept", ",.0f"),
        _span(variant, "faithfulness", ".3f"),
        _span(variant, "faithfulness_seen", ".3f"),
        "-" if overlap is None else f"{overlap:.2f}",
        f"{sum(variant.mean(name) or 0.0 for name in SECONDS[:3]):.3g}",
    )


def _span(variant: Variant, column: str, how: str) -> str:
    known = [row.found[column] for row in variant.rows if row.found.get(column) is not None]
    if not known:
        return "-"
    low, high = min(known), max(known)
    of = f" of {len(known)} runs" if len(known) < len(variant.rows) else ""
    ends = f" ({low:{how}} to {high:{how}})" if len(known) > 1 and low < high else ""
    return f"{sum(known) / len(known):{how}}{ends}{of}"


def _run(row: Row, words: Sequence[str]) -> dict[str, Any]:
    """A run that did not fail; its numbers as they are sorted, and as they are read."""
    found = [row.found.get(name) for name in _NUMBERS]
    return {
        "name": row.cell.name,
        "address": f"cells/{quote(row.cell.name)}/circuit.svg",
        "words": [
            Path(row.found[name]).name if name in ("task", "model") else str(row.found[name])
            for name in words
        ],
        "numbers": [
            *(("", "-") if value is None else (repr(value), said(value)) for value in found),
            (repr(row.seconds), said(row.seconds)),
        ],
    }
