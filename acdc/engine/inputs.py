"""What receivers read, in many scenarios at once.

Under resample ablation a receiver's new input is its current one plus the changes that
arrive (:class:`Changes`).  Under zero ablation sums that are exactly zero matter, since a
norm blows up what rounding leaves of them, so there an input is the sum of the senders that
are still in (:class:`Sums`).

Senders that are vectors are kept side by side, latents by block as coefficients.  In models with
a norm on the sum of the heads (Gemma-2) what an attention layer writes forms a *group* that
passes that norm; all other senders form the group -1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.batch import Batch
from acdc.engine.experiment import Experiment
from acdc.engine.moved import Moved
from acdc.engine.program import Program
from acdc.engine.stages import Index
from acdc.engine.start import Start
from acdc.engine.streamed import Arena, bytes_of
from acdc.engine.values import MOST, Block, Values, coefficients
from graphs.plan import Flow, Numbers, Step

__all__ = [
    "Changes",
    "Input",
    "Output",
    "Places",
    "Sums",
    "Together",
    "Written",
    "at_once",
    "index_of",
    "insert",
    "overlap",
    "where",
]

T = TypeVar("T")
Senders = NDArray[np.int64]

_VECTORS = -1
"""In the place of a block of latents."""
_TOGETHER = {"cpu": 1 << 18, "gpu": 1 << 26}
"""Numbers of one product at most, if it is of several receivers: on a CPU what its caches hold."""

_PLAIN = -1
"""In the place of a layer with a post-norm: what the stream reads as it is."""


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

    def map(self, f: Callable[[Tensor], Tensor]) -> Input:
        """Apply a function to every tensor."""
        return replace(self, read=f(self.read), raw={i: f(x) for i, x in self.raw.items()})


@dataclass(frozen=True, eq=False)
class Together:
    """New inputs of receivers that change at the same positions, side by side.

    Parameters
    ----------
    receivers
        Ascending.
    positions
        Sorted.
    read
        ``[receiver, scenario, batch, position, d_model]``.
    """

    receivers: Numbers
    positions: Numbers
    read: Tensor

    @classmethod
    def alone(cls, new: Input) -> Together:
        """One receiver's."""
        return cls((new.flow.receiver,), new.flow.positions, new.read[None])


@dataclass(frozen=True, eq=False)
class Output:
    """What the wanted senders of a unit write, or by how much that changes, in every scenario.

    Parameters
    ----------
    step
        Unit, positions and senders.
    latents
        ``[scenario, batch, position, latent]``: coefficients; None where none is wanted.
    vector
        ``[scenario, batch, position, d_model]``: of the sender that is a vector, the unit's last;
        None where it is not wanted.
    """

    step: Step
    latents: Tensor | None
    vector: Tensor | None

    @property
    def ids(self) -> Numbers:
        """Senders of :attr:`latents`."""
        return self.step.senders if self.vector is None else self.step.senders[:-1]

    def map(self, f: Callable[[Tensor], Tensor]) -> Output:
        """Apply a function to every tensor."""
        latents, vector = (None if x is None else f(x) for x in (self.latents, self.vector))
        return replace(self, latents=latents, vector=vector)

    def sum(self, senders: Numbers, source: Index | None, places: Places) -> Tensor:
        """Sum of some of the senders at some of the positions (None: all).

        Returns
        -------
        Tensor
            ``[scenario, batch, position, d_model]``.
        """
        total: Tensor | None = None
        ids = senders
        if self.vector is not None and senders[-1] == self.step.senders[-1]:
            total, ids = self.vector if source is None else self.vector[:, :, source], senders[:-1]
        if ids:
            assert self.latents is not None
            found = self.latents if source is None else self.latents[:, :, source]
            if ids != self.ids:
                found = found[..., where(ids, self.ids)]
            part = found @ places.directions(ids)
            total = part if total is None else total + part
        assert total is not None
        return total


def at_once(items: Sequence[T], each: int, device: torch.device) -> Iterator[Sequence[T]]:
    """Cut what is computed alike into parts for one product; ``each``: numbers of an item."""
    most = max(1, _TOGETHER["cpu" if device.type == "cpu" else "gpu"] // each)
    for start in range(0, len(items), most):
        yield items[start : start + most]


_Entry = tuple[Output, Numbers, Index | None, Index | None]
"""What a unit writes, senders of it, and the indices of :func:`overlap`."""
_Part = tuple[Tensor, Index | None]
"""A change ``[scenario, batch, position, d_model]``, and where it stands (None: everywhere)."""


class Places:
    """Where the values of senders are kept.

    Parameters
    ----------
    program
        Blocks of the model.

    Attributes
    ----------
    row
        ``[sender]``: place among the vectors; -1 of a latent.
    column
        ``[sender]``: place in its block.
    block
        ``[sender]``: which block of latents it is in, or :data:`_VECTORS`.
    group
        ``[sender]``: layer through whose post-norm the stream reads it, or -1.
    """

    def __init__(self, program: Program) -> None:
        self.blocks = program.blocks
        self.row, self.block, self.group = np.full((3, program.n_senders), -1)
        self.column = np.zeros(program.n_senders, dtype=np.int64)
        n_vectors = 0
        for b, block in enumerate(self.blocks):
            own = slice(block.start, block.stop)
            self.column[own] = np.arange(len(block))
            self.group[own] = -1 if block.post is None else block.post
            if block.narrow:
                self.block[own] = b
            else:
                self.row[own] = np.arange(n_vectors, n_vectors + len(block))
                n_vectors += len(block)
        pairs = np.stack([self.group, self.block], 1)
        self._pairs, key = np.unique(pairs, axis=0, return_inverse=True)
        self._key = key.ravel()
        self._in_block: dict[Numbers, tuple[int, Tensor]] = {}
        self._directions: dict[Numbers, Tensor] = {}

    def sorted(self, senders: Senders) -> Iterator[tuple[int, int, Senders]]:
        """Yield group and block of some senders, and the places of theirs in ``senders``."""
        key = self._key[senders]
        for i in np.unique(key) if len(self._pairs) > 1 else key[:1]:
            group, block = self._pairs[i].tolist()
            yield group, block, np.flatnonzero(key == i)

    def in_block(self, latents: Numbers) -> tuple[int, Tensor]:
        """Block of some latents, all of one, and their places in it."""
        if latents not in self._in_block:
            columns = torch.as_tensor(self.column[list(latents)])
            self._in_block[latents] = int(self.block[latents[0]]), columns
        return self._in_block[latents]

    def directions(self, latents: Numbers) -> Tensor:
        """``[latent, d_model]`` of latents of one block."""
        if latents not in self._directions:
            block, columns = self.in_block(latents)
            self._directions[latents] = self.blocks[block].directions[columns]
        return self._directions[latents]


class Written:
    """What every sender writes on a batch.

    Parameters
    ----------
    places
        Where it is kept.
    blocks, values
        What writes, and its values of one scenario.

    Attributes
    ----------
    vectors
        ``[row, batch, pos, d_model]``.
    latents
        By block, ``[batch, pos, latent]``.
    """

    def __init__(self, places: Places, blocks: Sequence[Block], values: Values) -> None:
        pairs = list(zip(blocks, values, strict=True))
        self.places = places
        embeds = values[0]
        self.vectors = embeds.new_empty(int(places.row.max()) + 1, *embeds.shape[2:])
        for block, x in pairs:
            if not block.narrow:  # one after the other: each takes more than its values
                row = int(places.row[block.start])
                self.vectors[row : row + len(block)] = block.vectors(x)[:, 0]
        self.latents = {
            b: coefficients(x)[0].clone(memory_format=torch.contiguous_format)
            for b, (block, x) in enumerate(pairs)
            if block.narrow
        }

    def move(self, put: Callable[[Tensor], Tensor]) -> None:
        """Let the values lie where ``put`` puts them."""
        self.vectors = put(self.vectors)
        self.latents = {b: put(x) for b, x in self.latents.items()}

    @property
    def n_bytes(self) -> int:
        """Memory that the values take."""
        return bytes_of((self.vectors, *self.latents.values()))

    def subtract(self, other: Written) -> None:
        """Take off what is written on the same batch otherwise."""
        self.vectors -= other.vectors
        for b, x in self.latents.items():
            x -= other.latents[b]

    def somewhere(self) -> NDArray[np.bool_]:
        """``[sender, pos]``: whether anything is written there on any prompt."""
        found = np.zeros((len(self.places.row), self.vectors.shape[2]), dtype=bool)
        found[self.places.block == _VECTORS] = self.vectors.ne(0).any(3).any(1).cpu().numpy()
        for b, x in self.latents.items():
            found[self.places.block == b] = x.ne(0).any(0).T.cpu().numpy()
        return found

    def at(self, senders: Numbers, positions: Numbers) -> tuple[Tensor | None, Tensor | None]:
        """Latents ``[batch, position, latent]`` and vector ``[batch, position, d_model]``.

        ``senders`` are of one unit: latents of one block, then a vector; either may be missing.
        """
        at, row = index_of(positions), int(self.places.row[senders[-1]])
        vector = None if row < 0 else self.vectors[row][:, at]
        ids = senders if row < 0 else senders[:-1]
        if not ids:
            return None, vector
        block, columns = self.places.in_block(ids)
        return self.latents[block][:, at][..., columns], vector

    def mix(self, senders: Senders, weights: Tensor, at: Index) -> dict[int, Tensor]:
        """Weighted sums by group, ``[scenario, batch, position, d_model]``.

        Parameters
        ----------
        senders
            ``[edge]``.
        weights
            ``[scenario, edge]``.
        at
            Positions.
        """
        sums: dict[int, Tensor] = {}
        for group, block, members in self.places.sorted(senders):
            some = senders[members]
            weight = weights[:, torch.as_tensor(members)].to(self.vectors.dtype)
            if block == _VECTORS:
                rows = self.places.row[some].tolist()
                values = torch.stack([self.vectors[row][:, at] for row in rows])
                part = (weight @ values.flatten(1)).unflatten(1, values.shape[1:])
            else:
                columns = torch.as_tensor(self.places.column[some])
                directions = self.places.blocks[block].directions[columns]
                found = self.latents[block][:, at][..., columns]
                parts = weight.split(max(1, MOST // max(1, found.nelement())))
                part = torch.cat([(w[:, None, None] * found) @ directions for w in parts])
            sums[group] = sums[group] + part if group in sums else part
        return sums


class Changes:
    """Inputs as current value plus changes.

    Parameters
    ----------
    start
        The run that ablation starts from.
    places
        Where values are kept.

    Attributes
    ----------
    out
        What senders write now.
    ablation
        What ablated edges carry, minus what senders write at the start.
    """

    def __init__(self, start: Start, places: Places) -> None:
        self.places = places
        self.out = Written(places, start.blocks, start.values)
        self.ablation = Written(places, start.blocks, start.ablated)
        self.ablation.subtract(self.out)
        self._base, self._base_raw = start.inputs, start.raw
        self._posts = start.posts
        self._put: Callable[[Tensor], Tensor] = torch.clone
        self._read: dict[int, Tensor] = {}
        self._raw: dict[tuple[int, int], Tensor] = {}
        n_receivers, n_pos = len(start.inputs), self.out.vectors.shape[2]
        self._n_layers = max(self._posts, default=-1) + 1
        n_rows = {"out": len(self.out.vectors), "read": n_receivers}
        n_rows |= {"raw": n_receivers * self._n_layers}
        self.moved = Moved(n_rows | {_latents(b): 1 for b in self.out.latents}, n_pos)

    @property
    def fixed(self) -> tuple[object, ...]:
        """What never changes and may be shared by copies."""
        return self.places, self.ablation, self._base, self._base_raw, self._posts

    def move(self, fixed: Arena, own: Arena) -> None:
        """Let values lie elsewhere: what never changes, and what does."""
        put = fixed.mapper()
        self.ablation.move(put)
        self._base = {v: put(x) for v, x in self._base.items()}
        self._base_raw = {key: put(x) for key, x in self._base_raw.items()}
        self.out.move(own.mapper())
        self._put = own.put

    @property
    def n_bytes(self) -> tuple[int, int]:
        """Most bytes of what never changes, and of what does."""
        base = [*self._base.values(), *self._base_raw.values()]
        once = {id(x): x for x in base}.values()
        return bytes_of(once) + self.ablation.n_bytes, bytes_of(base) + self.out.n_bytes

    def current(self, receiver: int) -> Tensor:
        """Current input of a receiver, ``[batch, pos, d_model]``."""
        return self._read.get(receiver, self._base[receiver])

    def ablate(self, flow: Flow, senders: Senders, scenarios: Tensor) -> Input:
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
        return self._add(flow, self.ablation.mix(senders, scenarios, index_of(flow.positions)))

    def gather(
        self, flows: Iterable[Flow], outputs: dict[int, Output], n: int
    ) -> tuple[dict[int, Input], list[Together]]:
        """New inputs of downstream receivers that do not read each other's units.

        Parameters
        ----------
        flows
            Receivers and positions.
        outputs
            By unit, of all that they read and that changes.
        n
            Scenarios.

        Returns
        -------
        tuple
            By receiver, and the same side by side.
        """
        alike: dict[Numbers, list[Flow]] = {}
        for flow in flows:
            alike.setdefault(flow.positions, []).append(flow)
        inputs: dict[int, Input] = {}
        together = []
        for positions, some in alike.items():
            now = self.current(some[0].receiver)
            shape = n, len(now), len(positions), now.shape[-1]
            some.sort(key=lambda flow: flow.receiver)
            for part in at_once(some, math.prod(shape), now.device):
                read = now.new_empty(len(part), *shape)
                for flow, row in zip(part, read.unbind(), strict=True):
                    inputs[flow.receiver] = self._gather(flow, outputs, row)
                together.append(Together(tuple(x.receiver for x in part), positions, read))
        return inputs, together

    def _gather(self, flow: Flow, outputs: dict[int, Output], row: Tensor) -> Input:
        """New input of one receiver, what its touched senders bring, written into ``row``."""
        groups: dict[int, list[_Entry]] = {}
        for unit, senders, kept_at in zip(flow.units, flow.senders, flow.kept_at, strict=True):
            new = outputs[unit]
            source, target = overlap(new.step.positions, flow.positions, kept_at)
            if target != []:  # what is kept only where nothing is live may not be computed
                entry = new, senders, source, target
                groups.setdefault(int(self.places.group[senders[0]]), []).append(entry)
        if groups.keys() == {_PLAIN}:
            now = self.current(flow.receiver)[:, index_of(flow.positions)]
            _sum_into(row, chain(self._parts(groups[_PLAIN]), [(now, None)]))
            return Input(flow, row, {})
        changes = {}
        for group, entries in groups.items():
            changes[group] = torch.empty_like(row)
            _sum_into(changes[group], self._parts(entries))
        new_input = self._add(flow, changes)
        return Input(flow, row.copy_(new_input.read), new_input.raw)

    def _parts(self, entries: Iterable[_Entry]) -> Iterator[_Part]:
        """Sums of each unit's senders, one after the other."""
        for new, senders, source, target in entries:
            yield new.sum(senders, source, self.places), target

    def store(self, step: Step, latents: Tensor | None, vector: Tensor | None) -> Output:
        """Return the output of a unit, given what its wanted senders write now."""
        before, now = self.out.at(step.senders, step.positions), (latents, vector)
        pairs = zip(now, before, strict=True)
        return Output(step, *(None if a is None or b is None else a - b for a, b in pairs))

    def store_heads(self, steps: Sequence[Step], vectors: Tensor) -> list[Output]:
        """Outputs of heads of a layer that are neighbours, with equal positions.

        Parameters
        ----------
        steps
            Of each head.
        vectors
            ``[head, scenario, batch, position, d_model]``: what they write now; taken over.
        """
        at, first = index_of(steps[0].positions), int(self.places.row[steps[0].senders[0]])
        vectors -= self.out.vectors[first : first + len(steps), None, :, at]
        return [Output(step, None, x) for step, x in zip(steps, vectors.unbind(), strict=True)]

    def commit(self, inputs: dict[int, Input], outputs: dict[int, Output], scenario: int) -> None:
        """Make one scenario's inputs and outputs the current ones."""
        for v, new in inputs.items():
            self._write("read", v, new.flow.positions, new.read[scenario])
            for layer, raw in new.raw.items():
                row = v * self._n_layers + layer
                self._write("raw", row, new.flow.positions, raw[scenario])
        for output in outputs.values():
            self._commit_output(output, scenario)

    def _commit_output(self, output: Output, scenario: int) -> None:
        """Make one scenario's output the current one."""
        step = output.step
        latents, vector = self.out.at(step.senders, step.positions)
        if output.vector is not None:
            row = int(self.places.row[step.senders[-1]])
            new = self._committed(vector, output.vector[scenario])
            self._write("out", row, step.positions, new)
        if output.latents is not None:
            block, columns = self.places.in_block(output.ids)
            new = self._committed(latents, output.latents[scenario])
            self.moved.note(_latents(block), 0, step.positions)
            positions = torch.tensor(step.positions)[:, None]
            self.out.latents[block][:, positions, columns] = new

    def _committed(self, old: Tensor | None, new: Tensor) -> Tensor:
        """Current values from those before and what :class:`Output` holds."""
        assert old is not None
        return old + new

    def own(self, name: str, row: int) -> Tensor:
        """Return current values that may be written to, ``[batch, pos, width]``.

        ``out`` by place among the vectors, latents by block, ``read`` by receiver, ``raw`` by
        receiver and layer.
        """
        if name == "out":
            return self.out.vectors[row]
        if name == "read":
            if row not in self._read:
                self._read[row] = self._put(self._base[row])
            return self._read[row]
        if name == "raw":
            key = divmod(row, self._n_layers)
            if key not in self._raw:
                self._raw[key] = self._put(self._base_raw[key])
            return self._raw[key]
        return self.out.latents[int(name.split()[1])]

    def _write(self, name: str, row: int, positions: Numbers, value: Tensor) -> None:
        self.moved.note(name, row, positions)
        self.own(name, row)[:, index_of(positions)] = value

    def _add(self, flow: Flow, changes: dict[int, Tensor]) -> Input:
        """Current input plus changes of the groups' sums."""
        at = index_of(flow.positions)
        read = self.current(flow.receiver)[:, at]
        if _PLAIN in changes:
            read = read + changes.pop(_PLAIN)
        raw = {}
        for layer, change in changes.items():
            key = flow.receiver, layer
            now = self._raw.get(key, self._base_raw[key])[:, at]
            raw[layer] = now + change
            post = self._posts[layer].at(at)
            read = read + (post(raw[layer]) - post(now))
        return Input(flow, read, raw)


class Sums(Changes):
    """Inputs as sums of the senders that are still in; ablated edges carry zero.

    Parameters
    ----------
    start, places
        As of :class:`Changes`.
    experiment
        Its graph says which edges are in at the start.
    batch
        Says where the spans are.
    """

    def __init__(self, start: Start, places: Places, experiment: Experiment, batch: Batch) -> None:
        super().__init__(start, places)
        graph, self.spans = experiment.graph, np.array(batch.spans)
        self._unit = graph.components.unit
        senders = graph.sender_component[graph.edge_sender]
        self.kept: dict[tuple[int, int], Senders] = {
            (int(graph.receiver_span[r]), int(graph.receiver_component[r])): some
            for r, some in enumerate(np.split(senders, graph.receiver_start[1:-1]))
        }
        self._biases = start.biases

    def ablate(self, flow: Flow, senders: Senders, scenarios: Tensor) -> Input:
        """New input of the tested receiver; parameters as :meth:`Changes.ablate`."""
        inside = self.kept[int(self.spans[flow.positions[0]]), flow.receiver]  # all of one span
        weights = torch.ones(len(scenarios), len(inside), device=scenarios.device)
        weights[:, torch.as_tensor(np.searchsorted(inside, senders))] -= scenarios.to(weights)
        return self._sum(flow, self.out.mix(inside, weights, index_of(flow.positions)))

    def _gather(self, flow: Flow, outputs: dict[int, Output], row: Tensor) -> Input:
        """New input of one receiver, all senders that are still in, written into ``row``."""
        inside, mask = self._kept_at(flow)
        sums: dict[int, Tensor] = {}
        for group, block, members in self.places.sorted(inside):
            total = self._vectors if block == _VECTORS else self._latents
            own = None if mask is None else torch.as_tensor(mask[:, members]).to(self.out.vectors)
            part = total(flow, inside[members], own, outputs)
            sums[group] = sums[group] + part if group in sums else part
        new = self._sum(flow, sums)
        return Input(flow, row.copy_(new.read), new.raw)

    def _kept_at(self, flow: Flow) -> tuple[Senders, NDArray[np.bool_] | None]:
        """Senders in at any position of a flow, and where ``[position, sender]`` (None: all)."""
        of_pos = [int(self.spans[p]) for p in flow.positions]
        kept = {span: self.kept[span, flow.receiver] for span in dict.fromkeys(of_pos)}
        if len(kept) == 1:
            return kept[of_pos[0]], None
        inside = np.unique(np.concatenate(list(kept.values())))
        return inside, np.stack([np.isin(inside, kept[span]) for span in of_pos])

    def _vectors(
        self, flow: Flow, senders: Senders, mask: Tensor | None, outputs: dict[int, Output]
    ) -> Tensor:
        """Sum of vectors with weights ``mask [position, sender]``."""
        values = []
        for i, u in enumerate(senders.tolist()):
            value = self.out.vectors[self.places.row[u]][:, index_of(flow.positions)]
            new = outputs.get(int(self._unit[u]))
            if new is not None and new.vector is not None:
                value = insert(value, new.vector, new.step.positions, flow.positions)
            values.append(value if mask is None else value * mask[:, i, None])
        return sum(values[1:], values[0])

    def _latents(
        self, flow: Flow, senders: Senders, mask: Tensor | None, outputs: dict[int, Output]
    ) -> Tensor:
        """Sum of latents of one block with weights ``mask [position, sender]``."""
        ids = tuple(senders.tolist())
        value, _ = self.out.at(ids, flow.positions)
        assert value is not None
        for unit in np.unique(self._unit[senders]).tolist():
            new = outputs.get(unit)
            if new is None or new.latents is None:
                continue
            both = tuple(u for u in new.ids if u in ids)
            own = value[..., where(both, ids)]
            some = new.latents[..., where(both, new.ids)]
            filled = insert(own, some, new.step.positions, flow.positions)
            value = value.expand(len(filled), *value.shape[-3:]).clone()
            value[..., where(both, ids)] = filled
        value = value if mask is None else value * mask
        return value @ self.places.directions(ids)

    def store(self, step: Step, latents: Tensor | None, vector: Tensor | None) -> Output:
        """Return the output of a unit, given what its wanted senders write now."""
        return Output(step, latents, vector)

    def store_heads(self, steps: Sequence[Step], vectors: Tensor) -> list[Output]:
        """Outputs of heads, see :meth:`Changes.store_heads`."""
        return [Output(step, None, x) for step, x in zip(steps, vectors.unbind(), strict=True)]

    def _committed(self, old: Tensor | None, new: Tensor) -> Tensor:
        """Current values, which :class:`Output` holds as they are."""
        return new

    def drop(self, span: int, receiver: int, senders: Senders) -> None:
        """Record edges as ablated."""
        self.kept[span, receiver] = np.setdiff1d(self.kept[span, receiver], senders)

    def keep(self, span: int, receiver: int, senders: Senders) -> None:
        """Record which edges of a receiver stay; all others are ablated.

        Some of these were never evaluated, as their senders wrote zero when the receiver's turn
        came: they may write something once their own inputs are ablated.
        """
        self.kept[span, receiver] = np.sort(senders)

    def _sum(self, flow: Flow, sums: dict[int, Tensor]) -> Input:
        """Sum of the groups, each through its norm, and of the biases below."""
        at = index_of(flow.positions)
        shape = self.current(flow.receiver)[:, at]
        read = sums[_PLAIN] if _PLAIN in sums else torch.zeros_like(shape)
        raw = {}
        for layer, bias in self._biases[flow.receiver]:
            if layer is None:
                read = read if bias is None else read + bias
                continue
            total = sums[layer] if layer in sums else torch.zeros_like(shape)
            raw[layer] = total if bias is None else total + bias
            read = read + self._posts[layer].at(at)(raw[layer])
        n = max((len(x) for x in sums.values() if x.dim() == 4), default=1)
        raw = {layer: x.expand(n, *shape.shape) for layer, x in raw.items()}
        return Input(flow, read.expand(n, *shape.shape), raw)


def _latents(block: int) -> str:
    """Name of a block's latents among what moves."""
    return f"latents {block}"


def _sum_into(total: Tensor, parts: Iterator[_Part]) -> None:
    """Write the sum of changes, one at least; those that lack a position count as zero there."""
    first, place = next(parts)
    second = next(parts, None)
    if place is not None:
        total.zero_()
        total[:, :, place] += first
    elif second is not None and second[1] is None:
        torch.add(first, second[0], out=total)
        second = None
    else:
        total.copy_(first)
    for part, place in chain([] if second is None else [second], parts):
        if place is None:
            total += part
        else:
            total[:, :, place] += part


@lru_cache(maxsize=4096)
def index_of(positions: Numbers) -> Index:
    """Cheapest index for sorted positions: a slice where they are consecutive."""
    if positions and positions[-1] - positions[0] + 1 == len(positions):
        return slice(positions[0], positions[-1] + 1)
    return list(positions)


@lru_cache(maxsize=4096)
def overlap(
    have: Numbers, want: Numbers, kept_at: Numbers | None = None
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


@lru_cache(maxsize=4096)
def where(some: Numbers, every: Numbers) -> Index:
    """Index of some numbers, ascending, in others."""
    return index_of(tuple(np.searchsorted(every, some).tolist()))


def insert(current: Tensor, new: Tensor, at: Numbers, wanted: Numbers) -> Tensor:
    """Replace parts of a current value in every scenario.

    Parameters
    ----------
    current
        ``[batch, wanted, d]``.
    new
        ``[scenario, batch, at, d]``.
    at, wanted
        Numbers of ``new`` and of the result.

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
