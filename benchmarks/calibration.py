"""How often the tests of a circuit reject a hypothesis that is true, and one that is false.

A *scene* (:mod:`benchmarks.calibration_scenes`) is a circuit of which it is known, by construction,
whether a test's null hypothesis H0 is true.  It is put before the very function of
:mod:`acdc.evidence.verdicts` many times, each time with values, random circuits or knock-outs
drawn anew.  Where H0 is true, no more than a share alpha may reject it, and at the end of H0 (odds
of exactly 1/2 + epsilon, a circuit that surpasses exactly the quantile) a good test rejects not
much fewer; where it is false, the share is the test's power against that.

What rejection means depends on the test: for sufficiency and necessity that the circuit passes, for
the others that it fails.  Samples in which a test says that it cannot tell are counted apart.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table
from scipy import stats

from acdc.evidence.verdicts import TESTS
from benchmarks.calibration_scenes import SEED, Plan, Scene, drawn_scenes, model_scenes
from benchmarks.results import markdown_table, write_results
from benchmarks.subjects import bundled_experiment

__all__ = ["Row", "markdown", "measure", "run_table", "sample", "write"]

FORMAT = "acdc-bench-calibration"
VERSION = 1

REJECTS = {test: test in ("sufficiency", "necessity") for test in TESTS}
"""What ``passed`` says where H0 is rejected."""

_COLUMNS = (
    "test", "on", "what is true", "rejecting is", "rejected", "[95 %]", "theory", "alpha",
    "cannot tell",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What became of a scene.

    Parameters
    ----------
    test, subject, says, null, theory
        Of the scene.
    n, n_rejected, n_untold
        Samples, those in which H0 was rejected, and those of which nothing could be said.
    low, high
        95 % interval of the share rejected (Clopper and Pearson).
    alpha
        Level of the test.
    """

    test: str
    subject: str
    says: str
    null: bool
    n: int
    n_rejected: int
    n_untold: int
    low: float
    high: float
    alpha: float
    theory: float | None

    @property
    def share(self) -> float:
        """Of samples in which H0 was rejected."""
        return self.n_rejected / self.n

    @property
    def holds(self) -> bool:
        """Whether the interval reaches down to alpha, where rejecting is wrong."""
        return not self.null or self.low <= self.alpha


def measure(plan: Plan, device: str = "cpu") -> Iterator[Row]:
    """Sample every scene: those of drawn values first, then those of the bundled model."""
    yield from (sample(scene, plan) for scene in drawn_scenes(plan))
    experiment = bundled_experiment("ioi-small", "ioi", "logit_diff", device, plan.n_model_prompts)
    yield from (sample(scene, plan) for scene in model_scenes(experiment, plan))


def sample(scene: Scene, plan: Plan) -> Row:
    """Draw a scene as often as the plan says; the same seeds give the same row."""
    n = plan.n_slow if scene.test == "independence" else plan.n_samples
    key = zlib.crc32(f"{scene.test} {scene.subject} {scene.says}".encode())
    found = []
    for i in range(n):
        rng = np.random.default_rng([SEED, key, i])
        verdict = scene.draw(rng, replace(scene.trials, seed=int(rng.integers(1 << 31))))
        found.append(verdict.passed)
    n_rejected = found.count(REJECTS[scene.test])
    low, high = binomial_interval(n_rejected, n)
    return Row(
        scene.test,
        scene.subject,
        scene.says,
        scene.null,
        n,
        n_rejected,
        found.count(None),
        low,
        high,
        scene.trials.alpha,
        scene.theory,
    )


def binomial_interval(k: int, n: int) -> tuple[float, float]:
    """95 % interval of Clopper and Pearson for a probability, k of n having come true."""
    interval = stats.binomtest(k, n).proportion_ci(0.95, method="exact")
    return float(interval.low), float(interval.high)


# --- what is written ----------------------------------------------------------------------


def run_table(rows: Sequence[Row]) -> Table:
    """Return the table of the terminal."""
    table = Table(title="how often the tests of a circuit reject H0", title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in _COLUMNS[:4] else "right")
    for row in _in_order(rows):
        table.add_row(*map(escape, _texts(row)))
    return table


def markdown(rows: Sequence[Row]) -> str:
    """Return ``results.md``."""
    lines = [
        "# How often the tests of a circuit reject a true hypothesis, and a false one",
        "",
        "Made by `acdc bench calibration`; `results.json` has the conditions. H0 are those of "
        "`acdc/evidence/verdicts.py`. Where rejecting is wrong (H0 is true, mostly just so) it may "
        "happen in at most a share alpha of samples; where it is right, the share is the test's "
        "power. Rejected: for sufficiency and necessity that the circuit passes, for the others "
        "that it fails; in brackets the 95 % interval of Clopper and Pearson. "
        "Theory: the same by the binomial distribution; a p-value that takes few "
        "values cannot come nearer to alpha. Cannot tell: samples with a dash, in "
        "which nothing is rejected.",
        "",
        markdown_table(_COLUMNS, map(_texts, _in_order(rows))).replace("<", "&lt;"),
        _summary(rows),
        "",
    ]
    return "\n".join(lines)


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """By test, true hypotheses first."""
    return sorted(rows, key=lambda row: (TESTS.index(row.test), not row.null))


def _texts(row: Row) -> list[str]:
    return [
        row.test,
        row.subject,
        row.says,
        "wrong" if row.null else "right",
        f"{row.share:.2%}",
        f"{row.low:.2%} to {row.high:.2%}",
        "" if row.theory is None else f"{row.theory:.2%}",
        f"{row.alpha:.0%}",
        f"{row.n_untold / row.n:.1%}" if row.n_untold else "",
    ]


def _summary(rows: Sequence[Row]) -> str:
    true = [row for row in rows if row.null]
    above = [f"{row.test} ({row.says})" for row in true if not row.holds]
    if not above:
        return (
            f"None of {len(true)} true hypotheses is rejected too often: no interval above alpha."
        )
    return f"Of {len(true)} true hypotheses, rejected too often: {'; '.join(above)}."


def write(folder: Path, rows: Sequence[Row], plan: Plan, device: str) -> list[str]:
    """Write ``results.json`` and ``results.md``; return their names."""
    head = {"format": FORMAT, "version": VERSION, "plan": asdict(plan), "seed": SEED}
    values = (asdict(row) | {"share": row.share} for row in _in_order(rows))
    return write_results(folder, head, values, markdown(rows), device)
