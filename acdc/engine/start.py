"""The run that an incremental evaluation starts from: the circuit of all candidate edges.

Where every edge is a candidate it is an ordinary pass, otherwise a patched one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from acdc.dictionaries.neurons import EVERYWHERE
from acdc.engine.experiment import Experiment
from acdc.engine.mixtures import EXPERT, ROUTER, Experts, Projection
from acdc.engine.patched import PatchedModel
from acdc.engine.program import Program
from acdc.engine.stages import Heads, LatentHeads, Stage
from acdc.engine.values import Block, Values
from acdc.models.lowering.attention import Kind
from acdc.models.lowering.norm import Norm

__all__ = ["Start"]


@dataclass(eq=False)
class Start:
    """What one batch reads and writes at the start.

    Parameters
    ----------
    experiment
        Model, prompts, what ablated edges carry, and the candidates.
    i
        Which of its batches.

    Attributes
    ----------
    program
        Stages, with the norms of this batch.
    blocks
        What is made of values.
    values, ablated
        By block: what senders write, and what ablated edges carry.
    inputs
        By receiver, ``[batch, pos, d_model]``; receivers that read the same share a tensor.
    raw
        By receiver and layer, likewise: what the receiver reads through the layer's post-norm,
        in front of it.
    placed
        By receiver and kind, ``[batch, pos, d_head]``: placed projections; and what experts and
        free routers make, see :class:`acdc.engine.units.Projections`.
    z
        By layer with a dictionary, ``[batch, pos, n_heads * d_head]``.
    """

    experiment: Experiment
    i: int
    program: Program = field(init=False)
    blocks: list[Block] = field(default_factory=list, init=False)
    values: Values = field(default_factory=list, init=False)
    ablated: Values = field(default_factory=list, init=False)
    inputs: dict[int, Tensor] = field(default_factory=dict, init=False)
    raw: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False)
    placed: dict[tuple[int, Projection], Tensor] = field(default_factory=dict, init=False)
    z: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.experiment.is_partial:
            self._run_patched()
        else:
            self._run_plain()

    @property
    def posts(self) -> dict[int, Norm]:
        """Post-norms by layer."""
        layers = enumerate(self.program.model.layers)
        return {i: x.attention_post for i, x in layers if x.attention_post is not None}

    @property
    def biases(self) -> dict[int, list[tuple[int | None, Tensor | None]]]:
        """By receiver: b_O's that it reads, with the layer of the post-norm in front of it."""
        layers = self.experiment.model.layers
        found: dict[int, list[tuple[int | None, Tensor | None]]] = {}
        for stage in self.experiment.program.stages:
            through: list[int | None] = [None] * len(stage.constants)
            own = [
                *zip(through, stage.constants, strict=True),
                *((i, i) for i in self._posts(stage)),
            ]
            biases = [(post, layers[i].attention.b_O) for post, i in own]
            found |= dict.fromkeys(range(stage.ports.start, stage.ports.stop), biases)
        return found

    def _posts(self, stage: Stage) -> list[int]:
        """Layers through whose post-norms a stage reads."""
        blocks = self.experiment.program.blocks
        return sorted({post for b in stage.seen if (post := blocks[b].post) is not None})

    def _run_plain(self) -> None:
        experiment, program = self.experiment, self.experiment.program
        batch = experiment.batches[self.i]
        tokens, others = experiment.runs(batch)
        written = program.values(experiment.model.forward(others))  # all that is kept of it
        base = experiment.model.forward(tokens)
        self.program, self.blocks = experiment.program_on(batch, base), program.blocks
        self.values = program.values(base)
        self.ablated = experiment.ablated_values(written, self.values)
        for stage in program.stages:
            for v in range(stage.ports.start, stage.ports.stop):
                self.inputs[v] = base.at(stage.stream)
                self.raw |= {(v, i): base.attention_out[i] for i in self._posts(stage)}
            if isinstance(stage, Heads):
                self._place(stage, stage.placed_in(base), base.z[stage.layer].transpose(0, 1))
            if isinstance(stage, Experts):
                self._place_experts(stage)

    def _run_patched(self) -> None:
        patched = PatchedModel(self.experiment)
        plain = patched.plain(self.i)
        self.program, self.blocks, self.ablated = plain.program, plain.program.blocks, plain.ablated
        self.values = [plain.embeds + plain.ablated[0]]
        for stage, inputs, raw, values in patched.states(self.i):
            self.values += values
            for v, row in enumerate(inputs.index, stage.ports.start):
                self.inputs[v] = inputs.distinct[row, 0]
                self.raw |= {(v, layer): x[row, 0] for layer, x in raw.items()}
            if isinstance(stage, Heads):
                placed = stage.place(inputs)
                z = stage.attend(placed)[:, 0]
                self._place(stage, {kind: x[:, 0] for kind, x in placed.items()}, z)
            if isinstance(stage, Experts):
                self._place_experts(stage)

    def _place_experts(self, stage: Experts) -> None:
        """What experts, and the router, make of what they read, where the router is free."""
        if stage.router is None:
            return
        for e, receiver in enumerate(range(stage.ports.start, stage.router)):
            self.placed[receiver, EXPERT] = stage.alone(e, self.inputs[receiver], EVERYWHERE)
        self.placed[stage.router, ROUTER] = stage.route(self.inputs[stage.router], EVERYWHERE)

    def _place(self, stage: Heads, placed: dict[Kind, Tensor], z: Tensor) -> None:
        for kind, x in placed.items():
            for port, own in zip(stage.rows[kind], x, strict=True):
                self.placed[stage.ports.start + port, kind] = own
        if isinstance(stage, LatentHeads):
            self.z[stage.layer] = z.movedim(0, -2).flatten(-2)
