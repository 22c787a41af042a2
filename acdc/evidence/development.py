"""One task at several checkpoints of a model's training: when its circuit comes to be.

At every checkpoint, on the same prompts, the task is measured and a circuit is searched with the
same settings; unless a size is asked for, with as many edges as the final checkpoint's has.  An
edge of the final circuit

* is *in the circuit from* the first checkpoint on from which every later one has it in its circuit;
  checkpoints that do not do the task have none (:mod:`acdc.measure.ability`): their circuits are
  shown and not claimed;
* is *among the top from* the first checkpoint on from which its score is always among as many
  largest ones as the circuits have edges, whether the task is done or not.

Jaccard indices with the final circuit stand beside those of random circuits of the same size
(:mod:`graphs.known.chance`).  Faithfulness of the final circuit in an earlier checkpoint: its edges
there, under the same ablation.  Behaviour of heads: :func:`acdc.measure.roles.measure_repeats`.

A folder holds a run per checkpoint, ``development.json``, ``checkpoints.csv``, ``edges.csv``,
``heads.csv``, and one picture, ``development.svg`` and ``development.png``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.engine.metrics import METRICS
from acdc.errors import ModelError, OptionError
from acdc.evidence.development_picture import draw
from acdc.files.folders import local_folder
from acdc.measure.curves import ranked_scores
from acdc.measure.evaluation import Evaluator
from acdc.measure.roles import measure_repeats
from acdc.models import MODELS, where_from
from acdc.models.steps import list_steps, split_step, step_number
from acdc.runs.checks import check_discovery
from acdc.runs.claim import Claim, Claims, collected
from acdc.runs.discover import discover, prepare
from acdc.runs.folder import Run, versions, write_folder
from acdc.runs.given import method_of, settings_of, spec_of
from acdc.runs.prompts import split_prompts
from acdc.runs.reporter import Reporter, Silent
from acdc.settings import MOST_RESAMPLES, Settings, check_count
from acdc.terminal.shown import Shown
from graphs import Circuit, compare
from graphs.files.whole import write_json, write_whole
from graphs.known.chance import Chance, chance_of_pair
from graphs.text import said, short

__all__ = ["BEHAVIOURS", "Checkpoint", "Development", "checkpoint_names", "develop"]

BEHAVIOURS = ("previous", "duplicate", "induction")
"""What is measured of heads."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model at one step of its training.

    Parameters
    ----------
    name, step
        Of the model, and how many steps it was trained; None where its name does not say.
    run
        The search in it; its circuit is claimed only where the task is done.
    metric, metric_corrupt
        Mean over the clean and over the corrupt prompts of the search.
    loss
        Mean negative log of the answers' probability on the clean prompts, nats; None where prompts
        have no answers.
    final
        The final circuit's edges in this checkpoint.
    top
        ``[edge]``: as many edges of the largest scores as the circuit may have; None of a method
        that does not choose by scores.
    jaccard, chance
        Edges in both this and the final circuit, as a share of those in either; and of random
        circuits in the place of this one (None: not drawn).
    heads
        Behaviour -> ``[layer, head]``.
    """

    name: str
    step: int | None
    run: Run
    metric: float
    metric_corrupt: float
    loss: float | None
    final: Claim
    top: Mask | None
    jaccard: float
    chance: Chance | None
    heads: dict[str, NDArray[np.float64]]

    @property
    def does_task(self) -> bool:
        """Whether a circuit is claimed, see :mod:`acdc.measure.ability`."""
        return not self.run.claim.ability["doubts"]

    def plain(self) -> dict[str, Any]:
        """Plain values, a row of ``checkpoints.csv``; heads apart."""
        ability = self.run.claim.ability
        return {
            "model": self.name,
            "step": self.step,
            "does_task": self.does_task,
            "metric": self.metric,
            "metric_corrupt": self.metric_corrupt,
            "accuracy": ability["accuracy_clean"],
            "accuracy_corrupt": ability["accuracy_corrupt"],
            "loss": self.loss,
            "n_edges": self.run.circuit.n_edges,
            "faithfulness": self.run.faithfulness,
            "faithfulness_of_final": self.final.faithfulness,
            "jaccard": self.jaccard,
            "jaccard_chance": None if self.chance is None else self.chance.mean,
            "jaccard_chance_high": None if self.chance is None else self.chance.high,
        }


@dataclass(frozen=True, eq=False)
class Development(Shown):
    """A task over the training of a model.

    Parameters
    ----------
    settings
        What was asked, in the final checkpoint.
    checkpoints
        In the order of training, two or more.
    """

    settings: Settings
    checkpoints: tuple[Checkpoint, ...]

    @property
    def final(self) -> Circuit:
        """The final checkpoint's circuit."""
        return self.checkpoints[-1].run.circuit

    @property
    def labels(self) -> tuple[str, ...]:
        """What each checkpoint is called: its step, or its place and name."""
        steps = [one.step for one in self.checkpoints]
        if None not in steps and len(set(steps)) == len(steps):
            return tuple(map(str, steps))
        return tuple(
            f"{i}-{one.name.strip('/').rpartition('/')[2]}"
            for i, one in enumerate(self.checkpoints, start=1)
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What one should know before believing it, each once with its checkpoints."""
        claims = (one.run.claim for one in self.checkpoints)
        return collected(dict(zip(self.labels, claims, strict=True)))

    @cached_property
    def births(self) -> dict[str, dict[str, str | None]]:
        """Edge of the final circuit -> label of the checkpoint from which on it is there to stay.

        Under ``circuit`` and ``top``, see the module; None where it is in none, or of a method
        without a ranking.
        """
        in_circuit = [
            one.run.circuit.in_circuit & one.does_task & self.final.in_circuit
            for one in self.checkpoints
        ]
        tops = [one.top for one in self.checkpoints]
        edges = np.flatnonzero(self.final.in_circuit)
        n = self.final.graph.n_edges
        found = {"circuit": _since(in_circuit, n), "top": _since(tops, n)}
        names = self.final.graph.edge_names(edges)
        labels = (*self.labels, None)
        return {
            name: {how: labels[since[edge]] for how, since in found.items()}
            for name, edge in zip(names, edges.tolist(), strict=True)
        }

    def there(self, how: str) -> list[float]:
        """Share of the final circuit's edges that are there to stay, by checkpoint.

        ``how`` is ``circuit`` or ``top``.
        """
        since = [birth[how] for birth in self.births.values()]
        total = max(1, len(since))
        early: set[str | None] = set()
        shares = []
        for label in self.labels:
            early.add(label)
            shares.append(sum(one in early for one in since) / total)
        return shares

    def best_heads(self, behaviour: str) -> list[tuple[str, float]]:
        """Return the head with the highest score of a behaviour, by checkpoint; empty: none."""
        found = []
        for one in self.checkpoints:
            if behaviour not in one.heads:
                return []
            scores = one.heads[behaviour]
            layer, head = np.unravel_index(int(scores.argmax()), scores.shape)
            found.append((f"a{layer}.h{head}", float(scores.max())))
        return found

    def summary(self) -> dict[str, Any]:
        """Content of ``development.json``."""
        rows = [one.plain() for one in self.checkpoints]
        best = {name: self.best_heads(name) for name in BEHAVIOURS}
        return {
            **self.settings.plain(),
            "n_prompts": self.checkpoints[-1].run.claim.prompts["fit"],
            "n_edges_total": self.final.graph.n_edges,
            "warnings": list(self.warnings),
            "checkpoints": [
                {"label": label, **row} for label, row in zip(self.labels, rows, strict=True)
            ],
            "edges_there": {how: self.there(how) for how in ("circuit", "top")},
            "births": self.births,
            "best_heads": {
                name: [{"head": head, "score": score} for head, score in scores]
                for name, scores in best.items()
            },
            "heads": {
                name: [one.heads[name].tolist() for one in self.checkpoints if name in one.heads]
                for name in BEHAVIOURS
            },
            "versions": versions(),
        }

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the folder, all files or none; errors as :meth:`acdc.runs.folder.Run.save`."""
        return write_folder(folder, self._fill, overwrite=overwrite)

    def _fill(self, folder: Path) -> None:
        for label, one in zip(self.labels, self.checkpoints, strict=True):
            (folder / label).mkdir()
            one.run.fill(folder / label)
        rows = [one.plain() for one in self.checkpoints]
        _write_csv(folder / "checkpoints.csv", list(rows[0]), [list(row.values()) for row in rows])
        _write_csv(folder / "edges.csv", *self._edges())
        _write_csv(folder / "heads.csv", *self._heads())
        summary = self.summary()
        for kind in ("svg", "png"):
            (folder / f"development.{kind}").write_bytes(draw(summary, kind))
        write_json(folder / "development.json", summary)

    def _edges(self) -> tuple[list[str], list[list[Any]]]:
        """Every edge of any circuit: births, and in which it is."""
        masks = [one.run.circuit.in_circuit for one in self.checkpoints]
        edges = np.flatnonzero(np.any(masks, axis=0))
        header = ["edge", "in_final", "in_circuit_from", "among_top_from", *self.labels]
        rows = []
        for name, edge in zip(self.final.graph.edge_names(edges), edges.tolist(), strict=True):
            birth = self.births.get(name, {"circuit": None, "top": None})
            own = [int(mask[edge]) for mask in masks]
            rows.append([name, own[-1], birth["circuit"], birth["top"], *own])
        return header, rows

    def _heads(self) -> tuple[list[str], list[list[Any]]]:
        """Every head's score of every behaviour, by checkpoint."""
        rows: list[list[Any]] = []
        for name in BEHAVIOURS:
            tables = [one.heads[name] for one in self.checkpoints if name in one.heads]
            for layer, head in np.ndindex(tables[0].shape) if tables else ():
                rows.append([name, f"a{layer}.h{head}", *(float(t[layer, head]) for t in tables)])
        return ["behaviour", "head", *self.labels], rows

    def __repr__(self) -> str:
        last = self.checkpoints[-1]
        return short(
            f"<Development of {self.settings.task} over {len(self.checkpoints)} checkpoints: "
            f"{self.final.n_edges:,} edges, faithfulness {said(last.run.faithfulness)}>"
        )


def develop(
    task: Any,
    models: str | Path | Sequence[Any],
    *,
    method: Any = "eap-ig",
    n_random: int = 200,
    memory: int = 1 << 30,
    reporter: Reporter | None = None,
    **asked: Any,
) -> Development:
    """Follow the circuit of a task through the checkpoints of a model.

    Parameters
    ----------
    task
        As of :func:`acdc.discover`.
    models
        Names of checkpoints, in a list or separated by commas, the final one last (where all names
        have a step: in any order); or one model or folder with checkpoints
        (:mod:`acdc.models.steps`), all of which are taken.
    method
        As of :func:`acdc.discover`.
    n_random
        Random circuits that an overlap is compared with; 0: none.
    memory, reporter
        As of :func:`acdc.discover`.
    **asked
        As of :func:`acdc.discover`, the same for every checkpoint.

    Raises
    ------
    OptionError
        If there are fewer than two checkpoints, or they are of different models or tokenizers.
    ModelError
        If one cannot be loaded.

    Examples
    --------
    >>> import acdc
    >>> found = acdc.develop("ioi", "training/checkpoints")  # doctest: +SKIP
    >>> found.births  # doctest: +SKIP
    """
    check_count("n_random", n_random, at_least=0, at_most=MOST_RESAMPLES)
    names = checkpoint_names(models)
    for name in names:
        where_from(name)  # a step that is not there is found before anything is computed
    first = settings_of(task, model=names[-1], method=method, **asked)
    settings = check_discovery(first)
    reporter = reporter or Silent()
    lab = _Lab(settings, memory, n_random)
    done: list[Checkpoint] = []
    with reporter.phase("discover by checkpoint", len(names)):
        final = lab.search(settings)
        done.append(lab.checkpoint(names[-1], final, final.circuit))
        reporter.advance(1)
        same = _same_size(settings, final)
        for name in reversed(names[:-1]):
            run = lab.search(same.replace(model=name))
            done.append(lab.checkpoint(name, run, final.circuit))
            reporter.advance(1)
    return Development(settings, tuple(reversed(done)))


def checkpoint_names(models: str | Path | Sequence[Any]) -> list[str]:
    """Return the names of checkpoints, the final one last; parameters and errors as of develop."""
    if isinstance(models, str | Path):
        asked = [part.strip() for part in str(models).split(",")]
    else:
        asked = [str(model) for model in models]
    names = _all_steps(asked[0]) if len(asked) == 1 else asked
    if not all(names) or len(set(names)) < len(names):
        raise OptionError(f"models {', '.join(asked)!r}: expected names of checkpoints, each once")
    if len(names) < 2:
        raise OptionError(
            f"models {', '.join(asked)!r}: {len(names)} checkpoint; give two or more, or a folder "
            "that holds them"
        )
    steps = [_step(name) for name in names]
    if None in steps:
        return names
    return [name for _, name in sorted(zip(steps, names, strict=True), key=lambda x: x[0] or 0)]


def _all_steps(name: str) -> list[str]:
    """Names of all checkpoints of one model or folder."""
    folder = MODELS.get(name) or local_folder(name, "model", "config.json", ModelError)
    if folder is None:
        raise OptionError(
            f"models {name!r}: no known model and no folder; name the checkpoints, as "
            f"{name}@1000,{name}@2000"
        )
    return [f"{name}@{step}" for step in list_steps(folder)]


def _step(name: str) -> int | None:
    """Step that a name says: that behind its ``@``, or its last folder."""
    _, step = split_step(name)
    return step_number(step or Path(name).name)


def _same_size(settings: Settings, final: Run) -> Settings:
    """Settings of the other checkpoints: the final one's, with as many edges where it chose."""
    sized = method_of(settings).size(method_of(settings).configured(settings), 1) is not None
    if settings.threshold is not None or settings.n_edges is not None or sized:
        return settings
    if not final.circuit.n_edges:
        raise OptionError(f"the circuit of {settings.model!r} has no edges: ask for a size")
    drawn = spec_of(settings) is not None  # of a file the same rows have to be left out
    n_select = None if drawn else final.details["n_select"]
    return settings.replace(n_edges=final.circuit.n_edges, n_select=n_select)


def _since(masks: Sequence[Mask | None], n_edges: int) -> list[int]:
    """``[edge]``: first place from which on all masks have it; ``len(masks)`` where none does."""
    known = [mask for mask in masks if mask is not None]
    if len(known) < len(masks):
        return [len(masks)] * n_edges
    stays = np.logical_and.accumulate(np.stack(known)[::-1])[::-1]
    since: list[int] = np.where(stays.any(0), stays.argmax(0), len(masks)).tolist()
    return since


def _write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_whole(path, text.getvalue())


@dataclass(eq=False)
class _Lab:
    """Searches and measures, on prompts that are the same for all checkpoints.

    Parameters
    ----------
    settings
        Of the final checkpoint's search.
    memory, n_random
        As of :func:`develop`.
    """

    settings: Settings
    memory: int
    n_random: int
    first: tuple[str, Experiment] | None = None

    def search(self, settings: Settings) -> Run:
        """Return the search in a checkpoint."""
        sites = None if self.first is None else self.first[1].graph.shape.site_at or None
        try:
            return discover(memory=self.memory, sites=sites, **vars(settings))
        except OptionError as error:
            raise OptionError(f"checkpoint {settings.model!r}: {error}") from error

    def checkpoint(self, name: str, run: Run, final: Circuit) -> Checkpoint:
        """Measure a checkpoint, and the final circuit in it."""
        settings = self.settings.replace(model=name)
        sites = run.circuit.graph.shape.site_at or None
        able, experiment, _, tokenizer, _ = prepare(settings, self.memory, sites)
        if run.constants is not None:
            experiment = replace(experiment, constants=run.constants)
        self._check(name, experiment)
        circuit = run.circuit
        if circuit is final:
            claim = run.claim
        else:
            split = split_prompts(settings, experiment, tokenizer)
            seen = Evaluator(experiment).evaluate(final.in_circuit)
            claim = Claims(experiment, split, able).of(final, seen)
        chance = None
        if self.n_random:
            at_chance = chance_of_pair(circuit, final, n=self.n_random).edges
            chance = None if at_chance is None else at_chance["jaccard"]
        heads = measure_repeats(experiment.model, _beginning(experiment))
        return Checkpoint(
            name,
            _step(name),
            run,
            experiment.plain("clean"),
            experiment.plain("corrupt"),
            _loss(experiment),
            claim,
            _top(experiment, run, run.settings.n_edges or final.n_edges),
            compare(circuit, final).edges.jaccard,
            chance,
            {behaviour: scores.double().numpy() for behaviour, scores in heads.items()},
        )

    def _check(self, name: str, experiment: Experiment) -> None:
        """Refuse a checkpoint of another model, or that reads the prompts otherwise."""
        if self.first is None:
            self.first = name, experiment
        final, other = self.first
        if experiment.graph.shape != other.graph.shape:
            raise OptionError(
                f"models {name!r} and {final!r} are no checkpoints of one model: one is of "
                f"{experiment.graph.shape}, the other of {other.graph.shape}"
            )
        if experiment.task.pairs != other.task.pairs:
            raise OptionError(
                f"models {name!r} and {final!r} read the prompts as other tokens: give checkpoints "
                "with one tokenizer"
            )


def _beginning(experiment: Experiment) -> tuple[int, ...]:
    """The token that all prompts begin with, if there is one: models expect it."""
    first = {pair.clean[0] for pair in experiment.task.pairs}
    return tuple(first) if len(first) == 1 else ()


def _loss(experiment: Experiment) -> float | None:
    """Negative log of the answers' probability on the clean prompts."""
    if not all(pair.answers for pair in experiment.task.pairs):
        return None
    return replace(experiment, metric=METRICS["nll"]).plain("clean")


def _top(experiment: Experiment, run: Run, n_edges: int) -> Mask | None:
    """``[edge]``: those of the largest scores, connected or not."""
    ranking = run.details.get("ranking")
    if ranking is None:
        return None
    scores = ranked_scores(experiment, run.circuit.scores, ranking)
    mask = np.zeros(len(scores), dtype=bool)
    mask[np.argsort(-scores, kind="stable")[:n_edges]] = True
    return mask & (scores > 0)
