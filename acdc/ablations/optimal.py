"""Optimal ablation: the constant that a sender's ablation costs least with.

Li & Janson 2024, "Optimal ablation for interpretability", arXiv 2409.09951: a component that is
replaced by zero, by its mean or by another run's value hurts a model not only by what is missing
but by what is put in its place ("spoofing").  So it is replaced by ::

    c* = argmin over c of  E[ KL(model's output || output with c in the component's place) ]

the same constant for every prompt and every position.  As in the paper's section on single
components, each sender's constant is trained with that sender alone replaced, by Adam, from the
mean (over :func:`acdc.ablations.mean.ablated_prompts`).  The expectation is over the prompts
of the run that ablation starts from (noising: the clean ones, denoising: the corrupt ones) and
their scored positions; nothing is asked of the answers.  Where the experiment's metric compares
whole outputs itself (mse), it takes the place of the divergence: compiled models have logits that
are no log-probabilities.

Constants are of what tells senders apart (:mod:`acdc.engine.values`): of heads z, before W_O, of
latents their activation.  A step sees few prompts, in turn, and the learning rate
falls to zero; there is nothing random, so no seed.  At the end a constant that does no better than
the mean on all prompts gives way to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from acdc.ablations.base import ablation
from acdc.ablations.mean import ablated_prompts, mean_constants
from acdc.engine.batch import Batch, sum_of
from acdc.engine.constants import Constants
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import at_least_float32, get_metric
from acdc.engine.processes import Numbers, by_chunk, here
from acdc.engine.steps import in_steps
from acdc.engine.values import Values
from acdc.engine.work import Work
from acdc.models.lowering.model import Trace
from acdc.settings import Settings

__all__ = ["optimal", "optimal_constants"]

_RATE = 0.2
"""Learning rate at the start, in standard deviations of what the sender writes."""

_PROMPTS = 8
"""Prompts that a step sees, a power of two."""

_NOTHING = 1e-5
"""Share of the largest loss of a mean below which a sender keeps its mean."""


@dataclass(eq=False)
class _Group:
    """Constants that are trained together: those of a block.

    Attributes
    ----------
    block
        Position in :attr:`Program.blocks`.
    start
        ``[sender, width]``: the means.
    scale
        ``[sender, 1]``: standard deviations.
    moved
        ``[sender, width]``: what is trained, in standard deviations from the mean.
    """

    block: int
    start: Tensor
    scale: Tensor
    moved: Tensor

    @property
    def values(self) -> Tensor:
        """``[sender, width]``: the constants at this step."""
        return self.start + self.scale * self.moved

    @property
    def every(self) -> Tensor:
        """Indices of all senders."""
        return torch.arange(len(self.start), device=self.start.device)


@ablation(
    "optimal", "the constant that it costs least to replace the sender by, trained", trained=True
)
def optimal(experiment: Experiment, work: Work | None = None) -> Constants:
    """Constants trained in the experiment's number of steps."""
    work = work or Work()
    return optimal_constants(
        experiment,
        experiment.training_steps,
        memory=work.memory,
        progress=work.progress,
        note=work.note,
    )


@torch.enable_grad()
def optimal_constants(
    experiment: Experiment,
    steps: int = Settings.optimal_steps,
    *,
    memory: int = 1 << 30,
    progress: Callable[[int], None] = lambda n_steps: None,
    note: Callable[[str], None] = lambda text: None,
) -> Constants:
    """Train a constant for every sender.

    A step runs the part of the model behind every sender forward and backward on eight prompts;
    senders of one layer are scenarios on one axis.

    Parameters
    ----------
    experiment
        Model, prompts, metric and direction; its intervention plays no role.
    steps
        Of Adam.  Senders whose ablation with the mean costs nothing (1e-5 of the largest such
        loss) are not trained.
    memory
        Bytes that the activations of one pass may take.
    progress
        Called with 1 after each step.
    note
        Told the mean loss over senders after each step.

    Returns
    -------
    Constants
        With the losses by sender on all prompts, of the mean and of the constant, in its report.
    """
    metric = experiment.metric if experiment.metric.compares else get_metric("kl")
    trainer = replace(experiment, metric=metric, intervention="mean", constants=None)
    longest = max(len(pair.clean) for pair in trainer.task.pairs)
    trainer, seen = in_steps(trainer, _PROMPTS, _bytes_per_prompt(trainer, longest), memory)
    groups = _groups(trainer)
    cases = [
        _Case.of(trainer, batch) if here().owns(i) else None
        for i, batch in enumerate(trainer.batches)
    ]
    before = _losses_of_all(trainer, cases, groups, memory)
    largest = torch.cat(before).max()
    trained = [(loss > _NOTHING * largest).nonzero()[:, 0] for loss in before]
    optimizer = torch.optim.Adam([group.moved for group in groups], lr=_RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _RATE * (1 + math.cos(math.pi * step / steps)) / 2
        of_step, total = seen[step % len(seen)], 0.0
        for group, which in zip(groups, trained, strict=True):
            loss, group.moved.grad = _gradient(trainer, cases, of_step, group, which, memory)
            total += loss
        optimizer.step()
        note(f"mean loss {total / max(1, sum(map(len, trained))):.4g}")
        progress(1)
    after = _losses_of_all(trainer, cases, groups, memory)
    return _constants(experiment, groups, before, after, {"loss": metric.name, "n_steps": steps})


def _groups(trainer: Experiment) -> list[_Group]:
    """Every sender at its mean, by block."""
    (means,) = mean_constants(trainer, ablated_prompts(trainer)).values.values()
    means = [at_least_float32(x) for x in means]
    pairs = enumerate(zip(means, _deviations(trainer, means), strict=True))
    return [
        _Group(b, mean.flatten(0, -2), scale, _zeros(mean.flatten(0, -2)))
        for b, (mean, scale) in pairs
    ]


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like).requires_grad_(True)


@torch.no_grad()
def _deviations(trainer: Experiment, means: Values) -> list[Tensor]:
    """``[sender, 1]``: root mean square distance of what senders write from their means."""
    n_tokens = sum(batch.clean.numel() for batch in trainer.batches)

    def squares(i: int) -> Tensor:
        """``[sender]``, one block after the other: sums over the tokens of a batch."""
        values = trainer.program.values(trainer.model.forward(trainer.runs(trainer.batches[i])[0]))
        pairs = zip(values, means, strict=True)
        return torch.cat([
            (x - mean).square().mean(-1).sum((-2, -1)).reshape(-1).cpu() for x, mean in pairs
        ])  # fmt: skip

    total = trainer.sum_of_batches(squares).split([len(mean) for mean in means])
    pairs = zip(total, means, strict=True)
    scales = [(of / n_tokens).sqrt().to(mean)[:, None] for of, mean in pairs]
    return [torch.where(scale > 0, scale, 1.0) for scale in scales]


@torch.no_grad()
def _losses_of_all(
    trainer: Experiment, cases: list[_Case | None], groups: list[_Group], memory: int
) -> list[Tensor]:
    """Losses on all prompts: of each group, ``[sender]``, in float64."""

    def losses(i: int) -> Tensor:
        """``[sender]``, one group after the other."""
        case = _own(cases, i)
        return torch.cat([
            _loss(trainer, case, group, part).cpu()
            for group in groups for part in _parts(trainer, case, group.every, memory)
        ])  # fmt: skip

    total = trainer.sum_of_batches(losses) / trainer.n_rows
    return list(total.split([len(group.start) for group in groups]))


def _gradient(
    trainer: Experiment,
    cases: list[_Case | None],
    of_step: Sequence[int],
    group: _Group,
    which: Tensor,
    memory: int,
) -> tuple[float, Tensor]:
    """Summed loss of some senders of a group on a step's cases, and its gradient ``[sender, d]``.

    Losses are means over the rows of all cases; sums over cases are taken in float64.
    """
    n_rows = sum(trainer.batches[i].n_rows for i in of_step)

    def of(i: int) -> Numbers:
        loss, gradient = 0.0, torch.zeros_like(group.moved)
        case = _own(cases, i)
        for part in _parts(trainer, case, which, memory):
            found = _loss(trainer, case, group, part).sum() / n_rows
            gradient += torch.autograd.grad(found, group.moved)[0]
            loss += float(found.detach())
        return [torch.tensor(loss, dtype=torch.double), gradient]

    found = list(by_chunk(of_step, of, device=trainer.model.device))
    total = sum_of(gradient.cpu().double() for _, gradient in found)
    return sum(float(loss) for loss, _ in found), total.to(group.moved)


def _own(cases: list[_Case | None], i: int) -> _Case:
    """The case of a batch of this process."""
    case = cases[i]
    assert case is not None
    return case


def _parts(trainer: Experiment, case: _Case, which: Tensor, memory: int) -> tuple[Tensor, ...]:
    """Senders that fit into the memory together."""
    each = case.batch.n_prompts * _bytes_per_prompt(trainer, case.batch.clean.shape[1])
    return which.split(max(1, memory // each)) if len(which) else ()


def _loss(trainer: Experiment, case: _Case, group: _Group, which: Tensor) -> Tensor:
    """Loss with each of some senders replaced, summed over the rows of a case: ``[which]``."""
    batch, block = case.batch, trainer.program.blocks[group.block]
    constants = group.values[which][:, None, None].to(trainer.model.dtype)
    change = constants - case.values[group.block][which, 0]  # (scenario, batch, pos, width)
    vectors = block.some(which).vectors(change)
    stream, first = trainer.program.rerun(case.trace, group.block, vectors)
    final = trainer.model.forward(batch.clean, [stream], first=first).final
    assert final is not None
    return trainer.measure(final[:, :, batch.scored].flatten(1, 2), batch)


@dataclass(frozen=True, eq=False)
class _Case:
    """A batch and its base run."""

    batch: Batch
    trace: Trace
    values: Values

    @classmethod
    @torch.no_grad()
    def of(cls, trainer: Experiment, batch: Batch) -> _Case:
        """Run it; the batch gets the outputs of this run to compare with."""
        trace = trainer.model.forward(trainer.runs(batch)[0])
        logits = at_least_float32(trainer.logits(trace, batch.scored, None))
        assert trainer.metric.compares is not None
        targets = replace(batch.targets, clean=trainer.metric.compares(logits))
        return cls(replace(batch, targets=targets), trace, trainer.program.values(trace))


def _constants(
    experiment: Experiment,
    groups: list[_Group],
    before: list[Tensor],
    after: list[Tensor],
    report: dict[str, Any],
) -> Constants:
    """The better of mean and trained constant, and the losses by sender."""
    values: Values = []
    pairs: list[tuple[float, float]] = []
    for group, mean, trained in zip(groups, before, after, strict=True):
        better = (trained < mean).to(group.start.device)[:, None]
        chosen = torch.where(better, group.values.detach(), group.start)
        values.append(chosen[:, None, None, None])
        pairs += zip(mean.tolist(), torch.minimum(mean, trained).tolist(), strict=True)
    report["losses"] = {
        name: {"mean": mean, "optimal": best}
        for name, (mean, best) in zip(experiment.components.senders, pairs, strict=True)
    }
    return Constants("optimal", experiment.direction, {None: values}, report)


def _bytes_per_prompt(experiment: Experiment, n_pos: int) -> int:
    """What a forward and backward pass keeps for one prompt, roughly (measured on GPT-2).

    Steps are cut by it, so that it stays as it is: constants would become others.
    """
    shape, model = experiment.model.shape, experiment.model
    stream = 40 * n_pos * model.d_model
    pattern = 4 * shape.n_heads * n_pos * n_pos
    rows = 6 * model.d_vocab_out if experiment.metric.whole_vocab else 0
    latents = 4 * n_pos * sum(len(block) for block in experiment.program.blocks if block.narrow)
    return model.W_U.element_size() * (shape.n_layers * (stream + pattern) + rows + latents)
