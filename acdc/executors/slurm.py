"""Slurm, through submitit: every call is a job of an array."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from acdc.errors import OptionError
from acdc.executors.base import TRIES, Lost
from graphs.text import one_line

__all__ = ["Slurm"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_MINUTES = 24 * 60
"""That a job may take, unless more is said; submitit's own default is five."""


class Slurm:
    """An executor on Slurm, or on submitit's stand-in for it on this machine.

    Parameters
    ----------
    folder
        For submitit's files; every machine sees it under this name.
    jobs
        That run at a time.
    gpus
        Of each job, a whole number.
    parameters
        More for submitit's ``update_parameters``: ``timeout_min``, ``slurm_partition``,
        ``mem_gb``, ``cpus_per_task``, ...
    local
        Whether processes of this machine stand in for Slurm.

    Raises
    ------
    OptionError
        If submitit is not installed, Slurm is not there, or a parameter is none of submitit's.
    """

    def __init__(
        self,
        folder: Path,
        jobs: int = 1,
        gpus: float = 0.0,
        parameters: Mapping[str, Any] | None = None,
        *,
        local: bool = False,
    ) -> None:
        try:
            import submitit
        except ImportError:
            raise OptionError(
                "executor 'slurm' needs the package submitit: pip install acdc-circuits[slurm]"
            ) from None
        if gpus != int(gpus):
            raise OptionError(f"gpus {gpus:g}: a job of Slurm has whole ones; give 0, 1, 2, ...")
        own = {"timeout_min": _MINUTES, **(parameters or {})}
        if gpus:
            own["gpus_per_node"] = int(gpus)
        try:
            self._executor = submitit.AutoExecutor(folder, cluster="local" if local else "slurm")
            if not local:
                own.setdefault("slurm_array_parallelism", jobs)
            self._executor.update_parameters(**own)
        except (RuntimeError, NameError, TypeError, ValueError) as error:  # submitit's own words
            raise OptionError(f"executor 'slurm': {one_line(str(error))}") from error
        self._most = jobs if local else None
        self._seconds = 0.2 if local else 5.0

    def run(
        self, call: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result | Lost]]:
        """Call a function with each item, see :meth:`acdc.executors.base.Executor.run`."""
        waiting = deque((place, 1) for place in range(len(items)))
        running: list[tuple[int, int, Any]] = []
        try:
            while waiting or running:
                running += self._submit(call, items, waiting, len(running))
                done = [one for one in running if one[2].done()]
                running = [one for one in running if one not in done]
                for place, n_tries, job in done:
                    result = _result(job)
                    if result is None and n_tries < TRIES:
                        waiting.append((place, n_tries + 1))
                    elif result is None:
                        yield place, Lost(f"its job died, {TRIES} times: see {job.paths.stderr}")
                    else:
                        yield place, result[0]
                if not done:
                    time.sleep(self._seconds)
        finally:
            for _, _, job in running:
                job.cancel(check=False)

    def _submit(
        self, call: Callable[[Any], Any], items: Sequence[Any], waiting: deque[tuple[int, int]],
        n_running: int,
    ) -> list[tuple[int, int, Any]]:  # fmt: skip
        """Submit what is waiting and may run, as one array."""
        room = len(waiting) if self._most is None else self._most - n_running
        chosen = [waiting.popleft() for _ in range(min(room, len(waiting)))]
        if not chosen:
            return []
        with self._executor.batch():
            jobs = [self._executor.submit(call, items[place]) for place, _ in chosen]
        return [(*one, job) for one, job in zip(chosen, jobs, strict=True)]


def _result(job: Any) -> tuple[Any] | None:
    """Result of a job that is done, None if it died."""
    import submitit

    failure = job.exception()
    if failure is None:
        return (job.result(),)
    if isinstance(failure, submitit.core.utils.FailedJobError):  # an exception of the call
        trace = [line for line in str(failure).splitlines() if line and not line.startswith(" ")]
        said = next((line for line in trace[2:] if not line.startswith(("Traceback", "-"))), "")
        return (Lost(one_line(said)),)
    return None
