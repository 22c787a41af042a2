"""Gates built by hand are named by their interactions; sums with noise are not taken for gates.

Prompt: three bits and ``=``.  Head h copies bit h to the last position, the MLP combines them, the
logit of ``yes`` reads the MLP.  The third bit is noise: it is the same in both prompts of a pair,
and turns the sign of an interaction that is then 0 on the mean.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

import acdc
from acdc.cli import main
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.errors import OptionError
from acdc.evidence.interactions import DIRECTIONS, _measure
from acdc.measure.evaluation import Evaluator
from acdc.measure.gates import combined, name_gates
from acdc.models import load_model
from acdc.models.lowering.model import LoweredModel
from acdc.runs.reporter import Silent
from acdc.tasks.base import Pair, Task

ZERO, ONE, EQUALS, YES, NO = range(5)
N_BITS, BIT, AT, COPY, OUT = 3, 0, (1, 2, 3, 4), (5, 6, 7), 8
D_MODEL, D_MLP = 9, 8
CONFIG = {
    "n_layers": 1, "n_heads": N_BITS, "d_model": D_MODEL, "d_head": 1, "d_mlp": D_MLP, "n_ctx": 4,
    "d_vocab": 5, "act_fn": "relu", "normalization_type": None,
    "positional_embedding_type": "standard", "attn_scale": 1.0,
}  # fmt: skip
EDGES = ("a0.h0->m0", "a0.h1->m0")
X, Y, Z = range(3)

# Neurons as (weights of the bits, bias, what they add to the output).
Neuron = tuple[tuple[float, float, float], float, float]
GATES: dict[str, list[Neuron]] = {
    "AND": [((1, 1, 0), -1, 1)],
    "OR": [((1, 1, 0), 0, 1), ((1, 1, 0), -1, -1)],
    "XOR": [((1, 1, 0), 0, 1), ((1, 1, 0), -1, -2)],
    "INHIBITION": [((1, -1, 0), 0, 1)],
    "additive": [((1, 0, 0), 0, 1), ((0, 1, 0), 0, 0.5)],
    "none": [((0, 0, 1), 0, 1)],
}


def noise(size: float) -> list[Neuron]:
    """Neurons that add ``size * x y`` where z is 1, and take it away where it is 0."""
    return [((1, 1, 1), -2, size), ((1, 1, -1), -1, -size)]


def write_model(folder: Path) -> None:
    """Heads that copy, and an MLP that does nothing yet."""
    state = {
        "embed.W_E": torch.zeros(5, D_MODEL), "pos_embed.W_pos": torch.zeros(4, D_MODEL),
        "unembed.W_U": torch.zeros(D_MODEL, 5), "unembed.b_U": torch.zeros(5),
    }  # fmt: skip
    shapes = {"W_Q": (N_BITS, D_MODEL, 1), "W_O": (N_BITS, 1, D_MODEL), "b_Q": (N_BITS, 1)}
    attention = {f"W_{k}": torch.zeros(*shapes["W_Q"]) for k in "QKV"}
    attention |= {"W_O": torch.zeros(*shapes["W_O"]), "b_O": torch.zeros(D_MODEL)}
    attention |= {f"b_{k}": torch.zeros(*shapes["b_Q"]) for k in "QKV"}
    state["embed.W_E"][ONE, BIT] = 1
    for position, direction in enumerate(AT):
        state["pos_embed.W_pos"][position, direction] = 1
    for head in range(N_BITS):
        attention["W_Q"][head, AT[N_BITS]] = 50  # the last position looks at position ``head``
        attention["W_K"][head, AT[head]] = 1
        attention["W_V"][head, BIT] = 1
        attention["W_O"][head, 0, COPY[head]] = 1
    mlp = {"W_in": torch.zeros(D_MODEL, D_MLP), "b_in": torch.zeros(D_MLP)}
    mlp |= {"W_out": torch.zeros(D_MLP, D_MODEL), "b_out": torch.zeros(D_MODEL)}
    state["unembed.W_U"][OUT, YES] = 1
    state |= {f"blocks.0.attn.{k}": v for k, v in attention.items()}
    state |= {f"blocks.0.mlp.{k}": v for k, v in mlp.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(state, folder / "model.safetensors")


def mlp_weights(neurons: list[Neuron]) -> tuple[Tensor, Tensor, Tensor]:
    W_in, b_in, W_out = torch.zeros(D_MODEL, D_MLP), torch.zeros(D_MLP), torch.zeros(D_MLP, D_MODEL)
    for i, (weights, bias, out) in enumerate(neurons):
        for bit, weight in enumerate(weights):
            W_in[COPY[bit], i] = weight
        b_in[i], W_out[i, OUT] = bias, out
    return W_in, b_in, W_out


def write_gate(folder: Path, neurons: list[Neuron]) -> None:
    from safetensors.torch import load_file

    write_model(folder)
    state = load_file(folder / "model.safetensors")
    for name, value in zip(("W_in", "b_in", "W_out"), mlp_weights(neurons), strict=True):
        state[f"blocks.0.mlp.{name}"] = value.contiguous()
    save_file(state, folder / "model.safetensors")


def rows(n: int, seed: int) -> list[dict[str, list[int]]]:
    """Both bits on against both off; noise as it comes."""
    z = np.random.default_rng(seed).choice([ZERO, ONE], n).tolist()
    return [
        {"clean": [ONE, ONE, b, EQUALS], "corrupt": [ZERO, ZERO, b, EQUALS],
         "answers": [YES], "wrong_answers": [NO]}
        for b in z
    ]  # fmt: skip


def task(n: int, seed: int) -> Task:
    return Task("bits", tuple(Pair(*(tuple(row[k]) for k in row)) for row in rows(n, seed)))


def tables(
    model: LoweredModel, prompts: Task, intervention: str = "resample"
) -> NDArray[np.float64]:
    """``[direction, i, j, prompt]`` of the two heads' edges into the MLP."""
    experiment = Experiment(model, prompts, get_metric("logit_diff"), intervention=intervention)
    pair = tuple(np.flatnonzero(experiment.graph.edge_mask(EDGES)).tolist())
    found = []
    for direction in DIRECTIONS:
        evaluator = Evaluator(replace(experiment, direction=direction))
        found.append(_measure(evaluator, [pair], direction, Silent()))
    return np.concatenate(found)


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> LoweredModel:
    folder = tmp_path_factory.mktemp("gates")
    write_model(folder)
    return load_model(str(folder))[0]


def become(model: LoweredModel, neurons: list[Neuron]) -> None:
    """Give a loaded model other neurons."""
    values = mlp_weights(neurons)
    mlp = model.layers[0].mlp
    assert mlp is not None
    (reader, W_in), = mlp.readers  # fmt: skip
    with torch.no_grad():
        W_in.copy_(values[0])
        mlp.W_out.copy_(values[2])
        bias = next(p for name, p in reader.named_parameters() if "b" in name.split(".")[-1])
        bias.copy_(values[1])


@pytest.mark.parametrize(  # noise is an effect: with it there is no pair of none
    ("gate", "size"), [*((gate, 0.0) for gate in GATES), *((g, 0.3) for g in GATES if g != "none")]
)
def test_a_gate_is_named(gate: str, size: float, tmp_path: Path) -> None:
    write_gate(tmp_path, GATES[gate] + noise(size))
    model, _ = load_model(str(tmp_path))
    found = name_gates(tables(model, task(64, seed=1)))
    assert [g.kind for g in found] == [gate, gate]
    wanted = {"AND": 1, "OR": -1, "XOR": -2, "INHIBITION": -1}.get(gate, 0)
    for g in found:
        assert g.low <= wanted <= g.high


@pytest.mark.parametrize("gate", ["AND", "OR"])
@pytest.mark.parametrize("intervention", ["zero", "resample", "mean"])
def test_a_gate_has_its_name_where_zeros_are_not_the_clean_runs(
    gate: str, intervention: str, tmp_path: Path
) -> None:
    """The corrupt prompts have bits on, too: zero ablation takes these away in denoising."""
    write_gate(tmp_path, GATES[gate] + noise(0.2))
    model, _ = load_model(str(tmp_path))
    prompts = task(64, seed=1)
    if intervention == "zero":
        pairs = [replace(p, corrupt=(ONE, ONE, ONE, EQUALS)) for p in prompts.pairs]
        prompts = replace(prompts, pairs=tuple(pairs))
    found = name_gates(tables(model, prompts, intervention))
    assert [g.kind for g in found] == [gate, gate]


def test_the_four_values_are_the_truth_table(tmp_path: Path) -> None:
    write_gate(tmp_path, GATES["INHIBITION"])
    model, _ = load_model(str(tmp_path))
    for g in name_gates(tables(model, task(32, seed=0))):
        assert (g.neither, g.only_b, g.only_a, g.both) == pytest.approx((0, 0, 1, 0), abs=1e-5)


def test_sums_with_noise_are_seldom_called_gates(blank: LoweredModel) -> None:
    """200 random sums, whose interaction is noise on every prompt and 0 on the mean."""
    rng, n_false, n = np.random.default_rng(0), 0, 200
    for i in range(n):
        a, b, size = rng.normal(), rng.normal(), rng.uniform(0.1, 2)
        become(blank, [((1, 0, 0), 0, a), ((0, 1, 0), 0, b), *noise(size)])
        found = name_gates(tables(blank, task(32, seed=i)), n_resamples=400, seed=i)
        n_false += any(g.is_gate for g in found)
    assert n_false / n < 0.05


@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed"])
def test_many_sums_at_once_are_seldom_called_gates(kind: str) -> None:
    """The level holds for the whole family: any of 40 pairs, whatever the noise."""
    rng = np.random.default_rng(1)
    draw = {
        "normal": rng.standard_normal,
        "heavy": lambda size: rng.standard_t(3, size),
        "skewed": lambda size: rng.exponential(size=size) - 1,
    }[kind]
    n_false = 0
    for i in range(60):
        a, b = rng.normal(size=(2, 40, 1, 1, 1))
        values = a * np.array([0, 1])[:, None, None] + b * np.array([0, 1])[None, :, None]
        values = values + draw((40, 2, 2, 64))
        n_false += any(g.is_gate for g in name_gates(values, n_resamples=300, seed=i))
    assert n_false / 60 < 0.05


def test_a_gate_among_sums_is_found() -> None:
    rng = np.random.default_rng(2)
    values = 0.2 * rng.standard_normal((30, 2, 2, 64))
    values[7] += np.array([[0, 0], [0, 1.0]])[:, :, None]
    values[8] += np.array([[0, 1], [1, 1.0]])[:, :, None]
    found = name_gates(values)
    assert [found[7].kind, found[8].kind] == ["AND", "OR"]
    assert sum(g.is_gate for g in found) == 2


def test_a_gate_of_a_metric_that_falls_has_the_same_name() -> None:
    """As KL divergence, which is 0 where all is clean."""
    table = {"AND": [[0, 0], [0, 1]], "OR": [[0, 1], [1, 1]], "XOR": [[0, 1], [1, 0]]}
    for kind, cells in table.items():
        values = (1 - np.array(cells, dtype=float))[None, :, :, None].repeat(32, -1)
        assert name_gates(values)[0].kind == kind


def test_few_prompts_and_no_pairs() -> None:
    with pytest.raises(OptionError, match=r"31 prompts: .* at least 32"):
        name_gates(np.zeros((1, 2, 2, 31)))
    assert name_gates(np.zeros((0, 2, 2, 32))) == []


def test_directions_that_disagree_are_mixed() -> None:
    assert combined(["AND", "OR"]) == "mixed"
    assert combined(["none", "XOR"]) == "XOR"
    assert combined(["additive", "additive"]) == "additive"


# --- of a run -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs in both directions of an OR with noise."""
    folder = tmp_path_factory.mktemp("both")
    write_gate(folder / "model", GATES["OR"] + noise(0.2))
    lines = [json.dumps(row) + "\n" for row in rows(48, seed=3)]
    (folder / "bits.jsonl").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command = ["discover", "bits.jsonl", "--model", "model", "--threshold", "0.5"]
        assert call(*command, "--out", "both", "--direction", "both", "--holdout", "0") == 0
    return folder


@pytest.fixture
def place(both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with these."""
    shutil.copytree(both, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def test_candidates_of_both_directions_are_tested(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("interactions", "both", "--seen", "--out", "gates.json") == 0
    said = capsys.readouterr().out
    assert "1 OR" in said
    found = json.loads((place / "gates.json").read_text())
    assert found["counts"]["OR"] == 1
    (gate,) = (pair for pair in found["pairs"] if pair["kind"] == "OR")
    assert {gate["a"], gate["b"]} == set(EDGES)
    assert gate["node"] == "m0"
    assert gate["noising"]["low"] < -1 < gate["noising"]["high"] < 0
    assert gate["denoising"]["kind"] == "OR"
    (tested,) = found["candidates"]
    assert (tested["gate"], tested["receiver"], tested["holds"]) == ("OR", "m0", True)
    assert tested["kinds"] == {"OR": 1}
    assert "candidates for OR: 1 of 1 tested hold (m0)" in said
    before = (place / "gates.json").read_bytes()
    assert call("interactions", "both", "--seen", "--out", "gates.json") == 2
    assert (place / "gates.json").read_bytes() == before


def test_edges_that_are_named_are_tested_alone(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edges = [option for edge in (*EDGES, "a0.h2->m0") for option in ("--edge", edge)]
    assert call("interactions", "both/denoising", "--seen", *edges, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["n_tested"], found["n_left_out"]) == (3, 0)
    assert [pair["kind"] for pair in found["pairs"]] == ["OR", "additive", "additive"]
    of_run = acdc.interactions("both/noising", EDGES, seen=True)
    assert of_run.counts == {"OR": 1}
    assert "1 OR" in repr(of_run)
    assert of_run.save("again").is_file()
    (first,) = acdc.interactions("both", seen=True, max_pairs=1).pairs
    assert {first.a, first.b} == set(EDGES)  # candidates come first


BAD = {
    "--edge a0.h0->m0": "no pair of edges to test",
    "--edge a9.h0->m0 --edge a0.h0->m0": "no sender 'a9.h0'",
    "--alpha 0": "alpha 0: expected a level",
    "--max-pairs 0": "max_pairs 0",
    "--n-resamples 0": "n_resamples 0",
    "--n-prompts 31": "31 prompts: the spread of interactions needs at least 32",
    "--n-resamples 999": "n_resamples 999 at alpha 0.01: expected at least 1,000",
    "--alpha 0.001": "n_resamples 1000 at alpha 0.001: expected at least 10,000",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_input(place: Path, options: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    before = sorted(place.rglob("*"))
    assert call("interactions", "both", "--seen", "--out", "new.json", *options.split()) == 2
    said = capsys.readouterr()
    assert BAD[options] in said.err
    assert said.err.splitlines()[-1].startswith("acdc: ")
    assert sorted(place.rglob("*")) == before


def test_too_few_prompts_are_refused_before_anything_is_measured(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acdc.evidence.interactions._measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(OptionError, match="31 prompts"):
        acdc.interactions("both", seen=True, n_prompts=31)


def test_what_the_model_does_not_do_and_a_metric_that_bends_are_said(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert acdc.interactions("both", seen=True).warnings == ()
    same = [{**row, "answers": [NO], "wrong_answers": [YES]} for row in rows(40, seed=1)]
    (place / "wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in same))
    command = ["interactions", "both", "--seen", "--task", "wrong.jsonl", "--metric", "prob_diff"]
    assert call(*command, "--out", "gates.json") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: the model does not do the task" in said
    assert "warning: under prob_diff edges that add in the logits can look like OR" in said
    found = json.loads((place / "gates.json").read_text())
    assert any("does not do the task" in line for line in found["warnings"])
    assert any("--metric logit_diff" in line for line in found["warnings"])
    assert found["axis"] == "clean"
    assert acdc.interactions("both", seen=True, intervention="zero").axis == "intact"


def test_both_directions_have_one_threshold(place: Path) -> None:
    """Where none is asked for, denoising has the one that noising found."""
    found = acdc.discover_both("bits.jsonl", model="model", holdout=0.0)
    thresholds = found.summary()["thresholds"]
    assert thresholds["noising"] == thresholds["denoising"] is not None
