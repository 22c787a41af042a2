"""What makes models of billions of parameters practical: nothing is held or computed twice."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import oracle as o
import pytest
import torch

from acdc.dictionaries.experts import experts_of
from acdc.dictionaries.neurons import Neurons
from acdc.engine.experiment import Experiment
from acdc.engine.incremental import BatchState
from acdc.engine.metrics import get_metric
from acdc.engine.patched import PatchedModel, alive_before_logits
from acdc.engine.stages import Heads
from acdc.engine.streamed import FileArena, HostArena
from acdc.engine.work import Work
from acdc.errors import OptionError
from acdc.files import tensors
from acdc.methods.acdc import acdc
from acdc.methods.eap import eap, eap_ig
from acdc.methods.sweep import sweep
from acdc.models import devices, load_model
from acdc.models.lowering.attention import Attention
from acdc.models.lowering.model import LoweredModel
from acdc.models.stored import Stored
from acdc.runs.discover import discover


def experiment_of(family: str) -> Experiment:
    """A small random model on random prompts."""
    model, task = o.small_model(family, 0, n_layers=3), o.small_task(0)
    return Experiment(model, task, get_metric("logit_diff"))


@pytest.mark.parametrize("family", ["LN", "grouped rotary", "Qwen3"])
def test_weights_of_heads_are_views_of_the_models_own(family: str) -> None:
    """No second copy by head: a matrix of a head lies in that of all heads."""
    attention = o.small_model(family, 0).layers[0].attention
    for W in (*attention.W.values(), attention.W_O):
        assert W.untyped_storage().nbytes() >= len(W) * W[0].nbytes
        assert W._base is not None  # a view
    projected = attention.project("q", torch.ones(1, 3, attention.W["q"].shape[1]))
    assert projected.shape == (1, attention.n_heads, 3, attention.W["q"].shape[2])


@pytest.mark.parametrize("family", ["LN", "grouped rotary", "Qwen3", "Gemma2"])
def test_a_circuit_computes_its_living_heads_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads from which no kept path leads to the logits are not run, and do not change it."""
    experiment = experiment_of(family)
    graph, rng = experiment.graph, np.random.default_rng(1)
    mask = rng.random(graph.n_edges) < 0.08
    alive = alive_before_logits(graph, mask)
    ran: dict[int, list[int]] = {}
    compute = Heads.compute_heads

    def recorded(self: Heads, inputs: Any, heads: Any) -> Any:
        ran[self.layer] = list(heads)
        return compute(self, inputs, heads)

    monkeypatch.setattr(Heads, "compute_heads", recorded)
    few = PatchedModel(experiment).values(mask)
    for layer, heads in ran.items():
        names = [f"a{layer}.h{head}" for head in range(experiment.model.shape.n_heads)]
        assert heads == [h for h, name in enumerate(names) if alive[graph.senders.index(name)]]
    n_alive = sum(alive[i] for i, name in enumerate(graph.senders) if name.startswith("a"))
    assert n_alive < graph.shape.n_layers * graph.shape.n_heads
    monkeypatch.setattr("acdc.engine.patched.PatchedRun._heads", lambda self, stage: None)
    np.testing.assert_allclose(few, PatchedModel(experiment).values(mask), rtol=1e-5, atol=1e-6)


def _passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count passes through the model, of any number of prompts."""
    n = [0]
    forward = LoweredModel.forward

    def counted(self: LoweredModel, *args: Any, **options: Any) -> Any:
        n[0] += 1
        return forward(self, *args, **options)

    monkeypatch.setattr(LoweredModel, "forward", counted)
    return n


def test_passes_are_not_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """EAP runs both prompts once; a circuit needs one plain run, and what is frozen one more."""
    experiment = experiment_of("LN")
    _ = experiment.batches
    n, n_batches = _passes(monkeypatch), len(experiment.batches)
    eap(experiment)
    assert n[0] == 2 * n_batches
    patched, mask = PatchedModel(experiment), np.zeros(experiment.graph.n_edges, dtype=bool)
    patched.values(mask)
    assert n[0] == 3 * n_batches
    frozen = replace(experiment, norms="frozen")
    PatchedModel(frozen).values(mask)
    assert n[0] == 5 * n_batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose weights are stored as bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    return path


@pytest.fixture
def slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that computes in bfloat16 slowly."""
    monkeypatch.setattr("acdc.models.devices.computes_fast", lambda dtype: dtype == torch.float32)


def _answers(model: LoweredModel) -> list[Any]:
    """Scores and metrics of some methods."""
    task = o.small_task(0, n_prompts=4)
    found: list[Any] = []
    for metric in ("logit_diff", "kl"):
        experiment = Experiment(model, task, get_metric(metric), 2)
        scores = eap_ig(experiment)
        mask = np.abs(scores) > np.median(np.abs(scores))
        found += [scores, PatchedModel(experiment).values(mask)]
    circuit, _ = acdc(experiment, 1e-3)
    return [*found, circuit.scores, circuit.in_circuit]


@pytest.mark.usefixtures("slow_cpu")
def test_weights_in_bfloat16_are_computed_in_float32(folder: Path) -> None:
    """On a slow CPU: half the memory, and the answers of these weights in float32, bit for bit."""
    model, _ = load_model(folder, dtype="bfloat16")
    assert (model.kept_dtype, model.dtype) == (torch.bfloat16, torch.float32)
    matrices = [W for layer in model.layers for W in layer.attention.W.values()]
    assert all(isinstance(W, Stored) and W.raw.dtype == torch.bfloat16 for W in matrices)
    assert all(isinstance(layer.mlp.W_out, Stored) for layer in model.layers if layer.mlp)
    whole, _ = load_model(folder, dtype="float32")
    assert whole.kept_dtype == torch.float32
    for got, expected in zip(_answers(model), _answers(whole), strict=True):
        assert np.array_equal(got, expected)


@pytest.mark.usefixtures("slow_cpu")
def test_neurons_and_experts_may_be_nodes_of_stored_weights(folder: Path, tmp_path: Path) -> None:
    """Their digests are those of the numbers, however these are kept."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        MixtralForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    digests: dict[str, list[str]] = {}
    for dtype in ("bfloat16", "float32"):
        (dense, _), (mixture, _) = (
            load_model(folder, dtype=dtype),
            load_model(tmp_path, dtype=dtype),
        )
        nodes = [Neurons(dense, 0), *experts_of(mixture)]
        digests[dtype] = [one.fingerprint for one in nodes]
    assert isinstance(load_model(folder, dtype="bfloat16")[0].W_U, Stored)
    assert digests["bfloat16"] == digests["float32"]


@pytest.mark.usefixtures("slow_cpu")
def test_a_run_says_that_it_is_computed_in_float32(folder: Path, tmp_path: Path) -> None:
    """On the terminal and in run.json; with a CPU that is fast nothing is said."""
    run = discover(o.small_task(0), model=str(folder), dtype="bfloat16", method="eap", n_edges=10)
    assert any("arithmetic is float32" in text for text in run.claim.warnings)
    run.save(tmp_path / "run")
    assert "arithmetic is float32" in (tmp_path / "run" / "run.json").read_text()


def test_a_cpu_says_what_it_computes_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what it has; GPUs are asked nothing."""
    monkeypatch.undo()
    for flags, fast in (({"avx512_bf16": True}, True), ({"avx512_bf16": False}, False)):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda flags=flags: flags, raising=False)
        assert devices.computes_fast(torch.bfloat16) == fast
        assert not devices.computes_fast(torch.float16)
        used = torch.bfloat16 if fast else torch.float32
        assert devices.arithmetic_of(torch.device("cpu"), torch.bfloat16) == used
        assert devices.arithmetic_of(torch.device("cuda"), torch.bfloat16) == torch.bfloat16
    assert devices.computes_fast(torch.float32)


def test_loading_casts_weights_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is opened anew again and again, so that what was read of it is let go."""
    opened: list[Any] = []
    monkeypatch.setattr("acdc.files.tensors._MOST_OPEN", 1000)
    start = tensors.safe_open
    monkeypatch.setattr(tensors, "safe_open", lambda *a, **k: opened.append(a) or start(*a, **k))
    model, _ = load_model(folder, dtype="float32")
    assert len(opened) > 10
    monkeypatch.undo()
    again, _ = load_model(folder, dtype="float32")
    assert torch.equal(model.W_U, again.W_U)
    assert torch.equal(model.layers[1].attention.W["q"], again.layers[1].attention.W["q"])


def test_a_large_unembedding_is_cast_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few outputs at a time, the same up to rounding."""
    W, x = torch.randn(70, 8).bfloat16(), torch.randn(3, 8)
    stored = Stored(W, torch.float32, torch.device("cpu"))
    monkeypatch.setattr("acdc.models.stored.MOST_SCRATCH", 160)
    torch.testing.assert_close(torch.nn.functional.linear(x, stored), x @ W.float().T)


def _streams(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the batches whose state is streamed."""
    n = [0]
    stream = BatchState.stream

    def counted(self: BatchState) -> None:
        n[0] += 1
        stream(self)

    monkeypatch.setattr(BatchState, "stream", counted)
    return n


@pytest.mark.parametrize("intervention", ["resample", "zero"])
@pytest.mark.parametrize("arena", ["files", "host"])
def test_streamed_states_find_the_same(
    intervention: str, arena: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With next to no memory: the same circuits and changes bit for bit, also of forks."""
    model = o.small_model("grouped rotary", 0)
    task = o.small_task(0, n_prompts=16)
    experiment = Experiment(model, task, get_metric("kl"), 4, intervention)
    if arena == "host":
        monkeypatch.setattr(
            "acdc.engine.incremental.arena_for", lambda device, n: HostArena(device)
        )
    n, taus = _streams(monkeypatch), (1e-3, 1e-2)
    whole, expected = acdc(experiment, 1e-3)[0], sweep(experiment, taus)[0]
    assert n == [0]
    small = 4000
    circuit, _ = acdc(experiment, 1e-3, memory=small)
    assert n == [len(experiment.batches)]
    assert np.array_equal(circuit.in_circuit, whole.in_circuit)
    assert np.array_equal(circuit.scores, whole.scores)
    for tau, found in sweep(experiment, taus, memory=small)[0].items():
        assert np.array_equal(found.in_circuit, expected[tau].in_circuit)


def test_a_streamed_state_needs_room_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line before anything is computed."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OptionError, match="set TMPDIR"):
        FileArena(1 << 20)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system reserves no room")
def test_a_streamed_state_takes_its_room_at_once() -> None:
    """A disk that all batches together fill is found before the search, not by a signal."""
    full = mock.patch("os.posix_fallocate", side_effect=OSError(28, "No space left on device"))
    with full, pytest.raises(OSError, match="No space"):
        FileArena(1 << 20)
    with mock.patch("os.posix_fallocate", wraps=os.posix_fallocate) as taken:
        FileArena(1 << 20)
    assert taken.call_args.args[1:] == (0, 1 << 20)


@pytest.mark.parametrize("metric", ["logit_diff", "kl"])
@pytest.mark.parametrize("family", ["LN", "grouped rotary"])
def test_memory_does_not_change_a_score(
    family: str, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attribution and evaluation in parts as small as they get: bit for bit the same."""
    task = o.small_task(3, n_prompts=16, lengths=(5,))
    experiment = Experiment(o.small_model(family, 0), task, get_metric(metric))
    assert len(experiment.batches) == 1
    monkeypatch.setattr("acdc.engine.footprint._CHUNK_BYTES", 4 * 5 * 12 * 4 * 6)
    for method in (eap, eap_ig):
        few = method(experiment, work=Work(1 << 10))
        np.testing.assert_array_equal(few, method(experiment))
    mask = np.abs(few) > np.median(np.abs(few))
    whole = PatchedModel(experiment).values(mask)
    np.testing.assert_array_equal(PatchedModel(experiment, memory=1).values(mask), whole)


@pytest.mark.parametrize("family", ["LN", "grouped rotary", "Gemma2"])
def test_long_prompts_read_a_few_queries_at_a_time(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patterns of a layer are never there whole, nor kept for the backward pass; scores agree."""
    experiment = experiment_of(family)
    whole = eap_ig(experiment)
    mask = np.abs(whole) > np.median(np.abs(whole))
    value = PatchedModel(experiment).values(mask)
    monkeypatch.setattr("acdc.models.lowering.attention.PATTERN_BYTES", 1)
    sizes: list[int] = []
    pattern = Attention.pattern

    def recorded(self: Attention, q: Any, *args: Any) -> Any:
        sizes.append(q.shape[-2])
        return pattern(self, q, *args)

    monkeypatch.setattr(Attention, "pattern", recorded)
    np.testing.assert_allclose(eap_ig(experiment), whole, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(PatchedModel(experiment).values(mask), value, rtol=1e-5)
    assert max(sizes) == 1
