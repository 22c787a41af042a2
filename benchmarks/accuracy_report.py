"""What ``acdc bench accuracy`` shows of its cells: a table, Markdown, ROC plots, the docs.

Everything here is a function of the stored cells alone, so that a file of results and what is
printed of it cannot differ.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table as RichTable

from acdc.errors import OutputError
from graphs.files.whole import MIB, read_text, write_whole

__all__ = [
    "BEGIN",
    "END",
    "check_readme",
    "markdown",
    "readme_table",
    "run_table",
    "update_readme",
    "write_report",
]

_MOST_README = 16 * MIB
BEGIN, END = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"

Cell = dict[str, Any]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_STYLES = ("-", "--", ":")
_MOST_NAMES = 12
_FAMILIES = {"tracr": "compiled", "planted": "planted", "trained": "trained"}
"""What the table of the docs calls models, by how their names begin."""


def run_table(cells: Iterable[Cell]) -> RichTable:
    """Return the table of the terminal: a section for each subject, a row for each method."""
    table = RichTable(title="methods against known circuits", title_justify="left")
    for i, name in enumerate(_COLUMNS):
        table.add_column(name, justify="right" if i > 2 else "left", no_wrap=True)
    for name, group in _by_subject(cells).items():
        table.add_section()
        table.add_row(f"[bold]{escape(name)}[/]")
        for cell in group:
            table.add_row(*(show(cell) for show in _COLUMNS.values()))
    return table


def _by_subject(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell["subject"], []).append(cell)
    return groups


def _of(cell: Cell, part: str, key: str) -> str:
    """One value of an agreement; a dash where there is none."""
    value = cell.get(part, {}).get(key)
    return "-" if value is None else f"{value:.3f}"


def _random(cell: Cell, part: str) -> str:
    """AUROC of random scores; a dash where it was not measured."""
    value = cell.get(part, {}).get("random")
    return "-" if value is None else f"{value['auroc']:.3f}"


def _area(cell: Cell, measure: str) -> str:
    """MIB's own number, of the sweep where the method has no ranking."""
    ranking = "signed" if measure == "CPR" else "absolute"
    areas = cell["areas"]
    value, low, high = areas.get(
        f"{measure} {ranking} linear nominal", areas.get(f"{measure} sweep linear nominal")
    )
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _wrong(cell: Cell) -> str:
    part = cell.get("edges", {})
    if part.get("auroc") is None:
        return "-"
    return f"{len(part['missed'])} / {len(part['extra'])}"


_COLUMNS: dict[str, Callable[[Cell], str]] = {
    "method": lambda cell: cell["method"],
    "metric": lambda cell: cell["request"]["metric"],
    "ablation": lambda cell: cell["request"]["intervention"],
    "edge AUROC": lambda cell: _of(cell, "edges", "auroc"),
    "random": lambda cell: _random(cell, "edges"),
    "edge AP": lambda cell: _of(cell, "edges", "average_precision"),
    "missed / extra": _wrong,
    "node AUROC": lambda cell: _of(cell, "nodes", "auroc"),
    "node AP": lambda cell: _of(cell, "nodes", "average_precision"),
    "CPR [95 %]": lambda cell: escape(_area(cell, "CPR")),
    "CMD [95 %]": lambda cell: escape(_area(cell, "CMD")),
    "edges at 0.9": lambda cell: f"{cell['sizes']['0.9']['n_edges']:,} of {cell['n_edges']:,}",
}

_LEGEND = (
    "Edges are scored as the reference fixes them (pairs of nodes where it does not tell q, k and "
    "v apart). AUROC: ACDC by circuits over thresholds, joined by stairs (pessimistic, as in its "
    "paper); the others by absolute score. Methods over nodes (nap, nap-ig, hisp, "
    "subnetwork-probing) rank an edge as the lower of its ends, so that other edges between true "
    "nodes rank as high as the true ones. AP: average precision; for ACDC of the ranking by the "
    "largest threshold that keeps an edge. EAP, GIM, NAP and HISP score by the gradient at the "
    "clean run, where mse, the metric of the compiled models, is flat: they see nothing there. "
    "What eap-ig hardly sees, as edges behind saturated attention, eap-acdc drops untested. "
    "Random: the mean of 100 random scorings of the edges; of nodes it may be off 0.5, since one "
    "with more edges has the largest of more scores. A "
    "dash: no circuit is known, or all or none of the items are in it."
)


def markdown(cells: Sequence[Cell]) -> str:
    """Return ``results.md``: every number of the terminal's table, and where methods fail."""
    known = [cell for cell in cells if "edges" in cell or "nodes" in cell]
    parts = [
        "# Methods against known circuits",
        "",
        "Made by `acdc bench accuracy`; settings, all conventions of CPR and CMD and the ROC "
        "curves are in `results.json`.",
        "",
        "## Edges: AUROC (average precision)",
        "",
        _grid(known, "edges"),
        "",
        _LEGEND,
        "",
        "## Nodes: AUROC (average precision)",
        "",
        _grid(known, "nodes"),
        "",
        "## Faithfulness",
        "",
        "CPR (higher is better; circuits by signed score) and CMD (0 is perfect; by absolute "
        "score) as MIB defines them: linear axis, nominal sizes. ACDC: the largest circuit of its "
        "sweep that fits. In brackets 95 % bootstrap intervals over prompts. Edges: size of the "
        "smallest circuit with faithfulness 0.9, by absolute score.",
        "",
        _faithfulness(cells),
        "",
        "## Where a method falls short",
        "",
        *_shortfalls(known),
    ]
    return "\n".join(parts) + "\n"


def readme_table(cells: Sequence[Cell]) -> str:
    """Return what stands between the markers of a page of docs: methods by groups of models."""
    known = [cell for cell in cells if _scored(cell, "edges")]
    groups = list(dict.fromkeys(map(_group, known)))
    counts = [len({c["subject"] for c in known if _group(c) == group}) for group in groups]
    titles = [f"{group} ({n})" for group, n in zip(groups, counts, strict=True)]
    rows = []
    for method in dict.fromkeys(cell["method"] for cell in known):
        own = [cell for cell in known if cell["method"] == method]
        parts = [_mean([c for c in own if _group(c) == group], "edges") for group in groups]
        least = min(own, key=lambda cell: cell["edges"]["auroc"])
        nodes = [c["nodes"]["auroc"] for c in own if _scored(c, "nodes")]
        rows.append(
            [
                method,
                *parts,
                f"**{_mean(own, 'edges')}**",
                f"{least['edges']['auroc']:.3f}",
                f"{sum(nodes) / len(nodes):.3f}" if nodes else "-",
            ]
        )
    by_chance = [_by_chance([c for c in known if _group(c) == group], "edges") for group in groups]
    of_nodes = _by_chance(known, "nodes").split(" ")[0]
    rows.append(["*random scores*", *by_chance, _by_chance(known, "edges"), "-", of_nodes])
    lines = _markdown_table(["method", *titles, "all", "least", "nodes"], rows)
    text = "\n".join(lines)
    return f"{text}\n\nLeast: AUROC of its worst model. Nodes: their mean AUROC. {_LEGEND}\n"


def _group(cell: Cell) -> str:
    """Where a cell's model is from, and under which ablation its circuit is known."""
    family = cell["model"].split("-")[0]
    return f"{_FAMILIES.get(family, family)}, {cell['request']['intervention']}"


def _grid(cells: Sequence[Cell], part: str) -> str:
    """Subjects by methods, and the mean of each method."""
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    groups = _by_subject(cells)
    rows = []
    for name, group in groups.items():
        by_method = {cell["method"]: cell for cell in group}
        values = [_both(by_method.get(method), part) for method in methods]
        size = next(
            (f"{c[part]['n_true']} of {c[part]['n_items']}" for c in group if part in c), ""
        )
        rows.append([name, size, *values, _by_chance(group, part)])
    means = [
        f"**{_mean([c for c in cells if c['method'] == method], part)}**" for method in methods
    ]
    best = [
        max((c[part]["auroc"] for c in g if _scored(c, part)), default=math.nan)
        for g in groups.values()
    ]
    best = [value for value in best if not math.isnan(value)]
    lines = _markdown_table(["model", f"true {part}", *methods, "*random*"], rows)
    lines.append("| " + " | ".join(["**mean**", "", *means, _by_chance(cells, part)]) + " |")
    if best:
        lines += [
            "",
            f"Best method of each model: mean AUROC {sum(best) / len(best):.3f}, least "
            f"{min(best):.3f}.",
        ]
    return "\n".join(lines)


def _scored(cell: Cell, part: str) -> bool:
    return cell.get(part, {}).get("auroc") is not None


def _both(cell: Cell | None, part: str) -> str:
    if cell is None or not _scored(cell, part):
        return "-"
    return f"{cell[part]['auroc']:.3f} ({cell[part]['average_precision']:.2f})"


def _by_chance(cells: Sequence[Cell], part: str) -> str:
    """What random scores get, on the mean over models; a dash where it was not measured."""
    found = {
        cell["subject"]: cell[part]["random"]
        for cell in cells
        if _scored(cell, part) and "random" in cell[part]
    }
    if not found:
        return "-"
    areas = ("auroc", "average_precision")
    auroc, precision = (sum(x[a] for x in found.values()) / len(found) for a in areas)
    return f"{auroc:.3f} ({precision:.2f})"


def _mean(cells: Sequence[Cell], part: str) -> str:
    scored = [cell[part] for cell in cells if _scored(cell, part)]
    if not scored:
        return "-"
    auroc = sum(agreement["auroc"] for agreement in scored) / len(scored)
    precision = sum(agreement["average_precision"] for agreement in scored) / len(scored)
    return f"{auroc:.3f} ({precision:.2f})"


def _faithfulness(cells: Sequence[Cell]) -> str:
    rows = [
        [
            cell["subject"],
            cell["method"],
            _area(cell, "CPR"),
            _area(cell, "CMD"),
            f"{cell['sizes']['0.9']['n_edges']:,} of {cell['n_edges']:,}",
        ]
        for cell in cells
    ]
    return "\n".join(_markdown_table(["model", "method", "CPR", "CMD", "edges"], rows))


def _shortfalls(cells: Sequence[Cell]) -> list[str]:
    """Missed and extra items of the best circuit wherever AUROC is below 1."""
    lines = []
    for cell in cells:
        for part in ("edges", "nodes"):
            if _scored(cell, part) and cell[part]["auroc"] < 1:
                found = cell[part]
                lines.append(
                    f"- {cell['subject']}, {cell['method']}: AUROC {found['auroc']:.3f} over "
                    f"{found['granularity']}; best circuit misses {_names(found['missed'])}, "
                    f"adds {_names(found['extra'])}"
                )
    return lines or ["Nowhere: every AUROC is 1."]


def _names(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    shown = ", ".join(f"`{name}`" for name in names[:_MOST_NAMES])
    return shown + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


# --- files --------------------------------------------------------------------------------


def write_report(cells: Sequence[Cell], folder: Path) -> list[str]:
    """Write ``results.md`` and the ROC plots; return the names of the files."""
    files: dict[str, str | bytes] = {"results.md": markdown(cells)}
    for part in ("edges", "nodes"):
        if any(_scored(cell, part) for cell in cells):
            for kind in ("svg", "png"):
                files[f"roc-{part}.{kind}"] = _plot(cells, part, kind)
    for name, content in files.items():
        write_whole(folder / name, content)
    return list(files)


def check_readme(path: Path) -> str:
    """Return a page's text; OutputError unless it has the two markers once, in order."""
    text = read_text(path, _MOST_README, OutputError)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise OutputError(
            f"{path}: expected the lines {BEGIN} and {END} once each, in this order: put them "
            "where the table goes"
        )
    return text


def update_readme(cells: Sequence[Cell], path: Path) -> None:
    """Replace what stands between a page's markers by the table of the cells."""
    text = check_readme(path)
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    write_whole(path, f"{before}{BEGIN}\n{readme_table(cells)}{END}{after}")


def _plot(cells: Sequence[Cell], part: str, kind: str) -> bytes:
    """ROC curves: one small plot for each subject, one line for each method, one legend."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    groups = {
        name: [cell for cell in group if _scored(cell, part)]
        for name, group in _by_subject(cells).items()
    }
    groups = {name: group for name, group in groups.items() if group}
    methods = list(dict.fromkeys(c["method"] for group in groups.values() for c in group))
    looks: dict[str, dict[str, Any]] = {
        method: {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _STYLES[i // len(_COLOURS)]}
        for i, method in enumerate(methods)
    }
    columns = min(4, len(groups))
    rows = math.ceil(len(groups) / columns)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "acdc"}):
        figure = Figure(figsize=(3 * columns, 3 * rows + 1.2), layout="constrained")
        lines: dict[str, Line2D] = {}
        for i, (name, group) in enumerate(groups.items()):
            axes = figure.add_subplot(rows, columns, i + 1)
            axes.plot([0, 1], [0, 1], color="0.85", linewidth=1)
            for cell in group:
                curve = cell[part]["roc"]
                (lines[cell["method"]],) = axes.plot(
                    curve["fpr"],
                    curve["tpr"],
                    drawstyle="steps-post" if curve["stairs"] else "default",
                    linewidth=1.4,
                    clip_on=False,
                    **looks[cell["method"]],
                )
            axes.set_title(f"{name} ({group[0][part]['granularity']})", fontsize=9)
            axes.set(xlim=(0, 1), ylim=(0, 1))
            axes.tick_params(labelsize=7)
        shown = [method for method in methods if method in lines]
        figure.legend(
            [lines[method] for method in shown],
            shown,
            loc="outside upper center",
            ncols=min(columns * 2, 7),
            fontsize=9,
            frameon=False,
        )
        figure.supxlabel("false positive rate", fontsize=10)
        figure.supylabel("true positive rate", fontsize=10)
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=120, metadata=metadata)
    return buffer.getvalue()
