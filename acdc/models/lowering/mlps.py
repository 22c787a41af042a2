"""MLPs written out, for families whose own module has no part for each of their projections."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["PlainMlp", "SplitMlp"]


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
