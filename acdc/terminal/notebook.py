"""Results as tables on a terminal or HTML in a notebook, and progress that works in both."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import get_console
from tqdm.auto import tqdm

from acdc.terminal import console
from acdc.terminal.backups import interactions_tables, self_repair_tables
from acdc.terminal.circuit_model import circuit_model_parts
from acdc.terminal.comparison import compared_parts
from acdc.terminal.console import SafeConsole, TerminalReporter, warnings_lines
from acdc.terminal.development import development_tables
from acdc.terminal.doses import doses_parts
from acdc.terminal.evidence import assessment_parts, verdicts_table
from acdc.terminal.heads import heads_tables
from acdc.terminal.matching import matching_tables
from acdc.terminal.repeated import (
    conditions_tables,
    directions_tables,
    frontier_table,
    groups_tables,
    stability_tables,
)
from acdc.terminal.sharing import sharing_tables
from acdc.terminal.study import study_tables
from acdc.terminal.tables import edges_table, run_table
from acdc.terminal.what_if import what_if_parts

if TYPE_CHECKING:
    from acdc.evidence.directions import BothDirections
    from acdc.evidence.frontier import Frontier
    from acdc.runs.folder import Run
    from acdc.terminal.shown import Shown

__all__ = ["as_html", "progress", "show"]

_WIDTH = 100
"""Characters of a line in a notebook."""

_PRE = '<pre style="font-family: monospace; line-height: 1.15; overflow-x: auto">{code}</pre>'


def show(found: Shown) -> None:
    """Print a result's tables; in a notebook, display it.

    Parameters
    ----------
    found
        What :func:`acdc.discover`, :func:`acdc.evaluate`, ... return.
    """
    if get_console().is_jupyter:
        from IPython.display import display

        display(found)  # type: ignore[no-untyped-call]  # IPython has no types
    else:
        console.show(*_parts(found))


def as_html(found: Shown) -> str:
    """Return a result as HTML: its tables, and a run's picture.

    Parameters
    ----------
    found
        What :func:`acdc.discover`, :func:`acdc.evaluate`, ... return.
    """
    terminal = SafeConsole(record=True, width=_WIDTH, file=io.StringIO(), force_jupyter=False)
    for part in _parts(found):
        terminal.print(part, highlight=False, markup=not isinstance(part, str))
    html = terminal.export_html(inline_styles=True, code_format=_PRE)
    return html + (_picture(found) if type(found).__name__ == "Run" else "")


def _picture(run: Any) -> str:
    svg: str = run.circuit._repr_svg_()
    return f'<div style="max-width: 100%; overflow: auto">{svg[svg.index("<svg") :]}</div>'


def progress() -> TerminalReporter:
    """Return what shows progress bars, on a terminal or in a notebook.

    Examples
    --------
    >>> import acdc
    >>> run = acdc.discover("ioi", reporter=acdc.progress())  # doctest: +SKIP
    """
    return _NotebookReporter() if get_console().is_jupyter else TerminalReporter()


class _NotebookReporter(TerminalReporter):
    """Bars of tqdm, which notebooks know how to draw."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None

    @contextmanager
    def phase(self, name: str, total: int | None) -> Iterator[None]:
        with tqdm(desc=name, total=total) as self._bar:
            yield

    def advance(self, n: int) -> None:
        self._bar.update(n)

    def note(self, text: str) -> None:
        self._bar.set_postfix_str(text)

    def say(self, text: str) -> None:
        self._bar.write(text)


def _parts(found: Shown) -> Iterator[Any]:
    """Yield what a result shows, and its warnings."""
    yield from _PARTS[type(found).__name__](found)
    # a run has its warnings in its claim, and comparisons have none
    yield from warnings_lines(getattr(found, "warnings", ()))


def _run(run: Run) -> Iterator[Any]:
    yield run_table(run.summary(), f"circuit of {run.settings.task}")
    yield edges_table(run.circuit)
    yield from warnings_lines(run.claim.warnings)


def _both(found: BothDirections) -> Iterator[Any]:
    for run in found.runs:
        yield from _run(run)
    yield from directions_tables(found)


def _frontier(found: Frontier) -> Iterable[Any]:
    title = f"ACDC on {found.settings.task}, {found.settings.model}"
    return (frontier_table(found.rows(), title),)


_PARTS: dict[str, Callable[[Any], Iterable[Any]]] = {
    "Assessment": lambda found: assessment_parts(found, "evaluation"),
    "BothDirections": _both,
    "CircuitModel": circuit_model_parts,
    "Compared": lambda found: compared_parts(found, list_edges=True),
    "Conditions": conditions_tables,
    "Development": development_tables,
    "Doses": lambda found: doses_parts(found, "doses"),
    "Frontier": _frontier,
    "Groups": lambda found: groups_tables(found, "groups"),
    "Heads": lambda found: heads_tables(found, "heads"),
    "Interactions": lambda found: interactions_tables(found, "interactions"),
    "Judgement": lambda found: (verdicts_table(found),),
    "Matched": matching_tables,
    "Run": _run,
    "SelfRepair": lambda found: self_repair_tables(found, "self-repair"),
    "SharedCircuits": sharing_tables,
    "Stability": stability_tables,
    "Study": study_tables,
    "WhatIf": lambda found: what_if_parts(found, "what if"),
}
"""By the name of its class, so that no result's module, with torch, is loaded to show another's."""
