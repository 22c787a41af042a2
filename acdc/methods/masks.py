"""Circuits by training masks: subnetwork probing (over nodes) and edge pruning (over edges).

A mask of each node or edge is a hard concrete variable (Louizos, Welling & Kingma 2018, arXiv
1712.01312): with noise ``u ~ U(0, 1)`` and a parameter ``log_alpha``::

    s = sigmoid((log u - log(1 - u) + log_alpha) / beta)
    z = clamp(s (zeta - gamma) + gamma, 0, 1)

so that z is exactly 0 or 1 with some probability, and the expected share of edges that are out
has a gradient.  Every edge reads ``z * current + (1 - z) * ablated``.  Adam minimises, and on the
two multipliers maximises,::

    loss + l1 (target - sparsity) + l2 (target - sparsity)^2

(Bhaskar et al. 2024) with a target that rises linearly to ``--sparsity`` over the first two
thirds of the steps.  The loss of a row is ``|metric - metric of the base run|`` over the metric's
gap between all edges and none: for KL and mse in noising the metric itself, up to a factor; for
metrics that a circuit can overshoot (logit_diff), a circuit that does so is no better.

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
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.experiment import Experiment
from acdc.engine.patched import SoftPatchedModel
from acdc.errors import OptionError

__all__ = [
    "HardConcrete",
    "Training",
    "check_training",
    "edge_pruning",
    "subnetwork_probing",
]

Scores = NDArray[np.float64]

_WARM = 2 / 3
_MULTIPLIERS = 2.0
"""Learning rate of the multipliers, as a multiple of the masks'."""


@dataclass(frozen=True)
class Training:
    """How masks are trained.

    Parameters
    ----------
    sparsity
        Target: share of the edges that are out, in (0, 1).
    steps
        Of Adam; each sees one batch of the experiment, in turn.
    learning_rate
        Of the masks' parameters.
    seed
        Of the noise.

    Raises
    ------
    OptionError
        If a value makes no sense.
    """

    sparsity: float = 0.9
    steps: int = 500
    learning_rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_training(self.sparsity, self.steps, self.learning_rate)


def check_training(sparsity: float | None, steps: int | None, learning_rate: float | None) -> None:
    """Raise OptionError if a value of a training makes no sense; None is not asked for."""
    if sparsity is not None and not 0 < sparsity < 1:
        raise OptionError(
            f"sparsity {sparsity}: expected the share to drop, above 0 and below 1, as 0.95"
        )
    if steps is not None and steps < 1:
        raise OptionError(f"mask_steps {steps}: expected at least 1")
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise OptionError(f"learning_rate {learning_rate}: expected a number above 0, as 0.1")


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

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw ``[mask]``; the generator is on the CPU, so that devices agree."""
        noise = torch.rand(len(self.log_alpha), generator=generator).clamp(1e-6, 1 - 1e-6)
        logistic = torch.logit(noise).to(self.log_alpha)
        soft = torch.sigmoid((logistic + self.log_alpha) / self.beta)
        return (soft * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    def probability(self) -> Tensor:
        """``[mask]``: how probable it is that a mask is not 0."""
        return torch.sigmoid(self.log_alpha - self.beta * math.log(-self.gamma / self.zeta))


def edge_pruning(
    experiment: Experiment,
    training: Training | None = None,
    *,
    memory: int = 2 << 30,
    progress: Callable[[int], None] = lambda n_steps: None,
    note: Callable[[str], None] = lambda text: None,
) -> Scores:
    """Train a mask for every edge.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    training
        Target sparsity, steps, learning rate and seed.
    memory
        Bytes of plain runs to keep.
    progress
        Called with 1 after each step.
    note
        Told the loss and the sparsity after each step.

    Returns
    -------
    ndarray
        ``[edge]``: probability that the mask is not 0, in (0, 1), mean over the steps.
    """
    n_edges = experiment.graph.n_edges

    def same(z: Tensor) -> Tensor:
        return z

    return _train(experiment, n_edges, same, same, training or Training(), memory, progress, note)


def subnetwork_probing(
    experiment: Experiment,
    training: Training | None = None,
    *,
    memory: int = 2 << 30,
    progress: Callable[[int], None] = lambda n_steps: None,
    note: Callable[[str], None] = lambda text: None,
) -> Scores:
    """Train a mask for every head and MLP; all edges out of it carry that.

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
        return torch.cat([z.new_ones(n_sources), z, z.new_ones(1)])  # embeddings, ..., logits

    def weights(z: Tensor) -> Tensor:
        return nodes(z)[sender]

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
        memory,
        progress,
        note,
    )
    return np.concatenate([np.ones(n_sources), found])


def _train(
    experiment: Experiment,
    n_masks: int,
    weights: Callable[[Tensor], Tensor],
    edges: Callable[[Tensor], Tensor],
    training: Training,
    memory: int,
    progress: Callable[[int], None],
    note: Callable[[str], None],
) -> Scores:
    """``[mask]``: mean probability over the training.

    ``weights`` turns masks into what edges carry, ``edges`` probabilities of masks into those of
    edges: ``[mask] -> [edge]``.
    """
    model = SoftPatchedModel(experiment, memory)
    device, generator = experiment.model.device, torch.Generator().manual_seed(training.seed)
    every, total = torch.ones(n_masks, device=device), torch.zeros(n_masks, dtype=torch.double)
    with torch.no_grad():
        base = [model.rows(i, weights(every)) for i in range(len(experiment.batches))]
        empty = [model.rows(i, weights(0 * every)) for i in range(len(experiment.batches))]
    gap = torch.cat([abs(a - b) for a, b in zip(base, empty, strict=True)]).mean()
    scale = 1 / gap if gap > 0 else torch.ones_like(gap)
    with torch.enable_grad():
        log_alpha = torch.full((n_masks,), 2.0, device=device, requires_grad=True)
        multipliers = torch.zeros(2, device=device, requires_grad=True)
        masks, rate = HardConcrete(log_alpha), training.learning_rate
        optimizer = torch.optim.Adam(
            [
                {"params": [log_alpha], "lr": rate},
                {"params": [multipliers], "lr": _MULTIPLIERS * rate, "maximize": True},
            ]
        )
        for step in range(training.steps):
            i = step % len(base)
            target = training.sparsity * min(1.0, (step + 1) / (_WARM * training.steps))
            rows = model.rows(i, weights(masks.sample(generator)))
            loss = (rows - base[i]).abs().mean() * scale
            probability = masks.probability()
            total += probability.detach().double().cpu()
            sparsity = 1 - edges(probability).mean()
            short = target - sparsity
            objective = loss + multipliers[0] * short + multipliers[1] * short.square()
            optimizer.zero_grad()
            objective.backward()
            optimizer.step()
            note(f"loss {loss.item():.3f}, sparsity {sparsity.item():.3f}")
            progress(1)
    return (total / training.steps).cpu().numpy()
