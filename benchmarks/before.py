"""Another worktree of this project beside this one: the same rows of ``bench speed``, in turn.

Every part of the plan is run in a process of its own, first in the folder given and then in this
one, by the benchmark that each has itself (which asserts the answers that it times).  On a CPU the
clock is that of the process, so that other programs at work count little.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from acdc.errors import OptionError, OutputError
from benchmarks.results import markdown_table, terminal_table, write_results
from benchmarks.speed import Row

__all__ = ["PARTS", "Pair", "compare", "table", "write"]

PARTS = ("bundled", "growth", "acdc")
"""What may be compared, beside ``MODEL:TASK:METRIC:TAU``: ``acdc`` is the first of
the searches on the GPT-2-small shape, and attribution there."""

_CHILD = """
import sys, time
folder, quick, device, part, out = sys.argv[1:]
sys.path.insert(0, folder)
if device == "cpu":
    time.perf_counter = time.process_time
from dataclasses import replace
from pathlib import Path
from benchmarks import speed
from benchmarks.subjects import bundled_experiment
plan = (speed.Plan.quick if quick == "quick" else speed.Plan.full)()
if ":" in part:
    model, task, metric, tau = part.rsplit(":", 3)
    experiment = bundled_experiment(model, task, metric, device, 128)
    name = Path(model).name + ", " + task
    rows = [speed.acdc_row("run", name, experiment, float(tau), plan.repeats)]
else:
    less = {"bundled": {"bundled": ()}, "growth": {"growth": ()}, "acdc": {"thresholds": ()}}
    plan = replace(plan, thresholds=plan.thresholds[:1])
    plan = replace(plan, **{k: v for name, x in less.items() if name != part for k, v in x.items()})
    groups = {"acdc": ("ACDC", "attribution")}.get(part, (part,))
    rows = [row for row in speed.measure(plan, device) if row.group in groups]
speed.write(Path(out), rows, device, plan)
"""


@dataclass(frozen=True)
class Pair:
    """One row, before and now.

    Parameters
    ----------
    before, now
        What was measured in the other folder and in this one.
    """

    before: Row
    now: Row

    @property
    def times(self) -> float:
        """How many times fewer seconds it takes now."""
        return self.before.seconds / self.now.seconds


def compare(
    folder: Path, parts: Iterable[str], device: str, *, quick: bool
) -> Iterator[tuple[str, list[Pair]]]:
    """Yield each part with its rows, of both worktrees.

    Parameters
    ----------
    folder
        Of the other worktree.
    parts
        Of :data:`PARTS`, or runs of ACDC on 128 prompts.
    device
        Where.
    quick
        Toy sizes.

    Raises
    ------
    OptionError
        If the folder is no worktree with a benchmark, a part is unknown, or a run fails.
    """
    if not (folder / "benchmarks" / "speed.py").is_file():
        raise OptionError(
            f"--before {str(folder)!r}: no benchmarks/speed.py there, give a worktree"
        )
    here = Path(__file__).resolve().parent.parent
    for part in parts:
        if part not in PARTS and part.count(":") < 3:
            known = ", ".join((*PARTS, "MODEL:TASK:METRIC:TAU"))
            raise OptionError(f"part {part!r} is unknown, choose from {known}")
        before, now = (_measured(root, part, device, quick) for root in (folder.resolve(), here))
        of = {_key(row): row for row in before}
        yield part, [Pair(of[_key(row)], row) for row in now if _key(row) in of]


def _measured(root: Path, part: str, device: str, quick: bool) -> list[Row]:
    """Run a part in a worktree."""
    with tempfile.TemporaryDirectory(prefix="acdc-bench-") as scratch:
        out = Path(scratch) / "rows.json"
        arguments = [str(root), "quick" if quick else "full", device, part, str(out)]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, *arguments],
            cwd=scratch, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise OptionError(f"bench speed in {str(root)!r}, {part}: {last[0]}")
        try:
            rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
        except OSError as error:
            raise OutputError(f"bench speed in {str(root)!r} wrote nothing: {error}") from error
    return [Row(**row) for row in rows]


def _key(row: Row) -> tuple[str, ...]:
    """What a row is of; a threshold that is a share of a gap is the same but for rounding."""
    tau = "" if row.threshold is None else f"{row.threshold:.5g}"
    return row.group, row.model, row.method, row.metric, tau


_HEAD = """Two worktrees, part by part in turn: seconds of the process on a CPU, and multiples of a
plain forward that the same process measured around each run. Single seconds scatter where other
programs are at work.
"""

_COLUMNS = ("what", "kept", "evaluated", "seconds", "forwards", "times faster")


def _cells(pair: Pair) -> tuple[str, ...]:
    """Texts of a row: before and now."""
    a, b = pair.before, pair.now
    both = [(a.n_kept, b.n_kept), (a.n_evaluations, b.n_evaluations)]
    counts = ["" if y is None else f"{y:,}" if x == y else f"{x:,} → {y:,}" for x, y in both]
    return (
        f"{b.model}: {b.method}, {b.metric}",
        *counts,
        f"{a.seconds:.3g} → {b.seconds:.3g}",
        f"{a.seconds / a.forward_seconds:.3g} → {b.seconds / b.forward_seconds:.3g}",
        f"{pair.times:.2f}",
    )


def table(pairs: Iterable[Pair]) -> Table:
    """Return a table for terminals."""
    return terminal_table("before and now", _COLUMNS, map(_cells, pairs))


def write(folder: Path, pairs: Iterable[Pair], device: str) -> list[str]:
    """Write what was measured; return the names of the files."""
    pairs = list(pairs)
    text = f"# Before and now\n\n{_HEAD}\n{markdown_table(_COLUMNS, map(_cells, pairs))}"
    content = [{"before": asdict(x.before), "now": asdict(x.now), "times": x.times} for x in pairs]
    head = {"format": "acdc-bench-before", "version": 1}
    return write_results(folder, head, content, text, device)
