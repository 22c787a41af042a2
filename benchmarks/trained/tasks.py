"""What the models learn: examples to train on, and pairs of prompts to measure on.

Both prompts of a pair have one length, and where the answer is a token of the prompt, it stands
elsewhere in each: where it stands at one place in both, a circuit is faithful without the queries
and keys that look for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

__all__ = ["BOS", "END", "MODULUS", "N_SPECIAL", "TASKS", "Example", "PromptPair", "Task", "unseen"]

BOS, END = 0, 1
N_SPECIAL = 2


@dataclass(frozen=True)
class Example:
    """A sequence to train on: tokens, and position -> the token that comes next there."""

    tokens: tuple[int, ...]
    targets: dict[int, int]


@dataclass(frozen=True)
class PromptPair:
    """Two prompts, scored at the last position, with what is right after each."""

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: int
    corrupt_answer: int


@dataclass(frozen=True)
class Task:
    """What one model learns.

    Parameters
    ----------
    description
        One line.
    n_tokens, n_ctx
        Of the vocabulary, and of the longest sequence.
    draw
        Draws an example from the first so many tokens that are no special ones.
    draw_pair
        Draws a pair.
    """

    description: str
    n_tokens: int
    n_ctx: int
    draw: Callable[[Random, int], Example]
    draw_pair: Callable[[Random], PromptPair]

    @property
    def n_symbols(self) -> int:
        """Tokens that are no special ones."""
        return self.n_tokens - N_SPECIAL


def _symbols(n: int) -> range:
    return range(N_SPECIAL, N_SPECIAL + n)


# --- the twins ----------------------------------------------------------------------------

N_LETTERS, LENGTHS = 24, (4, 8)
"""Letters, and how many of them a sequence has at least and at most."""


def _sequence(source: list[int], start: int, n: int, step: int) -> tuple[int, ...]:
    """``BOS source END`` and ``n`` of its tokens from ``start`` on, one after the other."""
    said = [source[start + step * i] for i in range(n)]
    return (BOS, *source, END, *said)


def _follow(step: int) -> tuple[Callable[[Random, int], Example], Callable[[Random], PromptPair]]:
    """Samplers of the twins: the next token in the order of the source, or in its reverse."""

    def draw(rng: Random, n_symbols: int) -> Example:
        length = rng.randint(LENGTHS[0], min(LENGTHS[1], n_symbols))
        source = rng.sample(_symbols(n_symbols), length)
        first = rng.randrange(length - 1)  # of the order in which they are said
        start = first if step == 1 else length - 1 - first
        tokens = _sequence(source, start, length - first, step)
        said_at = range(length + 2, len(tokens) - 1)
        return Example(tokens[:-1], {at: tokens[at + 1] for at in said_at})

    def draw_pair(rng: Random) -> PromptPair:
        length, n_said = LENGTHS[1], 2
        letters = rng.sample(_symbols(N_LETTERS), length)
        prompts = []
        for first in rng.sample(range(length - n_said), 2):
            source = rng.sample(letters, length)
            start = first if step == 1 else length - 1 - first
            prompts.append(_sequence(source, start, n_said + 1, step))
        (*clean, answer), (*corrupt, other) = prompts
        if answer == other:
            return draw_pair(rng)
        return PromptPair(tuple(clean), tuple(corrupt), answer, other)

    return draw, draw_pair


def _twin(description: str, step: int) -> Task:
    return Task(description, N_SPECIAL + N_LETTERS, 2 * LENGTHS[1] + 2, *_follow(step))


# --- sorting ------------------------------------------------------------------------------

N_NUMBERS = 20


def _draw_sorting(rng: Random, n_symbols: int) -> Example:
    """``BOS numbers END`` and the numbers in order, from any of them on."""
    numbers = rng.sample(_symbols(n_symbols), rng.randint(*LENGTHS))
    said = sorted(numbers)[rng.randrange(len(numbers) - 1) :]
    tokens = (BOS, *numbers, END, *said)
    said_at = range(len(numbers) + 2, len(tokens) - 1)
    return Example(tokens[:-1], {at: tokens[at + 1] for at in said_at})


def _draw_sorting_pair(rng: Random) -> PromptPair:
    """The same numbers in two orders, each with another one said last."""
    numbers = sorted(rng.sample(_symbols(N_NUMBERS), LENGTHS[1]))
    prompts = []
    for last in rng.sample(range(LENGTHS[1] - 1), 2):
        source = rng.sample(numbers, LENGTHS[1])
        prompts.append(((BOS, *source, END, numbers[last]), numbers[last + 1], source))
    (clean, answer, first), (corrupt, other, second) = prompts
    if first.index(answer) == second.index(other):
        return _draw_sorting_pair(rng)
    return PromptPair(clean, corrupt, answer, other)


# --- modular addition ---------------------------------------------------------------------

MODULUS = 23


def unseen(a: int, b: int) -> bool:
    """Whether training leaves a sum out: one in ten of them."""
    return (31 * a + 17 * b) % 10 == 0


def _sum(a: int, b: int) -> tuple[tuple[int, ...], int]:
    """``a b END``, and the sum."""
    return (N_SPECIAL + a, N_SPECIAL + b, END), N_SPECIAL + (a + b) % MODULUS


def _draw_sum(rng: Random, n_symbols: int) -> Example:
    a, b = rng.randrange(n_symbols), rng.randrange(n_symbols)
    if unseen(a, b):
        return _draw_sum(rng, n_symbols)
    tokens, answer = _sum(a, b)
    return Example(tokens, {len(tokens) - 1: answer})


def _draw_sum_pair(rng: Random) -> PromptPair:
    (clean, answer), (corrupt, other) = (
        _sum(rng.randrange(MODULUS), rng.randrange(MODULUS)) for _ in range(2)
    )
    return PromptPair(clean, corrupt, answer, other) if answer != other else _draw_sum_pair(rng)


TASKS: dict[str, Task] = {
    "trained-copy": _twin("after a token of a sequence of unique ones, say the one after it", 1),
    "trained-reverse": _twin(
        "after a token of a sequence of unique ones, say the one before it", -1
    ),
    "trained-sorted": Task(
        "after a number of an unsorted list, say the next greater one of it",
        N_SPECIAL + N_NUMBERS,
        2 * LENGTHS[1] + 2,
        _draw_sorting,
        _draw_sorting_pair,
    ),
    "trained-addition": Task(
        f"add two numbers modulo {MODULUS}",
        N_SPECIAL + MODULUS,
        3,
        _draw_sum,
        _draw_sum_pair,
    ),
}
