"""Objects given where settings have a name: a task, a model, a metric, a method.

Settings are plain values, as ``run.json`` holds them.  An object stands beside them in
``settings.given``, under its field's name; what is asked for is looked up here, so that a name and
an object are alike to everything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from acdc.engine.metrics import METRICS, Metric, get_metric
from acdc.errors import OptionError
from acdc.methods import METHODS, Method
from acdc.models import Before, Loaded, load_model
from acdc.models.devices import resolve_dtype, resolve_placement
from acdc.settings import Lost, Settings
from acdc.tasks import DEFAULT_METRIC, TASKS, Task, TaskSpec

__all__ = [
    "check_given",
    "defaults_of",
    "method_of",
    "metric_of",
    "model_of",
    "named",
    "same_task",
    "settings_of",
    "spec_of",
]


def settings_of(task: Any, **asked: Any) -> Settings:
    """Return settings of names, paths and objects; what is no field is an option of the method.

    Parameters
    ----------
    task
        Built-in task, file, :class:`acdc.tasks.Task`, or list of rows as of a ``.jsonl`` file.
    **asked
        Fields of :class:`acdc.settings.Settings`, where ``model``, ``metric`` and ``method`` may
        be objects, too, and options of the method.
    """
    return Settings.of(**named(task=task, **asked))


def named(**asked: Any) -> dict[str, Any]:
    """Return what was asked for with names in the place of objects, which are in ``given``.

    Raises
    ------
    OptionError
        If something is neither a name nor an object of its kind, or a model is asked for in
        another precision or at another place than the one given has.
    """
    given = dict(asked.pop("given", {}))
    for name, find in (
        ("task", _task), ("model", _model), ("metric", _metric), ("method", _method)
    ):  # fmt: skip
        value = asked.get(name)
        if isinstance(value, Path):
            asked[name] = str(value)
        elif value is not None and not isinstance(value, str):
            asked[name], thing = find(value)
            given |= {} if thing is None else {name: thing}
            if name == "model":
                asked |= _place(thing, asked)
    return {**asked, "given": given}


def _wrong(name: str, value: Any, expected: str) -> OptionError:
    return OptionError(f"{name} is given as {type(value).__name__}: expected {expected}")


def _task(value: Any) -> tuple[str, Any]:
    if isinstance(value, TaskSpec):
        return value.name, None if TASKS.get(value.name) is value else _unregistered("task", value)
    if isinstance(value, Task):
        return value.name, value
    if isinstance(value, Sequence):
        return "rows", value
    raise _wrong("task", value, "a name, a file, a Task or a list of rows (dicts)")


def _unregistered(kind: str, value: Any) -> Any:
    raise OptionError(f"{kind} {value.name!r} is not registered: offer it under an entry point")


def _model(value: Any) -> tuple[str, Any]:
    model, tokenizer = load_model(value)
    return model.name, (model, tokenizer)


def _metric(value: Any) -> tuple[str, Any]:
    if not isinstance(value, Metric):
        raise _wrong("metric", value, "a name or a Metric")
    return value.name, None if METRICS.get(value.name) is value else value


def _method(value: Any) -> tuple[str, Any]:
    value = getattr(value, "registered", value)  # the function under its decorator
    if not isinstance(value, Method):
        raise _wrong("method", value, "a name or a Method")
    return value.name, None if METHODS.get(value.name) is value else value


def _place(loaded: Loaded, asked: dict[str, Any]) -> dict[str, Any]:
    """Devices and dtype of a model that is loaded, which are those of the run."""
    model, _ = loaded
    device, dtype = _said(model.devices), str(model.kept_dtype).removeprefix("torch.")
    offload = "cpu" if model.offloads else "none"
    for name, has, wanted in (
        ("device", device, _said(resolve_placement(asked.get("device", device)).devices)),
        ("offload", offload, asked.get("offload", offload)),
        ("dtype", model.kept_dtype, resolve_dtype(asked.get("dtype", dtype))),
    ):
        if has != wanted:
            raise OptionError(
                f"{name} {asked[name]!r} was asked for, the model given has {has}: move it first, "
                "or leave it out"
            )
    return {"device": device, "offload": offload, "dtype": dtype}


def _said(devices: Iterable[torch.device]) -> str:
    """Name of devices, as ``--device`` takes it."""
    return ",".join(map(str, devices))


def check_given(settings: Settings, *names: str) -> None:
    """Raise OptionError if a run was given one of these as an object, and it has to be again."""
    for name in names:
        lost = settings.given.get(name)
        if isinstance(lost, Lost):
            raise OptionError(
                f"{name} {getattr(settings, name)!r} was given in Python, as {lost.what}, which "
                f"run.json cannot hold: give it again, {name}=..."
            )


def spec_of(settings: Settings) -> TaskSpec | None:
    """Return the built-in task of settings; None for a file, a Task or rows."""
    return None if "task" in settings.given else TASKS.get(settings.task)


def same_task(one: Settings, other: Settings) -> bool:
    """Whether two settings name one task, or were given one of the same name."""
    alike = ("task" in one.given) == ("task" in other.given)
    return alike and one.task == other.task


def metric_of(settings: Settings) -> Metric:
    """Return the metric of settings."""
    check_given(settings, "metric")
    found: Metric | None = settings.given.get("metric")
    return get_metric(settings.metric or DEFAULT_METRIC) if found is None else found


def method_of(settings: Settings) -> Method:
    """Return the method of settings."""
    check_given(settings, "method")
    found: Method | None = settings.given.get("method")
    return METHODS[settings.method] if found is None else found


def defaults_of(settings: Settings) -> dict[str, Any]:
    """Return the defaults of the method's options; none of a method that only a file names."""
    return {} if isinstance(settings.given.get("method"), Lost) else method_of(settings).defaults


def model_of(settings: Settings, dtype: str | None = None, before: Before | None = None) -> Loaded:
    """Return the model of settings and its tokenizer, in their precision or another.

    ``before`` is that of :func:`acdc.models.load_model`.

    Raises
    ------
    OptionError
        If a model that was given is asked for in another precision.
    """
    check_given(settings, "model")
    given, dtype = settings.given.get("model"), dtype or settings.dtype
    if given is not None:
        if dtype != settings.dtype:
            raise OptionError(
                f"method {settings.method!r} with a model given in {settings.dtype} decides close "
                f"cases in {dtype}: give the model in {dtype}, or by its name"
            )
        return load_model(given, split_qkv=settings.split_qkv, split_embed=settings.split_embed)
    assert settings.model is not None
    return load_model(
        settings.model,
        device=settings.device,
        offload=settings.offload,
        dtype=dtype,
        split_qkv=settings.split_qkv,
        split_embed=settings.split_embed,
        trust_remote_code=settings.trust_remote_code,
        before=before,
    )
