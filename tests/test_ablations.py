"""What ablated edges carry: means, means by position, trained constants; and their mistakes.

Every method and the patched runs are held against the oracle, which averages prompt by prompt;
node ablations also against TransformerLens' own hooks.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from command_line import Call, read
from latent_oracle import LatentPass, random_dictionary
from oracle import Oracle
from safetensors.torch import save_file

import acdc
from acdc.ablations import ABLATIONS
from acdc.ablations.optimal import optimal_constants
from acdc.dictionaries.attach import attach
from acdc.engine.constants import FILE_NAME, Constants, load_constants
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import metric_of_circuit
from acdc.errors import CircuitFileError, OptionError, TaskError
from acdc.evidence.assessment import evaluate
from acdc.measure.evaluation import Evaluator
from acdc.methods import METHODS
from acdc.methods.acdc import acdc as run_acdc
from acdc.methods.eap import Integration, eap, eap_ig
from acdc.methods.exact import exact
from acdc.models.lowering import LoweredModel
from acdc.runs.building import build_experiment
from acdc.runs.checks import check_settings
from acdc.runs.discover import discover, measure
from acdc.runs.folder import read_run, run_constants
from acdc.settings import Settings
from acdc.tasks.base import Task
from acdc.tasks.dataset import load_dataset

MEANS = ("mean", "mean-positional")
CONSTANT = tuple(name for name, one in ABLATIONS.items() if one.constant)
DIRECTIONS = ("noising", "denoising")
OTHERS = [(1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12, 13), (1, 1, 2, 3, 5)]
OTHERS += [(1, 2, 3, 4)]  # counts twice


def build(
    family: str,
    seed: int,
    intervention: str,
    direction: str = "noising",
    metric: str = "logit_diff",
    mean_over: Any = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Experiment, Oracle]:
    model = oracle.small_model(family, seed, dtype=dtype)
    task = oracle.small_task(seed)
    options: dict[str, Any] = {"intervention": intervention, "direction": direction}
    experiment = Experiment(model, task, get_metric(metric), mean_over=mean_over, **options)
    constants: dict[str, torch.Tensor] = {}
    if intervention == "optimal":
        experiment = replace(experiment, constants=optimal_constants(experiment, 5))
        constants = vectors(experiment)
    slow = Oracle(model, task, metric, **options, mean_over=mean_over, constants=constants)
    return experiment, slow


def vectors(experiment: Experiment) -> dict[str, torch.Tensor]:
    """By sender, the constant ``[d_model]`` that it writes, from the values of an experiment."""
    model, carried = experiment.model, experiment.carried
    assert carried is not None
    embeds, *rest = [x.reshape(-1, x.shape[-1]) for x in carried.at(4)]
    found = dict(zip(oracle.sources(model.shape), embeds, strict=True))
    for i, layer in enumerate(model.layers):
        z, *rest = rest
        found |= {f"a{i}.h{h}": z[h] @ layer.attention.W_O[h] for h in range(len(z))}
        if layer.mlp is not None:
            (found[f"m{i}"],), *rest = rest
    return found


# --- the same numbers as the oracle ---------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("intervention", CONSTANT)
@pytest.mark.parametrize("family", ["LN", "GPTNeoX", "grouped", "Gemma2", "attention only"])
def test_patched_runs_are_the_oracles(family: str, intervention: str, direction: str) -> None:
    dtype = torch.float32 if family == "Gemma2" else torch.float64
    experiment, slow = build(family, 3, intervention, direction, dtype=dtype)
    names = experiment.graph.edge_names()
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 0.8):
        mask = rng.random(len(names)) < share
        wanted = slow.without([name for name, kept in zip(names, mask, strict=True) if not kept])
        close = 1e-6 if dtype == torch.float64 else 1e-4
        assert metric_of_circuit(experiment, mask) == pytest.approx(wanted, abs=close)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("intervention", CONSTANT)
def test_acdc_and_exact_are_the_oracles(intervention: str, direction: str) -> None:
    experiment, slow = build("LN", 5, intervention, direction, "kl")
    names = experiment.graph.edge_names()
    wanted = oracle.exact_scores(slow)
    np.testing.assert_allclose(exact(experiment), [wanted[e] for e in names], atol=1e-8)
    tau = 0.1 * abs(slow.without(names) - slow.without(()))
    circuit, _ = run_acdc(experiment, tau)
    found = oracle.sequential_acdc(slow, tau)
    assert found.margin > 1e-8
    assert set(circuit.edges()) == found.kept
    assert 0 < len(found.kept) < len(names)


@pytest.mark.parametrize("intervention", CONSTANT)
def test_eap_is_the_derivative(intervention: str) -> None:
    experiment, slow = build("Gemma2", 2, intervention, dtype=torch.float32)
    wanted = oracle.edge_scores_by_finite_differences(slow)
    largest = max(map(abs, wanted.values()))
    found = dict(zip(experiment.graph.edge_names(), eap(experiment), strict=True))
    assert largest > 0.01
    for edge, score in found.items():
        assert score == pytest.approx(wanted[edge], abs=0.01 * largest), edge


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("intervention", CONSTANT)
def test_integrated_gradients_start_at_the_constant(intervention: str, direction: str) -> None:
    """Edges out of the embeddings add up to what replacing these by the constant does.

    Interpolated towards zero, or towards the other run, they would not.
    """
    experiment, _ = build("no norm", 1, intervention, direction)
    graph = experiment.graph
    out = np.array([graph.senders[u] == "input" for u in graph.edge_sender])
    full = metric_of_circuit(experiment, np.ones(graph.n_edges, dtype=bool))
    effect = metric_of_circuit(experiment, ~out) - full
    assert abs(effect) > 0.05
    scores = eap_ig(experiment, Integration(200))
    assert scores[out].sum() == pytest.approx(effect, rel=0.03, abs=0.025)


@pytest.mark.parametrize("intervention", [*CONSTANT, "zero", "resample"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_method_runs(intervention: str, direction: str) -> None:
    experiment, _ = build("LN", 7, intervention, direction)
    experiment = experiment.pinned()
    for name, method in METHODS.items():
        quick = {"steps": 2, "mask_steps": 2, "sparsity": 0.5}
        asked = {name: value for name, value in quick.items() if name in method.option_names}
        found = method.find(
            experiment, **asked, **({} if "sparsity" in asked else {"threshold": 0.05})
        )
        assert np.isfinite(found.circuit.scores).all(), name
        assert found.circuit.scores.any(), name


# --- means --------------------------------------------------------------------------------


@pytest.mark.parametrize("intervention", MEANS)
def test_means_over_other_prompts(intervention: str) -> None:
    experiment, slow = build("LN", 3, intervention, mean_over=OTHERS)
    names = experiment.graph.edge_names()
    none = np.zeros(len(names), dtype=bool)
    assert metric_of_circuit(experiment, none) == pytest.approx(slow.without(names), abs=1e-6)
    own, _ = build("LN", 3, intervention)
    assert metric_of_circuit(experiment, none) != pytest.approx(metric_of_circuit(own, none))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_means_do_not_depend_on_batches(batch_size: int) -> None:
    whole, _ = build("LN", 3, "mean", mean_over=OTHERS)
    parts = replace(whole, batch_size=batch_size)
    torch.testing.assert_close(vectors(parts), vectors(whole), rtol=0, atol=0)


def test_a_mean_keeps_every_node_and_every_token_apart() -> None:
    """EAP-IG keeps the last token alone and averages over all nodes: no two means differ."""
    experiment, _ = build("LN", 3, "mean", mean_over=OTHERS)
    wanted = oracle.mean_outputs(experiment.model, OTHERS)
    found = vectors(experiment)
    assert found.keys() == wanted.keys()
    for sender, value in found.items():
        torch.testing.assert_close(value, wanted[sender][0])
    rows = torch.stack(list(found.values()))
    assert torch.pdist(rows).min() > 0.01
    last = torch.stack([oracle.plain_outputs(experiment.model, p)["m0"][-1] for p in OTHERS])
    assert (found["m0"] - last.mean(0)).abs().max() > 0.01


@pytest.mark.parametrize("intervention", MEANS)
def test_node_ablation_is_that_of_transformer_lens_hooks(intervention: str) -> None:
    """Mean ablation of two senders, by hooks on the bridge."""
    model = oracle.small_model("LN", 11)
    bridge = oracle._bridge("LN", 2, 2, 12, torch.float32)  # the one that was lowered
    task = Task("even", tuple(p for p in oracle.small_task(1, 6).pairs if len(p.clean) == 4))
    clean, corrupt = (
        torch.tensor([getattr(pair, which) for pair in task.pairs])
        for which in ("clean", "corrupt")
    )
    with torch.no_grad():
        _, cache = bridge.run_with_cache(corrupt)
        axes = (0,) if intervention == "mean-positional" else (0, 1)
        z = cache["blocks.0.attn.hook_z"].mean(axes, keepdim=True)[..., 1, :]
        mlp = cache["blocks.1.hook_mlp_out"].mean(axes, keepdim=True)

        def head(x: torch.Tensor, hook: Any) -> torch.Tensor:
            x = x.clone()
            x[..., 1, :] = z
            return x

        def whole(x: torch.Tensor, hook: Any) -> torch.Tensor:
            return mlp.expand_as(x)

        hooks = [("blocks.0.attn.hook_z", head), ("blocks.1.hook_mlp_out", whole)]
        logits = bridge.run_with_hooks(clean, fwd_hooks=hooks)[:, -1]
    wanted = [
        float(row[list(p.answers)].mean() - row[list(p.wrong_answers)].mean())
        for row, p in zip(logits, task.pairs, strict=True)
    ]
    experiment = Experiment(model, task, get_metric("logit_diff"), intervention=intervention)
    graph = experiment.graph
    kept = np.array([graph.senders[u] not in ("a0.h1", "m1") for u in graph.edge_sender])
    assert metric_of_circuit(experiment, kept) == pytest.approx(np.mean(wanted), abs=1e-4)
    assert metric_of_circuit(experiment, kept) != pytest.approx(experiment.plain("clean"), abs=0.01)


# --- optimal constants ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "metric", "direction", "loss"),
    [
        ("LN", "logit_diff", "noising", "kl"),
        ("Gemma2", "logit_diff", "denoising", "kl"),
        ("GPTNeoX", "mse", "noising", "mse"),
        ("attention only", "mse", "denoising", "mse"),
    ],
)
def test_losses_of_constants_are_the_oracles(
    family: str, metric: str, direction: str, loss: str
) -> None:
    model = oracle.small_model(family, 4)
    task = oracle.small_task(4, 4)
    options: dict[str, Any] = {"direction": direction, "intervention": "optimal"}
    experiment = Experiment(model, task, get_metric(metric), **options)
    constants = optimal_constants(experiment, 20)
    losses = constants.report["losses"]
    assert list(losses) == list(experiment.graph.senders)
    assert constants.report["loss"] == loss
    trained = replace(experiment, constants=constants)
    for which, some in (
        ("mean", oracle.mean_outputs(model, prompts_of_means(experiment))),
        ("optimal", vectors(trained)),
    ):
        for sender in losses:
            wanted = loss_by_hand(experiment, sender, some[sender], loss)
            assert losses[sender][which] == pytest.approx(wanted, abs=2e-4, rel=2e-3), sender
    assert all(row["optimal"] <= row["mean"] for row in losses.values())
    assert sum(r["optimal"] for r in losses.values()) < 0.8 * sum(
        r["mean"] for r in losses.values()
    )


def prompts_of_means(experiment: Experiment) -> list[tuple[int, ...]]:
    which = "corrupt" if experiment.direction == "noising" else "clean"
    return [getattr(pair, which) for pair in experiment.task.pairs]


def loss_by_hand(experiment: Experiment, sender: str, constant: torch.Tensor, loss: str) -> float:
    """Mean over prompts of how far the output moves when a sender writes a constant."""
    which = "clean" if experiment.direction == "noising" else "corrupt"
    edges = oracle.edges_in_acdc_order(experiment.model.shape)
    share = {edge: 1.0 for edge in edges if edge.startswith(f"{sender}->")}
    total = 0.0
    for pair in experiment.task.pairs:
        tokens = torch.tensor([getattr(pair, which)])
        outputs = []
        for some in ({}, share):
            run = oracle.Pass(experiment.model, tokens, some, {sender: constant.expand(1, 1, -1)})
            outputs.append(experiment.model.unembed(run.final[:, -1])[0].double().detach().numpy())
        total += oracle.METRICS[loss](outputs[1], outputs[0], pair)
    return total / len(experiment.task)


def test_training_repeats_and_touches_no_random_state() -> None:
    experiment, _ = build("LN", 4, "mean")
    before = oracle.random_states()
    first, second = (optimal_constants(experiment, 5) for _ in range(2))
    assert oracle.random_states() == before
    for a, b in zip(first.at(4), second.at(4), strict=True):
        assert torch.equal(a, b)
    parts = optimal_constants(experiment, 5, memory=1)  # scenario by scenario
    for a, b in zip(first.at(4), parts.at(4), strict=True):
        torch.testing.assert_close(a, b)
    steps: list[int] = []
    notes: list[str] = []
    optimal_constants(experiment, 5, progress=steps.append, note=notes.append)
    assert sum(steps) == 5
    assert "mean loss" in notes[0]


def test_what_a_step_sees_does_not_depend_on_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, _ = build("LN", 4, "mean")
    experiment = replace(experiment, task=oracle.small_task(4, 20))
    whole = optimal_constants(experiment, 10)
    for batch_size in (3, 12):
        found = optimal_constants(replace(experiment, batch_size=batch_size), 10)
        assert found.as_bytes() == whole.as_bytes()
    monkeypatch.setattr("acdc.engine.steps.ROOM", 1)  # prompt by prompt
    found = optimal_constants(experiment, 10)
    for a, b in zip(found.at(4), whole.at(4), strict=True):
        torch.testing.assert_close(a, b)
    for sender, row in whole.report["losses"].items():
        assert found.report["losses"][sender] == pytest.approx(row, rel=1e-5), sender


def test_a_longer_training_gains_little() -> None:
    experiment, _ = build("no norm", 4, "mean", metric="mse")
    short = optimal_constants(experiment).report["losses"]
    long = optimal_constants(experiment, 200).report["losses"]
    for sender, row in long.items():
        assert short[sender]["optimal"] <= row["optimal"] + 0.1 * row["mean"], sender


def test_low_precision_shares_the_constants_of_float32() -> None:
    model = oracle.small_model("LN", 4, dtype=torch.float32)
    task = oracle.small_task(4)
    exactly = Experiment(model, task, get_metric("kl"), intervention="optimal")
    low = replace(exactly, in_float32=exactly)
    assert exactly.carried is not None
    assert low._known() is exactly.carried


# --- in a run's folder ----------------------------------------------------------------------


def test_constants_survive_a_file(tmp_path: Path) -> None:
    experiment, _ = build("LN", 3, "mean-positional", mean_over=OTHERS)
    constants = experiment.carried
    assert constants is not None
    (tmp_path / FILE_NAME).write_bytes(constants.as_bytes())
    again = load_constants(tmp_path / FILE_NAME)
    assert (again.intervention, again.direction) == ("mean-positional", "noising")
    assert again.report == {"n_prompts": 5}
    for length in (4, 5):
        for a, b in zip(constants.at(length), again.at(length), strict=True):
            assert torch.equal(a, b)
    (tmp_path / "torn").write_bytes(constants.as_bytes()[:100])
    with pytest.raises(CircuitFileError, match="torn cannot be read"):
        load_constants(tmp_path / "torn")


ONE = torch.ones(1, 1, 1, 1, 4)
WRONG: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "nan": ({"all.0": ONE * math.nan}, {}, r"tensor 'all\.0' holds nan or infinite"),
    "infinity": ({"all.0": -ONE * math.inf}, {}, r"tensor 'all\.0' holds nan or infinite"),
    "too large for float32": ({"all.0": ONE.double() * 1e200}, {}, "holds nan or infinite"),
    "bool": ({"all.0": ONE.bool()}, {}, r"tensor 'all\.0' is of type torch\.bool"),
    "whole numbers": ({"all.0": ONE.int()}, {}, r"is of type torch\.int32"),
    "complex": ({"all.0": ONE * 1j}, {}, r"is of type torch\.complex64"),
    "float8": ({"all.0": ONE.to(torch.float8_e4m3fn)}, {}, "is of type torch.float8"),
    "a number": ({"all.0": torch.tensor(1.0)}, {}, r"has shape \[\], expected \[senders, 1"),
    "four axes": ({"all.0": ONE[0]}, {}, r"has shape \[1, 1, 1, 4\]"),
    "six axes": ({"all.0": ONE[None]}, {}, r"has shape \[1, 1, 1, 1, 1, 4\]"),
    "a batch": ({"all.0": torch.ones(1, 1, 2, 1, 4)}, {}, r"has shape \[1, 1, 2, 1, 4\]"),
    "positions for all": ({"all.0": torch.ones(1, 1, 1, 3, 4)}, {}, r"has shape \[1, 1, 1, 3, 4\]"),
    "other positions": ({"5.0": torch.ones(1, 1, 1, 3, 4)}, {}, r"has shape \[1, 1, 1, 3, 4\]"),
    "nothing in it": ({"all.0": torch.ones(1, 1, 1, 1, 0)}, {}, r"has shape \[1, 1, 1, 1, 0\]"),
    "no tensors": ({}, {}, "at least one"),
    "a gap": ({"all.0": ONE, "all.2": ONE.clone()}, {}, "not numbered from 0 without gaps"),
    "more for one length": (
        {"3.0": ONE, "4.0": ONE.clone(), "4.1": ONE.clone()}, {}, "as many tensors for every length"
    ),
    "both kinds": ({"3.0": ONE, "all.0": ONE.clone()}, {}, "as many tensors for every length"),
    "another name": ({"x": ONE}, {}, "tensor 'x': expected a name as all.3"),
    "a name of many digits": ({"9" * 5000 + ".0": ONE}, {}, r"characters\] .*expected a name"),
    "another format": ({"all.0": ONE}, {"format": "x"}, "no constants of acdc"),
    "another intervention": ({"all.0": ONE}, {"intervention": "x"}, "intervention is 'x'"),
    "another direction": ({"all.0": ONE}, {"direction": "up"}, "direction is 'up', expected"),
    "a torn report": ({"all.0": ONE}, {"report": "{"}, "'report': no JSON that can be read"),
    "a report in a list": ({"all.0": ONE}, {"report": "[]"}, "'report' is no object"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_holds_no_constants_is_refused(name: str, tmp_path: Path) -> None:
    tensors, changes, words = WRONG[name]
    about = {"format": "acdc-constants-2", "intervention": "mean", "direction": "noising"}
    save_file(tensors, tmp_path / FILE_NAME, {**about, "report": "{}", **changes})
    with pytest.raises(CircuitFileError, match=f"{FILE_NAME}: .*{words}.*: delete the file"):
        load_constants(tmp_path / FILE_NAME)


def test_evaluation_says_no_nan(place: Path, call: Call) -> None:
    """Not ``nan, nan, nan`` and status 0: the file is named, or else the metric."""
    options = ["--model", "ln2", "--method", "eap", "--edges", 20, "--n-prompts", 4]
    call("discover", "task.jsonl", *options, "--intervention", "mean", "--out", "with")
    constants = load_constants(Path("with") / FILE_NAME)
    for factor, words in ((math.nan, "holds nan"), (1e30, "metric 'logit_diff' of the")):
        values = {None: [factor * x for x in constants.values[None]]}
        (Path("with") / FILE_NAME).write_bytes(replace(constants, values=values).as_bytes())
        answer = call("evaluate", "with", "--brief")
        assert answer.status == 2
        assert words in answer.err
        assert "nan" not in answer.out


@pytest.mark.parametrize("intervention", ["mean", "optimal"])
def test_a_run_keeps_its_constants_and_evaluation_uses_them(
    intervention: str,
    place: Path,
    call: Call,
) -> None:
    options = ["--model", "ln2", "--method", "eap", "--edges", 20, "--n-prompts", 4]
    options += ["--intervention", intervention]
    options += ["--optimal-steps", 3] if intervention == "optimal" else []
    answer = call("discover", "task.jsonl", *options, "--out", "constant")
    assert answer.status == 0, answer.err
    settings, circuit, summary = read_run("constant")
    assert summary["intervention"] == intervention
    if intervention == "optimal":
        assert summary["optimal_steps"] == 3
        assert summary["constants"]["n_steps"] == 3
        assert len(summary["constants"]["losses"]) == len(circuit.graph.senders)
    constants = run_constants("constant", settings)
    assert constants is not None
    unseen = replace(settings, n_prompts=None)  # other prompts, with other means
    with_run, _ = measure(circuit, unseen, constants)
    anew, _ = measure(circuit, unseen)
    assert with_run.metric_empty != pytest.approx(anew.metric_empty, abs=1e-6)
    assert run_constants("constant", replace(settings, mean_over="ioi")) is None
    answer = call("evaluate", "constant", "--brief", "--n-prompts", 8)
    assert answer.status == 0
    eight, _ = measure(circuit, replace(settings, n_prompts=8), constants)
    assert f"{eight.metric_empty:.4g}" in answer.out
    found = evaluate("constant", tests=False)
    assert found.measured[0].intervention == intervention


def test_constants_of_another_model_are_refused(place: Path) -> None:
    settings = check_settings(Settings("task.jsonl", model="ln2", intervention="mean"))
    wrong = Constants("mean", "noising", {None: [torch.zeros(1, 1, 3)]})
    experiment = replace(build_experiment(settings), constants=wrong)
    with pytest.raises(OptionError, match="of another model"):
        Evaluator(experiment)._patched.metric(np.ones(experiment.graph.n_edges, dtype=bool))


def test_a_killed_run_trains_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained constants are kept at once; the same command goes on with them."""

    options: dict[str, Any] = {"model": "ln2", "threshold": 0.05, "n_prompts": 4}
    options |= {"intervention": "optimal", "optimal_steps": 2, "checkpoint": "killed"}

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("acdc.methods.acdc.acdc", killed)
        with pytest.raises(Killed):
            discover("task.jsonl", **options)
    assert sorted(p.name for p in Path("killed/checkpoint").iterdir()) == [
        FILE_NAME,
        "settings.json",
    ]
    monkeypatch.setattr("acdc.ablations.optimal.optimal_constants", killed)
    run = discover("task.jsonl", **options)
    run.save("killed")
    assert (Path("killed") / FILE_NAME).is_file()
    assert not Path("killed/checkpoint").exists()


# --- evaluation -----------------------------------------------------------------------------


def test_the_ranking_of_circuits_changes_with_the_intervention() -> None:
    """Two circuits of the bundled model, each the more faithful under one ablation."""
    runs = {
        kind: acdc.discover("ioi", method="eap-ig", n_edges=60, intervention=kind)
        for kind in ("resample", "mean")
    }
    faithfulness = {
        (kind, under): measure(run.circuit, replace(run.settings, intervention=under))[0]
        for kind, run in runs.items()
        for under in runs
    }
    values = {key: found.faithfulness or 0.0 for key, found in faithfulness.items()}
    assert values["resample", "resample"] > values["mean", "resample"] + 0.1
    assert values["mean", "mean"] > values["resample", "mean"] + 0.5


def test_evaluation_reports_every_ablation(place: Path, call: Call) -> None:
    answer = call("evaluate", "run", "--no-tests", "--n-resamples", 20, "--out", "a.json")
    assert answer.status == 0
    content = read(Path("a.json"))
    rows = {(row["intervention"], row["direction"]) for row in content["ablations"]}
    known = ("resample", "zero", *MEANS)
    assert rows == {(i, d) for i in known for d in DIRECTIONS}
    assert content["ablations_left_out"] == {"optimal": "needs training, say --optimal"}
    assert "needs training" in answer.out
    some = ["--optimal", "--optimal-steps", 2, "--overwrite", "--mean-over", "short.txt"]
    Path("short.txt").write_text("")
    Path("short.jsonl").write_text('{"prompt": [1, 2, 3]}\n')
    some[-1] = "short.jsonl"
    command = ["evaluate", "run", "--no-tests", "--n-resamples", 20, "--out", "a.json"]
    assert call(*command, *some).status == 0
    content = read(Path("a.json"))
    rows = {(row["intervention"], row["direction"]) for row in content["ablations"]}
    assert rows == {(i, d) for i in ("resample", "zero", "mean", "optimal") for d in DIRECTIONS}
    assert content["ablations_left_out"] == {"mean-positional": "no means for prompts of 14 tokens"}


@pytest.mark.parametrize(
    ("family", "kind", "site"),
    [
        ("LN", "standard", "mlp_out"),
        ("Gemma2", "standard", "attn_z"),
        ("Gemma2", "standard", "attn_out"),
        ("GPTNeoX", "standard", "resid_pre"),
        ("LN", "transcoder", "ln2_out"),
    ],
)
def test_latents_have_trained_constants(family: str, kind: str, site: str) -> None:
    """Losses of means and of constants are those of an explicit pass with every edge cut."""
    model: LoweredModel = oracle.small_model(family, 0)
    plain = Experiment(model, oracle.small_task(0), get_metric("kl"), intervention="optimal")
    experiment = attach(plain, [random_dictionary(model, kind, site, 1)]).experiment
    constants = optimal_constants(experiment, 10)
    losses = constants.report["losses"]
    assert list(losses) == list(experiment.graph.senders)
    (values,) = constants.values.values()
    blocks = zip(experiment.program.blocks, values, strict=True)
    vectors = torch.cat([block.vectors(x)[:, 0, 0, 0] for block, x in blocks])
    attachment = experiment.attachments[0]
    nodes = {attachment.site.name: (attachment.dictionary, attachment.latents)}
    for sender, vector in zip(losses, vectors, strict=True):
        total = 0.0
        for pair in experiment.task.pairs:
            tokens = torch.tensor([pair.clean])
            whole = LatentPass(model, tokens, nodes)
            share = {e: 1 for e in whole.edges if e.startswith(f"{sender}->")}
            ablated = {sender: vector.expand(1, tokens.shape[1], -1)}
            cut = LatentPass(model, tokens, nodes, share, ablated)
            logits = (model.unembed(run.final[:, -1])[0].double() for run in (cut, whole))
            total += oracle.METRICS["kl"](*(x.detach().numpy() for x in logits), pair)
        wanted = total / len(experiment.task)
        assert losses[sender]["optimal"] == pytest.approx(wanted, abs=2e-4, rel=2e-3), sender
    assert any(row["optimal"] < 0.8 * row["mean"] for row in losses.values())


# --- mistakes -------------------------------------------------------------------------------

FILES = {
    "empty.txt": "\n\n",
    "empty.jsonl": "",
    "none.jsonl": '{"prompt": []}\n',
    "mixed.jsonl": '{"prompt": [1]}\n{"text": "a"}\n',
    "torn.jsonl": '{"prompt": [1\n',
    "high.jsonl": '{"prompt": [1, 99999]}\n',
    "long.jsonl": json.dumps({"prompt": [1] * 999}) + "\n",
    "text.txt": "hello\n",
    "number.jsonl": '{"prompt": 3}\n',
    "short.jsonl": '{"prompt": [1, 2, 3]}\n',
}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["mean", "--mean-over", "empty.txt"], "mean over an empty dataset: empty.txt has no pro"),
        (["mean", "--mean-over", "empty.jsonl"], "mean over an empty dataset: empty.jsonl has no"),
        (["mean", "--mean-over", "none.jsonl"], "none.jsonl, row 1: the prompt has no tokens"),
        (["mean", "--mean-over", "mixed.jsonl"], "mixed.jsonl, row 2: no key 'prompt'"),
        (["mean", "--mean-over", "torn.jsonl"], "torn.jsonl, row 1: no JSON that can be read"),
        (["mean", "--mean-over", "high.jsonl"], "high.jsonl, row 1: token ids 1 to 99999"),
        (["mean", "--mean-over", "long.jsonl"], "long.jsonl, row 1: the prompt has 999 tokens"),
        (
            ["mean", "--mean-over", "text.txt"],
            "text.txt, row 1: got the text 'hello' but the model has no tok",
        ),
        (["mean", "--mean-over", "number.jsonl"], "a prompt is a text or a list of token ids"),
        (["mean", "--mean-over", "missing.txt"], "missing.txt: no such file"),
        (["mean", "--mean-over", "ioy"], "unknown task 'ioy'"),
        (["mean-positional", "--mean-over", "short.jsonl"], "a prompt has 14 tokens, but the prom"),
        (["zero", "--mean-over", "short.jsonl"], "mean_over 'short.jsonl' with intervention 'zero"),
        (["median"], "intervention 'median': expected one of resample, zero, mean, mean-pos"),
        (["optimal", "--optimal-steps", "0"], "optimal_steps 0: expected at least 1"),
    ],
)
def test_bad_input_is_one_line(options: list[str], words: str, place: Path, call: Call) -> None:
    for name, content in FILES.items():
        Path(name).write_text(content)
    command = ["discover", "task.jsonl", "--model", "ln2", "--method", "eap", "--edges", 9]
    answer = call(*command, "--out", "new", "--intervention", *options)
    assert answer.status == 2
    assert answer.err.count("\n") == 1
    assert words in answer.err
    assert not Path("new").exists()


def test_an_empty_dataset_is_refused_in_python() -> None:
    experiment, _ = build("LN", 3, "mean", mean_over=None)
    with pytest.raises(TaskError, match="mean over an empty dataset: no prompts were given"):
        replace(experiment, mean_over=()).pinned()


def test_datasets(place: Path) -> None:
    Path("a.jsonl").write_text('{"prompt": [1, 2]}\n\n{"prompt": [3]}\n')
    assert load_dataset("a.jsonl", None) == ((1, 2), (3,))
    pairs = load_dataset("task.jsonl", None)
    rows = [json.loads(line) for line in Path("task.jsonl").read_text().splitlines()]
    assert pairs == tuple(tuple(row[which]) for row in rows for which in ("clean", "corrupt"))
