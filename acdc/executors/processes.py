"""Processes of this machine, each of which takes one call after another."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from acdc.executors.base import TRIES, Lost

__all__ = ["Processes"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_HEAVY = ("acdc.runs.discover", "transformer_lens.model_bridge")
"""Imported once, before workers are forked: they take seconds."""


class Processes:
    """An executor on this machine.

    Workers end with the process that started them, however that ends.  Each has its share of the
    processors, unless ``OMP_NUM_THREADS`` says how many threads it takes.

    Parameters
    ----------
    jobs
        Workers at a time.
    """

    def __init__(self, jobs: int = 1) -> None:
        self.jobs = jobs

    def run(
        self, call: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result | Lost]]:
        """Call a function with each item, see :meth:`acdc.executors.base.Executor.run`."""
        waiting = deque((place, 1) for place in range(len(items)))
        n_workers = max(1, min(self.jobs, len(items)))
        threads = _threads(n_workers)
        idle: list[_Worker] = []
        busy: dict[Connection, _Worker] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < n_workers:
                    worker = idle.pop() if idle else _Worker(call, threads)
                    worker.begin(*waiting.popleft(), items)
                    busy[worker.pipe] = worker
                for pipe in wait(list(busy)):
                    worker = busy.pop(pipe)  # type: ignore[call-overload]  # only pipes are waited for
                    place, n_tries = worker.at
                    result, lives = worker.end()
                    idle += [worker] if lives else []
                    if result is None and n_tries < TRIES:
                        waiting.append((place, n_tries + 1))
                    else:
                        yield place, worker.death if result is None else result[0]
        finally:
            for worker in (*idle, *busy.values()):
                worker.kill()


class _Worker:
    """A process that calls a function with what comes through a pipe."""

    def __init__(self, call: Callable[[Any], Any], threads: int | None) -> None:
        self.at = -1, 0
        context = _context()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, call, threads), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends when the worker does

    def begin(self, place: int, n_tries: int, items: Sequence[Any]) -> None:
        """Begin with an item; that the worker has died shows when the result is taken."""
        self.at = place, n_tries
        try:
            self.pipe.send(items[place])
        except (BrokenPipeError, ConnectionResetError):
            return

    def end(self) -> tuple[tuple[Any] | None, bool]:
        """Return the result, None if the worker died of the call, and whether it lives."""
        try:
            result = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return None, False
        if isinstance(result, Lost):
            self.process.join()
            return (result,), False
        return (result,), True

    @property
    def death(self) -> Lost:
        """What is known of how the worker died."""
        status = self.process.exitcode or 0
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return Lost(f"its process {how}, {TRIES} times (out of memory?)")

    def kill(self) -> None:
        """End the process at once."""
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _context() -> Any:
    """Processes that are forked from one with everything imported, where the system has that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_HEAVY))
    return context


def _threads(n_workers: int) -> int | None:
    """Threads of a worker, None if the user has said how many."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, (os.cpu_count() or 1) // n_workers)


def _work(pipe: Connection, call: Callable[[Any], Any], threads: int | None) -> None:
    """Be a worker: an exception ends it, having said what it is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it is told, and ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            result = call(item)
        except BaseException as error:
            pipe.send(Lost(f"{type(error).__name__}: {error}"))
            raise
        pipe.send(result)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
