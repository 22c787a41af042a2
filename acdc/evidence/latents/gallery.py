"""What there is to say of the latents of a run's circuit, as plain data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acdc.dictionaries import Dictionary
from acdc.dictionaries.attachment import Attachment
from acdc.dictionaries.quality import Quality, qualities_on_task
from acdc.engine.attribution import node_scores
from acdc.engine.experiment import Experiment
from acdc.errors import CircuitFileError, OptionError
from acdc.evidence.latents.activations import Activations, record
from acdc.evidence.latents.clusters import cluster_latents
from acdc.evidence.latents.effects import Effect, direct_effects
from acdc.methods.eap import between_inputs
from acdc.runs.opened import open_run
from acdc.runs.reopen import reopen
from acdc.settings import Settings, check_count
from acdc.tasks.texts import Texts
from graphs import Circuit
from graphs.graph import parse_node
from graphs.spans import split_span

__all__ = [
    "ClusterView",
    "End",
    "Example",
    "Gallery",
    "LatentView",
    "Share",
    "SiteView",
    "look",
    "token_shares",
]

_STEPS = 5
_SHARES, _CONTEXT = 5, 3
_NEURONPEDIA = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Share:
    """A name with a number: a part of a sum, a correlation, or logits."""

    name: str
    value: float


@dataclass(frozen=True)
class Example:
    """A prompt with a latent's activation on every token.

    Parameters
    ----------
    run
        ``clean`` or ``corrupt``.
    tokens
        Texts.
    values
        Activations.
    """

    run: str
    tokens: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class End:
    """An edge of the circuit as seen from one of its ends.

    Parameters
    ----------
    edge
        Its name.
    text
        The other end; a sender that another receiver than the node itself reads, with that.
    node
        Node (or dictionary's place) of the other end.
    score
        As in the circuit's file.
    """

    edge: str
    text: str
    node: str
    score: float


@dataclass(frozen=True)
class SiteView:
    """A dictionary of the run.

    Parameters
    ----------
    name
        What its nodes begin with.
    n_nodes, n_in_circuit
        Latents that are nodes of the graph, and of the circuit.
    quality
        On the task.
    """

    name: str
    n_nodes: int
    n_in_circuit: int
    quality: Quality


@dataclass(frozen=True)
class LatentView:
    """One latent of the circuit.

    Parameters
    ----------
    name, site
        ``m3.f12`` and ``m3``.
    score
        Estimated change of the metric when it alone is ablated (integrated gradients).
    density
        Share of the task's tokens on which it is active.
    largest
        Its largest activation.
    clean_share
        Share of its summed activation that is on clean prompts.
    examples
        Different prompts with the largest activations.
    tokens, places
        Tokens and places (:mod:`acdc.evidence.latents.activations`) with the largest shares of its
        summed activation.
    context
        Tokens whose being anywhere in a prompt correlates best, over prompts, with its summed
        activation there.
    up, down
        Direct effect on the logits at its largest activation
        (:mod:`acdc.evidence.latents.effects`).
    incoming, outgoing
        Edges of the circuit, by absolute score.  An edge into what several nodes are computed
        from (the MLP of an SAE's latents) is listed for each of them.
    link
        Its page on neuronpedia.org, where the dictionary names one.
    """

    name: str
    site: str
    score: float
    density: float
    largest: float
    clean_share: float
    examples: tuple[Example, ...]
    tokens: tuple[Share, ...]
    places: tuple[Share, ...]
    context: tuple[Share, ...]
    up: tuple[Share, ...]
    down: tuple[Share, ...]
    incoming: tuple[End, ...]
    outgoing: tuple[End, ...]
    link: str | None


@dataclass(frozen=True)
class ClusterView:
    """Latents that are active together.

    Parameters
    ----------
    latents
        Names, by absolute score.
    share
        Of the summed absolute node scores of the circuit's latents.
    together
        Mean correlation of pairs; None for a latent alone.
    n_edges
        Edges of the circuit between its latents.
    tokens, places, prompts, context
        As of a :class:`LatentView`, for the sum of the latents' activations, each in units of its
        largest one; of prompts, shares and texts.
    """

    latents: tuple[str, ...]
    share: float
    together: float | None
    n_edges: int
    tokens: tuple[Share, ...]
    places: tuple[Share, ...]
    prompts: tuple[Share, ...]
    context: tuple[Share, ...]


@dataclass(frozen=True)
class Gallery:
    """The latents of a run's circuit.

    Parameters
    ----------
    summary
        The run's ``run.json``.
    sites
        Its dictionaries.
    latents
        Those shown, by absolute node score.
    n_latents
        How many the circuit has.
    slots
        A prompt of the task, each token with its place.
    clusters
        None where they were not asked for.
    """

    summary: dict[str, Any]
    sites: tuple[SiteView, ...]
    latents: tuple[LatentView, ...]
    n_latents: int
    slots: tuple[tuple[str, str], ...]
    clusters: tuple[ClusterView, ...] | None = None


def look(
    folder: str | Path,
    *,
    top: int = 10,
    n_examples: int = 5,
    clusters: int | None = None,
    trust_remote_code: bool = False,
) -> Gallery:
    """Look at the latents of a run's circuit.

    Parameters
    ----------
    folder
        Of a run with ``saes``.
    top
        Latents to describe, those with the largest absolute node scores.
    n_examples
        Prompts to show of each.
    clusters
        Also put all latents of the circuit into so many clusters.
    trust_remote_code
        Let the model's folder run its own code, whatever ``run.json`` says.

    Raises
    ------
    CircuitFileError
        If the folder holds no run.
    DictionaryError
        If a dictionary of the run cannot be read or is not the one that the run used.
    OptionError
        If the run or its circuit has no latents, its model is not the one that it was, or a
        number makes no sense.

    Examples
    --------
    >>> look("runs/ioi").latents[0].tokens  # doctest: +SKIP
    """
    for name, value in (("top", top), ("prompts", n_examples)):
        check_count(name, value)
    if not Path(folder).is_dir():
        raise CircuitFileError(f"{folder}: no such folder; give the folder of a run")
    opened = open_run(folder)
    circuit, summary = opened.circuit, opened.summary
    settings = opened.settings(trust_remote_code=trust_remote_code)
    nodes = [n for n in circuit.nodes() if parse_node(n)[0] == "latent"]
    _check_latents(folder, settings, circuit, nodes)
    experiment, tokenizer = reopen(opened, settings)
    texts = Texts(tokenizer, experiment.task.pairs[0].clean[-1])
    scores = node_scores(experiment, between_inputs(experiment, _STEPS), _STEPS)
    of_nodes = scores[[circuit.graph.sender_index[n] for n in nodes]]
    order = np.argsort(-np.abs(of_nodes), kind="stable")
    nodes, of_nodes = [nodes[i] for i in order], of_nodes[order]
    found = record(experiment, nodes)
    first = found.prompts[0]
    return Gallery(
        summary=summary,
        sites=tuple(_sites(experiment, nodes)),
        latents=tuple(_views(experiment, circuit, found, of_nodes, texts, top, n_examples)),
        n_latents=len(nodes),
        slots=tuple(zip(map(texts, first.tokens), first.places, strict=True)),
        clusters=None
        if clusters is None
        else tuple(_clusters(circuit, found, of_nodes, texts, clusters)),
    )


# --- the run ------------------------------------------------------------------------------


def _check_latents(
    folder: str | Path, settings: Settings, circuit: Circuit, nodes: Sequence[str]
) -> None:
    if settings.saes is None or not circuit.graph.shape.sites:
        raise OptionError(
            f"{folder}: the run has no latents; find a circuit with acdc discover --saes"
        )
    if not nodes:
        raise OptionError(
            f"{folder}: no latent is in the circuit; find a larger one with --edges or --threshold"
        )


def _sites(experiment: Experiment, nodes: Sequence[str]) -> Iterable[SiteView]:
    latents = {split_span(node)[0] for node in nodes}
    qualities = qualities_on_task(experiment)
    for attachment, quality in zip(experiment.attachments, qualities, strict=True):
        site = attachment.site
        inside = sum(name.startswith(f"{site.name}.f") for name in latents)
        yield SiteView(site.name, len(site.latents), inside, quality)


# --- latents ------------------------------------------------------------------------------


def _views(
    experiment: Experiment,
    circuit: Circuit,
    found: Activations,
    scores: NDArray[np.float64],
    texts: Texts,
    top: int,
    n_examples: int,
) -> Iterable[LatentView]:
    largest = np.array([found.of_latent(i)[1].max(initial=0.0) for i in range(len(found.nodes))])
    shown = found.nodes[:top]
    effects = direct_effects(experiment, shown, largest[: len(shown)])
    separate = experiment.model.d_vocab_out != experiment.model.d_vocab
    outputs = Texts(None) if separate else texts
    ends = _Ends(circuit)
    dictionaries = {
        a.site.name: a.dictionary for a in experiment.attachments if isinstance(a, Attachment)
    }
    clean = np.array([prompt.run == "clean" for prompt in found.prompts])
    presence = _presence(found)
    for i, name in enumerate(shown):
        tokens, values = found.of_latent(i)
        total = values.sum() or 1.0
        site, _, number = split_span(name)[0].partition(".f")
        yield LatentView(
            name=name,
            site=site,
            score=float(scores[i]),
            density=len(tokens) / len(found.token_ids),
            largest=float(largest[i]),
            clean_share=float(values[clean[found.token_prompt[tokens]]].sum() / total),
            examples=tuple(_examples(found, tokens, values, texts, n_examples)),
            tokens=token_shares(found, tokens, values, texts),
            places=_shares(found.token_places[tokens].tolist(), values),
            context=_context(found, presence, tokens, values, texts),
            up=_moved(effects[name], outputs, up=True),
            down=_moved(effects[name], outputs, up=False),
            incoming=ends.incoming(name),
            outgoing=ends.outgoing(name),
            link=_link(dictionaries[site], int(number)),
        )


def _examples(
    found: Activations,
    tokens: NDArray[np.int64],
    values: NDArray[np.float64],
    texts: Texts,
    n: int,
) -> Iterable[Example]:
    """Yield the prompts with the largest activations, equal ones once."""
    peaks = np.zeros(len(found.prompts))
    np.maximum.at(peaks, found.token_prompt[tokens], values)
    seen: set[tuple[int, ...]] = set()
    for p in np.argsort(-peaks, kind="stable").tolist():
        prompt = found.prompts[p]
        if peaks[p] <= 0 or len(seen) == n:
            return
        if prompt.tokens in seen:
            continue
        seen.add(prompt.tokens)
        inside = found.token_prompt[tokens] == p
        row = np.zeros(len(prompt.tokens))
        row[tokens[inside] - found.start[p]] = values[inside]
        yield Example(prompt.run, tuple(map(texts, prompt.tokens)), tuple(row.tolist()))


def token_shares(
    found: Activations, tokens: NDArray[np.int64], values: NDArray[np.float64], texts: Texts
) -> tuple[Share, ...]:
    """Return the tokens with the largest shares of a summed activation.

    Parameters
    ----------
    found
        What the tokens are of.
    tokens, values
        Places among all tokens, and the activation on each (:meth:`Activations.of_latent`).
    texts
        Of token ids.
    """
    return _shares([texts(t) for t in found.token_ids[tokens].tolist()], values)


def _shares(names: Sequence[str], values: NDArray[np.float64]) -> tuple[Share, ...]:
    """Return the names with the largest shares of the summed sizes (neurons may be below 0)."""
    sums: dict[str, float] = {}
    for name, value in zip(names, values.tolist(), strict=True):
        sums[name] = sums.get(name, 0.0) + abs(value)
    total = sum(sums.values()) or 1.0
    best = sorted(sums.items(), key=lambda item: (-item[1], item[0]))[:_SHARES]
    return tuple(Share(name, value / total) for name, value in best)


def _presence(found: Activations) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Token ids, and ``[id, prompt]``: whether a prompt has it, standardised over prompts."""
    ids, kind = np.unique(found.token_ids, return_inverse=True)
    there = np.zeros((len(ids), len(found.prompts)))
    there[kind, found.token_prompt] = 1.0
    varies = there.std(1) > 0
    there = there[varies]
    return ids[varies], (there - there.mean(1, keepdims=True)) / there.std(1, keepdims=True)


def _context(
    found: Activations,
    presence: tuple[NDArray[np.int64], NDArray[np.float64]],
    tokens: NDArray[np.int64],
    values: NDArray[np.float64],
    texts: Texts,
) -> tuple[Share, ...]:
    """Return the tokens whose presence goes best with a latent's activation in a prompt."""
    ids, there = presence
    sums = np.zeros(len(found.prompts))
    np.add.at(sums, found.token_prompt[tokens], values)
    if not sums.std() > 0:
        return ()
    correlation = there @ ((sums - sums.mean()) / sums.std()) / len(sums)
    best = np.argsort(-correlation, kind="stable")[:_CONTEXT]
    return tuple(Share(texts(int(ids[i])), float(correlation[i])) for i in best)


def _moved(effect: Effect, texts: Texts, *, up: bool) -> tuple[Share, ...]:
    ids, by = (effect.up, effect.up_by) if up else (effect.down, effect.down_by)
    return tuple(Share(texts(i), v) for i, v in zip(ids.tolist(), by.tolist(), strict=True))


def _link(dictionary: Dictionary, latent: int) -> str | None:
    name = dictionary.neuronpedia_id
    if not isinstance(name, str) or not _NEURONPEDIA.fullmatch(name):
        return None
    return f"https://www.neuronpedia.org/{name}/{latent}"


class _Ends:
    """Edges of a circuit by the nodes that they lead from and to."""

    def __init__(self, circuit: Circuit) -> None:
        self._circuit, self._graph = circuit, circuit.graph
        inside = np.flatnonzero(circuit.in_circuit)
        inside = inside[np.argsort(-np.abs(circuit.scores[inside]), kind="stable")]
        self._from: dict[int, list[int]] = {}
        self._to: dict[int, list[int]] = {}
        for edge in inside.tolist():
            self._from.setdefault(int(self._graph.edge_sender[edge]), []).append(edge)
            self._to.setdefault(int(self._graph.edge_receiver[edge]), []).append(edge)
        self._feeding: dict[int, list[int]] = {}
        for receiver in self._to:
            for node in self._graph.fed_by(receiver).tolist():
                self._feeding.setdefault(node, []).append(receiver)

    def outgoing(self, node: str) -> tuple[End, ...]:
        graph, found = self._graph, []
        for edge in self._from.get(graph.sender_index[node], []):
            receiver = int(graph.edge_receiver[edge])
            found.append(self._end(edge, graph.receivers[receiver], graph.receiver_node(receiver)))
        return tuple(found)

    def incoming(self, node: str) -> tuple[End, ...]:
        graph, found = self._graph, []
        for receiver in self._feeding.get(graph.sender_index[node], []):
            name = graph.receivers[receiver]
            for edge in self._to[receiver]:
                sender = graph.senders[graph.edge_sender[edge]]
                text = sender if name == node else f"{sender} via {name}"
                found.append(self._end(edge, text, sender))
        return tuple(sorted(found, key=lambda end: -abs(end.score)))

    def _end(self, edge: int, text: str, node: str) -> End:
        return End(self._graph.edge_name(edge), text, node, float(self._circuit.scores[edge]))


# --- clusters -----------------------------------------------------------------------------


def _clusters(
    circuit: Circuit,
    found: Activations,
    scores: NDArray[np.float64],
    texts: Texts,
    n_clusters: int,
) -> Iterable[ClusterView]:
    total = float(np.abs(scores).sum()) or 1.0
    columns = found.by_latent
    largest = columns.max(axis=0).toarray()[0]
    graph = circuit.graph
    ends = [
        (graph.senders[graph.edge_sender[e]], graph.receivers[graph.edge_receiver[e]])
        for e in np.flatnonzero(circuit.in_circuit).tolist()
    ]
    prompts = ["".join(map(texts, prompt.tokens)) for prompt in found.prompts]
    presence, views = _presence(found), []
    for cluster in cluster_latents(found, n_clusters):
        members = list(cluster.latents)
        names = tuple(found.nodes[i] for i in members)
        unit = 1 / np.where(largest[members] > 0, largest[members], 1.0)
        summed = np.asarray(columns[:, members] @ unit)
        tokens = np.flatnonzero(summed)
        values = summed[tokens]
        inside = set(names)
        views.append(
            ClusterView(
                latents=names,
                share=float(np.abs(scores[members]).sum()) / total,
                together=cluster.together,
                n_edges=sum(u in inside and v in inside for u, v in ends),
                tokens=token_shares(found, tokens, values, texts),
                places=_shares(found.token_places[tokens].tolist(), values),
                prompts=_shares([prompts[p] for p in found.token_prompt[tokens]], values)[:3],
                context=_context(found, presence, tokens, values, texts),
            )
        )
    return sorted(views, key=lambda view: -view.share)
