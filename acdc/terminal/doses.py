"""Dose-response curves on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from acdc.evidence.doses import Doses
from acdc.measure.doses import FLAT, Curve
from acdc.terminal.console import SafeConsole

__all__ = ["doses_parts", "sparkline"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN = "_.-=*#"
_WIDTH = 19


def doses_parts(found: Doses, title: str) -> Iterator[Any]:
    """Yield what :func:`acdc.terminal.console.show` prints of doses, part by part."""
    about = found.about
    yield (
        f"{title}: {found.n_prompts} prompts, {about['prompts']}; {about['intervention']} "
        f"ablation, {about['direction']}"
    )
    counts = ", ".join(f"{len(curves)} {shape}" for shape, curves in found.groups.items())
    more = f"; {found.n_left_out:,} of lower scores not measured" if found.n_left_out else ""
    yield f"{len(found.curves):,} {found.what}: {counts}{more}"
    table = Table(title=f"{about['metric']} {found.base:.4g} at c = 0", title_justify="left",
                  caption_justify="left")  # fmt: skip
    table.caption = (
        "c: share of the way from the base run to what ablation carries. score: attribution's; "
        "slope: the curve's at 0; full: its change at c = 1; bends: more than "
        f"{found.bend:.0%} off the slope; flat: within {FLAT:.0%} of the metric's gap, "
        f"{found.gap:.3g}"
    )
    table.add_column(found.what[:-1], no_wrap=True)
    for column in ("score", "slope", "full"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("c = -1 to 2", no_wrap=True)
    table.add_column("bends/turns at")
    for i, (shape, curves) in enumerate(found.groups.items()):
        if i:
            table.add_section()
        table.add_row(f"[bold]{shape}[/bold]")
        for curve in curves:
            table.add_row(*_cells(curve))
    yield table


def _cells(curve: Curve) -> list[str]:
    at = curve.turns if curve.shape == "turning" else curve.bends
    places = ", ".join(f"{c:.2f}" for c in at if c is not None)
    numbers = [f"{value:.3g}" for value in (curve.score, curve.slope, curve.effect)]
    said = "-" if curve.shape == "flat" else places or "-"
    return [escape(curve.name), *numbers, sparkline(curve.responses), said]


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """Return a curve as a row of blocks, lowest to highest over its own range.

    Parameters
    ----------
    values
        At equal distances.
    width
        Characters.
    """
    blocks = _BLOCKS if SafeConsole().encoding.startswith("utf") else _PLAIN
    at = np.linspace(0, len(values) - 1, width)
    curve = np.interp(at, np.arange(len(values)), values)
    low, size = curve.min(), np.ptp(curve)
    if not size:
        return blocks[0] * width
    steps = np.minimum((curve - low) / size * len(blocks), len(blocks) - 1).astype(int)
    return "".join(blocks[step] for step in steps)
