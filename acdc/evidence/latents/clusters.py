"""Clusters of latents that are active together.

Agglomerative clustering with average linkage over one minus the correlation of two latents'
activations, over the tokens of all prompts of the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from acdc.errors import OptionError
from acdc.evidence.latents.activations import Activations

__all__ = ["Cluster", "cluster_latents", "correlations"]

_MOST = 8192
"""Latents that are clustered at most: all pairs are compared."""


@dataclass(frozen=True)
class Cluster:
    """Latents that are active together.

    Parameters
    ----------
    latents
        Positions among those of the :class:`Activations`.
    together
        Mean correlation of its pairs: 1 where all are active together; None for a latent alone.
    """

    latents: tuple[int, ...]
    together: float | None


def correlations(activations: Activations) -> NDArray[np.float64]:
    """``[latent, latent]``: of activations over tokens; 0 with a latent that is constant."""
    values = activations.values.astype(np.float64)
    n = values.shape[0]
    mean = np.asarray(values.mean(axis=0))[0]
    products = np.asarray((values.T @ values).todense()) / n - np.outer(mean, mean)
    deviation = np.sqrt(np.clip(np.diag(products), 0, None))
    varies = deviation > 1e-6 * mean
    scale = np.where(varies, 1 / np.where(varies, deviation, 1.0), 0.0)
    found: NDArray[np.float64] = np.clip(products * np.outer(scale, scale), -1.0, 1.0)
    np.fill_diagonal(found, 1.0)
    return found


def cluster_latents(activations: Activations, n_clusters: int) -> list[Cluster]:
    """Return at most ``n_clusters`` clusters (fewer where distances tie), the largest first.

    Raises
    ------
    OptionError
        If ``n_clusters`` is below 1 or above the number of latents, or there are too many latents.
    """
    n = len(activations.nodes)
    if not 1 <= n_clusters <= n:
        raise OptionError(f"clusters {n_clusters}: expected 1 to {n}, the circuit's latents")
    if n > _MOST:
        raise OptionError(
            f"{n:,} latents are too many to compare in pairs: expected at most {_MOST:,}; find a "
            "smaller circuit with --edges"
        )
    alike = correlations(activations)
    if n == 1:
        return [Cluster((0,), None)]
    tree = linkage(squareform(1 - alike, checks=False), "average")
    labels = fcluster(tree, n_clusters, "maxclust")
    groups = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    groups.sort(key=lambda group: (-len(group), group))
    return [Cluster(tuple(group), _mean_of_pairs(alike, group)) for group in groups]


def _mean_of_pairs(alike: NDArray[np.float64], group: Sequence[int]) -> float | None:
    if len(group) < 2:
        return None
    return float(alike[np.ix_(group, group)][np.triu_indices(len(group), 1)].mean())
