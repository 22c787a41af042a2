"""Dose-response curves in a report: small pictures, those of one shape together."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup

from acdc.evidence.doses import Doses
from acdc.measure.doses import FLAT, HIGH, LOW, Curve
from acdc.pages.plots import Axis, Plot

__all__ = ["doses_section"]

_MOST = 12
"""Pictures of one shape."""

_SAYS = {
    "linear": "as the slope says, all the way",
    "saturating": "less and less comes of more",
    "threshold": "more comes of more than the slope says",
    "turning": "too much of it turns the effect round",
    "flat": "does next to nothing, at any dose",
}


def doses_section(found: Doses | None) -> dict[str, Any] | None:
    """Return what a report's section says, for its template; None if nothing was measured.

    Returns
    -------
    dict
        ``lead``, and ``groups`` of curves of one shape: ``head``, ``shown`` (what is said of a
        curve, and its picture) and ``rest``, names alone; flat curves are names alone.
    """
    if found is None:
        return None
    about = found.about
    lead = (
        f"{about['metric']} where a coefficient c of each {found.what[:-1]}’s difference is "
        f"patched ({about['intervention']} ablation, {about['direction']}), on "
        f"{found.n_prompts:,} prompt pairs, {about['prompts']}. c = 0 is the base run "
        f"({found.base:.4g}), c = 1 full patching. "
        "Dashed: what the slope at 0, which is the attribution score, promises. Each picture has "
        f"its own scale; flat is within {FLAT:.0%} of the metric’s gap ({found.gap:.3g})."
    )
    return {"lead": lead, "groups": [_group(shape, found) for shape in found.groups]}


def _group(shape: str, found: Doses) -> dict[str, Any]:
    curves = found.groups[shape]
    shown = () if shape == "flat" else curves[:_MOST]
    return {
        "head": f"{len(curves):,} {shape}: {_SAYS[shape]}",
        "shown": [(_said(curve), _picture(curve, found)) for curve in shown],
        "rest": [curve.name for curve in curves[len(shown) :]],
    }


def _said(curve: Curve) -> dict[str, Any]:
    return {
        "name": curve.name,
        "slope": curve.slope,
        "effect": curve.effect,
        "bends": ", ".join(f"{c:.2f}" for c in curve.bends if c is not None),
        "turns": ", ".join(f"{c:.2f}" for c in curve.turns),
    }


def _picture(curve: Curve, found: Doses) -> Markup:
    """The curve, its linear continuation as far as it is in the frame, and c = 0 and 1."""
    low, high = min(curve.responses), max(curve.responses)
    room = 0.08 * (high - low)
    apart = abs(curve.effect) > 0.12 * (high - low)  # two numbers side by side can be read
    ticks = (0.0, float(f"{curve.effect:.2g}")) if apart else (0.0,)
    y = Axis(low - room, high + room, ticks, "")
    x = Axis(LOW, HIGH, (-1, 0, 1, 2), "")
    plot = Plot(x, y, f"{curve.name}: response to doses", width=214, height=132, left=52, right=8,
                bottom=22)  # fmt: skip
    ends: list[float] = [LOW, HIGH]
    if curve.slope:
        reach = sorted(edge / curve.slope for edge in (y.low, y.high))
        ends = [max(LOW, reach[0]), min(HIGH, reach[1])]
    plot.line([(c, curve.slope * c) for c in ends], "whole")
    plot.line(list(zip(found.coefficients, curve.responses, strict=True)), "curve")
    for c, response in zip(found.coefficients, curve.responses, strict=True):
        if c in (0, 1):
            plot.dot(c, response, "small", f"c = {c:g}: {response:+.4g}")
    for c in curve.turns:
        at = float(np.interp(c, found.coefficients, curve.responses))
        plot.dot(c, at, "hollow", f"turns at {c:.2f}: {at:+.4g}")
    return plot.svg()
