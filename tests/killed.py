"""Processes that are killed, where they write and at any moment."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

_HALF = """
import os, signal, sys
from pathlib import Path
from graphs.files.beside import beside
with beside(Path(sys.argv[1])) as place:
    (place / "new").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""

_MOVED = """
import os, signal, sys
from pathlib import Path
from graphs.files.beside import new_files
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


class Acdc:
    """The command line in processes of its own, which begin with everything imported.

    Every receiver of a search is a checkpoint there, so that a kill finds one at any moment.

    Parameters
    ----------
    place
        Working folder; ``log`` beside it takes what the last process said.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.log = place, place.with_name(f"{place.name}.log")
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["preloaded"])
        known = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        forkserver.ensure_running()  # it looks for modules there alone
        if known is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = known

    def start(self, *arguments: str) -> Any:
        """Start a command."""
        process = self._context.Process(
            target=_command, args=(arguments, str(self.place), str(self.log)), daemon=True
        )
        process.start()
        return process

    def run(self, *arguments: str) -> tuple[int, float]:
        """Run a command to its end; return its status and how many seconds it took."""
        begin, process = time.monotonic(), self.start(*arguments)
        process.join()
        return process.exitcode, time.monotonic() - begin

    def kill(self, after: float, *arguments: str, gently: bool = False) -> int:
        """Run a command and kill it after some seconds; return its status.

        ``gently`` tells it to end (SIGTERM).
        """
        process = self.start(*arguments)
        process.join(after)
        if gently:
            process.terminate()
        else:
            process.kill()
        process.join()
        status: int = process.exitcode
        return status

    @property
    def said(self) -> str:
        """What the last command said."""
        return self.log.read_text(encoding="utf-8")


def _command(arguments: tuple[str, ...], place: str, log: str) -> None:
    """Run a command; what it says goes to a file."""
    import acdc.engine.checkpoint
    from acdc.cli import main

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(place)
    acdc.engine.checkpoint.PERIOD = 0.0
    main(arguments)
