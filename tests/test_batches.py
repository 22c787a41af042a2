"""A batch is its prompts: what is measured on many is the mean of what is measured on each.

Prompts of one length are run together, those of another apart, and nothing is ever padded.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grids import each_level
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lowering import FAMILIES, build
from torch import Tensor

from acdc.dictionaries.activations import group_by_length
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.measure.evaluation import Evaluator
from acdc.methods.acdc import acdc
from acdc.methods.eap import Integration, eap, eap_ig
from acdc.methods.exact import exact
from acdc.models import load_model
from acdc.models.lowering import LoweredModel
from acdc.models.lowering.families import SUPPORTED_ARCHITECTURES
from acdc.tasks.base import Pair, Task

DATA = Path(__file__).parent / "data" / "parity"
NATIVE = ("ln2", "attn3")
TOLERANCE = 1e-5  # of the largest score or metric
LENGTHS = (5, 7, 5, 3, 7, 5)
Method = Callable[[Experiment], Any]


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoweredModel]:
    """Return a small model of a family, loaded once."""

    @cache
    def load(family: str) -> LoweredModel:
        if family in NATIVE:
            return load_model(str(DATA / family))[0]
        folder = tmp_path_factory.mktemp(family)
        build(family, **_smaller(family)).save_pretrained(folder)
        return load_model(str(folder))[0]

    return load


def _smaller(family: str) -> dict[str, int]:
    """Two heads in place of four: a third of the edges."""
    names = {"GPT2": "n_head", "GPTJ": "n_head", "GPTNeo": "num_heads"}
    name = names.get(FAMILIES[family][0], "num_attention_heads")
    shared = {"num_key_value_heads": 1} if "num_key_value_heads" in FAMILIES[family][1] else {}
    return {name: 2} | shared


def task_for(model: LoweredModel, lengths: tuple[int, ...] = LENGTHS, n_scored: int = 1) -> Task:
    """Return random pairs of mixed lengths, in mixed order."""
    generator = torch.Generator().manual_seed(3)

    def draw(n: int, high: int = model.d_vocab) -> tuple[int, ...]:
        return tuple(torch.randperm(high, generator=generator)[:n].tolist())

    pairs = []
    for n in lengths:
        answers = draw(3, model.d_vocab_out)
        scored = tuple(range(n - n_scored, n))
        pairs.append(Pair(draw(n), draw(n), answers[:2], answers[2:], scored))
    return Task("mixed", tuple(pairs))


def experiment(model: LoweredModel, task: Task, metric: str, **options: Any) -> Experiment:
    return Experiment(model, task, get_metric(metric), **options)


def alone(whole: Experiment) -> list[Experiment]:
    """Return the experiments of the task's prompts, one each."""
    task = whole.task
    return [whole.on(dataclasses.replace(task, pairs=(pair,))) for pair in task.pairs]


def close(got: Any, expected: Any, of: Any = None) -> None:
    """Assert equality up to a part of the largest of all numbers, or of those that a mean is of."""
    got, expected = np.asarray(got), np.asarray(expected)
    scale = np.abs(expected if of is None else np.asarray(of)).max()
    assert scale > 0
    assert np.abs(got - expected).max() <= TOLERANCE * scale


def circuits(whole: Experiment) -> list[np.ndarray]:
    """Return no edge, every edge, and two random circuits."""
    n, rng = whole.graph.n_edges, np.random.default_rng(5)
    return [np.zeros(n, bool), np.ones(n, bool), rng.random(n) < 0.5, rng.random(n) < 0.9]


def values_of(evaluators: list[Evaluator], whole: Experiment) -> np.ndarray:
    """``[circuit, prompt]``: metric of each circuit on each prompt, ascending."""
    return np.stack([
        np.sort(np.concatenate([evaluator.values(circuit) for evaluator in evaluators]))
        for circuit in circuits(whole)
    ])  # fmt: skip


ALIKE = ("llama3", "llama-linear", "phi3-partial", "qwen3-moe-some-dense")  # but for one table
CASES = [*(family for family in FAMILIES if family not in ALIKE), *NATIVE]
METHODS: dict[str, Method] = {
    "eap": eap,
    "eap-ig": lambda e: eap_ig(e, Integration(steps=3)),
    "exact": exact,
}


def test_every_architecture_is_among_the_cases(lowered: Any) -> None:
    suffix = {"GPT2": "LMHeadModel"}
    names = {name + suffix.get(name, "ForCausalLM") for name, _ in FAMILIES.values()}
    assert names | {"TransformerLensNative"} == set(SUPPORTED_ARCHITECTURES)


@pytest.mark.parametrize(("family", "method"), each_level(tuple(CASES), tuple(METHODS)))
def test_scores_are_means_over_prompts(family: str, method: str, lowered: Any) -> None:
    model = lowered(family)
    lengths = LENGTHS[:4] if method == "exact" else LENGTHS
    whole = experiment(model, task_for(model, lengths), "logit_diff", batch_size=2)
    scores = METHODS[method](whole)
    close(scores, np.mean([METHODS[method](one) for one in alone(whole)], axis=0))


@pytest.mark.parametrize(
    ("family", "metric"), each_level(tuple(CASES), ["kl", "logit_diff", "nll"])
)
def test_metrics_of_circuits_are_those_of_the_prompts(
    family: str, metric: str, lowered: Any
) -> None:
    model = lowered(family)
    whole = experiment(model, task_for(model), metric, batch_size=3)
    together, singles = Evaluator(whole), [Evaluator(one) for one in alone(whole)]
    close(values_of([together], whole), values_of(singles, whole))
    for circuit in circuits(whole)[2:]:
        values = [one.evaluate(circuit).metric_circuit for one in singles]
        close(together.evaluate(circuit).metric_circuit, np.mean(values), of=values)
    for which in ("clean", "corrupt"):
        values = [one.plain(which) for one in alone(whole)]
        if metric != "kl" or which == "corrupt":  # clean against itself is 0
            close(whole.plain(which), np.mean(values), of=values)


@pytest.mark.parametrize("intervention", ["resample", "zero", "mean"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_other_ablations_and_directions(intervention: str, direction: str, lowered: Any) -> None:
    model = lowered("llama")
    over = [pair.corrupt for pair in task_for(model).pairs]
    whole = experiment(
        model, task_for(model), "logit_diff", batch_size=4, intervention=intervention,
        direction=direction, mean_over=over if intervention == "mean" else None,
    )  # fmt: skip
    for method in METHODS.values():
        close(method(whole), np.mean([method(one) for one in alone(whole)], axis=0))
    together, singles = Evaluator(whole), [Evaluator(one) for one in alone(whole)]
    close(values_of([together], whole), values_of(singles, whole))


def test_several_scored_positions(lowered: Any) -> None:
    model = lowered("gpt-neo")
    whole = experiment(model, task_for(model, n_scored=3), "logit_diff", batch_size=2)
    for method in METHODS.values():
        close(method(whole), np.mean([method(one) for one in alone(whole)], axis=0))


@pytest.mark.parametrize("family", CASES)
def test_acdc_decides_the_same_in_batches_of_one(family: str, lowered: Any) -> None:
    model = lowered(family)
    whole = experiment(model, task_for(model), "kl", batch_size=32)
    threshold = 0.02 * whole.plain("corrupt")
    together, _ = acdc(whole, threshold)
    one_by_one, _ = acdc(dataclasses.replace(whole, batch_size=1), threshold)
    assert 0 < together.n_edges < whole.graph.n_edges
    assert np.array_equal(together.in_circuit, one_by_one.in_circuit)
    close(together.scores, one_by_one.scores)
    assert len(whole.batches) < len(dataclasses.replace(whole, batch_size=1).batches)


# --- nothing is padded --------------------------------------------------------------------


def rows_of(tokens: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in tokens.tolist()]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_batches_hold_the_prompts_and_nothing_else(batch_size: int, lowered: Any) -> None:
    model = lowered("gpt2")
    whole = experiment(model, task_for(model), "logit_diff", batch_size=batch_size)
    for which in ("clean", "corrupt"):
        rows = [row for batch in whole.batches for row in rows_of(getattr(batch, which))]
        assert Counter(rows) == Counter(getattr(pair, which) for pair in whole.task.pairs)
    for batch in whole.batches:
        assert batch.clean.shape == batch.corrupt.shape
        assert len(batch.clean) <= batch_size
        assert batch.scored.tolist() == [batch.clean.shape[1] - 1]


@pytest.mark.parametrize("family", CASES)
def test_the_model_sees_prompts_and_nothing_else(family: str, lowered: Any) -> None:
    model, seen = lowered(family), set()

    def embed_parts(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        seen.update(rows_of(tokens))
        return model.embed_parts(tokens)

    watched = dataclasses.replace(model, embed_parts=embed_parts)
    task = task_for(model)
    prompts = {prompt for pair in task.pairs for prompt in (pair.clean, pair.corrupt)}
    for intervention in ("resample", "mean"):
        whole = experiment(watched, task, "kl", batch_size=3, intervention=intervention)
        eap(whole)
        eap_ig(whole, Integration(steps=2))
        acdc(whole, 0.5)
        Evaluator(whole).evaluate(circuits(whole)[2])
        assert seen == prompts


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6).map(tuple), max_size=20),
    st.integers(1, 5),
)
def test_prompts_grouped_by_length(prompts: list[tuple[int, ...]], batch_size: int) -> None:
    batches = group_by_length(prompts, batch_size, torch.device("cpu"))
    assert Counter(row for batch in batches for row in rows_of(batch)) == Counter(prompts)
    assert all(len(batch) <= batch_size for batch in batches)
