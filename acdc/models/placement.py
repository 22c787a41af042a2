"""Putting the weights of a model where they are held, by the plan of accelerate.

A model that does not fit one device is cut between its layers: ``accelerate`` says which part goes
where (:func:`accelerate.infer_auto_device_map`), and :class:`acdc.models.stored.Stored` lets its
weights be used from there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from acdc.errors import DeviceError
from acdc.models.devices import Placement, free_memory
from acdc.models.stored import Stored, keep_stored

__all__ = ["place", "plan", "room_on", "settle"]

_FREE = 0.9
"""Share of a GPU's free memory that weights may take; the rest is for what is computed."""
_NOWHERE = "disk"
"""What accelerate's plans say of what fits nowhere."""


def place(
    module: nn.Module,
    placement: Placement,
    keep: torch.dtype,
    use: torch.dtype,
    whole: Sequence[str],
) -> None:
    """Put the weights of a module, which are in the memory of the host, where they are held.

    Parameters
    ----------
    module
        Its parameters and buffers are replaced.
    placement
        Where to.
    keep, use
        Types that weights are kept in and used in.
    whole
        Names of the classes of its layers, which are not cut.

    Raises
    ------
    DeviceError
        If they do not fit.
    """
    held = plan(module, placement, keep, whole)
    device = placement.device
    keep_stored(module, keep, use, device, lambda parameter: held.get(id(parameter), device))
    for part in module.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)


def settle(bridge: Any, placement: Placement, keep: torch.dtype, use: torch.dtype) -> None:
    """Put what a bridge made of its weights (some split a matrix into q, k and v) beside these.

    Parameters
    ----------
    bridge
        Whose model's weights were placed.
    placement, keep, use
        As of :func:`place`.
    """
    for block in bridge.blocks:
        held = next((x.raw.device for x in block.parameters() if isinstance(x, Stored)), None)
        if held is not None:
            keep_stored(block, keep, use, placement.device, held)


def plan(
    module: nn.Module, placement: Placement, keep: torch.dtype, whole: Sequence[str]
) -> dict[int, torch.device]:
    """Return where each parameter is held, by its ``id``; arguments as :func:`place`."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if len(placement.held) == 1:
        return {id(parameters[name]): placement.held[0] for name in names}
    parts = _parts(module, placement, keep, list(whole))
    if _NOWHERE in parts.values():
        n_bytes = sum(x.numel() for x in module.parameters()) * keep.itemsize
        free = ", ".join(f"{d}: {room_on(d) / 2**30:.1f}" for d in placement.held)
        raise DeviceError(
            f"device {placement.name!r}: weights of {n_bytes / 2**30:.1f} GiB do not fit there "
            f"({free} GiB for weights): name more devices, or choose auto, which leaves the rest "
            "in the memory of the host"
        )
    at = {key: placement.held[i] for i, key in enumerate(_keys(placement))}
    found: dict[int, torch.device] = {}
    for name in names:
        found.setdefault(id(parameters[name]), at[_part_of(name, parts)])
    return found


def room_on(device: torch.device) -> int:
    """Bytes that weights may take on a GPU."""
    return int(_FREE * free_memory(device))


def _keys(placement: Placement) -> list[int | str]:
    """What accelerate calls the places: GPUs have numbers."""
    return ["cpu" if one.type == "cpu" else i for i, one in enumerate(placement.held)]


def _parts(
    module: nn.Module, placement: Placement, keep: torch.dtype, whole: list[str]
) -> dict[str, int | str]:
    """Return accelerate's plan: where each part of a module is, by the name of the part."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    room: dict[Any, Any] = {
        key: sum(x.nbytes for x in module.parameters()) * 2 if key == "cpu" else room_on(one)
        for key, one in zip(_keys(placement), placement.held, strict=True)
    }
    options: dict[str, Any] = {"no_split_module_classes": whole, "dtype": keep}
    if placement.balanced:
        room = get_balanced_memory(module, room, **options)
    parts: dict[str, int | str] = infer_auto_device_map(module, room, **options)
    return parts


def _part_of(name: str, parts: dict[str, int | str]) -> int | str:
    """Return where the part is that a parameter is of."""
    steps = name.split(".")
    starts = itertools.accumulate(steps, lambda a, b: f"{a}.{b}")
    return next(parts[start] for start in ("", *starts) if start in parts)
