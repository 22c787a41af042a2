"""IOI prompts with the places of their names, and their corruptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from acdc.tasks import Pair, words
from benchmarks.language.probes import Probe, probes_of

__all__ = ["Prompts", "ioi_pairs", "ioi_prompts"]


@dataclass(frozen=True, eq=False)
class Prompts:
    """IOI prompts of the plain forms, padded on the right.

    Parameters
    ----------
    clean, corrupt
        ``[prompt, pos]``; in the corrupt ones (ABC) every name is another one, none twice.
    places
        Label (``S1``, ``S1+1``, ``IO``, ``S2``, ``END``) -> ``[prompt]`` positions.
    io, subject
        ``[prompt]`` tokens of the two names.
    """

    clean: torch.Tensor
    corrupt: torch.Tensor
    places: dict[str, torch.Tensor]
    io: torch.Tensor
    subject: torch.Tensor

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The prompts as a task has them: each of its own length, with its places."""
        return tuple(
            Pair(
                tuple(self.clean[i, : at["END"] + 1].tolist()),
                tuple(self.corrupt[i, : at["END"] + 1].tolist()),
                (int(self.io[i]),),
                (int(self.subject[i]),),
                spans={label: (position,) for label, position in at.items()},
            )
            for i in range(len(self))
            for at in [{label: int(places[i]) for label, places in self.places.items()}]
        )

    def with_token(self, label: str, tokens: torch.Tensor) -> torch.Tensor:
        """Return the clean prompts with other tokens ``[prompt]`` at a place."""
        changed = self.clean.clone()
        changed[torch.arange(len(self)), self.places[label]] = tokens
        return changed


def _name_tokens(tokenizer: Any) -> list[int]:
    return [tokenizer.encode(f" {name}")[0] for name in words.NAMES]


def _corrupted(rng: Random, tokens: Sequence[int], names: Sequence[int]) -> list[int]:
    """Replace every name by one that the prompt does not have, all different."""
    fresh = iter(rng.sample([name for name in names if name not in tokens], len(tokens)))
    known = set(names)
    return [next(fresh) if token in known else token for token in tokens]


def ioi_prompts(tokenizer: Any, number: int, seed: int) -> Prompts:
    """Return held-out prompts, ABBA and BABA in equal parts."""
    names, rng = _name_tokens(tokenizer), Random(f"ioi-prompts/{seed}")
    probes: list[Probe] = []
    for form in ("abba", "baba"):
        probes += probes_of(tokenizer, "ioi", form, number // 2, seed)
    length = max(len(probe.tokens) for probe in probes)
    clean, corrupt, places = [], [], []
    for probe in probes:
        padding = [tokenizer.pad_token_id] * (length - len(probe.tokens))
        clean.append([*probe.tokens, *padding])
        corrupt.append([*_corrupted(rng, probe.tokens, names), *padding])
        places.append(_places(probe))
    return Prompts(
        torch.tensor(clean),
        torch.tensor(corrupt),
        {label: torch.tensor([place[label] for place in places]) for label in places[0]},
        torch.tensor([probe.right[0] for probe in probes]),
        torch.tensor([probe.wrong[0] for probe in probes]),
    )


def _places(probe: Probe) -> dict[str, int]:
    (io,), (subject,) = probe.right, probe.wrong
    first, second = (at for at, token in enumerate(probe.tokens) if token == subject)
    return {
        "S1": first,
        "S1+1": first + 1,
        "IO": probe.tokens.index(io),
        "S2": second,
        "END": len(probe.tokens) - 1,
    }


def ioi_pairs(tokenizer: Any, form: str, number: int, seed: int) -> tuple[Pair, ...]:
    """Return held-out pairs of a form; the corrupt prompt repeats no name (ABC)."""
    names, rng = _name_tokens(tokenizer), Random(f"ioi-pairs/{seed}/{form}")
    return tuple(
        Pair(
            probe.tokens, tuple(_corrupted(rng, probe.tokens, names)), probe.right, probe.wrong[:1]
        )
        for probe in probes_of(tokenizer, "ioi", form, number, seed)
    )
