"""Two computations in superposition: latents tell them apart, components do not.

Twelve inputs A0..A5, B0..B5 live in six dimensions, ``B_i = -A_i`` (antipodal pairs), and so do
what the first MLP makes of them and what the second makes of that: 36 features in a stream of
width 21.  A prompt is ``[A_i, B_j, query]``; head a0.h0 copies both inputs to the query, m0 and m1
map the feature ``X_i`` of one space to that of the next by one ReLU neuron each, and the logits
read the last space.  Task A asks for ``A_i`` and task B for ``B_j``, on the same prompts.

So both tasks run through the same components and the same dimensions, and the circuit of each
is known: ``input -> a0.h0<v>``, ``a0.X_i -> m0.X_i -> m1.X_i -> logits`` for its own six inputs.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from acdc.dictionaries import Dictionary, Hook
from acdc.dictionaries.attach import attach
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.measure.error_nodes import errors_in_and_out
from acdc.measure.evaluation import Evaluator
from acdc.methods.acdc import acdc
from acdc.methods.eap import eap, eap_ig
from acdc.methods.exact import exact
from acdc.models import load_model
from acdc.models.lowering import LoweredModel
from acdc.tasks.base import Pair, Task
from graphs import Graph

PAIRS, N, DECOYS = 6, 12, 5
WIDTH = 3 * PAIRS + 3  # three spaces, the query, two dimensions that nothing reads
QUERY, JUNK = 3 * PAIRS, slice(3 * PAIRS + 1, WIDTH)


def features() -> list[Tensor]:
    """``[feature, d_model]`` of each space: randomly turned antipodal pairs."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for space in range(3):
        turn, _ = torch.linalg.qr(torch.randn(PAIRS, PAIRS, generator=generator))
        directions = torch.zeros(N, WIDTH)
        directions[:PAIRS, space * PAIRS : (space + 1) * PAIRS] = turn
        directions[PAIRS:] = -directions[:PAIRS]
        found.append(directions)
    return found


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoweredModel, list[Dictionary]]:
    folder = tmp_path_factory.mktemp("toy")
    first, second, third = features()
    config = {
        "n_layers": 2, "d_model": WIDTH, "n_heads": 1, "d_head": PAIRS, "n_ctx": 3,
        "d_vocab": N + 1, "d_mlp": N, "act_fn": "relu", "normalization_type": None,
        "positional_embedding_type": "standard",
    }  # fmt: skip
    state = {
        "embed.W_E": torch.cat([first, torch.eye(WIDTH)[QUERY : QUERY + 1]]),
        "pos_embed.W_pos": torch.zeros(3, WIDTH),
        "unembed.W_U": torch.cat([third, torch.zeros(1, WIDTH)]).T.contiguous(),
        "unembed.b_U": torch.zeros(N + 1),
    }
    value = torch.zeros(1, WIDTH, PAIRS)
    value[0, :PAIRS] = torch.eye(PAIRS)
    for layer, (reads, writes) in enumerate(((first, second), (second, third))):
        block = f"blocks.{layer}"
        for kind in "QKV":
            state[f"{block}.attn.W_{kind}"] = torch.zeros(1, WIDTH, PAIRS)
            state[f"{block}.attn.b_{kind}"] = torch.zeros(1, PAIRS)
        state[f"{block}.attn.W_O"] = torch.zeros(1, PAIRS, WIDTH)
        state[f"{block}.attn.b_O"] = torch.zeros(WIDTH)
        state[f"{block}.mlp.W_in"] = 2 * reads.T.contiguous()
        state[f"{block}.mlp.b_in"] = -torch.ones(N)
        state[f"{block}.mlp.W_out"] = writes.clone()
        state[f"{block}.mlp.b_out"] = torch.zeros(WIDTH)
    state["blocks.0.attn.W_V"] = value
    # attention is uniform over the three tokens, and the query has nothing to copy
    state["blocks.0.attn.W_O"] = 3 * value.transpose(1, 2).contiguous()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    model, _ = load_model(str(folder))
    return model, dictionaries(model)


def dictionaries(model: LoweredModel) -> list[Dictionary]:
    """The features and decoys: latents that fire, and write where nothing reads."""
    first, second, third = features()
    generator = torch.Generator().manual_seed(1)

    def with_decoys(reads: Tensor, writes: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn(DECOYS, N, generator=generator) @ reads
        decoys = torch.zeros(DECOYS, WIDTH)
        decoys[:, JUNK] = torch.randn(DECOYS, 2, generator=generator)
        return torch.cat([reads, noise]), torch.cat([writes, decoys])

    found = []
    encoder, decoder = with_decoys(first, first)
    gate = torch.cat([torch.full((N,), -0.5), torch.full((DECOYS,), 0.3)])
    found.append(  # each latent is 0 or exactly 1
        Dictionary(
            "gated", Hook(0, "attn_out"), Hook(0, "attn_out"), encoder.T.contiguous(), decoder,
            torch.zeros(WIDTH), b_gate=gate, b_mag=torch.ones(N + DECOYS),
            r_mag=torch.full((N + DECOYS,), -40.0),
        )
    )  # fmt: skip
    for layer, (reads, writes) in enumerate(((first, second), (second, third))):
        encoder, decoder = with_decoys(reads, writes)
        encoder[:N] *= 2
        bias = torch.cat([-torch.ones(N), torch.full((DECOYS,), 0.3)])
        found.append(
            Dictionary(
                "transcoder", Hook(layer, "mlp_in"), Hook(layer, "mlp_out"),
                encoder.T.contiguous(), decoder, torch.zeros(WIDTH), b_enc=bias,
                apply_b_dec_to_input=False,
            )
        )  # fmt: skip
    return found


def task(which: str) -> Task:
    """Pairs whose two inputs both change; no prompt holds two ends of one dimension."""
    pairs = []
    for a, b, c, d in itertools.permutations(range(PAIRS), 4):
        clean, corrupt = (a, PAIRS + b, N), (c, PAIRS + d, N)
        right, wrong = (a, c) if which == "A" else (PAIRS + b, PAIRS + d)
        pairs.append(Pair(clean, corrupt, (right,), (wrong,)))
    return Task(which, tuple(pairs[::3]))


def known(which: str) -> set[str]:
    own = range(PAIRS) if which == "A" else range(PAIRS, N)
    edges = {"input->a0.h0<v>"}
    for i in own:
        edges |= {f"a0.f{i}->m0.f{i}", f"m0.f{i}->m1.f{i}", f"m1.f{i}->logits"}
    return edges


def auroc(graph: Graph, scores: np.ndarray, true: set[str]) -> float:
    """Chance that an edge of the circuit scores higher than another one; ties count half."""
    inside = np.array([edge in true for edge in graph.edge_names()])
    assert inside.sum() == len(true)
    size = np.abs(scores)
    wins = size[inside][:, None] > size[~inside]
    ties = np.isclose(size[inside][:, None], size[~inside], atol=1e-7)
    return float((wins & ~ties).mean() + 0.5 * ties.mean())


@pytest.mark.parametrize("which", ["A", "B"])
def test_the_model_does_both_tasks(toy: Any, which: str) -> None:
    model, _ = toy
    experiment = Experiment(model, task(which), get_metric("logit_diff"))
    assert experiment.plain("clean") == pytest.approx(1.0, abs=1e-4)
    assert experiment.plain("corrupt") == pytest.approx(-1.0, abs=1e-4)


@pytest.mark.parametrize("method", [eap, eap_ig, exact])
@pytest.mark.parametrize("which", ["A", "B"])
def test_latents_tell_two_computations_apart(toy: Any, which: str, method: Any) -> None:
    model, given = toy
    plain = Experiment(model, task(which), get_metric("logit_diff"), batch_size=128)
    experiment = attach(plain, given).experiment
    assert len(experiment.graph.senders) > 3 * (N + DECOYS)  # decoys fire too
    assert auroc(experiment.graph, method(experiment), known(which)) >= 0.99


def test_acdc_finds_the_known_circuit(toy: Any) -> None:
    model, given = toy
    found = {}
    for which in "AB":
        plain = Experiment(model, task(which), get_metric("logit_diff"), batch_size=128)
        experiment = attach(plain, given).experiment
        circuit, _ = acdc(experiment, 0.01)
        assert set(circuit.edges()) == known(which)
        evaluator = Evaluator(experiment)
        assert evaluator.faithfulness(circuit.in_circuit) == pytest.approx(1.0, abs=1e-5)
        assert errors_in_and_out(evaluator, circuit.in_circuit).without_errors == pytest.approx(
            1.0, abs=1e-4
        )
        found[which] = set(circuit.edges())
    assert found["A"] & found["B"] == {"input->a0.h0<v>"}


def test_components_do_not(toy: Any) -> None:
    model, _ = toy
    circuits, scores = [], []
    for which in "AB":
        experiment = Experiment(model, task(which), get_metric("logit_diff"), batch_size=128)
        circuits.append(set(acdc(experiment, 0.01)[0].edges()))
        scores.append(exact(experiment))
    assert circuits[0] == circuits[1] == {
        "input->a0.h0<v>", "a0.h0->m0", "m0->m1", "m1->logits"
    }  # fmt: skip
    np.testing.assert_allclose(scores[0], scores[1], atol=0.05)
