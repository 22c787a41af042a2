"""One task under several corruptions and interventions: which edges are always found.

What an ablated edge carries, and what the corrupted prompt leaves as it was, decides which edges
there are to be found: what both prompts need alike is no edge under that corruption.  So one
circuit is found per condition, with everything else equal, and they are compared edge by edge.

A folder holds a run per condition, ``conditions.json``, ``edges.csv`` (which edge is in which), and
one diagram of all, ``conditions.svg`` and ``conditions.png``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from acdc.ablations import ABLATIONS
from acdc.errors import OptionError, UnknownNameError
from acdc.runs.checks import check_discovery
from acdc.runs.claim import collected
from acdc.runs.discover import discover
from acdc.runs.folder import Run, versions, write_folder
from acdc.runs.given import settings_of, spec_of
from acdc.runs.reporter import Reporter, Silent
from acdc.settings import Settings
from acdc.terminal.shown import Shown
from graphs.files.whole import write_json, write_whole
from graphs.known.several import Several, compare_several, to_dot_several
from graphs.pictures.draw import render
from graphs.text import short

__all__ = ["Conditions", "chosen_corruptions", "conditions"]

ALL = "all"
_MOST_NAMED = 4


@dataclass(frozen=True, eq=False)
class Conditions(Shown):
    """Circuits of one task, one per condition.

    Parameters
    ----------
    settings
        What was asked, with the first condition.
    labels
        What each condition is called: its corruption and intervention, of those that differ.
    runs
        One per condition.
    """

    settings: Settings
    labels: tuple[str, ...]
    runs: tuple[Run, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What one should know before believing them, each once with its conditions."""
        claims = (run.claim for run in self.runs)
        return collected(dict(zip(self.labels, claims, strict=True)))

    @cached_property
    def found(self) -> Several:
        """Which edges and nodes are in which circuit."""
        return compare_several(*(run.circuit for run in self.runs))

    def summary(self) -> dict[str, Any]:
        """Content of ``conditions.json``."""
        edges, nodes = self.found.edges, self.found.nodes
        counts = [len(at) for at in edges.members.values()]
        n = len(self.runs)
        return {
            **self.settings.plain(),
            "warnings": list(self.warnings),
            "conditions": [
                {
                    "label": label,
                    "corruption": run.details["task_info"].get("corruption"),
                    "intervention": run.settings.intervention,
                    "n_edges_kept": run.circuit.n_edges,
                    "faithfulness": run.faithfulness,
                    "faithfulness_seen": run.claim.faithfulness_seen,
                    "only_here": list(edges.only(i)),
                }
                for i, (label, run) in enumerate(zip(self.labels, self.runs, strict=True))
            ],
            "n_edges_total": self.runs[0].circuit.graph.n_edges,
            "n_edges_by_count": {str(k): counts.count(k) for k in range(n, 0, -1)},
            "jaccard": [[edges.jaccard(i, j) for j in range(n)] for i in range(n)],
            "common_edges": list(edges.common),
            "common_nodes": list(nodes.common),
            "edges": {name: [self.labels[i] for i in at] for name, at in edges.members.items()},
            "versions": versions(),
        }

    def dot(self) -> str:
        """Return one diagram of all, as DOT."""
        n = len(self.labels)
        which = ", ".join(self.labels) if n <= _MOST_NAMED else f"{n} conditions"
        title = f"{self.settings.task} \u00b7 {self.settings.model} \u00b7 {which}"
        return to_dot_several([run.circuit for run in self.runs], title=title)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the folder, all files or none; errors as :meth:`acdc.runs.folder.Run.save`."""
        return write_folder(folder, self._fill, overwrite=overwrite)

    def _fill(self, folder: Path) -> None:
        for label, run in zip(self.labels, self.runs, strict=True):
            (folder / label).mkdir()
            run.fill(folder / label)
        dot = self.dot()
        for kind in ("svg", "png"):
            render(dot, folder / f"conditions.{kind}")
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("edge", "n_conditions", *self.labels))
        for name, at in self.found.edges.members.items():
            rows.writerow((name, len(at), *(int(i in at) for i in range(len(self.runs)))))
        write_whole(folder / "edges.csv", text.getvalue())
        write_json(folder / "conditions.json", self.summary())

    def __repr__(self) -> str:
        return short(f"<Conditions {', '.join(self.labels)}: edges {self.found.edges!r}>")


def conditions(
    task: Any,
    corruptions: Sequence[str] | None = None,
    interventions: Sequence[str] | None = None,
    *,
    reporter: Reporter | None = None,
    **options: Any,
) -> Conditions:
    """Find the circuit of a task under several corruptions and interventions.

    Parameters
    ----------
    task
        As of :func:`acdc.discover`.
    corruptions
        Of a built-in task; ``("all",)``: every one that it has; None: its default one (or
        ``corruption``).
    interventions
        What ablated edges carry; ``("all",)``: all but trained constants; None: ``intervention``.
    reporter
        Told of progress.
    **options
        As of :func:`acdc.discover`, the same for every condition; what only some interventions
        take (``mean_over``, ``optimal_steps``) goes to those, at least one.

    Raises
    ------
    UnknownNameError
        If a corruption or intervention is unknown.
    OptionError
        If there are fewer than two conditions, or one twice.

    Examples
    --------
    >>> import acdc
    >>> found = acdc.conditions("docstring", ("all",), method="eap-ig")  # doctest: +SKIP
    >>> found.found.edges.common  # doctest: +SKIP
    """
    reporter = reporter or Silent()
    given = settings_of(task, **_settings_of(options))
    by_corruption = chosen_corruptions(given, corruptions)
    by_intervention = _chosen_interventions(given, interventions)
    checked = {
        name: check_discovery(_under(given, name, by_intervention)) for name in by_intervention
    }
    pairs = [(c, i) for c in by_corruption for i in by_intervention]
    if len(pairs) < 2:
        raise OptionError("1 condition: give two corruptions or interventions to compare, or 'all'")
    labels = tuple(
        "-".join(
            part
            for part, differs in ((c, len(by_corruption) > 1), (i, len(by_intervention) > 1))
            if differs and part is not None
        )
        for c, i in pairs
    )
    runs: list[Run] = []
    sites = None
    with reporter.phase("discover under conditions", len(pairs)):
        for corruption, intervention in pairs:
            own = vars(checked[intervention]) | {"corruption": corruption}
            runs.append(discover(sites=sites, **{**options, **own}))
            sites = runs[0].circuit.graph.shape.site_at or None
            reporter.advance(1)
    asked = checked[by_intervention[0]].replace(corruption=by_corruption[0])
    return Conditions(asked, labels, tuple(runs))


def chosen_corruptions(asked: Settings, names: Sequence[str] | None) -> tuple[str | None, ...]:
    """Return corruptions by name, ``all`` being every one of a built-in task.

    Raises
    ------
    OptionError
        If the task brings its own corrupted prompts, or a name comes twice.
    UnknownNameError
        If the task has no such corruption.
    """
    if names is None:
        return (asked.corruption,)
    spec = spec_of(asked)
    if spec is None:
        raise OptionError(
            f"corruptions of {asked.task}: a task file brings its own corrupted prompts, leave "
            "them out"
        )
    return _chosen(f"corruption of task {spec.name}", names, tuple(spec.corruptions))


def _chosen_interventions(asked: Settings, names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return (asked.intervention,)
    known = tuple(name for name, ablation in ABLATIONS.items() if not ablation.trained)
    if tuple(names) == (ALL,):
        return known
    return _chosen("intervention", names, tuple(ABLATIONS))


def _under(settings: Settings, intervention: str, every: Sequence[str]) -> Settings:
    """Settings of an intervention, without what another one takes and it does not."""
    own, others = ABLATIONS[intervention], [ABLATIONS[name] for name in every]
    changes: dict[str, Any] = {"intervention": intervention}
    if not own.averages and any(one.averages for one in others):
        changes["mean_over"] = None
    if not own.trained and any(one.trained for one in others):
        changes["optimal_steps"] = Settings.optimal_steps
    return settings.replace(**changes)


def _chosen(what: str, names: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    if tuple(names) == (ALL,):
        return known
    for name in names:
        if name not in known:
            raise UnknownNameError(what, name, known)
    if len(set(names)) < len(names):
        raise OptionError(f"{what}: {', '.join(names)}: give each once")
    return tuple(names)


def _settings_of(options: dict[str, Any]) -> dict[str, Any]:
    """Options that are settings, not how the search is done."""
    return {name: value for name, value in options.items() if name not in ("memory", "strict")}
