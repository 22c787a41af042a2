"""Planted circuits: the algorithms, the losses that plant them, and the models that are shipped."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.measure.evaluation import Evaluator
from acdc.models import load_model
from acdc.tasks import load_task
from acdc.tasks.words import NAMES
from benchmarks.planted import card as measured
from benchmarks.planted.algorithms import (
    DOCSTRING,
    INPUT,
    IOI,
    IOI_BACKUP,
    LOGITS,
    NONE,
    SMOOTHING,
)
from benchmarks.planted.by_hand import write_backup
from benchmarks.planted.model import Config, PatchableTransformer
from benchmarks.planted.prompts import DRAWS, Prompts, draw_pairs
from benchmarks.planted.siit import (
    Alignment,
    Plan,
    Probes,
    circuit_losses,
    divergence,
    draw_plan,
    losses,
)
from benchmarks.planted.train import FOLDER, RECIPES, Phase, build_model, main, train_phase
from benchmarks.shortcuts.train import is_held_out
from graphs import component_graph
from graphs.graph import shape_from_config

A, B, C, D, E, F, OTHER, V = 0, 1, 2, 3, 4, 5, 6, 7
SMALL = Config(n_layers=3, n_heads=2, d_model=8, d_head=4, d_mlp=16, n_ctx=6, d_vocab=V)
PLACES = torch.tensor([[0, 1, 2]] * 4)
SMALL_NODES = {"duplicate token": "a0.h1", "S-inhibition": "a1.h0", "name mover": "a2.h1"}


def favourites(logprobs):
    """Tokens that a row of log probabilities makes most likely."""
    return [
        set(torch.nonzero(row > row.max() - 1e-6)[:, 0].tolist()) for row in logprobs
    ]  # fmt: skip


# Algorithms


def test_ioi_names_the_one_who_is_not_repeated():
    names = torch.tensor([[A, B, A], [A, B, B], [A, B, C]])
    values = IOI.run(names, V)
    assert values["duplicate token"].tolist() == [0, 1, NONE]
    assert favourites(values[LOGITS]) == [{B}, {A}, {A, B}]
    assert torch.allclose(values[LOGITS].exp().sum(-1), torch.ones(3, dtype=torch.float64))
    assert values[LOGITS][0, B].exp().item() == pytest.approx(1 - SMOOTHING + SMOOTHING / V)


@pytest.mark.parametrize(
    ("edge", "expected"),
    [
        ((INPUT, "duplicate token"), {A}),  # the source repeats its second name
        (("duplicate token", "S-inhibition"), {A}),
        (("S-inhibition", "name mover"), {A}),
        ((INPUT, "name mover"), {D}),  # the source's names, the base's position
        (("name mover", LOGITS), {C}),
    ],
)
def test_an_ioi_edge_carries_the_value_of_the_source(edge, expected):
    base, source = torch.tensor([[A, B, A]]), torch.tensor([[C, D, D]])
    values = IOI.run(base, V, source, {edge: torch.tensor([True])})
    assert favourites(values[LOGITS]) == [expected]
    untouched = IOI.run(base, V, source, {edge: torch.tensor([False])})
    assert favourites(untouched[LOGITS]) == [{B}]


def test_the_backup_speaks_where_the_name_mover_does_not():
    names = torch.tensor([[A, B, A], [A, B, C]])
    values = IOI_BACKUP.run(names, V)
    assert values["name mover"].sum(-1).tolist() == [1, 0]
    assert values["backup name mover"].sum(-1).tolist() == [0, 0]
    assert favourites(values[LOGITS]) == [{B}, set(range(V))]
    base, source = torch.tensor([[A, B, A]]), torch.tensor([[C, D, E]])
    patched = dict.fromkeys(IOI_BACKUP.leaving("name mover"), torch.tensor([True]))
    assert favourites(IOI_BACKUP.run(base, V, source, patched)[LOGITS]) == [{B}]
    for edge, expected in [
        (("name mover", LOGITS), set(range(V))),  # the backup has seen the mover write
        (("name mover", "backup name mover"), {B}),
        (("backup name mover", LOGITS), {B}),
        ((INPUT, "name mover"), {D, C}),
    ]:
        one = IOI_BACKUP.run(base, V, source, {edge: torch.tensor([True])})
        assert favourites(one[LOGITS])[0] <= expected
    both = patched | {("backup name mover", LOGITS): torch.tensor([True])}
    assert favourites(IOI_BACKUP.run(base, V, source, both)[LOGITS]) == [set(range(V))]


def test_docstring_names_the_argument_after_the_documented_one():
    names = torch.tensor([[A, B, C, D, A, B], [A, B, C, D, E, A], [A, B, C, D, E, F]])
    values = DOCSTRING.run(names, V)
    assert values["previous argument"][0].tolist() == [NONE, A, B, C]
    assert values["induction"].tolist() == [2, 1, NONE]
    assert favourites(values[LOGITS]) == [{C}, {B}, {A, B, C, D}]


@pytest.mark.parametrize(
    ("edge", "expected"),
    [
        ((INPUT, "previous argument"), {B}),  # in the source, B is the predecessor of slot 1
        ((INPUT, "documented argument"), {D}),  # the source documents C last
        ((INPUT, "argument mover"), {E}),
        (("induction", "argument mover"), {A}),
    ],
)
def test_a_docstring_edge_carries_the_value_of_the_source(edge, expected):
    base = torch.tensor([[A, B, C, D, A, B]])
    source = torch.tensor([[B, C, E, A, B, C]])
    source_slot = DOCSTRING.run(source, V)["induction"].item()
    assert source_slot == 2
    if edge == ("induction", "argument mover"):
        source, expected = torch.tensor([[E, A, C, B, F, E]]), {B}  # slot 1
    values = DOCSTRING.run(base, V, source, {edge: torch.tensor([True])})
    assert favourites(values[LOGITS]) == [expected]


def test_an_intervention_that_cannot_be_is_refused():
    names = torch.tensor([[A, B, A]])
    with pytest.raises(ValueError, match="no source prompt"):
        IOI.run(names, V, None, {IOI.edges[0]: torch.tensor([True])})
    with pytest.raises(ValueError, match="ioi has no edge"):
        IOI.run(names, V, names, {(INPUT, LOGITS): torch.tensor([True])})


@pytest.mark.parametrize("name", RECIPES)
def test_the_algorithm_answers_the_built_in_task(name):
    recipe = RECIPES[name]
    _, tokenizer = load_model(recipe.bundled)
    task = load_task(recipe.task, tokenizer, n_prompts=16)
    for pair in task.pairs:
        names = _names(recipe.task, pair.clean, pair.answers + pair.wrong_answers)
        logprobs = recipe.algorithm.run(names, 300)[LOGITS]
        assert favourites(logprobs) == [set(pair.answers)]
        foreign = _names(recipe.task, pair.corrupt, set(pair.corrupt) - set(pair.clean))
        assert recipe.algorithm.run(foreign, 300)[LOGITS].exp().max() < 0.5  # nothing fits


def _names(task, prompt, candidates):
    found = [token for token in prompt if token in candidates]
    assert len(found) == (3 if task == "ioi" else 6)
    return torch.tensor([found])


# The transformer


@pytest.fixture(scope="module")
def small():
    """A random model, two runs of it and which edges are the algorithm's."""
    model = PatchableTransformer(SMALL)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.3 * noise
    base, source = (torch.randint(0, V, (4, 6), generator=generator) for _ in range(2))
    return model, base, source, torch.tensor([5, 4, 5, 3])


def test_nothing_and_everything_patched(small):
    model, base, source, last = small
    plain, other = model(base, last), model(source, last)
    none = torch.zeros(4, model.graph.n_edges, dtype=torch.bool)
    assert torch.allclose(model(base, last, other, none).logits, plain.logits, atol=1e-5)
    assert torch.allclose(model(base, last, other, ~none).logits, other.logits, atol=1e-5)
    assert not torch.allclose(plain.logits, other.logits, atol=1e-1)


def test_nodes_that_nothing_hears_need_not_be_computed(small):
    model, base, source, last = small
    other = model(source, last)
    generator = torch.Generator().manual_seed(2)
    patched = torch.rand(4, model.graph.n_edges, generator=generator) < 0.5
    computed = {"a0.h1", "a2.h0"}
    for edge, sender in enumerate(model.graph.edge_sender):
        patched[:, edge] |= model.graph.senders[sender] not in {*computed, "input"}
    full = model(base, last, other, patched).logits
    quick = model(base, last, other, patched, computed).logits
    assert torch.allclose(quick, full, atol=1e-5)


def test_the_seed_owns_the_initial_weights():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    one, two, three = (PatchableTransformer(SMALL, seed).embed.W_E for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert torch.equal(torch.randn(3), expected)


# The losses


def test_divergence_by_hand():
    target = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).clamp_min(1e-12).log()
    logits = torch.log(torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    expected = [0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), math.log(2)]
    assert divergence(target, logits).tolist() == pytest.approx(expected, abs=1e-5)


def _silent(bias):
    """A model that says ``bias`` whatever it reads."""
    model = PatchableTransformer(SMALL)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.unembed.b_U.data = torch.log(torch.tensor(bias))
    return model, Alignment(IOI, SMALL_NODES, model.graph)


def test_each_loss_on_a_case_by_hand():
    model, alignment = _silent([1 / V] * V)
    tokens, last = torch.zeros(2, 3, dtype=torch.long), torch.tensor([2, 2])
    base = Prompts(tokens, last, torch.tensor([[A, B, A], [A, B, C]]), PLACES[:2])
    source = Prompts(tokens, last, torch.tensor([[C, D, E], [C, D, D]]), PLACES[:2])
    inside = {edge: torch.tensor([False, False]) for edge in alignment.edges}
    inside["S-inhibition", "name mover"][0] = True  # of row 0: the source inhibits neither
    plan = Plan(inside, torch.zeros(2, model.graph.n_edges, dtype=torch.bool))

    def from_uniform(n_names):  # KL(answer of n names alike || uniform)
        each = (1 - SMOOTHING) / n_names + SMOOTHING / V
        rest = SMOOTHING / V
        return n_names * each * math.log(each * V) + (V - n_names) * rest * math.log(rest * V)

    found = losses(model, alignment, base, source, plan)
    # undisturbed: one name (A B A), two names (A B C, C D E), one (C D D)
    behaviour = (2 * from_uniform(1) + 2 * from_uniform(2)) / 4
    assert found.behaviour.item() == pytest.approx(behaviour, abs=1e-5)
    assert found.interchange.item() == pytest.approx(from_uniform(2), abs=1e-5)
    assert found.strictness.item() == pytest.approx(from_uniform(2), abs=1e-5)
    one = replace(base, names=torch.tensor([[A, B, A], [A, B, B]]))
    assert losses(model, alignment, one, source, plan).strictness.item() == pytest.approx(
        from_uniform(1), abs=1e-5
    )
    total = behaviour + 2 * from_uniform(2)
    assert found.total.item() == pytest.approx(total, abs=1e-5)


def test_a_model_that_answers_right_by_a_wrong_path_is_not_strict(small):
    """What the losses are for: patching outside edges must show in strictness alone."""
    model, base, source, last = small
    alignment = Alignment(IOI, SMALL_NODES, model.graph)
    names = torch.tensor([[A, B, A]] * 4)
    pair = Prompts(base, last, names, PLACES), Prompts(source, last, names, PLACES)
    inside = {edge: torch.zeros(4, dtype=torch.bool) for edge in alignment.edges}
    nothing = Plan(inside, torch.zeros(4, model.graph.n_edges, dtype=torch.bool))
    outside = Plan(inside, alignment.outside.expand(4, -1))
    calm, patched = (losses(model, alignment, *pair, plan) for plan in (nothing, outside))
    assert torch.allclose(calm.behaviour, patched.behaviour)
    other = model(source, last)
    run = model(base, last, other, outside.patched).logits
    expected = divergence(IOI.run(names, V)[LOGITS].float(), run).mean()
    assert torch.allclose(patched.strictness, expected, atol=1e-5)
    assert (patched.strictness - calm.strictness).abs() > 1e-3


def test_the_circuit_alone_has_the_losses_of_the_whole_model(small):
    model, base, source, last = small
    alignment = Alignment(IOI, SMALL_NODES, model.graph)
    names = torch.tensor([[A, B, A], [A, B, B], [A, B, C], [B, A, B]])
    pair = Prompts(base, last, names, PLACES), Prompts(source, last, names.flip(0), PLACES)
    plan = draw_plan(alignment, Random(0), 4, alone=True)
    whole, alone = (f(model, alignment, *pair, plan) for f in (losses, circuit_losses))
    assert torch.allclose(whole.interchange, alone.interchange, atol=1e-5)
    assert torch.allclose(whole.strictness, alone.strictness, atol=1e-5)
    assert alone.behaviour == 0
    alone.total.backward()
    gradient = model.blocks[0].attn.W_V.grad  # (head, d_model, d_head)
    assert gradient[1].abs().sum() > 0
    assert gradient[0].abs().sum() == 0  # a0.h0 is outside
    model.zero_grad()


def test_probes_read_the_values_at_their_places(small):
    model, base, _, last = small
    alignment = Alignment(IOI, SMALL_NODES, model.graph)
    names = torch.tensor([[A, B, A], [A, B, B], [A, B, C], [B, A, B]])
    prompts = Prompts(base, last, names, PLACES)
    run, values = model(base, last), IOI.run(names, V)
    probes = Probes(alignment, SMALL.d_model, V)
    assert set(probes.maps) == {"duplicate token", "S-inhibition"}  # the mover has the logits
    assert probes(run, prompts, values).item() == pytest.approx(math.log(V + 1))  # all weights 0
    with torch.no_grad():
        weight = probes.maps["duplicate token"]
        weight[:] = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        written = run.sender("a0.h1")[:, 2]  # where the third name stands
        read = torch.nn.functional.layer_norm(written, written.shape[-1:]) @ weight
        classes = torch.tensor([1, 2, 0, 1])  # NONE is class 0
        expected = torch.nn.functional.cross_entropy(read, classes)
        found = probes(run, prompts, values)
    assert found.item() == pytest.approx((expected.item() + math.log(V + 1)) / 2, abs=1e-5)


def test_what_a_plan_patches(small):
    model, *_ = small
    alignment = Alignment(IOI, SMALL_NODES, model.graph)
    n = 400
    plan = draw_plan(alignment, Random(0), n)
    assert plan.interchange.tolist() == [True] * (n // 2) + [False] * (n // 2)
    strict = plan.patched[n // 2 :]
    assert not (strict & ~alignment.outside).any()
    assert strict.any(1).float().mean() > 0.9
    assert (strict == alignment.outside).all(1).float().mean() > 0.3
    for edge, mask in alignment.edges.items():
        rows = plan.inside[edge]
        assert 0 < rows.sum() < n // 2
        assert torch.equal((plan.patched & mask).any(1), rows)
        assert (plan.patched[rows][:, mask]).all()
    alone = draw_plan(alignment, Random(0), n, alone=True)
    assert (alone.patched[:, alignment.outside]).all()


def test_pairs_inside_and_outside_are_all_pairs(small):
    model, *_ = small
    alignment = Alignment(IOI, SMALL_NODES, model.graph)
    assert alignment.pairs == (
        "input->a0.h1", "a0.h1->a1.h0", "input->a2.h1", "a1.h0->a2.h1", "a2.h1->logits",
    )  # fmt: skip
    masks = torch.stack([*alignment.edges.values(), *alignment.outside_pairs.values()])
    assert (masks.sum(0) == 1).all()
    assert alignment.edges[INPUT, "name mover"].sum() == 3  # q, k and v
    assert alignment.edges["name mover", LOGITS].sum() == 1


# Prompts


@pytest.mark.parametrize("name", RECIPES)
def test_training_never_sees_what_is_held_out(name):
    recipe = RECIPES[name]
    _, tokenizer = load_model(recipe.bundled)
    vocabulary = tokenizer.get_vocab()
    words = {number: word for word, number in vocabulary.items()}

    def combinations(held_out):
        base, source = draw_pairs(
            DRAWS[recipe.algorithm.name], vocabulary, Random(0), 200, held_out=held_out
        )
        assert base.tokens.shape == source.tokens.shape
        assert torch.equal(base.last, source.last)
        for prompts in (base, source):
            assert torch.equal(prompts.tokens.gather(1, prompts.places), prompts.names)
            for row in prompts.names.tolist():
                yield [words[number] for number in row]

    for row in combinations(held_out=False):
        pairs = [row[:2]] if recipe.task == "ioi" else [row[:2], row[1:3], row[2:4]]
        assert not any(is_held_out(*pair) for pair in pairs)
    for row in combinations(held_out=True):
        pairs = [row[:2]] if recipe.task == "ioi" else [row[:2], row[1:3], row[2:4]]
        assert any(is_held_out(*pair) for pair in pairs)


# Training


def test_a_few_steps_are_the_same_each_time():
    recipe = replace(
        RECIPES["planted-ioi"],
        phases=(Phase(2, 8, 1e-3, alone=True), Phase(2, 8, 1e-3, alone=False)),
    )
    _, tokenizer = load_model(recipe.bundled)
    vocabulary = tokenizer.get_vocab()
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    runs = []
    for _ in range(2):
        model, alignment = build_model(recipe, len(vocabulary))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        found = [
            [value.item() for value in vars(step).values()]
            for number in range(2)
            for step in train_phase(recipe, number, model, alignment, vocabulary)
        ]
        assert any(not torch.equal(before[key], new) for key, new in model.state_dict().items())
        runs.append(found)
    assert runs[0] == runs[1]
    assert runs[0][0][0] == pytest.approx(math.log(len(vocabulary) + 1), abs=1e-3)  # of the probes
    assert torch.equal(torch.randn(3), expected)


def test_an_unknown_model_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train", "planted-iou"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "planted-iou" in capsys.readouterr().err


# The models that are shipped


@cache
def shipped(name):
    """Model, alignment, tokenizer, card and reference of a folder, and the engine's own model."""
    folder, recipe = FOLDER / name, RECIPES[name]
    lowered, tokenizer = load_model(str(folder))
    model, alignment = build_model(recipe, lowered.d_vocab)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    card, reference = (
        json.loads((folder / file).read_text()) for file in ("card.json", "reference.json")
    )
    return model, alignment, tokenizer, card, reference, lowered


@pytest.mark.parametrize("name", RECIPES)
def test_the_engine_measures_what_the_training_measures(name):
    model, alignment, tokenizer, *_, lowered = shipped(name)
    task = load_task(RECIPES[name].task, tokenizer, n_prompts=8)
    evaluator = Evaluator(Experiment(lowered, task, get_metric("logit_diff")))
    effects = measured._Effects(model, task)
    with torch.no_grad():
        assert effects.full == pytest.approx(evaluator.full, abs=1e-3)
        assert effects.gap == pytest.approx(evaluator.full - evaluator.empty, abs=1e-3)
        kept = np.random.default_rng(0).random(alignment.graph.n_edges) < 0.7
        change = effects.effect(torch.from_numpy(~kept))["logit_diff"] * effects.gap
        expected = abs(evaluator.evaluate(kept).metric_circuit - evaluator.full)
        assert change == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_the_card_of_a_shipped_model_is_true(name):
    model, alignment, tokenizer, card, *_ = shipped(name)
    held_out = model, alignment, DRAWS[RECIPES[name].algorithm.name], tokenizer.get_vocab()
    behaviour = measured.behaviour(*held_out, card["n_held_out"], card["seed_held_out"])
    assert behaviour["accuracy"] >= 0.98
    assert behaviour == pytest.approx(card["behaviour"], abs=3e-3)
    found = measured.interchange(*held_out, 128, 5)  # other prompts, and fewer
    hidden = {alignment.node(variable) for variable in alignment.algorithm.hidden_by}
    quiet = {name for name in found if set(name.split("->")) & hidden}  # alone it says nothing
    assert list(found) == list(card["interchange"])
    for intervention, scores in found.items():
        stated = card["interchange"][intervention]
        assert stated["accuracy"] >= 0.95, intervention
        assert scores["accuracy"] == pytest.approx(stated["accuracy"], abs=0.05), intervention
        assert scores["kl"] == pytest.approx(stated["kl"], rel=0.5), intervention
        if intervention not in quiet:
            assert stated["changed"] > 0.25, intervention  # the intervention says something


@pytest.mark.parametrize("name", RECIPES)
def test_the_strictness_of_a_shipped_model_is_true(name):
    model, alignment, tokenizer, card, *_ = shipped(name)
    stated = card["strictness"]
    effects = measured._Effects(model, load_task(RECIPES[name].task, tokenizer, n_prompts=64))
    with torch.no_grad():
        assert effects.gap == pytest.approx(stated["logit_diff_gap"], rel=1e-3)
        everything = effects.effect(alignment.outside)
        worst = stated["nodes_one_by_one"]["kl"]["worst"]
        single = effects.effect(alignment.leaving(worst))
    assert everything == pytest.approx(stated["all_edges"], rel=1e-2, abs=1e-4)
    assert single["kl"] == pytest.approx(stated["nodes_one_by_one"]["kl"]["max"], rel=1e-2)
    assert stated["all_edges"]["logit_diff"] < 0.05
    assert stated["nodes_one_by_one"]["logit_diff"]["max"] < 0.02
    pairs = alignment.algorithm.hidden_by.items()
    replaced = {alignment.node(variable) for pair in pairs for variable in pair}
    for nodes, effect in stated["planted_one_by_one"].items():
        if nodes in replaced:  # one of two: the other one is there
            assert effect["logit_diff"] < 0.05
        else:
            assert effect["logit_diff"] > 0.5


@pytest.mark.parametrize("name", RECIPES)
def test_the_reference_of_a_shipped_model_is_in_its_graph(name):
    _, alignment, _, card, reference, lowered = shipped(name)
    assert reference["granularity"] == "node pairs"
    assert component_graph(shape_from_config(reference["graph"])).shape == lowered.shape
    graph = alignment.graph
    ends = zip(graph.edge_sender, graph.edge_receiver, strict=True)
    pairs = {f"{graph.senders[u]}->{graph.receiver_node(v)}" for u, v in ends}
    assert set(reference["edges"]) <= pairs
    assert reference["edges"] == list(alignment.pairs)
    planted = {node for nodes in reference["roles"].values() for node in nodes}
    assert planted == set(alignment.nodes.values())
    assert card["name"] == reference["name"] == name


@pytest.mark.parametrize("name", RECIPES)
def test_the_stored_prompts_are_those_of_the_task(name):
    *_, tokenizer, _, _, lowered = shipped(name)
    stored = load_task(str(FOLDER / name / "pairs.jsonl"), tokenizer, d_vocab=lowered.d_vocab)
    assert stored.pairs == load_task(RECIPES[name].task, tokenizer, n_prompts=64).pairs


def test_writing_again_gives_the_stored_weights():
    *_, tokenizer, card, _, lowered = shipped("planted-ioi-backup")
    recipe = RECIPES["planted-ioi-backup"]
    model, _ = build_model(recipe, lowered.d_vocab)
    vocabulary = tokenizer.get_vocab()
    write_backup(model, recipe.nodes, [vocabulary[name] for name in NAMES], recipe.seed)
    stored = load_file(FOLDER / "planted-ioi-backup" / "model.safetensors")
    assert model.state_dict().keys() == stored.keys()
    for key, weight in model.state_dict().items():
        assert torch.allclose(weight, stored[key], atol=1e-5), key
    assert card["training"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name].phases])
def test_training_again_gives_the_stored_losses(name):
    *_, tokenizer, card, _, lowered = shipped(name)
    model, alignment = build_model(RECIPES[name], lowered.d_vocab)
    columns = np.zeros(3)
    steps = train_phase(RECIPES[name], 0, model, alignment, tokenizer.get_vocab())
    for _, step in zip(range(100), steps, strict=False):
        columns += [value.item() / 100 for value in vars(step).values()]
    stated = card["training"]["phases"][0]["losses"][0]
    assert stated[0] == 100
    assert columns.tolist() == pytest.approx(stated[1:], abs=0.02)
