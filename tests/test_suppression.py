"""Copy suppression is seen where it was written by hand, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from acdc.errors import TaskError
from acdc.measure.suppression import measure_copy_suppression
from acdc.models import load_model
from acdc.models.lowering import LoweredModel

N, LENGTH = 10, 7
TOKEN, SAID = slice(0, N), slice(N, 2 * N)
D_HEAD, SHARP = N + 1, 40.0
D_MODEL = 2 * N + 1
CONFIG = {
    "n_layers": 2, "n_heads": 2, "d_model": D_MODEL, "d_head": D_HEAD, "d_mlp": None,
    "n_ctx": LENGTH, "d_vocab": N, "attn_only": True, "normalization_type": None,
    "positional_embedding_type": "standard", "act_fn": "relu",
}  # fmt: skip
MARKED = 2
"""Position that the copying head attends to."""


def write(folder: Path, sign: float) -> LoweredModel:
    """a0.h0 predicts the token at a position; a1.h1 looks for what is predicted and writes it.

    With ``sign`` -1 it writes against it.  The others write nothing.
    """
    eye, d_model = torch.eye(N), D_MODEL
    state = {
        "embed.W_E": torch.zeros(N, d_model), "pos_embed.W_pos": torch.zeros(LENGTH, d_model),
        "unembed.W_U": torch.zeros(d_model, N), "unembed.b_U": torch.zeros(N),
    }  # fmt: skip
    state["embed.W_E"][:, TOKEN] = eye
    state["pos_embed.W_pos"][MARKED, -1] = 1
    state["unembed.W_U"][SAID] = eye
    for layer in range(2):
        part = f"blocks.{layer}.attn."
        state |= {f"{part}W_{kind}": torch.zeros(2, d_model, D_HEAD) for kind in "QKV"}
        state |= {f"{part}b_{kind}": torch.zeros(2, D_HEAD) for kind in "QKV"}
        state |= {f"{part}W_O": torch.zeros(2, D_HEAD, d_model), f"{part}b_O": torch.zeros(d_model)}
    first, second = "blocks.0.attn.", "blocks.1.attn."
    state[f"{first}b_Q"][0, -1] = SHARP
    state[f"{first}W_K"][0, -1, -1] = 1
    state[f"{first}W_V"][0, TOKEN, :N] = eye
    state[f"{first}W_O"][0, :N, SAID] = 5 * eye
    state[f"{second}W_Q"][1, SAID, :N] = SHARP * eye
    state[f"{second}W_K"][1, TOKEN, :N] = eye
    state[f"{second}W_V"][1, TOKEN, :N] = eye
    state[f"{second}W_O"][1, :N, SAID] = sign * 2 * eye
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(state, folder / "model.safetensors")
    return load_model(str(folder))[0]


def prompts(n: int = 20) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [LENGTH - i % 2 for i in range(n)]
    return [torch.randperm(N, generator=generator)[:length].tolist() for length in lengths]


def test_a_head_that_suppresses_is_found(tmp_path: Path) -> None:
    found = measure_copy_suppression(write(tmp_path / "model", -1), prompts())
    assert found.heads() == ["a1.h1"]
    assert found.share[1][1] == 1
    assert found.attention[1][1] > 0.99
    # 2 against it, and the mean of all logits falls by 2 / N
    assert found.effect[1][1] == pytest.approx(-2 * (1 - 1 / N), abs=1e-2)
    assert found.effect[1][0] == found.effect[0][1] == 0


def test_a_head_that_copies_is_none(tmp_path: Path) -> None:
    found = measure_copy_suppression(write(tmp_path / "model", 1), prompts())
    assert found.heads() == []
    assert found.attention[1][1] > 0.99
    assert found.effect[1][1] == pytest.approx(2 * (1 - 1 / N), abs=1e-2)


def test_short_prompts_are_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "model", -1)
    with pytest.raises(TaskError, match="at least 3 tokens, the shortest of 2 has 2"):
        measure_copy_suppression(model, [[1, 2, 3], [1, 2]])
    with pytest.raises(TaskError, match="the shortest of 0 has 0"):
        measure_copy_suppression(model, [])


@pytest.mark.online
def test_head_10_7_of_gpt2_suppresses_copies() -> None:
    """McDougall et al. 2023, on their own example and ones like it."""
    model, tokenizer = load_model("gpt2")
    texts = ["All's fair in love and", "Blood is thicker than water, and water is thicker than"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    found = measure_copy_suppression(model, ids)
    assert found.effect[10][7] < 0
