"""Weights written by hand: indirect object identification with a backup of the name mover.

Training (:mod:`benchmarks.planted.siit`) plants the name mover, but a backup that is silent as
long as the mover writes hardly ever makes a difference, and stays silent for good.  Here every
weight of the circuit is set instead, in a model without norms; all other heads write nothing.

The stream has a block of directions for each thing that is said::

    name, is_name   of the token: a code of its own for each name, and 1 for all of them
    here            position, one direction each
    twin, twins     at the third name: position of the name that it repeats, and 1 if there is one
    barred, bars    at the end: positions of both, and 1 if there are any
    said, speaks    at the end: code of the name that a mover writes, and 1 if the first one does

A head whose query finds no key that fits attends to position 0, whose value it does not read:
no prompt has a name there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.planted.model import PatchableTransformer

__all__ = ["SIZES", "write_backup"]

D_NAME, N_POS = 48, 24
_WIDTHS = {
    "name": D_NAME, "is_name": 1, "here": N_POS, "twin": N_POS, "twins": 1,
    "barred": N_POS, "bars": 1, "said": D_NAME, "speaks": 1,
}  # fmt: skip
_D_HEAD = D_NAME + N_POS + 1  # what the first head compares; the last is for position 0
_SHARP = 60.0
"""Score of a key that fits, in nats; position 0 has half of it, what is barred less than none."""
_CONFIDENCE = 9.0
"""Logit of the name that is said; that of others is smaller by how far their codes agree."""

SIZES = {
    "n_layers": 4, "n_heads": 4, "d_model": sum(_WIDTHS.values()), "d_head": _D_HEAD,
    "d_mlp": None, "n_ctx": N_POS, "norm": False,
}  # fmt: skip
"""Fields of :class:`Config` but the vocabulary's size."""


def _blocks() -> dict[str, slice]:
    """Directions of the stream by what they say."""
    found, start = {}, 0
    for name, width in _WIDTHS.items():
        found[name] = slice(start, start + width)
        start += width
    return found


_AT = _blocks()


def write_backup(
    model: PatchableTransformer,
    nodes: Mapping[str, str],
    names: list[int],
    seed: int,
) -> None:
    """Set all weights of a model.

    Parameters
    ----------
    model
        Of :data:`SIZES`.
    nodes
        Variable of the algorithm -> head.
    names
        Token ids of all names.
    seed
        Of the names' codes; the global random state is not touched.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        codes = _codes(len(names), seed)
        embed, unembed = model.embed.W_E, model.unembed.W_U
        embed[names, _AT["name"]] = codes
        embed[names, _AT["is_name"]] = 1
        model.pos_embed.W_pos[:, _AT["here"]] = torch.eye(N_POS)
        unembed[_AT["said"], names] = _CONFIDENCE * codes.T
        heads = {variable: _Head(model, node) for variable, node in nodes.items()}
        _write_duplicate_token(heads["duplicate token"])
        _write_s_inhibition(heads["S-inhibition"])
        _write_mover(heads["name mover"], backup=False)
        _write_mover(heads["backup name mover"], backup=True)


def _codes(n: int, seed: int) -> Tensor:
    """Return a unit vector for each name, ``[name, D_NAME]``, drawn and then spread apart."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(n, D_NAME, generator=generator)
    for _ in range(200):
        codes = codes / codes.norm(dim=1, keepdim=True)
        near = (codes @ codes.T).fill_diagonal_(0) ** 3
        codes = codes - 0.5 * near @ codes
    return codes / codes.norm(dim=1, keepdim=True)


class _Head:
    """The weights of one head, whose query and key share axes: a score is a sum over axes."""

    def __init__(self, model: PatchableTransformer, node: str) -> None:
        layer, head = (int(part[1:]) for part in node.split("."))
        attention = model.get_submodule(f"blocks.{layer}.attn")
        self.W_Q, self.W_K, self.W_V, self.W_O, self.b_Q = (
            attention.get_parameter(name)[head] for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q")
        )
        self.scale = _D_HEAD**0.5  # scores are divided by it
        self.n_axes = self.n_values = 0

    def match(self, query: str | None, key: str, score: float) -> None:
        """Add ``score * query . key`` of two blocks; without a query the key counts alone."""
        width = _WIDTHS[key]
        axes = slice(self.n_axes, self.n_axes + width)
        if query is None:
            self.b_Q[axes] = score * self.scale
        else:
            self.W_Q[_AT[query], axes] = score * self.scale * torch.eye(width)
        self.W_K[_AT[key], axes] = torch.eye(width)
        self.n_axes += width

    def rest_at_start(self) -> None:
        """Attend to position 0 where no key fits."""
        self.b_Q[self.n_axes] = _SHARP / 2 * self.scale
        self.W_K[_AT["here"].start, self.n_axes] = 1
        self.n_axes += 1

    def copy(self, source: str, target: str) -> None:
        """Write what one block says to another one, but for position 0."""
        values = slice(self.n_values, self.n_values + _WIDTHS[source])
        self.W_V[_AT[source], values] = torch.eye(_WIDTHS[source])
        if source == "here":
            self.W_V[_AT[source].start, values] = 0
        self.W_O[values, _AT[target]] = torch.eye(_WIDTHS[source])
        self.n_values += _WIDTHS[source]


def _write_duplicate_token(head: _Head) -> None:
    """At a name, attend to an earlier equal name; write where it is."""
    head.match("name", "name", _SHARP)
    head.match("here", "here", -2 * _SHARP)  # not to itself
    head.rest_at_start()
    head.copy("here", "twin")
    head.copy("is_name", "twins")


def _write_s_inhibition(head: _Head) -> None:
    """Attend to the name that has a twin; write where both are."""
    head.match(None, "twins", _SHARP)
    head.rest_at_start()
    head.copy("twin", "barred")
    head.copy("here", "barred")
    head.copy("twins", "bars")


def _write_mover(head: _Head, *, backup: bool) -> None:
    """Attend to a name that is not barred, if any is barred; write it.

    The backup does not attend to names where the other mover speaks.
    """
    head.match("bars", "is_name", _SHARP)
    head.match("barred", "here", -2 * _SHARP)
    head.rest_at_start()
    head.copy("name", "said")
    if backup:
        head.match("speaks", "is_name", -2 * _SHARP)
    else:
        head.copy("is_name", "speaks")
