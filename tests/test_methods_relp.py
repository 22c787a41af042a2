"""Relevance patching: same values, and LRP's rules written out where the engine has its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from oracle import FAMILIES, Oracle, Pass
from test_attribution import FLOAT32_INSIDE, build
from torch import Tensor

from acdc.dictionaries.attach import attach_neurons
from acdc.engine.work import Work
from acdc.methods import METHODS
from acdc.methods.eap import eap
from acdc.methods.relp import Options, relp
from acdc.models.lowering.relp import RelpRules, with_relevance

GATED = ("gated rotary", "grouped rotary", "Qwen3", "Gemma2", "Gemma3", "Olmo2", "Phi3")
SOME = ("LN", "gated rotary", "grouped", "GPTNeoX", "Gemma2", "Olmo2", "Phi3")
SILU = ("gated rotary", "grouped rotary", "Qwen3", "Olmo2", "Phi3")


@pytest.mark.parametrize("family", FAMILIES)
def test_values_stay(family: str) -> None:
    experiment, _ = build(family, 1)
    model, tokens = experiment.model, experiment.batches[0].clean
    changed = with_relevance(model, RelpRules(freeze_attention=True))
    a, b = model.forward(tokens).final, changed.forward(tokens).final
    assert a is not None
    assert torch.equal(a, b)
    assert torch.equal(model.unembed(a), changed.unembed(a))
    assert np.abs(relp(experiment) - eap(experiment)).max() > 1e-3 * np.abs(eap(experiment)).max()


# --- the rules, written out with constants in the forward pass ----------------------------


@dataclass
class HandNorm:
    """A norm whose standard deviation is a constant."""

    norm: Any

    def __call__(self, x: Tensor) -> Tensor:
        if self.norm.kind == "none":
            return x
        centred = x - x.mean(-1, keepdim=True) if self.norm.kind == "LN" else x
        size = (centred.square().mean(-1, keepdim=True) + self.norm.eps).sqrt().detach()
        bias = self.norm.module(torch.zeros_like(x))
        scaled = centred / size
        return (scaled if self.norm.weight is None else scaled * self.norm.weight) + bias


@dataclass
class HandShared:
    """A norm on all heads together whose root mean square is a constant."""

    shared: Any

    def inverse(self, read: Tensor) -> Tensor:
        every = read @ self.shared.W
        every = every if self.shared.b is None else every + self.shared.b
        size = every.square().mean(-1, keepdim=True) + self.shared.norm.eps
        return size.rsqrt().detach()


@dataclass
class HandMlp:
    """An MLP whose activation is a line through 0, and whose products share the credit."""

    mlp: Any
    family: str

    def __call__(self, x: Tensor) -> Tensor:
        x = HandNorm(self.mlp.norm)(x)
        reads = [x @ W + part(torch.zeros_like(x)) for part, W in self.mlp.readers]
        if self.family in GATED:
            up, gate = reads
            product = self.line(gate) * up
            h = product / 2 + (product / 2).detach()
        else:
            h = self.line(reads[0])
        out = h @ self.mlp.W_out + self.mlp.writer(torch.zeros_like(h))
        return out if self.mlp.post is None else HandNorm(self.mlp.post)(out)

    def line(self, x: Tensor) -> Tensor:
        silu, exact = self.family in SILU, self.family == "GPTNeoX"
        functional = torch.nn.functional
        y = (
            functional.silu(x)
            if silu
            else functional.gelu(x, approximate="none" if exact else "tanh")
        )
        return x * (y / x).detach()


def by_hand(slow: Oracle, family: str) -> dict[str, float]:
    """Derivative of the metric as each edge starts to be ablated, through the model by hand."""
    model = slow.model

    def layer(old: Any) -> Any:
        norm = {k: None if n is None else HandNorm(n) for k, n in old.attention.norm.items()}
        shared = {k: HandShared(one) for k, one in old.attention.shared.items()}
        post = old.attention_post
        return replace(
            old,
            ln1=HandNorm(old.ln1),
            attention=replace(old.attention, norm=norm, shared=shared),
            attention_post=None if post is None else HandNorm(post),
            mlp=None if old.mlp is None else HandMlp(old.mlp, family),
        )

    hand = replace(model, layers=tuple(map(layer, model.layers)), ln_final=HandNorm(model.ln_final))
    shares: dict[str, Tensor] = {}

    class Shared(Pass):
        def carried(self, u: str, v: str) -> Tensor:
            share = shares.setdefault(f"{u}->{v}", torch.zeros((), requires_grad=True))
            return self.out[u] + share * (self.ablated[u] - self.out[u])

    total = torch.zeros(())
    for pairs, base, ablated, _ in slow.groups:
        logits = hand.unembed(Shared(hand, base, {}, ablated).final)
        for row, pair in enumerate(pairs):
            for at in pair.scored:
                right = logits[row, at, list(pair.answers)].mean()
                total = total + right - logits[row, at, list(pair.wrong_answers)].mean()
    (total / slow.n_rows).backward()
    return {edge: float(share.grad) for edge, share in shares.items() if share.grad is not None}


@pytest.mark.parametrize("family", SOME)
def test_scores_are_those_of_the_rules_by_hand(family: str) -> None:
    experiment, slow = build(family, 2)
    wanted = by_hand(slow, family)
    largest = max(map(abs, wanted.values()))
    tolerance = 1e-3 if family in FLOAT32_INSIDE else 1e-4  # what is divided by is stabilised
    for edge, score in zip(experiment.graph.edge_names(), relp(experiment), strict=True):
        assert abs(score - wanted[edge]) < tolerance * largest, edge


def test_a_linear_model_has_the_scores_of_eap() -> None:
    """Without norms and MLPs, and attention frozen in both, every map is linear."""
    experiment, _ = build("attention only", 3)
    rules = RelpRules(freeze_norms=False)
    np.testing.assert_allclose(relp(experiment, rules=rules), eap(experiment), rtol=1e-12)


def test_linear_activations_have_the_scores_of_eap(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, _ = build("no norm", 3)
    for layer in experiment.model.layers:
        assert layer.mlp is not None
        monkeypatch.setattr(layer.mlp.module, "act", lambda x: 3 * x)
    scores = eap(experiment)
    np.testing.assert_allclose(relp(experiment), scores, atol=1e-4 * np.abs(scores).max())


def test_frozen_attention_leaves_queries_and_keys_out() -> None:
    experiment, _ = build("LN", 1)
    scores = relp(experiment, Options(freeze_attention=True))
    names = experiment.graph.edge_names()
    looked_at = np.array([name.endswith(("<q>", "<k>")) for name in names])
    assert not scores[looked_at].any()
    assert (scores[~looked_at] != 0).all()
    assert (relp(experiment)[looked_at] != 0).any()


@pytest.mark.parametrize("alone", [False, True])
def test_neurons_add_up_to_their_mlp(alone: bool) -> None:
    """Edges out of (and, where neurons read for themselves, into) an MLP's parts are split."""
    bare, _ = build("gated rotary", 2)
    experiment = attach_neurons(bare, alone=alone).experiment

    def of_component(one: Any) -> dict[str, float]:
        total: dict[str, float] = {}
        for name, score in zip(one.graph.edge_names(), relp(one), strict=True):
            ends = [end.split(".n")[0].removesuffix(".err") for end in name.split("->")]
            key = "->".join(ends)
            total[key] = total.get(key, 0.0) + float(score)
        return total

    found, wanted = of_component(experiment), of_component(bare)
    largest = max(map(abs, wanted.values()))
    for edge, score in wanted.items():
        assert found[edge] == pytest.approx(score, abs=1e-4 * largest), edge


def test_a_circuit() -> None:
    experiment, _ = build("LN", 1)
    counted: list[int] = []
    found = METHODS["relp"].find(experiment, Work(progress=counted.append), n_edges=20)
    assert sum(counted) == METHODS["relp"].n_units(experiment)
    np.testing.assert_allclose(found.circuit.scores, relp(experiment))
    assert 0 < found.circuit.n_edges <= 20
