"""Direct effect of latents on the logits: what they write, straight through the unembedding.

``effect = largest activation * J(direction) @ W_U^T``, less its mean over the vocabulary (which
no probability depends on).  ``J`` is the final norm's derivative, averaged over the scored tokens
of the task's base run; nothing later reads the latent, and a soft cap of the logits is left out.
Where the attention has a norm of its own behind it (Gemma-2), what a latent of z writes passes its
derivative on the same tokens first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.dictionaries.attachment import Attachment
from acdc.engine.experiment import Experiment
from acdc.evidence.latents.activations import latent_sites
from graphs.spans import split_span

__all__ = ["Effect", "direct_effects"]

_BYTES = 64 << 20  # of the effects on the whole vocabulary that are held at once


@dataclass(frozen=True, eq=False)
class Effect:
    """The tokens whose logits a latent moves most, directly.

    Parameters
    ----------
    up, down
        Token ids, the most moved first.
    up_by, down_by
        By how much, in logits above the mean of the vocabulary.
    """

    up: NDArray[np.int64]
    up_by: NDArray[np.float64]
    down: NDArray[np.int64]
    down_by: NDArray[np.float64]


@torch.no_grad()
def direct_effects(
    experiment: Experiment,
    nodes: Sequence[str],
    sizes: NDArray[np.float64],
    n_tokens: int = 8,
) -> dict[str, Effect]:
    """Return the direct effects of latents.

    Parameters
    ----------
    experiment
        With dictionaries.
    nodes
        Names of latents.
    sizes
        ``[latent]``: activation that the effect is stated for.
    n_tokens
        Tokens up, and tokens down.
    """
    model = experiment.model
    size = dict(zip(nodes, sizes.tolist(), strict=True))
    of_latent: dict[str, list[str]] = {}
    for node in nodes:  # in every span a latent has the same direction
        of_latent.setdefault(split_span(node)[0], []).append(node)
    sites = latent_sites(experiment, nodes)
    found: dict[str, Effect] = {}
    n = min(n_tokens, model.d_vocab_out)
    for (_, names), written in zip(sites, _at_unembedding(experiment, sites), strict=True):
        each = max(1, _BYTES // (4 * model.d_vocab_out))
        rows = [(row, node) for row, name in enumerate(names) for node in of_latent[name]]
        for start in range(0, len(rows), each):
            which, some = zip(*rows[start : start + each], strict=True)
            scale = torch.tensor([size[name] for name in some])[:, None]
            logits = (written[list(which)] @ model.W_U.T).float().cpu() * scale
            logits -= logits.mean(-1, keepdim=True)
            up, down = logits.topk(n, -1), logits.topk(n, -1, largest=False)
            for i, name in enumerate(some):
                arrays = (up.indices, up.values.double(), down.indices, down.values.double())
                found[name] = Effect(*(x[i].numpy() for x in arrays))
    return found


def _at_unembedding(
    experiment: Experiment, sites: Sequence[tuple[Attachment, list[str]]]
) -> list[Tensor]:
    """Mean over scored tokens of ``J(direction)``, ``[latent, d_model]`` by site."""
    model = experiment.model
    totals = [torch.zeros_like(a.directions_in_stream) for a, _ in sites]
    for batch in experiment.batches:
        trace = model.forward(experiment.runs(batch)[0])
        assert trace.final is not None
        for total, (attachment, _) in zip(totals, sites, strict=True):
            directions, layer = attachment.directions_in_stream, attachment.site.layer
            after = model.layers[layer].attention_post if layer < len(model.layers) else None
            through = after is not None and attachment.site.kind == "attn_z"
            between = trace.attention_out[layer] if through else trace.final
            rows = (x[:, batch.scored].flatten(0, 1) for x in (trace.final, between))
            for final, out in zip(*rows, strict=True):
                moved = directions
                if through and after is not None:
                    moved = after.jvp(out, directions)
                total += model.ln_final.jvp(final, moved)
    return [total / experiment.n_rows for total in totals]
