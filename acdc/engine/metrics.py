"""Metrics: what a circuit is scored by, per prompt.

A metric maps the logits of the scored rows to one number a row; every reported value is the
mean over rows.  ``sign`` makes it a quantity to be minimised, as ACDC needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from acdc.registry import Registry

__all__ = ["METRICS", "Metric", "Targets", "at_least_float32", "get_metric"]


@dataclass(frozen=True, eq=False)
class Targets:
    """What the rows of a batch are scored against.

    Parameters
    ----------
    tokens
        ``[row, n]`` token ids: answers, then wrong answers, padded.
    answer_weight, wrong_weight
        ``[row, n]``: 1 / (number of answers) at answers, 0 elsewhere; wrong answers likewise.
    clean
        ``[row, vocab]``: what the metric compares with of the clean run's logits, see
        :attr:`Metric.compares`; None for metrics of the answers alone.
    """

    tokens: Tensor
    answer_weight: Tensor
    wrong_weight: Tensor
    clean: Tensor | None = None

    def rows(self, part: slice) -> Targets:
        """Return the targets of some rows."""
        clean = None if self.clean is None else self.clean[part]
        return Targets(self.tokens[part], self.answer_weight[part], self.wrong_weight[part], clean)

    def repeat(self, n: int) -> Targets:
        """Return targets with ``n`` rows for each: its answers hold at ``n`` positions."""
        parts = (self.tokens, self.answer_weight, self.wrong_weight)
        return Targets(*(x.repeat_interleave(n, 0) for x in parts))


@dataclass(frozen=True)
class Metric:
    """A per-row score of logits.

    Parameters
    ----------
    name
        As on the command line.
    sign
        ``+1`` if lower is better, ``-1`` if higher is better; ``sign * value`` is minimised.
    whole_vocab
        Whether it needs the logits of the whole vocabulary, or of the targets' tokens only.
    needs_answers, needs_wrong
        Whether every pair must have answers, and wrong ones.
    compares
        ``logits [row, vocab]`` of the clean run -> what ``function`` finds in
        :attr:`Targets.clean`; None where it looks at the answers alone.
    function
        ``(logits [..., row, vocab or n], targets) -> [..., row]``.
    description
        One line with the unit.
    linear
        Whether it is a linear function of the logits: what adds up there does so in it.
    """

    name: str
    sign: int
    whole_vocab: bool
    needs_answers: bool
    needs_wrong: bool
    compares: Callable[[Tensor], Tensor] | None
    function: Callable[[Tensor, Targets], Tensor]
    description: str
    linear: bool = False

    def __call__(
        self, logits: Float[Tensor, "*scenario row token"], targets: Targets
    ) -> Float[Tensor, "*scenario row"]:
        """Return the value of each row, ``[..., row]``, in float32."""
        return self.function(at_least_float32(logits), targets)


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or in float64 where it is so already."""
    return x if x.dtype == torch.float64 else x.float()


def _logit_diff(logits: Tensor, targets: Targets) -> Tensor:
    return (logits * (targets.answer_weight - targets.wrong_weight)).sum(-1)


def _kl(logits: Tensor, targets: Targets) -> Tensor:
    clean = targets.clean
    assert clean is not None
    logq, p = torch.log_softmax(logits, -1), clean.exp()
    # sum (q - p) - p (log q - log p): what logsumexp rounds cancels to first order
    total = logq.exp().sum(-1) - p.sum(-1)
    if logq.requires_grad:
        return total - torch.linalg.vecdot(logq - clean, p)
    return total - logq.sub_(clean).mul_(p).sum(-1)


def _mse(logits: Tensor, targets: Targets) -> Tensor:
    assert targets.clean is not None
    return (logits - targets.clean).square().mean(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1)


def _as_they_are(logits: Tensor) -> Tensor:
    return logits


def _target_logprobs(logits: Tensor, targets: Targets) -> Tensor:
    index = targets.tokens.expand(*logits.shape[:-1], -1)
    return logits.gather(-1, index) - torch.logsumexp(logits, -1, keepdim=True)


def _prob_diff(logits: Tensor, targets: Targets) -> Tensor:
    weight = (targets.answer_weight > 0).float() - (targets.wrong_weight > 0).float()
    return (_target_logprobs(logits, targets).exp() * weight).sum(-1)


def _nll(logits: Tensor, targets: Targets) -> Tensor:
    logprobs = _target_logprobs(logits, targets)
    return -torch.logsumexp(logprobs.masked_fill(targets.answer_weight == 0, -torch.inf), -1)


_OURS = (
    Metric(
        "kl", sign=1, whole_vocab=True, needs_answers=False, needs_wrong=False,
        compares=_log_softmax, function=_kl,
        description="KL(clean || patched) at the scored positions, nats",
    ),
    Metric(
        "mse", sign=1, whole_vocab=True, needs_answers=False, needs_wrong=False,
        compares=_as_they_are, function=_mse,
        description="mean over the vocabulary of the squared change of the logits",
    ),
    Metric(
        "logit_diff", sign=-1, whole_vocab=False, needs_answers=True, needs_wrong=True,
        compares=None, function=_logit_diff,
        description="mean logit of the answers minus mean logit of the wrong answers", linear=True,
    ),
    Metric(
        "prob_diff", sign=-1, whole_vocab=True, needs_answers=True, needs_wrong=True,
        compares=None, function=_prob_diff,
        description="summed probability of the answers minus that of the wrong answers",
    ),
    Metric(
        "nll", sign=1, whole_vocab=True, needs_answers=True, needs_wrong=False,
        compares=None, function=_nll,
        description="negative log of the answers' probability, nats",
    ),
)  # fmt: skip

METRICS: Registry[Metric] = Registry(
    "metric", Metric, "acdc.metrics", known={metric.name: metric for metric in _OURS}
)
"""Every metric by name."""


def get_metric(name: str) -> Metric:
    """Return a metric by name; UnknownNameError lists the nearest."""
    return METRICS[name]
