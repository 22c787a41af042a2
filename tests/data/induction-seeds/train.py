"""Trains the two models of this folder, ``0`` and ``1``: one recipe, two seeds.

They are small Llamas of two layers that learned nothing but to go on with random tokens that
repeat.  From the root of the repository, in about a minute each:

    python tests/data/induction-seeds/train.py 0
    python tests/data/induction-seeds/train.py 1
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH, BATCH, STEPS = 48, 24, 32, 3000
LEARNING_RATE, WARM_UP, ENOUGH = 5e-3, 100, 0.05


def draw(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``[batch, pos]`` tokens, and which of them repeat what followed before."""
    rounds = torch.randint(4, 17, (BATCH, 1), generator=generator)
    places = torch.arange(LENGTH)[None] % rounds
    first = torch.rand(BATCH, VOCABULARY - 1, generator=generator).argsort(-1) + 1
    return first.gather(1, places), torch.arange(LENGTH)[None] > rounds


def train(seed: int) -> LlamaForCausalLM:
    """Return a model trained until it goes on with what it saw."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, hidden_size=48, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=8, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    generator, smooth = torch.Generator().manual_seed(seed), 5.0
    for step in range(STEPS):
        tokens, repeats = draw(generator)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP)
        logits = model(tokens).logits[:, :-1]
        wanted = repeats[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[wanted], tokens[:, 1:][wanted])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = 0.98 * smooth + 0.02 * loss.item()
        if step % 100 == 0:
            print(step, f"{smooth:.3f}", flush=True)
        if smooth < ENOUGH:
            break
    return model.eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(int(sys.argv[1])).save_pretrained(Path(__file__).parent / sys.argv[1])
