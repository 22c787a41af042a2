"""Edge attribution patching, plain and with integrated gradients.

EAP: Nanda 2023; Syed, Rager & Conmy 2023, arXiv 2310.10348.  EAP-IG: Hanna, Pezzelle &
Belinkov 2024, arXiv 2403.17806.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from acdc.engine.attribution import AtBase, OfInputs, Point, Points, integrate
from acdc.engine.batch import Batch
from acdc.engine.experiment import Experiment
from acdc.engine.stages import SEVERAL_PLACES
from acdc.engine.work import Work
from acdc.methods.base import NoOptions, method
from acdc.models.lowering.model import Trace
from acdc.settings import Checked, option

__all__ = [
    "Integration",
    "at_base",
    "between_inputs",
    "clean_corrupted",
    "eap",
    "eap_ig",
    "eap_ig_activations",
]

Scores = NDArray[np.float64]

_NONE, _WORK = NoOptions(), Work()


@dataclass(frozen=True)
class Integration(Checked):
    """Options of methods that integrate gradients.

    Parameters
    ----------
    steps
        Points of the path, at least 1.
    """

    steps: int = option(5, "Integration steps.", at_least=1, at_most=10**5)

    def passes(self, experiment: Experiment) -> int:
        """Prompts times steps."""
        return len(experiment.task) * self.steps


def _passes(experiment: Experiment, options: Integration) -> int:
    return options.passes(experiment)


_FIVE = Integration()


def at_base(experiment: Experiment) -> Points:
    """Return the one point of plain attribution: the base run."""
    return AtBase(experiment)


def between_inputs(experiment: Experiment, steps: int) -> Points:
    """Return the points ``other + k / steps * (base - other)``, ``k = 0 .. steps - 1``, of inputs.

    Parameters
    ----------
    experiment
        Its direction says which run is the base; ``other`` are the embeddings of the other run
        or, if ablated edges carry constants, those (:meth:`Experiment.far_inputs`).
    steps
        How many.
    """

    def points(batch: Batch, base: Trace, other: Trace) -> Iterator[Point]:
        for k in range(steps):
            embeds = zip(base.embeds, experiment.far_inputs(other, base), strict=True)
            between = [torch.lerp(a, b, k / steps) for b, a in embeds]
            yield Point(experiment.runs(batch)[0], between)

    return OfInputs(points)


@method("eap", "edge attribution patching (Syed et al. 2023)", counts=lambda options: (2, 1))
def eap(experiment: Experiment, options: NoOptions = _NONE, work: Work = _WORK) -> Scores:
    """Edge attribution patching: gradients at the base run.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    options
        None.
    work
        Memory for one chunk of the score products; told of prompts.

    Returns
    -------
    ndarray
        ``[edge]``: estimated change of the metric (its own sign) when the edge is ablated.
        Misleads where the metric is flat at the base run (a saturated softmax); integrated
        gradients help there.
    """
    return integrate(experiment, at_base(experiment), 1, work.memory, work.progress)


@method(
    "eap-ig",
    "EAP with integrated gradients over the inputs (Hanna et al. 2024)",
    Integration,
    passes=_passes,
    counts=lambda options: (2 + options.steps, options.steps),
)
def eap_ig(experiment: Experiment, options: Integration = _FIVE, work: Work = _WORK) -> Scores:
    """EAP with integrated gradients over the input embeddings.

    The gradient is averaged over the inputs ``other + k / steps * (base - other)`` for
    ``k = 0 .. steps - 1``, see :func:`between_inputs`.  Parameters and result as :func:`eap`.  The
    edges out of the embeddings add up to the metric's difference between the ends of that path, up
    to the error of the sum (completeness); no other set of edges does.
    """
    points = between_inputs(experiment, options.steps)
    return integrate(experiment, points, options.steps, work.memory, work.progress)


@method(
    "clean-corrupted",
    "EAP with the mean gradient of the clean and the corrupt run",
    passes=lambda experiment, options: 2 * len(experiment.task),
    counts=lambda options: (4, 2),
)
def clean_corrupted(
    experiment: Experiment, options: NoOptions = _NONE, work: Work = _WORK
) -> Scores:
    """EAP with the mean of the gradients at the clean and at the corrupt run.

    Parameters and result as :func:`eap`.
    """

    def points(batch: Batch, base: Trace, other: Trace) -> Iterator[Point]:
        yield Point(batch.clean)
        yield Point(batch.corrupt)

    return integrate(experiment, OfInputs(points), 2, work.memory, work.progress)


def _group_passes(experiment: Experiment, options: Integration) -> int:
    writing = [stage for stage in experiment.program.stages if stage.blocks]
    return options.passes(experiment) * (1 + len(writing))


@method(
    "eap-ig-activations",
    "EAP with integrated gradients over each layer's activations",
    Integration,
    passes=_group_passes,
    not_across=SEVERAL_PLACES,
)
def eap_ig_activations(
    experiment: Experiment, options: Integration = _FIVE, work: Work = _WORK
) -> Scores:
    """EAP with gradients integrated over the senders' own outputs.

    For what each stage of the model writes in turn (the embeddings, the heads of a layer, its MLP;
    with dictionaries the latents of a site with their error node), the gradient is averaged over
    outputs ``ablated + k / steps * (base - ablated)`` of these senders alone, for
    ``k = 0 .. steps - 1``, and only they are credited with it (Hanna et al. 2024; their code
    credits every sender).  Costs ``steps`` passes per stage.  Parameters and result as
    :func:`eap`; the edges out of one stage add up to the effect of ablating them all.
    """
    program, steps = experiment.program, options.steps

    def points(batch: Batch, base: Trace, other: Trace) -> Iterator[Point]:
        tokens, values = experiment.runs(batch)[0], program.values(base)
        ablated = experiment.ablated_values(program.values(other), values)
        for k in range(steps):
            between = [torch.lerp(a, b, k / steps) for a, b in zip(ablated, values, strict=True)]
            yield Point(tokens, list(between[0][:, 0]), blocks=(0,))
            for stage in program.stages:
                if stage.blocks:
                    sums = [program.blocks[b].sum(between[b])[0] for b in stage.blocks]
                    replaced = stage.replaced(torch.stack(sums).sum(0))
                    yield Point(tokens, None, replaced, stage.blocks)

    return integrate(experiment, points, steps, work.memory, work.progress)
