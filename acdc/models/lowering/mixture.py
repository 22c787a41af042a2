"""Mixtures of experts: an MLP that sends each token to a few of many small MLPs.

``y = sum over e of weight_e(x) * expert_e(x)``, where the *router* gives most experts the weight 0.
Router and experts are the model's own modules, called as they are, for one expert at a time.

The router's choice can be *held*: then weights are those of another run at the same place, and the
mixture is a sum of MLPs with constant factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from acdc.models.lowering.model import RoutedMlp

__all__ = ["Mixture"]


@dataclass(frozen=True, eq=False)
class Mixture(RoutedMlp):
    """A mixture of experts.

    Parameters are those of :class:`FeedForward`, with ``W_out`` of all experts, and these.

    Parameters
    ----------
    router
        ``[token, d_model]`` (normed) -> weights of the chosen experts ``[token, chosen]``, and
        which they are, likewise.
    experts
        ``([token, d_model], [token, 1] which, [token, 1] weights)`` -> ``[token, d_model]``: the
        model's own module, asked for one expert a token.
    n_experts, width
        How many experts there are, and neurons in each.
    held
        ``[batch, pos, expert]``: weights that stand for the router's; None: nothing.
    """

    router: Callable[[Tensor], tuple[Tensor, Tensor]] = field(kw_only=True)
    experts: Callable[[Tensor, Tensor, Tensor], Tensor] = field(kw_only=True)
    n_experts: int = field(kw_only=True)
    width: int = field(kw_only=True)
    held: Tensor | None = field(default=None, kw_only=True)

    @property
    def d_mlp(self) -> int:
        """Neurons of an expert."""
        return self.width

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., pos, d_model]`` (raw stream) -> output."""
        y = self.norm(x)
        if self.held is None:
            out: Tensor = self.module(y)
            return out
        weights = self.weights(y)
        total = torch.zeros_like(y)
        for e in range(self.n_experts):
            total = total + self.weighted(e, y, weights[..., e])
        return total

    def weights(self, y: Float[Tensor, "*place d_model"]) -> Float[Tensor, "*place expert"]:
        """Weight of every expert, 0 where it is not chosen, of ``y`` (normed), or what is held."""
        if self.held is not None:
            return self.held.expand(*y.shape[:-1], -1)
        flat = y.reshape(-1, y.shape[-1])
        chosen, which = self.router(flat)
        found = chosen.new_zeros(len(flat), self.n_experts).scatter(1, which, chosen)
        return found.unflatten(0, y.shape[:-1])

    def expert(self, e: int, y: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """What one expert makes of ``y`` (normed), with the weight 1."""
        which = torch.full((len(y), 1), e, dtype=torch.long, device=y.device)
        return self.experts(y, which, y.new_ones(len(y), 1))

    def weighted(
        self, e: int, y: Float[Tensor, "*place d_model"], weight: Float[Tensor, " *place"]
    ) -> Float[Tensor, "*place d_model"]:
        """What one expert writes: computed where its weight is not 0."""
        chosen = weight != 0
        out = torch.zeros_like(y)
        if chosen.any():
            found = self.expert(e, y[chosen]) * weight[chosen][:, None]
            out[chosen] = found.to(out.dtype)
        return out

    def hold_router(self, x: Float[Tensor, "batch pos d_model"]) -> Mixture:
        """Return the mixture with the weights that it has at ``x`` (raw stream)."""
        return replace(self, held=self.weights(self.norm(x)).detach())

    def at(self, positions: slice | list[int]) -> Mixture:
        """Return the mixture for some of the positions."""
        norm = self.norm.at(positions)
        held = None if self.held is None else self.held[:, positions]
        return replace(self, norm=norm, held=held)

    def on(self, tokens: slice | Tensor) -> Mixture:
        """Return the mixture for some tokens of the flattened batch and positions."""
        held = None if self.held is None else self.held.flatten(0, 1)[tokens]
        return replace(self, norm=self.norm.on(tokens), held=held)

    @torch.enable_grad()
    def pull_experts(
        self, x: Float[Tensor, "token d_model"], g: Float[Tensor, "token d_model"]
    ) -> Float[Tensor, "expert token d_model"]:
        """Gradient at what each expert reads, the router's weights being constants.

        Parameters
        ----------
        x
            ``[token, d_model]`` (raw stream).
        g
            ``[token, d_model]``: gradient at the output.

        Returns
        -------
        Tensor
            ``[expert, token, d_model]``.
        """
        y = self.norm(x).detach()
        weights = self.weights(y).detach()
        rows = torch.zeros(self.n_experts, *y.shape, dtype=y.dtype, device=y.device)
        for e in range(self.n_experts):
            chosen = weights[:, e] != 0
            if chosen.any():
                leaf = y[chosen].requires_grad_(True)
                into = (g[chosen] * weights[chosen, e, None]).to(y.dtype)
                rows[e, chosen] = torch.autograd.grad(self.expert(e, leaf), leaf, into)[0]
        return self.norm.vjp(x, rows)

    @torch.enable_grad()
    def pull_router(
        self, x: Float[Tensor, "token d_model"], g: Float[Tensor, "token d_model"]
    ) -> Float[Tensor, "token d_model"]:
        """Gradient at what the router reads; parameters as of :meth:`pull_experts`."""
        leaf = self.norm(x).detach().requires_grad_(True)
        weights = self.weights(leaf)
        into = torch.zeros_like(weights)
        with torch.no_grad():
            for e in range(self.n_experts):
                chosen = weights[:, e] != 0
                if chosen.any():
                    written = self.expert(e, leaf[chosen])
                    into[chosen, e] = torch.linalg.vecdot(g[chosen], written).to(into.dtype)
        return self.norm.vjp(x, torch.autograd.grad(weights, leaf, into)[0])
