"""What is found of single heads of a circuit: where they attend, why, and what they carry.

Shares are of the contrast: how far the score of the keys that a head attends to is above that of
the average key (:mod:`acdc.measure.heads`).  They add up to 1, and some can be negative or above 1.
Where the contrast is below :data:`LEAST_CONTRAST` there is nothing to explain, and shares are None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.engine.head_parts import BIAS, OUTPUT_BIASES
from acdc.errors import OptionError, UnknownNameError
from acdc.measure.heads import Sums, Survey, Wanted, explain, survey, towards
from acdc.measure.places import Places, find_places
from acdc.tasks.split import select_pairs
from graphs import Circuit
from graphs.coarse import coarsen
from graphs.graph import parse_node

__all__ = [
    "LEAST_CONTRAST",
    "LEAST_SHARE",
    "Cell",
    "Composition",
    "HeadReasons",
    "Part",
    "Reason",
    "Target",
    "circuit_heads",
    "explain_heads",
    "full_precision",
]

LEAST_CONTRAST = 0.1
"""Of scores, in nats, below which attention is as good as even."""
LEAST_SHARE = 0.1
"""Of a contrast from which on a sender is named as what a head composes with."""

_N_CELLS, _N_PAIRS, _N_PARTS = 3, 8, 8
_LEAST_EXCESS = 0.05
"""Of attention above that of an even head, for a place to be named beside the first."""
_NO_NODES = ("input", "tok", "pos", OUTPUT_BIASES, BIAS)


@dataclass(frozen=True)
class Cell:
    """Attention from one place to another.

    Parameters
    ----------
    query, key
        Names of the places.
    weight
        Mean attention of the queries to all keys there.
    uniform
        The same of a head that attends to all keys alike.
    importance
        Share of the head's absolute first-order effect that is at the query place; None where it
        has none anywhere.
    """

    query: str
    key: str
    weight: float
    uniform: float
    importance: float | None


@dataclass(frozen=True)
class Reason:
    """One pair of senders of a head's contrast.

    Parameters
    ----------
    query, key
        What the query and the key side read.
    contrast
        In nats; of positions alone in ``positions``.
    share
        Of the whole contrast.
    """

    query: str
    key: str
    contrast: float
    positions: float
    share: float | None


@dataclass(frozen=True)
class Part:
    """What one sender contributes.

    Parameters
    ----------
    name
        Of the sender.
    value
        In the unit of the whole.
    share
        Of the whole; None where that is nothing.
    """

    name: str
    value: float
    share: float | None


@dataclass(frozen=True)
class Composition:
    """A node that a head reads to decide where it attends (Q, K), or what it moves (V)."""

    kind: str
    sender: str
    share: float


@dataclass(frozen=True)
class Target:
    """What a head brings to a later one.

    Parameters
    ----------
    receiver
        As the graph has it, ``a3.h1<k>``.
    share
        Of the receiver's contrast, or of what its value writes.
    by
        The same by what the head's own value reads.
    """

    receiver: str
    share: float
    by: tuple[Part, ...]


@dataclass(frozen=True)
class HeadReasons:
    """Why one head attends, and what it carries.

    Parameters
    ----------
    head
        Its name.
    in_circuit, strength
        Whether an edge of the circuit touches it, and the largest absolute score of those.
    roles
        By behaviour; empty if it has none.
    cells
        Where it attends, the most telling first.
    at
        The one that is explained.
    distance, distance_share
        Between query and key where most of its attention there is, and the share of that.
    score
        Mean score there, before softmax and soft cap.
    contrast
        How far that is above the average key, in nats.
    pairs
        The strongest, by absolute contrast.
    by_query, by_key
        Summed over the other side.
    split
        ``position``, ``query content``, ``key content``, ``match`` -> share of the contrast; empty
        where that is nothing.
    value
        What is written from the query place, by what the value reads.
    logits
        Direct effect on the metric of :func:`acdc.measure.heads.towards`, positive where it helps.
    logits_by
        The same by what the value reads.
    onward
        Later heads of the circuit that read it.
    """

    head: str
    in_circuit: bool
    strength: float
    roles: tuple[str, ...]
    cells: tuple[Cell, ...]
    at: Cell
    distance: int
    distance_share: float
    score: float
    contrast: float
    pairs: tuple[Reason, ...]
    by_query: tuple[Part, ...]
    by_key: tuple[Part, ...]
    split: Mapping[str, float]
    value: tuple[Part, ...]
    logits: float
    logits_by: tuple[Part, ...]
    onward: tuple[Target, ...]

    @property
    def composition(self) -> tuple[Composition, ...]:
        """Nodes that make up at least :data:`LEAST_SHARE` of queries, keys or values."""
        sides = {"Q": self.by_query, "K": self.by_key, "V": self.value}
        found = [
            Composition(kind, part.name, part.share)
            for kind, parts in sides.items()
            for part in parts
            if part.share is not None and part.share >= LEAST_SHARE and part.name not in _NO_NODES
        ]
        return tuple(sorted(found, key=lambda one: -one.share))

    @property
    def position(self) -> float | None:
        """Share of the contrast that positions alone make; None where there is no contrast."""
        return self.split.get("position")


def full_precision(experiment: Experiment) -> Experiment:
    """Return the float32 twin of an experiment in less: sums that are to be exact need it."""
    return experiment.in_float32 or experiment


def circuit_heads(circuit: Circuit) -> dict[str, float]:
    """Return the heads that edges of a circuit leave, the strongest first.

    With the largest absolute score of the edges that leave or enter them, those into a key-value
    head that several heads share counted for each.
    """
    whole = coarsen(circuit, circuit.graph.shape.unsplit)
    graph, best = whole.graph, dict[str, float]()
    kept = np.flatnonzero(whole.in_circuit).tolist()
    senders = {graph.senders[graph.edge_sender[edge]] for edge in kept}
    for edge in kept:
        fed = graph.fed_by(int(graph.edge_receiver[edge])).tolist()
        for name in {graph.senders[graph.edge_sender[edge]], *(graph.nodes[i] for i in fed)}:
            best[name] = max(best.get(name, 0.0), abs(float(whole.scores[edge])))
    found = {name: best[name] for name in best if name in senders and _is_head(name)}
    return dict(sorted(found.items(), key=lambda item: (-item[1], parse_node(item[0]))))


def _is_head(name: str) -> bool:
    return parse_node(name)[0] == "head"


def explain_heads(
    circuit: Circuit,
    experiment: Experiment,
    names: Sequence[str] = (),
    *,
    by: str | None = None,
    max_heads: int = 20,
    at: tuple[str, str] | None = None,
    prompt: int | None = None,
) -> tuple[HeadReasons, ...]:
    """Explain heads of a circuit, without their roles; parameters as of :func:`acdc.heads`."""
    experiment = replace(full_precision(experiment), positions=None, metric=towards(experiment))
    strengths = circuit_heads(circuit)
    chosen = list(dict.fromkeys([*names, *list(strengths)[:max_heads]]))
    looked_at = experiment if prompt is None else _alone(experiment, prompt)
    places = find_places(looked_at.task, by)
    fixed = None if at is None else _fixed(places, at)
    if not chosen:
        return ()
    looked = survey(looked_at, places)
    cells = [_cells(looked, places, name, fixed) for name in chosen]
    wanted = [
        Wanted(
            *parse_node(name)[1:], places.names.index(own[0].query), places.names.index(own[0].key)
        )
        for name, own in zip(chosen, cells, strict=True)
    ]
    sums = explain(looked_at, places, wanted, usual=experiment)
    helps = -looked_at.metric.sign / looked_at.n_rows
    found = []
    for i, (name, own) in enumerate(zip(chosen, cells, strict=True)):
        onward = _onward(sums, chosen, i)
        found.append(_reasons(name, strengths, own, sums[i], helps, onward))
    return tuple(found)


def _alone(experiment: Experiment, prompt: int) -> Experiment:
    """The experiment on one of its prompts."""
    pairs = experiment.task.pairs
    if not 0 <= prompt < len(pairs):
        raise OptionError(f"prompt {prompt}: there are {len(pairs)}, from 0 to {len(pairs) - 1}")
    return experiment.on(select_pairs(experiment.task, (pairs[prompt],)))


def _fixed(places: Places, at: tuple[str, str]) -> tuple[int, int]:
    """Query and key place, by number."""
    for name in at:
        if name not in places.names:
            raise UnknownNameError("place", name, places.names)
    return places.names.index(at[0]), places.names.index(at[1])


def _cells(
    looked: Survey, places: Places, name: str, fixed: tuple[int, int] | None
) -> tuple[Cell, ...]:
    """Where a head attends: more than evenly, and where it matters; what is asked for first."""
    _, layer, head = parse_node(name)
    effect = looked.effect[layer, head]
    whole = float(effect.sum())
    importance = effect / whole if whole > 0 else np.ones_like(effect)
    attention, uniform = looked.attention[layer, head], looked.uniform[layer]
    telling = np.nan_to_num(importance[:, None] * (attention - uniform), nan=-np.inf)
    best = np.argsort(-telling, axis=None, kind="stable")[:_N_CELLS]
    ranked = list(zip(*(x.tolist() for x in np.unravel_index(best, telling.shape)), strict=True))
    if fixed is not None:
        if not uniform[fixed] > 0:
            query, key = (places.names[i] for i in fixed)
            raise OptionError(f"no query at {query} sees a key at {key}: name other places")
        ranked = [fixed, *(cell for cell in ranked if cell != fixed)]
    found: list[Cell] = []
    for query, key in ranked:
        excess = attention[query, key] - uniform[query, key]
        if found and not (excess >= _LEAST_EXCESS and telling[query, key] > 0):
            continue
        found.append(
            Cell(
                places.names[query],
                places.names[key],
                float(attention[query, key]),
                float(uniform[query, key]),
                float(importance[query]) if whole > 0 else None,
            )
        )
    return tuple(found)


def _reasons(
    name: str,
    strengths: Mapping[str, float],
    cells: tuple[Cell, ...],
    sums: Sums,
    helps: float,
    onward: tuple[Target, ...],
) -> HeadReasons:
    """Means over queries of what was summed over them."""
    n = max(sums.n, 1.0)
    pairs, positions = np.asarray(sums.pairs) / n, np.asarray(sums.positions) / n
    whole = float(pairs.sum())
    unit = whole if whole >= LEAST_CONTRAST else None
    written, logits = np.asarray(sums.written), np.asarray(sums.logits) * helps
    length = float(written.sum())
    return HeadReasons(
        head=name,
        in_circuit=name in strengths,
        strength=strengths.get(name, 0.0),
        roles=(),
        cells=cells,
        at=cells[0],
        distance=int(sums.distances.argmax()),
        distance_share=float(sums.distances.max() / max(sums.distances.sum(), 1e-30)),
        score=sums.score / n,
        contrast=whole,
        pairs=_pairs(sums.names, pairs, positions, unit),
        by_query=_parts(sums.names, pairs.sum(1), unit),
        by_key=_parts(sums.names, pairs.sum(0), unit),
        split=_split(sums, positions, whole) if unit else {},
        value=_parts(sums.names, written, length if length > 0 else None),
        logits=float(logits.sum()),
        logits_by=_parts(sums.names, logits, None),
        onward=onward,
    )


def _pairs(
    names: Sequence[str],
    pairs: NDArray[np.float64],
    positions: NDArray[np.float64],
    unit: float | None,
) -> tuple[Reason, ...]:
    ranked = np.argsort(-np.abs(pairs), axis=None, kind="stable")[:_N_PAIRS]
    return tuple(
        Reason(
            names[q], names[k], float(pairs[q, k]), float(positions[q, k]),
            float(pairs[q, k]) / unit if unit else None,
        )
        for q, k in zip(*np.unravel_index(ranked, pairs.shape), strict=True)
        if pairs[q, k] != 0
    )  # fmt: skip


def _parts(
    names: Sequence[str], values: NDArray[np.float64], unit: float | None
) -> tuple[Part, ...]:
    ranked = np.argsort(-np.abs(values), kind="stable")[:_N_PARTS]
    return tuple(
        Part(names[i], float(values[i]), float(values[i]) / unit if unit else None)
        for i in ranked
        if values[i] != 0
    )


def _split(sums: Sums, positions: NDArray[np.float64], whole: float) -> dict[str, float]:
    n = max(sums.n, 1.0)
    own = {
        "position": float(positions.sum()) / whole,
        "query content": sums.query_content / n / whole,
        "key content": sums.key_content / n / whole,
    }
    return own | {"match": 1 - sum(own.values())}


def _onward(sums: Sequence[Sums], names: Sequence[str], i: int) -> tuple[Target, ...]:
    """Later heads to whose queries, keys or values a head brings a share worth naming."""
    found = []
    for (later, kind), value in sums[i].onward.items():
        target = sums[later]
        contrast = float(np.asarray(target.pairs).sum())
        if kind == "v":
            whole = float(np.asarray(target.written).sum())
        else:
            whole = contrast if contrast / max(target.n, 1.0) >= LEAST_CONTRAST else 0.0
        brought = np.asarray(value)
        if whole > 0 and float(brought.sum()) / whole >= LEAST_SHARE:
            by = _parts(sums[i].names, brought / whole, 1.0)
            found.append(Target(f"{names[later]}<{kind}>", float(brought.sum()) / whole, by))
    return tuple(sorted(found, key=lambda one: -one.share))
