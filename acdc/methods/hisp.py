"""Head importance scores for pruning (HISP).

Michel, Levy & Neubig 2019, "Are sixteen heads really better than one?", arXiv 1905.10650, as
Conmy et al. 2023, arXiv 2304.14997, extend it to corrupt activations and to MLPs::

    importance(u) = mean over prompts of |sum over pos of (ablated_u - base_u) . d metric / d u|

Under zero ablation that is Michel et al.'s ``|u . d metric / d u|``.  The absolute value is
taken of each prompt, so effects of both signs do not cancel; that is all that tells it from
:func:`acdc.methods.nap.nap`.  Michel et al. divide the scores of each layer's heads by their
Euclidean norm; here no score is divided, since MLPs, one to a layer, would all rank first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from acdc.engine.attribution import integrate_nodes
from acdc.engine.experiment import Experiment
from acdc.engine.work import Work
from acdc.methods.base import NoOptions, Score, method
from acdc.methods.eap import at_base

__all__ = ["hisp"]

_NONE, _WORK = NoOptions(), Work()


@method(
    "hisp",
    "head importance for pruning: nap by absolute value per prompt (Michel et al. 2019)",
    over="nodes",
    score=Score.MAGNITUDE,
    counts=lambda options: (3, 1),
)
def hisp(
    experiment: Experiment, options: NoOptions = _NONE, work: Work = _WORK
) -> NDArray[np.float64]:
    """Importance of every sender.

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
        ``[sender]``, at least 0: mean absolute first-order effect of ablating the sender, in
        the unit of the metric.  Blind where the metric is flat at the base run.
    """
    values = integrate_nodes(experiment, at_base(experiment), 1, work.memory, work.progress)
    return np.abs(values).sum(0) / experiment.n_rows
