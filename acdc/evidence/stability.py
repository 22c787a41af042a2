"""How often each edge is found: discovery repeated over draws of a task's prompts.

An edge that one draw of prompts finds and the next does not is no finding.  With corruptions,
templates or seeds of the method varied as well, circuits are found under every combination, and
:mod:`acdc.evidence.sources` says which of these the differences come from.  A folder holds
``stability.json`` (settings, one row per seed, versions, timings), ``edges.csv`` (in how many
runs each edge was kept), and of the edges kept often enough ``circuit.json`` and its pictures,
where an edge's score, and so its width, is the share of runs that kept it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acdc.errors import OptionError
from acdc.evidence.conditions import chosen_corruptions
from acdc.evidence.sources import FACTORS, Source, sources
from acdc.executors import HERE, Resources
from acdc.runs.checks import check_discovery
from acdc.runs.claim import collected
from acdc.runs.discover import discover
from acdc.runs.folder import Run, versions, write_folder
from acdc.runs.given import method_of, model_of, settings_of, spec_of
from acdc.runs.many import ALONE, all_of, check_named
from acdc.runs.reporter import Reporter, Silent
from acdc.settings import Settings, check_count
from acdc.tasks import Task, load_task
from acdc.terminal.shown import Shown
from graphs import Circuit, Graph, component_graph, save_circuit, write_whole
from graphs.files.whole import write_json
from graphs.pictures.draw import render, to_dot
from graphs.text import said, short

__all__ = ["Stability", "stability"]


_N_LISTED = 512
"""Prompts that a task's templates are counted in."""


@dataclass(frozen=True, eq=False)
class Stability(Shown):
    """Circuits of one task over seeds.

    Parameters
    ----------
    settings
        What was asked, with the first seed.
    seeds
        Of the prompts, one per run.
    graph
        The graph of all runs.
    masks
        ``[run, edge]``: what each run kept.
    faithfulness
        Of each run on prompts that it has not seen; None where there are none (under every
        combination of sources), it is undefined, or nothing can be claimed.
    timings
        Seconds by phase, over all runs.
    factors
        What was varied beside the seeds, see :mod:`acdc.evidence.sources`: its level in each run.
    faithfulness_seen
        Of each run on its own prompts; None where it is undefined or nothing can be claimed.
    warnings
        What one should know before believing the runs, each once with the runs that it is of.
    """

    settings: Settings
    seeds: tuple[int, ...]
    graph: Graph
    masks: NDArray[np.bool_]
    faithfulness: tuple[float | None, ...]
    timings: dict[str, float]
    factors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    faithfulness_seen: tuple[float | None, ...] = ()
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        s, sizes = self.settings, self.masks.sum(1)
        return short(
            f"<Stability of {s.method} on {s.task}: {len(self.seeds)} seeds, {min(sizes):,} to "
            f"{max(sizes):,} edges, mean Jaccard {said(self.overlap)}>"
        )

    @property
    def counts(self) -> NDArray[np.int64]:
        """``[edge]``: runs that kept it."""
        return self.masks.sum(0)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where the differences come from; empty where only prompts were varied."""
        return sources(self.masks, self.factors) if self.factors else ()

    @property
    def overlap(self) -> float:
        """Mean Jaccard index of two runs' circuits; 1 if all are equal."""
        pairs = [
            ((a & b).sum() / (a | b).sum() if (a | b).any() else 1.0)
            for a, b in combinations(self.masks, 2)
        ]
        return float(np.mean(pairs))

    def circuit(self, at_least: float = 0.5) -> Circuit:
        """Return the edges kept in at least this share of the runs; scores are the shares."""
        if not 0 < at_least <= 1:
            raise OptionError(f"at_least {at_least:g}: expected a share above 0, at most 1")
        shares = self.counts / len(self.seeds)
        what = "runs" if self.factors else "seeds"
        method = f"{self.settings.method}, share of {len(self.seeds)} {what}"
        info = {
            "task": Path(self.settings.task).stem,
            "model": self.settings.model,
            "method": method,
            "metric": self.settings.metric,
            "intervention": self.settings.intervention,
            "direction": self.settings.direction,
        }
        return Circuit(self.graph, shares, shares >= at_least - 1e-9, info)

    def summary(self) -> dict[str, Any]:
        """Plain values: settings, runs, and how many edges were kept in k of n runs."""
        counts = self.counts
        kept = np.flatnonzero(counts)
        order = kept[np.argsort(-counts[kept], kind="stable")]
        n = len(self.seeds)
        every_seen = self.faithfulness_seen or (None,) * n
        return {
            **self.settings.plain(),
            "warnings": list(self.warnings),
            "seeds": list(self.seeds),
            "runs": [
                {
                    "seed": seed,
                    **{name: levels[run] for name, levels in self.factors.items()},
                    "n_edges_kept": int(mask.sum()),
                    "faithfulness": value,
                    "faithfulness_seen": seen,
                }
                for run, (seed, mask, value, seen) in enumerate(
                    zip(self.seeds, self.masks, self.faithfulness, every_seen, strict=True)
                )
            ],
            "sources": [asdict(source) for source in self.sources],
            "n_edges_total": self.graph.n_edges,
            "n_edges_by_count": {str(k): int((counts == k).sum()) for k in range(n, 0, -1)},
            "mean_jaccard": self.overlap,
            "edges": {self.graph.edge_name(int(e)): int(counts[e]) for e in order},
            "timings": self.timings,
            "versions": versions(),
        }

    def save(self, folder: str | Path, *, at_least: float = 0.5, overwrite: bool = False) -> Path:
        """Write the folder, all files or none; errors as :meth:`acdc.runs.folder.Run.save`."""
        circuit = self.circuit(at_least)

        def write(folder: Path) -> None:
            summary = self.summary()
            write_json(folder / "stability.json", summary)
            text = io.StringIO()
            rows = csv.writer(text, lineterminator="\n")
            rows.writerow(("edge", "n_kept", "share"))
            for name, n_kept in summary["edges"].items():
                rows.writerow((name, n_kept, f"{n_kept / len(self.seeds):.4g}"))
            write_whole(folder / "edges.csv", text.getvalue())
            save_circuit(circuit, folder / "circuit.json")
            dot = to_dot(circuit)
            for kind in ("svg", "png"):
                render(dot, folder / f"circuit.{kind}")

        return write_folder(folder, write, overwrite=overwrite)


def stability(
    task: Any,
    n_seeds: int = 5,
    *,
    corruptions: Sequence[str] | None = None,
    n_templates: int = 1,
    n_method_seeds: int = 1,
    resources: Resources = ALONE,
    reporter: Reporter | None = None,
    **options: Any,
) -> Stability:
    """Discover a circuit from several draws of a task's prompts.

    With ``corruptions``, ``n_templates`` or ``n_method_seeds`` under every combination of these and
    of the draws: then the size of a circuit is chosen on the prompts that it is found on.

    Parameters
    ----------
    task
        As of :func:`acdc.discover`.
    n_seeds
        Runs, at least 2; their seeds count up from ``seed``.  Of a combination, draws of prompts;
        1 will do.
    corruptions
        Of a built-in task, as of :func:`acdc.conditions`: by name, or ``("all",)``.
    n_templates
        Templates of a built-in task, the most frequent ones: each run has prompts of one alone.
    n_method_seeds
        Seeds of the method, where it draws anything itself (it has an option ``seed``, as masks
        that are trained, or ``stable`` resamples prompts).
    resources
        Where runs run, and how many at a time: see :class:`acdc.executors.Resources`.  Seldom does
        it change a circuit: another number of threads rounds otherwise.
    reporter
        Told of progress.
    **options
        As of :func:`acdc.runs.discover.discover`.

    Raises
    ------
    OptionError
        If there are fewer than two seeds, or the task is a file none of whose rows are held
        out: then every seed has the same prompts.  If the method's seed is varied and it draws
        nothing, or templates with one draw of prompts each: their differences are the draws', too.
    """
    reporter = reporter or Silent()
    if corruptions is not None or n_templates > 1 or n_method_seeds > 1:
        counts = n_seeds, n_templates, n_method_seeds
        return _crossed(task, corruptions, counts, resources, reporter, options)
    if n_seeds < 2:
        raise OptionError(f"{n_seeds} seeds: expected at least 2, what one run finds is no share")
    check_count("seeds", n_seeds, at_most=10_000)
    settings = {name: value for name, value in options.items() if name != "memory"}
    asked = check_discovery(settings_of(task, **settings))
    if asked.holdout == 0:
        raise OptionError(
            f"task file {asked.task!r} has the same prompts for every seed with holdout 0: leave "
            "it out"
        )
    check_named(asked, resources)
    seeds = range(asked.seed, asked.seed + n_seeds)
    with reporter.phase("discover over seeds", n_seeds):
        calls = [{**options, **vars(asked.replace(seed=seed))} for seed in seeds]
        runs = _runs(calls, resources, reporter)
    return _found(asked, runs, tuple(run.settings.seed for run in runs))


def _runs(calls: Sequence[dict[str, Any]], resources: Resources, reporter: Reporter) -> list[Run]:
    """Discover with each of some options; latents and neurons are the first one's, for all."""
    (first,) = all_of(_discover, calls[:1], resources, reporter.advance)
    sites = first.circuit.graph.shape.site_at or None
    others = [{**options, "sites": sites} for options in calls[1:]]
    return [first, *all_of(_discover, others, resources, reporter.advance)]


def _discover(options: dict[str, Any]) -> Run:
    return discover(**options)


def _found(
    asked: Settings,
    runs: list[Run],
    seeds: tuple[int, ...],
    factors: Mapping[str, tuple[str, ...]] | None = None,
) -> Stability:
    timings: dict[str, float] = {}
    for run in runs:
        for phase, seconds in run.timings.items():
            timings[phase] = timings.get(phase, 0.0) + seconds
    return Stability(
        asked,
        seeds,
        _common_graph(runs),
        np.stack([run.circuit.in_circuit for run in runs]),
        tuple(run.faithfulness for run in runs),
        timings,
        factors or {},
        tuple(run.claim.faithfulness_seen for run in runs),
        collected(dict(zip(_labels(seeds, factors or {}), (r.claim for r in runs), strict=True))),
    )


def _labels(seeds: Sequence[int], factors: Mapping[str, tuple[str, ...]]) -> list[str]:
    """What each run is called: the levels of what was varied."""
    varied = {name: levels for name, levels in factors.items() if len(set(levels)) > 1}
    if not varied:
        return [f"seed {seed}" for seed in seeds]
    rows = zip(*varied.values(), strict=True)
    return [", ".join(f"{n} {level}" for n, level in zip(varied, row, strict=True)) for row in rows]


def _crossed(
    task: Any,
    corruptions: Sequence[str] | None,
    counts: tuple[int, int, int],
    resources: Resources,
    reporter: Reporter,
    options: dict[str, Any],
) -> Stability:
    """Discover under every combination of corruption, template, draw of prompts and seed."""
    for name, count in zip(("seeds", "n_templates", "n_method_seeds"), counts, strict=True):
        check_count(name, count, at_most=10_000)
    settings = {name: value for name, value in options.items() if name != "memory"}
    asked = check_discovery(settings_of(task, **settings))
    if spec_of(asked) is None:
        raise OptionError(
            f"task file {asked.task!r} has its own prompts: corruptions, templates and seeds of "
            "the method are varied of a built-in task"
        )
    n_draws, n_templates, n_seeds = counts
    if n_seeds > 1 and "seed" not in method_of(asked).option_names and asked.stable is None:
        raise OptionError(
            f"n_method_seeds {n_seeds}: method {asked.method} draws nothing, its seeds would all "
            "find the same; leave it out"
        )
    if n_templates > 1 and n_draws < 2:
        raise OptionError(
            f"n_templates {n_templates} with 1 draw of prompts: what is the template's and what "
            "the draw's cannot be told apart; give at least 2 seeds"
        )
    by_corruption = chosen_corruptions(asked, corruptions)
    model, tokenizer = model_of(asked)

    def prompts(
        draw: int, corruption: str | None, template: str | None, n: int | None = asked.n_prompts
    ) -> Task:
        return load_task(
            asked.task, tokenizer, n_prompts=n, seed=draw, corruption=corruption,
            template=template, d_vocab=model.d_vocab, d_vocab_out=model.d_vocab_out,
            n_ctx=model.n_ctx,
        )  # fmt: skip

    by_template = _templates(prompts(asked.seed, by_corruption[0], None, _N_LISTED), n_templates)
    draws, seeds = (range(asked.seed, asked.seed + n) for n in (n_draws, n_seeds))
    levels = list(product(by_corruption, by_template, draws, seeds))
    if len(levels) < 2:
        raise OptionError("1 run: give two corruptions, templates or seeds at least")
    check_named(asked, resources)
    given = asked.given | ({"model": (model, tokenizer)} if resources.name == HERE else {})
    calls = []
    for corruption, template, draw, seed in levels:
        own = asked.replace(
            seed=seed, corruption=None, holdout=0.0, n_prompts=None, n_select=None, n_test=None,
            given=given,
        )  # fmt: skip
        calls.append({**options, **vars(own), "task": prompts(draw, corruption, template)})
    with reporter.phase("discover over sources", len(levels)):
        runs = _runs(calls, resources, reporter)
    columns = tuple(tuple(map(str, column)) for column in zip(*levels, strict=True))
    return _found(
        asked,
        runs,
        tuple(seed for _, _, _, seed in levels),
        dict(zip(FACTORS, columns, strict=True)),
    )


def _templates(task: Task, n: int) -> tuple[str | None, ...]:
    """The most frequent templates of a task's prompts; None, for any, if there is to be one."""
    if n == 1:
        return (None,)
    known = task.info["templates"]
    if n > len(known):
        raise OptionError(
            f"n_templates is {n}, but the prompts of task {task.name!r} have {len(known)}: ask for "
            "at most that many"
        )
    return tuple(sorted(known, key=lambda name: -known[name])[:n])


def _common_graph(runs: list[Run]) -> Graph:
    """Return the one graph of all runs; their prompts may show more orders of its spans."""
    shapes = [run.circuit.graph.shape for run in runs]
    first = shapes[0]
    for run, shape in zip(runs, shapes, strict=True):
        if (shape.spans, shape.scored_spans) != (first.spans, first.scored_spans):
            raise OptionError(
                f"seed {run.settings.seed} gives prompts of {len(shape.spans)} spans, seed "
                f"{runs[0].settings.seed} of {len(first.spans)}: their edges cannot be counted "
                "together; split by 'span', or not at all"
            )
    if all(shape == first for shape in shapes):
        return runs[0].circuit.graph
    reach = np.logical_or.reduce([shape.reach for shape in shapes])
    reaches = tuple((int(s), int(t)) for s, t in np.argwhere(reach))
    return component_graph(replace(first, reaches=reaches))
