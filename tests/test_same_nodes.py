"""Runs that are compared have one graph: latents and neurons are chosen once, for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import acdc
from acdc.evidence.directions import discover_both
from acdc.evidence.frontier import sweep
from acdc.evidence.stability import stability

FEW: dict[str, Any] = {"n_prompts": 6, "max_latents": 12}
NODES = [{"neurons": True}, {"saes": "bundled"}]


@pytest.mark.parametrize("nodes", NODES[1:], ids=["latents"])
def test_both_directions(nodes: dict[str, Any], tmp_path: Path) -> None:
    found = discover_both("ioi", method="eap-ig", n_edges=60, steps=2, **nodes, **FEW)
    shapes = [run.circuit.graph.shape for run in found.runs]
    assert shapes[0] == shapes[1]
    assert shapes[0].sites
    edges = found.comparison.edges
    assert edges.common
    found.save(tmp_path / "both")
    assert (tmp_path / "both" / "directions.svg").stat().st_size > 1000


@pytest.mark.parametrize("nodes", NODES[:1], ids=["neurons"])
def test_stability(nodes: dict[str, Any], tmp_path: Path) -> None:
    found = stability("ioi", 2, method="eap", n_edges=60, **nodes, **FEW)
    assert found.graph.shape.sites
    assert found.masks.shape == (2, found.graph.n_edges)
    assert 0 < found.overlap < 1
    found.save(tmp_path / "stable")


def test_a_sweep_finds_what_acdc_finds() -> None:
    asked = {**FEW, "neurons": True, "candidates": 30, "metric": "kl"}
    taus = (0.003, 0.5)
    frontier = sweep("ioi", taus, **asked)
    for tau, point in zip(taus, frontier.points, strict=True):
        alone = acdc.discover("ioi", method="acdc", threshold=tau, **asked)
        assert alone.circuit.graph.shape == point.circuit.graph.shape
        np.testing.assert_array_equal(alone.circuit.in_circuit, point.circuit.in_circuit)
        assert alone.faithfulness == pytest.approx(point.claim.faithfulness)
    sizes = [point.circuit.n_edges for point in frontier.points]
    assert sizes[0] > sizes[1] > 0
