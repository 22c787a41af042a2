"""Many runs, one table: a grid of tasks, models, methods, sizes, seeds and whatever else.

A study's folder holds ``cells`` (a run each, see :mod:`acdc.runs.cells`), ``results.csv`` and,
where pyarrow is there, ``results.parquet`` (a row per run), ``overlap.csv`` (Jaccard index of every
two circuits of one task in one model), and ``study.json`` (what was asked).  A study that is killed
goes on when it is asked for again; one that is asked for with another grid keeps what it has.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from acdc.errors import OutputError
from acdc.executors import Executor, Lost, Resources, chosen, resources_of
from acdc.runs.cells import BUSY, DONE, Cell, read_cell, run_cell, run_cell_waiting
from acdc.runs.folder import versions
from acdc.runs.grid import Grid, read_study
from acdc.runs.reporter import Reporter, Silent
from acdc.terminal.shown import Shown
from graphs import Circuit
from graphs.files.whole import MIB, read_json, write_json, write_whole
from graphs.text import one_line, short

__all__ = ["SECONDS", "Row", "Study", "Variant", "run_study", "study"]

_FORMAT = "acdc-study-1"
_ABOUT = "study.json"
_ALWAYS = ("task", "model", "method", "metric", "intervention", "direction", "n_edges",
           "threshold", "seed")  # fmt: skip
"""Settings that have a column in any case."""
_FOUND = ("n_edges_kept", "n_edges_total", "faithfulness", "faithfulness_low",
          "faithfulness_high", "faithfulness_seen", "metric_full", "metric_empty",
          "metric_circuit", "prompts_fit", "prompts_select", "prompts_test", "forwards",
          "warnings")  # fmt: skip
SECONDS = ("seconds_load", "seconds_discover", "seconds_evaluate", "seconds_render")
"""Columns that differ from one time to the next."""


@dataclass(frozen=True, eq=False)
class Row:
    """One run of a study.

    Parameters
    ----------
    cell
        What was asked.
    found
        Columns of ``results.csv`` by name: those of what was found are missing where it failed.
    edges
        Names of the edges of its circuit.
    failed
        What it failed of, in one line; None if it did not.
    """

    cell: Cell
    found: Mapping[str, Any]
    edges: frozenset[str] = frozenset()
    failed: str | None = None

    @property
    def seconds(self) -> float:
        """In all."""
        return sum(self.found.get(name) or 0.0 for name in SECONDS)

    def overlap(self, other: Row) -> float:
        """Jaccard index of the edges of two circuits; 1 if both have none."""
        union = self.edges | other.edges
        return len(self.edges & other.edges) / len(union) if union else 1.0


@dataclass(frozen=True, eq=False)
class Variant:
    """Runs of one task in one model that differ by their seeds alone.

    Parameters
    ----------
    values
        Of what varies in the study, beside task, model and seed.
    rows
        At least one.
    """

    values: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def label(self) -> str:
        """What it is called."""
        return self.called(tuple(self.values)) or str(self.rows[0].found["method"])

    def called(self, names: Sequence[str]) -> str:
        """Some of its values, in words."""
        return ", ".join(
            str(value) if name == "method" else f"{_SHORT.get(name, name)} {value}"
            for name, value in self.values.items()
            if name in names
        )

    def mean(self, column: str) -> float | None:
        """Mean of a column over the runs that have it; None if none has."""
        known = [row.found[column] for row in self.rows if row.found.get(column) is not None]
        return float(np.mean(known)) if known else None

    def overlap(self, other: Variant) -> float | None:
        """Mean Jaccard index of a run of each, a run and itself left out; None if there is none."""
        pairs = ((a, b) for a in self.rows for b in other.rows if a is not b)
        known = [a.overlap(b) for a, b in pairs]
        return float(np.mean(known)) if known else None


_SHORT = {"n_edges": "edges", "threshold": "tau"}


@dataclass(frozen=True, eq=False)
class Study(Shown):
    """Runs of a grid, done or failed.

    Parameters
    ----------
    folder
        Where they are.
    grid
        What was asked.
    rows
        One per run, in the order of the grid.
    """

    folder: Path
    grid: Grid
    rows: tuple[Row, ...]

    def __repr__(self) -> str:
        n = len(self.rows)
        return short(f"<Study of {n:,} runs, {len(self.failures):,} failed, in {self.folder}>")

    @property
    def failures(self) -> tuple[Row, ...]:
        """Runs that gave nothing."""
        return tuple(row for row in self.rows if row.failed is not None)

    @property
    def failures_by_reason(self) -> dict[str, tuple[Row, ...]]:
        """What runs failed of -> those that did, the most frequent first."""
        found: dict[str, list[Row]] = {}
        for row in self.failures:
            found.setdefault(row.failed or "", []).append(row)
        order = sorted(found, key=lambda why: -len(found[why]))
        return {why: tuple(found[why]) for why in order}

    @property
    def settings(self) -> tuple[str, ...]:
        """Settings and options that have a column."""
        more = [name for name in self.grid.asked if name not in _ALWAYS]
        more += [name for table in self.grid.by_method.values() for name in table]
        return tuple(dict.fromkeys((*_ALWAYS[:-1], *more, _ALWAYS[-1])))

    @property
    def columns(self) -> tuple[str, ...]:
        """Of ``results.csv``."""
        return ("cell", *self.settings, *_FOUND, *SECONDS, "failed")

    @cached_property
    def groups(self) -> dict[tuple[str, str], tuple[Row, ...]]:
        """(Task, model) -> its runs that did not fail: those whose circuits can be compared."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            of = found.setdefault((row.found["task"], row.found["model"]), [])
            of += [row] if row.failed is None else []
        return {key: tuple(rows) for key, rows in found.items()}

    def same_but_seed(self, rows: Iterable[Row]) -> tuple[Variant, ...]:
        """Return runs of one task and model by what they differ in beside the seed."""
        names = [n for n in self.grid.varied if n not in ("task", "model", "seed")]
        found: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            found.setdefault(tuple(row.found[name] for name in names), []).append(row)
        return tuple(
            Variant(dict(zip(names, key, strict=True)), tuple(of)) for key, of in found.items()
        )

    @property
    def plain_rows(self) -> list[dict[str, Any]]:
        """Rows of ``results.csv`` as plain values."""
        return [{"cell": row.cell.name, **row.found, "failed": row.failed} for row in self.rows]

    def summary(self) -> dict[str, Any]:
        """Plain values: the folder, the rows of ``results.csv`` and those of ``overlap.csv``."""
        return {
            "folder": str(self.folder),
            "runs": self.plain_rows,
            "overlap": list(self._overlaps()),
        }

    def save(self) -> Path:
        """Write the tables into the study's folder."""
        plain = self.plain_rows
        write_whole(self.folder / "results.csv", _csv(self.columns, plain))
        if importlib.util.find_spec("pyarrow") is not None:
            write_whole(self.folder / "results.parquet", _parquet(self.columns, plain))
        write_whole(self.folder / "overlap.csv", _csv(_OVERLAP, self._overlaps()))
        return self.folder

    def _overlaps(self) -> Iterable[dict[str, Any]]:
        for (task, model), rows in self.groups.items():
            for one, other in itertools.combinations(rows, 2):
                values = (task, model, one.cell.name, other.cell.name, one.overlap(other))
                yield dict(zip(_OVERLAP, values, strict=True))


_OVERLAP = ("task", "model", "one", "other", "jaccard")


def study(
    asked: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    jobs: int | None = None,
    executor: str | None = None,
    address: str | None = None,
    gpus: float | None = None,
    reporter: Reporter | None = None,
    **more: Any,
) -> Study:
    """Run a grid of searches, or what is left of it, and write one table.

    Parameters
    ----------
    asked
        A TOML file, or its content: options of ``acdc discover``, each with a value or a list of
        them, ``seeds``, and a table of options by the name of a method.
    out
        Folder of the study; one that is there goes on.
    jobs, executor, address, gpus
        How many runs at a time and where, see :class:`acdc.executors.Resources`; None: as the file
        says, or one after the other in a process of this machine.
    reporter
        Told of progress.
    **more
        Options in the place of those of ``asked``.

    Returns
    -------
    Study
        With ``rows``, and ``failures``; nothing of one run ends the others.

    Raises
    ------
    InputError
        Before anything runs: if something is asked for that ``acdc discover`` would refuse, or the
        folder holds something else.

    Notes
    -----
    Runs are processes of their own, which import the module that called this: in a script it
    belongs below ``if __name__ == "__main__":``.

    Examples
    --------
    >>> import acdc
    >>> found = acdc.study(
    ...     {"task": ["ioi", "docstring"], "method": ["eap", "eap-ig"], "seeds": 3, "edges": 60},
    ...     "runs/study", jobs=2,
    ... )  # doctest: +SKIP
    """
    table: dict[str, Any] = {}
    if isinstance(asked, str | Path):
        asked, table = read_study(asked)
    given = {"name": executor, "jobs": jobs, "address": address, "gpus": gpus}
    table |= {name: value for name, value in given.items() if value is not None}
    found = run_study(Grid.of({**asked, **more}), Path(out), resources_of(table), reporter)
    found.save()
    return found


def run_study(
    grid: Grid, folder: Path, resources: Resources | None = None, reporter: Reporter | None = None
) -> Study:
    """Run the cells of a grid that are not done; parameters and errors as of :func:`study`."""
    folder, reporter = folder.absolute(), reporter or Silent()
    cells = grid.cells(folder)
    _check_folder(folder)
    executor = chosen(resources or Resources(), folder / "jobs")
    folder.mkdir(parents=True, exist_ok=True)
    about = {"format": _FORMAT, "asked": grid.plain(), "versions": versions()}
    write_json(folder / _ABOUT, {**about, "cells": [cell.name for cell in cells]})
    missing = [cell for cell in cells if not cell.done]
    lost: dict[str, str] = {}
    with reporter.phase("study", len(cells)):
        reporter.advance(len(cells) - len(missing))
        busy = _run(executor, run_cell, missing, lost, reporter)
        _run(executor, run_cell_waiting, busy, lost, reporter)
    return Study(folder, grid, tuple(_row(cell, grid, lost.get(cell.name)) for cell in cells))


def _run(
    executor: Executor, call: Any, cells: Sequence[Cell], lost: dict[str, str], reporter: Reporter
) -> list[Cell]:
    """Run cells; return those that another process works on."""
    busy: list[Cell] = []
    n_failed = 0
    for place, result in executor.run(call, cells) if cells else ():
        if isinstance(result, Lost):
            lost[cells[place].name] = one_line(result.why)
        if result == BUSY:
            busy.append(cells[place])
            continue
        n_failed += result != DONE
        reporter.advance(1)
        if n_failed:
            reporter.note(f"{n_failed} failed")
    return busy


def _check_folder(folder: Path) -> None:
    """Raise OutputError if a folder is there that holds something else than a study."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"output {str(folder)!r} is a file: give a folder")
    about = folder / _ABOUT
    if not about.is_file():
        if any(path for path in folder.iterdir() if not path.name.startswith(".")):
            raise OutputError(
                f"output folder {str(folder)!r} is not empty and holds no study: choose another"
            )
        return
    found = read_json(about, 64 * MIB, OutputError)
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise OutputError(f"{about} is of no study that can be read: choose another folder")


def _row(cell: Cell, grid: Grid, lost: str | None) -> Row:
    s = cell.settings
    options = {name: s.options.get(name) for table in grid.by_method.values() for name in table}
    asked = {name: getattr(s, name) for name in _ALWAYS} | options
    asked |= {
        name: getattr(s, name) if hasattr(s, name) else s.options.get(name) for name in grid.asked
    }
    found = read_cell(cell)
    if isinstance(found, str):
        return Row(cell, asked, failed=lost or found)
    summary, circuit = found
    return Row(cell, {**asked, **_found(summary)}, _edges(circuit))


def _found(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of what was found."""
    low, high = summary.get("faithfulness_interval") or (None, None)
    own = {
        "faithfulness_low": low,
        "faithfulness_high": high,
        **{f"prompts_{which}": number for which, number in summary["prompts"].items()},
        "warnings": "; ".join(summary["warnings"]),
    }
    seconds = summary["timings"]
    return {
        **{name: own.get(name, summary.get(name)) for name in _FOUND},
        **{name: seconds.get(name.removeprefix("seconds_")) for name in SECONDS},
    }


def _edges(circuit: Circuit) -> frozenset[str]:
    return frozenset(circuit.graph.edge_name(int(e)) for e in circuit.in_circuit.nonzero()[0])


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def _parquet(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({name: [row.get(name) for row in rows] for name in columns})
    file = io.BytesIO()
    parquet.write_table(table, file)
    return file.getvalue()
