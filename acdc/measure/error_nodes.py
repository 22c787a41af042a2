"""Faithfulness and completeness with error nodes in and out, as in sparse feature circuits.

Marks et al. 2024 (arXiv 2403.19647, section 3): a circuit of the nodes above a threshold is
faithful if the model with all other nodes ablated does the task, and complete if the model
without the circuit's nodes does not.  Error nodes are in, or ablated, for comparison: what is
lost without them is what the dictionaries do not explain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from acdc.measure.evaluation import Evaluator
from graphs import Graph
from graphs.graph import parse_node

__all__ = [
    "ErrorNodes",
    "NodeCircuit",
    "default_thresholds",
    "error_edges",
    "errors_in_and_out",
    "node_mask",
    "sweep_nodes",
]

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class ErrorNodes:
    """Faithfulness of a circuit and of its complement, with error nodes in and out.

    Parameters
    ----------
    with_errors, without_errors
        The circuit with every edge between error nodes and its nodes, and with none.
    complement_with_errors, complement_without_errors
        Likewise everything but the circuit; near 0 where the circuit is complete.
    """

    with_errors: float | None
    without_errors: float | None
    complement_with_errors: float | None
    complement_without_errors: float | None


@dataclass(frozen=True)
class NodeCircuit:
    """The circuit of the nodes above a threshold.

    Parameters
    ----------
    threshold
        Least absolute node score.
    n_nodes, n_latents
        Nodes that are no error nodes (the embeddings are always in), and latents among them.
    n_edges
        Edges between them.
    faithfulness
        With error nodes in and out.
    """

    threshold: float
    n_nodes: int
    n_latents: int
    n_edges: int
    faithfulness: ErrorNodes


def default_thresholds(scores: NDArray[np.float64]) -> list[float]:
    """Return eight thresholds from the largest absolute score down to a thousandth of it."""
    largest = float(np.abs(scores).max(initial=0.0))
    return [largest * float(part) for part in np.geomspace(0.5, 0.001, 8)]


def error_edges(graph: Graph) -> Mask:
    """``[edge]``: from or into an error node alone."""
    error = _of_kind(graph, "error")
    only_error = np.zeros(len(graph.receivers), dtype=bool)
    alone = np.flatnonzero(np.diff(graph.feeds_start) == 1)
    only_error[alone] = error[graph.feeds[graph.feeds_start[alone]]]
    return error[graph.edge_sender] | only_error[graph.edge_receiver]


def _of_kind(graph: Graph, kind: str) -> Mask:
    return np.array([parse_node(name)[0] == kind for name in graph.nodes])


def node_mask(graph: Graph, nodes: Mask) -> Mask:
    """``[edge]``: edges between the nodes in ``[node]``; ``logits`` is always one of them."""
    inside = nodes.copy()
    inside[graph.n_senders] = True
    counts = np.concatenate([[0], np.cumsum(inside[graph.feeds])])
    fed = counts[graph.feeds_start[1:]] > counts[graph.feeds_start[:-1]]
    return inside[graph.edge_sender] & fed[graph.edge_receiver]


def errors_in_and_out(evaluator: Evaluator, mask: Mask) -> ErrorNodes:
    """Measure a circuit of edges ``[edge]`` with all error nodes' edges in, and with none.

    With error nodes in, the edges between them and the circuit's nodes (and among themselves)
    are added; the complement is every edge that is not in the circuit.
    """
    graph = evaluator.experiment.graph
    errors = error_edges(graph)
    inside = np.zeros(graph.n_nodes, dtype=bool)
    inside[graph.edge_sender[mask]] = True
    inside |= _of_kind(graph, "error") | graph.source
    added = errors & node_mask(graph, inside)
    return ErrorNodes(
        evaluator.faithfulness(mask | added),
        evaluator.faithfulness(mask & ~errors),
        evaluator.faithfulness(~mask | errors),
        evaluator.faithfulness(~mask & ~errors),
    )


def sweep_nodes(
    evaluator: Evaluator, scores: NDArray[np.float64], thresholds: Sequence[float]
) -> list[NodeCircuit]:
    """Measure the circuits of the nodes above each threshold.

    Parameters
    ----------
    evaluator
        Of an experiment with dictionaries.
    scores
        ``[sender]`` node scores.
    thresholds
        Least absolute scores.
    """
    graph = evaluator.experiment.graph
    error, latent = _of_kind(graph, "error"), _of_kind(graph, "latent")
    found = []
    for threshold in thresholds:
        chosen = np.append(np.abs(scores) >= threshold, True) | graph.source
        rest = ~chosen | graph.source
        some = chosen & ~error
        mask = node_mask(graph, some)

        def measure(nodes: Mask) -> float | None:
            return evaluator.faithfulness(node_mask(graph, nodes))

        result = ErrorNodes(
            measure(chosen | error),
            evaluator.faithfulness(mask),
            measure(rest | error),
            measure(rest & ~error),
        )
        n_nodes = int(some[:-1].sum() - graph.source.sum())
        counts = (n_nodes, int((some & latent).sum()), int(mask.sum()))
        found.append(NodeCircuit(float(threshold), *counts, result))
    return found
