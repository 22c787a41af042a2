"""Commands killed at random moments: nothing is lost, and the same command ends as if never killed.

``pytest tests/test_kills.py -m slow -s`` kills 20 searches over heads and 5 of every other kind, at
moments spread over their whole duration, and prints what became of each; by default there are 2.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from killed import Acdc

TOLD = "acdc: told to end: nothing half-written is left"


def files(*patterns: str) -> Callable[[Path], dict[str, bytes]]:
    """Bytes of the files of an output by their names in it."""

    def read(output: Path) -> dict[str, bytes]:
        found = {path for pattern in patterns for path in output.glob(pattern)}
        assert found
        return {path.relative_to(output).as_posix(): path.read_bytes() for path in found}

    return read


def counts_too(output: Path) -> dict[str, Any]:
    """The circuit's bytes, and how much was computed."""
    summary = json.loads((output / "run.json").read_text())
    return {**files("circuit.json")(output), "work": summary["work"]}


OF_THE_MOMENT = ("timings", "seconds", "date", "load_average")


def without_times(value: Any) -> Any:
    """Drop what differs between two runs of the same."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in OF_THE_MOMENT}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def json_of(path: Path) -> Any:
    return without_times(json.loads(path.read_text()))


@dataclass(frozen=True)
class Case:
    """A command, and what of its output has to be as that of an uninterrupted one."""

    command: str
    out: str
    outcome: Callable[[Path], Any]
    n_kills: int = 5
    old: bool = False  # whether there is an output before

    @property
    def arguments(self) -> list[str]:
        return [*self.command.split(), "--out", self.out, *(["--overwrite"] if self.old else [])]


CASES = {
    "heads": Case("discover ioi --n-prompts 8 --threshold 0.02", "heads", counts_too, 20),
    "overwritten": Case(
        "discover ioi --n-prompts 8 --threshold 0.05", "old", files("circuit.json"), old=True
    ),
    "several taus": Case("discover ioi --n-prompts 8", "taus", counts_too),
    "zero": Case(
        "discover docstring --n-prompts 8 --intervention zero --threshold 0.5", "zero", counts_too
    ),
    "bfloat16": Case(
        "discover ioi --n-prompts 4 --threshold 0.1 --dtype bfloat16", "low", counts_too
    ),
    "positions": Case(
        "discover ioi --n-prompts 4 --threshold 0.3 --positions span", "positions", counts_too
    ),
    "neurons": Case(
        "discover ioi --n-prompts 8 --method acdc --neurons --max-latents 60 --candidates 300 "
        "--threshold 0.05",
        "neurons",
        counts_too,
    ),
    "both": Case(
        "discover ioi --n-prompts 4 --threshold 0.2 --direction both",
        "both",
        files("*/circuit.json", "directions.json"),
    ),
    "masks": Case(
        "discover ioi --n-prompts 8 --method edge-pruning --mask-steps 30",
        "masks",
        files("circuit.json"),
    ),
    "optimal": Case(
        "discover ioi --n-prompts 8 --intervention optimal --optimal-steps 10 --threshold 0.1",
        "optimal",
        files("circuit.json", "constants.safetensors"),
    ),
    "sweep": Case(
        "sweep ioi --n-prompts 8 --thresholds 0.3,0.1,0.05",
        "sweep",
        files("circuit-*.json", "frontier.csv"),
    ),
    "stability": Case(
        "stability ioi --seeds 2 --n-prompts 8 --threshold 0.1",
        "stable",
        files("circuit.json", "edges.csv"),
    ),
    "evaluate": Case(
        "evaluate run --n-random 10 --n-permutations 100 --n-knockouts 5 --n-resamples 100",
        "verdicts.json",
        json_of,
    ),
    "report": Case("report run --no-tests", "page.html", Path.read_bytes),
    "accuracy": Case(
        "bench accuracy --quick --models tracr-xproportion --methods acdc,eap,exact",
        "accuracy",
        lambda output: json_of(output / "results.json"),
    ),
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Acdc:
    """Return the command line in a folder with a file of a user's."""
    place = tmp_path_factory.mktemp("kills") / "place"
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    return Acdc(place)


@pytest.fixture(scope="module")
def acdc(bare: Acdc) -> Acdc:
    """Return the command line in a folder that also has a run."""
    acdc = bare
    status, _ = acdc.run(
        "discover", "ioi", "--n-prompts", "8", "--threshold", "0.1", "--out", "run"
    )
    assert status == 0, acdc.said
    return acdc


def snapshot(place: Path) -> dict[str, bytes]:
    return {
        path.relative_to(place).as_posix(): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file()
    }


def is_left(path: Path, place: Path) -> bool:
    """Whether a file is in a folder that a killed process left."""
    return any(part.startswith(".") for part in path.relative_to(place).parts)


def check_whole(place: Path) -> None:
    """No file in its place is half of one."""
    ends = {".svg": b"</svg>\n", ".html": b"</html>\n", ".png": b"IEND\xaeB`\x82", ".dot": b"}\n"}
    for path in place.rglob("*"):
        if path.is_file() and not is_left(path, place):
            content = path.read_bytes()
            if path.suffix == ".json":
                json.loads(content)
            assert content.endswith(ends.get(path.suffix, b"")), path


def leftovers(place: Path) -> set[Path]:
    return {path for path in place.rglob(".*-*") if path.is_dir()}


class Killer:
    """Kills a command again and again, and lets it end now and then."""

    def __init__(self, acdc: Acdc, case: Case, seed: str) -> None:
        self.acdc, self.case, self.rng = acdc, case, Random(seed)
        self.place, self.output = acdc.place, acdc.place / case.out
        self.tally: Counter[str] = Counter()
        self._old()
        self.before = snapshot(self.place)
        status, self.seconds = acdc.run(*case.arguments)
        assert status == 0, acdc.said
        self.wanted = case.outcome(self.output)
        self.after = snapshot(self.place)
        self._clear()

    def _old(self) -> None:
        if self.case.old:
            shutil.copytree(self.place / "run", self.output)
            (self.output / "own.txt").write_text("mine")

    def _clear(self) -> None:
        if self.output.is_dir():
            shutil.rmtree(self.output)
        self.output.unlink(missing_ok=True)

    def run(self, n_kills: int, most_in_a_row: int = 4) -> None:
        """Kill so often."""
        while self.tally["killed"] + self.tally["told"] < n_kills:
            self._old()
            left = n_kills - self.tally["killed"] - self.tally["told"]
            for _ in range(self.rng.randint(1, min(most_in_a_row, left))):
                if not self._kill():
                    break
            self._end()
            self._clear()

    def _kill(self) -> bool:
        """Kill once; False if the output is there."""
        gently = self.rng.random() < 0.25
        known = leftovers(self.place)
        status = self.acdc.kill(
            self.rng.uniform(0, self.seconds), *self.case.arguments, gently=gently
        )
        if status == 0:
            self.tally["ended before"] += 1
            return False
        self.tally["told" if gently else "killed"] += 1
        if status == 143:
            assert self.acdc.said.splitlines()[-1].startswith(TOLD)
            assert leftovers(self.place) <= known
        else:
            assert status == (-15 if gently else -9), self.acdc.said  # -15: not yet listening
        self._check()
        return not self._has_appeared()

    def _has_appeared(self) -> bool:
        """Whether the output is there, or has begun to: beside a checkpoint."""
        return any(
            name.split("/")[0] == self.case.out
            and "checkpoint" not in name.split("/")
            and self.before.get(name) != content
            for name, content in snapshot(self.place).items()
            if not is_left(self.place / name, self.place)
        )

    def _check(self) -> None:
        """What was there before is there, and nothing is half of something."""
        check_whole(self.place)
        now, appeared = snapshot(self.place), self._has_appeared()
        for name, content in self.before.items():
            if not (appeared and name.split("/")[0] == self.case.out):
                assert now[name] == content, name

    def _end(self) -> None:
        """Let the command end; its output is that of one that was never killed."""
        status, _ = self.acdc.run(*self.case.arguments)
        if status == 2:  # it was all written when it was killed
            assert "exists" in self.acdc.said
            self.tally["was there"] += 1
        else:
            assert status == 0, self.acdc.said
        self.tally["compared"] += 1
        assert self.case.outcome(self.output) == self.wanted
        assert snapshot(self.place).keys() == self.after.keys()
        assert not leftovers(self.place)


def test_a_few_kills(bare: Acdc) -> None:
    few = Case("discover ioi --n-prompts 4 --threshold 0.1", "few", counts_too)
    Killer(bare, few, "a few").run(2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many_kills(acdc: Acdc, name: str) -> None:
    case = CASES[name]
    killer = Killer(acdc, case, name)
    killer.run(case.n_kills)
    print(f"\n{name}: {killer.seconds:.1f} s uninterrupted;", dict(killer.tally))
