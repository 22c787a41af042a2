"""What a node does, in terms that mean the same in any model: no index, no direction of the stream.

==============  ============================================================================
``attention``   of heads, on the task's prompts: from each place (label) to each, the mean over
                the queries there of the attention to all keys there
``direct``      what the node writes at the scored positions for the answers against the wrong
                ones (against the mean of all tokens where there are none), as a share of what all
                nodes and embeddings write; the last norms hold their scale
``repeats``     of heads, :func:`acdc.measure.roles.measure_repeats`
``roles``       of heads, :func:`acdc.measure.roles.roles_of`
``depth``       layer, from 0 of the first to 1 of the last
==============  ============================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from acdc.engine.experiment import Experiment
from acdc.measure.places import Places, find_places
from acdc.measure.roles import measure_roles, roles_of
from acdc.models.lowering.model import LoweredModel, Trace
from acdc.tasks.base import Pair
from graphs.graph import parse_node

__all__ = ["Behaviour", "distance", "distances", "measure_behaviour"]

_REPEATS = ("previous", "duplicate", "induction")


@dataclass(frozen=True, eq=False)
class Behaviour:
    """What a node does, see the module.

    Parameters
    ----------
    kind
        ``head`` or ``mlp``.
    depth, direct
        Of any node.
    attention
        (query place, key place) -> attention; of heads.
    repeats, roles
        Of heads.
    """

    kind: str
    depth: float
    direct: float
    attention: dict[tuple[str, str], float] = field(default_factory=dict)
    repeats: dict[str, float] = field(default_factory=dict)
    roles: frozenset[str] = frozenset()


def distances(one: Behaviour, other: Behaviour) -> dict[str, float]:
    """Return how far two nodes of one kind are apart in each respect, from 0 to 1.

    ``attention``: half the summed difference over keys (total variation), mean over the query
    places that both have; ``direct`` and ``depth``: absolute difference, at most 1; ``repeats``:
    mean absolute difference; ``roles``: one less the Jaccard index, 0 where neither has a role.
    What is not known of both is left out.
    """
    found = {
        "depth": abs(one.depth - other.depth),
        "direct": min(1.0, abs(one.direct - other.direct)),
    }
    if one.kind == "head":
        either = one.roles | other.roles
        found["roles"] = 1 - len(one.roles & other.roles) / len(either) if either else 0.0
    known = one.repeats.keys() & other.repeats.keys()
    if known:
        found["repeats"] = sum(abs(one.repeats[k] - other.repeats[k]) for k in known) / len(known)
    places = {q for q, _ in one.attention} & {q for q, _ in other.attention}
    if places:
        pairs = {
            pair for pair in one.attention.keys() | other.attention.keys() if pair[0] in places
        }
        gaps = [abs(one.attention.get(p, 0.0) - other.attention.get(p, 0.0)) for p in pairs]
        found["attention"] = min(1.0, sum(gaps) / (2 * len(places)))
    return found


def distance(one: Behaviour, other: Behaviour) -> float:
    """Return how far two nodes of one kind are apart: the mean of :func:`distances`."""
    found = distances(one, other)
    return sum(found.values()) / len(found)


@torch.no_grad()
def measure_behaviour(experiment: Experiment) -> dict[str, Behaviour]:
    """Measure every head and MLP of an experiment's model, by name.

    Parameters
    ----------
    experiment
        Model and prompts; what is measured is the clean run's.
    """
    model, places = experiment.model, find_places(experiment.task)
    attention = _Attention(model, places)
    direct = torch.zeros(sum(_widths(model)), dtype=torch.float64)
    margin = torch.zeros((), dtype=torch.float64)
    for pairs in _alike(experiment):
        trace = model.forward(torch.tensor([p.clean for p in pairs], device=model.device))
        attention.add(trace, pairs)
        written, total = _direct(model, trace, pairs)
        direct, margin = direct + written.cpu().double(), margin + total.cpu().double()
    shares = (direct / (margin.abs() if margin else 1)).tolist()
    numbers = measure_roles(experiment)
    roles = roles_of(numbers)
    found = {}
    for name, share in zip(_names(model), shares, strict=True):
        kind, layer, head = parse_node(name)
        depth = layer / max(1, len(model.layers) - 1)
        if kind == "mlp":
            found[name] = Behaviour(kind, depth, share)
            continue
        tables = {key: getattr(numbers, key) for key in _REPEATS}
        found[name] = Behaviour(
            kind,
            depth,
            share,
            attention.of(layer, head),
            {key: table[layer][head] for key, table in tables.items() if table},
            frozenset(role for role, heads in roles.items() if name in heads),
        )
    return found


def _names(model: LoweredModel) -> list[str]:
    """Heads, then MLPs: the order of what :func:`_direct` returns."""
    heads = [f"a{i}.h{h}" for i in range(len(model.layers)) for h in range(model.shape.n_heads)]
    return [*heads, *(f"m{i}" for i, layer in enumerate(model.layers) if layer.mlp is not None)]


def _widths(model: LoweredModel) -> tuple[int, int]:
    n_mlps = sum(layer.mlp is not None for layer in model.layers)
    return len(model.layers) * model.shape.n_heads, n_mlps


def _alike(experiment: Experiment) -> Iterator[list[Pair]]:
    """Yield prompts of one length and one set of scored positions, not too many at once."""
    groups: dict[tuple[int, tuple[int, ...]], list[Pair]] = {}
    for pair in experiment.task.pairs:
        groups.setdefault((len(pair.clean), pair.scored), []).append(pair)
    for pairs in groups.values():
        for start in range(0, len(pairs), experiment.batch_size):
            yield pairs[start : start + experiment.batch_size]


class _Attention:
    """Attention between places, summed over prompts."""

    def __init__(self, model: LoweredModel, places: Places) -> None:
        self._model, self._places, n = model, places, len(places.names)
        self._sums = [
            torch.zeros(model.shape.n_heads, n, n, device=model.device) for _ in model.layers
        ]
        self._queries = torch.zeros(n, device=model.device)

    def add(self, trace: Trace, pairs: list[Pair]) -> None:
        """Add prompts of one length."""
        places = torch.tensor([self._places.of(pair).tolist() for pair in pairs])
        n = len(self._places.names)
        at = torch.nn.functional.one_hot(places, n).to(self._model.device, torch.float32)
        self._queries += at.sum((0, 1))
        for i, layer in enumerate(self._model.layers):
            pattern = layer.attention.patterns(trace.q[i], trace.k[i]).float()
            self._sums[i] += torch.einsum("bqi,bhqk,bkj->hij", at, pattern, at)

    def of(self, layer: int, head: int) -> dict[tuple[str, str], float]:
        """Return a head's attention by query and key place, of places that there are."""
        names = self._places.names
        means = self._sums[layer][head] / self._queries.clamp(min=1)[:, None]
        there = {int(i) for i in self._queries.nonzero().flatten()}
        return {
            (names[i], names[j]): float(means[i, j]) for i in sorted(there) for j in sorted(there)
        }


def _direct(model: LoweredModel, trace: Trace, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """``[node]``: what nodes write for the answers, summed; and what all senders do together."""
    scored = torch.tensor(pairs[0].scored, device=model.device)
    n_rows = len(pairs) * len(scored)
    final = trace.at(("final", 0))[:, scored]  # [prompt, scored, d_model]
    wanted = torch.stack([_wanted(model, pair) for pair in pairs])  # [prompt, d_model]
    wanted = wanted[:, None].expand_as(final).flatten(0, 1)
    rows = final.flatten(0, 1)
    towards = model.ln_final.hold(rows).vjp(rows, wanted)  # [row, d_model]
    heads: list[Tensor] = []
    mlps: list[Tensor] = []
    for i, layer in enumerate(model.layers):
        back = towards
        if layer.attention_post is not None:
            out = trace.attention_out[i][:, scored].flatten(0, 1)
            back = layer.attention_post.hold(out).vjp(out, towards)
        z = trace.z[i][:, :, scored].transpose(1, 2).flatten(0, 1)  # [row, head, d_head]
        heads.append(torch.einsum("rhe,hed,rd->h", z, layer.attention.W_O, back))
        if layer.mlp is not None:
            mlps.append((trace.mlp_out[len(mlps)][:, scored].flatten(0, 1) * towards).sum()[None])
    assert len(towards) == n_rows
    embeds = sum((x[:, scored].flatten(0, 1) * towards).sum() for x in trace.embeds)
    found = torch.cat([*heads, *mlps])
    return found, found.sum() + embeds


def _wanted(model: LoweredModel, pair: Pair) -> Tensor:
    """``[d_model]``: direction of the answers' logits less those of the wrong ones."""
    right = model.W_U[list(pair.answers)].mean(0)
    if pair.wrong_answers:
        return right - model.W_U[list(pair.wrong_answers)].mean(0)
    return right - model.W_U.mean(0)
