"""Compiled models: they compute their programs, and their circuits are what was wired."""

from __future__ import annotations

import json
import math
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from acdc import models, registry
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import metric_of_circuit
from acdc.errors import InputError, TaskError, UnknownNameError
from acdc.methods.exact import exact
from acdc.methods.sweep import sweep
from acdc.models import load_model
from acdc.models.lowering import LoweredModel
from acdc.runs.discover import discover
from acdc.tasks import Task, load_task
from benchmarks.compiled import MODELS
from benchmarks.compiled.truth import TOLERANCE, CompiledModel, derive, ports
from graphs.graph import component_graph, shape_from_config

NAMES = sorted(MODELS)
KINDS = ("zero", "resample")
REVERSE_ZERO = """
    a3.h0->logits m2->a3.h0<q> pos->a3.h0<k> tok->a3.h0<v> m1->m2 m0->m1 tok->m1 pos->m1
    a0.h0->m0 tok->m0 tok->a0.h0<v>
"""
XPROPORTION_ZERO = """
    a1.h0->logits tok->a1.h0<q> pos->a1.h0<q> tok->a1.h0<k> pos->a1.h0<k> m0->a1.h0<v> tok->m0
"""
PUBLISHED = {
    "tracr-reverse-zero": REVERSE_ZERO,
    "tracr-reverse-resample": "input->a3.h0<v> a3.h0->logits",
    "tracr-xproportion-zero": XPROPORTION_ZERO,
    "tracr-xproportion-resample": "input->m0 m0->a1.h0<v> a1.h0->logits",
}
"""From shared/FACTS.md section 2, in our names."""


@cache
def lowered(name: str, split_embed: bool = False) -> LoweredModel:
    return load_model(str(MODELS[name]), split_embed=split_embed)[0]


@cache
def task(name: str) -> Task:
    model = lowered(name)
    fits = {"d_vocab": model.d_vocab, "d_vocab_out": model.d_vocab_out, "n_ctx": model.n_ctx}
    return load_task(str(MODELS[name] / "pairs.jsonl"), None, **fits)


@cache
def read(name: str, file: str) -> Any:
    return json.loads((MODELS[name] / file).read_text())


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (MODELS[name] / "pairs.jsonl").open()]


def experiment(name: str, kind: str, metric: str = "mse") -> Experiment:
    model = lowered(name, split_embed=kind == "zero")
    return Experiment(model, task(name), get_metric(metric), intervention=kind)  # type: ignore[arg-type]


# --- the models ---------------------------------------------------------------------------


def test_the_suite() -> None:
    assert {"tracr-reverse", "tracr-xproportion"} < set(NAMES)
    assert len(NAMES) >= 10
    size = sum(f.stat().st_size for folder in MODELS.values() for f in folder.iterdir())
    assert size < 1_500_000
    shapes = {name: (lowered(name).shape.n_layers, lowered(name).shape.n_heads) for name in NAMES}
    assert shapes["tracr-reverse"] == (4, 1)
    assert shapes["tracr-xproportion"] == (2, 1)
    assert max(heads for _, heads in shapes.values()) == 4
    directions = {read(name, "config.json")["attention_dir"] for name in NAMES}
    assert directions == {"causal", "bidirectional"}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_tracr(name: str) -> None:
    for key, expected in load_file(MODELS[name] / "expected.safetensors").items():
        length = int(key.removeprefix("logits."))
        tokens = torch.tensor([p.clean for p in task(name).pairs if len(p.clean) == length])
        got = lowered(name).unembed(lowered(name).forward(tokens).final)
        assert got.shape == expected.shape
        assert np.abs(got.numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_program(name: str) -> None:
    card, model = read(name, "card.json"), lowered(name)
    for row in rows(name):
        assert [card["tokens"][t] for t in row["clean"]] == ["BOS", *row["program_input"]]
        logits = model.unembed(model.forward(torch.tensor([row["clean"]])).final)[0]
        for position in (p for p in row["scored"] if p > 0):
            said = row["program_output"][position - 1]
            if card["outputs"] is None:
                assert float(logits[position]) == pytest.approx(said, abs=0.02)
            else:
                assert card["outputs"][int(logits[position].argmax())] == said
                assert float(logits[position].max()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", ["tracr-reverse", "tracr-sort", "tracr-dedupe", "tracr-ioi"])
def test_programs_by_hand(name: str) -> None:
    """What the programs are for, written again in plain Python."""
    by_hand = {
        "tracr-reverse": lambda x: x[::-1],
        "tracr-sort": sorted,
        "tracr-dedupe": lambda x: ["-" if t in x[:i] else t for i, t in enumerate(x)],
        "tracr-ioi": lambda x: [next(t for t in (x[0], x[2]) if x.count(t) == 1)] * len(x),
    }[name]
    for row in rows(name):
        assert row["program_output"] == by_hand(row["program_input"])


def test_ioi_has_answers() -> None:
    measured = experiment("tracr-ioi", "resample", "logit_diff")
    assert measured.plain("clean") == pytest.approx(1, abs=0.02)
    assert measured.plain("corrupt") < 0.5


# --- the circuits -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_references_fit_their_models(name: str, kind: str) -> None:
    reference = read(name, f"reference-{kind}.json")
    assert reference["name"] == f"{name}-{kind}"
    assert reference["model"] == name
    assert reference["ablation"] == {"intervention": kind, "direction": "noising"}
    shape = shape_from_config(reference["graph"])
    assert shape == lowered(name, split_embed=kind == "zero").shape
    graph = component_graph(shape)
    assert graph.edge_mask(reference["edges"]).sum() == len(reference["edges"]) > 0
    for edge in reference["open"].partition(": ")[2].partition(".  ")[0].split(", "):
        if "->" in edge:
            assert edge.removesuffix(".") not in reference["edges"]


@pytest.mark.parametrize("reference", PUBLISHED)
def test_references_are_the_published_circuits(reference: str) -> None:
    name, _, kind = reference.rpartition("-")
    edges = read(name, f"reference-{kind}.json")["edges"]
    assert sorted(edges) == sorted(PUBLISHED[reference].split())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_references_follow_from_the_weights(name: str, kind: str) -> None:
    weights = load_file(MODELS[name] / "model.safetensors")
    model = CompiledModel(
        read(name, "config.json"), {k: x.astype(np.float64) for k, x in weights.items()}
    )
    groups: dict[tuple[int, tuple[int, ...]], list[Any]] = {}
    for pair in task(name).pairs:
        groups.setdefault((len(pair.clean), pair.scored), []).append(pair)
    prompts = [
        (np.array([p.clean for p in some]), np.array([p.corrupt for p in some]), scored)
        for (_, scored), some in sorted(groups.items())
    ]
    truth = derive(model, prompts, kind, split_embed=kind == "zero")  # type: ignore[arg-type]
    assert truth.edges == read(name, f"reference-{kind}.json")["edges"]
    assert truth.least_kept > 4 * TOLERANCE  # no edge was a matter of the tolerance
    assert truth.most_dropped < TOLERANCE / 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_circuits_alone_do_what_the_models_do(name: str, kind: str) -> None:
    e = experiment(name, kind)
    circuit = e.graph.edge_mask(read(name, f"reference-{kind}.json")["edges"])
    assert metric_of_circuit(e, circuit) < 1e-6
    assert metric_of_circuit(e, circuit & False) > 0.1


def identity_model() -> CompiledModel:
    """Directions 0, 1 of the tokens; the MLP writes token 1 to direction 2; logits read 0 and 2."""
    eye = np.eye(4)
    weights = {
        "embed.W_E": eye[:2], "pos_embed.W_pos": np.zeros((3, 4)),
        **{f"blocks.0.attn.W_{k}": np.zeros((1, 4, 2)) for k in "QKV"},
        "blocks.0.attn.W_O": np.zeros((1, 2, 4)),
        "blocks.0.mlp.W_in": eye[:, 1:2], "blocks.0.mlp.b_in": np.zeros(1),
        "blocks.0.mlp.W_out": eye[2:3], "unembed.W_U": eye[:, [0, 2]],
    }  # fmt: skip
    config = {"n_layers": 1, "n_heads": 1, "d_head": 2, "attention_dir": "causal",
              "attn_only": False}  # fmt: skip
    return CompiledModel(config, weights)


def test_derivation_by_hand() -> None:
    model = identity_model()
    assert ports("a0.h0") == ("a0.h0<q>", "a0.h0<k>", "a0.h0<v>")
    ones, zeros = np.array([[1, 1]]), np.array([[0, 0]])
    # token 1: the MLP speaks; nothing stands in direction 0, which the logits read of the tokens
    truth = derive(model, [(ones, zeros, [1])], "zero", split_embed=True)
    assert truth.edges == ["m0->logits", "tok->m0"]
    assert truth.unneeded == ["tok->logits"]
    # token 0: the other way round
    truth = derive(model, [(zeros, ones, [1])], "zero", split_embed=True)
    assert truth.edges == ["tok->logits"]
    # both change when the tokens are exchanged, but not where the corruption keeps them
    truth = derive(model, [(zeros, ones, [1])], "resample", split_embed=False)
    assert truth.edges == ["input->logits", "m0->logits", "input->m0"]
    truth = derive(model, [(zeros, np.array([[1, 0]]), [1])], "resample", split_embed=False)
    assert truth.edges == []


# --- what methods find --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tracr-reverse", "tracr-xproportion"])
def test_acdc_finds_the_circuits_of_the_paper(name: str) -> None:
    """Conmy et al. 2023: zero ablation and mean squared error give an edge AUROC of 1."""
    e = experiment(name, "zero")
    true = e.graph.edge_mask(read(name, "reference-zero.json")["edges"])
    taus = np.logspace(-9, 0, 10).tolist()
    circuits, _ = sweep(e, taus)
    # one point without a miss and without an extra edge makes the area under the curve 1
    assert any((c.in_circuit == true).all() for c in circuits.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "tracr-dyck2"])
def test_each_needed_edge_shows_alone(name: str, kind: str) -> None:
    e = experiment(name, kind)
    true = e.graph.edge_mask(read(name, f"reference-{kind}.json")["edges"])
    effect = np.abs(exact(e))
    assert effect[true].min() > 1e-2
    assert effect[~true].max() < 1e-6


# --- names and bad input ------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point of pyproject.toml, whatever is installed."""
    point = EntryPoint("compiled", "benchmarks.compiled:MODELS", "acdc.models")
    found = EntryPoints([point])
    monkeypatch.setattr(registry, "entry_points", lambda group: found.select(group=group))
    known = registry.Registry("model", Path, "acdc.models", known=models.BUNDLED)
    monkeypatch.setattr(models, "MODELS", known)


@pytest.mark.usefixtures("installed")
def test_models_of_other_packages_go_by_name() -> None:
    assert list(models.MODELS) == [*models.BUNDLED, *MODELS]
    assert load_model("tracr-count")[0].name == "tracr-count"
    with pytest.raises(UnknownNameError, match="did you mean tracr-sort"):
        load_model("tracr-sotr")


@pytest.mark.usefixtures("installed")
def test_discovery_by_name_and_file() -> None:
    pairs = str(MODELS["tracr-reverse"] / "pairs.jsonl")
    run = discover(pairs, model="tracr-reverse", metric="mse", threshold=1e-3)
    assert sorted(run.circuit.edges()) == sorted(PUBLISHED["tracr-reverse-resample"].split())
    with pytest.raises(TaskError, match="row 1: metric 'logit_diff' scores answers"):
        discover(pairs, model="tracr-reverse", metric="logit_diff", threshold=1e-3)


def test_the_entry_point_is_declared() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["acdc.models"]["compiled"] == "benchmarks.compiled:MODELS"
    assert "tracr" in " ".join(project["optional-dependencies"]["compile"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scored": [1, 4]},
            "row 1: position 4 is scored, but the prompt has the positions 0 to 3",
        ),
        ({"answers": [3]}, "row 1: token id 3 is not in the model's vocabulary: ids are 0 to 2"),
        ({"clean": [0, 2, 3, 9]}, "row 1: token id 9 is not in the model's vocabulary"),
    ],
)
def test_bad_rows(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(rows("tracr-reverse")[0] | change) + "\n")
    with pytest.raises(InputError, match=message):
        discover(str(path), model=str(MODELS["tracr-reverse"]), metric="mse", threshold=0.1)


def test_a_model_of_one_output_has_a_flat_kl() -> None:
    """A softmax of one number is 1: kl sees nothing there, mse does."""
    assert experiment("tracr-xproportion", "zero", "kl").plain("corrupt") == 0
    corrupt = experiment("tracr-xproportion", "zero").plain("corrupt")
    wanted = [
        (a - b) ** 2
        for row, other in zip(rows("tracr-xproportion"), shifted(), strict=True)
        for a, b in zip(row["program_output"], other["program_output"], strict=True)
    ]
    n_rows = experiment("tracr-xproportion", "zero").n_rows
    assert corrupt == pytest.approx(math.fsum(wanted) / n_rows, rel=0.02)


def shifted() -> list[dict[str, Any]]:
    """Rows whose clean prompt is the corrupt one of each row."""
    by_prompt = {tuple(row["clean"]): row for row in rows("tracr-xproportion")}
    return [by_prompt[tuple(row["corrupt"])] for row in rows("tracr-xproportion")]
