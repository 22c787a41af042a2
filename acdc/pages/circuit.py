"""The interactive circuit: its pictures, and what the page's script shows of edges and nodes.

Only edges that can be looked at go into the page: those of the circuit (the strongest, if there
are very many) and the best-scored others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.evidence.latents.activations import record
from acdc.evidence.latents.gallery import token_shares
from acdc.pages.patterns import encode_patterns
from acdc.tasks.texts import Texts, visible
from graphs import Circuit, Graph, prune, select_top, top_edges
from graphs.errors import GraphError
from graphs.graph import parse_node
from graphs.pictures.draw import styled_lines
from graphs.pictures.svg import Drawing, to_svg
from graphs.similar import similar_nodes

__all__ = ["CircuitView", "Picture", "view_circuit"]

MOST_EDGES = 1_000
"""Of the circuit that the page holds."""

N_OTHERS = 100
CROWDED, N_STRONGEST = 90, 60
_TOKENS = 4
_ALIKE = 0.6  # of nodes that are proposed as a group

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Picture:
    """One drawing of the circuit.

    Parameters
    ----------
    name
        What is on it.
    drawing
        The picture itself.
    lines, ends
        For each line the indices of its edges among :attr:`CircuitView.data`'s, and the node that
        it ends at.
    """

    name: str
    drawing: Drawing
    lines: list[list[int]]
    ends: list[str]


@dataclass(frozen=True)
class CircuitView:
    """What the page holds of a circuit.

    Parameters
    ----------
    pictures
        The circuit, or its strongest edges if there are many and then all of them; last, if
        there are any, the first one with the best-scored other edges.
    data
        For the script, see ``viewer/data.js``.
    n_edges, n_shown, n_others
        Edges of the circuit, those of them on the page, and other edges on it.
    n_without_pattern
        Heads on the page whose attention patterns found no room.
    """

    pictures: tuple[Picture, ...]
    data: dict[str, Any]
    n_edges: int
    n_shown: int
    n_others: int
    n_without_pattern: int


def view_circuit(
    circuit: Circuit,
    experiment: Experiment,
    texts: Texts,
    *,
    n_prompts: int,
    n_kept: Mapping[str, int] | None = None,
    why: Mapping[str, Sequence[tuple[str, str]]] | None = None,
) -> CircuitView:
    """Gather what the page shows of a circuit.

    Parameters
    ----------
    circuit
        With its scores.
    experiment
        What it was found in.
    texts
        Of token ids.
    n_prompts
        Pairs of prompts whose attention patterns are shown, the first of the task.
    n_kept
        Edge -> in how many runs it was kept; None if that was not measured.
    why
        ``layer.head`` -> what is said of why it attends; None: nothing.
    """
    shown, others = _strongest(circuit, MOST_EDGES), _others(circuit)
    edges = np.flatnonzero(shown | others)
    place = {int(edge): i for i, edge in enumerate(edges)}
    pictures = tuple(
        _picture(name, circuit, mask, place) for name, mask in _masks(circuit, shown, others)
    )
    rows = [_edge(circuit, int(edge), n_kept) for edge in edges]
    for picture in pictures:
        for node, line in zip(picture.ends, picture.lines, strict=True):
            for i in line:
                rows[i][1] = node
    names = {name for picture in pictures for name in picture.drawing.nodes}
    nodes = _nodes(circuit.graph, edges, [row[1] for row in rows], names)
    heads = _ranked_heads(rows, nodes)
    patterns = encode_patterns(experiment, texts, heads, n_prompts)
    fires = _fires_on(experiment, nodes, texts)
    data = {
        "n_edges": circuit.n_edges,
        "helps": circuit.info.get("helps") or 1,  # sign of a score that helps
        "edges": rows,
        "pictures": [picture.lines for picture in pictures],
        "proposed": _proposed(circuit, shown, names),
        "nodes": {name: {**about, "tokens": fires.get(name, [])} for name, about in nodes.items()},
        "prompts": patterns.prompts,
        "patterns": patterns.patterns,
        "why": dict(why or {}),
    }
    return CircuitView(
        pictures,
        data,
        circuit.n_edges,
        int(shown.sum()),
        int(others.sum()),
        len(heads) - len(patterns.patterns),
    )


# --- edges --------------------------------------------------------------------------------


def _masks(circuit: Circuit, shown: Mask, others: Mask) -> list[tuple[str, Mask]]:
    """Names of the pictures, and the edges on each."""
    n_shown, n_others = int(shown.sum()), int(others.sum())
    first, name = shown, "the circuit"
    if n_shown > CROWDED:
        first = _strongest(circuit, N_STRONGEST)
        name = f"its {int(first.sum())} strongest edges"
    masks = [(name, first)]
    if n_shown > CROWDED:
        whole = n_shown == circuit.n_edges
        masks.append((f"all {n_shown:,}" if whole else f"its {n_shown:,} strongest", shown))
    if n_others:
        masks.append((f"with {n_others} others (dashed)", first | others))
    return masks


def _strongest(circuit: Circuit, most: int) -> Mask:
    """The circuit's edges, or the largest connected part of at most so many, by |score|."""
    inside = circuit.in_circuit
    if inside.sum() <= most:
        return inside
    kept = prune(circuit.graph, inside)
    ranked = np.where(kept, np.abs(circuit.scores), -1.0)
    return kept & select_top(circuit.graph, ranked, most, absolute=False)


def _others(circuit: Circuit) -> Mask:
    """The best-scored edges outside the circuit; a score of 0 says nothing."""
    scores = np.where(circuit.in_circuit, 0.0, np.abs(circuit.scores))
    return top_edges(scores, min(N_OTHERS, int((scores > 0).sum())))


def _picture(name: str, circuit: Circuit, drawn: Mask, place: Mapping[int, int]) -> Picture:
    """Draw some edges; lines of no edge of the circuit are dashed."""
    graph, lines, members = circuit.graph, [], []
    for line in styled_lines(circuit, drawn):
        edges = [graph.edge_index(f"{line.sender}->{name}") for name in line.receivers]
        outside = not circuit.in_circuit[edges].any()
        lines.append(replace(line, style="dashed") if outside else line)
        members.append([place[edge] for edge in edges])
    drawing = to_svg(graph, lines)
    return Picture(name, drawing, members, [line.node for line in lines])


def _edge(circuit: Circuit, edge: int, n_kept: Mapping[str, int] | None) -> list[Any]:
    """``[sender, "", receiver, score, whether in the circuit, runs that kept it]``.

    The second is for the node that the edge's line ends at.
    """
    graph = circuit.graph
    return [
        graph.senders[graph.edge_sender[edge]],
        "",
        graph.receivers[graph.edge_receiver[edge]],
        float(circuit.scores[edge]),
        int(circuit.in_circuit[edge]),
        None if n_kept is None else n_kept.get(graph.edge_name(edge), 0),
    ]


# --- nodes --------------------------------------------------------------------------------


def _nodes(
    graph: Graph, edges: NDArray[np.int64], ends: Sequence[str], names: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """What the page says of the nodes that are drawn.

    Parameters
    ----------
    graph, edges
        The edges on the page.
    ends
        ``[edge]``: the node that each one's line ends at.
    names
        Of the drawn nodes.

    Returns
    -------
    dict
        ``feeds`` are nodes that are computed from what this one reads, but drawn apart from it
        (heads that share keys and values, the latents of an MLP); ``reads`` the other way round.
    """
    found: dict[str, dict[str, Any]] = {
        name: {
            "about": _about(name),
            "head": _head(name),
            "layer": _layer(name, graph.shape.n_layers),
            "feeds": [],
            "reads": [],
        }
        for name in sorted(names)
    }
    for edge, end in zip(edges.tolist(), ends, strict=True):
        for i in graph.fed_by(int(graph.edge_receiver[edge])).tolist():
            fed = graph.nodes[i]
            if fed != end and fed in found and fed not in found[end]["feeds"]:
                found[end]["feeds"].append(fed)
                found[fed]["reads"].append(end)
    return found


def _proposed(circuit: Circuit, mask: Mask, names: set[str]) -> list[list[str]]:
    """Sets of drawn nodes that do the same work."""
    sets = similar_nodes(circuit, mask, least=_ALIKE)
    drawn = [[name for name in members if name in names] for members in sets]
    return [members for members in drawn if len(members) > 1]


def _head(name: str) -> str | None:
    """``layer.head`` of a node that has an attention pattern."""
    kind, layer, head = _parsed(name)
    return f"{layer}.{head}" if kind == "head" else None


def _layer(name: str, n_layers: int) -> int:
    """Layer of a node: -1 of the embeddings, the number of layers of ``logits``."""
    kind, layer, _ = _parsed(name)
    if kind == "shared":
        return int(name[1 : name.index(".")])  # a0.kv1
    return {"input": -1, "logits": n_layers}.get(kind, layer)


def _parsed(name: str) -> tuple[str, int, int]:
    try:
        return parse_node(name)
    except GraphError:
        return "shared", -1, -1  # a key-value head is a receiver only, and no node


def _about(name: str) -> str:
    kind, layer, number = _parsed(name)
    site = name.rpartition(".")[0]
    return {
        "head": f"attention head {number} of layer {layer}",
        "mlp": f"MLP of layer {layer}",
        "input": "the embeddings",
        "logits": "what the metric reads",
        "latent": (
            f"neuron {number} of {site}"
            if ".n" in name
            else f"latent {number} of the dictionary at {site}"
        ),
        "expert": f"expert {number} of {site}, as much as the router gives it",
        "router": f"the router of layer {layer}: which experts, and how much of each",
        "error": f"what the nodes at {site} leave out",
        "cut": f"the stream at layer {layer}, as its dictionary writes it",
        "shared": "keys and values that several heads share",
    }[kind]


def _ranked_heads(
    rows: Sequence[Sequence[Any]], nodes: Mapping[str, dict[str, Any]]
) -> list[tuple[int, int]]:
    """Heads to show the patterns of, those of the circuit and with the strongest edges first."""
    best = dict.fromkeys(nodes, (0, 0.0))
    for sender, node, _, score, inside, _ in rows:
        for name in (sender, node):
            best[name] = max(best[name], (inside, abs(score)))
    ranked = sorted(best, key=lambda name: best[name], reverse=True)
    return list(dict.fromkeys(_parsed(name)[1:] for name in ranked if nodes[name]["head"]))


def _fires_on(
    experiment: Experiment, nodes: Mapping[str, Any], texts: Texts
) -> dict[str, list[list[Any]]]:
    """Latent -> the tokens with the largest shares of its summed activation."""
    latents = [name for name in nodes if _parsed(name)[0] == "latent"]
    if not latents or not experiment.attachments:
        return {}
    found = record(experiment, latents)
    return {
        name: [
            [visible(share.name), round(share.value, 3)]
            for share in token_shares(found, *found.of_latent(i), texts)[:_TOKENS]
        ]
        for i, name in enumerate(latents)
    }
