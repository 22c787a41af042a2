"""What is measured: models of random weights and prompts of random tokens, and bundled ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.models import load_model
from acdc.models.lowering.model import LoweredModel
from acdc.tasks import Pair, Task, load_task

__all__ = [
    "Size",
    "bundled_experiment",
    "random_bridge",
    "random_folder",
    "random_model",
    "random_task",
]

CORRUPTED = (2, 4, 9)
"""Positions at which the two prompts of a pair differ."""


@dataclass(frozen=True)
class Size:
    """Shape of a random GPT-2 and of its prompts; as GPT-2 small by default.

    Parameters
    ----------
    scale
        By which every matrix (embeddings too) is multiplied after Hugging Face's own
        initialisation; with 2, fewer nodes die in ACDC than with 1.
    """

    n_layers: int = 12
    d_model: int = 768
    n_heads: int = 12
    d_vocab: int = 50257
    n_ctx: int = 64
    scale: float = 1.0
    n_prompts: int = 16
    n_pos: int = 15
    seed: int = 0

    @property
    def name(self) -> str:
        """What tables call the model."""
        weights = "HF init" if self.scale == 1.0 else f"HF init x {self.scale:g}"
        return f"random {self.n_layers} x {self.d_model}, {weights}"


def _random_module(size: Size) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=size.d_vocab,
        n_positions=size.n_ctx,
        n_embd=size.d_model,
        n_layer=size.n_layers,
        n_head=size.n_heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(size.seed)
        module: Any = GPT2LMHeadModel(config).eval()
        for weight in module.parameters():  # the tied unembedding comes once
            if weight.dim() >= 2:
                weight *= size.scale
    module.set_attn_implementation("eager")  # what the bridge runs
    return module


@contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    yield
    if shown:
        logging.enable_progress_bar()


@contextmanager
def random_folder(size: Size) -> Iterator[Path]:
    """Build a random GPT-2 in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="acdc-bench-") as folder:
        with _no_bars():
            _random_module(size).save_pretrained(Path(folder))
        yield Path(folder)


@contextmanager
def random_model(size: Size, device: str) -> Iterator[LoweredModel]:
    """Build a random GPT-2, write it to a temporary folder and load that as users do."""
    with random_folder(size) as folder:
        model, _ = load_model(str(folder), device=device)
    yield model


def random_bridge(size: Size, device: str) -> Any:
    """Return the same model as TransformerLens runs it."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    module = _random_module(size).to(device)
    bridge = build_bridge_from_module(
        module,
        "GPT2LMHeadModel",
        hf_config=module.config,
        dtype=torch.float32,
        device=torch.device(device),
        model_name="random",
    )
    return bridge.eval()


def random_task(size: Size) -> Task:
    """Draw pairs of random tokens that differ at :data:`CORRUPTED`."""
    rng = Random(size.seed)

    def pair() -> Pair:
        clean = [rng.randrange(size.d_vocab) for _ in range(size.n_pos)]
        corrupt = list(clean)
        for at in CORRUPTED:
            if at < size.n_pos - 1:
                corrupt[at] = (clean[at] + rng.randrange(1, size.d_vocab)) % size.d_vocab
        answer, wrong = rng.sample(range(size.d_vocab), 2)
        return Pair(tuple(clean), tuple(corrupt), (answer,), (wrong,))

    return Task("random", tuple(pair() for _ in range(size.n_prompts)))


def bundled_experiment(
    model: str, task: str, metric: str, device: str, n_prompts: int
) -> Experiment:
    """Return a bundled model on a built-in task."""
    lowered, tokenizer = load_model(model, device=device)
    return Experiment(lowered, load_task(task, tokenizer, n_prompts=n_prompts), get_metric(metric))
