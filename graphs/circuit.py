"""A circuit: a graph, a score for every edge, and which edges are in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graphs.errors import GraphError
from graphs.graph import Graph
from graphs.select import alive_nodes
from graphs.text import short

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd

__all__ = ["Circuit"]


@dataclass(frozen=True, eq=False)
class Circuit:
    """A set of edges of a graph, with scores.

    Parameters
    ----------
    graph
        The graph that the circuit lives in.
    scores
        ``[edge]`` float64; what a score means depends on the method (see ``info``).
    in_circuit
        ``[edge]`` bool.
    info
        How the circuit was found (method, metric, ...); plain JSON values.
    """

    graph: Graph
    scores: NDArray[np.float64]
    in_circuit: NDArray[np.bool_]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("scores", "in_circuit"):
            if getattr(self, name).shape != (self.graph.n_edges,):
                raise GraphError(
                    f"{name} of shape {getattr(self, name).shape} for a graph of "
                    f"{self.graph.n_edges} edges: give one value per edge"
                )

    def __repr__(self) -> str:
        of = "".join(f", {self.info[k]}" for k in ("method", "task", "model") if k in self.info)
        return short(f"<Circuit of {self.n_edges:,} of {self.graph.n_edges:,} edges{of}>")

    @classmethod
    def from_edges(cls, graph: Graph, names: Iterable[str], **info: Any) -> Circuit:
        """Build a circuit from edge names; the edges in it score 1, the others 0."""
        mask = graph.edge_mask(names)
        return cls(graph, mask.astype(np.float64), mask, info)

    @property
    def n_edges(self) -> int:
        """Number of edges in the circuit."""
        return int(self.in_circuit.sum())

    @property
    def digest(self) -> str:
        """What tells circuits apart that have equally many edges: 16 hex digits."""
        return hashlib.sha256("\n".join(self.edges()).encode()).hexdigest()[:16]

    def edges(self) -> list[str]:
        """Names of the edges in the circuit, in graph order."""
        return self.graph.edge_names(np.flatnonzero(self.in_circuit))

    def to_frame(self, *, whole: bool = False) -> pd.DataFrame:
        """Return the edges as a table.

        Parameters
        ----------
        whole
            Whether the edges that are not in the circuit are rows, too.

        Returns
        -------
        DataFrame
            One row an edge in graph order, indexed by its name: ``sender``, ``receiver``,
            ``score`` and ``in_circuit``.
        """
        import pandas as pd  # half a second

        graph = self.graph
        rows = np.arange(graph.n_edges) if whole else np.flatnonzero(self.in_circuit)
        senders, receivers = np.array(graph.nodes), np.array(graph.receivers)
        return pd.DataFrame(
            {
                "sender": senders[graph.edge_sender[rows]],
                "receiver": receivers[graph.edge_receiver[rows]],
                "score": self.scores[rows],
                "in_circuit": self.in_circuit[rows],
            },
            index=pd.Index(graph.edge_names(rows), name="edge"),
        )

    def to_networkx(self) -> nx.MultiDiGraph:
        """Return the circuit as a graph of networkx; see :func:`graphs.to_networkx`."""
        import graphs  # by its name there: files and pictures are made of circuits

        return graphs.to_networkx(self)

    def _repr_svg_(self) -> str:
        import graphs

        return graphs.to_svg(self)

    def nodes(self) -> list[str]:
        """Names of the nodes on a path of circuit edges from the embeddings to ``logits``.

        Empty when the circuit connects nothing.
        """
        alive = alive_nodes(self.graph, self.in_circuit)
        return [name for name, keep in zip(self.graph.nodes, alive, strict=True) if keep]
