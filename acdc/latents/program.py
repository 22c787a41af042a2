"""A model with dictionaries as a sequence of stages: what is read together, what is written.

A *block* is what one stage writes: senders that are vectors (heads, an MLP, error nodes) or
latents, kept as coefficients of fixed directions.  Values carry the axes ``scenario batch pos``:
``[sender, scenario, batch, pos, d_model]`` for vectors and ``[scenario, batch, pos, latent]``
for latents, where the scenario axis may have length 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.latents.attachment import Attachment, NeuronAttachment
from acdc.lowering.attention import KINDS
from acdc.lowering.model import LoweredModel, Trace

__all__ = [
    "Block",
    "Cut",
    "Heads",
    "Inputs",
    "LatentHeads",
    "LatentMlp",
    "Logits",
    "Mlp",
    "NeuronMlp",
    "Program",
    "Stage",
    "Transcoder",
]

_MOST = 1 << 23
"""Numbers that one product over latents may hold."""


@dataclass(frozen=True, eq=False)
class Block:
    """Senders that one stage writes.

    Parameters
    ----------
    start, stop
        Their indices.
    directions
        ``[latent, d_model]``; None for vectors.
    post
        Layer through whose attention's post-norm the stream reads them, together with the
        others of that layer; None where it reads them as they are.
    """

    start: int
    stop: int
    directions: Tensor | None = None
    post: int | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def total(self, value: Tensor) -> Tensor:
        """Sum over the senders, ``[scenario, batch, pos, d_model]``."""
        return value.sum(0) if self.directions is None else value @ self.directions

    def mix(self, value: Tensor, weights: Tensor) -> Tensor:
        """Sums over the senders with ``weights [row, sender]``: ``[row, scenario, ...]``."""
        if self.directions is None:
            return torch.einsum("rs,sk...->rk...", weights, value)
        if len(weights) * value.numel() <= _MOST:
            rows = weights[:, None, None, None] * value
            return rows @ self.directions
        return torch.stack([self._row(value, row) for row in weights])

    def _row(self, value: Tensor, row: Tensor) -> Tensor:
        assert self.directions is not None
        inside = row.nonzero()[:, 0]
        if len(inside) == len(row):
            return self.total(value)
        return value[..., inside] @ self.directions[inside]


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
    def layout(self) -> list[tuple[int, Tensor | None, int | None]]:
        """Number of senders, directions and post-norm layer of each block."""

    @abstractmethod
    def compute(self, inputs: Inputs) -> list[Tensor]:
        """Values of the blocks, from what the receivers read."""

    @abstractmethod
    def of_trace(self, trace: Trace) -> list[Tensor]:
        """Values of the blocks in an ordinary forward pass."""


def _split(attachment: Attachment, y: Tensor, rest: Tensor) -> list[Tensor]:
    """Coefficients of the latents of ``y``, and ``rest`` without what they write to it."""
    found = attachment.coefficients(y)
    return [found, (rest - found @ attachment.directions_in_stream)[None]]


class Heads(Stage):
    """An attention layer whose heads are senders."""

    def layout(self) -> list[tuple[int, Tensor | None, int | None]]:
        """Blocks, see :meth:`Stage.layout`."""
        block = self.model.layers[self.layer]
        return [(block.attention.n_heads, None, self._post)]

    @property
    def _post(self) -> int | None:
        return None if self.model.layers[self.layer].attention_post is None else self.layer

    def split(self, z: Tensor) -> list[Tensor]:
        """Values of the blocks from ``z [head, scenario, batch, pos, d_head]``."""
        W_O = self.model.layers[self.layer].attention.W_O
        return [torch.einsum("h...e,hed->h...d", z, W_O)]

    def compute(self, inputs: Inputs) -> list[Tensor]:
        """Values of the blocks, from what the receivers read."""
        block = self.model.layers[self.layer]
        attention, x = block.attention, block.ln1(inputs.all())
        heads, kv = attention.n_heads, len(attention.W["k"])
        split = self.model.shape.split_qkv
        grouped = self.model.shape.grouped
        first = {"q": 0, "k": heads, "v": heads + kv} if split else (
            {"q": 0, "k": heads, "v": heads} if grouped else {"q": 0, "k": 0, "v": 0}
        )  # fmt: skip
        placed = {}
        for kind in KINDS:
            some = x[first[kind] : first[kind] + (heads if kind == "q" else kv)]
            projected = attention.project_split(kind, some.flatten(1, -2))
            projected = projected.unflatten(1, some.shape[1:-1])
            placed[kind] = attention.place(kind, projected, slice(0, x.shape[-2]))
        if attention.group > 1:
            for kind in ("k", "v"):
                placed[kind] = placed[kind].repeat_interleave(attention.group, dim=0)
        mask = attention.mask(x.shape[-2], x.device)
        return self.split(attention.attend(placed["q"], placed["k"], placed["v"], mask))

    def of_trace(self, trace: Trace) -> list[Tensor]:
        """Values of the blocks in an ordinary forward pass."""
        return self.split(trace.z[self.layer].transpose(0, 1)[:, None])


@dataclass(eq=False)
class LatentHeads(Heads):
    """An attention layer whose output, or z, is a dictionary's."""

    attachment: Attachment = field(kw_only=True)

    def layout(self) -> list[tuple[int, Tensor | None, int | None]]:
        """Blocks, see :meth:`Stage.layout`."""
        post = self._post if self.attachment.site.kind == "attn_z" else None
        return [
            (len(self.attachment.latents), self.attachment.directions_in_stream, post),
            (1, None, post),
        ]

    def split(self, z: Tensor) -> list[Tensor]:
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

    def layout(self) -> list[tuple[int, Tensor | None, int | None]]:
        """Blocks, see :meth:`Stage.layout`."""
        return [(1, None, None)]

    def run(self, x: Tensor) -> Tensor:
        """Output of the MLP."""
        mlp = self.model.layers[self.layer].mlp
        assert mlp is not None
        return mlp(x)

    def split(self, y: Tensor) -> list[Tensor]:
        """Values of the blocks from the MLP's output."""
        return [y[None]]

    def compute(self, inputs: Inputs) -> list[Tensor]:
        """Values of the blocks, from what the receivers read."""
        return self.split(self.run(inputs.all()[0]))

    def of_trace(self, trace: Trace) -> list[Tensor]:
        """Values of the blocks in an ordinary forward pass."""
        return self.split(trace.mlp_out[self.layer][None])


@dataclass(eq=False)
class LatentMlp(Mlp):
    """An MLP whose output is a dictionary's."""

    attachment: Attachment = field(kw_only=True)

    def layout(self) -> list[tuple[int, Tensor | None, int | None]]:
        """Blocks, see :meth:`Stage.layout`."""
        return [(len(self.attachment.latents), self.attachment.directions, None), (1, None, None)]

    def split(self, y: Tensor) -> list[Tensor]:
        """Values of the blocks, from what the component writes."""
        return _split(self.attachment, y, y)


@dataclass(eq=False)
class NeuronMlp(LatentMlp):
    """An MLP whose neurons are senders."""

    def compute(self, inputs: Inputs) -> list[Tensor]:
        """Values of the blocks, from what the MLP reads."""
        return self._split(inputs.all()[0])

    def of_trace(self, trace: Trace) -> list[Tensor]:
        """Values of the blocks in an ordinary forward pass."""
        return self._split(trace.mlp_in[self.layer][None])

    def _split(self, stream: Tensor) -> list[Tensor]:
        found = self.attachment.coefficients(stream)
        return [found, (self.run(stream) - found @ self.attachment.directions)[None]]


@dataclass(eq=False)
class Transcoder(LatentMlp):
    """An MLP behind a transcoder: every latent and the error node reads for itself."""

    def compute(self, inputs: Inputs) -> list[Tensor]:
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
        return [found, self._error(error_in)]

    def of_trace(self, trace: Trace) -> list[Tensor]:
        """All from what the MLP reads."""
        stream, y = trace.mlp_in[self.layer][None], trace.mlp_out[self.layer][None]
        found = self._coefficients(stream)
        return [found, (y - found @ self.attachment.directions)[None]]

    def _coefficients(self, stream: Tensor) -> Tensor:
        return self.attachment.coefficients(self.attachment.read_stream(stream))

    def _error(self, stream: Tensor) -> Tensor:
        return (self.run(stream) - self._coefficients(stream) @ self.attachment.directions)[None]


@dataclass(eq=False)
class Cut(Stage):
    """A dictionary of the whole stream."""

    attachment: Attachment = field(kw_only=True)

    def layout(self) -> list[tuple[int, Tensor | None, int | None]]:
        """Blocks, see :meth:`Stage.layout`."""
        return [(len(self.attachment.latents), self.attachment.directions, None), (1, None, None)]

    def compute(self, inputs: Inputs) -> list[Tensor]:
        """Values of the blocks, from what the receivers read."""
        x = inputs.all()[0]
        return _split(self.attachment, x, x)

    def of_trace(self, trace: Trace) -> list[Tensor]:
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

    def layout(self) -> list[tuple[int, Tensor | None, int | None]]:
        """Blocks, see :meth:`Stage.layout`."""
        return []

    def compute(self, inputs: Inputs) -> list[Tensor]:
        """Values of the blocks, from what the receivers read."""
        return []

    def of_trace(self, trace: Trace) -> list[Tensor]:
        """Values of the blocks in an ordinary forward pass."""
        return []


class Program:
    """Stages and blocks in the order of the graph's receivers and senders.

    Parameters
    ----------
    model
        Lowered model.
    attachments
        Dictionaries, no two at one place.

    Attributes
    ----------
    blocks
        The first ones are the embeddings'.
    stages
        The last is ``logits``.
    """

    def __init__(self, model: LoweredModel, attachments: Sequence[Attachment]) -> None:
        self.model, self.shape = model, model.shape
        self._at = {a.site.name: a for a in attachments}
        self.n_sources = 2 if self.shape.split_embed else 1
        self.blocks = [Block(0, self.n_sources)]
        self.stages: list[Stage] = []
        self._first_seen, self._constants = 0, ()
        self._n_receivers = 0
        self._lay_out()

    @property
    def n_senders(self) -> int:
        """Senders of the graph."""
        return self.blocks[-1].stop

    def _lay_out(self) -> None:
        shape = self.shape
        group = shape.n_heads + (0 if not shape.grouped else shape.kv_heads)
        n_qkv = shape.n_heads + 2 * shape.kv_heads if shape.split_qkv else group
        for layer, block in enumerate(self.model.layers):
            self._cut(f"r{layer}", layer)
            attached = self._at.get(f"a{layer}")
            heads = (
                Heads(self.model, layer, n_qkv)
                if attached is None
                else LatentHeads(self.model, layer, n_qkv, attachment=attached)
            )
            mlp = self._mlp(layer) if block.mlp is not None else None
            self._read(heads)
            if mlp is not None and shape.parallel:
                self._read(mlp)
            self._write(heads)
            if block.attention.b_O is not None and all(b.post is None for b in self._own(heads)):
                absorbed = block.attention_post is not None  # a post-norm's b_O is in the error
                self._constants = (*self._constants, *(() if absorbed else (layer,)))
            self._cut(f"r{layer}mid", layer)
            if mlp is not None:
                if not shape.parallel:
                    self._read(mlp)
                self._write(mlp)
        self._cut(f"r{shape.n_layers}", shape.n_layers)
        self._read(Logits(self.model, shape.n_layers, 1))

    def _mlp(self, layer: int) -> Mlp:
        attached = self._at.get(f"m{layer}")
        if attached is None:
            return Mlp(self.model, layer, 1)
        if attached.site.kind == "transcoder":
            return Transcoder(self.model, layer, len(attached.latents) + 1, attachment=attached)
        if isinstance(attached, NeuronAttachment):
            return NeuronMlp(self.model, layer, 1, attachment=attached)
        return LatentMlp(self.model, layer, 1, attachment=attached)

    def _cut(self, name: str, layer: int) -> None:
        attached = self._at.get(name)
        if attached is None:
            return
        cut = Cut(self.model, layer, 1, attachment=attached)
        self._read(cut)
        self._first_seen, self._constants = len(self.blocks), ()
        self._write(cut)

    def _read(self, stage: Stage) -> None:
        stage.first_receiver = self._n_receivers
        stage.seen = range(self._first_seen, len(self.blocks))
        stage.constants = self._constants
        self._n_receivers += stage.n_receivers
        self.stages.append(stage)

    def _write(self, stage: Stage) -> None:
        first = len(self.blocks)
        for n, directions, post in stage.layout():
            start = self.blocks[-1].stop
            self.blocks.append(Block(start, start + n, directions, post))
        stage.blocks = tuple(range(first, len(self.blocks)))

    def _own(self, stage: Stage) -> list[Block]:
        return [self.blocks[b] for b in stage.blocks]

    def stage_of(self, receiver: int) -> int:
        """Position of the stage of a receiver."""
        firsts = [stage.first_receiver for stage in self.stages]
        return int(np.searchsorted(firsts, receiver, side="right")) - 1

    def values(self, trace: Trace) -> list[Tensor]:
        """Values of all blocks in an ordinary forward pass."""
        found: list[Tensor | None] = [None] * len(self.blocks)
        found[0] = torch.stack(trace.embeds)[:, None]
        for stage in self.stages:
            for b, value in zip(stage.blocks, stage.of_trace(trace), strict=True):
                found[b] = value
        return [value for value in found if value is not None]
