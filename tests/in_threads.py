"""Processes that share prompts, as threads of this one: what they exchange goes through a barrier.

Objects that compute what they hold when it is asked for must not be shared by the threads.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cached_property
from itertools import count
from typing import TypeVar

import torch

from acdc.engine.processes import Processes, among
from acdc.errors import ProcessError

__all__ = ["in_threads"]

Found = TypeVar("Found")


def in_threads(n: int, work: Callable[[], Found]) -> list[Found]:
    """Return what each of ``n`` processes gets for the same work; an error of one ends them all."""
    _unlock()
    barrier = threading.Barrier(n, timeout=60)
    errors: list[BaseException] = []  # in the order of their times
    sent = defaultdict[int, list[bytes]](lambda: [b""] * n)  # by round

    def of(rank: int) -> Found:
        rounds = count()

        def exchange(content: bytes, device: torch.device) -> list[bytes]:
            this = next(rounds)
            sent[this][rank] = content
            try:
                barrier.wait()
            except threading.BrokenBarrierError as error:
                raise ProcessError("another one has ended") from error
            return sent[this]

        with among(Processes(rank, n, rank, exchange, lambda: rank == 0)):
            try:
                return work()
            except BaseException as error:
                errors.append(error)
                barrier.abort()
                raise

    with ThreadPoolExecutor(n) as pool:
        futures = [pool.submit(of, rank) for rank in range(n)]
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


def _unlock() -> None:
    """Let threads compute one property of several objects at a time: Python 3.11 has a lock there.

    A thread that holds it waits for the others in an exchange, and they for the lock.
    """
    modules = [module for name, module in sys.modules.items() if name.startswith("acdc.")]
    for kind in {x for module in modules for x in vars(module).values() if isinstance(x, type)}:
        for value in vars(kind).values():
            if isinstance(value, cached_property):
                value.lock = nullcontext()  # type: ignore[attr-defined]
