"""What the panel of a head says of why it attends."""

from __future__ import annotations

from dataclasses import replace

from acdc.engine.experiment import Experiment
from acdc.evidence.head_reasons import explain_heads, full_precision
from acdc.evidence.head_words import head_words
from acdc.measure.heads import towards
from acdc.measure.roles import measure_roles, roles_of
from acdc.tasks.split import select_pairs
from graphs import Circuit
from graphs.graph import parse_node

__all__ = ["MOST_EXPLAINED", "head_rows"]

MOST_EXPLAINED, _N_PROMPTS = 24, 16


def head_rows(circuit: Circuit, experiment: Experiment) -> dict[str, list[tuple[str, str]]]:
    """Return what is said of the circuit's heads, of at most :data:`MOST_EXPLAINED`.

    Parameters
    ----------
    circuit
        With its scores.
    experiment
        What it was found in; the first of its prompts are looked at.

    Returns
    -------
    dict
        ``layer.head`` -> headings and texts, see :func:`acdc.evidence.head_words.head_words`.
    """
    task = experiment.task
    few = replace(experiment.on(select_pairs(task, task.pairs[:_N_PROMPTS])), positions=None)
    found = explain_heads(circuit, few, max_heads=MOST_EXPLAINED)
    if not found:
        return {}
    roles = roles_of(measure_roles(full_precision(few)))
    metric = towards(few)
    value = replace(few, metric=metric).plain("clean")
    rows = {}
    for one in found:
        own = tuple(role for role, names in roles.items() if one.head in names)
        _, layer, head = parse_node(one.head)
        rows[f"{layer}.{head}"] = head_words(replace(one, roles=own), metric.name, value)
    return rows
