"""``--positions`` from the command line to the files: what the split circuits of models show."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from acdc.cli import main
from acdc.engine.patched import PatchedModel
from acdc.errors import OptionError
from acdc.evidence.latents.activations import record
from acdc.evidence.latents.effects import direct_effects
from acdc.evidence.references import load_reference
from acdc.evidence.stability import _common_graph
from acdc.runs.attached import attach_dictionaries
from acdc.runs.building import build_experiment
from acdc.runs.checks import check_settings
from acdc.runs.discover import discover, fit, measure
from acdc.runs.folder import Run, read_run
from acdc.settings import Settings
from graphs import GraphShape, component_graph, load_circuit, read_dot
from graphs.coarse import coarsen
from graphs.known.compare import compare_reference

PLANTED = Path(__file__).resolve().parents[1] / "benchmarks" / "planted" / "models"
LN2 = str(Path(__file__).parent / "data" / "parity" / "ln2")
SPANS = ("rest", "S1", "S1+1", "IO", "S2", "END")


def call(*arguments: str) -> int:
    """Run the command line; return its status."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


# --- what the circuits show ---------------------------------------------------------------


@pytest.fixture(scope="module")
def ioi() -> Run:
    """Return the circuit of the bundled model, split by spans, at about its default threshold."""
    return discover("ioi", positions="span", threshold=0.1, n_prompts=32)


def test_ioi_has_as_many_edges_as_the_formula_says(ioi: Run) -> None:
    graph = ioi.circuit.graph
    assert graph.shape.spans == SPANS
    assert graph.shape.scored_spans == ("END",)
    whole = graph.components
    into_logits = whole.receiver_start[-1] - whole.receiver_start[-2]
    assert graph.n_edges == 6 * (whole.n_edges - into_logits) + into_logits == 8929


def test_ioi_moves_names_at_end_and_tells_the_subject_at_s2(ioi: Run) -> None:
    """The bundled model's own circuit, which training found.

    Movers write the name at IO at END.  Heads 0.0 and 0.6 read the name at S2, where the subject
    comes again, and write against it: the model knows the subject by its second mention.
    """
    edges = [e.split("->") for e in ioi.circuit.edges()]
    assert ioi.faithfulness is not None
    assert ioi.faithfulness > 0.85
    assert ioi.circuit.n_edges < 40
    movers = {u for u, v in edges if v == "logits@END"}
    assert len(movers) > 5
    assert all(u.endswith("@END") for u in movers)
    read = {v for u, v in edges if u.startswith("input@") and v.endswith(("<v>@IO", "<v>@S2"))}
    assert {"a0.h0<v>@S2", "a0.h6<v>@S2"} <= read
    assert {"a0.h0@END", "a0.h6@END"} <= movers
    at_io = {f"{v.partition('<')[0]}@END" for v in read if v.endswith("@IO")}
    assert len(at_io & movers) > 3
    values = {v for _, v in edges if "<v>" in v}
    assert not any(v.endswith(("@S1", "@S1+1", "@END")) for v in values)
    best = np.argsort(-ioi.circuit.scores)[:6]
    largest = set(ioi.circuit.graph.edge_names(best))
    assert {"input@S2->a0.h0<v>@S2", "input@S2->a0.h6<v>@S2"} <= largest


def test_what_is_read_at_s2_speaks_against_the_subject(ioi: Run) -> None:
    """Without the edges at S2 the subject gains, and the indirect object stays as it is."""
    circuit, experiment = fit(ioi.circuit, ioi.settings)
    graph = circuit.graph
    at_s2 = graph.edge_mask(["input@S2->a0.h0<v>@S2", "input@S2->a0.h6<v>@S2"])
    without = circuit.in_circuit & ~at_s2
    gained = {}
    for who in ("answers", "wrong_answers"):
        pairs = tuple(
            dataclasses.replace(p, answers=getattr(p, who), wrong_answers=())
            for p in experiment.task.pairs
        )
        task = dataclasses.replace(experiment.task, pairs=pairs)
        alone = dataclasses.replace(experiment, task=task, metric=_logit())
        model = PatchedModel(alone)
        gained[who] = model.metric(without) - model.metric(circuit.in_circuit)
    assert gained["wrong_answers"] > 2
    assert gained["wrong_answers"] > 3 * abs(gained["answers"])


def _logit() -> Any:
    from acdc.engine.metrics import get_metric

    return dataclasses.replace(get_metric("logit_diff"), needs_wrong=False)


def test_planted_ioi_is_found_at_the_planted_positions() -> None:
    """Names move at END, the duplicate token head asks at S2 and finds S1: the whole circuit."""
    folder = PLANTED / "planted-ioi"
    run = discover(
        str(folder / "pairs.jsonl"), model=str(folder), positions="span", threshold=0.5,
        n_prompts=32,
    )  # fmt: skip
    assert run.circuit.graph.n_edges == 6493
    assert set(run.circuit.edges()) == {
        "input@S2->a1.h1<q>@S2", "input@S1->a1.h1<k>@S1",  # the duplicate token head, at S2
        "a1.h1@S2->a2.h1<k>@S2", "a1.h1@S2->a2.h1<v>@S2",  # S-inhibition reads it from END
        "a2.h1@END->a4.h1<q>@END", "input@IO->a4.h1<v>@IO", "a4.h1@END->logits@END",  # the mover
    }  # fmt: skip
    assert run.faithfulness == pytest.approx(1.0, abs=0.1)
    assert load_reference("planted-ioi")
    found = compare_reference(run.circuit, load_reference("planted-ioi"))
    assert found.nodes.recall == found.nodes.precision == 1


@pytest.mark.slow
def test_spans_and_tokens_of_docstring_agree() -> None:
    """Prompts of one layout: a span of one token is that token's position."""
    by_span = discover("docstring", positions="span", method="eap-ig", n_edges=60)
    by_token = discover("docstring", positions="token", method="eap-ig", n_edges=60)
    assert by_token.circuit.graph.n_edges == 42_465
    joined = [coarsen(run.circuit, run.circuit.graph.shape.unsplit) for run in (by_span, by_token)]
    assert set(joined[0].edges()) & set(joined[1].edges())
    assert abs((by_span.faithfulness or 0) - (by_token.faithfulness or 0)) < 0.1


# --- commands -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("positions") / "run"
    made = ("--positions", "span", "--threshold", "1", "--n-prompts", "8", "--out", str(out))
    assert call("discover", "ioi", *made) == 0
    return out


def test_a_run_says_how_it_is_split(folder: Path) -> None:
    settings, circuit, summary = read_run(folder)
    assert settings.positions == summary["positions"] == "span"
    assert summary["n_edges_total"] == circuit.graph.n_edges == 8929
    assert circuit.graph.shape.spans == SPANS
    assert all("@" in edge for edge in circuit.edges())
    assert (folder / "circuit.svg").read_text().count("END") >= 1


def test_a_run_is_evaluated_on_prompts_that_it_has_not_seen(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--n-random", "3", "--n-permutations", "20", "--n-knockouts", "2", "--n-resamples", "20")
    few += ("--test-edges", "2", "--n-prompts", "6")
    assert call("evaluate", str(folder), *few, "--out", str(tmp_path / "e.json")) == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["seen"] is False
    assert found["n_edges_total"] == 8929
    assert {"minimality", "necessity"} <= set(str(found["tests"]).split("'"))
    capsys.readouterr()
    assert call("evaluate", str(folder), "--brief") == 0  # on those that it has
    seen = json.loads((folder / "run.json").read_text())["metric_seen"]
    assert f"{seen['circuit']:.4g}" in capsys.readouterr().out


def test_a_circuit_file_brings_its_spans_along(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(folder / "circuit.json")
    assert call("evaluate", file, "--task", "ioi", "--brief", "--n-prompts", "4") == 0
    assert "of 8,929" in capsys.readouterr().out
    assert call("evaluate", file, "--task", "pronoun", "--brief", "--n-prompts", "4") == 2
    assert "row 1: the graph is split by the spans rest, S1, S1+1" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["dot", "graphml", "pdf"])
def test_split_circuits_are_exported(folder: Path, tmp_path: Path, format: str) -> None:
    out = tmp_path / f"c.{format}"
    assert call("export", str(folder), "--format", format, "--out", str(out)) == 0
    if format != "pdf":
        again = load_circuit(out)
        assert again.edges() == load_circuit(folder / "circuit.json").edges()


def test_sweep_writes_split_circuits(tmp_path: Path) -> None:
    made = ("--positions", "span", "--thresholds", "1,2", "--n-prompts", "8")
    assert call("sweep", "ioi", *made, "--out", str(tmp_path / "s")) == 0
    circuit = load_circuit(tmp_path / "s" / "circuit-1.json")
    assert circuit.graph.n_edges == 8929
    assert json.loads((tmp_path / "s" / "sweep.json").read_text())["positions"] == "span"


def test_stability_counts_split_edges(tmp_path: Path) -> None:
    made = ("--positions", "span", "--seeds", "2", "--threshold", "1", "--n-prompts", "6")
    assert call("stability", "ioi", *made, "--out", str(tmp_path / "s")) == 0
    found = json.loads((tmp_path / "s" / "stability.json").read_text())
    assert found["n_edges_total"] == 8929
    assert all("@" in edge for edge in found["edges"])


def test_seeds_may_show_other_orders_of_the_spans() -> None:
    def run(seed: int, **shape: Any) -> Any:
        shape = {"spans": ("a", "b"), "scored_spans": ("b",), "reaches": ((0, 1),)} | shape
        graph = component_graph(GraphShape(1, 1, **shape))
        return SimpleNamespace(
            circuit=SimpleNamespace(graph=graph), settings=SimpleNamespace(seed=seed)
        )

    forth, back = run(0), run(1, reaches=((1, 0),))
    assert _common_graph([forth, run(2)]) is forth.circuit.graph
    assert _common_graph([forth, back]).shape.reach.all()
    longer = run(3, spans=("a", "b", "c"))
    with pytest.raises(OptionError, match="seed 3 gives prompts of 3 spans, seed 0 of 2"):
        _common_graph([forth, longer])


def test_self_repair_is_measured_of_whole_heads(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "repair.json"
    few = ("--n-prompts", "8", "--n-resamples", "20", "--out", str(out))
    assert call("self-repair", str(folder), *few) == 0
    assert "@" not in out.read_text()


def test_both_directions_are_split(tmp_path: Path) -> None:
    made = ("--positions", "span", "--threshold", "1", "--n-prompts", "4", "--direction", "both")
    assert call("discover", "ioi", *made, "--out", str(tmp_path / "b")) == 0
    found = json.loads((tmp_path / "b" / "directions.json").read_text())
    assert found["n_edges_total"] == 8929


def test_constants_are_trained_for_whole_senders() -> None:
    run = discover(
        "ioi", positions="span", method="eap", n_edges=30, n_prompts=4, intervention="optimal",
        optimal_steps=2,
    )  # fmt: skip
    assert run.circuit.n_edges > 0


@pytest.mark.parametrize("nodes", [("--saes", "bundled"), ("--neurons",)], ids=["saes", "neurons"])
def test_latents_are_split_like_everything_else(nodes: tuple[str, ...], tmp_path: Path) -> None:
    """Found, measured again, drawn, and looked into."""
    folder, few = tmp_path / "run", ("--max-latents", "12", "--n-prompts", "4")
    made = ("--positions", "span", "--method", "eap-ig", "--edges", "300", *few)
    assert call("discover", "ioi", *nodes, *made, "--out", str(folder)) == 0
    circuit = load_circuit(folder / "circuit.json")
    letter = "n" if nodes == ("--neurons",) else "f"
    split = [name for name in circuit.nodes() if re.fullmatch(rf"[amr]\d\.{letter}\d+@\S+", name)]
    assert split
    summary = json.loads((folder / "run.json").read_text())
    assert summary["latents"]["n_kept"] == 12
    again, experiment = measure(circuit, Settings.read(summary))
    assert len(experiment.task) == 4
    assert again.metric_circuit == pytest.approx(summary["metric_seen"]["circuit"])
    assert split[0] in read_dot(folder / "circuit.dot").nodes()  # drawn or not
    for kind in ("graphml", "dot", "json"):
        out = tmp_path / f"circuit.{kind}"
        assert call("export", str(folder), "--format", kind, "--out", str(out)) == 0
    assert read_dot(tmp_path / "circuit.dot").edges() == circuit.edges()
    if letter == "f":
        page = tmp_path / "latents.html"
        assert call("latents", str(folder), "--html", str(page)) == 0
        assert split[0] in page.read_text()


@pytest.mark.slow
def test_a_report_of_latents_that_are_split(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    made = ("--positions", "span", "--method", "eap-ig", "--edges", "300", "--n-prompts", "4")
    few = ("--saes", "bundled", "--max-latents", "12")
    assert call("discover", "ioi", *few, *made, "--out", str(folder)) == 0
    assert call("report", str(folder)) == 0
    assert re.search(r"[amr]\d\.f\d+@", (folder / "report.html").read_text())


def test_a_report_of_neurons_that_are_split(tmp_path: Path) -> None:
    rows = [
        {"clean": [4, 5, 6, 7], "corrupt": [8, 5, 6, 7], "answers": [4], "wrong_answers": [8]},
        {"clean": [9, 5, 6, 7], "corrupt": [3, 5, 6, 7], "answers": [9], "wrong_answers": [3]},
    ]
    file, folder = tmp_path / "pairs.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = ("--model", LN2, "--neurons", "--max-latents", "6", "--positions", "token")
    made += ("--method", "eap", "--edges", "200", "--holdout", "0", "--out", str(folder))
    assert call("discover", str(file), *made) == 0
    assert call("report", str(folder)) == 0
    assert re.search(r"m\d\.n\d+@p\d", (folder / "report.html").read_text())


def test_a_latent_in_a_span_is_the_latent_on_its_tokens() -> None:
    settings = check_settings(
        Settings("ioi", saes="bundled", n_prompts=6, positions="span", max_latents=8)
    )
    split = attach_dictionaries(build_experiment(settings), settings).experiment
    whole = dataclasses.replace(split, positions=None)
    names = [name for name in whole.graph.senders if ".f" in name]
    spans = split.graph.shape.spans
    of_spans = [f"{name}@{span}" for name in names for span in spans]
    found = record(split, of_spans).values.toarray().reshape(-1, len(names), len(spans))
    assert (np.count_nonzero(found, axis=2) <= 1).all()  # a token is in one span
    assert sorted(found.sum(2).sum(0)) == pytest.approx(
        sorted(record(whole, names).values.toarray().sum(0))
    )
    assert np.count_nonzero(found.any(0).sum(1) > 1)  # some are active in several
    sizes = np.ones(len(of_spans))
    effects = direct_effects(split, of_spans, sizes)
    plain = direct_effects(whole, names, sizes[: len(names)])
    for name in names:
        for span in spans:
            np.testing.assert_allclose(
                effects[f"{name}@{span}"].up_by, plain[name].up_by, rtol=1e-4
            )


UNEQUAL = [
    {"clean": [3, 7, 9], "corrupt": [3, 8, 9], "answers": [4], "wrong_answers": [5]},
    {"clean": [3, 7, 9, 4], "corrupt": [3, 8, 9, 4], "answers": [4], "wrong_answers": [5]},
]

BAD = [
    ("ioi", ("--positions", "token"), "'token' needs prompts of equal length, but task 'ioi' has"),
    ("ioi", ("--positions", "words"), "positions 'words': expected one of none, token, span"),
    ("file", ("--positions", "span"), "'span' needs labelled prompts, but task 'pairs' labels no"),
    ("file", ("--positions", "token"), "prompts of 3 to 4 tokens"),
]


@pytest.mark.parametrize("command", ["discover", "sweep", "stability"])
@pytest.mark.parametrize(("task", "options", "words"), BAD)
def test_bad_input_is_one_line(
    command: str, task: str, options: tuple[str, ...], words: str,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, UNEQUAL)))
    task = str(file) if task == "file" else task
    out = tmp_path / "out"
    given = (task, "--model", "ioi-small", *options, "--out", str(out))
    assert call(command, *given) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert error.count("\n") == 0
    assert not out.exists()


def test_stories_split_by_span(stories: Path) -> None:
    """A real model: grouped-query attention, prompts of several lengths."""
    run = discover(
        "pronoun", model=str(stories), positions="span", method="eap-ig", n_edges=100, n_prompts=16
    )
    graph = run.circuit.graph
    assert graph.shape.spans == ("rest", "noun", "name", "END")
    assert graph.n_edges == 4 * (1701 - 46) + 46
    assert any(edge.startswith("input@noun->") for edge in run.circuit.edges())
