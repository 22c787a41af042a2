"""Spans of tasks, and the split of a graph that follows from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acdc.errors import InputError, OptionError, TaskError
from acdc.runs.pt import write_pt
from acdc.tasks import TASKS, Pair, Task, load_task
from acdc.tasks.positions import Positions, find_positions
from graphs import Circuit, CircuitFileError, GraphShape, component_graph
from graphs.spans import reach_matrix

ROOT = Path(__file__).resolve().parent.parent
SHAPE = GraphShape(1, 1)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    from transformers import AutoTokenizer

    folders = {
        "gpt2": ROOT / "tests" / "data" / "gpt2-tokenizer",
        "ioi-small": ROOT / "benchmarks" / "shortcuts" / "ioi-small",
        "docstring-small": ROOT / "benchmarks" / "shortcuts" / "docstring-small",
    }
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


def word(tokenizer: Any, pair: Pair, label: str) -> str:
    return tokenizer.decode([pair.clean[p] for p in pair.spans[label]]).strip()


def made(n_pos: int, spans: dict[str, tuple[int, ...]], scored: tuple[int, ...] = ()) -> Pair:
    return Pair(tuple(range(n_pos)), tuple(range(n_pos)), scored=scored, spans=spans)


# Built-in tasks


@pytest.mark.parametrize("name", ["gpt2", "ioi-small"])
@pytest.mark.parametrize("bos", [False, True])
def test_ioi_labels_the_names(tokenizers, name, bos):
    tokenizer = tokenizers[name]
    if bos and tokenizer.bos_token_id is None:
        pytest.skip("no BOS token")
    task = load_task("ioi", tokenizer, n_prompts=30, prepend_bos=bos)
    orders = set()
    for pair in task.pairs:
        assert list(pair.spans) == ["S1", "S1+1", "IO", "S2", "END"]
        s1, s2, io = (pair.spans[label][0] for label in ("S1", "S2", "IO"))
        assert pair.clean[s1] == pair.clean[s2] == pair.wrong_answers[0]
        assert pair.clean[io] == pair.answers[0]
        assert pair.spans["S1+1"] == (s1 + 1,)
        assert pair.spans["END"] == pair.scored == (len(pair.clean) - 1,)
        changed = [
            p for p, (a, b) in enumerate(zip(pair.clean, pair.corrupt, strict=True)) if a != b
        ]
        assert set(changed) <= {s1, s2, io}
        orders.add(s1 < io < s2)
    assert orders == {True, False}


@pytest.mark.parametrize("name", ["gpt2", "docstring-small"])
def test_docstring_labels_the_arguments(tokenizers, name):
    tokenizer = tokenizers[name]
    for pair in load_task("docstring", tokenizer, n_prompts=10).pairs:
        a, b, c = (word(tokenizer, pair, f"{letter}_def") for letter in "ABC")
        assert (word(tokenizer, pair, "A_doc"), word(tokenizer, pair, "B_doc")) == (a, b)
        assert tokenizer.decode([pair.answers[0]]).strip() == c
        assert pair.spans["B_comma"] == (pair.spans["B_def"][0] + 1,)
        assert word(tokenizer, pair, "B_comma") == ","
        assert pair.spans["param_3"] == (len(pair.clean) - 1,)
        assert word(tokenizer, pair, "param_3").endswith("param")
        assert list(pair.spans.values()) == sorted(pair.spans.values())


def test_the_other_tasks_label_what_decides_the_answer(tokenizers):
    gpt2 = tokenizers["gpt2"]
    for pair in load_task("greater-than", gpt2, n_prompts=10).pairs:
        assert word(gpt2, pair, "XX") == word(gpt2, pair, "END")
        assert 2 <= int(word(gpt2, pair, "YY")) <= 98
        assert gpt2.decode([pair.corrupt[pair.spans["YY"][0]]]) == "01"
    for name in ("gpt2", "ioi-small"):
        for pair in load_task("pronoun", tokenizers[name], n_prompts=20).pairs:
            assert word(tokenizers[name], pair, "noun") in {
                "girl", "boy", "woman", "man", "princess", "prince", "queen", "king"
            }  # fmt: skip
            assert pair.spans["noun"][-1] < pair.spans["name"][0] < pair.spans["END"][0]
    for pair in load_task("induction", gpt2, n_prompts=20).pairs:
        end, first, answer = (pair.spans[label][0] for label in ("END", "A1", "B1"))
        assert pair.clean[end] == pair.clean[first]
        assert (pair.clean[answer], answer) == (pair.answers[0], first + 1)


def test_spans_and_order_do_not_depend_on_the_seed(tokenizers):
    found = {
        find_positions(load_task("ioi", tokenizers["ioi-small"], n_prompts=64, seed=seed), "span")
        for seed in range(3)
    }
    (positions,) = found
    assert positions.spans == ("rest", "S1", "S1+1", "IO", "S2", "END")
    assert positions.scored == ("END",)


@pytest.mark.parametrize("name", TASKS)
def test_the_list_of_tasks_names_their_labels(tokenizers, name):
    tokenizer = tokenizers["docstring-small" if name == "docstring" else "gpt2"]
    for pair in load_task(name, tokenizer, n_prompts=3).pairs:
        assert tuple(pair.spans) == TASKS[name].spans


# Files


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROW = {"clean": [5, 6, 7, 8], "corrupt": [5, 6, 9, 8], "answers": 1}


def test_a_file_labels_its_spans(tmp_path):
    path = write(tmp_path / "t.jsonl", {**ROW, "spans": {"IO": [1, 2], "END": [3]}})
    (pair,) = load_task(str(path), None).pairs
    assert pair.spans == {"IO": (1, 2), "END": (3,)}
    assert find_positions(Task("t", (pair,)), "span").spans == ("rest", "IO", "END")
    (tmp_path / "t.csv").write_text(
        'clean,corrupted,correct_idx,spans\n"[5, 6]","[5, 7]",1,"{""END"": [1]}"\n'
    )
    assert load_task(str(tmp_path / "t.csv"), None).pairs[0].spans == {"END": (1,)}


@pytest.mark.parametrize("prompt", ['{""a"": 1}', "[" * 100_000])
def test_a_cell_that_looks_like_json_is_a_text(tmp_path, prompt):
    path = tmp_path / "t.csv"
    path.write_text(f'clean,corrupted,correct_idx\n"{prompt}","[5, 7]",1\n')
    with pytest.raises(TaskError, match=r"row 1: .*got the text .* but the model has no tokenizer"):
        load_task(str(path), None)


MISTAKES = [
    ([3], r"'spans' is \[3\]: give an object of labels with lists of token positions"),
    ({"IO": 3}, r"'spans' is {'IO': 3}: give an object of labels"),
    ({"IO": [True]}, "give an object of labels"),
    ({"IO": []}, "span 'IO' has no positions: give at least one"),
    ({"IO": [4]}, "span 'IO' has position 4, but the prompt has the positions 0 to 3"),
    ({"IO": [-1]}, "span 'IO' has position -1"),
    ({"IO": [1, 1]}, "position 1 is in span 'IO' and in 'IO': give each position one label"),
    ({"IO": [1], "S1": [1]}, "position 1 is in span 'IO' and in 'S1'"),
    ({"rest": [1]}, "span 'rest': this is what the unlabelled positions are called"),
    ({"a@b": [1]}, "span 'a@b': expected a name of letters, digits"),
    ({"": [1]}, "span '': expected a name of letters, digits"),
]


@pytest.mark.parametrize(("spans", "words"), MISTAKES)
def test_mistakes_in_spans_name_file_and_row(tmp_path, spans, words):
    path = write(tmp_path / "t.jsonl", ROW, {**ROW, "spans": spans})
    with pytest.raises(TaskError, match=words) as caught:
        load_task(str(path), None)
    assert str(caught.value).startswith(f"{path}, row 2: ")
    assert "\n" not in str(caught.value)


def test_every_row_labels_the_same_spans(tmp_path):
    spans = ({"IO": [1], "END": [3]}, {"END": [3]})
    path = write(tmp_path / "t.jsonl", *({**ROW, "spans": s} for s in spans))
    with pytest.raises(TaskError, match=r"row 2 labels the spans END, row 1 IO, END: label the"):
        load_task(str(path), None)


# Positions


def test_token_positions():
    task = Task("t", (made(4, {}), made(4, {}, scored=(1, 3))))
    positions = find_positions(task, "token")
    assert positions == Positions("token", ("p0", "p1", "p2", "p3"), ("p1", "p3"), None)
    assert positions.of(task.pairs[0]).tolist() == [0, 1, 2, 3]
    graph = component_graph(positions.split(SHAPE))
    assert graph.n_edges == 4 * (8 - 3) + 2 * 3
    assert Positions.of_shape(graph.shape) == positions
    assert Positions.of_shape(SHAPE) is None
    both = find_positions(task, "token", causal=False).split(SHAPE)
    assert both.reach.all()


def test_labelled_spans_of_prompts_of_different_length():
    pairs = (
        made(5, {"IO": (1,), "S": (2, 3), "END": (4,)}),
        made(7, {"IO": (5,), "S": (1, 2), "END": (6,)}),
    )
    positions = find_positions(Task("t", pairs), "span")
    assert positions.spans == ("rest", "IO", "S", "END")
    assert positions.of(pairs[0]).tolist() == [0, 1, 2, 2, 3]
    assert positions.of(pairs[1]).tolist() == [0, 2, 2, 0, 0, 1, 3]
    assert positions.split(SHAPE).reach.tolist() == [
        [True, True, True, True],
        [False, True, True, True],
        [True, True, True, True],
        [False, False, False, True],
    ]
    assert Positions.of_shape(positions.split(SHAPE)) == positions
    one = find_positions(Task("t", pairs[:1]), "span").split(SHAPE)
    assert one.reaches is None  # in the order of the spans


@st.composite
def labelled_tasks(draw):
    def pair():
        n_pos = draw(st.integers(3, 7))
        places = draw(st.permutations(range(n_pos)))[: draw(st.integers(2, 3))]
        spans = {"a": tuple(places[:1]), "b": tuple(places[1:])}
        scored = draw(st.sets(st.integers(0, n_pos - 1), min_size=1))
        return made(n_pos, spans, tuple(sorted(scored)))

    return Task("t", tuple(pair() for _ in range(draw(st.integers(1, 3)))))


@given(labelled_tasks(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_reaches_are_those_of_all_pairs_of_positions(task, causal):
    positions = find_positions(task, "span", causal=causal)
    expected, scored = set(), set()
    for pair in task.pairs:
        names = [next((k for k, at in pair.spans.items() if p in at), "rest") for p in range(9)]
        n_pos = len(pair.clean)
        assert [positions.spans[i] for i in positions.of(pair)] == names[:n_pos]
        expected |= {
            (names[p], names[q]) for p in range(n_pos) for q in range(n_pos) if p <= q or not causal
        }
        scored |= {names[p] for p in pair.scored}
    assert set(positions.scored) == scored
    reach = reach_matrix(len(positions.spans), positions.reaches)
    names = positions.spans
    assert {(names[s], names[t]) for s, t in np.argwhere(reach)} == expected


LABELLED = Task("t", (made(3, {"END": (2,)}),))
UNEQUAL = Task("u", (made(3, {}), made(5, {})))
REFUSED = [
    (LABELLED, "word", "positions 'word': expected token or span"),
    (
        UNEQUAL,
        "token",
        "positions 'token' needs prompts of equal length, but task 'u' has prompts of 3 to 5",
    ),
    (UNEQUAL, "span", "positions 'span' needs labelled prompts, but task 'u' labels no spans"),
]


@pytest.mark.parametrize(("task", "kind", "words"), REFUSED)
def test_positions_that_a_task_does_not_have_are_refused(task, kind, words):
    with pytest.raises(OptionError, match=words) as caught:
        find_positions(task, kind)
    assert "\n" not in str(caught.value)


OTHERS = [
    (find_positions(LABELLED, "token"), made(4, {}), "a prompt has 4 tokens, but the graph is"),
    (
        find_positions(LABELLED, "span"),
        made(3, {"IO": (1,), "END": (2,)}),
        r"split by the spans rest, END, but a prompt has 'IO' \(the task labels IO, END\)",
    ),
    (
        find_positions(Task("t", (made(1, {"END": (0,)}),)), "span"),
        made(2, {"END": (1,)}),
        "split by the spans END, but a prompt has 'rest'",
    ),
    (
        find_positions(LABELLED, "span"),
        made(3, {"END": (2,)}, scored=(1,)),
        "position 1 is scored and in span 'rest', but the graph reads logits in END alone",
    ),
]


@pytest.mark.parametrize(("positions", "pair", "words"), OTHERS)
def test_prompts_of_another_layout_are_refused(positions, pair, words):
    with pytest.raises(InputError, match=words):
        positions.of(pair)


def test_a_split_circuit_is_no_file_of_eap_ig(tmp_path):
    shape = find_positions(LABELLED, "span").split(SHAPE)
    circuit = Circuit.from_edges(component_graph(shape), ["input@END->logits@END"])
    with pytest.raises(CircuitFileError, match=r"no graph split by positions: use \.json"):
        write_pt(circuit, tmp_path / "c.pt")
    assert not list(tmp_path.iterdir())
