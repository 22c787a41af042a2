"""Circuits side by side, or one beside a reference: what ``acdc compare`` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from acdc.errors import CircuitFileError, GraphError, OptionError
from acdc.evidence.bases import SizeAt, check_level, sizes_at
from acdc.evidence.references import (
    ModelMatch,
    ablation_warning,
    check_ablation,
    check_model,
    load_reference,
)
from acdc.runs.folder import Run, save_summary
from acdc.runs.opened import Opened, RunLike, open_run, other_weights
from acdc.runs.reporter import Reporter, Silent
from acdc.settings import MOST_RESAMPLES, check_count
from acdc.terminal.shown import Shown
from graphs import (
    Ablation,
    BasesComparison,
    Circuit,
    Comparison,
    Reference,
    ReferenceComparison,
    compare_bases,
    compare_reference,
    to_dot_comparison,
    to_dot_reference,
)
from graphs import compare as compare_pair
from graphs.known.chance import AtChance, chance_of_pair, chance_of_reference
from graphs.known.compare import common_form
from graphs.text import short

__all__ = ["Compared", "Cost", "check_drawable", "check_reference", "compare"]


_BY_NUMBER = "heads are compared by their numbers (acdc match compares them by what they do)"


def check_drawable(circuits: Sequence[Circuit]) -> None:
    """Raise OptionError if there is no one diagram of circuits."""
    if not _pair(circuits):
        raise OptionError(
            "circuits over different bases, or more than two, have no common diagram; draw each "
            "with acdc export"
        )


def _pair(circuits: Sequence[Circuit]) -> bool:
    """Whether there are two, over one basis."""
    first, *others = (circuit.graph.shape.sites for circuit in circuits)
    return others == [first]


@dataclass(frozen=True)
class Cost:
    """What finding a circuit took.

    Parameters
    ----------
    method
        That found it.
    seconds
        Of the search, without loading the model; None where no run is known.
    forwards
        Forward passes of one prompt whose logits the search looked at, of the whole model or of
        the part of it that an edge can change; None where it was not counted.
    """

    method: str
    seconds: float | None
    forwards: int | None


@dataclass(frozen=True, eq=False)
class Compared(Shown):
    """Circuits side by side, or one beside a reference.

    Parameters
    ----------
    labels
        What each is called.
    circuits
        Themselves; one beside a reference.
    found
        Two circuits over one basis: their edges and nodes.  Three or more, or circuits over
        different bases: their components.  One and a reference: what was found of it.
    costs
        Of each.
    sizes
        How large each has to be for equal faithfulness; None unless all are runs that are
        compared by components.
    reference, warning
        What one is compared with, and that it was found under another ablation; of a pair, that
        they are of different models.
    match
        Whether it is of the reference's model, as far as can be said.
    chance
        What random circuits of the (first) circuit's size get; None where they were not drawn.
    """

    labels: tuple[str, ...]
    circuits: tuple[Opened, ...]
    found: Comparison | BasesComparison | ReferenceComparison
    costs: tuple[Cost, ...]
    sizes: tuple[SizeAt, ...] | None = None
    reference: Reference | None = None
    warning: str | None = None
    match: ModelMatch | None = None
    chance: AtChance | None = None

    @property
    def doubts(self) -> tuple[str, ...]:
        """Warnings of the run that is compared with a reference: what it does not claim."""
        said = self.circuits[0].summary.get("warnings") if self.reference is not None else None
        return tuple(map(str, said)) if isinstance(said, list) else ()

    @property
    def is_other_model(self) -> bool:
        """Whether the reference is known to be of another model than the circuit."""
        return self.match is not None and self.match.same is False

    def dot(self) -> str:
        """Return one diagram of both, as DOT.

        Raises
        ------
        OptionError
            If there are more than two circuits, or they are over different bases.
        """
        own = [opened.circuit for opened in self.circuits]
        if self.reference is not None:
            note = f" (of another model, {self.reference.model})" if self.is_other_model else ""
            return to_dot_reference(own[0], self.reference, self.labels[0], note=note)
        check_drawable(own)
        return to_dot_comparison(own[0], own[1], (self.labels[0], self.labels[1]))

    def summary(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "labels": list(self.labels),
            "comparison": asdict(self.found),
            "sizes": None if self.sizes is None else [asdict(size) for size in self.sizes],
            "costs": [asdict(cost) for cost in self.costs],
            "reference": None if self.reference is None else self.reference.name,
            "warning": self.warning,
            "doubts": list(self.doubts),
            "other_model": self.is_other_model,
            "model": None if self.match is None else asdict(self.match),
            "chance": None if self.chance is None else asdict(self.chance),
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write :meth:`summary` as ``comparison.json`` into a folder, or as a ``.json`` file.

        Raises OutputError if the file exists, unless ``overwrite``, or cannot be written.
        """
        return save_summary(path, "comparison.json", self.summary(), overwrite=overwrite)

    def __repr__(self) -> str:
        return short(f"<Compared {len(self.labels)}: {self.found!r}>")


def compare(
    *circuits: RunLike,
    reference: str | Path | Reference | None = None,
    faithfulness: float = 0.9,
    other_model: bool = False,
    n_random: int | None = None,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
    **again: Any,
) -> Compared:
    """Compare circuits, or one with a reference.

    Two over one graph are compared edge by edge.  Circuits over different bases (heads and MLPs,
    SAEs, transcoders, neurons), and any three or more, are compared by the components that their
    nodes stand for and, where all are runs, by their sizes at equal faithfulness.

    Parameters
    ----------
    *circuits
        Each the folder of a run, a circuit file, :class:`acdc.Run` or :class:`graphs.Circuit`.
    reference
        Name, file or reference; then there is one circuit.
    faithfulness
        That sizes are compared at, above 0 and at most 1.
    other_model
        Compare with a reference of another model than the run's all the same; the result says so.
    n_random
        Random circuits of the same size, whose agreement stands beside; 0: none; None: 1,000, or
        fewer large ones (:func:`graphs.known.chance.n_circuits`).
    trust_remote_code
        Let the models' folders run their own code, whatever ``run.json`` says.
    reporter
        Told of progress.
    **again
        ``task``, ``model`` or ``metric``, where runs were given an object: the object again.

    Raises
    ------
    OptionError
        If there are too few circuits, or they cannot be compared, as with a reference of another
        model.
    GraphError
        If they are of different models.

    Examples
    --------
    >>> import acdc
    >>> acdc.compare("runs/heads", "runs/saes", "runs/neurons").sizes  # doctest: +SKIP
    """
    if reference is not None and len(circuits) != 1:
        raise OptionError(f"{len(circuits)} circuits and a reference: give one circuit with it")
    if reference is None and len(circuits) < 2:
        raise OptionError(f"{len(circuits)} circuits: give two or more, or a reference with one")
    if reference is None and other_model:
        raise OptionError("other_model without a reference: give one, or leave it out")
    if n_random is not None:
        check_count("n_random", n_random, at_least=0, at_most=MOST_RESAMPLES)
    check_level(faithfulness)
    opened = tuple(open_run(circuit) for circuit in circuits)
    labels = _labels(circuits)
    costs = tuple(map(_cost, opened))
    if reference is not None:
        known = load_reference(reference)
        match = check_reference(opened[0], known, other_model=other_model)
        return _with_reference(opened[0], labels[0], known, costs, match, n_random)
    own = [one.circuit for one in opened]
    if _pair(own):
        overlap = compare_pair(*own)
        chance = None if n_random == 0 else chance_of_pair(own[0], own[1], n=n_random)
        differ = other_weights(opened)
        warning = None if differ is None else f"{differ}: {_BY_NUMBER}"
        return Compared(labels, opened, overlap, costs, warning=warning, chance=chance)
    sizes = None
    found = compare_bases(*own)
    if all(one.discovery is not None for one in opened):
        with (reporter or Silent()).phase("size at equal faithfulness", None):
            sizes = sizes_at(opened, faithfulness, trust_remote_code=trust_remote_code, **again)
    return Compared(labels, opened, found, costs, None if sizes is None else tuple(sizes))


def _labels(circuits: tuple[RunLike, ...]) -> tuple[str, ...]:
    """Paths as they were given; of what has none its method, told apart where need be."""
    labels: list[str] = []
    for circuit in circuits:
        name = str(circuit)
        if isinstance(circuit, Run):
            name = f"{circuit.settings.method} run"
        elif not isinstance(circuit, str | Path):
            name = f"{circuit.info.get('method', 'a')} circuit"
        labels.append(name)
    return tuple(
        f"{name} ({i})" if labels.count(name) > 1 and not isinstance(circuit, str | Path) else name
        for i, (name, circuit) in enumerate(zip(labels, circuits, strict=True), start=1)
    )


def _cost(opened: Opened) -> Cost:
    timings, forwards = opened.summary.get("timings"), opened.summary.get("forwards")
    seconds = timings.get("discover") if isinstance(timings, Mapping) else None
    method = opened.summary.get("method") or opened.circuit.info.get("method")
    return Cost(
        str(method or "unknown"),
        seconds if isinstance(seconds, int | float) else None,
        forwards if isinstance(forwards, int) else None,
    )


def check_reference(opened: Opened, reference: Reference, *, other_model: bool) -> ModelMatch:
    """Check that a circuit can be compared with a reference, and is of its model.

    Raises
    ------
    GraphError
        If their graphs differ.
    OptionError
        If the model is another one, unless ``other_model``.
    """
    common_form(opened.circuit, reference)
    return check_model(reference, opened.identity, other_model=other_model)


def _with_reference(
    opened: Opened,
    label: str,
    reference: Reference,
    costs: tuple[Cost, ...],
    match: ModelMatch,
    n_random: int | None,
) -> Compared:
    circuit = opened.circuit
    return Compared(
        (label,),
        (opened,),
        compare_reference(circuit, reference),
        costs,
        None,
        reference,
        ablation_warning(reference, _ablation(opened)),
        match,
        None if n_random == 0 else chance_of_reference(circuit, reference, n=n_random),
    )


def _ablation(opened: Opened) -> Ablation:
    """Under which ablation a circuit was found, as far as its files say."""
    if opened.discovery is not None:
        return Ablation(opened.discovery.intervention, opened.discovery.direction)
    info = opened.circuit.info
    try:
        ablation = Ablation(info.get("intervention"), info.get("direction"))
        check_ablation(ablation)
    except GraphError as error:
        raise CircuitFileError(f"{opened.path or 'the circuit'}: {error}") from error
    return ablation
