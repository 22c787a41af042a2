"""Node attribution patching: EAP for whole nodes.

Nanda 2023, "Attribution patching"; the node methods of the MIB benchmark, arXiv 2504.13151.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from acdc.engine.attribution import node_scores
from acdc.engine.experiment import Experiment
from acdc.engine.work import Work
from acdc.methods.base import NoOptions, method
from acdc.methods.eap import Integration, at_base, between_inputs

__all__ = ["nap", "nap_ig"]

Scores = NDArray[np.float64]

_NONE, _WORK, _FIVE = NoOptions(), Work(), Integration()


@method(
    "nap",
    "node attribution patching, an edge ranks as the lower of its ends (Nanda 2023)",
    over="nodes",
    counts=lambda options: (3, 1),
)
def nap(experiment: Experiment, options: NoOptions = _NONE, work: Work = _WORK) -> Scores:
    """Node attribution patching: gradients at the base run.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    options
        None.
    work
        Memory for the activations of one pass; told of prompts.

    Returns
    -------
    ndarray
        ``[sender]``: estimated change of the metric (its own sign) when everything that the
        sender writes is ablated, mean over scored rows.  It is the sum of the EAP scores of the
        edges out of the sender, and misleads where EAP does.
    """
    return node_scores(experiment, at_base(experiment), 1, work.memory, work.progress)


@method(
    "nap-ig",
    "nap with integrated gradients over the inputs",
    Integration,
    over="nodes",
    passes=lambda experiment, options: options.passes(experiment),
    counts=lambda options: (2 + options.steps, options.steps),
)
def nap_ig(experiment: Experiment, options: Integration = _FIVE, work: Work = _WORK) -> Scores:
    """Node attribution patching with integrated gradients over the input embeddings.

    The gradient is averaged over the inputs ``other + k / steps * (base - other)`` for
    ``k = 0 .. steps - 1``, as in :func:`acdc.methods.eap.eap_ig` (EAP-IG's own code takes
    ``k = 1 .. steps`` for nodes).  Parameters and result as :func:`nap`.  Under resample ablation
    the embeddings' score tends to the metric's difference between the runs (completeness).
    """
    points = between_inputs(experiment, options.steps)
    return node_scores(experiment, points, options.steps, work.memory, work.progress)
