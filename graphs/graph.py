"""The computational graph of a transformer: who writes to the residual stream, who reads it.

A *sender* writes one ``[batch, pos, d_model]`` vector to the residual stream; a *receiver*
reads a sum of senders; an *edge* ``u->v`` is one sender read by one receiver.  A node is a
sender or ``logits``; a receiver *feeds* the nodes that are computed from what it reads (with
grouped-query attention one key receiver feeds every head of its group).

Everything is an array, so that graphs of ten million edges (sparse-autoencoder latents) cost
what their arrays cost.

Split by spans (:mod:`graphs.spans`), every sender and receiver exists once per span, an edge
joins equal spans, and information moves between spans inside heads alone: a key or value input
of a span feeds its head in every span that can come at or after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, zip_longest
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from graphs.errors import GraphError, did_you_mean
from graphs.sites import ALONE, Site, check_sites, parse_latent, sites_from_config
from graphs.spans import (
    Reaches,
    check_spans,
    reach_matrix,
    span_name,
    spans_from_config,
    spans_to_config,
    split_span,
)

__all__ = [
    "MOST_EDGES",
    "Graph",
    "GraphShape",
    "Outline",
    "attention_rows",
    "component_graph",
    "outline",
    "parse_node",
    "shape_from_config",
    "shape_to_config",
    "split_edge_name",
]

Kind = Literal["q", "k", "v"]

_MOST_HEADS = 100_000
MOST_EDGES = 50_000_000
"""Edges of a graph that is written out; of a larger one (:class:`Outline`) some can be."""
_HEAD = re.compile(r"a([0-9]{1,9})\.h([0-9]{1,9})")
_MLP = re.compile(r"m([0-9]{1,9})")
_INPUT = re.compile(r"<[qkv]>")
_ATTENTION = re.compile(r"a\d+\.(h|kv)\d+(?:<([qkv])>)?")


@dataclass(frozen=True)
class GraphShape:
    """What decides the nodes and edges of a component graph.

    Parameters
    ----------
    n_layers, n_heads
        Layers, and query heads of each.
    n_kv_heads
        Key-value heads of each layer; ``n_heads`` without grouped-query attention.
    has_mlp
        False for attention-only models.
    parallel
        True where attention and MLP of a block read the same stream (GPT-NeoX): then no edge
        ``a_l.*->m_l`` exists.
    split_qkv
        True: query, key and value inputs are receivers of their own (the default).  False: one
        receiver per head (and one per shared key-value head).
    split_embed
        True: token and position embedding are two senders ``tok`` and ``pos``.  False: one
        sender ``input`` (the default).
    sites
        Dictionaries whose latents are nodes, see :mod:`graphs.sites`.
    spans
        Names of the parts of a prompt by which nodes are split, see :mod:`graphs.spans`; none
        for a graph whose nodes stand for all positions.
    scored_spans
        Those that hold scored positions: ``logits`` reads the stream there alone.
    reaches
        Pairs ``(s, t)`` of indices into ``spans``: in some prompt a key or value of ``s`` can be
        read at a position of ``t`` (with causal attention, one at or after it; each span reaches
        itself).  None: spans follow each other, ``s`` reaches ``t`` if ``s <= t``.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None
    has_mlp: bool = True
    parallel: bool = False
    split_qkv: bool = True
    split_embed: bool = False
    sites: tuple[Site, ...] = ()
    spans: tuple[str, ...] = ()
    scored_spans: tuple[str, ...] = ()
    reaches: Reaches | None = None

    def __post_init__(self) -> None:
        if self.n_layers < 0 or self.n_heads < 1:
            raise GraphError(
                f"a graph of {self.n_layers} layers and {self.n_heads} heads: "
                "give at least 0 layers and 1 head"
            )
        if self.n_layers * self.n_heads > _MOST_HEADS:
            raise GraphError(
                f"a graph of {self.n_layers} layers and {self.n_heads} heads: expected at most "
                f"{_MOST_HEADS:,} heads in all; correct the shape"
            )
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise GraphError(
                f"{self.n_heads} heads cannot share {self.n_kv_heads} key-value heads: "
                "the first must be a multiple of the second"
            )
        _ = self.site_at
        scored, reaches = check_spans(self.spans, self.scored_spans, self.reaches)
        object.__setattr__(self, "scored_spans", scored)
        object.__setattr__(self, "reaches", reaches)

    @cached_property
    def site_at(self) -> dict[str, Site]:
        """Sites by the name of their place: ``m3``, ``a2``, ``r4``."""
        return check_sites(self.sites, self.n_layers, has_mlp=self.has_mlp, parallel=self.parallel)

    @property
    def kv_heads(self) -> int:
        """Key-value heads of each layer."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def grouped(self) -> bool:
        """Whether several query heads share one key-value head."""
        return self.kv_heads != self.n_heads

    @property
    def n_spans(self) -> int:
        """Number of spans; 1 for a graph that is not split."""
        return max(1, len(self.spans))

    @cached_property
    def reach(self) -> NDArray[np.bool_]:
        """``[from, to]``: whether keys and values of a span can be read in another one."""
        return reach_matrix(self.n_spans, self.reaches)

    @property
    def unsplit(self) -> GraphShape:
        """The shape without spans."""
        return replace(self, spans=(), scored_spans=(), reaches=None)


@dataclass(frozen=True, eq=False)
class Graph:
    """Senders, receivers and edges as index arrays, in topological order.

    Parameters
    ----------
    shape
        What the graph was built from.
    senders
        Names in topological order; a sender's index is its rank.
    receivers
        Names in topological order: every receiver that feeds a node stands before every
        receiver that reads the node.
    edge_sender, edge_receiver
        ``[edge]`` int32 indices into senders and receivers, sorted by receiver, then sender.
    feeds_start, feeds
        CSR: receiver ``v`` feeds nodes ``feeds[feeds_start[v]:feeds_start[v + 1]]``.  The node
        ``logits`` has the index ``n_senders``; there is one, also where several spans are scored
        (receivers ``logits@p4``, ``logits@p9`` feed it).
    """

    shape: GraphShape
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    edge_sender: NDArray[np.int32]
    edge_receiver: NDArray[np.int32]
    feeds_start: NDArray[np.int32]
    feeds: NDArray[np.int32]

    def __repr__(self) -> str:
        return f"<Graph of {self.n_senders:,} senders and {self.n_edges:,} edges>"

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return len(self.edge_sender)

    @property
    def n_senders(self) -> int:
        """Number of senders; also the index of the node ``logits``."""
        return len(self.senders)

    @property
    def n_nodes(self) -> int:
        """Senders and ``logits``."""
        return len(self.senders) + 1

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes: the senders, then ``logits``."""
        return (*self.senders, "logits")

    @cached_property
    def receiver_start(self) -> NDArray[np.int64]:
        """``[receiver + 1]``: edges of receiver ``v`` are ``start[v]:start[v + 1]``."""
        counts = np.bincount(self.edge_receiver, minlength=len(self.receivers))
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @cached_property
    def sender_index(self) -> dict[str, int]:
        """Index of each sender by name."""
        return {name: i for i, name in enumerate(self.senders)}

    @cached_property
    def receiver_index(self) -> dict[str, int]:
        """Index of each receiver by name."""
        return {name: i for i, name in enumerate(self.receivers)}

    @cached_property
    def source(self) -> NDArray[np.bool_]:
        """``[node]``: senders that no receiver feeds (the embeddings)."""
        fed = np.zeros(self.n_nodes, dtype=bool)
        fed[self.feeds] = True
        return ~fed

    @cached_property
    def unit(self) -> NDArray[np.int64]:
        """``[node]``: nodes with the same number are recomputed as one; ``logits`` has the last.

        They are neighbours that the same receivers feed: a head, an MLP with its latents, the
        latents of an attention layer, one latent of a transcoder, a cut.  Each embedding is one.
        """
        receivers = np.repeat(np.arange(len(self.receivers)), np.diff(self.feeds_start))
        counts = np.bincount(self.feeds, minlength=self.n_nodes)
        by_node = np.split(receivers[np.argsort(self.feeds, kind="stable")], np.cumsum(counts)[:-1])
        new = [not len(b) or a.tobytes() != b.tobytes() for a, b in pairwise(by_node)]
        return np.cumsum([0, *new])

    @cached_property
    def port(self) -> tuple[str, ...]:
        """By receiver: which of q, k and v attention reads from it; empty for all others."""
        return tuple(_port(self.shape, split_span(name)[0]) for name in self.receivers)

    @cached_property
    def sender_place(self) -> NDArray[np.int64]:
        """``[sender]``: the same number for all that are written at one place of the model.

        Places ascend: the embeddings, then of each layer its attention, its MLP and cuts.
        """
        places = [name.split(".")[0] for name in self.senders]
        new = (a != b for a, b in pairwise(places))
        later = np.cumsum([0, *new])
        return np.where(self.source[:-1], 0, later + 1)

    @cached_property
    def components(self) -> Graph:
        """The graph that is not split by spans; this one, if it is not."""
        return component_graph(self.shape.unsplit) if self.shape.spans else self

    @cached_property
    def sender_component(self) -> NDArray[np.int64]:
        """``[sender]``: the sender's index in ``components``."""
        return np.arange(self.n_senders) // self.shape.n_spans

    @cached_property
    def sender_span(self) -> NDArray[np.int64]:
        """``[sender]``: index into ``shape.spans``; 0 in a graph that is not split."""
        return np.arange(self.n_senders) % self.shape.n_spans

    @cached_property
    def receiver_component(self) -> NDArray[np.int64]:
        """``[receiver]``: the receiver's index in ``components``."""
        return np.arange(len(self.receivers)) // self.shape.n_spans

    @cached_property
    def receiver_span(self) -> NDArray[np.int64]:
        """``[receiver]``: index into ``shape.spans``; 0 in a graph that is not split."""
        return _spans_of(len(self.receivers), self.shape)

    @cached_property
    def edge_span(self) -> NDArray[np.int64]:
        """``[edge]``: index into ``shape.spans`` of both its ends."""
        return self.receiver_span[self.edge_receiver]

    @cached_property
    def edge_component(self) -> NDArray[np.int64]:
        """``[edge]``: the edge's index in ``components``."""
        if not self.shape.spans:
            return np.arange(self.n_edges)
        whole = self.components
        sender = self.sender_component[self.edge_sender]
        receiver = self.receiver_component[self.edge_receiver]
        first = whole.receiver_start[receiver]
        return first + sender - whole.edge_sender[first]  # a receiver reads senders in a row

    def subgraph(self, mask: NDArray[np.bool_]) -> Graph:
        """Return the graph of the same nodes with the edges in ``mask [edge]`` alone."""
        sender, receiver = self.edge_sender[mask], self.edge_receiver[mask]
        return replace(self, edge_sender=sender, edge_receiver=receiver)

    def fed_by(self, receiver: int) -> NDArray[np.int32]:
        """Return the indices of the nodes that a receiver feeds."""
        return self.feeds[self.feeds_start[receiver] : self.feeds_start[receiver + 1]]

    def edge_name(self, edge: int) -> str:
        """Return the name ``u->v`` of an edge index."""
        sender, receiver = self.edge_sender[edge], self.edge_receiver[edge]
        return f"{self.senders[sender]}->{self.receivers[receiver]}"

    def edge_names(self, edges: Iterable[int] | None = None) -> list[str]:
        """Return the names of the given edge indices, or of all edges in order."""
        chosen = slice(None) if edges is None else np.fromiter(edges, dtype=np.int64)
        ends = zip(
            self.edge_sender[chosen].tolist(), self.edge_receiver[chosen].tolist(), strict=True
        )
        return [f"{self.senders[u]}->{self.receivers[v]}" for u, v in ends]

    def edge_index(self, name: str) -> int:
        """Return the index of the edge ``u->v``.

        Raises
        ------
        GraphError
            If the graph has no such edge; the message names the nearest nodes.
        """
        u, v = split_edge_name(name)
        if u not in self.sender_index:
            raise GraphError(f"edge {name!r}: no sender {u!r}; {did_you_mean(u, self.senders)}")
        if v not in self.receiver_index:
            raise GraphError(f"edge {name!r}: no receiver {v!r}; {did_you_mean(v, self.receivers)}")
        sender, receiver = self.sender_index[u], self.receiver_index[v]
        low, high = self.receiver_start[receiver], self.receiver_start[receiver + 1]
        at = low + np.searchsorted(self.edge_sender[low:high], sender)
        if at == high or self.edge_sender[at] != sender:
            if self.sender_span[sender] != self.receiver_span[receiver]:
                raise GraphError(
                    f"edge {name!r} does not exist: an edge stays in one span, only heads move "
                    "information between spans"
                )
            raise GraphError(
                f"edge {name!r} does not exist: {v!r} reads the stream before {u!r} writes to it"
            )
        return int(at)

    def edge_mask(self, names: Iterable[str]) -> NDArray[np.bool_]:
        """Return the ``[edge]`` mask of the named edges; unknown names raise GraphError."""
        mask = np.zeros(self.n_edges, dtype=bool)
        for name in names:
            mask[self.edge_index(name)] = True
        return mask

    def receiver_node(self, receiver: int) -> str:
        """Return the name a receiver is drawn under.

        ``a3.h7`` for ``a3.h7<q>``, ``a3.h7@IO`` for ``a3.h7<q>@IO``, ``logits`` for
        ``logits@END``.
        """
        name = self.receivers[receiver]
        return "logits" if split_span(name)[0] == "logits" else _INPUT.sub("", name)


def split_edge_name(name: str) -> tuple[str, str]:
    """Split ``u->v`` into its two names; GraphError if it is no edge name."""
    u, arrow, v = name.partition("->")
    if not (u and arrow and v) or "->" in v:
        raise GraphError(f"{name!r} is no edge name: expected sender->receiver, as input->m0")
    return u, v


@dataclass(frozen=True, eq=False)
class Outline:
    """A graph whose edges are not written out: every receiver reads senders that stand in a row.

    Edges have *places*: those that they have in a graph with all of them.

    Parameters
    ----------
    shape, senders, receivers, feeds_start, feeds
        As of :class:`Graph`; the shape has no spans.
    low, high
        ``[receiver]``: it reads the senders ``low .. high - 1``.
    """

    shape: GraphShape
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    low: NDArray[np.int64]
    high: NDArray[np.int64]
    feeds_start: NDArray[np.int32]
    feeds: NDArray[np.int32]

    @cached_property
    def start(self) -> NDArray[np.int64]:
        """``[receiver + 1]``: edges of receiver ``v`` have the places ``start[v]:start[v + 1]``."""
        return np.concatenate([[0], np.cumsum(self.high - self.low)])

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return int(self.start[-1])

    @property
    def is_large(self) -> bool:
        """Whether there are too many edges to write them all out."""
        return self.n_edges > MOST_EDGES

    def places(self, names: Iterable[str]) -> NDArray[np.int64]:
        """Return the places of edges ``u->v``, ascending; GraphError if one does not exist."""
        sender = {name: i for i, name in enumerate(self.senders)}
        receiver = {name: i for i, name in enumerate(self.receivers)}
        found = set()
        for name in names:
            u, v = split_edge_name(name)
            if u not in sender:
                raise GraphError(f"edge {name!r}: no sender {u!r}; {did_you_mean(u, self.senders)}")
            if v not in receiver:
                raise GraphError(
                    f"edge {name!r}: no receiver {v!r}; {did_you_mean(v, self.receivers)}"
                )
            low, high = self.low[receiver[v]], self.high[receiver[v]]
            if not low <= sender[u] < high:
                raise GraphError(
                    f"edge {name!r} does not exist: {v!r} reads the stream before {u!r} writes "
                    "to it"
                )
            found.add(int(self.start[receiver[v]] + sender[u] - low))
        return np.array(sorted(found), dtype=np.int64)

    def places_of(self, graph: Graph) -> NDArray[np.int64]:
        """Return the places of the edges of a graph with the same nodes."""
        receiver = graph.edge_receiver
        return self.start[receiver] + graph.edge_sender - self.low[receiver]

    def graph(self, places: NDArray[np.int64] | None = None) -> Graph:
        """Write edges out.

        Parameters
        ----------
        places
            ``[edge]``, ascending: of some; None: all.

        Raises
        ------
        GraphError
            If there are more than :data:`MOST_EDGES`.
        """
        n_edges = self.n_edges if places is None else len(places)
        if n_edges > MOST_EDGES:
            raise GraphError(
                f"a graph of {n_edges:,} edges: expected at most {MOST_EDGES:,}; keep fewer latents"
            )
        if places is None:
            n_read = self.high - self.low
            shift = (self.start[:-1] - self.low).astype(np.int32)
            sender = np.arange(n_edges, dtype=np.int32)
            sender -= np.repeat(shift, n_read)
            receiver = np.repeat(np.arange(len(n_read), dtype=np.int32), n_read)
        else:
            at = np.searchsorted(self.start, places, side="right") - 1
            sender = (places - self.start[at] + self.low[at]).astype(np.int32)
            receiver = at.astype(np.int32)
        return Graph(
            shape=self.shape,
            senders=self.senders,
            receivers=self.receivers,
            edge_sender=sender,
            edge_receiver=receiver,
            feeds_start=self.feeds_start,
            feeds=self.feeds,
        )


def component_graph(shape: GraphShape) -> Graph:
    """Build the graph of attention heads and MLPs, and of latents where the shape has sites.

    Parameters
    ----------
    shape
        Layers, heads, granularity, sites and spans.

    Returns
    -------
    Graph
        GPT-2 small (12 layers, 12 heads) has 32,491 edges.  Split by P spans, S of them scored,
        a graph of E edges, L of them into ``logits``, has ``P (E - L) + S L`` edges.

    Raises
    ------
    GraphError
        If the graph is larger than what can be handled.
    """
    if shape.spans:
        return _by_span(component_graph(shape.unsplit), shape)
    return outline(shape).graph()


def outline(shape: GraphShape) -> Outline:
    """Return what :func:`component_graph` writes out, of a shape without spans."""
    builder = _Builder()
    embeddings = ("tok", "pos") if shape.split_embed else ("input",)
    builder.write(embeddings)
    for layer in range(shape.n_layers):
        _cut(builder, shape.site_at.get(f"r{layer}"))
        heads = tuple(f"a{layer}.h{h}" for h in range(shape.n_heads))
        split = shape.site_at.get(f"a{layer}")
        written = split.nodes if split else heads
        base = len(builder.senders)
        for name, fed in _attention_receivers(shape, layer):
            builder.read(name, range(len(written)) if split else fed, base)
        if shape.has_mlp and shape.parallel:
            _read_mlp(builder, shape, layer, base + len(written))
        builder.write(written)
        _cut(builder, shape.site_at.get(f"r{layer}mid"))
        if shape.has_mlp:
            if not shape.parallel:
                _read_mlp(builder, shape, layer, len(builder.senders))
            split = shape.site_at.get(f"m{layer}")
            builder.write(split.nodes if split else (f"m{layer}",))
    _cut(builder, shape.site_at.get(f"r{shape.n_layers}"))
    builder.read("logits", [0], len(builder.senders))
    _feed_later_errors(builder, shape)
    return builder.build(shape)


def _by_span(whole: Graph, shape: GraphShape) -> Graph:
    """Split a graph: senders, receivers and edges once per span, spans inside components."""
    n_spans, n_read = shape.n_spans, np.diff(whole.receiver_start)
    n_edges = int(n_spans * n_read[:-1].sum() + len(shape.scored_spans) * n_read[-1])
    crossing, n_fed = _read_elsewhere(whole), np.diff(whole.feeds_start)
    n_feeds = int((n_fed * np.where(crossing, shape.reach.sum(), n_spans)).sum())
    if max(n_edges, n_feeds) > MOST_EDGES:
        raise GraphError(
            f"a graph of {n_edges:,} edges, its keys and values read in {n_feeds:,} places: "
            f"expected at most {MOST_EDGES:,} of each; use fewer spans"
        )
    receivers = [span_name(name, s) for name in whole.receivers[:-1] for s in shape.spans]
    receivers += [span_name("logits", s) for s in shape.scored_spans]
    component, span = np.arange(len(receivers)) // n_spans, _spans_of(len(receivers), shape)
    # Each receiver reads, in its span, what the component's receiver reads.
    n_read = n_read[component]
    edge_receiver = np.repeat(np.arange(len(receivers)), n_read)
    shift = np.cumsum(n_read) - n_read - whole.receiver_start[component]
    edge_sender = whole.edge_sender[np.arange(n_edges) - shift[edge_receiver]] * n_spans
    fed = [
        _fed_spans(whole, shape, int(v), int(s), bool(crossing[v]))
        for v, s in zip(component, span, strict=True)
    ]
    return Graph(
        shape=shape,
        senders=tuple(span_name(name, s) for name in whole.senders for s in shape.spans),
        receivers=tuple(receivers),
        edge_sender=(edge_sender + span[edge_receiver]).astype(np.int32),
        edge_receiver=edge_receiver.astype(np.int32),
        feeds_start=np.cumsum([0, *map(len, fed)]).astype(np.int32),
        feeds=np.concatenate(fed).astype(np.int32),
    )


def _spans_of(n_receivers: int, shape: GraphShape) -> NDArray[np.int64]:
    """``[receiver]``: span of each; the last receivers are those of ``logits``."""
    spans = np.arange(n_receivers) % shape.n_spans
    if shape.spans:
        scored = [shape.spans.index(name) for name in shape.scored_spans]
        spans[n_receivers - len(scored) :] = scored
    return spans


def _read_elsewhere(graph: Graph) -> NDArray[np.bool_]:
    """``[receiver]``: whether it is (also) a key or value, read at other positions than its own."""
    return np.array([bool({"k", "v"} & set(port)) for port in graph.port])


def _fed_spans(
    whole: Graph, shape: GraphShape, receiver: int, span: int, crossing: bool
) -> NDArray[np.int64]:
    """Nodes of the split graph that a component's receiver feeds from one span."""
    nodes = whole.fed_by(receiver).astype(np.int64) * shape.n_spans
    if receiver == len(whole.receivers) - 1:  # the one node logits
        return nodes
    spans = np.flatnonzero(shape.reach[span]) if crossing else np.array([span])
    return (nodes[:, None] + spans).ravel()


def _cut(builder: _Builder, site: Site | None) -> None:
    """Let one receiver read the stream, and everything later read its parts alone."""
    if site is None:
        return
    builder.read(site.name, range(len(site.nodes)), len(builder.senders))
    builder.first_seen = len(builder.senders)
    builder.write(site.nodes)


def _read_mlp(builder: _Builder, shape: GraphShape, layer: int, base: int) -> None:
    """Receivers of an MLP whose first sender will have the index ``base``."""
    site = shape.site_at.get(f"m{layer}")
    if site is not None and site.kind in ALONE:
        for i, name in enumerate(site.nodes):
            builder.read(name, [i], base)
        if site.kind == "routed":
            builder.read(f"m{layer}.router", range(len(site.nodes)), base)
    else:
        builder.read(f"m{layer}", range(len(site.nodes)) if site else [0], base)


def _feed_later_errors(builder: _Builder, shape: GraphShape) -> None:
    """Let the error nodes of a cross-layer transcoder feed those of later layers.

    Such a node is what the MLP writes less what latents of this and of all earlier layers write
    there: the latter are computed from what the earlier error nodes read.
    """
    crossing = [site for site in shape.sites if site.kind == "cross_layer"]
    errors = [site.nodes[-1] for site in sorted(crossing, key=lambda site: site.layer)]
    sender = {name: i for i, name in enumerate(builder.senders)} if errors else {}
    for i, name in enumerate(errors):
        later = [sender[other] for other in errors[i + 1 :]]
        receiver = builder.receivers.index(name)
        fed = np.append(builder.fed[receiver], later)
        builder.fed[receiver] = fed.astype(np.int32)


def _attention_receivers(shape: GraphShape, layer: int) -> list[tuple[str, list[int]]]:
    """Receivers of one attention layer, each with the heads that it feeds."""
    group = shape.n_heads // shape.kv_heads
    heads = [(f"a{layer}.h{h}", [h]) for h in range(shape.n_heads)]
    shared = (
        [
            (f"a{layer}.kv{g}", list(range(g * group, (g + 1) * group)))
            for g in range(shape.kv_heads)
        ]
        if shape.grouped
        else heads
    )
    if not shape.split_qkv:
        namesakes = zip_longest(shared if shape.grouped else (), heads)
        return [receiver for pair in namesakes for receiver in pair if receiver is not None]
    return (
        [(f"{name}<q>", fed) for name, fed in heads]
        + [(f"{name}<k>", fed) for name, fed in shared]
        + [(f"{name}<v>", fed) for name, fed in shared]
    )


def _port(shape: GraphShape, receiver: str) -> str:
    match = _ATTENTION.fullmatch(receiver)
    if match is None:
        return ""
    whole = "q" if shape.grouped else "qkv"  # of a head whose inputs are not split
    return match[2] or ("kv" if match[1] == "kv" else whole)


def attention_rows(shape: GraphShape) -> dict[Kind, list[int]]:
    """Which of the receivers of an attention layer are q, k and v, in the order of their heads.

    Examples
    --------
    >>> attention_rows(GraphShape(1, 2))
    {'q': [0, 1], 'k': [2, 3], 'v': [4, 5]}
    """
    ports = [_port(shape, name) for name, _ in _attention_receivers(shape, 0)]
    kinds: tuple[Kind, ...] = ("q", "k", "v")
    return {kind: [i for i, port in enumerate(ports) if kind in port] for kind in kinds}


class _Builder:
    """Collects receivers that read every sender written since the last cut."""

    def __init__(self) -> None:
        self.senders: list[str] = []
        self.receivers: list[str] = []
        self.seen: list[tuple[int, int]] = []
        self.fed: list[NDArray[np.int32]] = []
        self.first_seen = self.n_fed = 0

    def write(self, names: Sequence[str]) -> None:
        self.senders.extend(names)

    def read(self, name: str, fed: Sequence[int], base: int) -> None:
        """Add a receiver that feeds the nodes ``base + fed``."""
        self.n_fed += len(fed)
        if self.n_fed > MOST_EDGES:
            raise GraphError(
                f"a graph whose receivers feed more than {MOST_EDGES:,} nodes: keep fewer latents"
            )
        self.receivers.append(name)
        self.seen.append((self.first_seen, len(self.senders)))
        # A range would be read number by number.
        which = np.arange(len(fed)) + fed.start if isinstance(fed, range) else np.asarray(fed)
        self.fed.append((base + which).astype(np.int32))

    def build(self, shape: GraphShape) -> Outline:
        low, high = np.array(self.seen, dtype=np.int64).T
        return Outline(
            shape=shape,
            senders=tuple(self.senders),
            receivers=tuple(self.receivers),
            low=low,
            high=high,
            feeds_start=np.cumsum([0, *map(len, self.fed)]).astype(np.int32),
            feeds=np.concatenate(self.fed).astype(np.int32),
        )


def parse_node(name: str) -> tuple[str, int, int]:
    """Return ``(kind, layer, number)`` of a node name, whatever its span.

    Kind is head, mlp, input or logits; with dictionaries also latent, error or cut, with mixtures
    expert or router.  ``layer``
    and ``number`` (of the head or latent) are -1 where they have no meaning.
    """
    component, _ = split_span(name)
    if match := _HEAD.fullmatch(component):
        return "head", int(match[1]), int(match[2])
    if match := _MLP.fullmatch(component):
        return "mlp", int(match[1]), -1
    if component in ("input", "tok", "pos"):
        return "input", -1, -1
    if component == "logits":
        return "logits", -1, -1
    if (latent := parse_latent(component)) is not None:
        return latent[0], latent[2], latent[3]
    raise GraphError(
        f"{name!r} is no node name: expected a3.h7, m3, input, tok, pos, logits, or with "
        "dictionaries m3.f12, m3.err, r3, with neurons m3.n12, with experts m3.e2, m3.router"
    )


def shape_from_config(cfg: dict[str, Any]) -> GraphShape:
    """Read a shape from the ``cfg`` of a circuit file (EAP-IG's keys, and ours beside them)."""
    for key in ("n_layers", "n_heads"):
        _check_config(cfg, key, cfg.get(key), int)
    if cfg.get("n_key_value_heads") is not None:
        _check_config(cfg, "n_key_value_heads", cfg["n_key_value_heads"], int)
    for key in ("attn_only", "parallel_attn_mlp", "split_qkv", "split_embed"):
        _check_config(cfg, key, cfg.get(key, False), bool)
    spans, scored_spans, reaches = spans_from_config(cfg)
    return GraphShape(
        n_layers=cfg["n_layers"],
        n_heads=cfg["n_heads"],
        n_kv_heads=cfg.get("n_key_value_heads"),
        has_mlp=not cfg.get("attn_only", False),
        parallel=cfg.get("parallel_attn_mlp", False),
        split_qkv=cfg.get("split_qkv", True),
        split_embed=cfg.get("split_embed", False),
        sites=sites_from_config(cfg.get("sites", [])),
        spans=spans,
        scored_spans=scored_spans,
        reaches=reaches,
    )


def _check_config(cfg: dict[str, Any], key: str, value: Any, kind: type) -> None:
    if type(value) is not kind:
        wanted = "a whole number" if kind is int else "true or false"
        raise GraphError(f"circuit cfg has {key}={cfg.get(key)!r}: expected {wanted}")


def shape_to_config(shape: GraphShape) -> dict[str, Any]:
    """Return the ``cfg`` of a circuit file for a shape."""
    return {
        "n_layers": shape.n_layers,
        "n_heads": shape.n_heads,
        "n_key_value_heads": shape.kv_heads,
        "attn_only": not shape.has_mlp,
        "parallel_attn_mlp": shape.parallel,
        "split_qkv": shape.split_qkv,
        "split_embed": shape.split_embed,
        **({"sites": [site.to_config() for site in shape.sites]} if shape.sites else {}),
        **spans_to_config(shape.spans, shape.scored_spans, shape.reaches),
    }
