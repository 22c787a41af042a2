"""What the terminal says where a table would be empty, narrow or silent."""

from __future__ import annotations

import json
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from acdc.errors import CircuitFileError
from acdc.evidence.directions import BothDirections
from acdc.evidence.self_repair import HeadRepair, Measure, RoleRepair, SelfRepair
from acdc.evidence.stability import Stability
from acdc.runs.circuits import circuit_file
from acdc.runs.discover import discover
from acdc.runs.folder import Run, read_run
from acdc.tasks.texts import visible
from acdc.terminal.backups import self_repair_tables
from acdc.terminal.console import say, show
from acdc.terminal.repeated import directions_tables, stability_tables
from acdc.terminal.tables import edges_table, run_table
from graphs import Circuit, to_dot


@pytest.fixture(scope="module")
def run() -> Run:
    """Return a run that takes a second."""
    return discover("ioi", model="planted-ioi-backup", threshold=0.3, n_prompts=8)


def printed(*parts: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        for part in parts:
            console.print(part, highlight=False)
    return capture.get()


def empty(circuit: Circuit) -> Circuit:
    return replace(circuit, in_circuit=np.zeros_like(circuit.in_circuit))


def test_an_empty_circuit_has_a_line_and_no_table(run: Run) -> None:
    assert "most important edges" in printed(edges_table(run.circuit))
    said = printed(edges_table(empty(run.circuit)))
    assert "no edge was kept" in said
    assert "━" not in said


def test_without_candidates_there_is_a_line_and_no_table(run: Run) -> None:
    same = BothDirections(run, run)
    counts, gates = directions_tables(same)
    assert "in both" in printed(counts)
    assert "no gates" in printed(gates)


def test_a_run_says_what_its_means_are_over_how_it_is_split_and_what_was_not_tested(
    run: Run,
) -> None:
    effects = {"largest": 0.0, "mean": 0.0, "n_at_least_tau": 0, "n_at_least_tau_in_all": 12}
    audit = {
        "n_skipped": 1311,
        "n_sampled": 64,
        "confidence": 0.95,
        "taken_out": effects,
        "put_back": {**effects, "n_at_least_tau": 2, "n_at_least_tau_in_all": 58},
    }
    summary = json.loads(json.dumps(run.summary()))
    plain = printed(run_table(summary, "a run"))
    assert "split by" not in plain
    assert "untested" not in plain
    assert "ablation over" not in plain
    assert "untested" not in printed(run_table({**summary, "audit": None}, "nothing skipped"))
    more = {"positions": "span", "intervention": "mean", "mean_over": "pronoun", "audit": audit}
    said = printed(run_table({**summary, **more}, "a run"))
    assert "split by span" in said
    assert "mean ablation over pronoun" in said
    assert "1,311 edges; of 64 sampled 2 reach the threshold alone, at most 58 of all" in said


def test_how_much_runs_share_is_not_folded_into_a_narrow_title(run: Run) -> None:
    graph = run.circuit.graph
    masks = np.stack([run.circuit.in_circuit] * 2)
    found = Stability(run.settings, (0, 1), graph, masks, (1.0, 1.0), {})
    said = printed(*stability_tables(found))
    assert "edges over 2 seeds; two runs share 100.0% (mean Jaccard)" in said


def test_rounding_is_no_growth(run: Run) -> None:
    def head(name: str, growth: float) -> HeadRepair:
        """Return a head whose growth is certain, be it ever so small."""
        sure = Measure(growth, growth * 0.9, growth * 1.1)
        return HeadRepair(name, True, None, 0.0, 0.0, growth, sure, sure, None, None)

    taken = Measure(2.0, 1.9, 2.1)
    writer = HeadRepair("a2.h1", True, "mover", 2.0, 2.0, 2.0, taken, taken, None, None)
    others = (head("a3.h3", -2e-7), head("a3.h2", 0.01))
    role = RoleRepair("mover", ("a2.h1", "a2.h0"), taken, taken, None, (writer,), others)
    found = SelfRepair(run.settings, 0.1, (role,), {"prompts": "made up"}, 8, {})
    said = printed(*self_repair_tables(found, "test"))
    assert "a3.h2" in said
    assert "a3.h3" not in said


def test_the_folder_of_both_directions_is_told_from_no_run(run: Run, tmp_path: Path) -> None:
    with pytest.raises(CircuitFileError, match="no such file; give the folder of a run"):
        read_run(tmp_path)
    (tmp_path / "directions.json").write_text("{}")
    with pytest.raises(CircuitFileError, match="runs in both directions"):
        circuit_file(tmp_path)
    with pytest.raises(CircuitFileError, match=r"runs in both directions; give .*noising or "):
        read_run(tmp_path)


def test_the_picture_of_both_directions_says_of_what(run: Run, tmp_path: Path) -> None:
    other = replace(run, settings=replace(run.settings, direction="denoising"))
    BothDirections(run, other).save(tmp_path / "both")
    picture = unescape((tmp_path / "both" / "directions.svg").read_text())
    assert "ioi \u00b7 planted-ioi-backup \u00b7 noising and denoising" in picture
    assert "only noising (AND?)" in picture


def test_a_picture_counts_edges_as_the_table_does(run: Run) -> None:
    kept = run.circuit.in_circuit.copy()
    kept[list(run.circuit.graph.edge_names()).index("a3.h0->logits")] = True
    dot = to_dot(replace(run.circuit, in_circuit=kept))
    assert "8 of 353 edges \u00b7 1 on no path dotted" in dot
    assert "7 of 353 edges \u00b7 acdc" in to_dot(run.circuit)


HOSTILE = "a\x1b[31mb\x1b]0;title\x07 \x9b2J \u202e \ud800 [/bold] [red] :bug:"
SHOWN = r"a\x1b[31mb\x1b]0;title\x07 \x9b2J \u202e \ud800 [/bold] [red] :bug:"


def test_control_characters_are_shown_and_not_obeyed(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    table = Table(HOSTILE.replace("[", "\\["), title=HOSTILE.replace("[", "\\["))
    table.add_row(HOSTILE.replace("[", "\\["))
    show(table, HOSTILE)
    say(HOSTILE)
    say(HOSTILE, stderr=True)
    said = capsys.readouterr()
    assert said.out.count(SHOWN) == 5
    assert said.err == SHOWN + "\n"
    summary = {**run.summary(), "task": HOSTILE, "model": HOSTILE, "method": HOSTILE}
    show(run_table(summary, HOSTILE))
    said = capsys.readouterr()
    assert said.out.count(SHOWN) == 4
    assert all(c.isprintable() or c == "\n" for c in said.out)


def test_control_characters_of_tokens_are_shown() -> None:
    assert visible("a\x1b[0m\n\tb") == r"a\x1b[0m⏎→b"


def test_a_long_line_is_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    say("word " * 100)
    assert capsys.readouterr().out == "word " * 100 + "\n"
