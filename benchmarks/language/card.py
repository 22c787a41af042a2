"""The model card: what was trained on what, what the model does, and what it does not.

Everything in it is measured on the weights as they are written, in half precision.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformer_lens.model_bridge.sources.native import NativeModel

from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.measure.roles import measure_roles, roles_of
from acdc.models import load_model
from acdc.tasks import TASKS, Task, load_task
from benchmarks.language import source
from benchmarks.language.behaviour import (
    duplicate_margins,
    head_margins,
    without_head_to_head,
)
from benchmarks.language.data import ANSWER_WEIGHT, OTHER_SHARE, TEXT_WEIGHT
from benchmarks.language.documents import HELD_OUT_IN
from benchmarks.language.model import read_folder
from benchmarks.language.probes import Probe, Score, score, score_all
from benchmarks.language.prompts import ioi_pairs, ioi_prompts
from benchmarks.language.train import ADAM_RATE, MIXTURES, MUON_RATE, Schedule

__all__ = ["Facts", "facts_of", "history_of", "make_card", "shortfalls", "text_loss"]

NEEDED_ACCURACY = 0.95
MOST_WITHOUT_HEADS = 0.6
"""What a model has to show before it is shipped: prompts right of every form, and prompts still
right when no head reads another one."""

NEEDED_ROLES = {
    "ioi": ("duplicate token", "S-inhibition", "name mover"),
    "docstring": ("previous token", "induction"),
}
"""Roles of which two (ioi) and both (docstring) have to be found."""

IOI_FORMS = ("abba", "baba", "order", "absent", "trio")
PACKAGES = ("torch", "transformer_lens", "transformers", "tokenizers")
SEED = 1
"""Of all prompts that the card is measured on."""


@dataclass(frozen=True)
class Facts:
    """What is known of a training without measuring anything.

    Parameters
    ----------
    name
        Of the model.
    seed
        Of weights and batches.
    schedule
        Learning rate.
    corpus
        Tokens, files and digest of the real text.
    loss
        Mean weighted cross-entropy of the last steps.
    seconds
        Wall-clock time of training, of all sittings.
    """

    name: str
    seed: int
    schedule: Schedule
    corpus: Mapping[str, Any]
    loss: float
    seconds: float


def facts_of(run: Path, name: str, seed: int) -> Facts:
    """Read what a training's folder says of it."""
    state = torch.load(run / "state.pt", weights_only=True)
    by_step, seconds = {}, 0.0
    before = 0.0
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_step[row["step"]] = row["loss"]
        # each sitting counts from zero
        seconds += row["seconds"] - before if row["seconds"] > before else row["seconds"]
        before = row["seconds"]
    last = [by_step[step] for step in sorted(by_step)[-100:]]
    corpus = json.loads((run / "text.json").read_text(encoding="utf-8"))
    schedule = Schedule(**state["schedule"])
    return Facts(name, seed, schedule, corpus, sum(last) / len(last), seconds)


def make_card(
    folder: Path, facts: Facts, windows: torch.Tensor, number: int = 512
) -> dict[str, Any]:
    """Return the card of a model folder.

    Parameters
    ----------
    folder
        As :func:`benchmarks.language.model.write_folder` wrote it.
    facts
        Of its training.
    windows
        ``[window, pos]``: real text that training did not have.
    number
        Prompts of every form.
    """
    model = read_folder(folder)
    lowered, tokenizer = load_model(str(folder))
    accuracy = score_all(model, tokenizer, number, SEED)
    prompts = ioi_prompts(tokenizer, number, SEED)
    task = Task("ioi", prompts.pairs, {})
    heads = measure_roles(Experiment(lowered, task, get_metric("logit_diff")))
    ioi = {
        "right_without_head_to_head_edges": without_head_to_head(
            lowered, _ioi_tasks(tokenizer, number // 4)
        ),
        "logit_diff": duplicate_margins(model, prompts),
        "roles": roles_of(heads),
    }
    return {
        **_description(model, facts),
        "held_out_scores": {
            task: {form: _rounded(asdict(scores)) for form, scores in forms.items()}
            for task, forms in accuracy.items()
        },
        "held_out_text_loss": round(text_loss(model, windows), 4),
        "task_scores": dict(_task_scores(model, tokenizer, number)),
        "ioi": ioi,
        "not_there": shortfalls(accuracy, ioi),
        "heads": _rounded(asdict(heads)),
        "margin_lost_by_head": _rounded(head_margins(model, prompts)),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
    }


def _description(model: NativeModel, facts: Facts) -> dict[str, Any]:
    cfg = model.cfg
    return {
        "name": facts.name,
        "license": "MIT",
        "description": (
            f"{cfg.n_layers} layers of attention and MLPs, trained on Python's standard library "
            "and on generated text of every task"
        ),
        "made_by": (
            f"python -m benchmarks.language train --steps {facts.schedule.n_steps} "
            f"--decay {facts.schedule.n_decay} --seed {facts.seed}"
        ),
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights": "float16",
        "training": {
            "text": {
                "what": "source and docstrings of Python's standard library, and its help topics",
                "license": source.LICENCE,
                "python": platform.python_version(),
                **facts.corpus,
            },
            "mixture": [_mixture(first, mixture) for first, mixture in MIXTURES],
            "weights": (
                f"an answer counts {ANSWER_WEIGHT:g}, real text {TEXT_WEIGHT:g}, {OTHER_SHARE:.0%} "
                "of the other generated tokens 1"
            ),
            "optimizer": (
                f"Muon at {MUON_RATE:g} for matrices in blocks, AdamW at {ADAM_RATE:g} for the rest"
            ),
            "schedule": asdict(facts.schedule),
            "seed": facts.seed,
            "loss": round(facts.loss, 4),
            "seconds": round(facts.seconds),
        },
        "held_out": (
            f"one combination of words in {HELD_OUT_IN}, by crc32 (see benchmarks/language/"
            "documents.py); training never has them together, scores are of nothing else"
        ),
    }


def _mixture(first: int, mixture: Any) -> dict[str, Any]:
    return {
        "from_step": first,
        "documents": {f"{task}/{form}": n for (task, form), n in mixture.documents.items()},
        "repeated_random_tokens": mixture.n_repeats,
        "windows_of_text": mixture.n_texts,
        "tokens_of_a_window": mixture.text_length,
    }


def _task_scores(
    model: NativeModel, tokenizer: Any, number: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Scores on the prompts of the package's own tasks, whose pairs are not held out."""
    for name, spec in TASKS.items():
        found = {}
        for corruption in spec.corruptions:
            task = load_task(
                name, tokenizer, n_prompts=number, corruption=corruption, d_vocab=len(tokenizer)
            )
            sides = {
                side: score(
                    model,
                    [
                        Probe(getattr(pair, side), pair.answers, pair.wrong_answers)
                        for pair in task.pairs
                    ],
                )
                for side in ("clean", "corrupt")
            }
            found[corruption] = {side: _rounded(asdict(s)) for side, s in sides.items()}
        yield name, found


def _ioi_tasks(tokenizer: Any, number: int) -> dict[str, Task]:
    return {form: Task(form, ioi_pairs(tokenizer, form, number, SEED), {}) for form in IOI_FORMS}


def shortfalls(accuracy: Mapping[str, Mapping[str, Score]], ioi: Mapping[str, Any]) -> list[str]:
    """Return what the model does not show, one line each; empty if it shows everything.

    Parameters
    ----------
    accuracy
        Task -> form -> score.
    ioi
        ``right_without_head_to_head_edges``, ``logit_diff`` and ``roles``.
    """
    found = [
        f"{task}/{form}: {scores.accuracy:.1%} of held-out prompts right, not {NEEDED_ACCURACY:.0%}"
        for task, forms in accuracy.items()
        for form, scores in forms.items()
        if scores.accuracy < NEEDED_ACCURACY
        and (task, form) not in (("ioi", "abc"), ("ioi", "new"))
    ]
    found += [
        f"ioi/{form}: without edges between heads still {share:.1%} right, more than "
        f"{MOST_WITHOUT_HEADS:.0%}"
        for form, share in ioi["right_without_head_to_head_edges"].items()
        if share > MOST_WITHOUT_HEADS
    ]
    margins = ioi["logit_diff"]
    if not abs(margins["S2 is a third name"]) < margins["as it is"] / 2:
        found.append(
            f"ioi: with a third name at S2 the logit difference is "
            f"{margins['S2 is a third name']:.2f} instead of {margins['as it is']:.2f}: "
            "the repeat does not decide"
        )
    for task, roles in NEEDED_ROLES.items():
        missing = [role for role in roles if not ioi["roles"][role]]
        if len(roles) - len(missing) < 2:
            found.append(f"{task}: no head behaves as one of {', '.join(missing)}")
    return found


def text_loss(model: NativeModel, windows: torch.Tensor) -> float:
    """Return the mean cross-entropy of windows ``[window, pos]`` of real text, in nats."""
    with torch.no_grad():
        logits = model(windows[:, :-1])
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


def history_of(run: Path, tokenizer: Any, number: int) -> list[dict[str, Any]]:
    """Return the accuracy by task and form of every checkpoint that a training kept."""
    found = []
    for folder in sorted((run / "checkpoints").iterdir()):
        scores = score_all(read_folder(folder), tokenizer, number, SEED)
        accuracy = {
            f"{task}/{form}": round(each.accuracy, 4)
            for task, forms in scores.items()
            for form, each in forms.items()
        }
        found.append({"step": int(folder.name), "accuracy": accuracy})
    return found


def _rounded(value: Any) -> Any:
    """Round all numbers to four places: cards are read."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
