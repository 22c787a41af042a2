"""Dictionaries on disk, in SAELens' layout: ``cfg.json`` beside ``sae_weights.safetensors``.

``cfg.json`` is read as SAELens 3 to 6 wrote it: the hook stands under ``metadata`` (6) or at the
top (``hook_name``, earlier ``hook_point``), a top-k SAE is called so (6) or has the activation
function ``topk``.  Keys that only concern training are left alone.

A folder may also be on the Hugging Face hub: ``owner/repository`` or
``owner/repository/folder/in/it``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from acdc.dictionaries.cross_layer import is_cross_layer, read_cross_layer
from acdc.dictionaries.hooks import READ_SITES, WRITE_SITES, Hook, parse_hook
from acdc.dictionaries.sae import ARCHITECTURES, NORMALIZATIONS, Dictionary
from acdc.errors import DictionaryError, did_you_mean
from acdc.files.folders import Repository, local_folder
from acdc.files.tensors import check_floating, read_safetensors
from graphs.files.whole import MIB, read_json, write_json, write_whole

__all__ = ["CONFIG", "WEIGHTS", "list_dictionaries", "read_dictionaries", "read_dictionary",
           "write_dictionary"]  # fmt: skip

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)((?:/\w[\w.-]*)*)/?")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
}
_MAX_CONFIG = 4 * MIB
_LAYOUT = "6.0.0"
"""The sae_lens_version whose layout is written; readers go by it."""


def read_dictionary(path_or_hub: str | Path) -> Dictionary:
    """Read one dictionary.

    Parameters
    ----------
    path_or_hub
        A folder with ``cfg.json`` and ``sae_weights.safetensors``; or, where there is no such
        folder, ``owner/repository[/folder]`` on the Hugging Face hub.

    Returns
    -------
    Dictionary
        On the CPU, in the dtype that its configuration names.

    Raises
    ------
    DictionaryError
        If a file is missing, truncated or does not say what it must, the architecture, hook or
        normalisation is not supported, or a tensor is missing, extra, misshapen or not finite.
        The message names the file and the item.
    """
    folder = _locate(str(path_or_hub))
    config = _Config(folder / CONFIG, _read_json(folder / CONFIG))
    architecture = config.architecture()
    reads, writes = config.hooks(architecture)
    tensors: dict[str, Any] = dict(_read_tensors(folder / WEIGHTS, architecture, config))
    return Dictionary(
        architecture,
        reads,
        writes,
        **tensors,
        k=config.k(tensors["W_enc"].shape[1]) if architecture == "topk" else None,
        apply_b_dec_to_input=config.apply_b_dec_to_input(architecture),
        normalize_activations=config.normalization(),
        rescale_acts_by_decoder_norm=architecture == "topk"
        and config.flag("rescale_acts_by_decoder_norm", False),
        metadata=config.metadata,
        source=str(path_or_hub),
    )


def read_dictionaries(paths: Iterable[str | Path]) -> list[Dictionary]:
    """Read several dictionaries, none of which replaces what another one does.

    A folder of a cross-layer transcoder (:mod:`acdc.dictionaries.cross_layer`) holds one per layer.

    Raises
    ------
    DictionaryError
        As :func:`read_dictionary`, and if two are on one hook, or replace the same part of the
        model (an SAE on ``hook_mlp_out`` and a transcoder of that MLP).
    """
    by_part: dict[tuple[str, int], Dictionary] = {}
    for new in chain.from_iterable(map(_read_all, paths)):
        old = by_part.setdefault(new.writes.part, new)
        if old is not new:
            where = (
                f"are both on hook {new.reads.name!r}"
                if old.reads == new.reads
                else f"(on {old.reads.name!r} and {new.reads.name!r}) replace the same activation"
            )
            raise DictionaryError(
                f"dictionaries {old.source!r} and {new.source!r} {where}: give one of them"
            )
    return list(by_part.values())


def _read_all(path: str | Path) -> list[Dictionary]:
    """Read a dictionary, or all layers of a cross-layer transcoder."""
    folder = local_folder(str(path), "dictionary", CONFIG, DictionaryError)
    if folder is not None and not (folder / CONFIG).exists() and is_cross_layer(folder):
        return [replace(one, source=str(path)) for one in read_cross_layer(folder)]
    return [read_dictionary(path)]


def list_dictionaries(folder: str | Path) -> dict[str, Path]:
    """Return the folders right under ``folder`` that hold a dictionary, by name."""
    found = sorted(path.parent for path in Path(folder).glob(f"*/{CONFIG}"))
    return {path.name: path for path in found}


def write_dictionary(dictionary: Dictionary, folder: str | Path) -> Path:
    """Write a dictionary as SAELens 6 does; files of these names are replaced.

    Raises
    ------
    InputError
        If a file cannot be written.
    """
    folder = Path(folder)
    config: dict[str, Any] = {
        "architecture": dictionary.architecture,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.n_latents,
        "dtype": str(dictionary.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.apply_b_dec_to_input,
        "normalize_activations": dictionary.normalize_activations,
        "reshape_activations": "hook_z" if dictionary.reads.site == "attn_z" else "none",
        "metadata": {"sae_lens_version": _LAYOUT, **dictionary.metadata}
        | {"hook_name": dictionary.reads.name},
    }
    if dictionary.is_transcoder:
        config["d_out"] = dictionary.d_out
        config["metadata"]["hook_name_out"] = dictionary.writes.name
    if dictionary.k is not None:
        config["k"] = dictionary.k
        config["rescale_acts_by_decoder_norm"] = dictionary.rescale_acts_by_decoder_norm
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in dictionary.tensors.items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DictionaryError(f"cannot write {folder}: {error.strerror or error}") from error
    write_whole(folder / WEIGHTS, save(tensors))
    write_json(folder / CONFIG, config)
    return folder


# --- where the files are ------------------------------------------------------------------


def _locate(name: str) -> Path:
    """Return the folder of a dictionary, fetched from the hub if need be."""
    folder = local_folder(name, "dictionary", CONFIG, DictionaryError)
    if folder is not None:
        return folder
    found = _HUB.fullmatch(name)
    if found is None:
        raise DictionaryError(
            f"dictionary {name!r}: there is no such folder; give a folder with {CONFIG} and "
            f"{WEIGHTS}, or owner/repository/folder on the Hugging Face hub"
        )
    repository = Repository(
        found[1],
        start=f"dictionary {name!r}: there is no such folder,",
        hint="give a local folder, or owner/repository/folder",
        failure=DictionaryError,
    )
    inside = found[2].strip("/") or None
    repository.fetch(WEIGHTS, folder=inside)
    return repository.fetch(CONFIG, folder=inside).parent


# --- cfg.json -----------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise DictionaryError(
            f"{path.parent} is no dictionary: it has no {path.name}; expected {CONFIG} and "
            f"{WEIGHTS} as SAELens writes them"
        )
    value = read_json(path, _MAX_CONFIG, DictionaryError)
    if not isinstance(value, dict):
        raise DictionaryError(f"{path} holds a {type(value).__name__}: expected a JSON object")
    return value


@dataclass(frozen=True)
class _Config:
    """A ``cfg.json`` of any version; every error names the file and the key."""

    path: Path
    values: Mapping[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        """What concerns the making; up to version 5 it stood among the rest."""
        found = self.values.get("metadata")
        if found is None:
            keys = ("model_name", "neuronpedia_id", "prepend_bos", "context_size", "dataset_path",
                    "sae_lens_training_version")  # fmt: skip
            found = {key: self.values[key] for key in keys if key in self.values}
        if not isinstance(found, dict):
            raise self._error("metadata", found, "a JSON object")
        identity = found.get("neuronpedia_id")
        if identity is not None and not isinstance(identity, str):
            raise self._error("neuronpedia_id", identity, "a text, or null")
        return found

    def architecture(self) -> str:
        """Name of the architecture, a key of :data:`ARCHITECTURES`."""
        function = self._first("activation_fn", "activation_fn_str")
        found = self.values.get("architecture", "standard")
        if function == "topk" and found in ("standard", "topk"):
            return "topk"
        if function not in (None, "relu", "topk") or (function == "topk" and found != "topk"):
            raise self._error("activation_fn", function, "'relu', or 'topk' in a standard SAE")
        if not isinstance(found, str) or found not in ARCHITECTURES:
            raise DictionaryError(
                f"{self.path}: unknown architecture {found!r}: "
                f"{did_you_mean(str(found), ARCHITECTURES)}"
            )
        return found

    def hooks(self, architecture: str) -> tuple[Hook, Hook]:
        """What is read and what is written."""
        if self._first("hook_head_index", "hook_point_head_index") is not None:
            raise self._error(
                "hook_head_index", self._first("hook_head_index", "hook_point_head_index"),
                "null: dictionaries of one head are not supported, only of all heads (hook_z)",
            )  # fmt: skip
        reads = self._hook("hook_name", "hook_point")
        transcoder = architecture.endswith("transcoder")
        sites = READ_SITES if transcoder else WRITE_SITES
        if reads.site not in sites:
            known = ", ".join(Hook(reads.layer, site).name for site in sites)
            raise self._error(
                "hook_name", reads.name, f"for architecture {architecture!r} one of {known}"
            )
        if not transcoder:
            return reads, reads
        writes = Hook(reads.layer, "mlp_out")
        if self._first("hook_name_out") and self._hook("hook_name_out") != writes:
            raise self._error("hook_name_out", self._first("hook_name_out"), repr(writes.name))
        return reads, writes

    def _hook(self, *keys: str) -> Hook:
        name = self._first(*keys)
        if not isinstance(name, str):
            raise self._error(keys[0], name, "a hook as 'blocks.3.hook_mlp_out'")
        layer = self._first("hook_layer", "hook_point_layer")
        try:
            hook = parse_hook(name.replace("{layer}", str(layer)))
        except DictionaryError as error:
            raise DictionaryError(f"{self.path}: {error}") from error
        if layer is not None and layer != hook.layer:
            raise self._error("hook_layer", layer, f"{hook.layer}, as {keys[0]} {name!r} says")
        return hook

    def k(self, n_latents: int) -> int:
        """Latents that pass per token."""
        found = self.values.get("k")
        if found is None:
            arguments = self.values.get("activation_fn_kwargs")
            found = arguments.get("k") if isinstance(arguments, dict) else None
        if type(found) is not int or not 1 <= found <= n_latents:
            raise self._error("k", found, f"a whole number from 1 to d_sae ({n_latents})")
        return found

    def apply_b_dec_to_input(self, architecture: str) -> bool:
        """Whether b_dec is taken off the input."""
        transcoder = architecture.endswith("transcoder")
        found = self.flag("apply_b_dec_to_input", not transcoder)
        if transcoder and found:
            raise self._error("apply_b_dec_to_input", found, "false in a transcoder")
        return found

    def normalization(self) -> str:
        """One of :data:`NORMALIZATIONS`; up to version 2 it was a boolean."""
        found = self.values.get("normalize_activations")
        if found is None or isinstance(found, bool):
            found = "expected_average_only_in" if found else "none"
        if not isinstance(found, str) or found not in NORMALIZATIONS:
            raise self._error("normalize_activations", found, f"one of {', '.join(NORMALIZATIONS)}")
        return found

    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        found = self.values.get("dtype", "float32")
        name = str(found).removeprefix("torch.")
        if name not in _DTYPES:
            raise self._error("dtype", found, f"one of {', '.join(_DTYPES)}")
        return _DTYPES[name]

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        found = self.values.get(key, default)
        if not isinstance(found, bool):
            raise self._error(key, found, "true or false")
        return found

    def size(self, key: str) -> int | None:
        """A size, or None where the file does not say it."""
        found = self.values.get(key)
        if found is not None and (type(found) is not int or found < 1):
            raise self._error(key, found, "a whole number of at least 1")
        return found

    def _first(self, *keys: str) -> Any:
        """First of some keys that is there and not null, under ``metadata`` or at the top."""
        for values in (self.metadata, self.values):
            for key in keys:
                if values.get(key) is not None:
                    return values[key]
        return None

    def _error(self, key: str, got: object, expected: str) -> DictionaryError:
        said = "is missing" if got is None else f"is {got!r}"
        return DictionaryError(f"{self.path}: {key} {said}, expected {expected}")


# --- sae_weights.safetensors --------------------------------------------------------------


def _read_tensors(path: Path, architecture: str, config: _Config) -> dict[str, Tensor]:
    """Read the weights and check every one of them."""
    if not path.exists():
        raise DictionaryError(f"{path.parent} is no dictionary: it has no {path.name}")
    found = read_safetensors(path, DictionaryError)
    check_floating(found, path, DictionaryError)
    _convert_old(path, found)
    wanted = ARCHITECTURES[architecture]
    for name in wanted:
        if name not in found:
            raise DictionaryError(f"{path}: tensor {name!r} is missing; {architecture!r} has it")
    for name in found:
        if name not in wanted:
            raise DictionaryError(
                f"{path}: tensor {name!r} is there, but {architecture!r} has only "
                f"{', '.join(wanted)}"
            )
    for name, shape in _shapes(path, architecture, config, found).items():
        if name in wanted and tuple(found[name].shape) != shape:
            raise DictionaryError(
                f"{path}: tensor {name!r} has shape {list(found[name].shape)}, expected "
                f"{list(shape)}"
            )
    cast = {name: value.to(config.dtype()) for name, value in found.items()}
    for name, value in cast.items():
        if not value.isfinite().all():
            raise DictionaryError(
                f"{path}: tensor {name!r} holds values that are no finite number in "
                f"{config.values.get('dtype', 'float32')}"
            )
    return cast


def _convert_old(path: Path, tensors: dict[str, Tensor]) -> None:
    """Bring what earlier versions stored to today's names."""
    if "log_threshold" in tensors and "threshold" not in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        raise DictionaryError(
            f"{path}: tensor 'scaling_factor' is not all ones; dictionaries with finetuned scaling "
            "factors are not supported: fold it into W_dec"
        )


def _shapes(
    path: Path, architecture: str, config: _Config, tensors: dict[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, from the sizes in the configuration or else from W_enc and W_dec."""
    for name in ("W_enc", "W_dec"):
        if tensors[name].ndim != 2:
            raise DictionaryError(
                f"{path}: tensor {name!r} has {tensors[name].ndim} axes, expected 2"
            )
        if 0 in tensors[name].shape:
            raise DictionaryError(
                f"{path}: tensor {name!r} has shape {list(tensors[name].shape)}, expected at least "
                "one latent of at least one dimension"
            )
    d_in = config.size("d_in") or tensors["W_enc"].shape[0]
    n = config.size("d_sae") or tensors["W_enc"].shape[1]
    d_out = d_in
    if architecture.endswith("transcoder"):
        d_out = config.size("d_out") or tensors["W_dec"].shape[1]
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, n), "W_dec": (n, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)
    }  # fmt: skip
    per_latent = ("b_enc", "b_gate", "b_mag", "r_mag", "threshold")
    return shapes | dict.fromkeys(per_latent, (n,))
