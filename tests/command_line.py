"""The command line as tests call it, and the folders that they call it in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from parity_pairs import jsonl, parity_rows

from acdc.cli import main

__all__ = [
    "N_ROWS",
    "Answer",
    "Call",
    "call",
    "gpt2",
    "place",
    "read",
    "save_gpt2",
    "shared",
    "snapshot",
    "status_of",
]

N_ROWS = 12


class Answer(NamedTuple):
    """What a command gave back."""

    status: int
    out: str
    err: str


Call = Callable[..., Answer]


def status_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command line in this process."""

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        return Answer(status_of(*arguments), *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Return a folder with a model, a task file and one run of each of acdc and eap-ig."""
    folder = tmp_path_factory.mktemp("cli")
    for name in ("ln2", "attn3"):
        shutil.copytree(data / "parity" / name, folder / name)
        (folder / f"{name}.jsonl").write_text(jsonl(parity_rows(folder / name, N_ROWS)))
    asked = {
        "acdc": ["--threshold", "0.1", "--metric", "kl"],
        "eap-ig": ["--edges", "30", "--steps", "3", "--seed", "7", "--batch-size", "5"],
    }
    for method, options in asked.items():
        run = ["discover", folder / "ln2.jsonl", "--model", folder / "ln2", "--method", method]
        assert status_of(*run, *options, "--holdout", "0", "--out", folder / method) == 0
    return folder


@pytest.fixture
def place(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder of a test's own: ``ln2``, ``task.jsonl`` and the run ``run``."""
    shutil.copytree(shared / "ln2", tmp_path / "ln2")
    shutil.copytree(shared / "acdc", tmp_path / "run")
    shutil.copy(shared / "ln2.jsonl", tmp_path / "task.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Return a small random GPT-2 with the real tokenizer, as ``save_pretrained`` writes it."""
    return save_gpt2(tmp_path_factory.mktemp("hf") / "gpt2", data, layers=2, width=32, heads=4)


def save_gpt2(folder: Path, data: Path, *, layers: int, width: int, heads: int) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    for path in (data / "gpt2-tokenizer").glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
