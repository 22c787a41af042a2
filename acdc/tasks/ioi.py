"""Indirect object identification: name the one who is given something.

"Then, Mary and John went to the store. John gave a ring to" -> " Mary".  The corrupted
prompt has three unrelated names in the places of the three (the ABC distribution), so that
nothing tells either name of the clean prompt from the other.  Other corruptions leave one thing
as it is: ``swapped`` the two names, of which the other one comes twice, so that it asks for the
wrong answer; ``random_subject`` the two names, of which none comes twice; ``random_names`` which
of the two comes twice, the names being others.

Spans: ``S1`` and ``S2`` where the subject stands, ``S1+1`` the token after ``S1``, ``IO`` the
other name, ``END`` the last token.

References
----------
Wang et al. 2022, "Interpretability in the Wild: a Circuit for Indirect Object Identification
in GPT-2 small", section 2 and appendix A (templates and names).
Zhang and Nanda 2024, "Towards Best Practices of Activation Patching in Language Models: Metrics
and Methods", arXiv 2309.16042 (a swapped name beside the ABC distribution).
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from acdc.tasks.base import Pair, Tokenizer, single_token_continuation
from acdc.tasks.prompts import (
    Draw,
    Filled,
    Generated,
    collect_pairs,
    fill_template,
    single_token_words,
    slot_names,
)
from acdc.tasks.spec import TASKS, TaskSpec
from acdc.tasks.words import NAMES, OBJECTS, PLACES

__all__ = ["CORRUPTIONS", "SPANS", "TEMPLATES", "corrupt_words", "generate"]

CORRUPTIONS: dict[str, str] = {
    "abc": "the three names are replaced by three unrelated ones",
    "swapped": "the second clause begins with the other name, so that the answer is the wrong one",
    "random_names": "both names are replaced by unrelated ones, in the same pattern",
    "random_subject": "the second clause begins with an unrelated name",
}

DEFAULT = next(iter(CORRUPTIONS))

SPANS = ("S1", "S1+1", "IO", "S2", "END")
"""Labels of positions, in order of the picture's columns."""

TEMPLATES: tuple[str, ...] = (
    "Then, {A} and {B} went to the {PLACE}. {S} gave a {OBJECT} to",
    "Then, {A} and {B} had a lot of fun at the {PLACE}. {S} gave a {OBJECT} to",
    "Then, {A} and {B} were working at the {PLACE}. {S} decided to give a {OBJECT} to",
    "Then, {A} and {B} were thinking about going to the {PLACE}. {S} wanted to give a {OBJECT} to",
    "Then, {A} and {B} had a long argument, and afterwards {S} said to",
    "After {A} and {B} went to the {PLACE}, {S} gave a {OBJECT} to",
    "When {A} and {B} got a {OBJECT} at the {PLACE}, {S} decided to give it to",
    "While {A} and {B} were working at the {PLACE}, {S} gave a {OBJECT} to",
    "While {A} and {B} were commuting to the {PLACE}, {S} gave a {OBJECT} to",
    "After the lunch, {A} and {B} went to the {PLACE}. {S} gave a {OBJECT} to",
    "Afterwards, {A} and {B} went to the {PLACE}. {S} gave a {OBJECT} to",
    "The {PLACE} {A} and {B} went to had a {OBJECT}. {S} gave it to",
    "Friends {A} and {B} found a {OBJECT} at the {PLACE}. {S} gave it to",
)
"""``{A}`` and ``{B}`` are the two names as they come, ``{S}`` repeats one of them."""

N_NAMES = 5
"""Names that one pair takes: two in the clean prompt, three in the corrupted one."""


def generate(tokenizer: Tokenizer, rng: Random, n_prompts: int, corruption: str) -> list[Generated]:
    """Return ``n_prompts`` pairs, ABBA (subject second) and BABA (subject first) in turn.

    Parameters
    ----------
    tokenizer
        Names that are not one token of it are left out.
    rng
        The only source of randomness.
    n_prompts
        How many pairs.
    corruption
        A key of :data:`CORRUPTIONS`.

    Raises
    ------
    TaskError
        If fewer than five names are one token.
    """
    names = single_token_words(
        tokenizer, NAMES, before="Then,", after=" went to the store.", need=N_NAMES, what="names"
    )
    return collect_pairs(n_prompts, _drawer(tokenizer, rng, names, corruption), what="ioi")


def _drawer(tokenizer: Tokenizer, rng: Random, names: list[str], corruption: str) -> Draw:
    def draw(index: int) -> Generated | None:
        template = rng.choice(TEMPLATES)
        scene = template.replace("{PLACE}", rng.choice(PLACES))
        scene = scene.replace("{OBJECT}", rng.choice(OBJECTS))
        first, second, *others = rng.sample(names, N_NAMES)
        subject, io = (second, first) if index % 2 == 0 else (first, second)
        words = {"A": first, "B": second, "S": subject}
        clean = fill_template(tokenizer, scene, words)
        default, corrupt = (
            fill_template(tokenizer, scene, corrupt_words(words, others, name))
            for name in (DEFAULT, corruption)
        )
        if clean is None or default is None or corrupt is None:
            return None
        if not (clean.single and default.single and corrupt.single):
            return None
        answer = single_token_continuation(tokenizer, clean.text, f" {io}")
        wrong = single_token_continuation(tokenizer, clean.text, f" {subject}")
        pair = Pair(clean.ids, corrupt.ids, (answer,), (wrong,), spans=_spans(clean, scene, index))
        return Generated(pair, template, replace(pair, corrupt=default.ids))

    return draw


def corrupt_words(words: dict[str, str], fresh: list[str], corruption: str) -> dict[str, str]:
    """Return the names of the corrupted prompt.

    Parameters
    ----------
    words
        Those of the clean prompt: slot -> name.
    fresh
        Three names that are not in it.
    corruption
        A key of :data:`CORRUPTIONS`.
    """
    names = {"A": words["A"], "B": words["B"]}
    unrelated = dict(zip("AB", fresh, strict=False))
    repeats = "A" if words["S"] == words["A"] else "B"
    other = {"A": "B", "B": "A"}[repeats]
    return {
        "abc": unrelated | {"S": fresh[2]},
        "swapped": names | {"S": names[other]},
        "random_names": unrelated | {"S": unrelated[repeats]},
        "random_subject": names | {"S": fresh[2]},
    }[corruption]


def _spans(filled: Filled, scene: str, index: int) -> dict[str, tuple[int, ...]]:
    """Where the names and the end are; the subject is the second name in even prompts."""
    at = dict(zip(slot_names(scene), (first for first, _ in filled.slots), strict=True))
    subject, io = (at["B"], at["A"]) if index % 2 == 0 else (at["A"], at["B"])
    places = {"S1": subject, "S1+1": subject + 1, "IO": io, "S2": at["S"]}
    return {label: (position,) for label, position in (places | {"END": filled.last}).items()}


TASKS.add(
    TaskSpec(
        "ioi",
        "indirect object identification: 'Mary and John ... John gave a ring to' -> ' Mary'",
        "language-small",
        generate,
        CORRUPTIONS,
        spans=SPANS,
    ),
)
