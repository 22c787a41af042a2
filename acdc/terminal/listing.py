"""``acdc list``: what there is, as tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from rich.markup import escape
from rich.table import Table

__all__ = ["LISTS", "list_table"]

_Listed = tuple[str, list[tuple[str, str]]]


def list_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Return names and descriptions as a table."""
    table = Table(title=title, title_justify="left")
    table.add_column("name", no_wrap=True, overflow="fold")
    table.add_column("description", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _models() -> _Listed:
    from acdc.models import MODELS
    from acdc.models.lowering.families import SUPPORTED_ARCHITECTURES

    rows = []
    for name, folder in MODELS.items():
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        rows.append((name, str(card["description"])))
    rows.append(("any Hugging Face", ", ".join(SUPPORTED_ARCHITECTURES[1:]) + ": name or folder"))
    rows.append(("any native", "folder with config.json and model.safetensors (HookedTransformer)"))
    return "models", rows


def _tasks() -> _Listed:
    from acdc.tasks import DEFAULT_METRIC, TASKS

    rows = []
    for task in TASKS.values():
        corruptions = [f"--corruption {name}: {text}" for name, text in task.corruptions.items()]
        lines = [task.description, f"model {task.model}, metric {task.metric}", *corruptions]
        lines.append(f"--positions span: {', '.join(task.spans)}")
        rows.append((task.name, "\n".join(lines)))
    files = "prompt pairs: JSONL, AutoCircuit's JSON or EAP-IG's CSV (give --model)"
    rows.append(("FILE", f"{files}\nmetric {DEFAULT_METRIC}"))
    return "tasks", rows


def _methods() -> _Listed:
    from acdc.methods import METHODS

    rows = [(m.name, m.description) for m in METHODS.values()]
    return "methods", rows


def _metrics() -> _Listed:
    from acdc.engine.metrics import METRICS

    rows = [(m.name, m.description) for m in METRICS.values()]
    return "metrics", rows


def _ablations() -> _Listed:
    from acdc.ablations import ABLATIONS

    rows = [(a.name, f"ablated edges carry {a.description}") for a in ABLATIONS.values()]
    return "ablations (--intervention)", rows


def _references() -> _Listed:
    from acdc.evidence.references import REFERENCES
    from graphs.known.reference import read_reference

    rows = []
    for name, path in REFERENCES.items():
        reference = read_reference(path)
        size = f"{len(reference.edges):,} {reference.granularity}"
        if reference.granularity == "nodes":
            size = f"{len(reference.nodes)} nodes"
        ablation = str(reference.ablation) or "any ablation"
        where = ", with positions" if reference.positions else ""
        text = f"{size} of {reference.model}{where}, true under {ablation}: {reference.description}"
        rows.append((name, text))
    return "references", rows


LISTS: dict[str, Callable[[], _Listed]] = {
    "models": _models,
    "tasks": _tasks,
    "methods": _methods,
    "metrics": _metrics,
    "ablations": _ablations,
    "references": _references,
}
"""Each gives a title, and names with descriptions."""
