"""Latents on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from acdc.evidence.latents.gallery import ClusterView, End, Example, Gallery, LatentView, Share
from acdc.tasks.texts import label, visible
from acdc.terminal.tables import number

__all__ = ["gallery_parts", "window"]

_EXAMPLES, _ENDS, _LATENTS = 3, 6, 12
_SHOWN_TOKENS = 24
_SHADE = (255, 176, 0)


def gallery_parts(gallery: Gallery) -> Iterator[Any]:
    """Yield what :func:`acdc.terminal.console.show` prints of a gallery, part by part."""
    summary = gallery.summary
    yield (
        f"latents of the circuit of {summary['task']} in {summary['model']}: "
        f"{len(gallery.latents)} of {gallery.n_latents} shown, by absolute node score"
    )
    yield _quality_table(gallery)
    slots = Text("places: ")
    for token, place in gallery.slots:
        slots.append(visible(token), style="reverse" if place.startswith("slot") else "")
    slots.append("  (reversed: slot 1, 2, ..., where clean and corrupt prompts differ)")
    yield slots
    for latent in gallery.latents:
        yield _latent(latent)
    if gallery.clusters is not None:
        yield _cluster_table(gallery.clusters)


def _quality_table(gallery: Gallery) -> Table:
    table = Table(title="dictionaries, on the task's prompts", title_justify="left")
    table.add_column("place")
    table.add_column("kind")
    metric = gallery.summary["metric"]
    for column in ("in circuit", "latents", "dead", "L0", "expl. var.", f"{metric} recovered"):
        table.add_column(escape(column), justify="right")
    for site in gallery.sites:
        q = site.quality
        table.add_row(
            site.name,
            q.architecture,
            f"{site.n_in_circuit:,}",
            f"{q.n_latents:,}",
            f"{100 * q.dead_fraction:.1f} %",
            f"{q.l0:.1f}",
            number(q.explained_variance),
            number(None if q.metric is None else q.metric.recovered),
        )
    return table


def _latent(latent: LatentView) -> Table:
    table = Table(
        title=f"[bold]{escape(latent.name)}[/bold]  score {latent.score:+.4g}  "
        f"active on {100 * latent.density:.1f} % of tokens  largest {number(latent.largest)}",
        title_justify="left", title_style="", show_header=False, box=None, padding=(0, 1),
    )  # fmt: skip
    table.add_column(no_wrap=True, style="dim")
    table.add_column()
    table.add_row("fires on", f"{_shares(latent.tokens)} ({100 * latent.clean_share:.0f} % clean)")
    table.add_row("at", _shares(latent.places))
    if latent.context:
        context = ", ".join(f"{label(s.name)} {s.value:.2f}" for s in latent.context)
        table.add_row("in prompts with", escape(f"{context} (correlation)"))
    for example in latent.examples[:_EXAMPLES]:
        table.add_row(f"{max(example.values):.3g} {example.run}", _shaded(example, latent.largest))
    table.add_row("logits up", _moved(latent.up))
    table.add_row("logits down", _moved(latent.down))
    table.add_row("from", _ends(latent.incoming))
    table.add_row("to", _ends(latent.outgoing))
    if latent.link:
        table.add_row("neuronpedia", escape(latent.link))
    return table


def window(example: Example, width: int) -> slice:
    """Return which tokens of a prompt to show: at most ``width``, the strongest in the middle."""
    n = len(example.tokens)
    peak = max(range(n), key=lambda i: example.values[i])
    start = max(0, min(peak - width // 2, n - width))
    return slice(start, start + width)


def _shaded(example: Example, largest: float) -> Text:
    """Tokens on a background by activation; the strongest one also in quotes, for plain text."""
    part = window(example, _SHOWN_TOKENS)
    text = Text("… " if part.start else "")
    peak = max(example.values)
    for token, value in zip(example.tokens[part], example.values[part], strict=True):
        bare = visible(token)
        gap = " " if bare.startswith(" ") else ""
        marked = f"«{bare[len(gap) :]}»" if value == peak else bare[len(gap) :]
        text.append(gap)
        text.append(marked, style=_style(value / largest) if value > 0 else "")
    if part.stop < len(example.tokens):
        text.append(" …")
    return text


def _style(strength: float) -> str:
    """White to orange."""
    r, g, b = (round(255 + (c - 255) * min(1.0, strength)) for c in _SHADE)
    return f"black on rgb({r},{g},{b})"


def _shares(shares: Sequence[Share]) -> str:
    return escape(", ".join(f"{label(s.name)} {100 * s.value:.0f} %" for s in shares[:3]))


def _moved(shares: Iterable[Share]) -> str:
    return escape(", ".join(f"{label(s.name)} {s.value:+.2f}" for s in shares))


def _ends(ends: Sequence[End]) -> str:
    shown = ", ".join(f"{end.text} {end.score:+.3g}" for end in ends[:_ENDS])
    more = len(ends) - _ENDS
    return escape((shown + (f", {more} more" if more > 0 else "")) or "-")


def _cluster_table(clusters: Sequence[ClusterView]) -> Table:
    table = Table(title="latents that are active together", title_justify="left", show_lines=True)
    for column in ("latents", "share of score", "correlation", "edges inside"):
        table.add_column(column, justify="left" if column == "latents" else "right")
    table.add_column("fires on")
    table.add_column("in prompts with")
    for cluster in clusters:
        names = ", ".join(cluster.latents[:_LATENTS])
        more = len(cluster.latents) - _LATENTS
        table.add_row(
            escape(f"{len(cluster.latents)}: {names}" + (f", {more} more" if more > 0 else "")),
            f"{100 * cluster.share:.1f} %",
            number(cluster.together),
            str(cluster.n_edges),
            f"{_shares(cluster.tokens)} at {_shares(cluster.places)}",
            escape(", ".join(label(s.name) for s in cluster.context)),
        )
    return table
