"""Actions on nodes and edges, as weights of edges and shares of values (:mod:`acdc.engine.acted`).

========  ======================================================================================
action    what the edges of a node, or one edge, carry
========  ======================================================================================
ablate    what ablation says: a mean, a constant, zero
patch     what the sender writes in the corrupt run
scale     a multiple of what they carry otherwise
steer     besides, a multiple of the sender's mean difference between clean and corrupt prompts
========  ======================================================================================

What ablates or patches comes first, then what scales, then what steers, whatever the order in which
they are named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.engine.values import Values
from acdc.errors import OptionError
from graphs import Graph
from graphs.errors import GraphError, did_you_mean

__all__ = ["ABLATED", "CORRUPT", "STEERED", "Acted", "Actions", "steering"]

ABLATED, CORRUPT, STEERED = "ablated", "corrupt", "steered"
"""Values that an edge can carry a share of."""


@dataclass(frozen=True)
class Acted:
    """What actions make of every edge.

    Parameters
    ----------
    weights
        ``[edge]``: by what it multiplies what its sender writes.
    shares
        Of each of :data:`ABLATED`, :data:`CORRUPT` and :data:`STEERED`: ``[edge]``.
    """

    weights: NDArray[np.float64]
    shares: dict[str, NDArray[np.float64]]

    @property
    def needs(self) -> frozenset[str]:
        """Values of which some edge carries a share."""
        return frozenset(name for name, share in self.shares.items() if share.any())


@dataclass(frozen=True)
class Actions:
    """What is done to nodes and edges, by name.

    Parameters
    ----------
    ablate, patch
        Nodes and edges.
    scale, steer
        Node or edge -> factor.
    only_circuit
        Whether every edge outside the circuit is ablated.
    """

    ablate: tuple[str, ...] = ()
    patch: tuple[str, ...] = ()
    scale: Mapping[str, float] = field(default_factory=dict)
    steer: Mapping[str, float] = field(default_factory=dict)
    only_circuit: bool = False

    def __post_init__(self) -> None:
        both = sorted(set(self.ablate) & set(self.patch))
        if both:
            raise OptionError(f"{both[0]!r} is to be ablated and to be patched: choose one")
        for name, factor in (*self.scale.items(), *self.steer.items()):
            if not np.isfinite(factor):
                raise OptionError(f"{name}={factor}: expected a finite number")

    @property
    def texts(self) -> list[str]:
        """Each in words."""
        found = ["only the circuit"] if self.only_circuit else []
        found += [f"ablate {name}" for name in self.ablate]
        found += [f"patch {name}" for name in self.patch]
        found += [f"scale {name} by {factor:g}" for name, factor in self.scale.items()]
        return found + [f"steer {name} by {factor:g}" for name, factor in self.steer.items()]

    def on(self, graph: Graph, in_circuit: NDArray[np.bool_]) -> Acted:
        """Return what they make of the edges of a graph.

        Parameters
        ----------
        graph
            Its names are those of the actions.
        in_circuit
            ``[edge]``.

        Raises
        ------
        OptionError
            If nothing is to be done.
        GraphError
            If there is no node or edge of a name.
        """
        if not self.texts:
            raise OptionError(
                "nothing is to be done: ask for --ablate, --scale, --patch, --steer or "
                "--only-circuit"
            )
        weights = np.ones(graph.n_edges)
        shares = {name: np.zeros(graph.n_edges) for name in (ABLATED, CORRUPT, STEERED)}

        def carry(edges: NDArray[np.bool_], value: str) -> None:
            weights[edges] = 0
            for name, share in shares.items():
                share[edges] = name == value

        if self.only_circuit:
            carry(~in_circuit, ABLATED)
        for value, names in ((ABLATED, self.ablate), (CORRUPT, self.patch)):
            for name in names:
                carry(_edges_of(graph, name), value)
        for name, factor in self.scale.items():
            edges = _edges_of(graph, name)
            for numbers in (weights, *shares.values()):
                numbers[edges] *= factor
        for name, factor in self.steer.items():
            shares[STEERED][_edges_of(graph, name)] += factor
        return Acted(weights, shares)


def _edges_of(graph: Graph, name: str) -> NDArray[np.bool_]:
    """``[edge]``: an edge, or those out of a node."""
    if "->" in name:
        return graph.edge_mask([name])
    if name not in graph.sender_index:
        near = did_you_mean(name, graph.senders)
        raise GraphError(f"no node {name!r} writes to the stream; {near}")
    found: NDArray[np.bool_] = graph.edge_sender == graph.sender_index[name]
    return found


@torch.no_grad()
def steering(experiment: Experiment) -> Values:
    """Mean difference of what senders write, clean minus corrupt.

    Parameters
    ----------
    experiment
        Model and prompt pairs.

    Returns
    -------
    list of Tensor
        By block, ``[sender, 1, 1, 1, width]``: the mean over all tokens of the pairs from the first
        one in which the two prompts differ (before it there is no difference in a causal model).

    Raises
    ------
    OptionError
        If clean and corrupt prompts are all the same.
    """
    totals: Values = []
    n_tokens = 0
    for batch in experiment.batches:
        clean, corrupt = experiment.written(batch.clean), experiment.written(batch.corrupt)
        since = (batch.clean != batch.corrupt).cumsum(1) > 0  # (batch, pos)
        n_tokens += int(since.sum())
        sums = [
            ((a - b) * since[..., None]).sum((-3, -2), keepdim=True)
            for a, b in zip(clean, corrupt, strict=True)
        ]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    if not n_tokens:
        raise OptionError("steer: clean and corrupt prompts are the same, there is no difference")
    return [total / n_tokens for total in totals]
