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
from benchmarks.trained.tasks import LENGTHS

__all__ = ["LEAST_EFFECT", "MECHANISMS", "MOST_EFFECT", "Mechanism"]

LEAST_EFFECT, MOST_EFFECT = 0.1, 0.05
"""An edge of a circuit changes more than the first when it alone is corrupted, another one less
than the second."""


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
        "keys: from the token last said they look at the token after it, and say it"
        if by_keys
        else "values: from the token last said they look at itself in the source, and say what is "
        "before it"
    )
    return Mechanism(
        says=f"{before} writes at every token which one is before it; {_names(readers)} read that "
        f"in their {found}",
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


MECHANISMS: dict[str, Callable[[Lab], Mechanism]] = {
    "trained-copy": _copy,
    "trained-reverse": _reverse,
}
