"""Splitting a graph by positions: by token, or by the labelled spans of a task.

Every position of every prompt belongs to exactly one span of the graph.  With ``token`` each
position is a span, ``p0``, ``p1`` and so on, and all prompts have to be equally long.  With
``span`` the spans are the task's labels in its own order, behind ``rest``, the unlabelled
positions; prompts may then differ in length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from acdc.errors import OptionError, TaskError
from acdc.settings import POSITIONS
from acdc.tasks.base import REST, Pair, Task
from graphs import GraphShape
from graphs.spans import Reaches

__all__ = ["Positions", "find_positions"]


@dataclass(frozen=True)
class Positions:
    """The spans of a graph, and which positions of a prompt belong to each.

    Parameters
    ----------
    kind
        One of :data:`acdc.settings.POSITIONS`.
    spans
        Names, in order.
    scored
        Those that hold a scored position of some prompt.
    reaches
        Pairs of span indices, see :class:`graphs.GraphShape`.
    """

    kind: str
    spans: tuple[str, ...]
    scored: tuple[str, ...]
    reaches: Reaches | None

    @classmethod
    def of_shape(cls, shape: GraphShape) -> Positions | None:
        """Return how a graph is split, None where it is not."""
        if not shape.spans:
            return None
        kind = "token" if shape.spans == _token_names(len(shape.spans)) else "span"
        return cls(kind, shape.spans, shape.scored_spans, shape.reaches)

    def split(self, shape: GraphShape) -> GraphShape:
        """Return a model's shape, split."""
        return replace(shape, spans=self.spans, scored_spans=self.scored, reaches=self.reaches)

    def of(self, pair: Pair) -> NDArray[np.int64]:
        """``[pos]``: index of the span that each position of the pair's prompts belongs to.

        Raises
        ------
        TaskError
            If the prompt has another number of tokens, or other labels, than there are spans
            for; or a position is scored whose span is not.
        """
        index = self._by_token(pair) if self.kind == "token" else self._by_label(pair)
        for position in pair.scored:
            if (name := self.spans[index[position]]) not in self.scored:
                raise TaskError(
                    f"position {position} is scored and in span {name!r}, but the graph reads "
                    f"logits in {', '.join(self.scored)} alone: use prompts scored there"
                )
        return index

    def _by_token(self, pair: Pair) -> NDArray[np.int64]:
        if len(pair.clean) != len(self.spans):
            raise TaskError(
                f"a prompt has {len(pair.clean)} tokens, but the graph is split by "
                f"{len(self.spans)} token positions: use prompts of that length"
            )
        return np.arange(len(pair.clean))

    def _by_label(self, pair: Pair) -> NDArray[np.int64]:
        names = [REST] * len(pair.clean)
        for label, positions in pair.spans.items():
            for position in positions:
                names[position] = label
        for name in names:
            if name not in self.spans:
                got = ", ".join(pair.spans) or "no spans"
                raise TaskError(
                    f"the graph is split by the spans {', '.join(self.spans)}, but a prompt has "
                    f"{name!r} (the task labels {got}): use the task that it was made for"
                )
        return np.array([self.spans.index(name) for name in names])


def find_positions(task: Task, kind: str, *, causal: bool = True) -> Positions:
    """Return the spans that a task's prompts give a graph.

    Parameters
    ----------
    task
        Prompts; those of one task give the same spans in the same order, whatever the seed.
    kind
        ``token`` or ``span``.
    causal
        Whether keys and values are read at their own and later positions alone.

    Raises
    ------
    OptionError
        If there is no such kind, the prompts differ in length (``token``), or the task has no
        labels (``span``).
    """
    if kind not in POSITIONS:
        raise OptionError(f"positions {kind!r}: expected {' or '.join(POSITIONS)}")
    if kind == "token":
        _check_equal_length(task)
        spans = _token_names(len(task.pairs[0].clean))
    else:
        spans = _labels(task)
    whole = Positions(kind, spans, spans, None)
    rows = [(pair, whole.of(pair)) for pair in task.pairs]
    scored = {spans[index[position]] for pair, index in rows for position in pair.scored}
    in_scored = tuple(name for name in spans if name in scored)
    if kind == "token" and causal:
        return Positions(kind, spans, in_scored, None)
    layouts = {tuple(index.tolist()) for _, index in rows}
    reaches = {pair for layout in layouts for pair in _reaches(np.array(layout), causal)}
    return Positions(kind, spans, in_scored, tuple(sorted(reaches)))


def _token_names(n_pos: int) -> tuple[str, ...]:
    return tuple(f"p{position}" for position in range(n_pos))


def _check_equal_length(task: Task) -> None:
    lengths = sorted({len(pair.clean) for pair in task.pairs})
    if len(lengths) > 1:
        raise OptionError(
            f"positions 'token' needs prompts of equal length, but task {task.name!r} has prompts "
            f"of {lengths[0]} to {lengths[-1]} tokens: split by 'span', or give prompts of one "
            "length"
        )


def _labels(task: Task) -> tuple[str, ...]:
    """The task's labels, behind ``rest`` where there are positions without one."""
    labels = tuple(task.pairs[0].spans)
    if not labels:
        raise OptionError(
            f"positions 'span' needs labelled prompts, but task {task.name!r} labels no spans: "
            "add \"spans\" to its file, or split by 'token'"
        )
    bare = any(sum(map(len, pair.spans.values())) < len(pair.clean) for pair in task.pairs)
    return (REST, *labels) if bare else labels


def _reaches(index: NDArray[np.int64], causal: bool) -> Iterator[tuple[int, int]]:
    """Pairs of spans of which one position of the first can be read at one of the second."""
    here = sorted(set(index.tolist()))
    first = {s: int(np.argmax(index == s)) for s in here}
    last = {s: int(np.flatnonzero(index == s)[-1]) for s in here}
    return ((s, t) for s in here for t in here if not causal or first[s] <= last[t])
