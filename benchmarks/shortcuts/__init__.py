"""Two small trained models that answer right by a shortcut: benchmark subjects, quick to search.

``ioi-small`` learned the tasks ioi and pronoun, ``docstring-small`` the task docstring, and nothing
else.  Both answer their tasks, but not as a model of ordinary text does: ``ioi-small`` names who
does not come last, with constants written by its MLPs, and is still right on 77 % of prompts when
no head reads another one; ``docstring-small`` is two and a half layers of value flow.

Each folder of :data:`MODELS` holds ``config.json``, ``model.safetensors`` (HookedTransformer
layout), the tokenizer, ``card.json`` and ``dictionaries/``.
"""

from pathlib import Path

__all__ = ["MODELS"]

MODELS: dict[str, Path] = {
    path.parent.name: path.parent for path in sorted(Path(__file__).parent.glob("*/config.json"))
}
"""Folder of both models by name."""
