"""Training prompts: pairs of one layout, whose names are drawn so that interventions tell.

The base and the source of a pair share the template, so that their names stand at the same
positions; all words in it are drawn anew.  Combinations of names that :func:`is_held_out` picks
are never trained on, and the model card is measured on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from random import Random

import torch
from torch import Tensor

from acdc.tasks import docstring, ioi, words
from acdc.tasks.prompts import split_template
from benchmarks.shortcuts.train import PAD_ID, draw_until, is_held_out, tokens_of

__all__ = ["DRAWS", "Draw", "Prompts", "docstring_pair", "draw_pairs", "ioi_pair"]

REPEATS = 5 / 6
"""Share of the prompts in which a name repeats, or an argument of the header is documented."""
SOURCE_REPEATS = 1 / 2
"""The same of the source prompts where a backup is planted: it shows where no name repeats."""

Filling = dict[str, str]
"""Slot of a template -> word."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """A batch of prompts.

    Parameters
    ----------
    tokens
        ``[batch, pos]`` ids, padded on the right.
    last
        ``[batch]``: position of the last token.
    names
        ``[batch, slot]`` ids: the value of the algorithm's input.
    places
        ``[batch, slot]``: their positions.
    """

    tokens: Tensor
    last: Tensor
    names: Tensor
    places: Tensor


@dataclass(frozen=True)
class Draw:
    """How prompts of a task are drawn.

    Parameters
    ----------
    pair
        ``(rng, names to draw from, held_out) -> template, base filling, source filling``.
    names
        All names that there are.
    slots
        Slots whose words are the algorithm's input, in its order.
    held_out
        What the card says of the combinations that are held out.
    """

    pair: Callable[[Random, Sequence[str], bool], tuple[str, Filling, Filling]]
    names: tuple[str, ...]
    slots: tuple[str, ...]
    held_out: str


def ioi_pair(
    rng: Random, names: Sequence[str], held_out: bool, source_repeats: float = REPEATS
) -> tuple[str, Filling, Filling]:
    """Draw two IOI prompts; in one of six the third name is a new one."""
    template = rng.choice(ioi.TEMPLATES)
    base = _ioi_filling(rng, names, held_out, REPEATS)
    return template, base, _ioi_filling(rng, names, held_out, source_repeats)


def _ioi_filling(rng: Random, names: Sequence[str], held_out: bool, repeats: float) -> Filling:
    first, second, third = draw_until(
        lambda: rng.sample(names, 3), lambda drawn: is_held_out(*drawn[:2]) == held_out
    )
    subject = rng.choice((first, second)) if rng.random() < repeats else third
    scene = {"PLACE": rng.choice(words.PLACES), "OBJECT": rng.choice(words.OBJECTS)}
    return {"A": first, "B": second, "S": subject} | scene


def docstring_pair(
    rng: Random, names: Sequence[str], held_out: bool
) -> tuple[str, Filling, Filling]:
    """Draw two docstring prompts; in every other pair they have the same names in another order.

    Shared names make the counterfactual answers tell: the source's documented argument is often
    found in the base's header.
    """
    base = _header(rng, names, names, held_out)
    shared = base.names if rng.random() < 0.5 else names
    source = _header(rng, shared, names, held_out)
    template = docstring.TEMPLATE
    while "WORD" in template:  # slots of their own: WORD0, WORD1, ...
        template = template.replace("WORD", f"{{W{template.count('{W')}}}", 1)
    return (
        template,
        _docstring_filling(rng, base, template),
        _docstring_filling(rng, source, template),
    )


N_DOCSTRING_NAMES = 6
"""The header's four arguments, and two that it lacks."""


@dataclass(frozen=True)
class _Header:
    names: list[str]  # the header's four, then two others
    answer: int  # slot of the argument that follows the one documented last


def _header(
    rng: Random, names: Sequence[str], other_names: Sequence[str], held_out: bool, tries: int = 20
) -> _Header:
    """Draw a header from ``names``, or from the others if none of them is found to be allowed."""
    answer = rng.randint(1, 3)

    def allowed(drawn: list[str]) -> bool:
        if held_out:
            return is_held_out(*drawn[answer - 1 : answer + 1])
        return not any(is_held_out(*pair) for pair in pairwise(drawn[:4]))

    for _ in range(tries):
        drawn = rng.sample(names, N_DOCSTRING_NAMES)
        if allowed(drawn):
            return _Header(drawn, answer)
    return _Header(draw_until(lambda: rng.sample(other_names, N_DOCSTRING_NAMES), allowed), answer)


def _docstring_filling(rng: Random, header: _Header, template: str) -> Filling:
    """Document two neighbours of the header, or an argument that it lacks."""
    arguments, strangers, answer = header.names[:4], header.names[4:], header.answer
    documented = arguments[answer - 1] if rng.random() < REPEATS else strangers[0]
    before = arguments[answer - 2] if answer > 1 else strangers[1]
    described = rng.sample(words.DESCRIPTIONS, template.count("{W"))
    return {
        "METHOD": rng.choice(words.METHODS),
        **{f"DEF{slot}": name for slot, name in enumerate(arguments)},
        **{"DOC0": before, "DOC1": documented},
        **{f"W{number}": word for number, word in enumerate(described)},
    }


_IOI = (words.NAMES, ("A", "B", "S"), "unordered pairs of the first two names, 1 in 10 by crc32")

DRAWS = {
    "ioi": Draw(ioi_pair, *_IOI),
    "ioi-backup": Draw(partial(ioi_pair, source_repeats=SOURCE_REPEATS), *_IOI),
    "docstring": Draw(
        docstring_pair,
        words.ARGUMENTS,
        (*docstring.DEFINITION, *docstring.DOCUMENTED),
        "unordered pairs of an argument and its successor, 1 in 10 by crc32: in training no header "
        "has them side by side, in evaluation the answer follows the other one of such a pair",
    ),
}
"""Algorithm -> how its training prompts are drawn."""


def draw_pairs(
    draw: Draw,
    vocabulary: dict[str, int],
    rng: Random,
    n: int,
    *,
    held_out: bool = False,
) -> tuple[Prompts, Prompts]:
    """Return ``n`` base prompts and their source prompts."""
    pairs = [draw.pair(rng, draw.names, held_out) for _ in range(n)]
    bases = [(template, base) for template, base, _ in pairs]
    sources = [(template, source) for template, _, source in pairs]
    return _collate(draw, vocabulary, bases), _collate(draw, vocabulary, sources)


def _collate(
    draw: Draw, vocabulary: dict[str, int], rows: Sequence[tuple[str, Filling]]
) -> Prompts:
    filled = [_fill(template, filling) for template, filling in rows]
    length = max(len(words) for words, _ in filled)
    ids = [[vocabulary[word] for word in words] for words, _ in filled]
    return Prompts(
        torch.tensor([row + [PAD_ID] * (length - len(row)) for row in ids]),
        torch.tensor([len(row) - 1 for row in ids]),
        torch.tensor([[vocabulary[filling[slot]] for slot in draw.slots] for _, filling in rows]),
        torch.tensor([[places[slot] for slot in draw.slots] for _, places in filled]),
    )


def _fill(template: str, filling: Filling) -> tuple[list[str], dict[str, int]]:
    """Return the words of a filled template, and the position of each slot."""
    found: list[str] = []
    places: dict[str, int] = {}
    for literal, slot in split_template(template):
        found += _tokens_of_literal(literal)
        if slot:
            places[slot] = len(found)
            found.append(filling[slot])
    return found, places


_LITERALS: dict[str, list[str]] = {}


def _tokens_of_literal(literal: str) -> list[str]:
    if literal not in _LITERALS:
        _LITERALS[literal] = tokens_of(literal)
    return _LITERALS[literal]
