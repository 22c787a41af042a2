"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import secrets
from pathlib import Path
from typing import Any

from graphs.errors import InputError

__all__ = ["json_text", "write_json", "write_whole"]


def write_whole(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write a file beside its place, then rename it, so that no reader ever sees half of it.

    Parameters
    ----------
    path
        Where the file goes; an older file of that name is replaced.
    data
        The whole content; text is written as UTF-8.

    Raises
    ------
    InputError
        If the file cannot be written; an older file is then left as it was.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def json_text(value: Any) -> str:
    """Return strict JSON on one line; numbers that JSON lacks (nan, inf) become ``null``."""
    return json.dumps(_finite(value), allow_nan=False)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write what :func:`json_text` gives, indented; the file whole or not at all."""
    write_whole(path, json.dumps(_finite(value), allow_nan=False, indent=1) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
