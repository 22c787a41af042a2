"""Which threshold keeps a number of edges.

A search has measured what each edge's removal changes: at another tau about those edges stay out
whose change is below it.  So one circuit says where to look for one of another size, first from
attribution scores, then from rough searches (:mod:`acdc.methods.rough`), then from whole ones.  The
circuit is exactly the one that ACDC finds at the tau that is returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from acdc.methods.base import Found
from acdc.methods.rough import Rough
from graphs import Circuit

__all__ = ["MOST", "of_size"]

MOST = 12
"""Searches at most."""

_FIRST, _TOP, _BOTTOM = 0.003, 2.0, 1e-6
"""Tau that is tried first where no scores say more, and between which: fractions of the gap."""

_ENOUGH = 0.98
"""Share of the edges asked for that is enough."""

_NEAR = 1.004
"""Or a circuit with too many edges was found at a tau at most so many times smaller."""

_ROUGH, _MOST_ROUGH = 0.1, 6
"""How near to the number a rough search has to come, as a share of it, and how many there are."""

_FARTHEST_UP, _FARTHEST_DOWN = 30.0, 4.0
"""By how much a tau changes at most in one step: one that is too small may take hours."""


class _Sizes:
    """Circuits tried, and where one of the size asked for is expected.

    Parameters
    ----------
    gap
        Of the metric.
    n_edges
        At most so many edges.
    scores
        ``[edge]``: attribution scores, which say where to begin: edges with a score of at least
        tau are about those that stay.  Few at first cost little; many may take hours.

    Attributes
    ----------
    low, high
        The largest tau whose circuit has too many edges, the smallest whose circuit has few
        enough.
    tau
        Where to look next.
    """

    def __init__(self, gap: float, n_edges: int, scores: NDArray[np.float64] | None = None) -> None:
        self.gap, self.n_edges = gap, n_edges
        self.low, self.high = 0.0, math.inf
        self._scores = None if scores is None else np.sort(np.abs(scores))[::-1]
        self.tau = self._allowed(self._of_rank(n_edges) or _FIRST * gap)
        self._side = 0  # how many circuits in turn had too many (below 0: few enough) edges

    def add(self, circuit: Circuit) -> None:
        """Learn from the circuit at :attr:`tau`, and say where to look next."""
        too_many = circuit.n_edges > self.n_edges
        if too_many:
            self.low = max(self.low, self.tau)
        else:
            self.high = min(self.high, self.tau)
        self._side = max(self._side, 0) + 1 if too_many else min(self._side, 0) - 1
        self.tau = self._within(self._from(circuit))

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to try."""
        if self.high <= _BOTTOM * self.gap or self.low >= _TOP * self.gap:
            return True
        return self.low > 0 and self.high <= _NEAR * self.low

    def _from(self, circuit: Circuit) -> float:
        """Tau at which about the number asked for has a change of at least that."""
        wanted = max(1, round((1 + _ENOUGH) / 2 * self.n_edges))
        more = wanted - circuit.n_edges
        kept, removed = circuit.scores[circuit.in_circuit], circuit.scores[~circuit.in_circuit]
        if more < 0:
            changes = np.sort(np.abs(kept))
            return _between(changes, -more)
        changes = np.sort(removed[removed > 0])[::-1]
        tau = _between(changes, more) if more < len(changes) else 0.0
        if self._scores is not None and not self.low:
            rank = int(np.count_nonzero(self._scores > self.tau))
            tau = max(tau, self._of_rank(round(rank * wanted / max(1, circuit.n_edges))))
        return tau

    def _of_rank(self, rank: int) -> float:
        """Tau that so many edges have an attribution score of; 0 where nothing says."""
        if self._scores is None or rank >= len(self._scores):
            return 0.0
        return float(self._scores[rank])

    def _within(self, tau: float) -> float:
        """Tau strictly between what was tried; the middle where steps come from one side only."""
        if self.low > 0 and self.high < math.inf:
            inside = self.low * math.sqrt(_NEAR) <= tau <= self.high / math.sqrt(_NEAR)
            return tau if inside and abs(self._side) < 3 else math.sqrt(self.low * self.high)
        step = _NEAR ** (2 ** abs(self._side))
        if self.low > 0:
            tau = min(max(tau, self.low * step), self.low * _FARTHEST_UP)
        else:
            tau = max(min(tau, self.high / step), self.high / _FARTHEST_DOWN)
        return self._allowed(tau)

    def _allowed(self, tau: float) -> float:
        return min(max(tau, _BOTTOM * self.gap), _TOP * self.gap)


def _between(changes: NDArray[np.float64], n: int) -> float:
    """Between the ``n``-th and the next of sorted changes above 0."""
    pair = changes[max(n - 1, 0) : n + 1]
    return float(np.exp(np.log(pair).mean()))


def of_size(
    gap: float,
    n_edges: int,
    run: Callable[[float], Found],
    rough: Callable[[], Rough] | None,
) -> Found:
    """Look for the largest circuit of at most ``n_edges`` edges.

    Of those that are found: the search ends at the first with 98 % of the number.

    Parameters
    ----------
    gap
        Of the metric between the full model and no edge.
    n_edges
        At most so many.
    run
        ``tau -> Found``.
    rough
        Returns what finds about what ``run`` finds, in a fraction of the time; None: every
        search is a whole one.
    """
    if not gap:
        return run(0.0)
    sizes = _Sizes(gap, n_edges)
    best: Found | None = None
    if rough is not None:
        sizes.tau = _roughly(gap, n_edges, rough())
    for _ in range(MOST):
        found = run(sizes.tau)
        size = found.circuit.n_edges
        sizes.add(found.circuit)
        if size <= n_edges and (best is None or size >= best.circuit.n_edges):
            best = found
        if _ENOUGH * n_edges <= size <= n_edges or sizes.is_done:
            break
    return run(_TOP * gap) if best is None else best


def _roughly(gap: float, n_edges: int, rough: Rough) -> float:
    """Tau at which rough circuits have about so many edges."""
    sizes, size = _Sizes(gap, n_edges, rough.scores), -1
    for _ in range(_MOST_ROUGH):
        tau, before, circuit = sizes.tau, size, rough(sizes.tau)
        size = circuit.n_edges
        sizes.add(circuit)
        if abs(size - n_edges) <= _ROUGH * n_edges or size == before or sizes.is_done:
            return tau if size == n_edges else sizes.tau
    return sizes.tau
