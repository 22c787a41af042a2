"""Relevance propagation: the same model, whose backward pass gives LRP's coefficients.

Rezaei Jafari, Eberle, Khakzar & Nanda 2025, "RelP: faithful and efficient circuit discovery via
relevance patching", arXiv 2508.21258; the rules as in the authors' code
(github.com/FarnoushRJ/RelP), which names their sources.  The values of the forward pass stay as
they are; gradients change thus:

=====================  ===========================================================================
norms                  LN-rule: the standard deviation (root mean square) counts as a constant
activation functions   identity rule: the slope is ``act(x) / x``, that of the line through 0 (for
                       a ReLU the derivative)
gated MLPs             half rule: what is multiplied shares the credit, so the gradient of each of
                       the two factors is halved
linear maps            0-rule: the gradient, as ever
attention              AH-rule, where asked for: the pattern counts as a constant, so that what
                       goes into queries and keys has no score at all
=====================  ===========================================================================

The AH-rule is the one that the authors' own example leaves out, and it is off here unless asked
for: with it no edge into a query or a key is ever in a circuit.  The cap of the logits (Gemma-2)
and the metric keep their gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from acdc.models.lowering.attention import Attention
from acdc.models.lowering.gradients import ScaledGradient, of_kind, with_parts
from acdc.models.lowering.model import FeedForward, LoweredModel

__all__ = ["FrozenAttention", "RelevanceFeedForward", "RelpRules", "with_relevance"]

_LEAST = 1e-6
"""Added to what is divided by, away from 0, as the authors do."""


@dataclass(frozen=True)
class RelpRules:
    """How gradients are modified, beside the identity rule.

    Parameters
    ----------
    freeze_norms
        LN-rule.
    gate
        Half rule: what gradients of the factors of a gated MLP are multiplied by.
    freeze_attention
        AH-rule.
    """

    freeze_norms: bool = True
    gate: float = 0.5
    freeze_attention: bool = False


def with_relevance(model: LoweredModel, rules: RelpRules | None = None) -> LoweredModel:
    """Return the model with the same values and LRP's coefficients for gradients.

    Parameters
    ----------
    model
        Any lowered model; it is not changed.
    rules
        None: all but the AH-rule.
    """
    rules = rules or RelpRules()
    return with_parts(
        model,
        norm=lambda norm: replace(norm, frozen=rules.freeze_norms),
        attention=lambda attention: (
            of_kind(FrozenAttention, attention) if rules.freeze_attention else attention
        ),
        mlp=lambda mlp: of_kind(RelevanceFeedForward, mlp, gate=rules.gate),
    )


@dataclass(frozen=True, eq=False)
class FrozenAttention(Attention):
    """Attention whose pattern passes no gradient.  Parameters as :class:`Attention`."""

    def softmax(self, scores: Tensor) -> Tensor:
        """As :meth:`Attention.softmax`, with no gradient."""
        return ScaledGradient.apply(super().softmax(scores), 0.0)


@dataclass(frozen=True, eq=False)
class RelevanceFeedForward(FeedForward):
    """An MLP whose gradients follow the rules.  Parameters as :class:`FeedForward`."""

    gate: float = 0.5

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., pos, d_model]`` (raw stream) -> output."""
        out = _Relevance.apply(self.norm(x), self)
        return out if self.post is None else self.post(out)

    def slopes(self, parts: list[Tensor], h: Tensor) -> list[Tensor]:
        """As :meth:`FeedForward.slopes`, by the identity and the half rule.

        ``h / projection``: of a plain MLP ``act(p) / p``; of a gated one, ``h = act(p) u``, half of
        ``u act(p) / p`` for the gate and of ``act(p)`` for the other.
        """
        h = h.detach() * (self.gate if self.gated else 1.0)
        return [h / _stabilised(part.detach()) for part in parts]


class _Relevance(torch.autograd.Function):
    """The module's value; its gradient goes through the neurons by the slopes of the rules."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: RelevanceFeedForward) -> Tensor:
        parts, h, out = mlp.computed(x)
        ctx.save_for_backward(*mlp.slopes(parts, h))
        ctx.mlp = mlp
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        mlp: RelevanceFeedForward = ctx.mlp
        into_h = grads[0] @ mlp.W_out.mT
        pulled = [
            (into_h * slope) @ W.mT
            for slope, (_, W) in zip(ctx.saved_tensors, mlp.readers, strict=True)
        ]
        return torch.stack(pulled).sum(0), None


def _stabilised(x: Tensor) -> Tensor:
    return x + torch.where(x < 0, -_LEAST, _LEAST)
