"""How scores become a circuit: the best one by brute force, signs, proportions."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from oracle import small_task
from test_attribution import build

from acdc.cli import main
from acdc.errors import OptionError
from acdc.methods import METHODS
from acdc.methods.eap import eap, eap_ig
from acdc.methods.select import Selection, in_proportion, select
from acdc.methods.signs import agreeing, stable_signs
from graphs import Graph, GraphError, GraphShape, component_graph, prune, select_top
from graphs.optimal import select_optimal

SHAPES = {
    "mlps": GraphShape(1, 2, 2, True),
    "two layers": GraphShape(2, 1, 1, False),
    "shared keys": GraphShape(1, 2, 1, False),
    "parallel": GraphShape(1, 2, 2, True, parallel=True),
}


@cache
def connected(name: str) -> tuple[Graph, NDArray[np.bool_]]:
    """Return a graph, and every mask that pruning leaves as it is: ``[mask, edge]``."""
    graph = component_graph(SHAPES[name])
    assert graph.n_edges <= 13
    every = (np.arange(2**graph.n_edges)[:, None] >> np.arange(graph.n_edges)) % 2 == 1
    return graph, np.stack([mask for mask in every if (prune(graph, mask) == mask).all()])


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_the_program_finds_the_best_of_all_circuits(name: str, signed: bool) -> None:
    graph, masks = connected(name)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=graph.n_edges) ** 3
        scores = scores if signed else np.abs(scores)
        kind = rng.random(graph.n_edges) < 0.5
        for n in range(0, graph.n_edges + 1, 2):
            few = masks[masks.sum(1) <= n]
            found = select_optimal(graph, scores, n)
            assert found.score == pytest.approx((few @ scores).max(), abs=1e-6)
            assert found.score == pytest.approx(scores[found.mask].sum(), abs=1e-6)
            assert found.is_optimal
            assert found.mask.sum() <= n
            np.testing.assert_array_equal(prune(graph, found.mask), found.mask)
            limits = [(kind, n // 3), (~kind, n - n // 3)]
            allowed = few[((few & kind).sum(1) <= n // 3) & ((few & ~kind).sum(1) <= n - n // 3)]
            limited = select_optimal(graph, scores, n, most=limits)
            assert limited.score == pytest.approx((allowed @ scores).max(), abs=1e-6)
            assert (limited.mask & kind).sum() <= n // 3


def test_better_than_the_top_where_a_high_edge_needs_two_low_ones() -> None:
    graph = component_graph(GraphShape(2, 2, 2, False))
    scores = np.full(graph.n_edges, 0.01)
    for name, score in {
        "a0.h0->a1.h0<v>": 5.0, "a0.h1->a1.h1<q>": 4.0, "input->a0.h0<v>": 0.02,
        "input->logits": 3.0,
    }.items():  # fmt: skip
        scores[graph.edge_index(name)] = score
    found = select_optimal(graph, scores, 4)
    top = select_top(graph, scores, 4, absolute=False)
    assert set(graph.edge_names(np.flatnonzero(found.mask))) == {
        "input->logits", "input->a0.h0<v>", "a0.h0->a1.h0<v>", "a1.h0->logits",
    }  # fmt: skip
    assert found.score > scores[top].sum()


def test_when_time_is_up_the_bound_is_said() -> None:
    graph = component_graph(GraphShape(6, 6, 6, True))
    scores = np.exp(3 * np.random.default_rng(0).normal(size=graph.n_edges))
    found = select_optimal(graph, scores, 40, seconds=1e-3)
    assert not found.is_optimal
    assert found.gap > 0
    assert found.score >= found.heuristic > 0
    assert found.bound >= select_optimal(graph, scores, 40).score
    np.testing.assert_array_equal(prune(graph, found.mask), found.mask)
    with pytest.raises(GraphError, match="0 to"):
        select_optimal(graph, scores, -1)


# --- signs --------------------------------------------------------------------------------


def test_signs_that_agree_by_hand() -> None:
    """Two parts: both are drawn with 1/2, one alone with 1/4 each."""
    sums = np.array([[1.0, 1.0, -1.0, 0.0], [1.0, -3.0, -1.0, 0.0]])
    found = agreeing(sums, np.sign(sums.sum(0)))
    np.testing.assert_allclose(found, [1, 0.75, 1, 1], atol=0.05)


def test_scores_of_parts_add_up_and_clear_signs_are_stable() -> None:
    experiment, _ = build("LN", 4)
    pairs = experiment.task.pairs
    experiment = experiment.on(replace(experiment.task, pairs=pairs * 2))
    scores, seen = eap(experiment), []

    def score(few: Any) -> NDArray[np.float64]:
        seen.append((few.n_rows, eap(few)))
        return seen[-1][1]

    stable = stable_signs(experiment, score, scores, 0.95)
    assert len(seen) == 4
    total = sum(n * found for n, found in seen) / experiment.n_rows
    np.testing.assert_allclose(total, scores, atol=1e-12)
    each = np.sign(np.stack([found for _, found in seen]))
    same = (each == each[0]).all(0)
    assert stable[same].all()
    assert 0 < stable.sum() < len(stable)
    opposed = np.stack([found for _, found in seen[:2]])
    weak = np.abs(opposed.sum(0)) < 0.2 * np.abs(opposed).max(0)
    assert not stable[weak & ~same].any()


def test_one_prompt_cannot_be_resampled() -> None:
    experiment, _ = build("LN")
    one = experiment.on(replace(experiment.task, pairs=experiment.task.pairs[:1]))
    with pytest.raises(OptionError, match="one prompt cannot be resampled"):
        stable_signs(one, eap, eap(one), 0.95)


def test_edges_of_unstable_sign_are_out() -> None:
    experiment, _ = build("LN", 4)
    found = METHODS["eap"].find(experiment, n_edges=30, stable=0.9)
    stable = stable_signs(experiment, eap, eap(experiment), 0.9)
    assert 0 < found.details["selection"]["n_unstable"] == (~stable).sum()
    assert not (found.circuit.in_circuit & ~stable).any()
    assert found.circuit.n_edges > 0
    np.testing.assert_allclose(found.circuit.scores, eap(experiment))
    nothing = Selection(n_edges=3, allowed=np.zeros(experiment.graph.n_edges, dtype=bool))
    with pytest.raises(OptionError, match="no edge's score keeps its sign"):
        select(experiment, eap(experiment), nothing)


# --- proportions and ways -----------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_every_beginning_has_the_proportion(share: float) -> None:
    rng = np.random.default_rng(0)
    worth, helps = rng.random(200), rng.random(200) < 0.5
    order = np.argsort(-in_proportion(worth, helps, share))
    for n in range(1, 80):
        assert abs(helps[order[:n]].sum() - share * n) <= 1
    for kind in (helps, ~helps):
        assert (np.diff(worth[order[kind[order]]]) <= 0).all()


@pytest.mark.parametrize("how", ["top", "greedy", "milp"])
@pytest.mark.parametrize("asked", [{}, {"positive": 0.5}, {"stable": 0.7}, {"ranking": "signed"}])
def test_every_way_gives_connected_circuits(how: str, asked: dict[str, Any]) -> None:
    experiment, _ = build("grouped", 2, task=small_task(0, 4, (5,)))
    graph = experiment.graph
    for size in ({"n_edges": 12}, {}):
        found = METHODS["eap-ig"].find(experiment, select=how, **asked, **size)
        mask = found.circuit.in_circuit
        np.testing.assert_array_equal(prune(graph, mask), mask)
        assert 0 < mask.sum() <= size.get("n_edges", graph.n_edges)
        said = found.details.get("selection", {})
        assert ("optimal" in said) == (how == "milp")
        helps = experiment.minimised_sign * found.circuit.scores[mask] > 0
        assert said.get("positive") == (
            pytest.approx(helps.mean()) if "positive" in asked else None
        )
        if how == "milp":
            assert said["optimal"]
            assert said["score"] >= said["heuristic"] - 1e-9


def test_a_size_is_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The circuit that is given is the one that was judged."""
    solved = []

    def counted(graph: Any, scores: Any, n: int, **options: Any) -> Any:
        solved.append((scores.tobytes(), n))
        return select_optimal(graph, scores, n, **options)

    monkeypatch.setattr("acdc.methods.select.select_optimal", counted)
    experiment, _ = build("LN", 1)
    METHODS["eap"].find(experiment, select="milp")
    assert len(solved) == len(set(solved)) > 3


def test_a_program_is_worth_at_least_what_the_top_is() -> None:
    experiment, _ = build("LN", 1)
    scores = np.abs(eap_ig(experiment))
    for n in (3, 6, 12, 25):
        top, best = (
            METHODS["eap-ig"].find(experiment, select=how, n_edges=n).circuit.in_circuit
            for how in ("top", "milp")
        )
        assert scores[best].sum() >= scores[top].sum() - 1e-9


@pytest.mark.parametrize(
    ("method", "asked", "message"),
    [
        ("acdc", {"select": "milp"}, "'acdc' has no scores to choose by"),
        ("acdc", {"stable": 0.9}, "'acdc' has no scores to choose by"),
        ("ifr", {"stable": 0.9}, "'ifr' gives scores without a sign"),
        ("ifr", {"positive": 0.9}, "'ifr' gives scores without a sign"),
        ("eap", {"select": "milp", "threshold": 0.1}, "a threshold was given"),
        ("eap", {"positive": 0.5, "threshold": 0.1}, "a threshold was given"),
        ("eap", {"positive": 0.5, "ranking": "signed"}, "a ranking of its own"),
        ("eap", {"select": "best"}, "expected one of top, greedy, milp"),
        ("eap", {"stable": 0.5}, "a number above 0.5 and below 1, as 0.95"),
        ("eap", {"positive": 1.5}, "at most 1"),
    ],
)
def test_what_makes_no_sense(method: str, asked: dict[str, Any], message: str) -> None:
    experiment, _ = build("LN")
    with pytest.raises(OptionError, match=message):
        METHODS[method].find(experiment, **asked)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["discover", "ioi", "--method", "eap-ig", "--n-prompts", "8", "--n-test", "8"]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--select-seconds", "5", "--out", str(tmp_path / "no")])
    assert stopped.value.code == 2
    assert "select_seconds 5.0 does nothing without select milp" in capsys.readouterr().err
    asked = ["--select", "milp", "--stable", "0.9", "--edges", "25"]
    with pytest.raises(SystemExit) as ended:
        main([*words, *asked, "--out", str(tmp_path / "run")])
    assert ended.value.code == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["select"], run["stable"], run["ranking"]) == ("milp", 0.9, "absolute")
    assert run["selection"]["optimal"] is True
    assert run["selection"]["score"] <= run["selection"]["bound"] + 1e-6
    assert run["n_edges_kept"] <= 25
