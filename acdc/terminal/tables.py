"""What a person sees on the terminal: progress bars and tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from acdc.terminal.loudness import Loudness, loudness
from graphs.text import printable

if TYPE_CHECKING:
    from acdc.evidence.assessment import Assessment
    from acdc.evidence.bases import SizeAt
    from acdc.evidence.comparison import Cost
    from acdc.evidence.conditions import Conditions
    from acdc.evidence.directions import BothDirections
    from acdc.evidence.groups import Groups
    from acdc.evidence.interactions import Interactions
    from acdc.evidence.self_repair import HeadRepair, Measure, RoleRepair, SelfRepair
    from acdc.evidence.sources import Source
    from acdc.evidence.stability import Stability
    from acdc.evidence.verdicts import Judgement
    from acdc.measure.gates import Gate
    from acdc.measure.per_prompt import PerPrompt
    from graphs import Circuit
    from graphs.known.bases import BasesComparison, Shared
    from graphs.known.chance import AtChance, Chance
    from graphs.known.compare import Comparison, Overlap, ReferenceComparison
    from graphs.known.reference import Reference

__all__ = [
    "SafeConsole",
    "TerminalReporter",
    "ablations_table",
    "assessment_parts",
    "bases_tables",
    "comparison_table",
    "conditions_tables",
    "directions_tables",
    "edges_table",
    "effects_table",
    "frontier_table",
    "groups_tables",
    "interactions_tables",
    "number",
    "per_prompt_table",
    "reference_table",
    "roles_table",
    "run_table",
    "say",
    "self_repair_tables",
    "show",
    "stability_tables",
    "verdicts_table",
    "warn",
    "warnings_lines",
]

_TOP_EDGES = 10
_TOP_OTHERS = 5
_ROUNDING = 1e-5
"""Growth below this share of the largest direct effect is no more than rounding."""
_TOP_REFINED, _TOP_OWN = 15, 4


class TerminalReporter:
    """Progress bars on standard error."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    @contextmanager
    def phase(self, name: str, total: int | None) -> Iterator[None]:
        """Show a bar of ``total`` steps, or a spinner-like bar without an end.

        It disappears when the block raises, so that an error's message stands alone; where
        standard error is no terminal, only finished bars are printed.
        """
        if loudness() is Loudness.QUIET:
            yield
            return
        console, started = SafeConsole(stderr=True), time.perf_counter()
        columns = [
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        ]
        if total is not None:
            columns.insert(2, MofNCompleteColumn())
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as self._progress:
            task = self._progress.add_task(name, total=total, note="")
            yield
            self._progress.update(task, total=total or 1, completed=total or 1)
        console.print(self._progress.get_renderable())
        if loudness() is Loudness.VERBOSE:
            took = time.perf_counter() - started
            say(f"  {name}: {took:.2f} s, {_peak_memory()} at most so far", stderr=True)

    def advance(self, n: int) -> None:
        """Count ``n`` steps."""
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0], n)

    def note(self, text: str) -> None:
        """Say beside the bar how the phase stands."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], note=text)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if loudness() is Loudness.QUIET:
            return
        if self._progress is None:
            say(text, stderr=True)
        else:
            console = self._progress.console
            console.print(text, highlight=False, markup=False, soft_wrap=True)


def _peak_memory() -> str:
    """Most memory that the process has held."""
    if sys.platform == "win32":
        return "memory unknown on Windows"
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return f"{most / (2**30 if sys.platform == 'darwin' else 2**20):.2f} GiB"


class SafeConsole(Console):
    """A console that shows control characters in texts as escapes (:mod:`graphs.text`)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]  # it has fewer
        """Return what every text passes through, in tables too."""
        return super().render_str(printable(text, keep="\n\t"), **options)


def say(line: str, *, stderr: bool = False) -> None:
    """Print one line, however long, to standard output or standard error."""
    SafeConsole(stderr=stderr).print(line, highlight=False, markup=False, soft_wrap=True)


def show(*parts: Any) -> None:
    """Print tables and text to standard output; a text as it is, those in tables as markup.

    Nothing where one is told to be quiet.
    """
    if loudness() is not Loudness.QUIET:
        _print(parts)


def _print(parts: Iterable[Any]) -> None:
    console = SafeConsole()
    for part in parts:
        console.print(part, highlight=False, markup=not isinstance(part, str))


def warn(warnings: Iterable[str]) -> None:
    """Say what one should know before believing a result, a line each."""
    _print(warnings_lines(warnings))


def warnings_lines(warnings: Iterable[str]) -> Iterator[str]:
    """Yield warnings as they are shown."""
    return (f"warning: {warning}" for warning in warnings)


def number(value: float | None) -> str:
    """Four significant digits, or a dash for None."""
    return "-" if value is None else f"{value:.4g}"


def run_table(summary: dict[str, Any], title: str) -> Table:
    """Table of the content of a ``run.json``."""
    table = Table(title=escape(title), show_header=False, title_justify="left")
    kept, total = summary["n_edges_kept"], summary["n_edges_total"]
    share = f" ({100 * kept / total:.1f} %)" if total else ""
    over = f" over {summary['mean_over']}" if summary.get("mean_over") is not None else ""
    ablation = f"{summary['direction']}, {summary['intervention']} ablation{over}"
    if summary.get("positions", "none") != "none":
        share += f", split by {summary['positions']}"
    rows = {
        "model": summary["model"],
        "task": f"{summary['task']}, {summary['n_prompts']} prompt pairs, seed {summary['seed']}",
        "method": f"{summary['method']} ({ablation})",
        "metric": summary["metric"],
        "edges kept": f"{kept:,} of {total:,}{share}",
        "metric: full, circuit, empty": ", ".join(
            number(summary[f"metric_{which}"]) for which in ("full", "circuit", "empty")
        ),
        "faithfulness": _faithfulness(summary),
    }
    mixtures = summary.get("mixtures")
    if isinstance(mixtures, dict):
        rows["router of experts"] = mixtures["router"]
    norms = summary.get("faithfulness_by_norms")
    if norms is not None:
        rows["faithfulness: norms frozen, live"] = ", ".join(
            number(norms[which]) for which in ("frozen", "live")
        )
    if "faithfulness_seen" in summary:
        rows["faithfulness, prompts seen"] = number(summary["faithfulness_seen"])
    if summary.get("saes") is not None:
        rows["dictionaries"] = summary["saes"]
    prompts = summary.get("prompts")
    if isinstance(prompts, dict):
        rows["prompts"] = ", ".join(f"{n:,} to {what}" for what, n in prompts.items() if n)
    elif prompts is not None:
        rows["prompts"] = prompts
    rows |= _latent_rows(summary.get("latents"))
    if summary.get("audit") is not None:
        rows["untested"] = _untested(summary["audit"])
    if summary.get("threshold") is not None:
        rows["threshold"] = number(summary["threshold"])
    if "timings" in summary:
        rows["seconds"] = ", ".join(f"{k} {v:.1f}" for k, v in summary["timings"].items())
    for name, value in rows.items():
        table.add_row(name, escape(str(value)))
    return table


def _latent_rows(latents: dict[str, Any] | None) -> dict[str, str]:
    """Rows about latents, none where there are none."""
    if latents is None:
        return {}
    errors = latents["error_nodes"]
    which = ("with_errors", "without_errors")
    return {
        "latents": f"{latents['n_kept']:,} of {latents['n_active']:,} active are nodes "
        f"({100 * latents['folded_share']:.1f} % of attribution folded)",
        "faithfulness: error nodes in, out": ", ".join(number(errors[w]) for w in which),
        "complement: error nodes in, out": ", ".join(
            number(errors[f"complement_{w}"]) for w in which
        ),
    }


def _untested(audit: dict[str, Any]) -> str:
    """How many edges eap-acdc skipped, and what that may have missed (the worse of two ways)."""
    ways = [audit[way] for way in ("taken_out", "put_back")]
    reach = max(way["n_at_least_tau"] for way in ways)
    at_most = max(way["n_at_least_tau_in_all"] for way in ways)
    return (
        f"{audit['n_skipped']:,} edges; of {audit['n_sampled']:,} sampled {reach:,} reach the "
        f"threshold alone, at most {at_most:,} of all do ({audit['confidence']:.0%} confidence)"
    )


def _faithfulness(summary: dict[str, Any]) -> str:
    """What is claimed of a run's circuit, or that nothing is; of an evaluation as it is."""
    ends = summary.get("faithfulness_interval")
    if ends is None:
        return _with_interval(summary)
    said = f"{number(summary['faithfulness'])} (95 % interval {' to '.join(map(number, ends))})"
    return f"{said}, {summary['prompts']['test']:,} unseen prompts"


def _with_interval(row: dict[str, Any]) -> str:
    """Faithfulness, with its interval where there is one."""
    said = number(row["faithfulness"])
    if row.get("faithfulness_low") is None:
        return said
    ends = (number(row[f"faithfulness_{end}"]) for end in ("low", "high"))
    return f"{said} (95 % interval {' to '.join(ends)})"


def ablations_table(summary: dict[str, Any]) -> Table:
    """Table of the faithfulness under every ablation, and of CPR and CMD."""
    table = Table(title="faithfulness under every ablation", title_justify="left")
    for column in ("direction", "intervention", "metric: full, circuit, empty", "faithfulness"):
        table.add_column(column)
    for row in summary["ablations"]:
        values = (number(row[f"metric_{which}"]) for which in ("full", "circuit", "empty"))
        table.add_row(row["direction"], row["intervention"], ", ".join(values), _with_interval(row))
    for intervention, why in summary.get("ablations_left_out", {}).items():
        table.add_row("", intervention, escape(why), "-")
    for area in summary["areas"]:
        said = f"{area['value']:.4g} (95 % interval {area['low']:.4g} to {area['high']:.4g})"
        choices = f"{area['ranking']} scores, {area['axis']} axis, {area['size']} sizes"
        table.add_row(area["measure"], "", choices, said)
    return table


def groups_tables(found: Groups, title: str) -> tuple[Table, ...]:
    """Tables of groups of prompts, and of every circuit on every group's fresh prompts."""
    table = Table(title=escape(title), title_justify="left")
    for column in ("group", "prompts", "fresh", "edges", "faithfulness", "such as"):
        table.add_column(column)
    summary = found.summary()
    for place, group in enumerate(summary["groups"]):
        low, high = group["faithfulness_interval"] or (None, None)
        row = group | {"faithfulness_low": low, "faithfulness_high": high}
        table.add_row(
            str(place), f"{group['n_fit']:,}", f"{group['n_test']:,}", f"{group['n_edges']:,}",
            _with_interval(row), escape(group["examples"][0]),
        )  # fmt: skip
    if not found.crosses:
        return (table,)
    crosses = Table(title="every circuit on the other groups", title_justify="left")
    for column in (
        "circuit of",
        "prompts of",
        "faithfulness",
        "farther from 1 than theirs",
        "fails",
    ):
        crosses.add_column(column)
    for cross in found.crosses:
        ends = f" [{number(cross.low)}, {number(cross.high)}]"
        less = number(cross.loss) + ("" if cross.loss is None else ends)
        crosses.add_row(
            str(cross.circuit), str(cross.prompts), number(cross.faithfulness), less,
            {True: "yes", False: "no", None: "-"}[cross.fails],
        )  # fmt: skip
    return table, crosses


def directions_tables(found: BothDirections, n: int = 15) -> tuple[Table, Table | str]:
    """Tables of what each direction finds, and of candidates for gates; a line if none is one."""
    edges = found.comparison.edges
    counts = Table(title="edges by direction", title_justify="left", show_header=False)
    for name, some in (
        ("in both", edges.common),
        ("only in noising (candidates for AND)", edges.only_a),
        ("only in denoising (candidates for OR)", edges.only_b),
    ):
        counts.add_row(name, f"{len(some):,}")
    if not found.candidates:
        return counts, "no node reads an edge of one direction alone beside another edge: no gates"
    title = "nodes that may combine their inputs as a gate"
    hidden = len(found.candidates) - n
    gates = Table(title=title + (f" (first {n})" if hidden > 0 else ""), title_justify="left")
    for column in ("receiver", "may be", "found by one direction", "by both"):
        gates.add_column(column)
    for candidate in found.candidates[:n]:
        only, partners = ", ".join(candidate.only), ", ".join(candidate.partners)
        gates.add_row(
            escape(candidate.receiver), candidate.gate, escape(only), escape(partners) or "-"
        )
    return counts, gates


def verdicts_table(judgement: Judgement) -> Table:
    """Table of the tests of a circuit."""
    trials = judgement.trials
    title = f"tests at level {trials.alpha:g}; passing is finding nothing, or better than random"
    table = Table(title=title, title_justify="left")
    for column in ("test", "verdict", "p", "sample", "in words"):
        table.add_column(column, no_wrap=column in ("test", "verdict"))
    for verdict in judgement.verdicts:
        word = {True: "pass", False: "[bold]FAIL[/bold]", None: "-"}[verdict.passed]
        sample = f"{verdict.n} {verdict.unit}"
        p_value = "-" if verdict.p_value is None else f"{verdict.p_value:.2g}"
        table.add_row(verdict.test, word, p_value, sample, escape(verdict.says))
    if judgement.complement is not None:
        complement = f"faithfulness {judgement.complement:.3g} without the circuit's edges"
        table.add_row("complement", "", "", "", complement)
    if judgement.n_on_path < judgement.n_edges:
        table.add_row("paths", "", "", "", _paths_line(judgement.n_on_path, judgement.n_edges))
    return table


def _paths_line(n_on_path: int, n_edges: int) -> str:
    """Return what is said of a circuit whose edges do not all lie on a path in it."""
    some = f"{n_on_path:,} of its {n_edges:,} edges lie" if n_on_path else "no edge of it lies"
    return (
        f"{some} on a path of it from the embeddings to logits; the others carry nothing under "
        "resample ablation"
    )


def per_prompt_table(found: PerPrompt, n: int = 10) -> Table:
    """Table of edges that help on some prompts and hurt on others."""
    title = "edges that help on some prompts and hurt on others"
    table = Table(title=title, title_justify="left")
    table.add_column("edge", no_wrap=True, overflow="fold")
    for column in ("mean effect", "helps on", "hurts on"):
        table.add_column(column, justify="right")
    for row in found.two_sided()[:n]:
        table.add_row(row.edge, number(row.mean), f"{row.helps:.0%}", f"{row.hurts:.0%}")
    return table


def assessment_parts(assessment: Assessment, title: str) -> Iterator[Any]:
    """Yield all that a measured and tested circuit shows."""
    summary = assessment.summary()
    yield run_table(summary, title)
    yield ablations_table(summary)
    if assessment.judgement is not None:
        yield verdicts_table(assessment.judgement)
        if assessment.judgement.edges:
            yield effects_table(assessment.judgement)
    if assessment.per_prompt is not None:
        yield per_prompt_table(assessment.per_prompt)
        yield "every prompt: --out FILE; with their texts: acdc report RUN --evaluation FILE"


def effects_table(judgement: Judgement, n: int = 5) -> Table:
    """Table of the edges that the test of minimality finds most superfluous."""
    table = Table(title="edges that do least", title_justify="left")
    for column in ("edge", "squared change without it", "of added edges it surpasses", "p"):
        table.add_column(column, justify="left" if column == "edge" else "right")
    for edge in judgement.edges[:n]:
        table.add_row(
            escape(edge.edge), number(edge.effect), f"{edge.surpassed:.0%}", f"{edge.p_value:.2g}"
        )
    return table


def stability_tables(found: Stability, n: int = _TOP_EDGES) -> tuple[Any, ...]:
    """A line, and tables of edges by the runs that kept them and of those kept most often.

    Where more than prompts was varied a table of what the differences come from.
    """
    summary = found.summary()
    n_seeds, what = len(found.seeds), "runs" if found.factors else "seeds"
    said = f"edges over {n_seeds} {what}; two runs share {found.overlap:.1%} (mean Jaccard)"
    counts = Table()
    for column in ("kept in", "edges"):
        counts.add_column(column, justify="right")
    for k, n_edges in summary["n_edges_by_count"].items():
        counts.add_row(f"{k} of {n_seeds} runs", f"{n_edges:,}")
    edges = Table(title="edges kept most often", title_justify="left")
    edges.add_column("edge")
    edges.add_column("runs", justify="right")
    for name, count in list(summary["edges"].items())[:n]:
        edges.add_row(escape(name), f"{count} of {n_seeds}")
    return said, counts, edges, *([_sources_table(found.sources)] if found.sources else [])


def _sources_table(sources: Sequence[Source]) -> Table:
    table = Table(title="what the differences come from", title_justify="left")
    for column in ("source", "levels", "share of the variance", "of the sum of squares", "df"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for source in sources:
        name = "other interactions" if source.name == "rest" else source.name
        table.add_row(
            name, str(source.n_levels or "-"), f"{source.variance:.1%}", f"{source.squares:.1%}",
            str(source.df),
        )  # fmt: skip
    return table


def self_repair_tables(found: SelfRepair, title: str) -> Iterator[Any]:
    """Yield a table per role, and who backs it up."""
    yield (
        f"{title}: {found.settings.task} in {found.settings.model}, {found.n_prompts} prompts "
        f"({found.task_info['prompts']}), metric "
        f"{found.settings.metric}, {found.settings.direction}, "
        f"{found.settings.intervention} ablation"
    )
    if found.match is not None:
        other = "roles of ANOTHER MODEL: " if found.match.same is False else ""
        yield other + found.match.says
    for role in found.roles:
        yield _role_table(role)
    for name, heads in found.backups.items():
        yield f"backup of {name!r}: {', '.join(heads)}"
    if not found.backups:
        yield (
            f"no backup: no head answers with at least {found.min_share:.0%} of what ablating the "
            "others takes away"
        )


def interactions_tables(found: Interactions, title: str, n: int = 20) -> Iterator[Any]:
    """Yield how many pairs are of which kind, and the table of gates."""
    counts = ", ".join(f"{count:,} {kind}" for kind, count in found.counts.items())
    left_out = f"; {found.n_left_out:,} more of lower scores not tested" if found.n_left_out else ""
    yield (
        f"{title}: {found.n_prompts} prompts, metric {found.settings.metric}, "
        f"{found.settings.intervention} ablation"
    )
    yield f"{len(found.pairs):,} pairs: {counts}{left_out}"
    for gate in ("AND", "OR"):
        own = [one for one in found.candidates if one.gate == gate]
        if own:
            held = [one.receiver for one in own if one.holds]
            tested = sum(one.holds is not None for one in own)
            named = f" ({', '.join(held)})" if held else ""
            yield (
                f"candidates for {gate}: {len(held)} of {tested} tested hold{named}, "
                f"{len(own)} in all"
            )
    gates = [pair for pair in found.pairs if pair.noising.is_gate or pair.denoising.is_gate]
    if not gates:
        yield "no interaction: every pair that was tested adds up, as far as these prompts tell"
        return
    more = f" (first {n})" if len(gates) > n else ""
    table = Table(title=f"gates{more}", title_justify="left", caption_justify="left")
    level = f"{1 - found.alpha:.0%}"
    table.caption = f"interaction, its {level} interval of all pairs together; a dash: adds up"
    for column in ("edges", "gate", "noising", "denoising"):
        table.add_column(column)
    for pair in gates[:n]:
        table.add_row(
            escape(f"{pair.a}\n{pair.b}"), pair.kind, _gate(pair.noising), _gate(pair.denoising)
        )
    yield table


def _gate(gate: Gate) -> str:
    if not gate.is_gate:
        return "-"
    return f"{gate.kind} {gate.interaction:.3g} ({gate.low:.3g} to {gate.high:.3g})"


def _role_table(role: RoleRepair) -> Table:
    loss = f"ablating all takes {_interval(role.taken)} from the logits directly"
    if role.repaired is None:
        loss += ", next to nothing: there is nothing to repair"
    else:
        loss += f", {role.total.mean:.3g} in the end: {role.repaired:.0%} is repaired"
    if not role.members:
        loss += "; it is alone in its role, so that there are no others to ablate for it"
    title = f"role {role.role!r}: {', '.join(role.heads)}; {loss}"
    table = Table(title=escape(title), title_justify="left", caption_justify="left")
    for column in ("head", "before", "after", "growth", "response", "share", "verdict"):
        table.add_column(column, justify="left" if column in ("head", "verdict") else "right")
    for row in role.members:
        table.add_row(*_repair_cells(row))
    table.add_section()
    rows = (*role.members, *role.others)
    rounding = _ROUNDING * max((abs(row.before) for row in rows), default=0.0)
    grown = [row for row in role.others if row.growth.sign and abs(row.growth.mean) > rounding]
    grown.sort(key=lambda row: (row.verdict is None, -abs(row.growth.mean)))
    shown = grown[:_TOP_OTHERS]
    for row in shown:
        table.add_row(*_repair_cells(row))
    above = "after: above the line the others of the role ablated, below it the whole role"
    below = f"{len(grown) - len(shown)} more heads change" if len(grown) > len(shown) else ""
    after = above if role.members else "after: the role ablated"
    table.caption = "; ".join(part for part in ("direct effects", after, below) if part)
    if not all(row.in_circuit for row in (*role.members, *shown)):
        table.caption += "; *: not in the circuit"
    return table


def _repair_cells(row: HeadRepair) -> list[str]:
    verdict = f"[bold]{row.verdict.upper()}[/bold]" if row.verdict == "backup" else row.verdict
    return [
        row.head + ("" if row.in_circuit else " *"),
        f"{row.before:.3g}",
        f"{row.after:.3g}",
        _interval(row.growth),
        f"{row.response.mean:.3g}",
        "-" if row.share is None else f"{row.share:.0%}",
        verdict or "-",
    ]


def _interval(measure: Measure) -> str:
    return f"{measure.mean:.3g} ({measure.low:.3g} to {measure.high:.3g})"


def edges_table(circuit: Circuit, n: int = _TOP_EDGES) -> Table | str:
    """Table of the circuit's edges with the largest absolute scores; a line if it has none."""
    inside = np.flatnonzero(circuit.in_circuit)
    if not len(inside):
        return (
            "no edge was kept: those that the selection allows form no path from the embeddings "
            "to the logits; allow more --edges, or lower --threshold"
        )
    order = inside[np.argsort(-np.abs(circuit.scores[inside]), kind="stable")][:n]
    table = Table(title="most important edges", title_justify="left")
    table.add_column("edge")
    table.add_column("score", justify="right")
    for edge in order:
        name = circuit.graph.edge_name(int(edge))
        table.add_row(escape(name), f"{circuit.scores[edge]:+.4g}")
    return table


def frontier_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Table of a sweep, one row per threshold."""
    table = Table(title=escape(title), title_justify="left")
    for column in ("threshold", "edges kept", "share", "metric", "faithfulness", "seen"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            number(row["threshold"]),
            f"{row['n_edges_kept']:,}",
            f"{100 * row['n_edges_kept'] / row['n_edges_total']:.1f} %",
            number(row["metric_circuit"]),
            number(row["faithfulness"]),
            number(row["faithfulness_seen"]),
        )
    return table


_COUNTED = {"": "", "spans": ", by span", "joined": ", spans joined"}
"""Ends of titles: how a circuit split by positions was compared."""


def comparison_table(
    comparison: Comparison, labels: tuple[str, str], chance: AtChance | None = None
) -> Table:
    """Table of the overlap of two circuits, in edges and nodes, and of random circuits' overlap."""
    end = _COUNTED["joined" if comparison.joined else ""]
    counts = ("both", "only 1st", "only 2nd")
    table = _overlaps_table(f"{labels[0]} against {labels[1]}{end}", counts, chance)
    table.add_row("edges", *_overlap_cells(comparison.edges))
    _add_chance(table, None if chance is None else chance.edges)
    table.add_row("nodes", *_overlap_cells(comparison.nodes))
    _add_chance(table, None if chance is None else chance.nodes)
    return table


def _overlaps_table(title: str, counts: Sequence[str], chance: AtChance | None) -> Table:
    table = Table(title=escape(title), title_justify="left", caption_justify="left")
    for column in ("", *counts, "precision", "recall", "F1", "Jaccard"):
        table.add_column(column, justify="right" if column else "left")
    if chance is not None:
        table.caption = (
            f"random: mean of {chance.n_circuits:,} random circuits of {chance.n_edges:,} edges; "
            "95 %: what as many of them do not exceed"
        )
    return table


def _add_chance(table: Table, chances: Mapping[str, Chance] | None) -> None:
    """Add rows of what random circuits get, if it is known."""
    if chances is not None:
        means, highs = ([f"{x:.3f}" for x in some] for some in zip(
            *((c.mean, c.high) for c in chances.values()), strict=True
        ))  # fmt: skip
        table.add_row("  random", "", "", "", *means, style="dim")
        table.add_row("  95 %", "", "", "", *highs, style="dim")


def bases_tables(
    comparison: BasesComparison,
    sizes: Sequence[SizeAt] | None,
    costs: Sequence[Cost],
    labels: Sequence[str],
    *,
    list_edges: bool = True,
) -> Iterator[Any]:
    """Yield tables of circuits over different bases.

    Parameters
    ----------
    comparison
        In component form.
    sizes
        At equal faithfulness, one of each; None for circuits that are no runs.
    costs
        What finding them took.
    labels
        What to call them.
    list_edges
        Also list what refines what, and the component edges of one alone.
    """
    circuits = comparison.circuits
    table = Table(title=escape(" against ".join(labels)), title_justify="left")
    for column in ("", *labels):
        table.add_column(escape(column))
    rows: dict[str, list[str]] = {
        "basis": [x.basis for x in circuits],
        "edges": [f"{x.n_edges:,}" for x in circuits],
        "nodes": [f"{x.n_nodes:,}, {x.n_latents:,} of them latents" for x in circuits],
        "components": [f"{len(x.components):,}" for x in circuits],
        "component edges": [f"{len(x.edges):,}" for x in circuits],
        "of them by error nodes alone": [f"{len(x.by_errors):,}" for x in circuits],
        "edges in component edges of all": [f"{len(x.shared):,}" for x in circuits],
        "edges outside them": [f"{len(x.other):,}" for x in circuits],
    }
    if sizes is not None:
        level = f"{sizes[0].level:g}"
        rows[f"edges for faithfulness {level}"] = [
            f"{s.n_edges:,} of {s.n_edges_total:,} ({number(s.faithfulness)})" for s in sizes
        ]
        rows[f"nodes for faithfulness {level}"] = [
            f"{s.n_nodes:,} of {s.n_nodes_total:,} ({s.ranking} ranking)" for s in sizes
        ]
    rows["found by"] = [cost.method for cost in costs]
    rows["seconds"] = ["" if c.seconds is None else f"{c.seconds:.3g}" for c in costs]
    rows["forward passes of a prompt"] = [
        "" if c.forwards is None else f"{c.forwards:,}" for c in costs
    ]
    for name, cells in rows.items():
        table.add_row(name, *map(escape, cells))
    yield table
    if sizes is None:
        yield "sizes at equal faithfulness: give the folders of runs"
    shared = {"components": comparison.components, "component edges": comparison.edges}
    for name, names in shared.items():
        yield _shared_table(name, names, labels)
    if list_edges:
        yield "components of all: " + (", ".join(comparison.components.common) or "none")
        yield _refinements_table(comparison, labels)
        for i, label in enumerate(labels):
            only = comparison.edges.only(i)
            yield f"component edges only in {label}: " + (", ".join(only) or "none")


def conditions_tables(found: Conditions, *, list_edges: bool = True, n: int = 25) -> Iterator[Any]:
    """Yield how circuits under several conditions overlap, and which edges come and go."""
    edges, labels = found.found.edges, found.labels
    numbers = [str(i) for i in range(1, len(labels) + 1)]
    title = f"circuits by condition: {len(edges.common):,} edges in all; numbers: Jaccard of two"
    table = Table(title=title, title_justify="left")
    columns = ("", "condition", "edges", "faithfulness", "seen", "alone", *numbers)
    for column in columns:
        table.add_column(column, justify="left" if column == "condition" else "right")
    for i, (label, run) in enumerate(zip(labels, found.runs, strict=True)):
        values = number(run.faithfulness), number(run.claim.faithfulness_seen)
        alike = [f"{edges.jaccard(i, j):.2f}" for j in range(len(labels))]
        cells = (f"{run.circuit.n_edges:,}", *values, f"{len(edges.only(i)):,}", *alike)
        table.add_row(numbers[i], escape(label), *cells)
    yield table
    if not list_edges:
        return
    yield "edges of all: " + (", ".join(edges.common) or "none")
    moving = {name: at for name, at in edges.members.items() if len(at) < len(labels)}
    order = sorted(moving, key=lambda name: -len(moving[name]))
    more = f" (first {n} of {len(order):,})" if len(order) > n else ""
    come_and_go = Table(title=f"edges that come and go{more}", title_justify="left")
    come_and_go.add_column("edge")
    for column in numbers:
        come_and_go.add_column(column, justify="center")
    for name in order[:n]:
        marks = ("x" if i in moving[name] else "" for i in range(len(labels)))
        come_and_go.add_row(escape(name), *marks)
    yield come_and_go if order else "no edge comes and goes"


def _shared_table(name: str, names: Shared, labels: Sequence[str]) -> Table:
    """How many names two circuits share, as a share of those of either."""
    title = f"{name}: {len(names.common):,} in all, Jaccard index of two"
    table = Table(title=title, title_justify="left")
    for column in ("", *labels, "in it alone"):
        table.add_column(escape(column), justify="right" if column else "left")
    for i, label in enumerate(labels):
        cells = [number(names.jaccard(i, j)) for j in range(len(labels))]
        table.add_row(escape(label), *cells, f"{len(names.only(i)):,}")
    return table


def _refinements_table(comparison: BasesComparison, labels: Sequence[str]) -> Table:
    """Component edges of all, those with the most own edges first."""
    edges = [x.edges for x in comparison.circuits]
    shared = sorted(comparison.edges.common, key=lambda edge: -sum(len(x[edge]) for x in edges))
    more = len(shared) - _TOP_REFINED
    title = "what refines the component edges of all" + (f" ({more:,} more)" if more > 0 else "")
    table = Table(title=title, title_justify="left")
    for column in ("component edge", *labels):
        table.add_column(escape(column))
    for edge in shared[:_TOP_REFINED]:
        table.add_row(escape(edge), *(escape(_own_edges(x[edge])) for x in edges))
    return table


def _own_edges(names: Sequence[str]) -> str:
    more = len(names) - _TOP_OWN
    return ", ".join(names[:_TOP_OWN]) + (f", {more:,} more" if more > 0 else "")


def reference_table(
    comparison: ReferenceComparison,
    reference: Reference,
    label: str,
    chance: AtChance | None = None,
) -> Table:
    """Table of what a circuit found of a reference, in edges and in nodes (heads and MLPs).

    Of a circuit split by positions it says whether they were compared per span, or joined.  Below
    each row stands what random circuits of the same size get.
    """
    title = f"{label} against the reference {reference.name} ({reference.model})"
    title += _COUNTED[comparison.positions]
    table = _overlaps_table(title, ("found", "extra", "missed"), chance)
    what = "node pairs" if reference.granularity == "node pairs" else "edges"
    if comparison.edges is not None:
        table.add_row(what, *_overlap_cells(comparison.edges))
        _add_chance(table, None if chance is None else chance.edges)
    table.add_row("nodes", *_overlap_cells(comparison.nodes))
    _add_chance(table, None if chance is None else chance.nodes)
    return table


def roles_table(
    comparison: ReferenceComparison, chosen: Sequence[str] = (), chance: AtChance | None = None
) -> Table:
    """Table of the nodes found and missed by role, of all roles or of those chosen.

    ``random``: how many a random circuit has on the mean, and which share of them has as many.
    """
    table = Table(title="by role", title_justify="left")
    columns = ["role", "found", "found nodes", "missed nodes"]
    if chance is not None:
        columns[2:2] = ["random", "as many"]
    for column in columns:
        table.add_column(column, no_wrap=column in ("role", "found", "random"))
    for role, count in comparison.roles.items():
        if not chosen or role in chosen:
            names = (", ".join(count.found) or "-", ", ".join(count.missed) or "-")
            cells = [escape(role), str(count), *names]
            if chance is not None:
                by_chance = chance.roles[role]
                cells[2:2] = [f"{by_chance.mean:.1f}", f"{by_chance.as_good:.0%}"]
            table.add_row(*cells)
    return table


def _overlap_cells(overlap: Overlap) -> list[str]:
    counts = (overlap.common, overlap.only_a, overlap.only_b)
    ratios = (overlap.precision, overlap.recall, overlap.f1, overlap.jaccard)
    return [str(len(c)) for c in counts] + [f"{r:.3f}" for r in ratios]
