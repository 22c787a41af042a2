"""Attribution against finite differences of the oracle, and what must hold of any gradient."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import FAMILIES, METRICS, Oracle, small_model, small_task
from test_parity import experiment as parity_experiment

from acdc.engine import attribution
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.work import Work
from acdc.errors import OptionError
from acdc.methods.eap import Integration, clean_corrupted, eap, eap_ig
from acdc.methods.select import Selection, select
from acdc.models.lowering import LoweredModel
from acdc.models.lowering.norm import Norm
from acdc.tasks.base import Task

FLOAT32_INSIDE = ("Qwen3", "Gemma2", "Gemma3", "Olmo2", "Phi3")
"""Their norms compute in float32 whatever the model's type."""
STEP = {"Qwen3": 1e-2, "OPT": 1e-5}  # of finite differences, else 3e-3; OPT's ReLU has a kink
METHODS = (eap, eap_ig, clean_corrupted)


def build(
    family: str, seed: int = 0, metric: str = "logit_diff", **options: Any
) -> tuple[Experiment, Oracle]:
    shape = {k: options.pop(k) for k in ("split_qkv", "split_embed", "n_heads") if k in options}
    dtype = torch.float32 if family in FLOAT32_INSIDE else torch.float64
    model = small_model(family, seed, dtype=dtype, **shape)
    task = options.pop("task", None) or small_task(seed, 2, (5,))
    fields = {k: v for k, v in options.items() if k in ("intervention", "direction")}
    slow = Oracle(model, task, metric, **fields)
    return Experiment(model, task, get_metric(metric), **options), slow


def assert_close(
    experiment: Experiment, found: np.ndarray, wanted: dict[str, float], part: float = 1e-3
) -> None:
    """Compare by name; differences as a part of the largest score."""
    largest = max(map(abs, wanted.values()))
    assert largest > 1e-3, "the case shows nothing"
    for edge, score in zip(experiment.graph.edge_names(), found, strict=True):
        assert abs(score - wanted[edge]) < part * largest, edge


# --- finite differences -------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("family", FAMILIES)
def test_eap_is_the_derivative_of_ablating_an_edge(family: str, direction: str) -> None:
    experiment, slow = build(family, direction=direction)
    wanted = oracle.edge_scores_by_finite_differences(slow, STEP.get(family, 3e-3))
    assert_close(experiment, eap(experiment), wanted)


@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize("intervention", ["resample", "zero"])
def test_every_metric_and_intervention(metric: str, intervention: str) -> None:
    options = {"intervention": intervention, "direction": "denoising"}  # KL is flat at clean
    experiment, slow = build("LN", 3, metric, **options)
    assert_close(experiment, eap(experiment), oracle.edge_scores_by_finite_differences(slow))


@pytest.mark.parametrize("metric", ["kl", "mse"])
def test_several_scored_positions_in_bidirectional_models(metric: str) -> None:
    task = small_task(3, 3, (5,), most_scored=4)
    assert any(len(pair.scored) > 1 for pair in task.pairs)
    experiment, slow = build("bidirectional", 3, metric, task=task, direction="denoising")
    assert_close(experiment, eap(experiment), oracle.edge_scores_by_finite_differences(slow))


@pytest.mark.parametrize("family", ["LN", "grouped rotary", "GPTNeoX", "Gemma2"])
def test_coarse_receivers_and_split_embeddings(family: str) -> None:
    experiment, slow = build(family, 1, split_qkv=False, split_embed=True, n_heads=4)
    assert_close(experiment, eap(experiment), oracle.edge_scores_by_finite_differences(slow))


def test_kl_has_no_gradient_at_the_clean_run() -> None:
    experiment, _ = build("LN", metric="kl")
    assert np.abs(eap(experiment)).max() < 1e-5
    assert np.abs(eap_ig(experiment)).max() > 1e-3


@pytest.mark.parametrize("family", ["LN", "Gemma2"])
def test_eap_predicts_what_small_corruptions_do(family: str) -> None:
    """The score is an estimate of the metric's change, sign and size, to first order."""
    experiment, slow = build(family, 2)
    scores = dict(zip(experiment.graph.edge_names(), eap(experiment), strict=True))
    edge = max(scores, key=lambda e: abs(scores[e]))
    change = slow.metric({edge: 0.01}) - slow.metric({})
    assert change == pytest.approx(0.01 * scores[edge], rel=0.1)


# --- planted bugs -------------------------------------------------------------------------


@pytest.mark.parametrize("bug", ["no norm", "wrong sign", "post-norm ignored"])
def test_finite_differences_see_planted_bugs(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, slow = build("Gemma2" if bug == "post-norm ignored" else "LN")
    wanted = oracle.edge_scores_by_finite_differences(slow)
    assert_close(experiment, eap(experiment), wanted)
    if bug == "no norm":
        monkeypatch.setattr(Norm, "vjp", lambda self, x, g: g)
    elif bug == "wrong sign":
        monkeypatch.setattr(attribution, "product", _negated(attribution.product))
    else:
        monkeypatch.setattr(Norm, "jvp", lambda self, x, t: t)
    with pytest.raises(AssertionError):
        assert_close(experiment, eap(experiment), wanted)


def _negated(function: Any) -> Any:
    return lambda *arguments: -function(*arguments)


# --- integrated gradients -----------------------------------------------------------------


def gap(slow: Oracle, experiment: Experiment) -> float:
    """Metric of the other run minus metric of the base run."""
    run = {"noising": ("corrupt", "clean"), "denoising": ("clean", "corrupt")}
    other, base = run[experiment.direction]
    return experiment.plain(other) - experiment.plain(base)


def total_into(experiment: Experiment, scores: np.ndarray, receiver: str) -> float:
    graph = experiment.graph
    return float(scores[graph.edge_receiver == graph.receiver_index[receiver]].sum())


def total_from(experiment: Experiment, scores: np.ndarray, sender: str) -> float:
    graph = experiment.graph
    return float(scores[graph.edge_sender == graph.sender_index[sender]].sum())


@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
@pytest.mark.parametrize("family", ["LN", "gated rotary", "RMS", "GPTNeoX", "Gemma2"])
def test_edges_out_of_the_input_add_up_to_the_metrics_gap(family: str, metric: str) -> None:
    """Completeness (Sundararajan et al. 2017), which holds for every model.

    All that the input does goes through its edges, so the gradients at their receivers add up
    to d metric / d embedding; its integral along the path is the gap.  Left Riemann sums: the
    error falls as 1 / steps.
    """
    for direction in ("noising", "denoising"):
        experiment, slow = build(family, 1, metric, direction=direction)
        wanted = gap(slow, experiment)
        error = {
            steps: abs(
                total_from(experiment, eap_ig(experiment, Integration(steps)), "input") - wanted
            )
            for steps in (16, 64)
        }
        assert error[64] < 0.1 * max(abs(wanted), 0.3)
        assert error[64] < 0.5 * error[16] or error[64] < 1e-3


def linear_until_the_logits(seed: int) -> LoweredModel:
    """No norm, no MLP, no queries: the final stream is linear in the embeddings."""
    model = small_model("attention only", seed, dtype=torch.float64)
    layers = []
    for layer in model.layers:
        w, b = dict(layer.attention.W), dict(layer.attention.b)
        w["q"] = torch.zeros_like(w["q"])
        b["q"] = None if b["q"] is None else torch.zeros_like(b["q"])
        attention = dataclasses.replace(layer.attention, W=w, b=b)
        norm = Norm(torch.nn.Identity(), "none", None, 0.0)
        layers.append(dataclasses.replace(layer, attention=attention, ln1=norm))
    return dataclasses.replace(model, layers=tuple(layers))


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_edges_into_the_logits_add_up_where_the_final_stream_is_linear(metric: str) -> None:
    """The differences of all senders add up to that of the final stream, b_O cancels.

    So their scores' sum is the mean over the path of (gradient . difference of the final
    stream), which is the path integral exactly when the final stream moves on a straight line.
    """
    task = small_task(5, 3, (4, 5))
    experiment = Experiment(linear_until_the_logits(0), task, get_metric(metric))
    wanted = experiment.plain("corrupt") - experiment.plain("clean")
    error = {
        steps: abs(
            total_into(experiment, eap_ig(experiment, Integration(steps)), "logits") - wanted
        )
        for steps in (50, 200)
    }
    assert error[200] < 0.02 * max(abs(wanted), 0.3)
    assert error[200] < 0.3 * error[50]


def test_edges_into_the_logits_add_up_at_once_where_the_metric_is_linear() -> None:
    model = linear_until_the_logits(0)
    model = dataclasses.replace(model, ln_final=Norm(torch.nn.Identity(), "none", None, 0.0))
    experiment = Experiment(model, small_task(5, 3, (4, 5)), get_metric("logit_diff"))
    wanted = experiment.plain("corrupt") - experiment.plain("clean")
    for scores in (
        eap(experiment),
        eap_ig(experiment, Integration(3)),
        clean_corrupted(experiment),
    ):
        assert total_into(experiment, scores, "logits") == pytest.approx(wanted, abs=1e-6)


def test_edges_into_the_logits_do_not_add_up_in_other_models() -> None:
    experiment, slow = build("LN", 1)
    into = total_into(experiment, eap_ig(experiment, Integration(100)), "logits")
    assert abs(into - gap(slow, experiment)) > 0.01 * abs(gap(slow, experiment))


def test_first_integration_step_is_the_other_run() -> None:
    """With one step the gradient is taken at alpha = 0: EAP with the gradient at corrupt."""
    experiment, _ = build("LN", 1)
    both = clean_corrupted(experiment)
    at_other = eap_ig(experiment, Integration(1))
    np.testing.assert_allclose((eap(experiment) + at_other) / 2, both, atol=1e-6)
    reverse = eap(dataclasses.replace(experiment, direction="denoising"))
    np.testing.assert_allclose(at_other, -reverse, atol=1e-6)


# --- chunks, batches, means ---------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("family", ["LN", "grouped", "GPTNeoX", "Gemma2"])
def test_memory_bound_gives_the_same_scores(family: str, method: Any) -> None:
    experiment, _ = build(family, 4)
    whole = method(experiment)
    for memory in (1, 5_000, 20_000):
        np.testing.assert_allclose(
            method(experiment, work=Work(memory)), whole, atol=2e-6 * np.abs(whole).max()
        )


@pytest.mark.parametrize("memory", [1 << 30, 1])
def test_gradients_at_five_points_share_their_products_whatever_the_memory(
    memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory has prompts wait, not points: what is added up together does not depend on it."""
    experiment, _ = build("LN", 1)
    seen: list[int] = []
    product = attribution.product
    monkeypatch.setattr(attribution, "product", lambda *rows: seen.append(1) or product(*rows))
    counts = []
    for steps in (1, 5):
        seen.clear()
        eap_ig(experiment, Integration(steps), Work(memory))
        counts.append(len(seen))
    assert counts[1] == counts[0] > 0


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_scores_are_means_over_prompts_of_any_length(method: Any) -> None:
    task = small_task(7, 5, (3, 4, 6))
    assert len({len(p.clean) for p in task.pairs}) > 1
    experiment, _ = build("LN", 7, task=task)
    alone = [
        method(dataclasses.replace(experiment, task=Task("one", (pair,)))) for pair in task.pairs
    ]
    wanted = np.mean(alone, axis=0)
    turned = Task("turned", tuple(reversed(task.pairs)))
    for batch_size in (1, 2, 32):
        for prompts in (task, turned):
            other = dataclasses.replace(experiment, batch_size=batch_size, task=prompts)
            np.testing.assert_allclose(method(other), wanted, atol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_same_prompts_have_no_scores(method: Any) -> None:
    experiment, _ = build("LN", 2)
    pairs = tuple(dataclasses.replace(p, corrupt=p.clean) for p in experiment.task.pairs)
    same = dataclasses.replace(experiment, task=Task("same", pairs))
    assert not method(same).any()


# --- side effects -------------------------------------------------------------------------


def parameters(model: LoweredModel) -> list[torch.Tensor]:
    tensors = [model.W_U]
    for layer in model.layers:
        tensors += [*layer.attention.W.values(), layer.attention.W_O]
        tensors += [b for b in layer.attention.b.values() if b is not None]
    for norm in (model.ln_final, *(layer.ln1 for layer in model.layers)):
        tensors += list(norm.module.parameters())
    return tensors


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_parameters_are_left_alone(method: Any) -> None:
    experiment, _ = build("LN")
    before = [x.clone() for x in parameters(experiment.model)]
    method(experiment)
    for old, new in zip(before, parameters(experiment.model), strict=True):
        assert torch.equal(old, new)
        assert not new.requires_grad
        assert new.grad is None
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_no_global_random_state_is_used(method: Any) -> None:
    experiment, _ = build("LN")
    states = oracle.random_states()
    first = method(experiment)
    np.testing.assert_array_equal(method(experiment), first)
    assert oracle.random_states() == states


def test_scores_do_not_depend_on_the_callers_gradient_mode() -> None:
    experiment, _ = build("LN", 1)
    wanted = eap(experiment)
    with torch.no_grad():
        np.testing.assert_array_equal(eap(experiment), wanted)


@pytest.mark.parametrize(
    ("method", "passes"),
    [(eap, 1), (functools.partial(eap_ig, options=Integration(4)), 4), (clean_corrupted, 2)],
)
def test_progress_counts_the_passes(method: Any, passes: int) -> None:
    experiment, _ = build("LN", 1)
    seen: list[int] = []
    method(experiment, work=Work(progress=seen.append))
    assert sum(seen) == passes * len(experiment.task)


def test_a_method_that_sees_nothing_says_so() -> None:
    experiment = parity_experiment("ln2", "kl")
    nothing = np.zeros(experiment.graph.n_edges)
    with pytest.raises(OptionError, match=r"score 0 under metric 'kl'.*choose eap-ig"):
        select(experiment, nothing, Selection(n_edges=5))
