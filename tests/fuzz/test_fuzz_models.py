"""The doors through which models, tokenizers and dictionaries come in, tried."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import transformers
from harness import MANY, QUICK, Door, damaged_bytes, damaged_json, damaged_values, fuzz
from huggingface_hub.errors import StrictDataclassError
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_lowering import build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from acdc.dictionaries import Dictionary, read_dictionary
from acdc.errors import ModelError
from acdc.files.pickled import read_pt
from acdc.models import MODELS, load_model
from acdc.models.folder import ModelFolder
from acdc.models.lowering import LoweredModel
from acdc.models.tokenizer import TextTokenizer, read_native_tokenizer, read_tokenizer

Damaged = Callable[[Sequence[bytes]], st.SearchStrategy[bytes]]

DATA = Path(__file__).parents[1] / "data"
FAMILIES = (
    "gpt2", "gpt-neo", "neox-parallel", "llama", "mistral", "qwen2-window", "qwen3", "gemma2",
)  # fmt: skip
DICTIONARIES = ("standard", "topk-rescale", "jumprelu_transcoder", "gated-layernorm")
TOKENS = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(1))
TEXTS = ["The cat, who sat on the mat; 12 cats, and a rat.", "", "é ✓ \n\tend", "a" * 50]


def own(folder: Path) -> Path:
    """Return a copy of a folder for one door, which puts damaged files there."""
    return Path(shutil.copytree(folder, Path(mkdtemp(prefix="fuzz-")) / "copy"))


# --- models -------------------------------------------------------------------------------


@cache
def model_folder(family: str, weights: str = "model.safetensors") -> Path:
    """Return a folder of a small model that is in order, made once."""
    folder = Path(mkdtemp(prefix="fuzz-"))
    if family == "native":
        shutil.copytree(DATA / "parity" / "ln2", folder, dirs_exist_ok=True)
    else:
        build(family).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
    if weights != "model.safetensors":
        torch.save(load_file(folder / "model.safetensors"), folder / weights)
        (folder / "model.safetensors").unlink()
    return folder


def model_door(
    family: str, file: str, damaged: Damaged, content: bytes | None = None, **options: str
) -> Door:
    """Return the door of one file of a model's folder, by default a file that it has."""
    folder = own(model_folder(family, **options))

    def read(path: Path) -> tuple[LoweredModel, Any]:
        shutil.copyfile(path, folder / file)
        return load_model(str(folder))

    original = (folder / file).read_bytes() if content is None else content
    check = is_a_model if family == "native" else is_the_model_of(folder)
    return Door(f"{family} {file}", [original], read, check, damaged)


@torch.no_grad()
def logits_of(model: LoweredModel) -> Tensor:
    tokens = TOKENS[:, : model.n_ctx] % model.d_vocab
    final = model.forward(tokens).final
    assert final is not None
    return model.unembed(final)


def is_a_model(loaded: tuple[LoweredModel, Any]) -> None:
    """Assert what the engine needs of a model; lowering has compared it with the bridge."""
    model, tokenizer = loaded
    assert logits_of(model).isfinite().all()
    assert tokenizer is None


def is_the_model_of(folder: Path) -> Callable[[Any], None]:
    """Return the check that a model computes what transformers makes of its folder, if it can."""

    def check(loaded: tuple[LoweredModel, Any]) -> None:
        is_a_model(loaded)
        try:
            theirs = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError,
                StrictDataclassError):  # fmt: skip
            return  # for fields that we leave alone
        model = loaded[0]
        with torch.no_grad():
            tokens = TOKENS[:, : model.n_ctx] % model.d_vocab
            expected = theirs(tokens, return_dict=True).logits
        assert (logits_of(model) - expected).abs().max() < 1e-4 * expected.abs().max()

    return check


@st.composite
def damaged_header(draw: st.DrawFn, originals: Sequence[bytes]) -> bytes:
    """Safetensors files with other types, shapes and offsets in their header."""
    content = draw(st.sampled_from(originals))
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    if draw(st.booleans()):  # a type or shape of one tensor, the rest in order
        entry = header[draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))]
        size = draw(st.sampled_from((1, 2, 4, 8)))
        entry["dtype"] = draw(st.sampled_from(STORED[size]))
        first, last = entry["data_offsets"]
        entry["shape"] = draw(st.sampled_from(([(last - first) // size], entry["shape"])))
    else:
        header = draw(damaged_values(header))
    changed = json.dumps(header).encode()
    return struct.pack("<Q", len(changed)) + changed + content[end:]


STORED = {
    1: ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
    2: ("I16", "U16", "F16", "BF16"),
    4: ("I32", "U32", "F32"),
    8: ("I64", "U64", "F64", "C64"),
}


def damaged_safetensors(originals: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Safetensors files with a damaged header, or damaged anywhere."""
    return damaged_header(originals) | damaged_header(originals) | damaged_bytes(originals)


@st.composite
def damaged_entry(draw: st.DrawFn, originals: Sequence[bytes]) -> bytes:
    """Zip archives in which one entry is damaged, and its checksum is right."""
    archive = zipfile.ZipFile(io.BytesIO(draw(st.sampled_from(originals))))
    names = archive.namelist()
    pickles = [name for name in names if name.endswith("data.pkl")]
    chosen = draw(st.sampled_from(pickles * len(names) + names))
    compression = draw(st.sampled_from([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED]))
    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w", compression) as out:
        for name in names:
            content = archive.read(name)
            out.writestr(name, draw(damaged_bytes([content])) if name == chosen else content)
    return changed.getvalue()


def damaged_pt(originals: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """``.pt`` files with a damaged entry, or damaged anywhere."""
    return damaged_entry(originals) | damaged_entry(originals) | damaged_bytes(originals)


def index_door() -> Door:
    """Return the door of the index of weights in parts."""
    keys = read_pt(model_folder("mistral", "part-1.bin") / "part-1.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, "part-1.bin")}
    return model_door(
        "mistral", "pytorch_model.bin.index.json", damaged_json, json.dumps(index).encode(),
        weights="part-1.bin",
    )  # fmt: skip


# --- tokenizers ---------------------------------------------------------------------------


def trained(model: Any, trainer: Any, split: Any, decoder: Any) -> Any:
    """Return a tokenizer of a kind, trained on a few words."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoder
    special = ["<unk>", "<s>", "</s>"]
    kind = getattr(trainers, trainer)
    extra = {"unk_token": "<unk>"} if trainer == "UnigramTrainer" else {}
    tokenizer.train_from_iterator(
        TEXTS, kind(vocab_size=90, special_tokens=special, show_progress=False, **extra)
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def byte_pairs() -> Any:
    return trained(
        models.BPE(), "BpeTrainer", pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )  # fmt: skip


def pieces() -> Any:
    return trained(
        models.WordPiece(unk_token="<unk>"), "WordPieceTrainer",
        pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(),
    )  # fmt: skip


def unigrams() -> Any:
    return trained(
        models.Unigram(), "UnigramTrainer", pre_tokenizers.Metaspace(), decoders.Metaspace()
    )


def words() -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(MODELS["ioi-small"])


TOKENIZERS = {
    # name: tokenizer, class that its settings name, configuration of its model
    "byte pairs": (byte_pairs, "TokenizersBackend", transformers.LlamaConfig),
    "byte pairs of GPT-2": (byte_pairs, "GPT2Tokenizer", transformers.GPT2Config),
    "pieces": (pieces, "PreTrainedTokenizerFast", transformers.GPT2Config),
    "unigrams": (unigrams, "TokenizersBackend", transformers.GPTNeoXConfig),
    "words": (words, "PreTrainedTokenizerFast", None),
}


@cache
def tokenizer_folder(name: str) -> Path:
    """Return a folder with a tokenizer in order, settings of older versions beside it."""
    folder = Path(mkdtemp(prefix="fuzz-"))
    make, kind, _ = TOKENIZERS[name]
    make().save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": kind, "add_prefix_space": False, "model_max_length": 100}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    special = {
        "bos_token": {"content": "<unk>", "lstrip": False, "rstrip": False, "normalized": False},
        "additional_special_tokens": ["<unk>"],
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "added_tokens.json").write_text(json.dumps({"<unk>": 0}))
    return folder


def tokenizer_door(name: str, file: str) -> Door:
    """Return the door of one of a tokenizer's files."""
    folder, configuration = own(tokenizer_folder(name)), TOKENIZERS[name][2]

    def read(path: Path) -> TextTokenizer | None:
        shutil.copyfile(path, folder / file)
        inside = ModelFolder(folder)
        if configuration is None:
            return read_native_tokenizer(inside)
        return read_tokenizer(inside, configuration())

    return Door(
        f"{name}: {file}", [(folder / file).read_bytes()], read, is_a_tokenizer, damaged_json
    )


def is_a_tokenizer(tokenizer: TextTokenizer | None) -> None:
    """Assert what tasks need of a tokenizer."""
    assert tokenizer is not None
    assert tokenizer.bos_token_id is None or type(tokenizer.bos_token_id) is int
    assert tokenizer.unk_token_id is None or type(tokenizer.unk_token_id) is int
    assert all(type(token) is int for token in tokenizer.all_special_ids)
    assert len(tokenizer) >= 0
    for text in TEXTS:
        try:
            ids = tokenizer.encode(text, add_special_tokens=False)
        except ModelError:  # it has no token for a part of the text, and says so
            continue
        assert all(type(token) is int and token >= 0 for token in ids)
        assert isinstance(tokenizer.decode(ids), str)
    assert isinstance(tokenizer.decode([0]), str)


# --- dictionaries -------------------------------------------------------------------------


def dictionary_door(name: str, file: str, damaged: Damaged) -> Door:
    """Return the door of one of a dictionary's files."""
    folder = own(DATA / "saelens" / name)

    def read(path: Path) -> Dictionary:
        shutil.copyfile(path, folder / file)
        return read_dictionary(folder)

    return Door(f"{name} {file}", [(folder / file).read_bytes()], read, is_a_dictionary, damaged)


def is_a_dictionary(dictionary: Dictionary) -> None:
    """Assert that a dictionary encodes and decodes, and says a hook."""
    x = torch.linspace(-1, 1, dictionary.d_in)
    latents = dictionary.encode(x)
    assert latents.shape == (dictionary.n_latents,)
    assert dictionary.decode(latents, x).shape == (dictionary.d_out,)
    assert dictionary.reads.name
    assert dictionary.neuronpedia_id is None or isinstance(dictionary.neuronpedia_id, str)


# --- all of them --------------------------------------------------------------------------

WEIGHTS = "sae_weights.safetensors"
DOORS: dict[str, Callable[[], Door]] = {
    **{f"{family} config.json": partial(model_door, family, "config.json", damaged_json)
       for family in (*FAMILIES, "native")},
    "generation_config.json": partial(
        model_door, "gpt2", "generation_config.json", damaged_json, b'{"pad_token_id": 0}'
    ),
    "model.safetensors": partial(model_door, "llama", "model.safetensors", damaged_safetensors),
    "native model.safetensors": partial(
        model_door, "native", "model.safetensors", damaged_safetensors
    ),
    "native model.pt": partial(model_door, "native", "model.pt", damaged_pt, weights="model.pt"),
    "pytorch_model.bin": partial(
        model_door, "qwen2", "pytorch_model.bin", damaged_pt, weights="pytorch_model.bin"
    ),
    "pytorch_model.bin.index.json": index_door,
    **{f"{name}: {file}": partial(tokenizer_door, name, file)
       for name in TOKENIZERS for file in ("tokenizer.json", "tokenizer_config.json")},
    "special_tokens_map.json": partial(tokenizer_door, "unigrams", "special_tokens_map.json"),
    "added_tokens.json": partial(tokenizer_door, "unigrams", "added_tokens.json"),
    **{f"{name} cfg.json": partial(dictionary_door, name, "cfg.json", damaged_json)
       for name in DICTIONARIES},
    **{f"{name} {WEIGHTS}": partial(dictionary_door, name, WEIGHTS, damaged_safetensors)
       for name in ("topk", "skip_transcoder")},
}  # fmt: skip


def costly(name: str) -> bool:
    """Whether an input of the door loads a whole model, ours and transformers'."""
    return name.startswith((*FAMILIES, "native", "model", "pytorch", "generation"))


@pytest.mark.parametrize("name", DOORS)
def test_a_little(name: str, tmp_path: Path) -> None:
    fuzz(DOORS[name](), tmp_path, QUICK // 4 if costly(name) else QUICK // 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", DOORS)
def test_a_lot(name: str, tmp_path: Path) -> None:
    fuzz(DOORS[name](), tmp_path, MANY // 4 if costly(name) else MANY // 2)
