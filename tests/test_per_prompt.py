"""What each edge does on every prompt alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from oracle import patched_metric, small_model, small_task

import acdc
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.errors import CircuitFileError
from acdc.files.objects import JsonObject
from acdc.measure.evaluation import Evaluator
from acdc.measure.per_prompt import PerPrompt, per_prompt
from acdc.methods.eap import eap
from graphs import prune, select_top


@pytest.mark.parametrize(
    ("metric", "direction", "sign"),
    [("logit_diff", "noising", -1), ("kl", "noising", 1), ("logit_diff", "denoising", 1)],
)
def test_effects_are_those_of_the_oracle(metric: str, direction: str, sign: int) -> None:
    """Prompts of several lengths, one at a time, with and without each edge."""
    model = small_model("LN", seed=3)
    task = small_task(seed=3)
    experiment = Experiment(model, task, get_metric(metric), 2, "resample", direction)
    mask = select_top(experiment.graph, eap(experiment), 12)
    found = per_prompt(Evaluator(experiment), mask)
    names = experiment.graph.edge_names(np.flatnonzero(mask))
    assert found.edges == tuple(
        experiment.graph.edge_names(np.flatnonzero(prune(experiment.graph, mask)))
    )
    assert sorted(found.prompts) == sorted(pair.clean for pair in task.pairs)
    for place, prompt in enumerate(found.prompts):
        alone = replace(task, pairs=tuple(p for p in task.pairs if p.clean == prompt))
        assert len(alone.pairs) == 1
        whole = patched_metric(model, alone, metric, names, "resample", direction)
        for edge, effect in zip(found.edges, found.effects[:, place], strict=True):
            less = patched_metric(model, alone, metric, set(names) - {edge}, "resample", direction)
            assert effect == pytest.approx(sign * (less - whole), abs=1e-4)


def test_edges_that_help_here_and_hurt_there() -> None:
    effects = np.array([[1.0, 2.0, 3.0], [5.0, -1.0, 0.0], [-4.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
    found = PerPrompt(("a", "b", "c", "d"), ((1,), (2,), (3,)), effects)
    assert [row.edge for row in found.two_sided()] == ["c", "b"]
    c, b = found.two_sided()
    assert (c.mean, c.helps, c.hurts, c.best, c.worst) == pytest.approx((2 / 3, 2 / 3, 1 / 3, 1, 0))
    assert (b.helps, b.hurts, b.best, b.worst) == pytest.approx((1 / 3, 1 / 3, 0, 1))
    again = PerPrompt.read(JsonObject(json.loads(json.dumps(found.as_dict())), "x", "y", "z"))
    assert (again.edges, again.prompts) == (found.edges, found.prompts)
    assert (again.effects == effects).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompts", 3), ("prompts", [3]), ("prompts", [["a"]]), ("prompts", [[-1]]),
        ("effects", 3), ("effects", {"a": 3}), ("effects", {"a": [1]}),
        ("effects", {"a": ["x", 1]}), ("effects", {"a": [1e301, 1]}),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong(key: str, value: object) -> None:
    content = {"prompts": [[1], [2]], "effects": {"a": [1.0, -1.0]}} | {key: value}
    with pytest.raises(CircuitFileError):
        PerPrompt.read(JsonObject(content, "there", "an evaluation", "acdc evaluate"))


def test_evaluate_saves_them_and_the_report_shows_them(tmp_path: Path) -> None:
    run = acdc.discover("ioi", method="eap-ig", n_edges=30, n_prompts=12, n_test=12)
    run.save(tmp_path / "run")
    plain = acdc.evaluate(run, tests=False, n_resamples=10)
    assert plain.summary()["per_prompt"] is None
    found = acdc.evaluate(tmp_path / "run", tests=False, by_prompt=True, n_resamples=10)
    assert found.per_prompt is not None
    assert found.per_prompt.effects.shape == (30, 12)
    found.save(tmp_path / "run")
    page = acdc.report(tmp_path / "run").html
    first = found.per_prompt.two_sided()[0]
    section = page[page.index("Edges that help on some prompts and hurt on others") :][:3000]
    assert first.edge.replace(">", "&gt;").replace("<", "&lt;") in section
    assert " gave " in section or " to" in section
