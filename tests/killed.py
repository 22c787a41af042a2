"""Processes that are killed while they write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_HALF = """
import os, signal, sys
from pathlib import Path
from graphs.beside import beside
with beside(Path(sys.argv[1])) as place:
    (place / "new").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""

_MOVED = """
import os, signal, sys
from pathlib import Path
from graphs.beside import new_files
replace, seen = Path.replace, []
def killing(self, target):
    if len(seen) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    seen.append(target)
    return replace(self, target)
Path.replace = killing
with new_files(Path(sys.argv[1])) as new:
    for name in ("a", "b", "c"):
        (new / name).write_text("new " + name)
    (new / "deep").mkdir()
    (new / "deep" / "d").write_text("new d")
"""


def left_by_a_killed_writer(output: Path) -> Path:
    """Kill a process that has half written an output; return the folder that it leaves."""
    before = set(output.parent.iterdir())
    _run(_HALF, output)
    (left,) = set(output.parent.iterdir()) - before
    assert left.name.startswith(f".{output.name[:20]}")
    return left


def killed_while_moving(folder: Path, n_moved: int) -> None:
    """Kill a process that has written a folder, when so many of its files have moved there."""
    _run(_MOVED, folder, n_moved)


def _run(code: str, *arguments: object) -> None:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=False)
    assert done.returncode == -9
