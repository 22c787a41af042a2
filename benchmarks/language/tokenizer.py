"""The model's byte-pair tokenizer.

Bytes are merged within pieces: a word with its space before it, split before capitals; at most
two digits, so that a year is its century and two more; runs of signs; runs of blanks.  What
the tasks are made of is counted so often that each of those words is one token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.language.words import whole_words

__all__ = ["END_OF_TEXT", "build_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
"""The only special token: before some texts, and where a row of a batch is padded."""

PIECE = r" ?\p{Lu}?\p{Ll}+| ?\p{Lu}| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_WEIGHT = 600
"""How often each word of the tasks is counted."""


def build_tokenizer(texts: Iterable[str], d_vocab: int) -> PreTrainedTokenizerFast:
    """Learn ``d_vocab`` tokens from texts and the tasks' words.

    Raises
    ------
    ValueError
        If a word of the tasks is no single token: ``d_vocab`` is too small.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=d_vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain(texts, _counted_words()), trainer)
    split = [piece for piece in _whole_pieces() if len(tokenizer.encode(piece).ids) != 1]
    if split:
        raise ValueError(
            f"{len(split)} words of the tasks are more than one of {d_vocab} tokens, as "
            f"{split[0]!r}: choose a larger vocabulary"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def _whole_pieces() -> list[str]:
    """Words, numbers of one and two digits, each after a space, and two digits and capitals."""
    numbers = [f" {n}" for n in range(100)] + [f"{n:02d}" for n in range(100)]
    capitals = [chr(code) for code in range(ord("A"), ord("Z") + 1)]
    return [f" {word}" for word in whole_words()] + numbers + capitals


def _counted_words() -> Iterator[str]:
    for piece in _whole_pieces():
        yield piece * _WEIGHT
