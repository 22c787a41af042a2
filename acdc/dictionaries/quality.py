"""How good a dictionary is: a circuit over a bad dictionary says nothing.

Figures are those of SAELens' and SAEBench's evaluations, measured on the prompts of a task or on
any token batches.

References
----------
Karvonen et al. 2025, "SAEBench" (core evaluations): loss recovered is relative to putting zeros in
the activation's place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from acdc.dictionaries.activations import activation, check_fits, replacement
from acdc.dictionaries.attachment import NeuronAttachment
from acdc.dictionaries.experts import ExpertAttachment
from acdc.dictionaries.sae import Dictionary
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import METRICS, at_least_float32
from acdc.models.lowering.model import LoweredModel, Trace

__all__ = [
    "DENSITY_EDGES",
    "Quality",
    "Recovery",
    "qualities_on_task",
    "quality_on_task",
    "quality_on_tokens",
    "quality_table",
]

DENSITY_EDGES = tuple(float(edge) for edge in np.arange(-6, 0.5, 0.5))
"""Bin edges of the density histogram, log10 of the share of tokens that a latent is active on."""

RECOVERS = (0.8, 1.2)
"""Between which a dictionary recovers the metric that nothing is said of it."""

EXPLAINS = 0.5
"""Share of the activation's variance from which on nothing is said."""

MOST_DEAD, TOKENS_A_LATENT = 0.5, 4
"""Share of latents, active on no token, up to which nothing is said; nor is it of fewer tokens than
these for each latent, on which most of a good dictionary's are silent, too."""

_LOGITS_BYTES = 24 << 20  # logits of the whole vocabulary are computed in parts of this size
_SPARKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Recovery:
    """A score of the model, and what is left of it when the activation is replaced.

    Parameters
    ----------
    model
        Of the untouched model.
    reconstructed
        With the dictionary's reconstruction in the activation's place.
    ablated
        With zeros in its place.
    """

    model: float
    reconstructed: float
    ablated: float

    @property
    def recovered(self) -> float | None:
        """``(reconstructed - ablated) / (model - ablated)``: 1 is perfect, 0 no better than zeros.

        None where zeros change nothing, so that there is nothing to recover.
        """
        gap = self.model - self.ablated
        if abs(gap) <= 1e-6 * max(abs(self.model), abs(self.ablated)):
            return None
        return (self.reconstructed - self.ablated) / gap


@dataclass(frozen=True)
class Quality:
    """Figures of one dictionary on given tokens.

    Parameters
    ----------
    hook, architecture, n_latents
        Which dictionary: TransformerLens' name of what it reads, and its kind and size.
    n_tokens
        Tokens that the figures are means over.
    l0
        Active latents per token.
    mse
        Squared error of the reconstruction, summed over dimensions, mean over tokens.
    explained_variance
        1 - mse / variance of the activation over tokens (summed over dimensions); None where
        the activation is constant.
    dead_fraction
        Share of latents that are active on none of the tokens.
    density_counts
        Latents by log10 of the share of tokens that they are active on, in bins between
        :data:`DENSITY_EDGES`; dead latents are in none, rarer ones than the first edge in the
        first.
    loss
        Mean cross-entropy in nats: of the answers at the scored positions (task), or of the
        next token (tokens).
    kl
        Mean KL(model || replaced) in nats at the same positions.
    metric_name, metric
        The task's metric, on its clean prompts; None on plain tokens.
    """

    hook: str
    architecture: str
    n_latents: int
    n_tokens: int
    l0: float
    mse: float
    explained_variance: float | None
    dead_fraction: float
    density_counts: tuple[int, ...]
    loss: Recovery
    kl: Recovery
    metric_name: str | None = None
    metric: Recovery | None = None

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why a circuit over the dictionary's latents says little, a sentence each."""
        found, name = [], f"dictionary at {self.hook}"
        share = None if self.metric is None else self.metric.recovered
        low, high = RECOVERS
        if share is not None and not low <= share <= high:
            found.append(
                f"{name}: with its reconstruction in the activation's place the metric recovers "
                f"{share:.3g} of what zeros take, not {low:g} to {high:g}"
            )
        explained = self.explained_variance
        if explained is not None and explained < EXPLAINS:
            found.append(
                f"{name}: its reconstruction explains {explained:.0%} of the activation's variance "
                f"on these prompts, less than {EXPLAINS:.0%}"
            )
        enough = self.n_tokens >= TOKENS_A_LATENT * self.n_latents
        if enough and self.dead_fraction > MOST_DEAD:
            found.append(
                f"{name}: {self.dead_fraction:.0%} of its {self.n_latents:,} latents are active on "
                f"none of these {self.n_tokens:,} tokens"
            )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, as run.json and the cards of dictionaries hold them."""
        plain = asdict(self) | {"density_counts": list(self.density_counts)}
        for name in ("loss", "kl", "metric"):
            recovery: Recovery | None = getattr(self, name)
            if recovery is not None:
                plain[name]["recovered"] = recovery.recovered
        return plain | {"density_log10_edges": list(DENSITY_EDGES)}


@torch.no_grad()
def quality_on_tokens(
    dictionary: Dictionary, model: LoweredModel, batches: Iterable[Tensor]
) -> Quality:
    """Measure a dictionary on plain text; every position but the last predicts the next token.

    Parameters
    ----------
    dictionary
        It computes in the model's dtype here, whatever the dtype of its file.
    model
        The model that it was trained on.
    batches
        Token ids ``[batch, pos]``, at least two positions each.

    Raises
    ------
    DictionaryError
        If the dictionary does not fit the model.
    """
    measured = _Measurement(dictionary, model)
    loss, kl = _Scores(), _Scores()
    for tokens in batches:
        finals = measured.finals(tokens)
        targets = tokens[:, 1:].flatten()
        rows = [final[:, :-1].flatten(0, 1) for final in finals]
        for part, logprobs in _logprobs(model, rows):
            loss.add([-p.gather(-1, targets[part, None]) for p in logprobs])
            kl.add([_kl(logprobs[0], p) for p in logprobs])
    return measured.quality(loss, kl)


@torch.no_grad()
def quality_on_task(
    dictionary: Dictionary, experiment: Experiment, others: Sequence[Dictionary] = ()
) -> Quality:
    """Measure a dictionary on the prompts of a task.

    L0, error, density and dead latents count every token of the clean and the corrupt prompts;
    loss, KL and the task's metric are taken on the clean prompts at the scored positions.

    Parameters
    ----------
    dictionary
        It computes in the model's dtype here, whatever the dtype of its file.
    experiment
        Model, prompts and metric; intervention and direction play no role.
    others
        Of a layer of a cross-layer transcoder the other layers: the earlier ones write to what it
        reconstructs.

    Raises
    ------
    DictionaryError
        If the dictionary does not fit the model.
    """
    model = experiment.model
    measured = _Measurement(dictionary, model, others)

    def sums(i: int) -> Tensor:
        """Sums over a batch: of the measurement, of loss, KL and metric."""
        batch, loss, kl, metric = experiment.batches[i], _Scores(), _Scores(), _Scores()
        measured.clear()
        measured.count(batch.corrupt)
        rows = [final[:, batch.scored].flatten(0, 1) for final in measured.finals(batch.clean)]
        for part, logprobs in _logprobs(model, rows):
            targets = batch.targets.rows(part)
            loss.add([METRICS["nll"](p, targets) for p in logprobs])
            kl.add([_kl(logprobs[0], p) for p in logprobs])
        metric.add_sums([experiment.measure(x, batch) for x in rows], batch.n_rows)
        return torch.cat([*measured.sums(), *(one.as_tensor() for one in (loss, kl, metric))])

    *of_tokens, loss, kl, metric = experiment.sum_of_batches(sums).split([*measured.sizes, 4, 4, 4])
    measured.take(of_tokens)
    scores = [_Scores.of(x) for x in (loss, kl, metric)]
    return measured.quality(scores[0], scores[1], experiment.metric.name, scores[2])


def qualities_on_task(experiment: Experiment) -> list[Quality]:
    """Measure every dictionary of an experiment, as :func:`quality_on_task`; neurons have none."""
    without = NeuronAttachment | ExpertAttachment
    trained = [a for a in experiment.attachments if not isinstance(a, without)]
    crossing = [a.dictionary for a in trained if a.site.kind == "cross_layer"]
    return [quality_on_task(a.dictionary, experiment, crossing) for a in trained]


class _Scores:
    """Sums of one score in the three runs: model, reconstruction, zeros."""

    def __init__(self) -> None:
        self.sums, self.n = np.zeros(3), 0

    @classmethod
    def of(cls, numbers: Tensor) -> Self:
        """Undo :meth:`as_tensor`."""
        scores = cls()
        scores.sums, scores.n = numbers[:3].numpy(), int(numbers[3])
        return scores

    def as_tensor(self) -> Tensor:
        """The three sums and the number, in float64 on the CPU."""
        return torch.tensor([*self.sums.tolist(), self.n], dtype=torch.double)

    def add(self, values: Sequence[Tensor]) -> None:
        """Count the values of some rows, by run."""
        self.add_sums([value.double().sum() for value in values], values[0].numel())

    def add_sums(self, sums: Sequence[Tensor], n: int) -> None:
        self.sums += [float(value) for value in sums]
        self.n += n

    def recovery(self) -> Recovery:
        return Recovery(*(self.sums / self.n).tolist())


class _Measurement:
    """Sums over tokens, in float64 since a variance is a small difference of large sums."""

    def __init__(
        self, dictionary: Dictionary, model: LoweredModel, others: Sequence[Dictionary] = ()
    ) -> None:
        check_fits(dictionary, model)
        self.model, self.dictionary = model, dictionary.to(model.device, model.dtype)
        layer = dictionary.writes.layer
        into = [d for d in others if d.W_later is not None and d.writes.layer < layer]
        self.earlier = [d.to(model.device, model.dtype) for d in into]
        self.sizes = dictionary.n_latents, dictionary.d_out, 3
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        device, (n_latents, d_out, _) = self.model.device, self.sizes
        self.active = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.sum = torch.zeros(d_out, dtype=torch.float64, device=device)
        self.squares = self.errors = 0.0
        self.n_tokens = 0

    def sums(self) -> list[Tensor]:
        """All that was counted, of :attr:`sizes`, in float64 on the CPU."""
        scalars = torch.tensor([self.squares, self.errors, self.n_tokens], dtype=torch.double)
        return [self.active.cpu().double(), self.sum.cpu(), scalars]

    def take(self, sums: Sequence[Tensor]) -> None:
        """Undo :meth:`sums`."""
        active, total, (squares, errors, n_tokens) = sums
        self.active, self.sum = active.long(), total
        self.squares, self.errors, self.n_tokens = float(squares), float(errors), int(n_tokens)

    def finals(self, tokens: Tensor) -> list[Tensor]:
        """Final streams of the model, with the reconstruction and with zeros in its place."""
        model, hook = self.model, self.dictionary.writes
        trace, got = self.count(tokens)
        finals = [trace.final]
        for value in (got, torch.zeros_like(got)):
            replaced = replacement(model, hook, value)
            finals.append(model.forward(tokens, replaced=replaced).final)
        return [final for final in finals if final is not None]

    def count(self, tokens: Tensor) -> tuple[Trace, Tensor]:
        """Run the model, count its tokens, and return the run and the reconstruction."""
        trace = self.model.forward(tokens)
        x = activation(self.model, trace, self.dictionary.reads)
        latents = self.dictionary.encode(x)
        got = self.dictionary.decode(latents, x)
        for other in self.earlier:
            assert other.W_later is not None
            rows = other.W_later[self.dictionary.writes.layer - other.writes.layer - 1]
            got = got + other.encode(activation(self.model, trace, other.reads)) @ rows
        self._count(latents, activation(self.model, trace, self.dictionary.writes), got)
        return trace, got

    def _count(self, latents: Tensor, wanted: Tensor, got: Tensor) -> None:
        wanted = wanted.double().flatten(0, -2)  # (token, d_out)
        self.active += (latents.flatten(0, -2) != 0).sum(0)
        self.sum += wanted.sum(0)
        self.squares += float(wanted.pow(2).sum())
        self.errors += float((wanted - got.double().flatten(0, -2)).pow(2).sum())
        self.n_tokens += len(wanted)

    def quality(
        self,
        loss: _Scores,
        kl: _Scores,
        metric_name: str | None = None,
        metric: _Scores | None = None,
    ) -> Quality:
        n, active = self.n_tokens, self.active.cpu().numpy()
        mse = self.errors / n
        squares = self.squares / n
        variance = squares - float((self.sum / n).pow(2).sum())
        density = active[active > 0] / n
        exponents = np.clip(np.log10(density), DENSITY_EDGES[0], None)
        return Quality(
            hook=self.dictionary.reads.name,
            architecture=self.dictionary.architecture,
            n_latents=self.dictionary.n_latents,
            n_tokens=n,
            l0=float(active.sum() / n),
            mse=mse,
            explained_variance=1 - mse / variance if variance > 1e-10 * squares else None,
            dead_fraction=float((active == 0).mean()),
            density_counts=tuple(np.histogram(exponents, DENSITY_EDGES)[0].tolist()),
            loss=loss.recovery(),
            kl=kl.recovery(),
            metric_name=metric_name,
            metric=None if metric is None else metric.recovery(),
        )


def _logprobs(model: LoweredModel, rows: list[Tensor]) -> Iterable[tuple[slice, list[Tensor]]]:
    """Yield log-probabilities ``[row, vocab]`` of each run, a bounded number of rows at a time."""
    each = max(1, _LOGITS_BYTES // (model.d_vocab * 4))
    for start in range(0, len(rows[0]), each):
        part = slice(start, start + each)
        yield (
            part,
            [torch.log_softmax(at_least_float32(model.unembed(x[part])), -1) for x in rows],
        )


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of log-probabilities ``[row, vocab]`` per row."""
    return (p.exp() * (p - q)).sum(-1)


def quality_table(qualities: Sequence[Quality]) -> Table:
    """Table of figures, one row per dictionary."""
    table = Table(title="dictionaries", title_justify="left")
    table.add_column("reads")
    table.add_column("kind")
    names = [q.metric_name for q in qualities if q.metric_name is not None]
    recovered = ["loss", "KL", *dict.fromkeys(names)]
    for column in ("latents", "dead", "L0", "expl. var.", *(f"{n} rec." for n in recovered)):
        table.add_column(column, justify="right")
    table.add_column(f"log10 density {DENSITY_EDGES[0]:.0f} to 0")
    for q in qualities:
        cells = [
            f"{q.n_latents:,}",
            f"{100 * q.dead_fraction:.1f} %",
            f"{q.l0:.1f}",
            _share(q.explained_variance),
            _share(q.loss.recovered),
            _share(q.kl.recovered),
        ]
        for name in dict.fromkeys(names):
            recovery = q.metric if q.metric_name == name else None
            cells.append(_share(None if recovery is None else recovery.recovered))
        table.add_row(escape(q.hook), q.architecture, *cells, _spark(q.density_counts))
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _spark(counts: Sequence[int]) -> str:
    """Histogram in one line of text."""
    top = max(counts) or 1
    return "".join(_SPARKS[-(-c * (len(_SPARKS) - 1) // top)] for c in counts)
