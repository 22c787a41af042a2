"""Pronouns: say she of a girl, and he of a boy.

"Once upon a time there was a little girl named Lily." -> " She", and inside a sentence,
"... Lily was happy because" -> " she".  The corrupted prompt has the other gender's noun and
name in the same places, so it asks for the other pronoun.  With the other gender's noun alone it
shows what the noun says against the name, and with a noun and a name of no gender it asks for
neither pronoun: right and wrong stay those of the clean prompt.

Nouns and names may be several tokens long, but all nouns of a task are equally long, and so
are all its names: the prompts of one template are aligned, clean and corrupt.  Girls and boys
are the clean prompt in turn.

Spans: ``noun`` and ``name`` are the tokens of the noun and of the name where it comes first,
``END`` is the last token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from random import Random

from acdc.errors import TaskError
from acdc.tasks.base import Pair, Tokenizer, single_token_continuation
from acdc.tasks.prompts import (
    Draw,
    Filled,
    Generated,
    collect_pairs,
    fill_template,
    fork,
    word_width,
)
from acdc.tasks.spec import TASKS, TaskSpec
from acdc.tasks.words import BOY_NAMES, GIRL_NAMES, NEUTRAL_NAMES, OBJECTS

__all__ = ["CORRUPTIONS", "NOUNS", "SPANS", "TEMPLATES", "generate"]

CORRUPTIONS: dict[str, str] = {
    "other_gender": "noun and name are those of the other gender",
    "other_noun": "the noun is that of the other gender, the name stays",
    "no_gender": "noun and name are words of no gender, drawn (child, Jamie)",
}

SPANS = ("noun", "name", "END")
"""Labels of positions, in order of the picture's columns."""

TEMPLATES: tuple[str, ...] = (
    "Once upon a time there was a little {NOUN} named {NAME}.",
    "Once upon a time, there was a {NOUN} named {NAME}.",
    "One day, a little {NOUN} named {NAME} went to the park.",
    "There was a little {NOUN} named {NAME}. {NAME} was happy because",
    "Once there was a {NOUN} named {NAME}. {NAME} was sad because",
    "Once upon a time there was a little {NOUN} named {NAME}. {NAME} said that",
    "A {NOUN} named {NAME} was very sad. When",
)
"""A template that ends a sentence asks for " She", one that does not for " she"."""

NOUNS: tuple[tuple[str, str], ...] = (
    ("girl", "boy"),
    ("woman", "man"),
    ("princess", "prince"),
    ("queen", "king"),
)
"""Nouns for a girl and for a boy; both have to be equally many tokens."""

NEUTRAL_NOUNS = (
    "child",
    "person",
    "friend",
    "baby",
    "bird",
    "cat",
    "dog",
    "bear",
    "rabbit",
    "fish",
)
"""Nouns of no gender; where a tokenizer has none of their number of tokens, objects."""


def generate(tokenizer: Tokenizer, rng: Random, n_prompts: int, corruption: str) -> list[Generated]:
    """Return ``n_prompts`` pairs, a girl's and a boy's clean prompt in turn.

    Parameters
    ----------
    tokenizer
        Of the pairs of nouns, and of names, that are equally many tokens of it, those of the
        most frequent number are taken.
    rng
        The only source of randomness.
    n_prompts
        How many pairs.
    corruption
        A key of :data:`CORRUPTIONS`.

    Raises
    ------
    TaskError
        If no noun pair or no pair of names is equally many tokens.
    """
    nouns = _equal_pairs(tokenizer, NOUNS, before="a little", after=" named")
    every = [(girl, boy) for girl in GIRL_NAMES for boy in BOY_NAMES]
    names = _equal_pairs(tokenizer, every, before="a girl named", after=".")
    if not nouns or not names:
        raise TaskError(
            f"{len(nouns)} of {len(NOUNS)} noun pairs such as 'girl'/'boy' and {len(names)} of "
            f"{len(every)} pairs of names are equally many tokens of this tokenizer, at least one "
            "of each is needed: choose another model, or give a task file"
        )
    neutral = _neutral(tokenizer, nouns[0][0], names[0][0]) if corruption == "no_gender" else {}
    draw = _drawer(tokenizer, rng, nouns, names, corruption, neutral)
    return collect_pairs(n_prompts, draw, what="pronoun")


def _neutral(tokenizer: Tokenizer, noun: str, name: str) -> dict[str, list[str]]:
    """Words of no gender by slot, as many tokens as a noun and as a name."""
    found = {
        "NOUN": _as_wide(tokenizer, NEUTRAL_NOUNS, noun, before="a little", after=" named")
        or _as_wide(tokenizer, OBJECTS, noun, before="a little", after=" named"),
        "NAME": _as_wide(tokenizer, NEUTRAL_NAMES, name, before="a girl named", after="."),
    }
    for slot, words in found.items():
        if not words:
            raise TaskError(
                f"no {slot.lower()} of no gender is as many tokens of this tokenizer as "
                f"{noun if slot == 'NOUN' else name!r}: choose another corruption or model"
            )
    return found


def _as_wide(
    tokenizer: Tokenizer, words: Iterable[str], like: str, *, before: str, after: str
) -> list[str]:
    """Return the words that are as many tokens as another one."""
    width = word_width(tokenizer, before, like, after)
    return [word for word in words if word_width(tokenizer, before, word, after) == width]


def _equal_pairs(
    tokenizer: Tokenizer, pairs: Iterable[tuple[str, str]], *, before: str, after: str
) -> list[tuple[str, str]]:
    """Return the pairs whose words are all as many tokens as most words with a counterpart."""
    pairs = list(pairs)
    words = dict.fromkeys(word for pair in pairs for word in pair)
    widths = {word: word_width(tokenizer, before, word, after) for word in words}
    by_width: dict[int, list[tuple[str, str]]] = {}
    for first, second in pairs:
        width = widths[first]
        if width is not None and width == widths[second]:
            by_width.setdefault(width, []).append((first, second))
    return max(by_width.values(), key=len, default=[])


def _drawer(
    tokenizer: Tokenizer,
    rng: Random,
    nouns: list[tuple[str, str]],
    names: list[tuple[str, str]],
    corruption: str,
    neutral: Mapping[str, list[str]],
) -> Draw:
    own = fork(rng)

    def draw(index: int) -> Generated | None:
        template, noun, name = rng.choice(TEMPLATES), rng.choice(nouns), rng.choice(names)
        gender = index % 2
        words = {"NOUN": noun[gender], "NAME": name[gender]}
        others = {"NOUN": noun[1 - gender], "NAME": name[1 - gender]}
        if corruption == "no_gender":
            changed = {slot: own.choice(known) for slot, known in neutral.items()}
        else:
            changed = others if corruption == "other_gender" else {"NOUN": others["NOUN"]}
        clean, default, corrupt = (
            fill_template(tokenizer, template, words | other) for other in ({}, others, changed)
        )
        if clean is None or default is None or corrupt is None:
            return None
        if not clean.slots == default.slots == corrupt.slots:
            return None
        right, wrong = _pronouns(template) if gender == 0 else _pronouns(template)[::-1]
        answers = [single_token_continuation(tokenizer, clean.text, a) for a in (right, wrong)]
        pair = Pair(clean.ids, corrupt.ids, (answers[0],), (answers[1],), spans=_spans(clean))
        return Generated(pair, template, replace(pair, corrupt=default.ids))

    return draw


def _spans(filled: Filled) -> dict[str, tuple[int, ...]]:
    noun, name = (tuple(range(first, first + width)) for first, width in filled.slots[:2])
    return {"noun": noun, "name": name, "END": (filled.last,)}


def _pronouns(template: str) -> tuple[str, str]:
    """Return the girl's and the boy's pronoun, capital at the beginning of a sentence."""
    return (" She", " He") if template.endswith(".") else (" she", " he")


TASKS.add(
    TaskSpec(
        "pronoun",
        "she or he: 'there was a little girl named Lily.' -> ' She'",
        "language-small",
        generate,
        CORRUPTIONS,
        spans=SPANS,
    ),
)
