"""Whole runs as ratios to the model's own passes, measured in the same process.

*One plain forward* is the lowered forward pass with the logits of the whole vocabulary at
all positions (what ``model(tokens)`` gives); *one forward+backward* is the same, plus the
backward pass of the mean metric at the last position to the embeddings, the weights frozen.
Both are timed before and after the run that they are compared with, and the median is taken;
each kind of call is warmed up first.  Every row asserts the answer that it times:

========== ==============================================================================
ACDC       the metric that the run arrived at is :class:`PatchedModel`'s of its circuit,
           to 1e-3 of the gap between the full model and no edge
sweep      its circuit at the smallest threshold is that of the single run
EAP(-IG)   the scores are those of a run chunked by a small memory bound, to 1e-4 of the
           largest
TL's EAP   its edge scores, summed over positions, are ours, to 1e-3 of the largest
========== ==============================================================================
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from acdc.dictionaries.attach import attach
from acdc.dictionaries.sources import load_dictionaries
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import PatchedModel
from acdc.engine.work import Work
from acdc.methods.acdc import acdc
from acdc.methods.candidates import narrow
from acdc.methods.eap import Integration, eap, eap_ig
from acdc.methods.sweep import sweep
from acdc.models import resolve_device
from acdc.models.lowering.model import LoweredModel
from benchmarks.measure import Peak, conditions, median_seconds, timed
from benchmarks.subjects import Size, bundled_experiment, random_bridge, random_model, random_task
from graphs.errors import InputError
from graphs.files.whole import MIB, read_json, write_json

__all__ = ["Passes", "Plan", "Row", "measure", "read_peers", "run_table", "write"]

FORMAT = "acdc-bench-speed"
STEPS, SWEEP = 5, 10
_MOST_BYTES = 16 * MIB


class WrongAnswerError(AssertionError):
    """What was timed did not give the right answer."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured run.

    Parameters
    ----------
    group, model, method, metric
        What was run on what; ``group`` is a section of the table.
    unit
        What the ratio compares with.
    forward_seconds, forward_backward_seconds
        Medians around the run.
    seconds, ratio
        Of the run, and in units.
    per_evaluation
        Forwards per evaluation (ACDC).
    acceptance
        Decisions per evaluation: the part of the guessed scenarios that was of use.
    n_nodes
        Node recomputations of all evaluations.
    peak_bytes
        Growth of the memory during the run: what it needs beside the weights.
    error
        How far the answer was from the one it is checked against, relative.
    """

    group: str
    model: str
    method: str
    metric: str
    unit: str
    forward_seconds: float
    forward_backward_seconds: float | None
    seconds: float
    ratio: float
    error: float | None
    n_edges: int
    n_prompts: int
    n_pos: int
    threshold: float | None = None
    per_evaluation: float | None = None
    n_kept: int | None = None
    n_evaluations: int | None = None
    n_decisions: int | None = None
    n_wasted: int | None = None
    n_dead: int | None = None
    n_nodes: int | None = None
    acceptance: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Parameters
    ----------
    small
        The GPT-2-small shape; replaced by a toy where only the benchmark itself is tested.
    thresholds
        ``(scale, metric, tau)`` of ACDC on ``small``, found by measurement so that 100 to 400
        edges stay.
    sweep
        ``(scale, metric, largest tau, smallest tau)`` of a sweep on ``small``, and for
        ``bundled`` the shares of the gap.
    growth
        Layers of the growing models.
    growth_share
        Tau of ACDC there, as a share of the metric's gap: few edges stay.
    peer, peer_threshold
        The model that other packages are timed on, and tau of ACDC with KL there; as in
        ``peer_auto_circuit.py``.
    bundled
        ``(model, task)``.
    candidates
        Edges that ACDC tries on bundled models with their dictionaries.
    latent_share
        Tau there, as a share of the metric's gap.
    """

    small: Size
    thresholds: tuple[tuple[float, str, float], ...]
    sweep: tuple[float, str, float, float]
    sweep_shares: tuple[float, float]
    growth: tuple[int, ...]
    growth_share: float
    growth_prompts: int
    peer: Size
    peer_threshold: float
    bundled: tuple[tuple[str, str], ...]
    bundled_prompts: int
    candidates: int
    latent_share: float
    repeats: int

    @property
    def scales(self) -> tuple[float, ...]:
        """Scales of the weights that ACDC runs on, in order."""
        return tuple(dict.fromkeys(scale for scale, *_ in self.thresholds))

    @classmethod
    def full(cls, layers: tuple[int, ...] = (4, 12, 24)) -> Plan:
        """Return the plan of the published figures."""
        return cls(
            small=Size(),
            thresholds=THRESHOLDS,
            sweep=(2.0, "kl", 5e-2, 5e-4),
            sweep_shares=(0.1, 0.001),
            growth=layers,
            growth_share=0.05,
            growth_prompts=4,
            peer=Size(n_layers=4, d_model=128, n_heads=4, d_vocab=1000, scale=2.0, n_prompts=4),
            peer_threshold=1e-4,
            bundled=(("ioi-small", "ioi"), ("docstring-small", "docstring")),
            bundled_prompts=64,
            candidates=400,
            latent_share=3e-4,
            repeats=5,
        )

    @classmethod
    def quick(cls, layers: tuple[int, ...] = (1, 2)) -> Plan:
        """Return a plan of seconds, which shows that the benchmark works and nothing else."""
        toy = Size(n_layers=2, d_model=32, n_heads=2, d_vocab=97, scale=4.0, n_prompts=4, n_pos=6)
        return cls(
            small=toy,
            thresholds=((4.0, "kl", 1e-3), (8.0, "logit_diff", 1e-2)),
            sweep=(4.0, "kl", 1e-2, 1e-3),
            sweep_shares=(0.1, 0.01),
            growth=layers,
            growth_share=0.05,
            growth_prompts=2,
            peer=Size(
                n_layers=1, d_model=16, n_heads=2, d_vocab=50, scale=2.0, n_prompts=2, n_pos=4
            ),
            peer_threshold=1e-4,
            bundled=(("ioi-small", "ioi"),),
            bundled_prompts=2,
            candidates=40,
            latent_share=3e-4,
            repeats=1,
        )


THRESHOLDS = (
    (1.0, "kl", 5e-5),
    (1.0, "logit_diff", 2e-3),
    (2.0, "kl", 5e-4),
    (2.0, "kl", 4e-4),
    (2.0, "logit_diff", 5e-3),
)


class Passes:
    """The model's own passes on the clean prompts of an experiment of one batch.

    Parameters
    ----------
    experiment
        Model, prompts and metric.
    repeats
        How often each pass is timed at each call of :meth:`measure`.
    """

    def __init__(self, experiment: Experiment, repeats: int) -> None:
        self.experiment, self.repeats = experiment, repeats
        self.device = experiment.model.device
        self._forward: list[float] = []
        self._both: list[float] = []
        self.forward()
        self.forward_backward()

    @torch.no_grad()
    def forward(self) -> None:
        """Run forwards, all logits included."""
        for batch in self.experiment.batches:
            self._logits(batch.clean, None)

    def forward_backward(self) -> None:
        """Run forwards and backwards to the embeddings."""
        for batch in self.experiment.batches:
            tokens, metric = batch.targets.tokens, self.experiment.metric
            embeds = [x.detach().requires_grad_(True) for x in self._embed(batch.clean)]
            with torch.enable_grad():
                rows = self._logits(batch.clean, embeds)[:, batch.scored].flatten(0, 1)
                scored = rows if metric.whole_vocab else rows.gather(-1, tokens)
                torch.autograd.grad(metric(scored, batch.targets).mean(), embeds[:1])

    @torch.no_grad()
    def _embed(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        return self.experiment.model.embed(tokens)

    def _logits(self, tokens: torch.Tensor, embeds: list[torch.Tensor] | None) -> torch.Tensor:
        model = self.experiment.model
        final = model.forward(tokens, embeds).final
        assert final is not None
        return model.unembed(final)

    def measure(self) -> None:
        """Time both passes again."""
        for _ in range(self.repeats):
            self._forward.append(timed(self.forward, self.device)[0])
            self._both.append(timed(self.forward_backward, self.device)[0])

    @property
    def forward_seconds(self) -> float:
        """Median so far."""
        return statistics.median(self._forward)

    @property
    def forward_backward_seconds(self) -> float:
        """Median so far."""
        return statistics.median(self._both)


def _described(experiment: Experiment, passes: Passes) -> dict[str, Any]:
    return {
        "metric": experiment.metric.name,
        "forward_seconds": passes.forward_seconds,
        "forward_backward_seconds": passes.forward_backward_seconds,
        "n_edges": experiment.graph.n_edges,
        "n_prompts": len(experiment.task),
        "n_pos": max(batch.clean.shape[1] for batch in experiment.batches),
    }


def _confirm(what: str, error: float, bound: float) -> float:
    """Return the error; WrongAnswerError if it is above the bound or no number."""
    if not error <= bound:
        raise WrongAnswerError(f"{what}: relative error {error:.2e}, expected at most {bound:g}")
    return error


# ACDC


def acdc_row(group: str, name: str, experiment: Experiment, threshold: float, repeats: int) -> Row:
    """Time one whole ACDC run."""
    passes = Passes(experiment, repeats)
    passes.measure()
    with Peak(passes.device) as peak:
        seconds, (circuit, work) = timed(lambda: acdc(experiment, threshold), passes.device)
    passes.measure()
    removed = circuit.scores[~circuit.in_circuit].sum()
    started = PatchedModel(experiment).metric(np.ones_like(circuit.in_circuit))
    arrived = started + experiment.minimised_sign * float(removed)
    error = _acdc_error(experiment, circuit.in_circuit, arrived)
    ratio = seconds / passes.forward_seconds
    return Row(
        group=group,
        model=name,
        method="acdc",
        unit="forward",
        seconds=seconds,
        ratio=ratio,
        per_evaluation=ratio / max(work.n_evaluations, 1),
        error=_confirm(f"acdc on {name}", error, 1e-3),
        threshold=threshold,
        n_kept=circuit.n_edges,
        n_evaluations=work.n_evaluations,
        n_decisions=work.n_decisions,
        n_wasted=work.n_wasted,
        n_dead=work.n_dead,
        n_nodes=work.n_nodes,
        acceptance=work.n_decisions / max(work.n_decisions + work.n_wasted, 1),
        peak_bytes=peak.n_bytes,
        **_described(experiment, passes),
    )


def sweep_row(
    group: str, name: str, experiment: Experiment, ends: tuple[float, float], repeats: int
) -> Row:
    """Time a sweep of ten thresholds, against the single run at the smallest of them."""
    taus = [float(tau) for tau in np.geomspace(*ends, SWEEP)]
    passes = Passes(experiment, repeats)
    passes.measure()
    single_seconds, (single, _) = timed(lambda: acdc(experiment, taus[-1]), passes.device)
    with Peak(passes.device) as peak:
        seconds, (circuits, work) = timed(lambda: sweep(experiment, taus), passes.device)
    passes.measure()
    differing = int((circuits[taus[-1]].in_circuit != single.in_circuit).sum())
    return Row(
        group=group,
        model=name,
        method=f"acdc sweep, {SWEEP} thresholds",
        unit="acdc at the smallest threshold",
        seconds=seconds,
        ratio=seconds / single_seconds,
        error=_confirm(f"sweep on {name}", differing, 0),
        threshold=taus[-1],
        n_kept=single.n_edges,
        n_evaluations=work.n_evaluations,
        n_nodes=work.n_nodes,
        peak_bytes=peak.n_bytes,
        **_described(experiment, passes),
    )


def _acdc_error(experiment: Experiment, mask: NDArray[np.bool_], arrived: float) -> float:
    patched = PatchedModel(experiment)
    gap = patched.metric(np.ones_like(mask)) - patched.metric(np.zeros_like(mask))
    return abs(patched.metric(mask) - arrived) / abs(gap)


def gap_of(experiment: Experiment) -> float:
    """Return how far apart the metric of the full model and that of no edge are."""
    return abs(experiment.plain("clean") - experiment.plain("corrupt"))


# Attribution


def attribution_rows(group: str, name: str, experiment: Experiment, repeats: int) -> Iterator[Row]:
    """Time EAP and EAP-IG, each between the passes that it is compared with."""
    methods: dict[str, tuple[Callable[..., NDArray[np.float64]], int]] = {
        "eap": (eap, 1),
        "eap-ig": (partial(eap_ig, options=Integration(STEPS)), STEPS),
    }
    for method, (function, steps) in methods.items():
        passes = Passes(experiment, 1)
        scores = function(experiment)
        with Peak(passes.device) as peak:
            function(experiment)
        times = []
        for _ in range(repeats):
            passes.measure()
            times.append(timed(partial(function, experiment), passes.device)[0])
        passes.measure()
        chunked = function(experiment, work=Work(_small_memory(experiment)))
        n_forwards = 1 if method == "eap" else 2
        unit = n_forwards * passes.forward_seconds + steps * passes.forward_backward_seconds
        seconds = statistics.median(times)
        yield Row(
            group=group,
            model=name,
            method=method if method == "eap" else f"{method}, {steps} steps",
            unit=f"{n_forwards} forward + {steps} forward+backward",
            seconds=seconds,
            ratio=seconds / unit,
            error=_confirm(f"{method} on {name}", _difference(scores, chunked), 1e-4),
            peak_bytes=peak.n_bytes,
            **_described(experiment, passes),
        )


def _small_memory(experiment: Experiment) -> int:
    """Return bytes that the senders at an eighth of the tokens take, roughly."""
    model = experiment.model
    n_tokens = max(batch.clean.numel() for batch in experiment.batches)
    return experiment.graph.n_senders * model.d_model * 4 * max(1, n_tokens // 8)


def _difference(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


# TransformerLens


def attribution_peer_rows(
    model: LoweredModel, bridge: Any, size: Size, repeats: int
) -> Iterator[Row]:
    """Time TransformerLens' own edge attribution and ours on the same pairs.

    It works at the corrupt run, towards the clean one, for every position of its own; the sum
    over positions is our EAP in the direction ``denoising``.
    """
    experiment = Experiment(
        model, random_task(size), get_metric("logit_diff"), direction="denoising"
    )
    calls: dict[str, Callable[[], NDArray[np.float64]]] = {
        "eap": lambda: eap(experiment),
        "TransformerLens attribution_patch": _transformer_lens_call(bridge, experiment),
    }
    passes = Passes(experiment, repeats)
    scores, peaks, times = {}, {}, {}
    for method, call in calls.items():
        with Peak(passes.device) as peak:
            scores[method] = call()
        passes.measure()
        peaks[method] = peak.n_bytes
        times[method] = median_seconds(call, passes.device, repeats)
    passes.measure()
    ours, theirs = scores.values()
    error = _confirm("TransformerLens' EAP", _difference(ours, theirs), 1e-3)
    for method, seconds in times.items():
        yield Row(
            group="peers",
            model=size.name,
            method=method,
            unit="1 forward + 1 forward+backward",
            seconds=seconds,
            ratio=seconds / (passes.forward_seconds + passes.forward_backward_seconds),
            error=error,
            peak_bytes=peaks[method],
            **_described(experiment, passes),
        )


def _transformer_lens_call(bridge: Any, experiment: Experiment) -> Callable[[], Any]:
    from transformer_lens.tools.analysis.attribution_patching import (
        EdgeAttributionConfig,
        attribution_patch,
    )

    graph, pairs = experiment.graph, experiment.task.pairs
    config = EdgeAttributionConfig(granularity="edge")
    device = experiment.model.device

    def call() -> NDArray[np.float64]:
        scores = np.zeros(graph.n_edges)
        for pair in pairs:  # its metric does not know which pair it is given
            right, wrong = pair.answers[0], pair.wrong_answers[0]
            found = attribution_patch(
                bridge,
                torch.tensor([pair.clean], device=device),
                torch.tensor([pair.corrupt], device=device),
                _margin(right, wrong),
                config,
            )
            for (writer, reader), score in found.edge_scores.items():
                edge = f"{_name(writer)}->{_name(reader)}"
                scores[graph.edge_index(edge)] += score / len(pairs)
        return scores

    return call


def _margin(right: int, wrong: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda logits: (logits[..., -1, right] - logits[..., -1, wrong]).sum()


def _name(node: Any) -> str:
    """Return our name of a node of TransformerLens'."""
    return {
        "embed": "input",
        "attn_head_out": f"a{node.layer}.h{node.head}",
        "mlp_out": f"m{node.layer}",
        "mlp_in": f"m{node.layer}",
        "q_input": f"a{node.layer}.h{node.head}<q>",
        "k_input": f"a{node.layer}.h{node.head}<k>",
        "v_input": f"a{node.layer}.h{node.head}<v>",
        "logits": "logits",
    }[node.kind]


# All of it


def measure(plan: Plan, device: str) -> Iterator[Row]:
    """Yield the rows of a plan, in order."""
    place = resolve_device(device)
    for scale in plan.scales:
        yield from _small_rows(plan, scale, str(place))
    for n_layers in plan.growth:
        yield from _growth_rows(plan, n_layers, str(place))
    for model, task in plan.bundled:
        experiment = bundled_experiment(model, task, "logit_diff", str(place), plan.bundled_prompts)
        threshold = 0.01 * gap_of(experiment)
        yield acdc_row("bundled", model, experiment, threshold, plan.repeats)
        high, low = (share * gap_of(experiment) for share in plan.sweep_shares)
        yield sweep_row("bundled", model, experiment, (high, low), plan.repeats)
        yield from attribution_rows("bundled", model, experiment, plan.repeats)
        yield _latent_row(plan, model, experiment)
    yield from _peer_rows(plan, str(place))


def _latent_row(plan: Plan, model: str, experiment: Experiment) -> Row:
    """Time ACDC on the best edges between the latents of the bundled dictionaries."""
    attached = attach(experiment, load_dictionaries("bundled", model)).experiment
    narrowed = narrow(attached, plan.candidates, 1 << 30)
    assert narrowed is not None
    few, _ = narrowed
    name = f"{model}, SAEs, {plan.candidates} candidates"
    return acdc_row("bundled", name, few, plan.latent_share * gap_of(experiment), plan.repeats)


def _small_rows(plan: Plan, scale: float, device: str) -> Iterator[Row]:
    size = Size(**asdict(plan.small) | {"scale": scale})
    task = random_task(size)
    with random_model(size, device) as model:
        for at, metric, threshold in plan.thresholds:
            if at == scale:
                experiment = Experiment(model, task, get_metric(metric))
                yield acdc_row("ACDC", size.name, experiment, threshold, plan.repeats)
        at, metric, high, low = plan.sweep
        if at == scale:
            experiment = Experiment(model, task, get_metric(metric))
            yield sweep_row("ACDC", size.name, experiment, (high, low), plan.repeats)
        if scale == plan.scales[0]:
            experiment = Experiment(model, task, get_metric("logit_diff"))
            yield from attribution_rows("attribution", size.name, experiment, plan.repeats)


def _growth_rows(plan: Plan, n_layers: int, device: str) -> Iterator[Row]:
    changed = {"n_layers": n_layers, "n_prompts": plan.growth_prompts}
    size = Size(**asdict(plan.small) | changed)
    with random_model(size, device) as model:
        experiment = Experiment(model, random_task(size), get_metric("logit_diff"))
        rows = attribution_rows("growth", size.name, experiment, plan.repeats)
        yield next(rows)
        threshold = plan.growth_share * gap_of(experiment)
        yield acdc_row("growth", size.name, experiment, threshold, plan.repeats)


def _peer_rows(plan: Plan, device: str) -> Iterator[Row]:
    size = plan.peer
    with random_model(size, device) as model:
        bridge = random_bridge(size, device)
        yield from attribution_peer_rows(model, bridge, size, plan.repeats)
        experiment = Experiment(model, random_task(size), get_metric("kl"))
        yield acdc_row("peers", size.name, experiment, plan.peer_threshold, plan.repeats)


# Showing and writing


def read_peers(path: Path) -> list[Row]:
    """Read the rows that a peer's script wrote (see ``benchmarks/peers.sh``).

    Raises
    ------
    InputError
        If the file cannot be read, or a row is none; the message names it.
    """
    content = read_json(path, _MOST_BYTES)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise InputError(f"{path}: no 'rows': give what benchmarks/peers.sh writes")
    return [_row(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


def _row(where: str, content: Any) -> Row:
    if not isinstance(content, dict):
        raise InputError(f"{where} is no object: give what benchmarks/peers.sh writes")
    for one in fields(Row):
        needed = one.default is MISSING and one.name not in content
        value = content.get(one.name, 0 if one.type != "str" else "")
        number = type(value) in (int, float) and abs(value) < math.inf
        fits = number or (value is None and "None" in str(one.type))
        if needed or not (isinstance(value, str) if one.type == "str" else fits):
            raise InputError(f"{where}: {one.name} is {value!r}, expected {one.type}")
    return Row(**{one.name: content[one.name] for one in fields(Row) if one.name in content})


def write(path: Path, rows: Iterable[Row], device: str, plan: Plan | None = None) -> None:
    """Write rows and conditions as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "version": 1,
        "conditions": conditions(resolve_device(device)),
        "units": {
            "forward": "lowered forward, logits of the whole vocabulary at all positions",
            "forward+backward": (
                "the same, and backward of the mean metric at the last position to the "
                "embeddings; weights frozen"
            ),
            "peak_bytes": "growth of the resident set (CUDA: of the allocator's peak) in the run",
        },
        "plan": None if plan is None else _plain(plan),
        "rows": [asdict(row) for row in rows],
    }
    write_json(path, content)


def _plain(plan: Plan) -> dict[str, Any]:
    return dict(json.loads(json.dumps(asdict(plan))))


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row.method,
    "metric": lambda row: row.metric,
    "tau": lambda row: _number(row.threshold, "{:.3g}"),
    "forward s": lambda row: f"{row.forward_seconds:.3g}",
    "fwd+bwd s": lambda row: _number(row.forward_backward_seconds, "{:.3g}"),
    "run s": lambda row: f"{row.seconds:.3g}",
    "ratio": lambda row: f"{row.ratio:.3g}",
    "per eval.": lambda row: _number(row.per_evaluation, "{:.3g}"),
    "evaluations": lambda row: _number(row.n_evaluations, "{:,}"),
    "accepted": lambda row: _number(row.acceptance, "{:.0%}"),
    "nodes": lambda row: _number(row.n_nodes, "{:,}"),
    "kept": lambda row: _number(row.n_kept, "{:,}"),
    "peak MiB": lambda row: _number(row.peak_bytes and row.peak_bytes / 2**20, "{:.0f}"),
}


def _number(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def run_table(rows: Iterable[Row]) -> Table:
    """Return a table of rows, a section for each group and model."""
    table = Table(title="whole runs, as multiples of the model's own passes", title_justify="left")
    for i, name in enumerate(_COLUMNS):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    section = None
    for row in rows:
        if (row.group, row.model) != section:
            section = (row.group, row.model)
            table.add_section()
            table.add_row(f"[bold]{row.group}: {row.model}[/]", *[""] * (len(_COLUMNS) - 1))
        table.add_row(*(cell(row) for cell in _COLUMNS.values()))
    return table
