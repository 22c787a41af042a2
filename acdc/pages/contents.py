"""Everything that a report says of a run, gathered before any of it is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.errors import CircuitFileError, OptionError
from acdc.evidence.assessment import Assessment, assess, importance
from acdc.evidence.comparison import check_reference
from acdc.evidence.doses import FILE_NAME as DOSES
from acdc.evidence.doses import Doses, read_doses
from acdc.evidence.references import (
    REFERENCES,
    ModelMatch,
    ablation_warning,
    load_reference,
    match_model,
)
from acdc.evidence.stability import Stability
from acdc.evidence.verdicts import Trials
from acdc.measure.curves import Point, score_curve
from acdc.measure.evaluation import Evaluator
from acdc.methods import Score, meaning
from acdc.pages.circuit import CircuitView, view_circuit
from acdc.pages.evidence import (
    Evidence,
    Repeated,
    evidence_of,
    read_evidence,
    read_repeated,
    repeated_of,
)
from acdc.pages.heads import head_rows
from acdc.runs.folder import EVALUATION, Run
from acdc.runs.given import defaults_of
from acdc.runs.opened import Opened, RunLike, open_run
from acdc.runs.reopen import check_summary, reopen
from acdc.runs.reporter import Reporter, Silent
from acdc.runs.unseen import PromptChoice
from acdc.settings import Settings, check_count, command_line
from acdc.tasks.texts import Texts
from graphs import (
    Ablation,
    Circuit,
    Reference,
    ReferenceComparison,
    compare_reference,
    joined_shape,
)
from graphs.known.chance import AtChance, Chance, chance_of_ranking, chance_of_reference
from graphs.known.compare import common_form
from graphs.known.roc import Roc, average_precision, counts, items, roc_curve
from graphs.text import short

__all__ = ["Agreement", "Report", "gather"]

STABILITY = "stability.json"
"""File of a run's folder that a report takes without being told."""

_N_SIZES = 14
_CURVE_RESAMPLES = 500


@dataclass(frozen=True, eq=False)
class Agreement:
    """How a circuit agrees with a reference.

    Parameters
    ----------
    reference
        What counts as true.
    comparison
        Found, extra and missed edges and nodes.
    what
        What is ranked: ``edges``, ``node pairs`` or ``nodes``.
    n_items, n_true
        How many there are, and how many of them are true.
    roc, average_precision
        Of the ranking that the scores give; None where all items are true or none is.
    point
        False and true positive rate of the circuit itself.
    warning
        That the run was made under another ablation than the reference is true for.
    match
        Whether the run is of the reference's model, as far as can be said.
    chance
        What random circuits of the same size get.
    ranking_chance
        AUROC and average precision of shuffled scores; None where there is no ROC curve.
    """

    reference: Reference
    comparison: ReferenceComparison
    what: str
    n_items: int
    n_true: int
    roc: Roc | None
    average_precision: float | None
    point: tuple[float, float] | None
    warning: str | None
    match: ModelMatch
    chance: AtChance
    ranking_chance: Mapping[str, Chance] | None


@dataclass(frozen=True, eq=False)
class Report:
    """What a report says.

    Parameters
    ----------
    folder
        Of the run, or what else was given.
    settings, summary
        What was asked, and the whole ``run.json``.
    command
        What finds the circuit again.
    score
        What its scores mean.
    view
        The interactive circuit.
    evidence
        The evaluation; None where there is nothing to evaluate (a circuit without edges).
    frontier
        Circuits along the ranking of the scores, on the run's own prompts; empty where
        faithfulness is undefined.
    agreement
        With a reference, if there is one.
    repeated
        Discovery over seeds, if it was done.
    doses
        Dose-response curves, if they were measured.
    texts
        Of token ids.
    """

    folder: str | Path
    settings: Settings
    summary: dict[str, Any]
    command: str
    score: Score
    view: CircuitView
    evidence: Evidence | None
    frontier: tuple[Point, ...]
    agreement: Agreement | None
    repeated: Repeated | None
    doses: Doses | None
    texts: Texts

    def __repr__(self) -> str:
        return short(f"<Report of {self.folder}: {self.summary['n_edges_kept']:,} edges>")


def gather(
    run: RunLike,
    *,
    evaluation: str | Path | Assessment | None = None,
    stability: str | Path | Stability | None = None,
    doses: str | Path | Doses | None = None,
    reference: str | Path | Reference | None = None,
    other_model: bool = False,
    tests: bool = True,
    n_prompts: int = 3,
    trust_remote_code: bool = False,
    trials: Trials | None = None,
    memory: int = 1 << 30,
    reporter: Reporter | None = None,
    **again: Any,
) -> Report:
    """Gather what is known of a run, and measure what is not.

    Parameters
    ----------
    run
        Its folder, or a :class:`acdc.Run`.
    evaluation
        What ``acdc evaluate`` wrote, or :func:`acdc.evaluate` returned; None: ``evaluation.json``
        of the folder if it is there, else the circuit is evaluated now, on prompts that discovery
        has not seen.
    stability
        What ``acdc stability`` wrote, or :func:`acdc.stability` returned; None: ``stability.json``
        of the folder, if it is there.
    doses
        What ``acdc dose`` wrote, or :func:`acdc.dose` returned; None: ``dose.json`` of the folder,
        if it is there.
    reference
        Name, file or reference; None: the only one of the run's model, task and ablation, if there
        is one.
    other_model
        Compare with a reference of another model than the run's all the same; the page says so.
    tests
        Whether the tests of the circuit are shown (and run, if they were not).
    n_prompts
        Pairs of prompts to show attention patterns on.
    trust_remote_code
        Let the model's folder run its own code, whatever ``run.json`` says.
    trials
        Levels and sample sizes of tests that are run now.
    memory
        Bytes that passes and evaluations may take, beside the weights.
    reporter
        Told of progress.
    **again
        ``task``, ``model`` or ``metric``, where the run was given an object: the object again.

    Raises
    ------
    CircuitFileError
        If the folder holds no run, or a file cannot be read or is of another circuit.
    OptionError
        If a number makes no sense, or the run's model is not what it was.
    """
    check_count("prompts", n_prompts)
    if other_model and not reference:
        raise OptionError("other_model without a reference: give one, or leave it out")
    reporter = reporter or Silent()
    if not isinstance(run, Run) and not (isinstance(run, str | Path) and Path(run).is_dir()):
        raise CircuitFileError(f"{run}: no such folder; give the folder of a run")
    opened = open_run(run)
    folder, circuit, summary = opened.name, opened.circuit, opened.summary
    check_summary(folder, summary, circuit)
    settings = opened.settings(trust_remote_code=trust_remote_code, **again)
    beside = None if isinstance(run, Run) else Path(run)
    evidence = _given_evidence(beside, evaluation, circuit, tests)
    repeated = _given_repeated(beside, stability, settings, circuit)
    responses = _given_doses(beside, doses, circuit)
    known = load_reference(reference) if reference else _own_reference(settings, opened)
    match = None  # of another graph or model: said before anything is measured
    if known is not None:
        match = check_reference(opened, known, other_model=other_model)
    with reporter.phase("load model and task", None):
        experiment, tokenizer = reopen(opened, settings, memory)
    if evidence is None and circuit.n_edges:
        unseen = PromptChoice(settings)(settings, experiment.model, tokenizer)
        evidence = evidence_of(
            assess(
                circuit,
                experiment.on(unseen),
                settings,
                tests=tests,
                trials=trials,
                memory=memory,
                reporter=reporter,
            )
        )
    texts = Texts(tokenizer, experiment.task.pairs[0].clean[-1])
    with reporter.phase("look at the circuit", None):
        view = view_circuit(
            circuit,
            experiment,
            texts,
            n_prompts=n_prompts,
            n_kept=None if repeated is None else repeated.n_kept,
            why=head_rows(circuit, experiment),
        )
    return Report(
        folder,
        settings,
        summary,
        command_line(settings, defaults_of(settings)),
        meaning(circuit),
        view,
        evidence,
        _frontier(experiment, circuit, summary, reporter),
        None if known is None or match is None else _agreement(circuit, known, settings, match),
        repeated,
        responses,
        texts,
    )


# --- what others wrote --------------------------------------------------------------------


def _given_evidence(
    folder: Path | None, given: str | Path | Assessment | None, circuit: Circuit, tests: bool
) -> Evidence | None:
    """The evaluation that is there already, if one is."""
    if given is not None and not tests:
        raise OptionError("--evaluation with --no-tests: leave one of them out")
    if isinstance(given, Assessment):
        if given.circuit.digest != circuit.digest:
            raise OptionError(
                f"the evaluation is of a circuit of {given.circuit.n_edges:,} edges, not of the "
                f"run's of {circuit.n_edges:,}: give an evaluation of this run"
            )
        return evidence_of(given)
    path = _there(folder, given, EVALUATION)
    if path is None:
        return None
    found = read_evidence(path, circuit)
    return found if tests else replace(found, tests=None)


def _given_repeated(
    folder: Path | None, given: str | Path | Stability | None, settings: Settings, circuit: Circuit
) -> Repeated | None:
    """The repetitions that are there already, if they are."""
    if isinstance(given, Stability):
        return repeated_of(given, settings, circuit)
    path = _there(folder, given, STABILITY)
    return None if path is None else read_repeated(path, settings, circuit)


def _given_doses(
    folder: Path | None, given: str | Path | Doses | None, circuit: Circuit
) -> Doses | None:
    """The dose-response curves that are there already, if they are."""
    if isinstance(given, Doses):
        if given.circuit_digest != circuit.digest:
            raise OptionError("the doses are of another circuit: give those of this run")
        return given
    path = _there(folder, given, DOSES)
    return None if path is None else read_doses(path, circuit)


def _there(folder: Path | None, given: str | Path | None, name: str) -> Path | None:
    """The file that was given, or the one of the run's folder if it is there."""
    if given is not None:
        return Path(given)
    beside = None if folder is None else folder / name
    return beside if beside is not None and beside.exists() else None


def _own_reference(settings: Settings, opened: Opened) -> Reference | None:
    """The reference of the run's model, task and ablation, if there is exactly one.

    Of a task file it is the one in the file's folder.
    """
    ablation = Ablation(settings.intervention, settings.direction)
    task, model = Path(settings.task).resolve(), Path(str(settings.model)).name
    found = []
    for name, path in REFERENCES.items():
        known = load_reference(name)
        of_task = known.task == settings.task or path.resolve().parent == task.parent
        of_model = known.model in (settings.model, model) and _same_model(opened.circuit, known)
        of_model = of_model and match_model(known, opened.identity).same is not False
        if of_task and of_model and ablation_warning(known, ablation) is None:
            found.append(known)
    return found[0] if len(found) == 1 else None


def _same_model(circuit: Circuit, reference: Reference) -> bool:
    """Whether a circuit's graph is that of a reference, but for what is kept apart in it."""
    ours, theirs = (
        joined_shape(graph.shape, qkv=True, embed=True, spans=True)
        for graph in (circuit.graph, reference.graph)
    )
    return ours == theirs


# --- what is measured ---------------------------------------------------------------------


def _frontier(
    experiment: Experiment, circuit: Circuit, summary: dict[str, Any], reporter: Reporter
) -> tuple[Point, ...]:
    """Faithfulness of circuits of growing size along the ranking of the scores."""
    evaluator = Evaluator(experiment)
    if not evaluator.has_gap or not circuit.scores.any():
        return ()
    n = circuit.graph.n_edges
    sizes = {*np.rint(np.geomspace(1, n, _N_SIZES)).astype(int).tolist(), circuit.n_edges} - {0}
    scores = experiment.minimised_sign * importance(experiment, circuit)
    ranking = str(summary.get("ranking") or "signed")
    with reporter.phase("frontier", len(sizes)):
        curve = score_curve(
            evaluator,
            scores,
            ranking,
            fractions=[min(1.0, (size + 0.5) / n) for size in sorted(sizes)],
            n_resamples=_CURVE_RESAMPLES,
            progress=reporter.advance,
        )
    return curve.points()


def _agreement(
    circuit: Circuit, reference: Reference, settings: Settings, match: ModelMatch
) -> Agreement:
    """Compare with a reference, over whatever both keep apart."""
    found, true = common_form(circuit, reference)
    what = reference.granularity
    scored = items(found.graph, what, reference.optional_nodes)
    if what == "nodes":
        truth = scored.named(name for name in reference.nodes if name in scored.names)
    else:
        truth = scored.mask(true.in_circuit)
    inside = scored.mask(found.in_circuit)
    usable = bool(truth.any() and not truth.all())
    absolute = meaning(found) is not Score.COST
    ranked = _ranked(scored.scores(found.scores, absolute=absolute))
    shuffled = None
    if usable:
        shuffled = chance_of_ranking(scored, truth, found.scores, absolute=absolute)
    agreement = counts(truth, inside) if usable else None
    return Agreement(
        reference,
        compare_reference(circuit, reference),
        what,
        len(scored),
        int(truth.sum()),
        roc_curve(truth, ranked) if usable else None,
        average_precision(truth, ranked) if usable else None,
        None if agreement is None else (agreement.fpr, agreement.tpr),
        ablation_warning(reference, Ablation(settings.intervention, settings.direction)),
        match,
        chance_of_reference(circuit, reference),
        shuffled,
    )


def _ranked(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Finite scores: an item without an edge is below all others."""
    least = scores[np.isfinite(scores)].min(initial=0.0)
    return np.where(np.isfinite(scores), scores, least - 1)
