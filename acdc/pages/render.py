"""A report as one HTML page that needs nothing but itself.

What stands still is written here; the circuit moves by ``report.js``, which reads the page's data
(:mod:`acdc.pages.circuit`) and puts every text there as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from acdc.evidence.verdicts import EdgeEffect, Verdict
from acdc.methods import Score
from acdc.pages.contents import Agreement, Report
from acdc.pages.doses import doses_section
from acdc.pages.evidence import Ablated, Evidence, Repeated
from acdc.pages.page import page
from acdc.pages.plots import ablations_plot, bars, frontier_plot, roc_plot
from acdc.runs.given import defaults_of, metric_of, spec_of
from acdc.settings import Settings, command_line
from acdc.tasks.texts import visible

__all__ = ["to_html"]

_QUESTIONS = {
    "equivalence": "Does the circuit do what the model does?",
    "independence": "Is what is left without it blind to the task?",
    "sufficiency": "Is it nearer to the model than random circuits of its size?",
    "necessity": "Does losing it hurt more than losing random edges?",
    "minimality": "Is every one of its edges needed?",
    "completeness": "Does it break where the model breaks?",
}
_WORDS = {True: "pass", False: "fail", None: "cannot tell"}
_EFFECTS = 8
_NAMES = 40


def to_html(report: Report) -> str:
    """Return a report as a page.

    Parameters
    ----------
    report
        What :func:`acdc.pages.gather` gives.
    """
    title = f"Circuit of {_task(report.settings)} in {_model(report.settings)}"
    sections = {
        "circuit": ("Circuit", _circuit(report)),
        "tests": ("Tests", _tests(report.evidence) + _per_prompt(report)),
        "faithfulness": ("Faithfulness", _faithfulness(report)),
        "doses": ("Dose and response", doses_section(report.doses, report.folder)),
        "reference": ("Reference", _reference(report.agreement)),
        "stability": ("Stability", _stability(report)),
        "work": ("Time and versions", _work(report.summary)),
    }
    links = "".join(f'<a href="#{name}">{head}</a>' for name, (head, _) in sections.items())
    parts = [f"<header><h1>{escape(title)}</h1>{_lead(report)}</header>", _asked(report)]
    parts += [f"<nav>{links}</nav>"]
    parts += [
        f'<section id="{name}"><h2>{head}</h2>{body}</section>'
        for name, (head, body) in sections.items()
    ]
    return page(
        title,
        "\n".join(parts),
        style=_resource("report.css"),
        script=_resource("report.js"),
        data=report.view.data | {"n_runs": report.repeated and len(report.repeated.seeds)},
    )


def _resource(name: str) -> str:
    return files("acdc.pages").joinpath(name).read_text(encoding="utf-8")


# --- the top of the page ------------------------------------------------------------------


def _lead(report: Report) -> str:
    """The result in a few sentences."""
    s, evidence = report.summary, report.evidence
    kept, total = s["n_edges_kept"], s["n_edges_total"]
    text = f"{_n(kept, 'edge')} of {total:,} ({100 * kept / total:.1f} %)"
    seen, share = s["faithfulness_seen"], s["faithfulness"]
    if seen is None:
        text += ". No faithfulness is claimed: see below"
    else:
        text += " keep " if s["direction"] == "noising" else " carry "
        text += _percent(seen if share is None else share)
        if s["direction"] == "noising":
            text += f" of the model’s {s['metric']}"
        else:
            text += f" of what corruption does to {s['metric']}"
        if share is not None:
            low, high = s["faithfulness_interval"] or (None, None)
            ends = _interval(Ablated(s["intervention"], s["direction"], share, low, high))
            text += f"{ends} on {_n(s['prompts']['test'], 'prompt pair')} that nothing was chosen "
            text += f"on, and {_percent(seen)}"
        text += f" on the {_n(s['n_prompts'], 'prompt pair')} that they were found on"
        if share is None and evidence is not None and evidence.ablations and not evidence.seen:
            own = evidence.ablations[0]
            if own.faithfulness is not None:
                text += f", and {_percent(own.faithfulness)}{_interval(own)} on "
                text += f"{evidence.n_prompts:,} others"
    text += "."
    if evidence is not None and evidence.tests is not None:
        verdicts = evidence.tests.verdicts
        failed = [v.test for v in verdicts if v.passed is False]
        text += f" It passes {sum(v.passed is True for v in verdicts)} of {len(verdicts)} tests"
        text += f" and fails {' and '.join(failed)}." if failed else "."
    warned = "".join(f'<p class="warning">{escape(_sentence(w))}</p>' for w in s["warnings"])
    return f'<p class="lead">{escape(text)}</p>{warned}'


def _asked(report: Report) -> str:
    s = report.settings
    facts = {
        "task": _task(s),
        "model": str(s.model),
        "method": s.method,
        "metric": str(s.metric),
        "ablation": s.intervention,
        "direction": s.direction,
        "prompts": _n(report.summary["n_prompts"], "pair"),
        "corruption": str(report.summary.get("task_info", {}).get("corruption") or "as given"),
        "selection": _selection(report),
        "precision": s.dtype,
        "device": s.device,
        "seed": str(s.seed),
    }
    if s.positions != "none":
        facts["split by"] = s.positions
    if s.mean_over is not None:
        facts["means over"] = s.mean_over
    if s.saes is not None:
        facts["dictionaries"] = s.saes
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    return (
        f'<dl class="facts">{cells}</dl>'
        f'<p class="command"><span>found by</span> <code>{escape(report.command)}</code></p>'
    )


def _task(settings: Settings) -> str:
    return Path(settings.task).stem


def _model(settings: Settings) -> str:
    model = str(settings.model)
    return Path(model).name if Path(model).is_dir() else model


def _selection(report: Report) -> str:
    """How the circuit's edges were chosen."""
    s, summary = report.settings, report.summary
    ranking = summary.get("ranking")
    if ranking is None and summary.get("threshold") is not None:
        return f"tau {summary['threshold']:.4g}"
    if s.threshold is not None:
        return f"{ranking} score at least {s.threshold:.4g}"
    if s.n_edges is not None:
        return f"at most {_n(s.n_edges, 'edge')} by {ranking} score"
    sparsity = s.options.get("sparsity")
    if sparsity is not None:
        return f"all but a share of {sparsity:.4g} of the edges, by {ranking} score"
    return f"smallest that is 90 % faithful, by {ranking} score"


_WIDE = 2.2
"""Pictures whose width is more than so many heights have the panel below them."""


# --- the circuit --------------------------------------------------------------------------


def _circuit(report: Report) -> str:
    view = report.view
    pictures = "".join(
        f'<div class="picture"{" hidden" if i else ""}>{picture.drawing.svg}</div>'
        for i, picture in enumerate(view.pictures)
    )
    views = "".join(
        f'<button data-picture="{i}">{escape(picture.name)}</button>'
        for i, picture in enumerate(view.pictures)
    )
    wide = " wide" if view.pictures[0].drawing.aspect > _WIDE else ""
    return (
        f'<p class="soft">{_reading(report)}</p>'
        f'<div class="tools"><span class="views">{views}</span>'
        '<label class="slide">|score| at least '
        '<input type="range" id="threshold" min="0" max="0" value="0" step="1"> '
        '<output id="at"></output></label><output id="count"></output>'
        '<span class="zoom"><button id="in" title="larger">+</button>'
        '<button id="out" title="smaller">−</button><button id="fit">fit</button></span></div>'
        f'<div class="stage{wide}"><div class="pictures">{pictures}</div>'
        '<aside id="panel" aria-live="polite"></aside></div>'
        f'<p class="soft">Drag to move, Ctrl and wheel to zoom. {_limits(report)}</p>'
    )


def _reading(report: Report) -> str:
    s = report.settings
    metric, means = metric_of(s), report.score
    colours = "<b class=up>blue</b> helps, <b class=down>orange</b> hurts"
    if means is Score.COST:
        meaning = f"how much worse {metric.name} gets when the edge is taken out of the circuit"
    elif means is Score.MAGNITUDE:
        meaning = f"how much {s.method} makes of the edge, which has no sign"
        colours = "<b class=up>blue</b> is in the circuit"
    else:
        meaning = f"the change of {metric.name} that ablating the edge makes, as the method has it"
        worse = metric.sign * (1 if s.direction == "noising" else -1)
        colours += f" (a score {'above' if worse > 0 else 'below'} 0 helps)"
    return (
        f"Score: {escape(meaning)}; {colours}; the wider, the larger. Heads are "
        "named layer.head and read by query, key and value."
    )


def _limits(report: Report) -> str:
    """What is not on the page."""
    view, said = report.view, []
    if view.n_shown < view.n_edges:
        said.append(
            f"Of the circuit’s {view.n_edges:,} edges the {view.n_shown:,} strongest connected "
            "ones are on this page."
        )
    if view.n_others:
        said.append(f"Of all other edges it has the {view.n_others} with the largest |score|.")
    if view.n_without_pattern:
        said.append(
            f"Attention patterns of {view.n_without_pattern:,} less important heads are left out."
        )
    if report.settings.saes is not None:
        said.append(
            "What its latents fire on and write: <code>acdc latents "
            f"{escape(str(report.folder))} --html latents.html</code>."
        )
    return " ".join(said)


# --- tests --------------------------------------------------------------------------------


def _tests(evidence: Evidence | None) -> str:
    if evidence is None:
        return "<p>The circuit has no edge: there is nothing to test.</p>"
    if evidence.tests is None:
        return (
            "<p>Left out. <code>acdc report RUN</code> without <code>--no-tests</code> runs them."
            "</p>"
        )
    tests = evidence.tests
    cards = "".join(map(_verdict, tests.verdicts))
    complement = ""
    if tests.complement is not None:
        complement = (
            " Without the circuit’s edges the model keeps a faithfulness of "
            f"{tests.complement:.3g}."
        )
    return (
        f"<p class=soft>On {_on(evidence)}. Equivalence, independence and completeness pass when "
        f"nothing is found against the circuit: look at the sample.{complement}</p>"
        f'<div class="verdicts">{cards}</div>{_effects(tests.effects)}'
    )


def _on(evidence: Evidence) -> str:
    where = f"{_n(evidence.n_prompts, 'prompt pair')}, {evidence.prompts}"
    return escape(f"{where}; {evidence.metric}")


def _verdict(verdict: Verdict) -> str:
    word = _WORDS[verdict.passed]
    p_value = "" if verdict.p_value is None else f"p {verdict.p_value:.2g} · "
    question = _QUESTIONS.get(verdict.test, "")
    return (
        f'<article class="{word.replace(" ", "-")}"><h3>{escape(verdict.test)}</h3>'
        f'<span class="verdict">{word}</span><p>{escape(question)}</p>'
        f"<p>{escape(_sentence(verdict.says))}</p>"
        f'<p class="soft">{p_value}{verdict.n:,} {escape(verdict.unit)}, '
        f"level {verdict.level:.2g}</p></article>"
    )


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}." if words else ""


def _effects(effects: Sequence[EdgeEffect]) -> str:
    if not effects:
        return ""
    rows = "".join(
        f"<tr><td class=mono>{escape(e.edge)}</td><td class=n>{e.effect:.3g}</td>"
        f"<td class=n>{100 * e.surpassed:.0f} %</td><td class=n>{e.p_value:.2g}</td></tr>"
        for e in effects[:_EFFECTS]
    )
    return (
        "<details><summary>Edges that do least</summary><div class=wide><table><tr><th>edge</th>"
        "<th class=n>squared change without it</th><th class=n>of added edges it surpasses</th>"
        f"<th class=n>p</th></tr>{rows}</table></div></details>"
    )


def _per_prompt(report: Report) -> str:
    """Edges that help on some prompts and hurt on others, with a prompt of either sort."""
    found = None if report.evidence is None else report.evidence.per_prompt
    if found is None:
        return ""

    def text(prompt: int) -> str:
        return escape(visible("".join(map(report.texts, found.prompts[prompt]))).strip())

    rows = "".join(
        f"<tr><td class=mono>{escape(row.edge)}</td><td class=n>{row.mean:.3g}</td>"
        f"<td class=n>{100 * row.helps:.0f} %</td><td class=n>{100 * row.hurts:.0f} %</td>"
        f"<td>{text(row.best)}</td><td>{text(row.worst)}</td></tr>"
        for row in found.two_sided()[:_EFFECTS]
    )
    return (
        "<details><summary>Edges that help on some prompts and hurt on others</summary>"
        "<div class=wide><table><tr><th>edge</th><th class=n>mean effect</th><th class=n>helps on"
        "</th><th class=n>hurts on</th><th>helps most on</th><th>hurts most on</th></tr>"
        f"{rows}</table></div></details>"
    )


# --- faithfulness -------------------------------------------------------------------------


def _faithfulness(report: Report) -> str:
    evidence, s = report.evidence, report.summary
    figures = []
    measured = [("on the prompts of discovery", _own(s))]
    if evidence is not None and evidence.ablations:
        if not evidence.seen:
            measured.append((f"on {evidence.n_prompts:,} others", evidence.ablations[0]))
        figures.append(
            _figure(
                "Under every ablation",
                ablations_plot(evidence.ablations),
                f"On {_on(evidence)}. Filled: the run’s own ablation; lines: 95 % of a bootstrap "
                "over prompts. The ablation is part of the claim.",
            )
        )
    if report.frontier:
        plot = frontier_plot(report.frontier, s["n_edges_kept"], s["n_edges_total"], measured)
        caption = (
            "Circuits along the ranking of the scores, on the prompts of discovery, with their "
            "95 % band. Filled: the circuit there"
            + ("; hollow: on prompts it has not seen." if len(measured) > 1 else ".")
        )
        figures.insert(0, _figure("Against size", plot, caption))
    areas = evidence.areas if evidence is not None else ()
    said = "; ".join(f"{a.measure} {a.value:.3f} ({a.low:.3f} to {a.high:.3f})" for a in areas)
    return (
        (f'<div class="figures">{"".join(figures)}</div>' if figures else "<p>Undefined.</p>")
        + _numbers(s)
        + (f"<p>MIB’s areas of the ranking: {escape(said)}.</p>" if said else "")
    )


def _own(summary: dict[str, Any]) -> Ablated:
    return Ablated(
        summary["intervention"], summary["direction"], summary["faithfulness_seen"], None, None
    )


def _numbers(s: dict[str, Any]) -> str:
    noising = s["direction"] == "noising"
    names = {
        "full": "whole model" if noising else "corrupt run",
        "circuit": "circuit" if noising else "all but the circuit restored",
        "empty": "no edge" if noising else "every edge restored",
    }
    values = [f"{name} {_number(s[f'metric_{key}'])}" for key, name in names.items()]
    share = s["faithfulness"]
    where = "on unseen prompts: " if share is not None else ""
    text = f"{where}{s['metric']}: {', '.join(values)}; faithfulness {_number(share)}"
    text += f" ({_number(s['faithfulness_seen'])} on those seen)"
    if mixtures := s.get("mixtures"):
        text += f"; the router of its experts is {mixtures['router']}"
    errors = (s.get("latents") or {}).get("error_nodes")
    if errors:
        text += f", with all error nodes in {_number(errors['with_errors'])}"
        text += f", with none {_number(errors['without_errors'])}"
    return f"<p>{escape(text)}.</p>"


def _figure(title: str, svg: str, caption: str) -> str:
    return f"<figure><h4>{title}</h4>{svg}<figcaption>{caption}</figcaption></figure>"


# --- reference ----------------------------------------------------------------------------


def _reference(agreement: Agreement | None) -> str:
    if agreement is None:
        return (
            "<p>No circuit is known for this model and task (<code>acdc list references</code>); "
            "<code>--reference NAME</code> compares with one.</p>"
        )
    known, comparison = agreement.reference, agreement.comparison
    said = f"<p><b>{escape(known.name)}</b>: {escape(known.description)}</p>"
    if agreement.warning:
        said += f'<p class="warning">{escape(_sentence(agreement.warning))}</p>'
    if agreement.match.same is False:
        other = f"another model than the reference's ({known.model}): {agreement.match.says}"
        said += f'<p class="warning">{escape(_sentence(f"This run is of {other}"))}</p>'
    else:
        said += f'<p class="soft">{escape(_sentence(agreement.match.says))}</p>'
    overlaps = [("nodes", comparison.nodes)]
    by_chance = [agreement.chance.nodes]
    if comparison.edges is not None and agreement.chance.edges is not None:
        overlaps.insert(0, (agreement.what, comparison.edges))
        by_chance.insert(0, agreement.chance.edges)
    rows = "".join(
        f"<tr><td>{name}</td>"
        + "".join(f"<td class=n>{len(x):,}</td>" for x in (o.common, o.only_a, o.only_b))
        + "".join(f"<td class=n>{x:.3f}</td>" for x in (o.precision, o.recall, o.f1))
        + "</tr>"
        + "<tr class=soft><td>&nbsp;random</td><td></td><td></td><td></td>"
        + "".join(f"<td class=n>{chances[r].mean:.3f}</td>" for r in ("precision", "recall", "f1"))
        + "</tr>"
        for (name, o), chances in zip(overlaps, by_chance, strict=True)
    )
    heads = "".join(
        f"<th class=n>{name}</th>"
        for name in ("found", "extra", "missed", "precision", "recall", "F1")
    )
    table = f"<div class=wide><table><tr><th></th>{heads}</tr>{rows}</table></div>"
    table += (
        f'<p class="soft">random: mean of {agreement.chance.n_circuits:,} random circuits of '
        f"{agreement.chance.n_edges:,} edges</p>"
    )
    counted, overlap = overlaps[0]
    names = _details(f"missed {counted}", overlap.only_b) + _details(
        f"extra {counted}", overlap.only_a
    )
    return (
        f'{said}<div class="figures">{_roc(agreement)}<div>{table}{_roles(agreement)}{names}</div>'
        f'</div><p class="soft">{escape(known.citation)}</p>'
    )


def _roc(agreement: Agreement) -> str:
    if agreement.roc is None:
        return "<p>All of the graph or nothing of it is in the reference: no ROC curve.</p>"
    caption = (
        f"{agreement.n_true:,} of {agreement.n_items:,} {escape(agreement.what)} are true. The "
        f"ranking of the scores has AUROC {agreement.roc.area:.3f} and average precision "
        f"{agreement.average_precision:.3f}{_shuffled(agreement)}. Filled: the circuit."
    )
    return _figure("ROC", roc_plot(agreement.roc, agreement.point), caption)


def _shuffled(agreement: Agreement) -> str:
    """What shuffled scores get."""
    if agreement.ranking_chance is None:
        return ""
    areas = (agreement.ranking_chance[name].mean for name in ("auroc", "average_precision"))
    return " ({:.3f} and {:.3f} with scores shuffled)".format(*areas)


def _roles(agreement: Agreement) -> str:
    roles = agreement.comparison.roles
    if not roles:
        return ""
    rows = "".join(
        f"<tr><td>{escape(role)}</td><td class=n>{escape(str(count))}</td>"
        f"<td class=n>{agreement.chance.roles[role].mean:.1f}</td>"
        f"<td class=mono>{escape(', '.join(count.missed)) or '-'}</td></tr>"
        for role, count in roles.items()
    )
    return (
        "<h4>by role</h4><div class=wide><table><tr><th>role</th><th class=n>found</th>"
        f"<th class=n>random</th><th>missed</th></tr>{rows}</table></div>"
    )


def _details(title: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = len(names) - _NAMES
    text = ", ".join(names[:_NAMES]) + (f" and {more:,} more" if more > 0 else "")
    return (
        f"<details><summary>{len(names):,} {escape(title)}</summary>"
        f"<p class=mono>{escape(text)}</p></details>"
    )


# --- stability, time ----------------------------------------------------------------------


def _stability(report: Report) -> str:
    repeated, s = report.repeated, report.settings
    if repeated is None:
        if spec_of(s) is None:
            return (
                "<p>Not measured: <code>acdc stability</code> repeats discovery over draws of a "
                "built-in task’s prompts.</p>"
            )
        asked = command_line(s, defaults_of(s), "stability")
        again = f"{asked} --seeds 5 --out runs/stable"
        then = f"acdc report {report.folder} --stability runs/stable/stability.json"
        return (
            "<p>Not measured. In how many runs over other prompts each edge is kept:</p>"
            f"<p><code>{escape(again)}</code><br><code>{escape(then)}</code></p>"
        )
    n = len(repeated.seeds)
    inside = {edge[0] + "->" + edge[2] for edge in report.view.data["edges"] if edge[4]}
    return (
        f"<p>{escape(repeated.method)} over {n} draws of prompts: two circuits share "
        f"{100 * repeated.jaccard:.1f} % of their edges (mean Jaccard), sizes "
        f"{min(repeated.sizes):,} to {max(repeated.sizes):,}.</p>"
        f'<div class="figures">{_kept(repeated, inside)}</div>'
    )


def _kept(repeated: Repeated, inside: set[str]) -> str:
    n = len(repeated.seeds)
    every = list(repeated.n_kept.values())
    of_run = [repeated.n_kept.get(name, 0) for name in inside]
    parts = (
        ("Edges of this circuit", of_run, range(n, -1, -1)),
        ("Edges of any repetition", every, range(n, 0, -1)),
    )
    return "".join(
        f"<figure><h4>{title}</h4>"
        + bars([(f"kept in {k} of {n}", counts.count(k), f"{counts.count(k):,}") for k in range_])
        + "</figure>"
        for title, counts, range_ in parts
    )


def _work(summary: dict[str, Any]) -> str:
    timings = summary["timings"]
    rows = [(name, seconds, f"{seconds:.1f} s") for name, seconds in timings.items()]
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    return (
        f'<div class="figures"><figure><h4>Seconds of the run</h4>{bars(rows)}</figure></div>'
        f"<p class=soft>{escape(versions)}</p>"
    )


# --- words --------------------------------------------------------------------------------


def _n(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _interval(measured: Ablated) -> str:
    if measured.low is None or measured.high is None:
        return ""
    return f" (95 % interval {100 * measured.low:.0f} to {100 * measured.high:.0f} %)"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"
