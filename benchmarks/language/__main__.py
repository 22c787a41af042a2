"""``python -m benchmarks.language``: train the language model and say what it does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.language.card import facts_of, history_of, make_card
from benchmarks.language.card_page import card_page
from benchmarks.language.model import config_of, write_folder
from benchmarks.language.probes import score_all
from benchmarks.language.train import Schedule, Trainer, prepare, train

N_WINDOWS = 128
"""Windows of held-out text that a card's loss is measured on."""


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train, or go on where it was stopped")
    training.add_argument("--steps", type=int, default=4000, help="when it ends")
    training.add_argument("--decay", type=int, default=1000, help="steps of falling rate")
    looking = commands.add_parser("look", help="accuracy by task and form, as far as it is")
    carding = commands.add_parser("card", help="write the model's folder with its card")
    carding.add_argument("--name", default="language-small", help="of the model")
    carding.add_argument("--to", type=Path, required=True, help="folder of the model")
    for command in (training, looking, carding):
        command.add_argument("--out", type=Path, required=True, help="folder of the training")
        command.add_argument("--seed", type=int, default=0, help="of weights and batches")
        command.add_argument("--threads", type=int, default=1, help="torch's; decides rounding")
    for command, number in ((looking, 128), (carding, 512)):
        command.add_argument("--prompts", type=int, default=number, help="prompts of each form")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    {"train": _train, "look": _look, "card": _card}[chosen.command](chosen)


def _train(chosen: argparse.Namespace) -> None:
    for step, loss in train(chosen.out, Schedule(chosen.steps, chosen.decay), seed=chosen.seed):
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.4f}", flush=True)


def _look(chosen: argparse.Namespace) -> None:
    tokenizer, _ = prepare(chosen.out, config_of(), chosen.seed)
    trainer = Trainer.of_run(chosen.out, config_of(), chosen.seed)
    print(f"after {trainer.step} steps")
    for task, forms in score_all(trainer.model.eval(), tokenizer, chosen.prompts, 1).items():
        for form, found in forms.items():
            print(
                f"{task:13} {form:7} accuracy {found.accuracy:5.1%}, above the wrong ones "
                f"{found.choice:5.1%}, margin {found.margin:5.2f}"
            )


def _card(chosen: argparse.Namespace) -> None:
    config = config_of()
    tokenizer, batches = prepare(chosen.out, config, chosen.seed)
    trainer = Trainer.of_run(chosen.out, config, chosen.seed)
    write_folder(chosen.to, trainer.model, config, tokenizer)
    windows = batches.held_out_windows(N_WINDOWS, config["n_ctx"])
    facts = facts_of(chosen.out, chosen.name, chosen.seed)
    card = make_card(chosen.to, facts, windows, chosen.prompts)
    card["checkpoints"] = history_of(chosen.out, tokenizer, chosen.prompts // 4)
    (chosen.to / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (chosen.to / "README.md").write_text(card_page(card), encoding="utf-8")
    print(f"{chosen.to}: {len(card['not_there'])} shortfalls", *card["not_there"], sep="\n")


if __name__ == "__main__":
    main()
