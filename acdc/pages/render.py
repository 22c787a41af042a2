"""A report as one HTML page that needs nothing but itself.

What the sections say is put together here and laid out by ``templates/report.html``; the circuit
moves by the scripts of ``viewer``, which read the page's data (:mod:`acdc.pages.circuit`) and put
every text there as text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from acdc.methods import Score
from acdc.pages.contents import Agreement, Report
from acdc.pages.doses import doses_section
from acdc.pages.evidence import Ablated, Evidence, Repeated
from acdc.pages.filling import fill, resource
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
_SCRIPTS = (
    *("data", "state", "picture", "paths", "search", "panel", "attention", "groups", "save"),
    "keys",
)
_KEYS = (
    (("/",), "find a node; Enter goes to the next one found"),
    (("click", "Enter"), "choose a node"),
    (("Shift click", "p"), "pin it"),
    (("f", "t"), "trace all paths from it, to it"),
    (("g",), "group what is pinned"),
    (("↑", "↓"), "go along its strongest edge out, in"),
    (("←", "→"), "go to its neighbour in the row"),
    (("+", "-", "0", "h"), "larger, smaller, all, full height"),
    (("Esc",), "undo the paths, the choice, the pins"),
)
_SECTIONS = {
    "circuit": "Circuit",
    "tests": "Tests",
    "faithfulness": "Faithfulness",
    "doses": "Dose and response",
    "reference": "Reference",
    "stability": "Stability",
    "work": "Time and versions",
}
"""Parts of the page, each a template ``report/NAME.html``."""


def to_html(report: Report) -> str:
    """Return a report as a page.

    Parameters
    ----------
    report
        What :func:`acdc.pages.gather` gives.
    """
    title = f"Circuit of {_task(report.settings)} in {_model(report.settings)}"
    body = fill(
        "report.html",
        report=report,
        title=title,
        lead=_lead(report),
        facts=_facts(report),
        sections=_SECTIONS,
        doses=doses_section(report.doses),
        **_circuit(report),
        **_tests(report),
        **_faithfulness(report),
        **_reference(report.agreement),
        **_stability(report),
        **_work(report.summary),
    )
    return page(
        title,
        body,
        style=resource("report.css"),
        script="\n".join(resource(f"viewer/{name}.js") for name in _SCRIPTS),
        data=report.view.data | {"n_runs": report.repeated and len(report.repeated.seeds)},
    )


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
    return text


def _facts(report: Report) -> dict[str, str]:
    """What was asked for."""
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
        "device": s.device if s.offload == "none" else f"{s.device}, weights in host memory",
        "seed": str(s.seed),
    }
    if s.positions != "none":
        facts["split by"] = s.positions
    if s.mean_over is not None:
        facts["means over"] = s.mean_over
    if s.saes is not None:
        facts["dictionaries"] = s.saes
    return facts


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


# --- what the sections are filled with ----------------------------------------------------


def _circuit(report: Report) -> dict[str, Any]:
    pictures = report.view.pictures
    return {
        "reading": _reading(report),
        "wide": pictures[0].drawing.aspect > _WIDE,
        "drawings": [Markup(picture.drawing.svg) for picture in pictures],
        "names": list(report.view.data["nodes"]),
        "keys": _KEYS,
    }


def _reading(report: Report) -> dict[str, Any]:
    """What a score means, whether it has a sign, and whether one above 0 helps (None: it does)."""
    s = report.settings
    metric, means = metric_of(s), report.score
    if means is Score.COST:
        meaning = f"how much worse {metric.name} gets when the edge is taken out of the circuit"
        return {"meaning": meaning, "signed": True, "above": None}
    if means is Score.MAGNITUDE:
        meaning = f"how much {s.method} makes of the edge, which has no sign"
        return {"meaning": meaning, "signed": False, "above": None}
    worse = metric.sign * (1 if s.direction == "noising" else -1)
    meaning = f"the change of {metric.name} that ablating the edge makes, as the method has it"
    return {"meaning": meaning, "signed": True, "above": worse > 0}


def _tests(report: Report) -> dict[str, Any]:
    evidence = report.evidence
    found = None if evidence is None else evidence.per_prompt

    def text(prompt: int) -> str:
        assert found is not None
        return visible("".join(map(report.texts, found.prompts[prompt]))).strip()

    two_sided = None
    if found is not None:
        rows = found.two_sided()[:_EFFECTS]
        two_sided = [(row, text(row.best), text(row.worst)) for row in rows]
    return {
        "measured_on": None if evidence is None else _on(evidence),
        "words": _WORDS,
        "questions": _QUESTIONS,
        "most_effects": _EFFECTS,
        "two_sided": two_sided,
    }


def _on(evidence: Evidence) -> str:
    where = f"{_n(evidence.n_prompts, 'prompt pair')}, {evidence.prompts}"
    return f"{where}; {evidence.metric}"


def _faithfulness(report: Report) -> dict[str, Any]:
    evidence, s = report.evidence, report.summary
    figures = []
    measured = [("on the prompts of discovery", _own(s))]
    if evidence is not None and evidence.ablations:
        if not evidence.seen:
            measured.append((f"on {evidence.n_prompts:,} others", evidence.ablations[0]))
        caption = (
            f"On {_on(evidence)}. Filled: the run’s own ablation; lines: 95 % of a bootstrap "
            "over prompts. The ablation is part of the claim."
        )
        figures.append(("Under every ablation", ablations_plot(evidence.ablations), caption))
    if report.frontier:
        plot = frontier_plot(report.frontier, s["n_edges_kept"], s["n_edges_total"], measured)
        caption = (
            "Circuits along the ranking of the scores, on the prompts of discovery, with their "
            "95 % band. Filled: the circuit there"
            + ("; hollow: on prompts it has not seen." if len(measured) > 1 else ".")
        )
        figures.insert(0, ("Against size", plot, caption))
    areas = evidence.areas if evidence is not None else ()
    said = "; ".join(f"{a.measure} {a.value:.3f} ({a.low:.3f} to {a.high:.3f})" for a in areas)
    return {"figures": figures, "numbers": _numbers(s), "areas": said}


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
    return text


def _reference(agreement: Agreement | None) -> dict[str, Any]:
    if agreement is None:
        return {"overlaps": (), "most_names": _NAMES, "roc": None, "roc_caption": None}
    comparison, by_chance = agreement.comparison, agreement.chance
    overlaps = [("nodes", comparison.nodes, by_chance.nodes)]
    if comparison.edges is not None and by_chance.edges is not None:
        overlaps.insert(0, (agreement.what, comparison.edges, by_chance.edges))
    roc = caption = None
    if agreement.roc is not None:
        roc = roc_plot(agreement.roc, agreement.point)
        caption = (
            f"{agreement.n_true:,} of {agreement.n_items:,} {agreement.what} are true. The "
            f"ranking of the scores has AUROC {agreement.roc.area:.3f} and average precision "
            f"{agreement.average_precision:.3f}{_shuffled(agreement)}. Filled: the circuit."
        )
    return {"overlaps": overlaps, "most_names": _NAMES, "roc": roc, "roc_caption": caption}


def _shuffled(agreement: Agreement) -> str:
    """What shuffled scores get."""
    if agreement.ranking_chance is None:
        return ""
    areas = (agreement.ranking_chance[name].mean for name in ("auroc", "average_precision"))
    return " ({:.3f} and {:.3f} with scores shuffled)".format(*areas)


def _stability(report: Report) -> dict[str, Any]:
    repeated, s = report.repeated, report.settings
    if repeated is None:
        again = None
        if spec_of(s) is not None:
            asked = command_line(s, defaults_of(s), "stability")
            again = f"{asked} --seeds 5 --out runs/stable"
        return {"again": again, "kept": ()}
    inside = {edge[0] + "->" + edge[2] for edge in report.view.data["edges"] if edge[4]}
    return {"again": None, "kept": _kept(repeated, inside)}


def _kept(repeated: Repeated, inside: set[str]) -> list[tuple[str, Markup]]:
    n = len(repeated.seeds)
    every = list(repeated.n_kept.values())
    of_run = [repeated.n_kept.get(name, 0) for name in inside]
    parts = (
        ("Edges of this circuit", of_run, range(n, -1, -1)),
        ("Edges of any repetition", every, range(n, 0, -1)),
    )
    return [
        (
            title,
            bars([(f"kept in {k} of {n}", counts.count(k), f"{counts.count(k):,}") for k in ks]),
        )
        for title, counts, ks in parts
    ]


def _work(summary: dict[str, Any]) -> dict[str, Any]:
    rows = [(name, seconds, f"{seconds:.1f} s") for name, seconds in summary["timings"].items()]
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    return {"timings": bars(rows), "versions": versions}


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
