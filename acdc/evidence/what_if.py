"""What a model says if nodes and edges of a circuit are acted on.

The metric on the task's prompts, next tokens and generated text, before and after: of the task's
prompts, or of prompts of one's own.  What an action makes an edge carry is said in
:mod:`acdc.measure.actions`; the model is run by :mod:`acdc.engine.acted`.

A prompt of one's own has no corrupt run unless one is given: so under ``resample`` what is ablated
carries means over the task's corrupt prompts (``mean``), and the result says so.  Actions are on
the run of the prompt itself, whatever direction the circuit was found in.  In generated text they
hold at every token; the corrupt run reads the same generated tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.ablations import OTHER_RUN
from acdc.engine.acted import ActedModel, Carried
from acdc.engine.batch import Batch
from acdc.engine.constants import Constants
from acdc.engine.experiment import Experiment
from acdc.engine.values import Values
from acdc.errors import OptionError
from acdc.measure.actions import ABLATED, CORRUPT, STEERED, Acted, Actions, steering
from acdc.models.sizes import Sized
from acdc.runs.building import with_constants
from acdc.runs.discover import fit
from acdc.runs.folder import Timer, save_summary, versions
from acdc.runs.opened import RunLike, open_run
from acdc.runs.reporter import Reporter, Silent
from acdc.runs.unseen import PromptChoice
from acdc.settings import Settings, check_count
from acdc.tasks import Task, Tokenizer
from acdc.tasks.files import encode
from acdc.tasks.texts import Texts
from acdc.terminal.shown import Shown
from graphs.text import short

__all__ = ["Looked", "NextToken", "WhatIf", "ablating", "what_if"]

_MOST_TOKENS = 10_000
_MOST_TOP = 1000


@dataclass(frozen=True)
class NextToken:
    """A next token and its probability.

    Parameters
    ----------
    token, text
        Its id, and its text behind the prompt.
    before, after
        Probability without and with the actions.
    """

    token: int
    text: str
    before: float
    after: float


@dataclass(frozen=True)
class Looked:
    """What the model says to a prompt.

    Parameters
    ----------
    prompt, corrupt
        Texts; of the corrupt prompt None if there is none.
    tokens
        Those most probable before or after, and the task's answers; by the larger probability.
    divergence
        KL divergence of the next token's distribution after from that before, nats.
    before, after
        Generated text; None if none was asked for.
    """

    prompt: str
    corrupt: str | None
    tokens: tuple[NextToken, ...]
    divergence: float
    before: str | None
    after: str | None


@dataclass(frozen=True, eq=False)
class WhatIf(Shown):
    """What a model says if its nodes and edges are acted on.

    Parameters
    ----------
    actions
        In words.
    looked
        By prompt.
    metric_before, metric_after
        Mean metric on the task's prompts, clean.
    about
        Task, model, metric, what is ablated carries (``intervention``), and which prompts.
    n_prompts
        Of the task.
    warnings
        What one should know.
    timings
        Seconds by phase.
    """

    actions: tuple[str, ...]
    looked: tuple[Looked, ...]
    metric_before: float
    metric_after: float
    about: dict[str, str]
    n_prompts: int
    warnings: tuple[str, ...]
    timings: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """Content of ``what-if.json``."""
        return {
            **self.about,
            "actions": list(self.actions),
            "n_prompts": self.n_prompts,
            "metric_before": self.metric_before,
            "metric_after": self.metric_after,
            "prompts_looked_at": [asdict(one) for one in self.looked],
            "warnings": list(self.warnings),
            "timings": self.timings,
            "versions": versions(),
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write :meth:`summary` as ``what-if.json`` into a folder, or as a ``.json`` file.

        Raises OutputError if the file exists, unless ``overwrite``, or cannot be written.
        """
        return save_summary(path, "what-if.json", self.summary(), overwrite=overwrite)

    def __repr__(self) -> str:
        change = f"{self.metric_before:.3g} -> {self.metric_after:.3g}"
        return short(f"<WhatIf: {', '.join(self.actions)}: {self.about['metric']} {change}>")


def what_if(
    run: RunLike,
    *,
    ablate: Sequence[str] = (),
    patch: Sequence[str] = (),
    scale: Mapping[str, float] | None = None,
    steer: Mapping[str, float] | None = None,
    only_circuit: bool = False,
    prompts: Sequence[str] = (),
    corrupt: Sequence[str] = (),
    generate: int = 0,
    top: int = 5,
    show: int = 3,
    task: Any = None,
    seen: bool = False,
    memory: int = 1 << 30,
    reporter: Reporter | None = None,
    **asked: Any,
) -> WhatIf:
    """Act on nodes and edges of a run, and look at what the model then says.

    Parameters
    ----------
    run
        Folder of a run, a circuit file, :class:`acdc.Run` or :class:`graphs.Circuit`.
    ablate
        Nodes and edges that carry what ablation says: the run's, or, of a ``resample`` run unless
        ``intervention`` asks for it, the mean over the task's corrupt prompts.
    patch
        Nodes and edges that carry what they do in the corrupt run of the prompt.
    scale, steer
        Node or edge -> factor of what it carries, or of the sender's mean difference between clean
        and corrupt prompts, which is added at every token.
    only_circuit
        Whether every edge outside the circuit is ablated.
    prompts, corrupt
        Prompts of one's own, and their corruptions, as many tokens each; none: those of the task.
    generate
        Tokens of text to generate, the most probable one each time.
    top
        Next tokens to show, before and after.
    show
        Prompts of the task to look at one by one.
    task, seen
        As of :func:`acdc.discover`, None: the run's; and whether on the prompts that it saw.
    memory
        Bytes that passes and evaluations may take, beside the weights.
    reporter
        Told of progress.
    **asked
        Fields of :class:`acdc.settings.Settings` that are to be other than the run's.

    Raises
    ------
    OptionError
        If there is nothing to do, or a value makes no sense.
    GraphError
        If there is no node or edge of a name.
    TaskError
        If a prompt cannot be read.

    Examples
    --------
    >>> import acdc
    >>> found = acdc.what_if("runs/ioi", ablate=["a4.h2"], generate=10)  # doctest: +SKIP
    >>> found.looked[0].after  # doctest: +SKIP
    """
    _check(prompts, corrupt, generate, top, show)
    actions = Actions(tuple(ablate), tuple(patch), scale or {}, steer or {}, only_circuit)
    reporter, timer = reporter or Silent(), Timer()
    opened = open_run(run)
    settings = opened.settings(task=task, **asked)
    choice = _Choice(PromptChoice(opened.discovery_with(settings), seen))
    with timer.phase("load"), reporter.phase("load model and task", None):
        constants = opened.constants(settings)
        circuit, experiment = fit(opened.circuit, settings, choice, constants, memory)
    acted = actions.on(circuit.graph, circuit.in_circuit)
    experiment = ablating(experiment, settings, asked, reporter)
    own = [_Prompt.read(experiment, choice.tokenizer, *row) for row in _pairs(prompts, corrupt)]
    _check_use(experiment, acted, own, generate)
    world = _World(experiment, acted)
    with timer.phase("measure"), reporter.phase("run the model", None):
        before, after = world.metrics()
        looked = [
            _look(world, prompt, choice.tokenizer, top, generate)
            for prompt in own or _Prompt.of_task(experiment, show)
        ]
    return WhatIf(
        tuple(actions.texts), tuple(looked), before, after, _about(settings, experiment),
        len(experiment.task), tuple(_warnings(settings, experiment, acted)), timer.seconds,
    )  # fmt: skip


def _check(
    prompts: Sequence[str], corrupt: Sequence[str], generate: int, top: int, show: int
) -> None:
    check_count("generate", generate, at_least=0, at_most=_MOST_TOKENS)
    check_count("top", top, at_most=_MOST_TOP)
    check_count("show", show)
    if corrupt and len(corrupt) != len(prompts):
        raise OptionError(
            f"{len(corrupt)} corrupt prompts for {len(prompts)} prompts: give one for each, in the "
            "same order"
        )


class _Choice:
    """Prompts of a task, and the tokenizer that they were read with."""

    def __init__(self, choice: PromptChoice) -> None:
        self._choice = choice
        self.tokenizer: Tokenizer | None = None

    def __call__(self, settings: Settings, model: Sized, tokenizer: Tokenizer | None) -> Task:
        self.tokenizer = tokenizer
        return self._choice(settings, model, tokenizer)


def ablating(
    experiment: Experiment, settings: Settings, asked: Mapping[str, Any], reporter: Reporter
) -> Experiment:
    """Return the experiment as one that acts on the prompts' own runs, its constants computed.

    Parameters
    ----------
    experiment, settings
        Of a run.
    asked
        What was asked to be other: under ``resample`` what is ablated carries means unless
        ``intervention`` is among it.
    reporter
        Told of progress.
    """
    intervention = settings.intervention
    if intervention == "resample" and "intervention" not in asked:
        intervention = "mean"
    found = replace(experiment, intervention=intervention, direction="noising", norms="live")
    return with_constants(found, found.memory, reporter)


def _pairs(prompts: Sequence[str], corrupt: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    yield from zip(prompts, corrupt or (None,) * len(prompts), strict=True)


@dataclass(frozen=True)
class _Prompt:
    """Tokens of a prompt and its corruption, and tokens that are to be shown."""

    clean: tuple[int, ...]
    corrupt: tuple[int, ...] | None
    at: int
    answers: tuple[int, ...] = ()
    spans: tuple[int, ...] | None = None

    @classmethod
    def read(
        cls, experiment: Experiment, tokenizer: Tokenizer | None, text: str, other: str | None
    ) -> _Prompt:
        """Read a text as the task's prompts are."""
        first = experiment.task.pairs[0].clean[:1]
        bos = () if tokenizer is None or first != (tokenizer.bos_token_id,) else first
        ids, others = (
            None if words is None else (*bos, *encode(words, tokenizer)) for words in (text, other)
        )
        assert ids is not None
        if not ids:
            raise OptionError("a prompt is empty: give some text")
        if others is not None and len(others) != len(ids):
            raise OptionError(
                f"prompt {text!r} has {len(ids)} tokens, the corrupt one {len(others)}: they must "
                "be equally long"
            )
        if len(ids) > experiment.model.n_ctx:
            raise OptionError(
                f"a prompt of {len(ids):,} tokens, but the model reads at most "
                f"{experiment.model.n_ctx:,}: shorten it"
            )
        return cls(ids, others, len(ids) - 1)

    @classmethod
    def of_task(cls, experiment: Experiment, n: int) -> list[_Prompt]:
        """The first prompts of a task, in the order of its batches."""
        pairs = {(pair.clean, pair.corrupt): pair for pair in experiment.task.pairs}
        rows = (
            (pairs[tuple(clean), tuple(corrupt)], batch)
            for batch in experiment.batches
            for clean, corrupt in zip(batch.clean.tolist(), batch.corrupt.tolist(), strict=True)
        )
        return [
            cls(
                pair.clean, pair.corrupt, pair.scored[-1], (*pair.answers, *pair.wrong_answers),
                batch.spans,
            )
            for pair, batch in islice(rows, n)
        ]  # fmt: skip


def _check_use(experiment: Experiment, acted: Acted, own: Sequence[_Prompt], generate: int) -> None:
    """Refuse what a prompt of one's own, or a generated text, does not have."""
    if experiment.is_partial:
        raise OptionError(
            "the run's graph holds a part of the edges only, as there are too many to write them "
            "all out: what-if is not built for it"
        )
    if experiment.n_spans > 1 and (own or generate):
        raise OptionError(
            "the run's nodes are split by spans of the task's prompts, which other prompts and "
            "generated text do not have: leave --prompt and --generate out"
        )
    if generate and not all(layer.attention.causal for layer in experiment.model.layers):
        raise OptionError("generate: the model reads both ways, it does not continue a text")
    needs_corrupt = CORRUPT in acted.needs or (
        ABLATED in acted.needs and experiment.ablation.carries == OTHER_RUN
    )
    if needs_corrupt and any(prompt.corrupt is None for prompt in own):
        raise OptionError(
            "patching carries what the corrupt prompt makes: give one with --corrupt for each "
            "--prompt, or ask for --ablate"
        )
    longest = max((len(prompt.clean) for prompt in own), default=0)
    if own and longest + generate > experiment.model.n_ctx:
        raise OptionError(
            f"generate {generate}: with a prompt of {longest:,} tokens that is more than the "
            f"{experiment.model.n_ctx:,} that the model reads"
        )


_FEWEST = 4
"""Prompts that are run together at least: products with fewer rows differ in the last bit."""


_Run = Callable[[Tensor, Tensor | None, Any], Tensor]
"""``(clean, corrupt, spans) -> [batch, pos, d_model]``."""


class _World:
    """The model with the actions, on any tokens."""

    def __init__(self, experiment: Experiment, acted: Acted) -> None:
        self.experiment, self.acted = experiment, acted
        self._model = ActedModel(experiment)
        self._steering = steering(experiment) if STEERED in acted.needs else None

    def before(self, clean: Tensor, corrupt: Tensor | None, spans: Any = None) -> Tensor:
        """``[batch, pos, d_model]``: what ``logits`` reads without the actions."""
        return self.experiment.model.forward(clean).at(("final", 0))

    def after(
        self, clean: Tensor, corrupt: Tensor | None, spans: tuple[int, ...] | None = None
    ) -> Tensor:
        """``[batch, pos, d_model]``: what ``logits`` reads with the actions."""
        carried = [
            Carried(self._values(name, clean.shape[1], corrupt), self.acted.shares[name])
            for name in sorted(self.acted.needs)
            if name != ABLATED or self.experiment.ablation.carries != "zero"
        ]
        return self._model.final(clean, self.acted.weights, carried, spans)

    def _values(self, name: str, n_pos: int, corrupt: Tensor | None) -> Values:
        if name == STEERED:
            assert self._steering is not None
            return self._steering
        constants: Constants | None = self.experiment.carried
        if name == ABLATED and constants is not None:
            return constants.at(n_pos)
        assert corrupt is not None
        return self.experiment.written(corrupt)

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """Yield prompts of a batch, as many at a time as fit."""
        each = self.experiment.footprint.evaluation(batch.clean.shape[1])
        yield from batch.even(max(_FEWEST, self.experiment.memory // each))

    def _rows(self, run: _Run, batch: Batch) -> Tensor:
        """``[row]``: metric of the rows of a batch."""
        found = []
        for part in self._parts(batch):
            final = run(part.clean, part.corrupt, part.spans)
            streams = final[:, part.scored].flatten(0, 1)
            found.append(self.experiment.measure_rows(streams, part))
        return torch.cat(found)

    @torch.no_grad()
    def metrics(self) -> tuple[float, float]:
        """Mean metric on the task's clean prompts, before and after."""
        batches = self.experiment.batches
        rows = ([self._rows(run, batch) for batch in batches] for run in (self.before, self.after))
        before, after = (float(self.experiment.per_prompt(of).mean()) for of in rows)
        return before, after


@torch.no_grad()
def _look(
    world: _World, prompt: _Prompt, tokenizer: Tokenizer | None, top: int, generate: int
) -> Looked:
    """What the model says to a prompt, before and after."""
    device = world.experiment.model.device
    clean = torch.tensor([prompt.clean], device=device)
    corrupt = None if prompt.corrupt is None else torch.tensor([prompt.corrupt], device=device)
    logs = [
        _log_probabilities(world, run(clean, corrupt, prompt.spans)[:, prompt.at])
        for run in (world.before, world.after)
    ]
    texts = Texts(tokenizer, prompt.clean[prompt.at])
    shown = {int(i) for log in logs for i in np.argsort(-log, kind="stable")[:top]}
    rows = [
        NextToken(i, texts(i), *(float(np.exp(log[i])) for log in logs))
        for i in shown | set(prompt.answers)
    ]
    rows.sort(key=lambda row: (-max(row.before, row.after), row.token))
    probable = np.exp(logs[0])
    divergence = float((probable * (logs[0] - logs[1])).sum())
    said: list[str | None] = [None, None]
    if generate:
        said = [
            _generated(run, world, prompt, tokenizer, generate)
            for run in (world.before, world.after)
        ]
    return Looked(
        _text(prompt.clean, tokenizer),
        None if prompt.corrupt is None else _text(prompt.corrupt, tokenizer),
        tuple(rows), divergence, *said,
    )  # fmt: skip


def _log_probabilities(world: _World, stream: Tensor) -> NDArray[np.float64]:
    """``[vocab]`` of ``stream [1, d_model]``."""
    logits = world.experiment.model.unembed(stream)[0]
    found: NDArray[np.float64] = torch.log_softmax(logits.double().cpu(), -1).numpy()
    return found


def _generated(
    run: Callable[[Tensor, Tensor | None], Tensor],
    world: _World,
    prompt: _Prompt,
    tokenizer: Tokenizer | None,
    n: int,
) -> str:
    """Continue a prompt by the most probable token each time, until the text ends."""
    device, clean, corrupt = world.experiment.model.device, prompt.clean, prompt.corrupt
    end = getattr(tokenizer, "eos_token_id", None)
    for _ in range(min(n, world.experiment.model.n_ctx - len(clean))):
        rows = [None if x is None else torch.tensor([x], device=device) for x in (clean, corrupt)]
        assert rows[0] is not None
        logits = world.experiment.model.unembed(run(rows[0], rows[1])[:, -1])
        token = int(logits[0].argmax())
        if token == end:
            break
        clean = (*clean, token)
        corrupt = None if corrupt is None else (*corrupt, token)
    whole, start = _text(clean, tokenizer), _text(prompt.clean, tokenizer)
    return whole.removeprefix(start)


def _text(ids: Sequence[int], tokenizer: Tokenizer | None) -> str:
    return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(list(ids))


def _about(settings: Settings, experiment: Experiment) -> dict[str, str]:
    return {
        "task": settings.task,
        "model": str(settings.model),
        "metric": experiment.metric.name,
        "intervention": experiment.intervention,
        "prompts": str(experiment.task.info["prompts"]),
    }


def _warnings(settings: Settings, experiment: Experiment, acted: Acted) -> Iterator[str]:
    """Warn of what differs from how the circuit was found."""
    if ABLATED in acted.needs and experiment.intervention != settings.intervention:
        yield (
            "what is ablated carries means over the task's corrupt prompts, not what a corrupt run "
            "makes: --intervention resample asks for that, where there are corrupt prompts"
        )
    if settings.direction == "denoising":
        yield (
            "the circuit was found in denoising: here the prompt's own run is acted on, which is "
            "noising"
        )
    if settings.norms == "frozen":
        yield "the circuit was found with frozen norms: here norms are live"
    if experiment.model.has_experts and settings.router == "frozen":
        yield (
            "routers are frozen: every token keeps the experts that the run without the actions "
            "has, in generated text too; on a run found with --router free they choose anew"
        )
