"""Which method works on which kind of node under which command: measured on the command line.

``python tests/cells.py [FILE]`` measures every cell and writes ``benchmarks/results/cells``: a mark
for each, or the one line with which the command refuses.  What is measured is kept in the file, so
that it goes on where it was stopped.  ``tests/test_cells.py`` holds that table
against what it measures.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

from latent_oracle import random_dictionary
from safetensors.torch import load_file
from test_cross_layer import save, tensors_of

import acdc.evidence.directions as directions_module
import acdc.evidence.stability as stability_module
import acdc.runs.folder as folder_module
from acdc.cli import main
from acdc.dictionaries.files import write_dictionary
from acdc.methods import METHODS
from acdc.models import load_model
from acdc.runs.circuits import load_circuit
from acdc.runs.folder import load_run
from graphs import Circuit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cells"
COMMANDS = ("discover", "evaluate", "report", "both directions", "stability", "sweep")
PASSES = "passes"

_LATENTS = ("--saes", "{saes}", "--max-latents", "6")
KINDS: dict[str, tuple[str, ...]] = {
    "components": (),
    "spans": ("--positions", "span"),
    "SAE latents": _LATENTS,
    "transcoder latents": ("--saes", "{transcoders}", "--max-latents", "6"),
    "cuts": ("--saes", "{cuts}", "--max-latents", "6"),
    "cross-layer transcoder latents": ("--saes", "{crossing}", "--max-latents", "6"),
    "neurons": ("--neurons", "--max-latents", "6"),
    "neuron inputs": ("--neurons", "--neuron-inputs", "--max-latents", "6"),
    "spans with latents": ("--positions", "span", *_LATENTS),
}
"""Kind of node -> the options that ask for it."""

_QUICK: dict[str, tuple[str, ...]] = {  # what is trained or searched for is kept short
    "acdc": ("--threshold", "0.3"),
    "acdc-two-sided": ("--threshold", "0.3"),
    "eap-acdc": ("--threshold", "0.3"),
    "edge-pruning": ("--edges", "40", "--mask-steps", "4"),
    "ensemble": ("--edges", "40", "--of", "eap,relp"),
    "subnetwork-probing": ("--edges", "40", "--mask-steps", "4"),
}
_SITES = {"saes": "mlp_out", "transcoders": "ln2_normalized", "cuts": "resid_pre"}
_SEVERAL_SPANS = {"first": [0, 1], "second": [2]}


class RefusedError(Exception):
    """A command ended with status 2 and one line."""


def prepare(folder: Path) -> None:
    """Put model, task and dictionaries into a folder."""
    source = ROOT / "tests" / "data" / "parity" / "ln2"
    shutil.copytree(source, folder / "model")
    batch = load_file(source / "batch.safetensors")
    columns = (batch[key][:8].tolist() for key in ("clean", "corrupt", "answer", "wrong"))
    keys = ("clean", "corrupt", "answers", "wrong_answers")
    rows = [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]
    lines = (json.dumps({**row, "spans": _SEVERAL_SPANS}) + "\n" for row in rows)
    (folder / "task.jsonl").write_text("".join(lines))
    model, _ = load_model(folder / "model")
    for name, site in _SITES.items():
        architecture = "transcoder" if name == "transcoders" else "standard"
        write_dictionary(random_dictionary(model, architecture, site, 1), folder / name / "one")
    save(tensors_of(model, scale=0.1), folder / "crossing")


def command(*words: object) -> None:
    """Run a command in this process; RefusedError with its line if it ends with status 2."""
    said = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(said), ExitStack() as undrawn:
            for module in (folder_module, directions_module, stability_module):
                undrawn.enter_context(patch.object(module, "render", _undrawn))
            main([str(word) for word in words])
    except SystemExit as ended:
        if ended.code == 2:
            line = next(x for x in said.getvalue().splitlines() if x.startswith("acdc: "))
            line = line.removeprefix("acdc: ")
            if line.startswith("No such option: --method"):  # the rest depends on typer
                line = "sweep is ACDC over thresholds: it has no --method"
            raise RefusedError(line) from None
        if ended.code:
            raise AssertionError(said.getvalue()) from None


def _undrawn(drawing: object, path: Path, *_: object, **__: object) -> None:
    """Leave a picture out: it takes longer than all the rest, and other tests look at pictures."""
    Path(path).write_bytes(b"")


def cells(kind: str, method: str, place: Path) -> Iterator[tuple[str, str]]:
    """Yield each command with its mark, for one kind of node and one method.

    Parameters
    ----------
    kind, method
        Of :data:`KINDS` and of the methods.
    place
        What :func:`prepare` filled; runs are written into a folder of their own in it.
    """
    own = place / f"{kind}, {method}".replace(" ", "-")
    paths = {name: place / name for name in (*_SITES, "crossing")}
    nodes = [word.format(**paths) for word in KINDS[kind]]
    common = [place / "task.jsonl", "--model", place / "model", *nodes, "--batch-size", "8"]
    how = ["--method", method, *_QUICK.get(method, ("--edges", "40"))]
    checks: dict[str, Callable[[], None]] = {
        "discover": lambda: _discover(own, [*common, *how], kind),
        "evaluate": lambda: _evaluate(own),
        "report": lambda: _report(own),
        "both directions": lambda: _both(own, [*common, *how], kind),
        "stability": lambda: _stability(own, [*common, *how]),
        "sweep": lambda: _sweep(own, [*common, *(() if method == "acdc" else how[:2])], kind),
    }
    for name in COMMANDS:
        try:
            checks[name]()
        except RefusedError as refused:
            yield name, str(refused).replace(str(place), "PLACE")
        else:
            yield name, PASSES
    shutil.rmtree(own, ignore_errors=True)


def _check_nodes(circuit: Circuit, kind: str) -> None:
    shape = circuit.graph.shape
    assert bool(shape.spans) == ("spans" in kind)
    assert bool(shape.sites) == (kind not in ("components", "spans"))
    kept, every = circuit.n_edges, circuit.graph.n_edges
    assert 0 < kept < every, f"{kept} of {every} edges"


def _discover(own: Path, asked: list, kind: str) -> None:
    command("discover", *asked, "--out", own / "run")
    _check_nodes(load_circuit(own / "run"), kind)


def _evaluate(own: Path) -> None:
    """On the prompts of discovery a circuit is as faithful as discovery said."""
    if not (own / "run").is_dir():
        raise RefusedError("there is no run")
    few = ("--seen", "--no-tests", "--n-resamples", "5", "--out", own / "seen.json")
    command("evaluate", own / "run", *few)
    found, run = json.loads((own / "seen.json").read_text()), load_run(own / "run")
    assert found["n_edges_kept"] == run.circuit.n_edges
    assert run.evaluation.faithfulness is not None
    assert math.isclose(
        found["faithfulness"], run.evaluation.faithfulness, rel_tol=1e-4, abs_tol=1e-5
    )
    command("evaluate", own / "run", *few[1:-1], own / "run" / "evaluation.json")


def _report(own: Path) -> None:
    if not (own / "run").is_dir():
        raise RefusedError("there is no run")
    command("report", own / "run", "--prompts", "1")
    page = (own / "run" / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert load_circuit(own / "run").nodes()[0] in page


def _both(own: Path, asked: list, kind: str) -> None:
    command("discover", *asked, "--direction", "both", "--out", own / "both")
    found = json.loads((own / "both" / "directions.json").read_text())
    for direction in ("noising", "denoising"):
        run = load_run(own / "both" / direction)
        _check_nodes(run.circuit, kind)
        assert run.settings.direction == direction
        assert run.circuit.n_edges == found["n_edges_kept"][direction]


def _stability(own: Path, asked: list) -> None:
    command("stability", *asked, "--seeds", "2", "--out", own / "stable")
    found = json.loads((own / "stable" / "stability.json").read_text())
    assert len(found["runs"]) == 2
    assert max(found["edges"].values()) <= 2


def _sweep(own: Path, asked: list, kind: str) -> None:
    command("sweep", *asked, "--thresholds", "0.1,0.5", "--out", own / "sweep")
    points = json.loads((own / "sweep" / "sweep.json").read_text())["points"]
    sizes = [point["n_edges_kept"] for point in points]
    assert sizes[0] >= sizes[1]
    _check_nodes(load_circuit(own / "sweep" / "circuit-0.1.json"), kind)


# --- the table ----------------------------------------------------------------------------


def _all_of(kind: str, method: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        try:
            return dict(cells(kind, method, Path(folder)))
        except AssertionError as error:
            raise AssertionError(f"{method} on {kind}: {error}") from error


Table = dict[str, dict[str, dict[str, str]]]
"""Kind of node -> method -> command -> mark."""


def measure(n_processes: int, keep: Path) -> Table:
    """Return the mark of every cell.

    ``keep`` is a file that holds what is measured; what is in it already is not measured again.
    """
    table: Table = json.loads(keep.read_text()) if keep.exists() else {}
    table = {kind: dict(table.get(kind, {})) for kind in KINDS}
    asked = [(kind, method) for method in METHODS for kind in KINDS if method not in table[kind]]
    with ProcessPoolExecutor(n_processes, get_context("spawn")) as pool:
        waiting = {pool.submit(_all_of, *one): one for one in asked}
        for done in as_completed(waiting):
            kind, method = waiting[done]
            if done.exception() is None:
                table[kind][method] = done.result()
                keep.write_text(json.dumps(table))
            else:
                print(done.exception(), file=sys.stderr, flush=True)
    return {kind: {method: table[kind][method] for method in METHODS} for kind in KINDS}


def markdown(table: Table) -> str:
    """Return the table as a page: a mark a cell, and the refusals below."""
    reasons: dict[str, int] = {}
    parts = ["# Methods, kinds of nodes and commands\n"]
    parts.append(
        "Measured on a model of two layers by `python tests/cells.py`, through the command line; "
        "`tests/test_cells.py` holds the table against what it measures. ✓: the command ran, its "
        "files were read back and agree; a number: refused, with the line below.\n"
    )
    for kind, methods in table.items():
        parts.append(f"## {kind}\n\n| method | {' | '.join(COMMANDS)} |")
        parts.append("|---|" + ":-:|" * len(COMMANDS))
        for method, marks in methods.items():
            row = [
                "✓" if marks[name] == PASSES
                else str(reasons.setdefault(marks[name], len(reasons) + 1))
                for name in COMMANDS
            ]  # fmt: skip
            parts.append(f"| {method} | {' | '.join(row)} |")
        parts.append("")
    n_cells = sum(len(marks) for methods in table.values() for marks in methods.values())
    n_pass = sum(
        mark == PASSES for methods in table.values() for marks in methods.values()
        for mark in marks.values()
    )  # fmt: skip
    parts.append(f"{n_pass} of {n_cells} cells pass. Refusals:\n")
    parts += [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(parts) + "\n"


def write(table: Table, folder: Path = RESULTS) -> None:
    """Write the table as JSON and as a page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cells.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    (folder / "results.md").write_text(markdown(table))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        keep = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch) / "cells.json"
        write(measure(2, keep))
