"""Devices that are not there: tensors that behave as if they lay on one.

A tensor on one says that its device is ``lazy:0`` or ``lazy:1`` (which every torch knows and
nothing here runs on), and holds its numbers beside itself, on the CPU.  What CUDA refuses is
refused: an operation of tensors of two devices, a NumPy view, an index on the device into a tensor
that is not there, a generator of the CPU for numbers on the device.  What CUDA allows is allowed: a
number (a tensor without axes) of the CPU among tensors of a device, an index of the CPU, copies.
A tensor whose ``data`` were moved to the CPU is used by nothing until they are back.

What leaves for the CPU is counted (:attr:`Device.n_moved`): on a GPU each makes the host wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from acdc.models.stored import Stored

DEVICE, OTHER = torch.device("lazy:0"), torch.device("lazy:1")
_CPU = torch.device("cpu")
aten = torch.ops.aten

_INDEXED = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default, aten._unsafe_index.Tensor, aten._unsafe_index_put.default,
}  # fmt: skip
_COPIES = {aten.copy_.default, aten._to_copy.default}
_NUMBERS = {  # of which a value may be a number of the CPU, as of all that go element by element
    aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill_.Tensor, aten.where.self,
    *_INDEXED,
}  # fmt: skip


class MixedDevicesError(RuntimeError):
    """What CUDA would refuse."""


class OnDevice(Tensor):
    """A tensor on a device."""

    held: Tensor
    is_away = False

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device = DEVICE) -> OnDevice:
        self = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, layout=held.layout, device=device, requires_grad=False,
        )  # fmt: skip
        self.held = held
        return self

    def tolist(self) -> Any:
        """Return numbers, as torch does of any device."""
        Device.n_moved += 1
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if Stored in types:  # which computes with what it holds
            return NotImplemented
        return _run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is entered, what is made for a device is made on it."""

    n_moved = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's compiler is not there, and importing it takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if Stored in types:
            with self:
                return Stored.__torch_dispatch__(func, types, args, kwargs)
        return _run(func, args, kwargs or {})


class _Made(TorchFunctionMode):
    """Sees what is made of Python's numbers, which no dispatch shows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        made = func in (torch.tensor, torch.as_tensor) and asked is not None
        if made and torch.device(asked).type == DEVICE.type:
            return func(*args, **{**kwargs, "device": None}).to(asked)
        if func == Tensor.data.__set__ and isinstance(args[0], OnDevice):
            args[0].is_away = not isinstance(args[1], OnDevice)
            args[0].held = args[1] if args[0].is_away else args[1].held
            return None
        if func == Tensor.data.__get__ and getattr(args[0], "is_away", False):
            return args[0].held
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], OnDevice):
            args = (args[0], _index(args[1]), *args[2:])
        return func(*args, **kwargs)


def _index(index: Any) -> Any:
    """An index whose lists are tensors: torch makes them itself, beside every dispatch."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.as_tensor(index) if isinstance(index, list | range | np.ndarray) else index


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func.overloadpacket is aten.to:  # beneath autograd it comes here whole
        with Device():
            return func.decompose(*args, **kwargs)
    tensors = list(_tensors((*args, *kwargs.values())))
    ours = [isinstance(x, OnDevice) for x in tensors]
    asked = kwargs.get("device")
    there = next((x.device for x in tensors if isinstance(x, OnDevice)), _CPU)
    goes = there if asked is None else torch.device(asked)
    if asked is not None and goes != _CPU:
        _check_generator(func, kwargs, goes)
    _check(func, args, tensors)
    if any(ours) and (goes == _CPU or func is aten._local_scalar_dense.default):
        Device.n_moved += 1
    plain = {name: _of_each(OnDevice, _held, value) for name, value in kwargs.items()}
    if asked is not None and goes.type == DEVICE.type:
        plain["device"] = _CPU
    out = func(*(_of_each(OnDevice, _held, x) for x in args), **plain)
    if func is aten.copy_.default:
        Device.n_moved += ours == [False, True]
    if func._schema.is_mutable:  # what was written to comes back, wherever it is
        return kwargs.get("out", args[0]) if isinstance(out, Tensor) else None
    on = partial(OnDevice, device=goes)
    return _of_each(Tensor, on, out) if goes.type == DEVICE.type else out


def _held(x: OnDevice) -> Tensor:
    return x.held


def _tensors(values: Any) -> Iterator[Tensor]:
    """Tensors among arguments, in lists too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _of_each(kind: type, make: Any, value: Any) -> Any:
    """The value with what is made of everything of a kind in it."""
    if isinstance(value, kind):
        return make(value)
    if isinstance(value, list | tuple):
        return type(value)(_of_each(kind, make, x) for x in value)
    return value


def _check_generator(func: Any, kwargs: dict[str, Any], device: torch.device) -> None:
    generator = kwargs.get("generator")
    if generator is not None and generator.device != device:
        raise MixedDevicesError(f"{func}: a generator of {generator.device} for {device}")


def _check(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Refuse tensors of two devices."""
    if any(isinstance(x, OnDevice) and x.is_away for x in tensors):
        raise MixedDevicesError(f"{func}: a tensor whose data are on the CPU")
    there = {x.device for x in tensors}
    if len(there) < 2 or func in _COPIES:
        return
    if there == {_CPU, max(there, key=str)}:  # one device, beside the CPU
        if func in _INDEXED and isinstance(args[0], OnDevice):
            values = [x for x in args[2:3] if isinstance(x, Tensor)]
            if all(isinstance(x, OnDevice) or not x.ndim for x in values):
                return
        pointwise = torch.Tag.pointwise in func.tags or func in _NUMBERS
        others = [x for x in tensors if not isinstance(x, OnDevice)]
        if pointwise and func not in _INDEXED and not any(x.ndim for x in others):
            return
    kinds = [f"{x.device}{list(x.shape)}" for x in tensors]
    raise MixedDevicesError(f"{func}: tensors on two devices: {', '.join(kinds)}")


@contextmanager
def device() -> Iterator[type[Device]]:
    """Enter the devices, which models are known to be able to lie on; the count begins at 0."""
    Device.n_moved = 0
    with Device(), _Made(), mock.patch("acdc.models.devices.resolve_device", torch.device):
        yield Device


@contextmanager
def room(n_bytes: int) -> Iterator[None]:
    """Let both devices be there for the option, each with room for so many bytes of weights."""
    names = [str(DEVICE), str(OTHER)]
    with (
        mock.patch("acdc.models.devices._gpus", return_value=names),
        mock.patch("acdc.models.placement.room_on", return_value=n_bytes),
    ):
        yield


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """Put the parameters and buffers of a module on the device, and return it."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                new = torch.nn.Parameter(OnDevice(parameter.detach()), parameter.requires_grad)
                part._parameters[name] = new
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)
    return module
