"""What a user can get wrong about graphs and circuit files.

::

    InputError                 one clear line; the command line exits with status 2
    ├── GraphError             a node or edge that the graph does not have
    │   └── ReferenceFileError a reference circuit's file that cannot be used
    ├── CircuitFileError       a circuit file that cannot be read
    └── acdc.errors.*          the engine's own (see there)

Every message says what was got, what was expected and what to do, on one line of bounded length
without control characters, whatever a file or an option held.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice
from typing import Any

from graphs.text import one_line

__all__ = [
    "CircuitFileError",
    "GraphError",
    "InputError",
    "ReferenceFileError",
    "did_you_mean",
]


_MOST_NAMES = 100_000


class InputError(ValueError):
    """A mistake in what the user gave; its message is one line (:func:`graphs.text.one_line`)."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors of other processes have their line, whatever they were made of."""
        return _restored, (type(self), str(self))


def _restored(kind: type[InputError], line: str) -> InputError:
    error = kind.__new__(kind, line)
    error.args = (line,)
    return error


class GraphError(InputError):
    """A node, edge or shape that does not exist in the graph at hand."""


class ReferenceFileError(GraphError):
    """A reference file that is truncated, malformed, or names what its graph lacks."""


class CircuitFileError(InputError):
    """A circuit file that is truncated, malformed or of another graph."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"did you mean a, b?"`` with the nearest known names, or all of a short list.

    Of a graph of millions of latents the first names alone are looked at.
    """
    names = sorted(islice(known, _MOST_NAMES))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(near)}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"known: {shown}"
