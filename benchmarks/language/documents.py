"""Generated text: short documents of every task, in several forms each.

A :class:`Document` is a text in which some words are answers: words that what stands before
them decides.  Training scores all tokens and the answers most; an evaluation cuts the document
before its last answer.

Words are paired freely but for one combination in ten (:func:`is_held_out`, by a hash): those
never stand together in training, and an evaluation takes nothing else.

=============  ==================================================================================
task           what is held out
=============  ==================================================================================
ioi            unordered pairs of names (all pairs in a document count), and place with object
docstring      unordered pairs of neighbouring arguments
greater-than   event with start year
pronoun        noun with name
acronym        unordered pairs of neighbouring words
sentiment      thing with adjective
counting       first number with step; series of names; object with how often it stands there
capitals       animal with place
=============  ==================================================================================
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from acdc.tasks import greater_than, ioi, pronoun, words
from benchmarks.language.words import (
    ANIMALS,
    BAD,
    DAYS,
    GOOD,
    MONTHS,
    NUMBERS,
    OBJECTS,
    ORGANISATION,
    PLACES,
    STARTERS,
    THINGS,
)

__all__ = ["DOCUMENTS", "Answer", "Document", "Draw", "is_held_out", "sample_texts"]

HELD_OUT_IN = 10
"""One combination in so many is held out."""


class Answer(str):
    """A part of a document that the text before it decides."""

    __slots__ = ()


@dataclass(frozen=True)
class Document:
    """A short text with answers in it.

    Parameters
    ----------
    parts
        The text in pieces; those that are an :class:`Answer` are scored.
    wrong
        What the last answer must not be.
    right
        What the last answer may be, if there is more than one.
    """

    parts: tuple[str, ...]
    wrong: tuple[str, ...]
    right: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.parts)

    @property
    def prompt(self) -> str:
        """The text before the last answer."""
        return "".join(self.parts[: self._last])

    @property
    def answers(self) -> tuple[str, ...]:
        """What the last answer may be."""
        return self.right or (str(self.parts[self._last]),)

    @property
    def _last(self) -> int:
        return max(i for i, part in enumerate(self.parts) if isinstance(part, Answer))


_T = TypeVar("_T")

Draw = Callable[[Random, bool], Document]
"""Draw a document; the flag asks for held-out combinations."""


def is_held_out(*combination: str) -> bool:
    """Return whether training must not have these words together, in any order.

    Examples
    --------
    >>> is_held_out("Mary", "John") == is_held_out("John", "Mary")
    True
    """
    return zlib.crc32(" ".join(sorted(combination)).encode()) % HELD_OUT_IN == 0


def _draw_until(draw: Callable[[], _T], accept: Callable[[_T], bool]) -> _T:
    while True:
        drawn = draw()
        if accept(drawn):
            return drawn


def _pair(rng: Random, first: Sequence[str], second: Sequence[str], held_out: bool) -> list[str]:
    """Draw a word of each list that are, or are not, a held-out pair."""
    return _draw_until(
        lambda: [rng.choice(first), rng.choice(second)],
        lambda drawn: is_held_out(*drawn) == held_out,
    )


# Indirect objects: the answer is a name that stands there once

SCENES = (
    "Then, {A} and {B} went to the {PLACE}.",
    "After the lunch, {A} and {B} were at the {PLACE}.",
    "One day {A} and {B} met at the {PLACE}.",
    "Friends {A} and {B} were working at the {PLACE}.",
)
"""Openings with two names."""

GIFTS = (
    " {S} gave a {OBJECT} to",
    " {S} decided to give a {OBJECT} to",
    " {S} wanted to give a {OBJECT} to",
    " There {S} handed a {OBJECT} to",
)
"""How they go on with the subject's name."""

ORDERS = (
    "Then, {A} went to the {PLACE}. There {B} saw {D}, and a friend gave a {OBJECT} to",
    "When {A} was at the {PLACE}, {B} met {D}, and a {OBJECT} was given to",
    "After {A} found a {OBJECT} at the {PLACE}, {B} asked {D}, and it was given to",
    "One day {A} was late. So {B} and {D} went to the {PLACE}, where a {OBJECT} was given to",
)
"""The second or the third name is the first one's again: frames do not tell which."""

ABSENT = (
    "When {C} was late, nobody waited for {C}.",
    "One day {C} was ill, so {C} stayed at home.",
    "After {C} left, all talked about {C}.",
)
"""A third person who is named twice before the two."""

TRIOS = (
    "Then, {A}, {B} and {D} went to the {PLACE}.",
    "After the lunch, {A}, {B} and {D} were at the {PLACE}.",
    "Friends {A}, {B} and {D} met at the {PLACE}.",
)
TRIO_GIFTS = (
    " {S} and {C} gave a {OBJECT} to",
    " {S} talked to {C} and then gave a {OBJECT} to",
    " With the help of {C}, {S} handed a {OBJECT} to",
    " {S} took a {OBJECT} of {C} and gave it to",
)
"""Two of three are named again, the subject first or last; it goes to the one who is not."""


def _names(rng: Random, number: int, held_out: bool) -> list[str]:
    """Draw names all of whose pairs are held out (of three, one pair), or none is."""

    def accept(drawn: list[str]) -> bool:
        if held_out:
            return is_held_out(*drawn[:2])
        return not any(is_held_out(*pair) for pair in itertools.combinations(drawn, 2))

    return _draw_until(lambda: rng.sample(words.NAMES, number), accept)


def _gift(rng: Random, frame: str, names: dict[str, str], held_out: bool) -> Document:
    """Fill a frame, let ``names["IO"]`` be its answer, and sometimes go on after it."""
    place, thing = _pair(rng, PLACES, OBJECTS, held_out)
    text = frame.format(**names, PLACE=place, OBJECT=thing)
    tail = rng.choice((".", ".", " and went home.", f". Then {names['IO']} thanked {names['S']}."))
    others = {f" {name}" for slot, name in names.items() if slot in "SC"}
    return Document((text, Answer(f" {names['IO']}"), tail), tuple(sorted(others)))


def _ioi_frame(rng: Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(ioi.TEMPLATES)
    return rng.choice(SCENES) + rng.choice(GIFTS)


def _ioi(subject_first: bool) -> Draw:
    def draw(rng: Random, held_out: bool) -> Document:
        first, second = _names(rng, 2, held_out)
        subject, io = (first, second) if subject_first else (second, first)
        names = {"A": first, "B": second, "S": subject, "IO": io}
        return _gift(rng, _ioi_frame(rng), names, held_out)

    return draw


def _ioi_order(rng: Random, held_out: bool) -> Document:
    subject, io = _names(rng, 2, held_out)
    second, third = rng.sample((subject, io), 2)
    names = {"A": subject, "B": second, "D": third, "S": subject, "IO": io}
    return _gift(rng, rng.choice(ORDERS), names, held_out)


def _ioi_absent(rng: Random, held_out: bool) -> Document:
    first, second, third = _names(rng, 3, held_out)
    subject, io = rng.sample((first, second), 2)
    names = {"A": first, "B": second, "S": subject, "IO": io, "C": third}
    frame = f"{rng.choice(ABSENT)} {rng.choice(SCENES)}{rng.choice(GIFTS)}"
    return _gift(rng, frame, names, held_out)


def _ioi_trio(rng: Random, held_out: bool) -> Document:
    subject, io, third = _names(rng, 3, held_out)
    order = rng.sample((subject, io, third), 3)
    names = dict(zip("ABD", order, strict=True)) | {"S": subject, "IO": io, "C": third}
    return _gift(rng, rng.choice(TRIOS) + rng.choice(TRIO_GIFTS), names, held_out)


def _ioi_abc(rng: Random, held_out: bool) -> Document:
    """Nobody is named twice, so it goes to anybody, whoever gives: only a repeat decides."""
    people = _names(rng, 3, held_out)
    place, thing = _pair(rng, PLACES, OBJECTS, held_out)
    if rng.random() < 0.7:
        frame, slots = _ioi_frame(rng), "ABS"
    else:
        frame, slots = rng.choice(ORDERS), "ABD"
    text = frame.format(**dict(zip(slots, people, strict=True)), PLACE=place, OBJECT=thing)
    return _to_any(rng, text, people, repeated=())


def _ioi_new(rng: Random, held_out: bool) -> Document:
    """One of three is named again beside a new one; it goes to any of those named once."""
    people = _names(rng, 4, held_out)
    place, thing = _pair(rng, PLACES, OBJECTS, held_out)
    subject, *others = people
    new, listed = others[-1], rng.sample(people[:3], 3)
    names = dict(zip("ABD", listed, strict=True))
    names |= dict(zip("SC", rng.sample((subject, new), 2), strict=True))
    frame = rng.choice(TRIOS) + rng.choice(TRIO_GIFTS)
    return _to_any(rng, frame.format(**names, PLACE=place, OBJECT=thing), others, (subject,))


def _to_any(rng: Random, text: str, once: Sequence[str], repeated: Sequence[str]) -> Document:
    """Return a text that goes on with any of the people who are named once."""
    answers = tuple(f" {name}" for name in once)
    wrong = tuple(f" {name}" for name in repeated or _strangers(rng, text))
    return Document((text, Answer(rng.choice(answers)), "."), wrong, right=answers)


def _strangers(rng: Random, text: str) -> list[str]:
    """Return a name that the text does not have."""
    return [_draw_until(lambda: rng.choice(words.NAMES), lambda name: name not in text)]


# Docstrings


def _docstring(n_arguments: int, n_documented: int, start: int) -> Draw:
    """Return what draws docstrings of so many arguments that document some from ``start``."""

    def draw(rng: Random, held_out: bool) -> Document:
        answer = start + n_documented

        def accept(drawn: list[str]) -> bool:
            if held_out:
                return is_held_out(drawn[answer - 1], drawn[answer])
            return not any(is_held_out(*pair) for pair in itertools.pairwise(drawn))

        arguments = _draw_until(lambda: rng.sample(words.ARGUMENTS, n_arguments), accept)
        return _docstring_of(rng, arguments, start, answer)

    return draw


def _docstring_of(rng: Random, arguments: list[str], start: int, answer: int) -> Document:
    descriptions = iter(rng.sample(words.DESCRIPTIONS, 3 + 2 * (answer + 1 - start)))

    def phrase(length: int) -> str:
        return " ".join(itertools.islice(descriptions, length))

    header = f"\ndef {rng.choice(words.METHODS)}(self, {', '.join(arguments)}):\n"
    parts = [f'{header}    """{phrase(3)}\n']
    for number in range(start, answer + 1):
        name = f" {arguments[number]}"
        # where the docstring skips arguments nothing tells the first one it has
        parts += ["\n    :param", name if number == start and start else Answer(name)]
        parts += [f": {phrase(2)}"]
    wrong = tuple(f" {name}" for number, name in enumerate(arguments) if number != answer)
    return Document(tuple(parts), wrong)


def _docstring_any(rng: Random, held_out: bool) -> Document:
    """Draw any number of arguments, so that no position tells the answer."""
    n_arguments, n_documented = rng.randint(3, 6), rng.randint(1, 3)
    n_documented = min(n_documented, n_arguments - 1)
    start = rng.randint(0, n_arguments - n_documented - 1)
    return _docstring(n_arguments, n_documented, start)(rng, held_out)


# Years

YEARS = (
    greater_than.TEMPLATE,
    "The {EVENT} began in {START} and ended in {CENTURY}",
    "From {START} on there was a {EVENT}, until the year {CENTURY}",
)


def _greater_than(templates: Sequence[str]) -> Draw:
    def draw(rng: Random, held_out: bool) -> Document:
        years = [str(digits) for digits in range(2, 99)]
        event, year = _pair(rng, words.EVENTS, years, held_out)
        start, century = int(year), rng.randrange(11, 20)
        filling = {"EVENT": event, "START": f"{century}{start:02d}", "CENTURY": century}
        text = rng.choice(templates).format(**filling)
        ends = [f"{digits:02d}" for digits in range(100)]
        later = ends[start + 1 :]
        return Document(
            (text, Answer(rng.choice(later)), "."), tuple(ends[: start + 1]), tuple(later)
        )

    return draw


# Pronouns


def _pronoun(rng: Random, held_out: bool) -> Document:
    gender = rng.randrange(2)
    nouns = [pair[gender] for pair in pronoun.NOUNS]
    names = (words.GIRL_NAMES, words.BOY_NAMES)[gender]
    noun, name = _pair(rng, nouns, names, held_out)
    template = rng.choice(pronoun.TEMPLATES)
    both = (" She", " He") if template.endswith(".") else (" she", " he")
    tail = rng.choice((" was happy.", " had a plan.", " went home."))
    text = template.format(NOUN=noun, NAME=name)
    return Document((text, Answer(both[gender]), tail), (both[1 - gender],))


# Acronyms


def _acronym(rng: Random, held_out: bool) -> Document:
    def accept(drawn: list[str]) -> bool:
        pairs = list(itertools.pairwise(drawn))
        if held_out:
            # some letter has to be wrong
            return is_held_out(*pairs[-1]) and len({word[0] for word in drawn}) > 1
        return not any(is_held_out(*pair) for pair in pairs)

    chosen = _draw_until(lambda: rng.sample(ORGANISATION, 3), accept)
    opening = rng.choice(("The", "They went to the", "In May the"))
    letters = [Answer(word[0]) for word in chosen]
    wrong = tuple(sorted({word[0] for word in chosen[:-1]} - {letters[-1]}))
    tail = rng.choice((") said so.", ") was there.", ")"))
    return Document((f"{opening} {' '.join(chosen)} (", *letters, tail), wrong)


# Sentiment

REVIEWS = (
    ("The {THING} was {ADJ} and {ADJ2}. I", " loved", " hated", " it."),
    ("I saw that {THING}. It was so {ADJ} that it made me", " happy", " sad", "."),
    ("Review: the {THING} was {ADJ}, really {ADJ2}. In short it was", " good", " bad", "."),
)


def _sentiment(rng: Random, held_out: bool) -> Document:
    good = rng.randrange(2) == 0
    thing, adjective = _pair(rng, THINGS, GOOD if good else BAD, held_out)
    template, liked, disliked, tail = rng.choice(REVIEWS)
    second = _draw_until(
        lambda: rng.choice(GOOD if good else BAD),
        lambda word: word != adjective and not is_held_out(thing, word),
    )
    text = template.format(THING=thing, ADJ=adjective, ADJ2=second)
    right, wrong = (liked, disliked) if good else (disliked, liked)
    return Document((text, Answer(right), tail), (wrong,))


# Counting


def _count_on(rng: Random, held_out: bool) -> Document:
    """Continue numbers by a step, or number words, days and months by one."""
    length = rng.randint(3, 5)
    if rng.random() < 2 / 3:
        starts = [str(number) for number in range(1, 40)]
        start, step = _pair(rng, starts, ["1", "2", "3", "5", "10"], held_out)
        series = [str(int(start) + int(step) * i) for i in range(length + 1)]
    else:
        series = _draw_until(
            lambda: _named_series(rng), lambda drawn: is_held_out(*drawn[:-1]) == held_out
        )
    opening = rng.choice(("Count:", "In order:", "Then"))
    separator = rng.choice((",", ""))
    shown = f"{separator} ".join(series[:-1])
    return Document(
        (f"{opening} {shown}{separator}", Answer(f" {series[-1]}")), (f" {series[-2]}",)
    )


def _named_series(rng: Random) -> list[str]:
    names, length = rng.choice((NUMBERS, DAYS, MONTHS)), rng.randint(3, 5)
    first = rng.randrange(len(names) - length)
    return list(names[first : first + length + 1])


def _count_items(rng: Random, held_out: bool) -> Document:
    thing, number = _pair(rng, OBJECTS, NUMBERS[:6], held_out)
    n = NUMBERS.index(number) + 1
    items = " ".join([thing] * n)
    text = f"Count: {items}. Together there are"
    wrong = tuple(f" {word}" for word in NUMBERS[:6] if word != number)
    return Document((text, Answer(f" {number}"), "."), wrong)


# Capitals

DEEDS = ("slept near the", "ran to the", "was at the", "looked at the", "came from the")


def _capitals(rng: Random, held_out: bool) -> Document:
    animal, place = _pair(rng, ANIMALS, PLACES, held_out)
    stops = rng.random() < 0.5
    mark = rng.choice((".", "!", "?") if stops else (",", ";", ":"))
    text = f"{rng.choice(('The', 'A', 'Then a', 'One'))} {animal} {rng.choice(DEEDS)} {place}{mark}"
    capital = [f" {word}" for word in STARTERS]
    lower = [f" {word.lower()}" for word in STARTERS]
    right, wrong = (capital, lower) if stops else (lower, capital)
    other = rng.choice([word for word in ANIMALS if not is_held_out(word, place)])
    return Document(
        (text, Answer(rng.choice(right)), f" {other} was there."), tuple(wrong), tuple(right)
    )


DOCUMENTS: dict[str, dict[str, Draw]] = {
    "ioi": {
        "abba": _ioi(subject_first=False),
        "baba": _ioi(subject_first=True),
        "order": _ioi_order,
        "absent": _ioi_absent,
        "trio": _ioi_trio,
        "abc": _ioi_abc,
        "new": _ioi_new,
    },
    "docstring": {"task": _docstring(4, 2, 0), "any": _docstring_any},
    "greater-than": {"task": _greater_than(YEARS[:1]), "other": _greater_than(YEARS[1:])},
    "pronoun": {"any": _pronoun},
    "acronym": {"any": _acronym},
    "sentiment": {"any": _sentiment},
    "counting": {"on": _count_on, "items": _count_items},
    "capitals": {"any": _capitals},
}
"""Task -> form -> what draws it."""


def sample_texts(seed: int, number: int = 1500) -> list[str]:
    """Return so many documents of every form, for a tokenizer to learn their words."""
    rng = Random(seed)
    draws = [draw for forms in DOCUMENTS.values() for draw in forms.values()]
    return [draw(rng, False).text for draw in draws for _ in range(number)]
