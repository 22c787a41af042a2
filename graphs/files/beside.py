"""Where output is written before it appears in its place, all of it at once.

A folder ``.NAME-xxxxxxxx`` beside an output called NAME holds what is being written, and a file
that says so.  A process that ends removes its folder; one that is killed cannot, so whoever writes
the same output next does it.  A folder is a leftover only if it holds that file and nobody has a
lock on it, which the system drops with the process that has it: the folder of a process that still
writes, on any machine, and what a user made of such a name stay.  (A process may be killed before
it has written that file: an empty folder of such a name goes too.)
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["beside", "new_files", "remove_leftovers", "settle"]

_MARK = ".being-written"
_FORMAT = "being-written-by-acdc-1"
_MOST_MARK = 10_000  # bytes
_WHOLE = "whole"
"""What is all written and moves to its place."""

_LONGEST = 100
"""Bytes of the output's name that the folder's name takes up; file systems have 255."""


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """Yield a folder beside an output, on the same file system; it is gone at the end.

    Leftovers of the same output are removed first, see :func:`settle`.

    Parameters
    ----------
    output
        What is going to be written; its folder exists.

    Raises
    ------
    OSError
        If the folder cannot be made.
    """
    settle(output)
    folder, mark = _make(output)
    try:
        yield folder
    finally:
        try:
            _remove(folder)
        finally:  # also if the process is told to end meanwhile
            _remove(folder)
            mark.close()


@contextmanager
def new_files(folder: Path, then: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield an empty folder, whose files appear in ``folder`` at the end, all or none.

    Once they begin to, a process that is killed has done its work: the next one that wants to
    write to ``folder`` moves the rest, see :func:`settle`.

    Parameters
    ----------
    folder
        Need not exist, but what it is in does.  Files of other names in it stay.
    then
        Called when all have appeared, before the folder beside goes.

    Raises
    ------
    OSError
        If something cannot be written.
    """
    with beside(folder) as place:
        new = place / "new"
        new.mkdir()
        yield new
        new.rename(place / _WHOLE)
        try:
            _appear(place / _WHOLE, folder)
        finally:  # also if the process is told to end meanwhile
            _appear(place / _WHOLE, folder)
        then()


def settle(output: Path) -> bool:
    """Remove what killed processes left beside an output; finish what was all written.

    Returns
    -------
    bool
        Whether one of them had all written, a folder, so that all files have appeared by now.
    """
    finished = False
    for folder, mark in _leftovers(output.parent, _stem(output)):
        if mark.get("output") != output.name or output.is_symlink():
            continue  # what is there may be anybody's: nothing is moved to where a link leads
        if (folder / _WHOLE).is_dir():
            try:
                _appear(folder / _WHOLE, output)
            except OSError:  # what is there now is in its way
                continue
            finished = True
        _remove(folder)
    return finished


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder, whatever they wrote there."""
    for left, _ in _leftovers(folder, None):
        _remove(left)


def _stem(output: Path) -> str:
    """What the name of the folder begins with, no longer than a name may be."""
    return "." + os.fsencode(output.name)[:_LONGEST].decode(errors="ignore") + "-"


def _make(output: Path) -> tuple[Path, BinaryIO]:
    """Make a folder and lock its mark."""
    about = json.dumps({"format": _FORMAT, "output": output.name}).encode()
    while True:
        folder = output.parent / (_stem(output) + secrets.token_hex(4))
        made = False
        try:
            folder.mkdir(mode=0o700)
            made = True
            mark = open(folder / _MARK, "xb")  # noqa: SIM115  (locked as long as it is open)
            _lock(mark, wait=True)
            mark.write(about)
            mark.flush()
        except FileNotFoundError:
            if made:  # taken for a leftover, before it had a mark
                continue
            raise
        except OSError:
            if made:
                _remove(folder)
            raise
        except BaseException:  # told to end; the name is of this very moment, nobody else's
            _remove(folder)
            raise
        if os.fstat(mark.fileno()).st_nlink:
            return folder, mark
        mark.close()  # taken for a leftover, before it was locked


def _leftovers(parent: Path, stem: str | None) -> Iterator[tuple[Path, dict[str, object]]]:
    """Yield leftovers in a folder, locked meanwhile, and what their marks say."""
    pattern = re.compile((".*-" if stem is None else re.escape(stem)) + "[0-9a-f]{8}", re.DOTALL)
    try:
        names = [name for name in os.listdir(parent) if pattern.fullmatch(name)]
    except OSError:  # not there yet, or it may not be listed
        return
    for name in names:
        folder = parent / name
        if folder.is_symlink() or (folder / _MARK).is_symlink():
            continue
        try:
            with open(folder / _MARK, "r+b") as mark:
                about = json.loads(mark.read(_MOST_MARK))
                ours = isinstance(about, dict) and about.get("format") == _FORMAT
                if ours and _lock(mark, wait=False):
                    yield folder, about
        except FileNotFoundError:  # killed before there was a mark
            with suppress(OSError):  # there is more in it: somebody else's
                folder.rmdir()
        except (OSError, ValueError):  # a mark that says something else
            continue


def _appear(whole: Path, folder: Path) -> None:
    """Move all that is whole to its place; what is not there any more has moved."""
    if whole.is_dir():
        if folder.exists():
            _move(whole, folder)
        else:
            whole.rename(folder)


def _move(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        inside = target / path.name
        if path.is_dir() and inside.is_dir() and not inside.is_symlink():
            _move(path, inside)
        else:
            path.replace(inside)


def _remove(folder: Path) -> None:
    """Remove a folder, what marks it last: if killed meanwhile, it is a leftover still."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != _MARK:
                path.unlink()
        (folder / _MARK).unlink(missing_ok=True)
        folder.rmdir()


if sys.platform == "win32":  # pragma: no cover

    def _lock(file: BinaryIO, *, wait: bool) -> bool:
        """Lock nothing: who holds what is not asked here, and no leftover is taken for one."""
        return False

else:
    import fcntl

    def _lock(file: BinaryIO, *, wait: bool) -> bool:
        """Lock a file for as long as it is open; False if another has it, or nobody can."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:  # of another process; or a file system without locks
            return False
        return True
