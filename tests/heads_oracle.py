"""What heads do, measured by hooks on a native model: independent of ``acdc.measure.roles``.

Prompts are padded.  An inhibitor's whole effect on where movers look is measured, not that of its
path to their queries alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from transformer_lens.model_bridge.sources.native import NativeModel

from acdc.measure.roles import LEAST_ATTENTION, LEAST_EFFECT, HeadNumbers
from benchmarks.language import behaviour
from benchmarks.language.prompts import Prompts

__all__ = ["Seen", "direct_effects", "measure_heads", "traced"]


@dataclass(frozen=True, eq=False)
class Seen(behaviour.Trace):
    """A run with the attention of each layer, and the stream before the last norm."""

    patterns: list[torch.Tensor]
    final: torch.Tensor


def traced(model: NativeModel, tokens: torch.Tensor, patch: behaviour.Patch | None = None) -> Seen:
    """Run the model and keep what happens."""
    patterns: list[torch.Tensor] = []
    streams: list[torch.Tensor] = []
    hooks = [
        model.ln_out.register_forward_pre_hook(lambda module, args: streams.append(args[0])),
        *(
            block.attn.register_forward_hook(lambda module, args, out: patterns.append(out[1]))
            for block in model.layers
        ),
    ]
    try:
        trace = behaviour.run(model, tokens, patch)
    finally:
        for hook in hooks:
            hook.remove()
    return Seen(trace.mixed, trace.logits, patterns, streams[0])


def measure_heads(model: NativeModel, prompts: Prompts, seed: int = 0) -> HeadNumbers:
    """Measure every head on IOI prompts and on random tokens."""
    trace = traced(model, prompts.clean)
    numbers = _on_repeats(model, seed) | _on_names(trace, prompts)
    direct = direct_effects(model, trace, prompts)
    movers = _movers(numbers["end_to_io"], direct)
    return HeadNumbers(
        **{name: values.tolist() for name, values in numbers.items()},
        direct=direct.tolist(),
        inhibition=_inhibition(model, trace, prompts, movers).tolist(),
    )


def _on_repeats(
    model: NativeModel, seed: int, number: int = 64, length: int = 20
) -> dict[str, torch.Tensor]:
    rng = Random(seed)
    first = [[rng.randrange(1, model.cfg.d_vocab) for _ in range(length)] for _ in range(number)]
    patterns = torch.stack(traced(model, torch.tensor([row + row for row in first])).patterns)
    query = torch.arange(length, 2 * length)

    def mean(keys: torch.Tensor) -> torch.Tensor:
        return patterns[..., query, keys].mean((1, 3))  # [layer, batch, head, query] to [l, h]

    return {
        "previous": mean(query - 1),
        "duplicate": mean(query - length),
        "induction": mean(query - length + 1),
    }


def _on_names(trace: Seen, prompts: Prompts) -> dict[str, torch.Tensor]:
    rows, at = torch.arange(len(prompts)), prompts.places

    def mean(query: str, key: str) -> torch.Tensor:
        some = [pattern[rows, :, at[query], at[key]].mean(0) for pattern in trace.patterns]
        return torch.stack(some)

    return {
        "s2_to_s1": mean("S2", "S1"),
        "s2_to_after_s1": mean("S2", "S1+1"),
        "end_to_io": mean("END", "IO"),
        "end_to_s2": mean("END", "S2"),
    }


@torch.no_grad()
def direct_effects(model: NativeModel, trace: Seen, prompts: Prompts) -> torch.Tensor:
    """``[layer, head]``: direct effect on the margin, the last norm's scale as it is."""
    rows, end = torch.arange(len(prompts)), prompts.places["END"]
    unembed = model.head.weight * model.get_parameter("ln_out.weight")  # [d_vocab, d_model]
    towards = unembed[prompts.io] - unembed[prompts.subject]  # [prompt, d_model]
    towards = towards - towards.mean(-1, keepdim=True)  # the norm centres what is written
    scale = trace.final[rows, end].std(-1, correction=0)
    found = []
    for mixed, block in zip(trace.mixed, model.layers, strict=True):
        out = block.attn.o.weight.unflatten(1, mixed.shape[2:])  # [d_model, head, d_head]
        written = torch.einsum("bhe,dhe->bhd", mixed[rows, end], out)
        effect = torch.einsum("bhd,bd->bh", written, towards) / scale[:, None]
        found.append(effect.mean(0))
    return torch.stack(found) / behaviour._margins(trace, prompts).mean().abs()


def _movers(end_to_io: torch.Tensor, direct: torch.Tensor) -> list[behaviour.Head]:
    """Heads that look at IO and write for or against it."""
    chosen = (end_to_io >= LEAST_ATTENTION) & (direct.abs() >= LEAST_EFFECT)
    return [(layer, head) for layer, head in chosen.nonzero().tolist()]


def _inhibition(
    model: NativeModel, trace: Seen, prompts: Prompts, movers: Sequence[behaviour.Head]
) -> torch.Tensor:
    """Whole effect of each head at END on where movers of later layers look."""
    cfg, end = model.cfg, prompts.places["END"]
    other, found = traced(model, prompts.corrupt), torch.zeros(cfg.n_layers, cfg.n_heads)
    for layer in range(cfg.n_layers):
        later = [mover for mover in movers if mover[0] > layer]
        before = _preference(trace, prompts, later)
        for head in range(cfg.n_heads if later else 0):
            patched = traced(model, prompts.clean, behaviour.Patch(other, end, [(layer, head)]))
            found[layer, head] = 1 - _preference(patched, prompts, later) / before
    return found


def _preference(trace: Seen, prompts: Prompts, movers: Sequence[behaviour.Head]) -> float:
    """Mean attention of movers from END to IO minus that to the two subjects."""
    rows, at = torch.arange(len(prompts)), prompts.places
    total = 0.0
    for layer, head in movers:
        seen = trace.patterns[layer][rows, head, at["END"]]  # [prompt, key]
        total += (seen[rows, at["IO"]] - seen[rows, at["S1"]] - seen[rows, at["S2"]]).mean().item()
    return total
