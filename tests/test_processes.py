"""Prompts over processes: whoever computes a batch, every process gets what one alone does.

Processes are threads here (:mod:`in_threads`); ``torchrun`` itself is asked at the end.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from in_threads import in_threads
from numpy.typing import NDArray
from oracle import labelled, small_model, small_task
from transformers import GPT2Config, GPT2LMHeadModel

from acdc.ablations.mean import mean, mean_positional
from acdc.ablations.optimal import optimal_constants
from acdc.cli import main
from acdc.cli.processes import SHARED
from acdc.dictionaries.attach import attach_neurons
from acdc.engine.batch import sum_of
from acdc.engine.doses import edge_doses, node_doses
from acdc.engine.experiment import Experiment
from acdc.engine.incremental import IncrementalRun
from acdc.engine.metrics import METRICS
from acdc.engine.patched import PatchedModel
from acdc.engine.processes import Numbers, Processes, Told, among, by_chunk, here
from acdc.engine.work import Work
from acdc.errors import DeviceError, OutputError, ProcessError
from acdc.evidence.assessment import assess
from acdc.evidence.verdicts import Trials
from acdc.measure.ability import ability
from acdc.methods import METHODS
from acdc.runs.folder import check_output, write_folder, write_output
from acdc.settings import Settings
from acdc.tasks.files import write_pairs
from acdc.tasks.positions import find_positions
from graphs import Circuit

BESIDE = Path(__file__).parent

TRAINED = {"mask_steps": 3, "sparsity": 0.6}
ASKED: dict[str, dict[str, Any]] = {
    **{name: {"n_edges": 9} for name in METHODS},
    "acdc": {"threshold": 0.02},
    "acdc-two-sided": {"threshold": 0.02},
    "clean-corrupted": {},
    "eap-acdc": {"threshold": 0.02},
    "eap-ig": {"n_edges": 9, "stable": 0.6},
    "eap": {"n_edges": 9, "select": "milp"},
    "edge-pruning": TRAINED,
    "subnetwork-probing": TRAINED,
    "ensemble": {"of": "eap-ig,ifr", "n_edges": 9},
}
"""Of each method something else that is decided."""

FLAT = ("eap", "gim", "hisp", "nap", "relp")
"""Methods that see nothing where the metric is flat."""


@pytest.fixture(scope="module")
def case() -> Experiment:
    """Seven batches of a random model, of two lengths; a metric that compares whole outputs."""
    task = small_task(3, n_prompts=12)
    task = replace(task, info={"prompts": "random", "seen": False})
    return Experiment(small_model("LN", 5), task, METRICS["kl"], batch_size=2)


def alike(case: Experiment, work: Callable[[Experiment], Any], n: int = 3) -> Any:
    """Return what one process gets, once ``n`` of them got the same to the last bit.

    Each has a model of its own, as processes have: hooks on a module are all its threads'.
    """
    alone = work(replace(case))
    wanted = digest(alone)
    found = in_threads(n, lambda: work(replace(case, model=deepcopy(case.model))))
    assert all(digest(one) == wanted for one in found)
    return alone


def digest(found: Any) -> str:
    """Digest of arrays in tuples and the like."""
    if isinstance(found, np.ndarray | torch.Tensor):
        return hashlib.sha256(np.ascontiguousarray(found).tobytes()).hexdigest()
    if isinstance(found, Iterable) and not isinstance(found, str | dict):
        return " ".join(map(digest, found))
    return repr(found)


# -- chunks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("n_chunks", [1, 3, 7, 8])
def test_each_chunk_is_computed_once_and_known_to_all(n_chunks: int, one_by_one: bool) -> None:
    def work() -> tuple[list[int], list[float], int]:
        own: list[int] = []
        told: list[int] = []
        tell = Told(told.append)

        def of(i: int) -> Numbers:
            own.append(i)
            tell(10 + i)
            return [torch.tensor([1.0 / (i + 1)], dtype=torch.double), torch.arange(i)]

        found = by_chunk(range(n_chunks), of, one_by_one=one_by_one, told=tell)
        return own, [float(x) for x, y in found if len(y) < 100], sum(told)

    found = in_threads(3, work)
    wanted = [1.0 / (i + 1) for i in range(n_chunks)]
    assert [own for own, _, _ in found] == [list(range(rank, n_chunks, 3)) for rank in range(3)]
    assert all(values == wanted for _, values, _ in found)
    assert all(told == sum(range(10, 10 + n_chunks)) for _, _, told in found)
    assert work() == (list(range(n_chunks)), wanted, sum(range(10, 10 + n_chunks)))


def test_what_is_large_arrives_whole() -> None:
    numbers = torch.arange(200_000, dtype=torch.double)
    for found in in_threads(2, lambda: list(by_chunk(range(3), lambda k: [numbers * k]))):
        assert all(torch.equal(x, numbers * i) for i, (x,) in enumerate(found))


def test_sums_are_taken_in_order_and_leave_their_parts_alone() -> None:
    parts = [torch.tensor([x], dtype=torch.double) for x in (1e16, 1.0, -1e16)]
    assert sum_of(parts).item() == 1e16 + 1.0 - 1e16
    assert [x.item() for x in parts] == [1e16, 1.0, -1e16]
    one = torch.ones(1)
    assert sum_of([one]) is one


def test_processes_that_compute_different_things_end() -> None:
    def work() -> None:
        list(by_chunk(range(2), lambda i: [torch.ones(1)], about=[str(here().rank).encode()]))

    with pytest.raises(ProcessError, match="compute different things"):
        in_threads(2, work)


def test_an_error_of_one_process_ends_all() -> None:
    def of(i: int) -> Numbers:
        raise ValueError(f"chunk {i}")

    with pytest.raises(ValueError, match="chunk 1"):
        in_threads(3, lambda: list(by_chunk([1], of)))


def test_processes_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    one, two = Processes(1, 4, 1), Processes(2, 4, 2)
    cpu, cuda, mps = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
    assert one.device(cpu) == cpu
    assert one.device(cuda) == torch.device("cuda:1")
    assert Processes().device(cuda) == cuda
    with pytest.raises(DeviceError, match="2 GPUs"):
        two.device(cuda)
    for asked in (torch.device("cuda:0"), mps):
        with pytest.raises(DeviceError, match="give cuda"):
            one.device(asked)


# -- what is computed ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_methods(case: Experiment, name: str) -> None:
    method = METHODS[name]
    counts: list[int] = []
    if name in FLAT:
        case = replace(case, metric=METRICS["logit_diff"])

    def find(one: Experiment) -> tuple[Any, ...]:
        told: list[int] = []
        found = method.find(one, Work(progress=told.append), **ASKED[name])
        counts.append(sum(told))
        details = {k: v for k, v in found.details.items() if k != "selection"}
        return found.circuit.scores, found.circuit.in_circuit, repr(details)

    scores, mask, _ = alike(case, find)
    assert scores.any()
    assert 0 < mask.sum() < len(mask)
    assert len(set(counts)) == 1


@pytest.mark.parametrize("n", [2, 20])
@pytest.mark.parametrize("intervention", ["resample", "zero"])
def test_searches_with_fewer_and_with_more_processes_than_batches(
    case: Experiment, intervention: str, n: int
) -> None:
    case = replace(case, intervention=intervention, metric=METRICS["logit_diff"])

    def find(one: Experiment) -> tuple[Any, ...]:
        found = METHODS["acdc"].find(one, threshold=0.05)
        return found.circuit.scores, found.circuit.in_circuit, found.details["work"]

    alike(case, find, n)


def test_low_precision_spans_and_neurons() -> None:
    task = labelled(small_task(4, n_prompts=6), 1)
    model = small_model("LN", 6, dtype=torch.bfloat16)
    exact = small_model("LN", 6)
    case = Experiment(model, task, METRICS["kl"], batch_size=1)
    case = replace(case, in_float32=replace(case, model=exact))

    def find(one: Experiment) -> tuple[Any, ...]:
        found = METHODS["acdc"].find(one, threshold=0.02)
        return found.circuit.scores, found.circuit.in_circuit, found.details["work"]

    alike(case, find, 2)
    split = replace(
        case, model=exact, in_float32=None, positions=find_positions(task, "span", causal=True)
    )
    alike(split, find, 2)

    def attached(one: Experiment) -> tuple[Any, ...]:
        own = copy.deepcopy(exact)  # neurons are read by hooks on its modules
        found = attach_neurons(replace(one, model=own, in_float32=None), max_neurons=6)
        return repr(found.summary()), METHODS["eap-ig"].scores(found.experiment)

    alike(case, attached, 2)


def test_each_process_has_its_own_batches_alone(case: Experiment) -> None:
    def work() -> list[int]:
        run = IncrementalRun(replace(case))
        assert len(run.batches) == len(run.experiment.batches)
        compared = [i for i, b in enumerate(run.experiment.batches) if b.targets.clean is not None]
        assert compared == list(run.states)
        return compared

    n = len(case.batches)
    assert in_threads(3, work) == [list(range(rank, n, 3)) for rank in range(3)]


def test_a_batch_of_another_process_is_not_measured(case: Experiment) -> None:
    def work() -> None:
        one = replace(case)
        for batch in one.batches:  # not by Experiment.by_batch
            final = one.model.forward(batch.clean).final
            assert final is not None
            one.measure_rows(final[:, batch.scored].flatten(0, 1), batch)

    work()
    with pytest.raises(ProcessError, match=r"Experiment\.by_batch"):
        in_threads(2, work)


def test_circuits_and_their_doses(case: Experiment) -> None:
    def measure(one: Experiment) -> list[Any]:
        patched, graph = PatchedModel(one), one.graph
        rng = np.random.default_rng(0)
        mask = rng.random(graph.n_edges) < 0.5
        cuts = rng.random((3, one.components.n_senders)) < 0.3
        some, c = np.arange(0, graph.n_edges, 7), np.array([0.5, 2.0])
        return [
            patched.values(mask), patched.values_at_logits(mask, cuts), patched.full_values(),
            one.plain_values("clean"), one.plain_values("corrupt"),
            *(np.asarray(x) for x in vars(ability(one)).values() if x is not None),
            *node_doses(one, np.arange(graph.n_senders), c), *edge_doses(one, some, c),
        ]  # fmt: skip

    alike(case, measure)


def test_constants(case: Experiment) -> None:
    def constants(one: Experiment) -> Iterable[bytes]:
        plain = replace(one, metric=METRICS["logit_diff"])
        yield mean(replace(plain, intervention="mean")).as_bytes()
        yield mean_positional(replace(plain, intervention="mean-positional")).as_bytes()
        yield optimal_constants(plain, 3).as_bytes()

    alike(case, lambda one: [np.frombuffer(x, np.uint8) for x in constants(one)])


def test_evaluation_with_all_its_tests(case: Experiment) -> None:
    few = replace(case, task=replace(case.task, pairs=case.task.pairs[:6]))

    def summary(one: Experiment) -> str:
        mask: NDArray[np.bool_] = np.arange(one.graph.n_edges) % 3 > 0
        circuit = Circuit(one.graph, np.linspace(-1, 1, one.graph.n_edges), mask)
        trials = Trials(n_random=3, n_knockouts=2, n_permutations=9, n_edges=2)
        found = assess(
            circuit, one, Settings("random", model="GPT2"), trials=trials, n_resamples=20,
            by_prompt=True,
        ).summary()  # fmt: skip
        del found["timings"]
        return json.dumps(found)

    alike(few, summary, 2)


# -- files and the command line -----------------------------------------------------------------


def test_the_first_process_writes(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    for rank in (0, 1):
        with among(Processes(rank, 2)):
            if rank == 0:
                with pytest.raises(OutputError):
                    check_output(tmp_path / "full", overwrite=False)
            else:
                check_output(tmp_path / "full", overwrite=False)
            write_folder(
                tmp_path / f"run{rank}", lambda new: (new / "f").touch() or None, overwrite=False
            )
            write_output(tmp_path / f"file{rank}", "text")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file0", "full", "run0"]


@pytest.mark.parametrize("rank", [0, 1])
def test_other_commands_refuse(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    alone = among(Processes(rank, 2, claim=lambda: rank == 0))
    monkeypatch.setattr("acdc.engine.processes.together", lambda: alone)
    with pytest.raises(SystemExit) as ended:
        main(["heads", "runs/ioi"])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    line = f"acdc: heads under torchrun: processes share the prompts of {', '.join(SHARED)}; "
    assert said.err == (line + "start this one without it\n" if rank == 0 else "")


# -- torchrun -----------------------------------------------------------------------------------


def torchrun(n: int, *arguments: str | Path, **environment: str) -> tuple[int, list[str]]:
    """Status, and what our processes said on standard error."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n),
    ]  # fmt: skip
    known = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), **environment}
    ended = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=known
    )
    return ended.returncode, [x for x in ended.stderr.splitlines() if x.startswith("acdc: ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small random GPT-2 and prompts."""
    folder = tmp_path_factory.mktemp("torchrun")
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=8, vocab_size=oracle.VOCAB)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder / "model")
    write_pairs(folder / "task.jsonl", small_task(1, n_prompts=14).pairs)
    return folder


def commands(place: Path, out: Path) -> list[list[str]]:
    """Several methods and an evaluation, on three batches of prompts and more."""
    common = [str(place / "task.jsonl"), "--model", str(place / "model"), "--batch-size", "3"]
    common += ["--metric", "kl"]
    tests = ["--n-random", "3", "--n-knockouts", "2", "--test-edges", "2"]
    return [
        ["discover", *common, "--threshold", "1e-6", "--out", f"{out}/acdc"],
        ["discover", *common, "--method", "eap-ig", "--edges", "9", "--out", f"{out}/eap-ig"],
        ["discover", *common, "--method", "edge-pruning", "--mask-steps", "3", "--edges", "9",
         "--out", f"{out}/edge-pruning"],
        ["evaluate", f"{out}/acdc", *tests, "--out", f"{out}/evaluation.json"],
    ]  # fmt: skip


def written(folder: Path) -> dict[str, bytes]:
    """What files hold, but for times and the folder."""

    def plain(path: Path) -> bytes:
        text = path.read_text().replace(str(folder), "")
        if path.suffix != ".json":
            return text.encode()
        found = json.loads(text)
        found.pop("timings", None)
        return json.dumps(found).encode()

    kinds = (".json", ".csv", ".dot")
    return {str(p.relative_to(folder)): plain(p) for p in folder.rglob("*") if p.suffix in kinds}


def test_torchrun_finds_the_same(place: Path) -> None:
    for command in commands(place, place / "one"):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert not ended.value.code
    (place / "commands.json").write_text(json.dumps(commands(place, place / "two")))
    assert torchrun(2, BESIDE / "commands.py", place / "commands.json") == (0, [])
    one, two = written(place / "one"), written(place / "two")
    assert len(one) == 3 * 3 + 1
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


@pytest.mark.slow
def test_a_mistake_is_said_once(place: Path) -> None:
    status, said = torchrun(3, "-m", "acdc", "discover", place / "task.jsonl", "--model", "none")
    assert status
    assert len(said) == 1
    assert "none" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_all(place: Path, rank: int) -> None:
    (place / f"killed{rank}.json").write_text(json.dumps(commands(place, place / f"killed{rank}")))
    arguments = BESIDE / "commands.py", place / f"killed{rank}.json"
    status, said = torchrun(3, *arguments, ACDC_TEST_KILLED=str(rank))
    assert status
    assert len(said) == 1
    assert not (place / f"killed{rank}" / "acdc").exists()
