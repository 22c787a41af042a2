"""AND, OR and sum of two heads, by hand: what noising finds denoising does not, and the reverse.

Prompt: two bits and ``=``.  Head h copies bit h to the last position, the MLP combines the two,
the logit of ``yes`` reads the MLP.  DESIGN section 2: both edges of an AND show in noising,
both of an OR in denoising; the other way round only one does.  Both edges of a sum show in both.

Under constants the same holds for what the constants are: in noising the mean over the corrupt
prompts, where both bits are 0, is what resampling brings too; in denoising over the clean ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import acdc as acdc_package
from acdc.cli import main
from acdc.engine.checkpoint import Checkpoint
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.methods.acdc import acdc
from acdc.methods.exact import exact
from acdc.models import load_model
from acdc.runs.building import build_experiment
from acdc.runs.checks import check_discovery, check_settings
from acdc.runs.discover import _fingerprint
from acdc.runs.folder import read_run, versions
from acdc.settings import Direction, Settings
from acdc.tasks.base import Pair, Task

ZERO, ONE, EQUALS, YES, NO = range(5)
BIT, AT, COPY, OUT = 0, (1, 2, 3), (4, 5), 6  # directions of the stream
CONFIG = {
    "n_layers": 1, "n_heads": 2, "d_model": 7, "d_head": 1, "d_mlp": 2, "n_ctx": 3, "d_vocab": 5,
    "act_fn": "relu", "normalization_type": None, "positional_embedding_type": "standard",
    "attn_scale": 1.0,
}  # fmt: skip
BOTH = {"a0.h0->m0", "a0.h1->m0"}
OUTPUTS = {"AND": [0.0, 1.0], "OR": [1.0, -1.0], "ADD": [1.0, 0.0]}
CONSTANT = ("resample", "mean", "mean-positional")
"""Interventions under which an ablated edge carries the bits of the other run."""

GATES = [
    ("AND", "noising", 2), ("OR", "noising", 1), ("ADD", "noising", 2),
    ("AND", "denoising", 1), ("OR", "denoising", 2), ("ADD", "denoising", 2),
]  # fmt: skip


def gate_weights(gate: str) -> dict[str, Tensor]:
    """m0 is ``relu(x + y - 1)`` (AND), ``relu(x + y)`` (ADD), or their difference (OR)."""
    state = {
        "embed.W_E": torch.zeros(5, 7), "pos_embed.W_pos": torch.zeros(3, 7),
        "unembed.W_U": torch.zeros(7, 5), "unembed.b_U": torch.zeros(5),
    }  # fmt: skip
    attention = {f"W_{k}": torch.zeros(2, 7, 1) for k in "QKV"} | {"W_O": torch.zeros(2, 1, 7)}
    attention |= {f"b_{k}": torch.zeros(2, 1) for k in "QKV"} | {"b_O": torch.zeros(7)}
    mlp = {"W_in": torch.zeros(7, 2), "b_in": torch.tensor([0.0, -1.0])}
    mlp |= {"W_out": torch.zeros(2, 7), "b_out": torch.zeros(7)}
    state["embed.W_E"][ONE, BIT] = 1
    for position, direction in enumerate(AT):
        state["pos_embed.W_pos"][position, direction] = 1
    for head in (0, 1):
        attention["W_Q"][head, AT[2]] = 50  # the last position looks at position ``head``
        attention["W_K"][head, AT[head]] = 1
        attention["W_V"][head, BIT] = 1
        attention["W_O"][head, 0, COPY[head]] = 1
        mlp["W_in"][COPY[head]] = 1
    mlp["W_out"][:, OUT] = torch.tensor(OUTPUTS[gate])
    state["unembed.W_U"][OUT, YES] = 1
    state |= {f"blocks.0.attn.{k}": v for k, v in attention.items()}
    return state | {f"blocks.0.mlp.{k}": v for k, v in mlp.items()}


def write_gate(folder: Path, gate: str) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(gate_weights(gate), folder / "model.safetensors")


def experiment(
    folder: Path,
    gate: str,
    direction: Direction = "noising",
    intervention: str = "resample",
) -> Experiment:
    write_gate(folder, gate)
    model, _ = load_model(str(folder))
    pair = Pair((ONE, ONE, EQUALS), (ZERO, ZERO, EQUALS), (YES,), (NO,))
    return Experiment(
        model,
        Task(gate, (pair,)),
        get_metric("logit_diff"),
        direction=direction,
        intervention=intervention,
    )


@pytest.mark.parametrize("gate", OUTPUTS)
def test_the_model_computes_its_gate(gate: str, tmp_path: Path) -> None:
    model = experiment(tmp_path, gate).model
    table = {"AND": [0, 0, 0, 1], "OR": [0, 1, 1, 1], "ADD": [0, 1, 1, 2]}[gate]
    tokens = torch.tensor([[a, b, EQUALS] for a in (ZERO, ONE) for b in (ZERO, ONE)])
    final = model.forward(tokens).final
    assert final is not None
    torch.testing.assert_close(model.unembed(final)[:, -1, YES], torch.tensor(table).float())


@pytest.mark.parametrize("intervention", ["resample", "mean-positional"])
@pytest.mark.parametrize(("gate", "direction", "n_found"), GATES)
def test_which_inputs_of_a_gate_acdc_finds(
    gate: str, direction: Direction, n_found: int, intervention: str, tmp_path: Path
) -> None:
    circuit, _ = acdc(experiment(tmp_path, gate, direction, intervention), 0.5)
    # senders are tried a0.h0 first, so of two that stand in for each other a0.h1 is left
    heads = [0, 1] if n_found == 2 else [1]
    wanted = {f"a0.h{h}->m0" for h in heads} | {f"input->a0.h{h}<v>" for h in heads}
    assert set(circuit.edges()) == wanted | {"m0->logits"}


@pytest.mark.parametrize("intervention", CONSTANT)
@pytest.mark.parametrize(
    ("gate", "direction", "change"),
    [
        ("AND", "noising", -1), ("OR", "noising", 0), ("ADD", "noising", -1),
        ("AND", "denoising", 0), ("OR", "denoising", 1), ("ADD", "denoising", 1),
    ],
)  # fmt: skip
def test_patching_one_input_alone_shows_it_or_not(
    gate: str, direction: Direction, change: int, intervention: str, tmp_path: Path
) -> None:
    """The mean over all positions is a share of the bit: a bit is copied at the last of three."""
    case = experiment(tmp_path, gate, direction, intervention)
    scores = dict(zip(case.graph.edge_names(), exact(case), strict=True))
    assert {e for e in scores if e in BOTH} == BOTH
    wanted = dict.fromkeys((*BOTH, "m0->logits"), float(change))
    sign = -1 if direction == "noising" else 1
    wanted["m0->logits"] = 2.0 * sign if gate == "ADD" else sign
    if intervention == "mean" and direction == "denoising":
        # heads write at = alone: elsewhere they look at position 0 (or nowhere) and see less
        wanted = by_hand(case)
    for edge, value in wanted.items():
        assert scores[edge] == pytest.approx(value, abs=1e-6), edge


def by_hand(case: Experiment) -> dict[str, float]:
    """Change of the last position's logit when one edge carries the mean over three positions."""
    trace = case.model.forward(torch.tensor([[ONE, ONE, EQUALS]]))
    heads = trace.z[0][0, :, :, 0].mean(1).tolist()
    mlp = float(trace.mlp_out[0][0, :, OUT].mean())
    gates: dict[str, Callable[[float, float], float]] = {
        "AND": lambda x, y: max(x + y - 1, 0),
        "OR": lambda x, y: max(x + y, 0) - max(x + y - 1, 0),
        "ADD": lambda x, y: max(x + y, 0),
    }
    gate = gates[case.task.name]
    return {
        "a0.h0->m0": gate(heads[0], 0),
        "a0.h1->m0": gate(0, heads[1]),
        "m0->logits": mlp,
    }


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("gate", OUTPUTS)
def test_a_trained_constant_keeps_what_an_input_says(
    gate: str, direction: Direction, tmp_path: Path
) -> None:
    """Of one prompt, a head's best constant is its value: nothing is lost, nothing is found."""
    case = experiment(tmp_path, gate, direction, "optimal").pinned()
    before = experiment(tmp_path, gate, direction, "mean")
    names = case.graph.edge_names()
    now, then = (
        {e: abs(x) for e, x in zip(names, exact(one), strict=True)} for one in (case, before)
    )
    for edge in (*BOTH, "m0->logits"):
        assert now[edge] <= max(0.05, then[edge])


# --- both directions at once ----------------------------------------------------------------

ROW = {
    "clean": [ONE, ONE, EQUALS], "corrupt": [ZERO, ZERO, EQUALS], "answers": [YES],
    "wrong_answers": [NO],
}  # fmt: skip
MISSED = ["input->a0.h0<v>", "a0.h0->m0"]
"""What stands for the input that one direction misses: a0.h0 is tried first."""

ONLY = {
    "AND": {"only_noising": MISSED, "only_denoising": []},
    "OR": {"only_noising": [], "only_denoising": MISSED},
    "ADD": {"only_noising": [], "only_denoising": []},
}


@pytest.fixture
def gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the three models and their one prompt pair."""
    for gate in OUTPUTS:
        (tmp_path / gate).mkdir()
        write_gate(tmp_path / gate, gate)
    (tmp_path / "bits.jsonl").write_text(json.dumps(ROW) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("intervention", ["resample", "mean-positional"])
@pytest.mark.parametrize("gate", OUTPUTS)
def test_both_directions_name_what_each_misses(
    gate: str, intervention: str, gates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["discover", "bits.jsonl", "--model", gate, "--threshold", "0.5", "--out", "found"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--direction", "both", "--intervention", intervention])
    assert ended.value.code == 0
    found = json.loads(Path("found/directions.json").read_text())
    assert {name: sorted(found[name]) for name in ONLY[gate]} == {
        name: sorted(edges) for name, edges in ONLY[gate].items()
    }
    assert found["direction"] == "both"
    assert set(found["both"]) == {"input->a0.h1<v>", "a0.h1->m0", "m0->logits"} | (
        set(MISSED) if gate == "ADD" else set()
    )
    inputs = {"receiver": "m0", "only": ["a0.h0"], "partners": ["a0.h1"]}
    assert found["candidates"] == ([] if gate == "ADD" else [{"gate": gate, **inputs}])
    out = capsys.readouterr().out
    assert ("no gates" if gate == "ADD" else "nodes that may combine their inputs") in out
    for direction in ("noising", "denoising"):
        settings, circuit, _ = read_run(Path("found") / direction)
        assert settings.direction == direction
        assert circuit.n_edges == found["n_edges_kept"][direction]
    svg = Path("found/directions.svg").read_text()
    assert all(f"only {direction}" in svg for direction in ("noising", "denoising"))
    assert Path("found/directions.png").stat().st_size > 1000


def test_exact_scores_of_both_directions_miss_both_inputs(gates: Path) -> None:
    """Alone, neither input of the gate shows where the other stands in for it."""
    options = {"model": "OR", "method": "exact", "threshold": 0.5}
    found = acdc_package.discover_both("bits.jsonl", **options)
    assert set(found.comparison.edges.only_b) >= BOTH
    (candidate,) = (c for c in found.candidates if c.receiver == "m0")
    assert (candidate.gate, candidate.only, candidate.partners) == ("OR", ("a0.h0", "a0.h1"), ())


def test_a_killed_pair_goes_on_and_a_finished_one_is_kept(
    gates: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["discover", "bits.jsonl", "--model", "AND", "--threshold", "0.5", "--out", "found"]
    command += ["--direction", "both"]
    for direction in ("noising", "denoising"):  # as a kill leaves them
        run = build_experiment(
            check_settings(Settings("bits.jsonl", model="AND", threshold=0.5, direction=direction))
        )
        settings = Settings("bits.jsonl", model="AND", threshold=0.5, direction=direction)
        identity = {
            **check_discovery(settings).plain(),
            **_fingerprint(run),
            "versions": versions(),
        }
        del identity["offload"]
        Checkpoint(Path("found") / direction, identity, period=0).keep("constants.safetensors", b"")
    for status, words in ((0, ""), (2, "exists and is not empty")):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == status
        assert words in capsys.readouterr().err
    assert not list(Path("found").rglob("checkpoint"))
    with pytest.raises(SystemExit) as ended:
        main([*command, "--overwrite"])
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--direction", "sideways"], "direction 'sideways': expected noising, denoising or both"),
        (["--intervention", "nothing"], "intervention 'nothing': expected one of resample"),
    ],
)
def test_bad_input_of_both_directions(
    options: list[str], words: str, gates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["discover", "bits.jsonl", "--model", "AND", "--method", "eap", "--direction", "both"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--out", "found", *options])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1
    assert words in error
    assert not Path("found").exists()
