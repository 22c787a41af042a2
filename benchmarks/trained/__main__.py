"""Train the models, establish what they do, and write their folders.

``python -m benchmarks.trained [NAME ...]``: each model takes less than a minute of one core;
``--measure`` keeps the weights that are there, and writes the rest of the folder anew.  A model
whose mechanism is not the one that :mod:`benchmarks.trained.mechanisms` describes is not written.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.references.signed import sign
from benchmarks.trained.interventions import Lab
from benchmarks.trained.mechanisms import LEAST_EFFECT, MECHANISMS, Mechanism
from benchmarks.trained.model import Transformer
from benchmarks.trained.tasks import TASKS, PromptPair
from benchmarks.trained.train import RECIPES, accuracy, as_prompts, build_model, train
from graphs.files.whole import write_json
from graphs.graph import GraphShape, shape_to_config

__all__ = ["main", "measure", "write_folder"]

FOLDER = Path(__file__).parent / "models"
N_PAIRS, N_MEASURED = 48, 256
"""Pairs in ``pairs.jsonl``, and fresh ones that the card is measured on."""
LEAST_ACCURACY, LEAST_FAITHFULNESS = 0.98, 0.85
LEAST_HELD, MOST_FAILED = 0.8, 0.2


def main() -> None:
    """Make the models that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trained", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the model folders go")
    parser.add_argument("--measure", action="store_true", help="keep the stored weights")
    chosen = parser.parse_args()
    for name in chosen.names:
        if name not in RECIPES:
            parser.error(f"unknown model {name!r}: expected any of {', '.join(RECIPES)}")
    torch.set_num_threads(1)
    for name in chosen.names or RECIPES:
        folder = chosen.out / name
        model, training = _stored(folder) if chosen.measure else _trained(name)
        card, mechanism = measure(name, model)
        write_folder(folder, name, model, {**card, "training": training}, mechanism)
        print(f"{name}: {card['accuracy']:.1%} right; {mechanism.says}")


def _trained(name: str) -> tuple[Transformer, dict[str, Any]]:
    """Train a model; return it with weights that half precision can say, and how it was done."""
    started = time.process_time()
    model = build_model(name)
    losses = list(train(name, model))
    training = {
        **RECIPES[name].as_json(),
        "seconds": round(time.process_time() - started),
        "losses": [round(loss, 4) for loss in losses[:: len(losses) // 12]],
    }
    halves = {key: x.half().float() for key, x in model.weights.items()}
    return Transformer(model.sizes, halves), training


def _stored(folder: Path) -> tuple[Transformer, dict[str, Any]]:
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    return Transformer.of_folder(folder), card["training"]


def measure(name: str, model: Transformer, seed: int = 1) -> tuple[dict[str, Any], Mechanism]:
    """Return a model's card, as far as it is measured, and its mechanism.

    Raises
    ------
    RuntimeError
        If the model does not do its task, or not in the way that is described.
    """
    prompts = as_prompts(_pairs(name, N_MEASURED, seed))
    lab = Lab(model, prompts)
    mechanism = MECHANISMS[name](lab)
    effects = {edge: lab.effect([edge]) for edge in lab.edges}
    card = {
        "name": name,
        "license": "MIT",
        "description": f"trained: {TASKS[name].description}",
        "made_by": f"python -m benchmarks.trained {name}",
        "mechanism": mechanism.says,
        "n_measured": len(prompts),
        "seed_measured": seed,
        "accuracy": accuracy(model, prompts),
        "logit_diff": {"clean": lab.margin(lab.clean), "corrupt": lab.margin(lab.corrupt)},
        "holds": dict(mechanism.holds),
        "fails": dict(mechanism.fails),
        "faithfulness": lab.faithfulness(mechanism.edges),
        "effects": {edge: effects[edge] for edge in mechanism.edges},
        "largest_effect_outside": max(
            abs(x) for edge, x in effects.items() if edge not in mechanism.edges
        ),
        "n_parameters": sum(x.numel() for x in model.weights.values()),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
    }
    _check(name, card)
    return card, mechanism


def _check(name: str, card: dict[str, Any]) -> None:
    """Raise RuntimeError unless a card says what its mechanism needs."""
    wrong = [f"{what}: {x:.3f}" for what, x in card["holds"].items() if x < LEAST_HELD]
    wrong += [f"{what}: {x:.3f}" for what, x in card["fails"].items() if x > MOST_FAILED]
    wrong += [f"{edge}: {x:.3f}" for edge, x in card["effects"].items() if x < LEAST_EFFECT]
    for what, least in (("accuracy", LEAST_ACCURACY), ("faithfulness", LEAST_FAITHFULNESS)):
        wrong += [f"{what}: {card[what]:.3f}"] if card[what] < least else []
    if card["largest_effect_outside"] > LEAST_EFFECT:
        wrong.append(f"an edge outside has the effect {card['largest_effect_outside']:.3f}")
    if wrong:
        raise RuntimeError(f"{name} does not do what is described: {'; '.join(wrong)}")


def _pairs(name: str, n: int, seed: int) -> list[PromptPair]:
    rng = Random(seed)
    return [TASKS[name].draw_pair(rng) for _ in range(n)]


def write_folder(
    folder: Path, name: str, model: Transformer, card: dict[str, Any], mechanism: Mechanism
) -> None:
    """Write a model's folder: weights in half precision, prompts, circuit and card."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", model.sizes.bridge_fields())
    halves = {key: x.half().contiguous() for key, x in model.weights.items()}
    save_file(halves, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)
    write_json(folder / "card.json", card)
    lines = [json.dumps(_row(pair)) + "\n" for pair in _pairs(name, N_PAIRS, 0)]
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    write_json(folder / "reference.json", _reference(name, model, mechanism))
    sign(folder)


def _row(pair: PromptPair) -> dict[str, Any]:
    return {
        "clean": list(pair.clean), "corrupt": list(pair.corrupt),
        "answers": [pair.answer], "wrong_answers": [pair.corrupt_answer],
    }  # fmt: skip


def _reference(name: str, model: Transformer, mechanism: Mechanism) -> dict[str, Any]:
    sizes = model.sizes
    shape = GraphShape(
        n_layers=sizes.n_layers, n_heads=sizes.n_heads, has_mlp=sizes.d_mlp is not None
    )
    return {
        "name": name,
        "description": f"{TASKS[name].description}: {', '.join(mechanism.roles)}",
        "model": name,
        "task": "pairs.jsonl",
        "ablation": {"intervention": "resample", "direction": "noising"},
        "granularity": "edges",
        "citation": "trained here; interventions by hand in benchmarks/trained/mechanisms.py",
        "open": mechanism.open,
        "graph": shape_to_config(shape),
        "roles": {role: list(nodes) for role, nodes in mechanism.roles.items()},
        "edges": list(mechanism.edges),
    }


if __name__ == "__main__":
    main()
