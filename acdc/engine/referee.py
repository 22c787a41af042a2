"""Decisions that a low precision cannot make, made in float32.

In bfloat16 or float16 a change of the metric is known only up to rounding.  The referee
holds the same circuit in float32.  It reviews each decision whose change is nearer to a
threshold than the rounding that it has observed so far, and follows the run receiver by
receiver with one evaluation each.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.engine.incremental import IncrementalRun, Work
from acdc.engine.moved import Read

__all__ = ["Referee"]

_SAFETY = 2.0
_FIRST = 16


class Referee:
    """A second opinion in float32.

    Parameters
    ----------
    experiment
        The same experiment on the float32 model.
    memory
        Bytes that one evaluation's scenarios may take.
    low
        The minimised metric of the full model in low precision.
    work
        Where reviews are counted.
    two_sided
        Whether decisions go by the size of a change.

    Attributes
    ----------
    rounding
        The largest difference between a change in low precision and the same in float32 that
        was seen, in the metric's unit.
    margin
        Decisions whose change is nearer to a threshold are reviewed: twice the rounding;
        infinite for the first 16 decisions.
    """

    def __init__(
        self,
        experiment: Experiment,
        memory: int,
        low: float,
        work: Work,
        *,
        two_sided: bool = False,
    ) -> None:
        self.run, self.work = IncrementalRun(experiment, memory), work
        self.two_sided = two_sided
        self.sign = experiment.minimised_sign
        self.rounding = 0.0
        self._exact, self._low = self.sign * self.run.metric(), low

    @property
    def margin(self) -> float:
        """How near to a threshold a change must be to be reviewed."""
        return np.inf if self.work.n_reviewed < _FIRST else _SAFETY * self.rounding

    def review(
        self, removed: Sequence[int], edge: int, change: float, thresholds: Sequence[float]
    ) -> float:
        """Return what removing an edge changes, from float32 where a threshold is near.

        Parameters
        ----------
        removed
            Edges of the same receiver that are out by now.
        edge
            The edge under test.
        change
            What it changes the minimised metric by, in low precision.
        thresholds
            Taus.
        """
        if min(abs(self._cost(change) - tau) for tau in thresholds) > self.margin:
            return change
        edges = np.array([*removed, edge])
        without = np.ones((1, len(edges)), dtype=bool)
        with_edge = without.copy()
        with_edge[0, -1] = False
        values, _ = self.run.evaluate(edges, np.concatenate([with_edge, without]))
        exact = self.sign * float(values[1] - values[0])
        self.rounding = max(self.rounding, abs(exact - change))
        self.work.n_reviewed += 1
        costs = self._cost(change), self._cost(exact)
        self.work.n_overruled += any((costs[0] < tau) != (costs[1] < tau) for tau in thresholds)
        return exact

    def _cost(self, change: float) -> float:
        """What is held against a threshold."""
        return abs(change) if self.two_sided else change

    def finish(
        self, receiver: int, removed: Sequence[int], kept: NDArray[np.int64], low: float
    ) -> None:
        """Follow the run past a receiver, and compare.

        Parameters
        ----------
        receiver
            Receiver index.
        removed
            Those of its edges that were evaluated and are out.
        kept
            Those of its edges that stay in.
        low
            The minimised metric in low precision now.
        """
        if removed:
            values, outcomes = self.run.evaluate(
                np.array(removed), np.ones((1, len(removed)), dtype=bool)
            )
            self.run.commit(outcomes, 0)
            exact = self.sign * float(values[0])
            self.rounding = max(self.rounding, abs((exact - self._exact) - (low - self._low)))
            self._exact, self._low = exact, low
        self.run.finish(receiver, kept)

    def keep(self) -> Iterator[NDArray[np.generic]]:
        """Yield what :meth:`restore` needs, see :meth:`IncrementalRun.keep`."""
        yield np.array([self._exact, self._low])
        yield from self.run.keep()

    def restore(self, read: Read) -> None:
        """Go on from what was kept, see :meth:`IncrementalRun.restore`."""
        self._exact, self._low = read("<f8", (2,)).tolist()
        self.run.restore(read)

    def fork(self) -> Referee:
        """Copy the state, sharing the count of work."""
        twin = copy.copy(self)
        twin.run = self.run.fork()
        return twin
