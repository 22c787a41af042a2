"""What is claimed of a circuit: how faithful it is on prompts that nothing was chosen on.

Nothing is claimed where the model does not do the task (:mod:`acdc.measure.ability`), or where the
search saw every prompt.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from acdc.engine.experiment import Experiment
from acdc.measure.ability import Ability
from acdc.measure.evaluation import (
    Evaluation,
    Evaluator,
    interval,
    is_faithful,
    resampled_faithfulness,
)
from acdc.runs.prompts import Split
from graphs import Circuit

__all__ = ["Claim", "Claims"]

_FEW = 30
"""Test prompts with fewer of which an interval is wide and itself unsure."""

_FAR = 0.8
"""A circuit that is farther from 1 than this on unseen prompts is warned of."""


@dataclass(frozen=True, eq=False)
class Claim:
    """How faithful a circuit is.

    Parameters
    ----------
    evaluation
        On the test prompts; on those of the search where there are none.
    seen
        On the prompts of the search.
    low, high
        95 % bootstrap interval of the faithfulness on the test prompts.
    prompts
        How many fit, select and test.
    ability
        What the model does on the prompts of the search.
    warnings
        What one should know before believing it, a sentence each.
    """

    evaluation: Evaluation
    seen: Evaluation
    low: float | None
    high: float | None
    prompts: dict[str, int]
    ability: Ability
    warnings: tuple[str, ...]

    @property
    def faithfulness(self) -> float | None:
        """What is claimed: None if nothing can be."""
        if self.ability.doubts or not self.prompts["test"]:
            return None
        return self.evaluation.faithfulness

    @property
    def faithfulness_seen(self) -> float | None:
        """On the prompts of the search; None where the model does not do the task."""
        return None if self.ability.doubts else self.seen.faithfulness

    def as_dict(self) -> dict[str, Any]:
        """Return what ``run.json`` says of it."""
        claimed = self.faithfulness is not None and self.low is not None
        return {
            **asdict(self.evaluation),
            "faithfulness": self.faithfulness,
            "faithfulness_interval": [self.low, self.high] if claimed else None,
            "faithfulness_seen": self.faithfulness_seen,
            "metric_seen": {
                "full": self.seen.metric_full,
                "empty": self.seen.metric_empty,
                "circuit": self.seen.metric_circuit,
            },
            "prompts": self.prompts,
            "ability": self.ability.as_dict(),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, eq=False)
class Claims:
    """What circuits of one search are measured on, so that something can be claimed of them.

    Parameters
    ----------
    experiment
        Of the search, on its prompts.
    split
        The other prompts.
    ability
        What the model does.
    """

    experiment: Experiment
    split: Split
    ability: Ability

    @cached_property
    def evaluator(self) -> Evaluator | None:
        """On the test prompts; None if there are none."""
        test = self.split.test
        return None if test is None else Evaluator(self.experiment.on(test))

    @property
    def prompts(self) -> dict[str, int]:
        """How many fit, select and test."""
        select, test = self.split.select, self.split.test
        return {
            "fit": len(self.experiment.task),
            "select": 0 if select is None else len(select),
            "test": 0 if test is None else len(test),
        }

    def of(self, circuit: Circuit, seen: Evaluation) -> Claim:
        """Measure a circuit on the test prompts; ``seen`` is it on those of the search."""
        evaluation, low, high = seen, None, None
        warnings = (*self.ability.doubts, *self.split.warnings)
        if self.evaluator is not None:
            evaluation = self.evaluator.evaluate(circuit.in_circuit)
            low, high = self._interval(self.evaluator, circuit, evaluation)
            if not self.ability.doubts:
                warnings += _of_test(evaluation, seen, self.prompts["test"])
        return Claim(evaluation, seen, low, high, self.prompts, self.ability, warnings)

    @staticmethod
    def _interval(
        evaluator: Evaluator, circuit: Circuit, evaluation: Evaluation
    ) -> tuple[float | None, float | None]:
        if evaluation.faithfulness is None or len(evaluator.experiment.task) < 2:
            return None, None
        values = evaluator.values(circuit.in_circuit)[None]
        resampled = resampled_faithfulness(values, evaluator.full_values, evaluator.empty_values)
        low, high = (float(end[0]) for end in interval(resampled))
        return low, high


def _of_test(evaluation: Evaluation, seen: Evaluation, n_test: int) -> tuple[str, ...]:
    """What the test prompts say against a circuit."""
    found = []
    if n_test < _FEW:
        found.append(f"faithfulness is that of {n_test} unseen prompts only: its interval is wide")
    value, known = evaluation.faithfulness, seen.faithfulness
    if value is None:
        found.append("faithfulness is undefined on the unseen prompts: their metric has no gap")
    elif not is_faithful(value, _FAR):
        of_seen = "" if known is None else f" ({known:.3g} on those that it was found on)"
        found.append(
            f"the circuit {'falls short' if value < 1 else 'overshoots'} on unseen prompts: "
            f"faithfulness {value:.3g}{of_seen}"
        )
    return tuple(found)
