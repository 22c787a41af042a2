"""CPR and CMD on prompts that scores never saw: methods, ensembles, and ways to choose edges.

Scores come from some prompts of a task, circuits of MIB's sizes are chosen by them, and their
faithfulness is measured on others.  Every figure stands beside that of plain ``eap-ig``: both are
measured on the same prompts and resampled together, so that the difference has an interval of its
own (95 %, percentile bootstrap over prompts).  A way is better than eap-ig where that interval lies
on the right side of 0, and worse where it lies on the other.

=========  ========================================================================================
``CPR``    area under faithfulness, by signed scores where there are signs; higher is better
``CMD``    area between faithfulness and 1, by absolute scores; lower is better
``log``    the same over the logarithm of size, divided by its width: small circuits count as much
=========  ========================================================================================

ACDC gives circuits over thresholds, which have no ranking: at each size the largest of at most so
many edges.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from acdc.engine.experiment import Experiment
from acdc.errors import UnknownNameError
from acdc.measure.curves import Curve, choice_curve, score_curve, sweep_curve, trapezoid
from acdc.measure.evaluation import Evaluator, interval
from acdc.methods import METHODS, Method, Score
from acdc.methods.acdc import TWO_SIDED
from acdc.methods.select import Chooser, Selection
from acdc.methods.signs import stable_signs
from acdc.methods.sweep import sweep
from acdc.runs.building import load_experiment
from acdc.runs.checks import check_discovery
from acdc.runs.prompts import draw
from acdc.settings import Settings
from benchmarks.results import write_results
from benchmarks.unseen import FRESH_SEED

__all__ = [
    "BASE",
    "WAYS",
    "Area",
    "Plan",
    "Row",
    "Way",
    "markdown",
    "measure",
    "run_table",
    "write",
]

FORMAT, VERSION = "acdc-bench-areas", 1

BASE = "eap-ig"
"""What every way is held against."""

_AREAS = {
    "CPR": ("signed", "linear"),
    "CMD": ("absolute", "linear"),
    "CPR log": ("signed", "log"),
    "CMD log": ("absolute", "log"),
}
_THRESHOLDS = tuple(float(f"{x:.3g}") for x in np.geomspace(1, 1e-4, 17))  # of the metric's gap

Mask = NDArray[np.bool_]
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Way:
    """A way from prompts to circuits.

    Parameters
    ----------
    method
        By name.
    options
        Of the method.
    select
        Fields of :class:`acdc.methods.select.Selection`; None: the top of the ranking, pruned, as
        MIB does.
    stable
        Share of draws in which a sign must be the same, None for any.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    select: dict[str, Any] | None = None
    stable: float | None = None


WAYS: dict[str, Way] = {
    **{
        name: Way(name)
        for name in (
            "eap-ig", "eap", "eap-ig-activations", "clean-corrupted", "gim", "relp", "exact",
            "ifr", "nap", "nap-ig", "hisp", "acdc", TWO_SIDED, "eap-acdc",
        )
    },
    "relp + frozen attention": Way("relp", {"freeze_attention": True}),
    "ensemble": Way("ensemble"),
    "ensemble + ranks": Way("ensemble", {"combine": "ranks"}),
    "ensemble of eap-ig gim relp": Way("ensemble", {"of": "eap-ig,gim,relp"}),
    "ensemble of eap-ig gim relp + ranks": Way(
        "ensemble", {"of": "eap-ig,gim,relp", "combine": "ranks"}
    ),
    "eap-ig + connected": Way("eap-ig", select={}),
    "eap-ig + greedy": Way("eap-ig", select={"how": "greedy"}),
    "eap-ig + milp": Way("eap-ig", select={"how": "milp"}),
    "eap-ig + stable 0.95": Way("eap-ig", select={}, stable=0.95),
    "eap-ig + milp + stable 0.95": Way("eap-ig", select={"how": "milp"}, stable=0.95),
    "eap-ig + positive 0.8": Way("eap-ig", select={"positive": 0.8}),
    "eap-ig + milp + positive 0.8": Way("eap-ig", select={"how": "milp", "positive": 0.8}),
    "ensemble + milp": Way("ensemble", select={"how": "milp"}),
    "subnetwork-probing": Way("subnetwork-probing"),
    "edge-pruning": Way("edge-pruning"),
    "edge-pruning + warm start": Way("edge-pruning", {"warm_start": "eap-ig"}),
}  # fmt: skip
"""Every way by name."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Parameters
    ----------
    tasks
        Built-in ones whose model is bundled.
    ways
        Of :data:`WAYS`.
    n_fit, n_test
        Prompts that scores see, and others (a task may have no more).
    n_resamples
        Of the bootstrap.
    """

    tasks: tuple[str, ...]
    ways: tuple[str, ...] = tuple(WAYS)
    n_fit: int = 64
    n_test: int = 256
    n_resamples: int = 1000

    def __post_init__(self) -> None:
        for way in self.ways:
            if way not in WAYS:
                raise UnknownNameError("way", way, WAYS)


@dataclass(frozen=True)
class Area:
    """An area and its difference to that of :data:`BASE`, each with its 95 % interval.

    Parameters
    ----------
    value, low, high
        Of the way.
    more, more_low, more_high
        How much more it is than plain eap-ig's, on the same prompts.
    """

    value: float
    low: float
    high: float
    more: float
    more_low: float
    more_high: float

    def verdict(self, measure: str) -> str:
        """``better`` or ``worse`` than eap-ig beyond the interval, or nothing."""
        sign = 1 if measure.startswith("CPR") else -1
        low, high = sorted((sign * self.more_low, sign * self.more_high))
        return "better" if low > 0 else "worse" if high < 0 else ""


@dataclass(frozen=True)
class Row:
    """One way on one task.

    Parameters
    ----------
    task, way
        Which.
    n_fit, n_test
        Prompts.
    seconds
        Of scores and selection.
    areas
        By name.
    """

    task: str
    way: str
    n_fit: int
    n_test: int
    seconds: float
    areas: dict[str, Area]


def measure(plan: Plan, device: str = "cpu") -> Iterator[Row]:
    """Measure every way on every task."""
    for task in plan.tasks:
        yield from _rows(task, plan, device)


def _rows(task: str, plan: Plan, device: str) -> Iterator[Row]:
    asked = Settings.of(task, method=BASE, n_prompts=plan.n_fit, device=device)
    settings = check_discovery(asked)
    experiment, tokenizer = load_experiment(settings)
    known = [pair.clean for pair in experiment.task.pairs]
    seeds = iter(range(FRESH_SEED, FRESH_SEED + 100))
    unseen = draw(settings, experiment.model, tokenizer, plan.n_test, known, seeds)
    assert unseen is not None, f"{task} has no prompts beside the {plan.n_fit} that scores see"
    evaluator = Evaluator(experiment.on(unseen))
    base = _curves(WAYS[BASE], experiment, evaluator, plan.n_resamples)
    for name in plan.ways:
        begun = time.perf_counter()
        curves = _curves(WAYS[name], experiment, evaluator, plan.n_resamples)
        found = {area: _area(curves, base, area) for area in _AREAS}
        seconds = round(time.perf_counter() - begun, 2)
        yield Row(task, name, len(known), len(unseen), seconds, found)


def _curves(
    way: Way, experiment: Experiment, evaluator: Evaluator, n_resamples: int
) -> dict[str, Curve]:
    """A curve of unseen prompts by ranking."""
    method = METHODS[way.method]
    if method.over == "circuit":
        curve = sweep_curve(evaluator, _circuits(way.method, experiment), n_resamples=n_resamples)
        return {"signed": curve, "absolute": curve}
    asked = method.options(**way.options)
    scores = method.scores(experiment, asked)
    if way.select is None:
        found = {
            ranking: score_curve(evaluator, scores, ranking, n_resamples=n_resamples)
            for ranking in _rankings(method)
        }
        return {"signed": found["absolute"], **found}
    allowed = None
    if way.stable is not None:
        allowed = stable_signs(
            experiment, lambda few: method.scores(few, asked), scores, way.stable
        )
    selection = Selection(**way.select, allowed=allowed)

    def curve_of(ranking: str) -> Curve:
        choose: Callable[[int], Mask] = Chooser(experiment, scores, selection, ranking)
        return choice_curve(evaluator, choose, ranking, n_resamples=n_resamples)

    return {ranking: curve_of(ranking) for ranking in ("signed", "absolute")}


def _rankings(method: Method) -> tuple[str, ...]:
    """Scores without a sign rank by their size alone."""
    return ("absolute",) if method.score is Score.MAGNITUDE else ("absolute", "signed")


def _circuits(method: str, experiment: Experiment) -> Iterable[Mask]:
    evaluator = Evaluator(experiment)
    gap = abs(evaluator.full - evaluator.empty)
    taus = [fraction * gap for fraction in _THRESHOLDS]
    if method == "eap-acdc":
        found = (METHODS[method].find(experiment, threshold=tau).circuit for tau in taus)
    else:
        circuits, _ = sweep(experiment, taus, two_sided=method == TWO_SIDED)
        found = (circuits[tau] for tau in taus)
    return [circuit.in_circuit for circuit in found]


def _area(curves: dict[str, Curve], base: dict[str, Curve], name: str) -> Area:
    ranking, axis = _AREAS[name]
    own, other = (_resampled(one[ranking], name, axis) for one in (curves, base))
    low, high = interval(own[1:])
    more_low, more_high = interval(own[1:] - other[1:])
    figures = (own[0], low, high, own[0] - other[0], more_low, more_high)
    return Area(*(float(f"{float(x):.6g}") for x in figures))


def _resampled(curve: Curve, name: str, axis: str) -> Scores:
    """The area of all prompts, then of each resample; the same for every curve of a task."""
    x = np.array(curve.fractions)
    x = np.log(x) / -np.log(x[0]) if axis == "log" else x
    rows = np.vstack([curve.faithfulness, curve.resampled])
    return trapezoid(x, rows if name.startswith("CPR") else np.abs(1 - rows))


# --- what is written ----------------------------------------------------------------------


def run_table(rows: Sequence[Row]) -> Table:
    """Return the table of the terminal."""
    table = Table(title="CPR and CMD on unseen prompts", title_justify="left")
    for name in ("task", "way", *_AREAS, "seconds"):
        table.add_column(name, justify="left" if name in ("task", "way") else "right")
    for row in rows:
        texts = [_text(row.areas[name], name) for name in _AREAS]
        table.add_row(row.task, row.way, *texts, f"{row.seconds:.1f}")
    return table


def markdown(rows: Sequence[Row], plan: Plan) -> str:
    """Return ``results.md``."""
    lines = [
        "# CPR and CMD on prompts that scores never saw",
        "",
        f"Made by `acdc bench areas`: scores of {plan.n_fit} prompts, circuits measured on up to "
        f"{plan.n_test} others; `results.json` has every interval and the conditions. CPR: higher "
        "is better; CMD: lower is better; log: over the logarithm of size, so that small circuits "
        "count as much. In brackets the 95 % interval of the difference to plain `eap-ig` on the "
        "same prompts; **bold**: better than eap-ig beyond it, *italic*: worse. Intervals are over "
        "the unseen prompts: what other prompts to score on would change is not in them.",
        "",
        "`eap-ig` and other bare methods: the top of the ranking, pruned, as MIB does. "
        "`connected`: its largest connected circuit of that size. `stable` leaves edges "
        "out at every size, and "
        "`milp` by signed scores (CPR) takes none that hinders but to connect others: their "
        "largest circuits are not the model, which costs them on the linear axis.",
        "",
        *(f"- {line}" for line in summary(rows)),
        "",
    ]
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        lines += [f"## {task}, {own[0].n_fit} prompts, {own[0].n_test} unseen", ""]
        lines += [f"| way | {' | '.join(_AREAS)} | seconds |", f"|---|{'---:|' * len(_AREAS)}---:|"]
        for row in own:
            texts = [_text(row.areas[name], name, mark=True) for name in _AREAS]
            lines.append(f"| {row.way} | {' | '.join(texts)} | {row.seconds:.1f} |")
        lines.append("")
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> list[str]:
    """On how many tasks each way is better or worse than eap-ig, by area."""
    tasks = len({row.task for row in rows})
    lines = []
    for name in _AREAS:
        said = []
        for way in dict.fromkeys(row.way for row in rows):
            found = [row.areas[name].verdict(name) for row in rows if row.way == way]
            better, worse = found.count("better"), found.count("worse")
            if better and not worse:
                said.append(f"{way} ({better})")
        lines.append(
            f"{name}: better than eap-ig on some of {tasks} tasks and worse on none: "
            f"{', '.join(said) or 'no way'}."
        )
    return lines


def _text(area: Area, name: str, *, mark: bool = False) -> str:
    sign = {"better": "**", "worse": "*"}.get(area.verdict(name), "") if mark else ""
    return f"{sign}{area.value:.3f}{sign} [{area.more_low:+.3f}, {area.more_high:+.3f}]"


def write(folder: Path, rows: Sequence[Row], plan: Plan, device: str) -> list[str]:
    """Write ``results.json`` and ``results.md``; return their names."""
    ways = {name: asdict(WAYS[name]) for name in plan.ways}
    head = {"format": FORMAT, "version": VERSION, "plan": asdict(plan), "ways": ways}
    return write_results(folder, head, map(asdict, rows), markdown(rows, plan), device)
