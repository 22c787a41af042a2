"""Everything that computes runs on a device that is none, where hosts and devices do not mix.

The numbers are those of the CPU, since they are computed there (:mod:`simulated`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from latent_oracle import random_dictionary
from simulated import DEVICE, OTHER, Device, MixedDevicesError, OnDevice, device, moved
from test_parity import DATA, experiment

import acdc
from acdc.ablations import ABLATIONS
from acdc.dictionaries.attach import attach, attach_neurons
from acdc.engine.experiment import Experiment
from acdc.evidence.verdicts import Trials
from acdc.measure.evaluation import Evaluator
from acdc.methods import METHODS
from acdc.models import Loaded
from acdc.models.folder import ModelFolder
from acdc.models.native import load_native
from acdc.models.stored import keep_stored
from acdc.runs.building import with_constants

FEW: dict[str, dict[str, Any]] = {
    "edge-pruning": {"mask_steps": 3},
    "subnetwork-probing": {"mask_steps": 3},
    "acdc": {"threshold": 0.3},
    "acdc-two-sided": {"threshold": 0.3},
    "eap-acdc": {"threshold": 0.3},
}
TRIALS = Trials(n_random=3, n_permutations=9, n_knockouts=2, n_edges=2)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> Iterator[Loaded]:
    """Return a model whose weights are on the device, or on two in turn."""
    with device():
        bridge, _ = load_native(ModelFolder(DATA / "ln2"), torch.device("cpu"), torch.float32)
        moved(bridge)
        if request.param == 2:
            places = itertools.cycle([DEVICE, OTHER])
            keep_stored(bridge, torch.float32, torch.float32, DEVICE, lambda _: next(places))
        loaded = acdc.load_model(bridge)
        assert len(loaded[0].devices) == request.param
        yield loaded


@pytest.fixture(autouse=True)
def _entered() -> Iterator[None]:
    with device():
        yield


def here() -> Experiment:
    """Two prompts on the CPU."""
    whole = experiment("ln2", "logit_diff")
    return whole.on(replace(whole.task, pairs=whole.task.pairs[:2]))


def there(model: Loaded) -> Experiment:
    """The same on the device."""
    return replace(here(), model=model[0])


# --- the device itself --------------------------------------------------------------------


def test_what_cuda_refuses_is_refused() -> None:
    x, y = OnDevice(torch.arange(6.0).reshape(2, 3)), torch.ones(2, 3)
    at = torch.tensor([1], device=DEVICE)
    generator = torch.Generator()
    refused: list[Callable[[], Any]] = [
        lambda: x + y,
        lambda: y * x,
        lambda: torch.cat([x, y]),
        lambda: x @ y.T,
        lambda: torch.where(x > 0, x, y),
        lambda: y[at],
        lambda: x.index_select(0, at.cpu()),
        lambda: x.scatter_add(0, at.cpu()[None].expand(2, 3), x),
        lambda: torch.rand(2, generator=generator, device=DEVICE),
        lambda: x.__setitem__(at, y[:1]),
    ]
    for call in refused:
        with pytest.raises(MixedDevicesError):
            call()
    with pytest.raises(RuntimeError, match=r"numpy\(\) is not supported"):
        x.numpy()
    with pytest.raises(RuntimeError, match=r"numpy\(\) is not supported"):
        np.asarray(x)


def test_what_cuda_allows_is_allowed_and_counted() -> None:
    x = OnDevice(torch.arange(6.0).reshape(2, 3))
    assert all(y.device == DEVICE for y in (x * 2, x + torch.tensor(2.0), x[torch.tensor([1])]))
    assert x[[1, 0]].device == torch.zeros(2, device=DEVICE).device == x[None].device == DEVICE
    x[:, 0] = torch.tensor([7.0, 8.0])
    weights = x.clone().requires_grad_()
    (weights * x).sum().backward()
    assert isinstance(weights.grad, OnDevice)
    assert Device.n_moved == 0
    assert (x.cpu().numpy()[:, 0].tolist(), float(x[0, 0]), x.tolist()[1]) == ([7, 8], 7, [8, 4, 5])
    assert Device.n_moved == 3
    assert not isinstance(x.to("cpu"), OnDevice)


# --- methods ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_methods(model: Loaded, name: str) -> None:
    options = FEW.get(name, {})
    options = options if "threshold" in options else {**options, "n_edges": 30}
    found, wanted = (METHODS[name].find(e, **options).circuit for e in (there(model), here()))
    np.testing.assert_array_equal(found.in_circuit, wanted.in_circuit)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("intervention", ABLATIONS)
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_ablations(model: Loaded, intervention: str, direction: str) -> None:
    circuits = np.random.default_rng(0).random((2, 110)) < 0.7
    values = []
    for one in (there(model), here()):
        own = replace(one, intervention=intervention, direction=direction, training_steps=2)
        evaluator = Evaluator(with_constants(own))
        values.append([evaluator.evaluate(circuit).metric_circuit for circuit in circuits])
    np.testing.assert_allclose(*values, rtol=1e-5)


# --- latents and neurons ------------------------------------------------------------------


def with_latents(one: Experiment, what: str) -> Experiment:
    if what == "neurons":
        return attach_neurons(one, neurons={0: [1, 3], 1: [2]}, alone=True).experiment
    kind, site = {"sae": ("jumprelu", "resid_mid"), "transcoder": ("skip_transcoder", "mlp_in")}[
        what
    ]
    return attach(one, [random_dictionary(here().model, kind, site, 1)]).experiment


@pytest.mark.parametrize("what", ["neurons", "sae", "transcoder"])
@pytest.mark.parametrize("method", ["eap-ig", "acdc"])
def test_latents(model: Loaded, what: str, method: str) -> None:
    options = {"threshold": 0.2} if method == "acdc" else {"n_edges": 40}
    both = [METHODS[method].find(with_latents(e, what), **options).circuit
            for e in (there(model), here())]  # fmt: skip
    np.testing.assert_array_equal(both[0].in_circuit, both[1].in_circuit)
    np.testing.assert_allclose(both[0].scores, both[1].scores, rtol=1e-4, atol=1e-7)


# --- whole runs ---------------------------------------------------------------------------


def rows() -> list[dict[str, Any]]:
    """Prompts with two spans."""
    return [
        {"clean": list(p.clean), "corrupt": list(p.corrupt), "answers": list(p.answers),
         "wrong_answers": list(p.wrong_answers),
         "spans": {"first": [0, 1], "last": [len(p.clean) - 1]}}
        for p in experiment("ln2", "kl").task.pairs[:4]
    ]  # fmt: skip


@pytest.mark.parametrize("positions", ["none", "span"])
def test_a_run_and_its_evaluation(model: Loaded, positions: str) -> None:
    run = acdc.discover(rows(), model=model, method="eap", n_edges=30, positions=positions)
    wanted = acdc.discover(
        rows(), model=str(DATA / "ln2"), method="eap", n_edges=30, positions=positions
    )
    assert run.settings.device == ",".join(map(str, model[0].devices))
    np.testing.assert_array_equal(run.circuit.in_circuit, wanted.circuit.in_circuit)
    how: dict[str, Any] = {"trials": TRIALS} if positions == "span" else {"tests": False}
    measured = [
        acdc.evaluate(one, task=rows(), model=one_model, n_resamples=5, **how)
        for one, one_model in ((run, model), (wanted, None))
    ]
    values = [[m.evaluation.metric_circuit for m in found.measured] for found in measured]
    np.testing.assert_allclose(*values, rtol=1e-5)


# --- what waits for the device ------------------------------------------------------------


def n_moved(call: Callable[[], Any]) -> int:
    Device.n_moved = 0
    call()
    return Device.n_moved


def test_a_forward_pass_does_not_wait(model: Loaded) -> None:
    tokens = torch.tensor([p.clean for p in here().task.pairs], device=DEVICE)
    assert n_moved(lambda: model[0].forward(tokens)) == 0


def test_a_step_of_training_masks_waits_a_few_times(model: Loaded) -> None:
    """For its loss, the sparsity that is told, and its share of the mean; not to find a shift."""
    method, one = METHODS["edge-pruning"], there(model)

    def train(n: int) -> int:
        return n_moved(lambda: method.scores(one, method.options(mask_steps=n)))

    few, more = train(2), train(6)
    assert (more - few) / 4 <= 4
