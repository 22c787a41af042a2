"""``acdc list``: models, tasks, methods, metrics, ablations and references by name."""

from __future__ import annotations

from typing import Annotated

import typer

from acdc.cli import options as opt
from acdc.cli.answers import answer
from acdc.cli.completion import lists

__all__ = ["list_"]


def list_(
    what: Annotated[
        str,
        typer.Argument(
            help="models, tasks, methods, metrics, ablations or references.", autocompletion=lists
        ),
    ],
    as_json: opt.Json = False,
) -> None:
    """List what there is: models, tasks, methods, metrics, ablations or references.

    Example: acdc list methods
    """
    from acdc.errors import UnknownNameError
    from acdc.terminal.listing import LISTS, list_table

    if what not in LISTS:
        raise UnknownNameError("list", what, LISTS)
    title, rows = LISTS[what]()
    answer(lambda: dict(rows), lambda: (list_table(title, rows),), as_json=as_json)
