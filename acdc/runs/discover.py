"""From a task and a model to a circuit, in one call."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from acdc.ablations import ABLATIONS
from acdc.dictionaries.attach import Attached, attach, attach_experts, attach_neurons
from acdc.dictionaries.attachment import site_kind
from acdc.dictionaries.quality import Quality, qualities_on_task
from acdc.dictionaries.sources import load_dictionaries, names_cross_layer
from acdc.engine.attribution import node_scores
from acdc.engine.checkpoint import Checkpoint
from acdc.engine.constants import FILE_NAME, Constants, load_constants
from acdc.engine.experiment import Experiment
from acdc.engine.footprint import Footprint
from acdc.engine.processes import by_chunk, here
from acdc.engine.stages import NOT_TRAINED
from acdc.engine.work import Work
from acdc.errors import AbilityError, DictionaryError, OptionError, UnknownNameError
from acdc.measure.ability import Ability, ability
from acdc.measure.error_nodes import default_thresholds, errors_in_and_out, sweep_nodes
from acdc.measure.evaluation import Evaluation, Evaluator
from acdc.methods import Method, Score
from acdc.methods.acdc import TWO_SIDED
from acdc.methods.eap import between_inputs
from acdc.models.devices import resolve_placement
from acdc.models.identity import exact_digest, identity_of
from acdc.models.lowering import LoweredModel
from acdc.models.sizes import Sized, Sizes
from acdc.runs.claim import Claims
from acdc.runs.folder import Run, Timer, versions
from acdc.runs.forecast import Forecast, check_room, foresee
from acdc.runs.given import (
    check_given,
    method_of,
    metric_of,
    model_of,
    settings_of,
    spec_of,
)
from acdc.runs.prompts import DEFAULT_N_OTHERS, chooses_size, load_prompts, split_prompts
from acdc.runs.pt import group_heads
from acdc.settings import DEFAULT_HOLDOUT, Settings, options_of
from acdc.tasks import DEFAULT_METRIC, TASKS, Task, Tokenizer, is_task_file
from acdc.tasks.dataset import load_dataset
from acdc.tasks.files import check_task_file
from acdc.tasks.positions import Positions, find_positions
from graphs import Circuit, Graph
from graphs.sites import ALONE, EXPERTS, NEURONS, Site

__all__ = [
    "Passes",
    "Prepared",
    "Reporter",
    "Silent",
    "attach_dictionaries",
    "attached_nodes",
    "build_experiment",
    "check_discovery",
    "check_settings",
    "circuit_info",
    "counted_passes",
    "discover",
    "fit",
    "latent_details",
    "load_experiment",
    "measure",
    "mixture_details",
    "model_info",
    "norms_details",
    "prepare",
    "reattach",
    "said_of_arithmetic",
    "with_constants",
    "with_means",
]

_Prompts = Callable[[Settings, Sized, Tokenizer | None], Task]

_Check = Callable[[Sizes, Task], object]
"""Told of a model and its prompts before the weights are read."""

_STEPS = 5
"""Integration steps of the node scores in run.json."""


class Reporter(Protocol):
    """Told what goes on."""

    def phase(self, name: str, total: int | None) -> AbstractContextManager[Any]:
        """Enter a phase of ``total`` steps."""

    def advance(self, n: int) -> None:
        """Count ``n`` steps of the current phase."""

    def note(self, text: str) -> None:
        """Say how the current phase stands."""

    def say(self, text: str) -> None:
        """Say something that stays to be read: what a run will take."""


class Silent:
    """A reporter that says nothing."""

    def phase(self, name: str, total: int | None) -> AbstractContextManager[Any]:
        """Do nothing."""
        return nullcontext()

    def advance(self, n: int) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""


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
        check_room(sizes, _places(settings), found.least, found.weights)

    experiment, tokenizer = load_experiment(settings, foreseen=foretold)
    experiment = replace(experiment, memory=memory)
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


def with_means(experiment: Experiment) -> Experiment:
    """Return the experiment with the means that its ablated edges carry, if they do."""
    return experiment if experiment.ablation.trained else experiment.pinned()


def with_constants(
    experiment: Experiment,
    memory: int = 1 << 30,
    reporter: Reporter | None = None,
    checkpoint: Checkpoint | None = None,
) -> Experiment:
    """Return the experiment with the constants that its ablated edges carry, if they do.

    Parameters
    ----------
    experiment
        Any.
    memory
        Bytes that the activations of one pass may take.
    reporter
        Told how training goes on.
    checkpoint
        Where trained constants are kept, and found again.
    """
    ablation = experiment.ablation
    if not ablation.trained or experiment.has_constants:
        return experiment.pinned()
    assert callable(ablation.carries)
    reporter = reporter or Silent()
    exact = experiment.in_float32
    path = None if checkpoint is None else checkpoint.kept(FILE_NAME)
    if path is not None:
        constants = load_constants(path)
    else:
        phase = f"train constants ({experiment.direction})"
        with reporter.phase(phase, experiment.training_steps):
            work = Work(memory, reporter.advance, reporter.note)
            constants = ablation.carries(experiment if exact is None else exact, work)
        if checkpoint is not None:
            checkpoint.keep(FILE_NAME, constants.as_bytes())
    if exact is not None:
        exact = replace(exact, constants=constants)
    return replace(experiment, constants=constants, in_float32=exact)


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


def attached_nodes(
    experiment: Experiment,
    settings: Settings,
    memory: int = 1 << 30,
    sites: Mapping[str, Site] | None = None,
) -> Attached | None:
    """Attach what settings name, if anything; ``sites`` as in :func:`discover`."""
    if settings.saes is not None:
        return attach_dictionaries(experiment, settings, memory, sites)
    if settings.neurons:
        chosen = None if sites is None else {site.layer: site.latents for site in sites.values()}
        return attach_neurons(
            experiment, max_neurons=settings.max_latents, neurons=chosen,
            alone=settings.neuron_inputs, memory=memory,
        )  # fmt: skip
    return attach_experts(experiment, memory) if settings.experts else None


def attach_dictionaries(
    experiment: Experiment,
    settings: Settings,
    memory: int = 1 << 30,
    sites: Mapping[str, Site] | None = None,
) -> Attached:
    """Attach the dictionaries that settings name.

    Parameters
    ----------
    experiment
        What :func:`build_experiment` gives for the settings.
    settings
        With ``saes``.
    memory
        Bytes for the passes that choose the latents.
    sites
        By name, as in a circuit that was found before: its latents are nodes; None: chosen.

    Raises
    ------
    DictionaryError
        If a dictionary cannot be read or does not fit, or the circuit has other sites.
    """
    assert settings.saes is not None
    dictionaries = load_dictionaries(settings.saes, settings.model or "")
    if sites is None:
        return attach(experiment, dictionaries, max_latents=settings.max_latents, memory=memory)
    found = {Site(*site_kind(d), ()).name: d for d in dictionaries}
    if found.keys() != sites.keys():
        raise DictionaryError(
            f"the circuit has latents at {', '.join(sites)}, the dictionaries given are for "
            f"{', '.join(found)}: give the dictionaries that it was found with"
        )
    some = list(sites.values())
    return attach(experiment, [found[s.name] for s in some], latents=[s.latents for s in some])


def reattach(experiment: Experiment, settings: Settings, graph: Graph) -> Experiment:
    """Make nodes of the latents, or neurons, of a circuit that was found before.

    Parameters
    ----------
    experiment
        What :func:`build_experiment` gives for the settings.
    settings
        With ``saes`` if the circuit has latents; neurons come with the model.
    graph
        Of the circuit.

    Raises
    ------
    OptionError
        If the settings name dictionaries of a circuit with neurons, or none of one with latents.
    """
    sites = graph.shape.site_at
    kinds = {site.kind for site in sites.values()}
    if kinds & set(NEURONS):
        if settings.saes is not None:
            raise OptionError("the circuit has neurons, not latents: leave --saes out")
        chosen = {site.layer: site.latents for site in sites.values()}
        alone = bool(kinds & set(ALONE))
        found = attach_neurons(experiment, neurons=chosen, alone=alone).experiment
    elif kinds & set(EXPERTS):
        free = replace(experiment, router="free" if "routed" in kinds else "frozen")
        found = attach_experts(free).experiment
    elif settings.saes is None:
        raise OptionError("the circuit has latents: say with --saes which dictionaries they are of")
    else:
        found = attach_dictionaries(experiment, settings, sites=sites).experiment
    if not found.outline.is_large:
        return found
    return replace(found, places=found.outline.places_of(graph))


def latent_details(
    attached: Attached | None,
    evaluator: Evaluator,
    circuit: Circuit,
    qualities: Sequence[Quality],
) -> dict[str, Any]:
    """Return what run.json says of latents: sites, quality, and what error nodes carry."""
    if attached is None:
        return {}
    experiment = attached.experiment
    if any(site.kind in EXPERTS for site in experiment.graph.shape.sites):
        return {}  # nothing is folded and there are no error nodes
    scores = node_scores(experiment, between_inputs(experiment, _STEPS), _STEPS)
    return {
        "latents": {
            **attached.summary(),
            "quality": [asdict(quality) for quality in qualities],
            "error_nodes": asdict(errors_in_and_out(evaluator, circuit.in_circuit)),
            "node_thresholds": [
                asdict(row) for row in sweep_nodes(evaluator, scores, default_thresholds(scores))
            ],
        }
    }


def mixture_details(experiment: Experiment, attached: Attached | None) -> dict[str, Any]:
    """Return what run.json says of mixtures of experts: their router, and experts that are nodes.

    None in a model without.
    """
    if not experiment.model.has_experts:
        return {}
    base = "clean" if experiment.direction == "noising" else "corrupt"
    how = f"frozen at the {base} run" if experiment.router == "frozen" else "free"
    nodes = attached.summary() if attached is not None and experiment.graph.shape.sites else {}
    return {"mixtures": {"router": how, **nodes}}


def norms_details(
    experiment: Experiment, circuit: Circuit, evaluation: Evaluation
) -> dict[str, Any]:
    """Return what run.json says of frozen norms: the circuit's faithfulness with live ones too."""
    if experiment.norms == "live":
        return {}
    live = Evaluator(replace(experiment, norms="live")).faithfulness(circuit.in_circuit)
    return {"faithfulness_by_norms": {"frozen": evaluation.faithfulness, "live": live}}


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


def check_discovery(settings: Settings) -> Settings:
    """As :func:`check_settings`, for a search: every option of the method gets its value.

    Raises
    ------
    OptionError
        Also if something is asked for that would do nothing, as means over prompts where no mean
        is asked for.
    """
    if settings.mean_over is not None and not ABLATIONS[settings.intervention].averages:
        averages = " or ".join(name for name, one in ABLATIONS.items() if one.averages)
        raise OptionError(
            f"mean_over {settings.mean_over!r} with intervention {settings.intervention!r}: "
            f"choose the intervention {averages}, or leave it out"
        )
    if settings.threshold is not None and settings.n_edges is not None:
        raise OptionError("both a threshold and a number of edges were given: give one of them")
    method = method_of(settings)
    options = method.configured(settings)
    drawn = spec_of(settings) is not None  # of a file, those rows are left out of the search
    if settings.n_select and drawn and not chooses_size(settings, method):
        raise OptionError(
            f"n_select {settings.n_select} does nothing where the threshold or the size is given: "
            "leave it out"
        )
    _check_use(settings, method, options)
    _check_crossing(settings, method)
    own = {name: getattr(options, name) for name in method.option_names}
    return check_settings(settings.replace(options=own))


def _check_crossing(settings: Settings, method: Method) -> None:
    """Refuse what cannot be asked of a cross-layer transcoder, before anything is loaded."""
    if settings.saes is None or not names_cross_layer(settings.saes):
        return
    if method.not_across:
        raise OptionError(f"{method.name}: {method.not_across}")
    if ABLATIONS[settings.intervention].trained:
        raise OptionError(NOT_TRAINED)


def _check_use(settings: Settings, method: Method, options: Any) -> None:
    """Refuse what differs from its default and needs something that is not asked for."""
    trained = " or ".join(name for name, one in ABLATIONS.items() if one.trained)
    there = {
        "latents": (settings.saes is not None or settings.neurons, "latents"),
        "neurons": (settings.neurons, "neurons"),
        "milp": (settings.select == "milp", "select milp"),
        "training": (ABLATIONS[settings.intervention].trained, f"intervention {trained}"),
    }
    for values in (settings, options):
        for name, _, says in options_of(type(values)):
            if not says.only and says.needs is None:
                continue
            value = getattr(values, name)
            if value == getattr(type(values), name):
                continue
            if says.needs is None:
                is_there, what = there[says.only]
            else:
                other, wanted = says.needs
                is_there, what = getattr(values, other) == wanted, f"{other} {wanted}"
            if not is_there:
                raise OptionError(f"{name} {value!r} does nothing without {what}: leave it out")


def check_settings(settings: Settings) -> Settings:
    """Check names before anything is loaded, and fill in the task's model and metric."""
    check_given(settings, "task", "model")
    metric_of(settings)  # that there is one
    if settings.saes is not None and settings.neurons:
        raise OptionError(f"saes {settings.saes!r} and neurons: give one of them")
    if settings.experts and (settings.saes is not None or settings.neurons):
        raise OptionError("experts beside latents or neurons: give one of them")
    spec = spec_of(settings)
    if spec is None and "task" not in settings.given:
        if not is_task_file(settings.task):
            raise UnknownNameError("task", settings.task, TASKS)
        check_task_file(settings.task)
    if settings.model is None and spec is None:
        raise OptionError(f"task file {settings.task!r}: say with --model which model reads it")
    if spec is not None and settings.holdout is not None:
        raise OptionError(
            f"holdout {settings.holdout}: task {settings.task!r} draws new prompts for evaluation; "
            "leave it out"
        )
    holdout = DEFAULT_HOLDOUT if spec is None and settings.holdout is None else settings.holdout
    return replace(
        settings,
        holdout=holdout,
        model=settings.model or (spec.model if spec else None),
        metric=settings.metric or (spec.metric if spec else DEFAULT_METRIC),
    )


def build_experiment(
    settings: Settings, prompts: _Prompts = load_prompts, positions: Positions | None = None
) -> Experiment:
    """Load model and task of checked settings.

    In bfloat16 or float16 ``acdc`` also gets the model in float32, for decisions that the
    low precision cannot make.

    Parameters
    ----------
    settings
        From :func:`check_settings`.
    prompts
        What gives the prompt pairs of the settings, the model and its tokenizer.
    positions
        The spans of a circuit that was found before; None: those of the prompts, as the settings
        ask.
    """
    return load_experiment(settings, prompts, positions)[0]


def load_experiment(
    settings: Settings,
    prompts: _Prompts = load_prompts,
    positions: Positions | None = None,
    foreseen: _Check | None = None,
) -> tuple[Experiment, Tokenizer | None]:
    """As :func:`build_experiment`, with the model's tokenizer.

    ``foreseen`` is told of the model's sizes and the prompts before the weights are read, where
    that is known.
    """
    model, task, tokenizer = _model_and_task(settings, prompts, foreseen)
    if positions is None and settings.positions != "none":
        causal = all(layer.attention.causal for layer in model.layers)
        positions = find_positions(task, settings.positions, causal=causal)
    experiment = Experiment(
        model,
        task,
        metric_of(settings),
        settings.batch_size,
        settings.intervention,
        settings.direction,  # type: ignore[arg-type]  # checked by Settings
        norms=settings.norms,  # type: ignore[arg-type]  # likewise
        router=settings.router,  # type: ignore[arg-type]  # likewise
        positions=positions,
        mean_over=_mean_over(settings, model, tokenizer),
        training_steps=settings.optimal_steps,
    )
    if settings.method in ("acdc", TWO_SIDED, "eap-acdc") and model.dtype in (
        torch.bfloat16,
        torch.float16,
    ):
        exact, _ = model_of(settings, "float32")
        experiment = replace(experiment, in_float32=replace(experiment, model=exact))
    if settings.router != Settings.router and not model.has_experts:
        raise OptionError(
            f"router {settings.router!r}: {model.name!r} has no mixtures of experts; leave it out"
        )
    _ = experiment.batches  # a pair that cannot be used is found before the search starts
    return experiment, tokenizer


def _places(settings: Settings) -> tuple[torch.device, ...]:
    """Where weights are held."""
    placement = resolve_placement(settings.device, settings.offload)
    return placement.held or (placement.device,)


def _model_and_task(
    settings: Settings, prompts: _Prompts, foreseen: _Check | None
) -> tuple[LoweredModel, Task, Tokenizer | None]:
    """Load prompts, and then what reads them; the other way round where files tell no sizes."""
    found: list[tuple[Sizes, Task]] = []

    def before(sizes: Sizes, tokenizer: Tokenizer | None) -> None:
        check_room(sizes, _places(settings))
        found.append((sizes, prompts(settings, sizes, tokenizer)))
        if foreseen is not None:
            foreseen(*found[0])

    model, tokenizer = model_of(settings, before=before)
    for sizes, task in found:
        known = sizes.d_vocab, sizes.d_vocab_out, sizes.n_ctx
        if known == (model.d_vocab, model.d_vocab_out, model.n_ctx):
            return model, task, tokenizer
    return model, prompts(settings, model, tokenizer), tokenizer


def _mean_over(
    settings: Settings, model: LoweredModel, tokenizer: Tokenizer | None
) -> tuple[tuple[int, ...], ...] | None:
    """Prompts that means are taken over, None for those of the task."""
    if settings.mean_over is None:
        return None
    return load_dataset(
        settings.mean_over,
        tokenizer,
        seed=settings.seed,
        prepend_bos=settings.prepend_bos,
        d_vocab=model.d_vocab,
        n_ctx=model.n_ctx,
    )


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
    prompts: _Prompts = load_prompts,
    constants: Constants | None = None,
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
