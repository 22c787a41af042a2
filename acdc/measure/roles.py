"""What heads do, by behaviour: the roles of Wang et al. 2022 and Olsson et al. 2022.

Each role is one number per head:

==================  ==========================================================================
previous token      attention to the token before, on random tokens that are repeated
duplicate token     attention from a random token to the same one in the first round; on IOI
                    prompts from S2 to S1
induction           attention from a random token to what followed it in the first round
name mover          attention from END to IO, where the head writes for IO against S
negative mover      the same, where it writes against IO
S-inhibition        attention from END to S2, where the head's output at END, if it comes from
                    the corrupt run, changes how much movers look at IO rather than at S
==================  ==========================================================================

The last three ask for prompts with the labels IO, S1, S2 and END.  S-inhibition is confirmed by
path patching: the head's output at END is exchanged, all other heads write what they did, MLPs are
computed anew, and only the movers' queries see it.

References
----------
Wang et al. 2022, "Interpretability in the wild", arXiv 2211.00593, sections 3.1 to 3.3.
Olsson et al. 2022, "In-context learning and induction heads" (prefix matching on random tokens).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.experiment import Experiment
from acdc.models.lowering.model import LoweredModel, Trace

__all__ = [
    "LEAST_ATTENTION",
    "LEAST_EFFECT",
    "HeadNumbers",
    "measure_repeats",
    "measure_roles",
    "roles_of",
]

Table = list[list[float]]
"""``[layer][head]``; empty where it was not measured."""

LEAST_ATTENTION = 0.3
"""Mean attention from which on a head has a role."""

LEAST_EFFECT = 0.05
"""Share of the clean margin that a mover writes, or of the movers' preference that an inhibitor
is behind."""

NAMES = ("IO", "S1", "S2", "END")
"""Labels that the roles of indirect object identification need."""

_N_REPEATS, _MOST_REPEATED, _LEAST_REPEATED = 32, 20, 4


@dataclass(frozen=True, eq=False)
class HeadNumbers:
    """Numbers of every head, ``[layer][head]`` each; see the module.

    Parameters
    ----------
    previous, duplicate, induction
        Attention on random tokens.
    s2_to_s1, s2_to_after_s1, end_to_io, end_to_s2
        Attention on IOI prompts.
    direct
        What the head writes at END for IO against S, as a share of the margin's size (last norm
        frozen).
    inhibition
        By how much movers prefer IO to S less, if this head's output at END is the corrupt run's;
        as a share of their preference.
    """

    previous: Table = field(default_factory=list)
    duplicate: Table = field(default_factory=list)
    induction: Table = field(default_factory=list)
    s2_to_s1: Table = field(default_factory=list)
    s2_to_after_s1: Table = field(default_factory=list)
    end_to_io: Table = field(default_factory=list)
    end_to_s2: Table = field(default_factory=list)
    direct: Table = field(default_factory=list)
    inhibition: Table = field(default_factory=list)


def roles_of(numbers: HeadNumbers) -> dict[str, list[str]]:
    """Return the heads of every role, the strongest first; empty where there is none."""
    table = {name: np.array(values, dtype=float) for name, values in _measured(numbers).items()}
    shape = next(iter(table.values())).shape if table else (0, 0)
    table = {one.name: table.get(one.name, np.zeros(shape)) for one in fields(HeadNumbers)}
    looks = {name: values >= LEAST_ATTENTION for name, values in table.items()}
    direct, inhibition = table["direct"], table["inhibition"]
    ranked: Mapping[str, tuple[NDArray[np.bool_], NDArray[np.float64]]] = {
        "previous token": (looks["previous"], table["previous"]),
        "duplicate token": (
            looks["duplicate"] | looks["s2_to_s1"],
            table["duplicate"] + table["s2_to_s1"],
        ),
        "induction": (looks["induction"], table["induction"]),
        "S-inhibition": (looks["end_to_s2"] & (inhibition >= LEAST_EFFECT), inhibition),
        "name mover": (looks["end_to_io"] & (direct >= LEAST_EFFECT), direct),
        "negative mover": (looks["end_to_io"] & (direct <= -LEAST_EFFECT), -direct),
    }
    return {role: _ranked(has, strength) for role, (has, strength) in ranked.items()}


def _measured(numbers: HeadNumbers) -> dict[str, Table]:
    return {name: values for name, values in vars(numbers).items() if values}


def _ranked(has: NDArray[np.bool_], strength: NDArray[np.float64]) -> list[str]:
    found = [(int(layer), int(head)) for layer, head in np.argwhere(has)]
    found.sort(key=lambda at: -strength[at])
    return [f"a{layer}.h{head}" for layer, head in found]


@torch.no_grad()
def measure_roles(experiment: Experiment, seed: int = 0) -> HeadNumbers:
    """Measure every head on random tokens, and on the task's prompts if they are labelled for it.

    Parameters
    ----------
    experiment
        Model and prompts; attention is that of plain runs.
    seed
        Of the random tokens.
    """
    numbers = measure_repeats(experiment.model, _beginning(experiment), seed)
    pairs = experiment.task.pairs
    labelled = all(set(NAMES) <= pair.spans.keys() for pair in pairs)
    if labelled and all(pair.answers and pair.wrong_answers for pair in pairs):
        numbers |= _on_names(experiment)
    return HeadNumbers(**{name: values.tolist() for name, values in numbers.items()})


def _beginning(experiment: Experiment) -> tuple[int, ...]:
    """The token that all prompts begin with, if there is one: models expect it."""
    first = {pair.clean[0] for pair in experiment.task.pairs}
    return tuple(first) if len(first) == 1 else ()


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
        ``previous``, ``duplicate`` and ``induction``: ``[layer, head]``, mean over the second
        round.
    """
    vocabulary = [token for token in range(1, model.d_vocab) if token not in beginning]
    n = min(_MOST_REPEATED, len(vocabulary), (model.n_ctx - len(beginning)) // 2)
    if n < _LEAST_REPEATED or not all(layer.attention.causal for layer in model.layers):
        return {}
    rng = Random(seed)
    rounds = [rng.sample(vocabulary, n) for _ in range(_N_REPEATS)]
    tokens = torch.tensor([[*beginning, *row, *row] for row in rounds], device=model.device)
    trace = model.forward(tokens)
    query = torch.arange(n, 2 * n, device=model.device) + len(beginning)
    keys = {"previous": query - 1, "duplicate": query - n, "induction": query - n + 1}
    found: dict[str, list[Tensor]] = {name: [] for name in keys}
    for pattern in _patterns(model, trace):
        for name, key in keys.items():
            found[name].append(pattern[..., query, key].mean((0, 2)).cpu())
    return {name: torch.stack(rows) for name, rows in found.items()}


def _patterns(model: LoweredModel, trace: Trace) -> list[Tensor]:
    """``[batch, head, query, key]`` of each layer."""
    return [
        layer.attention.patterns(q, k)
        for layer, q, k in zip(model.layers, trace.q, trace.k, strict=True)
    ]


# Indirect object identification


@dataclass(frozen=True, eq=False)
class _Names:
    """Prompts of one length, with the places of their names."""

    experiment: Experiment
    clean: Trace
    corrupt: Trace
    at: dict[str, Tensor]

    @property
    def model(self) -> LoweredModel:
        return self.experiment.model

    @property
    def rows(self) -> Tensor:
        return torch.arange(len(self.at["END"]), device=self.model.device)


def _on_names(experiment: Experiment) -> dict[str, Tensor]:
    """``[layer, head]`` of what is measured on IOI prompts."""
    groups = [_names(experiment, length) for length in _lengths(experiment)]
    shares = torch.tensor([len(one.rows) for one in groups]) / len(experiment.task)
    looks = [_looks(one) for one in groups]
    numbers = {
        name: torch.stack([share * one[name] for share, one in zip(shares, looks, strict=True)])
        .sum(0)
        .cpu()
        for name in looks[0]
    }
    direct, margin = (torch.stack(x).sum(0).cpu() for x in zip(*map(_direct, groups), strict=True))
    # a share of the margin's size: what is written against IO is below 0 in a wrong model, too
    numbers["direct"] = direct / margin.abs() if margin else torch.zeros_like(direct)
    chosen = (numbers["end_to_io"] >= LEAST_ATTENTION) & (numbers["direct"].abs() >= LEAST_EFFECT)
    movers = [(layer, head) for layer, head in chosen.nonzero().tolist()]
    numbers["inhibition"] = _inhibition(groups, movers)
    return numbers


def _lengths(experiment: Experiment) -> list[int]:
    return sorted({len(pair.clean) for pair in experiment.task.pairs})


def _names(experiment: Experiment, length: int) -> _Names:
    pairs = [pair for pair in experiment.task.pairs if len(pair.clean) == length]
    model = experiment.model
    clean, corrupt = (
        model.forward(torch.tensor([getattr(pair, run) for pair in pairs], device=model.device))
        for run in ("clean", "corrupt")
    )
    labels = {*NAMES, *({"S1+1"} & pairs[0].spans.keys())}
    at = {
        label: torch.tensor([pair.spans[label][0] for pair in pairs], device=model.device)
        for label in labels
    }
    some = experiment.on(type(experiment.task)(experiment.task.name, tuple(pairs)))
    return _Names(some, clean, corrupt, at)


def _looks(names: _Names) -> dict[str, Tensor]:
    """Mean attention between names, ``[layer, head]``."""
    wanted = {"s2_to_s1": ("S2", "S1"), "end_to_io": ("END", "IO"), "end_to_s2": ("END", "S2")}
    if "S1+1" in names.at:
        wanted["s2_to_after_s1"] = ("S2", "S1+1")
    patterns = _patterns(names.model, names.clean)
    return {
        name: torch.stack(
            [x[names.rows, :, names.at[query], names.at[key]].mean(0) for x in patterns]
        )
        for name, (query, key) in wanted.items()
    }


def _direct(names: _Names) -> tuple[Tensor, Tensor]:
    """``[layer, head]``: what heads write for IO against S, summed over prompts; and the margin."""
    model, rows, end = names.model, names.rows, names.at["END"]
    pairs = names.experiment.task.pairs
    final = names.clean.at(("final", 0))[rows, end]
    io, subject = (
        torch.tensor([getattr(pair, key)[0] for pair in pairs], device=model.device)
        for key in ("answers", "wrong_answers")
    )
    held = model.ln_final.hold(final)
    direction = held.vjp(final, model.W_U[io] - model.W_U[subject])  # [prompt, d_model]
    logits = model.unembed(final, torch.stack([io, subject], 1))
    found = []
    for i, layer in enumerate(model.layers):
        back = direction
        if layer.attention_post is not None:
            post = layer.attention_post.hold(names.clean.attention_out[i][rows, end])
            back = post.vjp(names.clean.attention_out[i][rows, end], direction)
        z = names.clean.z[i][rows, :, end]  # (prompt, head, d_head)
        found.append(torch.einsum("bhe,hed,bd->h", z, layer.attention.W_O, back))
    return torch.stack(found), (logits[:, 0] - logits[:, 1]).sum()


def _inhibition(groups: Sequence[_Names], movers: Sequence[tuple[int, int]]) -> Tensor:
    """``[layer, head]``: path patching of heads at END into where movers of later layers look."""
    model = groups[0].model
    found = torch.zeros(len(model.layers), model.shape.n_heads)
    for layer in range(len(model.layers)):
        later = [mover for mover in movers if mover[0] > layer]
        if not later:
            break
        before = sum(_preference(one, one.clean, later) for one in groups)
        if before <= 0:
            continue  # they do not prefer IO: nothing makes them
        for head in range(model.shape.n_heads):
            after = sum(_preference(one, _patched(one, layer, head), later) for one in groups)
            found[layer, head] = 1 - after / before
    return found


def _patched(names: _Names, layer: int, head: int) -> Trace:
    """The clean run from a layer on, with one head's output at END from the corrupt run.

    All other heads write what they do in the clean run.
    """
    clean, rows, end = names.clean, names.rows, names.at["END"]
    z = {("z", i): x for i, x in enumerate(clean.z)}
    z["z", layer] = clean.z[layer].clone()
    z["z", layer][rows, head, end] = names.corrupt.z[layer][rows, head, end]
    return names.model.forward(
        torch.empty(0, device=names.model.device), [clean.attention_in[layer]], z, first=layer
    )


def _preference(names: _Names, seen: Trace, movers: Sequence[tuple[int, int]]) -> float:
    """Attention of movers from END to IO less that to the subjects, summed over prompts.

    Queries are those of ``seen``, keys those of the clean run.
    """
    skipped = len(names.clean.q) - len(seen.q)
    rows, at, total = names.rows, names.at, 0.0
    for layer, head in movers:
        attention = names.model.layers[layer].attention
        pattern = attention.patterns(seen.q[layer - skipped], names.clean.k[layer])
        row = pattern[rows, head, at["END"]]  # (prompt, key)
        total += float((row[rows, at["IO"]] - row[rows, at["S1"]] - row[rows, at["S2"]]).sum())
    return total
