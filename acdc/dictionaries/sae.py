"""Dictionaries: sparse autoencoders and transcoders, as SAELens computes them at inference.

::

    latents = act((pre(x)) @ W_enc + b_enc)          [..., n_latents]
    output  = post(latents @ W_dec + b_dec) + x @ W_skip^T

An SAE reads and writes the same activation.  A transcoder reads the MLP's input and writes its
output.

References
----------
SAELens 6 (Bloom, Tigges, Duong and Chanin 2024), ``sae_lens/saes``.  Architectures: Gao et al.
2024 (top-k), Rajamanoharan et al. 2024a (gated) and 2024b (jump-ReLU), Dunefsky et al. 2024
(transcoders), Paulo et al. 2025 (skip transcoders).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acdc.dictionaries.hooks import Hook

__all__ = ["ARCHITECTURES", "CROSS_LAYER", "NORMALIZATIONS", "TENSORS", "Dictionary"]

_RELU = ("W_enc", "b_enc", "W_dec", "b_dec")
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "standard": _RELU,
    "topk": _RELU,
    "jumprelu": (*_RELU, "threshold"),
    "gated": ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"),
    "transcoder": _RELU,
    "skip_transcoder": (*_RELU, "W_skip"),
    "jumprelu_transcoder": (*_RELU, "threshold"),
    "jumprelu_skip_transcoder": (*_RELU, "threshold", "W_skip"),
}
"""Architecture, by SAELens' name -> its tensors."""

CROSS_LAYER: dict[str, tuple[str, ...]] = {
    name.replace("transcoder", "cross_layer_transcoder"): (*tensors, "W_later")
    for name, tensors in ARCHITECTURES.items()
    if name.endswith("transcoder")
}
"""The same of one layer of a cross-layer transcoder, which SAELens' files cannot hold."""

NORMALIZATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
"""``normalize_activations``.  ``expected_average_only_in`` scales activations in training only;
SAELens folds its factor into the weights before it saves them, and so does nothing here."""

TENSORS = (
    *("W_enc", "W_dec", "b_dec", "b_enc", "b_gate", "b_mag", "r_mag", "threshold", "W_skip"),
    "W_later",
)
"""Every tensor that some architecture has."""

_EPS = 1e-5  # of SAELens' layer_norm
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A sparse autoencoder or transcoder.

    Parameters
    ----------
    architecture
        A key of :data:`ARCHITECTURES` or of :data:`CROSS_LAYER`.
    reads, writes
        Activation that is encoded, and activation that is reconstructed.
    W_enc, W_dec, b_dec
        ``[d_in, n_latents]``, ``[n_latents, d_out]``, ``[d_out]``.
    b_enc, b_gate, b_mag, r_mag, threshold
        ``[n_latents]`` where the architecture has them, else None.
    W_skip
        ``[d_out, d_in]`` in skip transcoders, else None.
    W_later
        ``[n_later, n_latents, d_out]`` of a layer of a cross-layer transcoder: what its latents
        write into the MLP outputs of each later layer; else None.
    k
        Latents that ``topk`` lets through per token, else None.
    apply_b_dec_to_input
        Whether ``b_dec`` is taken off the input.
    normalize_activations
        One of :data:`NORMALIZATIONS`.
    rescale_acts_by_decoder_norm
        ``topk`` only: latents are counted in units of a decoder row of norm 1.
    metadata
        What the file says of its making: ``model_name``, ``neuronpedia_id``, ``prepend_bos``...
    source
        File or folder that it came from, for messages.
    """

    architecture: str
    reads: Hook
    writes: Hook
    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    b_enc: Tensor | None = None
    b_gate: Tensor | None = None
    b_mag: Tensor | None = None
    r_mag: Tensor | None = None
    threshold: Tensor | None = None
    W_skip: Tensor | None = None
    W_later: Tensor | None = None
    k: int | None = None
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source: str = "dictionary"

    @property
    def d_in(self) -> int:
        """Width of what it reads."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of what it writes."""
        return self.W_dec.shape[1]

    @property
    def n_latents(self) -> int:
        """How many latents it has."""
        return self.W_enc.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Type of its weights, in which it computes."""
        return self.W_enc.dtype

    @property
    def is_transcoder(self) -> bool:
        """Whether it reads something else than it writes."""
        return self.reads != self.writes

    @property
    def neuronpedia_id(self) -> str | None:
        """Its name on neuronpedia.org, if its file says one."""
        return self.metadata.get("neuronpedia_id")

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with its weights and with how it computes."""
        settings = (
            self.architecture, self.reads, self.writes, self.k, self.apply_b_dec_to_input,
            self.normalize_activations, self.rescale_acts_by_decoder_norm,
        )  # fmt: skip
        found = hashlib.sha256(repr(settings).encode())
        for name, value in self.tensors.items():
            found.update(name.encode())
            found.update(value.detach().cpu().float().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its weights by SAELens' names."""
        known = ARCHITECTURES if self.W_later is None else CROSS_LAYER
        return {name: getattr(self, name) for name in known[self.architecture]}

    @property
    def last_layer(self) -> int:
        """The last layer that it writes into."""
        return self.writes.layer + (0 if self.W_later is None else len(self.W_later))

    @cached_property
    def encoder_directions(self) -> Tensor:
        """``[d_in, n_latents]``: change of an active latent per change of ``pre(x)``."""
        if self.r_mag is not None:
            return self.W_enc * self.r_mag.exp()
        return self.W_enc * self._decoder_norm if self.rescale_acts_by_decoder_norm else self.W_enc

    @property
    def decoder_directions(self) -> Tensor:
        """``[n_latents, d_out]``: change of the output, before ``post``, per unit of a latent."""
        if self.rescale_acts_by_decoder_norm:
            return self.W_dec / self._decoder_norm[:, None]
        return self.W_dec

    @cached_property
    def _decoder_norm(self) -> Tensor:
        return self.W_dec.norm(dim=-1)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Dictionary:
        """Return it with its weights on a device and in a type."""
        moved: dict[str, Any] = {
            name: value.to(device, dtype) for name, value in self.tensors.items()
        }
        return replace(self, **moved)

    def pre(self, x: Tensor) -> Tensor:
        """What the encoder's matrix reads of an activation ``x [..., d_in]``."""
        x = x.to(self.dtype)
        shift, scale = self._moments(x)
        if self.normalize_activations == "layer_norm":
            x = (x - shift) / (scale + _EPS)
        elif self.normalize_activations == "constant_norm_rescale":
            x = x / scale
        return x - self.b_dec if self.apply_b_dec_to_input else x

    def post(self, decoded: Tensor, x: Tensor) -> Tensor:
        """Undo the normalisation of ``x`` on what the decoder wrote; transcoders do not."""
        if self.is_transcoder:
            return decoded
        shift, scale = self._moments(x.to(self.dtype))
        return decoded * scale + shift

    def output_scale(self, x: Tensor) -> Tensor:
        """Factor of every latent's contribution to the output, ``[..., 1]`` or a scalar 1."""
        return self._moments(x.to(self.dtype))[1] if not self.is_transcoder else self._one

    @cached_property
    def _one(self) -> Tensor:
        return torch.ones((), dtype=self.dtype, device=self.W_enc.device)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale that ``normalize_activations`` takes off the input, ``[..., 1]``."""
        if self.normalize_activations == "layer_norm":
            return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        if self.normalize_activations == "constant_norm_rescale":
            norm = x.norm(dim=-1, keepdim=True).clamp_min(_TINY)
            return torch.zeros_like(norm), norm / self.d_in**0.5
        return torch.zeros_like(self._one), self._one

    def preactivations(self, x: Tensor) -> Tensor:
        """Latents before ReLU, threshold and gate, ``[..., n_latents]``."""
        bias = self.b_mag if self.b_enc is None else self.b_enc
        assert bias is not None
        if self.rescale_acts_by_decoder_norm:
            bias = bias * self._decoder_norm
        return self.pre(x) @ self.encoder_directions + bias

    def encode(self, x: Tensor) -> Tensor:
        """Latents of an activation; gradients flow through the active ones.

        Parameters
        ----------
        x
            ``[..., d_in]``: the activation at :attr:`reads`.

        Returns
        -------
        Tensor
            ``[..., n_latents]``, none below 0, in the dictionary's dtype.
        """
        before = self.preactivations(x)
        if self.k is not None:
            return _largest(before, self.k).relu()
        latents = before.relu()
        if self.threshold is not None:
            return latents * (before > self.threshold)
        if self.b_gate is not None:
            return latents * (self.pre(x) @ self.W_enc + self.b_gate > 0)
        return latents

    def decode(self, latents: Tensor, x: Tensor) -> Tensor:
        """What the latents say that the activation at :attr:`writes` is.

        Parameters
        ----------
        latents
            ``[..., n_latents]``.
        x
            ``[..., d_in]``: the activation that they encode; its normalisation is undone, and
            skip transcoders pass it on.

        Returns
        -------
        Tensor
            ``[..., d_out]`` in the dictionary's dtype.
        """
        out = self.post(latents @ self.decoder_directions + self.b_dec, x)
        return out if self.W_skip is None else out + x.to(self.dtype) @ self.W_skip.T

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruction: ``decode(encode(x), x)``."""
        return self.decode(self.encode(x), x)


def _largest(x: Tensor, k: int) -> Tensor:
    """``[..., n]`` with all but the ``k`` largest of the last axis set to 0.

    On a CPU numpy's partition finds the smallest of them several times sooner than ``topk`` does
    all; where more than ``k`` are as large as that, or one is no number, ``topk`` decides.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if on_cpu and not torch.is_grad_enabled():
        place = x.shape[-1] - k
        least = np.partition(x.numpy(), place, axis=-1)[..., place, None]
        inside = x >= torch.from_numpy(np.ascontiguousarray(least))
        if int(inside.count_nonzero()) == k * inside[..., 0].numel():
            return torch.where(inside, x, 0.0)
    values, indices = x.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(x).scatter(-1, indices, values)
