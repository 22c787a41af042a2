"""What circuits of one graph share, beside what random circuits of the same sizes would.

Random circuits are unions of paths (:class:`graphs.sample.PathSampler`), one of the size of each
circuit, drawn together many times.  Beside their overlaps stand

* of each *node or edge*: the chance that at least as many random circuits have it as circuits do.
  Circuits being independent, the number is Poisson-binomial.  The chance that one has an edge is
  the share of the drawn ones that do (one more counted, so that it is never 0), and at least its
  size over the edges of the graph, as if edges were drawn one by one.  Random circuits of so many
  edges touch nearly every node of a small graph; a node's chance is therefore that of sets of as
  many nodes as the circuit has.  ``q`` corrects for how many were looked at (Benjamini & Hochberg
  1995);
* of each *pair of circuits*: how many edges random ones share, the share of draws with at least as
  many, and the hypergeometric chance of that, which knows nothing of paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, hypergeom

from graphs.circuit import Circuit
from graphs.errors import GraphError
from graphs.graph import Graph
from graphs.known.compare import same_graph
from graphs.known.roc import fed_nodes
from graphs.sample import PathSampler
from graphs.select import prune

__all__ = ["LEVEL", "Membership", "PairShare", "Sharing", "at_least", "share_several"]

LEVEL = 0.05
"""Of the false discoveries among what is said to be shared beyond chance."""

Mask = NDArray[np.bool_]
Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Membership:
    """Which circuits have which nodes, or edges.

    Parameters
    ----------
    names
        Of those that any circuit has, in the order of the graph.
    inside
        ``[name, circuit]``.
    p
        ``[name]``: chance that as many random circuits or more have it.
    q
        ``[name]``: the same, corrected for how many there are.
    n_total
        In the graph.
    """

    names: tuple[str, ...]
    inside: Mask
    p: Numbers
    q: Numbers
    n_total: int

    @property
    def counts(self) -> NDArray[np.int64]:
        """``[name]``: how many circuits have it."""
        return self.inside.sum(1)

    @property
    def beyond_chance(self) -> tuple[str, ...]:
        """Names that more circuits share than random ones would."""
        chosen: Mask = np.asarray((self.counts > 1) & (self.q <= LEVEL))
        return tuple(name for name, is_so in zip(self.names, chosen, strict=True) if is_so)

    @property
    def of_all(self) -> tuple[str, ...]:
        """Names that every circuit has."""
        every: Mask = np.asarray(self.inside.all(1))
        return tuple(name for name, is_so in zip(self.names, every, strict=True) if is_so)

    def only(self, circuit: int) -> tuple[str, ...]:
        """Names that one circuit alone has."""
        alone = self.inside[:, circuit] & (self.counts == 1)
        return tuple(name for name, is_so in zip(self.names, alone, strict=True) if is_so)


@dataclass(frozen=True)
class PairShare:
    """What two circuits share.

    Parameters
    ----------
    one, other
        Their places.
    n_common
        Edges in both.
    jaccard
        As a share of those in either.
    expected, high
        Edges that random circuits share: their mean, and what 95 % of draws do not exceed.
    p
        Share of draws with as many or more (one more counted).
    p_hypergeometric
        Chance of as many if edges were drawn one by one.
    """

    one: int
    other: int
    n_common: int
    jaccard: float
    expected: float
    high: float
    p: float
    p_hypergeometric: float


@dataclass(frozen=True, eq=False)
class Sharing:
    """What circuits of one graph share.

    Parameters
    ----------
    nodes, edges
        Of the circuits, pruned; nodes without embeddings and ``logits``.
    pairs
        Every two circuits.
    n_union, union_expected, union_low
        Edges in any circuit; of random ones the mean, and what 95 % of the draws have at least:
        circuits that share much need fewer.
    alone_expected
        ``[circuit]``: edges that a random circuit would have alone, the mean.
    n_draws
        Of the random circuits.
    """

    nodes: Membership
    edges: Membership
    pairs: tuple[PairShare, ...]
    n_union: int
    union_expected: float
    union_low: float
    alone_expected: tuple[float, ...]
    n_draws: int


def share_several(circuits: Sequence[Circuit], *, n: int = 200, seed: int = 0) -> Sharing:
    """Measure what circuits of one graph share.

    Parameters
    ----------
    circuits
        Two or more, none of them empty; what is on no path is left out.
    n, seed
        Of the random circuits.

    Raises
    ------
    GraphError
        If they are of different graphs, fewer than two, or one has no path.
    """
    masks = _masks(circuits)
    graph = circuits[0].graph
    drawn = _Drawn(graph, masks.sum(1).tolist(), n, seed)
    edge_chance = np.maximum(drawn.edge_chance, masks.sum(1)[:, None] / drawn.n_on_path)
    touched = _touched(graph, masks)
    outer = {*(graph.nodes[i] for i in np.flatnonzero(graph.source)), "logits"}
    inner = np.array([name not in outer for name in graph.nodes])
    node_chance = np.broadcast_to(touched[:, inner].mean(1)[:, None], touched.shape)
    nodes, edges = np.flatnonzero(touched.any(0) & inner), np.flatnonzero(masks.any(0))
    return Sharing(
        _membership(
            [graph.nodes[i] for i in nodes], touched[:, nodes], node_chance[:, nodes],
            int(inner.sum()),
        ),
        _membership(graph.edge_names(edges), masks[:, edges], edge_chance[:, edges], graph.n_edges),
        _pairs(masks, drawn),
        len(edges),
        float(drawn.unions.mean()),
        float(np.quantile(drawn.unions, 0.05)),
        tuple(drawn.alone.mean(0).tolist()),
        n,
    )  # fmt: skip


def at_least(chances: Numbers, counts: NDArray[np.int64]) -> Numbers:
    """Return the chance of at least so many of several independent events.

    Parameters
    ----------
    chances
        ``[event, name]``: of each.
    counts
        ``[name]``.

    Examples
    --------
    >>> at_least(np.full((3, 2), 0.5), np.array([1, 3])).tolist()
    [0.875, 0.125]
    """
    n_events, n_names = chances.shape
    exactly = np.zeros((n_events + 1, n_names))
    exactly[0] = 1
    for chance in chances:  # the number of events so far, one by one
        exactly[1:] = exactly[1:] * (1 - chance) + exactly[:-1] * chance
        exactly[0] *= 1 - chance
    tails: Numbers = exactly[::-1].cumsum(0)[::-1]
    return tails[counts, np.arange(n_names)]


def _masks(circuits: Sequence[Circuit]) -> Mask:
    """``[circuit, edge]``, pruned, once it is clear that all are of one graph."""
    if len(circuits) < 2:
        raise GraphError(f"{len(circuits)} circuits: expected at least 2 to compare")
    for other in circuits[1:]:
        if other.graph.shape.spans != circuits[0].graph.shape.spans:
            raise GraphError("the circuits are of different graphs: they have other spans")
        same_graph(circuits[0], other)
    masks = np.stack([prune(circuit.graph, circuit.in_circuit) for circuit in circuits])
    for place, mask in enumerate(masks, start=1):
        if not mask.any():
            raise GraphError(f"circuit {place} has no path to logits: leave it out")
    return masks


def _membership(names: Sequence[str], inside: Mask, chances: Numbers, n_total: int) -> Membership:
    """``inside`` and ``chances`` are ``[circuit, name]``."""
    p = np.minimum(at_least(np.minimum(chances, 1.0), inside.sum(0)), 1.0)
    # names that no circuit has were tested, too: they are shared by none (p is 1)
    q = false_discovery_control(np.append(p, np.ones(n_total - len(p))))[: len(p)]
    return Membership(tuple(names), inside.T, p, q, n_total)


def _pairs(masks: Mask, drawn: _Drawn) -> tuple[PairShare, ...]:
    found = []
    for place, (one, other) in enumerate(combinations(range(len(masks)), 2)):
        n_common = int((masks[one] & masks[other]).sum())
        n_one, n_other = int(masks[one].sum()), int(masks[other].sum())
        random = drawn.common[:, place]
        found.append(
            PairShare(
                one,
                other,
                n_common,
                n_common / (n_one + n_other - n_common),
                float(random.mean()),
                float(np.quantile(random, 0.95)),
                float((1 + (random >= n_common).sum()) / (1 + len(random))),
                float(hypergeom.sf(n_common - 1, drawn.n_on_path, n_one, n_other)),
            )
        )
    return tuple(found)


class _Drawn:
    """Random circuits of given sizes, and what they share.

    Attributes
    ----------
    edge_chance
        ``[circuit, edge]``: share of the draws that have it, one more counted.
    common
        ``[draw, pair]``: edges in both.
    unions
        ``[draw]``: edges in any.
    alone
        ``[draw, circuit]``: edges in it alone.
    n_on_path
        Edges that can be drawn.
    """

    def __init__(self, graph: Graph, sizes: Sequence[int], n: int, seed: int) -> None:
        sampler, rng = PathSampler(graph), np.random.default_rng(seed)
        self.n_on_path = int(sampler.on_path.sum())
        edges = np.zeros((len(sizes), graph.n_edges))
        common, unions, alone = [], [], []
        for _ in range(n):
            masks = np.stack([sampler.circuit(min(k, self.n_on_path), rng) for k in sizes])
            edges += masks
            counts = masks.sum(0)
            common.append([int((a & b).sum()) for a, b in combinations(masks, 2)])
            unions.append(int((counts > 0).sum()))
            alone.append((masks & (counts == 1)).sum(1))
        self.edge_chance = (edges + 1) / (n + 1)
        self.common, self.unions, self.alone = map(np.array, (common, unions, alone))


def _touched(graph: Graph, masks: Mask) -> Mask:
    """``[circuit, node]``: nodes that edges in ``masks [circuit, edge]`` leave or enter."""
    edge, node = fed_nodes(graph)
    found = np.zeros((len(masks), graph.n_nodes), dtype=bool)
    for has, mask in zip(found, masks, strict=True):
        has[graph.edge_sender[mask]] = True
        has[node[mask[edge]]] = True
    return found
