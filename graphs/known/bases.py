"""Circuits of one model over different bases: components, SAEs, transcoders, neurons.

All circuits are put in one *component form*, the finest that all have:

- a latent or error node of ``m3`` stands for ``m3``;
- where one circuit has latents of an attention layer, its heads are not told apart in any:
  ``a2.f5``, ``a2.err`` and ``a2.h0`` all stand for ``a2``;
- a cut of the stream, ``r3``, is no component.  ``u->r3`` and ``r3.f9->v`` together stand for
  ``u->v``, and so do longer chains of cuts;
- q, k and v, or token and position embedding, are joined where one circuit joins them;
- spans of the prompt are joined.

An edge *refines* the component edges that it stands for, alone or as a part of a chain.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from graphs.circuit import Circuit
from graphs.coarse import coarsen, joined_shape
from graphs.errors import GraphError
from graphs.graph import GraphShape, parse_node
from graphs.known.compare import differing_shapes
from graphs.select import prune

__all__ = ["BasesComparison", "InComponents", "Shared", "basis_name", "compare_bases", "shared"]

_HEAD = re.compile(r"a(\d+)\.h\d+")
_KIND_NAMES = {"transcoder": "transcoders", "neurons": "neurons", "neuron_inputs": "neurons"}
_KIND_NAMES["cross_layer"] = "cross-layer transcoders"


@dataclass(frozen=True)
class InComponents:
    """A circuit in component form.

    Parameters
    ----------
    basis
        What its nodes are.
    n_edges, n_nodes, n_latents
        Of the circuit itself, pruned; nodes without ``logits``.
    components
        Components that its nodes stand for.
    edges
        Component edge -> the circuit's own edges that refine it.
    by_errors
        Component edges that only edges from or into error nodes refine.
    shared, other
        Its own edges that refine a component edge which every circuit has, and the rest.
    """

    basis: str
    n_edges: int
    n_nodes: int
    n_latents: int
    components: tuple[str, ...]
    edges: Mapping[str, tuple[str, ...]]
    by_errors: tuple[str, ...]
    shared: tuple[str, ...] = ()
    other: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shared:
    """In which of several circuits names are.

    Parameters
    ----------
    members
        Name -> positions of the circuits that have it, ascending; in the order of the first that
        has it.
    n_circuits
        How many there are.
    """

    members: Mapping[str, tuple[int, ...]]
    n_circuits: int

    @property
    def common(self) -> tuple[str, ...]:
        """Names that are in every circuit."""
        return tuple(name for name, at in self.members.items() if len(at) == self.n_circuits)

    def only(self, circuit: int) -> tuple[str, ...]:
        """Names that are in one circuit alone."""
        return tuple(name for name, at in self.members.items() if at == (circuit,))

    def jaccard(self, one: int, other: int) -> float:
        """Names in both of two circuits, as a share of those in either; 1 if there are none."""
        both = sum(one in at and other in at for at in self.members.values())
        either = sum(one in at or other in at for at in self.members.values())
        return both / either if either else 1.0

    def __repr__(self) -> str:
        return f"<Shared: {len(self.common):,} of {len(self.members):,} in all {self.n_circuits}>"


@dataclass(frozen=True)
class BasesComparison:
    """Circuits over different bases, in component form.

    Parameters
    ----------
    circuits
        As they were given, two or more.
    components, edges
        Which of them has which component and which component edge.
    """

    circuits: tuple[InComponents, ...]
    components: Shared
    edges: Shared

    def __repr__(self) -> str:
        return (
            f"<BasesComparison of {len(self.circuits)}: components {self.components!r}, "
            f"edges {self.edges!r}>"
        )


def basis_name(shape: GraphShape) -> str:
    """Return what the nodes of a graph are, in words.

    Examples
    --------
    >>> from graphs.sites import Site
    >>> basis_name(GraphShape(2, 4, sites=(Site("mlp_out", 0, (1,)), Site("transcoder", 1, ()))))
    'SAEs at m0, transcoders at m1'
    """
    if not shape.sites:
        return "components"
    by_kind: dict[str, list[str]] = {}
    for site in shape.sites:
        by_kind.setdefault(_KIND_NAMES.get(site.kind, "SAEs"), []).append(site.name)
    return ", ".join(f"{kind} at {' '.join(names)}" for kind, names in by_kind.items())


def compare_bases(*circuits: Circuit) -> BasesComparison:
    """Compare circuits of one model whose nodes are components, latents or neurons.

    Parameters
    ----------
    *circuits
        Two or more; what is on no path from the embeddings to ``logits`` is left out.

    Raises
    ------
    GraphError
        If they are of different models, as far as their graphs and ``info`` say.
    """
    shapes = [_without_sites(circuit.graph.shape) for circuit in circuits]
    qkv, embed = (not all(getattr(s, f"split_{x}") for s in shapes) for x in ("qkv", "embed"))
    shapes = [joined_shape(shape, qkv=qkv, embed=embed) for shape in shapes]
    for circuit, shape in zip(circuits[1:], shapes[1:], strict=True):
        differing = differing_shapes(shapes[0], shape, "one", "the other")
        models = circuits[0].info.get("model"), circuit.info.get("model")
        if not differing and None not in models and models[0] != models[1]:
            differing = f"one is of {models[0]!r}, the other of {models[1]!r}"
        if differing:
            raise GraphError(
                f"the circuits are of different models: {differing}; compare circuits of one model"
            )
    joined = {
        site.layer
        for circuit in circuits
        for site in circuit.graph.shape.sites
        if site.kind.startswith("attn")
    }
    found = [_in_components(circuit, shapes[0], joined) for circuit in circuits]
    edges = shared([one.edges for one in found])
    return BasesComparison(
        tuple(_told_apart(one, set(edges.common)) for one in found),
        shared([one.components for one in found]),
        edges,
    )


def _without_sites(shape: GraphShape) -> GraphShape:
    return replace(shape.unsplit, sites=())


def _in_components(circuit: Circuit, shape: GraphShape, joined: set[int]) -> InComponents:
    own = circuit.graph.shape
    circuit = coarsen(
        circuit, replace(own.unsplit, split_qkv=shape.split_qkv, split_embed=shape.split_embed)
    )
    graph = circuit.graph
    mask = prune(graph, circuit.in_circuit)
    nodes = [name for name in circuit.nodes() if name != "logits"]
    pairs: dict[tuple[str, str], list[str]] = {}
    for edge in np.flatnonzero(mask).tolist():
        u = _component(graph.senders[graph.edge_sender[edge]], joined)
        v = _component(graph.receivers[graph.edge_receiver[edge]], joined, receiver=True)
        pairs.setdefault((u, v), []).append(graph.edge_name(edge))
    edges = _through_cuts(pairs, {site.name for site in own.sites if site.is_cut})
    found = {_component(name, joined) for name in nodes}
    cuts = {site.name for site in own.sites if site.is_cut}
    return InComponents(
        basis_name(own),
        int(mask.sum()),
        len(nodes),
        sum(parse_node(name)[0] == "latent" for name in nodes),
        tuple(sorted(found - cuts)),
        edges,
        tuple(name for name, by in edges.items() if all(".err" in edge for edge in by)),
    )


def _component(name: str, joined: set[int], *, receiver: bool = False) -> str:
    """What a sender or receiver stands for; of receivers heads are always told apart."""
    if not receiver and (head := _HEAD.fullmatch(name)) and int(head[1]) in joined:
        return f"a{head[1]}"
    place, dot, part = name.partition(".")
    return place if dot and not part.startswith(("h", "kv")) else name


def _through_cuts(
    pairs: Mapping[tuple[str, str], list[str]], cuts: set[str]
) -> dict[str, tuple[str, ...]]:
    """Return component edges with the edges that refine them; chains over cuts are one edge."""
    out: dict[str, list[tuple[str, list[str]]]] = {}
    for (u, v), names in pairs.items():
        out.setdefault(u, []).append((v, names))
    found: dict[str, dict[str, None]] = {}

    def follow(sender: str, at: str, used: tuple[str, ...]) -> None:
        for v, names in out.get(at, ()):
            if v in cuts:
                follow(sender, v, (*used, *names))
            else:
                own = found.setdefault(f"{sender}->{v}", {})
                own.update(dict.fromkeys((*used, *names)))

    for sender in out:
        if sender not in cuts:
            follow(sender, sender, ())
    return {edge: tuple(names) for edge, names in found.items()}


def _told_apart(one: InComponents, common: Container[str]) -> InComponents:
    """Fill in which of the own edges refine a component edge that all circuits have."""
    own = {name: None for names in one.edges.values() for name in names}
    shared = {name for edge, names in one.edges.items() if edge in common for name in names}
    return replace(
        one,
        shared=tuple(name for name in own if name in shared),
        other=tuple(name for name in own if name not in shared),
    )


def shared(circuits: Sequence[Iterable[str]]) -> Shared:
    """Return in which of some collections each name is."""
    members: dict[str, tuple[int, ...]] = {}
    for i, names in enumerate(circuits):
        for name in names:
            members[name] = (*members.get(name, ()), i)
    return Shared(members, len(circuits))
