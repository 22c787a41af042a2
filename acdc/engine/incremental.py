"""Incremental evaluation: what the metric becomes when edges of one receiver are ablated.

The state of a batch is the current output of every node and the current input of every
receiver.  A *scenario* is a set of edges of one receiver that are ablated on top of that;
many scenarios are evaluated on one extra axis, recomputing only what a
:class:`graphs.plan.Plan` lists, and one of them may then be committed as the new state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.experiment import Batch, Experiment
from acdc.engine.inputs import Changes, Input, Output, Sums, index_of, insert
from acdc.engine.moved import Moved, Read
from acdc.lowering.attention import KINDS, Kind
from graphs.plan import Plan, Planner, Step

_SPEED = {"cpu": (3e-4, 1e11, 1e10), "gpu": (3e-4, 2e13, 2e12)}
"""Order of magnitude of seconds per node, operations and bytes per second."""

__all__ = ["BatchState", "IncrementalRun", "Outcome", "Work"]


@dataclass
class Work:
    """What an engine did, for run.json and the benchmarks.

    Attributes
    ----------
    n_decisions
        Edges decided by an evaluation.
    n_dead
        Edges that cannot matter: no evaluation.
    n_evaluations, n_wasted
        Scenarios evaluated, and those of them after a wrong guess.
    n_nodes, n_node_positions
        Nodes recomputed in all evaluations, and positions of nodes.
    n_reviewed, n_overruled
        Decisions too near a threshold for the dtype that were made again in float32, and
        those of them that came out differently.
    """

    n_decisions: int = 0
    n_dead: int = 0
    n_evaluations: int = 0
    n_wasted: int = 0
    n_nodes: int = 0
    n_node_positions: int = 0
    n_reviewed: int = 0
    n_overruled: int = 0


@dataclass(eq=False)
class Outcome:
    """All that an evaluation computed, so that one scenario can be committed.

    Attributes
    ----------
    edges
        ``[edge]``: the edges under test.
    scenarios
        ``[scenario, edge]``: which of them a scenario ablates.
    values
        ``[scenario]``: metric summed over the rows of the batch.
    inputs, outputs
        New values by receiver and by node.
    projected
        New placed projections by receiver and kind; heads of a group share them.
    """

    edges: NDArray[np.int64]
    scenarios: NDArray[np.bool_]
    values: Tensor
    inputs: dict[int, Input] = field(default_factory=dict)
    outputs: dict[int, Output] = field(default_factory=dict)
    projected: dict[tuple[int, str], Tensor] = field(default_factory=dict)


class BatchState:
    """Current values of all nodes on one batch.

    Parameters
    ----------
    experiment
        Model, metric, intervention and direction.
    batch
        Prompts of one length.
    """

    def __init__(self, experiment: Experiment, batch: Batch) -> None:
        self.experiment, self.batch = experiment, batch
        self.model, self.graph = experiment.model, experiment.graph
        self.components = self.graph.components
        base_tokens, other_tokens = experiment.runs(batch)
        trace = self.model.forward(base_tokens)
        out = self.model.senders(trace)  # (sender, batch, pos, d_model)
        carried = experiment.ablated(self.model.forward(other_tokens), trace)
        ablation = self.model.senders(carried).sub_(out)
        self.touched = ablation.ne(0).any(3).any(1).cpu().numpy()  # (sender, pos)
        kind = Sums if experiment.intervention == "zero" else Changes
        self.inputs = kind(experiment, batch, trace, out, ablation)
        self.n_pos = batch.clean.shape[1]
        self.scored = tuple(batch.scored.tolist())
        self._place_heads(trace.q, trace.k, trace.v)
        causal = all(layer.attention.causal for layer in self.model.layers)
        n_heads = len(self.model.layers) * self.model.shape.n_heads
        self.moved = Moved(dict.fromkeys(KINDS, n_heads), self.n_pos)  # projections of heads
        self.planner = Planner(
            self.graph, self.n_pos, self.scored, causal=causal, spans=batch.spans
        )
        self.nodes = self.inputs.nodes
        self.ports: dict[Kind, dict[int, int]] = {
            kind: {
                int(node): v
                for v, port in enumerate(self.components.port)
                for node in self.components.fed_by(v)
                if kind in port
            }
            for kind in KINDS
        }
        self._metric: float | None = None
        self.masks = [a.attention.mask(self.n_pos, out.device) for a in self.model.layers]

    def _place_heads(self, q: list[Tensor], k: list[Tensor], v: list[Tensor]) -> None:
        """Placed projections of every head, ``[layer][kind]: (head, batch, pos, d_head)``."""
        every = slice(0, self.n_pos)
        self.placed: list[dict[str, Tensor]] = []
        for layer, block in enumerate(self.model.layers):
            by_kind: dict[Kind, Tensor] = {"q": q[layer], "k": k[layer], "v": v[layer]}
            self.placed.append(
                {
                    kind: block.attention.place(kind, x, every).transpose(0, 1).contiguous()
                    for kind, x in by_kind.items()
                }
            )

    # -- planning ---------------------------------------------------------------------------

    def plan(self, edges: NDArray[np.int64]) -> Plan:
        """Plan the evaluation of changes along edges of one receiver."""
        receiver = int(self.graph.edge_receiver[edges[0]])
        touched = np.logical_or.reduce(self.touched[self._senders(edges)])
        return self.planner.plan(receiver, touched)

    def can_change(self, edges: NDArray[np.int64]) -> NDArray[np.bool_]:
        """``[edge]``: whether ablating the edge alone can change the metric at all."""
        live = self.planner.live(int(self.graph.edge_receiver[edges[0]]))
        return np.logical_and(self.touched[self._senders(edges)], live).any(axis=1)

    def _senders(self, edges: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[edge]``: senders, whatever their span."""
        return self.graph.sender_component[self.graph.edge_sender[edges]]

    def cost(self, plan: Plan) -> tuple[float, float]:
        """Seconds that a batch of scenarios takes, roughly: once, and for each scenario.

        An estimate from counts, not from a clock, so that runs repeat exactly.
        """
        shape, d = self.model.shape, self.model.d_model
        flops, weights = 0.0, 0.0
        for step in plan.steps:
            kind, _, _ = self.nodes[step.unit]
            if kind == "logits":
                size = d * (self.model.d_vocab_out if self.experiment.metric.whole_vocab else 8)
            elif kind == "mlp":
                size = 8 * d * d
            else:
                size = 4 * d * d // shape.n_heads
            flops += 2.0 * size * len(step.positions) * self.batch.n_prompts
            weights += 4.0 * size
        once, rate, bandwidth = _SPEED["cpu" if self.inputs.out.device.type == "cpu" else "gpu"]
        return once * (4 + len(plan.steps)) + weights / bandwidth, flops / rate

    def bytes_per_scenario(self, plan: Plan) -> int:
        """Memory that one scenario of a plan takes, roughly."""
        d = self.model.d_model
        cells = 3 * plan.n_positions * d + sum(len(f.positions) for f in plan.flows.values()) * d
        rows = self.batch.n_rows * (
            self.model.d_vocab_out if self.experiment.metric.whole_vocab else 8
        )
        return self.inputs.out.element_size() * (self.batch.n_prompts * cells + 3 * rows)

    # -- evaluation -------------------------------------------------------------------------

    def evaluate(
        self, edges: NDArray[np.int64], scenarios: NDArray[np.bool_], plan: Plan
    ) -> Outcome:
        """Metric of every scenario.

        Parameters
        ----------
        edges
            ``[edge]``: edges of one receiver.
        scenarios
            ``[scenario, edge]``: which of them a scenario ablates.
        plan
            From :meth:`plan` for these edges.
        """
        device = self.inputs.out.device
        outcome = Outcome(edges, scenarios, torch.zeros(len(scenarios), device=device))
        tested = int(self.graph.receiver_component[self.graph.edge_receiver[edges[0]]])
        outcome.inputs[tested] = self.inputs.ablate(
            plan.flows[tested],
            self._senders(edges),
            torch.as_tensor(scenarios, device=device),
        )
        for step in plan.steps:
            for v in step.receivers:
                if v not in outcome.inputs:
                    outcome.inputs[v] = self.inputs.gather(plan.flows[v], outcome.outputs)
            kind, layer, head = self.nodes[step.unit]
            if kind == "logits":
                outcome.values = self._score(outcome.inputs[step.receivers[0]])
            elif kind == "mlp":
                outcome.outputs[step.unit] = self._mlp(layer, step, outcome)
            else:
                outcome.outputs[step.unit] = self._head(layer, head, step, outcome)
        return outcome

    def metric(self) -> float:
        """Metric of the current circuit, summed over the rows of the batch."""
        if self._metric is None:
            self._metric = self._measure()
        return self._metric

    def _measure(self) -> float:
        final = self.inputs.current(self.components.receiver_index["logits"])
        rows = final[:, self.batch.scored].flatten(0, 1)
        return float(self.experiment.measure(rows, self.batch))

    def _score(self, new: Input) -> Tensor:
        current = self.inputs.current(new.flow.receiver)[:, self.batch.scored]
        rows = insert(current, new.read, new.flow.positions, self.scored)
        return self.experiment.measure(rows.flatten(1, 2), self.batch)

    def _mlp(self, layer: int, step: Step, outcome: Outcome) -> Output:
        mlp = self.model.layers[layer].mlp
        assert mlp is not None
        new = mlp(outcome.inputs[step.receivers[0]].read)
        return Output(step, self.inputs.store(step.unit, step.positions, new), {})

    def _head(self, layer: int, head: int, step: Step, outcome: Outcome) -> Output:
        attention = self.model.layers[layer].attention
        n_keys = step.positions[-1] + 1 if attention.causal else self.n_pos
        placed: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for kind, receiver in self._ports_of(step.unit):
            current = self._current_placed(layer, kind, head)
            wanted = step.positions if kind == "q" else tuple(range(n_keys))
            values[kind] = current[:, index_of(wanted)]
            if receiver in step.receivers:
                new = outcome.inputs[receiver]
                placed[kind] = self._project(outcome, layer, kind, head, new)
                values[kind] = insert(values[kind], placed[kind], new.flow.positions, wanted)
        mask = self.masks[layer]
        mask = None if mask is None else mask[index_of(step.positions), :n_keys]
        z = attention.attend(values["q"], values["k"], values["v"], mask)
        new_out = z @ attention.W_O[head]
        return Output(step, self.inputs.store(step.unit, step.positions, new_out), placed)

    def _project(self, outcome: Outcome, layer: int, kind: Kind, head: int, new: Input) -> Tensor:
        """New placed projection of one receiver, ``[scenario, batch, position, d_head]``."""
        key = (new.flow.receiver, kind)
        if key not in outcome.projected:
            block = self.model.layers[layer]
            h = self._head_of(layer, kind, head)
            projection = block.attention.project_head(kind, h, block.ln1(new.read))
            at = index_of(new.flow.positions)
            outcome.projected[key] = block.attention.place(kind, projection, at)
        return outcome.projected[key]

    def _current_placed(self, layer: int, kind: Kind, head: int) -> Tensor:
        """Current placed projection that a head uses, ``[batch, pos, d_head]``."""
        return self.placed[layer][kind][self._head_of(layer, kind, head)]

    def _head_of(self, layer: int, kind: Kind, head: int) -> int:
        """Whose projection a head uses: its own query, keys and values of its group."""
        return head if kind == "q" else head // self.model.layers[layer].attention.group

    def _ports_of(self, node: int) -> list[tuple[Kind, int]]:
        """Receivers of a head, by what it reads them for."""
        return [(kind, self.ports[kind][node]) for kind in KINDS]

    # -- committing -------------------------------------------------------------------------

    def commit(self, outcome: Outcome, scenario: int) -> None:
        """Make one scenario the current state."""
        self._metric = None
        self.inputs.commit(outcome.inputs, outcome.outputs, scenario)
        if isinstance(self.inputs, Sums):
            ablated = outcome.edges[outcome.scenarios[scenario]]
            receiver = int(self.graph.edge_receiver[outcome.edges[0]])
            self.inputs.drop(
                int(self.graph.receiver_span[receiver]),
                int(self.graph.receiver_component[receiver]),
                self._senders(ablated),
            )
        for node, output in outcome.outputs.items():
            if not output.placed:
                continue
            _, layer, head = self.nodes[node]
            for kind, receiver in self._ports_of(node):
                if kind in output.placed:
                    at = outcome.inputs[receiver].flow.positions
                    row = layer * self.model.shape.n_heads + self._head_of(layer, kind, head)
                    self.moved.note(kind, row, at)
                    self._own(kind, row)[:, index_of(at)] = output.placed[kind][scenario]

    def _own(self, kind: str, row: int) -> Tensor:
        """Placed projection of the head that is ``row`` over all layers, to be written to."""
        layer, head = divmod(row, self.model.shape.n_heads)
        return self.placed[layer][kind][head]

    def keep(self) -> Iterator[NDArray[np.generic]]:
        """Yield what :meth:`restore` needs, beside the edges that are finished."""
        yield from self.inputs.moved.take(self.inputs.own)
        yield from self.moved.take(self._own)

    def restore(self, read: Read) -> None:
        """Go on from what was kept: every value to the last bit."""
        self._metric = None
        self.inputs.moved.put(self.inputs.own, read)
        self.moved.put(self._own, read)

    def finish(self, receiver: int, kept_edges: NDArray[np.int64]) -> None:
        """Record which edges of a receiver stay, also of those that nothing was evaluated for."""
        self.planner.finish(receiver, kept_edges)
        if isinstance(self.inputs, Sums):
            self.inputs.keep(
                int(self.graph.receiver_span[receiver]),
                int(self.graph.receiver_component[receiver]),
                self._senders(kept_edges),
            )


class IncrementalRun:
    """The current circuit on all prompts, and what ablating edges of a receiver would do.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    memory
        Bytes that one evaluation's scenarios may take.
    """

    def __init__(self, experiment: Experiment, memory: int = 1 << 30) -> None:
        self.experiment, self.graph, self.memory = experiment, experiment.graph, memory
        with torch.no_grad():
            self.states = [BatchState(experiment, batch) for batch in experiment.batches]
        self.work = Work()

    def can_change(self, edges: NDArray[np.int64]) -> NDArray[np.bool_]:
        """``[edge]``: False where ablating the edge changes the metric by exactly zero."""
        return np.any([state.can_change(edges) for state in self.states], axis=0)

    def finish(self, receiver: int, kept_edges: NDArray[np.int64]) -> None:
        """Record which edges of a receiver stay; see :meth:`graphs.plan.Planner.finish`."""
        for state in self.states:
            state.finish(receiver, kept_edges)

    @torch.no_grad()
    def keep(self) -> Iterator[NDArray[np.generic]]:
        """Yield what :meth:`restore` needs, beside the edges that are finished."""
        for state in self.states:
            yield from state.keep()

    @torch.no_grad()
    def restore(self, read: Read) -> None:
        """Go on from what was kept, once :meth:`finish` has been told of every edge then decided.

        Raises
        ------
        StateError
            If no search of this experiment can have kept it.
        """
        for state in self.states:
            state.restore(read)

    def capacity(self, edges: NDArray[np.int64]) -> int:
        """How many scenarios over these edges fit into the memory bound."""
        each = sum(state.bytes_per_scenario(state.plan(edges)) for state in self.states)
        return max(1, self.memory // max(each, 1))

    def overhead(self, edges: NDArray[np.int64]) -> float:
        """How many scenarios cost as much as starting a batch of them, roughly."""
        costs = [state.cost(state.plan(edges)) for state in self.states]
        once, each = (sum(c) for c in zip(*costs, strict=True))
        return once / each if each else 1.0

    @torch.no_grad()
    def evaluate(
        self, edges: NDArray[np.int64], scenarios: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], list[Outcome | None]]:
        """Mean metric of every scenario, and what is needed to commit one.

        Parameters
        ----------
        edges
            ``[edge]``: edges of one receiver.
        scenarios
            ``[scenario, edge]``: which of them a scenario ablates on top of the current state.
        """
        outcomes: list[Outcome | None] = []
        total = np.zeros(len(scenarios))
        for state in self.states:
            plan = state.plan(edges)
            if not plan.reaches_logits:
                outcomes.append(None)
                total += state.metric()
                continue
            outcome = state.evaluate(edges, scenarios, plan)
            outcomes.append(outcome)
            total += outcome.values.double().cpu().numpy()
            self.work.n_nodes += len(plan.steps) * len(scenarios)
            self.work.n_node_positions += plan.n_positions * len(scenarios)
        self.work.n_evaluations += len(scenarios)
        return total / self.experiment.n_rows, outcomes

    def commit(self, outcomes: Sequence[Outcome | None], scenario: int) -> None:
        """Make one evaluated scenario the current state."""
        for state, outcome in zip(self.states, outcomes, strict=True):
            if outcome is not None:
                state.commit(outcome, scenario)

    def fork(self) -> IncrementalRun:
        """Copy the state, sharing what never changes and the count of work."""
        shared: list[object] = [self.experiment, self.experiment.model, self.work]
        shared += [self.graph, self.graph.components]
        for state in self.states:
            shared += [state.batch, state.masks, state.nodes, state.touched, *state.inputs.fixed]
        return copy.deepcopy(self, {id(x): x for x in shared})

    @torch.no_grad()
    def metric(self) -> float:
        """Mean metric of the current circuit."""
        return sum(state.metric() for state in self.states) / self.experiment.n_rows
