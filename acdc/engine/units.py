"""Units: what is recomputed as one, from inputs that change to what its senders write.

====================  ===========================  ==========================================
unit                  inputs                       senders
====================  ===========================  ==========================================
:class:`Expert`       its own, the router's        itself
:class:`Head`         its own q, k and v           itself
:class:`Layer`        q, k and v of every head     latents of the layer, and their error node
:class:`Point`        one, position by position    an MLP; latents or neurons of an MLP, or of
                                                   the whole stream, and their error node; one
                                                   latent of a transcoder
====================  ===========================  ==========================================

Only senders that are wanted are computed, and only heads of which an input changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from acdc.dictionaries.attachment import Attachment
from acdc.engine.inputs import Changes, Input, Output, Together, at_once, index_of, insert
from acdc.engine.mixtures import EXPERT, ROUTER, Experts, Projection
from acdc.engine.moved import Moved
from acdc.engine.program import Program
from acdc.engine.stages import Cut, Few, Heads, Index, LatentHeads, Mlp, Stage, Wanted
from acdc.engine.streamed import Arena, bytes_of
from acdc.models.lowering.attention import KINDS, Kind, neighbours
from graphs.plan import Numbers, Step

__all__ = ["Expert", "Head", "Layer", "News", "Point", "Projections", "Unit", "new_z", "units_of"]


_KINDS: tuple[Projection, ...] = (*KINDS, EXPERT, ROUTER)


@dataclass(eq=False)
class Projections:
    """Placed projections and z of a batch, as they are in the current circuit.

    Parameters
    ----------
    placed
        By receiver and kind, ``[batch, pos, d_head]``; of experts whose router is free ``[batch,
        pos, d_model]``, and of the router ``[batch, pos, expert]``.
    z
        By layer with a dictionary, ``[batch, pos, n_heads * d_head]``.
    masks
        By layer, ``[pos, pos]`` additive, or None.
    n_pos
        Positions.
    """

    placed: dict[tuple[int, Projection], Tensor]
    z: dict[int, Tensor]
    masks: list[Tensor | None]
    n_pos: int

    def __post_init__(self) -> None:
        n_receivers = 1 + max((v for v, _ in self.placed), default=-1)
        kinds = {*KINDS, *(kind for _, kind in self.placed)}
        n_rows: dict[str, int] = dict.fromkeys(filter(kinds.__contains__, _KINDS), n_receivers)
        n_rows["z"] = 1 + max(self.z, default=-1)
        self.moved = Moved(n_rows, self.n_pos)

    @property
    def device(self) -> torch.device:
        """Where the values are used."""
        return next(iter(self.placed.values())).device

    def move(self, own: Arena) -> None:
        """Let values lie elsewhere."""
        put = own.mapper()
        self.placed = {key: put(x) for key, x in self.placed.items()}
        self.z = {layer: put(x) for layer, x in self.z.items()}

    @property
    def n_bytes(self) -> int:
        """Memory that the values take."""
        return bytes_of((*self.placed.values(), *self.z.values()))

    def commit(self, news: News, scenario: int) -> None:
        """Take over what one scenario of an evaluation computed."""
        for (receiver, kind), new in news.placed.items():
            at = news.inputs[receiver].flow.positions
            self._write(kind, receiver, at, new[scenario])
        for layer, (positions, z) in news.z.items():
            self._write("z", layer, positions, z[scenario].flatten(-2))

    def own(self, name: str, row: int) -> Tensor:
        """Return current values that may be written to, ``[batch, pos, width]``."""
        if name == "z":
            return self.z[row]
        return next(self.placed[row, kind] for kind in _KINDS if kind == name)

    def _write(self, name: str, row: int, positions: Numbers, value: Tensor) -> None:
        self.moved.note(name, row, positions)
        self.own(name, row)[:, index_of(positions)] = value


@dataclass(eq=False)
class News:
    """What an evaluation has computed of the inputs so far, in every scenario.

    Attributes
    ----------
    inputs
        New inputs by receiver.
    placed
        New placed projections by receiver and kind, ``[scenario, batch, position, d_head]`` at
        the positions of the receiver's flow; heads of a group share them.
    z
        By layer with a dictionary: positions, and ``[scenario, batch, position, head, d_head]``.
    """

    inputs: dict[int, Input] = field(default_factory=dict)
    placed: dict[tuple[int, Projection], Tensor] = field(default_factory=dict)
    z: dict[int, tuple[Numbers, Tensor]] = field(default_factory=dict)

    def map(self, f: Callable[[Tensor], Tensor]) -> News:
        """Apply a function to every tensor."""
        return News(
            {receiver: new.map(f) for receiver, new in self.inputs.items()},
            {key: f(x) for key, x in self.placed.items()},
            {layer: (positions, f(z)) for layer, (positions, z) in self.z.items()},
        )


class Unit(ABC):
    """Recomputes the units of one stage.

    Parameters
    ----------
    stage
        What they are, or are a part of.
    first
        The first sender of the stage.
    """

    def __init__(self, stage: Stage, first: int) -> None:
        self.stage, self.first, self.model = stage, first, stage.model

    def project(self, together: Sequence[Together], news: News) -> None:  # noqa: B027  (most have nothing to find)
        """Find what all units make of new inputs first, before any of them runs."""

    @abstractmethod
    def run(
        self, steps: Sequence[Step], inputs: Changes, news: News, now: Projections
    ) -> list[Output]:
        """What wanted senders of some units write at the positions of their steps.

        Parameters
        ----------
        steps
            Of units of the stage.
        inputs
            Keeps what senders write now.
        news
            All that these units read is in it.
        now
            Current values.
        """

    @abstractmethod
    def n_weights(self, step: Step) -> int:
        """Numbers of the matrices that this reads, roughly."""

    width = 0
    """Latents that are computed at a position."""


class _OneByOne(Unit):
    """Units that are computed one after the other."""

    def run(
        self, steps: Sequence[Step], inputs: Changes, news: News, now: Projections
    ) -> list[Output]:
        """What they write, see :meth:`Unit.run`."""
        return [inputs.store(step, *self.one(step, news, now)) for step in steps]

    @abstractmethod
    def one(self, step: Step, news: News, now: Projections) -> Few:
        """What wanted senders of one unit write at the step's positions, in every scenario."""


class _WithLatents(_OneByOne):
    """Units that may have the latents of a dictionary."""

    def __init__(self, stage: Stage, first: int) -> None:
        super().__init__(stage, first)
        self.attachment: Attachment | None = getattr(stage, "attachment", None)
        self.width = 0 if self.attachment is None else self.attachment.n_encoded
        self._wanted: dict[Numbers, Wanted] = {}

    def wanted(self, step: Step) -> Wanted | None:
        """Which parts of the dictionary's site are wanted; None without one."""
        if self.attachment is None:
            return None
        if step.senders not in self._wanted:
            n, ids = len(self.attachment.latents), [u - self.first for u in step.senders]
            latents = tuple(i for i in ids if i < n)
            self._wanted[step.senders] = Wanted(self.attachment, latents, rest=ids[-1] == n)
        return self._wanted[step.senders]

    def n_weights(self, step: Step) -> int:
        """Those of an encoder."""
        return self.model.d_model * self.width


class Point(_WithLatents):
    """Computed position by position from one input."""

    stage: Mlp | Cut

    def one(self, step: Step, news: News, now: Projections) -> Few:
        """What is written, see :meth:`_OneByOne.one`."""
        (receiver,) = step.receivers
        new = news.inputs[receiver]
        return self.stage.few(new.read, self.wanted(step), index_of(new.flow.positions))

    def n_weights(self, step: Step) -> int:
        """Those of an MLP and of an encoder."""
        mlp = 0 if isinstance(self.stage, Cut) else 8 * self.model.d_model**2
        return mlp + super().n_weights(step)


class _OfHeads(Unit):
    """Units that are made of heads."""

    stage: Heads

    def project(self, together: Sequence[Together], news: News) -> None:
        """Find new placed projections, of what receivers read at the same positions in one."""
        attention, head_of = self.model.layers[self.stage.layer].attention, self.stage.head_of
        for some in together:
            at = index_of(some.positions)
            behind = self._behind(some, at)
            for kind in KINDS:
                rows = [i for i, v in enumerate(some.receivers) if (v, kind) in head_of]
                if not rows:
                    continue
                heads = [head_of[some.receivers[i], kind] for i in rows]
                found = behind(kind, rows, heads)
                found = found.view(len(rows), *some.read.shape[1:-1], found.shape[-1])
                placed = attention.place(kind, found, at, heads)
                for i, own in zip(rows, placed.unbind(), strict=True):
                    news.placed[some.receivers[i], kind] = own

    def _behind(
        self, some: Together, at: Index
    ) -> Callable[[Kind, Sequence[int], Sequence[int]], Tensor]:
        """What finds projections ``[row, n, d_head]`` of a kind behind the norm."""
        block = self.model.layers[self.stage.layer]
        norm, attention = block.ln1.at(at), block.attention
        inverse = None if attention.shared else norm.apart(some.read)
        read = norm(some.read) if inverse is None else some.read

        def project(kind: Kind, rows: Sequence[int], heads: Sequence[int]) -> Tensor:
            own = index_of(tuple(rows))
            x = read[own].flatten(1, -2)
            if inverse is None:
                return attention.project_each(kind, x, heads)
            return attention.project_apart(kind, norm, x, inverse[own].flatten(1, -2), heads)

        return project


class Head(_OfHeads):
    """Heads that are senders."""

    def run(
        self, steps: Sequence[Step], inputs: Changes, news: News, now: Projections
    ) -> list[Output]:
        """What they write, see :meth:`Unit.run`: those of equal positions in one product."""
        attention = self.model.layers[self.stage.layer].attention
        alike: dict[Numbers, list[Step]] = {}
        for step in steps:
            alike.setdefault(step.positions, []).append(step)
        found: list[Output] = []
        for positions, some in alike.items():
            heads = [step.senders[0] - self.first for step in some]
            z = new_z(self.stage, heads, positions, news, now)
            if z.shape[-1] == 1:  # multiples of one direction, as latents
                found += [inputs.store(step, x, None) for step, x in zip(some, z, strict=True)]
                continue
            for at in neighbours(tuple(heads)):
                written = attention.write(z[at].flatten(1, -2), heads[at])
                found += inputs.store_heads(
                    some[at], written.view(len(written), *z.shape[1:-1], -1)
                )
        return found

    def n_weights(self, step: Step) -> int:
        """W_Q, W_K, W_V and W_O of a head."""
        return 4 * self.model.d_model**2 // self.model.shape.n_heads


class Expert(_OneByOne):
    """An expert of a mixture that is a sender."""

    stage: Experts

    def one(self, step: Step, news: News, now: Projections) -> Few:
        """What the expert writes, see :meth:`_OneByOne.one`."""
        e, router = step.senders[0] - self.first, self.stage.router
        if router is None:
            (receiver,) = step.receivers
            return None, self._made(e, receiver, news)
        own = self._current(e, self.stage.ports.start + e, EXPERT, step, news, now)
        weights = self._current(e, router, ROUTER, step, news, now)[..., e, None]
        return None, (own * weights).to(own.dtype)

    def _current(
        self, e: int, receiver: int, kind: Projection, step: Step, news: News, now: Projections
    ) -> Tensor:
        """Current values of a receiver at the step's positions, and new ones where it has some."""
        values = now.placed[receiver, kind][:, index_of(step.positions)]
        if receiver not in step.receivers:
            return values[None]
        if (receiver, kind) not in news.placed:
            news.placed[receiver, kind] = self._made(e, receiver, news)
        at = news.inputs[receiver].flow.positions
        return insert(values, news.placed[receiver, kind], at, step.positions)

    def _made(self, e: int, receiver: int, news: News) -> Tensor:
        """What an expert, or the router, makes of its new input."""
        new = news.inputs[receiver]
        at = index_of(new.flow.positions)
        if receiver == self.stage.router:
            return self.stage.route(new.read, at)
        return self.stage.alone(e, new.read, at)

    def n_weights(self, step: Step) -> int:
        """Matrices of an expert."""
        return 3 * self.model.d_model * self.stage.mixture.width


class Layer(_OfHeads, _WithLatents):
    """The heads of a layer whose latents are senders."""

    stage: LatentHeads

    def one(self, step: Step, news: News, now: Projections) -> Few:
        """What latents and error node write, see :meth:`_OneByOne.one`."""
        new = set(step.receivers)
        heads = [
            head
            for head in range(self.model.shape.n_heads)
            if not new.isdisjoint(self.stage.receivers_of(head).values())
        ]
        found = new_z(self.stage, heads, step.positions, news, now).movedim(0, -2)
        z = now.z[self.stage.layer][:, index_of(step.positions)]
        z = z.unflatten(-1, (self.model.shape.n_heads, -1))  # (batch, position, head, d_head)
        z = z.expand(len(found), *z.shape).clone()
        z[..., heads, :] = found
        news.z[self.stage.layer] = step.positions, z
        wanted = self.wanted(step)
        assert wanted is not None
        return self.stage.few(z.flatten(-2), wanted)

    def n_weights(self, step: Step) -> int:
        """W_Q, W_K, W_V and W_O of the heads, and those of an encoder."""
        return 4 * self.model.d_model**2 + super().n_weights(step)


def new_z(
    stage: Heads, heads: Sequence[int], positions: Numbers, news: News, now: Projections
) -> Float[Tensor, "head scenario batch position d_head"]:
    """New z of some heads, of which inputs change, at the same positions of all."""
    attention = stage.model.layers[stage.layer].attention
    n_keys = positions[-1] + 1 if attention.causal else now.n_pos
    wanted = {kind: positions if kind == "q" else tuple(range(n_keys)) for kind in KINDS}
    mask = now.masks[stage.layer]
    mask = None if mask is None else mask[index_of(positions), :n_keys]
    n, n_prompts = next(iter(news.inputs.values())).read.shape[:2]
    found = []
    for part in at_once(heads, n * n_prompts * len(positions) * n_keys, now.device):
        ports = [stage.receivers_of(head) for head in part]
        q, k, v = (
            _values(kind, [port[kind] for port in ports], wanted[kind], news, now) for kind in KINDS
        )  # (head, scenario or 1, batch, position, d_head)
        found.append(attention.attend(q, k, v, mask, part))
    return found[0] if len(found) == 1 else torch.cat(found)


def _values(
    kind: Kind, receivers: Sequence[int], wanted: Numbers, news: News, now: Projections
) -> Float[Tensor, "receiver _ batch position d_head"]:
    """Placed projections of some receivers, new ones where there are some."""
    each, n, at = [], 1, index_of(wanted)
    for receiver in receivers:
        value, new = now.placed[receiver, kind][:, at][None], news.placed.get((receiver, kind))
        if new is not None:
            n = len(new)
            value = insert(value[0], new, news.inputs[receiver].flow.positions, wanted)
        each.append(value)
    return torch.stack([x.expand(n, -1, -1, -1) for x in each])


def units_of(program: Program, unit: NDArray[np.int64]) -> dict[int, Unit]:
    """What recomputes each unit, of ``unit [node]``; those of a stage share it."""
    found: dict[int, Unit] = {}
    for stage in program.stages[:-1]:
        senders = program.senders_written(stage)
        made = _kind_of(stage)(stage, senders.start)
        found |= dict.fromkeys(unit[senders].tolist(), made)
    return found


def _kind_of(stage: Stage) -> type[Unit]:
    if isinstance(stage, Heads):
        return Layer if isinstance(stage, LatentHeads) else Head
    return Expert if isinstance(stage, Experts) else Point
