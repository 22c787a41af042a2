"""A model lowered to functions of single nodes (see DESIGN: models are lowered, not hooked).

Axes: ``batch`` prompts, ``pos`` token positions, ``d_model`` residual stream, ``head``,
``d_head``, ``vocab``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from acdc.models.lowering.attention import Attention, forgetting
from acdc.models.lowering.norm import Norm
from acdc.models.stored import is_offloaded, kept_in, used_at
from graphs import GraphShape

__all__ = ["FeedForward", "Key", "LoweredLayer", "LoweredModel", "RoutedMlp", "Trace", "is_long"]

Key = tuple[str, int]
"""Attribute of a trace and layer (embeddings: which one; ``final``: any)."""


_NEURON_BYTES = 8 << 20
"""Neurons of a prompt that take more, in float32, are computed anew for the backward pass, as are
attention patterns: autograd would keep those of all layers."""


def is_long(n_pos: int, d_mlp: int) -> bool:
    """Whether neurons of prompts of some length are not kept for the backward pass."""
    return n_pos * d_mlp * 4 > _NEURON_BYTES


@dataclass(frozen=True, eq=False)
class FeedForward:
    """An MLP with its own norms inside.

    Parameters
    ----------
    norm, post
        In front of it, and after it (Gemma-2) or None.
    module
        The model's own module.
    gated
        Whether it multiplies two projections of its input (SwiGLU, GeGLU).
    writer
        Part of the module that maps neurons ``[..., d_mlp]`` to the output.
    W_out
        ``[d_mlp, d_model]``: its matrix.
    readers
        Parts that map the normed input to what neurons are computed from (of gated MLPs two), each
        with its matrix ``[d_model, d_mlp]``.
    """

    norm: Norm
    module: Callable[[Tensor], Tensor]
    post: Norm | None
    gated: bool
    writer: nn.Module
    W_out: Tensor
    readers: tuple[tuple[nn.Module, Tensor], ...] = ()

    @property
    def d_mlp(self) -> int:
        """Neurons."""
        return self.W_out.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., pos, d_model]`` (raw stream) -> output."""
        if is_long(x.shape[-2], self.d_mlp):
            out = forgetting(lambda x: self.module(self.norm(x)), x)
        else:
            out = self.module(self.norm(x))
        return out if self.post is None else self.post(out)

    def hold(self, x: Tensor) -> FeedForward:
        """Return the MLP with the scales that its norms have at ``x [..., pos, d_model]``."""
        post = None if self.post is None else self.post.hold(self.module(self.norm(x)))
        return replace(self, norm=self.norm.hold(x), post=post)

    def at(self, positions: slice | list[int]) -> FeedForward:
        """Return the MLP for some of the positions."""
        if self.norm.held is None and (self.post is None or self.post.held is None):
            return self
        post = None if self.post is None else self.post.at(positions)
        return replace(self, norm=self.norm.at(positions), post=post)

    def on(self, tokens: slice | Tensor) -> FeedForward:
        """Return the MLP for some tokens of the flattened batch and positions."""
        post = None if self.post is None else self.post.on(tokens)
        return replace(self, norm=self.norm.on(tokens), post=post)

    @torch.enable_grad()
    def pull_neurons(self, x: Tensor, neurons: Tensor) -> Tensor:
        """``d h / d x`` of some neurons at each token, with what a post-norm makes of them.

        A neuron is a function of its own projections of the normed input alone, so one backward
        pass to these gives every slope.

        Parameters
        ----------
        x
            ``[token, d_model]`` (raw stream).
        neurons
            ``[slot, token]``: which.

        Returns
        -------
        Tensor
            ``[slot, token, d_model]``.
        """
        x = x.detach().requires_grad_(True)
        parts, h, out = self.computed(self.norm(x))
        slopes = self.slopes(parts, h)
        g: Tensor = sum(  # type: ignore[assignment]  # there is at least one
            slope.T.gather(0, neurons)[..., None] * W.T[neurons]
            for slope, (_, W) in zip(slopes, self.readers, strict=True)
        )
        pulled = self.norm.vjp(x.detach(), g)
        if self.post is None:
            return pulled
        scale = self.post.inverse(out).to(h.dtype)  # a factor of every neuron
        if self.post.held is None and not self.post.frozen:
            (moved,) = torch.autograd.grad(scale.sum(), x)
            pulled = scale.detach() * pulled + h.detach().T.gather(0, neurons)[..., None] * moved
        else:
            pulled = scale.detach() * pulled
        return pulled

    def slopes(self, parts: list[Tensor], h: Tensor) -> list[Tensor]:
        """How much each neuron grows with each of its projections, as :meth:`computed` has them.

        Returns
        -------
        list of Tensor
            ``[..., neuron]`` for each reader.
        """
        return list(torch.autograd.grad(h.sum(), parts, retain_graph=True))

    def computed(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Run the module.

        Parameters
        ----------
        x
            ``[..., pos, d_model]``, normed.

        Returns
        -------
        tuple
            What each reader makes of it, ``[..., pos, neuron]``; what the output matrix is
            multiplied with, likewise (for gated MLPs the product of gate and input); and
            ``[..., pos, d_model]`` with the bias, before a post-norm.
        """
        read: dict[nn.Module, Tensor] = {}
        h: list[Tensor] = []
        handles = [
            part.register_forward_hook(lambda part, _, out: read.update({part: out}))
            for part, _ in self.readers
        ]
        handles.append(self.writer.register_forward_pre_hook(lambda _, given: h.append(given[0])))
        try:
            out = self.module(x)
        finally:
            for handle in handles:
                handle.remove()
        return [read[part] for part, _ in self.readers], h[0], out

    def neurons(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the neurons do, and what they write together, before a post-norm.

        Parameters
        ----------
        x
            ``[..., pos, d_model]`` (raw stream).

        Returns
        -------
        tuple
            As the last two of :meth:`computed`.
        """
        return self.computed(self.norm(x))[1:]


class RoutedMlp(FeedForward, ABC):
    """An MLP whose router chooses which parts of it a token goes to."""

    @abstractmethod
    def hold_router(self, x: Tensor) -> FeedForward:
        """Return the MLP with the weights that its router gives at ``x [batch, pos, d_model]``."""


@dataclass(frozen=True, eq=False)
class LoweredLayer:
    """One block: what its heads and its MLP compute.

    Parameters
    ----------
    ln1, ln2
        Norms in front of attention and MLP.
    attention
        Weights and arithmetic of the heads.
    attention_post
        Norm on the sum of the heads (Gemma-2), applied where the stream is read; None in
        models without.
    mlp
        With its own norms inside; None in attention-only models.
    """

    ln1: Norm
    attention: Attention
    attention_post: Norm | None
    ln2: Norm | None
    mlp: FeedForward | None

    def hold(self, trace: Trace, i: int) -> LoweredLayer:
        """Return the layer with the scales that its norms have in a run; ``i``: which it is."""
        attention = self.attention
        norms = {
            kind: None if norm is None else norm.hold(trace.at((kind, i)))
            for kind, norm in attention.norm.items()
        }
        for kind, shared in attention.shared.items():
            norms[kind] = shared.hold(self.ln1(trace.attention_in[i]), len(attention.W[kind]))
        post, mlp = self.attention_post, self.mlp
        return LoweredLayer(
            self.ln1.hold(trace.attention_in[i]),
            replace(attention, norm=norms, shared={}),
            None if post is None else post.hold(trace.attention_out[i]),
            None if self.ln2 is None else self.ln2.hold(trace.mlp_in[i]),
            None if mlp is None else mlp.hold(trace.mlp_in[i]),
        )


@dataclass(eq=False)
class Trace:
    """What one ordinary forward pass leaves behind.

    Attributes
    ----------
    embeds
        One ``[batch, pos, d_model]`` per embedding sender.
    attention_in, mlp_in
        Raw stream read by attention and MLP of each layer, ``[batch, pos, d_model]``.
    q, k, v
        Projections of each layer before QK-norm and rotary (behind a norm that all heads share),
        ``[batch, head, pos, d_head]``.
    z
        Head outputs before W_O, ``[batch, head, pos, d_head]``.
    attention_out
        Sum of the heads' outputs plus b_O before a post-norm, ``[batch, pos, d_model]``.
    attention_gain
        The same behind a post-norm: what the stream gains.
    middle
        Stream between attention and MLP, ``[batch, pos, d_model]``; of no layer where they run
        in parallel or there is no MLP.
    mlp_out
        ``[batch, pos, d_model]``.
    final
        Raw stream read by ``logits``.
    """

    embeds: list[Tensor]
    attention_in: list[Tensor] = field(default_factory=list)
    mlp_in: list[Tensor] = field(default_factory=list)
    q: list[Tensor] = field(default_factory=list)
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    attention_out: list[Tensor] = field(default_factory=list)
    attention_gain: list[Tensor] = field(default_factory=list)
    middle: list[Tensor] = field(default_factory=list)
    mlp_out: list[Tensor] = field(default_factory=list)
    final: Tensor | None = None

    def at(self, key: Key) -> Tensor:
        """Return one tensor."""
        name, layer = key
        found = getattr(self, name)
        return found[layer] if isinstance(found, list) else found

    def detached(self) -> Trace:
        """Return the same without gradients."""
        assert self.final is not None
        lists = {
            name: [x.detach() for x in value]
            for name, value in vars(self).items()
            if isinstance(value, list)
        }
        return Trace(**lists, final=self.final.detach())


@dataclass(frozen=True, eq=False)
class LoweredModel:
    """A transformer as functions of its nodes.

    Parameters
    ----------
    shape
        Shape of its component graph.
    embed_parts
        ``tokens [batch, pos]`` -> token embedding and position embedding (the latter None
        for rotary models), each ``[batch, pos, d_model]``.
    layers
        The blocks.
    ln_final
        Norm in front of the unembedding.
    W_U, b_U
        ``[vocab, d_model]`` and ``[vocab]`` or None.
    logit_cap
        Soft cap of the logits, or None.
    n_ctx, d_vocab
        Most positions that it reads, and how many tokens there are.
    n_bytes
        What its weights take, as they are kept.
    """

    name: str
    shape: GraphShape
    embed_parts: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    layers: tuple[LoweredLayer, ...]
    ln_final: Norm
    unembedding: Callable[[Tensor], Tensor]
    W_U: Tensor
    b_U: Tensor | None
    logit_cap: float | None
    n_ctx: int
    d_vocab: int
    n_bytes: int

    def __repr__(self) -> str:
        s = self.shape
        return f"<LoweredModel {self.name!r}: {s.n_layers} layers of {s.n_heads} heads>"

    @property
    def device(self) -> torch.device:
        """Where all is but weights that are held elsewhere, see :mod:`acdc.models.stored`."""
        return self.W_U.device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where products with weights are computed: its device, and others that hold layers."""
        return tuple(dict.fromkeys([self.device, *map(used_at, self._some_weights)]))

    @property
    def offloads(self) -> bool:
        """Whether weights stay in the memory of the host, and are brought to the device."""
        return any(map(is_offloaded, self._some_weights))

    @property
    def _some_weights(self) -> list[Tensor]:
        """One of each layer, which is not cut, and that of the unembedding."""
        return [*(layer.attention.W_O for layer in self.layers), self.W_U]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stream, and of the weights where they are used."""
        return self.W_U.dtype

    @property
    def kept_dtype(self) -> torch.dtype:
        """Type that the matrices are kept in, see :mod:`acdc.models.stored`."""
        return kept_in(self.W_U)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.W_U.shape[1]

    @property
    def d_vocab_out(self) -> int:
        """How many tokens (or other outputs) the model has logits for."""
        return self.W_U.shape[0]

    @property
    def has_post_norm(self) -> bool:
        """Whether the stream reads attention through a norm of the heads' sum."""
        return any(layer.attention_post is not None for layer in self.layers)

    def hold(self, trace: Trace, scored: Tensor) -> LoweredModel:
        """Return the model with the scales that its norms have in a run.

        Parameters
        ----------
        trace
            A plain run of the prompts that the returned model may then be run on, alone.
        scored
            ``[n]``: positions that it may unembed, row by row.
        """
        layers = tuple(layer.hold(trace, i) for i, layer in enumerate(self.layers))
        rows = trace.at(("final", 0))[:, scored].flatten(0, 1)
        return replace(self, layers=layers, ln_final=self.ln_final.hold(rows))

    @property
    def has_experts(self) -> bool:
        """Whether an MLP is a mixture of experts."""
        return any(isinstance(layer.mlp, RoutedMlp) for layer in self.layers)

    def hold_routers(self, trace: Trace) -> LoweredModel:
        """Return the model with the weights that its routers give in a run, as :meth:`hold`."""
        layers = tuple(
            replace(layer, mlp=layer.mlp.hold_router(trace.mlp_in[i]))
            if isinstance(layer.mlp, RoutedMlp)
            else layer
            for i, layer in enumerate(self.layers)
        )
        return replace(self, layers=layers)

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> list[Float[Tensor, "batch pos d_model"]]:
        """Return the embedding senders' outputs, one or (``split_embed``) two."""
        tok, pos = self.embed_parts(tokens)
        if self.shape.split_embed:
            return [tok, torch.zeros_like(tok) if pos is None else pos]
        return [tok if pos is None else tok + pos]

    def unembed(
        self, x: Float[Tensor, "*place d_model"], tokens: Int[Tensor, "batch n"] | None = None
    ) -> Float[Tensor, "*place vocab"]:
        """Logits of the raw stream ``x``.

        Parameters
        ----------
        x
            ``[..., batch, d_model]``.
        tokens
            ``[batch, n]`` token ids: compute only their logits.  None: the whole vocabulary.

        Returns
        -------
        Tensor
            ``[..., batch, n]`` or ``[..., batch, vocab]``.
        """
        x = self.ln_final(x)
        if tokens is None:
            logits = self.unembedding(x)
        else:
            logits = torch.einsum("...bd,bnd->...bn", x, self.W_U[tokens])
            if self.b_U is not None:
                logits = logits + self.b_U[tokens]
        if self.logit_cap is not None:
            logits = self.logit_cap * torch.tanh(logits / self.logit_cap)
        return logits

    def forward(
        self,
        tokens: Tensor,
        embeds: list[Tensor] | None = None,
        replaced: dict[tuple[str, int], Tensor] | None = None,
        first: int = 0,
    ) -> Trace:
        """One ordinary forward pass up to the final stream.

        Parameters
        ----------
        tokens
            ``[batch, pos]`` token ids.
        embeds
            Replaces the embedding senders' outputs (integrated gradients).
        replaced
            Replaces ``("z", layer)``: ``[batch, head, pos, d_head]``, or, each
            ``[batch, pos, d_model]``: ``("heads", layer)``, their sum with b_O in front of a
            post-norm; ``("attn", layer)`` and ``("mlp", layer)``, what the stream gains from them
            (behind post-norms); ``("mid", layer)``, the stream between them;
            ``("resid", n)``, the stream in front of block n, or behind the last one.
        first
            Block to start with; ``embeds`` is then the stream in front of it, with any leading
            axes, and the trace holds what comes from there on.
        """
        replaced = replaced or {}
        trace = Trace(self.embed(tokens) if embeds is None else embeds)
        stream = (
            trace.embeds[0] if len(trace.embeds) == 1 else sum(trace.embeds[1:], trace.embeds[0])
        )
        for i, layer in enumerate(self.layers[first:], first):
            stream = replaced.get(("resid", i), stream)
            trace.attention_in.append(stream)
            written = self._attention(i, layer.ln1(stream), trace, replaced)
            trace.attention_gain.append(replaced.get(("attn", i), written))
            middle = replaced.get(("mid", i), stream + trace.attention_gain[-1])
            if layer.mlp is None:
                stream = middle
                continue
            if not self.shape.parallel:
                trace.middle.append(middle)
            mlp_in = stream if self.shape.parallel else middle
            trace.mlp_in.append(mlp_in.view_as(mlp_in))  # a branch with a gradient of its own
            mlp_in = trace.mlp_in[-1]
            trace.mlp_out.append(
                replaced[("mlp", i)] if ("mlp", i) in replaced else layer.mlp(mlp_in)
            )
            stream = middle + trace.mlp_out[-1]
        trace.final = replaced.get(("resid", len(self.layers)), stream)
        return trace

    def _attention(self, i: int, x: Tensor, trace: Trace, replaced: dict[Key, Tensor]) -> Tensor:
        """What the stream gains from attention, ``[batch, pos, d_model]``."""
        layer, attention = self.layers[i], self.layers[i].attention
        q, k, v = (attention.project(kind, x) for kind in ("q", "k", "v"))
        z = replaced[("z", i)] if ("z", i) in replaced else attention.heads(q, k, v)
        out = z.transpose(-3, -2).flatten(-2) @ attention.W_O.flatten(0, 1)
        if attention.b_O is not None:
            out = out + attention.b_O
        out = replaced.get(("heads", i), out)
        for store, value in (
            (trace.q, q), (trace.k, k), (trace.v, v), (trace.z, z), (trace.attention_out, out)
        ):  # fmt: skip
            store.append(value)
        return out if layer.attention_post is None else layer.attention_post(out)

    def senders(self, trace: Trace) -> Float[Tensor, "sender *place d_model"]:
        """Every sender's output in graph order, ``[sender, batch, pos, d_model]``."""
        out = list(trace.embeds)
        for i, layer in enumerate(self.layers):
            heads = trace.z[i].transpose(0, 1) @ layer.attention.W_O[:, None]
            out.extend(heads)  # (head) of (batch, pos, d_model)
            if layer.mlp is not None:
                out.append(trace.mlp_out[i])
        return torch.stack(out)
