"""What random circuits get: beside every agreement with a known circuit stands that of chance.

A circuit of most of a graph's edges "finds" most of any circuit, and most nodes lie on some path of
a circuit of a tenth of them.  So each number is measured again on random circuits of as many edges
(:class:`graphs.sample.PathSampler`), and each area of a ranking on shuffled scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from graphs.circuit import Circuit
from graphs.errors import GraphError
from graphs.graph import Graph
from graphs.known.compare import (
    Overlap,
    common_form,
    compare,
    compare_reference,
    counted_edges,
    same_graph,
)
from graphs.known.reference import Reference, inner_nodes
from graphs.known.roc import Items, auroc, average_precision, fed_nodes, sweep_roc
from graphs.sample import PathSampler
from graphs.select import Mask
from graphs.spans import span_name, split_span

__all__ = [
    "QUANTILE",
    "RATIOS",
    "AtChance",
    "Chance",
    "chance_of_pair",
    "chance_of_ranking",
    "chance_of_reference",
    "chance_of_sweep",
    "n_circuits",
]

RATIOS = ("precision", "recall", "f1", "jaccard")
QUANTILE = 0.95
_MOST, _FEWEST, _EDGES = 1000, 20, 200_000
_N_SHUFFLES = 200


@dataclass(frozen=True)
class Chance:
    """A number over random circuits.

    Parameters
    ----------
    mean
        Of all.
    high
        What :data:`QUANTILE` of them do not exceed.
    as_good
        Share of them that have at least the circuit's own number.
    """

    mean: float
    high: float
    as_good: float


@dataclass(frozen=True)
class AtChance:
    """What random circuits of a circuit's size share with a known one.

    Parameters
    ----------
    n_circuits, n_edges
        How many were drawn, and of how many edges (the last path of each may add a few).
    edges, nodes
        Each of :data:`RATIOS`; None as in :class:`graphs.ReferenceComparison`.
    roles
        Nodes of each role that they have.
    """

    n_circuits: int
    n_edges: int
    edges: Mapping[str, Chance] | None
    nodes: Mapping[str, Chance]
    roles: Mapping[str, Chance] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<AtChance: {self.n_circuits:,} random circuits of {self.n_edges:,} edges>"


def n_circuits(n_edges: int) -> int:
    """How many random circuits are drawn unless one says so: 1,000, fewer large ones.

    Examples
    --------
    >>> [n_circuits(n_edges) for n_edges in (0, 60, 1000, 20_000)]
    [1000, 1000, 200, 20]
    """
    return min(_MOST, max(_FEWEST, _EDGES // max(n_edges, 1)))


def chance_of_reference(
    circuit: Circuit, reference: Reference, *, n: int | None = None, seed: int = 0
) -> AtChance:
    """Measure what :func:`graphs.compare_reference` says of random circuits of the same size.

    The size is that in the graph that both are compared in, optional nodes included.

    Parameters
    ----------
    circuit, reference
        As there.
    n
        How many random circuits; None: :func:`n_circuits`.
    seed
        Of the draw.

    Raises
    ------
    GraphError
        If the reference is of another model's graph.
    """
    _, true = common_form(circuit, reference)
    whole, _ = common_form(circuit, reference, optional=False)
    graph, own = true.graph, compare_reference(circuit, reference)
    counted = counted_edges(graph, reference.optional_nodes)
    inner = _named(
        graph,
        (x for x in inner_nodes(graph) if split_span(x)[0] not in reference.optional_nodes),
    )
    spans = graph.shape.spans
    wanted = _named(graph, true.nodes() if spans else reference.nodes) & inner
    roles = {
        role: [
            _named(graph, [span_name(name, at) for at in reference.positions.get(name, spans)])
            if spans
            else _named(graph, [name])
            for name in names
        ]
        for role, names in reference.roles.items()
    }
    touched = _Touched(graph)
    edges, nodes, found = [], [], []
    for mask in _draw(graph, whole.n_edges, n, seed):
        has = touched.by(mask)
        edges.append(_ratios(mask & counted, true.in_circuit))
        nodes.append(_ratios(has & inner, wanted))
        found.append(
            {role: float(sum((has & at).any() for at in places)) for role, places in roles.items()}
        )
    return AtChance(
        len(edges),
        whole.n_edges,
        None if own.edges is None else _chances(edges, _own(own.edges)),
        _chances(nodes, _own(own.nodes)),
        _chances(found, {role: float(len(count.found)) for role, count in own.roles.items()}),
    )


def chance_of_pair(a: Circuit, b: Circuit, *, n: int | None = None, seed: int = 0) -> AtChance:
    """Measure what :func:`graphs.compare` says of random circuits of the size of ``a``, with ``b``.

    Parameters and errors as :func:`chance_of_reference`.
    """
    own = compare(a, b)
    a, b = same_graph(a, b)
    touched, has_b = _Touched(a.graph), _named(a.graph, b.nodes())
    drawn = _draw(a.graph, a.n_edges, n, seed)
    edges = [_ratios(mask, b.in_circuit) for mask in drawn]
    nodes = [_ratios(touched.by(mask), has_b) for mask in drawn]
    return AtChance(
        len(drawn), a.n_edges, _chances(edges, _own(own.edges)), _chances(nodes, _own(own.nodes))
    )


def chance_of_ranking(
    scored: Items,
    truth: Mask,
    scores: ArrayLike,
    *,
    absolute: bool = True,
    n: int = _N_SHUFFLES,
    seed: int = 0,
) -> dict[str, Chance]:
    """Measure AUROC and average precision of a ranking whose scores are shuffled over the edges.

    Of edges AUROC is 0.5 on the mean.  Of nodes, and of pairs of them, it is not: what many edges
    stand for ranks by the largest of their scores, so that what has more of them ranks higher.

    Parameters
    ----------
    scored, truth
        What is ranked, and ``[item]``: which are true.
    scores
        ``[edge]``.
    absolute
        As of :meth:`graphs.known.roc.Items.scores`.
    n, seed
        Of the shuffles.

    Returns
    -------
    dict
        ``auroc`` and ``average_precision``.
    """
    rng = np.random.default_rng(seed)
    values = np.asarray(scores, dtype=np.float64)

    def measured(edge_scores: NDArray[np.float64]) -> dict[str, float]:
        ranked = scored.scores(edge_scores, absolute=absolute)
        least = ranked[np.isfinite(ranked)].min(initial=0.0)  # an item without an edge is below
        ranked = np.where(np.isfinite(ranked), ranked, least - 1)
        areas = {"auroc": auroc, "average_precision": average_precision}
        return {name: area(truth, ranked) for name, area in areas.items()}

    return _chances([measured(rng.permutation(values)) for _ in range(n)], measured(values))


def chance_of_sweep(
    graph: Graph, scored: Items, truth: Mask, masks: Sequence[Mask], *, n: int = 20, seed: int = 0
) -> Chance:
    """Measure the area under the stairs of random circuits of the sizes of a sweep's.

    Parameters
    ----------
    graph, scored, truth
        The graph, what counts in it, and ``[item]``: what is true.
    masks
        ``[edge]`` masks of the sweep.
    n, seed
        Of the random sweeps.
    """
    sampler, rng = PathSampler(graph), np.random.default_rng(seed)
    most = int(sampler.on_path.sum())
    sizes = [min(int(mask.sum()), most) for mask in masks]

    def area(some: Sequence[Mask]) -> float:
        return sweep_roc(truth, [scored.mask(mask) for mask in some]).area

    areas = [{"": area([sampler.circuit(size, rng) for size in sizes])} for _ in range(n)]
    return _chances(areas, {"": area(masks)})[""]


def _draw(graph: Graph, n_edges: int, n: int | None, seed: int) -> list[Mask]:
    """Random circuits of so many edges, or of all that are on paths."""
    if n is not None and n < 1:
        raise GraphError(f"{n} random circuits: expected at least 1")
    sampler, rng = PathSampler(graph), np.random.default_rng(seed)
    size = min(n_edges, int(sampler.on_path.sum()))
    return [sampler.circuit(size, rng) for _ in range(n_circuits(size) if n is None else n)]


class _Touched:
    """Nodes at the ends of edges, all of which are on paths."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._edge, self._node = fed_nodes(graph)

    def by(self, mask: Mask) -> Mask:
        """``[node]``: nodes that edges in ``mask [edge]`` leave or enter."""
        found = np.zeros(self._graph.n_nodes, dtype=bool)
        found[self._graph.edge_sender[mask]] = True
        found[self._node[mask[self._edge]]] = True
        return found


def _named(graph: Graph, names: Iterable[str]) -> Mask:
    """``[node]`` mask of names, those that the graph has."""
    wanted = set(names)
    return np.array([name in wanted for name in graph.nodes])


def _ratios(mask: Mask, true: Mask) -> dict[str, float]:
    """As of :class:`graphs.Overlap`."""
    common, n_mask, n_true = int((mask & true).sum()), int(mask.sum()), int(true.sum())
    if not n_mask and not n_true:
        return dict.fromkeys(RATIOS, 1.0)
    wholes = (n_mask, n_true, (n_mask + n_true) / 2, n_mask + n_true - common)
    return {r: common / whole if whole else 0.0 for r, whole in zip(RATIOS, wholes, strict=True)}


def _own(overlap: Overlap) -> dict[str, float]:
    return {ratio: getattr(overlap, ratio) for ratio in RATIOS}


def _chances(drawn: Sequence[Mapping[str, float]], own: Mapping[str, float]) -> dict[str, Chance]:
    """Each number over what was drawn, beside the circuit's own."""
    found = {}
    for name, value in own.items():
        values = np.array([one[name] for one in drawn])
        found[name] = Chance(
            float(values.mean()),
            float(np.quantile(values, QUANTILE)),
            float((values >= value - 1e-12).mean()),
        )
    return found
