"""Self-repair: who takes over, against the slow oracle, on models with and without a backup."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_oracle import LatentOracle
from oracle import FAMILIES, METRICS, Oracle, edges_in_acdc_order, small_model, small_task
from safetensors.torch import save_file
from test_latents_positions import build as with_latents
from torch import Tensor

from acdc.ablations.mean import mean
from acdc.cli import main
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import PatchedModel
from acdc.errors import OptionError, UnknownNameError
from acdc.evidence.references import load_reference
from acdc.evidence.self_repair import (
    WRITERS,
    RoleRepair,
    SelfRepair,
    parse_roles,
    reference_roles,
    self_repair,
    writers,
)
from acdc.measure.evaluation import Evaluation
from acdc.methods.acdc import acdc
from acdc.models import load_model
from acdc.runs.claim import Claim
from acdc.runs.discover import fit
from acdc.runs.folder import Run
from acdc.settings import Settings
from acdc.tasks import load_task
from benchmarks.planted import MODELS
from graphs import Circuit, component_graph, save_circuit

MAIN, BACKUP = "a2.h1", "a3.h3"
PLANTED = str(MODELS["planted-ioi-backup"])
SETTINGS = Settings("ioi", model=PLANTED, metric="logit_diff", n_prompts=24)


def call(*arguments: str) -> int:
    """Run the command line; return its status."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def whole(model: str) -> Circuit:
    graph = component_graph(load_model(model)[0].shape)
    return Circuit(graph, np.zeros(graph.n_edges), np.ones(graph.n_edges, dtype=bool))


@cache
def planted() -> Circuit:
    return whole(PLANTED)


def test_constants_of_the_run_are_what_ablated_edges_carry() -> None:
    settings = replace(SETTINGS, intervention="mean", n_prompts=6)
    role = {"mover": ("a2.h1",)}
    anew = self_repair(planted(), role, **vars(settings)).roles[0].taken.mean
    _, experiment = fit(planted(), settings)
    means = mean(experiment)
    own, other = (
        replace(means, values={None: [factor * x + shift for x in means.values[None]]})
        for factor, shift in ((1, 0.0), (0, 1.0))
    )
    found, ones = (
        self_repair(
            Run(
                settings,
                planted(),
                Claim.of_seen(Evaluation(1.0, 0.0, 1.0, 1.0), 2),
                {},
                {},
                constants,
            ),
            role,
        )
        .roles[0]
        .taken.mean
        for constants in (own, other)
    )
    assert found == pytest.approx(anew, abs=1e-6)
    assert ones != pytest.approx(anew, abs=1e-2)


# The measure, against the oracle


def direct_effects(
    oracle: Oracle | LatentOracle, head: str, ablated: tuple[str, ...]
) -> tuple[float, float, float]:
    """Before, unanswered and after, each from two whole passes in which edges have names."""
    edges = oracle.edges

    def effect(gone: set[str]) -> float:
        return oracle.sign * (oracle.without(gone | {f"{head}->logits"}) - oracle.without(gone))

    leaving = {edge for edge in edges if edge.split("->")[0] in ablated}
    return effect(set()), effect({f"{u}->logits" for u in ablated}), effect(leaving)


@pytest.mark.parametrize(
    ("family", "metric", "intervention", "direction"),
    [
        ("LN", "logit_diff", "resample", "noising"),
        ("grouped rotary", "kl", "zero", "noising"),
        ("attention only", "nll", "resample", "denoising"),
        ("GPTNeoX", "prob_diff", "resample", "noising"),
        ("Gemma2", "logit_diff", "resample", "denoising"),
        ("Gemma2", "kl", "zero", "noising"),
    ],
)
def test_direct_effects_are_the_oracles(
    family: str, metric: str, intervention: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert family in FAMILIES
    assert metric in METRICS
    model, task = small_model(family, 3, n_heads=3), small_task(4, most_scored=2)
    experiment = Experiment(
        model, task, get_metric(metric), 2, intervention, direction  # type: ignore[arg-type]
    )  # fmt: skip
    circuit = Circuit(
        experiment.graph,
        np.zeros(experiment.graph.n_edges),
        np.zeros(experiment.graph.n_edges, dtype=bool),
    )
    monkeypatch.setattr("acdc.evidence.self_repair.fit", lambda *_: (circuit, experiment))
    info = {"prompts": "made up"}
    object.__setattr__(experiment, "task", replace(task, info=info))
    settings = Settings("ioi", metric=metric, intervention=intervention, direction=direction)
    role = ("a0.h1", "a0.h2", "a1.h0")
    found = self_repair(circuit, {"some": role}, **vars(settings)).roles[0]
    oracle = Oracle(model, task, metric, intervention, direction)
    rows = [*found.members, *found.others]
    assert sorted(row.head for row in rows) == [f"a{i}.h{j}" for i in range(2) for j in range(3)]
    for row in rows:
        ablated = tuple(head for head in role if head != row.head)
        before, unanswered, after = direct_effects(oracle, row.head, ablated)
        assert row.before == pytest.approx(before, abs=2e-5)
        assert row.unanswered == pytest.approx(unanswered, abs=2e-5)
        assert row.after == pytest.approx(after, abs=2e-5)
        assert row.growth.mean == pytest.approx(after - before, abs=4e-5)
        assert row.response.mean == pytest.approx(after - unanswered, abs=4e-5)
    full = oracle.without(())
    direct = oracle.without({f"{head}->logits" for head in role})
    every = {edge for edge in edges_in_acdc_order(oracle.shape) if edge.split("->")[0] in role}
    assert found.taken.mean == pytest.approx(oracle.sign * (direct - full), abs=2e-5)
    assert found.total.mean == pytest.approx(oracle.sign * (oracle.without(every) - full), abs=2e-5)


@pytest.mark.parametrize("kind", ["outputs", "transcoders", "cuts", "neurons"])
@pytest.mark.parametrize(
    ("family", "intervention", "direction"),
    [("LN", "resample", "noising"), ("Gemma2", "zero", "noising"), ("LN", "mean", "denoising")],
)
def test_direct_effects_of_latents_are_the_oracles(
    kind: str, family: str, intervention: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"intervention": intervention, "direction": direction}
    experiment, oracle = with_latents(kind, family, positions=None, **options)
    info = {"prompts": "made up"}
    object.__setattr__(experiment, "task", replace(experiment.task, info=info))
    graph = experiment.graph
    inside = np.zeros(graph.n_edges, dtype=bool)
    circuit = Circuit(graph, np.zeros(graph.n_edges), inside)
    monkeypatch.setattr("acdc.evidence.self_repair.fit", lambda *_: (circuit, experiment))
    known = [u for u, v in (e.split("->") for e in oracle.edges) if v == "logits"]
    known = sorted(u for u in known if ".f" in u or ".n" in u or ".h" in u)
    role = (known[0], known[-1])
    settings = Settings("ioi", metric="logit_diff", **options)
    found = self_repair(circuit, {"some": role}, **vars(settings)).roles[0]
    rows = [*found.members, *found.others]
    assert sorted(row.head for row in rows) == known
    assert any(".f" in name or ".n" in name for name in known)
    for row in rows[:2] + rows[2::3]:
        ablated = tuple(node for node in role if node != row.head)
        before, unanswered, after = direct_effects(oracle, row.head, ablated)
        assert row.before == pytest.approx(before, abs=2e-5)
        assert row.unanswered == pytest.approx(unanswered, abs=2e-5)
        assert row.after == pytest.approx(after, abs=2e-5)
    every = {edge for edge in oracle.edges if edge.split("->")[0] in role}
    total = oracle.sign * (oracle.without(every) - oracle.without(()))
    assert found.total.mean == pytest.approx(total, abs=2e-5)
    assert found.taken.mean != pytest.approx(0, abs=1e-4)


def test_neurons_that_others_write_for_are_a_role(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line: by default those of the circuit that write to the logits."""
    folder = str(tmp_path / "run")
    made = ["--neurons", "--max-latents", "6", "--n-prompts", "4", "--method", "eap"]
    assert call("discover", "ioi", *made, "--edges", "120", "--out", folder) == 0
    out = tmp_path / "repair.json"
    assert call("self-repair", folder, "--n-resamples", "50", "--out", str(out)) == 0
    (role,) = json.loads(out.read_text())["roles"]
    measured = [row["head"] for row in (*role["members"], *role["others"])]
    assert sum(".n" in name for name in measured) == 6
    assert sum(".h" in name for name in measured) == 32
    capsys.readouterr()
    assert call("self-repair", folder, "--role", "x=m0.n9999") == 2
    assert "is no head, latent or neuron of the model that logits reads" in capsys.readouterr().err


def test_many_cuts_in_one_pass_are_one_mask_each(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment(small_model("LN", 0), small_task(1), get_metric("kl"))
    graph, rng = experiment.graph, np.random.default_rng(0)
    mask = rng.random(graph.n_edges) < 0.8
    cuts = rng.random((5, graph.n_senders)) < 0.5
    patched = PatchedModel(experiment)
    into = graph.edge_receiver == graph.receiver_index["logits"]
    expected = [patched.values(mask & ~(into & cut[graph.edge_sender])) for cut in cuts]
    np.testing.assert_allclose(patched.values_at_logits(mask, cuts), expected, atol=1e-6)
    monkeypatch.setattr("acdc.engine.patched._CUTS_BYTES", 1)
    np.testing.assert_allclose(patched.values_at_logits(mask, cuts), expected, atol=1e-6)


# The planted backup


def only(found: SelfRepair) -> RoleRepair:
    assert len(found.roles) == 1
    return found.roles[0]


@cache
def repair(intervention: str = "resample", metric: str = "logit_diff") -> SelfRepair:
    settings = replace(SETTINGS, intervention=intervention, metric=metric)
    return self_repair(planted(), {"movers": (MAIN, BACKUP)}, **vars(settings))


@pytest.mark.parametrize("metric", ["logit_diff", "kl", "nll"])
def test_of_two_movers_the_backup_is_named(metric: str) -> None:
    found = repair(metric=metric)
    assert found.backups == {"movers": (BACKUP,)}
    rows = {row.head: row for row in only(found).members}
    assert rows[MAIN].verdict is None
    before, after = rows[BACKUP].before, rows[BACKUP].after
    assert abs(before) < 0.1 * rows[MAIN].before
    assert after > 0.5 * rows[MAIN].before
    assert rows[BACKUP].growth.low > 0
    share = rows[BACKUP].share
    assert share is not None
    assert share > 0.5
    assert rows[MAIN].share is None  # the backup writes nothing that could be taken
    assert not any(row.verdict for row in only(found).others)


def test_a_discovered_run_names_the_backup_that_it_missed() -> None:
    model, tokenizer = load_model(PLANTED)
    task = load_task("ioi", tokenizer, n_prompts=8)
    circuit, _ = acdc(Experiment(model, task, get_metric("logit_diff")), 0.3)
    assert writers(circuit) == {WRITERS: (MAIN,)}
    found = self_repair(circuit, **vars(SETTINGS))
    role = only(found)
    assert role.members == ()
    assert role.repaired is not None
    assert role.repaired > 0.5
    assert found.backups == {WRITERS: (BACKUP,)}
    row = next(row for row in role.others if row.head == BACKUP)
    assert not row.in_circuit
    assert row.role is None


def test_roles_of_the_reference_name_the_backup() -> None:
    found = self_repair(planted(), "planted-ioi-backup", **vars(SETTINGS))
    assert [role.role for role in found.roles] == [
        "duplicate token", "S-inhibition", "name mover", "backup name mover"
    ]  # fmt: skip
    assert found.backups == {"name mover": (BACKUP,)}
    roles = {role.role: role for role in found.roles}
    row = next(row for row in roles["name mover"].others if row.head == BACKUP)
    assert row.role == "backup name mover"
    assert roles["duplicate token"].repaired is None  # it writes nothing to the logits


def test_without_a_backup_nobody_is_named() -> None:
    settings = replace(SETTINGS, model=str(MODELS["planted-ioi"]))
    found = self_repair(
        whole(str(MODELS["planted-ioi"])), load_reference("planted-ioi"), **vars(settings)
    )  # fmt: skip
    assert found.backups == {}
    mover = next(role for role in found.roles if role.role == "name mover")
    assert mover.repaired is not None
    assert abs(mover.repaired) < 0.1


# By hand: two heads that both write

CONFIG = {
    "n_layers": 2, "n_heads": 1, "d_model": 8, "d_head": 1, "n_ctx": 2, "d_vocab": 4,
    "attn_only": True, "normalization_type": None, "act_fn": "relu",
    "positional_embedding_type": "standard", "attn_scale": 1.0,
}  # fmt: skip
SIGNAL, OUT = 0, (4, 5)  # directions of the stream


def two_writers(seen_by_second: float) -> dict[str, Tensor]:
    """Heads a0.h0 and a1.h0 copy the mean signal of all positions to directions of their own.

    The second also adds what the first wrote there, times ``seen_by_second``.
    """
    state = {
        "embed.W_E": torch.zeros(4, 8), "pos_embed.W_pos": torch.zeros(2, 8),
        "unembed.W_U": torch.zeros(8, 4), "unembed.b_U": torch.zeros(4),
    }  # fmt: skip
    state["embed.W_E"][1, SIGNAL] = 1
    for direction in OUT:
        state["unembed.W_U"][direction, 3] = 1
    for layer in (0, 1):
        attention = {f"W_{k}": torch.zeros(1, 8, 1) for k in "QKV"} | {"W_O": torch.zeros(1, 1, 8)}
        attention |= {f"b_{k}": torch.zeros(1, 1) for k in "QKV"} | {"b_O": torch.zeros(8)}
        attention["W_V"][0, SIGNAL] = 1  # all positions alike
        attention["W_O"][0, 0, OUT[layer]] = 1
        if layer == 1:
            attention["W_V"][0, OUT[0]] = seen_by_second
        state |= {f"blocks.{layer}.attn.{k}": v for k, v in attention.items()}
    return state


def two_writers_repair(
    folder: Path, seen_by_second: float, intervention: str, metric: str
) -> RoleRepair:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(two_writers(seen_by_second), folder / "model.safetensors")
    row = {"clean": [1, 0], "corrupt": [2, 0], "answers": [3], "wrong_answers": [0]}
    (folder / "task.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    settings = Settings(
        str(folder / "task.jsonl"), model=str(folder), metric=metric, intervention=intervention
    )
    return self_repair(whole(str(folder)), {"writers": ("a0.h0", "a1.h0")}, **vars(settings)).roles[
        0
    ]


@pytest.mark.parametrize("intervention", ["resample", "zero"])
def test_two_writers_that_do_not_look_at_each_other(intervention: str, tmp_path: Path) -> None:
    found = two_writers_repair(tmp_path, 0.0, intervention, "logit_diff")
    for row in found.members:
        assert row.before == row.after == pytest.approx(0.5)
        assert row.verdict is None
    assert found.repaired == pytest.approx(0)


def test_a_second_writer_that_subtracts_what_the_first_wrote(tmp_path: Path) -> None:
    """By hand: the first writes 1 / 2 at the end (and 1 at the start, it sees itself there).

    The second sees on average 1 / 2 of signal less (1 + 1 / 2) / 2 = 3 / 4 of what the first wrote,
    half of it: 1 / 2 - 3 / 8 = 1 / 8; with the first ablated, 1 / 2.
    """
    found = two_writers_repair(tmp_path, -0.5, "resample", "logit_diff")
    first, second = found.members
    assert (first.before, first.after) == pytest.approx((0.5, 0.5))
    assert (second.before, second.unanswered, second.after) == pytest.approx((1 / 8, 1 / 8, 1 / 2))
    assert second.growth.mean == second.response.mean == pytest.approx(3 / 8)
    assert second.share == pytest.approx(3 / 4)
    assert [first.verdict, second.verdict] == [None, "backup"]
    assert found.taken.mean == pytest.approx(5 / 8)


def test_growth_by_a_saturated_metric_is_no_backup(tmp_path: Path) -> None:
    """By hand: the logits are (0, 0, 0, x), and x is 1, 1 / 2 or 0 with both, one or no head."""
    found = two_writers_repair(tmp_path, 0.0, "resample", "nll")
    both, one, none = (np.log(3 + np.exp(x)) - x for x in (1, 0.5, 0))
    for row in found.members:
        assert (row.before, row.unanswered, row.after) == pytest.approx(
            (one - both, none - one, none - one), abs=1e-6
        )
        assert row.growth.mean == pytest.approx(none - 2 * one + both, abs=1e-6)
        assert row.response.mean == pytest.approx(0, abs=1e-6)
        assert row.share == pytest.approx((none - 2 * one + both) / (one - both), abs=1e-5)
        assert row.verdict == "rescaled"
    assert found.backups == ()


# Roles and bad input


def test_roles_from_texts() -> None:
    reference = load_reference("planted-ioi-backup")
    assert parse_roles(["mover = a2.h1, a3.h3"]) == {"mover": (MAIN, BACKUP)}
    assert parse_roles(["name mover", "x=a0.h0"], reference) == {
        "name mover": (MAIN,), "x": ("a0.h0",)
    }  # fmt: skip
    with pytest.raises(UnknownNameError, match=r"unknown role of reference .*name mover"):
        parse_roles(["name movers"], reference)
    with pytest.raises(OptionError, match=r"expected a name and heads, as mover=a4\.h1"):
        parse_roles(["name mover"])
    with pytest.raises(OptionError, match="given twice"):
        parse_roles(["a=a0.h0", "a=a0.h1"])
    with pytest.raises(OptionError, match="every role names its heads already"):
        parse_roles(["a=a0.h0"], reference)
    with pytest.raises(OptionError, match="12 layers of 12 heads; the model has 4 of 4"):
        reference_roles(load_reference("ioi"), planted().graph)
    nodes = reference_roles(load_reference("ioi"), load_reference("ioi").graph)
    assert all(node[0] == "a" for role in nodes.values() for node in role)


@pytest.mark.parametrize(
    ("roles", "options", "words"),
    [
        ({"x": ("a4.h9",)}, {}, "role 'x': 'a4.h9' is no head of the model"),
        ({"x": ("m1", "a0.h0")}, {}, "role 'x': 'm1' is no head"),
        ({"x": ("a0.h0", "a0.h0")}, {}, "listed twice"),
        ({"x": ()}, {}, "has no heads: there is nothing to ablate"),
        ({"x": ("a0.h0",)}, {"min_share": 0}, "min_share 0: expected a share above 0"),
        ({"x": ("a0.h0",)}, {"n_resamples": 0}, "n_resamples 0: expected at least 1"),
    ],
)
def test_roles_and_options_that_cannot_be(roles, options, words) -> None:
    with pytest.raises(OptionError, match=words):
        self_repair(planted(), roles, **vars(SETTINGS), **options)


def test_too_little_to_measure() -> None:
    with pytest.raises(OptionError, match="1 prompt: an interval over prompts needs at least 2"):
        self_repair(planted(), {"x": (MAIN,)}, **vars(replace(SETTINGS, n_prompts=1)))
    empty = replace(planted(), in_circuit=np.zeros(planted().graph.n_edges, dtype=bool))
    with pytest.raises(OptionError, match="no head of the circuit has an edge into logits"):
        self_repair(empty, **vars(SETTINGS))


# The command


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["self-repair", *arguments])
    code = stopped.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture
def circuit_file(tmp_path: Path) -> str:
    save_circuit(planted(), tmp_path / "circuit.json")
    return str(tmp_path / "circuit.json")


def test_the_command_prints_and_writes(
    circuit_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "repair.json"
    arguments = [circuit_file, "--task", "ioi", "--model", PLANTED, "--n-prompts", "12"]
    arguments += ["--role", f"movers={MAIN},{BACKUP}", "--out", str(out)]
    assert command(*arguments) == 0
    said = capsys.readouterr().out
    assert f"backup of 'movers': {BACKUP}" in said
    assert "BACKUP" in said
    written = json.loads(out.read_text())
    assert written["backups"] == {"movers": [BACKUP]}
    assert written["n_prompts"] == 12
    (role,) = written["roles"]
    assert [row["head"] for row in role["members"]] == [MAIN, BACKUP]
    assert len(role["others"]) == 14
    assert role["members"][1]["verdict"] == "backup"
    assert command(*arguments) == 2
    assert "exists: choose another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--role", "x=a9.h9"], "role 'x': 'a9.h9' is no head of the model"),
        (["--role", "name mover"], "or --reference with it"),
        (["--reference", "ioi"], "name its own heads with --role"),
        (["--reference", "iou"], "unknown reference 'iou'"),
        (["--min-share", "2"], "min_share 2: expected a share above 0, at most 1"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], words: str, circuit_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(circuit_file, "--task", "ioi", "--model", PLANTED, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.startswith("acdc: ")
    assert captured.err.count("\n") == 1
