"""Devices and number types by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch.torch_version import TorchVersion

from acdc.engine.processes import here
from acdc.errors import DeviceError
from acdc.settings import OFFLOADS

__all__ = [
    "Placement",
    "arithmetic_of",
    "computes_fast",
    "free_memory",
    "resolve_device",
    "resolve_dtype",
    "resolve_placement",
]

_HOST = torch.device("cpu")

_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
"""What a container may take, and has taken, in the second and first version of Linux' groups."""
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
            f"unknown device {device!r}: expected cpu, cuda, cuda:N, mps, several as "
            f"cuda:0,cuda:1, or auto; this machine has {', '.join(there)}"
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


@dataclass(frozen=True)
class Placement:
    """Where a model is computed, and where its weights are held.

    Parameters
    ----------
    name
        As it was asked for.
    device
        Where all is computed but products with weights that another GPU holds.
    held
        Where weights are held, in the order in which these are filled; ``cpu`` is the memory of the
        host.  Empty: they are simply on the device.
    balanced
        Whether each is to hold about as much.
    """

    name: str
    device: torch.device
    held: tuple[torch.device, ...] = ()
    balanced: bool = False

    @property
    def loading(self) -> torch.device:
        """Where weights are until it is known where they are held."""
        return _HOST if self.held else self.device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where products with weights are computed, each with its number."""
        gpus = tuple(one for one in self.held if one != _HOST)
        return gpus or (_numbered(self.device),)


def resolve_placement(device: str, offload: str = "none") -> Placement:
    """Return where a model is to be computed, and its weights are to be held.

    Parameters
    ----------
    device
        As for :func:`resolve_device`; several GPUs, ``cuda:0,cuda:1``, which hold about as much
        each; or ``auto``: GPUs that are filled one after the other, and the memory of the host for
        the rest.
    offload
        ``cpu``: all weights are held in the memory of the host; ``none``: they are not.

    Raises
    ------
    DeviceError
        As :func:`resolve_device`; or if what is asked for does not go together.
    """
    if offload not in OFFLOADS:
        raise DeviceError(f"unknown offload {offload!r}: expected {' or '.join(OFFLOADS)}")
    offloads = offload != "none"
    names = _gpus() if device == "auto" else device.split(",")
    if not names:
        raise DeviceError(
            f"device 'auto': this machine has no GPU, only {', '.join(_available())}: name one "
            "of these"
        )
    found = [resolve_device(name) for name in names]
    if device != "auto" and len(found) == 1:
        main = _numbered(found[0]) if offloads else found[0]
        return Placement(device, main, (_HOST,) if offloads else ())
    if any(one.type in ("cpu", "mps") for one in found) or len(set(names)) < len(names):
        raise DeviceError(
            f"device {device!r}: several devices are GPUs, each once, as cuda:0,cuda:1; this "
            f"machine has {', '.join(_available())}"
        )
    if offloads:
        raise DeviceError(
            f"offload {offload!r} with device {device!r}: weights in the memory of the host are "
            "used on one device: name that, or choose offload none"
        )
    held = tuple(map(_numbered, found))
    if device == "auto":
        return Placement(device, held[0], (*held, _HOST))
    return Placement(device, held[0], held, balanced=True)


def _numbered(device: torch.device) -> torch.device:
    """``cuda:0`` for ``cuda``: so weights say it, and are compared."""
    return torch.device("cuda", 0) if device == torch.device("cuda") else device


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


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still take on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    found = int(psutil.virtual_memory().available + psutil.swap_memory().free)
    for limit, taken in _LIMITS:  # which psutil does not know
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            found = min(found, int(most) - int(taken.read_text()))
    return found


def _gpus() -> list[str]:
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def _available() -> list[str]:
    return ["cpu", *_gpus()] + (["mps"] if torch.backends.mps.is_available() else [])


def resolve_dtype(dtype: str) -> torch.dtype:
    """Return the torch type of a name; DeviceError if it is none that models run in."""
    if dtype not in _DTYPES:
        raise DeviceError(f"unknown dtype {dtype!r}: expected one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]
