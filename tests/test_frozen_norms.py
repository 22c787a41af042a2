"""Norms frozen at the base run, held against a forward pass in which every scale is written out.

The oracle's scales are recorded in a plain pass of :mod:`oracle` over the base run's tokens, by the
norm that is called, in the order of the calls, and put back in every other pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle as o
import pytest
import torch
from grids import each_level
from torch import Tensor
from typer.testing import CliRunner

import acdc
from acdc.cli import app
from acdc.dictionaries.attach import attach_neurons
from acdc.engine.experiment import Experiment
from acdc.engine.incremental import IncrementalRun
from acdc.engine.metrics import get_metric
from acdc.engine.patched import PatchedModel
from acdc.measure.evaluation import Evaluator
from acdc.methods import METHODS
from acdc.methods.exact import exact
from acdc.models.lowering import LoweredModel
from acdc.runs.building import load_experiment
from graphs import Circuit
from graphs.files.formats import load_circuit

FAMILIES = ("LN", "RMS", "LNPre", "grouped rotary", "Qwen3", "Gemma2", "Olmo2")
NEAR: dict[str, float] = {"rel": 1e-5, "abs": 2e-6}
"""RMSNorm modules compute in float32 whatever the model's type, the norms written out do not."""


class ByHand:
    """A norm that records its scales in one pass and divides by them in later ones."""

    def __init__(self, norm: Any) -> None:
        module = norm.module
        self.kind, self.eps, self.weight = norm.kind, norm.eps, norm.weight
        self.bias = getattr(module, "bias", None)
        self.scales: list[Tensor] = []
        self.n_recorded: int | None = None
        self.n_calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        if self.kind == "LN":
            x = x - x.mean(-1, keepdim=True)
        if self.n_recorded is None:
            self.scales.append((x.square().mean(-1, keepdim=True) + self.eps).sqrt())
            scale = self.scales[-1]
        else:
            scale = self.scales[self.n_calls % self.n_recorded]
            self.n_calls += 1
        x = x / scale
        x = x if self.weight is None else x * self.weight
        return x if self.bias is None else x + self.bias

    def freeze(self) -> None:
        self.n_recorded = len(self.scales)


class SharedByHand(ByHand):
    """A norm on all heads together, likewise."""

    def __init__(self, shared: Any) -> None:
        super().__init__(SimpleNamespace(module=None, kind="RMS", eps=shared.norm.eps, weight=None))
        self.shared = shared

    def inverse(self, read: Tensor) -> Tensor:
        every = read @ self.shared.W
        every = every if self.shared.b is None else every + self.shared.b
        return (self(every) / every)[..., :1]


def frozen_by_hand(model: LoweredModel, base: Tensor) -> LoweredModel:
    """The model with the scales of a plain pass over ``base [batch, pos]``."""
    norms: list[ByHand] = []

    def by_hand(norm: Any) -> Any:
        if norm is None:
            return None
        norms.append(ByHand(norm))
        return norms[-1]

    layers = []
    for layer in model.layers:
        mlp = layer.mlp
        if mlp is not None:
            mlp = replace(mlp, norm=by_hand(mlp.norm), post=by_hand(mlp.post))
            mlp = _as_function(mlp)
        attention = layer.attention
        qk = {kind: by_hand(norm) for kind, norm in attention.norm.items()}
        shared = {kind: SharedByHand(one) for kind, one in attention.shared.items()}
        norms += shared.values()
        layers.append(
            replace(
                layer,
                ln1=by_hand(layer.ln1),
                attention=replace(attention, norm=qk, shared=shared),
                attention_post=by_hand(layer.attention_post),
                mlp=mlp,
            )
        )
    frozen = replace(model, layers=tuple(layers), ln_final=by_hand(model.ln_final))
    with torch.no_grad():
        frozen.unembed(o.Pass(frozen, base).final)
    for norm in norms:
        norm.freeze()
    return frozen


def _as_function(mlp: Any) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        out = mlp.module(mlp.norm(x))
        return out if mlp.post is None else mlp.post(out)

    return run


class FrozenOracle(o.Oracle):
    """As the oracle; ablated edges carry what they do with live norms."""

    def __init__(self, model: LoweredModel, *args: Any, **more: Any) -> None:
        super().__init__(model, *args, **more)
        self.by_group = [frozen_by_hand(model, base) for _, base, _, _ in self.groups]

    def metric(self, share: Any) -> float:
        live, groups, spans = self.model, self.groups, self.spans
        total = 0.0
        for frozen, group, some in zip(self.by_group, groups, spans, strict=True):
            self.model, self.groups, self.spans = frozen, [group], [some]
            total += super().metric(share)
        self.model, self.groups, self.spans = live, groups, spans
        return total


def _both(
    family: str, seed: int = 0, metric: str = "logit_diff", **more: Any
) -> tuple[Experiment, FrozenOracle]:
    model = o.small_model(family, seed, dtype=torch.float64)
    task = o.small_task(seed, n_prompts=3)
    found = Experiment(model, task, get_metric(metric), norms="frozen", **more)
    return found, FrozenOracle(model, task, metric, **more)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("metric", "intervention", "direction"),
    [
        ("logit_diff", "resample", "noising"),
        ("kl", "resample", "denoising"),
        ("kl", "zero", "noising"),
        ("logit_diff", "mean", "noising"),
    ],
)
def test_patched_runs_have_the_scales_of_the_base_run(
    family: str, metric: str, intervention: Any, direction: Any
) -> None:
    ours, slow = _both(family, 1, metric, intervention=intervention, direction=direction)
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 0.7, 1.0):
        mask = rng.random(ours.graph.n_edges) < share
        found = PatchedModel(ours).metric(mask)
        expected = slow.without(set(o.share_of(ours.graph, ~mask)))
        assert found == pytest.approx(expected, **NEAR)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("intervention", ["resample", "zero"])
def test_exact_and_acdc_are_those_of_frozen_norms(family: str, intervention: Any) -> None:
    ours, slow = _both(family, 2, "kl", intervention=intervention)
    names = ours.graph.edge_names()
    expected = o.exact_scores(slow)
    assert exact(ours) == pytest.approx([expected[name] for name in names], **NEAR)
    found = METHODS["acdc"].find(ours, threshold=0.01).circuit
    sequential = o.sequential_acdc(slow, 0.01)
    assert sequential.margin > 1e-9
    assert {names[e] for e in np.flatnonzero(found.in_circuit)} == sequential.kept


@pytest.mark.parametrize("family", FAMILIES)
def test_attribution_is_the_derivative_with_frozen_norms(family: str) -> None:
    ours, slow = _both(family, 3)
    expected = o.edge_scores_by_finite_differences(slow, 1e-3)
    found = METHODS["eap"].scores(ours)
    wanted = [expected[name] for name in ours.graph.edge_names()]
    assert found == pytest.approx(wanted, **NEAR)
    live = METHODS["eap"].scores(replace(ours, norms="live"))
    assert np.abs(live - found).max() > 1e-3  # the case tells the two apart


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_go_along_frozen_norms(family: str) -> None:
    """Completeness: edges out of the embeddings add up to the difference between the ends."""
    ours, slow = _both(family, 4)
    steps = 400
    scores = METHODS["eap-ig"].scores(ours, METHODS["eap-ig"].options(steps=steps))
    out = np.isin(ours.graph.edge_sender, np.flatnonzero(ours.graph.source[:-1]))
    ends = [0.0, 0.0]
    with torch.no_grad():
        for frozen, (pairs, base, _, clean) in zip(slow.by_group, slow.groups, strict=True):
            other = torch.tensor([pair.corrupt for pair in pairs])
            for i, tokens in enumerate((base, other)):
                run = o.Pass(frozen, base, embeds=frozen.embed(tokens))
                logits = frozen.unembed(run.final).numpy()[:, -1]
                ends[i] += sum(map(o.logit_diff, logits, clean[:, -1], pairs))
    assert scores[out].sum() == pytest.approx((ends[1] - ends[0]) / 3, abs=2e-2)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_runs_with_frozen_norms(method: str) -> None:
    ours, _ = _both("Gemma2", 5)
    takes = METHODS[method].option_names
    asked: dict[str, Any] = {"mask_steps": 10} if "mask_steps" in takes else {}
    asked |= {"threshold": 0.01} if METHODS[method].over == "circuit" else {}
    found = METHODS[method].find(ours, **asked).circuit
    assert isinstance(found, Circuit)
    assert np.isfinite(found.scores).all()


@pytest.mark.parametrize(
    ("family", "alone"), each_level(["LN", "gated rotary", "Gemma2"], [False, True])
)
def test_neurons_with_frozen_norms_add_up_to_their_mlp(family: str, alone: bool) -> None:
    ours, slow = _both(family, 6, "kl")
    neurons = attach_neurons(ours, max_neurons=6, alone=alone).experiment
    full = np.ones(neurons.graph.n_edges, dtype=bool)
    assert PatchedModel(neurons).metric(full) == pytest.approx(slow.without(()), **NEAR)
    run = IncrementalRun(neurons, 1 << 28)
    graph = neurons.graph
    for receiver in reversed(range(len(graph.receivers))):
        edges = np.flatnonzero(graph.edge_receiver == receiver)
        values, _ = run.evaluate(edges, np.eye(len(edges), dtype=bool))
        for edge, value in zip(edges, values, strict=True):
            mask = full.copy()
            mask[edge] = False
            assert value == pytest.approx(PatchedModel(neurons).metric(mask), **NEAR)
        run.finish(receiver, edges)


@pytest.mark.parametrize("norms", ["live", "frozen"])
@pytest.mark.parametrize("family", ["LN", "gated rotary", "Gemma2"])
def test_neurons_that_read_alone_are_attributed_what_weights_say(family: str, norms: Any) -> None:
    """Derivatives by the weights of edges in a patched run, which knows nothing of slopes."""
    ours, _ = _both(family, 3)
    neurons = attach_neurons(replace(ours, norms=norms), max_neurons=6, alone=True).experiment
    patched, total = PatchedModel(neurons), 0.0
    weights = torch.ones(neurons.graph.n_edges, dtype=torch.float64, requires_grad=True)
    for i in range(len(neurons.batches)):
        total = total + patched.rows(i, weights).sum() / neurons.n_rows
    (wanted,) = torch.autograd.grad(total, weights)
    assert METHODS["eap"].scores(neurons) == pytest.approx((-wanted).numpy(), **NEAR)


def test_a_run_says_what_frozen_norms_change(tmp_path: Any) -> None:
    folder = tmp_path / "run"
    command = f"discover ioi --method eap --edges 40 --n-prompts 8 --norms frozen --out {folder}"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    assert "norms frozen, live" in result.output
    summary = json.loads((folder / "run.json").read_text())
    assert summary["norms"] == "frozen"
    found = summary["faithfulness_by_norms"]
    assert found["frozen"] == summary["faithfulness_seen"] != found["live"]
    live = acdc.discover("ioi", method="eap", n_edges=40, n_prompts=8)
    assert "faithfulness_by_norms" not in live.details
    assert "norms frozen" not in json.dumps(live.summary())
    # the same edges with live norms
    experiment, _ = load_experiment(live.settings)
    circuit = load_circuit(folder / "circuit.json")
    assert Evaluator(experiment).faithfulness(circuit.in_circuit) == pytest.approx(found["live"])
    again = CliRunner().invoke(app, ["evaluate", str(folder), "--no-tests"])
    assert again.exit_code == 0, again.output
