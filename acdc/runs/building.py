"""From what was asked to an experiment: a model, its prompts, and what is ablated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from acdc.engine.checkpoint import Checkpoint
from acdc.engine.constants import FILE_NAME, load_constants
from acdc.engine.experiment import Experiment
from acdc.engine.work import Work
from acdc.errors import OptionError
from acdc.methods.acdc import TWO_SIDED
from acdc.models.devices import resolve_placement
from acdc.models.lowering import LoweredModel
from acdc.models.sizes import Sized, Sizes
from acdc.runs.forecast import check_room
from acdc.runs.given import metric_of, model_of
from acdc.runs.prompts import load_prompts
from acdc.runs.reporter import Reporter, Silent
from acdc.settings import Settings
from acdc.tasks import Task, Tokenizer
from acdc.tasks.dataset import load_dataset
from acdc.tasks.positions import Positions, find_positions

__all__ = [
    "Prompts",
    "build_experiment",
    "load_experiment",
    "places",
    "with_constants",
    "with_means",
]

Prompts = Callable[[Settings, Sized, Tokenizer | None], Task]
"""Makes the prompts of a run."""

_Check = Callable[[Sizes, Task], object]
"""Told of a model and its prompts before the weights are read."""


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


def build_experiment(
    settings: Settings, prompts: Prompts = load_prompts, positions: Positions | None = None
) -> Experiment:
    """Load model and task of checked settings.

    In bfloat16 or float16 ``acdc`` also gets the model in float32, for decisions that the
    low precision cannot make.

    Parameters
    ----------
    settings
        From :func:`acdc.runs.checks.check_settings`.
    prompts
        What gives the prompt pairs of the settings, the model and its tokenizer.
    positions
        The spans of a circuit that was found before; None: those of the prompts, as the settings
        ask.
    """
    return load_experiment(settings, prompts, positions)[0]


def load_experiment(
    settings: Settings,
    prompts: Prompts = load_prompts,
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


def places(settings: Settings) -> tuple[torch.device, ...]:
    """Where weights are held."""
    placement = resolve_placement(settings.device, settings.offload)
    return placement.held or (placement.device,)


def _model_and_task(
    settings: Settings, prompts: Prompts, foreseen: _Check | None
) -> tuple[LoweredModel, Task, Tokenizer | None]:
    """Load prompts, and then what reads them; the other way round where files tell no sizes."""
    found: list[tuple[Sizes, Task]] = []

    def before(sizes: Sizes, tokenizer: Tokenizer | None) -> None:
        check_room(sizes, places(settings))
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
