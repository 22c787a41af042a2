"""A run: what was asked, what was found, how good it is; and the folder that holds it.

``run.json`` (MUST keys: method, metric, model, task, n_edges_total, n_edges_kept, metric_full,
metric_empty, metric_circuit, faithfulness, timings, seed, device, prepend_bos, versions; MAY
hold more), ``circuit.json`` (every edge with score and in_graph), ``circuit.dot``,
``circuit.svg`` and ``circuit.png``.  Every file is written whole or not at all.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from acdc.ablations import ABLATIONS
from acdc.engine.checkpoint import Checkpoint
from acdc.engine.constants import FILE_NAME, Constants, load_constants
from acdc.engine.processes import here
from acdc.errors import CircuitFileError, OutputError
from acdc.files.objects import JsonObject
from acdc.measure.evaluation import Evaluation
from acdc.runs.claim import Claim
from acdc.settings import Settings
from acdc.terminal.shown import Shown
from graphs import Circuit
from graphs.files.beside import new_files, settle
from graphs.files.formats import load_circuit, save_circuit
from graphs.files.whole import MIB, json_text, read_json, write_json, write_whole
from graphs.pictures.draw import render, to_dot
from graphs.text import said, short

__all__ = [
    "EVALUATION",
    "Run",
    "Timer",
    "check_output",
    "check_single",
    "finish_killed",
    "load_run",
    "read_run",
    "run_constants",
    "run_json",
    "same_constants",
    "save_summary",
    "versions",
    "write_folder",
    "write_output",
]

EVALUATION = "evaluation.json"
"""What ``acdc evaluate`` found of a run, in its folder."""

_MOST_SUMMARY = 64 * MIB
_SAME_CONSTANTS = ("model", "saes", "mean_over")
_PACKAGES = ("acdc-circuits", "torch", "transformer_lens", "transformers", "numba", "numpy")


class Timer:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + took


@dataclass(frozen=True, eq=False)
class Run(Shown):
    """A finished search.

    Parameters
    ----------
    settings
        What was asked, with the model filled in.
    circuit
        Every edge with its score.
    claim
        How faithful the circuit is, on prompts of the search and on others.
    timings
        Seconds of ``load``, ``discover``, ``evaluate`` and ``render``.
    details
        More for run.json: prompts, counts of evaluations, the threshold that was used.
    constants
        What ablated edges carried, where that is constants; written as ``constants.safetensors``,
        so that an evaluation uses the very ones.
    versions
        Of Python and of the packages that decide a result.
    """

    settings: Settings
    circuit: Circuit
    claim: Claim
    timings: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    constants: Constants | None = None
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def __repr__(self) -> str:
        s, circuit = self.settings, self.circuit
        return short(
            f"<Run: {s.method} on {s.task} in {s.model}, {circuit.n_edges:,} of "
            f"{circuit.graph.n_edges:,} edges, faithfulness {said(self.faithfulness)}>"
        )

    @property
    def faithfulness(self) -> float | None:
        """Share of the metric's gap that the circuit recovers on unseen prompts.

        None where nothing can be claimed, see :class:`acdc.runs.claim.Claim`.
        """
        return self.claim.faithfulness

    @property
    def evaluation(self) -> Evaluation:
        """Metric of the full model, the empty and the found circuit on the search's prompts."""
        return self.claim.seen

    def summary(self) -> dict[str, Any]:
        """Content of ``run.json``."""
        return {
            **self.settings.plain(),
            "n_edges_total": self.circuit.graph.n_edges,
            "n_edges_kept": self.circuit.n_edges,
            **self.details,
            **self.claim.as_dict(),
            "timings": self.timings,
            "versions": self.versions,
        }

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the run's folder, all of its files or none; pictures take the time ``render``.

        Raises
        ------
        OutputError
            If the folder exists and is not empty, unless ``overwrite``, or cannot be written.
        CircuitFileError
            If a score is no finite number.
        """
        return write_folder(folder, self.fill, overwrite=overwrite, then=self.tidy)

    def tidy(self, folder: Path) -> None:
        """Remove from a folder what is no longer of use once this run is in it."""
        if self.constants is None:  # those of a run that was overwritten are not this one's
            (folder / FILE_NAME).unlink(missing_ok=True)
        Checkpoint.remove(folder)

    def fill(self, folder: Path) -> None:
        """Write all files into an empty folder."""
        save_circuit(self.circuit, folder / "circuit.json")
        if self.constants is not None:
            write_whole(folder / FILE_NAME, self.constants.as_bytes())
        timer = Timer()
        with timer.phase("render"):
            dot = to_dot(self.circuit)
            write_whole(folder / "circuit.dot", dot)
            for kind in ("svg", "png"):
                render(dot, folder / f"circuit.{kind}")
        self.timings.update(timer.seconds)
        write_json(folder / "run.json", self.summary())


def save_summary(
    path: str | Path, name: str, summary: dict[str, Any], *, overwrite: bool = False
) -> Path:
    """Write plain values as a JSON file, whole or not at all.

    Parameters
    ----------
    path
        A file that ends in ``.json``, or a folder.
    name
        Of the file in that folder.
    summary
        What to write.
    overwrite
        Whether a file that exists is replaced.

    Raises
    ------
    OutputError
        If the file exists, unless ``overwrite``, or cannot be written.
    """
    path = Path(path)
    file = path if path.suffix == ".json" else path / name
    return write_output(file, json_text(summary), overwrite=overwrite)


def write_output(file: Path, text: str, *, overwrite: bool = False) -> Path:
    """Write a file whole or not at all; OutputError if it exists or cannot be written.

    Of several processes the first one writes, and no other; so do all functions here.
    """
    if not here().is_first:
        return file
    if file.exists() and not overwrite:
        raise OutputError(f"{str(file)!r} exists: choose another, or pass overwrite")
    try:
        if not file.parent.is_dir():
            file.parent.mkdir(parents=True)
        write_whole(file, text)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror or error}") from error
    return file


def write_folder(
    folder: str | Path,
    write: Callable[[Path], None],
    *,
    overwrite: bool,
    then: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Let ``write`` fill a folder beside the wanted one, then move its files in.

    So all files appear or none; files of other names in the wanted folder stay, see
    :func:`graphs.files.beside.new_files`.  ``then`` is told the folder once they are there.
    Errors as :meth:`Run.save`.
    """
    folder = check_output(folder, overwrite=overwrite)
    if not here().is_first:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_files(folder, then=lambda: then(folder)) as new:
            write(new)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    return {"python": platform.python_version(), **{p: version(p) for p in _PACKAGES}}


def finish_killed(folder: Path, runs: Sequence[str] = ("",)) -> None:
    """Remove what killed commands left beside an output; finish what was all written.

    Parameters
    ----------
    folder
        The output.
    runs
        Folders of runs in it, with checkpoints that are then done with.
    """
    finished = settle(folder)
    for run in runs:
        Checkpoint.settle(folder / run)
        if finished:
            Checkpoint.remove(folder / run)


def check_output(folder: str | Path, *, overwrite: bool) -> Path:
    """Return the folder as a path if it may be written, killed commands having been tidied up.

    Raises
    ------
    OutputError
        If it is a file or below one, may not be written, or is a folder with more in it than
        the checkpoint of a killed run (unless ``overwrite``).
    """
    path = Path(folder)
    if not here().is_first:
        return path
    finish_killed(path)
    try:
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not there.is_dir():
            raise OutputError(f"output {str(path)!r}: {str(there)!r} is a file, give a folder")
        if not os.access(there, os.W_OK):
            raise OutputError(f"output {str(path)!r}: {str(there)!r} may not be written")
        if path.is_dir() and not (overwrite or Checkpoint.is_all_of(path)):
            raise OutputError(
                f"output folder {str(path)!r} exists and is not empty: "
                "choose another with --out or pass --overwrite"
            )
    except OSError as error:  # a name too long, a folder that may not be listed
        raise OutputError(f"output {str(path)!r}: {error.strerror or error}") from error
    return path


def read_run(folder: str | Path) -> tuple[Settings, Circuit, dict[str, Any]]:
    """Read a run's folder: settings, circuit and the whole ``run.json``.

    Raises
    ------
    CircuitFileError
        If a file is missing or malformed.
    """
    path = Path(folder)
    summary = _read_summary(path / "run.json")
    return Settings.read(summary), load_circuit(path / "circuit.json"), summary


def run_json(folder: str | Path, summary: dict[str, Any]) -> JsonObject:
    """Return the content of a run's ``run.json`` as what says where it is malformed."""
    return JsonObject(summary, Path(folder) / "run.json", "a run.json", "acdc discover")


def load_run(folder: str | Path) -> Run:
    """Read a run's folder.

    Raises
    ------
    CircuitFileError
        If a file is missing or malformed.

    Examples
    --------
    >>> import acdc
    >>> acdc.load_run("runs/my-ioi").faithfulness  # doctest: +SKIP
    """
    settings, circuit, summary = read_run(folder)
    item = run_json(folder, summary)
    found = Claim.read(item)
    known = {*settings.plain(), "given", "trust_remote_code", "n_edges_total", "n_edges_kept"}
    known |= {"timings", "versions", *found.as_dict()}
    return Run(
        settings,
        circuit,
        found,
        {name: item.at("timings").number(name) for name in item.at("timings").content},
        {"n_prompts": settings.n_prompts}
        | {name: value for name, value in summary.items() if name not in known},
        run_constants(folder, settings),
        {name: item.at("versions").text(name) for name in item.at("versions").content},
    )


def run_constants(folder: str | Path, settings: Settings) -> Constants | None:
    """Return the constants of a run's folder, for a measurement with some settings.

    None where the run has none, or the settings ask for another model, for other dictionaries or
    for means over other prompts.

    Raises
    ------
    CircuitFileError
        If a file is missing or malformed.
    """
    path = Path(folder)
    if not (path / FILE_NAME).is_file():
        return None
    own = Settings.read(_read_summary(path / "run.json"))
    if not ABLATIONS[own.intervention].constant:
        return None  # of an older run, which was overwritten by a killed one
    return load_constants(path / FILE_NAME) if same_constants(own, settings) else None


def same_constants(one: Settings, other: Settings) -> bool:
    """Whether constants that were computed under some settings are those of others, too."""
    return all(getattr(one, name) == getattr(other, name) for name in _SAME_CONSTANTS)


def check_single(folder: Path) -> None:
    """Raise CircuitFileError if a folder holds the runs of both directions."""
    if (folder / "directions.json").is_file():
        raise CircuitFileError(
            f"{folder} holds runs in both directions; give {folder / 'noising'} or "
            f"{folder / 'denoising'}"
        )


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.exists():
        check_single(path.parent)
        raise CircuitFileError(f"{path}: no such file; give the folder of a run")
    summary = read_json(path, _MOST_SUMMARY, CircuitFileError)
    if not isinstance(summary, dict) or "task" not in summary:
        raise CircuitFileError(f"{path} is no run.json: it has no key 'task'")
    return summary
