"""A killed search goes on where it was, and ends with the circuit of one that was not."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import oracle
import pytest
import torch
from killed import left_by_a_killed_writer
from test_latents import IDS, SETS, dictionaries_of
from test_parity import experiment

from acdc.cli import main
from acdc.dictionaries.attach import attach
from acdc.engine.checkpoint import Checkpoint, Decided
from acdc.engine.experiment import Experiment
from acdc.engine.incremental import IncrementalRun
from acdc.engine.metrics import get_metric
from acdc.errors import OutputError
from acdc.methods.acdc import acdc
from acdc.methods.eap import eap_ig
from acdc.models import MODELS
from acdc.runs.attached import attached_nodes
from acdc.runs.building import build_experiment
from acdc.runs.checks import check_discovery, check_settings
from acdc.runs.discover import _fingerprint, discover
from acdc.settings import Settings
from acdc.tasks.positions import find_positions
from graphs import Circuit
from graphs.files.whole import write_whole

SETTINGS = {"task": "t", "threshold": 0.01}
N_EDGES = experiment("ln2", "kl").graph.n_edges
COMMAND = ["discover", "ioi", "--n-prompts", "4", "--threshold", "0.05", "--out"]


class Killed(BaseException):
    """As when the process ends at once."""


def killer(after: int) -> Any:
    """A progress callback that ends the search after so many edges."""
    seen = 0

    def progress(n: int) -> None:
        nonlocal seen
        seen += n
        if seen >= after:
            raise Killed

    return progress


@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
@pytest.mark.parametrize("model", ["ln2", "attn3"])
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_resumed_equals_uninterrupted(
    tmp_path: Path, model: str, metric: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = experiment(model, metric)
    wanted, _ = acdc(case, 0.01)
    keep = Checkpoint(tmp_path, SETTINGS, period=0)
    with pytest.raises(Killed):
        acdc(case, 0.01, checkpoint=keep, progress=killer(int(share * case.graph.n_edges)))
    calls = []
    evaluate = IncrementalRun.evaluate
    monkeypatch.setattr(
        IncrementalRun,
        "evaluate",
        lambda s, e, m, *likely: calls.append(len(m)) or evaluate(s, e, m, *likely),
    )
    acdc(case, 0.01)
    whole = sum(calls)
    calls.clear()
    again = Checkpoint(tmp_path, SETTINGS, period=0)
    assert 0 < again.load(case.graph, 0.01).n_finished < len(case.graph.receivers)
    found, work = acdc(case, 0.01, checkpoint=again)
    assert sum(calls) < whole
    assert work.n_decisions + work.n_dead == case.graph.n_edges
    same(found, wanted)
    calls.clear()
    done, _ = acdc(case, 0.01, checkpoint=again)
    assert sum(calls) <= len(case.graph.receivers)
    same(done, wanted)


def same(found: Circuit, wanted: Circuit) -> None:
    np.testing.assert_array_equal(found.in_circuit, wanted.in_circuit)
    np.testing.assert_array_equal(found.scores, wanted.scores)


@pytest.mark.parametrize(
    ("intervention", "split"), [("resample", None), ("zero", None), ("resample", "token")]
)
@pytest.mark.parametrize("family", [f for f in oracle.FAMILIES if f not in oracle.LATER])
def test_a_resumed_search_is_the_same_to_the_last_bit(
    tmp_path: Path, family: str, intervention: Any, split: str | None
) -> None:
    task = oracle.small_task(1, 5, (4, 5, 6) if split is None else (5,))
    causal = family != "bidirectional"
    case = Experiment(
        oracle.small_model(family, 1, dtype=torch.float32),
        task,
        get_metric("kl"),
        batch_size=2,
        intervention=intervention,
        direction="denoising" if family == "LN" else "noising",
        positions=None if split is None else find_positions(task, split, causal=causal),
    )
    check_resumed(case, tmp_path)


@pytest.mark.parametrize("intervention", ["resample", "zero"])
@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("family", ["LN", "Gemma2"])
def test_a_resumed_search_on_latents_is_the_same_to_the_last_bit(
    tmp_path: Path, family: str, which: str, intervention: Any
) -> None:
    plain = Experiment(
        oracle.small_model(family, 1, dtype=torch.float32),
        oracle.small_task(1, 4, (4, 5, 6)),
        get_metric("kl"),
        batch_size=2,
        intervention=intervention,
    )
    dictionaries = dictionaries_of(plain.model, which)
    whole = attach(plain, dictionaries, latents=[IDS] * len(dictionaries)).experiment
    share = 1.0 if which == "cuts" else 0.8  # few paths lead through cuts
    some = np.random.default_rng(0).random(whole.graph.n_edges) < share
    check_resumed(replace(whole, candidates=some), tmp_path, quantile=0.05)


def check_resumed(case: Experiment, tmp_path: Path, quantile: float = 0.5) -> None:
    """Killed three times: scores, and what was evaluated, are those of one that was not."""
    expected = case.minimised_sign * eap_ig(case)
    tau = float(np.quantile(np.abs(expected[expected != 0]), quantile))
    wanted, counts = acdc(case, tau, expected=expected)
    assert 0 < wanted.n_edges < case.graph.n_edges
    for share in (0.3, 0.5, 0.9):
        with pytest.raises(Killed):
            acdc(
                case,
                tau,
                expected=expected,
                checkpoint=Checkpoint(tmp_path, SETTINGS, period=0),
                progress=killer(int(share * case.graph.n_edges)),
            )
    left = sorted(path.name.split("-")[0] for path in (tmp_path / "checkpoint").iterdir())
    assert left == ["acdc", "settings.json", "state"]
    again = Checkpoint(tmp_path, SETTINGS, period=0)
    assert again.load(case.graph, tau).n_finished > 0
    found, work = acdc(case, tau, expected=expected, checkpoint=again)
    same(found, wanted)
    assert work == counts


def kept_half_way(folder: Path) -> tuple[Experiment, Path]:
    """Return a search that was killed, and where its state is."""
    case = experiment("ln2", "kl")
    with pytest.raises(Killed):
        acdc(
            case,
            0.01,
            checkpoint=Checkpoint(folder, SETTINGS, period=0),
            progress=killer(N_EDGES // 2),
        )
    (path,) = (folder / "checkpoint").glob("state-0.01-*.bin")
    return case, path


@pytest.mark.parametrize("damage", ["short", "long", "flipped", "nan", "of another time", "gone"])
def test_a_state_that_is_not_the_search_s_is_refused(tmp_path: Path, damage: str) -> None:
    case, path = kept_half_way(tmp_path)
    whole = path.read_bytes()
    last = len(whole) - 1
    changed = {
        "short": whole[:-1],
        "long": whole + b"\0",
        "flipped": whole[:last] + bytes([whole[last] ^ 1]),
        "nan": whole[:-4] + np.float32(np.nan).tobytes(),
        "of another time": bytes(len(whole)),
    }
    path.unlink()
    if damage in changed:
        path.write_bytes(changed[damage])
    with pytest.raises(OutputError, match=r"state-0\.01-\d+\.bin.*(delete|No such file)"):
        acdc(case, 0.01, checkpoint=Checkpoint(tmp_path, SETTINGS, period=0))


def test_a_kill_between_two_writes_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is written, what is decided is not: the older pair of both is there."""
    case, _ = kept_half_way(tmp_path)
    n_finished = Checkpoint(tmp_path, SETTINGS).load(case.graph, 0.01).n_finished

    def killed(path: Path, data: Any) -> None:
        if path.name.startswith("acdc-"):
            raise Killed
        write_whole(path, data)

    with monkeypatch.context() as patch:
        patch.setattr("acdc.engine.checkpoint.write_whole", killed)
        with pytest.raises(Killed):
            acdc(case, 0.01, checkpoint=Checkpoint(tmp_path, SETTINGS, period=0))
    assert len(list((tmp_path / "checkpoint").glob("state-*"))) == 2
    again = Checkpoint(tmp_path, SETTINGS, period=0)
    assert again.load(case.graph, 0.01).n_finished == n_finished
    same(acdc(case, 0.01, checkpoint=again)[0], acdc(case, 0.01)[0])
    assert len(list((tmp_path / "checkpoint").glob("state-*"))) == 1


def test_writes_that_take_long_are_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep, graph = Checkpoint(tmp_path, SETTINGS, period=20), experiment("ln2", "kl").graph
    clock = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: clock)

    def slow(seconds: float) -> Any:
        nonlocal clock
        clock += seconds
        yield np.zeros(3)

    for took, wait in ((0.1, 20), (0.4, 20), (4, 200)):
        keep.save(0.1, Decided.nothing(graph), slow(took))
        clock += wait - 0.1
        assert not keep.due
        clock += 0.2
        assert keep.due


def test_nothing_is_written_before_a_period_is_over(tmp_path: Path) -> None:
    acdc(experiment("ln2", "kl"), 0.1, checkpoint=Checkpoint(tmp_path / "run", SETTINGS))
    assert not (tmp_path / "run").exists()


def test_thresholds_are_kept_apart(tmp_path: Path) -> None:
    case = experiment("ln2", "kl")
    keep = Checkpoint(tmp_path, SETTINGS, period=0)
    for tau in (0.1, 0.001):
        same(acdc(case, tau, checkpoint=keep)[0], acdc(case, tau)[0])
    assert keep.load(case.graph, 0.02).n_finished == 0


def test_another_run_s_checkpoint_is_refused(tmp_path: Path) -> None:
    keep = Checkpoint(tmp_path, SETTINGS, period=0)
    keep.save(0.1, Decided.nothing(experiment("ln2", "kl").graph))
    with pytest.raises(OutputError, match=r"threshold 0\.01, this one has 0\.02: delete it"):
        Checkpoint(tmp_path, {**SETTINGS, "threshold": 0.02})


def kept(folder: Path) -> Checkpoint:
    """Return a checkpoint that holds the start of a search."""
    keep = Checkpoint(folder, SETTINGS, period=0)
    keep.save(0.1, Decided.nothing(experiment("ln2", "kl").graph))
    return keep


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"PK\x03\x04"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    keep = kept(tmp_path)
    (tmp_path / "checkpoint" / "acdc-0.1.npz").write_bytes(content)
    with pytest.raises(
        OutputError, match=r"npz cannot be read \(.+\): delete .*checkpoint to start"
    ):
        keep.load(experiment("ln2", "kl").graph, 0.1)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"theme": "dark"}'])
def test_what_is_no_checkpoint_is_not_called_one(tmp_path: Path, content: bytes) -> None:
    kept(tmp_path)
    (tmp_path / "checkpoint" / "settings.json").write_bytes(content)
    with pytest.raises(OutputError, match=r"checkpoint is no checkpoint .*: move it away, or"):
        Checkpoint(tmp_path, SETTINGS)


def test_missing_settings_are_no_equal_settings(tmp_path: Path) -> None:
    Checkpoint(tmp_path, {**SETTINGS, "edges": None}, period=0)._prepare()
    path = tmp_path / "checkpoint" / "settings.json"
    found = json.loads(path.read_text())
    del found["edges"]
    path.write_text(json.dumps(found))
    with pytest.raises(OutputError, match="it has other settings than a search has"):
        Checkpoint(tmp_path, {**SETTINGS, "edges": None})


FALSIFIED: dict[str, tuple[dict[str, Any], str]] = {
    "a million receivers": ({"n_finished": np.array(10**6)}, "1000000 of 27 receivers"),
    "fewer than none": ({"n_finished": np.array(-1)}, "-1 of 27 receivers"),
    "half a receiver": ({"n_finished": np.array(0.5)}, "n_finished is of shape .* float64"),
    "receivers in a list": ({"n_finished": np.array([0])}, r"n_finished is of shape \(1,\)"),
    "nan": ({"scores": np.full(N_EDGES, np.nan)}, "a score is not finite"),
    "float32": ({"scores": np.zeros(N_EDGES, np.float32)}, "scores is of shape .* float32"),
    "complex": ({"scores": np.zeros(N_EDGES, np.complex128)}, "scores is of shape .* complex128"),
    "scores of one edge": ({"scores": np.zeros(1)}, r"scores is of shape \(1,\)"),
    "a nested mask": ({"in_circuit": np.ones((N_EDGES, 1), bool)}, "in_circuit is of shape"),
    "numbers for a mask": ({"in_circuit": np.ones(N_EDGES, np.int64)}, "in_circuit .* int64"),
    "decided too early": ({"in_circuit": np.zeros(N_EDGES, bool)}, "are decided before it"),
    "objects": ({"scores": np.array([{}] * N_EDGES)}, "scores is of shape .* object"),
    "no scores": ({"scores": None}, "scores.npy"),
    "work in a list": ({"work": np.array("[1]")}, "work has unknown counts"),
    "unknown work": ({"work": np.array('{"__class__": 1}')}, "work has unknown counts"),
    "work below none": ({"work": np.array('{"n_dead": -1}')}, "work has no counts"),
    "work in words": ({"work": np.array('{"n_dead": "1"}')}, "work has no counts"),
    "deep work": ({"work": np.array("[" * 9000)}, "recursion"),
    "work without end": ({"work": np.array(" " * 10**6)}, "work is of shape"),
    "infinite rounding": ({"rounding": np.array(np.inf)}, "rounding is inf"),
}


@pytest.mark.parametrize("name", FALSIFIED)
def test_a_falsified_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    changes, words = FALSIFIED[name]
    keep = kept(tmp_path)
    path = tmp_path / "checkpoint" / "acdc-0.1.npz"
    with np.load(path) as content:
        arrays = {**content, **changes}
    np.savez_compressed(path, **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(OutputError, match=f"npz cannot be read .*{words}"):
        keep.load(experiment("ln2", "kl").graph, 0.1)


def test_an_array_that_expands_is_refused_unread(tmp_path: Path) -> None:
    """A megabyte that says it holds a gigabyte."""
    keep = kept(tmp_path)
    path = tmp_path / "checkpoint" / "acdc-0.1.npz"
    with np.load(path) as content:
        arrays = dict(content)
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        for key, value in arrays.items():
            with archive.open(f"{key}.npy", "w") as file:
                np.save(file, value)
                if key == "scores":
                    for _ in range(1024):
                        file.write(bytes(1 << 20))
    assert path.stat().st_size < 2 << 20
    tracemalloc.start()
    try:
        with pytest.raises(OutputError, match="scores has not the size that it says"):
            keep.load(experiment("ln2", "kl").graph, 0.1)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_users_own_folder_is_never_removed(tmp_path: Path) -> None:
    """Nothing in a folder ``checkpoint`` that the engine did not write."""
    run = discover("ioi", n_prompts=4, threshold=0.5)
    own = tmp_path / "run" / "checkpoint"
    own.mkdir(parents=True)
    files = {"settings.json": '{"theme": "dark"}', "acdc-0.1.npz": "mine", "weights.pt": "mine"}
    for name, content in files.items():
        (own / name).write_text(content)
    with pytest.raises(OutputError, match="not empty"):
        run.save(tmp_path / "run")
    run.save(tmp_path / "run", overwrite=True)
    assert {path.name: path.read_text() for path in own.iterdir()} == files


def test_a_users_files_in_a_checkpoint_stay(tmp_path: Path) -> None:
    keep = kept(tmp_path)
    keep.keep("constants.safetensors", b"")
    left_by_a_killed_writer(keep.folder / "acdc-0.1.npz")
    (keep.folder / "notes.txt").write_text("mine")
    (keep.folder / "acdc-old.npz").write_text("mine")
    (keep.folder / "acdc-1.npz").mkdir()
    Checkpoint.remove(tmp_path)
    left = sorted(path.name for path in keep.folder.iterdir())
    assert left == ["acdc-1.npz", "acdc-old.npz", "notes.txt"]


def test_a_whole_checkpoint_is_removed_with_its_folder(tmp_path: Path) -> None:
    kept(tmp_path)
    Checkpoint.remove(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    graph = experiment("ln2", "kl").graph
    keep = Checkpoint(tmp_path, SETTINGS, period=0)
    decided = Decided.nothing(graph)
    decided.scores[:] = np.random.default_rng(0).normal(size=graph.n_edges)
    keep.save(0.1, decided)
    path = tmp_path / "checkpoint" / "acdc-0.1.npz"
    whole = path.read_bytes()
    place = whole.index(b"scores.npy") + len(b"scores.npy")
    for at in range(place + 20, place + 60):  # where zlib's own tables begin, among others
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with pytest.raises(OutputError, match="cannot be read"):
            keep.load(graph, 0.1)


def test_a_resumed_low_precision_run_knows_its_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings("ioi", n_prompts=4, dtype="bfloat16")
    case = build_experiment(check_settings(settings))
    keep = Checkpoint(tmp_path, SETTINGS, period=0)
    with pytest.raises(Killed):
        acdc(case, 0.05, checkpoint=keep, progress=killer(1000))
    seen = keep.load(case.graph, 0.05)
    assert seen.rounding > 0
    coarse = replace(seen, rounding=1e3)  # so coarse that float32 is asked every time
    monkeypatch.setattr(Checkpoint, "load", lambda *_: coarse)
    _, work = acdc(case, 0.05, checkpoint=keep)
    asked, decided = seen.work["n_reviewed"], seen.work["n_decisions"]
    assert work.n_reviewed - asked == work.n_decisions - decided > 0


def test_a_checkpoint_of_another_graph_is_refused(tmp_path: Path) -> None:
    keep = Checkpoint(tmp_path, SETTINGS, period=0)
    keep.save(0.1, Decided.nothing(experiment("ln2", "kl").graph))
    with pytest.raises(OutputError, match="cannot be read"):
        keep.load(experiment("attn3", "kl").graph, 0.1)


@pytest.fixture
def every_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: Checkpoint, folder: Any, settings: Any, period: float = 0.0) -> None:
        original(self, folder, settings, period)

    original = Checkpoint.__init__
    monkeypatch.setattr(Checkpoint, "__init__", init)


@pytest.mark.usefixtures("every_receiver")
def test_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = discover("ioi", n_prompts=4, threshold=0.05)
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("acdc.terminal.console.TerminalReporter.advance", lambda self, n: kill(n))
        kill = killer(700)
        with pytest.raises(Killed):
            main([*COMMAND, str(folder)])
    assert [path.name for path in folder.iterdir()] == ["checkpoint"]
    with pytest.raises(SystemExit) as other:
        main([*COMMAND, str(folder), "--seed", "1"])
    assert other.value.code == 2
    assert [path.name for path in folder.iterdir()] == ["checkpoint"]
    with pytest.raises(SystemExit) as ended:
        main([*COMMAND, str(folder)])
    assert ended.value.code == 0
    assert "checkpoint" not in {path.name for path in folder.iterdir()}
    from acdc.runs.folder import read_run

    same(read_run(folder)[1], wanted.circuit)


@pytest.mark.usefixtures("every_receiver")
def test_a_task_file_that_changed_is_another_run(tmp_path: Path) -> None:
    rows = ['{"clean": [1, 2, %d], "corrupt": [3, 2, 1], "answers": [4], "wrong_answers": [5]}']
    task, folder = tmp_path / "pairs.jsonl", tmp_path / "run"
    task.write_text(rows[0] % 5)
    settings = {"model": "ioi-small", "threshold": 0.01, "checkpoint": folder}
    discover(str(task), **settings)
    discover(str(task), **settings)
    task.write_text(rows[0] % 6)
    with pytest.raises(OutputError, match="of a run with prompts"):
        discover(str(task), **settings)


def test_a_changed_dictionary_under_the_same_path_is_noticed(tmp_path: Path) -> None:
    """Its tensors count: the settings name its folder, which may hold another one by now."""
    from safetensors.torch import load_file, save_file

    source = MODELS["ioi-small"] / "dictionaries"
    one = next(path.parent for path in sorted(source.glob("*/cfg.json")))
    own = Path(shutil.copytree(one, tmp_path / "sae"))
    asked: dict[str, Any] = {"saes": str(own), "max_latents": 8, "n_prompts": 4}
    asked |= {"method": "acdc", "threshold": 0.5, "metric": "kl", "candidates": 20}
    settings = check_discovery(Settings.of("ioi", **asked))

    def keep() -> Checkpoint:
        experiment = build_experiment(settings)
        attached = attached_nodes(experiment, settings)
        assert attached is not None
        identity = {**settings.plain(), **_fingerprint(attached.experiment), "versions": {}}
        return Checkpoint(tmp_path / "run", identity, period=0)

    keep().keep("constants.safetensors", b"")
    keep()  # it is the same
    weights = load_file(own / "sae_weights.safetensors")
    weights["W_dec"] = 1.001 * weights["W_dec"]  # the same latents are active
    save_file(weights, own / "sae_weights.safetensors")
    with pytest.raises(OutputError, match="is of a run with dictionaries"):
        keep()
