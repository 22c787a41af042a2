"""From a task and a model to a circuit, in one call."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from acdc.dictionaries.attach import Attached
from acdc.dictionaries.quality import qualities_on_task
from acdc.engine.checkpoint import Checkpoint
from acdc.engine.constants import Constants
from acdc.engine.experiment import Experiment
from acdc.engine.footprint import Footprint
from acdc.engine.processes import by_chunk, here
from acdc.engine.work import Work
from acdc.errors import AbilityError, OptionError
from acdc.measure.ability import Ability, ability
from acdc.measure.evaluation import Evaluation, Evaluator
from acdc.methods import Score
from acdc.models.identity import exact_digest, identity_of
from acdc.models.lowering import LoweredModel
from acdc.models.sizes import Sizes
from acdc.runs.attached import (
    attached_nodes,
    latent_details,
    mixture_details,
    norms_details,
    reattach,
)
from acdc.runs.building import (
    Prompts,
    build_experiment,
    load_experiment,
    places,
    with_constants,
    with_means,
)
from acdc.runs.checks import check_discovery, check_settings
from acdc.runs.claim import Claims
from acdc.runs.folder import Run, Timer, versions
from acdc.runs.forecast import Forecast, batch_size_of, check_room, foresee
from acdc.runs.given import method_of, metric_of, settings_of, spec_of
from acdc.runs.prompts import DEFAULT_N_OTHERS, load_prompts, split_prompts
from acdc.runs.pt import group_heads
from acdc.runs.reporter import Reporter, Silent
from acdc.settings import Settings
from acdc.tasks import Task, Tokenizer
from acdc.tasks.positions import Positions
from graphs import Circuit
from graphs.sites import Site

__all__ = [
    "Passes",
    "Prepared",
    "circuit_info",
    "counted_passes",
    "discover",
    "fit",
    "measure",
    "model_info",
    "prepare",
    "said_of_arithmetic",
]


def discover(
    task: Any,
    *,
    reporter: Reporter | None = None,
    memory: int = 1 << 30,
    checkpoint: str | Path | None = None,
    sites: Mapping[str, Site] | None = None,
    strict: bool = False,
    **asked: Any,
) -> Run:
    """Find the circuit of a task in a model.

    Parameters
    ----------
    task
        Built-in task (``acdc list tasks``), a file of prompt pairs, a :class:`acdc.tasks.Task`,
        or a list of rows as of a ``.jsonl`` file.
    reporter
        Told of progress.
    memory
        Bytes that the method's largest working set may take.
    checkpoint
        Folder of the run, if what ``acdc`` has decided is to be kept there while it works: a
        killed search then goes on where it was.  :meth:`Run.save` to it removes that again.
        Several processes keep none.
    sites
        With latents or neurons: which are nodes, as ``run.circuit.graph.shape.site_at`` of an
        earlier run has them, so that the two have one graph; None: chosen on these prompts.
    strict
        Search only where there is something to find (:mod:`acdc.measure.ability`); otherwise the
        circuit comes with warnings, and without a faithfulness.
    **asked
        Fields of :class:`acdc.settings.Settings` (``model``, ``method``, ``metric``,
        ``threshold``, ``n_edges``, ``n_prompts``, ``seed``, ...) and options of the method
        (``steps`` of eap-ig, ``guess`` of acdc, ...).  ``model`` is a name, a folder, or whatever
        else :func:`acdc.models.load_model` takes, ``metric`` and ``method`` a name, a
        :class:`acdc.engine.metrics.Metric` or a :class:`acdc.methods.Method`; ``run.json`` names
        objects and cannot hold them, so that they are given again to whatever takes up the run.

    Returns
    -------
    Run
        With ``circuit``, ``faithfulness`` (on prompts that the search has not seen) and
        ``save(folder)``.

    Raises
    ------
    AbilityError
        If ``strict`` and the model does not do the task.

    Examples
    --------
    >>> import acdc
    >>> run = acdc.discover("ioi", method="eap-ig", n_edges=60)  # doctest: +SKIP
    >>> run.save("runs/my-ioi")  # doctest: +SKIP
    """
    reporter = reporter or Silent()
    settings = check_discovery(settings_of(task, **asked))
    method, timer = method_of(settings), Timer()
    work = Work(memory, reporter.advance, reporter.note)
    with timer.phase("load"), reporter.phase("load model and task", None):
        able, experiment, attached, tokenizer, forecast = prepare(settings, memory, sites, strict)
    if checkpoint is not None and here().size == 1:
        identity = {**settings.plain(), **_fingerprint(experiment), "versions": versions()}
        identity["batch_size"] = experiment.batch_size  # fewer than asked for, if more do not fit
        del identity["offload"]  # which changes nothing
        work = replace(work, checkpoint=Checkpoint(checkpoint, identity))
    if experiment.ablation.trained:
        with timer.phase("constants"):
            experiment = with_constants(experiment, memory, reporter, work.checkpoint)
    split = split_prompts(settings, experiment, tokenizer)
    experiment = replace(experiment, select_on=split.select)
    total = method.passes(experiment, method.configured(settings))
    reporter.say(f"takes {forecast}")
    with (
        timer.phase("discover"),
        reporter.phase(f"discover ({method.name})", total),
        counted_passes(experiment) as passes,
    ):
        found = method.search(experiment, settings, work)
    with timer.phase("evaluate"), reporter.phase("evaluate", None):
        evaluator = Evaluator(experiment)
        evaluation = evaluator.evaluate(found.circuit.in_circuit)
        qualities = qualities_on_task(experiment)
        doubts = [doubt for quality in qualities for doubt in quality.doubts]
        doubts += said_of_arithmetic(experiment.model)
        claim = Claims(experiment, split, able).of(found.circuit, evaluation).but(*doubts)
        details = {
            "n_prompts": len(experiment.task),
            "n_select": split.n_select,
            "task_info": experiment.task.info,
            "model_info": model_info(experiment, settings),
            "forwards": passes.of_all,
            "forecast": forecast.plain(),
            **found.details,
            **latent_details(attached, evaluator, found.circuit, qualities),
            **mixture_details(experiment, attached),
            **norms_details(experiment, found.circuit, evaluation),
            **({} if experiment.carried is None else {"constants": experiment.carried.report}),
        }
    info = circuit_info(experiment, settings, claim.faithfulness)
    circuit = replace(found.circuit, info=info)
    return Run(settings, circuit, claim, timer.seconds, details, experiment.carried)


class Prepared(NamedTuple):
    """What a search starts from.

    Attributes
    ----------
    able
        What the model does.
    experiment
        With dictionaries and means.
    attached
        What is attached to it; None: nothing.
    tokenizer
        The model's.
    forecast
        What the search will take.
    """

    able: Ability
    experiment: Experiment
    attached: Attached | None
    tokenizer: Tokenizer | None
    forecast: Forecast


def prepare(
    settings: Settings,
    memory: int = 1 << 30,
    sites: Mapping[str, Site] | None = None,
    strict: bool = False,
) -> Prepared:
    """Load what checked settings ask for, with dictionaries and means; parameters as of discover.

    What takes more memory than it may, or than the machine has, is refused before the weights are
    read where the model's files tell its sizes.
    """

    def foretold(sizes: Sizes, task: Task) -> None:
        whole_vocab = metric_of(settings).whole_vocab
        found = _foresee(settings, memory, Footprint.of_sizes(sizes, whole_vocab=whole_vocab), task)
        check_room(sizes, places(settings), found.least, found.weights)

    experiment, tokenizer = load_experiment(settings, foreseen=foretold)
    experiment = experiment.within(memory)
    _foresee(settings, memory, experiment.footprint, experiment.task)
    able = ability(experiment)
    if strict and able.doubts:
        raise AbilityError("; ".join(able.doubts))
    attached = attached_nodes(experiment, settings, memory, sites)
    if sites is not None and attached is not None and attached.experiment.outline.is_large:
        raise OptionError(
            f"a graph of {attached.experiment.outline.n_edges:,} edges is not written out "
            "whole, and runs are compared on whole graphs: lower --max-latents"
        )
    experiment = experiment if attached is None else attached.experiment
    forecast = _foresee(settings, memory, experiment.footprint, experiment.task)
    lengths = [len(pair.clean) for pair in experiment.task.pairs]
    experiment = experiment.in_batches_of(batch_size_of(forecast, settings, lengths))
    return Prepared(able, with_means(experiment), attached, tokenizer, forecast)


def _foresee(settings: Settings, memory: int, footprint: Footprint, task: Task) -> Forecast:
    """Foretell what a search on some prompts takes."""
    lengths = [len(pair.clean) for pair in task.pairs]
    n_others = None if spec_of(settings) is None else 2 * DEFAULT_N_OTHERS
    return foresee(footprint, lengths, settings, method_of(settings), memory, n_others)


@dataclass
class Passes:
    """Forward passes of one prompt whose logits were looked at; None if they are not counted."""

    n: int | None = None

    @property
    def of_all(self) -> int | None:
        """Those of all processes."""
        if self.n is None:
            return None
        us, own = here(), [torch.tensor(self.n)]
        return sum(int(n) for (n,) in by_chunk(range(us.size), lambda rank: own))


@contextmanager
def counted_passes(experiment: Experiment) -> Iterator[Passes]:
    """Count forward passes while a block runs, by the rows that the final norm reads.

    A pass of a part of the model, as of the incremental engine, counts as one; one with several
    scored positions counts once for each.
    """
    passes, norm = Passes(), experiment.model.ln_final.module
    if not isinstance(norm, torch.nn.Module):
        yield passes
        return
    passes.n = 0

    def count(_: torch.nn.Module, read: tuple[Tensor, ...]) -> None:
        assert passes.n is not None
        passes.n += read[0].shape[:-1].numel()

    handle = norm.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


def _fingerprint(experiment: Experiment) -> dict[str, str]:
    """Digests of prompts, weights, graph and dictionaries: files of one name may change."""
    parts = {
        "prompts": repr(experiment.task.pairs).encode(),
        "graph": " ".join((*experiment.graph.senders, *experiment.graph.receivers)).encode(),
        "mean_over": repr(experiment.mean_over).encode(),
        "dictionaries": " ".join(
            f"{attached.site.name} {attached.dictionary.fingerprint}"
            for attached in experiment.attachments
        ).encode(),
    }
    found = {name: hashlib.sha256(part).hexdigest()[:16] for name, part in parts.items()}
    return {**found, "weights": exact_digest(experiment.model)}


def said_of_arithmetic(model: LoweredModel) -> list[str]:
    """Return what a run says of a model that is computed in another type than its weights'."""
    kept, used = (str(x).removeprefix("torch.") for x in (model.kept_dtype, model.dtype))
    if kept == used:
        return []
    return [
        f"this CPU computes {kept} slowly: weights are {kept}, cast layer by layer, and arithmetic "
        f"is {used}"
    ]


def model_info(experiment: Experiment, settings: Settings) -> dict[str, Any]:
    """Return what run.json says of which model it was: sizes, origin, digest of weights."""
    name, given = settings.model or experiment.model.name, "model" in settings.given
    return identity_of(experiment.model, name, is_object=given).plain()


def circuit_info(
    experiment: Experiment, settings: Settings, faithfulness: float | None
) -> dict[str, Any]:
    """Return what a circuit file and its picture say of how the circuit was found.

    ``helps`` is the sign of the scores of edges that help: without them the metric gets worse (in
    denoising: with them it gets better).  0 where scores have no sign.
    """
    score = method_of(settings).score
    signs = {Score.COST: 1, Score.CHANGE: experiment.minimised_sign, Score.MAGNITUDE: 0}
    return {
        "task": experiment.task.name,
        "model": experiment.model.name,
        "method": settings.method,
        "score": score.value,
        "helps": signs[score],
        "metric": settings.metric,
        "intervention": settings.intervention,
        "direction": settings.direction,
        "faithfulness": faithfulness,
        "d_model": experiment.model.d_model,
    }


def measure(
    circuit: Circuit, settings: Settings, constants: Constants | None = None
) -> tuple[Evaluation, Experiment]:
    """Measure a circuit on the task, model and metric of some settings.

    Metric and faithfulness alone; :func:`acdc.evidence.assessment.evaluate` has the tests.
    ``constants`` are those of the run (:func:`acdc.runs.folder.run_constants`), computed anew if
    there are none.

    Returns
    -------
    tuple
        The evaluation, and what it was measured on.

    Raises
    ------
    OptionError
        If the circuit's graph is not the model's.
    """
    circuit, experiment = fit(circuit, settings, constants=constants)
    experiment = with_constants(experiment)
    return Evaluator(experiment).evaluate(circuit.in_circuit), experiment


def fit(
    circuit: Circuit,
    settings: Settings,
    prompts: Prompts = load_prompts,
    constants: Constants | None = None,
    memory: int = 1 << 30,
) -> tuple[Circuit, Experiment]:
    """Load what some settings ask for, at the granularity of a circuit.

    Prompts have to have the spans that the circuit's graph is split by.  Where the model shares
    key-value heads, a circuit over keys and values of single heads (as
    EAP-IG and MIB write it) becomes what :func:`acdc.runs.pt.group_heads` gives.

    Parameters
    ----------
    circuit
        Any.
    settings
        What to measure it on.
    prompts
        What gives the prompt pairs.
    constants
        Of the run that found it, used where the ablation is the same; None: computed.
    memory
        Bytes that passes and evaluations may take.

    Returns
    -------
    tuple
        The circuit over the model's graph, and the experiment.

    Raises
    ------
    OptionError
        If the circuit's graph is not the model's.
    TaskError
        If a prompt has other spans than the graph.
    """
    shape = circuit.graph.shape
    positions = Positions.of_shape(shape)
    asked = check_settings(
        replace(
            settings,
            split_qkv=shape.split_qkv,
            split_embed=shape.split_embed,
            positions="none" if positions is None else positions.kind,
        )
    )
    experiment = replace(build_experiment(asked, prompts, positions), constants=constants)
    experiment = experiment.within(memory)
    if shape.sites:
        experiment = reattach(experiment, asked, circuit.graph)
    if shape == experiment.graph.shape:
        return circuit, experiment
    if shape == replace(experiment.graph.shape, n_kv_heads=None):
        return group_heads(circuit, experiment.graph.shape), experiment
    raise OptionError(
        f"the circuit's graph is {shape}, the graph of model {asked.model!r} is "
        f"{experiment.graph.shape}: name the model that the circuit was found in"
    )
