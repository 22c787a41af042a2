"""Models lowered to functions of single nodes, and the check that nothing was lost."""

from __future__ import annotations

import math
from typing import Any

import torch

from acdc.errors import ModelError, UnsupportedModelError
from acdc.models.lowering.families import SUPPORTED_ARCHITECTURES, read_bridge
from acdc.models.lowering.model import LoweredLayer, LoweredModel, Trace

__all__ = ["SUPPORTED_ARCHITECTURES", "LoweredLayer", "LoweredModel", "Trace", "lower"]

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def lower(
    bridge: Any, *, split_qkv: bool = True, split_embed: bool = False, name: str = "model"
) -> LoweredModel:
    """Lower a TransformerBridge and check that the result computes the same.

    Parameters
    ----------
    bridge
        A ``transformer_lens`` TransformerBridge; its parameters are frozen, nothing else in it
        is changed.
    split_qkv, split_embed
        Granularity of the graph, see :class:`graphs.GraphShape`.
    name
        What run.json and pictures call the model.

    Returns
    -------
    LoweredModel
        Its logits on random tokens differ from the bridge's by at most 1e-4 of the largest
        logit (float32).

    Raises
    ------
    ModelError
        If the model's own logits are not finite.
    UnsupportedModelError
        If the architecture is unknown or the check fails: a model is never run wrong.
    """
    model = read_bridge(bridge, split_qkv=split_qkv, split_embed=split_embed, name=name)
    error, scale = _check(model, bridge)
    if not math.isfinite(scale):
        raise ModelError(
            f"model {name!r}: its own logits are not finite in {model.dtype}; the weights are "
            "broken, or too large for this type"
        )
    if not error <= _TOLERANCE[model.dtype] * scale:
        raise UnsupportedModelError(
            f"{type(bridge.original_model).__name__}: lowered logits differ from the model's by "
            f"{error:.2g} (largest logit {scale:.2g}); the model has a feature that the lowering "
            f"does not know. Configuration: {_features(bridge.cfg)}"
        )
    return model


@torch.no_grad()
def _check(model: LoweredModel, bridge: Any) -> tuple[float, float]:
    """Largest difference of logits on two random prompts, and the largest logit."""
    windows = [w for layer in model.layers if (w := layer.attention.window) is not None]
    length = min(model.n_ctx, max([16, *(w + 4 for w in windows if w < 512)]))
    generator = torch.Generator().manual_seed(0)
    high = bridge.cfg.d_vocab
    tokens = torch.randint(0, high, (2, length), generator=generator).to(model.device)
    final = model.forward(tokens).final
    assert final is not None
    expected = bridge(tokens)
    got = model.unembed(final)
    return float((got - expected).abs().max()), float(expected.abs().max())


def _features(cfg: Any) -> str:
    names = (
        "normalization_type", "positional_embedding_type", "parallel_attn_mlp", "gated_mlp",
        "n_key_value_heads", "attn_scores_soft_cap", "output_logits_soft_cap", "window_size",
    )  # fmt: skip
    return ", ".join(f"{n}={getattr(cfg, n, None)}" for n in names)
