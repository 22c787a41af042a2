"""Graphs split by spans: the engine against the oracle, and split against unsplit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracle import FAMILIES
from test_checkpoint import Killed, killer
from test_engine import Case, cases, check_case, quick, scale_of
from test_parity import experiment as parity_experiment

from acdc.engine import inputs
from acdc.engine.attribution import integrate_nodes
from acdc.engine.checkpoint import Checkpoint
from acdc.engine.experiment import Experiment
from acdc.engine.incremental import IncrementalRun
from acdc.engine.inputs import Sums
from acdc.engine.patched import PatchedModel
from acdc.engine.work import Work
from acdc.methods import METHODS
from acdc.methods.acdc import acdc
from acdc.methods.eap import at_base, clean_corrupted, eap, eap_ig, eap_ig_activations
from acdc.methods.exact import exact
from acdc.methods.gim import gim
from acdc.methods.ifr import ifr
from acdc.methods.nap import nap_ig
from acdc.methods.relp import relp
from acdc.methods.sweep import sweep
from acdc.tasks.base import Pair
from acdc.tasks.positions import find_positions
from graphs.order import edge_order, receiver_order
from graphs.plan import Planner

SPLIT_SIZES = [(1, 1), (1, 2), (2, 1), (1, 2), (2, 2)]


@st.composite
def split_cases(draw: Any, family: str | None = None) -> Case:
    """Cases of :func:`test_engine.cases`, smaller and split."""
    positions = draw(st.sampled_from(["token", "span", "span"]))
    lengths = [(3,), (4,)] if positions == "token" else [(3,), (4,), (3, 4)]
    return dataclasses.replace(
        draw(cases(family)),
        positions=positions,
        size=draw(st.sampled_from(SPLIT_SIZES)),
        lengths=draw(st.sampled_from(lengths)),
        n_prompts=draw(st.integers(2, 3)),
    )


# --- against the oracle -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_circuits_and_scores_are_those_of_sequential_acdc(family: str) -> None:
    @quick(2)
    @given(split_cases(family))
    def check(case: Case) -> None:
        check_case(case)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_circuits_are_those_of_sequential_acdc(family: str) -> None:
    @quick(24)
    @given(split_cases(family))
    def check(case: Case) -> None:
        check_case(case)

    check()


@pytest.mark.parametrize("intervention", ["mean", "mean-positional"])
def test_edges_of_a_span_may_carry_means(intervention: str) -> None:
    for seed, family in ((1, "LN"), (2, "Gemma2")):
        lengths = (4,) if intervention == "mean-positional" else (3, 4)
        case = Case(family, seed, lengths=lengths, positions="span", intervention=intervention)
        check_case(dataclasses.replace(case, size=(1, 2)))


@quick(24)
@given(split_cases(), st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
def test_patched_model_equals_the_explicit_forward(case: Case, density: float) -> None:
    built = case.build()
    graph, slow = built.experiment.graph, built.oracle
    mask = np.random.default_rng(case.seed).random(graph.n_edges) < density
    wanted = slow.without(oracle.share_of(graph, ~mask))
    scale = scale_of([wanted, slow.without(())], slow)
    assert abs(PatchedModel(built.experiment).metric(mask) - wanted) < 1e-4 * scale


@quick(12)
@given(split_cases(), st.sampled_from([0.3, 0.7]))
def test_scenarios_on_top_of_any_committed_state(case: Case, density: float) -> None:
    built = case.build()
    experiment, slow = built.experiment, built.oracle
    graph, rng = experiment.graph, np.random.default_rng(case.seed)
    run = IncrementalRun(experiment)
    removed = np.zeros(graph.n_edges, dtype=bool)
    scale = scale_of([slow.without(())], slow)
    for receiver in receiver_order(graph):
        edges = edge_order(graph, receiver)
        scenarios = rng.random((2, len(edges))) < 1 - density
        values, outcomes = run.evaluate(edges, scenarios)
        now = removed.copy()
        now[edges[scenarios[0]]] = True
        assert abs(values[0] - slow.without(oracle.share_of(graph, now))) < 1e-4 * scale
        run.commit(outcomes, 1)
        removed[edges[scenarios[1]]] = True
        assert abs(run.metric() - values[1]) < 1e-5 * scale
        run.finish(receiver, edges[~scenarios[1]])


@quick(12)
@given(split_cases())
def test_exact_is_one_patch_per_edge(case: Case) -> None:
    built = case.build()
    found = exact(built.experiment, memory=case.memory)
    wanted = oracle.exact_scores(built.oracle)
    scale = scale_of(wanted.values(), built.oracle)
    for edge, score in zip(built.experiment.graph.edge_names(), found, strict=True):
        assert abs(score - wanted[edge]) < 1e-4 * scale, edge


def built_in_float64(family: str, **fields: Any) -> Any:
    """Build a case of several layouts and scored positions that shows differences of gradients."""
    case = Case(family, 3, size=(1, 2), lengths=(4,), n_prompts=3, positions="span", most_scored=2)
    built = dataclasses.replace(case, **fields).build()
    experiment, slow = built.experiment, built.oracle
    assert len(set(slow.spans)) > 1
    model = oracle.small_model(
        family, 3, n_layers=case.size[0], n_heads=case.size[1], dtype=torch.float64
    )
    how = (slow.metric_name, experiment.intervention, experiment.direction, slow.positions)
    built.oracle = oracle.Oracle(model, experiment.task, *how)
    built.experiment = dataclasses.replace(experiment, model=model)
    return built


@pytest.mark.parametrize("intervention", ["resample", "zero"])
@pytest.mark.parametrize("family", ["LN", "grouped rotary", "GPTNeoX"])
def test_eap_is_the_derivative_of_ablating_an_edge_of_one_span(
    family: str, intervention: str
) -> None:
    built = built_in_float64(family, intervention=intervention)
    wanted = oracle.edge_scores_by_finite_differences(built.oracle, 3e-3)
    largest = max(map(abs, wanted.values()))
    found = eap(built.experiment)
    for edge, score in zip(built.experiment.graph.edge_names(), found, strict=True):
        assert abs(score - wanted[edge]) < 1e-3 * largest, edge


# --- split against unsplit ----------------------------------------------------------------


def both(family: str, **fields: Any) -> tuple[Experiment, Experiment]:
    """Return an experiment split by spans, and the same one that is not."""
    split = built_in_float64(family, **fields).experiment
    return split, dataclasses.replace(split, positions=None)


def summed(split: Experiment, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over spans: ``[edge]`` of the graph that is not split."""
    found = np.zeros(split.graph.components.n_edges)
    np.add.at(found, split.graph.edge_component, scores)
    return found


SCORES: dict[str, Callable[[Experiment], NDArray[np.float64]]] = {
    "eap": eap,
    "eap-ig": eap_ig,
    "eap-ig-activations": eap_ig_activations,
    "clean-corrupted": clean_corrupted,
    "gim": gim,
    "relp": relp,
}


@pytest.mark.parametrize("memory", [1, 1 << 30])
@pytest.mark.parametrize("name", SCORES)
def test_scores_of_spans_add_up_to_those_of_the_edge(name: str, memory: int) -> None:
    for family, direction in (("LN", "noising"), ("Gemma2", "denoising"), ("grouped", "noising")):
        split, whole = both(family, direction=direction)
        found = SCORES[name](split, work=Work(memory))  # type: ignore[call-arg]
        wanted = SCORES[name](whole)
        near = 1e-5 if family == "Gemma2" else 1e-10  # its norms compute in float32
        np.testing.assert_allclose(
            summed(split, found), wanted, rtol=0, atol=near * abs(wanted).max()
        )
        assert len(set(np.round(found / abs(found).max(), 6))) > len(set(split.graph.edge_span))


def test_a_node_scores_what_the_edges_out_of_it_score() -> None:
    split, whole = both("LN", size=(2, 2))
    found = nap_ig(split)
    by_edges = np.zeros(split.graph.n_senders)
    np.add.at(by_edges, split.graph.edge_sender, eap_ig(split))
    np.testing.assert_allclose(found, by_edges, atol=1e-10 * abs(found).max())
    n_spans = split.graph.shape.n_spans
    np.testing.assert_allclose(found.reshape(-1, n_spans).sum(1), nap_ig(whole), atol=1e-10)
    per_prompt = integrate_nodes(split, at_base(split), 1, 1 << 30, lambda n: None)
    assert per_prompt.shape == (len(split.task), split.graph.n_senders)


def test_shares_of_a_span_add_up_to_one() -> None:
    split, whole = both("LN", size=(2, 2))
    found, graph = ifr(split), split.graph
    totals = np.bincount(graph.edge_receiver, found)
    np.testing.assert_allclose(totals, np.bincount(whole.graph.edge_receiver, ifr(whole))[0])
    one = dataclasses.replace(split.task, pairs=split.task.pairs[:1])  # a single layout
    split, whole = (dataclasses.replace(e, task=one) for e in (split, whole))
    spans = split.batches[0].spans
    share = np.bincount(spans, minlength=graph.shape.n_spans) / len(spans)
    inner = whole.graph.edge_receiver < len(whole.graph.receivers) - 1  # logits: scored ones
    mean = summed(split, ifr(split) * share[graph.edge_span])
    np.testing.assert_allclose(mean[inner], ifr(whole)[inner])


@pytest.mark.parametrize("intervention", ["resample", "zero"])
@pytest.mark.parametrize("family", ["LN", "Gemma2", "GPTNeoX", "attention only"])
def test_a_circuit_equal_in_all_spans_is_the_unsplit_circuit(
    family: str, intervention: str
) -> None:
    split, whole = both(family, intervention=intervention)
    for density in (0.0, 0.5, 1.0):
        mask = np.random.default_rng(1).random(whole.graph.n_edges) < density
        everywhere = mask[split.graph.edge_component]
        wanted = PatchedModel(whole).metric(mask)
        assert PatchedModel(split).metric(everywhere) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("family", ["LN", "Gemma2"])
def test_weights_of_zero_and_one_are_a_mask(family: str) -> None:
    experiment = built_in_float64(family).experiment
    mask = np.random.default_rng(1).random(experiment.graph.n_edges) < 0.5
    weights = torch.tensor(mask, dtype=experiment.model.dtype, requires_grad=True)
    soft = PatchedModel(experiment)
    rows = torch.cat([soft.rows(i, weights) for i in range(len(experiment.batches))])
    assert rows.mean().item() == pytest.approx(PatchedModel(experiment).metric(mask), abs=1e-5)
    rows.sum().backward()
    assert weights.grad is not None
    assert weights.grad.ne(0).any()


def test_cuts_at_the_logits_are_masks() -> None:
    experiment = built_in_float64("Gemma2").experiment
    graph, patched = experiment.graph, PatchedModel(experiment)
    mask = np.random.default_rng(1).random(graph.n_edges) < 0.8
    cuts = np.eye(graph.components.n_senders, dtype=bool)[:3]
    into_logits = np.char.startswith(np.array(graph.receivers), "logits")[graph.edge_receiver]
    found = patched.values_at_logits(mask, cuts)
    for cut, values in zip(cuts, found, strict=True):
        without = mask & ~(into_logits & cut[graph.sender_component[graph.edge_sender]])
        np.testing.assert_allclose(values, patched.values(without), atol=1e-6)


@pytest.mark.parametrize("intervention", ["resample", "zero"])
def test_one_span_is_no_split(intervention: str) -> None:
    case = Case("LN", 5, size=(2, 2), intervention=intervention, tau=0.03)
    built = case.build()
    pairs = tuple(
        dataclasses.replace(pair, spans={"ALL": tuple(range(len(pair.clean)))})
        for pair in built.experiment.task.pairs
    )
    task = dataclasses.replace(built.experiment.task, pairs=pairs)
    one = dataclasses.replace(built.experiment, task=task, positions=find_positions(task, "span"))
    whole, _ = acdc(built.experiment, built.tau)
    split, _ = acdc(one, built.tau)
    assert 0 < whole.n_edges < whole.graph.n_edges
    assert split.edges() == [
        f"{u}@ALL->{v}@ALL" for u, v in (edge.split("->") for edge in whole.edges())
    ]
    np.testing.assert_array_equal(split.scores, whole.scores)


# --- what is built on the engine ----------------------------------------------------------


def ioi_toy(model: str = "ln2", metric: str = "logit_diff", **fields: Any) -> Experiment:
    """Return the parity task with its names labelled: tokens 2 and 4, one of them again at 9."""
    whole = parity_experiment(model, metric)

    def label(pair: Pair) -> Pair:
        first, again = (2, 4) if pair.clean[2] == pair.clean[9] else (4, 2)
        at = {"S1": first, "IO": again, "S2": 9, "END": len(pair.clean) - 1}
        return dataclasses.replace(pair, spans={name: (p,) for name, p in at.items()})

    task = dataclasses.replace(whole.task, pairs=tuple(map(label, whole.task.pairs)))
    return dataclasses.replace(whole, task=task, positions=find_positions(task, "span"), **fields)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_finds_a_split_circuit(name: str) -> None:
    experiment, method = ioi_toy(), METHODS[name]
    asked = {"threshold": 0.1} if "acdc" in name else {"n_edges": 60}
    if "mask_steps" in method.option_names:
        asked["mask_steps"] = 30
    circuit = method.find(experiment, **asked).circuit
    assert circuit.graph is experiment.graph
    assert 0 < circuit.n_edges < 0.2 * circuit.graph.n_edges
    assert "logits" in circuit.nodes()


def test_a_sweep_is_acdc_at_every_threshold() -> None:
    experiment, taus = ioi_toy(), (0.03, 0.1, 0.5)
    circuits, _ = sweep(experiment, taus)
    for tau in taus:
        alone, _ = acdc(experiment, tau)
        np.testing.assert_array_equal(circuits[tau].in_circuit, alone.in_circuit)
        np.testing.assert_allclose(circuits[tau].scores, alone.scores, atol=1e-5)


def test_guesses_change_nothing() -> None:
    experiment = ioi_toy()
    plain, work = acdc(experiment, 0.1)
    guided, faster = acdc(experiment, 0.1, expected=experiment.minimised_sign * eap_ig(experiment))
    np.testing.assert_array_equal(guided.in_circuit, plain.in_circuit)
    assert work.n_decisions + work.n_dead == faster.n_decisions + faster.n_dead


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    experiment = ioi_toy()
    wanted, _ = acdc(experiment, 0.1)
    keep = Checkpoint(tmp_path, {"task": "t"}, period=0)
    with pytest.raises(Killed):
        acdc(experiment, 0.1, checkpoint=keep, progress=killer(wanted.graph.n_edges // 2))
    found, _ = acdc(experiment, 0.1, checkpoint=Checkpoint(tmp_path, {"task": "t"}))
    np.testing.assert_array_equal(found.in_circuit, wanted.in_circuit)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)


def test_float32_is_asked_where_a_low_precision_cannot_decide() -> None:
    exact_case = Case("LN", 3, size=(2, 2), positions="span", tau=0.03)
    built = exact_case.build()
    wanted, _ = acdc(built.experiment, built.tau)
    low = oracle.small_model("LN", 3, dtype=torch.bfloat16)
    both_models = dataclasses.replace(built.experiment, model=low, in_float32=built.experiment)
    found, work = acdc(both_models, built.tau)
    assert work.n_reviewed > 0
    assert (found.in_circuit != wanted.in_circuit).mean() < 0.02


# --- planted bugs -------------------------------------------------------------------------

BUG_CASES = [
    Case(family, seed, size=(2, 2), tau=0.1, lengths=(4,), positions="span", intervention=how)
    for family, seed, how in (("LN", 1, "resample"), ("LN", 1, "zero"), ("RMS", 0, "resample"))
]


def caught() -> bool:
    """Whether any of a few cases sees that something is wrong."""
    for case in BUG_CASES:
        try:
            check_case(case)
        except (AssertionError, IndexError, RuntimeError):
            return True
    return False


def _kept_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    overlap = inputs.overlap
    monkeypatch.setattr(inputs, "overlap", lambda have, want, kept_at=None: overlap(have, want))


def _tested_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    live = Planner._live_of
    monkeypatch.setattr(
        Planner, "live", lambda self, v: live(self, int(self.graph.receiver_component[v]))
    )


def _dropped_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    drop = Sums.drop

    def everywhere(self: Sums, span: int, receiver: int, senders: Any) -> None:
        for other in [s for s, v in self.kept if v == receiver]:
            drop(self, other, receiver, senders)

    monkeypatch.setattr(Sums, "drop", everywhere)


def _one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = Experiment._spans
    monkeypatch.setattr(Experiment, "_spans", lambda self, row, pair: spans(self, row, pair)[::-1])


BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "kept edges carry changes of all spans": _kept_everywhere,
    "a tested edge changes all spans": _tested_everywhere,
    "a removed edge is missing in all spans": _dropped_everywhere,
    "positions in the wrong spans": _one_layout,
}


def test_without_a_bug_nothing_is_caught() -> None:
    assert not caught()


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[bug](monkeypatch)
    assert caught()
