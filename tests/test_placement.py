"""Models that do not fit one device: layers on several, or in the memory of the host.

The GPUs are none (:mod:`simulated`): what mixes two of them fails, and numbers are the CPU's.
"""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulated import DEVICE, OTHER, OnDevice, device, room
from test_lowering import FAMILIES, VOCAB, build

import acdc
from acdc.cli import main
from acdc.engine.checkpoint import Checkpoint
from acdc.engine.streamed import HostArena
from acdc.errors import DeviceError, OptionError
from acdc.models.devices import resolve_placement
from acdc.models.lowering import LoweredModel
from acdc.models.stored import Stored, keep_stored
from acdc.runs.cells import _agree
from benchmarks.subjects import Size, random_folder, random_task

SIZE = Size(
    n_layers=3, d_model=16, n_heads=2, d_vocab=61, n_ctx=16, scale=4.0, n_prompts=2, n_pos=6
)
METHODS: dict[str, dict[str, Any]] = {
    "eap-ig": {"n_edges": 20, "steps": 2},
    "acdc": {"threshold": 0.02},
    "edge-pruning": {"n_edges": 20, "mask_steps": 3},
}
BOTH = f"{DEVICE},{OTHER}"
FITS, LAYER = 1 << 30, 20_000
"""Bytes: all of it, and two parts of it."""


@pytest.fixture(scope="module")
def folder() -> Iterator[str]:
    """A random GPT-2, whose unembedding is its embedding."""
    with random_folder(SIZE) as path:
        yield str(path)


@functools.cache
def plainly(folder: str, method: str) -> list[Any]:
    """What a method finds where all is on the CPU."""
    return found(folder, method)


def found(model: Any, name: str, memory: int = 1 << 30, **asked: Any) -> list[Any]:
    """What a method finds, and what an evaluation says of it."""
    task = random_task(SIZE)
    run = acdc.discover(
        task, model=model, method=name, memory=memory, n_select=0, **METHODS[name], **asked
    )
    measured = acdc.evaluate(run, task=task, model=model, n_resamples=5, tests=False)
    values = [one.evaluation.metric_circuit for one in measured.measured]
    return [run.circuit.in_circuit, run.circuit.scores, np.array(values)]


def held(model: LoweredModel) -> list[str]:
    """Where each layer's weights are held, and those of the unembedding."""
    return [where(W) for W in (*(layer.attention.W_O for layer in model.layers), model.W_U)]


def where(W: torch.Tensor) -> str:
    """Where a matrix is held."""
    return str(W.raw.device if isinstance(W, Stored) else W.device)


# --- the memory of the host ---------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("memory", [1 << 30, pytest.param(1 << 14, marks=pytest.mark.slow)])
def test_offloaded_weights_give_the_same_to_the_last_byte(
    folder: str, method: str, memory: int
) -> None:
    plain = plainly(folder, method) if memory == 1 << 30 else found(folder, method, memory)
    for got, expected in zip(found(folder, method, memory, offload="cpu"), plain, strict=True):
        assert np.array_equal(got, expected)


def test_offloaded_weights_are_held_once_and_not_copied(folder: str) -> None:
    model, _ = acdc.load_model(folder, offload="cpu")
    assert model.offloads
    assert not acdc.load_model(folder)[0].offloads
    q, k = (model.layers[0].attention.W[kind] for kind in "qk")
    assert isinstance(q, Stored)
    assert isinstance(k, Stored)
    assert q.as_is
    assert q.raw.untyped_storage().data_ptr() == k.raw.untyped_storage().data_ptr()


def test_a_run_says_where_its_weights_were(folder: str, tmp_path: Path) -> None:
    """In run.json; and a model that is given says it itself."""
    asked: dict[str, Any] = {"method": "eap", "n_edges": 10, "n_select": 0}
    task = random_task(SIZE)
    acdc.discover(task, model=folder, offload="cpu", **asked).save(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["offload"] == "cpu"
    assert acdc.load_run(tmp_path / "run").settings.offload == "cpu"
    given = acdc.load_model(folder, offload="cpu")
    assert acdc.discover(task, model=given, **asked).settings.offload == "cpu"
    with pytest.raises(OptionError, match="offload 'cpu' was asked for, the model given has none"):
        acdc.discover(task, model=acdc.load_model(folder), offload="cpu", **asked)


def test_where_weights_were_is_no_part_of_what_was_asked(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint, or a cell of a study, goes on with weights elsewhere."""
    asked: list[dict[str, Any]] = []

    class Told(Checkpoint):
        def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
            asked.append(settings)
            super().__init__(folder, settings)

    monkeypatch.setattr("acdc.runs.discover.Checkpoint", Told)
    options: dict[str, Any] = {"method": "eap", "n_edges": 10, "n_select": 0, "model": folder}
    for offload in ("none", "cpu"):
        run = acdc.discover(random_task(SIZE), offload=offload, checkpoint=tmp_path, **options)
        assert _agree(run.settings, run.settings.replace(offload="cpu"))
    assert asked[0] == asked[1]


# --- several devices ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "n_bytes", "method"),
    [
        ({"device": BOTH}, FITS, "eap-ig"),
        ({"device": BOTH}, FITS, "edge-pruning"),
        ({"device": "auto"}, LAYER, "acdc"),
        pytest.param({"device": BOTH}, FITS, "acdc", marks=pytest.mark.slow),
        pytest.param({"device": "auto"}, LAYER, "eap-ig", marks=pytest.mark.slow),
        pytest.param({"device": "auto"}, LAYER, "edge-pruning", marks=pytest.mark.slow),
        pytest.param({"offload": "cpu"}, FITS, "eap-ig", marks=pytest.mark.slow),
        pytest.param({"offload": "cpu"}, FITS, "edge-pruning", marks=pytest.mark.slow),
    ],
)
def test_methods_cross_devices(
    folder: str, method: str, place: dict[str, Any], n_bytes: int
) -> None:
    expected = plainly(folder, method)
    with device(), room(n_bytes):
        got = found(folder, method, **{"device": str(DEVICE)} | place)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("place", "n_bytes"),
    [({"device": BOTH}, FITS), ({"device": "auto"}, LAYER), ({"offload": "cpu"}, FITS)],
)
def test_every_family_crosses_devices(
    family: str, place: dict[str, Any], n_bytes: int, tmp_path: Path
) -> None:
    build(family).save_pretrained(tmp_path)
    tokens = torch.randint(0, VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))
    expected = _logits_and_gradient(acdc.load_model(tmp_path)[0], tokens)
    with device(), room(n_bytes):
        model, _ = acdc.load_model(tmp_path, **{"device": str(DEVICE)} | place)
        got = [x.cpu() for x in _logits_and_gradient(model, tokens.to(DEVICE))]
    assert set(held(model)) != {str(DEVICE)}
    for layer, at in zip(model.layers, held(model), strict=False):
        assert {where(W) for W in layer.attention.W.values()} == {at}
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


def _logits_and_gradient(model: LoweredModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    embeds = [x.detach().requires_grad_() for x in model.embed(tokens)]
    final = model.forward(tokens, embeds).final
    assert final is not None
    logits = model.unembed(final)
    return [logits.detach(), *torch.autograd.grad(logits.square().mean(), embeds[:1])]


def test_what_is_brought_is_given_back(folder: str) -> None:
    """Autograd keeps weights for the backward pass, not what was brought to the device."""
    with device(), room(FITS):
        model, _ = acdc.load_model(folder, device=str(DEVICE), offload="cpu")
        tokens = torch.zeros(1, 2, dtype=torch.long, device=DEVICE)
        embeds = [x.detach().requires_grad_() for x in model.embed(tokens)]
        final = model.forward(tokens, embeds).final
        here = [x for x in gc.get_objects() if type(x) is OnDevice]
    assert final is not None
    assert final.requires_grad
    assert max(x.numel() for x in here) <= 2 * 2 * 4 * SIZE.d_model


def test_layers_live_where_they_fit(folder: str) -> None:
    """Whole, tied weights together; what fits no GPU is in the memory of the host."""
    with device():
        for name, n_bytes, expected in (
            (BOTH, FITS, [DEVICE, OTHER, OTHER, DEVICE]),
            ("auto", FITS, [DEVICE] * 4),
            ("auto", LAYER, [OTHER, "cpu", "cpu", DEVICE]),
        ):
            with room(n_bytes):
                model, _ = acdc.load_model(folder, device=name)
            assert held(model) == list(map(str, expected))
            assert model.device == DEVICE
            for layer, at in zip(model.layers, held(model), strict=False):
                assert layer.mlp is not None
                assert {where(W) for W in (*layer.attention.W.values(), layer.mlp.W_out)} == {at}
        with room(FITS):
            native, _ = acdc.load_model("ioi-small", device=BOTH)
    assert {str(DEVICE), str(OTHER)} == set(held(native))


def test_a_product_is_computed_where_its_weight_is() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    module = torch.nn.Linear(4, 5)
    expected = module(x)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    with device() as moves:
        keep_stored(module, torch.float32, torch.float32, DEVICE, lambda _: OTHER)
        there = OnDevice(x.detach()).requires_grad_()
        got = module(there)
        (pulled,) = torch.autograd.grad(got.sum(), there)
        assert module.weight.data.raw.device == OTHER  # type: ignore[attr-defined]
        assert (module.weight.device, got.device, pulled.device) == (DEVICE,) * 3
        assert moves.n_moved == 0
        torch.testing.assert_close(got.cpu(), expected.detach())
        torch.testing.assert_close(pulled.cpu(), wanted)


def test_a_search_beside_offloaded_weights_keeps_its_state_there(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    start = HostArena.__init__
    monkeypatch.setattr(HostArena, "__init__", lambda self, at: made.append(at) or start(self, at))
    expected = plainly(folder, "acdc")
    assert not made
    with device(), room(FITS):
        got = found(folder, "acdc", device=str(DEVICE), offload="cpu")
    assert set(made) == {DEVICE}
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-8)


# --- what is refused ----------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cuda:0,cpu:9"], "device 'cuda:0' is not there: this machine has cpu"),
        (["--device", "cpu,cpu"], "device 'cpu,cpu': several devices are GPUs, each once"),
        (["--device", "cpu,"], "unknown device ''"),
        (["--device", "auto"], "device 'auto': this machine has no GPU, only cpu"),
        (["--offload", "gpu"], "offload 'gpu': expected one of none, cpu"),
    ],
)
def test_bad_values_get_one_line(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as done:
        main(["discover", "ioi", "--method", "eap", "--out", str(out), *options])
    assert done.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not out.exists()


def test_what_does_not_go_together(folder: str) -> None:
    with device(), room(LAYER):
        with pytest.raises(DeviceError, match=r"do not fit there .* or choose auto"):
            acdc.load_model(folder, device=BOTH)
        for name in (BOTH, "auto"):
            with pytest.raises(DeviceError, match=f"offload 'cpu' with device '{name}'"):
                acdc.load_model(folder, device=name, offload="cpu")
        with pytest.raises(DeviceError, match="GPUs, each once"):
            resolve_placement(f"{DEVICE},{DEVICE}")
    with pytest.raises(DeviceError, match="unknown offload 'gpu'"):
        acdc.load_model(folder, offload="gpu")
