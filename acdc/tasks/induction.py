"""Induction: a sequence of random tokens begins again; say how it goes on.

``A B C D E A B C`` -> ``D``.  In the corrupted prompt the first round is made of other tokens
(``V W X Y Z A B C``), so nothing tells what follows ``C``; the wrong answer is the token that
stands where the answer stood (``Y``).  Other corruptions change one token of the first round: the
answer (``A B C Y E A B C``), so that the wrong answer follows ``C``, or the token before it
(``A B X D E A B C``), so that ``C`` comes for the first time.  All prompts are equally long, but
the length of a round varies, so that counting positions does not help.

Spans: ``END`` is the last token, ``A1`` where it stood in the first round, ``B1`` the answer
after that.

Prompts are token ids, drawn from the whole vocabulary but for special tokens: the task works
with any tokenizer and with none.

References
----------
Olsson et al. 2022, "In-context Learning and Induction Heads" (repeated random tokens);
Conmy et al. 2023, "Towards Automated Circuit Discovery", appendix on induction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from acdc.errors import TaskError
from acdc.tasks.base import Pair
from acdc.tasks.prompts import Draw, Generated, collect_pairs
from acdc.tasks.spec import TASKS, TaskSpec

__all__ = ["CORRUPTIONS", "LENGTH", "SPANS", "generate"]

CORRUPTIONS: dict[str, str] = {
    "random_first": "the first round is made of other tokens, so that nothing is repeated",
    "other_answer": "the answer in the first round is another token, the wrong answer",
    "other_before": "the token before the answer in the first round is another one",
}

SPANS = ("A1", "B1", "END")
"""Labels of positions, in order of the picture's columns."""

LENGTH = 20
"""Tokens of a prompt."""

ROUNDS = range(11, 17)
"""Lengths of a round; the rest of a prompt is the beginning of the second one."""


def generate(
    token_ids: Sequence[int], rng: Random, n_prompts: int, corruption: str
) -> list[Generated]:
    """Return ``n_prompts`` pairs of random tokens.

    Parameters
    ----------
    token_ids
        What the tokens are drawn from.
    rng
        The only source of randomness.
    n_prompts
        How many pairs.
    corruption
        A key of :data:`CORRUPTIONS`.

    Raises
    ------
    TaskError
        If there are too few tokens for two rounds of different ones.
    """
    need = 2 * max(ROUNDS)
    if len(token_ids) < need:
        raise TaskError(
            f"{len(token_ids)} tokens in the vocabulary besides special ones, at least {need} are "
            "needed for two rounds of different tokens: choose a model with a larger vocabulary"
        )
    return collect_pairs(n_prompts, _drawer(token_ids, rng, corruption), what="induction")


def _drawer(token_ids: Sequence[int], rng: Random, corruption: str) -> Draw:
    def draw(index: int) -> Generated | None:
        n = rng.choice(ROUNDS)
        chosen = rng.sample(token_ids, 2 * n)
        first, other = chosen[:n], chosen[n:]
        answer = LENGTH - n
        again = first[:answer]
        changed = {
            "random_first": range(n), "other_answer": (answer,), "other_before": (answer - 1,)
        }[corruption]  # fmt: skip
        corrupt = [other[i] if i in changed else token for i, token in enumerate(first)]
        default = Pair(
            (*first, *again),
            (*other, *again),
            (first[answer],),
            (other[answer],),
            spans={"A1": (answer - 1,), "B1": (answer,), "END": (LENGTH - 1,)},
        )
        pair = replace(default, corrupt=(*corrupt, *again))
        return Generated(pair, f"a round of {n} tokens", default)

    return draw


TASKS.add(
    TaskSpec(
        "induction",
        "random tokens, repeated: 'A B C D ... A B C' -> 'D'; of token ids, for any model",
        "language-small",
        generate,
        CORRUPTIONS,
        of_ids=True,
        spans=SPANS,
    ),
)
