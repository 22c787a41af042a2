"""Make a model with a planted circuit: ``python -m benchmarks.planted.train NAME``.

The model is written to ``benchmarks/planted/models/<name>/``: ``config.json`` and
``model.safetensors`` (HookedTransformer layout), the tokenizer of the bundled model of the same
task, ``pairs.jsonl`` (the task's prompts), ``reference.json`` (the planted circuit) and
``card.json`` (how well it is planted, measured on held-out prompts).

Training begins with the circuit alone: every edge outside carries the source prompt's value, so
that no other node can take part and the roles are learned where they belong; linear probes on the
planted nodes help (see :class:`benchmarks.planted.siit.Probes`), and it is cheap, since no other
node is run on the base prompt.  Then comes the whole model, with the three losses of
:mod:`benchmarks.planted.siit` and nothing else: the other nodes are ordinary and trained, and
learn to stay out of the way.
With one thread the result is the same each time on one machine.

A recipe without phases is not trained: :mod:`benchmarks.planted.by_hand` writes its weights.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from acdc.models import MODELS
from acdc.tasks import Task, load_task
from benchmarks.planted import card as measured
from benchmarks.planted.algorithms import DOCSTRING, IOI, IOI_BACKUP, SMOOTHING, Algorithm
from benchmarks.planted.by_hand import SIZES, write_backup
from benchmarks.planted.model import WRITE_STD, Config, PatchableTransformer
from benchmarks.planted.prompts import DRAWS, draw_pairs
from benchmarks.planted.siit import Alignment, Losses, Probes, circuit_losses, draw_plan, losses
from benchmarks.references.signed import sign
from benchmarks.shortcuts.train import versions
from graphs.files.whole import write_json
from graphs.graph import shape_to_config

__all__ = ["FOLDER", "RECIPES", "Phase", "Recipe", "build_model", "train_phase"]

FOLDER = Path(__file__).resolve().parent / "models"
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.01
LOG_EVERY = 100
N_PROMPTS = 64
"""Prompts in ``pairs.jsonl``."""
N_MEASURED = 512
"""Held-out prompts that the card is measured on."""
MEASURE_SEED = 1000


@dataclass(frozen=True)
class Phase:
    """A stretch of training with a learning rate schedule of its own.

    Parameters
    ----------
    n_steps, batch_size, learning_rate
        Of AdamW; the batch counts pairs of prompts.
    alone
        Train the circuit alone (see :func:`circuit_losses`), or the whole model.
    """

    n_steps: int
    batch_size: int
    learning_rate: float
    alone: bool


@dataclass(frozen=True)
class Recipe:
    """How one model is made.

    Parameters
    ----------
    task
        Built-in task whose prompts it learns.
    bundled
        Bundled model whose tokenizer it has.
    algorithm, nodes
        What is planted where: variable -> node.
    sizes
        Fields of :class:`Config` but the vocabulary's size.
    phases
        Of the training, in turn; none where the weights are written by hand.
    open
        What the reference circuit leaves open.
    positions
        Sender or receiver -> spans of the task, see :class:`graphs.Reference`; none where the
        algorithm does not say where its variables are.
    optional
        Variables whose nodes are neither right nor wrong in a circuit that was found.
    seed
        Of the initial weights and of the prompts.
    """

    task: str
    bundled: str
    algorithm: Algorithm
    nodes: Mapping[str, str]
    sizes: Mapping[str, Any]
    phases: tuple[Phase, ...]
    open: str
    optional: tuple[str, ...] = ()
    seed: int = 0
    positions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "planted-ioi": Recipe(
        task="ioi",
        bundled="ioi-small",
        algorithm=IOI,
        nodes={"duplicate token": "a1.h1", "S-inhibition": "a2.h1", "name mover": "a4.h1"},
        sizes={"n_layers": 6, "n_heads": 4, "d_model": 64, "d_head": 16, "d_mlp": 128, "n_ctx": 32},
        phases=(
            Phase(2500, 64, 3e-3, alone=True),
            Phase(1000, 32, 2e-3, alone=False),
            Phase(1500, 32, 2e-3, alone=False),
        ),
        open=(
            "Which of a pair's query, key and value edges are needed is not fixed. True where the "
            "two prompts of a pair share their template: where a head looks for a name's position "
            "is part of the template, so input->a2.h1 (the S-inhibition head's query) carries "
            "nothing that differs between them."
        ),
        positions={
            "input": ("S1", "IO", "S2"),
            "a1.h1": ("S2",), "a1.h1<q>": ("S2",), "a1.h1<k>": ("S1",), "a1.h1<v>": ("S1",),
            "a2.h1": ("END",), "a2.h1<q>": ("END",), "a2.h1<k>": ("S2",), "a2.h1<v>": ("S2",),
            "a4.h1": ("END",), "a4.h1<q>": ("END",), "a4.h1<k>": ("IO",), "a4.h1<v>": ("IO",),
        },
    ),
    "planted-ioi-backup": Recipe(
        task="ioi",
        bundled="ioi-small",
        algorithm=IOI_BACKUP,
        nodes={
            "duplicate token": "a0.h2",
            "S-inhibition": "a1.h0",
            "name mover": "a2.h1",
            "backup name mover": "a3.h3",
        },
        sizes=SIZES,
        phases=(),
        open=(
            "Which of a pair's query, key and value edges are needed is not fixed. The backup name "
            "mover is silent while the name mover writes, and on corrupt prompts: it and its edges "
            "matter only where the name mover is ablated, so they are optional. Positions are part "
            "of the template: the S-inhibition head reads where the third name stands off "
            "input->a1.h0, which carries nothing that differs between two prompts of one template."
        ),
        optional=("backup name mover",),
    ),
    "planted-docstring": Recipe(
        task="docstring",
        bundled="docstring-small",
        algorithm=DOCSTRING,
        nodes={
            "previous argument": "a0.h2",
            "documented argument": "a1.h1",
            "induction": "a2.h3",
            "argument mover": "a3.h0",
        },
        sizes={
            "n_layers": 4, "n_heads": 4, "d_model": 64, "d_head": 16, "d_mlp": None, "n_ctx": 48,
        },
        phases=(
            Phase(2500, 64, 3e-3, alone=True),
            Phase(1000, 32, 2e-3, alone=False),
            Phase(2500, 32, 2e-3, alone=False),
        ),
        open=(
            "Which of a pair's query, key and value edges are needed is not fixed. All prompts "
            "have one layout: positions are constants and no variable of the algorithm, so "
            "input->a2.h3 (the positions that the induction head reports) is no edge of it."
        ),
    ),
}  # fmt: skip


# Training


def learning_rate_factor(step: int, n_steps: int) -> float:
    """Return the share of the peak learning rate: linear warm-up, then half a cosine to 0."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * 0.5 * (1 + math.cos(math.pi * step / n_steps))


def build_model(recipe: Recipe, d_vocab: int) -> tuple[PatchableTransformer, Alignment]:
    """Return the untrained model and what is to be where."""
    model = PatchableTransformer(Config(**recipe.sizes, d_vocab=d_vocab), recipe.seed)
    return model, Alignment(recipe.algorithm, recipe.nodes, model.graph)


def train_phase(
    recipe: Recipe,
    number: int,
    model: PatchableTransformer,
    alignment: Alignment,
    vocabulary: dict[str, int],
) -> Iterator[Losses]:
    """Train the model in place by one phase of the recipe; yield the losses of every step.

    Parameters
    ----------
    recipe, number
        Which phase (from 0) of which recipe.
    model, alignment
        What :func:`build_model` returned, and the phases before trained.
    vocabulary
        Word -> token id.
    """
    phase, rng = recipe.phases[number], Random(recipe.seed + number)
    probes = Probes(alignment, model.config.d_model, model.config.d_vocab)
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *(probes.parameters() if phase.alone else [])],
        lr=phase.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=WEIGHT_DECAY,
    )
    for step in range(phase.n_steps):
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * learning_rate_factor(step, phase.n_steps)
        base, source = draw_pairs(DRAWS[recipe.algorithm.name], vocabulary, rng, phase.batch_size)
        plan = draw_plan(alignment, rng, phase.batch_size, alone=phase.alone)
        if phase.alone:
            found = circuit_losses(model, alignment, base, source, plan, probes)
        else:
            found = losses(model, alignment, base, source, plan)
        optimizer.zero_grad()
        found.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield found


# Writing


def make_reference(name: str, recipe: Recipe, alignment: Alignment) -> dict[str, Any]:
    """Return the planted circuit as a reference file."""
    return {
        "name": name,
        "description": f"the planted circuit of {name}: {', '.join(recipe.nodes)}",
        "model": name,
        "task": recipe.task,
        "ablation": {"intervention": "resample", "direction": None},
        "granularity": "node pairs",
        "citation": _how(recipe)
        + (" after Gupta et al. 2024, InterpBench, arXiv 2407.14494" if recipe.phases else ""),
        "open": recipe.open,
        "graph": shape_to_config(alignment.graph.shape),
        "roles": {variable: [node] for variable, node in recipe.nodes.items()},
        "optional_nodes": [recipe.nodes[variable] for variable in recipe.optional],
        **({"positions": recipe.positions} if recipe.positions else {}),
        "edges": list(alignment.pairs),
    }


def _how(recipe: Recipe) -> str:
    if recipe.phases:
        return "planted by strict interchange intervention training"
    return "written by hand, see benchmarks/planted/by_hand.py"


def _training(recipe: Recipe, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the model card says of the training."""
    return {
        "seed": recipe.seed,
        "n_steps": sum(phase["n_steps"] for phase in history),
        "seconds": sum(phase["seconds"] for phase in history),
        "optimizer": f"AdamW, weight decay {WEIGHT_DECAY} on all weights",
        "initial_weights": (
            "all nodes alike: query equal to key, unembedding equal to embedding transposed, "
            f"writing weights of standard deviation {WRITE_STD}"
        ),
        "loss": (
            "behaviour + interchange + strictness, KL in nats from the algorithm's answer, "
            f"{SMOOTHING} of its probability spread over the vocabulary; in the phase 'alone' "
            "every edge outside the circuit is patched, and the first loss is instead the "
            "cross-entropy of linear probes that read the variables off the planted nodes and "
            "are thrown away after it"
        ),
        "columns_of_losses": ["step", "behaviour (alone: probes)", "interchange", "strictness"],
        "phases": history,
    }


def make_card(
    name: str,
    recipe: Recipe,
    model: PatchableTransformer,
    alignment: Alignment,
    tokenizer: Any,
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the model card."""
    vocabulary = tokenizer.get_vocab()
    draw = DRAWS[recipe.algorithm.name]
    held_out = (model, alignment, draw, vocabulary, N_MEASURED, MEASURE_SEED)
    return {
        "name": name,
        "license": "MIT",
        "description": (
            f"{'attention-only' if model.config.d_mlp is None else 'attention and MLPs'}, "
            f"a {recipe.task} circuit {_how(recipe)}: "
            + ", ".join(f"{variable} {node}" for variable, node in recipe.nodes.items())
        ),
        "made_by": f"python -m benchmarks.planted.train {name}",
        "architecture": model.config.bridge_fields(),
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training": _training(recipe, history) if recipe.phases else None,
        "held_out": draw.held_out,
        "n_held_out": N_MEASURED,
        "seed_held_out": MEASURE_SEED,
        "behaviour": measured.behaviour(*held_out),
        "interchange": measured.interchange(*held_out),
        "strictness": measured.strictness(model, alignment, task_of(recipe, tokenizer)),
        "versions": versions(),
    }


def task_of(recipe: Recipe, tokenizer: Any) -> Task:
    """Return the prompts that ``acdc discover`` draws by default."""
    return load_task(recipe.task, tokenizer, n_prompts=N_PROMPTS)


def write_folder(
    folder: Path,
    recipe: Recipe,
    model: PatchableTransformer,
    tokenizer: Any,
    texts: Mapping[str, dict[str, Any]],
) -> None:
    """Write the model folder; ``texts`` are further JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    for filename, content in texts.items():
        write_json(folder / filename, content)
    save_file(_weights(model), folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)
    for filename in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODELS[recipe.bundled] / filename, folder / filename)
    rows = [json.dumps(asdict(pair)) + "\n" for pair in task_of(recipe, tokenizer).pairs]
    (folder / "pairs.jsonl").write_text("".join(rows))


def _weights(model: PatchableTransformer) -> dict[str, torch.Tensor]:
    return {key: value.contiguous() for key, value in model.state_dict().items()}


def build(name: str, folder: Path, checkpoints: Path | None, progress: Progress) -> None:
    """Train one model, measure it and write its folder."""
    recipe = RECIPES[name]
    tokenizer = AutoTokenizer.from_pretrained(MODELS[recipe.bundled])
    model, alignment = build_model(recipe, len(tokenizer.get_vocab()))
    if not recipe.phases:
        vocabulary = tokenizer.get_vocab()
        names = [vocabulary[name] for name in DRAWS[recipe.algorithm.name].names]
        write_backup(model, recipe.nodes, names, recipe.seed)
    history: list[dict[str, Any]] = []
    for number in range(len(recipe.phases)):
        stored = checkpoints / f"{name}-phase-{number}.safetensors" if checkpoints else None
        if stored and stored.exists():
            model.load_state_dict(load_file(stored))
            history.append(json.loads(stored.with_suffix(".json").read_text()))
            continue
        steps = train_phase(recipe, number, model, alignment, tokenizer.get_vocab())
        history.append(
            _follow(f"{name}, phase {number + 1}", recipe.phases[number], steps, progress)
        )
        if stored:
            stored.parent.mkdir(parents=True, exist_ok=True)
            save_file(_weights(model), stored)
            stored.with_suffix(".json").write_text(json.dumps(history[-1]))
    card = make_card(name, recipe, model, alignment, tokenizer, history)
    reference = make_reference(name, recipe, alignment)
    config = model.config.bridge_fields()
    texts = {"config.json": config, "reference.json": reference, "card.json": card}
    write_folder(folder, recipe, model, tokenizer, texts)
    sign(folder)


def _follow(
    label: str, phase: Phase, steps: Iterator[Losses], progress: Progress
) -> dict[str, Any]:
    """Run a phase; return its settings, seconds and mean losses of every hundred steps."""
    bar = progress.add_task(label, total=phase.n_steps)
    started, rows, recent = time.perf_counter(), [], []
    for step, found in enumerate(steps, start=1):
        recent.append([value.item() for value in vars(found).values()])
        progress.update(bar, advance=1)
        if step % LOG_EVERY == 0:
            means = [round(sum(column) / len(recent), 5) for column in zip(*recent, strict=True)]
            rows.append([step, *means])
            recent = []
            seconds = time.perf_counter() - started
            progress.console.print(f"{label}: {rows[-1]}, {seconds:.0f} s")
    return asdict(phase) | {"seconds": round(time.perf_counter() - started), "losses": rows}


def main() -> None:
    """Train what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=[*RECIPES])
    parser.add_argument("--out", type=Path, help="folder to write (benchmarks/planted/models/NAME)")
    parser.add_argument(
        "--checkpoints", type=Path, help="folder to keep each finished phase in, and go on from"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with Progress() as progress:
        build(
            arguments.model,
            arguments.out or FOLDER / arguments.model,
            arguments.checkpoints,
            progress,
        )


if __name__ == "__main__":
    main()
