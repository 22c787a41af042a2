"""Commands that say how far to believe a circuit: ``evaluate``, ``self-repair``, ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from acdc.cli import options as opt
from acdc.cli.answers import answer
from acdc.cli.asked import takes
from acdc.cli.inputs import check_file, check_page, to_bytes

if TYPE_CHECKING:
    from acdc.runs.opened import Opened
    from acdc.settings import Settings

__all__ = ["evaluate", "report", "self_repair"]


@takes("model", "method", "prompts", "computing", "ablation", "nodes",
       leave=("method", "holdout", "split_qkv", "split_embed", "positions",
              "neurons", "neuron_inputs", "max_latents"), of_run=True)  # fmt: skip
def evaluate(
    circuit: opt.CircuitPath,
    task: opt.RunTask = None,
    optimal: Annotated[
        bool,
        typer.Option("--optimal", help="Train optimal constants and measure under them too."),
    ] = False,
    memory: opt.Memory = 1.0,
    brief: Annotated[
        bool,
        typer.Option(
            "--brief", help="Metric and faithfulness alone, on discovery's prompts (or --seed's)."
        ),
    ] = False,
    seen: Annotated[
        bool,
        typer.Option("--seen/--unseen", help="Evaluate on the prompts that discovery saw."),
    ] = False,
    tests: opt.Tests = True,
    by_prompt: Annotated[
        bool,
        typer.Option("--per-prompt", help="What each edge does on every prompt alone, too."),
    ] = False,
    alpha: Annotated[float, typer.Option("--alpha", help="Level of the tests.")] = 0.05,
    epsilon: Annotated[
        float, typer.Option("--epsilon", help="Equivalence: how far from even odds may be.")
    ] = 0.1,
    quantile: Annotated[
        float, typer.Option("--quantile", help="Share of random circuits or edges to surpass.")
    ] = 0.9,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Completeness: share of the gap to be apart.")
    ] = 0.1,
    n_random: Annotated[
        int, typer.Option("--n-random", help="Random circuits, and random added edges.")
    ] = 100,
    n_permutations: Annotated[
        int, typer.Option("--n-permutations", help="Of the test of independence.")
    ] = 1000,
    n_knockouts: Annotated[
        int, typer.Option("--n-knockouts", help="Random knock-outs of nodes.")
    ] = 20,
    n_resamples: opt.NResamples = 1000,
    test_edges: Annotated[
        int | None,
        typer.Option("--test-edges", help="Edges that minimality tests, drawn (default: all)."),
    ] = None,
    test_seed: Annotated[
        int, typer.Option("--test-seed", help="Seed of all that the tests draw.")
    ] = 0,
    as_json: opt.Json = False,
    out: opt.JsonFile = None,
    overwrite: opt.Replace = False,
    **asked: Any,
) -> None:
    """Measure and test a circuit, on prompts that discovery has not seen.

    Faithfulness with its interval under every ablation, CPR and CMD, and tests that a wrong
    circuit fails: equivalence, independence, minimality, sufficiency, necessity, completeness.
    Options that are not given are the run's own.  Where none changes what is measured, a run's
    folder keeps the result as evaluation.json, which acdc report takes.

    Example: acdc evaluate runs/ioi --metric logit_diff --out verdicts.json

    Example: acdc evaluate runs/ioi --brief --seed 1
    """
    from acdc.errors import OptionError
    from acdc.evidence.assessment import evaluate as assess
    from acdc.evidence.verdicts import Trials
    from acdc.runs.folder import EVALUATION
    from acdc.runs.opened import open_run
    from acdc.terminal.console import TerminalReporter
    from acdc.terminal.evidence import assessment_parts
    from acdc.terminal.tables import run_table

    trials = Trials(
        alpha=alpha, epsilon=epsilon, quantile=quantile, tolerance=tolerance, n_random=n_random,
        n_permutations=n_permutations, n_knockouts=n_knockouts, n_edges=test_edges, seed=test_seed,
    )  # fmt: skip
    n_bytes = to_bytes(memory)
    title = f"evaluation of {circuit}"
    if out is not None:
        check_file(out, overwrite)
    keeps = out is None and tests and circuit.is_dir() and not (seen or task or asked)
    if brief:
        others = {
            "--out": out is not None, "--seen": seen, "--per-prompt": by_prompt,
            "--optimal": optimal, "--no-tests": not tests,
        }  # fmt: skip
        for name, asked_for in others.items():
            if asked_for:
                raise OptionError(f"--brief with {name}: leave one of them out")
        summary = _brief(open_run(circuit), task=task, **asked)
        answer(
            lambda: summary,
            lambda: (run_table(summary, title),),
            summary["warnings"],
            as_json=as_json,
        )
        return
    assessment = assess(
        circuit, task=task, seen=seen, trials=trials, tests=tests, n_resamples=n_resamples,
        optimal=optimal, by_prompt=by_prompt, memory=n_bytes, reporter=TerminalReporter(), **asked,
    )  # fmt: skip
    answer(
        assessment.summary,
        lambda: assessment_parts(assessment, title),
        assessment.warnings,
        as_json=as_json,
        out=circuit / EVALUATION if keeps else out,
    )


def _brief(run: Opened, **asked: Any) -> dict[str, Any]:
    """What ``run_table`` shows of a circuit measured again."""
    from dataclasses import asdict, replace

    from acdc.evidence.assessment import check_training
    from acdc.measure.ability import ability
    from acdc.runs.discover import measure

    circuit, settings = run.circuit, run.settings(**asked)
    check_training(settings, asked)
    evaluation, experiment = measure(circuit, settings, run.constants(settings))
    doubts = ability(experiment).doubts
    return {
        **settings.plain(),
        **asdict(replace(evaluation, faithfulness=None) if doubts else evaluation),
        "warnings": doubts,
        "method": circuit.info.get("method", settings.method),
        "n_prompts": len(experiment.task),
        "prompts": "those of discovery" if _of_discovery(run, settings) else "as asked for",
        "n_edges_kept": circuit.n_edges,
        "n_edges_total": circuit.graph.n_edges,
    }


def _of_discovery(run: Opened, settings: Settings) -> bool:
    """Whether prompts of some settings are those that the run's circuit was found on."""
    from acdc.runs.given import same_task

    own, which = run.discovery, ("seed", "n_prompts", "n_select", "corruption", "prepend_bos")
    return (
        own is not None
        and same_task(own, settings)
        and all(getattr(own, name) == getattr(settings, name) for name in which)
    )


@takes("model", "method", "prompts", "computing", "ablation",
       leave=("method", "holdout", "seed", "corruption", "prepend_bos",
              "dtype", "mean_over", "optimal_steps"), of_run=True)  # fmt: skip
def self_repair(
    circuit: opt.CircuitPath,
    role: Annotated[
        list[str] | None,
        typer.Option(
            "--role",
            help="A role's heads (latents, neurons), as mover=a4.h1,m5.f3, or a role of "
            "--reference (repeatable; default: the circuit's with an edge into logits).",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="Take roles of this reference (acdc list references)."),
    ] = None,
    other_model: opt.OtherModel = False,
    task: opt.RunTask = None,
    seen: Annotated[
        bool,
        typer.Option("--seen/--unseen", help="Measure on the prompts that discovery saw."),
    ] = True,
    min_share: Annotated[
        float,
        typer.Option("--min-share", help="Of what was taken, what a backup gives back at least."),
    ] = 0.1,
    n_resamples: opt.NResamples = 1000,
    memory: opt.Memory = 1.0,
    as_json: opt.Json = False,
    out: opt.JsonFile = None,
    overwrite: opt.Replace = False,
    **asked: Any,
) -> None:
    """Find backup heads: each head's direct effect before and after others are ablated.

    For a head of a role the others of the role are ablated, for every other head the whole role.
    In a circuit with latents or neurons these are measured like heads.

    Example: acdc self-repair runs/ioi --role mover=a4.h1,a5.h0 --out repair.json
    """
    from acdc.evidence.references import load_reference
    from acdc.evidence.self_repair import parse_roles
    from acdc.evidence.self_repair import self_repair as measure
    from acdc.terminal.backups import self_repair_tables
    from acdc.terminal.console import TerminalReporter

    known = None if reference is None else load_reference(reference)
    roles = parse_roles(role, known) if role else known
    n_bytes = to_bytes(memory)
    if out is not None:
        check_file(out, overwrite)
    repair = measure(
        circuit, roles, task=task, of=known, other_model=other_model, seen=seen,
        min_share=min_share, n_resamples=n_resamples, memory=n_bytes,
        reporter=TerminalReporter(), **asked,
    )  # fmt: skip
    answer(
        repair.summary,
        lambda: self_repair_tables(repair, f"self-repair in {circuit}"),
        as_json=as_json,
        out=out,
    )


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Page to write (default: RUN/report.html).")
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--evaluation",
            help="What acdc evaluate wrote (default: RUN/evaluation.json, or done now).",
        ),
    ] = None,
    stability: Annotated[
        Path | None,
        typer.Option(
            "--stability", help="What acdc stability wrote (default: RUN/stability.json)."
        ),
    ] = None,
    doses: Annotated[
        Path | None,
        typer.Option("--doses", help="What acdc dose wrote (default: RUN/dose.json)."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", help="Reference circuit: name or file (default: the model's own)."
        ),
    ] = None,
    other_model: opt.OtherModel = False,
    tests: opt.Tests = True,
    prompts: Annotated[
        int, typer.Option("--prompts", help="Prompt pairs to show attention patterns on.")
    ] = 3,
    memory: opt.Memory = 1.0,
    trust_remote_code: opt.Trust = False,
    overwrite: opt.Replace = False,
) -> None:
    """Write a run as one HTML page that needs no network: circuit, tests, curves, timings.

    Example: acdc report runs/ioi

    Example: acdc report runs/ioi --stability runs/stable/stability.json --out ioi.html
    """
    from acdc.errors import CircuitFileError
    from acdc.pages.report import report as write
    from acdc.terminal.console import TerminalReporter, say

    n_bytes, page = to_bytes(memory), out or run / "report.html"
    if not run.is_dir():
        raise CircuitFileError(f"{run}: no such folder; give the folder of a run")
    check_page(page, overwrite)
    found = write(
        run, evaluation=evaluation, stability=stability, doses=doses, reference=reference,
        other_model=other_model, tests=tests, n_prompts=prompts,
        trust_remote_code=trust_remote_code, memory=n_bytes, reporter=TerminalReporter(),
    )  # fmt: skip
    found.save(page, overwrite=True)
    say(f"written to {page}")
