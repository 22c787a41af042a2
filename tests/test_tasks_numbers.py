"""The tasks greater-than (years) and induction (random token ids)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from acdc.cli import main
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import Targets, get_metric
from acdc.errors import TaskError, UnknownNameError
from acdc.models import MODELS, load_model
from acdc.tasks import TASKS, load_task
from acdc.tasks.greater_than import two_digit_tokens
from acdc.tasks.induction import LENGTH, ROUNDS


@pytest.fixture(scope="module")
def gpt2(data: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data / "gpt2-tokenizer")


@pytest.fixture(scope="module")
def words() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(MODELS["ioi-small"])


# --- greater-than -------------------------------------------------------------------------


def test_greater_than_asks_for_later_years(gpt2: Any) -> None:
    task = load_task("greater-than", gpt2, n_prompts=200)
    assert len(set(task.pairs)) == 200
    centuries = set()
    for pair in task.pairs:
        clean, corrupt = (gpt2.decode(list(ids)) for ids in (pair.clean, pair.corrupt))
        start = " lasted from the year "
        event, _, years = clean.partition(start)
        first, _, century = years.partition(" to the year ")
        assert corrupt == f"{event}{start}{century}01 to the year {century}"
        assert first[:2] == century
        right, wrong = (
            [int(gpt2.decode([token])) for token in ids]
            for ids in (pair.answers, pair.wrong_answers)
        )
        assert right == list(range(int(first[2:]) + 1, 100))
        assert wrong == list(range(int(first[2:]) + 1))
        centuries.add(century)
    assert centuries == {str(century) for century in range(11, 18)}


@pytest.mark.parametrize("corruption", ["year_01", "earlier_year", "first_decade"])
def test_greater_than_corruptions_change_the_start_year_alone(gpt2: Any, corruption: str) -> None:
    plain = load_task("greater-than", gpt2, n_prompts=100)
    pairs = load_task("greater-than", gpt2, n_prompts=100, corruption=corruption).pairs
    assert [p.clean for p in pairs] == [p.clean for p in plain.pairs]
    seen = set()
    for pair in pairs:
        assert [i for i in range(12) if pair.clean[i] != pair.corrupt[i]] == [7]
        start, other = (int(gpt2.decode([ids[7]])) for ids in (pair.clean, pair.corrupt))
        right = [int(gpt2.decode([token])) for token in pair.answers]
        assert right == list(range(start + 1, 100))  # of the clean prompt, whatever the corruption
        assert len(right) + len(pair.wrong_answers) == 100
        assert 1 <= other < start  # after a later start its right ends are right here, too
        seen.add(other)
    latest = {"year_01": 1, "first_decade": 9}.get(corruption, 97)
    assert min(seen) == 1
    assert latest // 2 <= max(seen) <= latest


def test_greater_than_is_laid_out_as_in_the_paper(gpt2: Any) -> None:
    for pair in load_task("greater-than", gpt2, n_prompts=50).pairs:
        assert len(pair.clean) == 12
        assert [i for i in range(12) if pair.clean[i] != pair.corrupt[i]] == [7]
        assert pair.corrupt[7] == 486  # "01"
        assert pair.clean[6] == pair.clean[11]


def test_years_of_one_token_are_left_out(gpt2: Any) -> None:
    seventeen = two_digit_tokens(gpt2, 17)
    assert sorted(seventeen) == list(range(1, 100))  # 1700 is one token
    assert seventeen[32] == gpt2.encode("32")[0]
    eleven = two_digit_tokens(gpt2, 11)
    assert 52 not in {d for d, t in eleven.items() if t == gpt2.encode("52")[0]}  # " 115", "2"
    starts = {
        gpt2.decode(list(p.clean[6:8]))
        for p in load_task("greater-than", gpt2, n_prompts=600).pairs
    }
    assert " 1152" not in starts
    assert {int(start[-2:]) for start in starts} == set(range(2, 99))  # as in the paper


def test_prob_diff_is_the_papers_metric(gpt2: Any) -> None:
    """Sum of p over later years minus sum over the others, against a plain computation."""
    pair = load_task("greater-than", gpt2, n_prompts=1).pairs[0]
    logits = torch.randn(1, len(gpt2), generator=torch.Generator().manual_seed(0))
    n, m = len(pair.answers), len(pair.wrong_answers)
    tokens = torch.tensor([[*pair.answers, *pair.wrong_answers]])
    answer = torch.tensor([[1 / n] * n + [0.0] * m])
    wrong = torch.tensor([[0.0] * n + [1 / m] * m])
    probs = logits.softmax(-1)[0]
    start = int(gpt2.decode([pair.clean[7]]))
    expected = sum(
        probs[gpt2.encode(f"{year:02d}")[0]] * (1 if year > start else -1) for year in range(100)
    )
    got = get_metric("prob_diff")(logits, Targets(tokens, answer, wrong))
    assert got.item() == pytest.approx(float(expected), rel=1e-5)


def test_a_tokenizer_without_numbers_is_told_of_a_family_that_has_them(words: Any) -> None:
    with pytest.raises(TaskError, match=r"^0 years .* two tokens .* GPT-2 family \(gpt2") as caught:
        load_task("greater-than", words)
    assert "\n" not in str(caught.value)


def test_the_command_line_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["discover", "greater-than", "--model", "ioi-small", "--out", str(tmp_path / "new")]
    with pytest.raises(SystemExit) as caught:
        main(run)
    said = capsys.readouterr()
    assert (caught.value.code, said.out) == (2, "")
    assert said.err.count("\n") == 1
    assert "GPT-2 family" in said.err
    assert list(tmp_path.iterdir()) == []


# --- induction ----------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["gpt2", "words", None])
def test_induction_repeats_a_round(source: str | None, request: pytest.FixtureRequest) -> None:
    tokenizer = source and request.getfixturevalue(source)
    size = None if source else 40
    task = load_task("induction", tokenizer, n_prompts=100, d_vocab=size)
    assert task.info["lengths"] == {str(LENGTH): 100}
    rounds = set()
    for pair in task.pairs:
        n = LENGTH - 1 - pair.clean.index(pair.clean[-1])  # so far back is the last token
        assert pair.clean[n:] == pair.clean[: LENGTH - n] == pair.corrupt[n:]
        assert pair.answers == (pair.clean[LENGTH - n],)
        assert pair.wrong_answers == (pair.corrupt[LENGTH - n],)
        assert len({*pair.clean, *pair.corrupt}) == 2 * n
        rounds.add(n)
    assert rounds == set(ROUNDS)
    json.dumps(task.info)


def test_induction_corruptions_change_what_they_say(gpt2: Any) -> None:
    plain = load_task("induction", gpt2, n_prompts=50).pairs
    for corruption, label in (("other_answer", "B1"), ("other_before", "A1")):
        pairs = load_task("induction", gpt2, n_prompts=50, corruption=corruption).pairs
        for pair, default in zip(pairs, plain, strict=True):
            (at,) = pair.spans[label]
            assert [i for i in range(LENGTH) if pair.clean[i] != pair.corrupt[i]] == [at]
            assert pair.corrupt[at] == default.corrupt[at]
            if label == "B1":
                assert (pair.corrupt[at],) == pair.wrong_answers
            else:
                assert pair.corrupt.index(pair.corrupt[-1]) == LENGTH - 1


def test_induction_leaves_special_tokens_out(gpt2: Any, words: Any) -> None:
    used = {t for p in load_task("induction", words, n_prompts=300).pairs for t in p.clean}
    assert not used & set(words.all_special_ids)
    assert len(used) == len(words) - len(words.all_special_ids)
    bos = load_task("induction", gpt2, n_prompts=3, prepend_bos=True)
    assert all(pair.clean[0] == gpt2.bos_token_id for pair in bos.pairs)


def test_induction_stays_within_the_models_vocabulary(gpt2: Any) -> None:
    pairs = load_task("induction", gpt2, n_prompts=100, d_vocab=50).pairs
    assert max(token for pair in pairs for token in (*pair.clean, *pair.corrupt)) < 50


def test_induction_needs_a_vocabulary() -> None:
    with pytest.raises(TaskError, match=r"20 tokens in the vocabulary .* at least 32 are needed"):
        load_task("induction", None, d_vocab=20)
    with pytest.raises(TaskError, match="neither a tokenizer nor d_vocab"):
        load_task("induction", None)
    with pytest.raises(TaskError, match="20 tokens but the model's context is 16"):
        load_task("induction", None, d_vocab=50, n_ctx=16)
    with pytest.raises(UnknownNameError, match="corruption of task induction 'abc'"):
        load_task("induction", None, d_vocab=50, corruption="abc")


def test_induction_runs_on_a_bundled_model() -> None:
    """It is a task that this model was not trained for: better than nothing, far from good."""
    model, tokenizer = load_model(TASKS["induction"].model)
    task = load_task(
        "induction", tokenizer, d_vocab=model.d_vocab, n_ctx=model.n_ctx, n_prompts=128
    )
    experiment = Experiment(model, task, get_metric("logit_diff"), batch_size=128)
    assert experiment.plain("clean") > experiment.plain("corrupt") + 1


@pytest.mark.parametrize("name", ["greater-than", "induction"])
def test_seed_decides_and_global_random_state_is_left_alone(gpt2: Any, name: str) -> None:
    state = random.getstate()
    first = load_task(name, gpt2, n_prompts=12, seed=3)
    assert first == load_task(name, gpt2, n_prompts=12, seed=3)
    assert first.pairs != load_task(name, gpt2, n_prompts=12, seed=4).pairs
    assert random.getstate() == state
