"""Circuits of several tasks in one model: what they share beyond chance."""

from __future__ import annotations

import csv
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from by_hand import save_induction

import acdc
from acdc.cli import main
from acdc.errors import GraphError, OptionError
from graphs import Circuit, GraphShape, component_graph, save_circuit
from graphs.known.sharing import at_least, share_several
from graphs.sample import PathSampler
from graphs.select import prune

GRAPH = component_graph(GraphShape(n_layers=4, n_heads=6))
SAMPLER = PathSampler(GRAPH)


def random_circuit(seed: int, n_edges: int = 40, **info: object) -> Circuit:
    mask = SAMPLER.circuit(n_edges, np.random.default_rng(seed))
    return Circuit(GRAPH, mask.astype(float), mask, info)


def with_more(circuit: Circuit, seed: int, n_edges: int = 20, **info: object) -> Circuit:
    """Return a circuit and paths of its own."""
    mask = circuit.in_circuit | random_circuit(seed, n_edges).in_circuit
    return Circuit(GRAPH, mask.astype(float), mask, info)


# --- chances ------------------------------------------------------------------------------


def test_the_chance_of_so_many_is_that_of_all_outcomes() -> None:
    chances = np.array([[0.1, 0.9], [0.5, 0.2], [0.7, 0.4], [0.3, 0.6]])
    for n_wanted in range(5):
        wanted = np.full(2, n_wanted)
        for name in range(2):
            total = sum(
                np.prod(
                    [p if hit else 1 - p for p, hit in zip(chances[:, name], hits, strict=True)]
                )
                for hits in product((False, True), repeat=4)
                if sum(hits) >= n_wanted
            )
            assert at_least(chances, wanted)[name] == pytest.approx(total)


def test_random_circuits_share_nothing_beyond_chance() -> None:
    found = share_several([random_circuit(seed) for seed in (1, 2, 3)], n=100)
    assert found.edges.beyond_chance == ()
    assert found.nodes.beyond_chance == ()
    for pair in found.pairs:
        assert pair.p > 0.01
        assert abs(pair.n_common - pair.expected) < 12
    assert abs(found.n_union - found.union_expected) < 15
    for i, expected in enumerate(found.alone_expected):
        assert abs(len(found.edges.only(i)) - expected) < 12


def test_false_discoveries_are_as_rare_as_the_level_says() -> None:
    """Among circuits that have nothing to do with each other; names in none count as tested."""
    n_false = sum(
        bool(found.edges.beyond_chance or found.nodes.beyond_chance)
        for seed in range(0, 60, 2)
        for found in [
            share_several([random_circuit(seed, 25), random_circuit(seed + 1, 25)], n=100)
        ]
    )
    assert n_false <= 4  # of 30 at 5 %: more has a chance of 2 %


def test_what_was_planted_in_all_is_shared_beyond_chance() -> None:
    core = random_circuit(0, 30)
    tasks = [with_more(core, seed) for seed in (11, 12, 13, 14)]
    found = share_several(tasks, n=100)
    planted = set(core.edges())
    assert planted <= set(found.edges.of_all)
    beyond = set(found.edges.beyond_chance)
    # at both ends of the graph paths are few, and random circuits share edges as well
    ends = ("input->", "->m3", "->logits")
    assert {edge for edge in planted if not any(end in edge for end in ends)} <= beyond
    assert len(beyond - planted) <= 0.2 * len(beyond)
    for pair in found.pairs:
        assert pair.n_common >= len(planted)
        assert pair.p == pytest.approx(1 / 101)
        assert pair.p_hypergeometric < 1e-6
    assert found.n_union < found.union_low


def test_nodes_that_all_share_are_told_from_those_that_one_has() -> None:
    def circuit(*heads: str) -> Circuit:
        edges = [e for head in heads for e in (f"input->{head}<v>", f"{head}->logits")]
        return Circuit.from_edges(GRAPH, edges)

    own = [("a0.h1", "a1.h1"), ("a0.h2", "a2.h1"), ("a1.h2", "a3.h1"), ("a2.h2", "a3.h2")]
    found = share_several([circuit("a1.h5", "a2.h5", *heads) for heads in own], n=20)
    assert found.nodes.beyond_chance == ("a1.h5", "a2.h5")
    chance = (4 / 28) ** 4  # four circuits of 4 of 28 nodes
    assert found.nodes.p[found.nodes.names.index("a1.h5")] == pytest.approx(chance)
    assert found.nodes.only(2) == ("a1.h2", "a3.h1")


def test_counts_are_those_of_the_sets() -> None:
    one, other = random_circuit(5), random_circuit(6)
    found = share_several([one, other], n=20)
    a, b = (set(GRAPH.edge_names(np.flatnonzero(prune(GRAPH, c.in_circuit)))) for c in (one, other))
    assert set(found.edges.names) == a | b
    assert set(found.edges.of_all) == a & b
    assert set(found.edges.only(0)) == a - b
    (pair,) = found.pairs
    assert pair.jaccard == pytest.approx(len(a & b) / len(a | b))
    assert set(found.nodes.names) == ({*one.nodes(), *other.nodes()} - {"input", "logits"})
    assert found.nodes.n_total == 4 * 7
    assert found.edges.n_total == GRAPH.n_edges


def test_circuits_that_cannot_be_compared() -> None:
    with pytest.raises(GraphError, match="1 circuits: expected at least 2"):
        share_several([random_circuit(0)])
    empty = Circuit(GRAPH, np.zeros(GRAPH.n_edges), np.zeros(GRAPH.n_edges, dtype=bool))
    with pytest.raises(GraphError, match="circuit 2 has no path to logits"):
        share_several([random_circuit(0), empty])
    larger = component_graph(GraphShape(n_layers=5, n_heads=6))
    every = np.ones(larger.n_edges, dtype=bool)
    with pytest.raises(GraphError, match="n_layers is 4 in one and 5"):
        share_several([random_circuit(0), Circuit(larger, every.astype(float), every)])


# --- runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return three circuit files of one model, the first two with a common core."""
    folder, core = tmp_path_factory.mktemp("tasks"), random_circuit(0, 30)
    circuits = {
        "names": with_more(core, 1), "years": with_more(core, 2), "brackets": random_circuit(3)
    }  # fmt: skip
    for name, circuit in circuits.items():
        save_circuit(circuit, folder / f"{name}.json")
    return [folder / f"{name}.json" for name in circuits]


def test_a_folder_with_everything(tasks: list[Path], tmp_path: Path) -> None:
    found = acdc.shared(*tasks, n_random=50)
    assert found.labels == ("names", "years", "brackets")
    folder = found.save(tmp_path / "out")
    content = json.loads((folder / "shared.json").read_text())
    assert content["together"]["n_edges"] == found.found.n_union
    with (folder / "nodes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["node"] for row in rows] == list(found.found.nodes.names)
    for row in rows:
        here = [label for label in found.labels if row[label] == "1"]
        assert int(row["n_tasks"]) == len(here)
        assert all(float(row[f"share of {label}"]) >= 0 for label in here)
    shares = found.node_shares.sum(0)  # the rest leaves the embedding
    assert (shares < 1).all()
    assert (shares > 0.3).all()
    with (folder / "overlap.csv").open() as file:
        pairs = {(row["one"], row["other"]): float(row["p"]) for row in csv.DictReader(file)}
    assert pairs["names", "years"] < 0.05 < pairs["names", "brackets"]
    for name in ("shared.svg", "shared.png", "edges.csv"):
        assert (folder / name).stat().st_size > 0
    assert "brackets" in (folder / "shared.svg").read_text()


def test_the_command(tasks: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*more: str) -> str:
        with pytest.raises(SystemExit) as status:
            main(["shared", *map(str, tasks), "--n-random", "20", *more])
        assert status.value.code == 0
        return capsys.readouterr().out

    said = run("--out", str(tmp_path / "a"))
    assert "all tasks together use" in said
    assert "beyond chance" in said
    content = json.loads(run("--json", "--out", str(tmp_path / "b")))
    assert content["labels"] == ["names", "years", "brackets"]
    with pytest.raises(SystemExit) as status:
        main(["shared", str(tasks[0])])
    assert status.value.code == 2
    assert "1 circuits: give two or more" in capsys.readouterr().err


def test_runs_of_two_models_are_refused(tmp_path: Path) -> None:
    quick = {"method": "eap", "n_edges": 6, "n_prompts": 8, "n_test": 8}
    folders = [save_induction(tmp_path / name, heads=at) for name, at in
               (("a", (0, 1)), ("b", (2, 0)))]  # fmt: skip
    runs = [acdc.discover("induction", model=folder, **quick) for folder in folders]
    with pytest.raises(OptionError, match="and their weights differ: give circuits of one model"):
        acdc.shared(*runs)
    other = acdc.discover("induction", model=folders[0], corruption="other_before", **quick)
    found = acdc.shared(runs[0], other, n_random=20)
    assert found.labels == ("induction (1)", "induction (2)")
    assert found.warnings == tuple(
        f"induction ({i}): {warning}"
        for i, run in enumerate((runs[0], other), start=1)
        for warning in run.claim.warnings
    )
