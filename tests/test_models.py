"""Loading models: what is read, and the one clear line for each thing that cannot be."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from acdc import models
from acdc.errors import DeviceError, InputError, ModelError, UnknownNameError, UnsupportedModelError
from acdc.models import BUNDLED, MODELS, load_model, resolve_device, resolve_dtype
from acdc.registry import Registry
from benchmarks.shortcuts import MODELS as SHORTCUTS

PARITY = ["ln2", "attn3"]
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def native(tmp_path: Path, data: Path) -> Path:
    """Return a copy of parity/ln2 that a test may spoil."""
    return Path(shutil.copytree(data / "parity" / "ln2", tmp_path / "ln2"))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Return a small Hugging Face folder without tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def logits(folder: Path, tokens: Tensor) -> Tensor:
    model, _ = load_model(str(folder))
    final = model.forward(tokens.long()).final
    assert final is not None
    return model.unembed(final)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path | str, error: type[Exception] = ModelError) -> str:
    """Return the message that a model is refused with; it is one line."""
    with pytest.raises(error) as caught:
        load_model(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what is read -------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARITY)
@pytest.mark.parametrize("side", ["clean", "corrupt"])
def test_parity_logits(name: str, side: str, data: Path) -> None:
    batch = load_file(data / "parity" / name / "batch.safetensors")
    got = logits(data / "parity" / name, batch[side])
    torch.testing.assert_close(got, batch[f"{side}_logits"], atol=1e-4, rtol=0)


def test_parity_shapes(data: Path) -> None:
    model, tokenizer = load_model(str(data / "parity" / "attn3"), split_qkv=False, split_embed=True)
    assert tokenizer is None
    assert model.name == "attn3"
    assert (model.d_model, model.d_vocab, model.n_ctx) == (48, 48, 16)
    shape = model.shape
    assert (shape.n_layers, shape.n_heads, shape.has_mlp) == (3, 4, False)
    assert (shape.split_qkv, shape.split_embed) == (False, True)


def test_unembedding_bias_is_not_dropped(native: Path) -> None:
    tokens = load_file(native / "batch.safetensors")["clean"]
    before = logits(native, tokens)
    edit_weights(native, lambda state: state["unembed.b_U"].add_(1.5))
    torch.testing.assert_close(logits(native, tokens), before + 1.5, atol=1e-4, rtol=0)


def test_pt_file(native: Path) -> None:
    batch = load_file(native / "batch.safetensors")
    torch.save(load_file(native / "model.safetensors"), native / "model.pt")
    (native / "model.safetensors").unlink()
    got = logits(native, batch["clean"])
    torch.testing.assert_close(got, batch["clean_logits"], atol=1e-4, rtol=0)


def test_masks_and_zero_biases_of_old_checkpoints_are_dropped(native: Path) -> None:
    batch = load_file(native / "batch.safetensors")
    edit_weights(native, lambda state: state["unembed.b_U"].zero_())
    before = logits(native, batch["clean"])

    def old(state: dict[str, Tensor]) -> None:
        state["blocks.0.attn.mask"] = torch.ones(16, 16).tril().bool()
        state["blocks.0.attn.IGNORE"] = torch.tensor(-1e5)
        state["blocks.0.mlp.b_gate"] = torch.zeros(96)
        del state["unembed.b_U"]

    edit_weights(native, old)
    assert torch.equal(logits(native, batch["clean"]), before)


def test_rotary_tables_must_be_the_models_own(native: Path) -> None:
    from acdc.models.lowering.weights import read_weights

    edit_config(native, positional_embedding_type="rotary", rotary_dim=4)
    angles = torch.outer(torch.arange(16.0), 10000.0 ** -torch.tensor([0, 0.5]))

    def tables(pairs: Tensor) -> Change:
        def change(state: dict[str, Tensor]) -> None:
            state.pop("pos_embed.W_pos", None)
            state["blocks.0.attn.rotary_cos"] = pairs.cos()
            state["blocks.0.attn.rotary_sin"] = pairs.sin()

        return change

    edit_weights(native, tables(angles.repeat_interleave(2, dim=1)))
    load_model(str(native))
    edit_weights(native, tables(angles.repeat(1, 2)))
    assert "rotary table 'blocks.0.attn.rotary_" in refusal(native)
    assert "blocks.0.attn.rotary_cos" in read_weights(native)[1]


def test_grouped_keys_with_and_without_underscore(native: Path) -> None:
    edit_config(native, n_key_value_heads=2)

    def halve(underscore: str) -> Change:
        def change(state: dict[str, Tensor]) -> None:
            for layer in range(2):
                for key in ("W_K", "W_V", "b_K", "b_V"):
                    value = state.pop(f"blocks.{layer}.attn.{key}")
                    state[f"blocks.{layer}.attn.{underscore}{key}"] = value[:2].contiguous()

        return change

    tokens = load_file(native / "batch.safetensors")["clean"]
    shutil.copytree(native, native.parent / "other")
    edit_weights(native, halve("_"))
    edit_weights(native.parent / "other", halve(""))
    assert torch.equal(logits(native, tokens), logits(native.parent / "other", tokens))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_types_of_native_models(dtype: str, data: Path) -> None:
    model, _ = load_model(str(data / "parity" / "ln2"), dtype=dtype)
    assert model.dtype is getattr(torch, dtype)
    assert model.layers[0].attention.W["q"].dtype is getattr(torch, dtype)


def test_tokenizers_are_read_beside_native_models(native: Path, data: Path) -> None:
    for file in (data / "gpt2-tokenizer").glob("tokenizer*"):
        shutil.copy(file, native)
    _, tokenizer = load_model(str(native))
    assert tokenizer is not None
    assert tokenizer.encode(" Mary", add_special_tokens=False) == [5335]


def test_a_text_is_encoded_once(native: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (data / "gpt2-tokenizer").glob("tokenizer*"):
        shutil.copy(file, native)
    _, tokenizer = load_model(str(native))
    assert tokenizer is not None
    first = tokenizer.encode("Mary and John")
    asked, inside = [], tokenizer.inside.encode  # type: ignore[attr-defined]

    def encode(text: str, **options: Any) -> Any:
        asked.append(text)
        return inside(text, **options)

    monkeypatch.setattr(tokenizer.inside, "encode", encode)  # type: ignore[attr-defined]
    again = tokenizer.encode("Mary and John")
    assert again == first
    again.clear()  # what a caller does with its own changes nothing
    assert tokenizer.encode("Mary and John") == first == inside("Mary and John")
    assert asked == []
    assert tokenizer.encode("Mary and John", add_special_tokens=False) == first
    assert tokenizer.encode(" Mary") == [5335]
    assert asked == ["Mary and John", " Mary"]


def test_hugging_face_folder_without_tokenizer(llama: Path) -> None:
    model, tokenizer = load_model(str(llama))
    assert tokenizer is None
    assert model.name == "llama"
    assert model.shape.n_layers == 2


def test_masks_of_old_hugging_face_checkpoints_are_dropped(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    with torch.random.fork_rng(devices=[]):
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    mask = torch.ones(1, 1, 8, 8).tril()
    edit_weights(tmp_path, lambda state: state.update({"transformer.h.0.attn.bias": mask}))
    load_model(str(tmp_path))


def test_global_state_is_left_alone(
    llama: Path, native: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    edit_config(native, seed=3)
    states = (torch.get_rng_state(), logging.get_verbosity(), logging.is_progress_bar_enabled())
    for folder in (llama, native):
        load_model(str(folder))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == states[1:]
    assert capfd.readouterr() == ("", "")  # no progress bars, no warnings


def test_transformer_lens_is_imported_late() -> None:
    code = "import sys, acdc.models; sys.exit('transformer_lens' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", sorted({*BUNDLED, *SHORTCUTS}))
def test_bundled_models_load(name: str) -> None:
    model, tokenizer = load_model(name)
    assert model.name == name
    assert tokenizer is not None
    assert len(tokenizer) <= model.d_vocab  # type: ignore[arg-type]


@pytest.mark.online
def test_hub_model() -> None:
    model, tokenizer = load_model("gpt2")
    ids = torch.tensor([tokenizer.encode("The capital of France is the city of")])
    final = model.forward(ids).final
    assert tokenizer.decode(model.unembed(final)[0, -1].argmax()) == " Paris"


# --- names, devices, types ----------------------------------------------------------------


def test_unknown_names(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    folders = {"ioi-small": data, "docstring-small": data}
    known = Registry("model", Path, "none.such", known=folders)
    monkeypatch.setattr(models, "MODELS", known)
    message = refusal("ioi-smal", UnknownNameError)
    assert message == (
        "unknown model 'ioi-smal': did you mean ioi-small, docstring-small, a folder, or a name "
        "on the Hugging Face hub as EleutherAI/pythia-70m?"
    )
    message = refusal("xyz", UnknownNameError)
    assert message.startswith("unknown model 'xyz': known: docstring-small, ioi-small, a folder, o")


def test_bundled_names_win(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    known = Registry("model", Path, "none.such", known={"small": data / "parity" / "ln2"})
    monkeypatch.setattr(models, "MODELS", known)
    assert load_model("small")[0].name == "ln2"


def test_folders_that_are_none(tmp_path: Path, data: Path) -> None:
    assert refusal(tmp_path / "no") == f"model '{tmp_path / 'no'}': there is no such folder"
    file = data / "parity" / "ln2" / "config.json"
    assert refusal(file) == f"model '{file}' is a file: give the folder with its config.json"
    assert refusal(tmp_path) == f"{tmp_path} is no model folder: it has no config.json"


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/pythia-70m"])
def test_hub_out_of_reach(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal(name)
    assert message.startswith(f"model '{name}': no such folder, and the Hugging Face hub is out")
    assert "HF_HUB_OFFLINE is set" in message


def test_devices_that_are_not_there(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    folder = str(data / "parity" / "ln2")
    for device in ("cuda", "cuda:1", "mps"):
        with pytest.raises(DeviceError) as caught:
            load_model(folder, device=device)
        assert str(caught.value) == f"device '{device}' is not there: this machine has cpu"
    for device in ("gpu", "meta", ""):
        with pytest.raises(DeviceError) as caught:
            load_model(folder, device=device)
        assert str(caught.value) == (
            f"unknown device '{device}': expected cpu, cuda, cuda:N, mps, several as "
            "cuda:0,cuda:1, or auto; this machine has cpu"
        )
    assert resolve_device("cpu") == torch.device("cpu")


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match="'cuda:2' is not there: this machine has cpu, cuda:0"):
        resolve_device("cuda:2")
    with pytest.raises(DeviceError, match="'mps' has no float64"):
        load_model(str(data / "parity" / "ln2"), device="mps", dtype="float64")


def test_unknown_type(data: Path) -> None:
    with pytest.raises(DeviceError, match="unknown dtype 'float8': expected one of float32, "):
        load_model(str(data / "parity" / "ln2"), dtype="float8")
    assert resolve_dtype("bfloat16") is torch.bfloat16


# --- native folders that cannot be used ---------------------------------------------------

_SPOILT: dict[str, tuple[Change, str]] = {
    "missing": (
        lambda s: s.pop("blocks.1.attn.b_O"),
        "it lacks 'blocks.1.attn.b_O', expected with shape [48]",
    ),
    "first missing of many": (
        lambda s: [s.pop(k) for k in list(s) if "blocks.1" in k],
        "it lacks 'blocks.1.ln1.w', expected with shape [48]",
    ),
    "shape": (
        lambda s: s.update({"blocks.0.mlp.W_in": torch.zeros(96, 48)}),
        "'blocks.0.mlp.W_in' has shape [96, 48], expected [48, 96]",
    ),
    "heads": (
        lambda s: s.update({"blocks.0.attn.W_Q": torch.zeros(6, 48, 8)}),
        "'blocks.0.attn.W_Q' has shape [6, 48, 8], expected [4, 48, 12]",
    ),
    "extra": (
        lambda s: s.update({"blocks.2.attn.W_Q": torch.zeros(4, 48, 12)}),
        "it holds 'blocks.2.attn.W_Q' of shape [4, 48, 12], which the config does not describe",
    ),
    "extra bias": (
        lambda s: s.update({"blocks.1.mlp.b_gate": torch.ones(96)}),
        "it holds 'blocks.1.mlp.b_gate' of shape [96], which the config does not describe",
    ),
}


@pytest.mark.parametrize("kind", _SPOILT)
def test_weights_that_do_not_match(kind: str, native: Path) -> None:
    change, words = _SPOILT[kind]
    edit_weights(native, change)
    expected = f"{native / 'model.safetensors'} does not match its config: {words}"
    assert refusal(native) == expected


def test_config_that_does_not_match(native: Path) -> None:
    edit_config(native, n_ctx=20)
    assert "'pos_embed.W_pos' has shape [16, 48], expected [20, 48]" in refusal(native)


def test_truncated_weights(native: Path) -> None:
    path = native / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert refusal(native).startswith(f"{path} is no readable safetensors file: ")
    path.unlink()
    assert refusal(native) == (
        f"{native}: no weights; expected model.safetensors or model.pt there"
    )


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            _Evil(),
            "cannot be read as plain tensors: it is truncated or damaged, or holds other objects",
        ),
        ([torch.zeros(2)], "holds a list; expected a dict of tensors"),
        ({"epoch": 3}, "entry 'epoch' is a int; expected only tensors by name"),
    ],
    ids=["code", "list", "number"],
)
def test_pt_files_that_are_refused(
    value: Any, words: str, native: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (native / "model.safetensors").unlink()
    torch.save(value, native / "model.pt")
    message = refusal(native)
    assert message.startswith(str(native / "model.pt"))
    assert words in message
    assert "executed" not in capfd.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps(print)])
def test_pt_files_that_are_none(content: bytes, native: Path) -> None:
    (native / "model.safetensors").unlink()
    (native / "model.pt").write_bytes(content)
    assert refusal(native).startswith(f"{native / 'model.pt'} cannot be read as plain tensors")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"d_model": 48, ', ": no JSON that can be read ("),
        ("", ": no JSON that can be read ("),
        ("[1, 2]", " holds a list: expected a JSON object"),
        ('{"a": 1}', " describes no model: expected Hugging Face's model_type, or the fields of"),
    ],
)
def test_malformed_config(text: str, words: str, native: Path) -> None:
    (native / "config.json").write_text(text)
    message = refusal(native)
    assert message.startswith(f"{native / 'config.json'}{words}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_heads": None}, "n_heads is None, expected a whole number of at least 1"),
        ({"d_head": "12"}, "d_head is '12', expected a whole number of at least 1"),
        ({"n_ctx": 0}, "n_ctx is 0, expected a whole number of at least 1"),
        ({"colour": 1}, "describes no native TransformerLens model: "),
        ({"act_fn": "tanhexp"}, "describes no native TransformerLens model: "),
        ({"attn_scale": 1.0}, "describes no native TransformerLens model: attn_scale=1.0"),
        ({"positional_embedding_type": "alibi"}, "describes no native TransformerLens model: "),
    ],
)
def test_config_fields_that_make_no_model(
    changes: dict[str, Any], words: str, native: Path
) -> None:
    edit_config(native, **changes)
    message = refusal(native)
    assert message.startswith(str(native / "config.json"))
    assert words in message


@pytest.mark.parametrize("key", ["parallel_attn_mlp", "use_local_attn", "use_qk_norm"])
def test_fields_that_native_models_would_ignore_are_refused(key: str, native: Path) -> None:
    edit_config(native, **{key: True})
    message = refusal(native, UnsupportedModelError)
    assert message.endswith(f"{key}=True is not supported in native models, only {key}=False")


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"model": ', ": no JSON that can be read ("), ("{}", " is no tokenizer: ")],
)
def test_malformed_tokenizer(text: str, words: str, native: Path, llama: Path) -> None:
    for folder in (native, llama):
        (folder / "tokenizer.json").write_text(text)
        assert refusal(folder).startswith(f"{folder / 'tokenizer.json'}{words}")


# --- Hugging Face folders that cannot be used ---------------------------------------------


def test_hugging_face_weights_that_do_not_match(llama: Path) -> None:
    start = f"model '{llama}': the weights do not match config.json: "
    copy = Path(shutil.copytree(llama, llama.parent / "copy"))
    edit_weights(llama, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    assert refusal(llama) == start + "'model.layers.1.mlp.up_proj.weight' is missing"
    edit_config(copy, intermediate_size=20)
    assert refusal(copy).endswith(
        "'model.layers.0.mlp.down_proj.weight' has shape [16, 16], expected [16, 20]"
    )
    edit_config(copy, intermediate_size=16, num_hidden_layers=1)
    message = refusal(copy)
    assert "'model.layers.1." in message
    assert message.endswith("is there, but no part of the model")


def test_hugging_face_weights_that_are_not_there(llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(llama).startswith(f"model '{llama}': no usable weights: ")
    path.unlink()
    assert refusal(llama).startswith(f"model '{llama}': no usable weights: ")


def test_hugging_face_bin_file(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    path = llama / "pytorch_model.bin"
    torch.save(state, path)
    load_model(str(llama))
    torch.save(state | {"x": _Evil()}, path)
    words = f"model '{llama}': its .bin file cannot be read as plain tensors: "
    assert refusal(llama).startswith(words)
    for junk in (b"", b"junk", b"no checkpoint at all"):
        path.write_bytes(junk)
        assert refusal(llama).startswith(f"model '{llama}': ")
    assert "executed" not in capfd.readouterr().out


def test_hugging_face_config_that_makes_no_model(llama: Path) -> None:
    edit_config(llama, hidden_size="wide")
    assert refusal(llama).startswith(f"model '{llama}': no usable config.json: ")
    edit_config(llama, model_type="nothing", architectures=["NothingForCausalLM"])
    assert refusal(llama).startswith(f"model '{llama}': no usable config.json: ")


def test_remote_code_needs_the_users_word(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (llama / "own.py").write_text(
        "from transformers import PretrainedConfig\n"
        "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    )
    edit_config(
        llama,
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    )
    assert refusal(llama) == (
        f"model '{llama}' wants to run Python code of its own; pass --trust-remote-code if you "
        "trust it"
    )
    with pytest.raises(UnsupportedModelError, match="architecture 'OwnForCausalLM' is not"):
        load_model(str(llama), trust_remote_code=True)


# --- configurations that make no model ----------------------------------------------------

_HF_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "rope_theta null": ({"rope_theta": None}, "rope_theta is None, expected a finite number above"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number"),
    "architectures": ({"architectures": 1}, "architectures is 1, expected a list of names"),
    "model_type": ({"model_type": ["llama"]}, "model_type is ['llama'], expected a text"),
    "eps null": ({"rms_norm_eps": None}, "rms_norm_eps is None, expected a finite number"),
    "eps infinite": ({"rms_norm_eps": math.inf}, "rms_norm_eps is inf, expected a finite number"),
    "context": (
        {"max_position_embeddings": 10**9},
        "max_position_embeddings is 1000000000, expected a whole number from 1 to 134,217,728",
    ),
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a whole"),
    "many layers": ({"num_hidden_layers": 999}, "num_hidden_layers is 999, but there are only"),
    "vocabulary": ({"vocab_size": 10**9}, "vocab_size is 1,000,000,000, but the weights hold only"),
    "product": (
        {"hidden_size": 4000, "intermediate_size": 4000, "head_dim": 8},
        "it describes 96,9",
    ),
    "shared heads": ({"num_key_value_heads": 3}, "2 heads cannot share 3 key-value heads evenly"),
    "odd rotation": (
        {"head_dim": 6, "partial_rotary_factor": 0.5},
        "3 of 6 dimensions of a head are rotated, expected an even number",
    ),
    "function": ({"hidden_act": "tanhexp"}, "tanhexp"),
    "function number": ({"hidden_act": 1}, "hidden_act is 1, expected a text"),
    "scaling": ({"rope_scaling": {"type": "longrope"}}, "type is 'longrope', expected one of de"),
    "scaling without factor": (
        {"rope_scaling": {"rope_type": "linear"}},
        "rope_scaling has no factor, which 'linear' needs",
    ),
    "quantised": (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config is there, which is not supported",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", _HF_FIELDS)
def test_hugging_face_fields_that_make_no_model(kind: str, llama: Path) -> None:
    changes, words = _HF_FIELDS[kind]
    edit_config(llama, **changes)
    message = refusal(llama)
    assert message.startswith(f"model '{llama}': no usable config.json: ")
    assert words in message


_SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
_GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
_NEO = {"vocab_size": 50, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
_FULL, _WINDOW = "full_attention", "sliding_attention"
_OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "kinds": ("gpt_neo", _NEO | {"attention_types": 3}, "attention_types is 3, expected a list as"),
    "many kinds": (
        "gpt_neo",
        _NEO | {"attention_types": [[["global"], 10**9]]},
        "attention_types is [[['global'], 1000000000]], expected a list as",
    ),
    "layers": (
        "gpt_neo",
        _NEO | {"attention_layers": ["global", "locally"]},
        "attention_layers is ['global', 'locally'], expected a list of global and local",
    ),
    "few kinds": (
        "qwen2", _SMALL | {"layer_types": [_FULL]}, "must be equal to the number of"
    ),
    "no window": (
        "qwen2",
        _SMALL | {"layer_types": [_FULL, _WINDOW], "sliding_window": None},
        "layers are of the kind sliding_attention without sliding_window",
    ),
    "scale": (
        "gemma2", _SMALL | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, expected"
    ),
    "both ways": (
        "gemma2",
        _SMALL | {"use_bidirectional_attention": True},
        "use_bidirectional_attention is True, expected false",
    ),
    "heads": ("gpt2", _GPT2 | {"n_head": 3}, "3 heads cannot share a width of 16 evenly"),
    "cross": (
        "gpt2", _GPT2 | {"add_cross_attention": True}, "add_cross_attention is True, expected"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", _OTHERS)
def test_fields_of_other_families(kind: str, tmp_path: Path) -> None:
    family, config, words = _OTHERS[kind]
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": family}))
    save_file({str(i): torch.zeros(1000) for i in range(20)}, tmp_path / "model.safetensors")
    message = refusal(tmp_path)
    assert message.startswith(f"model '{tmp_path}': no usable config.json: ")
    assert words in message


def test_fields_that_say_nothing_about_logits_are_left_alone(llama: Path) -> None:
    tokens = torch.arange(12)[None]
    before = logits(llama, tokens)
    edit_config(
        llama, dtype="", torch_dtype=3, attention_dropout="much", pad_token_id=10**9, use_cache=[],
        id2label=4, return_dict=False, to_dict="x", n_embd=7, text_config={"a": 1},
        attn_implementation="flash_attention_2", transformers_weights="..",
    )  # fmt: skip
    for name in ("generation_config.json", "adapter_config.json"):
        (llama / name).write_text("null")
    assert torch.equal(logits(llama, tokens), before)


def test_a_long_context_takes_no_memory(llama: Path) -> None:
    edit_config(llama, max_position_embeddings=10**8)
    model, _ = load_model(str(llama))
    assert model.n_ctx == (1 << 24) // 8
    rotary = model.layers[0].attention.rotary
    assert rotary is not None
    assert rotary.cos.shape == (model.n_ctx, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"act_fn": 1}, "act_fn is 1, expected a text"),
        ({"eps": None}, "eps is None, expected a finite number of at least 0"),
        ({"rotary_base": math.inf}, "rotary_base is inf, expected a finite number above 0"),
        ({"d_mlp": -96}, "d_mlp is -96, expected a whole number of at least 1, or null"),
        ({"n_ctx": 10**9}, "n_ctx is 1,000,000,000, expected at most 1,048,576"),
        (
            {"n_ctx": 10**5, "positional_embedding_type": "rotary"},
            "masks and tables of its context would take 19,0",
        ),
        ({"n_layers": 10**9}, "n_layers is 1,000,000,000, but model.safetensors has only 38"),
        ({"d_vocab": 10**9}, "it describes 96,000,0"),
        ({"rotary_dim": 14}, "rotary_dim is 14, expected at most d_head (12)"),
        ({"attention_dir": "forth"}, "attention_dir is 'forth', expected one of causal, bidir"),
        ({"attn_only": "no"}, "attn_only is 'no', expected true or false"),
        ({"d_modle": 3}, "'d_modle' is none of its fields; did you mean d_model"),
    ],
)
def test_native_fields_that_make_no_model(
    changes: dict[str, Any], words: str, native: Path
) -> None:
    edit_config(native, **changes)
    message = refusal(native)
    assert message.startswith(str(native / "config.json"))
    assert words in message


# --- weights that are no numbers of a model -----------------------------------------------


@pytest.mark.parametrize("dtype", ["int32", "int8", "bool", "complex64", "float8_e4m3fn"])
def test_hugging_face_weights_of_other_types(dtype: str, llama: Path) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    edit_weights(llama, lambda s: s.update({key: s[key].to(getattr(torch, dtype))}))
    assert refusal(llama) == (
        f"model '{llama}': no usable weights: {key!r} is stored as {dtype}, expected one of "
        "float32, float64, float16, bfloat16"
    )


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "int64", "bool"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_native_weights_of_other_types(dtype: str, suffix: str, native: Path) -> None:
    state = load_file(native / "model.safetensors")
    state["blocks.0.mlp.W_in"] = state["blocks.0.mlp.W_in"].to(getattr(torch, dtype))
    path = native / f"model.{suffix}"
    (native / "model.safetensors").unlink()
    if suffix == "pt":
        torch.save(state, path)
    elif dtype != "complex128":  # which safetensors cannot store
        save_file(state, path)
    else:
        pytest.skip("safetensors has no complex128")
    assert refusal(native).startswith(f"{path}: 'blocks.0.mlp.W_in' is stored as {dtype}, expected")


def test_weights_of_other_floating_types_are_read(llama: Path) -> None:
    tokens = torch.arange(12)[None]
    before = logits(llama, tokens)

    def halve(state: dict[str, Tensor]) -> None:
        for i, (key, value) in enumerate(sorted(state.items())):
            state[key] = value.to((torch.float64, torch.bfloat16, torch.float16)[i % 3])

    edit_weights(llama, halve)
    torch.testing.assert_close(logits(llama, tokens), before, atol=0.01, rtol=0.1)


def test_pt_weights_that_require_gradients(native: Path) -> None:
    batch = load_file(native / "batch.safetensors")
    state = load_file(native / "model.safetensors")
    torch.save({k: torch.nn.Parameter(v) for k, v in state.items()}, native / "model.pt")
    (native / "model.safetensors").unlink()
    got = logits(native, batch["clean"])
    assert not got.requires_grad
    torch.testing.assert_close(got, batch["clean_logits"], atol=1e-4, rtol=0)


def test_weights_in_parts(llama: Path, tmp_path: Path) -> None:
    tokens = torch.arange(12)[None]
    before = logits(llama, tokens)
    state = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    parts = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(state)}
    for part in set(parts.values()):
        save_file({k: v for k, v in state.items() if parts[k] == part}, llama / part)
    index = llama / "model.safetensors.index.json"

    def listed(weight_map: Any) -> None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    listed(parts)
    assert torch.equal(logits(llama, tokens), before)
    (tmp_path / "out.safetensors").write_bytes((llama / "part-0.safetensors").read_bytes())
    for name, words in (
        ("../out.safetensors", "lists '../out.safetensors', expected names of files beside it"),
        ("part-9.safetensors", "lists 'part-9.safetensors', which is not there"),
        ("/etc/passwd", "lists '/etc/passwd', expected names of files beside it"),
    ):
        listed(parts | {"x": name})
        assert words in refusal(llama)
    listed(3)
    assert "model.safetensors.index.json has no 'weight_map'" in refusal(llama)
    save_file(dict(list(state.items())[:1]), llama / "part-2.safetensors")
    listed(parts | {"x": "part-2.safetensors"})
    assert "stands in two files" in refusal(llama)


def test_names_of_the_hubs_gpt2(tmp_path: Path) -> None:
    """Its file says ``h.0.ln_1.weight`` where the model has ``transformer.h.0.ln_1.weight``."""
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    with torch.random.fork_rng(devices=[]):
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokens = torch.arange(8)[None]
    before = logits(tmp_path, tokens)

    def strip(state: dict[str, Tensor]) -> None:
        for key in list(state):
            state[key.removeprefix("transformer.")] = state.pop(key)

    edit_weights(tmp_path, strip)
    assert torch.equal(logits(tmp_path, tokens), before)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_files_that_are_none(file: str, kind: str, llama: Path, native: Path) -> None:
    for folder in (llama, native):
        path = folder / file
        path.unlink(missing_ok=True)
        if kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
        message = refusal(folder)
        assert str(path) in message
        assert "it is a folder" in message or "it is a device, pipe or socket" in message


# --- tokenizers ---------------------------------------------------------------------------


@pytest.fixture
def tokenized(llama: Path, data: Path) -> Path:
    """Return a Hugging Face folder with a small tokenizer."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS["ioi-small"] / file, llama)
    return llama


def edit_json(path: Path, change: Change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


_TOKENIZERS: dict[str, tuple[Change, str]] = {
    "vocabulary": (lambda t: t["model"].update(vocab=3), "neither ids by text nor texts with sco"),
    "id": (
        lambda t: t["model"]["vocab"].update(Adam=10**12),
        "'Adam' has the id 1000000000000, ex",
    ),
    "negative id": (
        lambda t: t["model"]["vocab"].update(Adam=-1),
        "'Adam' has the id -1, expected",
    ),
    "kind": (lambda t: t["model"].update(type="Bigram"), "type is 'Bigram', expected one of BPE"),
    "added": (lambda t: t.update(added_tokens=[{"id": 1}]), "added_tokens is no list of tokens"),
    "split": (lambda t: t["pre_tokenizer"].update(type=[1]), "no usable tokenizer: "),
    "pattern": (
        lambda t: t["pre_tokenizer"].update(pattern={"Regex": "(("}),
        "no usable tokenizer",
    ),
    "version": (lambda t: t.update(version="9"), "no usable tokenizer: "),
    "padding": (lambda t: t.update(padding="all"), "no usable tokenizer: "),
}


@pytest.mark.parametrize("kind", _TOKENIZERS)
def test_damaged_tokenizers(kind: str, tokenized: Path) -> None:
    change, words = _TOKENIZERS[kind]
    edit_json(tokenized / "tokenizer.json", change)
    message = refusal(tokenized)
    assert str(tokenized) in message
    assert words in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bos_token": 3}, "bos_token is 3, expected a text or a token"),
        ({"eos_token": ["a"]}, "eos_token is ['a'], expected a text or a token"),
        ({"unk_token": {"content": 1}}, "unk_token is {'content': 1}, expected a text or a token"),
        ({"pad_token": {"text": "a"}}, "pad_token is {'text': 'a'}, expected a text or a token"),
        (
            {"additional_special_tokens": [1]},
            "additional_special_tokens is [1], expected a list of",
        ),
        ({"added_tokens_decoder": {"a": {"content": "b"}}}, "added_tokens_decoder is {'a': {'con"),
        ({"added_tokens_decoder": {"9" * 99: {"content": "b"}}}, "added_tokens_decoder is {'999"),
        ({"add_prefix_space": "yes"}, "add_prefix_space is 'yes', expected true or false"),
        ({"tokenizer_class": 1}, "tokenizer_class is 1, expected a text"),
    ],
)
def test_settings_of_tokenizers(settings: dict[str, Any], words: str, tokenized: Path) -> None:
    edit_json(tokenized / "tokenizer_config.json", lambda value: value.update(settings))
    message = refusal(tokenized)
    assert message.startswith(str(tokenized / "tokenizer_config.json"))
    assert words in message


def test_merges_that_do_not_go_on_as_they_should(tokenized: Path) -> None:
    """The library under transformers cuts a prefix off them without a look."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    edit_json(
        tokenized / "tokenizer.json",
        lambda t: t.update(model=model | {"continuing_subword_prefix": "####"}, added_tokens=[]),
    )
    assert "continuing_subword_prefix is '####', with which not every merge" in refusal(tokenized)


def test_settings_that_no_text_needs_are_left_alone(tokenized: Path) -> None:
    edit_json(
        tokenized / "tokenizer_config.json",
        lambda value: value.update(
            encode="x", gguf_file="/etc/passwd", chat_template=3, init_inputs=[1, 2],
            auto_map={"AutoTokenizer": ["own.Own", None]}, model_max_length="long", vocab_file="/",
        ),
    )  # fmt: skip
    (tokenized / "chat_template.jinja").symlink_to("/dev/zero")
    _, tokenizer = load_model(str(tokenized))
    _, plain = load_model("ioi-small")
    assert tokenizer is not None
    assert plain is not None
    text = "After Mary and Alice"
    assert tokenizer.encode(text) == plain.encode(text)


def test_special_tokens_of_older_folders(tokenized: Path) -> None:
    path = tokenized / "special_tokens_map.json"
    path.write_text(json.dumps({"bos_token": {"content": "<pad>", "lstrip": False}}))
    (tokenized / "added_tokens.json").write_text(json.dumps({"<pad>": 1}))
    _, tokenizer = load_model(str(tokenized))
    assert tokenizer is not None
    assert tokenizer.bos_token_id == 1
    path.write_text(json.dumps({"bos_token": 3}))
    assert refusal(tokenized).startswith(f"{path}: bos_token is 3, expected a text or a token")
    path.write_text("{}")
    (tokenized / "added_tokens.json").write_text(json.dumps({"<pad>": "one"}))
    assert "'<pad>' has the id 'one', expected a whole number" in refusal(tokenized)


def test_no_padding_and_no_truncation_whatever_a_tokenizer_says(tokenized: Path) -> None:
    text = "After Mary and Alice went"
    _, plain = load_model(str(tokenized))
    edit_json(
        tokenized / "tokenizer.json",
        lambda t: t.update(
            padding={"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None,
                     "pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"},
            truncation={"max_length": 2, "strategy": "LongestFirst", "stride": 0,
                        "direction": "Right"},
        ),
    )  # fmt: skip
    _, tokenizer = load_model(str(tokenized))
    assert plain is not None
    assert tokenizer is not None
    expected = plain.encode(text, add_special_tokens=False)
    assert len(expected) > 2
    assert tokenizer.encode(text, add_special_tokens=False) == expected


def test_a_word_that_the_tokenizer_lacks(tokenized: Path) -> None:
    """Without a token for unknown words a tokenizer of words can only refuse them."""
    edit_json(tokenized / "tokenizer.json", lambda t: t["model"].update(unk_token="<none>"))
    _, tokenizer = load_model(str(tokenized))
    assert tokenizer is not None
    assert tokenizer.encode("Mary")
    with pytest.raises(ModelError, match=r"its tokenizer cannot encode 'Zaphod': .*UNK"):
        tokenizer.encode("Zaphod")


def test_a_pattern_that_backtracks_for_ever(tokenized: Path) -> None:
    pattern = {"Regex": "(a+)+b"}
    edit_json(tokenized / "tokenizer.json", lambda t: t["pre_tokenizer"].update(pattern=pattern))
    _, tokenizer = load_model(str(tokenized))
    assert tokenizer is not None
    with pytest.raises(ModelError, match=r"its tokenizer cannot encode .aaa.*retry-limit"):
        tokenizer.encode("a" * 40 + "!")


def test_a_tokenizer_with_code_of_its_own(tokenized: Path) -> None:
    (tokenized / "tokenizer.json").unlink()
    (tokenized / "vocab.txt").write_text("a\nb\n")
    edit_json(
        tokenized / "tokenizer_config.json",
        lambda value: value.update(auto_map={"AutoTokenizer": ["own.Own", None]}),
    )
    assert "its tokenizer wants to run Python code of its own; pass --trust" in refusal(tokenized)


# --- names and devices --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("~nouser", "model '~nouser': there is no such home folder"),
        ("~nouser/model", "model '~nouser/model': there is no such home folder"),
        ("a\0b", "'a\\x00b'"),
        ("a" * 5000, "aaa"),
        ("a/" + "b" * 5000, "bbb"),
        ("\udc80", "'\\udc80'"),
    ],
)
def test_names_that_no_folder_has(name: str, words: str) -> None:
    assert words in refusal(name, InputError)


@pytest.mark.parametrize(
    ("version", "works"),
    [
        ("2.6.0", False),
        ("2.8.0", False),
        ("2.8.0a0+git1", False),
        ("2.9.0", True),
        ("2.13.0", True),
    ],
)
def test_mps_of_a_torch_that_computes_wrong_numbers(
    version: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "__version__", version)
    if works:
        assert resolve_device("mps") == torch.device("mps")
        return
    with pytest.raises(DeviceError) as caught:
        resolve_device("mps")
    assert str(caught.value) == (
        f"device 'mps': torch {version} computes wrong numbers on it; update torch to 2.9 or "
        "later, or choose cpu"
    )


# --- repositories of the hub --------------------------------------------------------------


@pytest.fixture
def hub(tokenized: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the hub serve a folder as any repository; return the files that were asked for."""
    from huggingface_hub.errors import EntryNotFoundError

    asked: list[str] = []

    def download(repository: str, name: str, **options: Any) -> str:
        asked.append(name)
        if not (tokenized / name).exists():
            raise EntryNotFoundError(name)
        return str(tokenized / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


def test_a_model_of_the_hub_is_its_folder(hub: list[str], tokenized: Path) -> None:
    model, tokenizer = load_model("owner/name")
    assert model.name == "owner/name"
    tokens = torch.arange(12)[None]
    final = model.forward(tokens).final
    assert final is not None
    assert torch.equal(model.unembed(final), logits(tokenized, tokens))
    assert tokenizer is not None
    assert tokenizer.encode("Mary")
    assert hub[0] == "config.json"
    assert {"model.safetensors", "tokenizer.json", "added_tokens.json"} <= set(hub)
    assert "pytorch_model.bin" not in hub


def test_what_is_wrong_with_a_model_of_the_hub(hub: list[str], tokenized: Path) -> None:
    edit_config(tokenized, max_position_embeddings=0)
    assert refusal("owner/name").startswith("model 'owner/name': no usable config.json: max_posit")
    edit_config(tokenized, max_position_embeddings=32)
    (tokenized / "model.safetensors").unlink()
    assert refusal("owner/name").startswith("model 'owner/name': no usable weights: neither model.")
    (tokenized / "config.json").unlink()
    assert refusal("owner/name").startswith("model 'owner/name': no such folder, and the Hugging ")


def test_a_hub_out_of_reach_is_no_file_that_is_missing(
    hub: list[str], tokenized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Online a tokenizer that could not be downloaded must not count as none."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(repository: str, name: str, **options: Any) -> str:
        if name != "tokenizer.json":
            return str(tokenized / name)
        raise LocalEntryNotFoundError(name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    assert "model 'owner/name': no such folder, and the Hugging Face hub is out of reach; give" in (
        refusal("owner/name")
    )
