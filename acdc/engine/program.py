"""A model as a sequence of stages: the order of its receivers and senders, said once.

A :class:`Program` is valid for any model, with dictionaries or without.  :attr:`Program.stages`
stand in the order of the receivers of the component graph (not split by spans), and
:attr:`Program.blocks`, what they write, in that of its senders; so receivers and senders of a
stage are slices, and whatever goes through a model goes through its stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from acdc.dictionaries.attachment import Attachment, CrossLayerAttachment, NeuronAttachment
from acdc.dictionaries.experts import ExpertAttachment
from acdc.engine.mixtures import Experts
from acdc.engine.stages import (
    CrossLayer,
    Cut,
    Heads,
    LatentHeads,
    LatentMlp,
    Logits,
    Mlp,
    NeuronMlp,
    Reconstructed,
    Stage,
    Transcoder,
)
from acdc.engine.values import Block, Rows, Sparse, Values
from acdc.models.lowering.model import LoweredModel, Trace
from graphs.sites import ALONE

__all__ = ["Program"]


class Program:
    """Stages and blocks in the order of the graph's receivers and senders.

    Parameters
    ----------
    model
        Lowered model.
    attachments
        Dictionaries or experts, no two at one place; none for heads and MLPs alone.

    Attributes
    ----------
    blocks
        The first ones are the embeddings'.
    stages
        The last is ``logits``.
    """

    def __init__(
        self, model: LoweredModel, attachments: Sequence[Attachment | ExpertAttachment] = ()
    ) -> None:
        self.model, self.shape = model, model.shape
        self._at = {a.site.name: a for a in attachments}
        self.n_sources = 2 if self.shape.split_embed else 1
        self.blocks = [Block(0, self.n_sources)]
        self.stages: list[Stage] = []
        self._first_seen, self._constants = 0, ()
        self._n_receivers = self._n_mlps = 0
        self._lay_out()

    def hold(self, trace: Trace, scored: Tensor) -> Program:
        """Return the program of :meth:`LoweredModel.hold`; parameters as there."""
        return self._on(self.model.hold(trace, scored))

    def hold_routers(self, trace: Trace) -> Program:
        """Return the program of :meth:`LoweredModel.hold_routers`; parameters as there."""
        return self._on(self.model.hold_routers(trace))

    def _on(self, model: LoweredModel) -> Program:
        return Program(model, [attached.on(model) for attached in self._at.values()])

    @property
    def n_senders(self) -> int:
        """Senders of the graph."""
        return self.blocks[-1].stop

    @property
    def has_posts(self) -> bool:
        """Whether some senders are read through a post-norm."""
        return any(block.post is not None for block in self.blocks)

    def _lay_out(self) -> None:
        shape = self.shape
        group = shape.n_heads + (0 if not shape.grouped else shape.kv_heads)
        n_qkv = shape.n_heads + 2 * shape.kv_heads if shape.split_qkv else group
        for layer, block in enumerate(self.model.layers):
            self._cut(f"r{layer}", layer)
            attached = self._at.get(f"a{layer}")
            heads = (
                LatentHeads(self.model, layer, n_qkv, attachment=attached)
                if isinstance(attached, Attachment)
                else Heads(self.model, layer, n_qkv)
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
            self._n_mlps = layer + 1
        self._cut(f"r{shape.n_layers}", shape.n_layers)
        self._read(Logits(self.model, shape.n_layers, 1))

    def _mlp(self, layer: int) -> Mlp:
        attached = self._at.get(f"m{layer}")
        if attached is None:
            return Mlp(self.model, layer, 1)
        if isinstance(attached, ExpertAttachment):
            n_receivers = len(attached.latents) + attached.routed
            return Experts(self.model, layer, n_receivers, experts=attached)
        if isinstance(attached, CrossLayerAttachment):
            return CrossLayer(self.model, layer, len(attached.latents) + 1, attachment=attached)
        if attached.site.kind in ALONE:
            return Transcoder(self.model, layer, len(attached.latents) + 1, attachment=attached)
        if isinstance(attached, NeuronAttachment):
            return NeuronMlp(self.model, layer, 1, attachment=attached)
        return LatentMlp(self.model, layer, 1, attachment=attached)

    def _cut(self, name: str, layer: int) -> None:
        attached = self._at.get(name)
        if not isinstance(attached, Attachment):
            return
        cut = Cut(self.model, layer, 1, attachment=attached)
        self._read(cut)
        self._first_seen, self._constants = len(self.blocks), ()
        self._write(cut)

    def _read(self, stage: Stage) -> None:
        stage.first_receiver = self._n_receivers
        stage.seen = range(self._first_seen, len(self.blocks))
        stage.constants, stage.n_mlps = self._constants, self._n_mlps
        self._n_receivers += stage.n_receivers
        self.stages.append(stage)

    def _write(self, stage: Stage) -> None:
        first = len(self.blocks)
        for n, basis, post in stage.layout():
            start = self.blocks[-1].stop
            self.blocks.append(Block(start, start + n, basis, post))
        if isinstance(stage, CrossLayer):
            growing = stage.attachment.growing[:, :, None]
            self.blocks[first] = replace(self.blocks[first], growing=growing, layer=stage.layer)
        stage.blocks = tuple(range(first, len(self.blocks)))

    def _own(self, stage: Stage) -> list[Block]:
        return [self.blocks[b] for b in stage.blocks]

    def senders_seen(self, stage: Stage) -> tuple[int, int]:
        """First sender that a stage reads, and the one behind the last."""
        return self.blocks[stage.seen[0]].start, self.blocks[stage.seen[-1]].stop

    def senders_written(self, stage: Stage) -> slice:
        """Senders of the blocks that a stage writes."""
        return slice(self.blocks[stage.blocks[0]].start, self.blocks[stage.blocks[-1]].stop)

    def senders_computed(self, stage: Stage) -> list[slice]:
        """Senders that a stage's receivers feed: what it writes, and later error nodes."""
        found = [self.senders_written(stage)]
        if isinstance(stage, CrossLayer):
            later = (s for s in self.stages if isinstance(s, CrossLayer) and s.layer > stage.layer)
            errors = [self.blocks[s.blocks[1]] for s in later]
            found += [slice(block.start, block.stop) for block in errors]
        return found

    def stage_of(self, receiver: int) -> int:
        """Position of the stage of a receiver."""
        firsts = [stage.first_receiver for stage in self.stages]
        return int(np.searchsorted(firsts, receiver, side="right")) - 1

    def through_post(
        self, block: Block, rows: Rows, tokens: slice | Tensor, at: Trace, frozen: bool = False
    ) -> Rows:
        """Map rows of a block through the post-norm through which the stream reads it.

        Parameters
        ----------
        block, rows
            What its senders write on some tokens, or by how much that changes.
        tokens, at
            The tokens, and the pass at whose point the norm is linear.
        frozen
            Whether the norm's scale is a constant.
        """
        if block.post is None:
            return rows
        norm = self.model.layers[block.post].attention_post
        assert norm is not None
        norm = replace(norm, frozen=norm.frozen or frozen).on(tokens)
        point = at.attention_out[block.post].flatten(0, 1)[tokens]
        if isinstance(rows, Sparse):
            return rows.map(lambda x: norm.jvp(point, x))
        return norm.jvp(point, rows)

    def rerun(self, trace: Trace, b: int, change: Tensor) -> tuple[Tensor, int]:
        """What the stream becomes when a block writes something else, all nodes being in.

        Parameters
        ----------
        trace
            A plain run.
        b
            Position of the block.
        change
            ``[scenario, batch, pos, d_model]``: of the sum of what its senders write.

        Returns
        -------
        tuple
            ``[scenario, batch, pos, d_model]``: the stream in front of a layer, and which
            (see :meth:`LoweredModel.forward`).
        """
        for stage in self.stages:
            if b in stage.blocks:
                return stage.rerun(trace, change)
        return trace.attention_in[0] + change, 0  # embeddings

    def values(self, trace: Trace) -> Values:
        """Values of all blocks in an ordinary forward pass."""
        found: Values = [torch.stack(trace.embeds)[:, None]] * len(self.blocks)
        reconstructed = Reconstructed()
        for stage in self.stages:
            values = reconstructed.leave(stage, stage.of_trace(trace))
            for b, value in zip(stage.blocks, values, strict=True):
                found[b] = value
        return found
