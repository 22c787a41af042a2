"""What heads do while a model is trained, and what the answer hangs on.

Roles are those of :mod:`acdc.measure.roles`, measured here on a native model as it is trained, on
prompts that are padded.  In place of the corrupt run stands the ABC run, and an inhibitor's whole
effect on where movers look is measured, not that of its path to their queries alone.

References
----------
Wang et al. 2022, "Interpretability in the wild", arXiv 2211.00593, sections 3.1 to 3.3.
Olsson et al. 2022, "In-context learning and induction heads" (prefix matching on random tokens).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch
from transformer_lens.model_bridge.sources.native import NativeModel

from acdc.engine.patched import PatchedModel
from acdc.measure.roles import LEAST_ATTENTION, LEAST_EFFECT, HeadNumbers
from acdc.tasks import Task
from benchmarks.language.prompts import Prompts

__all__ = [
    "Head",
    "Trace",
    "duplicate_margins",
    "head_margins",
    "measure_heads",
    "run",
    "without_head_to_head",
]

Head = tuple[int, int]
"""Layer and index."""


@dataclass(frozen=True, eq=False)
class Trace:
    """A run, layer by layer.

    Parameters
    ----------
    patterns
        ``[batch, head, query, key]`` attention of each layer.
    mixed
        ``[batch, pos, head, d_head]`` of each layer, before the output matrix.
    final
        ``[batch, pos, d_model]``: the stream before the last norm.
    logits
        ``[batch, pos, d_vocab]``.
    """

    patterns: list[torch.Tensor]
    mixed: list[torch.Tensor]
    final: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True, eq=False)
class Patch:
    """Heads whose output comes from another run at one position of each prompt."""

    source: Trace
    positions: torch.Tensor
    heads: Sequence[Head]

    def at(self, layer: int, mixed: torch.Tensor) -> torch.Tensor:
        """Return ``mixed [batch, pos, head, d_head]`` with the other run's values in it."""
        rows, changed = torch.arange(len(mixed)), mixed.clone()
        for of, head in self.heads:
            if of == layer:
                other = self.source.mixed[layer][rows, self.positions, head]
                changed[rows, self.positions, head] = other
        return changed


@torch.no_grad()
def run(model: NativeModel, tokens: torch.Tensor, patch: Patch | None = None) -> Trace:
    """Run the model, with some heads' outputs from another run, and keep what happens."""
    shape = (model.cfg.n_heads, model.cfg.d_head)
    patterns: list[torch.Tensor] = []
    mixed: list[torch.Tensor] = []
    streams: list[torch.Tensor] = []

    def see_heads(layer: int, module: Any, arguments: tuple[torch.Tensor]) -> torch.Tensor:
        found = arguments[0].unflatten(-1, shape)
        found = found if patch is None else patch.at(layer, found)
        mixed.append(found)
        return found.flatten(2)

    hooks = [
        model.ln_out.register_forward_pre_hook(lambda module, args: streams.append(args[0])),
        *(
            hook
            for layer, block in enumerate(model.layers)
            for hook in (
                block.attn.register_forward_hook(lambda m, args, out: patterns.append(out[1])),
                block.attn.o.register_forward_pre_hook(partial(see_heads, layer)),
            )
        ),
    ]
    try:
        logits = model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return Trace(patterns, mixed, streams[0], logits)


def _margins(trace: Trace, prompts: Prompts) -> torch.Tensor:
    """``[prompt]``: logit of IO minus that of S at the end."""
    rows = torch.arange(len(prompts))
    last = trace.logits[rows, prompts.places["END"]]
    return last[rows, prompts.io] - last[rows, prompts.subject]


# Heads


def measure_heads(model: NativeModel, prompts: Prompts, seed: int = 0) -> HeadNumbers:
    """Measure every head on IOI prompts and on random tokens."""
    trace = run(model, prompts.clean)
    numbers = _on_repeats(model, seed) | _on_names(trace, prompts)
    direct = _direct(model, trace, prompts)
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
    patterns = torch.stack(run(model, torch.tensor([row + row for row in first])).patterns)
    query = torch.arange(length, 2 * length)

    def mean(keys: torch.Tensor) -> torch.Tensor:
        return patterns[..., query, keys].mean((1, 3))  # [layer, batch, head, query] to [l, h]

    return {
        "previous": mean(query - 1),
        "duplicate": mean(query - length),
        "induction": mean(query - length + 1),
    }


def _on_names(trace: Trace, prompts: Prompts) -> dict[str, torch.Tensor]:
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
def _direct(model: NativeModel, trace: Trace, prompts: Prompts) -> torch.Tensor:
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
    return torch.stack(found) / _margins(trace, prompts).mean().abs()


def _movers(end_to_io: torch.Tensor, direct: torch.Tensor) -> list[Head]:
    """Heads that look at IO and write for or against it."""
    chosen = (end_to_io >= LEAST_ATTENTION) & (direct.abs() >= LEAST_EFFECT)
    return [(layer, head) for layer, head in chosen.nonzero().tolist()]


def _inhibition(
    model: NativeModel, trace: Trace, prompts: Prompts, movers: Sequence[Head]
) -> torch.Tensor:
    """Path patching of each head at END into where movers of later layers look."""
    cfg, end = model.cfg, prompts.places["END"]
    other, found = run(model, prompts.corrupt), torch.zeros(cfg.n_layers, cfg.n_heads)
    for layer in range(cfg.n_layers):
        later = [mover for mover in movers if mover[0] > layer]
        before = _preference(trace, prompts, later)
        for head in range(cfg.n_heads if later else 0):
            patched = run(model, prompts.clean, Patch(other, end, [(layer, head)]))
            found[layer, head] = 1 - _preference(patched, prompts, later) / before
    return found


def _preference(trace: Trace, prompts: Prompts, movers: Sequence[Head]) -> float:
    """Mean attention of movers from END to IO minus that to the two subjects."""
    rows, at = torch.arange(len(prompts)), prompts.places
    total = 0.0
    for layer, head in movers:
        seen = trace.patterns[layer][rows, head, at["END"]]  # [prompt, key]
        total += (seen[rows, at["IO"]] - seen[rows, at["S1"]] - seen[rows, at["S2"]]).mean().item()
    return total


# What the answer hangs on


def duplicate_margins(model: NativeModel, prompts: Prompts, seed: int = 0) -> dict[str, float]:
    """Return the mean logit of IO minus S, and what becomes of it when a token changes.

    ``S2 is a third name`` takes the repeat away and nothing else; ``S2 is IO`` repeats the other
    name, so that the margin should turn.
    """
    shuffled = prompts.io[torch.randperm(len(prompts), generator=_generator(seed))]
    third = torch.where((shuffled == prompts.io) | (shuffled == prompts.subject), 0, shuffled)
    changed = {
        "as it is": prompts.clean,
        "S2 is a third name": prompts.with_token("S2", third),
        "S2 is IO": prompts.with_token("S2", prompts.io),
    }
    kept = third > 0  # a name that is one of the two says nothing
    return {
        name: _margins(run(model, tokens), prompts)[kept].mean().item()
        for name, tokens in changed.items()
    }


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def head_margins(model: NativeModel, prompts: Prompts) -> dict[str, list[list[float]]]:
    """Return the share of the margin that is lost when one head's output comes from ABC.

    By place, then ``[layer][head]``; everything that follows is computed anew.
    """
    cfg, other = model.cfg, run(model, prompts.corrupt)
    full = _margins(run(model, prompts.clean), prompts).mean().item()

    def lost(label: str, head: Head) -> float:
        patch = Patch(other, prompts.places[label], [head])
        return 1 - _margins(run(model, prompts.clean, patch), prompts).mean().item() / full

    return {
        label: [
            [lost(label, (layer, h)) for h in range(cfg.n_heads)] for layer in range(cfg.n_layers)
        ]
        for label in ("S1+1", "S2", "END")
    }


def without_head_to_head(model: Any, tasks: Mapping[str, Task]) -> dict[str, float]:
    """Return the share of prompts that are still right when no head reads another one.

    Parameters
    ----------
    model
        A lowered model, see :func:`acdc.load_model`.
    tasks
        Name -> its prompt pairs; edges that are cut carry the corrupt run's values.
    """
    from acdc import Experiment
    from acdc.engine.metrics import get_metric

    found = {}
    for name, task in tasks.items():
        experiment = Experiment(model, task, get_metric("logit_diff"))
        between = [_is_between_heads(edge) for edge in experiment.graph.edge_names()]
        values = PatchedModel(experiment).values(~torch.tensor(between).numpy())
        found[name] = float((values > 0).mean())
    return found


def _is_between_heads(edge: str) -> bool:
    """Whether both ends of an edge are heads.

    Examples
    --------
    >>> [_is_between_heads(e) for e in ("a0.h1->a2.h3.q", "m0->a2.h3.q", "a0.h1->logits")]
    [True, False, False]
    """
    sender, _, receiver = edge.partition("->")
    return sender.startswith("a") and receiver.startswith("a")
