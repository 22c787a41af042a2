"""Code blocks of the README and of ``docs/``, and how one is to be read.

The words after a block's language say what it is beside an example that is run where it stands:

=====================  ============================================================================
```` ```sh ````        commands, one a line; those of ``acdc`` are parsed, and run in the slow test
```` ```sh parsed ```` they need a network, the reader's files, or long: only parsed (Python too)
```` ```json x.jsonl`` a file of that name, for the other blocks of its page (also ``python x.py``)
=====================  ============================================================================
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
MADE = (DOCS / "reference" / "api", DOCS / "reference" / "commands")
"""Folders of pages that are made from the code when the site is built."""

_FENCE = re.compile(r"^(?P<fence>`{3,}|:{3,})(?P<info>.*)\n(?P<text>(?:.*\n)*?)(?P=fence)$", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its first word, what it says of itself, and its text."""

    page: Path
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def file(self) -> str | None:
        """Name of the file that it is, if it is one: a directive names what it shows."""
        if self.language.startswith("{"):
            return None
        return next((word for word in self.words if "." in word), None)

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[list[str]]:
        """Words of every command of a shell block: comments away, ``&&`` taken apart."""
        lines = self.text.replace("\\\n", " ").splitlines()
        found = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
        return [words for words in found if words]


def pages() -> list[Path]:
    """The README and every page that somebody wrote."""
    written = [p for p in sorted(DOCS.rglob("*.md")) if not any(m in p.parents for m in MADE)]
    return [README, *written]


def blocks(page: Path) -> list[Block]:
    """Fenced blocks of a page, in order; those of MyST's directives have a language in braces."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, *words = match["info"].strip().split() or [""]
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, language, tuple(words), match["text"]))
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))
