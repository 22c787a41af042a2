"""Weights that are kept in one type, or one place, and used in another.

A :class:`Stored` weight says that it is, say, float32 on a GPU; what it holds are bfloat16 numbers,
perhaps in the memory of the host.  It is cast and moved when a product asks for it, a layer at a
time, and forgotten again: autograd keeps the weight itself for the backward pass, not the copy.
What is held on another GPU stays there: the product is computed there, and comes back.
Results are those of a model loaded in that type from the same numbers, to the last bit.

So whatever reads a weight need not know where it lies, and all else (stream, gradients, the state
of a search) is where the weights say that they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "MOST_SCRATCH",
    "Stored",
    "held_bytes",
    "is_offloaded",
    "keep_stored",
    "kept_in",
    "kept_like",
    "used_at",
]

_aten = torch.ops.aten
_VIEWS = {
    _aten.alias.default, _aten.as_strided.default, _aten.detach.default, _aten.expand.default,
    _aten.permute.default, _aten.select.int, _aten.slice.Tensor, _aten.split.Tensor,
    _aten.split_with_sizes.default, _aten.squeeze.default, _aten.squeeze.dim, _aten.t.default,
    _aten.transpose.int, _aten.unbind.int, _aten.unsqueeze.default, _aten.view.default,
    _aten._unsafe_view.default, _aten._reshape_alias.default,
}  # fmt: skip
"""What gives another view of the same numbers."""
_PICKS = {
    _aten.embedding.default, _aten.gather.default, _aten.index.Tensor, _aten.index_select.default
}  # fmt: skip
"""What takes a few of the numbers, which are then cast alone."""
MOST_SCRATCH = 1 << 26
"""Numbers: what is larger is cast into memory of its own, which is given back."""


class Stored(Tensor):
    """A weight that is held in one type or place and used in another.

    Parameters
    ----------
    raw
        What is held.
    dtype, device
        What it says that it is.
    """

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor, dtype: torch.dtype, device: torch.device) -> Stored:
        """Return a tensor without numbers of its own."""
        made: Stored = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # torch lists it not
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=dtype, device=device,
        )  # fmt: skip
        return made

    def __init__(self, raw: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self.raw = raw

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch's has other options
        kept = f"{self.raw.dtype} on {self.raw.device}"
        return f"Stored({tuple(self.shape)}, {self.dtype} on {self.device}, kept in {kept})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Stored:
        return self  # never written to

    @property
    def at(self) -> torch.device:
        """Where products with it are computed: on the GPU that holds it, if one does."""
        return self.device if self.raw.device.type == "cpu" else self.raw.device

    @property
    def as_is(self) -> bool:
        """Whether it is used as it is held: not cast, not brought from elsewhere."""
        return self.raw.dtype == self.dtype and self.raw.device == self.at

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch calls it
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Look at the numbers held, or compute with a copy that is as it should be."""
        if func in _VIEWS:
            own = args[0]
            seen = func(own.raw, *args[1:], **(kwargs or {}))
            return _mapped(lambda x: Stored(x, own.dtype, own.device), seen)
        if func in _PICKS and isinstance(args[0], Stored):
            own = args[0]
            there = _mapped(lambda x: _moved(x, own.raw.device), args[1:])
            return func(own.raw, *there, **(kwargs or {})).to(own.device, own.dtype)
        if func is _aten.mm.default and isinstance(args[1], Stored):
            some = max(1, MOST_SCRATCH // len(args[1]))
            if args[1].shape[1] > some and not args[1].as_is:  # an unembedding: some outputs each
                return torch.cat([args[0] @ part for part in args[1].split(some, dim=1)], dim=1)
        kwargs = kwargs or {}
        own = next(_stored((*args, *kwargs.values())))
        if own.at != own.device and not func._schema.is_mutable and kwargs.get("device") is None:
            return _computed_at(own, func, args, kwargs)
        scratch = _Scratch(own.device)
        used = _mapped(scratch.used, (args, kwargs))
        return _mapped(scratch.own, func(*used[0], **used[1]))


def _computed_at(own: Stored, func: Any, args: Any, kwargs: Any) -> Any:
    """Compute where a weight is held, and bring back what is found."""
    scratch = _Scratch(own.at)
    there = _mapped(lambda x: _moved(scratch.used(x), own.at), (args, kwargs))
    return _mapped(lambda x: _moved(x, own.device), func(*there[0], **there[1]))


def _stored(values: Iterable[Any]) -> Iterator[Stored]:
    """Stored weights among arguments, in lists too."""
    for value in values:
        if isinstance(value, Stored):
            yield value
        elif isinstance(value, list | tuple):
            yield from _stored(value)


def _mapped(f: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to a value, or to what is in it; torch's own costs as much as a product."""
    if isinstance(value, list | tuple):
        return type(value)([_mapped(f, x) for x in value])
    if isinstance(value, dict):
        return {name: _mapped(f, x) for name, x in value.items()}
    return f(value)


def _moved(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x


class _Scratch:
    """Copies of the weights that one operation reads, in memory that the next one uses again.

    Fresh memory costs the system more than the cast does.

    Parameters
    ----------
    at
        Where the operation is.
    """

    _rooms = threading.local()

    def __init__(self, at: torch.device) -> None:
        self._at = at
        self._used: list[Tensor] = []

    def used(self, x: Any) -> Any:
        """Return the copy of a stored weight, and anything else as it is."""
        if not isinstance(x, Stored):
            return x
        raw = x.raw
        if self._at.type != "cpu" or raw.numel() > MOST_SCRATCH or raw.dtype == x.dtype:
            return raw.to(self._at, x.dtype, non_blocking=raw.device.type == "cpu")
        copy = torch.empty_like(raw, dtype=x.dtype, device="meta")  # dense, in the same order
        room = self._room(len(self._used), x.dtype, raw.numel())
        copy = room[: raw.numel()].as_strided(raw.size(), copy.stride())
        self._used.append(room)
        return copy.copy_(raw)

    def own(self, x: Any) -> Any:
        """Return a result, copied where it lies in memory that will be used again."""
        if self._used and isinstance(x, Tensor) and not isinstance(x, Stored):
            starts = {room.untyped_storage().data_ptr() for room in self._used}
            return x.clone() if x.untyped_storage().data_ptr() in starts else x
        return x

    def _room(self, i: int, dtype: torch.dtype, n: int) -> Tensor:
        rooms: dict[tuple[int, torch.dtype], Tensor] = self._rooms.__dict__.setdefault("of", {})
        if (i, dtype) not in rooms or len(rooms[i, dtype]) < n:
            rooms[i, dtype] = torch.empty(n, dtype=dtype)
        return rooms[i, dtype]


def keep_stored(
    modules: nn.Module,
    keep: torch.dtype,
    use: torch.dtype,
    device: torch.device,
    held: Callable[[nn.Parameter], torch.device] | torch.device | None = None,
) -> None:
    """Let the matrices of a module be kept in one type, or at some places, and used in another.

    Vectors (norms, biases) are rounded to ``keep`` and kept in ``use`` where they are used: they
    are few.  Matrices that are stored already stay as they are.

    Parameters
    ----------
    modules
        Its parameters are replaced; those that share a parameter go on sharing one.
    keep, use
        The types.
    device
        Where it is used.
    held
        Where a matrix, or all, are held; None: on the device.  What is in the memory of the host is
        brought to the device when it is used, each time.
    """
    places: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    for module in modules.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                places.setdefault(id(parameter), (parameter, []))[1].append((module, name))
    while places:
        _, (parameter, at) = places.popitem()  # so that each is given back in its turn
        data = parameter.detach()
        if data.ndim < 2:
            data = data.to(keep).to(device, use)
        elif not isinstance(data, Stored):
            home = held(parameter) if callable(held) else held or device
            data = _kept(data.to(home, keep), use, device)
        kept = nn.Parameter(data, requires_grad=False)
        for module, name in at:
            module._parameters[name] = kept


def _kept(raw: Tensor, use: torch.dtype, device: torch.device) -> Tensor:
    """What is held, as something that is used in a type on a device."""
    if raw.device.type == "cpu" and device.type == "cuda":
        raw = raw.pin_memory()  # which is brought several times as fast
    elsewhere = raw.device != device or device.type == "cpu"
    return Stored(raw, use, device) if elsewhere or raw.dtype != use else raw


def kept_in(weight: Tensor) -> torch.dtype:
    """Type in which a weight is held."""
    return weight.raw.dtype if isinstance(weight, Stored) else weight.dtype


def kept_like(value: Tensor, weight: Tensor) -> Tensor:
    """Return what was made of a weight, held where the weight is."""
    if not isinstance(weight, Stored):
        return value
    return Stored(value.to(weight.raw.device), weight.dtype, weight.device)


def used_at(weight: Tensor) -> torch.device:
    """Where products with a weight are computed."""
    return weight.at if isinstance(weight, Stored) else weight.device


def is_offloaded(weight: Tensor) -> bool:
    """Whether a weight is brought from the memory of the host for each product.

    So is one on a CPU, without a copy, that is held in the type that it is used in.
    """
    if not isinstance(weight, Stored) or weight.raw.device.type != "cpu":
        return False
    return weight.device.type != "cpu" or weight.raw.dtype == weight.dtype


def held_bytes(weights: Iterable[Tensor]) -> int:
    """Bytes in which some weights are held, each piece of memory once."""
    raw = (x.raw if isinstance(x, Stored) else x for x in weights)
    pieces = (x.untyped_storage() for x in raw)
    return sum({piece._cdata: piece.nbytes() for piece in pieces}.values())
