"""Several commands in one process, as ``acdc`` runs each: ``python tests/commands.py FILE``.

The file is a JSON list of lists of arguments.  Under ``torchrun`` the processes share them; the one
that ``ACDC_TEST_KILLED`` names is killed at its tenth exchange.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from acdc.cli import main
from acdc.engine import processes

__all__: list[str] = []


def kill_at(n: int) -> None:
    """Kill this process at its ``n``-th exchange."""
    exchange, left = processes._to_all, iter(range(n))

    def exchange_or_die(content: bytes, device: torch.device) -> list[bytes]:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return exchange(content, device)

    processes._to_all = exchange_or_die


if __name__ == "__main__":
    if os.environ.get("ACDC_TEST_KILLED") == os.environ.get("RANK"):
        kill_at(10)
    with processes.together() as us:
        processes.together = lambda: nullcontext(us)  # joined once, for all commands
        for command in json.loads(Path(sys.argv[1]).read_text()):
            try:
                main(command)
            except SystemExit as end:
                if end.code:
                    raise
