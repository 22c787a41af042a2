"""Runs of a study: each has a folder of its own, and whoever runs it holds a claim meanwhile.

A study's folder holds ``cells/NAME``, an ordinary run folder each (``acdc discover``), or
``failed.json`` in it with the one line that the run ended with; and ``claims/NAME``, a file that
the process that works on the cell has a lock on.  The system drops the lock with the process,
however it ends, so that two drivers on two machines share a study, and a killed one leaves nothing
that has to be cleared.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acdc.errors import CircuitFileError, InputError, OutputError
from acdc.runs.discover import discover
from acdc.runs.folder import check_output, read_run
from acdc.settings import Settings
from acdc.tasks import is_task_file
from graphs import Circuit
from graphs.files.whole import MIB, json_text, read_json, write_json
from graphs.text import one_line

__all__ = ["BUSY", "DONE", "FAILED", "Cell", "read_cell", "run_cell", "run_cell_waiting"]

DONE, FAILED, BUSY = "done", "failed", "busy"
"""What :func:`run_cell` says."""

_FAILURE = "failed.json"
_UNSAFE = re.compile(r"[^A-Za-z0-9.+]+")
_LONGEST = 120  # characters of a name before its digest
NO_MEMORY = "out of memory: lower batch_size, memory or n_prompts"


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Parameters
    ----------
    folder
        Of the study.
    settings
        Checked, of names alone.
    memory, strict
        As of :func:`acdc.discover`.
    """

    folder: Path
    settings: Settings
    memory: int = 1 << 30
    strict: bool = False

    @property
    def name(self) -> str:
        """What it is called: words for people, and a digest of everything that decides it.

        So other settings never have the same name, whatever else is in the grid.
        """
        s = self.settings
        size = [f"tau{s.threshold:g}"] if s.threshold is not None else []
        size += [f"{s.n_edges}edges"] if s.n_edges is not None else []
        words = [Path(s.task).stem, Path(s.model or "").name, s.method, *size, f"seed{s.seed}"]
        readable = "-".join(_UNSAFE.sub("_", word) for word in words)[:_LONGEST]
        return f"{readable}-{self._digest}"

    @property
    def place(self) -> Path:
        """Folder of the run."""
        return self.folder / "cells" / self.name

    @property
    def done(self) -> bool:
        """Whether its run is there."""
        return (self.place / "run.json").is_file()

    @property
    def _digest(self) -> str:
        """Of its settings, and of its prompts where they are a file."""
        task = Path(self.settings.task)
        known = {**self.settings.plain(), "strict": self.strict}
        if is_task_file(self.settings.task):
            known["prompts"] = hashlib.sha256(task.read_bytes()).hexdigest()
        text = json.dumps(known, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_cell(cell: Cell) -> str:
    """Run a cell, unless it is there or another process works on it.

    What speaks against the run in one line (an :class:`graphs.errors.InputError`, no memory) is
    written to its folder; it is tried again when it is asked for again.

    Returns
    -------
    str
        :data:`DONE`, :data:`FAILED` or :data:`BUSY`.
    """
    return _run(cell, wait=False)


def run_cell_waiting(cell: Cell) -> str:
    """As :func:`run_cell`, waiting for another process that works on the cell."""
    return _run(cell, wait=True)


def _run(cell: Cell, *, wait: bool) -> str:
    with _claimed(cell, wait=wait) as is_ours:
        if not is_ours:
            return BUSY
        if cell.done:
            return DONE
        failure = _failure(cell)
        if failure is None:
            (cell.place / _FAILURE).unlink(missing_ok=True)
            return DONE
        cell.place.mkdir(parents=True, exist_ok=True)
        write_json(cell.place / _FAILURE, {"failed": one_line(failure), **cell.settings.plain()})
        return FAILED


def _failure(cell: Cell) -> str | None:
    """Run a cell and save it; return what it failed of, None if it did not."""
    try:
        check_output(cell.place, overwrite=True)
        run = discover(
            memory=cell.memory, checkpoint=cell.place, strict=cell.strict, **vars(cell.settings)
        )
        run.save(cell.place, overwrite=True)
    except InputError as error:
        return str(error)
    except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError
        if not isinstance(error, MemoryError) and " memory" not in str(error):
            raise
        return NO_MEMORY
    except OSError as error:  # a full disk, a folder that may not be written
        return f"{error.filename or 'file'}: {error.strerror or error}"
    return None


@contextmanager
def _claimed(cell: Cell, *, wait: bool) -> Iterator[bool]:
    """Hold the claim on a cell; False if another process has it."""
    path = cell.folder / "claims" / cell.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise OutputError(
                f"{path}: its file system has no locks ({error.strerror}): put the study elsewhere"
            ) from error
        file.truncate(0)  # who works on it, for people who look
        file.write(json_text({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        file.flush()
        yield True


def read_cell(cell: Cell) -> tuple[dict[str, Any], Circuit] | str:
    """Return the run of a cell, ``run.json`` and circuit, or what it failed of.

    A folder that holds a run of other settings is refused, as one that cannot be read.
    """
    if not cell.done:
        return _read_failure(cell.place)
    try:
        settings, circuit, summary = read_run(cell.place)
    except CircuitFileError as error:
        return one_line(str(error))
    if not _agree(settings, cell.settings):
        return f"{cell.place} holds a run of other settings: move it away"
    return summary, circuit


def _agree(found: Settings, asked: Settings) -> bool:
    """Whether a run is of settings that were asked for.

    What was left to the run (None) stands in its ``run.json`` as it was, and of prompts how many
    there were.  Where weights were held changes nothing.
    """
    own, left_out = found.plain(), {"n_prompts", "n_select", "offload", "trust_remote_code"}
    return all(
        own[name] == value
        for name, value in asked.plain().items()
        if value is not None and name not in left_out
    )


def _read_failure(place: Path) -> str:
    path = place / _FAILURE
    if not path.is_file():
        return "not run"
    try:
        found = read_json(path, MIB, CircuitFileError)
    except CircuitFileError as error:
        return one_line(str(error))
    return str(found.get("failed")) if isinstance(found, dict) else f"{path} says nothing"
