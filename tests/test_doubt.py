"""How many decisions are guessed together."""

from __future__ import annotations

import numpy as np
import pytest

from acdc.engine.doubt import Doubt, best_length


def test_kinds_are_by_share_of_tau_and_origin() -> None:
    doubt = Doubt()
    cost = np.array([-np.inf, 0.9, 5.0, 0.9])
    kinds = doubt.kinds(cost, 1.0, np.array([False, False, False, True]))
    assert len(set(kinds.tolist())) == 4
    sure, unsure = doubt.of(kinds)[[2, 3]], doubt.of(doubt.kinds(cost, 1.0, np.ones(4, dtype=bool)))
    assert unsure[2] < sure[0]  # what was measured here is believed more
    assert (doubt.kinds(cost[:2], 0.0, np.zeros(2, dtype=bool)) == [0, 6]).all()


def test_doubt_follows_the_run() -> None:
    doubt, kinds = Doubt(), np.array([0, 0, 3])
    before = doubt.of(kinds)
    for _ in range(50):
        doubt.learn(kinds, wrong=True)
    after = doubt.of(kinds)
    assert after[0] < before[0] / 5
    assert after[2] > 0.9


@pytest.mark.parametrize("overhead", [0.5, 3.0, 40.0])
def test_no_other_length_decides_more_in_a_time(overhead: float) -> None:
    doubts = np.random.default_rng(0).uniform(0, 0.5, size=12)
    rates = []
    for n in range(1, 13):
        reached = [np.prod(1 - doubts[:i]) for i in range(n)]
        rates.append(sum(reached) / (overhead + n))
    assert best_length(doubts, overhead) == 1 + int(np.argmax(rates))
