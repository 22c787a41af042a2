"""Checkpoints of a search, so that a killed run goes on where it was.

A run's folder holds ``checkpoint/`` while it works: the settings, and for each threshold
that ACDC tries the edges decided so far (``acdc-TAU.npz``) and the values that the search stands
at (``state-TAU-N.bin`` after N receivers: the numbers of its arrays and nothing else), so that it
goes on to the same circuit, byte for byte.

A folder of that name may be the user's own.  It is a checkpoint if its ``settings.json`` says so,
and even then nothing is removed from it but the files that are written here, by their names.
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from acdc.engine.incremental import Work
from acdc.engine.moved import Read, StateError
from acdc.errors import OutputError
from graphs import Graph
from graphs.files.beside import new_files, remove_leftovers, settle
from graphs.files.whole import MIB, check_regular, json_text, read_bytes, read_json, write_whole
from graphs.order import edge_order, receiver_order

__all__ = ["PERIOD", "Checkpoint", "Decided"]

PERIOD = 20.0
"""Seconds between two writes, unless a checkpoint is told otherwise."""

_NAME = "checkpoint"
_FORMAT = {"format": "acdc-checkpoint-2"}
_SETTINGS = "settings.json"
_FILES = re.compile(
    r"settings\.json|acdc-[0-9.e+-]+\.npz|state-[0-9.e+-]+\.bin|constants\.safetensors"
)
"""Names of what is written here."""

_LONG = 0.4
"""Seconds that a write may take at the usual period: a fiftieth of it."""

_MOST_SETTINGS, _MOST_DECIDED = 1 * MIB, 1024 * MIB
_MOST_WORK = 10_000  # characters of its JSON


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
    crc
        Checksum of the state that belongs to it, see :meth:`Checkpoint.save`.
    """

    in_circuit: NDArray[np.bool_]
    scores: NDArray[np.float64]
    n_finished: int = 0
    work: dict[str, int] = field(default_factory=dict)
    rounding: float = 0.0
    crc: int = 0

    @classmethod
    def nothing(cls, graph: Graph) -> Decided:
        """Return the start of a search: every edge is in."""
        return cls(np.ones(graph.n_edges, dtype=bool), np.zeros(graph.n_edges))

    def check(self, graph: Graph) -> None:
        """Raise ValueError if no search of the graph can have decided this."""
        if not 0 <= self.n_finished <= len(graph.receivers):
            raise ValueError(f"{self.n_finished} of {len(graph.receivers)} receivers are finished")
        if not np.isfinite(self.scores).all():
            raise ValueError("a score is not finite")
        if not 0 <= self.rounding < math.inf:
            raise ValueError(f"rounding is {self.rounding}")
        known = {f.name for f in fields(Work)}
        if not isinstance(self.work, dict) or not set(self.work) <= known:
            raise ValueError("work has unknown counts")
        if not all(type(count) is int and count >= 0 for count in self.work.values()):
            raise ValueError("work has no counts")
        for receiver in receiver_order(graph)[self.n_finished :]:
            edges = edge_order(graph, receiver)
            if not self.in_circuit[edges].all() or self.scores[edges].any():
                raise ValueError(f"edges of {graph.receivers[receiver]} are decided before it")


class Checkpoint:
    """The folder ``checkpoint`` in the folder of a run that is not finished.

    Parameters
    ----------
    folder
        Folder of the run; it need not exist.
    settings
        What decides the result, as plain JSON values.
    period
        Seconds between two writes (:data:`PERIOD`); a search that ends earlier leaves nothing
        behind.  Longer where writing takes long: it takes at most a fiftieth of the time.

    Raises
    ------
    OutputError
        If the folder holds the checkpoint of a run with other settings, or a damaged one.
    """

    def __init__(
        self, folder: str | Path, settings: dict[str, Any], period: float | None = None
    ) -> None:
        self.folder, self.period = Path(folder) / _NAME, PERIOD if period is None else period
        self._settings = json.loads(json_text(_FORMAT | settings))
        self._next = time.monotonic() + self.period
        path = self.folder / _SETTINGS
        if not self.folder.exists():
            return
        if not _is_checkpoint(self.folder):
            raise OutputError(
                f"{self.folder} is no checkpoint that can be read: move it away, or choose another "
                "folder with --out"
            )
        found = read_json(path, _MOST_SETTINGS, OutputError)
        if found.keys() != self._settings.keys():
            raise self._damaged(path, "it has other settings than a search has")
        differing = [k for k, v in self._settings.items() if found[k] != v]
        if differing:
            name = differing[0]
            raise OutputError(
                f"{self.folder} is of a run with {name} {found[name]!r}, this one has "
                f"{self._settings[name]!r}: delete it, or choose another folder with --out"
            )

    @staticmethod
    def is_all_of(folder: Path) -> bool:
        """Whether a folder holds nothing, or a checkpoint and nothing else."""
        names = [path.name for path in folder.iterdir()]
        return not names or (names == [_NAME] and _is_checkpoint(folder / _NAME))

    @staticmethod
    def settle(folder: Path) -> None:
        """Finish or remove a checkpoint that a killed command began in the folder of its run."""
        settle(folder / _NAME)

    @staticmethod
    def remove(folder: Path) -> None:
        """Delete what a finished run left behind in its folder while it worked.

        Files that are not written here stay, and so does the folder that holds them.
        """
        checkpoint = folder / _NAME
        if not _is_checkpoint(checkpoint):
            return
        remove_leftovers(checkpoint)
        own = [p for p in checkpoint.iterdir() if _FILES.fullmatch(p.name) and p.is_file()]
        for path in sorted(own, key=lambda path: path.name == _SETTINGS):  # what says so last
            path.unlink()
        with suppress(OSError):  # it holds something else
            checkpoint.rmdir()

    def load(self, graph: Graph, threshold: float) -> Decided:
        """Return what was decided at a threshold; nothing yet where it was not tried."""
        path = self._file(threshold)
        if not path.exists():
            return Decided.nothing(graph)
        try:
            with ZipFile(io.BytesIO(read_bytes(path, _MOST_DECIDED, OutputError))) as archive:
                decided = Decided(
                    _array(archive, "in_circuit", "?", (graph.n_edges,)),
                    _array(archive, "scores", "<f8", (graph.n_edges,)),
                    int(_array(archive, "n_finished", "<i8", ())),
                    json.loads(str(_array(archive, "work", None, ()))),
                    float(_array(archive, "rounding", "<f8", ())),
                    int(_array(archive, "crc", "<i8", ())),
                )
            decided.check(graph)
        except (ValueError, KeyError, EOFError, RecursionError, NotImplementedError) as error:
            raise self._damaged(path, error) from error
        except (BadZipFile, zlib.error, RuntimeError) as error:
            raise self._damaged(path, error) from error
        return decided

    @property
    def due(self) -> bool:
        """Whether the last write is a period ago."""
        return time.monotonic() >= self._next

    def save(
        self, threshold: float, decided: Decided, state: Iterable[NDArray[np.generic]] = ()
    ) -> None:
        """Write what is decided and where the search stands.

        The state is a file of its own under a name of its own, and the decisions name it by its
        checksum: there is a whole pair of them whenever the process is killed.
        """
        start = time.monotonic()
        self._prepare()
        path, decided.crc = self._state_file(threshold, decided), 0

        def content() -> Iterator[memoryview]:
            for array in state:
                decided.crc = zlib.crc32(array.data, decided.crc)
                yield array.data

        write_whole(path, content())
        file = io.BytesIO()
        arrays = asdict(decided) | {"work": np.array(json_text(decided.work))}
        np.savez_compressed(file, **arrays)
        write_whole(self._file(threshold), file.getvalue())
        for old in self.folder.glob(f"state-{threshold!r}-*.bin"):
            if old != path:
                old.unlink()
        end = time.monotonic()
        self._next = end + self.period * max(1.0, (end - start) / _LONG)

    @contextmanager
    def state(self, threshold: float, decided: Decided) -> Iterator[Read]:
        """Read the arrays of the state that was saved with what is decided, in their order.

        Raises
        ------
        OutputError
            If it is not there, damaged, or of another search.
        """
        path, crc = self._state_file(threshold, decided), 0
        check_regular(path, sys.maxsize, OutputError)

        def read(kind: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
            nonlocal crc
            dtype = np.dtype(kind)
            content = bytearray(file.read(dtype.itemsize * math.prod(shape)))
            crc = zlib.crc32(content, crc)
            if len(content) < dtype.itemsize * math.prod(shape):
                raise StateError("it ends too early")
            return np.frombuffer(content, dtype).reshape(shape)

        try:
            with open(path, "rb") as file:
                yield read
                if file.read(1) or crc != decided.crc:
                    raise StateError("it is damaged, or of another search")
        except (OSError, StateError) as error:
            raise self._damaged(path, error) from error

    def keep(self, name: str, content: bytes) -> None:
        """Write a file at once: what took long and is needed to go on."""
        self._prepare()
        write_whole(self.folder / name, content)

    def kept(self, name: str) -> Path | None:
        """Return the path of a file that was kept, None if there is none."""
        path = self.folder / name
        return path if path.is_file() else None

    def _prepare(self) -> None:
        if self.folder.exists():
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with new_files(self.folder) as new:  # there is no checkpoint without settings
            write_whole(new / _SETTINGS, json.dumps(self._settings, indent=1) + "\n")

    def _file(self, threshold: float) -> Path:
        return self.folder / f"acdc-{threshold!r}.npz"

    def _state_file(self, threshold: float, decided: Decided) -> Path:
        return self.folder / f"state-{threshold!r}-{decided.n_finished}.bin"

    def _damaged(self, path: Path, why: object) -> OutputError:
        return OutputError(f"{path} cannot be read ({why}): delete {self.folder} to start anew")


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder was written here: its settings say so."""
    try:
        found = read_json(folder / _SETTINGS, _MOST_SETTINGS, OutputError)
    except OutputError:
        return False
    return isinstance(found, dict) and _FORMAT.items() <= found.items()


def _array(archive: ZipFile, name: str, kind: str | None, shape: tuple[int, ...]) -> NDArray[Any]:
    """Read an array of a ``.npz`` file, its type and shape known before there is room made for it.

    ``kind`` is None for a text.
    """
    with archive.open(f"{name}.npy") as file:
        if npy.read_magic(file) != (1, 0):
            raise ValueError(f"{name} is of another version")
        found, in_columns, dtype = npy.read_array_header_1_0(file)
        fits = dtype == np.dtype(kind) if kind else dtype.kind == "U"
        if found != shape or in_columns or not fits or dtype.itemsize > 4 * _MOST_WORK:
            raise ValueError(f"{name} is of shape {found} and type {dtype}")
        size = dtype.itemsize * math.prod(shape)
        content = file.read(size + 1)
    if len(content) != size:
        raise ValueError(f"{name} has not the size that it says")
    return np.frombuffer(content, dtype).reshape(shape).copy()
