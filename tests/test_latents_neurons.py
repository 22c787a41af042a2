"""Neurons of MLPs as nodes: they add up to the MLP, and each scores what a hook on it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from oracle import small_model
from test_attribution import build
from test_parity import DATA
from test_parity import experiment as parity_experiment
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module

from acdc.cli import main
from acdc.dictionaries.attach import MOST_NEURONS, attach_neurons
from acdc.dictionaries.neurons import Neurons, neurons_of
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import PatchedModel
from acdc.errors import OptionError, UnsupportedModelError
from acdc.methods import METHODS
from acdc.methods.eap import Integration, eap, eap_ig
from acdc.methods.nap import nap
from acdc.models import load_model
from acdc.models.lowering import lower
from acdc.models.lowering.model import FeedForward
from acdc.runs.discover import discover, measure
from acdc.tasks import load_task
from acdc.tasks.base import Task
from graphs.errors import GraphError
from graphs.files.formats import load_circuit
from graphs.sites import Site, parse_latent, sites_from_text, sites_to_text

WITH_MLPS = ("LN", "RMS", "gated rotary", "grouped", "GPTNeoX", "GPTNeo", "Qwen3", "Gemma2")
OPTIONS = [{}, {"intervention": "zero", "direction": "denoising"}]


def split(experiment: Experiment, most: int | None = None) -> Experiment:
    return attach_neurons(experiment, max_neurons=most).experiment


def owner(sender: str) -> str:
    return sender.split(".")[0] if sender[0] == "m" else sender


# --- the whole ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=["resample", "zero"])
@pytest.mark.parametrize("family", WITH_MLPS)
def test_all_neurons_are_the_model(family: str, options: dict[str, str]) -> None:
    experiment, _ = build(family, 5, **options)
    neurons = split(experiment)
    every = np.ones(neurons.graph.n_edges, dtype=bool)
    full = PatchedModel(neurons).full_values().mean()
    assert PatchedModel(neurons).metric(every) == pytest.approx(full, abs=1e-5)
    ours, theirs = (
        PatchedModel(neurons).metric(~every),
        PatchedModel(experiment).metric(np.zeros(experiment.graph.n_edges, dtype=bool)),
    )
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize(
    "method", [eap, lambda e: eap_ig(e, Integration(3))], ids=["eap", "eap-ig"]
)
@pytest.mark.parametrize("most", [None, 5])
@pytest.mark.parametrize("family", WITH_MLPS)
def test_neurons_and_the_rest_score_what_the_mlp_does(
    family: str, most: int | None, method: Callable[..., Any]
) -> None:
    """Edge by edge: EAP is linear in what the sender writes."""
    experiment, _ = build(family, 2)
    neurons = split(experiment, most)
    sums: dict[str, float] = {}
    names = zip(neurons.graph.edge_names(), method(neurons), strict=True)
    for edge, score in names:
        sender, receiver = edge.split("->")
        key = f"{owner(sender)}->{receiver}"
        sums[key] = sums.get(key, 0.0) + score
    wanted = dict(zip(experiment.graph.edge_names(), method(experiment), strict=True))
    largest = max(map(abs, wanted.values()))
    assert sums.keys() == wanted.keys()
    assert max(abs(sums[edge] - wanted[edge]) for edge in wanted) < 1e-5 * largest


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_hugging_face_models(family: str) -> None:
    """GPT-2 keeps its matrices transposed; Llama has a gate."""
    config = {
        "GPT2": {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 16},
        "Llama": {
            "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2,
            "intermediate_size": 24, "max_position_embeddings": 16,
        },
    }[family]  # fmt: skip
    cfg = getattr(transformers, f"{family}Config")(vocab_size=20, **config)
    cfg._attn_implementation = "eager"
    architecture = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        module = getattr(transformers, architecture)(cfg).eval()
    bridge = build_bridge_from_module(
        module, architecture, hf_config=cfg, dtype=torch.float32, device="cpu", model_name=family
    )
    found = neurons_of(lower(bridge))
    assert [n.n_latents for n in found] == [32 if family == "GPT2" else 24] * 2


@pytest.mark.parametrize("family", ["LN", "gated rotary"])
def test_only_the_best_are_nodes(family: str) -> None:
    experiment, _ = build(family, 3)
    whole, few = attach_neurons(experiment), attach_neurons(experiment, max_neurons=4)
    assert whole.folded_share == 0 < few.folded_share < 1
    scores = dict(zip(whole.experiment.graph.senders, nap(whole.experiment), strict=True))
    some = [s for s in few.experiment.graph.senders if ".n" in s]
    assert len(some) == 4 < MOST_NEURONS
    assert set(some) <= scores.keys()
    assert {s.architecture for s in few.sites} == {"neurons"}
    assert attach_neurons(experiment).experiment.graph.n_senders > few.experiment.graph.n_senders


# --- single neurons, against hooks on the model's own modules ------------------------------


def hooked_metric(experiment: Experiment, layer: int, neuron: int, share: float) -> float:
    """Metric when ``share`` of one neuron's change between the runs is put in by a hook."""
    model, total = experiment.model, 0.0
    mlp = model.layers[layer].mlp
    assert isinstance(mlp, FeedForward)
    for batch in experiment.batches:
        base, other = experiment.runs(batch)
        seen: list[Tensor] = []
        handle = mlp.writer.register_forward_pre_hook(lambda _, x, to=seen: to.append(x[0].clone()))
        model.forward(other)
        handle.remove()
        target = torch.zeros_like(seen[0]) if experiment.intervention == "zero" else seen[0]

        def ablate(_: Any, x: tuple[Tensor], target: Tensor = target) -> Tensor:
            hidden = x[0].clone()
            change = target[..., neuron] - hidden[..., neuron]
            hidden[..., neuron] += share * change
            return hidden

        handle = mlp.writer.register_forward_pre_hook(ablate)
        final = model.forward(base).final
        handle.remove()
        assert final is not None
        total += float(experiment.measure(final[:, batch.scored].flatten(0, 1), batch))
    return total / experiment.n_rows


def check_against_hooks(experiment: Experiment, chosen: list[str], eps: float) -> None:
    """Node attribution is the derivative, and ablating all edges the whole effect."""
    neurons = split(experiment)
    graph = neurons.graph
    scores = nap(neurons)
    largest = float(np.abs(scores).max())
    for name in chosen:
        _, _, layer, neuron = parse_latent(name) or ("", "", 0, 0)
        ends = [hooked_metric(experiment, layer, neuron, s) for s in (eps, -eps)]
        u = graph.sender_index[name]
        assert abs(scores[u] - (ends[0] - ends[1]) / (2 * eps)) < 1e-3 * largest, name
        whole = hooked_metric(experiment, layer, neuron, 1.0)
        assert PatchedModel(neurons).metric(graph.edge_sender != u) == pytest.approx(
            whole, abs=1e-4
        )


@pytest.mark.parametrize("options", OPTIONS, ids=["resample", "zero"])
@pytest.mark.parametrize("family", ["LN", "gated rotary", "GPTNeoX", "Qwen3"])
def test_a_neuron_scores_what_a_hook_on_it_does(family: str, options: dict[str, str]) -> None:
    experiment, _ = build(family, 1, **options)
    chosen = [s for s in split(experiment).graph.senders if ".n" in s]
    check_against_hooks(experiment, chosen[::3], 1e-2 if family == "Qwen3" else 1e-3)


def test_neurons_of_the_bundled_model() -> None:
    model, tokenizer = load_model("ioi-small")
    task = load_task("ioi", tokenizer, n_prompts=8, seed=0)
    experiment = Experiment(model, task, get_metric("logit_diff"))
    neurons = split(experiment)
    scores = nap(neurons)
    order = np.argsort(-np.abs(scores))
    best = [neurons.graph.senders[u] for u in order if ".n" in neurons.graph.senders[u]]
    check_against_hooks(experiment, best[:4], 1e-2)
    every = np.ones(neurons.graph.n_edges, dtype=bool)
    assert PatchedModel(neurons).metric(every) == pytest.approx(experiment.plain("clean"), abs=1e-4)


# --- methods, files -----------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str) -> None:
    case = parity_experiment("ln2", "logit_diff")
    neurons = split(replace(case, task=Task("few", case.task.pairs[:4])), 12)
    asked = {"threshold": 0.1} if name == "acdc" else {"n_edges": 80}
    found = METHODS[name].find(neurons, **asked)
    assert 0 < found.circuit.n_edges < neurons.graph.n_edges


def prompts(folder: Path) -> str:
    path = folder / "pairs.jsonl"
    rows = [
        {name: getattr(p, name) for name in ("clean", "corrupt", "answers", "wrong_answers")}
        for p in parity_experiment("ln2", "logit_diff").task.pairs[:6]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_saved_circuit_is_measured_again(tmp_path: Path) -> None:
    options = {"model": str(DATA / "ln2"), "method": "eap-ig", "metric": "logit_diff"}
    run = discover(prompts(tmp_path), **options, neurons=True, max_latents=9, n_edges=90)
    run.save(tmp_path / "run")
    circuit = load_circuit(tmp_path / "run" / "circuit.json")
    assert {s.kind for s in circuit.graph.shape.sites} == {"neurons"}
    assert sum(len(s.latents) for s in circuit.graph.shape.sites) == 9
    found, _ = measure(circuit, replace(run.settings, neurons=False, max_latents=None))
    assert found.faithfulness == pytest.approx(run.evaluation.faithfulness)
    with pytest.raises(OptionError, match="has neurons, not latents: leave --saes out"):
        measure(circuit, replace(run.settings, neurons=False, max_latents=None, saes="bundled"))


def test_a_page_of_a_run_with_neurons(tmp_path: Path) -> None:
    options = {"model": str(DATA / "ln2"), "method": "eap-ig", "metric": "logit_diff"}
    run = discover(prompts(tmp_path), **options, neurons=True, max_latents=9, n_edges=90)
    run.save(tmp_path / "run")
    with pytest.raises(SystemExit) as caught:
        main(["report", str(tmp_path / "run"), "--no-tests", "--out", str(tmp_path / "a.html")])
    assert caught.value.code == 0
    name = next(s for s in run.circuit.graph.senders if ".n" in s)
    layer, neuron = name[1], name.split(".n")[1]
    assert f"neuron {neuron} of m{layer}" in (tmp_path / "a.html").read_text()


def test_names_and_texts() -> None:
    site = Site("neurons", 3, (5, 12))
    assert site.nodes == ("m3.n5", "m3.n12", "m3.err")
    assert parse_latent("m3.n12") == ("latent", "m", 3, 12)
    assert parse_latent("a3.n12") is None
    assert sites_from_text(sites_to_text([site])) == (site,)
    with pytest.raises(GraphError, match="ascending"):
        Site("neurons", 3, (12, 5))


# --- bad input ----------------------------------------------------------------------------


def test_a_model_without_mlps(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="has attention only, no MLPs; leave --neurons out"):
        neurons_of(small_model("attention only", 0))


def test_an_mlp_that_is_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("LN", 0)
    monkeypatch.setattr(Neurons, "encode", lambda self, x: self.mlp.neurons(x)[0] ** 2)
    with pytest.raises(UnsupportedModelError, match="neurons of m0 of 'LN' do not add up"):
        neurons_of(model)


def test_a_circuit_of_a_wider_model() -> None:
    experiment, _ = build("LN", 0)
    with pytest.raises(OptionError, match=r"neuron 99 of m1, which has 16 in 'LN'"):
        attach_neurons(experiment, neurons={1: (3, 99)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--neurons", "--saes", "bundled"], "saes 'bundled' and neurons: give one of them"),
        (["--neurons", "--max-latents", "0"], "max_latents 0: expected at least 1"),
        (["--max-latents", "5"], "max_latents 5 does nothing without latents: leave it out"),
        (
            ["--neurons", "--model", "docstring-small"],
            "neurons: 'docstring-small' has attention only, no MLPs; leave --neurons out",
        ),
    ],
)
def test_one_line_and_status_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    task = "docstring" if "docstring-small" in options else "ioi"
    with pytest.raises(SystemExit) as caught:
        main(["discover", task, *options, "--out", str(tmp_path / "run")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"acdc: {message}"
    assert not (tmp_path / "run").exists()
