"""The engine's errors, all of them :class:`graphs.errors.InputError`.

::

    InputError                  (graphs.errors) one clear line, exit status 2
    ├── GraphError              (graphs.errors) unknown node or edge
    │   └── ReferenceFileError      (graphs.errors) unusable file of a reference circuit
    ├── CircuitFileError        (graphs.errors) unreadable circuit file
    ├── UnknownNameError        no task/model/method/metric of that name
    ├── TaskError               a task file or prompt pair that cannot be used
    ├── ModelError              a model folder, weights file or tokenizer that cannot be used
    │   └── UnsupportedModelError   a model with a feature that the lowering does not know
    ├── DictionaryError         an SAE or transcoder that cannot be read or does not fit the model
    ├── DeviceError             a device or dtype that is not there
    ├── AbilityError            a model that does not do the task
    ├── OptionError             an option whose value makes no sense
    ├── PluginError             what another package offers and cannot be used
    ├── OutputError             an output folder that must not be overwritten
    └── ProcessError            processes of torchrun that do not go together

Every message says what was got, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable

from graphs.errors import CircuitFileError, GraphError, InputError, ReferenceFileError, did_you_mean

__all__ = [
    "AbilityError",
    "CircuitFileError",
    "DeviceError",
    "DictionaryError",
    "GraphError",
    "InputError",
    "ModelError",
    "OptionError",
    "OutputError",
    "PluginError",
    "ProcessError",
    "ReferenceFileError",
    "TaskError",
    "UnknownNameError",
    "UnsupportedModelError",
    "did_you_mean",
]


class UnknownNameError(InputError):
    """No task, model, method or metric of the given name; the message lists the nearest ones.

    ``otherwise`` is what else could be given.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], otherwise: str = "") -> None:
        near = did_you_mean(name, known)
        if otherwise:
            near = f"{near.rstrip('?')}, {otherwise}{'?' * near.endswith('?')}"
        super().__init__(f"unknown {kind} {name!r}: {near}")


class TaskError(InputError):
    """A task file or a prompt pair that cannot be used; the message names the row."""


class AbilityError(InputError):
    """A model that does not do the task, so that there is no circuit to be found."""


class ModelError(InputError):
    """A model folder, weights file or tokenizer that cannot be used."""


class UnsupportedModelError(ModelError):
    """A model with a feature that the lowering does not know; the message names the feature."""


class DictionaryError(InputError):
    """An SAE or transcoder that cannot be read or does not fit; the message names the item."""


class DeviceError(InputError):
    """A device or dtype that this machine does not have."""


class OptionError(InputError):
    """An option whose value makes no sense."""


class OutputError(InputError):
    """An output folder that exists and is not empty, or cannot be written."""


class PluginError(InputError):
    """What an installed package offers under an entry point, and cannot be used."""


class ProcessError(InputError):
    """Processes of torchrun that do not go together: one has ended, or computes something else."""
