"""What computations keep in memory beside the weights, from counts alone.

The same formulas decide what is cut into chunks or kept in files and say beforehand what a run will
take (``acdc discover`` prints it).  All are of what is held at once, in bytes.
"""

from __future__ import annotations

from acdc.engine.experiment import Experiment
from acdc.engine.stages import Heads

__all__ = ["evaluation_bytes", "state_bytes", "state_bytes_per_prompt"]


def state_bytes(experiment: Experiment) -> int:
    """What ``acdc`` keeps of all prompts: what every node writes and every receiver reads."""
    each: dict[int, int] = {}
    total = 0
    for batch in experiment.batches:
        n_pos = batch.clean.shape[1]
        if n_pos not in each:
            each[n_pos] = state_bytes_per_prompt(experiment, n_pos)
        total += batch.n_prompts * each[n_pos]
    return total


def state_bytes_per_prompt(experiment: Experiment, n_pos: int) -> int:
    """The same of a prompt of some length.

    Senders twice (as they are, and what their ablation changes), one input by stage and the placed
    queries, keys and values of all heads.
    """
    program, model = experiment.program, experiment.model
    d = model.d_model
    numbers = 2 * sum(len(block) * (1 if block.narrow else d) for block in program.blocks)
    numbers += d * len(program.stages)
    for stage in program.stages:
        if isinstance(stage, Heads):
            W = model.layers[stage.layer].attention.W
            numbers += sum(x.shape[0] * x.shape[2] for x in W.values())
    return numbers * n_pos * model.dtype.itemsize


def evaluation_bytes(experiment: Experiment, n_prompts: int, n_pos: int, share: float = 1.0) -> int:
    """What one circuit's evaluation keeps of a batch.

    Parameters
    ----------
    experiment
        Model and nodes.
    n_prompts, n_pos
        Of the batch.
    share
        Of the senders that are in the circuit: the others are neither computed nor kept.
    """
    program, model = experiment.program, experiment.model
    senders = sum(len(block) for block in program.blocks if not block.narrow)
    latents = sum(len(block) for block in program.blocks if block.narrow)
    numbers = (share * senders + 2 * len(program.stages) + len(program.blocks)) * model.d_model
    return int((numbers + 2 * latents) * n_prompts * n_pos * model.dtype.itemsize)
