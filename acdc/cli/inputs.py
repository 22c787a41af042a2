"""What commands make of the paths and numbers that they are given.

Nothing is written here: a mistake is found before a command starts to compute.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acdc.settings import Settings
    from graphs import Circuit

_MOST_MEMORY = 1 << 20  # GiB

__all__ = [
    "check_file",
    "check_page",
    "circuit_and_settings",
    "circuit_file",
    "read_circuit",
    "to_bytes",
]


def to_bytes(memory: float) -> int:
    """Bytes of so many GiB."""
    from acdc.errors import OptionError

    if not 0 < memory < math.inf:
        raise OptionError(f"memory {memory:g}: expected GiB above 0, as 1")
    if memory > _MOST_MEMORY:
        raise OptionError(f"memory {memory:g}: expected at most {_MOST_MEMORY:,} GiB")
    return int(memory * 2**30)


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


def circuit_file(path: Path) -> Path:
    """File of a circuit, given itself or the folder of its run."""
    from acdc.errors import CircuitFileError

    if not path.exists():
        raise CircuitFileError(f"{path}: no such folder or file; give a run or a circuit file")
    if not path.is_dir():
        return path
    file = path / "circuit.json"
    if not file.exists():
        from acdc.runs.folder import check_single  # torch takes seconds

        check_single(path)
    return file


def read_circuit(path: Path) -> Circuit:
    """Read a circuit file of any format: JSON, or MIB's ``.pt``."""
    if path.suffix.lower() == ".pt":
        from acdc.runs.pt import read_pt  # torch takes seconds

        return read_pt(path)
    from graphs.files.formats import load_circuit

    return load_circuit(path)


def circuit_and_settings(path: Path, **asked: Any) -> tuple[Circuit, Settings, Settings | None]:
    """A circuit, the settings of its run with those asked for on top, and its run's alone.

    Whether a model's own code may run is said by the command, never by the run.
    """
    from acdc.errors import OptionError
    from acdc.runs.discover import check_settings
    from acdc.runs.folder import load_run
    from acdc.settings import Settings
    from acdc.tasks import is_task_file

    discovery, trusted = None, asked.pop("trust_remote_code", False)
    if circuit_file(path) != path:
        discovery, circuit, summary = load_run(path)
    else:
        circuit, summary = read_circuit(path), {}
        if asked["task"] is None:
            raise OptionError(f"{path} is a circuit file: say with --task what to measure it on")
    chosen = {name: value for name, value in asked.items() if value is not None}
    if "task" in chosen and chosen["task"] != summary.get("task"):
        summary.pop("corruption", None)
        summary["holdout"] = 0.0 if is_task_file(chosen["task"]) else None
        if "n_prompts" not in chosen:
            summary.pop("n_prompts", None)
    settings = Settings.read({**summary, **chosen}).replace(trust_remote_code=trusted)
    return circuit, check_settings(settings), discovery
