"""The experts of mixtures as nodes: ``m3.e5`` writes what expert 5 does, times its weight.

All experts of a layer are nodes, and there is no error node: what they write adds up to what the
mixture writes.  Each reads for itself, so that edges into it can be pruned alone.  What the router
says is a constant, that of the run that ablation starts from, or it is *free*: then ``m3.router``
is a receiver, too, and feeds every expert of its layer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from acdc.dictionaries.hooks import Hook
from acdc.errors import OptionError
from acdc.models.lowering.mixture import Mixture
from acdc.models.lowering.model import LoweredModel
from graphs.sites import Site

__all__ = ["ExpertAttachment", "experts_of"]


@dataclass(frozen=True, eq=False)
class ExpertAttachment:
    """The experts of one layer as nodes.

    Parameters
    ----------
    model
        The model.
    layer
        Which.
    routed
        Whether the router is free, and has a receiver of its own.
    """

    model: LoweredModel
    layer: int
    routed: bool

    architecture = "experts"

    @property
    def dictionary(self) -> ExpertAttachment:
        """Itself: it has of a dictionary what reports ask for."""
        return self

    @cached_property
    def site(self) -> Site:
        """Its place in the graph."""
        return Site("routed" if self.routed else "experts", self.layer, self.latents)

    @property
    def mixture(self) -> Mixture:
        """The mixture."""
        mlp = self.model.layers[self.layer].mlp
        assert isinstance(mlp, Mixture)
        return mlp

    @property
    def latents(self) -> tuple[int, ...]:
        """Numbers of the experts."""
        return tuple(range(self.mixture.n_experts))

    @property
    def source(self) -> str:
        """What messages call it."""
        return f"experts of m{self.layer}"

    @property
    def reads(self) -> Hook:
        """The raw stream in front of the mixture."""
        return Hook(self.layer, "mlp_in")

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the experts' output matrices."""
        weights = self.mixture.W_out.detach().cpu().float().contiguous().view(torch.uint8).numpy()
        return hashlib.sha256(weights.tobytes()).hexdigest()[:16]

    def on(self, model: LoweredModel) -> ExpertAttachment:
        """Return the attachment on the same model with other norms or routers."""
        return replace(self, model=model)


def experts_of(model: LoweredModel, *, routed: bool = False) -> list[ExpertAttachment]:
    """Return the experts of every mixture of a model; ``routed`` as above.

    Raises
    ------
    OptionError
        If it has no mixture.
    """
    layers = [i for i, layer in enumerate(model.layers) if isinstance(layer.mlp, Mixture)]
    if not layers:
        raise OptionError(
            f"experts: {model.name!r} has no mixtures of experts; leave --experts out"
        )
    return [ExpertAttachment(model, layer, routed) for layer in layers]
