"""All that is said of a circuit by ``acdc evaluate``: how faithful it is, to what, how surely."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from acdc.ablations import ABLATIONS
from acdc.dictionaries.quality import qualities_on_task
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import METRICS
from acdc.errors import OptionError
from acdc.evidence.verdicts import Judgement, Trials, judge, n_evaluations
from acdc.measure.ability import ability
from acdc.measure.curves import Area, score_curve
from acdc.measure.evaluation import Evaluation, Evaluator
from acdc.measure.per_prompt import PerPrompt, per_prompt
from acdc.methods import Score, meaning
from acdc.runs.building import with_constants, with_means
from acdc.runs.discover import fit
from acdc.runs.folder import EVALUATION, Timer, save_summary, versions
from acdc.runs.opened import RunLike, open_run
from acdc.runs.reporter import Reporter, Silent
from acdc.runs.unseen import PromptChoice
from acdc.settings import MOST_RESAMPLES, Direction, Settings, check_count
from acdc.terminal.shown import Shown
from graphs import Circuit, prune
from graphs.text import said

__all__ = ["Assessment", "Measured", "assess", "check_training", "evaluate", "importance"]

_AREAS = (("CPR", "signed"), ("CMD", "absolute"))
"""MIB's two areas, each with its ranking."""

_N_SIZES = 10


@dataclass(frozen=True)
class Measured:
    """A circuit under one ablation.

    Parameters
    ----------
    intervention, direction
        The ablation.
    evaluation
        Metric and faithfulness.
    low, high
        95 % bootstrap interval of the faithfulness over the prompts; None where it is undefined.
    """

    intervention: str
    direction: str
    evaluation: Evaluation
    low: float | None
    high: float | None

    def without_claim(self) -> Measured:
        """Return the metric alone: there is nothing to be faithful to."""
        evaluation = replace(self.evaluation, faithfulness=None)
        return replace(self, evaluation=evaluation, low=None, high=None)

    def row(self) -> dict[str, Any]:
        """Plain values for a table."""
        return {
            "intervention": self.intervention,
            "direction": self.direction,
            **asdict(self.evaluation),
            "faithfulness_low": self.low,
            "faithfulness_high": self.high,
        }


@dataclass(frozen=True, eq=False)
class Assessment(Shown):
    """What was found of a circuit.

    Parameters
    ----------
    settings
        What it was measured on.
    circuit
        As it was measured.
    task_info
        Where the prompts came from, see :class:`acdc.runs.unseen.PromptChoice`.
    n_prompts
        Prompt pairs.
    measured
        Under every ablation, that of the settings first.
    areas
        CPR and CMD of the circuit's scores; empty where the scores are all alike, the metric has
        no gap or the model does not do the task.
    judgement
        The tests; None if they were not asked for.
    timings
        Seconds by phase.
    left_out
        Interventions that were not measured in every direction, and why.
    per_prompt
        What each edge does on every prompt; None if it was not asked for.
    warnings
        What one should know before believing it, a sentence each: that the model does not do the
        task (:mod:`acdc.measure.ability`; then faithfulness is None under every ablation), or that
        a dictionary is a bad one.
    """

    settings: Settings
    circuit: Circuit
    task_info: dict[str, Any]
    n_prompts: int
    measured: tuple[Measured, ...]
    areas: tuple[Area, ...]
    judgement: Judgement | None
    timings: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    per_prompt: PerPrompt | None = None

    def summary(self) -> dict[str, Any]:
        """Plain values: the keys of ``run.json``, and those of this class."""
        own = self.measured[0]
        return {
            **self.settings.plain(),
            "method": self.circuit.info.get("method", self.settings.method),
            "n_edges_total": self.circuit.graph.n_edges,
            "n_edges_kept": self.circuit.n_edges,
            "circuit_digest": self.circuit.digest,
            "n_prompts": self.n_prompts,
            "seed": self.task_info.get("seed", self.settings.seed),
            "prompts": self.task_info["prompts"],
            "seen": self.task_info["seen"],
            **own.row(),
            "ablations": [measured.row() for measured in self.measured],
            "ablations_left_out": self.left_out,
            "areas": [asdict(area) for area in self.areas],
            "tests": None if self.judgement is None else self.judgement.as_dict(),
            "warnings": list(self.warnings),
            "per_prompt": None if self.per_prompt is None else self.per_prompt.as_dict(),
            "task_info": self.task_info,
            "timings": self.timings,
            "versions": versions(),
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write :meth:`summary` as ``evaluation.json`` into a folder, or as a ``.json`` file.

        In the folder of the run :func:`acdc.report` finds it.  Raises OutputError if the file
        exists, unless ``overwrite``, or cannot be written.
        """
        return save_summary(path, EVALUATION, self.summary(), overwrite=overwrite)

    def __repr__(self) -> str:
        own = self.measured[0].evaluation
        tests = "no tests" if self.judgement is None else repr(self.judgement)
        return (
            f"<Assessment of {self.circuit.n_edges:,} edges on {self.n_prompts} prompts: "
            f"faithfulness {said(own.faithfulness)}, {tests}>"
        )


def evaluate(
    run: RunLike,
    *,
    task: Any = None,
    seen: bool = False,
    trials: Trials | None = None,
    tests: bool = True,
    n_resamples: int = 1000,
    optimal: bool = False,
    by_prompt: bool = False,
    memory: int = 1 << 30,
    reporter: Reporter | None = None,
    **asked: Any,
) -> Assessment:
    """Measure and test a circuit, on prompts that discovery has not seen where there are any.

    Parameters
    ----------
    run
        Folder of a run, a circuit file, :class:`acdc.Run` or :class:`graphs.Circuit`.
    task
        As of :func:`acdc.discover`; None: the run's.  A circuit that comes alone needs one.
    seen
        Take the prompts of discovery instead.
    trials
        Levels and sample sizes of the tests.
    tests
        Whether to run them: some hundred evaluations.
    n_resamples
        Of the bootstrap over prompts, at least 1.
    optimal
        Train optimal constants for both directions and measure under them too: as many passes
        as there are senders, per step.
    by_prompt
        Measure what each edge does on every prompt alone, too: one evaluation an edge.
    memory
        Bytes for the passes of that training.
    reporter
        Told of progress.
    **asked
        Fields of :class:`acdc.settings.Settings` that are to be other than the run's, names or
        objects as in :func:`acdc.discover`.  Constants that the run's ablated edges carried are
        used where they are the same under these.

    Raises
    ------
    CircuitFileError
        If a file is missing or malformed.
    OptionError
        If the circuit's graph is not the model's, a value makes no sense, or the run was given an
        object that ``run.json`` cannot hold and that is not given again.
    TaskError
        If no prompts are left that discovery has not seen.

    Examples
    --------
    >>> import acdc
    >>> found = acdc.evaluate("runs/my-ioi")  # doctest: +SKIP
    >>> found.judgement["minimality"].says  # doctest: +SKIP
    """
    check_count("n_resamples", n_resamples, at_most=MOST_RESAMPLES)
    reporter, timer, opened = reporter or Silent(), Timer(), open_run(run)
    settings = opened.settings(task=task, **asked)
    discovery, seed = opened.discovery_with(settings), asked.get("seed")
    if discovery is not None and seed == discovery.seed and task is None and not seen:
        raise OptionError(
            f"seed {seed} is that of discovery: choose another, or say --seen to evaluate on "
            "the prompts that it saw"
        )
    check_training(settings, asked, optimal=optimal)
    prompts, constants = PromptChoice(discovery, seen), opened.constants(settings)
    with timer.phase("load"), reporter.phase("load model and task", None):
        circuit, experiment = fit(opened.circuit, settings, prompts, constants, memory)
        experiment = with_means(experiment)
    return assess(
        circuit, experiment, settings, trials=trials, tests=tests, n_resamples=n_resamples,
        optimal=optimal, by_prompt=by_prompt, memory=memory, reporter=reporter, timer=timer,
    )  # fmt: skip


def check_training(settings: Settings, asked: Mapping[str, Any], *, optimal: bool = False) -> None:
    """Raise OptionError if training steps were asked for where nothing is trained."""
    steps = asked.get("optimal_steps")
    if steps is not None and not (optimal or ABLATIONS[settings.intervention].trained):
        raise OptionError(
            f"optimal_steps {steps} does nothing without --optimal or intervention optimal: leave "
            "it out"
        )


def assess(
    circuit: Circuit,
    experiment: Experiment,
    settings: Settings,
    *,
    trials: Trials | None = None,
    tests: bool = True,
    n_resamples: int = 1000,
    optimal: bool = False,
    by_prompt: bool = False,
    memory: int = 1 << 30,
    reporter: Reporter | None = None,
    timer: Timer | None = None,
) -> Assessment:
    """As :func:`evaluate`, of a model that is loaded and prompts that are chosen.

    Parameters
    ----------
    circuit, settings, trials, tests, n_resamples, optimal, by_prompt, memory, reporter
        As of :func:`evaluate`.
    experiment
        What the settings ask for, on prompts that a :class:`acdc.runs.unseen.PromptChoice` gave.
    timer
        Of what was done before; None: nothing.
    """
    check_count("n_resamples", n_resamples, at_most=MOST_RESAMPLES)
    reporter, trials, timer = reporter or Silent(), trials or Trials(), timer or Timer()
    with timer.phase("constants"):
        experiment = with_constants(experiment.within(memory), memory, reporter)
        left_out = _left_out(experiment, optimal)
        others = [
            with_constants(other, memory, reporter)
            for other in _other_ablations(experiment, left_out)
        ]
    evaluator, doubts = Evaluator(experiment), ability(experiment).doubts
    judgement = None
    if tests:
        total = n_evaluations(circuit.in_circuit, trials)
        with timer.phase("tests"), reporter.phase("tests", total):
            judgement = judge(evaluator, circuit.in_circuit, trials, reporter.advance)
    with timer.phase("ablations"), reporter.phase("ablations", None):
        measured = [_measure(evaluator, circuit, n_resamples, trials.seed)]
        for other in others:
            measured.append(_measure(Evaluator(other), circuit, n_resamples, trials.seed))
    areas: tuple[Area, ...] = ()
    if doubts:
        measured = [one.without_claim() for one in measured]
    else:
        with timer.phase("curves"), reporter.phase("CPR and CMD", _N_SIZES * len(_AREAS)):
            areas = _areas(evaluator, circuit, n_resamples, trials.seed, reporter)
    effects = None
    if by_prompt:
        total = int(prune(circuit.graph, circuit.in_circuit).sum())
        with timer.phase("per prompt"), reporter.phase("effects per prompt", total):
            effects = per_prompt(evaluator, circuit.in_circuit, reporter.advance)
    task = experiment.task
    return Assessment(
        settings,
        circuit,
        task.info,
        len(task),
        tuple(measured),
        areas,
        judgement,
        timer.seconds,
        left_out,
        (*doubts, *(doubt for one in qualities_on_task(experiment) for doubt in one.doubts)),
        effects,
    )


def _left_out(experiment: Experiment, optimal: bool) -> dict[str, str]:
    """Interventions that are not measured, unless they are the experiment's own, and why."""
    why: dict[str, str] = {}
    if not optimal:
        trained = (name for name, one in ABLATIONS.items() if one.trained)
        why |= dict.fromkeys(trained, "needs training, say --optimal")
    if experiment.mean_over is not None:
        needed = {batch.clean.shape[1] for batch in experiment.batches}
        missing = needed - {len(prompt) for prompt in experiment.mean_over}
        if missing:
            means = (name for name, one in ABLATIONS.items() if one.positional)
            why |= dict.fromkeys(means, f"no means for prompts of {min(missing)} tokens")
    return why


def _other_ablations(experiment: Experiment, left_out: Container[str]) -> list[Experiment]:
    """The same experiment under every other intervention and direction."""
    own = (experiment.intervention, experiment.direction)
    return [
        replace(experiment, intervention=intervention, direction=direction)
        for direction in get_args(Direction)
        for intervention in ABLATIONS
        if (intervention, direction) != own and intervention not in left_out
    ]


def _measure(evaluator: Evaluator, circuit: Circuit, n_resamples: int, seed: int) -> Measured:
    experiment = evaluator.experiment
    evaluation = evaluator.evaluate(circuit.in_circuit)
    ends = evaluator.faithfulness_interval(circuit.in_circuit, n_resamples, seed)
    low, high = ends or (None, None)
    return Measured(experiment.intervention, experiment.direction, evaluation, low, high)


def _areas(
    evaluator: Evaluator, circuit: Circuit, n_resamples: int, seed: int, reporter: Reporter
) -> tuple[Area, ...]:
    """MIB's CPR and CMD of the ranking that the circuit's scores give."""
    if not evaluator.has_gap or len(np.unique(np.abs(circuit.scores))) < 3:
        return ()
    scores = evaluator.experiment.minimised_sign * importance(evaluator.experiment, circuit)
    return tuple(
        score_curve(
            evaluator,
            scores,
            ranking,
            n_resamples=n_resamples,
            seed=seed,
            progress=reporter.advance,
        ).area(measure)
        for measure, ranking in _AREAS
    )


def importance(experiment: Experiment, circuit: Circuit) -> np.ndarray:
    """``[edge]`` scores, positive where the edge helps.

    Those of some methods are so; the others' are changes of the metric that they were computed
    for, in its own direction (as are those of methods that are not ours).
    """
    info = circuit.info
    if meaning(circuit) is not Score.CHANGE:
        return circuit.scores
    metric = METRICS.get(str(info.get("metric")), experiment.metric)
    direction = info.get("direction", experiment.direction)
    return metric.sign * (1 if direction == "noising" else -1) * circuit.scores
