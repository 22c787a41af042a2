r"""Text of unknown origin as a terminal may show it.

A file can hold control characters and escape sequences that move the cursor, recolour or retitle a
terminal, or turn the direction of writing.  Wherever text reaches a terminal they are shown as
Python would write them: ``\x1b[31m``.
"""

from __future__ import annotations

import re

__all__ = ["MOST_SHOWN", "one_line", "printable", "said", "short"]

MOST_SHOWN = 600
"""Characters of an error's line; of what is longer the beginning and the end are kept."""

_BEGINNING, _END = 300, 200
_MOST_REPR = 120
_SPACES = re.compile(r"[ \t\n\r\v\f]+")


def printable(text: str, *, keep: str = "") -> str:
    r"""Return the text with every character that is not printable as its escape, but for ``keep``.

    Examples
    --------
    >>> print(printable("a\x1b[31mb\ud800"))
    a\x1b[31mb\ud800
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def one_line(text: str) -> str:
    r"""Return the text on one line of at most :data:`MOST_SHOWN` characters, all of them printable.

    Examples
    --------
    >>> print(one_line("expected a name,\n  got " + 1000 * "a")[290:330])
    aaaaaaaaaa [521 characters] aaaaaaaaaaaa
    """
    line = printable(_SPACES.sub(" ", text).strip())
    if len(line) <= MOST_SHOWN:
        return line
    left_out = len(line) - _BEGINNING - _END
    return f"{line[:_BEGINNING]} [{left_out:,} characters] {line[-_END:]}"


def short(text: str) -> str:
    """Return what a result is printed as: one line that fits a terminal.

    Examples
    --------
    >>> len(short("<Run: " + 1000 * "a" + ">")), short("<Run>")
    (120, '<Run>')
    """
    line = printable(_SPACES.sub(" ", text).strip())
    return line if len(line) <= _MOST_REPR else f"{line[: _MOST_REPR - 4]}...{line[-1]}"


def said(number: float | None) -> str:
    """Return a number in three digits.

    Examples
    --------
    >>> said(0.94123), said(None)
    ('0.941', 'undefined')
    """
    return "undefined" if number is None else f"{number:.3g}"
