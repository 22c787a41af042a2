"""ROC, AUROC and average precision: by hand, and against scikit-learn."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from graphs import GraphError, GraphShape, component_graph, prune, select_greedy
from graphs.known.reference import GRANULARITIES
from graphs.known.roc import (
    auroc,
    average_precision,
    best_circuit,
    best_cut,
    counts,
    items,
    mib_roc,
    roc_curve,
    sweep_roc,
    sweep_scores,
)

TOY = component_graph(GraphShape(n_layers=2, n_heads=2))
GROUPED = component_graph(GraphShape(n_layers=1, n_heads=4, n_kv_heads=2, has_mlp=False))


def mask(text: str) -> np.ndarray:
    return np.array([letter == "1" for letter in text])


# --- rankings -----------------------------------------------------------------------------


def test_ranking_by_hand() -> None:
    # cuts: {a}, {a b c}, {a b c d}; a, c true
    truth, scores = mask("1010"), [3.0, 2.0, 2.0, 1.0]
    curve = roc_curve(truth, scores)
    assert curve.fpr.tolist() == [0, 0, 0.5, 1]
    assert curve.tpr.tolist() == [0, 0.5, 1, 1]
    assert auroc(truth, scores) == 0.5 * 0.75 + 0.5 * 1  # = (2 wins + 1 win + 1/2 tie) / 4
    assert average_precision(truth, scores) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_all_scores_equal_is_chance() -> None:
    truth = mask("10000")
    assert auroc(truth, np.zeros(5)) == 0.5
    assert average_precision(truth, np.zeros(5)) == pytest.approx(0.2)


def test_best_and_worst_ranking() -> None:
    truth = mask("1100")
    assert (auroc(truth, [4, 3, 2, 1]), average_precision(truth, [4, 3, 2, 1])) == (1, 1)
    assert auroc(truth, [1, 2, 3, 4]) == 0
    assert average_precision(truth, [1, 2, 3, 4]) == pytest.approx(0.5 * 1 / 3 + 0.5 * 2 / 4)


def test_auroc_flatters_where_true_items_are_rare() -> None:
    truth = np.zeros(10_000, dtype=bool)
    truth[100:110] = True  # below a hundred wrong ones
    scores = -np.arange(10_000.0)
    assert auroc(truth, scores) > 0.989
    assert average_precision(truth, scores) < 0.06


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=40))
def test_equals_scikit_learn(rows: list[tuple[bool, int]]) -> None:
    truth, scores = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], float)
    if not truth.any() or truth.all():
        return
    assert auroc(truth, scores) == pytest.approx(metrics.roc_auc_score(truth, scores))
    assert average_precision(truth, scores) == pytest.approx(
        metrics.average_precision_score(truth, scores)
    )
    fpr, tpr, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
    curve = roc_curve(truth, scores)
    np.testing.assert_allclose(curve.fpr, fpr)
    np.testing.assert_allclose(curve.tpr, tpr)


def test_best_cut() -> None:
    # F1 of the cuts: 1/1.5, 1/2, 2/2.5, 2/3
    assert best_cut(mask("1010"), [4.0, 3.0, 2.0, 1.0]).tolist() == [True, True, True, False]
    assert best_cut(mask("1010"), [2.0, 2.0, 2.0, 1.0]).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("truth", "scores", "message"),
    [
        (mask("00"), [1, 2], "0 of 2 items are in the true circuit"),
        (mask("11"), [1, 2], "2 of 2 items are in the true circuit"),
        (mask("10"), [1, 2, 3], "scores of shape (3,) for 2 items"),
        (mask("10"), [1, np.nan], "score 1 is nan: expected finite numbers"),
        (np.array([1, 0]), [1, 2], "expected [item] bool"),
    ],
)
def test_bad_rankings_are_refused(truth: np.ndarray, scores: list[float], message: str) -> None:
    for function in (auroc, average_precision, roc_curve, best_cut):
        with pytest.raises(GraphError, match=re.escape(message)):
            function(truth, scores)


# --- sweeps -------------------------------------------------------------------------------


def test_counts_by_hand() -> None:
    found = counts(mask("11000"), mask("10110"))
    assert (found.true_positives, found.false_positives) == (1, 2)
    assert (found.false_negatives, found.true_negatives) == (1, 1)
    assert (found.tpr, found.fpr, found.f1) == (1 / 2, 2 / 3, 1 / 2.5)


def test_stairs_are_pessimistic_and_skip_dominated_circuits() -> None:
    truth = mask("11110000")
    circuits = [
        mask("11001000"),  # (1/4, 2/4)
        mask("10001100"),  # (2/4, 1/4): dominated
        mask("11101110"),  # (3/4, 3/4)
    ]
    curve = sweep_roc(truth, circuits)
    assert list(zip(curve.fpr, curve.tpr, strict=True)) == [
        (0, 0), (0.25, 0.5), (0.75, 0.75), (1, 1)
    ]  # fmt: skip
    assert curve.area == 0.5 * 0.5 + 0.25 * 0.75
    # the paper's own sum over steps: (1 - FPR) times the rise of TPR
    assert curve.area == (1 - 0.25) * 0.5 + (1 - 0.75) * 0.25


def test_sweep_ends() -> None:
    truth = mask("1100")
    assert sweep_roc(truth, []).area == 0  # only the empty and the full circuit
    assert sweep_roc(truth, [truth]).area == 1
    assert sweep_roc(truth, [mask("1111"), mask("0000")]).area == 0
    assert sweep_roc(truth, [mask("1110")]).area == 0.5
    assert sweep_roc(truth, [mask("1000")]).area == 0.5


def test_pessimistic_area_is_never_above_that_of_the_ranking() -> None:
    rng = np.random.default_rng(0)
    truth, scores = rng.random(50) < 0.3, rng.normal(size=50)
    cuts = [scores >= cut for cut in np.sort(scores)[::5]]
    assert sweep_roc(truth, cuts).area < auroc(truth, scores)
    every = [scores >= cut for cut in scores]
    assert sweep_roc(truth, every).area == pytest.approx(auroc(truth, scores))


def test_best_circuit_and_ranking_of_a_sweep() -> None:
    truth = mask("1100")
    assert best_circuit(truth, [mask("1000"), mask("1110"), mask("0000")]) == 1
    ranked = sweep_scores([0.1, 0.5, 0.2], [mask("1110"), mask("1000"), mask("0100")])
    assert ranked.tolist() == [0.5, 0.2, 0.1, 0]
    with pytest.raises(GraphError, match="2 thresholds and 1 circuits"):
        sweep_scores([0.1, 0.2], [truth])
    with pytest.raises(GraphError, match="thresholds above 0"):
        sweep_scores([0.0], [truth])


# --- what is scored -----------------------------------------------------------------------


def test_pairs_join_query_key_and_value() -> None:
    pairs = items(TOY, "node pairs")
    # input to 4 heads, 2 MLPs, logits; then 2 heads + m0 to 2 heads, m1, logits; ...
    assert len(pairs) == 7 + (2 + 3 * 4) + (2 + 2) + 1
    assert len(set(pairs.names)) == len(pairs)
    scores = np.zeros(TOY.n_edges)
    for kind, value in (("q", -3.0), ("k", 2.0), ("v", 1.0)):
        scores[TOY.edge_index(f"a0.h1->a1.h0<{kind}>")] = value
    at = pairs.names.index("a0.h1->a1.h0")
    assert pairs.scores(scores)[at] == 3
    assert pairs.scores(scores, absolute=False)[at] == 2
    assert pairs.scores(-scores, absolute=False)[at] == 3
    assert np.flatnonzero(pairs.scores(scores)).tolist() == [at]
    found = pairs.mask(TOY.edge_mask(["a0.h1->a1.h0<k>"]))
    assert np.flatnonzero(found).tolist() == [at]


def test_edges_are_themselves() -> None:
    edges = items(TOY, "edges")
    assert list(edges.names) == TOY.edge_names()
    scores = np.random.default_rng(0).normal(size=TOY.n_edges)
    np.testing.assert_array_equal(edges.scores(scores, absolute=False), scores)
    np.testing.assert_array_equal(edges.mask(scores > 0), scores > 0)


def test_nodes_score_by_the_largest_of_their_edges() -> None:
    nodes = items(TOY, "nodes")
    assert nodes.names == ("a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1")
    scores = np.zeros(TOY.n_edges)
    scores[TOY.edge_index("a0.h1->a1.h0<k>")] = -2.0
    scores[TOY.edge_index("input->a1.h0<q>")] = 1.0
    assert nodes.scores(scores).tolist() == [0, 2, 0, 2, 0, 0]
    assert nodes.scores(scores, absolute=False).tolist() == [0, 0, 0, 1, 0, 0]
    assert nodes.mask(scores != 0).tolist() == [False, True, False, True, False, False]
    assert nodes.named(["m1", "a0.h0"]).tolist() == [True, False, False, False, False, True]


def test_shared_key_value_heads_feed_every_head_of_their_group() -> None:
    pairs = items(GROUPED, "node pairs")
    found = pairs.mask(GROUPED.edge_mask(["input->a0.kv1<v>"]))
    assert [pairs.names[i] for i in np.flatnonzero(found)] == ["input->a0.h2", "input->a0.h3"]
    assert len(items(GROUPED, "edges")) == GROUPED.n_edges
    nodes = items(GROUPED, "nodes")
    assert nodes.mask(GROUPED.edge_mask(["input->a0.kv0<k>"])).tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_optional_nodes_do_not_count() -> None:
    full, fewer = items(TOY, "edges"), items(TOY, "edges", ["m0"])
    gone = set(full.names) - set(fewer.names)
    assert gone == {name for name in full.names if "m0" in name.split("->")}
    assert "m0" not in items(TOY, "nodes", ["m0"]).names
    assert not [n for n in items(TOY, "node pairs", ["a1.h0"]).names if "a1.h0" in n]
    assert len(items(GROUPED, "edges", ["a0.h2"])) == GROUPED.n_edges - 2  # h2<q>, h2->logits


def test_unknown_names_are_refused() -> None:
    with pytest.raises(GraphError, match="granularity 'heads': expected edges, node pairs, nodes"):
        items(TOY, "heads")
    with pytest.raises(GraphError, match=r"no node 'a0\.h7'; did you mean"):
        items(TOY, "nodes", ["a0.h7"])
    with pytest.raises(GraphError, match=r"'input' is none of the nodes that are scored"):
        items(TOY, "nodes").named(["input"])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_masks_and_scores_agree(granularity: str) -> None:
    scored = items(TOY, granularity)
    found = np.random.default_rng(1).random(TOY.n_edges) < 0.1
    np.testing.assert_array_equal(scored.scores(found.astype(float)) > 0, scored.mask(found))


# --- MIB ----------------------------------------------------------------------------------


def test_greedy_grows_from_the_logits() -> None:
    scores = np.zeros(TOY.n_edges)
    for name, value in {
        "input->a0.h0<q>": 9.0,  # high, but nothing reads a0.h0 yet
        "a0.h1->logits": -5.0,
        "input->a0.h1<v>": 4.0,
        "input->logits": 3.0,
        "a0.h0->a0.h1<v>": 0.0,
    }.items():
        if name in TOY.edge_names():
            scores[TOY.edge_index(name)] = value
    assert TOY.edge_names(np.flatnonzero(select_greedy(TOY, scores, 1))) == []  # pruned
    assert set(TOY.edge_names(np.flatnonzero(select_greedy(TOY, scores, 3)))) == {
        "a0.h1->logits", "input->a0.h1<v>", "input->logits"
    }  # fmt: skip
    signed = select_greedy(TOY, scores, 1, absolute=False)
    assert TOY.edge_names(np.flatnonzero(signed)) == ["input->logits"]
    assert select_greedy(TOY, scores, TOY.n_edges).all()
    assert not select_greedy(TOY, scores, 0).any()
    with pytest.raises(GraphError, match="-1 edges asked for"):
        select_greedy(TOY, scores, -1)


@pytest.mark.parametrize("graph", [TOY, GROUPED])
def test_greedy_equals_a_slow_version(graph) -> None:
    scores = np.random.default_rng(3).normal(size=graph.n_edges)
    for n in range(0, graph.n_edges, 7):
        taken = np.zeros(graph.n_edges, dtype=bool)
        for _ in range(n):
            open_nodes = {graph.n_senders, *graph.edge_sender[taken].tolist()}
            readers = [
                r for r in range(len(graph.receivers)) if open_nodes & set(graph.fed_by(r).tolist())
            ]
            free = np.isin(graph.edge_receiver, readers) & ~taken
            taken[np.argmax(np.where(free, np.abs(scores), -1))] = True
        np.testing.assert_array_equal(select_greedy(graph, scores, n), prune(graph, taken))


def test_mib_roc_by_hand() -> None:
    # one layer, one head, no MLP: input->a0.h0<q,k,v>, input->logits, a0.h0->logits
    graph = component_graph(GraphShape(n_layers=1, n_heads=1, has_mlp=False))
    truth = graph.edge_mask(["input->a0.h0<v>", "a0.h0->logits"])
    order = ["a0.h0->logits", "input->logits", "input->a0.h0<v>", "input->a0.h0<k>",
             "input->a0.h0<q>"]  # fmt: skip
    scores = np.zeros(5)
    for rank, name in enumerate(order):
        scores[graph.edge_index(name)] = 5 - rank
    # greedy sizes ceil(k * 5): 1 (pruned to none), 2 (pruned to input->logits), 3, 5
    curve = mib_roc(graph, truth, scores, fractions=(0.2, 0.4, 0.6, 1.0))
    assert curve.fpr.tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1])
    assert curve.tpr.tolist() == [0, 0, 1, 1]
    assert curve.area == pytest.approx(2 / 3)
    # no anchors: a grid that stops early is stretched, one that starts late loses what it skips
    assert mib_roc(graph, truth, scores, fractions=(0.4, 0.6)).area == 0
    assert mib_roc(graph, truth, scores, fractions=(0.6, 0.8)).fpr.tolist() == [0.5, 1]
    assert mib_roc(graph, truth, scores, fractions=(0.5, 1.0)).tpr.tolist() == [1, 1]  # 2.5: 3
    assert mib_roc(graph, truth, scores, fractions=(0.6, 1.0)).area == pytest.approx(2 / 3)
