"""Built-in tasks run on small models here: the engine is tested, and the suite stays quick.

The model that comes with the package, which tasks run on unless the user names one, has tests of
its own: ``tests/test_language_small.py``.
"""

from __future__ import annotations

from dataclasses import replace

__all__ = ["MODELS", "SHIPPED", "install", "restore"]

MODELS = {
    "ioi": "ioi-small",
    "pronoun": "ioi-small",
    "induction": "ioi-small",
    "docstring": "docstring-small",
}
"""Task -> model."""

SHIPPED: dict[str, str] = {}
"""Task -> the model that it really runs on, once :func:`install` was called."""


def install() -> None:
    """Exchange the tasks' default models, for this process."""
    from acdc.tasks import TASKS

    SHIPPED.update({name: spec.model for name, spec in TASKS.items()})
    for task, model in MODELS.items():
        TASKS._things[task] = replace(TASKS[task], model=model)


def restore() -> None:
    """Undo it."""
    from acdc.tasks import TASKS

    for task, model in SHIPPED.items():
        TASKS._things[task] = replace(TASKS[task], model=model)
