"""Copy suppression: heads that write against the token which they attend to and which is predicted.

If earlier layers predict a token that stands in the context, a head that suppresses copies attends
to where it stands and lowers its logit; head 10.7 of GPT-2 small does little else (McDougall et
al. 2023).  This is measured of every head on any prompts, so that it can be asked of a model's own
weights:

==========  ==================================================================================
predicted   of the tokens before the last one (and after the first, where attention rests), the
            one whose logit is largest if the stream in front of the head's layer is unembedded
attention   from the last position to where that token stands
effect      what the head writes to that token's logit there, against the mean of all tokens,
            with the last norm held at its scale (nats)
share       of prompts on which that token is what the head attends to most, and the effect is
            negative
==========  ==================================================================================

It is a check of behaviour, not the ablation by which the authors explain 76.9 % of that head.

References
----------
McDougall, Conmy, Rushing, McGrath, Nanda 2023, "Copy Suppression: Comprehensively Understanding an
Attention Head", arXiv 2310.04625.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acdc.errors import TaskError
from acdc.models.lowering.model import LoweredModel, Trace

__all__ = ["CopySuppression", "measure_copy_suppression"]

_LEAST_TOKENS = 3


@dataclass(frozen=True, eq=False)
class CopySuppression:
    """Numbers of every head, ``[layer][head]`` each; see the module."""

    attention: list[list[float]]
    effect: list[list[float]]
    share: list[list[float]]

    def heads(self, least_share: float = 0.5) -> list[str]:
        """Return the heads that suppress copies on at least a share of prompts, the first first.

        Examples
        --------
        >>> CopySuppression([[0.1, 0.9]], [[0.0, -2.0]], [[0.0, 0.8]]).heads()
        ['a0.h1']
        """
        found = [
            (-share, f"a{layer}.h{head}")
            for layer, row in enumerate(self.share)
            for head, share in enumerate(row)
            if share >= least_share
        ]
        return [name for _, name in sorted(found)]


@torch.no_grad()
def measure_copy_suppression(
    model: LoweredModel, prompts: Sequence[Sequence[int]]
) -> CopySuppression:
    """Measure every head on prompts.

    Parameters
    ----------
    model
        A causal model.
    prompts
        Token ids of each, at least three; lengths may differ.

    Raises
    ------
    TaskError
        If there is no prompt, or one is too short to have a token in its midst.
    """
    if not prompts or min(map(len, prompts)) < _LEAST_TOKENS:
        shortest = min(map(len, prompts), default=0)
        raise TaskError(
            f"copy suppression needs prompts of at least {_LEAST_TOKENS} tokens, the shortest of "
            f"{len(prompts)} has {shortest}"
        )
    total = torch.zeros(3, model.shape.n_layers, model.shape.n_heads)
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [list(prompt) for prompt in prompts if len(prompt) == length]
        total += _measure(model, torch.tensor(rows, device=model.device)).cpu()
    attention, effect, share = (total / len(prompts)).tolist()
    return CopySuppression(attention, effect, share)


def _measure(model: LoweredModel, tokens: Tensor) -> Tensor:
    """``[3, layer, head]``: attention, effect and share, summed over prompts ``[prompt, pos]``."""
    trace = model.forward(tokens)
    rows = torch.arange(len(tokens), device=tokens.device)
    context = tokens[:, 1:-1]
    found = []
    for i in range(model.shape.n_layers):
        predicted = model.unembed(trace.attention_in[i][:, -1]).gather(1, context)
        token = context[rows, predicted.argmax(1)]  # [prompt]
        there = (context == token[:, None]).to(predicted.dtype)[:, None]  # [prompt, 1, key]
        layer = model.layers[i].attention
        looks = layer.patterns(trace.q[i], trace.k[i])[:, :, -1, 1:-1]  # [prompt, head, key]
        most = there.expand_as(looks).gather(2, looks.argmax(2, keepdim=True))[..., 0] > 0
        effect = _effects(model, trace, i, token)
        figures = ((looks * there).sum(2), effect, (most & (effect < 0)).to(effect.dtype))
        found.append(torch.stack(figures).sum(1))
    return torch.stack(found, 1)


def _effects(model: LoweredModel, trace: Trace, i: int, token: Tensor) -> Tensor:
    """``[prompt, head]``: what a layer's heads write to the logits of tokens ``[prompt]``."""
    final = trace.at(("final", 0))[:, -1]
    direction = model.W_U[token] - model.W_U.mean(0)
    back = model.ln_final.hold(final).vjp(final, direction)
    post = model.layers[i].attention_post
    if post is not None:
        out = trace.attention_out[i][:, -1]
        back = post.hold(out).vjp(out, back)
    W_O = model.layers[i].attention.W_O
    return torch.einsum("bhe,hed,bd->bh", trace.z[i][:, :, -1], W_O, back)
