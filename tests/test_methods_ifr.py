"""Information flow routes against shares counted one by one on the oracle's forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import Pass, small_task
from test_attribution import build

from acdc.engine.work import Work
from acdc.errors import OptionError
from acdc.methods import METHODS
from acdc.methods.ifr import ifr
from acdc.models.lowering import LoweredModel
from acdc.settings import Settings


class Recording(Pass):
    """A pass that remembers what each receiver read."""

    def __init__(self, model: LoweredModel, tokens: torch.Tensor) -> None:
        self.whole: dict[str, torch.Tensor] = {}
        super().__init__(model, tokens)

    def read(self, v: str) -> torch.Tensor:
        self.whole[v] = super().read(v)
        return self.whole[v]


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("family", ["LN", "grouped", "attention only", "GPTNeoX"])
def test_shares_one_by_one(family: str, direction: str) -> None:
    task = small_task(2, 3, (4, 6))
    experiment, _ = build(family, 2, task=task, direction=direction)
    graph = experiment.graph
    wanted = dict.fromkeys(graph.edge_names(), 0.0)
    for pair in task.pairs:
        tokens = torch.tensor([pair.clean if direction == "noising" else pair.corrupt])
        run = Recording(experiment.model, tokens)
        for receiver in graph.receivers:
            low, high = graph.receiver_start[graph.receiver_index[receiver] :][:2]
            senders = [graph.senders[u] for u in graph.edge_sender[low:high]]
            whole = run.whole[receiver][0].numpy()
            for at in range(len(pair.clean)):
                near = []
                for u in senders:
                    left = whole[at] - run.out[u][0, at].numpy()
                    near.append(max(np.abs(whole[at]).sum() - np.abs(left).sum(), 0.0))
                total = sum(near) or 1.0  # nothing comes near: nobody has a share
                for u, value in zip(senders, near, strict=True):
                    share = value / total / len(pair.clean) / len(task.pairs)
                    wanted[f"{u}->{receiver}"] += share
    found = dict(zip(graph.edge_names(), ifr(experiment), strict=True))
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-8), name


@pytest.mark.parametrize("family", ["LN", "Gemma2", "Qwen3"])
def test_edges_into_a_receiver_add_up_to_at_most_one(family: str) -> None:
    experiment, _ = build(family, 1)
    scores = ifr(experiment)
    sums = np.bincount(experiment.graph.edge_receiver, scores)
    assert (scores >= 0).all()
    assert sums.max() == pytest.approx(1, abs=1e-5)
    assert sums.min() > 0.5
    np.testing.assert_allclose(ifr(experiment, work=Work(memory=1)), scores, atol=1e-6)


def test_a_circuit() -> None:
    experiment, _ = build("LN", 1)
    method, counted = METHODS["ifr"], []  # type: ignore[var-annotated]
    found = method.find(experiment, Work(progress=counted.append), n_edges=20)
    assert sum(counted) == method.n_units(experiment)
    assert 0 < found.circuit.n_edges <= 20


@pytest.mark.parametrize("name", ["ifr", "hisp", "edge-pruning", "subnetwork-probing"])
def test_scores_without_a_sign_have_no_signed_ranking(name: str) -> None:
    METHODS[name].configured(Settings("t", ranking="absolute"))
    with pytest.raises(OptionError, match=f"method '{name}' gives scores without a sign"):
        METHODS[name].configured(Settings("t", ranking="signed"))
