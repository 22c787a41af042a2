"""Information flow routes: how much of what a receiver reads came from each sender.

Ferrando & Voita 2024, arXiv 2403.00824, on this graph as EAP-IG's authors take it there: for a
receiver that reads ``y = sum_u z_u`` at one position, sender u has the share ::

    max(|y|_1 - |y - z_u|_1, 0)

of the sum over its senders; the score of an edge is the mean share over positions (in a graph split
by spans those of its span), then over prompts.  Nothing is ablated and no metric enters: scores say
where information flows on these prompts, not what the task needs.  q, k and v of a head read the
same stream and have one score.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.attribution import Written, chunk_size, token_chunks
from acdc.engine.batch import Batch
from acdc.engine.experiment import Experiment
from acdc.engine.processes import Told
from acdc.engine.values import Rows
from acdc.engine.work import Work
from acdc.methods.base import NoOptions, Score, method

__all__ = ["ifr"]

_NONE, _WORK = NoOptions(), Work()


@method(
    "ifr",
    "information flow routes: shares of what receivers read, no metric (Ferrando & Voita 2024)",
    score=Score.MAGNITUDE,
    counts=lambda options: (1, 0),
)
@torch.no_grad()
def ifr(
    experiment: Experiment, options: NoOptions = _NONE, work: Work = _WORK
) -> NDArray[np.float64]:
    """Mean share of every edge in what its receiver reads, in the base run.

    Parameters
    ----------
    experiment
        Model and prompts; its direction says which run is the base.
    options
        None.
    work
        Memory, a half for runs of prompts and a half for one chunk of tokens; told of prompts.

    Returns
    -------
    ndarray
        ``[edge]`` in [0, 1]; the edges into a receiver add up to 1 (to less where nothing that is
        read comes near the sum).
    """
    graph, program = experiment.graph, experiment.program
    n_read = [high - low for low, high in map(program.senders_seen, program.stages)]
    n_prompts, tell = np.zeros(graph.shape.n_spans), Told(work.progress)
    for batch in experiment.batches:
        n_prompts[list(set(batch.spans))] += batch.n_prompts

    def shares(i: int) -> Tensor:
        """``[span, sender]`` of one stage after the other: sums over the prompts of a batch."""
        batch = experiment.batches[i]
        n_at_once = experiment.footprint.runs_at_once(batch.clean.shape[1], work.memory)
        totals = np.zeros((graph.shape.n_spans, sum(n_read)))
        for part in batch.split(n_at_once):
            _add_shares(experiment, part, work.memory // 2, n_read, totals)
            tell(part.n_prompts)
        return torch.from_numpy(totals)

    found = experiment.sum_of_batches(shares, told=tell).numpy()
    totals = np.split(found, np.cumsum(n_read)[:-1], axis=1)
    spans, receiver, sender = experiment.edge_place
    scores = np.zeros(graph.n_edges)
    for stage, total in zip(program.stages, totals, strict=True):
        edges = slice(*np.searchsorted(receiver, (stage.ports.start, stage.ports.stop)))
        low, _ = program.senders_seen(stage)
        scores[edges] = total[spans[edges], sender[edges] - low]
    return scores / n_prompts[spans]


def _add_shares(
    experiment: Experiment,
    batch: Batch,
    memory: int,
    n_read: Sequence[int],
    totals: NDArray[np.float64],
) -> None:
    """Add the sums over some prompts to ``totals [span, sender]``; ``n_read``: by stage."""
    program = experiment.program
    trace = experiment.model.forward(experiment.runs(batch)[0])
    values = [value.flatten(1, 3) for value in program.values(trace)]
    chunk = chunk_size(program, values, memory)
    for span, tokens in token_chunks(batch.spans, batch.n_prompts, chunk, batch.clean.device):
        weight = 1 / batch.spans.count(span)  # a prompt's positions count as much as another's
        written = Written(program, values, tokens, trace, frozen=True)
        by_stage = np.split(totals[span], np.cumsum(n_read)[:-1])  # views
        for stage, total in zip(program.stages, by_stage, strict=True):
            low, high = program.senders_seen(stage)
            stream = trace.at(stage.stream).flatten(0, 1)[tokens]
            total += weight * _shares(
                list(written.between(low, high, stage.n_mlps)), stream, high - low
            )


def _shares(
    written: list[tuple[slice | Tensor, Rows]], whole: Tensor, n: int
) -> NDArray[np.float64]:
    """``[sender]``: shares of what senders write in ``whole [token, d_model]``, over tokens."""
    size = whole.abs().sum(-1)
    near = [(places, rows, _near(rows, whole, size)) for places, rows in written]
    sums = [part.sum(0 if isinstance(rows, Tensor) else 1) for _, rows, part in near]
    total = torch.stack(sums).sum(0)
    scale = 1 / total.where(total > 0, 1)
    shares = whole.new_zeros(n)
    for places, rows, part in near:
        if isinstance(rows, Tensor):
            shares[places] = part @ scale
        else:
            own = shares[places]
            own.index_add_(0, rows.index.flatten(), (part * scale[:, None]).flatten())
    return shares.double().cpu().numpy()


def _near(rows: Rows, whole: Tensor, size: Tensor) -> Tensor:
    """How much nearer each row brings zero to the sum: ``[row, token]``, or ``[token, slot]``."""
    if isinstance(rows, Tensor):
        left = torch.stack([(whole - row).abs().sum(-1) for row in rows])
        return (size - left).clamp(min=0)
    left = (whole[:, None] - rows.vectors).abs().sum(-1)
    return (size[:, None] - left).clamp(min=0)
