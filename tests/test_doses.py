"""Dose and response: against a pass that ablates any share by hand, attribution and patching."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import test_cross_layer
import test_experts as experts
import test_latents
import test_latents_positions
from command_line import N_ROWS, status_of
from numpy.typing import NDArray
from oracle import FAMILIES
from parity_pairs import jsonl, parity_rows
from test_attribution import build

import acdc
from acdc.dictionaries.attach import attach_neurons
from acdc.engine.doses import _in_parts, edge_doses, node_doses
from acdc.engine.experiment import Experiment
from acdc.engine.patched import PatchedModel
from acdc.errors import CircuitFileError, OptionError
from acdc.evidence.doses import read_doses
from acdc.measure.doses import Curve, bends, coefficients, turns
from acdc.methods.eap import eap
from acdc.methods.exact import exact
from acdc.methods.nap import nap
from acdc.terminal.doses import sparkline

AT = np.array([-1.0, 0.0, 0.5, 1.0, 2.0])


def slack(experiment: Experiment) -> float:
    """What rounding may make of a value."""
    return 1e-7 if experiment.model.dtype.itemsize == 8 else 1e-4


def check_nodes(experiment: Experiment, slow: Any = None, n: int = 6) -> None:
    """Ends, slopes and, where there is one, the whole curve of an oracle by name."""
    graph, close = experiment.graph, slack(experiment)
    scores = nap(experiment)
    some = np.argsort(-np.abs(scores))[:n]
    values, slopes = node_doses(experiment, some, AT)
    np.testing.assert_allclose(values[:, 1], base_of(experiment), atol=close)
    patched = PatchedModel(experiment)
    for i, u in enumerate(some):
        out = graph.edge_sender == u
        assert values[i, 3] == pytest.approx(patched.metric(~out), abs=close)
        if slow is not None:
            names = graph.edge_names(np.flatnonzero(out))
            for c, value in zip(AT.tolist(), values[i], strict=True):
                wanted = slow.metric(dict.fromkeys(names, c))
                assert value == pytest.approx(wanted, abs=10 * close), (graph.senders[u], c)
    check_slopes(slopes, scores[some])


def base_of(experiment: Experiment) -> float:
    return experiment.plain("clean" if experiment.direction == "noising" else "corrupt")


def check_slopes(slopes: NDArray[np.float64], scores: NDArray[np.float64]) -> None:
    """Within 1 % of the score, and of the largest where that is rounding."""
    assert np.abs(scores).max() > 1e-3, "the case shows nothing"
    np.testing.assert_allclose(slopes, scores, rtol=0.01, atol=1e-5 * np.abs(scores).max())


def check_edges(experiment: Experiment, n: int = 8) -> None:
    graph, close = experiment.graph, slack(experiment)
    scores = eap(experiment)
    some = np.argsort(-np.abs(scores))[:n]
    values, slopes = edge_doses(experiment, some, AT)
    base = base_of(experiment)
    np.testing.assert_allclose(values[:, 1], base, atol=close)
    only = np.zeros(graph.n_edges, dtype=bool)
    only[some] = True
    np.testing.assert_allclose(values[:, 3], base + exact(experiment, only=only)[some], atol=close)
    check_slopes(slopes, scores[some])


def test_slopes_keep_to_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With little of it their gradients are taken of one prompt at a time, with the same result."""
    experiment, _ = build("LN")
    some, sizes = np.arange(experiment.graph.n_edges)[-4:], list[int]()

    def noting(experiment: Experiment, memory: int) -> PatchedModel:
        found = _in_parts(experiment, memory)
        sizes.append(found.experiment.batch_size)
        return found

    monkeypatch.setattr("acdc.engine.doses._in_parts", noting)
    found = [edge_doses(experiment, some, AT, memory)[1] for memory in (1 << 30, 1)]
    assert sizes == [experiment.batch_size, 1]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"direction": "denoising", "intervention": "zero"}, {"intervention": "zero"}],
    ids=["resample", "zero denoising", "zero"],
)
@pytest.mark.parametrize("family", ["LN", "GPTNeoX", "Gemma2"])
def test_any_dose_is_that_of_a_pass_by_hand(family: str, options: dict[str, Any]) -> None:
    experiment, slow = build(family, **options)
    check_nodes(experiment, slow, n=3)
    graph = experiment.graph
    some = np.argsort(-np.abs(eap(experiment)))[:3]
    for edge, row in zip(some, edge_doses(experiment, some, AT)[0], strict=True):
        for c, value in zip(AT.tolist(), row, strict=True):
            wanted = slow.metric({graph.edge_name(int(edge)): c})
            assert value == pytest.approx(wanted, abs=10 * slack(experiment))


@pytest.mark.parametrize("family", FAMILIES)
def test_slopes_are_scores_and_ends_are_patching(family: str) -> None:
    experiment, _ = build(family, 1)
    check_nodes(experiment)
    check_edges(experiment)


@pytest.mark.parametrize("intervention", ["mean", "mean-positional", "optimal"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_every_ablation(intervention: str, direction: Any) -> None:
    experiment, _ = build(
        "LN", 2, task=oracle.small_task(2, 4, (5,)), intervention=intervention,
        direction=direction, training_steps=3,
    )  # fmt: skip
    check_nodes(experiment)
    check_edges(experiment)


def test_frozen_norms_and_two_embeddings() -> None:
    for family in ("LN", "Gemma2"):
        check_nodes(build(family, 0, norms="frozen", split_embed=True)[0])
    check_edges(build("LN", 0, norms="frozen", split_embed=True)[0])


@pytest.mark.parametrize("which", test_latents.SETS)
def test_latents_of_dictionaries(which: str) -> None:
    experiment, slow = test_latents.build("LN", which)
    check_nodes(experiment, slow, n=5)
    check_edges(experiment)


@pytest.mark.parametrize("alone", [False, True])
def test_neurons(alone: bool) -> None:
    plain, _ = build("LN", 3)
    neurons = {0: (1, 4), 1: (2, 5)}
    check_nodes(attach_neurons(plain, neurons=neurons, alone=alone).experiment)


def test_cross_layer_transcoders(tmp_path: Path) -> None:
    experiment, slow = test_cross_layer.build(tmp_path)
    check_nodes(experiment, slow, n=3)
    check_edges(experiment, n=3)


@pytest.mark.parametrize("router", ["frozen", "free"])
def test_experts(router: str) -> None:
    experiment, slow = experts.both("Mixtral", router)
    check_nodes(experiment, slow, n=3)
    check_edges(experiment, n=4)


@pytest.mark.parametrize("kind", ["neurons", "outputs"])
def test_nodes_of_one_span(kind: str) -> None:
    experiment, _ = test_latents_positions.build(kind)
    check_nodes(experiment)
    check_edges(experiment)


def test_little_memory_gives_the_same() -> None:
    experiment, _ = build("LN", 0, task=oracle.small_task(0, 5, (4, 6)))
    some = np.arange(3)
    for measure in (node_doses, edge_doses):
        wanted = measure(experiment, some, AT)
        found = measure(experiment, some, AT, memory=1)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9)


def test_too_many_edges_to_write_out_are_refused() -> None:
    experiment, _ = build("LN", 0)
    part = np.zeros(experiment.graph.n_edges, dtype=bool)
    part[:5] = True
    partial = replace(experiment, candidates=part)
    with pytest.raises(OptionError, match="those left out are always ablated; ask for nodes"):
        edge_doses(partial, np.arange(2), AT)


# --- shapes -------------------------------------------------------------------------------

C = coefficients(8)


def shape(values: NDArray[np.float64], slope: float, gap: float = 1.0) -> str:
    return Curve.of("m0", slope, slope, C, values, gap=gap, bend=0.2).shape


def test_shapes_of_known_curves() -> None:
    assert shape(3 - 2 * C, -2.0) == "linear"
    assert shape(3 - 2 * C + 0.1 * C**2, -2.0) == "linear"
    assert shape(np.tanh(2 * C), 2.0) == "saturating"
    assert shape(np.minimum(C, 1.0), 1.0) == "saturating"
    assert shape(np.maximum(C, -0.5), 1.0) == "saturating", "on the side below 0 alone"
    assert shape(np.maximum(C - 0.5, 0.0), 0.0) == "threshold"
    assert shape(np.expm1(2 * C), 2.0) == "threshold", "the side of patching decides"
    assert shape(C * (1.5 - C), 1.5) == "turning"
    assert shape(0.009 * C, 0.009, gap=2.0) == "flat"
    assert shape(0.011 * C, 0.011, gap=-1.0) == "linear"
    assert shape(np.zeros(len(C)), 0.0, gap=0.0) == "flat"


def test_where_curves_bend_and_turn() -> None:
    below, above = bends(C, np.tanh(C), 1.0, 0.2)
    assert below == pytest.approx(-above)
    assert np.tanh(above) / above == pytest.approx(0.8, abs=0.01)
    assert bends(C, 0.5 * C, 0.5, 0.2) == (None, None)
    assert bends(C, C**2, 0.0, 0.2) == (0.0, 0.0)
    assert turns(C, C**3 - C) == pytest.approx((-(3**-0.5), 3**-0.5), abs=0.02)
    assert turns(C, C**3) == ()
    ripple = C + 0.03 * np.cos(12 * np.pi * C)
    assert turns(C, ripple) == (), "less than 5 % of the range is no turn"


def test_a_sparkline_spans_its_own_range() -> None:
    assert sparkline([0.0, 1.0], 8) == sparkline([5.0, 7.0], 8)
    assert len(set(sparkline([0.0, 1.0], 8))) > 4
    assert len(set(sparkline([2.0, 2.0, 2.0]))) == 1


# --- a run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doses")
    pairs = folder / "pairs.jsonl"
    pairs.write_text(jsonl(parity_rows(data / "parity" / "ln2", N_ROWS)))
    model = str(data / "parity" / "ln2")
    acdc.discover(str(pairs), model=model, method="eap-ig", n_edges=12).save(folder / "run")
    return folder / "run"


def test_doses_of_a_run(run: Path, tmp_path: Path) -> None:
    found = acdc.dose(run, metric="logit_diff", most=4, per_unit=2)
    assert len(found.curves) == 4
    assert found.n_left_out > 0
    scores = [abs(curve.score) for curve in found.curves]
    assert scores == sorted(scores, reverse=True)
    for curve in found.curves:
        assert curve.slope == pytest.approx(curve.score, rel=0.01, abs=1e-4 * scores[0])
        at = dict(zip(found.coefficients, curve.responses, strict=True))
        assert (at[0.0], at[1.0]) == (0.0, curve.effect)
    assert sum(map(len, found.groups.values())) == 4
    circuit = acdc.load_circuit(run)
    back = read_doses(found.save(tmp_path), circuit)
    assert (back.curves, back.groups, back.base) == (found.curves, found.groups, found.base)
    again = acdc.dose(run, [circuit.edges()[0]], edges=True, metric="logit_diff")
    assert [curve.name for curve in again.curves] == [circuit.edges()[0]]
    assert repr(again).startswith("<Doses of 1 edges on ")


def test_the_command_and_the_report(run: Path, capsys: Any, tmp_path: Path) -> None:
    file = run / "dose.json"
    options = ["--max", "3", "--metric", "kl", "--out", str(file)]
    assert status_of("dose", run, *options) == 0
    said = capsys.readouterr().out
    assert "kl is least in the clean run" in " ".join(said.split())
    page = acdc.report(run, tests=False).html
    assert "Dose and response" in page
    assert page.count("response to doses") == 3
    names = [curve["name"] for curve in json.loads(file.read_text())["curves"]]
    assert all(f'<div class="mono">{name}</div>' in page for name in names)
    content = json.loads(file.read_text())
    content["circuit_digest"] = "another"
    file.write_text(json.dumps(content))
    with pytest.raises(CircuitFileError, match="is of another circuit: give the doses of this"):
        acdc.report(run, tests=False)
    file.unlink()
    assert "acdc dose" in acdc.report(run, tests=False).html


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--node", "a99.h0"], "no node 'a99.h0' writes to the stream"),
        (["--edge", "a0.h0->nothing"], "no receiver 'nothing'"),
        (["--node", "m0", "--edges"], "--node with edges"),
        (["--bend", "1"], "bend 1: expected a share above 0 and below 1"),
        (["--per-unit", "0"], "per_unit"),
        (["--memory", "0"], "memory 0"),
    ],
)
def test_mistakes_are_one_line(
    run: Path, options: list[str], message: str, capsys: Any, tmp_path: Path
) -> None:
    out = tmp_path / "dose.json"
    assert status_of("dose", run, *options, "--out", out) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_empty_circuit_has_nothing_to_dose(run: Path) -> None:
    found = acdc.load_run(run)
    bare = replace(found.circuit, in_circuit=np.zeros_like(found.circuit.in_circuit))
    with pytest.raises(OptionError, match="the circuit has no edge: name what to measure with"):
        acdc.dose(replace(found, circuit=bare))
