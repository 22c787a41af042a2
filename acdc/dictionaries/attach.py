"""Attaching dictionaries, or MLP neurons, to an experiment: which latents become nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from acdc.dictionaries import Dictionary
from acdc.dictionaries.activations import activation
from acdc.dictionaries.attachment import (
    Attachment,
    CrossLayerAttachment,
    NeuronAttachment,
    check_dictionaries,
)
from acdc.dictionaries.experts import ExpertAttachment, experts_of
from acdc.dictionaries.neurons import Neurons, neurons_of
from acdc.engine.attribution import node_scores, strongest
from acdc.engine.experiment import Experiment
from acdc.errors import OptionError
from acdc.methods.eap import between_inputs
from acdc.models.lowering.model import LoweredModel

__all__ = [
    "MOST_NEURONS",
    "MOST_STREAMED",
    "Attached",
    "SiteReport",
    "active_latents",
    "attach",
    "attach_experts",
    "attach_neurons",
    "write_out",
]

_STEPS = 5
MOST_STREAMED = 200_000
"""Edges that are written out of a graph of too many: those with the largest attribution."""
MOST_NEURONS = 1000
"""Neurons that are nodes unless another number is asked for."""


@dataclass(frozen=True)
class SiteReport:
    """What became of the latents of one dictionary.

    Parameters
    ----------
    name
        What its nodes begin with.
    source, hook, architecture, fingerprint
        Of the dictionary.
    n_latents, n_active, n_kept
        Latents that it has, that are active on the task's prompts (clean or corrupt, any
        position), and that are nodes.
    folded_share
        Sum of the absolute node scores of the active latents that were folded into the error
        node, as a part of the sum over all that are active; 0 where none was.
    """

    name: str
    source: str
    hook: str
    architecture: str
    fingerprint: str
    n_latents: int
    n_active: int
    n_kept: int
    folded_share: float


@dataclass(frozen=True, eq=False)
class Attached:
    """An experiment with latents, and how they were chosen.

    Parameters
    ----------
    experiment
        For every method.
    sites
        One report per dictionary.
    folded_share
        As in :class:`SiteReport`, over all sites.
    """

    experiment: Experiment
    sites: tuple[SiteReport, ...]
    folded_share: float

    def summary(self) -> dict[str, Any]:
        """Plain values for run.json."""
        return {
            "sites": [asdict(site) for site in self.sites],
            "n_active": sum(site.n_active for site in self.sites),
            "n_kept": sum(site.n_kept for site in self.sites),
            "folded_share": self.folded_share,
            **({"n_edges": self.experiment.outline.n_edges} if self._is_streamed else {}),
        }

    @property
    def _is_streamed(self) -> bool:
        return self.experiment.places is not None


def attach(
    experiment: Experiment,
    dictionaries: Sequence[Dictionary],
    *,
    max_latents: int | None = None,
    latents: Sequence[Sequence[int]] | None = None,
    memory: int = 1 << 30,
) -> Attached:
    """Make the latents of dictionaries nodes of an experiment's graph.

    Parameters
    ----------
    experiment
        Model, prompts and metric.
    dictionaries
        SAEs and transcoders of the model, no two at one place.
    max_latents
        At most so many nodes in all: the active latents with the largest absolute node scores
        (integrated gradients over the inputs, five steps).  The others are folded into the
        error nodes.  None: every active latent is a node.
    latents
        Which latents of each dictionary are nodes, as in a circuit that was found before;
        None: chosen as described.
    memory
        Bytes that the activations of one pass may take.

    Returns
    -------
    Attached
        Its experiment goes wherever :class:`acdc.engine.experiment.Experiment` does.

    Raises
    ------
    DictionaryError
        If a dictionary does not fit the model, or two are at one place.
    OptionError
        If ``max_latents`` is below 1.

    Examples
    --------
    >>> attached = attach(experiment, read_dictionaries(["sae"]))  # doctest: +SKIP
    >>> eap_ig(attached.experiment)  # doctest: +SKIP
    """
    check_dictionaries(experiment.model, dictionaries)
    return _attach(experiment, dictionaries, max_latents, latents, memory)


def attach_neurons(
    experiment: Experiment,
    *,
    max_neurons: int | None = None,
    neurons: Mapping[int, Sequence[int]] | None = None,
    alone: bool = False,
    memory: int = 1 << 30,
) -> Attached:
    """Make the neurons of every MLP nodes of an experiment's graph.

    Parameters
    ----------
    experiment
        Model, prompts and metric.
    max_neurons
        At most so many nodes in all, chosen as in :func:`attach`; None: :data:`MOST_NEURONS`.
    neurons
        By layer, which of them are nodes, as in a circuit that was found before; None: chosen.
    alone
        Whether every neuron reads for itself, so that edges into it can be pruned alone.
    memory
        Bytes that the activations of one pass may take.

    Raises
    ------
    OptionError
        If ``max_neurons`` is below 1, the model has no MLPs, or lacks one of the neurons.
    UnsupportedModelError
        If the neurons of an MLP do not add up to what it writes.
    """
    found = neurons_of(experiment.model, alone=alone)
    if neurons is None:
        return _attach(experiment, found, max_neurons or MOST_NEURONS, None, memory)
    found = [n for n in found if n.layer in neurons]
    for n in found:
        if max(neurons[n.layer], default=0) >= n.n_latents:
            raise OptionError(
                f"the circuit has neuron {max(neurons[n.layer])} of m{n.layer}, which has "
                f"{n.n_latents} in {experiment.model.name!r}: name the model it was found in"
            )
    return _attach(experiment, found, None, [neurons[n.layer] for n in found], memory)


def attach_experts(experiment: Experiment, memory: int = 1 << 30) -> Attached:
    """Make the experts of every mixture nodes of an experiment's graph.

    Whether their router has a receiver is what the experiment says of it.

    Parameters
    ----------
    experiment
        Model, prompts and metric.
    memory
        Bytes that the activations of one pass may take.

    Raises
    ------
    OptionError
        If the model has no mixtures of experts.
    """
    routed = experiment.router == "free"
    found = experts_of(experiment.model, routed=routed)
    exactly = experiment.in_float32
    if exactly is not None:
        own = tuple(experts_of(exactly.model, routed=routed))
        exactly = replace(exactly, attachments=own)
    chosen = replace(experiment, attachments=tuple(found), in_float32=exactly)
    return Attached(write_out(chosen, memory), tuple(map(_report_experts, found)), 0.0)


def _report_experts(found: ExpertAttachment) -> SiteReport:
    n = len(found.latents)
    hook, digest = found.reads.name, found.fingerprint
    return SiteReport(found.site.name, found.source, hook, found.architecture, digest, n, n, n, 0.0)


def _attach(
    experiment: Experiment,
    dictionaries: Sequence[Dictionary | Neurons],
    max_latents: int | None,
    latents: Sequence[Sequence[int]] | None,
    memory: int,
) -> Attached:
    if max_latents is not None and max_latents < 1:
        raise OptionError(f"max_latents {max_latents}: expected at least 1")
    moved = [_placed(d, experiment.model) for d in dictionaries]
    active = active_latents(experiment, moved) if latents is None else latents
    attachments = [
        _attachment(experiment.model, d, some) for d, some in zip(moved, active, strict=True)
    ]
    kept, scores = attachments, [np.zeros(len(some)) for some in active]
    if max_latents is not None and max_latents < sum(map(len, active)):
        scores = _latent_scores(_reading_together(experiment, dictionaries, active), memory)
        kept = _top(attachments, scores, max_latents)
    reports = tuple(map(_report, attachments, kept, scores))
    total = sum(float(np.abs(s).sum()) for s in scores)
    folded = sum(_folded(a, k, s) for a, k, s in zip(attachments, kept, scores, strict=True))
    chosen = _with_latents(experiment, dictionaries, kept)
    if latents is None:
        chosen = write_out(chosen, memory)
    return Attached(chosen, reports, folded / total if total else 0.0)


def write_out(experiment: Experiment, memory: int, n_edges: int | None = None) -> Experiment:
    """Return an experiment whose graph can be written out.

    Of a graph of too many edges (:data:`graphs.graph.MOST_EDGES`) those with the largest absolute
    eap-ig scores are; all others are always ablated.

    Parameters
    ----------
    experiment
        Any.
    memory
        Bytes for the passes of the attribution, and a quarter as much for scores.
    n_edges
        How many; None: :data:`MOST_STREAMED`.
    """
    if not experiment.outline.is_large:
        return experiment
    points = between_inputs(experiment, _STEPS)
    places = strongest(experiment, points, _STEPS, n_edges or MOST_STREAMED, memory)
    exactly = experiment.in_float32
    exactly = None if exactly is None else replace(exactly, places=places)
    return replace(experiment, places=places, in_float32=exactly)


def _placed(dictionary: Dictionary | Neurons, model: LoweredModel) -> Dictionary | Neurons:
    """Return a dictionary in the type of a model, or the neurons of that model."""
    if isinstance(dictionary, Neurons):
        return replace(dictionary, model=model)
    return dictionary.to(model.device, model.dtype)


def _attachment(
    model: LoweredModel, dictionary: Dictionary | Neurons, latents: Sequence[int]
) -> Attachment:
    chosen = tuple(map(int, latents))
    if isinstance(dictionary, Neurons):
        return NeuronAttachment(model, dictionary, chosen)
    if dictionary.W_later is not None:
        return CrossLayerAttachment(model, dictionary, chosen)
    return Attachment(model, dictionary, chosen)


@torch.no_grad()
def active_latents(
    experiment: Experiment, dictionaries: Sequence[Dictionary | Neurons]
) -> list[tuple[int, ...]]:
    """Latents that are active anywhere in the clean or the corrupt run, by dictionary."""
    model = experiment.model
    sizes = [d.n_latents for d in dictionaries]

    def active(i: int) -> torch.Tensor:
        """``[latent]``, one dictionary after the other."""
        found = [torch.zeros(n, dtype=torch.bool, device=model.device) for n in sizes]
        batch = experiment.batches[i]
        for tokens in (batch.clean, batch.corrupt):
            trace = model.forward(tokens)
            for dictionary, own in zip(dictionaries, found, strict=True):
                x = activation(model, trace, dictionary.reads)
                own |= (dictionary.encode(x) != 0).flatten(0, 1).any(0)
        return torch.cat(found)

    found = experiment.sum_of_batches(active).split(sizes)
    return [tuple(own.nonzero()[:, 0].tolist()) for own in found]


def _reading_together(
    experiment: Experiment,
    dictionaries: Sequence[Dictionary | Neurons],
    latents: Sequence[Sequence[int]],
) -> Experiment:
    """Return the experiment with all latents as nodes; neurons have no receivers of their own.

    Node scores are the same, and the graph has no edge for every pair of neurons.
    """
    shared = [replace(d, alone=False) if isinstance(d, Neurons) else d for d in dictionaries]
    attachments = [
        _attachment(experiment.model, _placed(d, experiment.model), some)
        for d, some in zip(shared, latents, strict=True)
    ]
    return _with_latents(experiment, shared, attachments)


def _latent_scores(experiment: Experiment, memory: int) -> list[NDArray[np.float64]]:
    """Node scores of every attachment's latents, over all positions."""
    experiment = replace(experiment, positions=None)
    program, attachments = experiment.program, experiment.attachments
    scores = node_scores(experiment, between_inputs(experiment, _STEPS), _STEPS, memory)
    by_site = {
        stage.attachment.site.name: scores[program.blocks[stage.blocks[0]].start :]
        for stage in program.stages
        if hasattr(stage, "attachment")
    }
    return [by_site[a.site.name][: len(a.latents)] for a in attachments]


def _top(
    attachments: Sequence[Attachment], scores: Sequence[NDArray[np.float64]], n: int
) -> list[Attachment]:
    """Keep the ``n`` latents with the largest absolute scores; ties go to earlier ones."""
    size = np.abs(np.concatenate(scores))
    best = np.zeros(len(size), dtype=bool)
    best[np.argsort(-size, kind="stable")[:n]] = True
    parts = np.split(best, np.cumsum([len(s) for s in scores])[:-1])
    return [
        a.keeping([i for i, keep in zip(a.latents, part, strict=True) if keep])
        for a, part in zip(attachments, parts, strict=True)
    ]


def _folded(whole: Attachment, kept: Attachment, scores: NDArray[np.float64]) -> float:
    """Sum of the absolute scores of the latents that are no nodes."""
    nodes = set(kept.latents)
    return float(sum(abs(s) for i, s in zip(whole.latents, scores, strict=True) if i not in nodes))


def _report(whole: Attachment, kept: Attachment, scores: NDArray[np.float64]) -> SiteReport:
    dictionary, total = whole.dictionary, float(np.abs(scores).sum())
    return SiteReport(
        name=kept.site.name,
        source=dictionary.source,
        hook=dictionary.reads.name,
        architecture=dictionary.architecture,
        fingerprint=dictionary.fingerprint,
        n_latents=dictionary.n_latents,
        n_active=len(whole.latents),
        n_kept=len(kept.latents),
        folded_share=_folded(whole, kept, scores) / total if total else 0.0,
    )


def _with_latents(
    experiment: Experiment,
    dictionaries: Sequence[Dictionary | Neurons],
    kept: Sequence[Attachment],
) -> Experiment:
    """Return the experiment with these nodes, and its float32 twin too."""
    exactly = experiment.in_float32
    if exactly is not None:
        exact = exactly.model
        same = [
            _attachment(exact, _placed(d, exact), a.latents)
            for d, a in zip(dictionaries, kept, strict=True)
        ]
        exactly = _with_latents(exactly, dictionaries, same)
    return replace(experiment, attachments=tuple(kept), in_float32=exactly)
