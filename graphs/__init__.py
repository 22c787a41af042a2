"""Computational graphs and circuits as data: no torch, no model."""

from graphs.bases import BasesComparison, InComponents, basis_name, compare_bases
from graphs.circuit import Circuit
from graphs.coarse import coarse_edges, coarsen, joined_shape
from graphs.compare import (
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
