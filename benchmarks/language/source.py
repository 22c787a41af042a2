"""Real text that is on every machine: the standard library of the running Python.

Its source and docstrings are under the PSF licence (version 2), which allows to use and
distribute them; model cards name it.  Files differ between Python versions, so cards carry the
version and a digest.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LICENCE", "Corpus", "read_corpus"]

LICENCE = "Python Software Foundation License Version 2 (PSF-2.0)"

_LEFT_OUT = frozenset(
    {"site-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "lib2to3",
     "ensurepip", "turtledemo", "config"}
)  # fmt: skip
"""Tests and tables: they repeat themselves."""

_LARGEST = 200_000
"""Bytes of the largest source file taken; larger ones are tables."""


@dataclass(frozen=True)
class Corpus:
    """Texts of the standard library.

    Parameters
    ----------
    source
        Source files, in order of their paths.
    prose
        Docstrings of those files, and Python's own help topics.
    """

    source: tuple[str, ...]
    prose: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of all texts."""
        found = hashlib.sha256()
        for text in (*self.source, *self.prose):
            found.update(text.encode())
        return found.hexdigest()


def read_corpus(folder: Path | None = None, n_files: int | None = None) -> Corpus:
    """Read the standard library.

    Parameters
    ----------
    folder
        Where it is; by default that of the running Python.
    n_files
        Only the first files, for trials.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in folder.rglob("*.py") if _LEFT_OUT.isdisjoint(_parts(p, folder)))
    texts = {path: path.read_text(encoding="utf-8", errors="ignore") for path in files[:n_files]}
    source = tuple(t for t in texts.values() if t.isascii() and 200 < len(t) < _LARGEST)
    prose = [doc for text in source for doc in _docstrings(text)]
    topics = folder / "pydoc_data" / "topics.py"
    if topics.is_file() and n_files is None:
        prose += _strings(topics.read_text(encoding="utf-8"))
    return Corpus(source, tuple(doc for doc in prose if len(doc) > 80))


def _parts(path: Path, folder: Path) -> tuple[str, ...]:
    return path.relative_to(folder).parts[:-1]


def _docstrings(text: str) -> Iterator[str]:
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented):
            doc = ast.get_docstring(node)
            if doc is not None:
                yield doc


def _strings(text: str) -> list[str]:
    """Return the string constants of a file of help topics."""
    return [
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
