"""Prompts that means are taken over: a built-in task, a task file, or a file of prompts alone.

======== ===================================================================================
suffix   content
======== ===================================================================================
.txt     one prompt per line
.jsonl   ``{"prompt": ...}`` per line, a text or a list of token ids; or pairs, as a task file
other    a task file (:mod:`acdc.tasks.files`)
======== ===================================================================================

Of pairs both prompts count.  Lengths may differ; a prompt that comes twice counts twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from acdc.errors import TaskError
from acdc.tasks import is_task_file, load_task
from acdc.tasks.base import Tokenizer
from acdc.tasks.files import MOST_BYTES, MOST_TOKENS, encode
from graphs.files.whole import parse_json, read_text

__all__ = ["load_dataset"]


def load_dataset(
    name_or_path: str,
    tokenizer: Tokenizer | None,
    *,
    seed: int = 0,
    prepend_bos: bool = False,
    d_vocab: int | None = None,
    n_ctx: int | None = None,
) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of every prompt of a dataset.

    Parameters
    ----------
    name_or_path
        Built-in task or file.
    tokenizer
        Needed as soon as a prompt is text.
    seed, prepend_bos
        As of a task.
    d_vocab, n_ctx
        Tokens that the model reads and its context length, to check against.

    Raises
    ------
    TaskError
        If the dataset is empty or cannot be used; the message names the row.
    UnknownNameError
        If there is no such task.
    """
    path = Path(name_or_path)
    if is_task_file(name_or_path) or path.suffix == ".txt":
        if not path.is_file():
            what = "a folder, not a file" if path.is_dir() else "no such file"
            raise TaskError(f"{path}: {what}: give prompts that means are taken over")
        rows = _rows(path)
        if rows is not None:
            return _checked(path, rows, tokenizer, prepend_bos, d_vocab, n_ctx)
    task = load_task(
        name_or_path,
        tokenizer,
        seed=seed,
        prepend_bos=prepend_bos,
        d_vocab=d_vocab,
        n_ctx=n_ctx,
    )
    return tuple(prompt for pair in task.pairs for prompt in (pair.clean, pair.corrupt))


def _rows(path: Path) -> list[Any] | None:
    """Prompts of a file of prompts alone; None for a task file."""
    text = read_text(path, MOST_BYTES, TaskError)
    lines = [line for line in text.split("\n") if line.strip()]
    if path.suffix == ".txt":
        return list(lines)
    if path.suffix != ".jsonl":
        return None
    contents = list(_parsed(path, lines))
    if contents and not any(isinstance(row, dict) and "prompt" in row for row in contents):
        return None
    for number, row in enumerate(contents, 1):
        if not isinstance(row, dict) or "prompt" not in row:
            raise TaskError(f"{path}, row {number}: no key 'prompt', which other rows have: add it")
    return [row["prompt"] for row in contents]


def _parsed(path: Path, lines: list[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        yield parse_json(line, f"{path}, row {number}", TaskError)


def _checked(
    path: Path,
    rows: list[Any],
    tokenizer: Tokenizer | None,
    prepend_bos: bool,
    d_vocab: int | None,
    n_ctx: int | None,
) -> tuple[tuple[int, ...], ...]:
    if not rows:
        raise TaskError(f"mean over an empty dataset: {path} has no prompts, give at least one")
    bos: tuple[int, ...] = ()
    if prepend_bos:
        if tokenizer is None or tokenizer.bos_token_id is None:
            raise TaskError(f"{path}: prepend_bos was asked for but there is no BOS token")
        bos = (tokenizer.bos_token_id,)
    found = []
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        ids = (*bos, *_ids(where, row, tokenizer))
        if not ids:
            raise TaskError(f"{where}: the prompt has no tokens: give at least one")
        if n_ctx is not None and len(ids) > n_ctx:
            raise TaskError(
                f"{where}: the prompt has {len(ids)} tokens but the model's context is {n_ctx}: "
                "shorten it"
            )
        if not 0 <= min(ids) <= max(ids) < (MOST_TOKENS if d_vocab is None else d_vocab):
            raise TaskError(
                f"{where}: token ids {min(ids)} to {max(ids)}, but the model has {d_vocab} "
                "tokens: use the ids of this model's tokenizer"
            )
        found.append(ids)
    return tuple(found)


def _ids(where: str, row: Any, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(row, list) and all(type(token) is int for token in row):
        return row
    if not isinstance(row, str):
        raise TaskError(f"{where}: a prompt is a text or a list of token ids, got {row!r}")
    try:
        return encode(row, tokenizer)
    except TaskError as error:
        raise TaskError(f"{where}: {error}") from None
