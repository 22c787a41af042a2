"""Which model a reference is of: sizes and a digest of the weights beside it.

``python -m benchmarks.references.signed`` writes them anew into the references of all models that
are made here; those who make one call :func:`sign`.
"""

from __future__ import annotations

from pathlib import Path

from acdc.models import load_model
from acdc.models.identity import sizes_of, weights_digest
from benchmarks.references import REFERENCES
from graphs.errors import ReferenceFileError
from graphs.files.whole import MIB, read_json, write_json

__all__ = ["sign"]

_MOST_BYTES = 64 * MIB


def sign(folder: Path) -> None:
    """Write into every reference of a model's folder which model it is of."""
    model, _ = load_model(str(folder))
    own = {"configuration": sizes_of(model), "weights": weights_digest(model)}
    for path in sorted(folder.glob("reference*.json")):
        content = read_json(path, _MOST_BYTES, ReferenceFileError)
        edges = content.pop("edges")  # the long list stays last
        write_json(path, {**content, **own, "edges": edges})


if __name__ == "__main__":
    for folder in sorted({path.parent for path in REFERENCES.values()}):
        if (folder / "config.json").is_file():
            sign(folder)
