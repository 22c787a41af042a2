"""What the engine says of shapes is checked at every call of the test run."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from shapes import PACKAGES, says_shapes

from acdc.engine import attribution, constants, incremental, metrics, patched, stages, values
from acdc.models.lowering import attention, model, norm

PUBLIC = (
    values.Block.vectors, values.Block.sum, values.Block.pull, values.coefficients,
    values.by_sender, values.gather, values.product, metrics.Metric.__call__,
    patched.PatchedModel.values, patched.PatchedModel.values_at_logits, patched.metric_of_circuit,
    norm.Norm.__call__, norm.Norm.vjp, norm.Norm.jvp, model.LoweredModel.unembed,
    model.LoweredModel.embed, attention.Attention.heads, attention.Attention.attend,
    attention.Attention.pattern, attention.Attention.project_split,
    attention.Attention.project_head, attention.Attention.place, attention.Attention.mask,
    attention.Rotary.__call__, attribution.integrate, attribution.integrate_nodes,
    attribution.node_scores, attribution.strongest, constants.Constants.at,
    constants.Constants.check, incremental.BatchState.plan, incremental.BatchState.can_change,
    incremental.BatchState.evaluate, incremental.IncrementalRun.evaluate,
    incremental.IncrementalRun.can_change, incremental.IncrementalRun.finish,
    incremental.IncrementalRun.capacity, incremental.IncrementalRun.overhead,
    stages.Gradients.tokens, stages.Gradients.of_heads, stages.Inputs.all, stages.Heads.place,
    stages.Heads.attend, stages.Heads.placed_in, stages.LatentHeads.few, stages.Mlp.run,
    stages.Mlp.few, stages.Transcoder.compute_some, stages.Cut.rerun, stages.Wanted.split,
)  # fmt: skip


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__qualname__)
def test_a_public_function_says_its_shapes(function) -> None:
    assert says_shapes(function)
    assert hasattr(function, "__wrapped__"), "its calls are not checked"


def test_no_shape_is_a_bare_name() -> None:
    """``Float[Tensor, edge]`` is taken for the name of a class and never checked."""
    for package in PACKAGES:
        home = Path(str(importlib.import_module(package).__file__)).parent
        for path in home.glob("*.py"):
            bare = re.findall(r"(?:Float|Int|Bool|Shaped)\[[\w.]+, \w+\]", path.read_text())
            assert not bare, path.name


def test_a_wrong_shape_is_caught() -> None:
    block = values.Block(0, 2, torch.zeros(2, 3, 4))
    assert values.Block.vectors.always(block, torch.zeros(2, 5, 3)).shape == (2, 5, 4)
    with pytest.raises(TypeCheckError, match="d_model"):
        values.Block.pull.always(block, torch.zeros(4))
    with pytest.raises(TypeCheckError):
        values.gather.always(torch.zeros(3))
    with pytest.raises(TypeCheckError):
        patched.PatchedModel.values.always(None, np.zeros((2, 3), dtype=bool))
    edges, scenarios = np.arange(3), np.ones((2, 4), dtype=bool)
    with pytest.raises(TypeCheckError, match="edge"):
        incremental.IncrementalRun.evaluate.always(None, edges, scenarios)
    with pytest.raises(TypeCheckError, match="pos"):
        attention.Attention.attend.always(
            None, *torch.zeros(3, 2, 5, 4).unbind(), torch.zeros(2, 5)
        )
