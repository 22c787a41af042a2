"""Train small dictionaries: ``python -m benchmarks.train_dictionaries [MODEL...]``.

For each bundled model a top-k SAE on the attention output and on the MLP output of every layer,
and a transcoder of every MLP, on prompts of the model's tasks.  What writes the same on every
token (the bundled models' training left some of it without a use) has nothing to take apart and
gets none; the card lists it.  They are written in SAELens'
layout to ``acdc/bundled/<model>/dictionaries/<hook>/``, beside ``card.json`` with their quality on
prompts that training never saw.

``--model FOLDER --out FOLDER`` does the same for any model on texts that it samples itself.

Transcoders are trained with batch-top-k, whose mean cut-off becomes the threshold of a
``jumprelu_transcoder``: SAELens has no top-k transcoder.

References
----------
Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (top-k, auxiliary loss for dead
latents).  Bussmann et al. 2024, "BatchTopK Sparse Autoencoders".  Dunefsky et al. 2024,
"Transcoders Find Interpretable LLM Feature Circuits".
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from acdc.dictionaries import (
    Dictionary,
    Hook,
    activation,
    read_dictionary,
    write_dictionary,
)
from acdc.dictionaries.activations import group_by_length
from acdc.dictionaries.quality import Quality, quality_on_task, quality_on_tokens, quality_table
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.errors import InputError, OptionError
from acdc.models import MODELS, load_model
from acdc.models.lowering import LoweredModel
from acdc.runs.folder import versions
from acdc.tasks import Task, Tokenizer, load_task
from graphs.files.whole import write_json

HELD_OUT_SEED = 1_000_000
N_HELD_OUT = 256
"""Pairs of every task and corruption that the figures on the card are measured on."""
CORRUPTIONS = {
    "ioi": ("abc",),
    "pronoun": ("other_gender",),
    "docstring": ("random_def_doc", "random_def", "random_doc", "random_answer"),
    "greater-than": ("year_01",),
    "induction": ("random_first",),
}
"""Of the pairs that are trained on: another corruption of a task changes no shipped dictionary."""

BATCH = 64
AUXILIARY = 1 / 32
"""Weight of the auxiliary loss (Gao et al. 2024, appendix A.2)."""
CONSTANT = 1e-6
"""An activation that varies less than this share of its size gets no dictionary."""
THRESHOLD_MEMORY = 0.99
"""How slowly the running mean of the batch-top-k cut-off forgets."""

Prompts = list[tuple[int, ...]]
Measure = Callable[[Dictionary], dict[str, Quality]]


@dataclass(frozen=True)
class Recipe:
    """How dictionaries are trained.

    Parameters
    ----------
    n_latents, k
        Width, and latents that are active per token (on average in transcoders).
    n_steps, batch_size, learning_rate
        Adam with tokens in random order; the rate falls as half a cosine after a warm-up.
    dead_after
        Steps without activity after which a latent counts as dead in the auxiliary loss.
    seed
        Of initial weights and order.
    stored_as
        Type that weights are written in: float32 or float16.
    """

    n_latents: int
    k: int
    n_steps: int = 2000
    batch_size: int = 512
    learning_rate: float = 2e-3
    dead_after: int = 50
    seed: int = 0
    stored_as: str = "float32"

    @property
    def stored(self) -> torch.dtype:
        """The type that weights are written in."""
        return {"float32": torch.float32, "float16": torch.float16}[self.stored_as]


@dataclass(frozen=True)
class Bundle:
    """What a bundled model's dictionaries are trained on: pairs of every task's corruptions."""

    recipe: Recipe
    n_pairs: dict[str, int]


BUNDLES: dict[str, Bundle] = {
    "language-small": Bundle(
        Recipe(n_latents=512, k=16, stored_as="float16"),
        {"ioi": 2048, "pronoun": 512, "docstring": 512, "greater-than": 512, "induction": 512},
    ),
    "ioi-small": Bundle(Recipe(n_latents=512, k=16), {"ioi": 4096, "pronoun": 1024}),
    "docstring-small": Bundle(Recipe(n_latents=512, k=16), {"docstring": 768}),
}


# Prompts


def task_prompts(
    tokenizer: Tokenizer | None, n_pairs: dict[str, int]
) -> tuple[Prompts, list[Task]]:
    """Return the prompts to train on, clean and corrupt, and each task's held-out pairs.

    No held-out prompt is among those to train on.
    """
    held_out, prompts = [], []
    for name, n in n_pairs.items():
        held_out.append(held_out_pairs(name, tokenizer))
        for number, corruption in enumerate(CORRUPTIONS[name]):
            task = load_task(name, tokenizer, n_prompts=n, seed=number, corruption=corruption)
            prompts += [side for pair in task.pairs for side in (pair.clean, pair.corrupt)]
    unseen = {s for task in held_out for pair in task.pairs for s in (pair.clean, pair.corrupt)}
    return [prompt for prompt in prompts if prompt not in unseen], held_out


def held_out_pairs(name: str, tokenizer: Tokenizer | None) -> Task:
    """Return the pairs of a task, with every one of its corruptions, that the card is of."""
    found = [
        load_task(name, tokenizer, n_prompts=N_HELD_OUT, seed=HELD_OUT_SEED, corruption=corruption)
        for corruption in CORRUPTIONS[name]
    ]
    return Task(name, tuple(pair for task in found for pair in task.pairs))


@torch.no_grad()
def sample_texts(
    model: LoweredModel, start: int, n_texts: int, length: int, temperature: float, seed: int
) -> Prompts:
    """Return texts that the model writes by itself, each ``length`` tokens from ``start`` on.

    ``temperature`` 0 is greedy: all texts are then the same one.
    """
    generator = torch.Generator().manual_seed(seed)
    texts: Prompts = []
    for first in range(0, n_texts, BATCH):
        tokens = torch.full((min(BATCH, n_texts - first), 1), start)
        while tokens.shape[1] < length:
            final = model.forward(tokens.to(model.device)).final
            assert final is not None
            logits = model.unembed(final[:, -1]).float().cpu()
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial(
                    torch.softmax(logits / temperature, -1), 1, generator=generator
                )
            tokens = torch.cat([tokens, new], dim=1)
        texts += [tuple(row) for row in tokens.tolist()]
    return texts


@torch.no_grad()
def collect(model: LoweredModel, prompts: Prompts, hooks: tuple[Hook, ...]) -> list[Tensor]:
    """Return the activations at each hook on all tokens of the prompts, ``[token, d]``."""
    parts: list[list[Tensor]] = [[] for _ in hooks]
    for tokens in group_by_length(prompts, BATCH, model.device):
        trace = model.forward(tokens)
        for part, hook in zip(parts, hooks, strict=True):
            part.append(activation(model, trace, hook).flatten(0, 1).float().cpu())
    return [torch.cat(part) for part in parts]


def hooks_of(model: LoweredModel) -> Iterator[tuple[Hook, Hook]]:
    """Yield what each dictionary of the model reads and writes."""
    for layer in range(model.shape.n_layers):
        attention, mlp = Hook(layer, "attn_out"), Hook(layer, "mlp_out")
        yield attention, attention
        if model.shape.has_mlp:
            yield mlp, mlp
            yield Hook(layer, "ln2_normalized"), mlp


# Training


class Trainer:
    """One dictionary while it learns, on activations scaled to variance 1 per dimension.

    Parameters
    ----------
    x, y
        ``[token, d_in]`` and ``[token, d_out]``: what is read, and what is reconstructed.
    transcoder
        Whether ``x`` is another activation than ``y``.
    recipe
        Sizes and schedule.
    """

    def __init__(self, x: Tensor, y: Tensor, transcoder: bool, recipe: Recipe) -> None:
        self.recipe, self.transcoder = recipe, transcoder
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.scale_in, self.scale_out = _spread(x), _spread(y)
        self.x, self.y = x / self.scale_in, y / self.scale_out
        n, d_in, d_out = recipe.n_latents, x.shape[1], y.shape[1]
        self.W_dec = self._directions(n, d_out)
        self.W_enc = self._directions(n, d_in).T if transcoder else self.W_dec.T
        self.W_dec, self.W_enc = self.W_dec.clone(), self.W_enc.clone().contiguous()
        self.b_enc, self.b_dec = torch.zeros(n), self.y.mean(0)
        if transcoder:
            self.b_enc = -(self.x.mean(0) @ self.W_enc)
        self.threshold: float | None = None
        self.idle = torch.zeros(n, dtype=torch.long)
        parameters = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        for parameter in parameters:
            parameter.requires_grad_()
        self.optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate)

    def _directions(self, n: int, d: int) -> Tensor:
        rows = torch.randn(n, d, generator=self.generator)
        return rows / rows.norm(dim=1, keepdim=True)

    def run(self) -> list[float]:
        """Take all steps; return the share of the variance that each one left unexplained."""
        losses: list[float] = []
        order = torch.randperm(len(self.x), generator=self.generator)
        at = 0
        for step in range(self.recipe.n_steps):
            if at + self.recipe.batch_size > len(order):
                order, at = torch.randperm(len(self.x), generator=self.generator), 0
            rows = order[at : at + self.recipe.batch_size]
            at += self.recipe.batch_size
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate * _schedule(step, self.recipe.n_steps)
            losses.append(self.step(self.x[rows], self.y[rows]))
        return losses

    def step(self, x: Tensor, y: Tensor) -> float:
        """Take one step on ``x [token, d_in]``, ``y [token, d_out]``; return the main loss."""
        before = (x if self.transcoder else x - self.b_dec) @ self.W_enc + self.b_enc
        latents = self._batch_top_k(before) if self.transcoder else _top_k(before, self.recipe.k)
        residual = y - (latents @ self.W_dec + self.b_dec)
        loss = residual.pow(2).mean()
        active = (latents > 0).any(0)
        self.idle = torch.where(active, 0, self.idle + 1)
        total = loss + AUXILIARY * self._auxiliary(before, residual.detach())
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        return loss.item()

    def _batch_top_k(self, before: Tensor) -> Tensor:
        """Keep the ``k * batch`` largest latents of the batch, and remember where the cut was."""
        latents = before.relu()
        n = self.recipe.k * len(before)
        cut = latents.detach().flatten().topk(n, sorted=False).values.min().item()
        old = cut if self.threshold is None else self.threshold
        self.threshold = THRESHOLD_MEMORY * old + (1 - THRESHOLD_MEMORY) * cut
        return latents * (latents >= cut)

    def _auxiliary(self, before: Tensor, residual: Tensor) -> Tensor:
        """What dead latents leave of the residual, as a share of it: it gives them a gradient."""
        dead = self.idle > self.recipe.dead_after
        n_dead = int(dead.sum())
        if n_dead == 0:
            return residual.new_zeros(())
        k = min(n_dead, residual.shape[1] // 2)
        latents = _top_k(before.masked_fill(~dead, -math.inf), k)
        left = (residual - latents @ self.W_dec).pow(2).mean()
        return left / residual.pow(2).mean().clamp_min(1e-12)

    def dictionary(self, reads: Hook, writes: Hook, metadata: dict[str, Any]) -> Dictionary:
        """Return what was learned, in the activations' own units, with decoder rows of norm 1."""
        scale_in, scale_out = self.scale_in, self.scale_out
        learned = Dictionary(
            "jumprelu_transcoder" if self.transcoder else "topk",
            reads,
            writes,
            W_enc=self.W_enc.detach() * (scale_out / scale_in),
            W_dec=self.W_dec.detach(),
            b_dec=self.b_dec.detach() * scale_out,
            b_enc=self.b_enc.detach() * scale_out,
            k=None if self.transcoder else self.recipe.k,
            apply_b_dec_to_input=not self.transcoder,
            metadata=metadata,
        )
        if self.threshold is None:
            return learned
        cut = torch.full((self.recipe.n_latents,), self.threshold * scale_out)
        return replace(learned, threshold=cut)


def _spread(x: Tensor) -> float:
    """Standard deviation over tokens, root mean square over dimensions."""
    return float((x - x.mean(0)).pow(2).mean().sqrt())


def _top_k(before: Tensor, k: int) -> Tensor:
    values, indices = before.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(before).scatter(-1, indices, values.relu())


def _schedule(step: int, n_steps: int) -> float:
    """Share of the peak learning rate: 5 % warm-up, then half a cosine to 0."""
    warm = min(1.0, (step + 1) / (0.05 * n_steps + 1))
    return warm * 0.5 * (1 + math.cos(math.pi * step / n_steps))


def train_all(
    model: LoweredModel,
    prompts: Prompts,
    recipe: Recipe,
    measure: Measure,
    out: Path,
    about: dict[str, Any],
    console: Console,
) -> None:
    """Train every dictionary of a model, measure it as it was written, and write the card."""
    metadata = {"model_name": model.name, "prepend_bos": False, "made_by": about["made_by"]}
    figures: dict[str, dict[str, Any]] = {}
    constant = []
    for reads, writes in hooks_of(model):
        started = time.perf_counter()
        x, y = collect(model, prompts, (reads, writes))
        if _spread(y) <= CONSTANT * float(y.pow(2).mean().sqrt()):
            console.print(f"{reads.name}: {writes.name} is constant, no dictionary")
            constant.append(reads.name)
            continue
        trainer = Trainer(x, y, reads != writes, recipe)
        losses = trainer.run()
        folder = out / reads.name
        trained = trainer.dictionary(reads, writes, metadata)
        write_dictionary(trained.to("cpu", recipe.stored), folder)
        found = measure(read_dictionary(folder).to("cpu", model.dtype))
        seconds = time.perf_counter() - started
        console.print(quality_table(list(found.values())), highlight=False)
        console.print(f"{reads.name}: last loss {losses[-1]:.4f}, {seconds:.0f} s")
        figures[reads.name] = {
            "seconds": round(seconds, 1),
            **{name: quality.to_dict() for name, quality in found.items()},
        }
    card = about | {
        "model": model.name,
        "license": "MIT",
        "recipe": asdict(recipe),
        "n_prompts": len(prompts),
        "n_tokens": sum(len(prompt) for prompt in prompts),
        "constant": constant,
        "quality": figures,
        "versions": versions(),
    }
    write_json(out / "card.json", card)


def train_bundled(name: str, console: Console, out: Path | None = None) -> None:
    """Train the dictionaries of a bundled model on its tasks."""
    bundle = BUNDLES[name]
    model, tokenizer = load_model(name)
    prompts, held_out = task_prompts(tokenizer, bundle.n_pairs)
    experiments = [Experiment(model, task, get_metric("logit_diff"), BATCH) for task in held_out]
    about = {
        "made_by": "python -m benchmarks.train_dictionaries",
        "prompts": "clean and corrupt prompts of " + ", ".join(
            f"{task} ({n} pairs of each of {', '.join(CORRUPTIONS[task])})"
            for task, n in bundle.n_pairs.items()
        ),
        "held_out": f"{N_HELD_OUT} pairs of each with seed {HELD_OUT_SEED}, none of "
        "whose prompts was trained on; quality is measured on them",
    }  # fmt: skip

    def measure(dictionary: Dictionary) -> dict[str, Quality]:
        return {e.task.name: quality_on_task(dictionary, e) for e in experiments}

    train_all(
        model,
        prompts,
        bundle.recipe,
        measure,
        out or MODELS[name] / "dictionaries",
        about,
        console,
    )


def train_sampled(
    path: str, out: Path, recipe: Recipe, n_texts: int, length: int, temperature: float,
    console: Console,
) -> None:  # fmt: skip
    """Train the dictionaries of any model on texts that it samples itself; 1 in 10 is held out."""
    model, tokenizer = load_model(path)
    start = None if tokenizer is None else tokenizer.bos_token_id
    if start is None:
        raise OptionError(f"model {path!r} has no tokenizer with a BOS token: texts start there")
    if length > model.n_ctx:
        raise OptionError(f"length {length}: {model.name!r} reads at most {model.n_ctx} tokens")
    started = time.perf_counter()
    texts = sample_texts(model, start, n_texts, length, temperature, recipe.seed)
    seconds = time.perf_counter() - started
    console.print(f"{n_texts} texts of {length} tokens sampled in {seconds:.0f} s")
    n_held_out = max(1, n_texts // 10)
    batches = group_by_length(texts[:n_held_out], BATCH, model.device)
    about = {
        "made_by": "python -m benchmarks.train_dictionaries --model",
        "prompts": f"texts that the model sampled at temperature {temperature}",
        "held_out": f"{n_held_out} texts; quality is measured on them",
    }

    def measure(dictionary: Dictionary) -> dict[str, Quality]:
        return {"texts": quality_on_tokens(dictionary, model, batches)}

    train_all(model, texts[n_held_out:], recipe, measure, out, about, console)


def main() -> None:
    """Train what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="MODEL", help=f"of {', '.join(BUNDLES)}")
    parser.add_argument("--model", help="any other model: folder or Hugging Face name")
    parser.add_argument("--texts", choices=["sampled"], default="sampled")
    parser.add_argument("--out", type=Path, help="where to write; needed with --model")
    parser.add_argument("--n-texts", type=int, default=1000)
    parser.add_argument("--length", type=int, default=128, help="tokens per text")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("-k", type=int, default=16, help="active latents per token")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    unknown = set(args.names) - set(BUNDLES)
    if unknown:
        parser.error(f"unknown bundled model {min(unknown)!r}: expected {', '.join(BUNDLES)}")
    if args.model is not None and (args.out is None or args.names):
        parser.error("--model takes --out FOLDER and no bundled model")
    if args.model is None and args.out is not None:
        parser.error("--out is for --model: bundled models' dictionaries lie beside the model")
    torch.set_num_threads(1)
    console = Console()
    try:
        if args.model is None:
            for name in args.names or BUNDLES:
                train_bundled(name, console)
        else:
            recipe = Recipe(args.latents, args.k, args.steps, seed=args.seed)
            train_sampled(
                args.model, args.out, recipe, args.n_texts, args.length, args.temperature, console
            )
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
