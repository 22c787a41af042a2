"""What is claimed of a circuit, on which prompts, and when nothing is."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import acdc
from acdc.engine.work import Work
from acdc.errors import AbilityError, OptionError
from acdc.measure.ability import Ability, ability
from acdc.measure.evaluation import Evaluation, Evaluator
from acdc.methods import METHODS
from acdc.runs.building import build_experiment, load_experiment
from acdc.runs.checks import check_discovery
from acdc.runs.claim import Claim, Claims
from acdc.runs.discover import measure
from acdc.runs.opened import open_run
from acdc.runs.prompts import LEAST_SELECT, load_selection, split_prompts
from acdc.runs.unseen import PromptChoice
from acdc.settings import Settings, command_line
from acdc.tasks import Task
from graphs import Circuit

IOI = check_discovery(Settings.of("ioi", n_prompts=12, n_select=20, n_test=30))
TASKS = ("ioi", "docstring", "greater-than", "pronoun", "induction")


def cleans(*tasks: Task | None) -> list[tuple[int, ...]]:
    return [pair.clean for task in tasks if task is not None for pair in task.pairs]


# --- which prompts ------------------------------------------------------------------------


def test_a_task_draws_three_sets_without_repeats() -> None:
    experiment, tokenizer = load_experiment(IOI)
    split = split_prompts(IOI, experiment, tokenizer)
    assert [len(t or ()) for t in (experiment.task, split.select, split.test)] == [12, 20, 30]
    every = cleans(split.select, split.test)
    assert len(set(every)) == len(every)
    assert not set(every) & set(cleans(experiment.task))
    assert split.warnings == ()
    again = split_prompts(IOI, experiment, tokenizer)
    assert cleans(again.select, again.test) == every
    other = IOI.replace(seed=1)
    assert cleans(split_prompts(other, experiment, tokenizer).test) != cleans(split.test)


def test_nothing_is_chosen_where_the_size_is_given() -> None:
    asked = check_discovery(Settings.of("ioi", n_prompts=12, n_edges=30))
    experiment, tokenizer = load_experiment(asked)
    assert split_prompts(asked, experiment, tokenizer).select is None
    with pytest.raises(OptionError, match="n_select 5 does nothing where the threshold or"):
        check_discovery(Settings.of("ioi", n_edges=30, n_select=5))
    masks = check_discovery(Settings.of("ioi", method="edge-pruning", sparsity=0.9))
    assert load_selection(masks, experiment.model, tokenizer, experiment.task) is None


def rows(folder: Path, n: int) -> str:
    """Write ``n`` rows of ioi as a file."""
    task = build_experiment(check_discovery(Settings.of("ioi", n_prompts=n))).task
    lines = [
        {
            "clean": list(pair.clean),
            "corrupt": list(pair.corrupt),
            "answers": list(pair.answers),
            "wrong_answers": list(pair.wrong_answers),
        }
        for pair in task.pairs
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    ("n", "asked", "sizes", "warned"),
    [
        (64, {}, (32, 16, 16), 0),
        (64, {"n_edges": 30}, (48, 0, 16), 0),
        (64, {"holdout": 0.0}, (64, 0, 0), 2),
        (64, {"n_prompts": 10, "n_select": 5, "n_test": 4}, (10, 5, 4), 0),
        (16, {}, (12, 0, 4), 1),
    ],
)
def test_a_file_is_split_once(
    tmp_path: Path, n: int, asked: dict[str, object], sizes: tuple[int, ...], warned: int
) -> None:
    file = rows(tmp_path, n)
    settings = check_discovery(Settings.of(file, model="ioi-small", **asked))
    experiment, tokenizer = load_experiment(settings)
    split = split_prompts(settings, experiment, tokenizer)
    assert tuple(len(t or ()) for t in (experiment.task, split.select, split.test)) == sizes
    every = cleans(experiment.task, split.select, split.test)
    assert len(set(every)) == len(every)
    assert len(split.warnings) == warned
    assert LEAST_SELECT == 8


def test_more_rows_than_a_file_leaves(tmp_path: Path) -> None:
    file = rows(tmp_path, 64)
    settings = check_discovery(Settings.of(file, model="ioi-small", n_prompts=40))
    with pytest.raises(OptionError, match=r"16 of them held out and 16 kept .* at most 32"):
        build_experiment(settings)
    settings = check_discovery(Settings.of(file, model="ioi-small", n_select=48))
    with pytest.raises(OptionError, match=r"n_select is 48 but .* ask for fewer than 48"):
        build_experiment(settings)


def test_more_to_test_than_are_held_out(tmp_path: Path) -> None:
    file = rows(tmp_path, 64)
    settings = check_discovery(Settings.of(file, model="ioi-small", n_test=17))
    experiment, tokenizer = load_experiment(settings)
    with pytest.raises(OptionError, match=r"n_test is 17 but .* 64 rows 16 are held out"):
        split_prompts(settings, experiment, tokenizer)


def test_a_task_that_has_no_more_says_so() -> None:
    asked = check_discovery(Settings.of("pronoun", n_prompts=300, n_select=300, n_test=900))
    experiment, tokenizer = load_experiment(asked)
    split = split_prompts(asked, experiment, tokenizer)
    assert split.test is not None
    assert split.warnings == (
        f"task pronoun has no more prompts: {len(split.test)} to test on, not 900",
    )


@pytest.mark.parametrize("asked", [{}, {"n_edges": 60, "method": "eap-ig"}])
def test_rows_that_fitted_fit_again(tmp_path: Path, asked: dict[str, object]) -> None:
    """The threshold that was found is in run.json, and hides no rows that chose it.

    No edge's change is within rounding of the threshold that these rows lead to: then the guess,
    which is another one when the threshold is given, could decide.
    """
    n = 72
    file = rows(tmp_path, n)
    run = acdc.discover(file, model="ioi-small", **asked)
    run.save(tmp_path / "run")
    for found in (run, tmp_path / "run"):
        opened = open_run(found)
        settings = opened.settings()
        evaluation, experiment = measure(opened.circuit, settings)
        assert len(experiment.task) == run.claim.prompts["fit"]
        assert evaluation == run.claim.seen
        unseen = PromptChoice(opened.discovery_with(settings))
        left = unseen(settings, experiment.model, None)
        assert len(left) == n - run.claim.prompts["fit"] - run.claim.prompts["select"]
        words = shlex.split(command_line(opened.discovery, run.settings.options))
        assert ("--n-select" in words) is True
    again = acdc.discover(
        file, model="ioi-small", n_select=run.claim.prompts["select"],
        threshold=json.loads((tmp_path / "run/run.json").read_text())["threshold"],
    ) if not asked else run  # fmt: skip
    assert again.circuit.edges() == run.circuit.edges()


def test_a_row_that_stands_twice_does_not_test(tmp_path: Path) -> None:
    path = Path(rows(tmp_path, 8))
    path.write_text(path.read_text() * 4)
    settings = check_discovery(Settings.of(str(path), model="ioi-small", n_edges=30))
    experiment, tokenizer = load_experiment(settings)
    split = split_prompts(settings, experiment, tokenizer)
    assert not set(cleans(split.test)) & set(cleans(experiment.task))
    settings = check_discovery(Settings.of(str(path), model="ioi-small", n_select=12, holdout=0.0))
    experiment, tokenizer = load_experiment(settings)
    split = split_prompts(settings, experiment, tokenizer)
    assert split.n_select == 12
    assert not set(cleans(split.select)) & set(cleans(experiment.task))


def test_sizes_are_chosen_on_the_prompts_for_that() -> None:
    """The same scores, another size: that of the prompts that select."""
    experiment, tokenizer = load_experiment(IOI)
    split = split_prompts(IOI, experiment, tokenizer)
    chosen = replace(experiment, select_on=split.select)
    for method in ("eap-ig", "eap"):
        settings = check_discovery(
            Settings.of("ioi", method=method, n_prompts=12, n_select=20, n_test=30)
        )
        found = METHODS[method].search(chosen, settings, Work())
        value = Evaluator(chosen.selection).faithfulness(found.circuit.in_circuit)
        assert value is not None
        assert 0.9 <= value <= 1.1, method
        assert chosen.selection.task is split.select


# --- what is claimed ----------------------------------------------------------------------


def test_a_claim_is_that_of_the_test_prompts() -> None:
    run = acdc.discover("ioi", method="eap", n_prompts=16, n_edges=150, n_test=40)
    experiment, tokenizer = load_experiment(run.settings)
    split = split_prompts(run.settings, experiment, tokenizer)
    mask = run.circuit.in_circuit
    wanted = Evaluator(experiment.on(split.test)).evaluate(mask)
    assert run.claim.evaluation == wanted
    assert run.faithfulness == wanted.faithfulness
    assert run.claim.seen == Evaluator(experiment).evaluate(mask)
    low, high = run.claim.interval
    assert low < run.faithfulness < high
    assert run.summary()["prompts"] == {"fit": 16, "select": 0, "test": 40}


def test_what_falls_short_or_overshoots_is_said() -> None:
    experiment, tokenizer = load_experiment(IOI)
    claims = Claims(experiment, split_prompts(IOI, experiment, tokenizer), ability(experiment))
    graph = experiment.graph
    none = Circuit(graph, np.zeros(graph.n_edges), np.zeros(graph.n_edges, dtype=bool))
    seen = Evaluation(1.0, 0.0, 0.9, 0.9)
    said = claims.of(none, seen)
    assert said.faithfulness == 0
    assert said.warnings == (
        "the circuit falls short on unseen prompts: faithfulness 0 (0.9 on those that it was "
        "found on)",
    )
    few = Claims(
        experiment, split_prompts(IOI.replace(n_test=3), experiment, tokenizer), claims.ability
    )
    assert "3 unseen prompts only" in few.of(none, seen).warnings[0]


def test_a_claim_survives_the_file(tmp_path: Path) -> None:
    run = acdc.discover("ioi", method="eap", n_prompts=8, n_edges=60, n_test=8)
    again = acdc.load_run(run.save(tmp_path / "run"))
    assert again.claim.as_dict() == run.claim.as_dict()
    assert isinstance(again.claim, Claim)


# --- nothing to find ----------------------------------------------------------------------


def random_gpt2(folder: Path, data: Path, seed: int) -> str:
    scale = 0.02 if seed % 2 else 0.2
    config = GPT2Config(n_layer=2, n_embd=64, n_head=4, initializer_range=scale)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(folder)
    for path in (data / "gpt2-tokenizer").glob("tokenizer*"):
        shutil.copy(path, folder)
    return str(folder)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))]
)
def test_random_weights_have_no_circuit(tmp_path: Path, data: Path, seed: int) -> None:
    model = random_gpt2(tmp_path / "model", data, seed)
    for task in TASKS:
        for metric in (None, "kl"):
            settings = check_discovery(Settings.of(task, model=model, metric=metric, seed=seed))
            found = ability(build_experiment(settings))
            assert found.doubts, (task, metric, found.as_dict())


def test_no_faithfulness_is_said_of_random_weights(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_gpt2(tmp_path / "model", data, 0)
    run = acdc.discover("ioi", model=model, method="eap", n_prompts=32, n_edges=50, n_test=16)
    summary = json.loads((run.save(tmp_path / "run") / "run.json").read_text())
    assert [summary[f"faithfulness{of}"] for of in ("", "_seen", "_interval")] == [None] * 3
    assert "the model does not do the task" in " ".join(summary["warnings"])
    assert (
        json.loads((tmp_path / "run" / "circuit.json").read_text())["info"]["faithfulness"] is None
    )
    found = acdc.evaluate(tmp_path / "run", tests=False).summary()
    assert {row["faithfulness"] for row in found["ablations"]} == {None}
    assert found["faithfulness_low"] is None
    assert found["areas"] == []
    assert "the model does not do the task" in " ".join(found["warnings"])
    with pytest.raises(AbilityError, match="does not do the task"):
        acdc.discover("ioi", model=model, method="eap", n_prompts=32, n_edges=50, strict=True)
    from acdc.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(tmp_path / "run"), "--brief"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "warning: the model does not do the task" in said
    assert re.search(r"faithfulness +│ - ", said)
    out = tmp_path / "strict"
    with pytest.raises(SystemExit) as stop:
        main(["discover", "ioi", "--model", model, "--strict", "--out", str(out)])
    assert stop.value.code == 2
    assert not out.exists()
    assert "does not do the task" in capsys.readouterr().err


def test_a_corruption_that_leaves_the_answer_is_not_the_models_fault() -> None:
    rng = np.random.default_rng(0)
    gaps = rng.normal(1, 0.1, 64)
    able, guesses = np.ones(64), rng.permutation(np.repeat([0.0, 1.0], 32))
    (says,) = Ability(able, able, gaps, identical=False).doubts
    assert says == (
        "the corrupt prompts are answered right as well (100%, the clean ones 100%): this "
        "corruption does not take the answer away"
    )
    (says,) = Ability(guesses, guesses[::-1], gaps, identical=False).doubts
    assert says.startswith("the model does not do the task: it answers right on 50% of the clean")
    (says,) = Ability(np.zeros(64), np.zeros(64), gaps, identical=False).doubts
    assert says.startswith("the model does not do the task: it answers right on 0% of the clean")
    assert Ability(able, guesses, gaps, identical=False).doubts == ()


def test_the_same_prompts_on_both_sides_and_one_row(tmp_path: Path) -> None:
    path = Path(rows(tmp_path, 8))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for name, some in (
        ("same", [line | {"corrupt": line["clean"]} for line in lines]),
        ("one", lines[:1]),
    ):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in some))
        settings = check_discovery(Settings.of(str(file), model="ioi-small", holdout=0.0))
        assert len(ability(build_experiment(settings)).doubts) == 1


def test_rows_without_answers_are_judged_by_their_gap(tmp_path: Path) -> None:
    path = Path(rows(tmp_path, 16))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps({k: v for k, v in x.items() if "ans" not in k}) + "\n" for x in lines)
    )
    settings = check_discovery(Settings.of(str(path), model="ioi-small", metric="kl", holdout=0.0))
    found = ability(build_experiment(settings))
    assert found.accuracy is None
    assert found.doubts == ()


def test_no_change_is_smaller_than_nothing() -> None:
    for tau in (0.0, -1.0):
        with pytest.raises(OptionError, match="give one above 0"):
            acdc.discover("ioi", method="acdc-two-sided", threshold=tau, n_prompts=4, n_test=4)


def test_positions_of_one_prompt_are_no_more_prompts(tmp_path: Path) -> None:
    """Two prompts of four scored positions each are two: an interval over eight would say more."""
    path = Path(rows(tmp_path, 2))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    n = min(len(line["clean"]) for line in lines)
    several = [line | {"scored": [n - 4, n - 3, n - 2, n - 1]} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in several))
    settings = check_discovery(Settings.of(str(path), model="ioi-small", holdout=0.0))
    found = ability(build_experiment(settings))
    assert found.right_clean is not None
    assert found.right_clean.shape == found.gaps.shape == (2,)


def test_a_model_that_does_the_task() -> None:
    found = ability(build_experiment(IOI.replace(n_prompts=64)))
    assert found.accuracy is not None
    assert found.accuracy[0] == 1
    assert found.accuracy[1] < 0.7
    low, high = found.gap_interval or (0, 0)
    assert 0 < low < found.gap < high
    assert found.doubts == ()
