"""An experiment whose graph holds latents; every method takes it as it takes any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.constants import Constants, Values
from acdc.engine.experiment import Experiment
from acdc.engine.work import Work
from acdc.errors import OptionError
from acdc.latents.attribution import Points, edge_scores, node_scores
from acdc.latents.patched import LatentPatchedModel
from acdc.latents.run import LatentRun
from acdc.lowering.model import Trace
from acdc.methods.eap import eap_ig
from graphs import select_top

__all__ = ["LatentExperiment"]


@dataclass(frozen=True, eq=False)
class LatentExperiment(Experiment):
    """An experiment on a model with dictionaries.

    Its overrides answer with this package's own classes, which have the interface that methods
    use of the engine's without inheriting from them; hence ``type: ignore[override]``.
    """

    def narrowed(
        self, n_edges: int, memory: int
    ) -> tuple[LatentExperiment, NDArray[np.bool_]] | None:
        """Return the experiment on the best ``n_edges`` by eap-ig scores, and their mask.

        None where the graph has no more edges than that.
        """
        if self.graph.n_edges <= n_edges:
            return None
        scores = eap_ig(self, work=Work(memory))
        candidates = select_top(self.graph, scores, n_edges)
        return replace(self, candidates=candidates), candidates

    def incremental(self, memory: int) -> LatentRun:  # type: ignore[override]
        """What ablates edges receiver by receiver."""
        return LatentRun(self, memory)

    def patched(self) -> LatentPatchedModel:  # type: ignore[override]
        """What evaluates circuits."""
        return LatentPatchedModel(self, self.program, self.graph)

    def ablated_values(self, other: Values, base: Values) -> Values:
        """As :meth:`ablated`, of the values of all blocks in the program's order."""
        if self.intervention == "resample":
            return other
        if self.carried is None:
            return [torch.zeros_like(x) for x in base]
        constants = self.carried.at(base[0].shape[-2])
        return [x.expand_as(y) for x, y in zip(constants, base, strict=True)]

    def far_inputs(self, other: Trace, base: Trace) -> list[Tensor]:
        """Embeddings that ablated edges carry, see :meth:`Experiment.far_inputs`."""
        if self.carried is None:
            return other.embeds
        (embeds, *_) = self.carried.at(base.embeds[0].shape[1])
        return [x[0].expand_as(y) for x, y in zip(embeds, base.embeds, strict=True)]

    def _constants(self) -> Constants:
        if self.intervention == "optimal":
            raise OptionError(
                "intervention 'optimal': constants of heads and MLPs alone are trained, none of "
                "latents; choose another one, as mean"
            )
        return super()._constants()

    def _written(self, tokens: Tensor) -> Values:
        return self.program.values(self.model.forward(tokens))

    def attribute(  # type: ignore[override]
        self,
        points: Points,
        n_points: int,
        memory: int,
        progress: Callable[[int], None] = lambda n: None,
    ) -> NDArray[np.float64]:
        """``[edge]`` scores, see :func:`acdc.latents.attribution.edge_scores`."""
        scores = edge_scores(
            self, self.program, self.whole_graph, points, n_points, memory, progress
        )
        return scores if self.candidates is None else scores[self.candidates]

    def attribute_nodes(  # type: ignore[override]
        self,
        points: Points,
        n_points: int,
        memory: int = 1 << 30,
        progress: Callable[[int], None] = lambda n: None,
    ) -> NDArray[np.float64]:
        """``[sender]`` scores, see :func:`acdc.latents.attribution.node_scores`."""
        return node_scores(self, self.program, points, n_points, memory, progress)
