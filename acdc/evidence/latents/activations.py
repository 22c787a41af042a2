"""Activations of latents on every token of a task's prompts.

A *place* says where in a prompt a token stands, without knowing the task's template: the runs of
tokens in which the clean and the corrupt prompt of a pair differ are its *slots*, counted from 1.
Any other token is ``scored``, ``before slot 1`` or ``after slot n``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from acdc.dictionaries.activations import activation
from acdc.dictionaries.attachment import Attachment
from acdc.dictionaries.experts import ExpertAttachment
from acdc.engine.experiment import Experiment
from graphs.spans import split_span

__all__ = ["Activations", "Prompt", "latent_sites", "places", "record"]


@dataclass(frozen=True)
class Prompt:
    """One prompt of a pair.

    Parameters
    ----------
    run
        ``clean`` or ``corrupt``.
    tokens
        Token ids.
    places
        Where each of them stands.
    """

    run: str
    tokens: tuple[int, ...]
    places: tuple[str, ...]


def places(clean: Sequence[int], corrupt: Sequence[int], scored: Sequence[int]) -> tuple[str, ...]:
    """Return the place of each token of a pair's two prompts.

    Examples
    --------
    >>> places([5, 6, 7, 8, 9], [5, 1, 2, 8, 9], [4])
    ('before slot 1', 'slot 1', 'slot 1', 'after slot 1', 'scored')
    """
    found, slots, inside = [], 0, False
    for position, (ours, other) in enumerate(zip(clean, corrupt, strict=True)):
        slots += int(ours != other and not inside)
        inside = ours != other
        if inside:
            found.append(f"slot {slots}")
        elif position in scored:
            found.append("scored")
        else:
            found.append(f"after slot {slots}" if slots else "before slot 1")
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Activations:
    """What latents are on the tokens of a task.

    Parameters
    ----------
    nodes
        Names of the latents; one with a span is the latent on the tokens of that span.
    prompts
        All of the task, clean and corrupt.
    values
        Sparse ``[token, latent]``; the tokens of all prompts one after another.
    """

    nodes: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    values: Any

    @cached_property
    def start(self) -> NDArray[np.int64]:
        """``[prompt + 1]``: tokens of prompt ``p`` are ``start[p]:start[p + 1]``."""
        return np.cumsum([0, *(len(prompt.tokens) for prompt in self.prompts)])

    @cached_property
    def token_ids(self) -> NDArray[np.int64]:
        """``[token]``: vocabulary ids."""
        return np.concatenate([prompt.tokens for prompt in self.prompts]).astype(np.int64)

    @cached_property
    def token_prompt(self) -> NDArray[np.int64]:
        """``[token]``: which prompt it is of."""
        return np.repeat(np.arange(len(self.prompts)), np.diff(self.start))

    @cached_property
    def token_places(self) -> NDArray[np.str_]:
        """``[token]``: where it stands."""
        return np.concatenate([prompt.places for prompt in self.prompts])

    @cached_property
    def by_latent(self) -> Any:
        """The values, quick to read by latent."""
        return self.values.tocsc()

    def of_latent(self, latent: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the tokens on which a latent is active, and its values there."""
        columns = self.by_latent
        part = slice(columns.indptr[latent], columns.indptr[latent + 1])
        return columns.indices[part].astype(np.int64), columns.data[part].astype(np.float64)


def latent_sites(
    experiment: Experiment, nodes: Sequence[str]
) -> list[tuple[Attachment, list[str]]]:
    """Return the attachments narrowed to some latents, each with their names in order.

    Names are without spans, also where those of ``nodes`` have some.
    """
    wanted, found = {split_span(node)[0] for node in nodes}, []
    for attachment in experiment.attachments:
        if isinstance(attachment, ExpertAttachment):  # which write vectors, and have no activation
            continue
        names = zip(attachment.latents, attachment.site.nodes, strict=False)  # the error node last
        some = {i: name for i, name in names if name in wanted}
        if some:
            found.append((attachment.keeping(list(some)), list(some.values())))
    return found


@torch.no_grad()
def record(experiment: Experiment, nodes: Sequence[str]) -> Activations:
    """Run the clean and the corrupt prompts and note the activations of some latents.

    Parameters
    ----------
    experiment
        With dictionaries.
    nodes
        Names of latents that are nodes.
    """
    model, sites = experiment.model, latent_sites(experiment, nodes)
    prompts: list[Prompt] = []
    parts: list[Any] = []
    spans: list[int] = []
    for batch in experiment.batches:
        clean, corrupt = batch.clean.tolist(), batch.corrupt.tolist()
        scored = batch.scored.tolist()
        at = [places(c, o, scored) for c, o in zip(clean, corrupt, strict=True)]
        for run, rows, tokens in (
            ("clean", clean, batch.clean),
            ("corrupt", corrupt, batch.corrupt),
        ):
            prompts += [Prompt(run, tuple(row), p) for row, p in zip(rows, at, strict=True)]
            spans += batch.spans * len(rows)
            trace = model.forward(tokens)
            parts.append(
                [_sparse(a, activation(model, trace, a.dictionary.reads)) for a, _ in sites]
            )
    recorded = [name for _, names in sites for name in names]
    values = sparse.vstack([sparse.hstack(row) for row in parts]).tocsc()
    order = {name: column for column, name in enumerate(recorded)}
    found = values[:, [order[split_span(node)[0]] for node in nodes]]
    if experiment.positions is not None:
        found = _in_spans(found, spans, nodes, experiment.positions.spans)
    return Activations(tuple(nodes), tuple(prompts), found)


def _in_spans(values: Any, spans: Sequence[int], nodes: Sequence[str], names: Sequence[str]) -> Any:
    """``values [token, node]`` where a node's span has the token; sparse."""
    own = np.array([names.index(split_span(node)[1]) for node in nodes])
    entries = values.tocoo()
    inside = np.array(spans)[entries.row] == own[entries.col]
    kept = entries.data[inside], (entries.row[inside], entries.col[inside])
    return sparse.csc_matrix(kept, shape=values.shape)


def _sparse(attachment: Attachment, x: torch.Tensor) -> Any:
    """``[token, latent]`` of what a dictionary reads, ``x [batch, pos, d_in]``."""
    dense = attachment.coefficients(x).flatten(0, 1).float().cpu().numpy()
    return sparse.csr_matrix(dense)
