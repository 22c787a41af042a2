"""Whether there is anything to find: the model does the task, and corruption undoes it.

A circuit explains why a model answers as it does.  Where it answers by chance, or no differently
on the corrupt prompts, any faithfulness is that of noise, and can be as large as one likes: its
denominator is a gap of nothing.  So before a search it is measured, prompt by prompt,

* how often the model answers *right*: its highest logit, among the answers and wrong answers of
  a scored row (among all tokens where there are no wrong ones), is one of an answer; on the corrupt
  prompts: still the clean prompt's answer;
* the *gap*: by how much the metric is better on the clean prompts than on the corrupt ones.

A circuit is claimed (:attr:`Ability.doubts` is empty) if the gap lies above 0 beyond its 99 %
bootstrap interval over prompts and, where rows have answers, at least :data:`LEAST_RIGHT` of the
clean prompts are answered right, at least :data:`LEAST_MORE` more than of the corrupt ones, beyond
the interval of that difference.  (Where prompts are much alike a random model, too, can have a gap
that is tiny and yet beyond noise.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap
from torch import Tensor

from acdc.engine.batch import Batch
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import METRICS, at_least_float32

__all__ = ["LEAST_MORE", "LEAST_RIGHT", "Ability", "ability"]

LEAST_RIGHT = 0.5
"""Share of clean prompts that a model which does the task answers right."""

LEAST_MORE = 0.1
"""By how much that share is above that of the corrupt prompts."""

_LEVEL = 0.99
_N_RESAMPLES = 2000
_MOST_DRAWN = 1 << 22
"""Values that are drawn at once."""

_ROWS = 64
"""Rows whose logits of the whole vocabulary are held at once."""


@dataclass(frozen=True, eq=False)
class Ability:
    """What a model does on the prompts of a task, prompt by prompt.

    Parameters
    ----------
    right_clean, right_corrupt
        ``[prompt]`` whether it is answered right, of several scored rows the share that is, as
        :meth:`acdc.engine.experiment.Experiment.per_prompt` weighs it; None where the rows have no
        answers.
    gaps
        ``[prompt]``: metric on the clean prompt minus that on the corrupt one, in the direction in
        which more is better.
    margins
        ``[prompt]``: mean logit of the answers minus that of the wrong ones, on the clean prompt
        minus on the corrupt one; None where rows have none.  The gap of a metric that compares with
        the clean run, as KL, is above 0 in any model: there this says whether it means anything.
    identical
        Whether no corrupt prompt differs from its clean one.
    """

    right_clean: NDArray[np.float64] | None
    right_corrupt: NDArray[np.float64] | None
    gaps: NDArray[np.float64]
    identical: bool
    margins: NDArray[np.float64] | None = None

    @property
    def gap(self) -> float:
        """Mean gap of the metric, positive where corruption makes it worse."""
        return float(self.gaps.mean())

    @cached_property
    def gap_interval(self) -> tuple[float, float] | None:
        """99 % percentile bootstrap interval of the gap over prompts; None for one prompt."""
        return _interval(self.gaps)

    @property
    def accuracy(self) -> tuple[float, float] | None:
        """Share of rows answered right, clean and corrupt."""
        if self.right_clean is None or self.right_corrupt is None:
            return None
        return float(self.right_clean.mean()), float(self.right_corrupt.mean())

    @cached_property
    def doubts(self) -> tuple[str, ...]:
        """Why no faithfulness can be claimed, one sentence each; empty if it can."""
        if self.identical:
            return ("clean and corrupt prompts are the same in every row: nothing can be found",)
        if self.gap_interval is None:
            return ("one prompt only: whether the metric's gap is noise cannot be said",)
        found = []
        low, high = self.gap_interval
        if low <= 0:
            found.append(
                f"the metric's gap between clean and corrupt prompts, {self.gap:.3g} "
                f"[{low:.3g}, {high:.3g}], is not above 0 beyond noise"
            )
        margin = None if self.margins is None else _interval(self.margins)
        if margin is not None and margin[0] <= 0 and low > 0:
            found.append(
                "the answers' logits are not above the wrong ones' by more on the clean prompts "
                f"than on the corrupt ones, beyond noise [{margin[0]:.3g}, {margin[1]:.3g}]"
            )
        if (accuracy := self._doubt_of_accuracy()) is not None:
            found.append(accuracy)
        return tuple(found)

    def _doubt_of_accuracy(self) -> str | None:
        """Whether the clean prompts are not answered right, or the corrupt ones are as well."""
        if self.right_clean is None or self.right_corrupt is None:
            return None
        clean, corrupt = self.right_clean.mean(), self.right_corrupt.mean()
        more, of_clean = (
            _interval(values)
            for values in (self.right_clean - self.right_corrupt, self.right_clean)
        )
        enough = clean >= LEAST_RIGHT and clean - corrupt >= LEAST_MORE
        if enough and more is not None and more[0] > 0:
            return None
        if of_clean is None or of_clean[0] <= LEAST_RIGHT:
            return (
                f"the model does not do the task: it answers right on {clean:.0%} of the clean and "
                f"{corrupt:.0%} of the corrupt prompts"
            )
        return (
            f"the corrupt prompts are answered right as well ({corrupt:.0%}, the clean ones "
            f"{clean:.0%}): this corruption does not take the answer away"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values for ``run.json``."""
        accuracy = self.accuracy
        return {
            "accuracy_clean": None if accuracy is None else accuracy[0],
            "accuracy_corrupt": None if accuracy is None else accuracy[1],
            "gap": self.gap,
            "gap_interval": None if self.gap_interval is None else list(self.gap_interval),
            "level": _LEVEL,
            "doubts": list(self.doubts),
        }


@torch.no_grad()
def ability(experiment: Experiment) -> Ability:
    """Measure what the model does on an experiment's prompts: one forward of each run.

    Parameters
    ----------
    experiment
        Model, prompts and metric; intervention and direction play no role.
    """
    answered = all(pair.answers for pair in experiment.task.pairs)
    opposed = answered and all(pair.wrong_answers for pair in experiment.task.pairs)

    def figures(i: int) -> Tensor:
        """``[figure, row]``: metric, margin and whether it is right, of either run."""
        batch, found = experiment.batches[i], []
        for tokens in (batch.clean, batch.corrupt):
            rows = experiment.finals(tokens, batch.scored)
            found.append(experiment.measure_rows(rows, batch))
            if opposed:
                logits = experiment.model.unembed(rows, batch.targets.tokens)
                found.append(METRICS["logit_diff"](logits, batch.targets))
            if answered:
                found.append(_right(experiment, rows, batch).to(found[0]))
        return torch.stack(found)

    by_figure = zip(*experiment.by_batch(figures), strict=True)
    values = [experiment.per_prompt(rows) for rows in by_figure]
    (clean, *of_clean), (corrupt, *of_corrupt) = np.split(np.stack(values), 2)
    return Ability(
        of_clean[-1] if answered else None,
        of_corrupt[-1] if answered else None,
        -experiment.metric.sign * (clean - corrupt),
        all(pair.clean == pair.corrupt for pair in experiment.task.pairs),
        of_clean[0] - of_corrupt[0] if opposed else None,
    )


def _right(experiment: Experiment, rows: Tensor, batch: Batch) -> Tensor:
    """``[row]``: whether the highest of the logits that are compared is one of an answer."""
    targets = batch.targets
    of_answer, of_wrong = targets.answer_weight > 0, targets.wrong_weight > 0
    logits = at_least_float32(experiment.model.unembed(rows, targets.tokens))
    best = logits.masked_fill(~of_answer, -torch.inf).amax(-1)
    others = logits.masked_fill(~of_wrong, -torch.inf).amax(-1)  # -inf where there are none
    alone = ~of_wrong.any(-1)
    if alone.any():  # no wrong answers: all other tokens are
        parts = [experiment.model.unembed(part).amax(-1) for part in rows[alone].split(_ROWS)]
        others[alone] = at_least_float32(torch.cat(parts))
        return torch.where(alone, best >= others, best > others)
    return best > others


def _interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """Percentile bootstrap interval of a mean over prompts, None of fewer than two."""
    if len(values) < 2:
        return None
    ends = bootstrap(
        (values,), np.mean, n_resamples=_N_RESAMPLES, batch=max(1, _MOST_DRAWN // len(values)),
        confidence_level=_LEVEL, method="percentile", rng=0,
    ).confidence_interval  # fmt: skip
    return float(ends.low), float(ends.high)
