"""What ``config.json`` of a Hugging Face model may say, checked before transformers sees it.

One table for all families, since they share most names; a family takes of it what it has.  Names
that the family does not know are dropped: transformers would store them, but no model reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from acdc.errors import ModelError, UnsupportedModelError
from acdc.files.fields import Field, at_least, check_fields, flag, number, one_of, text, whole

__all__ = ["check_configuration", "check_relations"]

_MAX_LAYERS, _MAX_CONTEXT = 10_000, 1 << 27
_ROTATIONS = ("default", "linear", "dynamic", "yarn", "llama3")  # longrope's change with length
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_WIDTHS = ("vocab_size", "hidden_size", "n_embd", *_HEADS)
_OPTIONAL_WIDTHS = (
    "num_key_value_heads", "head_dim", "intermediate_size", "n_inner", "ffn_dim",
    "word_embed_proj_dim", "rotary_dim", "num_local_experts", "num_experts",
    "num_experts_per_tok", "moe_intermediate_size",
)  # fmt: skip


def _is_attention_types(value: Any) -> bool:
    """Whether a value is as ``[[["global", "local"], 6]]``: kinds of layers and how often."""
    return isinstance(value, list) and all(
        isinstance(item, list)
        and len(item) == 2
        and isinstance(item[0], list)
        and all(kind in ("global", "local") for kind in item[0])
        and whole(1, _MAX_LAYERS).holds(item[1])
        and len(item[0]) * item[1] <= _MAX_LAYERS
        for item in value
    )


def _list_of(kinds: tuple[str, ...]) -> Field:
    return Field(
        f"a list of {' and '.join(kinds)}",
        lambda value: isinstance(value, list) and all(kind in kinds for kind in value),
    )


_ROPE: dict[str, Field] = {
    **dict.fromkeys(("rope_type", "type"), one_of(_ROTATIONS)),
    "rope_theta": number(above=0),
    "partial_rotary_factor": number(above=0, high=1),
    "factor": at_least(1),
    "original_max_position_embeddings": whole(1, _MAX_CONTEXT),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), number(above=0)),
    **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
                    number(above=0).or_none()),
    "truncate": flag(),
}  # fmt: skip
"""Scaling of rotary positions."""

_NEEDED = {
    **dict.fromkeys(("linear", "dynamic", "yarn"), ("factor",)),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}

_OLD_ROPE: dict[str, Field] = {
    "rope_scaling": Field("a JSON object", lambda value: isinstance(value, dict)).or_none(),
    **{key: _ROPE[key] for key in ("rope_theta", "partial_rotary_factor")},
    "rotary_emb_base": number(above=0),
    "rotary_pct": number(above=0, high=1),
    "original_max_position_embeddings": whole(1, _MAX_CONTEXT),
}
"""Where older files say it."""

_FIELDS: dict[str, Field] = {
    **dict.fromkeys(_LAYERS, whole(1, _MAX_LAYERS)),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), whole(1, _MAX_CONTEXT)),
    **dict.fromkeys(_WIDTHS, whole(1)),
    **dict.fromkeys(_OPTIONAL_WIDTHS, whole(1).or_none()),
    **dict.fromkeys(("hidden_act", "activation_function", "hidden_activation"), text()),
    **dict.fromkeys(("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps"), at_least(0)),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"),
                    number(above=0).or_none()),
    "query_pre_attn_scalar": number(above=0),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_parallel_residual", "tie_word_embeddings",
                     "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
                     "reorder_and_upcast_attn", "use_sliding_window", "is_decoder",
                     "do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine",
                     "_remove_final_layer_norm"), flag()),
    **dict.fromkeys(("sliding_window", "window_size"), whole(1).or_none()),
    "max_window_layers": whole(0),
    "norm_topk_prob": flag(),
    "decoder_sparse_step": whole(1, _MAX_LAYERS),
    "mlp_only_layers": Field(
        "a list of whole numbers, or null",
        lambda value: value is None
        or (isinstance(value, list) and all(whole(0).holds(one) for one in value)),
    ),
    **dict.fromkeys(("swiglu_alpha", "swiglu_limit"), number(above=0)),
    "sliding_window_pattern": whole(1, _MAX_LAYERS),
    "rope_local_base_freq": number(above=0),
    "attention_types": Field(
        f'a list as [[["global", "local"], 6]] of at most {_MAX_LAYERS:,} layers',
        _is_attention_types,
    ),
    "attention_layers": _list_of(("global", "local")),
    "layer_types": _list_of(("full_attention", "sliding_attention")).or_none(),
    "rope_parameters": _OLD_ROPE["rope_scaling"],
    **dict.fromkeys(("add_cross_attention", "use_bidirectional_attention"),
                    Field("false", lambda value: value in (False, None))),
}  # fmt: skip

_NO_EFFECT = frozenset((
    "architectures", "dtype", "id2label", "label2id", "problem_type", "is_encoder_decoder",
    "output_hidden_states", "return_dict", "use_cache", "chunk_size_feed_forward", "pretraining_tp",
    "transformers_version", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range",
))  # fmt: skip
"""Fields that say nothing about logits; so do all whose names speak of dropout and summaries."""

_UNNAMED = {
    "head_dim": "num_key_value_heads",
    "sliding_window_pattern": "_sliding_window_pattern",  # Gemma-3 before layer_types
    "rope_local_base_freq": "default_theta",  # Gemma-3 before rope_parameters by kind of layer
    "_remove_final_layer_norm": "_remove_final_layer_norm",
}
"""Fields that some families read without naming them, and what of theirs says which do."""

_REFUSED = ("quantization_config", "compression_config", "per_layer_config")


def check_configuration(
    values: Mapping[str, Any], default: Any, state: Mapping[str, Tensor], where: str
) -> dict[str, Any]:
    """Return the fields of a configuration that decide what the model computes.

    Parameters
    ----------
    values
        Content of ``config.json``.
    default
        A configuration of the family with nothing but defaults.
    state
        The weights, which bound every size.
    where
        Beginning of the messages.

    Raises
    ------
    ModelError
        Naming the first field that holds what it cannot.
    UnsupportedModelError
        If it asks for what changes the weights or the layers.
    """
    for name in _REFUSED:
        if values.get(name) is not None:
            raise UnsupportedModelError(f"{where}: {name} is there, which is not supported")
    known = {name for name in vars(default) if not name.startswith("_")}
    table = _FIELDS
    if hasattr(default, "rope_parameters"):
        table = _FIELDS | _OLD_ROPE
        known |= _OLD_ROPE.keys()
    known |= set(default.attribute_map)
    known |= {name for name in _UNNAMED if hasattr(default, _UNNAMED[name])}
    fields = {
        name: value for name, value in values.items() if name in known and not _has_no_effect(name)
    }
    check_fields(fields, table, where, ModelError)
    _check_rope(fields, _kinds_of_rope(default), where)
    _check_extent(fields, state, where)
    return fields


def _has_no_effect(name: str) -> bool:
    return name in _NO_EFFECT or any(part in name for part in ("dropout", "_pdrop", "summary_"))


def _kinds_of_rope(default: Any) -> tuple[str, ...]:
    """Return the kinds of layers that a family has rotary positions of their own for."""
    rope = getattr(default, "rope_parameters", None) or {}
    return tuple(kind for kind, value in rope.items() if isinstance(value, dict))


def _check_rope(fields: Mapping[str, Any], kinds: tuple[str, ...], where: str) -> None:
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.get(name) or {}
        own = {kind: rope[kind] for kind in kinds if isinstance(rope.get(kind), dict)}
        for kind, value in own.items():
            _check_one_rope(value, f"{where}: {name} of {kind}")
        rest = {key: value for key, value in rope.items() if key not in own}
        _check_one_rope(rest, f"{where}: {name}")


def _check_one_rope(rope: Mapping[str, Any], start: str) -> None:
    check_fields(rope, _ROPE, start, ModelError)
    kind = rope.get("rope_type", rope.get("type", "default"))
    for key in _NEEDED.get(kind, ()):
        if key not in rope:
            raise ModelError(f"{start} has no {key}, which {kind!r} needs")
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise UnsupportedModelError(
            f"{start} has other values for {nested[0]!r}; only one for all layers is supported"
        )


def _check_extent(fields: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> None:
    """Refuse sizes that the weights cannot have, before anything is made of such a size."""
    n_values = sum(value.numel() for value in state.values())
    for name in _LAYERS:
        if fields.get(name, 0) > len(state):
            raise ModelError(
                f"{where}: {name} is {fields[name]:,}, but there are only {len(state):,} weights"
            )
    for name in (*_WIDTHS, *_OPTIONAL_WIDTHS):
        if (fields.get(name) or 0) > n_values:
            raise ModelError(
                f"{where}: {name} is {fields[name]:,}, but the weights hold only {n_values:,} "
                "numbers"
            )


def check_relations(config: Any, where: str) -> None:
    """Refuse heads, layers and rotary dimensions that do not fit together.

    Parameters
    ----------
    config
        A configuration that transformers has made.
    where
        Beginning of the message.

    Raises
    ------
    ModelError
        Saying which two sizes disagree.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    if heads % shared:
        raise ModelError(f"{where}: {heads} heads cannot share {shared} key-value heads evenly")
    d_head = getattr(config, "head_dim", None)
    if d_head is None and width % heads:
        raise ModelError(f"{where}: {heads} heads cannot share a width of {width} evenly")
    n_experts = getattr(config, "num_local_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    if n_experts is not None and chosen is not None and chosen > n_experts:
        raise ModelError(f"{where}: a token cannot go to {chosen} of {n_experts} experts")
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is not None and window is None and "sliding_attention" in kinds:
        raise ModelError(
            f"{where}: layers are of the kind sliding_attention without sliding_window"
        )
    d_head = d_head or width // heads
    for rotated in _rotated(config, d_head):
        if not 2 <= rotated <= d_head or rotated % 2:
            raise ModelError(
                f"{where}: {rotated} of {d_head} dimensions of a head are rotated, expected an "
                "even number of them"
            )


def _rotated(config: Any, d_head: int) -> Iterator[int]:
    """How many dimensions of a head are rotated, in layers of each kind that says so."""
    if hasattr(config, "rotary_dim"):  # GPT-J, which rotates as many as its whole width without
        yield config.rotary_dim or config.hidden_size
    rope = getattr(config, "rope_parameters", None) or {}
    own = [value for value in rope.values() if isinstance(value, dict)]
    for one in own or [rope] * bool(rope):
        yield int(d_head * one.get("partial_rotary_factor", 1.0))
