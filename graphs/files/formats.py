"""Circuits on disk and as networkx graphs: EAP-IG/MIB JSON, GraphML and DOT.

======== ============================== ====================================================
suffix   holds                          read back exactly
======== ============================== ====================================================
.json    every edge, score, in or out   all of it
.graphml the edges in (or every edge)   those edges and their scores; the others score 0
.dot     the edges in, and a picture    those edges and their scores; the others score 0
======== ============================== ====================================================
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import urllib.parse
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.parsers import expat

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from graphs.circuit import Circuit
from graphs.errors import CircuitFileError, GraphError, InputError, did_you_mean
from graphs.files.attribution import (
    is_attribution_graph,
    read_attribution_graph,
    to_attribution_graph,
)
from graphs.files.whole import (
    MIB,
    json_text,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    write_whole,
)
from graphs.graph import (
    Graph,
    component_graph,
    outline,
    parse_node,
    shape_from_config,
    shape_to_config,
)
from graphs.pictures.draw import to_dot
from graphs.pictures.rendering import parse_dot
from graphs.sites import sites_from_text, sites_to_text
from graphs.spans import split_span

__all__ = [
    "checked_info",
    "from_networkx",
    "load_circuit",
    "read_circuit_json",
    "read_dot",
    "read_graphml",
    "save_circuit",
    "to_networkx",
    "write_attribution_graph",
    "write_circuit_json",
    "write_dot",
    "write_graphml",
]

PathLike = str | os.PathLike[str]
_KV = re.compile(r"a([0-9]{1,9})\.kv([0-9]{1,9})")
_BOOLS = {"true": True, "false": False}
_WORDS_OF_INFO = ("task", "model", "method", "metric", "intervention", "direction")
_MOST_BYTES = 256 * MIB
_MOST_NAMED = 5_000_000  # edges of which a table of names is made
_MOST_WIDTH = 10**9


def save_circuit(circuit: Circuit, path: PathLike) -> None:
    """Write a circuit in the format that the suffix of ``path`` names.

    Raises
    ------
    CircuitFileError
        If the suffix is not .json, .graphml or .dot, or a score is not finite.
    """
    writers = {".json": write_circuit_json, ".graphml": write_graphml, ".dot": write_dot}
    _by_suffix(path, writers)(circuit, path)


def load_circuit(path: PathLike) -> Circuit:
    """Read a circuit in the format that the suffix of ``path`` names.

    Raises
    ------
    CircuitFileError
        If the suffix is not .json, .graphml or .dot, or the file holds no circuit.
    """
    return _by_suffix(
        path, {".json": read_circuit_json, ".graphml": read_graphml, ".dot": read_dot}
    )(path)


def write_circuit_json(circuit: Circuit, path: PathLike) -> None:
    """Write every edge of the graph in the EAP-IG/MIB layout, one line per node and edge.

    In a graph with latents, or split by spans, edges that score 0 and are not in are left out
    (reading gives them back).

    Scores are written so that reading gives the same float64.  ``cfg`` holds the graph's shape
    (and ``d_model`` if ``circuit.info`` has it), ``info`` a copy of ``circuit.info``.

    Raises
    ------
    CircuitFileError
        If a score is not finite; the message names the edge.
    """
    _check_finite(circuit, path)
    graph = circuit.graph
    alive = {*circuit.nodes(), "logits"}
    nodes = (f'"{name}": {{"in_graph": {_json_bool(name in alive)}}}' for name in graph.nodes)
    listed = np.ones(graph.n_edges, dtype=bool)
    if graph.shape.sites or graph.shape.spans:
        listed = circuit.in_circuit | (circuit.scores != 0)
    edges = (
        f'"{name}": {{"score": {score!r}, "in_graph": {_json_bool(kept)}}}'
        for name, score, kept in zip(
            graph.edge_names(np.flatnonzero(listed)),
            circuit.scores[listed].tolist(),
            circuit.in_circuit[listed].tolist(),
            strict=True,
        )
    )
    text = (
        f'{{"cfg": {json_text(_config(circuit))},\n'
        f'"nodes": {{\n{_lines(nodes)}}},\n"edges": {{\n{_lines(edges)}}},\n'
        f'"info": {json_text(circuit.info)}}}\n'
    )
    write_whole(path, text)


def read_circuit_json(path: PathLike) -> Circuit:
    """Read a circuit file in the EAP-IG/MIB layout; other keys than its own are ignored.

    Edges that the file lacks score 0 and are not in.  An attribution graph of circuit-tracer or
    Neuronpedia is read as :mod:`graphs.files.attribution` says.

    Raises
    ------
    CircuitFileError
        If the file is not there, truncated or malformed, names a node or edge that the graph
        of its ``cfg`` does not have, or has a score that is no finite number.
    """
    data = _json_object(path)
    if is_attribution_graph(data):
        config, rows, info = read_attribution_graph(path, data)
        graph = _graph(path, config, (name for name, _, _ in rows), CircuitFileError)
        return _circuit(path, graph, rows, checked_info(path, info))
    for key in ("cfg", "nodes", "edges"):
        if not isinstance(data.get(key), dict):
            got = f"{key!r} is {_kind(data[key])}" if key in data else f"no {key!r}"
            raise CircuitFileError(
                f"{path}: {got}; expected the objects 'cfg', 'nodes' and 'edges' of a circuit file"
            )
    graph = _graph(path, data["cfg"], data["edges"], CircuitFileError)
    _check_nodes(path, graph, data["nodes"])
    info = checked_info(path, data.get("info", {}))
    if "d_model" in data["cfg"]:
        info = {"d_model": data["cfg"]["d_model"], **info}
    return _circuit(path, graph, _json_rows(path, data["edges"]), checked_info(path, info))


def write_attribution_graph(circuit: Circuit, path: PathLike) -> None:
    """Write the graph JSON that circuit-tracer's and Neuronpedia's viewers read.

    See :mod:`graphs.files.attribution`; :func:`load_circuit` reads it back, the scores of edges
    outside the circuit as 0.  The file's name, without its suffixes, is the graph's slug.

    Raises
    ------
    CircuitFileError
        If a score is not finite; the message names the edge.
    """
    _check_finite(circuit, path)
    slug = Path(path).name.split(".")[0] or "circuit"
    write_whole(path, json_text(to_attribution_graph(circuit, slug)) + "\n")


def to_networkx(circuit: Circuit, *, all_edges: bool = False) -> nx.MultiDiGraph:
    """Return the circuit as a networkx graph.

    Parameters
    ----------
    circuit
        Any circuit.
    all_edges
        True: every edge of the graph.  False: those that are in (the default).

    Returns
    -------
    nx.MultiDiGraph
        Nodes ``input``, ``a3.h7``, ``m3``, ``logits`` with ``kind``, ``layer`` and ``head``
        (-1 where they mean nothing), and ``latent``, the number of a latent; edges keyed by
        name with ``receiver``, ``score`` and ``in_graph``.  A shared key-value head is a node
        ``a3.kv1`` of kind ``kv``, with edges that carry ``feeds=True`` alone to the heads that
        it serves; so is what feeds latents (an MLP, a head, a cut ``r3``).  Split by spans, nodes
        have the attribute ``span``, and ``feeds`` edges lead from a head at the span of its keys
        and values to the head at the spans that read them.  Graph attributes: the keys of a
        circuit file's ``cfg`` (sites as one word), and ``info``.
    """
    graph = circuit.graph
    view = nx.MultiDiGraph(**_config(circuit), info=dict(circuit.info))
    if graph.shape.sites:
        view.graph["sites"] = sites_to_text(graph.shape.sites)
    chosen = np.arange(graph.n_edges) if all_edges else np.flatnonzero(circuit.in_circuit)
    for node, source in zip(graph.nodes, graph.source.tolist(), strict=True):
        if all_edges or node == "logits" or source:
            view.add_node(node, **_node_attributes(node))
    names = graph.edge_names(chosen)
    for edge, name in zip(chosen.tolist(), names, strict=True):
        receiver = int(graph.edge_receiver[edge])
        sender, node = graph.senders[graph.edge_sender[edge]], graph.receiver_node(receiver)
        for end in (sender, node):
            if end not in view:
                view.add_node(end, **_node_attributes(end))
        view.add_edge(
            sender,
            node,
            key=name,
            receiver=graph.receivers[receiver],
            score=float(circuit.scores[edge]),
            in_graph=bool(circuit.in_circuit[edge]),
        )
    _add_feeds(view, graph, chosen)
    return view


def from_networkx(view: nx.MultiDiGraph) -> Circuit:
    """Build a circuit from what :func:`to_networkx` gives; edges not in it score 0.

    Raises
    ------
    GraphError
        If graph attributes or edges are not those of a circuit; the message names them.
    """
    return _from_view("networkx graph", view, GraphError)


def write_graphml(circuit: Circuit, path: PathLike, *, all_edges: bool = False) -> None:
    """Write :func:`to_networkx` as GraphML, for Gephi, yEd and the like."""
    _check_finite(circuit, path)
    view = to_networkx(circuit, all_edges=all_edges)
    view.graph["info"] = json_text(circuit.info)
    buffer = io.BytesIO()
    nx.write_graphml(view, buffer)
    write_whole(path, buffer.getvalue())


def read_graphml(path: PathLike) -> Circuit:
    """Read a circuit that :func:`write_graphml` wrote.

    Raises
    ------
    CircuitFileError
        If the file is not there, is no GraphML, or holds no circuit.
    """
    content = read_bytes(path, _MOST_BYTES, CircuitFileError)
    try:
        _check_xml(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what it only warns of is no circuit of ours
            view = nx.read_graphml(io.BytesIO(content), force_multigraph=True)
    except (ElementTree.ParseError, nx.NetworkXError, KeyError, ValueError, UserWarning) as error:
        raise CircuitFileError(
            f"{path}: no GraphML that can be read: {_one_line(error)}"
        ) from error
    view.graph["info"] = _info(path, view.graph.get("info"))
    return _from_view(path, view, CircuitFileError)


def _check_xml(content: bytes) -> None:
    """Raise ValueError for XML that is none, or that defines entities: a few lines can be huge."""

    def refuse(*_: object) -> None:
        raise ValueError("it has a DOCTYPE, which no GraphML needs")

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise ValueError(str(error)) from error


def write_dot(circuit: Circuit, path: PathLike, **options: Any) -> None:
    """Write the picture of :func:`graphs.to_dot` (and its options), which can be read back."""
    _check_finite(circuit, path)
    write_whole(path, to_dot(circuit, **options))


def read_dot(path: PathLike) -> Circuit:
    """Read a circuit that :func:`write_dot` wrote.

    Raises
    ------
    CircuitFileError
        If the file is not there, is no DOT, or holds no circuit.
    """
    text = read_text(path, _MOST_BYTES, CircuitFileError)
    try:
        attributes, edges = parse_dot(text)
    except InputError as error:
        raise CircuitFileError(f"{path}: no DOT that can be read: {error}") from error
    config = {k: attributes[k] for k in _SHAPE_KEYS if k in attributes}
    rows = [row for edge in edges for row in _dot_rows(path, *edge)]
    for word in attributes.get("undrawn", "").split():
        name, _, score = word.rpartition("=")
        rows.append((name, _float(score), True))
    shape = {k: v if k in _WORDS else _plain(v) for k, v in config.items()}
    graph = _graph(path, shape, [name for name, _, _ in rows], CircuitFileError)
    info = _info(path, urllib.parse.unquote(attributes.get("info", "{}")))
    return _circuit(path, graph, rows, info)


_SHAPE_KEYS = (
    "n_layers",
    "n_heads",
    "n_key_value_heads",
    "attn_only",
    "parallel_attn_mlp",
    "split_qkv",
    "split_embed",
    "sites",
    "spans",
    "scored_spans",
    "reaches",
)
_WORDS = ("sites", "spans", "scored_spans", "reaches")


def _by_suffix(path: PathLike, table: dict[str, Callable]) -> Callable:
    suffix = Path(path).suffix.lower()
    if suffix not in table:
        raise CircuitFileError(
            f"{path}: no circuit format has the suffix {suffix!r}; use {', '.join(table)}"
        )
    return table[suffix]


def _json_object(path: PathLike) -> dict[str, Any]:
    data = read_json(path, _MOST_BYTES, CircuitFileError)
    if not isinstance(data, dict):
        raise CircuitFileError(
            f"{path}: holds {_kind(data)}, expected the object of a circuit file"
        )
    return data


def _config(circuit: Circuit) -> dict[str, Any]:
    """``cfg`` of a circuit file; EAP-IG needs ``d_model`` besides the shape."""
    extra = {"d_model": circuit.info["d_model"]} if "d_model" in circuit.info else {}
    return {**shape_to_config(circuit.graph.shape), **extra}


def _graph(
    where: object,
    config: dict[str, Any],
    names: Iterable[str],
    failure: type[GraphError] | type[CircuitFileError],
) -> Graph:
    """Return the graph of a ``cfg``; of one too large to be written out the named edges alone."""
    try:
        shape = shape_from_config(_with_sites(config))
        if shape.spans:
            return component_graph(shape)
        whole = outline(shape)
        return whole.graph(whole.places(names) if whole.is_large and shape.sites else None)
    except GraphError as error:
        raise failure(f"{where}: {error}") from error


def _with_sites(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with sites that a file holds as one word as those of a JSON file."""
    text = config.get("sites")
    if not isinstance(text, str):
        return config
    return {**config, "sites": [site.to_config() for site in sites_from_text(text)]}


def _check_finite(circuit: Circuit, path: PathLike) -> None:
    bad = np.flatnonzero(~np.isfinite(circuit.scores))
    if len(bad):
        raise CircuitFileError(
            f"{path} not written: the score of {circuit.graph.edge_name(bad[0])!r} is "
            f"{circuit.scores[bad[0]]}, expected a finite number"
        )


def _check_nodes(path: PathLike, graph: Graph, nodes: dict[str, Any]) -> None:
    known = set(graph.nodes)
    for name, entry in nodes.items():
        if name not in known:
            raise CircuitFileError(
                f"{path}: node {name!r} is not in the graph of this cfg; "
                f"{did_you_mean(name, graph.nodes)}"
            )
        if not isinstance(entry, dict) or type(entry.get("in_graph", False)) is not bool:
            raise CircuitFileError(
                f"{path}: node {name!r} is {json.dumps(entry)[:80]}, "
                'expected {"in_graph": true or false}'
            )


def _json_rows(path: PathLike, edges: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    rows = []
    for name, entry in edges.items():
        if not isinstance(entry, dict) or "score" not in entry or "in_graph" not in entry:
            raise CircuitFileError(
                f"{path}: edge {name!r} is {json.dumps(entry)[:80]}, "
                'expected {"score": number, "in_graph": true or false}'
            )
        rows.append((name, entry["score"], entry["in_graph"]))
    return rows


def _circuit(
    where: object,
    graph: Graph,
    rows: Sequence[tuple[str, Any, Any]],
    info: dict[str, Any],
    failure: type[GraphError] | type[CircuitFileError] = CircuitFileError,
) -> Circuit:
    """Build a circuit from ``(edge name, score, in)``, every value checked."""
    index = _EdgeIndex(graph, len(rows))
    scores, kept = np.zeros(graph.n_edges), np.zeros(graph.n_edges, dtype=bool)
    for name, score, in_graph in rows:
        edge = index.find(name)
        if edge is None:
            raise failure(f"{where}: {_why_no_edge(graph, name)}")
        if type(score) not in (int, float) or not _is_finite(score):
            raise failure(f"{where}: edge {name!r} has score {score!r}, expected a finite number")
        if type(in_graph) is not bool:
            raise failure(
                f"{where}: edge {name!r} has in_graph {in_graph!r}, expected true or false"
            )
        scores[edge], kept[edge] = score, in_graph
    return Circuit(graph, scores, kept, info)


class _EdgeIndex:
    """Index of an edge by name: a table, or a search where few of many are looked up."""

    def __init__(self, graph: Graph, n_names: int) -> None:
        self.graph = graph
        self._table: dict[str, int] | None = None
        if graph.n_edges <= min(_MOST_NAMED, 50 * n_names):
            self._table = {name: i for i, name in enumerate(graph.edge_names())}

    def find(self, name: str) -> int | None:
        """Return the index, None where there is no such edge."""
        if self._table is not None:
            return self._table.get(name)
        try:
            return self.graph.edge_index(name)
        except GraphError:
            return None


def _is_finite(score: float) -> bool:
    try:
        return math.isfinite(score)
    except OverflowError:  # a whole number beyond float64
        return False


def _why_no_edge(graph: Graph, name: str) -> str:
    try:
        graph.edge_index(name)
    except GraphError as error:
        return str(error)
    return f"edge {name!r} does not exist"


def _node_attributes(name: str) -> dict[str, Any]:
    component, span = split_span(name)
    if span:
        return {**_node_attributes(component), "span": span}
    if match := _KV.fullmatch(name):
        return {"kind": "kv", "layer": int(match[1]), "head": int(match[2])}
    kind, layer, number = parse_node(name)
    if kind in ("latent", "expert"):
        return {"kind": kind, "layer": layer, "head": -1, kind: number}
    return {"kind": kind, "layer": layer, "head": number}


def _add_feeds(view: nx.MultiDiGraph, graph: Graph, edges: NDArray[np.int64]) -> None:
    """Join what the edges end in to the other nodes that are computed from it.

    Such are shared key-value heads, what feeds latents, and keys and values of another span.
    """
    for receiver in np.unique(graph.edge_receiver[edges]).tolist():
        shared = graph.receiver_node(receiver)
        for node in graph.fed_by(receiver).tolist():
            head = graph.nodes[node]
            if head != shared and head in view and not view.has_edge(shared, head):
                view.add_edge(shared, head, key=f"{shared}->{head}", feeds=True)


def _from_view(
    where: object, view: nx.MultiDiGraph, failure: type[GraphError] | type[CircuitFileError]
) -> Circuit:
    config = {key: view.graph[key] for key in _SHAPE_KEYS if key in view.graph}
    rows = [
        (f"{u}->{data.get('receiver')}", data.get("score"), data.get("in_graph"))
        for u, _, data in view.edges(data=True)
        if not data.get("feeds")
    ]
    graph = _graph(where, config, [name for name, _, _ in rows], failure)
    return _circuit(where, graph, rows, dict(view.graph.get("info", {})), failure)


def _info(path: PathLike, text: str | None) -> dict[str, Any]:
    if not isinstance(text, str | None):
        raise CircuitFileError(f"{path}: 'info' is {_kind(text)}, expected a text")
    return checked_info(path, parse_json(text or "{}", f"{path}: 'info'", CircuitFileError))


def checked_info(path: PathLike, info: Any) -> dict[str, Any]:
    """Return what a file says of how its circuit was found; CircuitFileError if it is misshapen."""
    if not isinstance(info, dict):
        raise CircuitFileError(f"{path}: 'info' is {_kind(info)}, expected an object")
    for key in _WORDS_OF_INFO:
        if not isinstance(info.get(key), str | None):
            raise _wrong_info(path, key, info[key], "a text")
    value = info.get("faithfulness")
    if value is not None and (type(value) not in (int, float) or not _is_finite(value)):
        raise _wrong_info(path, "faithfulness", value, "a finite number")
    width = info.get("d_model")
    if width is not None and (type(width) is not int or not 0 < width <= _MOST_WIDTH):
        raise _wrong_info(path, "d_model", width, "a whole number above 0")
    return info


def _wrong_info(path: PathLike, key: str, value: Any, expected: str) -> CircuitFileError:
    return CircuitFileError(f"{path}: {key!r} is {value!r}, expected {expected} or null")


def _dot_rows(
    path: PathLike, sender: str, node: str, receivers: str, scores: str
) -> list[tuple[str, Any, bool]]:
    """Edges that one drawn line stands for; none for lines that only guide the layout."""
    ends, values = receivers.split(), scores.split()
    if len(ends) != len(values):
        raise CircuitFileError(
            f"{path}: line {sender!r} -> {node!r} has {len(ends)} receivers and "
            f"{len(values)} scores, expected as many"
        )
    return [
        (f"{sender}->{receiver}", _float(score), True)
        for receiver, score in zip(ends, values, strict=True)
    ]


def _float(text: str) -> float | str:
    """Return the number, or the text as it is for the error message."""
    try:
        return float(text)
    except ValueError:
        return text


def _plain(text: str) -> int | bool | str:
    """Return a DOT attribute as the whole number or truth value that it spells."""
    if text in _BOOLS:
        return _BOOLS[text]
    return int(text) if text.isdecimal() and len(text) <= 9 else text


def _json_bool(value: bool) -> str:
    return "true" if value else "false"


def _lines(entries: Iterable[str]) -> str:
    return ",\n".join(entries) + "\n"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _kind(value: Any) -> str:
    """What a JSON value is called."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return names.get(type(value), "null" if value is None else "a number")
