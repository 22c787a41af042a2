"""A circuit and what is known of how it was found, however it was given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from acdc.engine.constants import Constants
from acdc.errors import CircuitFileError, OptionError
from acdc.files.objects import JsonObject
from acdc.models.identity import Identity, read_identity
from acdc.runs.checks import check_settings
from acdc.runs.circuits import circuit_file, load_circuit
from acdc.runs.folder import Run, read_run, run_constants, same_constants
from acdc.runs.given import named, same_task
from acdc.settings import Settings
from acdc.tasks import is_task_file
from graphs import Circuit
from graphs.files.whole import json_text

__all__ = ["Opened", "RunLike", "open_run", "other_weights"]

RunLike = str | Path | Run | Circuit
"""The folder of a run, a circuit file, or either of them loaded."""


@dataclass(frozen=True, eq=False)
class Opened:
    """A circuit and what is known of how it was found.

    Parameters
    ----------
    name
        What messages begin with.
    circuit
        Itself.
    discovery
        Settings of the run that found it, ``n_prompts`` and ``n_select`` as they were; None where
        it came alone.
    summary
        Content of the run's ``run.json``; empty where it came alone.
    source
        The run or its folder; None where it came alone.
    path
        What was given, if that was a path.
    """

    name: str
    circuit: Circuit
    discovery: Settings | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    source: Run | Path | None = None
    path: Path | None = None

    @property
    def identity(self) -> Identity | None:
        """Which model it is a circuit of, as far as its run says."""
        return read_identity(JsonObject(self.summary, self.name, "a run.json", "acdc discover"))

    def settings(self, *, trust_remote_code: bool = False, **asked: Any) -> Settings:
        """Return the run's settings with those asked for on top, checked.

        Whether a model's own code may run is said by who asks, never by the run.

        Raises
        ------
        OptionError
            If a circuit that came alone has no task to be measured on, or the run needs an object
            that ``run.json`` does not hold.
        """
        chosen = named(**{name: value for name, value in asked.items() if value is not None})
        if self.discovery is None and "task" not in chosen:
            raise OptionError(f"{self.name}: say with --task what to measure it on")
        known = {} if self.discovery is None else self.discovery.given
        given = {k: v for k, v in known.items() if k not in chosen} | chosen.pop("given")
        summary = {name: value for name, value in self.summary.items() if name != "given"}
        asked_for = Settings.read({**summary, **chosen}).replace(given=given)
        if "task" in chosen and not (self.discovery and same_task(asked_for, self.discovery)):
            summary.pop("corruption", None)
            from_file = "task" in given or is_task_file(chosen["task"])
            summary["holdout"] = 0.0 if from_file else None
            if "n_prompts" not in chosen:
                summary.pop("n_prompts", None)
            summary.pop("n_select", None)
            asked_for = Settings.read({**summary, **chosen}).replace(given=given)
        return check_settings(asked_for.replace(trust_remote_code=trust_remote_code))

    def discovery_with(self, settings: Settings) -> Settings | None:
        """Return the run's own settings, with the objects that were given again."""
        if self.discovery is None:
            return None
        again = {
            name: settings.given[name]
            for name in self.discovery.given
            if name in settings.given and (name != "task" or same_task(settings, self.discovery))
        }
        return self.discovery.replace(given=self.discovery.given | again)

    def constants(self, settings: Settings) -> Constants | None:
        """Return the constants of the run for a measurement, see :func:`run_constants`."""
        if isinstance(self.source, Run):
            return self.source.constants if same_constants(self.source.settings, settings) else None
        return None if self.source is None else run_constants(self.source, settings)


def open_run(run: RunLike) -> Opened:
    """Return a circuit with what is known of how it was found.

    Raises
    ------
    CircuitFileError
        If a file is missing or malformed.
    """
    if isinstance(run, Run):
        summary = json.loads(json_text(run.summary()))
        discovery = Settings.read(summary).replace(given=run.settings.given)
        return Opened("this run", run.circuit, discovery, summary, run)
    if isinstance(run, Circuit):
        return Opened("this is a circuit alone", run)
    if not isinstance(run, str | Path):
        raise CircuitFileError(
            f"a run is given as {type(run).__name__}: expected its folder, a circuit file, a Run "
            "or a Circuit"
        )
    path = Path(run)
    if circuit_file(path) == path:
        return Opened(f"{path} is a circuit file", load_circuit(path), path=path)
    discovery, circuit, summary = read_run(path)
    return Opened(str(path), circuit, discovery, summary, path, path)


def other_weights(runs: Sequence[Opened]) -> str | None:
    """Say in half a sentence which of several circuits is known to be of another model.

    None where none is: all weights that are known are the same.
    """
    known = [(run.name, found) for run in runs if (found := run.identity) and found.weights]
    for name, identity in known[1:]:
        first, own = known[0]
        if identity.weights != own.weights:
            return (
                f"{first} is a circuit of {own.name}, {name} of {identity.name}, and their "
                "weights differ"
            )
    return None
