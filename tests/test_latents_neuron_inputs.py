"""Neurons with receivers of their own, against a slow pass in which every edge is explicit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latent_oracle import NEURON_INPUTS
from test_latents import tolerance
from test_latents_positions import build, check_acdc

from acdc.cli import main
from acdc.dictionaries.attach import attach_neurons
from acdc.engine.patched import PatchedModel
from acdc.engine.work import Work
from acdc.methods import METHODS
from acdc.methods.eap import eap
from acdc.methods.exact import exact
from graphs import load_circuit
from graphs.order import edge_order, receiver_order
from graphs.sites import Site, sites_from_text, sites_to_text

FAMILIES = ("LN", "RMS", "gated rotary", "grouped", "GPTNeoX", "GPTNeo", "Qwen3", "Gemma2")
LN2 = str(Path(__file__).parent / "data" / "parity" / "ln2")


def made(family: str, **options: Any) -> Any:
    return build(NEURON_INPUTS, family, positions=None, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_in_gives_the_model_and_masks_the_oracle(family: str) -> None:
    experiment, slow = made(family)
    graph, close = experiment.graph, tolerance(experiment)
    order = [e for v in receiver_order(graph) for e in graph.edge_names(edge_order(graph, v))]
    assert order == slow.edges
    assert {"m0.n1", "m0.n4", "m0.err", "m1.n1", "m1.n5", "m1.err"} <= set(graph.receivers)
    patched = PatchedModel(experiment)
    every = np.ones(graph.n_edges, dtype=bool)
    assert patched.metric(every) == pytest.approx(experiment.plain("clean"), abs=close)
    assert patched.metric(~every) == pytest.approx(experiment.plain("corrupt"), abs=close)
    rng = np.random.default_rng(1)
    for part in (0.1, 0.5, 0.9):
        mask = rng.random(graph.n_edges) < part
        wanted = slow.without(graph.edge_names(np.flatnonzero(~mask)))
        assert patched.metric(mask) == pytest.approx(wanted, abs=close)


@pytest.mark.parametrize("family", FAMILIES)
def test_eap_is_the_derivative_of_ablating_an_edge(family: str) -> None:
    """Through W_in, the gate, the norm in front, and a post-norm's scale."""
    experiment, slow = made(family)
    wanted = slow.derivatives()
    largest = max(map(abs, wanted.values()))
    into = max(abs(x) for edge, x in wanted.items() if re.search(r"->m\d\.n", edge))
    assert into > 1e-3 * largest
    part = 1e-6 if experiment.model.W_U.element_size() == 8 else 1e-3
    names = experiment.graph.edge_names()
    for memory in (1 << 30, 1 << 12):
        for edge, score in zip(names, eap(experiment, work=Work(memory=memory)), strict=True):
            assert abs(score - wanted[edge]) < part * largest, edge


@pytest.mark.parametrize("family", ["LN", "gated rotary", "Gemma2"])
def test_all_neurons_reading_alone_are_the_model(family: str) -> None:
    experiment, _ = made(family)
    plain = replace(experiment, attachments=())
    everyone = attach_neurons(plain, alone=True).experiment
    graph = everyone.graph
    every = np.ones(graph.n_edges, dtype=bool)
    close = 1e-5
    assert PatchedModel(everyone).metric(every) == pytest.approx(plain.plain("clean"), abs=close)
    together = attach_neurons(plain, max_neurons=5).experiment.graph
    alone = attach_neurons(plain, max_neurons=5, alone=True).experiment.graph
    assert together.senders == alone.senders  # the same are chosen


@pytest.mark.parametrize(
    ("family", "intervention", "direction"),
    [
        ("LN", "resample", "noising"),
        ("LN", "zero", "noising"),
        ("gated rotary", "mean", "denoising"),
        ("Gemma2", "zero", "denoising"),
        ("GPTNeoX", "mean-positional", "noising"),
    ],
)
def test_acdc_is_the_sequential_one(family: str, intervention: str, direction: str) -> None:
    experiment, slow = made(family, intervention=intervention, direction=direction)
    check_acdc(experiment, slow, 0.02)


def test_exact_ablates_each_edge_alone() -> None:
    experiment, slow = made("LN")
    base, found = slow.without(()), exact(experiment)
    into = [e for e, name in enumerate(experiment.graph.edge_names()) if "->m1." in name]
    for e in into[::3]:
        wanted = slow.without([experiment.graph.edge_name(e)]) - base
        assert found[e] == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("name", [name for name in METHODS if "probing" not in name])
def test_every_method_takes_them(name: str) -> None:
    experiment, _ = made("gated rotary")
    size = {} if METHODS[name].over == "circuit" else {"n_edges": 30}
    asked = {"mask_steps": 5} if name == "edge-pruning" else {}
    if name in ("acdc", "eap-acdc"):
        size = {"threshold": 0.02}
    found = METHODS[name].find(experiment, **size, **asked)
    assert np.isfinite(found.circuit.scores).all()
    into = [n.split("->")[1].startswith("m") for n in experiment.graph.edge_names()]
    assert np.abs(found.circuit.scores[into]).max() > 0


def test_sites_in_files() -> None:
    sites = (Site("neuron_inputs", 0, (3, 7)),)
    assert sites[0].nodes == ("m0.n3", "m0.n7", "m0.err")
    assert sites_from_text(sites_to_text(sites)) == sites


def call(*arguments: str) -> int:
    """Run the command line; return its status."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"clean": [4, 5, 6, 7], "corrupt": [8, 5, 6, 7], "answers": [4], "wrong_answers": [8]},
        {"clean": [9, 5, 6, 7], "corrupt": [3, 5, 6, 7], "answers": [9], "wrong_answers": [3]},
    ]
    file, folder = tmp_path / "pairs.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = (str(file), "--model", LN2, "--method", "eap", "--edges", "150", "--holdout", "0")
    few = ("--neurons", "--neuron-inputs", "--max-latents", "6")
    assert call("discover", *asked, *few, "--out", str(folder)) == 0
    circuit = load_circuit(folder / "circuit.json")
    assert {site.kind for site in circuit.graph.shape.sites} == {"neuron_inputs"}
    into = [edge for edge in circuit.edges() if re.search(r"->m\d\.n\d+$", edge)]
    assert into
    assert into[0].split("->")[1] in (folder / "circuit.svg").read_text()
    summary = json.loads((folder / "run.json").read_text())
    capsys.readouterr()
    assert call("evaluate", str(folder), "--brief") == 0
    assert f"{summary['metric_seen']['circuit']:.4g}" in capsys.readouterr().out
    assert call("discover", *asked, "--neuron-inputs", "--out", str(tmp_path / "no")) == 2
    error = capsys.readouterr().err
    assert "neuron_inputs True does nothing without neurons: leave it out" in error
    assert not (tmp_path / "no").exists()
