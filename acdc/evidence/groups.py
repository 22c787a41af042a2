"""More than one mechanism: prompts grouped by how the model processes them, a circuit for each.

Two tasks mixed in one file give every method one circuit that is faithful to both, and no circuit
of either.  So prompts are grouped first and a circuit is found for each group (data-driven circuit
discovery, arXiv 2605.09129; the grouping here is ours):

* a prompt's *profile* are its edges' attribution scores, scaled to length 1;
* a prompt whose scores are all 0 is in no group (label -1);
* profiles are joined by Ward's linkage; where no number of groups is given it is the one with the
  largest mean silhouette, and one group where that is below :data:`LEAST_SILHOUETTE`;
* fresh prompts belong to the group whose mean profile is nearest;
* every circuit is measured on the fresh prompts of every group: a circuit *fails* on another group
  if its faithfulness is farther from 1 there, by :data:`LEAST_LOSS` and beyond the interval of the
  difference, than that of the group's own circuit there and than its own at home (a circuit that
  is bad everywhere tells no groups apart).  Two groups *differ* if either's circuit fails on the
  other.  With fewer than :data:`LEAST_FRESH` fresh prompts of either nothing is said.

References
----------
Ward 1963; Rousseeuw 1987 (silhouettes); Kaufman & Rousseeuw 1990, "Finding Groups in Data" (below
0.25 "no substantial structure has been found").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import cdist, pdist, squareform

from acdc.engine.experiment import Experiment
from acdc.engine.work import Work
from acdc.errors import OptionError
from acdc.measure.ability import ability
from acdc.measure.evaluation import Evaluator, resampled_faithfulness
from acdc.methods import METHODS
from acdc.runs.building import with_constants
from acdc.runs.checks import check_discovery
from acdc.runs.claim import Claim, Claims
from acdc.runs.discover import circuit_info, prepare
from acdc.runs.folder import Timer, versions, write_folder
from acdc.runs.given import method_of, settings_of
from acdc.runs.prompts import Split, split_prompts
from acdc.runs.reporter import Reporter, Silent
from acdc.settings import MOST_RESAMPLES, Settings, check_count
from acdc.tasks import Task, Tokenizer
from acdc.tasks.files import write_pairs
from acdc.tasks.split import select_pairs
from acdc.tasks.texts import Texts
from acdc.terminal.shown import Shown
from graphs import Circuit, save_circuit
from graphs.files.whole import write_json
from graphs.pictures.draw import render, to_dot
from graphs.text import said, short

__all__ = ["LEAST_LOSS", "LEAST_SILHOUETTE", "Cross", "Group", "Groups", "choose_groups", "groups"]

LEAST_SILHOUETTE = 0.25
"""Mean silhouette of groups that are worth telling apart."""

LEAST_LOSS = 0.1
"""By how much less faithful a circuit is where it fails."""

ALPHA = 0.05
"""Level of all comparisons of groups together."""

LEAST_FRESH = 10
"""Fresh prompts of a group with fewer of which no circuit is said to fail there."""

_MOST_GROUPS = 8
_LEAST_PROMPTS = 4
"""Of a group."""

Profiles = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Group:
    """Prompts that the model processes alike, and their circuit.

    Parameters
    ----------
    fit, test
        Prompts that the circuit was found on, and fresh ones; None if no fresh one is nearest.
    circuit
        Of these prompts.
    claim
        How faithful it is.
    """

    fit: Task
    test: Task | None
    circuit: Circuit
    claim: Claim


@dataclass(frozen=True)
class Cross:
    """One group's circuit on the fresh prompts of another.

    Parameters
    ----------
    circuit, prompts
        Numbers of the groups.
    faithfulness
        Of that circuit there.
    loss, low, high
        By how much it is farther from 1 than the group's own circuit there and than itself on its
        own group's prompts, whichever is farther; and the interval of that, which holds for all
        comparisons together.  None where it is not defined.
    n_fresh
        Fresh prompts of the smaller of the two groups.
    """

    circuit: int
    prompts: int
    faithfulness: float | None
    loss: float | None = None
    low: float | None = None
    high: float | None = None
    n_fresh: int = 0

    @property
    def fails(self) -> bool | None:
        """Whether the circuit fails on these prompts; None where that cannot be told."""
        if self.loss is None or self.low is None or self.n_fresh < LEAST_FRESH:
            return None
        return self.loss >= LEAST_LOSS and self.low > 0


@dataclass(frozen=True, eq=False)
class Groups(Shown):
    """Prompts of a task in groups.

    Parameters
    ----------
    settings
        What was asked.
    labels
        ``[prompt]``: group of each prompt of the search; -1: none.
    silhouettes
        Number of groups -> mean silhouette, of all numbers that were tried.
    groups
        The largest first.
    crosses
        Every circuit on every other group's prompts.
    profiles
        ``[prompt, edge]`` attribution, not scaled.
    texts
        ``[prompt]``.
    warnings
        What one should know, a sentence each.
    timings
        Seconds by phase.
    """

    settings: Settings
    labels: Labels
    silhouettes: dict[int, float]
    groups: tuple[Group, ...]
    crosses: tuple[Cross, ...]
    profiles: Profiles
    texts: tuple[str, ...]
    warnings: tuple[str, ...]
    timings: dict[str, float]

    def differ(self, one: int, other: int) -> bool | None:
        """Whether the circuit of either group fails on the other; None where it cannot be told."""
        both = {one, other}
        fails = [cross.fails for cross in self.crosses if {cross.circuit, cross.prompts} == both]
        return True if any(fails) else (None if None in fails else False)

    def summary(self) -> dict[str, Any]:
        """Content of ``groups.json``."""
        return {
            **self.settings.plain(),
            "silhouettes": {str(n): value for n, value in self.silhouettes.items()},
            "groups": [
                {
                    "n_fit": len(group.fit),
                    "n_test": 0 if group.test is None else len(group.test),
                    "n_edges": group.circuit.n_edges,
                    "faithfulness": group.claim.faithfulness,
                    "faithfulness_interval": group.claim.as_dict()["faithfulness_interval"],
                    "warnings": list(group.claim.warnings),
                    "examples": [
                        text
                        for text, label in zip(self.texts, self.labels, strict=True)
                        if label == number
                    ][:3],
                }
                for number, group in enumerate(self.groups)
            ],
            "crosses": [vars(cross) | {"fails": cross.fails} for cross in self.crosses],
            "differ": [
                [one, other, self.differ(one, other)]
                for one, other in combinations(range(len(self.groups)), 2)
            ],
            "labels": self.labels.tolist(),
            "warnings": list(self.warnings),
            "timings": self.timings,
            "versions": versions(),
        }

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write ``groups.json`` and, of each group, prompts, circuit and picture.

        ``prompts-K.jsonl`` is a task file: :func:`acdc.discover` takes it.  Errors as of
        :meth:`acdc.runs.folder.Run.save`.
        """

        def fill(folder: Path) -> None:
            for number, group in enumerate(self.groups):
                write_pairs(folder / f"prompts-{number}.jsonl", group.fit.pairs)
                save_circuit(group.circuit, folder / f"circuit-{number}.json")
                dot = to_dot(group.circuit)
                for kind in ("svg", "png"):
                    render(dot, folder / f"circuit-{number}.{kind}")
            write_json(folder / "groups.json", self.summary())

        return write_folder(folder, fill, overwrite=overwrite)

    def __repr__(self) -> str:
        sizes = ", ".join(str(len(group.fit)) for group in self.groups)
        return short(
            f"<Groups of {len(self.labels)} prompts of {self.settings.task}: {len(self.groups)} "
            f"({sizes}), silhouette {said(self.silhouettes.get(len(self.groups)))}>"
        )


def groups(
    task: Any,
    n_groups: int | None = None,
    *,
    profile: str = "eap-ig",
    n_resamples: int = 1000,
    memory: int = 1 << 30,
    reporter: Reporter | None = None,
    **asked: Any,
) -> Groups:
    """Group the prompts of a task by how a model processes them; find the circuit of each group.

    Parameters
    ----------
    task
        As of :func:`acdc.discover`.
    n_groups
        How many; None: as many as the silhouettes say.
    profile
        Method whose scores, prompt by prompt, are compared.
    n_resamples
        Of the bootstrap over prompts.
    memory, reporter
        As of :func:`acdc.discover`.
    **asked
        As of :func:`acdc.discover`: ``method``, ``threshold``, ``n_edges`` ... are of the search
        for each group's circuit, whose size is chosen on the group's own prompts.

    Raises
    ------
    OptionError
        If the profile is of a method without scores, a prompt's scores are all 0, or there are
        too few prompts for the groups.

    Examples
    --------
    >>> import acdc
    >>> acdc.groups("mixed.jsonl", model="my-model")  # doctest: +SKIP
    """
    check_count("n_resamples", n_resamples, at_most=MOST_RESAMPLES)
    if n_groups is not None:
        check_count("groups", n_groups, at_most=1000)
    if METHODS[profile].over == "circuit":
        raise OptionError(f"profile {profile!r} gives no scores: choose eap-ig, eap or exact")
    reporter, timer = reporter or Silent(), Timer()
    settings = replace(check_discovery(settings_of(task, **asked)), n_select=0)
    with timer.phase("load"), reporter.phase("load model and task", None):
        able, experiment, _, tokenizer, _ = prepare(settings, memory)
    experiment = with_constants(experiment, memory, reporter)
    split = split_prompts(settings, experiment, tokenizer)
    n_fresh = 0 if split.test is None else len(split.test)
    with timer.phase("profiles"), reporter.phase("profiles", len(experiment.task) + n_fresh):
        work = Work(memory, reporter.advance)
        profiles = _profiles(experiment, profile, work)
        fresh = None if split.test is None else _profiles(experiment.on(split.test), profile, work)
    labels, silhouettes, blind = _grouped(profiles, n_groups)
    nearest = None if fresh is None else _nearest(fresh, profiles, labels)
    lab = _Lab(experiment, settings, split, labels, nearest)
    n = int(labels.max()) + 1
    with timer.phase("discover"), reporter.phase(f"discover ({settings.method})", n):
        found = [lab.group(number, memory) for number in range(n)]
        reporter.advance(n)
    with timer.phase("evaluate"), reporter.phase("evaluate", None):
        crosses = lab.crosses(found, n_resamples)
    return Groups(
        settings, labels, silhouettes, tuple(found), crosses, profiles,
        _texts(experiment.task, tokenizer),
        (*able.doubts, *split.warnings, *blind, *_of_groups(found, able.doubts)), timer.seconds,
    )  # fmt: skip


def _profiles(experiment: Experiment, method: str, work: Work) -> Profiles:
    """``[prompt, edge]``; OptionError if all scores are 0."""
    found = METHODS[method].scores_by_prompt(experiment, work=work)
    if not found.any():
        raise OptionError(
            f"every edge has score 0 on every prompt under metric {experiment.metric.name!r} and "
            f"profile {method!r}: choose another of them"
        )
    return found


def _unit(profiles: Profiles) -> Profiles:
    scaled: Profiles = profiles / np.linalg.norm(profiles, axis=1, keepdims=True)
    return scaled


def _grouped(
    profiles: Profiles, n_groups: int | None
) -> tuple[Labels, dict[int, float], list[str]]:
    """As :func:`choose_groups`, with prompts of no scores and what is to be said of them."""
    seen = profiles.any(1)
    labels = np.full(len(profiles), -1)
    labels[seen], silhouettes = choose_groups(profiles[seen], n_groups)
    n = int((~seen).sum())
    says = [f"{n} prompts are in no group: every edge has score 0 on them"] if n else []
    return labels, silhouettes, says


def choose_groups(
    profiles: Profiles, n_groups: int | None = None
) -> tuple[Labels, dict[int, float]]:
    """Group prompts by their profiles.

    Parameters
    ----------
    profiles
        ``[prompt, edge]``, none of them 0; their length plays no role.
    n_groups
        How many; None: as many as give the largest mean silhouette, at most 8, each of at least 4
        prompts; one if that is below :data:`LEAST_SILHOUETTE`.

    Returns
    -------
    tuple
        Labels ``[prompt]``, 0 for the largest group; and the mean silhouette by number of groups.

    Raises
    ------
    OptionError
        If there are fewer prompts than groups.
    """
    n = len(profiles)
    if n_groups is not None and n_groups > n:
        raise OptionError(f"{n_groups} groups of {n} prompts: ask for fewer, or give more prompts")
    if n < 2 or n_groups == 1:
        return np.zeros(n, dtype=np.int64), {}
    unit = _unit(profiles)
    tree, apart = linkage(unit, method="ward"), squareform(pdist(unit))
    most = min(_MOST_GROUPS, n // _LEAST_PROMPTS)
    wanted = range(2, most + 1) if n_groups is None else [n_groups]
    cuts = {k: fcluster(tree, k, criterion="maxclust") for k in wanted}
    values = {
        k: _silhouette(apart, cut)
        for k, cut in cuts.items()
        if n_groups is not None or np.bincount(cut)[1:].min() >= _LEAST_PROMPTS
    }
    if n_groups is not None and len(np.unique(cuts[n_groups])) < n_groups:
        raise OptionError(
            f"{n_groups} groups: the prompts have {len(np.unique(cuts[n_groups]))} different "
            "profiles that can be told apart, ask for fewer"
        )
    best = max(values, key=lambda k: values[k], default=1)
    if n_groups is None and values.get(best, 0.0) < LEAST_SILHOUETTE:
        return np.zeros(n, dtype=np.int64), values
    return _by_size(cuts[best]), values


def _silhouette(apart: NDArray[np.float64], labels: NDArray[Any]) -> float:
    """Mean silhouette of a grouping; ``apart [prompt, prompt]`` are distances."""
    names, own, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if len(names) < 2:
        return 0.0
    sums = apart @ (labels[:, None] == names)  # [prompt, group]
    everyone = np.arange(len(labels))
    inside = sums[everyone, own] / np.maximum(sizes[own] - 1, 1)
    means = sums / sizes
    means[everyone, own] = np.inf
    outside = means.min(1)
    larger = np.maximum(inside, outside)
    values = np.where((sizes[own] == 1) | (larger == 0), 0.0, (outside - inside) / larger)
    return float(values.mean())


def _by_size(labels: NDArray[Any]) -> Labels:
    """The same groups, 0 the largest; ties by who comes first."""
    names, first, counts = np.unique(labels, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))
    rank = np.empty(len(names), dtype=np.int64)
    rank[order] = np.arange(len(names))
    found: Labels = rank[np.searchsorted(names, labels)]
    return found


def _nearest(fresh: Profiles, profiles: Profiles, labels: Labels) -> Labels:
    """``[fresh prompt]``: the group whose mean profile is nearest; -1 where all scores are 0."""
    means = [_unit(profiles[labels == n]).mean(0) for n in range(int(labels.max()) + 1)]
    seen = fresh.any(1)
    found = np.full(len(fresh), -1)
    found[seen] = cdist(_unit(fresh[seen]), np.stack(means)).argmin(1)
    return found


@dataclass(frozen=True, eq=False)
class _Lab:
    """What groups are found and measured with."""

    experiment: Experiment
    settings: Settings
    split: Split
    labels: Labels
    nearest: Labels | None

    def group(self, number: int, memory: int) -> Group:
        """Find the circuit of a group, and measure it on the group's fresh prompts."""
        fit, test = _part(self.experiment.task, self.labels == number), None
        if self.split.test is not None and self.nearest is not None:
            own = self.nearest == number
            test = _part(self.split.test, own) if own.any() else None
        experiment = self.experiment.on(fit)
        found = method_of(self.settings).search(experiment, self.settings, Work(memory)).circuit
        most = experiment if test is None or len(test) < len(fit) else experiment.on(test)
        claims = Claims(experiment, Split(None, test), ability(most))
        claim = claims.of(found, Evaluator(experiment).evaluate(found.in_circuit))
        info = circuit_info(experiment, self.settings, claim.faithfulness)
        return Group(fit, test, replace(found, info={**info, "group": number}), claim)

    def crosses(self, found: list[Group], n_resamples: int) -> tuple[Cross, ...]:
        """Measure every circuit on every group's fresh prompts."""
        circuits = [group.circuit.in_circuit for group in found]
        told = [g.test is not None and g.claim.faithfulness is not None for g in found]
        shares, drawn = {}, {}  # by (circuit, prompts): faithfulness, and how far off on resamples
        for prompts, group in enumerate(found):
            if group.test is None or not told[prompts]:
                continue
            evaluator = Evaluator(self.experiment.on(group.test))
            values = np.stack([evaluator.values(mask) for mask in circuits])
            full, empty = evaluator.full_values, evaluator.empty_values
            some = resampled_faithfulness(values, full, empty, n_resamples, seed=prompts)
            found_there = (values.mean(1) - empty.mean()) / (full.mean() - empty.mean())
            for circuit, share in enumerate(found_there.tolist()):
                shares[circuit, prompts] = share
                drawn[circuit, prompts] = np.abs(some[:, circuit] - 1)
        tail = ALPHA / max(1, len(found) * (len(found) - 1)) / 2
        rows = []
        for circuit, prompts in permutations(range(len(found)), 2):
            there = shares.get((circuit, prompts))
            if there is None or not told[circuit]:
                rows.append(Cross(circuit, prompts, there))
                continue
            homes = (prompts, prompts), (circuit, circuit)
            loss = abs(there - 1) - max(abs(shares[home] - 1) for home in homes)
            more = drawn[circuit, prompts] - np.maximum(*(drawn[home] for home in homes))
            low, high = np.nanquantile(more, (tail, 1 - tail))
            tests = (found[circuit].test, found[prompts].test)
            n_fresh = min(0 if test is None else len(test) for test in tests)
            rows.append(Cross(circuit, prompts, there, loss, float(low), float(high), n_fresh))
        return tuple(rows)


def _of_groups(found: list[Group], known: tuple[str, ...]) -> list[str]:
    """What is to be said of each group."""
    says = []
    for number, group in enumerate(found):
        n = 0 if group.test is None else len(group.test)
        few = [f"{n} fresh prompts: no circuit is said to fail there"] if n < LEAST_FRESH else []
        own = [warning for warning in group.claim.warnings if warning not in known]
        says += [f"group {number}: {warning}" for warning in (*own, *few)]
    return says


def _part(task: Task, chosen: NDArray[np.bool_]) -> Task:
    pairs = tuple(pair for pair, take in zip(task.pairs, chosen, strict=True) if take)
    return select_pairs(task, pairs)


def _texts(task: Task, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    texts = Texts(tokenizer)
    return tuple("".join(map(texts, pair.clean)).strip() for pair in task.pairs)
