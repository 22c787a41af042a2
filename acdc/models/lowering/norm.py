"""Norms: the model's own modules, with the closed form of their Jacobian products.

LayerNorm ``y = (x - mean) / std * w + b`` and RMSNorm ``y = x / rms * w`` act on each token
alone; their Jacobians are symmetric up to ``w``, so one closed form gives both the
vector-Jacobian and the Jacobian-vector product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
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
    """

    module: Callable[[Tensor], Tensor]
    kind: Literal["LN", "RMS", "none"]
    weight: Tensor | None
    eps: float
    frozen: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the model's module."""
        return _Frozen.apply(x, self) if self.frozen else self.module(x)

    def normalized(self, x: Tensor) -> Tensor:
        """``x`` normalised, before scale and bias: TransformerLens' ``hook_normalized``.

        ``(x - mean) / sqrt(var + eps)`` or ``x / sqrt(mean square + eps)``; at least float32.
        """
        if self.kind == "none":
            return x
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.kind == "LN":
            x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def vjp(self, x: Tensor, g: Tensor) -> Tensor:
        """``J(x)^T g``: gradient at the output -> gradient at the input, ``[..., d_model]``.

        ``g`` may have more leading axes than ``x``.
        """
        if self.kind == "none":
            return g
        if self.weight is not None:
            g = g * self.weight
        return self._symmetric(x, g)

    def jvp(self, x: Tensor, t: Tensor) -> Tensor:
        """``J(x) t``: change of the output per change ``t`` of the input."""
        if self.kind == "none":
            return t
        t = self._symmetric(x, t)
        return t if self.weight is None else t * self.weight

    def _symmetric(self, x: Tensor, g: Tensor) -> Tensor:
        xf = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.kind == "LN":
            xf = xf - xf.mean(-1, keepdim=True)
        inverse = torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + self.eps)
        unit = (xf * inverse).to(g.dtype)
        if self.frozen:
            out = g.clone()
        else:
            along = torch.linalg.vecdot(g, unit).unsqueeze(-1) / g.shape[-1]
            out = torch.addcmul(g, unit, along, value=-1)
        if self.kind == "LN":
            out -= g.mean(-1, keepdim=True)
        return out.mul_(inverse.to(g.dtype))


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
