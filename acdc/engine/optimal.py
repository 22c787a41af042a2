"""Optimal ablation: the constant that a sender's ablation costs least with.

Li & Janson 2024, "Optimal ablation for interpretability", arXiv 2409.09951: a component that is
replaced by zero, by its mean or by another run's value hurts a model not only by what is missing
but by what is put in its place ("spoofing").  So it is replaced by ::

    c* = argmin over c of  E[ KL(model's output || output with c in the component's place) ]

the same constant for every prompt and every position.  As in the paper's section on single
components, each sender's constant is trained with that sender alone replaced, by Adam, from the
mean (of the prompts that :meth:`Experiment.means` averages).  The expectation is over the prompts
of the run that ablation starts from (noising: the clean ones, denoising: the corrupt ones) and
their scored positions; nothing is asked of the answers.  Where the experiment's metric compares
whole outputs itself (mse), it takes the place of the divergence: compiled models have logits that
are no log-probabilities.

Heads have constants of z, before W_O.  Losses are of all prompts, without sampling, so that
there is no seed; what is kept is the best that was seen, never worse than the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from acdc.engine.attribution import bytes_per_prompt
from acdc.engine.constants import Constants, Values, written
from acdc.engine.experiment import Batch, Experiment
from acdc.lowering.model import LoweredModel, Trace
from acdc.metrics import at_least_float32, get_metric

__all__ = ["STEPS", "optimal_constants"]

STEPS = 100
"""Most steps of Adam."""

_RATE = 0.1
"""Learning rate, in standard deviations of what the sender writes."""

_PATIENCE, _GAIN = 10, 1e-3
"""A constant is done when so many steps brought less than this share of the mean's loss."""

_NOTHING = 1e-5
"""Share of the largest loss of a mean below which a sender keeps its mean."""


@dataclass(eq=False)
class _Group:
    """Constants that are trained together: of one embedding, a layer's heads or its MLP.

    Attributes
    ----------
    kind, index
        ``embed``, ``heads`` or ``mlp``, and which embedding or layer.
    start
        ``[sender, d]``: the means.
    scale
        ``[sender, 1]``: standard deviations.
    moved
        ``[sender, d]``: what is trained, in standard deviations from the mean.
    best, loss, first_loss
        ``[sender, d]`` the best so far, and ``[sender]`` its loss and that of the mean.
    waited
        ``[sender]``: steps since the loss last fell by enough.
    """

    kind: str
    index: int
    start: Tensor
    scale: Tensor
    moved: Tensor
    best: Tensor
    loss: Tensor
    first_loss: Tensor
    waited: Tensor

    @classmethod
    def of(cls, kind: str, index: int, start: Tensor, scale: Tensor) -> _Group:
        """Return constants that are the means still."""
        none = start.new_full((len(start),), torch.inf)
        moved = torch.zeros_like(start).requires_grad_(True)
        waited = torch.zeros(len(start), dtype=torch.long, device=start.device)
        return cls(kind, index, start, scale, moved, start.clone(), none, none.clone(), waited)

    @property
    def values(self) -> Tensor:
        """``[sender, d]``: the constants at this step."""
        return self.start + self.scale * self.moved

    @property
    def training(self) -> Tensor:
        """Indices of the senders that are not done."""
        return (self.waited < _PATIENCE).nonzero()[:, 0]

    def record(self, loss: Tensor, which: Tensor) -> None:
        """Note the losses ``[which]`` of the present constants."""
        known, first = self.loss[which], self.first_loss[which]
        first = torch.where(first.isinf(), loss, first)
        better, enough = loss < known, loss < known - _GAIN * first
        self.first_loss[which] = first
        now = self.values.detach()[which]
        self.best[which] = torch.where(better[:, None], now, self.best[which])
        self.loss[which] = torch.where(better, loss, known)
        self.waited[which] = torch.where(enough, 0, self.waited[which] + 1)


@torch.enable_grad()
def optimal_constants(
    experiment: Experiment,
    steps: int = STEPS,
    *,
    memory: int = 1 << 30,
    progress: Callable[[int], None] = lambda n_steps: None,
    note: Callable[[str], None] = lambda text: None,
) -> Constants:
    """Train a constant for every sender.

    A step runs, for every sender that is not done, the part of the model behind it forward and
    backward on all prompts; senders of one layer are scenarios on one axis.

    Parameters
    ----------
    experiment
        Model, prompts, metric and direction; its intervention plays no role.
    steps
        Most steps; a sender is done when ten steps improved it by less than 0.1 % of what the
        ablation with its mean costs, or if that is nothing (1e-5 of the largest such loss).
    memory
        Bytes that the activations of one pass may take.
    progress
        Called with 1 after each step.
    note
        Told how many senders are not done, and the mean loss.

    Returns
    -------
    Constants
        With the losses by sender, of the mean and of the constant, in its report.
    """
    metric = experiment.metric if experiment.metric.compares else get_metric("kl")
    trainer = replace(experiment, metric=metric, intervention="mean", constants=None)
    groups = _groups(trainer)
    cases = [_Case.of(trainer, batch) for batch in trainer.batches]
    optimizer = torch.optim.Adam([group.moved for group in groups], lr=_RATE)
    for n_steps in range(steps + 1):  # the last time only to measure
        active = [group for group in groups if len(group.training)]
        if not active:
            break
        optimizer.zero_grad()
        for group in active:
            which = group.training
            loss, group.moved.grad = _losses(trainer, cases, group, which, memory)
            group.record(loss, which)
        if n_steps == 0:
            _leave_out(groups)
        if n_steps < steps:
            optimizer.step()
            progress(1)
        n_left = sum(len(group.training) for group in groups)
        mean = float(torch.cat([group.loss for group in groups]).mean())
        note(f"{n_left} constants to train, mean loss {mean:.4g}")
    return _constants(experiment, groups, metric.name, n_steps)


def _leave_out(groups: list[_Group]) -> None:
    """Train nothing where the ablation with the mean costs nothing."""
    largest = max(float(group.first_loss.max()) for group in groups)
    for group in groups:
        group.waited[group.first_loss <= _NOTHING * largest] = _PATIENCE


def _groups(trainer: Experiment) -> list[_Group]:
    """Every sender at its mean, in the order of :func:`acdc.engine.constants.written`."""
    model = trainer.model
    (means,) = trainer.means(positional=False).values.values()
    means = [at_least_float32(x) for x in means]
    layers = range(len(model.layers))
    kinds = [("heads", i) for i in layers] + [("mlp", i) for i in layers if model.shape.has_mlp]
    kinds = [("embed", i) for i in range(len(means) - len(kinds))] + kinds
    return [
        _Group.of(kind, i, mean.flatten(0, -2), scale)
        for (kind, i), mean, scale in zip(kinds, means, _deviations(trainer, means), strict=True)
    ]


@torch.no_grad()
def _deviations(trainer: Experiment, means: Values) -> list[Tensor]:
    """``[sender, 1]``: root mean square distance of what senders write from their means."""
    totals: list[Tensor | float] = [0.0] * len(means)
    n_tokens = 0
    for batch in trainer.batches:
        tokens = trainer.runs(batch)[0]
        n_tokens += tokens.numel()
        for i, x in enumerate(written(trainer.model.forward(tokens))):
            totals[i] += (x - means[i]).square().mean(-1).sum((-2, -1)).reshape(-1)
    scales = [torch.as_tensor(total / n_tokens).sqrt()[:, None] for total in totals]
    return [torch.where(scale > 0, scale, 1.0) for scale in scales]


def _losses(
    trainer: Experiment, cases: list[_Case], group: _Group, which: Tensor, memory: int
) -> tuple[Tensor, Tensor]:
    """Losses of some senders of a group, ``[which]``, and their gradient ``[sender, d]``."""
    model, losses, gradient = trainer.model, [], torch.zeros_like(group.moved)
    for case in cases:
        batch = case.batch
        each = batch.n_prompts * bytes_per_prompt(trainer, batch.clean.shape[1])
        parts = which.split(max(1, memory // each))
        found = []
        for part in parts:
            stream, first = case.stream(model, group, part)
            final = model.forward(batch.clean, [stream], first=first).final
            assert final is not None
            loss = trainer.measure(final[:, :, batch.scored].flatten(1, 2), batch)
            gradient += torch.autograd.grad(loss.sum(), group.moved)[0]
            found.append(loss.detach())
        losses.append(torch.cat(found))
    n_rows = trainer.n_rows
    return torch.stack(losses).sum(0) / n_rows, gradient / n_rows


@dataclass(frozen=True, eq=False)
class _Case:
    """A batch and its base run."""

    batch: Batch
    trace: Trace

    @classmethod
    @torch.no_grad()
    def of(cls, trainer: Experiment, batch: Batch) -> _Case:
        """Run it; the batch gets the outputs of this run to compare with."""
        trace = trainer.model.forward(trainer.runs(batch)[0])
        logits = at_least_float32(trainer.logits(trace, batch.scored, None))
        assert trainer.metric.compares is not None
        targets = replace(batch.targets, clean=trainer.metric.compares(logits))
        return cls(replace(batch, targets=targets), trace)

    def stream(self, model: LoweredModel, group: _Group, which: Tensor) -> tuple[Tensor, int]:
        """Stream in front of a block, each sender replaced in a scenario of its own.

        Returns
        -------
        tuple
            ``[scenario, batch, pos, d_model]``, and the block.
        """
        trace, i = self.trace, group.index
        constants = group.values[which][:, None, None].to(model.dtype)  # (scenario, 1, 1, d)
        if group.kind == "embed":
            others = [x for j, x in enumerate(trace.embeds) if j != i]
            return sum(others, torch.zeros_like(trace.embeds[i])) + constants, 0
        block = model.layers[i]
        written = trace.attention_out[i]
        if group.kind == "heads":
            own = trace.z[i].transpose(0, 1)[which]  # (scenario, batch, pos, d_head)
            written = written + (constants - own) @ block.attention.W_O[which][:, None]
        if block.attention_post is not None:
            written = block.attention_post(written)
        middle = trace.attention_in[i] + written
        if group.kind == "mlp":
            return middle + constants, i + 1
        if block.mlp is None:
            return middle, i + 1
        return middle + (trace.mlp_out[i] if model.shape.parallel else block.mlp(middle)), i + 1


def _constants(experiment: Experiment, groups: list[_Group], loss: str, n_steps: int) -> Constants:
    """What was found, and the losses by sender."""
    values = [
        group.best.unflatten(0, (-1, 1, 1)) if group.kind == "heads" else group.best[None]
        for group in groups
    ]
    report: dict[str, Any] = {"loss": loss, "n_steps": n_steps, "losses": {}}
    order = {"embed": 0, "heads": 1, "mlp": 2}
    by_layer = sorted(groups, key=lambda g: (g.kind != "embed", g.index, order[g.kind]))
    pairs = [pair for g in by_layer for pair in zip(g.first_loss, g.loss, strict=True)]
    for name, (mean, best) in zip(experiment.graph.senders, pairs, strict=True):
        report["losses"][name] = {"mean": float(mean), "optimal": float(best)}
    return Constants("optimal", experiment.direction, {None: values}, report)
