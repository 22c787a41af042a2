"""What a method is, and the table of them: a method is a function in a file of its own.

::

    @dataclass(frozen=True)
    class Options(Checked):
        steps: int = option(5, "Integration steps.", at_least=1)

    @method("eap-ig", "EAP with integrated gradients (Hanna et al. 2024)", Options)
    def eap_ig(experiment, options, work):
        return ...  # [edge]

A function in another package does the same and is offered under the entry point ``acdc.methods``.
What it may return:

=============  ====================================================================  ==============
``over``       the function returns                                                  the circuit is
=============  ====================================================================  ==============
``edges``      scores ``[edge]``                                                     selected by it
``nodes``      scores ``[sender]``                                                   selected by it
``circuit``    a :class:`Found`                                                      in that
=============  ====================================================================  ==============

See :mod:`acdc.methods.select`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.engine.work import Work
from acdc.errors import OptionError
from acdc.measure.evaluation import DEFAULT_FAITHFULNESS
from acdc.methods.select import Selection, edge_scores, select
from acdc.methods.signs import stable_signs
from acdc.registry import Registry
from acdc.settings import Checked, Settings, options_of
from graphs import Circuit

__all__ = ["METHODS", "Found", "Method", "NoOptions", "Score", "meaning", "method"]

Scores = NDArray[np.float64]
Over = Literal["edges", "nodes", "circuit"]
Function = TypeVar("Function", bound=Callable[..., Any])


class Score(StrEnum):
    """What a score means."""

    CHANGE = "change"
    """Of the metric, in its own sign, when the edge is ablated."""
    COST = "cost"
    """How much worse the metric gets: positive where the edge helps, in every metric."""
    MAGNITUDE = "magnitude"
    """How much the method makes of the edge, at least 0."""


def meaning(circuit: Circuit) -> Score:
    """Return what a circuit's scores mean: as its ``info`` says, else those of its method.

    CHANGE where neither is known.
    """
    says = circuit.info.get("score")
    if says in tuple(Score):
        return Score(says)
    known = METHODS.get(str(circuit.info.get("method")))
    return Score.CHANGE if known is None else known.score


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
class NoOptions(Checked):
    """Options of a method that has none."""


def _prompts(experiment: Experiment, options: Any) -> int:
    """One unit of progress a prompt."""
    return len(experiment.task)


def _uncounted(options: Any) -> None:
    """How many passes it makes depends on what it finds."""
    return None


def _unsized(options: Any, n_edges: int) -> None:
    """No options that ask for a size."""
    return None


@dataclass(frozen=True, eq=False)
class Method:
    """A way to find circuits.

    Parameters
    ----------
    name, description
        As listed on the command line.
    function
        ``(experiment, options, work)`` -> see :mod:`acdc.methods.base`.
    options
        Dataclass of its options, :class:`acdc.settings.Checked`; a field marked ``shared`` takes
        the value of the setting of its name.
    over
        What the function returns.
    score
        What the circuit's scores mean.
    passes
        ``(experiment, options)`` -> how much the function tells ``work.progress`` in all.
    size
        ``(options, n_edges)`` -> how many of all edges the options ask for, None if they do not.
    not_across
        Why it cannot be run with a cross-layer transcoder; empty: it can.
    keeps_state
        Whether it keeps what every node writes, of all prompts, while it searches.
    trains
        Whether it trains masks.
    counts
        ``options`` -> forward and backward passes that it makes of each prompt; None where that
        depends on what it finds.
    """

    name: str
    description: str
    function: Callable[..., Any]
    options: type = NoOptions
    over: Over = "edges"
    score: Score = Score.CHANGE
    passes: Callable[[Experiment, Any], int] = _prompts
    size: Callable[[Any, int], int | None] = _unsized
    not_across: str = ""
    keeps_state: bool = False
    trains: bool = False
    counts: Callable[[Any], tuple[int, int] | None] = _uncounted

    @property
    def option_names(self) -> tuple[str, ...]:
        """Names of the options that are its own."""
        return tuple(name for name, _, says in options_of(self.options) if not says.shared)

    @property
    def defaults(self) -> dict[str, Any]:
        """Its own options with their defaults."""
        return {name: getattr(self.options, name) for name in self.option_names}

    def configured(self, settings: Settings) -> Any:
        """Return the method's options as settings ask for them.

        Raises
        ------
        OptionError
            If the method takes no option of a name, a value is out of bounds, or a ranking is
            asked for that its scores cannot have.
        """
        given = {name: value for name, value in settings.options.items() if value is not None}
        for name in given:
            if name not in self.option_names:
                takes = ", ".join(self.option_names) or "no options"
                raise OptionError(
                    f"method {self.name!r} takes no {name}: leave it out or choose another method "
                    f"(it takes {takes})"
                )
        if settings.ranking == "signed" and self.score is Score.MAGNITUDE:
            raise OptionError(
                f"method {self.name!r} gives scores without a sign: rank by absolute value"
            )
        self._check_selection(settings)
        shared = (name for name, _, says in options_of(self.options) if says.shared)
        options = self.options(**{name: getattr(settings, name) for name in shared}, **given)
        selects = settings.threshold is not None or settings.n_edges is not None
        if selects and self.size(options, 1) is not None:
            raise OptionError(
                f"{', '.join(given)} of method {self.name!r} asks for a size, and so does a "
                "threshold or a number of edges: give one of them"
            )
        return options

    def find(self, experiment: Experiment, work: Work | None = None, **asked: Any) -> Found:
        """Find a circuit.

        Parameters
        ----------
        experiment
            Model, prompts, metric, intervention and direction.
        work
            Memory, progress and checkpoint.
        **asked
            ``threshold``, ``n_edges``, ``ranking``, ``seed``, and options of the method.
        """
        settings = Settings.of(experiment.task.name, method=self.name, **asked)
        return self.search(experiment, settings, work or Work())

    def n_units(self, experiment: Experiment, **asked: Any) -> int:
        """How much :meth:`find` tells ``work.progress`` in all."""
        settings = Settings.of(experiment.task.name, method=self.name, **asked)
        return self.passes(experiment, self.configured(settings))

    def search(self, experiment: Experiment, settings: Settings, work: Work) -> Found:
        """As :meth:`find`, with what is asked for as settings."""
        options = self.configured(settings)
        found = self.function(experiment, options, work)
        if self.over == "circuit":
            return found
        selection = self._selection(experiment, settings, options, found)
        details: dict[str, Any] = {}
        if self.over == "nodes":
            names = experiment.graph.senders
            details["node_scores"] = dict(zip(names, found.tolist(), strict=True))
            ranking = selection.ranking or "absolute"
            selection = replace(selection, ranking=ranking)
            found = edge_scores(experiment, found, ranking)
        chosen = select(experiment, found, selection, work.note)
        details = {"ranking": chosen.ranking, **chosen.details, **details}
        return Found(Circuit(experiment.graph, found, chosen.mask), details)

    def scores(
        self, experiment: Experiment, options: Any = None, work: Work | None = None
    ) -> Scores:
        """Return the scores of every edge, ``[edge]``; of a method over edges or nodes."""
        found: Scores = self.function(experiment, options or self.options(), work or Work())
        return edge_scores(experiment, found) if self.over == "nodes" else found

    def scores_by_prompt(
        self, experiment: Experiment, options: Any = None, work: Work | None = None
    ) -> Scores:
        """Return the scores of every edge on every prompt alone, ``[prompt, edge]``.

        Parameters and errors as of :meth:`scores`.  Where every prompt has as many scored
        positions, and a score is a mean over prompts (as attribution is), they are its parts.
        """
        return np.stack([
            self.scores(experiment.on(replace(experiment.task, pairs=(pair,))), options, work)
            for pair in experiment.task.pairs
        ])  # fmt: skip

    def _check_selection(self, settings: Settings) -> None:
        """Raise OptionError if scores cannot be selected from as asked."""
        usual = Selection()
        asked = {
            "select": settings.select != usual.how,
            "positive": settings.positive is not None,
            "stable": settings.stable is not None,
        }
        for name in (name for name, is_asked in asked.items() if is_asked):
            value = getattr(settings, name)
            if self.over == "circuit":
                raise OptionError(
                    f"{name} {value!r}: method {self.name!r} has no scores to choose by; leave it "
                    "out"
                )
            if name != "select" and self.score is Score.MAGNITUDE:
                raise OptionError(
                    f"{name} {value!r}: method {self.name!r} gives scores without a sign; leave it "
                    "out"
                )
            if name != "stable" and settings.threshold is not None:
                raise OptionError(
                    f"{name} {value!r} chooses a number of edges, and a threshold was given: leave "
                    "one of them out"
                )
        if settings.positive is not None and settings.ranking is not None:
            raise OptionError(
                f"positive {settings.positive:g} is a ranking of its own: leave ranking "
                f"{settings.ranking!r} out"
            )

    def _selection(
        self, experiment: Experiment, settings: Settings, options: Any, found: Scores
    ) -> Selection:
        selection = Selection(
            settings.threshold,
            settings.n_edges,
            settings.ranking,
            settings.select,
            settings.select_seconds,
            settings.positive,
        )
        if settings.stable is not None:
            scores = edge_scores(experiment, found) if self.over == "nodes" else found
            stable = stable_signs(
                experiment,
                lambda few: self.scores(few, options),
                scores,
                settings.stable,
                settings.seed,
            )
            selection = replace(selection, allowed=stable)
        if self.score is Score.MAGNITUDE:
            selection = replace(selection, ranking="absolute")
        size = self.size(options, experiment.graph.n_edges)
        if size is not None:
            selection = replace(selection, n_edges=size)
        return selection


METHODS: Registry[Method] = Registry("method", Method, "acdc.methods", package="acdc.methods")
"""Every method by name."""

_SMALLEST = f"default: the smallest circuit with faithfulness {DEFAULT_FAITHFULNESS}"


def method(
    name: str, description: str, options: type = NoOptions, **says: Any
) -> Callable[[Function], Function]:
    """Register a function as a method.

    Parameters
    ----------
    name, description
        As listed; how a circuit is selected by default is added to the description.
    options, **says
        As of :class:`Method`.

    Returns
    -------
    callable
        What takes the function and gives it back as it is.
    """

    def register(function: Function) -> Function:
        said = description if says.get("over") == "circuit" else f"{description}; {_SMALLEST}"
        made = Method(name, said, function, options, **says)
        METHODS.add(made)
        function.registered = made  # type: ignore[attr-defined]  # for entry points
        return function

    return register
