"""Reference circuits: published ones beside this file, and those of the models made here."""

from __future__ import annotations

from pathlib import Path

__all__ = ["REFERENCES", "reference_files"]

_HERE = Path(__file__).parent
_MADE_HERE = ("compiled", "planted", "trained")


def reference_files(folder: Path) -> dict[str, Path]:
    """Return the reference files below the folder ``benchmarks``, by name.

    ``references/ioi.json`` is ``ioi``; ``compiled/models/tracr-reverse/reference-zero.json`` is
    ``tracr-reverse-zero``, and plain ``reference.json`` has the model's name.
    """
    found = {path.stem: path for path in sorted((folder / "references").glob("*.json"))}
    for kind in _MADE_HERE:
        for path in sorted((folder / kind / "models").glob("*/reference*.json")):
            found[path.parent.name + path.stem.removeprefix("reference")] = path
    return found


REFERENCES: dict[str, Path] = reference_files(_HERE.parent)
"""Reference files by name; the entry point ``acdc.references`` offers them."""
