"""What random circuits get, and that a reference is of one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acdc import discover
from acdc.cli import main
from acdc.errors import CircuitFileError, OptionError
from acdc.evidence.comparison import compare
from acdc.evidence.references import REFERENCES, load_reference, match_model
from acdc.models import load_model
from acdc.models.identity import Identity, sizes_of, weights_digest
from acdc.pages.contents import gather
from acdc.pages.render import to_html
from graphs import Circuit, GraphError, GraphShape, Reference, compare_reference, component_graph
from graphs.known.chance import (
    RATIOS,
    chance_of_pair,
    chance_of_ranking,
    chance_of_reference,
    chance_of_sweep,
)
from graphs.known.reference import write_reference
from graphs.known.roc import items
from graphs.sample import PathSampler

SHAPE = GraphShape(n_layers=2, n_heads=2)
TEXTS = dict.fromkeys(("description", "task", "citation", "open"), "x")
DOCSTRING = {"n_prompts": 8, "n_select": 0, "n_test": 8, "method": "eap", "n_edges": 60}


# --- random circuits ----------------------------------------------------------------------


def random_circuit(graph: Any, n_edges: int, seed: int = 0) -> Circuit:
    mask = PathSampler(graph).circuit(n_edges, np.random.default_rng(seed))
    return Circuit(graph, mask.astype(float), mask)


def test_numbers_are_those_of_comparing_each_random_circuit() -> None:
    """Against a plain loop over the same draws."""
    graph = component_graph(SHAPE)
    reference = Reference(
        **TEXTS, name="r", model="m", graph=graph,
        edges=("input->a0.h1<v>", "a0.h1->a1.h0<k>", "input->a1.h0<q>", "a1.h0->logits",
               "a0.h1->m1", "m1->logits"),
        roles={"writer": ("a0.h1",), "others": ("a1.h0", "m1")}, optional_nodes=("m0",),
    )  # fmt: skip
    circuit = random_circuit(graph, 12, seed=5)
    found = chance_of_reference(circuit, reference, n=40, seed=3)
    sampler, rng = PathSampler(graph), np.random.default_rng(3)
    drawn = [sampler.circuit(circuit.n_edges, rng) for _ in range(40)]
    each = [compare_reference(Circuit(graph, m.astype(float), m), reference) for m in drawn]
    own = compare_reference(circuit, reference)
    assert (found.n_circuits, found.n_edges) == (40, circuit.n_edges)
    assert found.edges is not None
    for part, chances in (("edges", found.edges), ("nodes", found.nodes)):
        for ratio in RATIOS:
            values = np.array([getattr(getattr(one, part), ratio) for one in each])
            assert chances[ratio].mean == pytest.approx(values.mean())
            assert chances[ratio].high == pytest.approx(np.quantile(values, 0.95))
            as_good = values >= getattr(getattr(own, part), ratio)
            assert chances[ratio].as_good == pytest.approx(as_good.mean())
    for role in reference.roles:
        counts = [len(one.roles[role].found) for one in each]
        assert found.roles[role].mean == pytest.approx(np.mean(counts))


def test_a_random_circuit_of_gpt2_size_finds_all_roles_and_chance_says_so() -> None:
    """The trap: most heads are on some path of a circuit of three per cent of the edges."""
    reference = load_reference("greater-than")
    circuit = random_circuit(reference.graph, 1000)
    early = compare_reference(circuit, reference).roles["early head"]
    assert str(early) == "3 of 3"
    found = chance_of_reference(circuit, reference, n=30)
    assert found.edges is not None
    assert found.roles["early head"].mean > 2.9
    assert found.roles["early head"].as_good > 0.9
    assert found.nodes["recall"].mean > 0.9
    assert found.edges["recall"].mean < 0.15
    true = Circuit.from_edges(reference.graph, reference.edges)
    edges = chance_of_reference(true, reference, n=30).edges
    assert edges is not None
    assert edges["recall"].as_good == 0


def test_two_circuits_and_random_ones() -> None:
    graph = component_graph(SHAPE)
    a, b = random_circuit(graph, 10, 1), random_circuit(graph, 14, 2)
    found = chance_of_pair(a, b, n=50)
    assert found.edges is not None
    assert 0 < found.edges["recall"].mean < 1
    assert found.nodes["precision"].high <= 1
    whole = np.ones(graph.n_edges, dtype=bool)
    every = chance_of_pair(Circuit(graph, whole.astype(float), whole), b, n=5)
    assert every.edges is not None
    assert every.edges["recall"].mean == 1  # of all edges there is one circuit
    with pytest.raises(GraphError, match="0 random circuits: expected at least 1"):
        chance_of_pair(a, b, n=0)


def test_shuffled_scores_are_even_on_edges_and_not_on_nodes() -> None:
    """A node with more edges has the larger of more scores."""
    reference = load_reference("greater-than")
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(reference.graph.n_edges)
    edges = items(reference.graph, "edges")
    found = chance_of_ranking(edges, edges.mask(reference.mask()), scores, n=10)
    assert found["auroc"].mean == pytest.approx(0.5, abs=0.03)
    assert found["average_precision"].mean < 0.02
    nodes = items(reference.graph, "nodes")
    mlps = np.array([name.startswith("m") for name in nodes.names])
    by_node = chance_of_ranking(nodes, mlps, scores, n=20)
    assert by_node["auroc"].mean < 0.45  # an MLP reads once, a head three times


def test_stairs_of_random_circuits_lie_below_the_diagonal() -> None:
    reference = load_reference("tracr-reverse-resample")
    graph, edges = reference.graph, items(reference.graph, "edges")
    masks = [random_circuit(graph, n, seed=n).in_circuit for n in (5, 15, 30)]
    found = chance_of_sweep(graph, edges, edges.mask(reference.mask()), masks)
    assert found.mean < 0.6
    truth = reference.mask()
    assert chance_of_sweep(graph, edges, edges.mask(truth), [truth]).as_good < 0.2


# --- a reference is of one model ----------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the bundled docstring model, whose graph is that of the published one."""
    folder = tmp_path_factory.mktemp("models") / "run"
    discover("docstring", **DOCSTRING).save(folder)
    return folder


def test_a_run_says_which_model_it_was(run: Path) -> None:
    said = json.loads((run / "run.json").read_text())["model_info"]
    model, _ = load_model("docstring-small")
    assert said == {
        "name": "docstring-small", "source": "known", "sizes": sizes_of(model),
        "weights": weights_digest(model),
    }  # fmt: skip
    assert said["sizes"] == {"d_model": 96, "d_head": 16, "d_mlp": 0, "d_vocab": 166}


def test_a_digest_depends_on_the_weights_and_not_on_their_type() -> None:
    digests = {
        dtype: weights_digest(load_model("docstring-small", dtype=dtype)[0])
        for dtype in ("float32", "float64", "bfloat16", "float16")
    }
    assert digests["float32"] == digests["float64"] == digests["bfloat16"] != ""
    assert digests["float16"] == ""
    model, _ = load_model("docstring-small")
    with torch.no_grad():
        model.layers[2].attention.W_O[1, 0, 0] += 1
    assert weights_digest(model) not in digests.values()


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.mark.parametrize("command", ["compare", "report", "self-repair"])
def test_a_reference_of_another_model_is_refused_in_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    before = sorted(run.iterdir())
    assert call(command, run, "--reference", "docstring") == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    for text in ("of another model", "d_model is 96 in docstring-small", "512", "--other-model"):
        assert text in said.err
    assert said.out == ""
    assert sorted(run.iterdir()) == before


def test_asked_for_the_result_says_so_everywhere(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("compare", run, "--reference", "docstring", "--other-model", "--n-random", 30)
    assert call(*asked, "--out", tmp_path / "both.dot") == 0
    said = capsys.readouterr().out
    assert "ANOTHER MODEL" in said
    assert "mean of 30 random circuits" in said.replace("\n", " ")
    assert "of another model" in (tmp_path / "both.dot").read_text()
    assert call(*asked, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["other_model"] is True
    assert found["model"]["same"] is False
    assert found["chance"]["n_circuits"] == 30
    assert found["doubts"] == json.loads((run / "run.json").read_text())["warnings"]
    assert set(found["chance"]["roles"]) == set(load_reference("docstring").roles)
    assert found["edges"]["common"] is not None
    page = to_html(gather(run, reference="docstring", other_model=True, tests=False, n_prompts=1))
    assert "another model than the reference" in page
    assert "random circuits of" in page
    assert "with scores shuffled" in page
    assert call("compare", run, run, "--other-model") == 2


@pytest.mark.parametrize("command", ["compare", "report", "self-repair"])
def test_another_model_than_no_reference_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    before = sorted(run.iterdir())
    runs = (run, run) if command == "compare" else (run,)
    assert call(command, *runs, "--other-model") == 2
    assert "other_model without a reference: give one" in capsys.readouterr().err
    assert sorted(run.iterdir()) == before


def test_roles_of_another_model_are_called_that(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "repair.json"
    asked = ("self-repair", run, "--reference", "docstring", "--role", "argument mover")
    assert call(*asked, "--other-model", "--n-resamples", 20, "--out", out) == 0
    assert "roles of ANOTHER MODEL: d_model is 96" in capsys.readouterr().out.replace("\n", " ")
    assert json.loads(out.read_text())["reference_model"]["same"] is False


def test_two_runs_stand_beside_random_circuits(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("compare", run, run, "--n-random", 20, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["edges"]["only_a"] == []
    assert found["chance"]["edges"]["precision"]["mean"] < 0.5
    assert call("compare", run, run, "--n-random", 0) == 0
    assert "random" not in capsys.readouterr().out
    assert call("compare", run, run, "--n-random", -1) == 2


def reference(**changes: Any) -> Reference:
    graph = component_graph(SHAPE)
    return Reference(
        **{**TEXTS, "name": "r", "model": "gpt2", "graph": graph, "edges": ("input->logits",)}
        | changes
    )


SIZES = {"d_model": 768, "d_head": 64}
OWN = Identity("gpt2", "hub", SIZES, "abc")
MATCHES: dict[str, tuple[dict[str, Any], Identity | None, bool | None, str]] = {
    "same weights": ({"weights": "abc"}, OWN, True, "by W_U and every W_O"),
    "other weights": ({"weights": "abd"}, OWN, False, "weights of gpt2 are not those"),
    "hub name": ({"configuration": SIZES}, OWN, True, "weights were not compared"),
    "hub alias": (
        {"configuration": SIZES}, Identity("openai-community/gpt2", "hub", SIZES, "abc"), True,
        "name on the hub",
    ),
    "another of the hub": (
        {"configuration": SIZES}, Identity("stanford-crfm/alias-gpt2-small-x21", "hub", SIZES, ""),
        False, "not gpt2",
    ),
    "another's copy": (
        {"configuration": SIZES}, Identity("someone/gpt2", "hub", SIZES, ""), None, "not checked",
    ),
    "a folder": (
        {"configuration": SIZES}, Identity("random-gpt2", "folder", SIZES, "fff"), None,
        "matched by configuration; weights unknown: whether random-gpt2 (a folder) is gpt2",
    ),
    "a folder of another width": (
        {"configuration": SIZES}, Identity("gpt2", "folder", SIZES | {"d_model": 96}, "fff"),
        False, "d_model is 96 in gpt2 and 768 in gpt2",
    ),
    "only a graph": ({}, Identity("gpt2", "object", SIZES, "fff"), None, "matched by graph"),
    "an older run": ({"configuration": SIZES}, None, None, "not known to be gpt2"),
}  # fmt: skip


@pytest.mark.parametrize("case", MATCHES)
def test_what_can_be_checked_is_and_the_rest_is_said(case: str) -> None:
    changes, identity, same, words = MATCHES[case]
    match = match_model(reference(**changes), identity)
    assert match.same is same
    assert words in match.says


def test_weights_tell_a_retrained_twin_from_the_model(run: Path, tmp_path: Path) -> None:
    """Equal sizes, other weights: refused where both digests are known."""
    graph = component_graph(GraphShape(n_layers=4, n_heads=8, has_mlp=False))
    model, _ = load_model("docstring-small")
    own = {"model": "docstring-small", "graph": graph, "configuration": sizes_of(model)}
    for weights, same in ((weights_digest(model), True), ("0" * 16, False), ("", None)):
        known = reference(**own, weights=weights)
        if same is False:
            with pytest.raises(OptionError, match="are not those of docstring-small"):
                compare(run, reference=known, n_random=1)
        match = compare(run, reference=known, n_random=1, other_model=True).match
        assert match is not None
        assert match.same is same
        write_reference(known, tmp_path / f"{same}.json")
        again = load_reference(tmp_path / f"{same}.json")
        assert (again.weights, again.configuration) == (weights, own["configuration"])


def test_every_model_made_here_signs_its_references() -> None:
    for name, path in REFERENCES.items():
        known = load_reference(name)
        assert known.configuration, name
        if (path.parent / "config.json").is_file():
            model, _ = load_model(str(path.parent))
            assert known.weights == weights_digest(model), name
            assert known.configuration == sizes_of(model), name


def test_a_malformed_model_info_names_the_file(run: Path, tmp_path: Path) -> None:
    summary = json.loads((run / "run.json").read_text())
    summary["model_info"] = {"name": "gpt2", "sizes": [], "weights": ""}
    for path in run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "run.json").write_text(json.dumps(summary))
    with pytest.raises(CircuitFileError, match=r"'sizes' is of type list"):
        compare(tmp_path, reference="docstring")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"weights": 3}, "weights is 3, expected a text"),
    ({"configuration": {"d_model": "768"}}, "configuration of 'd_model' is \"768\""),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_bad_files(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write_reference(reference(), tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps(content | changes))
    with pytest.raises(GraphError, match=r"r\.json") as caught:
        load_reference(tmp_path / "r.json")
    assert words in str(caught.value)
