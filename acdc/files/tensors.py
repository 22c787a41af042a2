"""Reading safetensors files, and the types of numbers that weights may have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from acdc.files import MAX_WEIGHTS
from graphs.errors import InputError
from graphs.files.whole import check_regular

__all__ = ["FLOATING", "check_floating", "read_safetensors", "read_shapes"]

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Types that weights may be stored in: those that models run in."""

# What torch raises for shapes and types that it lacks, and safetensors for all else.
_BROKEN = (
    SafetensorError,
    OSError,
    TypeError,
    ValueError,
    RuntimeError,
    LookupError,
    AttributeError,
)
_MOST_OPEN = 128 << 20
"""Bytes that are read of a file before it is opened anew."""
_MAX_HEADER = 32 << 20  # bytes; 100,000 tensors take 10 MiB


def read_safetensors(
    path: str | os.PathLike[str],
    failure: type[InputError] = InputError,
    what: str | None = None,
    cast: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU.

    Parameters
    ----------
    path
        The file.
    failure
        What is raised.
    what
        What the message calls the file; None: its path.
    cast
        What becomes of each tensor as it is read; None: it stays as it is.

    Raises
    ------
    InputError
        (``failure``)  If it is not there, truncated or damaged, or holds what torch cannot.
    """
    with _readable(path, failure, what):
        return load_file(path) if cast is None else _cast_one_by_one(path, cast)


def read_shapes(
    path: str | os.PathLike[str],
    failure: type[InputError] = InputError,
    what: str | None = None,
) -> dict[str, Tensor]:
    """Return the tensors of a file on the device ``meta``: nothing is read but their shapes.

    Parameters and errors as of :func:`read_safetensors`; their type is not looked at.
    """
    with _readable(path, failure, what), safe_open(path, framework="pt") as file:
        names = list(file.keys())
        shapes = {name: file.get_slice(name).get_shape() for name in names}
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@contextmanager
def _readable(
    path: str | os.PathLike[str], failure: type[InputError], what: str | None
) -> Iterator[None]:
    """Check a file, and say of what goes wrong with it that it cannot be read."""
    check_regular(path, MAX_WEIGHTS, failure)
    try:
        with open(path, "rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
        if n_header > _MAX_HEADER:
            raise SafetensorError(f"its header would take {n_header:,} bytes")
        yield
    except _BROKEN as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise failure(f"{what or path} is no readable safetensors file: {line}") from error


def _cast_one_by_one(
    path: str | os.PathLike[str], cast: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Read tensors and cast each at once; the file is opened anew where much has been read.

    What was read of a file stays in memory for as long as it is open.
    """
    found: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    while len(found) < len(names):
        n_bytes = 0
        with safe_open(path, framework="pt") as file:
            for name in names[len(found) :]:
                value = file.get_tensor(name)
                found[name] = cast(value)
                n_bytes += value.nbytes
                if n_bytes > _MOST_OPEN:
                    break
    return found


def check_floating(
    tensors: Mapping[str, Tensor], where: object, failure: type[InputError] = InputError
) -> None:
    """Raise ``failure`` naming the first tensor that is stored as anything but such numbers.

    A cast would drop imaginary parts and the scales of quantised weights in silence.
    """
    for name, value in tensors.items():
        if value.dtype not in FLOATING:
            known = ", ".join(_name(dtype) for dtype in FLOATING)
            raise failure(
                f"{where}: {name!r} is stored as {_name(value.dtype)}, expected one of {known}"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
