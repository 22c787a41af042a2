"""What each step of a training sees, and in which parts.

Both follow from model and prompts alone, unless the memory is less than :data:`ROOM`.  A step is
no more than rounding away from one whose prompts are run in other parts, but hundreds of steps make
more of it: a circuit would depend on ``--batch-size`` and ``--memory``, which are to say only what
fits.
"""

from __future__ import annotations

from dataclasses import replace

from acdc.engine.experiment import Experiment

__all__ = ["MOST_TOGETHER", "ROOM", "in_steps", "prompts_of_part"]

MOST_TOGETHER = 32
"""Prompts that a step of a training of masks sees, a power of two."""
ROOM = 512 << 20
"""Bytes that prompts take which are run together, where the memory is not smaller."""


def prompts_of_part(n_prompts: int, each: int, memory: int) -> int:
    """Return how many prompts are run together, of at most so many, a power of two.

    Parameters
    ----------
    n_prompts
        A power of two.
    each, memory
        Bytes that a prompt takes, and that may be taken.
    """
    return 1 << min(n_prompts, max(1, min(ROOM, memory) // each)).bit_length() - 1


def in_steps(
    experiment: Experiment, n_prompts: int, each: int, memory: int
) -> tuple[Experiment, tuple[tuple[int, ...], ...]]:
    """Divide the pairs of an experiment into steps, and these into parts.

    Parameters
    ----------
    experiment
        Its batch size plays no role.
    n_prompts
        Pairs of a step, a power of two; a step has fewer where there are no more of one kind.
    each
        Bytes that a pair takes.  Parts of ``n_prompts``, of half as many, ... are as large as
        :data:`ROOM` holds.
    memory
        Bytes that may be taken: with less than :data:`ROOM` parts are smaller.

    Returns
    -------
    tuple
        The experiment whose batches are the parts, and of each step the indices of its parts.
    """
    parts = replace(experiment, batch_size=prompts_of_part(n_prompts, each, memory))
    steps: list[list[int]] = []
    kind, n = None, 0
    for i, batch in enumerate(parts.batches):
        known, kind = kind, (batch.clean.shape[1], batch.scored.tolist(), batch.spans)
        if kind != known or n == n_prompts:
            steps.append([])
            n = 0
        steps[-1].append(i)
        n += batch.n_prompts
    return parts, tuple(map(tuple, steps))
