"""Latents as one HTML page that needs nothing but itself.

Every latent has the anchor of its name, so that ``latents.html#m3.f12`` opens on it; every place
of a dictionary that of its name.  ``j`` and ``k`` go to the next and the previous latent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from acdc.dictionaries.quality import DENSITY_EDGES, Quality, Recovery
from acdc.evidence.latents.gallery import (
    ClusterView,
    End,
    Example,
    Gallery,
    LatentView,
    Share,
    SiteView,
)
from acdc.pages.page import page
from acdc.tasks.texts import label, visible
from acdc.terminal.latents import window

__all__ = ["to_html"]

_SHADES = 9
_SHOWN_TOKENS, _ENDS, _MEMBERS = 60, 12, 60

_STYLE = """
article { border: 1px solid var(--line); background: var(--card); border-radius: 8px;
  padding: .7rem 1rem .9rem; margin: .8rem 0; scroll-margin-top: .6rem; }
article:target { outline: 2px solid var(--link); }
.ex { border-bottom: 1px solid var(--line); padding: .18rem 0; white-space: pre-wrap;
  padding-left: 8.5em; text-indent: -8.5em; }
.ex > i { display: inline-block; width: 8.5em; text-indent: 0; font-style: normal;
  color: var(--soft); }
.ex b, .key b { font-weight: inherit; border-radius: 2px; }
.b1 { background: color-mix(in srgb, var(--hot) 10%, transparent); }
.b2 { background: color-mix(in srgb, var(--hot) 20%, transparent); }
.b3 { background: color-mix(in srgb, var(--hot) 30%, transparent); }
.b4 { background: color-mix(in srgb, var(--hot) 40%, transparent); }
.b5 { background: color-mix(in srgb, var(--hot) 50%, transparent); }
.b6 { background: color-mix(in srgb, var(--hot) 62%, transparent); }
.b7 { background: color-mix(in srgb, var(--hot) 74%, transparent); }
.b8 { background: color-mix(in srgb, var(--hot) 87%, transparent); }
.b9 { background: var(--hot); }
.cols { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0 1.5rem; }
.list { margin: 0; padding: 0; list-style: none; }
.list li { display: flex; justify-content: space-between; gap: .8rem; }
.list li > span:last-child, .list li > b { font-weight: inherit; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.tok { font-family: ui-monospace, monospace; font-size: .86rem; white-space: pre;
  overflow: hidden; text-overflow: ellipsis; }
svg.hist { vertical-align: middle; } svg.hist rect { fill: var(--soft); }
.slot { outline: 1px solid var(--link); border-radius: 2px; }
.slot sub { color: var(--link); text-indent: 0; }
details > summary { cursor: pointer; color: var(--soft); }
"""

_SCRIPT = """
addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !"jk".includes(event.key)) return;
  const all = [...document.querySelectorAll("article.latent")];
  const at = all.findIndex(one => "#" + one.id === decodeURIComponent(location.hash));
  const to = all[event.key === "j" ? at + 1 : Math.max(0, at - 1)];
  if (to) location.hash = to.id;
});
"""


def to_html(gallery: Gallery) -> str:
    """Return a gallery as a page that needs no network.

    Parameters
    ----------
    gallery
        What :func:`acdc.evidence.latents.look` gives.
    """
    summary = gallery.summary
    title = f"Latents of {summary['task']} in {summary['model']}"
    shown = {latent.name for latent in gallery.latents} | {site.name for site in gallery.sites}
    clusters = gallery.clusters
    parts = [
        f"<h1>{escape(title)}</h1>",
        _facts(gallery),
        "<h2>Dictionaries</h2>",
        _quality(gallery.sites, summary),
        _key(gallery),
        "<h2>Overview</h2>",
        _overview(gallery.latents),
        "" if clusters is None else _clusters(clusters, shown),
        "<h2>Latents</h2>",
        *(_latent(latent, shown) for latent in gallery.latents),
    ]
    return page(title, "\n".join(parts), style=_STYLE, script=_SCRIPT)


# --- the top of the page ------------------------------------------------------------------


def _facts(gallery: Gallery) -> str:
    s = gallery.summary
    errors = s["latents"]["error_nodes"]
    kept, total = s["n_edges_kept"], s["n_edges_total"]
    text = (
        f"{kept:,} of {total:,} edges by {s['method']}, {s['direction']}, {s['intervention']} "
        f"ablation; {s['metric']} {_number(s['metric_full'])} whole, "
        f"{_number(s['metric_circuit'])} circuit, {_number(s['metric_empty'])} empty; faithfulness "
        f"{_number(s['faithfulness'])}, with all error nodes {_number(errors['with_errors'])}, "
        f"with none {_number(errors['without_errors'])}."
    )
    count = f"{len(gallery.latents):,} of the circuit's {gallery.n_latents:,} latents are here, "
    return f"<p>{escape(text)}</p><p class=soft>{count}by absolute node score.</p>"


def _quality(sites: Sequence[SiteView], summary: dict[str, object]) -> str:
    metric = str(summary["metric"])
    heads = "".join(
        f"<th class=n>{escape(name)}</th>"
        for name in ("in circuit", "nodes", "latents", "dead", "L0", "expl. var.",
                     f"{metric} rec.", "loss rec.", "KL rec.")
    )  # fmt: skip
    rows = "".join(_quality_row(site) for site in sites)
    return (
        "<div class=wide><table><tr><th>place</th><th>reads</th>"
        f"{heads}<th>density</th></tr>{rows}</table></div>"
        "<p class=soft>On the task's prompts. dead: latents active on no token, as a share; L0: "
        "active latents per token; rec.: what is left of the model's score when the reconstruction "
        "replaces the activation (1: all, 0: no better than zeros); density: latents by log10 of "
        f"the share of tokens they are active on, {DENSITY_EDGES[0]:.0f} to 0.</p>"
    )


def _quality_row(site: SiteView) -> str:
    q = site.quality
    cells = (
        f"{site.n_in_circuit:,}", f"{site.n_nodes:,}", f"{q.n_latents:,}",
        f"{100 * q.dead_fraction:.1f} %", f"{q.l0:.1f}", _number(q.explained_variance),
        _recovered(q.metric), _recovered(q.loss), _recovered(q.kl),
    )  # fmt: skip
    numbers = "".join(f"<td class=n>{cell}</td>" for cell in cells)
    return (
        f'<tr id="{escape(site.name)}"><td class=mono>{escape(site.name)}</td>'
        f"<td><code>{escape(q.hook)}</code><br><span class=soft>{escape(q.architecture)}</span>"
        f"</td>{numbers}"
        f"<td>{_histogram(q)}</td></tr>"
    )


def _recovered(recovery: Recovery | None) -> str:
    return _number(None if recovery is None else recovery.recovered)


def _histogram(quality: Quality) -> str:
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
    return f'<svg class=hist role="img" aria-label="density" {size}>{"".join(bars)}</svg>'


def _key(gallery: Gallery) -> str:
    """How to read the page, with the slots of one prompt."""
    prompt = "".join(
        f"<span class=slot>{_token(token)}<sub>{escape(place.removeprefix('slot '))}</sub></span>"
        if place.startswith("slot")
        else _token(token)
        for token, place in gallery.slots
    )
    shades = "".join(f"<b class=b{i}>&nbsp;&nbsp;</b>" for i in range(1, _SHADES + 1))
    return (
        "<details><summary>How to read this</summary>"
        f"<p class=key>Tokens are shaded by activation, from 0 to the latent's largest: {shades}; "
        "point at one for the number. Prompts are those of the task, clean and corrupt.</p>"
        "<p>Score: estimated change of the metric when the latent alone is ablated (integrated "
        "gradients). Slots are the tokens in which the clean and the corrupt prompt of a pair "
        "differ, numbered; &ldquo;scored&rdquo; is where the metric looks.</p>"
        f"<p class=mono>{prompt}</p>"
        "<p>&ldquo;In prompts with&rdquo;: tokens whose being in a prompt correlates best, over "
        "prompts, with the latent&rsquo;s summed activation there.</p>"
        "<p>Logits: what the latent writes (through W_O, if it is one of z), through the final "
        "norm&rsquo;s derivative (its mean over the scored tokens) and the unembedding, at the "
        "latent&rsquo;s largest activation, above the mean of the vocabulary. Nothing later in the "
        "model takes part.</p><p>Keys: j and k go to the next and the previous latent; the other "
        "end of an edge is a link.</p></details>"
    )


def _overview(latents: Sequence[LatentView]) -> str:
    rows = "".join(
        f'<tr><td><a class=mono href="#{escape(x.name)}">{escape(x.name)}</a></td>'
        f"<td class=n>{x.score:+.4g}</td><td class=n>{100 * x.density:.1f} %</td>"
        f"<td>{_inline(x.tokens[:3])}</td><td>{_inline(x.places[:2], strip=True)}</td>"
        f"<td>{_names(x.context[:2])}</td><td>{_names(x.up[:3])}</td></tr>"
        for x in latents
    )
    return (
        "<div class=wide><table><tr><th>latent</th><th class=n>score</th><th class=n>active</th>"
        f"<th>fires on</th><th>at</th><th>in prompts with</th><th>logits up</th></tr>{rows}"
        "</table></div>"
    )


def _clusters(clusters: Sequence[ClusterView], shown: set[str]) -> str:
    rows = "".join(_cluster(i, cluster, shown) for i, cluster in enumerate(clusters, 1))
    return (
        "<h2>Latents that are active together</h2><p class=soft>Average linkage over one minus "
        "the correlation of activations over tokens, all latents of the circuit. Share: of the "
        "latents&rsquo; summed absolute node scores.</p><div class=wide><table><tr><th></th>"
        "<th class=n>share</th><th class=n>correlation</th><th class=n>edges inside</th>"
        "<th>fires on</th><th>at</th><th>in prompts with</th><th>latents</th></tr>"
        f"{rows}</table></div>"
    )


def _cluster(number: int, cluster: ClusterView, shown: set[str]) -> str:
    names = " ".join(_anchor(name, name, shown) for name in cluster.latents[:_MEMBERS])
    more = len(cluster.latents) - _MEMBERS
    names += f" and {more} more" if more > 0 else ""
    prompts = "".join(f"<p class=mono>{_token(p.name.strip())}</p>" for p in cluster.prompts)
    return (
        f'<tr id="cluster-{number}"><td>{number}</td><td class=n>{100 * cluster.share:.1f} %</td>'
        f"<td class=n>{_number(cluster.together)}</td><td class=n>{cluster.n_edges}</td>"
        f"<td>{_inline(cluster.tokens[:2])}</td><td>{_inline(cluster.places[:2], strip=True)}</td>"
        f"<td>{_names(cluster.context)}</td><td>"
        f"<details><summary>{len(cluster.latents)} latents</summary>"
        f"<p class=mono>{names}</p><h4>most on</h4>{prompts}</details></td></tr>"
    )


# --- a latent -----------------------------------------------------------------------------


def _latent(x: LatentView, shown: set[str]) -> str:
    link = ""
    if x.link and x.link.startswith("https://"):  # no address of another kind, as javascript:
        href = escape(x.link)
        link = f' &middot; <a href="{href}" rel="noreferrer">neuronpedia</a>'
    examples = "".join(_example(example, x.largest) for example in x.examples)
    return (
        f'<article class=latent id="{escape(x.name)}"><h3>{escape(x.name)}</h3> '
        f"<span class=soft>score {x.score:+.4g} &middot; active on {100 * x.density:.1f} % of "
        f"tokens &middot; largest {_number(x.largest)} &middot; {100 * x.clean_share:.0f} % on "
        f'clean prompts &middot; <a href="#{escape(x.site)}">{escape(x.site)}</a>{link}</span>'
        f"<p>fires on {_inline(x.tokens)} <span class=soft>at</span> "
        f"{_inline(x.places, strip=True)}{_context(x.context)}</p>{examples}"
        f"<div class=cols>{_logits('logits up', x.up)}{_logits('logits down', x.down)}"
        f"{_ends('from', x.incoming, shown)}{_ends('to', x.outgoing, shown)}</div></article>"
    )


def _example(example: Example, largest: float) -> str:
    part = window(example, _SHOWN_TOKENS)
    tokens = zip(example.tokens[part], example.values[part], strict=True)
    text = "".join(_shaded(token, value, largest) for token, value in tokens)
    before, after = ("… " if part.start else ""), (" …" if part.stop < len(example.tokens) else "")
    lead = f"{max(example.values):.3g} {example.run}"
    return f"<div class=ex><i>{escape(lead)}</i>{before}{text}{after}</div>"


def _shaded(token: str, value: float, largest: float) -> str:
    if value <= 0:
        return _token(token)
    shade = min(_SHADES, max(1, round(_SHADES * value / largest)))
    return f'<b class=b{shade} title="{value:.3g}">{_token(token)}</b>'


def _logits(title: str, shares: Iterable[Share]) -> str:
    rows = "".join(
        f"<li><span class=tok>{escape(label(s.name))}</span>"
        f"<span class={'up' if s.value > 0 else 'down'}>{s.value:+.2f}</span></li>"
        for s in shares
    )
    return f"<div><h4>{title}</h4><ul class=list>{rows}</ul></div>"


def _ends(title: str, ends: Sequence[End], shown: set[str]) -> str:
    rows = "".join(
        f"<li><span class=mono>{_anchor(end.text, end.node, shown)}</span>"
        f'<span title="{escape(end.edge)}">{end.score:+.3g}</span></li>'
        for end in ends[:_ENDS]
    )
    more = len(ends) - _ENDS
    rest = f"<li class=soft>{more} more</li>" if more > 0 else ""
    none = "" if ends else "<li class=soft>none</li>"
    count = f" ({len(ends)})" if ends else ""
    return f"<div><h4>{title}{count}</h4><ul class=list>{rows}{rest}{none}</ul></div>"


def _anchor(text: str, target: str, shown: set[str]) -> str:
    """Link to a latent or a dictionary that is on the page, or plain text."""
    if target not in shown:
        return escape(text)
    return f'<a href="#{escape(target)}">{escape(text)}</a>'


def _inline(shares: Iterable[Share], *, strip: bool = False) -> str:
    kind = "" if strip else " class=tok"
    return ", ".join(
        f"<span{kind}>{escape(label(s.name))}</span>&nbsp;<span class=soft>"
        f"{100 * s.value:.0f}&nbsp;%</span>"
        for s in shares
    )


def _context(shares: Sequence[Share]) -> str:
    if not shares:
        return ""
    text = ", ".join(
        f"<span class=tok>{escape(label(s.name))}</span>&nbsp;<span class=soft>{s.value:.2f}</span>"
        for s in shares
    )
    return f" <span class=soft>in prompts with</span> {text}"


def _names(shares: Iterable[Share]) -> str:
    return ", ".join(f"<span class=tok>{escape(label(s.name))}</span>" for s in shares)


def _token(text: str) -> str:
    return escape(visible(text))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
