"""The C library's allocator: memory that was given back is used again, or goes to the system.

glibc takes large pieces from the system one by one, and gives each back when it is freed, but what
counts as large grows with what is freed, up to 32 MiB.  Pieces below that are cut from one heap,
and a hole left by one of them does not hold another of its size: ``memalign``, which tensors come
from, looks for a little more than it needs.  Of long prompts the holes came to a third of what was
held (``benchmarks/results/memory/extent.md``).
"""

from __future__ import annotations

import ctypes
from functools import cache

__all__ = ["give_back", "keep_large_pieces_apart"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, as in malloc.h
_LARGE = 16 << 20
"""Bytes of a piece that the system is asked for.  Smaller ones are made and freed too often: with
4 MiB attribution of long prompts took a sixth more time, with 16 MiB none."""
_KEPT = 64 << 20
"""Bytes that are kept at the end of the heap: as much as glibc would at most, left to itself."""


@cache
def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc, None elsewhere (macOS, Windows, musl)."""
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None


def keep_large_pieces_apart() -> None:
    """Take large pieces of memory from the system one by one, in the whole process from now on.

    For a program's start; where the allocator is another, nothing is done.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(_TRIM_THRESHOLD, _KEPT)
        library.mallopt(_MMAP_THRESHOLD, _LARGE)


def give_back() -> None:
    """Give what is free to the system; between parts of a computation that are of other sizes."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)
