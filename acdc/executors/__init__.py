"""Where many calls run: this process, processes of this machine, Ray, or Slurm through submitit.

An executor (:class:`acdc.executors.base.Executor`) takes a function and what to call it with, and
yields results as they come.  A worker that dies costs its own call alone, which is tried once
more.  Nothing here knows what is called.
"""

from __future__ import annotations

from acdc.executors.base import Executor, Lost
from acdc.executors.chosen import EXECUTORS, HERE, Resources, chosen, resources_of
from acdc.executors.processes import Processes

__all__ = [
    "EXECUTORS",
    "HERE",
    "Executor",
    "Lost",
    "Processes",
    "Resources",
    "chosen",
    "resources_of",
]
