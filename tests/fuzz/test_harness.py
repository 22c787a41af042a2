"""The harness sees what it is there for: each kind of failure, planted."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
from harness import Door, check_line, damaged_bytes, damaged_json, damaged_lines, fuzz, tried

from graphs.errors import InputError


def raises(error: Exception) -> Any:
    raise error


def test_a_value_and_an_error_are_returned() -> None:
    assert tried(lambda: 3) == 3
    assert isinstance(tried(lambda: raises(InputError("no"))), InputError)


def test_another_exception_is_no_outcome() -> None:
    with pytest.raises(KeyError):
        tried(lambda: raises(KeyError("x")))


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MOST_SECONDS", 0)
    with pytest.raises(AssertionError, match="more than 0 s"):
        tried(lambda: time.sleep(5))


def test_memory_is_bounded() -> None:
    with pytest.raises(AssertionError, match=r"it took .* MiB"):
        tried(lambda: np.ones(1 << 24).sum(), most_bytes=1 << 24)
    tried(lambda: np.ones(1 << 10).sum(), most_bytes=1 << 24)


@pytest.mark.parametrize("line", ["", "a\x1b[0m", "a\nb", "a" * 1000])
def test_a_line_is_looked_at(line: str) -> None:
    with pytest.raises(AssertionError):
        check_line(line)


def fragile(path: Path) -> Any:
    """A door that only knows how to refuse what is no JSON, and takes any number."""
    try:
        return json.loads(path.read_bytes())["a"] + 1
    except ValueError as error:
        raise InputError(str(error)) from error


def is_small(value: Any) -> None:
    assert 0 < value < 1000


@pytest.mark.parametrize("damaged", [damaged_json, damaged_bytes])
def test_a_fragile_door_is_found_out(damaged: Any, tmp_path: Path) -> None:
    door = Door("fragile", [b'{"a": 1}'], fragile, is_small, damaged)
    with pytest.raises((AssertionError, KeyError, TypeError)):
        fuzz(door, tmp_path, 300)


def test_lines_stay_lines(tmp_path: Path) -> None:
    seen = []

    def read(path: Path) -> int:
        seen.append(path.read_bytes())
        return 1

    original = b'{"a": 1}\n{"a": 2}\n{"a": 3}'
    fuzz(Door("lines", [original], read, is_small, damaged_lines), tmp_path, 50)
    assert seen[0] == original
    assert len(seen) == 51
    assert len(set(seen)) > 30
