"""Grids of cases of which every level is tried, and not every combination."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest

__all__ = ["each_level"]


def each_level(*factors: Sequence[Any]) -> list[Any]:
    """Return all combinations of some factors as parameters, of which most are ``slow`` ones.

    Every level of every factor is in at least one that is not: they go along the factors side by
    side, the shorter ones over and over again.
    """
    n = max(map(len, factors))
    quick = {tuple(i % len(factor) for factor in factors) for i in range(n)}
    return [
        pytest.param(
            *(factor[i] for factor, i in zip(factors, at, strict=True)),
            marks=() if at in quick else pytest.mark.slow,
        )
        for at in product(*(range(len(factor)) for factor in factors))
    ]
