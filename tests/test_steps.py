"""Checkpoints by name: ``NAME@STEP`` of folders, known models and repositories of the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants

import acdc
from acdc import models
from acdc.cli import main
from acdc.errors import ModelError, UnknownNameError
from acdc.models import load_model, where_from
from acdc.models.steps import list_steps, split_step
from acdc.registry import Registry
from acdc.runs.opened import open_run
from acdc.runs.reopen import reopen


def save_llama(folder: Path, seed: int) -> Path:
    """Write a small Hugging Face model without tokenizer, with weights of a seed."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def weights(name: str | Path) -> torch.Tensor:
    return load_model(str(name))[0].W_U


def refusal(name: str | Path, error: type[Exception] = ModelError) -> str:
    """Return the message that a model is refused with; it is one line."""
    with pytest.raises(error) as caught:
        load_model(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Return a folder with a model and four checkpoints of it."""
    folder = save_llama(tmp_path / "run", 9)
    (folder / "checkpoints").mkdir()
    for seed, name in enumerate(("checkpoints/000400", "50", "checkpoint-500", "step7")):
        save_llama(folder / name, seed)
    (folder / "123").mkdir()  # no model
    return folder


@pytest.mark.parametrize(
    ("step", "place"),
    [
        ("400", "checkpoints/000400"), ("000400", "checkpoints/000400"), ("50", "50"),
        ("500", "checkpoint-500"), ("checkpoint-500", "checkpoint-500"), ("7", "step7"),
        ("step7", "step7"),
    ],
)  # fmt: skip
def test_a_step_is_its_folder(trained: Path, step: str, place: str) -> None:
    assert torch.equal(weights(f"{trained}@{step}"), weights(trained / place))
    assert where_from(f"{trained}@{step}") == "folder"


def test_a_folder_of_checkpoints_has_steps(trained: Path) -> None:
    home = trained / "checkpoints"
    assert torch.equal(weights(f"{home}@400"), weights(home / "000400"))
    assert list(list_steps(trained)) == [7, 50, 400, 500]


def test_a_known_model_has_steps(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Registry("model", Path, "none.such", known={"mine": trained})
    monkeypatch.setattr(models, "MODELS", known)
    model, _ = load_model("mine@400")
    assert model.name == "mine@400"
    assert where_from("mine@400") == "known"
    assert refusal("mine@3") == (
        f"model 'mine@3': {trained} has no step '3': it has 7, 50, 400, 500"
    )
    message = refusal("mien@3", UnknownNameError)
    assert message.startswith("unknown model 'mien': did you mean mine, a folder, or a name on the")


def test_what_steps_there_are_is_said(trained: Path) -> None:
    assert refusal(f"{trained}@401").endswith("has no step '401': it has 7, 50, 400, 500")
    assert refusal(f"{trained}@last").endswith("has no step 'last': it has 7, 50, 400, 500")
    assert refusal(f"{trained / '50'}@401").endswith("has no step '401': it has no checkpoints")
    assert refusal(f"{trained}/none@401").endswith("none@401': there is no such folder")
    for step in range(1000, 1030):
        (trained / str(step)).mkdir()
        (trained / str(step) / "config.json").write_text("{}")
    message = refusal(f"{trained}@999")
    assert "of its 34 the nearest are 1000, 1001, 1002" in message
    assert message.endswith(", 1018, 1019")


def test_two_folders_of_one_step_are_refused(trained: Path) -> None:
    save_llama(trained / "400", 5)
    assert "400 are that step: name one" in refusal(f"{trained}@400")


def test_a_folder_whose_name_has_the_sign_is_itself(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "me@2024", 0)
    assert load_model(str(folder))[0].name == "me@2024"
    assert split_step("me@home/model") == ("me@home/model", None)


# --- the hub ------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a hub's cache with two revisions of a model."""
    home = tmp_path / "models--owner--name"
    (home / "refs").mkdir(parents=True)
    for seed, (revision, commit) in enumerate({"main": "f" * 40, "step1000": "a" * 40}.items()):
        save_llama(home / "snapshots" / commit, seed)
        (home / "refs" / revision).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home / "snapshots"


def test_a_step_on_the_hub_is_a_revision(cache: Path) -> None:
    assert torch.equal(weights("owner/name@step1000"), weights(cache / ("a" * 40)))
    assert torch.equal(weights("owner/name"), weights(cache / ("f" * 40)))
    assert load_model("owner/name@step1000")[0].name == "owner/name@step1000"
    assert where_from("owner/name@step1000") == "hub"


def test_a_revision_that_is_not_there(cache: Path) -> None:
    assert refusal("owner/name@step2") == (
        "model 'owner/name@step2': the Hugging Face hub is out of reach (HF_HUB_OFFLINE is set); "
        "its cache of owner/name has no step 'step2': it has main, step1000"
    )
    assert "out of reach (HF_HUB_OFFLINE is set)" in refusal("owner/other@step2")
    assert "no checkpoints as revisions" in refusal("NeelNanda/SoLU_1L512W_C4_Code@3")


# --- runs ---------------------------------------------------------------------------------


def test_a_run_keeps_its_step_and_reopens_with_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, out = f"{trained}@400", tmp_path / "out"
    with pytest.raises(SystemExit) as status:
        main(["discover", "induction", "--model", name, "--method", "eap", "--edges", "9",
              "--n-prompts", "8", "--n-test", "8", "--out", str(out)])  # fmt: skip
    assert status.value.code == 0
    content = json.loads((out / "run.json").read_text())
    assert content["model"] == name
    assert content["model_info"]["name"] == name
    run = open_run(out)
    experiment, _ = reopen(run, run.settings())
    assert experiment.model.name == "run@400"
    assert torch.equal(experiment.model.W_U, weights(trained / "checkpoints" / "000400"))
    assert name in (acdc.report(out).html)
    shutil.rmtree(trained / "checkpoints")
    with pytest.raises(ModelError, match="has no step '400': it has 7, 50, 500"):
        reopen(run, run.settings())
