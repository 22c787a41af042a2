"""Several methods' scores in one: what methods agree on, ranks first.

Mondorf et al. 2025, "BlackboxNLP-2025 MIB shared task: exploring ensemble strategies for circuit
localization methods", arXiv 2510.06811: in parallel the scores of several methods are combined
(their mean did best), in sequence those of one method start the training of another's masks (here
``--warm-start`` of ``edge-pruning``); the trained one may be a member, too.  How scores are brought
to one scale is ours:

=========  ==============================================================================
``mean``   each member's scores over their root mean square
``ranks``  each member's scores by rank of their size, 0 to 1, with their sign
=========  ==============================================================================

A member without signs (trained masks, ``ifr``, ``hisp``) adds to the size of a score and leaves it
the sign that the others give it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from acdc.engine.experiment import Experiment
from acdc.engine.work import Work
from acdc.errors import OptionError
from acdc.methods.base import METHODS, Method, Score, method
from acdc.settings import Checked, option, options_of

__all__ = ["COMBINATIONS", "Options", "combine", "ensemble"]

Scores = NDArray[np.float64]

NAME = "ensemble"
COMBINATIONS = ("mean", "ranks")
"""How members' scores are brought to one scale before their mean is taken."""


@dataclass(frozen=True)
class Options(Checked):
    """What ``ensemble`` is asked for.

    Parameters
    ----------
    of
        Names of at least two methods over edges or nodes, separated by commas; each has its own
        default options.  Those of the default see something under every metric; ``eap``, ``gim``
        and ``relp`` do not under kl and mse, which are flat at the clean run.
    combine
        One of :data:`COMBINATIONS`.
    seed
        Of members that are trained.
    """

    of: str = option(
        "eap-ig,eap-ig-activations,clean-corrupted", "Methods that are combined, with commas."
    )
    combine: str = option("mean", "Of scores over their size, or of ranks.", choices=COMBINATIONS)
    seed: int = option(0, shared=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.of.split(",")
        if len(names) < 2 or len(set(names)) < len(names):
            raise OptionError(f"of {self.of!r}: expected at least two methods, each once")
        for one in self.members:
            if one.over == "circuit" or one.name == NAME:
                why = "is the ensemble itself" if one.name == NAME else "has no scores to combine"
                raise OptionError(f"of {self.of!r}: {one.name!r} {why}; leave it out")
        if all(one.score is Score.MAGNITUDE for one in self.members):
            raise OptionError(
                f"of {self.of!r}: none of these has scores with a sign; add one that has, as eap-ig"
            )

    @property
    def members(self) -> list[Method]:
        """The methods; UnknownNameError if there is none of a name."""
        return [METHODS[name] for name in self.of.split(",")]

    def asked(self, member: Method) -> Checked:
        """Return the options of a member: its defaults, and the seed where it takes one."""
        takes = {name for name, _, _ in options_of(member.options)}
        return member.options(**({"seed": self.seed} if "seed" in takes else {}))


def _passes(experiment: Experiment, options: Options) -> int:
    return sum(one.passes(experiment, options.asked(one)) for one in options.members)


@method(
    NAME,
    "mean of the scores, or of the ranks, of several methods: --of (Mondorf et al. 2025)",
    Options,
    passes=_passes,
)
def ensemble(
    experiment: Experiment, options: Options | None = None, work: Work | None = None
) -> Scores:
    """Combine the scores of several methods.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    options
        Which methods, and how they are combined.
    work
        Memory; told of what the members tell of.

    Returns
    -------
    ndarray
        ``[edge]``, to rank by: with the sign of a change of the metric, and no unit.

    Raises
    ------
    OptionError
        If a member has no score but 0.
    """
    options, work = options or Options(), work or Work()
    found = []
    for one in options.members:
        scores = one.scores(experiment, options.asked(one), work)
        if not scores.any():
            raise OptionError(
                f"ensemble: {one.name} gives every edge score 0 under metric "
                f"{experiment.metric.name!r}; leave it out or choose another metric"
            )
        found.append((scores, one.score is not Score.MAGNITUDE))
    return combine([s for s, _ in found], [has for _, has in found], options.combine)


def combine(scores: list[Scores], signed: list[bool], how: str = "mean") -> Scores:
    """Mean of scores on one scale.

    Parameters
    ----------
    scores
        ``[edge]`` of each member; not all 0.
    signed
        Whether each member's scores have signs.
    how
        One of :data:`COMBINATIONS`.

    Returns
    -------
    ndarray
        ``[edge]``.

    Examples
    --------
    >>> combine([np.array([4.0, -3.0, 0.0]), np.array([0.2, -0.1, 0.0])], [True, True], "ranks")
    array([ 1.        , -0.66666667,  0.        ])
    """
    scaled = [_SCALES[how](one) for one in scores]
    total = sum((one for one, has in zip(scaled, signed, strict=True) if has), np.zeros(()))
    sizes = sum((one for one, has in zip(scaled, signed, strict=True) if not has), np.zeros(()))
    return np.asarray((total + np.sign(total) * sizes) / len(scores))


def _by_size(scores: Scores) -> Scores:
    return scores / np.sqrt(np.mean(scores**2))


def _by_rank(scores: Scores) -> Scores:
    return np.sign(scores) * rankdata(np.abs(scores)) / len(scores)


_SCALES = {"mean": _by_size, "ranks": _by_rank}
