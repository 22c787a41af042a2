"""What heads look at where random tokens come twice: no task, no words, any causal model.

==============  ============================================================================
``previous``    attention to the token before
``duplicate``   attention from a token to the same one in the first round
``induction``   attention from a token to what followed it in the first round
==============  ============================================================================

Each is a mean over the second round.

References
----------
Olsson et al. 2022, "In-context learning and induction heads" (prefix matching on random tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from acdc.models.lowering.model import LoweredModel

__all__ = ["BEHAVIOURS", "measure_repeats"]

BEHAVIOURS = ("previous", "duplicate", "induction")
"""What is measured, see the module."""

_N_PROMPTS, _MOST_TOKENS, _FEWEST_TOKENS = 32, 20, 4


@torch.no_grad()
def measure_repeats(
    model: LoweredModel, beginning: Sequence[int] = (), seed: int = 0
) -> dict[str, Tensor]:
    """Return attention on random tokens that come twice.

    Parameters
    ----------
    model
        Any; of one that is not causal, or reads or knows too few tokens, nothing is measured.
    beginning
        Tokens in front of them.
    seed
        Of the tokens, none of which comes twice in a round.

    Returns
    -------
    dict
        Of each of :data:`BEHAVIOURS` ``[layer, head]``; empty where nothing is measured.
    """
    vocabulary = [token for token in range(1, model.d_vocab) if token not in beginning]
    n = min(_MOST_TOKENS, len(vocabulary), (model.n_ctx - len(beginning)) // 2)
    if n < _FEWEST_TOKENS or not all(layer.attention.causal for layer in model.layers):
        return {}
    rng = Random(seed)
    rounds = [rng.sample(vocabulary, n) for _ in range(_N_PROMPTS)]
    tokens = torch.tensor([[*beginning, *once, *once] for once in rounds], device=model.device)
    trace = model.forward(tokens)
    query = torch.arange(n, 2 * n, device=model.device) + len(beginning)
    keys = dict(zip(BEHAVIOURS, (query - 1, query - n, query - n + 1), strict=True))
    found: dict[str, list[Tensor]] = {name: [] for name in keys}
    for layer, q, k in zip(model.layers, trace.q, trace.k, strict=True):
        pattern = layer.attention.patterns(q, k)  # [batch, head, query, key]
        for name, key in keys.items():
            found[name].append(pattern[..., query, key].mean((0, 2)).cpu())
    return {name: torch.stack(layers) for name, layers in found.items()}
