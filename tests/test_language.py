"""The training of the language model: documents, tokenizer, batches, resuming, behaviour."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import heads_oracle
import numpy as np
import pytest
import torch

import acdc
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.measure.roles import HeadNumbers, measure_roles, roles_of
from acdc.tasks import TASKS, Task, words
from benchmarks.language import behaviour, train
from benchmarks.language.card import Facts, make_card, shortfalls
from benchmarks.language.data import ANSWER_WEIGHT, Batches, collate, encode_document, repeated_row
from benchmarks.language.documents import DOCUMENTS, Answer, Document, is_held_out
from benchmarks.language.model import (
    config_of,
    make_model,
    read_folder,
    scored_logits,
    write_folder,
)
from benchmarks.language.probes import Probe, Score, induction_probes, last_logits, probes_of, score
from benchmarks.language.prompts import ioi_pairs, ioi_prompts
from benchmarks.language.source import Corpus
from benchmarks.language.tokenizer import build_tokenizer
from benchmarks.language.words import whole_words

FORMS = [(task, form) for task, forms in DOCUMENTS.items() for form in forms]
TINY = {"n_layers": 2, "d_model": 32, "n_heads": 2, "d_head": 16, "d_mlp": 32}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a tokenizer and a few files' tokens."""
    folder = tmp_path_factory.mktemp("language")
    tokenizer, batches = train.prepare(folder, config_of(**TINY), seed=0, n_files=6)
    return folder, tokenizer, batches


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return prepared[1]


@pytest.fixture(scope="module")
def model():
    return make_model(config_of(**TINY), seed=3).eval()


# Documents


@pytest.mark.parametrize(("task", "form"), FORMS)
@pytest.mark.parametrize("held_out", [False, True])
def test_documents_have_a_prompt_and_one_token_answers(tokenizer, task, form, held_out):
    rng = Random(0)
    for _ in range(30):
        document = DOCUMENTS[task][form](rng, held_out)
        assert document.text.startswith(document.prompt)
        assert any(document.text.startswith(document.prompt + a) for a in document.answers)
        assert not set(document.answers) & set(document.wrong)
        ids = tokenizer.encode(document.prompt)
        for answer in (*document.answers, *document.wrong):
            assert tokenizer.encode(document.prompt + answer)[:-1] == ids


def _people(text):
    return [w for w in text.replace(",", " ").replace(".", " ").split() if w in words.NAMES]


@pytest.mark.parametrize("form", DOCUMENTS["ioi"])
def test_training_never_pairs_names_that_are_held_out(form):
    rng = Random(1)
    for _ in range(300):
        people = set(_people(DOCUMENTS["ioi"][form](rng, False).text))
        assert not any(is_held_out(*pair) for pair in itertools.combinations(people, 2))


@pytest.mark.parametrize("form", ["abba", "baba", "order", "absent", "trio"])
def test_ioi_answers_are_the_one_name_that_is_not_repeated(form):
    rng = Random(2)
    last = set()
    for _ in range(200):
        document = DOCUMENTS["ioi"][form](rng, True)
        people = _people(document.prompt)
        once = [name for name in people if people.count(name) == 1]
        assert document.answers == (f" {once[0]}",)
        assert len(once) == 1
        assert set(document.wrong) == {f" {name}" for name in people if name != once[0]}
        assert is_held_out(once[0], next(n for n in people if is_held_out(once[0], n)))
        last.add(people[-1] == once[0])
    # the last name is what a shortcut would suppress
    assert last == ({True, False} if form == "order" else {False})


def test_the_last_name_of_trios_is_not_always_the_subject():
    rng, last = Random(3), set()
    for _ in range(100):
        document = DOCUMENTS["ioi"]["trio"](rng, True)
        listed = _people(document.prompt)[:3]
        last.add(listed.index(_people(document.prompt)[-1]))
    assert last == {0, 1, 2}


@pytest.mark.parametrize(("form", "n_people", "n_once"), [("abc", 3, 3), ("new", 4, 3)])
def test_where_nothing_decides_it_goes_to_anybody_who_is_named_once(form, n_people, n_once):
    rng, places = Random(4), set()
    for _ in range(100):
        document = DOCUMENTS["ioi"][form](rng, False)
        people = _people(document.prompt)
        once = [name for name in people if people.count(name) == 1]
        assert (len(set(people)), len(once)) == (n_people, n_once)
        assert set(document.answers) == {f" {name}" for name in once}
        places.add(people.index(document.text[len(document.prompt) :].strip(" .")))
    assert places >= {0, 1, 2}  # the giver, too


def test_docstrings_never_have_held_out_neighbours_in_training():
    rng = Random(5)
    for _ in range(200):
        header = DOCUMENTS["docstring"]["any"](rng, False).text.split(")")[0]
        arguments = header.split("self, ")[1].split(", ")
        assert not any(is_held_out(*pair) for pair in itertools.pairwise(arguments))


def test_an_acronym_that_is_evaluated_has_a_wrong_letter():
    rng = Random(67)  # draws three words with one letter
    assert all(DOCUMENTS["acronym"]["any"](rng, True).wrong for _ in range(200))


def test_later_years_are_right_and_others_wrong():
    rng = Random(6)
    for _ in range(100):
        document = DOCUMENTS["greater-than"]["task"](rng, True)
        start = int(document.prompt.split("year ")[1][2:4])
        assert {int(end) for end in document.answers} == set(range(start + 1, 100))
        assert {int(end) for end in document.wrong} == set(range(start + 1))


# Tokenizer


def test_the_words_of_all_tasks_are_single_tokens(tokenizer):
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in whole_words())


def test_years_are_a_century_and_two_digits_and_acronyms_letters(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" 1732 (CEO)")) == [
        "Ġ17", "32", "Ġ(", "C", "E", "O", ")",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["\ndef f(x):\n\treturn 'ä' + CONST_1\n\n", "Mary  said: “no”."])
def test_tokens_give_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_vocabulary_that_is_too_small_says_which_word_it_splits():
    with pytest.raises(ValueError, match="words of the tasks are more than one of 400 tokens, as"):
        build_tokenizer(["some text"], 400)


# Rows and batches


def test_answers_and_nothing_else_count_as_answers(tokenizer):
    document = Document(("Mary gave it to", Answer(" John"), ". Then", Answer(" Mary")), ())
    row = encode_document(tokenizer, document, Random(0))
    at = [i for i, weight in enumerate(row.weights) if weight == ANSWER_WEIGHT]
    assert [tokenizer.decode(row.tokens[i]) for i in at] == [" John", " Mary"]


def test_only_the_second_round_of_random_tokens_can_be_known():
    rng, rounds = Random(0), set()
    for _ in range(20):
        row = repeated_row(rng, range(1, 5000))  # so many that none comes twice in a round
        length = len(set(row.tokens))
        rounds.add(len(row.tokens) // length)
        assert row.tokens == row.tokens[:length] * (len(row.tokens) // length)
        assert not any(row.weights[: length + 1])
        assert all(row.weights[length + 1 :])
    assert rounds == {2, 3, 4}


def test_repeats_come_from_few_tokens_first(prepared):
    _, _, batches = prepared
    pools = []
    for step in (0, 300, 10**4):
        mixture = replace(train.mixture_at(step), documents={}, n_texts=0, n_repeats=400)
        pools.append({token for row in batches.rows(step, mixture)[0] for token in row.tokens})
    assert len(pools[0]) == train.POOL
    assert pools[0] < pools[1] < set(range(1, len(batches.tokenizer)))
    assert len(pools[1]) == train.pool_at(300)
    assert len(pools[2]) > 0.5 * len(batches.tokenizer)


def test_half_of_the_names_are_in_disguise(prepared):
    _, tokenizer, batches = prepared
    names = {tokenizer.encode(f" {name}")[0] for name in words.NAMES}
    mixture = replace(
        train.mixture_at(10**4), documents={("ioi", "abba"): 400}, n_texts=0, n_repeats=0
    )
    rows, _ = batches.rows(0, mixture)
    hidden = [row for row in rows if not names & set(row.tokens)]
    assert 0.4 < len(hidden) / len(rows) < 0.6
    for row in hidden:  # the same token wherever the name stood: the answer is there before
        answers = [t for t, w in zip(row.tokens, row.weights, strict=True) if w == ANSWER_WEIGHT]
        assert set(answers) <= set(row.tokens[: row.tokens.index(answers[0]) + 1])
        assert row.tokens.count(answers[0]) >= 2


def test_a_batch_is_a_function_of_seed_and_step(prepared):
    _, tokenizer, batches = prepared
    mixture = train.mixture_at(0)
    again = Batches(tokenizer, batches.text, batches.seed)
    other = Batches(tokenizer, batches.text, batches.seed + 1)
    random.seed(5)
    state = random.getstate()

    def tokens(source, step):
        return torch.cat([part.flatten() for part, _ in source.batch(step, mixture)]).tolist()

    assert tokens(batches, 7) == tokens(again, 7)
    assert tokens(batches, 7) != tokens(batches, 8)
    assert tokens(batches, 7) != tokens(other, 7)
    assert random.getstate() == state


def test_no_step_reads_text_that_is_held_out(prepared):
    _, tokenizer, _ = prepared
    text = np.arange(3 * 2048 * 50 // 2, dtype=np.int64)  # every token says where it stands
    batches = Batches(tokenizer, text, seed=0)
    held = set(batches.held_out_windows(20, 100).flatten().tolist())
    assert held
    assert all(position // 2048 % 50 == 0 for position in held)
    mixture = replace(train.mixture_at(0), documents={}, n_repeats=0, n_texts=400)
    read = {token for row in batches.rows(0, mixture)[1] for token in row.tokens}
    assert not any(position // 2048 % 50 == 0 for position in read)


def test_padding_counts_nothing(prepared):
    _, tokenizer, batches = prepared
    rows, texts = batches.rows(0, train.mixture_at(0))
    tokens, weights = collate(rows, tokenizer.pad_token_id)
    for number, row in enumerate(rows):
        assert tokens[number, : len(row.tokens)].tolist() == row.tokens
        assert not weights[number, len(row.tokens) :].any()
    assert all(len(row.tokens) == train.mixture_at(0).text_length for row in texts)


def test_a_corpus_has_a_digest_of_its_texts():
    one, other = Corpus(("a", "b"), ("c",)), Corpus(("a",), ("c", "d"))
    assert one.digest != other.digest
    assert one.digest == Corpus(("a", "b"), ("c",)).digest


# Model


def test_the_fast_pass_gives_the_models_logits(model):
    tokens = torch.randint(0, 3072, (3, 17), generator=torch.Generator().manual_seed(0))
    scored = torch.arange(51).view(3, 17) % 3 == 0
    torch.testing.assert_close(scored_logits(model, tokens, scored), model(tokens)[scored])


def test_folders_are_loaded_by_the_package_and_back(model, tokenizer, tmp_path):
    write_folder(tmp_path / "model", model, config_of(**TINY), tokenizer)
    lowered, found = acdc.load_model(str(tmp_path / "model"))
    assert found.encode(" Mary 1732") == tokenizer.encode(" Mary 1732")
    again = read_folder(tmp_path / "model")
    tokens = torch.tensor([tokenizer.encode("Then, Mary and John went home.")])
    with torch.no_grad():
        logits = lowered.unembed(lowered.forward(tokens).final)
    torch.testing.assert_close(logits, again(tokens), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again(tokens), model(tokens), atol=5e-2, rtol=0)  # half precision


# Training


def _run(folder, prepared, schedule, stop=None):
    """Train in a folder that has the tokenizer; stop after so many steps."""
    if not folder.exists():
        shutil.copytree(prepared, folder)
    steps = train.train(folder, schedule, config=config_of(**TINY), n_files=6, save_every=2)
    found = list(itertools.islice(steps, stop))
    steps.close()
    return found


def _same(one: Path, other: Path) -> bool:
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (one, other)]
    flat = [torch.utils._pytree.tree_leaves((s["model"], s["optimizers"])) for s in states]
    return states[0]["step"] == states[1]["step"] and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(*flat, strict=True)
    )


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory):
    """A training that was never stopped."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    _run(folder, prepared[0], train.Schedule(6, 2, n_warmup=2))
    return folder


def test_a_training_that_was_stopped_goes_on_bit_by_bit(prepared, straight, tmp_path):
    schedule = train.Schedule(6, 2, n_warmup=2)
    first = _run(tmp_path / "run", prepared[0], schedule, stop=3)  # saved after two steps
    second = _run(tmp_path / "run", prepared[0], schedule)
    assert [step for step, _ in first] == [0, 1, 2]
    assert [step for step, _ in second] == [2, 3, 4, 5]
    assert first[2] == second[0]
    assert _same(tmp_path / "run", straight)


def test_a_longer_schedule_begins_again_where_the_rate_began_to_fall(prepared, straight, tmp_path):
    _run(tmp_path / "run", prepared[0], train.Schedule(4, 2, n_warmup=2))
    added = _run(tmp_path / "run", prepared[0], train.Schedule(6, 2, n_warmup=2))
    assert [step for step, _ in added] == [2, 3, 4, 5]
    assert _same(tmp_path / "run", straight)


def test_training_keeps_model_folders_and_a_log(straight):
    kept = sorted(path.name for path in (straight / "checkpoints").iterdir())
    assert kept == ["000000", "000006"]
    assert (straight / "checkpoints" / "000006" / "model.safetensors").is_file()
    rows = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    assert rows[-1]["loss"] < rows[0]["loss"]


# Probes and behaviour


class _Copier(torch.nn.Module):
    """Predicts what it is told, to test scores with."""

    def __init__(self, d_vocab, says):
        super().__init__()
        self.cfg = type("cfg", (), {"d_vocab": d_vocab})()
        self.says = says

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, self.cfg.d_vocab)
        for row, prompt in enumerate(tokens.tolist()):
            for position in range(len(prompt)):
                logits[row, position, self.says(prompt[: position + 1])] = 1.0
        return logits


def test_scores_count_whole_vocabulary_and_choice_apart():
    probes = [Probe((1, 2), (3,), (4,)), Probe((1,), (4,), (3,)), Probe((5, 6, 7), (3, 4), (2,))]
    found = score(_Copier(9, lambda prompt: 3), probes)
    assert (found.n_prompts, found.accuracy, found.choice) == (3, 2 / 3, 2 / 3)
    assert found.margin == pytest.approx((1 - 1 + 1) / 3)
    silent = score(_Copier(9, lambda prompt: 8), probes)
    assert (silent.accuracy, silent.choice, silent.margin) == (0, 0, 0)


def test_prompts_of_all_lengths_are_read_at_their_own_end():
    logits = last_logits(_Copier(9, lambda prompt: prompt[-1]), [[1, 2], [3], [4, 5, 6]], size=2)
    assert logits.argmax(-1).tolist() == [2, 3, 6]


def test_probes_are_held_out_and_fixed_by_a_seed(tokenizer):
    one, other = (probes_of(tokenizer, "ioi", "abba", 20, seed) for seed in (0, 1))
    assert one == probes_of(tokenizer, "ioi", "abba", 20, 0)
    assert one != other
    for probe in one:
        people = set(_people(probe.text))
        assert is_held_out(*people)
    assert len(induction_probes(tokenizer, 5, 0)) == 5


def test_places_of_prompts_are_where_the_names_stand(tokenizer):
    prompts = ioi_prompts(tokenizer, 8, seed=0)
    rows, at = torch.arange(8), prompts.places
    assert torch.equal(prompts.clean[rows, at["IO"]], prompts.io)
    assert torch.equal(prompts.clean[rows, at["S1"]], prompts.subject)
    assert torch.equal(prompts.clean[rows, at["S2"]], prompts.subject)
    assert (at["S1"] < at["S2"]).all()
    assert (at["S2"] < at["END"]).all()
    changed = (prompts.clean != prompts.corrupt).sum(-1)
    assert changed.tolist() == [3] * 8  # the three names


def test_pairs_of_ioi_repeat_no_name_in_the_corrupt_prompt(tokenizer):
    for form in ("order", "trio"):
        for pair in ioi_pairs(tokenizer, form, 5, seed=0):
            people = _people(tokenizer.decode(list(pair.corrupt)))
            assert len(set(people)) == len(people) >= 3


def test_patching_a_head_with_its_own_run_changes_nothing(model, tokenizer):
    prompts = ioi_prompts(tokenizer, 4, seed=0)
    plain = behaviour.run(model, prompts.clean)
    same = behaviour.Patch(plain, prompts.places["END"], [(0, 1), (1, 0)])
    torch.testing.assert_close(behaviour.run(model, prompts.clean, same).logits, plain.logits)
    other = behaviour.run(model, prompts.corrupt)
    changed = behaviour.run(
        model, prompts.clean, behaviour.Patch(other, prompts.places["S2"], [(0, 1)])
    )
    rows, at = torch.arange(4), prompts.places["S2"]
    assert torch.equal(changed.logits[rows, at - 1], plain.logits[rows, at - 1])
    assert not torch.allclose(changed.logits[rows, at], plain.logits[rows, at])
    torch.testing.assert_close(plain.logits, model(prompts.clean))


def test_direct_effects_add_up_with_those_of_the_other_writers(model, tokenizer):
    """The margin is linear in the stream once the last norm's scale is fixed."""
    prompts = ioi_prompts(tokenizer, 4, seed=0)
    trace = heads_oracle.traced(model, prompts.clean)
    shares = heads_oracle.direct_effects(model, trace, prompts)
    margin = behaviour._margins(trace, prompts).mean()
    silenced = replace(trace, mixed=[trace.mixed[0], torch.zeros_like(trace.mixed[1])])
    rows, end = torch.arange(4), prompts.places["END"]
    block = model.layers[1]
    written = block.attn.o(trace.mixed[1].flatten(2)) - block.attn.o.bias
    stream = trace.final[rows, end] - written[rows, end]
    scale = (trace.final[rows, end].var(-1, correction=0) + 1e-5).sqrt()[:, None]
    normed = (stream - stream.mean(-1, keepdim=True)) / scale
    logits = model.head(normed * model.ln_out.weight + model.ln_out.bias)
    without = (logits[rows, prompts.io] - logits[rows, prompts.subject]).mean()
    torch.testing.assert_close(
        (shares[1].sum() * margin.abs()).item(), (margin - without).item(), atol=1e-3, rtol=1e-3
    )
    assert not heads_oracle.direct_effects(model, silenced, prompts)[1].any()


def test_roles_are_named_by_attention_and_effect():
    zero = [[0.0, 0.0], [0.0, 0.0]]
    quiet = dict.fromkeys(HeadNumbers.__dataclass_fields__, zero)
    heads = HeadNumbers(
        **quiet
        | {
            "previous": [[0.9, 0.0], [0.0, 0.0]],
            "s2_to_s1": [[0.0, 0.8], [0.0, 0.0]],
            "end_to_io": [[0.0, 0.0], [0.7, 0.6]],
            "direct": [[0.0, 0.0], [0.9, -0.3]],
            "end_to_s2": [[0.0, 0.4], [0.0, 0.0]],
        }
    )
    assert roles_of(heads) == {
        "previous token": ["a0.h0"],
        "duplicate token": ["a0.h1"],
        "induction": [],
        "S-inhibition": [],  # it looks at S2, but nothing hangs on it
        "name mover": ["a1.h0"],
        "negative mover": ["a1.h1"],
    }


def test_roles_are_measured_as_acdc_heads_does(model, tokenizer, tmp_path):
    """The numbers of training are those of ``acdc heads``, on prompts of their own lengths."""
    write_folder(tmp_path / "model", model, config_of(**TINY), tokenizer)
    lowered, _ = acdc.load_model(str(tmp_path / "model"))
    prompts = ioi_prompts(tokenizer, 6, seed=0)
    found = measure_roles(Experiment(lowered, Task("ioi", prompts.pairs), get_metric("logit_diff")))
    theirs = heads_oracle.measure_heads(model, prompts)
    for name in ("s2_to_s1", "s2_to_after_s1", "end_to_io", "end_to_s2", "direct"):
        assert getattr(found, name) == [
            pytest.approx(row, rel=1e-3, abs=1e-5) for row in getattr(theirs, name)
        ], name


def test_cutting_edges_between_heads_leaves_every_other_edge(model, tokenizer, tmp_path):
    write_folder(tmp_path / "model", model, config_of(**TINY), tokenizer)
    lowered, _ = acdc.load_model(str(tmp_path / "model"))
    pairs = ioi_pairs(tokenizer, "abba", 6, seed=0)
    found = behaviour.without_head_to_head(lowered, {"abba": Task("abba", pairs, {})})
    assert 0 <= found["abba"] <= 1
    assert behaviour._is_between_heads("a0.h1->a1.h0.q")
    assert not behaviour._is_between_heads("a0.h1->m1")


def test_duplicates_are_measured_against_a_third_name(model, tokenizer):
    margins = behaviour.duplicate_margins(model, ioi_prompts(tokenizer, 8, seed=0))
    assert set(margins) == {"as it is", "S2 is a third name", "S2 is IO"}


# Card


def test_a_card_is_measured_on_the_folder_and_says_what_is_not_there(
    prepared, model, tokenizer, tmp_path
):
    _, _, batches = prepared
    write_folder(tmp_path / "model", model, config_of(**TINY), tokenizer)
    facts = Facts("tiny", 3, train.Schedule(6, 2), {"n_tokens": 1}, loss=8.0, seconds=1.0)
    card = make_card(tmp_path / "model", facts, batches.held_out_windows(2, 64), number=8)
    assert json.loads(json.dumps(card)) == card
    assert set(card["held_out_scores"]) == {*DOCUMENTS, "induction"}
    assert set(card["task_scores"]) == set(TASKS)
    assert card["training"]["text"]["license"].startswith("Python Software Foundation")
    assert 7 < card["held_out_text_loss"] < 10  # random weights: about log(3072)
    assert any(line.startswith("ioi/abba: ") for line in card["not_there"])
    assert any("no head behaves as" in line for line in card["not_there"])


def test_a_model_that_does_everything_falls_short_of_nothing():
    right, wrong = Score(9, 1.0, 1.0, 5.0), Score(9, 0.5, 1.0, 5.0)
    needed = ("duplicate token", "S-inhibition", "name mover", "previous token", "induction")
    roles = {role: ["a0.h0"] for role in needed}
    ioi = {
        "right_without_head_to_head_edges": {"abba": 0.5},
        "logit_diff": {"as it is": 4.0, "S2 is a third name": 0.1},
        "roles": roles,
    }
    assert shortfalls({"ioi": {"abba": right, "abc": wrong}}, ioi) == []
    assert shortfalls({"pronoun": {"any": wrong}}, ioi) == [
        "pronoun/any: 50.0% of held-out prompts right, not 95%"
    ]
    kept = ioi | {"right_without_head_to_head_edges": {"abba": 0.77}}
    assert shortfalls({}, kept) == [
        "ioi/abba: without edges between heads still 77.0% right, more than 60%"
    ]
    idle = ioi | {"logit_diff": {"as it is": 4.0, "S2 is a third name": 3.5}}
    assert "the repeat does not decide" in shortfalls({}, idle)[0]
    blind = ioi | {"roles": roles | {"induction": [], "name mover": [], "S-inhibition": []}}
    assert shortfalls({}, blind) == [
        "ioi: no head behaves as one of S-inhibition, name mover",
        "docstring: no head behaves as one of induction",
    ]
