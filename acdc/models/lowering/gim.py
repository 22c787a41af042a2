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

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from acdc.models.lowering.attention import Attention, Kind, Which
from acdc.models.lowering.gradients import ScaledGradient, of_kind, with_parts
from acdc.models.lowering.model import FeedForward, LoweredModel

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
    return with_parts(
        model,
        norm=lambda norm: replace(norm, frozen=rules.freeze_norms),
        attention=lambda attention: of_kind(GimAttention, attention, rules=rules),
        mlp=lambda mlp: of_kind(GimFeedForward, mlp, scale=rules.gate if mlp.gated else 1.0),
    )


@dataclass(frozen=True, eq=False)
class GimAttention(Attention):
    """Attention whose gradients follow the rules.  Parameters as :class:`Attention`."""

    rules: GimRules = GimRules()

    def place(
        self,
        kind: Kind,
        x: Tensor,
        positions: slice | list[int] | Tensor,
        heads: Which = None,
    ) -> Tensor:
        """As :meth:`Attention.place`, with divided gradients."""
        scale = self.rules.value if kind == "v" else self.rules.query_key
        return super().place(kind, ScaledGradient.apply(x, scale), positions, heads)

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
        out = self.module(ScaledGradient.apply(self.norm(x), self.scale))
        return out if self.post is None else self.post(out)

    def pull_neurons(self, x: Tensor, neurons: Tensor) -> Tensor:
        """As :meth:`FeedForward.pull_neurons`, multiplied."""
        return super().pull_neurons(x, neurons) * self.scale


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
