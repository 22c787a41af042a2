"""Heads of a layer are recomputed in one product, and none of their bits follows from that."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from torch import Tensor

from acdc.engine import inputs, stages
from acdc.engine.experiment import Experiment
from acdc.engine.incremental import IncrementalRun
from acdc.engine.metrics import get_metric
from acdc.methods.acdc import acdc
from acdc.models.lowering.attention import Attention
from acdc.models.lowering.model import FeedForward
from graphs.order import edge_order, receiver_order


def experiment(family: str, intervention: str = "resample") -> Experiment:
    """Build a model of 3 layers of 4 heads and 3 prompts, of two lengths."""
    model = oracle.small_model(family, 1, n_layers=3, n_heads=4, d_model=16)
    task = oracle.small_task(1, 3, (4, 5), 1)
    return Experiment(model, task, get_metric("kl"), intervention=intervention)


@pytest.mark.parametrize("intervention", ["resample", "zero"])
@pytest.mark.parametrize("family", ["LN", "grouped rotary", "Gemma2"])
def test_bits_do_not_follow_from_what_is_computed_together(
    family: str, intervention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, _ = acdc(experiment(family, intervention), 1e-3)
    monkeypatch.setattr(inputs, "_TOGETHER", {"cpu": 1})
    alone, _ = acdc(experiment(family, intervention), 1e-3)
    assert alone.scores.tobytes() == together.scores.tobytes()
    assert np.array_equal(alone.in_circuit, together.in_circuit)
    assert together.in_circuit.any()


def test_mlps_of_many_scenarios_are_run_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    made = experiment("LN")
    whole, _ = acdc(made, 1e-3)
    n_rows: list[int] = []
    run = FeedForward.__call__

    def counted(self: FeedForward, x: Tensor) -> Tensor:
        n_rows.append(x.shape[:-1].numel())
        return run(self, x)

    monkeypatch.setattr(FeedForward, "__call__", counted)
    acdc(made, 1e-3)
    most = max(n_rows)
    monkeypatch.setattr(stages, "_ROWS", most // 2)
    monkeypatch.setattr(stages, "_CACHED", 1)
    n_rows.clear()
    parts, _ = acdc(made, 1e-3)
    assert max(n_rows) < most
    assert np.allclose(parts.scores, whole.scores, atol=1e-6)
    assert np.array_equal(parts.in_circuit, whole.in_circuit)


def test_a_layer_attends_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = IncrementalRun(experiment("LN"))
    graph, attend, n_heads = run.graph, Attention.attend, []
    first = graph.receivers.index("m0")

    def counted(self: Attention, q: Any, *rest: Any) -> Any:
        n_heads.append(len(q))
        return attend(self, q, *rest)

    for receiver in receiver_order(graph):
        edges = edge_order(graph, receiver)
        if receiver == first:
            break
        run.finish(receiver, edges)  # all stay
    monkeypatch.setattr(Attention, "attend", counted)
    run.evaluate(edges, np.eye(len(edges), dtype=bool))
    n_batches = sum(batch.plan(edges).reaches_logits for batch in run.batches)
    assert n_batches
    assert n_heads == [4] * 2 * n_batches  # two layers behind the MLP
