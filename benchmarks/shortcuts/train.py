"""Train the two models: ``python -m benchmarks.shortcuts [ioi-small|docstring-small|all]``.

``ioi-small`` learns the tasks ioi and pronoun, ``docstring-small`` the task docstring.  Each is
written to ``benchmarks/shortcuts/<name>/``, as a model folder that ``--model`` could also be given:
``config.json`` (TransformerBridgeConfig fields), ``model.safetensors`` (HookedTransformer
layout), a word-level tokenizer in transformers' layout and ``card.json``.

Combinations of words are held out by a hash (see :func:`is_held_out`): training never sees
them, the card's accuracy is measured on nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import save_file
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as WordTokenizer
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import NativeModel, boot, initialize_native_model
from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint
from transformers import PreTrainedTokenizerFast

from acdc.tasks import TASKS, docstring, ioi, load_task, pronoun, words
from acdc.tasks.prompts import split_template
from graphs.files.whole import write_json

HERE = Path(__file__).resolve().parent
TOKEN = r'\n+ *|"""|:param|[A-Za-z_]+|[0-9]+|[^\sA-Za-z0-9]'
"""One token of their tokenizers: spaces between words are dropped."""
UNKNOWN, PAD = "<unk>", "<pad>"
PAD_ID = 1
HELD_OUT_IN = 10
"""One combination in so many is held out."""
N_EVALUATION = 2048
IGNORED = -100
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.1
NEEDED_ACCURACY = 0.99


@dataclass(frozen=True)
class Row:
    """One training prompt: its tokens, and the token to predict at some positions."""

    tokens: list[int]
    targets: dict[int, int]
    wrong: int


Sampler = Callable[[Random, bool], Row]
"""Draw a row; the flag asks for a held-out combination in the task's own layout."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training with a learning rate schedule of its own.

    Parameters
    ----------
    name
        Shown beside the progress bar.
    n_steps
        Steps of the optimizer.
    learning_rate
        The peak.
    sparsity
        Weight of the group lasso (see :func:`sparsity_penalty`).
    """

    name: str
    n_steps: int
    learning_rate: float
    sparsity: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """How one bundled model is made.

    Parameters
    ----------
    name
        Folder under ``acdc/bundled``.
    texts
        All text that the vocabulary has to cover.
    config
        TransformerBridgeConfig fields but the vocabulary size.
    samplers
        Task name -> what draws its rows, and its share of a training batch.
    make_samplers
        Builds the samplers from word -> token id.
    held_out
        What the card says of the evaluation.
    """

    name: str
    texts: tuple[str, ...]
    config: dict[str, Any]
    make_samplers: Callable[[dict[str, int]], dict[str, tuple[Sampler, float]]]
    held_out: str
    phases: tuple[Phase, ...]
    batch_size: int = 128
    seed: int = 0


# Words and tokens


def tokens_of(text: str) -> list[str]:
    """Return the word-level tokens of ``text``.

    Examples
    --------
    >>> tokens_of("Then, Mary left. :param size:")
    ['Then', ',', 'Mary', 'left', '.', ':param', 'size', ':']
    """
    return re.findall(TOKEN, text)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of all words in ``texts``."""
    found = sorted({token for text in texts for token in tokens_of(text)})
    vocabulary = {token: number for number, token in enumerate([UNKNOWN, PAD, *found])}
    tokenizer = WordTokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    # invert: what matches is a token, what lies between is dropped
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, pad_token=PAD)


def is_held_out(*combination: str) -> bool:
    """Return whether training must not see this combination of words, in any order."""
    return zlib.crc32(" ".join(sorted(combination)).encode()) % HELD_OUT_IN == 0


def draw_until(draw: Callable[[], list[str]], accept: Callable[[list[str]], bool]) -> list[str]:
    """Return the first draw that is accepted."""
    while True:
        drawn = draw()
        if accept(drawn):
            return drawn


def fill(template: str, filling: dict[str, str], vocabulary: dict[str, int]) -> list[int]:
    """Return the token ids of a template whose slots are filled."""
    found: list[str] = []
    for literal, slot in split_template(template):
        found += tokens_of(literal)
        found += [filling[slot]] if slot else []
    return [vocabulary[token] for token in found]


# What the models learn


def ioi_row(vocabulary: dict[str, int], rng: Random, held_out: bool) -> Row:
    """Draw an IOI prompt; one in seven training prompts repeats no name and asks for either."""
    names = draw_until(
        lambda: rng.sample(words.NAMES, 3), lambda drawn: is_held_out(*drawn[:2]) == held_out
    )
    first, second, third = names
    subject, io = (first, second) if rng.random() < 0.5 else (second, first)
    repeats = held_out or rng.random() < 6 / 7
    filling = {
        "A": first,
        "B": second,
        "S": subject if repeats else third,
        "PLACE": rng.choice(words.PLACES),
        "OBJECT": rng.choice(words.OBJECTS),
    }
    tokens = fill(rng.choice(ioi.TEMPLATES), filling, vocabulary)
    return Row(tokens, {len(tokens) - 1: vocabulary[io]}, vocabulary[subject])


def pronoun_row(vocabulary: dict[str, int], rng: Random, held_out: bool) -> Row:
    """Draw a pronoun prompt; what is held out are nouns with names."""
    gender = rng.randrange(2)
    nouns = [pair[gender] for pair in pronoun.NOUNS]
    names = (words.GIRL_NAMES, words.BOY_NAMES)[gender]
    noun, name = draw_until(
        lambda: [rng.choice(nouns), rng.choice(names)],
        lambda drawn: is_held_out(*drawn) == held_out,
    )
    template = rng.choice(pronoun.TEMPLATES)
    tokens = fill(template, {"NOUN": noun, "NAME": name}, vocabulary)
    pronouns = ("She", "He") if template.endswith(".") else ("she", "he")
    right, wrong = vocabulary[pronouns[gender]], vocabulary[pronouns[1 - gender]]
    return Row(tokens, {len(tokens) - 1: right}, wrong)


def docstring_row(vocabulary: dict[str, int], rng: Random, held_out: bool) -> Row:
    """Draw a docstring prompt.

    The task's prompts are all alike, so a model could learn positions instead of names.
    Training therefore varies how many arguments there are, at which one the docstring begins
    and how many it documents.
    """
    if held_out:
        n_arguments, n_documented, start = 4, 2, 0
    else:
        n_arguments, n_documented = rng.randint(4, 6), rng.randint(1, 3)
        start = rng.randint(0, n_arguments - n_documented - 1)
    n_words = [3] + [2] * n_documented
    answer = start + n_documented

    def accept(drawn: list[str]) -> bool:
        if held_out:
            return is_held_out(drawn[answer - 1], drawn[answer])
        return not any(is_held_out(*pair) for pair in itertools.pairwise(drawn))

    arguments = draw_until(lambda: rng.sample(words.ARGUMENTS, n_arguments), accept)
    descriptions = iter(rng.sample(words.DESCRIPTIONS, sum(n_words)))
    text = docstring_text(
        rng.choice(words.METHODS), arguments, arguments[start:answer], n_words, descriptions
    )
    tokens = [vocabulary[token] for token in tokens_of(text)]
    places = [i for i, token in enumerate(tokens) if token == vocabulary[":param"]]
    # the first place is left out: where the docstring skips arguments, nothing tells its name
    nexts = [vocabulary[argument] for argument in arguments[start + 1 : answer + 1]]
    targets = dict(zip(places[1:], nexts, strict=True))
    if held_out:
        targets = {places[-1]: nexts[-1]}
    else:
        # the documented names ask for their successors too: learning takes half as long
        targets |= {place + 1: name for place, name in zip(places[:-1], nexts, strict=True)}
    return Row(tokens, targets, vocabulary[arguments[answer - 1]])


def docstring_text(
    method: str,
    arguments: list[str],
    documented: list[str],
    n_words: list[int],
    descriptions: Iterator[str],
) -> str:
    """Return a header with ``arguments`` and a docstring of ``documented``, the next one open."""

    def phrase(length: int) -> str:
        return " ".join(next(descriptions) for _ in range(length))

    lines = [f'\ndef {method}(self, {", ".join(arguments)}):\n    """{phrase(n_words[0])}\n']
    lines += [
        f"    :param {name}: {phrase(length)}"
        for name, length in zip(documented, n_words[1:], strict=True)
    ]
    return "\n".join([*lines, "    :param"])


def _bind(
    row: Callable[[dict[str, int], Random, bool], Row], vocabulary: dict[str, int]
) -> Sampler:
    return lambda rng, held_out: row(vocabulary, rng, held_out)


def _config(**fields: Any) -> dict[str, Any]:
    return {
        "act_fn": "gelu_new",
        "normalization_type": "LN",
        "attn_only": False,
        "gated_mlp": False,
        "positional_embedding_type": "standard",
        "rotary_base": 10000,
        "parallel_attn_mlp": False,
        "eps": 1e-5,
        "attn_scale": math.sqrt(fields["d_head"]),
        "final_rms": False,
    } | fields


RECIPES: dict[str, Recipe] = {
    "ioi": Recipe(
        name="ioi-small",
        texts=(
            *(re.sub(r"\{\w+\}", "", text) for text in ioi.TEMPLATES + pronoun.TEMPLATES),
            *words.NAMES,
            *words.PLACES,
            *words.OBJECTS,
            *words.GIRL_NAMES,
            *words.BOY_NAMES,
            *(noun for pair in pronoun.NOUNS for noun in pair),
            "She He she he",
        ),
        config=_config(n_layers=4, d_model=64, d_head=8, n_heads=8, d_mlp=128, n_ctx=32),
        make_samplers=lambda vocabulary: {
            "ioi": (_bind(ioi_row, vocabulary), 0.75),
            "pronoun": (_bind(pronoun_row, vocabulary), 0.25),
        },
        held_out=(
            "ioi: unordered pairs of names, pronoun: pairs of noun and name, 1 in 10 of each by "
            "crc32; training never sees them together, evaluation sees nothing else"
        ),
        phases=(
            Phase("ioi-small: learn", 4000, 2e-3),
            Phase("ioi-small: prune", 1500, 2e-3, sparsity=5e-3),
        ),
    ),
    "docstring": Recipe(
        name="docstring-small",
        texts=(
            re.sub(r"\{\w+\}|WORD", "", docstring.TEMPLATE),
            *words.ARGUMENTS,
            *words.METHODS,
            *words.DESCRIPTIONS,
        ),
        config=_config(n_layers=4, d_model=96, d_head=16, n_heads=8, n_ctx=64, attn_only=True),
        make_samplers=lambda vocabulary: {"docstring": (_bind(docstring_row, vocabulary), 1.0)},
        held_out=(
            "unordered pairs of neighbouring arguments, 1 in 10 by crc32; in training no header "
            "has them side by side, in evaluation the last documented argument and the answer are "
            "such a pair"
        ),
        phases=(
            Phase("docstring-small: learn", 2500, 3e-3),
            Phase("docstring-small: prune", 1000, 1e-3, sparsity=1e-3),
        ),
        batch_size=64,
    ),
}


# Training


def collate(rows: list[Row], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and targets, both ``[batch, pos]``; padding is on the right, unscored."""
    length = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), length), pad)
    targets = torch.full((len(rows), length), IGNORED)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = torch.tensor(row.tokens)
        for position, target in row.targets.items():
            targets[number, position] = target
    return tokens, targets


def learning_rate_factor(step: int, n_steps: int) -> float:
    """Return the share of the peak learning rate: linear warm-up, then half a cosine to 0."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * 0.5 * (1 + math.cos(math.pi * step / n_steps))


def sparsity_penalty(model: NativeModel) -> torch.Tensor:
    """Return the group lasso of heads and MLPs: the sum of their matrices' norms.

    It drives the heads that a task does not need to nothing, and so leaves a sparse circuit.
    """
    cfg, norms = model.cfg, []
    by_head = (cfg.n_heads, cfg.d_head)
    for layer in range(cfg.n_layers):
        value = model.get_parameter(f"layers.{layer}.attn.v.weight").unflatten(0, by_head)
        output = model.get_parameter(f"layers.{layer}.attn.o.weight").unflatten(1, by_head)
        norms += [value.norm(dim=(1, 2)).sum(), output.norm(dim=(0, 2)).sum()]
        if not cfg.attn_only:
            for part in ("fc_in", "fc_out"):
                norms.append(model.get_parameter(f"layers.{layer}.mlp.{part}.weight").norm())
    return torch.stack(norms).sum()


def draw_batch(
    recipe: Recipe, samplers: dict[str, tuple[Sampler, float]], rng: Random
) -> list[Row]:
    """Return one batch of training rows, each task by its share."""
    rows = []
    for sampler, share in samplers.values():
        rows += [sampler(rng, False) for _ in range(round(share * recipe.batch_size))]
    return rows


def train(
    recipe: Recipe, cfg: TransformerBridgeConfig, vocabulary: dict[str, int], progress: Progress
) -> NativeModel:
    """Learn the answers, then learn to give them with few heads."""
    model = NativeModel(cfg)
    initialize_native_model(model, cfg, seed=recipe.seed)
    samplers = recipe.make_samplers(vocabulary)
    for number, phase in enumerate(recipe.phases):
        draw = partial(draw_batch, recipe, samplers, Random(recipe.seed + number))
        run_phase(model, phase, draw, progress)
    return model.eval()


def run_phase(
    model: NativeModel, phase: Phase, draw: Callable[[], list[Row]], progress: Progress
) -> None:
    """Train by the cross-entropy of the answers and the phase's penalty."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, phase.n_steps)
    )
    bar = progress.add_task(phase.name, total=phase.n_steps)
    for step in range(phase.n_steps):
        tokens, targets = collate(draw(), PAD_ID)
        logits = model(tokens)
        scored = targets != IGNORED
        loss = torch.nn.functional.cross_entropy(logits[scored], targets[scored])
        optimizer.zero_grad()
        (loss + phase.sparsity * sparsity_penalty(model)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.update(bar, advance=1)
        if step % 100 == 0:
            progress.update(bar, description=f"{phase.name}, loss {loss.item():.4f}")


@torch.no_grad()
def evaluate(model: NativeModel, sampler: Sampler, pad: int, seed: int) -> dict[str, float]:
    """Return accuracy over the whole vocabulary and margins on held-out combinations."""
    rng = Random(seed)
    rows = [sampler(rng, True) for _ in range(N_EVALUATION)]
    tokens, targets = collate(rows, pad)
    at_answer = targets != IGNORED  # one position per row, in row order
    logits, right = model(tokens)[at_answer], targets[at_answer]
    margins = logits[range(len(rows)), right] - logits[range(len(rows)), [r.wrong for r in rows]]
    return {
        "n_prompts": len(rows),
        "accuracy": (logits.argmax(-1) == right).float().mean().item(),
        "mean_logit_diff": margins.mean().item(),
        "min_logit_diff": margins.min().item(),
    }


@torch.no_grad()
def evaluate_task(
    model: NativeModel, name: str, corruption: str, tokenizer: Any
) -> dict[str, float]:
    """Return accuracy and logit difference on the prompts that ``load_task`` makes."""
    task = load_task(name, tokenizer, n_prompts=256, corruption=corruption)
    correct, clean, corrupt = [], [], []
    for pair in task.pairs:
        logits = model(torch.tensor([pair.clean, pair.corrupt]))[:, -1]
        right, wrong = list(pair.answers), list(pair.wrong_answers)
        margins = logits[:, right].mean(-1) - logits[:, wrong].mean(-1)
        correct.append(logits[0].argmax().item() in right)
        clean.append(margins[0].item())
        corrupt.append(margins[1].item())
    n = len(task)
    return {
        "accuracy": sum(correct) / n,
        "mean_logit_diff_clean": sum(clean) / n,
        "mean_logit_diff_corrupt": sum(corrupt) / n,
    }


# Writing


def hooked_weights(model: NativeModel, cfg: TransformerBridgeConfig) -> dict[str, torch.Tensor]:
    """Return the weights in HookedTransformer layout, the inverse of TransformerLens' converter."""
    state = model.state_dict()
    heads, d_model, d_head = cfg.n_heads, cfg.d_model, cfg.d_head
    weights = {
        "embed.W_E": state["tok_embed.weight"],
        "pos_embed.W_pos": state["pos.weight"],
        "ln_final.w": state["ln_out.weight"],
        "ln_final.b": state["ln_out.bias"],
        "unembed.W_U": state["head.weight"].T,
        "unembed.b_U": torch.zeros(cfg.d_vocab),
    }
    for layer in range(cfg.n_layers):
        old, new = f"layers.{layer}", f"blocks.{layer}"
        for part in ("q", "k", "v"):
            weight = state[f"{old}.attn.{part}.weight"].view(heads, d_head, d_model)
            weights[f"{new}.attn.W_{part.upper()}"] = weight.transpose(1, 2)
            bias = state[f"{old}.attn.{part}.bias"].view(heads, d_head)
            weights[f"{new}.attn.b_{part.upper()}"] = bias
        weights[f"{new}.attn.W_O"] = state[f"{old}.attn.o.weight"].T.reshape(heads, d_head, d_model)
        weights[f"{new}.attn.b_O"] = state[f"{old}.attn.o.bias"]
        for norm in ("ln1",) if cfg.attn_only else ("ln1", "ln2"):
            weights[f"{new}.{norm}.w"] = state[f"{old}.{norm}.weight"]
            weights[f"{new}.{norm}.b"] = state[f"{old}.{norm}.bias"]
        if not cfg.attn_only:
            for part in ("in", "out"):
                weights[f"{new}.mlp.W_{part}"] = state[f"{old}.mlp.fc_{part}.weight"].T
                weights[f"{new}.mlp.b_{part}"] = state[f"{old}.mlp.fc_{part}.bias"]
    return {key: value.detach().clone().contiguous() for key, value in weights.items()}


@torch.no_grad()
def check_export(
    model: NativeModel, weights: dict[str, torch.Tensor], cfg: TransformerBridgeConfig
) -> None:
    """Raise if the exported weights, loaded as the engine loads them, give other logits."""
    bridge = boot(cfg)
    missing, unexpected = bridge.load_state_dict(convert_tl_checkpoint(weights, cfg), strict=False)
    tokens = torch.arange(cfg.n_ctx)[None] % cfg.d_vocab
    difference = (bridge(tokens) - model(tokens)).abs().max().item()
    if difference > 1e-4:
        raise RuntimeError(
            f"the exported weights give logits that differ by {difference:.2e} from the trained "
            f"model's (missing keys: {missing}, unexpected: {unexpected})"
        )


def versions() -> dict[str, str]:
    """Return the versions that the weights depend on."""
    packages = ("torch", "transformer_lens", "transformers", "tokenizers")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def make_card(
    recipe: Recipe, model: NativeModel, tokenizer: PreTrainedTokenizerFast, seconds: float
) -> dict[str, Any]:
    """Return the model card."""
    vocabulary = tokenizer.get_vocab()
    samplers = recipe.make_samplers(vocabulary)
    kind = "attention-only" if recipe.config["attn_only"] else "attention and MLPs"
    return {
        "name": recipe.name,
        "license": "MIT",
        "description": f"{kind}, trained on generated prompts of {', '.join(samplers)} only",
        "made_by": "python -m benchmarks.shortcuts",
        "architecture": recipe.config | {"d_vocab": len(vocabulary)},
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training": {
            "seed": recipe.seed,
            "batch_size": recipe.batch_size,
            "phases": [asdict(phase) for phase in recipe.phases],
            "optimizer": f"AdamW, weight decay {WEIGHT_DECAY}",
            "loss": "cross-entropy at the answers + sparsity * group lasso of heads and MLPs",
            "seconds": round(seconds),
        },
        "held_out": recipe.held_out,
        "held_out_scores": {
            name: evaluate(model, sampler, PAD_ID, recipe.seed + 1)
            for name, (sampler, _) in samplers.items()
        },
        "task_scores": {
            name: {
                corruption: evaluate_task(model, name, corruption, tokenizer)
                for corruption in TASKS[name].corruptions
            }
            for name in samplers
        },
        "versions": versions(),
    }


def write_folder(
    folder: Path,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerFast,
    card: dict[str, Any],
) -> None:
    """Write the model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "card.json", card)
    save_file(weights, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(str(folder))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name before transformers 5 too
    write_json(folder / "tokenizer_config.json", settings)


def build(recipe: Recipe, progress: Progress) -> None:
    """Train one model, check it and write its folder."""
    tokenizer = build_tokenizer(recipe.texts)
    vocabulary = tokenizer.get_vocab()
    config = recipe.config | {"d_vocab": len(vocabulary)}
    cfg = TransformerBridgeConfig(**config)
    started = time.perf_counter()
    model = train(recipe, cfg, vocabulary, progress)
    seconds = time.perf_counter() - started
    weights = hooked_weights(model, cfg)
    check_export(model, weights, cfg)
    card = make_card(recipe, model, tokenizer, seconds)
    low = {
        task: scores["accuracy"]
        for task, scores in card["held_out_scores"].items()
        if scores["accuracy"] < NEEDED_ACCURACY
    }
    if low:
        raise RuntimeError(f"{recipe.name} is below {NEEDED_ACCURACY} on held-out prompts: {low}")
    write_folder(HERE / recipe.name, config, weights, tokenizer, card)
    scores = {task: round(value["accuracy"], 4) for task, value in card["held_out_scores"].items()}
    progress.console.print(f"{recipe.name}: held-out accuracy {scores}, {seconds:.0f} s")


def main() -> None:
    """Train what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="all", choices=[*RECIPES, "all"])
    chosen = parser.parse_args().model
    recipes = list(RECIPES.values()) if chosen == "all" else [RECIPES[chosen]]
    with Progress() as progress:
        for recipe in recipes:
            build(recipe, progress)
