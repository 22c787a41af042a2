"""A dictionary attached to a model: the latents that are nodes, and what each of them writes.

``y`` being what a site writes, latent ``i`` writes ``coefficient_i * direction_i`` and the error
node ``y - sum_i coefficient_i * direction_i`` over the latents that are nodes.  So the error node
carries what the dictionary misses, the decoder's constant, a skip connection, and every latent
that is no node; and all nodes of the site together write ``y``, whatever the dictionary is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from acdc.dictionaries import Dictionary
from acdc.dictionaries.activations import check_fits
from acdc.dictionaries.neurons import EVERYWHERE, Neurons
from acdc.errors import DictionaryError
from acdc.models.lowering.model import LoweredModel
from acdc.models.lowering.norm import Norm
from graphs.sites import Site

__all__ = [
    "Attachment",
    "CrossLayerAttachment",
    "NeuronAttachment",
    "check_dictionaries",
    "site_kind",
]


def site_kind(dictionary: Dictionary | Neurons) -> tuple[str, int]:
    """Return the kind and the layer of a dictionary's site, see :class:`graphs.sites.Site`."""
    writes = dictionary.writes
    if isinstance(dictionary, Neurons):
        return "neuron_inputs" if dictionary.alone else "neurons", writes.layer
    if dictionary.W_later is not None:
        return "cross_layer", writes.layer
    if dictionary.is_transcoder:
        return "transcoder", writes.layer
    if writes.site == "resid_post":
        return "resid_pre", writes.layer + 1
    return writes.site, writes.layer


def check_dictionaries(model: LoweredModel, dictionaries: Sequence[Dictionary]) -> None:
    """Check that every dictionary fits and that no two are at one place.

    Raises
    ------
    DictionaryError
        Naming the dictionary, and what it lacks.
    """
    if not dictionaries:
        raise DictionaryError("no dictionary was given: name at least one")
    places: dict[object, Dictionary] = {}
    for dictionary in dictionaries:
        check_fits(dictionary, model)
        other = places.setdefault(dictionary.writes.part, dictionary)
        if other is not dictionary:
            raise DictionaryError(
                f"two dictionaries at one place: {other.source!r} on {other.reads.name!r} and "
                f"{dictionary.source!r} on {dictionary.reads.name!r}; give one of them"
            )
    _check_cross_layer(model, dictionaries)


def _check_cross_layer(model: LoweredModel, dictionaries: Sequence[Dictionary]) -> None:
    """Check that a cross-layer transcoder has the model's layers, and that there is no cut."""
    crossing = [d for d in dictionaries if d.W_later is not None]
    if not crossing:
        return
    n_layers, source = model.shape.n_layers, crossing[0].source
    if len(crossing) != n_layers or any(d.last_layer != n_layers - 1 for d in crossing):
        raise DictionaryError(
            f"cross-layer transcoder {source!r} has {crossing[0].last_layer + 1} layers, "
            f"{model.name!r} has {n_layers}; give one of this model"
        )
    for dictionary in dictionaries:
        if dictionary.writes.site.startswith("resid"):
            raise DictionaryError(
                f"dictionary {dictionary.source!r} of the whole stream beside cross-layer "
                f"transcoder {source!r}: what latents write behind it is not defined; leave one out"
            )


@dataclass(frozen=True, eq=False)
class Attachment:
    """Latents of one dictionary as nodes.

    Parameters
    ----------
    model
        The model.
    dictionary
        On the model's device, in its type.
    latents
        Indices of those that are nodes, ascending.
    """

    model: LoweredModel
    dictionary: Dictionary
    latents: tuple[int, ...]

    @cached_property
    def site(self) -> Site:
        """Its place in the graph."""
        kind, layer = site_kind(self.dictionary)
        return Site(kind, layer, self.latents)

    def on(self, model: LoweredModel) -> Attachment:
        """Return the attachment on the same model with other norms, sharing what it has made."""
        made = replace(self, model=model, dictionary=self._dictionary_on(model))
        own = {one.name for one in fields(self)}
        vars(made).update({name: x for name, x in vars(self).items() if name not in own})
        return made

    def _dictionary_on(self, model: LoweredModel) -> Dictionary:
        return self.dictionary

    def keeping(self, latents: Sequence[int]) -> Attachment:
        """Return the attachment with other latents as nodes."""
        return replace(self, latents=tuple(sorted(latents)))

    @cached_property
    def _ids(self) -> Tensor:
        return torch.tensor(self.latents, dtype=torch.long, device=self.model.device)

    @cached_property
    def _nodes(self) -> Dictionary:
        """The dictionary of the nodes alone; top-k latents compete, so there it is all of it."""
        if self.dictionary.k is not None:
            return self.dictionary
        ids = self._ids
        parts: dict[str, Any] = {
            name: (x[:, ids] if name == "W_enc" else x[ids])
            for name, x in self.dictionary.tensors.items()
            if name not in ("b_dec", "W_skip", "W_later")
        }
        return replace(self.dictionary, **parts)

    @property
    def n_encoded(self) -> int:
        """How many latents are computed for those of the nodes."""
        return len(self.latents) if self.dictionary.k is None else self.dictionary.n_latents

    def coefficients(self, x: Tensor, positions: slice | list[int] = EVERYWHERE) -> Tensor:
        """What each node's direction is multiplied with, ``[..., latent]``.

        Parameters
        ----------
        x
            ``[..., d_in]``: what the dictionary reads.
        positions
            Those of ``x``, where it is a stream whose norms may be held.
        """
        found = self._nodes.encode(x)
        if self.dictionary.k is not None:
            found = found[..., self._ids]
        return (found * self._nodes.output_scale(x)).to(x.dtype)

    @cached_property
    def directions(self) -> Tensor:
        """``[latent, d_out]``."""
        rows = self.dictionary.decoder_directions[self._ids]
        return rows.to(self.model.dtype)

    @cached_property
    def directions_in_stream(self) -> Tensor:
        """``[latent, d_model]``: what a latent adds to the stream; z goes through W_O."""
        if self.site.kind != "attn_z":
            return self.directions
        return self.directions @ self.model.layers[self.site.layer].attention.W_O.flatten(0, 1)

    # -- transcoders ------------------------------------------------------------------------

    @property
    def norm(self) -> Norm:
        """In front of its MLP."""
        norm = self.model.layers[self.site.layer].ln2
        assert norm is not None
        return norm

    def read_stream(self, stream: Tensor, norm: Norm | None = None) -> Tensor:
        """What a transcoder reads of the raw stream in front of its MLP.

        Parameters
        ----------
        stream
            ``[..., d_model]``.
        norm
            :attr:`norm` for the tokens or positions of the stream; None: for all.
        """
        norm = norm or self.norm
        match self.dictionary.reads.site:
            case "ln2_normalized":
                return norm.normalized(stream).to(stream.dtype)
            case "ln2_out":
                return norm(stream)
        return stream

    def active(self, stream: Tensor, tokens: slice | Tensor) -> Tensor:
        """``[token, latent]``: which latents of a transcoder have a gradient."""
        return self.coefficients(self.read_stream(stream, self.norm.on(tokens))) != 0

    def gradients(
        self, stream: Tensor, latents: Tensor, tokens: slice | Tensor = EVERYWHERE
    ) -> Tensor:
        """``d coefficient / d stream`` of active latents of a transcoder.

        Parameters
        ----------
        stream
            ``[token, d_model]``.
        latents
            ``[slot, token]``: positions among the nodes.
        tokens
            Which of the flattened batch and positions those of the stream are.

        Returns
        -------
        Tensor
            ``[slot, token, d_model]``.
        """
        norm = self.norm.on(tokens)
        rows = self.dictionary.encoder_directions.T[self._ids].to(stream.dtype)
        g = self._through_pre(self.read_stream(stream, norm), rows[latents])
        match self.dictionary.reads.site:
            case "ln2_normalized":
                return replace(norm, weight=None).vjp(stream, g)
            case "ln2_out":
                return norm.vjp(stream, g)
        return g

    def _through_pre(self, x: Tensor, g: Tensor) -> Tensor:
        """Map gradients back through the dictionary's own normalisation of its input."""
        if self.dictionary.normalize_activations in ("none", "expected_average_only_in"):
            return g
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            out = self.dictionary.pre(x)
            slots = [torch.autograd.grad(out, x, row, retain_graph=True)[0] for row in g]
        return torch.stack(slots).to(g.dtype) if slots else g


@dataclass(frozen=True, eq=False)
class CrossLayerAttachment(Attachment):
    """Latents of one layer of a cross-layer transcoder as nodes.  Parameters as above."""

    @property
    def layers(self) -> range:
        """MLPs whose outputs they write into."""
        return range(self.site.layer, self.dictionary.last_layer + 1)

    @cached_property
    def into(self) -> Tensor:
        """``[layer, latent, d_model]``: what they write into each of :attr:`layers`."""
        later = self.dictionary.W_later
        assert later is not None
        both = torch.cat([self.dictionary.W_dec[None, self._ids], later[:, self._ids]])
        return both.to(self.model.dtype)

    @cached_property
    def growing(self) -> Tensor:
        """``[layer, latent, d_model]``: what they have written once each of these is through."""
        return self.into.cumsum(0)

    @property
    def directions_in_stream(self) -> Tensor:  # type: ignore[override]  # nothing to keep
        """``[latent, d_model]``: what a latent adds to the stream in all."""
        return self.growing[-1]


@dataclass(frozen=True, eq=False)
class NeuronAttachment(Attachment):
    """Neurons of one MLP as nodes.  Parameters as :class:`Attachment`."""

    dictionary: Neurons  # type: ignore[assignment]  # has of a dictionary what is used here

    def _dictionary_on(self, model: LoweredModel) -> Neurons:  # type: ignore[override]  # as above
        return replace(self.dictionary, model=model)

    def coefficients(self, x: Tensor, positions: slice | list[int] = EVERYWHERE) -> Tensor:
        """Activations ``[..., neuron]`` of the nodes at the raw stream ``x [..., d_model]``."""
        return self.dictionary.encode(x, positions)[..., self._ids]

    def active(self, stream: Tensor, tokens: slice | Tensor) -> Tensor:
        """``[token, neuron]``: every neuron answers to what it reads, also at 0."""
        return torch.ones(len(stream), len(self.latents), dtype=torch.bool, device=stream.device)

    def gradients(
        self, stream: Tensor, latents: Tensor, tokens: slice | Tensor = EVERYWHERE
    ) -> Tensor:
        """``d activation / d stream``, see :meth:`Attachment.gradients`."""
        return self.dictionary.mlp.on(tokens).pull_neurons(stream, self._ids[latents])
