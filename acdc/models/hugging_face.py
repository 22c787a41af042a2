"""Loading models in Hugging Face's layout.

Of a folder transformers is given a configuration whose fields were checked and weights that were
read here; the tokenizer's are the only files that it opens itself.  So nothing is allocated that
the weights do not hold, and nothing else in the folder (adapters, generation settings) has a say.

A model that brings Python code of its own is loaded by transformers alone, and only if the user
allows it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acdc.errors import ModelError, did_you_mean
from acdc.files.pickled import read_pt
from acdc.files.tensors import FLOATING, check_floating, read_safetensors, read_shapes
from acdc.models.configuration import check_configuration, check_relations
from acdc.models.described import sizes_of_config
from acdc.models.devices import Placement
from acdc.models.folder import ModelFolder, check_sizes, foreign_errors, read_object
from acdc.models.lowering.families import check_architecture
from acdc.models.placement import place
from acdc.models.sizes import Sizes
from acdc.models.stored import Stored
from acdc.models.tokenizer import TextTokenizer, read_tokenizer

__all__ = ["load_hugging_face", "read_module"]

_PART = re.compile(r"\w[\w.-]*")
# Attention masks and rotary frequencies that old checkpoints carry beside the weights.
_IGNORED_BUFFERS = re.compile(r"\b(attn|attention)\.(masked_)?bias$|\binv_freq$")


def load_hugging_face(
    folder: ModelFolder,
    placement: Placement,
    keep: torch.dtype,
    use: torch.dtype,
    *,
    trust_remote_code: bool,
    tell: Callable[[Sizes, TextTokenizer | None], None] | None = None,
) -> tuple[Any, TextTokenizer | None]:
    """Return a bridge around a model, and its tokenizer.

    The parts of ``TransformerBridge.boot_transformers``, one by one: it would initialise weights
    that the file lacks at random, and insists on a tokenizer.

    Parameters
    ----------
    folder
        With ``config.json``, ``model.safetensors`` or ``pytorch_model.bin`` (or the parts of them
        that an ``.index.json`` lists), and perhaps a tokenizer.
    placement, keep, use
        Where, in which precision weights are kept, and in which they are computed with.
    trust_remote_code
        Let Python code in the folder run.
    tell
        Told the sizes and the tokenizer before the weights are read, if these are safetensors.

    Raises
    ------
    ModelError
        If a file cannot be used, or the weights are not those that the configuration describes.
    UnsupportedModelError
        If the lowering does not know the architecture.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    values = read_object(folder.path / "config.json")
    if trust_remote_code and values.get("auto_map"):
        module, architecture = _with_own_code(folder, use)
        tokenizer = read_tokenizer(folder, module.config, trust_remote_code=True)
    else:
        found: list[TextTokenizer | None] = []

        def known(config: Any, shapes: Mapping[str, Tensor]) -> None:
            found.append(read_tokenizer(folder, config))
            if tell is not None:
                tell(sizes_of_config(config, shapes, keep, use), found[0])

        module, architecture = read_module(folder, values, keep, use, known)
        tokenizer = found[0] if found else read_tokenizer(folder, module.config)
    device = placement.device
    if placement.held:
        place(module, placement, keep, use, list(module._no_split_modules or ()))
    elif device.type != "cpu":
        module = module.to(device)
    bridge = build_bridge_from_module(
        module,
        architecture,
        hf_config=module.config,
        dtype=use,
        device=device,
        model_name=str(folder.source),
    )
    return bridge, tokenizer


def read_module(
    folder: ModelFolder,
    values: dict[str, Any],
    keep: torch.dtype,
    use: torch.dtype | None = None,
    tell: Callable[[Any, Mapping[str, Tensor]], None] | None = None,
) -> tuple[Any, str]:
    """Return the module of a model that transformers knows, and its architecture.

    Parameters
    ----------
    folder, keep, use
        As of :func:`load_hugging_face`; ``use`` is ``keep`` if None.
    values
        Content of its ``config.json``.
    tell
        Told the configuration and the shapes of the weights before these are read, if they are
        safetensors.
    """
    use = use or keep
    import transformers

    architecture = _architecture(folder, values)
    where = f"{folder}: no usable config.json"
    shapes = None if tell is None else _shapes(folder)
    if tell is not None and shapes is not None:
        tell(_configuration(values, shapes, where), shapes)
    state = _read_weights(folder, keep, use)
    config = _configuration(values, state, where)
    module_class = getattr(transformers, architecture)
    with foreign_errors(where), torch.device("meta"):
        check_sizes(module_class(config), state, where)
    with foreign_errors(f"{folder}: no usable weights"):
        module, report = module_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=use,
            attn_implementation="eager",  # what the bridge runs and the lowering writes out
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
        )
    _check_report(folder, report)
    return module, architecture


def _configuration(values: dict[str, Any], state: Mapping[str, Tensor], where: str) -> Any:
    """Return the configuration that transformers makes of checked values."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    default = CONFIG_MAPPING[values["model_type"]]()
    fields = check_configuration(values, default, state, where)
    with foreign_errors(where):
        config = type(default)(**fields)
    check_relations(config, where)
    if (config.pad_token_id or 0) >= config.vocab_size:  # it has no say, but must be a token
        config.pad_token_id = None
    return config


def _architecture(folder: ModelFolder, values: dict[str, Any]) -> str:
    """Return the architecture of a configuration, which the lowering knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, listed = values.get("model_type"), values.get("architectures")
    where = f"{folder}: no usable config.json"
    if kind is not None and not isinstance(kind, str):
        raise ModelError(f"{where}: model_type is {kind!r}, expected a text")
    if listed is not None and not (
        isinstance(listed, list) and all(isinstance(name, str) for name in listed)
    ):
        raise ModelError(f"{where}: architectures is {listed!r}, expected a list of names")
    if kind is None or kind not in CONFIG_MAPPING_NAMES:
        if values.get("auto_map"):
            raise ModelError(
                f"{folder} wants to run Python code of its own; pass "
                "--trust-remote-code if you trust it"
            )
        raise ModelError(
            f"{where}: model_type is {kind!r}, which transformers does not know: "
            f"{did_you_mean(str(kind), CONFIG_MAPPING_NAMES)}"
        )
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    architecture = (
        known if isinstance(known, str) else (listed or [f"{kind}, no language model"])[0]
    )
    check_architecture(architecture)
    return architecture


def _check_report(folder: ModelFolder, report: dict[str, Any]) -> None:
    """Refuse weights that are not, all of them, those of the module."""
    start = f"{folder}: the weights do not match config.json:"
    for key, got, expected in sorted(report["mismatched_keys"]):
        raise ModelError(f"{start} {key!r} has shape {list(got)}, expected {list(expected)}")
    for key in sorted(report["missing_keys"]):
        raise ModelError(f"{start} {key!r} is missing")
    for key in sorted(report["unexpected_keys"]):
        if not _IGNORED_BUFFERS.search(key):
            raise ModelError(f"{start} {key!r} is there, but no part of the model")


# --- weights ------------------------------------------------------------------------------


def _read_weights(folder: ModelFolder, keep: torch.dtype, use: torch.dtype) -> dict[str, Tensor]:
    """Return the weights by name, without masks and rotary tables of old checkpoints.

    Each is cast as it is read, so that two copies of the model never stand side by side.
    """
    start = f"{folder}: no usable weights"
    state: dict[str, Tensor] = {}
    for path in _weight_files(folder, start):
        for key, value in _read_part(folder, path, start, keep, use).items():
            if key in state:
                raise ModelError(f"{start}: {key!r} stands in two files")
            if not _IGNORED_BUFFERS.search(key):
                state[key] = value
    check_floating(state, start, ModelError)
    return state


def _shapes(folder: ModelFolder) -> dict[str, Tensor] | None:
    """Return the weights without their numbers; None where a file does not tell by itself."""
    start = f"{folder}: no usable weights"
    found: dict[str, Tensor] = {}
    for path in _weight_files(folder, start):
        if path.suffix != ".safetensors":
            return None
        found |= read_shapes(path, ModelError, f"{start}: {path.name}")
    return {key: x for key, x in found.items() if not _IGNORED_BUFFERS.search(key)}


def _weight_files(folder: ModelFolder, start: str) -> list[Path]:
    """Return the file of the weights, or the parts that an index lists."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        whole = folder.file(name)
        if whole is not None:
            return [whole]
        index = folder.file(f"{name}.index.json")
        if index is None:
            continue
        parts = read_object(index).get("weight_map")
        if not isinstance(parts, dict) or not parts:
            raise ModelError(f"{start}: {index.name} has no 'weight_map'")
        listed = sorted({str(part) for part in parts.values()})
        return [_part(folder, part, f"{start}: {index.name}") for part in listed]
    raise ModelError(
        f"{start}: neither model.safetensors nor pytorch_model.bin, nor an index of their parts"
    )


def _part(folder: ModelFolder, name: str, start: str) -> Path:
    if not _PART.fullmatch(name):
        raise ModelError(f"{start} lists {name!r}, expected names of files beside it")
    path = folder.file(name)
    if path is None:
        raise ModelError(f"{start} lists {name!r}, which is not there")
    return path


def _read_part(
    folder: ModelFolder, path: Path, start: str, keep: torch.dtype, use: torch.dtype
) -> dict[str, Tensor]:
    def cast(value: Tensor) -> Tensor:
        if value.dtype not in FLOATING:
            return value  # which is refused by name
        rounded = value.to(keep)
        if keep == use or value.ndim < 2:
            return rounded.to(use)
        return Stored(rounded, use, torch.device("cpu"))

    if path.suffix == ".safetensors":
        return read_safetensors(path, ModelError, f"{start}: {path.name}", cast)
    found = read_pt(path, ModelError, f"{folder}: its .bin file")
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise ModelError(f"{start}: {path.name} holds something else than tensors by name")
    for key in list(found):
        found[key] = cast(found[key])
    return found


# --- models with code of their own ---------------------------------------------------------


def _with_own_code(folder: ModelFolder, dtype: torch.dtype) -> tuple[Any, str]:
    """Return the module that Python code of the model makes, and its architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    options = {"trust_remote_code": True, **folder.pinned}
    with foreign_errors(f"{folder}: no usable config.json"):
        config = AutoConfig.from_pretrained(folder.source, **options)
    listed = getattr(config, "architectures", None) or [type(config).__name__]
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    architecture = known if isinstance(known, str) else listed[0]
    check_architecture(architecture)
    with foreign_errors(f"{folder}: no usable weights"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder.source,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    module, report = loaded
    _check_report(folder, report)
    return module, architecture
