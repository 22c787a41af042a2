"""Dictionaries: SAELens' numbers, hooks of the bridge, figures by hand, and bad input."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_lens.model_bridge.sources.native  # noqa: F401  (adds boot_native)
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from acdc.dictionaries import (
    Dictionary,
    Hook,
    activation,
    check_fits,
    list_dictionaries,
    parse_hook,
    read_dictionaries,
    read_dictionary,
    replacement,
    write_dictionary,
)
from acdc.dictionaries.activations import width
from acdc.dictionaries.hooks import SITES, WRITE_SITES
from acdc.dictionaries.quality import (
    DENSITY_EDGES,
    Quality,
    Recovery,
    quality_on_task,
    quality_on_tokens,
    quality_table,
)
from acdc.dictionaries.sae import ARCHITECTURES
from acdc.dictionaries.sources import load_dictionaries
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import METRICS
from acdc.errors import DictionaryError
from acdc.models import MODELS, load_model
from acdc.models.lowering import LoweredModel, lower
from acdc.tasks import TASKS, Task, load_task
from acdc.tasks.base import Pair
from benchmarks import train_dictionaries
from benchmarks.shortcuts import MODELS as SHORTCUTS

SAELENS = Path(__file__).parent / "data" / "saelens"
FOLDERS = sorted(path.name for path in SAELENS.iterdir())
BUNDLES = sorted(
    (model, name)
    for model in train_dictionaries.BUNDLES
    for name in list_dictionaries(MODELS[model] / "dictionaries")
)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """Copy a folder of SAELens, for a test to spoil."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(SAELENS / name, tmp_path / name))

    return copy


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of cfg.json; the value ``...`` takes one out."""
    path = folder / "cfg.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def refusal(action: Callable[[], object]) -> str:
    """Return the message of a DictionaryError; it is one line."""
    with pytest.raises(DictionaryError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def tiny(architecture: str = "standard", hook: str = "blocks.0.hook_mlp_out", **changes: Any):
    """Return a dictionary that copies a 2-dimensional activation: latents x+, x-, y+, y-."""
    signs = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])
    where = parse_hook(hook)
    return replace(
        Dictionary(
            architecture, where, where,
            W_enc=signs, W_dec=signs.T.contiguous(), b_dec=torch.zeros(2), b_enc=torch.zeros(4),
        ),
        **changes,
    )  # fmt: skip


def perfect(model: LoweredModel, hook: str) -> Dictionary:
    """Return a dictionary that reconstructs the activation at a hook exactly."""
    where = parse_hook(hook)
    unit = torch.eye(width(model, where))
    return Dictionary(
        "standard", where, where,
        W_enc=torch.cat([unit, -unit], 1), W_dec=torch.cat([unit, -unit], 0),
        b_dec=torch.zeros(len(unit)), b_enc=torch.zeros(2 * len(unit)),
    )  # fmt: skip


# --- as SAELens computes ------------------------------------------------------------------


def test_every_architecture_has_a_folder_of_saelens() -> None:
    assert {read_dictionary(SAELENS / name).architecture for name in FOLDERS} == set(ARCHITECTURES)
    assert {"gated", "jumprelu", "jumprelu_transcoder", "skip_transcoder", "standard", "topk",
            "transcoder"} <= set(FOLDERS)  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_agrees_with_saelens(name: str) -> None:
    dictionary = read_dictionary(SAELENS / name)
    expected = load_file(SAELENS / name / "expected.safetensors")
    latents = dictionary.encode(expected["x"])
    torch.testing.assert_close(latents, expected["features"], rtol=1e-5, atol=1e-5)
    assert (latents > 0).any()
    got = dictionary.decode(latents, expected["x"])
    torch.testing.assert_close(got, expected["forward"], rtol=1e-5, atol=1e-5)
    if "decoded" in expected and dictionary.W_skip is None:
        torch.testing.assert_close(got, expected["decoded"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["random", "equal", "no number", "all", "float64"])
def test_the_k_largest_latents_are_those_of_topk(case: str) -> None:
    dictionary = random_topk(
        6 if case != "all" else 40, torch.float64 if case == "float64" else None
    )
    x = torch.randn(3, 5, 8, dtype=dictionary.dtype, generator=torch.Generator().manual_seed(1))
    if case == "equal":
        x[1, 2] = 0.0  # every latent has the same preactivation
    if case == "no number":
        x[0, 0, 0] = torch.nan
    latents = {}
    for tracked in (True, False):  # with gradients torch's topk is asked
        with torch.set_grad_enabled(tracked):
            latents[tracked] = dictionary.encode(x)
    torch.testing.assert_close(latents[False], latents[True], rtol=0, atol=0, equal_nan=True)
    assert ((latents[True] > 0).sum(-1) <= dictionary.k).all()


def random_topk(k: int, dtype: torch.dtype | None) -> Dictionary:
    W = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)).to(dtype or torch.float32)
    hook, zeros = Hook(0, "mlp_out"), torch.zeros(8, dtype=W.dtype)
    bias = torch.full((40,), 0.5, dtype=W.dtype)
    return Dictionary("topk", hook, hook, W, W.T.contiguous(), zeros, b_enc=bias, k=k)


@pytest.mark.parametrize("name", FOLDERS)
def test_written_as_read(name: str, tmp_path: Path) -> None:
    old = read_dictionary(SAELENS / name)
    new = read_dictionary(write_dictionary(old, tmp_path / "new"))
    assert new.tensors.keys() == old.tensors.keys()
    assert all(torch.equal(new.tensors[key], old.tensors[key]) for key in old.tensors)
    ignored = {*ARCHITECTURES[old.architecture], "source", "metadata"}
    assert {k: v for k, v in vars(new).items() if k not in ignored} == {
        k: v for k, v in vars(old).items() if k not in ignored
    }


@pytest.mark.parametrize("name", FOLDERS)
def test_directions_are_the_gradients_of_active_latents(name: str) -> None:
    dictionary = read_dictionary(SAELENS / name)
    x = load_file(SAELENS / name / "expected.safetensors")["x"][0, 0]
    x_in = dictionary.pre(x)
    plain = replace(dictionary, normalize_activations="none", apply_b_dec_to_input=False)
    jacobian = torch.func.jacrev(plain.encode)(x_in)  # (latent, d_in)
    active = plain.encode(x_in) > 0
    assert 0 < active.sum() < len(active)
    torch.testing.assert_close(jacobian[active], dictionary.encoder_directions.T[active])
    assert not jacobian[~active].any()
    written = torch.func.jacrev(dictionary.decode)(dictionary.encode(x), x)  # (d_out, latent)
    expected = dictionary.decoder_directions.T * dictionary.output_scale(x)
    torch.testing.assert_close(written, expected, rtol=1e-4, atol=1e-5)


def test_computes_in_the_dtype_of_its_file(folder: Callable[[str], Path]) -> None:
    path = folder("standard")
    edit(path, dtype="torch.float16")
    dictionary = read_dictionary(path)
    assert dictionary.dtype == torch.float16
    assert dictionary.encode(torch.randn(3, 48)).dtype == torch.float16
    assert dictionary.to("cpu", torch.float64)(torch.randn(3, 48)).dtype == torch.float64


def test_zero_activation_survives_rescaling() -> None:
    dictionary = tiny(normalize_activations="constant_norm_rescale")
    assert not dictionary(torch.zeros(2)).any()


@pytest.mark.parametrize(
    "changes",
    [
        {"metadata": ..., "hook_name": "blocks.1.hook_mlp_out", "hook_layer": 1},
        {"metadata": ..., "hook_point": "blocks.{layer}.hook_mlp_out", "hook_point_layer": 1},
        {"metadata": ..., "hook_name": "blocks.1.mlp.hook_out", "architecture": ...,
         "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 12}, "k": ...,
         "hook_head_index": None, "normalize_activations": False, "d_sae": ..., "dtype": ...},
        {"activation_fn": "topk", "activation_fn_kwargs": {"k": 12}, "k": ...},
    ],
)  # fmt: skip
def test_older_configurations(folder: Callable[[str], Path], changes: dict[str, Any]) -> None:
    path = folder("topk")
    edit(path, neuronpedia_id="gpt2-small/1-mlp", **changes)
    dictionary = read_dictionary(path)
    assert (dictionary.architecture, dictionary.k) == ("topk", 12)
    assert dictionary.reads == dictionary.writes == Hook(1, "mlp_out")
    if "metadata" in changes:
        assert dictionary.neuronpedia_id == "gpt2-small/1-mlp"
    expected = load_file(path / "expected.safetensors")
    torch.testing.assert_close(dictionary.encode(expected["x"]), expected["features"])


def test_older_tensors(folder: Callable[[str], Path]) -> None:
    path = folder("jumprelu")
    threshold = load_file(path / "sae_weights.safetensors")["threshold"].abs() + 0.1
    edit_tensors(
        path, threshold=None, log_threshold=threshold.log(), scaling_factor=torch.ones(160)
    )
    got = read_dictionary(path).threshold
    assert got is not None
    torch.testing.assert_close(got, threshold)
    edit_tensors(path, scaling_factor=torch.full((160,), 2.0))
    assert "'scaling_factor' is not all ones" in refusal(lambda: read_dictionary(path))


# --- hooks --------------------------------------------------------------------------------


def bridges() -> dict[str, Any]:
    """Return small bridges: native LN and RMS, attention only; GPT-NeoX and Gemma-2."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"n_layers": 2, "d_model": 12, "d_head": 4, "n_heads": 3, "n_ctx": 16, "d_vocab": 20}
    found = {}
    for name, extra in {
        "LN": {"d_mlp": 8, "act_fn": "gelu", "normalization_type": "LN"},
        "RMS": {"d_mlp": 8, "act_fn": "gelu", "normalization_type": "RMS"},
        "attention only": {"attn_only": True, "normalization_type": "LN"},
    }.items():
        boot: Any = TransformerBridge.boot_native  # type: ignore[attr-defined]
        found[name] = boot(TransformerBridgeConfig(**sizes, **extra))
    small = {"vocab_size": 20, "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 2,
             "num_attention_heads": 3, "max_position_embeddings": 16}  # fmt: skip
    gemma = {"num_key_value_heads": 1, "head_dim": 6, "query_pre_attn_scalar": 6}
    for name, kind, extra in (
        ("parallel", "gpt_neox", {"use_parallel_residual": True}),
        ("post-norms", "gemma2", gemma),
    ):
        config = AutoConfig.for_model(kind, **small, **extra, attn_implementation="eager")
        module = AutoModelForCausalLM.from_config(config)
        found[name] = build_bridge_from_module(
            module, type(module).__name__, hf_config=config, dtype=torch.float32, device="cpu",
            model_name=name,
        )  # fmt: skip
    for bridge in found.values():
        for parameter in bridge.original_model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return found


@pytest.fixture(scope="module")
def small() -> dict[str, tuple[LoweredModel, dict[str, Tensor], Tensor]]:
    """Return lowered models with the bridge's cache on some tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = torch.randint(0, 20, (3, 7))
        out = {}
        for name, bridge in bridges().items():
            bridge.cfg.use_hook_mlp_in = True
            _, cache = bridge.run_with_cache(tokens)
            out[name] = (lower(bridge, name=name), cache, tokens)
        return out


LACKS = {
    "attention only": {"resid_mid", "mlp_in", "ln2_normalized", "ln2_out", "mlp_out"},
    "parallel": {"resid_mid"},
}
PLACES = [
    (name, site)
    for name in ("LN", "RMS", "attention only", "parallel", "post-norms")
    for site in SITES
    if site not in LACKS.get(name, ())
]


@pytest.mark.parametrize(("name", "site"), PLACES)
def test_activations_are_those_of_the_bridge(small: Any, name: str, site: str) -> None:
    model, cache, tokens = small[name]
    trace = model.forward(tokens)
    for layer in range(2):
        hook = Hook(layer, site)
        got = activation(model, trace, hook)
        wanted = cache[hook.name]
        if wanted.shape != got.shape:
            wanted = wanted.flatten(-2)  # hook_z by head
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert got.shape[-1] == width(model, hook)


@pytest.mark.parametrize(("name", "site"), [p for p in PLACES if p[1] in WRITE_SITES])
def test_a_perfect_dictionary_changes_nothing(small: Any, name: str, site: str) -> None:
    model, _, tokens = small[name]
    trace = model.forward(tokens)
    for layer in range(2):
        dictionary = perfect(model, Hook(layer, site).name)
        check_fits(dictionary, model)
        x = activation(model, trace, dictionary.reads)
        replaced = replacement(model, dictionary.writes, dictionary(x))
        final = model.forward(tokens, replaced=replaced).final
        torch.testing.assert_close(final, trace.final, rtol=1e-5, atol=1e-5)
        zeros = replacement(model, dictionary.writes, torch.zeros_like(x))
        other = model.forward(tokens, replaced=zeros)
        assert not activation(model, other, dictionary.writes).any() or site in ("attn_out",)
        assert (other.final - trace.final).abs().max() > 1e-3
        quality = quality_on_tokens(dictionary, model, [tokens])
        assert quality.explained_variance == pytest.approx(1)
        assert quality.mse == pytest.approx(0, abs=1e-9)
        for recovery in (quality.loss, quality.kl):
            assert recovery.recovered == pytest.approx(1, abs=1e-4)
        assert quality.n_tokens == 21


@pytest.mark.parametrize("site", SITES)
def test_hook_names(site: str) -> None:
    hook = Hook(3, site)
    assert parse_hook(hook.name) == hook


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hook_embed", "is no activation of a block"),
        ("blocks.x.hook_mlp_out", "is no activation of a block"),
        ("blocks.1.attn.hook_q", "is not supported"),
        ("blocks.1.hook_mlp_ot", "did you mean hook_mlp_out"),
    ],
)
def test_unknown_hooks(name: str, words: str) -> None:
    assert words in refusal(lambda: parse_hook(name))


# --- bad input ----------------------------------------------------------------------------

META = {"sae_lens_version": "6.54.12"}
BAD_CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("standard", {"architecture": "topkk"}, "unknown architecture 'topkk': did you mean topk"),
    ("standard", {"architecture": ["topk"]}, "unknown architecture ['topk']"),
    ("standard", {"activation_fn": "tanh-relu"}, "activation_fn is 'tanh-relu', expected 'relu'"),
    ("standard", {"metadata": META}, "hook_name is missing"),
    ("standard", {"metadata": 3}, "metadata is 3, expected a JSON object"),
    ("standard", {"metadata": META | {"hook_name": "blocks.0.hook_q"}}, "'blocks.0.hook_q'"),
    (
        "standard",
        {"metadata": META | {"hook_name": "blocks.0.ln2.hook_normalized"}},
        "expected for architecture 'standard' one of blocks.0.hook_resid_pre",
    ),
    (
        "transcoder",
        {"metadata": META | {"hook_name": "blocks.0.hook_mlp_out"}},
        "expected for architecture 'transcoder' one of blocks.0.hook_mlp_in",
    ),
    ("transcoder", {"hook_name_out": "blocks.2.hook_mlp_out"}, "expected 'blocks.1.hook_mlp_out'"),
    ("transcoder", {"apply_b_dec_to_input": True}, "apply_b_dec_to_input is True, expected false"),
    ("standard", {"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input is 'no', expected true or"),
    ("standard", {"hook_layer": 4}, "hook_layer is 4, expected 1"),
    ("standard", {"hook_head_index": 2}, "hook_head_index is 2, expected null"),
    ("standard", {"normalize_activations": "batch"}, "normalize_activations is 'batch', expected"),
    ("standard", {"normalize_activations": ["none"]}, "normalize_activations is ['none']"),
    ("standard", {"dtype": "int8"}, "dtype is 'int8', expected one of float32"),
    ("standard", {"d_in": 49}, "'W_enc' has shape [48, 160], expected [49, 160]"),
    ("standard", {"d_sae": -1}, "d_sae is -1, expected a whole number"),
    ("topk", {"k": 161}, "k is 161, expected a whole number from 1 to d_sae (160)"),
    ("topk", {"k": ...}, "k is missing"),
    ("topk", {"k": 2.5}, "k is 2.5"),
    (
        "standard",
        {"metadata": META | {"hook_name": f"blocks.{'9' * 5000}.hook_mlp_out"}},
        "is no activation of a block",
    ),
    (
        "standard",
        {"metadata": META | {"neuronpedia_id": 3}},
        "neuronpedia_id is 3, expected a text",
    ),
]


@pytest.mark.parametrize(("name", "changes", "words"), BAD_CONFIGS)
def test_bad_configuration(
    folder: Callable[[str], Path], name: str, changes: dict[str, Any], words: str
) -> None:
    path = folder(name)
    edit(path, **changes)
    message = refusal(lambda: read_dictionary(path))
    assert words in message
    assert str(path) in message


NAN = torch.full((160,), math.nan)
BAD_TENSORS: list[tuple[str, dict[str, Tensor | None], str]] = [
    ("standard", {"b_enc": None}, "tensor 'b_enc' is missing; 'standard' has it"),
    ("gated", {"r_mag": None}, "tensor 'r_mag' is missing; 'gated' has it"),
    ("standard", {"W_skip": torch.zeros(48, 48)}, "tensor 'W_skip' is there, but 'standard' has"),
    ("standard", {"b_dec": torch.zeros(47)}, "'b_dec' has shape [47], expected [48]"),
    ("jumprelu", {"threshold": torch.zeros(1)}, "'threshold' has shape [1], expected [160]"),
    ("skip_transcoder", {"W_skip": torch.zeros(48)}, "'W_skip' has shape [48], expected [48, 48]"),
    ("standard", {"W_enc": torch.zeros(48)}, "'W_enc' has 1 axes, expected 2"),
    ("standard", {"b_enc": NAN}, "'b_enc' holds values that are no finite number"),
    (
        "standard",
        {"b_enc": torch.zeros(160).to(torch.float8_e4m3fn)},
        "'b_enc' is stored as float8_e4m3fn, expected one of float32, float64, float16, bfloat16",
    ),
    (
        "standard",
        {"W_dec": torch.zeros(160, 48, dtype=torch.int8)},
        "'W_dec' is stored as int8, ex",
    ),
    ("topk", {"b_dec": torch.zeros(48, dtype=torch.complex64)}, "'b_dec' is stored as complex64, "),
    ("standard", {"W_enc": torch.zeros(48, 0)}, "'W_enc' has shape [48, 0], expected at least one"),
]


@pytest.mark.parametrize(("name", "changes", "words"), BAD_TENSORS)
def test_bad_tensors(
    folder: Callable[[str], Path], name: str, changes: dict[str, Tensor | None], words: str
) -> None:
    path = folder(name)
    edit_tensors(path, **changes)
    message = refusal(lambda: read_dictionary(path))
    assert words in message
    assert str(path / "sae_weights.safetensors") in message


def test_values_too_large_for_the_type(folder: Callable[[str], Path]) -> None:
    path = folder("standard")
    edit(path, dtype="float16")
    edit_tensors(path, b_enc=torch.full((160,), 1e6))
    message = refusal(lambda: read_dictionary(path))
    assert "'b_enc' holds values that are no finite number in float16" in message


@pytest.mark.parametrize("name", ["~nouser", "~nouser/saes"])
def test_nobodys_home(name: str) -> None:
    words = f"dictionary {name!r}: there is no such home folder"
    assert refusal(lambda: read_dictionary(name)) == words
    assert refusal(lambda: load_dictionaries(name, "ioi-small")) == words


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors"])
@pytest.mark.parametrize("left", [0, 1, 100, -10])
def test_truncated_files(folder: Callable[[str], Path], file: str, left: int) -> None:
    path = folder("standard")
    (path / file).write_bytes((path / file).read_bytes()[:left])
    message = refusal(lambda: read_dictionary(path))
    assert str(path / file) in message
    assert ("no JSON that can be read" if file == "cfg.json" else "is no readable") in message


def test_missing_files(folder: Callable[[str], Path], tmp_path: Path) -> None:
    path = folder("standard")
    (path / "sae_weights.safetensors").unlink()
    assert "has no sae_weights.safetensors" in refusal(lambda: read_dictionary(path))
    assert "is a file" in refusal(lambda: read_dictionary(path / "cfg.json"))
    assert "it has no cfg.json" in refusal(lambda: read_dictionary(tmp_path))
    (path / "cfg.json").write_text("[1]")
    assert "holds a list" in refusal(lambda: read_dictionary(path))
    assert "there is no such folder" in refusal(lambda: read_dictionary(tmp_path / "none"))


@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/nothing/blocks.1.hook_mlp_out/16k"])
def test_hub_out_of_reach(name: str) -> None:
    message = refusal(lambda: read_dictionary(name))
    assert f"{name!r}: there is no such folder, and the Hugging Face hub is out of reach" in message


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, file: str, subfolder: str | None) -> str:
        asked.append((repository, file, subfolder))
        return str(SAELENS / "topk" / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert read_dictionary("some-one/saes.v2/a/blocks.1.hook_mlp_out").k == 12
    assert asked == [
        ("some-one/saes.v2", file, "a/blocks.1.hook_mlp_out")
        for file in ("sae_weights.safetensors", "cfg.json")
    ]


def test_two_on_one_hook(folder: Callable[[str], Path]) -> None:
    paths = [folder("standard"), folder("topk"), folder("transcoder")]
    message = refusal(lambda: read_dictionaries(paths[:2]))
    assert str(paths[0]) in message
    assert str(paths[1]) in message
    assert "are both on hook 'blocks.1.hook_mlp_out'" in message
    message = refusal(lambda: read_dictionaries(paths[1:]))
    assert "(on 'blocks.1.hook_mlp_out' and 'blocks.1.ln2.hook_normalized') replace" in message
    for path, hook in zip(paths, ("hook_resid_post", "hook_resid_pre"), strict=False):
        edit(path, metadata={"hook_name": f"blocks.{2 if 'pre' in hook else 1}.{hook}"})
    assert "replace the same activation" in refusal(lambda: read_dictionaries(paths[:2]))
    edit(paths[1], metadata={"hook_name": "blocks.1.hook_resid_pre"})
    assert [d.writes.name for d in read_dictionaries(paths)] == [
        "blocks.1.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "hook", "words"),
    [
        ("LN", "blocks.2.hook_mlp_out", "'LN' has 2 layers (0 to 1)"),
        ("attention only", "blocks.1.hook_mlp_out", "'attention only' has attention only, no MLPs"),
        ("parallel", "blocks.1.hook_resid_mid", "attention and MLP run side by side"),
        ("LN", "blocks.1.hook_mlp_out", "d_in is 2, but 'blocks.1.hook_mlp_out' of 'LN' is 12"),
        ("post-norms", "blocks.0.attn.hook_z", "'blocks.0.attn.hook_z' of 'post-norms' is 18 wide"),
    ],
)
def test_dictionaries_that_do_not_fit(small: Any, name: str, hook: str, words: str) -> None:
    model, _, tokens = small[name]
    dictionary = tiny(hook=hook, source="mine")
    message = refusal(lambda: check_fits(dictionary, model))
    assert words in message
    assert "'mine'" in message
    assert refusal(lambda: quality_on_tokens(dictionary, model, [tokens])) == message


def test_transcoder_of_another_width(small: Any) -> None:
    reads, writes = Hook(0, "ln2_normalized"), Hook(0, "mlp_out")
    model = small["LN"][0]
    dictionary = replace(tiny("transcoder"), reads=reads, writes=writes, W_enc=torch.zeros(12, 4))
    assert "d_out is 2, but 'blocks.0.hook_mlp_out'" in refusal(
        lambda: check_fits(dictionary, model)
    )


# --- quality ------------------------------------------------------------------------------


def test_figures_by_hand(small: Any) -> None:
    """A dictionary of two latents, one never active; figures from their definitions."""
    model, _, tokens = small["LN"]
    hook = Hook(1, "mlp_out")
    x = activation(model, model.forward(tokens), hook)  # (3, 7, 12)
    W = torch.zeros(12, 2)
    W[4, 0] = 1.0
    dictionary = Dictionary(
        "standard", hook, hook, W_enc=W, W_dec=W.T.contiguous(), b_dec=torch.zeros(12),
        b_enc=torch.tensor([0.0, -1.0]),
    )  # fmt: skip
    quality = quality_on_tokens(dictionary, model, [tokens[:1], tokens[1:]])
    flat = x.flatten(0, 1)
    got = torch.zeros_like(flat)
    got[:, 4] = flat[:, 4].relu()
    share = float((flat[:, 4] > 0).float().mean())
    assert 0 < share < 1
    mse = float((flat - got).pow(2).sum(-1).mean())
    assert quality.n_tokens == 21
    assert quality.l0 == pytest.approx(share)
    assert quality.mse == pytest.approx(mse, rel=1e-5)
    variance = float((flat - flat.mean(0)).pow(2).sum(-1).mean())
    assert quality.explained_variance == pytest.approx(1 - mse / variance, rel=1e-4)
    assert quality.dead_fraction == 0.5
    place = sum(edge <= math.log10(share) for edge in DENSITY_EDGES) - 1
    assert quality.density_counts[place] == sum(quality.density_counts) == 1
    losses = []
    logprobs = []
    for value in (x, got.view_as(x), torch.zeros_like(x)):
        final = model.forward(tokens, replaced={("mlp", 1): value}).final
        logits = model.unembed(final[:, :-1]).flatten(0, 1)
        losses.append(float(torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())))
        logprobs.append(torch.log_softmax(logits, -1))
    found = quality.loss
    assert (found.model, found.reconstructed, found.ablated) == pytest.approx(losses, rel=1e-4)
    kls = [
        float(torch.nn.functional.kl_div(q, logprobs[0], log_target=True, reduction="batchmean"))
        for q in logprobs
    ]
    found = quality.kl
    assert (found.model, found.reconstructed, found.ablated) == pytest.approx(kls, abs=1e-6)
    assert found.recovered == pytest.approx((kls[1] - kls[2]) / -kls[2], rel=1e-4)


def test_figures_on_a_task(small: Any) -> None:
    model, _, tokens = small["LN"]
    rows = [tuple(row) for row in tokens.tolist()]
    pairs = tuple(Pair(row, row[::-1], (1,), (2,)) for row in rows)
    experiment = Experiment(model, Task("toy", pairs), METRICS["logit_diff"], batch_size=2)
    whole = perfect(model, "blocks.0.hook_attn_out")
    half = replace(whole, W_dec=whole.W_dec / 2)
    quality = quality_on_task(half, experiment)
    assert quality.n_tokens == 2 * tokens.numel()
    assert quality.metric_name == "logit_diff"
    trace = model.forward(tokens)
    out = activation(model, trace, half.writes)
    expected = []
    for scale in (1, 0.5, 0):
        final = model.forward(tokens, replaced={("attn", 0): scale * out}).final
        logits = model.unembed(final[:, -1])
        expected.append((
            float((logits[:, 1] - logits[:, 2]).mean()),
            float(-torch.log_softmax(logits, -1)[:, 1].mean()),
        ))  # fmt: skip
    for number, found in enumerate((quality.metric, quality.loss)):
        assert found is not None
        assert (found.model, found.reconstructed, found.ablated) == pytest.approx(
            [values[number] for values in expected], rel=1e-4
        )
    plain = quality.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["metric"]["recovered"] == quality.metric.recovered  # type: ignore[union-attr]
    assert quality_on_task(whole, experiment).doubts == ()


def test_a_bad_dictionary_is_doubted() -> None:
    good, counts = Recovery(1.0, 0.95, 0.0), (0,) * 12
    quality = Quality("blocks.0.hook_mlp_out", "relu", 1000, 10, 3.0, 0.1, 0.75, 0.5, counts,
                      good, good, "logit_diff", good)  # fmt: skip
    assert quality.doubts == ()
    too_much = replace(quality, metric=Recovery(1.0, 1.39, 0.0))
    assert too_much.doubts == (
        "dictionary at blocks.0.hook_mlp_out: with its reconstruction in the activation's place "
        "the metric recovers 1.39 of what zeros take, not 0.8 to 1.2",
    )
    assert len(replace(too_much, metric=Recovery(1.0, 0.7, 0.0)).doubts) == 1
    dead = replace(quality, dead_fraction=0.77)
    assert dead.doubts == ()  # of ten tokens nothing else is to be expected
    assert replace(dead, n_tokens=4000).doubts == (
        "dictionary at blocks.0.hook_mlp_out: 77% of its 1,000 latents are active on none of "
        "these 4,000 tokens",
    )
    assert len(replace(too_much, dead_fraction=0.77, n_tokens=4000).doubts) == 2
    assert replace(quality, explained_variance=0.4).doubts == (
        "dictionary at blocks.0.hook_mlp_out: its reconstruction explains 40% of the activation's "
        "variance on these prompts, less than 50%",
    )


def test_nothing_to_recover() -> None:
    assert Recovery(2.0, 2.0, 2.0).recovered is None
    assert Recovery(1.0, 2.0, 3.0).recovered == 0.5


def test_table_of_figures() -> None:
    recovery = Recovery(0.0, 1.0, 2.0)
    counts = (0,) * 11 + (1,)
    one = Quality("blocks.0.hook_mlp_out", "topk", 1000, 10, 3.0, 0.1, 0.75, 0.5, counts,
                  recovery, recovery, "logit_diff", recovery)  # fmt: skip
    two = replace(one, metric_name=None, metric=None, explained_variance=None)
    console = Console(record=True, width=150)
    console.print(quality_table([one, two]))
    text = console.export_text()
    for word in ("1,000", "50.0 %", "0.750", "0.500", "logit_diff rec.", "█", "-"):
        assert word in text


# --- what comes with the package ----------------------------------------------------------


def test_bundled_dictionaries_are_there_and_small() -> None:
    """Every component whose output varies has its dictionaries; the card names the others."""
    for name in train_dictionaries.BUNDLES:
        folder = MODELS[name]
        model, _ = load_model(name)
        wanted = {reads.name for reads, _ in train_dictionaries.hooks_of(model)}
        card = json.loads((folder / "dictionaries" / "card.json").read_text())
        assert set(list_dictionaries(folder / "dictionaries")) == wanted - set(card["constant"])
        tokens = torch.arange(2 * model.n_ctx).view(2, -1) % model.d_vocab
        trace = model.forward(tokens)
        for constant in card["constant"]:
            hook = Hook(parse_hook(constant).layer, parse_hook(constant).part[0] + "_out")
            out = activation(model, trace, hook).flatten(0, 1)
            torch.testing.assert_close(out, out[:1].expand_as(out), rtol=1e-5, atol=1e-6)
        size = sum(p.stat().st_size for p in (folder / "dictionaries").rglob("*") if p.is_file())
        assert size <= 8 << 20


def test_bundled_dictionaries_are_packaged() -> None:
    import tomllib

    root = Path(__file__).parents[1]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())
    found = {
        path
        for pattern in patterns["tool"]["setuptools"]["package-data"]["acdc"]
        for path in (root / "acdc").glob(pattern)
    }
    wanted = {p for p in (root / "acdc" / "bundled").rglob("*") if p.is_file()}
    assert wanted <= found


@cache
def held_out(model_name: str, every: int) -> tuple[LoweredModel, dict[str, Experiment]]:
    """Return a bundled model with one in ``every`` pairs that its card's figures are of."""
    model, tokenizer = load_model(model_name)
    experiments = {}
    for name in train_dictionaries.BUNDLES[model_name].n_pairs:
        task = train_dictionaries.held_out_pairs(name, tokenizer)
        task = replace(task, pairs=task.pairs[::every])
        experiments[name] = Experiment(model, task, METRICS["logit_diff"], 64)
    return model, experiments


def carded() -> list[Any]:
    """Return dictionaries with a share of the pairs: all pairs take minutes."""
    some = [(*case, 16, 0.02) for case in BUNDLES if case[0] in SHORTCUTS]
    whole = [(*case, 1, 1e-3) for case in BUNDLES]
    return [*some, *(pytest.param(*case, marks=pytest.mark.slow) for case in whole)]


@pytest.mark.parametrize(("model_name", "name", "every", "tolerance"), carded())
def test_bundled_dictionaries_are_as_good_as_their_card_says(
    model_name: str, name: str, every: int, tolerance: float
) -> None:
    folder = MODELS[model_name] / "dictionaries"
    card = json.loads((folder / "card.json").read_text())
    model, experiments = held_out(model_name, every)
    dictionary = read_dictionary(folder / name).to("cpu", model.dtype)
    check_fits(dictionary, model)
    for task, experiment in experiments.items():
        said = card["quality"][name][task]
        quality = quality_on_task(dictionary, experiment)
        if task != "induction":  # its tokens are any of the vocabulary's: see the card
            assert said["explained_variance"] >= (0.9 if model_name in SHORTCUTS else 0.85)
        assert quality.explained_variance == pytest.approx(
            said["explained_variance"], abs=tolerance
        )
        assert quality.l0 == pytest.approx(said["l0"], rel=0.1)
        assert quality.metric is not None
        if every == 1:
            assert quality.metric.recovered == pytest.approx(said["metric"]["recovered"], abs=0.01)


# --- training -----------------------------------------------------------------------------


def known(n: int, seed: int) -> Tensor:
    """Return tokens of three of 20 known directions each, ``[n, 16]``."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(20, 16, generator=generator), dim=1)
    which = torch.rand(n, 20, generator=generator).topk(3).indices
    sizes = 1 + torch.rand(n, 3, generator=generator)
    return torch.zeros(n, 20).scatter(1, which, sizes) @ directions + 5.0


@pytest.mark.parametrize("transcoder", [False, True])
def test_training_finds_structure(transcoder: bool) -> None:
    x = known(2000, 0)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    y = 7 * x @ rotation if transcoder else x
    recipe = train_dictionaries.Recipe(40, 3, n_steps=300, batch_size=256, learning_rate=1e-2)
    before = torch.random.get_rng_state()
    trainer = train_dictionaries.Trainer(x, y, transcoder, recipe)
    losses = trainer.run()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert losses[-1] < 0.3 * losses[0]
    hook = Hook(0, "mlp_out")
    reads = Hook(0, "ln2_normalized") if transcoder else hook
    learned = trainer.dictionary(reads, hook, {})
    latents = learned.encode(x)
    error = (learned.decode(latents, x) - y).pow(2).mean() / (y - y.mean(0)).pow(2).mean()
    assert float(error) == pytest.approx(losses[-1], abs=0.1)
    assert float((latents > 0).float().sum(-1).mean()) == pytest.approx(3, abs=0.5)
    torch.testing.assert_close(learned.W_dec.norm(dim=1), torch.ones(40))
    again = train_dictionaries.Trainer(x, y, transcoder, recipe)
    assert again.run()[:50] == losses[:50]


def test_held_out_prompts_are_not_trained_on() -> None:
    _, tokenizer = load_model("ioi-small")
    prompts, tasks = train_dictionaries.task_prompts(tokenizer, {"pronoun": 40})
    (task,) = tasks
    unseen = {side for pair in task.pairs for side in (pair.clean, pair.corrupt)}
    assert prompts
    assert not unseen & set(prompts)
    expected = load_task(
        "pronoun", tokenizer, n_prompts=train_dictionaries.N_HELD_OUT,
        seed=train_dictionaries.HELD_OUT_SEED, corruption=TASKS["pronoun"].default_corruption,
    )  # fmt: skip
    assert task.pairs == expected.pairs


def test_a_constant_activation_gets_no_dictionary(small: Any, tmp_path: Path) -> None:
    """The MLP of the first layer is silenced: it has neither SAE nor transcoder."""
    model, _, tokens = small["LN"]
    silent = replace(model.layers[0], mlp=torch.zeros_like)
    model = replace(model, layers=(silent, model.layers[1]))
    recipe = train_dictionaries.Recipe(8, 2, n_steps=3, batch_size=8)
    prompts = [tuple(row) for row in tokens.tolist()]
    train_dictionaries.train_all(
        model, prompts, recipe,
        lambda dictionary: {"toy": quality_on_tokens(dictionary, model, [tokens])},
        tmp_path, {"made_by": "a test"}, Console(quiet=True),
    )  # fmt: skip
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["constant"] == ["blocks.0.hook_mlp_out", "blocks.0.ln2.hook_normalized"]
    found = list_dictionaries(tmp_path)
    assert found.keys() == card["quality"].keys()
    assert sorted(found) == [
        "blocks.0.hook_attn_out",
        "blocks.1.hook_attn_out",
        "blocks.1.hook_mlp_out",
        "blocks.1.ln2.hook_normalized",
    ]
    for folder in found.values():
        check_fits(read_dictionary(folder), model)


def test_sampled_texts(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small["LN"][0]
    monkeypatch.setattr(train_dictionaries, "BATCH", 2)
    texts = train_dictionaries.sample_texts(model, 3, 5, 6, 1.0, 0)
    assert [len(text) for text in texts] == [6] * 5
    assert {text[0] for text in texts} == {3}
    assert len(set(texts)) > 1
    assert texts == train_dictionaries.sample_texts(model, 3, 5, 6, 1.0, 0)
    (greedy,) = set(train_dictionaries.sample_texts(model, 3, 3, 6, 0.0, 0))
    final = model.forward(torch.tensor([greedy])).final
    assert tuple(model.unembed(final[:, :-1]).argmax(-1)[0].tolist()) == greedy[1:]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpt5"], "unknown bundled model 'gpt5'"),
        (["--model", "x"], "--model takes --out FOLDER"),
        (["--out", "x"], "--out is for --model"),
        (["--model", str(MODELS["ioi-small"]), "--out", "x"], "has no tokenizer with a BOS token"),
    ],
)
def test_training_command_refuses(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["train_dictionaries", *arguments])
    with pytest.raises(SystemExit) as caught:
        train_dictionaries.main()
    assert caught.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
