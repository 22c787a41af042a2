"""Where differences between circuits come from: made-up circuits whose sources are known."""

from __future__ import annotations

import json
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import acdc
from acdc.cli import main
from acdc.errors import OptionError, TaskError
from acdc.evidence.sources import CROSSED, FACTORS, REST, sources
from acdc.models import MODELS
from acdc.tasks import load_task

LEVELS = {"corruption": 3, "template": 2, "prompts": 4, "seed": 2}


def design(**sizes: int) -> tuple[list[tuple[int, ...]], dict[str, tuple[str, ...]]]:
    """Every combination of levels, and the level of each run by factor."""
    counts = [sizes.get(name, 1) for name in FACTORS]
    runs = list(product(*map(range, counts)))
    columns = tuple(zip(*runs, strict=True))
    return runs, {
        name: tuple(map(str, c)) for name, c in zip(FACTORS, columns, strict=True)
    }  # fmt: skip


def by_levels(
    runs: list[tuple[int, ...]], axes: tuple[int, ...], seed: int = 0
) -> NDArray[np.bool_]:
    """Circuits of 300 edges that depend on some factors alone."""
    drawn: dict[tuple[int, ...], NDArray[np.bool_]] = {}
    rng = np.random.default_rng(seed)
    for run in runs:
        key = tuple(run[axis] for axis in axes)
        drawn.setdefault(key, rng.random(300) < 0.3)
    return np.array([drawn[tuple(run[axis] for axis in axes)] for run in runs])


@pytest.mark.parametrize("name", ["corruption", "template", "prompts", "seed"])
def test_one_source_has_all_of_the_variance(name: str) -> None:
    runs, factors = design(**LEVELS)
    axes = (1, 2) if name == "prompts" else (FACTORS.index(name),)
    found = {s.name: s for s in sources(by_levels(runs, axes), factors)}
    assert found[name].variance > 0.9  # templates differ by chance where their prompts do
    assert found[name].squares > 0.8
    assert sum(s.variance for s in found.values()) == pytest.approx(1)
    assert sum(s.squares for s in found.values()) == pytest.approx(1)
    assert sum(s.df for s in found.values()) == len(runs) - 1


def test_corruptions_that_act_otherwise_in_every_template() -> None:
    runs, factors = design(**LEVELS)
    found = {s.name: s for s in sources(by_levels(runs, (0, 1)), factors)}
    assert found[CROSSED].variance > 0.8
    assert found[REST].variance == pytest.approx(0, abs=1e-9)


def test_differences_without_a_source_are_rest() -> None:
    """A sum of squares goes to any factor by its degrees of freedom; a component does not."""
    runs, factors = design(**LEVELS)
    found = {s.name: s for s in sources(by_levels(runs, (0, 1, 2, 3)), factors)}
    assert found[REST].variance > 0.9
    assert found["corruption"].squares == pytest.approx(2 / 47, abs=0.02)


@pytest.mark.parametrize("axes", [(0,), (0, 1), (0, 2), (0, 1, 2), (1,), (2,)])
def test_identical_seeds_change_no_share(axes: tuple[int, ...]) -> None:
    """A factor that changes nothing has no part, and makes no other's larger."""
    sizes = {"corruption": 3, "template": 2, "prompts": 4}
    once, of_once = design(**sizes)
    _, of_thrice = design(**sizes, seed=3)
    masks = by_levels(once, axes)
    before = {s.name: s for s in sources(masks, of_once)}
    after = {s.name: s for s in sources(masks.repeat(3, axis=0), of_thrice)}
    for name, source in after.items():
        known = before.get(name)
        assert source.variance == pytest.approx(known.variance if known else 0, abs=1e-9)
        assert source.squares == pytest.approx(known.squares if known else 0, abs=1e-9)


def test_noise_by_corruption_and_prompts_is_their_interaction() -> None:
    runs, factors = design(corruption=4, prompts=5, seed=3)
    found = {s.name: s for s in sources(by_levels(runs, (0, 2)), factors)}
    assert found["corruption x prompts"].variance > 0.9
    assert found["corruption"].variance < 0.07
    assert found["prompts"].variance < 0.07


def test_equal_parts_are_equal() -> None:
    """Half of the edges depend on the corruption, half on the seed: one level pair each."""
    runs, factors = design(corruption=2, seed=2, prompts=3)
    masks = np.concatenate([by_levels(runs, (0,), 1), by_levels(runs, (3,), 2)], axis=1)
    found = {s.name: s for s in sources(masks, factors)}
    assert found["corruption"].variance == pytest.approx(found["seed"].variance, abs=0.1)
    assert found["prompts"].variance == pytest.approx(0, abs=1e-9)


def test_the_sum_of_squares_is_of_hamming_distances() -> None:
    runs, factors = design(corruption=2, prompts=3)
    masks = by_levels(runs, (0, 1, 2, 3))
    distances = sum(int((a != b).sum()) for a, b in combinations(masks, 2)) / len(runs)
    assert ((masks - masks.mean(0)) ** 2).sum() == pytest.approx(distances)
    within = sum(
        sum(int((a != b).sum()) for a, b in combinations(masks[i::1][:3], 2)) / 3 for i in (0, 3)
    )
    found = {s.name: s for s in sources(masks, factors)}
    assert found["corruption"].squares == pytest.approx(1 - within / distances)


def test_order_of_runs_does_not_matter_and_equal_circuits_have_no_source() -> None:
    runs, factors = design(**LEVELS)
    masks = by_levels(runs, (0, 3))
    order = np.random.default_rng(0).permutation(len(runs))
    mixed = {name: tuple(levels[i] for i in order) for name, levels in factors.items()}
    assert [s.variance for s in sources(masks[order], mixed)] == pytest.approx(
        [s.variance for s in sources(masks, factors)]
    )
    same = np.repeat(masks[:1], len(runs), axis=0)
    assert {s.variance for s in sources(same, factors)} == {0.0}


def test_a_missing_combination_is_refused() -> None:
    runs, factors = design(corruption=2, prompts=2)
    short = {name: levels[:3] for name, levels in factors.items()}
    with pytest.raises(OptionError, match="3 runs of 2 x 1 x 2 x 1 levels: expected every"):
        sources(by_levels(runs, (0,))[:3], short)


# --- of a task ----------------------------------------------------------------------------


def test_prompts_of_one_template() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS["ioi-small"])
    every = load_task("ioi", tokenizer, n_prompts=200).info["templates"]
    assert len(every) == 13
    for template in list(every)[:3]:
        task = load_task("ioi", tokenizer, n_prompts=30, template=template, corruption="swapped")
        assert task.info["templates"] == {template: 30}
        start = tuple(tokenizer.encode(template.split(" {")[0], add_special_tokens=False))
        assert all(p.clean[: len(start)] == start for p in task.pairs)
    with pytest.raises(TaskError, match=r"0 of .* prompts are of template 'No such'"):
        load_task("ioi", tokenizer, n_prompts=4, template="No such")
    with pytest.raises(OptionError, match="only a built-in task has templates"):
        load_task([{"clean": [1], "corrupt": [2]}], None, template="x")


def test_stability_says_where_differences_come_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", "eap", "--edges", "30", "--n-prompts", "8", "--seeds", "2"]
    options += ["--templates", "2"]
    command = ["stability", "pronoun", *options, "--corruptions", "other_gender,no_gender"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--out", str(tmp_path / "new")])
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "what the differences come from" in said
    assert "8 runs" in said
    found = json.loads((tmp_path / "new" / "stability.json").read_text())
    assert len(found["runs"]) == 8
    assert [s["name"] for s in found["sources"]] == [
        "corruption",
        "template",
        "prompts",
        CROSSED,
        "corruption x prompts",
    ]
    assert sum(s["variance"] for s in found["sources"]) == pytest.approx(1)
    assert {run["corruption"] for run in found["runs"]} == {"other_gender", "no_gender"}
    assert len({run["template"] for run in found["runs"]}) == 2
    assert {run["faithfulness"] for run in found["runs"]} == {None}  # all prompts were seen
    assert None not in {run["faithfulness_seen"] for run in found["runs"]}
    for text in found["warnings"]:
        assert f"warning: {text}" in " ".join(said.split())


def test_stability_says_what_a_model_does_not_do() -> None:
    found = acdc.stability(
        "induction", 2, corruptions=("random_first", "other_before"), method="eap", n_edges=30,
        n_prompts=64,
    )  # fmt: skip
    own = [text for text in found.warnings if "the corrupt prompts are answered right" in text]
    assert any(text.startswith("corruption other_before, prompts 0: ") for text in own)
    assert found.summary()["warnings"] == list(found.warnings)
    assert found.faithfulness_seen[-1] is None


def test_seeds_of_a_selection_that_resamples() -> None:
    found = acdc.stability(
        "docstring", 2, n_method_seeds=2, method="eap", n_edges=40, n_prompts=6, stable=0.9
    )  # fmt: skip
    assert [s.name for s in found.sources] == ["prompts", "seed", "prompts x seed"]


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("docstring", {"n_templates": 2}, "n_templates is 2, but .* have 1"),
        ("ioi", {"n_templates": 0, "n_method_seeds": 2}, "n_templates 0"),
        (
            [{"clean": [1, 2], "corrupt": [1, 3]}] * 4,
            {"n_templates": 2, "model": "ioi-small"},
            "has its own prompts",
        ),
        ("ioi", {"corruptions": ("abc",), "n_seeds": 1}, "1 run: give two"),
        ("ioi", {"n_method_seeds": 3}, "n_method_seeds 3: method eap draws nothing"),
        ("ioi", {"n_templates": 3, "n_seeds": 1}, "n_templates 3 with 1 draw of prompts"),
    ],
)
def test_bad_combinations(task: object, options: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        acdc.stability(task, method="eap", n_edges=30, n_prompts=4, **options)
