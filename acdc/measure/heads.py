"""Why heads attend, on average over prompts.

**Where.**  Places are the task's labels, or positions.  The query places of a head count by its
first-order effect there (what it writes less what it writes in the corrupt run, times the gradient
of the metric), and its attention from one place to another by how much it exceeds that of a head
that attends to all alike.

**Why.**  A score says nothing alone: what is the same for all keys cancels in the softmax.  What is
taken apart is therefore the *contrast*: the score at the keys of the key place (weighted by the
attention that they get) less the mean score of all keys that the query sees, averaged over queries
and prompts.  It is a weighted sum of scores, and so the sum over pairs of senders of
:mod:`acdc.engine.head_parts`, exactly.

**Positions or content.**  What a sender writes at a position is split in two: what it writes there
on the average over *shuffled* prompts (each prompt's tokens in random orders, a first token that
all prompts share stays), which depends on the position alone, and the rest, which depends on the
tokens.  Biases belong to the first part.  Scores being bilinear, a contrast has four parts:
position x position, where the tokens do not matter at all; query or key content x position of the
other; and content x content, a match of tokens.  Norms keep the scales of the run.

**What is carried.**  The same with values: what a head writes along a direction is a sum over what
its value reads.  Directions are the metric's at the end of the stream (the last norm's scale held:
the direct effect on the logits), and those along which the queries, keys and values of later heads
read what their own contrast (their own output, for values) is made of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.attribution import Point, gradients
from acdc.engine.batch import Batch
from acdc.engine.experiment import Experiment
from acdc.engine.head_parts import HeadParts, PromptsRun, Written, head_parts
from acdc.engine.metrics import Metric, Targets, get_metric
from acdc.engine.values import Values
from acdc.measure.places import Places
from acdc.models.lowering.attention import KINDS, Attention, Kind
from acdc.tasks.base import Pair

__all__ = ["Sums", "Survey", "Wanted", "explain", "survey", "towards"]

_BYTES = 1 << 28
"""Of what senders write on the prompts that are looked at together."""
_LEAST_SHUFFLED = 64
"""Shuffled prompts that an average over tokens is made of, at least."""


@dataclass(frozen=True, eq=False)
class Survey:
    """Where heads attend, and where it matters.

    Parameters
    ----------
    attention
        ``[layer, head, place, place]``: mean attention of the queries at a place to all keys at
        another; NaN where there is no query.
    uniform
        ``[layer, place, place]``: the same of a head that attends to all keys alike.
    effect
        ``[layer, head, place]``: summed absolute first-order effect of the head's output there.
    """

    attention: NDArray[np.float64]
    uniform: NDArray[np.float64]
    effect: NDArray[np.float64]


@dataclass(frozen=True)
class Wanted:
    """A head, and the attention that is to be explained.

    Parameters
    ----------
    layer, head
        Which.
    query, key
        Places.
    """

    layer: int
    head: int
    query: int
    key: int


@dataclass(eq=False)
class Sums:
    """What the attention of one head is made of, summed over queries and prompts.

    Attributes
    ----------
    names
        ``[source]``: what it reads.
    n
        Queries with a key at the place.
    distances
        ``[pos]``: attention of the queries to keys at the place, by how far before them these are
        (after them, in models that see both ways).
    score
        Of raw scores at the keys.
    pairs
        ``[source, source]``: contrast by query and key side.
    positions
        Likewise: that of positions alone.
    query_content, key_content
        Contrast of what one side's tokens add to the position of the other.
    written
        ``[source]``: squared length of what the head writes at the query place, by its value.
    logits
        ``[source]``: direct effect on the metric, by its value.
    onward
        ``(index of a later head, q, k or v)`` -> ``[source]``: what it brings there, by its value,
        in the unit of the later head's contrast (of :attr:`written` for values).
    """

    names: tuple[str, ...]
    n: float = 0.0
    distances: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    score: float = 0.0
    pairs: NDArray[np.float64] | float = 0.0
    positions: NDArray[np.float64] | float = 0.0
    query_content: float = 0.0
    key_content: float = 0.0
    written: NDArray[np.float64] | float = 0.0
    logits: NDArray[np.float64] | float = 0.0
    onward: dict[tuple[int, Kind], NDArray[np.float64] | float] = field(
        default_factory=lambda: defaultdict(float)
    )


def towards(experiment: Experiment) -> Metric:
    """Return the metric whose gradient says what matters.

    That of the experiment, unless it compares with the clean run and so is flat there: then the
    logit difference, or the answers' negative log probability, or, without answers, how far the
    clean run's first choice is above the mean logit.
    """
    metric, pairs = experiment.metric, experiment.task.pairs
    if metric.compares is None:
        return metric
    if all(pair.answers and pair.wrong_answers for pair in pairs):
        return get_metric("logit_diff")
    return get_metric("nll") if all(pair.answers for pair in pairs) else _FIRST_CHOICE


def _first_choice(logits: Tensor, targets: Targets) -> Tensor:
    assert targets.clean is not None
    best = targets.clean.argmax(-1, keepdim=True).expand(*logits.shape[:-1], 1)
    return logits.gather(-1, best)[..., 0] - logits.mean(-1)


_FIRST_CHOICE = Metric(
    "first_choice", sign=-1, whole_vocab=True, needs_answers=False, needs_wrong=False,
    compares=lambda logits: logits, function=_first_choice,
    description="logit of the clean run's first choice above the mean logit", linear=True,
)  # fmt: skip


# --- where --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Prompts of one length: their batch, and ``[prompt, pos, place]`` of 0 and 1."""

    batch: Batch
    at: Tensor


def _chunks(experiment: Experiment, places: Places, n_each: int) -> Iterator[_Chunk]:
    """Prompts that are looked at together."""
    alike: dict[tuple[int, tuple[int, ...]], list[Pair]] = defaultdict(list)
    for pair in experiment.task.pairs:
        alike[len(pair.clean), pair.scored].append(pair)
    for _, pairs in sorted(alike.items()):
        for i in range(0, len(pairs), n_each):
            some = tuple(pairs[i : i + n_each])
            (batch,) = replace(
                experiment.on(replace(experiment.task, pairs=some)), batch_size=len(some)
            ).batches
            index = torch.as_tensor(np.stack([places.of(pair) for pair in some]))
            at = torch.nn.functional.one_hot(index, len(places.names))
            yield _Chunk(batch, at.to(experiment.model.device, experiment.model.dtype))


def survey(experiment: Experiment, places: Places) -> Survey:
    """Look where all heads attend on the clean prompts, and where what they write matters.

    Parameters
    ----------
    experiment
        With the metric of :func:`towards`.
    places
        Of the prompts.
    """
    model, n = experiment.model, len(places.names)
    n_layers, n_heads = model.shape.n_layers, model.shape.n_heads
    attention = np.zeros((n_layers, n_heads, n, n))
    uniform, effect = np.zeros((n_layers, n, n)), np.zeros((n_layers, n_heads, n))
    count = np.zeros(n)
    for chunk in _chunks(experiment, places, experiment.batch_size):
        at = chunk.at
        count += _numpy(at.sum((0, 1)))
        keys = [("z", i) for i in range(n_layers)]
        found = gradients(experiment, chunk.batch, Point(chunk.batch.clean), keys)
        with torch.no_grad():
            other = model.forward(chunk.batch.corrupt)
            for i, layer in enumerate(model.layers):
                trace = found.trace
                pattern = layer.attention.patterns(trace.q[i], trace.k[i]).to(at.dtype)
                attention[i] += _numpy(torch.einsum("bhqk,bqi,bkj->hij", pattern, at, at))
                even = _uniform(layer.attention, at)
                uniform[i] += _numpy(torch.einsum("qk,bqi,bkj->ij", even, at, at))
                moved = ((other.z[i] - trace.z[i]) * found.at["z", i]).sum(-1)  # (batch, head, pos)
                effect[i] += _numpy(torch.einsum("bhq,bqi->bhi", moved, at).abs().sum(0))
    with np.errstate(invalid="ignore"):
        return Survey(attention / count[:, None], uniform / count[:, None], effect)


def _uniform(attention: Attention, at: Tensor) -> Tensor:
    """``[query, key]`` of a head that attends to all keys that it sees alike."""
    n_pos = at.shape[1]
    mask = attention.mask(n_pos, at.device)
    scores = at.new_zeros(n_pos, n_pos) if mask is None else mask.to(at.dtype)
    return torch.softmax(scores, -1)


def _by_distance(reached: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[query, key]`` summed by how far they are apart."""
    position = np.arange(len(reached))
    apart = np.abs(position[:, None] - position)
    return np.bincount(apart.ravel(), weights=reached.ravel()).astype(np.float64)


def _added(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of two arrays, the shorter one continued by zeros."""
    total = np.zeros(max(len(a), len(b)))
    total[: len(a)] += a
    total[: len(b)] += b
    return total


def _numpy(x: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = x.detach().cpu().double().numpy()
    return found


# --- why ----------------------------------------------------------------------------------


def explain(
    experiment: Experiment,
    places: Places,
    wanted: Sequence[Wanted],
    *,
    usual: Experiment | None = None,
    seed: int = 0,
) -> list[Sums]:
    """Take the attention of heads apart on the clean prompts.

    Parameters
    ----------
    experiment
        With the metric of :func:`towards`.
    places
        Of the prompts.
    wanted
        Heads, each once.
    usual
        With the prompts that are shuffled, at least as long; None: those that are explained.
    seed
        Of the shuffled prompts.
    """
    written = Written(experiment)
    typical = _typical(usual or experiment, written, seed)
    found = [Sums(written.names_seen(one.layer)) for one in wanted]
    order = sorted(range(len(wanted)), key=lambda i: -wanted[i].layer)
    for chunk in _chunks(experiment, places, _prompts_at_once(experiment, written)):
        run = written.run(chunk.batch.clean)
        length, n_prompts = run.trace.attention_in[0].shape[1], chunk.batch.n_prompts
        means = [x[:, None, None, :length].expand(-1, 1, n_prompts, -1, -1) for x in typical]
        metric = _metric_direction(experiment, chunk.batch, run)
        seen: list[_Direction] = []
        for i in order:
            one = _Look(wanted[i], head_parts(run, wanted[i].layer, wanted[i].head), chunk.at)
            one.add_scores(found[i], means)
            one.add_values(found[i], metric, seen)
            seen += one.directions(i)
    return found


def _prompts_at_once(experiment: Experiment, written: Written) -> int:
    longest = max(len(pair.clean) for pair in experiment.task.pairs)
    each = len(written.names) * longest * experiment.model.d_model * 8
    return max(1, min(experiment.batch_size, _BYTES // each))


@torch.no_grad()
def _typical(experiment: Experiment, written: Written, seed: int) -> Values:
    """Mean over shuffled prompts of what senders write at each position.

    By block ``[sender, pos, width]``.
    """
    prompts = [pair.clean for pair in experiment.task.pairs]
    longest = max(map(len, prompts))
    fixed = int(len({prompt[0] for prompt in prompts}) == 1)
    rng = np.random.default_rng(seed)
    rounds = max(2, -(-_LEAST_SHUFFLED // len(prompts)))
    alike: dict[int, list[list[int]]] = defaultdict(list)
    for prompt in prompts:
        for _ in range(rounds):
            rest = rng.permutation(prompt[fixed:]).tolist()
            alike[len(prompt)].append([*prompt[:fixed], *rest])
    n_each, count = _prompts_at_once(experiment, written), np.zeros(longest)
    total: list[Tensor] = []
    for length, rows in alike.items():
        count[:length] += len(rows)
        for i in range(0, len(rows), n_each):
            tokens = torch.tensor(rows[i : i + n_each], device=experiment.model.device)
            sums = [value[:, 0].sum(1) for value in written.run(tokens).values]
            total = total or [x.new_zeros(len(x), longest, x.shape[-1]) for x in sums]
            for whole, part in zip(total, sums, strict=True):
                whole[:, :length] += part
    over = torch.as_tensor(count)[:, None]
    return [x / over.to(x) for x in total]


def _metric_direction(experiment: Experiment, batch: Batch, run: PromptsRun) -> Tensor:
    """``[batch, pos, d_model]``: gradient at the end of the stream, the last scale held."""
    model, final = experiment.model, run.trace.at(("final", 0))
    rows = final[:, batch.scored].flatten(0, 1)
    held = replace(model, ln_final=model.ln_final.hold(rows))
    with torch.enable_grad():
        rows = rows.detach().requires_grad_(True)
        (at_rows,) = torch.autograd.grad(experiment.measure(rows, batch, held), rows)
    direction = torch.zeros_like(final)
    direction[:, batch.scored] = at_rows.unflatten(0, (len(final), -1))
    return direction


@dataclass(frozen=True, eq=False)
class _Direction:
    """Along which a head reads: head, what for, and ``[batch, pos, d_model]``."""

    index: int
    layer: int
    kind: Kind
    vector: Tensor


class _Look:
    """One head on some prompts.

    Parameters
    ----------
    wanted, parts
        The head.
    at
        ``[batch, pos, place]``.
    """

    def __init__(self, wanted: Wanted, parts: HeadParts, at: Tensor) -> None:
        self.wanted, self.parts = wanted, parts
        pattern = parts.pattern.to(at.dtype)
        inside = pattern * at[:, None, :, wanted.key]
        reached = inside.sum(-1, keepdim=True)
        self.queries = at[:, :, wanted.query] * (reached[..., 0] > 0)
        self.reached = (self.queries[..., None] * inside).sum(0)  # (query, key)
        attention = parts.run.written.program.model.layers[parts.layer].attention
        self.chosen = self.queries[..., None] * inside / reached.clamp(min=1e-30)
        self.weights = self.chosen - self.queries[..., None] * _uniform(attention, at)
        z = parts.pattern.to(parts.v.dtype) @ parts.v.sum(0)
        gained = parts.run.gained(parts.layer, z @ parts.output_matrix)
        self.own = gained * at[:, :, wanted.query, None]
        self.q, self.k = (x.sum(0, keepdim=True) for x in (parts.q, parts.k))

    def add_scores(self, found: Sums, usual: Values) -> None:
        """Add the contrast, by pairs and by parts."""
        parts = self.parts
        q, k = (parts.parts_of(kind, usual) for kind in ("q", "k"))
        found.n += float(self.queries.sum())
        found.distances = _added(found.distances, _by_distance(_numpy(self.reached)))
        found.score += float((self.chosen * parts.scores).sum())
        found.pairs += _numpy(parts.pairs(self.weights))
        positions = _numpy(parts.pairs(self.weights, q, k))
        found.positions += positions
        by_q, by_k = q.sum(0, keepdim=True), k.sum(0, keepdim=True)
        found.query_content += float(parts.pairs(self.weights, self.q - by_q, by_k))
        found.key_content += float(parts.pairs(self.weights, by_q, self.k - by_k))

    def add_values(self, found: Sums, metric: Tensor, later: Sequence[_Direction]) -> None:
        """Add what the values bring to the logits and to later heads."""
        found.written += _numpy(self.parts.carried(self.own))
        found.logits += _numpy(self.parts.carried(metric))
        for one in later:
            if one.layer > self.wanted.layer:
                found.onward[one.index, one.kind] += _numpy(self.parts.carried(one.vector))

    def directions(self, index: int) -> Iterator[_Direction]:
        """Along which it reads what its contrast, and its output, are made of."""
        scale, weights = self.parts.scale, self.weights
        along = {
            "q": weights @ self.k[0] * scale,
            "k": weights.transpose(-1, -2) @ self.q[0] * scale,
            "v": self.parts.written_along(self.own),
        }
        for kind in KINDS:
            vector = self.parts.pulled(kind, along[kind])
            yield _Direction(index, self.wanted.layer, kind, vector)
