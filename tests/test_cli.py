"""The command line: what each command writes, and the one line that it says of each mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import N_ROWS, Answer, Call, read, save_gpt2, snapshot, status_of
from parity_pairs import jsonl, parity_rows

from acdc import cli
from acdc.cli import main
from acdc.engine.metrics import METRICS
from acdc.engine.patched import PatchedModel
from acdc.methods import METHODS
from acdc.models import BUNDLED
from acdc.runs import discover as pipeline
from acdc.runs.building import build_experiment
from acdc.runs.folder import read_run
from acdc.settings import Settings
from acdc.tasks import TASKS
from graphs import load_circuit
from graphs.order import edge_order, receiver_order

CONTRACT = [
    "model", "method", "metric", "threshold", "edges", "steps", "n-prompts", "batch-size", "seed",
    "device", "dtype", "prepend-bos", "no-prepend-bos", "out", "overwrite", "trust-remote-code",
]  # fmt: skip
COMMANDS = ["discover", "sweep", "stability", "evaluate", "export", "compare", "list"]
FILES = ["circuit.dot", "circuit.json", "circuit.png", "circuit.svg", "run.json"]
FEW_PROMPTS = ("--n-prompts", 4, "--n-select", 8, "--n-test", 32)
Rows = list[dict[str, Any]]


# --- discover -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["acdc", "eap-ig"])
def test_a_run_is_a_folder_of_five_files(shared: Path, method: str) -> None:
    assert sorted(path.name for path in (shared / method).iterdir()) == FILES
    assert (shared / method / "circuit.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (shared / method / "circuit.svg").read_text()
    assert (shared / method / "circuit.dot").read_text().startswith("digraph")


@pytest.mark.parametrize("method", ["acdc", "eap-ig"])
def test_run_json(shared: Path, method: str) -> None:
    run, circuit = (read(shared / method / name) for name in ("run.json", "circuit.json"))
    asked = {
        "acdc": {"metric": "kl", "threshold": 0.1, "n_edges": None, "seed": 0, "batch_size": 32},
        "eap-ig": {
            "metric": "logit_diff",
            "n_edges": 30,
            "seed": 7,
            "batch_size": 5,
            "options": {"steps": 3},
        },
    }[method]
    assert run.items() >= asked.items()
    assert run["method"] == method
    assert run["model"] == str(shared / "ln2")
    assert run["task"] == str(shared / "ln2.jsonl")
    assert run["device"] == "cpu"
    assert run["prepend_bos"] is False
    assert run["n_prompts"] == N_ROWS
    edges = circuit["edges"].values()
    assert run["n_edges_total"] == len(edges)
    assert run["n_edges_kept"] == sum(edge["in_graph"] for edge in edges) > 0
    full, empty, found = (run[f"metric_{name}"] for name in ("full", "empty", "circuit"))
    assert all(isinstance(value, float) for value in (full, empty, found))
    assert run["metric_seen"] == {"full": full, "empty": empty, "circuit": found}  # no others
    assert run["prompts"] == {"fit": N_ROWS, "select": 0, "test": 0}
    assert [run["faithfulness"], run["faithfulness_interval"]] == [None, None]
    if not run["ability"]["doubts"]:
        wanted = (found - empty) / (full - empty)
        assert run["faithfulness_seen"] == pytest.approx(wanted, abs=1e-12)
    assert set(run["timings"]) == {"load", "discover", "evaluate", "render"}
    assert all(isinstance(t, float) and t >= 0 for t in run["timings"].values())
    assert run["versions"].keys() >= {"python", "torch", "transformer_lens", "acdc-circuits"}
    assert all(isinstance(version, str) for version in run["versions"].values())


def test_at_most_the_edges_that_were_asked_for(shared: Path) -> None:
    assert 0 < read(shared / "eap-ig" / "run.json")["n_edges_kept"] <= 30


@pytest.mark.parametrize("method", ["acdc", "eap-ig"])
def test_circuit_json_holds_every_edge(shared: Path, method: str) -> None:
    edges = read(shared / method / "circuit.json")["edges"]
    graph = load_circuit(shared / method / "circuit.json").graph
    assert list(edges) == graph.edge_names()
    for edge in edges.values():
        assert edge.keys() == {"score", "in_graph"}
        assert isinstance(edge["score"], float)
        assert isinstance(edge["in_graph"], bool)


def test_acdc_scores_are_the_measured_changes(shared: Path) -> None:
    """Replay the search with whole forward passes."""
    settings, circuit, run = read_run(shared / "acdc")
    experiment = build_experiment(settings)
    graph, model = circuit.graph, PatchedModel(experiment)
    mask = np.ones(graph.n_edges, dtype=bool)
    current = run["metric_full"]
    dead = 0
    for receiver in receiver_order(graph):
        leaving = graph.fed_by(receiver)
        names = {graph.nodes[node] for node in leaving}
        alive = "logits" in names or any(
            mask[edge] and graph.senders[graph.edge_sender[edge]] in names
            for edge in range(graph.n_edges)
        )
        for edge in edge_order(graph, receiver):
            if not alive:
                assert circuit.scores[edge] == 0
                assert not circuit.in_circuit[edge]
                mask[edge], dead = False, dead + 1
                continue
            mask[edge] = False
            change = model.metric(mask) - current
            assert circuit.scores[edge] == pytest.approx(change, abs=1e-4)
            mask[edge] = circuit.in_circuit[edge]
            assert mask[edge] == (circuit.scores[edge] >= 0.1)
            current += 0 if mask[edge] else change
    assert dead > 0
    assert run["metric_circuit"] == pytest.approx(current, abs=1e-4)


def test_the_table(place: Path, call: Call) -> None:
    answer = call("discover", "task.jsonl", "--model", "ln2", "--method", "eap", "--out", "new")
    run = read(place / "new" / "run.json")
    assert answer.status == 0
    assert f"{run['n_edges_kept']} of {run['n_edges_total']}" in answer.out
    for text in ("ln2", "task.jsonl", f"{run['metric_circuit']:.4g}", "discover", "->", "new"):
        assert text in answer.out
    assert "load model and task" in answer.err


def test_a_file_without_holdout_is_used_whole_and_in_order(place: Path) -> None:
    rows = parity_rows(place / "ln2", N_ROWS)
    (place / "first.jsonl").write_text(jsonl(rows[:5]))
    (place / "backwards.jsonl").write_text(jsonl(rows[::-1]))
    asked = {
        "some": ["task.jsonl", "--n-prompts", "5"],
        "first": ["first.jsonl", "--seed", "3"],
        "all": ["task.jsonl"],
        "backwards": ["backwards.jsonl"],
    }
    for name, options in asked.items():
        run = ["discover", *options, "--model", "ln2", "--method", "eap", "--metric", "nll"]
        assert status_of(*run, "--holdout", "0", "--out", name) == 0
    runs = {name: read(place / name / "run.json") for name in asked}
    assert [runs[name]["n_prompts"] for name in asked] == [5, 5, N_ROWS, N_ROWS]
    edges = {name: read(place / name / "circuit.json")["edges"] for name in asked}
    assert edges["some"] == edges["first"] != edges["all"]
    assert runs["all"]["metric_full"] == pytest.approx(runs["backwards"]["metric_full"])


def test_equal_seeds_give_equal_circuits(gpt2: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = ["discover", "ioi", "--model", gpt2, "--method", "eap", *FEW_PROMPTS]
        assert status_of(*run, "--seed", seed, "--out", tmp_path / name) == 0
    a, b, c = ((tmp_path / name / "circuit.json").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (["--dtype", "float64"], "dtype", "float64"),
        (["--intervention", "zero"], "intervention", "zero"),
        (["--direction", "denoising"], "direction", "denoising"),
        (["--no-split-qkv"], "split_qkv", False),
        (["--split-embed"], "split_embed", True),
        (["--edges", 10**30], "n_edges", 10**30),
        (["--batch-size", 10**30], "batch_size", 10**30),
        (["--memory", "0.01"], "method", "eap"),
        (["--metric", "prob_diff"], "metric", "prob_diff"),
        (["--method", "exact"], "method", "exact"),
        (["--method", "acdc", "--edges", 9], "n_edges", 9),
        (["--method", "acdc", "--threshold", 0.1, "--guess", "eap"], "guess", "eap"),
        (["--method", "clean-corrupted"], "method", "clean-corrupted"),
    ],
)
def test_options_reach_the_run(place: Path, options: list[object], key: str, value: object) -> None:
    run = ["discover", "task.jsonl", "--model", "ln2", "--method", "eap", "--n-prompts", 3]
    assert status_of(*run, *options, "--out", "new") == 0
    assert read(place / "new" / "run.json")[key] == value
    assert status_of("evaluate", "new", "--brief") == 0


def test_prepend_bos(gpt2: Path, tmp_path: Path) -> None:
    lengths = []
    for option in ("--prepend-bos", "--no-prepend-bos"):
        run = ["discover", "ioi", "--model", gpt2, "--method", "eap", *FEW_PROMPTS, option]
        assert status_of(*run, "--out", tmp_path / option) == 0
        summary = read(tmp_path / option / "run.json")
        assert summary["prepend_bos"] == (option == "--prepend-bos")
        lengths.append(sorted(map(int, summary["task_info"]["lengths"])))
    assert lengths[0] == [n + 1 for n in lengths[1]]


def test_default_folder(place: Path) -> None:
    assert status_of("discover", "task.jsonl", "--model", "ln2", "--method", "eap") == 0
    (folder,) = (place / "runs").iterdir()
    assert re.fullmatch(r"task-\d{8}-\d{6}", folder.name)


def test_overwrite(place: Path) -> None:
    (place / "run" / "notes.txt").write_text("mine")
    run = ["discover", "task.jsonl", "--model", "ln2", "--method", "eap", "--out", "run"]
    assert status_of(*run, "--overwrite") == 0
    assert read(place / "run" / "run.json")["method"] == "eap"
    assert (place / "run" / "notes.txt").read_text() == "mine"


def test_names_with_spaces_and_other_letters(place: Path, call: Call) -> None:
    shutil.copy("task.jsonl", "zwölf [red]日本.jsonl")
    run = ["discover", "zwölf [red]日本.jsonl", "--model", "ln2", "--method", "eap"]
    answer = call(*run, "--out", "Läufe/日本 1")
    assert answer.status == 0
    assert "zwölf [red]日本" in answer.out
    assert status_of("evaluate", "Läufe/日本 1", "--brief") == 0


@pytest.mark.parametrize("method", ["acdc", "eap", "eap-ig"])
def test_hugging_face_folder(gpt2: Path, tmp_path: Path, method: str) -> None:
    run = ["discover", "ioi", "--model", gpt2, "--method", method, *FEW_PROMPTS]
    assert status_of(*run, "--out", tmp_path / "run") == 0
    summary = read(tmp_path / "run" / "run.json")
    assert summary["n_edges_total"] == (12 + 5) + (72 + 10) + 11  # two layers, logits
    assert summary["faithfulness"] is None  # random weights
    assert "the model does not do the task" in " ".join(summary["warnings"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_gpt2_small(tmp_path: Path, data: Path, method: str) -> None:
    folder = save_gpt2(tmp_path / "gpt2", data, layers=12, width=768, heads=12)
    run = ["discover", "ioi", "--model", folder, "--method", method, "--n-prompts", 16]
    assert status_of(*run, "--edges", 300, "--out", tmp_path / "run") == 0
    summary = read(tmp_path / "run" / "run.json")
    assert summary["n_edges_total"] == 32_491
    assert 0 < summary["n_edges_kept"] <= 300


@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("ioi", "acdc"),
        ("docstring", "eap-ig"),
        pytest.param("ioi", "eap-ig", marks=pytest.mark.slow),
        pytest.param("docstring", "acdc", marks=pytest.mark.slow),
    ],
)
def test_bundled_models(tmp_path: Path, task: str, method: str) -> None:
    assert status_of("discover", task, "--method", method, "--out", tmp_path / "run") == 0
    run = read(tmp_path / "run" / "run.json")
    assert run["n_edges_kept"] <= 0.15 * run["n_edges_total"]
    assert 0.85 <= run["faithfulness"] <= 1.15  # on prompts that nothing was chosen on
    low, high = run["faithfulness_interval"]
    assert low < run["faithfulness"] < high
    assert run["prompts"]["test"] == 256
    assert run["warnings"] == []


# --- evaluate -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["acdc", "eap-ig"])
def test_evaluate_reproduces_the_run(shared: Path, call: Call, method: str) -> None:
    run = read(shared / method / "run.json")
    answer = call("evaluate", shared / method, "--brief")
    assert answer.status == 0
    assert answer.err == ""
    values = (f"{run[f'metric_{name}']:.4g}" for name in ("full", "circuit", "empty"))
    assert ", ".join(values) in answer.out
    settings, circuit, _ = read_run(shared / method)
    evaluation, experiment = pipeline.measure(circuit, settings)
    assert len(experiment.task) == N_ROWS
    for name in ("full", "empty", "circuit"):
        value = getattr(evaluation, f"metric_{name}")
        assert value == pytest.approx(run["metric_seen"][name], rel=1e-6)
    assert f"faithfulness                 │ {evaluation.faithfulness:.4g}" in answer.out


@pytest.mark.parametrize("suffix", ["json", "graphml", "dot"])
def test_evaluate_a_circuit_file(place: Path, call: Call, suffix: str) -> None:
    assert call("export", "run", "--out", f"alone.{suffix}").status == 0
    options = ["--task", "task.jsonl", "--model", "ln2", "--metric", "kl"]
    answer = call("evaluate", f"alone.{suffix}", *options, "--brief")
    assert answer.status == 0
    assert f"{read(place / 'run' / 'run.json')['metric_seen']['circuit']:.4g}" in answer.out


def test_evaluate_on_something_else(place: Path, call: Call) -> None:
    answer = call("evaluate", "run", "--metric", "logit_diff", "--n-prompts", 2, "--brief")
    assert answer.status == 0
    assert "logit_diff" in answer.out
    assert "2 prompt pairs" in answer.out


def test_evaluate_on_another_task_forgets_what_belongs_to_the_first(
    gpt2: Path, tmp_path: Path, call: Call
) -> None:
    run = ["discover", "docstring", "--model", gpt2, "--method", "eap", *FEW_PROMPTS]
    options = ["--corruption", "random_doc", "--out", tmp_path / "run"]
    assert call(*run, *options).status == 0
    assert read(tmp_path / "run" / "run.json")["corruption"] == "random_doc"
    answer = call("evaluate", tmp_path / "run", "--task", "ioi", "--brief")
    assert answer.status == 0
    assert "ioi, 128 prompt pairs" in answer.out


# --- export, compare, list, help ----------------------------------------------------------

MAGIC = {
    "svg": b"<?xml",
    "png": b"\x89PNG",
    "pdf": b"%PDF",
    "dot": b"digraph",
    "json": b"{",
    "graphml": b"<?xml",
}


@pytest.mark.parametrize("format", MAGIC)
def test_export(place: Path, call: Call, format: str) -> None:
    circuit = load_circuit(place / "run" / "circuit.json")
    answer = call("export", "run", "--format", format, "--out", "other")
    assert answer == Answer(0, "written to other\n", "")
    assert (place / "other").read_bytes().startswith(MAGIC[format])
    if format in ("json", "graphml", "dot"):
        (place / "other").rename(place / f"other.{format}")
        again = load_circuit(place / f"other.{format}")
        assert again.graph.edge_names() == circuit.graph.edge_names()
        assert (again.in_circuit == circuit.in_circuit).all()
        kept = circuit.in_circuit if format != "json" else slice(None)
        assert (again.scores[kept] == circuit.scores[kept]).all()
        assert again.info == circuit.info


def test_export_takes_the_format_from_the_name(place: Path) -> None:
    for format, magic in MAGIC.items():
        assert status_of("export", "run/circuit.json", "--out", f"new.{format}") == 0
        assert (place / f"new.{format}").read_bytes().startswith(magic)


def test_export_goes_beside_the_circuit(place: Path, call: Call) -> None:
    before = (place / "run" / "circuit.json").read_bytes()
    for format in MAGIC:
        assert call("export", "run", "--format", format).status == 0
    assert sorted(path.name for path in (place / "run").iterdir()) == sorted(
        [*FILES, "circuit.pdf", "circuit.graphml"]
    )
    assert (place / "run" / "circuit.json").read_bytes() == before


def test_export_for_other_viewers(place: Path, call: Call) -> None:
    answer = call("export", "run", "--format", "neuronpedia")
    assert answer == Answer(0, "written to run/circuit.neuronpedia.json\n", "")
    ours, again = (
        load_circuit(place / "run" / name) for name in ("circuit.json", "circuit.neuronpedia.json")
    )
    assert (again.in_circuit == ours.in_circuit).all()
    assert again.info == ours.info


def test_export_a_part(place: Path) -> None:
    assert status_of("export", "run", "--max-edges", 3, "--out", "part.dot") == 0
    assert status_of("export", "run", "--out", "whole.dot") == 0
    part, whole = ((place / f"{name}.dot").read_text().count("->") for name in ("part", "whole"))
    assert part < whole
    mask = load_circuit(place / "run" / "circuit.json").in_circuit
    assert (load_circuit(place / "part.dot").in_circuit == mask).all()


@pytest.mark.parametrize("format", ["svg", "png", "pdf", "dot"])
def test_compare(shared: Path, tmp_path: Path, call: Call, format: str) -> None:
    a, b = shared / "acdc", shared / "eap-ig"
    out = tmp_path / f"both.{format}"
    answer = call("compare", a, b, "--out", out)
    assert answer.status == 0
    assert out.read_bytes().startswith(MAGIC[format])
    first, second = (load_circuit(folder / "circuit.json") for folder in (a, b))
    common = int((first.in_circuit & second.in_circuit).sum())
    jaccard = common / int((first.in_circuit | second.in_circuit).sum())
    assert f"{common} │" in answer.out
    assert f"{jaccard:.3f}" in answer.out
    words = answer.out.replace("\n", " ")
    for edge in np.flatnonzero(first.in_circuit ^ second.in_circuit):
        assert first.graph.edge_name(int(edge)) in words
    assert str(out) in answer.out.replace("\n", "")


def test_compare_without_list(shared: Path, call: Call) -> None:
    answer = call("compare", shared / "acdc", shared / "acdc", "--no-list")
    assert answer.status == 0
    assert "only in" not in answer.out
    assert "1.000" in answer.out


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("tasks", [*TASKS, "FILE"]),
        ("methods", [*METHODS]),
        ("metrics", [*METRICS]),
        ("models", [*BUNDLED, "GPT2LMHeadModel"]),
        ("references", ["ioi", "greater-than", "docstring", "induction"]),
    ],
)
def test_list(call: Call, what: str, names: list[str]) -> None:
    answer = call("list", what)
    assert answer.status == 0
    assert all(name in answer.out for name in names)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(call: Call, command: str) -> None:
    answer = call(command, "--help")
    assert answer.status == 0
    assert f"Example: acdc {command}" in answer.out


def test_help_says_what_happens_by_default(call: Call) -> None:
    words = {name: " ".join(re.findall(r"[^\s│]+", call(name, "-h").out)) for name in COMMANDS}
    assert "with @STEP a checkpoint of it (default: the task's)." in words["discover"]
    assert "See acdc list metrics (default: the run's)." in words["evaluate"]
    assert "File (model: folder) to write (default: beside the circuit)." in words["export"]


def test_discover_has_the_options_of_its_contract(call: Call) -> None:
    out = call("discover", "--help").out
    for option in CONTRACT:
        assert f"--{option} " in out


def test_help_is_light_and_fast() -> None:
    code = (
        "import sys\nfrom acdc.cli import main\n"
        "try: main(['--help'])\nfinally: print(*{m.split('.')[0] for m in sys.modules})"
    )
    took = []
    for _ in range(2):  # the first may have to compile
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        took.append(time.perf_counter() - start)
    assert done.returncode == 0
    heavy = {"torch", "transformers", "transformer_lens", "numba", "numpy", "networkx"}
    assert not heavy & set(done.stdout.splitlines()[-1].split())
    assert min(took) < 2


def test_a_mistyped_task_is_refused_before_torch_is_imported() -> None:
    code = (
        "import sys\nfrom acdc.cli import main\n"
        "try: main(['discover', 'ioii'])\nfinally: print(*{m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown task 'ioii': did you mean ioi?" in done.stderr
    assert not {"torch", "transformers", "numba"} & set(done.stdout.splitlines()[-1].split())


def test_as_a_program(place: Path) -> None:
    program = [sys.executable, "-m", "acdc"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = ["discover", "task.jsonl", "--model", "ln2", "--method", "eap", "--out", "new"]
    done = subprocess.run([*program, *run], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run([*program, "discovr"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "'discover'" in done.stderr


# --- mistakes -----------------------------------------------------------------------------


def refused(call: Call, folder: Path, *arguments: object) -> str:
    """Return the one line of a mistake, after which every file is as it was."""
    before = snapshot(folder)
    answer = call(*arguments)
    assert answer.status == 2
    assert answer.out == ""
    assert answer.err.startswith("acdc: ")
    assert answer.err.count("\n") == 1
    assert answer.err.endswith("\n")
    assert "Traceback" not in answer.err
    assert snapshot(folder) == before
    return answer.err


DISCOVER = "discover task.jsonl --model ln2 --method eap --out new"
BAD_LINES = {
    "discover": ["Missing argument 'task'"],
    "discver ioi": ["discver", "'discover'"],
    "discover iou --out new": ["'iou'", "did you mean ioi?"],
    "discover xyz --out new": ["'xyz'", "known: docstring, greater-than, induction, ioi, pronoun"],
    "discover ln2 --model ln2 --out new": ["unknown task 'ln2'"],
    "discover ./ln2 --model ln2 --out new": ["ln2: it is a folder, expected a file"],
    "discover nowhere.jsonl --model ln2 --out new": ["nowhere.jsonl: no such file"],
    "discover ln2/model.safetensors --model ln2 --out new": ["ends in .jsonl, .json, .csv"],
    "discover task.jsonl --out new": ["task.jsonl", "--model"],
    "discover task.jsonl --model ioi-smal --out new": ["unknown model 'ioi-smal'"],
    "discover task.jsonl --model ./nowhere --out new": ["./nowhere", "no such folder"],
    "discover task.jsonl --model no/where --out new": ["no/where", "out of reach"],
    "discover task.jsonl --model run --out new": ["no config.json"],
    "discover task.jsonl --model task.jsonl --out new": ["is a file"],
    "discover ioi --model ln2 --out new": ["no tokenizer", "token ids"],
    f"{DISCOVER} --method acd": ["'acd'", "did you mean acdc"],
    f"{DISCOVER} --metric logits": ["'logits'", "did you mean logit_diff"],
    f"{DISCOVER} --metrik kl": ["--metrik", "--metric"],
    f"{DISCOVER} surplus": ["surplus"],
    f"{DISCOVER} --threshold": ["--threshold"],
    f"{DISCOVER} --threshold much": ["--threshold", "number"],
    f"{DISCOVER} --threshold nan": ["threshold nan", "finite"],
    f"{DISCOVER} --threshold inf": ["threshold inf", "finite"],
    f"{DISCOVER} --threshold 1 --edges 2": ["threshold", "number of edges", "one of them"],
    f"{DISCOVER} --edges 0": ["n_edges 0", "at least 1"],
    f"{DISCOVER} --edges -5": ["n_edges -5", "at least 1"],
    f"{DISCOVER} --edges 1.5": ["--edges", "integer"],
    f"{DISCOVER} --n-prompts 0": ["n_prompts 0", "at least 1"],
    f"{DISCOVER} --n-prompts 1000": ["1000", f"{N_ROWS} rows"],
    f"{DISCOVER} --batch-size 0": ["batch_size 0", "at least 1"],
    f"{DISCOVER} --method eap-ig --steps 0": ["steps 0", "at least 1"],
    f"{DISCOVER} --steps 3": ["'eap' takes no steps"],
    f"{DISCOVER} --method acdc --guess magic": ["guess 'magic'", "removed, eap, eap-ig"],
    f"{DISCOVER} --memory 0": ["memory 0", "above 0"],
    f"{DISCOVER} --memory nan": ["memory nan", "above 0"],
    f"{DISCOVER} --memory inf": ["memory inf", "above 0"],
    f"{DISCOVER} --seed -1": ["seed -1", "at least 0"],
    f"{DISCOVER} --seed x": ["--seed", "integer"],
    f"{DISCOVER} --intervention median": ["'median'", "resample, zero, mean"],
    f"{DISCOVER} --direction up": ["'up'", "noising, denoising or both"],
    f"{DISCOVER} --corruption abc": ["'abc'", "task.jsonl"],
    f"{DISCOVER} --prepend-bos": ["prepend_bos", "no tokenizer"],
    f"{DISCOVER} --device cuda:99": ["'cuda:99'", "this machine has cpu"],
    f"{DISCOVER} --device tpu": ["'tpu'", "cuda"],
    f"{DISCOVER} --dtype float31": ["'float31'", "float32"],
    f"{DISCOVER} --out run": ["'run'", "not empty", "--overwrite"],
    f"{DISCOVER} --out task.jsonl": ["'task.jsonl'", "is a file"],
    f"{DISCOVER} --out task.jsonl/new/deep": ["task.jsonl' is a file"],
    f"{DISCOVER} --out {'n' * 300}": ["too long"],
    "discover " + "t" * 300 + " --model ln2 --out new": ["too long"],
    "evaluate": ["Missing argument 'circuit'"],
    "evaluate nowhere": ["nowhere", "no such folder or file"],
    "evaluate ln2": ["run.json", "folder of a run"],
    "evaluate run/run.json --task task.jsonl --model ln2": ["run.json", "'cfg'"],
    "evaluate run/circuit.png --task task.jsonl --model ln2": ["'.png'", ".json"],
    "evaluate run/circuit.json": ["circuit.json", "--task"],
    "evaluate run/circuit.json --task task.jsonl": ["task.jsonl", "--model"],
    "evaluate run --metric klm": ["'klm'", "did you mean kl"],
    "evaluate run --batch-size 0": ["batch_size 0"],
    "evaluate run --device tpu": ["'tpu'"],
    "export": ["Missing argument 'circuit'"],
    "export nowhere": ["nowhere", "no such folder or file"],
    "export ln2 --out new.svg": ["cannot read", "circuit.json"],
    "export run --format gif --out new.gif": ["'gif'", "svg, png, pdf, dot, json, graphml"],
    "export run --out new.gif": ["'gif'"],
    "export run --max-edges 0 --out new.svg": ["max-edges 0", "at least 1"],
    "export run --out task.jsonl --format svg": ["'task.jsonl' exists", "--overwrite"],
    "export run --out nowhere/new.svg": ["'nowhere' does not exist"],
    "export run --out ln2 --format svg --overwrite": ["'ln2' is no file but a folder"],
    "export run/circuit.dot --format json": ["circuit.json' exists"],
    "discover task.jsonl --model ln2 --optimal-steps 7": ["optimal_steps 7 does nothing without"],
    "sweep task.jsonl --model ln2 --optimal-steps 7": ["optimal_steps 7 does nothing without"],
    "evaluate run --optimal-steps 7": ["optimal_steps 7 does nothing without --optimal"],
    "evaluate run --optimal-steps 7 --brief": ["optimal_steps 7 does nothing without --optimal"],
    "discover task.jsonl --model ln2 --steps 7": [
        "steps 7 does nothing without guess eap-ig: leave"
    ],
    "discover task.jsonl --model ln2 --guess eap --steps 7": ["steps 7 does nothing without guess"],
    "discover task.jsonl --model ln2 --candidates 9": ["candidates 9 does nothing without latents"],
    "sweep task.jsonl --model ln2 --candidates 9": ["candidates 9 does nothing without latents"],
    "discover task.jsonl --model ln2 --method eap --guess eap": ["takes no guess"],
    "discover task.jsonl --model ln2 --method exact --candidates 9": [
        "does nothing without latents"
    ],
    "discover task.jsonl --model ln2 --method eap --candidates 9": ["takes no candidates"],
    "compare run": ["Missing argument 'second'"],
    "compare run nowhere": ["nowhere", "no such folder or file"],
    "compare run run --out run/circuit.svg": ["circuit.svg' exists", "--overwrite"],
    "compare run run --out new.gif": ["'new.gif'", ".svg"],
    "compare run run --out nowhere/new.svg": ["'nowhere' does not exist"],
    "list": ["Missing argument 'what'"],
    "list model": ["'model'", "did you mean models"],
    "list models tasks": ["tasks"],
    "--verbose": ["--verbose"],
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_mistakes_in_the_command(place: Path, call: Call, line: str) -> None:
    said = refused(call, place, *line.split())
    assert all(text in said for text in BAD_LINES[line]), said


def test_without_a_command_there_is_help(call: Call) -> None:
    answer = call()
    assert answer.status == 2
    assert "discover" in answer.out
    assert answer.err.count("\n") == 1


BAD_TASKS: dict[str, tuple[str, Callable[[Rows], str | bytes], list[str]]] = {
    "empty jsonl": ("bad.jsonl", lambda rows: "", ["bad.jsonl", "no rows"]),
    "blank jsonl": ("bad.jsonl", lambda rows: "\n \n", ["no rows"]),
    "empty json": ("bad.json", lambda rows: "", ["no rows"]),
    "no prompts": ("bad.json", lambda rows: '{"prompts": []}', ["no rows"]),
    "only a header": ("bad.csv", lambda rows: "clean,corrupted,correct_idx\n", ["no rows"]),
    "malformed row": ("bad.jsonl", lambda rows: jsonl(rows[:1]) + "{no", ["row 2", "JSON"]),
    "no object": ("bad.jsonl", lambda rows: "[1]", ["row 1", "expected an object"]),
    "truncated json": ("bad.json", lambda rows: '{"prompts": [', ["no JSON that can be read"]),
    "binary": ("bad.jsonl", lambda rows: bytes(range(256)), ["UTF-8"]),
    "missing column": ("bad.csv", lambda rows: "clean\n1\n", ["row 1", "'corrupted' is missing"]),
    "lengths": (
        "bad.jsonl",
        lambda rows: jsonl([rows[0], rows[1] | {"corrupt": rows[1]["corrupt"][:-1]}]),
        ["row 2", "14 tokens", "13"],
    ),
    "no answer": (
        "bad.jsonl", lambda rows: jsonl([rows[0] | {"answers": []}]), ["row 1", "the pair has none"]
    ),
    "answer of two tokens": (
        "bad.jsonl", lambda rows: jsonl([rows[0] | {"answers": [[1, 2]]}]), ["row 1", "a list"]
    ),
    "answer beyond the vocabulary": (
        "bad.jsonl", lambda rows: jsonl([rows[0] | {"answers": 48}]), ["row 1", "48", "0 to 47"]
    ),
    "text without a tokenizer": (
        "bad.jsonl", lambda rows: jsonl([rows[0] | {"answers": " b"}]), ["row 1", "no tokenizer"]
    ),
    "too long": (
        "bad.jsonl",
        lambda rows: jsonl([rows[0] | {"clean": [1] * 17, "corrupt": [2] * 17}]),
        ["row 1", "17 tokens", "16"],
    ),
    "no wrong answers": (
        "bad.jsonl",
        lambda rows: jsonl([rows[0], {k: v for k, v in rows[1].items() if k != "wrong_answers"}]),
        ["row 2", "'logit_diff'", "kl or nll"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TASKS)
def test_mistakes_in_a_task_file(place: Path, call: Call, case: str) -> None:
    name, content, words = BAD_TASKS[case]
    text = content(parity_rows(place / "ln2", N_ROWS))
    (place / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    run = ["discover", name, "--model", "ln2", "--method", "eap", "--out", "new"]
    said = refused(call, place, *run)
    assert all(text in said for text in words), said


def test_mistakes_in_text(gpt2: Path, tmp_path: Path, call: Call) -> None:
    good = {"clean": "A girl called Lily", "corrupt": "A boy called Tim", "answers": " said"}
    cases: list[tuple[dict[str, str], list[str]]] = [
        ({"corrupt": "A little boy called Tim"}, ["row 2", "4 tokens", "5"]),
        ({"answers": " unbelievably so"}, ["row 2", "' unbelievably so'", "no single token"]),
        ({"answers": ""}, ["row 2", "no single token"]),
    ]
    task = tmp_path / "task.jsonl"
    run = ["discover", task, "--model", gpt2, "--method", "eap-ig", "--metric", "kl"]
    for change, words in cases:
        task.write_text(jsonl([good, good | change]))
        said = refused(call, tmp_path, *run, "--out", tmp_path / "new")
        assert all(text in said for text in words), said
    task.write_text(jsonl([good, good]))
    assert call(*run, "--out", tmp_path / "new").status == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"d_mlp": 95}, ["model.safetensors", "blocks.0.mlp.W_in", "[48, 96]", "[48, 95]"]),
        ({"n_layers": 3}, ["model.safetensors", "lacks 'blocks.2."]),
        ({"n_layers": 1}, ["model.safetensors", "blocks.1."]),
        ({"n_heads": "4"}, ["config.json", "n_heads is '4'"]),
        ({"act_fn": "foo"}, ["config.json", "'foo'"]),
    ],
)
def test_weights_that_do_not_match(
    place: Path, call: Call, change: dict[str, Any], words: list[str]
) -> None:
    path = place / "ln2" / "config.json"
    path.write_text(json.dumps(read(path) | change))
    said = refused(call, place, *DISCOVER.split())
    assert all(text in said for text in words), said


def test_weights_of_a_hugging_face_folder_that_do_not_match(
    gpt2: Path, tmp_path: Path, call: Call
) -> None:
    folder = Path(shutil.copytree(gpt2, tmp_path / "gpt2"))
    config, out = read(folder / "config.json"), tmp_path / "new"
    for change, word in (({"n_embd": 64}, "expected [192]"), ({"n_layer": 3}, "missing")):
        (folder / "config.json").write_text(json.dumps(config | change))
        said = refused(call, tmp_path, "discover", "ioi", "--model", folder, "--out", out)
        assert "do not match config.json" in said
        assert word in said


@pytest.mark.parametrize("content", [b"", b"\0" * 100])
def test_damaged_weights(place: Path, call: Call, content: bytes) -> None:
    (place / "ln2" / "model.safetensors").write_bytes(content)
    assert "no readable safetensors" in refused(call, place, *DISCOVER.split())


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "other edge":
        circuit = read(path)
        circuit["edges"]["a9.h9->logits"] = {"score": 1.0, "in_graph": True}
        path.write_text(json.dumps(circuit))
    elif how == "score":
        path.write_text(path.read_text().replace('"score": ', '"score": "x", "was": ', 1))
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "empty", "other edge", "score", "gone"])
@pytest.mark.parametrize(
    "line",
    [
        "evaluate run",
        "evaluate run/circuit.json --task task.jsonl --model ln2",
        "export run --out new.svg",
        "compare run whole --out new.svg",
        "compare whole run/circuit.json",
    ],
)
def test_damaged_circuits(place: Path, call: Call, how: str, line: str) -> None:
    shutil.copytree("run", "whole")
    damage(place / "run" / "circuit.json", how)
    assert "run/circuit.json" in refused(call, place, *line.split())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["run.json", "no such file"]),
        ("{", ["run.json", "JSON"]),
        ("[" * 100_000, ["run.json", "JSON"]),
        ("[]", ["run.json", "'task'"]),
        ({"batch_size": "many"}, ["batch_size is 'many'", "expected int"]),
        ({"seed": 1.5}, ["seed is 1.5", "expected int"]),
        ({"task": 3}, ["task is 3", "expected str"]),
        ({"n_prompts": 0}, ["n_prompts 0"]),
        ({"task": "nowhere.jsonl"}, ["nowhere.jsonl", "no such file"]),
    ],
)
def test_damaged_runs(place: Path, call: Call, content: Any, words: list[str]) -> None:
    path = place / "run" / "run.json"
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        path.write_text(json.dumps(read(path) | content))
    else:
        path.write_text(content)
    said = refused(call, place, "evaluate", "run")
    assert all(text in said for text in words), said


def test_circuits_of_different_graphs(shared: Path, place: Path, call: Call) -> None:
    run = ["discover", shared / "attn3.jsonl", "--model", shared / "attn3", "--method", "eap"]
    assert call(*run, "--n-prompts", 2, "--out", "other").status == 0
    said = refused(call, place, "compare", "run", "other", "--out", "new.svg")
    assert "different graphs" in said
    assert "n_layers is 2 in one and 3 in the other" in said
    assert "circuit's graph" in refused(call, place, "evaluate", "run", "--model", shared / "attn3")


def test_out_of_memory(place: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried to")]
    bugs = [RuntimeError("a bug"), ValueError("a bug")]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise errors.pop()

    monkeypatch.setattr(pipeline, "load_experiment", fail)
    for _ in range(2):
        assert "--batch-size" in refused(call, place, *DISCOVER.split())
    errors += bugs
    for bug in reversed(bugs):
        with pytest.raises(type(bug), match="a bug"):
            main(DISCOVER.split())


def test_stopped_by_hand(place: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "load_experiment", stop)
    before = snapshot(place)
    assert call(*DISCOVER.split()) == Answer(130, "", "acdc: stopped\n")
    assert snapshot(place) == before


def test_run_settings_survive_the_file(shared: Path) -> None:
    summary = read(shared / "eap-ig" / "run.json")
    settings = Settings.read(summary)
    assert (settings.options, settings.seed, settings.batch_size) == ({"steps": 3}, 7, 5)
    assert cli.__all__ == ["app", "main"]


def test_sweep(place: Path, call: Call) -> None:
    out = place / "sweep"
    done = call("sweep", "task.jsonl", "--model", "ln2", "--thresholds", "0.2,0.01", "--out", out)
    assert done.status == 0
    summary = json.loads((out / "sweep.json").read_text())
    assert [row["threshold"] for row in summary["points"]] == [0.01, 0.2]
    for row in summary["points"]:
        stored = json.loads((out / f"circuit-{row['threshold']:.4g}.json").read_text())
        kept = sum(edge["in_graph"] for edge in stored["edges"].values())
        assert kept == row["n_edges_kept"]
    assert (out / "frontier.csv").read_text().count("\n") == 3
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (out / "frontier.svg").read_bytes()
    assert "faithfulness" in done.out


def test_sweep_of_a_coarser_and_a_finer_graph(place: Path, call: Call) -> None:
    run = ["sweep", "task.jsonl", "--model", "ln2", "--thresholds", "0.2", "--n-prompts", 2]
    assert call(*run, "--no-split-qkv", "--split-embed", "--out", place / "sweep").status == 0
    shape = load_circuit(place / "sweep" / "circuit-0.2.json").graph.shape
    assert (shape.split_qkv, shape.split_embed) == (False, True)


@pytest.mark.parametrize("thresholds", ["0.1,x", "0", "-1", "nan", "0.1,0.1", ""])
def test_sweep_refuses(thresholds: str, place: Path, call: Call) -> None:
    out = place / "sweep"
    done = call("sweep", "task.jsonl", "--model", "ln2", "--thresholds", thresholds, "--out", out)
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert "threshold" in done.err
    assert not out.exists()


def test_version(call: Call) -> None:
    answer = call("--version")
    assert (answer.status, answer.out) == (0, f"acdc {version('acdc-circuits')}\n")


@pytest.mark.parametrize(("shell", "typed", "offered", "not_offered"), [
    ("bash", "acdc what", "what-if", "discover"),
    ("zsh", "acdc what", "what-if", "discover"),
    ("zsh", "acdc discover gr", "greater-than", "ioi"),
    ("bash", "acdc discover ioi --positions sp", "span", "token"),
    ("bash", "acdc list ref", "references", "tasks"),
    ("bash", "acdc discover pairs.js", "", "ioi"),
])  # fmt: skip
def test_completion(shell: str, typed: str, offered: str, not_offered: str) -> None:
    asked = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    environment = os.environ | asked | {
        "_TYPER_COMPLETE_ARGS": typed, "_ACDC_COMPLETE": f"complete_{shell}"
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "acdc"], env=environment, capture_output=True, text=True
    )
    assert offered in done.stdout
    assert not_offered not in done.stdout
