"""Which prompts decide what: scores, sizes and claims come from different ones.

===========  =====================================================================================
``fit``      what the method sees: scores and, in ACDC, every decision come from them
``select``   what tau, the size and the ranking of a circuit are chosen on, where they are not given
``test``     what nothing was chosen on: the faithfulness that is claimed is theirs
===========  =====================================================================================

A circuit measured on the prompts that it was found on looks better than it is, most of all where
edges are removed greedily.  A built-in task draws the three apart, without repeats.  The rows of a
file are split once by seed: ``holdout`` of them test; of the others a third selects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from acdc.engine.experiment import Experiment
from acdc.errors import OptionError, TaskError
from acdc.methods import Method
from acdc.models.sizes import Sized
from acdc.runs.given import method_of, spec_of
from acdc.settings import Settings
from acdc.tasks import Pair, Task, Tokenizer, load_task
from acdc.tasks.split import held_out, select_pairs

__all__ = [
    "DEFAULT_N_OTHERS",
    "LEAST_SELECT",
    "Split",
    "chooses_size",
    "draw",
    "load_prompts",
    "load_selection",
    "split_prompts",
]

DEFAULT_N_OTHERS = 256
"""Prompts of a built-in task that select, and as many that test."""

LEAST_SELECT = 8
"""Rows of a file with fewer to choose a size on choose it on all that the search sees."""

_SELECT_SHARE = 1 / 3
_MOST_SEEDS = 10
"""Seeds tried before a task counts as exhausted."""


@dataclass(frozen=True)
class Split:
    """Prompts of a search beside those that it sees.

    Parameters
    ----------
    select
        What the size is chosen on; None: it is not chosen, or on the prompts of the search.
    test
        What nothing is chosen on; None: there are none.
    n_select
        What ``n_select`` of the settings came to: with it, the same rows of a file fit again, also
        where the threshold that was found is given.
    warnings
        What that leaves unsaid, a sentence each.
    """

    select: Task | None
    test: Task | None
    n_select: int = 0
    warnings: tuple[str, ...] = ()


def chooses_size(settings: Settings, method: Method | None = None) -> bool:
    """Whether the search chooses how large the circuit is: nobody asks for a tau or a size."""
    if settings.threshold is not None or settings.n_edges is not None:
        return False
    method = method_of(settings) if method is None else method
    return method.size(method.configured(settings), 1) is None


def load_prompts(settings: Settings, model: Sized, tokenizer: Tokenizer | None) -> Task:
    """Return the prompt pairs that a search with checked settings sees.

    Raises
    ------
    OptionError
        If more are asked for than a file leaves.
    """
    if spec_of(settings) is not None:
        return _load(settings, model, tokenizer, settings.n_prompts, settings.seed)
    task, fit, _, test = _rows(settings, model, tokenizer)
    return select_pairs(task, fit, n_held_out=len(test))


def load_selection(
    settings: Settings, model: Sized, tokenizer: Tokenizer | None, fit: Task
) -> Task | None:
    """Return the prompt pairs that a search chooses a size on; None: those of the search."""
    n = _n_select(settings)
    if spec_of(settings) is None:
        task, rows, select, _ = _rows(settings, model, tokenizer)
        return _some(task, _others(select, rows))
    seen = {pair.clean for pair in fit.pairs}
    return draw(settings, model, tokenizer, n, seen, _seeds(settings.seed, 1))


def split_prompts(settings: Settings, experiment: Experiment, tokenizer: Tokenizer | None) -> Split:
    """Return the prompts beside those of a search.

    Prompts that the search's graph or constants cannot be used on (other spans, a length without a
    mean) are left out.

    Parameters
    ----------
    settings
        From :func:`acdc.runs.checks.check_discovery`.
    experiment
        Of the search, on its prompts.
    tokenizer
        The model's.
    """
    warnings: list[str] = []
    if spec_of(settings) is None:
        select, test, n_select = _of_file(settings, experiment, tokenizer)
    else:
        select, test, n_select, warnings = _of_task(settings, experiment, tokenizer)
    select, test = _usable(experiment, select), _usable(experiment, test)
    if chooses_size(settings) and select is None and settings.n_select != 0:
        warnings.append(
            "the circuit's size was chosen on the prompts that it was found on: there are too few "
            "others"
        )
    if test is None:
        warnings.append(
            "no prompts are left that the search has not seen: only the seen faithfulness is known"
        )
    return Split(select, test, n_select, tuple(warnings))


def _of_file(
    settings: Settings, experiment: Experiment, tokenizer: Tokenizer | None
) -> tuple[Task | None, Task | None, int]:
    """Rows of a file that select and test, and how many select."""
    task, fit, select, test = _rows(settings, experiment.model, tokenizer)
    n_test = len(test) if settings.n_test is None else settings.n_test
    if n_test > len(test):
        raise OptionError(
            f"n_test is {n_test} but of {settings.task}'s {len(task)} rows {len(test)} are held "
            "out (rows that stand among the others, too, do not count): ask for fewer, or raise "
            "--holdout"
        )
    return _some(task, _others(select, fit)), _some(task, test[:n_test]), len(select)


def _of_task(
    settings: Settings, experiment: Experiment, tokenizer: Tokenizer | None
) -> tuple[Task | None, Task | None, int, list[str]]:
    """Prompts of a built-in task that select and test, how many select, and what is lacking."""
    model, fit, warnings = experiment.model, experiment.task, []
    n_select = _n_select(settings)
    n_test = DEFAULT_N_OTHERS if settings.n_test is None else settings.n_test
    select = load_selection(settings, model, tokenizer, fit)
    known = {pair.clean for task in (fit, select) if task is not None for pair in task.pairs}
    test = draw(settings, model, tokenizer, n_test, known, _seeds(settings.seed, 2))
    for task, n, what in ((select, n_select, "choose the size on"), (test, n_test, "test on")):
        found = 0 if task is None else len(task)
        if 0 < found < n:
            warnings.append(f"task {settings.task} has no more prompts: {found} to {what}, not {n}")
    return select, test, n_select, warnings


def _some(task: Task, pairs: tuple[Pair, ...]) -> Task | None:
    return select_pairs(task, pairs) if pairs else None


def draw(
    settings: Settings,
    model: Sized,
    tokenizer: Tokenizer | None,
    n: int,
    known: Iterable[tuple[int, ...]],
    seeds: Iterator[int],
) -> Task | None:
    """Draw prompts of a built-in task, without repeats and without those that are known.

    Parameters
    ----------
    settings, model, tokenizer
        Of the task.
    n
        How many; a task that has no more gives fewer, None if there are none.
    known
        Clean prompts that are left out.
    seeds
        To draw from, one after the other.
    """
    if not n:
        return None
    seen, n_dropped = set(known), 0
    found: list[Pair] = []
    first: int | None = None
    for seed, _ in zip(seeds, range(_MOST_SEEDS), strict=False):
        first = seed if first is None else first
        drawn = _load(settings, model, tokenizer, n, seed)
        for pair in drawn.pairs:
            if pair.clean in seen:
                n_dropped += 1
            elif len(found) < n:
                seen.add(pair.clean)
                found.append(pair)
        if len(found) == n:
            break
    if not found:
        return None
    return select_pairs(drawn, tuple(found), seed=first, n_dropped=n_dropped)


def _load(
    settings: Settings,
    model: Sized,
    tokenizer: Tokenizer | None,
    n_prompts: int | None,
    seed: int,
) -> Task:
    return load_task(
        settings.given.get("task", settings.task),
        tokenizer,
        n_prompts=n_prompts,
        seed=seed,
        prepend_bos=settings.prepend_bos,
        corruption=settings.corruption,
        d_vocab=model.d_vocab,
        d_vocab_out=model.d_vocab_out,
        n_ctx=model.n_ctx,
    )


def _seeds(seed: int, purpose: int) -> Iterator[int]:
    """Seeds that no user would think of, the same ones for a seed and a purpose."""
    source = np.random.default_rng((seed, purpose))
    while True:
        yield int(source.integers(2**32, 2**62))


def _n_select(settings: Settings) -> int:
    """Prompts asked for to choose a size on, of a built-in task."""
    if settings.n_select is not None:
        return settings.n_select
    return DEFAULT_N_OTHERS if chooses_size(settings) else 0


def _rows(
    settings: Settings, model: Sized, tokenizer: Tokenizer | None
) -> tuple[Task, tuple[Pair, ...], tuple[Pair, ...], tuple[Pair, ...]]:
    """A file's rows: all, and those that fit, select and test."""
    task = _load(settings, model, tokenizer, None, settings.seed)
    assert settings.holdout is not None  # filled in by check_settings
    left_out = held_out(len(task), settings.holdout, settings.seed)
    test = tuple(pair for pair, out in zip(task.pairs, left_out, strict=True) if out)
    rest = tuple(pair for pair, out in zip(task.pairs, left_out, strict=True) if not out)
    n_select = settings.n_select
    if n_select is None:  # without any held out the search uses every row
        choosing = settings.holdout > 0 and chooses_size(settings)
        n_select = int(len(rest) * _SELECT_SHARE) if choosing else 0
        n_select = 0 if n_select < LEAST_SELECT else n_select
    if n_select >= len(rest):
        raise OptionError(
            f"n_select is {n_select} but {settings.task} has {len(task)} rows, {len(test)} of them "
            f"held out: ask for fewer than {len(rest)}"
        )
    chooses = np.zeros(len(rest), dtype=bool)
    chooses[np.random.default_rng((settings.seed, 1)).permutation(len(rest))[:n_select]] = True
    fit = tuple(pair for pair, out in zip(rest, chooses, strict=True) if not out)
    select = tuple(pair for pair, out in zip(rest, chooses, strict=True) if out)
    if settings.n_prompts is not None and settings.n_prompts > len(fit):
        kept = f" and {n_select} kept to choose the size on" if n_select else ""
        raise OptionError(
            f"n_prompts is {settings.n_prompts} but {settings.task} has {len(task)} rows, "
            f"{len(test)} of them held out{kept}: ask for at most {len(fit)}, or lower --holdout"
        )
    fit = fit[: settings.n_prompts]
    return task, fit, select, _others(test, (*fit, *select))


def _others(pairs: tuple[Pair, ...], known: tuple[Pair, ...]) -> tuple[Pair, ...]:
    """Pairs of other clean prompts than those known: a row may stand in a file twice."""
    seen = {pair.clean for pair in known}
    return tuple(pair for pair in pairs if pair.clean not in seen)


def _usable(experiment: Experiment, task: Task | None) -> Task | None:
    """The prompts that the graph's spans and the constants' lengths allow; None if none is left."""
    if task is None:
        return None
    constants, positions = experiment.carried, experiment.positions
    pairs = []
    for pair in task.pairs:
        try:
            if positions is not None:
                positions.of(pair)
            if constants is not None:
                constants.at(len(pair.clean))
        except TaskError:
            continue
        pairs.append(pair)
    if len(pairs) == len(task):
        return task
    return select_pairs(task, tuple(pairs)) if pairs else None
