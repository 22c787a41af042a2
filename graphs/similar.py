"""Nodes that do the same work: they read the same senders and are read by the same receivers."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from graphs.circuit import Circuit
from graphs.graph import parse_node
from graphs.select import Mask
from graphs.sites import parse_latent
from graphs.spans import split_span

__all__ = ["similar_nodes"]

_APART = 2.0
"""Distance of nodes that are never put together: more than that of opposite ones, which is 1."""
_MOST = 1_500


def similar_nodes(
    circuit: Circuit, mask: Mask, *, least: float = 0.5, one_layer: bool = False
) -> list[tuple[str, ...]]:
    """Return sets of at least two nodes with similar neighbours, the largest scores first.

    Nodes of a set are in the graph's order.  Two nodes are as similar as the mean of two cosines:
    of the scores of their edges in, by sender and port, and of those of their edges out, by
    receiver.  In a set every two are similar (complete linkage), of one kind and at one span, and
    no edge joins them.

    Parameters
    ----------
    circuit
        With its scores.
    mask
        ``[edge]``: what counts.
    least
        Similarity that every two nodes of a set have.
    one_layer
        Whether sets stay within a layer.
    """
    graph = circuit.graph
    edges = np.flatnonzero(mask)
    scores = circuit.scores[edges]
    ends: set[tuple[str, str]] = set()
    inputs: dict[str, dict[str, float]] = defaultdict(dict)
    outputs: dict[str, dict[str, float]] = defaultdict(dict)
    for edge, score in zip(edges.tolist(), scores.tolist(), strict=True):
        sender = graph.senders[graph.edge_sender[edge]]
        receiver = int(graph.edge_receiver[edge])
        outputs[sender][graph.receivers[receiver]] = score
        for node in graph.fed_by(receiver).tolist():
            name = graph.nodes[node]
            inputs[name][f"{sender}{graph.port[receiver]}"] = score
            ends.add((sender, name))
    names = [name for name in outputs if name in inputs and _kind(name) is not None]
    worth = {name: sum(map(abs, outputs[name].values())) for name in names}
    names = sorted(names, key=lambda name: -worth[name])[:_MOST]
    if len(names) < 2:
        return []
    alike = (_cosines([inputs[n] for n in names]) + _cosines([outputs[n] for n in names])) / 2
    distance = 1 - np.clip(alike, 0, 1)
    kinds = [_kind(name, one_layer) for name in names]
    numbers = np.array([kinds.index(kind) for kind in kinds])
    distance[numbers[:, None] != numbers] = _APART
    place = {name: i for i, name in enumerate(names)}
    for one, other in ends:
        if one in place and other in place:
            distance[place[one], place[other]] = distance[place[other], place[one]] = _APART
    np.fill_diagonal(distance, 0)
    from scipy.cluster.hierarchy import fcluster, linkage  # half a second that few pictures need

    tree = linkage(distance[np.triu_indices(len(names), 1)], "complete")
    sets: dict[int, list[str]] = defaultdict(list)
    for name, number in zip(names, fcluster(tree, 1 - least, "distance").tolist(), strict=True):
        sets[number].append(name)
    order = graph.sender_index
    found = [
        tuple(sorted(members, key=lambda name: order[name]))
        for members in sets.values()
        if len(members) > 1
    ]
    return sorted(found, key=lambda members: -sum(worth[name] for name in members))


def _kind(name: str, with_layer: bool = False) -> tuple[object, ...] | None:
    """What nodes of a set agree in; None for nodes that stay alone."""
    component, span = split_span(name)
    latent = parse_latent(component)
    kind, layer, _ = parse_node(component)
    where = latent[1] if latent else ""
    if kind in ("input", "logits", "cut", "error", "router"):
        return None
    return (kind, where, span, layer if with_layer else None)


def _cosines(rows: list[dict[str, float]]) -> NDArray[np.float64]:
    """``[row, row]`` cosines of sparse rows; 0 where one is empty."""
    columns = {name: i for i, name in enumerate(dict.fromkeys(n for row in rows for n in row))}
    values = np.zeros((len(rows), len(columns)))
    for i, row in enumerate(rows):
        for name, value in row.items():
            values[i, columns[name]] = value
    largest = np.abs(values).max(axis=1, keepdims=True, initial=0.0)
    values = np.divide(values, largest, out=values, where=largest > 0)  # squares stay finite
    length = np.linalg.norm(values, axis=1, keepdims=True)
    unit = np.divide(values, length, out=np.zeros_like(values), where=length > 0)
    return unit @ unit.T
