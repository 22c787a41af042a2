"""The model card in words: what ``card.json`` says, for readers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["card_page"]

_MARGINS = {
    "as it is": "as it is",
    "S2 is a third name": "S2 replaced by a third name (no repeat)",
    "S2 is IO": "S2 replaced by the indirect object (the other repeat)",
}


def card_page(card: Mapping[str, Any]) -> str:
    """Return a card as Markdown."""
    return "\n".join(_lines(card)) + "\n"


def _lines(card: Mapping[str, Any]) -> Iterator[str]:
    training, ioi = card["training"], card["ioi"]
    text = training["text"]
    yield f"# {card['name']}\n"
    yield (
        f"{card['description']}. {card['n_parameters']:,} parameters, "
        f"weights in {card['weights']}, licence {card['license']}.\n"
    )
    yield (
        f"Made by `{card['made_by']}` in {training['seconds'] / 60:.0f} minutes on one core. Real "
        f"text: {text['what']} (Python {text['python']}, {text['license']}; {text['n_tokens']:,} "
        f"tokens); everything else is generated. Held out: {card['held_out']}.\n"
    )
    yield "## What it does\n"
    yield "Held-out prompts whose most likely next token is right, of all tokens.\n"
    yield "| task | form | right |\n|---|---|---|"
    for task, forms in card["held_out_scores"].items():
        for form, scores in forms.items():
            yield f"| {task} | {form} | {scores['accuracy']:.1%} |"
    yield f"\nLoss on held-out real text: {card['held_out_text_loss']:.2f} nats a token.\n"
    yield "On the package's own tasks, clean and corrupt prompts right:\n"
    yield "| task | corruption | clean | corrupt |\n|---|---|---|---|"
    for task, corruptions in card["task_scores"].items():
        for name, sides in corruptions.items():
            clean, corrupt = (f"{sides[side]['accuracy']:.1%}" for side in ("clean", "corrupt"))
            yield f"| {task} | {name} | {clean} | {corrupt} |"
    yield "\n## How it does indirect objects\n"
    yield "Prompts still right when no head reads another one (edges cut to a run without"
    yield "repeats):\n"
    for form, share in ioi["right_without_head_to_head_edges"].items():
        yield f"- {form}: {share:.1%}"
    yield "\nMean logit of the indirect object minus that of the subject:\n"
    for key, name in _MARGINS.items():
        yield f"- {name}: {ioi['logit_diff'][key]:.2f}"
    yield "\nHeads that behave as the roles of Wang et al. 2022 and Olsson et al. 2022, the"
    yield "strongest first:\n"
    for role, heads in ioi["roles"].items():
        yield f"- {role}: {', '.join(heads) or 'none'}"
    yield "\n## What is not there\n"
    missing = [role for role, heads in ioi["roles"].items() if not heads]
    yield from (f"- {line}" for line in card["not_there"])
    yield from (f"- no head behaves as a {role} head" for role in missing)
    if not missing and not card["not_there"]:
        yield "Nothing that was looked for."
