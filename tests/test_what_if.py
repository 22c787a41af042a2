"""Acting on nodes and edges: against patched runs, shares ablated by hand and plain generation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import test_cross_layer
import test_experts
import test_latents
import test_latents_positions
import torch
from command_line import N_ROWS, status_of
from numpy.typing import NDArray
from parity_pairs import jsonl, parity_rows
from test_attribution import build

import acdc
from acdc.cli import main
from acdc.engine.acted import ActedModel, Carried
from acdc.engine.experiment import Experiment
from acdc.engine.patched import PatchedModel
from acdc.errors import OptionError
from acdc.evidence.what_if import _World
from acdc.measure.actions import Actions, steering
from acdc.models import load_model


def after(experiment: Experiment, **actions: Any) -> float:
    """Mean metric of the clean prompts with some actions."""
    in_circuit = actions.pop("in_circuit", np.ones(experiment.graph.n_edges, dtype=bool))
    acted = Actions(**actions).on(experiment.graph, in_circuit)
    return _World(experiment.pinned(), acted).metrics()[1]


def slack(experiment: Experiment) -> float:
    return 1e-7 if experiment.model.dtype.itemsize == 8 else 1e-4


def out_of(experiment: Experiment, node: str) -> NDArray[np.bool_]:
    graph = experiment.graph
    return graph.edge_sender == graph.sender_index[node]


def check_against_patched_runs(experiment: Experiment, seed: int = 0) -> None:
    """Nodes, edges and a circuit ablated, and both at once."""
    graph, close = experiment.graph, slack(experiment)
    rng = np.random.default_rng(seed)
    patched = PatchedModel(experiment)
    inside = rng.random(graph.n_edges) < 0.7
    node = graph.senders[int(rng.integers(graph.n_senders))]
    edge = graph.edge_name(int(rng.integers(graph.n_edges)))
    lost = out_of(experiment, node) | graph.edge_mask([edge])
    cases = [
        ({"only_circuit": True, "in_circuit": inside}, inside),
        ({"ablate": (node, edge)}, ~lost),
        ({"ablate": (node, edge), "only_circuit": True, "in_circuit": inside}, inside & ~lost),
    ]
    for asked, mask in cases:
        assert after(experiment, **asked) == pytest.approx(patched.metric(mask), abs=close)
    if experiment.intervention == "resample":
        found = after(experiment, patch=(node, edge))
        assert found == pytest.approx(patched.metric(~lost), abs=close)


@pytest.mark.parametrize("intervention", ["resample", "mean", "zero"])
@pytest.mark.parametrize("family", ["LN", "grouped rotary", "soft caps", "GPTNeoX", "Gemma2"])
def test_what_is_ablated_is_a_patched_run(family: str, intervention: str) -> None:
    task = oracle.small_task(1, 4, (4, 5))
    check_against_patched_runs(build(family, 1, task=task, intervention=intervention)[0])


@pytest.mark.parametrize("family", ["LN", "attention only", "GPTNeoX", "Gemma2"])
def test_a_factor_is_a_share_of_zero(family: str) -> None:
    experiment, slow = build(family, intervention="zero")
    graph = experiment.graph
    for factor in (-1.0, 0.3, 2.0):
        node = graph.senders[-2]
        names = graph.edge_names(np.flatnonzero(out_of(experiment, node)))
        wanted = slow.metric(dict.fromkeys(names, 1 - factor))
        close = 10 * slack(experiment)
        assert after(experiment, scale={node: factor}) == pytest.approx(wanted, abs=close)
        wanted = slow.metric({graph.edge_name(3): 1 - factor})
        found = after(experiment, scale={graph.edge_name(3): factor})
        assert found == pytest.approx(wanted, abs=close)


@pytest.mark.parametrize("which", test_latents.SETS)
def test_latents_are_nodes_like_others(which: str) -> None:
    check_against_patched_runs(test_latents.build("LN", which)[0])


def test_cross_layer_transcoders_and_spans(tmp_path: Path) -> None:
    check_against_patched_runs(test_cross_layer.build(tmp_path)[0])
    check_against_patched_runs(test_latents_positions.build("neurons")[0])


@pytest.mark.parametrize("router", ["frozen", "free"])
def test_experts_are_nodes_like_others(router: str) -> None:
    check_against_patched_runs(test_experts.both("Mixtral", router)[0])


@pytest.mark.parametrize("family", ["LN", "Gemma2"])
def test_steering_adds_a_mean_difference_at_every_token(family: str) -> None:
    experiment, _ = build(family, 2, task=oracle.small_task(2, 4, (5,)))
    directions, program = steering(experiment), experiment.program
    for b, head in ((1, 1), (2, 0)):
        block, batch = program.blocks[b], experiment.batches[0]
        node = experiment.graph.senders[block.start + head]
        vector = block.vectors(directions[b])[head, 0, 0, 0]
        with torch.no_grad():
            base = experiment.model.forward(batch.clean)
            stream, first = program.rerun(base, b, (1.5 * vector).expand(1, *base.embeds[0].shape))
            final = experiment.model.forward(batch.clean, [stream], first=first).final
        wanted = experiment.measure(final[:, :, batch.scored].flatten(1, 2), batch)[0]
        found = after(experiment, steer={node: 1.5})
        assert found == pytest.approx(float(wanted) / experiment.n_rows, abs=slack(experiment))


def test_a_mean_difference_by_hand() -> None:
    experiment, _ = build("LN", 0, task=oracle.small_task(0, 3, (4, 5)))
    total, n = 0.0, 0
    for pair in experiment.task.pairs:
        since = next(
            i for i, (a, b) in enumerate(zip(pair.clean, pair.corrupt, strict=True)) if a != b
        )
        runs = [experiment.written(torch.tensor([x]))[1] for x in (pair.clean, pair.corrupt)]
        total = total + (runs[0] - runs[1])[..., since:, :].sum(-2)
        n += len(pair.clean) - since
    torch.testing.assert_close(steering(experiment)[1].flatten(1), (total / n).flatten(1))


def test_actions_come_in_one_order() -> None:
    experiment, _ = build("LN", 0)
    graph = experiment.graph
    every = np.ones(graph.n_edges, dtype=bool)
    acted = Actions(ablate=("m0",), scale={"m0": 0.5}, steer={"m0": 2.0}).on(graph, every)
    out = out_of(experiment, "m0")
    assert set(acted.weights[out]) == {0.0}
    assert set(acted.weights[~out]) == {1.0}
    assert set(acted.shares["ablated"][out]) == {0.5}
    assert set(acted.shares["steered"][out]) == {2.0}
    assert acted.needs == {"ablated", "steered"}


def test_nothing_acted_on_is_the_model() -> None:
    experiment, _ = build("Gemma2", 1)
    batch, ones = experiment.batches[0], np.ones(experiment.graph.n_edges)
    final = ActedModel(experiment).final(batch.clean, ones, [Carried([], np.zeros(1))])
    wanted = experiment.model.forward(batch.clean).final
    torch.testing.assert_close(final, wanted, atol=1e-4, rtol=1e-4)


# --- a run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("what-if")
    pairs = folder / "pairs.jsonl"
    pairs.write_text(jsonl(parity_rows(data / "parity" / "ln2", N_ROWS)))
    model = str(data / "parity" / "ln2")
    acdc.discover(str(pairs), model=model, method="eap-ig", n_edges=12).save(folder / "run")
    return folder / "run"


def test_a_run(run: Path, tmp_path: Path) -> None:
    found = acdc.what_if(run, ablate=["a0.h0"], show=2, top=3, generate=2, seen=True)
    assert found.about["intervention"] == "mean"
    assert any("carries means over the task's corrupt prompts" in text for text in found.warnings)
    assert len(found.looked) == 2
    for one in found.looked:
        assert sum(token.before for token in one.tokens) <= 1 + 1e-9
        assert one.divergence >= -1e-9
        assert len(one.after.split()) == 2
    summary = json.loads(found.save(tmp_path).read_text())
    assert summary["actions"] == ["ablate a0.h0"]
    assert summary["metric_after"] == found.metric_after
    paired = acdc.what_if(run, ablate=["a0.h0"], intervention="resample", seen=True)
    assert paired.warnings == ()
    assert paired.metric_after == acdc.what_if(run, patch=["a0.h0"], seen=True).metric_after


def test_generated_text_is_greedy(run: Path) -> None:
    found = acdc.what_if(run, scale={"m0": 1.0}, generate=3, show=1, seen=True)
    settings = acdc.load_run(run).settings
    model, _ = load_model(settings.model)
    ids = [int(x) for x in found.looked[0].prompt.split()]
    n = min(3, model.n_ctx - len(ids))
    for _ in range(n):
        with torch.no_grad():
            final = model.forward(torch.tensor([ids])).final
            ids.append(int(model.unembed(final[:, -1])[0].argmax()))
    assert found.looked[0].before.split() == [str(i) for i in ids[-n:]][: len(ids)]
    assert found.looked[0].after == found.looked[0].before


def test_the_command(run: Path, capsys: Any, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    options = ["--scale", "a0.h0->logits=0.5", "--steer", "m0=1", "--only-circuit", "--out", out]
    assert status_of("what-if", run, *options) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "only the circuit; scale a0.h0->logits by 0.5; steer m0 by 1" in said
    assert "next token" in said
    assert (
        json.loads(out.read_text())["metric_after"] != json.loads(out.read_text())["metric_before"]
    )


def test_numbers_that_json_lacks_are_null(run: Path, capsys: Any) -> None:
    assert status_of("what-if", run, "--steer", "m0->logits=1e38", "--json") == 0
    said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert said["metric_before"] is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing is to be done"),
        (["--ablate", "a9.h9"], "no node 'a9.h9'"),
        (["--ablate", "m0", "--patch", "m0"], "'m0' is to be ablated and to be patched"),
        (["--scale", "m0"], "--scale 'm0': expected a node or edge and a number"),
        (["--steer", "m0=x"], "--steer 'm0=x': expected a node or edge and a number"),
        (["--scale", "m0=inf"], "m0=inf: expected a finite number"),
        (["--scale", "m0=1", "--scale", "m0=2"], "--scale m0 is given twice"),
        (["--ablate", "m0", "--corrupt", "x"], "1 corrupt prompts for 0 prompts"),
        (["--ablate", "m0", "--prompt", "word"], "the model has no tokenizer"),
        (["--ablate", "m0", "--generate", "-1"], "generate"),
    ],
)
def test_mistakes_are_one_line(
    run: Path, options: list[str], message: str, capsys: Any, tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    assert status_of("what-if", run, *options, "--out", out) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_prompts_of_ones_own_have_no_spans_and_maybe_no_corruption() -> None:
    from acdc.evidence.what_if import _check_use, _Prompt

    experiment, _ = build("LN", 0)
    own = [_Prompt((1, 2, 3), None, 2)]
    graph = experiment.graph
    acted = Actions(patch=("m0",)).on(graph, np.ones(graph.n_edges, dtype=bool))
    with pytest.raises(OptionError, match="give one with --corrupt for each"):
        _check_use(experiment, acted, own, 0)
    ablated = Actions(ablate=("m0",)).on(graph, np.ones(graph.n_edges, dtype=bool))
    _check_use(replace(experiment, intervention="mean"), ablated, own, 0)
    with pytest.raises(OptionError, match="more than the"):
        _check_use(replace(experiment, intervention="mean"), ablated, own, 9999)
    split, _ = test_latents_positions.build("neurons")
    with pytest.raises(OptionError, match="split by spans of the task's prompts"):
        _check_use(split, ablated, own, 0)
    both_ways, _ = build("bidirectional", 0)
    with pytest.raises(OptionError, match="the model reads both ways"):
        _check_use(both_ways, ablated, [], 1)


class Reached(Exception):  # noqa: N818  (no error)
    """An experiment was told what it may take."""


@pytest.mark.parametrize("name", ["what_if", "interactions", "self_repair", "report"])
def test_memory_bounds_what_is_measured(
    name: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def within(self: Experiment, memory: int) -> Experiment:
        raise Reached(memory)

    command = [name.replace("_", "-"), str(run), "--memory"]
    acted = ["--ablate", "a0.h0"] if name == "what_if" else []
    monkeypatch.setattr(Experiment, "within", within)
    with pytest.raises(Reached, match=str(2**29)):
        main([*command, "0.5", *acted])
    with pytest.raises(SystemExit) as done:
        main([*command, "0", *acted])
    assert done.value.code == 2
    assert "acdc: memory 0: expected GiB above 0, as 1" in capsys.readouterr().err


def test_what_does_not_fit_is_run_in_parts(run: Path) -> None:
    asked: dict[str, Any] = {"ablate": ["a0.h0"], "seen": True}
    few, whole = acdc.what_if(run, memory=1, **asked), acdc.what_if(run, **asked)
    assert few.metric_before == pytest.approx(whole.metric_before, abs=1e-6)
    assert few.metric_after == pytest.approx(whole.metric_after, abs=1e-6)
