"""Where the differences between circuits come from: each source's share of the variance.

Circuits found under every combination of some factors (corruptions, templates, draws of prompts,
seeds of the method) differ from one another.  The sum of squares

    SS = sum over edges and runs of (in the run's circuit or not - share of the runs that have it)^2

is that of Hamming distances, ``SS = sum of d(i, j) over pairs of runs / number of runs`` with d the
number of edges that one of two circuits has and the other has not.  It splits into parts by factor
as in a multivariate analysis of variance on distances (Anderson 2001, "A new method for
non-parametric multivariate analysis of variance", Austral Ecology 26), here of a balanced design:
every combination once.  Prompts are drawn within a template, so theirs is a nested factor.  That
corruptions do not act alike in all templates has a part of its own; all other interactions are
``rest``.

Parts of a sum of squares grow with the number of levels, even of a factor that does nothing.
``variance`` therefore compares components of variance, estimated from mean squares by the method of
moments (each factor random, negative estimates 0): what a run differs from another by because of
the factor alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from acdc.errors import OptionError

__all__ = ["CROSSED", "FACTORS", "REST", "Source", "sources"]

FACTORS = ("corruption", "template", "prompts", "seed")
CROSSED = "corruption x template"
REST = "rest"


@dataclass(frozen=True)
class Source:
    """What one factor contributes to the differences between circuits.

    Parameters
    ----------
    name
        One of :data:`FACTORS`, :data:`CROSSED` or :data:`REST`.
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
    n = len(masks)
    squares = {name: _squares(values, (axis,)) for axis, name in enumerate(FACTORS)}
    squares["prompts"] = _squares(values, (1, 2)) - squares["template"]  # within templates
    df = {name: size - 1 for name, size in sizes.items()}
    df["prompts"] *= sizes["template"]
    squares[CROSSED] = _squares(values, (0, 1)) - squares["corruption"] - squares["template"]
    df[CROSSED] = df["corruption"] * df["template"]
    total = _squares(values, (0, 1, 2, 3))
    squares[REST] = total - sum(squares.values())
    df[REST] = n - 1 - sum(df.values())
    components = _components(squares, df, sizes, n)
    varied = [name for name in FACTORS if sizes[name] > 1]
    varied += [name for name in (CROSSED, REST) if df[name]]
    whole = sum(components[name] for name in varied)
    return tuple(
        Source(
            name,
            sizes.get(name, 0),
            df[name],
            max(0.0, squares[name] / total) if total else 0.0,
            components[name] / whole if whole else 0.0,
        )
        for name in varied
    )


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
    squares: Mapping[str, float], df: Mapping[str, int], sizes: Mapping[str, int], n: int
) -> dict[str, float]:
    """Components of variance by the expected mean squares of the design, every factor random."""
    mean = {name: squares[name] / df[name] for name in squares if df[name]}
    rest = mean.get(REST, 0.0)
    crossed, prompts = mean.get(CROSSED, rest), mean.get("prompts", rest)
    below = dict.fromkeys(mean, rest)
    below |= {"corruption": crossed, "template": crossed + prompts - rest, REST: 0.0}
    n_levels = {
        **sizes,
        "prompts": sizes["template"] * sizes["prompts"],
        CROSSED: sizes["corruption"] * sizes["template"],
        REST: n,
    }
    return {
        name: max(0.0, (mean[name] - below[name]) * n_levels[name] / n) if name in mean else 0.0
        for name in squares
    }
