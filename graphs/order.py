"""The order in which ACDC visits receivers and their edges (Conmy et al. 2023, section 3).

It follows from the order of a graph's receivers and senders, which :mod:`graphs.graph` lays out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from graphs.graph import Graph

__all__ = ["edge_order", "receiver_order"]


def receiver_order(graph: Graph) -> list[int]:
    """Return receiver indices: ``logits``, then per layer from the last the MLP, v, k and q.

    Heads run from the last to the first within each kind, and spans from the last to the first
    within each of these: it is the graph's own order, backwards.
    """
    return list(range(len(graph.receivers)))[::-1]


def edge_order(graph: Graph, receiver: int) -> NDArray[np.int64]:
    """Return the edges of a receiver, senders from latest to earliest.

    Per layer from the last: the MLP, then the heads ascending; the embeddings come last.
    Latents stand where the component stands that they are parts of, ascending.
    """
    edges = np.arange(graph.receiver_start[receiver], graph.receiver_start[receiver + 1])
    place = graph.components.sender_place[graph.sender_component[graph.edge_sender[edges]]]
    return edges[np.argsort(-place, kind="stable")]
