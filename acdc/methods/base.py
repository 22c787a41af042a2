"""The one interface of all methods, and how scores become a circuit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acdc.checkpoint import Checkpoint
from acdc.curves import RANKINGS, ranked_scores, smallest_faithful
from acdc.engine.experiment import Experiment
from acdc.errors import OptionError
from acdc.evaluation import Evaluator
from acdc.methods.masks import check_training
from graphs import Circuit, select_threshold, select_top

__all__ = [
    "DEFAULT_FAITHFULNESS",
    "GUESSES",
    "SPECIAL",
    "Found",
    "Method",
    "Search",
    "from_scores",
]

Progress = Callable[[int], None]
Scores = NDArray[np.float64]

DEFAULT_FAITHFULNESS = 0.9
GUESSES = ("removed", "eap", "eap-ig")
SPECIAL = ("floor", "sparsity", "mask_steps", "learning_rate")
"""Fields of a search that only some methods take."""


def _ignore(_: str) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Search:
    """What a method is asked for.

    Parameters
    ----------
    threshold
        ``acdc``: tau.  Score methods: smallest absolute score that is kept.
    n_edges
        At most this many edges.  With neither, the method's default (see :class:`Method`).
    ranking
        How score methods rank edges: ``absolute``, or ``signed`` (edges whose ablation makes
        the metric worse come first).  None: by absolute value where a threshold or a number is
        given, otherwise whichever gives the smaller circuit.
    steps
        Integration steps, for methods that integrate gradients.
    memory
        Bytes that a method's largest working set may take beside weights and plain runs.
    guess
        ``acdc``: which edges it expects to be removed, see :data:`GUESSES`.  Changes how long
        the search takes, never what it finds.
    n_candidates
        ``acdc`` and ``exact`` on a graph with latents try at most so many edges, those with the
        largest attribution scores; ``acdc`` ablates all others from the start.
    checkpoint
        ``acdc``: where a killed search left off.
    floor
        ``eap-acdc``: edges with an absolute score below it are not tested, in the metric's unit;
        None: a tenth of tau.
    seed
        Of the methods that draw random numbers.
    sparsity
        Methods that train masks: share of the masks that end at 0, in (0, 1).  Given, the circuit
        is the ``1 - sparsity`` highest of all edges; else it is chosen as for score methods.
    mask_steps, learning_rate
        Of that training.  None: the method's own.
    note
        Told in words how a training stands.
    """

    threshold: float | None = None
    n_edges: int | None = None
    ranking: str | None = None
    steps: int = 5
    memory: int = 1 << 30
    guess: str = "removed"
    n_candidates: int = 3000
    checkpoint: Checkpoint | None = None
    floor: float | None = None
    seed: int = 0
    sparsity: float | None = None
    mask_steps: int | None = None
    learning_rate: float | None = None
    note: Callable[[str], None] = _ignore

    def __post_init__(self) -> None:
        if self.threshold is not None and self.n_edges is not None:
            raise OptionError("both a threshold and a number of edges were given: give one of them")
        if self.threshold is not None and not np.isfinite(self.threshold):
            raise OptionError(f"threshold {self.threshold}: expected a finite number, as 0.01")
        if self.n_edges is not None and self.n_edges < 1:
            raise OptionError(f"{self.n_edges} edges asked for: expected at least 1")
        if self.ranking not in (None, *RANKINGS):
            raise OptionError(f"ranking {self.ranking!r}: expected {' or '.join(RANKINGS)}")
        if self.guess not in GUESSES:
            raise OptionError(f"guess {self.guess!r}: expected {', '.join(GUESSES)}")
        if self.n_candidates < 1:
            raise OptionError(f"{self.n_candidates} candidate edges: expected at least 1")
        if self.steps < 1:
            raise OptionError(f"{self.steps} integration steps: expected at least 1")
        check_training(self.sparsity, self.mask_steps, self.learning_rate)
        if self.sparsity is not None and (self.threshold is not None or self.n_edges is not None):
            raise OptionError(
                "a sparsity was given, and a threshold or a number of edges: give one of them"
            )
        if self.floor is not None and not 0 <= self.floor < np.inf:
            raise OptionError(f"floor {self.floor}: expected a finite number of at least 0")


@dataclass(frozen=True, eq=False)
class Found:
    """A circuit and what run.json should say of the search.

    Parameters
    ----------
    circuit
        Every edge with its score.
    details
        Plain JSON values: the threshold that was used, counts of evaluations.
    """

    circuit: Circuit
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A way to find circuits.

    Parameters
    ----------
    name, description
        As listed on the command line; the description says what the default selection is.
    search
        ``(experiment, search, progress) -> Found``, called by :meth:`find`.
    n_units
        ``(experiment, search) -> int``: how often ``progress`` counts.
    options
        Those of :data:`SPECIAL` that it takes.
    signed
        Whether its scores have a sign to rank by; without one they are at least 0.
    minimised
        Whether a score is the change of the minimised metric, positive where the edge helps,
        rather than that of the metric in its own sign.
    latents
        Whether it knows graphs with latents of dictionaries.
    """

    name: str
    description: str
    search: Callable[[Experiment, Search, Progress], Found]
    n_units: Callable[[Experiment, Search], int]
    options: tuple[str, ...] = ()
    signed: bool = True
    minimised: bool = False
    latents: bool = False

    def find(self, experiment: Experiment, search: Search, progress: Progress) -> Found:
        """Find a circuit; ``progress`` is told of :attr:`n_units` in all."""
        self.check(search)
        self.check_nodes(latents=bool(experiment.graph.shape.sites))
        return self.search(experiment, search, progress)

    def check_nodes(self, *, latents: bool) -> None:
        """Raise OptionError if the method does not know such nodes."""
        if latents and not self.latents:
            raise OptionError(
                f"method {self.name!r} works on heads and MLPs only: choose another one with "
                "dictionaries, as eap-ig"
            )

    def check(self, search: Search) -> None:
        """Raise OptionError if the search sets an option that the method does not take."""
        if search.ranking == "signed" and not self.signed:
            raise OptionError(
                f"method {self.name!r} gives scores without a sign: rank by absolute value"
            )
        for name in SPECIAL:
            if getattr(search, name) is not None and name not in self.options:
                raise OptionError(
                    f"method {self.name!r} takes no {name}: leave it out or choose another method"
                )


def from_scores(experiment: Experiment, scores: Scores, search: Search) -> Found:
    """Turn edge scores into a circuit as the search asks.

    A threshold or a number of edges is applied to the ranking; with neither, the result is
    the smallest circuit that is faithful, over both rankings unless one is asked for.
    """
    graph = experiment.graph
    if not scores.any():
        raise OptionError(
            f"every edge has score 0 under metric {experiment.metric.name!r}: the method sees "
            "nothing there (kl and mse are flat at the clean run); choose eap-ig or another metric"
        )
    if search.threshold is not None or search.n_edges is not None:
        ranking = search.ranking or RANKINGS[0]
        values = ranked_scores(experiment, scores, ranking)
        if search.threshold is not None:
            mask = select_threshold(graph, values, search.threshold, absolute=False)
        else:
            n = min(search.n_edges or 0, graph.n_edges)
            mask = select_top(graph, values, n, absolute=False)
    else:
        evaluator = Evaluator(experiment)
        masks = {
            ranking: smallest_faithful(
                evaluator, ranked_scores(experiment, scores, ranking), DEFAULT_FAITHFULNESS
            )
            for ranking in ([search.ranking] if search.ranking else RANKINGS)
        }
        ranking = min(masks, key=lambda r: int(masks[r].sum()))
        mask = masks[ranking]
    return Found(Circuit(graph, scores, mask), {"ranking": ranking})
