"""An experiment: a model, its graph, prompt pairs, a metric, and what ablated edges carry.

Every method and every evaluation works on an :class:`Experiment`.  Prompts are grouped by
length (no padding enters a score) and chunked; values are means over all scored rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from acdc.ablations.base import ABLATIONS, OTHER_RUN, Ablation
from acdc.dictionaries.attachment import Attachment
from acdc.dictionaries.experts import ExpertAttachment
from acdc.engine.batch import Batch, sum_of, targets_of
from acdc.engine.constants import Constants
from acdc.engine.footprint import Footprint
from acdc.engine.metrics import Metric, at_least_float32
from acdc.engine.processes import Numbers, Told, by_chunk, here
from acdc.engine.program import Program
from acdc.engine.values import Values
from acdc.errors import ProcessError, TaskError
from acdc.models.lowering.model import LoweredModel, Trace
from acdc.settings import Direction, Norms, Router, Settings
from acdc.tasks.base import Pair, Task
from acdc.tasks.positions import Positions
from graphs import Graph, component_graph
from graphs.graph import Outline, outline

__all__ = ["Experiment"]

_FEWEST = 4
"""Prompts that are run together at least: products with fewer rows differ in the last bit."""

_LOGITS_BYTES = 24 << 20
"""Logits of the whole vocabulary are computed in parts of this size: small enough that the
allocator keeps the memory instead of asking the system for fresh pages each time."""


@dataclass(frozen=True, eq=False)
class Experiment:
    """All that a method needs to know.

    Parameters
    ----------
    model
        Lowered model.
    task
        Prompt pairs.
    metric
        What is measured.
    batch_size
        Prompts of one length that are run together.
    intervention
        What an edge outside the circuit carries: a name in :data:`acdc.ablations.ABLATIONS`.
    direction
        ``noising`` starts from the clean run and ablates; ``denoising`` starts from the
        corrupt run and restores clean values.
    in_float32
        The same experiment on the float32 model, asked where this one's dtype cannot tell;
        None trusts the dtype.
    mean_over
        Prompts that means are taken over; None: those of the run that ablated edges come from
        (noising: the corrupt ones, denoising: the clean ones).
    constants
        Constants that are known already, of an earlier run; used under the ablation that they
        are of.
    positions
        By which spans of the prompts nodes and edges are split; None: they are not.
    attachments
        Dictionaries, or neurons, with the latents that are nodes.
    norms
        ``live``: every norm is computed from what it reads.  ``frozen``: in patched runs, and
        where gradients are taken, its scale is that of the run that ablation starts from; plain
        runs, and so what ablated edges carry, are as they are.
    router
        Of mixtures of experts.  ``frozen``: in patched runs, and where gradients are taken, the
        weights of the experts are those of the run that ablation starts from.  ``free``: they are
        computed from what the router reads.
    candidates
        ``[edge]``: the only edges of the whole graph that can be in a circuit; the others are
        always ablated.  None: all can.
    places
        ``[edge]``, ascending: where there are too many edges to write them all out, places in
        :attr:`outline` of those that are: the whole graph is made of these, and all others are
        always ablated.
    training_steps
        Of constants that are trained.
    select_on
        Prompts that the size of a circuit is chosen on; None: on :attr:`task`, as its scores are.
    memory
        Bytes that passes and evaluations may take at a time, beside the weights.
    """

    model: LoweredModel
    task: Task
    metric: Metric
    batch_size: int = 32
    intervention: str = "resample"
    direction: Direction = "noising"
    in_float32: Experiment | None = None
    mean_over: Sequence[tuple[int, ...]] | None = None
    constants: Constants | None = None
    positions: Positions | None = None
    attachments: tuple[Attachment | ExpertAttachment, ...] = ()
    norms: Norms = "live"
    router: Router = "frozen"
    candidates: NDArray[np.bool_] | None = None
    places: NDArray[np.int64] | None = None
    training_steps: int = Settings.optimal_steps
    select_on: Task | None = None
    memory: int = 1 << 30

    def __repr__(self) -> str:
        how = f"{self.metric.name}, {self.direction}, {self.intervention}"
        return f"<Experiment: {self.task.name} in {self.model.name}, {how}>"

    def on(self, task: Task) -> Self:
        """Return the same experiment on other prompts."""
        exact = self.in_float32
        return replace(self, task=task, in_float32=None if exact is None else exact.on(task))

    def within(self, memory: int) -> Self:
        """Return the same experiment, of which passes and evaluations may take so many bytes."""
        exact = self.in_float32
        return replace(
            self, memory=memory, in_float32=None if exact is None else exact.within(memory)
        )

    def in_batches_of(self, n: int) -> Self:
        """Return the same experiment, of which so many prompts are run together."""
        if n == self.batch_size:
            return self
        exact = self.in_float32
        return replace(
            self, batch_size=n, in_float32=None if exact is None else exact.in_batches_of(n)
        )

    @cached_property
    def selection(self) -> Experiment:
        """The same experiment on the prompts that the size of a circuit is chosen on."""
        return self if self.select_on is None else replace(self.on(self.select_on), select_on=None)

    @cached_property
    def program(self) -> Program:
        """Stages of the model with its dictionaries, in the order of :attr:`components`."""
        return Program(self.model, self.attachments)

    def program_on(self, batch: Batch, base: Trace) -> Program:
        """Return the program of patched runs of some prompts, given their base run."""
        program = self.program
        if not self.holds_base:
            return program
        if self.norms == "frozen":
            program = program.hold(base, batch.scored)
        if self.router == "frozen" and self.model.has_experts:
            program = program.hold_routers(base)
        return program

    @cached_property
    def footprint(self) -> Footprint:
        """What computations take for each prompt."""
        return Footprint.of(self.program, whole_vocab=self.metric.whole_vocab)

    @cached_property
    def state_bytes_by_batch(self) -> tuple[int, ...]:
        """What ``acdc`` keeps of the prompts of each batch, see :meth:`Footprint.state`."""
        return tuple(x.n_prompts * self.footprint.state(x.clean.shape[1]) for x in self.batches)

    @cached_property
    def moved_bytes_by_batch(self) -> tuple[int, ...]:
        """What comes to that during a search, at most, see :meth:`Footprint.moved`."""
        return tuple(x.n_prompts * self.footprint.moved(x.clean.shape[1]) for x in self.batches)

    @property
    def state_bytes(self) -> int:
        """What it keeps of all prompts."""
        return sum(self.state_bytes_by_batch)

    @property
    def holds_base(self) -> bool:
        """Whether patched runs hold something of the run that ablation starts from."""
        return self.norms == "frozen" or (self.router == "frozen" and self.model.has_experts)

    @cached_property
    def outline(self) -> Outline:
        """Every edge between heads, MLPs and latents, whatever the span, not written out."""
        return outline(replace(self.model.shape, sites=tuple(a.site for a in self.attachments)))

    @cached_property
    def components(self) -> Graph:
        """The graph of the edges of :attr:`outline`, or of those at :attr:`places`."""
        return self.outline.graph(self.places)

    @property
    def n_spans(self) -> int:
        """By how many spans the graph is split; 1 if it is not."""
        return 1 if self.positions is None else self.whole_graph.shape.n_spans

    @property
    def is_partial(self) -> bool:
        """Whether there are edges that are always ablated."""
        return self.candidates is not None or self.places is not None

    @property
    def crosses_layers(self) -> bool:
        """Whether latents of a cross-layer transcoder are nodes."""
        return any(a.site.kind == "cross_layer" for a in self.attachments)

    @cached_property
    def whole_graph(self) -> Graph:
        """The graph with every edge, split by spans where positions are told apart."""
        if self.positions is None:
            return self.components
        return component_graph(self.positions.split(self.components.shape))

    @cached_property
    def graph(self) -> Graph:
        """The graph of the edges that can be in a circuit."""
        whole = self.whole_graph
        return whole if self.candidates is None else whole.subgraph(self.candidates)

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """The task's pairs, at most ``batch_size`` each, however many processes share them.

        Those of one length go together that have the same scored positions and spans.  What a
        metric compares with is in the batches of this process alone (:meth:`by_batch`).
        """
        groups: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[Pair]] = defaultdict(list)
        for row, pair in enumerate(self.task.pairs, 1):
            self._check_answers(row, pair)
            self._check_tokens(row, pair)
            groups[len(pair.clean), pair.scored, self._spans(row, pair)].append(pair)
        parts = (
            (pairs[start : start + self.batch_size], spans)
            for (_, _, spans), pairs in sorted(groups.items())
            for start in range(0, len(pairs), self.batch_size)
        )
        return tuple(self._batch(i, pairs, spans) for i, (pairs, spans) in enumerate(parts))

    def by_batch(
        self,
        of: Callable[[int], Tensor],
        *,
        which: Sequence[int] | None = None,
        about: Iterable[bytes] = (),
        told: Told | None = None,
    ) -> list[Tensor]:
        """Compute something of every batch, each in one of the processes that share them.

        Parameters
        ----------
        of
            Index in :attr:`batches` -> a tensor; only called for batches of this process.
        which
            Indices, for some of the batches; None: all.
        about, told
            As of :func:`acdc.engine.processes.by_chunk`.

        Returns
        -------
        list
            The tensors in the order of the batches, in float64 on the CPU.
        """
        chunks = range(len(self.batches)) if which is None else which
        device = self.model.device
        found = by_chunk(chunks, _in_float64(of), device=device, about=about, told=told)
        return [x for (x,) in found]

    def sum_of_batches(
        self,
        of: Callable[[int], Tensor],
        *,
        which: Sequence[int] | None = None,
        told: Told | None = None,
    ) -> Tensor:
        """Sum of what :meth:`by_batch` computes, in the order of the batches; little is held."""
        chunks = range(len(self.batches)) if which is None else which
        device = self.model.device
        found = by_chunk(chunks, _in_float64(of), device=device, one_by_one=True, told=told)
        return sum_of(x for (x,) in found)

    @cached_property
    def edge_place(self) -> tuple[NDArray[np.int64], ...]:
        """``[edge]`` each: span, receiver and sender, the latter of :attr:`components`."""
        graph = self.graph
        return (
            graph.edge_span,
            graph.receiver_component[graph.edge_receiver],
            graph.sender_component[graph.edge_sender],
        )

    @cached_property
    def edge_component(self) -> NDArray[np.int64]:
        """``[edge]``: its place in :attr:`outline`."""
        _, receiver, sender = self.edge_place
        return self.outline.start[receiver] + sender - self.outline.low[receiver]

    @cached_property
    def n_rows(self) -> int:
        """Scored rows of all batches."""
        return sum(batch.n_rows for batch in self.batches)

    @property
    def minimised_sign(self) -> int:
        """Sign that makes the metric a quantity to be minimised by the search.

        In noising a removal makes the metric worse, in denoising (where a removal restores)
        it makes it better; ``sign * (after - before)`` is positive where the edge matters.
        """
        return self.metric.sign * (1 if self.direction == "noising" else -1)

    def _check_answers(self, row: int, pair: Pair) -> None:
        if self.metric.needs_answers and not pair.answers:
            raise TaskError(
                f"row {row}: metric {self.metric.name!r} scores answers and the pair has none; add "
                "answers or choose kl or mse"
            )
        if self.metric.needs_wrong and not pair.wrong_answers:
            raise TaskError(
                f"row {row}: metric {self.metric.name!r} compares answers with wrong answers "
                "and the pair has none; add wrong_answers or choose kl or nll"
            )

    def _check_tokens(self, row: int, pair: Pair) -> None:
        model, answers = self.model, (*pair.answers, *pair.wrong_answers)
        for ids, size in (
            ((*pair.clean, *pair.corrupt), model.d_vocab),
            (answers, model.d_vocab_out),
        ):
            if max(ids, default=-1) >= size:
                raise TaskError(
                    f"row {row}: token id {max(ids)}, but {model.name!r} has {size} "
                    "tokens; tokenize with this model's tokenizer"
                )
        if len(pair.clean) > self.model.n_ctx:
            raise TaskError(
                f"row {row}: prompt of {len(pair.clean)} tokens, but {self.model.name!r} reads at "
                f"most {self.model.n_ctx}; shorten it"
            )

    def _spans(self, row: int, pair: Pair) -> tuple[int, ...]:
        if self.positions is None:
            return (0,) * len(pair.clean)
        try:
            return tuple(self.positions.of(pair).tolist())
        except TaskError as error:
            raise TaskError(f"row {row}: {error}") from error

    def _batch(self, i: int, pairs: list[Pair], spans: tuple[int, ...]) -> Batch:
        device = self.model.device
        clean = torch.tensor([p.clean for p in pairs], device=device)
        corrupt = torch.tensor([p.corrupt for p in pairs], device=device)
        scored = torch.tensor(pairs[0].scored, device=device)
        targets = targets_of(pairs, device).repeat(len(scored))
        if self.metric.compares is not None and here().owns(i):
            logits = self.model.unembed(self.finals(clean, scored))
            targets = replace(targets, clean=self.metric.compares(at_least_float32(logits)))
        return Batch(clean, corrupt, scored, targets, spans)

    def logits(self, trace: Trace, scored: Tensor, tokens: Tensor | None) -> Tensor:
        """Logits of the scored rows of a plain run, ``[row, vocab or n]``."""
        assert trace.final is not None
        return self.model.unembed(trace.final[:, scored].flatten(0, 1), tokens)

    def measure(
        self,
        rows: Float[Tensor, "*scenario row d_model"],
        batch: Batch,
        model: LoweredModel | None = None,
    ) -> Float[Tensor, "*scenario"]:
        """Metric of final streams ``[..., row, d_model]`` (raw), summed over rows: ``[...]``."""
        return self.measure_rows(rows, batch, model).sum(-1)

    def measure_rows(self, rows: Tensor, batch: Batch, model: LoweredModel | None = None) -> Tensor:
        """Metric of final streams ``[..., row, d_model]`` (raw): ``[..., row]``.

        ``model`` is that of the program of a patched run (:meth:`program_on`); None: of plain runs.

        Raises
        ------
        ProcessError
            If the metric compares outputs and the batch is another process's.
        """
        if self.metric.compares is not None and batch.targets.clean is None:
            raise ProcessError(
                "a batch of another process is measured: what computes batch by batch asks "
                "Experiment.by_batch for it, or is started without torchrun"
            )
        model = model or self.model
        if not self.metric.whole_vocab:
            return self.metric(model.unembed(rows, batch.targets.tokens), batch.targets)
        if rows.dim() == 2:
            return self.metric(model.unembed(rows), batch.targets)
        each = rows.shape[-2] * model.d_vocab_out * rows.element_size()
        parts = rows.split(max(1, _LOGITS_BYTES // each))
        return torch.cat([self.metric(model.unembed(x), batch.targets) for x in parts])

    def runs(self, batch: Batch) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Tokens of the run that ablation starts from, and of the other run."""
        if self.direction == "noising":
            return batch.clean, batch.corrupt
        return batch.corrupt, batch.clean

    @torch.no_grad()
    def finals(
        self, tokens: Int[Tensor, "batch pos"], scored: Int[Tensor, " n"]
    ) -> Float[Tensor, "row d_model"]:
        """Final streams (raw) at scored positions of plain runs, prompts in parts that fit."""
        most = max(_FEWEST, self.memory // self.footprint.plain(tokens.shape[1]))
        n_parts = max(1, len(tokens) // most)
        parts = (self.model.forward(x).at(("final", 0)) for x in tokens.tensor_split(n_parts))
        return torch.cat([final[:, scored].flatten(0, 1) for final in parts])

    def plain(self, which: Literal["clean", "corrupt"]) -> float:
        """Mean metric of the untouched model on the clean or the corrupt prompts."""
        return float(self.plain_values(which).mean())

    @torch.no_grad()
    def plain_values(self, which: Literal["clean", "corrupt"]) -> Float[np.ndarray, " prompt"]:
        """``[prompt]``: as :meth:`plain`, see :meth:`per_prompt`."""

        def rows(i: int) -> Tensor:
            batch = self.batches[i]
            return self.measure_rows(self.finals(getattr(batch, which), batch.scored), batch)

        return self.per_prompt(self.by_batch(rows, about=[which.encode()]))

    def per_prompt(self, rows: Sequence[Tensor]) -> NDArray[np.float64]:
        """Metric of each prompt, from that of the scored rows.

        Parameters
        ----------
        rows
            By batch: ``[row]``.

        Returns
        -------
        ndarray
            ``[prompt]`` in the order of :attr:`batches`; its mean is the mean over all rows.
            Where several positions are scored, a prompt has the sum of their values over the
            mean number of positions per prompt.
        """
        sums = [
            values.cpu().double().unflatten(0, (batch.n_prompts, -1)).sum(-1)
            for values, batch in zip(rows, self.batches, strict=True)
        ]
        of_prompts: NDArray[np.float64] = torch.cat(sums).numpy()
        return of_prompts * (len(of_prompts) / self.n_rows)

    # What ablated edges carry.

    @property
    def ablation(self) -> Ablation:
        """What ablated edges carry."""
        return ABLATIONS[self.intervention]

    @cached_property
    def carried(self) -> Constants | None:
        """Constants that ablated edges carry, computed once; None where they carry none.

        Raises
        ------
        TaskError
            If means are over nothing, or by position and a length is missing.
        """
        if not callable(self.ablation.carries):
            return None
        found = self._known() or self.ablation.carries(self)
        for batch in self.batches:
            found.at(batch.clean.shape[1])  # a missing length is found before anything is run
        moved: Constants = found.to(self.model.device, self.model.dtype)
        return moved

    @property
    def has_constants(self) -> bool:
        """Whether :attr:`constants` are of this ablation."""
        known = self.constants
        return known is not None and (known.intervention, known.direction) == self._ablated

    def pinned(self) -> Experiment:
        """Return the same experiment with its constants computed: copies of it share them."""
        return self if self.carried is None else replace(self, constants=self.carried)

    def differentiated(self, model: LoweredModel) -> Experiment:
        """Return the experiment with the gradients of a model whose values are the same.

        Constants that ablated edges carry stay those of true gradients.
        """
        attachments = tuple(replace(one, model=model) for one in self.attachments)
        return replace(self.pinned(), model=model, attachments=attachments)

    @property
    def _ablated(self) -> tuple[str, Direction]:
        return self.intervention, self.direction

    def _known(self) -> Constants | None:
        """Constants of this ablation that are given, or that the float32 twin has or computes."""
        if self.has_constants:
            assert self.constants is not None
            tokens = self.batches[0].clean[:1]
            self.constants.check(self.written(tokens), f"{self.intervention} ablation")
            return self.constants
        twin = self.in_float32
        return twin.carried if twin is not None and twin._ablated == self._ablated else None

    def written(self, tokens: Int[Tensor, "batch pos"]) -> Values:
        """Values of all senders on ``tokens [batch, pos]``, by block of :attr:`program`."""
        return self.program.values(self.model.forward(tokens))

    def ablated_values(self, other: Values, base: Values) -> Values:
        """What senders write where they are ablated, given the other and the base run.

        Parameters
        ----------
        other, base
            By block of :attr:`program`.
        """
        if self.ablation.carries == OTHER_RUN:
            return other
        if self.carried is None:
            return [torch.zeros_like(x) for x in base]
        constants = self.carried.at(base[0].shape[-2])
        return [x.expand_as(y) for x, y in zip(constants, base, strict=True)]

    def far_inputs(self, other: Trace, base: Trace) -> list[Tensor]:
        """Embeddings at the far end of a path that starts at those of the base run.

        Those that ablated edges carry; under zero ablation the other run's, since where the
        whole stream is zero norms have no gradient.
        """
        if self.carried is None:
            return other.embeds
        (embeds, *_) = self.carried.at(base.embeds[0].shape[1])
        return [x[0].expand_as(y) for x, y in zip(embeds, base.embeds, strict=True)]


def _in_float64(of: Callable[[int], Tensor]) -> Callable[[int], Numbers]:
    """What is computed of a batch, in float64 on the CPU."""
    return lambda i: [of(i).detach().cpu().double()]
