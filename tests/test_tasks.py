"""Built-in tasks under four real tokenizers, and task files with each of their mistakes."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from acdc.errors import InputError, OptionError, TaskError, UnknownNameError
from acdc.tasks import TASKS, Pair, Task, is_task_file, load_task
from acdc.tasks.base import single_token_continuation
from acdc.tasks.docstring import corrupt_words
from acdc.tasks.prompts import fill_template, split_template
from acdc.tasks.pronoun import NEUTRAL_NOUNS, NOUNS
from acdc.tasks.words import (
    ARGUMENTS,
    BOY_NAMES,
    DESCRIPTIONS,
    GIRL_NAMES,
    NAMES,
    NEUTRAL_NAMES,
    OBJECTS,
)

ROOT = Path(__file__).resolve().parent.parent
SHORTCUTS = ROOT / "benchmarks" / "shortcuts"
FOLDERS = {
    "gpt2": ROOT / "tests" / "data" / "gpt2-tokenizer",
    "ioi-small": SHORTCUTS / "ioi-small",
    "docstring-small": SHORTCUTS / "docstring-small",
}
COMBINATIONS = [
    ("gpt2", "ioi"),
    ("gpt2", "docstring"),
    ("gpt2", "pronoun"),
    ("ioi-small", "ioi"),
    ("ioi-small", "pronoun"),
    ("docstring-small", "docstring"),
    ("stories260k", "pronoun"),
]

Loader = Callable[[str], Any]


@pytest.fixture(scope="session")
def tokenizer() -> Loader:
    """Load a tokenizer by its name, once."""
    from transformers import AutoTokenizer

    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in loaded:
            folder = stories_folder() if name == "stories260k" else FOLDERS[name]
            loaded[name] = AutoTokenizer.from_pretrained(folder)
        return loaded[name]

    return load


def stories_folder() -> Path:
    default = ROOT.parent / "shared" / "stories260k"
    folder = Path(os.environ.get("ACDC_STORIES260K", default))
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no stories260k model at {folder}: set ACDC_STORIES260K to its folder")
    return folder


def texts(task: Task, tok: Any) -> list[str]:
    return [tok.decode(list(pair.clean)) for pair in task.pairs]


# Built-in tasks


@pytest.mark.parametrize(("name", "task_name"), COMBINATIONS)
def test_every_corruption_has_the_same_clean_prompts(
    tokenizer: Loader, name: str, task_name: str
) -> None:
    """In the same order, and with the same answers; many, so that some are drawn twice."""
    tok, corruptions = tokenizer(name), tuple(TASKS[task_name].corruptions)
    assert len(corruptions) >= 3
    for seed in (0, 5):
        first, *others = (
            load_task(task_name, tok, n_prompts=120, seed=seed, corruption=corruption).pairs
            for corruption in corruptions
        )
        for pairs in others:
            assert [replace(p, corrupt=q.corrupt) for p, q in zip(pairs, first, strict=True)] == [
                *first
            ]
            assert [p.corrupt for p in pairs] != [p.corrupt for p in first]


@pytest.mark.parametrize(("name", "task_name"), COMBINATIONS)
def test_built_in_pairs_are_sound_under_each_tokenizer(
    tokenizer: Loader, name: str, task_name: str
) -> None:
    tok = tokenizer(name)
    for corruption in TASKS[task_name].corruptions:
        task = load_task(task_name, tok, n_prompts=40, corruption=corruption)
        assert len(task) == 40
        if corruption == TASKS[task_name].default_corruption:  # the others have its clean prompts
            assert len(set(task.pairs)) == 40
        for pair in task.pairs:
            check_pair(pair, tok)
        assert sum(task.info["lengths"].values()) == 40
        assert task.info["corruption"] == corruption
        json.dumps(task.info)


def check_pair(pair: Pair, tok: Any) -> None:
    assert len(pair.clean) == len(pair.corrupt)
    assert pair.clean != pair.corrupt
    assert not set(pair.answers) & set(pair.wrong_answers)
    assert pair.answers
    assert pair.wrong_answers
    ids = {*pair.clean, *pair.corrupt, *pair.answers, *pair.wrong_answers}
    assert ids <= set(range(len(tok)))
    if tok.unk_token_id != tok.eos_token_id:  # GPT-2 has one token for both
        assert tok.unk_token_id not in ids


@pytest.mark.parametrize(("name", "task_name"), COMBINATIONS)
def test_seed_decides_and_global_random_state_is_left_alone(
    tokenizer: Loader, name: str, task_name: str
) -> None:
    tok = tokenizer(name)
    before = random.getstate()
    first = load_task(task_name, tok, n_prompts=12, seed=3)
    random.seed(99)
    again = load_task(task_name, tok, n_prompts=12, seed=3)
    other = load_task(task_name, tok, n_prompts=12, seed=4)
    assert first == again
    assert first.pairs != other.pairs
    random.setstate(before)
    load_task(task_name, tok, n_prompts=2)
    assert random.getstate() == before


def test_default_number_of_prompts_is_128(tokenizer: Loader) -> None:
    assert len(load_task("ioi", tokenizer("ioi-small"))) == 128


@pytest.mark.parametrize("name", ["gpt2", "ioi-small"])
def test_ioi_names_are_in_place(tokenizer: Loader, name: str) -> None:
    tok = tokenizer(name)
    names = [n for n in NAMES if name != "gpt2" or n != "Zachary"]  # two tokens of GPT-2's
    known = {single_token_continuation(tok, "Then,", f" {n}") for n in names}
    orders = []
    for pair in load_task("ioi", tok, n_prompts=30).pairs:
        places = [i for i, token in enumerate(pair.clean) if token in known]
        assert places == [i for i, token in enumerate(pair.corrupt) if token in known]
        assert places == [i for i in range(len(pair.clean)) if pair.clean[i] != pair.corrupt[i]]
        first, second, third = (pair.clean[i] for i in places)
        assert {pair.answers[0], pair.wrong_answers[0]} == {first, second}
        assert third == pair.wrong_answers[0]
        unrelated = {pair.corrupt[i] for i in places}
        assert len(unrelated) == 3
        assert not unrelated & {first, second}
        orders.append("ABBA" if third == second else "BABA")
    assert orders == ["ABBA", "BABA"] * 15


def test_ioi_uses_many_templates_and_names(tokenizer: Loader) -> None:
    task = load_task("ioi", tokenizer("gpt2"), n_prompts=200)
    assert len(task.info["templates"]) == 13
    assert len({pair.answers for pair in task.pairs}) > 60


NAME_PATTERNS = {"abc": "CDE", "swapped": "ABO", "random_names": "CDR", "random_subject": "ABE"}
"""Names of the corrupted prompt: A and B the clean ones; O of these the one that does not repeat in
the clean prompt; C, D and E unrelated ones; R of C and D the one where the repeated name was."""


@pytest.mark.parametrize("corruption", NAME_PATTERNS)
@pytest.mark.parametrize("name", ["gpt2", "ioi-small"])
def test_ioi_corruptions_change_what_they_say(
    tokenizer: Loader, name: str, corruption: str
) -> None:
    clean_prompts = [p.clean for p in load_task("ioi", tokenizer(name), n_prompts=30).pairs]
    task = load_task("ioi", tokenizer(name), n_prompts=30, corruption=corruption)
    assert [p.clean for p in task.pairs] == clean_prompts
    for pair in task.pairs:
        places = [pair.spans[label][0] for label in ("S1", "IO", "S2")]
        changed = [i for i in range(len(pair.clean)) if pair.clean[i] != pair.corrupt[i]]
        assert set(changed) <= set(places)
        a, b, s2 = sorted(places)
        first, second, third = (pair.corrupt[i] for i in (a, b, s2))
        clean = {"A": pair.clean[a], "B": pair.clean[b]}
        repeats = "A" if pair.clean[s2] == clean["A"] else "B"
        wanted = NAME_PATTERNS[corruption]
        for letter, token in zip(wanted, (first, second, third), strict=True):
            if letter in "AB":
                assert token == clean[letter]
            elif letter == "O":
                assert token == clean["BA"["AB".index(repeats)]]
                assert token == pair.answers[0]  # then the wrong answer is the right one
            elif letter == "R":
                assert token == (first if repeats == "A" else second)
            else:
                assert token not in clean.values()
        assert (len({first, second, third}) == 3) == ("E" in wanted)


@pytest.mark.parametrize(
    ("corruption", "changed"),
    [("other_gender", {"noun", "name"}), ("other_noun", {"noun"}), ("no_gender", {})],
)
@pytest.mark.parametrize("name", ["gpt2", "ioi-small", "stories260k"])
def test_pronoun_corruptions_change_what_they_say(
    tokenizer: Loader, name: str, corruption: str, changed: set[str]
) -> None:
    tok = tokenizer(name)
    words = {
        "noun": [set(nouns) for nouns in zip(*NOUNS, strict=True)],
        "name": [set(GIRL_NAMES), set(BOY_NAMES)],
    }
    neutral = {"noun": {*NEUTRAL_NOUNS, *OBJECTS}, "name": set(NEUTRAL_NAMES)}
    plain = load_task("pronoun", tok, n_prompts=20)
    task = load_task("pronoun", tok, n_prompts=20, corruption=corruption)
    for index, (pair, default) in enumerate(zip(task.pairs, plain.pairs, strict=True)):
        assert (pair.answers, pair.wrong_answers) == (default.answers, default.wrong_answers)
        for label, by_gender in words.items():
            at = pair.spans[label]
            said = tok.decode([pair.corrupt[i] for i in at]).strip()
            if corruption == "no_gender":
                assert said in neutral[label]
                continue
            gender = index % 2 if label not in changed else 1 - index % 2
            assert said in by_gender[gender]


@pytest.mark.parametrize("name", ["gpt2", "docstring-small"])
def test_docstring_asks_for_the_third_argument(tokenizer: Loader, name: str) -> None:
    tok = tokenizer(name)
    known = {single_token_continuation(tok, "(self,", f" {n}") for n in ARGUMENTS}
    for pair in load_task("docstring", tok, n_prompts=20).pairs:
        names = [token for token in pair.clean if token in known]
        assert names[:2] == names[4:]
        assert (names[2],) == pair.answers
        assert pair.wrong_answers == (names[0], names[1], names[3])
        corrupt = [token for token in pair.corrupt if token in known]
        assert len({*names, *corrupt}) == 10


@pytest.mark.parametrize(
    ("corruption", "changed"),
    [
        ("random_def_doc", [0, 1, 2, 3, 4, 5]),
        ("random_def", [0, 1, 2, 3]),
        ("random_doc", [4, 5]),
        ("random_answer", [2]),
    ],
)
def test_docstring_corruptions_change_their_names_only(
    tokenizer: Loader, corruption: str, changed: list[int]
) -> None:
    tok = tokenizer("docstring-small")
    known = {single_token_continuation(tok, "(self,", f" {n}") for n in ARGUMENTS}
    for pair in load_task("docstring", tok, n_prompts=10, corruption=corruption).pairs:
        places = [i for i, token in enumerate(pair.clean) if token in known]
        different = [i for i in range(len(pair.clean)) if pair.clean[i] != pair.corrupt[i]]
        assert different == [places[c] for c in changed]


def test_corrupt_words_leaves_the_clean_words_alone() -> None:
    clean = {"METHOD": "run", "DEF2": "file", "DOC0": "load"}
    assert corrupt_words(clean, ["a", "b"], "random_answer")["DEF2"] == "a"
    assert clean["DEF2"] == "file"


@pytest.mark.parametrize("name", ["gpt2", "ioi-small", "stories260k"])
def test_pronoun_pairs_are_aligned_and_of_both_genders(tokenizer: Loader, name: str) -> None:
    tok = tokenizer(name)
    task = load_task("pronoun", tok, n_prompts=60)
    assert len(task.info["templates"]) == 7
    girls, boys = (set(names) for names in (GIRL_NAMES, BOY_NAMES))
    for index, pair in enumerate(task.pairs):
        right, wrong = (tok.decode([ids[0]]).strip() for ids in (pair.answers, pair.wrong_answers))
        assert right.lower() == ("she", "he")[index % 2]
        assert wrong.lower() == ("he", "she")[index % 2]
        assert right.istitle() == tok.decode(list(pair.clean)).rstrip().endswith(".")
        clean, corrupt = (set(split(tok.decode(list(ids)))) for ids in (pair.clean, pair.corrupt))
        assert bool(clean & girls) == (index % 2 == 0) == bool(corrupt & boys)
    # one layout per template: as many lengths as templates at most
    assert len(task.info["lengths"]) <= 7


def split(text: str) -> list[str]:
    return text.replace(".", " ").replace(",", " ").split()


def test_too_few_names_are_counted(tokenizer: Loader) -> None:
    message = r"^1 of 87 argument names are one token .* at least 10 are needed: choose a model"
    with pytest.raises(TaskError, match=message):
        load_task("docstring", tokenizer("stories260k"))
    with pytest.raises(TaskError, match=r"0 of 116 names are one token .* at least 5 are needed"):
        load_task("ioi", tokenizer("docstring-small"))
    with pytest.raises(TaskError, match=r"0 of 4 noun pairs .* and 0 of 400 pairs of names"):
        load_task("pronoun", tokenizer("docstring-small"))


def test_words_that_a_tokenizer_does_not_know_are_reported(tokenizer: Loader) -> None:
    tok = tokenizer("docstring-small")
    assert fill_template(tok, "\ndef {METHOD}(self", {"METHOD": "xylophone"}) is None
    assert fill_template(tok, "\ndef {METHOD}(self", {"METHOD": "run"}) is not None


def test_word_lists_are_free_of_duplicates_and_overlap() -> None:
    for words in (NAMES, ARGUMENTS, DESCRIPTIONS, GIRL_NAMES, BOY_NAMES):
        assert len(set(words)) == len(words)
    assert not set(ARGUMENTS) & set(DESCRIPTIONS)
    assert not set(GIRL_NAMES) & set(BOY_NAMES)


def test_split_template_gives_the_space_to_the_word() -> None:
    assert split_template("{A} and {B}.") == [("", "A"), (" and", "B"), (".", "")]


def test_bundled_tokenizers_continue_prompts_by_one_token(tokenizer: Loader) -> None:
    for name, prompt, answer in [
        ("ioi-small", "Then, Mary and John went to the store. John gave a ring to", " Mary"),
        ("ioi-small", "Once upon a time there was a little girl named Lily.", " She"),
        ("docstring-small", "\ndef port(self, load, size, file, last):", "\n    "),
        (
            "docstring-small",
            '    """oil column piece\n\n    :param load: unit\n    :param',
            " size",
        ),
    ]:
        tok = tokenizer(name)
        token = single_token_continuation(tok, prompt, answer)
        assert token != tok.unk_token_id


# BOS, vocabulary, context


def test_bos_is_put_in_front_of_both_prompts_only_when_asked(tokenizer: Loader) -> None:
    tok = tokenizer("gpt2")
    plain = load_task("ioi", tok, n_prompts=4)
    with_bos = load_task("ioi", tok, n_prompts=4, prepend_bos=True)
    for a, b in zip(plain.pairs, with_bos.pairs, strict=True):
        assert b.clean == (tok.bos_token_id, *a.clean)
        assert b.corrupt == (tok.bos_token_id, *a.corrupt)
        assert b.answers == a.answers
        assert tok.bos_token_id not in a.clean
    longest = max(len(pair.clean) for pair in plain.pairs)
    assert str(longest + 1) in with_bos.info["lengths"]


def test_bos_needs_a_tokenizer_that_has_one(tokenizer: Loader, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, [ROW])
    with pytest.raises(OptionError, match="prepend_bos was asked for but its tokenizer has no BOS"):
        load_task("ioi", tokenizer("ioi-small"), prepend_bos=True)
    with pytest.raises(OptionError, match="prepend_bos was asked for but the model has no token"):
        load_task(str(path), None, prepend_bos=True)


def test_prompts_must_fit_the_model(tokenizer: Loader) -> None:
    tok = tokenizer("gpt2")
    with pytest.raises(TaskError, match=r"task 'ioi', row 1: .* tokens but the model's context is"):
        load_task("ioi", tok, n_ctx=5)
    with pytest.raises(TaskError, match=r"row 1: token id \d+ is not in .* vocabulary of 20"):
        load_task("ioi", tok, d_vocab=20)


# Names and options


def test_unknown_names_list_the_near_ones(tokenizer: Loader) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown task 'ioii': did you mean ioi\?"):
        load_task("ioii", None)
    with pytest.raises(UnknownNameError, match=r"unknown corruption of task docstring 'random_de'"):
        load_task("docstring", tokenizer("gpt2"), corruption="random_de")


@pytest.mark.parametrize("n", [0, -3])
def test_number_of_prompts_is_positive(n: int) -> None:
    with pytest.raises(OptionError, match=f"n_prompts {n}: expected at least 1"):
        load_task("ioi", None, n_prompts=n)


def test_built_in_task_needs_a_tokenizer() -> None:
    with pytest.raises(TaskError, match="task 'ioi' is made of text but the model has no token"):
        load_task("ioi", None)


def test_what_counts_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs").write_text("")
    Path("ioi").write_text("")
    assert is_task_file("pairs")
    assert is_task_file("missing.csv")
    assert is_task_file("some/where")
    assert not is_task_file("ioi")
    assert not is_task_file("other")


# Files

ROW: dict[str, Any] = {"clean": [1, 2, 3], "corrupt": [1, 4, 3], "answers": [5], "wrong": [6]}


def write_jsonl(folder: Path, rows: list[Any], name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_of_token_ids_needs_no_tokenizer(tmp_path: Path) -> None:
    rows = [
        ROW,
        {"clean": [1, 2], "corrupt": [3, 4], "answer": 7, "wrong_answer": 8},
        {"clean": [1], "corrupt": [3], "answers": [7, 9], "wrong_answers": [8, 2], "extra": "x"},
        {"clean": [1], "corrupt": [3], "answers": 7},
    ]
    task = load_task(str(write_jsonl(tmp_path, rows)), None, d_vocab=10)
    assert task.name == "pairs"
    assert task.pairs == (
        Pair((1, 2, 3), (1, 4, 3), (5,), (6,)),
        Pair((1, 2), (3, 4), (7,), (8,)),
        Pair((1,), (3,), (7, 9), (8, 2)),
        Pair((1,), (3,), (7,)),
    )
    assert task.info["lengths"] == {"1": 2, "2": 1, "3": 1}
    assert len(load_task(str(tmp_path / "pairs.jsonl"), None, n_prompts=2)) == 2


def test_scored_positions_of_a_file(tmp_path: Path, tokenizer: Loader) -> None:
    rows = [ROW, ROW | {"scored": [0, 2]}, {"clean": [1, 2], "corrupt": [3, 4], "scored": [0]}]
    path = str(write_jsonl(tmp_path, rows))
    assert [pair.scored for pair in load_task(path, None).pairs] == [(2,), (0, 2), (0,)]
    assert load_task(path, None).pairs[2].answers == ()
    tok = tokenizer("gpt2")
    with_bos = load_task(path, tok, prepend_bos=True)
    assert [pair.scored for pair in with_bos.pairs] == [(3,), (1, 3), (1,)]


def test_scored_positions_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text('clean,corrupted,scored\n"[1, 2]","[1, 3]","[0, 1]"\n')
    assert load_task(str(path), None).pairs == (Pair((1, 2), (1, 3), scored=(0, 1)),)


def test_answers_are_checked_against_the_outputs(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path, [ROW]))
    assert load_task(path, None, d_vocab=5, d_vocab_out=7).pairs[0].answers == (5,)
    with pytest.raises(TaskError, match="row 1: token id 6 is not in the model's vocabulary"):
        load_task(path, None, d_vocab=5, d_vocab_out=6)


def test_jsonl_of_text(tmp_path: Path, tokenizer: Loader) -> None:
    tok = tokenizer("gpt2")
    row = {"clean": "Mary said to", "corrupt": "John said to", "answer": " John", "wrong": " Mary"}
    (pair,) = load_task(str(write_jsonl(tmp_path, [row])), tok).pairs
    assert tok.decode(pair.clean) == "Mary said to"
    assert [tok.decode(t) for t in (pair.answers, pair.wrong_answers)] == [" John", " Mary"]
    mixed = row | {"clean": list(pair.clean), "answer": pair.answers[0]}
    assert load_task(str(write_jsonl(tmp_path, [mixed])), tok).pairs == (pair,)


def test_jsonl_skips_blank_lines_but_counts_them(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(ROW) + "\r\n\n" + "{oops\n")
    with pytest.raises(
        TaskError, match=r"pairs.jsonl, row 3: no JSON that can be read \(.*column 2\)"
    ):
        load_task(str(path), None)
    path.write_text("\n" + json.dumps(ROW) + "\n\n")
    assert len(load_task(str(path), None)) == 1


def test_text_with_line_separators_stays_one_row(tmp_path: Path, tokenizer: Loader) -> None:
    row = {"clean": "a\u2028b", "corrupt": "c\u2028d", "answer": 5}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert len(load_task(str(path), tokenizer("gpt2"))) == 1


def test_autocircuit_json(tmp_path: Path, tokenizer: Loader) -> None:
    tok = tokenizer("gpt2")
    prompt = {
        "clean": "When Mary and John left, John gave it to",
        "corrupt": "When Alice and Bob left, Sue gave it to",
        "answers": [" Mary"],
        "wrong_answers": [" John", " Bob"],
    }
    path = tmp_path / "ioi_prompts.json"
    path.write_text(json.dumps({"word_idxs": {"IO": 2}, "prompts": [prompt, prompt]}))
    task = load_task(str(path), tok)
    assert task.name == "ioi_prompts"
    assert len(task) == 2
    assert [tok.decode([t]) for t in task.pairs[0].wrong_answers] == [" John", " Bob"]


def test_eap_ig_csv(tmp_path: Path, tokenizer: Loader) -> None:
    tok = tokenizer("gpt2")
    path = tmp_path / "data.csv"
    path.write_text(
        "clean,country_idx,corrupted,corrupted_hard,correct_idx,incorrect_idx\n"
        '"Then, Mary left. It",3,"Then, John left. It",x,262,"[1, 2]"\n'
        '"A ""quoted"" one\nof two lines",3,"A ""quoted"" one\nin two lines",x,5,6\n'
    )
    first, second = load_task(str(path), tok).pairs
    assert tok.decode(first.clean) == "Then, Mary left. It"
    assert (first.answers, first.wrong_answers) == ((262,), (1, 2))
    assert tok.decode(second.clean) == 'A "quoted" one\nof two lines'
    path.write_text('clean,corrupted,correct_idx,incorrect_idx\n"[1, 2]","[1, 3]",5,6\n')
    assert load_task(str(path), None).pairs == (Pair((1, 2), (1, 3), (5,), (6,)),)


def test_prompts_of_a_file_keep_their_own_bos(tmp_path: Path, tokenizer: Loader) -> None:
    tok = tokenizer("stories260k")
    row = {"clean": "a girl.", "corrupt": "a boy..", "answer": " She", "wrong": " He"}
    path = write_jsonl(tmp_path, [row | {"corrupt": "a girl."}])
    (pair,) = load_task(str(path), tok).pairs
    assert tok.bos_token_id not in pair.clean
    assert load_task(str(path), tok, prepend_bos=True).pairs[0].clean[0] == tok.bos_token_id


MISTAKES: list[tuple[str, Any, str]] = [
    ("lengths", {"corrupt": [1]}, r"row 2: the clean prompt has 3 tokens, the corrupt one 1: "),
    ("empty prompt", {"clean": [], "corrupt": []}, r"row 2: the clean prompt has no tokens"),
    ("scored text", {"scored": "1"}, r"row 2: 'scored' is '1': give a list of token positions"),
    ("scored none", {"scored": []}, r"row 2: 'scored' is \[\]: give a list of token positions"),
    (
        "scored outside",
        {"scored": [1, 3]},
        r"row 2: position 3 is scored, but the prompt has the p",
    ),
    ("scored from the end", {"scored": [-1]}, r"row 2: position -1 is scored, .*: count from 0"),
    ("scored twice", {"scored": [1, 1]}, r"row 2: scored positions \[1, 1\]: give each once, in a"),
    ("scored backwards", {"scored": [2, 1]}, r"row 2: scored positions \[2, 1\]: give each once"),
    ("out of vocabulary", {"clean": [1, 2, 10]}, r"row 2: token id 10 .* ids are 0 to 9"),
    (
        "answer twice",
        {"answers": [7, 7]},
        r"row 2: token 7 is in 'answers' twice: give each answer",
    ),
    (
        "wrong answer twice",
        {"wrong_answers": [5, 6, 5]},
        r"row 2: token 5 is in 'wrong_answers' twice: give each answer once",
    ),
    ("negative id", {"answers": [-1]}, r"row 2: token id -1 is not in .* ids are 0 to 9"),
    ("both", {"wrong": [5]}, r"row 2: token 5 is an answer and a wrong answer"),
    ("text prompt", {"clean": "Mary"}, r"row 2: got the text 'Mary' but the model has no token"),
    ("text answer", {"answers": [" Mary"]}, r"row 2: got the text ' Mary' but the model has no"),
    ("number prompt", {"clean": 3}, r"row 2: 'clean' is a number \(3\): give a text or a list"),
    ("mixed prompt", {"clean": [1, "x"]}, r"row 2: 'clean' is a list: give a text or a list of"),
    ("odd answer", {"answers": [1.5]}, r"row 2: an answer is a number \(1.5\): give a text or a"),
    ("true answer", {"answers": [True]}, r"row 2: an answer is a truth value"),
    ("null", {"clean": None}, r"row 2: key 'clean' is missing, got the keys clean, corrupt, answ"),
]


@pytest.mark.parametrize(
    ("change", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_mistakes_in_a_row_name_file_and_row(tmp_path: Path, change: Any, message: str) -> None:
    path = write_jsonl(tmp_path, [ROW, ROW | change])
    with pytest.raises(TaskError, match=r"pairs\.jsonl, " + message) as caught:
        load_task(str(path), None, d_vocab=10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl: no rows in the file: give at least one"),
        ("a.jsonl", "[1, 2]\n", r"row 1: expected an object with the keys .*, got a list"),
        ("a.jsonl", '{"clean": [1]}\n', r"row 1: key 'corrupt' is missing, got the keys clean"),
        (
            "a.jsonl",
            '{"clean": [1], "corrupt": [2], "answrs": [3]}',
            r"row 1: unknown key 'answrs': did you mean 'answers'\?",
        ),
        ("a.json", "", r"a\.json: no rows in the file"),
        ("a.json", '{"prompts": []}', r"a\.json: no rows in the file"),
        (
            "a.json",
            '{"prompts": [',
            r"a\.json: no JSON that can be read \(Expecting value at line 1, col",
        ),
        ("a.json", "[]", r'expected an object \{"prompts": \[...\]\} .* got a list without'),
        ("a.json", '{"prompts": [{}]}', r"row 1: key 'clean' is missing, got the keys none"),
        ("a.csv", "", r"a\.csv: no rows in the file"),
        ("a.csv", "clean,corrupted,correct_idx,incorrect_idx\n", r"a\.csv: no rows"),
        ("a.csv", "clean,correct_idx\n[1],2\n", r"row 1: key 'corrupted' is missing, got the k"),
        ("a.csv", "clean,corrupted,correct_idx\n[1],[2],3\n[1]\n", r"row 2: key 'corrupted' is m"),
        ("a.csv", 'clean,corrupted,correct_idx\n"[1]" x,[2],3\n', r"row 1: malformed CSV \("),
        ("a.txt", "", r"a\.txt: a task file ends in \.jsonl, \.json, \.csv, got '\.txt'"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TaskError, match=message) as caught:
        load_task(str(tmp_path / name), None)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, InputError)


def test_missing_file_folder_and_bytes(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no-such\.jsonl: no such file: give the path"):
        load_task(str(tmp_path / "no-such.jsonl"), None)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(TaskError, match=r"folder\.json: it is a folder, expected a file"):
        load_task(str(tmp_path / "folder.json"), None)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match=r"bytes\.json: not UTF-8 text"):
        load_task(str(tmp_path / "bytes.json"), None)


def test_answers_are_listed_once(tmp_path: Path, tokenizer: Loader) -> None:
    """Twice they would count twice: a negative log likelihood below 0."""
    tok = tokenizer("gpt2")
    (john,) = tok.encode(" John", add_special_tokens=False)
    row = {"clean": "Mary said to", "corrupt": "Anna said to", "answers": [" John", john]}
    with pytest.raises(TaskError, match=rf"row 1: token {john} is in 'answers' as ' John' and as"):
        load_task(str(write_jsonl(tmp_path, [row])), tok)
    with pytest.raises(TaskError, match="token 3 is an answer 2 times: give each answer once"):
        Pair((1, 2), (1, 3), (3, 4, 3))


@pytest.mark.parametrize("ids", [[-1, 5], [5, 50257], [5, 2**40], [5, -(2**70)]])
def test_ids_beside_a_text_answer_are_checked_first(
    tmp_path: Path, tokenizer: Loader, ids: list[int]
) -> None:
    """The tokenizer is asked for their text, and has none for them."""
    row = {"clean": ids, "corrupt": [5, 6], "answers": [" John"]}
    path = str(write_jsonl(tmp_path, [row]))
    with pytest.raises(TaskError, match=r"row 1: token id -?\d+ is not in the model's vocabulary"):
        load_task(path, tokenizer("gpt2"), d_vocab=50257)
    if ids != [5, 50257]:  # a vocabulary that is not known may have it
        with pytest.raises(TaskError, match=r"row 1: token id -?\d+ is not in the model's vocab"):
            load_task(path, tokenizer("gpt2"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_half_a_character_is_no_text(tmp_path: Path, tokenizer: Loader, suffix: str) -> None:
    rows = '{"clean": "Mary \\ud83d said", "corrupt": "Anna said", "answers": [5]}'
    path = tmp_path / f"half{suffix}"
    path.write_text(rows if suffix == ".jsonl" else f'{{"prompts": [{rows}]}}')
    with pytest.raises(TaskError, match=r"a text with a lone surrogate, '\\ud83d'"):
        load_task(str(path), tokenizer("gpt2"))


def test_a_task_without_end_is_not_read(tmp_path: Path, tokenizer: Loader) -> None:
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    with pytest.raises(TaskError, match="it is a device, pipe or socket, expected a file"):
        load_task(str(tmp_path / "zero.jsonl"), None)
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(TaskError, match=r"it has 1,048,576 MiB, expected at most 64"):
        load_task(str(tmp_path / "large.json"), None)
    row = {"clean": "a" * 2_000_000, "corrupt": [1], "answers": [5]}
    with pytest.raises(TaskError, match=r"row 1: a prompt of 2,000,000 characters: expected at"):
        load_task(str(write_jsonl(tmp_path, [row])), tokenizer("gpt2"))


def test_text_rows_report_lengths_and_answers(tmp_path: Path, tokenizer: Loader) -> None:
    tok = tokenizer("gpt2")
    row = {"clean": "Mary said to", "corrupt": "John and Mary said to", "answer": " John"}
    with pytest.raises(TaskError, match=r"row 1: the clean prompt has 3 tokens, the corrupt one 5"):
        load_task(str(write_jsonl(tmp_path, [row])), tok)
    row = {"clean": "Mary said to", "corrupt": "John said to", "answer": " Zachary"}
    with pytest.raises(TaskError, match=r"row 1: answer ' Zachary' is no single token .* 5 tokens"):
        load_task(str(write_jsonl(tmp_path, [row])), tok)


def test_file_options(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path, [ROW]))
    with pytest.raises(OptionError, match=r"n_prompts is 2 but .*pairs\.jsonl has 1 rows"):
        load_task(path, None, n_prompts=2)
    with pytest.raises(OptionError, match=r"corruption 'abc' was asked of .*pairs\.jsonl"):
        load_task(path, None, corruption="abc")
    with pytest.raises(TaskError, match=r"the prompt has 3 tokens but the model's context is 2"):
        load_task(path, None, n_ctx=2)


# Bundled models


@pytest.mark.parametrize("name", ["ioi-small", "docstring-small"])
def test_bundled_folder_is_complete_small_and_described(name: str) -> None:
    folder = SHORTCUTS / name
    card = json.loads((folder / "card.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert (folder / "model.safetensors").stat().st_size <= 3_000_000
    assert card["architecture"] == config
    assert card["license"] == "MIT"
    assert {"torch", "transformer_lens", "transformers"} <= set(card["versions"])
    for scores in card["held_out_scores"].values():
        assert scores["accuracy"] >= 0.99
        assert scores["min_logit_diff"] > 0


@pytest.mark.parametrize(
    ("name", "task_name"),
    [("ioi-small", "ioi"), ("ioi-small", "pronoun"), ("docstring-small", "docstring")],
)
def test_bundled_weights_answer_their_tasks(tokenizer: Loader, name: str, task_name: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources.native import boot
    from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

    config = json.loads((SHORTCUTS / name / "config.json").read_text())
    cfg = TransformerBridgeConfig(**config)
    bridge = boot(cfg)
    weights = load_file(SHORTCUTS / name / "model.safetensors")
    bridge.load_state_dict(convert_tl_checkpoint(weights, cfg), strict=False)
    fits = {"d_vocab": config["d_vocab"], "n_ctx": config["n_ctx"]}
    task = load_task(task_name, tokenizer(name), n_prompts=24, seed=5, **fits)
    with torch.no_grad():
        clean = [bridge(torch.tensor([pair.clean]))[0, -1] for pair in task.pairs]
        corrupt = [bridge(torch.tensor([pair.corrupt]))[0, -1] for pair in task.pairs]
    assert all(c.argmax() in p.answers for c, p in zip(clean, task.pairs, strict=True))
    assert mean_margin(clean, task) > 4
    assert mean_margin(corrupt, task) < 0.25 * mean_margin(clean, task)


def mean_margin(logits: list[Any], task: Task) -> float:
    """Mean over the pairs of the answer's logit above the mean wrong answer's."""
    margins = [
        (row[list(pair.answers)].mean() - row[list(pair.wrong_answers)].mean()).item()
        for row, pair in zip(logits, task.pairs, strict=True)
    ]
    return sum(margins) / len(margins)


def test_training_never_shows_what_is_held_out() -> None:
    from benchmarks.shortcuts.train import RECIPES, build_tokenizer, docstring_row, is_held_out

    assert is_held_out("a", "b") == is_held_out("b", "a")
    recipe = RECIPES["docstring"]
    vocabulary = build_tokenizer(recipe.texts).get_vocab()
    words = {number: word for word, number in vocabulary.items()}
    rng = random.Random(0)
    for held_out in [False, True] * 20:
        row = docstring_row(vocabulary, rng, held_out)
        text = [words[token] for token in row.tokens]
        header = [word for word in text[: text.index(")")] if word in ARGUMENTS]
        places = [i for i, word in enumerate(text) if word == ":param"]
        last, answer = text[places[-2] + 1], words[row.targets[places[-1]]]
        assert header[header.index(last) + 1] == answer
        assert is_held_out(last, answer) == held_out


def test_keys_of_the_users_own_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"clean": [1], "corrupt": [2], "score": 3, "wrong_answer_text": "no"}\n')
    (pair,) = load_task(str(path)).pairs
    assert pair.answers == pair.wrong_answers == ()
