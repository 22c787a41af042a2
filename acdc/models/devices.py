"""Devices and number types by name."""

from __future__ import annotations

import torch
from torch.torch_version import TorchVersion

from acdc.engine.processes import here
from acdc.errors import DeviceError

__all__ = ["arithmetic_of", "computes_fast", "resolve_device", "resolve_dtype"]

_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_MPS_RIGHT = "2.9"
"""First torch whose ``mps`` computes right: with 2.8 products of matrices that are views come out
wrong, and before that other operations did (TransformerLens, ``utilities/devices.py``)."""


def resolve_device(device: str) -> torch.device:
    """Return the torch device of a name; ``cuda`` for several processes is one of its own each.

    Raises
    ------
    DeviceError
        If this machine does not have it, this torch computes wrong numbers on it, or it is not
        enough for several processes (:meth:`acdc.engine.processes.Processes.device`).
    """
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
    if found.type == "mps" and TorchVersion(torch.__version__) < TorchVersion(_MPS_RIGHT):
        raise DeviceError(
            f"device 'mps': torch {torch.__version__} computes wrong numbers on it; update torch "
            f"to {_MPS_RIGHT} or later, or choose cpu"
        )
    return here().device(found)


_FAST = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16"),
}
"""What a CPU has, as torch names it, that computes in a type; without, it is many times slower."""


def computes_fast(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU computes in a type no slower than in float32.

    Read from what the CPU says of itself, so that it is the same in every run on a machine.
    """
    if dtype not in _FAST:
        return True
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in _FAST[dtype])


def arithmetic_of(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the type that a model whose weights are of a type is computed in on a device."""
    return dtype if device.type != "cpu" or computes_fast(dtype) else torch.float32


def _available() -> list[str]:
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return names + (["mps"] if torch.backends.mps.is_available() else [])


def resolve_dtype(dtype: str) -> torch.dtype:
    """Return the torch type of a name; DeviceError if it is none that models run in."""
    if dtype not in _DTYPES:
        raise DeviceError(f"unknown dtype {dtype!r}: expected one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]
