"""Sizes of a model from its configuration and the shapes of its weights: nothing is read of these.

What is told is checked against the loaded model where it matters: prompts are checked again if
it reads other tokens or positions than was thought.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from acdc.models.lowering.families import MAX_TABLE
from acdc.models.sizes import Sizes
from graphs import GraphShape

__all__ = ["sizes_of_config", "sizes_of_native"]


def sizes_of_config(
    config: Any, weights: Mapping[str, Tensor], keep: torch.dtype, use: torch.dtype
) -> Sizes:
    """Return the sizes of a model in Hugging Face's layout.

    Parameters
    ----------
    config
        As transformers has made it.
    weights
        Of any type, on any device: their shapes count.
    keep, use
        The types that matrices are kept in and used in.
    """
    heads, width = config.num_attention_heads, config.hidden_size
    d_head = getattr(config, "head_dim", None) or width // heads
    has_posts = any("post_feedforward_layernorm" in name for name in weights)
    rotary = not any(name.endswith(("wpe.weight", "embed_positions.weight")) for name in weights)
    n_ctx = config.max_position_embeddings
    return Sizes(
        shape=GraphShape(
            n_layers=config.num_hidden_layers,
            n_heads=heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            parallel=bool(getattr(config, "use_parallel_residual", config.model_type == "gptj")),
        ),
        d_model=width,
        d_head=d_head,
        d_mlp=_neurons(config),
        gated=any("gate" in name for name in weights),
        n_posts=config.num_hidden_layers if has_posts else 0,
        d_vocab=config.vocab_size,
        d_vocab_out=config.vocab_size,
        n_ctx=min(n_ctx, max(1, MAX_TABLE // d_head)) if rotary else n_ctx,
        weights=_bytes(weights, keep, use),
        kept=keep,
        used=use,
    )


def _neurons(config: Any) -> int:
    """Neurons of an MLP, of a mixture: of an expert."""
    names = ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim")
    found = (getattr(config, name, None) for name in names)
    return next((int(n) for n in found if n), 4 * config.hidden_size)


def _bytes(weights: Mapping[str, Tensor], keep: torch.dtype, use: torch.dtype) -> int:
    """What weights take: matrices in the type that they are kept in, vectors as they are used."""
    return sum(x.numel() * (use if x.ndim < 2 else keep).itemsize for x in weights.values())


def sizes_of_native(
    fields: Mapping[str, Any], weights: Mapping[str, Tensor], keep: torch.dtype, use: torch.dtype
) -> Sizes:
    """Return the sizes of a model in TransformerLens' own layout.

    Parameters
    ----------
    fields
        Of a TransformerBridgeConfig, checked.
    weights, keep, use
        As of :func:`sizes_of_config`.
    """
    heads, out = fields["n_heads"], fields.get("d_vocab_out") or -1
    has_mlp = not fields.get("attn_only", False)
    return Sizes(
        shape=GraphShape(
            n_layers=fields["n_layers"],
            n_heads=heads,
            n_kv_heads=fields.get("n_key_value_heads") or heads,
            has_mlp=has_mlp,
        ),
        d_model=fields["d_model"],
        d_head=fields["d_head"],
        d_mlp=(fields.get("d_mlp") or 4 * fields["d_model"]) if has_mlp else 0,
        gated=has_mlp and bool(fields.get("gated_mlp", False)),
        n_posts=0,
        d_vocab=fields["d_vocab"],
        d_vocab_out=out if out > 0 else fields["d_vocab"],
        n_ctx=fields["n_ctx"],
        weights=_bytes(weights, keep, use),
        kept=keep,
        used=use,
    )
