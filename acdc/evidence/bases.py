"""Runs of one task over different bases: how large their circuits are at equal faithfulness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.errors import OptionError
from acdc.measure.curves import ranked_scores, smallest_faithful
from acdc.measure.evaluation import Evaluator
from acdc.methods import Score, meaning
from acdc.runs.discover import fit
from acdc.runs.given import same_task
from acdc.runs.opened import Opened
from acdc.settings import RANKINGS, Settings
from graphs import Circuit, basis_name

__all__ = ["SizeAt", "check_level", "sizes_at"]

_SAME = (
    "metric", "n_prompts", "holdout", "seed", "corruption", "prepend_bos", "intervention",
    "direction", "mean_over", "optimal_steps",
)  # fmt: skip


@dataclass(frozen=True)
class SizeAt:
    """The smallest circuit along a run's ranking that is faithful enough.

    Parameters
    ----------
    basis
        What its nodes are.
    ranking
        ``absolute`` or ``signed`` scores, whichever needs fewer edges; ACDC's are signed.
    level
        Faithfulness asked for.
    faithfulness
        Of the circuit.
    n_edges, n_nodes
        Its size, pruned; nodes without ``logits``.
    n_edges_total, n_nodes_total
        Of the graph.
    """

    basis: str
    ranking: str
    level: float
    faithfulness: float
    n_edges: int
    n_nodes: int
    n_edges_total: int
    n_nodes_total: int


def check_level(level: float) -> None:
    """Raise OptionError if a faithfulness cannot be asked for."""
    if not 0 < level <= 1:
        raise OptionError(f"faithfulness {level:g}: expected a number above 0, at most 1")


def sizes_at(
    runs: Sequence[Opened], level: float, *, trust_remote_code: bool = False, **again: Any
) -> list[SizeAt]:
    """Measure how large the circuits of runs have to be to reach a faithfulness.

    All are measured on the prompts, metric and ablation of the first run.  Along each run's
    scores, ranked by absolute or signed value (whichever needs fewer edges), the circuit grows
    until it is faithful (:func:`acdc.measure.curves.smallest_faithful`).

    Parameters
    ----------
    runs
        Of one task.
    level
        Faithfulness, above 0 and at most 1.
    trust_remote_code
        Let the models' folders run their own code, whatever ``run.json`` says.
    **again
        Objects that runs were given, see :mod:`acdc.runs.given`.

    Raises
    ------
    OptionError
        If the tasks differ, faithfulness is undefined, or the level makes no sense.
    """
    check_level(level)
    tasks = [run.discovery for run in runs if run.discovery is not None]
    for run, own in zip(runs, tasks, strict=True):
        if not same_task(own, tasks[0]):
            raise OptionError(
                f"{runs[0].name} is a circuit of {tasks[0].task!r}, {run.name} of {own.task!r}: "
                "sizes at equal faithfulness need one task"
            )
    settings = [run.settings(trust_remote_code=trust_remote_code, **again) for run in runs]
    first = settings[0]
    same = {name: getattr(first, name) for name in _SAME}
    given = {name: first.given[name] for name in ("task", "metric") if name in first.given}
    return [
        _size(run.circuit, replace(own, **same, given=own.given | given), level)
        for run, own in zip(runs, settings, strict=True)
    ]


def _size(circuit: Circuit, settings: Settings, level: float) -> SizeAt:
    circuit, experiment = fit(circuit, settings)
    evaluator = Evaluator(experiment)
    if not evaluator.has_gap:
        raise OptionError(
            f"metric {settings.metric!r} is {evaluator.full:g} with every edge and with none: "
            "faithfulness is undefined; choose another metric"
        )
    ranking, mask = min(
        (
            (name, smallest_faithful(evaluator, ranked, level))
            for name, ranked in _rankings(circuit, experiment, settings).items()
        ),
        key=lambda one: int(np.count_nonzero(one[1])),
    )
    found = replace(circuit, in_circuit=mask)
    graph = circuit.graph
    return SizeAt(
        basis_name(graph.shape),
        ranking,
        level,
        float(evaluator.faithfulness(mask) or 0.0),
        int(np.count_nonzero(mask)),
        len([name for name in found.nodes() if name != "logits"]),
        graph.n_edges,
        graph.n_senders,
    )


def _rankings(
    circuit: Circuit, experiment: Experiment, settings: Settings
) -> dict[str, NDArray[np.float64]]:
    """Scores by ranking, the edges to keep highest."""
    if meaning(circuit) is Score.COST:
        return {"signed": circuit.scores}
    if meaning(circuit) is Score.MAGNITUDE:
        return {"absolute": circuit.scores}
    return {name: ranked_scores(experiment, circuit.scores, name) for name in RANKINGS}
