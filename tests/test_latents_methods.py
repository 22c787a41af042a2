"""Methods on latents: each against a slow, independent computation of the same numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from grids import each_level
from latent_oracle import LatentOracle, LatentPass
from test_latents import SETS, build

from acdc.engine.experiment import Experiment
from acdc.engine.patched import PatchedModel, metric_of_circuit
from acdc.errors import OptionError
from acdc.methods import METHODS
from acdc.methods.candidates import narrow
from acdc.methods.eap import Integration, eap, eap_ig_activations
from acdc.methods.gim import gim
from acdc.methods.hisp import hisp
from acdc.methods.ifr import ifr
from acdc.methods.masks import Training, edge_pruning, subnetwork_probing
from acdc.models.lowering.gim import GimRules
from acdc.tasks.base import Task

FAMILIES = ["LN", "GPTNeoX", "Gemma2"]


def by_name(experiment: Experiment, scores: np.ndarray) -> dict[str, float]:
    return dict(zip(experiment.graph.edge_names(), scores.tolist(), strict=True))


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_information_flow_are_those_of_explicit_vectors(family: str, which: str) -> None:
    experiment, slow = build(family, which)
    wanted: dict[str, float] = dict.fromkeys(experiment.graph.edge_names(), 0.0)
    for pair in experiment.task.pairs:
        with torch.no_grad():
            run = LatentPass(experiment.model, torch.tensor([pair.clean]), slow.dictionaries)
        for edges in run.by_receiver:
            parts = {edge: linear(run, edge.split("->")[0]) for edge in edges}
            biases = sum_of_biases(run, edges)
            whole = torch.stack(list(parts.values())).sum(0) + biases
            size = whole.abs().sum(-1)
            near = {e: (size - (whole - x).abs().sum(-1)).clamp(min=0) for e, x in parts.items()}
            total = torch.stack(list(near.values())).sum(0)
            for edge, value in near.items():
                share = (value / total.where(total > 0, 1)).mean()
                wanted[edge] += float(share) / len(experiment.task)
    found = by_name(experiment, ifr(experiment))
    for edge, share in wanted.items():
        assert found[edge] == pytest.approx(share, abs=2e-4), edge


def linear(run: LatentPass, sender: str) -> torch.Tensor:
    """What the stream reads of a sender, a post-norm's scale being that of the run."""
    layer = run.through_post(sender)
    if layer is None:
        return run.out[sender]
    block = run.model.layers[layer]
    raw = sum(run.out[u] for u in run.out if run.through_post(u) == layer)
    raw = raw if block.attention.b_O is None else raw + block.attention.b_O
    return replace(block.attention_post, frozen=True).jvp(raw, run.out[sender])


def sum_of_biases(run: LatentPass, edges: list[str]) -> torch.Tensor:
    """The rest of what a receiver reads: b_O of the layers whose attention it sees."""
    seen = {edge.split("->")[0] for edge in edges}
    total = torch.zeros(run.model.d_model)
    for i, layer in enumerate(run.model.layers):
        b_O = layer.attention.b_O
        written = any(u.startswith((f"a{i}.h", f"a{i}.f", f"a{i}.err")) for u in seen)
        absorbed = layer.attention_post is not None
        if b_O is not None and written and not absorbed:
            total = total + b_O
        if b_O is not None and written and absorbed and run.through_post(f"a{i}.err") == i:
            raw = sum(run.out[u] for u in run.out if run.through_post(u) == i) + b_O
            total = total + replace(layer.attention_post, frozen=True).jvp(raw, b_O)[0, 0]
    return total


@pytest.mark.parametrize(("family", "which"), each_level(FAMILIES, tuple(SETS)))
def test_edges_out_of_a_site_add_up_to_its_effect(family: str, which: str) -> None:
    experiment, _ = build(family, which)
    graph = experiment.graph
    few, many = (eap_ig_activations(experiment, Integration(n)) for n in (40, 80))
    scores = 2 * many - few  # the error of the sum falls as 1 / steps
    full = metric_of_circuit(experiment, np.ones(graph.n_edges, dtype=bool))
    place = np.array([name.split(".")[0] for name in graph.senders])
    for site in dict.fromkeys(place[~graph.source[:-1]]):
        out = place[graph.edge_sender] == site
        effect = metric_of_circuit(experiment, ~out) - full
        assert scores[out].sum() == pytest.approx(effect, abs=0.03 * abs(effect) + 0.03), site


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gim_without_rules_is_eap_and_parts_of_a_site_share_its_score(
    family: str, which: str
) -> None:
    experiment, _ = build(family, which)
    rules = GimRules(1.0, False, 1.0, 1.0, 1.0)
    plain = eap(experiment)
    np.testing.assert_allclose(gim(experiment, rules=rules), plain, atol=2e-5 * np.abs(plain).max())
    if which != "outputs":
        return
    # SAEs of outputs split senders alone: their parts add up to the component's edges.
    bare = replace(experiment, attachments=())
    whole, split = by_name(bare, gim(bare)), by_name(experiment, gim(experiment))
    sums: dict[str, float] = {}
    for edge, score in split.items():
        u, v = edge.split("->")
        u = u.split(".")[0] if u.split(".")[0][0] in "am" else u
        sums[f"{u}->{v}"] = sums.get(f"{u}->{v}", 0.0) + score
    largest = max(map(abs, whole.values()))
    for edge, score in whole.items():
        u, v = edge.split("->")
        if u[0] == "m":
            assert sums[edge] == pytest.approx(score, abs=1e-4 * largest), edge


@pytest.mark.parametrize("which", SETS)
def test_hisp_is_the_mean_absolute_derivative_of_the_prompts(which: str) -> None:
    experiment, slow = build("LN", which)
    total = np.zeros(experiment.graph.n_senders)
    for pair in experiment.task.pairs:
        alone = LatentOracle(
            experiment.model, Task("one", (pair,)), "logit_diff", slow.dictionaries
        )
        derivatives = alone.derivatives()
        edges = np.array([derivatives[e] for e in experiment.graph.edge_names()])
        total += np.abs(np.bincount(experiment.graph.edge_sender, edges, len(total)))
    wanted = total / len(experiment.task)
    np.testing.assert_allclose(hisp(experiment), wanted, atol=2e-3 * wanted.max())


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_weights_are_those_of_explicit_edges(family: str, which: str) -> None:
    experiment, slow = build(family, which)
    graph, model = experiment.graph, PatchedModel(experiment)
    weights = torch.ones(graph.n_edges, requires_grad=True)
    total = sum(model.rows(i, weights).sum() for i in range(len(experiment.batches)))
    (gradient,) = torch.autograd.grad(total / experiment.n_rows, weights)
    wanted = slow.derivatives()
    largest = max(map(abs, wanted.values()))
    for edge, value in by_name(experiment, -gradient.numpy()).items():
        assert value == pytest.approx(wanted[edge], abs=2e-3 * largest), edge


@pytest.mark.parametrize("which", SETS)
def test_weights_of_senders_are_those_of_all_their_edges(which: str) -> None:
    experiment, _ = build("Gemma2", which)
    graph, model = experiment.graph, PatchedModel(experiment)
    rng = np.random.default_rng(0)
    for i, batch in enumerate(experiment.batches):
        weights = torch.tensor(rng.random((batch.n_prompts, graph.n_senders))).float()
        edges = weights[:, torch.as_tensor(graph.edge_sender)]
        found = model.rows(i, weights, of_senders=True)
        torch.testing.assert_close(found, model.rows(i, edges), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("which", SETS)
def test_edges_into_logits_are_cut_as_by_a_mask(which: str) -> None:
    experiment, _ = build("Gemma2", which)
    graph, model = experiment.graph, PatchedModel(experiment)
    rng = np.random.default_rng(0)
    mask = rng.random(graph.n_edges) < 0.8
    cuts = rng.random((4, graph.n_senders)) < 0.5
    found = model.values_at_logits(mask, cuts)
    last = graph.edge_receiver == len(graph.receivers) - 1
    for cut, values in zip(cuts, found, strict=True):
        wanted = model.values(mask & ~(last & cut[graph.edge_sender]))
        np.testing.assert_allclose(values, wanted, atol=1e-5)


def test_masks_of_edges_are_trained_on_candidates() -> None:
    experiment, _ = build("LN", "outputs")
    n_edges = experiment.graph.n_edges
    asked = {"sparsity": 0.95, "mask_steps": 20, "candidates": 60}
    found = METHODS["edge-pruning"].find(experiment, **asked)
    narrowed = narrow(experiment, 60, 1 << 30)
    assert narrowed is not None
    few, candidates = narrowed
    kept = round((1 - 0.95) * n_edges)
    alone = edge_pruning(few, Training(1 - kept / few.graph.n_edges, 20))
    np.testing.assert_array_equal(found.circuit.scores[candidates], alone)
    assert not found.circuit.scores[~candidates].any()
    assert found.circuit.n_edges == kept
    with pytest.raises(OptionError, match=r"keeps 65 of 130 edges, of which \d+ have masks"):
        METHODS["edge-pruning"].find(experiment, **{**asked, "sparsity": 0.5})


def test_masks_of_latents_are_trained() -> None:
    experiment, _ = build("LN", "transcoders")
    scores = subnetwork_probing(experiment, Training(0.8, mask_steps=60, learning_rate=0.6))
    assert scores.shape == (experiment.graph.n_senders,)
    assert (scores[experiment.graph.source[:-1]] == 1).all()
    assert scores.min() < 0.5 < scores.max()
