"""ACDC over many thresholds: the frontier of circuit size and metric.

Thresholds are decided together until two of them first disagree on an edge; there the state
is forked.  Every circuit is exactly the one that :func:`acdc.methods.acdc.acdc` finds for its
threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.engine.incremental import IncrementalRun, Work
from acdc.engine.speculation import Decision, Speculation
from acdc.methods.acdc import TWO_SIDED
from graphs import Circuit
from graphs.order import edge_order, receiver_order

__all__ = ["sweep"]


@dataclass(eq=False)
class _Branch:
    """Thresholds that agree so far, and how far they are."""

    speculation: Speculation
    in_circuit: NDArray[np.bool_]
    scores: NDArray[np.float64]
    n_finished: int = 0  # receivers
    rest: NDArray[np.int64] | None = None  # of the receiver at hand; None: all

    def record(self, decision: Decision) -> None:
        self.scores[decision.edge] = decision.change
        self.in_circuit[decision.edge] = not decision.removed

    def fork(self) -> list[_Branch]:
        """Split in two; last comes the branch for which more is evaluated already."""
        split = self.speculation.split
        assert split is not None
        self.rest = split.rest
        twin = replace(
            self,
            speculation=self.speculation.fork(),
            in_circuit=self.in_circuit.copy(),
            scores=self.scores.copy(),
        )
        taus = self.speculation.thresholds
        cost = abs(split.change) if self.speculation.two_sided else split.change
        keep = [tau for tau in taus if cost >= tau]
        remove = [tau for tau in taus if cost < tau]
        self.record(self.speculation.resolve(removed=False, thresholds=keep))
        twin.record(twin.speculation.resolve(removed=True, thresholds=remove))
        return [self, twin] if split.guess else [twin, self]


def sweep(
    experiment: Experiment,
    thresholds: Sequence[float],
    *,
    expected: NDArray[np.float64] | None = None,
    two_sided: bool = False,
    memory: int = 1 << 30,
    progress: Callable[[int], None] = lambda n_edges: None,
) -> tuple[dict[float, Circuit], Work]:
    """Run ACDC for every threshold.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    thresholds
        Taus above 0, in the unit of the metric.
    expected, two_sided, memory
        As in :func:`acdc.methods.acdc.acdc`.
    progress
        Called with the number of (edge, threshold) pairs decided since the last call.

    Returns
    -------
    dict
        Circuit of each threshold.
    Work
        How much was computed in all.
    """
    graph = experiment.graph
    order = receiver_order(graph)
    run = IncrementalRun(experiment, memory)
    first = Speculation(run, thresholds, expected, two_sided=two_sided)
    branches = [_Branch(first, np.ones(graph.n_edges, dtype=bool), np.zeros(graph.n_edges))]
    circuits: dict[float, Circuit] = {}
    while branches:
        branch = branches[-1]
        speculation = branch.speculation
        if branch.n_finished == len(order):
            branches.pop()
            for tau in speculation.thresholds:
                info = {"method": TWO_SIDED if two_sided else "acdc", "threshold": tau}
                circuits[tau] = Circuit(graph, branch.scores, branch.in_circuit, info)
            continue
        receiver = order[branch.n_finished]
        for decision in speculation.decide(
            edge_order(graph, receiver) if branch.rest is None else branch.rest
        ):
            branch.record(decision)
            progress(len(speculation.thresholds))
        if speculation.split is not None:
            progress(len(speculation.thresholds))
            branches[-1:] = branch.fork()
            continue
        edges = edge_order(graph, receiver)
        speculation.finish(receiver, edges[branch.in_circuit[edges]])
        branch.n_finished, branch.rest = branch.n_finished + 1, None
    return {tau: circuits[tau] for tau in thresholds}, run.work
