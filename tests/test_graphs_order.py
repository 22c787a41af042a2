"""The order of ACDC (DESIGN.md section 4, step 2), spelled out."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs import GraphShape, component_graph
from graphs.graph import attention_rows
from graphs.order import edge_order, receiver_order
from graphs.sites import Site


def receivers(shape: GraphShape) -> list[str]:
    graph = component_graph(shape)
    return [graph.receivers[r] for r in receiver_order(graph)]


def senders(shape: GraphShape, receiver: str) -> list[str]:
    graph = component_graph(shape)
    edges = edge_order(graph, graph.receiver_index[receiver])
    assert {graph.receivers[r] for r in graph.edge_receiver[edges]} == {receiver}
    return [graph.senders[s] for s in graph.edge_sender[edges]]


def test_receivers_of_a_two_by_two_model():
    assert receivers(GraphShape(2, 2)) == [
        "logits",
        "m1", "a1.h1<v>", "a1.h0<v>", "a1.h1<k>", "a1.h0<k>", "a1.h1<q>", "a1.h0<q>",
        "m0", "a0.h1<v>", "a0.h0<v>", "a0.h1<k>", "a0.h0<k>", "a0.h1<q>", "a0.h0<q>",
    ]  # fmt: skip


def test_receivers_with_shared_key_value_heads():
    assert receivers(GraphShape(2, 4, 2))[:10] == [
        "logits", "m1", "a1.kv1<v>", "a1.kv0<v>", "a1.kv1<k>", "a1.kv0<k>",
        "a1.h3<q>", "a1.h2<q>", "a1.h1<q>", "a1.h0<q>",
    ]  # fmt: skip


def test_receivers_without_split():
    assert receivers(GraphShape(1, 2, split_qkv=False)) == ["logits", "m0", "a0.h1", "a0.h0"]


def test_receivers_of_grouped_heads_without_split():
    shape = GraphShape(1, 4, 2, split_qkv=False)
    assert receivers(shape) == [
        "logits", "m0", "a0.h3", "a0.h2", "a0.h1", "a0.kv1", "a0.h0", "a0.kv0",
    ]  # fmt: skip
    graph = component_graph(shape)
    rows = {
        kind: [graph.receivers[v] for v in rows] for kind, rows in attention_rows(shape).items()
    }
    assert rows["q"] == ["a0.h0", "a0.h1", "a0.h2", "a0.h3"]
    assert rows["k"] == rows["v"] == ["a0.kv0", "a0.kv1"]


def test_latents_stand_where_their_component_stands():
    sites = (Site("mlp_out", 0, (3, 5)), Site("transcoder", 1, (4, 7)), Site("resid_pre", 1, (2,)))
    shape = GraphShape(2, 2, sites=sites, split_embed=True, split_qkv=False)
    assert receivers(shape) == [
        "logits", "m1.err", "m1.f7", "m1.f4", "a1.h1", "a1.h0", "r1", "m0", "a0.h1", "a0.h0",
    ]  # fmt: skip
    assert senders(shape, "r1") == ["m0.f3", "m0.f5", "m0.err", "a0.h0", "a0.h1", "tok", "pos"]
    assert senders(shape, "logits") == [
        "m1.f4", "m1.f7", "m1.err", "a1.h0", "a1.h1", "r1.f2", "r1.err",
    ]  # fmt: skip


def test_senders_of_a_two_by_two_model():
    shape = GraphShape(2, 2)
    assert senders(shape, "logits") == ["m1", "a1.h0", "a1.h1", "m0", "a0.h0", "a0.h1", "input"]
    assert senders(shape, "m1") == ["a1.h0", "a1.h1", "m0", "a0.h0", "a0.h1", "input"]
    assert senders(shape, "a1.h0<k>") == ["m0", "a0.h0", "a0.h1", "input"]
    assert senders(shape, "a0.h1<q>") == ["input"]


def test_senders_with_two_embeddings_and_parallel_blocks():
    shape = GraphShape(2, 2, parallel=True, split_embed=True)
    assert senders(shape, "m1") == ["m0", "a0.h0", "a0.h1", "tok", "pos"]


@given(
    st.integers(0, 4), st.integers(1, 3), st.integers(1, 3),
    st.booleans(), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_order_is_reverse_topological(layers, kv_heads, group, mlp, parallel, split, embed):
    graph = component_graph(
        GraphShape(layers, kv_heads * group, kv_heads, mlp, parallel, split, embed)
    )
    order = receiver_order(graph)
    assert sorted(order) == list(range(len(graph.receivers)))
    position = {receiver: i for i, receiver in enumerate(order)}
    reads: dict[int, list[int]] = {}
    for sender, receiver in zip(graph.edge_sender, graph.edge_receiver, strict=True):
        reads.setdefault(int(sender), []).append(int(receiver))
    for receiver in order:
        for node in graph.fed_by(receiver):
            assert all(position[later] < position[receiver] for later in reads.get(int(node), []))
        edges = edge_order(graph, receiver)
        start, stop = graph.receiver_start[receiver], graph.receiver_start[receiver + 1]
        assert sorted(edges) == list(np.arange(start, stop))
