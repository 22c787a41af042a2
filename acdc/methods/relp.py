"""Relevance patching: EAP with LRP's coefficients for gradients.

Rezaei Jafari, Eberle, Khakzar & Nanda 2025, arXiv 2508.21258.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.engine.work import Work
from acdc.methods.base import method
from acdc.methods.eap import eap
from acdc.models.lowering.relp import RelpRules, with_relevance
from acdc.settings import Checked, option

__all__ = ["Options", "relp"]


@dataclass(frozen=True)
class Options(Checked):
    """What ``relp`` is asked for.

    Parameters
    ----------
    freeze_attention
        Whether attention patterns count as constants (the AH-rule).
    """

    freeze_attention: bool = option(
        False, "Patterns are constants: edges into queries and keys score 0."
    )


@method(
    "relp",
    "relevance patching: EAP with LRP's rules for norms, activations and gates in the backward "
    "pass (Jafari et al. 2025)",
    Options,
    counts=lambda options: (2, 1),
)
def relp(
    experiment: Experiment,
    options: Options | None = None,
    work: Work | None = None,
    rules: RelpRules | None = None,
) -> NDArray[np.float64]:
    """Edge attribution patching with coefficients of :mod:`acdc.models.lowering.relp`.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    options
        Whether attention is frozen.
    work
        As in :func:`acdc.methods.eap.eap`.
    rules
        Which rules; None: as the options say.

    Returns
    -------
    ndarray
        ``[edge]``: estimated change of the metric (its own sign) when the edge is ablated, by
        slopes of lines through 0 instead of tangents.  Equal to EAP where the model is linear.
        Costs one forward and backward pass.
    """
    rules = rules or RelpRules(freeze_attention=(options or Options()).freeze_attention)
    model = with_relevance(experiment.model, rules)
    return eap(experiment.differentiated(model), work=work or Work())
