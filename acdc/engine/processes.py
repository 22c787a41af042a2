"""Prompts over processes: what each computes of its batches, all of them know.

Work is cut into chunks (batches of prompts) that do not depend on the number of processes, and a
chunk is computed by one of them::

    chunk      0  1  2  3  4  5  6  7
    process    0  1  2  0  1  2  0  1      chunk % number of processes

What comes of a chunk are numbers, and they are given to every process *by chunk*; sums of float64
are then taken in the order of the chunks, whoever computed them, so that one process and eight
decide alike to the last bit (with as many threads each).  All that follows from the numbers
every process does for itself, and so all go the same way; what they compute is compared on
the way, and processes that went apart end.

``torchrun`` starts the processes (:func:`together`).  Where nobody did there is one, which computes
every chunk and gives it to nobody.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from acdc.errors import DeviceError, ProcessError

__all__ = ["Exchange", "Numbers", "Processes", "Told", "among", "by_chunk", "here", "together"]

Numbers = list[Tensor]
"""What comes of one chunk."""

_HOST = torch.device("cpu")
_AT_ONCE = 1 << 14
"""Bytes that travel without being announced."""
_PATIENCE = timedelta(days=7)  # for a slow process; one that has ended is noticed at once

Exchange = Callable[[bytes, torch.device], list[bytes]]
"""``(content, where it comes from) -> content of every process``, in their order."""


def _to_nobody(content: bytes, device: torch.device) -> list[bytes]:
    """Exchange with nobody."""
    return [content]


def _at_once() -> bool:
    """Claim what nobody else can."""
    return True


@dataclass(frozen=True)
class Processes:
    """The processes that share the prompts, as one of them sees it.

    Parameters
    ----------
    rank, size
        Which one this is, and how many there are.
    local_rank
        Which one on this machine.
    exchange
        Gives every process the content of each.
    claim
        Returns True in the first process that asks, and in no other.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    exchange: Exchange = _to_nobody
    claim: Callable[[], bool] = _at_once

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and speaks to the user."""
        return self.rank == 0

    def owns(self, chunk: int) -> bool:
        """Whether this process computes a chunk."""
        return chunk % self.size == self.rank

    def device(self, device: torch.device) -> torch.device:
        """Where this process computes, if ``device`` is asked for: GPUs have one each.

        Raises
        ------
        DeviceError
            If there are fewer GPUs than processes, or one GPU is asked for by all.
        """
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise DeviceError(
                f"device {str(device)!r} for {self.size} processes: give cuda, of which each takes "
                "one of its own, or cpu"
            )
        n_devices = torch.cuda.device_count()
        if self.local_rank >= n_devices:
            raise DeviceError(
                f"device 'cuda': more processes than this machine's {n_devices} GPUs: lower "
                "--nproc-per-node"
            )
        return torch.device("cuda", self.local_rank)


_ALONE = Processes()
_HERE: ContextVar[Processes] = ContextVar("processes", default=_ALONE)


def here() -> Processes:
    """Return the processes that this one is of; itself alone where :func:`together` was not."""
    return _HERE.get()


@contextmanager
def among(processes: Processes) -> Iterator[Processes]:
    """Compute with other processes while a block runs."""
    token = _HERE.set(processes)
    try:
        yield processes
    finally:
        _HERE.reset(token)


class Told:
    """Progress of a computation by chunk: what processes tell of their own counts in each.

    Parameters
    ----------
    progress
        Told how many units are done since the last call.
    """

    def __init__(self, progress: Callable[[int], None]) -> None:
        self.progress, self.n = progress, 0

    def __call__(self, n: int) -> None:
        """Count units of a chunk of this process."""
        self.n += n
        self.progress(n)


def by_chunk(
    chunks: Sequence[int],
    of: Callable[[int], Numbers],
    *,
    device: torch.device = _HOST,
    about: Iterable[bytes] = (),
    one_by_one: bool = False,
    told: Told | None = None,
) -> Iterator[Numbers]:
    """Compute chunks, each in one process, and yield what came of each in their order.

    Parameters
    ----------
    chunks
        Their indices, the same in every process.
    of
        ``chunk -> tensors``, of any shape; those of another process come on the CPU.
    device
        Where the model is.
    about
        What the numbers are of beside the chunks: the same in every process that has not gone
        astray.
    one_by_one
        Whether tensors are large: they are exchanged as soon as each process has those of a chunk.
        Otherwise all at once.
    told
        Whom ``of`` tells of progress.

    Raises
    ------
    ProcessError
        If another process has ended, or computes something else.
    """
    us = here()
    if us.size == 1:
        yield from map(of, chunks)
        return
    each = us.size if one_by_one else max(1, len(chunks))
    for start in range(0, len(chunks), each):
        some, before = chunks[start : start + each], 0 if told is None else told.n
        own = [of(i) for i in some if us.owns(i)]
        n_told = 0 if told is None else told.n - before
        mark = _mark([repr(some).encode(), *about])
        found = _exchanged(us, some, _packed(mark, n_told, own), device)
        if told is not None:
            told.progress(found.n_told - n_told)
        yield from found.numbers


def _mark(parts: Iterable[bytes]) -> int:
    """What tells one computation from another."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


@dataclass(frozen=True, eq=False)
class _Found:
    """What came of all chunks of an exchange, in their order, and units that all processes told."""

    numbers: list[Numbers]
    n_told: int


def _exchanged(us: Processes, chunks: Sequence[int], own: bytes, device: torch.device) -> _Found:
    contents = [_unpacked(content) for content in us.exchange(own, device)]
    if len({mark for mark, _, _ in contents}) > 1:
        raise ProcessError(
            "the processes of torchrun compute different things: nothing is written; give all of "
            "them the same files and versions"
        )
    by_rank = [iter(numbers) for _, _, numbers in contents]
    numbers = [next(by_rank[i % us.size]) for i in chunks]
    return _Found(numbers, sum(n for _, n, _ in contents))


def _packed(mark: int, n_told: int, chunks: list[Numbers]) -> bytes:
    """Bytes of the tensors of some chunks."""
    file = io.BytesIO()
    head = np.array([mark, n_told, *map(len, chunks)], dtype=np.int64)
    tensors = (x.detach().cpu().numpy() for numbers in chunks for x in numbers)
    for array in (head, *tensors):
        np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getvalue()


def _unpacked(content: bytes) -> tuple[int, int, list[Numbers]]:
    """Undo :func:`_packed`."""
    file = io.BytesIO(content)

    def read() -> NDArray[Any]:
        found: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        return found

    mark, n_told, *counts = read().tolist()
    return mark, n_told, [[torch.from_numpy(read()) for _ in range(n)] for n in counts]


@contextmanager
def together() -> Iterator[Processes]:
    """Compute with the other processes that ``torchrun`` started, if it did, while a block runs.

    Numbers go over gloo, those of a model on CUDA over NCCL.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield here()
        return
    store, rank, size = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE, world_size=size, rank=rank, store=store)
    local_rank = int(os.environ["LOCAL_RANK"])

    def claim() -> bool:
        return bool(store.add("acdc/claimed", 1) == 1)

    try:
        with among(Processes(rank, size, local_rank, _to_all, claim)) as us:
            yield us
    finally:
        dist.destroy_process_group()


def _to_all(content: bytes, device: torch.device) -> list[bytes]:
    """Give every process the content of each; what is short takes one round, all else two."""
    short = len(content).to_bytes(8, "little") + content[:_AT_ONCE]
    starts = _gathered(short, 8 + _AT_ONCE, _HOST)
    sizes = [int.from_bytes(start[:8], "little") for start in starts]
    rest = max(0, max(sizes) - _AT_ONCE)
    ends = _gathered(content[_AT_ONCE:], rest, device) if rest else [b""] * len(starts)
    whole = zip(starts, ends, sizes, strict=True)
    return [(start[8:] + end)[:size] for start, end, size in whole]


def _gathered(content: bytes, size: int, device: torch.device) -> list[bytes]:
    """``content`` of every process, each filled up to a size."""
    own: Tensor = torch.frombuffer(bytearray(content.ljust(size, b"\0")), dtype=torch.uint8)
    own = own.to(device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    try:
        dist.all_gather(found, own)
    except RuntimeError as error:  # gloo's, and NCCL's, when a connection is lost
        raise ProcessError(
            "another process of torchrun has ended, and with it this one: nothing is written"
        ) from error
    return [x.cpu().numpy().tobytes() for x in found]
