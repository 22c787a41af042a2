"""How many decisions are guessed together, and what is guessed."""

from __future__ import annotations

import numpy as np
import pytest

from acdc.engine.doubt import N_KINDS, Doubt, best_length

NO, YES = np.zeros(1, dtype=bool), np.ones(1, dtype=bool)


def test_kinds_are_by_share_of_tau_and_origin() -> None:
    doubt = Doubt()
    expected = np.array([-np.inf, -1e300, -3.0, 0.0, 0.9, 5.0, np.inf])
    told, measured = (doubt.kinds(expected, 1.0, np.full(7, origin)) for origin in (False, True))
    assert len({*told.tolist(), *measured.tolist()}) == 14
    assert (doubt.kinds(7 * expected, 7.0, np.zeros(7, dtype=bool)) == told).all()
    unsure, sure = doubt.kept_of(told), doubt.kept_of(measured)
    assert (sure[1:5] <= unsure[1:5]).all()  # what was measured here is believed more
    assert (sure[5:] > unsure[5:]).all()
    assert unsure[0] == pytest.approx(0.1)
    assert ((unsure > 0.5) == (expected >= 1)).all()


def test_at_tau_0_expectations_are_on_either_side() -> None:
    kinds = Doubt().kinds(np.array([-1.0, 0.0, 1.0]), 0.0, np.zeros(3, dtype=bool))
    kept = Doubt().kept_of(kinds)
    assert kept[0] < 0.5 < kept[1] == kept[2]


def test_doubt_follows_the_run() -> None:
    """Scores that are far too large are not believed for long; neighbours learn from each other."""
    doubt = Doubt()
    share = np.array([5.0, 10.0, 90.0, 0.9])
    kinds = doubt.kinds(share, 1.0, np.zeros(4, dtype=bool))
    before = doubt.kept_of(kinds)
    assert before[0] > 0.5
    for _ in range(50):
        doubt.learn(kinds[:1], NO)
        doubt.learn(kinds[2:3], YES)
    after = doubt.kept_of(kinds)
    assert after[0] < 0.1
    assert after[1] < before[1]
    assert after[2] > 0.9
    assert after[3] == before[3]  # tau lies between


def test_what_is_measured_is_told_apart_from_what_is_told() -> None:
    doubt = Doubt()
    told, measured = (doubt.kinds(np.array([5.0]), 1.0, origin) for origin in (NO, YES))
    before = doubt.kept_of(measured)
    for _ in range(50):
        doubt.learn(told, NO)
    assert doubt.kept_of(measured) == before
    assert len(doubt.n) == len(doubt.kept) == N_KINDS


@pytest.mark.parametrize("overhead", [0.5, 3.0, 40.0])
def test_no_other_length_decides_more_in_a_time(overhead: float) -> None:
    doubts = np.random.default_rng(0).uniform(0, 0.5, size=12)
    rates = []
    for n in range(1, 13):
        reached = [np.prod(1 - doubts[:i]) for i in range(n)]
        rates.append(sum(reached) / (overhead + n))
    assert best_length(doubts, overhead) == 1 + int(np.argmax(rates))
