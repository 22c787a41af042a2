"""Checkpoints of a search, so that a killed run goes on where it was.

A run's folder holds ``checkpoint/`` while it works: the settings, and for each threshold
that ACDC tries the edges decided so far.  Going on repeats the finished receivers with one
evaluation each.
"""

from __future__ import annotations

import io
import json
import shutil
import time
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from acdc.errors import OutputError
from graphs import Graph
from graphs.files import json_text, write_whole

__all__ = ["Checkpoint", "Decided"]

_NAME = "checkpoint"


@dataclass(eq=False)
class Decided:
    """Edges that a search has decided.

    Parameters
    ----------
    in_circuit
        ``[edge]``: all True at the start.
    scores
        ``[edge]``: changes of the minimised metric; 0 at the start.
    n_finished
        Receivers whose edges are all decided.
    work
        Counts of what was computed.
    rounding
        What the referee of a low precision has seen, see :class:`acdc.engine.referee.Referee`.
    """

    in_circuit: NDArray[np.bool_]
    scores: NDArray[np.float64]
    n_finished: int = 0
    work: dict[str, int] = field(default_factory=dict)
    rounding: float = 0.0

    @classmethod
    def nothing(cls, graph: Graph) -> Decided:
        """Return the start of a search: every edge is in."""
        return cls(np.ones(graph.n_edges, dtype=bool), np.zeros(graph.n_edges))


class Checkpoint:
    """The folder ``checkpoint`` in the folder of a run that is not finished.

    Parameters
    ----------
    folder
        Folder of the run; it need not exist.
    settings
        What decides the result, as plain JSON values.
    period
        Seconds between two writes; a search that ends earlier leaves nothing behind.

    Raises
    ------
    OutputError
        If the folder holds the checkpoint of a run with other settings, or a damaged one.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], period: float = 20.0) -> None:
        self.folder, self.period = Path(folder) / _NAME, period
        self._settings = json.loads(json_text(settings))
        self._written = time.monotonic()
        path = self.folder / "settings.json"
        if not self.folder.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(path) from error
        if not isinstance(found, dict):
            raise self._damaged(path)
        differing = [k for k, v in self._settings.items() if found.get(k) != v]
        if differing:
            name = differing[0]
            raise OutputError(
                f"{self.folder} is of a run with {name} {found.get(name)!r}, this one has "
                f"{self._settings[name]!r}: delete it, or choose another folder with --out"
            )

    @staticmethod
    def is_all_of(folder: Path) -> bool:
        """Whether a folder holds a checkpoint and nothing else."""
        return [path.name for path in folder.iterdir()] == [_NAME]

    @staticmethod
    def remove(folder: Path) -> None:
        """Delete what a finished run left behind in its folder while it worked."""
        if (folder / _NAME).exists():
            shutil.rmtree(folder / _NAME)

    def load(self, graph: Graph, threshold: float) -> Decided:
        """Return what was decided at a threshold; nothing yet where it was not tried."""
        path = self._file(threshold)
        if not path.exists():
            return Decided.nothing(graph)
        try:
            with np.load(path, allow_pickle=False) as content:
                decided = Decided(
                    content["in_circuit"],
                    content["scores"],
                    int(content["n_finished"]),
                    json.loads(str(content["work"])),
                    float(content["rounding"]),
                )
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
            raise self._damaged(path) from error
        if decided.in_circuit.shape != (graph.n_edges,) or decided.scores.shape != (graph.n_edges,):
            raise self._damaged(path)
        return decided

    def save(self, threshold: float, decided: Decided) -> None:
        """Write what is decided, if the last time is a period ago."""
        if time.monotonic() - self._written < self.period:
            return
        self._prepare()
        content = io.BytesIO()
        arrays = asdict(decided) | {"work": np.array(json_text(decided.work))}
        np.savez_compressed(content, **arrays)
        write_whole(self._file(threshold), content.getvalue())
        self._written = time.monotonic()

    def keep(self, name: str, content: bytes) -> None:
        """Write a file at once: what took long and is needed to go on."""
        self._prepare()
        write_whole(self.folder / name, content)

    def kept(self, name: str) -> Path | None:
        """Return the path of a file that was kept, None if there is none."""
        path = self.folder / name
        return path if path.is_file() else None

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = self.folder / "settings.json"
        if not settings.exists():
            write_whole(settings, json.dumps(self._settings, indent=1) + "\n")

    def _file(self, threshold: float) -> Path:
        return self.folder / f"acdc-{threshold!r}.npz"

    def _damaged(self, path: Path) -> OutputError:
        return OutputError(f"{path} cannot be read: delete {self.folder} to start anew")
