"""Reference circuits: what the authors of a circuit, or the maker of a model, say is true.

A reference file is one JSON object::

    {"name": "ioi", "description": "one line", "model": "gpt2", "task": "ioi",
     "ablation": {"intervention": "resample", "direction": "noising"},
     "granularity": "edges",
     "citation": "authors, year, title, URL", "open": "what the authors left open",
     "graph": {"n_layers": 12, "n_heads": 12, ...},
     "roles": {"name mover": ["a9.h9", ...]}, "optional_nodes": [],
     "positions": {"a9.h9": ["END"], "a9.h9<k>": ["IO"], ...},
     "configuration": {"d_model": 768, "d_head": 64, "d_mlp": 3072, "d_vocab": 50257},
     "weights": "0123456789abcdef",
     "edges": ["input->a0.h1<q>", ...], "info": {}}

``ablation`` is what the circuit is true under, null where it is not bound to one.
``granularity`` says what the authors fix: ``edges`` (q, k and v apart), ``node pairs`` (an edge
counts once per sender and receiving node, written ``a1.h0->a2.h3``), or ``nodes`` alone.
``optional_nodes`` (may be missing) count neither as wrong nor as missed, and no more do their
edges.  ``positions`` (may be missing) says in which spans of the prompt a sender writes and a
receiver reads (:mod:`graphs.spans`); those that it does not name do so in all.  ``configuration``
(may be missing) says what the model's graph does not of its sizes, and ``weights`` (may be missing)
is a digest of the weights that the circuit is of: heads have their numbers in that model alone.
``info`` (may be missing) is free.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphs.circuit import Circuit
from graphs.coarse import coarsen, joined_shape, with_spans
from graphs.errors import GraphError, ReferenceFileError, did_you_mean
from graphs.files.whole import MIB, read_json, write_whole
from graphs.graph import (
    Graph,
    GraphShape,
    component_graph,
    parse_node,
    shape_from_config,
    shape_to_config,
)
from graphs.select import prune
from graphs.spans import check_span_name, split_span

__all__ = [
    "GRANULARITIES",
    "Ablation",
    "Reference",
    "inner_nodes",
    "read_reference",
    "write_reference",
]

GRANULARITIES = ("edges", "node pairs", "nodes")
_DIRECTIONS = ("noising", "denoising")
_TEXTS = ("name", "description", "model", "task", "citation", "open")
_REQUIRED = (*_TEXTS, "ablation", "granularity", "graph", "roles", "edges")
_OPTIONAL = ("optional_nodes", "positions", "configuration", "weights", "info")
_MOST_BYTES = 64 * MIB


@dataclass(frozen=True)
class Ablation:
    """What a circuit is true under; None where it does not depend on it.

    Parameters
    ----------
    intervention
        What ablated edges carry, as ``resample``, or None; which names there are is not known
        here.
    direction
        ``noising``, ``denoising`` or None.
    """

    intervention: str | None = None
    direction: str | None = None

    def __post_init__(self) -> None:
        if self.direction is not None and self.direction not in _DIRECTIONS:
            raise GraphError(
                f"ablation has direction {self.direction!r}: expected {', '.join(_DIRECTIONS)} "
                "or null"
            )
        if self.intervention is not None and not isinstance(self.intervention, str):
            raise GraphError(f"ablation has intervention {self.intervention!r}: expected a name")

    def __str__(self) -> str:
        return ", ".join(
            word
            for word in (self.direction, self.intervention and f"{self.intervention} ablation")
            if word
        )


@dataclass(frozen=True, eq=False)
class Reference:
    """A circuit that counts as true.

    Parameters
    ----------
    name, description
        What a user types, and one line on it.
    model, task
        Names of what it was found in (or built for).
    citation, open
        Where it is from, and what its authors left open.
    graph
        The graph that its nodes and edges live in.  For ``node pairs`` the edges are those of
        the graph with q, k and v joined (:func:`graphs.joined_shape`), whichever this one is.
    edges
        Names, each once; may be empty for granularity ``nodes``.
    roles
        Role -> names of its nodes.
    ablation
        What it is true under.
    granularity
        One of :data:`GRANULARITIES`.
    optional_nodes
        Nodes that count neither as wrong nor as missed, nor do their edges.
    positions
        Sender or receiver -> spans in which it writes or reads; all where it is not named.
        Receivers are those of ``graph``, whatever the granularity.
    configuration
        Sizes of the model beside those of its graph, by name; empty where they are unknown.
    weights
        Digest of the model's weights; empty where it is unknown.
    info
        Anything else; plain JSON values.

    Raises
    ------
    GraphError
        If a name is not in the graph or comes twice, a node of a role touches no edge of the
        circuit, or a value is none of those above.
    """

    name: str
    description: str
    model: str
    task: str
    citation: str
    open: str
    graph: Graph
    edges: tuple[str, ...]
    roles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ablation: Ablation = Ablation()
    granularity: str = "edges"
    optional_nodes: tuple[str, ...] = ()
    positions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    configuration: Mapping[str, int] = field(default_factory=dict)
    weights: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", MappingProxyType(dict(self.roles)))
        object.__setattr__(self, "positions", MappingProxyType(dict(self.positions)))
        object.__setattr__(self, "configuration", MappingProxyType(dict(self.configuration)))
        if self.granularity not in GRANULARITIES:
            raise GraphError(
                f"granularity {self.granularity!r}: expected {', '.join(GRANULARITIES)}"
            )
        _check_once("edges", self.edges)
        self._check_nodes("optional_nodes", self.optional_nodes)
        for role, nodes in self.roles.items():
            self._check_nodes(f"role {role!r}", nodes)
        _ = self.circuit  # an edge that does not exist is named
        if not self.edges and (self.granularity != "nodes" or not self.roles):
            raise GraphError("no edges: give at least one, or granularity 'nodes' and roles")
        self._check_roles_touch_edges()
        self._check_positions()

    def _check_positions(self) -> None:
        known = {**self.graph.sender_index, **self.graph.receiver_index}
        for name, spans in self.positions.items():
            if name not in known:
                raise GraphError(
                    f"positions: no sender or receiver {name!r} in the graph; "
                    f"{did_you_mean(name, known)}"
                )
            if not spans:
                raise GraphError(f"positions: {name!r} has no span: give one, or leave it out")
            for span in spans:
                check_span_name(span)
            _check_once(f"positions of {name!r}", spans)

    def _check_nodes(self, what: str, names: tuple[str, ...]) -> None:
        _check_once(what, names)
        known = set(self.graph.nodes)
        for name in names:
            if name not in known:
                raise GraphError(
                    f"{what}: no node {name!r} in the graph; {did_you_mean(name, self.graph.nodes)}"
                )

    def _check_roles_touch_edges(self) -> None:
        if self.granularity == "nodes":
            return
        for role, nodes in self.roles.items():
            for name in nodes:
                if name not in self._touched:
                    raise GraphError(
                        f"role {role!r}: node {name!r} is at neither end of an edge of the circuit"
                    )

    @cached_property
    def circuit(self) -> Circuit:
        """The edges as a circuit: of ``graph``, or of its joined form for ``node pairs``."""
        graph = self.graph
        if self.granularity == "node pairs" and graph.shape.split_qkv:
            graph = component_graph(joined_shape(graph.shape, qkv=True))
        return Circuit.from_edges(graph, self.edges, model=self.model, task=self.task)

    def mask(self) -> NDArray[np.bool_]:
        """Return ``[edge]`` of ``graph``: the edges that are in.

        A node pair stands for all of its q, k and v edges in a graph that has them apart.
        """
        if self.circuit.graph.shape == self.graph.shape:
            return self.circuit.in_circuit.copy()
        pairs = set(self.edges)
        graph = self.graph
        nodes = [graph.receiver_node(v) for v in range(len(graph.receivers))]
        ends = zip(graph.edge_sender.tolist(), graph.edge_receiver.tolist(), strict=True)
        return np.array([f"{graph.senders[u]}->{nodes[v]}" in pairs for u, v in ends])

    @cached_property
    def spans(self) -> frozenset[str]:
        """Names of the spans in ``positions``."""
        return frozenset(span for spans in self.positions.values() for span in spans)

    def split(self, shape: GraphShape) -> Circuit:
        """Return the reference as a circuit of a graph split by the spans of ``shape``.

        An edge is in at a span if it is in, and its sender writes and its receiver reads there
        (``positions``).  What is then on no path from the embeddings to ``logits`` is left out.
        Node pairs are edges of the graph with q, k and v joined, as in ``circuit``.

        Raises
        ------
        GraphError
            If ``shape`` lacks spans that ``positions`` names.
        """
        if missing := sorted(self.spans - set(shape.spans)):
            raise GraphError(
                f"reference {self.name!r} has positions at {', '.join(missing)}, but the graph is "
                f"split by {', '.join(shape.spans) or 'no spans'}"
            )
        graph = component_graph(with_spans(self.graph.shape, shape))
        senders = self._allowed(graph, graph.senders, graph.sender_span)
        receivers = self._allowed(graph, graph.receivers, graph.receiver_span)
        inside = prune(
            graph,
            self.mask()[graph.edge_component]
            & senders[graph.edge_sender]
            & receivers[graph.edge_receiver],
        )
        circuit = Circuit(
            graph, inside.astype(np.float64), inside, {"model": self.model, "task": self.task}
        )
        return coarsen(circuit, with_spans(self.circuit.graph.shape, shape))

    def _allowed(
        self, graph: Graph, names: tuple[str, ...], spans: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Which senders or receivers of a split graph are at a span of theirs."""
        every = graph.shape.spans
        at = zip(names, spans.tolist(), strict=True)
        return np.array(
            [every[s] in self.positions.get(split_span(name)[0], every) for name, s in at]
        )

    @cached_property
    def _touched(self) -> frozenset[str]:
        """Nodes at an end of an edge; a shared key-value head stands for the heads it serves."""
        graph, inside = self.circuit.graph, self.circuit.in_circuit
        senders = {graph.senders[u] for u in np.unique(graph.edge_sender[inside])}
        fed = {
            graph.nodes[node]
            for v in np.unique(graph.edge_receiver[inside])
            for node in graph.fed_by(int(v))
        }
        return frozenset(senders | fed)

    @property
    def node_pairs(self) -> tuple[str, ...]:
        """The edges with q, k and v joined, each pair of nodes once: ``a1.h0->a2.h3``."""
        return tuple(dict.fromkeys(_pair(name) for name in self.edges))

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Heads and MLPs of the circuit in graph order, the optional ones left out.

        Those at an end of an edge; for granularity ``nodes`` those with a role as well.
        Embeddings and ``logits``, which every circuit has, are none of them.
        """
        members = set(self._touched)
        if self.granularity == "nodes":
            members.update(*self.roles.values())
        return tuple(
            name
            for name in inner_nodes(self.graph)
            if name in members and name not in self.optional_nodes
        )


def inner_nodes(graph: Graph) -> tuple[str, ...]:
    """Return the names of the nodes that are neither embeddings nor ``logits``."""
    return tuple(name for name in graph.nodes if parse_node(name)[0] in ("head", "mlp"))


def read_reference(path: str | os.PathLike[str]) -> Reference:
    """Read a reference file.

    Raises
    ------
    ReferenceFileError
        (A GraphError.)  If the file is not there, is truncated, lacks a key or has an unknown
        one, has a value of another type, or is no :class:`Reference`.  The message names the
        file and the item.
    """
    data = _json_object(path)
    _check_keys(path, data)
    for key in _TEXTS:
        if not isinstance(data[key], str) or not data[key].strip():
            raise _wrong(path, key, data[key], "a text")
    if not isinstance(data.get("weights", ""), str):
        raise _wrong(path, "weights", data["weights"], "a text")
    for key in ("ablation", "graph", "roles", "positions", "configuration", "info"):
        if not isinstance(data.get(key, {}), dict):
            raise _wrong(path, key, data[key], "an object")
    if not isinstance(data["granularity"], str):
        raise _wrong(path, "granularity", data["granularity"], "a text")
    for key, size in data.get("configuration", {}).items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise _wrong(path, f"configuration of {key!r}", size, "a whole number")
    for key in data["ablation"]:
        if key not in ("intervention", "direction"):
            raise ReferenceFileError(
                f"{path}: 'ablation' has the key {key!r}: expected intervention and direction"
            )
    try:
        return Reference(
            **{key: data[key] for key in _TEXTS},
            graph=component_graph(shape_from_config(data["graph"])),
            edges=_names(path, "edges", data["edges"]),
            roles={
                role: _names(path, f"role {role!r}", nodes) for role, nodes in data["roles"].items()
            },
            ablation=Ablation(**data["ablation"]),
            granularity=data["granularity"],
            optional_nodes=_names(path, "optional_nodes", data.get("optional_nodes", [])),
            positions={
                name: _names(path, f"positions of {name!r}", spans)
                for name, spans in data.get("positions", {}).items()
            },
            configuration=data.get("configuration", {}),
            weights=data.get("weights", ""),
            info=data.get("info", {}),
        )
    except ReferenceFileError:
        raise
    except GraphError as error:
        raise ReferenceFileError(f"{path}: {error}") from error


def write_reference(reference: Reference, path: str | os.PathLike[str]) -> None:
    """Write a reference file, one edge on a line; :func:`read_reference` reads it back."""
    content: dict[str, Any] = {key: getattr(reference, key) for key in _TEXTS}
    content |= {
        "ablation": vars(reference.ablation),
        "granularity": reference.granularity,
        "graph": shape_to_config(reference.graph.shape),
        "roles": {role: list(nodes) for role, nodes in reference.roles.items()},
    }
    if reference.optional_nodes:
        content["optional_nodes"] = list(reference.optional_nodes)
    if reference.positions:
        content["positions"] = {name: list(spans) for name, spans in reference.positions.items()}
    if reference.configuration:
        content["configuration"] = dict(reference.configuration)
    if reference.weights:
        content["weights"] = reference.weights
    if reference.info:
        content["info"] = dict(reference.info)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    edges = ",\n".join(f"  {json.dumps(edge)}" for edge in reference.edges)
    lines.append('"edges": [' + (f"\n{edges}\n" if edges else "") + "]")
    write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    data = read_json(path, _MOST_BYTES, ReferenceFileError)
    if not isinstance(data, dict):
        raise ReferenceFileError(f"{path}: expected the object of a reference file, got {data!r}")
    return data


def _check_keys(path: object, data: dict[str, Any]) -> None:
    if missing := [key for key in _REQUIRED if key not in data]:
        raise ReferenceFileError(
            f"{path} is no reference file: it lacks {', '.join(map(repr, missing))}"
        )
    for key in data:
        if key not in (*_REQUIRED, *_OPTIONAL):
            raise ReferenceFileError(
                f"{path}: unknown key {key!r}; {did_you_mean(key, (*_REQUIRED, *_OPTIONAL))}"
            )


def _names(path: object, what: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _wrong(path, what, value, "a list of names")
    for name in value:
        if not isinstance(name, str):
            raise _wrong(path, f"an entry of {what}", name, "a name")
    return tuple(value)


def _wrong(path: object, what: str, value: Any, expected: str) -> ReferenceFileError:
    got = json.dumps(value)
    shown = got if len(got) <= 60 else got[:57] + "..."
    return ReferenceFileError(f"{path}: {what} is {shown}, expected {expected}")


def _check_once(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise GraphError(f"{what}: {name!r} is listed twice")
        seen.add(name)


def _pair(edge: str) -> str:
    return edge[:-3] if edge.endswith(("<q>", "<k>", "<v>")) else edge
