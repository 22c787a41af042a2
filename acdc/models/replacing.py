"""Writing a model anew without some of its heads and MLPs: constants in their place.

What a head writes is ``z @ W_O[head]``: its rows of W_O become zero, and its constant is added to
b_O.  The output matrix of an MLP becomes zero, and its constant b_out.  That is exact where there
is a place for the constant:

=====================================  ==========================================================
layout                                 place
=====================================  ==========================================================
TransformerLens' own (native)          b_O; b_out of MLPs without a gate
Hugging Face, biases in the model      these (GPT-2, GPT-NeoX, GPT-J's and OPT's MLPs, ...)
Hugging Face, biases if asked for      ``attention_bias``, ``mlp_bias`` of its configuration (Llama)
others                                 none: only zeros can be written, and constants are refused
=====================================  ==========================================================

An MLP behind a norm of its own (Gemma-2) writes what that norm makes of it: again zeros alone.
Edges have no weights: those between the nodes that stay all stay.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from acdc.errors import ModelError
from acdc.models import folder_of, is_hugging_face, quiet
from acdc.models.folder import ModelFolder, read_object
from acdc.models.hugging_face import read_module
from acdc.models.lowering import LoweredModel, lower
from acdc.models.lowering.weights import read_weights
from acdc.models.tokenizer import FILES

__all__ = ["Replaced", "write_replaced"]

State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Replaced:
    """Heads and MLPs that go, and what stands in their place.

    Parameters
    ----------
    heads
        By layer: which of its heads.
    mlps
        Layers.
    attention, mlp
        By layer: ``[d_model]``, what its heads that go write together, and what its MLP does; none
        where that is zero.
    """

    heads: Mapping[int, tuple[int, ...]]
    mlps: tuple[int, ...]
    attention: Mapping[int, Tensor] = field(default_factory=dict)
    mlp: Mapping[int, Tensor] = field(default_factory=dict)


def write_replaced(name: str, replaced: Replaced, folder: Path) -> int:
    """Write a model in its own layout, in float32, with its tokenizer.

    Parameters
    ----------
    name
        As of :func:`acdc.models.load_model`: a known name, a folder or one on the hub.
    replaced
        What goes.
    folder
        That exists and is empty.

    Returns
    -------
    int
        How many parameters the model has.

    Raises
    ------
    ModelError
        If there is no place for a constant, or the model's files are no plain ones.
    """
    source = folder_of(name)
    write = _write_hugging_face if is_hugging_face(source) else _write_native
    with quiet(), torch.random.fork_rng(devices=[]):
        n_parameters = write(source, replaced, folder)
    for file in FILES:
        found = source.file(file)
        if found is not None:
            shutil.copyfile(found, folder / file)
    return n_parameters


def _refuse(source: ModelFolder, what: str) -> ModelError:
    return ModelError(
        f"{source}: {what}, so a mean cannot be written in the place of a node; write zeros with "
        "--intervention zero"
    )


# --- native -------------------------------------------------------------------------------


def _write_native(source: ModelFolder, replaced: Replaced, folder: Path) -> int:
    """Edit tensors by their names in HookedTransformer layout."""
    _, state = read_weights(source.path)
    state = {key: x.float().clone() if x.is_floating_point() else x for key, x in state.items()}
    for layer, heads in replaced.heads.items():
        state[f"blocks.{layer}.attn.W_O"][list(heads)] = 0
    for layer, constant in replaced.attention.items():
        state[f"blocks.{layer}.attn.b_O"] += constant
    for layer in replaced.mlps:
        state[f"blocks.{layer}.mlp.W_out"][:] = 0
        bias = state.get(f"blocks.{layer}.mlp.b_out")
        written = replaced.mlp.get(layer)
        if bias is not None:
            bias[:] = 0 if written is None else written
        elif written is not None:
            raise _refuse(source, "its gated MLPs have no output bias")
    save_file({key: x.contiguous() for key, x in state.items()}, folder / "model.safetensors")
    shutil.copyfile(source.path / "config.json", folder / "config.json")
    return sum(x.numel() for x in state.values() if x.is_floating_point())


# --- Hugging Face -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outputs:
    """Names of the modules that write, by layer, and whether their weight is ``[in, out]``."""

    attention: tuple[str, ...]
    mlp: tuple[str | None, ...]
    has_post: tuple[bool, ...]
    transposed: bool


def _write_hugging_face(source: ModelFolder, replaced: Replaced, folder: Path) -> int:
    """Edit the module's own tensors, with biases that the configuration adds if need be."""
    values = read_object(source.path / "config.json")
    if values.get("auto_map"):
        raise ModelError(f"{source} brings Python code of its own: it cannot be written anew")
    module, architecture = read_module(source, values, torch.float32)
    config, kind = copy.deepcopy(module.config), type(module)
    state = {key: x.clone() for key, x in module.state_dict().items()}
    outputs, model = _outputs(source, module, architecture)
    config, state = _with_biases(source, kind, config, state, replaced, outputs)
    width = model.layers[0].attention.W_O.shape[1]
    for layer, heads in replaced.heads.items():
        weight = state[f"{outputs.attention[layer]}.weight"]
        rows = weight if outputs.transposed else weight.T  # [head * d_head, d_model]
        for head in heads:
            rows[head * width : (head + 1) * width] = 0
    for layer, constant in replaced.attention.items():
        state[f"{outputs.attention[layer]}.bias"] += constant
    for layer in replaced.mlps:
        name = outputs.mlp[layer]
        state[f"{name}.weight"][:] = 0
        if f"{name}.bias" in state:
            state[f"{name}.bias"][:] = replaced.mlp.get(layer, torch.zeros(()))
    anew = kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    anew.save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    return sum(parameter.numel() for parameter in anew.parameters())


def _outputs(source: ModelFolder, module: Any, architecture: str) -> tuple[_Outputs, LoweredModel]:
    """Find the modules that write by what the bridge wraps."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    names = {id(part): name for name, part in module.named_modules()}
    bridge = build_bridge_from_module(
        module, architecture, hf_config=module.config, dtype=torch.float32,
        device=torch.device("cpu"), model_name=str(source.source),
    )  # fmt: skip
    model = lower(bridge, name=str(source.source))

    def name_of(part: Any) -> str:
        inside = getattr(part, "original_component", part)
        if id(inside) not in names:
            raise ModelError(
                f"{source}: a part of {architecture} has no one matrix that writes, as a mixture "
                "of experts: it cannot be written without some of its nodes"
            )
        return names[id(inside)]

    attention = tuple(name_of(block.attn.o) for block in bridge.blocks)
    mlps = [layer.mlp for layer in model.layers]
    mlp = tuple(None if one is None else name_of(one.writer) for one in mlps)
    posts = tuple(one is not None and one.post is not None for one in mlps)
    inside = getattr(bridge.blocks[0].attn.o, "original_component", bridge.blocks[0].attn.o)
    return _Outputs(attention, mlp, posts, type(inside).__name__ == "Conv1D"), model


def _with_biases(
    source: ModelFolder,
    kind: Any,
    config: Any,
    state: State,
    replaced: Replaced,
    outputs: _Outputs,
) -> tuple[Any, State]:
    """Configuration and tensors with a place for every constant."""
    if any(outputs.has_post[layer] for layer in replaced.mlp):
        raise _refuse(source, "its MLPs are read through a norm of their own")
    wanted = {
        "attention_bias": [f"{outputs.attention[layer]}.bias" for layer in replaced.attention],
        "mlp_bias": [f"{outputs.mlp[layer]}.bias" for layer in replaced.mlp],
    }
    for flag, keys in wanted.items():
        if set(keys) - set(state) and hasattr(config, flag):
            setattr(config, flag, True)
    with torch.device("meta"):
        described = kind(config).state_dict()
    lacking = [key for keys in wanted.values() for key in keys if key not in described]
    if lacking:
        raise _refuse(source, f"{kind.__name__} has no {lacking[0]!r}")
    added = {
        key: torch.zeros(x.shape) for key, x in described.items()
        if key not in state and key.endswith(".bias")
    }  # fmt: skip
    return config, state | added
