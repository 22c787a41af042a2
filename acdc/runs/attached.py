"""Latents, neurons and experts of a run: attached, found again, and said of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from acdc.dictionaries.attach import Attached, attach, attach_experts, attach_neurons
from acdc.dictionaries.attachment import site_kind
from acdc.dictionaries.quality import Quality
from acdc.dictionaries.sources import load_dictionaries
from acdc.engine.attribution import node_scores
from acdc.engine.experiment import Experiment
from acdc.errors import DictionaryError, OptionError
from acdc.measure.error_nodes import default_thresholds, errors_in_and_out, sweep_nodes
from acdc.measure.evaluation import Evaluation, Evaluator
from acdc.methods.eap import between_inputs
from acdc.settings import Settings
from graphs import Circuit, Graph
from graphs.sites import ALONE, EXPERTS, NEURONS, Site

__all__ = [
    "attach_dictionaries",
    "attached_nodes",
    "latent_details",
    "mixture_details",
    "norms_details",
    "reattach",
]

_STEPS = 5
"""Integration steps of the node scores in run.json."""


def attached_nodes(
    experiment: Experiment,
    settings: Settings,
    memory: int = 1 << 30,
    sites: Mapping[str, Site] | None = None,
) -> Attached | None:
    """Attach what settings name, if anything.

    ``sites`` as in :func:`acdc.runs.discover.discover`.
    """
    if settings.saes is not None:
        return attach_dictionaries(experiment, settings, memory, sites)
    if settings.neurons:
        chosen = None if sites is None else {site.layer: site.latents for site in sites.values()}
        return attach_neurons(
            experiment, max_neurons=settings.max_latents, neurons=chosen,
            alone=settings.neuron_inputs, memory=memory,
        )  # fmt: skip
    return attach_experts(experiment, memory) if settings.experts else None


def attach_dictionaries(
    experiment: Experiment,
    settings: Settings,
    memory: int = 1 << 30,
    sites: Mapping[str, Site] | None = None,
) -> Attached:
    """Attach the dictionaries that settings name.

    Parameters
    ----------
    experiment
        What :func:`acdc.runs.building.build_experiment` gives for the settings.
    settings
        With ``saes``.
    memory
        Bytes for the passes that choose the latents.
    sites
        By name, as in a circuit that was found before: its latents are nodes; None: chosen.

    Raises
    ------
    DictionaryError
        If a dictionary cannot be read or does not fit, or the circuit has other sites.
    """
    assert settings.saes is not None
    dictionaries = load_dictionaries(settings.saes, settings.model or "")
    if sites is None:
        return attach(experiment, dictionaries, max_latents=settings.max_latents, memory=memory)
    found = {Site(*site_kind(d), ()).name: d for d in dictionaries}
    if found.keys() != sites.keys():
        raise DictionaryError(
            f"the circuit has latents at {', '.join(sites)}, the dictionaries given are for "
            f"{', '.join(found)}: give the dictionaries that it was found with"
        )
    some = list(sites.values())
    return attach(experiment, [found[s.name] for s in some], latents=[s.latents for s in some])


def reattach(experiment: Experiment, settings: Settings, graph: Graph) -> Experiment:
    """Make nodes of the latents, or neurons, of a circuit that was found before.

    Parameters
    ----------
    experiment
        What :func:`acdc.runs.building.build_experiment` gives for the settings.
    settings
        With ``saes`` if the circuit has latents; neurons come with the model.
    graph
        Of the circuit.

    Raises
    ------
    OptionError
        If the settings name dictionaries of a circuit with neurons, or none of one with latents.
    """
    sites = graph.shape.site_at
    kinds = {site.kind for site in sites.values()}
    if kinds & set(NEURONS):
        if settings.saes is not None:
            raise OptionError("the circuit has neurons, not latents: leave --saes out")
        chosen = {site.layer: site.latents for site in sites.values()}
        alone = bool(kinds & set(ALONE))
        found = attach_neurons(experiment, neurons=chosen, alone=alone).experiment
    elif kinds & set(EXPERTS):
        free = replace(experiment, router="free" if "routed" in kinds else "frozen")
        found = attach_experts(free).experiment
    elif settings.saes is None:
        raise OptionError("the circuit has latents: say with --saes which dictionaries they are of")
    else:
        found = attach_dictionaries(experiment, settings, sites=sites).experiment
    if not found.outline.is_large:
        return found
    return replace(found, places=found.outline.places_of(graph))


def latent_details(
    attached: Attached | None,
    evaluator: Evaluator,
    circuit: Circuit,
    qualities: Sequence[Quality],
) -> dict[str, Any]:
    """Return what run.json says of latents: sites, quality, and what error nodes carry."""
    if attached is None:
        return {}
    experiment = attached.experiment
    if any(site.kind in EXPERTS for site in experiment.graph.shape.sites):
        return {}  # nothing is folded and there are no error nodes
    scores = node_scores(experiment, between_inputs(experiment, _STEPS), _STEPS)
    return {
        "latents": {
            **attached.summary(),
            "quality": [asdict(quality) for quality in qualities],
            "error_nodes": asdict(errors_in_and_out(evaluator, circuit.in_circuit)),
            "node_thresholds": [
                asdict(row) for row in sweep_nodes(evaluator, scores, default_thresholds(scores))
            ],
        }
    }


def mixture_details(experiment: Experiment, attached: Attached | None) -> dict[str, Any]:
    """Return what run.json says of mixtures of experts: their router, and experts that are nodes.

    None in a model without.
    """
    if not experiment.model.has_experts:
        return {}
    base = "clean" if experiment.direction == "noising" else "corrupt"
    how = f"frozen at the {base} run" if experiment.router == "frozen" else "free"
    nodes = attached.summary() if attached is not None and experiment.graph.shape.sites else {}
    return {"mixtures": {"router": how, **nodes}}


def norms_details(
    experiment: Experiment, circuit: Circuit, evaluation: Evaluation
) -> dict[str, Any]:
    """Return what run.json says of frozen norms: the circuit's faithfulness with live ones too."""
    if experiment.norms == "live":
        return {}
    live = Evaluator(replace(experiment, norms="live")).faithfulness(circuit.in_circuit)
    return {"faithfulness_by_norms": {"frozen": evaluation.faithfulness, "live": live}}
