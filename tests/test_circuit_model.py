"""Model folders with only a circuit's nodes left: loaded anew, they are the ablated run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from command_line import N_ROWS, status_of
from parity_pairs import jsonl, parity_rows
from safetensors.torch import load_file
from test_experts import plain_module
from test_lowering import FAMILIES, VOCAB, build

import acdc
from acdc.engine.patched import PatchedModel
from acdc.errors import ModelError, OptionError
from acdc.evidence.what_if import ablating
from acdc.measure.ordinary import docstrings, text_loss
from acdc.models import load_model
from acdc.runs.discover import fit
from acdc.runs.opened import open_run
from acdc.runs.reporter import Silent
from graphs import Circuit, component_graph

KEPT = ("a0.h1", "a1.h0", "m1")
NO_PLACE = {"gemma2": "its MLPs are read through a norm of their own"}
"""Families whose weights have no place for a mean."""


def ids_task(folder: Path) -> str:
    """A file of random prompts of token ids."""
    draw = np.random.default_rng(0)
    rows = [
        {key: draw.integers(1, VOCAB, 7).tolist() for key in ("clean", "corrupt")}
        | {"answers": [1], "wrong_answers": [2]}
        for _ in range(6)
    ]  # fmt: skip
    path = folder / "pairs.jsonl"
    path.write_text(jsonl(rows))
    return str(path)


def circuit_of(source: Path, kept: tuple[str, ...] = KEPT) -> Circuit:
    graph = component_graph(load_model(str(source))[0].shape)
    return Circuit.from_edges(graph, [f"{node}->logits" for node in ("input", *kept)])


def saved(family: str, folder: Path) -> Path:
    build(family).save_pretrained(folder / family)
    return folder / family


def ablated_logits(circuit: Circuit, kept: tuple[str, ...], asked: dict[str, Any]) -> np.ndarray:
    """Metric of each prompt with every edge out of the other nodes ablated."""
    settings = open_run(circuit).settings(**asked)
    experiment = ablating(fit(circuit, settings)[1], settings, asked, Silent())
    graph = experiment.graph
    senders = np.array([graph.senders[u].split("@")[0] for u in graph.edge_sender])
    return PatchedModel(experiment).values(np.isin(senders, ("input", *kept)))


@pytest.mark.parametrize("intervention", ["mean", "zero"])
@pytest.mark.parametrize("family", ["gpt2", "neox-parallel", "llama", "gemma2"])
def test_the_folder_is_the_ablated_run(family: str, intervention: str, tmp_path: Path) -> None:
    source, task = saved(family, tmp_path), ids_task(tmp_path)
    circuit = circuit_of(source)
    asked = {"task": task, "model": str(source), "intervention": intervention, "metric": "nll"}
    if intervention == "mean" and family in NO_PLACE:
        with pytest.raises(ModelError, match=NO_PLACE[family]):
            acdc.export_model(circuit, tmp_path / "new", **asked)
        assert not (tmp_path / "new").exists()
        return
    found = acdc.export_model(circuit, tmp_path / "new", **asked)
    assert found.kept == KEPT
    wanted = ablated_logits(circuit, KEPT, asked)
    assert found.metric_after == pytest.approx(float(wanted.mean()), abs=1e-4)
    assert found.difference < 1e-4
    assert found.metric_before != pytest.approx(found.metric_after, abs=1e-2), "shows nothing"
    tokens = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    ours, _ = load_model(str(tmp_path / "new"))
    with torch.no_grad():
        logits = ours.unembed(ours.forward(tokens).final)
        torch.testing.assert_close(logits, theirs(tokens).logits, atol=2e-3, rtol=1e-3)


def refusal(circuit: Circuit, folder: Path, asked: dict[str, Any]) -> str | None:
    """Why a model cannot be written; None if it can."""
    try:
        acdc.export_model(circuit, folder, **asked)
    except ModelError as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_written_or_refused_by_name(family: str, tmp_path: Path) -> None:
    source, task = saved(family, tmp_path), ids_task(tmp_path)
    circuit = circuit_of(source)
    asked = {"task": task, "model": str(source), "metric": "nll"}
    zero = acdc.export_model(circuit, tmp_path / "zero", intervention="zero", **asked)
    assert zero.difference < 1e-3
    said = refusal(circuit, tmp_path / "mean", asked)
    assert said is None or "--intervention zero" in said


def test_a_native_model(data: Path, tmp_path: Path) -> None:
    source = data / "parity" / "ln2"
    task = tmp_path / "pairs.jsonl"
    task.write_text(jsonl(parity_rows(source, N_ROWS)))
    run = acdc.discover(str(task), model=str(source), method="eap", n_edges=6)
    run.save(tmp_path / "run")
    found = acdc.export_model(tmp_path / "run", tmp_path / "new")
    assert found.about["intervention"] == "mean"
    assert found.replaced
    assert (found.loss_before, found.n_tokens) == (None, 0), "it has no tokenizer"
    assert found.n_left < found.n_parameters
    assert json.loads((tmp_path / "new" / "circuit-model.json").read_text())["kept"] == [
        *found.kept
    ]
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "new"))
    layer, head = int(found.replaced[0][1]), int(found.replaced[0][-1])
    assert found.replaced[0].startswith("a")
    assert old[f"blocks.{layer}.attn.W_O"][head].any()
    assert not new[f"blocks.{layer}.attn.W_O"][head].any()
    assert old.keys() == new.keys()
    with pytest.raises(OptionError, match="constants depend on the position"):
        acdc.export_model(tmp_path / "run", tmp_path / "other", intervention="mean-positional")


def test_ordinary_text(gpt2: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [
        {"clean": f"The {a} is here", "corrupt": f"The {b} is here", "answers": [" now"],
         "wrong_answers": [" not"]}
        for a, b in (("cat", "dog"), ("sun", "man"), ("sea", "boy"))
    ]  # fmt: skip
    (tmp_path / "task.jsonl").write_text(jsonl(rows))
    text = tmp_path / "text.txt"
    text.write_text("Nobody knows what the old house on the hill has seen. " * 4)
    acdc.discover(str(tmp_path / "task.jsonl"), model=str(gpt2), method="eap", n_edges=5).save(
        tmp_path / "run"
    )
    out = tmp_path / "new"
    options = ("--format", "model", "--out", out, "--text", text)
    assert status_of("export", tmp_path / "run", *options) == 0
    assert "loss, ordinary text" in capsys.readouterr().out
    summary = json.loads((out / "circuit-model.json").read_text())
    model, tokenizer = load_model(str(out))
    assert tokenizer is not None
    ids = tokenizer.encode(text.read_text(), add_special_tokens=False)
    assert summary["n_tokens"] == len(ids)
    assert summary["loss_after"] == pytest.approx(text_loss(model, ids), abs=1e-5)
    assert status_of("export", tmp_path / "run", *options) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_the_loss_of_a_text_by_hand(gpt2: Path) -> None:
    model, _ = load_model(str(gpt2))
    ids = list(range(50, 50 + 300))
    total, n = 0.0, 0
    for piece in (ids[:256], ids[256:]):
        with torch.no_grad():
            logits = model.unembed(model.forward(torch.tensor([piece])).final)[0]
        log = torch.log_softmax(logits, -1)
        total -= sum(float(log[i, token]) for i, token in enumerate(piece[1:]))
        n += len(piece) - 1
    assert text_loss(model, ids) == pytest.approx(total / n, rel=1e-5)
    assert docstrings(500) == docstrings(1000)[:500]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "model"], "say with --out which folder to write"),
        (["--text", "x.txt"], "they are for --format model"),
        (["--format", "model", "--out", "new", "--text", "nowhere.txt"], "nowhere.txt"),
        (["--format", "model", "--out", "new", "--intervention", "none"], "'none'"),
        (
            ["--format", "model", "--out", "new", "--intervention", "resample"],
            "intervention 'resample' carries what another run makes",
        ),
        (["--format", "model", "--out", "new", "--negate"], "--negate with --format model"),
        (["--format", "model", "--out", "new", "--max-edges", "9"], "--max-edges with --format"),
        (["--format", "model", "--out", "new", "--no-error-nodes"], "--no-error-nodes with"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], message: str, data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    source = data / "parity" / "ln2"
    shutil.copytree(source, tmp_path / "ln2")
    (tmp_path / "pairs.jsonl").write_text(jsonl(parity_rows(source, N_ROWS)))
    monkeypatch.chdir(tmp_path)
    acdc.discover("pairs.jsonl", model="ln2", method="eap", n_edges=6).save("run")
    assert status_of("export", "run", *options) == 2
    assert message in capsys.readouterr().err
    assert not Path("new").exists()


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    plain_module("Mixtral", 0).save_pretrained(tmp_path / "model")
    draw = {"clean": [1, 2, 3], "corrupt": [1, 4, 3], "answers": [1], "wrong_answers": [2]}
    (tmp_path / "pairs.jsonl").write_text(jsonl([draw, draw | {"clean": [2, 2, 3]}]))
    asked = {"task": str(tmp_path / "pairs.jsonl"), "model": str(tmp_path / "model")}
    circuit = circuit_of(tmp_path / "model")
    said = refusal(circuit, tmp_path / "new", asked | {"metric": "nll", "intervention": "zero"})
    assert said is not None
    assert "has no one matrix that writes, as a mixture of experts" in said
    assert not (tmp_path / "new").exists()


def test_parts_of_nodes_are_refused(data: Path, tmp_path: Path) -> None:
    source = data / "parity" / "ln2"
    task = tmp_path / "pairs.jsonl"
    task.write_text(jsonl(parity_rows(source, N_ROWS)))
    run = acdc.discover(str(task), model=str(source), method="eap", n_edges=6, neurons=True)
    with pytest.raises(OptionError, match="only whole heads and MLPs can be left out"):
        acdc.export_model(run, tmp_path / "new")
