"""The picture of a circuit's development: what happens when, over one axis of training steps."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acdc.models.steps import split_step

__all__ = ["draw"]

_BLUE, _VERMILION, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "0.5"
_LEAST_RATIO = 1.18
"""Of two steps that are labelled on a logarithmic axis."""
_ROLES = {"previous": ("previous token", _BLUE), "duplicate": ("duplicate token", _GREEN),
          "induction": ("induction", _VERMILION)}  # fmt: skip


def draw(summary: Mapping[str, Any], kind: str) -> bytes:
    """Return the picture as SVG or PNG.

    Four panels over the steps (logarithmic; where names say none, over places): what the model
    does, when edges come to stay, overlap with the final circuit and its faithfulness, and the best
    head of every behaviour.  Checkpoints that do not do the task are shaded.

    Parameters
    ----------
    summary
        As of :meth:`acdc.evidence.development.Development.summary`.
    kind
        ``svg`` or ``png``.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "acdc", "font.size": 9}):
        figure = Figure(figsize=(7, 9.5), layout="constrained")
        panels = figure.subplots(4, 1, sharex=True)
        x, name = _steps(summary)
        for panel, fill in zip(panels, (_task, _edges, _overlap, _heads), strict=True):
            fill(panel, x, summary)
            panel.spines[["top"]].set_visible(False)
            _shade(panel, x, summary)
        _scale(panels[-1], x, name)
        figure.align_ylabels(panels)
        model = Path(split_step(summary["model"])[0]).name
        figure.suptitle(f"{summary['task']} · {model}, by checkpoint", fontsize=11)
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=140, metadata=metadata)
    return buffer.getvalue()


def _steps(summary: Mapping[str, Any]) -> tuple[list[float], str]:
    steps = [row["step"] for row in summary["checkpoints"]]
    if None in steps or len(set(steps)) < len(steps):
        return [float(i) for i in range(1, len(steps) + 1)], "checkpoint"
    return [float(step) for step in steps], "training step"


def _scale(panel: Any, x: list[float], name: str) -> None:
    """A logarithmic axis, on which step 0 has a place of its own."""
    panel.set_xlabel(name)
    if name == "checkpoint":
        panel.set_xticks(x)
        return
    positive = [at for at in x if at > 0]
    panel.set_xscale("symlog" if min(x) <= 0 else "log", **_linear(positive) if min(x) <= 0 else {})
    panel.set_xticks(x, _labels(x), rotation=60, ha="right")
    panel.minorticks_off()


def _labels(x: list[float]) -> list[str]:
    """Steps in words, where there is room for them; the last one always."""
    shown: list[float] = []
    for at in reversed(x):
        if not shown or at <= 0 or shown[-1] / at >= _LEAST_RATIO:
            shown.append(at)
    return [f"{at:,.0f}" if at in shown else "" for at in x]


def _linear(positive: list[float]) -> dict[str, float]:
    return {"linthresh": min(positive, default=1.0), "linscale": 0.4}


def _shade(panel: Any, x: list[float], summary: Mapping[str, Any]) -> None:
    """Grey behind the checkpoints that do not do the task, half way to those that do."""
    for i, row in enumerate(summary["checkpoints"]):
        if not row["does_task"]:
            low, high = x[max(i - 1, 0)], x[min(i + 1, len(x) - 1)]
            panel.axvspan((low + x[i]) / 2, (high + x[i]) / 2, color="0.92", linewidth=0, zorder=0)


def _column(summary: Mapping[str, Any], key: str) -> list[float]:
    """One number by checkpoint; what is not known leaves a gap."""
    values = (row[key] for row in summary["checkpoints"])
    return [float("nan") if value is None else value for value in values]


def _task(panel: Any, x: list[float], summary: Mapping[str, Any]) -> None:
    panel.plot(x, _column(summary, "accuracy"), "o-", color=_BLUE, label="accuracy")
    corrupt = _column(summary, "accuracy_corrupt")
    panel.plot(x, corrupt, ":", color=_BLUE, label="accuracy, corrupt prompts")
    panel.set_ylim(-0.03, 1.03)
    panel.set_ylabel("accuracy")
    right = panel.twinx()
    right.plot(x, _column(summary, "metric"), "s-", color=_GREEN, label=summary["metric"])
    right.plot(x, _column(summary, "loss"), "^-", color=_VERMILION, label="loss of the answer")
    right.set_ylabel(f"{summary['metric']}, loss (nats)")
    right.spines[["top"]].set_visible(False)
    lines = [*panel.get_lines(), *right.get_lines()]
    names = [line.get_label() for line in lines]
    _legend(panel, lines, names)


def _edges(panel: Any, x: list[float], summary: Mapping[str, Any]) -> None:
    says = {"top": ("among the top", "s--", _GREY), "circuit": ("in the circuit", "o-", _BLUE)}
    for how, (label, marks, color) in says.items():
        if any(summary["edges_there"][how]):
            panel.plot(x, summary["edges_there"][how], marks, color=color, label=label)
    panel.set_ylim(-0.03, 1.03)
    panel.set_ylabel("final edges there to stay")
    _legend(panel)


def _overlap(panel: Any, x: list[float], summary: Mapping[str, Any]) -> None:
    panel.plot(x, _column(summary, "jaccard"), "o-", color=_BLUE, label="Jaccard with the final")
    chance = _column(summary, "jaccard_chance_high")
    panel.fill_between(x, 0, chance, color="0.8", label="random circuits (95 %)")
    known = _column(summary, "faithfulness_of_final")
    shown = [value if value != value else min(2.0, max(-1.0, value)) for value in known]
    panel.plot(x, shown, "s-", color=_GREEN, label="faithfulness of the final edges")
    panel.axhline(1, color="0.7", linewidth=1)
    panel.set_ylabel("overlap, faithfulness")
    _legend(panel)


def _heads(panel: Any, x: list[float], summary: Mapping[str, Any]) -> None:
    for behaviour, (name, color) in _ROLES.items():
        best = summary["best_heads"][behaviour]
        if best:
            label = f"{name} (last: {best[-1]['head']})"
            panel.plot(x, [one["score"] for one in best], "o-", color=color, label=label)
    panel.set_ylim(-0.03, 1.03)
    panel.set_ylabel("attention of the best head")
    if panel.get_legend_handles_labels()[0]:
        _legend(panel)


def _legend(panel: Any, *lines_and_names: Any) -> None:
    """Above the panel, where no line runs."""
    panel.legend(
        *lines_and_names, loc="lower left", bbox_to_anchor=(-0.01, 0.98), ncols=4, frameon=False,
        fontsize=8, handlelength=1.6, columnspacing=1.2,
    )  # fmt: skip
