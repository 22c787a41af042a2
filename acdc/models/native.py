"""Loading models in TransformerLens' own layout: HookedTransformer weights with their sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acdc.errors import ModelError, UnsupportedModelError, did_you_mean
from acdc.files.fields import Field, at_least, check_fields, flag, number, one_of, text, whole
from acdc.files.tensors import read_shapes
from acdc.models.described import sizes_of_native
from acdc.models.folder import ModelFolder, check_sizes, read_object
from acdc.models.lowering.weights import BUFFERS, fit_weights, load_weights, read_weights
from acdc.models.sizes import Sizes
from acdc.models.tokenizer import TextTokenizer, read_native_tokenizer

__all__ = ["load_native"]

_SIZES = ("n_layers", "d_model", "d_head", "n_heads", "n_ctx", "d_vocab")
_NORMS = ("LN", "LNPre", "RMS", "RMSPre", None)
_FIELDS: dict[str, Field] = {
    **dict.fromkeys(_SIZES, whole(1)),
    **dict.fromkeys(("d_mlp", "n_key_value_heads", "rotary_dim"), whole(1).or_none()),
    "d_vocab_out": Field(
        "a whole number of at least 1, or -1", lambda n: n == -1 or whole(1).holds(n)
    ),
    "act_fn": text(),
    "eps": at_least(0),
    "attn_scale": Field("a number above 0, or -1", lambda x: x == -1 or number(above=0).holds(x)),
    "rotary_base": number(above=0),
    **dict.fromkeys(("final_rms", "attn_only", "gated_mlp"), flag()),
    **dict.fromkeys(("attn_scores_soft_cap", "output_logits_soft_cap"), number()),
    "attention_dir": one_of(("causal", "bidirectional")),
    "positional_embedding_type": text(),
}
# What a TransformerBridgeConfig can say but TransformerLens' native model ignores.
_NATIVE_ONLY = {
    "parallel_attn_mlp": False,
    "use_local_attn": False,
    "use_qk_norm": False,
    "scale_attn_by_inverse_layer_idx": False,
    "use_attn_scale": True,
    "post_embedding_ln": False,
    "use_normalization_before_and_after": False,
    "rmsnorm_uses_offset": False,
    "use_NTK_by_parts_rope": False,
    "num_experts": None,
}
_MAX_CONTEXT = 1 << 20
_PASSED = (*_NATIVE_ONLY, "normalization_type", "architecture")


def load_native(
    folder: ModelFolder,
    device: torch.device,
    dtype: torch.dtype,
    tell: Callable[[Sizes, TextTokenizer | None], None] | None = None,
) -> tuple[Any, TextTokenizer | None]:
    """Return a bridge around a native model, and its tokenizer.

    Parameters
    ----------
    folder
        With ``config.json`` (fields of TransformerBridgeConfig), ``model.safetensors`` or
        ``model.pt``, and perhaps ``tokenizer.json``.
    device, dtype
        Where and in which precision.
    tell
        Told the sizes and the tokenizer before the weights are read, if these are safetensors.

    Raises
    ------
    ModelError
        If a file cannot be used, or the weights are not those that the configuration describes.
    UnsupportedModelError
        If the configuration asks for what native models ignore.
    """
    path = folder.path / "config.json"
    fields = _read_fields(path)
    file, tokenizer = folder.path / "model.safetensors", read_native_tokenizer(folder)
    if tell is not None and file.exists():
        shapes = read_shapes(file, ModelError)
        _check_extent(fields, shapes, path, file)
        weights = {name: x for name, x in shapes.items() if not name.endswith(BUFFERS)}
        tell(sizes_of_native(fields, weights, dtype, dtype), tokenizer)
    source, state = read_weights(folder.path)
    _check_extent(fields, state, path, source)
    cfg = _configuration(fields, path)
    check_sizes(_without_weights(cfg, path), state, path)
    weights = fit_weights(cfg, state, source)
    bridge = _boot(cfg, path, device=device, dtype=dtype)
    load_weights(bridge, weights, state, source)
    return bridge, tokenizer


def _check_extent(
    fields: dict[str, Any], weights: dict[str, Tensor], path: Path, source: Path
) -> None:
    """Refuse more layers than there are weights, before anything is made of so many."""
    if fields["n_layers"] > len(weights):
        raise ModelError(
            f"{path}: n_layers is {fields['n_layers']:,}, but {source.name} has only "
            f"{len(weights):,} weights"
        )


def _read_fields(path: Path) -> dict[str, Any]:
    """Read and check the fields of a TransformerBridgeConfig that a native model reads."""
    values = read_object(path)
    for name in _SIZES:
        values.setdefault(name, None)
    check_fields(values, _FIELDS, path, ModelError)
    for name, works in _NATIVE_ONLY.items():
        if values.get(name, works) != works:
            raise UnsupportedModelError(
                f"{path}: {name}={values[name]!r} is not supported in native models, "
                f"only {name}={works!r}"
            )
    norm = values.get("normalization_type", "LN")
    if norm not in _NORMS:
        known = ", ".join(map(repr, _NORMS))
        raise UnsupportedModelError(
            f"{path}: normalization_type={norm!r} is not supported, expected one of {known}"
        )
    _check_names(values, path)
    if values["n_ctx"] > _MAX_CONTEXT:
        raise ModelError(f"{path}: n_ctx is {values['n_ctx']:,}, expected at most {_MAX_CONTEXT:,}")
    rotated, d_head = values.get("rotary_dim"), values["d_head"]
    if rotated is not None and rotated > d_head:
        raise ModelError(f"{path}: rotary_dim is {rotated:,}, expected at most d_head ({d_head:,})")
    return {name: value for name, value in values.items() if name in (*_FIELDS, *_PASSED)}


def _check_names(values: dict[str, Any], path: Path) -> None:
    """Refuse names that are none of TransformerBridgeConfig: a misspelt one would be ignored."""
    from transformer_lens.config import TransformerBridgeConfig

    known = vars(TransformerBridgeConfig(d_model=1, d_head=1, n_layers=1, n_ctx=1))
    for name in values:
        if name not in known:
            raise ModelError(
                f"{path} describes no native TransformerLens model: {name!r} is none of its "
                f"fields; {did_you_mean(name, known)}"
            )


def _configuration(fields: dict[str, Any], path: Path) -> Any:
    from transformer_lens.config import TransformerBridgeConfig

    with _errors(path):
        return TransformerBridgeConfig(**fields | {"init_weights": False})


def _without_weights(cfg: Any, path: Path) -> torch.nn.Module:
    """Return the bare module of a native model, which takes no memory."""
    from transformer_lens.model_bridge.sources.native import NativeModel

    with _errors(path), torch.device("meta"):
        return NativeModel(deepcopy(cfg))  # its defaults would be written into the configuration


def _boot(cfg: Any, path: Path, **options: Any) -> Any:
    import transformer_lens.model_bridge.sources.native  # noqa: F401  (adds boot_native)
    from transformer_lens.model_bridge import TransformerBridge

    boot_native: Any = TransformerBridge.boot_native  # type: ignore[attr-defined]
    with _errors(path):
        return boot_native(cfg, **options)


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turn what TransformerLens raises on settings that make no model into one line."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError, ArithmeticError) as error:
        raise ModelError(f"{path} describes no native TransformerLens model: {error}") from error
