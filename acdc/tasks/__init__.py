"""Tasks: prompt pairs (clean, corrupt) with right and wrong answers.

Built-in tasks are generated under any tokenizer, or of token ids without one; any other task
is a file (see :mod:`acdc.tasks.files`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from acdc.errors import OptionError, TaskError, UnknownNameError
from acdc.settings import check_count
from acdc.tasks.base import Pair, Task, Tokenizer, single_token_continuation
from acdc.tasks.files import SUFFIXES, pairs_of_rows, read_pairs
from acdc.tasks.prompts import Generated
from acdc.tasks.spec import DEFAULT_METRIC, TASKS, TaskSpec

__all__ = [
    "DEFAULT_METRIC",
    "DEFAULT_N_PROMPTS",
    "TASKS",
    "Pair",
    "Task",
    "TaskSpec",
    "Tokenizer",
    "is_task_file",
    "load_task",
    "single_token_continuation",
]

DEFAULT_N_PROMPTS = 128
"""Prompts of a built-in task unless the user says how many."""
_MOST_DOUBLINGS = 6


def is_task_file(name_or_path: str) -> bool:
    """Return whether ``name_or_path`` means a file rather than a built-in task.

    Examples
    --------
    >>> is_task_file("ioi"), is_task_file("pairs.jsonl"), is_task_file("data/pairs")
    (False, True, True)
    """
    if name_or_path in TASKS:
        return False
    separators = {"/", os.sep}
    path = Path(name_or_path)
    return (
        path.suffix.lower() in SUFFIXES
        or any(separator in name_or_path for separator in separators)
        or path.is_file()
    )


def load_task(
    task: str | Path | Task | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer | None = None,
    *,
    n_prompts: int | None = None,
    seed: int = 0,
    prepend_bos: bool = False,
    corruption: str | None = None,
    template: str | None = None,
    d_vocab: int | None = None,
    d_vocab_out: int | None = None,
    n_ctx: int | None = None,
) -> Task:
    """Return a built-in task or the task in a file, as token ids.

    Parameters
    ----------
    task
        A key of :data:`TASKS`; a ``.jsonl``, ``.json`` or ``.csv`` file; rows as of a ``.jsonl``
        file, as dicts; or a task, whose pairs are taken as they are.
    tokenizer
        The model's tokenizer; None if it has none (then only token ids work).
    n_prompts
        How many pairs: 128 for a built-in task, all that there are otherwise, unless given.
    seed
        Seed of a built-in task's prompts; the global random state is not touched.
    prepend_bos
        Put the tokenizer's BOS token in front of both prompts of every pair.
    corruption
        Which corruption of a built-in task; its first one by default.
    template
        One of a built-in task's, as ``info["templates"]`` names them: prompts of it alone.
    d_vocab, d_vocab_out, n_ctx
        Tokens that the model reads, tokens that it can predict (``d_vocab`` unless given) and
        its context length, to check ids and lengths against.

    Raises
    ------
    UnknownNameError
        If there is no such task or corruption.
    OptionError
        If ``n_prompts``, ``prepend_bos`` or ``corruption`` cannot be had.
    TaskError
        If the file or a prompt pair cannot be used.

    Examples
    --------
    >>> from transformers import AutoTokenizer
    >>> tokenizer = AutoTokenizer.from_pretrained("acdc/bundled/language-small")
    >>> task = load_task("ioi", tokenizer, n_prompts=4)
    >>> len(task), len(task.pairs[0].clean) == len(task.pairs[0].corrupt)
    (4, True)
    """
    if n_prompts is not None:
        check_count("n_prompts", n_prompts)
    d_vocab_out = d_vocab if d_vocab_out is None else d_vocab_out
    if isinstance(task, str) and task in TASKS:
        found = _generate(TASKS[task], tokenizer, n_prompts, seed, corruption, template, d_vocab)
    elif isinstance(task, str) and not is_task_file(task):
        raise UnknownNameError("task", task, TASKS)
    else:
        if template is not None:
            raise OptionError(f"template {template!r}: only a built-in task has templates")
        every = _given(task, tokenizer, d_vocab, d_vocab_out)
        found = _first(every, n_prompts, corruption)
    if prepend_bos:
        found = _with_bos(found, tokenizer)
    _check_fit(found, d_vocab, d_vocab_out, n_ctx)
    return found


def _generate(
    spec: TaskSpec,
    tokenizer: Tokenizer | None,
    n_prompts: int | None,
    seed: int,
    corruption: str | None,
    template: str | None,
    d_vocab: int | None,
) -> Task:
    corruption = spec.default_corruption if corruption is None else corruption
    if corruption not in spec.corruptions:
        raise UnknownNameError(f"corruption of task {spec.name}", corruption, spec.corruptions)
    source = _token_ids(spec, tokenizer, d_vocab) if spec.of_ids else tokenizer
    if source is None:
        raise TaskError(
            f"task {spec.name!r} is made of text but the model has no tokenizer: "
            "give a task file with token ids"
        )
    wanted = DEFAULT_N_PROMPTS if n_prompts is None else n_prompts
    if template is None:
        generated = spec.generate(source, Random(seed), wanted, corruption)
    else:
        generated = _of_template(spec, source, seed, wanted, corruption, template)
    info = {
        "source": "built-in",
        "n_prompts": len(generated),
        "seed": seed,
        "corruption": corruption,
        "templates": dict(sorted(Counter(g.template for g in generated).items())),
        "lengths": _lengths([g.pair for g in generated]),
    }
    return Task(spec.name, tuple(g.pair for g in generated), info)


def _of_template(
    spec: TaskSpec, source: Any, seed: int, n_prompts: int, corruption: str, template: str
) -> list[Generated]:
    """Prompts of one template: of ever more prompts, those that are made from it."""
    n_drawn = 4 * n_prompts
    for _ in range(_MOST_DOUBLINGS):
        drawn = spec.generate(source, Random(seed), n_drawn, corruption)
        found = [one for one in drawn if one.template == template]
        if len(found) >= n_prompts:
            return found[:n_prompts]
        n_drawn *= 2
    raise TaskError(
        f"task {spec.name!r}: {len(found)} of {n_drawn // 2:,} prompts are of template "
        f"{template!r}, {n_prompts} are needed: ask for fewer prompts, or another template"
    )


def _token_ids(spec: TaskSpec, tokenizer: Tokenizer | None, d_vocab: int | None) -> tuple[int, ...]:
    """Ids that mean something to the model: its tokenizer's but special ones, or all."""
    sizes = [len(tokenizer)] if tokenizer is not None else []  # type: ignore[arg-type]  # HF's have it
    sizes += [d_vocab] if d_vocab is not None else []
    if not sizes:
        raise TaskError(
            f"task {spec.name!r} is made of token ids but neither a tokenizer nor d_vocab says "
            "which there are: give one of them"
        )
    special = set(getattr(tokenizer, "all_special_ids", ()))
    return tuple(token for token in range(min(sizes)) if token not in special)


def _given(
    task: str | Path | Task | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer | None,
    d_vocab: int | None,
    d_vocab_out: int | None,
) -> Task:
    """Return all pairs of a file, of rows or of a task."""
    if isinstance(task, Task):
        return replace(task, info={"source": "task", **task.info})
    sizes = {"d_vocab": d_vocab, "d_vocab_out": d_vocab_out}
    if isinstance(task, str | Path):
        path = Path(task)
        pairs = read_pairs(path, tokenizer, **sizes)
        return Task(path.stem, tuple(pairs), {"source": "file", "file": str(path)})
    return Task("rows", tuple(pairs_of_rows(task, tokenizer, **sizes)), {"source": "rows"})


def _first(task: Task, n_prompts: int | None, corruption: str | None) -> Task:
    """Return the first pairs of a task that was not generated."""
    what = task.info.get("file", task.name)
    if corruption is not None:
        raise OptionError(
            f"corruption {corruption!r} was asked of {what}: a task file brings its own "
            "corrupted prompts, leave the option out"
        )
    if n_prompts is not None and n_prompts > len(task):
        raise OptionError(
            f"n_prompts is {n_prompts} but {what} has {len(task)} rows: ask for at most that many"
        )
    pairs = task.pairs[:n_prompts]
    info = {**task.info, "n_prompts": len(pairs), "lengths": _lengths(pairs)}
    return replace(task, pairs=pairs, info=info)


def _lengths(pairs: Sequence[Pair]) -> dict[str, int]:
    """Return how many pairs there are of each token length; string keys, as in JSON."""
    counts = Counter(len(pair.clean) for pair in pairs)
    return {str(length): counts[length] for length in sorted(counts)}


def _with_bos(task: Task, tokenizer: Tokenizer | None) -> Task:
    bos = None if tokenizer is None else tokenizer.bos_token_id
    if bos is None:
        got = (
            "the model has no tokenizer" if tokenizer is None else "its tokenizer has no BOS token"
        )
        raise OptionError(f"prepend_bos was asked for but {got}: leave the option out")
    pairs = [
        replace(
            pair,
            clean=(bos, *pair.clean),
            corrupt=(bos, *pair.corrupt),
            scored=tuple(position + 1 for position in pair.scored),
            spans={label: tuple(p + 1 for p in at) for label, at in pair.spans.items()},
        )
        for pair in task.pairs
    ]
    return replace(task, pairs=tuple(pairs), info={**task.info, "lengths": _lengths(pairs)})


def _check_fit(task: Task, d_vocab: int | None, d_vocab_out: int | None, n_ctx: int | None) -> None:
    for number, pair in enumerate(task.pairs, start=1):
        if n_ctx is not None and len(pair.clean) > n_ctx:
            raise TaskError(
                f"task {task.name!r}, row {number}: the prompt has {len(pair.clean)} tokens but "
                f"the model's context is {n_ctx}: shorten it, or choose another model"
            )
        answers = (*pair.answers, *pair.wrong_answers)
        for ids, size in (((*pair.clean, *pair.corrupt), d_vocab), (answers, d_vocab_out)):
            if size is not None and ids and max(ids) >= size:
                raise TaskError(
                    f"task {task.name!r}, row {number}: token id {max(ids)} is not in the model's "
                    f"vocabulary of {size}: use the tokenizer of this model"
                )
