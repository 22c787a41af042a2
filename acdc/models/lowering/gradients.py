"""The same model with another backward pass: parts are exchanged, values stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from acdc.errors import UnsupportedModelError
from acdc.models.lowering.attention import Attention
from acdc.models.lowering.model import FeedForward, LoweredLayer, LoweredModel
from acdc.models.lowering.norm import Norm

__all__ = ["ScaledGradient", "of_kind", "with_parts"]

Part = TypeVar("Part")


def with_parts(
    model: LoweredModel,
    norm: Callable[[Norm], Norm],
    attention: Callable[[Attention], Attention],
    mlp: Callable[[FeedForward], FeedForward],
) -> LoweredModel:
    """Return a model with every norm, attention and MLP exchanged; it is not changed itself.

    Norms inside attention (on queries and keys) and inside MLPs are exchanged first.

    Raises
    ------
    UnsupportedModelError
        If an MLP is a mixture of experts, for which such rules are not defined.
    """
    if model.has_experts:
        raise UnsupportedModelError(
            f"gim and relp: {model.name!r} has mixtures of experts, for which their rules are not "
            "defined; choose eap-ig"
        )

    def exchanged(one: Norm | None) -> Norm | None:
        return None if one is None else norm(one)

    def layer(old: LoweredLayer) -> LoweredLayer:
        inside = {kind: exchanged(one) for kind, one in old.attention.norm.items()}
        shared = {
            kind: replace(one, norm=norm(one.norm)) for kind, one in old.attention.shared.items()
        }
        return LoweredLayer(
            norm(old.ln1),
            attention(replace(old.attention, norm=inside, shared=shared)),
            exchanged(old.attention_post),
            exchanged(old.ln2),
            None
            if old.mlp is None
            else mlp(replace(old.mlp, norm=norm(old.mlp.norm), post=exchanged(old.mlp.post))),
        )

    layers = tuple(layer(old) for old in model.layers)
    return replace(model, layers=layers, ln_final=norm(model.ln_final))


def of_kind(kind: type[Part], part: Any, **more: Any) -> Part:
    """Return a part as one of a subclass, with the subclass' own fields."""
    return kind(**{one.name: getattr(part, one.name) for one in fields(part)}, **more)


class ScaledGradient(torch.autograd.Function):
    """Identity; its gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        """Return ``x``."""
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient, multiplied."""
        return grads[0] * ctx.scale, None
