"""Which nodes an edge's removal touches, at which positions, in which order.

ACDC tests the edges of one receiver at a time.  Everything upstream of the receiver is as in
the base run; downstream, only kept edges carry a change.  So an evaluation is a walk from the
receiver along kept edges, restricted at every node to positions that are

* *live*: some kept path leads from there to a scored position, and
* *touched*: some change arrives there.

The walk is graph work and is done here; the executor in ``acdc.engine`` only follows it.

Plans speak of components (``graph.components``) and token positions, also where the graph is
split by spans: there an edge is kept at the positions of its span.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import numpy as np
from numba import njit
from numpy.typing import NDArray

from graphs.graph import Graph, parse_node

Mask = NDArray[np.bool_]
_KeptAt = list[tuple[int, tuple[int, ...] | None]]

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
    senders
        Nodes that change where they have a kept edge to it, in topological order; empty for the
        receiver under test, whose change is given.
    kept_at
        By sender: sorted positions at which its edge is kept; None for all of the prompt.
    """

    receiver: int
    positions: tuple[int, ...]
    senders: tuple[int, ...]
    kept_at: tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class Step:
    """One node to recompute.

    Parameters
    ----------
    node
        Node index; ``graph.n_senders`` is ``logits``.
    positions
        Sorted positions at which its output is wanted.
    receivers
        Its receivers that change: all that must be computed anew.
    """

    node: int
    positions: tuple[int, ...]
    receivers: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What one evaluation does, in order; plain data.

    Parameters
    ----------
    flows
        By receiver index: the change that arrives there.
    steps
        Nodes to recompute, in topological order; the last is ``logits`` if the change reaches
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
        """Node positions recomputed in all."""
        return sum(len(step.positions) for step in self.steps)


class Planner:
    """Liveness of nodes under the edges kept so far, and plans that follow from it.

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
        ``[node, pos]``: where a node's output can affect a scored logit.
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
        self.need = np.zeros((components.n_nodes, n_pos), dtype=bool)
        self.need[components.n_senders, list(scored)] = True
        self.point, self.spread = _ports(components)
        n_receivers = len(components.receivers)
        self._live = np.zeros((n_receivers, n_pos), dtype=bool)
        self.kept: list[NDArray[np.int32]] = [np.zeros(0, np.int32)] * n_receivers
        self._kept_at: dict[int, _KeptAt] = {}
        self._plans: dict[tuple[int, bytes], Plan] = {}
        self._flat: tuple[NDArray[np.int64], NDArray[np.int32]] | None = None

    def live(self, receiver: int) -> NDArray[np.bool_]:
        """``[pos]``: where a change at the receiver can affect a scored logit."""
        graph = self.graph
        live = self._live_of(int(graph.receiver_component[receiver]))
        return np.logical_and(live, self.at[graph.receiver_span[receiver]])

    def _live_of(self, component: int) -> NDArray[np.bool_]:
        fed = self.components.fed_by(component)
        live: Mask = _live_positions(
            component, fed, self.point, self.spread, self.need, self.causal
        )
        return live

    def finish(self, receiver: int, kept_edges: NDArray[np.int64]) -> None:
        """Record the kept edges of a receiver; its senders become live where it reads them."""
        self._plans.clear()
        if not len(kept_edges):
            return
        graph, component = self.graph, int(self.graph.receiver_component[receiver])
        senders = np.sort(graph.edge_sender[kept_edges])
        self.kept[component] = np.concatenate([self.kept[component], senders])
        self._kept_at.pop(component, None)
        self._flat = None
        self._live[component] = live = self._live_of(component)
        at = self.at[graph.receiver_span[receiver]]
        self.need[graph.sender_component[senders]] |= np.logical_and(live, at)

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
        start, senders = self._kept_csr()
        seed: Mask = np.logical_and(touched, self.live(receiver))
        component = int(self.graph.receiver_component[receiver])
        first = int(self.components.fed_by(component)[0])
        in_pos, out_pos = _walk(
            component, seed, first, start, senders, self._span_start, self._by_span,
            self.point, self.spread, self._live, self.need, self.causal,
        )  # fmt: skip
        if not out_pos[-1].any():
            return Plan({}, ())
        return self._collect(component, in_pos, out_pos)

    def _kept_csr(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        if self._flat is None:
            start = np.cumsum([0, *map(len, self.kept)]).astype(np.int64)
            self._flat = start, np.concatenate(self.kept) if self.kept else np.zeros(0, np.int32)
        return self._flat

    def _collect(self, tested: int, in_pos: NDArray[np.bool_], out_pos: NDArray[np.bool_]) -> Plan:
        flows: dict[int, Flow] = {}
        steps = []
        touched: Mask = np.logical_or.reduce(out_pos, axis=1)
        for node in np.flatnonzero(touched):
            receivers = []
            for v in dict.fromkeys((self.point[node], *self.spread[node])):
                if v < 0 or not in_pos[v].any():
                    continue
                receivers.append(int(v))
                if v not in flows:
                    arriving = [] if v == tested else [
                        (u, at) for u, at in self._edges_kept_at(int(v))
                        if touched[u] and (at is None or out_pos[u, list(at)].any())
                    ]  # fmt: skip
                    senders, kept_at = zip(*arriving, strict=True) if arriving else ((), ())
                    flows[int(v)] = Flow(int(v), _positions(in_pos[v]), senders, kept_at)
            steps.append(Step(int(node), _positions(out_pos[node]), tuple(receivers)))
        return Plan(flows, tuple(steps))

    def _edges_kept_at(self, component: int) -> _KeptAt:
        """Nodes with a kept edge to a receiver, in order, and the positions where it is kept."""
        if component not in self._kept_at:
            n_spans, spans = len(self.at), dict[int, list[int]]()
            for sender in np.sort(self.kept[component]).tolist():
                node, span = divmod(sender, n_spans)
                spans.setdefault(node, []).append(span)
            self._kept_at[component] = [
                (node, None if len(some) == n_spans else _positions(self.at[some].any(0)))
                for node, some in spans.items()
            ]
        return self._kept_at[component]


def _positions(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(p) for p in np.flatnonzero(mask))


def _ports(graph: Graph) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Receivers of each node: ``[node]`` read position by position, ``[node, 2]`` as keys/values.

    -1 where there is none.
    """
    point = np.full(graph.n_nodes, -1, dtype=np.int64)
    spread = np.full((graph.n_nodes, 2), -1, dtype=np.int64)
    for v, name in enumerate(graph.receivers):
        for node in graph.fed_by(v):
            kind = parse_node(graph.nodes[node])[0]
            if kind != "head" or name.endswith("<q>"):
                point[node] = v
            elif name.endswith("<k>"):
                spread[node, 0] = v
            elif name.endswith("<v>"):
                spread[node, 1] = v
            elif ".kv" in name:
                spread[node] = v
            else:  # one receiver for the whole head: its query, and its own key and value
                point[node] = v
                if not graph.shape.grouped:
                    spread[node] = v
    return point, spread


@no_type_check
@njit(cache=True)
def _live_positions(receiver, fed, point, spread, need, causal):
    n_pos = need.shape[1]
    live = np.zeros(n_pos, dtype=np.bool_)
    for node in fed:
        last = -1
        for p in range(n_pos):
            if need[node, p]:
                last = p
                if point[node] == receiver:
                    live[p] = True
        if spread[node, 0] == receiver or spread[node, 1] == receiver:
            if last >= 0 and not causal:
                last = n_pos - 1
            for p in range(last + 1):
                live[p] = True
    return live


@no_type_check
@njit(cache=True)
def _walk(
    tested, seed, first, start, senders, span_start, by_span, point, spread, live, need, causal
):
    """Spread a change from one receiver along kept edges: positions of inputs and outputs.

    Kept edges are given by sender in the split graph: ``divmod(sender, n_spans)`` says node and
    span; the positions of a span are ``by_span[span_start[span]:span_start[span + 1]]``.
    """
    n_nodes, n_pos = need.shape
    n_spans = len(span_start) - 1
    in_pos = np.zeros(live.shape, dtype=np.bool_)
    out_pos = np.zeros((n_nodes, n_pos), dtype=np.bool_)
    done = np.zeros(len(live), dtype=np.bool_)
    in_pos[tested] = seed
    done[tested] = True
    for node in range(first, n_nodes):
        earliest = n_pos
        for port in range(3):
            v = point[node] if port == 0 else spread[node, port - 1]
            if v < 0:
                continue
            if not done[v]:
                done[v] = True
                for i in range(start[v], start[v + 1]):
                    u, span = senders[i] // n_spans, senders[i] % n_spans
                    for j in range(span_start[span], span_start[span + 1]):
                        p = by_span[j]
                        if out_pos[u, p] and live[v, p]:
                            in_pos[v, p] = True
            for p in range(n_pos):
                if in_pos[v, p]:
                    if port == 0:
                        out_pos[node, p] = need[node, p]
                    elif p < earliest:
                        earliest = p
        if earliest < n_pos:
            for p in range(earliest if causal else 0, n_pos):
                if need[node, p]:
                    out_pos[node, p] = True
    return in_pos, out_pos
