"""Trained models: they do their tasks, in the way that interventions by hand established."""

from __future__ import annotations

import json
from functools import cache
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.evidence.heads import explain_heads
from acdc.measure.evaluation import Evaluator
from acdc.methods.sweep import sweep
from acdc.models import load_model
from acdc.models.lowering import LoweredModel
from acdc.tasks import Task, load_task
from benchmarks.accuracy import subjects
from benchmarks.trained import MODELS
from benchmarks.trained.__main__ import main, measure
from benchmarks.trained.interventions import Lab
from benchmarks.trained.mechanisms import MECHANISMS
from benchmarks.trained.model import Sizes, Transformer
from benchmarks.trained.tasks import BOS, END, MODULUS, N_SPECIAL, TASKS, unseen
from benchmarks.trained.train import RECIPES, as_prompts, build_model, train
from graphs import Reference, read_reference

NAMES = sorted(MODELS)
TWINS = ("trained-copy", "trained-reverse")


@cache
def shipped(name: str) -> Transformer:
    return Transformer.of_folder(MODELS[name])


@cache
def reference(name: str) -> Reference:
    return read_reference(MODELS[name] / "reference.json")


@cache
def engine(name: str) -> tuple[LoweredModel, Task]:
    model, _ = load_model(str(MODELS[name]))
    fits = {"d_vocab": model.d_vocab, "n_ctx": model.n_ctx}
    return model, load_task(str(MODELS[name] / "pairs.jsonl"), None, **fits)


def lab(name: str, n: int = 64, seed: int = 9) -> Lab:
    rng = Random(seed)
    return Lab(shipped(name), as_prompts([TASKS[name].draw_pair(rng) for _ in range(n)]))


# --- the suite ----------------------------------------------------------------------------


def test_the_suite() -> None:
    assert set(NAMES) == set(TASKS) == set(RECIPES) == set(MECHANISMS)
    assert set(TWINS) <= set(NAMES)
    size = sum(file.stat().st_size for folder in MODELS.values() for file in folder.iterdir())
    assert size < 1_000_000
    for name in NAMES:
        weights = load_file(MODELS[name] / "model.safetensors")
        assert {x.dtype for x in weights.values()} == {torch.float16}
        subject = subjects()[name]
        assert (subject.metric, subject.intervention) == ("logit_diff", "resample")
        assert subject.reference is not None


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_runs_the_same_model(name: str) -> None:
    lowered, task = engine(name)
    tokens = torch.tensor([pair.clean for pair in task.pairs])
    plain = shipped(name).logits(tokens)
    by_node = shipped(name).run(tokens).logits
    torch.testing.assert_close(by_node, plain, atol=1e-4, rtol=1e-4)
    final = lowered.forward(tokens).final
    assert final is not None
    found = lowered.unembed(final)
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_interventions_by_hand_are_those_of_the_engine(name: str) -> None:
    """Effects of single edges and faithfulness, by two programs that share nothing."""
    lowered, task = engine(name)
    evaluator = Evaluator(Experiment(lowered, task, get_metric("logit_diff")))
    rows = [json.loads(line) for line in (MODELS[name] / "pairs.jsonl").open()]
    rng = Random(0)
    prompts = as_prompts([TASKS[name].draw_pair(rng) for _ in rows])
    assert prompts.clean.tolist() == [row["clean"] for row in rows]
    hand, graph = Lab(shipped(name), prompts), evaluator.experiment.graph
    assert set(hand.edges) == set(graph.edge_names())
    known = graph.edge_mask(list(reference(name).edges))
    expected = hand.faithfulness(reference(name).edges)
    assert evaluator.faithfulness(known) == pytest.approx(expected, abs=1e-4)
    for edge in Random(1).sample(hand.edges, 4):
        without = np.ones(graph.n_edges, dtype=bool) & ~graph.edge_mask([edge])
        found = 1 - (evaluator.faithfulness(without) or 0)
        assert found == pytest.approx(hand.effect([edge]), abs=1e-4), edge


# --- what they learn ----------------------------------------------------------------------


@pytest.mark.parametrize("name", TWINS)
def test_what_the_twins_learn(name: str) -> None:
    step, rng = (1 if name == "trained-copy" else -1), Random(3)
    for _ in range(200):
        tokens, targets = (example := TASKS[name].draw(rng, 10)).tokens, example.targets
        end = tokens.index(END)
        source = tokens[1:end]
        assert tokens[0] == BOS
        assert len(set(source)) == len(source)
        assert set(targets) == set(range(end + 1, len(tokens)))
        for at, target in targets.items():
            assert source[source.index(tokens[at]) + step] == target


@pytest.mark.parametrize("name", TWINS)
def test_corrupt_prompts_move_the_answer(name: str) -> None:
    step, rng, moved = (1 if name == "trained-copy" else -1), Random(4), 0
    for _ in range(100):
        pair = TASKS[name].draw_pair(rng)
        assert len(pair.clean) == len(pair.corrupt)
        assert set(pair.clean) == set(pair.corrupt)
        places = []
        for tokens, answer in ((pair.clean, pair.answer), (pair.corrupt, pair.corrupt_answer)):
            source = tokens[1 : tokens.index(END)]
            assert source[source.index(tokens[-1]) + step] == answer
            assert answer not in tokens[len(source) + 2 :]
            places.append(source.index(answer))
        assert pair.answer != pair.corrupt_answer
        moved += places[0] != places[1]
    assert moved == 100


def test_what_the_sorter_and_the_adder_learn() -> None:
    rng = Random(5)
    for _ in range(100):
        example = TASKS["trained-sorted"].draw(rng, 20)
        source = example.tokens[1 : example.tokens.index(END)]
        for at, target in example.targets.items():
            assert target == min(x for x in source if x > example.tokens[at])
        pair = TASKS["trained-sorted"].draw_pair(rng)
        assert pair.clean.index(pair.answer) != pair.corrupt.index(pair.corrupt_answer)
        for tokens, answer in ((pair.clean, pair.answer), (pair.corrupt, pair.corrupt_answer)):
            assert answer == min(x for x in tokens[1:-2] if x > tokens[-1])
        a, b, end = (example := TASKS["trained-addition"].draw(rng, MODULUS)).tokens
        assert end == END
        assert example.targets == {2: N_SPECIAL + (a + b - 2 * N_SPECIAL) % MODULUS}
        assert not unseen(a - N_SPECIAL, b - N_SPECIAL)
    n_unseen = sum(unseen(a, b) for a in range(MODULUS) for b in range(MODULUS))
    assert 40 < n_unseen < 66


# --- how they do it -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_true(name: str) -> None:
    """Measured again on other prompts, by the checks that a model must pass to be written."""
    card = json.loads((MODELS[name] / "card.json").read_text())
    found, mechanism = measure(name, shipped(name), seed=5)
    for key in ("holds", "fails", "effects"):
        assert found[key] == pytest.approx(card[key], abs=0.06)
    assert found["faithfulness"] == pytest.approx(card["faithfulness"], abs=0.03)
    assert found["mechanism"] == card["mechanism"]
    assert mechanism.edges == reference(name).edges
    assert dict(mechanism.roles) == dict(reference(name).roles)


def test_the_twins_differ_in_one_composition() -> None:
    for name, read in zip(TWINS, "kv", strict=True):
        known = reference(name)
        (before,) = known.roles["previous token"]
        inputs = {edge[-2] for edge in known.edges if edge.startswith(f"{before}->")}
        assert inputs == {read}


@pytest.mark.parametrize("name", TWINS)
def test_queries_and_keys_are_needed(name: str) -> None:
    """Where the answer stands at one place in both prompts they are not: these move it."""
    edges = reference(name).edges
    fewer = [edge for edge in edges if not edge.endswith(("<q>", "<k>"))]
    assert lab(name).faithfulness(edges) > 0.85
    assert lab(name).faithfulness(fewer) < 0.5


@pytest.mark.parametrize(("name", "read"), [*zip(TWINS, "kv", strict=True)])
def test_acdc_finds_the_composition(name: str, read: str) -> None:
    experiment = Experiment(*engine(name), get_metric("logit_diff"))
    tau = 0.1 * abs(experiment.plain("clean") - experiment.plain("corrupt"))
    found = sweep(experiment, [tau])[0][tau].edges()
    (before,) = reference(name).roles["previous token"]
    inputs = {edge[-2] for edge in found if edge.startswith(f"{before}->a1.")}
    assert inputs == {read}


@pytest.mark.parametrize(("name", "read"), [*zip(TWINS, "KV", strict=True)])
def test_heads_names_the_composition(name: str, read: str) -> None:
    experiment, known = Experiment(*engine(name), get_metric("logit_diff")), reference(name)
    (before,), readers = known.roles["previous token"], list(known.roles.values())[1]
    explained = {one.head: one for one in explain_heads(known.circuit, experiment)}
    for head in readers:
        strongest = explained[head].composition[0]
        assert (strongest.kind, strongest.sender) == (read, before)
        assert strongest.share > 0.6


@pytest.mark.parametrize("name", TWINS)
def test_another_mechanism_is_refused(name: str) -> None:
    """What a twin does is not what the other one's description says."""
    other = TWINS[1 - TWINS.index(name)]
    with pytest.raises(RuntimeError, match=f"{name} does not do what is described: .*accuracy"):
        measure(name, shipped(other))


# --- training -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_are_the_same_each_time(name: str) -> None:
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    runs = [list(train(name, build_model(name), n_steps=3)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 3
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.slow
def test_training_gives_the_shipped_model() -> None:
    """Another machine may round otherwise: what it says must be the same."""
    model = build_model("trained-copy")
    losses = list(train("trained-copy", model))
    assert losses[-1] < 0.05
    card, _ = measure("trained-copy", model)
    assert card["accuracy"] > 0.98


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(9, 12, n_layers=1, n_heads=2, d_model=16, d_head=8, d_mlp=24, causal=False),
        Sizes(9, 12, n_layers=3, n_heads=1, d_model=16, d_head=8, rotary=True),
    ],
)
def test_sizes_go_through_a_configuration(sizes: Sizes) -> None:
    assert Sizes.of_fields(sizes.bridge_fields()) == sizes
    model = Transformer.drawn(sizes, seed=0)
    tokens = torch.randint(0, 9, (4, 7), generator=torch.Generator().manual_seed(0))
    trace = model.run(tokens)
    torch.testing.assert_close(trace.logits, model.logits(tokens))
    for pattern in trace.patterns.values():
        torch.testing.assert_close(pattern.sum(-1), torch.ones(4, 7))
        assert bool((pattern.triu(1) > 0).any()) != sizes.causal
    again = model.run(tokens, None, {"a0.h0": trace.patterns["a0.h0"]})
    torch.testing.assert_close(again.logits, trace.logits)


def test_an_unknown_model_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["trained", "trained-cpoy"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "unknown model 'trained-cpoy': expected any of trained-copy" in capsys.readouterr().err
