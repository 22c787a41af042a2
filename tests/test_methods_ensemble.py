"""Ensembles: scores on one scale, members as asked for, and what cannot be one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_attribution import build

from acdc.cli import main
from acdc.engine.experiment import Experiment
from acdc.engine.work import Work
from acdc.errors import OptionError, UnknownNameError
from acdc.methods import METHODS
from acdc.methods.eap import Integration, eap_ig
from acdc.methods.ensemble import Options, combine, ensemble
from acdc.methods.gim import gim
from acdc.methods.masks import EdgeTraining, edge_pruning, ranks
from acdc.methods.relp import relp


def test_the_mean_of_scores_over_their_size() -> None:
    experiment, _ = build("LN", 1)
    parts = [eap_ig(experiment), gim(experiment), relp(experiment)]
    wanted = np.mean([x / np.sqrt((x**2).mean()) for x in parts], axis=0)
    found = ensemble(experiment, Options("eap-ig,gim,relp"))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_the_mean_of_ranks_by_hand() -> None:
    scores = [np.array([4.0, -3.0, 0.0, 1.0]), np.array([-0.1, -0.2, 0.3, 0.3])]
    found = combine(scores, [True, True], "ranks")
    np.testing.assert_allclose(found, np.array([4 - 1, -3 - 2, 0 + 3.5, 2 + 3.5]) / 4 / 2)


@pytest.mark.parametrize("how", ["mean", "ranks"])
def test_scores_without_a_sign_add_to_the_size_alone(how: str) -> None:
    rng = np.random.default_rng(0)
    signed, size = rng.normal(size=50), rng.random(50)
    found = combine([signed, size], [True, False], how)
    np.testing.assert_array_equal(np.sign(found), np.sign(signed))
    both = combine([np.abs(signed), size], [True, True], how)
    np.testing.assert_allclose(np.abs(found), both)


def test_scale_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    parts = [rng.normal(size=30) for _ in range(3)]
    for how in ("mean", "ranks"):
        scaled = [100.0 * parts[0], 1e-3 * parts[1], parts[2]]
        np.testing.assert_allclose(
            combine(scaled, [True] * 3, how), combine(parts, [True] * 3, how), rtol=1e-12
        )


def test_a_circuit_of_members_over_edges_and_nodes() -> None:
    experiment, _ = build("LN", 2)
    counted: list[int] = []
    asked = {"of": "eap-ig,nap,edge-pruning", "n_edges": 15}
    method = METHODS["ensemble"]
    found = method.find(experiment, Work(progress=counted.append), **asked)
    assert sum(counted) == method.n_units(experiment, **asked)
    assert 0 < found.circuit.n_edges <= 15
    assert (found.circuit.scores < 0).any()


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ("eap-ig", "at least two methods, each once"),
        ("", "at least two methods, each once"),
        ("gim,gim", "at least two methods, each once"),
        ("eap-ig,acdc", "'acdc' has no scores to combine; leave it out"),
        ("eap-ig,ensemble", "'ensemble' is the ensemble itself; leave it out"),
        ("ifr,hisp", "none of these has scores with a sign"),
    ],
)
def test_what_cannot_be_combined(of: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options(of)


def test_an_unknown_member_and_one_that_sees_nothing() -> None:
    with pytest.raises(UnknownNameError, match="gimm"):
        Options("eap,gimm")
    flat, _ = build("no norm", metric="kl")
    with pytest.raises(OptionError, match="relp gives every edge score 0 under metric 'kl'"):
        ensemble(_same_prompts(flat), Options("relp,nap"))


def _same_prompts(experiment: Experiment) -> Experiment:
    pairs = tuple(replace(pair, corrupt=pair.clean) for pair in experiment.task.pairs)
    return replace(experiment, task=replace(experiment.task, pairs=pairs))


def test_one_line_and_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["discover", "ioi", "--method", "ensemble", "--of", "eap,acdc",
              "--out", str(tmp_path / "run")])  # fmt: skip
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("acdc: of 'eap,acdc': 'acdc' has no scores")
    assert not (tmp_path / "run").exists()


# --- in sequence --------------------------------------------------------------------------


def test_masks_start_by_the_rank_of_scores() -> None:
    scores = np.array([0.1, -3.0, 0.0, 2.0])
    np.testing.assert_allclose(ranks(scores), np.log([3 / 5, 7, 1 / 7, 5 / 3]), rtol=1e-6)


def test_a_warm_start_is_where_training_starts() -> None:
    """With no time to learn, the ranking is that of the scores; with some, it is another."""
    experiment, _ = build("LN", 3)
    scores = eap_ig(experiment, Integration())
    cold, warm = (
        METHODS["edge-pruning"].scores(experiment, EdgeTraining(mask_steps=1, warm_start=start))
        for start in ("none", "eap-ig")
    )
    assert np.ptp(cold) < 1e-6
    np.testing.assert_array_equal(np.argsort(warm), np.argsort(np.abs(scores)))
    later = edge_pruning(experiment, EdgeTraining(mask_steps=60), warm=scores)
    assert (np.argsort(later) != np.argsort(np.abs(scores))).any()


def test_unknown_starts_are_refused() -> None:
    with pytest.raises(OptionError, match="expected one of none, eap-ig"):
        EdgeTraining(warm_start="gim")
