"""What the engine says of shapes is checked at every call of the test run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from shapes import says_shapes

from acdc.engine import metrics, patched, values
from acdc.models.lowering import attention, model, norm

PUBLIC = (
    values.Block.vectors, values.Block.sum, values.Block.pull, values.coefficients,
    values.by_sender, values.gather, values.product, metrics.Metric.__call__,
    patched.PatchedModel.values, patched.PatchedModel.values_at_logits, patched.metric_of_circuit,
    norm.Norm.__call__, norm.Norm.vjp, norm.Norm.jvp, model.LoweredModel.unembed,
    model.LoweredModel.embed, attention.Attention.heads,
)  # fmt: skip


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__qualname__)
def test_a_public_function_says_its_shapes(function) -> None:
    assert says_shapes(function)
    assert hasattr(function, "__wrapped__"), "its calls are not checked"


def test_a_wrong_shape_is_caught() -> None:
    block = values.Block(0, 2, torch.zeros(2, 3, 4))
    assert values.Block.vectors.always(block, torch.zeros(2, 5, 3)).shape == (2, 5, 4)
    with pytest.raises(TypeCheckError, match="d_model"):
        values.Block.pull.always(block, torch.zeros(4))
    with pytest.raises(TypeCheckError):
        values.gather.always(torch.zeros(3))
    with pytest.raises(TypeCheckError):
        patched.metric_of_circuit.always(None, np.zeros(3))
