"""A command in the processes that torchrun starts: the first speaks, an end is said once.

Nothing heavy is imported where there is one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import NoReturn

import typer

__all__ = ["SHARED", "check_shared", "ends", "is_first", "processes", "quiet"]

SHARED = ("discover", "sweep", "evaluate", "stability")
"""Commands whose prompts processes share."""


def _several() -> bool:
    """Whether ``torchrun`` started this process and others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1"


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return not _several() or os.environ["RANK"] == "0"


@contextmanager
def processes() -> Iterator[None]:
    """Join the other processes while a block runs."""
    if not _several():
        yield
        return
    from acdc.engine.processes import together

    with together():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Let a command say nothing while a block runs, but in the first process."""
    with ExitStack() as stack:
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def check_shared(command: str | None) -> None:
    """Refuse a command that several processes would all do alike; OptionError."""
    if not _several() or command is None or command in SHARED:
        return
    from acdc.errors import OptionError

    raise OptionError(
        f"{command} under torchrun: processes share the prompts of {', '.join(SHARED)}; start this "
        "one without it"
    )


def ends(message: str, status: int) -> NoReturn:
    """End the process with a line on standard error, unless another one has said why."""
    if _speaks():
        typer.echo(f"acdc: {message}", err=True)
    sys.exit(status)


def _speaks() -> bool:
    if not _several():
        return True
    from acdc.engine.processes import here

    us = here()
    return us.claim() if us.size > 1 else is_first()
