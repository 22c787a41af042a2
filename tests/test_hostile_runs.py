"""A run's folder from somebody else: nothing in it is executed, and it writes nowhere else."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, read

from acdc.errors import CircuitFileError, ModelError, OptionError
from acdc.evidence.assessment import evaluate
from acdc.evidence.bases import sizes_at
from acdc.evidence.latents import look
from acdc.pages import gather
from acdc.runs.discover import discover
from acdc.runs.folder import read_run
from acdc.runs.opened import open_run
from graphs.files.beside import settle
from graphs.text import MOST_SHOWN

CODE = """
from pathlib import Path
import transformers

Path({canary!r}).touch()

class OwnConfig(transformers.GPT2Config):
    model_type = "own"

class GPT2LMHeadModel(transformers.GPT2LMHeadModel):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def original(
    gpt2: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return the folder of a run on a small random GPT-2."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run = discover("ioi", model=str(gpt2), method="eap", n_edges=40, n_prompts=4)
    run.save(folder)
    return folder


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the file that the code of the model in :func:`evil` writes."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path / "canary"
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


@pytest.fixture
def evil(
    original: Path,
    gpt2: Path,
    canary: Path,
    tmp_path: Path,
) -> Path:
    """Return a run whose model has code of its own, and whose run.json says to run it."""
    folder = tmp_path / "run"
    shutil.copytree(original, folder)
    shutil.copytree(gpt2, folder / "model")
    (folder / "model" / "own.py").write_text(CODE.format(canary=str(canary)))
    path = folder / "model" / "config.json"
    config = read(path) | {"model_type": "own", "architectures": ["GPT2LMHeadModel"]}
    config["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.GPT2LMHeadModel",
    }
    path.write_text(json.dumps(config))
    path = folder / "run.json"
    changes = {"model": str(folder / "model"), "trust_remote_code": True}
    path.write_text(json.dumps(read(path) | changes))
    return folder


COMMANDS: dict[str, tuple[object, ...]] = {
    "evaluate": ("evaluate", "{run}", "--no-tests"),
    "evaluate --brief": ("evaluate", "{run}", "--brief"),
    "self-repair": ("self-repair", "{run}", "--role", "x=a0.h0,a1.h1"),
    "report": ("report", "{run}", "--no-tests", "--out", "{out}/page.html"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_s_folder_cannot_ask_for_its_code(
    name: str,
    evil: Path,
    canary: Path,
    tmp_path: Path,
    call: Call,
) -> None:
    command = [str(word).format(run=evil, out=tmp_path) for word in COMMANDS[name]]
    answer = call(*command)
    assert answer.status == 2
    assert "wants to run Python code of its own; pass --trust-remote-code" in answer.err
    assert answer.err.count("\n") == 1
    assert not canary.exists()
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_user_can(
    name: str,
    evil: Path,
    canary: Path,
    tmp_path: Path,
    call: Call,
) -> None:
    command = [str(word).format(run=evil, out=tmp_path) for word in COMMANDS[name]]
    answer = call(*command, "--trust-remote-code")
    assert answer.status == 0, answer.err
    assert canary.exists()


PYTHON: dict[str, Callable[..., Any]] = {
    "gather": lambda run, **trust: gather(run, tests=False, **trust),
    "sizes_at": lambda run, **trust: sizes_at([open_run(run)] * 2, 0.9, **trust),
    "evaluate": lambda run, **trust: evaluate(run, tests=False, **trust),
}  # fmt: skip


@pytest.mark.parametrize("name", PYTHON)
def test_in_python_the_call_says_so(name: str, evil: Path, canary: Path) -> None:
    with pytest.raises(ModelError, match="pass --trust-remote-code"):
        PYTHON[name](evil)
    assert not canary.exists()
    PYTHON[name](evil, trust_remote_code=True)
    assert canary.exists()


def test_latents_are_looked_at_without_code(evil: Path, canary: Path, tmp_path: Path) -> None:
    """The run of bundled dictionaries, its model exchanged for one with code."""
    folder = tmp_path / "latents"
    discover("ioi", saes="bundled", n_edges=30, n_prompts=4, max_latents=30).save(folder)
    changes = {"model": str(evil / "model"), "trust_remote_code": True}
    (folder / "run.json").write_text(json.dumps(read(folder / "run.json") | changes))
    with pytest.raises(ModelError, match="pass --trust-remote-code"):
        look(folder)
    assert not canary.exists()


def test_what_was_trusted_once_is_not_trusted_again(
    evil: Path,
    canary: Path,
    tmp_path: Path,
    call: Call,
) -> None:
    """It stays in run.json as information alone."""
    options = ["--model", evil / "model", "--method", "eap", "--edges", 40, "--n-prompts", 4]
    answer = call("discover", "ioi", *options, "--trust-remote-code", "--out", tmp_path / "mine")
    assert answer.status == 0, answer.err
    assert read(tmp_path / "mine" / "run.json")["trust_remote_code"] is True
    assert read_run(tmp_path / "mine")[0].trust_remote_code is False
    canary.unlink()
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]
    answer = call("evaluate", tmp_path / "mine", "--brief")
    assert "pass --trust-remote-code" in answer.err
    assert not canary.exists()


# --- hostile in every field -----------------------------------------------------------------

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"
ESCAPE = "\x1b[31mred\x1b]0;title\x07\u202e"
EVIL = f"{ESCAPE}{SCRIPT}[/bold]{{7*7}}$(touch pwned)`touch pwned`;touch pwned"
PICKLE = b"cposix\nsystem\n(S'touch pwned'\ntR."  # what pickle.loads would execute
CODE_AT_IMPORT = "open('pwned', 'w').close()\n"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.link": 1, "os.symlink": 1,
    "os.chmod": 0, "os.chown": 0, "os.truncate": 0, "shutil.rmtree": 0, "shutil.copyfile": 1,
}  # fmt: skip
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "socket.connect")


class Watch:
    """What this process reads, writes and starts while it is watched."""

    def __init__(self) -> None:
        self.on, self.read, self.written, self.started = False, set[str](), set[str](), list[Any]()
        sys.addaudithook(self._see)  # for good: there is no way to take one away

    def _see(self, event: str, about: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(about[0], str | bytes):
            kind = self.written if about[2] & WRITING else self.read
            kind.add(os.path.abspath(os.fsdecode(about[0])))
        elif event in CHANGES and isinstance(about[CHANGES[event]], str | bytes | os.PathLike):
            self.written.add(os.path.abspath(os.fsdecode(about[CHANGES[event]])))
        elif event == "subprocess.Popen" and about[0] != sys.executable:
            self.started.append(about)
        elif event in STARTS:
            self.started.append((event, about))
        elif event == "exec" and "pytest-of" in str(about[0].co_filename):
            self.started.append(about)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.read.clear(), self.written.clear(), self.started.clear()
        self.on = True
        try:
            yield
        finally:
            self.on = False


WATCH = Watch()


def tree(folder: Path) -> dict[str, Any]:
    """Everything in a folder: contents of files, targets of links."""
    return {
        str(path): path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.fixture
def zone(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Return a folder with a run of somebody else, ``run``; we are in ``mine`` beside it."""
    (place / "mine").mkdir()
    monkeypatch.chdir(place / "mine")
    monkeypatch.setenv("COLUMNS", "1000")
    edit(place / "run" / "run.json", model=str(place / "ln2"), task=str(place / "task.jsonl"))
    return place


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**read(path), **changes}))


def every(run: str = "../run") -> dict[str, list[str]]:
    """Return every command that takes a run, what it writes in ``mine`` alone."""
    return {
        "evaluate": ["evaluate", run, "--no-tests", "--seen", "--out", "evaluation.json"],
        "brief": ["evaluate", run, "--brief"],
        "report": ["report", run, "--no-tests", "--out", "page.html"],
        "svg": ["export", run, "--out", "circuit.svg"],
        "dot": ["export", run, "--out", "circuit.dot"],
        "json": ["export", run, "--out", "circuit.json"],
        "graphml": ["export", run, "--out", "circuit.graphml"],
        "pt": ["export", run, "--out", "circuit.pt"],
        "compare": ["compare", run, run, "--out", "both.svg"],
        "self-repair": ["self-repair", run, "--out", "repair.json"],
        "latents": ["latents", run],
    }


def harmless(zone: Path, command: list[str], call: Call) -> Any:
    """Run a command; assert that nothing was executed and nothing written but in ``mine``.

    Where it ends well, what it read of the zone outside the run's folder stands in what it says.
    """
    mine = zone / "mine"
    before = {k: v for k, v in tree(zone).items() if not k.startswith(f"{mine}/")}
    with WATCH():
        answer = call(*command)
    assert answer.status in (0, 2), answer
    assert before == {k: v for k, v in tree(zone).items() if not k.startswith(f"{mine}/")}
    assert not WATCH.started
    inside = [path for path in WATCH.written if path.startswith(f"{zone}/")]
    assert all(path.startswith(f"{mine}/") for path in inside), inside
    assert not list(zone.rglob("*pwned*"))
    said = answer.out + answer.err
    assert all(c.isprintable() or c == "\n" for c in said), said
    if answer.status == 2:
        last = answer.err.rstrip("\n").rpartition("acdc: ")[2]
        assert "\n" not in last
        assert len(last) <= MOST_SHOWN
    pages = [p.read_text() for p in mine.iterdir() if p.suffix in (".html", ".json", ".dot")]
    told = "".join([said, *map(unescape, pages)]).replace("/mine/..", "")
    for path in map(Path, WATCH.read if answer.status == 0 else ()):
        if zone in path.parents and not {mine, zone / "run"} & {*path.parents}:
            assert any(str(p) in told for p in (path, *path.parents) if zone in p.parents), (
                f"{command} does not name {path}"
            )
    return answer


@pytest.mark.parametrize("name", every())
def test_a_run_in_order(name: str, zone: Path, call: Call) -> None:
    """What the cases below are held against: it works, and the model and the task are named."""
    answer = harmless(zone, every()[name], call)
    assert answer.status == (2 if name == "latents" else 0), answer.err


def in_texts(zone: Path) -> None:
    """Every text that is free to be anything is everything bad."""
    run = zone / "run"
    edit(
        run / "run.json", task_info={EVIL: EVIL, "lengths": EVIL}, versions={EVIL: EVIL},
        timings={EVIL: 1.0}, prompts=EVIL, latents=None, work={EVIL: EVIL},
        constants={EVIL: EVIL}, more=EVIL,
    )  # fmt: skip
    info = dict.fromkeys(("task", "model", "method", "metric"), EVIL)
    edit(run / "circuit.json", info={**info, EVIL: EVIL})


def in_an_evaluation(zone: Path) -> None:
    run = zone / "run"
    circuit = read_run(run)[1]
    row = {"intervention": EVIL, "direction": EVIL, "faithfulness": 0.5, "faithfulness_low": 0.1}
    verdict = {"test": EVIL, "passed": True, "p_value": 0.5, "level": 0.1, "n": 3, "unit": EVIL}
    tests = {
        "verdicts": [{**verdict, "says": EVIL}], "complement": 0.5,
        "edges": [{"edge": EVIL, "effect": 0.1, "surpassed": 0.5, "p_value": 0.5}],
    }  # fmt: skip
    evaluation = {
        "task": EVIL, "model": EVIL, "metric": EVIL, "n_prompts": 3, "prompts": EVIL, "seen": None,
        "n_edges_kept": circuit.n_edges, "n_edges_total": circuit.graph.n_edges, "tests": tests,
        "circuit_digest": circuit.digest, "ablations": [{**row, "faithfulness_high": 0.9}],
        "areas": [{"measure": EVIL, "value": 0.5, "low": 0.1, "high": 0.9}],
    }  # fmt: skip
    (run / "evaluation.json").write_text(json.dumps(evaluation))


def with_code(zone: Path) -> None:
    """Python beside the model and the run, and weights that are a pickle with a command."""
    run = zone / "run"
    shutil.copytree(zone / "ln2", run / "model")
    for folder in (run, run / "model"):
        for name in ("__init__.py", "conftest.py", "model.py", "graphs.py", "sitecustomize.py"):
            (folder / name).write_text(CODE_AT_IMPORT)
    (run / "model" / "model.safetensors").unlink()
    (run / "model" / "model.pt").write_bytes(PICKLE)
    edit(run / "run.json", model=str(run / "model"), trust_remote_code=True)


def with_pickles(zone: Path) -> None:
    """A pickle under every name that a run's folder knows."""
    run = zone / "run"
    for name in ("constants.safetensors", "evaluation.json", "stability.json", "circuit.json"):
        (run / name).write_bytes(PICKLE)


def with_a_model_of_transformers(zone: Path) -> None:
    run, model = zone / "run", zone / "run" / "model"
    model.mkdir()
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 2, "n_head": 4}
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (model / "config.json").write_text(json.dumps({**config, "auto_map": auto, "n_embd": 48}))
    (model / "own.py").write_text(CODE_AT_IMPORT)
    (model / "pytorch_model.bin").write_bytes(PICKLE)
    (model / "tokenizer.json").write_bytes(PICKLE)
    edit(run / "run.json", model=str(model), trust_remote_code=True)


def with_dictionaries(zone: Path) -> None:
    folder = zone / "run" / "saes" / "a"
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text("{}")
    for name in ("sae_weights.safetensors", "sae_weights.pt", "sparsity.safetensors"):
        (folder / name).write_bytes(PICKLE)
    edit(zone / "run" / "run.json", saes=str(folder.parent), neurons=False)


def with_other_peoples_paths(zone: Path) -> None:
    """It may name what is elsewhere; then who looks at it is told."""
    (zone / "private").mkdir()
    (zone / "ln2").rename(zone / "private" / "ln2")
    (zone / "task.jsonl").rename(zone / "private" / "task.jsonl")
    up = zone / "mine" / ".." / "private"
    edit(zone / "run" / "run.json", model=f"{up}/ln2", task=f"{up}/task.jsonl")


def with_devices(zone: Path) -> None:
    run = zone / "run"
    for name in ("evaluation.json", "stability.json"):
        (run / name).symlink_to("/dev/zero")
    os.mkfifo(run / "constants.safetensors")
    (run / "endless.jsonl").symlink_to("/dev/zero")
    edit(run / "run.json", task=str(run / "endless.jsonl"))


def with_links_out(zone: Path) -> None:
    """Where files are written, there are links to what is not to be written."""
    run = zone / "run"
    (zone / "private").mkdir()
    (zone / "private" / "diary").write_text("mine")
    for name in ("circuit.svg", "circuit.png", "circuit.dot", "report.html"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(zone / "private" / "diary")


def with_sizes(zone: Path) -> None:
    edit(zone / "run" / "run.json", n_prompts=10**6, batch_size=10**18, seed=2**62)
    cfg = read(zone / "run" / "circuit.json")["cfg"]
    edit(zone / "run" / "circuit.json", cfg={**cfg, "n_layers": 10**9})


def with_all_of_it(zone: Path) -> None:
    for spoil in (in_texts, in_an_evaluation, with_dictionaries, with_links_out, with_code):
        spoil(zone)


SPOILED = (
    in_texts, in_an_evaluation, with_code, with_pickles, with_a_model_of_transformers,
    with_dictionaries, with_other_peoples_paths, with_devices, with_links_out, with_sizes,
    with_all_of_it,
)  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_hostile_run_does_nothing(
    spoil: Callable[[Path], None],
    zone: Path,
    call: Call,
) -> None:
    spoil(zone)
    monkey = zone / "mine"
    for command in every().values():
        harmless(zone, command, call)
        page = monkey / "page.html"
        if page.exists():
            assert SCRIPT not in page.read_text()
            assert "<script>alert" not in page.read_text()
        for path in monkey.iterdir():
            path.unlink()


def test_what_is_written_beside_a_circuit_replaces_links_not_their_targets(
    zone: Path,
    call: Call,
) -> None:
    """Pictures go beside the circuit where nothing else is said."""
    with_links_out(zone)
    assert call("export", "../run", "--format", "svg").status == 0
    assert call("report", "../run", "--no-tests", "--overwrite").status == 0
    assert (zone / "private" / "diary").read_text() == "mine"
    assert not (zone / "run" / "circuit.svg").is_symlink()
    assert not (zone / "run" / "report.html").is_symlink()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_edges_kept": 3}, "run.json is of a circuit of 3 of"),
        ({"n_edges_total": 10**400}, "'n_edges_total' is 1000"),
        ({"faithfulness": "high"}, "'faithfulness' is of type str"),
        ({"timings": [1]}, "'timings' is of type list"),
        ({"versions": {"torch": None}}, "'torch' is of type NoneType"),
        ({"latents": {}}, "'error_nodes' is missing"),
        ({"task_info": 3}, "'task_info' is of type int"),
    ],
)
def test_what_a_page_says_of_a_run_is_checked(
    changes: dict[str, Any],
    words: str,
    zone: Path,
    call: Call,
) -> None:
    edit(zone / "run" / "run.json", **changes)
    answer = call("report", "../run", "--no-tests", "--out", "page.html")
    assert answer.status == 2
    assert words in answer.err
    assert not (zone / "mine" / "page.html").exists()


def test_nothing_of_a_latents_page_is_believed(tmp_path: Path, zone: Path) -> None:
    with pytest.raises(OptionError, match="the run has no latents"):
        look(zone / "run")
    folder = tmp_path / "latents"
    discover("ioi", saes="bundled", n_edges=30, n_prompts=4, max_latents=30).save(folder)
    known = read(folder / "run.json")
    for latents in (None, [], {"error_nodes": None}, {**known["latents"], "error_nodes": {}}):
        edit(folder / "run.json", latents=latents)
        with pytest.raises(CircuitFileError, match=r"is not a run\.json: '|of its dictionaries"):
            look(folder)


def test_a_forged_leftover_moves_nothing_out_of_a_folder(zone: Path) -> None:
    """As a killed process would leave it, where the output is a link to another's folder."""
    private, run = zone / "private", zone / "run"
    private.mkdir()
    (run / "checkpoint").symlink_to(private)
    left = run / ".checkpoint-0123abcd"
    (left / "whole" / "inside").mkdir(parents=True)
    (left / "whole" / "authorized_keys").write_text("theirs")
    (left / "whole" / "inside" / "x").write_text("theirs")
    mark = {"format": "being-written-by-acdc-1", "output": "checkpoint"}
    (left / ".being-written").write_text(json.dumps(mark))
    settle(run / "checkpoint")
    assert not list(private.iterdir())
    (run / "checkpoint").unlink()
    (run / "checkpoint").mkdir()
    (run / "checkpoint" / "inside").symlink_to(private)
    settle(run / "checkpoint")
    assert not list(private.iterdir())
