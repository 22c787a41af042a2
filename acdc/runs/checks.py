"""What is refused before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from acdc.ablations import ABLATIONS
from acdc.dictionaries.sources import names_cross_layer
from acdc.engine.stages import NOT_TRAINED
from acdc.errors import OptionError, UnknownNameError
from acdc.methods import Method
from acdc.runs.given import (
    check_given,
    method_of,
    metric_of,
    spec_of,
)
from acdc.runs.prompts import chooses_size
from acdc.settings import DEFAULT_HOLDOUT, Settings, options_of
from acdc.tasks import DEFAULT_METRIC, TASKS, is_task_file
from acdc.tasks.files import check_task_file

__all__ = ["check_discovery", "check_settings"]


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
