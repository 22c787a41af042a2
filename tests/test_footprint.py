"""What is said of memory is what is held."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import oracle as o
import psutil
import pytest
import torch
import transformers

from acdc.cli import main
from acdc.engine import allocator, attribution
from acdc.engine.attribution import Gradients, Point, gradients
from acdc.engine.experiment import Experiment
from acdc.engine.footprint import Footprint
from acdc.engine.incremental import BatchState, IncrementalRun
from acdc.engine.inputs import Changes
from acdc.engine.metrics import get_metric
from acdc.errors import OptionError
from acdc.methods import METHODS
from acdc.models import devices, load_model, quiet
from acdc.models.described import sizes_of_config
from acdc.models.devices import free_memory
from acdc.models.hugging_face import _read_weights
from acdc.models.lowering.model import LoweredModel, Trace
from acdc.models.placement import room_on
from acdc.models.sizes import Sizes
from acdc.runs.discover import discover
from acdc.runs.forecast import Forecast, foresee
from acdc.runs.reporter import Silent
from acdc.settings import Settings
from benchmarks.memory import LLAMAS
from graphs.order import edge_order, receiver_order


def random_folder(family: str, folder: Path) -> None:
    """Write a small random model of a family of transformers."""
    name = f"{family}Text" if family == "Gemma3" else family
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    few = {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0}
    small = {"vocab_size": 20, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0}
    own: dict[str, Any] = {
        "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16},
        "GPTJ": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16, "rotary_dim": 4},
        "GPTNeo": {"hidden_size": 16, "num_layers": 2, "num_heads": 4,
                   "attention_types": [[["global", "local"], 1]]},
        "GPTNeoX": sizes | {"intermediate_size": 24, "num_attention_heads": 2},
        "OPT": sizes | {"ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 0},
        "Mixtral": sizes | few | {"num_local_experts": 3},
        "Qwen3Moe": sizes | few | {"num_experts": 3, "num_experts_per_tok": 2,
                                   "moe_intermediate_size": 12},
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**small | own.get(family, sizes | few))
    kind = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    module = getattr(transformers, kind)(config)
    with quiet():
        module.save_pretrained(folder)


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


FAMILIES = ["GPT2", "GPTNeo", "GPTNeoX", "GPTJ", "OPT", "Llama", "Qwen3", "Gemma2", "Gemma3",
            "Olmo2", "Phi3", "Mixtral", "Qwen3Moe"]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_told_before_the_weights_are_read(family: str, tmp_path: Path) -> None:
    """They are those of the loaded model, and so are all that a search is foretold to take."""
    random_folder(family, tmp_path)
    told: list[Sizes] = []
    reading = mock.patch("acdc.models.hugging_face._read_weights", wraps=_read_weights)
    with reading as read:

        def before(sizes: Sizes, tokenizer: object) -> None:
            assert not read.called
            told.append(sizes)

        model, _ = load_model(str(tmp_path), before=before)
    loaded = Sizes.of(model)  # where one matrix makes queries, keys and values it may be split
    assert told[0].weights <= loaded.weights <= 1.4 * told[0].weights
    told[0] = replace(told[0], weights=loaded.weights)
    assert told == [loaded]
    experiment = Experiment(model, o.small_task(0), get_metric("kl"))
    assert Footprint.of_sizes(told[0], whole_vocab=True) == experiment.footprint


@pytest.mark.parametrize("family", ["LN", "grouped rotary", "Qwen3", "Gemma2"])
def test_the_state_of_a_search_is_as_large_as_predicted(family: str) -> None:
    model, task = o.small_model(family, 0, n_layers=6), o.small_task(0)
    experiment = Experiment(model, task, get_metric("logit_diff"))
    run = IncrementalRun(experiment)
    assert experiment.state_bytes == sum(map(held, run.states.values()))


def one_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[torch.Tensor]]:
    """Fail where a run begins while the projections of another are held; return those of all."""
    forward, before = LoweredModel.forward, list[weakref.ref[torch.Tensor]]()

    def noting(model: LoweredModel, *args: Any, **more: Any) -> Trace:
        assert not any(x() is not None for x in before)
        trace = forward(model, *args, **more)
        before.append(weakref.ref(trace.q[0]))
        return trace

    monkeypatch.setattr(LoweredModel, "forward", noting)
    return before


def test_a_search_starts_with_one_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment(o.small_model("LN", 0), o.small_task(0), get_metric("logit_diff"))
    before = one_run_at_a_time(monkeypatch)
    run = IncrementalRun(experiment)
    assert len(before) == 2 * len(run.states)


@pytest.mark.parametrize("family", ["LN", "grouped rotary", "Gemma2"])
def test_a_search_adds_no_more_to_its_state_than_predicted(family: str) -> None:
    """Each receiver reads something of its own once something above it was committed."""
    experiment = Experiment(o.small_model(family, 0), o.small_task(0), get_metric("logit_diff"))
    run = IncrementalRun(experiment)
    for receiver in receiver_order(run.graph):
        edges = edge_order(run.graph, receiver)
        if run.can_change(edges).any():
            _, outcomes = run.evaluate(edges[:1], np.ones((1, 1), dtype=bool))
            run.commit(outcomes, 0)
        run.finish(receiver, edges[1:])
    moved = [
        sum(x.nbytes for x in (*state.inputs._read.values(), *state.inputs._raw.values()))
        for state in run.states.values()
        if isinstance(state.inputs, Changes)
    ]
    every = sum(experiment.moved_bytes_by_batch)
    assert sum(moved) <= every
    if not experiment.footprint.sizes.n_posts:
        assert sum(moved) > 0.9 * every


def foreseen(experiment: Experiment, memory: int = 1 << 30, **asked: Any) -> Forecast:
    """What is foretold of a search on some prompts."""
    settings = Settings.of("any", **asked)
    lengths = [len(pair.clean) for pair in experiment.task.pairs]
    return foresee(experiment.footprint, lengths, settings, METHODS[settings.method], memory)


def test_what_is_said_follows_the_memory() -> None:
    experiment = Experiment(o.small_model("LN", 0), o.small_task(0), get_metric("logit_diff"))
    state = experiment.state_bytes
    whole, streamed = (foreseen(experiment, m, method="acdc") for m in (2 * state, 2 * state - 1))
    assert not whole.is_streamed
    assert streamed.is_streamed
    assert "in memory" in str(whole)
    assert "streamed" in str(streamed)
    assert streamed.peak <= whole.peak
    assert "state" not in str(foreseen(experiment, method="eap"))
    double = replace(experiment, task=replace(experiment.task, pairs=2 * experiment.task.pairs))
    assert double.state_bytes == 2 * state


def test_a_batch_larger_than_the_memory_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies in files prompt by prompt then, and the circuit is the same."""
    model, task = o.small_model("LN", 0), o.small_task(0)
    experiment = Experiment(model, task, get_metric("logit_diff"))
    footprint, n_pos = experiment.footprint, len(task.pairs[0].clean)
    one = footprint.state(n_pos) + max(footprint.moved(n_pos), footprint.starting(n_pos))
    found = foreseen(experiment, 2 * one, method="acdc")
    assert found.is_streamed
    assert found.prompts_at_once == 1
    assert found.chunk <= 2 * one
    sizes: list[int] = []
    begin = IncrementalRun.__init__

    def noting(run: IncrementalRun, experiment: Experiment, memory: int) -> None:
        sizes.append(experiment.batch_size)
        begin(run, experiment, memory)

    monkeypatch.setattr(IncrementalRun, "__init__", noting)
    names = ("clean", "corrupt", "answers", "wrong_answers")
    rows = [{name: [*getattr(p, name)] for name in names} for p in task.pairs]
    runs = [
        discover(rows, model=model, method="acdc", threshold=1e-2, holdout=0.0, memory=memory)
        for memory in (1 << 30, 2 * one)
    ]
    assert sizes[0] == Settings.batch_size
    assert sizes[-1] == 1
    assert np.array_equal(*(run.circuit.in_circuit for run in runs))


def test_a_search_says_what_it_takes_before_it_begins() -> None:
    class Noting(Silent):
        def __init__(self) -> None:
            self.told: list[str] = []

        def advance(self, n: int) -> None:
            self.told.append("step")

        def note(self, text: str) -> None:
            self.told.append(text)

        say = note

    names = ("clean", "corrupt", "answers", "wrong_answers")
    rows = [{name: [*getattr(p, name)] for name in names} for p in o.small_task(0).pairs]
    for method, words in (("acdc", "in memory"), ("eap", "2 forward and 1 backward passes")):
        reporter = Noting()
        discover(rows, model=o.small_model("LN", 0), method=method, n_edges=9, holdout=0.0,
                 reporter=reporter)  # fmt: skip
        first = reporter.told[0]
        assert first.startswith("takes weights")
        assert words in first
        assert "at a time, peak" in first


def pairs_file(folder: Path, n_pos: int = 6, n: int = 8) -> Path:
    """Write pairs of random tokens."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "clean": rng.integers(0, 20, n_pos).tolist(),
            "corrupt": rng.integers(0, 20, n_pos).tolist(),
            "answers": [1],
            "wrong_answers": [2],
        }
        for _ in range(n)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    random_folder("Llama", tmp_path / "llama")
    return tmp_path / "llama"


def refused(folder: Path, *more: str) -> Iterator[str]:
    """Yield the line that searches are refused with; nothing is written, no weights are read."""
    pairs, out = pairs_file(folder.parent), folder.parent / "out"
    for method in ("eap", "eap-ig", "acdc", "nap", "edge-pruning"):
        asked = ["discover", str(pairs), "--model", str(folder), "--method", method, *more]
        reading = mock.patch("acdc.models.hugging_face._read_weights", wraps=_read_weights)
        with reading as read, pytest.raises(SystemExit) as done:
            main([*asked, "--edges", "5", "--out", str(out)])
        assert done.value.code == 2
        assert not read.called
        assert not out.exists()
        yield method


def test_a_prompt_that_does_not_fit_is_refused(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in refused(llama, "--memory", "0.00001"):
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("acdc: a prompt of 6 tokens takes ")
        assert "memory allows" in line
        assert "ask for --memory 0.0625" in line


def test_a_model_that_the_machine_has_no_room_for_is_refused(
    llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = (llama / "model.safetensors").stat().st_size
    for free, words in ((1000, "free: choose --dtype bfloat16"), (weights, "and a run at least")):
        monkeypatch.setattr("acdc.runs.forecast.free_memory", lambda device, free=free: free)
        for _ in refused(llama):
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("acdc: the model's weights take 0 MiB")
            assert words in line


def test_run_json_says_what_was_foretold(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = llama.parent / "out"
    asked = ["discover", str(pairs_file(llama.parent)), "--model", str(llama), "--method", "eap-ig"]
    with pytest.raises(SystemExit) as done:
        main([*asked, "--edges", "5", "--json", "--out", str(out)])
    assert done.value.code == 0
    told = capsys.readouterr()
    found = json.loads((out / "run.json").read_text())["forecast"]
    assert found == json.loads(told.out)["forecast"]
    assert (found["forwards"], found["backwards"]) == (7, 5)
    assert found["weights"] + found["chunk"] <= found["peak"]
    lines = [line for line in told.err.splitlines() if line.startswith("takes weights")]
    assert len(lines) == 1
    assert lines[0].endswith("7 forward and 5 backward passes")


def test_free_memory_knows_of_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, taken = (tmp_path / name for name in ("max", "current"))
    most.write_text("max\n")
    taken.write_text("1024\n")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: mock.Mock(available=6000, total=9000))
    monkeypatch.setattr(psutil, "swap_memory", lambda: mock.Mock(free=1000, total=2000))
    monkeypatch.setattr(devices, "_LIMITS", ((most, taken), (tmp_path / "no", taken)))
    cpu = torch.device("cpu")
    assert free_memory(cpu) == 7000
    most.write_text("4096\n")
    assert free_memory(cpu) == 3072
    most.write_text("999999\n")
    assert free_memory(cpu) == 7000


def test_weights_take_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acdc.models.placement.free_memory", lambda device: 1000)
    assert room_on(torch.device("cpu")) == 900


def test_long_prompts_fit_where_short_ones_do() -> None:
    """A Llama of 0.1 billion, 2,000 tokens: neurons of all layers are not held, nor five points."""
    llama = LLAMAS["0.1"]
    sizes = sizes_of_config(llama.config(), llama.shapes(), torch.float32, torch.float32)
    footprint = Footprint.of_sizes(sizes, whole_vocab=False)
    memory = 2 << 30
    for method in ("eap", "eap-ig"):
        settings = Settings.of("any", method=method)
        long = foresee(footprint, [2000], settings, METHODS[method], memory)
        assert long.prompts_at_once == 1
        assert long.chunk <= memory
        with pytest.raises(OptionError, match="a prompt of 2,000 tokens takes"):
            foresee(footprint, [2000], settings, METHODS[method], memory // 2)
    assert footprint.points_at_once(20, 5, keeps_runs=False) == 5
    assert footprint.points_at_once(2000, 5, keeps_runs=False) == 1
    held = footprint.attribution(2000, 1) - footprint.attribution(2000, 1, keeps_runs=False)
    assert held == pytest.approx(1.2 * 2 * 2000 * 4 * footprint._trace, rel=1e-6)


def test_neurons_of_long_prompts_are_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are the same to the last bit, and fewer numbers are kept for them."""
    experiment = Experiment(o.small_model("LN", 0), o.small_task(0), get_metric("logit_diff"))
    n_kept: list[int] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        n_kept.append(x.numel())
        return x

    found = []
    for most in (1 << 30, 1):
        monkeypatch.setattr("acdc.models.lowering.model._NEURON_BYTES", most)
        n_kept.clear()
        batch = experiment.batches[0]
        keys = [("embeds", 0), ("mlp_in", 1)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            got = gradients(experiment, batch, Point(batch.clean), keys)
        found.append((got.at, sum(n_kept)))
    (whole, kept), (anew, fewer) = found
    assert fewer < kept
    for key in whole:
        assert torch.equal(whole[key], anew[key])


@pytest.mark.parametrize("method", ["eap", "eap-ig", "hisp"])
def test_what_is_done_with_is_not_held(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a run no other run's projections are held, nor those that a gradient left."""
    experiment = Experiment(o.small_model("LN", 0), o.small_task(0), get_metric("logit_diff"))
    whole = METHODS[method].scores(experiment)
    monkeypatch.setattr("acdc.engine.footprint._POINT_BYTES", 0)  # one point at a time
    before = one_run_at_a_time(monkeypatch)

    def looking(*args: Any) -> Gradients:
        found = gradients(*args)
        before.append(weakref.ref(found.trace.q[0]))
        return found

    monkeypatch.setattr(attribution, "gradients", looking)
    np.testing.assert_allclose(METHODS[method].scores(experiment), whole, rtol=1e-4, atol=1e-7)
    assert len(before) > len(experiment.batches)


def test_the_allocator_is_told_once_where_it_is_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere (macOS, Windows, musl) there is no such library, and nothing to tell it."""
    for library in (mock.Mock(), None):
        monkeypatch.setattr(allocator, "_glibc", lambda library=library: library)
        allocator.keep_large_pieces_apart()
        allocator.give_back()
        if library is not None:
            assert [call.args for call in library.mallopt.call_args_list] == [
                (-1, 64 << 20), (-3, 16 << 20)
            ]  # fmt: skip
            library.malloc_trim.assert_called_once_with(0)
