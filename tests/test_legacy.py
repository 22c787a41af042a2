"""Repositories of the hub in TransformerLens' own old layout, played by a local folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from acdc.errors import ModelError
from acdc.models import load_model


@pytest.fixture
def repository(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The attention-only parity model as such a repository; the hub serves this folder."""
    config = json.loads((data / "parity" / "attn3" / "config.json").read_text())
    sizes = {key: config[key] for key in ("n_layers", "d_model", "d_head", "n_heads", "d_vocab")}
    old = {**sizes, "n_ctx": config["n_ctx"], "d_mlp": 4 * config["d_model"], "act_fn": "gelu"}
    old |= {"normalization": config["normalization_type"], "attn_only": True}
    (tmp_path / "config.json").write_text(json.dumps(old))
    state = load_file(data / "parity" / "attn3" / "model.safetensors")
    torch.save(state, tmp_path / "toy_final.pth")

    def download(repo: str, name: str) -> str:
        return str(tmp_path / name)

    def files(self: Any, repo: str) -> list[str]:
        return [path.name for path in tmp_path.iterdir()]

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", files)
    return tmp_path


def test_logits_are_those_of_the_model(repository: Path, data: Path) -> None:
    model, tokenizer = load_model("NeelNanda/Toy")
    batch = load_file(data / "parity" / "attn3" / "batch.safetensors")
    final = model.forward(batch["clean"]).final
    assert final is not None
    torch.testing.assert_close(
        model.unembed(final[:, -1]), batch["clean_logits"][:, -1], atol=1e-4, rtol=1e-4
    )
    assert tokenizer is None
    assert (model.shape.n_layers, model.shape.has_mlp) == (3, False)


def test_what_the_native_model_lacks_is_refused_by_name(repository: Path) -> None:
    config = json.loads((repository / "config.json").read_text())
    (repository / "config.json").write_text(json.dumps(config | {"shortformer_pos": True}))
    with pytest.raises(ModelError, match=r"NeelNanda/Toy.*shortformer"):
        load_model("NeelNanda/Toy")


def test_no_weights(repository: Path) -> None:
    (repository / "toy_final.pth").unlink()
    with pytest.raises(ModelError, match=r"NeelNanda/Toy.*final\.pth"):
        load_model("NeelNanda/Toy")


def test_out_of_reach() -> None:
    with pytest.raises(ModelError, match="the Hugging Face hub is out of reach") as caught:
        load_model("NeelNanda/Attn_Only_4L512W_C4_Code")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_model": "wide"}, "d_model is 'wide', expected a whole number of at least 1"),
        ({"n_layers": 10**9}, "n_layers is 1,000,000,000, more than the weights can have"),
        ({"d_vocab": 10**9}, "d_vocab is 1,000,000,000, more than the weights can have"),
        ({"n_heads": 0}, "n_heads is 0, expected a whole number of at least 1"),
        ({"act_fn": 1}, "act_fn is 1, expected a text"),
    ],
)
def test_configurations_that_make_no_model(
    changes: dict[str, Any], words: str, repository: Path
) -> None:
    config = json.loads((repository / "config.json").read_text())
    (repository / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError) as caught:
        load_model("NeelNanda/Toy")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"embed.W_E": torch.eye(3).to_sparse()}, "entry 'embed.W_E' is a sparse tensor"),
        ({"embed.W_E": torch.zeros(3, dtype=torch.complex64)}, "is stored as complex64, expected"),
        ([torch.zeros(3)], "the .pth file holds something else than tensors by name"),
        ({"embed.W_E": print}, "it is truncated or damaged, or holds other objects"),
    ],
)
def test_weights_that_are_none(value: Any, words: str, repository: Path) -> None:
    torch.save(value, repository / "toy_final.pth")
    with pytest.raises(ModelError) as caught:
        load_model("NeelNanda/Toy")
    assert words in str(caught.value)
