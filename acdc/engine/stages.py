"""Stages of a model: what is read together, and what is computed from it.

===================  ===========================  =================================================
stage                receivers                    writes
===================  ===========================  =================================================
:class:`Heads`       q, k and v of a layer        its heads
:class:`LatentHeads` likewise                     latents of its z or output, and their error node
:class:`Mlp`         the MLP                      the MLP
:class:`LatentMlp`   the MLP                      latents of its output, and their error node
:class:`NeuronMlp`   the MLP                      its neurons, and their error node
:class:`Transcoder`  every latent and the error   latents, and their error node
                     node for itself
:class:`Cut`         the stream                   latents of the whole stream, and their error node
:class:`Logits`      the end of the stream        nothing
===================  ===========================  =================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.values import Values, by_sender
from acdc.latents.attachment import Attachment
from acdc.lowering.attention import KINDS
from acdc.lowering.model import LoweredModel, Trace
from graphs.graph import attention_rows

__all__ = [
    "Cut",
    "Heads",
    "Inputs",
    "LatentHeads",
    "LatentMlp",
    "Layout",
    "Logits",
    "Mlp",
    "NeuronMlp",
    "Stage",
    "Transcoder",
]

Layout = list[tuple[int, Tensor | None, int | None]]
"""Number of senders, basis and post-norm layer of each block."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the receivers of a stage read.

    Parameters
    ----------
    distinct
        ``[row, scenario, batch, pos, d_model]``.
    index
        ``[receiver]``: row of each.
    tested, scenarios
        A receiver (counted within the stage) with an input per scenario, and these,
        ``[scenario, batch, pos, d_model]``; None where there is none.
    """

    distinct: Tensor
    index: NDArray[np.int64]
    tested: int | None = None
    scenarios: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> Inputs:
        """Apply a function of single positions, once to each different input."""
        few = None if self.scenarios is None else f(self.scenarios)
        return replace(self, distinct=f(self.distinct), scenarios=few)

    def all(self) -> Tensor:
        """``[receiver, scenario, batch, pos, d_model]``."""
        x = self.distinct[torch.as_tensor(self.index)]
        if self.tested is None or self.scenarios is None:
            return x
        if len(x) == 1:
            return self.scenarios[None]
        n = max(x.shape[1], len(self.scenarios))
        x = x.expand(-1, n, -1, -1, -1).clone()
        x[self.tested] = self.scenarios
        return x


@dataclass(eq=False)
class Stage(ABC):
    """Receivers that are read together, and the blocks that are computed from them.

    Attributes
    ----------
    model, layer
        Where.
    n_receivers
        How many there are.
    first_receiver
        Index of the first; the others follow it.
    seen
        Positions of the blocks that it reads, in :attr:`Program.blocks`.
    constants
        Layers whose b_O is in the stream as a constant.
    blocks
        Positions of the blocks that it writes.
    """

    model: LoweredModel
    layer: int
    n_receivers: int
    first_receiver: int = 0
    seen: range = range(0)
    constants: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()

    @abstractmethod
    def layout(self) -> Layout:
        """Number of senders, basis and post-norm layer of each block that it writes."""

    @abstractmethod
    def compute(self, inputs: Inputs) -> Values:
        """Values of the blocks, from what the receivers read."""

    @abstractmethod
    def of_trace(self, trace: Trace) -> Values:
        """Values of the blocks in an ordinary forward pass."""


def _split(attachment: Attachment, read: Tensor, written: Tensor) -> Values:
    """Values of the latents of what is ``read``, and what they leave of what is ``written``."""
    found = attachment.coefficients(read)
    return [by_sender(found), (written - found @ attachment.directions_in_stream)[None]]


def _latent_layout(attachment: Attachment, post: int | None = None) -> Layout:
    """Layout of latents and their error node."""
    basis = attachment.directions_in_stream[:, None]
    return [(len(attachment.latents), basis, post), (1, None, post)]


class Heads(Stage):
    """An attention layer whose heads are senders."""

    def layout(self) -> Layout:
        """Blocks, see :meth:`Stage.layout`."""
        attention = self.model.layers[self.layer].attention
        return [(attention.n_heads, attention.W_O, self._post)]

    @property
    def _post(self) -> int | None:
        return None if self.model.layers[self.layer].attention_post is None else self.layer

    def split(self, z: Tensor) -> Values:
        """Values of the blocks from ``z [head, scenario, batch, pos, d_head]``."""
        return [z]

    def compute(self, inputs: Inputs) -> Values:
        """Values of the blocks, from what the receivers read."""
        block = self.model.layers[self.layer]
        attention, x = block.attention, inputs.map(block.ln1).all()
        rows = attention_rows(self.model.shape)
        placed = {}
        for kind in KINDS:
            some = x[rows[kind]]
            projected = attention.project_split(kind, some.flatten(1, -2))
            projected = projected.unflatten(1, some.shape[1:-1])
            placed[kind] = attention.place(kind, projected, slice(0, x.shape[-2]))
        if attention.group > 1:
            for kind in ("k", "v"):
                placed[kind] = placed[kind].repeat_interleave(attention.group, dim=0)
        mask = attention.mask(x.shape[-2], x.device)
        return self.split(attention.attend(placed["q"], placed["k"], placed["v"], mask))

    def of_trace(self, trace: Trace) -> Values:
        """Values of the blocks in an ordinary forward pass."""
        return self.split(trace.z[self.layer].transpose(0, 1)[:, None])


@dataclass(eq=False)
class LatentHeads(Heads):
    """An attention layer whose output, or z, is a dictionary's."""

    attachment: Attachment = field(kw_only=True)

    def layout(self) -> Layout:
        """Blocks, see :meth:`Stage.layout`."""
        post = self._post if self.attachment.site.kind == "attn_z" else None
        return _latent_layout(self.attachment, post)

    def split(self, z: Tensor) -> Values:
        """Values of the blocks, from what the component writes."""
        block = self.model.layers[self.layer]
        written = torch.einsum("h...e,hed->...d", z, block.attention.W_O)
        if self.attachment.site.kind == "attn_z":
            return _split(self.attachment, z.movedim(0, -2).flatten(-2), written)
        b_O = block.attention.b_O
        y = written if b_O is None else written + b_O
        if block.attention_post is not None:
            y = written = block.attention_post(y)
        return _split(self.attachment, y, written)


class Mlp(Stage):
    """An MLP that is one sender."""

    def layout(self) -> Layout:
        """Blocks, see :meth:`Stage.layout`."""
        return [(1, None, None)]

    def run(self, x: Tensor) -> Tensor:
        """Output of the MLP."""
        mlp = self.model.layers[self.layer].mlp
        assert mlp is not None
        return mlp(x)

    def split(self, y: Tensor) -> Values:
        """Values of the blocks from the MLP's output."""
        return [y[None]]

    def compute(self, inputs: Inputs) -> Values:
        """Values of the blocks, from what the receivers read."""
        return self.split(self.run(inputs.all()[0]))

    def of_trace(self, trace: Trace) -> Values:
        """Values of the blocks in an ordinary forward pass."""
        return self.split(trace.mlp_out[self.layer][None])


@dataclass(eq=False)
class LatentMlp(Mlp):
    """An MLP whose output is a dictionary's."""

    attachment: Attachment = field(kw_only=True)

    def layout(self) -> Layout:
        """Blocks, see :meth:`Stage.layout`."""
        return _latent_layout(self.attachment)

    def split(self, y: Tensor) -> Values:
        """Values of the blocks, from what the component writes."""
        return _split(self.attachment, y, y)


@dataclass(eq=False)
class NeuronMlp(LatentMlp):
    """An MLP whose neurons are senders."""

    def compute(self, inputs: Inputs) -> Values:
        """Values of the blocks, from what the MLP reads."""
        return self._split(inputs.all()[0])

    def of_trace(self, trace: Trace) -> Values:
        """Values of the blocks in an ordinary forward pass."""
        return self._split(trace.mlp_in[self.layer][None])

    def _split(self, stream: Tensor) -> Values:
        return _split(self.attachment, stream, self.run(stream))


@dataclass(eq=False)
class Transcoder(LatentMlp):
    """An MLP behind a transcoder: every latent and the error node reads for itself."""

    def compute(self, inputs: Inputs) -> Values:
        """Each latent from what it reads itself."""
        n = len(self.attachment.latents)
        x, index = inputs.distinct, inputs.index
        found = x.new_zeros(*x.shape[1:-1], n)
        for row in np.unique(index[:n]):
            some = torch.as_tensor(np.flatnonzero(index[:n] == row))
            found[..., some] = self._coefficients(x[row])[..., some]
        error_in = x[index[n]]
        if inputs.tested is not None and inputs.scenarios is not None:
            if inputs.tested == n:
                error_in = inputs.scenarios
            else:
                found = found.expand(len(inputs.scenarios), *found.shape[1:]).clone()
                own = self._coefficients(inputs.scenarios)
                found[..., inputs.tested] = own[..., inputs.tested]
        return [by_sender(found), self._error(error_in)]

    def of_trace(self, trace: Trace) -> Values:
        """All from what the MLP reads."""
        stream, y = trace.mlp_in[self.layer][None], trace.mlp_out[self.layer][None]
        return _split(self.attachment, self.attachment.read_stream(stream), y)

    def _coefficients(self, stream: Tensor) -> Tensor:
        return self.attachment.coefficients(self.attachment.read_stream(stream))

    def _error(self, stream: Tensor) -> Tensor:
        return (self.run(stream) - self._coefficients(stream) @ self.attachment.directions)[None]


@dataclass(eq=False)
class Cut(Stage):
    """A dictionary of the whole stream."""

    attachment: Attachment = field(kw_only=True)

    def layout(self) -> Layout:
        """Blocks, see :meth:`Stage.layout`."""
        return _latent_layout(self.attachment)

    def compute(self, inputs: Inputs) -> Values:
        """Values of the blocks, from what the receivers read."""
        x = inputs.all()[0]
        return _split(self.attachment, x, x)

    def of_trace(self, trace: Trace) -> Values:
        """Values of the blocks in an ordinary forward pass."""
        x = self.stream(trace)[None]
        return _split(self.attachment, x, x)

    def stream(self, trace: Trace) -> Tensor:
        """Raw stream that it reads, ``[batch, pos, d_model]``."""
        if self.attachment.site.kind == "resid_mid":
            return trace.mlp_in[self.layer]
        assert trace.final is not None
        return [*trace.attention_in, trace.final][self.layer]


class Logits(Stage):
    """The end of the stream; it writes nothing."""

    def layout(self) -> Layout:
        """Blocks, see :meth:`Stage.layout`."""
        return []

    def compute(self, inputs: Inputs) -> Values:
        """Values of the blocks, from what the receivers read."""
        return []

    def of_trace(self, trace: Trace) -> Values:
        """Values of the blocks in an ordinary forward pass."""
        return []
