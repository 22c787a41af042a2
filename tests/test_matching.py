"""Circuits of one task in two models, matched by what their nodes do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import circuit_edges, save_induction
from safetensors.torch import load_file, save_file

import acdc
from acdc.cli import main
from acdc.errors import OptionError
from acdc.evidence.matching import match_nodes
from acdc.measure.behaviour import Behaviour, distance, distances, measure_behaviour
from acdc.runs.folder import Run
from acdc.runs.opened import open_run
from acdc.runs.reopen import reopen

QUICK = {"method": "eap-ig", "n_prompts": 24, "n_test": 24}
PERMUTATIONS = ((2, 0, 1), (1, 2, 0))
"""By layer: which of the old heads each new one is."""


@pytest.fixture(scope="module")
def seeds(data: Path) -> list[Path]:
    """Return two models of one recipe and two seeds, which do induction."""
    return [data / "induction-seeds" / seed for seed in ("0", "1")]


def run_in(model: Path, n_edges: int = 40) -> Run:
    return acdc.discover("induction", model=model, n_edges=n_edges, **QUICK)


@pytest.fixture(scope="module")
def trained(seeds: list[Path]) -> list[Run]:
    return [run_in(model) for model in seeds]


def permute(model: Path, folder: Path) -> Path:
    """Write a Llama with its heads in other places, which computes the same."""
    shutil.copytree(model, folder)
    state = load_file(folder / "model.safetensors")
    for layer, order in enumerate(PERMUTATIONS):
        at = list(order)
        for name, axis in (("q", 0), ("k", 0), ("v", 0), ("o", 1)):
            key = f"model.layers.{layer}.self_attn.{name}_proj.weight"
            heads = state[key].unflatten(axis, (len(at), -1))
            chosen = heads[at] if axis == 0 else heads[:, at]
            state[key] = chosen.flatten(axis, axis + 1).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# --- the same model -----------------------------------------------------------------------


def test_permuted_heads_match_exactly(
    seeds: list[Path], trained: list[Run], tmp_path: Path
) -> None:
    other = run_in(permute(seeds[0], tmp_path / "permuted"))
    found = acdc.match(trained[0], other)
    heads = {pair.one: pair.other for pair in found.pairs if pair.one.startswith("a")}
    assert len(heads) >= 3
    for one, two in heads.items():
        layer, old = int(one[1]), int(one.partition(".h")[2])
        assert two == f"a{layer}.h{PERMUTATIONS[layer].index(old)}"
    assert all(pair.distance < 1e-5 for pair in found.pairs)
    assert all(pair.next_best is None or pair.next_best > 1e-3 for pair in found.pairs)
    assert found.unmatched == ((), ())
    assert found.only == ((), ())
    assert found.loose == (0, 0)
    assert len(found.common) == trained[0].circuit.n_edges
    assert found.expected is not None
    assert found.expected < len(found.common)


# --- another seed -------------------------------------------------------------------------


def test_two_seeds_match_by_role(trained: list[Run]) -> None:
    found = acdc.match(*trained)
    ours, theirs = found.behaviours
    heads = [pair for pair in found.pairs if pair.one.startswith("a")]
    for pair in heads:
        assert ours[pair.one].roles == theirs[pair.other].roles
        assert ours[pair.one].depth == theirs[pair.other].depth
    for role in ("previous token", "induction"):
        having = {name for name, node in ours.items() if role in node.roles}
        assert having
        assert having <= {pair.one for pair in heads}
    assert found.expected is not None
    assert len(found.common) > found.expected
    assert [pair.one for pair in heads] != [pair.other for pair in heads]  # not by their numbers


# --- another shape ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Return runs in models of three and of five heads, which do the same."""
    folder = tmp_path_factory.mktemp("by_hand")
    models = [
        save_induction(folder / "three", heads=(0, 1)),
        save_induction(folder / "five", heads=(3, 4), n_heads=5, seed=7),
    ]
    return [run_in(model, n_edges=4) for model in models]


def test_models_of_other_shapes(by_hand: list[Run]) -> None:
    found = acdc.match(*by_hand)
    assert {(p.one, p.other) for p in found.pairs} == {("a0.h0", "a0.h3"), ("a1.h1", "a1.h4")}
    assert set(found.common) == circuit_edges((0, 1))
    assert found.only == ((), ())
    assert all(pair.distance < 0.01 for pair in found.pairs)
    roles = {pair.one: pair.roles for pair in found.pairs}
    assert "previous token" in roles["a0.h0"]
    assert "induction" in roles["a1.h1"]


def test_behaviour_is_that_of_the_hand(by_hand: list[Run]) -> None:
    run = open_run(by_hand[0])
    known = measure_behaviour(reopen(run, run.settings())[0])
    previous, induction = known["a0.h0"], known["a1.h1"]
    assert previous.attention["B1", "A1"] == pytest.approx(1, abs=1e-3)
    assert induction.attention["END", "B1"] == pytest.approx(1, abs=1e-3)
    assert induction.direct == pytest.approx(1, abs=1e-3)  # nothing else writes what comes next
    assert previous.direct == pytest.approx(0, abs=1e-3)
    assert (previous.depth, induction.depth) == (0, 1)
    for query in ("A1", "B1", "END"):
        total = sum(value for (q, _), value in previous.attention.items() if q == query)
        assert total == pytest.approx(1, abs=1e-4)


# --- distances ----------------------------------------------------------------------------


def head(depth: float = 0.0, **says: Any) -> Behaviour:
    return Behaviour("head", depth, 0.0, **says)


def test_distances_are_those_of_the_definition() -> None:
    one = head(0.0, attention={("q", "a"): 1.0, ("q", "b"): 0.0}, roles=frozenset({"x", "y"}))
    other = head(0.5, attention={("q", "a"): 0.25, ("q", "b"): 0.75}, roles=frozenset({"y"}))
    assert distances(one, other) == {"depth": 0.5, "direct": 0, "roles": 0.5, "attention": 0.75}
    assert distance(one, other) == pytest.approx(1.75 / 4)
    assert distance(one, one) == 0


def test_what_is_too_far_apart_has_no_partner() -> None:
    ours = {"a0.h0": head(0.0), "a1.h0": head(1.0, roles=frozenset({"x"}))}
    theirs = {"a2.h2": head(0.1)}
    (pair,) = match_nodes(ours, theirs)
    assert (pair.one, pair.other, pair.next_best) == ("a0.h0", "a2.h2", None)
    assert match_nodes(ours, theirs, limit=0.01) == []


# --- by their numbers ----------------------------------------------------------------------


def test_a_comparison_by_number_says_that_the_models_differ(trained: list[Run]) -> None:
    found = acdc.compare(*trained, n_random=0)
    assert found.warning is not None
    assert "and their weights differ: heads are compared by their numbers (acdc match" in (
        found.warning
    )
    assert acdc.compare(trained[0], trained[0], n_random=0).warning is None


# --- what cannot be matched ---------------------------------------------------------------


def test_what_cannot_be_matched(by_hand: list[Run]) -> None:
    with pytest.raises(OptionError, match="limit 2: expected a distance above 0, at most 1"):
        acdc.match(*by_hand, limit=2)
    with pytest.raises(OptionError, match="nodes are matched by what they do: give a run"):
        acdc.match(by_hand[0], by_hand[1].circuit)


def test_the_command(
    by_hand: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(run.save(tmp_path / str(i))) for i, run in enumerate(by_hand)]
    with pytest.raises(SystemExit) as status:
        main(["match", *folders, "--out", str(tmp_path / "match.json")])
    assert status.value.code == 0
    said = capsys.readouterr().out
    assert "edges between matched nodes: 4 in both" in said
    for folder, run in zip(folders, by_hand, strict=True):  # too few prompts to be sure
        assert run.claim.warnings
        for warning in run.claim.warnings:
            assert f"warning: {folder}: {warning}" in said.replace("\n", "")
    content = json.loads((tmp_path / "match.json").read_text())
    assert {(pair["one"], pair["other"]) for pair in content["pairs"]} == {
        ("a0.h0", "a0.h3"), ("a1.h1", "a1.h4")
    }  # fmt: skip
    assert torch.tensor(content["n_common_expected"]) < 4
