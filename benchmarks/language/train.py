"""Training that can be stopped at any time, and goes on as if it had not been.

The learning rate warms up, stays, and falls to zero over the last steps (warm-up, stable,
decay): a training whose end is put off begins again where the fall began, which is kept.
Matrices inside the blocks are trained by Muon, all other parameters by AdamW.

What decides a step is the weights, the optimizers' state and the step's number (its batch is a
function of the seed and that number, see :class:`~benchmarks.language.data.Batches`), so a
checkpoint of the three is all: a training that was killed goes on bit by bit as if it had not
been, at the same number of threads on the same kind of machine.

References
----------
Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Hu et al. 2024,
"MiniCPM" (warm-up, stable, decay).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformer_lens.model_bridge.sources.native import NativeModel
from transformers import PreTrainedTokenizerFast

from benchmarks.language.data import Batches, Mixture, encode_corpus
from benchmarks.language.documents import sample_texts
from benchmarks.language.model import config_of, make_model, scored_logits, write_folder
from benchmarks.language.source import read_corpus
from benchmarks.language.tokenizer import build_tokenizer

__all__ = ["MIXTURES", "Schedule", "Trainer", "mixture_at", "pool_at", "prepare", "train"]

MUON_RATE, ADAM_RATE = 0.01, 3e-3
"""Peaks of the learning rate: of matrices inside blocks, of everything else."""

MUON_DECAY, ADAM_DECAY = 0.05, 0.01
CLIP = 1.0
"""Largest norm of a gradient."""

KEPT_STEPS = (
    0, 50, 100, 150, 200, 250, 300, 400, 500, 600, 700, 800, 1000, 1200, 1600, 2000, 2400, 3200,
    4000, 4800, 6400, 9600,
)  # fmt: skip
"""Steps whose weights are kept; beyond them every 3200th."""

_IOI = ("abba", "baba", "order", "absent", "trio", "abc", "new")
_OTHERS = (
    ("docstring", "task"), ("docstring", "any"), ("greater-than", "task"),
    ("greater-than", "other"), ("pronoun", "any"), ("acronym", "any"), ("sentiment", "any"),
    ("counting", "on"), ("counting", "items"), ("capitals", "any"),
)  # fmt: skip


def _mixture(
    ioi: tuple[int, ...], others: tuple[int, ...], n_repeats: int, n_texts: int
) -> Mixture:
    numbers = (*ioi, *others)
    forms = (*(("ioi", form) for form in _IOI), *_OTHERS)
    return Mixture(dict(zip(forms, numbers, strict=True)), n_repeats, n_texts)


MIXTURES: tuple[tuple[int, Mixture], ...] = (
    # heads that look for repeats come first, and what has to find a name may use them
    (0, Mixture({}, n_repeats=48, n_texts=0)),
    (500, _mixture((9, 9, 9, 6, 9, 7, 4), (4, 6, 1, 1, 1, 1, 1, 2, 1, 1), n_repeats=12, n_texts=2)),
    (
        2000,
        _mixture((8, 8, 9, 6, 10, 6, 4), (4, 7, 1, 1, 1, 1, 1, 3, 1, 1), n_repeats=10, n_texts=4),
    ),
)
"""From which step on what is read: a curriculum."""

POOL, POOL_STEPS, POOL_GROWTH = 40, 250, (25, 1.5)
"""Tokens that repeats are drawn from at first, for how many steps, and that they are so many times
more after every so many steps. With all tokens at once a repeat is not found in a thousand steps,
with few of them in two hundred; heads that have found it do so for any token."""


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step, as a share of the peak.

    Parameters
    ----------
    n_steps
        When training ends.
    n_decay
        Steps over which the rate falls to zero.
    n_warmup
        Steps over which it rises.
    """

    n_steps: int
    n_decay: int
    n_warmup: int = 100

    @property
    def decay_start(self) -> int:
        """The first step with a falling rate."""
        return self.n_steps - self.n_decay

    def factor(self, step: int) -> float:
        """Return the share of the peak.

        Examples
        --------
        >>> schedule = Schedule(n_steps=1000, n_decay=200, n_warmup=100)
        >>> [schedule.factor(step) for step in (0, 99, 500, 800, 900, 999)]
        [0.01, 1.0, 1.0, 1.0, 0.5, 0.005]
        """
        rising = (step + 1) / self.n_warmup
        falling = (self.n_steps - step) / self.n_decay if self.n_decay else 1.0
        return min(1.0, rising, falling)


def mixture_at(step: int) -> Mixture:
    """Return what a step reads."""
    mixture = [mixture for first, mixture in MIXTURES if first <= step][-1]
    return replace(mixture, n_pool=pool_at(step))


def pool_at(step: int) -> int:
    """Return how many tokens repeats are drawn from, at most.

    Examples
    --------
    >>> [pool_at(step) for step in (0, 249, 250, 300, 500)]
    [40, 40, 60, 135, 3459]
    """
    every, factor = POOL_GROWTH
    return int(POOL * factor ** max(0, (step - POOL_STEPS) // every + 1))


class Trainer:
    """A model, its optimizers and the number of the next step.

    Parameters
    ----------
    model
        The model, in float32.
    """

    def __init__(self, model: NativeModel) -> None:
        self.model, self.step = model, 0
        parameters = dict(model.named_parameters())
        inner = [name for name, p in parameters.items() if p.ndim == 2 and "layers." in name]
        outer = [name for name in parameters if name not in inner]
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                [parameters[name] for name in inner], lr=MUON_RATE, weight_decay=MUON_DECAY
            ),
            torch.optim.AdamW(
                [parameters[name] for name in outer],
                lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=ADAM_DECAY,
            ),
        )  # fmt: skip
        self._peaks = (MUON_RATE, ADAM_RATE)

    @classmethod
    def of_run(cls, folder: Path, config: dict[str, Any], seed: int) -> Trainer:
        """Return what a training's folder holds."""
        trainer = cls(make_model(config, seed))
        trainer.load(folder / "state.pt")
        return trainer

    def learn(self, batch: list[tuple[torch.Tensor, torch.Tensor]], factor: float) -> float:
        """Take one step on the parts of a batch; return the weighted mean cross-entropy.

        Matrix products run in bfloat16, sums and weights in float32.
        """
        total = sum(weights[:, 1:].sum().item() for _, weights in batch)
        found = 0.0
        for tokens, weights in batch:
            scored = weights[:, 1:] > 0  # a token is predicted where the one before stands
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = scored_logits(self.model, tokens[:, :-1], scored)
            losses = cross_entropy(logits.float(), tokens[:, 1:][scored], reduction="none")
            loss = (losses * weights[:, 1:][scored]).sum() / total
            loss.backward()
            found += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer, peak in zip(self.optimizers, self._peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return found

    def save(self, path: Path, schedule: Schedule) -> None:
        """Write all that the next step depends on; a stop in the midst leaves the old file."""
        state = {
            "step": self.step,
            "schedule": asdict(schedule),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> Schedule:
        """Go back to what was saved; return the schedule it was under."""
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return Schedule(**state["schedule"])


def prepare(
    folder: Path, config: dict[str, Any], seed: int, n_files: int | None = None
) -> tuple[PreTrainedTokenizerFast, Batches]:
    """Return the tokenizer and the batches; what takes a while is kept in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path, text, about = (folder / name for name in ("tokenizer", "text.npy", "text.json"))
    if not text.is_file():
        corpus = read_corpus(n_files=n_files)
        texts = (*corpus.prose, *corpus.source, *sample_texts(seed))
        tokenizer = build_tokenizer(texts, config["d_vocab"])
        tokenizer.save_pretrained(str(path))
        tokens = encode_corpus(tokenizer, corpus)
        facts = {"n_tokens": len(tokens), "n_files": len(corpus.source), "sha256": corpus.digest}
        about.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        with text.open("wb") as file:  # last: it says that the rest is there
            np.save(file, tokens)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    return tokenizer, Batches(tokenizer, np.load(text), seed)


def train(
    folder: Path,
    schedule: Schedule,
    *,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    n_files: int | None = None,
    save_every: int = 25,
) -> Iterator[tuple[int, float]]:
    """Train until the schedule ends; yield each step's number and loss.

    Parameters
    ----------
    folder
        Holds everything: ``state.pt`` (what goes on), ``stable.pt`` (where the rate began to
        fall), ``checkpoints/STEP`` (model folders in half precision), ``log.jsonl``.
    schedule
        May be longer or shorter than the one before: what was learned at a falling rate is
        then dropped.
    seed
        Of the first weights and of all batches.
    config
        TransformerBridgeConfig fields.
    n_files
        Only so many files of the standard library, for trials.
    save_every
        Steps between two writes of ``state.pt``.
    """
    config = config or config_of()
    tokenizer, batches = prepare(folder, config, seed, n_files)
    trainer = Trainer(make_model(config, seed))
    _resume(trainer, folder, schedule)
    started = time.perf_counter()
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        while trainer.step < schedule.n_steps:
            step = trainer.step
            if step in KEPT_STEPS or step % 3200 == 0:
                _keep(trainer, folder, config, tokenizer)
            if step == schedule.decay_start:
                trainer.save(folder / "stable.pt", schedule)
            loss = trainer.learn(batches.batch(step, mixture_at(step)), schedule.factor(step))
            seconds = time.perf_counter() - started
            log.write(json.dumps({"step": step, "loss": loss, "seconds": seconds}) + "\n")
            log.flush()
            if trainer.step % save_every == 0 or trainer.step == schedule.n_steps:
                trainer.save(folder / "state.pt", schedule)
            yield step, loss
    _keep(trainer, folder, config, tokenizer)


def _resume(trainer: Trainer, folder: Path, schedule: Schedule) -> None:
    """Load what was saved; where it was on a falling rate of another end, what stood before."""
    if not (folder / "state.pt").is_file():
        return
    before = trainer.load(folder / "state.pt")
    if before != schedule and trainer.step > before.decay_start:
        trainer.load(folder / "stable.pt")


def _keep(
    trainer: Trainer, folder: Path, config: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    write_folder(folder / "checkpoints" / f"{trainer.step:06d}", trainer.model, config, tokenizer)
