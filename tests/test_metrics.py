"""Metrics against their formulas, worked out by hand or by the oracle."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import LOWER_IS_BETTER, VOCAB, Oracle, small_model, small_task
from oracle import METRICS as PLAIN

from acdc.engine.experiment import Experiment
from acdc.engine.metrics import METRICS, Targets, get_metric
from acdc.errors import TaskError, UnknownNameError
from acdc.tasks.base import Pair, Task

MODEL = small_model("LN", 0, d_model=10)  # no other test builds this architecture


def pair(answers: tuple[int, ...], wrong: tuple[int, ...] = (), last: int = 3) -> Pair:
    return Pair((1, 2, last), (1, 4, last), answers, wrong)


def targets_of(pairs: list[Pair], metric: str) -> Targets:
    (batch,) = Experiment(MODEL, Task("t", tuple(pairs)), get_metric(metric)).batches
    return batch.targets


def values(metric: str, logits: torch.Tensor, pairs: list[Pair]) -> torch.Tensor:
    """Metric of whole-vocabulary logits ``[row, vocab]``, as the engine would measure it."""
    targets = targets_of(pairs, metric)
    chosen = get_metric(metric)
    return chosen(logits if chosen.whole_vocab else logits.gather(1, targets.tokens), targets)


def logits_with(**named: float) -> torch.Tensor:
    logits = torch.zeros(1, VOCAB)
    for token, value in named.items():
        logits[0, int(token[1:])] = value
    return logits


def test_every_metric_has_a_plain_formula_and_the_same_sense() -> None:
    assert set(METRICS) == set(PLAIN)
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.sign == (1 if LOWER_IS_BETTER[name] else -1)


def test_logit_diff_is_the_difference_of_means() -> None:
    logits = logits_with(t5=4.0, t6=2.0, t7=1.0)
    assert values("logit_diff", logits, [pair((5,), (7,))]).tolist() == [3.0]
    assert values("logit_diff", logits, [pair((5, 6), (7,))]).tolist() == [2.0]
    assert values("logit_diff", logits, [pair((5,), (6, 7, 8))]).tolist() == [3.0]


def test_prob_diff_is_the_difference_of_sums() -> None:
    logits = logits_with(t5=4.0, t6=2.0, t7=1.0)
    total = math.exp(4) + math.exp(2) + math.exp(1) + VOCAB - 3
    by_hand = (math.exp(4) + math.exp(2) - math.exp(1) - 1) / total
    assert float(values("prob_diff", logits, [pair((5, 6), (7, 8))])) == pytest.approx(by_hand)


def test_nll_sums_the_answers_probabilities() -> None:
    uniform = torch.zeros(1, VOCAB)
    one = float(values("nll", uniform, [pair((5,))]))
    four = float(values("nll", uniform, [pair((5, 6, 7, 8))]))
    assert one == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert four == pytest.approx(math.log(VOCAB / 4), rel=1e-6)


def test_nll_of_an_impossible_answer_is_exact() -> None:
    """A probability below float32's smallest number has a log all the same."""
    value = float(values("nll", logits_with(t6=1000.0), [pair((5,))]))
    assert value == pytest.approx(1000)
    value = float(values("nll", logits_with(t6=1000.0), [pair((5, 7))]))
    assert value == pytest.approx(1000 - math.log(2))


def test_nll_has_a_gradient_at_an_impossible_answer() -> None:
    logits = logits_with(t6=1000.0).requires_grad_(True)
    values("nll", logits, [pair((5,))]).sum().backward()
    assert logits.grad is not None
    assert float(logits.grad[0, 5]) == pytest.approx(-1)
    assert float(logits.grad[0, 6]) == pytest.approx(1)


def test_kl_is_not_divided_by_the_vocabulary() -> None:
    """MIB's bug: its KL is a mean over the vocabulary (FACTS section 5)."""
    (batch,) = Experiment(MODEL, Task("t", (pair((5,)),)), get_metric("kl")).batches
    clean = batch.targets.clean
    assert clean is not None
    p = clean.exp()
    uniform = torch.zeros(1, VOCAB)
    by_hand = float((p * (clean + math.log(VOCAB))).sum())
    assert float(get_metric("kl")(uniform, batch.targets)) == pytest.approx(by_hand, rel=1e-5)
    assert by_hand > 0.05


@torch.no_grad()
def test_kl_is_exact_over_a_large_vocabulary() -> None:
    clean, logits = torch.randn(2, 16, 50_257, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(16, 1)
    targets = Targets(nothing.long(), nothing, nothing, torch.log_softmax(clean, -1))
    p, q = (torch.log_softmax(x.double(), -1) for x in (clean, logits))
    found = get_metric("kl")(logits, targets).double()
    np.testing.assert_allclose(found, (p.exp() * (p - q)).sum(-1), rtol=1e-6)


def test_kl_of_the_clean_run_is_zero_and_does_not_see_a_shift() -> None:
    experiment = Experiment(MODEL, Task("t", (pair((5,)),)), get_metric("kl"))
    assert experiment.plain("clean") == pytest.approx(0, abs=1e-6)
    clean = experiment.batches[0].targets.clean
    assert clean is not None
    shifted = get_metric("kl")(clean + 7.0, experiment.batches[0].targets)
    assert float(shifted) == pytest.approx(0, abs=2e-6)


def test_mse_is_the_mean_square_over_the_vocabulary() -> None:
    (batch,) = Experiment(MODEL, Task("t", (pair((5,)),)), get_metric("mse")).batches
    clean = batch.targets.clean
    assert clean is not None
    assert clean.shape == (1, VOCAB)
    shifted = clean.clone()
    shifted[0, 3] += 2.0
    shifted[0, 7] -= 1.0
    assert float(get_metric("mse")(shifted, batch.targets)) == pytest.approx(5 / VOCAB)
    assert float(get_metric("mse")(clean + 3.0, batch.targets)) == pytest.approx(9)


@pytest.mark.parametrize("metric", ["kl", "mse"])
def test_comparing_with_the_clean_run_needs_no_answers(metric: str) -> None:
    rows = (Pair((1, 2, 3), (1, 4, 5), scored=(0, 2)), Pair((1, 2, 3), (4, 4, 5)))
    experiment = Experiment(MODEL, Task("t", rows), get_metric(metric))
    assert experiment.n_rows == 3
    assert experiment.plain("clean") == pytest.approx(0, abs=1e-6)
    wanted = []
    for row in rows:
        clean, corrupt = (
            MODEL.unembed(MODEL.forward(torch.tensor([t])).final)[0].double().numpy()
            for t in (row.clean, row.corrupt)
        )
        wanted += [PLAIN[metric](corrupt[at], clean[at], row) for at in row.scored]
    assert experiment.plain("corrupt") == pytest.approx(np.mean(wanted), abs=1e-5)


@pytest.mark.parametrize("metric", ["nll", "logit_diff", "prob_diff"])
def test_metrics_of_answers_need_them(metric: str) -> None:
    task = Task("t", (pair((5,), (6,)), Pair((1, 2), (1, 3))))
    with pytest.raises(TaskError, match=f"row 2: metric '{metric}' scores answers and the pair h"):
        _ = Experiment(MODEL, task, get_metric(metric)).batches


def test_answers_hold_at_every_scored_position() -> None:
    rows = (pair((5,), (6,)), pair((7, 8), (9,), last=4))

    def scored_at(*positions: int) -> Task:
        return Task("t", tuple(replace(row, scored=positions) for row in rows))

    for metric in METRICS:
        together, *single = (
            Experiment(MODEL, scored_at(*positions), get_metric(metric)).plain("corrupt")
            for positions in ((0, 2), (0,), (2,))
        )
        assert together == pytest.approx(np.mean(single), abs=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_padding_of_unequal_answers_is_not_counted(metric: str) -> None:
    """Token 0 pads: a huge logit there counts only where the vocabulary is summed over."""
    rows = [pair((5,), (6,)), pair((5, 7, 8), (6, 9)), pair((7,), (6, 8, 9))]
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    together = values(metric, logits, rows)
    for i, row in enumerate(rows):
        if get_metric(metric).compares is None:  # else the reference is the model's own run
            alone = values(metric, logits[i : i + 1], [row])
            torch.testing.assert_close(together[i : i + 1], alone)
    if metric == "logit_diff":
        logits[:, 0] = 100.0
        torch.testing.assert_close(values(metric, logits, rows), together)


def test_token_zero_counts_where_it_is_an_answer() -> None:
    rows = [pair((0,), (6,)), pair((5, 7), (6,))]
    logits = torch.zeros(2, VOCAB)
    logits[:, 0] = 3.0
    assert values("logit_diff", logits, rows).tolist() == [3.0, 0.0]


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=15, derandomize=True, deadline=None, database=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 4))
def test_plain_runs_measure_what_the_formulas_say(metric: str, seed: int, n: int) -> None:
    task = small_task(seed, n, (3, 4))
    experiment = Experiment(MODEL, task, get_metric(metric), batch_size=2)
    noising = Oracle(MODEL, task, metric).without(())
    denoising = Oracle(MODEL, task, metric, direction="denoising").without(())
    assert experiment.plain("clean") == pytest.approx(noising, abs=1e-5)
    assert experiment.plain("corrupt") == pytest.approx(denoising, abs=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_reported_value_is_the_mean_over_prompts(metric: str) -> None:
    task = small_task(4, 5, (3, 4, 6))
    mean = Experiment(MODEL, task, get_metric(metric)).plain("corrupt")
    alone = [
        Experiment(MODEL, Task("one", (p,)), get_metric(metric)).plain("corrupt")
        for p in task.pairs
    ]
    assert mean == pytest.approx(np.mean(alone), abs=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_extra_scenario_axes_are_kept(metric: str) -> None:
    rows = [pair((5,), (6,)), pair((5, 7), (6, 9))]
    logits = torch.randn(3, 2, VOCAB, generator=torch.Generator().manual_seed(1))
    targets, chosen = targets_of(rows, metric), get_metric(metric)
    if not chosen.whole_vocab:
        logits = logits[:, torch.arange(2)[:, None], targets.tokens]
    together = chosen(logits, targets)
    assert together.shape == (3, 2)
    for scenario in range(3):
        torch.testing.assert_close(together[scenario], chosen(logits[scenario], targets))


@pytest.mark.parametrize(
    ("direction", "sense"), [("noising", 1), ("denoising", -1)], ids=["noising", "denoising"]
)
def test_sign_of_what_the_search_minimises(direction: str, sense: int) -> None:
    for name, metric in METRICS.items():
        experiment = Experiment(MODEL, small_task(0), get_metric(name), direction=direction)
        assert experiment.minimised_sign == sense * metric.sign


@pytest.mark.parametrize("metric", ["logit_diff", "prob_diff"])
def test_differences_need_wrong_answers(metric: str) -> None:
    task = Task("t", (pair((5,), (6,)), pair((5,))))
    with pytest.raises(TaskError, match=f"row 2: metric '{metric}' compares answers"):
        _ = Experiment(MODEL, task, get_metric(metric)).batches


@pytest.mark.parametrize("metric", ["kl", "nll"])
def test_other_metrics_do_not_need_wrong_answers(metric: str) -> None:
    task = Task("t", (pair((5,), (6,)), pair((5,))))
    assert math.isfinite(Experiment(MODEL, task, get_metric(metric)).plain("corrupt"))


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="logit_diff"):
        get_metric("logit-diff")
