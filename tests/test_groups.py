"""More than one mechanism: prompts in groups, a circuit for each, and whether groups differ."""

from __future__ import annotations

import json
import re
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.special import comb
from scipy.stats import rankdata

import acdc
from acdc.errors import OptionError
from acdc.evidence.groups import Cross, Groups, choose_groups
from acdc.methods import METHODS
from acdc.runs.building import build_experiment
from acdc.runs.checks import check_discovery
from acdc.settings import Settings
from acdc.tasks.files import read_pairs, write_pairs
from benchmarks.compiled import MODELS
from graphs import Circuit

NAMES = ("tracr-sort", "tracr-xproportion")
N_ROWS = 24
"""Of each program."""

Array = NDArray[np.float64]


# --- a model that does two tasks ----------------------------------------------------------


def direct_sum(folder: Path, names: tuple[str, str]) -> None:
    """Write a model that is two compiled ones side by side, in dimensions of their own."""
    configs = [json.loads((MODELS[name] / "config.json").read_text()) for name in names]
    weights = [load_file(MODELS[name] / "model.safetensors") for name in names]
    n_layers, d_head = (max(config[key] for config in configs) for key in ("n_layers", "d_head"))
    whole = {"n_layers": n_layers, "d_head": d_head, "n_ctx": min(c["n_ctx"] for c in configs)}
    for key in ("n_heads", "d_model", "d_mlp", "d_vocab", "d_vocab_out"):
        whole[key] = sum(config[key] for config in configs)

    def blocks(name: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
        """The two arrays one after the other along some axes, zero elsewhere."""
        found, start = np.zeros(shape, dtype=np.float32), [0] * len(shape)
        for config, own in zip(configs, weights, strict=True):
            if name in own:
                part = own[name]
                if re.search(r"attn\.[Wb]_Q", name):  # the scale of scores is that of d_head
                    part = part * np.float32(sqrt(d_head / config["d_head"]))
                cut = [slice(at, at + n) for at, n in zip(start, part.shape, strict=True)]
                found[tuple(cut)] = part
            for axis, key in zip(axes, sizes[name.rsplit(".", 1)[-1]], strict=True):
                start[axis] += config[key]
        return found

    heads, width, inner = whole["n_heads"], whole["d_model"], whole["d_mlp"]
    sizes = {
        "W_E": ("d_vocab", "d_model"), "W_pos": ("d_model",), "W_U": ("d_model", "d_vocab_out"),
        **dict.fromkeys(("W_Q", "W_K", "W_V"), ("n_heads", "d_model")),
        **dict.fromkeys(("b_Q", "b_K", "b_V"), ("n_heads",)),
        "W_O": ("n_heads", "d_model"), "b_O": ("d_model",), "W_in": ("d_model", "d_mlp"),
        "W_out": ("d_mlp", "d_model"), "b_in": ("d_mlp",), "b_out": ("d_model",),
    }  # fmt: skip
    found = {
        "embed.W_E": blocks("embed.W_E", (whole["d_vocab"], width), (0, 1)),
        "pos_embed.W_pos": blocks("pos_embed.W_pos", (whole["n_ctx"], width), (1,)),
        "unembed.W_U": blocks("unembed.W_U", (width, whole["d_vocab_out"]), (0, 1)),
    }
    for layer in range(n_layers):
        attn, mlp = f"blocks.{layer}.attn", f"blocks.{layer}.mlp"
        for kind in "QKV":
            found[f"{attn}.W_{kind}"] = blocks(f"{attn}.W_{kind}", (heads, width, d_head), (0, 1))
            found[f"{attn}.b_{kind}"] = blocks(f"{attn}.b_{kind}", (heads, d_head), (0,))
        found[f"{attn}.W_O"] = blocks(f"{attn}.W_O", (heads, d_head, width), (0, 2))
        found[f"{attn}.b_O"] = blocks(f"{attn}.b_O", (width,), (0,))
        found[f"{mlp}.W_in"] = blocks(f"{mlp}.W_in", (width, inner), (0, 1))
        found[f"{mlp}.W_out"] = blocks(f"{mlp}.W_out", (inner, width), (0, 1))
        found[f"{mlp}.b_in"] = blocks(f"{mlp}.b_in", (inner,), (0,))
        found[f"{mlp}.b_out"] = blocks(f"{mlp}.b_out", (width,), (0,))
    folder.mkdir()
    save_file(found, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(configs[0] | whole))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model that sorts and that counts shares, and a file with prompts of both in turn."""
    folder = tmp_path_factory.mktemp("mixed")
    direct_sum(folder / "model", NAMES)
    rows, offset = [], 0
    for name in NAMES:
        own = [json.loads(line) for line in (MODELS[name] / "pairs.jsonl").open()]
        drawn = np.random.default_rng(0).choice(len(own), N_ROWS, replace=False)
        rows.append([
            {
                "clean": [token + offset for token in own[i]["clean"]],
                "corrupt": [token + offset for token in own[i]["corrupt"]],
                "scored": own[i]["scored"],
            }
            for i in drawn
        ])  # fmt: skip
        offset += json.loads((MODELS[name] / "config.json").read_text())["d_vocab"]
    lines = [json.dumps(row) for both in zip(*rows, strict=True) for row in both]
    (folder / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "model"), str(folder / "mixed.jsonl")


EXACT = {"metric": "mse", "method": "exact", "profile": "exact", "holdout": 0.6}
"""Attention of compiled models is saturated: gradients see little."""


@pytest.fixture(scope="module")
def found(mixed: tuple[str, str]) -> Groups:
    model, file = mixed
    return acdc.groups(file, model=model, **EXACT)


def adjusted_rand(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Adjusted Rand index (Hubert & Arabie 1985)."""
    table = np.array([[((one == a) & (other == b)).sum() for b in set(other)] for a in set(one)])
    both, rows, columns = (comb(x, 2).sum() for x in (table, table.sum(1), table.sum(0)))
    expected = rows * columns / comb(len(one), 2)
    return float((both - expected) / ((rows + columns) / 2 - expected))


def auroc(circuit: Circuit, truth: set[str]) -> float:
    """Of the absolute scores of edges (Mann and Whitney)."""
    graph = circuit.graph
    true = np.array([graph.edge_name(edge) in truth for edge in range(graph.n_edges)])
    assert true.sum() == len(truth)
    ranks = rankdata(np.abs(circuit.scores))
    n, n_false = true.sum(), (~true).sum()
    return float((ranks[true].sum() - n * (n + 1) / 2) / (n * n_false))


def wired(name: str) -> set[str]:
    """Edges that a program's compiler has made, under resample ablation."""
    return set(json.loads((MODELS[name] / "reference-resample.json").read_text())["edges"])


def is_second(task: Any, offset: int = 6) -> NDArray[np.bool_]:
    return np.array([min(pair.clean) >= offset for pair in task.pairs])


def test_two_tasks_in_one_file_are_told_apart(found: Groups) -> None:
    assert len(found.groups) == 2
    fit = acdc.runs.building.build_experiment(found.settings).task
    truth = is_second(fit)
    assert 5 < truth.sum() < len(truth) - 5
    said = found.labels >= 0  # nothing happens on a prompt whose answer is what zeros give, too
    assert said.mean() > 0.9
    assert adjusted_rand(found.labels[said], truth[said]) >= 0.9
    assert any("are in no group" in says for says in found.warnings) is not said.all()
    assert found.silhouettes[2] == max(found.silhouettes.values()) > 0.25


def test_each_group_has_the_circuit_of_its_task(found: Groups) -> None:
    """Edge AUROC against what was wired, and the mixture's circuit beside it."""
    seconds = [is_second(group.fit).mean() for group in found.groups]
    assert sorted(seconds) == [0, 1]
    for group, second in zip(found.groups, seconds, strict=True):
        truth = wired(NAMES[int(second)])
        if second:
            truth = {re.sub(r"(a\d)\.h0", r"\1.h1", edge) for edge in truth}
        assert auroc(group.circuit, truth) >= 0.95
        assert group.claim.faithfulness is not None
        assert abs(group.claim.faithfulness - 1) < 0.15


def test_the_circuit_of_one_group_fails_on_the_other(found: Groups) -> None:
    assert found.differ(0, 1)
    assert [cross.fails for cross in found.crosses] == [True, True]
    for cross in found.crosses:
        assert cross.loss is not None
        assert cross.low is not None
        assert cross.high is not None
        assert cross.loss > 0.1
        assert 0 < cross.low <= cross.loss + 1e-9 <= cross.high + 2e-9


def test_one_task_is_one_group() -> None:
    """Forced into two groups, circuits of one mechanism do not fail on each other's prompts."""
    few: dict[str, Any] = {"n_prompts": 48, "n_test": 160, "method": "eap-ig", "n_edges": 150}
    found = acdc.groups("ioi", 2, **few)
    assert len(found.groups) == 2
    assert found.differ(0, 1) is False
    assert [cross.fails for cross in found.crosses] == [False, False]


def test_of_few_fresh_prompts_nothing_is_said() -> None:
    few: dict[str, Any] = {"n_prompts": 16, "n_test": 9, "method": "eap", "n_edges": 150}
    found = acdc.groups("ioi", 2, **few)
    assert [cross.fails for cross in found.crosses] == [None, None]
    assert found.differ(0, 1) is None
    assert sum("no circuit is said to fail there" in says for says in found.warnings) == 2


@pytest.mark.parametrize(
    ("own", "there", "fails"), [(1.0, 3.0, True), (1.4, 1.0, False), (1.0, 0.5, True)]
)
def test_a_circuit_that_overshoots_fails_too(own: float, there: float, fails: bool) -> None:
    loss = abs(there - 1) - abs(own - 1)
    assert Cross(0, 1, there, loss, loss - 0.01, loss + 0.01, 20).fails is fails
    assert Cross(0, 1, there, loss, loss - 0.01, loss + 0.01, 9).fails is None
    assert Cross(0, 1, None).fails is None


# --- choosing groups ----------------------------------------------------------------------


def clouds(n_clouds: int, spread: float, n: int = 20, n_edges: int = 50) -> Array:
    rng = np.random.default_rng(n_clouds)
    centres = rng.normal(size=(n_clouds, n_edges))
    points = np.repeat(centres, n, axis=0) + spread * rng.normal(size=(n_clouds * n, n_edges))
    scaled: Array = points * rng.uniform(0.1, 10, size=(len(points), 1))  # only directions count
    return scaled


@pytest.mark.parametrize("n_clouds", [2, 3, 5])
def test_the_number_of_groups(n_clouds: int) -> None:
    labels, values = choose_groups(clouds(n_clouds, 0.4))
    assert adjusted_rand(labels, np.repeat(np.arange(n_clouds), 20)) == 1
    assert max(values, key=lambda k: values[k]) == n_clouds


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_one_group(seed: int) -> None:
    labels, values = choose_groups(np.random.default_rng(seed).normal(size=(60, 50)))
    assert not labels.any()
    assert max(values.values()) < 0.25


def test_larger_groups_come_first_and_sizes_can_be_asked_for() -> None:
    points = clouds(2, 0.3)[8:]
    labels, _ = choose_groups(points)
    assert labels.tolist() == [1] * 12 + [0] * 20
    assert len(set(choose_groups(points, 3)[0])) == 3
    assert not choose_groups(points, 1)[0].any()
    with pytest.raises(OptionError, match="33 groups of 32 prompts"):
        choose_groups(points, 33)
    with pytest.raises(OptionError, match="3 groups: the prompts have 2 different profiles"):
        choose_groups(np.repeat(points[[0, -1]], 4, axis=0), 3)


# --- scores by prompt, and the rest -------------------------------------------------------


@pytest.mark.parametrize("method", ["eap", "eap-ig", "gim"])
def test_scores_by_prompt_add_up(method: str) -> None:
    few = {"n_prompts": 6, "n_test": 0, "n_edges": 60}
    experiment = build_experiment(check_discovery(Settings.of("docstring", **few)))
    by_prompt = METHODS[method].scores_by_prompt(experiment)
    assert by_prompt.shape == (6, experiment.graph.n_edges)
    whole = METHODS[method].scores(experiment)
    assert np.allclose(by_prompt.mean(0), whole, atol=1e-5 * np.abs(whole).max())


def test_pairs_are_written_and_read(tmp_path: Path) -> None:
    pairs = build_experiment(check_discovery(Settings.of("ioi", n_prompts=5))).task.pairs
    write_pairs(tmp_path / "some.jsonl", pairs)
    assert read_pairs(tmp_path / "some.jsonl", None) == list(pairs)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from acdc.cli import main

    def call(*words: object) -> int:
        with pytest.raises(SystemExit) as stop:
            main(["groups", "ioi", "--n-prompts", "12", *map(str, words)])
        return int(stop.value.code or 0)

    few = ("--n-test", 12, "--groups", 2, "--method", "eap", "--edges", 40)
    assert call(*few, "--out", tmp_path / "groups") == 0
    said = capsys.readouterr().out
    assert "every circuit on the other groups" in said
    names = {path.name for path in (tmp_path / "groups").iterdir()}
    assert names == {"groups.json"} | {
        f"{name}-{k}.{kind}"
        for k in (0, 1)
        for name, kind in (
            ("prompts", "jsonl"), ("circuit", "json"), ("circuit", "svg"), ("circuit", "png")
        )
    }  # fmt: skip
    summary = json.loads((tmp_path / "groups" / "groups.json").read_text())
    assert sum(group["n_fit"] for group in summary["groups"]) == len(summary["labels"]) == 12
    assert len(summary["crosses"]) == 2
    for words, says in (
        (("--profile", "acdc"), "profile 'acdc' gives no scores"),
        (("--profile", "nope"), "nope"),
        (("--groups", 13, "--n-test", 0), "13 groups of 12 prompts"),
    ):
        assert call(*words, "--out", tmp_path / "no") == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "no").exists()
