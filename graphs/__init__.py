"""Computational graphs and circuits as data: no torch, no model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphs.bases import BasesComparison, InComponents, basis_name, compare_bases
    from graphs.circuit import Circuit
    from graphs.coarse import coarse_edges, coarsen, joined_shape
    from graphs.comparison import (
        Comparison,
        Overlap,
        ReferenceComparison,
        RoleCount,
        compare,
        compare_reference,
        to_dot_comparison,
        to_dot_reference,
    )
    from graphs.draw import render, to_dot
    from graphs.errors import CircuitFileError, GraphError, InputError, ReferenceFileError
    from graphs.files import write_whole
    from graphs.formats import (
        from_networkx,
        load_circuit,
        read_circuit_json,
        read_dot,
        read_graphml,
        save_circuit,
        to_networkx,
        write_circuit_json,
        write_dot,
        write_graphml,
    )
    from graphs.graph import Graph, GraphShape, component_graph
    from graphs.reference import Ablation, Reference, read_reference, write_reference
    from graphs.select import (
        alive_nodes,
        prune,
        select_greedy,
        select_threshold,
        select_top,
        top_edges,
    )

_HOMES = {
    "Ablation": "graphs.reference",
    "BasesComparison": "graphs.bases",
    "Circuit": "graphs.circuit",
    "CircuitFileError": "graphs.errors",
    "Comparison": "graphs.comparison",
    "Graph": "graphs.graph",
    "GraphError": "graphs.errors",
    "GraphShape": "graphs.graph",
    "InComponents": "graphs.bases",
    "InputError": "graphs.errors",
    "Overlap": "graphs.comparison",
    "Reference": "graphs.reference",
    "ReferenceComparison": "graphs.comparison",
    "ReferenceFileError": "graphs.errors",
    "RoleCount": "graphs.comparison",
    "alive_nodes": "graphs.select",
    "basis_name": "graphs.bases",
    "coarse_edges": "graphs.coarse",
    "coarsen": "graphs.coarse",
    "compare": "graphs.comparison",
    "compare_bases": "graphs.bases",
    "compare_reference": "graphs.comparison",
    "component_graph": "graphs.graph",
    "from_networkx": "graphs.formats",
    "joined_shape": "graphs.coarse",
    "load_circuit": "graphs.formats",
    "prune": "graphs.select",
    "read_circuit_json": "graphs.formats",
    "read_dot": "graphs.formats",
    "read_graphml": "graphs.formats",
    "read_reference": "graphs.reference",
    "render": "graphs.draw",
    "save_circuit": "graphs.formats",
    "select_greedy": "graphs.select",
    "select_threshold": "graphs.select",
    "select_top": "graphs.select",
    "to_dot": "graphs.draw",
    "to_dot_comparison": "graphs.comparison",
    "to_dot_reference": "graphs.comparison",
    "to_networkx": "graphs.formats",
    "top_edges": "graphs.select",
    "write_circuit_json": "graphs.formats",
    "write_dot": "graphs.formats",
    "write_graphml": "graphs.formats",
    "write_reference": "graphs.reference",
    "write_whole": "graphs.files",
}

__all__ = [
    "Ablation",
    "BasesComparison",
    "Circuit",
    "CircuitFileError",
    "Comparison",
    "Graph",
    "GraphError",
    "GraphShape",
    "InComponents",
    "InputError",
    "Overlap",
    "Reference",
    "ReferenceComparison",
    "ReferenceFileError",
    "RoleCount",
    "alive_nodes",
    "basis_name",
    "coarse_edges",
    "coarsen",
    "compare",
    "compare_bases",
    "compare_reference",
    "component_graph",
    "from_networkx",
    "joined_shape",
    "load_circuit",
    "prune",
    "read_circuit_json",
    "read_dot",
    "read_graphml",
    "read_reference",
    "render",
    "save_circuit",
    "select_greedy",
    "select_threshold",
    "select_top",
    "to_dot",
    "to_dot_comparison",
    "to_dot_reference",
    "to_networkx",
    "top_edges",
    "write_circuit_json",
    "write_dot",
    "write_graphml",
    "write_reference",
    "write_whole",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: numba and networkx take a second."""
    if name not in _HOMES:
        raise AttributeError(f"module 'graphs' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Public names."""
    return __all__
