"""MLPs written out, for families whose own module has no part for each of their projections.

And :func:`lean`, which takes from a model's own module what costs time and computes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["PlainMlp", "SplitMlp", "bare", "lean"]

_IN_ONE_PASS = {"NewGELUActivation": "tanh", "FastGELUActivation": "tanh"}
"""Activations written as eight products, which many rows at once take longer for than for the
matrices: what torch calls the same function."""


def bare(part: Any) -> Any:
    """Return the model's own module, in a bridge's component or not."""
    return getattr(part, "original_component", part)


def lean(module: nn.Module) -> nn.Module:
    """Return a module with the same weights, without hooks around its parts.

    Parameters
    ----------
    module
        A model's own MLP; it is not changed.
    """
    twin = copy.copy(module)
    twin._modules = {name: part and _lean_part(part) for name, part in module._modules.items()}
    return twin


def _lean_part(part: nn.Module) -> nn.Module:
    own: nn.Module = bare(part)
    approximate = _IN_ONE_PASS.get(type(own).__name__)
    return own if approximate is None else nn.GELU(approximate)


class PlainMlp(nn.Module):
    """Two linear maps and an activation that stand in the block itself (OPT).

    Parameters
    ----------
    reader, activation, writer
        The model's own.
    """

    def __init__(
        self, reader: nn.Linear, activation: Callable[[Tensor], Tensor], writer: nn.Linear
    ) -> None:
        super().__init__()
        self.reader, self.activation, self.writer = reader, activation, writer

    @property
    def readers(self) -> tuple[nn.Linear, ...]:
        """What maps the input to what neurons are computed from."""
        return (self.reader,)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d_model]`` -> ``[..., d_model]``."""
        out: Tensor = self.writer(self.activation(self.reader(x)))
        return out


class SplitMlp(nn.Module):
    """A gated MLP whose projections are no parts of the bridge (Phi-3: they are one matrix).

    Parameters
    ----------
    reader, gate
        Linear maps; of Phi-3 their weights are halves of that matrix.
    activation, writer
        The model's own.
    """

    def __init__(
        self,
        reader: nn.Linear,
        gate: nn.Linear,
        activation: Callable[[Tensor], Tensor],
        writer: nn.Linear,
    ) -> None:
        super().__init__()
        self.reader, self.gate, self.writer = reader, gate, writer
        self.activation = activation

    @property
    def readers(self) -> tuple[nn.Linear, ...]:
        """What maps the input to what neurons are computed from."""
        return self.reader, self.gate

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d_model]`` -> ``[..., d_model]``."""
        out: Tensor = self.writer(self.reader(x) * self.activation(self.gate(x)))
        return out
