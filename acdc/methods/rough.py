"""Rough searches: about the circuit that ACDC finds, in a fraction of its time.

They say where to begin and what to expect, and decide nothing.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.engine.work import Work
from acdc.methods.eap import Integration, eap_ig
from acdc.tasks.split import some_prompts
from graphs import Circuit

__all__ = ["Rough"]

_FEWEST, _SHARE, _FLOOR = 8, 4, 16


class Rough:
    """ACDC on a quarter of the prompts, of the edges with large attribution scores alone.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    memory
        Bytes for the passes of the attribution.

    Attributes
    ----------
    few
        The experiment on a quarter of the prompts, at least 8, in the model's own dtype.
    expected
        ``[edge]``: what the removal of each edge is expected to change, in the minimised
        direction: attribution scores (EAP-IG) on these prompts, and once a search has been
        told of (:meth:`learn`), what it has measured.
    """

    def __init__(self, experiment: Experiment, memory: int) -> None:
        n = max(_FEWEST, len(experiment.task) // _SHARE)
        some = some_prompts(experiment.task, n)
        self.few = replace(experiment.pinned(), in_float32=None).on(some)
        scores = eap_ig(self.few, Integration(), Work(memory))
        self.scores: NDArray[np.float64] = self.few.minimised_sign * scores
        self.expected = self.scores.copy()

    def candidates(self, threshold: float) -> NDArray[np.bool_]:
        """``[edge]``: edges worth a test, with a score of at least a sixteenth of tau."""
        tested: NDArray[np.bool_] = np.abs(self.scores) >= threshold / _FLOOR
        return tested

    def learn(self, circuit: Circuit, threshold: float) -> None:
        """Expect what a search at a threshold has measured."""
        self.expected = np.where(self.candidates(threshold), circuit.scores, self.scores)
