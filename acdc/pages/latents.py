"""Latents as one HTML page that needs nothing but itself.

Every latent has the anchor of its name, so that ``latents.html#m3.f12`` opens on it; every place
of a dictionary that of its name.  ``j`` and ``k`` go to the next and the previous latent.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from acdc.dictionaries.quality import DENSITY_EDGES, Quality
from acdc.evidence.latents.gallery import Example, Gallery
from acdc.pages.filling import fill, number, resource
from acdc.pages.page import page
from acdc.terminal.latents import window

__all__ = ["to_html"]

_SHADES = 9
_SHOWN_TOKENS, _ENDS, _MEMBERS = 60, 12, 60


def to_html(gallery: Gallery) -> str:
    """Return a gallery as a page that needs no network.

    Parameters
    ----------
    gallery
        What :func:`acdc.evidence.latents.look` gives.
    """
    summary = gallery.summary
    title = f"Latents of {summary['task']} in {summary['model']}"
    body = fill(
        "latents.html",
        gallery=gallery,
        title=title,
        facts=_facts(summary),
        metric=str(summary["metric"]),
        histograms=[_histogram(site.quality) for site in gallery.sites],
        first_density=DENSITY_EDGES[0],
        shown={latent.name for latent in gallery.latents} | {site.name for site in gallery.sites},
        examples=[[_example(one, x.largest) for one in x.examples] for x in gallery.latents],
        shades=_SHADES,
        members=_MEMBERS,
        most_ends=_ENDS,
    )
    return page(title, body, style=resource("latents.css"), script=resource("latents.js"))


def _facts(s: dict[str, Any]) -> str:
    """What the circuit is, in a line."""
    errors = s["latents"]["error_nodes"]
    kept, total = s["n_edges_kept"], s["n_edges_total"]
    return (
        f"{kept:,} of {total:,} edges by {s['method']}, {s['direction']}, {s['intervention']} "
        f"ablation; {s['metric']} {number(s['metric_full'])} whole, "
        f"{number(s['metric_circuit'])} circuit, {number(s['metric_empty'])} empty; faithfulness "
        f"{number(s['faithfulness'])}, with all error nodes {number(errors['with_errors'])}, "
        f"with none {number(errors['without_errors'])}."
    )


def _example(example: Example, largest: float) -> dict[str, Any]:
    """One prompt: its first words, and tokens, each with its shade (0: none) and activation."""
    part = window(example, _SHOWN_TOKENS)
    tokens = zip(example.tokens[part], example.values[part], strict=True)
    return {
        "lead": f"{max(example.values):.3g} {example.run}",
        "before": part.start > 0,
        "after": part.stop < len(example.tokens),
        "tokens": [(token, _shade(value, largest), value) for token, value in tokens],
    }


def _shade(value: float, largest: float) -> int:
    return min(_SHADES, max(1, round(_SHADES * value / largest))) if value > 0 else 0


def _histogram(quality: Quality) -> Markup:
    top, width, height = max(quality.density_counts, default=0) or 1, 7, 18
    bars = []
    for i, count in enumerate(quality.density_counts):
        tall = height * count / top
        bars.append(
            f'<rect x="{i * width}" y="{height - tall:.1f}" width="{width - 1}" '
            f'height="{tall:.1f}"><title>10^{DENSITY_EDGES[i]:g} to 10^{DENSITY_EDGES[i + 1]:g}: '
            f"{count} latents</title></rect>"
        )
    size = f'width="{width * len(bars)}" height="{height}"'
    return Markup(f'<svg class=hist role="img" aria-label="density" {size}>{"".join(bars)}</svg>')
