"""A run as one page: its data held against the run, the page parsed, and opened in a browser."""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
import shutil
import tomllib
from dataclasses import asdict, replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import EVIL, browse, check_policy
from oracle import FAMILIES, small_model, small_task

import acdc
import acdc.evidence.references as references_module
import acdc.pages.circuit as circuit_module
import acdc.pages.contents as contents_module
from acdc.cli import main
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.errors import CircuitFileError, OptionError
from acdc.evidence.assessment import evaluate
from acdc.evidence.verdicts import Trials
from acdc.methods import METHODS, Score
from acdc.pages import Report, gather, to_html
from acdc.pages.circuit import CircuitView, view_circuit
from acdc.pages.evidence import evidence_of, read_evidence, read_repeated
from acdc.pages.patterns import MOST_TOKENS, attention_patterns, encode_patterns
from acdc.pages.plots import Axis, ablations_plot, frontier_plot
from acdc.runs import attached, given
from acdc.runs.folder import read_run
from acdc.settings import Settings, command_line
from acdc.tasks import Pair, Task
from acdc.tasks.texts import Texts
from graphs import Circuit, GraphError, Reference, component_graph, read_reference, write_reference
from graphs.graph import GraphShape
from graphs.known.roc import auroc
from graphs.pictures.draw import styled_lines
from graphs.pictures.svg import to_svg

TRIALS = Trials(n_random=30, n_permutations=60, n_knockouts=3, n_edges=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 30 edges with an evaluation and a stability.json in its folder."""
    path = tmp_path_factory.mktemp("report") / "run"
    run = acdc.discover("ioi", method="eap-ig", n_edges=30, n_prompts=8, steps=2)
    run.save(path)
    settings, circuit, _ = read_run(path)
    evaluate(path, trials=TRIALS, n_resamples=50).save(path)
    edges = circuit.edges()
    repeated = {
        **asdict(settings),
        "seeds": [0, 1],
        "runs": [
            {"seed": 0, "n_edges_kept": 30, "faithfulness": 0.5},
            {"seed": 1, "n_edges_kept": 28, "faithfulness": None},
        ],
        "n_edges_total": circuit.graph.n_edges,
        "mean_jaccard": 0.8,
        "edges": {**dict.fromkeys(edges[:20], 2), **dict.fromkeys(edges[20:25], 1)},
    }
    (path / "stability.json").write_text(json.dumps(repeated))
    return path


@pytest.fixture(scope="module")
def circuit(folder: Path) -> Circuit:
    return acdc.load_circuit(folder)


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return gather(folder, n_prompts=2)


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return to_html(report)


class Page(HTMLParser):
    """What a browser would fetch or run, the text, and the data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.words).split())
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "xlink:href"):
                self.fetched.append(value or "")
            elif name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["script"] and self.lasttag == "script":
            self.scripts.append(data)
        else:
            self.words.append(data)


def test_the_page_says_what_its_colours_mean(report: Report, circuit: Circuit, page: str) -> None:
    """The lines are drawn by the very sign that the words under them name."""
    helps = report.view.data["helps"]
    assert helps == circuit.info["helps"]
    said = "above" if helps > 0 else "below"
    assert "blue helps, orange hurts" in Page(page).text
    assert f"(a score {said} 0 helps)" in Page(page).text or report.score is Score.COST
    for score, wanted in ((Score.COST, "orange hurts;"), (Score.MAGNITUDE, "has no sign; blue is")):
        other = to_html(replace(report, score=score))
        assert wanted in Page(other).text


# --- attention patterns -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_are_what_the_heads_attend_to(family: str) -> None:
    """Weighing the values by the pattern gives what the heads put out."""
    model, task = small_model(family, 0), small_task(0, 1)
    tokens = task.pairs[0].clean
    trace = model.forward(torch.tensor([tokens]))
    found = attention_patterns(model, tokens)
    for layer, pattern, v, z in zip(model.layers, found, trace.v, trace.z, strict=True):
        placed = layer.attention.place("v", v[0], slice(0, len(tokens)))
        values = placed.repeat_interleave(layer.attention.group, dim=0)
        assert pattern.sum(-1) == pytest.approx(1.0, abs=1e-4)
        assert np.triu(pattern, 1).any() != layer.attention.causal
        close = 2e-2 if model.dtype != torch.float32 else 1e-5
        assert pattern @ values.detach().numpy() == pytest.approx(z[0].detach().numpy(), abs=close)


def test_patterns_on_the_page_are_bytes_of_the_last_tokens() -> None:
    model = small_model("LN", 0)
    n = min(model.n_ctx, MOST_TOKENS + 3)
    long = tuple(range(1, 4)) * n
    pair = Pair(long[:n], long[1 : n + 1], (1,), (2,), (0, n - 1))
    experiment = Experiment(model, Task("long", (pair,)), get_metric("logit_diff"))
    found = encode_patterns(experiment, Texts(None), [(0, 1), (1, 0)], 5)
    (prompt,) = found.prompts
    shown = len(prompt["clean"])
    assert shown == min(n, MOST_TOKENS)
    assert prompt["n_left_out"] == n - shown
    assert prompt["scored"] == ([0] if n == shown else []) + [shown - 1]
    assert (prompt["answers"], prompt["wrong"]) == ([" 1"], [" 2"])
    for run, encoded in zip((pair.clean, pair.corrupt), found.patterns["0.1"][0], strict=True):
        bytes_ = np.frombuffer(base64.b64decode(encoded), np.uint8).reshape(shown, shown)
        wanted = attention_patterns(model, run)[0][1][-shown:, -shown:]
        assert np.abs(bytes_ / 255 - wanted).max() <= 0.5 / 255 + 1e-6


def test_patterns_that_find_no_room_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment(small_model("LN", 0), small_task(0, 2), get_metric("logit_diff"))
    each = sum(2 * len(pair.clean) ** 2 for pair in experiment.task.pairs)
    monkeypatch.setattr("acdc.pages.patterns.MOST_BYTES", 2 * each)
    found = encode_patterns(experiment, Texts(None), [(1, 1), (0, 0), (0, 1)], 2)
    assert list(found.patterns) == ["1.1", "0.0"]
    circuit = Circuit(experiment.graph, *scored(experiment.graph.n_edges))
    view = view_circuit(circuit, experiment, Texts(None), n_prompts=2)
    assert view.n_without_pattern == 2
    assert len(view.data["patterns"]) == 2


# --- the circuit --------------------------------------------------------------------------


def scored(n: int, n_in: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Scores and a circuit of the best ``n_in`` edges."""
    scores = np.random.default_rng(0).normal(size=n)
    mask = np.zeros(n, dtype=bool)
    mask[np.argsort(-np.abs(scores))[: n if n_in is None else n_in]] = True
    return scores, mask


def test_the_page_has_the_circuit_and_the_best_others(report: Report, circuit: Circuit) -> None:
    data, graph = report.view.data, circuit.graph
    names = [f"{edge[0]}->{edge[2]}" for edge in data["edges"]]
    inside = [name for name, edge in zip(names, data["edges"], strict=True) if edge[4]]
    assert sorted(inside) == sorted(circuit.edges())
    outside = set(names) - set(inside)
    assert len(outside) == report.view.n_others == 100
    strength = np.where(circuit.in_circuit, -1, np.abs(circuit.scores))
    best = np.argsort(-strength, kind="stable")[:100]
    assert outside == set(graph.edge_names(best))
    for name, edge in zip(names, data["edges"], strict=True):
        assert edge[3] == circuit.scores[graph.edge_index(name)]
        assert edge[1] in data["nodes"]
    drawn = [{i for line in lines for i in line} for lines in data["pictures"]]
    assert [len(d) for d in drawn] == [30, 130]
    assert drawn[0] == {i for i, edge in enumerate(data["edges"]) if edge[4]}
    assert data["n_edges"] == 30


def test_pictures_have_every_line_and_node(report: Report) -> None:
    data = report.view.data
    for picture in report.view.pictures:
        lines = re.findall(r'data-line="(\d+)"', picture.drawing.svg)
        assert sorted(map(int, lines)) == list(range(len(picture.lines)))
        nodes = set(re.findall(r'data-node="([^"]+)"', picture.drawing.svg))
        ends = {data["edges"][i][at] for line in picture.lines for i in line for at in (0, 1)}
        assert nodes == ends | {"input", "logits"}
        assert nodes <= data["nodes"].keys()
        assert "xlink" not in picture.drawing.svg


def test_shared_key_value_heads_are_followed() -> None:
    """A node of any name that a graph has is drawn, and who is computed from whom is said."""
    graph = component_graph(GraphShape(1, 4, n_kv_heads=2))
    names = ["input->a0.h2<q>", "input->a0.kv1<k>", "a0.h2->m0", "a0.h3->logits", "m0->logits"]
    found = Circuit.from_edges(graph, names)
    lines = styled_lines(found, found.in_circuit)
    drawing = to_svg(graph, lines)
    assert set(drawing.nodes) == {"input", "a0.h2", "a0.h3", "a0.kv1", "m0", "logits"}
    assert 'class="feed" data-from="a0.kv1" data-to="a0.h3"' in drawing.svg
    assert drawing.svg.count('class="line"') == 5
    edges = np.array([graph.edge_index(name) for name in names])
    ends = ["a0.h2", "a0.kv1", "m0", "logits", "logits"]
    nodes = circuit_module._nodes(graph, edges, ends, drawing.nodes)
    assert nodes["a0.kv1"]["feeds"] == ["a0.h2", "a0.h3"]
    assert nodes["a0.h3"]["reads"] == ["a0.kv1"]
    assert nodes["m0"]["feeds"] == nodes["m0"]["reads"] == []
    assert (nodes["a0.kv1"]["head"], nodes["a0.h3"]["head"]) == (None, "0.3")
    rows = [["input", end, "", score, 1, None] for score, end in enumerate(ends)]
    assert circuit_module._ranked_heads([*rows, ["a0.h3", "m0", "", 9.0, 0, None]], nodes) == [
        (0, 2), (0, 3)
    ]  # fmt: skip


def test_of_a_large_circuit_the_strongest_edges_come_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("MOST_EDGES", 25), ("CROWDED", 12), ("N_STRONGEST", 8)):
        monkeypatch.setattr(circuit_module, name, value)
    experiment = Experiment(small_model("LN", 0), small_task(0, 1), get_metric("logit_diff"))
    graph = experiment.graph
    big = Circuit(graph, *scored(graph.n_edges, graph.n_edges - 9))
    view = view_circuit(big, experiment, Texts(None), n_prompts=1)
    assert (view.n_edges, view.n_others) == (graph.n_edges - 9, 9)
    assert 15 < view.n_shown <= 25
    sizes = [len({i for line in picture.lines for i in line}) for picture in view.pictures]
    assert 1 < sizes[0] <= 8
    assert sizes[1:] == [view.n_shown, sizes[0] + 9]
    names = [picture.name for picture in view.pictures]
    assert names[0] == f"its {sizes[0]} strongest edges"
    assert names[2] == "with 9 others (dashed)"
    assert len(view.data["edges"]) == view.n_shown + 9
    # the strongest edge that is connected is in the smallest picture
    shown = [view.data["edges"][i] for line in view.pictures[0].lines for i in line]
    assert max(abs(e[3]) for e in shown) == max(abs(e[3]) for e in view.data["edges"] if e[4])


def test_a_circuit_without_edges_has_a_page(folder: Path, tmp_path: Path) -> None:
    empty = Path(shutil.copytree(folder, tmp_path / "empty"))
    for name in ("evaluation.json", "stability.json"):
        (empty / name).unlink()
    content = json.loads((empty / "circuit.json").read_text())
    for edge in content["edges"].values():
        edge["in_graph"] = False
    (empty / "circuit.json").write_text(json.dumps(content))
    summary = json.loads((empty / "run.json").read_text())
    (empty / "run.json").write_text(json.dumps({**summary, "n_edges_kept": 0}))
    text = Page(to_html(gather(empty))).text
    assert "0 edges of 1,519" in text
    assert "The circuit has no edge: there is nothing to test." in text


# --- what was asked, and what speaks for it -----------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        Settings("ioi", model="ioi-small", metric="kl", threshold=0.25, prepend_bos=True),
        Settings("a b.jsonl", model="m", method="eap", metric="kl", n_edges=7, split_qkv=False),
        Settings("ioi", model="m", metric="nll", method="eap-ig", saes="x,y", ranking="signed"),
    ],
)
def test_the_command_asks_for_the_same(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def discover(task: str, **options: Any) -> None:
        names = asdict(settings)
        asked.append(Settings(task, **{k: v for k, v in options.items() if k in names}))
        raise OptionError("enough")

    monkeypatch.setattr("acdc.runs.discover.discover", discover)
    monkeypatch.setattr("acdc.runs.checks.check_settings", lambda settings: settings)
    with pytest.raises(SystemExit):
        main([*shlex.split(command_line(settings))[1:], "--out", str(tmp_path / "out")])
    assert asked == [settings.replace(options=METHODS[settings.method].defaults)]


def test_the_page_says_what_was_asked_and_found(page: str, report: Report) -> None:
    text, summary = Page(page).text, report.summary
    assert "Circuit of ioi in ioi-small" in text
    assert "30 edges of 1,519 (2.0 %) keep" in text
    assert f"{100 * summary['faithfulness']:.0f} % of the model’s logit_diff" in text
    assert "acdc discover ioi --model ioi-small --method eap-ig --metric logit_diff" in text
    assert "at most 30 edges by absolute score" in text
    assert f"torch {summary['versions']['torch']}" in text
    for name in summary["timings"]:
        assert f"{name} {summary['timings'][name]:.1f} s" in text
    assert "Attention patterns of" not in text  # all found room


def test_verdicts_are_those_of_the_evaluation(page: str, report: Report) -> None:
    text = Page(page).text
    assert report.evidence is not None
    assert report.evidence.tests is not None
    verdicts = report.evidence.tests.verdicts
    words = {True: "pass", False: "fail", None: "cannot tell"}
    assert len(verdicts) == 6
    for verdict in verdicts:
        assert f"{verdict.test} {words[verdict.passed]} " in text
        assert verdict.says[1:] in text
    passed = sum(v.passed is True for v in verdicts)
    assert f"It passes {passed} of 6 tests" in text
    for row in report.evidence.ablations:
        assert f"{row.faithfulness:.3g} ({row.low:.3g} to {row.high:.3g})" in text
    assert "unseen by discovery (seed 1, not 0)" in text


def test_without_tests(folder: Path, report: Report) -> None:
    text = Page(to_html(gather(folder, tests=False, n_prompts=1))).text
    assert "Left out." in text
    assert "It passes" not in text
    assert report.evidence is not None
    assert f"{report.evidence.ablations[0].faithfulness:.3g} (" in text


@pytest.mark.parametrize("tests", [True, False])
def test_what_is_measured_now_is_what_a_file_would_say(
    folder: Path, circuit: Circuit, tmp_path: Path, tests: bool
) -> None:
    few = Trials(n_random=3, n_permutations=3, n_knockouts=2, n_edges=3)
    found = evaluate(folder, trials=few, tests=tests, n_resamples=20)
    found.save(tmp_path / "evaluation.json")
    assert evidence_of(found) == read_evidence(tmp_path / "evaluation.json", circuit)
    nowhere = replace(found.measured[0], low=math.nan, high=math.inf)
    undefined = replace(found, measured=(nowhere,))
    undefined.save(tmp_path / "evaluation.json", overwrite=True)
    assert evidence_of(undefined) == read_evidence(tmp_path / "evaluation.json", circuit)


@pytest.mark.parametrize("saes", [None, "bundled"])
def test_the_model_is_loaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saes: str | None
) -> None:
    """And measured as ``acdc evaluate`` measures, on prompts that discovery has not seen."""
    options = {} if saes is None else {"saes": saes, "max_latents": 12}
    run = acdc.discover("ioi", method="eap", n_edges=40, n_prompts=4, **options)
    run.save(tmp_path / "run")
    wanted = evaluate(tmp_path / "run", tests=False)
    calls: list[str] = []

    def counted(module: Any, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, **kwargs: calls.append(name) or real(*args, **kwargs)
        )

    counted(given, "load_model")
    counted(attached, "load_dictionaries")
    found = gather(tmp_path / "run", tests=False, n_prompts=1)
    assert calls == ["load_model"] + ["load_dictionaries"] * (saes is not None)
    assert found.evidence == evidence_of(wanted)


def test_an_evaluation_is_made_where_none_is(folder: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "evaluation.json").unlink()
    few = Trials(n_random=2, n_permutations=2, n_knockouts=2, n_edges=1)
    found = gather(bare, trials=few, n_prompts=1)
    assert found.evidence is not None
    assert found.evidence.tests is not None
    assert {v.n for v in found.evidence.tests.verdicts if v.unit == "random circuits"} == {2}
    assert not (bare / "evaluation.json").exists()
    text = Page(to_html(found)).text
    assert "cannot tell" in text


def test_the_frontier_goes_from_nothing_to_the_model(report: Report) -> None:
    sizes = [point.n_edges for point in report.frontier]
    assert sizes == sorted(sizes)
    assert sizes[-1] == report.summary["n_edges_total"]
    assert report.frontier[-1].faithfulness == pytest.approx(1)
    assert report.frontier[0].faithfulness < 0.5
    svg = frontier_plot(report.frontier, 30, 1519, [])
    for point in report.frontier:
        if point.n_edges:
            assert f"{point.n_edges:,} edges: {point.faithfulness:.3f}" in svg


def test_the_page_leads_with_what_is_claimed(report: Report) -> None:
    summary = report.summary
    text = Page(to_html(report)).text
    said = f"{100 * summary['faithfulness']:.0f} % of the model’s logit_diff (95 % interval"
    assert said in text
    assert f"on {summary['prompts']['test']} prompt pairs that nothing was chosen on, and" in text
    doubtful = {"faithfulness": None, "faithfulness_seen": None, "warnings": ["it cannot"]}
    text = Page(to_html(replace(report, summary={**summary, **doubtful}))).text
    assert "No faithfulness is claimed" in text
    assert "It cannot." in text


def test_a_wide_picture_has_the_panel_below_it(report: Report) -> None:
    first, *rest = report.view.pictures

    def page(aspect: float) -> str:
        picture = replace(first, drawing=replace(first.drawing, aspect=aspect))
        return to_html(replace(report, view=replace(report.view, pictures=[picture, *rest])))

    assert '<div class="stage wide">' in page(3.0)
    assert '<div class="stage">' in page(1.0)


def test_the_page_of_a_denoising_run_by_spans_says_so(report: Report) -> None:
    changed = {"direction": "denoising", "positions": "span", "mean_over": "pronoun"}
    other = replace(
        report,
        settings=replace(report.settings, **changed),
        summary={**report.summary, **changed},
    )
    text = Page(to_html(other)).text
    assert "of what corruption does to logit_diff" in text
    assert "of the model’s logit_diff" not in text
    assert re.search(r"corrupt run \S+, all but the circuit restored \S+, every edge rest", text)
    assert "split by span" in text
    assert "means over pronoun" in text


def test_names_of_ablations_lie_inside_their_plot() -> None:
    row = replace(circuit_row(0.5), intervention="mean-positional", direction="denoising")
    said = re.search(
        r'<text[^>]* x="([\d.]+)"[^>]*>mean-positional, denoising', ablations_plot([row])
    )
    assert said is not None
    assert float(said[1]) >= 6.5 * len("mean-positional, denoising")  # about that wide


def test_a_run_by_spans_finds_its_reference(tmp_path: Path) -> None:
    run = acdc.discover(
        "ioi", model="planted-ioi", method="eap", n_edges=20, n_prompts=4, positions="span"
    )
    run.save(tmp_path / "run")
    found = gather(tmp_path / "run", tests=False, n_prompts=1).agreement
    assert found is not None
    assert found.reference.name == "planted-ioi"


def test_axes_hold_what_they_show() -> None:
    axis = Axis.around([-0.31, 1.27], "x")
    assert axis.low <= -0.31
    assert axis.high >= 1.27
    assert {0.0, 1.0} <= set(axis.ticks) <= {round(0.5 * i, 6) for i in range(-2, 5)}
    assert Axis.sizes(32491, "n").ticks == (1, 10, 100, 1000, 10000)
    assert Axis.sizes(1000, "n").share(10) == pytest.approx(1 / 3)
    assert "undefined" in ablations_plot([circuit_row(None)])
    assert "-9 (-10 to 40)" in ablations_plot([circuit_row(-9.0)])


def circuit_row(value: float | None) -> Any:
    from acdc.pages.evidence import Ablated

    return Ablated("zero", "noising", value, -10.0, 40.0)


def test_stability_is_shown_with_the_edges(page: str, report: Report, folder: Path) -> None:
    parsed = Page(page)
    stored = json.loads((folder / "stability.json").read_text())["edges"]
    for sender, _, receiver, _, _, n_kept in parsed.data["edges"]:
        assert n_kept == stored.get(f"{sender}->{receiver}", 0)
    assert parsed.data["n_runs"] == 2
    assert "share 80.0 % of their edges" in parsed.text
    assert "kept in 2 of 2 20 kept in 1 of 2 5 kept in 0 of 2 5" in parsed.text


def test_without_stability_the_page_says_how_to_get_it(report: Report) -> None:
    text = Page(to_html(replace(report, repeated=None))).text
    assert "acdc stability ioi --model ioi-small --method eap-ig" in text
    assert "--stability runs/stable/stability.json" in text
    of_file = replace(report.settings, task="pairs.jsonl")
    text = Page(to_html(replace(report, repeated=None, settings=of_file))).text
    assert "repeats discovery over draws of a built-in task’s prompts" in text


# --- references ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(circuit: Circuit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a reference of ten edges: eight of the circuit, two others."""
    names = circuit.edges()[::4] + circuit.graph.edge_names(np.flatnonzero(~circuit.in_circuit)[:2])
    true = Reference(
        "mine", "a made-up circuit", "ioi-small", "ioi", "me, 2026", "nothing",
        circuit.graph, tuple(names),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("reference") / "mine.json"
    write_reference(true, path)
    return path


def test_a_reference_gives_counts_and_a_curve(
    folder: Path, reference: Path, circuit: Circuit
) -> None:
    found = gather(folder, reference=str(reference), tests=False, n_prompts=1)
    agreement = found.agreement
    assert agreement is not None
    assert (agreement.n_true, agreement.n_items) == (10, circuit.graph.n_edges)
    truth = circuit.graph.edge_mask(read_reference(reference).edges)
    assert agreement.roc is not None
    assert agreement.roc.area == pytest.approx(auroc(truth, np.abs(circuit.scores)))
    n_false = circuit.graph.n_edges - 10
    assert agreement.point == pytest.approx((22 / n_false, 8 / 10))
    parsed = Page(to_html(found))
    assert "edges 8 22 2 0.267 0.800 0.400" in parsed.text
    assert f"AUROC {agreement.roc.area:.3f}" in parsed.text
    assert "me, 2026" in parsed.text


def test_the_model_s_own_reference_is_found(
    folder: Path, reference: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert report.agreement is None
    assert "No circuit is known" in to_html(report)
    known = {"mine": reference}
    for module in (contents_module, references_module):
        monkeypatch.setattr(module, "REFERENCES", known)
    found = gather(folder, tests=False, n_prompts=1).agreement
    assert found is not None
    assert found.reference.name == "mine"
    known["twin"] = reference  # two that fit: neither is taken
    assert gather(folder, tests=False, n_prompts=1).agreement is None


def test_a_reference_of_another_graph_is_refused(folder: Path) -> None:
    with pytest.raises(GraphError, match="reference 'ioi' is of another graph"):
        gather(folder, reference="ioi")


# --- the page -----------------------------------------------------------------------------


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    parsed = Page(page)
    assert all(link.startswith("#") for link in parsed.fetched)
    assert parsed.handlers == []
    assert not {"img", "link", "iframe", "object", "embed"} & set(parsed.tags)
    assert parsed.tags.count("script") == 2
    check_policy(page)
    addresses = set(re.findall(r"https?://[^\"' )]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert "@import" not in page
    assert "url(" not in page
    assert len(page) < 2_000_000


def test_style_and_script_are_packaged() -> None:
    root = Path(__file__).parents[1]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())
    data = patterns["tool"]["setuptools"]["package-data"]["acdc"]
    found = {path for pattern in data for path in (root / "acdc").glob(pattern)}
    folder = root / "acdc" / "pages"
    assert {p for p in folder.rglob("*") if p.suffix in (".css", ".js", ".html")} <= found


@pytest.fixture(scope="module")
def spoiled(report: Report, head: str) -> Report:
    """Return the report with names, prompts, verdicts and a node that try to get out of place."""
    evidence = report.evidence
    assert evidence is not None
    assert evidence.tests is not None
    assert report.repeated is not None
    verdicts = tuple(replace(v, says=EVIL, unit=EVIL) for v in evidence.tests.verdicts)
    effects = tuple(replace(e, edge=EVIL) for e in evidence.tests.effects)
    rows = tuple(replace(a, intervention=EVIL, direction=EVIL) for a in evidence.ablations)
    tests = replace(evidence.tests, verdicts=verdicts, effects=effects)
    bad = replace(
        evidence, task=EVIL, model=EVIL, metric=EVIL, prompts=EVIL, tests=tests, ablations=rows
    )
    summary = report.summary | {
        "metric": EVIL,
        "task_info": {"corruption": EVIL},
        "versions": {EVIL: EVIL},
        "timings": {EVIL: 1.0},
    }
    settings = replace(report.settings, task=EVIL, model=EVIL, saes=EVIL, device=EVIL, dtype=EVIL)
    return replace(
        report, evidence=bad, summary=summary, view=spoiled_view(report, head), settings=settings,
        command=EVIL, folder=Path(EVIL), repeated=replace(report.repeated, method=EVIL),
    )  # fmt: skip


def spoiled_view(report: Report, head: str) -> CircuitView:
    """Return the circuit with a head of another name, and other tokens."""
    view = report.view
    data = json.loads(json.dumps(view.data).replace(head, json.dumps(EVIL)[1:-1]))
    data["nodes"][EVIL] |= {"about": EVIL, "tokens": [[EVIL, 0.5]]}
    for prompt in data["prompts"]:
        prompt["clean"][:4] = [EVIL, "\u2028", "</SCRIPT", "a&lt;b"]
        prompt["answers"] = [EVIL]
    pictures = tuple(
        replace(
            picture,
            name=EVIL,
            drawing=replace(picture.drawing, svg=picture.drawing.svg.replace(head, escape(EVIL))),
        )
        for picture in view.pictures
    )
    return replace(view, data=data, pictures=pictures)


def test_nothing_from_a_user_is_markup(spoiled: Report) -> None:
    text = to_html(spoiled)
    check_policy(text)
    parsed = Page(text)
    assert parsed.tags.count("script") == 2
    assert parsed.text.count("onerror=") > 20
    assert parsed.data["prompts"] == spoiled.view.data["prompts"]
    assert EVIL in parsed.data["nodes"]
    assert text.count("<!--") == 0


def test_the_data_survives_as_text(page: str, report: Report) -> None:
    assert Page(page).data == {**json.loads(json.dumps(report.view.data)), "n_runs": 2}


# --- a browser ----------------------------------------------------------------------------

_PROBE = """
const look = () => ({
  count: document.getElementById("count").textContent,
  lines: [...document.querySelectorAll(".picture:not([hidden]) .line:not(.gone)")].length,
  panel: document.getElementById("panel").innerText,
  cells: document.querySelectorAll("#panel svg.pattern .cell").length,
  shaded: document.querySelectorAll("#panel .prompt span").length,
  rows: document.querySelectorAll("#panel table.ends tr").length,
});
const slide = value => {
  const slider = document.getElementById("threshold");
  slider.value = value;
  slider.dispatchEvent(new Event("input"));
};
const click = name => [...document.querySelectorAll(".picture:not([hidden]) [data-node]")]
  .find(node => node.dataset.node === name)
  .dispatchEvent(new MouseEvent("click", { bubbles: true }));
const seen = { start: look() };
slide(document.getElementById("threshold").max);
seen.highest = look();
slide(0);
const widths = [...document.querySelectorAll("#panel table.ends i")]
  .map(bar => bar.getBoundingClientRect().width);
click(NODE);
seen.head = look();
const shades = [...document.querySelectorAll("#panel .prompt span")]
  .map(word => getComputedStyle(word).backgroundColor);
[...document.querySelectorAll("#panel button")].find(b => b.textContent === "corrupt").click();
seen.corrupt = look();
const other = document.getElementById("prompt");
other.value = 1;
other.dispatchEvent(new Event("change"));
seen.second = look();
document.querySelector("#panel .prompt span").click();
seen.asked = document.querySelector("#panel .prompt .asked").textContent;
click("logits");
seen.logits = look();
document.querySelectorAll("[data-picture]")[1].click();
seen.others = look();
const svg = document.querySelector(".picture:not([hidden]) svg");
const before = svg.getAttribute("viewBox");
document.getElementById("in").click();
seen.zoomed = svg.getAttribute("viewBox") !== before;
document.getElementById("fit").click();
seen.fitted = svg.getAttribute("viewBox") === before;
dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
seen.none = look();
seen.shades = new Set(shades).size;
seen.widths = new Set(widths).size;
"""


def probe(node: str) -> str:
    """What uses the page of a report, and clicks on a node."""
    return _PROBE.replace("NODE", json.dumps(node).replace("<", "\\u003c"))


@pytest.fixture(scope="module")
def head(report: Report) -> str:
    """Return a head of the circuit with edges in."""
    return next(edge[1] for edge in report.view.data["edges"] if edge[4] and "<" in edge[2])


@pytest.fixture(scope="module")
def seen(page: str, head: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return browse(page, probe(head), tmp_path_factory.mktemp("browser"))


def test_a_browser_has_nothing_to_complain_of(seen: dict[str, Any]) -> None:
    assert seen["consoles"] == []
    assert seen["said"] == []


def test_bars_and_shades_are_as_large_as_what_they_show(seen: dict[str, Any]) -> None:
    """The policy forbids style attributes: the script sets them otherwise."""
    assert seen["widths"] > 5
    assert seen["shades"] > 3


def test_the_slider_changes_which_edges_are_drawn(seen: dict[str, Any]) -> None:
    assert seen["start"]["count"] == "30 of 30 edges"
    assert seen["start"]["lines"] == 30
    assert seen["highest"]["count"] == "1 of 30 edges"
    assert seen["highest"]["lines"] == 1


def test_a_click_fills_the_panel(
    seen: dict[str, Any], head: str, report: Report, circuit: Circuit
) -> None:
    panel, data = seen["head"]["panel"], report.view.data
    touching = [e for e in data["edges"] if e[4] and head in (e[0], e[1])]
    assert panel.startswith(head)
    assert seen["head"]["rows"] == len(touching)
    n_in = sum(edge[1] == head for edge in touching)
    assert f"edges in ({n_in})" in panel
    assert f"edges out ({len(touching) - n_in})" in panel
    kept = next(edge for edge in touching if edge[5])
    assert f"{kept[5]}/2" in panel
    layer, number = data["nodes"][head]["head"].split(".")
    assert f"attention head {number} of layer {layer}" in panel
    why = dict(data["why"][f"{layer}.{number}"])
    assert {"attends", "because", "value reads", "logits"} <= why.keys()
    for heading, text in why.items():
        assert f"{heading}\n{text}" in panel
    for look, prompt, run in (("head", 0, 0), ("corrupt", 0, 1), ("second", 1, 1)):
        encoded = base64.b64decode(data["patterns"][f"{layer}.{number}"][prompt][run])
        assert seen[look]["cells"] == sum(value / 255 >= 0.004 for value in encoded)
        tokens = data["prompts"][prompt][("clean", "corrupt")[run]]
        assert seen[look]["shaded"] == len(tokens)
        assert (
            "".join(tokens).split()
            == seen[look]["panel"].split("corrupt\n")[-1].split("\nAnswer")[0].split()
        )
    assert seen["asked"] == data["prompts"][1]["corrupt"][0]


def test_the_rest_of_the_page_moves_too(seen: dict[str, Any], report: Report) -> None:
    into = sum(edge[4] and edge[1] == "logits" for edge in report.view.data["edges"])
    assert f"edges in ({into})" in seen["logits"]["panel"]
    assert seen["logits"]["cells"] == 0
    assert seen["others"]["count"] == "30 of 30 edges, 100 others"
    assert seen["others"]["lines"] == len(report.view.pictures[1].lines)
    assert seen["zoomed"]
    assert seen["fitted"]
    assert seen["none"]["panel"].startswith("Strongest edges")


def test_a_browser_shows_what_users_wrote_as_text(
    spoiled: Report, seen: dict[str, Any], tmp_path: Path
) -> None:
    """The page does all that it did, and runs nothing."""
    found = browse(to_html(spoiled), probe(EVIL), tmp_path)
    assert found["said"] == found["consoles"] == []
    assert found["ran"] is None
    assert found["head"]["panel"].count(EVIL) > 3
    for look in ("start", "highest", "head", "corrupt", "second", "logits", "others", "none"):
        for what in ("count", "lines", "cells", "shaded", "rows"):
            assert found[look][what] == seen[look][what], (look, what)


# --- latents, shared key-value heads ------------------------------------------------------


def test_latents_say_what_they_fire_on(tmp_path: Path) -> None:
    run = acdc.discover(
        "ioi", method="eap-ig", n_edges=60, n_prompts=4, steps=2,
        saes="bundled", max_latents=12,
    )  # fmt: skip
    run.save(tmp_path / "run")
    found = gather(tmp_path / "run", tests=False, n_prompts=1)
    nodes = found.view.data["nodes"]
    latents = [name for name in nodes if ".f" in name]
    assert latents
    for name in latents:
        shares = [share for _, share in nodes[name]["tokens"]]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1.01
        assert nodes[name]["reads"], "an SAE's latent is computed from its component"
    text = Page(to_html(found)).text
    assert "with all error nodes in" in text
    assert "acdc latents" in text


# --- bad input ----------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must end with one line and status 2; return the line."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("acdc: ")
    return captured.err


def test_the_command_writes_the_page_once(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    with pytest.raises(SystemExit) as stop:
        main(["report", str(run), "--prompts", "1"])
    assert stop.value.code == 0
    assert f"written to {run / 'report.html'}" in capsys.readouterr().out
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "It passes" in Page(text).text
    assert "exists" in refused(capsys, "report", run)
    assert (run / "report.html").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompts", 0), "prompts 0: expected at least 1"),
        (("--out", "page.txt"), "page 'page.txt': expected a name ending in .html"),
        (("--out", "nowhere/page.html"), "folder 'nowhere' does not exist"),
        (("--reference", "iio"), "unknown reference 'iio': did you mean ioi"),
        (("--evaluation", "none.json"), "cannot read none.json: No such file"),
        (("--stability", "none.json"), "cannot read none.json: No such file"),
        (("--evaluation", "none.json", "--no-tests"), "--evaluation with --no-tests"),
    ],
)
def test_bad_options(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    words: str,
) -> None:
    before = sorted(folder.iterdir())
    line = refused(capsys, "report", folder, *arguments)
    assert words in line
    assert sorted(folder.iterdir()) == before


def test_no_run_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refused(capsys, "report", tmp_path / "none")
    assert "run.json: no such file" in refused(capsys, "report", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("[1", "no JSON that can be read"),
        ("[]", "is not an evaluation: it is of type list; give what acdc evaluate RUN --out FILE"),
        ({"tests": None, "areas": None}, "'areas' is of type NoneType"),
        ({"n_edges_kept": 29}, "is of a circuit of 29 of 1,519 edges, the run's has 30 of 1,519"),
        ({"n_edges_kept": True}, "'n_edges_kept' is of type bool"),
        ({"n_prompts": math.nan}, "'n_prompts' is nan; give what acdc evaluate"),
        ({"n_prompts": math.inf}, "'n_prompts' is inf"),
        ({"tests": {"verdicts": [{"test": 3}]}}, "'test' is of type int"),
        ({"ablations": ["x"]}, "it is of type str"),
        ({"task": ...}, "'task' is missing"),
    ],
)
def test_files_that_are_no_evaluation(
    folder: Path, circuit: Circuit, tmp_path: Path, change: Any, words: str
) -> None:
    path = tmp_path / "evaluation.json"
    content = json.loads((folder / "evaluation.json").read_text())
    if isinstance(change, dict):
        content |= change
        change = json.dumps({key: value for key, value in content.items() if value is not ...})
    path.write_text(change)
    with pytest.raises(CircuitFileError, match=re.escape(words)):
        read_evidence(path, circuit)


def test_an_evaluation_of_another_circuit_is_refused(
    folder: Path, circuit: Circuit, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(circuit, in_circuit=np.roll(circuit.in_circuit, 1))
    with pytest.raises(CircuitFileError, match="is of another circuit of 30 edges"):
        read_evidence(folder / "evaluation.json", other)


def test_stability_of_another_task_is_refused(
    folder: Path, circuit: Circuit, tmp_path: Path
) -> None:
    settings, _, _ = read_run(folder)
    path = folder / "stability.json"
    assert read_repeated(path, settings, circuit).seeds == (0, 1)
    with pytest.raises(CircuitFileError, match=r"is of task 'ioi' in 'ioi-small' .*, the run of"):
        read_repeated(path, replace(settings, task="docstring"), circuit)
    content = json.loads(path.read_text())
    (tmp_path / "s.json").write_text(json.dumps({**content, "edges": {"a": "x"}}))
    with pytest.raises(CircuitFileError, match="'a' is of type str"):
        read_repeated(tmp_path / "s.json", settings, circuit)


def test_a_run_json_that_lacks_something_is_refused(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    summary = json.loads((other / "run.json").read_text())
    for change, words in (
        ({"timings": None}, "'timings' is of type NoneType"),
        ({"versions": {"torch": 2}}, "'torch' is of type int"),
        ({"faithfulness": "high"}, "'faithfulness' is of type str"),
        ({"latents": {}}, "'error_nodes' is missing; give what acdc discover writes"),
    ):
        (other / "run.json").write_text(json.dumps({**summary, **change}))
        with pytest.raises((CircuitFileError, OptionError), match=words):
            gather(other)


def test_a_report_measures_with_the_constants_of_the_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "eap", "n_edges": 40, "n_prompts": 4}
    folder = acdc.discover("ioi", intervention="mean", **options).save(tmp_path / "run")
    run = acdc.load_run(folder)
    wanted, anew = (
        evaluate(one, tests=False, n_resamples=10).summary()["ablations"][0]["faithfulness"]
        for one in (run, replace(run, constants=None))
    )
    report = gather(folder, tests=False, n_prompts=1)
    assert report.evidence is not None
    assert report.evidence.ablations[0].faithfulness == pytest.approx(wanted, abs=1e-6)
    assert wanted != pytest.approx(anew, abs=1e-3)


def test_a_sparsity_is_said(report: Report) -> None:
    settings = replace(
        report.settings, method="edge-pruning", n_edges=None, options={"sparsity": 0.95}
    )
    text = to_html(replace(report, settings=settings))
    assert "all but a share of 0.95 of the edges, by absolute score" in text


def test_a_run_whose_model_has_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "stability.json").unlink()
    summary = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(
        json.dumps({**summary, "metric_seen": {**summary["metric_seen"], "full": 3.0}})
    )
    with pytest.raises(OptionError, match="model or task have changed, find the circuit anew"):
        gather(other, tests=False)
    (other / "run.json").write_text(json.dumps({**summary, "model": "planted-ioi"}))
    with pytest.raises(OptionError, match="its circuit is of 4 layers and 8 heads"):
        gather(other, tests=False)
