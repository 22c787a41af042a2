"""What the fields of a configuration may hold: a table of names, each with a type and bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from graphs.errors import InputError

__all__ = ["Field", "at_least", "check_fields", "flag", "number", "one_of", "text", "whole"]


@dataclass(frozen=True)
class Field:
    """What one field may hold.

    Parameters
    ----------
    expected
        In words, as ``got ..., expected ...`` goes on.
    holds
        Whether a value that JSON can give is such.
    """

    expected: str
    holds: Callable[[Any], bool]

    def or_none(self) -> Field:
        """Return the field that may also be null."""
        return replace(
            self,
            expected=f"{self.expected}, or null",
            holds=lambda value: value is None or self.holds(value),
        )


def whole(low: int, high: int | None = None) -> Field:
    """Return the field of whole numbers from ``low`` (to ``high``)."""
    top = f"from {low} to {high:,}" if high is not None else f"of at least {low}"
    return Field(
        f"a whole number {top}",
        lambda value: type(value) is int and low <= value <= (value if high is None else high),
    )


def number(above: float = -math.inf, high: float = math.inf) -> Field:
    """Return the field of finite numbers above one and at most another."""
    bounds = (f" above {above:g}" if above > -math.inf else "") + (
        f" and at most {high:g}" if high < math.inf else ""
    )
    return Field(f"a finite number{bounds}", lambda value: _finite(value) and above < value <= high)


def at_least(low: float) -> Field:
    """Return the field of finite numbers from ``low``."""
    return Field(
        f"a finite number of at least {low:g}", lambda value: _finite(value) and value >= low
    )


def flag() -> Field:
    """Return the field of true and false."""
    return Field("true or false", lambda value: isinstance(value, bool))


def text() -> Field:
    """Return the field of texts."""
    return Field("a text", lambda value: isinstance(value, str))


def one_of(names: Collection[str]) -> Field:
    """Return the field of some texts."""
    return Field(
        f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names
    )


def check_fields(
    values: Mapping[str, Any],
    table: Mapping[str, Field],
    where: object,
    failure: type[InputError] = InputError,
) -> None:
    """Raise ``failure`` naming the first field that holds what its table does not allow."""
    for name, field in table.items():
        if name in values and not field.holds(values[name]):
            raise failure(f"{where}: {name} is {values[name]!r}, expected {field.expected}")


def _finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False
