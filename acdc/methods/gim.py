"""EAP with gradient interaction modifications (Edin, Csordas et al. 2025, arXiv 2505.17630)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.engine.work import Work
from acdc.methods.base import NoOptions, method
from acdc.methods.eap import eap
from acdc.models.lowering.gim import GimRules, with_gim_gradients

__all__ = ["gim"]


@method(
    "gim",
    "EAP with gradient interaction modifications: softmax, norms and products in the backward "
    "pass (Edin et al. 2025)",
    counts=lambda options: (2, 1),
)
def gim(
    experiment: Experiment,
    options: NoOptions | None = None,
    work: Work | None = None,
    rules: GimRules | None = None,
) -> NDArray[np.float64]:
    """Edge attribution patching with modified gradients, see :mod:`acdc.models.lowering.gim`.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    options, work
        As in :func:`acdc.methods.eap.eap`.
    rules
        Which modifications; None: all of them.

    Returns
    -------
    ndarray
        ``[edge]``, to rank by: with gradients divided at products and norms frozen, scores no
        longer estimate what an edge's ablation does.  Costs one forward and backward pass.
    """
    model = with_gim_gradients(experiment.model, rules)
    return eap(experiment.differentiated(model), work=work or Work())
