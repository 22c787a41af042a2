"""Pairs of a parity model's batch as rows of a task file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

__all__ = ["jsonl", "parity_rows"]


def parity_rows(folder: Path, n: int) -> list[dict[str, Any]]:
    """Return the first ``n`` pairs of the batch that lies beside a parity model."""
    batch = {key: value.tolist() for key, value in load_file(folder / "batch.safetensors").items()}
    columns = (batch[key][:n] for key in ("clean", "corrupt", "answer", "wrong"))
    return [
        {"clean": clean, "corrupt": corrupt, "answers": [answer], "wrong_answers": [wrong]}
        for clean, corrupt, answer, wrong in zip(*columns, strict=True)
    ]


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)
