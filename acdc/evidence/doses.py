"""Dose and response: patching the components of a circuit with a coefficient.

Attribution scores are slopes: they say what a little patching does, per unit.  How far that holds,
whether it saturates or sets in late, whether too much of it turns round, is the whole curve
(:mod:`acdc.engine.doses` measures it, :mod:`acdc.measure.doses` names its shape).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acdc.engine.doses import edge_doses, node_doses
from acdc.engine.experiment import Experiment
from acdc.engine.work import Work
from acdc.errors import CircuitFileError, OptionError
from acdc.files.objects import JsonObject
from acdc.measure.ability import ability
from acdc.measure.doses import HIGH, LOW, SHAPES, Curve, coefficients
from acdc.measure.evaluation import Evaluator
from acdc.methods.eap import eap
from acdc.methods.nap import nap
from acdc.runs.building import with_constants
from acdc.runs.discover import fit
from acdc.runs.folder import Timer, save_summary, versions
from acdc.runs.opened import RunLike, open_run
from acdc.runs.reporter import Reporter, Silent
from acdc.runs.unseen import PromptChoice
from acdc.settings import Settings, check_count
from acdc.terminal.shown import Shown
from graphs import Circuit, Graph
from graphs.errors import GraphError, did_you_mean
from graphs.files.whole import MIB, read_json
from graphs.text import short

__all__ = ["FILE_NAME", "Doses", "dose", "read_doses"]

FILE_NAME = "dose.json"
"""Doses in the folder of a run, where its report finds them."""

_MOST_CURVES = 100
_MOST_PER_UNIT = 1000
_MOST_BYTES = 256 * MIB
_MOST_SIZE = 1e300


@dataclass(frozen=True, eq=False)
class Doses(Shown):
    """Dose-response curves of a circuit's components.

    Parameters
    ----------
    what
        ``nodes`` or ``edges``.
    curves
        Largest absolute score first.
    coefficients
        At which responses were measured.
    base
        Metric at c = 0: the run that ablation starts from.
    gap
        Metric of that run minus that with every edge ablated.
    bend
        Share off the linear continuation from which on a curve has left it.
    n_left_out
        Components of the circuit with lower scores that were not measured.
    about
        Task, model, metric, intervention, direction, and on which prompts.
    n_prompts
        How many.
    circuit_digest
        Of the circuit.
    warnings
        What one should know before believing it.
    timings
        Seconds by phase.
    """

    what: str
    curves: tuple[Curve, ...]
    coefficients: tuple[float, ...]
    base: float
    gap: float
    bend: float
    n_left_out: int
    about: dict[str, str]
    n_prompts: int
    circuit_digest: str
    warnings: tuple[str, ...]
    timings: dict[str, float]

    @property
    def groups(self) -> dict[str, tuple[Curve, ...]]:
        """Curves by shape, those of none left out."""
        found = {shape: tuple(c for c in self.curves if c.shape == shape) for shape in SHAPES}
        return {shape: curves for shape, curves in found.items() if curves}

    def summary(self) -> dict[str, Any]:
        """Content of ``dose.json``."""
        return {
            **self.about,
            "circuit_digest": self.circuit_digest,
            "what": self.what,
            "n_prompts": self.n_prompts,
            "n_left_out": self.n_left_out,
            "base": self.base,
            "gap": self.gap,
            "bend": self.bend,
            "coefficients": list(self.coefficients),
            "shapes": {shape: [c.name for c in curves] for shape, curves in self.groups.items()},
            "curves": [asdict(curve) for curve in self.curves],
            "warnings": list(self.warnings),
            "timings": self.timings,
            "versions": versions(),
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write :meth:`summary` as ``dose.json`` into a folder, or as a ``.json`` file.

        Raises OutputError if the file exists, unless ``overwrite``, or cannot be written.
        """
        return save_summary(path, FILE_NAME, self.summary(), overwrite=overwrite)

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(curves)} {shape}" for shape, curves in self.groups.items())
        return short(f"<Doses of {len(self.curves)} {self.what} on {self.about['task']}: {counts}>")


def dose(
    run: RunLike,
    names: Sequence[str] = (),
    *,
    edges: bool = False,
    task: Any = None,
    seen: bool = False,
    per_unit: int = 8,
    bend: float = 0.2,
    most: int = _MOST_CURVES,
    memory: int = 1 << 30,
    reporter: Reporter | None = None,
    **asked: Any,
) -> Doses:
    """Measure how the metric answers to doses of a circuit's nodes or edges.

    Parameters
    ----------
    run
        Folder of a run, a circuit file, :class:`acdc.Run` or :class:`graphs.Circuit`.
    names
        Nodes or edges to measure, in the circuit or not; none: those of the circuit.
    edges
        Whether edges are measured; else nodes.
    task
        As of :func:`acdc.discover`; None: the run's.  A circuit that comes alone needs one.
    seen
        Whether to measure on the prompts that discovery saw.
    per_unit
        Coefficients per unit: 8 measures at -1, -0.875, ..., 2.
    bend
        Share off the linear continuation from which on a curve has left it.
    most
        At most so many are measured, those of the largest attribution scores.
    memory
        Bytes for the largest working set beside the weights.
    reporter
        Told of progress.
    **asked
        Fields of :class:`acdc.settings.Settings` that are to be other than the run's.

    Raises
    ------
    OptionError
        If there is nothing to measure, or a value makes no sense.
    GraphError
        If there is no node or edge of a name.

    Examples
    --------
    >>> import acdc
    >>> acdc.dose("runs/ioi").groups["saturating"]  # doctest: +SKIP
    """
    check_count("per_unit", per_unit, at_most=_MOST_PER_UNIT)
    check_count("most", most)
    if not 0 < bend < 1:
        raise OptionError(f"bend {bend:g}: expected a share above 0 and below 1")
    reporter, timer = reporter or Silent(), Timer()
    opened = open_run(run)
    settings = opened.settings(task=task, **asked)
    prompts = PromptChoice(opened.discovery_with(settings), seen)
    with timer.phase("load"), reporter.phase("load model and task", None):
        constants = opened.constants(settings)
        circuit, experiment = fit(opened.circuit, settings, prompts, constants, memory)
    wanted = _wanted(circuit, names, edges)
    experiment = with_constants(experiment, memory, reporter)
    work = Work(memory=memory)
    with timer.phase("attribute"), reporter.phase("attribute", None):
        doubts = ability(experiment).doubts
        scores = (eap if edges else nap)(experiment, work=work)
    chosen = wanted[np.argsort(-np.abs(scores[wanted]), kind="stable")][:most]
    at = coefficients(per_unit)
    with timer.phase("measure"), reporter.phase("doses", len(chosen) * len(experiment.task)):
        measure = edge_doses if edges else node_doses
        values, slopes = measure(experiment, chosen, at, memory, reporter.advance)
        evaluator = Evaluator(experiment)
        base = experiment.plain("clean" if experiment.direction == "noising" else "corrupt")
        gap = base - evaluator.empty
    graph = experiment.graph
    labels = graph.edge_names(chosen) if edges else [graph.senders[u] for u in chosen]
    rows = zip(labels, scores[chosen].tolist(), slopes.tolist(), values, strict=True)
    curves = tuple(Curve.of(*row[:3], at, row[3], gap=gap, bend=bend) for row in rows)
    return Doses(
        "edges" if edges else "nodes", curves, tuple(at.tolist()), base, gap, bend,
        len(wanted) - len(chosen), _about(settings, experiment), len(experiment.task),
        opened.circuit.digest, (*doubts, *_warnings(experiment)), timer.seconds,
    )  # fmt: skip


def _wanted(circuit: Circuit, names: Sequence[str], edges: bool) -> NDArray[np.int64]:
    """Indices of the nodes or edges that are named, or of those of the circuit."""
    graph = circuit.graph
    if names:
        index = [graph.edge_index(name) if edges else _sender(graph, name) for name in names]
        return np.array(list(dict.fromkeys(index)), dtype=np.int64)
    found = np.flatnonzero(circuit.in_circuit)
    found = found if edges else np.unique(graph.edge_sender[found])
    if not len(found):
        raise OptionError(
            f"the circuit has no edge: name what to measure with {'--edge' if edges else '--node'}"
        )
    return found.astype(np.int64)


def _sender(graph: Graph, name: str) -> int:
    if name not in graph.sender_index:
        near = did_you_mean(name, graph.senders)
        raise GraphError(f"no node {name!r} writes to the stream; {near}")
    return graph.sender_index[name]


def _about(settings: Settings, experiment: Experiment) -> dict[str, str]:
    return {
        "task": settings.task,
        "model": str(settings.model),
        "metric": experiment.metric.name,
        "intervention": experiment.intervention,
        "direction": experiment.direction,
        "prompts": str(experiment.task.info["prompts"]),
    }


def _warnings(experiment: Experiment) -> Iterator[str]:
    """Warn of what makes curves say less than they seem to."""
    metric = experiment.metric
    if metric.compares is not None and experiment.direction == "noising":
        yield (
            f"{metric.name} is least in the clean run: slopes and scores are 0 there, where every "
            "curve is least, too: use --metric logit_diff"
        )
    if experiment.model.dtype.itemsize < 4:
        yield (
            "in half precision the steps between values may be larger than responses: use --dtype "
            "float32"
        )


def read_doses(path: Path, circuit: Circuit) -> Doses:
    """Read what :meth:`Doses.save` wrote.

    Raises
    ------
    CircuitFileError
        If the file cannot be read, holds no doses, or is of another circuit.
    """
    content = read_json(path, _MOST_BYTES, CircuitFileError)
    item = JsonObject(content, path, "a dose.json", "acdc dose RUN --out FILE")
    if item.text("circuit_digest") != circuit.digest:
        raise CircuitFileError(f"{path} is of another circuit: give the doses of this run")
    at = _numbers(item, "coefficients")
    curves = tuple(_curve(row, len(at)) for row in item.rows("curves"))
    if len(at) < 2 or at[0] != LOW or at[-1] != HIGH:
        raise item.wrong("coefficients", at)
    keys = ("task", "model", "metric", "intervention", "direction", "prompts")
    return Doses(
        item.text("what"), curves, at, item.number("base"), item.number("gap"),
        item.number("bend"), int(item.number("n_left_out")), {key: item.text(key) for key in keys},
        int(item.number("n_prompts")), circuit.digest, tuple(item.texts("warnings")), {},
    )  # fmt: skip


def _curve(row: JsonObject, n: int) -> Curve:
    responses, own_bends, shape = (
        _numbers(row, "responses"),
        row.get("bends", list),
        row.text("shape"),
    )
    if len(responses) != n:
        raise row.wrong("responses", responses)
    if len(own_bends) != 2 or not all(x is None or _is_number(x) for x in own_bends):
        raise row.wrong("bends", own_bends)
    if shape not in SHAPES:
        raise row.wrong("shape", shape)
    return Curve(
        row.text("name"), row.number("score"), row.number("slope"), row.number("effect"),
        responses, (own_bends[0], own_bends[1]), _numbers(row, "turns"), shape,
    )  # fmt: skip


def _numbers(item: JsonObject, key: str) -> tuple[float, ...]:
    values = item.get(key, list)
    if not all(map(_is_number, values)):
        raise item.wrong(key, values)
    return tuple(values)


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < _MOST_SIZE
