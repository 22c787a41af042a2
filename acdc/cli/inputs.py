"""What commands make of the paths and numbers that they are given.

Nothing is written here: a mistake is found before a command starts to compute.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from acdc.executors import Resources

_MOST_MEMORY = 1 << 20  # GiB

__all__ = [
    "check_file",
    "check_page",
    "to_bytes",
    "to_resources",
]


def to_bytes(memory: float) -> int:
    """Bytes of so many GiB."""
    from acdc.errors import OptionError

    if not 0 < memory < math.inf:
        raise OptionError(f"memory {memory:g}: expected GiB above 0, as 1")
    if memory > _MOST_MEMORY:
        raise OptionError(f"memory {memory:g}: expected at most {_MOST_MEMORY:,} GiB")
    return int(memory * 2**30)


def to_resources(
    executor: str | None, jobs: int | None, address: str | None, gpus: float | None
) -> Resources:
    """Where a command's runs go: into this process, where nothing else is asked for."""
    from acdc.executors import HERE, resources_of

    asked = {"name": executor, "jobs": jobs, "address": address, "gpus": gpus}
    return resources_of(asked, HERE)


def check_file(path: Path, overwrite: bool) -> None:
    """Refuse to write a file that exists already, or into a folder that does not exist."""
    from acdc.errors import OutputError

    if path.exists() and not path.is_file():
        raise OutputError(
            f"{str(path)!r} is no file but a folder or device: choose another with --out"
        )
    if path.exists() and not overwrite:
        raise OutputError(f"{str(path)!r} exists: choose another with --out or pass --overwrite")
    if not path.parent.is_dir():
        raise OutputError(f"folder {str(path.parent)!r} does not exist: create it first")


def check_page(path: Path, overwrite: bool) -> None:
    """Refuse to write a page that is not called one, or as :func:`check_file` does."""
    from acdc.errors import OptionError

    if path.suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"page {str(path)!r}: expected a name ending in .html")
    check_file(path, overwrite)
