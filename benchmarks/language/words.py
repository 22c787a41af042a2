"""Words of the generated text beyond the lists of :mod:`acdc.tasks.words`."""

from __future__ import annotations

from acdc.tasks import pronoun, words

__all__ = [
    "ANIMALS",
    "BAD",
    "DAYS",
    "GOOD",
    "MONTHS",
    "NUMBERS",
    "OBJECTS",
    "ORGANISATION",
    "PLACES",
    "STARTERS",
    "THINGS",
    "whole_words",
]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PLACES = words.PLACES + _words(
    "park beach museum library market church farm castle river bakery theater airport"
)
OBJECTS = words.OBJECTS + _words(
    "book letter flower ticket camera guitar hammer lamp blanket bottle mirror pencil"
)
ANIMALS = _words(
    "dog cat horse bird cow sheep fox wolf bear lion tiger duck mouse goat frog rabbit"
)
THINGS = _words(
    "movie book song meal hotel play concert show story game trip lecture album party film dish"
)
GOOD = _words(
    """
    great wonderful excellent amazing fantastic brilliant lovely beautiful delightful perfect
    charming superb funny clever fresh magnificent
    """
)
BAD = _words(
    """
    awful terrible horrible boring dreadful bad ugly stupid dull weak painful nasty poor lazy
    miserable disgusting
    """
)
NUMBERS = _words(
    """
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty
    """
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words(
    "January February March April May June July August September October November December"
)
ORGANISATION = _words(
    """
    American Advanced Atlantic Basic British Business Central Chief City Digital Data Direct
    Eastern Electric Executive Federal First Foreign General Global Great Health High Home
    Indian Inner Island Joint Junior Justice King Labor Large Local Main Marine
    Medical National Natural Northern Open Officer Outer Pacific Private Public Quality Quick
    Rapid Regional Royal Science Social Southern Technical Trade Trust United Urban Union Vital
    Visual Vast Water Western World Young Youth Yellow Zero Zone Zenith
    """
)
STARTERS = _words("The Then But A So And One His")
"""Words that begin a sentence after a stop, and go on in lower case after a comma."""


def whole_words() -> tuple[str, ...]:
    """Return every word that has to be one token after a space, in order, without repeats."""
    nouns = (noun for pair in pronoun.NOUNS for noun in pair)
    lists = (
        words.NAMES, words.GIRL_NAMES, words.BOY_NAMES, words.ARGUMENTS, words.METHODS,
        words.DESCRIPTIONS, words.EVENTS, nouns, PLACES, OBJECTS, ANIMALS, THINGS, GOOD, BAD,
        NUMBERS, DAYS, MONTHS, ORGANISATION, STARTERS, (word.lower() for word in STARTERS),
        _words("She He she he loved hated happy sad good bad gave decided wanted said to"),
    )  # fmt: skip
    return tuple(dict.fromkeys(word for some in lists for word in some))
