"""Which edges of a circuit act together: pairs that meet at a node, tested for gates.

A circuit says which edges matter, not how they combine.  A node that computes an AND of two senders
needs both, one that computes an OR either (:mod:`acdc.evidence.directions`); that two searches
differ at it is a hint, and this is the test.  The metric is measured with either edge of a pair
ablated, with both and with none, in the clean run with all else clean (noising) and in the corrupt
run with all else corrupt (denoising), on every prompt: :mod:`acdc.measure.gates` says what follows.

Where an ablated edge carries the clean run's value in denoising (``resample``, means over the other
run's prompts), an edge is *there* if it is ablated, so that both directions ask what the clean
values do together.  Zeros, trained constants and means over other prompts have no clean side: under
these an edge is there if it is intact, in either direction (:attr:`Interactions.axis`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from acdc.ablations import OTHER_RUN
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import Metric
from acdc.errors import CircuitFileError, OptionError
from acdc.evidence.directions import Candidate, candidates_of
from acdc.measure.ability import ability
from acdc.measure.evaluation import Evaluator
from acdc.measure.gates import Gate, check_prompts, check_resamples, combined, name_gates
from acdc.runs.building import with_constants
from acdc.runs.discover import fit
from acdc.runs.folder import Timer, save_summary, versions
from acdc.runs.opened import Opened, RunLike, open_run
from acdc.runs.reporter import Reporter, Silent
from acdc.runs.unseen import PromptChoice
from acdc.settings import MOST_RESAMPLES, Direction, Settings, check_count
from acdc.terminal.shown import Shown
from graphs import Circuit, Graph
from graphs.known.compare import compare, differing_shapes
from graphs.text import short

__all__ = ["Interactions", "Pair", "Tested", "interactions"]

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
_MOST_PAIRS = 200
CLEAN, INTACT = "clean", "intact"


@dataclass(frozen=True)
class Pair:
    """Two edges, and how they act together.

    Parameters
    ----------
    a, b
        Their names.
    node
        That both enter; empty for edges that were named.
    noising, denoising
        What was found in either direction.
    """

    a: str
    b: str
    node: str
    noising: Gate
    denoising: Gate

    @property
    def kind(self) -> str:
        """See :func:`acdc.measure.gates.combined`."""
        return combined((self.noising.kind, self.denoising.kind))

    @property
    def size(self) -> float:
        """The larger interaction of the two that were found significant; 0 if none was."""
        found = [abs(g.interaction) for g in (self.noising, self.denoising) if g.is_gate]
        return max(found, default=0.0)


@dataclass(frozen=True)
class Tested:
    """A candidate of two directions, and what its pairs were found to be.

    Parameters
    ----------
    gate, receiver
        What it may be, as :class:`acdc.evidence.directions.Candidate` has it.
    n_pairs
        Pairs of edges into it, one of them found by one direction alone.
    kinds
        Kind -> how many of those that were tested.
    """

    gate: str
    receiver: str
    n_pairs: int
    kinds: Mapping[str, int]

    @property
    def holds(self) -> bool | None:
        """Whether a pair is such a gate; None if none was tested."""
        return self.gate in self.kinds if self.kinds else None


@dataclass(frozen=True, eq=False)
class Interactions(Shown):
    """What was found of pairs of edges.

    Parameters
    ----------
    settings
        What was measured on.
    pairs
        Gates first, those of larger interactions first.
    n_left_out
        Pairs that meet at a node and were not tested, of lower scores.
    alpha
        Level of all tests together.
    n_prompts, task_info
        The prompts.
    timings
        Seconds by phase.
    candidates
        Of a run in both directions: what became of them.
    warnings
        What one should know before believing it: why no circuit can be claimed on these prompts
        (:attr:`acdc.measure.ability.Ability.doubts`), and a metric that is no sum of logits.
    axis
        What the values of a :class:`acdc.measure.gates.Gate` go by: an edge carries what it does
        in the clean run (``clean``), or is not ablated (``intact``).
    """

    settings: Settings
    pairs: tuple[Pair, ...]
    n_left_out: int
    alpha: float
    n_prompts: int
    task_info: dict[str, Any]
    timings: dict[str, float]
    candidates: tuple[Tested, ...] = ()
    warnings: tuple[str, ...] = ()
    axis: str = CLEAN

    @property
    def counts(self) -> dict[str, int]:
        """How many pairs are of each kind, those of none left out."""
        kinds = [pair.kind for pair in self.pairs]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    def summary(self) -> dict[str, Any]:
        """Content of ``interactions.json``."""
        return {
            "task": self.settings.task,
            "model": self.settings.model,
            "metric": self.settings.metric,
            "intervention": self.settings.intervention,
            "alpha": self.alpha,
            "axis": self.axis,
            "warnings": list(self.warnings),
            "n_prompts": self.n_prompts,
            "task_info": self.task_info,
            "n_tested": len(self.pairs),
            "n_left_out": self.n_left_out,
            "counts": self.counts,
            "candidates": [{**asdict(one), "holds": one.holds} for one in self.candidates],
            "pairs": [{"kind": pair.kind, **asdict(pair)} for pair in self.pairs],
            "timings": self.timings,
            "versions": versions(),
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write :meth:`summary` as ``interactions.json`` into a folder, or as a ``.json`` file.

        Raises OutputError if the file exists, unless ``overwrite``, or cannot be written.
        """
        return save_summary(path, "interactions.json", self.summary(), overwrite=overwrite)

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} {kind}" for kind, n in self.counts.items())
        return short(f"<Interactions of {len(self.pairs)} pairs on {self.settings.task}: {counts}>")


def interactions(
    run: RunLike,
    edges: Sequence[str] = (),
    *,
    task: Any = None,
    seen: bool = False,
    max_pairs: int = _MOST_PAIRS,
    alpha: float = 0.01,
    n_resamples: int = 1000,
    resample_seed: int = 0,
    memory: int = 1 << 30,
    reporter: Reporter | None = None,
    **asked: Any,
) -> Interactions:
    """Test which pairs of a circuit's edges act together, and name the gates.

    Parameters
    ----------
    run
        Folder of a run, or of both directions (``--direction both``: the edges of either), a
        circuit file, :class:`acdc.Run` or :class:`graphs.Circuit`.
    edges
        Names: all pairs of these are tested, in the circuit or not; none: pairs of the circuit's
        edges into one node, a head's query, key and value together.
    task
        As of :func:`acdc.discover`; None: the run's.  A circuit that comes alone needs one.
    seen
        Whether to measure on the prompts that discovery saw.
    max_pairs
        At most so many are tested: those whose lower absolute score is largest, of both directions
        first those of the candidates.
    alpha
        Chance of calling any pair a gate that is none, above 0 and below 1.
    n_resamples, resample_seed
        Of the bootstrap over prompts.
    memory
        Bytes that passes and evaluations may take, beside the weights.
    reporter
        Told of progress.
    **asked
        Fields of :class:`acdc.settings.Settings` that are to be other than the run's.

    Raises
    ------
    OptionError
        If there is no pair to test, a value makes no sense, or there are fewer prompts or
        resamples than the level of the tests needs.
    GraphError
        If there is no edge of a name.

    Examples
    --------
    >>> import acdc
    >>> acdc.interactions("runs/both").counts  # doctest: +SKIP
    """
    if not 0 < alpha < 1:
        raise OptionError(f"alpha {alpha:g}: expected a level above 0 and below 1")
    check_count("max_pairs", max_pairs, at_most=MOST_RESAMPLES)
    check_count("n_resamples", n_resamples, at_most=MOST_RESAMPLES)
    check_resamples(n_resamples, alpha)
    reporter, timer = reporter or Silent(), Timer()
    opened, circuit, candidates = _open(run)
    settings = opened.settings(task=task, **asked)
    wanted = {frozenset(pair) for one in candidates for pair in _pairs_of(one)}
    chosen, n_left_out = _choose(circuit, edges, max_pairs, wanted)
    prompts = PromptChoice(opened.discovery_with(settings), seen)
    with timer.phase("load"), reporter.phase("load model and task", None):
        constants = opened.constants(settings)
        circuit, experiment = fit(circuit, settings, prompts, constants, memory)
    check_prompts(len(experiment.task))
    n_edges = len({edge for pair in chosen for edge in pair})
    tables = []
    with (
        timer.phase("measure"),
        reporter.phase("interactions", len(DIRECTIONS) * (len(chosen) + n_edges)),
    ):
        doubts = ability(experiment).doubts
        for direction in DIRECTIONS:
            own = replace(experiment, direction=direction)
            evaluator = Evaluator(with_constants(own, memory, reporter))
            tables.append(_measure(evaluator, chosen, direction, reporter))
    with timer.phase("test"):
        gates = name_gates(
            np.concatenate(tables), alpha=alpha, n_resamples=n_resamples, seed=resample_seed
        )
    graph, n = circuit.graph, len(chosen)
    pairs = [
        Pair(
            graph.edge_name(a), graph.edge_name(b), "" if edges else _node(graph, b),
            gates[i], gates[n + i],
        )
        for i, (a, b) in enumerate(chosen)
    ]  # fmt: skip
    pairs.sort(key=lambda pair: -pair.size)
    return Interactions(
        settings, tuple(pairs), n_left_out, alpha, len(experiment.task),
        dict(experiment.task.info), timer.seconds, _tested(candidates, pairs) if not edges else (),
        (*doubts, *_of_metric(experiment.metric)), _axis(experiment),
    )  # fmt: skip


def _open(run: RunLike) -> tuple[Opened, Circuit, tuple[Candidate, ...]]:
    """A run and its circuit; of both directions the first run, the edges of either, candidates."""
    if not isinstance(run, str | Path) or not (Path(run) / "directions.json").is_file():
        opened = open_run(run)
        return opened, opened.circuit, ()
    first, second = (open_run(Path(run) / direction) for direction in DIRECTIONS)
    a, b = first.circuit, second.circuit
    if differing := differing_shapes(a.graph.shape, b.graph.shape, "noising", "denoising"):
        raise CircuitFileError(f"{run}: its two circuits are of different graphs: {differing}")
    scores = np.maximum(np.abs(a.scores), np.abs(b.scores))
    either = replace(a, in_circuit=a.in_circuit | b.in_circuit, scores=scores)
    return first, either, candidates_of(compare(a, b))


def _pairs_of(candidate: Candidate) -> Iterator[tuple[str, str]]:
    """Pairs of edges into a candidate, at least one of which one direction alone finds."""
    for sender in candidate.only:
        for other in (*candidate.only, *candidate.partners):
            if other != sender:
                yield f"{sender}->{candidate.receiver}", f"{other}->{candidate.receiver}"


def _tested(candidates: Sequence[Candidate], pairs: Sequence[Pair]) -> tuple[Tested, ...]:
    kinds = {frozenset((pair.a, pair.b)): pair.kind for pair in pairs}
    found = []
    for one in candidates:
        own = {frozenset(pair) for pair in _pairs_of(one)}
        counts = Counter(kinds[pair] for pair in own if pair in kinds)
        found.append(Tested(one.gate, one.receiver, len(own), dict(counts)))
    return tuple(found)


def _choose(
    circuit: Circuit, edges: Sequence[str], max_pairs: int, wanted: Container[frozenset[str]]
) -> tuple[list[tuple[int, int]], int]:
    """Pairs of edges to test, those wanted first, and how many more there are."""
    graph = circuit.graph
    if edges:
        found = np.flatnonzero(graph.edge_mask(edges)).tolist()
        pairs = list(combinations(found, 2))
    else:
        pairs = list(_meeting(graph, np.flatnonzero(circuit.in_circuit).tolist()))
    if not pairs:
        raise OptionError(
            "there is no pair of edges to test: name at least two with --edge"
            if edges
            else "no two edges of the circuit enter one node: name some with --edge"
        )
    scores = np.abs(circuit.scores)

    def rank(pair: tuple[int, int]) -> tuple[bool, float]:
        is_wanted = frozenset(map(graph.edge_name, pair)) in wanted
        return not is_wanted, -float(min(scores[pair[0]], scores[pair[1]]))

    pairs.sort(key=rank)
    return pairs[:max_pairs], max(0, len(pairs) - max_pairs)


def _meeting(graph: Graph, edges: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Pairs of edges into one node."""
    by_node: dict[str, list[int]] = {}
    for edge in edges:
        by_node.setdefault(_node(graph, edge), []).append(edge)
    for together in by_node.values():
        yield from combinations(together, 2)


def _node(graph: Graph, edge: int) -> str:
    return graph.receiver_node(int(graph.edge_receiver[edge]))


def _measure(
    evaluator: Evaluator,
    pairs: Sequence[tuple[int, int]],
    direction: Direction,
    reporter: Reporter,
) -> NDArray[np.float64]:
    """``[pair, i, j, prompt]``: metric with a clean or not, and b clean or not."""
    n_edges = evaluator.experiment.graph.n_edges

    def without(*edges: int) -> NDArray[np.float64]:
        mask = np.ones(n_edges, dtype=bool)
        mask[list(edges)] = False
        reporter.advance(1)
        return evaluator.values(mask)

    none = evaluator.values(np.ones(n_edges, dtype=bool))
    alone = {edge: without(edge) for edge in sorted({e for pair in pairs for e in pair})}
    tables = np.array(
        [[[without(a, b), alone[a]], [alone[b], none]] for a, b in pairs]
    )  # [a intact, b intact]: what is ablated is not clean in noising
    if direction == "denoising" and _axis(evaluator.experiment) == CLEAN:
        tables = tables[:, ::-1, ::-1]  # there what is ablated carries the clean run's value
    return tables


def _axis(experiment: Experiment) -> str:
    """Whether what is ablated is the clean run's in denoising: see :attr:`Interactions.axis`."""
    ablation = experiment.ablation
    of_other_run = ablation.averages and experiment.mean_over is None
    return CLEAN if ablation.carries == OTHER_RUN or of_other_run else INTACT


def _of_metric(metric: Metric) -> Iterator[str]:
    """Warn of a metric on which what adds up in the logits need not add up."""
    if not metric.linear:
        yield (
            f"under {metric.name} edges that add in the logits can look like OR (or another gate): "
            "use --metric logit_diff"
        )
