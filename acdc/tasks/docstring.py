'''Python docstrings: name the argument that is documented next.

A function header with four arguments, and a docstring that documents the first two; after
the third ``:param`` comes the third argument::

    def port(self, load, size, file, last):
        """oil column piece

        :param load: crime population
        :param size: unit dark
        :param                                  -> " file"

Spans: ``A_def`` to ``D_def`` are the arguments in the header, ``B_comma`` the comma after the
second one, ``A_doc`` and ``B_doc`` the documented ones, ``param_3`` the last token.

References
----------
Heimersheim and Janiak 2023, "A circuit for Python docstrings in a 4-layer attention-only
transformer" (prompts and corruptions).
'''

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
from acdc.tasks.words import ARGUMENTS, DESCRIPTIONS, METHODS

__all__ = ["CORRUPTIONS", "SPANS", "TEMPLATE", "corrupt_words", "generate"]

CORRUPTIONS: dict[str, str] = {
    "random_def_doc": "the names in the definition and in the docstring are random ones",
    "random_def": "the names in the definition are random ones",
    "random_doc": "the names in the docstring are random ones",
    "random_answer": "the answer's name in the definition is a random one",
}

DEFAULT = next(iter(CORRUPTIONS))

SPANS = ("A_def", "B_def", "B_comma", "C_def", "D_def", "A_doc", "B_doc", "param_3")
"""Labels of positions, in order of the picture's columns."""

TEMPLATE = (
    "\ndef {METHOD}(self, {DEF0}, {DEF1}, {DEF2}, {DEF3}):\n"
    '    """WORD WORD WORD\n\n'
    "    :param {DOC0}: WORD WORD\n"
    "    :param {DOC1}: WORD WORD\n"
    "    :param"
)
"""``{DEF0}`` to ``{DEF3}`` are the arguments, ``{DOC0}`` and ``{DOC1}`` the documented ones."""

DEFINITION = ("DEF0", "DEF1", "DEF2", "DEF3")
DOCUMENTED = ("DOC0", "DOC1")
ANSWER = "DEF2"
N_NAMES = len(DEFINITION) + len(DEFINITION) + len(DOCUMENTED)
"""Names that one pair takes at most: the clean prompt's four, and a random one per place."""


def generate(tokenizer: Tokenizer, rng: Random, n_prompts: int, corruption: str) -> list[Generated]:
    """Return ``n_prompts`` pairs; the wrong answers are the other arguments of the function.

    Parameters
    ----------
    tokenizer
        Argument names that are not one token of it are left out.
    rng
        The only source of randomness.
    n_prompts
        How many pairs.
    corruption
        A key of :data:`CORRUPTIONS`.

    Raises
    ------
    TaskError
        If fewer than ten argument names are one token.
    """
    names = single_token_words(
        tokenizer, ARGUMENTS, before="(self,", after=", last", need=N_NAMES, what="argument names"
    )
    draw = _drawer(tokenizer, rng, names, corruption)
    return collect_pairs(n_prompts, draw, what="docstring")


def _drawer(tokenizer: Tokenizer, rng: Random, names: list[str], corruption: str) -> Draw:
    def draw(index: int) -> Generated | None:
        scene = _scene(rng)
        chosen = rng.sample(names, N_NAMES)
        arguments, fresh = chosen[: len(DEFINITION)], chosen[len(DEFINITION) :]
        words = dict(zip(DEFINITION, arguments, strict=True))
        words |= dict(zip(DOCUMENTED, arguments, strict=False))
        clean = fill_template(tokenizer, scene, words)
        default, corrupt = (
            fill_template(tokenizer, scene, corrupt_words(words, fresh, name))
            for name in (DEFAULT, corruption)
        )
        if clean is None or default is None or corrupt is None:
            return None
        if not (clean.single and default.single and corrupt.single):
            return None
        right = words[ANSWER]
        wrong = [name for name in arguments if name != right]
        pair = Pair(
            clean.ids,
            corrupt.ids,
            (single_token_continuation(tokenizer, clean.text, f" {right}"),),
            tuple(single_token_continuation(tokenizer, clean.text, f" {w}") for w in wrong),
            spans=_spans(clean, scene),
        )
        return Generated(pair, "docstring", replace(pair, corrupt=default.ids))

    return draw


def _spans(filled: Filled, scene: str) -> dict[str, tuple[int, ...]]:
    at = dict(zip(slot_names(scene), (first for first, _ in filled.slots), strict=True))
    places = {f"{letter}_def": at[slot] for letter, slot in zip("ABCD", DEFINITION, strict=True)}
    places |= {"B_comma": at["DEF1"] + 1}
    places |= {f"{letter}_doc": at[slot] for letter, slot in zip("AB", DOCUMENTED, strict=True)}
    places |= {"param_3": filled.last}
    return {label: (places[label],) for label in sorted(places, key=places.__getitem__)}


def _scene(rng: Random) -> str:
    """Return the template with its function name and descriptions, the arguments still open."""
    scene = TEMPLATE.replace("{METHOD}", rng.choice(METHODS))
    for word in rng.sample(DESCRIPTIONS, scene.count("WORD")):
        scene = scene.replace("WORD", word, 1)
    return scene


def corrupt_words(words: dict[str, str], fresh: list[str], corruption: str) -> dict[str, str]:
    """Return the filling of the corrupted prompt.

    Parameters
    ----------
    words
        The filling of the clean prompt: slot -> name.
    fresh
        Six names that are not in it.
    corruption
        A key of :data:`CORRUPTIONS`.
    """
    places = {
        "random_def_doc": DEFINITION + DOCUMENTED,
        "random_def": DEFINITION,
        "random_doc": DOCUMENTED,
        "random_answer": (ANSWER,),
    }[corruption]
    return words | dict(zip(places, fresh, strict=False))


TASKS.add(
    TaskSpec(
        "docstring",
        "the next argument in a Python docstring: ':param load: ... :param' -> ' size'",
        "language-small",
        generate,
        CORRUPTIONS,
        spans=SPANS,
    ),
)
