"""CPR and CMD: areas by hand, circuits by definition, per-prompt values by single prompts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from test_parity import experiment as parity_experiment

from acdc.engine.experiment import Experiment
from acdc.errors import OptionError
from acdc.measure.curves import (
    AXES,
    MEASURES,
    SIZES,
    Curve,
    ranked_scores,
    score_curve,
    smallest_faithful,
    sweep_curve,
)
from acdc.measure.evaluation import Evaluator
from acdc.methods.eap import eap
from acdc.tasks import Task
from graphs import prune, select_top, top_edges
from graphs.known.roc import MIB_FRACTIONS


def curve(faithfulness, fractions, n_edges, n_total=100, n_prompts=2, **options) -> Curve:
    """A curve of prompts that all have the same values: full 3, empty 1."""
    values = 1 + 2 * np.asarray(faithfulness, dtype=float)
    asked = tuple(math.floor(k * n_total) for k in fractions)
    return Curve(
        "signed", tuple(fractions), asked, tuple(n_edges), n_total,
        np.repeat(values[:, None], n_prompts, axis=1), np.full(n_prompts, 3.0), np.ones(n_prompts),
        **options,
    )  # fmt: skip


# --- areas by hand ------------------------------------------------------------------------


def test_areas_by_hand() -> None:
    some = curve([0.0, 0.5, 1.5], (0.1, 0.5, 1.0), (4, 40, 100))
    log = math.log
    wanted = {
        ("CPR", "linear", "nominal"): 0.4 * 0.25 + 0.5 * 1.0,
        ("CMD", "linear", "nominal"): 0.4 * 0.75 + 0.5 * 0.5,
        ("CPR", "linear", "actual"): 0.36 * 0.25 + 0.6 * 1.0,
        ("CMD", "linear", "actual"): 0.36 * 0.75 + 0.6 * 0.5,
        ("CPR", "log", "nominal"): log(5) * 0.25 + log(2) * 1.0,
        ("CMD", "log", "nominal"): log(5) * 0.75 + log(2) * 0.5,
        ("CPR", "log", "actual"): log(10) * 0.25 + log(2.5) * 1.0,
        ("CMD", "log", "actual"): log(10) * 0.75 + log(2.5) * 0.5,
    }
    assert {(a.measure, a.axis, a.size): a.value for a in some.areas()} == pytest.approx(wanted)
    for area in some.areas():  # prompts that agree leave nothing to resample
        assert area.low == pytest.approx(area.value) == pytest.approx(area.high)
        assert area.ranking == "signed"


def test_a_perfect_circuit_at_every_size() -> None:
    perfect = curve(np.ones(10), MIB_FRACTIONS, np.ceil(np.array(MIB_FRACTIONS) * 100).astype(int))
    assert perfect.area("CPR").value == pytest.approx(0.999)  # no (0, 0) point
    assert perfect.area("CPR", "log").value == pytest.approx(math.log(1000))
    assert perfect.area("CMD").value == 0
    assert perfect.area("CMD", "log", "actual").value == 0


def test_no_edge_counts_as_one_on_the_log_axis() -> None:
    some = curve([1.0, 1.0], (0.1, 1.0), (0, 100))
    assert some.area("CPR", "log", "actual").value == pytest.approx(math.log(100))
    assert some.area("CPR", "linear", "actual").value == 1.0


def test_what_mib_reports() -> None:
    some = curve([0, 1], (0.5, 1.0), (50, 100))
    assert [(a.measure, a.axis, a.size) for a in some.areas() if a.is_mib] == [
        ("CPR", "linear", "nominal")
    ]
    absolute = replace(some, ranking="absolute")
    assert [a.measure for a in absolute.areas() if a.is_mib] == ["CMD"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("AUC", "linear", "nominal"), "measure 'AUC': expected CPR or CMD"),
        (("CPR", "log10", "nominal"), "axis 'log10': expected linear or log"),
        (("CPR", "log", "weighted"), "size 'weighted': expected nominal or actual"),
    ],
)
def test_unknown_conventions_are_refused(names: tuple[str, str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        curve([0, 1], (0.5, 1.0), (50, 100)).area(*names)


# --- bootstrap ----------------------------------------------------------------------------


def test_bootstrap_is_of_the_ratio_of_means() -> None:
    # two prompts: (full, empty, circuit) = (2, 0, 2) and (4, 0, 1); faithfulness 1 and 1/4
    some = Curve(
        "signed", (1.0,), (1,), (1,), 1, np.array([[2.0, 1.0]]), np.array([2.0, 4.0]), np.zeros(2),
        n_resamples=4000, seed=3,
    )  # fmt: skip
    assert some.faithfulness.tolist() == [3 / 6]  # not the mean of 1 and 1/4
    drawn, count = np.unique(some.resampled.round(6), return_counts=True)
    assert drawn.tolist() == [0.25, 0.5, 1.0]
    np.testing.assert_allclose(count / 4000, [0.25, 0.5, 0.25], atol=0.03)
    (point,) = some.points()
    assert (point.low, point.high) == (0.25, 1.0)


def test_bootstrap_is_seeded_and_leaves_the_global_state_alone() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 20))
    some = Curve(
        "signed",
        (0.1, 0.5, 1.0),
        (1, 5, 10),
        (1, 5, 10),
        10,
        values,
        values[2],
        rng.normal(size=20),
    )
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    again = replace(some)
    np.testing.assert_array_equal(some.resampled, again.resampled)
    assert some.areas() == again.areas()
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert not np.array_equal(some.resampled, replace(some, seed=1).resampled)
    for area in some.areas():
        assert area.low <= area.value <= area.high


# --- on a model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(parity_experiment("ln2", "logit_diff"))


@pytest.fixture(scope="module")
def scores(evaluator: Evaluator) -> np.ndarray:
    return eap(evaluator.experiment)


def single(experiment: Experiment, i: int) -> Experiment:
    return replace(experiment, task=Task("one", (experiment.task.pairs[i],)))


@pytest.mark.parametrize("metric", ["logit_diff", "kl"])
def test_values_are_those_of_single_prompts(metric: str) -> None:
    experiment = replace(parity_experiment("ln2", metric), batch_size=5)
    evaluator = Evaluator(experiment)
    mask = np.random.default_rng(0).random(experiment.graph.n_edges) < 0.7
    values = evaluator.values(mask)
    assert values.shape == (len(experiment.task),)
    for i in (0, 7, 23):  # prompts of one length stay in order
        alone = Evaluator(single(experiment, i)).evaluate(mask).metric_circuit
        assert values[i] == pytest.approx(alone, abs=1e-5)
    assert values.mean() == evaluator.evaluate(mask).metric_circuit
    assert evaluator.full == evaluator.full_values.mean()


@pytest.mark.parametrize("ranking", ["signed", "absolute"])
def test_curve_follows_the_definition(evaluator, scores, ranking: str) -> None:
    graph = evaluator.experiment.graph
    found = score_curve(evaluator, scores, ranking)
    # logit_diff: higher is better, so that what helps has a negative score when ablated
    ranked = np.abs(scores) if ranking == "absolute" else -scores
    for k, point in zip(MIB_FRACTIONS, found.points(), strict=True):
        mask = prune(graph, top_edges(ranked, math.floor(k * graph.n_edges)))
        assert point.fraction == k
        assert point.n_asked == math.floor(k * graph.n_edges)
        assert point.n_edges == mask.sum() <= point.n_asked
        assert point.faithfulness == pytest.approx(evaluator.faithfulness(mask), abs=1e-9)
        assert point.low <= point.high
    assert found.points()[-1].faithfulness == 1
    assert len(found.areas()) == len(MEASURES) * len(AXES) * len(SIZES)


def test_sweep_takes_the_largest_circuit_that_fits(evaluator, scores) -> None:
    graph = evaluator.experiment.graph
    masks = [select_top(graph, scores, n) for n in (40, 10, 3)]
    found = sweep_curve(evaluator, masks, fractions=(0.01, 0.2, 0.5, 1.0))
    allowed = [math.floor(k * graph.n_edges) for k in (0.01, 0.2, 0.5, 1.0)]
    sizes = [0, *sorted(int(m.sum()) for m in masks), graph.n_edges]
    assert list(found.n_edges) == [max(s for s in sizes if s <= n) for n in allowed]
    assert found.ranking == "sweep"
    assert found.faithfulness[-1] == 1
    assert found.faithfulness[0] == 0


def test_bad_requests(evaluator, scores) -> None:
    with pytest.raises(OptionError, match=r"fractions .*expected ascending numbers above 0"):
        score_curve(evaluator, scores, fractions=(0.5, 0.5))
    with pytest.raises(OptionError, match="expected ascending numbers above 0, at most 1"):
        score_curve(evaluator, scores, fractions=(0, 0.5))
    with pytest.raises(OptionError, match="ranking 'top': expected absolute or signed"):
        score_curve(evaluator, scores, "top")
    pairs = tuple(replace(p, corrupt=p.clean) for p in evaluator.experiment.task.pairs[:2])
    same = Evaluator(replace(evaluator.experiment, task=Task("same", pairs)))
    with pytest.raises(OptionError, match="with every edge and with none: faithfulness is undef"):
        score_curve(same, scores)


def test_smallest_faithful(evaluator, scores) -> None:
    ranked = ranked_scores(evaluator.experiment, scores, "absolute")
    mask = smallest_faithful(evaluator, ranked, 0.9)
    assert evaluator.faithfulness(mask) >= 0.9
    graph = evaluator.experiment.graph
    smaller = select_top(graph, ranked, int(mask.sum()) - 2, absolute=False)
    assert evaluator.faithfulness(smaller) < 0.9
    said = list[str]()
    size = int(mask.sum())
    again = smallest_faithful(evaluator, ranked, 0.9, below=size + 1, note=said.append)
    assert np.array_equal(again, mask)
    assert "trying 1 edges" in said
    n_tried = len(said)
    assert smallest_faithful(evaluator, ranked, 0.9, below=size // 2, note=said.append).all()
    assert len(said) - n_tried < n_tried


def test_draws_without_a_gap_are_left_out_of_intervals() -> None:
    values = np.array([[1.0, 0.5, 0.0], [1.0, 0.0, 0.0]])
    full, empty = np.array([1.0, 0.0, 0.0]), np.zeros(3)
    curve = Curve("signed", (0.5, 1.0), (1, 2), (1, 2), 2, values, full, empty)
    assert np.isnan(curve.resampled).any()  # only the first prompt has a gap
    for point in curve.points():
        assert np.isfinite([point.low, point.high]).all()
    assert curve.points()[0].high == 2  # the first prompt once, the second twice
    assert np.isfinite([curve.area("CPR").high, curve.area("CMD").high]).all()
