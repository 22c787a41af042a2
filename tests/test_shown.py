"""What is said: results in notebooks and as tables, ``--json``, ``--quiet`` and ``--verbose``."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import Call

import acdc
from acdc.cli import app
from acdc.terminal import notebook
from graphs import to_networkx

PACKAGE = Path(acdc.__file__).parent
WRITE_FILES_ALONE = {"demo", "export", "report"}


@pytest.fixture
def run(shared: Path) -> acdc.Run:
    return acdc.load_run(shared / "eap-ig")


def test_every_result_that_shows_itself_is_known() -> None:
    classes = {
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and any(isinstance(base, ast.Name) and base.id == "Shown" for base in node.bases)
    }
    assert classes == set(notebook._PARTS)


def test_a_run_is_a_table_and_a_picture_in_a_notebook(run: acdc.Run) -> None:
    html = run._repr_html_()
    assert f"{run.circuit.n_edges:,} of {run.circuit.graph.n_edges:,}" in html
    strongest = max(run.circuit.edges(), key=lambda name: abs(run.circuit.to_frame().score[name]))
    assert strongest.replace(">", "&gt;").replace("<", "&lt;") in html
    assert html.count("<svg") == 1
    assert "<script" not in html


def test_texts_of_a_run_are_escaped_in_a_notebook(run: acdc.Run) -> None:
    from dataclasses import replace

    named = replace(run, settings=replace(run.settings, task="<script>alert(1)</script>"))
    assert "<script" not in named._repr_html_()


def test_show_prints_what_the_command_prints(run: acdc.Run, capsys: Any) -> None:
    run.show()
    assert run.circuit.edges()[0].split("->")[0] in capsys.readouterr().out


def test_a_circuit_is_a_table_of_pandas(run: acdc.Run) -> None:
    circuit = run.circuit
    frame, whole = circuit.to_frame(), circuit.to_frame(whole=True)
    assert list(frame.index) == circuit.edges()
    assert len(whole) == circuit.graph.n_edges
    assert (whole.score == circuit.scores).all()
    assert (whole.in_circuit == circuit.in_circuit).all()
    for edge, row in frame.iterrows():
        assert edge == f"{row.sender}->{row.receiver}"


def test_a_circuit_is_a_graph_of_networkx_and_a_picture(run: acdc.Run) -> None:
    ours, theirs = run.circuit.to_networkx(), to_networkx(run.circuit)
    assert sorted(ours.edges) == sorted(theirs.edges)
    assert "<svg" in run.circuit._repr_svg_()


def test_progress_counts_in_notebooks_too(capsys: Any) -> None:
    bars = notebook._NotebookReporter()
    with bars.phase("search", 5):
        bars.advance(2)
        bars.note("half")
        bars.advance(3)
    assert "5/5" in capsys.readouterr().err


@pytest.mark.parametrize("name", [n.name for n in app.registered_commands])
def test_every_command_that_prints_tables_prints_json(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    flags = {flag for param in command.params for flag in param.opts}
    assert ("--json" in flags) == (name not in WRITE_FILES_ALONE)
    assert {"--quiet", "--verbose"} <= flags


SEARCH = ("discover", "task.jsonl", "--model", "ln2", "--method", "eap", "--edges", "20")


@pytest.mark.usefixtures("place")
def test_json_is_the_runs_own(call: Call) -> None:
    answer = call(*SEARCH, "--out", "new", "--json")
    assert answer.status == 0
    assert json.loads(answer.out) == json.loads(Path("new/run.json").read_text())
    assert "written to new" in answer.err


@pytest.mark.usefixtures("place")
def test_quiet_says_where_it_wrote_and_warnings(call: Call) -> None:
    answer = call(*SEARCH, "--out", "new", "--quiet")
    assert answer.err == ""
    *_, last = answer.out.strip().splitlines()
    assert last.startswith("written to new")
    assert "circuit of" not in answer.out
    assert "most important" not in answer.out
    loud = call("list", "metrics")  # the next command is not quiet
    assert "logit_diff" in loud.out


@pytest.mark.usefixtures("place")
def test_verbose_says_seconds_memory_and_where_an_error_comes_from(call: Call) -> None:
    answer = call(*SEARCH, "--out", "new", "-v")
    assert " GiB at most so far" in answer.err
    mistake = call("evaluate", "nowhere", "-v")
    assert mistake.status == 2
    assert "Traceback" in mistake.err
    assert mistake.err.splitlines()[-1].startswith("acdc: nowhere")
    assert "Traceback" not in call("evaluate", "nowhere").err


def test_lists_are_json(call: Call) -> None:
    for what in ("models", "tasks", "methods", "metrics", "ablations", "references"):
        listed = json.loads(call("list", what, "--json").out)
        assert listed
        assert all(isinstance(text, str) for text in listed.values())
