"""Values of a search that do not fit into the memory asked for: in files, or beside a GPU.

The state of every batch is laid into an :class:`Arena`, and is in memory only while it is that
batch's turn.  Numbers are the same wherever they lie, so a search comes out the same.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from acdc.errors import OptionError

__all__ = ["Arena", "FileArena", "HostArena", "arena_for", "bytes_of"]

_ALIGNED = 64


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that some tensors take in an arena."""
    return sum(-(-max(x.nbytes, 1) // _ALIGNED) * _ALIGNED for x in tensors)


class Arena(ABC):
    """Where the tensors of one batch lie.

    Attributes
    ----------
    tensors
        All that were put there.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    @abstractmethod
    def put(self, x: Tensor) -> Tensor:
        """Return a copy that lies here."""

    @abstractmethod
    def copied(self) -> tuple[Arena, dict[int, Tensor]]:
        """Return an arena with copies, and the copy of each tensor by its ``id``."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Have the tensors in memory while a block runs."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def mapper(self) -> Callable[[Tensor], Tensor]:
        """Return what puts tensors here, each once however often it is met."""
        done: dict[int, tuple[Tensor, Tensor]] = {}

        def put(x: Tensor) -> Tensor:
            if id(x) not in done:
                done[id(x)] = x, self.put(x)
            return done[id(x)][1]

        return put

    @abstractmethod
    def _enter(self) -> None:
        """Bring the tensors in."""

    @abstractmethod
    def _leave(self) -> None:
        """Let the memory go."""


class FileArena(Arena):
    """Tensors in a file without a name, which is gone when the process is, however it ends.

    Parameters
    ----------
    n_bytes
        Most that will be put here; where the system can, room for it is taken at once.

    Raises
    ------
    OptionError
        If there is no room for it.
    """

    def __init__(self, n_bytes: int) -> None:
        super().__init__()
        self._size, self._used = max(n_bytes, _ALIGNED), 0
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if self._size > free:
            raise OptionError(
                f"memory: what does not fit would take {self._size >> 20:,} MiB for each batch in "
                f"{tempfile.gettempdir()}, which has {free >> 20:,}: set TMPDIR to a larger disk, "
                "or ask for more --memory"
            )
        with tempfile.TemporaryFile(prefix="acdc-state-") as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk would end the process, later
                os.posix_fallocate(file.fileno(), 0, self._size)
            file.truncate(self._size)
            self._map = mmap.mmap(file.fileno(), self._size)  # which keeps the file

    def put(self, x: Tensor) -> Tensor:
        """Return a copy in the file."""
        start = self._used
        self._used = start + bytes_of([x])
        if self._used > self._size:
            raise ValueError(f"an arena of {self._size} bytes is asked for {self._used}")
        self.tensors.append(self._at(start, x).copy_(x))
        return self.tensors[-1]

    def copied(self) -> tuple[Arena, dict[int, Tensor]]:
        """Return a copy of the file, and of its tensors."""
        twin = FileArena(self._size)
        twin._map[: self._used] = self._map[: self._used]
        twin._used = self._used
        first = torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        found = {id(x): twin._at(x.data_ptr() - first, x) for x in self.tensors}
        twin.tensors = list(found.values())
        twin._leave()
        return twin, found

    def _at(self, start: int, like: Tensor) -> Tensor:
        if not like.numel():
            return torch.empty_like(like)
        flat = torch.frombuffer(self._map, dtype=like.dtype, count=like.numel(), offset=start)
        return flat.view(like.shape)

    def _enter(self) -> None:
        """Nothing to do: what is read comes in by itself."""

    def _leave(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED") and os.name == "posix":
            self._map.madvise(mmap.MADV_DONTNEED)  # the file still has what was written


class HostArena(Arena):
    """Tensors of a GPU that lie in the memory of the host between their turns.

    Parameters
    ----------
    device
        Where they are used.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device, self._in = device, False

    def put(self, x: Tensor) -> Tensor:
        """Return a copy."""
        copy = x.detach().clone(memory_format=torch.contiguous_format)
        self.tensors.append(copy)
        return copy

    def copied(self) -> tuple[Arena, dict[int, Tensor]]:
        """Return copies, where the tensors are now."""
        twin = HostArena(self._device)
        found = {id(x): x.clone() for x in self.tensors}
        twin.tensors = list(found.values())
        return twin, found

    def _enter(self) -> None:
        for x in self.tensors:
            x.data = x.data.to(self._device)

    def _leave(self) -> None:
        for x in self.tensors:
            x.data = x.data.cpu()


def arena_for(device: torch.device, n_bytes: int) -> Arena:
    """Return where the values of a batch lie that are used on a device.

    Parameters
    ----------
    device
        Of the model.
    n_bytes
        Most that will be put there.
    """
    return FileArena(n_bytes) if device.type == "cpu" else HostArena(device)
