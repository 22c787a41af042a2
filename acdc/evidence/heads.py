"""Why the heads of a circuit attend where they do, and what they carry from there.

For each head: where it attends (by its effect, :mod:`acdc.measure.heads`), which pairs of senders
its attention there is made of, how much of that is positions and how much content, what its value
reads and what it brings to the logits and to later heads of the circuit
(:mod:`acdc.evidence.head_reasons`), and its role by behaviour (:mod:`acdc.measure.roles`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from acdc.engine.experiment import Experiment
from acdc.errors import OptionError, UnknownNameError
from acdc.evidence.head_reasons import HeadReasons, circuit_heads, explain_heads, full_precision
from acdc.measure.heads import towards
from acdc.measure.roles import HeadNumbers, measure_roles, roles_of
from acdc.models.sizes import Sized
from acdc.runs.discover import fit
from acdc.runs.folder import Timer, save_summary, versions
from acdc.runs.opened import RunLike, open_run
from acdc.runs.reporter import Reporter, Silent
from acdc.runs.unseen import PromptChoice
from acdc.settings import MOST_REPEATS, Settings, check_count
from acdc.tasks import Pair, Task, Tokenizer
from acdc.tasks.split import select_pairs
from acdc.tasks.texts import Texts, visible
from acdc.terminal.shown import Shown
from graphs import Circuit
from graphs.text import short

__all__ = ["Heads", "heads"]


@dataclass(frozen=True, eq=False)
class Heads(Shown):
    """Why the heads of a circuit attend.

    Parameters
    ----------
    settings
        What it was measured on.
    heads
        The strongest first.
    n_left_out
        Heads of the circuit that are not among them.
    metric
        What direct effects are on, see :func:`acdc.measure.heads.towards`.
    metric_value
        Its mean on the clean prompts.
    roles
        Role -> heads of the whole model.
    numbers
        What the roles were found by.
    n_prompts, task_info
        The prompts.
    timings
        Seconds by phase.
    soft_cap
        Whether the model caps scores: what is explained is the score before that.
    warnings
        What one should know before believing it.
    prompt, tokens
        The one that was explained, and the texts of its tokens; None, and none, if all were.
    """

    settings: Settings
    heads: tuple[HeadReasons, ...]
    n_left_out: int
    metric: str
    metric_value: float
    roles: Mapping[str, Sequence[str]]
    numbers: HeadNumbers
    n_prompts: int
    task_info: dict[str, Any]
    timings: dict[str, float]
    soft_cap: bool = False
    warnings: tuple[str, ...] = ()
    prompt: int | None = None
    tokens: tuple[str, ...] = ()

    def __getitem__(self, head: str) -> HeadReasons:
        for one in self.heads:
            if one.head == head:
                return one
        raise UnknownNameError("explained head", head, [one.head for one in self.heads])

    def summary(self) -> dict[str, Any]:
        """Content of ``heads.json``."""
        return {
            "task": self.settings.task,
            "model": self.settings.model,
            "metric": self.metric,
            "metric_value": self.metric_value,
            "n_prompts": self.n_prompts,
            "prompt": self.prompt,
            "tokens": list(self.tokens),
            "task_info": self.task_info,
            "before_soft_cap": self.soft_cap,
            "roles": {role: list(names) for role, names in self.roles.items()},
            "numbers": {name: table for name, table in vars(self.numbers).items() if table},
            "n_left_out": self.n_left_out,
            "heads": [
                {**asdict(one), "composition": [asdict(x) for x in one.composition]}
                for one in self.heads
            ],
            "warnings": list(self.warnings),
            "timings": self.timings,
            "versions": versions(),
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write :meth:`summary` as ``heads.json`` into a folder, or as a ``.json`` file.

        Raises OutputError if the file exists, unless ``overwrite``, or cannot be written.
        """
        return save_summary(path, "heads.json", self.summary(), overwrite=overwrite)

    def __repr__(self) -> str:
        names = ", ".join(one.head for one in self.heads)
        return short(f"<Heads of {self.settings.task}: {names}>")


def heads(
    run: RunLike,
    names: Sequence[str] = (),
    *,
    task: Any = None,
    by: str | None = None,
    at: tuple[str, str] | None = None,
    prompt: int | None = None,
    seen: bool = False,
    max_heads: int = 20,
    reporter: Reporter | None = None,
    **asked: Any,
) -> Heads:
    """Explain where the heads of a circuit attend, and what they carry.

    Parameters
    ----------
    run
        Folder of a run, a circuit file, :class:`acdc.Run` or :class:`graphs.Circuit`.
    names
        Heads to explain, in the circuit or not; none: the circuit's.
    task
        As of :func:`acdc.discover`; None: the run's.  A circuit that comes alone needs one.
    by
        How places are called, see :func:`acdc.measure.places.find_places`.
    at
        Query and key place to explain; None: for each head the most telling ones.
    prompt
        Which prompt to explain, counted from 0; None: the mean over all.  What is usual at a
        position, and the roles, are of all prompts.
    seen
        Whether to measure on the prompts that discovery saw.
    max_heads
        At most so many of the circuit's, those of the largest scores; what they bring to later
        heads is found among these.
    reporter
        Told of progress.
    **asked
        Fields of :class:`acdc.settings.Settings` that are to be other than the run's.

    Raises
    ------
    UnknownNameError
        If the model has no head, or the prompts no place, of a name.
    OptionError
        If the circuit has no head, no query sees a key of the places, or a value makes no sense.

    Examples
    --------
    >>> import acdc
    >>> acdc.heads("runs/my-ioi")["a1.h0"].composition  # doctest: +SKIP
    """
    check_count("max_heads", max_heads, at_most=MOST_REPEATS)
    reporter, timer = reporter or Silent(), Timer()
    opened = open_run(run)
    circuit, settings = opened.circuit, opened.settings(task=task, **asked)
    _check_names(names, circuit)
    prompts = _Remembered(PromptChoice(opened.discovery_with(settings), seen))
    with timer.phase("load"), reporter.phase("load model and task", None):
        circuit, experiment = fit(circuit, settings, prompts)
    strengths = circuit_heads(circuit)
    if not strengths and not names:
        raise OptionError(f"{opened.name}: no head is in the circuit; name some with --head")
    with timer.phase("explain"), reporter.phase("heads", None):
        metric = towards(experiment)
        found = explain_heads(
            circuit, experiment, names, by=by, max_heads=max_heads, at=at, prompt=prompt
        )
        numbers = measure_roles(full_precision(experiment))
        roles = roles_of(numbers)
        values = replace(experiment, metric=metric, positions=None)
        pairs = experiment.task.pairs
        if prompt is not None:
            values = values.on(select_pairs(experiment.task, (pairs[prompt],)))
        value = values.plain("clean")
    kept = [one for one in found if not names or one.head in names]
    return Heads(
        settings,
        tuple(replace(one, roles=_own(roles, one.head)) for one in kept),
        0 if names else len(strengths) - len(kept),
        metric.name, value, roles, numbers, len(experiment.task), dict(experiment.task.info),
        timer.seconds,
        any(layer.attention.soft_cap is not None for layer in experiment.model.layers),
        tuple(_doubts(experiment)),
        prompt,
        () if prompt is None else prompts.texts(pairs[prompt]),
    )  # fmt: skip


class _Remembered:
    """A choice of prompts that remembers what their tokens are called."""

    def __init__(self, choice: PromptChoice) -> None:
        self._choice = choice
        self._tokenizer: Tokenizer | None = None

    def __call__(self, settings: Settings, model: Sized, tokenizer: Tokenizer | None) -> Task:
        self._tokenizer = tokenizer
        return self._choice(settings, model, tokenizer)

    def texts(self, pair: Pair) -> tuple[str, ...]:
        """Texts of a clean prompt's tokens."""
        texts = Texts(self._tokenizer, pair.clean[-1])
        return tuple(visible(texts(token)) for token in pair.clean)


def _own(roles: Mapping[str, Sequence[str]], head: str) -> tuple[str, ...]:
    return tuple(role for role, names in roles.items() if head in names)


def _doubts(experiment: Experiment) -> list[str]:
    metric = towards(experiment)
    found = []
    if metric is not experiment.metric:
        found.append(
            f"{experiment.metric.name} is flat at the clean run: direct effects are on "
            f"{metric.name} ({metric.description})"
        )
    elif not metric.linear:
        found.append(f"direct effects on {metric.name} are to first order")
    return found


def _check_names(names: Sequence[str], circuit: Circuit) -> None:
    shape = circuit.graph.shape
    known = [
        f"a{layer}.h{head}" for layer in range(shape.n_layers) for head in range(shape.n_heads)
    ]
    for name in names:
        if name not in known:
            raise UnknownNameError("head", name, known)
