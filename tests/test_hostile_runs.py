"""A run's folder from somebody else: nothing in it is executed, and it writes nowhere else."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import Call, call, gpt2, read  # noqa: F401  fixtures

from acdc.bases import sizes_at
from acdc.errors import ModelError
from acdc.looking import look
from acdc.pipeline import discover, evaluate
from acdc.report import gather
from acdc.runs import load_run

CODE = """
from pathlib import Path
import transformers

Path({canary!r}).touch()

class OwnConfig(transformers.GPT2Config):
    model_type = "own"

class GPT2LMHeadModel(transformers.GPT2LMHeadModel):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def original(
    gpt2: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return the folder of a run on a small random GPT-2."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run = discover("ioi", model=str(gpt2), method="eap", n_edges=40, n_prompts=4)
    run.save(folder)
    return folder


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the file that the code of the model in :func:`evil` writes."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path / "canary"
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


@pytest.fixture
def evil(
    original: Path,
    gpt2: Path,  # noqa: F811
    canary: Path,
    tmp_path: Path,
) -> Path:
    """Return a run whose model has code of its own, and whose run.json says to run it."""
    folder = tmp_path / "run"
    shutil.copytree(original, folder)
    shutil.copytree(gpt2, folder / "model")
    (folder / "model" / "own.py").write_text(CODE.format(canary=str(canary)))
    path = folder / "model" / "config.json"
    config = read(path) | {"model_type": "own", "architectures": ["GPT2LMHeadModel"]}
    config["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.GPT2LMHeadModel",
    }
    path.write_text(json.dumps(config))
    path = folder / "run.json"
    changes = {"model": str(folder / "model"), "trust_remote_code": True}
    path.write_text(json.dumps(read(path) | changes))
    return folder


COMMANDS: dict[str, tuple[object, ...]] = {
    "evaluate": ("evaluate", "{run}", "--no-tests"),
    "evaluate --brief": ("evaluate", "{run}", "--brief"),
    "self-repair": ("self-repair", "{run}", "--role", "x=a0.h0,a1.h1"),
    "report": ("report", "{run}", "--no-tests", "--out", "{out}/page.html"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_s_folder_cannot_ask_for_its_code(
    name: str,
    evil: Path,
    canary: Path,
    tmp_path: Path,
    call: Call,  # noqa: F811
) -> None:
    command = [str(word).format(run=evil, out=tmp_path) for word in COMMANDS[name]]
    answer = call(*command)
    assert answer.status == 2
    assert "wants to run Python code of its own; pass --trust-remote-code" in answer.err
    assert answer.err.count("\n") == 1
    assert not canary.exists()
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_user_can(
    name: str,
    evil: Path,
    canary: Path,
    tmp_path: Path,
    call: Call,  # noqa: F811
) -> None:
    command = [str(word).format(run=evil, out=tmp_path) for word in COMMANDS[name]]
    answer = call(*command, "--trust-remote-code")
    assert answer.status == 0, answer.err
    assert canary.exists()


PYTHON: dict[str, Callable[..., Any]] = {
    "gather": lambda run, **trust: gather(run, tests=False, **trust),
    "sizes_at": lambda run, **trust: sizes_at([run, run], 0.9, **trust),
    "evaluate": lambda run, **trust: evaluate(
        load_run(run)[1], replace(load_run(run)[0], **trust)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PYTHON)
def test_in_python_the_call_says_so(name: str, evil: Path, canary: Path) -> None:
    with pytest.raises(ModelError, match="pass --trust-remote-code"):
        PYTHON[name](evil)
    assert not canary.exists()
    PYTHON[name](evil, trust_remote_code=True)
    assert canary.exists()


def test_latents_are_looked_at_without_code(evil: Path, canary: Path, tmp_path: Path) -> None:
    """The run of bundled dictionaries, its model exchanged for one with code."""
    folder = tmp_path / "latents"
    discover("ioi", saes="bundled", n_edges=30, n_prompts=4, max_latents=30).save(folder)
    changes = {"model": str(evil / "model"), "trust_remote_code": True}
    (folder / "run.json").write_text(json.dumps(read(folder / "run.json") | changes))
    with pytest.raises(ModelError, match="pass --trust-remote-code"):
        look(folder)
    assert not canary.exists()


def test_what_was_trusted_once_is_not_trusted_again(
    evil: Path,
    canary: Path,
    tmp_path: Path,
    call: Call,  # noqa: F811
) -> None:
    """It stays in run.json as information alone."""
    options = ["--model", evil / "model", "--method", "eap", "--edges", 40, "--n-prompts", 4]
    answer = call("discover", "ioi", *options, "--trust-remote-code", "--out", tmp_path / "mine")
    assert answer.status == 0, answer.err
    assert read(tmp_path / "mine" / "run.json")["trust_remote_code"] is True
    assert load_run(tmp_path / "mine")[0].trust_remote_code is False
    canary.unlink()
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]
    answer = call("evaluate", tmp_path / "mine", "--brief")
    assert "pass --trust-remote-code" in answer.err
    assert not canary.exists()
