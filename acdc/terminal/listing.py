"""``acdc list``: what there is, as tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from rich.markup import escape
from rich.table import Table

__all__ = ["LISTS"]


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=column == "name", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _models() -> Table:
    from acdc.models import MODELS
    from acdc.models.lowering.families import SUPPORTED_ARCHITECTURES

    rows = []
    for name, folder in MODELS.items():
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        rows.append((name, str(card["description"])))
    rows.append(("any Hugging Face", ", ".join(SUPPORTED_ARCHITECTURES[1:]) + ": name or folder"))
    rows.append(("any native", "folder with config.json and model.safetensors (HookedTransformer)"))
    return _table("models", ("name", "description"), rows)


def _tasks() -> Table:
    from acdc.tasks import DEFAULT_METRIC, TASKS

    rows = []
    for task in TASKS.values():
        corruptions = [f"--corruption {name}: {text}" for name, text in task.corruptions.items()]
        lines = [task.description, f"model {task.model}, metric {task.metric}", *corruptions]
        lines.append(f"--positions span: {', '.join(task.spans)}")
        rows.append((task.name, "\n".join(lines)))
    files = "prompt pairs: JSONL, AutoCircuit's JSON or EAP-IG's CSV (give --model)"
    rows.append(("FILE", f"{files}\nmetric {DEFAULT_METRIC}"))
    return _table("tasks", ("name", "description"), rows)


def _methods() -> Table:
    from acdc.methods import METHODS

    rows = [(m.name, m.description) for m in METHODS.values()]
    return _table("methods", ("name", "description"), rows)


def _metrics() -> Table:
    from acdc.engine.metrics import METRICS

    rows = [(m.name, m.description) for m in METRICS.values()]
    return _table("metrics", ("name", "description"), rows)


def _ablations() -> Table:
    from acdc.ablations import ABLATIONS

    rows = [(a.name, f"ablated edges carry {a.description}") for a in ABLATIONS.values()]
    return _table("ablations (--intervention)", ("name", "description"), rows)


def _references() -> Table:
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
    return _table("references", ("name", "description"), rows)


LISTS: dict[str, Callable[[], Table]] = {
    "models": _models,
    "tasks": _tasks,
    "methods": _methods,
    "metrics": _metrics,
    "ablations": _ablations,
    "references": _references,
}
