"""Graphs split by spans: the engine against the oracle, and split against unsplit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracle import FAMILIES
from test_engine import Case, cases, check_case, quick, scale_of

from acdc.engine.experiment import Experiment
from acdc.engine.incremental import IncrementalRun
from acdc.engine.inputs import Sums
from acdc.engine.node_attribution import integrate_nodes
from acdc.engine.patched import PatchedModel, SoftPatchedModel
from acdc.methods.acdc import acdc
from acdc.methods.eap import at_base, clean_corrupted, eap, eap_ig, eap_ig_activations
from acdc.methods.exact import exact
from acdc.methods.gim import gim
from acdc.methods.ifr import ifr
from acdc.methods.nap import nap_ig
from acdc.methods.sweep import sweep
from graphs.order import edge_order, receiver_order
from graphs.plan import Planner

SPLIT_SIZES = [(1, 1), (1, 2), (2, 1), (1, 2), (2, 2)]


@st.composite
def split_cases(draw: Any, family: str | None = None) -> Case:
    """Cases of :func:`test_engine.cases`, smaller and split."""
    positions = draw(st.sampled_from(["token", "span", "span"]))
    lengths = [(3,), (4,)] if positions == "token" else [(3,), (4,), (3, 4)]
    return dataclasses.replace(
        draw(cases(family)),
        positions=positions,
        size=draw(st.sampled_from(SPLIT_SIZES)),
        lengths=draw(st.sampled_from(lengths)),
        n_prompts=draw(st.integers(2, 3)),
    )


# --- against the oracle -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_circuits_and_scores_are_those_of_sequential_acdc(family: str) -> None:
    @quick(2)
    @given(split_cases(family))
    def check(case: Case) -> None:
        check_case(case)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_circuits_are_those_of_sequential_acdc(family: str) -> None:
    @quick(24)
    @given(split_cases(family))
    def check(case: Case) -> None:
        check_case(case)

    check()


@quick(24)
@given(split_cases(), st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
def test_patched_model_equals_the_explicit_forward(case: Case, density: float) -> None:
    built = case.build()
    graph, slow = built.experiment.graph, built.oracle
    mask = np.random.default_rng(case.seed).random(graph.n_edges) < density
    wanted = slow.without(oracle.share_of(graph, ~mask))
    scale = scale_of([wanted, slow.without(())], slow)
    assert abs(PatchedModel(built.experiment).metric(mask) - wanted) < 1e-4 * scale
