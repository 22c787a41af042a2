"""Gradient interaction modifications: same values, and gradients as the rules say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import FAMILIES
from test_attribution import FLOAT32_INSIDE, build

from acdc.engine.patched import PatchedModel
from acdc.engine.work import Work
from acdc.methods import METHODS
from acdc.methods.eap import eap
from acdc.methods.gim import gim
from acdc.models.lowering.gim import GimRules, with_gim_gradients
from acdc.models.lowering.norm import Norm

OFF = GimRules(1.0, False, 1.0, 1.0, 1.0)
GATED = ("gated rotary", "grouped rotary", "Qwen3", "Gemma2", "Gemma3", "Olmo2", "Phi3")


@pytest.mark.parametrize("family", FAMILIES)
def test_values_stay_and_no_rules_are_eap(family: str) -> None:
    experiment, _ = build(family, 1)
    model, tokens = experiment.model, experiment.batches[0].clean
    changed = with_gim_gradients(model)
    a, b = model.forward(tokens).final, changed.forward(tokens).final
    assert a is not None
    assert torch.equal(a, b)
    assert torch.equal(model.unembed(a), changed.unembed(a))
    plain = eap(experiment)
    tolerance = 1e-4 if family in FLOAT32_INSIDE else 1e-8
    np.testing.assert_allclose(
        gim(experiment, rules=OFF), plain, atol=tolerance * np.abs(plain).max()
    )
    assert np.abs(gim(experiment) - plain).max() > 0.05 * np.abs(plain).max()


@pytest.mark.parametrize("family", ["LN", "grouped", "GPTNeoX", "Gemma2", "Qwen3", "Olmo2", "GPTJ"])
def test_scores_are_the_modified_gradients_of_edges(family: str) -> None:
    """The engine maps gradients back through norms by hand; here each edge has a weight."""
    experiment, _ = build(family, 2)
    modified = replace(experiment, model=with_gim_gradients(experiment.model))
    weights = torch.ones(experiment.graph.n_edges, dtype=experiment.model.dtype, requires_grad=True)
    model = PatchedModel(modified)
    sum(model.rows(i, weights).sum() for i in range(len(modified.batches))).backward()
    assert weights.grad is not None
    wanted = -weights.grad.double().numpy() / experiment.n_rows
    tolerance = 1e-4 if family in FLOAT32_INSIDE else 1e-8
    np.testing.assert_allclose(gim(experiment), wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("kind", ["LN", "RMS"])
def test_frozen_norms(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(3, 7, generator=generator, dtype=torch.double) for _ in range(2))
    weight = torch.rand(7, generator=generator, dtype=torch.double)
    module = torch.nn.LayerNorm(7) if kind == "LN" else torch.nn.RMSNorm(7, eps=1e-5)
    module = module.double()
    with torch.no_grad():
        module.weight.copy_(weight)
    norm = Norm(module, kind, weight, 1e-5, frozen=True)  # type: ignore[arg-type]
    leaf = x.clone().requires_grad_(True)
    (norm(leaf) * g).sum().backward()
    by_hand = x.clone().requires_grad_(True)
    centred = by_hand - by_hand.mean(-1, keepdim=True) if kind == "LN" else by_hand
    size = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt().detach()
    value = centred / size * weight
    (value * g).sum().backward()
    torch.testing.assert_close(norm(x), value.detach(), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(leaf.grad, by_hand.grad)
    torch.testing.assert_close(norm.vjp(x, g), by_hand.grad)
    t = torch.randn(3, 7, generator=generator, dtype=torch.double)
    assert float((norm.jvp(x, t) * g).sum()) == pytest.approx(float((t * by_hand.grad).sum()))


def test_softmax_and_products_by_hand() -> None:
    """One head on two positions: the gradients at q, k and v written out."""
    experiment, _ = build("LN", 3)
    attention = with_gim_gradients(experiment.model).layers[0].attention
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, attention.W["q"].shape[2], generator=generator, dtype=torch.double)
        for _ in range(3)
    )
    leaves = [x.clone().requires_grad_(True) for x in (q, k, v)]
    every = slice(0, 2)
    placed = [attention.place(kind, x, every) for kind, x in zip("qkv", leaves, strict=True)]  # type: ignore[arg-type]
    z = attention.attend(*placed, attention.mask(2, q.device))
    g = torch.randn(z.shape, generator=generator, dtype=torch.double)
    found = torch.autograd.grad((z * g).sum(), leaves)
    scores = q @ k.T * attention.scale
    hidden = torch.tensor([[False, True], [False, False]])
    scores = scores.masked_fill(hidden, -torch.inf)
    pattern, soft = torch.softmax(scores, -1), torch.softmax(scores / 2, -1)
    torch.testing.assert_close(z.detach(), pattern @ v)
    into_pattern = g @ v.T
    into_scores = soft * (into_pattern - (soft * into_pattern).sum(-1, keepdim=True))
    torch.testing.assert_close(found[0], into_scores @ k * attention.scale / 4)
    torch.testing.assert_close(found[1], into_scores.T @ q * attention.scale / 4)
    torch.testing.assert_close(found[2], pattern.T @ g / 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_gated_mlps_share_the_credit(family: str) -> None:
    experiment, _ = build(family)
    if not experiment.model.shape.has_mlp:
        return
    only = GimRules(1.0, False, 1.0, 1.0, 0.5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, experiment.model.d_model, generator=generator).to(experiment.model.dtype)
    grads = []
    for model in (experiment.model, with_gim_gradients(experiment.model, only)):
        mlp, leaf = model.layers[0].mlp, x.clone().requires_grad_(True)
        assert mlp is not None
        (grad,) = torch.autograd.grad(mlp(leaf).square().sum(), leaf)
        grads.append(grad)
    factor = 0.5 if family in GATED else 1.0
    torch.testing.assert_close(grads[1], factor * grads[0], rtol=1e-4, atol=1e-6)


def test_a_circuit() -> None:
    experiment, _ = build("LN", 1)
    counted: list[int] = []
    found = METHODS["gim"].find(experiment, Work(progress=counted.append), n_edges=20)
    assert sum(counted) == METHODS["gim"].n_units(experiment)
    np.testing.assert_allclose(found.circuit.scores, gim(experiment))
    assert 0 < found.circuit.n_edges <= 20
