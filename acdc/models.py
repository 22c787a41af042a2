"""Loading a model by name: bundled, a local folder, or the Hugging Face hub.

Every model is loaded by TransformerLens' TransformerBridge and lowered at once (see
:mod:`acdc.lowering`).  Nothing that a model file says is executed unless the user allows it.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from acdc.errors import DeviceError, ModelError, UnknownNameError, UnsupportedModelError
from acdc.registry import Registry
from acdc.tasks.base import Tokenizer

if TYPE_CHECKING:
    from acdc.lowering import LoweredModel

__all__ = ["BUNDLED", "MODELS", "load_model", "resolve_device", "resolve_dtype"]

BUNDLED: dict[str, Path] = {
    path.parent.name: path.parent
    for path in sorted((Path(__file__).parent / "bundled").glob("*/config.json"))
}
"""Folder of each model that comes with the package, by name."""

MODELS: Registry[Path] = Registry("model", Path, "acdc.models", known=BUNDLED)
"""Folder of every model known by name: the bundled ones, then those of installed packages."""

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_LEGACY_OWNERS = ("NeelNanda/", "ArthurConmy/", "Baidicoot/")  # as TransformerLens' loader has it
_HUB_SHORT = frozenset({"distilgpt2", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"})
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_NATIVE_SIZES = ("n_layers", "d_model", "d_head", "n_heads", "n_ctx", "d_vocab")
_NATIVE_NORMS = ("LN", "LNPre", "RMS", "RMSPre", None)
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
# Attention masks and rotary frequencies that old checkpoints carry beside the weights.
_IGNORED_BUFFERS = re.compile(r"\b(attn|attention)\.(masked_)?bias$|\binv_freq$")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
)  # fmt: skip


def load_model(
    name_or_path: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    split_qkv: bool = True,
    split_embed: bool = False,
    trust_remote_code: bool = False,
) -> tuple[LoweredModel, Tokenizer | None]:
    """Load a model and lower it.

    Parameters
    ----------
    name_or_path
        A known name (see :data:`MODELS`); a local Hugging Face folder; a local folder with
        ``config.json`` (TransformerBridgeConfig fields) and ``model.safetensors`` or
        ``model.pt`` in HookedTransformer layout; or a Hugging Face name (``owner/name``), that
        of a repository in TransformerLens' own old layout (``NeelNanda/...``) included.
    device
        ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
    dtype
        ``float32``, ``float64``, ``bfloat16`` or ``float16``.
    split_qkv, split_embed
        Granularity of the graph, see :class:`graphs.GraphShape`.
    trust_remote_code
        Let the model's folder run Python code of its own.

    Returns
    -------
    tuple
        The lowered model, and its tokenizer or None where it has none.

    Raises
    ------
    UnknownNameError
        If the name is no known model, no folder and no Hugging Face name.
    ModelError
        If the model's files cannot be used; the message names the file.
    UnsupportedModelError
        If the model has a feature that the lowering does not know.
    DeviceError
        If this machine lacks the device, or the type is unknown.
    """
    from acdc.lowering import lower

    place, number = resolve_device(device), resolve_dtype(dtype)
    if place.type == "mps" and number is torch.float64:
        raise DeviceError("device 'mps' has no float64: choose float32 or another device")
    folder = _find(name_or_path)
    with _quiet(), torch.random.fork_rng(devices=[]):
        if folder is not None and not _is_hugging_face(folder):
            bridge, tokenizer = _native(folder, place, number)
        elif folder is None and name_or_path.startswith(_LEGACY_OWNERS):
            bridge, tokenizer = _legacy(name_or_path, place, number)
        else:
            source = name_or_path if folder is None else folder
            bridge, tokenizer = _hugging_face(source, place, number, trust_remote_code)
        name = folder.name if folder is not None else name_or_path
        model = lower(bridge, split_qkv=split_qkv, split_embed=split_embed, name=name)
    return model, tokenizer


def resolve_device(device: str) -> torch.device:
    """Return the torch device of a name; DeviceError if this machine does not have it."""
    there = _available()
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(
            f"unknown device {device!r}: expected cpu, cuda, cuda:N or mps; "
            f"this machine has {', '.join(there)}"
        )
    wanted = "cuda:0" if device == "cuda" else device
    if wanted not in there:
        raise DeviceError(f"device {device!r} is not there: this machine has {', '.join(there)}")
    return found


def _available() -> list[str]:
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return names + (["mps"] if torch.backends.mps.is_available() else [])


def resolve_dtype(dtype: str) -> torch.dtype:
    """Return the torch type of a name; DeviceError if it is none that models run in."""
    if dtype not in _DTYPES:
        raise DeviceError(f"unknown dtype {dtype!r}: expected one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _find(name: str) -> Path | None:
    """Return the local folder that a name means; None if it is a name on the hub."""
    if name in MODELS:
        return MODELS[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ModelError(f"model {name!r} is a file: give the folder with its config.json")
    if name in _HUB_SHORT or _HUB_NAME.fullmatch(name):
        return None
    if "/" in name or "\\" in name:
        raise ModelError(f"model {name!r}: there is no such folder")
    raise UnknownNameError("model", name, MODELS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the progress bars and warnings of the libraries that load models."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as hf_logging

    hub, hf, bars = (
        hub_logging.get_verbosity(),
        hf_logging.get_verbosity(),
        hf_logging.is_progress_bar_enabled(),
    )
    hub_logging.set_verbosity_error()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hub_logging.set_verbosity(hub)
        hf_logging.set_verbosity(hf)
        if bars:
            hf_logging.enable_progress_bar()


# --- config.json --------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} is no model folder: it has no {path.name}") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON
        raise ModelError(f"{path} is no readable JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}: expected a JSON object")
    return value


def _is_hugging_face(folder: Path) -> bool:
    path = folder / "config.json"
    config = _read_json(path)
    if "model_type" in config or "architectures" in config:
        return True
    if "d_model" in config and "n_layers" in config:
        return False
    raise ModelError(
        f"{path} describes no model: expected Hugging Face's model_type, or the fields of "
        f"TransformerBridgeConfig ({', '.join(_NATIVE_SIZES)}, ...)"
    )


# --- native TransformerLens models --------------------------------------------------------


def _native(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Tokenizer | None]:
    """Load a folder in HookedTransformer layout."""
    from acdc.lowering.weights import load_weights, read_weights

    config = _native_config(folder / "config.json")
    path, state = read_weights(folder)
    bridge = _boot_native(config, folder / "config.json", device, dtype)
    load_weights(bridge, state, path)
    return bridge, _native_tokenizer(folder)


def _native_config(path: Path) -> dict[str, Any]:
    """Read and check the fields of a TransformerBridgeConfig."""
    config = _read_json(path)
    for key in _NATIVE_SIZES:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{path}: {key} is {value!r}, expected a whole number of at least 1")
    for key, works in _NATIVE_ONLY.items():
        if config.get(key, works) != works:
            raise UnsupportedModelError(
                f"{path}: {key}={config[key]!r} is not supported in native models, "
                f"only {key}={works!r}"
            )
    norm = config.get("normalization_type", "LN")
    if norm not in _NATIVE_NORMS:
        known = ", ".join(map(repr, _NATIVE_NORMS))
        raise UnsupportedModelError(
            f"{path}: normalization_type={norm!r} is not supported, expected one of {known}"
        )
    return {key: value for key, value in config.items() if key not in ("dtype", "device", "seed")}


def _boot_native(
    config: dict[str, Any], path: Path, device: torch.device, dtype: torch.dtype
) -> Any:
    import transformer_lens.model_bridge.sources.native  # noqa: F401  (adds boot_native)
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    boot_native: Any = TransformerBridge.boot_native  # type: ignore[attr-defined]
    try:
        cfg = TransformerBridgeConfig(**config | {"init_weights": False})
        return boot_native(cfg, device=device, dtype=dtype)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(f"{path} describes no native TransformerLens model: {error}") from error


def _native_tokenizer(folder: Path) -> Tokenizer | None:
    """Read ``tokenizer.json`` without asking config.json for the kind of model."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    _check_tokenizer(path)
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return tokenizer


def _check_tokenizer(path: Path) -> None:
    if not isinstance(_read_json(path).get("model"), dict):
        raise ModelError(f"{path} is no tokenizer: it has no 'model'")


def _legacy(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Tokenizer | None]:
    """Load a repository of the hub that holds a HookedTransformer state dict (``*.pth``)."""
    from transformer_lens.model_bridge.sources import tl_legacy

    with _hf_errors(name, "TransformerLens checkpoint"):
        bridge = tl_legacy.boot(name, device=device, dtype=dtype)
    tokenizer: Any = bridge.tokenizer
    return bridge, tokenizer


# --- Hugging Face models ------------------------------------------------------------------


def _hugging_face(
    source: str | Path, device: torch.device, dtype: torch.dtype, trust: bool
) -> tuple[Any, Tokenizer | None]:
    """Load a local Hugging Face folder, or a name from the hub.

    The parts of ``TransformerBridge.boot_transformers``, one by one: it would initialise
    weights that the file lacks at random, and insists on a tokenizer.
    """
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    options = {"trust_remote_code": trust, "local_files_only": isinstance(source, Path)}
    config, architecture = _hf_config(source, options)
    module = _hf_module(source, config, dtype, options).to(device)
    tokenizer = _hf_tokenizer(source, options)
    bridge = build_bridge_from_module(
        module,
        architecture,
        hf_config=module.config,
        dtype=dtype,
        device=device,
        model_name=str(source),
    )
    return bridge, tokenizer


@contextlib.contextmanager
def _hf_errors(source: str | Path, what: str) -> Iterator[None]:
    """Turn what transformers raises on unusable files into one line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"model '{source}' wants to run Python code of its own; pass --trust-remote-code "
                "if you trust it"
            ) from error
        raise ModelError(_hf_message(source, what, error)) from error
    except (SafetensorError, StrictDataclassError) as error:
        raise ModelError(_hf_message(source, what, error)) from error
    except (pickle.UnpicklingError, EOFError, struct.error) as error:
        raise ModelError(
            f"model '{source}': its .bin file cannot be read as plain tensors "
            "(weights_only=True): it is damaged or holds other objects; use safetensors"
        ) from error


def _hf_message(source: str | Path, what: str, error: BaseException) -> str:
    text = " ".join(str(error).split())
    if any(words in text for words in ("couldn't connect", "offline mode", "local cache")):
        return (
            f"model '{source}': no such folder, and the Hugging Face hub is out of reach (or "
            "HF_HUB_OFFLINE is set) and its cache lacks the model; give a local folder or a "
            f"bundled model ({', '.join(BUNDLED) or 'none here'})"
        )
    return f"model '{source}': no usable {what}: {text if len(text) <= 300 else text[:297] + '...'}"


def _hf_config(source: str | Path, options: dict[str, Any]) -> tuple[Any, str]:
    """Return the model's configuration and its architecture, which the lowering knows."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from acdc.lowering.families import check_architecture

    with _hf_errors(source, "config.json"):
        config = AutoConfig.from_pretrained(source, **options)
    listed = getattr(config, "architectures", None) or [type(config).__name__]
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    architecture = known if isinstance(known, str) else listed[0]
    check_architecture(architecture)
    return config, architecture


def _hf_module(source: str | Path, config: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """Load the weights, all of them: none is left at its random initial value."""
    from transformers import AutoModelForCausalLM

    with _hf_errors(source, "weights"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation="eager",  # what the bridge runs and the lowering writes out
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            **options,
        )
    module, report = loaded
    _check_report(source, report)
    return module


def _check_report(source: str | Path, report: dict[str, Any]) -> None:
    start = f"model '{source}': the weights do not match config.json:"
    for key, got, expected in sorted(report["mismatched_keys"]):
        raise ModelError(f"{start} {key!r} has shape {list(got)}, expected {list(expected)}")
    for key in sorted(report["missing_keys"]):
        raise ModelError(f"{start} {key!r} is missing")
    for key in sorted(report["unexpected_keys"]):
        if not _IGNORED_BUFFERS.search(key):
            raise ModelError(f"{start} {key!r} is there, but no part of the model")


def _hf_tokenizer(source: str | Path, options: dict[str, Any]) -> Tokenizer | None:
    from transformers import AutoTokenizer

    if isinstance(source, Path):
        if not any((source / name).is_file() for name in _TOKENIZER_FILES):
            return None
        if (source / "tokenizer.json").is_file():
            _check_tokenizer(source / "tokenizer.json")
    with _hf_errors(source, "tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(source, **options)
    return tokenizer
