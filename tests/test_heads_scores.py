"""Attention scores are sums over pairs of what a head reads, exactly, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import test_lowering
import torch
from latent_oracle import random_dictionary
from test_cross_layer import save, tensors_of

from acdc.dictionaries import read_dictionaries
from acdc.dictionaries.attach import attach, attach_experts, attach_neurons
from acdc.engine.experiment import Experiment
from acdc.engine.head_parts import BIAS, OUTPUT_BIASES, HeadParts, Written, head_parts
from acdc.engine.metrics import get_metric
from acdc.models import load_model
from acdc.models.lowering import LoweredModel

TOLERANCE = 1e-4
TOKENS = torch.randint(0, oracle.VOCAB, (3, 6), generator=torch.Generator().manual_seed(2))


def experiment_of(model: LoweredModel) -> Experiment:
    return Experiment(model, oracle.small_task(0), get_metric("kl"))


def every_head(model: LoweredModel, tokens: torch.Tensor) -> list[HeadParts]:
    run = Written(experiment_of(model)).run(tokens)
    shape = model.shape
    return [head_parts(run, i, h) for i in range(shape.n_layers) for h in range(shape.n_heads)]


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


@pytest.mark.parametrize("family", test_lowering.FAMILIES)
def test_pairs_sum_to_the_scores_of_hugging_face(family: str, tmp_path: Path) -> None:
    """Its own weights are those of its own scores: what is summed is what it attends by."""
    module: Any = test_lowering.build(family, attn_implementation="eager")
    module.save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    tokens = torch.randint(0, test_lowering.VOCAB, (2, 12), generator=torch.manual_seed(0))
    with torch.no_grad():
        attentions = module(tokens, output_attentions=True).attentions
    for parts in every_head(model, tokens):
        attention, trace = model.layers[parts.layer].attention, parts.run.trace
        q, k = (
            attention.place(kind, trace.at((kind, parts.layer)), slice(0, tokens.shape[1]))
            for kind in ("q", "k")
        )
        own = attention.scale * q[:, parts.head] @ k[:, parts.head // attention.group].mT
        assert far(parts.scores, own) < TOLERANCE
        for prompt, query, key in ((0, 7, 7), (1, 9, 5), (1, 3, 2)):
            pairs = parts.at(prompt, query, key)
            assert pairs.shape == (len(parts.names), len(parts.names))
            assert far(pairs.sum(), own[prompt, query, key]) < TOLERANCE
        theirs = attentions[parts.layer][:, parts.head]  # behind a soft cap, mask and softmax
        assert float((parts.pattern - theirs).abs().max()) < TOLERANCE


@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_pairs_sum_to_the_scores_of_the_oracle(family: str) -> None:
    model = oracle.small_model(family, 3)
    run = Written(experiment_of(model)).run(TOKENS)
    with torch.no_grad():
        stream = oracle.Pass(model, TOKENS)
    group = model.layers[0].attention.group
    for layer, block in enumerate(model.layers):
        x = block.ln1(run.trace.attention_in[layer])
        assert far(run.sources(layer).sum(0), run.trace.attention_in[layer]) < TOLERANCE
        for head in range(model.shape.n_heads):
            parts = head_parts(run, layer, head)
            q = oracle.projected(block.attention, "q", head, x)
            k, v = (oracle.projected(block.attention, kind, head // group, x) for kind in "kv")
            assert far(parts.scores, block.attention.scale * q @ k.mT) < TOLERANCE
            assert far(parts.pattern, oracle.pattern(block.attention, q, k)) < TOLERANCE
            z = parts.pattern @ parts.v.sum(0)
            out = stream.out[f"a{layer}.h{head}"]
            assert far(z @ parts.output_matrix, out) < TOLERANCE
            assert far(z, parts.pattern @ v) < TOLERANCE


@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_each_sender_brings_what_it_writes(family: str) -> None:
    """A part is how queries move with a sender, the norms' scales held: by finite differences."""
    model = oracle.small_model(family, 5)
    run = Written(experiment_of(model)).run(TOKENS)
    layer = model.shape.n_layers - 1
    held, attention = run.held(layer), run.held(layer).attention
    parts, sources = head_parts(run, layer, 1), run.sources(layer)
    stream = run.trace.attention_in[layer]
    for i, name in enumerate(parts.names[:-1]):
        both = [held.ln1(x) for x in (stream, stream - sources[i])]
        q, k = ([attention.project(kind, x) for x in both] for kind in ("q", "k"))
        with_it, without = (attention.place("q", x, slice(0, 6))[:, 1] for x in q)
        assert far(parts.q[i], with_it - without) < TOLERANCE, name
        with_it, without = (attention.place("k", x, slice(0, 6)) for x in k)
        assert far(parts.k[i], (with_it - without)[:, 1 // attention.group]) < TOLERANCE, name
    if name := (OUTPUT_BIASES if attention.b_O is None else ""):
        assert not parts.q[parts.names.index(name)].any()


@pytest.mark.parametrize("family", ["LN", "grouped rotary", "Gemma2"])
def test_what_a_head_writes_by_what_its_value_reads(family: str) -> None:
    model = oracle.small_model(family, 7)
    run = Written(experiment_of(model)).run(TOKENS)
    generator = torch.Generator().manual_seed(0)
    for layer in range(model.shape.n_layers - 1):
        parts = head_parts(run, layer, 1)
        gained = run.sources(layer + 1)[run.written.names_seen(layer + 1).index(f"a{layer}.h1")]
        direction = torch.randn(gained.shape, generator=generator)
        carried = parts.carried(direction)
        assert carried.shape == (len(parts.names),)
        assert far(carried.sum(), (gained * direction).sum()) < TOLERANCE
        later = head_parts(run, layer + 1, 0)
        for kind in ("q", "k", "v"):
            gradient = torch.randn(getattr(later, kind)[0].shape, generator=generator)
            along = (later.pulled(kind, gradient) * gained).sum()
            i = later.names.index(f"a{layer}.h1")
            assert far(along, (getattr(later, kind)[i] * gradient).sum()) < TOLERANCE


def test_weighted_sums_of_scores() -> None:
    parts = head_parts(Written(experiment_of(oracle.small_model("RMS", 1))).run(TOKENS), 1, 0)
    weights = torch.randn(parts.scores.shape, generator=torch.Generator().manual_seed(1))
    table = parts.pairs(weights)
    assert far(table.sum(), (weights * parts.scores).sum()) < TOLERANCE
    one = torch.zeros_like(weights)
    one[2, 4, 1] = 1
    assert far(parts.pairs(one), parts.at(2, 4, 1)) < TOLERANCE


def test_names_are_those_of_the_graph() -> None:
    """Positions that are added have a name of their own; rotary ones are in no sender."""
    written = Written(experiment_of(oracle.small_model("LN", 0)))
    assert written.names_seen(0) == ("tok", "pos", OUTPUT_BIASES, BIAS)
    rotary = Written(experiment_of(oracle.small_model("grouped rotary", 0)))
    assert rotary.names_seen(0) == ("input", OUTPUT_BIASES, BIAS)
    assert rotary.names_seen(1)[1:-2] == ("a0.h0", "a0.h1", "m0")


@pytest.mark.parametrize("family", ["LN", "Gemma2"])
@pytest.mark.parametrize("what", ["mlp_out", "attn_z", "attn_out", "resid_pre", "neurons", "cross"])
def test_latents_are_senders_too(family: str, what: str, tmp_path: Path) -> None:
    model = oracle.small_model(family, 4, n_layers=3)
    plain = experiment_of(model)
    if what == "neurons":
        experiment = attach_neurons(plain, max_neurons=9).experiment
    elif what == "cross":
        folder = save(tensors_of(model), tmp_path / "clt")
        experiment = attach(plain, read_dictionaries([folder])).experiment
    else:
        experiment = attach(plain, [random_dictionary(model, "standard", what, 1)]).experiment
    run = Written(experiment).run(TOKENS)
    last = model.shape.n_layers - 1
    assert far(run.sources(last).sum(0), run.trace.attention_in[last]) < TOLERANCE
    parts, names = head_parts(run, last, 0), run.written.names_seen(last)
    assert any(".f" in name or ".n" in name for name in names)
    whole = head_parts(Written(plain).run(TOKENS), last, 0)
    assert far(parts.scores, whole.scores) < TOLERANCE


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_experts_are_senders_too(family: str, tmp_path: Path) -> None:
    """And a sink's score, at which nothing is read, is no part of any sum."""
    test_lowering.build(family).save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    experiment = attach_experts(experiment_of(model)).experiment
    run = Written(experiment).run(TOKENS)
    assert far(run.sources(1).sum(0), run.trace.attention_in[1]) < TOLERANCE
    parts = head_parts(run, 1, 2)
    assert [name for name in parts.names if name.startswith("m0.e")]
    assert far(parts.scores, head_parts(Written(experiment_of(model)).run(TOKENS), 1, 2).scores) < (
        TOLERANCE
    )
    assert (parts.pattern.sum(-1).max() < 1 - TOLERANCE) == (family == "gpt-oss")
