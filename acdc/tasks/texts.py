"""Tokens as a person reads them."""

from __future__ import annotations

from acdc.tasks import Tokenizer
from graphs.text import printable

__all__ = ["Texts", "label", "visible"]


class Texts:
    """Texts of token ids as they continue a prompt; ids themselves without a tokenizer.

    Parameters
    ----------
    tokenizer
        Of the model.
    before
        A token to decode in front: one alone may lose the space that it begins with.
    """

    def __init__(self, tokenizer: Tokenizer | None, before: int = 0) -> None:
        self._tokenizer, self._before = tokenizer, before
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """Return the text of a token id."""
        if token not in self._known:
            self._known[token] = self._text(token)
        return self._known[token]

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return f" {token}"
        before = self._tokenizer.decode([self._before])
        both = self._tokenizer.decode([self._before, token])
        if both.startswith(before):
            return both[len(before) :]
        return self._tokenizer.decode([token])


def visible(token: str) -> str:
    """A token's text on one line, characters that cannot be seen as escapes."""
    return printable(token.replace("\n", "⏎").replace("\t", "→"))


def label(token: str) -> str:
    """A token's text for a list: no space around it, and never nothing."""
    return visible(token).strip() or "␣"
