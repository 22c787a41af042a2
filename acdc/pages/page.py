"""HTML pages that need nothing but themselves: what the pages of this package share.

Whatever comes from a user (names, prompts) goes into a page through a template, which escapes it
(:mod:`acdc.pages.filling`), or as data through :func:`page`, whose script puts it there as text.
Should something get through all the same, :func:`policy` keeps it from running, and the page from
loading anything.  The policy also forbids ``style`` attributes and inline event handlers: looks are
classes, SVG's own attributes (``fill``, ``width``), or properties that the script sets.
"""

from __future__ import annotations

import json
from base64 import b64encode
from hashlib import sha256
from typing import Any

from markupsafe import Markup

from acdc.pages.filling import fill

__all__ = ["hashed", "page", "policy"]

_STYLE = """
:root { color-scheme: light dark; --bg: light-dark(#fff, #15181c);
  --fg: light-dark(#1b1f24, #e4e7eb); --soft: light-dark(#626a73, #9aa3ad);
  --line: light-dark(#d9dde2, #343a42);
  --card: light-dark(#f7f8fa, #1d2126); --link: light-dark(#0b57b0, #7db7ff);
  --up: light-dark(#0072b2, #66b8ec); --down: light-dark(#b34700, #f2955a);
  --hot: light-dark(rgb(255 150 0), rgb(215 120 0)); }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1.5rem 4rem; max-width: 80rem; background: var(--bg);
  color: var(--fg); font: 14px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; }
h3 { font: 600 1.05rem ui-monospace, monospace; margin: 0; display: inline; }
h4 { font-size: .78rem; font-weight: 600; color: var(--soft); margin: .7rem 0 .15rem; }
.up { color: var(--up); } .down { color: var(--down); }
a { color: var(--link); text-decoration: none; } a:hover, a:focus { text-decoration: underline; }
p { margin: .3rem 0; } .soft { color: var(--soft); } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .8rem; }
th, td { padding: .15rem .7rem .15rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } td.n, th.n { text-align: right; white-space: nowrap; }
code, .mono, .ex { font-family: ui-monospace, monospace; font-size: .86rem; }
"""


def page(title: str, body: str, *, style: str, script: str, data: Any = None) -> str:
    """Return a whole page.

    Parameters
    ----------
    title
        Plain text.
    body
        HTML.
    style, script
        CSS after the shared one, and JavaScript that runs when the body is there.
    data
        Plain JSON values for the script, which finds them as the text of the element ``data``.
    """
    style = _STYLE + style
    whole = fill(
        "page.html",
        title=title,
        body=Markup(body),
        style=Markup(style),
        script=Markup(script),
        policy=Markup(policy(style, script)),
        data=None if data is None else _data(data),
    )
    return str(whole)


def policy(style: str, script: str) -> str:
    """Return the Content-Security-Policy of a page that has one style and one script.

    Parameters
    ----------
    style, script
        The whole text of the two elements.  Nothing else is applied or run: no other element, no
        attribute, no address, no file; no link may be resolved elsewhere and no form be sent.

    References
    ----------
    Content Security Policy Level 3, https://www.w3.org/TR/CSP3/.
    """
    return (
        f"default-src 'none'; style-src {hashed(style)}; script-src {hashed(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def hashed(text: str) -> str:
    """Return the source expression that allows an element with this text, and no other."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _data(data: Any) -> Markup:
    """Data for a script element: no ``<`` in it, so that no text can end or open one."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))
