"""The templates of the pages: whatever goes into one is text, unless code made it as markup.

Every template escapes what it is given (also the quotes of attributes); a name that it is not given
is an error.  Markup made in Python (:class:`markupsafe.Markup`) comes from :mod:`acdc.pages.plots`
and :mod:`graphs.pictures.svg`, which escape the texts in it themselves.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from acdc.tasks.texts import label, visible

__all__ = ["fill", "number", "resource", "sentence", "thousands"]


def fill(template: str, **values: Any) -> Markup:
    """Return a template of ``acdc.pages.filling`` filled in.

    Parameters
    ----------
    template
        Its path, as ``report.html``.
    **values
        What its names mean.
    """
    return Markup(_environment().get_template(template).render(**values))


def resource(name: str) -> str:
    """Return a style or script of this package."""
    return files("acdc.pages").joinpath(name).read_text(encoding="utf-8")


def thousands(count: int) -> str:
    """Return a count as it is read: 1,281."""
    return f"{count:,}"


def sentence(words: str) -> str:
    """Return words with a capital and a full stop; nothing for none."""
    return f"{words[:1].upper()}{words[1:]}." if words else ""


def number(value: float | None) -> str:
    """Return a number to three digits; a dash for none."""
    return "-" if value is None else f"{value:.3g}"


@cache
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("acdc.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )
    found.filters |= {
        "thousands": thousands, "sentence": sentence, "number": number, "label": label,
        "visible": visible,
    }  # fmt: skip
    return found
