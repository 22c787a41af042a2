"""What computations keep in memory beside the weights, from counts alone.

The same formulas decide what is cut into chunks or kept in files, and say what a search takes
(:func:`said`, which ``acdc discover`` shows while it searches).  All are of what is held at once,
in bytes.
"""

from __future__ import annotations

from acdc.engine.experiment import Experiment
from acdc.engine.stages import Heads

__all__ = [
    "bytes_per_prompt",
    "evaluation_bytes",
    "is_streamed",
    "said",
    "state_bytes",
    "state_bytes_per_prompt",
]


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

    Senders twice (as they are, and what their ablation changes), one input by stage, what is in
    front of post-norms behind attention, and the placed queries, keys and values of all heads.
    """
    program, model = experiment.program, experiment.model
    d = model.d_model
    numbers = 2 * sum(len(block) * (1 if block.narrow else d) for block in program.blocks)
    posts = sum(layer.attention_post is not None for layer in model.layers)
    numbers += d * (len(program.stages) + posts)
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


def bytes_per_prompt(experiment: Experiment, n_pos: int) -> int:
    """What a forward and backward pass keeps for one prompt, roughly (measured on GPT-2)."""
    shape, model = experiment.model.shape, experiment.model
    stream = 40 * n_pos * model.d_model
    pattern = 4 * shape.n_heads * n_pos * n_pos
    rows = 6 * model.d_vocab_out if experiment.metric.whole_vocab else 0
    latents = 4 * n_pos * sum(len(block) for block in experiment.program.blocks if block.narrow)
    return model.W_U.element_size() * (shape.n_layers * (stream + pattern) + rows + latents)


def said(experiment: Experiment, memory: int, *, keeps_state: bool) -> str:
    """Say what a search takes beside the weights.

    Parameters
    ----------
    experiment
        Model, nodes and prompts.
    memory
        Bytes that it may take.
    keeps_state
        Whether the method keeps what every node writes, of all prompts.
    """
    passes = 0
    for batch in experiment.batches:
        each = bytes_per_prompt(experiment, batch.clean.shape[1])
        passes = max(passes, each * min(batch.n_prompts, max(1, memory // each)))
    parts = [f"passes {_size(passes)}"]
    if keeps_state:
        state = state_bytes(experiment)
        where = "streamed" if is_streamed(experiment, memory) else "in memory"
        parts.insert(0, f"state {_size(state)} {where}")
    return ", ".join(parts)


def is_streamed(experiment: Experiment, memory: int) -> bool:
    """Whether the state is too large to be kept in memory whole."""
    return state_bytes(experiment) > memory // 2


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
