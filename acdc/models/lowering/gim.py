"""Gradient interaction modifications: the same model, with another backward pass.

Edin, Csordas et al. 2025, "GIM: improved interpretability for large language models", arXiv
2505.17630; the rules and their constants as in the authors' package ``gim-explain``
(github.com/corticph/gim).  Attention repairs itself: where several positions carry the same, the
softmax moves weight from an ablated one to the others, and an ordinary gradient says that
neither matters.  The values of the forward pass stay as they are; gradients change thus:

=====================  ===========================================================================
softmax of attention   the Jacobian is that of the softmax at temperature 2:
                       ``p (g - sum p g)`` with ``p = softmax(scores / 2)`` (no factor 1 / 2)
norms                  the standard deviation (root mean square) counts as a constant
products               what is multiplied shares the credit: the gradient of each factor is
                       divided by their number: values and pattern by 2, so that queries and keys,
                       which are multiplied again, come to 4; gate and input of a gated MLP by 2
=====================  ===========================================================================

In a gated MLP the two factors read the same input, so dividing both gradients by 2 is dividing
that of the input.  QK-norms and post-norms are frozen too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from acdc.models.lowering.attention import Attention, Kind
from acdc.models.lowering.model import FeedForward, LoweredLayer, LoweredModel
from acdc.models.lowering.norm import Norm

__all__ = ["GimAttention", "GimFeedForward", "GimRules", "with_gim_gradients"]


@dataclass(frozen=True)
class GimRules:
    """How gradients are modified; each rule can be switched off.

    Parameters
    ----------
    temperature
        Of the attention's softmax in the backward pass; 1 changes nothing.
    freeze_norms
        Whether norms are linear in the backward pass.
    query_key, value, gate
        What gradients of queries and keys, of values, and of a gated MLP's input are multiplied
        by; 1 changes nothing.
    """

    temperature: float = 2.0
    freeze_norms: bool = True
    query_key: float = 0.25
    value: float = 0.5
    gate: float = 0.5


def with_gim_gradients(model: LoweredModel, rules: GimRules | None = None) -> LoweredModel:
    """Return the model with the same values and modified gradients.

    Parameters
    ----------
    model
        Any lowered model; it is not changed.
    rules
        None: all of GIM.
    """
    rules = rules or GimRules()
    layers = tuple(_layer(layer, rules) for layer in model.layers)
    return replace(model, layers=layers, ln_final=_norm(model.ln_final, rules))


def _layer(layer: LoweredLayer, rules: GimRules) -> LoweredLayer:
    post = layer.attention_post
    mlp = layer.mlp
    if mlp is not None:
        assert isinstance(mlp, FeedForward)
        values = {f.name: getattr(mlp, f.name) for f in fields(FeedForward)}
        values["norm"] = _norm(mlp.norm, rules)
        values["post"] = None if mlp.post is None else _norm(mlp.post, rules)
        mlp = GimFeedForward(**values, scale=rules.gate if mlp.gated else 1.0)
    norms = {
        kind: None if norm is None else _norm(norm, rules)
        for kind, norm in layer.attention.norm.items()
    }
    values = {f.name: getattr(layer.attention, f.name) for f in fields(Attention)}
    return LoweredLayer(
        _norm(layer.ln1, rules),
        GimAttention(**{**values, "norm": norms}, rules=rules),
        None if post is None else _norm(post, rules),
        None if layer.ln2 is None else _norm(layer.ln2, rules),
        mlp,
    )


def _norm(norm: Norm, rules: GimRules) -> Norm:
    return replace(norm, frozen=rules.freeze_norms)


@dataclass(frozen=True, eq=False)
class GimAttention(Attention):
    """Attention whose gradients follow the rules.  Parameters as :class:`Attention`."""

    rules: GimRules = GimRules()

    def place(
        self,
        kind: Kind,
        x: Tensor,
        positions: slice | list[int],
        heads: int | Literal["first"] | None = None,
    ) -> Tensor:
        """As :meth:`Attention.place`, with divided gradients."""
        scale = self.rules.value if kind == "v" else self.rules.query_key
        return super().place(kind, _ScaledGradient.apply(x, scale), positions, heads)

    def softmax(self, scores: Tensor) -> Tensor:
        """As :meth:`Attention.softmax`, with the Jacobian of another temperature."""
        precise = torch.promote_types(scores.dtype, torch.float32)
        return _TemperedSoftmax.apply(scores.to(precise), self.rules.temperature)


@dataclass(frozen=True, eq=False)
class GimFeedForward(FeedForward):
    """An MLP whose input's gradient is multiplied.  Parameters as :class:`FeedForward`."""

    scale: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., pos, d_model]`` (raw stream) -> output."""
        out = self.module(_ScaledGradient.apply(self.norm(x), self.scale))
        return out if self.post is None else self.post(out)

    def pull_neurons(self, x: Tensor, neurons: Tensor) -> Tensor:
        """As :meth:`FeedForward.pull_neurons`, multiplied."""
        return super().pull_neurons(x, neurons) * self.scale


class _ScaledGradient(torch.autograd.Function):
    """Identity; its gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None


class _TemperedSoftmax(torch.autograd.Function):
    """Softmax over the last axis; its Jacobian is taken at another temperature."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, temperature: float) -> Tensor:
        ctx.temperature = temperature
        ctx.save_for_backward(scores)
        return torch.softmax(scores, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (scores,) = ctx.saved_tensors
        p = torch.softmax(scores / ctx.temperature, dim=-1)
        return p * (grads[0] - (p * grads[0]).sum(-1, keepdim=True)), None
