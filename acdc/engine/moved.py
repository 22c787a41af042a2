"""What a search has changed since its start, written down so that it can be put back.

Decisions alone do not say to the last bit where a search is: its values are sums in the order of
its batches.  A killed search that went on from decisions would go another way where an edge is
within rounding of the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Moved", "Read", "StateError"]

Read = Callable[[str, tuple[int, ...]], NDArray[np.generic]]
"""``(type, shape)`` -> the next array that was written down, which has both."""

_KINDS = {torch.float64: "<f8", torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<i2"}
"""How numbers are written down; numpy has no bfloat16, whose bits are."""


class StateError(ValueError):
    """No search writes down such a state."""


class Moved:
    """Where current values are not those of the start.

    Values are rows ``[batch, pos, width]`` under some names; those of a name have one width.

    Parameters
    ----------
    n_rows
        By name.
    n_pos
        Positions.
    """

    def __init__(self, n_rows: Mapping[str, int], n_pos: int) -> None:
        self._at = {name: np.zeros((n, n_pos), dtype=bool) for name, n in n_rows.items()}

    def note(self, name: str, row: int, positions: Sequence[int]) -> None:
        """Record that a row is written to at some positions."""
        self._at[name][row, positions] = True

    def take(self, value: Callable[[str, int], Tensor]) -> Iterator[NDArray[np.generic]]:
        """Yield by name where values moved, ``[row, pos]``, and to what, ``[moved, batch, width]``.

        ``value`` says what a row of a name is now; nothing follows a name of which none moved.
        """
        for name, at in self._at.items():
            yield at
            if at.any():
                rows = (value(name, int(row))[:, at[row]] for row in np.flatnonzero(at.any(1)))
                yield _to_numpy(torch.cat([x.transpose(0, 1) for x in rows]))

    def put(self, value: Callable[[str, int], Tensor], read: Read) -> None:
        """Write into the rows of the start what :meth:`take` gave.

        Raises
        ------
        StateError
            If a number is not finite.
        """
        for name, at in self._at.items():
            at[:] = read("|b1", at.shape)
            rows = np.flatnonzero(at.any(1))
            if not len(rows):
                continue
            first = value(name, int(rows[0]))
            shape = int(at.sum()), first.shape[0], first.shape[2]
            moved = _to_torch(read(_KINDS[first.dtype], shape), first)
            if not moved.isfinite().all():
                raise StateError(f"a value of {name!r} is not finite")
            for row, part in zip(rows, moved.split(at.sum(1)[rows].tolist()), strict=True):
                value(name, int(row))[:, at[row]] = part.transpose(0, 1)


def _to_numpy(x: Tensor) -> NDArray[np.generic]:
    x = x.cpu()
    found: NDArray[np.generic] = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
    return found


def _to_torch(x: NDArray[np.generic], like: Tensor) -> Tensor:
    found = torch.from_numpy(x)
    return (found.view(torch.bfloat16) if like.dtype == torch.bfloat16 else found).to(like.device)
