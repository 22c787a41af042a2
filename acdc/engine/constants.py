"""Constants that ablated edges carry, and the files that they are kept in.

How they are found is said in :mod:`acdc.ablations`.  A head's constant is one of z, before W_O:
what a head can write is in the image of its W_O, and so is a mean.
"""

from __future__ import annotations

import json
import re
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from acdc.ablations.base import ABLATIONS
from acdc.engine.values import Values
from acdc.errors import CircuitFileError, InputError, OptionError, TaskError
from graphs.files.whole import MIB, check_regular, parse_json

__all__ = ["FILE_NAME", "Constants", "load_constants"]

FILE_NAME = "constants.safetensors"
"""Constants in the folder of a run."""

_FORMAT = "acdc-constants-2"

_MOST_BYTES = 4096 * MIB
_TENSOR = re.compile(r"(all|[1-9][0-9]{0,8})\.([0-9]{1,6})")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Constants:
    """What every sender writes when it is ablated.

    Parameters
    ----------
    intervention, direction
        The ablation that they are of.
    values
        By prompt length, or under None for all lengths: by block of the program, with a batch axis
        of length 1 and a position axis of length 1 or of that of the prompts.
    report
        What run.json should say of how they came about; plain JSON values.
    """

    intervention: str
    direction: str
    values: dict[int | None, Values]
    report: dict[str, Any] = field(default_factory=dict)

    def at(self, n_pos: int) -> list[Float[Tensor, "_ 1 1 _ _"]]:
        """Return the constants for prompts of ``n_pos`` tokens.

        Raises
        ------
        TaskError
            If they are by position and no prompt of that length was averaged.
        """
        if None in self.values:
            return self.values[None]
        if n_pos not in self.values:
            known = ", ".join(str(length) for length in sorted(self.values, key=str))
            raise TaskError(
                f"means by position: a prompt has {n_pos} tokens, but the prompts that means are "
                f"taken over have {known}: choose the intervention 'mean', or prompts of that "
                "length with --mean-over"
            )
        return self.values[n_pos]

    def to(self, device: torch.device, dtype: torch.dtype) -> Constants:
        """Return them on a device, in a dtype."""
        moved = {
            length: [x.to(device, dtype) for x in values] for length, values in self.values.items()
        }
        return Constants(self.intervention, self.direction, moved, self.report)

    def check(self, wanted: Sequence[Float[Tensor, "_ _ _ _ _"]], where: str) -> None:
        """Check that they are of the model that wrote ``wanted``, by block of its program.

        Raises
        ------
        OptionError
            If their number or their widths differ.
        """
        for some in self.values.values():
            shapes = [_shape(x) for x in some], [_shape(x) for x in wanted]
            if shapes[0] != shapes[1]:
                raise OptionError(
                    f"the constants of {where} are of another model, or of other dictionaries: "
                    "evaluate on the model of the run"
                )

    def as_bytes(self) -> bytes:
        """Return the content of a safetensors file: the same bytes for the same constants."""
        tensors = {
            f"{'all' if length is None else length}.{i}": x.detach().cpu().contiguous()
            for length, some in self.values.items()
            for i, x in enumerate(some)
        }
        about = {
            "format": _FORMAT,
            "intervention": self.intervention,
            "direction": self.direction,
            "report": json.dumps(self.report),
        }
        return _sorted(save(tensors, about))


def _sorted(content: bytes) -> bytes:
    """Bring the header of a safetensors file, which is written in any order, into one."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:start]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # data is aligned
    return len(header).to_bytes(8, "little") + header + content[start:]


def _shape(x: Tensor) -> tuple[int, ...]:
    """Shape without batch and positions, which are the third and the second axis from behind."""
    return (*x.shape[:-3], x.shape[-1])


def load_constants(path: str | Path) -> Constants:
    """Read what :meth:`Constants.as_bytes` gave.

    Raises
    ------
    CircuitFileError
        If the file cannot be read as constants; the message names the tensor that is none.
    """
    check_regular(path, _MOST_BYTES, CircuitFileError)
    try:
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            # Copies: the file may be written anew while they are in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise CircuitFileError(f"{path} cannot be read ({error}): delete the file") from error
    try:
        return _constants(about, tensors)
    except InputError as error:
        raise CircuitFileError(f"{path}: {error}: delete the file") from error


def _constants(about: dict[str, str], tensors: dict[str, Tensor]) -> Constants:
    """Make constants of what a file holds; InputError where it can be none."""
    if about.get("format") != _FORMAT:
        raise InputError("no constants of acdc")
    constant = [name for name, one in ABLATIONS.items() if one.constant]
    for key, known in (("intervention", constant), ("direction", ["noising", "denoising"])):
        if about.get(key) not in known:
            raise InputError(f"{key} is {about.get(key)!r}, expected one of {', '.join(known)}")
    report = parse_json(about.get("report", ""), "'report'")
    if not isinstance(report, dict):
        raise InputError("'report' is no object")
    found: dict[int | None, dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise InputError(f"tensor {name!r}: expected a name as all.3, or 15.3 for 15 tokens")
        length = None if match[1] == "all" else int(match[1])
        _check_tensor(name, tensor, length)
        found[length][int(match[2])] = tensor
    for length, some in found.items():
        if sorted(some) != list(range(len(some))):
            raise InputError(f"tensors of {length or 'all'} are not numbered from 0 without gaps")
    if len({len(some) for some in found.values()}) != 1 or (None in found and len(found) > 1):
        raise InputError("expected as many tensors for every length, at least one")
    values = {length: [some[i] for i in range(len(some))] for length, some in found.items()}
    return Constants(about["intervention"], about["direction"], values, report)


def _check_tensor(name: str, tensor: Tensor, length: int | None) -> None:
    """Check that a tensor is ``[sender, 1, 1, 1 or pos, width]``, of finite numbers."""
    if tensor.dtype not in _DTYPES:
        raise InputError(f"tensor {name!r} is of type {tensor.dtype}, expected float32")
    shape = tuple(tensor.shape)
    if len(shape) != 5 or shape[1:3] != (1, 1) or shape[3] not in (1, length) or shape[4] == 0:
        raise InputError(
            f"tensor {name!r} has shape {list(shape)}, expected [senders, 1, 1, positions, width]"
        )
    if not torch.isfinite(tensor.float()).all():
        raise InputError(f"tensor {name!r} holds nan or infinite numbers")
