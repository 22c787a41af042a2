"""From scores to a circuit: scores of nodes to scores of edges, and which edges are in.

A set of nodes is the circuit of all edges between them (as Conmy et al. 2023, arXiv 2304.14997,
compare methods over nodes with ACDC).  So an edge is in as soon as both its ends are, and its
score is that of the end which enters last: of its sender, or of the node that its receiver feeds,
whichever ranks lower.  Three details:

* the embeddings and ``logits`` are in every circuit, so they rank with the highest node;
* a receiver that feeds several nodes (a key or value of grouped-query attention) ranks with the
  highest of them;
* q, k and v of a head are ports of one node: their edges from one sender have one score.

Of a number of edges, ``top`` takes the largest connected circuit that the ranking gives, ``greedy``
grows one from ``logits`` upwards as EAP-IG and MIB do, and ``milp`` is the connected circuit with
the largest summed score (:mod:`graphs.optimal`; by signed scores it may have fewer edges).  Edges
that help and edges that hinder may be taken in a given proportion, and edges whose sign is not
stable over prompts be left out (:mod:`acdc.methods.signs`): Nikankin et al. 2025, "BlackboxNLP-2025
MIB shared task: improving circuit faithfulness via better edge selection", arXiv 2510.25786, name
all three (bootstrapping, a ratio of signs, integer programming); how each is done here is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from acdc.ablations.base import OTHER_RUN
from acdc.engine.experiment import Experiment
from acdc.engine.processes import Numbers, by_chunk
from acdc.errors import OptionError
from acdc.measure.curves import ranked_scores, smallest_faithful
from acdc.measure.evaluation import Evaluator
from acdc.settings import RANKINGS, SELECTIONS
from graphs import select_greedy, select_threshold, select_top
from graphs.optimal import Optimal, select_optimal

__all__ = ["Chooser", "Selected", "Selection", "edge_scores", "in_proportion", "select"]

Scores = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Selection:
    """Which edges are in.

    Parameters
    ----------
    threshold
        Smallest ranked score that is kept.
    n_edges
        At most this many edges.  With neither: the smallest circuit that is faithful.
    ranking
        ``absolute``, or ``signed`` (edges whose ablation makes the metric worse come first).
        None: by absolute value where a threshold or a number is given, otherwise whichever gives
        the smaller circuit.
    how
        ``top``, ``greedy`` or ``milp``, see the module.
    seconds
        Time limit of an integer program.
    positive
        Share of the edges whose ablation makes the metric worse; None: as it comes.
    allowed
        ``[edge]``: edges that may be in; None: all.
    """

    threshold: float | None = None
    n_edges: int | None = None
    ranking: str | None = None
    how: str = SELECTIONS[0]
    seconds: float = 60.0
    positive: float | None = None
    allowed: Mask | None = None


@dataclass(frozen=True, eq=False)
class Selected:
    """A circuit that was chosen by scores.

    Parameters
    ----------
    mask
        ``[edge]``.
    ranking
        ``absolute`` or ``signed``.
    details
        What ``run.json`` says of it: ``selection`` has the number of edges whose sign is unstable,
        the share of edges that help (which pruning may move off the one asked for) and, of an
        integer program, the summed score, its bound, that of the best quick circuit, and whether
        it is proven to be the best.  Empty where nothing was asked for.
    """

    mask: Mask
    ranking: str
    details: dict[str, Any]


def select(
    experiment: Experiment,
    scores: Scores,
    selection: Selection,
    note: Callable[[str], None] = lambda _: None,
) -> Selected:
    """Choose a circuit by scores ``[edge]``; ``note`` is told which sizes are tried.

    Raises
    ------
    OptionError
        If every score is 0, or none has a sign that is stable.
    """
    if not scores.any():
        under = f"under metric {experiment.metric.name!r}"
        raise OptionError(f"every edge has score 0 {under}: {_why_zero(experiment)}")
    if selection.allowed is not None and not selection.allowed.any():
        raise OptionError("stable: no edge's score keeps its sign over prompts; lower the share")
    rankings = [selection.ranking] if selection.ranking else list(RANKINGS)
    if selection.positive is not None or not _chooses_size(selection):
        rankings = rankings[:1]
    choosers = [Chooser(experiment, scores, selection, name) for name in rankings]
    if _chooses_size(selection):
        mask, chooser = _smallest(Evaluator(experiment.selection), choosers, note)
    else:
        chooser = choosers[0]
        mask = (
            chooser.above(selection.threshold)
            if selection.threshold is not None
            else chooser(min(selection.n_edges or 0, experiment.graph.n_edges))
        )
    return Selected(mask, chooser.ranking, chooser.details(mask))


def _smallest(
    evaluator: Evaluator, choosers: Sequence[Chooser], note: Callable[[str], None]
) -> tuple[Mask, Chooser]:
    """The smallest faithful circuit of several rankings, the first one's where they are equal."""
    best: tuple[Mask, Chooser] | None = None
    for one in choosers:
        below = None if best is None else int(best[0].sum())
        mask = smallest_faithful(
            evaluator, one.ranked, surely=True, choose=one, below=below, note=note
        )
        if below is None or mask.sum() < below:
            best = mask, one
    assert best is not None
    return best


def _why_zero(experiment: Experiment) -> str:
    """Say why a method sees nothing, and what helps."""
    pairs = experiment.task.pairs
    if experiment.ablation.carries == OTHER_RUN and all(p.clean == p.corrupt for p in pairs):
        return "clean and corrupt prompts are the same: give corrupt ones that differ"
    if experiment.metric.compares is not None:
        return (
            "it is flat at the clean run, where the method looks; choose eap-ig, which looks along "
            "the way, or another metric"
        )
    return "no edge changes it; choose another metric, intervention or other prompts"


def _chooses_size(selection: Selection) -> bool:
    return selection.threshold is None and selection.n_edges is None


class Chooser:
    """Gives the circuit of at most so many edges that scores choose.

    Parameters
    ----------
    experiment, scores, selection
        As of :func:`select`; its threshold and number of edges do not matter.
    ranking
        ``absolute`` or ``signed``.

    Attributes
    ----------
    ranked
        ``[edge]``: the edges to keep highest.
    """

    def __init__(
        self, experiment: Experiment, scores: Scores, selection: Selection, ranking: str
    ) -> None:
        self.ranking, self._selection = ranking, selection
        n_edges = experiment.graph.n_edges
        self._allowed = (
            np.ones(n_edges, dtype=bool) if selection.allowed is None else selection.allowed
        )
        self._graph = experiment.graph.subgraph(self._allowed)
        self.ranked = self._worth = ranked_scores(experiment, scores, ranking)
        self._helps = ranked_scores(experiment, scores, "signed") > 0
        if selection.positive is not None:
            self.ranked = in_proportion(self._worth, self._helps, selection.positive)
        self._circuits: dict[int, Mask] = {}  # by number of edges: a program is solved once
        self._programs: dict[bytes, Optimal] = {}

    def above(self, threshold: float) -> Mask:
        """All edges whose ranked score is at least a threshold, pruned."""
        ranked = self.ranked[self._allowed]
        return self._widened(select_threshold(self._graph, ranked, threshold, absolute=False))

    def __call__(self, n: int) -> Mask:
        """The circuit of at most ``n`` edges."""
        if n not in self._circuits:
            self._circuits[n] = self._choose(min(n, self._graph.n_edges))
        return self._circuits[n]

    def details(self, mask: Mask) -> dict[str, Any]:
        """What ``run.json`` says of a circuit that was chosen, see :class:`Selected`."""
        said: dict[str, Any] = {}
        if self._selection.allowed is not None:
            said["n_unstable"] = int((~self._selection.allowed).sum())
        if self._selection.positive is not None and mask.any():
            said["positive"] = float(self._helps[mask].mean())
        program = self._programs.get(mask.tobytes())
        if program is not None:
            said |= {
                "score": program.score,
                "bound": program.bound,
                "heuristic": program.heuristic,
                "optimal": program.is_optimal,
                "gap": program.gap,
                "seconds": round(program.seconds, 3),
            }
        return {"selection": said} if said else {}

    def _choose(self, n: int) -> Mask:
        ranked = self.ranked[self._allowed]
        if self._selection.how == "top":
            return self._widened(select_top(self._graph, ranked, n, absolute=False))
        if self._selection.how == "greedy":
            return self._widened(select_greedy(self._graph, ranked, n, absolute=False))
        found = self._solved(n)
        mask = self._widened(found.mask)
        self._programs[mask.tobytes()] = found
        return mask

    def _solved(self, n: int) -> Optimal:
        """Solve the program in one process for all: how far it comes is a matter of time."""

        def solve(_: int) -> Numbers:
            best = select_optimal(
                self._graph,
                self._worth[self._allowed],
                n,
                most=self._most(n),
                seconds=self._selection.seconds,
            )
            figures = [best.score, best.bound, best.heuristic, best.n_variables, best.seconds]
            return [torch.from_numpy(best.mask), torch.tensor(figures, dtype=torch.double)]

        ((mask, figures),) = by_chunk(range(1), solve)
        score, bound, heuristic, n_variables, seconds = figures.tolist()
        return Optimal(mask.numpy(), score, bound, heuristic, int(n_variables), seconds)

    def _most(self, n: int) -> list[tuple[Mask, int]]:
        """Kinds of edges of which at most so many may be in."""
        if self._selection.positive is None:
            return []
        n_helping = round(self._selection.positive * n)
        helps = self._helps[self._allowed]
        return [(helps, n_helping), (~helps, n - n_helping)]

    def _widened(self, mask: Mask) -> Mask:
        whole = np.zeros(len(self._allowed), dtype=bool)
        whole[self._allowed] = mask
        return whole


def in_proportion(worth: Scores, helps: Mask, share: float) -> Scores:
    """Ranked scores of which every first ``n`` have a share of edges that help.

    Parameters
    ----------
    worth
        ``[edge]``, larger is better: the order among edges that help, and among the others.
    helps
        ``[edge]``: whether ablating the edge makes the metric worse.
    share
        0 to 1.

    Examples
    --------
    >>> worth, helps = np.array([9.0, 8.0, 7.0, 2.0, 1.0]), np.array([1, 1, 1, 0, 0], dtype=bool)
    >>> np.argsort(-in_proportion(worth, helps, 0.5))
    array([0, 3, 1, 4, 2])
    """
    last = np.empty(len(worth))
    for kind, part in ((helps, share), (~helps, 1 - share)):
        order = np.argsort(-worth[kind], kind="stable")
        place = np.empty(len(order))
        place[order] = np.arange(len(order))
        # the k-th of its kind is due once (k + 1/2) / part edges are in; of a kind of which none
        # is wanted, after all others
        last[kind] = (place + 0.5) / part if part > 0 else len(worth) ** 2 + place
    return -last


def edge_scores(experiment: Experiment, scores: Scores, ranking: str = "absolute") -> Scores:
    """Score of each edge: that of the end which ranks lower.

    Parameters
    ----------
    experiment
        Its graph, and what ``signed`` means.
    scores
        ``[sender]``, change of the metric when the sender is ablated.
    ranking
        ``absolute`` or ``signed``, see :func:`acdc.measure.curves.ranked_scores`.

    Returns
    -------
    ndarray
        ``[edge]``, in the unit and with the sign of the node's score.
    """
    graph = experiment.graph
    by_rank = np.argsort(ranked_scores(experiment, scores, ranking), kind="stable")
    rank = np.empty(graph.n_nodes, dtype=np.int64)
    rank[by_rank] = np.arange(graph.n_senders)
    rank[graph.source] = graph.n_senders - 1
    rank[graph.n_senders] = graph.n_senders - 1  # logits
    of_receiver = np.maximum.reduceat(rank[graph.feeds], graph.feeds_start[:-1])
    lower = np.minimum(rank[graph.edge_sender], of_receiver[graph.edge_receiver])
    return scores[by_rank][lower]
