"""Node attribution patching: EAP for whole nodes.

Nanda 2023, "Attribution patching"; the node methods of the MIB benchmark, arXiv 2504.13151.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.methods.eap import at_base, between_inputs

__all__ = ["nap", "nap_ig"]

Scores = NDArray[np.float64]
Progress = Callable[[int], None]


def nap(
    experiment: Experiment,
    *,
    memory: int = 1 << 30,
    progress: Progress = lambda n_prompts: None,
) -> Scores:
    """Node attribution patching: gradients at the base run.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    memory
        Bytes that the activations of one pass may take.
    progress
        Called with the number of prompts after each pass.

    Returns
    -------
    ndarray
        ``[sender]``: estimated change of the metric (its own sign) when everything that the
        sender writes is ablated, mean over scored rows.  It is the sum of the EAP scores of the
        edges out of the sender, and misleads where EAP does.
    """
    return experiment.attribute_nodes(at_base(experiment), 1, memory, progress)


def nap_ig(
    experiment: Experiment,
    steps: int = 5,
    *,
    memory: int = 1 << 30,
    progress: Progress = lambda n_prompts: None,
) -> Scores:
    """Node attribution patching with integrated gradients over the input embeddings.

    The gradient is averaged over the inputs ``other + k / steps * (base - other)`` for
    ``k = 0 .. steps - 1``, as in :func:`acdc.methods.eap.eap_ig` (EAP-IG's own code takes
    ``k = 1 .. steps`` for nodes).  Parameters and result as :func:`nap`.
    """
    points = between_inputs(experiment, steps)
    return experiment.attribute_nodes(points, steps, memory, progress)
