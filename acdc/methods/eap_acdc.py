"""Attribution proposes, ACDC decides: only edges with some attribution score are tested.

An edge whose absolute EAP-IG score is below a floor is removed without a test, when its
receiver's turn comes and before the receiver's other edges are tried; the rest is ACDC (Conmy et
al. 2023) to the letter, so with a floor of 0 the circuit is that of ``acdc``.  What this may have
missed is measured on a random sample of the edges skipped: see :class:`Audit`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom

from acdc.engine.experiment import Experiment
from acdc.engine.patched import PatchedModel
from acdc.engine.work import Work
from acdc.methods import tau
from acdc.methods.acdc import acdc
from acdc.methods.base import Found, Score, method
from acdc.methods.eap import Integration, eap_ig
from acdc.methods.exact import exact
from acdc.settings import option

__all__ = [
    "CONFIDENCE",
    "FLOOR",
    "SAMPLE",
    "Audit",
    "Effects",
    "Options",
    "audit",
    "find",
    "most_in_all",
]

FLOOR = 0.1
"""Default floor, as a fraction of tau."""
SAMPLE = 64
"""How many of the skipped edges are measured."""
CONFIDENCE = 0.95

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Effects:
    """What sampled edges do to the minimised metric; above 0 where an edge matters.

    Parameters
    ----------
    largest, mean
        Of the sample, in the metric's unit.
    n_at_least_tau
        Edges of the sample that ACDC would keep, were they tested so.
    n_at_least_tau_in_all
        At most so many of all skipped edges are such edges, with confidence
        :data:`CONFIDENCE`.
    """

    largest: float
    mean: float
    n_at_least_tau: int
    n_at_least_tau_in_all: int


@dataclass(frozen=True)
class Audit:
    """How much was skipped, and a bound on what that missed.

    Each sampled edge is measured alone in two ways.  Neither sees edges that matter only
    together with other skipped ones (an OR of two).

    Parameters
    ----------
    n_skipped, n_sampled, seed
        Edges that were removed untested; how many of them were drawn, and with what seed.
    confidence
        Of the one-sided bounds (exact for draws without replacement).
    n_above_largest_in_all
        At most so many skipped edges have an effect above the largest of the sample.
    taken_out
        ``m(all edges but this one) - m(all edges)``.
    put_back
        ``m(circuit) - m(circuit and this edge)``.
    """

    n_skipped: int
    n_sampled: int
    seed: int
    confidence: float
    n_above_largest_in_all: int
    taken_out: Effects
    put_back: Effects


def audit(
    experiment: Experiment,
    circuit: Mask,
    skipped: Mask,
    threshold: float,
    *,
    seed: int = 0,
    n_sampled: int = SAMPLE,
    memory: int = 1 << 30,
) -> Audit | None:
    """Measure a random sample of the edges that were skipped.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    circuit, skipped
        ``[edge]``: what was found, and what was never tested.
    threshold
        Tau.
    seed, n_sampled
        Of the sample; it has all edges where there are no more.
    memory
        Bytes that one evaluation may take.

    Returns
    -------
    Audit
        None if nothing was skipped.
    """
    edges = np.flatnonzero(skipped)
    if not len(edges):
        return None
    n_sampled = min(n_sampled, len(edges))
    sample = np.sort(np.random.default_rng(seed).choice(edges, n_sampled, replace=False))
    chosen = np.zeros_like(skipped)
    chosen[sample] = True
    sign = experiment.minimised_sign
    taken_out = sign * exact(experiment, only=chosen, memory=memory)[sample]
    patched = PatchedModel(experiment, memory)
    without = patched.metric(circuit)
    put_back = np.empty(n_sampled)
    for i, edge in enumerate(sample):
        with_edge = circuit.copy()
        with_edge[edge] = True
        put_back[i] = sign * (without - patched.metric(with_edge))

    def effects(values: NDArray[np.float64]) -> Effects:
        n = int((values >= threshold).sum())
        most = most_in_all(n, n_sampled, len(edges))
        return Effects(float(values.max()), float(values.mean()), n, most)

    return Audit(
        len(edges),
        n_sampled,
        seed,
        CONFIDENCE,
        most_in_all(0, n_sampled, len(edges)),
        effects(taken_out),
        effects(put_back),
    )


def most_in_all(n_seen: int, n_sampled: int, n_all: int, confidence: float = CONFIDENCE) -> int:
    """Upper confidence bound on how many of a finite set are marked.

    Parameters
    ----------
    n_seen
        Marked ones in a sample without replacement.
    n_sampled, n_all
        Sizes of the sample and of the set.
    confidence
        One-sided.

    Returns
    -------
    int
        The largest number with which a sample of so few marked ones has a probability above
        ``1 - confidence`` (the hypergeometric counterpart of Clopper and Pearson 1934).

    Examples
    --------
    >>> most_in_all(0, 59, 1_000_000)  # about 3 / 59 of them: the rule of three
    49504
    >>> most_in_all(2, 10, 10)
    2
    """
    low, high = n_seen, n_all - (n_sampled - n_seen)
    while low < high:
        middle = (low + high + 1) // 2
        if hypergeom.cdf(n_seen, n_all, middle, n_sampled) > 1 - confidence:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class Options(Integration):
    """What ``eap-acdc`` is asked for.

    Parameters
    ----------
    threshold, n_edges
        As of :class:`acdc.methods.acdc.Options`.
    floor
        Edges with an absolute score below it are not tested, in the metric's unit; None: a tenth
        of tau.
    steps
        Integration steps of the proposal.
    seed
        Of the sample of skipped edges.
    """

    floor: float | None = option(
        None, "eap-acdc tests edges of at least this absolute score.", at_least=0
    )
    threshold: float | None = option(None, shared=True)
    n_edges: int | None = option(None, shared=True)
    seed: int = option(0, shared=True)


def _n_steps(experiment: Experiment, options: Options) -> int:
    searches = tau.n_searches(options.threshold, options.n_edges)
    return options.passes(experiment) + searches * experiment.graph.n_edges + SAMPLE


@method(
    "eap-acdc",
    "acdc on the edges whose absolute eap-ig score is at least --floor (default: a tenth of tau), "
    "the others go untested; a sample of these bounds what that missed; default tau as for acdc",
    Options,
    over="circuit",
    score=Score.COST,
    passes=_n_steps,
    keeps_state=True,
)
def find(experiment: Experiment, options: Options, work: Work) -> Found:
    """Propose by attribution, decide by ACDC, and measure a sample of what was skipped."""
    scores = eap_ig(experiment, Integration(options.steps), work)

    def run(threshold: float) -> Found:
        floor = FLOOR * threshold if options.floor is None else options.floor
        candidates = np.abs(scores) >= floor
        circuit, counts = acdc(
            experiment,
            threshold,
            expected=experiment.minimised_sign * scores,
            candidates=candidates,
            memory=work.memory,
            progress=work.progress,
            checkpoint=work.checkpoint,
        )
        skipped = int((~candidates).sum())
        details = {"threshold": threshold, "floor": floor, "n_skipped": skipped}
        return Found(circuit, {**details, "work": asdict(counts)})

    found = tau.at_threshold(experiment, options.threshold, options.n_edges, run)
    checked = audit(
        experiment,
        found.circuit.in_circuit,
        np.abs(scores) < found.details["floor"],
        found.details["threshold"],
        seed=options.seed,
        memory=work.memory,
    )
    work.progress(SAMPLE)
    return replace(found, details={**found.details, "audit": checked and asdict(checked)})
