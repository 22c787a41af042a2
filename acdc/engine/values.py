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

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

__all__ = [
    "MOST",
    "Block",
    "Rows",
    "Sparse",
    "Values",
    "add_product",
    "by_sender",
    "coefficients",
    "gather",
    "product",
]

Values = list[Tensor]
"""By block, ``[sender, scenario, batch, pos, width]``."""

MOST = 1 << 23
"""Numbers that one product over latents may hold."""
_DENSE = 0.5
"""Share of the latents above which one product over all is quicker than one of each row's own."""


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
    growing
        ``[n, sender, width, d_model]`` of senders that write again at later MLPs: the basis once
        their own MLP and ``n`` more have written, of which ``basis`` is the last; None for others.
    layer
        Of that MLP.
    """

    start: int
    stop: int
    basis: Tensor | None = None
    post: int | None = None
    growing: Tensor | None = None
    layer: int = 0

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def narrow(self) -> bool:
        """Whether a sender writes multiples of one direction (latents, neurons)."""
        return self.basis is not None and self.basis.shape[1] == 1

    @property
    def directions(self) -> Float[Tensor, "sender d_model"]:
        """``[sender, d_model]`` of a narrow block."""
        assert self.basis is not None
        return self.basis[:, 0]

    def read_after(self, n_mlps: int) -> Block:
        """The block as it is read where so many MLPs have written."""
        if self.growing is None:
            return self
        return replace(self, basis=self.growing[n_mlps - 1 - self.layer], growing=None)

    def some(self, which: Tensor) -> Block:
        """A block of some of its senders, for what asks for no index."""
        return self if self.basis is None else replace(self, basis=self.basis[which])

    def vectors(
        self, value: Float[Tensor, "sender *place width"]
    ) -> Float[Tensor, "sender *place d_model"]:
        """What the senders write, ``[sender, ..., d_model]``, of ``value [sender, ..., width]``."""
        if self.basis is None:
            return value
        return (value.flatten(1, -2) @ self.basis).unflatten(1, value.shape[1:-1])

    def parts(self, value: Tensor) -> Tensor:
        """What sums are made of: values of narrow blocks, of others the vectors."""
        return value if self.narrow else self.vectors(value)

    def sum(self, value: Float[Tensor, "sender *place width"]) -> Float[Tensor, "*place d_model"]:
        """Sum of what the senders write, ``[scenario, batch, pos, d_model]``, of their values."""
        if self.basis is None:
            return value.sum(0)
        return value.movedim(0, -2).flatten(-2) @ self.basis.flatten(0, 1)

    def total(self, parts: Tensor) -> Tensor:
        """Sum over the senders, ``[scenario, batch, pos, d_model]``."""
        return coefficients(parts) @ self.directions if self.narrow else parts.sum(0)

    def mix(self, parts: Tensor, weights: Tensor) -> Tensor:
        """Sums over those with weight 1, not 0, of ``weights [row, sender]``: ``[row, ...]``."""
        if not self.narrow:
            return torch.einsum("rs,sk...->rk...", weights, parts)
        many = weights.device.type != "cpu" or weights.mean() > _DENSE
        if many and len(weights) * parts.numel() <= MOST:
            rows = weights[:, None, None, None] * coefficients(parts)
            return rows @ self.directions
        return torch.stack([self._row(parts, row) for row in weights])

    def pull(self, g: Float[Tensor, "token d_model"]) -> Float[Tensor, "sender token width"]:
        """``d metric / d value [sender, token, width]``, given that at the stream.

        Parameters
        ----------
        g
            ``[token, d_model]``: gradient at the stream that the block is written to.
        """
        if self.narrow:
            return by_sender(g @ self.directions.T)
        return g[None] if self.basis is None else g @ self.basis.transpose(1, 2)

    def rows(self, value: Float[Tensor, "sender token width"], tokens: slice | Tensor) -> Rows:
        """What the senders write on some tokens.

        Parameters
        ----------
        value
            ``[sender, token, width]``.
        tokens
            Index into the tokens.
        """
        if not self.narrow:
            return self.vectors(value[:, tokens])
        index, slots = gather(coefficients(value)[tokens])
        return Sparse(len(self), index, self.directions[index] * slots[..., None])

    def _row(self, parts: Tensor, row: Tensor) -> Tensor:
        inside = row.nonzero()[:, 0]
        if len(inside) == len(row):
            return self.total(parts)
        return coefficients(parts[inside]) @ self.directions[inside]


def coefficients(parts: Shaped[Tensor, "sender *place 1"]) -> Shaped[Tensor, "*place sender"]:
    """``[..., sender]`` of the values of a narrow block, a view."""
    return parts[..., 0].movedim(0, -1)


def by_sender(
    coefficients: Shaped[Tensor, "*place sender"],
) -> Shaped[Tensor, "sender *place 1"]:
    """Undo :func:`coefficients`: values of a narrow block, a view."""
    return coefficients.movedim(-1, 0)[..., None]


@dataclass(frozen=True, eq=False)
class Sparse:
    """Vectors of which each token has few, padded to equally many.

    Parameters
    ----------
    n
        How many there could be.
    index
        ``[token, slot]``: which of them.
    vectors
        ``[token, slot, d_model]``; 0 where there is none.
    """

    n: int
    index: Tensor
    vectors: Tensor

    def map(self, f: Callable[[Tensor], Tensor]) -> Sparse:
        """Apply a linear function of ``[row, token, d_model]``."""
        return replace(self, vectors=f(self.vectors.transpose(0, 1)).transpose(0, 1))


Rows = Tensor | Sparse
"""Vectors on each token: ``[row, token, d_model]``, or the few that are not zero."""


def gather(
    dense: Shaped[Tensor, "token latent"],
) -> tuple[Int[Tensor, "token slot"], Shaped[Tensor, "token slot"]]:
    """Index and value, ``[token, slot]`` each, of the entries of ``[token, latent]`` not zero."""
    token, latent = dense.nonzero(as_tuple=True)
    counts = torch.bincount(token, minlength=len(dense))
    slot = torch.arange(len(token), device=dense.device)
    slot = slot - (counts.cumsum(0) - counts)[token]
    width = int(counts.max()) if len(token) else 0
    index = torch.zeros(len(dense), width, dtype=torch.long, device=dense.device)
    value = dense.new_zeros(len(dense), width)
    index[token, slot], value[token, slot] = latent, dense[token, latent]
    return index, value


def product(a: Rows, b: Rows) -> Float[Tensor, "row_a row_b"]:
    """Sums over tokens and d_model of the products of each pair, ``[row of a, row of b]``.

    Those with few rows per token are multiplied on these alone, and added up by row.
    """
    if isinstance(a, Tensor):
        if isinstance(b, Tensor):
            return a.flatten(1) @ b.flatten(1).T
        products = torch.bmm(b.vectors, a.permute(1, 2, 0))  # (token, slot of b, row of a)
        total = products.new_zeros(b.n, len(a))
        return total.index_add_(0, b.index.flatten(), products.flatten(0, 1)).T
    if isinstance(b, Tensor):
        return product(b, a).T
    total = a.vectors.new_zeros(a.n, b.n)
    add_product(total, 0, a, b)
    return total


def add_product(total: Tensor, column: int, a: Sparse, b: Sparse, weight: float = 1.0) -> None:
    """Add the weighted :func:`product` of what is sparse to columns of ``total [row, column]``."""
    products = torch.bmm(a.vectors, b.vectors.transpose(1, 2))  # (token, slot of a, slot of b)
    pair = a.index[:, :, None] * total.shape[1] + (b.index[:, None, :] + column)
    where, what = pair.flatten().to(total.device), (weight * products).flatten().to(total)
    total.view(-1).index_add_(0, where, what)
