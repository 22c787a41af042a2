"""How well a circuit is planted: what the model card says, measured on held-out prompts."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from acdc.tasks.base import Task
from benchmarks.planted.model import PatchableTransformer, Run
from benchmarks.planted.prompts import Draw, Prompts, draw_pairs
from benchmarks.planted.siit import Alignment, answers, divergence

__all__ = ["behaviour", "interchange", "strictness"]


@torch.no_grad()
def behaviour(
    model: PatchableTransformer,
    alignment: Alignment,
    draw: Draw,
    vocabulary: dict[str, int],
    n: int,
    seed: int,
) -> dict[str, float]:
    """Return accuracy and divergence of the undisturbed model on ``n`` held-out prompts."""
    base, _ = draw_pairs(draw, vocabulary, Random(seed), n, held_out=True)
    logits = model(base.tokens, base.last).logits
    return _agreement(answers(alignment.algorithm, base.names, model.config.d_vocab), logits)


@torch.no_grad()
def interchange(
    model: PatchableTransformer,
    alignment: Alignment,
    draw: Draw,
    vocabulary: dict[str, int],
    n: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Patch each aligned node, then each edge of the algorithm, from held-out source prompts.

    A hidden variable's node and edges are patched once more with the node that hides it.

    Returns
    -------
    dict
        Node or pair of nodes (two with a comma between) -> ``accuracy`` (share of prompts whose
        most likely token is one that the algorithm's counterfactual answer makes most likely),
        ``kl`` (nats, from that answer to the model's), and ``changed`` (share of prompts whose
        answer the intervention changes).
    """
    base, source = draw_pairs(draw, vocabulary, Random(seed), n, held_out=True)
    other = model(source.tokens, source.last)
    everywhere = torch.ones(n, dtype=torch.bool)
    plain = answers(alignment.algorithm, base.names, model.config.d_vocab)
    found = {}
    for name, edges, mask in _interventions(alignment):
        inside = dict.fromkeys(edges, everywhere)
        target = answers(
            alignment.algorithm, base.names, model.config.d_vocab, source.names, inside
        )
        logits = model(base.tokens, base.last, other, mask.expand(n, -1)).logits
        changed = (target - plain).abs().amax(-1) > 1e-6
        found[name] = _agreement(target, logits) | {"changed": changed.float().mean().item()}
    return found


def _interventions(alignment: Alignment) -> list[tuple[str, list[tuple[str, str]], Tensor]]:
    """Name, edges of the algorithm and ``[edge]`` mask of each interchange that is measured."""
    nodes = [
        (
            alignment.node(variable),
            [edge for edge in alignment.edges if edge[0] == variable],
            alignment.leaving(alignment.node(variable)),
        )
        for variable in alignment.algorithm.inner
    ]
    edges = [
        (pair, [edge], mask)
        for pair, (edge, mask) in zip(alignment.pairs, alignment.edges.items(), strict=True)
    ]
    return nodes + edges + [_with_hider(alignment, *one) for one in _hidden(alignment)]


def _hidden(alignment: Alignment) -> list[tuple[str, str, list[tuple[str, str]], Tensor]]:
    """Who hides it, and name, edges and mask, of the nodes and edges that a variable hides."""
    found = []
    for hidden, by in alignment.algorithm.hidden_by.items():
        node = alignment.node(hidden)
        found.append((by, node, alignment.algorithm.leaving(hidden), alignment.leaving(node)))
        for pair, (edge, mask) in zip(alignment.pairs, alignment.edges.items(), strict=True):
            if edge[1] == hidden and edge[0] != by:
                found.append((by, pair, [edge], mask))
    return found


def _with_hider(
    alignment: Alignment, by: str, name: str, edges: list[tuple[str, str]], mask: Tensor
) -> tuple[str, list[tuple[str, str]], Tensor]:
    """The same with the node of the variable ``by`` patched as well."""
    node = alignment.node(by)
    both = alignment.algorithm.leaving(by) + edges
    return f"{node}, {name}", both, alignment.leaving(node) | mask


def _agreement(target: Tensor, logits: Tensor) -> dict[str, float]:
    """Return how well ``logits`` agree with ``target`` log probabilities, ``[batch, d_vocab]``."""
    chosen = target.gather(1, logits.argmax(-1, keepdim=True))[:, 0]
    return {
        "accuracy": (chosen > target.amax(-1) - 1e-6).float().mean().item(),
        "kl": divergence(target, logits).mean().item(),
    }


@torch.no_grad()
def strictness(model: PatchableTransformer, alignment: Alignment, task: Task) -> dict[str, Any]:
    """Resample what is outside the circuit and measure what that does to the task.

    Effects are measured as ACDC does: the edges carry what their senders write on the corrupt
    prompt of the pair.

    Returns
    -------
    dict
        ``logit_diff_gap``: mean logit difference of the clean minus that of the corrupt
        prompts.  ``nodes_one_by_one``, ``pairs_one_by_one``: ``max`` and ``mean`` over all
        senders, over all pairs of nodes outside the circuit, and the worst one.
        ``all_nodes``, ``all_edges``: all at once.  Each effect as ``kl`` (nats, clean to
        patched) and ``logit_diff`` (absolute change of the task's mean, a fraction of the gap).
        ``planted_one_by_one``: the same for each planted node, and for one that another hides
        together with that.
    """
    measure = _Effects(model, task)
    nodes = {node: alignment.leaving(node) for node in alignment.outside_nodes}
    planted = {node: alignment.leaving(node) for node in alignment.nodes.values()}
    for hidden, by in alignment.algorithm.hidden_by.items():
        both = [alignment.node(by), alignment.node(hidden)]
        planted[", ".join(both)] = alignment.leaving(both[0]) | alignment.leaving(both[1])
    every_node = torch.stack(list(nodes.values())).any(0)
    return {
        "n_prompts": len(task),
        "logit_diff_gap": measure.gap,
        "nodes_one_by_one": measure.summary(nodes),
        "pairs_one_by_one": measure.summary(alignment.outside_pairs),
        "all_nodes": measure.effect(every_node),
        "all_edges": measure.effect(alignment.outside),
        "planted_one_by_one": {name: measure.effect(mask) for name, mask in planted.items()},
    }


class _Effects:
    """Effects of patching edges of a task's clean runs from its corrupt runs."""

    def __init__(self, model: PatchableTransformer, task: Task) -> None:
        self.model, self.task = model, task
        self.clean, self.corrupt = (
            as_prompts([getattr(pair, kind) for pair in task.pairs])
            for kind in ("clean", "corrupt")
        )
        self.base: Run = model(self.clean.tokens, self.clean.last)
        self.other: Run = model(self.corrupt.tokens, self.corrupt.last)
        self.full = self.logit_diff(self.base.logits)
        self.gap = self.full - self.logit_diff(self.other.logits)

    def logit_diff(self, logits: Tensor) -> float:
        """Return the mean over prompts of the answers' mean logit minus the wrong answers'."""
        margins = [
            row[list(pair.answers)].mean() - row[list(pair.wrong_answers)].mean()
            for row, pair in zip(logits, self.task.pairs, strict=True)
        ]
        return torch.stack(margins).mean().item()

    def effect(self, mask: Tensor) -> dict[str, float]:
        """Return the effect of patching the edges in ``mask [edge]``."""
        patched = mask.expand(len(self.task), -1)
        logits = self.model(self.clean.tokens, self.clean.last, self.other, patched).logits
        clean = torch.log_softmax(self.base.logits, -1)
        return {
            "kl": divergence(clean, logits).mean().item(),
            "logit_diff": abs(self.logit_diff(logits) - self.full) / self.gap,
        }

    def summary(self, masks: dict[str, Tensor]) -> dict[str, Any]:
        """Return the largest and the mean effect of patching each mask alone."""
        effects = {name: self.effect(mask) for name, mask in masks.items()}
        result: dict[str, Any] = {"n": len(effects)}
        for kind in ("kl", "logit_diff"):
            values = {name: effect[kind] for name, effect in effects.items()}
            worst = max(values, key=lambda name: values[name])
            result[kind] = {
                "max": values[worst],
                "worst": worst,
                "mean": sum(values.values()) / len(values),
            }
        return result


def as_prompts(rows: list[tuple[int, ...]], pad: int = 0) -> Prompts:
    """Return a task's prompts as a padded batch, without the algorithm's input."""
    length = max(map(len, rows))
    tokens = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
    last = torch.tensor([len(row) - 1 for row in rows])
    none = torch.empty(len(rows), 0, dtype=torch.long)
    return Prompts(tokens, last, names=none, places=none)
