"""DOT text as SVG, PNG or PDF: for one text the same bytes on every machine.

The Graphviz inside pygraphviz draws, never a ``dot`` that may be installed, with DejaVu Sans, which
matplotlib brings, and no other font: where lines and boxes lie depends on how wide texts are.
Files tell no time.  What is left to differ is the version of pygraphviz, and its build: its wheels
for Linux find fonts as is assumed here, elsewhere the system's own may be taken.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

from graphs.errors import InputError
from graphs.pictures.diagram import OPENING

__all__ = ["FORMATS", "draw_dot", "parse_dot"]

FORMATS = ("svg", "png", "pdf")

_MOST_BYTES, _MOST_SECONDS = 4 << 30, 20  # of reading

_CHILD = (
    "import sys, pygraphviz; "
    "drawing = pygraphviz.AGraph(string=sys.stdin.buffer.read().decode()); "
    "engine = dict(drawing.graph_attr).get('layout') or 'dot'; "
    "sys.stdout.buffer.write(drawing.draw(None, format=sys.argv[1], prog=engine))"
)
_READER = """
import contextlib, json, sys, pygraphviz
with contextlib.suppress(ImportError, ValueError):  # not everywhere
    import resource
    for kind, most in zip((resource.RLIMIT_AS, resource.RLIMIT_CPU), map(int, sys.argv[1:])):
        resource.setrlimit(kind, (most, most))
graph = pygraphviz.AGraph(string=sys.stdin.buffer.read().decode())
edges = [(*e, e.attr["receiver"] or "", e.attr["score"] or "") for e in graph.edges_iter()]
json.dump((dict(graph.graph_attr), edges), sys.stdout)
"""
_FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")
_FONTCONFIG = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{folder}</dir><cachedir>{folder}</cachedir></fontconfig>
"""
_READ_BY_GRAPHVIZ = (
    "CAIRO", "DOTFONTPATH", "FC_", "FONTCONFIG", "GV", "LANG", "LC_", "PANGO", "SOURCE_DATE_EPOCH"
)  # fmt: skip
"""Beginnings of environment variables that change what Graphviz and its libraries draw."""

_PDF_DATE = re.compile(rb"(?<=/CreationDate \(D:)\d{14}(?=Z\))")


def draw_dot(text: str, format: str) -> bytes:
    """Return DOT text as a picture in one of :data:`FORMATS`.

    Characters that DejaVu Sans lacks (Chinese, say) are boxes in PNG and PDF; SVG has them as text.

    Raises
    ------
    InputError
        If Graphviz refuses the text, or the font is not there.
    """
    if format == "png" and text.startswith(OPENING):
        text = f"{OPENING} dpi=192;{text.removeprefix(OPENING)}"
    with tempfile.TemporaryDirectory() as folder:
        # A process of its own: Graphviz writes warnings to the terminal, and may crash, in C.
        # -P: a pygraphviz.py in the folder where somebody works is not ours to run.
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CHILD, format],
            input=text.encode(),
            capture_output=True,
            env=_environment(Path(folder)),
        )
    if done.returncode or not done.stdout:
        raise InputError(f"Graphviz could not draw this DOT text: {_last_line(done.stderr)}")
    # As long as what was there: a PDF says at which byte each of its parts begins.
    return _PDF_DATE.sub(b"19700101000000", done.stdout) if format == "pdf" else done.stdout


def parse_dot(text: str) -> tuple[dict[str, str], list[tuple[str, str, str, str]]]:
    """Return a graph's attributes, and of every edge its ends, ``receiver`` and ``score``.

    Raises
    ------
    InputError
        If Graphviz cannot read the text, or not within bounded time and memory.
    """
    # A process of its own: a few lines of DOT can mean millions of edges, and Graphviz says what
    # it reads on the terminal, and may crash, in C.
    done = subprocess.run(
        [sys.executable, "-P", "-c", _READER, str(_MOST_BYTES), str(_MOST_SECONDS)],
        input=text.encode(),
        capture_output=True,
    )
    if done.returncode:
        raise InputError(f"Graphviz cannot read it: {_last_line(done.stderr)}")
    attributes, edges = json.loads(done.stdout)
    return attributes, edges


def _last_line(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it crashed"


def _environment(folder: Path) -> dict[str, str]:
    """Ours without what would make pictures differ, and with the one font, put into a folder."""
    for name in _FONTS:
        shutil.copyfile(_font(name), folder / name)
    config = folder / "fonts.conf"
    config.write_text(_FONTCONFIG.format(folder=escape(str(folder))), encoding="utf-8")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_READ_BY_GRAPHVIZ)}
    return {**kept, "FONTCONFIG_FILE": str(config), "TZ": "UTC0"}


def _font(name: str) -> Path:
    """Where matplotlib keeps a font; importing all of it to ask would take longer than to draw."""
    found = importlib.util.find_spec("matplotlib")
    for place in (found and found.submodule_search_locations) or ():
        path = Path(place, "mpl-data", "fonts", "ttf", name)
        if path.is_file():
            return path
    raise InputError(f"pictures need the font {name} of matplotlib: install matplotlib again")
