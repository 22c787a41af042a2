"""Stages of a model: what is read together, and what is computed from it.

===================  ===========================  =================================================
stage                receivers                    writes
===================  ===========================  =================================================
:class:`Heads`       q, k and v of a layer        its heads
``LatentHeads``      likewise                     latents of its z or output, and their error node
:class:`Mlp`         the MLP                      the MLP
:class:`LatentMlp`   the MLP                      latents of its output, and their error node
:class:`NeuronMlp`   the MLP                      its neurons, and their error node
:class:`Transcoder`  every latent (or neuron),    latents (neurons), and their error node
                     and the error node, for
                     itself
:class:`.Experts`    every expert for itself      the experts of a mixture
                     (and a free router)
:class:`CrossLayer`  likewise                     latents that write at later MLPs, too, and their
                                                  error node
:class:`Cut`         the stream                   latents of the whole stream, and their error node
:class:`Logits`      the end of the stream        nothing
===================  ===========================  =================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from acdc.dictionaries.attachment import Attachment, CrossLayerAttachment
from acdc.dictionaries.neurons import EVERYWHERE
from acdc.engine.values import Block, Rows, Sparse, Values, by_sender, coefficients, gather
from acdc.errors import OptionError
from acdc.models.lowering.attention import KINDS, Kind, Which
from acdc.models.lowering.model import Key, LoweredModel, Trace
from graphs.graph import attention_rows

__all__ = [
    "NOT_TRAINED",
    "SEVERAL_PLACES",
    "CrossLayer",
    "Cut",
    "Gradients",
    "Heads",
    "Index",
    "Inputs",
    "LatentHeads",
    "LatentMlp",
    "Layout",
    "Logits",
    "Mlp",
    "NeuronMlp",
    "Reconstructed",
    "Stage",
    "Transcoder",
    "Wanted",
]

SEVERAL_PLACES = (
    "not defined for a cross-layer transcoder, whose latents write at several layers; choose eap-ig"
)
NOT_TRAINED = "optimal ablation: not built for cross-layer transcoders; choose mean or resample"

Index = slice | list[int]
"""Some of the positions."""

_ROWS, _CACHED = 512, 1 << 18
"""Rows that an MLP is run on together at least, where there are more; and numbers of its neurons
that the caches of a CPU hold."""

Layout = list[tuple[int, Tensor | None, int | None]]
"""Number of senders, basis and post-norm layer of each block."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """``d metric / d x`` of one ordinary pass, metric summed over rows.

    With every node in, the parts of a site add up to what the model writes there, so one plain
    backward pass gives every gradient: a component's receivers have the gradients that they have
    without dictionaries, a cut has the gradient of the stream.

    Parameters
    ----------
    trace
        The pass that was differentiated (detached).
    at
        By what it is the gradient at: in the shape of that.
    """

    trace: Trace
    at: dict[Key, Tensor]

    def tokens(
        self, key: Key, tokens: slice | Tensor = slice(None)
    ) -> Float[Tensor, "token d_model"]:
        """Gradient on some tokens of the flattened batch and positions, ``[token, d_model]``."""
        return self.at[key].flatten(0, 1)[tokens]

    def of_heads(
        self, key: Key, tokens: slice | Tensor = slice(None)
    ) -> Float[Tensor, "head token d_head"]:
        """The same of q, k, v or z: ``[head, token, d_head]``."""
        return self.at[key].transpose(0, 1).flatten(1, 2)[:, tokens]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the receivers of a stage read.

    Parameters
    ----------
    distinct
        ``[row, scenario, batch, pos, d_model]``.
    index
        ``[receiver]``: row of each.
    """

    distinct: Tensor
    index: NDArray[np.int64]

    def map(self, f: Callable[[Tensor], Tensor]) -> Inputs:
        """Apply a function of single positions, once to each different input."""
        return replace(self, distinct=f(self.distinct))

    def all(self) -> Float[Tensor, "receiver scenario batch pos d_model"]:
        """``[receiver, scenario, batch, pos, d_model]``."""
        if np.array_equal(self.index, np.arange(len(self.distinct))):
            return self.distinct
        return self.distinct[torch.as_tensor(self.index)]


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
    n_mlps
        How many MLPs have written to the stream that it reads.
    """

    model: LoweredModel
    layer: int
    n_receivers: int
    first_receiver: int = 0
    seen: range = range(0)
    constants: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    n_mlps: int = 0

    @property
    def ports(self) -> slice:
        """Its receivers, in a graph that is not split by spans."""
        return slice(self.first_receiver, self.first_receiver + self.n_receivers)

    @abstractmethod
    def layout(self) -> Layout:
        """Number of senders, basis and post-norm layer of each block that it writes."""

    @property
    @abstractmethod
    def stream(self) -> Key:
        """The raw stream that its receivers read in an ordinary forward pass."""

    @property
    def sees_gradients(self) -> tuple[Key, ...]:
        """Where :meth:`pull` needs gradients."""
        return (self.stream,)

    @property
    def written_at(self) -> Key:
        """Where the sum of what it writes enters the pass."""
        return self.stream

    @abstractmethod
    def compute(self, inputs: Inputs) -> Values:
        """Values of the blocks, from what the receivers read."""

    @abstractmethod
    def of_trace(self, trace: Trace) -> Values:
        """Values of the blocks in an ordinary forward pass."""

    def pull(self, found: Gradients, tokens: slice | Tensor) -> Iterator[tuple[int, Rows]]:
        """``d metric / d input`` of the receivers on some tokens.

        Yields
        ------
        tuple
            The first receiver, counted within the stage, and rows of it and those that follow.
        """
        yield 0, found.tokens(self.stream, tokens)[None]

    def effects(self, found: Gradients, blocks: list[Block]) -> list[Tensor]:
        """``d metric / d value [sender, token, width]`` of each block that it writes."""
        return [block.pull(found.tokens(self.written_at)) for block in blocks]

    def replaced(self, total: Float[Tensor, "batch pos d_model"]) -> dict[Key, Tensor]:
        """What to replace in a pass for its senders to write another sum.

        Parameters
        ----------
        total
            ``[batch, pos, d_model]``: sum of what they write.

        Returns
        -------
        dict
            See :meth:`LoweredModel.forward`.
        """
        return {("mlp", self.layer): total}

    def rerun(
        self, trace: Trace, change: Float[Tensor, "scenario batch pos d_model"]
    ) -> tuple[Float[Tensor, "scenario batch pos d_model"], int]:
        """Stream in front of a layer, and which, when what it writes changes in a plain run."""
        return self._streams(trace)[self.layer + 1] + change, self.layer + 1

    def _streams(self, trace: Trace) -> list[Tensor]:
        """Raw stream in front of each layer, and behind the last."""
        return [*trace.attention_in, trace.at(("final", 0))]

    def _behind(self, trace: Trace, middle: Tensor) -> tuple[Tensor, int]:
        """Stream in front of the next layer, and which, given that between attention and MLP."""
        mlp = self.model.layers[self.layer].mlp
        if mlp is not None:
            done = trace.mlp_out[self.layer] if self.model.shape.parallel else mlp(middle)
            middle = middle + done
        return middle, self.layer + 1


Few = tuple[Tensor | None, Tensor | None]
"""Coefficients ``[..., latent]`` and a vector ``[..., d_model]``; None where none is wanted."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """Which senders of a dictionary's site are wanted.

    Parameters
    ----------
    every
        All latents that are nodes.
    latents
        Those wanted, counted among the nodes.
    rest
        Whether the error node is.
    """

    every: Attachment
    latents: tuple[int, ...]
    rest: bool

    @cached_property
    def _few(self) -> Attachment:
        return self.every.keeping([self.every.latents[i] for i in self.latents])

    def split(
        self,
        read: Float[Tensor, "*place d_in"],
        written: Callable[[], Tensor],
        positions: Index = EVERYWHERE,
    ) -> Few:
        """What is wanted of a site that reads and writes these.

        Parameters
        ----------
        read
            ``[..., d_in]``: what the dictionary reads.
        written
            Returns ``[..., d_model]``, asked for the error node alone.
        positions
            Those of ``read``.
        """
        if not self.rest:
            return self._few.coefficients(read, positions), None
        found = self.every.coefficients(read, positions)
        rest = written() - found @ self.every.directions_in_stream
        return (found[..., list(self.latents)] if self.latents else None), rest


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
    def stream(self) -> Key:
        """What is read, see :attr:`Stage.stream`."""
        return "attention_in", self.layer

    @property
    def sees_gradients(self) -> tuple[Key, ...]:
        """Where :meth:`pull` needs gradients."""
        return tuple((kind, self.layer) for kind in KINDS)

    @property
    def written_at(self) -> Key:
        """Where the heads come together, in front of a post-norm; single heads: where z does."""
        return "z", self.layer

    def pull(self, found: Gradients, tokens: slice | Tensor) -> Iterator[tuple[int, Rows]]:
        """``d metric / d input``, see :meth:`Stage.pull`: back through W_Q, W_K, W_V and norm."""
        block, shape = self.model.layers[self.layer], self.model.shape
        point, ln1 = found.trace.at(self.stream).flatten(0, 1)[tokens], block.ln1.on(tokens)
        parts = {
            kind: block.attention.pull(
                kind, found.of_heads((kind, self.layer), tokens), lambda: ln1(point)
            )
            for kind in KINDS
        }  # (head, token, d_model)
        if shape.split_qkv:
            g = torch.cat(list(parts.values()))
        else:  # receivers that are read as several of q, k and v
            g = parts["q"].new_zeros(self.n_receivers, *parts["q"].shape[1:])
            for kind, rows in self.rows.items():
                g.index_add_(0, torch.tensor(rows, device=g.device), parts[kind])
        yield 0, ln1.vjp(point, g)

    def effects(self, found: Gradients, blocks: list[Block]) -> list[Tensor]:
        """``d metric / d z``, see :meth:`Stage.effects`."""
        return [found.of_heads(self.written_at)]

    def replaced(self, total: Float[Tensor, "batch pos d_model"]) -> dict[Key, Tensor]:
        """What to replace, see :meth:`Stage.replaced`."""
        b_O = self.model.layers[self.layer].attention.b_O
        return {("heads", self.layer): total if b_O is None else total + b_O}

    def rerun(
        self, trace: Trace, change: Float[Tensor, "scenario batch pos d_model"]
    ) -> tuple[Float[Tensor, "scenario batch pos d_model"], int]:
        """Stream when the sum of the heads changes, see :meth:`Stage.rerun`."""
        post = self.model.layers[self.layer].attention_post
        total = trace.attention_out[self.layer] + change
        gain = total if post is None else post(total)
        return self._behind(trace, trace.attention_in[self.layer] + gain)

    @property
    def _post(self) -> int | None:
        return None if self.model.layers[self.layer].attention_post is None else self.layer

    def split(self, z: Float[Tensor, "head scenario batch pos d_head"]) -> Values:
        """Values of the blocks from ``z [head, scenario, batch, pos, d_head]``."""
        return [z]

    def compute(self, inputs: Inputs) -> Values:
        """Values of the blocks, from what the receivers read."""
        return self.split(self.attend(self.place(inputs)))

    @cached_property
    def rows(self) -> dict[Kind, list[int]]:
        """Receivers that are q, k and v, in the order of their heads."""
        return attention_rows(self.model.shape)

    def receivers_of(self, head: int) -> dict[Kind, int]:
        """Receivers of a head, in a graph that is not split by spans, by what they are for."""
        group = self.model.layers[self.layer].attention.group
        at = {"q": head, "k": head // group, "v": head // group}
        return {kind: self.first_receiver + rows[at[kind]] for kind, rows in self.rows.items()}

    @cached_property
    def head_of(self) -> dict[tuple[int, Kind], int]:
        """Head, or key-value head, that a receiver (as of :meth:`receivers_of`) is q, k or v of."""
        return {
            (self.first_receiver + row, kind): head
            for kind, rows in self.rows.items()
            for head, row in enumerate(rows)
        }

    def read_by(self, heads: Sequence[int]) -> list[int]:
        """Receivers of some heads, counted within the stage, ascending."""
        return sorted({self.rows[kind][i] for kind in KINDS for i in self._sharing(kind, heads)})

    def _sharing(self, kind: Kind, heads: Sequence[int]) -> list[int]:
        """Heads, or key-value heads, whose projections some heads use, ascending."""
        group = 1 if kind == "q" else self.model.layers[self.layer].attention.group
        return sorted({head // group for head in heads})

    def place(
        self, inputs: Inputs, heads: Sequence[int] | None = None
    ) -> dict[Kind, Float[Tensor, "_ scenario batch pos d_head"]]:
        """Placed projections ``[head or kv head, scenario, batch, pos, d_head]`` by kind.

        ``heads``: of these alone, ascending; None: of all.
        """
        block = self.model.layers[self.layer]
        attention, x = block.attention, block.ln1(inputs.distinct)
        placed: dict[Kind, Tensor] = {}
        for kind in KINDS:
            some = self._sharing(kind, range(attention.n_heads) if heads is None else heads)
            rows = inputs.index[[self.rows[kind][i] for i in some]]
            projected = self._project(kind, x, rows, some)
            which: Which = "first" if heads is None else some
            placed[kind] = attention.place(kind, projected, slice(0, x.shape[-2]), which)
        return placed

    def _project(
        self, kind: Kind, x: Tensor, rows: NDArray[np.int64], some: Sequence[int]
    ) -> Float[Tensor, "some scenario batch pos d_head"]:
        """Projections of some heads, each of its row of ``x [row, scenario, batch, pos, d_model]``.

        Heads that read the same are one product.
        """
        attention = self.model.layers[self.layer].attention
        different = np.unique(rows)
        if len(different) > 1 and 2 * len(different) > len(rows):
            own = x[torch.as_tensor(rows)]
            projected = attention.project_split(kind, own.flatten(1, -2), some)
            return projected.unflatten(1, own.shape[1:-1])
        parts, order = [], []
        for row in different:
            members = np.flatnonzero(rows == row)
            found = attention.project(kind, x[row], [some[i] for i in members.tolist()])
            parts.append(found.movedim(-3, 0))  # (head, scenario, batch, pos, d_head)
            order.append(members)
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)[torch.as_tensor(np.argsort(np.concatenate(order)))]

    def placed_in(self, trace: Trace) -> dict[Kind, Float[Tensor, "_ batch pos d_head"]]:
        """Placed projections ``[head or kv head, batch, pos, d_head]`` in an ordinary pass."""
        attention = self.model.layers[self.layer].attention
        found: dict[Kind, Tensor] = {}
        for kind in KINDS:
            x = trace.at((kind, self.layer))
            placed = attention.place(kind, x, slice(0, x.shape[-2]))
            found[kind] = placed.transpose(0, 1).contiguous()
        return found

    def attend(
        self,
        placed: dict[Kind, Float[Tensor, "_ scenario batch pos d_head"]],
        heads: Sequence[int] | None = None,
    ) -> Float[Tensor, "head scenario batch pos d_head"]:
        """``[head, scenario, batch, pos, d_head]``: z, from :meth:`place`; ``heads`` as there."""
        attention, (q, k, v) = self.model.layers[self.layer].attention, placed.values()
        mask = attention.mask(q.shape[-2], q.device)
        if heads is None:
            if attention.group > 1:
                k, v = (x.repeat_interleave(attention.group, dim=0) for x in (k, v))
            return attention.attend(q, k, v, mask, "first")
        if attention.group > 1:
            there = self._sharing("k", heads)
            at = torch.tensor([there.index(head // attention.group) for head in heads])
            k, v = k[at], v[at]
        return attention.attend(q, k, v, mask, heads)

    def compute_heads(
        self, inputs: Inputs, heads: Sequence[int]
    ) -> Float[Tensor, "some scenario batch pos d_head"]:
        """Z of some heads, ascending; the inputs of the others need not be there."""
        return self.attend(self.place(inputs, heads), heads)

    def of_trace(self, trace: Trace) -> Values:
        """Values of the blocks in an ordinary forward pass."""
        return self.split(trace.z[self.layer].transpose(0, 1)[:, None])


@dataclass(eq=False)
class LatentHeads(Heads):
    """An attention layer whose output, or z, is a dictionary's."""

    attachment: Attachment = field(kw_only=True)

    def layout(self) -> Layout:
        """Blocks, see :meth:`Stage.layout`."""
        return _latent_layout(self.attachment, self._post if self._of_z else None)

    @property
    def _of_z(self) -> bool:
        return self.attachment.site.kind == "attn_z"

    @property
    def written_at(self) -> Key:
        """In front of a post-norm or behind it, see :attr:`Stage.written_at`."""
        return "attention_out" if self._of_z else "attention_gain", self.layer

    def effects(self, found: Gradients, blocks: list[Block]) -> list[Tensor]:
        """``d metric / d value``, see :meth:`Stage.effects`."""
        return Stage.effects(self, found, blocks)

    def replaced(self, total: Float[Tensor, "batch pos d_model"]) -> dict[Key, Tensor]:
        """What to replace, see :meth:`Stage.replaced`."""
        if self._of_z:
            return super().replaced(total)
        b_O = self.model.layers[self.layer].attention.b_O
        if b_O is not None and self._post is None:  # a post-norm's b_O is in the error
            total = total + b_O
        return {("attn", self.layer): total}

    def rerun(
        self, trace: Trace, change: Float[Tensor, "scenario batch pos d_model"]
    ) -> tuple[Float[Tensor, "scenario batch pos d_model"], int]:
        """Stream when what is written changes, see :meth:`Stage.rerun`."""
        if self._of_z:
            return super().rerun(trace, change)
        middle = trace.attention_in[self.layer] + trace.attention_gain[self.layer]
        return self._behind(trace, middle + change)

    def split(self, z: Float[Tensor, "head scenario batch pos d_head"]) -> Values:
        """Values of the blocks, from what the component writes."""
        read, written = self._read_and_written(z.movedim(0, -2).flatten(-2))
        return _split(self.attachment, read, written)

    def few(self, z: Float[Tensor, "*place z_width"], wanted: Wanted) -> Few:
        """What wanted senders write, from ``z [..., n_heads * d_head]``."""
        read, written = self._read_and_written(z)
        return wanted.split(read, lambda: written)

    def _read_and_written(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """What the dictionary reads, and what all nodes write together."""
        block = self.model.layers[self.layer]
        written = z @ block.attention.W_O.flatten(0, 1)
        if self._of_z:
            return z, written
        b_O = block.attention.b_O
        y = written if b_O is None else written + b_O
        if block.attention_post is not None:
            y = written = block.attention_post(y)
        return y, written


def _by_parts(f: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """Apply a function of single rows to as many scenarios at a time as a CPU's cache holds.

    Parameters
    ----------
    f
        What is applied.
    x
        ``[scenario, batch, pos, d_model]``.
    width
        Numbers of a row that ``f`` has at hand.
    """
    rows = max(_ROWS, _CACHED // width)
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dim() < 4 or len(x) < 2:
        return f(x)
    n = min(len(x), -(-x.shape[:-1].numel() // rows))
    return f(x) if n == 1 else torch.cat([f(part) for part in x.tensor_split(n)])


class Mlp(Stage):
    """An MLP that is one sender."""

    @property
    def stream(self) -> Key:
        """What is read, see :attr:`Stage.stream`."""
        return "mlp_in", self.layer

    @property
    def written_at(self) -> Key:
        """Where it is written, see :attr:`Stage.written_at`."""
        return "mlp_out", self.layer

    def layout(self) -> Layout:
        """Blocks, see :meth:`Stage.layout`."""
        return [(1, None, None)]

    def run(
        self, x: Float[Tensor, "*place pos d_model"], positions: Index = EVERYWHERE
    ) -> Float[Tensor, "*place pos d_model"]:
        """Output of the MLP at some positions."""
        mlp = self.model.layers[self.layer].mlp
        assert mlp is not None
        return _by_parts(mlp.at(positions), x, mlp.d_mlp)

    def few(
        self, x: Float[Tensor, "*place pos d_model"], wanted: Wanted | None, positions: Index
    ) -> Few:
        """What wanted senders write, from what the stage reads at some positions."""
        return None, self.run(x, positions)

    def split(self, y: Float[Tensor, "scenario batch pos d_model"]) -> Values:
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

    def few(
        self, x: Float[Tensor, "*place pos d_model"], wanted: Wanted | None, positions: Index
    ) -> Few:
        """What wanted senders write, see :meth:`Mlp.few`."""
        assert wanted is not None
        y = self.run(x, positions)
        return wanted.split(y, lambda: y)

    def split(self, y: Float[Tensor, "scenario batch pos d_model"]) -> Values:
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

    def few(
        self, x: Float[Tensor, "*place pos d_model"], wanted: Wanted | None, positions: Index
    ) -> Few:
        """What wanted senders write, see :meth:`Mlp.few`."""
        assert wanted is not None
        return wanted.split(x, lambda: self.run(x, positions), positions)

    def _split(self, stream: Tensor) -> Values:
        return _split(self.attachment, stream, self.run(stream))


@dataclass(eq=False)
class Transcoder(LatentMlp):
    """An MLP behind a transcoder, or its own neurons: each and the error node reads for itself.

    The receiver of latent ``i`` has the gradient ``(g . direction_i) * d coefficient_i / d
    stream``, where ``g`` is that of what the MLP writes; the rest of the MLP's gradient is its
    error node's.
    """

    @property
    def sees_gradients(self) -> tuple[Key, ...]:
        """Where :meth:`pull` needs gradients."""
        return self.stream, self.written_at

    def pull(self, found: Gradients, tokens: slice | Tensor) -> Iterator[tuple[int, Rows]]:
        """``d metric / d input`` of the latents active on each token, and of the error node."""
        attachment = self.attachment
        stream = found.trace.at(self.stream).flatten(0, 1)[tokens]
        active = attachment.active(stream, tokens)
        effect = self._effect(found, tokens)
        index, slots = gather(torch.where(active, effect, 0.0))
        g = attachment.gradients(stream, index.T, tokens).transpose(0, 1) * slots[..., None]
        yield 0, Sparse(len(attachment.latents), index, g)
        yield len(attachment.latents), (found.tokens(self.stream, tokens) - g.sum(1))[None]

    def _effect(self, found: Gradients, tokens: slice | Tensor) -> Tensor:
        """``d metric / d coefficient [token, latent]``."""
        return found.tokens(self.written_at, tokens) @ self.attachment.directions.T

    def compute(self, inputs: Inputs) -> Values:
        """Each latent from what it reads itself."""
        return self.compute_some(inputs.distinct, inputs.index, np.arange(self.n_receivers))

    def compute_some(
        self,
        x: Float[Tensor, "row scenario batch pos d_model"],
        index: Int[np.ndarray, " some"],
        which: Int[np.ndarray, " some"],
        before: Values | None = None,
    ) -> Values:
        """Values of the blocks, where some of the receivers have been read.

        Parameters
        ----------
        x
            ``[row, scenario, batch, pos, d_model]``.
        index, which
            ``[some]``: row of each receiver, and which it is in the stage, ascending.
        before
            Values to fill in; None: zeros.
        """
        n = len(self.attachment.latents)
        shape = x.shape[1:-1]
        values = before or [x.new_zeros(n, *shape, 1), x.new_zeros(1, *shape, x.shape[-1])]
        found = coefficients(values[0])
        latents, error = which < n, which == n
        for row in np.unique(index[latents]):
            some = which[latents & (index == row)]
            found[..., torch.as_tensor(some)] = self._some_coefficients(x[row], some)
        for row in index[error]:
            values[1] = self._error(x[row])
        return values

    def of_trace(self, trace: Trace) -> Values:
        """All from what the MLP reads."""
        stream, y = trace.mlp_in[self.layer][None], trace.mlp_out[self.layer][None]
        return _split(self.attachment, self.attachment.read_stream(stream), y)

    def few(
        self, x: Float[Tensor, "*place pos d_model"], wanted: Wanted | None, positions: Index
    ) -> Few:
        """What one latent or the error node writes, from what it reads itself."""
        assert wanted is not None
        read = self.attachment.read_stream(x, self.attachment.norm.at(positions))
        return wanted.split(read, lambda: self.run(x, positions), positions)

    def _coefficients(self, stream: Tensor) -> Tensor:
        return self.attachment.coefficients(self.attachment.read_stream(stream))

    def _some_coefficients(self, stream: Tensor, some: NDArray[np.int64]) -> Tensor:
        """``[..., some]``: of some of the nodes."""
        every = self.attachment
        if every.dictionary.k is not None or len(some) == len(every.latents):
            return self._coefficients(stream)[..., torch.as_tensor(some)]
        few = every.keeping([every.latents[i] for i in some])
        return few.coefficients(few.read_stream(stream))

    def _error(self, stream: Tensor) -> Tensor:
        return (self.run(stream) - self._coefficients(stream) @ self.attachment.directions)[None]


@dataclass(eq=False)
class CrossLayer(Transcoder):
    """An MLP of a model with a cross-layer transcoder.

    :meth:`compute` and :meth:`of_trace` give a third value beside those of the two blocks, what
    the coefficients are at the error node's input ``[scenario, batch, pos, latent]``, and an error
    that lacks nothing but what earlier layers' latents write here: :class:`Reconstructed` takes the
    one and settles the other.
    """

    attachment: CrossLayerAttachment = field(kw_only=True)

    @property
    def sees_gradients(self) -> tuple[Key, ...]:
        """Where :meth:`pull` needs gradients: also at the MLPs that are written into."""
        return self.stream, *(("mlp_out", layer) for layer in self.attachment.layers)

    def _effect(self, found: Gradients, tokens: slice | Tensor) -> Tensor:
        pairs = zip(self.attachment.layers, self.attachment.into, strict=True)
        each = [found.tokens(("mlp_out", layer), tokens) @ rows.T for layer, rows in pairs]
        return torch.stack(each).sum(0)

    def effects(self, found: Gradients, blocks: list[Block]) -> list[Tensor]:
        """``d metric / d value``, see :meth:`Stage.effects`."""
        latents = by_sender(self._effect(found, EVERYWHERE))
        return [latents, blocks[1].pull(found.tokens(self.written_at))]

    def compute_some(
        self,
        x: Float[Tensor, "row scenario batch pos d_model"],
        index: Int[np.ndarray, " some"],
        which: Int[np.ndarray, " some"],
        before: Values | None = None,
    ) -> Values:
        """Values, see :meth:`Transcoder.compute_some`, and coefficients once the error is read."""
        values, seen = (None, []) if before is None else (before[:2], before[2:])
        values = super().compute_some(x, index, which, values)
        for row in index[which == len(self.attachment.latents)]:
            seen = [self._coefficients(x[row])]
        return [*values, *seen]

    def of_trace(self, trace: Trace) -> Values:
        """All from what the MLP reads."""
        found = self._coefficients(trace.mlp_in[self.layer][None])
        rest = trace.mlp_out[self.layer][None] - found @ self.attachment.directions
        return [by_sender(found), rest[None], found]

    def replaced(self, total: Float[Tensor, "batch pos d_model"]) -> dict[Key, Tensor]:
        """Refused: its senders do not write at one place."""
        raise OptionError(f"eap-ig-activations: {SEVERAL_PLACES}")

    def rerun(
        self, trace: Trace, change: Float[Tensor, "scenario batch pos d_model"]
    ) -> tuple[Float[Tensor, "scenario batch pos d_model"], int]:
        """Refused: its senders do not write at one place."""
        raise OptionError(NOT_TRAINED)


class Reconstructed:
    """What a cross-layer transcoder says of later MLPs' outputs, in one pass.

    Coefficients are those at the inputs of the error nodes: an error node is what its MLP writes,
    less what the latents of all layers up to its own say of that.
    """

    def __init__(self) -> None:
        self._of: dict[int, Tensor] = {}

    def leave(self, stage: Stage, values: Values) -> Values:
        """Values of a stage's blocks, the error node less what earlier layers say of it."""
        if not isinstance(stage, CrossLayer):
            return values
        latents, error, seen = values
        if stage.layer in self._of:
            error = error - self._of[stage.layer]
        places = zip(stage.attachment.layers[1:], stage.attachment.into[1:], strict=True)
        for layer, rows in places:
            said = seen @ rows
            self._of[layer] = self._of[layer] + said if layer in self._of else said
        return [latents, error]


@dataclass(eq=False)
class Cut(Stage):
    """A dictionary of the whole stream."""

    attachment: Attachment = field(kw_only=True)

    def layout(self) -> Layout:
        """Blocks, see :meth:`Stage.layout`."""
        return _latent_layout(self.attachment)

    @property
    def stream(self) -> Key:
        """What is read, and what its parts add up to."""
        if self._in_the_middle:
            return "middle", self.layer
        behind = self.layer == self.model.shape.n_layers
        return ("final", 0) if behind else ("attention_in", self.layer)

    @property
    def _in_the_middle(self) -> bool:
        return self.attachment.site.kind == "resid_mid"

    def compute(self, inputs: Inputs) -> Values:
        """Values of the blocks, from what the receivers read."""
        x = inputs.all()[0]
        return _split(self.attachment, x, x)

    def few(
        self, x: Float[Tensor, "*place pos d_model"], wanted: Wanted | None, positions: Index
    ) -> Few:
        """What wanted senders write, see :meth:`Mlp.few`."""
        assert wanted is not None
        return wanted.split(x, lambda: x)

    def of_trace(self, trace: Trace) -> Values:
        """Values of the blocks in an ordinary forward pass."""
        x = trace.at(self.stream)[None]
        return _split(self.attachment, x, x)

    def replaced(self, total: Float[Tensor, "batch pos d_model"]) -> dict[Key, Tensor]:
        """What to replace, see :meth:`Stage.replaced`."""
        return {("mid" if self._in_the_middle else "resid", self.layer): total}

    def rerun(
        self, trace: Trace, change: Float[Tensor, "scenario batch pos d_model"]
    ) -> tuple[Float[Tensor, "scenario batch pos d_model"], int]:
        """Stream when its parts change, see :meth:`Stage.rerun`."""
        if self._in_the_middle:
            return self._behind(trace, trace.middle[self.layer] + change)
        return self._streams(trace)[self.layer] + change, self.layer


class Logits(Stage):
    """The end of the stream; it writes nothing."""

    @property
    def stream(self) -> Key:
        """What is read, see :attr:`Stage.stream`."""
        return "final", 0

    def layout(self) -> Layout:
        """Blocks, see :meth:`Stage.layout`."""
        return []

    def compute(self, inputs: Inputs) -> Values:
        """Values of the blocks, from what the receivers read."""
        return []

    def of_trace(self, trace: Trace) -> Values:
        """Values of the blocks in an ordinary forward pass."""
        return []
