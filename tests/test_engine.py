"""The engine against the oracle: same circuits, same scores, same metrics, on random models."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracle import FAMILIES, METRICS, Oracle, Sequential
from torch import Tensor

from acdc.engine import inputs, speculation
from acdc.engine.experiment import Experiment
from acdc.engine.incremental import BatchState, IncrementalRun, Outcome
from acdc.engine.metrics import get_metric
from acdc.engine.patched import PatchedModel, metric_of_circuit
from acdc.methods.acdc import acdc
from acdc.methods.eap import eap
from acdc.methods.exact import exact
from acdc.methods.sweep import sweep
from acdc.tasks.positions import find_positions
from graphs import Circuit
from graphs import plan as plan_module
from graphs.order import edge_order, receiver_order
from graphs.plan import Planner

METHOD = importlib.import_module("acdc.methods.acdc")  # the package's name is the function

GUARD = 1e-4  # of the largest change: decisions closer than this to tau may be rounding
EXAMPLES = 16  # random models of each family in the main test
FEWER = dict.fromkeys(oracle.LATER, 4)  # of those that differ from another in one thing


def quick(n: int) -> Any:
    return settings(
        max_examples=n,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


# --- cases --------------------------------------------------------------------------------

SIZES = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 2), (2, 3), (3, 1), (3, 2)]


@dataclass(frozen=True)
class Case:
    """Everything that a run depends on, as numbers, so that a failure prints it."""

    family: str
    seed: int
    size: tuple[int, int] = (2, 2)
    d_model: int = 12
    split_qkv: bool = True
    split_embed: bool = False
    strength: float = 1.0
    n_prompts: int = 3
    lengths: tuple[int, ...] = (4, 5)
    most_scored: int = 1
    metric: str = "logit_diff"
    direction: str = "noising"
    intervention: str = "resample"
    tau: float = 0.1  # of the largest difference that an edge can make alone, roughly
    guess: str = "removed"
    batch_size: int = 32
    memory: int = 1 << 30
    positions: str | None = None
    two_sided: bool = False

    def build(self) -> SimpleNamespace:
        model = oracle.small_model(
            self.family,
            self.seed,
            n_layers=self.size[0],
            n_heads=self.size[1],
            d_model=self.d_model,
            split_qkv=self.split_qkv,
            split_embed=self.split_embed,
            strength=self.strength,
        )
        task = oracle.small_task(self.seed, self.n_prompts, self.lengths, self.most_scored)
        if self.positions == "span":
            task = oracle.labelled(task, self.seed)
        how = (self.intervention, self.direction, self.positions)
        slow = Oracle(model, task, self.metric, *how)
        causal = all(layer.attention.causal for layer in model.layers)
        split = find_positions(task, self.positions, causal=causal) if self.positions else None
        experiment = Experiment(
            model,
            task,
            get_metric(self.metric),
            batch_size=self.batch_size,
            intervention=self.intervention,
            direction=self.direction,
            positions=split,
        )
        gap = abs(slow.without(slow.edges) - slow.without(()))
        return SimpleNamespace(oracle=slow, experiment=experiment, tau=self.tau * max(gap, 0.05))


@st.composite
def cases(draw: Any, family: str | None = None) -> Case:
    return Case(
        family=draw(st.sampled_from(FAMILIES)) if family is None else family,
        seed=draw(st.integers(0, 2**31)),
        size=draw(st.sampled_from(SIZES)),
        d_model=draw(st.sampled_from([8, 12, 16])),
        split_qkv=draw(st.booleans()),
        split_embed=draw(st.booleans()),
        strength=draw(st.sampled_from([0.7, 1.0, 1.5])),
        n_prompts=draw(st.integers(2, 4)),
        lengths=draw(st.sampled_from([(3,), (5,), (3, 4), (4, 6)])),
        most_scored=draw(st.sampled_from([1, 1, 1, 3])),
        metric=draw(st.sampled_from(sorted(METRICS))),
        direction=draw(st.sampled_from(["noising", "denoising"])),
        intervention=draw(st.sampled_from(["resample", "resample", "zero"])),
        tau=draw(st.sampled_from([0.003, 0.01, 0.03, 0.1, 0.3])),
        guess=draw(st.sampled_from(["removed", "kept", "random", "eap"])),
        batch_size=draw(st.sampled_from([1, 2, 32])),
        memory=draw(st.sampled_from([1, 50_000, 1 << 30])),
    )


def expected_of(kind: str, seed: int, experiment: Experiment) -> NDArray[np.float64] | None:
    if kind == "removed":
        return None
    if kind == "eap":
        return experiment.minimised_sign * eap(experiment)
    chance = np.random.default_rng(seed).random(experiment.graph.n_edges)
    return np.where(chance < (0.5 if kind == "random" else 0.0), -np.inf, np.inf)


def run_engine(case: Case, built: SimpleNamespace) -> Circuit:
    expected = expected_of(case.guess, case.seed, built.experiment)
    options: dict[str, Any] = {"memory": case.memory, "two_sided": case.two_sided}
    return acdc(built.experiment, built.tau, expected=expected, **options)[0]


def scale_of(values: Any, slow: Oracle) -> float:
    """Largest of the values; not below what float32 resolves of the logits."""
    return max(float(np.max(np.abs(list(values)))), 0.03 * slow.logit_scale(), 0.03)


# --- the comparison -----------------------------------------------------------------------


@dataclass
class Tally:
    """What the main test covered."""

    models: set[tuple[Any, ...]] = field(default_factory=set)
    n_cases: int = 0
    n_near: int = 0
    n_decisions: int = 0
    n_kept: int = 0


TALLY = Tally()


def compare(circuit: Circuit, wanted: Sequential, tau: float, scale: float) -> bool:
    """Assert equal decisions and changes, up to the first that lies within rounding of tau.

    Returns whether that was the whole run.
    """
    graph = circuit.graph
    kept = set(oracle.share_of(graph, circuit.in_circuit))
    scores = dict(zip(graph.edge_names(), circuit.scores, strict=True))
    safe = wanted.decided_before(tau, GUARD * scale)
    for edge in safe:
        assert (edge in kept) == (edge in wanted.kept), edge
        assert abs(scores[edge] - wanted.changes[edge]) < 1e-4 * scale, edge
    if len(safe) < len(wanted.changes):
        return False
    assert kept == wanted.kept
    return True


def check_case(case: Case, tally: Tally | None = None) -> None:
    built = case.build()
    assert set(built.experiment.graph.edge_names()) == set(built.oracle.edges)
    circuit = run_engine(case, built)
    wanted = oracle.sequential_acdc(built.oracle, built.tau, two_sided=case.two_sided)
    scale = scale_of(wanted.changes.values(), built.oracle)
    whole = compare(circuit, wanted, built.tau, scale)
    if whole:
        final = PatchedModel(built.experiment).metric(circuit.in_circuit)
        assert abs(final - wanted.metric) < 1e-4 * scale
    if tally is not None:
        tally.models.add((case.family, case.seed, case.size, case.d_model, case.strength))
        tally.n_cases += 1
        tally.n_near += not whole
        tally.n_decisions += len(wanted.changes)
        tally.n_kept += len(wanted.kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_circuits_and_scores_are_those_of_sequential_acdc(family: str) -> None:
    @quick(FEWER.get(family, EXAMPLES))
    @given(cases(family))
    def check(case: Case) -> None:
        check_case(case, TALLY)

    check()


@pytest.mark.parametrize("guess", ["removed", "kept", "eap"])
@pytest.mark.parametrize("family", ["LN", "attention only", "grouped rotary", "Gemma2"])
def test_two_sided_circuits_are_those_of_sequential_acdc(family: str, guess: str) -> None:
    for seed in range(3):
        case = Case(family, seed, tau=0.05, guess=guess, two_sided=True)
        check_case(case)
        built = case.build()
        circuit, one_sided = run_engine(case, built), acdc(built.experiment, built.tau)[0]
        assert circuit.info["method"] == "acdc-two-sided"
        assert (circuit.scores[circuit.in_circuit] < -built.tau).any()  # kept against the metric
        assert circuit.n_edges > one_sided.n_edges


def test_two_sided_thresholds_share_a_sweep() -> None:
    built = Case("LN", 1, two_sided=True).build()
    taus = [0.3 * built.tau, built.tau, 3 * built.tau]
    circuits, _ = sweep(built.experiment, taus, two_sided=True)
    for tau in taus:
        alone, _ = acdc(built.experiment, tau, two_sided=True)
        np.testing.assert_array_equal(circuits[tau].in_circuit, alone.in_circuit)
        np.testing.assert_allclose(circuits[tau].scores, alone.scores, atol=1e-5)


@pytest.mark.parametrize("metric", ["kl", "mse", "logit_diff"])
@pytest.mark.parametrize("family", ["bidirectional", "no norm", "Gemma2"])
def test_several_scored_positions(family: str, metric: str) -> None:
    """Also before the last position and with keys and values that stand after their query."""
    for seed, intervention in ((0, "resample"), (1, "zero"), (4, "resample")):
        case = Case(
            family, seed, lengths=(5,), most_scored=4, metric=metric, intervention=intervention
        )
        scored = [p.scored for p in oracle.small_task(seed, 3, (5,), 4).pairs]
        assert any(len(positions) > 1 for positions in scored)
        check_case(case)


def test_the_comparison_covered_enough() -> None:
    """At least 200 models; few runs were cut short by a decision within rounding of tau."""
    if TALLY.n_cases < EXAMPLES * (len(FAMILIES) - len(FEWER)) + sum(FEWER.values()):
        pytest.skip("only meaningful after the whole of the test above")
    assert len(TALLY.models) >= 200
    assert TALLY.n_near <= 0.1 * TALLY.n_cases
    assert 0.1 < TALLY.n_kept / TALLY.n_decisions < 0.9
    print(TALLY.n_near, "of", TALLY.n_cases, "cut short;", len(TALLY.models), "models")


@pytest.mark.parametrize("tau", [0.0, -0.05])
@pytest.mark.parametrize("family", ["LN", "attention only", "Gemma2"])
def test_thresholds_that_keep_dead_edges(family: str, tau: float) -> None:
    """At tau <= 0 an edge that changes nothing stays in, as its change is not below tau."""
    built = Case(family, seed=3, split_embed=True).build()  # pos->.. never changes anything
    circuit, _ = acdc(built.experiment, tau)
    wanted = oracle.sequential_acdc(built.oracle, tau)
    scores = dict(zip(circuit.graph.edge_names(), circuit.scores, strict=True))
    kept = set(circuit.edges())
    n_still = 0
    for edge, change in wanted.changes.items():
        if change == 0.0:
            assert scores[edge] == 0.0
            assert edge in kept
            n_still += 1
        elif abs(change - tau) < 1e-5:
            break
        else:
            assert (edge in kept) == (edge in wanted.kept)
    assert n_still > 0


# --- masks and scenarios ------------------------------------------------------------------


@quick(40)
@given(cases(), st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
def test_patched_model_equals_the_explicit_forward(case: Case, density: float) -> None:
    built = case.build()
    graph, slow = built.experiment.graph, built.oracle
    patched = PatchedModel(built.experiment, memory=case.memory)
    rng = np.random.default_rng(case.seed)
    for _ in range(3):
        mask = rng.random(graph.n_edges) < density
        wanted = slow.without(oracle.share_of(graph, ~mask))
        scale = scale_of([wanted, slow.without(())], slow)
        assert abs(patched.metric(mask) - wanted) < 1e-4 * scale
        assert abs(metric_of_circuit(built.experiment, mask) - wanted) < 1e-4 * scale


@pytest.mark.parametrize("density", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("family", ["Gemma2", "Qwen3", "RMS", "LN"])
def test_zero_ablation_of_all_that_a_norm_reads(family: str, density: float) -> None:
    """A sum of nothing is zero: the rounding of ``base - base`` must not reach a norm.

    RMSNorm with eps 1e-6 makes a thousand times more of it, and in models with norms on
    queries, keys or the heads' sum several such norms follow each other.
    """
    for seed in range(4):
        built = Case(family, seed, intervention="zero").build()
        graph, slow = built.experiment.graph, built.oracle
        mask = np.random.default_rng(seed).random(graph.n_edges) < density
        wanted = slow.without(oracle.share_of(graph, ~mask))
        scale = scale_of([wanted, slow.without(())], slow)
        assert abs(PatchedModel(built.experiment).metric(mask) - wanted) < 1e-4 * scale
        run = IncrementalRun(built.experiment)
        for receiver in receiver_order(graph):
            edges = edge_order(graph, receiver)
            _, outcomes = run.evaluate(edges, ~mask[edges][None])
            run.commit(outcomes, 0)
            run.finish(receiver, edges[mask[edges]])
        assert abs(run.metric() - wanted) < 1e-4 * scale


def test_patched_metric_takes_the_edges_that_stay() -> None:
    built = Case("LN", seed=1).build()
    e, graph = built.experiment, built.experiment.graph
    mask = np.random.default_rng(0).random(graph.n_edges) < 0.5
    kept = list(oracle.share_of(graph, mask))
    wanted = oracle.patched_metric(e.model, e.task, "logit_diff", kept)
    assert abs(PatchedModel(e).metric(mask) - wanted) < 1e-5


@quick(40)
@given(cases(), st.sampled_from([0.3, 0.7]))
def test_scenarios_on_top_of_any_committed_state(case: Case, density: float) -> None:
    """Random kept edges downstream, random scenarios of each receiver, one of them committed."""
    built = case.build()
    experiment, slow = built.experiment, built.oracle
    graph, rng = experiment.graph, np.random.default_rng(case.seed)
    run = IncrementalRun(experiment)
    removed = np.zeros(graph.n_edges, dtype=bool)
    full = slow.without(())
    for receiver in receiver_order(graph):
        edges = edge_order(graph, receiver)
        scenarios = rng.random((2, len(edges))) < 1 - density
        values, outcomes = run.evaluate(edges, scenarios)
        for scenario, value in zip(scenarios, values, strict=True):
            now = removed.copy()
            now[edges[scenario]] = True
            wanted = slow.without(oracle.share_of(graph, now))
            # an mse of 184 is rounded by more than 1e-4 of the model's own, as everywhere here
            assert abs(value - wanted) < 1e-4 * scale_of([wanted, full], slow)
        run.commit(outcomes, 1)
        removed[edges[scenarios[1]]] = True
        assert abs(run.metric() - values[1]) < 1e-5 * scale_of([values[1], full], slow)
        run.finish(receiver, edges[~scenarios[1]])


@quick(24)
@given(cases())
def test_edges_that_cannot_change_the_metric_do_not(case: Case) -> None:
    built = case.build()
    experiment, slow = built.experiment, built.oracle
    graph = experiment.graph
    run = IncrementalRun(experiment)
    kept = np.random.default_rng(case.seed).random(graph.n_edges) < 0.5
    finished = np.ones(graph.n_edges, dtype=bool)  # what is not finished yet is in
    base = slow.without(())
    for receiver in receiver_order(graph):
        edges = edge_order(graph, receiver)
        still = edges[~run.can_change(edges)][:3]
        for edge in still:
            now = ~finished
            now[edge] = True
            assert slow.without(oracle.share_of(graph, now)) == base
        _, outcomes = run.evaluate(edges, ~kept[edges][None])
        run.commit(outcomes, 0)
        finished[edges] = kept[edges]
        base = slow.without(oracle.share_of(graph, ~finished))
        run.finish(receiver, edges[kept[edges]])


@quick(36)
@given(cases())
def test_exact_is_one_patch_per_edge(case: Case) -> None:
    built = case.build()
    found = exact(built.experiment, memory=case.memory)
    wanted = oracle.exact_scores(built.oracle)
    scale = scale_of(wanted.values(), built.oracle)
    for edge, score in zip(built.experiment.graph.edge_names(), found, strict=True):
        assert abs(score - wanted[edge]) < 1e-4 * scale, edge


# --- what the result must not depend on ---------------------------------------------------


@quick(20)
@given(cases())
def test_guess_memory_batch_size_and_order_of_prompts_do_not_matter(case: Case) -> None:
    plain = dataclasses.replace(case, guess="removed", batch_size=32, memory=1 << 30)
    built = plain.build()
    wanted = run_engine(plain, built)
    scale = scale_of(wanted.scores, built.oracle)
    near = np.abs(wanted.scores - built.tau) < GUARD * scale
    if near.any():
        return
    experiment, pairs = built.experiment, built.experiment.task.pairs
    turned = dataclasses.replace(experiment.task, pairs=tuple(reversed(pairs)))
    variants = [
        (plain, experiment),
        *((dataclasses.replace(plain, guess=g), experiment) for g in ("kept", "random", "eap")),
        *((dataclasses.replace(plain, memory=m), experiment) for m in (1, 20_000)),
        *((plain, dataclasses.replace(experiment, batch_size=b)) for b in (1, 2)),
        (plain, dataclasses.replace(experiment, task=turned)),
    ]
    for variant, other in variants:
        built.experiment = other
        found = run_engine(variant, built)
        np.testing.assert_array_equal(found.in_circuit, wanted.in_circuit)
        np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-4 * scale)


def test_memory_has_no_say_in_what_is_evaluated_together() -> None:
    """It would have one in the last bit: what does not fit is evaluated in parts."""
    built = Case("LN", seed=0).build()
    runs = IncrementalRun(built.experiment, memory=1), IncrementalRun(built.experiment)
    edges = edge_order(built.experiment.graph, receiver_order(built.experiment.graph)[0])
    assert runs[0].capacity(edges) == runs[1].capacity(edges) > 100
    scenarios = np.eye(len(edges), dtype=bool)
    (some, kept), (every, whole) = (run.evaluate(edges, scenarios) for run in runs)
    np.testing.assert_array_equal(some, every)
    for i in range(len(edges)):
        assert all(outcome.made_by(i) is None for outcome in kept.values())
        assert all(outcome.made_by(i) == (outcome, i) for outcome in whole.values())


@pytest.mark.parametrize("family", ["LN", "Gemma2"])
@pytest.mark.parametrize("ablation", ["resample", "zero"])
@pytest.mark.parametrize("memory", [0.9, 1.5, 3.5])
def test_what_is_likely_committed_is_held_where_not_all_fits(
    family: str, ablation: str, memory: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is not computed again; what is committed against all odds is."""
    built = Case(family, seed=0, size=(2, 3), intervention=ablation).build()
    graph = built.experiment.graph
    roomy, tight = IncrementalRun(built.experiment), IncrementalRun(built.experiment)
    evaluate, again = BatchState.evaluate, list[int]()

    def counting(state: BatchState, *args: Any) -> Outcome:
        again.append(len(args[1]))
        return evaluate(state, *args)

    tried = 0
    for receiver in receiver_order(graph)[:8]:
        edges = edge_order(graph, receiver)
        if len(edges) < 5 or not roomy.can_change(edges).all():
            break
        tried += 1
        likely = committed = len(edges) - 1
        if tried == 2:
            committed = 0
        each = sum(b.bytes_per_scenario(b.plan(edges)) for b in tight.batches)
        tight._room = int(memory * each * 8 / 7) + 8
        scenarios = np.eye(len(edges), dtype=bool)
        wanted, whole = roomy.evaluate(edges, scenarios, likely)
        found, few = tight.evaluate(edges, scenarios, likely)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
        roomy.commit(whole, committed)
        with monkeypatch.context() as patch:
            patch.setattr(BatchState, "evaluate", counting)
            tight.commit(few, committed)
        if memory > 1:
            assert bool(again) == (committed != likely)
        elif committed == likely:  # of the last batches alone
            assert len(again) < len(few)
        again.clear()
        assert tight.metric() == pytest.approx(roomy.metric(), abs=1e-6)
        for run in (roomy, tight):
            run.finish(receiver, np.delete(edges, committed))
    assert tried > 1


def test_right_guesses_waste_nothing_and_wrong_ones_do() -> None:
    built = Case("LN", seed=2, size=(2, 3), tau=0.05).build()
    circuit, work = acdc(built.experiment, built.tau)
    assert 0 < circuit.n_edges < circuit.graph.n_edges
    right = np.where(circuit.in_circuit, np.inf, -np.inf)
    _, perfect = acdc(built.experiment, built.tau, expected=right)
    _, perverse = acdc(built.experiment, built.tau, expected=-right)
    _, measured = acdc(built.experiment, built.tau, expected=circuit.scores)
    assert perfect.n_wasted == measured.n_wasted == 0
    assert perfect.n_evaluations <= work.n_evaluations < perverse.n_evaluations
    for each in (work, perfect, perverse, measured):
        assert each.n_dead + each.n_decisions == circuit.graph.n_edges
        assert each.n_evaluations == each.n_decisions + each.n_wasted


def test_a_run_leaves_model_and_random_state_alone() -> None:
    built = Case("Gemma2", seed=5).build()
    tokens = torch.tensor([list(built.experiment.task.pairs[0].clean)])
    final = built.experiment.model.forward(tokens).final
    assert final is not None
    states = oracle.random_states()
    acdc(built.experiment, built.tau)
    exact(built.experiment)
    again = built.experiment.model.forward(tokens).final
    assert again is not None
    torch.testing.assert_close(final, again, rtol=0, atol=0)
    assert oracle.random_states() == states


def test_same_prompts_twice_have_no_edges_to_find() -> None:
    built = Case("LN", seed=1).build()
    pairs = tuple(dataclasses.replace(p, corrupt=p.clean) for p in built.experiment.task.pairs)
    task = dataclasses.replace(built.experiment.task, pairs=pairs)
    circuit, work = acdc(dataclasses.replace(built.experiment, task=task), 1e-6)
    assert circuit.n_edges == 0
    assert work.n_evaluations == 0
    assert not circuit.scores.any()


# --- planted bugs: each part of the comparison can fail -----------------------------------

BUG_CASES = [
    Case(family, seed, size=(2, 3), tau=0.03, lengths=(5,))
    for family in ("LN", "no norm", "Gemma2")
    for seed in (0, 1)
]


def caught() -> bool:
    """Whether any of a few cases sees that something is wrong."""
    for case in BUG_CASES:
        try:
            check_case(case)
        except (AssertionError, IndexError, RuntimeError):
            return True
    return False


def _reverse_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHOD, "edge_order", lambda graph, v: edge_order(graph, v)[::-1])


def _heads_ascending(monkeypatch: pytest.MonkeyPatch) -> None:
    def order(graph: Any) -> list[int]:
        found = receiver_order(graph)
        return sorted(found, key=lambda v: _visit(graph.receivers[v]))

    def _visit(name: str) -> tuple[int, ...]:
        if name == "logits":
            return (-99,)
        rank = {"v": 1, "k": 2, "q": 3}[name[-2]] if name.endswith(">") else 0
        return (-int(name[1]), rank, int(name.split("h")[1][0]) if rank else 0)

    monkeypatch.setattr(METHOD, "receiver_order", order)


def _wrong_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    sign = property(lambda self: -self.metric.sign)
    monkeypatch.setattr(Experiment, "minimised_sign", sign)


def _narrow_live(monkeypatch: pytest.MonkeyPatch) -> None:
    live = Planner.live
    monkeypatch.setattr(Planner, "live", lambda self, v: live(self, v) & self.need[-1])


def _commit_one_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = IncrementalRun.commit
    monkeypatch.setattr(IncrementalRun, "commit", lambda s, o, i: commit(s, o, max(0, i - 1)))


def _forget_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IncrementalRun, "commit", lambda self, outcomes, scenario: None)


def _believe_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept a whole batch, right or wrong."""

    take = speculation.Speculation._take

    def never_wrong(self: Any, batch: Any, change: float, removed: bool) -> Any:
        batch.guesses[batch.n_decided] = removed
        return take(self, batch, change, removed)

    monkeypatch.setattr(speculation.Speculation, "_take", never_wrong)


def _forget_upstream_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    walk = plan_module._walk

    def short(*arguments: Any) -> Any:
        in_pos, out_pos = walk(*arguments)
        out_pos[:-1, :-1] &= in_pos.any()  # harmless
        out_pos[:-1, 0] = False  # bug: the first position is never recomputed
        return in_pos, out_pos

    monkeypatch.setattr(plan_module, "_walk", short)


def _old_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver's committed change is forgotten when it is read again."""
    current = inputs.Changes.current

    def only_logits(self: inputs.Changes, receiver: int) -> Tensor:
        last = receiver == max(self._base)
        return current(self, receiver) if last else self._base[receiver]

    monkeypatch.setattr(inputs.Changes, "current", only_logits)


BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "edges in reverse": _reverse_edges,
    "heads ascending": _heads_ascending,
    "wrong sign": _wrong_sign,
    "keys live at the scored position only": _narrow_live,
    "commits the scenario before": _commit_one_too_few,
    "commits nothing": _forget_commit,
    "believes its guesses": _believe_guesses,
    "first position never recomputed": _forget_upstream_keys,
    "reads old inputs": _old_inputs,
}


def test_without_a_bug_nothing_is_caught() -> None:
    assert not caught()


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[bug](monkeypatch)
    assert caught()


@pytest.mark.parametrize("bug", ["norm of each head", "no b_O", "ablated base"])
def test_patched_comparison_sees_an_oracle_that_is_wrong(
    bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way round: the oracle with a bug no longer agrees with the engine."""
    built = Case("Gemma2" if bug == "norm of each head" else "LN", seed=1).build()
    mask = np.random.default_rng(0).random(built.experiment.graph.n_edges) < 0.5
    removed = list(oracle.share_of(built.experiment.graph, ~mask))
    value = PatchedModel(built.experiment).metric(mask)
    assert abs(value - built.oracle.without(removed)) < 1e-5
    if bug == "ablated base":
        for _, base, ablated, _ in built.oracle.groups:
            ablated.update(oracle.Pass(built.oracle.model, base).out)
    elif bug == "no b_O":
        layers = [
            dataclasses.replace(x, attention=dataclasses.replace(x.attention, b_O=None))
            for x in built.oracle.model.layers
        ]
        built.oracle.model = dataclasses.replace(built.oracle.model, layers=tuple(layers))
    else:
        layers = [dataclasses.replace(x, attention_post=None) for x in built.oracle.model.layers]
        built.oracle.model = dataclasses.replace(built.oracle.model, layers=tuple(layers))
    assert abs(value - built.oracle.without(removed)) > 1e-3


def test_leftovers_of_a_wrong_guess_are_good_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what wasted evaluations say, more of them are wasted."""
    built = Case("LN", seed=3, size=(3, 4), d_model=16, strength=1.5, tau=0.003).build()
    circuit, work = acdc(built.experiment, built.tau)
    evaluate = speculation.Speculation._evaluate

    def forgetful(self: Any, rest: Any) -> Any:
        batch = evaluate(self, rest)
        self.expected[:] = -np.inf
        return batch

    monkeypatch.setattr(speculation.Speculation, "_evaluate", forgetful)
    same, more = acdc(built.experiment, built.tau)
    np.testing.assert_array_equal(same.in_circuit, circuit.in_circuit)
    assert work.n_wasted < 0.9 * more.n_wasted
