"""Circuits as EAP-IG's and MIB's ``.pt`` files: torch tensors over one fixed grid of edges.

The file is a dict that ``torch.load(path, weights_only=True)`` reads, as ``Graph.to_pt`` of
EAP-IG writes it.  With L layers of H heads:

==================  ======================  ====================================================
key                 shape, type             holds
==================  ======================  ====================================================
``cfg``             dict                    n_layers, n_heads, parallel_attn_mlp, d_model
``src_nodes``       F = 1 + L (H + 1)       names: input, then per layer its heads and its MLP
``dst_nodes``       B = L (3 H + 1) + 1     names: per layer q, k and v of its heads and the MLP;
                                            logits
``edges_scores``    [F, B] float32          score of sender f into receiver b, 0 if there is none
``edges_in_graph``  [F, B] bool             whether it is in
``nodes_in_graph``  [F] bool                senders on a path from input to logits
==================  ======================  ====================================================

EAP-IG has neither shared key-value heads nor models without MLPs.  An edge into a shared head
is written once for each query head that it serves, its score divided among them (scores add up
to first order); MLPs that are not there are written as nodes without edges.  Our own files say
so in ``cfg`` (``n_key_value_heads``, ``attn_only``), so that they are read back as they were.

In models that learn position embeddings, ``input`` here holds them and is ablated with them, while
in EAP-IG's and MIB's code ``input`` leaves them out and they are never ablated: so CPR, CMD and
every other metric of a circuit differ under zero, mean and optimal ablation (never under resample,
and nowhere if positions are not embedded), and the shares of IFR, which ablates nothing, always.
Theirs is a circuit of ``--split-embed`` with every edge out of ``pos`` in.

References
----------
github.com/hannamw/EAP-IG, ``src/eap/graph.py``; arXiv 2504.13151 (MIB).
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.files import pickled
from graphs import Circuit, CircuitFileError, Graph, GraphError, GraphShape, component_graph
from graphs.errors import did_you_mean
from graphs.files.whole import json_text, write_whole
from graphs.graph import shape_from_config, shape_to_config

__all__ = ["group_heads", "read_pt", "write_pt"]

PathLike = str | os.PathLike[str]

_KEYS = ("cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph", "nodes_in_graph")


def write_pt(circuit: Circuit, path: PathLike) -> None:
    """Write a circuit for EAP-IG and MIB; scores are rounded to float32.

    Raises
    ------
    CircuitFileError
        If a score is not finite, or the graph joins q, k and v, or splits the embeddings or the
        positions, which the layout cannot say.
    """
    graph = circuit.graph
    wide = component_graph(_wide_shape(graph.shape, path))
    _check_finite(path, graph.edge_names(), circuit.scores)
    origin = _origin(wide, graph)
    there = origin >= 0
    shares = np.bincount(origin[there], minlength=graph.n_edges)
    scores, inside = np.zeros(wide.n_edges), np.zeros(wide.n_edges, dtype=bool)
    scores[there] = (circuit.scores / shares)[origin[there]]
    inside[there] = circuit.in_circuit[origin[there]]
    alive = set(circuit.nodes())
    known = {key: circuit.info[key] for key in ("d_model",) if key in circuit.info}
    content = {
        "cfg": {**shape_to_config(graph.shape), **known},
        "src_nodes": list(wide.senders),
        "dst_nodes": list(wide.receivers),
        "edges_scores": _matrix(wide, scores).float(),
        "edges_in_graph": _matrix(wide, inside),
        "nodes_in_graph": torch.tensor([name in alive for name in wide.senders]),
        "info": json.loads(json_text(circuit.info)),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def read_pt(path: PathLike) -> Circuit:
    """Read a ``.pt`` file of EAP-IG, MIB or :func:`write_pt`.

    What is set where the graph has no edge is ignored: EAP-IG's own selection of nodes sets
    it.  Scores of nodes are not read.

    Raises
    ------
    CircuitFileError
        If the file is not there, truncated or no such dict; if names, shapes or values are
        wrong; or if it keeps some neurons of a node only.
    """
    data = _load(path)
    graph = _graph(path, data["cfg"])
    wide = component_graph(_wide_shape(graph.shape, path))
    rows = _places(path, "src_nodes", data["src_nodes"], wide.senders)
    columns = _places(path, "dst_nodes", data["dst_nodes"], wide.receivers)
    shape = (len(rows), len(columns))
    at = np.ix_(rows, columns)
    ends = (wide.edge_sender, wide.edge_receiver)
    scores = _tensor(path, data, "edges_scores", shape).double().numpy()[at][ends]
    inside = _tensor(path, data, "edges_in_graph", shape).bool().numpy()[at][ends]
    _check_finite(path, wide.edge_names(), scores)
    nodes = _tensor(path, data, "nodes_in_graph", (len(rows),)).bool()
    _check_neurons(path, data, nodes)
    info = data.get("info", {})
    if not isinstance(info, dict):
        raise CircuitFileError(f"{path}: 'info' is a {type(info).__name__}, expected a dict")
    if "d_model" in data["cfg"]:
        info = {"d_model": data["cfg"]["d_model"], **info}
    return _narrow(path, Circuit(wide, scores, inside, info), graph)


def group_heads(circuit: Circuit, shape: GraphShape) -> Circuit:
    """Return a circuit over per-head keys and values as one over shared key-value heads.

    EAP-IG runs models with grouped-query attention as if every query head had a key and a
    value of its own.  Here the copies are one edge: it is in if one of them is, and its score
    is their sum.

    Parameters
    ----------
    circuit
        Of the graph without sharing.
    shape
        The same but for ``n_kv_heads``.

    Raises
    ------
    GraphError
        If the shapes differ in anything else.
    """
    if circuit.graph.shape != replace(shape, n_kv_heads=None):
        raise GraphError(f"{circuit.graph.shape} is not {shape} without shared key-value heads")
    graph = component_graph(shape)
    return _collect(circuit, graph, _origin(circuit.graph, graph))


def _collect(circuit: Circuit, graph: Graph, origin: NDArray[np.int64]) -> Circuit:
    there = origin >= 0
    scores = np.zeros(graph.n_edges)
    np.add.at(scores, origin[there], circuit.scores[there])
    inside = np.zeros(graph.n_edges, dtype=bool)
    inside[origin[there & circuit.in_circuit]] = True
    return Circuit(graph, scores, inside, circuit.info)


def _wide_shape(shape: GraphShape, path: PathLike) -> GraphShape:
    """The shape of EAP-IG's own graph: a key and a value for every head, an MLP in each layer."""
    if shape.spans:
        raise CircuitFileError(
            f"{path}: EAP-IG's layout has no graph split by positions: use .json, or find the "
            "circuit without --positions"
        )
    if shape.split_embed or not shape.split_qkv:
        what = "the embeddings split" if shape.split_embed else "q, k and v joined"
        raise CircuitFileError(
            f"{path}: EAP-IG's layout has no graph with {what}: use .json, or find the circuit "
            "without --split-embed and --no-split-qkv"
        )
    return replace(shape, n_kv_heads=None, has_mlp=True)


def _origin(wide: Graph, graph: Graph) -> NDArray[np.int64]:
    """``[edge of wide]``: the edge of ``graph`` that it is, or is a copy of; -1 for none."""
    shape = graph.shape
    group = shape.n_heads // shape.kv_heads
    receivers = np.full(len(wide.receivers), -1)
    for index, name in enumerate(wide.receivers):
        node, mark, kind = name.partition("<")
        if shape.grouped and kind in ("k>", "v>"):
            layer, _, head = node.partition(".h")
            name = f"{layer}.kv{int(head) // group}{mark}{kind}"
        receivers[index] = graph.receiver_index.get(name, -1)
    senders = np.array([graph.sender_index.get(name, -1) for name in wide.senders])
    sender, receiver = senders[wide.edge_sender], receivers[wide.edge_receiver]
    wanted = receiver * graph.n_senders + sender
    known = graph.edge_receiver.astype(np.int64) * graph.n_senders + graph.edge_sender
    found = np.searchsorted(known, wanted)  # edges are sorted by receiver, then sender
    return np.where((sender >= 0) & (receiver >= 0), found, -1)


def _narrow(path: PathLike, circuit: Circuit, graph: Graph) -> Circuit:
    """Return the circuit of EAP-IG's graph as one of the graph that ``cfg`` says."""
    if circuit.graph.shape == graph.shape:
        return circuit
    origin = _origin(circuit.graph, graph)
    lost = np.flatnonzero((origin < 0) & circuit.in_circuit)
    if len(lost):
        raise CircuitFileError(
            f"{path}: edge {circuit.graph.edge_name(lost[0])!r} is in, but the model of its cfg "
            "is attention-only"
        )
    return _collect(circuit, graph, origin)


def _matrix(graph: Graph, values: NDArray[Any]) -> Tensor:
    """``[edge]`` as ``[sender, receiver]``."""
    matrix = np.zeros((graph.n_senders, len(graph.receivers)), dtype=values.dtype)
    matrix[graph.edge_sender, graph.edge_receiver] = values
    return torch.from_numpy(matrix)


def _load(path: PathLike) -> dict[str, Any]:
    data = pickled.read_pt(path, CircuitFileError)
    if not isinstance(data, dict):
        raise CircuitFileError(
            f"{path}: holds a {type(data).__name__}, expected the dict of an EAP-IG graph"
        )
    if missing := [key for key in _KEYS if key not in data]:
        raise CircuitFileError(
            f"{path}: no {', '.join(map(repr, missing))}; expected the keys {', '.join(_KEYS)}"
        )
    return data


def _graph(path: PathLike, config: Any) -> Graph:
    if not isinstance(config, dict):
        raise CircuitFileError(f"{path}: 'cfg' is a {type(config).__name__}, expected a dict")
    try:
        return component_graph(shape_from_config(config))
    except GraphError as error:
        raise CircuitFileError(f"{path}: {error}") from error


def _places(path: PathLike, key: str, names: Any, known: tuple[str, ...]) -> NDArray[np.int64]:
    """Where the nodes of the graph stand in the file: ``[node]``."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CircuitFileError(f"{path}: {key!r} is no list of names")
    if unknown := sorted(set(names) - set(known)):
        raise CircuitFileError(
            f"{path}: {key!r} has {unknown[0]!r}, which the graph of its cfg lacks; "
            f"{did_you_mean(unknown[0], known)}"
        )
    if len(names) != len(known) or len(set(names)) != len(known):
        raise CircuitFileError(
            f"{path}: {key!r} has {len(names)} names, expected the {len(known)} of its cfg, "
            "once each"
        )
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[name] for name in known])


def _tensor(path: PathLike, data: dict[str, Any], key: str, shape: tuple[int, ...]) -> Tensor:
    value = data[key]
    got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if got != list(shape):
        raise CircuitFileError(f"{path}: {key!r} is {got}, expected a tensor of {list(shape)}")
    return value


def _check_finite(path: PathLike, names: list[str], scores: NDArray[np.floating]) -> None:
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise CircuitFileError(
            f"{path}: the score of {names[bad[0]]!r} is {scores[bad[0]]}, expected a finite number"
        )


def _check_neurons(path: PathLike, data: dict[str, Any], nodes: Tensor) -> None:
    if data.get("neurons_in_graph") is None:
        return
    n_neurons = data["cfg"].get("d_model", 0)
    neurons = _tensor(path, data, "neurons_in_graph", (len(nodes), n_neurons)).bool()
    if partly := torch.nonzero(nodes & ~neurons.all(-1)).flatten().tolist():
        raise CircuitFileError(
            f"{path}: it keeps only some neurons of {data['src_nodes'][partly[0]]!r}; circuits of "
            "single neurons are not supported, give one of whole nodes or edges"
        )
