"""What dictionaries read and write in a model's ordinary forward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from acdc.dictionaries.hooks import Hook
from acdc.dictionaries.sae import Dictionary
from acdc.errors import DictionaryError
from acdc.models.lowering.model import LoweredModel, Trace

__all__ = ["activation", "check_fits", "group_by_length", "replacement", "width"]


def check_fits(dictionary: Dictionary, model: LoweredModel) -> None:
    """Check that the model has the dictionary's hooks and that their widths agree.

    Raises
    ------
    DictionaryError
        If a layer is out of range, the model lacks the activation, or d_in or d_out differ.
    """
    n_layers = model.shape.n_layers
    for hook in (dictionary.reads, dictionary.writes):
        if hook.layer >= n_layers:
            raise _misfit(
                dictionary, hook, f"{model.name!r} has {n_layers} layers (0 to {n_layers - 1})"
            )
        if hook.site in _MLP_SITES and not model.shape.has_mlp:
            raise _misfit(dictionary, hook, f"{model.name!r} has attention only, no MLPs")
        if hook.site == "resid_mid" and model.shape.parallel:
            raise _misfit(dictionary, hook, f"in {model.name!r} attention and MLP run side by side")
    for name, got, hook in (
        ("d_in", dictionary.d_in, dictionary.reads),
        ("d_out", dictionary.d_out, dictionary.writes),
    ):
        wanted = width(model, hook)
        if got != wanted:
            raise DictionaryError(
                f"dictionary {dictionary.source!r}: {name} is {got}, but {hook.name!r} of "
                f"{model.name!r} is {wanted} wide; give a dictionary of this model"
            )


_MLP_SITES = ("resid_mid", "mlp_in", "ln2_normalized", "ln2_out", "mlp_out")


def _misfit(dictionary: Dictionary, hook: Hook, why: str) -> DictionaryError:
    return DictionaryError(
        f"dictionary {dictionary.source!r} is on hook {hook.name!r}, but {why}; "
        "give a dictionary of this model"
    )


def width(model: LoweredModel, hook: Hook) -> int:
    """Width of the activation at a hook: d_model, or n_heads * d_head for ``attn_z``."""
    if hook.site != "attn_z":
        return model.d_model
    heads, d_head, _ = model.layers[hook.layer].attention.W_O.shape
    return heads * d_head


def activation(model: LoweredModel, trace: Trace, hook: Hook) -> Tensor:
    """Return the activation at a hook, as TransformerLens' bridge caches it.

    Parameters
    ----------
    model
        The model that made the trace; it has the hook (:func:`check_fits`).
    trace
        An ordinary forward pass.
    hook
        What to read.

    Returns
    -------
    Tensor
        ``[batch, pos, d]``; ``attn_z`` comes flattened to ``head * d_head``.
    """
    layer, i = model.layers[hook.layer], hook.layer
    match hook.site:
        case "resid_pre":
            return trace.attention_in[i]
        case "attn_z":
            return trace.z[i].transpose(-3, -2).flatten(-2)
        case "attn_out":
            out = trace.attention_out[i]
            return out if layer.attention_post is None else layer.attention_post(out)
        case "mlp_out":
            return trace.mlp_out[i]
        case "resid_post":
            assert trace.final is not None
            return [*trace.attention_in, trace.final][i + 1]
    assert layer.ln2 is not None
    stream = trace.mlp_in[i]
    match hook.site:
        case "ln2_normalized":
            return layer.ln2.normalized(stream)
        case "ln2_out":
            return layer.ln2(stream)
    return stream  # resid_mid, mlp_in


def replacement(model: LoweredModel, hook: Hook, value: Tensor) -> dict[tuple[str, int], Tensor]:
    """Return what ``LoweredModel.forward`` takes to put ``value`` at a hook.

    Parameters
    ----------
    model
        The model.
    hook
        Where a dictionary writes.
    value
        ``[batch, pos, d]``, as :func:`activation` gives it.
    """
    value = value.to(model.dtype)
    if hook.site == "attn_z":
        heads = model.layers[hook.layer].attention.n_heads
        value = value.unflatten(-1, (heads, -1)).transpose(-3, -2)
        return {("z", hook.layer): value}
    return {hook.part: value}


def group_by_length(
    prompts: Iterable[tuple[int, ...]], batch_size: int, device: torch.device
) -> list[Tensor]:
    """Return prompts as batches ``[batch, pos]`` of one length each, without padding."""
    by_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for prompt in prompts:
        by_length[len(prompt)].append(prompt)
    return [
        torch.tensor(some[i : i + batch_size], device=device)
        for _, some in sorted(by_length.items())
        for i in range(0, len(some), batch_size)
    ]
