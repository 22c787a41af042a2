"""Attention patterns of heads on example prompts, small enough for a page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.models.lowering.model import LoweredModel
from acdc.tasks.base import Pair
from acdc.tasks.texts import Texts, visible

__all__ = ["Patterns", "attention_patterns", "encode_patterns"]

MOST_TOKENS = 64
MOST_BYTES = 1_200_000


@dataclass(frozen=True)
class Patterns:
    """Example prompts, and what heads do on them.

    Parameters
    ----------
    prompts
        One per pair: ``clean`` and ``corrupt`` (token texts, the last :data:`MOST_TOKENS`),
        ``n_left_out`` tokens before them, ``scored`` positions among those shown, texts of the
        ``answers`` and ``wrong`` ones.
    patterns
        ``layer.head`` -> for each prompt the patterns on its clean and its corrupt run:
        ``[query, key]`` in units of 1/255, one byte each, in base64.  Heads that found no room
        are not there.
    """

    prompts: list[dict[str, Any]]
    patterns: dict[str, list[list[str]]]


@torch.no_grad()
def attention_patterns(model: LoweredModel, tokens: Sequence[int]) -> list[NDArray[np.float32]]:
    """Return what every head attends to on one prompt.

    Parameters
    ----------
    model
        Any.
    tokens
        ``[pos]``: token ids.

    Returns
    -------
    list
        By layer ``[head, query position, key position]``; each row sums to 1.
    """
    trace = model.forward(torch.tensor([list(tokens)], device=model.device))
    return [
        layer.attention.patterns(q, k)[0].float().cpu().numpy()
        for layer, q, k in zip(model.layers, trace.q, trace.k, strict=True)
    ]


def encode_patterns(
    experiment: Experiment, texts: Texts, heads: Sequence[tuple[int, int]], n_prompts: int
) -> Patterns:
    """Return the patterns of heads on the first prompts of a task.

    Parameters
    ----------
    experiment
        Model and task.
    texts
        Of token ids.
    heads
        ``(layer, head)``, the most important first: those that find no room are left out.
    n_prompts
        Pairs, at least 1.
    """
    pairs = experiment.task.pairs[:n_prompts]
    each = sum(2 * min(len(pair.clean), MOST_TOKENS) ** 2 for pair in pairs)
    fitting = heads[: MOST_BYTES // each]
    found: dict[str, list[list[str]]] = {f"{layer}.{head}": [] for layer, head in fitting}
    for pair in pairs:
        clean, corrupt = (
            attention_patterns(experiment.model, run) for run in (pair.clean, pair.corrupt)
        )
        for layer, head in fitting:
            both = [_encoded(run[layer][head]) for run in (clean, corrupt)]
            found[f"{layer}.{head}"].append(both)
    separate = experiment.model.d_vocab_out != experiment.model.d_vocab
    outputs = Texts(None) if separate else texts
    return Patterns([_prompt(pair, texts, outputs) for pair in pairs], found)


def _encoded(pattern: NDArray[np.float32]) -> str:
    """The last positions of ``[query, key]``, a byte each."""
    last = pattern[-MOST_TOKENS:, -MOST_TOKENS:]
    return base64.b64encode(np.rint(255 * last).astype(np.uint8).tobytes()).decode()


def _prompt(pair: Pair, texts: Texts, outputs: Texts) -> dict[str, Any]:
    n_left_out = max(0, len(pair.clean) - MOST_TOKENS)
    shown = slice(n_left_out, None)
    return {
        "clean": [visible(texts(token)) for token in pair.clean[shown]],
        "corrupt": [visible(texts(token)) for token in pair.corrupt[shown]],
        "n_left_out": n_left_out,
        "scored": [at - n_left_out for at in pair.scored if at >= n_left_out],
        "answers": [visible(outputs(token)) for token in pair.answers],
        "wrong": [visible(outputs(token)) for token in pair.wrong_answers],
    }
