"""JSON that anyone may have written: values are checked as they are taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from acdc.errors import CircuitFileError

__all__ = ["JsonObject"]

_NUMBER: tuple[type, ...] = (int, float)
_MISSING = object()
_MOST = 1e300  # what is done with a number stays finite


class JsonObject:
    """A JSON object; taking a value that is missing or of another type is a CircuitFileError.

    Parameters
    ----------
    content
        Any JSON value.
    where, what, how
        The file, what it should be and which command writes it, for messages.
    """

    def __init__(self, content: Any, where: object, what: str, how: str) -> None:
        self.where, self.what, self.how = where, what, how
        if not isinstance(content, dict):
            raise self._wrong("it", content)
        self.content: dict[str, Any] = content

    def get(self, key: str, *kinds: type | tuple[type, ...] | None) -> Any:
        """Return the value of a key, if it is of one of the kinds (None: null)."""
        value = self.content.get(key, _MISSING)
        for kind in kinds:
            if value is None if kind is None else _is(value, kind):
                return value
        raise self._wrong(repr(key), value)

    def text(self, key: str) -> str:
        """Return a text."""
        return str(self.get(key, str))

    def number(self, key: str) -> float:
        """Return a number."""
        return self.get(key, _NUMBER)

    def optional(self, key: str) -> float | None:
        """Return a number or null."""
        return self.get(key, _NUMBER, None)

    def at(self, key: str) -> JsonObject:
        """Return an object."""
        return JsonObject(self.get(key, dict), self.where, self.what, self.how)

    def rows(self, key: str) -> Sequence[JsonObject]:
        """Return a list of objects."""
        return [JsonObject(row, self.where, self.what, self.how) for row in self.get(key, list)]

    def texts(self, key: str) -> list[str]:
        """Return a list of texts."""
        found: list[Any] = self.get(key, list)
        if not all(isinstance(text, str) for text in found):
            raise self.wrong(key, found)
        return found

    def wrong(self, key: str, value: Any) -> CircuitFileError:
        """Return the error of a value that is not as expected."""
        return self._wrong(repr(key), value)

    def _wrong(self, key: str, value: Any) -> CircuitFileError:
        got = "missing" if value is _MISSING else f"of type {type(value).__name__}"
        if isinstance(value, int | float) and not -_MOST < value < _MOST:
            got = str(value)
        return CircuitFileError(
            f"{self.where} is not {self.what}: {key} is {got}; give what {self.how} writes"
        )


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    """As isinstance, but true and false are no numbers, nor is what no float can be."""
    if isinstance(value, int | float) and not -_MOST < value < _MOST:  # NaN too
        return False
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
