"""Doors of data files: tasks, circuits, references, runs, constants, checkpoints, evaluations."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import (
    MANY,
    QUICK,
    Door,
    damaged_bytes,
    damaged_json,
    damaged_lines,
    damaged_text,
    damaged_values,
    fuzz,
    tried,
)
from hypothesis import strategies as st
from safetensors.torch import save

from acdc.ablations import ABLATIONS
from acdc.engine.checkpoint import Checkpoint, Decided
from acdc.engine.constants import Constants, load_constants
from acdc.measure.evaluation import Evaluation
from acdc.models import MODELS
from acdc.pages.evidence import read_evidence, read_repeated
from acdc.runs.claim import Claim
from acdc.runs.folder import Settings, read_run
from acdc.runs.reopen import check_summary
from acdc.tasks import Task, load_task
from acdc.tasks.dataset import load_dataset
from graphs import (
    Circuit,
    GraphShape,
    Reference,
    component_graph,
    load_circuit,
    read_reference,
    save_circuit,
    to_dot,
    to_networkx,
)
from graphs.errors import InputError
from graphs.known.reference import write_reference
from graphs.sites import Site

D_VOCAB = 300


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODELS["ioi-small"])


@cache
def folder() -> Path:
    """Return a folder for what the originals are made with."""
    return Path(tempfile.mkdtemp(prefix="acdc-fuzz-"))


# --- tasks --------------------------------------------------------------------------------

ROWS = [
    {"clean": [5, 6, 7], "corrupt": [5, 8, 7], "answers": [9], "wrong_answers": [10, 11]},
    {"clean": [5, 6, 7, 8], "corrupt": [5, 8, 7, 7], "answers": 9, "wrong": [10], "scored": [1, 3]},
    {"clean": "Then, Mary gave a ring to", "corrupt": "Then, John gave a ring to",
     "answers": [" Mary"], "wrong_answers": [" John"]},
    {"clean": [5, 6, 7], "corrupt": [5, 8, 7], "answers": [" Mary"]},
]  # fmt: skip
SPANNED = [
    {"clean": [5, 6, 7], "corrupt": [5, 8, 7], "answers": [9], "spans": {"A": [1], "B": [2]}},
    {"clean": [6, 6, 7], "corrupt": [6, 8, 7], "answers": [9], "spans": {"A": [1], "B": [0, 2]}},
]
CSV = (
    "clean,corrupted,correct_idx,incorrect_idx,spans\n"
    '"Then, Mary left",Then John left?,62,"[1, 2]",\n"[1, 2]","[1, 3]",5,6,\n'
)


def lines(rows: Sequence[Any]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def read_task(path: Path) -> Task:
    return load_task(str(path), tokenizer(), d_vocab=D_VOCAB, n_ctx=64)


def check_task(task: Task) -> None:
    assert task.pairs
    for pair in task.pairs:
        assert 0 < len(pair.clean) == len(pair.corrupt) <= 64
        for ids in (pair.clean, pair.corrupt, pair.answers, pair.wrong_answers):
            assert all(type(token) is int and 0 <= token < D_VOCAB for token in ids)
        answers = (*pair.answers, *pair.wrong_answers)
        assert len(set(answers)) == len(answers)
        assert pair.scored
        assert all(0 <= position < len(pair.clean) for position in pair.scored)
        taken = [position for positions in pair.spans.values() for position in positions]
        assert len(set(taken)) == len(taken)
        assert all(0 <= position < len(pair.clean) for position in taken)
        assert pair.spans.keys() == task.pairs[0].spans.keys()


def read_prompts(path: Path) -> tuple[tuple[int, ...], ...]:
    return load_dataset(str(path), tokenizer(), d_vocab=D_VOCAB, n_ctx=64)


def check_prompts(prompts: tuple[tuple[int, ...], ...]) -> None:
    assert prompts
    for ids in prompts:
        assert 0 < len(ids) <= 64
        assert all(type(token) is int and 0 <= token < D_VOCAB for token in ids)


TASKS = (
    Door("task.jsonl", [lines(ROWS), lines(SPANNED)], read_task, check_task, damaged_lines,
         ".jsonl"),
    Door("task.json", [json.dumps({"prompts": rows}).encode() for rows in (ROWS, SPANNED)],
         read_task, check_task, damaged_json, ".json"),
    Door("task.csv", [CSV.encode()], read_task, check_task, damaged_text, ".csv"),
    Door("prompts.txt", [b"Then, Mary left\nThen, John left"], read_prompts, check_prompts,
         damaged_text, ".txt"),
    Door("prompts.jsonl", [lines([{"prompt": [1, 2]}, {"prompt": "Then, Mary"}])], read_prompts,
         check_prompts, damaged_lines, ".jsonl"),
)  # fmt: skip


# --- circuits and references --------------------------------------------------------------

SHAPES = (
    GraphShape(n_layers=2, n_heads=2),
    GraphShape(n_layers=2, n_heads=4, n_kv_heads=2, split_embed=True),
    GraphShape(n_layers=2, n_heads=1, sites=(Site("mlp_out", 0, (1, 5)), Site("attn_z", 1, (2,)))),
    GraphShape(n_layers=1, n_heads=2, spans=("A", "B", "END"), scored_spans=("END",),
               reaches=((0, 2), (1, 2))),
)  # fmt: skip


def circuit_of(shape: GraphShape, **info: Any) -> Circuit:
    graph = component_graph(shape)
    rng = np.random.default_rng(0)
    about = {"task": "ioi", "model": "m", "method": "eap", "metric": "kl", "faithfulness": 0.5}
    kept = rng.random(graph.n_edges) < 0.5
    return Circuit(graph, rng.normal(size=graph.n_edges), kept, {**about, "d_model": 8, **info})


def circuits(suffix: str) -> list[bytes]:
    contents = []
    for shape in SHAPES:
        path = folder() / f"circuit{suffix}"
        save_circuit(circuit_of(shape), path)
        contents.append(path.read_bytes())
    return contents


def check_circuit(circuit: Circuit) -> None:
    """A circuit is sound, and everything that is made of one can be made of it."""
    n_edges = circuit.graph.n_edges
    assert circuit.scores.shape == circuit.in_circuit.shape == (n_edges,)
    assert np.isfinite(circuit.scores).all()
    assert circuit.in_circuit.dtype == bool
    assert len(circuit.graph.receiver_start) == len(circuit.graph.receivers) + 1
    if n_edges < 5000:
        path = folder() / "again.json"
        save_circuit(circuit, path)
        again = load_circuit(path)
        assert again.graph.shape == circuit.graph.shape
        assert (again.scores == circuit.scores).all()
        assert again.edges() == circuit.edges()
        to_dot(circuit)
        to_networkx(circuit)


def references() -> list[bytes]:
    contents = []
    for shape, granularity in ((SHAPES[0], "edges"), (SHAPES[1], "edges"), (SHAPES[0], "nodes")):
        circuit = circuit_of(shape)
        reference = Reference(
            "mine", "one line", "m", "ioi", "me", "nothing", circuit.graph, tuple(circuit.edges()),
            roles={"mover": ("a1.h0",)}, granularity=granularity, optional_nodes=("m0",),
            positions={"a0.h1": ("S", "IO")},
        )  # fmt: skip
        write_reference(reference, folder() / "reference.json")
        contents.append((folder() / "reference.json").read_bytes())
    return contents


def check_reference(reference: Reference) -> None:
    graph = reference.graph
    assert reference.mask().shape == (graph.n_edges,)
    assert set(reference.nodes) <= set(graph.nodes)
    assert set(reference.positions) <= {*graph.senders, *graph.receivers}
    assert all(set(nodes) <= set(graph.nodes) for nodes in reference.roles.values())
    assert len(reference.node_pairs) <= len(reference.edges)
    assert str(reference.ablation) is not None


LARGE = 3 << 30  # a graph of 50 million edges takes one: what a file of two lines may ask for
GRAPHS = (
    Door("circuit.json", circuits(".json"), load_circuit, check_circuit, damaged_json, ".json",
         most_bytes=LARGE),
    Door("circuit.graphml", circuits(".graphml"), load_circuit, check_circuit, damaged_text,
         ".graphml", most_bytes=LARGE),
    Door("circuit.dot", circuits(".dot"), load_circuit, check_circuit, damaged_text, ".dot", 0.1,
         most_bytes=LARGE),
    Door("reference.json", references(), read_reference, check_reference, damaged_json, ".json",
         most_bytes=LARGE),
)  # fmt: skip


# --- runs ---------------------------------------------------------------------------------


def run_json() -> bytes:
    circuit = circuit_of(SHAPES[0])
    known: dict[str, Any] = {
        "n_edges_total": circuit.graph.n_edges, "n_edges_kept": circuit.n_edges,
        "n_prompts": 8, "timings": {"load": 1.0},
    }  # fmt: skip
    seen, able = Evaluation(1.0, 0.0, 0.5, 0.5), {"doubts": ["one"], "gap": 1.0}
    prompts = {"fit": 8, "select": 0, "test": 40}
    known |= Claim(seen, seen, (0.4, 0.6), prompts, able, ("one",)).as_dict()
    known |= {"versions": {"python": "3"}, "task_info": {"lengths": {"8": 8}}}
    asked = Settings("ioi", model="m", method="eap-ig", metric="kl", options={"steps": 3})
    return json.dumps({**asdict(asked), **known}).encode()


def a_run(path: Path) -> Settings:
    inside = folder() / "run"
    inside.mkdir(exist_ok=True)
    shutil.copy(path, inside / "run.json")
    save_circuit(circuit_of(SHAPES[0]), inside / "circuit.json")
    settings, circuit, summary = read_run(inside)
    check_summary(inside, summary, circuit)
    return settings


def check_settings_(settings: Settings) -> None:
    assert settings.trust_remote_code is False
    asked = {field.name: getattr(settings, field.name) for field in fields(Settings)}
    options, given = asked.pop("options"), asked.pop("given")
    assert all(name in ("task", "model", "metric", "method") for name in given)
    for name, value in (*asked.items(), *options.items()):
        assert isinstance(value, str | int | float | bool | None), name
        if isinstance(value, str):
            value.encode()
            assert "\0" not in value
        if isinstance(value, float):
            assert np.isfinite(value)
    assert settings.n_prompts is None or 1 <= settings.n_prompts <= 10**6
    assert settings.batch_size >= 1


EVALUATION = {
    "task": "ioi", "model": "m", "metric": "kl", "n_prompts": 8, "prompts": "unseen", "seen": False,
    "n_edges_kept": 0, "n_edges_total": 0, "circuit_digest": "",
    "ablations": [{"intervention": "zero", "direction": "noising", "faithfulness": 0.5,
                   "faithfulness_low": 0.1, "faithfulness_high": None}],
    "areas": [{"measure": "CPR", "value": 0.5, "low": 0.1, "high": 0.9}],
    "tests": {"verdicts": [{"test": "minimality", "passed": None, "p_value": 0.5, "level": 0.05,
                            "n": 8, "unit": "edges", "says": "nothing"}],
              "edges": [{"edge": "a", "effect": 0.1, "surpassed": 0.5, "p_value": 0.5}],
              "complement": 0.1},
}  # fmt: skip
STABILITY = {
    "task": "ioi", "model": "m", "n_edges_total": 0, "method": "eap", "mean_jaccard": 0.5,
    "runs": [{"seed": 0, "n_edges_kept": 3, "faithfulness": 0.5}], "edges": {"input->logits": 1},
}  # fmt: skip


def evaluation() -> bytes:
    circuit = circuit_of(SHAPES[0])
    sizes = {"n_edges_kept": circuit.n_edges, "n_edges_total": circuit.graph.n_edges}
    by_prompt = {"prompts": [[1, 2], [3]], "effects": {"input->logits": [0.5, -1.0]}}
    others = {"circuit_digest": circuit.digest, "per_prompt": by_prompt}
    return json.dumps({**EVALUATION, **sizes, **others}).encode()


def stability() -> bytes:
    n_edges = circuit_of(SHAPES[0]).graph.n_edges
    return json.dumps({**STABILITY, "n_edges_total": n_edges}).encode()


def check_finite(value: Any) -> None:
    """Every number in a record is finite."""
    if isinstance(value, float | np.ndarray):
        assert np.isfinite(value).all()
    elif isinstance(value, dict):
        for item in value.values():
            check_finite(item)
    elif isinstance(value, list | tuple):
        for item in value:
            check_finite(item)


def check_record(record: Any) -> None:
    check_finite(asdict(record))


RUNS = (
    Door("run.json", [run_json()], a_run, check_settings_, damaged_json, ".json"),
    Door("evaluation.json", [evaluation()],
         lambda path: read_evidence(path, circuit_of(SHAPES[0])), check_record, damaged_json),
    Door("stability.json", [stability()],
         lambda path: read_repeated(path, Settings("ioi", model="m"), circuit_of(SHAPES[0])),
         check_record, damaged_json),
)  # fmt: skip


# --- constants and checkpoints ------------------------------------------------------------


def constants() -> list[bytes]:
    torch.manual_seed(0)
    some = [torch.randn(1, 1, 1, 1, 4), torch.randn(2, 1, 1, 1, 3)]
    by_length = {n: [torch.randn(s, 1, 1, n, 4) for s in (1, 2)] for n in (3, 5)}
    return [
        Constants("mean", "noising", {None: some}, {"n_prompts": 3}).as_bytes(),
        Constants("mean-positional", "denoising", by_length).as_bytes(),
    ]


def damaged_tensors(originals: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Well-formed files of other tensors, or torn ones."""
    values = st.sampled_from((0.0, 1.0, float("nan"), float("inf"), -1e300, 1e-320))
    dtypes = st.sampled_from((
        torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int64,
        torch.uint8, torch.complex64, torch.float8_e4m3fn,
    ))  # fmt: skip
    shapes = st.sampled_from(
        ([1, 1, 1, 1, 4], [2, 1, 1, 3, 4], [1, 2, 1, 1, 4], [4], [], [0], [1, 1, 0], [2] * 6)
    )
    names = st.sampled_from(
        ("all.0", "all.1", "all.2", "3.0", "5.0", "5.1", "all.-1", "x", ".", "")
    )
    names |= st.text(max_size=6)
    tensors = st.dictionaries(
        names, st.builds(_full, shapes, values, dtypes), max_size=3
    )  # fmt: skip
    about = {"format": "acdc-constants-1", "intervention": "mean", "direction": "noising"}
    abouts = damaged_values({**about, "report": '{"n_prompts": 3}'}).map(_texts)
    made = st.builds(save, tensors, st.just({**about, "report": "{}"}) | abouts)
    return made | made | damaged_bytes(originals)


def _full(shape: list[int], value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.float64).to(dtype)


def _texts(value: Any) -> dict[str, str]:
    """Metadata are texts by texts."""
    if not isinstance(value, dict):
        return {}
    texts = {key: one if isinstance(one, str) else json.dumps(one) for key, one in value.items()}
    return {key: one for key, one in texts.items() if _is_utf8(key) and _is_utf8(one)}


def _is_utf8(text: str) -> bool:
    return text.encode("utf-8", "replace").decode() == text


def check_constants(found: Constants) -> None:
    assert ABLATIONS[found.intervention].constant
    assert found.direction in ("noising", "denoising")
    assert found.values
    for length, some in found.values.items():
        for tensor in some:
            assert tensor.is_floating_point()
            assert torch.isfinite(tensor.float()).all()
            assert tensor.shape[1:3] == (1, 1)
            assert tensor.shape[3] in (1, length)
            assert tensor.shape[4]


GRAPH = component_graph(SHAPES[0])
SETTINGS = {"task": "ioi", "threshold": 0.1, "n_edges": None}


def decided(**changes: Any) -> bytes:
    arrays = {**vars(Decided.nothing(GRAPH)), "work": np.array('{"n_dead": 3}'), **changes}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def read_checkpoint(path: Path, name: str) -> Decided:
    inside = folder() / "search"
    shutil.rmtree(inside, ignore_errors=True)
    Checkpoint(inside, SETTINGS, period=0).save(0.1, Decided.nothing(GRAPH))
    shutil.copy(path, inside / "checkpoint" / name)
    return Checkpoint(inside, SETTINGS).load(GRAPH, 0.1)


def check_decided(found: Decided) -> None:
    assert found.in_circuit.shape == found.scores.shape == (GRAPH.n_edges,)
    assert (found.in_circuit.dtype, found.scores.dtype) == (bool, np.float64)
    assert np.isfinite(found.scores).all()
    assert 0 <= found.n_finished <= len(GRAPH.receivers)
    assert all(type(count) is int and count >= 0 for count in found.work.values())
    found.scores += 1  # it can be written to


def damaged_decided(originals: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Well-formed checkpoints of other arrays, or torn ones."""
    n = GRAPH.n_edges
    arrays = st.one_of(
        st.builds(np.full, st.sampled_from(((n,), (n, 1), (n + 1,), (), (0,), (1, n))),
                  st.sampled_from((0.0, 1.0, float("nan"), 1e300, -1)),
                  st.sampled_from(("?", "<f8", "<f4", "<i8", ">f8", "<c16", "<U3", "S2"))),
        st.integers(-(2**63), 2**63 - 1).map(np.array),
        st.floats().map(np.array),
        damaged_values({"n_dead": 3, "n_nodes": 1}).map(lambda value: np.array(json.dumps(value))),
    )  # fmt: skip
    names = st.sampled_from(("in_circuit", "scores", "n_finished", "work", "rounding", "more"))
    made = st.dictionaries(names, arrays, min_size=1, max_size=2).map(lambda some: decided(**some))
    return made | made | damaged_bytes(originals)


def settings_json() -> bytes:
    inside = folder() / "settings"
    Checkpoint(inside, SETTINGS, period=0).save(0.1, Decided.nothing(GRAPH))
    return (inside / "checkpoint" / "settings.json").read_bytes()


STATES = (
    Door("constants.safetensors", constants(), load_constants, check_constants, damaged_tensors),
    Door("checkpoint.npz", [decided()], partial(read_checkpoint, name="acdc-0.1.npz"),
         check_decided, damaged_decided),
    Door("checkpoint settings.json", [settings_json()],
         partial(read_checkpoint, name="settings.json"), check_decided, damaged_json),
)  # fmt: skip

DOORS = (*TASKS, *GRAPHS, *RUNS, *STATES)


@pytest.mark.parametrize("door", DOORS, ids=str)
def test_a_little(door: Door, tmp_path: Path) -> None:
    fuzz(door, tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS, ids=str)
def test_a_lot(door: Door, tmp_path: Path) -> None:
    fuzz(door, tmp_path, MANY)


# --- cases by name ------------------------------------------------------------------------


def refused(read: Callable[[Path], Any], content: str | bytes, name: str, folder: Path) -> str:
    """Return what a door says of a content that it must refuse, within bounds."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    error = tried(lambda: read(path))
    assert isinstance(error, InputError), error
    return str(error)


def cfg(**config: Any) -> str:
    return json.dumps({"cfg": {"n_layers": 1, "n_heads": 1, **config}, "nodes": {}, "edges": {}})


EVERY = list(range(100_000))
SIZES: dict[str, tuple[dict[str, Any], str]] = {
    "a billion layers": ({"n_layers": 10**9}, "at most 100,000 heads in all"),
    "a billion heads": ({"n_heads": 10**9}, "at most 100,000 heads in all"),
    "layers of many digits": ({"n_layers": 10**400}, "at most 100,000 heads in all"),
    "100,000 layers": ({"n_layers": 10**5}, "a graph of 40,000,300,001 edges: expected at most"),
    "50,000 key heads": ({"n_heads": 10**5, "n_key_value_heads": 10**9}, "cannot share"),
    "many spans": ({"spans": ",".join(map(str, EVERY)), "scored_spans": "1"}, "100,000 spans"),
    "spans that all reach": (
        {"spans": ",".join(map(str, EVERY[:9999])), "scored_spans": "1"}, "use fewer spans",
    ),
    "reaches of many digits": (
        {"spans": "A", "scored_spans": "A", "reaches": "9" * 5000 + ":0"}, "expected span:spans",
    ),
    "latents without end": (
        {"sites": [{"kind": "mlp_out", "layer": 0, "latents": [10**400]}]}, "below 1,000,000,000",
    ),
    "every head feeds every latent": (
        {"n_heads": 10**5, "sites": [{"kind": "attn_z", "layer": 0, "latents": EVERY}]},
        "feed more than 50,000,000 nodes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes_in_a_circuit_file_are_bounded(name: str, tmp_path: Path) -> None:
    config, words = SIZES[name]
    assert words in refused(load_circuit, cfg(**config), "circuit.json", tmp_path)


def test_a_large_graph_of_a_small_file_costs_its_arrays(tmp_path: Path) -> None:
    """46 million edges: no table of their names is made to look up none."""
    path = tmp_path / "circuit.json"
    path.write_text(cfg(n_layers=3400))
    circuit = tried(lambda: load_circuit(path), most_bytes=2 << 30)
    assert circuit.graph.n_edges == 46_250_201


INFOS: dict[str, tuple[dict[str, Any], str]] = {
    "task": ({"task": ["ioi"]}, "'task' is ['ioi'], expected a text or null"),
    "method": ({"method": {}}, "'method' is {}, expected a text or null"),
    "faithfulness in words": ({"faithfulness": "high"}, "'faithfulness' is 'high', expected a"),
    "no faithfulness": ({"faithfulness": float("nan")}, "'faithfulness' is nan, expected a finite"),
    "a long one": ({"faithfulness": 10**400}, "expected a finite number or null"),
    "a flag": ({"faithfulness": True}, "'faithfulness' is True"),
    "width": ({"d_model": -5}, "'d_model' is -5, expected a whole number above 0 or null"),
}


@pytest.mark.parametrize("name", INFOS)
def test_what_a_circuit_says_of_itself_is_checked(name: str, tmp_path: Path) -> None:
    info, words = INFOS[name]
    content = json.dumps({**json.loads(cfg()), "info": info})
    assert words in refused(load_circuit, content, "circuit.json", tmp_path)


LAUGHS = (
    '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;">]>'
    '<graphml xmlns="http://graphml.graphdrawing.org/xmlns"><graph>&b;</graph></graphml>'
)
PASSWORDS = LAUGHS.replace('"aaaaaaaaaa"', 'SYSTEM "file:///etc/passwd"')


@pytest.mark.parametrize("content", [LAUGHS, PASSWORDS, LAUGHS.encode("utf-16")])
def test_graphml_with_entities_is_refused(content: str | bytes, tmp_path: Path) -> None:
    said = refused(load_circuit, content, "circuit.graphml", tmp_path)
    assert "it has a DOCTYPE, which no GraphML needs" in said


def test_warnings_of_graphml_are_errors(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    content = circuits(".graphml")[0].decode().replace('attr.type="long"', "")
    assert "No key type for id" in refused(load_circuit, content, "circuit.graphml", tmp_path)
    assert not recwarn.list


def test_dot_that_multiplies_is_read_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Forty kilobytes that mean a hundred million edges; Graphviz' own words stay away."""
    monkeypatch.setattr("graphs.pictures.rendering._MOST_SECONDS", 2)
    many = " ".join(f"n{i}" for i in range(10_000))
    said = refused(load_circuit, f"digraph {{ {{{many}}} -> {{{many}}} }}", "a.dot", tmp_path)
    assert "Graphviz cannot read it" in said
    said = refused(load_circuit, "digraph { \x1b]0;title\x07 }", "a.dot", tmp_path)
    assert "Graphviz cannot read it" in said
    assert capfd.readouterr() == ("", "")


def test_a_reference_without_end_is_not_read() -> None:
    error = tried(lambda: read_reference("/dev/zero"))
    assert str(error) == "cannot read /dev/zero: it is a device, pipe or socket, expected a file"


def test_a_reference_of_many_names_is_no_hang(tmp_path: Path) -> None:
    content = json.loads(references()[0])
    content["graph"] |= {"n_layers": 1, "n_heads": 30_000}
    content |= {"edges": ["input->a0.h0<q>"], "roles": {}, "positions": {}, "optional_nodes": [
        f"a0.h{i}" for i in range(29_999, -1, -1)] + ["x"]}  # fmt: skip
    said = refused(read_reference, json.dumps(content), "reference.json", tmp_path)
    assert "optional_nodes: no node 'x' in the graph" in said


def test_every_file_has_a_bound_of_its_own(tmp_path: Path) -> None:
    """Terabytes that are not on the disk are refused before they are read."""
    for door in DOORS:
        path = tmp_path / f"large{door.suffix}"
        with path.open("wb") as file:
            file.truncate(1 << 40)
        if door in (*TASKS, *GRAPHS, RUNS[1], RUNS[2], STATES[0]):
            error = tried(lambda: door.read(path))  # noqa: B023
            assert "it has 1,048,576 MiB, expected at most" in str(error), door
