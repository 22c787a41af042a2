"""A head's attention scores as exact sums over pairs of what it reads.

The score of a query and a key position, before the softmax (and before a soft cap, where the model
has one: the sum is what the cap is applied to), is bilinear in what the query and the key side read
once the norms have the scales of the run::

    score(q, k) = scale * sum over s, t of  Q_s(q) . K_t(k)

``Q_s(q)`` is what sender ``s`` brings to the query at position ``q``: its output, through the norm
in front of the layer, ``W_Q``, a norm on queries and the rotation of position ``q``.  ``K_t(k)`` is
the same on the key side, with the key-value head that the head reads.  All of these are affine with
their scales held, so that nothing is approximated: the sum over all pairs is the model's own score.

The senders are those of the graph (embeddings, heads, MLPs, latents, error nodes), and beside them

===========  ====================================================================================
``b_O``      output biases of the attention layers so far, which belong to no head
``bias``     of this head: bias of the norm in front of it through the weights, plus ``b_Q``
             (``b_K``, ``b_V``)
===========  ====================================================================================

Values are taken apart in the same way (:attr:`HeadParts.v`), which gives whatever the head writes
as a sum over what its value reads (:meth:`HeadParts.carried`).

References
----------
Elhage et al. 2021, "A mathematical framework for transformer circuits" (query-key and output-value
circuits; Q-, K- and V-composition).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from acdc.engine.experiment import Experiment
from acdc.engine.program import Program
from acdc.engine.stages import Heads
from acdc.engine.values import Values
from acdc.models.lowering.attention import KINDS, Kind
from acdc.models.lowering.model import LoweredLayer, Trace
from graphs.graph import outline

__all__ = ["BIAS", "OUTPUT_BIASES", "HeadParts", "PromptsRun", "Written", "head_parts"]

OUTPUT_BIASES, BIAS = "b_O", "bias"
"""Names of what is read and is no sender."""


class Written:
    """What the senders of a model write, by name.

    Token and position embeddings are told apart, also where the graph has them as one node: in the
    positions of a model that adds them is much of why heads attend.

    Parameters
    ----------
    experiment
        Model and dictionaries.

    Attributes
    ----------
    program
        Of the model.
    names
        Of the senders, in the order of the program.
    """

    def __init__(self, experiment: Experiment) -> None:
        model = experiment.model
        tokens = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        added = model.embed_parts(tokens)[1] is not None
        model = replace(model, shape=replace(model.shape, split_embed=added))
        attachments = [one.on(model) for one in experiment.attachments]
        self.program = Program(model, attachments)
        sites = tuple(one.site for one in attachments)
        self.names = outline(replace(model.shape, sites=sites)).senders

    def heads(self, layer: int) -> Heads:
        """The stage of a layer's heads."""
        return next(s for s in self.program.stages if isinstance(s, Heads) and s.layer == layer)

    def names_seen(self, layer: int) -> tuple[str, ...]:
        """What a layer's heads read: senders, output biases, and the head's own bias."""
        first, stop = self.program.senders_seen(self.heads(layer))
        return (*self.names[first:stop], OUTPUT_BIASES, BIAS)

    @torch.no_grad()
    def run(self, tokens: Int[Tensor, "batch pos"]) -> PromptsRun:
        """Run the model on prompts of one length."""
        trace = self.program.model.forward(tokens).detached()
        return PromptsRun(self, trace, self.program.values(trace))


@dataclass(frozen=True, eq=False)
class PromptsRun:
    """A plain run of some prompts, and what the senders write in it.

    Parameters
    ----------
    written
        Of the model.
    trace
        The run.
    values
        By block of the program.
    """

    written: Written
    trace: Trace
    values: Values

    def held(self, layer: int) -> LoweredLayer:
        """Return a layer with the scales that its norms have in the run."""
        return self.written.program.model.layers[layer].hold(self.trace, layer)

    @torch.no_grad()
    def sources(
        self, layer: int, values: Values | None = None
    ) -> Float[Tensor, "source batch pos d_model"]:
        """What a layer's heads read of each sender, and of the output biases (the last).

        Parameters
        ----------
        layer
            Of the heads.
        values
            What the senders write instead; post-norms keep the run's scales.  None: the run's.

        Returns
        -------
        Tensor
            ``[source, batch, pos, d_model]``; of the run's own values, the sum is the raw stream.
        """
        program, stage = self.written.program, self.written.heads(layer)
        values = self.values if values is None else values
        stream = self.trace.attention_in[layer]
        rows, posts = [], []
        for b in stage.seen:
            block = program.blocks[b].read_after(stage.n_mlps)
            vectors = block.vectors(values[b][:, 0]).expand(-1, *stream.shape)
            if block.post is not None:
                posts.append(block.post)
                vectors = self.gained(block.post, vectors)
            rows.append(vectors)
        return torch.cat([*rows, self._biases(stage, posts)[None]])

    def gained(
        self, layer: int, vectors: Float[Tensor, "*part batch pos d_model"]
    ) -> Float[Tensor, "*part batch pos d_model"]:
        """What the stream gains of parts of what a layer's heads write: through a post-norm."""
        norm = self.written.program.model.layers[layer].attention_post
        if norm is None:
            return vectors
        return replace(norm, frozen=True).jvp(self.trace.attention_out[layer], vectors)

    def _biases(self, stage: Heads, posts: list[int]) -> Tensor:
        """``[batch, pos, d_model]``: output biases in the stream, through post-norms."""
        layers, total = self.written.program.model.layers, torch.zeros_like(self.trace.embeds[0])
        for layer in stage.constants:
            b_O = layers[layer].attention.b_O
            assert b_O is not None
            total = total + b_O
        for layer in sorted(set(posts)):
            norm, b_O = layers[layer].attention_post, layers[layer].attention.b_O
            assert norm is not None
            held = norm.hold(self.trace.attention_out[layer])
            total = total + held(torch.zeros_like(total) if b_O is None else b_O.expand_as(total))
        return total

    def pull(
        self, layer: int, direction: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """A direction of the stream as one of the sum of a layer's heads: back through a post-norm.

        The inner products with what a head writes are those of what the stream gains of it.
        """
        norm = self.written.program.model.layers[layer].attention_post
        if norm is None:
            return direction
        return replace(norm, frozen=True).vjp(self.trace.attention_out[layer], direction)


@dataclass(frozen=True, eq=False)
class HeadParts:
    """What a head's queries, keys and values are made of, in a run of some prompts.

    Parameters
    ----------
    run, layer, head
        Which.
    names
        ``[source]``: what it reads, see :meth:`Written.names_seen`.
    q, k, v
        ``[source, batch, pos, d_head]``: placed (normed and rotated) parts; their sums over the
        sources are the model's own queries, keys and values.
    pattern
        ``[batch, query, key]``: its attention.
    """

    run: PromptsRun
    layer: int
    head: int
    names: tuple[str, ...]
    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Tensor

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self.run.written.program.model.layers[self.layer].attention.scale

    @property
    def output_matrix(self) -> Float[Tensor, "d_head d_model"]:
        """What its values are written through."""
        return self.run.written.program.model.layers[self.layer].attention.W_O[self.head]

    @property
    def scores(self) -> Float[Tensor, "batch query key"]:
        """``[batch, query, key]``: before soft cap, mask and softmax."""
        return self.q.sum(0) @ self.k.sum(0).transpose(-1, -2) * self.scale

    def at(
        self, prompt: int, query: int, key: int
    ) -> Float[Tensor, "source_of_query source_of_key"]:
        """One score, pair by pair: ``[source of the query, source of the key]``."""
        return self.q[:, prompt, query] @ self.k[:, prompt, key].T * self.scale

    def pairs(
        self,
        weights: Float[Tensor, "batch query key"],
        q: Float[Tensor, "row batch pos d_head"] | None = None,
        k: Float[Tensor, "column batch pos d_head"] | None = None,
    ) -> Float[Tensor, "row column"]:
        """Weighted sums of scores, pair by pair.

        Parameters
        ----------
        weights
            ``[batch, query, key]``.
        q, k
            Parts to take instead of all: ``[part, batch, pos, d_head]``.

        Returns
        -------
        Tensor
            ``[source of the query, source of the key]``; the sum is that of the weighted scores.
        """
        q, k = self.q if q is None else q, self.k if k is None else k
        return torch.einsum("sbqd,tbqd->st", q, weights @ k) * self.scale

    def parts_of(self, kind: Kind, values: Values) -> Float[Tensor, "source batch pos d_head"]:
        """Placed parts, as :attr:`q`, of what senders write otherwise, at the run's scales."""
        return _parts(
            self.run.held(self.layer), kind, self.head, self.run.sources(self.layer, values)
        )

    def written_along(
        self, direction: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch key d_head"]:
        """What a value has to be multiplied with to give what is written along a direction.

        Parameters
        ----------
        direction
            ``[batch, pos, d_model]``: of the stream behind the layer, at each query position.
        """
        back = self.run.pull(self.layer, direction) @ self.output_matrix.T  # (batch, query, d_head)
        return self.pattern.to(back.dtype).transpose(-1, -2) @ back

    def carried(self, direction: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " source"]:
        """What the head writes along a direction, by what its value reads.

        ``[source]``: the sum is the inner product of the direction and what the stream gains of the
        head, over all prompts and positions; parameter as of :meth:`written_along`.
        """
        return torch.einsum("sbkd,bkd->s", self.v, self.written_along(direction))

    def pulled(
        self, kind: Kind, gradient: Float[Tensor, "batch pos d_head"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """A direction of placed queries, keys or values as one of the stream that is read.

        Exact, since all between is affine at the run's scales.

        Parameters
        ----------
        kind
            ``q``, ``k`` or ``v``.
        gradient
            ``[batch, pos, d_head]``.
        """
        layer = self.run.held(self.layer)
        with torch.enable_grad():
            x = torch.zeros_like(self.run.trace.attention_in[self.layer])[None].requires_grad_(True)
            placed = _placed(layer, kind, self.head, x)
            (found,) = torch.autograd.grad(placed, x, gradient[None].to(placed.dtype))
        return found[0]


@torch.no_grad()
def head_parts(run: PromptsRun, layer: int, head: int) -> HeadParts:
    """Take a head's queries, keys and values apart by what it reads.

    Parameters
    ----------
    run
        Of prompts of one length.
    layer, head
        Which.
    """
    held, sources = run.held(layer), run.sources(layer)
    q, k, v = (_parts(held, kind, head, sources) for kind in KINDS)
    attention = held.attention
    mask = attention.mask(q.shape[-2], q.device)
    pattern = attention.pattern(q.sum(0), k.sum(0), mask, head)
    return HeadParts(run, layer, head, run.written.names_seen(layer), q, k, v, pattern)


def _parts(layer: LoweredLayer, kind: Kind, head: int, sources: Tensor) -> Tensor:
    """Placed projections of each source, and of nothing (the bias, the last)."""
    nothing = _placed(layer, kind, head, torch.zeros_like(sources[:1]))
    return torch.cat([_placed(layer, kind, head, sources) - nothing, nothing])


def _placed(layer: LoweredLayer, kind: Kind, head: int, x: Tensor) -> Tensor:
    """``[source, batch, pos, d_head]`` of ``x [source, batch, pos, d_model]``, scales held."""
    attention = layer.attention
    index = head if kind == "q" else head // attention.group
    projected = attention.project_head(kind, index, layer.ln1(x))
    return attention.place(kind, projected, slice(0, x.shape[-2]), index)
