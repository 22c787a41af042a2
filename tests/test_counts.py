"""The passes that a forecast says of a method are those that the method makes."""

from __future__ import annotations

from typing import Any

import oracle as o
import pytest
from torch import Tensor, nn

from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.methods import METHODS
from acdc.settings import Settings

N_EDGES = 5
COUNTED = {
    name: counts
    for name, method in METHODS.items()
    if (counts := method.counts(method.configured(Settings.of("x", method=name, n_edges=N_EDGES))))
}


@pytest.mark.parametrize("name", COUNTED)
def test_passes_that_are_said_are_made(name: str) -> None:
    model, task = o.small_model("LN", 3), o.small_task(3, n_prompts=6)
    experiment = Experiment(model, task, get_metric("logit_diff"), batch_size=4)
    assert experiment.batches  # the model's own passes are no method's
    n_rows = sum(len(pair.clean) for pair in task.pairs)
    last = model.layers[-1].mlp.module
    forwards = backwards = 0

    def back(grad: Tensor) -> None:
        nonlocal backwards
        backwards += grad.shape[:-1].numel()

    def count(module: nn.Module, inputs: Any, out: Tensor) -> None:
        nonlocal forwards
        forwards += out.shape[:-1].numel()
        if out.requires_grad:
            out.register_hook(back)

    hook = last.register_forward_hook(count)
    METHODS[name].find(experiment, n_edges=N_EDGES)
    hook.remove()
    said = COUNTED[name]
    assert forwards == said[0] * n_rows
    if name != "relp":  # its gradient goes by another way than through the module
        assert backwards == said[1] * n_rows
