"""The stage of a mixture whose experts are senders; see :mod:`acdc.dictionaries.experts`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from acdc.dictionaries.experts import ExpertAttachment
from acdc.engine.stages import Gradients, Inputs, Layout, Mlp
from acdc.engine.values import Rows, Values
from acdc.models.lowering.attention import Kind
from acdc.models.lowering.mixture import Mixture
from acdc.models.lowering.model import Key, Trace

__all__ = ["EXPERT", "ROUTER", "Experts", "Projection"]

EXPERT: Literal["expert"] = "expert"
"""What an expert makes of what it reads, before its weight."""
ROUTER: Literal["router"] = "router"
"""The weights that a free router gives."""
Projection = Kind | Literal["expert", "router"]
"""What is kept of what a receiver reads."""


@dataclass(eq=False)
class Experts(Mlp):
    """A mixture whose experts are senders, and receivers: each reads for itself.

    A free router is the last receiver, and feeds them all; one that is held feeds none.
    """

    experts: ExpertAttachment = field(kw_only=True)

    @property
    def mixture(self) -> Mixture:
        """The mixture, whose router is held or free."""
        return self.experts.mixture

    @property
    def router(self) -> int | None:
        """The router's receiver, in a graph that is not split by spans; None if it is held."""
        return self.ports.stop - 1 if self.experts.routed else None

    def layout(self) -> Layout:
        """Blocks, see :meth:`Stage.layout`."""
        return [(self.mixture.n_experts, None, None)]

    @property
    def sees_gradients(self) -> tuple[Key, ...]:
        """Where :meth:`pull` needs gradients."""
        return (self.written_at,)

    def compute(self, inputs: Inputs) -> Values:
        """Each expert from what it reads itself, weighted by what the router reads."""
        mixture, y = self.mixture, self.mixture.norm(inputs.distinct)
        weights = mixture.weights(y[inputs.index[-1]] if self.experts.routed else y[0])
        return [self._written(lambda e: y[inputs.index[e]], weights)]

    def of_trace(self, trace: Trace) -> Values:
        """All from what the mixture reads."""
        y = self.mixture.norm(trace.mlp_in[self.layer][None])
        return [self._written(lambda e: y, self.mixture.weights(y))]

    def pull(self, found: Gradients, tokens: slice | Tensor) -> Iterator[tuple[int, Rows]]:
        """``d metric / d input`` of every expert, and of a free router, see :meth:`Stage.pull`."""
        stream = found.trace.at(self.stream).flatten(0, 1)[tokens]
        g, mixture = found.tokens(self.written_at, tokens), self.mixture.on(tokens)
        yield 0, mixture.pull_experts(stream, g)
        if self.experts.routed:
            yield mixture.n_experts, mixture.pull_router(stream, g)[None]

    def alone(
        self, e: int, x: Float[Tensor, "*place pos d_model"], positions: slice | list[int]
    ) -> Float[Tensor, "*place pos d_model"]:
        """What one expert makes of what it reads at some positions, weighted if the router is held.

        Parameters
        ----------
        e
            Which.
        x
            ``[..., pos, d_model]`` (raw stream).
        positions
            Those of ``x``.
        """
        mixture = self.mixture.at(positions)
        y = mixture.norm(x)
        if self.experts.routed:
            return mixture.expert(e, y.flatten(0, -2)).view_as(y)
        return mixture.weighted(e, y, mixture.weights(y)[..., e])

    def route(
        self, x: Float[Tensor, "*place pos d_model"], positions: slice | list[int]
    ) -> Float[Tensor, "*place pos expert"]:
        """Weights that a free router gives for what it reads at some positions."""
        mixture = self.mixture.at(positions)
        return mixture.weights(mixture.norm(x))

    def _written(self, read: Callable[[int], Tensor], weights: Tensor) -> Tensor:
        """``[expert, scenario, batch, pos, d_model]``, of what each reads (normed)."""
        every = range(self.mixture.n_experts)
        return torch.stack([self.mixture.weighted(e, read(e), weights[..., e]) for e in every])
