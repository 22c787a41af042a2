"""Circuits as the graph JSON of circuit-tracer and Neuronpedia, and such files as circuits.

Their graphs have a column for each token of one prompt and a link from node to node.  Here a
circuit is of many prompts, so its columns are its spans, or *all positions* and *scored
positions* where it has none; q, k and v into one head are one link, whose weight is the sum of
their scores, positive where the edge helps.  What feeds several nodes of the circuit (a shared
key-value head, an MLP with its latents) is divided among them.  Edges on no path from the
embeddings to ``logits`` are left out.  The circuit itself stands beside, under ``circuit``, so
that our own files are read back exactly.

============================ ============================== ===================================
node here                    ``feature_type``               ``feature``
============================ ============================== ===================================
``input``, ``tok``, ``pos``  embedding                      0, 1
latent of a transcoder       cross layer transcoder         Cantor's pair of layer and latent
other latent, neuron, expert sparse autoencoder, neuron,    the same, above those of latents
                             expert
head, MLP                    attention head, mlp            the same
error node                   mlp reconstruction error       -1 (other places: the same as above)
``logits``                   logit                          0
============================ ============================== ===================================

References
----------
circuit-tracer 0.5, ``frontend/graph_models.py`` and its viewer, which drops a node that stands in
more than two thirds of the columns and reads ``(p=...)`` from a logit's label; neuronpedia,
``app/api/graph/graph-schema.json``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphs.circuit import Circuit
from graphs.errors import CircuitFileError
from graphs.graph import GraphShape, parse_node, shape_to_config
from graphs.select import alive_nodes
from graphs.sites import NEURONS, Site, parse_latent
from graphs.spans import split_span

__all__ = ["is_attribution_graph", "read_attribution_graph", "to_attribution_graph"]

_COLUMNS = ("all positions", "scored positions")
_TRANSCODERS = ("transcoder", "cross_layer")
_ROOM = 10_000_000  # features of one kind of node: more than any dictionary has latents
_ROOMS = {
    kind: i * _ROOM
    for i, kind in enumerate(
        ("m", "mlp", "head", "a", "r", "rmid", "error a", "error r", "error rmid")
    )
}
_MOST_LAYERS = 10_000
_LARGEST = 1e300  # weights are added up
_NUMBER = re.compile(r"[0-9]{1,9}")
_FEATURE = re.compile(r"[0-9]{1,9}_([0-9]{1,9})_.*")


def to_attribution_graph(circuit: Circuit, slug: str) -> dict[str, Any]:
    """Return a circuit as plain values that make the file.

    Parameters
    ----------
    circuit
        Any circuit; its scores are finite.
    slug
        What viewers call it.
    """
    graph, info = circuit.graph, circuit.info
    alive = alive_nodes(graph, circuit.in_circuit)
    alive[graph.n_senders] = True  # logits, also of a circuit without a path
    columns = _columns(graph.shape)
    nodes = {name: _node(name, graph.shape, columns) for name in _names(graph.nodes, alive)}
    weights: dict[tuple[str, str], float] = defaultdict(float)
    helps = info.get("helps") or 1
    for edge in np.flatnonzero(circuit.in_circuit).tolist():
        fed = [i for i in graph.fed_by(int(graph.edge_receiver[edge])).tolist() if alive[i]]
        if not alive[graph.edge_sender[edge]]:
            continue
        source = nodes[graph.senders[graph.edge_sender[edge]]]["node_id"]
        for node in fed:
            target = nodes[graph.nodes[node]]["node_id"]
            weights[source, target] += helps * float(circuit.scores[edge]) / len(fed)
    return {
        "metadata": _metadata(circuit, slug, columns),
        "qParams": {
            "pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": "",
        },
        "nodes": list(nodes.values()),
        "links": [{"source": u, "target": v, "weight": w} for (u, v), w in weights.items()],
        "circuit": {
            "cfg": shape_to_config(graph.shape),
            "edges": dict(zip(circuit.edges(), circuit.scores[circuit.in_circuit].tolist(),
                              strict=True)),
            "info": dict(info),
        },
    }  # fmt: skip


def is_attribution_graph(data: Mapping[str, Any]) -> bool:
    """Whether a JSON object has the parts of an attribution graph."""
    return all(key in data for key in ("metadata", "nodes", "links"))


def read_attribution_graph(
    where: object, data: Mapping[str, Any]
) -> tuple[dict[str, Any], list[tuple[str, float, bool]], dict[str, Any]]:
    """Return what makes a circuit of an attribution graph.

    Of another's file all positions are taken together (weights add up), the tokens are ``input``
    and its logits are ``logits`` (weights are averaged by the tokens' probabilities, as
    circuit-tracer's own pruning does; evenly if the file has none).  Latents of its transcoders
    are nodes ``m3.f12``; attention, which is frozen there, is part of the edges, and the graph has
    one head in each layer, with no edge in the circuit.

    Parameters
    ----------
    where
        What messages begin with.
    data
        Content of the file.

    Returns
    -------
    tuple
        ``cfg`` of the shape, rows ``(edge, score, in)``, and ``info``.

    Raises
    ------
    CircuitFileError
        If nodes or links are not those of an attribution graph; the message names them.
    """
    own = data.get("circuit")
    if own is not None:
        return _own(where, own)
    nodes = _named(where, data["nodes"])
    layers, latents = _layers(where, nodes)
    sites = [Site("transcoder", i, tuple(sorted(latents[i]))) for i in sorted(latents)]
    shape = GraphShape(layers, 1, sites=tuple(sites))
    sums: dict[str, float] = defaultdict(float)
    shares = _shares(where, nodes)
    for link in _objects(where, "links", data["links"]):
        source, target = str(link.get("source")), str(link.get("target"))
        weight = _number(link.get("weight"))
        if source not in nodes or target not in nodes or weight is None:
            raise CircuitFileError(
                f"{where}: link {str(link)[:80]}: expected two of its nodes and a weight"
            )
        name = f"{nodes[source][0]}->{nodes[target][0]}"
        sums[name] += weight * shares.get(target, 1.0)
    metadata = data["metadata"] if isinstance(data["metadata"], dict) else {}
    info = {"method": "circuit-tracer", "helps": 1, "positions": "taken together"}
    info |= {ours: metadata[theirs] for ours, theirs in (("model", "scan"), ("task", "prompt"))
             if isinstance(metadata.get(theirs), str)}  # fmt: skip
    return shape_to_config(shape), [(name, sums[name], True) for name in sums], info


# --- ours to theirs -----------------------------------------------------------------------


def _names(nodes: Sequence[str], alive: Any) -> list[str]:
    return [name for name, there in zip(nodes, alive.tolist(), strict=True) if there]


def _columns(shape: GraphShape) -> tuple[str, ...]:
    """Titles of the columns, at least two: a viewer drops what stands in all of them."""
    return (*shape.spans, *_COLUMNS[len(_COLUMNS) - max(0, 2 - len(shape.spans)) :])


def _node(name: str, shape: GraphShape, columns: Sequence[str]) -> dict[str, Any]:
    place, span = split_span(name)
    column = columns.index(span) if span else 0
    if name == "logits":
        scored = shape.scored_spans
        column = columns.index(scored[-1]) if scored else len(columns) - 1
    layer, kind, feature, number = _place(place, shape)
    return {
        "node_id": f"{layer}_{number}_{column}",
        "feature": feature,
        "layer": layer,
        "ctx_idx": column,
        "feature_type": kind,
        "token_prob": 1.0 if kind == "logit" else 0.0,
        "is_target_logit": kind == "logit",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{'L' if kind == 'logit' else layer}_{number}-{column}",
        "clerp": f'Output "{name}" (p=1.000)' if kind == "logit" else name,
        "influence": None,
        "activation": None,
    }


def _place(name: str, shape: GraphShape) -> tuple[str, str, int, int]:
    """``(layer, feature type, feature, number within the layer)`` of a node."""
    if name == "logits":
        return str(shape.n_layers + 1), "logit", 0, 0
    if (latent := parse_latent(name)) is None:
        kind, layer, number = parse_node(name)
        if kind == "input":
            return "E", "embedding", int(name == "pos"), int(name == "pos")
        number = _ROOMS[kind] + max(0, number)
        return str(layer), {"head": "attention head"}.get(kind, kind), _pair(layer, number), number
    kind, where, layer, number = latent
    if kind == "error":
        if where == "m":
            return str(layer), "mlp reconstruction error", -1, -1
        number = _ROOMS[f"error {where}"]
        return str(layer), "reconstruction error", _pair(layer, number), number
    site = shape.site_at[name.split(".")[0]]
    number += _ROOMS[where]
    return str(layer), _feature_type(site), _pair(layer, number), number


def _feature_type(site: Site) -> str:
    if site.kind in _TRANSCODERS:
        return "cross layer transcoder"
    if site.kind in NEURONS:
        return "neuron"
    return (
        "expert" if site.name.startswith("m") and site.kind != "mlp_out" else "sparse autoencoder"
    )


def _pair(x: int, y: int) -> int:
    """One number for two from 0 on, as Cantor counts them."""
    return (x + y) * (x + y + 1) // 2 + y


def _metadata(circuit: Circuit, slug: str, columns: Sequence[str]) -> dict[str, Any]:
    info, known = circuit.info, ("method", "metric", "intervention", "direction")
    model = info.get("model") or "unknown"
    settings = {key: info[key] for key in known if isinstance(info.get(key), str)}
    return {
        "slug": slug,
        "scan": Path(model).name,
        "transcoder_list": [],
        "prompt_tokens": list(columns),
        "prompt": f"prompts of {info.get('task') or 'an unnamed task'}",
        "node_threshold": None,
        "schema_version": 1,
        "info": {
            "description": (
                f"Circuit of {circuit.n_edges} of {circuit.graph.n_edges} edges. The weight of a "
                "link is the sum of its edges' scores over prompts, positive where it helps; "
                "columns are parts of the prompts."
            ),
            "generator": {"name": "acdc-circuits"},
        },
        "generation_settings": settings,
    }


# --- theirs to ours -----------------------------------------------------------------------


def _own(
    where: object, own: Any
) -> tuple[dict[str, Any], list[tuple[str, float, bool]], dict[str, Any]]:
    """What our own files hold besides the graph."""
    fields: dict[str, dict[str, Any]] = {}
    for key in ("cfg", "edges", "info"):
        value = own.get(key) if isinstance(own, dict) else None
        if not isinstance(value, dict):
            raise CircuitFileError(f"{where}: 'circuit' has no object {key!r}; export it anew")
        fields[key] = value
    rows = [(name, score, True) for name, score in fields["edges"].items()]
    return fields["cfg"], rows, fields["info"]


def _objects(where: object, key: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise CircuitFileError(f"{where}: {key!r} is no list of objects")
    return value


def _named(where: object, value: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """Nodes by id, each with its name here."""
    found = {}
    for node in _objects(where, "nodes", value):
        name, identity = _name(node), node.get("node_id")
        if name is None or not isinstance(identity, str):
            raise CircuitFileError(
                f"{where}: node {str(identity)[:40]!r} of layer {str(node.get('layer'))[:20]!r} is "
                f"a {str(node.get('feature_type'))[:40]!r}: expected a transcoder's feature, an "
                "error, an embedding or a logit, as circuit-tracer writes them"
            )
        found[identity] = name, node
    return found


def _name(node: Mapping[str, Any]) -> str | None:
    """Name here of one of their nodes; None for what we have no node for."""
    kind, layer = node.get("feature_type"), str(node.get("layer"))
    if kind == "embedding":
        return "input"
    if kind == "logit":
        return "logits"
    if not _NUMBER.fullmatch(layer):
        return None
    if kind == "mlp reconstruction error":
        return f"m{int(layer)}.err"
    latent = _FEATURE.fullmatch(str(node.get("node_id")))
    if kind != "cross layer transcoder" or latent is None:
        return None
    return f"m{int(layer)}.f{int(latent[1])}"


def _layers(
    where: object, nodes: Mapping[str, tuple[str, dict[str, Any]]]
) -> tuple[int, dict[int, set[int]]]:
    """Number of layers, and the latents of each that has a transcoder."""
    latents: dict[int, set[int]] = defaultdict(set)
    layers = 0
    for name, node in nodes.values():
        if name == "logits":
            text = str(node.get("layer"))
            layers = max(layers, int(text) - 1 if _NUMBER.fullmatch(text) else 0)
        elif (latent := parse_latent(name)) is not None:
            kind, _, layer, number = latent
            layers = max(layers, layer + 1)
            latents[layer] |= {number} if kind == "latent" else set()
    if not layers or layers > _MOST_LAYERS:
        raise CircuitFileError(f"{where}: {layers:,} layers: expected 1 to {_MOST_LAYERS:,}")
    return layers, latents


def _shares(where: object, nodes: Mapping[str, tuple[str, dict[str, Any]]]) -> dict[str, float]:
    """Share of each logit's token in the sum of the weights into ``logits``."""
    chances = {}
    for identity, (name, node) in nodes.items():
        if name == "logits":
            chance = _number(node.get("token_prob", 0.0))
            if chance is None or not 0 <= chance <= 1:
                raise CircuitFileError(
                    f"{where}: node {identity[:40]!r} has token_prob "
                    f"{str(node['token_prob'])[:40]}, expected 0 to 1"
                )
            chances[identity] = chance
    whole = sum(chances.values())
    if whole <= 0:
        return {identity: 1 / len(chances) for identity in chances}
    return {identity: chance / whole for identity, chance in chances.items()}


def _number(value: Any) -> float | None:
    """The number that a JSON value is; None for any other value, and for one beyond adding up."""
    if type(value) not in (int, float) or not -_LARGEST < value < _LARGEST:
        return None
    return float(value)
