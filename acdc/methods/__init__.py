"""Methods by name, all behind :class:`acdc.methods.base.Method`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.errors import UnknownNameError
from acdc.evaluation import Evaluator
from acdc.methods import eap as _eap
from acdc.methods.acdc import acdc
from acdc.methods.base import (
    DEFAULT_FAITHFULNESS,
    Found,
    Method,
    Progress,
    Search,
    from_scores,
)
from acdc.methods.eap_acdc import FLOOR, SAMPLE, audit
from acdc.methods.exact import exact
from acdc.methods.gim import gim
from acdc.methods.hisp import hisp
from acdc.methods.ifr import ifr
from acdc.methods.masks import Training, edge_pruning, subnetwork_probing
from acdc.methods.nap import nap, nap_ig
from acdc.methods.nodes import from_node_scores
from graphs import Circuit, Graph

__all__ = ["METHODS", "Found", "Method", "Search", "expected_changes", "get_method"]

_TAUS = tuple(scale / 10**power for power in range(2, 7) for scale in (3.0, 1.0))
"""Thresholds that acdc tries by default, as fractions of the metric's gap: 3 %, 1 %, 0.3 % ..."""

_BISECTIONS, _REFINEMENTS = 12, 3

Changes = NDArray[np.float64] | None


def expected_changes(experiment: Experiment, search: Search) -> Changes:
    """Return what the search's guess expects each edge's removal to change, ``[edge]``.

    None (every edge is expected to be removed), or attribution scores in the minimised
    direction.
    """
    if search.guess == "removed":
        return None
    if search.guess == "eap":
        scores = _eap.eap(experiment, memory=search.memory)
    else:
        scores = _eap.eap_ig(experiment, search.steps, memory=search.memory)
    return experiment.minimised_sign * scores


def _find_acdc(experiment: Experiment, search: Search, progress: Progress) -> Found:
    narrowed = experiment.narrowed(search.n_candidates, search.memory)
    if narrowed is None:
        return _search_acdc(experiment, search, progress)
    few, candidates = narrowed
    found = _search_acdc(few, search, progress)
    return replace(found, circuit=_widened(found.circuit, experiment.graph, candidates))


def _widened(circuit: Circuit, graph: Graph, candidates: NDArray[np.bool_]) -> Circuit:
    """Put a circuit on some edges of a graph back into it; the other edges are out."""
    scores, mask = np.zeros(graph.n_edges), np.zeros(graph.n_edges, dtype=bool)
    scores[candidates], mask[candidates] = circuit.scores, circuit.in_circuit
    return Circuit(graph, scores, mask, circuit.info)


def _search_acdc(experiment: Experiment, search: Search, progress: Progress) -> Found:
    expected = expected_changes(experiment, search)

    def run(tau: float) -> Found:
        nonlocal expected
        circuit, work = acdc(
            experiment,
            tau,
            expected=expected,
            memory=search.memory,
            progress=progress,
            checkpoint=search.checkpoint,
        )
        expected = circuit.scores  # the next tau changes little
        return Found(circuit, {"threshold": tau, "guess": search.guess, "work": asdict(work)})

    return _acdc_as_asked(experiment, search, run)


def _find_eap_acdc(experiment: Experiment, search: Search, progress: Progress) -> Found:
    scores = _eap.eap_ig(experiment, search.steps, memory=search.memory, progress=progress)
    expected = experiment.minimised_sign * scores

    def run(tau: float) -> Found:
        floor = FLOOR * tau if search.floor is None else search.floor
        candidates = np.abs(scores) >= floor
        circuit, work = acdc(
            experiment,
            tau,
            expected=expected,
            candidates=candidates,
            memory=search.memory,
            progress=progress,
            checkpoint=search.checkpoint,
        )
        details = {
            "threshold": tau,
            "floor": floor,
            "n_skipped": int((~candidates).sum()),
            "work": asdict(work),
        }
        return Found(circuit, details)

    found = _acdc_as_asked(experiment, search, run)
    checked = audit(
        experiment,
        found.circuit.in_circuit,
        np.abs(scores) < found.details["floor"],
        found.details["threshold"],
        seed=search.seed,
        memory=search.memory,
    )
    progress(SAMPLE)
    return replace(found, details={**found.details, "audit": checked and asdict(checked)})


def _acdc_as_asked(experiment: Experiment, search: Search, run: Callable[[float], Found]) -> Found:
    """Run at the threshold that is asked for, or look for one."""
    if search.n_edges is not None:
        return _acdc_of_size(experiment, search.n_edges, run)
    if search.threshold is None:
        return _acdc_of_faithfulness(experiment, run)
    return run(search.threshold)


def _acdc_of_faithfulness(experiment: Experiment, run: Callable[[float], Found]) -> Found:
    """Lower tau until the circuit is faithful, then halve the last step a few times."""
    evaluator = Evaluator(experiment)
    gap = abs(evaluator.full - evaluator.empty)

    def attempt(tau: float) -> tuple[Found, bool]:
        found = run(tau)
        faithfulness = evaluator.faithfulness(found.circuit.in_circuit)
        return found, faithfulness is None or faithfulness >= DEFAULT_FAITHFULNESS

    high = 2 * _TAUS[0] * gap
    for low in (fraction * gap for fraction in _TAUS):
        best, faithful = attempt(low)
        if faithful:
            break
        high = low
    for _ in range(_REFINEMENTS if faithful else 0):
        middle = math.sqrt(high * low)
        found, faithful = attempt(middle)
        if faithful:
            low, best = middle, found
        else:
            high = middle
    return best


def _acdc_of_size(experiment: Experiment, n_edges: int, run: Callable[[float], Found]) -> Found:
    """Bisect tau (on a log scale) for the largest circuit of at most ``n_edges`` edges."""
    evaluator = Evaluator(experiment)
    gap = abs(evaluator.full - evaluator.empty)
    low, high = 1e-6 * gap, 2 * gap  # thresholds that keep too many, few enough
    best: Found | None = None
    for _ in range(_BISECTIONS):
        tau = math.sqrt(low * high)
        found = run(tau)
        if found.circuit.n_edges <= n_edges:
            high = tau
            if best is None or found.circuit.n_edges >= best.circuit.n_edges:
                best = found
            if found.circuit.n_edges == n_edges:
                break
        else:
            low = tau
    return run(high) if best is None else best


def _edges(experiment: Experiment, search: Search) -> int:
    """Edges that are tried one by one."""
    n_edges = experiment.graph.n_edges
    return min(n_edges, search.n_candidates) if experiment.graph.shape.sites else n_edges


def _acdc_units(experiment: Experiment, search: Search) -> int:
    if search.threshold is not None:
        return _edges(experiment, search)
    return _edges(experiment, search) * (
        _BISECTIONS if search.n_edges is not None else len(_TAUS) + _REFINEMENTS
    )


def _eap_acdc_units(experiment: Experiment, search: Search) -> int:
    proposal = len(experiment.task) * search.steps
    return proposal + _acdc_units(experiment, search) + SAMPLE


def _passes(experiment: Experiment, search: Search) -> int:
    return len(experiment.task)


def _find_eap(experiment: Experiment, search: Search, progress: Progress) -> Found:
    scores = _eap.eap(experiment, memory=search.memory, progress=progress)
    return from_scores(experiment, scores, search)


def _find_eap_ig(experiment: Experiment, search: Search, progress: Progress) -> Found:
    scores = _eap.eap_ig(experiment, search.steps, memory=search.memory, progress=progress)
    return from_scores(experiment, scores, search)


def _find_eap_ig_activations(experiment: Experiment, search: Search, progress: Progress) -> Found:
    scores = _eap.eap_ig_activations(
        experiment, search.steps, memory=search.memory, progress=progress
    )
    return from_scores(experiment, scores, search)


def _activation_passes(experiment: Experiment, search: Search) -> int:
    shape = experiment.model.shape
    groups = 1 + shape.n_layers * (1 + int(shape.has_mlp))
    return len(experiment.task) * search.steps * groups


def _find_clean_corrupted(experiment: Experiment, search: Search, progress: Progress) -> Found:
    scores = _eap.clean_corrupted(experiment, memory=search.memory, progress=progress)
    return from_scores(experiment, scores, search)


def _find_exact(experiment: Experiment, search: Search, progress: Progress) -> Found:
    narrowed = experiment.narrowed(search.n_candidates, search.memory)
    only = None if narrowed is None else narrowed[1]
    scores = exact(experiment, only=only, memory=search.memory, progress=progress)
    return from_scores(experiment, scores, search)


def _find_nap(experiment: Experiment, search: Search, progress: Progress) -> Found:
    scores = nap(experiment, memory=search.memory, progress=progress)
    return from_node_scores(experiment, scores, search)


def _find_nap_ig(experiment: Experiment, search: Search, progress: Progress) -> Found:
    scores = nap_ig(experiment, search.steps, memory=search.memory, progress=progress)
    return from_node_scores(experiment, scores, search)


def _find_hisp(experiment: Experiment, search: Search, progress: Progress) -> Found:
    scores = hisp(experiment, memory=search.memory, progress=progress)
    return from_node_scores(experiment, scores, search)


def _find_gim(experiment: Experiment, search: Search, progress: Progress) -> Found:
    scores = gim(experiment, memory=search.memory, progress=progress)
    return from_scores(experiment, scores, search)


def _find_ifr(experiment: Experiment, search: Search, progress: Progress) -> Found:
    scores = ifr(experiment, memory=search.memory, progress=progress)
    return from_scores(experiment, scores, replace(search, ranking="absolute"))


def _training(search: Search) -> Training:
    asked = {
        "sparsity": search.sparsity,
        "steps": search.mask_steps,
        "learning_rate": search.learning_rate,
        "seed": search.seed,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return Training(**given)  # type: ignore[arg-type]  # mypy knows no kinds by key


def _mask_steps(experiment: Experiment, search: Search) -> int:
    return _training(search).steps


def _sized(experiment: Experiment, search: Search) -> Search:
    """Say how many edges a target sparsity means, and that probabilities rank as they are."""
    n_edges = search.n_edges
    if search.sparsity is not None:
        n_edges = max(1, round((1 - search.sparsity) * experiment.graph.n_edges))
    return replace(search, ranking="absolute", n_edges=n_edges, sparsity=None)


def _find_edge_pruning(experiment: Experiment, search: Search, progress: Progress) -> Found:
    training = _training(search)
    scores = edge_pruning(
        experiment, training, memory=search.memory, progress=progress, note=search.note
    )
    found = from_scores(experiment, scores, _sized(experiment, search))
    return replace(found, details={**found.details, "training": asdict(training)})


def _find_subnetwork_probing(experiment: Experiment, search: Search, progress: Progress) -> Found:
    training = _training(search)
    scores = subnetwork_probing(
        experiment, training, memory=search.memory, progress=progress, note=search.note
    )
    found = from_node_scores(experiment, scores, _sized(experiment, search))
    return replace(found, details={**found.details, "training": asdict(training)})


_SMALLEST = f"default: the smallest circuit with faithfulness {DEFAULT_FAITHFULNESS}"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "acdc",
            "remove edges one by one while the metric changes by less than tau "
            "(Conmy et al. 2023); default tau: the largest of 3 %, 1 %, 0.3 %, ... of the "
            f"metric's gap whose circuit has faithfulness {DEFAULT_FAITHFULNESS}",
            _find_acdc,
            _acdc_units,
            minimised=True,
            latents=True,
        ),
        Method(
            "eap-acdc",
            "acdc on the edges whose absolute eap-ig score is at least --floor (default: a tenth "
            "of tau), the others go untested; a sample of these bounds what that missed; default "
            "tau as for acdc",
            _find_eap_acdc,
            _eap_acdc_units,
            minimised=True,
            options=("floor",),
        ),
        Method(
            "eap",
            f"edge attribution patching (Syed et al. 2023); {_SMALLEST}",
            _find_eap,
            _passes,
            latents=True,
        ),
        Method(
            "eap-ig",
            f"EAP with integrated gradients over the inputs (Hanna et al. 2024); {_SMALLEST}",
            _find_eap_ig,
            lambda experiment, search: len(experiment.task) * search.steps,
            latents=True,
        ),
        Method(
            "eap-ig-activations",
            f"EAP with integrated gradients over each layer's activations; {_SMALLEST}",
            _find_eap_ig_activations,
            _activation_passes,
        ),
        Method(
            "clean-corrupted",
            f"EAP with the mean gradient of the clean and the corrupt run; {_SMALLEST}",
            _find_clean_corrupted,
            lambda experiment, search: 2 * len(experiment.task),
            latents=True,
        ),
        Method(
            "gim",
            "EAP with gradient interaction modifications: softmax, norms and products in the "
            f"backward pass (Edin et al. 2025); {_SMALLEST}",
            _find_gim,
            _passes,
        ),
        Method(
            "ifr",
            "information flow routes: shares of what receivers read, no metric (Ferrando & Voita "
            f"2024); {_SMALLEST}",
            _find_ifr,
            _passes,
            signed=False,
        ),
        Method("exact", f"ablate each edge alone; {_SMALLEST}", _find_exact, _edges, latents=True),
        Method(
            "nap",
            "node attribution patching, an edge ranks as the lower of its ends (Nanda 2023); "
            f"{_SMALLEST}",
            _find_nap,
            _passes,
            latents=True,
        ),
        Method(
            "nap-ig",
            f"nap with integrated gradients over the inputs; {_SMALLEST}",
            _find_nap_ig,
            lambda experiment, search: len(experiment.task) * search.steps,
            latents=True,
        ),
        Method(
            "hisp",
            "head importance for pruning: nap by absolute value per prompt (Michel et al. 2019); "
            f"{_SMALLEST}",
            _find_hisp,
            _passes,
            signed=False,
        ),
        Method(
            "subnetwork-probing",
            "train a hard-concrete mask per node to a target --sparsity (Cao et al. 2021); "
            f"{_SMALLEST}",
            _find_subnetwork_probing,
            _mask_steps,
            options=("sparsity", "mask_steps", "learning_rate"),
            signed=False,
        ),
        Method(
            "edge-pruning",
            "train a hard-concrete mask per edge to a target --sparsity (Bhaskar et al. 2024); "
            f"{_SMALLEST}",
            _find_edge_pruning,
            _mask_steps,
            options=("sparsity", "mask_steps", "learning_rate"),
            signed=False,
        ),
    )
}


def get_method(name: str) -> Method:
    """Return a method by name; UnknownNameError lists the nearest."""
    if name not in METHODS:
        raise UnknownNameError("method", name, METHODS)
    return METHODS[name]
