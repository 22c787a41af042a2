"""What an evaluation shows: intervals, ablations, tests, what edges do on each prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from acdc.terminal.tables import number, run_table, with_interval

if TYPE_CHECKING:
    from acdc.evidence.assessment import Assessment
    from acdc.evidence.verdicts import Judgement
    from acdc.measure.per_prompt import PerPrompt

__all__ = [
    "ablations_table",
    "assessment_parts",
    "effects_table",
    "per_prompt_table",
    "verdicts_table",
]


def ablations_table(summary: dict[str, Any]) -> Table:
    """Table of the faithfulness under every ablation, and of CPR and CMD."""
    table = Table(title="faithfulness under every ablation", title_justify="left")
    for column in ("direction", "intervention", "metric: full, circuit, empty", "faithfulness"):
        table.add_column(column)
    for row in summary["ablations"]:
        values = (number(row[f"metric_{which}"]) for which in ("full", "circuit", "empty"))
        table.add_row(row["direction"], row["intervention"], ", ".join(values), with_interval(row))
    for intervention, why in summary.get("ablations_left_out", {}).items():
        table.add_row("", intervention, escape(why), "-")
    for area in summary["areas"]:
        said = f"{area['value']:.4g} (95 % interval {area['low']:.4g} to {area['high']:.4g})"
        choices = f"{area['ranking']} scores, {area['axis']} axis, {area['size']} sizes"
        table.add_row(area["measure"], "", choices, said)
    return table


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
