"""Whether every method finds the known circuit of every model, and how faithful it is.

Subjects are the models whose circuit is known (each reference file beside a model, under the
ablation that it is true for) and the bundled ones, whose circuit nobody knows.  A *cell* is one
method on one subject.  Each cell is written as soon as it is done, with everything that it
depends on (its *request*); what is there already and agrees is not done again.

================  ============================================================================
agreement         on the items that the reference fixes (edges, or pairs of nodes) and on nodes:
                  ROC and AUROC (:func:`graphs.known.roc.sweep_roc` for ACDC over thresholds,
                  :func:`graphs.known.roc.roc_curve` of absolute scores for the others), average
                  precision, the best circuit's missed and extra items, and what random scores
                  get (:func:`graphs.known.chance.chance_of_ranking`)
curves            CPR and CMD, see :mod:`acdc.measure.curves`
sizes             of the smallest circuit with faithfulness 0.9 and 0.95
================  ============================================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.errors import OutputError, UnknownNameError
from acdc.evidence.references import REFERENCES
from acdc.executors import Resources
from acdc.measure.curves import Curve, ranked_scores, score_curve, smallest_faithful, sweep_curve
from acdc.measure.evaluation import Evaluator
from acdc.methods import METHODS
from acdc.methods.acdc import TWO_SIDED
from acdc.methods.sweep import sweep
from acdc.models import load_model, resolve_device
from acdc.runs.folder import versions
from acdc.runs.many import ALONE, results_of
from acdc.tasks import DEFAULT_METRIC, load_task
from benchmarks.measure import conditions, timed
from benchmarks.shortcuts import MODELS as SHORTCUTS
from graphs import Reference, prune, read_reference
from graphs.files.whole import MIB, json_text, read_json, write_whole
from graphs.known.chance import chance_of_ranking
from graphs.known.roc import (
    MIB_FRACTIONS,
    Items,
    Roc,
    auroc,
    average_precision,
    best_circuit,
    best_cut,
    counts,
    items,
    mib_roc,
    roc_curve,
    sweep_roc,
    sweep_scores,
)

__all__ = ["Plan", "Subject", "Table", "add_random", "measure", "subjects"]

FORMAT = "acdc-bench-accuracy"
VERSION = 1
_MOST_BYTES = 256 * MIB
_CELL: dict[str, Any] = {
    "subject": str, "method": str, "model": str, "request": dict, "areas": dict, "curves": dict,
    "sizes": dict, "n_edges": int, "seconds": (int, float),
}  # fmt: skip
SEED = 0
LEVELS = (0.9, 0.95)
_N_RANDOM = 100

Mask = NDArray[np.bool_]
Scores = NDArray[np.float64]

_SHORTCUT_TASKS = {"ioi-small": "ioi", "docstring-small": "docstring"}
_METRICS = {"compiled": "mse", "planted": "logit_diff", "trained": "logit_diff"}
"""By where a model was made: benchmarks/<where>/models/<name>."""


@dataclass(frozen=True)
class Subject:
    """A model on a task under an ablation, with its known circuit if there is one.

    Parameters
    ----------
    name
        Of the reference, or of the model where there is none.
    model
        Folder.
    task
        Built-in task or file.
    metric, intervention, direction
        What is measured, and what ablated edges carry.
    reference
        The known circuit.
    """

    name: str
    model: Path
    task: str
    metric: str
    intervention: str = "resample"
    direction: str = "noising"
    reference: Reference | None = field(default=None, compare=False)

    @property
    def splits(self) -> dict[str, bool]:
        """Granularity of the graph, which is that of the reference."""
        if self.reference is None:
            return {"split_qkv": True, "split_embed": False}
        shape = self.reference.graph.shape
        return {"split_qkv": shape.split_qkv, "split_embed": shape.split_embed}


def subjects(references: Mapping[str, Path] = REFERENCES) -> dict[str, Subject]:
    """Return every subject by name.

    A reference file in a model's folder makes one, with the pairs beside it as the task; files
    of published circuits, whose models are elsewhere, do not.
    """
    found = {}
    for name, path in references.items():
        if (path.parent / "config.json").is_file():
            found[name] = _known_subject(name, path)
    for model, task in _SHORTCUT_TASKS.items():
        found[model] = Subject(model, SHORTCUTS[model], task, "logit_diff")
    return found


def _every_method() -> tuple[str, ...]:
    """Names of the methods, those that are swept over thresholds first."""
    return tuple(sorted(METHODS, key=lambda name: METHODS[name].over != "circuit"))


def _in_order(methods: Iterable[str]) -> tuple[str, ...]:
    """Methods in the order of the table."""
    return tuple(name for name in _every_method() if name in set(methods))


def _known_subject(name: str, path: Path) -> Subject:
    reference = read_reference(path)
    pairs = path.parent / "pairs.jsonl"
    if not pairs.is_file():
        raise OutputError(f"{pairs}: no such file; a model with a reference has its task beside it")
    return Subject(
        name,
        path.parent,
        str(pairs),
        _METRICS.get(path.parents[2].name, DEFAULT_METRIC),
        reference.ablation.intervention or "resample",
        reference.ablation.direction or "noising",
        reference,
    )


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Parameters
    ----------
    subjects, methods
        By name, in the order of the table.
    thresholds
        Taus of ACDC, as fractions of the metric's gap between the full and the empty circuit.
    n_prompts
        At most so many pairs of each task.
    n_resamples
        Of the bootstrap.
    """

    subjects: dict[str, Subject]
    methods: tuple[str, ...] = field(default_factory=_every_method)
    thresholds: tuple[float, ...] = tuple(float(f"{x:.3g}") for x in np.geomspace(1, 1e-4, 17))
    n_prompts: int = 64
    n_resamples: int = 1000

    @classmethod
    def full(cls) -> Plan:
        """Return the plan of the published figures: all of it."""
        return cls(subjects())

    @classmethod
    def quick(cls) -> Plan:
        """Return a plan of small graphs, few thresholds and methods that train no masks."""
        few = {
            name: subject
            for name, subject in subjects().items()
            if name == "ioi-small" or (subject.reference and subject.reference.graph.n_edges <= 50)
        }
        taus = tuple(float(f"{x:.3g}") for x in np.geomspace(0.3, 1e-3, 6))
        methods = tuple(m for m in _every_method() if "mask_steps" not in METHODS[m].option_names)
        return cls(few, methods, taus, n_prompts=30, n_resamples=100)

    def only(self, names: list[str] | None, methods: list[str] | None) -> Plan:
        """Return the part of a plan with the named subjects (or models) and methods.

        Raises
        ------
        UnknownNameError
            If a name is none of the plan's.
        """
        by_model = {s.model.name for s in self.subjects.values()}
        for name in names or ():
            if name not in by_model | set(self.subjects):
                raise UnknownNameError("model of this plan", name, by_model | set(self.subjects))
        for method in methods or ():
            if method not in METHODS:
                raise UnknownNameError("method", method, METHODS)
        chosen = {
            name: subject
            for name, subject in self.subjects.items()
            if names is None or name in names or subject.model.name in names
        }
        return replace(
            self,
            subjects=chosen,
            methods=self.methods if methods is None else _in_order(methods),
        )

    def request(self, subject: Subject, method: str, device: str) -> dict[str, Any]:
        """Return everything that a cell's result depends on, as plain JSON values."""
        own: dict[str, Any] = {"options": asdict(METHODS[method].options())}
        if METHODS[method].over == "circuit":
            own["thresholds"] = list(self.thresholds)
        reference = subject.reference
        return {
            "version": VERSION,
            "model": subject.model.name,
            "files": _digests(subject),
            "task": Path(subject.task).name,
            "metric": subject.metric,
            "intervention": subject.intervention,
            "direction": subject.direction,
            **subject.splits,
            "reference": None if reference is None else reference.name,
            "granularity": None if reference is None else reference.granularity,
            "method": method,
            **own,
            "n_prompts": self.n_prompts,
            "seed": SEED,
            "fractions": list(MIB_FRACTIONS),
            "n_resamples": self.n_resamples,
            "device": str(resolve_device(device)),
            "versions": versions(),
        }


def _digests(subject: Subject) -> dict[str, str]:
    """Digests of the files that a result depends on."""
    paths = [subject.model / "config.json", subject.model / "model.safetensors"]
    paths += [path for path in (Path(subject.task),) if path.is_file()]
    found = {path.name: path.read_bytes() for path in paths}
    if subject.reference is not None:
        known = subject.reference
        content = [known.granularity, known.edges, known.optional_nodes, known.nodes]
        found["reference"] = json.dumps(content).encode()
    return {name: hashlib.sha256(data).hexdigest()[:16] for name, data in found.items()}


# --- what is stored -----------------------------------------------------------------------


class Table:
    """Cells by (subject, method), stored in ``results.json`` of a folder after each one.

    Parameters
    ----------
    folder
        Made if it is not there.

    Raises
    ------
    OutputError
        If the folder is a file, or its ``results.json`` is not one of this benchmark.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.json"
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"output {str(folder)!r} is a file, give a folder")
        self.cells: dict[tuple[str, str], dict[str, Any]] = {}
        if self.path.exists():
            self.cells = {(c["subject"], c["method"]): c for c in read_cells(self.path)}

    def finished(self, subject: str, method: str, request: dict[str, Any]) -> bool:
        """Whether a cell is there that was asked for with the same request."""
        cell = self.cells.get((subject, method))
        return cell is not None and cell["request"] == request

    def add(self, cell: dict[str, Any], device: str) -> None:
        """Put a cell in its place and write the file, whole."""
        self.cells[cell["subject"], cell["method"]] = cell
        order = {name: i for i, name in enumerate([*subjects(), *_every_method()])}
        last = len(order)
        keys = sorted(
            self.cells, key=lambda key: (order.get(key[0], last), key[0], order.get(key[1], last))
        )
        self.cells = {key: self.cells[key] for key in keys}
        head = {
            "format": FORMAT,
            "version": VERSION,
            "conditions": conditions(resolve_device(device)),
        }
        lines = ",\n".join(json_text(cell) for cell in self.cells.values())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, f'{json_text(head)[:-1]},\n"cells": [\n{lines}\n]}}\n')


def read_cells(path: Path) -> list[dict[str, Any]]:
    """Return the cells of a ``results.json``.

    Raises
    ------
    OutputError
        If it is none of this benchmark and version, or cannot be read.
    """
    content = read_json(path, _MOST_BYTES, OutputError)
    is_ours = isinstance(content, dict) and content.get("format") == FORMAT
    if (
        not is_ours
        or content.get("version") != VERSION
        or not isinstance(content.get("cells"), list)
    ):
        raise OutputError(
            f"{path} holds no results of this benchmark (format {FORMAT!r}, version {VERSION}): "
            "choose another folder with --out"
        )
    for number, cell in enumerate(content["cells"], 1):
        wrong = [
            key
            for key, kind in _CELL.items()
            if not isinstance(cell, dict) or not isinstance(cell.get(key), kind)
        ]
        if wrong:
            raise OutputError(
                f"{path}: cell {number} has no {wrong[0]!r} as a result has it: choose another "
                "folder with --out"
            )
    return content["cells"]


# --- measuring ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Found:
    """What a method says: a score of each edge, and circuits where it is a sweep."""

    scores: Scores
    masks: tuple[Mask, ...] = ()


@dataclass(frozen=True)
class _Asked:
    """What one cell is measured from."""

    subject: Subject
    method: str
    plan: Plan
    device: str


def measure(
    plan: Plan, table: Table, device: str = "cpu", resources: Resources = ALONE
) -> Iterator[dict[str, Any]]:
    """Fill a table with the cells of a plan that it lacks, and yield each one.

    Parameters
    ----------
    plan
        Subjects and methods.
    table
        Where cells are stored.
    device
        Where models run.
    resources
        Where cells are measured, and how many at a time.

    Raises
    ------
    ProcessError
        If a worker dies of a cell, twice; what is measured is stored.
    """
    asked = []
    for name, subject in plan.subjects.items():
        for stored in [cell for key, cell in table.cells.items() if key[0] == name]:
            if add_random(subject, stored):
                table.add(stored, device)
        missing = (
            m for m in plan.methods if not table.finished(name, m, plan.request(subject, m, device))
        )
        asked += [_Asked(subject, method, plan, device) for method in missing]
    for place, cell in results_of(_measured, asked, resources):
        table.add(cell, device)
        yield table.cells[asked[place].subject.name, asked[place].method]


def _measured(asked: _Asked) -> dict[str, Any]:
    subject, method, plan, device = asked.subject, asked.method, asked.plan, asked.device
    evaluator = _evaluator(subject, plan.n_prompts, device)
    seconds, found = timed(partial(_find, evaluator, method, plan), resolve_device(device))
    return _rounded(
        {
            "subject": subject.name,
            "method": method,
            **_cell(subject, evaluator, found, plan.n_resamples),
            "seconds": round(seconds, 3),
            "request": plan.request(subject, method, device),
        }
    )


@lru_cache(maxsize=1)
def _evaluator(subject: Subject, n_prompts: int, device: str) -> Evaluator:
    """The subject's, for its methods one after the other."""
    return Evaluator(_experiment(subject, n_prompts, device))


def _experiment(subject: Subject, n_prompts: int, device: str) -> Experiment:
    model, tokenizer = load_model(
        str(subject.model),
        device=device,
        split_qkv=subject.splits["split_qkv"],
        split_embed=subject.splits["split_embed"],
    )
    task = load_task(
        subject.task,
        tokenizer,
        n_prompts=None if Path(subject.task).is_file() else n_prompts,
        seed=SEED,
        d_vocab=model.d_vocab,
        d_vocab_out=model.d_vocab_out,
        n_ctx=model.n_ctx,
    )
    return Experiment(
        model,
        replace(task, pairs=task.pairs[:n_prompts]),
        get_metric(subject.metric),
        intervention=subject.intervention,  # type: ignore[arg-type]  # checked by the reference
        direction=subject.direction,  # type: ignore[arg-type]  # likewise
    )


def _find(evaluator: Evaluator, method: str, plan: Plan) -> _Found:
    experiment, how = evaluator.experiment, METHODS[method]
    if how.over != "circuit":
        return _Found(how.scores(experiment))
    gap = abs(evaluator.full - evaluator.empty)
    taus = [fraction * gap for fraction in plan.thresholds]
    if method in ("acdc", TWO_SIDED):
        circuits, _ = sweep(experiment, taus, two_sided=method == TWO_SIDED)
    else:
        circuits = {tau: how.find(experiment, threshold=tau).circuit for tau in taus}
    masks = tuple(circuits[tau].in_circuit for tau in taus)
    return _Found(sweep_scores(taus, masks), masks)


def _cell(
    subject: Subject, evaluator: Evaluator, found: _Found, n_resamples: int
) -> dict[str, Any]:
    experiment, reference = evaluator.experiment, subject.reference
    cell: dict[str, Any] = {
        "model": subject.model.name,
        "n_edges": experiment.graph.n_edges,
        "n_prompts": len(experiment.task),
        "metric": {"full": evaluator.full, "empty": evaluator.empty},
    }
    if reference is not None:
        optional = reference.optional_nodes
        if reference.granularity != "nodes":
            edges = items(experiment.graph, reference.granularity, optional)
            cell["edges"] = _agreement(edges, edges.mask(reference.mask()), found)
            if reference.granularity == "edges" and not optional:
                curve = mib_roc(experiment.graph, reference.mask(), found.scores)
                cell["edges"]["auroc_mib"] = curve.area
        nodes = items(experiment.graph, "nodes", optional)
        cell["nodes"] = _agreement(nodes, nodes.named(reference.nodes), found)
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": SEED}
    if found.masks:
        curves = [sweep_curve(evaluator, found.masks, **options)]
    else:
        curves = [
            score_curve(evaluator, found.scores, r, **options) for r in ("signed", "absolute")
        ]
    cell["curves"] = {curve.ranking: _columns(curve) for curve in curves}
    cell["areas"] = {
        f"{a.measure} {a.ranking} {a.axis} {a.size}": [a.value, a.low, a.high]
        for curve in curves
        for a in curve.areas()
    }
    cell["sizes"] = {f"{level:g}": _size(subject, evaluator, found, level) for level in LEVELS}
    return cell


def _agreement(scored: Items, truth: Mask, found: _Found) -> dict[str, Any]:
    """How a method's result agrees with the truth ``[item]``."""
    known = {"granularity": scored.granularity, "n_items": len(scored), "n_true": int(truth.sum())}
    if not truth.any() or truth.all():
        return {**known, "auroc": None, "average_precision": None}
    ranked = scored.scores(found.scores)
    if found.masks:
        masks = [scored.mask(mask) for mask in found.masks]
        curve, best = sweep_roc(truth, masks), masks[best_circuit(truth, masks)]
    else:
        curve, best = roc_curve(truth, ranked), best_cut(truth, ranked)
    agreement = counts(truth, best)
    return {
        **known,
        "random": _random(scored, truth, len(found.scores)),
        "auroc": curve.area,
        "auroc_of_ranking": auroc(truth, ranked),
        "average_precision": average_precision(truth, ranked),
        "best_f1": agreement.f1,
        "missed": [scored.names[i] for i in np.flatnonzero(truth & ~best)],
        "extra": [scored.names[i] for i in np.flatnonzero(~truth & best)],
        "roc": _corners(curve),
    }


def _random(scored: Items, truth: Mask, n_edges: int) -> dict[str, float]:
    """AUROC and average precision of random scores of the edges, on the mean."""
    scores = np.random.default_rng(SEED).random(n_edges)
    found = chance_of_ranking(scored, truth, scores, n=_N_RANDOM, seed=SEED)
    return {name: chance.mean for name, chance in found.items()}


def add_random(subject: Subject, cell: dict[str, Any]) -> bool:
    """Put what random scores get into a stored cell that lacks it; whether it did."""
    reference, added = subject.reference, False
    if reference is None:
        return False
    optional, graph = reference.optional_nodes, reference.graph
    for part in ("edges", "nodes"):
        known = cell.get(part, {})
        if known.get("auroc") is None or "random" in known:
            continue
        scored = items(graph, known["granularity"], optional)
        by_name = part == "nodes"
        truth = scored.named(reference.nodes) if by_name else scored.mask(reference.mask())
        known["random"] = _rounded(_random(scored, truth, graph.n_edges))
        added = True
    return added


def _corners(curve: Roc) -> dict[str, Any]:
    """Points of a curve without those in the middle of a straight line; of stairs, all."""
    x, y = curve.fpr, curve.tpr
    turns = np.diff(x)[:-1] * np.diff(y)[1:] - np.diff(x)[1:] * np.diff(y)[:-1]
    inner = np.full(len(turns), True) if curve.stairs else np.abs(turns) > 1e-12
    keep = np.concatenate([[True], inner, [True]])
    return {"stairs": curve.stairs, "fpr": x[keep].tolist(), "tpr": y[keep].tolist()}


def _columns(curve: Curve) -> dict[str, Any]:
    points = curve.points()
    names = ("fraction", "n_edges", "faithfulness", "low", "high")
    return {name: [getattr(point, name) for point in points] for name in names}


def _size(
    subject: Subject, evaluator: Evaluator, found: _Found, level: float
) -> dict[str, Any] | None:
    """The smallest faithful circuit, and the nodes of the reference that it lacks."""
    graph = evaluator.experiment.graph
    if found.masks:
        pruned = (prune(graph, mask) for mask in found.masks)
        known = sorted([*pruned, np.ones(graph.n_edges, dtype=bool)], key=lambda m: int(m.sum()))
        mask = next(m for m in known if (evaluator.faithfulness(m) or 0) >= level)
    else:
        ranked = ranked_scores(evaluator.experiment, found.scores, "absolute")
        mask = smallest_faithful(evaluator, ranked, level)
    size: dict[str, Any] = {"n_edges": int(mask.sum())}
    if subject.reference is not None:
        nodes = items(graph, "nodes", subject.reference.optional_nodes)
        missed = nodes.named(subject.reference.nodes) & ~nodes.mask(mask)
        size["missed_nodes"] = [nodes.names[i] for i in np.flatnonzero(missed)]
    return size


def _rounded(value: Any) -> Any:
    """Six significant digits, so that tables do not depend on the last bits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
