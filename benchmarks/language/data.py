"""Rows of tokens with weights, and the batch of a training step.

A step's batch is a function of the seed and the step's number, nothing else: that is the
whole data position, and a training that is stopped goes on with the batches it would have had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

import numpy as np
import torch

from acdc.tasks import words
from benchmarks.language.documents import DOCUMENTS, Answer, Document
from benchmarks.language.source import Corpus

__all__ = [
    "Batches",
    "Mixture",
    "Row",
    "collate",
    "disguised",
    "encode_corpus",
    "encode_document",
    "repeated_row",
]

ANSWER_WEIGHT, OTHER_WEIGHT, TEXT_WEIGHT = 8.0, 1.0, 1.0
"""What the cross-entropy of a token counts: an answer, any other generated one, real text."""

OTHER_SHARE = 0.3
"""Generated tokens besides answers that are scored: frames are soon known, so a part will do."""

REPEAT_WEIGHT = 1.5
"""What a token from the second round of random tokens on counts; the first cannot be known."""

DISGUISED_SHARE = 0.5
"""Documents about names or arguments that have random tokens in their place."""

DISGUISED = {"ioi": words.NAMES, "docstring": words.ARGUMENTS}
"""Task -> words that random tokens may stand for.

A model that only ever sees the same hundred names may add up which of them it has read, and
answer with what it read once; that takes no head that reads another.  A token that nothing but
its place makes a name has to be found by its place, and its repeat by comparing tokens.
"""

BLOCK, HELD_OUT_BLOCKS = 2048, 50
"""Of the real text's blocks of so many tokens, one in so many is held out."""

BOS_SHARE = 0.25
"""Generated documents that begin with the end-of-text token."""


@dataclass(frozen=True)
class Row:
    """Tokens, and what the prediction of each counts (that of the first is never asked)."""

    tokens: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Mixture:
    """What one step reads.

    Parameters
    ----------
    documents
        ``(task, form)`` -> documents a step.
    n_repeats
        Rows of random tokens that are repeated.
    n_texts
        Windows of real text.
    n_pool
        How many tokens of the vocabulary the repeats are drawn from, at most.
    text_length
        Tokens of a window.
    """

    documents: Mapping[tuple[str, str], int]
    n_repeats: int
    n_texts: int
    n_pool: int | None = None
    text_length: int = 128


def encode_document(tokenizer: Any, document: Document, rng: Random) -> Row:
    """Return a document's row; every token that overlaps an answer counts as one.

    The text is encoded as a whole, and an answer found by where it stands in it; of the other
    tokens a random part is scored.
    """
    encoded = tokenizer(document.text, return_offsets_mapping=True)
    at_answer = np.zeros(len(document.text), dtype=bool)
    start = 0
    for part in document.parts:
        at_answer[start : start + len(part)] = isinstance(part, Answer)
        start += len(part)
    weights = [
        ANSWER_WEIGHT
        if at_answer[first:last].any()
        else OTHER_WEIGHT * (rng.random() < OTHER_SHARE)
        for first, last in encoded["offset_mapping"]
    ]
    return Row(encoded["input_ids"], weights)


def disguised(rng: Random, row: Row, disguises: Set[int], d_vocab: int) -> Row:
    """Return the row with a random token, always the same one, for each of some tokens.

    Examples
    --------
    >>> row = Row([5, 7, 5, 9], [0.0, 1.0, 1.0, 1.0])
    >>> disguised(Random(0), row, {5, 9}, 100).tokens
    [50, 7, 50, 98]
    """
    found = dict.fromkeys(token for token in row.tokens if token in disguises)
    free = [rng.randrange(1, d_vocab) for _ in range(3 * len(found))]
    fresh = [token for token in dict.fromkeys(free) if token not in row.tokens]
    mapping = dict(zip(found, fresh, strict=False))
    return Row([mapping.get(token, token) for token in row.tokens], row.weights)


def repeated_row(rng: Random, pool: Sequence[int]) -> Row:
    """Draw tokens of a pool that come two to four times in the same order."""
    length, rounds = rng.randint(4, 20), rng.randint(2, 4)
    tokens = [rng.choice(pool) for _ in range(length)]
    # the first of the second round cannot be known either
    n_known = length * (rounds - 1) - 1
    return Row(tokens * rounds, [0.0] * (length + 1) + [REPEAT_WEIGHT] * n_known)


def encode_corpus(tokenizer: Any, corpus: Corpus) -> np.ndarray:
    """Return all texts' tokens in one array; each text begins with the end-of-text token.

    Source comes first, then prose.
    """
    end = tokenizer.bos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch([*corpus.source, *corpus.prose])
    return np.concatenate([np.array([end, *each.ids], dtype=np.uint16) for each in encoded])


def collate(rows: Sequence[Row], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and weights, both ``[batch, pos]``; padding is on the right and counts 0."""
    length = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), length), pad)
    weights = torch.zeros(len(rows), length)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = torch.tensor(row.tokens)
        weights[number, : len(row.weights)] = torch.tensor(row.weights)
    return tokens, weights


class Batches:
    """The batch of every step.

    Parameters
    ----------
    tokenizer
        The model's.
    text
        Tokens of the real text.
    seed
        Seed of all batches.
    n_chunks
        Parts that the generated rows of a step are cut into, sorted by length, so that little
        is padding.
    """

    def __init__(self, tokenizer: Any, text: np.ndarray, seed: int, n_chunks: int = 3) -> None:
        self.tokenizer, self.text, self.seed, self.n_chunks = tokenizer, text, seed, n_chunks
        self.pad = tokenizer.pad_token_id

    def rows(self, step: int, mixture: Mixture) -> tuple[list[Row], list[Row]]:
        """Return the generated rows of a step, and its windows of real text."""
        rng = Random(f"{self.seed}/{step}")
        generated = [
            self._started(rng, self._document(rng, task, form))
            for (task, form), number in mixture.documents.items()
            for _ in range(number)
        ]
        pool = self._pool[: mixture.n_pool]
        generated += [repeated_row(rng, pool) for _ in range(mixture.n_repeats)]
        return generated, [self._window(rng, mixture) for _ in range(mixture.n_texts)]

    def batch(self, step: int, mixture: Mixture) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return a step's tokens and weights in parts to be run one after the other."""
        generated, texts = self.rows(step, mixture)
        generated.sort(key=lambda row: len(row.tokens))
        size = -(-len(generated) // self.n_chunks)
        chunks = [generated[i : i + size] for i in range(0, len(generated), size)]
        return [collate(chunk, self.pad) for chunk in (*chunks, texts) if chunk]

    def _document(self, rng: Random, task: str, form: str) -> Row:
        row = encode_document(self.tokenizer, DOCUMENTS[task][form](rng, False), rng)
        if task not in DISGUISED or rng.random() >= DISGUISED_SHARE:
            return row
        return disguised(rng, row, self._disguises[task], len(self.tokenizer))

    @cached_property
    def _pool(self) -> list[int]:
        """All tokens but that of the end of text (0), in an order of the seed's."""
        tokens = list(range(1, len(self.tokenizer)))
        Random(f"{self.seed}/pool").shuffle(tokens)
        return tokens

    @cached_property
    def _disguises(self) -> dict[str, Set[int]]:
        """Task -> the tokens that random ones may stand for."""
        return {
            task: {self.tokenizer.encode(f" {word}")[0] for word in some}
            for task, some in DISGUISED.items()
        }

    def _started(self, rng: Random, row: Row) -> Row:
        if rng.random() >= BOS_SHARE:
            return row
        return Row([self.pad, *row.tokens], [0.0, *row.weights])

    def held_out_windows(self, number: int, length: int) -> torch.Tensor:
        """Return windows ``[window, pos]`` of real text that no step reads."""
        rng, found = Random(f"{self.seed}/held out"), []
        n_blocks = len(self.text) // BLOCK
        for _ in range(number):
            first = rng.randrange(0, n_blocks, HELD_OUT_BLOCKS) * BLOCK
            first += rng.randrange(BLOCK - length)
            found.append(self.text[first : first + length].astype(np.int64))
        return torch.from_numpy(np.stack(found))

    def _window(self, rng: Random, mixture: Mixture) -> Row:
        length = mixture.text_length
        first = rng.randrange(len(self.text) - length)
        while any(_is_held_out(at) for at in (first, first + length - 1)):
            first = rng.randrange(len(self.text) - length)
        tokens = self.text[first : first + length].tolist()
        return Row(tokens, [TEXT_WEIGHT] * len(tokens))


def _is_held_out(position: int) -> bool:
    return position // BLOCK % HELD_OUT_BLOCKS == 0
