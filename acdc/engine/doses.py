"""Patching with a coefficient: what the metric becomes when a difference is taken c times.

In the base run, all else intact, a node writes (or one edge carries) ::

    base + c * (ablated - base)

so c = 0 is the base run, c = 1 ablates it, c = 2 overshoots and c = -1 turns the difference round.
A node is patched in a plain run, from its own layer on (:meth:`Program.rerun`); an edge where it is
read (:class:`IncrementalRun`).  Latents of cross-layer transcoders write at several places: there
every dose is a pass of :class:`PatchedModel`, in which 1 - c is the weight of what is intact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.attribution import parts_of
from acdc.engine.batch import Batch
from acdc.engine.experiment import Experiment
from acdc.engine.incremental import IncrementalRun
from acdc.engine.patched import PatchedModel
from acdc.engine.processes import Told
from acdc.engine.program import Program
from acdc.engine.values import Values
from acdc.errors import OptionError
from acdc.models.lowering.model import Trace
from graphs.order import edge_order, receiver_order

__all__ = ["Responses", "edge_doses", "node_doses"]

Responses = tuple[NDArray[np.float64], NDArray[np.float64]]
"""``[component, coefficient]``: mean metric, and ``[component]``: its derivative at c = 0."""

Progress = Callable[[int], None]


def node_doses(
    experiment: Experiment,
    senders: Int[np.ndarray, " node"],
    coefficients: Float[np.ndarray, " coefficient"],
    memory: int = 1 << 30,
    progress: Progress = lambda n_done: None,
) -> Responses:
    """Metric for doses of single nodes, and its slope by automatic differentiation.

    Parameters
    ----------
    experiment
        Model, prompts, metric, intervention and direction.
    senders
        ``[node]``: indices in ``experiment.graph``; of a graph with spans, each at its span alone.
    coefficients
        ``[coefficient]``.
    memory
        Bytes that the activations of one pass may take, roughly.
    progress
        Called with the number of nodes times prompts done since the last call.

    Returns
    -------
    tuple
        ``[node, coefficient]``: mean metric in its own unit; ``[node]``: its derivative by the
        coefficient at 0, which is the node's score of attribution patching.
    """
    if experiment.crosses_layers:
        return _by_whole_passes(
            experiment, senders, coefficients, memory, progress, of_senders=True
        )
    graph = experiment.whole_graph
    c, tell = torch.as_tensor(coefficients).to(experiment.model.W_U), Told(progress)

    def sums(i: int) -> Tensor:
        """``[sender, coefficient and slope]``: sums over the rows of a batch."""
        total = torch.zeros(len(senders), len(c) + 1, dtype=torch.double)
        for batch, program, base, _, differences in parts_of(experiment, i, memory):
            each = batch.n_prompts * experiment.footprint.gradient(batch.clean.shape[1])
            for row, sender in zip(total, senders.tolist(), strict=True):
                node, span = int(graph.sender_component[sender]), int(graph.sender_span[sender])
                b, change = _change(program, differences, node, span, batch)
                with torch.no_grad():
                    found = [
                        _rerun(experiment, batch, program, base, b, some, change)
                        for some in c.split(max(1, memory // each))
                    ]
                with torch.enable_grad():
                    zero = c.new_zeros(1, requires_grad=True)
                    at_base = _rerun(experiment, batch, program, base, b, zero, change)
                    found += torch.autograd.grad(at_base.sum(), zero)
                row += torch.cat(found).cpu().double()
                tell(batch.n_prompts)
        return total

    found = experiment.sum_of_batches(sums, told=tell).numpy() / experiment.n_rows
    return found[:, :-1], found[:, -1]


def _change(
    program: Program, differences: Values, node: int, span: int, batch: Batch
) -> tuple[int, Tensor]:
    """Block of a node, and ``[batch, pos, d_model]``: ablated minus base of what it writes."""
    b = next(i for i, block in enumerate(program.blocks) if node < block.stop)
    block = program.blocks[b]
    which = torch.tensor([node - block.start], device=batch.clean.device)
    vector = block.some(which).vectors(differences[b][which])[0]
    inside = torch.tensor(batch.spans, device=vector.device) == span
    return b, vector.unflatten(0, batch.clean.shape) * inside[:, None]


def _rerun(
    experiment: Experiment,
    batch: Batch,
    program: Program,
    base: Trace,
    b: int,
    coefficients: Tensor,
    change: Tensor,
) -> Tensor:
    """Metric of each dose of a change of block ``b``, summed over rows: ``[coefficient]``."""
    scenarios = coefficients[:, None, None, None] * change
    stream, first = program.rerun(base, b, scenarios)
    final = program.model.forward(batch.clean, [stream], first=first).final
    assert final is not None
    return experiment.measure(final[:, :, batch.scored].flatten(1, 2), batch, program.model)


def edge_doses(
    experiment: Experiment,
    edges: Int[np.ndarray, " edge"],
    coefficients: Float[np.ndarray, " coefficient"],
    memory: int = 1 << 30,
    progress: Progress = lambda n_done: None,
) -> Responses:
    """Metric for doses of single edges, and its slope by automatic differentiation.

    Parameters
    ----------
    experiment
        As of :func:`node_doses`; every edge of its graph can be in a circuit.
    edges
        ``[edge]``: indices in its graph.
    coefficients, memory, progress
        As of :func:`node_doses`.

    Returns
    -------
    tuple
        ``[edge, coefficient]`` and ``[edge]``, as of :func:`node_doses`.

    Raises
    ------
    OptionError
        If the graph holds a part of the edges only: there the base run is no plain run.
    """
    if experiment.is_partial:
        raise OptionError(
            "doses of edges: the run's graph has too many edges to write them all out, and those "
            "left out are always ablated; ask for nodes"
        )
    if experiment.crosses_layers:
        return _by_whole_passes(experiment, edges, coefficients, memory, progress, of_senders=False)
    graph, run = experiment.graph, IncrementalRun(experiment, memory)
    values = np.full((graph.n_edges, len(coefficients)), run.metric())
    wanted = np.zeros(graph.n_edges, dtype=bool)
    wanted[edges] = True
    for receiver in receiver_order(graph):
        every = edge_order(graph, receiver)
        rest = every[wanted[every]]
        n_done = len(rest)
        rest = rest[run.can_change(rest)] if len(rest) else rest
        while len(rest):
            now = rest[: max(1, run.capacity(rest) // len(coefficients))]
            doses = np.kron(np.eye(len(now)), coefficients[:, None])
            found = run.evaluate(now, doses)[0]
            values[now] = found.reshape(len(now), len(coefficients))
            rest = rest[len(now) :]
        progress(n_done * len(experiment.task))
        run.finish(receiver, every)
    del run  # before the gradients are taken
    return values[edges], _slopes(experiment, memory, of_senders=False)[edges]


def _slopes(experiment: Experiment, memory: int, *, of_senders: bool) -> NDArray[np.float64]:
    """Derivative at c = 0 of every edge or sender, of one patched pass forward and backward."""
    graph = experiment.graph
    n = graph.n_senders if of_senders else graph.n_edges
    patched = _in_parts(experiment, memory)

    def slopes(i: int) -> Tensor:
        with torch.enable_grad():
            weights = _intact(experiment, n).requires_grad_(True)
            rows = patched.rows(i, weights, of_senders=of_senders)
            return -torch.autograd.grad(rows.sum(), weights)[0]  # the weight is 1 - c

    return patched.experiment.sum_of_batches(slopes).numpy() / experiment.n_rows


def _intact(experiment: Experiment, n: int) -> Tensor:
    """Weights of what is not ablated at all."""
    return torch.ones(n, device=experiment.model.device, dtype=experiment.model.dtype)


def _in_parts(experiment: Experiment, memory: int) -> PatchedModel:
    """Patched passes over so few prompts that a gradient fits into the memory."""
    longest = max(len(pair.clean) for pair in experiment.task.pairs)
    each = PatchedModel(experiment).bytes_per_prompt(longest)
    size = max(1, min(experiment.batch_size, memory // each))
    return PatchedModel(replace(experiment, batch_size=size), memory=0)


def _by_whole_passes(
    experiment: Experiment,
    which: Sequence[int] | NDArray[np.int64],
    coefficients: NDArray[np.float64],
    memory: int,
    progress: Progress,
    *,
    of_senders: bool,
) -> Responses:
    """Doses of some senders or edges, a patched pass for each."""
    graph, patched = experiment.graph, PatchedModel(experiment)
    n = graph.n_senders if of_senders else graph.n_edges
    values = np.zeros((len(which), len(coefficients)))
    for i, one in enumerate(which):
        for k, c in enumerate(coefficients.tolist()):
            weights = _intact(experiment, n)
            weights[int(one)] -= c
            rows = partial(patched.rows, weights=weights, of_senders=of_senders)
            with torch.no_grad():
                values[i, k] = torch.cat(experiment.by_batch(rows)).sum()
        progress(len(experiment.task))
    slopes = _slopes(experiment, memory, of_senders=of_senders)[np.asarray(which)]
    return values / experiment.n_rows, slopes
