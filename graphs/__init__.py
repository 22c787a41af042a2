"""Computational graphs and circuits as data: no torch, no model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphs.circuit import Circuit
    from graphs.coarse import coarse_edges, coarsen, joined_shape
    from graphs.errors import CircuitFileError, GraphError, InputError, ReferenceFileError
    from graphs.files.formats import (
        from_networkx,
        load_circuit,
        read_circuit_json,
        read_dot,
        read_graphml,
        save_circuit,
        to_networkx,
        write_attribution_graph,
        write_circuit_json,
        write_dot,
        write_graphml,
    )
    from graphs.files.whole import write_whole
    from graphs.graph import Graph, GraphShape, component_graph
    from graphs.known.bases import (
        BasesComparison,
        InComponents,
        Shared,
        basis_name,
        compare_bases,
    )
    from graphs.known.compare import (
        Comparison,
        Overlap,
        ReferenceComparison,
        RoleCount,
        compare,
        compare_reference,
        to_dot_comparison,
        to_dot_reference,
    )
    from graphs.known.reference import Ablation, Reference, read_reference, write_reference
    from graphs.pictures.draw import render, to_dot, to_svg
    from graphs.select import (
        alive_nodes,
        prune,
        select_greedy,
        select_threshold,
        select_top,
        top_edges,
    )

_HOMES = {
    "Ablation": "graphs.known.reference",
    "BasesComparison": "graphs.known.bases",
    "Circuit": "graphs.circuit",
    "CircuitFileError": "graphs.errors",
    "Comparison": "graphs.known.compare",
    "Graph": "graphs.graph",
    "GraphError": "graphs.errors",
    "GraphShape": "graphs.graph",
    "InComponents": "graphs.known.bases",
    "InputError": "graphs.errors",
    "Overlap": "graphs.known.compare",
    "Reference": "graphs.known.reference",
    "ReferenceComparison": "graphs.known.compare",
    "ReferenceFileError": "graphs.errors",
    "RoleCount": "graphs.known.compare",
    "Shared": "graphs.known.bases",
    "alive_nodes": "graphs.select",
    "basis_name": "graphs.known.bases",
    "coarse_edges": "graphs.coarse",
    "coarsen": "graphs.coarse",
    "compare": "graphs.known.compare",
    "compare_bases": "graphs.known.bases",
    "compare_reference": "graphs.known.compare",
    "component_graph": "graphs.graph",
    "from_networkx": "graphs.files.formats",
    "joined_shape": "graphs.coarse",
    "load_circuit": "graphs.files.formats",
    "prune": "graphs.select",
    "read_circuit_json": "graphs.files.formats",
    "read_dot": "graphs.files.formats",
    "read_graphml": "graphs.files.formats",
    "read_reference": "graphs.known.reference",
    "render": "graphs.pictures.draw",
    "save_circuit": "graphs.files.formats",
    "select_greedy": "graphs.select",
    "select_threshold": "graphs.select",
    "select_top": "graphs.select",
    "to_dot": "graphs.pictures.draw",
    "to_dot_comparison": "graphs.known.compare",
    "to_dot_reference": "graphs.known.compare",
    "to_networkx": "graphs.files.formats",
    "to_svg": "graphs.pictures.draw",
    "top_edges": "graphs.select",
    "write_attribution_graph": "graphs.files.formats",
    "write_circuit_json": "graphs.files.formats",
    "write_dot": "graphs.files.formats",
    "write_graphml": "graphs.files.formats",
    "write_reference": "graphs.known.reference",
    "write_whole": "graphs.files.whole",
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
    "Shared",
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
    "to_svg",
    "top_edges",
    "write_attribution_graph",
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
