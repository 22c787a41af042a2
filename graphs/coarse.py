"""Joining what a graph keeps apart: q, k and v of a head, both embeddings, spans of a prompt.

An edge of the joined graph is in a circuit if one of the edges that it stands for is, so
joining loses detail but never has to guess; the other direction would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from graphs.circuit import Circuit
from graphs.errors import GraphError
from graphs.graph import Graph, GraphShape, component_graph
from graphs.spans import span_name, split_span

__all__ = ["coarse_edges", "coarsen", "joined_shape", "with_spans"]


def joined_shape(
    shape: GraphShape, *, qkv: bool = False, embed: bool = False, spans: bool = False
) -> GraphShape:
    """Return the shape with query, key and value, or both embeddings, or all spans joined."""
    return replace(
        shape.unsplit if spans else shape,
        split_qkv=shape.split_qkv and not qkv,
        split_embed=shape.split_embed and not embed,
    )


def with_spans(shape: GraphShape, other: GraphShape) -> GraphShape:
    """Return a shape split (or not) as another one is."""
    return replace(shape, spans=other.spans, scored_spans=other.scored_spans, reaches=other.reaches)


def coarse_edges(graph: Graph, coarse: Graph) -> NDArray[np.int64]:
    """Return ``[edge]``: which edge of a coarser graph each edge of this one is part of.

    Raises
    ------
    GraphError
        If ``coarse`` is not this graph with q/k/v, the embeddings or all spans joined.
    """
    joined = joined_shape(
        graph.shape,
        qkv=not coarse.shape.split_qkv,
        embed=not coarse.shape.split_embed,
        spans=not coarse.shape.spans,
    )
    if joined != coarse.shape:
        raise GraphError(f"{coarse.shape} is no coarser form of {graph.shape}")
    senders = np.array([_place(name, coarse, coarse.sender_index) for name in graph.senders])
    receivers = np.array([_place(name, coarse, coarse.receiver_index) for name in graph.receivers])
    wanted = receivers[graph.edge_receiver] * coarse.n_senders + senders[graph.edge_sender]
    there = coarse.edge_receiver.astype(np.int64) * coarse.n_senders + coarse.edge_sender
    return np.searchsorted(there, wanted)


def _place(name: str, coarse: Graph, index: Mapping[str, int]) -> int:
    """Index of the sender or receiver of a coarser graph that this one is part of."""
    component, span = split_span(name)
    if not coarse.shape.spans:
        span = ""
    for joined in (component, "input", component.partition("<")[0]):
        if (found := span_name(joined, span) if span else joined) in index:
            return index[found]
    raise GraphError(f"{name!r} is part of nothing in {coarse.shape}")


def coarsen(circuit: Circuit, shape: GraphShape) -> Circuit:
    """Return the circuit in the graph of a coarser shape.

    An edge is in if one of its parts is; its score is that of the part whose absolute score is
    largest.

    Raises
    ------
    GraphError
        If ``shape`` is not the circuit's own with q/k/v, the embeddings or all spans joined.
    """
    if circuit.graph.shape == shape:
        return circuit
    graph = component_graph(shape)
    part_of = coarse_edges(circuit.graph, graph)
    inside = np.zeros(graph.n_edges, dtype=bool)
    inside[part_of[circuit.in_circuit]] = True
    scores = np.zeros(graph.n_edges)
    rising = np.argsort(np.abs(circuit.scores), kind="stable")
    scores[part_of[rising]] = circuit.scores[rising]  # the largest is written last
    return Circuit(graph, scores, inside, circuit.info)
