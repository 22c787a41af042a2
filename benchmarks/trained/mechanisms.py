"""What was established of each model: who does what, by which edges, and what shows it.

Each function here looks at a model, names its heads by what they do, and measures what must hold
if they do that.  Figures are shares of prompts or of the whole effect, from 0 to 1; those of
:attr:`Mechanism.holds` must be near 1 and those of :attr:`Mechanism.fails` near 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.trained.interventions import Lab
from benchmarks.trained.model import Transformer
from benchmarks.trained.tasks import END, LENGTHS, MODULUS, N_SPECIAL, unseen

__all__ = ["LEAST_EFFECT", "MECHANISMS", "Mechanism"]

LEAST_EFFECT = 0.1
"""What an edge of a circuit changes at least when it alone is corrupted, and no other one."""


@dataclass(frozen=True)
class Mechanism:
    """What a model does.

    Parameters
    ----------
    says
        In words.
    roles
        Role -> heads and MLPs.
    edges
        The circuit.
    holds, fails
        What was measured -> a figure, see above.
    open
        What the circuit leaves open.
    """

    says: str
    roles: Mapping[str, tuple[str, ...]]
    edges: tuple[str, ...]
    holds: Mapping[str, float]
    open: str
    fails: Mapping[str, float] = field(default_factory=dict)


# --- the twins ----------------------------------------------------------------------------


def _to_token_before(lab: Lab, head: str) -> float:
    """Share of the source's tokens from which a head attends most to the token before."""
    pattern = lab.clean.patterns[head]
    at = torch.arange(2, LENGTHS[1] + 1)  # the first one's token before is BOS
    return (pattern[:, at].argmax(-1) == at - 1).float().mean().item()


def _twin(lab: Lab, *, by_keys: bool) -> Mechanism:
    """Previous-token head and the heads that read it: by their keys (copy) or values (reverse)."""
    prompts = lab.prompts
    asked = lab.place(prompts.clean[:, -1])  # where the source has the token last said
    answer = lab.place(prompts.answers)
    target, where = (answer, "answer") if by_keys else (asked, "token last said")
    before = max(lab.heads(0), key=lambda head: _to_token_before(lab, head))
    readers = tuple(
        head
        for head in lab.heads(1)
        if lab.attention(head, target) > 0.5 and lab.effect([f"{head}->logits"]) > LEAST_EFFECT
    )
    holds = {f"{before} attends most to the token before": _to_token_before(lab, before)}
    for head in readers:
        holds[f"{head} attends to the {where}"] = lab.attention(head, target)
    by_hand = {head: lab.looking_at(head, target) for head in readers}
    holds["right with the patterns set by hand to just that"] = lab.share(
        lab.run(patterns={before: lab.shifted(), **by_hand}), prompts.answers
    )
    moved, expected = _exchanged(lab, before, target, by_keys=by_keys)
    read, own = ("k", "qv") if by_keys else ("v", "qk")
    shares = {}
    for kind in "qkv":
        what = f"what {before} wrote at two tokens is exchanged in {_names(readers)}'s {kind}"
        carried = {f"{before}->{head}<{kind}>": moved for head in readers}
        shares[kind] = (f"{what}: the answer moves along", lab.share(lab.run(carried), expected))
    holds |= dict([shares.pop(read)])
    edges = [f"input->{before}<v>"]
    for head in readers:
        edges += [f"input->{head}<{kind}>" for kind in own]
        edges += [f"{before}->{head}<{read}>", f"{head}->logits"]
    found = (
        "keys; the token last said looks at the one after it, which is said"
        if by_keys
        else "values; the token last said looks at itself in the source, and what is before it "
        "there is said"
    )
    return Mechanism(
        says=f"{before} writes at every token which one is before it; of {_names(readers)} that "
        f"reaches the {found}",
        roles={"previous token": (before,), "induction" if by_keys else "reverse": readers},
        edges=tuple(edges),
        holds=holds,
        fails=dict(shares.values()),
        open=(
            "The previous-token head looks by position, which both prompts of a pair share, so its "
            "queries and keys are not in. Under zero ablation they might be."
        ),
    )


def _names(heads: Sequence[str]) -> str:
    return " and ".join(heads)


def _exchanged(lab: Lab, head: str, target: Tensor, *, by_keys: bool) -> tuple[Tensor, Tensor]:
    """What a head wrote with two tokens of the source exchanged, and the answer that makes.

    One is the one attended to, the other one half the source away (never the first, which no
    token is before).
    """
    tokens, n = lab.prompts.clean, LENGTHS[1]
    other = ((target - 1 + n // 2) % n + 1).clamp(min=2)
    written = lab.clean.senders[head].clone()
    written[lab.rows, target] = lab.clean.senders[head][lab.rows, other]
    written[lab.rows, other] = lab.clean.senders[head][lab.rows, target]
    place = other if by_keys else other - 1
    return written, tokens[lab.rows, place]


def _copy(lab: Lab) -> Mechanism:
    return _twin(lab, by_keys=True)


def _reverse(lab: Lab) -> Mechanism:
    return _twin(lab, by_keys=False)


# --- sorting ------------------------------------------------------------------------------


def _sorted(lab: Lab) -> Mechanism:
    """Heads that look at greater numbers, most at the nearest, and say what they look at."""
    tokens, prompts = lab.prompts.clean, lab.prompts
    source = slice(1, LENGTHS[1] + 1)
    last = tokens[:, -1:]
    answer = lab.place(prompts.answers)
    greater = tokens[:, source] > last  # [prompt, number]
    heads = lab.heads(0)
    looks = {head: lab.clean.patterns[head][:, -1, source] for head in heads}
    nearest = answer[:, None] == torch.arange(LENGTHS[1]) + 1
    second = (
        lab.place(_next_greater(tokens, prompts.answers))[:, None] == torch.arange(LENGTHS[1]) + 1
    )
    near = nearest | (second & greater)
    both = torch.stack(list(looks.values())).sum(0)  # [prompt, number]
    holds = {
        f"of what {_names(heads)} look at greater numbers, share of the nearest two": (
            ((both * near).sum() / (both * greater).sum()).item()
        )
    }
    fails = {
        f"{head} looks at numbers that are not greater": (x * ~greater).sum(-1).mean().item()
        for head, x in looks.items()
    }
    by_hand = {head: lab.looking_at(head, answer) for head in heads}
    holds["right with the heads made to look just there"] = lab.share(
        lab.run(patterns=by_hand), prompts.answers
    )
    other = answer % LENGTHS[1] + 1  # whatever number stands after it
    by_hand = {head: lab.looking_at(head, other) for head in heads}
    holds["made to look at another number, they say that one"] = lab.share(
        lab.run(patterns=by_hand), tokens[lab.rows, other]
    )
    return Mechanism(
        says=f"from the number last said {_names(heads)} look at the nearest two greater "
        "ones most, and say what they look at",
        roles={"next greater": tuple(heads)},
        edges=tuple(
            edge
            for head in heads
            for edge in (*(f"input->{head}<{kind}>" for kind in "qkv"), f"{head}->logits")
        ),
        holds=holds,
        fails=fails,
        open=(
            "Both heads do the same; how they share the numbers, and why the second nearest is not "
            "said, was not looked at."
        ),
    )


def _next_greater(tokens: Tensor, than: Tensor) -> Tensor:
    """The least number of each prompt above one, or that one if there is none."""
    source = tokens[:, 1 : LENGTHS[1] + 1]
    beyond = source.masked_fill(source <= than[:, None], tokens.max() + 1)
    found = beyond.amin(-1)
    return torch.where(found > tokens.max(), than, found)


# --- modular addition ---------------------------------------------------------------------

N_KEYS = 4
"""Frequencies of the embedding, of 11, that are enough."""


def _addition(lab: Lab) -> Mechanism:
    """Heads bring both numbers to the end, the MLP turns their rotations into that of the sum."""
    prompts, heads = lab.prompts, lab.heads(0)
    known = _unseen_sums()
    numbers = lab.model.weights["embed.W_E"][N_SPECIAL:]
    waves = torch.fft.rfft(numbers, dim=0)  # [frequency, d_model]
    power = waves[1:].abs().pow(2).sum(1)
    keys = (power.argsort(descending=True)[:N_KEYS] + 1).tolist()
    others = [f for f in range(1, len(waves)) if f not in keys]
    even = lab.clean.patterns[heads[0]].clone()
    even[:, -1] = torch.tensor([0.5, 0.5, 0.0])
    holds = {
        "sums that were never trained on are right": lab.right(*known),
        f"right with only the frequencies {sorted(keys)} of the numbers' embeddings": lab.right(
            *known, _with_waves(lab.model, waves, keys)
        ),
        "share of the embeddings' power in these": (
            power[[key - 1 for key in keys]].sum() / power.sum()
        ).item(),
        "right with both heads made to look at both numbers alike": lab.share(
            lab.run(patterns=dict.fromkeys(heads, even)), prompts.answers
        ),
    }
    fails = {
        "right with only the other frequencies": lab.right(
            *known, _with_waves(lab.model, waves, others)
        )
    }
    edges = [f"{head}->{reader}" for head in heads for reader in ("m0", "logits")]
    return Mechanism(
        says=f"numbers are embedded as rotations of the frequencies {sorted(keys)}; "
        f"{_names(heads)} bring both to the end, m0 makes that of the sum of them",
        roles={"bring both numbers": tuple(heads), "rotation by the sum": ("m0",)},
        edges=(
            *(f"input->{head}<v>" for head in heads),
            *edges,
            "m0->logits",
        ),
        holds=holds,
        fails=fails,
        open=(
            "How much a head looks at a number depends a little on the number, by its keys; "
            "looking at both alike does nearly as well, and these edges are left out. What the "
            "heads bring to the logits past the MLP helps, and was not explained. Which "
            "frequencies there are depends on the seed."
        ),
    )


def _unseen_sums() -> tuple[Tensor, Tensor]:
    """Prompts and answers of all sums that training leaves out."""
    pairs = [(a, b) for a in range(MODULUS) for b in range(MODULUS) if unseen(a, b)]
    numbers = torch.tensor(pairs)
    tokens = torch.cat([numbers + N_SPECIAL, torch.full((len(pairs), 1), END)], 1)
    return tokens, numbers.sum(1) % MODULUS + N_SPECIAL


def _with_waves(model: Transformer, waves: Tensor, keys: Sequence[int]) -> Transformer:
    """Return the model with only some frequencies of its numbers' embeddings, and their mean."""
    kept = torch.zeros_like(waves)
    kept[[0, *keys]] = waves[[0, *keys]]
    embedding = model.weights["embed.W_E"].clone()
    embedding[N_SPECIAL:] = torch.fft.irfft(kept, n=MODULUS, dim=0)
    return Transformer(model.sizes, {**model.weights, "embed.W_E": embedding})


MECHANISMS: dict[str, Callable[[Lab], Mechanism]] = {
    "trained-copy": _copy,
    "trained-reverse": _reverse,
    "trained-sorted": _sorted,
    "trained-addition": _addition,
}
