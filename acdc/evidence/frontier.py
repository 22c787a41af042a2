"""The frontier of circuit size and faithfulness: what ``acdc sweep`` writes.

A folder holds ``sweep.json`` (settings, one row per threshold, versions, timings),
``frontier.csv``, ``frontier.svg`` and ``frontier.png``, and one circuit per threshold,
``circuit-<threshold>.json``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from acdc.dictionaries.sources import names_cross_layer
from acdc.engine.incremental import ONE_CIRCUIT
from acdc.errors import OptionError
from acdc.executors import HERE, Resources
from acdc.measure.evaluation import Evaluator
from acdc.methods import METHODS
from acdc.methods.acdc import expected_changes, widened
from acdc.methods.candidates import narrow
from acdc.methods.sweep import sweep as sweep_thresholds
from acdc.runs.building import with_constants
from acdc.runs.checks import check_discovery
from acdc.runs.claim import Claim, Claims
from acdc.runs.discover import circuit_info, prepare
from acdc.runs.folder import Timer, versions, write_folder
from acdc.runs.forecast import Forecast
from acdc.runs.given import settings_of
from acdc.runs.many import ALONE, all_of, check_named
from acdc.runs.prompts import split_prompts
from acdc.runs.reporter import Reporter, Silent
from acdc.settings import Settings, check_count
from acdc.terminal.shown import Shown
from graphs import Circuit
from graphs.files.formats import save_circuit
from graphs.files.whole import write_json, write_whole
from graphs.text import said, short

__all__ = ["Frontier", "Point", "check_thresholds", "sweep"]

_DEFAULT_FRACTIONS = tuple(float(x) for x in np.geomspace(0.1, 0.001, 10))


@dataclass(frozen=True)
class Point:
    """One threshold's circuit.

    Parameters
    ----------
    threshold
        Tau, in the metric's unit.
    circuit
        What ACDC finds.
    claim
        Its metric and faithfulness, on prompts of the search and on others.
    """

    threshold: float
    circuit: Circuit
    claim: Claim

    def __repr__(self) -> str:
        return (
            f"<Point: threshold {self.threshold:.3g}, {self.circuit.n_edges:,} edges, "
            f"faithfulness {said(self.claim.faithfulness)}>"
        )

    def row(self) -> dict[str, Any]:
        """Plain values for a table."""
        return {
            "threshold": self.threshold,
            "n_edges_kept": self.circuit.n_edges,
            "n_edges_total": self.circuit.graph.n_edges,
            **asdict(self.claim.evaluation),
            "faithfulness": self.claim.faithfulness,
            "faithfulness_seen": self.claim.faithfulness_seen,
        }


@dataclass(frozen=True, eq=False)
class Frontier(Shown):
    """A finished sweep.

    Parameters
    ----------
    settings
        What was asked.
    points
        By ascending threshold.
    timings
        Seconds of ``load``, ``discover`` and ``evaluate``.
    details
        Counts of work, number of prompts.
    """

    settings: Settings
    points: tuple[Point, ...]
    timings: dict[str, float]
    details: dict[str, Any]

    def __repr__(self) -> str:
        s, sizes = self.settings, [point.circuit.n_edges for point in self.points]
        return short(
            f"<Frontier of {s.method} on {s.task}: {len(sizes)} thresholds, {min(sizes):,} to "
            f"{max(sizes):,} edges>"
        )

    def rows(self) -> list[dict[str, Any]]:
        """One plain row per threshold."""
        return [point.row() for point in self.points]

    def summary(self) -> dict[str, Any]:
        """Content of ``sweep.json``."""
        return {
            **self.settings.plain(),
            **self.details,
            "points": self.rows(),
            "timings": self.timings,
            "versions": versions(),
        }

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the folder, all files or none; errors as :meth:`acdc.runs.folder.Run.save`."""
        return write_folder(folder, self._write, overwrite=overwrite)

    def _write(self, folder: Path) -> None:
        for point in self.points:
            save_circuit(point.circuit, folder / f"circuit-{point.threshold:.4g}.json")
        rows = self.rows()
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(folder / "frontier.csv", text.getvalue())
        for kind in ("svg", "png"):
            write_whole(folder / f"frontier.{kind}", _plot(self, kind))
        write_json(folder / "sweep.json", self.summary())


def check_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
    """Return the thresholds ascending; OptionError unless they are finite and above 0."""
    check_count("number of thresholds", len(thresholds), at_most=1000)
    for tau in thresholds:
        if not (np.isfinite(tau) and tau > 0):
            raise OptionError(f"threshold {tau}: expected a finite number above 0, as 0.01")
    names = [f"{tau:.4g}" for tau in thresholds]
    if len(set(names)) < len(names):
        raise OptionError(f"thresholds {', '.join(names)}: expected each once (to four digits)")
    return tuple(sorted(thresholds))


def sweep(
    task: Any,
    thresholds: Sequence[float] | None = None,
    *,
    resources: Resources = ALONE,
    reporter: Reporter | None = None,
    memory: int = 1 << 30,
    **settings: Any,
) -> Frontier:
    """Run ACDC over thresholds and measure every circuit.

    Parameters
    ----------
    task
        As of :func:`acdc.discover`.
    thresholds
        Taus above 0; None: ten from 10 % to 0.1 % of the metric's gap between full and empty.
    resources
        Where, and in how many parts at a time: see :class:`acdc.executors.Resources`.  The
        thresholds of a part share their work, so parts take less time and more work.
    reporter, memory
        As in :func:`acdc.runs.discover.discover`.
    **settings
        Fields of :class:`acdc.settings.Settings`, and options of ``acdc``.
    """
    reporter = reporter or Silent()
    asked = check_discovery(settings_of(task, method="acdc", **settings)).replace(n_select=0)
    if asked.saes is not None and names_cross_layer(asked.saes):
        raise OptionError(ONE_CIRCUIT)
    check_named(asked, resources)
    taus = None if thresholds is None else check_thresholds(thresholds)
    if resources.name == HERE:
        return _swept(asked, taus, memory, reporter)
    if taus is None:
        taus = _default_taus(_prepared(asked, memory, Timer(), reporter))
    n_parts = min(resources.jobs, len(taus))
    parts = [tuple(part.tolist()) for part in np.array_split(taus, n_parts)]
    with reporter.phase("sweep in parts", n_parts):
        found = all_of(
            _part, [(asked, part, memory) for part in parts], resources, reporter.advance
        )
    return _joined(found)


def _part(item: tuple[Settings, tuple[float, ...], int]) -> Frontier:
    return _swept(*item, Silent())


def _swept(
    asked: Settings, taus: tuple[float, ...] | None, memory: int, reporter: Reporter
) -> Frontier:
    """Run ACDC over thresholds in this process."""
    timer = Timer()
    prepared = _prepared(asked, memory, timer, reporter)
    taus, evaluator = taus or _default_taus(prepared), prepared.evaluator
    experiment, whole = evaluator.experiment, evaluator.experiment.graph
    options = METHODS["acdc"].configured(asked)
    candidates = np.ones(whole.n_edges, dtype=bool)
    narrowed = narrow(experiment, options.candidates, memory)
    if narrowed is not None:
        experiment, candidates = narrowed
    total = len(taus) * experiment.graph.n_edges
    reporter.say(f"takes {prepared.forecast}")
    with timer.phase("discover"), reporter.phase("discover (acdc)", total):
        expected = expected_changes(experiment, options, memory)
        circuits, work = sweep_thresholds(
            experiment, taus, expected=expected, memory=memory, progress=reporter.advance
        )
    points = []
    with timer.phase("evaluate"), reporter.phase("evaluate", len(taus)):
        for tau, found in circuits.items():
            circuit = found if narrowed is None else widened(found, whole, candidates)
            claim = prepared.claims.of(circuit, evaluator.evaluate(circuit.in_circuit))
            info = circuit_info(experiment, asked, claim.faithfulness)
            points.append(Point(tau, replace(circuit, info={**circuit.info, **info}), claim))
            reporter.advance(1)
    details = {
        "n_prompts": len(experiment.task),
        "prompts": prepared.claims.prompts,
        "warnings": list(prepared.warnings),
        "guess": options.guess,
        "work": asdict(work),
    }
    return Frontier(asked, tuple(points), timer.seconds, details)


@dataclass(frozen=True)
class _Prepared:
    """A model on a task's prompts, and what its circuits are held against."""

    evaluator: Evaluator
    claims: Claims
    forecast: Forecast
    warnings: tuple[str, ...]


def _prepared(asked: Settings, memory: int, timer: Timer, reporter: Reporter) -> _Prepared:
    with timer.phase("load"), reporter.phase("load model and task", None):
        able, experiment, _, tokenizer, forecast = prepare(asked, memory)
    experiment = with_constants(experiment, memory, reporter)
    with timer.phase("load"):
        evaluator = Evaluator(experiment, memory)
        claims = Claims(experiment, split_prompts(asked, experiment, tokenizer), able)
    return _Prepared(evaluator, claims, forecast, (*able.doubts, *claims.split.warnings))


def _default_taus(prepared: _Prepared) -> tuple[float, ...]:
    evaluator = prepared.evaluator
    gap = abs(evaluator.full - evaluator.empty)
    if not gap:
        raise OptionError(
            f"metric {evaluator.experiment.metric.name!r} is {evaluator.full:g} with every edge "
            "and with none: say with --thresholds which taus to try"
        )
    return tuple(sorted(fraction * gap for fraction in _DEFAULT_FRACTIONS))


def _joined(parts: Sequence[Frontier]) -> Frontier:
    """Parts of one sweep as a whole; seconds and counts of work are sums."""
    first = parts[0]
    work = {
        name: sum(part.details["work"][name] for part in parts) for name in first.details["work"]
    }
    seconds = {name: sum(part.timings[name] for part in parts) for name in first.timings}
    points = tuple(point for part in parts for point in part.points)
    return Frontier(first.settings, points, seconds, {**first.details, "work": work})


def _plot(frontier: Frontier, kind: str) -> bytes:
    """Faithfulness over circuit size, one labelled point per threshold."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    key, seen = "faithfulness", "faithfulness_seen"
    if all(row[key] is None for row in frontier.rows()):
        key = seen
    rows = [row for row in frontier.rows() if row[key] is not None]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "acdc"}):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(1, color="0.7", linewidth=1)
        sizes = [max(row["n_edges_kept"], 0.5) for row in rows]
        axes.plot(sizes, [row[seen] for row in rows], ":", color="0.5", label="prompts seen")
        if key != seen:
            axes.plot(sizes, [row[key] for row in rows], "o-", color="#0072b2", label="unseen")
        axes.legend(loc="lower right", frameon=False, fontsize=8)
        for i, (size, row) in enumerate(zip(sizes, rows, strict=True)):
            axes.annotate(
                f"{row['threshold']:.2g}",
                (size, row[key]),
                xytext=(0, 7 if i % 2 else -14),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axes.set_xscale("log")
        axes.set_xlabel(f"edges kept (of {frontier.points[0].circuit.graph.n_edges:,})")
        axes.set_ylabel(f"faithfulness ({frontier.settings.metric})")
        name = f"{frontier.settings.task} · {frontier.settings.model}: ACDC by threshold"
        axes.set_title(name, fontsize=11)
        axes.margins(y=0.15)
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
    return buffer.getvalue()
