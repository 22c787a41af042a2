"""Runs of one task over different bases: how large their circuits are at equal faithfulness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.errors import OptionError
from acdc.measure.curves import ranked_scores, smallest_faithful
from acdc.measure.evaluation import Evaluator
from acdc.methods import Score, meaning
from acdc.runs.discover import fit
from acdc.runs.folder import read_run
from acdc.settings import RANKINGS, Settings
from graphs import Circuit, basis_name

__all__ = ["SizeAt", "sizes_at"]

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


def sizes_at(
    folders: Sequence[str | Path], level: float, *, trust_remote_code: bool = False
) -> list[SizeAt]:
    """Measure how large the circuits of runs have to be to reach a faithfulness.

    All are measured on the prompts, metric and ablation of the first run.  Along each run's
    scores, ranked by absolute or signed value (whichever needs fewer edges), the circuit grows
    until it is faithful (:func:`acdc.measure.curves.smallest_faithful`).

    Parameters
    ----------
    folders
        Of runs of one task.
    level
        Faithfulness, above 0 and at most 1.
    trust_remote_code
        Let the models' folders run their own code, whatever ``run.json`` says.

    Raises
    ------
    OptionError
        If the tasks differ, faithfulness is undefined, or the level makes no sense.
    """
    if not 0 < level <= 1:
        raise OptionError(f"faithfulness {level:g}: expected a number above 0, at most 1")
    runs = [read_run(folder) for folder in folders]
    first = runs[0][0]
    same = {name: getattr(first, name) for name in _SAME}
    same["trust_remote_code"] = trust_remote_code
    for (settings, _, _), folder in zip(runs, folders, strict=True):
        if settings.task != first.task:
            raise OptionError(
                f"{folders[0]} is a circuit of {first.task!r}, {folder} of {settings.task!r}: "
                "sizes at equal faithfulness need one task"
            )
    return [_size(circuit, replace(settings, **same), level) for settings, circuit, _ in runs]


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
