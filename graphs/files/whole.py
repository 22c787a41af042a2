"""Files that are written whole or not at all, and read only if they are files of bounded size.

Every file that a user names is read here, or its path is checked here before a library opens it:
a device never ends, a pipe waits for ever, and a file of any size fills the memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from graphs.errors import InputError
from graphs.files.beside import beside

__all__ = [
    "MIB",
    "check_regular",
    "json_indented",
    "json_text",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_text",
    "write_json",
    "write_whole",
]

PathLike = str | os.PathLike[str]

MIB = 1 << 20
"""Bytes of the unit in which limits are given."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON spells one, alone or in a pair


def check_regular(
    path: PathLike, limit: int, failure: type[InputError] = InputError
) -> os.stat_result:
    """Return what the system says of a file, if it is one that may be read.

    For files that a library opens by their name; others are read by :func:`read_bytes`.

    Parameters
    ----------
    path
        A file; a link counts as what it leads to.
    limit
        Bytes that it may have at most.
    failure
        What is raised.

    Raises
    ------
    InputError
        (``failure``)  If it is not there, no regular file (a folder, a device, a pipe), or larger.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise failure(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # a null byte, a lone surrogate
        raise failure(f"cannot read {path}: no path has such a name ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise failure(f"cannot read {path}: it is {what}, expected a file")
    if status.st_size > limit:
        raise failure(
            f"cannot read {path}: it has {status.st_size / MIB:,.0f} MiB, expected at most "
            f"{limit / MIB:,.0f}: is it the right file?"
        )
    return status


def read_bytes(path: PathLike, limit: int, failure: type[InputError] = InputError) -> bytes:
    """Return the content of a file; parameters and errors as :func:`check_regular`."""
    size = check_regular(path, limit, failure).st_size
    try:
        with open(path, "rb") as file:
            content = file.read(size + 1)
    except OSError as error:
        raise failure(f"cannot read {path}: {error.strerror or error}") from error
    if len(content) != size:
        raise failure(f"cannot read {path}: its size changes while it is read")
    return content


def read_text(path: PathLike, limit: int, failure: type[InputError] = InputError) -> str:
    """Return the text of a UTF-8 file, without a byte order mark; as :func:`read_bytes`."""
    content = read_bytes(path, limit, failure)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise failure(f"{path}: not UTF-8 text ({error.reason}): save it as UTF-8") from error


def read_json(path: PathLike, limit: int, failure: type[InputError] = InputError) -> Any:
    """Return the value in a JSON file; errors as :func:`read_bytes` and :func:`parse_json`."""
    return parse_json(read_bytes(path, limit, failure), path, failure)


def parse_json(text: str | bytes, where: object, failure: type[InputError] = InputError) -> Any:
    """Return the value that a JSON text spells; ``where`` it is from stands in the message.

    Raises
    ------
    InputError
        (``failure``)  If it is none, nests too deeply, has a number of thousands of digits, or
        half of a character (a lone surrogate), which no file, terminal or tokenizer can take.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise failure(
            f"{where}: no JSON that can be read ({_reason(error)}); is the file truncated?"
        ) from error
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    if isinstance(error, UnicodeEncodeError):
        return f"a text with a lone surrogate, {error.object[error.start]!r}"
    return str(error)


def write_whole(path: PathLike, data: str | bytes | Iterable[memoryview]) -> None:
    """Write a file beside its place, then move it there, so that no reader ever sees half of it.

    What killed processes left of the same file goes, see :mod:`graphs.files.beside`.

    Parameters
    ----------
    path
        Where the file goes; an older file of that name is replaced.
    data
        The whole content, or its parts; text is written as UTF-8.

    Raises
    ------
    InputError
        If the file cannot be written, or something that is no file is there; an older file is
        then left as it was.
    """
    path = Path(path)
    if isinstance(data, str):
        data = data.encode()
    parts = (memoryview(data),) if isinstance(data, bytes) else data
    if path.exists() and not path.is_file():  # root could replace /dev/null by a file
        raise InputError(f"cannot write {path}: it is no file but a folder, device or pipe")
    try:
        with beside(path) as place:
            new = place / "new"
            with open(new, "xb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def json_text(value: Any) -> str:
    """Return strict JSON on one line; numbers that JSON lacks (nan, inf) become ``null``."""
    return json.dumps(_finite(value), allow_nan=False)


def json_indented(value: Any) -> str:
    """Return what :func:`json_text` gives on lines of its own, for people to read."""
    return json.dumps(_finite(value), allow_nan=False, indent=1)


def write_json(path: PathLike, value: Any) -> None:
    """Write what :func:`json_indented` gives; the file whole or not at all."""
    write_whole(path, json_indented(value) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
