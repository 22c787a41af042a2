"""What a study asks for: options of ``acdc discover``, some with several values each."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from acdc.errors import OptionError, UnknownNameError
from acdc.methods import METHODS
from acdc.runs.cells import Cell
from acdc.runs.checks import check_discovery
from acdc.settings import Settings, check_count, options_of
from graphs.files.whole import MIB, read_text

__all__ = ["Grid", "read_study"]

_MOST_CELLS = 100_000
_FIRST, _LAST = ("task", "model", "method"), ("seed",)
_EXECUTOR = "executor"
_MOST_GIB = 1 << 20
_RUN = ("memory", "strict")
"""Options of ``acdc discover`` that are no settings."""


@dataclass(frozen=True)
class Grid:
    """The runs of a study.

    Parameters
    ----------
    asked
        Option of ``acdc discover`` (the name of a setting, or of an option of every method of the
        grid) -> its values, at least one.
    by_method
        Method -> options that are given to it alone.
    memory
        Bytes, and
    strict
        as of :func:`acdc.discover`.
    """

    asked: Mapping[str, tuple[Any, ...]]
    by_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    memory: int = 1 << 30
    strict: bool = False

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> Grid:
        """Return the grid of what a file or a command asks for.

        Parameters
        ----------
        asked
            Options of ``acdc discover``, each with a value or a list of them; ``seeds``, how many,
            counted up from ``seed``; a table of options by the name of a method.

        Raises
        ------
        OptionError
            If a name is none of these, or a list has nothing in it or a value twice.
        """
        own = {key.replace("-", "_"): value for key, value in asked.items()}
        tables = {name: value for name, value in asked.items() if isinstance(value, Mapping)}
        values = {
            _name_of(name): _values(name, value)
            for name, value in own.items()
            if not isinstance(value, Mapping) and name not in _RUN and name != "seeds"
        }
        if "task" not in values:
            raise OptionError("a study without a task: say which, as task = ['ioi', 'docstring']")
        values.setdefault("method", ("acdc",))
        if "seeds" in own:
            values["seed"] = _seeds(own["seeds"], values.get("seed", (0,)))
        by_method = {name: dict(_table(name, value, values)) for name, value in tables.items()}
        memory, strict = _run_options(own)
        return cls(_in_order(values), by_method, memory, strict)

    @property
    def varied(self) -> tuple[str, ...]:
        """Options with more than one value."""
        return tuple(name for name, values in self.asked.items() if len(values) > 1)

    def cells(self, folder: Path) -> tuple[Cell, ...]:
        """Return every run, checked, in the order of the grid.

        Raises
        ------
        InputError
            Of the first one that ``acdc discover`` would refuse before it loads anything.
        """
        n_cells = 1
        for values in self.asked.values():
            n_cells *= len(values)
        check_count("cells of the study", n_cells, at_most=_MOST_CELLS)
        return tuple(Cell(folder, each, self.memory, self.strict) for each in self._settings())

    def _settings(self) -> Iterator[Settings]:
        names = list(self.asked)
        for values in product(*self.asked.values()):
            own = dict(zip(names, values, strict=True))
            own |= self.by_method.get(own["method"], {})
            yield check_discovery(Settings.of(**own))

    def plain(self) -> dict[str, Any]:
        """Return plain values, as of a file: lists, and tables of methods."""
        return {
            **{name: list(values) for name, values in self.asked.items()},
            **{name: dict(options) for name, options in self.by_method.items()},
        }


def read_study(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what a TOML file asks for.

    Returns
    -------
    tuple
        What :meth:`Grid.of` takes, and the table ``executor``.

    Raises
    ------
    OptionError
        If the file cannot be read, or is no TOML.
    """
    try:
        found = tomllib.loads(read_text(path, MIB, OptionError))
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{path}: no TOML that can be read ({error})") from error
    executor = found.pop(_EXECUTOR, {})
    if not isinstance(executor, dict):
        raise OptionError(
            f"{path}: executor is {executor!r}: expected a table, as [executor] and name = 'ray'"
        )
    return found, executor


def _name_of(name: str) -> str:
    """Name of a setting by its name or flag; of an option of methods, as it is."""
    names = {says.flag or own: own for own, _, says in options_of(Settings)}
    names |= {own: own for own in names.values()}
    if name in names:
        return names[name]
    options = {own for method in METHODS.values() for own in method.option_names}
    if name not in options:
        raise UnknownNameError("option of a study", name, {*names, *options, *_RUN, "seeds"})
    return name


def _values(name: str, value: Any) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values:
        raise OptionError(f"{name} is an empty list: give a value, or leave it out")
    for i, one in enumerate(values):
        if one in values[:i]:
            raise OptionError(f"{name} has {one!r} twice: each value is a run of its own")
    return values


def _seeds(number: Any, first: tuple[Any, ...]) -> tuple[int, ...]:
    if isinstance(number, bool) or not isinstance(number, int):
        raise OptionError(f"seeds {number!r}: expected a number of them; a list is called seed")
    check_count("seeds", number, at_most=_MOST_CELLS)
    if len(first) > 1 or not isinstance(first[0], int):
        raise OptionError(f"seeds {number} beside seed {list(first)}: give one of them")
    return tuple(range(first[0], first[0] + number))


def _table(
    name: str, options: Mapping[str, Any], values: Mapping[str, tuple[Any, ...]]
) -> Iterator[tuple[str, Any]]:
    """Options that are given to a method alone."""
    if name not in METHODS or name not in values["method"]:
        known = [str(method) for method in values["method"]]
        raise UnknownNameError("table of a study: options of a method of it; method", name, known)
    for key, value in options.items():
        own = _name_of(key.replace("-", "_"))
        if own in ("task", "method", "model", "seed") or isinstance(value, list | dict):
            raise OptionError(
                f"{key} {value!r} in the table of {name}: expected one value of an option of it"
            )
        yield own, value


def _run_options(own: Mapping[str, Any]) -> tuple[int, bool]:
    gib, strict = own.get("memory", 1), own.get("strict", False)
    if isinstance(gib, bool) or not isinstance(gib, int | float) or not 0 < gib <= _MOST_GIB:
        raise OptionError(f"memory {gib!r}: expected GiB above 0, as 1, the same for all runs")
    if not isinstance(strict, bool):
        raise OptionError(f"strict {strict!r}: expected true or false, the same for all runs")
    return int(gib * 2**30), strict


def _in_order(values: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Tasks, models and methods first, seeds last."""
    inner = [name for name in values if name not in (*_FIRST, *_LAST)]
    return {name: values[name] for name in (*_FIRST, *inner, *_LAST) if name in values}
