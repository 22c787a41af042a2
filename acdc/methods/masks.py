"""Circuits by training masks: subnetwork probing (over nodes) and edge pruning (over edges).

A mask of each node or edge is a hard concrete variable (Louizos, Welling & Kingma 2018, arXiv
1712.01312): with noise ``u ~ U(0, 1)`` and a parameter ``log_alpha``::

    s = sigmoid((log u - log(1 - u) + log_alpha) / beta)
    z = clamp(s (zeta - gamma) + gamma, 0, 1)

so that z is exactly 0 or 1 with some probability, and the expected share of edges that are out
has a gradient.  Every edge reads ``z * current + (1 - z) * ablated``, each prompt with noise of
its own.  Adam minimises the loss under the constraint that the expected sparsity is a given one;
it rises to ``--sparsity`` over the first two thirds of the steps.  Where Bhaskar et al. 2024 put a
Lagrangian ::

    loss + l1 (target - sparsity) + l2 (target - sparsity)^2

and let Adam maximise over the multipliers, here a shift common to all ``log_alpha`` meets the
constraint at every step: a multiplier has to grow to the number of edges once the target exceeds
what the task can spare, swings past it on the way, and drops in one swing what the task needs.
The target rises evenly on a logit scale, from where one mask is expected not to be whole: a
circuit whose edges are all needed shows itself while few edges are out, never later.

The loss of a row is ``|metric - metric of the base run|`` over the metric's gap between all edges
and none: for KL and mse in noising the metric itself, up to a factor; for metrics that a circuit
can overshoot (logit_diff), a circuit that does so is no better.  Adam's epsilon is in the same
unit: masks that move the loss by less than a thousandth of the gap are noise and hardly pushed.

The score of a mask is the mean of ``P(z > 0)`` over the steps: how long it held out while the
target rose.  So the ranking tells apart masks that all end at 0 or at 1, and one training ranks
circuits of all sizes up to the target.

============================  ====================================================================
:func:`subnetwork_probing`    Cao, Sanh & Rush 2021, arXiv 2104.03514, as Conmy et al. 2023 use it:
                              one mask per sender (embeddings have none); they sweep a penalty per
                              node, here the target sparsity takes its place
:func:`edge_pruning`          Bhaskar et al. 2024, arXiv 2406.16778: one mask per edge; their second
                              set of masks, over nodes, is left out
============================  ====================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from acdc.engine.experiment import Experiment
from acdc.engine.patched import PatchedModel
from acdc.engine.processes import Numbers, by_chunk
from acdc.engine.steps import MOST_TOGETHER, in_steps
from acdc.engine.work import Work
from acdc.errors import OptionError
from acdc.methods.base import Score, method
from acdc.methods.candidates import narrow
from acdc.methods.eap import eap_ig
from acdc.settings import Checked, option

__all__ = [
    "WARM_STARTS",
    "EdgeTraining",
    "HardConcrete",
    "Training",
    "edge_pruning",
    "ranks",
    "subnetwork_probing",
]

Scores = NDArray[np.float64]

WARM_STARTS = ("none", "eap-ig")
"""Where masks of edges can start (the sequential ensemble of Mondorf et al., arXiv 2510.06811)."""

TARGET = 0.9
"""Sparsity of a training that is not told one."""

_WARM = 2 / 3
_EPSILON = 1e-3
_BISECTIONS = 40
_FARTHEST = 60.0
"""Bound of the shift of ``log_alpha``: probabilities are 0 or 1 there."""


@dataclass(frozen=True)
class Training(Checked):
    """How masks are trained.

    Parameters
    ----------
    sparsity
        Target: share of the edges that are out, in (0, 1).  Given, the circuit is the
        ``1 - sparsity`` highest of all edges; None trains to :data:`TARGET`, and the circuit is
        chosen as for all scores.
    mask_steps
        Of Adam; each sees 32 prompts of the task, in turn, whatever the batch size.
    learning_rate
        Of the masks' parameters.
    seed
        Of the noise.
    """

    sparsity: float | None = option(
        None, "Share of masks to drop.", above=0, below=1, example="0.95"
    )
    mask_steps: int = option(500, "Training steps of masks.", at_least=1, at_most=10**7)
    learning_rate: float = option(0.3, "Of masks.", above=0, example="0.3")
    seed: int = option(0, "Of the noise.", shared=True)

    @property
    def target(self) -> float:
        """Share of the edges that training ends with out."""
        return TARGET if self.sparsity is None else self.sparsity

    def n_edges(self, n_edges: int) -> int | None:
        """How many of all edges are in, None unless a sparsity is asked for."""
        return None if self.sparsity is None else max(1, round((1 - self.sparsity) * n_edges))


@dataclass(frozen=True)
class EdgeTraining(Training):
    """Options of a training with a mask per edge.

    Parameters
    ----------
    candidates
        On a graph with latents at most so many edges have masks, those with the largest attribution
        scores; all others are ablated from the start.  The sparsity is that of the whole graph.
    warm_start
        Where masks start: all alike, or by the rank of their edges' ``eap-ig`` scores.
    """

    candidates: int = option(
        3000,
        "With latents: edges that have masks at most.",
        at_least=1,
        at_most=10**9,
        only="latents",
    )
    warm_start: str = option("none", "Where masks start: none, or eap-ig.", choices=WARM_STARTS)

    def of_few(self, n_edges: int, n_few: int) -> EdgeTraining:
        """Return the training on some edges that ends with as many in as this one on all.

        Raises
        ------
        OptionError
            If that are more than there are.
        """
        kept = self.n_edges(n_edges)
        if kept is not None and kept >= n_few:
            raise OptionError(
                f"sparsity {self.sparsity} keeps {kept:,} of {n_edges:,} edges, of which {n_few:,} "
                "have masks: raise it, or --candidates"
            )
        sparsity = None if kept is None else 1 - kept / n_few
        return replace(self, sparsity=sparsity)


class HardConcrete:
    """Masks in [0, 1] that are exactly 0 or 1 with some probability.

    Parameters
    ----------
    log_alpha
        ``[mask]``, the parameters.
    """

    beta, gamma, zeta = 2 / 3, -0.1, 1.1

    def __init__(self, log_alpha: Tensor) -> None:
        self.log_alpha = log_alpha

    @classmethod
    def whole(cls, n: int) -> float:
        """``log_alpha`` at which one mask in ``n`` is expected to be below 1."""
        return cls.beta * math.log((1 - cls.gamma) / (cls.zeta - 1)) + math.log(max(1, n - 1))

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw ``[n, mask]``; the generator is on the CPU, so that devices agree."""
        noise = torch.rand(n, len(self.log_alpha), generator=generator).clamp(1e-6, 1 - 1e-6)
        logistic = torch.logit(noise).to(self.log_alpha)
        soft = torch.sigmoid((logistic + self.log_alpha) / self.beta)
        return (soft * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    def probability(self) -> Tensor:
        """``[mask]``: how probable it is that a mask is not 0."""
        return torch.sigmoid(self.log_alpha - self.beta * math.log(-self.gamma / self.zeta))


def edge_pruning(
    experiment: Experiment,
    training: Training | None = None,
    work: Work | None = None,
    warm: Scores | None = None,
) -> Scores:
    """Train a mask for every edge.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    training
        Target sparsity, steps, learning rate and seed.
    work
        Memory for plain runs; told of steps, and of loss and sparsity after each.
    warm
        ``[edge]``: scores by whose ranks masks start; None: all start alike.

    Returns
    -------
    ndarray
        ``[edge]``: probability that the mask is not 0, in (0, 1), mean over the steps.
    """
    n_edges = experiment.graph.n_edges

    def same(z: Tensor) -> Tensor:
        return z

    training, work = training or Training(), work or Work()
    return _train(
        experiment, n_edges, same, same, training, work, start=None if warm is None else ranks(warm)
    )


def ranks(scores: Scores) -> Tensor:
    """Return where masks start, ``[edge]``: the log odds of the rank of each score's size.

    The training's shift (see :mod:`acdc.methods.masks`) makes a sparsity of it, so only
    differences count; and the larger these are, the longer it takes to go back on them.
    """
    share = (rankdata(np.abs(scores)) - 0.5) / len(scores)
    return torch.logit(torch.as_tensor(share, dtype=torch.float32))


@method(
    "edge-pruning",
    "train a hard-concrete mask per edge to a target --sparsity (Bhaskar et al. 2024)",
    EdgeTraining,
    score=Score.MAGNITUDE,
    passes=lambda experiment, training: training.mask_steps,
    trains=True,
    size=lambda training, n_edges: training.n_edges(n_edges),
)
def _edge_pruning(experiment: Experiment, training: EdgeTraining, work: Work) -> Scores:
    def train(experiment: Experiment, training: EdgeTraining) -> Scores:
        warm = None
        if training.warm_start == "eap-ig":
            warm = eap_ig(experiment, work=Work(work.memory))
        return edge_pruning(experiment, training, work, warm)

    narrowed = narrow(experiment, training.candidates, work.memory)
    if narrowed is None:
        return train(experiment, training)
    few, candidates = narrowed
    n_edges, scores = experiment.graph.n_edges, np.zeros(experiment.graph.n_edges)
    scores[candidates] = train(few, training.of_few(n_edges, few.graph.n_edges))
    return scores


@method(
    "subnetwork-probing",
    "train a hard-concrete mask per node to a target --sparsity (Cao et al. 2021)",
    Training,
    over="nodes",
    score=Score.MAGNITUDE,
    passes=lambda experiment, training: training.mask_steps,
    trains=True,
    size=lambda training, n_edges: training.n_edges(n_edges),
)
def subnetwork_probing(
    experiment: Experiment, training: Training | None = None, work: Work | None = None
) -> Scores:
    """Train a mask for every sender but the embeddings; all edges out of it carry that.

    Parameters as :func:`edge_pruning`; the sparsity is that of the edges between nodes that
    are in.

    Returns
    -------
    ndarray
        ``[sender]``: probability that the mask is not 0, mean over the steps; 1 for the
        embeddings, which have none.
    """
    graph, device = experiment.graph, experiment.model.device
    n_sources = int(graph.source.sum())
    sender, receiver, feeds = (
        torch.as_tensor(index, dtype=torch.long, device=device)
        for index in (graph.edge_sender, graph.edge_receiver, graph.feeds)
    )
    n_fed = torch.as_tensor(np.diff(graph.feeds_start), device=device)
    reader = torch.repeat_interleave(torch.arange(len(n_fed), device=device), n_fed)

    def nodes(z: Tensor) -> Tensor:
        ends = z.new_ones(*z.shape[:-1], n_sources + 1)  # embeddings and logits
        return torch.cat([ends[..., :-1], z, ends[..., -1:]], -1)

    def weights(z: Tensor) -> Tensor:
        return nodes(z)[..., :-1]

    def both_ends(p: Tensor) -> Tensor:
        """Probability of each edge that its ends are in, the likeliest where several are fed."""
        p = nodes(p)
        into = p.new_zeros(len(n_fed)).scatter_reduce(0, reader, p[feeds], "amax")
        return p[sender] * into[receiver]

    found = _train(
        experiment,
        graph.n_senders - n_sources,
        weights,
        both_ends,
        training or Training(),
        work or Work(),
        of_senders=True,
    )
    return np.concatenate([np.ones(n_sources), found])


def _train(
    experiment: Experiment,
    n_masks: int,
    weights: Callable[[Tensor], Tensor],
    edges: Callable[[Tensor], Tensor],
    training: Training,
    work: Work,
    *,
    of_senders: bool = False,
    start: Tensor | None = None,
) -> Scores:
    """``[mask]``: mean probability over the training.

    ``weights`` turns masks into what edges (or senders) carry, ``[..., mask] -> [..., edge]``, and
    ``edges`` probabilities of masks into those of edges, ``[mask] -> [edge]``; ``start [mask]`` is
    where ``log_alpha`` starts, up to a shift.
    """
    loss = _Loss(experiment, weights, n_masks, work.memory, of_senders=of_senders)
    device, generator = experiment.model.device, torch.Generator().manual_seed(training.seed)
    every, total = torch.ones(n_masks, device=device), torch.zeros(n_masks, dtype=torch.double)

    def sparsity(log_alpha: Tensor) -> Tensor:
        return 1 - _precise(edges(HardConcrete(log_alpha).probability()).mean())

    first = min(float(sparsity(every * HardConcrete.whole(n_masks))), training.target)
    with torch.enable_grad():
        free = (0 * every if start is None else start.clone().to(device)).requires_grad_()
        optimizer = torch.optim.Adam([free], lr=training.learning_rate, eps=_EPSILON)
        for step in range(training.mask_steps):
            target = _between(first, training.target, (step + 1) / (_WARM * training.mask_steps))
            log_alpha = free + _shift(free.detach(), target, sparsity)
            masks = HardConcrete(log_alpha)
            z = masks.sample(loss.n_prompts(step), generator)
            total += masks.probability().detach().double().cpu()
            optimizer.zero_grad()
            found, gradient = loss.of(step, z.detach())
            z.backward(gradient)
            optimizer.step()
            sparse = float(sparsity(log_alpha.detach()))
            work.note(f"loss {found:.3f}, sparsity {sparse:.3f}")
            work.progress(1)
    return (total / training.mask_steps).numpy()


class _Loss:
    """What masks cost at each step of a training.

    Parameters
    ----------
    experiment, weights, n_masks, memory, of_senders
        As of :func:`_train`.
    """

    def __init__(
        self,
        experiment: Experiment,
        weights: Callable[[Tensor], Tensor],
        n_masks: int,
        memory: int,
        *,
        of_senders: bool,
    ) -> None:
        self._weights, self._of_senders = weights, of_senders
        longest = max(len(pair.clean) for pair in experiment.task.pairs)
        each = PatchedModel(experiment).bytes_per_prompt(longest)
        parts, self._steps = in_steps(experiment, MOST_TOGETHER, each, memory)
        self._batches, self._model = parts.batches, PatchedModel(parts, memory)
        every = torch.ones(n_masks, device=experiment.model.device)
        with torch.no_grad():
            self._base, empty = (self._of_all(masks) for masks in (every, 0 * every))
        gap = torch.cat([abs(a - b) for a, b in zip(self._base, empty, strict=True)]).mean()
        self._scale = 1 / gap if gap > 0 else torch.ones_like(gap)

    def _rows(self, i: int, masks: Tensor) -> Tensor:
        return self._model.rows(i, self._weights(masks), of_senders=self._of_senders)

    def _of_all(self, masks: Tensor) -> list[Tensor]:
        """By part: what :meth:`_rows` gives, on the model's device."""
        experiment = self._model.experiment
        precise = torch.promote_types(experiment.model.dtype, torch.float32)
        rows = experiment.by_batch(lambda i: self._rows(i, masks))
        return [x.to(masks.device, precise) for x in rows]

    def _parts(self, step: int) -> tuple[int, ...]:
        return self._steps[step % len(self._steps)]

    def n_prompts(self, step: int) -> int:
        """How many prompts a step sees."""
        return sum(self._batches[i].n_prompts for i in self._parts(step))

    def of(self, step: int, z: Tensor) -> tuple[float, Tensor]:
        """Loss of masks ``[prompt, mask]``, mean over the rows of a step, and its gradient."""
        parts = self._parts(step)
        n_rows = sum(self._batches[i].n_rows for i in parts)
        sizes = [self._batches[i].n_prompts for i in parts]
        masks = dict(zip(parts, z.split(sizes), strict=True))

        def of(i: int) -> Numbers:
            some = masks[i].clone().requires_grad_()
            share = self._scale * (self._batches[i].n_rows / n_rows)
            loss = (self._rows(i, some) - self._base[i]).abs().mean() * share
            return [loss.detach(), *torch.autograd.grad(loss, some)]

        found = list(by_chunk(parts, of, device=z.device, about=[str(step).encode()]))
        loss = sum(float(of_part) for of_part, _ in found)
        return loss, torch.cat([gradient.to(z) for _, gradient in found])


def _between(start: float, end: float, part: float) -> float:
    """Go from one share to another, evenly in log odds; ``part`` from 0 to 1, beyond it the end."""
    if part >= 1:
        return end
    odds = math.exp((1 - part) * _logit(start) + part * _logit(end))
    return odds / (1 + odds)


def _logit(share: float) -> float:
    share = max(share, 1e-12)
    return math.log(share / (1 - share))


def _shift(free: Tensor, target: float, sparsity: Callable[[Tensor], Tensor]) -> Tensor:
    """Shift of all ``free [mask]`` that gives the sparsity, which falls with it.

    A number on the device: the host never waits for it.
    """
    middle = _precise(free.mean())
    low, high = -_FARTHEST - middle, _FARTHEST - middle
    for _ in range(_BISECTIONS):
        shift = (low + high) / 2
        too_sparse = sparsity(free + shift) > target
        low, high = torch.where(too_sparse, shift, low), torch.where(too_sparse, high, shift)
    return (low + high) / 2


def _precise(number: Tensor) -> Tensor:
    """A number in float64, where its device has that."""
    return number if number.device.type == "mps" else number.double()
