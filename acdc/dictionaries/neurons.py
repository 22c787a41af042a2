"""The neurons of an MLP as a dictionary of its output, an exact one.

``y = sum_i h_i W_out[i] + b_out``, where ``h`` is what the output matrix reads: ``act(x W_in)``,
or in gated MLPs ``act(x W_gate) * (x W_in)``.  Neuron ``i`` of layer 3 is the node ``m3.n<i>`` and
writes ``h_i W_out[i]``; the error node writes ``b_out`` and neurons that are no nodes.  All read
what the MLP reads, through its one receiver; or, if asked, each through a receiver of its own: then
neuron ``i`` is computed from what edges bring to it, and the error node is the MLP on what edges
bring to that, less the nodes' neurons there.  Behind a post-norm (Gemma-2: RMS) a neuron writes
``h_i scale W_out[i] * weight``, with the scale of the run at hand: the norm is a factor of every
neuron's activation.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from acdc.dictionaries.hooks import Hook
from acdc.errors import OptionError, UnsupportedModelError
from acdc.models.lowering.model import FeedForward, LoweredModel

__all__ = ["EVERYWHERE", "Neurons", "neurons_of"]

EVERYWHERE = slice(None)
"""All positions."""

_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Neurons:
    """Neurons of one MLP, with what attachments need of a dictionary.

    Parameters
    ----------
    model
        Lowered model.
    layer
        Of the MLP.
    alone
        Whether every neuron reads for itself.
    """

    model: LoweredModel
    layer: int
    alone: bool = False

    architecture = "neurons"
    k = None

    @property
    def mlp(self) -> FeedForward:
        """The MLP."""
        mlp = self.model.layers[self.layer].mlp
        assert isinstance(mlp, FeedForward)
        return mlp

    @property
    def source(self) -> str:
        """What messages call it."""
        return f"neurons of m{self.layer}"

    @property
    def reads(self) -> Hook:
        """The raw stream in front of the MLP."""
        return Hook(self.layer, "mlp_in")

    @property
    def writes(self) -> Hook:
        """The MLP's output."""
        return Hook(self.layer, "mlp_out")

    @property
    def n_latents(self) -> int:
        """How many neurons there are."""
        return self.mlp.W_out.shape[0]

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the output matrix."""
        weights = self.mlp.W_out.detach().cpu().float().contiguous().view(torch.uint8).numpy()
        return hashlib.sha256(weights.tobytes()).hexdigest()[:16]

    @cached_property
    def decoder_directions(self) -> Tensor:
        """``[neuron, d_model]``: what a neuron writes per unit of its activation."""
        post = self.mlp.post
        weight = None if post is None else post.weight
        return self.mlp.W_out if weight is None else self.mlp.W_out * weight

    def encode(self, x: Tensor, positions: slice | list[int] = EVERYWHERE) -> Tensor:
        """Activations ``[..., pos, neuron]`` at the raw stream ``x [..., pos, d_model]``."""
        mlp = self.mlp.at(positions)
        found, out = mlp.neurons(x)
        return found if mlp.post is None else found * mlp.post.inverse(out).to(found.dtype)

    @torch.no_grad()
    def check(self) -> None:
        """Raise UnsupportedModelError unless the neurons add up to the MLP but for a constant."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.model.d_vocab, (2, 8), generator=generator)
        n = min(tokens.shape[1], self.model.n_ctx)
        stream = self.model.forward(tokens[:, :n].to(self.model.device)).mlp_in[self.layer]
        written = self.mlp(stream)
        rest = (written - self.encode(stream) @ self.decoder_directions).flatten(0, 1)
        error = float((rest - rest[0]).abs().max())
        scale = float(written.abs().max())
        eps = max(_TOLERANCE, 16 * torch.finfo(written.dtype).eps)
        if not error <= eps * max(scale, 1e-30):
            raise UnsupportedModelError(
                f"the neurons of m{self.layer} of {self.model.name!r} do not add up to what it "
                f"writes (error {error:.2g}, largest value {scale:.2g}): leave --neurons out"
            )


def neurons_of(model: LoweredModel, *, alone: bool = False) -> list[Neurons]:
    """Return the neurons of every MLP of a model, checked; ``alone`` as of :class:`Neurons`.

    Raises
    ------
    OptionError
        If the model has no MLPs.
    UnsupportedModelError
        If the neurons of one do not add up to what it writes.
    """
    if not model.shape.has_mlp:
        raise OptionError(
            f"neurons: {model.name!r} has attention only, no MLPs; leave --neurons out"
        )
    if model.has_experts:
        raise UnsupportedModelError(
            f"neurons: those of the experts of {model.name!r} are not supported; ask for --experts"
        )
    found = [Neurons(model, layer, alone) for layer in range(model.shape.n_layers)]
    for neurons in found:
        neurons.check()
    return found
