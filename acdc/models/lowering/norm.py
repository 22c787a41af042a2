"""Norms: the model's own modules, with the closed form of their Jacobian products.

LayerNorm ``y = (x - mean) / std * w + b`` and RMSNorm ``y = x / rms * w`` act on each token
alone; their Jacobians are symmetric up to ``w``, so one closed form gives both the
vector-Jacobian and the Jacobian-vector product.

A norm that *holds* divides by the standard deviation (root mean square) that another run has at
the same place, so that it is linear in what it reads, but for its bias.  The mean that a LayerNorm
takes away is linear already and stays that of what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Norm"]


@dataclass(frozen=True, eq=False)
class Norm:
    """One norm of the model.

    Parameters
    ----------
    module
        The model's own module; called as it is.
    kind
        ``LN``, ``RMS`` or ``none``.
    weight
        ``[d_model]`` effective scale (Gemma's ``1 + w`` already added), or None for ones.
    eps
        Added to the variance (mean square).
    frozen
        Whether gradients take the standard deviation (root mean square) for a constant; the
        value is the module's either way.
    held
        What stands for ``1 / std`` of what is read, ``[batch, pos, 1]`` (of QK-norms ``[batch,
        head, pos, 1]``); None: nothing.
    bias
        ``[d_model]``: the module's, where a scale is held.
    """

    module: Callable[[Tensor], Tensor]
    kind: Literal["LN", "RMS", "none"]
    weight: Tensor | None
    eps: float
    frozen: bool = False
    held: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, x: Float[Tensor, "*place d_model"]) -> Float[Tensor, "*place d_model"]:
        """Apply the model's module, or the held scale."""
        if self.held is not None:
            return self._linear(x)
        return _Frozen.apply(x, self) if self.frozen else self.module(x)

    def hold(self, x: Tensor) -> Norm:
        """Return the norm with the scale that it has at ``x [..., d_model]``."""
        if self.kind == "none":
            return self
        bias = self.module(torch.zeros_like(x.flatten(0, -2)[0]))
        return replace(self, held=self.inverse(x), bias=bias)

    def at(self, positions: slice | list[int] | Tensor) -> Norm:
        """Return the norm for some of the positions."""
        return self if self.held is None else replace(self, held=self.held[..., positions, :])

    def on(self, tokens: slice | Tensor) -> Norm:
        """Return the norm for some tokens of the flattened batch and positions."""
        return self if self.held is None else replace(self, held=self.held.flatten(0, 1)[tokens])

    def of_heads(self, which: int | Literal["first"] | Sequence[int] | None) -> Norm:
        """Return a QK-norm for what :meth:`Attention.place` has at hand."""
        if self.held is None or which is None:
            return self
        if isinstance(which, int):
            return replace(self, held=self.held[:, which])
        held = self.held.transpose(0, 1)[:, None]
        return replace(self, held=held if which == "first" else held[list(which)])

    def normalized(self, x: Float[Tensor, "*place d_model"]) -> Float[Tensor, "*place d_model"]:
        """``x`` normalised, before scale and bias: TransformerLens' ``hook_normalized``.

        ``(x - mean) / sqrt(var + eps)`` or ``x / sqrt(mean square + eps)``; at least float32.
        """
        if self.kind == "none":
            return x
        x = self._centred(x)
        return x * self._inverse(x)

    def inverse(self, x: Tensor) -> Tensor:
        """``1 / std [..., 1]`` (root mean square) of ``x``, or what is held; at least float32."""
        return self._inverse(self._centred(x))

    def apart(self, x: Float[Tensor, "*place d_model"]) -> Tensor | None:
        """``1 / rms [..., 1]`` of ``x``, where the norm is no more than this times the weight.

        None where it is more: a LayerNorm, one that holds, or of a stream that is not in float32,
        the type in which families' modules compute, so that they round in between.
        """
        if self.kind != "RMS" or self.held is not None or x.dtype != torch.float32:
            return None
        return torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(self.eps).rsqrt_()[..., None]

    def vjp(
        self, x: Float[Tensor, "*place d_model"], g: Float[Tensor, "*more d_model"]
    ) -> Float[Tensor, "*more d_model"]:
        """``J(x)^T g``: gradient at the output -> gradient at the input, ``[..., d_model]``.

        ``g`` may have more leading axes than ``x``.
        """
        if self.kind == "none":
            return g
        if self.weight is not None:
            g = g * self.weight
        return self._symmetric(x, g)

    def jvp(
        self, x: Float[Tensor, "*place d_model"], t: Float[Tensor, "*more d_model"]
    ) -> Float[Tensor, "*more d_model"]:
        """``J(x) t``: change of the output per change ``t`` of the input."""
        if self.kind == "none":
            return t
        t = self._symmetric(x, t)
        return t if self.weight is None else t * self.weight

    def _symmetric(self, x: Tensor, g: Tensor) -> Tensor:
        xf = self._centred(x)
        inverse = self._inverse(xf)
        if self.frozen or self.held is not None:
            out = g.clone()
        else:
            unit = (xf * inverse).to(g.dtype)
            along = torch.linalg.vecdot(g, unit).unsqueeze(-1) / g.shape[-1]
            out = torch.addcmul(g, unit, along, value=-1)
        if self.kind == "LN":
            out -= g.mean(-1, keepdim=True)
        return out.mul_(inverse.to(g.dtype))

    def _centred(self, x: Tensor) -> Tensor:
        """``x``, without its mean in a LayerNorm; at least float32."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x - x.mean(-1, keepdim=True) if self.kind == "LN" else x

    def _inverse(self, x: Tensor) -> Tensor:
        """``1 / std [..., 1]`` of centred ``x``, or what is held."""
        if self.held is not None:
            return self.held
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def _linear(self, x: Tensor) -> Tensor:
        """The norm with the held scale."""
        assert self.bias is not None
        out = self.normalized(x)
        out = out if self.weight is None else out * self.weight
        return (out + self.bias).to(x.dtype)


class _Frozen(torch.autograd.Function):
    """The module's value, and the gradient of a frozen norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        return norm.module(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.norm.vjp(x, grads[0]), None
