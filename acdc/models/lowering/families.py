"""Reading a TransformerBridge into a :class:`LoweredModel`, family by family.

Norms, MLPs and the unembedding are the model's own modules.  What differs between families
(scale, masks, rotary, soft-caps, post-norms) is read from the bridge's configuration and from
the attributes of the model's own attention modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from acdc.errors import UnsupportedModelError
from acdc.models.lowering.attention import Attention, Rotary
from acdc.models.lowering.model import FeedForward, LoweredLayer, LoweredModel
from acdc.models.lowering.norm import Norm
from graphs import GraphShape

__all__ = ["SUPPORTED_ARCHITECTURES", "check_architecture", "read_bridge"]

_MAX_TABLE = 1 << 24  # numbers: 131,072 positions of 128 dimensions

SUPPORTED_ARCHITECTURES = (
    "TransformerLensNative",
    "GPT2LMHeadModel",
    "GPTNeoForCausalLM",
    "GPTNeoXForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
)


def read_bridge(
    bridge: Any, *, split_qkv: bool = True, split_embed: bool = False, name: str = "model"
) -> LoweredModel:
    """Lower a bridge without checking it; :func:`acdc.models.lowering.lower` does both.

    Raises
    ------
    UnsupportedModelError
        Naming the architecture or feature that the lowering does not know.
    """
    cfg = bridge.cfg
    model = bridge.original_model
    native = type(model).__name__ == "NativeModel"
    architecture = "TransformerLensNative" if native else type(model).__name__
    check_architecture(architecture)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    n_ctx = _context(bridge)
    rotary = _native_rotary(model) if native else _hf_rotary(bridge, n_ctx)
    layers = tuple(
        _read_layer(block, i, bridge, rotary, native) for i, block in enumerate(bridge.blocks)
    )
    head = _module(bridge.unembed)
    return LoweredModel(
        name=name,
        shape=GraphShape(
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
            has_mlp=not cfg.attn_only,
            parallel=bool(cfg.parallel_attn_mlp),
            split_qkv=split_qkv,
            split_embed=split_embed,
        ),
        embed_parts=_embedding(bridge),
        layers=layers,
        ln_final=_norm(bridge.ln_final),
        unembedding=head,
        W_U=head.weight,
        b_U=head.bias,
        logit_cap=_cap(cfg.output_logits_soft_cap),
        n_ctx=n_ctx,
        d_vocab=cfg.d_vocab,
    )


def check_architecture(name: str) -> None:
    """Raise UnsupportedModelError if the lowering does not know the architecture."""
    if name not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {name!r} is not supported: use one of "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}"
        )


def _module(component: Any) -> Any:
    """Return the model's own module under a bridge component."""
    return component.original_component


def _cap(value: Any) -> float | None:
    return float(value) if value is not None and value > 0 else None


def _norm(component: Any) -> Norm:
    return _read_norm(_module(component))


def _read_norm(module: Any) -> Norm:
    kind = type(module).__name__
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Identity):
        return Norm(module, "none", None, 0.0)
    eps = next(
        (
            float(getattr(module, key))
            for key in ("eps", "variance_epsilon")
            if hasattr(module, key)
        ),
        None,
    )
    if eps is None:
        raise UnsupportedModelError(f"norm {kind!r} has no eps: it is not LN or RMS")
    if isinstance(module, nn.LayerNorm) or kind == "NativeLayerNormPre":
        return Norm(module, "LN", weight, eps)
    if "RMSNorm" in kind:
        if kind == "Gemma2RMSNorm" and weight is not None:
            weight = 1.0 + weight
        return Norm(module, "RMS", weight, eps)
    raise UnsupportedModelError(f"norm {kind!r} is not supported: expected LayerNorm or RMSNorm")


def _embedding(bridge: Any) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    tok = _module(bridge.embed)
    pos = _module(bridge.pos_embed) if hasattr(bridge, "pos_embed") else None

    def embed_parts(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        token = tok(tokens)
        if pos is None:
            return token, None
        index = torch.arange(tokens.shape[-1], device=tokens.device)
        return token, pos(index).expand_as(token)

    return embed_parts


def _read_layer(
    block: Any, index: int, bridge: Any, rotary: Rotary | None, native: bool
) -> LoweredLayer:
    attention = _read_attention(block, index, bridge, rotary, native)
    ln1 = _norm(block.ln1)
    post = _norm(block.ln1_post) if hasattr(block, "ln1_post") else None
    if bridge.cfg.attn_only:
        return LoweredLayer(ln1, attention, post, None, None)
    ln2 = _norm(block.ln2)
    ln2_post = _norm(block.ln2_post) if hasattr(block, "ln2_post") else None
    readers = ("in", "gate") if bridge.cfg.gated_mlp else ("in",)
    mlp = FeedForward(
        norm=ln2,
        module=_module(block.mlp),
        post=ln2_post,
        gated=bool(bridge.cfg.gated_mlp),
        writer=block.mlp.out,
        W_out=block.mlp.W_out,
        readers=tuple((getattr(block.mlp, x), getattr(block.mlp, f"W_{x}")) for x in readers),
    )
    return LoweredLayer(ln1, attention, post, ln2, mlp)


def _read_attention(
    block: Any, index: int, bridge: Any, rotary: Rotary | None, native: bool
) -> Attention:
    cfg, wrapped = bridge.cfg, block.attn
    module = _module(wrapped)
    return Attention(
        W={
            "q": wrapped.W_Q.contiguous(),
            "k": wrapped.W_K.contiguous(),
            "v": wrapped.W_V.contiguous(),
        },
        b={"q": wrapped.b_Q, "k": wrapped.b_K, "v": wrapped.b_V},
        W_O=wrapped.W_O.contiguous(),
        b_O=wrapped.b_O,
        scale=1.0 / module.scale if native else _hf_scale(module, index, cfg.d_head),
        norm={kind: _qk_norm(module, f"{kind}_norm") for kind in ("q", "k")},
        rotary=rotary,
        soft_cap=_cap(cfg.attn_scores_soft_cap),
        window=None if native else _hf_window(bridge.original_model.config, index),
        causal=cfg.attention_dir == "causal",
    )


def _qk_norm(module: Any, name: str) -> Norm | None:
    norm = getattr(module, name, None)
    return None if norm is None else _read_norm(norm)


def _hf_scale(module: Any, index: int, d_head: int) -> float:
    name = type(module).__name__
    if name == "GPTNeoSelfAttention":
        return 1.0
    if name == "GPT2Attention":
        scale = 1.0 / math.sqrt(d_head) if module.scale_attn_weights else 1.0
        return scale / (index + 1) if module.scale_attn_by_inverse_layer_idx else scale
    return float(module.scaling)


def _hf_window(config: Any, index: int) -> int | None:
    """How many positions back a query of this layer sees; None for all."""
    if hasattr(config, "attention_layers"):  # GPT-Neo
        return config.window_size if config.attention_layers[index] == "local" else None
    types = getattr(config, "layer_types", None)
    if types is not None:
        return config.sliding_window if types[index] == "sliding_attention" else None
    if getattr(config, "use_sliding_window", True):
        return getattr(config, "sliding_window", None)
    return None


def _context(bridge: Any) -> int:
    """Positions that are read at most.

    Rotary models can be said to read a billion; the table of their angles ends where it would fill
    the memory, far beyond the prompts whose patterns ``[pos, pos]`` fit in there.
    """
    n_ctx = int(bridge.cfg.n_ctx)
    if not hasattr(bridge, "rotary_emb"):
        return n_ctx
    rotated = 2 * len(_module(bridge.rotary_emb).inv_freq)
    return min(n_ctx, max(1, _MAX_TABLE // rotated))


def _native_rotary(model: Any) -> Rotary | None:
    if model.rotary is None:
        return None
    return Rotary(model.rotary.cos_cached, model.rotary.sin_cached, adjacent=True)


def _hf_rotary(bridge: Any, n_ctx: int) -> Rotary | None:
    if not hasattr(bridge, "rotary_emb"):
        return None
    module = _module(bridge.rotary_emb)
    weight = _module(bridge.embed).weight
    positions = torch.arange(n_ctx, device=weight.device)[None]
    cos, sin = module(torch.zeros(1, 1, 1, device=weight.device, dtype=weight.dtype), positions)
    return Rotary(cos[0], sin[0], adjacent=False)
