"""Prompts that are run together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from acdc.engine.metrics import Targets
from acdc.tasks.base import Pair

__all__ = ["Batch", "sum_of", "targets_of"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompt pairs of one length, with their spans at the same positions.

    Parameters
    ----------
    clean, corrupt
        ``[batch, pos]`` token ids.
    scored
        ``[n]`` positions whose logits are scored; the last one by default.
    targets
        Answers of the ``batch * n`` scored rows.
    spans
        ``[pos]``: index of the span that each position is in; 0 in a graph without spans.
    """

    clean: Tensor
    corrupt: Tensor
    scored: Tensor
    targets: Targets
    spans: tuple[int, ...]

    @property
    def n_prompts(self) -> int:
        """Prompts in the batch."""
        return len(self.clean)

    @property
    def n_rows(self) -> int:
        """Scored rows: prompts times scored positions."""
        return len(self.clean) * len(self.scored)

    def split(self, n_prompts: int) -> Iterator[Batch]:
        """Yield parts of at most ``n_prompts`` prompts."""
        for start in range(0, self.n_prompts, n_prompts):
            yield self._part(start, start + n_prompts)

    def even(self, n_prompts: int) -> Iterator[Batch]:
        """Yield equal parts, of ``n_prompts`` prompts or few more."""
        n_parts = max(1, self.n_prompts // n_prompts)
        ends = [self.n_prompts * k // n_parts for k in range(n_parts + 1)]
        for start, stop in itertools.pairwise(ends):
            yield self._part(start, stop)

    def _part(self, start: int, stop: int) -> Batch:
        each = len(self.scored)
        return replace(
            self,
            clean=self.clean[start:stop],
            corrupt=self.corrupt[start:stop],
            targets=self.targets.rows(slice(start * each, stop * each)),
        )


def targets_of(pairs: list[Pair], device: torch.device) -> Targets:
    """Answers of every prompt, one row each."""
    width = max(len(p.answers) + len(p.wrong_answers) for p in pairs)
    tokens = torch.zeros(len(pairs), width, dtype=torch.long)
    answer = torch.zeros(len(pairs), width)
    wrong = torch.zeros(len(pairs), width)
    for i, pair in enumerate(pairs):
        n = len(pair.answers)
        both = pair.answers + pair.wrong_answers
        tokens[i, : len(both)] = torch.tensor(both, dtype=torch.long)
        if pair.answers:
            answer[i, :n] = 1 / n
        if pair.wrong_answers:
            wrong[i, n : len(both)] = 1 / len(pair.wrong_answers)
    return Targets(tokens.to(device), answer.to(device), wrong.to(device))


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """Sum of tensors, one at least, in their order."""
    total: Tensor | None = None
    own = False  # whether the total is no part itself, and may be written to
    for part in parts:
        if total is None:
            total = part
        else:
            total, own = (total.add_(part) if own else total + part), True
    assert total is not None
    return total
