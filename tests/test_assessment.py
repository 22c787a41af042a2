"""`acdc evaluate` and `acdc stability`: what they say, on which prompts, and their mistakes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Call, read, snapshot

import acdc
from acdc.errors import OptionError, TaskError
from acdc.evidence.assessment import importance
from acdc.evidence.stability import Stability, stability
from acdc.measure.evaluation import Evaluator, interval, resampled_faithfulness
from acdc.runs.building import build_experiment
from acdc.runs.checks import check_settings
from acdc.runs.folder import read_run
from acdc.runs.unseen import PromptChoice
from acdc.settings import Settings
from acdc.tasks import load_task
from graphs import Circuit, GraphShape, component_graph, load_circuit, save_circuit
from graphs.sample import PathSampler

FAST = ["--n-random", 2, "--n-permutations", 20, "--n-knockouts", 2, "--n-resamples", 50]
FAST += ["--test-edges", 2]

# --- prompts ------------------------------------------------------------------------------

IOI = check_settings(Settings("ioi", n_prompts=12))


def prompts(settings: Settings, run: Settings | None, seen: bool = False) -> Any:
    return build_experiment(settings, PromptChoice(run, seen)).task


def test_a_built_in_task_gives_unseen_prompts() -> None:
    own = {pair.clean for pair in build_experiment(IOI).task.pairs}
    task = prompts(IOI, IOI)
    assert len(task) == 12
    assert not own & {pair.clean for pair in task.pairs}
    assert task.info["seen"] is False
    assert task.info["seed"] == 1
    assert task.info["prompts"] == "unseen by discovery (seed 1, not 0)"
    assert prompts(replace(IOI, seed=5), IOI).info["seed"] == 5


def test_prompts_of_discovery_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds that give the same prompts again are passed over, and too few seeds say so."""
    from acdc.runs import prompts as module

    def drawn(name: str, *loaded: Any, seed: int, **asked: Any) -> Any:
        task = load_task(name, *loaded, **asked, seed=0)
        return task if seed < 3 else replace(task, pairs=others)

    others = build_experiment(replace(IOI, seed=9)).task.pairs
    monkeypatch.setattr(module, "load_task", drawn)
    task = prompts(IOI, IOI)
    assert set(task.pairs) <= set(others)
    assert task.info["n_dropped"] >= 24
    monkeypatch.setattr(module, "_MOST_SEEDS", 2)
    with pytest.raises(TaskError, match=r"other seeds gave no prompt .* --seen"):
        prompts(IOI, IOI)


def test_the_other_choices_of_prompts() -> None:
    own = build_experiment(IOI).task.pairs
    seen = prompts(replace(IOI, seed=4), IOI, seen=True)
    assert (seen.pairs, seen.info["seen"]) == (own, True)
    alone = prompts(IOI, None)
    assert (alone.pairs, alone.info["seen"]) == (own, None)
    other = prompts(check_settings(Settings("pronoun", n_prompts=3)), IOI)
    assert (len(other), other.info["seen"]) == (3, False)


def test_discovery_leaves_a_quarter_of_a_file_to_evaluation(shared: Path) -> None:
    file = check_settings(Settings(str(shared / "ln2.jsonl"), model=str(shared / "ln2")))
    whole = build_experiment(replace(file, holdout=0.0)).task.pairs
    run = build_experiment(file).task
    assert (file.holdout, len(whole), len(run), run.info["n_held_out"]) == (0.25, 12, 9, 3)
    held = prompts(file, file)
    assert held.info["seen"] is False
    assert held.info["prompts"] == "rows of the file that discovery has not seen, 3 of 12"
    assert sorted(map(whole.index, (*run.pairs, *held.pairs))) == list(range(12))
    assert list(map(whole.index, run.pairs)) == sorted(map(whole.index, run.pairs))
    other = replace(file, seed=1)
    assert set(prompts(other, other).pairs) != set(held.pairs)
    assert prompts(other, file).pairs == held.pairs  # the seed of the run counts


def test_rows_that_were_not_asked_for_are_unseen_too(shared: Path) -> None:
    file = check_settings(
        Settings(str(shared / "ln2.jsonl"), model=str(shared / "ln2"), holdout=0.0)
    )
    rows = build_experiment(file).task.pairs
    few = replace(file, n_prompts=8)
    assert prompts(few, few).pairs == rows[8:]
    assert prompts(replace(few, n_prompts=2), few).pairs == rows[8:10]
    every = prompts(file, replace(file, n_prompts=len(rows)))
    assert (every.pairs, every.info["seen"]) == (rows, True)
    assert "whole file" in every.info["prompts"]


def test_a_repeated_row_is_not_unseen(shared: Path, tmp_path: Path) -> None:
    line = (shared / "ln2.jsonl").read_text().splitlines()[0]
    path = tmp_path / "repeated.jsonl"
    path.write_text(f"{line}\n" * 8)
    file = check_settings(Settings(str(path), model=str(shared / "ln2")))
    assert prompts(file, file).info["seen"] is True


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"holdout": 1.0}, "holdout 1.0: expected at least 0 and below 1"),
        ({"holdout": -0.1}, "holdout -0.1: expected at least 0 and below 1"),
        ({"n_prompts": 10}, "12 rows, 3 of them held out: ask for at most 9"),
        ({"task": "ioi", "holdout": 0.5}, "holdout 0.5: task 'ioi' draws new prompts"),
    ],
)
def test_mistakes_in_the_split(
    shared: Path,
    settings: dict[str, Any],
    words: str,
) -> None:
    asked = {"task": str(shared / "ln2.jsonl"), "model": str(shared / "ln2"), **settings}
    with pytest.raises(OptionError, match=words):
        build_experiment(check_settings(Settings(**asked)))


def test_stability_over_draws_of_a_file(shared: Path) -> None:
    found = stability(
        str(shared / "ln2.jsonl"), 3, model=str(shared / "ln2"), method="eap", n_edges=20
    )
    assert found.seeds == (0, 1, 2)
    assert len({mask.tobytes() for mask in found.masks}) > 1


# --- evaluate -----------------------------------------------------------------------------


def test_evaluate_says_it_all(shared: Path, place: Path, call: Call) -> None:
    answer = call("evaluate", "run", *FAST, "--out", "said.json")
    assert answer.status == 0, answer.err
    said, run = read(place / "said.json"), read(place / "run" / "run.json")
    assert said["seen"] is True
    assert said["metric_circuit"] == pytest.approx(run["metric_seen"]["circuit"], rel=1e-6)
    assert said["faithfulness_low"] <= said["faithfulness"] <= said["faithfulness_high"]
    kinds = [(row["direction"], row["intervention"]) for row in said["ablations"]]
    assert kinds[0] == ("noising", "resample")
    known = ("resample", "zero", "mean", "mean-positional")
    assert set(kinds) == {(d, i) for d in ("noising", "denoising") for i in known}
    assert len({round(row["faithfulness"], 6) for row in said["ablations"]}) == 8
    assert [(area["measure"], area["ranking"]) for area in said["areas"]] == [
        ("CPR", "signed"), ("CMD", "absolute")
    ]  # fmt: skip
    tests = said["tests"]["verdicts"]
    names = ["equivalence", "independence", "sufficiency", "necessity", "minimality"]
    assert [verdict["test"] for verdict in tests] == [*names, "completeness"]
    assert tests[0]["n"] == 12
    assert tests[2]["passed"] is None
    assert tests[2]["n"] == 2
    for words in (
        "95 % interval",
        "denoising",
        "CPR",
        "which used the whole file",
        "edges that do",
    ):
        assert words in " ".join(answer.out.split())
    assert said["timings"].keys() == {"load", "constants", "tests", "ablations", "curves"}


def test_evaluate_without_tests(place: Path, call: Call) -> None:
    answer = call("evaluate", "run", "--no-tests", "--n-resamples", 20, "--out", "said.json")
    assert answer.status == 0
    assert read(place / "said.json")["tests"] is None
    assert "equivalence" not in answer.out
    brief = call("evaluate", "run", "--brief")
    assert "those of discovery" in brief.out
    assert "as asked for" in call("evaluate", "run", "--brief", "--seed", 3).out
    assert brief.out.count("\n") < answer.out.count("\n")
    assert "prompts" not in brief.out.split("task")[0]


MISTAKES = {
    "--alpha 0": "alpha 0: expected a number above 0 and below 1",
    "--alpha 1": "alpha 1",
    "--epsilon 0.5": "epsilon 0.5: expected a number above 0 and below 0.5",
    "--quantile -1": "quantile -1",
    "--tolerance 0": "tolerance 0: expected a number above 0",
    "--n-random -3": "n_random -3: expected at least 1",
    "--n-permutations 0": "n_permutations 0",
    "--n-knockouts 1": "n_knockouts 1: expected at least 2",
    "--n-resamples 0": "n_resamples 0",
    "--test-edges 0": "n_edges 0",
    "--test-seed -1": "seed -1",
    "--seed 0": "seed 0 is that of discovery",
    "--brief --seen": "--brief with --seen",
    "--brief --per-prompt": "--brief with --per-prompt",
    "--brief --no-tests": "--brief with --no-tests",
    "--out run/run.json": "run.json' exists",
    "--out nowhere/said.json": "'nowhere' does not exist",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes_in_evaluate(place: Path, call: Call, options: str) -> None:
    refused(call, place, MISTAKES[options], "evaluate", "run", *options.split())


def refused(call: Call, place: Path, words: str, *arguments: object) -> None:
    before = snapshot(place)
    answer = call(*arguments)
    assert answer.status == 2
    assert answer.err.splitlines()[-1].startswith("acdc: ")
    assert words in answer.err.splitlines()[-1]
    assert snapshot(place) == before


def words_of(answer: Any) -> str:
    """What a table says, whichever way its lines are broken."""
    return " ".join(re.sub("[│┃]", " ", answer.out).split())


def kept(answer: Any, path: Path) -> dict[str, bool | None]:
    """Check that an evaluation was kept whole; return its verdicts."""
    assert answer.status == 0, answer.err
    said = read(path)
    assert len(said["ablations"]) == 8
    assert all("faithfulness" in row for row in said["ablations"])
    assert "tests at level" in answer.out
    for verdict in said["tests"]["verdicts"]:
        assert (verdict["passed"] is None) == verdict["says"].startswith("cannot tell: ")
    return {verdict["test"]: verdict["passed"] for verdict in said["tests"]["verdicts"]}


def test_an_empty_circuit_and_a_metric_without_gap(place: Path, call: Call) -> None:
    """What cannot be tested is a dash; what was measured is kept."""
    path = place / "run" / "circuit.json"
    whole = path.read_text()
    path.write_text(whole.replace('"in_graph": true', '"in_graph": false'))
    empty = kept(call("evaluate", "run", *FAST, "--out", "empty.json"), place / "empty.json")
    assert [test for test, passed in empty.items() if passed is not None] == ["equivalence"]
    path.write_text(whole.replace('"in_graph": false', '"in_graph": true'))
    every = kept(call("evaluate", "run", *FAST, "--out", "every.json"), place / "every.json")
    assert (every["equivalence"], every["sufficiency"]) == (True, None)
    path.write_text(whole)
    rows = [json.loads(line) for line in (place / "task.jsonl").read_text().splitlines()]
    flat = "".join(json.dumps(row | {"corrupt": row["clean"]}) + "\n" for row in rows)
    (place / "flat.jsonl").write_text(flat)
    options = ("evaluate", "run", "--task", "flat.jsonl", "--metric", "logit_diff", *FAST)
    answer = call(*options, "--out", "flat.json")
    flat = kept(answer, place / "flat.json")
    assert set(flat.values()) == {None}
    assert "cannot be told from the model" in words_of(answer)
    assert read(place / "flat.json")["tests"]["complement"] is None
    assert call("report", "run", "--evaluation", "flat.json").status == 0
    answer = call(*options, "--no-tests")
    assert answer.status == 0
    assert "faithfulness" in answer.out


@pytest.mark.parametrize(
    ("edges", "words"),
    [
        ("0.65", "outside, no choice of circuits"),
        ("1", "the only random circuit of its size is itself"),
        ("one", "no edge of it lies on a path"),
    ],
)
def test_a_circuit_split_by_positions_is_evaluated_whole(
    place: Path,
    call: Call,
    edges: str,
    words: str,
) -> None:
    """It counts edges that lie on a path: at most positions the last layer writes to nobody."""
    command = ("discover", "task.jsonl", "--model", "ln2", "--positions", "token", "--out", "split")
    assert call(*command, "--method", "eap", "--edges", 100, "--n-prompts", 2).status == 0
    circuit = load_circuit(place / "split" / "circuit.json")
    graph, on_path = circuit.graph, PathSampler(circuit.graph).on_path
    if edges == "one":
        mask = (
            np.arange(graph.n_edges) == np.flatnonzero(graph.edge_sender >= graph.shape.n_spans)[0]
        )
    else:
        n_edges = int(float(edges) * on_path.sum())
        mask = PathSampler(graph).circuit(n_edges, np.random.default_rng(0))
        assert n_edges <= (~mask).sum() or edges == "1"
    save_circuit(replace(circuit, in_circuit=mask), place / "split" / "circuit.json")
    answer = call("evaluate", "split", *FAST, "--out", "said.json")
    assert len(kept(answer, place / "said.json")) == 6
    assert words in words_of(answer)


def test_intervals_shrink_with_prompts() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (20, 2000):
        full, empty = rng.normal(3, 1, n), rng.normal(0, 1, n)
        values = (0.7 * full + 0.3 * empty + rng.normal(0, 0.5, n))[None]
        low, high = interval(resampled_faithfulness(values, full, empty, 400, 0))
        assert low[0] < (values.mean() - empty.mean()) / (full.mean() - empty.mean()) < high[0]
        widths.append(high[0] - low[0])
    assert widths[1] < widths[0] / 5


def test_signed_scores_rank_what_helps_first(shared: Path) -> None:
    """Whatever metric an evaluation uses, importance is that of the discovery's own metric."""
    settings, circuit, _ = read_run(shared / "eap-ig")
    experiment = build_experiment(check_settings(settings))
    helpful = circuit.in_circuit & (importance(experiment, circuit) > 0)
    evaluator = Evaluator(experiment)
    one = np.flatnonzero(helpful)[np.argmax(np.abs(circuit.scores[helpful]))]
    without = np.ones(len(helpful), dtype=bool)
    without[one] = False
    assert evaluator.values(without).mean() < evaluator.full  # logit_diff falls
    other = replace(experiment, metric=build_experiment(replace(settings, metric="kl")).metric)
    assert (importance(other, circuit) == importance(experiment, circuit)).all()


@pytest.mark.parametrize("method", ["acdc", "eap-acdc", "edge-pruning", "ifr"])
def test_scores_that_say_themselves_what_helps(method: str) -> None:
    experiment = build_experiment(IOI)
    scores = np.linspace(0, 1, experiment.graph.n_edges)
    circuit = Circuit(experiment.graph, scores, scores > 0.5, {"method": method})
    assert (importance(experiment, circuit) == scores).all()


# --- stability ----------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    graph = component_graph(GraphShape(1, 1))
    masks = np.zeros((4, graph.n_edges), dtype=bool)
    masks[:, 0] = masks[:2, 1] = masks[0, 2] = True
    found = Stability(Settings("ioi"), (0, 1, 2, 3), graph, masks, (1.0,) * 4, {})
    assert found.counts.tolist()[:4] == [4, 2, 1, 0]
    assert found.overlap == pytest.approx((2 / 3 + 2 * 1 / 3 + 2 * 1 / 2 + 1) / 6)
    assert found.summary()["n_edges_by_count"] == {"4": 1, "3": 0, "2": 1, "1": 1}
    assert found.circuit(0.5).in_circuit.tolist()[:3] == [True, True, False]
    assert found.circuit(1).n_edges == 1
    assert found.circuit(0.25).scores.tolist()[:3] == [1, 0.5, 0.25]
    with pytest.raises(OptionError, match="at_least 0"):
        found.circuit(0)


def test_stability(tmp_path: Path, call: Call) -> None:
    folder = tmp_path / "stable"
    options = ["--method", "eap", "--edges", 30, "--n-prompts", 4, "--seeds", 3, "--seed", 2]
    answer = call("stability", "ioi", *options, "--out", folder)
    assert answer.status == 0, answer.err
    said = read(folder / "stability.json")
    assert said["seeds"] == [2, 3, 4]
    circuits = [
        acdc.discover("ioi", method="eap", n_edges=30, n_prompts=4, seed=seed).circuit
        for seed in said["seeds"]
    ]
    for name, count in said["edges"].items():
        assert count == sum(name in circuit.edges() for circuit in circuits)
    assert sum(said["edges"].values()) == sum(run["n_edges_kept"] for run in said["runs"])
    stored: Circuit = load_circuit(folder / "circuit.json")
    kept = {name for name, count in said["edges"].items() if count >= 2}
    assert set(stored.edges()) == kept
    assert f"3 of 3 runs │ {said['n_edges_by_count']['3']:>5}" in answer.out
    assert (folder / "edges.csv").read_text().startswith("edge,n_kept,share\n")
    assert "share of 3 seeds" in (folder / "circuit.svg").read_text()


def test_mistakes_in_stability(place: Path, call: Call) -> None:
    for arguments, words in (
        ("ioi --seeds 1", "1 seeds: expected at least 2"),
        ("ioi --at-least 0", "at-least 0: expected a share"),
        ("task.jsonl --model ln2 --holdout 0", "same prompts for every seed"),
        ("iio", "did you mean ioi"),
        ("ioi --out run", "'run' exists and is not empty"),
    ):
        refused(call, place, words, "stability", *arguments.split())
    with pytest.raises(OptionError, match="0 seeds"):
        stability("ioi", 0)
