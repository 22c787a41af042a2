"""Many calls for one result: on an executor, in the order in which they were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from acdc.errors import InputError, OptionError, ProcessError
from acdc.executors import HERE, Lost, Resources, chosen
from acdc.settings import Settings

__all__ = ["ALONE", "all_of", "check_named", "results_of"]

Item = TypeVar("Item")
Result = TypeVar("Result")

ALONE = Resources(HERE)
"""One call after another, in this process."""
_FILES = Path("runs") / "jobs"


def all_of(
    call: Callable[[Item], Result],
    items: Sequence[Item],
    resources: Resources = ALONE,
    done: Callable[[int], None] | None = None,
) -> list[Result]:
    """Call a function with each of some items; return all results.

    Parameters
    ----------
    call, items
        As of :meth:`acdc.executors.Executor.run`.
    resources
        Where calls run, and how many at a time.
    done
        Told of every call that has ended, as of how many since it was last told.

    Raises
    ------
    InputError
        The first one that a call raised.
    ProcessError
        If a worker died of a call, twice, or the call has a defect.
    """
    results: dict[int, Result] = {}
    for place, result in results_of(call, items, resources):
        results[place] = result
        if done is not None:
            done(1)
    return [results[place] for place in range(len(items))]


def results_of(
    call: Callable[[Item], Result], items: Sequence[Item], resources: Resources = ALONE
) -> Iterator[tuple[int, Result]]:
    """Yield place and result of every call as it ends; parameters and errors of :func:`all_of`."""
    for place, result in chosen(resources, _FILES).run(partial(_called, call), items):
        if isinstance(result, Lost):
            raise ProcessError(f"run {place + 1} of {len(items)}: {result.why}")
        if isinstance(result, InputError):
            raise result
        yield place, result


def check_named(settings: Settings, resources: Resources) -> None:
    """Raise OptionError if other processes would need an object that this one was given."""
    if settings.given and resources.name != HERE:
        what = next(iter(settings.given))
        raise OptionError(
            f"{what} was given as an object, which stays in this process: give its name or folder, "
            "or leave out jobs and executor"
        )


def _called(call: Callable[[Item], Result], item: Item) -> Result | InputError:
    try:
        return call(item)
    except InputError as error:
        return error
