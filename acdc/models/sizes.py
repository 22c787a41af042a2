"""How large a model is: what can be known of it before its weights are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from acdc.models.lowering.model import LoweredModel
from graphs import GraphShape

__all__ = ["Sized", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """Widths of a model, and the memory of its weights.

    Parameters
    ----------
    shape
        Of its component graph, without dictionaries.
    d_model, d_head, d_mlp
        Widths of the stream, of a head and of an MLP (of a mixture: of an expert; 0 without MLPs).
    gated
        Whether MLPs multiply two projections of what they read.
    n_posts
        Layers whose heads are read through a norm on their sum.
    d_vocab, d_vocab_out
        Tokens that it reads, and that it has logits for.
    n_ctx
        Most positions that it reads.
    weights
        Bytes that the weights take, in the type that they are kept in.
    kept, used
        The type that matrices are kept in, and that they are computed with.
    """

    shape: GraphShape
    d_model: int
    d_head: int
    d_mlp: int
    gated: bool
    n_posts: int
    d_vocab: int
    d_vocab_out: int
    n_ctx: int
    weights: int
    kept: torch.dtype
    used: torch.dtype

    @classmethod
    def of(cls, model: LoweredModel) -> Sizes:
        """Return those of a model that is loaded."""
        mlp = model.layers[0].mlp
        return cls(
            shape=model.shape,
            d_model=model.d_model,
            d_head=int(model.layers[0].attention.W_O.shape[1]),
            d_mlp=0 if mlp is None else mlp.d_mlp,
            gated=mlp is not None and mlp.gated,
            n_posts=sum(layer.attention_post is not None for layer in model.layers),
            d_vocab=model.d_vocab,
            d_vocab_out=model.d_vocab_out,
            n_ctx=model.n_ctx,
            weights=model.n_bytes,
            kept=model.kept_dtype,
            used=model.dtype,
        )


Sized = LoweredModel | Sizes
"""What says which tokens and positions a model reads."""
