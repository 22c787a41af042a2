"""Transformers trained in the ordinary way, whose mechanism was established by hand afterwards.

Each folder of :data:`MODELS` holds ``config.json``, ``model.safetensors`` (HookedTransformer
layout, half precision), ``card.json`` (training, accuracy, what each head does), ``pairs.jsonl``
(a task) and ``reference.json`` (the circuit, with the intervention that it is true under).
"""

from pathlib import Path

__all__ = ["MODELS"]

MODELS: dict[str, Path] = {
    path.parent.name: path.parent
    for path in sorted((Path(__file__).parent / "models").glob("*/config.json"))
}
"""Folder of every trained model by name (``trained-copy``, ...)."""
