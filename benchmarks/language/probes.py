"""Accuracy by task and form, on combinations of words that training never had.

A prompt is a held-out document up to its last answer.  It is right if the most probable token
of the whole vocabulary is an answer; ``choice`` asks less, that the best answer is above all
wrong answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from transformer_lens.model_bridge.sources.native import NativeModel

from acdc.tasks import load_task, single_token_continuation
from benchmarks.language.documents import DOCUMENTS, Document

__all__ = ["Probe", "Score", "induction_probes", "last_logits", "probes_of", "score", "score_all"]


@dataclass(frozen=True)
class Probe:
    """A prompt's tokens, and the tokens that are right and wrong after it."""

    tokens: tuple[int, ...]
    right: tuple[int, ...]
    wrong: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True)
class Score:
    """What a model does on the prompts of one form.

    Parameters
    ----------
    n_prompts
        How many.
    accuracy
        Share whose most probable token is right.
    choice
        Share whose best right token is above every wrong one.
    margin
        Mean logit of the right tokens' best minus that of the wrong ones'.
    """

    n_prompts: int
    accuracy: float
    choice: float
    margin: float


def probes_of(tokenizer: Any, task: str, form: str, number: int, seed: int) -> list[Probe]:
    """Return prompts of held-out combinations."""
    rng = Random(f"probes/{seed}/{task}/{form}")
    return [_probe(tokenizer, DOCUMENTS[task][form](rng, True)) for _ in range(number)]


def _probe(tokenizer: Any, document: Document) -> Probe:
    prompt = document.prompt

    def tokens(texts: Sequence[str]) -> tuple[int, ...]:
        return tuple(single_token_continuation(tokenizer, prompt, text) for text in texts)

    right, wrong = tokens(document.answers), tokens(document.wrong)
    return Probe(tuple(tokenizer.encode(prompt)), right, wrong, prompt)


def induction_probes(tokenizer: Any, number: int, seed: int) -> list[Probe]:
    """Return random tokens that begin again, as the task induction has them."""
    task = load_task("induction", tokenizer, n_prompts=number, seed=seed)
    return [Probe(pair.clean, pair.answers, pair.wrong_answers) for pair in task.pairs]


@torch.no_grad()
def last_logits(
    model: NativeModel, prompts: Sequence[Sequence[int]], size: int = 64
) -> torch.Tensor:
    """Return the logits after each prompt, ``[prompt, d_vocab]``; lengths may differ."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = torch.empty(len(prompts), model.cfg.d_vocab)
    for start in range(0, len(order), size):
        some = order[start : start + size]
        lengths = torch.tensor([len(prompts[i]) for i in some])
        tokens = torch.zeros(len(some), int(lengths.max()), dtype=torch.long)
        for row, i in enumerate(some):
            tokens[row, : len(prompts[i])] = torch.tensor(prompts[i])
        found[some] = model(tokens)[torch.arange(len(some)), lengths - 1]
    return found


def score(model: NativeModel, probes: Sequence[Probe]) -> Score:
    """Return how a model does on some prompts."""
    logits = last_logits(model, [probe.tokens for probe in probes])
    n_right = n_chosen = 0
    total = 0.0
    for row, probe in zip(logits, probes, strict=True):
        margin = (row[list(probe.right)].max() - row[list(probe.wrong)].max()).item()
        n_right += int(row.argmax()) in probe.right
        n_chosen += margin > 0
        total += margin
    n = len(probes)
    return Score(n, n_right / n, n_chosen / n, total / n)


def score_all(
    model: NativeModel, tokenizer: Any, number: int, seed: int
) -> dict[str, dict[str, Score]]:
    """Return the scores of every task and form, and of induction."""
    found = {
        task: {form: score(model, probes_of(tokenizer, task, form, number, seed)) for form in forms}
        for task, forms in DOCUMENTS.items()
    }
    return found | {"induction": {"task": score(model, induction_probes(tokenizer, number, seed))}}
