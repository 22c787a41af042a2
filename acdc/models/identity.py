"""Which model something is of: its sizes, where its weights are from, and a digest of them.

Head numbers mean something in one model alone.  A run therefore says which model it was made in
(``model_info`` in ``run.json``), and a reference which one it is of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from acdc.files.objects import JsonObject
from acdc.models import where_from
from acdc.models.lowering import LoweredModel

__all__ = ["Identity", "exact_digest", "identity_of", "read_identity", "sizes_of", "weights_digest"]

_PART = 1 << 22
"""Numbers of a weight that are looked at together."""


@dataclass(frozen=True)
class Identity:
    """Which model something is of, as far as it can be said.

    Parameters
    ----------
    name
        As it was asked for.
    source
        Where it was loaded from: ``known`` (bundled, or of an installed package), ``folder``,
        ``hub`` or ``object`` (given in Python).
    sizes
        See :func:`sizes_of`.
    weights
        See :func:`weights_digest`; empty where there is none.
    """

    name: str
    source: str
    sizes: Mapping[str, int]
    weights: str

    def plain(self) -> dict[str, Any]:
        """``model_info`` of a ``run.json``."""
        return asdict(self)


def identity_of(model: LoweredModel, name: str, *, is_object: bool) -> Identity:
    """Return which model a lowered one is.

    Parameters
    ----------
    model
        Any.
    name
        That it was asked for by.
    is_object
        Whether it was given in Python, not by that name.
    """
    source = "object" if is_object else where_from(name)
    return Identity(name, source, sizes_of(model), weights_digest(model))


def read_identity(run: JsonObject) -> Identity | None:
    """Return the identity in a ``run.json``; None if it is of an older version.

    Raises
    ------
    CircuitFileError
        If it is malformed.
    """
    if "model_info" not in run.content:
        return None
    said = run.at("model_info")
    sizes = said.at("sizes")
    return Identity(
        said.text("name"),
        said.text("source"),
        {name: sizes.get(name, int) for name in sizes.content},
        said.text("weights"),
    )


def sizes_of(model: LoweredModel) -> dict[str, int]:
    """Return the widths of a model; with its graph, which counts layers and heads, they are it."""
    W_O, mlp = model.layers[0].attention.W_O, model.layers[0].mlp
    return {
        "d_model": model.d_model,
        "d_head": int(W_O.shape[1]),
        "d_mlp": 0 if mlp is None else mlp.d_mlp,
        "d_vocab": model.d_vocab,
    }


def weights_digest(model: LoweredModel) -> str:
    """Digest of what heads write and of the unembedding, as bfloat16.

    Loaded in float32, float64 or bfloat16 a model has the same one.  Empty for one in float16,
    which rounds otherwise.
    """
    return "" if model.kept_dtype == torch.float16 else _digest(model, torch.bfloat16)


def exact_digest(model: LoweredModel) -> str:
    """Digest of the same weights, to the last bit."""
    return _digest(model, torch.float64)


def _digest(model: LoweredModel, dtype: torch.dtype) -> str:
    """Digest of what heads write and of the unembedding in some type, part by part."""
    found = hashlib.sha256()
    for weight in (model.W_U, *(layer.attention.W_O for layer in model.layers)):
        for part in weight.detach().split(max(1, _PART // weight[0].numel())):
            bits = part.to("cpu", dtype).contiguous().view(torch.uint8)
            found.update(bits.numpy().data)
    return found.hexdigest()[:16]
