"""Deciding the edges of a receiver with speculative batches.

The decisions of the next K edges are guessed, the K cumulative scenarios that follow from the
guesses are evaluated in one go, and decisions are accepted up to and including the first
wrong guess.  As in speculative decoding, the outcome does not depend on the guesses.  What a
wrong guess leaves over is not lost: it says what to expect of the edges that come next.  How many
are evaluated together follows from how often guesses like theirs were wrong so far
(:mod:`acdc.engine.doubt`).

Several thresholds can be decided together for as long as they agree (see
:mod:`acdc.methods.sweep`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from acdc.engine.doubt import N_KINDS, Doubt, best_length
from acdc.engine.incremental import IncrementalRun, Outcomes
from acdc.engine.moved import Read, StateError
from acdc.engine.referee import Referee

__all__ = ["Decision", "Speculation", "Split"]

Edges = NDArray[np.int64]

_LARGEST_BATCH = 256


@dataclass(frozen=True)
class Decision:
    """What became of one edge.

    Parameters
    ----------
    edge
        Edge index.
    change
        ``m' - m``: what its removal did to the minimised metric; exactly 0 where it cannot
        matter.
    removed
        Whether it stays out.
    """

    edge: int
    change: float
    removed: bool


@dataclass(frozen=True, eq=False)
class Split:
    """An edge on which the thresholds disagree.

    Parameters
    ----------
    edge, change
        As in :class:`Decision`.
    guess
        Whether the edge was guessed to be removed: for the thresholds that do so, the rest of
        the batch is evaluated already.
    rest
        Edges of the receiver that are still to be decided after it.
    """

    edge: int
    change: float
    guess: bool
    rest: Edges


@dataclass(eq=False)
class _Batch:
    """Scenarios that were evaluated together, and how far they are decided.

    Parameters
    ----------
    edges
        ``[edge]``, in the order of decision.
    guesses
        ``[edge] bool``: which are guessed to be removed.
    values
        ``[edge]``: minimised metric without the edge and those guessed to be removed before.
    outcomes
        What is needed to commit a scenario.
    kinds
        ``[edge]``: see :meth:`acdc.engine.doubt.Doubt.kinds`.
    n_decided
        Edges decided so far, all but the last as guessed.
    wrong
        Whether the last one was decided otherwise.
    accepted
        The last scenario that holds, None if there is none.
    """

    edges: Edges
    guesses: NDArray[np.bool_]
    values: NDArray[np.float64]
    outcomes: Outcomes
    kinds: NDArray[np.int64]
    n_decided: int = 0
    wrong: bool = False
    accepted: int | None = None


class Speculation:
    """Sequential decisions, evaluated in batches.

    Parameters
    ----------
    run
        State of the current circuit.
    thresholds
        Taus: an edge stays out if its removal changes the metric by less.
    expected
        ``[edge]``: what each edge's removal is expected to change the minimised metric by, as
        attribution scores say: guesses go by what became of edges of which as much was expected.
        None: nothing is known, and edges are guessed to be removed unless most were kept.
    two_sided
        Whether a change counts by its size, whichever way it goes.

    Attributes
    ----------
    expected
        Kept up to date with what is measured.
    split
        Set when :meth:`decide` stopped because the thresholds disagree; never with one.
    """

    def __init__(
        self,
        run: IncrementalRun,
        thresholds: Sequence[float],
        expected: NDArray[np.float64] | None = None,
        *,
        two_sided: bool = False,
    ) -> None:
        self.run, self.two_sided = run, two_sided
        self.thresholds = tuple(sorted(thresholds))
        if self.thresholds[0] <= 0.0 < self.thresholds[-1]:
            raise ValueError(f"thresholds {thresholds} of both signs cannot be decided together")
        n_edges = run.graph.n_edges
        nothing = np.full(n_edges, 0.0 if two_sided else -np.inf)
        self.expected = nothing if expected is None else expected.copy()
        self.sign = run.experiment.minimised_sign
        self.current = self.sign * run.metric()
        exact = run.experiment.in_float32
        self.referee = (
            None
            if exact is None
            else Referee(exact, run.memory, self.current, run.work, two_sided=two_sided)
        )
        self.split: Split | None = None
        self._batch: _Batch | None = None  # interrupted by a split
        self._removed: list[int] = []  # edges of the receiver at hand
        self._measured = np.zeros(n_edges, dtype=bool)
        self._doubt = Doubt()

    def decide(self, edges: Edges) -> Iterator[Decision]:
        """Decide the edges of one receiver in the given order, up to a :attr:`split`."""
        self.split = None
        if not len(edges):
            return
        matters = self.run.can_change(edges)
        rest = edges[matters]
        if len(rest) < len(edges):
            self.run.work.n_dead += len(edges) - len(rest)
            removed = self.thresholds[0] > 0.0  # a change of exactly 0 against tau
            yield from (Decision(int(edge), 0.0, removed) for edge in edges[~matters])
        while len(rest) and self.split is None:
            decisions = self._accept(self._batch or self._evaluate(rest), rest)
            yield from decisions
            rest = rest[len(decisions) :]

    def resolve(self, removed: bool, thresholds: Sequence[float]) -> Decision:
        """Go on after a split with the thresholds that decide its edge one way."""
        assert self.split is not None
        assert self._batch is not None
        self.thresholds = tuple(sorted(thresholds))
        decision = self._take(self._batch, self.split.change, removed)
        if removed != self.split.guess:
            self._commit(self._batch)  # the rest belongs to the other thresholds
        elif self._batch.n_decided == len(self._batch.edges):
            self._close(self._batch)
        return decision

    def fork(self) -> Speculation:
        """Copy the state; the copies share what they learn of changes, and nothing else."""
        twin = copy.copy(self)
        twin.run, twin._batch = self.run.fork(), copy.copy(self._batch)
        twin.referee = self.referee and self.referee.fork()
        twin._removed = self._removed.copy()
        return twin

    def keep(self) -> Iterator[NDArray[np.generic]]:
        """Yield what :meth:`restore` needs; between two receivers."""
        yield self.expected
        yield self._measured
        yield np.array([self.current, *self._doubt.n, *self._doubt.kept])
        yield from self.run.keep()
        if self.referee is not None:
            yield from self.referee.keep()

    def restore(self, finished: Iterable[tuple[int, Edges]], read: Read) -> None:
        """Go on from what was kept: the search does what it would have done to the last bit.

        Guesses are part of it, as they decide what is evaluated together, and with it rounding.

        Parameters
        ----------
        finished
            Receivers whose edges were decided by then, in order, with those that stay in.
        read
            Gives the arrays of :meth:`keep` one after the other.

        Raises
        ------
        StateError
            If no search can have kept it.
        """
        for receiver, kept in finished:
            self.run.finish(receiver, kept)
            if self.referee is not None:
                self.referee.run.finish(receiver, kept)
        self.expected = read("<f8", self.expected.shape).astype(float)
        self._measured = read("|b1", self._measured.shape).astype(bool)
        pace = read("<f8", (1 + 2 * N_KINDS,)).astype(float)
        self._doubt.n, self._doubt.kept = pace[1:].reshape(2, N_KINDS)
        if not np.isfinite(pace).all() or (pace[1:] < 0).any():
            raise StateError("the pace of the search is not finite")
        self.current = float(pace[0])
        self.run.restore(read)
        if self.referee is not None:
            self.referee.restore(read)

    def remove(self, edges: Edges) -> None:
        """Take edges of one receiver out without asking what that changes."""
        if len(edges):
            edges = edges[self.run.can_change(edges)]
        if len(edges):
            values, outcomes = self.run.evaluate(edges, np.ones((1, len(edges)), dtype=bool))
            self.run.commit(outcomes, 0)
            self.current = self.sign * float(values[0])
            self._removed += edges.tolist()

    def finish(self, receiver: int, kept: Edges) -> None:
        """End a receiver, all of whose edges are decided; ``kept`` are those that stay in."""
        self.run.finish(receiver, kept)
        if self.referee is not None:
            self.referee.finish(receiver, self._removed, kept, self.current)
        self._removed = []

    def _evaluate(self, rest: Edges) -> _Batch:
        """Evaluate a first part of the edges."""
        most = min(self.run.capacity(rest), _LARGEST_BATCH)
        edges, tau = rest[:most], self.thresholds[-1]
        expected = np.abs(self.expected[edges]) if self.two_sided else self.expected[edges]
        kinds = self._doubt.kinds(expected, tau, self._measured[edges])
        kept = self._doubt.kept_of(kinds)
        n = best_length(np.minimum(kept, 1 - kept), self.run.overhead(rest))
        edges, kinds, guesses = edges[:n], kinds[:n], kept[:n] < 0.5
        scenarios = np.tril(np.broadcast_to(guesses, (n, n)), -1) | np.eye(n, dtype=bool)
        likely = int(np.flatnonzero(guesses).max(initial=0))
        values, outcomes = self.run.evaluate(edges, scenarios, likely)
        values = self.sign * values
        before = np.maximum.accumulate(np.where(guesses, np.arange(1, n + 1), 0))
        self._measured[edges] = True
        self.expected[edges] = values - np.r_[self.current, values][np.r_[0, before[:-1]]]
        return _Batch(edges, guesses, values, outcomes, kinds)

    def _accept(self, batch: _Batch, rest: Edges) -> list[Decision]:
        """Decide a batch up to its end, its first wrong guess or a split."""
        decisions: list[Decision] = []
        while batch.n_decided < len(batch.edges):
            i = batch.n_decided
            edge, change = int(batch.edges[i]), float(batch.values[i]) - self.current
            if self.referee is not None:
                change = self.referee.review(self._removed, edge, change, self.thresholds)
            removed = self._is_removed(change)
            if removed is None:
                after = rest[len(decisions) + 1 :]
                self.split = Split(edge, change, bool(batch.guesses[i]), after)
                self._batch = batch
                return decisions
            decisions.append(self._take(batch, change, removed))
            if removed != batch.guesses[i]:
                break
        self._close(batch)
        return decisions

    def _is_removed(self, change: float) -> bool | None:
        """Whether an edge stays out; None where the thresholds disagree."""
        cost = abs(change) if self.two_sided else change
        if cost < self.thresholds[0]:
            return True
        return False if cost >= self.thresholds[-1] else None

    def _take(self, batch: _Batch, change: float, removed: bool) -> Decision:
        """Decide the next edge of a batch."""
        i = batch.n_decided
        batch.n_decided += 1
        batch.wrong = removed != bool(batch.guesses[i])
        self.run.work.n_decisions += 1
        if removed:
            batch.accepted, self.current = i, float(batch.values[i])
            self._removed.append(int(batch.edges[i]))
        return Decision(int(batch.edges[i]), change, removed)

    def _commit(self, batch: _Batch) -> None:
        """Make what a batch decided the current state."""
        if batch.accepted is not None:
            self.run.commit(batch.outcomes, batch.accepted)
        self._batch = None

    def _close(self, batch: _Batch) -> None:
        """Commit a batch of which nothing more can be used, and learn how good its guesses were."""
        self._commit(batch)
        n = batch.n_decided
        self.run.work.n_wasted += len(batch.edges) - n
        kept = ~batch.guesses[:n]
        kept[-1] ^= batch.wrong
        self._doubt.learn(batch.kinds[:n], kept)
