"""Rough searches: about the circuit that ACDC finds, in a fraction of its time.

They say where to begin and what to expect, and decide nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.engine.incremental import IncrementalRun
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
        Bytes for the passes of the attribution, and for the scenarios of one evaluation.
    search
        ACDC itself: ``(experiment, threshold, expected=, candidates=, memory=, start=)`` to a
        circuit and how much was computed.

    Attributes
    ----------
    scores
        ``[edge]``: attribution scores (EAP-IG) on these prompts, in the minimised direction.
    expected
        ``[edge]``: what the removal of each edge is expected to change, in the minimised
        direction: the scores, and after a search what it has measured.
    """

    def __init__(
        self,
        experiment: Experiment,
        memory: int,
        search: Callable[..., tuple[Circuit, Any]],
    ) -> None:
        n = max(_FEWEST, len(experiment.task) // _SHARE)
        some = some_prompts(experiment.task, n)
        self._few = replace(experiment.pinned(), in_float32=None).on(some)
        self._memory, self._search = memory, search
        self._start = None if self._few.crosses_layers else IncrementalRun(self._few, memory)
        scores = eap_ig(self._few, Integration(), Work(memory))
        self.scores: NDArray[np.float64] = self._few.minimised_sign * scores
        self.expected = self.scores.copy()

    def __call__(self, threshold: float) -> Circuit:
        """Search at a threshold, among edges with a score of at least a sixteenth of it."""
        candidates = np.abs(self.scores) >= threshold / _FLOOR
        circuit, _ = self._search(
            self._few,
            threshold,
            expected=self.expected,
            candidates=candidates,
            memory=self._memory,
            start=self._start,
        )
        self.expected = np.where(candidates, circuit.scores, self.scores)
        return circuit
