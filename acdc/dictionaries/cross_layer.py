"""Cross-layer transcoders on disk, in circuit-tracer's layout.

====================  =============================================================================
file                  holds, for layer ``i`` of ``n``
====================  =============================================================================
W_enc_i.safetensors   ``W_enc_i [latent, d_model]``, ``b_enc_i [latent]``, ``b_dec_i [d_model]``;
                      maybe ``threshold_i [latent]`` (jump-ReLU; else ReLU) and
                      ``W_skip_i [d_model, d_model]``
W_dec_i.safetensors   ``W_dec_i [latent, n - i, d_model]``: what a latent writes into the MLP
                      outputs of layers ``i .. n - 1``
config.yaml           maybe ``feature_input_hook``, what latents read: ``hook_resid_mid`` (the raw
                      stream, also where no file says so, as in circuit-tracer),
                      ``ln2.hook_normalized`` or ``mlp.hook_in`` (behind the norm)
====================  =============================================================================

One layer is a :class:`Dictionary` whose ``W_later`` holds the decoders into later layers.

References
----------
Ameisen et al. 2025, "Circuit tracing"; Hanna et al. 2025, circuit-tracer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from acdc.dictionaries.hooks import READ_SITES, Hook, parse_hook
from acdc.dictionaries.sae import Dictionary
from acdc.errors import DictionaryError
from acdc.files import MAX_WEIGHTS
from acdc.files.tensors import check_floating, read_safetensors
from graphs.files.whole import read_bytes

__all__ = ["is_cross_layer", "read_cross_layer"]

CONFIG = "config.yaml"
_FILE = re.compile(r"W_(enc|dec)_(0|[1-9][0-9]{0,3})\.safetensors")
_MAX_CONFIG = 1 << 16
_INPUT, _OUTPUT = "feature_input_hook", "feature_output_hook"
_SITES = {"resid_mid": "mlp_in"}  # the raw stream in front of the MLP has two names


def is_cross_layer(folder: str | Path) -> bool:
    """Whether a folder holds a file of a cross-layer transcoder."""
    folder = Path(folder)
    return folder.is_dir() and any(_FILE.fullmatch(path.name) for path in folder.iterdir())


def read_cross_layer(folder: str | Path) -> list[Dictionary]:
    """Read a cross-layer transcoder.

    Returns
    -------
    list of Dictionary
        One per layer, on the CPU, in the type that each is stored in.

    Raises
    ------
    DictionaryError
        If a layer's file is missing or damaged, a tensor is missing, extra, misshapen or not
        finite, or the configuration names a hook that is not supported.  The message names the
        file and the item.
    """
    path = Path(folder)
    n_layers = _count_layers(path)
    site = _read_site(path / CONFIG)
    found: list[Dictionary] = []
    for layer in range(n_layers):
        d_model = found[0].d_in if found else None
        encoder = _read_encoder(path, layer, d_model)
        decoder = _read_decoder(path, layer, n_layers, encoder["W_enc"])
        found.append(_dictionary(layer, site, encoder, decoder, str(folder)))
    return found


def _dictionary(
    layer: int, site: str, encoder: dict[str, Tensor], decoder: Tensor, source: str
) -> Dictionary:
    jump = "jumprelu_" if "threshold" in encoder else ""
    skip = "skip_" if "W_skip" in encoder else ""
    kept: dict[str, Any] = {name: x for name, x in encoder.items() if name != "W_enc"}
    return Dictionary(
        f"{jump}{skip}cross_layer_transcoder",
        Hook(layer, site),
        Hook(layer, "mlp_out"),
        W_enc=encoder["W_enc"].T.contiguous(),
        W_dec=decoder[:, 0].contiguous(),
        W_later=decoder[:, 1:].transpose(0, 1).contiguous(),
        apply_b_dec_to_input=False,
        source=source,
        **kept,
    )


def _count_layers(folder: Path) -> int:
    """Count the layers, each of which has both files; sizes are bounded before any is read."""
    layers: dict[str, set[int]] = {"enc": set(), "dec": set()}
    n_bytes = 0
    for path in folder.iterdir():
        if match := _FILE.fullmatch(path.name):
            layers[match[1]].add(int(match[2]))
            n_bytes += path.stat().st_size
    n_layers = 1 + max(layers["enc"] | layers["dec"])
    for kind, there in layers.items():
        for layer in range(n_layers):
            if layer not in there:
                raise DictionaryError(
                    f"cross-layer transcoder {str(folder)!r}: W_{kind}_{layer}.safetensors is "
                    f"missing; its files say {n_layers} layers (0 to {n_layers - 1})"
                )
    if n_bytes > MAX_WEIGHTS:
        raise DictionaryError(
            f"cross-layer transcoder {str(folder)!r}: {n_bytes:,} bytes, expected at most "
            f"{MAX_WEIGHTS:,}"
        )
    return n_layers


def _read_encoder(folder: Path, layer: int, d_model: int | None) -> dict[str, Tensor]:
    """Read what stands in ``W_enc_i``, by names without the layer."""
    path = folder / f"W_enc_{layer}.safetensors"
    found = _read(path, ("W_enc", "b_enc", "b_dec"), ("threshold", "W_skip"), layer)
    weights = found["W_enc"]
    if weights.ndim != 2 or 0 in weights.shape or d_model not in (None, weights.shape[1]):
        wanted = "d_model" if d_model is None else d_model
        raise _misshapen(path, f"W_enc_{layer}", weights, f"[latents, {wanted}], none of them 0")
    n, width = weights.shape
    shapes = {"b_enc": [n], "b_dec": [width], "threshold": [n], "W_skip": [width, width]}
    for name, shape in shapes.items():
        if name in found and list(found[name].shape) != shape:
            raise _misshapen(path, f"{name}_{layer}", found[name], str(shape))
    if "threshold" in found and bool((found["threshold"] < 0).any()):
        raise DictionaryError(f"{path}: tensor 'threshold_{layer}' holds numbers below 0")
    return found


def _read_decoder(folder: Path, layer: int, n_layers: int, encoder: Tensor) -> Tensor:
    """Read ``W_dec_i [latent, layer written into, d_model]``."""
    path = folder / f"W_dec_{layer}.safetensors"
    found = _read(path, ("W_dec",), (), layer)["W_dec"]
    n, width = encoder.shape
    shape = [n, n_layers - layer, width]
    if list(found.shape) != shape:
        raise _misshapen(path, f"W_dec_{layer}", found, str(shape))
    return found.to(encoder.dtype)


def _read(
    path: Path, needed: tuple[str, ...], optional: tuple[str, ...], layer: int
) -> dict[str, Tensor]:
    """Read a file whose tensors are called so, each with the layer behind its name."""
    tensors = read_safetensors(path, DictionaryError)
    check_floating(tensors, path, DictionaryError)
    known = {f"{name}_{layer}": name for name in (*needed, *optional)}
    for name in needed:
        if f"{name}_{layer}" not in tensors:
            raise DictionaryError(f"{path}: tensor '{name}_{layer}' is missing")
    for name, value in tensors.items():
        if name not in known:
            raise DictionaryError(
                f"{path}: tensor {name!r} is there, expected only {', '.join(known)}"
            )
        if not value.isfinite().all():
            raise DictionaryError(f"{path}: tensor {name!r} holds values that are no finite number")
    dtype = tensors[f"{needed[0]}_{layer}"].dtype
    return {known[name]: value.to(dtype) for name, value in tensors.items()}


def _misshapen(path: Path, name: str, value: Tensor, wanted: str) -> DictionaryError:
    return DictionaryError(
        f"{path}: tensor {name!r} has shape {list(value.shape)}, expected {wanted}"
    )


def _read_site(path: Path) -> str:
    """What latents read, a site of :data:`READ_SITES`."""
    if not path.exists():
        return "mlp_in"
    try:
        config = yaml.safe_load(read_bytes(path, _MAX_CONFIG, DictionaryError))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = str(error).splitlines()[0]
        raise DictionaryError(f"{path} is no YAML that can be read: {line}") from error
    if not isinstance(config, dict):
        raise DictionaryError(f"{path} holds a {type(config).__name__}: expected keys and values")
    _check_text(path, config, "model_kind", "cross_layer_transcoder")
    _check_text(path, config, _OUTPUT, "hook_mlp_out")
    name = config.get(_INPUT, "hook_resid_mid")
    known = ", ".join(Hook(0, site).name.removeprefix("blocks.0.") for site in READ_SITES)
    if isinstance(name, str):
        try:
            site = parse_hook(f"blocks.0.{name}").site
        except DictionaryError:
            site = ""
        site = _SITES.get(site, site)
        if site in READ_SITES:
            return site
    raise DictionaryError(
        f"{path}: {_INPUT} is {_short(name)}, expected hook_resid_mid or one of {known}"
    )


def _check_text(path: Path, config: dict[Any, Any], key: str, wanted: str) -> None:
    """Check a key that may be missing."""
    if key in config and config[key] != wanted:
        raise DictionaryError(f"{path}: {key} is {_short(config[key])}, expected {wanted!r}")


def _short(value: object) -> str:
    return repr(value[:60]) if isinstance(value, str) else f"a {type(value).__name__}"
