"""Interventions by hand: what edges carry and where heads look is set, and the answer is read.

All figures are of the prompts' last position.  An *effect* is a change of the mean logit
difference between the two answers of a pair, as a share of that between its two prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.trained.model import Trace, Transformer
from benchmarks.trained.train import Prompts

__all__ = ["Lab", "one_hot"]


class Lab:
    """A model on prompts, with its clean and its corrupt run at hand.

    Parameters
    ----------
    model
        The model.
    prompts
        Pairs of prompts.
    """

    def __init__(self, model: Transformer, prompts: Prompts) -> None:
        self.model, self.prompts = model, prompts
        with torch.no_grad():
            self.clean, self.corrupt = model.run(prompts.clean), model.run(prompts.corrupt)
        self.rows = torch.arange(len(prompts))
        self.last = prompts.clean.shape[1] - 1

    @torch.no_grad()
    def run(
        self,
        edges: Mapping[str, Tensor] | None = None,
        patterns: Mapping[str, Tensor] | None = None,
    ) -> Trace:
        """Run the clean prompts with interventions, see :meth:`Transformer.run`."""
        return self.model.run(self.prompts.clean, edges, patterns)

    def said(self, trace: Trace) -> Tensor:
        """Return the most likely tokens, ``[prompt]``."""
        return trace.logits[:, -1].argmax(-1)

    def share(self, trace: Trace, expected: Tensor) -> float:
        """Return the share of prompts whose most likely token is the expected one."""
        return (self.said(trace) == expected).float().mean().item()

    @torch.no_grad()
    def right(self, tokens: Tensor, answers: Tensor, model: Transformer | None = None) -> float:
        """Return the share of other prompts ``[prompt, pos]`` that are right, of any model."""
        said = (model or self.model).logits(tokens)[:, -1].argmax(-1)
        return (said == answers).float().mean().item()

    def place(self, tokens: Tensor) -> Tensor:
        """Return where each prompt has a token first, ``[prompt]``."""
        return (self.prompts.clean == tokens[:, None]).float().argmax(-1)

    def attention(self, head: str, keys: Tensor) -> float:
        """Return how much a head attends from the last position to keys ``[prompt]``."""
        return self.clean.patterns[head][self.rows, self.last, keys].mean().item()

    def heads(self, layer: int) -> list[str]:
        """Return the heads of a layer."""
        return [f"a{layer}.h{h}" for h in range(self.model.sizes.n_heads)]

    # --- edges with what they carry on the corrupt prompt -------------------------------------

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """Every edge of the model's graph."""
        return tuple(
            f"{sender}->{receiver}"
            for receiver in self._receivers()
            for sender in self.clean.senders
            if _layer(sender) < _layer(receiver)
        )

    def _receivers(self) -> list[str]:
        sizes, found = self.model.sizes, []
        for layer in range(sizes.n_layers):
            found += [f"a{layer}.h{h}<{kind}>" for h in range(sizes.n_heads) for kind in "qkv"]
            found += [] if sizes.d_mlp is None else [f"m{layer}"]
        return [*found, "logits"]

    def margin(self, trace: Trace) -> float:
        """Return the mean logit difference between the clean and the corrupt answer."""
        logits, prompts = trace.logits[:, -1], self.prompts
        right, wrong = (
            logits[self.rows, prompts.answers],
            logits[self.rows, prompts.corrupt_answers],
        )
        return (right - wrong).mean().item()

    def effect(self, edges: Collection[str]) -> float:
        """Return the effect of edges that carry what their senders write on the corrupt prompt."""
        carried = {edge: self.corrupt.senders[edge.partition("->")[0]] for edge in edges}
        full, empty = self.margin(self.clean), self.margin(self.corrupt)
        return (full - self.margin(self.run(carried))) / (full - empty)

    def faithfulness(self, circuit: Collection[str]) -> float:
        """Return what a circuit keeps when every other edge is corrupted; 1 is all."""
        return 1 - self.effect([edge for edge in self.edges if edge not in circuit])

    # --- patterns by hand ---------------------------------------------------------------------

    def shifted(self) -> Tensor:
        """Return the pattern ``[prompt, query, key]`` of a head that attends to the token before.

        The first position has none and attends to itself.
        """
        length = self.last + 1
        before = torch.arange(length).sub(1).clamp(min=0)
        return one_hot(before, length).expand(len(self.prompts), -1, -1)

    def looking_at(self, head: str, keys: Tensor) -> Tensor:
        """Return a head's own pattern with the last query at keys ``[prompt]`` alone."""
        pattern = self.clean.patterns[head].clone()
        pattern[:, -1] = one_hot(keys, self.last + 1)
        return pattern


def one_hot(keys: Tensor, length: int) -> Tensor:
    """Return rows ``[..., length]`` that are 1 at ``keys`` and 0 elsewhere."""
    return torch.nn.functional.one_hot(keys, length).float()


def _layer(node: str) -> float:
    """When a node is computed: its layer, MLPs half a layer later."""
    if node == "input":
        return -1
    if node == "logits":
        return float("inf")
    return int(node[1:].partition(".")[0]) + (0.5 if node[0] == "m" else 0)
