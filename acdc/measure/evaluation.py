"""How good a circuit is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.engine.patched import PatchedModel
from acdc.errors import OptionError

__all__ = [
    "DEFAULT_FAITHFULNESS",
    "Evaluation",
    "Evaluator",
    "interval",
    "is_faithful",
    "resampled_faithfulness",
    "standard_error",
]

DEFAULT_FAITHFULNESS = 0.9
"""What a circuit reaches where nothing else is asked for."""

_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Evaluation:
    """Metric values of one circuit, in the metric's own unit.

    Parameters
    ----------
    metric_full
        With every edge in: the model on the base prompts.
    metric_empty
        With no edge in.
    metric_circuit
        With the circuit's edges in.
    faithfulness
        ``(circuit - empty) / (full - empty)``; None where full equals empty.
    """

    metric_full: float
    metric_empty: float
    metric_circuit: float
    faithfulness: float | None


class Evaluator:
    """Evaluates circuits of one experiment; full and empty are measured once.

    ``memory`` is that of :class:`acdc.engine.patched.PatchedModel`; None: the experiment's.
    """

    def __init__(self, experiment: Experiment, memory: int | None = None) -> None:
        self.experiment = experiment
        self._patched = PatchedModel(experiment, memory)

    @cached_property
    def full_values(self) -> NDArray[np.float64]:
        """``[prompt]``: metric with every edge in."""
        return self._patched.full_values()

    @cached_property
    def empty_values(self) -> NDArray[np.float64]:
        """``[prompt]``: metric with no edge in."""
        return self.values(np.zeros(self.experiment.graph.n_edges, dtype=bool))

    @property
    def full(self) -> float:
        """Metric with every edge in."""
        return float(self.full_values.mean())

    @property
    def empty(self) -> float:
        """Metric with no edge in."""
        return float(self.empty_values.mean())

    @property
    def has_gap(self) -> bool:
        """Whether full and empty differ, so that faithfulness is defined."""
        scale = max(abs(self.full), abs(self.empty))
        return abs(self.full - self.empty) > 1e-6 * scale

    def values(self, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        """``[prompt]`` metric of the circuit of the edges in ``mask [edge]``.

        In the order of ``experiment.batches``; see :meth:`PatchedModel.values`.
        """
        return self._patched.values(mask)

    def evaluate(self, mask: NDArray[np.bool_]) -> Evaluation:
        """Measure the circuit of the edges in ``mask [edge]``.

        Raises
        ------
        OptionError
            If the metric is no finite number: what the model or the constants say overflows.
        """
        return self.evaluation(self.values(mask))

    def evaluation(self, values: NDArray[np.float64]) -> Evaluation:
        """Say of a circuit how good it is, given its metric ``[prompt]``; errors as above."""
        value = float(values.mean())
        for name, number in (("full", self.full), ("empty", self.empty), ("circuit", value)):
            if not math.isfinite(number):
                raise OptionError(
                    f"metric {self.experiment.metric.name!r} of the {name} circuit is {number}: "
                    "weights or constants are too large for the dtype, choose float32 or float64"
                )
        gap = self.full - self.empty
        faithfulness = (value - self.empty) / gap if self.has_gap else None
        return Evaluation(self.full, self.empty, value, faithfulness)

    def is_surely_faithful(self, mask: NDArray[np.bool_], level: float) -> bool:
        """Whether a circuit is faithful with a standard error to spare, see :func:`is_faithful`."""
        values = self.values(mask)
        value = self.evaluation(values).faithfulness
        if not is_faithful(value, level):
            return False
        error = standard_error(values, self.full_values, self.empty_values)
        return is_faithful(value, level, error)

    def faithfulness(self, mask: NDArray[np.bool_]) -> float | None:
        """Faithfulness of the edges in ``mask [edge]``, None where it is undefined."""
        return self.evaluate(mask).faithfulness

    def faithfulness_interval(
        self, mask: NDArray[np.bool_], n_resamples: int = 1000, seed: int = 0
    ) -> tuple[float, float] | None:
        """95 % bootstrap interval over prompts; None where faithfulness is undefined, or of one."""
        if not self.has_gap or len(self.full_values) < 2:
            return None
        values = self.values(mask)[None]
        drawn = resampled_faithfulness(
            values, self.full_values, self.empty_values, n_resamples, seed
        )
        low, high = (float(end[0]) for end in interval(drawn))
        return low, high


def is_faithful(
    faithfulness: float | None, level: float = DEFAULT_FAITHFULNESS, error: float = 0.0
) -> bool:
    """Return whether a circuit is within ``1 - level`` of the whole model, on either side.

    A circuit that overshoots is as wrong as one that falls short: with edges left out that oppose
    the others the metric can rise above the whole model's.  True where faithfulness is undefined.

    Parameters
    ----------
    faithfulness, level
        What it is, and what is asked for.
    error
        Standard error of it (:func:`standard_error`), which it has to reach ``level`` by: so what
        is chosen as just faithful on some prompts is so on others, too, more often than not.

    Examples
    --------
    >>> [is_faithful(value, 0.9) for value in (0.89, 0.9, 1.1, 1.11, None)]
    [False, True, True, False, True]
    >>> [is_faithful(value, 0.9, error=0.05) for value in (0.93, 0.96)]
    [False, True]
    """
    if faithfulness is None:
        return True
    room = 1 - level + 1e-12
    return max(1 - faithfulness + min(error, 1 - level), faithfulness - 1) <= room


def standard_error(
    values: NDArray[np.float64], full: NDArray[np.float64], empty: NDArray[np.float64]
) -> float:
    """Standard error of a faithfulness over prompts, as of a ratio of means (delta method).

    Parameters
    ----------
    values, full, empty
        ``[prompt]``: metric of the circuit, with every edge and with none.

    Returns
    -------
    float
        0 for one prompt, where it is not known.
    """
    n, gap = len(values), full - empty
    if n < 2 or not gap.mean():
        return 0.0
    off = values - empty - (values - empty).mean() / gap.mean() * gap
    return float(off.std(ddof=1) / (abs(gap.mean()) * math.sqrt(n)))


def resampled_faithfulness(
    values: NDArray[np.float64],
    full: NDArray[np.float64],
    empty: NDArray[np.float64],
    n_resamples: int = 1000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Faithfulness on prompts drawn with replacement (bootstrap).

    Numerator and denominator are means over the same draw, so their errors cancel where they
    go together.

    Parameters
    ----------
    values
        ``[circuit, prompt]``: metric of circuits.
    full, empty
        ``[prompt]``: metric with every edge and with none.
    n_resamples, seed
        Draws, and what decides them.

    Returns
    -------
    ndarray
        ``[resample, circuit]``; NaN where a draw has no gap, which :func:`interval` leaves out.
    """
    n = len(full)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples) / n
    without = (weights @ empty)[:, None]
    gap = (weights @ full)[:, None] - without
    return (weights @ values.T - without) / np.where(gap == 0, np.nan, gap)


def interval(resampled: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Low and high end of the 95 % percentile interval over the first axis."""
    low, high = np.nanpercentile(resampled, _INTERVAL, axis=0)
    return low, high
