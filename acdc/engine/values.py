"""What senders write to the stream: a coefficient times a basis.

=====================  ==========================  ==============
sender                 coefficient                 basis
=====================  ==========================  ==============
head                   z, ``d_head`` numbers       its W_O
latent, neuron         its activation              decoder row
MLP, error node,       the vector itself           none
embedding
=====================  ==========================  ==============

That is all that tells them apart.  Senders that are written together form a :class:`Block`, and
*values* are a list by block of ``[sender, scenario, batch, pos, width]``, where the scenario axis
may have length 1.

For sums over some of the senders, coefficients of width 1 are best kept as they are (a sum is one
product with the basis), wider ones as vectors: :meth:`Block.parts` is what a block makes of its
values for that purpose, and nothing above a block needs to know which it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Block", "Values"]

Values = list[Tensor]
"""By block, ``[sender, scenario, batch, pos, width]``."""

_MOST = 1 << 23
"""Numbers that one product over latents may hold."""


@dataclass(frozen=True, eq=False)
class Block:
    """Senders that are written together.

    Parameters
    ----------
    start, stop
        Their indices, in a graph that is not split by spans.
    basis
        ``[sender, width, d_model]``; None where values are the vectors themselves.
    post
        Layer through whose attention's post-norm the stream reads them, together with the
        others of that layer; None where it reads them as they are.
    """

    start: int
    stop: int
    basis: Tensor | None = None
    post: int | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def narrow(self) -> bool:
        """Whether a sender writes multiples of one direction (latents, neurons)."""
        return self.basis is not None and self.basis.shape[1] == 1

    @property
    def directions(self) -> Tensor:
        """``[sender, d_model]`` of a narrow block."""
        assert self.basis is not None
        return self.basis[:, 0]

    def vectors(self, value: Tensor) -> Tensor:
        """What the senders write, ``[sender, ..., d_model]``, of ``value [sender, ..., width]``."""
        if self.basis is None:
            return value
        return (value.flatten(1, -2) @ self.basis).unflatten(1, value.shape[1:-1])

    def parts(self, value: Tensor) -> Tensor:
        """What sums are made of: values of narrow blocks, of others the vectors."""
        return value if self.narrow else self.vectors(value)

    def total(self, parts: Tensor) -> Tensor:
        """Sum over the senders, ``[scenario, batch, pos, d_model]``."""
        return coefficients(parts) @ self.directions if self.narrow else parts.sum(0)

    def mix(self, parts: Tensor, weights: Tensor) -> Tensor:
        """Sums over the senders with ``weights [row, sender]``: ``[row, scenario, ...]``."""
        if not self.narrow:
            return torch.einsum("rs,sk...->rk...", weights, parts)
        if len(weights) * parts.numel() <= _MOST:
            rows = weights[:, None, None, None] * coefficients(parts)
            return rows @ self.directions
        return torch.stack([self._row(parts, row) for row in weights])

    def _row(self, parts: Tensor, row: Tensor) -> Tensor:
        inside = row.nonzero()[:, 0]
        if len(inside) == len(row):
            return self.total(parts)
        return coefficients(parts)[..., inside] @ self.directions[inside]


def coefficients(parts: Tensor) -> Tensor:
    """``[..., sender]`` of the values of a narrow block, a view."""
    return parts[..., 0].movedim(0, -1)


def by_sender(coefficients: Tensor) -> Tensor:
    """Undo :func:`coefficients`: values of a narrow block, a view."""
    return coefficients.movedim(-1, 0)[..., None]
