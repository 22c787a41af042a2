"""The order in which ACDC visits receivers and their edges (Conmy et al. 2023, section 3)."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from graphs.graph import Graph

__all__ = ["edge_order", "receiver_order"]

_RECEIVER = re.compile(r"(?:a(\d+)\.(?:h|kv)(\d+)(?:<([qkv])>)?|m(\d+))")
_KIND = {"v": 1, "k": 2, "q": 3, None: 4}


def receiver_order(graph: Graph) -> list[int]:
    """Return receiver indices: ``logits``, then per layer from the last the MLP, v, k and q.

    Heads run from the last to the first within each kind, and spans from the last to the first
    within each of these.  In a graph with latents the order is the reverse of the graph's own,
    which is the same where there are none.
    """
    if graph.shape.spans:
        ranks = np.argsort(receiver_order(graph.components))[graph.receiver_component]
        return np.lexsort((-graph.receiver_span, ranks)).tolist()
    if graph.shape.sites:
        return list(range(len(graph.receivers)))[::-1]

    def key(receiver: int) -> tuple[int, int, int]:
        name = graph.receivers[receiver]
        if name == "logits":
            return (-(10**9), 0, 0)
        match = _RECEIVER.fullmatch(name)
        if match is None:
            raise ValueError(f"receiver {name!r} has no place in the ACDC order")
        if match[4] is not None:
            return (-int(match[4]), 0, 0)
        return (-int(match[1]), _KIND[match[3]], -int(match[2]))

    return sorted(range(len(graph.receivers)), key=key)


def edge_order(graph: Graph, receiver: int) -> NDArray[np.int64]:
    """Return the edges of a receiver, senders from latest to earliest.

    Per layer from the last: the MLP, then the heads ascending; the embeddings come last.
    Latents stand where the component stands that they are parts of, ascending.
    """
    edges = np.arange(graph.receiver_start[receiver], graph.receiver_start[receiver + 1])
    rank = _sender_rank(graph)[graph.edge_sender[edges]]
    return edges[np.argsort(rank, kind="stable")]


def _sender_rank(graph: Graph) -> NDArray[np.int64]:
    if graph.shape.spans:
        return _sender_rank(graph.components)[graph.sender_component]
    if graph.shape.sites:
        return _rank_by_place(graph)
    heads = graph.shape.n_heads
    rank = np.zeros(graph.n_senders, dtype=np.int64)
    for i, name in enumerate(graph.senders):
        if name[0] == "m":
            rank[i] = -(int(name[1:]) * (heads + 1) + heads + 1)
        elif name[0] == "a":
            layer, head = name[1:].split(".h")
            rank[i] = -(int(layer) * (heads + 1) + heads) + int(head)
        else:
            rank[i] = 1 + i
    return rank


def _rank_by_place(graph: Graph) -> NDArray[np.int64]:
    """Rank senders by place from the last, within a place ascending."""
    places = [name.split(".")[0] for name in graph.senders]
    order = {place: i for i, place in enumerate(dict.fromkeys(places))}
    place = np.array([order[name] for name in places])
    rank = np.empty(graph.n_senders, dtype=np.int64)
    rank[np.lexsort((np.arange(graph.n_senders), -place))] = np.arange(graph.n_senders)
    return rank
