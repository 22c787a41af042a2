"""Weights in HookedTransformer layout, checked key by key before they enter a native model.

``blocks.0.attn.W_Q`` is ``[head, d_model, d_head]``, ``mlp.W_in`` is ``[d_model, d_mlp]`` and
so on; TransformerLens' converter turns them into what a native bridge loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acdc.errors import ModelError
from acdc.files.pickled import read_pt
from acdc.files.tensors import check_floating, read_safetensors

__all__ = ["expected_shapes", "fit_weights", "load_weights", "read_weights"]

TABLES = (".attn.rotary_sin", ".attn.rotary_cos")
BUFFERS = (".attn.mask", ".attn.IGNORE")
_OPTIONAL = ("unembed.b_U",)  # native models have none of their own; zero where it is missing


def read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Read ``model.safetensors``, or else ``model.pt`` without executing anything in it.

    Returns
    -------
    tuple
        The file that was read, and its tensors by name, on the CPU.

    Raises
    ------
    ModelError
        If there is neither file, or it is truncated, or holds anything but tensors.
    """
    path = folder / "model.safetensors"
    if path.exists():
        return path, read_safetensors(path, ModelError)
    path = folder / "model.pt"
    if not path.exists():
        raise ModelError(f"{folder}: no weights; expected model.safetensors or model.pt there")
    return path, _read_pt(path)


def _read_pt(path: Path) -> dict[str, Tensor]:
    state = read_pt(path, ModelError)
    if not isinstance(state, dict):
        raise ModelError(f"{path} holds a {type(state).__name__}; expected a dict of tensors")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ModelError(
                f"{path}: entry {key!r} is a {type(value).__name__}; expected only tensors by name"
            )
    return state


def expected_shapes(cfg: Any) -> dict[str, tuple[int, ...]]:
    """Every key of a native model in HookedTransformer layout with its shape, in model order."""
    shapes: dict[str, tuple[int, ...]] = {"embed.W_E": (cfg.d_vocab, cfg.d_model)}
    if str(cfg.positional_embedding_type).lower() == "standard":
        shapes["pos_embed.W_pos"] = (cfg.n_ctx, cfg.d_model)
    for layer in range(cfg.n_layers):
        shapes |= {f"blocks.{layer}.{key}": shape for key, shape in _block_shapes(cfg)}
    shapes |= {f"ln_final.{key}": shape for key, shape in _norm_shapes(cfg, final=True)}
    d_out = cfg.d_vocab_out if cfg.d_vocab_out > 0 else cfg.d_vocab
    return shapes | {"unembed.W_U": (cfg.d_model, d_out), "unembed.b_U": (d_out,)}


def _norm_shapes(cfg: Any, *, final: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    kind = (cfg.normalization_type or "none").upper()
    rms = kind.startswith("RMS") or (final and cfg.final_rms)
    if kind.endswith("PRE") or (kind == "NONE" and not rms):
        return
    yield "w", (cfg.d_model,)
    if not rms:
        yield "b", (cfg.d_model,)


def _block_shapes(cfg: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    heads, d_model, d_head = cfg.n_heads, cfg.d_model, cfg.d_head
    kv_heads = cfg.n_key_value_heads or heads
    kv = "_" if cfg.n_key_value_heads else ""  # grouped keys and values carry an underscore
    yield from ((f"ln1.{key}", shape) for key, shape in _norm_shapes(cfg))
    yield "attn.W_Q", (heads, d_model, d_head)
    yield f"attn.{kv}W_K", (kv_heads, d_model, d_head)
    yield f"attn.{kv}W_V", (kv_heads, d_model, d_head)
    yield "attn.W_O", (heads, d_head, d_model)
    yield "attn.b_Q", (heads, d_head)
    yield f"attn.{kv}b_K", (kv_heads, d_head)
    yield f"attn.{kv}b_V", (kv_heads, d_head)
    yield "attn.b_O", (d_model,)
    if cfg.attn_only:
        return
    yield from ((f"ln2.{key}", shape) for key, shape in _norm_shapes(cfg))
    if cfg.gated_mlp:
        yield "mlp.W_gate", (d_model, cfg.d_mlp)
    yield "mlp.W_in", (d_model, cfg.d_mlp)
    yield "mlp.W_out", (cfg.d_mlp, d_model)
    if not cfg.gated_mlp:
        yield "mlp.b_in", (cfg.d_mlp,)
        yield "mlp.b_out", (d_model,)
        if str(cfg.act_fn).lower() == "solu_ln":
            yield "mlp.ln.w", (cfg.d_mlp,)
            yield "mlp.ln.b", (cfg.d_mlp,)


def fit_weights(cfg: Any, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the weights under the names of a configuration, which needs all of them.

    Parameters
    ----------
    cfg
        A TransformerBridgeConfig of a native model.
    state
        Tensors by name, as :func:`read_weights` gives them.
    path
        Where they come from, for the messages.

    Raises
    ------
    ModelError
        Naming the first key that is missing, unknown, of the wrong shape or of no floating type.
    """
    expected = expected_shapes(cfg)
    state = {key: value for key, value in state.items() if not key.endswith(BUFFERS)}
    check_floating(state, path, ModelError)
    state = {key: value for key, value in state.items() if not key.endswith(TABLES)}
    state = {_underscored(key, expected): value for key, value in state.items()}
    state = {k: v for k, v in state.items() if k in expected or not _is_zero_bias(k, v)}
    _check_keys(state, expected, path)
    return state


def load_weights(
    bridge: Any, weights: dict[str, Tensor], state: dict[str, Tensor], path: Path
) -> None:
    """Put weights into a native bridge.

    Parameters
    ----------
    bridge
        A bridge made by ``TransformerBridge.boot_native``.
    weights
        As :func:`fit_weights` gives them for the bridge's configuration.
    state
        All tensors of the file; rotary tables among them must be those of the model.
    path
        Where they come from, for the messages.

    Raises
    ------
    ModelError
        If a rotary table is another one, or TransformerLens' converter loses a weight.
    """
    from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

    for key, value in state.items():
        if key.endswith(TABLES):
            _check_rotary(key, value, bridge, path)
    report = bridge.load_state_dict(convert_tl_checkpoint(weights, bridge.cfg), strict=False)
    missing = [k for k in report.missing_keys if k != "head._original_component.bias"]
    for what, keys in (("lacks", missing), ("cannot place", report.unexpected_keys)):
        if keys:
            raise ModelError(f"{path}: the converted checkpoint {what} {keys[0]!r}")


def _check_keys(state: dict[str, Tensor], expected: dict[str, tuple[int, ...]], path: Path) -> None:
    for key, shape in expected.items():
        if key not in state:
            if key in _OPTIONAL:
                continue
            raise ModelError(
                f"{path} does not match its config: it lacks {key!r}, expected with shape "
                f"{list(shape)}"
            )
        got = tuple(state[key].shape)
        if got != shape:
            raise ModelError(
                f"{path} does not match its config: {key!r} has shape {list(got)}, "
                f"expected {list(shape)}"
            )
    for key, value in state.items():
        if key not in expected:
            raise ModelError(
                f"{path} does not match its config: it holds {key!r} of shape "
                f"{list(value.shape)}, which the config does not describe"
            )


def _underscored(key: str, expected: dict[str, tuple[int, ...]]) -> str:
    """Return the name under which the model expects a key or value weight of a shared head."""
    stem, _, last = key.rpartition(".")
    swapped = f"{stem}.{last[1:]}" if last.startswith("_") else f"{stem}._{last}"
    return swapped if key not in expected and swapped in expected else key


def _is_zero_bias(key: str, value: Tensor) -> bool:
    """Whether a bias adds nothing, as those of gated MLPs that were trained without."""
    return key.rpartition(".")[2].startswith("b_") and not value.any()


def _check_rotary(key: str, value: Tensor, bridge: Any, path: Path) -> None:
    rotary = bridge.original_model.rotary
    if rotary is None:
        return
    own = (rotary.sin_cached if key.endswith("sin") else rotary.cos_cached).cpu().float()
    if own.shape != value.shape or not torch.allclose(own, value.float(), atol=1e-2):
        raise ModelError(
            f"{path}: the rotary table {key!r} is not the one that a native model computes (it "
            "rotates pairs of adjacent dimensions); this checkpoint would be run wrong"
        )
