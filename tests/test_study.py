"""A grid of runs: what it asks for, workers that die, drivers that die, one table and one page."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import browse, check_policy
from parity_pairs import jsonl, parity_rows

import acdc
from acdc.cli import main
from acdc.errors import InputError, OptionError
from acdc.evidence.study import SECONDS, Study
from acdc.executors import Lost, Processes, Resources, chosen, resources_of
from acdc.pages.study import save_page, study_html
from acdc.runs.cells import BUSY, DONE, FAILED, _claimed, run_cell
from acdc.runs.grid import Grid, read_study


@pytest.fixture(scope="module")
def model(data: Path) -> str:
    return str(data / "parity" / "ln2")


@pytest.fixture(scope="module")
def pairs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a task file of a few pairs of parity/ln2."""
    path = tmp_path_factory.mktemp("study") / "pairs.jsonl"
    path.write_text(jsonl(parity_rows(data / "parity" / "ln2", 8)))
    return str(path)


# --- what is asked for --------------------------------------------------------------------


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    grid = Grid.of({
        "method": ["eap", "eap-ig"], "task": ["ioi", "docstring"], "edges": [20, 60], "seeds": 2,
        "seed": 3, "n-test": 32, "eap-ig": {"steps": 4}, "memory": 0.5, "strict": True,
    })  # fmt: skip
    assert list(grid.asked) == ["task", "method", "n_edges", "n_test", "seed"]
    assert grid.varied == ("task", "method", "n_edges", "seed")
    cells = grid.cells(tmp_path)
    assert len(cells) == 2 * 2 * 2 * 2
    assert len({cell.name for cell in cells}) == 16
    first, last = cells[0].settings, cells[-1].settings
    assert (first.task, first.method, first.n_edges, first.seed) == ("ioi", "eap", 20, 3)
    assert (last.task, last.method, last.n_edges, last.seed) == ("docstring", "eap-ig", 60, 4)
    assert (first.options, last.options["steps"]) == ({}, 4)
    assert {(cell.memory, cell.strict) for cell in cells} == {(1 << 29, True)}
    assert cells[0].name.startswith("ioi-ioi_small-eap-20edges-seed3-")


def test_names_hold_all_that_decides_a_run(pairs: str, model: str, tmp_path: Path) -> None:
    def name(**asked: Any) -> str:
        given = {"task": pairs, "model": model, "method": "eap", "edges": 9, **asked}
        (cell,) = Grid.of(given).cells(tmp_path)
        return cell.name

    own = name()
    assert name(seed=0, direction="noising") == own == name(n_edges=9)
    for other in ({"edges": 8}, {"dtype": "float64"}, {"prepend-bos": True}, {"strict": True}):
        assert name(**other) != own
    file = tmp_path / "pairs.jsonl"
    names = []
    for n in (6, 7):
        file.write_text("".join(Path(pairs).read_text().splitlines(keepends=True)[:n]))
        names.append(name(task=str(file)))
    assert names[0] != names[1]


WRONG = {
    "{}": "a study without a task",
    "{'task': 'ioi', 'metod': 'eap'}": "unknown option of a study 'metod': did you mean method",
    "{'task': ['ioi', 'ioi']}": "task has 'ioi' twice",
    "{'task': []}": "task is an empty list",
    "{'task': 'ioi', 'edges': [20, 0]}": "n_edges 0: expected at least 1",
    "{'task': 'ioi', 'edges': [20, '30']}": "n_edges is '30': expected int or None",
    "{'task': 'ioi', 'method': ['eap', 'eapig']}": "unknown method 'eapig'",
    "{'task': 'io', 'method': 'eap'}": "unknown task 'io'",
    "{'task': 'ioi', 'seeds': 0}": "seeds 0: expected at least 1",
    "{'task': 'ioi', 'seeds': [1, 2]}": "seeds [1, 2]: expected a number of them",
    "{'task': 'ioi', 'seeds': 2, 'seed': [1, 2]}": "seeds 2 beside seed [1, 2]: give one",
    "{'task': 'ioi', 'method': ['eap', 'eap-ig'], 'steps': 3}": "method 'eap' takes no steps",
    "{'task': 'ioi', 'method': 'eap', 'eap-ig': {'steps': 3}}": "unknown table of a study",
    "{'task': 'ioi', 'method': 'eap-ig', 'eap-ig': {'stps': 3}}": "unknown option of a study",
    "{'task': 'ioi', 'method': 'eap-ig', 'eap-ig': {'steps': [3]}}": "expected one value",
    "{'task': 'ioi', 'memory': 0}": "memory 0: expected GiB above 0",
    "{'task': 'ioi', 'strict': 1}": "strict 1: expected true or false",
    "{'task': 'ioi', 'seeds': 100000, 'edges': [1, 2]}": "cells of the study 200000: expected at",
}


@pytest.mark.parametrize("asked", WRONG)
def test_what_cannot_be_asked_is_one_line_before_anything_runs(asked: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(WRONG[asked])):
        acdc.study(eval(asked), tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(("table", "words"), {
    "name = 'rays'": "unknown executor 'rays': did you mean ray",
    "jobs = 0": "jobs 0: expected at least 1",
    "address = 'auto'": "executor 'processes' has none, ray has",
    "gpus = 1": "processes take the device that the runs name",
    "partition = 'long'": "executor 'processes' takes no 'partition'",
    "name = 'ray'\npartition = 'long'": "takes jobs, address and gpus",
    "name = 'slurm-local'\ngpus = 0.5": "a job of Slurm has whole ones",
    "name = 'slurm-local'\nparition = 'long'": "executor 'slurm': ",
}.items())  # fmt: skip
def test_executors_are_checked(table: str, words: str, tmp_path: Path) -> None:
    if "slurm" in table:
        pytest.importorskip("submitit", reason="the extra slurm is not installed")
    file = tmp_path / "study.toml"
    file.write_text(f"task = 'ioi'\nmethod = 'eap'\n[executor]\n{table}\n")
    with pytest.raises(InputError, match=re.escape(words)):
        chosen(resources_of(read_study(file)[1]), tmp_path / "jobs")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, package in (("ray", "ray"), ("slurm", "submitit")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(OptionError, match=rf"pip install acdc-circuits\[{name}\]"):
            chosen(Resources(name), tmp_path)


# --- executors ----------------------------------------------------------------------------


def _die_or_double(folder: Path, item: int) -> int:
    """Die of 1 every time, of 2 the first time; refuse 3."""
    seen = folder / str(item)
    known = seen.exists()
    seen.touch()
    if item == 1 or (item == 2 and not known):
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 3:
        raise ValueError("three")
    return 2 * item


def check_executor(executor: Any, folder: Path) -> None:
    """Hold an executor against what every one does."""
    found = dict(executor.run(functools.partial(_die_or_double, folder), range(6)))
    assert {k: v for k, v in found.items() if not isinstance(v, Lost)} == {0: 0, 2: 4, 4: 8, 5: 10}
    assert re.search("(killed by signal 9|worker died|job died), 2 times", found[1].why)
    assert "ValueError: three" in found[3].why
    assert list(executor.run(functools.partial(_die_or_double, folder), ())) == []


def test_a_worker_that_dies_costs_its_own_call(tmp_path: Path) -> None:
    check_executor(Processes(2), tmp_path)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes of others import this module."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))


@pytest.mark.slow
@pytest.mark.usefixtures("importable")
def test_a_worker_of_ray_that_dies_costs_its_own_call(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    check_executor(chosen(Resources("ray", 2), tmp_path), tmp_path)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.slow
@pytest.mark.usefixtures("importable")
def test_a_job_of_submitit_that_dies_costs_its_own_call(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    check_executor(chosen(Resources("slurm-local", 2), tmp_path / "jobs"), tmp_path)


# --- studies ------------------------------------------------------------------------------


def workers(folder: Path) -> dict[str, int]:
    """Name of every cell that a living process works on -> that process."""
    found = {}
    for path in (folder / "claims").glob("*"):
        text = path.read_text()
        if text and not (folder / "cells" / path.name / "run.json").exists():
            pid = json.loads(text)["pid"]
            if Path(f"/proc/{pid}").exists():
                found[path.name] = pid
    return found


class Killer(threading.Thread):
    """Kills the first worker of a study that it sees."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.killed = folder, ""

    def run(self) -> None:
        until = time.monotonic() + 60
        while not self.killed and time.monotonic() < until:
            for name, pid in workers(self.folder).items():
                if pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
                    self.killed = name
                    return
            time.sleep(0.002)


def table(folder: Path) -> list[dict[str, str]]:
    """Return results.csv without what differs from one time to the next."""
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in SECONDS} for row in rows]


@pytest.fixture(scope="module")
def asked(pairs: str, model: str) -> dict[str, Any]:
    return {"task": pairs, "model": model, "method": ["eap", "eap-ig"], "edges": 30, "seeds": 2}


@pytest.fixture(scope="module")
def found(asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Run a study of four cells in two processes, one of which is killed."""
    folder = tmp_path_factory.mktemp("study") / "four"
    killer = Killer(folder)
    killer.start()
    known = os.environ.get("OMP_NUM_THREADS")
    study = acdc.study(asked, folder, jobs=2)
    killer.join()
    assert killer.killed
    assert os.environ.get("OMP_NUM_THREADS") == known
    return study


def test_a_killed_worker_changes_nothing(found: Study, asked: dict[str, Any]) -> None:
    assert (len(found.rows), found.failures) == (4, ())
    for row in found.rows:
        s = row.cell.settings
        run = acdc.discover(s.task, model=s.model, method=s.method, n_edges=30, seed=s.seed)
        names = {run.circuit.graph.edge_name(int(e)) for e in run.circuit.in_circuit.nonzero()[0]}
        assert row.edges == names
        assert row.found["metric_circuit"] == pytest.approx(
            run.claim.evaluation.metric_circuit, rel=1e-4
        )
        assert acdc.load_run(row.cell.place).settings.seed == s.seed
    saved = table(found.folder)
    assert [row["cell"] for row in saved] == [row.cell.name for row in found.rows]
    assert [int(row["n_edges_kept"]) for row in saved] == [len(row.edges) for row in found.rows]
    assert {row["failed"] for row in saved} == {""}


def test_tables_of_pairs_and_in_parquet(found: Study) -> None:
    with open(found.folder / "overlap.csv", newline="") as file:
        pairs_of = list(csv.DictReader(file))
    assert len(pairs_of) == 4 * 3 / 2
    first = {row.cell.name: row for row in found.rows}
    for pair in pairs_of:
        one, other = first[pair["one"]].edges, first[pair["other"]].edges
        assert float(pair["jaccard"]) == pytest.approx(len(one & other) / len(one | other))
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra table is not installed")
    rows = parquet.read_table(found.folder / "results.parquet").to_pylist()
    assert [row["metric_circuit"] for row in rows] == [
        r.found["metric_circuit"] for r in found.rows
    ]


def test_a_study_goes_on_with_another_grid(found: Study, asked: dict[str, Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in found.folder.glob("cells/*/run.json")}
    broken = {**asked, "method": ["eap", "hisp"], "seeds": 1, "model": [asked["model"], "nowhere"]}
    again = acdc.study(broken, found.folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [row.failed is None for row in again.rows] == [True, True, False, False]
    assert again.rows[0].edges == found.rows[0].edges
    for row in again.failures:
        assert row.failed is not None
        assert row.failed.startswith("unknown model 'nowhere'")
        assert run_cell(row.cell) == FAILED  # it is tried again when it is asked for again
    assert [row["failed"] for row in table(found.folder)][:2] == ["", ""]
    html = study_html(again)
    assert "unknown model &#39;nowhere&#39;" in html
    acdc.study(asked, found.folder)


def test_a_cell_belongs_to_one_process(found: Study, tmp_path: Path) -> None:
    (cell, *_) = found.grid.cells(tmp_path)
    with _claimed(cell, wait=False) as ours, _claimed(cell, wait=False) as theirs:
        assert (ours, theirs) == (True, False)
        assert run_cell(cell) == BUSY
    assert run_cell(found.rows[0].cell) == DONE


def test_folders_of_others_are_left_alone(
    found: Study, asked: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no study: choose another"):
        acdc.study(asked, tmp_path)
    with pytest.raises(InputError, match="is a file: give a folder"):
        acdc.study(asked, tmp_path / "notes.txt")
    one, other = found.rows[0].cell.place, found.rows[1].cell.place
    kept = (one / "run.json").read_text()
    (one / "run.json").write_text((other / "run.json").read_text())
    rows = acdc.study(asked, found.folder).rows
    (one / "run.json").write_text(kept)
    assert rows[0].failed == f"{one} holds a run of other settings: move it away"
    assert acdc.study(asked, found.folder).failures == ()


# --- the command and the page -------------------------------------------------------------


def test_the_command(
    found: Study, asked: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--task", asked["task"], "--model", asked["model"], "--method", "eap,eap-ig"]
    with pytest.raises(SystemExit) as done:
        main(["study", *words, "--edges", "30", "--seeds", "2", "--out", str(found.folder)])
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert "4 of 4 runs" in said
    assert "study.html" in said
    file = tmp_path / "study.toml"
    file.write_text("task = 'ioi'\nmethod = ['eap', 'eap-ig']\nedgs = 20\n")
    for arguments, line in (
        (["study"], "acdc: nothing to run: give a FILE.toml, or --task with names of tasks"),
        (["study", str(file)], "acdc: unknown option of a study 'edgs': did you mean edges"),
        (["study", "--task", "ioi", "--edges", "a"], "acdc: n_edges 'a': expected whole numbers"),
    ):
        with pytest.raises(SystemExit) as done:
            main([*arguments, "--out", str(tmp_path / "none")])
        assert done.value.code == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(line)
    assert not (tmp_path / "none").exists()


def test_the_page(found: Study, tmp_path: Path) -> None:
    html = save_page(found).read_text()
    mute = replace(found.rows[0], found={**found.rows[0].found, "faithfulness": None})
    said = study_html(replace(found, rows=(mute, *found.rows[1:])))
    assert '<p class="soft">1 run claims no faithfulness</p>' in said
    check_policy(re.sub(r'href="cells/[A-Za-z0-9_.%+-]+/circuit\.svg"', 'href="#"', html))
    for address in re.findall(r'href="(cells/[^"]+)"', html):
        assert (found.folder / address).is_file()
    probe = """
      const rows = () => [...document.querySelectorAll("section:last-of-type tbody tr")];
      const head = [...document.querySelectorAll("th[data-by]")].find(
        one => one.textContent === "edges kept");
      const sizes = () => rows().map(row => Number(row.cells[head.cellIndex].dataset.v));
      head.click(); const up = sizes(); head.click(); const down = sizes();
      const button = document.querySelector(".legend button");
      const dots = document.querySelectorAll("svg.plot .dot.s0");
      button.click();
      const seen = { up, down, n: dots.length, hidden: getComputedStyle(dots[0]).display };
    """
    seen = browse(html, probe, tmp_path)
    assert seen["up"] == sorted(len(row.edges) for row in found.rows) == seen["down"][::-1]
    assert seen["n"] >= 2
    assert seen["hidden"] == "none"
    assert (seen["said"], seen["consoles"]) == ([], [])


# --- sixty cells, killed ------------------------------------------------------------------

GRID = """
task = ["ioi", "pronoun", "induction"]
model = "ioi-small"
method = ["eap", "eap-ig"]
edges = [20, 60]
seeds = 5
n-prompts = 16
n-test = 32
[executor]
"""


def driver(file: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "acdc", "study", str(file), "--out", str(folder)]
    with open(folder.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def wait_for(what: Callable[[], Any], seconds: float = 600.0) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := what():
            return value
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


def n_done(folder: Path) -> int:
    return len(list(folder.glob("cells/*/run.json")))


def killed_twice(file: Path, folder: Path, after: Sequence[int]) -> int:
    """Run a study whose worker is killed, then its driver, after so many runs; and again."""
    process = driver(file, folder)
    wait_for(lambda: n_done(folder) >= after[0])
    name, pid = wait_for(lambda: next(iter(workers(folder).items()), None))
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: n_done(folder) >= after[1])
    assert process.poll() is None
    process.kill()
    process.wait()
    before = n_done(folder)
    wait_for(lambda: not workers(folder), 60.0)
    assert driver(file, folder).wait() == 0
    assert (folder / "cells" / name / "run.json").exists()
    return before


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("sixty") / "whole"
    file = folder.with_suffix(".toml")
    file.write_text(f"{GRID}jobs = 2\n")
    assert driver(file, folder).wait() == 0
    rows = table(folder)
    assert len(rows) == 60
    assert not any(row["failed"] for row in rows)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["processes", "ray", "slurm-local"])
def test_sixty_cells_killed_twice(
    executor: str, unkilled: Sequence[dict[str, str]], tmp_path: Path
) -> None:
    """Each job of submitit is a Python of its own, so that there twelve cells have to do."""
    needed = {"ray": "ray", "slurm-local": "submitit"}.get(executor)
    if needed:
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    few = executor == "slurm-local"
    file, folder = tmp_path / "study.toml", tmp_path / "study"
    grid = GRID.replace("seeds = 5", "seeds = 1") if few else GRID
    file.write_text(f"{grid}name = '{executor}'\njobs = 2\n")
    n_done_before = killed_twice(file, folder, (1, 4) if few else (5, 20))
    wanted = [row for row in unkilled if row["seed"] == "0" or not few]
    assert 0 < n_done_before < len(wanted)
    assert table(folder) == wanted
