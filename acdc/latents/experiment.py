"""An experiment whose graph holds latents; every method takes it as it takes any other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.engine.work import Work
from acdc.methods.eap import eap_ig
from graphs import select_top

__all__ = ["LatentExperiment"]


@dataclass(frozen=True, eq=False)
class LatentExperiment(Experiment):
    """An experiment on a model with dictionaries."""

    def narrowed(
        self, n_edges: int, memory: int
    ) -> tuple[LatentExperiment, NDArray[np.bool_]] | None:
        """Return the experiment on the best ``n_edges`` by eap-ig scores, and their mask.

        None where the graph has no more edges than that.
        """
        if self.graph.n_edges <= n_edges:
            return None
        scores = eap_ig(self, work=Work(memory))
        candidates = select_top(self.graph, scores, n_edges)
        return replace(self, candidates=candidates), candidates
