"""Looking at the latents of a circuit: what they fire on, what they write, what they go with."""

from __future__ import annotations

from acdc.evidence.latents.gallery import Gallery, LatentView, look

__all__ = ["Gallery", "LatentView", "look"]
