"""A run's model, prompts and graph, loaded again for what looks inside."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from acdc.engine.experiment import Experiment
from acdc.errors import CircuitFileError, DictionaryError, OptionError
from acdc.runs.attached import reattach
from acdc.runs.building import load_experiment
from acdc.runs.checks import check_settings
from acdc.runs.claim import Claim
from acdc.runs.folder import run_json
from acdc.runs.opened import Opened
from acdc.settings import Settings
from acdc.tasks import Tokenizer
from graphs import Circuit

__all__ = ["check_summary", "reopen"]


def check_summary(folder: str | Path, summary: dict[str, Any], circuit: Circuit) -> None:
    """Raise CircuitFileError if a ``run.json`` lacks what pages say, or is of another circuit.

    Parameters
    ----------
    folder, summary, circuit
        Of a run, as they were read; messages name the folder.
    """
    item = run_json(folder, summary)
    item.number("n_prompts")
    Claim.read(item)
    for key in ("metric", "model", "method", "intervention", "direction"):
        item.text(key)
    timings, numbers = item.at("timings"), item.at("versions")
    for key in timings.content:
        timings.number(key)
    for key in numbers.content:
        numbers.text(key)
    if "task_info" in summary:
        item.at("task_info")
    if summary.get("latents") is not None:  # where they are needed, that is said below
        errors = item.at("latents").at("error_nodes")
        for key in ("with_errors", "without_errors"):
            errors.optional(key)
    sizes = item.number("n_edges_kept"), item.number("n_edges_total")
    if sizes != (circuit.n_edges, circuit.graph.n_edges):
        raise CircuitFileError(
            f"{folder}: run.json is of a circuit of {sizes[0]:,} of {sizes[1]:,} edges, "
            f"circuit.json has {circuit.n_edges:,} of {circuit.graph.n_edges:,}; find the circuit "
            "anew"
        )


def reopen(
    run: Opened, settings: Settings, memory: int = 1 << 30
) -> tuple[Experiment, Tokenizer | None]:
    """Return a run's experiment and its model's tokenizer, if its files are what they were.

    Parameters
    ----------
    run
        What :func:`acdc.runs.opened.open_run` gave.
    settings
        Its own, as :meth:`acdc.runs.opened.Opened.settings` has them.
    memory
        Bytes that passes and evaluations may take.

    Returns
    -------
    tuple
        The experiment, with the dictionaries that the run has and the constants that its
        ablated edges carried; and the tokenizer.

    Raises
    ------
    CircuitFileError
        As of :func:`check_summary`, or if ``run.json`` says nothing of the dictionaries that the
        circuit needs.
    DictionaryError
        If a dictionary is not the one that the run used.
    OptionError
        If the model's graph is not the circuit's, or its metric is not what it was.
    """
    folder, circuit, summary = run.name, run.circuit, run.summary
    check_summary(folder, summary, circuit)
    plain, tokenizer = load_experiment(check_settings(settings))
    plain = plain.within(memory)
    ours, shape = plain.model.shape, circuit.graph.shape
    if ours.n_layers != shape.n_layers or ours.n_heads != shape.n_heads:
        raise OptionError(
            f"{folder}: its circuit is of {shape.n_layers} layers and {shape.n_heads} heads, model "
            f"{settings.model!r} has {ours.n_layers} and {ours.n_heads}; find the circuit anew"
        )
    experiment = plain
    if shape.sites:
        experiment = _with_dictionaries(folder, plain, settings, circuit, summary)
    if experiment.graph.shape != shape:
        raise OptionError(
            f"{folder}: its circuit is of {shape}, model {settings.model!r} has "
            f"{experiment.graph.shape}; find the circuit anew"
        )
    value = plain.plain("clean" if settings.direction == "noising" else "corrupt")
    wanted = Claim.read(run_json(folder, summary)).seen.metric_full
    if not math.isclose(value, wanted, rel_tol=0.02, abs_tol=1e-3):
        raise OptionError(
            f"{folder}: {settings.metric} of model {settings.model!r} was {wanted}, it is "
            f"{value:.6g} now; model or task have changed, find the circuit anew"
        )
    return replace(experiment, constants=run.constants(settings)), tokenizer


def _with_dictionaries(
    folder: str | Path,
    plain: Experiment,
    settings: Settings,
    circuit: Circuit,
    summary: dict[str, Any],
) -> Experiment:
    """Attach the run's dictionaries and check that each is the one that it used."""
    if settings.saes is None and not settings.neurons and not settings.experts:
        raise CircuitFileError(f"{folder}: the circuit has latents, run.json names no dictionaries")
    experiment = reattach(plain, settings, circuit.graph)
    latents = summary.get("mixtures" if settings.experts else "latents")
    rows = latents.get("sites") if isinstance(latents, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CircuitFileError(f"{folder}: run.json says nothing of its dictionaries")
    known = {row.get("name"): row.get("fingerprint") for row in rows}
    for attachment in experiment.attachments:
        name, dictionary = attachment.site.name, attachment.dictionary
        if known.get(name) != dictionary.fingerprint:
            raise DictionaryError(
                f"dictionary {dictionary.source!r} at {name} has the fingerprint "
                f"{dictionary.fingerprint}, the run's had {known.get(name)}: it has changed, "
                "find the circuit anew"
            )
    return experiment
