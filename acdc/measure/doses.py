"""The shape of a dose-response curve.

The response is ``f(c) = metric(c) - metric(0)`` at coefficients c from -1 to 2, ``s`` its slope at
c = 0.  In this order:

============  =====================================================================================
shape         what it means
============  =====================================================================================
flat          nowhere more than :data:`FLAT` of the metric's gap between all edges in and none
turning       it turns inside the range: it goes up and then down, or the other way, by more than
              :data:`TURN` of its whole range each time
linear        nowhere more than a share (20 % unless told otherwise) off its linear continuation
              ``s c``
saturating    it bends, and falls short of ``s c`` where it first does so
threshold     it bends, and exceeds ``s c`` there: little happens at first, then more
============  =====================================================================================

Which of the last two is said by the side of patching, c > 0; by the other where it is linear there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FLAT", "HIGH", "LOW", "SHAPES", "TURN", "Curve", "bends", "coefficients", "turns"]

LOW, HIGH = -1, 2
"""Range of the coefficients."""

FLAT = 0.01
"""Of the metric's gap: what stays below does nothing."""

TURN = 0.05
"""Of a curve's range: what it goes back by at least where it turns."""

SHAPES = ("linear", "saturating", "threshold", "turning", "flat")


def coefficients(per_unit: int) -> NDArray[np.float64]:
    """Return multiples of ``1 / per_unit`` from -1 to 2, 0 and 1 among them.

    Examples
    --------
    >>> coefficients(2).tolist()
    [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
    """
    return np.arange(LOW * per_unit, HIGH * per_unit + 1) / per_unit


@dataclass(frozen=True)
class Curve:
    """How the metric answers to doses of one component.

    Parameters
    ----------
    name
        Node or edge.
    score
        Its score of attribution patching.
    slope
        Derivative of the metric at c = 0.
    effect
        Response at c = 1: full patching.
    responses
        ``f(c)`` at each coefficient, in the metric's own unit and sign.
    bends
        Coefficient below 0 and above 0 where it leaves its linear continuation; None: nowhere.
    turns
        Coefficients at which it turns, ascending.
    shape
        One of :data:`SHAPES`.
    """

    name: str
    score: float
    slope: float
    effect: float
    responses: tuple[float, ...]
    bends: tuple[float | None, float | None]
    turns: tuple[float, ...]
    shape: str

    @classmethod
    def of(
        cls,
        name: str,
        score: float,
        slope: float,
        at: NDArray[np.float64],
        values: NDArray[np.float64],
        *,
        gap: float,
        bend: float,
    ) -> Curve:
        """Describe a curve.

        Parameters
        ----------
        name, score, slope
            See the class.
        at, values
            ``[coefficient]``: coefficients, ascending, 0 and 1 among them, and the metric there.
        gap
            Of the metric between all edges in and none.
        bend
            Share off the linear continuation from which on a curve has left it.
        """
        zero, one = (int(np.flatnonzero(at == c)[0]) for c in (0, 1))
        response = values - values[zero]
        own_bends, own_turns = bends(at, response, slope, bend), turns(at, response)
        shape = _shape(at, response, slope, own_bends, own_turns, gap)
        effect, answered = float(response[one]), tuple(response.tolist())
        return cls(name, score, slope, effect, answered, own_bends, own_turns, shape)


def _shape(
    at: NDArray[np.float64],
    response: NDArray[np.float64],
    slope: float,
    own_bends: tuple[float | None, float | None],
    own_turns: Sequence[float],
    gap: float,
) -> str:
    if np.abs(response).max() <= FLAT * abs(gap):
        return "flat"
    if own_turns:
        return "turning"
    below, above = own_bends
    bend = below if above is None else above
    if bend is None:
        return "linear"
    line = slope * bend
    return "saturating" if np.interp(bend, at, response) * line < line**2 else "threshold"


def bends(
    at: NDArray[np.float64], response: NDArray[np.float64], slope: float, share: float
) -> tuple[float | None, float | None]:
    """Coefficient below and above 0 where a response is a share off ``slope * c``.

    Between coefficients it is found by linear interpolation of how far off the response is; where
    the slope is 0, a response leaves it at once.

    Examples
    --------
    >>> c = coefficients(4)
    >>> bends(c, np.minimum(c, 1.0), 1.0, 0.2)
    (None, 1.25)
    """
    off = np.full(len(at), np.inf)
    line = slope * at
    np.divide(np.abs(response - line), np.abs(line), out=off, where=line != 0)
    off[(line == 0) & (response == 0)] = 0.0
    zero = int(np.flatnonzero(at == 0)[0])
    below, above = at[zero::-1], at[zero:]
    return _first(below, off[zero::-1], share), _first(above, off[zero:], share)


def _first(at: NDArray[np.float64], off: NDArray[np.float64], share: float) -> float | None:
    """Where ``off`` first reaches a share."""
    reached = np.flatnonzero(off >= share)
    if not len(reached):
        return None
    i = int(reached[0])
    inside = (share - off[i - 1]) / (off[i] - off[i - 1])
    return float(at[i - 1] + inside * (at[i] - at[i - 1]))


def turns(at: NDArray[np.float64], response: NDArray[np.float64]) -> tuple[float, ...]:
    """Coefficients of the maxima and minima between which a curve goes back and forth.

    A maximum or minimum counts if the curve comes to it, and leaves it, by more than :data:`TURN`
    of its range; it is that of the parabola through the coefficient and its neighbours.

    Examples
    --------
    >>> c = coefficients(4)
    >>> turns(c, c * (1.1 - c))
    (0.55,)
    """
    least = TURN * np.ptp(response)
    found: list[int] = []
    low = high = way = 0  # places of the extremes since the last turn; 1: going up, -1: down
    for i in range(len(at)):
        low = i if response[i] < response[low] else low
        high = i if response[i] > response[high] else high
        if way >= 0 and response[high] - response[i] > least:
            if way:
                found.append(high)
            way, low = -1, i
            high = i
        elif way <= 0 and response[i] - response[low] > least:
            if way:
                found.append(low)
            way, high = 1, i
            low = i
    return tuple(_vertex(at[i - 1 : i + 2], response[i - 1 : i + 2]) for i in found)


def _vertex(at: NDArray[np.float64], response: NDArray[np.float64]) -> float:
    """Extremum of the parabola through three points of equal distance."""
    left, middle, right = response.tolist()
    curvature = left - 2 * middle + right
    step = float(at[1] - at[0])
    moved = (left - right) / (2 * curvature) if curvature else 0.0
    return round(float(at[1]) + step * moved, 10)
