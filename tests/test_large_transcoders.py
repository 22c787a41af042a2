"""Graphs of too many edges to write out: attribution keeps the largest, and methods run on these.

Tests call small graphs large, so that what is computed without writing edges out can be held
against what is computed with them.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from latent_oracle import random_dictionary
from oracle import small_model, small_task

import acdc
import acdc.dictionaries.attach as attaching
from acdc.dictionaries import Dictionary, Hook
from acdc.dictionaries.attach import attach
from acdc.engine.attribution import strongest
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import PatchedModel
from acdc.errors import OptionError
from acdc.measure.evaluation import Evaluator
from acdc.methods import METHODS
from acdc.methods.eap import between_inputs, eap_ig
from acdc.methods.ifr import ifr
from benchmarks.measure import Peak
from benchmarks.subjects import Size, random_model, random_task
from graphs import top_edges
from graphs.files.formats import load_circuit, save_circuit
from graphs.graph import MOST_EDGES, GraphError, Outline, component_graph, outline

N_KEPT = 60
FEW = 1 << 12
"""Bytes for attribution that make it go through the stages one by one."""


def experiment(**says: Any) -> Experiment:
    model = small_model("LN", 0, n_layers=3, d_model=12)
    dictionaries = [
        random_dictionary(model, "jumprelu_transcoder", "ln2_normalized", layer)
        for layer in range(3)
    ]
    plain = Experiment(model, small_task(0, n_prompts=4), get_metric("logit_diff"), **says)
    return attach(plain, dictionaries).experiment


def _call_large(monkeypatch: pytest.MonkeyPatch, n_edges: int, n_kept: int) -> None:
    monkeypatch.setattr(Outline, "is_large", property(lambda self: self.n_edges > n_edges))
    monkeypatch.setattr(attaching, "MOST_STREAMED", n_kept)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> tuple[Experiment, Experiment]:
    """An experiment on all its edges, and the same with those that streaming keeps."""
    every = experiment()
    candidates = top_edges(np.abs(eap_ig(every)), N_KEPT)
    _call_large(monkeypatch, 100, N_KEPT)
    return replace(every, candidates=candidates), experiment()


@pytest.mark.parametrize("says", [{}, {"direction": "denoising"}, {"intervention": "mean"}])
@pytest.mark.parametrize("n_edges", [1, 50, 10**6])
def test_streamed_edges_are_the_largest_of_all(says: dict[str, Any], n_edges: int) -> None:
    every = experiment(**says)
    size = np.abs(eap_ig(every))
    expected = np.flatnonzero(top_edges(size, min(n_edges, len(size))))
    found = strongest(every, between_inputs(every, 5), 5, n_edges, FEW)
    assert found.tolist() == expected.tolist()


def test_scores_do_not_depend_on_how_many_stages_fit() -> None:
    every = experiment()
    told: list[int] = []
    few = METHODS["eap-ig"].scores(every, work=acdc.engine.work.Work(FEW, told.append))
    assert few == pytest.approx(eap_ig(every), rel=1e-5, abs=1e-6)
    assert sum(told) == 5 * len(every.task)


def test_an_outline_is_the_graph_without_its_edges() -> None:
    shape = experiment().graph.shape
    whole, found = component_graph(shape), outline(shape)
    assert found.n_edges == whole.n_edges
    assert found.places_of(whole).tolist() == list(range(whole.n_edges))
    some = np.arange(0, whole.n_edges, 7)
    assert found.graph(some).edge_names() == whole.edge_names(some)
    assert found.places(reversed(whole.edge_names(some))).tolist() == some.tolist()
    with pytest.raises(GraphError, match=r"no sender 'm9'"):
        found.places(["m9->logits"])
    with pytest.raises(GraphError, match="reads the stream before"):
        found.places(["m2.err->a0.h0<q>"])


def test_methods_run_on_the_kept_edges_as_on_candidates(
    large: tuple[Experiment, Experiment],
) -> None:
    few, ours = large
    assert ours.graph.edge_names() == few.graph.edge_names()
    assert ours.graph.n_edges == N_KEPT < ours.outline.n_edges
    mask = np.arange(N_KEPT) % 3 > 0
    assert Evaluator(ours).evaluate(mask) == Evaluator(few).evaluate(mask)
    for method in ("eap", "nap", "exact", "gim"):
        expected = METHODS[method].scores(few)
        assert METHODS[method].scores(ours) == pytest.approx(expected, abs=1e-6)
    assert ifr(ours) == pytest.approx(ifr(few))
    one, two = (METHODS["acdc"].find(x, threshold=0.01).circuit for x in (ours, few))
    assert one.edges() == two.edges()


def test_rows_read_in_parts_give_what_rows_read_together_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = experiment()
    mask = np.random.default_rng(0).random(every.graph.n_edges) < 0.5
    together = PatchedModel(every).metric(mask)
    monkeypatch.setattr("acdc.engine.patched._ROWS_BYTES", 1)
    assert PatchedModel(every).metric(mask) == pytest.approx(together, abs=1e-6)


def test_files_hold_the_kept_edges(large: tuple[Experiment, Experiment], tmp_path: Any) -> None:
    _, ours = large
    found = METHODS["eap-ig"].find(ours, n_edges=20).circuit
    for suffix in ("json", "graphml", "dot"):
        path = tmp_path / f"circuit.{suffix}"
        save_circuit(found, path)
        again = load_circuit(path)
        assert again.edges() == found.edges()
        assert again.graph.n_edges <= N_KEPT


def test_a_run_on_a_large_graph_is_evaluated_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    _call_large(monkeypatch, 2_000, 1_000)
    asked: dict[str, Any] = {"saes": "bundled-transcoders", "n_prompts": 8, "max_latents": 60}
    run = acdc.discover("ioi", method="eap-ig", n_edges=80, **asked)
    assert run.circuit.graph.n_edges == 1_000
    assert run.details["latents"]["n_edges"] == 4_436
    run.save(tmp_path / "run")
    again = acdc.evaluate(tmp_path / "run", seen=True, tests=False)
    assert again.summary()["faithfulness"] == pytest.approx(run.evaluation.faithfulness, abs=1e-6)
    with pytest.raises(OptionError, match="lower --max-latents"):
        acdc.discover_both("ioi", method="eap-ig", n_edges=80, **asked)


def _transcoders(size: Size, n_latents: int, threshold: float) -> list[Dictionary]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for layer in range(size.n_layers):
        W = torch.randn(n_latents, size.d_model, generator=generator) / size.d_model**0.5
        tensors = {
            "W_enc": W.T.contiguous(),
            "W_dec": 0.1 * W,
            "b_dec": torch.zeros(size.d_model),
            "b_enc": torch.zeros(n_latents),
            "threshold": torch.full((n_latents,), threshold),
        }
        reads, writes = Hook(layer, "ln2_normalized"), Hook(layer, "mlp_out")
        settings: dict[str, Any] = {"apply_b_dec_to_input": False}
        found.append(Dictionary("jumprelu_transcoder", reads, writes, **tensors, **settings))
    return found


@pytest.mark.slow
def test_25_000_latents_of_transcoders_work_in_4_gibibytes() -> None:
    size = Size(n_prompts=16)
    with random_model(size, "cpu") as model, Peak(torch.device("cpu")) as peak:
        plain = Experiment(model, random_task(size), get_metric("logit_diff"))
        started = time.process_time()
        ours = attach(plain, _transcoders(size, 3400, 2.05)).experiment
        attached = time.process_time()
        found = METHODS["eap-ig"].find(ours, n_edges=2000).circuit
        scored = time.process_time()
        faithfulness = Evaluator(ours).faithfulness(found.in_circuit)
        measured = time.process_time()
        METHODS["acdc"].find(ours, threshold=0.01, candidates=400)
        searched = time.process_time()
    n_latents = sum(len(a.latents) for a in ours.attachments)
    assert peak.n_bytes is not None
    print(
        f"{n_latents:,} latents, {ours.outline.n_edges:,} edges: kept {ours.graph.n_edges:,} in "
        f"{attached - started:.0f} s, eap-ig {scored - attached:.0f} s, evaluation "
        f"{measured - scored:.0f} s, acdc of 400 {searched - measured:.0f} s, "
        f"{peak.n_bytes / 2**30:.2f} GiB"
    )
    assert n_latents >= 25_000
    assert ours.outline.n_edges > MOST_EDGES
    assert faithfulness is not None
    assert peak.n_bytes < 4 << 30
