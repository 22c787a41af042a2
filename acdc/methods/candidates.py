"""Which edges are tried, where trying every one would take too long."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.engine.work import Work
from acdc.methods.eap import eap_ig
from acdc.settings import Checked, option
from graphs import select_top

__all__ = ["Candidates", "narrow"]


def narrow(
    experiment: Experiment, n_edges: int, memory: int
) -> tuple[Experiment, NDArray[np.bool_]] | None:
    """Return an experiment on few edges of a graph with latents, and which.

    A graph of components alone is searched as a whole.

    Parameters
    ----------
    experiment
        Any.
    n_edges
        The largest connected circuit of at most so many edges by eap-ig scores; all other edges
        are ablated from the start.
    memory
        Bytes for the passes of the attribution.

    Returns
    -------
    tuple or None
        The experiment, and the mask ``[edge]`` of that circuit; None where every edge can be
        tried.
    """
    if not experiment.attachments or experiment.graph.n_edges <= n_edges:
        return None
    scores = eap_ig(experiment, work=Work(memory))
    candidates = select_top(experiment.graph, scores, n_edges)
    return replace(experiment, candidates=candidates), candidates


@dataclass(frozen=True)
class Candidates(Checked):
    """Options of methods that try edges one by one.

    Parameters
    ----------
    candidates
        On a graph with latents at most so many edges are tried: those with the largest
        attribution scores.
    """

    candidates: int = option(
        3000,
        "With latents: edges that are tried at most.",
        at_least=1,
        at_most=10**9,
        only="latents",
    )

    def n_tried(self, experiment: Experiment) -> int:
        """Edges that are tried one by one."""
        n_edges = experiment.graph.n_edges
        return min(n_edges, self.candidates) if experiment.graph.shape.sites else n_edges
