"""Pages held against their policy, and opened in a browser: what several tests share."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from acdc.pages.page import hashed

_RUN = 'window.ran=(window.ran||"")+'
HOSTILE = (
    f'<script>{_RUN}"a"</script>',
    f"<img src=x onerror='{_RUN}\"b\"'>",
    f'"><svg onload=\'{_RUN}"c"\'>',
    f"'></p><details open ontoggle='{_RUN}\"d\"'>",
    f'</style><script>{_RUN}"e"</script>',
    f'</script><script>{_RUN}"f"</script>',
    f'--></textarea></title><script>{_RUN}"g"</script>',
    f"<a class=click href='javascript:{_RUN}\"h\";0' style='position: fixed; inset: 0'>",
    "<base href='https://example.org/'>",
    "\u2028\u202e</SCRIPT >&lt;script&gt;{{7*7}}<!--",
)
"""Texts that run, or change the page, where they are taken for markup."""
EVIL = "".join(HOSTILE)

_WATCH = """
window.said = [];
addEventListener("error", event => said.push(String(event.message)));
addEventListener("securitypolicyviolation", event => said.push(event.violatedDirective));
console.error = (...words) => said.push(words.join(" "));
"""
_TELL = """
addEventListener("load", () => setTimeout(() => {  // what an image's error would run has run
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(
    { ...seen, said, ran: window.ran ?? null }))));
  document.body.append(out);
}, 100));
"""


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the texts of styles and scripts.

    ``scripts`` are those that run; data in a script element is not one of them.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.styles: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "style":
            self.styles.append(data)
        elif self.cdata_elem == "script" and "type" not in self.found[-1][1]:
            self.scripts.append(data)


def policy_of(page: str) -> dict[str, list[str]]:
    """The directives of a page's only policy."""
    (content,) = [
        attributes["content"]
        for tag, attributes in Elements(page).found
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    directives = [part.split() for part in content.split(";")]
    return {name: values for name, *values in directives}


def check_policy(page: str) -> None:
    """Check that a page allows its own style and script and nothing else, and needs no more."""
    elements, policy = Elements(page), policy_of(page)
    assert "unsafe" not in str(policy)
    assert policy == {
        "default-src": ["'none'"],
        "style-src": [hashed(style) for style in elements.styles],
        "script-src": [hashed(script) for script in elements.scripts],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }
    assert len(elements.styles) == len(elements.scripts) == 1
    assert [tag for tag, _ in elements.found][:4] == ["html", "head", "meta", "meta"]
    assert "http-equiv" in elements.found[3][1]  # before anything that it is for
    for tag, attributes in elements.found:
        assert "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], tag
        assert attributes.get("http-equiv", "Content-Security-Policy") == "Content-Security-Policy"
        assert tag not in ("base", "embed", "form", "iframe", "img", "link", "object")
        for name in ("href", "src", "xlink:href"):
            address = attributes.get(name, "#")
            assert address.startswith(("#", "https://www.neuronpedia.org/")), (tag, address)


def browse(page: str, probe: str, folder: Path) -> dict[str, Any]:
    """Open a page in a browser without a window, and use it.

    Parameters
    ----------
    page
        HTML.  Its policy gets the hashes of the two scripts that watch it, and stays strict.
    probe
        JavaScript that makes an object ``seen`` of plain values.
    folder
        For files.

    Returns
    -------
    dict
        ``seen``, and what the browser complained of (``said``: errors and what the policy
        blocked; ``consoles``: its console), and what a text of :data:`HOSTILE` set (``ran``).
    """
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser = os.environ.get("ACDC_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium is here: set ACDC_CHROMIUM to one")
    probe = f"{{{probe}\n{_TELL}}}"
    watched = page.replace(
        "script-src ", f"script-src {hashed(_WATCH)} {hashed(probe)} ", 1
    ).replace("<body>", f"<body><script>{_WATCH}</script>", 1)
    head, _, rest = watched.rpartition("</body>")
    file = folder / "page.html"
    file.write_text(f"{head}<script>{probe}</script></body>{rest}", encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom",
         f"--user-data-dir={folder / 'profile'}", file.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    consoles = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="seen">([^<]*)</pre>', done.stdout)
    assert found, f"the page's script or the probe failed: {consoles}"
    return {**json.loads(base64.b64decode(found[1])), "consoles": consoles}
