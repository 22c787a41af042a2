"""What speaks for a circuit: measured now, or written by ``acdc evaluate`` and ``acdc stability``.

What was written is held against the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acdc.errors import CircuitFileError
from acdc.evidence.assessment import Assessment, Measured
from acdc.evidence.stability import Stability
from acdc.evidence.verdicts import EdgeEffect, Verdict
from acdc.files.objects import JsonObject
from acdc.measure.per_prompt import PerPrompt
from acdc.settings import Settings
from graphs import Circuit
from graphs.files.whole import MIB, json_text, read_json

__all__ = [
    "Ablated",
    "AreaValue",
    "Evidence",
    "Repeated",
    "Tests",
    "evidence_of",
    "read_evidence",
    "read_repeated",
    "repeated_of",
]

_MOST_BYTES = 256 * MIB


@dataclass(frozen=True)
class Ablated:
    """Faithfulness under one ablation; None where it is undefined."""

    intervention: str
    direction: str
    faithfulness: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class AreaValue:
    """CPR or CMD with its interval."""

    measure: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Tests:
    """What the tests of a circuit said.

    Parameters
    ----------
    verdicts
        One per test.
    effects
        Edges that minimality tested, the most superfluous first.
    complement
        Faithfulness of the model without the circuit's edges; None where it is undefined.
    """

    verdicts: tuple[Verdict, ...]
    effects: tuple[EdgeEffect, ...]
    complement: float | None


@dataclass(frozen=True)
class Evidence:
    """An evaluation of the run's circuit.

    Parameters
    ----------
    task, model, metric
        What it was measured on.
    n_prompts, prompts, seen
        How many pairs, which they are, and whether discovery saw them (None: not known).
    ablations
        That of the run first.
    areas
        CPR and CMD, as MIB has them; may be empty.
    tests
        None if they were left out.
    per_prompt
        What each edge does on every prompt; None if that was not measured.
    """

    task: str
    model: str
    metric: str
    n_prompts: int
    prompts: str
    seen: bool | None
    ablations: tuple[Ablated, ...]
    areas: tuple[AreaValue, ...]
    tests: Tests | None
    per_prompt: PerPrompt | None = None


@dataclass(frozen=True)
class Repeated:
    """Discovery over several draws of prompts.

    Parameters
    ----------
    method
        What was repeated; need not be the run's own.
    seeds
        One per repetition.
    sizes, faithfulness
        Of each one's circuit, on its own prompts.
    jaccard
        Mean overlap of two circuits.
    n_kept
        Edge -> repetitions that kept it, at least 1.
    """

    method: str
    seeds: tuple[int, ...]
    sizes: tuple[int, ...]
    faithfulness: tuple[float | None, ...]
    jaccard: float
    n_kept: Mapping[str, int]


def evidence_of(found: Assessment) -> Evidence:
    """Return what was measured, as :func:`read_evidence` gives it back from its file."""
    tests, judgement = None, found.judgement
    if judgement is not None:
        tests = Tests(judgement.verdicts, judgement.edges, judgement.complement)
    return Evidence(
        task=found.settings.task,
        model=str(found.settings.model),
        metric=str(found.settings.metric),
        n_prompts=found.n_prompts,
        prompts=found.task_info["prompts"],
        seen=found.task_info["seen"],
        ablations=tuple(map(_ablated, found.measured)),
        areas=tuple(AreaValue(a.measure, a.value, a.low, a.high) for a in found.areas),
        tests=tests,
        per_prompt=found.per_prompt,
    )


def _ablated(measured: Measured) -> Ablated:
    values = measured.evaluation.faithfulness, measured.low, measured.high
    return Ablated(measured.intervention, measured.direction, *map(_finite, values))


def _finite(value: float | None) -> float | None:
    """None for what is undefined, as in a file."""
    return None if value is None or not math.isfinite(value) else value


def read_evidence(path: Path, circuit: Circuit) -> Evidence:
    """Read what ``acdc evaluate RUN --out FILE`` wrote.

    Raises
    ------
    CircuitFileError
        If the file cannot be read, is no evaluation, or is of another circuit.
    """
    content = read_json(path, _MOST_BYTES, CircuitFileError)
    item = JsonObject(content, path, "an evaluation", "acdc evaluate RUN --out FILE")
    sizes = item.number("n_edges_kept"), item.number("n_edges_total")
    if sizes != (circuit.n_edges, circuit.graph.n_edges):
        raise CircuitFileError(
            f"{path} is of a circuit of {sizes[0]:,} of {sizes[1]:,} edges, the run's has "
            f"{circuit.n_edges:,} of {circuit.graph.n_edges:,}: give an evaluation of this run"
        )
    if item.text("circuit_digest") != circuit.digest:
        raise CircuitFileError(
            f"{path} is of another circuit of {circuit.n_edges:,} edges: give an evaluation of "
            "this run"
        )
    tests = None if item.get("tests", dict, None) is None else _tests(item.at("tests"))
    by_prompt = item.get("per_prompt", dict, None)
    effects = None if by_prompt is None else PerPrompt.read(item.at("per_prompt"))
    return Evidence(
        task=item.text("task"),
        model=item.text("model"),
        metric=item.text("metric"),
        n_prompts=int(item.number("n_prompts")),
        prompts=item.text("prompts"),
        seen=item.get("seen", bool, None),
        ablations=tuple(
            Ablated(
                row.text("intervention"),
                row.text("direction"),
                row.optional("faithfulness"),
                row.optional("faithfulness_low"),
                row.optional("faithfulness_high"),
            )
            for row in item.rows("ablations")
        ),
        areas=tuple(
            AreaValue(row.text("measure"), *map(row.number, ("value", "low", "high")))
            for row in item.rows("areas")
        ),
        tests=tests,
        per_prompt=effects,
    )


def _tests(item: JsonObject) -> Tests:
    return Tests(
        tuple(
            Verdict(
                test=row.text("test"),
                passed=row.get("passed", bool, None),
                p_value=row.optional("p_value"),
                level=row.number("level"),
                n=int(row.number("n")),
                unit=row.text("unit"),
                says=row.text("says"),
            )
            for row in item.rows("verdicts")
        ),
        tuple(
            EdgeEffect(row.text("edge"), *map(row.number, ("effect", "surpassed", "p_value")))
            for row in item.rows("edges")
        ),
        item.optional("complement"),
    )


def repeated_of(found: Stability, settings: Settings, circuit: Circuit) -> Repeated:
    """Return what was repeated, as :func:`read_repeated` gives it back from its file.

    Raises
    ------
    CircuitFileError
        If it is of another task or model.
    """
    return _repeated(json.loads(json_text(found.summary())), "stability", settings, circuit)


def read_repeated(path: Path, settings: Settings, circuit: Circuit) -> Repeated:
    """Read a ``stability.json``.

    Raises
    ------
    CircuitFileError
        If it cannot be read, is none, or is of another task or model.
    """
    content = read_json(path, _MOST_BYTES, CircuitFileError)
    return _repeated(content, path, settings, circuit)


def _repeated(content: Any, path: object, settings: Settings, circuit: Circuit) -> Repeated:
    item = JsonObject(content, path, "a stability.json", "acdc stability TASK --out FOLDER")
    theirs = item.text("task"), item.text("model"), item.number("n_edges_total")
    ours = settings.task, settings.model, circuit.graph.n_edges
    if theirs != ours:
        raise CircuitFileError(
            f"{path} is of task {theirs[0]!r} in {theirs[1]!r} ({theirs[2]:,} edges), the run of "
            f"{ours[0]!r} in {ours[1]!r} ({ours[2]:,}): give that of the run's task and model"
        )
    runs = item.rows("runs")
    counts = item.at("edges")
    return Repeated(
        method=item.text("method"),
        seeds=tuple(int(row.number("seed")) for row in runs),
        sizes=tuple(int(row.number("n_edges_kept")) for row in runs),
        faithfulness=tuple(row.optional("faithfulness") for row in runs),
        jaccard=item.number("mean_jaccard"),
        n_kept={name: int(counts.number(name)) for name in counts.content},
    )
