"""Planted circuits: transformers made so that chosen nodes implement a chosen algorithm.

Each folder of :data:`MODELS` holds ``config.json``, ``model.safetensors`` (HookedTransformer
layout), the tokenizer, ``card.json`` (training, if any, interchange accuracies, strictness),
``pairs.jsonl`` (a task) and ``reference.json`` (the planted circuit).
"""

from pathlib import Path

__all__ = ["MODELS"]

MODELS: dict[str, Path] = {
    path.parent.name: path.parent
    for path in sorted((Path(__file__).parent / "models").glob("*/config.json"))
}
"""Folder of every planted model by name (``planted-ioi``, ...)."""
