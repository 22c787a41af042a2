"""Both directions: what noising finds and denoising does not, and the reverse.

Where a node computes an AND of two senders, ablating either in the clean run spoils it, so that
noising keeps both; in the corrupt run restoring one does nothing, so that denoising misses it
unless the other is there.  An OR is the other way round: one clean sender is enough, so that
noising misses what stands in for another, and restoring either shows, so that denoising keeps
both.  An edge that only noising finds is therefore a candidate for one input of an AND, one that
only denoising finds for one of an OR.  (Heimersheim & Nanda 2024, "How to
use and interpret activation patching", arXiv 2404.15255.)  Candidates, no proofs: two searches
also differ where an edge is near their threshold, and behind a node that only one of them needs.
:mod:`acdc.evidence.interactions` tests them.  Both searches of ACDC have one threshold: where none
is asked for, denoising has that which noising found.

A folder holds ``noising`` and ``denoising``, a run each, ``directions.json``, and one diagram of
both, ``directions.svg`` and ``directions.png``.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from acdc.engine.checkpoint import Checkpoint
from acdc.runs.discover import discover
from acdc.runs.folder import Run, check_output, finish_killed, versions, write_folder
from acdc.runs.given import named
from acdc.runs.reporter import Reporter, Silent
from acdc.terminal.shown import Shown
from graphs.files.whole import write_json
from graphs.known.compare import Comparison, compare, to_dot_comparison
from graphs.pictures.draw import render
from graphs.text import short

__all__ = ["BothDirections", "Candidate", "candidates_of", "check_folder", "discover_both"]

_GATES = {"noising": "AND", "denoising": "OR"}
"""What the inputs of a node may be of which only this direction finds some."""


@dataclass(frozen=True)
class Candidate:
    """A receiver that may combine some of its senders as a gate.

    Parameters
    ----------
    gate
        ``AND`` or ``OR``.
    receiver
        Its name.
    only
        Senders of edges into it that only one direction finds: noising for an AND, denoising
        for an OR.
    partners
        Senders of edges into it that both find.
    """

    gate: str
    receiver: str
    only: tuple[str, ...]
    partners: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class BothDirections(Shown):
    """What was found in both directions.

    Parameters
    ----------
    noising, denoising
        The runs.
    """

    noising: Run
    denoising: Run

    def __repr__(self) -> str:
        s, sizes = self.noising.settings, [f"{run.circuit.n_edges:,}" for run in self.runs]
        return short(
            f"<BothDirections: {s.method} on {s.task}, {sizes[0]} edges noising, {sizes[1]} "
            f"denoising, {len(self.comparison.edges.common):,} in both>"
        )

    @property
    def runs(self) -> tuple[Run, Run]:
        """Noising, denoising."""
        return self.noising, self.denoising

    @property
    def comparison(self) -> Comparison:
        """Overlap of the two circuits: noising is ``a``, denoising ``b``."""
        return compare(self.noising.circuit, self.denoising.circuit)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Receivers of edges that only one direction finds, ANDs first, in graph order.

        Left out is a receiver that reads a single edge in both circuits together: no gate.
        """
        return candidates_of(self.comparison)

    def summary(self) -> dict[str, Any]:
        """Content of ``directions.json``."""
        edges, settings = self.comparison.edges, self.noising.settings.plain()
        settings["direction"] = "both"
        return {
            **settings,
            "n_edges_total": self.noising.circuit.graph.n_edges,
            "n_edges_kept": {r.settings.direction: r.circuit.n_edges for r in self.runs},
            "faithfulness": {r.settings.direction: r.faithfulness for r in self.runs},
            "thresholds": {r.settings.direction: _threshold(r) for r in self.runs},
            "both": edges.common,
            "only_noising": edges.only_a,
            "only_denoising": edges.only_b,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "versions": versions(),
        }

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the folder, all of its files or none.

        Raises
        ------
        OutputError
            If the folder exists and is not empty, unless ``overwrite``, or cannot be written.
        """
        path = check_folder(folder, overwrite=overwrite)
        return write_folder(path, self._fill, overwrite=True, then=self._tidy)

    def _fill(self, folder: Path) -> None:
        for run in self.runs:
            (folder / run.settings.direction).mkdir()
            run.fill(folder / run.settings.direction)
        info = self.noising.circuit.info
        dot = to_dot_comparison(
            self.noising.circuit,
            self.denoising.circuit,
            ("noising (AND?)", "denoising (OR?)"),
            title=f"{info['task']} \u00b7 {info['model']} \u00b7 noising and denoising",
        )
        for kind in ("svg", "png"):
            render(dot, folder / f"directions.{kind}")
        write_json(folder / "directions.json", self.summary())

    def _tidy(self, folder: Path) -> None:
        for run in self.runs:
            run.tidy(folder / run.settings.direction)


def candidates_of(comparison: Comparison) -> tuple[Candidate, ...]:
    """Return the candidates of a noising circuit (``a``) and a denoising one (``b``).

    As :attr:`BothDirections.candidates`.
    """
    edges = comparison.edges
    common = _by_receiver(edges.common)
    found = []
    for direction, only in (("noising", edges.only_a), ("denoising", edges.only_b)):
        for receiver, senders in _by_receiver(only).items():
            partners = tuple(common.get(receiver, ()))
            if len(senders) + len(partners) > 1:
                found.append(Candidate(_GATES[direction], receiver, tuple(senders), partners))
    return tuple(found)


def _threshold(run: Run) -> float | None:
    """At which edges were removed; None for a method that has none."""
    found = run.details.get("threshold", run.settings.threshold)
    return None if found is None else float(found)


def _by_receiver(edges: tuple[str, ...]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for edge in edges:
        sender, receiver = edge.split("->")
        found[receiver].append(sender)
    return found


def check_folder(folder: str | Path, *, overwrite: bool) -> Path:
    """Return the folder as a path if both runs may be written into it.

    As :func:`acdc.runs.folder.check_output`, and the folders of the two runs may hold the
    checkpoints of a killed command.
    """
    path = Path(folder)
    finish_killed(path, tuple(_GATES))
    runs = [path / direction for direction in _GATES]
    killed = path.is_dir() and all(
        p in runs and p.is_dir() and Checkpoint.is_all_of(p) for p in path.iterdir()
    )
    check_output(path, overwrite=overwrite or killed)
    for run in runs:
        check_output(run, overwrite=overwrite)
    return path


def discover_both(
    task: Any,
    *,
    reporter: Reporter | None = None,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> BothDirections:
    """Find the circuit of a task in both directions.

    Parameters
    ----------
    task
        As of :func:`acdc.discover`.
    reporter
        Told of progress.
    checkpoint
        Folder that the result will be saved to: a killed search goes on where it was.
    **options
        As of :func:`acdc.runs.discover.discover`; a ``direction`` among them plays no role.

    Returns
    -------
    BothDirections
        With ``noising``, ``denoising``, ``comparison``, ``candidates`` and ``save(folder)``.

    Latents or neurons that are nodes are chosen by the first direction, for both.

    Examples
    --------
    >>> import acdc
    >>> found = acdc.discover_both("ioi", method="eap-ig", n_edges=60)  # doctest: +SKIP
    >>> found.comparison.edges.only_a  # doctest: +SKIP
    """
    runs: dict[str, Run] = {}
    sites = options.pop("sites", None)
    options = named(task=task, **options)  # a model that is given is lowered once
    for direction in _GATES:
        folder = None if checkpoint is None else Path(checkpoint) / direction
        runs[direction] = discover(
            reporter=reporter or Silent(),
            checkpoint=folder,
            sites=sites,
            **{**options, "direction": direction},
        )
        sites = runs[direction].circuit.graph.shape.site_at or None
        if options.get("threshold") is None and options.get("n_edges") is None:
            options["threshold"] = runs[direction].details.get("threshold")
    return BothDirections(**runs)
