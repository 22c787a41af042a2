"""Automatic circuit discovery (ACDC): Conmy et al. 2023, arXiv 2304.14997, Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acdc.engine.checkpoint import Checkpoint, Decided
from acdc.engine.experiment import Experiment
from acdc.engine.incremental import IncrementalRun, Work
from acdc.engine.patched import PatchedModel, alive_before_logits
from acdc.engine.speculation import Speculation
from acdc.engine.work import Work as Means
from acdc.errors import OptionError
from acdc.methods import tau
from acdc.methods.base import Found, Score, method
from acdc.methods.candidates import Candidates, narrow
from acdc.methods.eap import Integration, eap, eap_ig
from acdc.methods.rough import Rough
from acdc.settings import option
from graphs import Circuit, Graph
from graphs.order import edge_order, receiver_order

__all__ = [
    "GUESSES",
    "TWO_SIDED",
    "Options",
    "acdc",
    "expected_changes",
    "find",
    "find_two_sided",
    "widened",
]

GUESSES = ("removed", "eap", "eap-ig")
"""What the search can expect of edges."""

TWO_SIDED = "acdc-two-sided"
"""The method whose edges stay out only if the metric hardly changes, whichever way."""


def acdc(
    experiment: Experiment,
    threshold: float,
    *,
    expected: NDArray[np.float64] | None = None,
    candidates: NDArray[np.bool_] | None = None,
    two_sided: bool = False,
    memory: int = 1 << 30,
    progress: Callable[[int], None] = lambda n_edges: None,
    checkpoint: Checkpoint | None = None,
    start: IncrementalRun | None = None,
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
        not what it is: what else is tried at the same time moves a change by rounding alone.
    candidates
        ``[edge]``: edges that are tested; the others are removed untested when their receiver's
        turn comes, before its candidates are tried.  None tests all.
    two_sided
        Whether an edge stays out only if the metric changes by less than the threshold
        *whichever way*: one whose removal makes the metric better than the model's stays in.
    memory
        Bytes that the scenarios of one evaluation may take.
    progress
        Called with the number of edges decided since the last call.
    checkpoint
        Where to go on from and to keep what is decided.
    start
        The state with every edge in, where searches share it: it stays as it is.  None: made anew.

    Returns
    -------
    Circuit
        Its scores are the metric changes that were measured when an edge's removal was tried,
        in the minimised direction; 0 for edges that cannot matter or were not tested.
    Work
        How much was computed.
    """
    if experiment.crosses_layers:
        return _by_whole_passes(
            experiment, threshold, candidates, two_sided, memory, progress, checkpoint
        )
    graph, order = experiment.graph, receiver_order(experiment.graph)
    decided = checkpoint.load(graph, threshold) if checkpoint else Decided.nothing(graph)
    run = IncrementalRun(experiment, memory) if start is None else start.afresh()
    speculation = Speculation(run, (threshold,), expected, two_sided=two_sided)
    in_circuit, scores = decided.in_circuit, decided.scores
    if checkpoint and decided.n_finished:
        by_receiver = [(v, edge_order(graph, v)) for v in order[: decided.n_finished]]
        with checkpoint.state(threshold, decided) as read:
            speculation.restore([(v, edges[in_circuit[edges]]) for v, edges in by_receiver], read)
        progress(sum(len(edges) for _, edges in by_receiver))
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
        if checkpoint and checkpoint.due:
            checkpoint.save(threshold, decided, speculation.keep())
    return Circuit(graph, scores, in_circuit, _info(threshold, two_sided)), run.work


def _info(threshold: float, two_sided: bool) -> dict[str, Any]:
    return {"method": TWO_SIDED if two_sided else "acdc", "threshold": threshold}


def _by_whole_passes(
    experiment: Experiment,
    threshold: float,
    candidates: NDArray[np.bool_] | None,
    two_sided: bool,
    memory: int,
    progress: Callable[[int], None],
    checkpoint: Checkpoint | None,
) -> tuple[Circuit, Work]:
    """Search as :func:`acdc`, every decision a whole patched pass, in float32 where asked for."""
    graph, exact = experiment.graph, experiment.in_float32
    if exact is not None:
        experiment = replace(exact, candidates=experiment.candidates, places=experiment.places)
    order, sign = receiver_order(graph), experiment.minimised_sign
    decided = checkpoint.load(graph, threshold) if checkpoint else Decided.nothing(graph)
    mask, scores, work = decided.in_circuit, decided.scores, Work(**decided.work)
    progress(sum(len(edge_order(graph, v)) for v in order[: decided.n_finished]))
    patched = PatchedModel(experiment, memory)
    now = sign * patched.metric(mask)
    for receiver in order[decided.n_finished :]:
        edges = edge_order(graph, receiver)
        alive = bool(alive_before_logits(graph, mask)[graph.fed_by(receiver)].any())
        tried = edges if candidates is None else edges[candidates[edges]]
        mask[np.setdiff1d(edges, tried)] = False
        if len(tried) < len(edges) and alive:
            now, work.n_evaluations = sign * patched.metric(mask), work.n_evaluations + 1
        for edge in tried:
            mask[edge] = False
            work.n_decisions, work.n_dead = work.n_decisions + alive, work.n_dead + (not alive)
            if alive:
                without, work.n_evaluations = sign * patched.metric(mask), work.n_evaluations + 1
                scores[edge] = without - now
            mask[edge] = not (abs(scores[edge]) if two_sided else scores[edge]) < threshold
            now = now if mask[edge] or not alive else without
        progress(len(edges))
        decided.n_finished, decided.work = decided.n_finished + 1, asdict(work)
        if checkpoint and checkpoint.due:
            checkpoint.save(threshold, decided)
    return Circuit(graph, scores, mask, _info(threshold, two_sided)), work


@dataclass(frozen=True)
class Options(Candidates):
    """What ``acdc`` is asked for.

    Parameters
    ----------
    threshold, n_edges
        Tau, or the largest circuit of at most so many edges; with neither the smallest faithful
        one, see :mod:`acdc.methods.tau`.
    guess
        Which edges are expected to be removed, one of :data:`GUESSES`: all, or those with low
        attribution scores; where tau is looked for by faithfulness, what rough searches say.
        Changes how long the search takes, and nothing that it finds but for changes as near to
        tau as rounding.
    steps
        Integration steps of the guess ``eap-ig``.
    candidates
        On a graph with latents all other edges are ablated from the start.
    """

    guess: str = option(
        "removed", "What acdc expects (speed only): removed, eap or eap-ig.", choices=GUESSES
    )
    steps: int = option(
        5, "Integration steps.", at_least=1, at_most=10**5, needs=("guess", "eap-ig")
    )
    threshold: float | None = option(None, shared=True)
    n_edges: int | None = option(None, shared=True)


def expected_changes(
    experiment: Experiment, options: Options, memory: int = 1 << 30
) -> NDArray[np.float64] | None:
    """Return what a guess expects each edge's removal to change, ``[edge]``, minimised direction.

    None: every edge is expected to be removed.
    """
    work = Means(memory)
    if options.guess == "removed":
        return None
    if options.guess == "eap":
        return experiment.minimised_sign * eap(experiment, work=work)
    return experiment.minimised_sign * eap_ig(experiment, Integration(options.steps), work)


def _n_decisions(experiment: Experiment, options: Options) -> int:
    return options.n_tried(experiment) * tau.n_searches(options.threshold, options.n_edges)


@method(
    "acdc",
    "remove edges one by one while the metric changes by less than tau "
    f"(Conmy et al. 2023); {tau.DEFAULT}",
    Options,
    over="circuit",
    score=Score.COST,
    passes=_n_decisions,
    keeps_state=True,
)
def find(experiment: Experiment, options: Options, work: Means) -> Found:
    """Run :func:`acdc` at the threshold that is asked for, or look for one."""
    return _among_candidates(experiment, options, work, two_sided=False)


@method(
    TWO_SIDED,
    "acdc, but an edge stays out only if the metric changes by less than tau whichever way; "
    "default tau as for acdc",
    Options,
    over="circuit",
    score=Score.COST,
    passes=_n_decisions,
    keeps_state=True,
)
def find_two_sided(experiment: Experiment, options: Options, work: Means) -> Found:
    """As :func:`find`, two-sided: what holds the metric back is no less part of the circuit.

    Raises
    ------
    OptionError
        If the threshold is not above 0: no change is smaller, and every edge would stay.
    """
    if options.threshold is not None and options.threshold <= 0:
        raise OptionError(
            f"threshold {options.threshold:g}: no edge changes the metric by less whichever way, "
            "give one above 0"
        )
    return _among_candidates(experiment, options, work, two_sided=True)


def _among_candidates(
    experiment: Experiment, options: Options, work: Means, *, two_sided: bool
) -> Found:
    narrowed = narrow(experiment, options.candidates, work.memory)
    if narrowed is None:
        return _search(experiment, options, work, two_sided)
    few, candidates = narrowed
    found = _search(few, options, work, two_sided)
    return replace(found, circuit=widened(found.circuit, experiment.graph, candidates))


def _search(experiment: Experiment, options: Options, work: Means, two_sided: bool) -> Found:
    expected: NDArray[np.float64] | None = None
    guess = options.guess
    start = _shared_start(experiment, options, work)
    roughly: Rough | None = None

    def rough() -> Rough:
        nonlocal guess, roughly
        guess = "rough"
        roughly = Rough(experiment, work.memory, partial(acdc, two_sided=two_sided))
        return roughly

    def run(threshold: float) -> Found:
        nonlocal expected
        if expected is None and roughly is not None:
            expected = roughly.expected
        elif expected is None:
            expected = expected_changes(experiment, options, work.memory)
        circuit, counts = acdc(
            experiment,
            threshold,
            expected=expected,
            two_sided=two_sided,
            memory=work.memory,
            progress=work.progress,
            checkpoint=work.checkpoint,
            start=start,
        )
        expected = circuit.scores  # the next tau changes little
        details = {"threshold": threshold, "guess": guess, "work": asdict(counts)}
        return Found(circuit, details)

    return tau.at_threshold(experiment, options.threshold, options.n_edges, run, rough)


def _shared_start(experiment: Experiment, options: Options, work: Means) -> IncrementalRun | None:
    """Return what several searches of few edges start from; None where each may make its own.

    Candidates alone are a circuit, and the values of one take a patched pass, not a plain one.
    """
    several = tau.n_searches(options.threshold, options.n_edges) > 1
    if several and experiment.is_partial and not experiment.crosses_layers:
        return IncrementalRun(experiment, work.memory)
    return None


def widened(circuit: Circuit, graph: Graph, candidates: NDArray[np.bool_]) -> Circuit:
    """Put a circuit on some edges of a graph back into it; the other edges are out."""
    scores, mask = np.zeros(graph.n_edges), np.zeros(graph.n_edges, dtype=bool)
    scores[candidates], mask[candidates] = circuit.scores, circuit.in_circuit
    return Circuit(graph, scores, mask, circuit.info)
