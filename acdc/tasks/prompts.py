"""Filling templates word by word, and knowing where each word's tokens are.

A template is text with slots such as ``{NAME}``.  The space before a slot belongs to the
word that fills it, as it does in byte-level BPE and SentencePiece tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random

from acdc.errors import TaskError
from acdc.tasks.base import Pair, Tokenizer

__all__ = [
    "Draw",
    "Filled",
    "Generated",
    "collect_pairs",
    "encode",
    "fill_template",
    "fork",
    "single_token_words",
    "slot_names",
    "split_template",
    "word_width",
]

SLOT = re.compile(r" ?\{(\w+)\}")
TRIES_PER_PAIR = 50
"""Draws per pair before a task gives up, or accepts that a prompt comes twice."""


@dataclass(frozen=True)
class Filled:
    """A template with its slots filled, as tokens.

    Parameters
    ----------
    text
        The prompt.
    ids
        Its token ids.
    slots
        For each slot in order of the text, its first token and its number of tokens.
    """

    text: str
    ids: tuple[int, ...]
    slots: tuple[tuple[int, int], ...]

    @property
    def last(self) -> int:
        """Position of the last token."""
        return len(self.ids) - 1

    @property
    def single(self) -> bool:
        """Whether every slot is one token."""
        return all(width == 1 for _, width in self.slots)


@dataclass(frozen=True)
class Generated:
    """One generated pair.

    Parameters
    ----------
    pair
        With the corruption that was asked for.
    template
        What it was made from.
    default
        The same with the task's default corruption, by which draws are told apart: so every
        corruption has the same clean prompts in the same order; None: ``pair``.
    """

    pair: Pair
    template: str
    default: Pair | None = None

    @property
    def key(self) -> Pair:
        """What draws are told apart by."""
        return self.pair if self.default is None else self.default


Draw = Callable[[int], "Generated | None"]
"""Draw the pair of the given index, or nothing where the drawn words do not fit the tokenizer."""


def split_template(template: str) -> list[tuple[str, str]]:
    """Return ``(literal text, slot name)`` pairs; the last slot name is ``""``.

    Examples
    --------
    >>> split_template("Then, {A} and {B} left.")
    [('Then,', 'A'), (' and', 'B'), (' left.', '')]
    """
    pieces, end = [], 0
    for match in SLOT.finditer(template):
        pieces.append((template[end : match.start()], match.group(1)))
        end = match.end()
    return [*pieces, (template[end:], "")]


def slot_names(template: str) -> list[str]:
    """Return the names of a template's slots in order of the text.

    Examples
    --------
    >>> slot_names("Then, {A} and {B} left. {A} came")
    ['A', 'B', 'A']
    """
    return [slot for _, slot in split_template(template) if slot]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of ``text`` with nothing added to them."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def fill_template(tokenizer: Tokenizer, template: str, words: Mapping[str, str]) -> Filled | None:
    """Fill the slots of ``template`` with ``words`` and find the tokens of each.

    Returns
    -------
    Filled or None
        None if a token would reach across the edge of a slot, or the tokenizer lacks a word.
    """
    text, slots, heads = "", [], []
    for literal, slot in split_template(template):
        text += literal
        if slot:
            before = encode(tokenizer, text)
            text += f" {words[slot]}"
            after = encode(tokenizer, text)
            slots.append((len(before), len(after) - len(before)))
            heads += [before, after]
    ids = encode(tokenizer, text)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if any(ids[: len(head)] != head for head in heads) or (unknown is not None and unknown in ids):
        return None
    return Filled(text, tuple(ids), tuple(slots))


def word_width(tokenizer: Tokenizer, before: str, word: str, after: str) -> int | None:
    """Return how many tokens ``word`` is between ``before`` and ``after``, None if it blends."""
    filled = fill_template(tokenizer, before + " {WORD}" + after, {"WORD": word})
    return None if filled is None else filled.slots[0][1]


def single_token_words(
    tokenizer: Tokenizer, words: Iterable[str], *, before: str, after: str, need: int, what: str
) -> list[str]:
    """Return the words that are one token between ``before`` and ``after``.

    Raises
    ------
    TaskError
        If fewer than ``need`` of them are.
    """
    words = list(words)
    found = [word for word in words if word_width(tokenizer, before, word, after) == 1]
    if len(found) < need:
        raise TaskError(
            f"{len(found)} of {len(words)} {what} are one token of this tokenizer, at least "
            f"{need} are needed: choose a model with a larger vocabulary, or give a task file"
        )
    return found


def fork(rng: Random) -> Random:
    """Return a generator of its own for what a corruption draws; ``rng`` is as it was.

    What a corruption takes from the generator of the clean prompts would change these.
    """
    copy = Random()
    copy.setstate(rng.getstate())
    return Random(copy.getrandbits(64))


def collect_pairs(n_prompts: int, draw: Draw, *, what: str) -> list[Generated]:
    """Draw ``n_prompts`` pairs, different ones (by default corruption) as long as there are any.

    Raises
    ------
    TaskError
        If the tokenizer fits none of the drawn prompts.
    """
    found: list[Generated] = []
    seen: set[Pair] = set()
    for index in range(n_prompts):
        generated = _draw_new(index, draw, seen)
        if generated is None:
            raise TaskError(
                f"no {what} prompt of equal token length was found in {TRIES_PER_PAIR} draws "
                "under this tokenizer: choose another model, or give a task file"
            )
        found.append(generated)
        seen.add(generated.key)
    return found


def _draw_new(index: int, draw: Draw, seen: set[Pair]) -> Generated | None:
    latest = None
    for _ in range(TRIES_PER_PAIR):
        generated = draw(index)
        if generated is not None:
            latest = generated
            if generated.key not in seen:
                break
    return latest
