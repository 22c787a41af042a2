"""Tasks from files: JSON lines, AutoCircuit's JSON, EAP-IG's CSV.

======== ===================================================================================
suffix   content
======== ===================================================================================
.jsonl   one object per line: ``clean``, ``corrupt``, ``answers``, ``wrong_answers``, ``scored``,
         ``spans``
.json    AutoCircuit: ``{"prompts": [{"clean", "corrupt", "answers", "wrong_answers"}]}``
.csv     EAP-IG: columns ``clean``, ``corrupted``, ``correct_idx``, ``incorrect_idx``
======== ===================================================================================

A prompt is a text or a list of token ids, an answer a text or one token id; ``answers`` may
be one answer or a list, and may be called ``answer``; ``wrong_answers`` may be called
``wrong_answer`` or ``wrong``.  Answers may be missing where the metric needs none (kl, mse).
``scored`` lists the token positions whose logits are scored, from 0; the last one where it is
missing.  ``spans`` labels token positions, as ``{"IO": [3, 4], "END": [14]}``, the same labels in
every row; positions without a label form the span ``rest``.  Further keys and columns are
ignored; a key of JSON that looks like misspelt answers is refused.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from acdc.errors import TaskError
from acdc.tasks.base import Pair, Tokenizer, single_token_continuation
from graphs.files.whole import MIB, check_regular, json_text, parse_json, read_text, write_whole

__all__ = [
    "MOST_BYTES",
    "MOST_TOKENS",
    "SUFFIXES",
    "Prompt",
    "Row",
    "check_task_file",
    "encode",
    "pairs_of_rows",
    "read_pairs",
    "write_pairs",
]

KEYS: dict[str, tuple[str, ...]] = {
    "clean": ("clean",),
    "corrupt": ("corrupt", "corrupted"),
    "answers": ("answers", "answer"),
    "wrong_answers": ("wrong_answers", "wrong_answer", "wrong"),
    "scored": ("scored",),
    "spans": ("spans",),
}
CSV_KEYS: dict[str, tuple[str, ...]] = {
    "clean": ("clean",),
    "corrupt": ("corrupted", "corrupt"),
    "answers": ("correct_idx",),
    "wrong_answers": ("incorrect_idx",),
    "scored": ("scored",),
    "spans": ("spans",),
}
OPTIONAL = ("answers", "wrong_answers", "scored", "spans")
MOST_BYTES = 64 * MIB
"""Of a file of prompts: some hundred thousand rows."""

MOST_TOKENS = 2**31
"""Of a vocabulary whose size is not known."""

_MOST_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Row:
    """One row of a task file, its values as they stand there.

    Parameters
    ----------
    where
        The file and the row number (1-based), for messages.
    clean, corrupt
        A text or a list of token ids.
    answers, wrong_answers
        Texts or token ids.
    scored
        Token positions; None for the last one.
    spans
        Label -> token positions; None for no labels.
    """

    where: str
    clean: Any
    corrupt: Any
    answers: list[Any]
    wrong_answers: list[Any]
    scored: Any
    spans: Any


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids, and its text where the file gave one."""

    ids: tuple[int, ...]
    text: str | None


def check_task_file(path: str | Path) -> None:
    """Raise TaskError if a task file is not there, is no file, or is too large to be one."""
    if not os.path.exists(path):
        raise TaskError(f"{path}: no such file: give the path of a task file")
    check_regular(path, MOST_BYTES, TaskError)


def read_pairs(
    path: Path,
    tokenizer: Tokenizer | None,
    *,
    d_vocab: int | None = None,
    d_vocab_out: int | None = None,
) -> list[Pair]:
    """Return the prompt pairs of a task file, in its order.

    Parameters
    ----------
    path
        A file that ends in ``.jsonl``, ``.json`` or ``.csv``.
    tokenizer
        Needed as soon as a prompt or an answer is text.
    d_vocab, d_vocab_out
        Number of tokens that the model reads and that it can predict (``d_vocab`` unless
        given); ids of prompts and of answers must be smaller.

    Raises
    ------
    TaskError
        With the file, the row number, what was got and what was expected.
    """
    check_task_file(path)
    reader = SUFFIXES.get(path.suffix.lower())
    if reader is None:
        raise TaskError(
            f"{path}: a task file ends in {', '.join(SUFFIXES)}, got {path.suffix!r}: "
            "rename or convert it"
        )
    rows = list(reader(path, read_text(path, MOST_BYTES, TaskError)))
    if not rows:
        raise TaskError(f"{path}: no rows in the file: give at least one prompt pair")
    return _pairs(rows, tokenizer, d_vocab, d_vocab_out)


def write_pairs(path: str | Path, pairs: Iterable[Pair]) -> None:
    """Write prompt pairs as a ``.jsonl`` file of token ids, which :func:`read_pairs` gives back."""
    lines = []
    for pair in pairs:
        row = {name: value for name, value in vars(pair).items() if value or name not in OPTIONAL}
        lines.append(json_text(row))
    write_whole(path, "".join(f"{line}\n" for line in lines))


def pairs_of_rows(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer | None,
    *,
    d_vocab: int | None = None,
    d_vocab_out: int | None = None,
) -> list[Pair]:
    """Return the prompt pairs of rows as of a ``.jsonl`` file; otherwise as :func:`read_pairs`.

    Examples
    --------
    >>> pairs_of_rows([{"clean": [1, 2], "corrupt": [3, 2], "answer": 4}], None)[0].answers
    (4,)
    """
    if not rows:
        raise TaskError("the task has no rows: give at least one prompt pair")
    found = [_row(f"row {number}", row, KEYS) for number, row in enumerate(rows, start=1)]
    return _pairs(found, tokenizer, d_vocab, d_vocab_out)


def _pairs(
    rows: list[Row], tokenizer: Tokenizer | None, d_vocab: int | None, d_vocab_out: int | None
) -> list[Pair]:
    d_vocab_out = d_vocab if d_vocab_out is None else d_vocab_out
    return [_pair(row, tokenizer, d_vocab, d_vocab_out) for row in rows]


def _jsonl_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, row {number}"
            yield _row(where, parse_json(line, where, TaskError), KEYS)


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    if not text.strip():
        return
    content = parse_json(text, path, TaskError)
    prompts = content.get("prompts") if isinstance(content, dict) else None
    if not isinstance(prompts, list):
        raise TaskError(
            f'{path}: expected an object {{"prompts": [...]}} with a list of prompt pairs, '
            f"got {_kind(content)} without one: give AutoCircuit's layout, or one object per line "
            "in a .jsonl file"
        )
    for number, row in enumerate(prompts, start=1):
        yield _row(f"{path}, row {number}", row, KEYS)


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    number = 0
    try:
        for number, cells in enumerate(reader, start=1):
            where = f"{path}, row {number}"
            present = {
                key: _cell(where, key, value) for key, value in cells.items() if value and key
            }
            yield _row(where, present, CSV_KEYS)
    except csv.Error as error:
        raise TaskError(f"{path}, row {number + 1}: malformed CSV ({error}): correct it") from None


SUFFIXES = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
"""Suffix of a task file -> what reads its rows."""


def _cell(where: str, key: str, value: str) -> Any:
    """Return a CSV cell as an integer or list of integers if it is one, else as text.

    A cell of spans is an object; a prompt that looks like one is a text.
    """
    if key in CSV_KEYS["spans"]:
        return parse_json(value, where, TaskError)
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if _is_id(parsed) or _is_id_list(parsed) else value


def _row(where: str, content: Any, keys: Mapping[str, tuple[str, ...]]) -> Row:
    if not isinstance(content, dict):
        raise TaskError(
            f"{where}: expected an object with the keys clean, corrupt and answers, "
            f"got {_kind(content)}"
        )
    values = {}
    for name, spellings in keys.items():
        found = [spelling for spelling in spellings if content.get(spelling) is not None]
        if not found and name not in OPTIONAL:
            got = ", ".join(str(key) for key in content) or "none"
            raise TaskError(f"{where}: key {spellings[0]!r} is missing, got the keys {got}: add it")
        values[name] = content[found[0]] if found else None
    if keys is KEYS:
        _check_spelling(where, content)
    return Row(
        where,
        values["clean"],
        values["corrupt"],
        _as_list(values["answers"]),
        _as_list(values["wrong_answers"]),
        values["scored"],
        values["spans"],
    )


def _check_spelling(where: str, content: Mapping[str, Any]) -> None:
    """Raise TaskError where answers are there under a misspelt name.

    Keys unlike any are the user's own notes; to read a misspelt one so would drop the answers.
    """
    known = {spelling for spellings in KEYS.values() for spelling in spellings}
    for name in ("answers", "wrong_answers"):
        if content.keys().isdisjoint(KEYS[name]):
            unknown = [str(key) for key in content if key not in known]
            for key in get_close_matches(name, unknown, n=1, cutoff=0.85):
                raise TaskError(f"{where}: unknown key {key!r}: did you mean {name!r}?")


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id_list(value: Any) -> bool:
    return isinstance(value, list) and all(_is_id(item) for item in value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return names.get(type(value), "null" if value is None else f"a number ({value})")


def _pair(
    row: Row, tokenizer: Tokenizer | None, d_vocab: int | None, d_vocab_out: int | None
) -> Pair:
    """Return the row's pair; every error of it names the file and the row."""
    try:
        clean = _prompt("clean", row.clean, tokenizer)
        corrupt = _prompt("corrupt", row.corrupt, tokenizer)
        for ids in (clean.ids, corrupt.ids):  # before a tokenizer is asked for their text
            _check_vocabulary(ids, d_vocab)
        answers = _answers("answers", row.answers, clean, tokenizer, d_vocab_out)
        wrong = _answers("wrong_answers", row.wrong_answers, clean, tokenizer, d_vocab_out)
        if both := set(answers) & set(wrong):
            raise TaskError(
                f"token {min(both)} is an answer and a wrong answer: keep it in one of them"
            )
        if row.scored is not None and not (row.scored and _is_id_list(row.scored)):
            raise TaskError(
                f"'scored' is {row.scored!r}: give a list of token positions, counted from 0"
            )
        spans = _spans(row.spans)
        return Pair(clean.ids, corrupt.ids, answers, wrong, tuple(row.scored or ()), spans)
    except TaskError as error:
        raise TaskError(f"{row.where}: {error}") from None


def _spans(value: Any) -> dict[str, tuple[int, ...]]:
    spans = {} if value is None else value
    if not isinstance(spans, dict) or not all(_is_id_list(at) for at in spans.values()):
        raise TaskError(
            f"'spans' is {str(value)[:60]}: give an object of labels with lists of token "
            'positions, as {"IO": [3, 4], "END": [14]}'
        )
    return {label: tuple(at) for label, at in spans.items()}


def _prompt(key: str, value: Any, tokenizer: Tokenizer | None) -> Prompt:
    if _is_id_list(value):
        return Prompt(tuple(value), None)
    if not isinstance(value, str):
        raise TaskError(f"{key!r} is {_kind(value)}: give a text or a list of token ids")
    return Prompt(tuple(encode(value, tokenizer)), value)


def encode(text: str, tokenizer: Tokenizer | None) -> list[int]:
    """Return the token ids of a prompt's text; TaskError if there are too many or no tokenizer."""
    if len(text) > _MOST_CHARACTERS:
        raise TaskError(
            f"a prompt of {len(text):,} characters: expected at most {_MOST_CHARACTERS:,}"
        )
    return _need_tokenizer(tokenizer, text).encode(text, add_special_tokens=False)


def _answers(
    key: str,
    values: list[Any],
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    d_vocab: int | None,
) -> tuple[int, ...]:
    """Return the tokens of answers, each once: twice it would count twice."""
    found: dict[int, Any] = {}
    for value in values:
        token = _answer(value, prompt, tokenizer)
        _check_vocabulary((token,), d_vocab)
        if token in found:
            same = "twice" if found[token] == value else f"as {found[token]!r} and as {value!r}"
            raise TaskError(f"token {token} is in {key!r} {same}: give each answer once")
        found[token] = value
    return tuple(found)


def _answer(value: Any, prompt: Prompt, tokenizer: Tokenizer | None) -> int:
    if _is_id(value):
        return int(value)
    if not isinstance(value, str):
        raise TaskError(f"an answer is {_kind(value)}: give a text or a token id")
    tokenizer = _need_tokenizer(tokenizer, value)
    text = tokenizer.decode(list(prompt.ids)) if prompt.text is None else prompt.text
    return single_token_continuation(tokenizer, text, value)


def _need_tokenizer(tokenizer: Tokenizer | None, text: str) -> Tokenizer:
    if tokenizer is None:
        shown = text if len(text) <= 40 else text[:37] + "..."
        raise TaskError(
            f"got the text {shown!r} but the model has no tokenizer: give token ids instead"
        )
    return tokenizer


def _check_vocabulary(ids: tuple[int, ...], d_vocab: int | None) -> None:
    for token in ids:
        n_tokens = MOST_TOKENS if d_vocab is None else d_vocab
        if not 0 <= token < n_tokens:
            raise TaskError(
                f"token id {token} is not in the model's vocabulary: ids are 0 to {n_tokens - 1}; "
                "use the ids of this model's tokenizer"
            )
