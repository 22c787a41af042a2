"""Where the differences between circuits come from: each source's share of the variance.

Circuits found under every combination of some factors (corruptions, templates, draws of prompts,
seeds of the method) differ from one another.  The sum of squares

    SS = sum over edges and runs of (in the run's circuit or not - share of the runs that have it)^2

is that of Hamming distances, ``SS = sum of d(i, j) over pairs of runs / number of runs`` with d the
number of edges that one of two circuits has and the other has not.  It splits into parts by factor
as in a multivariate analysis of variance on distances (Anderson 2001, "A new method for
non-parametric multivariate analysis of variance", Austral Ecology 26), here of a balanced design:
every combination once.  Prompts are drawn within a template, so theirs is a nested factor.  That
two factors do not act alike at all levels of one another has a part of its own (of prompts within
templates: ``corruption x prompts``); what only three or four together say is ``rest``.

Parts of a sum of squares grow with the number of levels, even of a factor that does nothing.
``variance`` therefore compares components of variance, estimated from mean squares by the method of
moments: what a run differs from another by because of the source alone.  Every factor is random, so
that the expected mean square of a source holds its own component and those of all sources that
include it; corruptions, for instance, differ by as much as they act otherwise on every draw of
prompts even where none is special, and only what is beyond that is theirs.  Negative estimates are
shown as 0.  With one run per combination the last interaction also holds what nothing explains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from acdc.errors import OptionError

__all__ = ["CROSSED", "FACTORS", "INTERACTIONS", "REST", "Source", "sources"]

FACTORS = ("corruption", "template", "prompts", "seed")
CROSSED = "corruption x template"
REST = "rest"

_AXES: dict[str, tuple[int, ...]] = {
    "corruption": (0,),
    "template": (1,),
    "prompts": (1, 2),  # within templates
    "seed": (3,),
    CROSSED: (0, 1),
    "corruption x prompts": (0, 1, 2),
    "corruption x seed": (0, 3),
    "template x seed": (1, 3),
    "prompts x seed": (1, 2, 3),
    "corruption x template x seed": (0, 1, 3),
    "corruption x prompts x seed": (0, 1, 2, 3),
}
"""The factors on whose levels each source depends, those that it includes first."""

_HIGHER = tuple(name for name in _AXES if name.count(" x ") > 1)
INTERACTIONS = tuple(name for name in _AXES if name.count(" x ") == 1)
"""Of two factors."""


N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Source:
    """What one factor contributes to the differences between circuits.

    Parameters
    ----------
    name
        One of :data:`FACTORS`, :data:`INTERACTIONS` or :data:`REST`.
    n_levels
        How many were tried; of prompts within each template, of interactions 0.
    df
        Degrees of freedom.
    squares
        Share of the sum of squares; 0 where all circuits are equal.
    variance
        Share of the variance, see above; 0 where all circuits are equal.
    """

    name: str
    n_levels: int
    df: int
    squares: float
    variance: float


def sources(masks: NDArray[np.bool_], factors: Mapping[str, Sequence[str]]) -> tuple[Source, ...]:
    """Split the differences between circuits by factor.

    Parameters
    ----------
    masks
        ``[run, edge]``: what each run kept.
    factors
        Of :data:`FACTORS`, the level of each run; those of one level are left out of the result.

    Raises
    ------
    OptionError
        If the runs are not every combination of levels, once each.
    """
    values = _table(masks, factors)  # [corruption, template, prompts, seed, edge]
    sizes = dict(zip(FACTORS, values.shape, strict=False))
    squares: dict[str, float] = {}
    df: dict[str, int] = {}
    for name, axes in _AXES.items():
        n_levels = int(np.prod([values.shape[axis] for axis in axes]))
        squares[name] = _squares(values, axes) - sum(squares[one] for one in _within(name))
        df[name] = n_levels - 1 - sum(df[one] for one in _within(name))
    components = _components(squares, df, values.shape[:-1])
    squares, df, components = _with_rest(squares), _with_rest(df), _with_rest(components)
    total, whole = sum(squares.values()), sum(components.values())
    return tuple(
        Source(
            name,
            sizes.get(name, 0),
            df[name],
            max(0.0, squares[name] / total) if total else 0.0,
            components[name] / whole if whole else 0.0,
        )
        for name in df
        if df[name]
    )


def _with_rest(values: Mapping[str, N]) -> dict[str, N]:
    """Return the same with all interactions of more than two factors as one."""
    rest = sum((values[name] for name in _HIGHER), start=type(values[_HIGHER[0]])())
    return {name: value for name, value in values.items() if name not in _HIGHER} | {REST: rest}


def _within(name: str) -> list[str]:
    """Sources that depend on some of the factors that one depends on."""
    return [one for one, axes in _AXES.items() if set(axes) < set(_AXES[name])]


def _table(masks: NDArray[np.bool_], factors: Mapping[str, Sequence[str]]) -> NDArray[np.float64]:
    """Masks by level of each factor, ``[corruption, template, prompts, seed, edge]``."""
    every = [tuple(factors.get(name, ("",) * len(masks))) for name in FACTORS]
    levels = [tuple(dict.fromkeys(one)) for one in every]
    place = {key: run for run, key in enumerate(zip(*every, strict=True))}
    wanted = list(product(*levels))
    if len(place) != len(masks) or any(key not in place for key in wanted):
        raise OptionError(
            f"{len(masks)} runs of {' x '.join(str(len(one)) for one in levels)} levels: expected "
            "every combination once"
        )
    order = [place[key] for key in wanted]
    return masks[order].astype(np.float64).reshape(*map(len, levels), -1)


def _squares(values: NDArray[np.float64], axes: tuple[int, ...]) -> float:
    """Sum of squares of the means over all factors but some, weighted by their runs."""
    others = tuple(axis for axis in range(len(FACTORS)) if axis not in axes)
    means = values.mean(others, keepdims=True)
    n_each = np.prod([values.shape[axis] for axis in others], dtype=np.int64)
    return float(n_each * ((means - values.mean(tuple(range(len(FACTORS))))) ** 2).sum())


def _components(
    squares: Mapping[str, float], df: Mapping[str, int], sizes: Sequence[int]
) -> dict[str, float]:
    """Components of variance by the expected mean squares of the design, every factor random.

    ``E(mean square of a source) = sum over it and all that include it of component * n``, n the
    runs at each of the levels that the component is one of.  Sources without degrees of freedom
    have no component: theirs is in that of the source with fewer factors.
    """
    found: dict[str, float] = {}
    n_each = {
        name: float(np.prod([n for axis, n in enumerate(sizes) if axis not in axes]))
        for name, axes in _AXES.items()
    }
    for name in reversed(_AXES):
        if df[name]:
            above = sum(found[one] * n_each[one] for one in found if name in _within(one))
            found[name] = (squares[name] / df[name] - above) / n_each[name]
    return {name: max(0.0, found.get(name, 0.0)) for name in _AXES}
