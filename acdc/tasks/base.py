"""What a task is: prompt pairs as token ids, with their answers.

Token ids are used as they are: no BOS is added here and no padding enters a score.  Pairs
of different length live side by side in one task; the engine groups them by length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from acdc.errors import GraphError, TaskError
from graphs.spans import check_span_name

__all__ = ["REST", "Pair", "Task", "Tokenizer", "single_token_continuation"]

REST = "rest"
"""The span of the positions that have no label."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that tasks use."""

    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Return the token ids of ``text``."""

    def decode(self, token_ids: Any) -> str:
        """Return the text of ``token_ids``."""


@dataclass(frozen=True)
class Pair:
    """One clean prompt, its corruption of equal token length, and what follows.

    Parameters
    ----------
    clean, corrupt
        Token ids, equally many.
    answers, wrong_answers
        Token ids of right and wrong continuations, the same at every scored position; empty
        where the metric compares with the clean run alone (kl, mse).
    scored
        Ascending positions whose logits are scored; the last one unless given.
    spans
        Label -> positions of its tokens, the same in both prompts; no position has two labels.
        Unlabelled positions form the span ``rest``.
    """

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answers: tuple[int, ...] = ()
    wrong_answers: tuple[int, ...] = ()
    scored: tuple[int, ...] = ()
    spans: dict[str, tuple[int, ...]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if len(self.clean) != len(self.corrupt):
            raise TaskError(
                f"the clean prompt has {len(self.clean)} tokens, the corrupt one "
                f"{len(self.corrupt)}: the two prompts of a pair must be equally long"
            )
        if not self.clean:
            raise TaskError("the clean prompt has no tokens: give at least one")
        if not self.scored:
            object.__setattr__(self, "scored", (len(self.clean) - 1,))
        top = len(self.clean) - 1
        for position in self.scored:
            if not 0 <= position <= top:
                raise TaskError(
                    f"position {position} is scored, but the prompt has the positions 0 to {top}: "
                    "count from 0"
                )
        if list(self.scored) != sorted(set(self.scored)):
            raise TaskError(
                f"scored positions {list(self.scored)}: give each once, in ascending order"
            )
        for what, tokens in (("an answer", self.answers), ("a wrong answer", self.wrong_answers)):
            if len(set(tokens)) < len(tokens):
                twice, n = Counter(tokens).most_common(1)[0]
                raise TaskError(f"token {twice} is {what} {n} times: give each answer once")
        self._check_spans()

    def _check_spans(self) -> None:
        labels: dict[int, str] = {}
        for label, positions in self.spans.items():
            _check_label(label)
            if not positions:
                raise TaskError(f"span {label!r} has no positions: give at least one")
            for position in positions:
                if not 0 <= position < len(self.clean):
                    raise TaskError(
                        f"span {label!r} has position {position}, but the prompt has the positions "
                        f"0 to {len(self.clean) - 1}: count from 0"
                    )
                if position in labels:
                    raise TaskError(
                        f"position {position} is in span {labels[position]!r} and in {label!r}: "
                        "give each position one label"
                    )
                labels[position] = label


@dataclass(frozen=True)
class Task:
    """Prompt pairs under one name, in order.

    Parameters
    ----------
    name
        Built-in name, or the stem of the file that the pairs came from.
    pairs
        At least one pair.
    info
        What run.json should say of how the pairs came about (template counts, corruption,
        seed, file); plain JSON values.
    """

    name: str
    pairs: tuple[Pair, ...]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.pairs:
            raise TaskError(f"task {self.name!r} has no prompt pairs: give at least one")
        labels = self.pairs[0].spans.keys()
        for row, pair in enumerate(self.pairs, start=1):
            if pair.spans.keys() != labels:
                raise TaskError(
                    f"task {self.name!r}: row {row} labels the spans {_listed(pair.spans)}, row 1 "
                    f"{_listed(labels)}: label the same ones in every row"
                )

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        return f"<Task {self.name!r}: {len(self)} prompt pairs>"


def _check_label(label: str) -> None:
    if label == REST:
        raise TaskError(
            f"span {REST!r}: this is what the unlabelled positions are called, choose another label"
        )
    try:
        check_span_name(label)
    except GraphError as error:
        raise TaskError(str(error)) from None


def _listed(labels: Iterable[str]) -> str:
    return ", ".join(labels) or "(none)"


def single_token_continuation(tokenizer: Tokenizer, prompt: str, answer: str) -> int:
    """Return the one token that ``answer`` adds to ``prompt``.

    An answer is a continuation: ``prompt + answer`` must encode to the tokens of ``prompt``
    plus exactly one.  So ``" She"`` works under a byte-level BPE and under a SentencePiece
    tokenizer alike.

    Raises
    ------
    TaskError
        If the answer is no single token after this prompt.
    """
    before = tokenizer.encode(prompt, add_special_tokens=False)
    after = tokenizer.encode(prompt + answer, add_special_tokens=False)
    if len(after) != len(before) + 1 or after[:-1] != before:
        raise TaskError(
            f"answer {answer!r} is no single token after its prompt: prompt plus answer "
            f"encodes to {len(after)} tokens, expected {len(before) + 1}; "
            "choose an answer that is one token of this tokenizer"
        )
    return after[-1]
