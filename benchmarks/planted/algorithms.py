"""The algorithms that are planted, as small causal models.

An algorithm is a directed acyclic graph of *variables*.  ``input`` holds the tokens that vary
between prompts of one layout (the names in an IOI prompt); every other variable is a pure
function of its parents' values; ``logits`` is the distribution of the next token.  All values
are tensors with the batch as first axis.

:meth:`Algorithm.run` intervenes: an edge from a parent to a child may carry the value that the
parent has on another prompt, the *source*.  That is what the transformer has to reproduce when
the same edges between its nodes are patched.

References
----------
Geiger et al. 2022, "Inducing Causal Structure for Interpretable Neural Networks" (interchange
interventions on aligned variables); Gupta et al. 2024, "InterpBench", section 4 (the IOI
algorithm); Heimersheim and Janiak 2023, "A circuit for Python docstrings in a 4-layer
attention-only transformer" (what the docstring algorithm simplifies).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import one_hot

__all__ = ["DOCSTRING", "INPUT", "IOI", "IOI_BACKUP", "LOGITS", "NONE", "Algorithm", "Variable"]

INPUT, LOGITS = "input", "logits"
NONE = -1
"""What a variable says where there is nothing to say: no name is repeated, no argument fits."""
SMOOTHING = 0.1
"""Share of the answer's probability that is spread over the vocabulary.

It keeps the logits finite: the best model has a logit difference of a few nats, and an effect
on it cannot hide behind a probability that has saturated.
"""

Edge = tuple[str, str]


@dataclass(frozen=True)
class Variable:
    """A variable that is computed.

    Parameters
    ----------
    parents
        Variables whose values the function takes, in its argument order.
    function
        ``(*parent values [batch, ...], d_vocab) -> [batch, ...]``.
    slots
        Slots of ``input`` at whose positions the prompt has room for the value, in the order of
        its second axis; None: at the last position.
    """

    parents: tuple[str, ...]
    function: Callable[..., Tensor]
    slots: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Algorithm:
    """A causal model of a task.

    Parameters
    ----------
    name
        Of the algorithm; that of the task where it is the only one.
    variables
        Computed variables in topological order; the last is ``logits``, whose value is
        ``[batch, d_vocab]`` log probabilities.
    hidden_by
        Variable -> the parent that hides it: in an undisturbed run the former says nothing,
        so that an interchange of it tells only together with one of the latter.
    """

    name: str
    variables: Mapping[str, Variable]
    hidden_by: Mapping[str, str] = field(default_factory=dict)

    @property
    def edges(self) -> tuple[Edge, ...]:
        """All ``(parent, child)``, in topological order of the children."""
        return tuple(
            (parent, name)
            for name, variable in self.variables.items()
            for parent in variable.parents
        )

    def leaving(self, variable: str) -> list[Edge]:
        """Return the edges from a variable to its children."""
        return [edge for edge in self.edges if edge[0] == variable]

    @property
    def inner(self) -> tuple[str, ...]:
        """The variables between ``input`` and ``logits``: those with a node of their own."""
        return tuple(name for name in self.variables if name != LOGITS)

    def run(
        self,
        base: Tensor,
        d_vocab: int,
        source: Tensor | None = None,
        patched: Mapping[Edge, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Compute every variable, with some edges carrying the source's values.

        Parameters
        ----------
        base, source
            ``[batch, slot]`` values of ``input``; ``source`` is needed with ``patched``.
        d_vocab
            Size of the vocabulary.
        patched
            Edge -> ``[batch]`` bool: in which rows it carries the value of an undisturbed run
            on the source.

        Returns
        -------
        dict
            Variable -> value.

        Raises
        ------
        ValueError
            If edges are patched without a source, or a patched edge is none of the algorithm's.
        """
        patched = patched or {}
        if unknown := set(patched) - set(self.edges):
            raise ValueError(f"{self.name} has no edge {sorted(unknown)[0]}: got one to patch")
        if patched and source is None:
            raise ValueError("edges to patch but no source prompt: give both or neither")
        other = {} if source is None else self.run(source, d_vocab)
        values = {INPUT: base}
        for name, variable in self.variables.items():
            arguments = []
            for parent in variable.parents:
                value = values[parent]
                rows = patched.get((parent, name))
                if rows is not None:
                    shape = (-1,) + (1,) * (value.ndim - 1)
                    value = torch.where(rows.view(shape), other[parent], value)
                arguments.append(value)
            values[name] = variable.function(*arguments, d_vocab=d_vocab)
        return values


def smoothed(distribution: Tensor, *, d_vocab: int) -> Tensor:
    """Return log probabilities: ``distribution [batch, d_vocab]`` with a uniform share."""
    return torch.log((1 - SMOOTHING) * distribution + SMOOTHING / d_vocab)


def mixture(tokens: Tensor, weights: Tensor, d_vocab: int) -> Tensor:
    """Return the distribution ``[batch, d_vocab]`` of ``tokens [batch, n]`` with ``weights``."""
    weights = weights / weights.sum(-1, keepdim=True)
    return (one_hot(tokens, d_vocab) * weights[..., None]).sum(1)


# Indirect object identification.  Input: the names (A, B, S) in order of the prompt.


def repeated_slot(names: Tensor, *, d_vocab: int) -> Tensor:
    """Return which of the first two names the third repeats: 0, 1 or NONE, ``[batch]``."""
    same = names[:, :2] == names[:, 2:]  # (batch, 2)
    return torch.where(same.any(-1), same.long().argmax(-1), NONE)


def inhibited_slot(repeated: Tensor, *, d_vocab: int) -> Tensor:
    """Return the slot that the mover must not copy: the repeated one, brought to the end."""
    return repeated


def moved_name(names: Tensor, inhibited: Tensor, *, d_vocab: int) -> Tensor:
    """Return the distribution of the name that is not inhibited; both alike if none is."""
    slots = torch.arange(2)
    allowed = (slots != inhibited[:, None]).double()  # (batch, 2)
    return mixture(names[:, :2], allowed, d_vocab)


IOI = Algorithm(
    "ioi",
    {
        "duplicate token": Variable((INPUT,), repeated_slot, slots=(2,)),
        "S-inhibition": Variable(("duplicate token",), inhibited_slot),
        "name mover": Variable((INPUT, "S-inhibition"), moved_name),
        LOGITS: Variable(("name mover",), smoothed),
    },
)
"""The duplicate-token head finds which name comes twice, the S-inhibition head brings this to
the end, the name mover copies the other name."""


# The same with two movers.  A mover that is silent writes nothing: no token has any share.


def mover(names: Tensor, inhibited: Tensor, *, d_vocab: int) -> Tensor:
    """Return the distribution of the name that is not inhibited; silence if none is."""
    said = moved_name(names, inhibited, d_vocab=d_vocab)
    return torch.where((inhibited == NONE)[:, None], 0.0, said)


def backup_mover(names: Tensor, inhibited: Tensor, moved: Tensor, *, d_vocab: int) -> Tensor:
    """Return what a mover says where the other mover is silent; silence where it is not."""
    said = mover(names, inhibited, d_vocab=d_vocab)
    return torch.where((moved.sum(-1) > 0)[:, None], 0.0, said)


def said_by_either(first: Tensor, second: Tensor, *, d_vocab: int) -> Tensor:
    """Return log probabilities of what the movers wrote; all tokens alike if both are silent."""
    written = first + second
    total = written.sum(-1, keepdim=True)
    uniform = torch.full_like(written, 1 / d_vocab)
    distribution = torch.where(total > 0, written / total.clamp_min(1e-9), uniform)
    return smoothed(distribution, d_vocab=d_vocab)


IOI_BACKUP = Algorithm(
    "ioi-backup",
    {
        "duplicate token": Variable((INPUT,), repeated_slot, slots=(2,)),
        "S-inhibition": Variable(("duplicate token",), inhibited_slot),
        "name mover": Variable((INPUT, "S-inhibition"), mover),
        "backup name mover": Variable((INPUT, "S-inhibition", "name mover"), backup_mover),
        LOGITS: Variable(("name mover", "backup name mover"), said_by_either),
    },
    hidden_by={"backup name mover": "name mover"},
)
"""As :data:`IOI`, with a second mover that reads whether the first one wrote: it copies the name
only where the first is silent, as it is on a prompt without a repeated name, or if ablated."""


# Docstrings.  Input: the arguments (DEF0 .. DEF3), then the documented ones (DOC0, DOC1).

N_ARGUMENTS = 4


def previous_arguments(names: Tensor, *, d_vocab: int) -> Tensor:
    """Return the argument before each argument of the header, NONE before the first, [batch, 4]."""
    before = names[:, : N_ARGUMENTS - 1]
    return torch.cat([torch.full_like(before[:, :1], NONE), before], dim=1)


def documented_argument(names: Tensor, *, d_vocab: int) -> Tensor:
    """Return the argument that was documented last, ``[batch]``."""
    return names[:, -1]


def next_slot(previous: Tensor, documented: Tensor, *, d_vocab: int) -> Tensor:
    """Return the slot of the header whose predecessor was documented last, or NONE, [batch]."""
    fits = previous == documented[:, None]  # (batch, 4)
    return torch.where(fits.any(-1), fits.long().argmax(-1), NONE)


def moved_argument(names: Tensor, slot: Tensor, *, d_vocab: int) -> Tensor:
    """Return the distribution of the argument in ``slot``; all four alike if there is none."""
    slots = torch.arange(N_ARGUMENTS)
    wanted = ((slots == slot[:, None]) | (slot == NONE)[:, None]).double()
    return mixture(names[:, :N_ARGUMENTS], wanted, d_vocab)


DOCSTRING = Algorithm(
    "docstring",
    {
        "previous argument": Variable((INPUT,), previous_arguments, slots=(0, 1, 2, 3)),
        "documented argument": Variable((INPUT,), documented_argument),
        "induction": Variable(("previous argument", "documented argument"), next_slot),
        "argument mover": Variable((INPUT, "induction"), moved_argument),
        LOGITS: Variable(("argument mover",), smoothed),
    },
)
"""Every argument of the header learns its predecessor; at the end, one head brings the argument
that was documented last, the induction head finds whose predecessor it is, and the argument
mover copies that one."""
