"""The command line as a door: any command with any words behind its options.

Models are not loaded and pictures not drawn: what is tried is what comes before and behind that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import typer
from harness import HOSTILE_TEXTS, MANY, QUICK, check_line, limits, tried
from hypothesis import given
from hypothesis import strategies as st

from acdc.cli import _add_plugins, app, main
from acdc.errors import ModelError
from acdc.measure.evaluation import Evaluation
from acdc.runs.claim import Claim
from acdc.runs.folder import Run
from acdc.settings import Settings
from graphs import Circuit, GraphShape, component_graph

PLACES = ("run", "run/circuit.json", "task.jsonl", "new", "new.svg", "new.json", "new.html", ".")
NAMES = (
    "ioi",
    "acdc",
    "eap-ig",
    "kl",
    "models",
    "cpu",
    "zero",
    "noising",
    "json",
    "0.5",
    "3",
    "1e30",
)


WRITTEN = ("out", "html", "readme")


def is_here(path: str) -> bool:
    return "/" not in path and "\\" not in path and (path in (".", "..") or path[:1] != "~")


def a_run() -> Run:
    graph = component_graph(GraphShape(n_layers=2, n_heads=2))
    rng = np.random.default_rng(0)
    info = {"task": "ioi", "model": "m", "method": "eap", "metric": "kl"}
    kept = rng.random(graph.n_edges) < 0.5
    circuit = Circuit(graph, rng.normal(size=graph.n_edges), kept, info)
    settings = Settings("ioi", model="ioi-small", method="eap", metric="kl")
    return Run(
        settings, circuit, Claim.of_seen(Evaluation(1.0, 0.0, 0.5, 0.5), 4), {}, {"n_prompts": 4}
    )


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """Go to a folder with a run and a task, where no model is loaded and nothing drawn."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise ModelError("no model is loaded here")

    monkeypatch.setattr("acdc.runs.given.load_model", refuse)
    monkeypatch.setattr("benchmarks.speed.measure", refuse)
    monkeypatch.setattr("benchmarks.accuracy.measure", refuse)
    monkeypatch.setattr("benchmarks.calibration.measure", refuse)
    monkeypatch.setattr("benchmarks.unseen.measure", refuse)
    monkeypatch.setattr("benchmarks.memory.measure", refuse)
    monkeypatch.setattr("benchmarks.cuda.measure", refuse)
    monkeypatch.setattr("graphs.pictures.draw.draw_dot", lambda text, format: b"drawn")
    monkeypatch.chdir(tmp_path)
    a_run().save("original")
    Path("task.jsonl").write_text('{"clean": [1, 2], "corrupt": [1, 3], "answers": [4]}\n')
    yield tmp_path
    monkeypatch.undo()


def commands() -> dict[tuple[str, ...], click.Command]:
    """Every command by the words that call it."""
    _add_plugins()
    found: dict[tuple[str, ...], click.Command] = {}

    def add(words: tuple[str, ...], command: Any) -> None:
        for name, inside in getattr(command, "commands", {}).items():
            add((*words, name), inside)
        if not hasattr(command, "commands"):
            found[words] = command

    add((), typer.main.get_command(app))
    return found


COMMANDS = commands()


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """A command with one to four options and its arguments."""
    words = draw(st.sampled_from(sorted(COMMANDS)))
    values = st.sampled_from(HOSTILE_TEXTS) | st.sampled_from(PLACES) | st.sampled_from(NAMES)
    values |= st.integers().map(str) | st.floats().map(str) | st.text(max_size=8)
    counts = (-1, 0, 1, 2, 3, 10**4, 2**31, 2**63, 10**30)
    numbers = (st.sampled_from(counts) | st.integers(0, 99) | st.floats(0, 1)).map(str)
    line = list(words)
    parameters = COMMANDS[words].params
    options = [p for p in parameters if p.param_type_name == "option"]
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            usual = {"task": "ioi", "what": "tasks"}.get(str(parameter.name), "run")
            line.append(draw(st.sampled_from((usual, usual, usual)) | values))
    for option in draw(st.lists(st.sampled_from(options), max_size=4)) if options else ():
        line.append(draw(st.sampled_from((*option.opts, *option.secondary_opts))))
        if not getattr(option, "is_flag", False) or draw(st.integers(0, 9)) == 0:
            # Who says where to write, and to overwrite, is obeyed: never say it of a real place.
            some = values.filter(is_here) if option.name in WRITTEN else values
            line.append(draw(numbers if draw(st.booleans()) else some))
    return line


def say_what(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a line; assert that it ends well, or with one line of error."""
    for name in os.listdir():
        if name not in ("original", "task.jsonl"):
            shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()
    shutil.copytree("original", "run")
    capsys.readouterr()

    def call() -> int:
        try:
            main(line)
        except SystemExit as error:
            return int(error.code or 0)
        raise AssertionError("it did not exit")

    status = tried(call)
    said = capsys.readouterr()
    assert status in (0, 2), status
    for text in (said.out, said.err):
        assert all(c.isprintable() or c == "\n" for c in text), text
        assert "Traceback" not in text
    if status == 2:
        *before, last = said.err.rstrip("\n").split("\n")
        assert last.startswith("acdc: "), said.err
        check_line(last.removeprefix("acdc: "))
        assert not any(one.startswith("acdc: ") for one in before)


@pytest.mark.parametrize(
    "n", [QUICK, pytest.param(2 * MANY, marks=pytest.mark.slow)], ids=["a little", "a lot"]
)
def test_any_words(n: int, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = sorted(place.parent.iterdir())

    @limits(n)
    @given(lines())
    def each(line: list[str]) -> None:
        say_what(line, capsys)
        assert sorted(place.parent.iterdir()) == outside

    each()


# --- cases by name ------------------------------------------------------------------------

MANY_MORE = str(10**30)
LINES: dict[str, tuple[list[str], str]] = {
    "bytes that are no text": (["discover", "ioi", "--out", os.fsdecode(b"\x80")], "no UTF-8 text"),
    "a null character": (["list", "mod\0els"], "'mod\\x00els' is no UTF-8 text"),
    "an escape sequence": (["list", "\x1b[31mred"], r"unknown list '\x1b[31mred'"),
    "a title": (["discover", "\x1b]0;title\x07"], r"unknown task '\x1b]0;title\x07'"),
    "the other direction": (["discover", "\u202eioi"], r"unknown task '\u202eioi'"),
    "a long word": (["discover", "x" * 10_000], "characters]"),
    "a command": (["\x1b[2J"], r"No such command '\x1b[2J'"),
    "an option": (["list", "tasks", "--\x1b[2J"], r"No such option: --\x1b[2J"),
    "prompts written out": (["discover", "ioi", "--n-prompts", MANY_MORE], "at most 1,000,000"),
    "seeds": (["stability", "ioi", "--seeds", MANY_MORE], "seeds 1"),
    "latents": (["discover", "ioi", "--neurons", "--max-latents", MANY_MORE], "at most"),
    "steps": (["discover", "ioi", "--method", "eap-ig", "--steps", MANY_MORE], "at most"),
    "mask steps": (
        ["discover", "ioi", "--method", "edge-pruning", "--mask-steps", MANY_MORE], "at most"
    ),
    "constants": (
        ["discover", "ioi", "--intervention", "optimal", "--optimal-steps", MANY_MORE],
        "at most",
    ),
    "a seed": (["discover", "ioi", "--seed", MANY_MORE], "at most"),
    "memory": (["discover", "ioi", "--memory", "1e300"], "expected at most 1,048,576 GiB"),
    "thresholds": (["sweep", "ioi", "--thresholds", ",".join(["1"] * 2000)], "thresholds 2000"),
    "resamples": (["evaluate", "run", "--n-resamples", MANY_MORE], "at most 100,000"),
    "permutations": (["evaluate", "run", "--n-permutations", MANY_MORE], "at most 1,000,000"),
    "random circuits": (["evaluate", "run", "--n-random", MANY_MORE], "at most 1,000,000"),
    "knockouts": (["evaluate", "run", "--n-knockouts", MANY_MORE], "at most 1,000,000"),
    "prompts on a page": (["report", "run", "--prompts", MANY_MORE], "at most 1,000,000"),
    "edges of a picture": (["export", "run", "--max-edges", MANY_MORE], "at most 1,000,000"),
    "layers": (["bench", "speed", "--layers", "9" * 30], "expected numbers from 1 to 999"),
    "layers in another script": (["bench", "speed", "--layers", "²"], "expected numbers from 1"),
    "a reference without end": (["compare", "run", "--reference", "/dev/zero"], "it is a device"),
    "a task without end": (["discover", "zero.jsonl", "--model", "ioi-small"], "it is a device"),
    "peers without end": (["bench", "speed", "--peers", "/dev/zero"], "it is a device"),
    "a page into a device": (
        ["export", "run", "--format", "svg", "--out", "/dev/full", "--overwrite"], "is no file"
    ),
    "a folder for a file": (["export", "run", "--out", ".", "--overwrite"], "is no file"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_one_line_for(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line, words = LINES[name]
    if name == "a task without end":
        monkeypatch.undo()  # a bundled model: it is there
        monkeypatch.chdir(place)
        Path("zero.jsonl").symlink_to("/dev/zero")
    shutil.copytree("original", "run")
    with pytest.raises(SystemExit) as ended:
        main(line)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert words in said
    assert said.count("acdc: ") == 1
    check_line(said.rstrip("\n").rpartition("acdc: ")[2])
    assert not Path("runs").exists()


def test_brackets_in_names_are_no_markup(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rich would take ``[/bold]`` for the end of something, and ``:bug:`` for a picture."""
    shutil.copytree("original", "run")
    Path("[").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["export", "run", "--format", "dot", "--out", "[/bold] :bug: [red]x.dot"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    assert said.out == "written to [/bold] :bug: [red]x.dot\n"


def test_bytes_that_are_no_text_from_a_shell() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "acdc", b"list", b"\x80"], capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(rb"acdc: argument '\udc80' is no UTF-8 text: rename the file")
    assert done.stderr.count(b"\n") == 1
