"""References with positions: what is true at which span, and runs compared with it."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from acdc.terminal.circuits import comparison_table, reference_table
from benchmarks.references import REFERENCES
from graphs import (
    Circuit,
    GraphError,
    GraphShape,
    Reference,
    ReferenceFileError,
    coarsen,
    compare,
    compare_bases,
    compare_reference,
    component_graph,
    prune,
    read_reference,
    to_dot_comparison,
    to_dot_reference,
    write_reference,
)
from graphs.coarse import with_spans
from graphs.spans import split_span

IOI = GraphShape(
    12, 12, spans=("rest", "S1", "S1+1", "IO", "S2", "END"), scored_spans=("END",)
)  # the spans of the task
DOCSTRING = GraphShape(
    4,
    8,
    has_mlp=False,
    spans=("rest", "A_def", "B_def", "B_comma", "C_def", "D_def", "A_doc", "B_doc", "param_3"),
    scored_spans=("param_3",),
)

# AutoCircuit's docstring edges and their tokens (Miller et al. 2024), spelled out.
AUTO_CIRCUIT = {
    "a0.h5->a1.h4<v>": "B_def B_doc",
    "input->a0.h5<v>": "B_def C_def B_doc",
    "input->a2.h0<q>": "C_def",
    "a0.h5->a2.h0<q>": "C_def",
    "a0.h5->a2.h0<k>": "B_def",
    "a1.h4->a2.h0<v>": "B_comma",
    "input->a1.h4<v>": "B_def B_doc",
    "input->a1.h2<k>": "A_def B_def A_doc B_doc",
    "input->a1.h2<q>": "A_doc B_doc",
    "a0.h5->a1.h2<q>": "B_doc",
    "a0.h5->a1.h2<k>": "B_def B_doc",
    **{
        edge.replace("*", head): spans
        for head in ("a3.h0", "a3.h6")
        for edge, spans in {
            "*->logits": "param_3",
            "a1.h4->*<q>": "param_3",
            "input->*<v>": "C_def",
            "a0.h5->*<v>": "C_def",
            "a2.h0->*<k>": "C_def",
            "a1.h2->*<k>": "A_doc B_doc",
        }.items()
    },
}


def in_span(edge: str, span: str) -> str:
    return "->".join(f"{end}@{span}" for end in edge.split("->"))


def test_docstring_is_that_of_autocircuit_but_for_one_edge():
    reference = read_reference(REFERENCES["docstring"])
    expected = {in_span(e, s) for e, spans in AUTO_CIRCUIT.items() for s in spans.split()}
    found = set(reference.split(DOCSTRING).edges())
    # There the key of 2.0 reads no embedding, since the comma that they expect does not vary.
    assert found - expected == {"input@B_def->a2.h0<k>@B_def"}
    assert expected <= found


def test_ioi_edges_are_at_the_spans_of_their_roles():
    reference = read_reference(REFERENCES["ioi"])
    circuit = reference.split(IOI)
    edges = set(circuit.edges())
    assert set(coarsen(circuit, IOI.unsplit).edges()) <= set(reference.edges)
    assert len(edges) == 1_056
    by_role = {head: role for role, heads in reference.roles.items() for head in heads}
    at = {
        "name mover": "END", "backup name mover": "END", "negative name mover": "END",
        "s-inhibition": "END", "induction": "S2", "duplicate token": "S2",
        "previous token": "S1+1",
    }  # fmt: skip
    reads = {
        "name mover": "IO", "backup name mover": "IO", "negative name mover": "IO",
        "s-inhibition": "S2", "induction": "S1+1", "duplicate token": "S1", "previous token": "S1",
    }  # fmt: skip
    for edge in edges:
        (u, span), (v, _) = (split_span(end) for end in edge.split("->"))
        if u in by_role:
            assert span == at[by_role[u]]
        head, _, kind = v.partition("<")
        if head in by_role:
            assert span == (at if kind == "q>" else reads)[by_role[head]]
    every_head = {split_span(name)[0] for name in circuit.nodes()}
    assert set(by_role) <= every_head
    assert "a9.h9@END->logits@END" in edges
    assert "a8.h6@END->a9.h9<q>@END" in edges
    assert "input@IO->a9.h9<k>@IO" in edges
    assert not any("@rest" in edge for edge in edges)


SMALL = GraphShape(2, 2, has_mlp=False)
SPLIT = replace(SMALL, spans=("rest", "IO", "END"), scored_spans=("END",))


@pytest.fixture
def reference() -> Reference:
    return Reference(
        name="small",
        description="-",
        model="m",
        task="t",
        citation="-",
        open="-",
        graph=component_graph(SMALL),
        edges=("input->a0.h0<v>", "a0.h0->a1.h1<k>", "a1.h1->logits", "input->a1.h1<q>"),
        roles={"early": ("a0.h0",), "mover": ("a1.h1",)},
        positions={"a0.h0": ("IO",), "a1.h1<k>": ("IO",), "a1.h1<q>": ("END",)},
    )


TRUE = [
    "input@rest->a0.h0<v>@rest",
    "input@IO->a0.h0<v>@IO",
    "input@END->a1.h1<q>@END",
    "a0.h0@IO->a1.h1<k>@IO",
    "a1.h1@END->logits@END",
]


def test_split_keeps_edges_at_their_spans_and_on_paths(reference):
    circuit = reference.split(SPLIT)
    assert circuit.graph.shape == SPLIT
    assert circuit.edges() == TRUE  # the value of h0 at END would be read by nothing
    assert (prune(circuit.graph, circuit.in_circuit) == circuit.in_circuit).all()


def test_a_split_circuit_is_scored_per_span(reference):
    graph = component_graph(SPLIT)
    wrong = "input@IO->a1.h1<q>@IO"
    circuit = Circuit.from_edges(graph, [*TRUE[1:], wrong])
    found = compare_reference(circuit, reference)
    assert found.positions == "spans"
    assert found.edges is not None
    assert found.edges.only_b == (TRUE[0],)
    assert found.edges.only_a == (wrong,)
    assert len(found.edges.common) == 4
    assert found.nodes.common == ("a0.h0@IO", "a1.h1@END")
    assert not (found.nodes.only_a)
    assert not (found.nodes.only_b)
    assert {role: str(count) for role, count in found.roles.items()} == {
        "early": "1 of 1",
        "mover": "1 of 1",
    }


def test_a_head_at_another_span_than_its_role_is_not_found(reference):
    elsewhere = ["input@END->a0.h0<v>@END", "a0.h0@END->a1.h1<k>@END", "a1.h1@END->logits@END"]
    found = compare_reference(Circuit.from_edges(component_graph(SPLIT), elsewhere), reference)
    assert found.roles["early"].missed == ("a0.h0",)
    assert found.roles["mover"].found == ("a1.h1",)
    assert found.nodes.only_a == ("a0.h0@END",)
    assert found.nodes.only_b == ("a0.h0@IO",)


@pytest.mark.parametrize("change", ["no positions", "other spans"])
def test_otherwise_spans_are_joined(reference, change):
    if change == "no positions":
        reference, shape = replace(reference, positions={}), SPLIT
        edges = TRUE
    else:
        shape = replace(SMALL, spans=("p0", "p1"), scored_spans=("p1",))
        edges = [in_span(edge, "p1") for edge in reference.edges]
    found = compare_reference(Circuit.from_edges(component_graph(shape), edges), reference)
    assert found.positions == "joined"
    assert found.edges is not None
    assert set(found.edges.common) == set(reference.edges)
    assert found.nodes.common == ("a0.h0", "a1.h1")
    assert str(found.roles["early"]) == "1 of 1"


def test_an_unsplit_circuit_is_compared_as_before(reference):
    circuit = Circuit.from_edges(reference.graph, reference.edges)
    found = compare_reference(circuit, reference)
    assert found.positions == ""
    assert found.edges is not None
    assert found.edges.f1 == 1


def test_node_pairs_and_joined_qkv_are_compared_per_span(reference):
    pairs = ("input->a0.h0", "a0.h0->a1.h1", "a1.h1->logits")
    loose = replace(reference, edges=pairs, granularity="node pairs")
    assert "a0.h0@IO->a1.h1@IO" in loose.split(SPLIT).edges()
    assert "a0.h0@END->a1.h1@END" not in loose.split(SPLIT).edges()
    joined = component_graph(replace(SPLIT, split_qkv=False))
    edges = ["input@IO->a0.h0@IO", "a0.h0@IO->a1.h1@IO", "a1.h1@END->logits@END"]
    for known in (loose, reference):
        found = compare_reference(Circuit.from_edges(joined, edges), known)
        assert found.positions == "spans"
        assert found.edges is not None
        assert set(found.edges.common) == set(edges)


def test_optional_nodes_do_not_count_at_any_span(reference):
    loose = replace(reference, optional_nodes=("a0.h1",))
    extra = ["input@IO->a0.h1<v>@IO", "a0.h1@IO->a1.h1<v>@IO"]
    found = compare_reference(Circuit.from_edges(component_graph(SPLIT), [*TRUE, *extra]), loose)
    assert found.edges is not None
    assert found.edges.only_a == ()
    assert found.nodes.only_a == ()


def test_a_reference_of_another_model_is_refused_for_split_circuits_too(reference):
    other = component_graph(replace(SPLIT, n_heads=4, n_kv_heads=4))
    circuit = Circuit.from_edges(other, ["input@END->logits@END"])
    with pytest.raises(GraphError, match="n_heads is 4 in the circuit and 2 in the reference"):
        compare_reference(circuit, reference)


# Two circuits


def test_circuits_of_the_same_spans_are_compared_per_span_others_joined():
    graph = component_graph(SPLIT)
    a, b = Circuit.from_edges(graph, TRUE), Circuit.from_edges(graph, TRUE[1:])
    found = compare(a, b)
    assert not found.joined
    assert found.edges.only_a == (TRUE[0],)
    later = component_graph(replace(SPLIT, reaches=((0, 2), (1, 2), (1, 0))))
    assert compare(a, Circuit.from_edges(later, TRUE)).edges.f1 == 1
    assert "in both: 4" in to_dot_comparison(a, b)
    edges = ("input->a1.h1<q>", "a1.h1->logits")
    whole = Circuit.from_edges(component_graph(SMALL), edges)
    found = compare(a, whole)
    assert found.joined
    assert found.edges.common == edges
    assert compare_bases(a, whole).edges.common == edges


def test_tables_say_whether_spans_were_joined(reference):
    def text(table) -> str:
        stream = io.StringIO()
        Console(file=stream, width=140).print(table)
        return stream.getvalue()

    circuit = Circuit.from_edges(component_graph(SPLIT), TRUE)
    by_span = text(reference_table(compare_reference(circuit, reference), reference, "c"))
    assert "(m), by span" in by_span
    bare = replace(reference, positions={})
    assert "(m), spans joined" in text(reference_table(compare_reference(circuit, bare), bare, "c"))
    whole = Circuit.from_edges(component_graph(SMALL), ["input->a0.h0<v>"])
    assert "against b, spans joined" in text(comparison_table(compare(circuit, whole), ("a", "b")))
    assert "spans" not in text(comparison_table(compare(circuit, circuit), ("a", "b")))
    assert "missed: 0" in to_dot_reference(circuit, reference)


# Files


def test_files_give_back_positions(reference, tmp_path):
    write_reference(reference, tmp_path / "r.json")
    again = read_reference(tmp_path / "r.json")
    assert again.positions == reference.positions
    assert again.split(SPLIT).edges() == TRUE


MISTAKES = [
    ({"a9.h9": ["IO"]}, "positions: no sender or receiver 'a9.h9' in the graph; did you mean"),
    ({"a0.h0": []}, "positions: 'a0.h0' has no span: give one, or leave it out"),
    ({"a0.h0": ["I O"]}, "span 'I O': expected a name"),
    ({"a0.h0": ["IO", "IO"]}, "positions of 'a0.h0': 'IO' is listed twice"),
    ({"a0.h0": "IO"}, "positions of 'a0.h0' is \"IO\", expected a list of names"),
    (["a0.h0"], 'positions is ["a0.h0"], expected an object'),
]


@pytest.mark.parametrize(("positions", "words"), MISTAKES)
def test_mistakes_in_positions_are_named(reference, tmp_path, positions, words):
    write_reference(reference, tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps({**data, "positions": positions}))
    with pytest.raises(ReferenceFileError) as caught:
        read_reference(tmp_path / "r.json")
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "r.json"))


def test_a_graph_without_the_spans_is_refused(reference):
    with pytest.raises(GraphError, match="has positions at END, IO, but the graph is split by no"):
        reference.split(SMALL)
    with pytest.raises(GraphError, match=r"positions at IO, but the graph is split by END$"):
        reference.split(replace(SMALL, spans=("END",), scored_spans=("END",)))


def test_with_spans_splits_as_the_other_does():
    assert with_spans(SMALL, SPLIT) == SPLIT
    assert with_spans(SPLIT, SMALL) == SMALL
    assert np.array_equal(with_spans(SMALL, SPLIT).reach, SPLIT.reach)


def test_planted_ioi_is_at_the_spans_where_its_variables_are():
    from benchmarks.planted.train import FOLDER, RECIPES

    reference = read_reference(FOLDER / "planted-ioi" / "reference.json")
    assert reference.positions == RECIPES["planted-ioi"].positions
    shape = with_spans(reference.graph.shape, IOI)
    found = [  # by ACDC on the model, KL, tau 0.005 and 0.02
        "input@S1->a1.h1<k>@S1",
        "input@S2->a1.h1<q>@S2",
        "a1.h1@S2->a2.h1<k>@S2",
        "a1.h1@S2->a2.h1<v>@S2",
        "a2.h1@END->a4.h1<q>@END",
        "input@IO->a4.h1<v>@IO",
        "a4.h1@END->logits@END",
    ]
    compared = compare_reference(Circuit.from_edges(component_graph(shape), found), reference)
    assert compared.positions == "spans"
    assert compared.edges is not None
    assert compared.edges.f1 == compared.nodes.f1 == 1
