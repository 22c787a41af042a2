"""Attention written out per head: projections, rotary positions, pattern.

No module exists for "the query input of one head", so this is the one part of a model that
is not called as it is.  Axes: ``batch pos d_model`` with any leading axes; ``q_pos`` may be a
subset of ``pos``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from acdc.models.lowering.norm import Norm

__all__ = [
    "KINDS",
    "Attention",
    "Kind",
    "Rotary",
    "SharedNorm",
    "Which",
    "forgetting",
    "neighbours",
]

Kind = Literal["q", "k", "v"]
KINDS: tuple[Kind, ...] = ("q", "k", "v")
Which = int | Literal["first"] | Sequence[int] | None
"""Whose tensors are at hand: one (key-value) head's; those of all heads, or of some, along the
first axis; None: all heads' along the last but two."""


PATTERN_BYTES = 64 << 20
"""Patterns are computed for as many queries at a time as have this size, where there are more: of a
long prompt that of a layer would fill the memory, and autograd would keep those of all layers."""


def forgetting(f: Callable[..., Tensor], *args: Any) -> Tensor:
    """Compute something that is computed anew, not kept, for a backward pass."""
    if not torch.is_grad_enabled():
        return f(*args)
    found: Tensor = checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)
    return found


@lru_cache(maxsize=1024)
def neighbours(numbers: tuple[int, ...]) -> list[slice]:
    """Cut ascending numbers into parts of which each follows on the one before.

    Examples
    --------
    >>> neighbours((0, 1, 4, 5, 7))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    n = len(numbers)
    starts = [i for i in range(n) if i == 0 or numbers[i] != numbers[i - 1] + 1]
    return [slice(low, high) for low, high in itertools.pairwise([*starts, n])]


@lru_cache(maxsize=2)
def _mask(n_pos: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """``[pos, pos]`` additive; nobody writes to it."""
    query = torch.arange(n_pos, device=device)[:, None]
    key = torch.arange(n_pos, device=device)[None, :]
    hidden = torch.zeros(n_pos, n_pos, dtype=torch.bool, device=device)
    if causal:
        hidden |= key > query
    if window is not None:
        hidden |= key <= query - window
    return torch.zeros(n_pos, n_pos, device=device).masked_fill(hidden, float("-inf"))


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary position embedding (Su et al. 2021) with precomputed tables.

    Parameters
    ----------
    cos, sin
        ``[n_ctx, rotary_dim]``.
    adjacent
        True: pairs ``(2i, 2i + 1)`` rotate together (native TransformerLens models).
        False: pairs ``(i, i + rotary_dim / 2)`` do (Hugging Face models).
    """

    cos: Tensor
    sin: Tensor
    adjacent: bool

    def __call__(
        self, x: Float[Tensor, "*place pos d_head"], positions: slice | list[int] | Tensor
    ) -> Float[Tensor, "*place pos d_head"]:
        """Rotate ``x`` of shape ``[..., pos, d_head]``, standing at ``positions``."""
        cos, sin = self.cos[positions], self.sin[positions]  # (pos, rotary_dim)
        n = cos.shape[-1]
        head, rest = x[..., :n], x[..., n:]
        if self.adjacent:
            turned = torch.stack((-head[..., 1::2], head[..., 0::2]), dim=-1).flatten(-2)
        else:
            turned = torch.cat((-head[..., n // 2 :], head[..., : n // 2]), dim=-1)
        rotated = head * cos + turned * sin
        return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


@dataclass(frozen=True, eq=False)
class SharedNorm:
    """A norm on the queries, or keys, of all heads together (OLMo-2).

    Each head divides its projection by the root mean square of the projections of all heads, and
    takes these of what it reads itself: so it stays a function of its own input, as behind the norm
    in front of it, and where all heads read the same it is the model's.

    Parameters
    ----------
    norm
        The model's own.  Its weight is in the matrices of the heads.
    W, b
        ``[d_model, head * d_head]``: the projections of all heads without it, and ``[head *
        d_head]`` or None.
    """

    norm: Norm
    W: Tensor
    b: Tensor | None

    def inverse(self, x: Float[Tensor, "*place d_model"]) -> Float[Tensor, "*place 1"]:
        """``1 / root mean square`` of all projections of ``x`` (normed); at least float32."""
        found = self.norm.inverse(self._projections(x))
        return found.detach() if self.norm.frozen else found

    def slope(self, x: Float[Tensor, "*place d_model"]) -> Float[Tensor, "*place d_model"]:
        """``d inverse / d x``."""
        if self.norm.frozen:
            return torch.zeros_like(x)
        every = self._projections(x)
        cubed = self.norm.inverse(every).pow(3) / every.shape[-1]
        return (every @ self.W.T) * -cubed.to(x.dtype)

    def hold(self, x: Float[Tensor, "batch pos d_model"], n_heads: int) -> Norm:
        """Return the norm of single heads with the scale that this has at ``x`` (normed)."""
        held = self.inverse(x)[:, None].expand(-1, n_heads, -1, -1)
        bias = x.new_zeros(self.W.shape[1] // n_heads)
        return Norm(lambda y: y, "RMS", None, self.norm.eps, held=held, bias=bias)

    def _projections(self, x: Tensor) -> Tensor:
        return x @ self.W if self.b is None else x @ self.W + self.b


@dataclass(frozen=True, eq=False)
class Attention:
    """Weights of one attention layer and the arithmetic around them.

    Parameters
    ----------
    W
        ``{"q": [head, d_model, d_head], "k", "v": [kv_head, d_model, d_head]}``.
    b
        Biases ``[head, d_head]`` (``[kv_head, d_head]``), or None where there are none.
    W_O, b_O
        ``[head, d_head, d_model]`` and ``[d_model]`` or None.
    scale
        Scores are multiplied by this.
    norm
        Norms on queries and keys (QK-norm), or None.
    rotary, soft_cap, window, causal
        Rotary tables; cap of the scores; how many positions back a query sees (itself
        counted); whether later positions are masked.
    shared
        Norms on the queries or keys of all heads together; projections are behind them.
    sinks
        ``[head]``: a further score of each head's softmax, at which nothing is read (gpt-oss); or
        None.
    """

    W: dict[str, Tensor]
    b: dict[str, Tensor | None]
    W_O: Tensor
    b_O: Tensor | None
    scale: float
    norm: dict[str, Norm | None]
    rotary: Rotary | None
    soft_cap: float | None
    window: int | None
    causal: bool
    shared: Mapping[Kind, SharedNorm] = field(default_factory=dict)
    sinks: Tensor | None = None

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return len(self.W["q"])

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return len(self.W["q"]) // len(self.W["k"])

    def project(
        self, kind: Kind, x: Float[Tensor, "*place pos d_model"], some: Sequence[int] | None = None
    ) -> Float[Tensor, "*place head pos d_head"]:
        """``[..., pos, d_model]`` (normed) -> ``[..., head, pos, d_head]``, in one product.

        ``some``: only these heads; None: all.
        """
        W, b = self._weights(kind, some)
        heads, d_model, d_head = W.shape
        flat = x @ W.permute(1, 0, 2).reshape(d_model, heads * d_head)
        out = flat.unflatten(-1, (heads, d_head)).transpose(-3, -2)
        out = out if b is None else out + b[:, None]
        return self._scaled(kind, out, x.unsqueeze(-3))

    def project_split(
        self, kind: Kind, x: Float[Tensor, "head n d_model"], some: Sequence[int] | None = None
    ) -> Float[Tensor, "head n d_head"]:
        """``[head, n, d_model]`` (normed, an input per head) -> ``[head, n, d_head]``.

        ``some`` as of :meth:`project`.
        """
        W, b = self._weights(kind, some)
        return self._scaled(kind, x @ W if b is None else torch.baddbmm(b[:, None], x, W), x)

    def project_each(
        self, kind: Kind, x: Float[Tensor, "head n d_model"], some: Sequence[int]
    ) -> Float[Tensor, "head n d_head"]:
        """As :meth:`project_split`, without a copy of any weights: a product for neighbours."""
        parts = [self.project_split(kind, x[at], some[at]) for at in neighbours(tuple(some))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def project_apart(
        self,
        kind: Kind,
        norm: Norm,
        x: Float[Tensor, "head n d_model"],
        inverse: Float[Tensor, "head n 1"],
        some: Sequence[int],
    ) -> Float[Tensor, "head n d_head"]:
        """As :meth:`project_each`, of what is read in front of a norm (see :meth:`Norm.apart`).

        Its weight goes into the matrices and ``inverse`` into the projections, which are narrower
        than the stream.
        """
        parts = []
        for at in neighbours(tuple(some)):
            W, b = self._weights(kind, some[at])
            W = W if norm.weight is None else W * norm.weight[:, None]
            found = (x[at] @ W).mul_(inverse[at])
            parts.append(found if b is None else found.add_(b[:, None]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def project_head(
        self, kind: Kind, head: int, x: Float[Tensor, "*place pos d_model"]
    ) -> Float[Tensor, "*place pos d_head"]:
        """``[..., pos, d_model]`` (normed) -> ``[..., pos, d_head]`` of one (key-value) head."""
        W, b = self.W[kind][head], self.b[kind]
        out = (
            x @ W
            if b is None
            else torch.addmm(b[head], x.flatten(0, -2), W).unflatten(0, x.shape[:-1])
        )
        return self._scaled(kind, out, x)

    def write(
        self, z: Float[Tensor, "head n d_head"], heads: Sequence[int]
    ) -> Float[Tensor, "head n d_model"]:
        """What heads that are neighbours write, each of its z."""
        return z @ self.W_O[heads[0] : heads[-1] + 1]

    def _weights(self, kind: Kind, some: Sequence[int] | None) -> tuple[Tensor, Tensor | None]:
        """Matrices and biases of all or some heads: views where those are neighbours."""
        W, b = self.W[kind], self.b[kind]
        if some is None or len(some) == len(W):
            return W, b
        first, last = some[0], some[-1] + 1
        if last - first == len(some):
            return W[first:last], None if b is None else b[first:last]
        at = torch.as_tensor(some, device=W.device)
        return W.transpose(1, 2)[at].transpose(1, 2), None if b is None else b[at]

    def _scaled(self, kind: Kind, projected: Tensor, x: Tensor) -> Tensor:
        """Apply a norm on all heads together, if there is one, to projections of ``x``."""
        if kind not in self.shared:
            return projected
        return (projected * self.shared[kind].inverse(x)).to(projected.dtype)

    def pull(
        self,
        kind: Kind,
        g: Float[Tensor, "head token d_head"],
        read: Callable[[], Float[Tensor, "token d_model"]],
    ) -> Float[Tensor, "head token d_model"]:
        """Gradient at what each head projects, given that at its projections.

        Parameters
        ----------
        kind
            Which.
        g
            ``[head, token, d_head]``.
        read
            Returns ``[token, d_model]`` (normed): what is projected.

        Returns
        -------
        Tensor
            ``[head, token, d_model]``.
        """
        W, b = self.W[kind], self.b[kind]
        pulled = g @ W.transpose(1, 2)
        if kind not in self.shared:
            return pulled
        x, shared = read(), self.shared[kind]
        linear = x @ W if b is None else x @ W + b[:, None]
        into_scale = torch.linalg.vecdot(g, linear)[..., None]
        return (pulled * shared.inverse(x)).to(g.dtype) + into_scale * shared.slope(x)

    def place(
        self,
        kind: Kind,
        x: Float[Tensor, "*place pos d_head"],
        positions: slice | list[int] | Tensor,
        heads: Which = None,
    ) -> Float[Tensor, "*place pos d_head"]:
        """Apply QK-norm and rotary to projections at some positions.

        Parameters
        ----------
        kind, positions
            Which, and where they stand.
        x
            ``[..., pos, d_head]``.
        heads
            None: ``x`` is ``[..., head, pos, d_head]``; ``first``: ``[head, ..., pos, d_head]``,
            or with numbers of some heads likewise; a number: it is that (key-value) head's.
        """
        norm = self.norm.get(kind)
        if norm is not None:
            x = norm.at(positions).of_heads(heads)(x)
        if self.rotary is not None and kind != "v":
            x = self.rotary(x, positions)
        return x

    def attend(
        self,
        q: Float[Tensor, "*#place q_pos d_head"],
        k: Float[Tensor, "*#place pos d_head"],
        v: Float[Tensor, "*#place pos d_head"],
        mask: Float[Tensor, "q_pos pos"] | None,
        heads: Which = None,
    ) -> Float[Tensor, "*_ q_pos d_head"]:
        """Attention of placed queries, keys and values.

        Parameters
        ----------
        q
            ``[..., q_pos, d_head]``.
        k, v
            ``[..., pos, d_head]``.
        mask
            ``[q_pos, pos]`` additive (0 or -inf), or None.
        heads
            As of :meth:`place`.

        Returns
        -------
        Tensor
            ``[..., q_pos, d_head]``: z, before W_O.
        """
        each = k.shape[-2] * 4 * max(q.shape[:-2].numel(), k.shape[:-2].numel())
        some = max(1, PATTERN_BYTES // each)
        if q.shape[-2] <= some:
            return self._read(q, k, v, mask, heads)
        parts = []
        for i, part in enumerate(q.split(some, dim=-2)):
            seen = None if mask is None else mask[i * some : i * some + part.shape[-2]]
            parts.append(forgetting(self._read, part, k, v, seen, heads))
        return torch.cat(parts, dim=-2)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: Which) -> Tensor:
        """As :meth:`attend`, all queries at once."""
        return self.pattern(q, k, mask, heads).to(v.dtype) @ v

    def pattern(
        self,
        q: Float[Tensor, "*#place q_pos d_head"],
        k: Float[Tensor, "*#place pos d_head"],
        mask: Float[Tensor, "q_pos pos"] | None,
        heads: Which = None,
    ) -> Float[Tensor, "*_ q_pos pos"]:
        """Attention ``[..., q_pos, pos]``, at least in float32; arguments as :meth:`attend`."""
        scores = (q @ k.transpose(-1, -2)) * self.scale
        if self.soft_cap is not None:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        if mask is not None:
            scores = scores + mask
        if self.sinks is None:
            return self.softmax(scores)
        sink = self._sink(scores, heads).expand(*scores.shape[:-1], 1)
        return self.softmax(torch.cat((scores, sink), dim=-1))[..., :-1]

    def _sink(self, scores: Tensor, heads: Which) -> Tensor:
        """The further score of each head beside ``scores``; ``heads`` as of :meth:`place`."""
        assert self.sinks is not None
        if isinstance(heads, int):
            return self.sinks[heads]
        if heads is None:
            return self.sinks[:, None, None]
        sinks = self.sinks if heads == "first" else self.sinks[list(heads)]
        return sinks.view(-1, *[1] * (scores.ndim - 1))

    def softmax(
        self, scores: Float[Tensor, "*place q_pos pos"]
    ) -> Float[Tensor, "*place q_pos pos"]:
        """Pattern of masked scores ``[..., q_pos, pos]``, at least in float32."""
        precise = torch.promote_types(scores.dtype, torch.float32)
        return torch.softmax(scores, dim=-1, dtype=precise)

    def mask(self, n_pos: int, device: torch.device) -> Float[Tensor, "pos pos"] | None:
        """``[pos, pos]`` additive mask of causality and window; None where all see all.

        Whether any is hidden is not read from the device, for which a host would have to wait.
        Layers that hide the same share one.
        """
        far = self.window is not None and self.window < n_pos
        if not far and not (self.causal and n_pos > 1):
            return None
        return _mask(n_pos, self.causal, self.window if far else None, device)

    def heads(
        self,
        q: Float[Tensor, "*place head pos d_head"],
        k: Float[Tensor, "*place kv_head pos d_head"],
        v: Float[Tensor, "*place kv_head pos d_head"],
    ) -> Float[Tensor, "*place head pos d_head"]:
        """All heads from unplaced projections ``[..., head, pos, d_head]`` -> z likewise."""
        mask = self.mask(q.shape[-2], q.device)
        q, k, v = self._placed("q", q), self._placed("k", k), self._placed("v", v)
        return self.attend(q, k, v, mask)

    def patterns(
        self,
        q: Float[Tensor, "*place head pos d_head"],
        k: Float[Tensor, "*place kv_head pos d_head"],
    ) -> Float[Tensor, "*place head pos pos"]:
        """Attention of all heads from unplaced projections: ``[..., head, pos, pos]``."""
        mask = self.mask(q.shape[-2], q.device)
        return self.pattern(self._placed("q", q), self._placed("k", k), mask)

    def _placed(self, kind: Kind, x: Tensor) -> Tensor:
        """Unplaced projections of all positions, placed and one for each query head."""
        x = self.place(kind, x, slice(0, x.shape[-2]))
        return x if kind == "q" or self.group == 1 else x.repeat_interleave(self.group, dim=-3)
