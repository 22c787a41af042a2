"""Trained masks: the soft forward pass, hard concrete variables, and the circuits they reach."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from test_attribution import build
from test_compiled import experiment as compiled
from test_compiled import read
from test_parity import DATA, expected
from test_parity import experiment as parity_experiment

from acdc.cli import main
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import PatchedModel
from acdc.engine.steps import ROOM, in_steps
from acdc.engine.work import Work
from acdc.errors import OptionError
from acdc.methods import METHODS
from acdc.methods.masks import HardConcrete, Training, edge_pruning, subnetwork_probing
from acdc.methods.select import edge_scores
from acdc.models import load_model
from acdc.runs.discover import discover
from acdc.tasks import load_task
from acdc.tasks.base import Task
from benchmarks.accuracy import subjects
from graphs.known.roc import auroc, items

NAMES = ("subnetwork-probing", "edge-pruning")
TRAINED = (edge_pruning, subnetwork_probing)


# --- the soft forward pass ----------------------------------------------------------------


@pytest.mark.parametrize("intervention", ["resample", "zero"])
@pytest.mark.parametrize("family", ["LN", "grouped", "GPTNeoX", "Gemma2"])
def test_weights_of_zero_and_one_are_a_mask(family: str, intervention: str) -> None:
    experiment, _ = build(family, 4, intervention=intervention)
    soft, hard = PatchedModel(experiment), PatchedModel(experiment)
    for share in (0.0, 0.5, 1.0):
        mask = np.random.default_rng(1).random(experiment.graph.n_edges) < share
        weights = torch.tensor(mask, dtype=experiment.model.dtype, requires_grad=True)
        rows = [soft.rows(i, weights) for i in range(len(experiment.batches))]
        assert torch.cat(rows).mean().item() == pytest.approx(hard.metric(mask), abs=1e-5)


@pytest.mark.parametrize("family", ["LN", "grouped", "GPTNeoX", "Gemma2"])
def test_gradients_of_weights_are_finite_differences(family: str) -> None:
    experiment, slow = build(family, 1)
    names = experiment.graph.edge_names()
    rng = np.random.default_rng(0)
    values = rng.uniform(0.2, 0.8, len(names))
    weights = torch.tensor(values, dtype=experiment.model.dtype, requires_grad=True)
    model = PatchedModel(experiment)
    total = sum(model.rows(i, weights).sum() for i in range(len(experiment.batches)))
    (total / experiment.n_rows).backward()
    assert weights.grad is not None
    largest = float(weights.grad.abs().max())
    assert largest > 1e-3
    eps = 3e-3
    for edge in rng.choice(len(names), 12, replace=False):
        ends = []
        for step in (eps, -eps):
            share = dict(zip(names, 1 - values, strict=True))
            share[names[edge]] -= step
            ends.append(slow.metric(share))
        wanted = (ends[0] - ends[1]) / (2 * eps)
        assert float(weights.grad[edge]) == pytest.approx(wanted, abs=2e-3 * largest)


@pytest.mark.parametrize("family", ["LN", "grouped", "Gemma2"])
def test_every_prompt_may_have_weights_of_its_own(family: str) -> None:
    experiment, _ = build(family, 2, intervention="zero")
    (batch,) = experiment.batches
    shape = batch.n_prompts, experiment.graph.n_edges
    weights = torch.tensor(np.random.default_rng(0).random(shape), dtype=experiment.model.dtype)
    model = PatchedModel(experiment)
    alone = [model.rows(0, row)[i] for i, row in enumerate(weights)]
    assert float((alone[0] - alone[1]).abs()) > 1e-4
    torch.testing.assert_close(model.rows(0, weights), torch.stack(alone), atol=1e-5, rtol=1e-5)


# --- hard concrete variables --------------------------------------------------------------


def test_masks_are_hard_as_often_as_the_distribution_says() -> None:
    n = 40_000
    for log_alpha in (-2.0, 0.0, 3.0):
        masks = HardConcrete(torch.full((n,), log_alpha))
        z = masks.sample(1, torch.Generator().manual_seed(0))[0]
        assert 0 <= float(z.min()) <= float(z.max()) <= 1
        wanted = float(masks.probability()[0])
        assert wanted == pytest.approx(
            1 / (1 + math.exp(-(log_alpha - 2 / 3 * math.log(0.1 / 1.1)))), rel=1e-5
        )
        assert float((z > 0).double().mean()) == pytest.approx(wanted, abs=0.01)
        assert float((z == 1).double().mean()) > 0.01


def test_one_mask_in_n_is_not_whole() -> None:
    n = 1000
    masks = HardConcrete(torch.full((n,), HardConcrete.whole(n)))
    z = masks.sample(200, torch.Generator().manual_seed(0))
    assert float((z < 1).double().sum(1).mean()) == pytest.approx(1, abs=0.2)


# --- circuits -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "metric", "tau"), [("ln2", "kl", "0.05"), ("attn3", "logit_diff", "0.2")]
)
def test_edge_pruning_reaches_the_circuit_of_acdc(model: str, metric: str, tau: str) -> None:
    case = parity_experiment(model, metric)
    true = case.graph.edge_mask(expected(model)["acdc"][f"{metric}|{tau}"]["kept"])
    notes: list[str] = []
    sparsity = 1 - true.mean()
    training = Training(sparsity, mask_steps=200, learning_rate=0.2)
    assert auroc(true, edge_pruning(case, training, Work(note=notes.append))) >= 0.9
    assert len(notes) == 200
    reached = float(notes[-1].split()[-1])
    assert reached == pytest.approx(sparsity, abs=1e-3)
    assert [float(note.split()[-1]) for note in notes] == sorted(
        float(n.split()[-1]) for n in notes
    )


@pytest.mark.parametrize("method", TRAINED, ids=lambda m: m.__name__)
def test_known_circuits_of_compiled_models(method: Callable[..., Any]) -> None:
    case = compiled("tracr-reverse", "resample")
    true = case.graph.edge_mask(read("tracr-reverse", "reference-resample.json")["edges"])
    scores = method(case, Training(0.9, mask_steps=150, learning_rate=0.2))
    if method is subnetwork_probing:
        assert scores[case.graph.sender_index["input"]] == 1
        scores = edge_scores(case, scores)
    assert auroc(true, scores) >= 0.9


@pytest.mark.parametrize("sparsity", [0.9, 0.98])
def test_a_target_above_the_true_sparsity_ranks_as_well(sparsity: float) -> None:
    """Of 32 edges 7 are true; 0.9 leaves 3 of them, 0.98 none."""
    case = compiled("tracr-xproportion", "zero")
    true = case.graph.edge_mask(read("tracr-xproportion", "reference-zero.json")["edges"])
    assert true.mean() > 1 - 0.9
    assert auroc(true, edge_pruning(case, Training(sparsity, mask_steps=200))) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["planted-ioi", "planted-docstring"])
def test_planted_circuits(name: str) -> None:
    """With the defaults; an edge of a node method ranks as the lower of its ends."""
    subject = subjects()[name]
    known = subject.reference
    assert known is not None
    lowered, tokenizer = load_model(str(subject.model))
    task = load_task(subject.task, tokenizer, n_prompts=None, seed=0)
    pairs = task.pairs[:64]
    case = Experiment(lowered, Task(name, pairs), get_metric(subject.metric))
    edges = items(case.graph, known.granularity, known.optional_nodes)
    nodes = items(case.graph, "nodes", known.optional_nodes)
    of_nodes = edge_scores(case, subnetwork_probing(case))
    for scores in (edge_pruning(case), of_nodes):
        assert auroc(edges.mask(known.mask()), edges.scores(scores)) >= 0.9
        assert auroc(nodes.named(known.nodes), nodes.scores(scores)) >= 0.9


@pytest.mark.parametrize("method", TRAINED, ids=lambda m: m.__name__)
def test_the_seed_decides(method: Callable[..., Any]) -> None:
    case = parity_experiment("ln2", "kl")
    case = replace(case, task=Task("few", case.task.pairs[:3]))
    before = oracle.random_states()
    first, again, other = (method(case, Training(0.8, 5, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert oracle.random_states() == before


@pytest.mark.parametrize("name", NAMES)
def test_found_circuits(name: str) -> None:
    case = parity_experiment("ln2", "kl")
    case = replace(case, task=Task("few", case.task.pairs[:3]))
    method, counted, notes = METHODS[name], [], []  # type: ignore[var-annotated]
    asked = {"sparsity": 0.7, "mask_steps": 6, "learning_rate": 0.3, "seed": 4}
    found = method.find(case, Work(progress=counted.append, note=notes.append), **asked)
    assert sum(counted) == method.n_units(case, **asked) == 6
    assert 0 < found.circuit.n_edges <= round(0.3 * case.graph.n_edges)
    assert notes[0].startswith("loss ")
    scores = found.circuit.scores
    assert ((scores > 0) & (scores <= 1)).all()
    if name == "subnetwork-probing":
        nodes = subnetwork_probing(case, Training(**asked))
        np.testing.assert_array_equal(scores, edge_scores(case, nodes))


@pytest.mark.parametrize("method", TRAINED, ids=lambda m: m.__name__)
def test_what_a_step_sees_does_not_depend_on_what_fits(
    method: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """45 prompts of two lengths, the longer one 34 times: steps of 11, 32 and 2 prompts."""
    long, short = (oracle.small_task(1, n, (length,)).pairs for n, length in ((34, 5), (11, 4)))
    experiment, _ = build("LN", 0, task=Task("random", long + short))
    training = Training(0.9, mask_steps=6)
    parts, steps = in_steps(experiment, 32, 1 << 26, 1 << 30)
    sizes = [[parts.batches[i].n_prompts for i in step] for step in steps]
    assert sizes == [[8, 3], [8, 8, 8, 8], [2]]
    whole = method(experiment, training)
    found = method(replace(experiment, batch_size=7), training, Work(memory=ROOM))
    np.testing.assert_array_equal(found, whole)
    for work in (Work(memory=1), Work()):  # prompt by prompt
        np.testing.assert_allclose(method(experiment, training, work), whole, atol=1e-9)
        monkeypatch.setattr("acdc.engine.steps.ROOM", 1)


@pytest.mark.parametrize("method", TRAINED, ids=lambda m: m.__name__)
def test_what_is_run_together_fits_the_memory(
    method: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, _ = build("LN", 0, task=oracle.small_task(1, 34, (5,)))
    each = PatchedModel(experiment).bytes_per_prompt(5)
    sizes: list[int] = []

    def rows(model: PatchedModel, i: int, *args: Any, **options: Any) -> Any:
        sizes.append(model.experiment.batches[i].n_prompts)
        return run(model, i, *args, **options)

    run = PatchedModel.rows
    monkeypatch.setattr(PatchedModel, "rows", rows)
    for n, memory in ((32, 32 * each), (8, 15 * each), (1, each), (1, 1)):
        sizes.clear()
        method(experiment, Training(0.9, mask_steps=2), Work(memory=memory))
        assert max(sizes) == n


# --- bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.0}, r"sparsity 0\.0: expected .* above 0 and below 1"),
        ({"sparsity": 1.0}, r"sparsity 1\.0"),
        ({"sparsity": -0.5}, r"sparsity -0\.5"),
        ({"sparsity": float("nan")}, "sparsity nan"),
        ({"mask_steps": 0}, "mask_steps 0: expected at least 1"),
        ({"learning_rate": 0.0}, r"learning_rate 0\.0: expected a number above 0"),
        ({"learning_rate": math.inf}, "learning_rate inf"),
        (
            {"sparsity": 0.5, "n_edges": 3},
            "sparsity of method .* asks for a size, and so does a threshold",
        ),
        ({"sparsity": 0.5, "method": "eap"}, "method 'eap' takes no sparsity"),
        ({"mask_steps": 9, "method": "acdc"}, "method 'acdc' takes no mask_steps"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        discover("ioi", model=str(DATA / "ln2"), **{"method": "edge-pruning", **options})


def test_one_line_and_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as caught:
        main(
            ["discover", "ioi", "--method", "edge-pruning", "--sparsity", "1.5", "--out", str(out)]
        )
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "acdc: sparsity 1.5: expected a number above 0 and below 1, as 0.95"
    ]
    assert not out.exists()
