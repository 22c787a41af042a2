"""The model with some of its edges acted on: scaled, or carrying another value.

A receiver reads ::

    sum over edges of (weight * current_u + sum over values of share * value_u) + b_O's

where all weights are 1 and all shares 0 in the model as it is.  A node that is ablated has weight 0
on its edges and share 1 of its mean; one that is scaled has another weight; one that is steered has
a share of a direction on top.  It is a pass of :mod:`acdc.engine.patched` in which ablated edges
carry zero, and values that do not depend on the pass are read beside what it writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.batch import Batch
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import Targets
from acdc.engine.patched import EdgeWeights, PatchedModel, PatchedRun, PlainRuns
from acdc.engine.stages import Inputs, Stage
from acdc.engine.values import Values

__all__ = ["ActedModel", "Carried"]


@dataclass(frozen=True, eq=False)
class Carried:
    """A value of every sender, and how much of it each edge carries.

    Parameters
    ----------
    values
        By block of the program: ``[sender, 1, batch or 1, pos or 1, width]``.
    shares
        ``[edge]``.
    """

    values: Values
    shares: NDArray[np.float64]


class ActedModel:
    """Runs a model with actions on its edges, on any tokens.

    Parameters
    ----------
    experiment
        Model, dictionaries and graph; its prompts, metric and ablation play no role, and norms
        are live.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = replace(
            experiment, intervention="zero", direction="noising", norms="live", constants=None,
            in_float32=None,
        )  # fmt: skip
        self._edges = PatchedModel(self.experiment, memory=0).edges

    @torch.no_grad()
    def final(
        self,
        tokens: Int[Tensor, "batch pos"],
        weights: Float[np.ndarray, " edge"],
        carried: Sequence[Carried] = (),
        spans: tuple[int, ...] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return what ``logits`` reads at every position.

        Parameters
        ----------
        tokens
            ``[batch, pos]``: prompts of one length.
        weights
            ``[edge]``: by what each edge multiplies what its sender writes.
        carried
            What edges carry besides.
        spans
            ``[pos]``: span of each position, in a graph that is split by spans.
        """
        last = torch.tensor([tokens.shape[1] - 1], device=tokens.device)
        nothing = torch.zeros(len(tokens), 1, device=tokens.device)
        targets = Targets(nothing.long(), nothing, nothing)
        spans = spans or (0,) * tokens.shape[1]
        plain = PlainRuns(self.experiment, Batch(tokens, tokens, last, targets, spans))
        fixed = [
            _Fixed(plain, self._weights(one.shares), one.values)
            for one in carried
            if one.shares.any()
        ]
        return _ActedRun(plain, self._weights(weights), fixed).final()

    def _weights(self, of_edges: NDArray[np.float64]) -> EdgeWeights:
        model = self.experiment.model
        return EdgeWeights(self._edges, torch.as_tensor(of_edges).to(model.W_U)[None])


class _Fixed(PatchedRun):
    """Values that are there from the start: nothing is run."""

    def __init__(self, plain: PlainRuns, weights: EdgeWeights, values: Values) -> None:
        super().__init__(plain, weights)
        shape = plain.embeds.shape[1:4]
        for b, (block, value) in enumerate(zip(plain.program.blocks, values, strict=True)):
            self.write(b, block.parts(value.expand(len(block), *shape, value.shape[-1])))

    def added(self, stage: Stage, positions: Tensor | None) -> dict[int | None, Tensor]:
        """What the receivers of a stage read of them, by post-norm."""
        return self.mixed(stage, self.weights.rows(stage)[0], positions)


class _ActedRun(PatchedRun):
    """One pass in which edges carry values besides what their senders write."""

    def __init__(self, plain: PlainRuns, weights: EdgeWeights, fixed: Sequence[_Fixed]) -> None:
        self._fixed = fixed
        super().__init__(plain, weights)

    def final(self) -> Tensor:
        """``[batch, pos, d_model]``: what ``logits`` reads."""
        *stages, logits = self.program.stages
        for stage in stages:
            self.run(stage, *self.weights.rows(stage))
        return self.read(logits, self.weights.rows(logits)[0])[0, 0]

    def run(self, stage: Stage, weights: Tensor, index: NDArray[np.int64]) -> None:
        """Read all rows at once: those of fixed values are read beside them."""
        self.compute(stage, Inputs(self.read(stage, weights), index))

    def sums(
        self, stage: Stage, weights: Tensor, positions: Tensor | None = None
    ) -> dict[int | None, Tensor]:
        """As :meth:`PatchedRun.sums`, with the fixed values."""
        sums = super().sums(stage, weights, positions)
        for one in self._fixed:
            for post, x in one.added(stage, positions).items():
                sums[post] = sums[post] + x
        return sums
