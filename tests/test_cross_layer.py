"""Cross-layer transcoders: files, attribution and circuits against a pass that patches by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latent_oracle import LatentOracle, LatentPass, random_dictionary
from oracle import exact_scores, labelled, sequential_acdc, small_model, small_task
from safetensors.torch import save_file
from test_latents import command, tolerance
from torch import Tensor

from acdc.dictionaries import read_dictionaries
from acdc.dictionaries.attach import attach
from acdc.dictionaries.quality import quality_on_task
from acdc.engine.attribution import Point, node_scores
from acdc.engine.checkpoint import Checkpoint
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import PatchedModel
from acdc.engine.work import Work
from acdc.errors import DictionaryError, OptionError
from acdc.evidence import frontier
from acdc.evidence.stability import stability
from acdc.methods.acdc import acdc
from acdc.methods.candidates import narrow
from acdc.methods.eap import eap, eap_ig, eap_ig_activations
from acdc.methods.exact import exact
from acdc.methods.sweep import sweep
from acdc.models.lowering import LoweredModel
from acdc.runs import given
from acdc.runs.discover import discover
from acdc.tasks.positions import find_positions
from graphs import component_graph, load_circuit
from graphs.errors import GraphError
from graphs.graph import GraphShape
from graphs.order import edge_order, receiver_order
from graphs.sites import Site, sites_from_text, sites_to_text

N_LATENTS = 5
IDS = (0, 2, 3)
FAMILIES = ("LN", "RMS", "grouped rotary", "GPTNeoX", "Gemma2")


def tensors_of(model: LoweredModel, seed: int = 0, scale: float = 0.5) -> dict[str, Tensor]:
    """Random tensors of a transcoder by circuit-tracer's names; odd layers have thresholds."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(model.dtype)

    d, n_layers = model.d_model, model.shape.n_layers
    found = {}
    for i in range(n_layers):
        found |= {
            f"W_enc_{i}": draw(N_LATENTS, d) / d**0.5,
            f"b_enc_{i}": 0.2 * draw(N_LATENTS),
            f"b_dec_{i}": draw(d),
            f"W_dec_{i}": scale * draw(N_LATENTS, n_layers - i, d),
        }
        if i % 2:
            found[f"threshold_{i}"] = 0.1 * draw(N_LATENTS).abs()
            found[f"W_skip_{i}"] = draw(d, d)
    return found


def save(tensors: dict[str, Tensor], folder: Path, config: str | None = None) -> Path:
    """Write tensors in circuit-tracer's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(sum(name.startswith("W_dec") for name in tensors)):
        own = {name: x for name, x in tensors.items() if name.endswith(f"_{i}")}
        save_file({f"W_dec_{i}": own.pop(f"W_dec_{i}")}, folder / f"W_dec_{i}.safetensors")
        save_file(own, folder / f"W_enc_{i}.safetensors")
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


class CrossLayerPass(LatentPass):
    """``out`` holds coefficients of latents; what an edge carries of them depends on its reader.

    ``dictionaries`` holds by place the site that is read, the tensors by name, and the nodes.
    """

    def carried(self, u: str, v: str) -> Tensor:
        value = super().carried(u, v)
        if ".f" not in u:
            return value
        layer, j = map(int, u[1:].split(".f"))
        last = self.model.shape.n_layers if v == "logits" else int(v[1:].split(".")[0])
        _, tensors, _ = self.dictionaries[f"m{layer}"]
        return value * sum(self.decoder(tensors, layer, to, j) for to in range(layer, last))

    def through_post(self, u: str) -> int | None:
        if not u.startswith("a") or self.model.layers[0].attention_post is None:
            return None
        return int(u[1:].split(".")[0])

    def decoder(self, tensors: dict[str, Tensor], layer: int, to: int, j: int) -> Tensor:
        return tensors[f"W_dec_{layer}"][j, to - layer]

    def latents(self, i: int, stream: Tensor) -> Tensor:
        site, tensors, _ = self.dictionaries[f"m{i}"]
        norm = self.model.layers[i].ln2
        x = {"mlp_in": lambda s: s, "ln2_out": norm, "ln2_normalized": norm.normalized}[site](
            stream
        )
        before = x @ tensors[f"W_enc_{i}"].T + tensors[f"b_enc_{i}"]
        threshold = tensors.get(f"threshold_{i}", torch.zeros_like(before))
        return torch.where(before > threshold, before.relu(), 0.0)

    def mlp(self, i: int) -> dict[str, Tensor]:
        name = f"m{i}"
        written = {}
        for j in self.dictionaries[name][2]:
            node = f"{name}.f{j}"
            written[node] = self.latents(i, self.read(node))[..., j, None]
        x = self.read(f"{name}.err")
        self.seen = {**getattr(self, "seen", {}), i: self.latents(i, x)}
        rest = self.model.layers[i].mlp(x)
        for layer, seen in self.seen.items():
            _, tensors, ids = self.dictionaries[f"m{layer}"]
            for j in ids:
                rest = rest - seen[..., j, None] * self.decoder(tensors, layer, i, j)
        return written | {f"{name}.err": rest}


class CrossLayerOracle(LatentOracle):
    run = CrossLayerPass


CONFIG = "model_kind: cross_layer_transcoder\nfeature_input_hook: {}\n"
HOOKS = {"mlp_in": None, "ln2_out": "mlp.hook_in", "ln2_normalized": "ln2.hook_normalized"}


def build(
    folder: Path, family: str = "LN", site: str = "ln2_out", n_layers: int = 3, **options: Any
) -> tuple[Experiment, CrossLayerOracle]:
    """Return an experiment with a transcoder that was read from files, and its oracle."""
    dtype = torch.float32 if family == "Gemma2" else torch.float64
    metric = options.pop("metric", "logit_diff")
    model = small_model(family, 0, n_layers=n_layers, dtype=dtype)
    tensors, hook = tensors_of(model), HOOKS[site]
    save(tensors, folder, None if hook is None else CONFIG.format(hook))
    places = {f"m{i}": (site, tensors, IDS) for i in range(n_layers)}
    slow = CrossLayerOracle(model, small_task(0, 3), metric, places, **options)
    plain = Experiment(model, small_task(0, 3), get_metric(metric), **options)
    dictionaries = read_dictionaries([folder])
    assert [d.reads.site for d in dictionaries] == [site] * n_layers
    return attach(plain, dictionaries, latents=[IDS] * n_layers).experiment, slow


@pytest.mark.parametrize("site", HOOKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_in_gives_the_model_and_masks_the_oracle(
    family: str, site: str, tmp_path: Path
) -> None:
    experiment, slow = build(tmp_path, family, site)
    graph, close = experiment.graph, tolerance(experiment)
    order = [e for v in receiver_order(graph) for e in graph.edge_names(edge_order(graph, v))]
    assert order == slow.edges
    patched = PatchedModel(experiment)
    every = np.ones(graph.n_edges, dtype=bool)
    assert patched.metric(every) == pytest.approx(experiment.plain("clean"), abs=close)
    assert patched.metric(~every) == pytest.approx(experiment.plain("corrupt"), abs=close)
    rng = np.random.default_rng(1)
    for part in (0.3, 0.6, 0.9):
        mask = rng.random(graph.n_edges) < part
        wanted = slow.without(graph.edge_names(np.flatnonzero(~mask)))
        assert patched.metric(mask) == pytest.approx(wanted, abs=close)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("intervention", ["zero", "mean", "mean-positional"])
def test_every_ablation(intervention: str, direction: str, tmp_path: Path) -> None:
    options = {"intervention": intervention, "direction": direction, "metric": "kl"}
    experiment, slow = build(tmp_path, **options)
    mask = np.random.default_rng(2).random(experiment.graph.n_edges) < 0.8
    wanted = slow.without(experiment.graph.edge_names(np.flatnonzero(~mask)))
    assert PatchedModel(experiment).metric(mask) == pytest.approx(wanted, abs=1e-7)


def test_an_error_node_that_is_in_needs_what_earlier_ones_read(tmp_path: Path) -> None:
    """Nothing of layer 0 is in but the input of its error node, which a later one answers to."""
    experiment, slow = build(tmp_path)
    graph = experiment.graph
    kept = ["input->m0.err", "input->m2.err", "m2.err->logits"]
    mask = graph.edge_mask(kept)
    gone = graph.edge_names(np.flatnonzero(~mask))
    patched = PatchedModel(experiment)
    assert patched.metric(mask) == pytest.approx(slow.without(gone), abs=1e-7)
    fewer = patched.metric(graph.edge_mask(kept[1:]))
    assert abs(fewer - patched.metric(mask)) > 1e-4
    assert "m2.err" in {graph.nodes[i] for i in graph.fed_by(graph.receiver_index["m0.err"])}


def test_inputs_read_in_parts_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a layer with many different inputs a few are read at a time, the error node's last."""
    experiment, _ = build(tmp_path)
    mask = np.random.default_rng(5).random(experiment.graph.n_edges) < 0.7
    wanted = PatchedModel(experiment).metric(mask)
    monkeypatch.setattr("acdc.engine.patched._ROWS_BYTES", 1)
    assert PatchedModel(experiment).metric(mask) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("site", HOOKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_eap_is_the_derivative_of_ablating_an_edge(family: str, site: str, tmp_path: Path) -> None:
    experiment, slow = build(tmp_path, family, site)
    wanted = slow.derivatives()
    largest = max(map(abs, wanted.values()))
    across = max(abs(x) for edge, x in wanted.items() if edge.startswith("m0.f"))
    assert across > 1e-3 * largest
    part = 1e-6 if experiment.model.dtype == torch.float64 else 1e-3
    names = experiment.graph.edge_names()
    for memory in (1 << 30, 1 << 12):
        for edge, score in zip(names, eap(experiment, work=Work(memory=memory)), strict=True):
            assert abs(score - wanted[edge]) < part * largest, edge


def test_a_node_scores_the_sum_of_its_edges(tmp_path: Path) -> None:
    experiment, slow = build(tmp_path)
    total = dict.fromkeys(experiment.graph.senders, 0.0)
    for edge, score in slow.derivatives().items():
        total[edge.split("->")[0]] += score

    def at_base(batch: Any, base: Any, other: Any) -> Iterator[Point]:
        yield Point(batch.clean)

    found = node_scores(experiment, at_base, 1)
    largest = max(map(abs, total.values()))
    np.testing.assert_allclose(found, list(total.values()), atol=1e-6 * largest)


@pytest.mark.parametrize(("threshold", "two_sided"), [(0.01, False), (0.05, False), (0.01, True)])
def test_acdc_is_sequential_removal(threshold: float, two_sided: bool, tmp_path: Path) -> None:
    experiment, slow = build(tmp_path, n_layers=2)
    wanted = sequential_acdc(slow, threshold, two_sided=two_sided)
    assert wanted.margin > 1e-7
    circuit, work = acdc(experiment, threshold, two_sided=two_sided)
    assert set(circuit.edges()) == wanted.kept
    assert 0 < circuit.n_edges < experiment.graph.n_edges
    changes = [wanted.changes[name] for name in experiment.graph.edge_names()]
    np.testing.assert_allclose(circuit.scores, changes, atol=1e-7)
    assert work.n_decisions + work.n_dead == experiment.graph.n_edges


def test_exact_is_each_edge_alone(tmp_path: Path) -> None:
    experiment, slow = build(tmp_path, n_layers=2)
    wanted = exact_scores(slow)
    names = experiment.graph.edge_names()
    np.testing.assert_allclose(exact(experiment), [wanted[name] for name in names], atol=1e-7)


def test_acdc_among_candidates(tmp_path: Path) -> None:
    """Those that attribution does not choose are ablated from the start."""
    experiment, slow = build(tmp_path)
    narrowed = narrow(experiment, 40, 1 << 30)
    assert narrowed is not None
    few, candidates = narrowed
    names = experiment.graph.edge_names()
    out = {name for name, here in zip(names, candidates, strict=True) if not here}

    class Narrow:
        sign, edges = slow.sign, [edge for edge in slow.edges if edge not in out]

        def without(self, edges: Any) -> float:
            return slow.without(out | set(edges))

    wanted = sequential_acdc(Narrow(), 0.02)
    assert wanted.margin > 1e-7
    circuit, _ = acdc(few, 0.02)
    assert set(circuit.edges()) == wanted.kept
    assert 0 < circuit.n_edges < few.graph.n_edges


def test_methods_by_attribution_run_and_others_say_why_not(tmp_path: Path) -> None:
    experiment, _ = build(tmp_path)
    assert np.isfinite(eap_ig(experiment)).all()
    with pytest.raises(OptionError, match="not defined for a cross-layer transcoder"):
        eap_ig_activations(experiment)
    with pytest.raises(OptionError, match=r"sweep: .* not built for cross-layer transcoders"):
        sweep(experiment, [0.01])
    trained, _ = build(tmp_path / "again")
    with pytest.raises(OptionError, match="not built for cross-layer transcoders"):
        eap(replace(trained, intervention="optimal", training_steps=1))


@pytest.mark.parametrize(
    ("call", "asked", "why"),
    [
        (discover, {"method": "eap-ig-activations"}, "eap-ig-activations: not defined"),
        (discover, {"method": "eap", "intervention": "optimal"}, "optimal ablation: not built"),
        (stability, {"method": "eap-ig-activations", "n_seeds": 2}, "eap-ig-activations: not def"),
        (frontier.sweep, {}, "sweep: .* not built"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_loaded(
    call: Any, asked: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the transcoder is one of several dictionaries."""
    (tmp_path / "clt").mkdir()
    (tmp_path / "clt" / "W_enc_0.safetensors").write_bytes(b"")
    monkeypatch.setattr(given, "load_model", None)
    with pytest.raises(OptionError, match=why):
        call("ioi", saes=f"bundled, {tmp_path / 'clt'}", **asked)


@pytest.mark.parametrize("norms", ["live", "frozen"])
def test_weights_of_edges_have_gradients(norms: str, tmp_path: Path) -> None:
    """Weights of 0 and 1 are masks; where all are in, the gradient is what eap says."""
    built, _ = build(tmp_path)
    experiment = replace(built, norms=norms)
    graph, patched = experiment.graph, PatchedModel(experiment)
    mask = np.random.default_rng(3).random(graph.n_edges) < 0.7
    weights = torch.from_numpy(mask).to(torch.float64)
    rows = [patched.rows(i, weights) for i in range(len(experiment.batches))]
    np.testing.assert_allclose(experiment.per_prompt(rows), patched.values(mask), atol=1e-9)
    ones = torch.ones(graph.n_edges, dtype=torch.float64, requires_grad=True)
    total = sum(patched.rows(i, ones).sum() for i in range(len(experiment.batches)))
    (g,) = torch.autograd.grad(total, ones)  # of keeping an edge
    scores = eap(experiment)
    largest = np.abs(scores).max()
    np.testing.assert_allclose(-g.numpy() / experiment.n_rows, scores, atol=1e-6 * largest)


@pytest.mark.parametrize("positions", ["token", "span"])
def test_nodes_split_by_positions(positions: str, tmp_path: Path) -> None:
    model = small_model("LN", 0, n_layers=2, dtype=torch.float64)
    tensors, task = tensors_of(model), labelled(small_task(0, 3, (4,)), 0)
    places = {f"m{i}": ("mlp_in", tensors, IDS) for i in range(2)}
    slow = CrossLayerOracle(model, task, "logit_diff", places, positions=positions)
    plain = Experiment(
        model, task, get_metric("logit_diff"), positions=find_positions(task, positions)
    )
    found = read_dictionaries([save(tensors, tmp_path)])
    experiment = attach(plain, found, latents=[IDS] * 2).experiment
    graph = experiment.graph
    mask = np.random.default_rng(4).random(graph.n_edges) < 0.8
    wanted = slow.without(graph.edge_names(np.flatnonzero(~mask)))
    assert PatchedModel(experiment).metric(mask) == pytest.approx(wanted, abs=1e-7)
    derivatives = slow.derivatives()
    scores = [derivatives[name] for name in graph.edge_names()]
    np.testing.assert_allclose(eap(experiment), scores, atol=1e-6 * np.abs(scores).max())


def test_a_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    experiment, _ = build(tmp_path / "clt", n_layers=2)
    wanted, work = acdc(experiment, 0.02)
    stops = []

    def stop(n_edges: int) -> None:
        stops.append(n_edges)
        if len(stops) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        acdc(experiment, 0.02, progress=stop, checkpoint=Checkpoint(tmp_path, {}, 0.0))
    kept = Checkpoint(tmp_path, {}, 0.0)
    assert kept.load(experiment.graph, 0.02).n_finished > 2
    found, again = acdc(experiment, 0.02, checkpoint=kept)
    assert found.edges() == wanted.edges()
    np.testing.assert_array_equal(found.scores, wanted.scores)
    assert again.n_decisions == work.n_decisions


def test_graphs_hold_such_sites() -> None:
    sites = tuple(Site("cross_layer", i, (1, 4)) for i in range(3))
    assert sites_from_text(sites_to_text(sites)) == sites
    graph = component_graph(GraphShape(3, 2, sites=sites))
    fed = {graph.nodes[i] for i in graph.fed_by(graph.receiver_index["m1.err"])}
    assert fed == {"m1.err", "m2.err"}
    with pytest.raises(GraphError, match="at 2 of 3 MLPs"):
        component_graph(GraphShape(3, 2, sites=sites[:2]))
    with pytest.raises(GraphError, match="and a cut at r1"):
        component_graph(GraphShape(3, 2, sites=(*sites, Site("resid_pre", 1, ()))))


def test_what_cannot_stand_beside_it_is_refused(tmp_path: Path) -> None:
    model = small_model("LN", 0, n_layers=2)
    plain = Experiment(model, small_task(0, 3), get_metric("logit_diff"))
    found = read_dictionaries([save(tensors_of(model), tmp_path / "clt")])
    larger = replace(plain, model=small_model("LN", 0, n_layers=3))
    cut = random_dictionary(model, "standard", "resid_post", 0)
    with pytest.raises(DictionaryError, match="of the whole stream beside cross-layer"):
        attach(plain, [*found, cut])
    with pytest.raises(DictionaryError, match=r"has 2 layers, .* has 3"):
        attach(larger, found)
    with pytest.raises(DictionaryError, match="two dictionaries at one place"):
        attach(plain, [*found, random_dictionary(model, "standard", "mlp_out", 1)])


def test_quality_counts_what_earlier_layers_write(tmp_path: Path) -> None:
    model = small_model("LN", 0, n_layers=2, dtype=torch.float64)
    tensors = tensors_of(model)
    plain = Experiment(model, small_task(0, 3), get_metric("logit_diff"))
    first, second = read_dictionaries([save(tensors, tmp_path)])
    found = quality_on_task(second, plain, [first, second])
    errors = []
    for pair in plain.task.pairs:
        for tokens in (pair.clean, pair.corrupt):
            run = model.forward(torch.tensor([tokens]))
            slow = CrossLayerPass.__new__(CrossLayerPass)
            slow.model = model
            slow.dictionaries = {f"m{i}": ("mlp_in", tensors, IDS) for i in range(2)}
            got = tensors["b_dec_1"] + run.mlp_in[1] @ tensors["W_skip_1"].T
            for i in range(2):
                got = got + slow.latents(i, run.mlp_in[i]) @ tensors[f"W_dec_{i}"][:, 1 - i]
            errors.append((got - run.mlp_out[1])[0].square().sum(-1))
    assert found.mse == pytest.approx(float(torch.cat(errors).mean()), rel=1e-9)


DAMAGE: list[tuple[dict[str, Tensor | None], str]] = [
    ({"W_enc_1": None}, "W_enc_1.safetensors: tensor 'W_enc_1' is missing"),
    ({"b_dec_0": None}, "tensor 'b_dec_0' is missing"),
    ({"W_enc_1": torch.zeros(5, 11)}, "'W_enc_1' has shape [5, 11], expected [latents, 12]"),
    ({"b_enc_0": torch.zeros(4)}, "'b_enc_0' has shape [4], expected [5]"),
    ({"W_dec_0": torch.zeros(5, 1, 12)}, "'W_dec_0' has shape [5, 1, 12], expected [5, 2, 12]"),
    ({"W_dec_1": torch.full((5, 1, 12), torch.nan)}, "'W_dec_1' holds values that are no finite"),
    ({"threshold_1": -torch.ones(5)}, "'threshold_1' holds numbers below 0"),
    ({"W_enc_0": torch.zeros(5, 12, dtype=torch.int32)}, "'W_enc_0' is stored as int32"),
    ({"other_0": torch.zeros(5)}, "tensor 'other_0' is there, expected only W_enc_0"),
]


@pytest.mark.parametrize(("changes", "message"), DAMAGE)
def test_damaged_tensors_are_refused_by_name(
    changes: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    tensors = tensors_of(small_model("LN", 0, n_layers=2))
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    with pytest.raises(DictionaryError) as caught:
        read_dictionaries([save(tensors, tmp_path)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("feature_input_hook: hook_resid_pre", "feature_input_hook is 'hook_resid_pre', expected"),
        ("feature_input_hook: [1]", "feature_input_hook is a list, expected"),
        ("feature_output_hook: hook_attn_out", "feature_output_hook is 'hook_attn_out'"),
        ("model_kind: transcoder_set", "model_kind is 'transcoder_set'"),
        ("- a\n- b", "holds a list: expected keys and values"),
        ("a: [", "is no YAML that can be read"),
        ("a: !!python/object:os.system {}", "is no YAML that can be read"),
        ("[" * 60000, "is no YAML that can be read"),
        ("a" * (1 << 17), "config.yaml"),
    ],
)
def test_configurations_that_are_refused(config: str, message: str, tmp_path: Path) -> None:
    save(tensors_of(small_model("LN", 0, n_layers=2)), tmp_path, config)
    with pytest.raises(DictionaryError) as caught:
        read_dictionaries([tmp_path])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_cut_short(tmp_path: Path) -> None:
    folder = save(tensors_of(small_model("LN", 0, n_layers=2)), tmp_path)
    path = folder / "W_dec_1.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DictionaryError, match=r"W_dec_1\.safetensors is no readable safetensors"):
        read_dictionaries([folder])
    path.unlink()
    with pytest.raises(DictionaryError, match=r"W_dec_1\.safetensors is missing; its files say 2"):
        read_dictionaries([folder])


def test_the_command_line_from_discover_to_a_drawing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from acdc.models import load_model

    model, _ = load_model("ioi-small")
    folder = save(tensors_of(model, scale=0.1), tmp_path / "clt")
    run = tmp_path / "run"
    status = command(
        "discover", "ioi", "--saes", str(folder), "--method", "eap-ig", "--edges", "80",
        "--n-prompts", "6", "--max-latents", "9", "--out", str(run),
    )  # fmt: skip
    assert status == 0, capsys.readouterr().err
    summary = json.loads((run / "run.json").read_text())
    assert {site["architecture"] for site in summary["latents"]["sites"]} == {
        "cross_layer_transcoder",
        "jumprelu_skip_cross_layer_transcoder",
    }
    assert summary["latents"]["n_kept"] == 9
    assert len(summary["latents"]["quality"]) == model.shape.n_layers
    circuit = load_circuit(run / "circuit.json")
    assert {site.kind for site in circuit.graph.shape.sites} == {"cross_layer"}
    assert any(edge.startswith("m0.") for edge in circuit.edges())
    assert "m0.err" in (run / "circuit.svg").read_text()
    capsys.readouterr()
    assert command("evaluate", str(run), "--brief") == 0, capsys.readouterr().err
    assert f"{summary['metric_seen']['circuit']:.4g}" in capsys.readouterr().out
    for suffix in ("json", "graphml", "dot"):
        out = tmp_path / f"circuit.{suffix}"
        assert command("export", str(run), "--out", str(out)) == 0
        again = load_circuit(out)
        assert (again.graph.shape, again.edges()) == (circuit.graph.shape, circuit.edges())
    weights = folder / "W_dec_0.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    assert command("evaluate", str(run), "--brief") == 2
    assert "W_dec_0.safetensors is no readable" in capsys.readouterr().err
