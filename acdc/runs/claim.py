"""What is claimed of a circuit: how faithful it is on prompts that nothing was chosen on.

Nothing is claimed where the model does not do the task (:mod:`acdc.measure.ability`), or where the
search saw every prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from acdc.engine.experiment import Experiment
from acdc.files.objects import JsonObject
from acdc.measure.ability import Ability
from acdc.measure.evaluation import Evaluation, Evaluator, is_faithful
from acdc.runs.prompts import Split
from graphs import Circuit

__all__ = ["Claim", "Claims", "collected"]

_MEASURED = ("full", "empty", "circuit")

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
    interval
        95 % bootstrap interval of the faithfulness on the test prompts; None where there is none.
    prompts
        How many ``fit``, ``select`` and ``test``.
    ability
        What the model does on the prompts of the search
        (:meth:`acdc.measure.ability.Ability.as_dict`).
    warnings
        What one should know before believing it, a sentence each.
    """

    evaluation: Evaluation
    seen: Evaluation
    interval: tuple[float, float] | None
    prompts: dict[str, int]
    ability: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def faithfulness(self) -> float | None:
        """What is claimed: None if nothing can be."""
        if self.ability["doubts"] or not self.prompts["test"]:
            return None
        return self.evaluation.faithfulness

    @property
    def faithfulness_seen(self) -> float | None:
        """On the prompts of the search; None where the model does not do the task."""
        return None if self.ability["doubts"] else self.seen.faithfulness

    def but(self, *warnings: str) -> Claim:
        """Return the claim with more that one should know."""
        return replace(self, warnings=(*self.warnings, *warnings))

    def as_dict(self) -> dict[str, Any]:
        """Return what ``run.json`` says of it."""
        claimed = self.faithfulness is not None and self.interval is not None
        return {
            **asdict(self.evaluation),
            "faithfulness": self.faithfulness,
            "faithfulness_interval": list(self.interval or ()) if claimed else None,
            "faithfulness_seen": self.faithfulness_seen,
            "metric_seen": {which: getattr(self.seen, f"metric_{which}") for which in _MEASURED},
            "prompts": self.prompts,
            "ability": self.ability,
            "warnings": list(self.warnings),
        }

    @classmethod
    def of_seen(cls, seen: Evaluation, n_prompts: int) -> Claim:
        """Return what can be said of a circuit that was measured on its own prompts alone."""
        return cls(seen, seen, None, {"fit": n_prompts, "select": 0, "test": 0}, {"doubts": []}, ())

    @classmethod
    def read(cls, item: JsonObject) -> Claim:
        """Return what a ``run.json`` says; CircuitFileError if it is malformed."""
        seen, prompts, ability = (item.at(key) for key in ("metric_seen", "prompts", "ability"))
        ends = item.get("faithfulness_interval", list, None)
        if ends is not None and (len(ends) != 2 or not all(isinstance(x, float) for x in ends)):
            raise item.wrong("faithfulness_interval", ends)
        return cls(
            _evaluation(item, "metric_", item.optional("faithfulness")),
            _evaluation(seen, "", item.optional("faithfulness_seen")),
            None if ends is None else (ends[0], ends[1]),
            {which: int(prompts.number(which)) for which in ("fit", "select", "test")},
            {**ability.content, "doubts": ability.texts("doubts")},
            tuple(item.texts("warnings")),
        )


def collected(claims: Mapping[str, Claim]) -> tuple[str, ...]:
    """Return the warnings of several runs, each once, with the runs that it is of.

    Parameters
    ----------
    claims
        By what each run is called.
    """
    of: dict[str, list[str]] = {}
    for label, claim in claims.items():
        for warning in dict.fromkeys(claim.warnings):
            of.setdefault(warning, []).append(label)
    return tuple(
        f"{'all' if len(labels) == len(claims) else ', '.join(labels)}: {warning}"
        for warning, labels in of.items()
    )


def _evaluation(item: JsonObject, prefix: str, faithfulness: float | None) -> Evaluation:
    """What a ``run.json`` says of a circuit on some prompts; NaN is null in JSON."""
    found = [item.optional(f"{prefix}{which}") for which in _MEASURED]
    full, empty, circuit = (math.nan if value is None else value for value in found)
    return Evaluation(full, empty, circuit, faithfulness)


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
        evaluation, ends = seen, None
        warnings = (*self.ability.doubts, *self.split.warnings)
        if self.evaluator is not None:
            evaluation = self.evaluator.evaluate(circuit.in_circuit)
            ends = self.evaluator.faithfulness_interval(circuit.in_circuit)
            if not self.ability.doubts:
                warnings += _of_test(evaluation, seen, self.prompts["test"])
        ability = self.ability.as_dict()
        return Claim(evaluation, seen, ends, self.prompts, ability, warnings)


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
