"""The model that comes with the package: what its card says, measured again on fewer prompts."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import heads_oracle
import pytest
import quick
import torch
from click.testing import Result
from typer.testing import CliRunner

from acdc.cli import app
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.measure.roles import measure_roles, roles_of
from acdc.models import BUNDLED, load_model
from acdc.tasks import TASKS, Task, load_task
from benchmarks.language import behaviour
from benchmarks.language.card import IOI_FORMS, NEEDED_ROLES, SEED
from benchmarks.language.card_page import card_page
from benchmarks.language.documents import DOCUMENTS
from benchmarks.language.model import read_folder
from benchmarks.language.probes import Probe, probes_of, score
from benchmarks.language.prompts import ioi_pairs, ioi_prompts

NAME = "language-small"
FOLDER = BUNDLED[NAME]
N = 64
FORMS = [(task, form) for task, forms in DOCUMENTS.items() for form in forms]


@cache
def native() -> Any:
    return read_folder(FOLDER)


@cache
def tokenizer() -> Any:
    return load_model(NAME)[1]


@cache
def card() -> dict[str, Any]:
    return json.loads((FOLDER / "card.json").read_text())


def sampling_error(share: float, n: int) -> float:
    """Four standard errors of a share, and one prompt."""
    return 4 * (share * (1 - share) / n) ** 0.5 + 1 / n


def test_it_is_small_and_the_default_of_every_task() -> None:
    size = sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file())
    assert size <= 10 << 20
    assert list(BUNDLED) == [NAME]
    assert set(quick.SHIPPED.values()) == {NAME}
    assert all(len(spec.corruptions) >= 2 for spec in TASKS.values())


@pytest.mark.parametrize(("task", "form"), FORMS)
def test_words_that_training_never_had_together(task: str, form: str) -> None:
    said = card()["held_out_scores"][task][form]["accuracy"]
    found = score(native(), probes_of(tokenizer(), task, form, N, seed=7)).accuracy
    assert abs(found - said) <= sampling_error(said, N)
    if task == "ioi" and form in IOI_FORMS:
        assert said >= 0.95


@pytest.mark.parametrize("name", TASKS)
def test_tasks_of_the_package(name: str) -> None:
    """The clean prompts are answered, and every corruption takes the answer away."""
    for corruption in TASKS[name].corruptions:
        said = card()["task_scores"][name][corruption]
        task = load_task(
            name, tokenizer(), n_prompts=N, seed=7, corruption=corruption, d_vocab=len(tokenizer())
        )
        for side in ("clean", "corrupt"):
            probes = [Probe(getattr(p, side), p.answers, p.wrong_answers) for p in task.pairs]
            accuracy = score(native(), probes).accuracy
            expected = said[side]["accuracy"]
            assert abs(accuracy - expected) <= sampling_error(expected, N), (corruption, side)
        assert said["clean"]["accuracy"] > said["corrupt"]["accuracy"]


def test_what_it_does_not_do_is_said() -> None:
    assert (FOLDER / "README.md").read_text() == card_page(card())
    below = [
        f"{task}/{form}: "
        for task, form in FORMS
        if card()["held_out_scores"][task][form]["accuracy"] < 0.95
        and (task, form) not in (("ioi", "abc"), ("ioi", "new"))
    ]
    said = card()["not_there"]
    assert [line for line in said if "held-out prompts right" in line] == [
        next(line for line in said if line.startswith(start)) for start in below
    ]


def test_the_repeat_decides() -> None:
    margins = behaviour.duplicate_margins(native(), ioi_prompts(tokenizer(), N, seed=7))
    assert abs(margins["S2 is a third name"]) < 0.2 * margins["as it is"]
    assert margins["S2 is IO"] < -0.5 * margins["as it is"]


def test_heads_have_the_papers_roles() -> None:
    """By attention and path patching: on the native model, and as `acdc heads` does it."""
    roles = roles_of(heads_oracle.measure_heads(native(), ioi_prompts(tokenizer(), N, seed=7)))
    model, _ = load_model(NAME)
    task = load_task("ioi", tokenizer(), n_prompts=N, seed=7)
    as_heads = roles_of(measure_roles(Experiment(model, task, get_metric("logit_diff"))))
    for task, names in NEEDED_ROLES.items():
        assert sum(bool(roles[name]) for name in names) >= 2, task
    for role, heads in card()["ioi"]["roles"].items():
        assert set(heads[:2]) <= set(roles[role]) & set(as_heads[role]), role


def test_the_answer_needs_heads_that_read_heads() -> None:
    model, _ = load_model(NAME)
    tasks = {form: Task(form, ioi_pairs(tokenizer(), form, 24, SEED), {}) for form in IOI_FORMS}
    found = behaviour.without_head_to_head(model, tasks)
    said = card()["ioi"]["right_without_head_to_head_edges"]
    for form, share in found.items():
        assert said[form] <= 0.6
        assert share <= said[form] + sampling_error(said[form], 24)


def test_half_precision_is_exact_enough() -> None:
    """The folder's own weights, cast and not cast: the card is measured on what is shipped."""
    ids = torch.tensor([p.tokens for p in probes_of(tokenizer(), "ioi", "abba", 1, seed=3)])
    model, _ = load_model(NAME)
    logits = model.unembed(model.forward(ids).final)
    torch.testing.assert_close(logits, native()(ids), rtol=1e-4, atol=1e-4)


def test_a_task_runs_on_it_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TASKS, "_things", dict(TASKS._things))
    quick.restore()
    asked = "discover docstring --method eap --edges 60 --n-prompts 8 --n-test 16"
    answer: Result = CliRunner().invoke(app, [*asked.split(), "--out", str(tmp_path / "run")])
    assert answer.exit_code == 0, answer.output
    assert json.loads((tmp_path / "run" / "run.json").read_text())["model"] == NAME
