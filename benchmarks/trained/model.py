"""A small transformer in plain torch, whose every edge and every attention pattern can be set.

It is what is trained, and what interventions by hand are made on; nothing of the engine runs in it.
Weights are in HookedTransformer layout, so that they are stored as they are and
:func:`acdc.models.load_model` reads them.  Axes: ``batch pos d_model``, and ``head`` first where
heads are together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from acdc.errors import ModelError
from graphs.files.whole import MIB, read_json

__all__ = ["Sizes", "Trace", "Transformer"]

_EPS = 1e-5
_BASE = 10_000


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model.

    ``d_mlp`` None means attention only; positions are learned vectors, or rotations of queries
    and keys.
    """

    d_vocab: int
    n_ctx: int
    n_layers: int = 2
    n_heads: int = 2
    d_model: int = 64
    d_head: int = 32
    d_mlp: int | None = None
    causal: bool = True
    rotary: bool = False

    def bridge_fields(self) -> dict[str, Any]:
        """Return the TransformerBridgeConfig fields, the content of ``config.json``."""
        sizes = {key: value for key, value in vars(self).items() if value is not None}
        del sizes["causal"], sizes["rotary"]
        return sizes | {
            "act_fn": "gelu_new",
            "normalization_type": "LN",
            "attn_only": self.d_mlp is None,
            "positional_embedding_type": "rotary" if self.rotary else "standard",
            "rotary_base": _BASE,
            "attention_dir": "causal" if self.causal else "bidirectional",
            "eps": _EPS,
            "attn_scale": math.sqrt(self.d_head),
        }

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> Sizes:
        """Return the sizes that :meth:`bridge_fields` wrote."""
        names = ("d_vocab", "n_ctx", "n_layers", "n_heads", "d_model", "d_head")
        return cls(
            **{name: fields[name] for name in names},
            d_mlp=fields.get("d_mlp"),
            causal=fields["attention_dir"] == "causal",
            rotary=fields["positional_embedding_type"] == "rotary",
        )


@dataclass(frozen=True, eq=False)
class Trace:
    """What a run leaves.

    Parameters
    ----------
    logits
        ``[batch, pos, d_vocab]``.
    senders
        Sender -> what it wrote, ``[batch, pos, d_model]``.
    patterns
        Head -> where it attended to, ``[batch, query, key]``.
    """

    logits: Tensor
    senders: dict[str, Tensor] = field(default_factory=dict)
    patterns: dict[str, Tensor] = field(default_factory=dict)


class Transformer:
    """The model.

    Parameters
    ----------
    sizes
        Its sizes.
    weights
        HookedTransformer layout.
    """

    def __init__(self, sizes: Sizes, weights: Mapping[str, Tensor]) -> None:
        self.sizes, self.weights = sizes, dict(weights)

    @classmethod
    def drawn(cls, sizes: Sizes, seed: int) -> Transformer:
        """Return a model of random weights: normal, those that write to the stream smaller.

        Biases are zero and norms one; the global random state is not touched.
        """
        generator = torch.Generator().manual_seed(seed)
        std = 0.8 / math.sqrt(sizes.d_model)
        writes = std / math.sqrt(2 * sizes.n_layers)
        weights = {}
        for name, shape in _shapes(sizes):
            kind = name.rpartition(".")[2]
            if kind.startswith("W"):
                scale = writes if kind in ("W_O", "W_out") else std
                weights[name] = scale * torch.randn(shape, generator=generator)
            else:
                weights[name] = torch.ones(shape) if kind == "w" else torch.zeros(shape)
        return cls(sizes, weights)

    @classmethod
    def of_folder(cls, folder: Path) -> Transformer:
        """Return the model of a folder, in float32."""
        fields = read_json(folder / "config.json", MIB, ModelError)
        weights = load_file(folder / "model.safetensors")
        return cls(Sizes.of_fields(fields), {key: x.float() for key, x in weights.items()})

    def logits(self, tokens: Tensor) -> Tensor:
        """Return ``[batch, pos, d_vocab]`` of tokens ``[batch, pos]``: the plain forward pass."""
        stream = self._embed(tokens)
        for layer in range(self.sizes.n_layers):
            part = f"blocks.{layer}."
            x = self._norm(stream, part + "ln1")
            attended = self._attend(layer, x, x, x, slice(None))[0]
            stream = stream + attended.sum(0) + self.weights[part + "attn.b_O"]
            if self.sizes.d_mlp is not None:
                stream = stream + self._mlp(layer, self._norm(stream, part + "ln2"))
        return self._unembed(stream)

    def run(
        self,
        tokens: Tensor,
        edges: Mapping[str, Tensor] | None = None,
        patterns: Mapping[str, Tensor] | None = None,
    ) -> Trace:
        """Run node by node, with interventions.

        Parameters
        ----------
        tokens
            ``[batch, pos]``.
        edges
            Edge (``a0.h1->a1.h0<k>``) -> what it carries instead of what its sender writes,
            ``[batch, pos, d_model]``.
        patterns
            Head -> where it attends to instead, ``[batch, query, key]``, rows of sum 1.
        """
        edges, patterns = edges or {}, patterns or {}
        senders = {"input": self._embed(tokens)}
        attended: dict[str, Tensor] = {}
        constant = torch.zeros(())  # the biases of attention, which belong to no sender

        def read(receiver: str) -> Tensor:
            carried = [edges.get(f"{name}->{receiver}", x) for name, x in senders.items()]
            return torch.stack(carried).sum(0) + constant

        for layer in range(self.sizes.n_layers):
            part, written = f"blocks.{layer}.", {}
            for h in range(self.sizes.n_heads):
                head = f"a{layer}.h{h}"
                q, k, v = (self._norm(read(f"{head}<{kind}>"), part + "ln1") for kind in "qkv")
                out, pattern = self._attend(layer, q, k, v, slice(h, h + 1), patterns.get(head))
                written[head], attended[head] = out[0], pattern[0]
            senders |= written
            constant = constant + self.weights[part + "attn.b_O"]
            if self.sizes.d_mlp is not None:
                read_in = self._norm(read(f"m{layer}"), part + "ln2")
                senders[f"m{layer}"] = self._mlp(layer, read_in)
        return Trace(self._unembed(read("logits")), senders, attended)

    def _embed(self, tokens: Tensor) -> Tensor:
        embedded = self.weights["embed.W_E"][tokens]
        if self.sizes.rotary:
            return embedded
        return embedded + self.weights["pos_embed.W_pos"][: tokens.shape[1]]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.w"], self.weights[f"{name}.b"]
        return layer_norm(x, x.shape[-1:], weight, bias, eps=_EPS)

    def _attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, heads: slice,
        pattern: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return some heads' outputs ``[head, batch, pos, d_model]`` and patterns."""
        part = f"blocks.{layer}.attn."
        query, key, value = (
            torch.einsum("bpd,hde->hbpe", x, self.weights[f"{part}W_{kind}"][heads])
            + self.weights[f"{part}b_{kind}"][heads][:, None, None]
            for kind, x in (("Q", q), ("K", k), ("V", v))
        )
        if pattern is None:
            if self.sizes.rotary:
                query, key = _rotated(query), _rotated(key)
            scores = query @ key.transpose(-1, -2) / math.sqrt(self.sizes.d_head)
            if self.sizes.causal:
                later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
                scores = scores.masked_fill(later, -torch.inf)
            weights = scores.softmax(-1)
        else:
            weights = pattern[None]
        mixed = weights @ value
        return torch.einsum("hbpe,hed->hbpd", mixed, self.weights[f"{part}W_O"][heads]), weights

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        part = f"blocks.{layer}.mlp."
        hidden = x @ self.weights[part + "W_in"] + self.weights[part + "b_in"]
        hidden = gelu(hidden, approximate="tanh")
        return hidden @ self.weights[part + "W_out"] + self.weights[part + "b_out"]

    def _unembed(self, stream: Tensor) -> Tensor:
        final = self._norm(stream, "ln_final")
        return final @ self.weights["unembed.W_U"] + self.weights["unembed.b_U"]


def _rotated(x: Tensor) -> Tensor:
    """Turn each pair of neighbouring coordinates of ``[..., pos, d_head]`` by its position."""
    n_pos, width = x.shape[-2:]
    speeds = _BASE ** -(torch.arange(0, width, 2) / width)
    angles = torch.arange(n_pos)[:, None] * speeds  # (pos, pair)
    cos, sin = angles.cos(), angles.sin()
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def _shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights."""
    heads, d_model, d_head = sizes.n_heads, sizes.d_model, sizes.d_head
    yield "embed.W_E", (sizes.d_vocab, d_model)
    if not sizes.rotary:
        yield "pos_embed.W_pos", (sizes.n_ctx, d_model)
    for layer in range(sizes.n_layers):
        part = f"blocks.{layer}."
        for kind in "QKV":
            yield f"{part}attn.W_{kind}", (heads, d_model, d_head)
            yield f"{part}attn.b_{kind}", (heads, d_head)
        yield f"{part}attn.W_O", (heads, d_head, d_model)
        yield f"{part}attn.b_O", (d_model,)
        for norm in ("ln1",) if sizes.d_mlp is None else ("ln1", "ln2"):
            yield from ((f"{part}{norm}.{kind}", (d_model,)) for kind in "wb")
        if sizes.d_mlp is not None:
            yield f"{part}mlp.W_in", (d_model, sizes.d_mlp)
            yield f"{part}mlp.b_in", (sizes.d_mlp,)
            yield f"{part}mlp.W_out", (sizes.d_mlp, d_model)
            yield f"{part}mlp.b_out", (d_model,)
    yield from ((f"ln_final.{kind}", (d_model,)) for kind in "wb")
    yield "unembed.W_U", (d_model, sizes.d_vocab)
    yield "unembed.b_U", (sizes.d_vocab,)
