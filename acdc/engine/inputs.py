"""What receivers read, in many scenarios at once.

Under resample ablation a receiver's new input is its current one plus the changes that
arrive (:class:`Changes`).  Under zero ablation sums that are exactly zero matter, since a
norm blows up what rounding leaves of them, so there an input is the sum of the senders that
are still in (:class:`Sums`).

In models with a norm on the sum of the heads (Gemma-2) the heads of a layer form a *group*
that passes that norm; all other senders form the group -1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.experiment import Batch, Experiment, iter_layers
from acdc.engine.moved import Moved
from acdc.lowering.model import Trace
from graphs.graph import parse_node
from graphs.plan import Flow, Step

__all__ = ["Changes", "Input", "Output", "Sums", "index_of", "insert", "overlap"]

Positions = tuple[int, ...]
Index = slice | list[int]


@dataclass(frozen=True, eq=False)
class Input:
    """New input of one receiver in every scenario.

    Parameters
    ----------
    flow
        Receiver and positions.
    read
        ``[scenario, batch, position, d_model]``: what it reads at the flow's positions.
    raw
        By layer, likewise: sum of the heads in front of the layer's post-norm.
    """

    flow: Flow
    read: Tensor
    raw: dict[int, Tensor]


@dataclass(frozen=True, eq=False)
class Output:
    """New values of one node in every scenario.

    Parameters
    ----------
    step
        Node and positions.
    value
        ``[scenario, batch, position, d_model]``: the change against the current output
        (:class:`Changes`) or the new output (:class:`Sums`).
    placed
        New q, k and v of a head, ``[scenario, batch, position, d_head]``.
    """

    step: Step
    value: Tensor
    placed: dict[str, Tensor]


class Changes:
    """Inputs as current value plus changes.

    Parameters
    ----------
    experiment
        Model and graph.
    batch
        The prompts.
    trace
        The run that ablation starts from.
    out
        ``[sender, batch, pos, d_model]``: outputs, kept current by :meth:`commit`.
    ablation
        Likewise: what ablated edges carry, minus the base run's output.
    """

    def __init__(
        self, experiment: Experiment, batch: Batch, trace: Trace, out: Tensor, ablation: Tensor
    ) -> None:
        self.model, self.graph = experiment.model, experiment.graph.components
        self.out, self.ablation = out, ablation
        self.nodes = [parse_node(name) for name in self.graph.nodes]
        self._base_raw = trace.attention_out
        self._base = _streams(experiment, trace)
        self._read: dict[int, Tensor] = {}
        self._raw: dict[tuple[int, int], Tensor] = {}
        self.n_layers, n_receivers = len(self.model.layers), len(self.graph.receivers)
        n_raw = n_receivers * self.n_layers if self.model.has_post_norm else 0
        n_rows = {"out": len(out), "read": n_receivers, "raw": n_raw}
        self.moved = Moved(n_rows, batch.clean.shape[1])

    @property
    def fixed(self) -> tuple[object, ...]:
        """What never changes and may be shared by copies."""
        return self.ablation, self._base, self._base_raw, self.nodes

    def current(self, receiver: int) -> Tensor:
        """Current input of a receiver, ``[batch, pos, d_model]``."""
        return self._read.get(receiver, self._base[receiver])

    def ablate(self, flow: Flow, senders: NDArray[np.int64], scenarios: Tensor) -> Input:
        """New input of the tested receiver.

        Parameters
        ----------
        flow
            Receiver and positions.
        senders
            ``[edge]``: senders of the edges under test.
        scenarios
            ``[scenario, edge]``: which of them a scenario ablates.
        """
        at = index_of(flow.positions)
        changes = {}
        for group, members in self.groups(senders):
            ablation = self.ablation[torch.as_tensor(senders[members])][:, :, at]
            weight = scenarios[:, torch.as_tensor(members)].to(ablation.dtype)
            changes[group] = torch.einsum("ke,ebpd->kbpd", weight, ablation)
        return self._add(flow, changes)

    def gather(self, flow: Flow, outputs: dict[int, Output]) -> Input:
        """New input of a downstream receiver: what its touched senders bring."""
        changes = {}
        for group, members in self.groups(flow.units):
            parts = ((outputs[flow.units[i]], flow.kept_at[i]) for i in members)
            changes[group] = _sum_at(flow.positions, parts)
        return self._add(flow, changes)

    def store(self, node: int, positions: Positions, new: Tensor) -> Tensor:
        """Return what :class:`Output` holds of a node's new output."""
        return new - self.out[node][:, index_of(positions)]

    def commit(self, inputs: dict[int, Input], outputs: dict[int, Output], scenario: int) -> None:
        """Make one scenario's inputs and outputs the current ones."""
        self._commit_inputs(inputs, scenario)
        for node, output in outputs.items():
            self.moved.note("out", node, output.step.positions)
            self.out[node][:, index_of(output.step.positions)] += output.value[scenario]

    def own(self, name: str, row: int) -> Tensor:
        """Return current values that may be written to, ``[batch, pos, d_model]``.

        ``out`` by node, ``read`` by receiver, ``raw`` by receiver and layer.
        """
        if name == "out":
            return self.out[row]
        if name == "read":
            if row not in self._read:
                self._read[row] = self._base[row].clone()
            return self._read[row]
        receiver, layer = divmod(row, self.n_layers)
        if (receiver, layer) not in self._raw:
            self._raw[receiver, layer] = self._base_raw[layer].clone()
        return self._raw[receiver, layer]

    def groups(self, senders: Iterable[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield groups with the places of their members in ``senders``."""
        groups: dict[int, list[int]] = {}
        for i, u in enumerate(senders):
            kind, layer, _ = self.nodes[u]
            head = kind == "head" and self.model.has_post_norm
            groups.setdefault(layer if head else -1, []).append(i)
        yield from groups.items()

    def _add(self, flow: Flow, changes: dict[int, Tensor]) -> Input:
        """Current input plus changes of the groups' sums."""
        at = index_of(flow.positions)
        read = self.current(flow.receiver)[:, at]
        if -1 in changes:
            read = read + changes.pop(-1)
        raw = {}
        for layer, change in changes.items():
            now = self._raw.get((flow.receiver, layer), self._base_raw[layer])[:, at]
            raw[layer] = now + change
            post = self.model.layers[layer].attention_post
            assert post is not None
            read = read + (post(raw[layer]) - post(now))
        return Input(flow, read, raw)

    def _commit_inputs(self, inputs: dict[int, Input], scenario: int) -> None:
        for v, new in inputs.items():
            self._write("read", v, new.flow.positions, new.read[scenario])
            for layer, raw in new.raw.items():
                self._write("raw", v * self.n_layers + layer, new.flow.positions, raw[scenario])

    def _write(self, name: str, row: int, positions: Positions, value: Tensor) -> None:
        self.moved.note(name, row, positions)
        self.own(name, row)[:, index_of(positions)] = value


class Sums(Changes):
    """Inputs as sums of the senders that are still in; ablated edges carry zero.

    Parameters as :class:`Changes`.
    """

    def __init__(
        self, experiment: Experiment, batch: Batch, trace: Trace, out: Tensor, ablation: Tensor
    ) -> None:
        super().__init__(experiment, batch, trace, out, ablation)
        self.spans = np.array(batch.spans)
        self.kept = experiment.by_component(np.ones(experiment.graph.n_edges, dtype=bool))
        self._below = _layers_below(experiment)

    def ablate(self, flow: Flow, senders: NDArray[np.int64], scenarios: Tensor) -> Input:
        """New input of the tested receiver; parameters as :meth:`Changes.ablate`."""
        at = index_of(flow.positions)
        kept = self.kept[self.spans[flow.positions[0]], flow.receiver]  # all are of one span
        weight = torch.zeros(len(scenarios), self.graph.n_senders, dtype=self.out.dtype)
        weight[:, torch.as_tensor(kept)] = 1
        weight = weight.to(self.out.device)
        weight[:, torch.as_tensor(senders)] -= scenarios.to(weight)
        inside = np.flatnonzero(kept)
        sums = {
            group: torch.einsum(
                "ks,sbpd->kbpd", weight[:, inside[members]], self.out[inside[members]][:, :, at]
            )
            for group, members in self.groups(inside)
        }
        return self._sum(flow, sums)

    def gather(self, flow: Flow, outputs: dict[int, Output]) -> Input:
        """New input of a downstream receiver: all senders that are still in."""
        at = index_of(flow.positions)
        kept = self.kept[self.spans[at], flow.receiver]  # (position, sender)
        inside = np.flatnonzero(kept.any(axis=0))
        sums = {}
        for group, members in self.groups(inside):
            values = []
            for u in inside[members]:
                value = self.out[u][:, at]
                if u in outputs:
                    new = outputs[u]
                    value = insert(value, new.value, new.step.positions, flow.positions)
                if not kept[:, u].all():
                    value = value * torch.as_tensor(kept[:, u, None]).to(value)
                values.append(value)
            sums[group] = sum(values[1:], values[0])
        return self._sum(flow, sums)

    def store(self, node: int, positions: Positions, new: Tensor) -> Tensor:
        """Return what :class:`Output` holds of a node's new output."""
        return new

    def commit(self, inputs: dict[int, Input], outputs: dict[int, Output], scenario: int) -> None:
        """Make one scenario's inputs and outputs the current ones."""
        self._commit_inputs(inputs, scenario)
        for node, output in outputs.items():
            self._write("out", node, output.step.positions, output.value[scenario])

    def drop(self, span: int, receiver: int, senders: NDArray[np.int64]) -> None:
        """Record edges as ablated."""
        self.kept[span, receiver, senders] = False

    def keep(self, span: int, receiver: int, senders: NDArray[np.int64]) -> None:
        """Record which edges of a receiver stay; all others are ablated.

        Some of these were never evaluated, as their senders wrote zero when the receiver's turn
        came: they may write something once their own inputs are ablated.
        """
        self.kept[span, receiver] = False
        self.kept[span, receiver, senders] = True

    def _sum(self, flow: Flow, sums: dict[int, Tensor]) -> Input:
        """Sum of the groups, each through its norm, and of the biases below."""
        at = index_of(flow.positions)
        shape = self.current(flow.receiver)[:, at]
        read = sums[-1] if -1 in sums else torch.zeros_like(shape)
        raw = {}
        for layer in range(self._below[flow.receiver]):
            bias = self.model.layers[layer].attention.b_O
            post = self.model.layers[layer].attention_post
            if post is None:
                read = read if bias is None else read + bias
                continue
            total = sums[layer] if layer in sums else torch.zeros_like(shape)
            raw[layer] = total if bias is None else total + bias
            read = read + post(raw[layer])
        n = max((len(x) for x in sums.values() if x.dim() == 4), default=1)
        raw = {layer: x.expand(n, *shape.shape) for layer, x in raw.items()}
        return Input(flow, read.expand(n, *shape.shape), raw)


def _streams(experiment: Experiment, trace: Trace) -> dict[int, Tensor]:
    """Plain run's raw input of every receiver; receivers of a layer share one tensor."""
    assert trace.final is not None
    graph = experiment.graph.components
    streams = {graph.receiver_index["logits"]: trace.final}
    for layer, receivers in iter_layers(graph):
        for kind, indices in receivers.items():
            source = trace.mlp_in if kind == "mlp" else trace.attention_in
            streams.update((int(v), source[layer]) for v in indices)
    return streams


def _layers_below(experiment: Experiment) -> dict[int, int]:
    """How many layers' attention each receiver reads."""
    shape, graph = experiment.model.shape, experiment.graph.components
    below = {graph.receiver_index["logits"]: shape.n_layers}
    for layer, receivers in iter_layers(graph):
        for kind, indices in receivers.items():
            own = kind == "mlp" and not shape.parallel
            below.update((int(v), layer + own) for v in indices)
    return below


def _sum_at(positions: Positions, parts: Iterable[tuple[Output, Positions | None]]) -> Tensor:
    """Sum of changes at the given positions; those that lack one there count as zero.

    Each change counts at some positions only, or (None) at all.
    """
    total: Tensor | None = None
    owned = False
    for output, kept_at in parts:
        source, target = overlap(output.step.positions, positions, kept_at)
        part = output.value if source is None else output.value[:, :, source]
        if target is None:
            total, owned = (part, False) if total is None else (total + part, True)
            continue
        if total is None:
            total = part.new_zeros((*part.shape[:2], len(positions), part.shape[3]))
        elif not owned:
            total = total.clone()
        owned = True
        total[:, :, target] += part
    assert total is not None
    return total


@lru_cache(maxsize=4096)
def index_of(positions: Positions) -> Index:
    """Cheapest index for sorted positions: a slice where they are consecutive."""
    if positions and positions[-1] - positions[0] + 1 == len(positions):
        return slice(positions[0], positions[-1] + 1)
    return list(positions)


@lru_cache(maxsize=4096)
def overlap(
    have: Positions, want: Positions, kept_at: Positions | None = None
) -> tuple[Index | None, Index | None]:
    """Indices into ``have`` and into ``want`` of their common positions; None means all.

    Given ``kept_at``, of the positions that are also in it.
    """
    common = sorted(set(have) & set(want) & set(want if kept_at is None else kept_at))
    source = tuple(have.index(p) for p in common)
    target = tuple(want.index(p) for p in common)
    return (
        None if len(source) == len(have) else index_of(source),
        None if len(target) == len(want) else index_of(target),
    )


def insert(current: Tensor, new: Tensor, at: Positions, wanted: Positions) -> Tensor:
    """Replace parts of a current value in every scenario.

    Parameters
    ----------
    current
        ``[batch, wanted, d]``.
    new
        ``[scenario, batch, at, d]``.
    at, wanted
        Positions of ``new`` and of the result.

    Returns
    -------
    Tensor
        ``[scenario, batch, wanted, d]``: ``new`` where it has a position, else ``current``.
    """
    source, target = overlap(at, wanted)
    part = new if source is None else new[:, :, source]
    if target is None:
        return part
    full = current.expand(len(new), -1, -1, -1).clone()
    full[:, :, target] = part
    return full
