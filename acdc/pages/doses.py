"""Dose-response curves in a report: small pictures, those of one shape together."""

from __future__ import annotations

from html import escape

import numpy as np

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


def doses_section(found: Doses | None, folder: object) -> str:
    """Return the body of a report's section.

    Parameters
    ----------
    found
        None if nothing was measured.
    folder
        Of the run, for the command that measures.
    """
    if found is None:
        command = f"acdc dose {folder} --out {folder}/dose.json"
        return (
            "<p>Not measured. Whether each node’s effect is proportional to how much it is "
            f"patched:</p><p><code>{escape(command)}</code></p>"
        )
    about = found.about
    lead = (
        f"{about['metric']} where a coefficient c of each {found.what[:-1]}’s difference is "
        f"patched ({about['intervention']} ablation, {about['direction']}), on "
        f"{found.n_prompts:,} prompt pairs, {about['prompts']}. c = 0 is the base run "
        f"({found.base:.4g}), c = 1 full patching. "
        "Dashed: what the slope at 0, which is the attribution score, promises. Each picture has "
        f"its own scale; flat is within {FLAT:.0%} of the metric’s gap ({found.gap:.3g})."
    )
    groups = "".join(_group(shape, found) for shape in found.groups)
    return f'<p class="soft">{escape(lead)}</p>{groups}'


def _group(shape: str, found: Doses) -> str:
    """Curves of one shape; flat ones by name alone."""
    curves = found.groups[shape]
    head = f"{len(curves):,} {shape}: {_SAYS[shape]}"
    shown = () if shape == "flat" else curves[:_MOST]
    rest = curves[len(shown) :]
    pictures = "".join(_figure(curve, found) for curve in shown)
    names = escape(", ".join(curve.name for curve in rest))
    others = f'<p class="soft"><span class="mono">{names}</span></p>' if rest else ""
    if rest and shown:
        others = f"<details><summary>{len(rest):,} more</summary>{others}</details>"
    return f'<h4>{escape(head)}</h4><div class="doses">{pictures}</div>{others}'


def _figure(curve: Curve, found: Doses) -> str:
    bends = ", ".join(f"{c:.2f}" for c in curve.bends if c is not None)
    turns = ", ".join(f"{c:.2f}" for c in curve.turns)
    says = f"slope {curve.slope:.3g}, full {curve.effect:.3g}"
    says += f"; bends at {bends}" if bends else ""
    says += f"; turns at {turns}" if turns else ""
    return (
        f'<figure><div class="mono">{escape(curve.name)}</div>{_picture(curve, found)}'
        f"<figcaption>{escape(says)}</figcaption></figure>"
    )


def _picture(curve: Curve, found: Doses) -> str:
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
