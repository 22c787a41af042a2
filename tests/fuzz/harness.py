"""Doors through which files and options come in, tried with what nobody should give them.

A *door* takes something of unknown origin.  Whatever it is given, there are two outcomes: a valid
value, or an :class:`InputError` whose message is one bounded line without control characters.
Anything else (another exception, more than :data:`MOST_SECONDS`, more than a door's memory, a
value that breaks what the door promises) is a failure.

A module of doors lists them and has two tests::

    DOORS = (Door("circuit.json", originals, read, check, damaged_json), ...)

    @pytest.mark.parametrize("door", DOORS, ids=str)
    def test_a_little(door, tmp_path):
        fuzz(door, tmp_path, QUICK)

    @pytest.mark.slow
    @pytest.mark.parametrize("door", DOORS, ids=str)
    def test_a_lot(door, tmp_path):
        fuzz(door, tmp_path, MANY)

Where a door is a folder, ``read`` copies one that is in order and puts the file in its place.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import math
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st

from graphs.errors import InputError
from graphs.text import MOST_SHOWN

QUICK = 40
"""Inputs of a door in every test run."""

MANY = 1000
"""Inputs of a door under ``-m slow``; ten doors or more make 10,000."""

MOST_SECONDS = 20
"""Of one input."""

MOST_BYTES = 1 << 30
"""Memory that one input may take beside what was there before."""


@dataclass(frozen=True)
class Door:
    """A place where something of unknown origin comes in.

    Parameters
    ----------
    name
        Of the test.
    originals
        Contents that the door takes as they are.
    read
        Takes a file with the content, returns what the door makes of it.
    check
        Asserts what the door promises of a value that it returns.
    damaged
        Makes a strategy of damaged contents out of the originals.
    suffix
        Of the file.
    share
        Of the number of inputs; for doors that take long.
    most_bytes
        Memory that one input may take.
    """

    name: str
    originals: Sequence[bytes]
    read: Callable[[Path], Any]
    check: Callable[[Any], None]
    damaged: Callable[[Sequence[bytes]], st.SearchStrategy[bytes]]
    suffix: str = ""
    share: float = 1.0
    most_bytes: int = MOST_BYTES

    def __str__(self) -> str:
        return self.name


def fuzz(door: Door, folder: Path, n: int) -> None:
    """Give a door its originals, which it must take, and ``n`` damaged contents."""
    path = folder / f"input{door.suffix}"

    def opened(content: bytes) -> Any:
        path.write_bytes(content)
        return tried(lambda: door.read(path), door.most_bytes)

    for content in door.originals:
        value = opened(content)
        assert not isinstance(value, InputError), f"{door} refuses an original: {value}"
        door.check(value)

    @limits(max(1, round(n * door.share)))
    @given(door.damaged(door.originals))
    def each(content: bytes) -> None:
        value = opened(content)
        if not isinstance(value, InputError):
            door.check(value)

    each()


def limits(n: int) -> Callable[[Any], Any]:
    """Return the decorator of a hypothesis test of ``n`` inputs, the same ones every time.

    Another seed gives others: ``ACDC_FUZZ_SEED=1 pytest -m slow tests/fuzz``.
    """
    chosen = settings(
        max_examples=n,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: with_seed(int(os.environ.get("ACDC_FUZZ_SEED", "0")))(chosen(test))


# --- one input ----------------------------------------------------------------------------


def tried(door: Callable[[], Any], most_bytes: int = MOST_BYTES) -> Any:
    """Call a door; return its value, or its :class:`InputError` after a look at the message."""
    start = time.monotonic()
    with _peak_memory() as used, _alarm():
        try:
            value = door()
        except InputError as error:
            value = error
    took = time.monotonic() - start
    assert took <= MOST_SECONDS, f"it took {took:.0f} s"
    assert used() <= most_bytes, f"it took {used() / 2**20:,.0f} MiB"
    if isinstance(value, InputError):
        check_line(str(value))
    return value


def check_line(line: str) -> None:
    """Assert that an error is one bounded line that a terminal can show."""
    assert line.strip(), "an error without words"
    assert len(line) <= MOST_SHOWN, f"an error of {len(line):,} characters"
    assert line.isprintable(), f"control characters in {line!r}"


@contextmanager
def _alarm() -> Iterator[None]:
    """Raise in what takes far too long, so that a hang is a failure and not a hang."""

    def late(signum: int, frame: FrameType | None) -> None:
        faulthandler.dump_traceback(file=sys.__stderr__)
        raise AssertionError(f"it takes more than {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(MOST_SECONDS + 1)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _peak_memory() -> Iterator[Callable[[], int]]:
    """Give what tells how many bytes the block took at its peak, beside those of before.

    Linux can forget the peak of before; elsewhere an input that stays below it goes unseen.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    start = _resident()
    yield lambda: _peak() - start


def _resident() -> int:
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    return _peak()


def _peak() -> int:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- damaged contents ---------------------------------------------------------------------

_NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 2**31, -(2**31), 2**63, 10**9, 10**18, 10**30, 10**400,
    0.0, -0.0, 0.5, 1e-320, 1e30, 1e308, -1e308, math.nan, math.inf, -math.inf,
)  # fmt: skip

HOSTILE_TEXTS = (
    "", " ", "a", "\x00", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b2J", "\u202eabc", "\ufeff",
    "\ud800", "a\ud83d", "😀", "é", "\n", "a\r\nb", "[bold]", "[/bold]", "{", "}", '"', "'", "\\",
    "<script>alert(1)</script>", "..", "../..", "/", "/dev/zero", "/etc/passwd", "~nouser",
    "none", "null", "nan", "True", "-1", "1e9", "%s%n", "${HOME}", "`id`", "; id", "a" * 5000,
    "9" * 5000, "input", "logits", "a0.h0", "m0", "input->logits", "a0.h0->logits", "ioi", "acdc",
)  # fmt: skip


_WORD = re.compile(r"[\w.+@-]+")


def _deep() -> Any:
    value: Any = []
    for _ in range(200):
        value = [value]
    return value


HOSTILE: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(_NUMBERS),
    st.sampled_from(HOSTILE_TEXTS),
    st.sampled_from((None, True, False)),
    st.builds(lambda: []),
    st.builds(lambda: {}),
    st.builds(_deep),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(-3, 300), max_size=6),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)
"""Plain values that a field does not expect."""


@st.composite
def damaged_values(draw: st.DrawFn, value: Any) -> Any:
    """Change one to three places of a JSON value: replace, drop, add, repeat or swap something."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        value = _damage(draw, value)
    return value


def _damage(draw: st.DrawFn, value: Any) -> Any:
    """Change one place, found by a walk down the value."""
    parent, key, here = None, None, value
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 15)) == 15:
        return draw(HOSTILE)
    while isinstance(here, dict | list) and here and (parent is None or draw(st.integers(0, 3))):
        parent = here
        key = draw(st.sampled_from(list(here) if isinstance(here, dict) else range(len(here))))
        here = parent[key]
    how = draw(st.sampled_from(("replace", "replace", "nearby", "drop", "add", "repeat", "wrap")))
    if how == "drop":
        del parent[key]
    elif how == "add" and isinstance(parent, dict):
        parent[draw(st.sampled_from(HOSTILE_TEXTS) | st.text(max_size=8))] = draw(HOSTILE)
    elif how == "repeat" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(here))
    elif how == "wrap":
        parent[key] = draw(st.sampled_from(([here], {"a": here}, [here, here], str(here))))
    elif how == "nearby":
        parent[key] = _nearby(draw, here)
    else:
        parent[key] = draw(HOSTILE)
    return value


def _nearby(draw: st.DrawFn, value: Any) -> Any:
    """A value of the same kind that is a little different."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + draw(st.integers(-3, 3)) * draw(st.sampled_from((1, 1, 1000, 10**9)))
    if isinstance(value, float):
        return value * draw(st.sampled_from((-1.0, 0.0, 2.0, 1e300)))
    if isinstance(value, str):
        at = draw(st.integers(0, len(value)))
        return value[:at] + draw(st.sampled_from(HOSTILE_TEXTS)) + value[at:]
    return draw(HOSTILE)


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def damaged_json(originals: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """JSON files with damaged values, or damaged as bytes."""
    values = [json.loads(content) for content in originals]
    changed = st.sampled_from(values).flatmap(damaged_values).map(_dumped)
    return changed | changed | changed | damaged_bytes(originals)


def damaged_lines(originals: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Files of JSON lines with damaged rows, or damaged as bytes."""
    files = [[json.loads(row) for row in content.splitlines()] for content in originals]

    def joined(rows: Any) -> bytes:
        return b"\n".join(map(_dumped, rows)) if isinstance(rows, list) else _dumped(rows)

    changed = st.sampled_from(files).flatmap(damaged_values).map(joined)
    return changed | changed | changed | damaged_bytes(originals)


def damaged_text(originals: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Text files with other words or other lines in them, or damaged as bytes."""
    texts = [content.decode() for content in originals]
    words = [[match.span() for match in _WORD.finditer(text)] for text in texts]

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        which = draw(st.integers(0, len(texts) - 1))
        text, spans = texts[which], draw(st.lists(st.sampled_from(words[which]), max_size=3))
        for start, end in sorted(set(spans), reverse=True):
            word = draw(st.sampled_from(HOSTILE_TEXTS) | st.sampled_from(_NUMBERS).map(str))
            word = draw(st.sampled_from((word, word, text[slice(*spans[0])], "")))
            text = text[:start] + word + text[end:]
        return text.encode("utf-8", "surrogatepass")

    @st.composite
    def rearranged(draw: st.DrawFn) -> bytes:
        rows = draw(st.sampled_from(texts)).splitlines(keepends=True)
        at, end = sorted(draw(st.tuples(*[st.integers(0, len(rows))] * 2)))
        return "".join(rows[:at] + rows[at:end] * draw(st.integers(0, 2)) + rows[end:]).encode()

    return changed() | changed() | changed() | rearranged() | damaged_bytes(originals)


@st.composite
def damaged_bytes(draw: st.DrawFn, originals: Sequence[bytes]) -> bytes:
    """Files that are cut, torn, overwritten, repeated, or random from the start."""
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.integers(0, 64)))
        how = draw(st.sampled_from(("cut", "flip", "insert", "drop", "repeat", "zero", "random")))
        if how == "cut":
            del content[at:]
        elif how == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "insert":
            content[at:at] = draw(st.binary(max_size=32))
        elif how == "drop":
            del content[at:end]
        elif how == "repeat":
            content[at:at] = content[at:end]
        elif how == "zero":
            content[at:end] = bytes(end - at)
        elif how == "random" and draw(st.integers(0, 4)) == 0:
            content = bytearray(draw(st.binary(max_size=200)))
    return bytes(content)
