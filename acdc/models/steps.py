"""Checkpoints by name: ``NAME@STEP`` is a model as it was after so many steps of its training.

=========================  =====================================================================
``NAME``                   where step 400 is looked for
=========================  =====================================================================
known, or a local folder   ``checkpoints/400`` and ``400`` in its folder, where ``000400``,
                           ``step400`` and ``checkpoint-400`` (of Hugging Face's Trainer) are that
                           step, too
a repository on the hub    the revision of that very name, as ``EleutherAI/pythia-70m@step1000``
=========================  =====================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from acdc.errors import ModelError

__all__ = ["list_steps", "said_steps", "split_step", "step_folder", "step_number"]

_STEP = re.compile(r"(?:checkpoint-|step)?(\d{1,18})")
_CHECKPOINTS = "checkpoints"
_MOST_LISTED = 20


def split_step(name: str) -> tuple[str, str | None]:
    """Return the name of a model, and the step of its training that is asked for, if one is.

    Examples
    --------
    >>> split_step("EleutherAI/pythia-70m@step1000"), split_step("gpt2")
    (('EleutherAI/pythia-70m', 'step1000'), ('gpt2', None))
    """
    base, at, step = name.rpartition("@")
    return (base, step) if at and base and step and "/" not in step else (name, None)


def step_number(text: str) -> int | None:
    """Return the step that a name means; None if it means none.

    Examples
    --------
    >>> [step_number(text) for text in ("000400", "step1000", "checkpoint-500", "main")]
    [400, 1000, 500, None]
    """
    found = _STEP.fullmatch(text)
    return None if found is None else int(found[1])


def list_steps(folder: Path) -> dict[int, list[Path]]:
    """Return the folders of checkpoints by step, in order; more than one where two claim a step.

    Parameters
    ----------
    folder
        Of a model, or one that holds folders of checkpoints.

    Raises
    ------
    ModelError
        If it cannot be read.
    """
    found: dict[int, list[Path]] = {}
    try:
        for home in (folder / _CHECKPOINTS, folder):
            for path in sorted(home.iterdir()) if home.is_dir() else ():
                step = step_number(path.name)
                if step is not None and (path / "config.json").is_file():
                    found.setdefault(step, []).append(path)
    except OSError as error:
        raise ModelError(f"{folder}: its checkpoints cannot be listed: {error}") from error
    return dict(sorted(found.items()))


def step_folder(folder: Path, step: str, name: str) -> Path:
    """Return the folder of a checkpoint.

    Parameters
    ----------
    folder
        Of the model.
    step
        As it was asked for.
    name
        Of the model with its step, for messages.

    Raises
    ------
    ModelError
        If there is no such step, or two folders claim it.
    """
    steps, wanted = list_steps(folder), step_number(step)
    if wanted is None or wanted not in steps:
        has = said_steps(map(str, steps), step)
        raise ModelError(f"model {name!r}: {folder} {has}")
    first, *others = steps[wanted]
    if others:
        raise ModelError(f"model {name!r}: both {first} and {others[0]} are that step: name one")
    return first


def said_steps(steps: Iterable[str], wanted: str) -> str:
    """Say which steps there are instead of one that there is not.

    Examples
    --------
    >>> said_steps(["100", "0"], "50")
    "has no step '50': it has 0, 100"
    >>> said_steps([], "50")
    "has no step '50': it has no checkpoints"
    """
    known = sorted(steps, key=lambda step: (_number(step), step))
    if not known:
        return f"has no step {wanted!r}: it has no checkpoints"
    if len(known) <= _MOST_LISTED:
        return f"has no step {wanted!r}: it has {', '.join(known)}"
    nearest = sorted(known, key=lambda step: abs(_number(step) - _number(wanted)))[:_MOST_LISTED]
    listed = ", ".join(step for step in known if step in nearest)
    return f"has no step {wanted!r}: of its {len(known)} the nearest are {listed}"


def _number(step: str) -> int:
    """Return the step of a name, 0 for what is none, as ``main``."""
    return step_number(step) or 0
