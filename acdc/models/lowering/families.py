"""Reading a TransformerBridge into a :class:`LoweredModel`, family by family.

Norms, MLPs and the unembedding are the model's own modules.  What differs between families
(scale, masks, rotary, soft-caps, post-norms) is read from the bridge's configuration and from
the attributes of the model's own attention modules, as most families name them; :data:`FAMILIES`
says, one line each, what is to be read otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acdc.errors import UnsupportedModelError
from acdc.models.lowering.attention import KINDS, Attention, Kind, Rotary, SharedNorm
from acdc.models.lowering.mixture import Mixture
from acdc.models.lowering.mlps import PlainMlp, SplitMlp, bare, lean
from acdc.models.lowering.model import FeedForward, LoweredLayer, LoweredModel
from acdc.models.lowering.norm import Norm
from acdc.models.stored import held_bytes, kept_like
from graphs import GraphShape

__all__ = [
    "FAMILIES",
    "MAX_TABLE",
    "SUPPORTED_ARCHITECTURES",
    "Family",
    "check_architecture",
    "read_bridge",
]

MAX_TABLE = 1 << 24  # numbers: 131,072 positions of 128 dimensions


@dataclass(frozen=True)
class Family:
    """What is read otherwise than most families have it; None: nothing.

    Parameters
    ----------
    scale
        ``(attention module, layer, d_head)`` -> what scores are multiplied by.
    window
        ``(configuration, layer)`` -> how many positions back a query sees, or None.
    rotary
        ``(bridge, n_ctx)`` -> rotary tables of all layers, or None.
    rotary_by_kind
        Whether layers of each kind (``layer_types``) have rotary tables of their own.
    mlp
        ``block`` of the bridge -> its MLP, written out where the model has no module for it.
    router
        What the router of a mixture of experts is called in its module.
    sinks
        Whether softmaxes of attention have a further score, a number of the head, that nothing is
        read at.
    shared_norm
        Whether QK-norms are on all heads together.
    refused
        ``configuration`` -> what in it is not supported, or None.
    """

    scale: Callable[[Any, int, int], float] | None = None
    window: Callable[[Any, int], int | None] | None = None
    rotary: Callable[[Any, int], Rotary | None] | None = None
    rotary_by_kind: bool = False
    mlp: Callable[[Any], PlainMlp | SplitMlp] | None = None
    router: str | None = None
    sinks: bool = False
    shared_norm: bool = False
    refused: Callable[[Any], str | None] | None = None


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
    family = FAMILIES[architecture]
    _check_supported(family, model, architecture)
    model.eval()
    for parameter in (*model.parameters(), *bridge.parameters()):  # a bridge may split matrices
        parameter.requires_grad_(False)
    n_ctx = _context(bridge)
    rotaries = _rotaries(family, bridge, n_ctx)
    layers = tuple(
        _read_layer(block, i, bridge, rotaries[i], family) for i, block in enumerate(bridge.blocks)
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
        n_bytes=held_bytes([*model.parameters(), *bridge.parameters()]),
    )


def check_architecture(name: str) -> None:
    """Raise UnsupportedModelError if the lowering does not know the architecture."""
    if name not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {name!r} is not supported: use one of "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}"
        )


def _check_supported(family: Family, model: Any, architecture: str) -> None:
    """Raise UnsupportedModelError if the configuration asks for what the lowering lacks."""
    found = None if family.refused is None else family.refused(model.config)
    if found is not None:
        raise UnsupportedModelError(f"{architecture}: {found} is not supported")


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
        if kind in ("Gemma2RMSNorm", "Gemma3RMSNorm") and weight is not None:
            weight = 1.0 + weight
        return Norm(module, "RMS", weight, eps)
    raise UnsupportedModelError(f"norm {kind!r} is not supported: expected LayerNorm or RMSNorm")


def _embedding(bridge: Any) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    tok = _module(bridge.embed)
    pos = _module(bridge.pos_embed) if hasattr(bridge, "pos_embed") else None
    offset = getattr(pos, "offset", None)  # OPT: rows in front of that of the first position

    def embed_parts(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        token = tok(tokens)
        if pos is None:
            return token, None
        index = torch.arange(tokens.shape[-1], device=tokens.device)
        placed = pos(index) if offset is None else pos.weight[index + offset]
        return token, placed.expand_as(token)

    return embed_parts


def _read_layer(
    block: Any, index: int, bridge: Any, rotary: Rotary | None, family: Family
) -> LoweredLayer:
    attention = _read_attention(block, index, bridge, rotary, family)
    ln1 = _norm_of(block, "ln1")
    post = _norm(block.ln1_post) if hasattr(block, "ln1_post") else None
    if bridge.cfg.attn_only:
        return LoweredLayer(ln1, attention, post, None, None)
    # GPT-J: attention and MLP read through one norm
    ln2 = ln1 if bridge.cfg.parallel_attn_mlp and not _has(block, "ln2") else _norm_of(block, "ln2")
    ln2_post = _norm(block.ln2_post) if hasattr(block, "ln2_post") else None
    mlp = (
        _read_mlp(block, bool(bridge.cfg.gated_mlp), family, ln2, ln2_post)
        if not hasattr(_module(block.mlp), "experts")
        else _read_mixture(_module(block.mlp), family, ln2)
    )
    return LoweredLayer(ln1, attention, post, ln2, mlp)


def _read_mlp(
    block: Any, gated: bool, family: Family, norm: Norm, post: Norm | None
) -> FeedForward:
    if family.mlp is not None:
        own = family.mlp(block)
        readers = tuple((part, part.weight.T) for part in own.readers)
        return FeedForward(norm, own, post, gated, own.writer, own.writer.weight.T, readers)
    names = ("in", "gate") if gated else ("in",)
    return FeedForward(
        norm=norm,
        module=lean(_module(block.mlp)),
        post=post,
        gated=gated,
        writer=bare(block.mlp.out),
        W_out=block.mlp.W_out,
        readers=tuple((bare(getattr(block.mlp, x)), getattr(block.mlp, f"W_{x}")) for x in names),
    )


def _read_mixture(module: Any, family: Family, norm: Norm) -> Mixture:
    """Return a mixture of experts; its router gives logits, weights and which they are of."""
    assert family.router is not None
    router, experts = bare(getattr(module, family.router)), bare(module.experts)

    experts.config._experts_implementation = (
        "eager"  # the others need sizes of 16 bytes, no float64
    )

    def route(y: Tensor) -> tuple[Tensor, Tensor]:
        _, weights, which = router(y)
        return weights, which

    def whole(y: Tensor) -> Tensor:
        weights, which = route(y.reshape(-1, y.shape[-1]))
        out: Tensor = experts(y.reshape(-1, y.shape[-1]), which, weights)
        return out.reshape(y.shape)

    n_experts, *sizes = experts.down_proj.shape
    (width,) = {*sizes} - {router.weight.shape[1]} or {router.weight.shape[1]}
    return Mixture(
        norm=norm,
        module=whole,
        post=None,
        gated=True,
        writer=nn.Identity(),
        W_out=experts.down_proj,
        router=route,
        experts=experts,
        n_experts=n_experts,
        width=width,
    )


def _has(block: Any, name: str) -> bool:
    """Whether a block of the bridge has a component; those of the model itself do not count."""
    return name in block._modules


def _norm_of(block: Any, name: str) -> Norm:
    """Return a norm in front of attention or MLP; none where there is none (OLMo-2)."""
    return _norm(getattr(block, name)) if _has(block, name) else _read_norm(nn.Identity())


def _read_attention(
    block: Any, index: int, bridge: Any, rotary: Rotary | None, family: Family
) -> Attention:
    cfg, wrapped = bridge.cfg, block.attn
    module = _module(wrapped)
    W: dict[str, Tensor] = {"q": wrapped.W_Q, "k": wrapped.W_K, "v": wrapped.W_V}  # views
    b: dict[str, Tensor | None] = {"q": wrapped.b_Q, "k": wrapped.b_K, "v": wrapped.b_V}
    norms: dict[str, Norm | None] = {"q": _qk_norm(module, "q"), "k": _qk_norm(module, "k")}
    shared: dict[Kind, SharedNorm] = {}
    if family.shared_norm:
        for kind in KINDS[:2]:
            shared[kind], W[kind], b[kind] = _shared(norms[kind], W[kind], b[kind])
        norms = {"q": None, "k": None}
    return Attention(
        W=W,
        b=b,
        W_O=wrapped.W_O,
        b_O=wrapped.b_O,
        scale=(family.scale or _hf_scale)(module, index, cfg.d_head),
        norm=norms,
        rotary=rotary,
        soft_cap=_cap(cfg.attn_scores_soft_cap),
        window=(family.window or _hf_window)(getattr(bridge.original_model, "config", None), index),
        causal=cfg.attention_dir == "causal",
        shared=shared,
        sinks=module.sinks if family.sinks else None,
    )


def _qk_norm(module: Any, kind: Kind) -> Norm | None:
    norm = getattr(module, f"{kind}_norm", None)
    return None if norm is None else _read_norm(bare(norm))


def _shared(
    norm: Norm | None, W: Tensor, b: Tensor | None
) -> tuple[SharedNorm, Tensor, Tensor | None]:
    """Return a norm on all heads, and matrices and biases that have its weight in them."""
    assert norm is not None
    assert norm.weight is not None
    heads, d_model, d_head = W.shape
    every = W.permute(1, 0, 2).reshape(d_model, heads * d_head)
    shared = SharedNorm(norm, every, None if b is None else b.flatten())
    weight = norm.weight.view(heads, d_head)
    weighted = kept_like(W * weight[:, None], W)
    return shared, weighted, None if b is None else b * weight


def _hf_scale(module: Any, index: int, d_head: int) -> float:
    return float(module.scaling)


def _native_scale(module: Any, index: int, d_head: int) -> float:
    return float(1.0 / module.scale)


def _gpt2_scale(module: Any, index: int, d_head: int) -> float:
    scale = 1.0 / math.sqrt(d_head) if module.scale_attn_weights else 1.0
    return scale / (index + 1) if module.scale_attn_by_inverse_layer_idx else scale


def _gptj_scale(module: Any, index: int, d_head: int) -> float:
    return float(1.0 / module.scale_attn)


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
    rotated = 2 * len(next(_module(bridge.rotary_emb).buffers()))
    return min(n_ctx, max(1, MAX_TABLE // rotated))


def _rotaries(family: Family, bridge: Any, n_ctx: int) -> Sequence[Rotary | None]:
    """Return the rotary tables of each layer; layers alike share them."""
    if family.rotary_by_kind:
        kinds = bridge.original_model.config.layer_types
        tables = {kind: _hf_rotary(bridge, n_ctx, kind) for kind in sorted(set(kinds))}
        return [tables[kind] for kind in kinds]
    return [(family.rotary or _hf_rotary)(bridge, n_ctx)] * bridge.cfg.n_layers


def _native_rotary(bridge: Any, n_ctx: int) -> Rotary | None:
    rotary = bridge.original_model.rotary
    return None if rotary is None else Rotary(rotary.cos_cached, rotary.sin_cached, adjacent=True)


def _gptj_rotary(bridge: Any, n_ctx: int) -> Rotary:
    table = _module(bridge.blocks[0].attn).embed_positions  # (n_ctx, rotary_dim): sines, cosines
    dtype = _module(bridge.embed).weight.dtype
    sin, cos = (x.repeat_interleave(2, dim=-1).to(dtype) for x in table.chunk(2, dim=-1))
    return Rotary(cos, sin, adjacent=True)


def _hf_rotary(bridge: Any, n_ctx: int, *kind: str) -> Rotary | None:
    """Return the tables that the model's own module computes, of a kind of layers."""
    if not hasattr(bridge, "rotary_emb"):
        return None
    module = _module(bridge.rotary_emb)
    if "longrope" in str(module.rope_type):
        raise UnsupportedModelError(
            f"{type(bridge.original_model).__name__}: rotary positions of the type longrope, whose "
            "angles change with the length of the prompt, are not supported"
        )
    weight = _module(bridge.embed).weight
    positions = torch.arange(n_ctx, device=weight.device)[None]
    x = torch.zeros(1, 1, 1, device=weight.device, dtype=weight.dtype)
    cos, sin = (table[0].to(weight.dtype) for table in module(x, positions, *kind))
    if cos.shape[-1] == len(next(module.buffers())):  # gpt-oss: one of each pair, not both
        cos, sin = (torch.cat((table, table), dim=-1) for table in (cos, sin))
    return Rotary(cos, sin, adjacent=False)


# --- MLPs without a module of their own ----------------------------------------------------


def _opt_mlp(block: Any) -> PlainMlp:
    """Two maps of the block; the bridge's own would flatten what they are given."""
    layer = _module(block)
    return PlainMlp(bare(layer.fc1), layer.activation_fn, bare(layer.fc2))


def _phi3_mlp(block: Any) -> SplitMlp:
    mlp = block.mlp
    reader, gate = bare(getattr(mlp, "in")), bare(mlp.gate)
    return SplitMlp(reader, gate, _module(mlp).activation_fn, bare(mlp.out))


def _qwen3_moe_mlp(block: Any) -> SplitMlp:
    """A layer without experts, which the bridge has no parts of."""
    mlp = _module(block.mlp)
    reader, gate, writer = (bare(part) for part in (mlp.up_proj, mlp.gate_proj, mlp.down_proj))
    return SplitMlp(reader, gate, mlp.act_fn, writer)


# --- what is refused ----------------------------------------------------------------------


def _opt_refused(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "do_layer_norm_before=false (norms behind the sum with the stream, as OPT-350m)"
    if config._remove_final_layer_norm:
        return "_remove_final_layer_norm=true"
    if config.word_embed_proj_dim != config.hidden_size:
        return (
            f"word_embed_proj_dim={config.word_embed_proj_dim:,} with "
            f"hidden_size={config.hidden_size:,} (embeddings of another width)"
        )
    return None


# --- the table ----------------------------------------------------------------------------

FAMILIES: dict[str, Family] = {
    "TransformerLensNative": Family(
        scale=_native_scale, window=lambda config, layer: None, rotary=_native_rotary
    ),
    "GPT2LMHeadModel": Family(scale=_gpt2_scale),
    "GPTNeoForCausalLM": Family(scale=lambda module, layer, d_head: 1.0),
    "GPTNeoXForCausalLM": Family(),
    "GPTJForCausalLM": Family(scale=_gptj_scale, rotary=_gptj_rotary),
    "OPTForCausalLM": Family(mlp=_opt_mlp, refused=_opt_refused),
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "Phi3ForCausalLM": Family(mlp=_phi3_mlp),
    "Qwen2ForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(),
    "Olmo2ForCausalLM": Family(shared_norm=True),
    "Gemma2ForCausalLM": Family(),
    "Gemma3ForCausalLM": Family(rotary_by_kind=True),
    "MixtralForCausalLM": Family(router="gate"),
    "Qwen3MoeForCausalLM": Family(router="gate", mlp=_qwen3_moe_mlp),
    "GptOssForCausalLM": Family(router="router", sinks=True),
}
"""What the lowering knows, by the name of the model's class."""

SUPPORTED_ARCHITECTURES = tuple(FAMILIES)
