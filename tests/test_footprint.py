"""What is said of memory is what is held."""

from __future__ import annotations

from dataclasses import replace

import oracle as o
import pytest

from acdc.engine.experiment import Experiment
from acdc.engine.footprint import is_streamed, said, state_bytes
from acdc.engine.incremental import BatchState, IncrementalRun
from acdc.engine.inputs import Changes
from acdc.engine.metrics import get_metric
from acdc.runs.discover import Silent, discover


def held(state: BatchState) -> int:
    """Bytes of all that a state keeps: each piece of memory once, whoever looks at it."""
    inputs = state.inputs
    assert isinstance(inputs, Changes)
    tensors = [
        *(inputs.out.vectors, inputs.ablation.vectors),
        *(inputs._base.values()),
        *(inputs._base_raw.values()),
        *(state.now.placed.values()),
    ]
    pieces = (x.untyped_storage() for x in tensors)
    return sum({piece.data_ptr(): piece.nbytes() for piece in pieces}.values())


@pytest.mark.parametrize("family", ["LN", "grouped rotary", "Qwen3", "Gemma2"])
def test_the_state_of_a_search_is_as_large_as_predicted(family: str) -> None:
    model, task = o.small_model(family, 0, n_layers=6), o.small_task(0)
    experiment = Experiment(model, task, get_metric("logit_diff"))
    run = IncrementalRun(experiment)
    assert state_bytes(experiment) == sum(map(held, run.states.values()))


def test_what_is_said_follows_the_memory() -> None:
    experiment = Experiment(o.small_model("LN", 0), o.small_task(0), get_metric("logit_diff"))
    state = state_bytes(experiment)
    assert not is_streamed(experiment, 2 * state)
    assert is_streamed(experiment, 2 * state - 1)
    assert "in memory" in said(experiment, 2 * state, keeps_state=True)
    assert "streamed" in said(experiment, state, keeps_state=True)
    assert "state" not in said(experiment, state, keeps_state=False)
    double = replace(experiment, task=replace(experiment.task, pairs=2 * experiment.task.pairs))
    assert state_bytes(double) == 2 * state


def test_a_search_says_what_it_takes_before_it_begins() -> None:
    class Noting(Silent):
        def __init__(self) -> None:
            self.told: list[str] = []

        def advance(self, n: int) -> None:
            self.told.append("step")

        def note(self, text: str) -> None:
            self.told.append(text)

    names = ("clean", "corrupt", "answers", "wrong_answers")
    rows = [{name: [*getattr(p, name)] for name in names} for p in o.small_task(0).pairs]
    for method, words in (("acdc", "state"), ("eap", "passes")):
        reporter = Noting()
        discover(rows, model=o.small_model("LN", 0), method=method, n_edges=9, holdout=0.0,
                 reporter=reporter)  # fmt: skip
        assert reporter.told[0].startswith(words)
        assert "MiB" in reporter.told[0]
