"""Circuits of one task in two models, of other shapes or other seeds, matched node by node.

Numbers of heads mean something in one model alone.  So nodes are matched by what they do
(:mod:`acdc.measure.behaviour`): heads by role, attention between the task's places, attention on
repeated tokens, direct effect on the logits and relative depth; MLPs by direct effect and relative
depth.  The matching is the one of least summed distance (Kuhn 1955, the assignment problem), heads
and MLPs apart; pairs farther apart than a limit stay unmatched.  An edge is in both circuits if
both have it between matched nodes, into the same of query, key and value; beside their number
stands that of random matchings, where partners are exchanged within a kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from acdc.errors import OptionError
from acdc.measure.behaviour import Behaviour, distance, distances, measure_behaviour
from acdc.runs.folder import save_summary
from acdc.runs.opened import Opened, RunLike, open_run
from acdc.runs.reopen import reopen
from acdc.runs.reporter import Reporter, Silent
from acdc.settings import MOST_RESAMPLES, check_count
from acdc.terminal.shown import Shown
from graphs import Circuit
from graphs.graph import parse_node
from graphs.select import prune
from graphs.text import short

__all__ = ["LIMIT", "Matched", "Pair", "match", "match_nodes"]

LIMIT = 0.25
"""Distance from which on nodes are not matched."""

Link = tuple[str, str, str]
"""Sender, node that reads it, and by what: ``q``, ``k``, ``v`` or nothing."""


@dataclass(frozen=True)
class Pair:
    """Two nodes that do the same.

    Parameters
    ----------
    one, other
        Their names.
    distance
        From 0 to 1.
    parts
        The distance in each respect, see :func:`acdc.measure.behaviour.distances`.
    next_best
        Distance of ``one`` to the nearest other node of the other circuit; None: there is none.
    roles
        That either has.
    """

    one: str
    other: str
    distance: float
    parts: dict[str, float]
    next_best: float | None
    roles: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Matched(Shown):
    """Two circuits, matched.

    Parameters
    ----------
    labels
        What the two are called.
    circuits
        Themselves.
    pairs
        Heads, then MLPs, the nearest first.
    unmatched
        Nodes of each that have no partner.
    behaviours
        Of the nodes of each circuit, by name.
    common, only
        Edges between matched nodes that both circuits have, in the first one's names; and that one
        alone has, in its own names.
    loose
        Edges of each from or into nodes without a partner: how many.
    expected, p
        Common edges of random matchings, the mean; share of them with at least as many (one more
        counted).  None: not drawn.
    """

    labels: tuple[str, str]
    circuits: tuple[Opened, Opened]
    pairs: tuple[Pair, ...]
    unmatched: tuple[tuple[str, ...], tuple[str, ...]]
    behaviours: tuple[dict[str, Behaviour], dict[str, Behaviour]]
    common: tuple[str, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    loose: tuple[int, int]
    expected: float | None
    p: float | None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the runs say one should know before believing them."""
        return tuple(
            f"{label}: {warning}"
            for label, one in zip(self.labels, self.circuits, strict=True)
            for warning in one.summary.get("warnings") or ()
        )

    def summary(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "warnings": list(self.warnings),
            "labels": list(self.labels),
            "models": [one.summary.get("model") for one in self.circuits],
            "task": self.circuits[0].summary.get("task"),
            "pairs": [asdict(pair) for pair in self.pairs],
            "unmatched": [list(names) for names in self.unmatched],
            "behaviours": [
                {name: _plain(one) for name, one in known.items()} for known in self.behaviours
            ],
            "common_edges": list(self.common),
            "only_edges": [list(names) for names in self.only],
            "n_loose_edges": list(self.loose),
            "n_common_expected": self.expected,
            "p": self.p,
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write :meth:`summary` as ``match.json`` into a folder, or as a ``.json`` file.

        Raises OutputError if the file exists, unless ``overwrite``, or cannot be written.
        """
        return save_summary(path, "match.json", self.summary(), overwrite=overwrite)

    def __repr__(self) -> str:
        return short(
            f"<Matched {' and '.join(self.labels)}: {len(self.pairs)} pairs of nodes, "
            f"{len(self.common)} common edges>"
        )


def _plain(behaviour: Behaviour) -> dict[str, Any]:
    attention = {f"{q} to {k}": value for (q, k), value in behaviour.attention.items()}
    return vars(behaviour) | {"attention": attention, "roles": sorted(behaviour.roles)}


def match(
    one: RunLike,
    other: RunLike,
    *,
    limit: float = LIMIT,
    n_random: int = 1000,
    seed: int = 0,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> Matched:
    """Match the circuits of one task in two models by what their nodes do.

    Parameters
    ----------
    one, other
        Folders of runs, or :class:`acdc.Run`.
    limit
        Distance from which on nodes are not matched, above 0 and at most 1.
    n_random, seed
        Random matchings that the number of common edges is compared with; 0: none.
    trust_remote_code
        Let the models' folders run their own code.
    reporter
        Told of progress.

    Raises
    ------
    OptionError
        If the runs are of different tasks, or over other nodes than heads and MLPs.

    Examples
    --------
    >>> import acdc
    >>> acdc.match("runs/seed0", "runs/seed1").pairs  # doctest: +SKIP
    """
    if not 0 < limit <= 1:
        raise OptionError(f"limit {limit:g}: expected a distance above 0, at most 1")
    check_count("n_random", n_random, at_least=0, at_most=MOST_RESAMPLES)
    opened = open_run(one), open_run(other)
    _check(opened)
    settings = [run.settings(trust_remote_code=trust_remote_code) for run in opened]
    known: list[dict[str, Behaviour]] = []
    with (reporter or Silent()).phase("behaviour of nodes", 2):
        for run, asked in zip(opened, settings, strict=True):
            experiment, _ = reopen(run, asked)
            measured = measure_behaviour(experiment)
            nodes = _nodes(run.circuit)
            known.append({name: found for name, found in measured.items() if name in nodes})
            (reporter or Silent()).advance(1)
    pairs = match_nodes(known[0], known[1], limit)
    partner = {pair.one: pair.other for pair in pairs}
    links = [_links(run.circuit) for run in opened]
    if not all(run.circuit.graph.shape.split_qkv for run in opened):
        links = [{(u, v, "") for u, v, _ in some} for some in links]
    common = _common(links[0], links[1], partner)
    back = {b: a for a, b in partner.items()}
    expected, p = _chance(links, partner, len(common), n_random, seed)
    labels = (opened[0].name, opened[1].name)
    return Matched(
        labels if labels[0] != labels[1] else (f"{labels[0]} (1)", f"{labels[1]} (2)"),
        opened,
        tuple(pairs),
        (
            tuple(name for name in known[0] if name not in partner),
            tuple(name for name in known[1] if name not in back),
        ),
        (known[0], known[1]),
        tuple(sorted(map(_said, common))),
        (_only(links[0], common, partner), _only(links[1], _moved(common, partner), back)),
        (_loose(links[0], partner), _loose(links[1], back)),
        expected,
        p,
    )


def match_nodes(
    one: Mapping[str, Behaviour], other: Mapping[str, Behaviour], limit: float = LIMIT
) -> list[Pair]:
    """Match nodes of two circuits: heads with heads, MLPs with MLPs.

    Parameters
    ----------
    one, other
        By name.
    limit
        Pairs that are farther apart are left out.
    """
    found: list[Pair] = []
    for kind in ("head", "mlp"):
        ours, theirs = (
            [name for name, node in nodes.items() if node.kind == kind] for nodes in (one, other)
        )
        if not ours or not theirs:
            continue
        table = np.array([[distance(one[a], other[b]) for b in theirs] for a in ours])
        rows, columns = linear_sum_assignment(table)
        pairs = [
            Pair(
                ours[i],
                theirs[j],
                float(table[i, j]),
                distances(one[ours[i]], other[theirs[j]]),
                min((float(x) for k, x in enumerate(table[i]) if k != j), default=None),
                tuple(sorted(one[ours[i]].roles | other[theirs[j]].roles)),
            )
            for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
            if table[i, j] <= limit
        ]
        found += sorted(pairs, key=lambda pair: pair.distance)
    return found


def _check(opened: tuple[Opened, Opened]) -> None:
    """Refuse what cannot be matched, before a model is loaded."""
    for run in opened:
        if run.discovery is None:
            raise OptionError(f"{run.name}: nodes are matched by what they do: give a run")
        shape = run.circuit.graph.shape
        if shape.sites or shape.spans:
            raise OptionError(
                f"{run.name}: circuits of heads and MLPs are matched, not with latents or split by "
                "positions"
            )
    tasks = [Path(str(run.summary.get("task"))).name for run in opened]
    if tasks[0] != tasks[1]:
        raise OptionError(
            f"the runs are of tasks {tasks[0]} and {tasks[1]}: heads are matched by what they do "
            "on one task (acdc shared compares tasks in one model)"
        )


def _nodes(circuit: Circuit) -> set[str]:
    return {name for name in circuit.nodes() if parse_node(name)[0] in ("head", "mlp")}


def _links(circuit: Circuit) -> set[Link]:
    """Edges of a circuit, a shared key or value apart for each head that reads it."""
    graph = circuit.graph
    alive = set(circuit.nodes())
    found = set()
    for edge in np.flatnonzero(prune(graph, circuit.in_circuit)).tolist():
        sender, receiver = int(graph.edge_sender[edge]), int(graph.edge_receiver[edge])
        kind = parse_node(graph.senders[sender])[0]
        name = "input" if kind == "input" else graph.senders[sender]
        for node in graph.fed_by(receiver).tolist():
            if graph.nodes[node] in alive:
                found.add((name, graph.nodes[node], graph.port[receiver]))
    return found


def _moved(links: set[Link], partner: Mapping[str, str]) -> set[Link]:
    """Links in the names of the other circuit, those between nodes that have a partner."""
    same = {"input": "input", "logits": "logits", **partner}
    return {(same[u], same[v], port) for u, v, port in links if u in same and v in same}


def _common(one: set[Link], other: set[Link], partner: Mapping[str, str]) -> set[Link]:
    """Links of the first circuit that the other one has, too."""
    back = {b: a for a, b in partner.items()}
    return one & _moved(other, back)


def _only(links: set[Link], common: set[Link], partner: Mapping[str, str]) -> tuple[str, ...]:
    """Links between matched nodes that the other circuit lacks."""
    same = {"input", "logits", *partner}
    return tuple(sorted(_said(x) for x in links - common if x[0] in same and x[1] in same))


def _loose(links: set[Link], partner: Mapping[str, str]) -> int:
    same = {"input", "logits", *partner}
    return sum(u not in same or v not in same for u, v, _ in links)


def _said(link: Link) -> str:
    sender, node, port = link
    return f"{sender}->{node}<{port}>" if port and len(port) == 1 else f"{sender}->{node}"


def _chance(
    links: Sequence[set[Link]], partner: Mapping[str, str], n_common: int, n: int, seed: int
) -> tuple[float | None, float | None]:
    """Common edges of matchings with partners exchanged within a kind: mean, and how rare ours."""
    if not n:
        return None, None
    rng, counts = np.random.default_rng(seed), []
    kinds = [[a for a in partner if parse_node(a)[0] == kind] for kind in ("head", "mlp")]
    for _ in range(n):
        drawn: dict[str, str] = {}
        for names in kinds:
            order = rng.permutation(len(names)).tolist()
            drawn |= {a: partner[names[i]] for a, i in zip(names, order, strict=True)}
        counts.append(len(_common(links[0], links[1], drawn)))
    values = np.array(counts)
    return float(values.mean()), float((1 + (values >= n_common).sum()) / (1 + n))
