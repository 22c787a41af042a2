"""Loading a model by name: bundled, a local folder, or the Hugging Face hub.

Every model is loaded by TransformerLens' TransformerBridge and lowered at once (see
:mod:`acdc.models.lowering`).  Nothing that a model file says is executed unless the user allows it.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from acdc.errors import DeviceError, ModelError, UnknownNameError
from acdc.files.folders import local_folder
from acdc.models.devices import (
    Placement,
    arithmetic_of,
    resolve_device,
    resolve_dtype,
    resolve_placement,
)
from acdc.models.folder import ModelFolder, read_object
from acdc.models.steps import split_step, step_folder
from acdc.registry import Registry
from acdc.tasks.base import Tokenizer

if TYPE_CHECKING:
    from acdc.models.lowering import LoweredModel
    from acdc.models.sizes import Sizes

__all__ = [
    "BUNDLED",
    "MODELS",
    "Before",
    "Loaded",
    "folder_of",
    "is_hugging_face",
    "load_model",
    "quiet",
    "resolve_device",
    "resolve_dtype",
    "where_from",
]

Loaded = tuple["LoweredModel", Tokenizer | None]
"""A lowered model and its tokenizer."""

Before = Callable[["Sizes", Tokenizer | None], None]
"""What is told of a model before its weights are read."""

BUNDLED: dict[str, Path] = {
    path.parent.name: path.parent
    for path in sorted((Path(__file__).parents[1] / "bundled").glob("*/config.json"))
}
"""Folder of each model that comes with the package, by name."""

_ELSEWHERE = "a folder, or a name on the Hugging Face hub as EleutherAI/pythia-70m"
MODELS: Registry[Path] = Registry("model", Path, "acdc.models", known=BUNDLED)
"""Folder of every model known by name: the bundled ones, then those of installed packages."""

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_HUB_SHORT = frozenset({"distilgpt2", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"})


def load_model(
    model: Any,
    *,
    device: str = "cpu",
    offload: str = "none",
    dtype: str = "float32",
    split_qkv: bool = True,
    split_embed: bool = False,
    trust_remote_code: bool = False,
    before: Before | None = None,
) -> Loaded:
    """Load a model and lower it.

    Parameters
    ----------
    model
        A known name (see :data:`MODELS`); a local Hugging Face folder; a local folder with
        ``config.json`` (TransformerBridgeConfig fields) and ``model.safetensors`` or
        ``model.pt`` in HookedTransformer layout; or a Hugging Face name (``owner/name``), that
        of a repository in TransformerLens' own old layout (``NeelNanda/...``) included.  Each
        with ``@STEP`` after it is a checkpoint of its training, see :mod:`acdc.models.steps`.
        Or a model that is loaded: a TransformerBridge, whose parameters are frozen; a
        :class:`acdc.models.lowering.LoweredModel`; or either with its tokenizer, as this
        function returns them.
    device
        ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; several GPUs that share its layers
        (``cuda:0,cuda:1``); or ``auto``, as many GPUs as it takes, and the memory of the host for
        what is left (:mod:`acdc.models.placement`).  A model that is loaded stays where it is.
    offload
        ``cpu``: weights stay in the memory of the host, and each is brought to the device when it
        is used; ``none``.
    dtype
        ``float32``, ``float64``, ``bfloat16`` or ``float16``; likewise.  On a CPU that computes in
        one of the last two slowly, weights are of that type and are cast layer by layer as they
        are used: arithmetic is in float32 (:mod:`acdc.models.stored`).
    split_qkv, split_embed
        Granularity of the graph, see :class:`graphs.GraphShape`.
    trust_remote_code
        Let the model's folder run Python code of its own.
    before
        Told the model's sizes and its tokenizer before any weights are read, where its files say
        so much.

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
    from acdc.models.lowering import lower
    from acdc.models.placement import settle
    from acdc.models.stored import keep_stored

    if not isinstance(model, str | Path):
        return _loaded(model, split_qkv=split_qkv, split_embed=split_embed)
    name_or_path = str(model)
    placement, number = resolve_placement(device, offload), resolve_dtype(dtype)
    place = placement.device
    if place.type == "mps" and number is torch.float64:
        raise DeviceError("device 'mps' has no float64: choose float32 or another device")
    path = _find(name_or_path)
    with quiet(), torch.random.fork_rng(devices=[]):
        use = arithmetic_of(place, number)

        def tell(sizes: Sizes, tokenizer: Tokenizer | None) -> None:
            shape = replace(sizes.shape, split_qkv=split_qkv, split_embed=split_embed)
            if before is not None:
                before(replace(sizes, shape=shape), tokenizer)

        bridge, tokenizer = _load(
            path, name_or_path, placement, number, use, trust_remote_code, tell
        )
        if placement.held:
            settle(bridge, placement, number, use)
        if use != number or placement.held:
            keep_stored(bridge, number, use, place)
        name = name_or_path if path is None else _short_name(name_or_path, path)
        lowered = lower(bridge, split_qkv=split_qkv, split_embed=split_embed, name=name)
    return lowered, tokenizer


def _loaded(given: Any, *, split_qkv: bool, split_embed: bool) -> Loaded:
    """Return a model that is loaded already, at the granularity that is asked for."""
    from transformer_lens.model_bridge import TransformerBridge

    from acdc.models.lowering import LoweredModel, lower

    model, tokenizer = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if isinstance(model, TransformerBridge):
        name = str(model.cfg.model_name or "model")
        tokenizer = model.tokenizer if tokenizer is None else tokenizer
        with quiet(), torch.random.fork_rng(devices=[]):
            model = lower(model, split_qkv=split_qkv, split_embed=split_embed, name=name)
    if not isinstance(model, LoweredModel):
        raise ModelError(
            f"model is given as {type(given).__name__}: expected a name, a folder, a "
            "TransformerBridge or a LoweredModel, or one of these two with its tokenizer"
        )
    shape = replace(model.shape, split_qkv=split_qkv, split_embed=split_embed)
    return replace(model, shape=shape), tokenizer


def _load(
    path: Path | None,
    name: str,
    placement: Placement,
    keep: torch.dtype,
    use: torch.dtype,
    trust_remote_code: bool,
    tell: Before,
) -> tuple[Any, Tokenizer | None]:
    """Return bridge and tokenizer of a local folder, or of a name on the hub.

    ``use`` is the type of the bridge; weights that may be kept in ``keep`` are, if they are read
    one by one.
    """
    from acdc.models.hugging_face import load_hugging_face
    from acdc.models.legacy import OWNERS, load_legacy
    from acdc.models.native import load_native
    from acdc.models.placement import place

    if path is None and name.startswith(OWNERS):
        loaded = load_legacy(name, placement.loading, use)
    else:
        folder = ModelFolder.on_hub(name) if path is None else ModelFolder(path)
        if path is None or is_hugging_face(folder):
            return load_hugging_face(
                folder, placement, keep, use, trust_remote_code=trust_remote_code, tell=tell
            )
        loaded = load_native(folder, placement.loading, use, tell)
    if placement.held:
        bridge, _ = loaded
        place(bridge.original_model, placement, keep, use, [type(bridge.blocks[0]).__name__])
        bridge.cfg.device = str(placement.device)
    return loaded


def _find(name: str) -> Path | None:
    """Return the local folder that a name means; None if it is a name on the hub."""
    folder = _local(name)
    if folder is not None:
        return folder
    base, step = split_step(name)
    if step is not None and (home := _local(base)) is not None:
        return step_folder(home, step, name)
    if base in _HUB_SHORT or _HUB_NAME.fullmatch(base):
        return None
    if "/" in base or "\\" in base:
        raise ModelError(f"model {name!r}: there is no such folder")
    raise UnknownNameError("model", base, MODELS, _ELSEWHERE)


def _local(name: str) -> Path | None:
    """Return the folder of a known model, or of a path; None if there is none."""
    if name in MODELS:
        return MODELS[name]
    folder = local_folder(name, "model", "config.json", ModelError)
    return None if folder is None else folder.resolve()


def _short_name(name: str, path: Path) -> str:
    """Name of a model that was loaded from a folder; a checkpoint's has its step."""
    base, step = split_step(name)
    if step is None or _local(name) is not None:
        return path.name
    return f"{base if base in MODELS else Path(base).name}@{step}"


def where_from(name: str) -> str:
    """Return where :func:`load_model` loads a name from: ``known``, ``folder`` or ``hub``.

    A checkpoint is from where its model is.  Raises as it does if the name means nothing.
    """
    if name in MODELS or (_local(name) is None and split_step(name)[0] in MODELS):
        return "known"
    return "hub" if _find(name) is None else "folder"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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


def folder_of(name: str) -> ModelFolder:
    """Return where :func:`load_model` finds the files of a name.

    Raises
    ------
    ModelError
        If they are in TransformerLens' old layout, which only its own loader knows.
    """
    from acdc.models.legacy import OWNERS

    path = _find(name)
    if path is None and name.startswith(OWNERS):
        raise ModelError(
            f"model {name!r} is in TransformerLens' old layout: it cannot be written anew"
        )
    return ModelFolder.on_hub(name) if path is None else ModelFolder(path)


def is_hugging_face(folder: ModelFolder) -> bool:
    """Whether a folder is in Hugging Face's layout, not in TransformerLens' own."""
    path = folder.path / "config.json"
    if not path.exists():
        raise ModelError(f"{folder.path} is no model folder: it has no {path.name}")
    config = read_object(path)
    if "model_type" in config or "architectures" in config:
        return True
    if "d_model" in config and "n_layers" in config:
        return False
    raise ModelError(
        f"{path} describes no model: expected Hugging Face's model_type, or the fields of "
        "TransformerBridgeConfig (n_layers, d_model, d_head, n_heads, n_ctx, d_vocab, ...)"
    )
