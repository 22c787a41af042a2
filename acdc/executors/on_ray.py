"""A Ray cluster, or a Ray of this machine alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from acdc.errors import OptionError
from acdc.executors.base import TRIES, Lost
from graphs.text import one_line

__all__ = ["OnRay"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class OnRay:
    """An executor on Ray, which tries a call again whose worker died.

    No usage statistics are sent.

    Parameters
    ----------
    jobs
        Workers of a Ray that is started here; a cluster has as many as it has processors.
    address
        Of a cluster (``auto``, ``ray://host:10001``, ``host:6379``); None: one is started here,
        and ends with the calls.
    gpus
        Of each call; fractions share one.

    Raises
    ------
    OptionError
        If Ray is not installed.
    """

    def __init__(self, jobs: int = 1, address: str | None = None, gpus: float = 0.0) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise OptionError(
                "executor 'ray' needs the package ray: pip install acdc-circuits[ray]"
            ) from None
        self.jobs, self.address, self.gpus, self._ray = jobs, address, gpus, ray

    def run(
        self, call: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result | Lost]]:
        """Call a function with each item, see :meth:`acdc.executors.base.Executor.run`."""
        ray = self._ray
        self._begin()
        try:
            remote = ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=TRIES - 1)(_called)
            asked = {remote.remote(call, item): place for place, item in enumerate(items)}
            while asked:
                (done,), _ = ray.wait(list(asked), num_returns=1)
                place = asked.pop(done)
                try:
                    yield place, ray.get(done)
                except ray.exceptions.RayTaskError as error:  # an exception of the call
                    yield place, Lost(f"{type(error.cause).__name__}: {one_line(str(error.cause))}")
                except ray.exceptions.RayError as error:
                    why = one_line(str(error)) or type(error).__name__
                    yield place, Lost(f"its worker died, {TRIES} times: {why}")
        finally:
            ray.shutdown()

    def _begin(self) -> None:
        own: dict[str, Any] = {"address": self.address}
        if self.address is None:
            own = {"num_cpus": self.jobs, "include_dashboard": False}
        try:
            self._ray.init(
                **own, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True
            )
        except ConnectionError as error:
            raise OptionError(
                f"address {self.address!r}: no Ray answers there ({one_line(str(error))}): start "
                "one with ray start --head, or leave it out"
            ) from error


def _called(call: Callable[[Any], Any], item: Any) -> Any:
    return call(item)
