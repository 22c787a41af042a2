"""What a built-in task is, and the table of them: a task is a module that registers its spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from acdc.registry import Registry
from acdc.tasks.prompts import Generated

__all__ = ["DEFAULT_METRIC", "TASKS", "TaskSpec"]

DEFAULT_METRIC = "logit_diff"
"""Metric of tasks that have no other of their own, and of task files."""


@dataclass(frozen=True)
class TaskSpec:
    """What a built-in task is.

    Parameters
    ----------
    name
        What the user types.
    description
        One line for ``acdc list tasks``.
    model
        The model that the task runs on unless the user names one.
    generate
        ``generate(tokenizer, rng, n_prompts, corruption)`` returns the pairs.
    corruptions
        Name -> what is corrupted; the first is the default.
    of_ids
        Whether prompts are drawn from token ids rather than made of text.  Then ``generate``
        is given the usable ids in the tokenizer's place, and the model needs no tokenizer.
    metric
        The metric that the task's authors use.
    spans
        Labels of positions that every prompt has.
    """

    name: str
    description: str
    model: str
    generate: Callable[[Any, Random, int, str], list[Generated]]
    corruptions: Mapping[str, str]
    of_ids: bool = False
    metric: str = DEFAULT_METRIC
    spans: tuple[str, ...] = ()

    @property
    def default_corruption(self) -> str:
        """The corruption that is used unless the user names one."""
        return next(iter(self.corruptions))


TASKS: Registry[TaskSpec] = Registry("task", TaskSpec, "acdc.tasks", package="acdc.tasks")
"""Every task that has a name."""
