"""What the answer to IOI prompts hangs on: on repeated names, on heads at places, on edges between.

The roles of heads are those of :mod:`acdc.measure.roles`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformer_lens.model_bridge.sources.native import NativeModel

from acdc.engine.patched import PatchedModel
from acdc.tasks import Task
from benchmarks.language.prompts import Prompts

__all__ = [
    "Head",
    "Trace",
    "duplicate_margins",
    "head_margins",
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
    mixed
        ``[batch, pos, head, d_head]`` of each layer, before the output matrix.
    logits
        ``[batch, pos, d_vocab]``.
    """

    mixed: list[torch.Tensor]
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
    mixed: list[torch.Tensor] = []

    def see_heads(layer: int, module: Any, arguments: tuple[torch.Tensor]) -> torch.Tensor:
        found = arguments[0].unflatten(-1, shape)
        found = found if patch is None else patch.at(layer, found)
        mixed.append(found)
        return found.flatten(2)

    hooks = [
        block.attn.o.register_forward_pre_hook(partial(see_heads, layer))
        for layer, block in enumerate(model.layers)
    ]
    try:
        logits = model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return Trace(mixed, logits)


def _margins(trace: Trace, prompts: Prompts) -> torch.Tensor:
    """``[prompt]``: logit of IO minus that of S at the end."""
    rows = torch.arange(len(prompts))
    last = trace.logits[rows, prompts.places["END"]]
    return last[rows, prompts.io] - last[rows, prompts.subject]


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
