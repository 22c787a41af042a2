"""From what a user asks for to an executor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from acdc.errors import OptionError, UnknownNameError
from acdc.executors.base import Executor
from acdc.executors.here import Here
from acdc.executors.on_ray import OnRay
from acdc.executors.processes import Processes
from acdc.executors.slurm import Slurm
from acdc.settings import Checked, option

__all__ = ["EXECUTORS", "HERE", "Resources", "chosen", "resources_of"]

HERE = "here"
EXECUTORS = {
    HERE: "this process, one call after another",
    "processes": "processes of this machine",
    "ray": "a Ray cluster, or one that is started on this machine",
    "slurm": "jobs of Slurm, through submitit",
    "slurm-local": "submitit's stand-in for Slurm, on this machine",
}
"""Name -> where calls run."""


@dataclass(frozen=True)
class Resources(Checked):
    """Where many runs run, and how many at a time.

    Parameters
    ----------
    name
        One of :data:`EXECUTORS`.
    jobs
        Runs at a time.
    address
        Of a Ray cluster.
    gpus
        Of each run, on Ray and Slurm.
    more
        For submitit's ``update_parameters``.

    Raises
    ------
    OptionError
        If something is asked for that the executor does not have.
    """

    name: str = option("processes", "Where runs run.", choices=EXECUTORS)
    jobs: int = option(1, "Runs at a time.", at_least=1, at_most=10_000)
    address: str | None = option(None, "Of a Ray cluster.")
    gpus: float = option(0.0, "Of each run.", at_least=0, at_most=64)
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in EXECUTORS:
            raise UnknownNameError("executor", self.name, EXECUTORS)
        super().__post_init__()
        if self.address is not None and self.name != "ray":
            raise OptionError(f"address {self.address!r}: executor {self.name!r} has none, ray has")
        if self.jobs > 1 and self.name == HERE:
            raise OptionError(f"jobs {self.jobs}: executor 'here' runs one; choose 'processes'")
        if self.gpus and self.name in (HERE, "processes"):
            raise OptionError(
                f"gpus {self.gpus:g}: processes take the device that the runs name; leave it out, "
                "or choose executor 'ray'"
            )
        if self.more and not self.name.startswith("slurm"):
            raise OptionError(
                f"executor {self.name!r} takes no {next(iter(self.more))!r}: it takes jobs"
                + (", address and gpus" if self.name == "ray" else "")
            )


def chosen(resources: Resources, folder: Path) -> Executor:
    """Return the executor that is asked for; ``folder`` is for its own files.

    Raises
    ------
    OptionError
        If its package is not installed, or it refuses what is asked for.
    """
    if resources.name == HERE:
        return Here()
    if resources.name == "processes":
        return Processes(resources.jobs)
    if resources.name == "ray":
        return OnRay(resources.jobs, resources.address, resources.gpus)
    local = resources.name == "slurm-local"
    return Slurm(folder, resources.jobs, resources.gpus, resources.more, local=local)


def resources_of(asked: Mapping[str, Any], alone: str = "processes") -> Resources:
    """Return the resources that a table or options ask for; what is None is not asked for.

    Parameters
    ----------
    asked
        Fields of :class:`Resources`, and further ones for submitit.
    alone
        Executor where none is named and nothing but the number of jobs speaks for another.
    """
    own = {one.name for one in fields(Resources)} - {"more"}
    given = {name: value for name, value in asked.items() if value is not None}
    more = {name: value for name, value in given.items() if name not in own}
    if given.get("jobs", 1) == 1 and not set(given) - {"jobs"}:
        given["name"] = alone
    return Resources(**{k: v for k, v in given.items() if k in own}, more=more)
