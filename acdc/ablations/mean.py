"""Mean ablation: an ablated edge carries the mean of what its sender writes.

===================  =========================================================================
``mean``             over all tokens of all prompts: every token has the same weight, and all
                     positions carry the same
``mean-positional``  over the prompts, position by position, for each prompt length apart:
                     prompts are never padded, so the 5th of 9 tokens is not the 5th of 20
===================  =========================================================================
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from acdc.ablations.base import ablation
from acdc.engine.constants import Constants
from acdc.engine.experiment import Experiment
from acdc.engine.processes import by_chunk
from acdc.engine.values import Values
from acdc.errors import TaskError
from acdc.models.lowering.model import LoweredModel

__all__ = ["ablated_prompts", "mean", "mean_constants", "mean_positional", "mean_values"]

Prompts = Sequence[tuple[int, ...]]

_TOKENS = 512
"""Tokens that are run together for a mean, if a prompt has no more."""


@ablation("mean", "the mean of what the sender writes, over all tokens", averages=True)
def mean(experiment: Experiment) -> Constants:
    """Means over all tokens of the prompts that ablated edges come from."""
    return mean_constants(experiment, ablated_prompts(experiment))


@ablation(
    "mean-positional",
    "the mean of what the sender writes, by position and prompt length",
    averages=True,
    positional=True,
)
def mean_positional(experiment: Experiment) -> Constants:
    """Means by position over the prompts that ablated edges come from."""
    return mean_constants(experiment, ablated_prompts(experiment), positional=True)


def ablated_prompts(experiment: Experiment) -> Prompts:
    """Return the prompts that means are over: those asked for, or those of the other run."""
    if experiment.mean_over is not None:
        return experiment.mean_over
    which = "corrupt" if experiment.direction == "noising" else "clean"
    return [getattr(pair, which) for pair in experiment.task.pairs]


def mean_constants(
    experiment: Experiment, prompts: Prompts, *, positional: bool = False
) -> Constants:
    """Return means of what an experiment's senders write, as constants of its ablation.

    Parameters
    ----------
    experiment
        Model and nodes.
    prompts, positional
        As of :func:`mean_values`.
    """
    values = mean_values(experiment.model, prompts, experiment.written, positional=positional)
    report = {"n_prompts": len(prompts)}
    return Constants(experiment.intervention, experiment.direction, values, report)


@torch.no_grad()
def mean_values(
    model: LoweredModel,
    prompts: Prompts,
    values: Callable[[Tensor], Values],
    *,
    positional: bool,
) -> dict[int | None, Values]:
    """Average over prompts.

    Parameters
    ----------
    model
        Where, and in which dtype.
    prompts
        Token ids; a prompt that comes twice counts twice.
    values
        Tokens ``[batch, pos]`` -> values by block.
    positional
        By position and length, or over all tokens.

    Returns
    -------
    dict
        As :attr:`Constants.values`.

    Raises
    ------
    TaskError
        If there are no prompts.
    """
    if not prompts:
        raise TaskError("mean over an empty dataset: no prompts were given, give at least one")
    totals: dict[int | None, Values] = {}
    counts: dict[int | None, int] = defaultdict(int)
    batches, axes = list(_batches(prompts, model.device)), (-3,) if positional else (-3, -2)

    def sums_of(i: int) -> Values:
        return [_sum(x, axes) for x in values(batches[i])]

    found = by_chunk(range(len(batches)), sums_of, device=model.device, one_by_one=True)
    for tokens, sums in zip(batches, found, strict=True):
        key = tokens.shape[1] if positional else None
        counts[key] += len(tokens) if positional else tokens.numel()
        known = totals.get(key)
        totals[key] = sums if known is None else [a + b for a, b in zip(known, sums, strict=True)]
    return {
        key: [(x / counts[key]).to(model.dtype).to(model.device) for x in sums]
        for key, sums in totals.items()
    }


def _sum(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Sum over axes that stay with length 1, in float64 on the CPU (not every device has it)."""
    precise = torch.promote_types(x.dtype, torch.float32)
    return x.sum(axes, keepdim=True, dtype=precise).cpu().double()


def _batches(prompts: Prompts, device: torch.device) -> Iterator[Tensor]:
    """Prompts of one length, few enough for any memory: not what fits, so that means are equal."""
    by_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for prompt in prompts:
        by_length[len(prompt)].append(prompt)
    for length, some in by_length.items():
        yield from torch.tensor(some, device=device).split(max(1, _TOKENS // length))
