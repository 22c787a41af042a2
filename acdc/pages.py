"""HTML pages that need nothing but themselves: what the pages of this package share.

Whatever comes from a user (names, prompts) goes into a page through :func:`html.escape`, or as
data through :func:`page`, whose script puts it there as text; a policy in the page's head keeps
it from loading anything.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

__all__ = ["page"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1b1f24; --soft: #626a73; --line: #d9dde2;
  --card: #f7f8fa; --link: #0b57b0; --up: #0072b2; --down: #b34700; --hot: 255 150 0; }
@media (prefers-color-scheme: dark) { :root { --bg: #15181c; --fg: #e4e7eb; --soft: #9aa3ad;
  --line: #343a42; --card: #1d2126; --link: #7db7ff; --up: #66b8ec; --down: #f2955a;
  --hot: 215 120 0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1.5rem 4rem; max-width: 80rem; background: var(--bg);
  color: var(--fg); font: 14px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; }
h3 { font: 600 1.05rem ui-monospace, monospace; margin: 0; display: inline; }
h4 { font-size: .78rem; font-weight: 600; color: var(--soft); margin: .7rem 0 .15rem; }
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
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n"
        f"{body}\n{'' if data is None else _data(data)}<script>{script}</script>\n"
        "</body>\n</html>\n"
    )


def _data(data: Any) -> str:
    """Data as an element: no ``<`` in it, so that no text can end or open one."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="data">{text}</script>\n'
