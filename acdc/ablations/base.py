"""What an ablation is, and the table of them: one that needs code is a function in a file.

::

    @ablation("mean", "mean of what a sender writes over all tokens of the prompts", averages=True)
    def mean(experiment):
        return mean_constants(experiment, ablated_prompts(experiment))

A function in another package does the same and is offered under the entry point
``acdc.ablations``.  The command line, ``acdc list``, evaluation under all ablations and the checks
of files know an ablation from here alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from acdc.registry import Registry

__all__ = ["ABLATIONS", "OTHER_RUN", "ZERO", "Ablation", "ablation"]

OTHER_RUN: Literal["other run"] = "other run"
"""An ablated edge carries the value of the run that the search does not start from."""
ZERO: Literal["zero"] = "zero"
"""An ablated edge carries nothing."""

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Ablation:
    """What an edge outside the circuit carries.

    Parameters
    ----------
    name, description
        As listed on the command line.
    carries
        :data:`OTHER_RUN`, :data:`ZERO`, or a function from an
        :class:`acdc.engine.experiment.Experiment` to the
        :class:`acdc.engine.constants.Constants` that its senders are replaced by.
    averages
        Whether the constants are means, which ``mean_over`` may be asked for.
    positional
        Whether they are by position and prompt length: a length may be missing.
    trained
        Whether they are trained, in ``experiment.training_steps`` steps; the function then takes
        ``work``, too.
    """

    name: str
    description: str
    carries: Literal["other run", "zero"] | Callable[..., Any]
    averages: bool = False
    positional: bool = False
    trained: bool = False

    @property
    def constant(self) -> bool:
        """Whether ablated edges carry constants."""
        return callable(self.carries)


_NO_CODE = (
    Ablation("resample", "the value of the other run (noising: the corrupt one)", OTHER_RUN),
    Ablation("zero", "zero", ZERO),
)

ABLATIONS: Registry[Ablation] = Registry(
    "ablation",
    Ablation,
    "acdc.ablations",
    package="acdc.ablations",
    known={one.name: one for one in _NO_CODE},
)
"""Every ablation by name."""


def ablation(name: str, description: str, **says: bool) -> Callable[[Function], Function]:
    """Register a function from an experiment to constants as an ablation.

    Parameters
    ----------
    name, description, **says
        As of :class:`Ablation`.

    Returns
    -------
    callable
        What takes the function and gives it back as it is.
    """

    def register(function: Function) -> Function:
        made = Ablation(name, description, function, **says)
        ABLATIONS.add(made)
        function.registered = made  # type: ignore[attr-defined]  # for entry points
        return function

    return register
