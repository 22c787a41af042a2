"""Loading repositories of the hub in TransformerLens' own old layout (``NeelNanda/...``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acdc.errors import ModelError
from acdc.files.fields import Field, check_fields, flag, text, whole
from acdc.files.pickled import read_pt
from acdc.files.tensors import check_floating
from acdc.models.folder import ModelFolder, foreign_errors, read_object
from acdc.models.steps import split_step
from acdc.models.tokenizer import TextTokenizer

__all__ = ["OWNERS", "load_legacy"]

OWNERS = ("NeelNanda/", "ArthurConmy/", "Baidicoot/")
"""Whose repositories they are, as TransformerLens' loader has it."""

_FIELDS: dict[str, Field] = {
    **dict.fromkeys(("d_model", "n_layers", "d_head", "n_heads", "n_ctx", "d_vocab"), whole(1)),
    "d_mlp": whole(1).or_none(),
    "act_fn": text().or_none(),
    **dict.fromkeys(("attn_only", "final_rms", "shortformer_pos"), flag()),
    "tokenizer_name": text().or_none(),
}


def load_legacy(
    name: str, device: torch.device, dtype: torch.dtype
) -> tuple[Any, TextTokenizer | None]:
    """Return a bridge around a model of the hub, and its tokenizer.

    TransformerLens loads it, once its files were looked at here.

    Raises
    ------
    ModelError
        If the hub is out of reach, or a file cannot be used.
    """
    from transformer_lens.model_bridge.sources import tl_legacy

    base, step = split_step(name)
    if step is not None:
        raise ModelError(
            f"model {name!r}: repositories of TransformerLens' old layout keep no checkpoints as "
            f"revisions: give {base!r}, or a folder"
        )
    folder = ModelFolder.on_hub(name)
    start = f"{folder}: no usable TransformerLens checkpoint"
    values = read_object(folder.path / "config.json")
    check_fields(values, _FIELDS, start, ModelError)
    with foreign_errors(start):
        path = _weights(name)
    _check(values, read_pt(path, ModelError), start)
    with foreign_errors(start):
        bridge = tl_legacy.boot(name, device=device, dtype=dtype)
    tokenizer: Any = bridge.tokenizer
    return bridge, None if tokenizer is None else TextTokenizer(tokenizer, folder)


def _weights(name: str) -> Path:
    """Return the file that TransformerLens' loader takes."""
    from huggingface_hub import HfApi, hf_hub_download

    files = HfApi().list_repo_files(name)
    finals = [file for file in files if file.endswith("final.pth")]
    if not finals:
        raise FileNotFoundError(f"no '*final.pth' file in {name}; files: {files[:8]}")
    return Path(hf_hub_download(name, finals[0]))


def _check(values: dict[str, Any], state: Any, start: str) -> None:
    """Refuse weights that are none, and sizes that they cannot have."""
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ModelError(f"{start}: the .pth file holds something else than tensors by name")
    check_floating(state, start, ModelError)
    n_values = sum(value.numel() for value in state.values())
    for name, field in _FIELDS.items():
        bound = len(state) if name == "n_layers" else n_values
        if field.expected.startswith("a whole") and (values.get(name) or 0) > bound:
            raise ModelError(f"{start}: {name} is {values[name]:,}, more than the weights can have")
