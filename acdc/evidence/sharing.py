"""Several tasks in one model: what their circuits share beyond chance, and what serves one alone.

A folder holds ``shared.json``, ``nodes.csv`` and ``edges.csv`` (which task has which, with which
share of its circuit), ``overlap.csv`` (every two tasks), and one picture, ``shared.svg`` and
``shared.png``.  What chance is: :mod:`graphs.known.sharing`.
"""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acdc.errors import OptionError
from acdc.evidence.sharing_picture import draw
from acdc.runs.folder import versions, write_folder
from acdc.runs.opened import Opened, RunLike, open_run, other_weights
from acdc.settings import MOST_RESAMPLES, check_count
from acdc.terminal.shown import Shown
from graphs.files.whole import write_json, write_whole
from graphs.known.sharing import LEVEL, Membership, Sharing, share_several
from graphs.select import prune
from graphs.text import short

__all__ = ["SharedCircuits", "shared"]

_HOW = ("method", "intervention", "direction", "positions")


@dataclass(frozen=True, eq=False)
class SharedCircuits(Shown):
    """Circuits of one model, side by side.

    Parameters
    ----------
    labels
        What each is called: its task, where these differ.
    circuits
        Themselves, and how they were found.
    found
        What they share.
    """

    labels: tuple[str, ...]
    circuits: tuple[Opened, ...]
    found: Sharing

    @property
    def warnings(self) -> tuple[str, ...]:
        """What one should know before believing it."""
        said = [
            f"{label}: {warning}"
            for label, one in zip(self.labels, self.circuits, strict=True)
            for warning in one.summary.get("warnings") or ()
        ]
        for key in _HOW:
            values = {
                str(one.summary.get(key) or one.circuit.info.get(key) or "unknown")
                for one in self.circuits
            }
            if len(values) > 1:
                said.append(
                    f"the circuits were found with different values of {key} "
                    f"({', '.join(sorted(values))}): they differ for that, too"
                )
        return tuple(said)

    @cached_property
    def node_shares(self) -> NDArray[np.float64]:
        """``[node, circuit]``: share of a circuit's absolute scores on edges out of a node.

        In the order of ``found.nodes``.
        """
        names = self.circuits[0].circuit.graph.nodes
        places = {name: i for i, name in enumerate(names)}
        chosen = [places[name] for name in self.found.nodes.names]
        columns = []
        for one in self.circuits:
            circuit = one.circuit
            mask = prune(circuit.graph, circuit.in_circuit)
            weights = np.abs(circuit.scores) * mask
            sums = np.bincount(circuit.graph.edge_sender, weights, minlength=len(names))
            columns.append(sums[chosen] / max(float(weights.sum()), 1e-300))
        return np.stack(columns, axis=1)

    def summary(self) -> dict[str, Any]:
        """Content of ``shared.json``."""
        found = self.found
        return {
            "labels": list(self.labels),
            "runs": [str(one.path) if one.path else one.name for one in self.circuits],
            "tasks": [
                {
                    "label": label,
                    "task": one.summary.get("task"),
                    "faithfulness": one.summary.get("faithfulness"),
                    "n_edges": int(found.edges.inside[:, i].sum()),
                    "n_nodes": int(found.nodes.inside[:, i].sum()),
                    "edges_alone": list(found.edges.only(i)),
                    "n_edges_alone_expected": found.alone_expected[i],
                    "nodes_alone": list(found.nodes.only(i)),
                }
                for i, (label, one) in enumerate(zip(self.labels, self.circuits, strict=True))
            ],
            "together": {
                "n_edges": found.n_union,
                "n_edges_total": found.edges.n_total,
                "n_edges_expected": found.union_expected,
                "n_edges_low": found.union_low,
                "n_nodes": len(found.nodes.names),
                "n_nodes_total": found.nodes.n_total,
            },
            "pairs": [
                asdict(pair) | {"one": self.labels[pair.one], "other": self.labels[pair.other]}
                for pair in found.pairs
            ],
            "level": LEVEL,
            "n_random": found.n_draws,
            "nodes_beyond_chance": list(found.nodes.beyond_chance),
            "edges_beyond_chance": list(found.edges.beyond_chance),
            "edges_of_all": list(found.edges.of_all),
            "nodes": self._rows(found.nodes, self.node_shares),
            "edges": self._rows(found.edges),
            "warnings": list(self.warnings),
            "versions": versions(),
        }

    def _rows(
        self, members: Membership, shares: NDArray[np.float64] | None = None
    ) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for i, name in enumerate(members.names):
            row = {
                "name": name,
                "tasks": [self.labels[j] for j in np.flatnonzero(members.inside[i])],
                "p": float(members.p[i]),
                "q": float(members.q[i]),
            }
            rows.append(row if shares is None else {**row, "shares": shares[i].tolist()})
        return rows

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the folder, all files or none; errors as :meth:`acdc.runs.folder.Run.save`."""
        return write_folder(folder, self._fill, overwrite=overwrite)

    def _fill(self, folder: Path) -> None:
        summary = self.summary()
        header = ["n_tasks", "p", "q", *self.labels]
        shares = [f"share of {label}" for label in self.labels]
        nodes = self._cells(self.found.nodes, self.node_shares)
        _write_csv(folder / "nodes.csv", ["node", *header, *shares], nodes)
        _write_csv(folder / "edges.csv", ["edge", *header], self._cells(self.found.edges))
        pairs = summary["pairs"]
        _write_csv(folder / "overlap.csv", list(pairs[0]), [list(pair.values()) for pair in pairs])
        for kind in ("svg", "png"):
            (folder / f"shared.{kind}").write_bytes(draw(summary, kind))
        write_json(folder / "shared.json", summary)

    def _cells(
        self, members: Membership, shares: NDArray[np.float64] | None = None
    ) -> list[list[Any]]:
        return [
            [
                name,
                int(members.counts[i]),
                float(members.p[i]),
                float(members.q[i]),
                *members.inside[i].astype(int).tolist(),
                *(() if shares is None else shares[i].tolist()),
            ]
            for i, name in enumerate(members.names)
        ]

    def __repr__(self) -> str:
        return short(
            f"<SharedCircuits {', '.join(self.labels)}: {self.found.n_union:,} of "
            f"{self.found.edges.n_total:,} edges, {len(self.found.edges.of_all):,} in all>"
        )


def shared(*runs: RunLike, n_random: int = 200, seed: int = 0) -> SharedCircuits:
    """Say what the circuits of several tasks in one model share beyond chance.

    Parameters
    ----------
    *runs
        Two or more, each the folder of a run, a circuit file, :class:`acdc.Run` or
        :class:`graphs.Circuit`.
    n_random
        Random circuits that each is compared with.
    seed
        Of these.

    Raises
    ------
    OptionError
        If there are fewer than two, or they are known to be of different models.
    GraphError
        If their graphs differ, or one is empty.

    Examples
    --------
    >>> import acdc
    >>> acdc.shared("runs/ioi", "runs/pronoun").found.edges.beyond_chance  # doctest: +SKIP
    """
    if len(runs) < 2:
        raise OptionError(f"{len(runs)} circuits: give two or more, of one model")
    check_count("n_random", n_random, at_most=MOST_RESAMPLES)
    opened = tuple(open_run(run) for run in runs)
    if (differ := other_weights(opened)) is not None:
        raise OptionError(f"{differ}: give circuits of one model")
    found = share_several([one.circuit for one in opened], n=n_random, seed=seed)
    return SharedCircuits(_labels(opened), opened, found)


def _labels(opened: tuple[Opened, ...]) -> tuple[str, ...]:
    """Tasks where they differ; otherwise names of folders, numbered where they are alike, too."""
    tasks = [
        Path(str(one.summary.get("task") or one.circuit.info.get("task") or "")).stem
        for one in opened
    ]
    names = [one.path.stem if one.path is not None else tasks[i] for i, one in enumerate(opened)]
    for found in (tasks, names):
        if all(found) and len(set(found)) == len(found):
            return tuple(found)
    return tuple(f"{name or 'circuit'} ({i})" for i, name in enumerate(names, start=1))


def _write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_whole(path, text.getvalue())
