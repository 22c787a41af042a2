"""Automatic circuit discovery (ACDC): Conmy et al. 2023, arXiv 2304.14997, Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from acdc.checkpoint import Checkpoint, Decided
from acdc.engine.experiment import Experiment
from acdc.engine.incremental import Work
from acdc.engine.speculation import Speculation
from graphs import Circuit
from graphs.order import edge_order, receiver_order

__all__ = ["acdc"]


def acdc(
    experiment: Experiment,
    threshold: float,
    *,
    expected: NDArray[np.float64] | None = None,
    candidates: NDArray[np.bool_] | None = None,
    memory: int = 1 << 30,
    progress: Callable[[int], None] = lambda n_edges: None,
    checkpoint: Checkpoint | None = None,
) -> tuple[Circuit, Work]:
    """Remove every edge whose removal costs less than the threshold.

    Receivers are visited from ``logits`` to the embeddings.  The edges of each are taken out
    one after the other; an edge stays out if that changes the metric (as a quantity to be
    minimised) by less than the threshold, otherwise it goes back in.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    threshold
        Tau, in the unit of the metric.
    expected
        ``[edge]``: what the removal of each edge is expected to change, in the minimised
        direction, as attribution scores say.  It decides only how fast the answer comes,
        never what it is.
    candidates
        ``[edge]``: edges that are tested; the others are removed untested when their receiver's
        turn comes, before its candidates are tried.  None tests all.
    memory
        Bytes that the scenarios of one evaluation may take.
    progress
        Called with the number of edges decided since the last call.
    checkpoint
        Where to go on from and to keep what is decided.

    Returns
    -------
    Circuit
        Its scores are the metric changes that were measured when an edge's removal was tried,
        in the minimised direction; 0 for edges that cannot matter or were not tested.
    Work
        How much was computed.
    """
    graph, order = experiment.graph, receiver_order(experiment.graph)
    decided = checkpoint.load(graph, threshold) if checkpoint else Decided.nothing(graph)
    run = experiment.incremental(memory)
    speculation = Speculation(run, (threshold,), expected)
    in_circuit, scores = decided.in_circuit, decided.scores
    for receiver in order[: decided.n_finished]:
        edges = edge_order(graph, receiver)
        speculation.repeat(receiver, edges, in_circuit[edges])
        progress(len(edges))
    vars(run.work).update(decided.work)
    referee = speculation.referee
    if referee is not None:
        referee.rounding = max(referee.rounding, decided.rounding)
    for receiver in order[decided.n_finished :]:
        edges = tested = edge_order(graph, receiver)
        if candidates is not None:
            tested, untested = edges[candidates[edges]], edges[~candidates[edges]]
            speculation.remove(untested)
            in_circuit[untested] = False
            progress(len(untested))
        for decision in speculation.decide(tested):
            scores[decision.edge] = decision.change
            in_circuit[decision.edge] = not decision.removed
            progress(1)
        speculation.finish(receiver, edges[in_circuit[edges]])
        decided.n_finished, decided.work = decided.n_finished + 1, asdict(run.work)
        decided.rounding = 0.0 if referee is None else referee.rounding
        if checkpoint:
            checkpoint.save(threshold, decided)
    return Circuit(graph, scores, in_circuit, {"method": "acdc", "threshold": threshold}), run.work
