"""What each edge of a circuit does on every prompt alone.

An edge's mean effect hides that it may help on some prompts and hurt on others, as a negative head
does.  The effect on a prompt is by how much the metric of the circuit is worse there without the
edge: above 0 the edge helps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acdc.files.objects import JsonObject
from acdc.measure.evaluation import Evaluator
from graphs import prune

__all__ = ["PerPrompt", "TwoSided", "per_prompt"]

LEAST = 1e-4
"""Of the largest effect: what is smaller is not told from rounding."""

_MOST = 1e300


@dataclass(frozen=True)
class TwoSided:
    """An edge that helps on some prompts and hurts on others.

    Parameters
    ----------
    edge
        Its name.
    mean
        Effect over all prompts.
    helps, hurts
        Share of prompts on which it does.
    best, worst
        Index of the prompt that it helps most, and of that which it hurts most.
    """

    edge: str
    mean: float
    helps: float
    hurts: float
    best: int
    worst: int


@dataclass(frozen=True, eq=False)
class PerPrompt:
    """Effects of edges on prompts.

    Parameters
    ----------
    edges
        Names of those of the circuit on a path from the embeddings to ``logits``.
    prompts
        Token ids of each clean prompt.
    effects
        ``[edge, prompt]`` in the metric's unit, above 0 where the edge helps.
    """

    edges: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    effects: NDArray[np.float64]

    def two_sided(self) -> list[TwoSided]:
        """Edges that both help and hurt, those first whose smaller side is largest in sum.

        Effects below :data:`LEAST` of the largest one of all are rounding, and neither.
        """
        least = LEAST * np.abs(self.effects).max(initial=0.0)
        helps, hurts = (np.where(x > least, x, 0) for x in (self.effects, -self.effects))
        smaller = np.minimum(helps.sum(1), hurts.sum(1))
        order = np.argsort(-smaller, kind="stable")
        return [
            TwoSided(
                self.edges[i], float(self.effects[i].mean()), float((helps[i] > 0).mean()),
                float((hurts[i] > 0).mean()), int(helps[i].argmax()), int(hurts[i].argmax()),
            )
            for i in order[: int((smaller > 0).sum())].tolist()
        ]  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        rows = zip(self.edges, self.effects.tolist(), strict=True)
        return {"prompts": [list(prompt) for prompt in self.prompts], "effects": dict(rows)}

    @classmethod
    def read(cls, item: JsonObject) -> PerPrompt:
        """Return what :meth:`as_dict` gave; CircuitFileError if it is malformed."""
        prompts = item.get("prompts", list)
        if not all(isinstance(p, list) and all(_is_id(token) for token in p) for p in prompts):
            raise item.wrong("prompts", prompts)
        effects = item.at("effects").content
        for name, row in effects.items():
            right = isinstance(row, list) and len(row) == len(prompts)
            if not right or not all(isinstance(x, int | float) and abs(x) < _MOST for x in row):
                raise item.at("effects").wrong(name, row)
        values = np.array(list(effects.values()), dtype=np.float64)
        shape = (len(effects), len(prompts))
        return cls(tuple(effects), tuple(map(tuple, prompts)), values.reshape(shape))


def _is_id(token: Any) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and token >= 0


def per_prompt(
    evaluator: Evaluator,
    mask: NDArray[np.bool_],
    progress: Callable[[int], None] = lambda n_edges: None,
) -> PerPrompt:
    """Measure what each edge of a circuit does on every prompt: one evaluation an edge.

    Parameters
    ----------
    evaluator
        On the prompts that are meant.
    mask
        ``[edge]``: the circuit.
    progress
        Called with the number of edges done.
    """
    experiment = evaluator.experiment
    whole, effects = evaluator.values(mask), []
    edges = np.flatnonzero(prune(experiment.graph, mask))
    for edge in edges:
        less = mask.copy()
        less[edge] = False
        effects.append(experiment.minimised_sign * (evaluator.values(less) - whole))
        progress(1)
    prompts = (row for batch in experiment.batches for row in batch.clean.tolist())
    return PerPrompt(
        tuple(experiment.graph.edge_names(edges)),
        tuple(map(tuple, prompts)),
        np.array(effects).reshape(len(edges), len(whole)),
    )
