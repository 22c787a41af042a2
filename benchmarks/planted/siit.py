"""Strict interchange intervention training (SIIT): the losses.

A *plan* says which edges of a prompt's run carry what their senders wrote on the source prompt:
edges of the algorithm (an interchange intervention) and edges outside of it.  The algorithm says
which distribution must come out: the counterfactual one for the former, no change for the
latter.  Three losses, each a KL divergence in nats at the prompt's last position, mean over
prompts:

behaviour
    the undisturbed run against the algorithm's answer;
interchange
    runs with edges of the algorithm patched (all that leave an aligned node, or a single one)
    against the algorithm's counterfactual answer;
strictness
    runs with edges outside the algorithm patched (all of them, all that leave one node, or a
    random share) against the algorithm's undisturbed answer.

InterpBench patches nodes; here edges are patched, of which nodes are a special case (all edges
that leave one), so that what the model computes has the algorithm's edges too, not only its
nodes.

References
----------
Gupta et al. 2024, "InterpBench: Semi-Synthetic Transformers for Evaluating Mechanistic
Interpretability Techniques", arXiv 2407.14494, section 3; Geiger et al. 2022, "Inducing Causal
Structure for Interpretable Neural Networks".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random

import torch
from torch import Tensor, nn

from benchmarks.planted.algorithms import INPUT, LOGITS, NONE, Algorithm, Edge
from benchmarks.planted.model import PatchableTransformer, Run
from benchmarks.planted.prompts import Prompts
from graphs import Graph

__all__ = [
    "Alignment",
    "Losses",
    "Plan",
    "Probes",
    "answers",
    "circuit_losses",
    "divergence",
    "draw_plan",
    "losses",
]


@dataclass(frozen=True, eq=False)
class Alignment:
    """Which node of the transformer implements which variable.

    Parameters
    ----------
    algorithm
        What is implemented.
    nodes
        Inner variable -> node, as ``{"name mover": "a4.h1"}``.
    graph
        The transformer's graph, queries, keys and values apart.
    """

    algorithm: Algorithm
    nodes: Mapping[str, str]
    graph: Graph

    def node(self, variable: str) -> str:
        """Return the node of a variable; ``input`` and ``logits`` are their own."""
        return variable if variable in (INPUT, LOGITS) else self.nodes[variable]

    @cached_property
    def pairs(self) -> tuple[str, ...]:
        """The algorithm's edges as pairs of nodes, ``a1.h1->a2.h1``."""
        return tuple(f"{self.node(u)}->{self.node(v)}" for u, v in self.algorithm.edges)

    @cached_property
    def _pair_of_edge(self) -> list[str]:
        senders = self.graph.senders
        ends = zip(self.graph.edge_sender, self.graph.edge_receiver, strict=True)
        return [f"{senders[u]}->{self.graph.receiver_node(v)}" for u, v in ends]

    @cached_property
    def edges(self) -> dict[Edge, Tensor]:
        """Edge of the algorithm -> ``[edge]`` mask of the graph's edges: q, k and v together."""
        return {
            edge: torch.tensor([pair == wanted for pair in self._pair_of_edge])
            for edge, wanted in zip(self.algorithm.edges, self.pairs, strict=True)
        }

    @cached_property
    def outside(self) -> Tensor:
        """``[edge]`` mask: edges that are none of the algorithm's."""
        return ~torch.stack(list(self.edges.values())).any(0)

    @cached_property
    def outside_nodes(self) -> tuple[str, ...]:
        """Senders that implement no variable."""
        return tuple(s for s in self.graph.senders if s not in {INPUT, *self.nodes.values()})

    @cached_property
    def outside_pairs(self) -> dict[str, Tensor]:
        """Pair of nodes that is none of the algorithm's -> ``[edge]`` mask of its q, k and v."""
        masks: dict[str, Tensor] = {}
        for edge, pair in enumerate(self._pair_of_edge):
            if pair not in self.pairs:
                masks.setdefault(pair, torch.zeros(self.graph.n_edges, dtype=torch.bool))
                masks[pair][edge] = True
        return masks

    def leaving(self, node: str) -> Tensor:
        """Return the ``[edge]`` mask of what leaves a sender."""
        return torch.from_numpy(self.graph.edge_sender == self.graph.sender_index[node])


@dataclass(frozen=True, eq=False)
class Plan:
    """What is patched in the runs of one batch.

    Parameters
    ----------
    inside
        Edge of the algorithm -> ``[batch]`` bool: rows in which it is patched.
    patched
        ``[batch, edge]`` bool: what is patched in the transformer.
    """

    inside: Mapping[Edge, Tensor]
    patched: Tensor

    @property
    def interchange(self) -> Tensor:
        """``[batch]`` bool: rows in which an edge of the algorithm is patched."""
        return torch.stack(list(self.inside.values())).any(0)


@dataclass(frozen=True, eq=False)
class Losses:
    """The three losses, scalars; in place of the first, the probes' in :func:`circuit_losses`."""

    behaviour: Tensor
    interchange: Tensor
    strictness: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum: all in nats, all alike."""
        return self.behaviour + self.interchange + self.strictness


def draw_plan(alignment: Alignment, rng: Random, n: int, *, alone: bool = False) -> Plan:
    """Draw what is patched in ``n`` rows: interchange in the first half, strictness in the second.

    An interchange takes one aligned node (all edges that leave it) or one edge of the algorithm,
    and in two of three rows edges outside besides, which must not make a difference.

    Parameters
    ----------
    alignment
        What the circuit is.
    rng
        The only source of randomness.
    n
        Rows.
    alone
        Patch every edge outside in every row, so that only the circuit is left.
    """
    n_edges = alignment.graph.n_edges
    patched = torch.zeros(n, n_edges, dtype=torch.bool)
    inside = {edge: torch.zeros(n, dtype=torch.bool) for edge in alignment.edges}
    for row in range(n):
        if row < n // 2:
            for edge in _interchanged(alignment, rng):
                inside[edge][row] = True
        if alone:
            patched[row] = alignment.outside
        elif row >= n // 2 or rng.random() < 2 / 3:
            patched[row] = _outside(alignment, rng)
    for edge, rows in inside.items():
        patched |= rows[:, None] & alignment.edges[edge]
    for variable in alignment.algorithm.inner:  # a whole node: what leaves it elsewhere goes along
        leaving = torch.stack([inside[edge] for edge in alignment.edges if edge[0] == variable])
        patched |= leaving.all(0)[:, None] & alignment.leaving(alignment.node(variable))
    return Plan(inside, patched)


def _interchanged(alignment: Alignment, rng: Random) -> list[Edge]:
    """Draw the edges that leave one aligned node, or a single edge of the algorithm."""
    edges = list(alignment.edges)
    if rng.random() < 0.5:
        variable = rng.choice(alignment.algorithm.inner)
        return [edge for edge in edges if edge[0] == variable]
    return [rng.choice(edges)]


def _outside(alignment: Alignment, rng: Random) -> Tensor:
    """Draw edges outside the algorithm: all, all of one node, or a random share; ``[edge]``."""
    kind = rng.random()
    if kind < 0.4:
        return alignment.outside
    if kind < 0.6:
        return alignment.leaving(rng.choice(alignment.outside_nodes))
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    share = rng.random()
    return alignment.outside & (torch.rand(len(alignment.outside), generator=generator) < share)


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Return KL(target || softmax(logits)) of each row, in nats.

    Parameters
    ----------
    target
        ``[batch, d_vocab]`` log probabilities.
    logits
        ``[batch, d_vocab]``.
    """
    logprobs = torch.log_softmax(logits, -1)
    return (target.exp() * (target - logprobs)).sum(-1)


def losses(
    model: PatchableTransformer, alignment: Alignment, base: Prompts, source: Prompts, plan: Plan
) -> Losses:
    """Return the three losses of a batch of pairs.

    Parameters
    ----------
    model, alignment
        The transformer, and what is to be where in it.
    base, source
        Prompts of the same layouts, row by row.
    plan
        What is patched in each row.
    """
    d_vocab = model.config.d_vocab
    n = len(base.tokens)
    both = model(torch.cat([base.tokens, source.tokens]), torch.cat([base.last, source.last]))
    names = torch.cat([base.names, source.names])
    behaviour = divergence(answers(alignment.algorithm, names, d_vocab), both.logits)
    patched = model(base.tokens, base.last, both.rows(slice(n, None)), plan.patched)
    return Losses(behaviour.mean(), *_patched_losses(model, alignment, base, source, plan, patched))


class Probes(nn.Module):
    """A linear map per variable that reads its value off the node that is to implement it.

    While the circuit is trained alone, the cross-entropy of what the probes read is a fourth
    loss: a role far from the logits has hardly a gradient before the roles behind it work, so
    that the three losses take very long to begin to fall.  The probes are thrown away after that
    phase; nothing of them is in the model, and the phase that follows has no such loss.
    """

    def __init__(self, alignment: Alignment, d_model: int, d_vocab: int) -> None:
        super().__init__()
        self.alignment = alignment
        variables = alignment.algorithm.inner[:-1]  # the last is read by the logits
        self.maps = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(d_model, d_vocab + 1)) for name in variables}
        )

    def forward(self, run: Run, prompts: Prompts, values: Mapping[str, Tensor]) -> Tensor:
        """Return the mean cross-entropy in nats, over positions and variables.

        Parameters
        ----------
        run
            Of which every aligned node was computed.
        prompts
            Where the slots are.
        values
            Variable -> ``[batch]`` or ``[batch, n]``; NONE is a class of its own.
        """
        found = []
        for name, weight in self.maps.items():
            slots = self.alignment.algorithm.variables[name].slots
            places = prompts.last[:, None] if slots is None else prompts.places[:, list(slots)]
            rows = torch.arange(len(places))[:, None]
            written = run.sender(self.alignment.nodes[name])[rows, places]  # (batch, n, d_model)
            logits = (nn.functional.layer_norm(written, written.shape[-1:]) @ weight).flatten(0, 1)
            found.append(nn.functional.cross_entropy(logits, values[name].flatten() - NONE))
        return torch.stack(found).mean()


def circuit_losses(
    model: PatchableTransformer,
    alignment: Alignment,
    base: Prompts,
    source: Prompts,
    plan: Plan,
    probes: Probes | None = None,
) -> Losses:
    """Return the losses of the circuit alone, for a plan that patches all outside of it.

    Nodes outside are not run on the base prompts, and no gradient goes through the source, so
    that a step costs a fraction of one of :func:`losses`.  The behaviour loss is 0, since with
    nothing patched nodes outside would take part; with probes it is theirs.
    """
    with torch.no_grad():
        other = model(source.tokens, source.last)
    computed = frozenset(alignment.nodes.values())
    patched = model(base.tokens, base.last, other, plan.patched, computed)
    probed = torch.zeros(())
    if probes is not None:
        d_vocab = model.config.d_vocab
        values = alignment.algorithm.run(base.names, d_vocab, source.names, plan.inside)
        probed = probes(patched, base, values)
    return Losses(probed, *_patched_losses(model, alignment, base, source, plan, patched))


def _patched_losses(
    model: PatchableTransformer,
    alignment: Alignment,
    base: Prompts,
    source: Prompts,
    plan: Plan,
    patched: Run,
) -> tuple[Tensor, Tensor]:
    d_vocab = model.config.d_vocab
    target = answers(alignment.algorithm, base.names, d_vocab, source.names, plan.inside)
    each = divergence(target, patched.logits)
    interchange = plan.interchange
    return _mean(each[interchange]), _mean(each[~interchange])


def answers(
    algorithm: Algorithm,
    names: Tensor,
    d_vocab: int,
    source: Tensor | None = None,
    patched: Mapping[Edge, Tensor] | None = None,
) -> Tensor:
    """Return the algorithm's log probabilities ``[batch, d_vocab]``, in float32."""
    return algorithm.run(names, d_vocab, source, patched)[LOGITS].float()


def _mean(values: Tensor) -> Tensor:
    """Return the mean, 0 of nothing."""
    return values.sum() / max(len(values), 1)
