"""Training of the small models: ordinary initial weights, AdamW, cross-entropy of what comes next.

A curriculum: the first steps draw from few tokens.  Heads that look for a token learn to in a
hundred steps where there are few of them, and then do so for any; with all tokens at once they
need thousands.

With one thread the result is the same each time on one machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.trained.model import Sizes, Transformer
from benchmarks.trained.tasks import TASKS, Example, PromptPair

__all__ = ["RECIPES", "Prompts", "Recipe", "accuracy", "as_prompts", "build_model", "train"]

IGNORED = -100
BETAS, CLIP = (0.9, 0.98), 1.0


@dataclass(frozen=True)
class Recipe:
    """How one model is made.

    Parameters
    ----------
    sizes
        Fields of :class:`Sizes` but those of the vocabulary and context.
    n_steps, batch_size, learning_rate, weight_decay
        Of AdamW.
    n_first, n_symbols_first
        For so many steps only so many tokens are drawn from.
    seed
        Of the initial weights and of the examples.
    """

    sizes: dict[str, Any]
    n_steps: int
    batch_size: int = 48
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    n_first: int = 0
    n_symbols_first: int = 0
    seed: int = 0

    def factor(self, step: int) -> float:
        """Return the learning rate of a step as a share of the peak: up, level, down."""
        return min(1.0, (step + 1) / 30, (self.n_steps - step) / (0.3 * self.n_steps))

    def as_json(self) -> dict[str, Any]:
        """Return what a card says of it."""
        return asdict(self) | {
            "optimizer": f"AdamW, betas {BETAS}, gradients clipped to {CLIP:g}",
            "schedule": "linear over 30 steps, level, linear to 0 over the last 30 %",
            "loss": "cross-entropy of the next token where the task says which it is",
        }


RECIPES: dict[str, Recipe] = {
    name: Recipe({"rotary": True}, n_steps=600, n_first=150, n_symbols_first=10)
    for name in ("trained-copy", "trained-reverse")
} | {
    "trained-sorted": Recipe({"n_layers": 1, "rotary": True}, n_steps=500),
    # weight decay makes it find the sums that it never saw
    "trained-addition": Recipe(
        {"n_layers": 1, "d_mlp": 96}, n_steps=2500, batch_size=128, learning_rate=3e-3,
        weight_decay=1.0,
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Prompts:
    """Pairs of prompts as tensors: ``[prompt, pos]``, and ``[prompt]`` for the answers."""

    clean: Tensor
    corrupt: Tensor
    answers: Tensor
    corrupt_answers: Tensor

    def __len__(self) -> int:
        return len(self.clean)


def as_prompts(pairs: Sequence[PromptPair]) -> Prompts:
    """Return pairs as tensors."""
    return Prompts(
        torch.tensor([pair.clean for pair in pairs]),
        torch.tensor([pair.corrupt for pair in pairs]),
        torch.tensor([pair.answer for pair in pairs]),
        torch.tensor([pair.corrupt_answer for pair in pairs]),
    )


def build_model(name: str) -> Transformer:
    """Return the untrained model of a recipe."""
    task, recipe = TASKS[name], RECIPES[name]
    sizes = Sizes(d_vocab=task.n_tokens, n_ctx=task.n_ctx, **recipe.sizes)
    return Transformer.drawn(sizes, recipe.seed)


def train(name: str, model: Transformer, n_steps: int | None = None) -> Iterator[float]:
    """Train a model in place; yield the loss of each step.

    Parameters
    ----------
    name
        Of the recipe.
    model
        As :func:`build_model` made it.
    n_steps
        Stop after so many steps, for trials.
    """
    task, recipe = TASKS[name], RECIPES[name]
    parameters = list(model.weights.values())
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=BETAS, weight_decay=recipe.weight_decay
    )
    rng = Random(recipe.seed)
    for step in range(n_steps or recipe.n_steps):
        few = step < recipe.n_first
        n_symbols = recipe.n_symbols_first if few else task.n_symbols
        examples = [task.draw(rng, n_symbols) for _ in range(recipe.batch_size)]
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * recipe.factor(step)
        yield _learn(model, optimizer, *_collate(examples))
    for parameter in parameters:
        parameter.requires_grad_(False)


def _learn(
    model: Transformer, optimizer: torch.optim.Optimizer, tokens: Tensor, targets: Tensor
) -> float:
    """Take one step; return the loss before it."""
    scored = targets != IGNORED
    loss = cross_entropy(model.logits(tokens)[scored], targets[scored])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(list(model.weights.values()), CLIP)
    optimizer.step()
    return loss.item()


def _collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """``[batch, pos]`` tokens and targets; what is longer than an example is never scored."""
    length = max(len(example.tokens) for example in examples)
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    targets = torch.full_like(tokens, IGNORED)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
        for at, target in example.targets.items():
            targets[row, at] = target
    return tokens, targets


@torch.no_grad()
def accuracy(model: Transformer, prompts: Prompts) -> float:
    """Share of clean prompts after which the answer is the most likely token."""
    said = model.logits(prompts.clean)[:, -1].argmax(-1)
    return (said == prompts.answers).float().mean().item()
