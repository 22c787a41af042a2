"""Reference circuits: the files, what they must hold, and comparing a circuit with one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import N_ROWS, Answer, snapshot
from parity_pairs import jsonl, parity_rows

from acdc.cli import main
from acdc.errors import OptionError, UnknownNameError
from acdc.evidence.references import REFERENCES, ablation_warning, check_roles, load_reference
from benchmarks.references import reference_files
from benchmarks.references.build import IOI_ROLES, build, write
from graphs import (
    Ablation,
    Circuit,
    GraphError,
    GraphShape,
    Reference,
    ReferenceFileError,
    coarse_edges,
    coarsen,
    compare_reference,
    component_graph,
    joined_shape,
    read_dot,
    read_reference,
    render,
    save_circuit,
    to_dot_reference,
    write_reference,
)
from graphs.graph import shape_to_config

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "benchmarks" / "references"
LISTS = Path(__file__).parent / "data" / "reference-circuits"
SMALL = GraphShape(n_layers=2, n_heads=2)
EDGES = (
    "input->a0.h1<v>",
    "a0.h1->a1.h0<k>",
    "input->a1.h0<q>",
    "a0.h1->m1",
    "m1->logits",
    "a1.h0->logits",
)
ROLES = {"writer": ("a0.h1",), "mover": ("a1.h0",), "late MLP": ("m1",)}


def small(edges: tuple[str, ...] = EDGES, shape: GraphShape = SMALL, **given: Any) -> Reference:
    texts = dict.fromkeys(("name", "description", "model", "task", "citation", "open"), "x")
    return Reference(**{**texts, "graph": component_graph(shape), "edges": edges, **given})


def content(**changes: Any) -> dict[str, Any]:
    """The object of a small, sound reference file, with some keys changed."""
    texts = dict.fromkeys(("name", "description", "model", "task", "citation", "open"), "x")
    return {
        **texts,
        "ablation": {"intervention": "resample", "direction": None},
        "granularity": "edges",
        "graph": shape_to_config(SMALL),
        "roles": {role: list(nodes) for role, nodes in ROLES.items()},
        "edges": list(EDGES),
        **changes,
    }


# --- the published ones -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n_edges", "n_graph", "n_nodes"),
    [("ioi", 963, 32_491, 38), ("greater-than", 235, 32_491, 21), ("docstring", 24, 1_281, 6)],
)
def test_rules_give_the_edges_of_the_acdc_repository(
    name: str, n_edges: int, n_graph: int, n_nodes: int
) -> None:
    derived = {reference.name: reference for reference in build()}[name]
    published = json.loads((LISTS / f"{name}.json").read_text())
    assert set(derived.edges) == set(published["edges"])
    assert len(derived.edges) == n_edges
    assert derived.graph.n_edges == n_graph
    assert len(derived.nodes) == n_nodes
    assert derived.model == published["model"]
    assert derived.mask().sum() == n_edges


def test_ioi_has_26_heads_in_seven_classes() -> None:
    published = json.loads((LISTS / "ioi.json").read_text())["heads"]
    assert {role: list(nodes) for role, nodes in IOI_ROLES.items()} == published
    heads = [node for nodes in IOI_ROLES.values() for node in nodes]
    assert len(heads) == len(set(heads)) == 26


def test_files_are_what_the_script_writes(tmp_path: Path) -> None:
    write(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in PUBLISHED.glob("*.json")}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (PUBLISHED / path.name).read_bytes(), (
            "run python -m benchmarks.references.build"
        )


def test_induction_names_nodes_alone_and_says_why() -> None:
    reference = read_reference(PUBLISHED / "induction.json")
    assert reference.granularity == "nodes"
    assert reference.nodes == ("a0.h0", "a1.h5", "a1.h6")
    assert "no set of them was published" in reference.open
    assert reference.graph.n_edges == 305 - 48  # ACDC's count has one self edge per q, k, v


def test_described_circuits_are_data_with_their_doubts() -> None:
    """Circuits that their authors describe in words, for models that are not here."""
    found = {r.name: r for r in build()}
    head = found["copy-suppression"]
    assert (head.nodes, head.optional_nodes, head.edges) == (("a10.h7",), ("a11.h10",), ())
    assert set(head.roles["copy suppression"]) < set(found["ioi"].roles["negative name mover"])
    assert dict(head.configuration) == dict(found["ioi"].configuration)
    brackets, addition = found["balanced-brackets"], found["modular-addition"]
    assert brackets.nodes == ("a0.h0", "m0", "m1", "a2.h0", "a2.h1")
    assert addition.nodes == ("a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0")
    for reference in (brackets, addition):
        assert reference.granularity == "node pairs"
        assert reference.open.startswith("Coarse")
        assert str(reference.ablation) == ""  # true of the description, not of an ablation


def test_every_reference_says_where_it_is_from() -> None:
    for name, path in REFERENCES.items():
        reference = read_reference(path)
        assert reference.citation, name
        assert reference.open, name


# --- files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"roles": ROLES, "ablation": Ablation("zero", "denoising"), "optional_nodes": ("m0",)},
        {"granularity": "nodes", "edges": (), "roles": ROLES, "info": {"seed": 3}},
        {"granularity": "node pairs", "edges": ("input->m0", "a0.h1->a1.h0", "m0->logits")},
        {"shape": GraphShape(2, 4, n_kv_heads=2, split_embed=True), "edges": ("tok->a1.kv1<k>",)},
    ],
)
def test_a_file_is_read_as_it_was_written(tmp_path: Path, given: dict[str, Any]) -> None:
    reference = small(**given)
    write_reference(reference, tmp_path / "new.json")
    again = read_reference(tmp_path / "new.json")
    for name in ("edges", "roles", "ablation", "granularity", "optional_nodes", "info", "nodes"):
        assert getattr(again, name) == getattr(reference, name), name
    assert again.graph.shape == reference.graph.shape


CFG = shape_to_config(SMALL)
BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown edge": ({"edges": [*EDGES, "a9.h9->m1"]}, r"edge 'a9.h9->m1': no sender 'a9.h9'"),
    "backward edge": ({"edges": [*EDGES, "m1->m0"]}, r"edge 'm1->m0' does not exist"),
    "no edge name": ({"edges": ["m1"]}, r"'m1' is no edge name"),
    "edge twice": ({"edges": [*EDGES, EDGES[0]]}, r"edges: 'input->a0.h1<v>' is listed twice"),
    "edge of another type": ({"edges": [3]}, r"an entry of edges is 3, expected a name"),
    "edges of another type": ({"edges": "m0"}, r'edges is "m0", expected a list of names'),
    "no edges": ({"edges": []}, r"no edges: give at least one"),
    "pair for edge": ({"edges": ["a0.h1->a1.h0"]}, r"no receiver 'a1.h0'; did you mean a1.h0<"),
    "edge for pair": (
        {"granularity": "node pairs"}, r"edge 'input->a0.h1<v>': no receiver 'a0.h1<v>'"
    ),
    "role's node": ({"roles": {"mover": ["a5.h0"]}}, r"role 'mover': no node 'a5.h0' in the graph"),
    "role without edge": ({"roles": {"mover": ["a0.h0"]}}, r"role 'mover': node 'a0.h0' is at nei"),
    "role's node twice": ({"roles": {"mover": ["m1", "m1"]}}, r"role 'mover': 'm1' is listed twi"),
    "role of another type": ({"roles": {"mover": "m1"}}, r"role 'mover' is \"m1\", expected"),
    "roles of another type": ({"roles": []}, r"roles is \[\], expected an object"),
    "optional node": ({"optional_nodes": ["m7"]}, r"optional_nodes: no node 'm7'"),
    "granularity": ({"granularity": "heads"}, r"granularity 'heads': expected edges, node pairs,"),
    "granularity's type": ({"granularity": 3}, r"granularity is 3, expected a text"),
    "intervention": (
        {"ablation": {"intervention": 3}}, r"ablation has intervention 3: expected a name"
    ),
    "direction": ({"ablation": {"direction": "up"}}, r"ablation has direction 'up': expected nois"),
    "ablation's key": ({"ablation": {"metric": "kl"}}, r"'ablation' has the key 'metric'"),
    "ablation's type": ({"ablation": "zero"}, r'ablation is "zero", expected an object'),
    "name's type": ({"name": 3}, r"name is 3, expected a text"),
    "empty text": ({"citation": " "}, r'citation is " ", expected a text'),
    "graph": ({"graph": {**CFG, "n_layers": "2"}}, r"n_layers='2': expected a whole number"),
    "graph's type": ({"graph": None}, r"graph is null, expected an object"),
    "unknown key": ({"optional": []}, r"unknown key 'optional'; did you mean optional_nodes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_with_file_and_item(tmp_path: Path, case: str) -> None:
    changes, message = BAD_FILES[case]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content(**changes)))
    with pytest.raises(ReferenceFileError, match=r"bad\.json.*" + message) as caught:
        read_reference(path)
    assert isinstance(caught.value, GraphError)
    assert "\n" not in str(caught.value)


def test_an_ablation_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content(ablation={"intervention": "noise"})))
    message = (
        r"bad\.json: ablation has intervention 'noise': expected resample, zero, mean, .* null"
    )
    with pytest.raises(ReferenceFileError, match=message):
        load_reference(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(content())[:-40], r"bad\.json: no JSON that can be read .* truncated\?"),
        ("", r"no JSON that can be read"),
        ("[" * 100_000, r"no JSON that can be read"),
        ("[1]", r"expected the object of a reference file, got \[1\]"),
        ('{"edges": {}}', r"is no reference file: it lacks 'name', 'description', "),
    ],
)
def test_what_is_no_reference_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ReferenceFileError, match=message):
        read_reference(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ReferenceFileError, match=r"cannot read .*none\.json: No such file"):
        read_reference(tmp_path / "none.json")


# --- views --------------------------------------------------------------------------------


def test_node_pairs_and_mask() -> None:
    split = small(("input->a0.h1<k>", "input->a0.h1<v>", "a0.h1->logits", "m0->m1"))
    assert split.node_pairs == ("input->a0.h1", "a0.h1->logits", "m0->m1")
    assert split.nodes == ("a0.h1", "m0", "m1")
    pairs = small(split.node_pairs, granularity="node pairs")
    assert set(pairs.graph.edge_names(np.flatnonzero(pairs.mask()))) == {
        *(f"input->a0.h1<{kind}>" for kind in "qkv"), "a0.h1->logits", "m0->m1",
    }  # fmt: skip
    joined = small(split.node_pairs, joined_shape(SMALL, qkv=True), granularity="node pairs")
    assert joined.graph.edge_names(np.flatnonzero(joined.mask())) == sorted(
        split.node_pairs, key=joined.graph.edge_index
    )


def test_a_shared_head_stands_for_the_heads_it_serves() -> None:
    reference = small(("input->a0.kv1<k>", "a0.h0->logits"), GraphShape(1, 4, n_kv_heads=2))
    assert reference.nodes == ("a0.h0", "a0.h2", "a0.h3")


def test_a_reference_stays_as_it_is() -> None:
    reference = small(roles=ROLES)
    reference.mask()[:] = True
    assert reference.mask().sum() == len(EDGES)
    with pytest.raises(TypeError):
        reference.roles["new"] = ()  # type: ignore[index]


# --- joining ------------------------------------------------------------------------------


def joined_name(name: str, *, qkv: bool, embed: bool) -> str:
    if qkv:
        name = re.sub(r"<[qkv]>$", "", name)
    return re.sub(r"^(tok|pos)->", "input->", name) if embed else name


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("qkv", [False, True])
@pytest.mark.parametrize("embed", [False, True])
def test_joining_joins_names(kv_heads: int, qkv: bool, embed: bool) -> None:
    fine = component_graph(GraphShape(3, 4, n_kv_heads=kv_heads, split_embed=True))
    rng = np.random.default_rng(0)
    scores = rng.normal(size=fine.n_edges)
    circuit = Circuit(fine, scores, rng.random(fine.n_edges) < 0.1)
    coarse = coarsen(circuit, joined_shape(fine.shape, qkv=qkv, embed=embed))
    names = [joined_name(name, qkv=qkv, embed=embed) for name in fine.edge_names()]
    kept = {name for name, inside in zip(names, circuit.in_circuit, strict=True) if inside}
    assert set(coarse.edges()) == kept
    for name, score in zip(coarse.graph.edge_names(), coarse.scores, strict=True):
        parts = [s for part, s in zip(names, scores, strict=True) if part == name]
        assert score == max(parts, key=abs)
    assert coarse.graph.edge_names(coarse_edges(fine, coarse.graph)) == names


def test_nothing_is_split() -> None:
    joined = component_graph(joined_shape(SMALL, qkv=True))
    with pytest.raises(GraphError, match="no coarser form"):
        coarse_edges(joined, component_graph(SMALL))


# --- comparing ----------------------------------------------------------------------------


def circuit_of(*edges: str, shape: GraphShape = SMALL) -> Circuit:
    return Circuit.from_edges(component_graph(shape), edges)


def test_comparison_by_hand() -> None:
    found = circuit_of(
        "input->a0.h1<v>", "a0.h1->m1", "m1->logits", "input->m0", "m0->logits", "input->a0.h0<q>"
    )
    comparison = compare_reference(found, small(roles=ROLES))
    assert comparison.edges is not None
    assert set(comparison.edges.common) == {"input->a0.h1<v>", "a0.h1->m1", "m1->logits"}
    assert set(comparison.edges.only_a) == {"input->m0", "m0->logits", "input->a0.h0<q>"}
    assert (comparison.edges.precision, comparison.edges.recall) == (0.5, 0.5)
    # a0.h0 leads nowhere, so it is no node of the circuit
    assert comparison.nodes.common == ("a0.h1", "m1")
    assert comparison.nodes.only_a == ("m0",)
    assert comparison.nodes.only_b == ("a1.h0",)
    assert {role: str(count) for role, count in comparison.roles.items()} == {
        "writer": "1 of 1", "mover": "0 of 1", "late MLP": "1 of 1",
    }  # fmt: skip
    assert comparison.roles["mover"].missed == ("a1.h0",)


def test_the_reference_itself_is_perfect() -> None:
    for reference in build():
        if reference.granularity == "edges":
            comparison = compare_reference(reference.circuit, reference)
            assert comparison.edges is not None
            assert comparison.edges.f1 == comparison.nodes.f1 == 1
            assert not any(count.missed for count in comparison.roles.values())


def test_optional_nodes_and_their_edges_are_not_counted() -> None:
    reference = small(optional_nodes=("m0",))
    extra = circuit_of(*EDGES, "input->m0", "m0->m1", "m0->a1.h0<q>")
    comparison = compare_reference(extra, reference)
    assert comparison.edges is not None
    assert comparison.edges.f1 == comparison.nodes.f1 == 1
    assert compare_reference(circuit_of(*EDGES), reference).nodes.f1 == 1
    strict = compare_reference(extra, small())
    assert strict.edges is not None
    assert len(strict.edges.only_a) == 3
    assert strict.nodes.only_a == ("m0",)


def test_node_pairs_count_once() -> None:
    reference = small(("input->a0.h1", "a0.h1->logits"), granularity="node pairs")
    found = circuit_of("input->a0.h1<q>", "input->a0.h1<k>", "a0.h1->logits", "a0.h1->m1")
    edges = compare_reference(found, reference).edges
    assert edges is not None
    assert edges.common == ("input->a0.h1", "a0.h1->logits")
    assert edges.only_a == ("a0.h1->m1",)


def test_nodes_alone() -> None:
    reference = small((), granularity="nodes", roles={"writer": ("a0.h1",), "mover": ("a1.h0",)})
    comparison = compare_reference(circuit_of("input->a0.h1<v>", "a0.h1->logits"), reference)
    assert comparison.edges is None
    assert comparison.nodes.common == ("a0.h1",)
    assert comparison.nodes.only_b == ("a1.h0",)


@pytest.mark.parametrize("reference_joined", [False, True])
def test_what_one_of_them_joins_is_joined_in_both(reference_joined: bool) -> None:
    joined = joined_shape(SMALL, qkv=True)
    fine = ("input->a0.h1<q>", "input->a0.h1<v>", "a0.h1->logits")
    coarse = ("input->a0.h1", "a0.h1->logits")
    reference = small(coarse, joined) if reference_joined else small(fine)
    found = circuit_of(*fine) if reference_joined else circuit_of(*coarse, shape=joined)
    edges = compare_reference(found, reference).edges
    assert edges is not None
    assert (edges.common, edges.f1) == (coarse, 1)


def test_embeddings_are_joined_where_the_circuit_has_one() -> None:
    split = GraphShape(2, 2, split_embed=True)
    reference = small(("tok->a0.h1<v>", "pos->a0.h1<k>", "a0.h1->logits"), split)
    found = circuit_of("input->a0.h1<v>", "input->a0.h1<k>", "a0.h1->logits")
    edges = compare_reference(found, reference).edges
    assert edges is not None
    assert edges.f1 == 1
    apart = circuit_of("tok->a0.h1<v>", "tok->a0.h1<k>", "a0.h1->logits", shape=split)
    edges = compare_reference(apart, reference).edges
    assert edges is not None
    assert edges.only_a == ("tok->a0.h1<k>",)


def test_another_graph_is_refused() -> None:
    other = circuit_of("input->logits", shape=GraphShape(3, 2))
    for function in (compare_reference, to_dot_reference):
        with pytest.raises(GraphError, match=r"'x' is of another graph: n_layers is 3 in .* and 2"):
            function(other, small())


def test_diagram_draws_found_extra_and_missed(tmp_path: Path) -> None:
    found = circuit_of("input->a0.h1<v>", "a0.h1->m1", "m1->logits", "input->m0", "m0->logits")
    reference = small()
    dot = to_dot_reference(found, reference, "mine")
    for text in ("mine and the reference x", "found: 3", "extra: 2", "missed: 3"):
        assert text in dot
    (tmp_path / "both.dot").write_text(dot)
    both = found.in_circuit | reference.mask()
    assert set(read_dot(tmp_path / "both.dot").edges()) == set(
        found.graph.edge_names(np.flatnonzero(both))
    )
    render(dot, tmp_path / "both.svg")
    assert b"<svg" in (tmp_path / "both.svg").read_bytes()


def test_diagram_of_a_reference_of_nodes() -> None:
    reference = small((), granularity="nodes", roles={"writer": ("a0.h1",)})
    dot = to_dot_reference(circuit_of("input->a0.h1<v>", "a0.h1->logits"), reference, "mine")
    assert "nodes: precision 1.00" in dot
    assert "edges of mine: 2" in dot


# --- names and ablations ------------------------------------------------------------------


def test_names_of_files(tmp_path: Path) -> None:
    for path in (
        "references/ioi.json",
        "compiled/models/tracr-reverse/reference-zero.json",
        "compiled/models/tracr-reverse/reference-resample.json",
        "compiled/models/tracr-reverse/config.json",
        "planted/models/planted-ioi/reference.json",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert list(reference_files(tmp_path)) == [
        "ioi", "tracr-reverse-resample", "tracr-reverse-zero", "planted-ioi",
    ]  # fmt: skip


def test_by_name_and_by_path(tmp_path: Path) -> None:
    assert load_reference("ioi").name == "ioi"
    (tmp_path / "mine.json").write_text(json.dumps(content(name="mine")))
    assert load_reference(str(tmp_path / "mine.json")).name == "mine"
    with pytest.raises(UnknownNameError, match=r"unknown reference 'iou': did you mean ioi\?"):
        load_reference("iou")
    with pytest.raises(ReferenceFileError, match="No such file"):
        load_reference("nowhere/ioi")
    with pytest.raises(UnknownNameError, match="role of reference x 'movr': did you mean mover"):
        check_roles(small(roles=ROLES), ["writer", "movr"])
    with pytest.raises(OptionError, match="reference 'x' tells no roles apart, leave --role out"):
        check_roles(small(roles={}), ["writer"])


@pytest.mark.parametrize(
    ("true", "found", "words"),
    [
        (Ablation("zero", "noising"), Ablation("zero", "noising"), None),
        (Ablation(), Ablation("zero", "noising"), None),
        (Ablation(), Ablation(), None),
        (Ablation("zero"), Ablation("zero", "denoising"), None),
        (Ablation("zero"), Ablation("resample", "noising"), "zero ablation; found: noising, resam"),
        (Ablation("zero", "noising"), Ablation("zero", "denoising"), "found: denoising, zero"),
        (Ablation("zero"), Ablation(), "does not say"),
    ],
)
def test_ablation_warning(true: Ablation, found: Ablation, words: str | None) -> None:
    warning = ablation_warning(small(ablation=true), found)
    assert (warning is None) == (words is None)
    assert words is None or words in str(warning)


# --- the command line ---------------------------------------------------------------------

Call = Callable[..., Answer]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        return Answer(int(caught.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def run_of_ln2(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Return a folder with the run ``run`` of a model of 2 layers and 4 heads."""
    folder = tmp_path_factory.mktemp("references")
    (folder / "task.jsonl").write_text(jsonl(parity_rows(data / "parity" / "ln2", N_ROWS)))
    run = ["discover", folder / "task.jsonl", "--model", data / "parity" / "ln2"]
    options = ["--method", "eap", "--edges", "30", "--out", folder / "run"]
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in (*run, *options)])
    assert not caught.value.code
    return folder / "run"


@pytest.fixture
def place(run_of_ln2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``run`` and ``mine.json``: a reference that the run has partly."""
    shutil.copytree(run_of_ln2, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    circuit = read_run(tmp_path)
    missed = tuple(
        name for name in circuit.graph.edge_names() if name not in circuit.edges()
    )[:4]  # fmt: skip
    reference = small(
        (*circuit.edges()[5:], *missed),
        circuit.graph.shape,
        name="mine",
        roles={"mlp": tuple(n for n in circuit.nodes() if n.startswith("m"))},
        ablation=Ablation("resample", "noising"),
    )
    write_reference(reference, tmp_path / "mine.json")
    return tmp_path


def read_run(folder: Path) -> Circuit:
    from acdc.runs.folder import read_run

    return read_run(folder / "run")[1]


def change(place: Path, **changes: Any) -> None:
    path = place / "mine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("format", ["svg", "png", "dot"])
def test_compare_with_a_reference(place: Path, call: Call, format: str) -> None:
    answer = call("compare", "run", "--reference", "mine.json", "--out", f"both.{format}")
    assert answer.status == 0
    assert answer.err == ""
    found, true = read_run(place), read_reference(place / "mine.json")
    comparison = compare_reference(found, true)
    assert comparison.edges is not None
    for overlap in (comparison.edges, comparison.nodes):
        for value in (overlap.precision, overlap.recall, overlap.f1):
            assert f"{value:.3f}" in answer.out
    assert (len(comparison.edges.only_a), len(comparison.edges.only_b)) == (5, 4)
    n_mlps = len(true.roles["mlp"])
    assert f"{n_mlps} of {n_mlps}" in answer.out
    words = answer.out.replace("\n", " ")
    for name in (*comparison.edges.only_a, *comparison.edges.only_b):
        assert name in words
    assert (place / f"both.{format}").stat().st_size > 0


def test_compare_counts_by_role(place: Path, call: Call) -> None:
    nodes = [node for node in read_run(place).graph.nodes if node.startswith("a")]
    roles = {"first": nodes[:3], "second": nodes[3:]}
    change(place, roles=roles, granularity="nodes", edges=[])
    have = set(read_run(place).nodes())
    answer = call("compare", "run", "--reference", "mine.json", "--no-list")
    for names in roles.values():
        assert f"{len(have & set(names))} of {len(names)}" in answer.out
    answer = call("compare", "run", "--reference", "mine.json", "--no-list", "--role", "second")
    assert "second" in answer.out
    assert "first" not in answer.out


def test_compare_warns_of_another_ablation(place: Path, call: Call) -> None:
    change(place, ablation={"intervention": "zero", "direction": "noising"})
    for circuit in ("run", "run/circuit.json"):
        answer = call("compare", circuit, "--reference", "mine.json")
        assert answer.status == 0
        assert answer.err.count("\n") == 1
        assert answer.err.startswith("acdc: warning: reference 'mine' is true under noising, zero")
        assert "found: noising, resample ablation" in answer.err
        assert "precision" in answer.out
    change(place, ablation={"intervention": None, "direction": None})
    assert call("compare", "run", "--reference", "mine.json").err == ""


def test_compare_says_when_a_file_is_silent_about_its_ablation(place: Path, call: Call) -> None:
    circuit = read_run(place)
    circuit.info.clear()
    save_circuit(circuit, place / "silent.json")
    answer = call("compare", "silent.json", "--reference", "mine.json")
    assert answer.status == 0
    assert "does not say how it was found" in answer.err
    circuit.info["intervention"] = "median"
    save_circuit(circuit, place / "strange.json")
    answer = call("compare", "strange.json", "--reference", "mine.json")
    assert answer.status == 2
    assert answer.err.startswith("acdc: strange.json: ablation has intervention 'median': expected")


def test_list_references(call: Call) -> None:
    answer = call("list", "references")
    assert answer.status == 0
    for text in ("ioi", "963 edges", "235 edges", "24 edges", "3 nodes", "noising, zero ablation"):
        assert text in answer.out
    assert "NeelNanda/Attn_Only_4L512W_C4_Code" in answer.out.replace("\n", "")


BAD_LINES = {
    "compare run": ["Missing argument 'second'", "--reference"],
    "compare run run --reference mine.json": ["both 'second' and --reference"],
    "compare run run --role mlp": ["role 'mlp' without a reference"],
    "compare run --reference ioi": ["'ioi' is of another graph", "n_layers is 2", "12", "gpt2"],
    "compare run --reference induction": ["'induction' is of another graph", "n_heads is 4"],
    "compare run --reference iou": ["unknown reference 'iou'", "did you mean ioi"],
    "compare run --reference nowhere.json": ["nowhere.json", "No such file"],
    "compare run --reference .": ["cannot read .", "folder"],
    "compare run --reference run/run.json": ["run.json is no reference file", "'citation'"],
    "compare run --reference run/circuit.png": ["circuit.png: no JSON"],
    "compare run --reference mine.json --role mpl": ["role of reference mine 'mpl'", "mean mlp"],
    "compare run --reference mine.json --out run/circuit.svg": ["circuit.svg' exists"],
    "compare run --reference mine.json --out new.gif": ["'new.gif'", ".svg"],
    "compare nowhere --reference mine.json": ["nowhere", "no such folder or file"],
    "compare run/run.json --reference mine.json": ["run.json", "'cfg'"],
}


def refused(call: Call, folder: Path, *arguments: object) -> str:
    """Return the one line of a mistake, after which every file is as it was."""
    before = snapshot(folder)
    answer = call(*arguments)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("acdc: ")
    assert answer.err.count("\n") == 1
    assert snapshot(folder) == before
    return answer.err


@pytest.mark.parametrize("line", BAD_LINES)
def test_mistakes_in_the_command(place: Path, call: Call, line: str) -> None:
    said = refused(call, place, *line.split())
    assert all(text in said for text in BAD_LINES[line]), said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"edges": ["a9.h9->logits"]}, ["mine.json", "a9.h9->logits", "no sender 'a9.h9'"]),
        ({"roles": {"mover": ["a9.h9"]}}, ["mine.json", "role 'mover'", "'a9.h9'"]),
        ({"granularity": "latents"}, ["mine.json", "'latents'", "node pairs"]),
        ({"ablation": {"intervention": "noise"}}, ["mine.json", "'noise'", "resample, zero"]),
        ({"edges": None}, ["mine.json", "edges is null"]),
    ],
)
def test_mistakes_in_the_file(
    place: Path, call: Call, changes: dict[str, Any], words: list[str]
) -> None:
    change(place, **changes)
    said = refused(call, place, "compare", "run", "--reference", "mine.json", "--out", "new.svg")
    assert all(text in said for text in words), said


def test_truncated_file(place: Path, call: Call) -> None:
    path = place / "mine.json"
    path.write_text(path.read_text()[:-30])
    said = refused(call, place, "compare", "run", "--reference", "mine.json", "--out", "new.svg")
    assert "mine.json: no JSON that can be read" in said
    assert "truncated" in said
