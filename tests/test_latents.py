"""Latents as nodes, against a slow forward pass in which every edge is explicit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latent_oracle import N_LATENTS, LatentOracle, place, random_dictionary
from oracle import sequential_acdc, small_model, small_task

from acdc.dictionaries import Dictionary, write_dictionary
from acdc.dictionaries.attach import attach
from acdc.engine.attribution import node_scores
from acdc.engine.experiment import Experiment
from acdc.engine.incremental import IncrementalRun
from acdc.engine.metrics import get_metric
from acdc.engine.patched import PatchedModel
from acdc.engine.work import Work
from acdc.errors import DictionaryError, OptionError
from acdc.measure.error_nodes import error_edges, errors_in_and_out, node_mask, sweep_nodes
from acdc.measure.evaluation import Evaluator
from acdc.methods import METHODS
from acdc.methods.acdc import acdc
from acdc.methods.candidates import narrow
from acdc.methods.eap import Integration, between_inputs, clean_corrupted, eap, eap_ig
from acdc.methods.exact import exact
from acdc.methods.sweep import sweep
from acdc.models.lowering import LoweredModel
from graphs.graph import parse_node
from graphs.order import edge_order, receiver_order

FLOAT32_INSIDE = ("Qwen3", "Gemma2", "grouped rotary")
SETS: dict[str, list[tuple[Any, ...]]] = {
    "outputs": [("standard", "attn_z", 0), ("topk", "attn_out", 1), ("jumprelu", "mlp_out", 0)],
    "transcoders": [
        ("skip_transcoder", "ln2_normalized", 0),
        ("jumprelu_transcoder", "ln2_out", 1),
        ("gated", "attn_out", 0),
    ],
    "cuts": [
        ("gated", "resid_post", 0),
        ("standard", "resid_mid", 1),
        ("topk", "resid_post", 1),
        ("transcoder", "mlp_in", 0),
        ("standard", "attn_z", 1),
    ],
}
OPTIONS = {"topk": {"k": 3}, "gated": {"normalize_activations": "layer_norm"}}
IDS = tuple(range(0, N_LATENTS, 2))


def dictionaries_of(model: LoweredModel, which: str) -> list[Dictionary]:
    """Return the set's dictionaries that the model has a place for."""
    found = []
    for architecture, site, layer in SETS[which]:
        mlp = "transcoder" in architecture or site in ("mlp_out", "resid_mid")
        if mlp and (not model.shape.has_mlp or (site == "resid_mid" and model.shape.parallel)):
            continue
        options = OPTIONS.get(architecture, {})
        found.append(random_dictionary(model, architecture, site, layer, **options))
    return found


def build(
    family: str, which: str, metric: str = "logit_diff", seed: int = 0, **options: Any
) -> tuple[Experiment, LatentOracle]:
    dtype = torch.float32 if family in FLOAT32_INSIDE else torch.float64
    split = options.pop("split_qkv", True)
    model = small_model(family, seed, dtype=dtype, split_qkv=split)
    task = small_task(seed, 3)
    dictionaries = dictionaries_of(model, which)
    slow = LatentOracle(model, task, metric, {place(d): (d, IDS) for d in dictionaries}, **options)
    plain = Experiment(model, task, get_metric(metric), **options)
    return attach(plain, dictionaries, latents=[IDS] * len(dictionaries)).experiment, slow


def tolerance(experiment: Experiment) -> float:
    return 1e-7 if experiment.model.dtype == torch.float64 else 3e-5


# --- patched runs -------------------------------------------------------------------------


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("family", ["LN", "attention only", "grouped rotary", "GPTNeoX", "Gemma2"])
def test_every_node_in_gives_the_model_and_masks_the_oracle(family: str, which: str) -> None:
    experiment, slow = build(family, which)
    graph, close = experiment.graph, tolerance(experiment)
    order = [graph.edge_name(int(e)) for v in receiver_order(graph) for e in edge_order(graph, v)]
    assert order == slow.edges
    patched = PatchedModel(experiment)
    every = np.ones(graph.n_edges, dtype=bool)
    assert patched.metric(every) == pytest.approx(experiment.plain("clean"), abs=close)
    assert patched.metric(~every) == pytest.approx(experiment.plain("corrupt"), abs=close)
    rng = np.random.default_rng(1)
    for part in (0.1, 0.9):
        mask = rng.random(graph.n_edges) < part
        wanted = slow.without(graph.edge_names(np.flatnonzero(~mask)))
        assert patched.metric(mask) == pytest.approx(wanted, abs=close)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize(
    ("intervention", "metric"),
    [("zero", "nll"), ("resample", "kl"), ("mean", "logit_diff"), ("mean-positional", "kl")],
)
def test_interventions_directions_and_coarse_receivers(
    intervention: str, metric: str, direction: str
) -> None:
    options = {"intervention": intervention, "direction": direction, "split_qkv": False}
    experiment, slow = build("LN", "cuts", metric, **options)
    mask = np.random.default_rng(0).random(experiment.graph.n_edges) < 0.6
    wanted = slow.without(experiment.graph.edge_names(np.flatnonzero(~mask)))
    assert PatchedModel(experiment).metric(mask) == pytest.approx(wanted, abs=1e-7)


def test_a_folded_latent_is_carried_by_the_error_node() -> None:
    model = small_model("LN", 0, dtype=torch.float64)
    plain = Experiment(model, small_task(0, 3), get_metric("logit_diff"))
    dictionaries = dictionaries_of(model, "transcoders")
    attached = attach(plain, dictionaries, max_latents=5)
    graph = attached.experiment.graph
    assert sum(site.n_kept for site in attached.sites) == 5
    assert sum(site.n_active for site in attached.sites) > 5
    assert 0 < attached.folded_share < 1
    full = PatchedModel(attached.experiment).metric(np.ones(graph.n_edges, dtype=bool))
    assert full == pytest.approx(plain.plain("clean"), abs=1e-7)
    everything = attach(plain, dictionaries)
    assert everything.folded_share == 0
    # those kept are the ones with the largest scores, and the share is that of the others
    whole = everything.experiment
    scores = np.abs(node_scores(whole, between_inputs(whole, 5), 5))
    latent = [i for i, name in enumerate(whole.graph.senders) if ".f" in name]
    best = sorted(latent, key=lambda i: -scores[i])[:5]
    assert {whole.graph.senders[i] for i in best} <= set(graph.senders)
    folded = scores[latent].sum() - scores[best].sum()
    assert attached.folded_share == pytest.approx(folded / scores[latent].sum())


def test_only_active_latents_become_nodes() -> None:
    model = small_model("LN", 0)
    experiment = Experiment(model, small_task(0, 3), get_metric("logit_diff"))
    dictionary = random_dictionary(model, "standard", "mlp_out", 0)
    assert dictionary.b_enc is not None
    bias = dictionary.b_enc.clone()
    bias[4] = -1e6
    attached = attach(experiment, [dataclasses.replace(dictionary, b_enc=bias)])
    senders = attached.experiment.graph.senders
    assert "m0.f4" not in senders
    assert len([name for name in senders if name.startswith("m0.f")]) == attached.sites[0].n_active


# --- attribution --------------------------------------------------------------------------


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("family", ["LN", "grouped rotary", "GPTNeoX", "Gemma2"])
def test_eap_is_the_derivative_of_ablating_an_edge(family: str, which: str) -> None:
    experiment, slow = build(family, which)
    wanted = slow.derivatives()
    largest = max(map(abs, wanted.values()))
    assert largest > 1e-2
    part = 1e-6 if experiment.model.dtype == torch.float64 else 1e-3
    names = experiment.graph.edge_names()
    for memory in (1 << 30, 1 << 12):  # one chunk of tokens, and tokens one by one
        for edge, score in zip(names, eap(experiment, work=Work(memory=memory)), strict=True):
            assert abs(score - wanted[edge]) < part * largest, edge


@pytest.mark.parametrize(
    "options",
    [
        {"intervention": "zero"},
        {"direction": "denoising"},
        {"intervention": "mean", "direction": "denoising"},
        {"intervention": "mean-positional"},
    ],
)
def test_eap_of_other_interventions(options: dict[str, str]) -> None:
    experiment, slow = build("LN", "cuts", split_qkv=False, **options)
    wanted = slow.derivatives()
    names = experiment.graph.edge_names()
    np.testing.assert_allclose(eap(experiment), [wanted[e] for e in names], atol=1e-7)


@pytest.mark.parametrize("which", SETS)
def test_a_nodes_score_is_the_sum_of_its_edges(which: str) -> None:
    experiment, _ = build("Gemma2", which)
    edges = eap_ig(experiment, Integration(3))
    total = np.bincount(experiment.graph.edge_sender, edges, experiment.graph.n_senders)
    nodes = node_scores(experiment, between_inputs(experiment, 3), 3)
    np.testing.assert_allclose(nodes, total, atol=2e-5 * np.abs(nodes).max())


def test_integrated_gradients_and_clean_corrupted_are_means_of_gradients() -> None:
    experiment, _ = build("LN", "transcoders")
    noising, denoising = (
        eap(experiment),
        eap(dataclasses.replace(experiment, direction="denoising")),
    )
    np.testing.assert_allclose(clean_corrupted(experiment), (noising - denoising) / 2, atol=1e-12)
    np.testing.assert_allclose(eap_ig(experiment, Integration(1)), -denoising, atol=1e-12)


# --- exact, ACDC --------------------------------------------------------------------------


@pytest.mark.parametrize("which", SETS)
def test_exact_ablates_each_edge_alone(which: str) -> None:
    experiment, slow = build("LN", which)
    base, found = slow.without(()), exact(experiment)
    edges = np.random.default_rng(0).choice(len(found), 40, replace=False)
    for e in edges:
        wanted = slow.without([experiment.graph.edge_name(e)]) - base
        assert found[e] == pytest.approx(wanted, abs=1e-7)
    only = np.zeros(len(found), dtype=bool)
    only[edges] = True
    few = exact(experiment, only=only)
    np.testing.assert_allclose(few[edges], found[edges], atol=1e-12)
    assert not few[~only].any()


@pytest.mark.parametrize(
    ("which", "direction"),
    [("outputs", "noising"), ("transcoders", "noising"), ("cuts", "denoising")],
)
def test_acdc_is_the_sequential_one(which: str, direction: str) -> None:
    experiment, slow = build("LN", which, direction=direction)
    taus = (0.02, 0.1)
    circuits, work = sweep(experiment, taus)
    for tau in taus:
        wanted = sequential_acdc(slow, tau, slow.edges)
        assert wanted.margin > 1e-7, "a tie: choose another tau"
        circuit, _ = acdc(experiment, tau)
        assert set(circuit.edges()) == wanted.kept == set(circuits[tau].edges())
        for scores in (circuit.scores, circuits[tau].scores):
            found = dict(zip(experiment.graph.edge_names(), scores, strict=True))
            assert found == pytest.approx(wanted.changes, abs=1e-7)
        assert 0 < circuit.n_edges < experiment.graph.n_edges
        value = PatchedModel(experiment).metric(circuit.in_circuit)
        assert value == pytest.approx(wanted.metric, abs=1e-7)
    assert work.n_dead > 0


def test_acdc_on_candidates_ablates_the_other_edges() -> None:
    experiment, slow = build("LN", "transcoders")
    graph = experiment.graph
    n = graph.n_edges // 3
    narrowed = narrow(experiment, n, 1 << 30)
    assert narrowed is not None
    few, candidates = narrowed
    assert candidates.sum() <= n
    value = PatchedModel(few).metric(np.ones(few.graph.n_edges, dtype=bool))
    outside = graph.edge_names(np.flatnonzero(~candidates))
    assert value == pytest.approx(slow.without(outside), abs=1e-7)
    assert PatchedModel(few).full_values().mean() == pytest.approx(slow.without(()), abs=1e-7)
    found = METHODS["acdc"].find(experiment, threshold=0.02, candidates=n)
    assert found.circuit.graph is graph
    assert not found.circuit.in_circuit[~candidates].any()
    order = [e for e in slow.edges if e not in set(outside)]

    class Restricted:
        sign = slow.sign

        def without(self, edges: Any) -> float:
            return slow.without({*edges, *outside})

    wanted = sequential_acdc(Restricted(), 0.02, order)
    assert set(found.circuit.edges()) == wanted.kept
    np.testing.assert_allclose(eap(few), eap(experiment)[candidates])


def test_searches_at_several_thresholds_share_their_start(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, _ = build("LN", "transcoders")
    made: list[Experiment] = []
    init = IncrementalRun.__init__

    def counted(run: IncrementalRun, experiment: Experiment, *rest: Any) -> None:
        made.append(experiment)
        init(run, experiment, *rest)

    monkeypatch.setattr(IncrementalRun, "__init__", counted)
    n = experiment.graph.n_edges // 3
    found = METHODS["acdc"].find(experiment, n_edges=8, candidates=n)
    assert len(made) == 2  # one for all rough searches, one for all whole ones
    narrowed = narrow(experiment, n, 1 << 30)
    assert narrowed is not None
    few, candidates = narrowed
    alone, work = acdc(few, found.details["threshold"])
    np.testing.assert_array_equal(found.circuit.in_circuit[candidates], alone.in_circuit)
    np.testing.assert_allclose(found.circuit.scores[candidates], alone.scores, atol=1e-9)
    assert found.details["work"]["n_decisions"] == work.n_decisions


# --- error nodes --------------------------------------------------------------------------


def test_error_nodes_in_and_out() -> None:
    experiment, slow = build("LN", "transcoders", seed=3)
    graph, evaluator = experiment.graph, Evaluator(experiment)
    names = np.array(graph.edge_names())
    errors = error_edges(graph)
    assert set(names[errors]) == {e for e in names if ".err" in e}
    mask = np.random.default_rng(0).random(graph.n_edges) < 0.5
    found = errors_in_and_out(evaluator, mask)

    def faithfulness(inside: Any) -> float:
        value = slow.without(set(names) - set(inside))
        return (value - evaluator.empty) / (evaluator.full - evaluator.empty)

    assert found.without_errors == pytest.approx(faithfulness(names[mask & ~errors]), rel=1e-5)
    assert found.complement_without_errors == pytest.approx(
        faithfulness(names[~mask & ~errors]), rel=1e-5
    )
    everything = np.ones(graph.n_edges, dtype=bool)
    assert errors_in_and_out(evaluator, everything).with_errors == pytest.approx(1.0)


def test_node_thresholds() -> None:
    experiment, _ = build("LN", "outputs")
    graph = experiment.graph
    scores = node_scores(experiment, between_inputs(experiment, 5), 5)
    rows = sweep_nodes(Evaluator(experiment), scores, [1e9, float(np.median(np.abs(scores))), 0.0])
    assert [row.n_nodes for row in rows] == sorted(row.n_nodes for row in rows)
    assert rows[0].n_edges == graph.edge_mask(["input->logits"]).sum()
    assert rows[-1].faithfulness.with_errors == pytest.approx(1.0, abs=1e-6)
    assert rows[-1].n_latents == len([n for n in graph.senders if ".f" in n])
    # by names: an edge is in if both its ends are
    kept = np.append(np.abs(scores) >= np.median(np.abs(scores)), True)
    chosen = {name for name, k in zip(graph.nodes, kept, strict=True) if k}
    feeds = {r: {graph.nodes[i] for i in graph.fed_by(v)} for v, r in enumerate(graph.receivers)}
    for edge, inside in zip(graph.edge_names(), node_mask(graph, kept), strict=True):
        u, v = edge.split("->")
        assert inside == (u in chosen and bool(feeds[v] & chosen)), edge


# --- what users do wrong ------------------------------------------------------------------


def test_dictionaries_that_do_not_fit() -> None:
    model = small_model("LN", 0)
    experiment = Experiment(model, small_task(0, 2), get_metric("logit_diff"))
    good = random_dictionary(model, "standard", "mlp_out", 0)
    with pytest.raises(DictionaryError, match="no dictionary was given"):
        attach(experiment, [])
    with pytest.raises(OptionError, match="max_latents 0: expected at least 1"):
        attach(experiment, [good], max_latents=0)
    other = random_dictionary(model, "transcoder", "mlp_in", 0)
    with pytest.raises(DictionaryError, match="two dictionaries at one place"):
        attach(experiment, [good, other])
    wide = small_model("LN", 0, d_model=16)
    with pytest.raises(DictionaryError, match=r"d_in is 12, but .* is 16 wide"):
        attach(Experiment(wide, small_task(0, 2), get_metric("logit_diff")), [good])
    bare = small_model("attention only", 0)
    with pytest.raises(DictionaryError, match="no MLPs"):
        attach(Experiment(bare, small_task(0, 2), get_metric("logit_diff")), [good])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_knows_latents(name: str) -> None:
    experiment, _ = build("LN", "outputs")
    asked = {"mask_steps": 5} if "mask_steps" in METHODS[name].option_names else {}
    found = METHODS[name].find(experiment, n_edges=30, **asked)
    assert len(found.circuit.scores) == experiment.graph.n_edges
    assert any(parse_node(u)[0] == "latent" for u in found.circuit.nodes())


def test_node_attribution_is_that_of_the_latents() -> None:
    experiment, _ = build("LN", "outputs")
    found = METHODS["nap-ig"].find(experiment, n_edges=30, steps=3)
    scores = node_scores(experiment, between_inputs(experiment, 3), 3)
    assert list(found.details["node_scores"].values()) == pytest.approx(scores.tolist())


# --- command line -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder_of_dictionaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from acdc.models import load_model

    model, _ = load_model("ioi-small")
    folder = tmp_path_factory.mktemp("dictionaries")
    for architecture, site, layer in (
        ("topk", "attn_out", 0),
        ("jumprelu_transcoder", "ln2_normalized", 0),
    ):
        options = OPTIONS.get(architecture, {})
        dictionary = random_dictionary(model, architecture, site, layer, **options)
        small = dataclasses.replace(dictionary, W_dec=0.1 * dictionary.W_dec)
        write_dictionary(small, folder / f"{site}{layer}")
    return folder


@pytest.fixture(scope="module")
def finished(folder_of_dictionaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    names = f"{folder_of_dictionaries}/attn_out0,{folder_of_dictionaries}/ln2_normalized0"
    status = command(
        "discover", "ioi", "--saes", names, "--method", "eap", "--edges", "60", "--n-prompts", "6",
        "--max-latents", "7", "--out", str(out),
    )  # fmt: skip
    assert status == 0
    return out


def command(*arguments: str) -> int:
    from acdc.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


def test_discover_writes_what_became_of_the_latents(finished: Path) -> None:
    summary = json.loads((finished / "run.json").read_text())
    latents = summary["latents"]
    assert latents["n_kept"] == 7 < latents["n_active"]
    assert [site["name"] for site in latents["sites"]] == ["a0", "m0"]
    assert 0 < latents["folded_share"] < 1
    assert {"with_errors", "without_errors"} <= latents["error_nodes"].keys()
    assert latents["node_thresholds"][0]["n_nodes"] <= latents["node_thresholds"][-1]["n_nodes"]
    assert [q["n_latents"] for q in latents["quality"]] == [N_LATENTS, N_LATENTS]
    said = [warning for warning in summary["warnings"] if warning.startswith("dictionary at")]
    shares = [
        (q["metric"]["reconstructed"] - q["metric"]["ablated"])
        / (q["metric"]["model"] - q["metric"]["ablated"])
        for q in latents["quality"]
    ]
    wrong = sum(not 0.8 <= share <= 1.2 for share in shares)
    wrong += sum(q["explained_variance"] < 0.5 for q in latents["quality"])
    wrong += sum(q["dead_fraction"] > 0.5 for q in latents["quality"])
    assert min(q["n_tokens"] for q in latents["quality"]) > 4 * N_LATENTS
    assert len(said) == wrong > 0
    circuit = json.loads((finished / "circuit.json").read_text())
    assert sum(len(site["latents"]) for site in circuit["cfg"]["sites"]) == 7
    assert any(".f" in edge for edge in circuit["edges"])
    picture = (finished / "circuit.svg").read_text()
    assert "a0.err" in picture


def test_evaluate_export_and_compare_take_such_a_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from graphs import load_circuit

    bare = tmp_path / "bare.json"
    assert command("export", str(finished), "--no-error-nodes", "--out", str(bare)) == 0
    with_errors, without = load_circuit(finished / "circuit.json"), load_circuit(bare)
    assert 0 < without.n_edges < with_errors.n_edges
    assert not any(".err" in edge for edge in without.edges())
    assert command("export", str(finished), "--no-error-nodes") == 2
    capsys.readouterr()
    assert command("evaluate", str(finished), "--brief") == 0
    summary = json.loads((finished / "run.json").read_text())
    assert f"{summary['metric_seen']['circuit']:.4g}" in capsys.readouterr().out
    circuit = load_circuit(finished / "circuit.json")
    for suffix in ("json", "graphml", "dot"):
        out = tmp_path / f"circuit.{suffix}"
        assert command("export", str(finished), "--out", str(out)) == 0
        again = load_circuit(out)
        assert again.graph.shape == circuit.graph.shape
        assert again.edges() == circuit.edges()
    pictures = ("compare", str(finished), str(tmp_path / "circuit.dot"), "--out")
    assert command(*pictures, str(tmp_path / "both.svg")) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-latents", "5"), "max_latents 5 does nothing without latents"),
        (("--saes", "{0}/attn_out0", "--max-latents", "0"), "max_latents 0: expected at least 1"),
        (("--saes", "{0}/nowhere"), "no such folder"),
        (("--saes", "{0}/attn_out0,{0}/attn_out0"), "are both on hook"),
        (("--saes", "{0},"), "expected names separated by commas"),
        (("--saes", "{0}", "--method", "acdc", "--candidates", "0"), "expected at least 1"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    folder_of_dictionaries: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [a.format(folder_of_dictionaries) for a in arguments]
    out = tmp_path / "run"
    assert command("discover", "ioi", "--n-prompts", "2", "--out", str(out), *given) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.count("\n") == 0
    assert not out.exists()


def test_evaluate_needs_the_dictionaries(
    finished: Path, folder_of_dictionaries: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    circuit = str(finished / "circuit.json")
    assert command("evaluate", circuit, "--task", "ioi", "--n-prompts", "2") == 2
    assert "say with --saes" in capsys.readouterr().err
    wrong = str(folder_of_dictionaries / "attn_out0")
    assert command("evaluate", str(finished), "--saes", wrong) == 2
    assert "give the dictionaries that it was found with" in capsys.readouterr().err
