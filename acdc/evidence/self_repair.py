"""Self-repair: which heads do more for the answer when others of their role are ablated.

In a graph with dictionaries or neurons, latents and neurons are measured like heads; "head" below
stands for all that have an edge into ``logits`` (behind a dictionary of the whole stream its
latents alone).  Error nodes and MLPs have no role.

The *direct effect* of a head h is the change of the metric when only the edge ``h->logits`` is
ablated, counted positive where the head helps.  It is measured by a run (no frozen norms, no
projection), three times; G are the heads that are ablated:

- ``before``: in the untouched model;
- ``unanswered``: in the model whose edges ``G->logits`` alone are ablated, so that G is missing
  from the logits and no head has seen it go;
- ``after``: in the model where every edge that leaves G is ablated, and everything downstream
  computed anew.

``growth = after - before`` is what the field calls backup behaviour.  Part of it needs no head
to do anything: a final norm that shrinks with the stream, or a metric that is less saturated,
make the same write count for more (Rushing and Nanda).  ``unanswered - before`` is that part,
``response = after - unanswered`` the rest: what heads write otherwise than before.  Both are
compared with ``taken``, the change of the metric when only the edges ``G->logits`` are ablated:
what would be lost if nothing answered.

For a head of a role, G are the other heads of the role; for every other head of the model, G is
the whole role, which is how backups show that discovery did not find: their edges do nothing as
long as the movers work.

A head is called ``backup`` if growth and response both replace what was taken (same sign, 95 %
bootstrap intervals over the prompts without zero), the smaller of them is at least ``min_share``
of it, and the head's own effect then has that sign; ``rescaled`` if only the growth is so.
Where the interval of ``taken`` holds zero or it is less than 2 % of the gap between the model with
every edge and with none, as for roles that write next to nothing to the logits, there is nothing
to repair and nobody is called anything.

All depends on what ablated edges carry: a head that looks whether another one wrote anything
answers to zero ablation, and not to one that writes another name instead.

References
----------
Wang et al. 2022, "Interpretability in the wild", arXiv 2211.00593, section 3.4 (backup name
movers).  McGrath et al. 2023, "The Hydra effect", arXiv 2307.15771 (direct against total
effect).  Rushing and Nanda 2024, "Explorations of self-repair in language models",
arXiv 2402.15390 (heads against the norm's scale).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acdc.engine.experiment import Experiment
from acdc.engine.patched import PatchedModel
from acdc.errors import OptionError, UnknownNameError
from acdc.evidence.references import ModelMatch, check_model, load_reference
from acdc.measure.evaluation import interval
from acdc.runs.building import with_constants
from acdc.runs.discover import fit
from acdc.runs.folder import Timer, save_summary, versions
from acdc.runs.opened import RunLike, open_run
from acdc.runs.reporter import Reporter, Silent
from acdc.runs.unseen import PromptChoice
from acdc.settings import MOST_RESAMPLES, Settings, check_count
from acdc.terminal.shown import Shown
from graphs import Circuit, Graph
from graphs.coarse import coarsen
from graphs.errors import did_you_mean
from graphs.graph import parse_node
from graphs.known.reference import Reference
from graphs.sites import EXPERTS
from graphs.text import short

__all__ = [
    "WRITERS",
    "HeadRepair",
    "Measure",
    "RoleRepair",
    "SelfRepair",
    "parse_roles",
    "reference_roles",
    "self_repair",
    "writers",
]

Values = NDArray[np.float64]
Roles = Mapping[str, Sequence[str]]

WRITERS = "writes to logits"
"""Name of the role that is taken where none is given."""
_LEAST_TAKEN = 0.02
"""Share of the gap below which a direct effect counts as nothing."""


@dataclass(frozen=True)
class Measure:
    """Mean over the prompts, with its 95 % bootstrap interval; unit of the metric."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of zero, else 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class HeadRepair:
    """One head when others are ablated.

    Parameters
    ----------
    head
        Its name.
    in_circuit
        Whether an edge of the circuit leaves it.
    role
        Its own role; None if it has none.
    before, unanswered, after
        Direct effect, see the module.
    growth, response
        ``after - before`` and ``after - unanswered``.
    share
        Growth as a share of what the ablated heads took away; None where that was nothing.
    verdict
        ``backup``, ``rescaled`` or None.
    """

    head: str
    in_circuit: bool
    role: str | None
    before: float
    unanswered: float
    after: float
    growth: Measure
    response: Measure
    share: float | None
    verdict: str | None


@dataclass(frozen=True)
class RoleRepair:
    """One role, whole and head by head.

    Parameters
    ----------
    role, heads
        What was ablated.
    taken
        Change of the metric when only the edges from these heads into ``logits`` are ablated.
    total
        Change when all of their edges are: what is lost in the end.
    repaired
        ``1 - total / taken``: what heads and MLPs downstream give back, as a share.  Below zero
        where the heads also act through others; None where nothing was taken.
    members
        Heads of the role, each when the others are ablated; empty if it is the only one.
    others
        All other heads of the model, when the whole role is.
    """

    role: str
    heads: tuple[str, ...]
    taken: Measure
    total: Measure
    repaired: float | None
    members: tuple[HeadRepair, ...]
    others: tuple[HeadRepair, ...]

    @property
    def backups(self) -> tuple[str, ...]:
        """Heads with the verdict ``backup``."""
        return tuple(row.head for row in (*self.members, *self.others) if row.verdict == "backup")


@dataclass(frozen=True, eq=False)
class SelfRepair(Shown):
    """Self-repair in a circuit, role by role.

    Parameters
    ----------
    settings
        What it was measured on.
    min_share
        Least share of what was taken that a backup gives back.
    roles
        One each.
    task_info
        Where the prompts came from, see :class:`acdc.runs.unseen.PromptChoice`.
    n_prompts
        Prompt pairs.
    timings
        Seconds by phase.
    match
        Whether the reference that roles are taken from is of this model; None: from none.
    """

    settings: Settings
    min_share: float
    roles: tuple[RoleRepair, ...]
    task_info: dict[str, Any]
    n_prompts: int
    timings: dict[str, float]
    match: ModelMatch | None = None

    @property
    def backups(self) -> dict[str, tuple[str, ...]]:
        """Role -> heads that back it up; roles without any are left out."""
        return {role.role: role.backups for role in self.roles if role.backups}

    def summary(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **self.settings.plain(),
            "n_prompts": self.n_prompts,
            "prompts": self.task_info["prompts"],
            "seed": self.task_info.get("seed", self.settings.seed),
            "min_share": self.min_share,
            "backups": {role: list(heads) for role, heads in self.backups.items()},
            "roles": [asdict(role) for role in self.roles],
            "task_info": self.task_info,
            "reference_model": None if self.match is None else asdict(self.match),
            "timings": self.timings,
            "versions": versions(),
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write :meth:`summary` as ``self-repair.json`` into a folder, or as a ``.json`` file.

        Raises OutputError if the file exists, unless ``overwrite``, or cannot be written.
        """
        return save_summary(path, "self-repair.json", self.summary(), overwrite=overwrite)

    def __repr__(self) -> str:
        names = ", ".join(role.role for role in self.roles)
        found = [head for heads in self.backups.values() for head in heads]
        backups = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
        return short(f"<SelfRepair of {names}: backups {backups or 'none'}>")


def self_repair(
    run: RunLike,
    roles: Roles | Reference | str | Path | None = None,
    *,
    task: Any = None,
    of: Reference | None = None,
    other_model: bool = False,
    seen: bool = True,
    min_share: float = 0.1,
    n_resamples: int = 1000,
    resample_seed: int = 0,
    memory: int = 1 << 30,
    reporter: Reporter | None = None,
    **asked: Any,
) -> SelfRepair:
    """Measure each head's direct effect before and after others of its role are ablated.

    Parameters
    ----------
    run
        Folder of a run, a circuit file, :class:`acdc.Run` or :class:`graphs.Circuit`.  Heads of
        the circuit are marked in the result and, without ``roles``, make the one role.  Of one
        that is split by positions the spans are joined.
    roles
        Role -> names of its heads; or a reference circuit, its name or file, see
        :func:`reference_roles`; None: the heads from which a kept edge leads to ``logits``, see
        :func:`writers`.
    task
        As of :func:`acdc.discover`; None: the run's.  A circuit that comes alone needs one.
    of
        Reference that ``roles`` are taken from, if they do not say.
    other_model
        Take roles of a reference of another model than the run's all the same.
    seen
        Whether to take the prompts that discovery saw.
    min_share
        What a backup gives back at least, as a share of what was taken; above 0, at most 1.
    n_resamples, resample_seed
        Of the bootstrap over prompts.
    memory
        Bytes that passes and evaluations may take, beside the weights.
    reporter
        Told of progress.
    **asked
        Fields of :class:`acdc.settings.Settings` that are to be other than the run's.

    Raises
    ------
    OptionError
        If the circuit has no head that writes to the logits, a head is none of the
        model's, the reference is of another model, or a value makes no sense.
    TaskError
        If no prompts are left that discovery has not seen.

    Examples
    --------
    >>> import acdc
    >>> acdc.self_repair("runs/my-ioi").backups  # doctest: +SKIP
    """
    if not 0 < min_share <= 1:
        raise OptionError(f"min_share {min_share:g}: expected a share above 0, at most 1")
    check_count("n_resamples", n_resamples, at_most=MOST_RESAMPLES)
    if isinstance(roles, str | Path):
        roles = load_reference(roles)
    opened = open_run(run)
    circuit, settings = opened.circuit, opened.settings(task=task, **asked)
    known = roles if isinstance(roles, Reference) else of
    if known is None and other_model:
        raise OptionError("other_model without a reference: give one, or leave it out")
    prompts = PromptChoice(opened.discovery_with(settings), seen)
    circuit = coarsen(circuit, circuit.graph.shape.unsplit)  # heads as a whole
    if roles is None:
        roles = writers(circuit)
    elif isinstance(roles, Reference):
        roles = reference_roles(roles, circuit.graph)
    _check_heads(roles, circuit.graph)
    match = None
    if known is not None:
        match = check_model(known, opened.identity, other_model=other_model)
    reporter, timer = reporter or Silent(), Timer()
    with timer.phase("load"), reporter.phase("load model and task", None):
        constants = opened.constants(settings)
        circuit, experiment = fit(circuit, settings, prompts, constants, memory)
    with timer.phase("constants"):
        experiment = with_constants(experiment, memory, reporter)
    n_prompts = len(experiment.task)
    if n_prompts < 2:
        raise OptionError("1 prompt: an interval over prompts needs at least 2")
    rng = np.random.default_rng(resample_seed)
    weights = rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=n_resamples)
    lab = _Lab(experiment, circuit, roles, weights / n_prompts, min_share)
    found = []
    with timer.phase("measure"), reporter.phase("self-repair", sum(map(len, roles.values()))):
        for role, heads in roles.items():
            found.append(lab.role(role, tuple(heads)))
            reporter.advance(len(heads))
    info = experiment.task.info
    return SelfRepair(settings, min_share, tuple(found), info, n_prompts, timer.seconds, match)


# Roles


def writers(circuit: Circuit) -> dict[str, tuple[str, ...]]:
    """Return the role of the heads from which a kept edge leads to ``logits``.

    Raises
    ------
    OptionError
        If there is no such head.
    """
    graph = circuit.graph
    at_logits = graph.edge_receiver == graph.receiver_index["logits"]
    senders = graph.edge_sender[at_logits & circuit.in_circuit]
    heads = tuple(graph.senders[u] for u in np.sort(senders) if _has_role(graph.senders[u]))
    if not heads:
        raise OptionError(
            f"no {_what(graph)} of the circuit has an edge into logits: say which heads have one "
            "role, as --role mover=a4.h1,a5.h0, or give --reference"
        )
    return {WRITERS: heads}


def reference_roles(reference: Reference, graph: Graph) -> dict[str, tuple[str, ...]]:
    """Return the heads of each role of a reference circuit; roles without heads are left out.

    Raises
    ------
    OptionError
        If the reference has none, or is of a model with other layers or heads than the graph's.
    """
    ours, theirs = (
        (shape.n_layers, shape.n_heads) for shape in (graph.shape, reference.graph.shape)
    )
    if ours != theirs:
        raise OptionError(
            f"reference {reference.name!r} is of {reference.model}, {theirs[0]} layers of "
            f"{theirs[1]} heads; the model has {ours[0]} of {ours[1]}: name its own heads with "
            "--role, as --role mover=a4.h1,a5.h0"
        )
    heads = {
        role: tuple(node for node in nodes if _is_head(node))
        for role, nodes in reference.roles.items()
    }
    found = {role: nodes for role, nodes in heads.items() if nodes}
    if not found:
        raise OptionError(f"reference {reference.name!r} tells no heads' roles: give --role")
    return found


def parse_roles(
    texts: Sequence[str], reference: Reference | None = None
) -> dict[str, tuple[str, ...]]:
    """Return roles from texts as ``mover=a4.h1,a5.h0``, or names of a reference's roles.

    Raises
    ------
    OptionError
        If a text is neither, or a role is given twice.
    UnknownNameError
        If the reference has no such role.
    """
    roles: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, given, heads = (part.strip() for part in text.partition("="))
        if name in roles:
            raise OptionError(f"role {name!r} is given twice: put its heads into one --role")
        if given:
            roles[name] = tuple(head.strip() for head in heads.split(",") if head.strip())
        elif reference is None:
            raise OptionError(
                f"role {text!r}: expected a name and heads, as mover=a4.h1,a5.h0, or --reference "
                "with it"
            )
        elif name not in reference.roles:
            raise UnknownNameError(f"role of reference {reference.name}", name, reference.roles)
        else:
            roles[name] = tuple(node for node in reference.roles[name] if _is_head(node))
    if reference is not None and all("=" in text for text in texts):
        raise OptionError(
            f"reference {reference.name!r}: every role names its heads already; leave --reference "
            "out, or name one of its roles"
        )
    return roles


def _is_head(name: str) -> bool:
    return parse_node(name)[0] == "head"


def _has_role(name: str) -> bool:
    return parse_node(name)[0] in ("head", "latent", "expert")


def _what(graph: Graph) -> str:
    """What messages call the nodes that have roles."""
    if any(site.kind in EXPERTS for site in graph.shape.sites):
        return "head or expert"
    return "head, latent or neuron" if graph.shape.sites else "head"


def _nodes(graph: Graph) -> tuple[str, ...]:
    """Heads, latents and neurons that ``logits`` reads."""
    into = graph.edge_sender[graph.receiver_start[-2] :]
    return tuple(name for name in (graph.senders[u] for u in into) if _has_role(name))


def _check_heads(roles: Roles, graph: Graph) -> None:
    """Refuse a role that cannot be ablated."""
    known, read = _nodes(graph), " that logits reads" if graph.shape.sites else ""
    for role, heads in roles.items():
        if not heads:
            raise OptionError(f"role {role!r} has no heads: there is nothing to ablate")
        for head in heads:
            if head not in known:
                raise OptionError(
                    f"role {role!r}: {head!r} is no {_what(graph)} of the model{read}; "
                    f"{did_you_mean(head, known)}"
                )
            if heads.count(head) > 1:
                raise OptionError(f"role {role!r}: {head!r} is listed twice")
        if len(known) == 1:
            raise OptionError(f"role {role!r}: the model has no {_what(graph)} but {heads[0]}")


# Measuring


class _Lab:
    """Measures roles of one experiment.

    Parameters
    ----------
    experiment, circuit, roles
        See :func:`self_repair`.
    weights
        ``[resample, prompt]``: share of each prompt in each draw.
    min_share
        See :func:`self_repair`.
    """

    def __init__(
        self,
        experiment: Experiment,
        circuit: Circuit,
        roles: Roles,
        weights: Values,
        min_share: float,
    ) -> None:
        self.patched, self.graph = PatchedModel(experiment), experiment.graph
        self.sign, self.weights, self.min_share = experiment.minimised_sign, weights, min_share
        full, empty = (self.patched.values(np.full(self.graph.n_edges, x)) for x in (True, False))
        self.least_taken = _LEAST_TAKEN * abs(float(full.mean() - empty.mean()))
        self.heads = _nodes(self.graph)
        self.inside = {
            self.graph.senders[u] for u in np.unique(self.graph.edge_sender[circuit.in_circuit])
        }
        self.role_of = {head: role for role, heads in roles.items() for head in heads}

    def role(self, role: str, heads: tuple[str, ...]) -> RoleRepair:
        """Ablate the other heads for each head of the role, and the role for all others."""
        others = tuple(head for head in self.heads if head not in heads)
        cases = [(heads, others)]
        if len(heads) > 1:
            cases += [(tuple(h for h in heads if h != head), (head,)) for head in heads]
        plain = self._values((), [(), *((head,) for head in self.heads), *_cuts(cases)])
        (taken, total, rows), *single = (self._case(plain, *case) for case in cases)
        repaired = 1 - total.mean / taken.mean if self._sign(taken) else None
        members = tuple(row for _, _, found in single for row in found)
        return RoleRepair(role, heads, taken, total, repaired, members, rows)

    def _case(
        self, plain: dict[frozenset[str], Values], ablated: tuple[str, ...], heads: tuple[str, ...]
    ) -> tuple[Measure, Measure, tuple[HeadRepair, ...]]:
        """What ablating some heads takes away, in the end too, and how others answer."""
        none = frozenset[str]()
        there = self._values(ablated, [(), *((head,) for head in heads)])
        gone = plain[frozenset(ablated)]
        taken = self._measure(self.sign * (gone - plain[none]))
        total = self._measure(self.sign * (there[none] - plain[none]))
        rows = []
        for head in heads:
            before, unanswered, after = (
                self.sign * (without - whole)
                for without, whole in (
                    (plain[frozenset({head})], plain[none]),
                    (plain[frozenset({*ablated, head})], gone),
                    (there[frozenset({head})], there[none]),
                )
            )  # [prompt] each
            growth, response = self._measure(after - before), self._measure(after - unanswered)
            rows.append(
                HeadRepair(
                    head,
                    head in self.inside,
                    self.role_of.get(head),
                    float(before.mean()),
                    float(unanswered.mean()),
                    float(after.mean()),
                    growth,
                    response,
                    growth.mean / taken.mean if self._sign(taken) else None,
                    self._verdict(float(after.mean()), growth, response, taken),
                )
            )
        return taken, total, tuple(rows)

    def _verdict(
        self, after: float, growth: Measure, response: Measure, taken: Measure
    ) -> str | None:
        """``backup``, ``rescaled`` or None, see the module."""
        sign = self._sign(taken)

        def replaces(part: Measure) -> bool:
            return part.sign == sign and part.mean / taken.mean >= self.min_share

        if not sign or after * sign <= 0 or not replaces(growth):
            return None
        return "backup" if replaces(response) else "rescaled"

    def _sign(self, taken: Measure) -> int:
        """1 or -1 where heads took something away, else 0."""
        return taken.sign if abs(taken.mean) >= self.least_taken else 0

    def _values(
        self, ablated: tuple[str, ...], cuts: Sequence[tuple[str, ...]]
    ) -> dict[frozenset[str], Values]:
        """Heads cut from the logits -> ``[prompt]`` metric, every edge from ``ablated`` out."""
        index = self.graph.sender_index
        mask = ~np.isin(self.graph.edge_sender, [index[head] for head in ablated])
        sets = list(dict.fromkeys(map(frozenset, cuts)))
        rows = np.zeros((len(sets), self.graph.n_senders), dtype=bool)
        for row, heads in zip(rows, sets, strict=True):
            row[[index[head] for head in heads]] = True
        return dict(zip(sets, self.patched.values_at_logits(mask, rows), strict=True))

    def _measure(self, values: Values) -> Measure:
        low, high = interval(self.weights @ values)
        return Measure(float(values.mean()), float(low), float(high))


def _cuts(cases: Sequence[tuple[tuple[str, ...], tuple[str, ...]]]) -> Iterator[tuple[str, ...]]:
    """Yield what is cut from the logits of the untouched model: G, and G with each head."""
    for ablated, heads in cases:
        yield ablated
        for head in heads:
            yield (*ablated, head)
