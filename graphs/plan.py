"""Which units an edge's removal touches, at which positions, in which order.

ACDC tests the edges of one receiver at a time.  Everything upstream of the receiver is as in
the base run; downstream, only kept edges carry a change.  So an evaluation is a walk from the
receiver along kept edges, restricted at every node to positions that are

* *live*: some kept path leads from there to a scored position, and
* *touched*: some change arrives there.

A *unit* is what is recomputed as one (:attr:`graphs.graph.Graph.unit`): a head, an MLP with
its latents, one latent of a transcoder.  Where there are no dictionaries it is a node.

The walk is graph work and is done here; the executor in ``acdc.engine`` only follows it.

Plans speak of components (``graph.components``) and token positions, also where the graph is
split by spans: there an edge is kept at the positions of its span.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import no_type_check

import numpy as np
from numba import njit
from numpy.typing import NDArray

from graphs.graph import Graph

Mask = NDArray[np.bool_]
Numbers = tuple[int, ...]

_Link = tuple[int, Numbers, Numbers | None]
"""A unit, its senders with kept edges to a receiver, and at which positions (None: all)."""

__all__ = ["Flow", "Plan", "Planner", "Step"]


@dataclass(frozen=True)
class Flow:
    """The change that arrives at one receiver.

    Parameters
    ----------
    receiver
        Receiver index.
    positions
        Sorted positions at which it changes.
    units
        Those that change where they have kept edges to it, in topological order; empty for the
        receiver under test, whose change is given.  Where spans keep different senders of a unit
        it comes more than once.
    senders
        By entry of ``units``: senders of the unit whose edges to the receiver are kept.
    kept_at
        By entry of ``units``: sorted positions at which they are; None for all of the prompt.
    """

    receiver: int
    positions: Numbers
    units: Numbers
    senders: tuple[Numbers, ...]
    kept_at: tuple[Numbers | None, ...]


@dataclass(frozen=True)
class Step:
    """One unit to recompute.

    Parameters
    ----------
    unit
        Its number; the last is ``logits``.
    positions
        Sorted positions at which its output is wanted.
    receivers
        Its receivers that change: all that must be computed anew.
    senders
        Its senders that are wanted, as live kept edges leave them; none of ``logits``.
    """

    unit: int
    positions: Numbers
    receivers: Numbers
    senders: Numbers


@dataclass(frozen=True)
class Plan:
    """What one evaluation does, in order; plain data.

    Parameters
    ----------
    flows
        By receiver index: the change that arrives there.
    steps
        Units to recompute, in topological order; the last is ``logits`` if the change reaches
        it, and no step at all means that the metric cannot change.
    """

    flows: dict[int, Flow]
    steps: tuple[Step, ...]

    @property
    def reaches_logits(self) -> bool:
        """Whether the metric can change."""
        return bool(self.steps)

    @property
    def n_positions(self) -> int:
        """Unit positions recomputed in all."""
        return sum(len(step.positions) for step in self.steps)


class Planner:
    """Liveness of units under the edges kept so far, and plans that follow from it.

    Receivers are finished in reverse topological order: :meth:`finish` says which of a
    receiver's edges were kept.

    Parameters
    ----------
    graph
        The graph.
    n_pos
        Positions of the prompts.
    scored
        Positions whose logits are scored.
    causal
        Whether a key or value can only affect its own and later positions.
    spans
        ``[pos]``: index of each position's span, if the graph is split by spans.

    Attributes
    ----------
    need
        ``[unit, pos]``: where a unit's output can affect a scored logit.
    wanted
        ``[sender]`` of ``graph.components``: whether live kept edges leave it.
    kept
        By receiver of ``graph.components``: senders of its kept edges, of ``graph`` itself.
    """

    def __init__(
        self,
        graph: Graph,
        n_pos: int,
        scored: tuple[int, ...],
        *,
        causal: bool = True,
        spans: tuple[int, ...] | None = None,
    ) -> None:
        self.graph, self.causal = graph, causal
        self.components = components = graph.components
        of_pos = np.zeros(n_pos, dtype=np.int64) if spans is None else np.array(spans)
        self.at = of_pos == np.arange(graph.shape.n_spans)[:, None]  # (span, pos)
        self._by_span = np.argsort(of_pos, kind="stable")
        self._span_start = np.concatenate([[0], np.cumsum(self.at.sum(1))])
        self.unit = components.unit
        self.need = np.zeros((int(self.unit[-1]) + 1, n_pos), dtype=bool)
        self.need[-1, list(scored)] = True
        self.wanted = np.zeros(components.n_senders, dtype=bool)
        n_receivers = len(components.receivers)
        self.point = np.array([port == "" or "q" in port for port in components.port])
        self.spread = np.array([bool({"k", "v"} & set(port)) for port in components.port])
        self._port_start, self._ports = _ports(components)
        self._live = np.zeros((n_receivers, n_pos), dtype=bool)
        self.kept: list[NDArray[np.int32]] = [np.zeros(0, np.int32)] * n_receivers
        self._kept_units: list[NDArray[np.int64]] = [np.zeros(0, np.int64)] * n_receivers
        self._links: dict[int, list[_Link]] = {}
        self._plans: dict[tuple[int, bytes], Plan] = {}
        self._flat: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    def live(self, receiver: int) -> NDArray[np.bool_]:
        """``[pos]``: where a change at the receiver can affect a scored logit."""
        graph = self.graph
        live = self._live_of(int(graph.receiver_component[receiver]))
        return np.logical_and(live, self.at[graph.receiver_span[receiver]])

    def _live_of(self, component: int) -> NDArray[np.bool_]:
        point, spread = self.point[component], self.spread[component]
        live: Mask = _live_positions(self.need[self._fed(component)], point, spread, self.causal)
        return live

    def _fed(self, component: int) -> slice:
        """Units that a receiver feeds."""
        fed = self.unit[self.components.fed_by(component)]
        return slice(int(fed[0]), int(fed[-1]) + 1)

    def finish(self, receiver: int, kept_edges: NDArray[np.int64]) -> None:
        """Record the kept edges of a receiver; its senders become live where it reads them."""
        self._plans.clear()
        if not len(kept_edges):
            return
        graph, component = self.graph, int(self.graph.receiver_component[receiver])
        senders = np.sort(graph.edge_sender[kept_edges])
        self.kept[component] = np.concatenate([self.kept[component], senders])
        n_spans = len(self.at)
        by_unit = self.unit[self.kept[component] // n_spans] * n_spans
        self._kept_units[component] = np.unique(by_unit + self.kept[component] % n_spans)
        self._links.pop(component, None)
        self._flat = None
        self._live[component] = live = self._live_of(component)
        read: Mask = np.logical_and(live, self.at[graph.receiver_span[receiver]])
        nodes = graph.sender_component[senders]
        self.need[self.unit[nodes]] |= read
        self.wanted[nodes] |= read.any()

    def plan(self, receiver: int, touched: NDArray[np.bool_]) -> Plan:
        """Plan the evaluation of a change at ``receiver``.

        Parameters
        ----------
        receiver
            Receiver index; its downstream must be finished.
        touched
            ``[pos]``: where its input may change.
        """
        key = receiver, touched.tobytes()
        if key not in self._plans:
            self._plans[key] = self._plan(receiver, touched)
        return self._plans[key]

    def _plan(self, receiver: int, touched: NDArray[np.bool_]) -> Plan:
        seed: Mask = np.logical_and(touched, self.live(receiver))
        component = int(self.graph.receiver_component[receiver])
        in_pos, out_pos = _walk(
            component, seed, self._fed(component).start, *self._kept_csr(), self._span_start,
            self._by_span, self._port_start, self._ports, self.point, self.spread, self._live,
            self.need, self.causal,
        )  # fmt: skip
        if not out_pos[-1].any():
            return Plan({}, ())
        return self._collect(component, in_pos, out_pos)

    def _kept_csr(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Kept edges by receiver: ``unit * n_spans + span``, each once."""
        if self._flat is None:
            start = np.cumsum([0, *map(len, self._kept_units)]).astype(np.int64)
            self._flat = start, np.concatenate(self._kept_units)
        return self._flat

    def _collect(self, tested: int, in_pos: NDArray[np.bool_], out_pos: NDArray[np.bool_]) -> Plan:
        flows: dict[int, Flow] = {}
        steps = []
        touched: Mask = np.logical_or.reduce(out_pos, axis=1)
        for unit in np.flatnonzero(touched).tolist():
            ports = self._ports[self._port_start[unit] : self._port_start[unit + 1]]
            receivers = tuple(v for v in ports.tolist() if in_pos[v].any())
            for v in receivers:
                if v not in flows:
                    arriving = [] if v == tested else [
                        link for link in self._links_to(v)
                        if touched[link[0]]
                        and (link[2] is None or out_pos[link[0], list(link[2])].any())
                    ]  # fmt: skip
                    columns = zip(*arriving, strict=True) if arriving else ((), (), ())
                    flows[v] = Flow(v, _positions(in_pos[v]), *columns)
            senders = self._senders(unit)
            steps.append(Step(unit, _positions(out_pos[unit]), receivers, senders))
        return Plan(flows, tuple(steps))

    def _senders(self, unit: int) -> Numbers:
        """Senders of a unit that are wanted."""
        low, high = np.searchsorted(self.unit[:-1], [unit, unit + 1])
        return tuple((low + np.flatnonzero(self.wanted[low:high])).tolist())

    def _links_to(self, component: int) -> list[_Link]:
        """Units with kept edges to a receiver, in order: senders, and positions of the edges."""
        if component not in self._links:
            n_spans, spans = len(self.at), defaultdict[int, list[int]](list)
            for sender in np.sort(self.kept[component]).tolist():
                spans[sender // n_spans].append(sender % n_spans)
            alike = defaultdict[tuple[int, Numbers], list[int]](list)
            for sender, some in spans.items():
                alike[int(self.unit[sender]), tuple(some)].append(sender)
            self._links[component] = [
                (unit, tuple(senders), self._at_spans(some))
                for (unit, some), senders in sorted(alike.items())
            ]
        return self._links[component]

    def _at_spans(self, spans: Numbers) -> Numbers | None:
        """Positions of spans; None for all of the prompt."""
        return None if len(spans) == len(self.at) else _positions(self.at[list(spans)].any(0))


def _positions(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(p) for p in np.flatnonzero(mask))


def _ports(graph: Graph) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Receivers of each unit: of unit ``i`` those from ``start[i]`` to ``start[i + 1]``."""
    n_receivers = len(graph.receivers)
    receivers = np.repeat(np.arange(n_receivers), np.diff(graph.feeds_start))
    pairs = np.unique(graph.unit[graph.feeds] * n_receivers + receivers)
    unit, port = np.divmod(pairs, n_receivers)
    return np.searchsorted(unit, np.arange(graph.unit[-1] + 2)), port.astype(np.int64)


@no_type_check
@njit(cache=True)
def _live_positions(need, point, spread, causal):
    """``[pos]``: where a receiver is read whose units are needed at ``need [unit, pos]``."""
    n_units, n_pos = need.shape
    live = np.zeros(n_pos, dtype=np.bool_)
    for unit in range(n_units):
        last = -1
        for p in range(n_pos):
            if need[unit, p]:
                last = p
                if point:
                    live[p] = True
        if spread:
            if last >= 0 and not causal:
                last = n_pos - 1
            for p in range(last + 1):
                live[p] = True
    return live


@no_type_check
@njit(cache=True)
def _walk(
    tested, seed, first, start, kept, span_start, by_span, port_start, ports, point, spread, live,
    need, causal,
):  # fmt: skip
    """Spread a change from one receiver along kept edges: positions of inputs and outputs.

    Kept edges are given by unit and span, see :meth:`Planner._kept_csr`; the positions of a span
    are ``by_span[span_start[span]:span_start[span + 1]]``.
    """
    n_units, n_pos = need.shape
    n_spans = len(span_start) - 1
    in_pos = np.zeros(live.shape, dtype=np.bool_)
    out_pos = np.zeros((n_units, n_pos), dtype=np.bool_)
    done = np.zeros(len(live), dtype=np.bool_)
    in_pos[tested] = seed
    done[tested] = True
    for unit in range(first, n_units):
        earliest = n_pos
        for port in range(port_start[unit], port_start[unit + 1]):
            v = ports[port]
            if not done[v]:
                done[v] = True
                for i in range(start[v], start[v + 1]):
                    u, span = kept[i] // n_spans, kept[i] % n_spans
                    for j in range(span_start[span], span_start[span + 1]):
                        p = by_span[j]
                        if out_pos[u, p] and live[v, p]:
                            in_pos[v, p] = True
            for p in range(n_pos):
                if in_pos[v, p]:
                    if point[v] and need[unit, p]:
                        out_pos[unit, p] = True
                    if spread[v] and p < earliest:
                        earliest = p
        if earliest < n_pos:
            for p in range(earliest if causal else 0, n_pos):
                if need[unit, p]:
                    out_pos[unit, p] = True
    return in_pos, out_pos
