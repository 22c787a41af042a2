"""``acdc heads`` names what heads compose with: on models whose weights are written by hand.

Two twins: in both a0.h0 writes the token before each position, and a1.h1 finds the earlier
occurrence of the last token.  In ``keys`` it finds it by the token before each key (induction: the
answer is what followed), so that its keys read a0.h0; in ``values`` by the token itself, and moves
what a0.h0 wrote there (the answer is what came before), so that its values read a0.h0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import quick
import torch
from safetensors.torch import save_file

import acdc
from acdc.cli import main
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import PatchedModel
from acdc.errors import OptionError, UnknownNameError
from acdc.evidence.head_reasons import Composition, HeadReasons, explain_heads
from acdc.measure.heads import towards
from acdc.measure.places import find_places
from acdc.measure.roles import HeadNumbers, measure_roles, roles_of
from acdc.models import BUNDLED, load_model
from acdc.tasks import load_task
from acdc.tasks.base import Pair, Task
from graphs import Circuit, component_graph

PLANTED = Path(__file__).resolve().parents[1] / "benchmarks" / "planted" / "models"
N_TOKENS, N_POS, LENGTH = 12, 18, 6
D_HEAD = N_TOKENS + N_POS
SHARP = 25 * D_HEAD**0.5  # scores are divided by the root
BLOCKS = {"token": N_TOKENS, "here": N_POS, "before": N_TOKENS, "said": N_TOKENS}
AT: dict[str, slice] = {}
for _name, _width in BLOCKS.items():
    _start = max((at.stop for at in AT.values()), default=0)
    AT[_name] = slice(_start, _start + _width)
CONFIG = {
    "n_layers": 2, "n_heads": 2, "d_model": sum(BLOCKS.values()), "d_head": D_HEAD, "d_mlp": None,
    "n_ctx": N_POS, "d_vocab": N_TOKENS, "attn_only": True, "normalization_type": None,
    "positional_embedding_type": "standard", "act_fn": "relu",
}  # fmt: skip


def write_twin(folder: Path, kind: str) -> None:
    """Write a model whose a1.h1 composes with a0.h0 by its keys or its values."""
    eye, axes = torch.eye(N_TOKENS), slice(0, N_TOKENS)
    state = {
        "embed.W_E": torch.zeros(N_TOKENS, CONFIG["d_model"]),
        "pos_embed.W_pos": torch.zeros(N_POS, CONFIG["d_model"]),
        "unembed.W_U": torch.zeros(CONFIG["d_model"], N_TOKENS),
        "unembed.b_U": torch.zeros(N_TOKENS),
    }
    state["embed.W_E"][:, AT["token"]] = eye
    state["pos_embed.W_pos"][:, AT["here"]] = torch.eye(N_POS)
    state["unembed.W_U"][AT["said"]] = 5 * eye
    for layer in range(2):
        for name in "QKV":
            state[f"blocks.{layer}.attn.W_{name}"] = torch.zeros(2, CONFIG["d_model"], D_HEAD)
            state[f"blocks.{layer}.attn.b_{name}"] = torch.zeros(2, D_HEAD)
        state[f"blocks.{layer}.attn.W_O"] = torch.zeros(2, D_HEAD, CONFIG["d_model"])
        state[f"blocks.{layer}.attn.b_O"] = torch.zeros(CONFIG["d_model"])
    first = {x: state[f"blocks.0.attn.W_{x}"][0] for x in "QKVO"}
    rows = torch.arange(1, N_POS)
    first["Q"][AT["here"].start + rows, rows] = SHARP
    first["K"][AT["here"].start + rows - 1, rows] = 1
    first["V"][AT["token"], axes] = eye
    first["O"][axes, AT["before"]] = eye
    last = {x: state[f"blocks.1.attn.W_{x}"][1] for x in "QKVO"}
    found_by, moved = ("before", "token") if kind == "keys" else ("token", "before")
    last["Q"][AT["token"], axes] = SHARP * eye
    last["K"][AT[found_by], axes] = eye
    if kind == "values":  # never itself
        last["Q"][AT["here"], N_TOKENS:] = -2 * SHARP * torch.eye(N_POS)
    last["K"][AT["here"], N_TOKENS:] = torch.eye(N_POS)
    last["V"][AT[moved], axes] = eye
    last["O"][axes, AT["said"]] = eye
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(state, folder / "model.safetensors")


def rows_of(kind: str, n: int = 24) -> list[dict[str, Any]]:
    """Different tokens, then one of them again; the corrupt prompt has all in another order."""
    rng = np.random.default_rng(0)
    step = 1 if kind == "keys" else -1
    found: list[dict[str, Any]] = []
    while len(found) < n:
        clean, corrupt = ((1 + rng.permutation(N_TOKENS - 1)[:LENGTH]).tolist() for _ in range(2))
        i, j = (1 + rng.integers(LENGTH - 2, size=2)).tolist()
        if clean[i + step] == corrupt[j + step]:
            continue
        found.append(
            {
                "clean": [*clean, clean[i]],
                "corrupt": [*corrupt, corrupt[j]],
                "answers": [clean[i + step]],
                "wrong_answers": [corrupt[j + step]],
                "spans": {"FIRST": [i], "NEXT": [i + 1], "END": [LENGTH]},
            }
        )
    return found


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a run on a twin, found once."""
    found: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in found:
            folder = tmp_path_factory.mktemp(kind)
            write_twin(folder / "model", kind)
            task = folder / "pairs.jsonl"
            task.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)))
            run = acdc.discover(
                str(task), model=str(folder / "model"), method="acdc", threshold=0.1, n_test=0,
                metric="logit_diff",
            )  # fmt: skip
            run.save(folder / "run")
            found[kind] = folder / "run"
        return found[kind]

    return get


@pytest.mark.parametrize(
    ("kind", "composes", "role"), [("keys", "K", "induction"), ("values", "V", "duplicate token")]
)
def test_twins_are_told_apart(kind: str, composes: str, role: str, twin: Any) -> None:
    """Keys in the one, values in the other; in both the match is of tokens, positions elsewhere."""
    found = acdc.heads(twin(kind))
    assert {one.head for one in found.heads} == {"a1.h1", "a0.h0"}
    late, early = found["a1.h1"], found["a0.h0"]
    (named,) = [x for x in late.composition if x.sender.startswith("a")]
    assert (named.kind, named.sender) == (composes, "a0.h0")
    assert named.share == pytest.approx(1, abs=0.02)
    assert late.at.query == "END"
    assert late.at.key == ("NEXT" if kind == "keys" else "FIRST")
    assert late.at.weight > 0.99
    assert late.split["match"] > 0.6  # the rest of ``values`` keeps it from itself
    assert late.roles == (role,)
    assert early.roles == ("previous token",)
    assert early.position == pytest.approx(1, abs=1e-4)
    assert early.pairs[0].query == early.pairs[0].key == "pos"
    (target,) = early.onward
    assert target.receiver == f"a1.h1<{composes.lower()}>"
    assert target.share == pytest.approx(1, abs=0.02)
    assert target.by[0].name == "tok"
    assert late.logits == pytest.approx(found.metric_value, rel=1e-4)  # nothing else writes
    assert late.logits_by[0].name == ("tok" if kind == "keys" else "a0.h0")


def test_direct_effects_are_those_of_ablation(twin: Any) -> None:
    """Without a norm what a head writes to the logits is lost with its edge, under zero."""
    run = acdc.load_run(twin("keys"))
    model, tokenizer = load_model(str(run.settings.model))
    task = load_task(run.settings.task, tokenizer, d_vocab=N_TOKENS, n_ctx=N_POS)
    experiment = Experiment(model, task, get_metric("logit_diff"), intervention="zero")
    reasons = {one.head: one for one in explain_heads(run.circuit, experiment)}
    patched = PatchedModel(experiment)
    for name, one in reasons.items():
        keep = ~experiment.graph.edge_mask([f"{name}->logits"])
        lost = experiment.plain("clean") - patched.values(keep).mean()
        assert one.logits == pytest.approx(lost, abs=1e-4)


# --- definitions ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["LN", "grouped rotary", "GPTNeo", "soft caps", "bidirectional"])
def test_contrasts_are_what_they_are_called(family: str) -> None:
    """Against loops over prompts, queries and keys, with the oracle's own scores."""
    model = oracle.small_model(family, 3)
    task = oracle.labelled(oracle.small_task(1, n_prompts=4), 2)
    experiment = Experiment(model, task, get_metric("logit_diff"))
    graph = component_graph(model.shape)
    whole = Circuit(graph, np.ones(graph.n_edges), np.ones(graph.n_edges, dtype=bool), {})
    for one in explain_heads(whole, experiment):
        contrast, score, weight = by_hand(model, task, one)
        assert one.contrast == pytest.approx(contrast, abs=1e-4)
        assert one.score == pytest.approx(score, abs=1e-4)
        assert one.at.weight == pytest.approx(weight, abs=1e-5)
        for side in (one.by_query, one.by_key):
            assert sum(part.value for part in side) == pytest.approx(contrast, abs=1e-4)


def by_hand(model: Any, task: Task, one: HeadReasons) -> tuple[float, float, float]:
    layer, head = (int(part[1:]) for part in one.head.split("."))
    attention = model.layers[layer].attention
    contrasts, scores, weights = [], [], []
    for pair in task.pairs:
        names = oracle.spans_of(pair, "span")
        if names[0] == "rest":
            names[0] = "p0"
        tokens = torch.tensor([pair.clean])
        trace = model.forward(tokens)
        x = model.layers[layer].ln1(trace.attention_in[layer])
        q = oracle.projected(attention, "q", head, x)
        k = oracle.projected(attention, "k", head // attention.group, x)
        raw = attention.scale * (q @ k.mT)[0]
        pattern = oracle.pattern(attention, q, k)[0]
        seen = oracle.visible(len(names), attention.causal, attention.window)
        for i, query in enumerate(names):
            if query != one.at.query:
                continue
            keys = [j for j, name in enumerate(names) if name == one.at.key and seen[i, j]]
            weights.append(float(pattern[i, keys].sum()))
            if keys:
                chosen = float((pattern[i, keys] * raw[i, keys]).sum() / pattern[i, keys].sum())
                scores.append(chosen)
                contrasts.append(chosen - float(raw[i][seen[i]].mean()))
    return float(np.mean(contrasts)), float(np.mean(scores)), float(np.mean(weights))


def test_parts_of_a_split_add_up() -> None:
    """Content x content is what is left; with nothing but positions there is none of it."""
    model = oracle.small_model("LN", 3)
    task = oracle.small_task(1, n_prompts=6, lengths=(5,))
    experiment = Experiment(model, task, get_metric("logit_diff"))
    graph = component_graph(model.shape)
    whole = Circuit(graph, np.ones(graph.n_edges), np.ones(graph.n_edges, dtype=bool), {})
    splits = [one.split for one in explain_heads(whole, experiment) if one.split]
    assert splits
    assert all(sum(split.values()) == pytest.approx(1) for split in splits)
    same = Task("same", tuple(replace(pair, clean=(3,) * 5) for pair in task.pairs))
    for one in explain_heads(whole, experiment.on(same)):  # tokens cannot matter
        if one.split:
            assert one.position == pytest.approx(1, abs=1e-3)


def test_places() -> None:
    pair = Pair((1, 2, 3), (1, 2, 4), spans={"A": (1,)})
    labelled = find_places(Task("t", (pair,)))
    assert labelled.names == ("p0", "rest", "A")
    assert labelled.of(pair).tolist() == [0, 2, 1]
    by_token = find_places(Task("t", (pair,)), "token")
    assert [by_token.names[i] for i in by_token.of(pair)] == ["p0", "p1", "p2"]
    longer = Pair((1, 2, 3, 4), (1, 2, 3, 5))
    from_end = find_places(Task("t", (replace(pair, spans={}), longer)))
    assert [from_end.names[i] for i in from_end.of(longer)] == ["end-3", "end-2", "end-1", "end"]
    with pytest.raises(OptionError, match="expected token or span"):
        find_places(Task("t", (pair,)), "word")


def test_flat_metrics_have_another_direction() -> None:
    model, task = oracle.small_model("LN", 3), oracle.small_task(1)
    assert towards(Experiment(model, task, get_metric("kl"))).name == "logit_diff"
    bare = Task("bare", tuple(Pair(pair.clean, pair.corrupt) for pair in task.pairs))
    first = towards(Experiment(model, bare, get_metric("kl")))
    assert first.name == "first_choice"
    logits = [
        model.unembed(model.forward(torch.tensor([p.clean])).final[0, -1]) for p in bare.pairs
    ]
    value = Experiment(model, bare, first).plain("clean")
    assert value == pytest.approx(np.mean([float(x.max() - x.mean()) for x in logits]), abs=1e-5)


# --- roles ----------------------------------------------------------------------------------


def test_roles_of_planted_heads() -> None:
    """The model whose every weight is set: attention and path patching agree with what was set."""
    folder = PLANTED / "planted-ioi-backup"
    nodes = json.loads((folder / "reference.json").read_text())["roles"]
    model, tokenizer = load_model(str(folder))
    task = load_task(
        str(folder / "pairs.jsonl"), tokenizer, d_vocab=model.d_vocab, n_ctx=model.n_ctx
    )
    experiment = Experiment(model, Task("ioi", task.pairs[:40]), get_metric("logit_diff"))
    numbers = measure_roles(experiment)
    roles = roles_of(numbers)
    for role in ("S-inhibition", "name mover"):
        assert roles[role] == nodes[role]
    layer, head = (int(part[1:]) for part in nodes["S-inhibition"][0].split("."))
    assert numbers.inhibition[layer][head] > 0.5


def test_the_bundled_model_has_the_roles_of_its_card() -> None:
    """On other prompts than the card's; and heads compose as Wang et al. describe it."""
    name = quick.SHIPPED["ioi"]
    model, tokenizer = load_model(name)
    sizes = {"d_vocab": model.d_vocab, "n_ctx": model.n_ctx}
    task = load_task("ioi", tokenizer, n_prompts=32, seed=7, **sizes)
    experiment = Experiment(model, task, get_metric("logit_diff"))
    roles = roles_of(measure_roles(experiment))
    card = json.loads((BUNDLED[name] / "card.json").read_text())["ioi"]["roles"]
    assert {role: bool(names) for role, names in roles.items()} == {
        role: bool(names) for role, names in card.items()
    }
    for role, names in card.items():  # those at the threshold may be on either side of it
        assert set(names[:2]) <= set(roles[role]), role
    graph = component_graph(model.shape)
    empty = Circuit(graph, np.zeros(graph.n_edges), np.zeros(graph.n_edges, dtype=bool), {})
    named = [*roles["name mover"], *roles["induction"]]
    found = {one.head: one for one in explain_heads(empty, experiment, named)}

    def reads(head: str, kind: str) -> set[str]:
        return {x.sender for x in found[head].composition if x.kind == kind}

    mover = found[roles["name mover"][0]]
    assert (mover.at.query, mover.at.key) == ("END", "IO")
    assert mover.logits > 0
    assert reads(mover.head, "Q") & set(roles["S-inhibition"])
    earlier = {head: reads(head, "K") & set(roles["previous token"]) for head in roles["induction"]}
    assert any(earlier.values())


def test_a_head_that_writes_against_the_answer_is_no_name_mover() -> None:
    """Not in a model that is wrong either, where all that it writes is for the other name."""
    model, tokenizer = load_model(quick.SHIPPED["ioi"])
    task = load_task("ioi", tokenizer, n_prompts=16, seed=7)
    right = measure_roles(Experiment(model, task, get_metric("logit_diff")))
    wrong_pairs = tuple(
        replace(pair, answers=pair.wrong_answers, wrong_answers=pair.answers) for pair in task.pairs
    )
    turned = replace(task, pairs=wrong_pairs)
    wrong = measure_roles(Experiment(model, turned, get_metric("logit_diff")))
    np.testing.assert_allclose(wrong.direct, -np.array(right.direct), rtol=1e-4, atol=1e-6)
    movers = roles_of(right)["name mover"]
    assert movers
    assert roles_of(wrong)["name mover"] == []
    assert set(movers) <= set(roles_of(wrong)["negative mover"])


def test_roles_need_what_they_are_measured_on() -> None:
    """Without labels no role of names; of a model that sees both ways nothing is said."""
    causal, both = (
        Experiment(oracle.small_model(family, 0), oracle.small_task(0), get_metric("kl"))
        for family in ("LN", "bidirectional")
    )
    assert measure_roles(causal).previous
    assert not measure_roles(causal).end_to_io
    assert not measure_roles(both).previous
    assert not any(roles_of(HeadNumbers()).values())


# --- command line ---------------------------------------------------------------------------


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def test_command(twin: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(twin("keys"))
    assert call("heads", run) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "K-composition with a0.h0 (100%)" in shown
    assert "previous token: a0.h0" in shown
    assert "from END" in shown
    out = tmp_path / "heads.json"
    assert call("heads", run, "--head", "a1.h1", "--json", "--out", str(out)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    (head,) = printed["heads"]
    assert head["head"] == "a1.h1"
    assert Composition(**head["composition"][0]) == Composition(
        "K", "a0.h0", head["composition"][0]["share"]
    )


def test_one_prompt(twin: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The mean over prompts is that of the prompts one by one; places can be asked for."""
    at, names = ("END", "FIRST"), ["a1.h1"]
    whole = acdc.heads(twin("keys"), names, at=at)
    each = [acdc.heads(twin("keys"), names, at=at, prompt=i) for i in range(whole.n_prompts)]
    for field in ("contrast", "score", "logits"):
        mean = np.mean([getattr(one["a1.h1"], field) for one in each])
        assert getattr(whole["a1.h1"], field) == pytest.approx(mean, abs=1e-4)
    assert (whole["a1.h1"].at.query, whole["a1.h1"].at.key) == at
    arguments = ("--prompt", "1", "--by", "token", "--query", "p6", "--key", "p0")
    assert call("heads", str(twin("keys")), "--head", "a1.h1", *arguments) == 0
    shown = capsys.readouterr().out
    assert f"p6:{each[1].tokens[6].strip()}" in shown
    assert "from p6" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--head", "a1.h7"], "unknown head 'a1.h7'"),
        (["--head", "m0"], "unknown head 'm0'"),
        (["--by", "word"], "expected token or span"),
        (["--max-heads", "0"], "max_heads"),
        (["--query", "END"], "--query and --key go together"),
        (["--query", "END", "--key", "IO"], "unknown place 'IO'"),
        (["--query", "FIRST", "--key", "END"], "no query at FIRST sees a key at END"),
        (["--prompt", "99"], "prompt 99: there are"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], words: str, twin: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("heads", str(twin("keys")), *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("acdc: ")
    assert words in error


def test_a_head_that_was_not_explained(twin: Any) -> None:
    found = acdc.heads(twin("keys"), ["a1.h0"])
    assert [one.head for one in found.heads] == ["a1.h0"]
    assert not found["a1.h0"].in_circuit
    assert not found["a1.h0"].composition
    with pytest.raises(UnknownNameError, match=r"explained head 'a0\.h1'"):
        found["a0.h1"]
