"""A model of two layers that does induction, its weights set by hand: a known circuit to find.

The stream has four parts: the token, the token before, the position, and what comes next.  One head
of layer 0 writes the token before; one of layer 1 looks for the token after an earlier copy of the
present one, and writes it as what comes next.  The other heads write noise that is tiny.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["N_TOKENS", "circuit_edges", "save_induction"]

N_TOKENS, LENGTH = 40, 20
_TOKEN, _BEFORE, _PLACE, _NEXT = 0, N_TOKENS, 2 * N_TOKENS, 2 * N_TOKENS + LENGTH
_WIDTH = 3 * N_TOKENS + LENGTH
_SHARP = 60.0 * N_TOKENS**0.5  # scores are divided by the root of the width


def save_induction(
    folder: Path,
    *,
    heads: tuple[int, int] = (0, 1),
    n_heads: int = 3,
    strength: tuple[float, float] = (1.0, 1.0),
    seed: int = 0,
) -> Path:
    """Write the model as a native folder.

    Parameters
    ----------
    folder
        Where to.
    heads
        Index of the previous-token head in layer 0, and of the induction head in layer 1.
    n_heads
        In each layer.
    strength
        How sharply each of the two attends; at 0 it is one of the others.
    seed
        Of the noise.
    """
    g = torch.Generator().manual_seed(seed)
    state = {
        "embed.W_E": torch.zeros(N_TOKENS, _WIDTH),
        "pos_embed.W_pos": torch.zeros(LENGTH, _WIDTH),
        "unembed.W_U": torch.zeros(_WIDTH, N_TOKENS),
        "unembed.b_U": torch.zeros(N_TOKENS),
    }
    state["embed.W_E"][:, _TOKEN : _TOKEN + N_TOKENS] = torch.eye(N_TOKENS)
    state["pos_embed.W_pos"][:, _PLACE : _PLACE + LENGTH] = torch.eye(LENGTH)
    state["unembed.W_U"][_NEXT:] = 8 * torch.eye(N_TOKENS)
    for layer in range(2):
        for name in ("Q", "K", "V"):
            state[f"blocks.{layer}.attn.W_{name}"] = torch.zeros(n_heads, _WIDTH, N_TOKENS)
            state[f"blocks.{layer}.attn.b_{name}"] = torch.zeros(n_heads, N_TOKENS)
        noise = 1e-4 * torch.randn(n_heads, N_TOKENS, _WIDTH, generator=g)
        state[f"blocks.{layer}.attn.W_O"] = noise
        state[f"blocks.{layer}.attn.b_O"] = torch.zeros(_WIDTH)
        values = torch.randn(n_heads, _WIDTH, N_TOKENS, generator=g) / _WIDTH**0.5
        state[f"blocks.{layer}.attn.W_V"] = values
    _set(state, 0, heads[0], _PLACE, _PLACE, _BEFORE, strength[0])
    _set(state, 1, heads[1], _TOKEN, _BEFORE, _NEXT, strength[1])
    config = {
        "n_layers": 2, "d_model": _WIDTH, "d_head": N_TOKENS, "n_heads": n_heads, "n_ctx": LENGTH,
        "d_vocab": N_TOKENS, "normalization_type": None, "attn_only": True,
        "positional_embedding_type": "standard",
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in state.items()},
              folder / "model.safetensors")  # fmt: skip
    return folder


def _set(
    state: dict[str, torch.Tensor], layer: int, head: int, query: int, key: int, out: int,
    strength: float,
) -> None:  # fmt: skip
    """Let a head look from one part of the stream for another, and write the token there."""
    if not strength:
        return
    attn, n = f"blocks.{layer}.attn", LENGTH if query == _PLACE else N_TOKENS
    back = 1 if query == _PLACE else 0  # a position looks for the one before it
    rows = torch.arange(back, n)
    state[f"{attn}.W_Q"][head, query + rows, rows - back] = strength * _SHARP
    state[f"{attn}.W_K"][head, key : key + n, :n] = torch.eye(n)
    state[f"{attn}.W_V"][head] = 0
    state[f"{attn}.W_V"][head, _TOKEN : _TOKEN + N_TOKENS] = torch.eye(N_TOKENS)
    state[f"{attn}.W_O"][head] = 0
    state[f"{attn}.W_O"][head, :, out : out + N_TOKENS] = torch.eye(N_TOKENS)


def circuit_edges(heads: tuple[int, int] = (0, 1)) -> set[str]:
    """Edges that carry the answer where the first round is made of other tokens."""
    before, induction = f"a0.h{heads[0]}", f"a1.h{heads[1]}"
    return {
        f"input->{before}<v>", f"{before}->{induction}<k>", f"input->{induction}<v>",
        f"{induction}->logits",
    }  # fmt: skip
