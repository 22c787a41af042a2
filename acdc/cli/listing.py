"""``acdc list``: models, tasks, methods, metrics, ablations and references by name."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["list_"]


def list_(
    what: Annotated[
        str,
        typer.Argument(help="models, tasks, methods, metrics, ablations or references."),
    ],
) -> None:
    """List what there is: models, tasks, methods, metrics, ablations or references.

    Example: acdc list methods
    """
    from acdc.errors import UnknownNameError
    from acdc.terminal.listing import LISTS
    from acdc.terminal.tables import show

    if what not in LISTS:
        raise UnknownNameError("list", what, LISTS)
    show(LISTS[what]())
