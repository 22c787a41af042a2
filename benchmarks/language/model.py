"""The language model: TransformerLens' native transformer, and folders of its weights.

Weights are kept in half precision, in the layout that :func:`acdc.models.load_model` reads.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import NativeModel, initialize_native_model
from transformers import PreTrainedTokenizerFast

__all__ = [
    "CONFIG",
    "config_of",
    "hooked_weights",
    "make_model",
    "native_weights",
    "read_folder",
    "scored_logits",
    "write_folder",
]

CONFIG: dict[str, Any] = {
    "n_layers": 5,
    "d_model": 192,
    "n_heads": 8,
    "d_head": 24,
    "d_mlp": 256,
    "n_ctx": 128,
    "d_vocab": 3072,
    "act_fn": "relu",
    "normalization_type": "LN",
    "attn_only": False,
    "gated_mlp": False,
    "positional_embedding_type": "rotary",
    "rotary_base": 10000,
    "parallel_attn_mlp": False,
    "eps": 1e-5,
    "final_rms": False,
}
"""TransformerBridgeConfig fields of the model that is shipped."""


def config_of(**changes: Any) -> dict[str, Any]:
    """Return the fields of a TransformerBridgeConfig: :data:`CONFIG` with changes."""
    fields = CONFIG | changes
    return fields | {"attn_scale": math.sqrt(fields["d_head"])}


def make_model(config: dict[str, Any], seed: int) -> NativeModel:
    """Return the model with the random weights of a seed; the global state is not touched."""
    cfg = TransformerBridgeConfig(**config)
    with torch.random.fork_rng(devices=[]):
        model = NativeModel(cfg)
    initialize_native_model(model, cfg, seed=seed)
    return model


def scored_logits(model: NativeModel, tokens: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Return the logits at some positions, as the model has them, in three quarters of its time.

    Queries, keys and values are one product, and nothing is unembedded that is not asked for.

    Parameters
    ----------
    model
        A native model as :func:`make_model` makes it: LN, rotary, MLPs without gates.
    tokens
        ``[batch, pos]``.
    scored
        ``[batch, pos]``: which positions' logits are wanted.

    Returns
    -------
    Tensor
        ``[n_scored, d_vocab]``.
    """
    hidden = model.tok_embed(tokens)  # [batch, pos, d_model]
    length = tokens.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)
    for block in model.layers:
        hidden = hidden + _attention(block.attn, block.ln1(hidden), mask)
        hidden = hidden + block.mlp(block.ln2(hidden))
    return model.head(model.ln_out(hidden[scored]))


def _attention(attn: Any, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    batch, length, _ = hidden.shape
    parts = (attn.q, attn.k, attn.v)
    weight, bias = (torch.cat([getattr(p, name) for p in parts]) for name in ("weight", "bias"))
    joint = linear(hidden, weight, bias).view(batch, length, 3, attn.n_heads, attn.d_head)
    query, key, value = joint.transpose(1, 3).unbind(2)  # [batch, head, pos, d_head]
    query, key = _rotated(attn.rotary, query), _rotated(attn.rotary, key)
    scores = (query @ key.transpose(-1, -2)).float() / attn.scale + mask
    mixed = scores.softmax(-1) @ value  # [batch, head, pos, d_head]
    return attn.o(mixed.transpose(1, 2).reshape(batch, length, -1))


def _rotated(rotary: Any, x: torch.Tensor) -> torch.Tensor:
    """Turn each pair of coordinates by its position's angle."""
    cos, sin = (table[: x.shape[-2], 0::2] for table in (rotary.cos_cached, rotary.sin_cached))
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def hooked_weights(model: NativeModel) -> dict[str, torch.Tensor]:
    """Return the weights in HookedTransformer layout."""
    cfg, state = model.cfg, model.state_dict()
    heads, d_model, d_head = cfg.n_heads, cfg.d_model, cfg.d_head
    weights = {
        "embed.W_E": state["tok_embed.weight"],
        "ln_final.w": state["ln_out.weight"],
        "ln_final.b": state["ln_out.bias"],
        "unembed.W_U": state["head.weight"].T,
        "unembed.b_U": torch.zeros(cfg.d_vocab),
    }
    for layer in range(cfg.n_layers):
        old, new = f"layers.{layer}", f"blocks.{layer}"
        for part in "qkv":
            weight = state[f"{old}.attn.{part}.weight"].view(heads, d_head, d_model)
            weights[f"{new}.attn.W_{part.upper()}"] = weight.transpose(1, 2)
            bias = state[f"{old}.attn.{part}.bias"].view(heads, d_head)
            weights[f"{new}.attn.b_{part.upper()}"] = bias
        weights[f"{new}.attn.W_O"] = state[f"{old}.attn.o.weight"].T.reshape(heads, d_head, d_model)
        weights[f"{new}.attn.b_O"] = state[f"{old}.attn.o.bias"]
        for norm in ("ln1", "ln2"):
            weights[f"{new}.{norm}.w"] = state[f"{old}.{norm}.weight"]
            weights[f"{new}.{norm}.b"] = state[f"{old}.{norm}.bias"]
        for part in ("in", "out"):
            weights[f"{new}.mlp.W_{part}"] = state[f"{old}.mlp.fc_{part}.weight"].T
            weights[f"{new}.mlp.b_{part}"] = state[f"{old}.mlp.fc_{part}.bias"]
    return {key: value.detach().clone().contiguous() for key, value in weights.items()}


def native_weights(weights: dict[str, torch.Tensor], n_layers: int) -> dict[str, torch.Tensor]:
    """Return the native model's state, the inverse of :func:`hooked_weights`, in float32."""
    full = {key: value.float() for key, value in weights.items()}
    state = {
        "tok_embed.weight": full["embed.W_E"],
        "ln_out.weight": full["ln_final.w"],
        "ln_out.bias": full["ln_final.b"],
        "head.weight": full["unembed.W_U"].T,
    }
    for layer in range(n_layers):
        old, new = f"blocks.{layer}", f"layers.{layer}"
        for part in "qkv":
            weight = full[f"{old}.attn.W_{part.upper()}"]
            state[f"{new}.attn.{part}.weight"] = weight.transpose(1, 2).flatten(0, 1)
            state[f"{new}.attn.{part}.bias"] = full[f"{old}.attn.b_{part.upper()}"].flatten()
        state[f"{new}.attn.o.weight"] = full[f"{old}.attn.W_O"].flatten(0, 1).T
        state[f"{new}.attn.o.bias"] = full[f"{old}.attn.b_O"]
        for norm in ("ln1", "ln2"):
            state[f"{new}.{norm}.weight"] = full[f"{old}.{norm}.w"]
            state[f"{new}.{norm}.bias"] = full[f"{old}.{norm}.b"]
        for part in ("in", "out"):
            state[f"{new}.mlp.fc_{part}.weight"] = full[f"{old}.mlp.W_{part}"].T
            state[f"{new}.mlp.fc_{part}.bias"] = full[f"{old}.mlp.b_{part}"]
    return {key: value.contiguous() for key, value in state.items()}


def read_folder(folder: Path) -> NativeModel:
    """Return the native model of a folder that :func:`write_folder` wrote."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = make_model(config, seed=0)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict(native_weights(weights, config["n_layers"]))
    return model.eval()


def write_folder(
    folder: Path, model: NativeModel, config: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Write a model folder, its weights in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    halves = {key: value.half() for key, value in hooked_weights(model).items()}
    save_file(halves, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name before transformers 5 too
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
