"""Incremental evaluation: what the metric becomes when edges of one receiver are ablated.

The state of a batch is the current output of every node and the current input of every
receiver.  A *scenario* is a set of edges of one receiver that are ablated on top of that;
many scenarios are evaluated on one extra axis, recomputing only what a
:class:`graphs.plan.Plan` lists, and one of them may then be committed as the new state.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

from acdc.ablations.base import ZERO
from acdc.engine.allocator import give_back
from acdc.engine.batch import sum_of
from acdc.engine.experiment import Experiment
from acdc.engine.footprint import room_for_scenarios, streams
from acdc.engine.inputs import Changes, Input, Output, Places, Sums, Together, insert
from acdc.engine.moved import Read
from acdc.engine.start import Start
from acdc.engine.streamed import Arena, arena_for
from acdc.engine.units import News, Projections, Unit, units_of
from acdc.errors import OptionError
from graphs.plan import Plan, Planner, Step

_FEWEST = 4
"""Scenarios that are evaluated together at least, where there are as many."""
_MOST_TOGETHER = 256
"""And at most."""
_SCRATCH = 8
"""Which part of the memory for scenarios one batch takes, where not all are held of every batch."""
_SPEED = {"cpu": (2e-4, 1e11, 1e10), "gpu": (2e-4, 2e13, 2e12)}
"""Order of magnitude of seconds per node, operations and bytes per second."""

_MOVED = 128.0
"""Bytes that a number of the stream is moved by at each node: sums, norms, differences."""

ONE_CIRCUIT = (
    "sweep: searches of several circuits at once are not built for cross-layer transcoders; search "
    "with acdc at one threshold, or choose eap-ig"
)

__all__ = [
    "ONE_CIRCUIT",
    "BatchPlans",
    "BatchState",
    "IncrementalRun",
    "Outcome",
    "Outcomes",
    "Work",
]


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
        ``[scenario, edge]``: which of them a scenario ablates, or how much of it.
    values
        ``[scenario]``: metric summed over the rows of the batch.
    news
        New inputs, and what heads make of them.
    outputs
        New values by unit.
    parts
        Where there was no memory for the last two: of some scenarios that are next to each other
        what there was memory for.  If another one is committed it is computed again.
    """

    edges: Int[np.ndarray, " edge"]
    scenarios: Shaped[np.ndarray, "scenario edge"]
    values: Float[Tensor, " scenario"]
    news: News = field(default_factory=News)
    outputs: dict[int, Output] = field(default_factory=dict)
    parts: dict[range, Outcome] = field(default_factory=dict)

    def only(self, at: slice) -> Outcome:
        """Return a copy of what some of the scenarios make, so that the others can go."""

        def cut(x: Tensor) -> Tensor:
            return x[at].clone()

        outputs = {unit: output.map(cut) for unit, output in self.outputs.items()}
        news = self.news.map(cut)
        return Outcome(self.edges, self.scenarios[at], self.values[at], news, outputs)

    def made_by(self, scenario: int) -> tuple[Outcome, int] | None:
        """Return what has all that a scenario makes, and which it is of that; None: nothing has."""
        if self.news.inputs:
            return self, scenario
        found = ((part, own.index(scenario)) for own, part in self.parts.items() if scenario in own)
        return next(found, None)


Outcomes = dict[int, Outcome]
"""By index of the batch: of those of this process that the evaluation can change."""


class BatchPlans:
    """What an evaluation on one batch recomputes, and what that costs: known to every process.

    Parameters
    ----------
    experiment
        Model, metric, intervention and direction.
    i
        Which of its batches: prompts of one length.
    touched
        ``[sender, pos]``: where what an ablated edge carries differs at all.
    units
        What recomputes each unit with live norms; the same for all batches.
    """

    def __init__(
        self, experiment: Experiment, i: int, touched: NDArray[np.bool_], units: dict[int, Unit]
    ) -> None:
        self.experiment, self.batch, self.touched = experiment, experiment.batches[i], touched
        self.graph, self.units = experiment.graph, units
        self.model = experiment.model
        self.device = self.batch.clean.device
        self.n_pos = self.batch.clean.shape[1]
        self.scored = tuple(self.batch.scored.tolist())
        self.planner = Planner(
            self.graph,
            self.n_pos,
            self.scored,
            causal=all(layer.attention.causal for layer in self.model.layers),
            spans=self.batch.spans,
        )

    def plan(self, edges: Int[np.ndarray, " edge"]) -> Plan:
        """Plan the evaluation of changes along edges of one receiver."""
        receiver = int(self.graph.edge_receiver[edges[0]])
        touched = np.logical_or.reduce(self.touched[self._senders(edges)])
        return self.planner.plan(receiver, touched)

    def can_change(self, edges: Int[np.ndarray, " edge"]) -> Bool[np.ndarray, " edge"]:
        """``[edge]``: whether ablating the edge alone can change the metric at all."""
        live = self.planner.live(int(self.graph.edge_receiver[edges[0]]))
        found: NDArray[np.bool_] = np.logical_and(self.touched[self._senders(edges)], live)
        return np.any(found, axis=1)

    def _senders(self, edges: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[edge]``: senders, whatever their span."""
        return self.graph.sender_component[self.graph.edge_sender[edges]]

    def _place(self, receiver: int) -> tuple[int, int]:
        """Span of a receiver, and which it is whatever its span."""
        graph = self.graph
        return int(graph.receiver_span[receiver]), int(graph.receiver_component[receiver])

    def cost(self, plan: Plan) -> tuple[float, float]:
        """Seconds that a batch of scenarios takes, roughly: once, and for each scenario.

        An estimate from counts, not from a clock, so that runs repeat exactly.
        """
        flops, weights = 0.0, 0.0
        for step in plan.steps:
            if step.unit in self.units:
                size = self.units[step.unit].n_weights(step)
            else:  # logits
                size = self.model.d_model * self._n_logits
            flops += 2.0 * size * len(step.positions) * self.batch.n_prompts
            weights += 4.0 * size
        once, rate, bandwidth = _SPEED["cpu" if self.device.type == "cpu" else "gpu"]
        moved = _MOVED * plan.n_positions * self.batch.n_prompts * self.model.d_model
        return once * (2 + len(plan.steps)) + weights / bandwidth, flops / rate + moved / bandwidth

    @property
    def _n_logits(self) -> int:
        """Logits that a scored row needs, roughly."""
        return self.model.d_vocab_out if self.experiment.metric.whole_vocab else 8

    def bytes_per_scenario(self, plan: Plan) -> int:
        """Memory that one scenario of a plan takes, roughly."""
        d = self.model.d_model
        cells = 3 * plan.n_positions * d + sum(len(f.positions) for f in plan.flows.values()) * d
        cells += sum(
            2 * self.units[step.unit].width * len(step.positions) for step in plan.steps[:-1]
        )
        rows = self.batch.n_rows * self._n_logits
        return self.model.W_U.element_size() * (self.batch.n_prompts * cells + 3 * rows)

    def finish(self, receiver: int, kept_edges: Int[np.ndarray, " kept"]) -> None:
        """Record which edges of a receiver stay, also of those that nothing was evaluated for."""
        self.planner.finish(receiver, kept_edges)


class BatchState(BatchPlans):
    """Current values of all nodes on one batch.

    Parameters
    ----------
    experiment, i, units
        As of :class:`BatchPlans`.
    places
        Where values are kept; the same for all batches.
    """

    def __init__(
        self, experiment: Experiment, i: int, places: Places, units: dict[int, Unit]
    ) -> None:
        start = Start(experiment, i)
        self.inputs = (
            Sums(start, places, experiment, experiment.batches[i])
            if experiment.ablation.carries == ZERO
            else Changes(start, places)
        )
        own = start.program is experiment.program
        units = units if own else units_of(start.program, experiment.components.unit)
        super().__init__(experiment, i, self.inputs.ablation.somewhere(), units)
        self.model = start.program.model
        masks = [layer.attention.mask(self.n_pos, self.device) for layer in self.model.layers]
        self.now = Projections(start.placed, start.z, masks, self.n_pos)
        self._logits = len(experiment.components.receivers) - 1
        self._metric: float | None = None
        self.arenas: tuple[Arena, Arena] | None = None

    def stream(self) -> None:
        """Let what never changes, and what does, lie where it takes no memory between turns."""
        fixed, own = self.inputs.n_bytes
        own += self.now.n_bytes
        self.arenas = arena_for(self.device, fixed), arena_for(self.device, own)
        self.inputs.move(*self.arenas)
        self.now.move(self.arenas[1])
        with self.turn():
            pass

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Have the values in memory while a block runs."""
        if self.arenas is None:
            yield
            return
        with self.arenas[0].turn(), self.arenas[1].turn():
            yield

    def evaluate(
        self,
        edges: Int[np.ndarray, " edge"],
        scenarios: Shaped[np.ndarray, "scenario edge"],
        plan: Plan,
    ) -> Outcome:
        """Metric of every scenario.

        Parameters
        ----------
        edges
            ``[edge]``: edges of one receiver.
        scenarios
            ``[scenario, edge]``: which of them a scenario ablates, or how much of it (doses).
        plan
            From :meth:`plan` for these edges.
        """
        outcome = Outcome(edges, scenarios, torch.zeros(len(scenarios), device=self.device))
        _, tested = self._place(int(self.graph.edge_receiver[edges[0]]))
        outcome.news.inputs[tested] = self.inputs.ablate(
            plan.flows[tested],
            self._senders(edges),
            torch.as_tensor(scenarios, device=self.device),
        )
        for unit, steps in itertools.groupby(plan.steps, lambda step: self.units.get(step.unit)):
            self._recompute(unit, list(steps), plan, outcome)
        return outcome

    def _recompute(
        self, unit: Unit | None, steps: Sequence[Step], plan: Plan, outcome: Outcome
    ) -> None:
        """Compute units of a stage, none of which reads another; None: the logits."""
        news, outputs = outcome.news, outcome.outputs
        receivers = list(dict.fromkeys(v for step in steps for v in step.receivers))
        tested = [news.inputs[v] for v in receivers if v in news.inputs]
        flows = [plan.flows[v] for v in receivers if v not in news.inputs]
        inputs, together = self.inputs.gather(flows, outputs, len(outcome.scenarios))
        news.inputs |= inputs
        if unit is None:
            outcome.values = self._score(news.inputs[self._logits])
            return
        unit.project([*together, *map(Together.alone, tested)], news)
        for output in unit.run(steps, self.inputs, news, self.now):
            outputs[output.step.unit] = output

    def metric(self) -> float:
        """Metric of the current circuit, summed over the rows of the batch."""
        if self._metric is None:
            rows = self.inputs.current(self._logits)[:, self.batch.scored].flatten(0, 1)
            self._metric = float(self.experiment.measure(rows, self.batch, self.model))
        return self._metric

    def _score(self, new: Input) -> Tensor:
        current = self.inputs.current(self._logits)[:, self.batch.scored]
        rows = insert(current, new.read, new.flow.positions, self.scored)
        return self.experiment.measure(rows.flatten(1, 2), self.batch, self.model)

    def commit(self, outcome: Outcome, scenario: int) -> None:
        """Make one scenario the current state."""
        found = outcome.made_by(scenario)
        if found is None:
            edges, n = outcome.edges, len(outcome.scenarios)
            some = next(part for part in _parts(n, _FEWEST) if part.stop > scenario)
            again = self.evaluate(edges, outcome.scenarios[some], self.plan(edges))
            found = again, scenario - some.start
        self._metric = None
        made, i = found
        self.inputs.commit(made.news.inputs, made.outputs, i)
        self.now.commit(made.news, i)
        if isinstance(self.inputs, Sums):
            ablated = outcome.edges[outcome.scenarios[scenario]]
            place = self._place(int(self.graph.edge_receiver[outcome.edges[0]]))
            self.inputs.drop(*place, self._senders(ablated))

    def keep(self) -> Iterator[NDArray[np.generic]]:
        """Yield what :meth:`restore` needs, beside the edges that are finished."""
        yield from self.inputs.moved.take(self.inputs.own)
        yield from self.now.moved.take(self.now.own)

    def restore(self, read: Read) -> None:
        """Go on from what was kept: every value to the last bit."""
        self._metric = None
        self.inputs.moved.put(self.inputs.own, read)
        self.now.moved.put(self.now.own, read)

    def evaluate_in_parts(
        self,
        edges: Int[np.ndarray, " edge"],
        scenarios: Shaped[np.ndarray, "scenario edge"],
        plan: Plan,
        most: int,
        held: range,
    ) -> Outcome:
        """As :meth:`evaluate`, about so many scenarios at a time; what some make is held."""
        values, parts = list[Tensor](), dict[range, Outcome]()
        for some in _parts(len(scenarios), most):
            found = self.evaluate(edges, scenarios[some], plan)
            values.append(found.values)
            own = range(max(some.start, held.start), min(some.stop, held.stop))
            if own:
                at = slice(own.start - some.start, own.stop - some.start)
                parts[own] = found.only(at)
            del found  # before the next ones are evaluated
        return Outcome(edges, scenarios, torch.cat(values), parts=parts)

    def finish(self, receiver: int, kept_edges: Int[np.ndarray, " kept"]) -> None:
        """As :meth:`BatchPlans.finish`."""
        super().finish(receiver, kept_edges)
        if isinstance(self.inputs, Sums):
            self.inputs.keep(*self._place(receiver), self._senders(kept_edges))


def _parts(n: int, most: int) -> list[slice]:
    """Cut scenarios into parts of at most so many, but of :data:`_FEWEST` at least.

    Products with fewer rows are computed otherwise, and differ in the last bit.
    """
    size = max(_FEWEST, most)
    starts = [*range(0, max(1, n - _FEWEST + 1), size), n]
    return [slice(low, high) for low, high in itertools.pairwise(starts)]


def _held(each: Sequence[int], memory: int, n: int, likely: int) -> list[range]:
    """Return which scenarios are held of each batch: the likely one, and those before it.

    Guesses that are wrong come before the end, and then one of those is committed.

    Parameters
    ----------
    each
        Bytes of a scenario, by batch.
    memory
        For those of all batches: if it does not hold one of each, it is for the first batches.
    n, likely
        How many there are, and which of them is most likely committed.
    """
    k = min(n, memory // max(1, sum(each)))
    if k:
        start = max(0, likely + 1 - k)
        return [range(start, start + k)] * len(each)
    fits = np.cumsum(each) <= memory
    return [range(likely, likely + 1) if fit else range(0) for fit in fits]


class IncrementalRun:
    """The current circuit on all prompts, and what ablating edges of a receiver would do.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    memory
        Bytes that the state and one evaluation's scenarios may take: the state a half at most (a
        larger one is streamed), scenarios half of what it leaves.

    Attributes
    ----------
    states
        By index of the batch: the state of those that this process has
        (:mod:`acdc.engine.processes`).
    batches
        Of every batch what it takes to plan: what is evaluated together follows from all of them.
    """

    def __init__(self, experiment: Experiment, memory: int = 1 << 30) -> None:
        if experiment.crosses_layers:
            raise OptionError(ONE_CIRCUIT)
        self.experiment, self.graph, self.memory = experiment, experiment.graph, memory
        places = Places(experiment.program)
        units = units_of(experiment.program, experiment.components.unit)
        self.states: dict[int, BatchState] = {}
        model = experiment.model
        kept_beside = model.offloads and model.device.type != "cpu"
        is_streamed = kept_beside or streams(experiment.state_bytes, memory)
        pairs = zip(experiment.state_bytes_by_batch, experiment.moved_bytes_by_batch, strict=True)
        each = list(map(sum, pairs))
        self._room = room_for_scenarios(memory, max(each) if is_streamed else sum(each))

        def begin(i: int) -> Tensor:
            state = self.states[i] = BatchState(experiment, i, places, units)
            if is_streamed:
                state.stream()
                give_back()  # a batch's holes are not left beside the next one's
            return torch.from_numpy(state.touched)

        with torch.no_grad():
            touched = experiment.by_batch(begin)
        self.batches = [
            self.states.get(i) or BatchPlans(experiment, i, where.bool().numpy(), units)
            for i, where in enumerate(touched)
        ]
        self.work = Work()

    def can_change(self, edges: Int[np.ndarray, " edge"]) -> Bool[np.ndarray, " edge"]:
        """``[edge]``: False where ablating the edge changes the metric by exactly zero."""
        return np.any([batch.can_change(edges) for batch in self.batches], axis=0)

    def finish(self, receiver: int, kept_edges: Int[np.ndarray, " kept"]) -> None:
        """Record which edges of a receiver stay; see :meth:`graphs.plan.Planner.finish`."""
        for batch in self.batches:
            batch.finish(receiver, kept_edges)

    @torch.no_grad()
    def keep(self) -> Iterator[NDArray[np.generic]]:
        """Yield what :meth:`restore` needs, beside the edges that are finished."""
        for state in self.states.values():
            with state.turn():
                yield from state.keep()

    @torch.no_grad()
    def restore(self, read: Read) -> None:
        """Go on from what was kept, once :meth:`finish` has been told of every edge then decided.

        Raises
        ------
        StateError
            If no search of this experiment can have kept it.
        """
        for state in self.states.values():
            with state.turn():
                state.restore(read)

    def capacity(self, edges: Int[np.ndarray, " edge"]) -> int:
        """How many scenarios over these edges are worth evaluating together, whatever the memory.

        What is evaluated together has a say in the last bit: with less memory that alone changes.
        """
        return _MOST_TOGETHER

    def overhead(self, edges: Int[np.ndarray, " edge"]) -> float:
        """How many scenarios cost as much as starting a batch of them, roughly."""
        costs = [batch.cost(batch.plan(edges)) for batch in self.batches]
        once, each = (sum(c) for c in zip(*costs, strict=True))
        return once / each if each else 1.0

    @torch.no_grad()
    def evaluate(
        self,
        edges: Int[np.ndarray, " edge"],
        scenarios: Shaped[np.ndarray, "scenario edge"],
        likely: int = 0,
    ) -> tuple[Float[np.ndarray, " scenario"], Outcomes]:
        """Mean metric of every scenario, and what is needed to commit one.

        Parameters
        ----------
        edges
            ``[edge]``: edges of one receiver.
        scenarios
            ``[scenario, edge]``: which of them a scenario ablates on top of the current state;
            of a scenario that is not committed also a coefficient, how much of it.
        likely
            The one that is most likely committed: where there is no memory for what all of them
            make, it is there for that of this one before those of others.
        """
        outcomes: Outcomes = {}
        each = [batch.bytes_per_scenario(batch.plan(edges)) for batch in self.batches]
        fits = sum(each) * len(scenarios) <= self._room
        own = self._room // _SCRATCH
        held = _held(each, self._room - own, len(scenarios), likely)

        def values(i: int) -> Tensor:
            state = self.states[i]
            plan = state.plan(edges)
            with state.turn():
                if not plan.reaches_logits:
                    return torch.tensor([state.metric()], dtype=torch.double).expand(len(scenarios))
                if fits:
                    outcomes[i] = state.evaluate(edges, scenarios, plan)
                else:
                    most = own // max(1, each[i])
                    outcomes[i] = state.evaluate_in_parts(edges, scenarios, plan, most, held[i])
            return outcomes[i].values

        found = self.experiment.by_batch(values, about=[edges.tobytes(), scenarios.tobytes()])
        if not fits:  # what some scenarios made is held, and holes between that
            give_back()
        for batch in self.batches:
            plan = batch.plan(edges)
            if plan.reaches_logits:
                self.work.n_nodes += len(plan.steps) * len(scenarios)
                self.work.n_node_positions += plan.n_positions * len(scenarios)
        self.work.n_evaluations += len(scenarios)
        return sum_of(found).numpy() / self.experiment.n_rows, outcomes

    def commit(self, outcomes: Outcomes, scenario: int) -> None:
        """Make one evaluated scenario the current state."""
        for i, outcome in outcomes.items():
            with torch.no_grad(), self.states[i].turn():
                self.states[i].commit(outcome, scenario)

    def fork(self) -> IncrementalRun:
        """Copy the state, sharing what never changes and the count of work."""
        shared: list[object] = [self.experiment, self.experiment.model, self.work]
        shared += [self.graph, self.graph.components]
        for batch in self.batches:
            shared += [batch.batch, batch.units, batch.model, batch.touched]
        for state in self.states.values():
            shared += [state.now.masks, *state.inputs.fixed]
        memo: dict[int, object] = {id(x): x for x in shared}
        for state in self.states.values():
            if state.arenas is not None:
                fixed, own = state.arenas
                memo[id(fixed)] = fixed
                memo[id(own)], tensors = own.copied()
                memo |= tensors
        return copy.deepcopy(self, memo)

    def afresh(self) -> IncrementalRun:
        """Copy the state as :meth:`fork`, for a search that counts its work for itself."""
        twin = self.fork()
        twin.work = Work()
        return twin

    @torch.no_grad()
    def metric(self) -> float:
        """Mean metric of the current circuit."""

        def value(i: int) -> Tensor:
            with self.states[i].turn():
                return torch.tensor(self.states[i].metric(), dtype=torch.double)

        return float(sum_of(self.experiment.by_batch(value))) / self.experiment.n_rows
