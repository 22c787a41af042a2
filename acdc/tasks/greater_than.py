"""Greater-than: end a war after it began.

"The war lasted from the year 1732 to the year 17" -> any of "33" to "99".  The corrupted prompt
begins in the year 1701, after which every end but "01" is right, or in an earlier year of its
century that ``--corruption`` names (after a later one most ends that are right are right of the
clean prompt, too).  Whatever it is, right and wrong ends are those of the clean prompt.  The metric
of the paper is ``prob_diff``: the probability of all right ends minus that of all others.

Years are those that the tokenizer splits into a century and two digits, one token each, as
GPT-2's does.  They begin at 02, after the corrupted one, and the last of each century is left
out, so that every prompt has right and wrong ends.  Ends are 00 to 99.

Spans: ``noun`` is the event, ``XX`` and ``YY`` the century and the two digits of the start year,
``END`` the last token, the century of the end year.

References
----------
Hanna, Liu and Variengien 2023, "How does GPT-2 compute greater-than?", section 2 (prompts, the
01-dataset and the metric).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random

from acdc.errors import TaskError
from acdc.tasks.base import Pair, Tokenizer
from acdc.tasks.prompts import (
    Draw,
    Generated,
    collect_pairs,
    encode,
    fill_template,
    fork,
    single_token_words,
)
from acdc.tasks.spec import TASKS, TaskSpec
from acdc.tasks.words import EVENTS

__all__ = ["CORRUPTIONS", "SPANS", "TEMPLATE", "generate", "two_digit_tokens"]

CORRUPTIONS: dict[str, str] = {
    "year_01": "the event begins in the year 01 of its century",
    "earlier_year": "the event begins in an earlier year of its century, drawn",
    "first_decade": "the event begins in an earlier year from 01 to 09 of its century, drawn",
}

SPANS = ("noun", "XX", "YY", "END")
"""Labels of positions, in order of the picture's columns."""

TEMPLATE = "The {EVENT} lasted from the year {START} to the year {CENTURY}"
CENTURIES = tuple(range(11, 18))
CORRUPT_YEAR = 1
"""The last two digits of the start year in the corrupted prompt of ``year_01``."""

FEWEST_EVENTS, FEWEST_YEARS = 2, 20


def generate(tokenizer: Tokenizer, rng: Random, n_prompts: int, corruption: str) -> list[Generated]:
    """Return ``n_prompts`` pairs; all later ends are answers, all others wrong answers.

    Parameters
    ----------
    tokenizer
        Events that are not one token of it, and years that are not two, are left out.
    rng
        The only source of randomness.
    n_prompts
        How many pairs.
    corruption
        A key of :data:`CORRUPTIONS`.

    Raises
    ------
    TaskError
        If fewer than two events are one token, or fewer than twenty years two.
    """
    years = _years(tokenizer)
    if sum(map(len, years.values())) < FEWEST_YEARS:
        raise TaskError(
            f"{sum(map(len, years.values()))} years from 1102 to 1798 are two tokens of this "
            f"tokenizer (as 17 and 32), at least {FEWEST_YEARS} are needed: choose a model of the "
            "GPT-2 family (gpt2, distilgpt2), or give a task file"
        )
    events = single_token_words(
        tokenizer, EVENTS, before="The", after=" lasted from", need=FEWEST_EVENTS, what="events"
    )
    draw = _drawer(tokenizer, rng, events, years, corruption)
    return collect_pairs(n_prompts, draw, what="greater-than")


def two_digit_tokens(tokenizer: Tokenizer, century: int) -> dict[int, int]:
    """Return ``{32: token of "32"}`` for the years that are the century's token and one more."""
    head = encode(tokenizer, f" {century}")
    found = {}
    for digits in range(100):
        ids = encode(tokenizer, f" {century}{digits:02d}")
        if len(head) == 1 and len(ids) == 2 and ids[:1] == head:
            found[digits] = ids[1]
    unknown = getattr(tokenizer, "unk_token_id", None)
    return {digits: token for digits, token in found.items() if token != unknown}


def _years(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Century -> last two digits that a prompt may begin with, those of a sound 01 alone."""
    found = {}
    for century in CENTURIES:
        known = two_digit_tokens(tokenizer, century)
        later = sorted(digits for digits in known if digits > CORRUPT_YEAR)
        if CORRUPT_YEAR in known:
            found[century] = later[:-1]
    return found


def _ends(tokenizer: Tokenizer) -> dict[int, int]:
    """Two digits -> their token, from all centuries: some years are one token in one of them.

    A whole century (1700) is one token in all of them; its 00 is taken from where the other
    digits, written alone, are the same tokens as in a year.
    """
    ends: dict[int, int] = {}
    for century in CENTURIES:
        ends = two_digit_tokens(tokenizer, century) | ends
    alone = {digits: encode(tokenizer, f"{digits:02d}") for digits in (0, *ends)}
    if len(alone[0]) == 1 and all(alone[digits] == [token] for digits, token in ends.items()):
        ends.setdefault(0, alone[0][0])
    return ends


def _drawer(
    tokenizer: Tokenizer,
    rng: Random,
    events: list[str],
    years: Mapping[int, list[int]],
    corruption: str,
) -> Draw:
    ends = _ends(tokenizer)
    earlier = {century: sorted(two_digit_tokens(tokenizer, century)) for century in years}
    own = fork(rng)
    every = [(century, digits) for century, some in years.items() for digits in some]

    def draw(index: int) -> Generated | None:
        event, (century, start) = rng.choice(events), rng.choice(every)
        end = {"year_01": CORRUPT_YEAR + 1, "earlier_year": start, "first_decade": 10}[corruption]
        other = own.choice([d for d in earlier[century] if CORRUPT_YEAR <= d < min(start, end)])
        clean, corrupt, default = (
            fill_template(
                tokenizer,
                TEMPLATE,
                {"EVENT": event, "START": f"{century}{digits:02d}", "CENTURY": str(century)},
            )
            for digits in (start, other, CORRUPT_YEAR)
        )
        if clean is None or corrupt is None or default is None:
            return None
        if not clean.slots == corrupt.slots == default.slots:
            return None
        right = tuple(token for digits, token in sorted(ends.items()) if digits > start)
        wrong = tuple(token for digits, token in sorted(ends.items()) if digits <= start)
        (noun, _), (year, _), _ = clean.slots
        spans: dict[str, tuple[int, ...]]
        spans = {"noun": (noun,), "XX": (year,), "YY": (year + 1,), "END": (clean.last,)}
        pair = Pair(clean.ids, corrupt.ids, right, wrong, spans=spans)
        return Generated(pair, TEMPLATE, replace(pair, corrupt=default.ids))

    return draw


TASKS.add(
    TaskSpec(
        "greater-than",
        "a later year: 'The war lasted from the year 1732 to the year 17' -> '33' ... '99'",
        "language-small",
        generate,
        CORRUPTIONS,
        metric="prob_diff",
        spans=SPANS,
    ),
)
