"""Zero ablation where a node writes zero until one of its own inputs is ablated, by hand.

Prompt: two tokens.  ``m0`` writes 1 at both positions, but head ``a0.h0`` hushes it at the last
one.  The logit of ``yes`` reads ``m0`` at the first position through ``a1.h0`` (times 2), and at
the last directly (times -1).  So ``m0->logits`` carries zero and goes out without an evaluation;
once it is out, ``a0.h0->m0`` changes nothing: what ``m0`` then writes is not read.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import PatchedModel
from acdc.methods.acdc import acdc
from acdc.models import load_model
from acdc.tasks.base import Pair, Task
from acdc.tasks.positions import find_positions

NO, YES = 0, 1
FIRST, LAST, WORD, HUSH, SEEN, OUT = range(6)  # directions of the stream
CONFIG = {
    "n_layers": 2, "n_heads": 1, "d_model": 6, "d_head": 1, "d_mlp": 1, "n_ctx": 2, "d_vocab": 2,
    "act_fn": "relu", "normalization_type": None, "positional_embedding_type": "standard",
    "attn_scale": 1.0,
}  # fmt: skip
WANTED = {"input->m0", "input->a1.h0<q>", "input->a1.h0<k>", "m0->a1.h0<v>", "a1.h0->logits"}


def weights() -> dict[str, Tensor]:
    state = {
        "embed.W_E": torch.zeros(2, 6), "pos_embed.W_pos": torch.zeros(2, 6),
        "unembed.W_U": torch.zeros(6, 2), "unembed.b_U": torch.zeros(2),
    }  # fmt: skip
    for layer in (0, 1):
        state |= {f"blocks.{layer}.attn.W_{kind}": torch.zeros(1, 6, 1) for kind in "QKV"}
        state |= {f"blocks.{layer}.attn.b_{kind}": torch.zeros(1, 1) for kind in "QKV"}
        state |= {
            f"blocks.{layer}.attn.W_O": torch.zeros(1, 1, 6),
            f"blocks.{layer}.attn.b_O": torch.zeros(6),
            f"blocks.{layer}.mlp.W_in": torch.zeros(6, 1),
            f"blocks.{layer}.mlp.b_in": torch.zeros(1),
            f"blocks.{layer}.mlp.W_out": torch.zeros(1, 6),
            f"blocks.{layer}.mlp.b_out": torch.zeros(6),
        }
    state["embed.W_E"][:, WORD] = 1
    state["pos_embed.W_pos"][0, FIRST] = state["pos_embed.W_pos"][1, LAST] = 1
    for layer, source, value, out in ((0, LAST, LAST, HUSH), (1, FIRST, SEEN, OUT)):
        state[f"blocks.{layer}.attn.W_Q"][0, LAST] = 50  # the last position looks at one alone
        state[f"blocks.{layer}.attn.W_K"][0, source] = 1
        state[f"blocks.{layer}.attn.W_V"][0, value] = 1
        state[f"blocks.{layer}.attn.W_O"][0, 0, out] = 1
    state["blocks.0.mlp.W_in"][[WORD, HUSH], 0] = torch.tensor([1.0, -2.0])
    state["blocks.0.mlp.W_out"][0, SEEN] = 1
    state["unembed.W_U"][[OUT, SEEN], YES] = torch.tensor([2.0, -1.0])
    return state


@pytest.mark.parametrize("positions", ["none", "token"])
def test_an_edge_that_carried_zero_stays_out(positions: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), tmp_path / "model.safetensors")
    model, _ = load_model(str(tmp_path))
    task = Task("hushed", (Pair((YES, YES), (NO, NO), (YES,), (NO,)),))
    experiment = Experiment(
        model,
        task,
        get_metric("logit_diff"),
        intervention="zero",
        positions=None if positions == "none" else find_positions(task, positions),
    )
    circuit, _ = acdc(experiment, 0.5)
    components = np.array(experiment.graph.components.edge_names())
    kept = set(components[experiment.graph.edge_component[circuit.in_circuit]])
    assert kept == WANTED
    assert PatchedModel(experiment).metric(circuit.in_circuit) == pytest.approx(2.0)
