"""Lowered models compute what the bridge and the Hugging Face model compute."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformer_lens.model_bridge.sources.native  # noqa: F401  (adds boot_native)
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

from acdc.errors import ModelError, UnsupportedModelError
from acdc.models import load_model
from acdc.models.lowering import LoweredModel, families, lower
from acdc.models.lowering.attention import KINDS, Kind
from acdc.models.lowering.mlps import lean
from acdc.models.lowering.norm import Norm
from acdc.models.lowering.weights import expected_shapes

VOCAB, LENGTH, WINDOW = 200, 24, 6
TOLERANCE = 1e-4  # of the largest logit

# --- the families -------------------------------------------------------------------------

_SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_NEO = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": WINDOW,
    "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
}  # fmt: skip
_NEOX = {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"} | {"rotary_pct": 0.5}
_GEMMA2 = _SMALL | {
    "head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": WINDOW,
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0,
}  # fmt: skip
_FULL, _SLIDING = "full_attention", "sliding_attention"
_GEMMA3 = _SMALL | {
    "head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": WINDOW,
    "layer_types": [_SLIDING, _FULL],
    "rope_parameters": {
        _SLIDING: {"rope_type": "default", "rope_theta": 20.0},
        _FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    },
}  # fmt: skip
_OPT = {
    "vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
_PARTIAL = {"rope_theta": 100.0, "partial_rotary_factor": 0.5}
_QWEN3_MOE = _SMALL | {
    "head_dim": 12, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
}  # fmt: skip
_GPT_OSS = {
    "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
    "layer_types": [_SLIDING, _FULL],
    "rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 16, "rope_theta": 100.0,
    },
}  # fmt: skip
_SCALED = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT2),
    "gpt2-inverse-layer": ("GPT2", _GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt-neo": ("GPTNeo", _NEO),
    "neox-parallel": ("GPTNeoX", _NEOX | {"use_parallel_residual": True}),
    "neox-sequential": ("GPTNeoX", _NEOX | {"use_parallel_residual": False}),
    "llama": ("Llama", _SMALL),
    "llama-bias": ("Llama", _SMALL | {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", _SMALL),
    "qwen2-window": (
        "Qwen2",
        _SMALL | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", _SMALL | {"head_dim": 12}),
    "mistral": ("Mistral", _SMALL | {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2", _GEMMA2),
    "llama3": ("Llama", _SMALL | {"rope_parameters": _LLAMA3}),
    "llama-linear": ("Llama", _SMALL | {"rope_parameters": _SCALED}),
    "gptj": ("GPTJ", _GPT2 | {"rotary_dim": 4}),
    "opt": ("OPT", _OPT),
    "phi3": ("Phi3", _SMALL | {"pad_token_id": 0, "sliding_window": WINDOW}),
    "phi3-partial": ("Phi3", _SMALL | {"pad_token_id": 0, "rope_parameters": _PARTIAL}),
    "olmo2": ("Olmo2", _SMALL),
    "gemma3": ("Gemma3", _GEMMA3),
    "mixtral": ("Mixtral", _SMALL | {"num_local_experts": 4, "sliding_window": WINDOW}),
    "qwen3-moe": ("Qwen3Moe", _QWEN3_MOE),
    "qwen3-moe-some-dense": ("Qwen3Moe", _QWEN3_MOE | {"mlp_only_layers": [0]}),
    "gpt-oss": ("GptOss", _SMALL | _GPT_OSS),
}


POST_NORMS = ("gemma2", "gemma3", "olmo2")


def _randomise(model: nn.Module) -> None:
    """Enlarge matrices and vary norms and biases, so that every part of the model shows."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data *= 8
        elif name.endswith("bias"):
            parameter.data = 0.5 * torch.randn_like(parameter)
        else:
            parameter.data += 0.4 * torch.randn_like(parameter)


def build(family: str, **changes: Any) -> nn.Module:
    """Build a small random Hugging Face model, seeded."""
    name, config = FAMILIES[family]
    config_class = getattr(transformers, f"{name}{'Text' * (name == 'Gemma3')}Config")
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(family))
        model = getattr(transformers, name + suffix)(config_class(**config | changes)).eval()
        _randomise(model)
    return model


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(data / "gpt2-tokenizer")


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory, tokens: Tensor) -> Callable[[str], Any]:
    """Build, save and lower a family, once per test run."""
    built: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in built:
            folder = tmp_path_factory.mktemp(family)
            model = build(family)
            model.save_pretrained(folder)
            with torch.no_grad():
                logits = model(tokens).logits
            lowered, _ = load_model(str(folder))
            built[family] = SimpleNamespace(folder=folder, logits=logits, lowered=lowered)
        return built[family]

    return get


@torch.no_grad()
def logits_of(model: LoweredModel, tokens: Tensor) -> Tensor:
    final = model.forward(tokens).final
    assert final is not None
    return model.unembed(final)


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference, as a part of the largest logit."""
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_the_model_and_the_bridge(
    family: str, hf: Any, tokens: Tensor, tokenizer: Any
) -> None:
    case = hf(family)
    got = logits_of(case.lowered, tokens)
    assert difference(got, case.logits) < TOLERANCE
    bridge = TransformerBridge.boot_transformers(
        str(case.folder), tokenizer=tokenizer, device="cpu"
    )
    with torch.no_grad():
        assert difference(got, bridge(tokens)) < TOLERANCE


def test_mlps_are_computed_without_what_costs_time_alone(hf: Any, tokens: Tensor) -> None:
    module = build("gpt2").transformer.h[0].mlp
    twin = lean(module)
    x = torch.randn(2, 3, 5, module.c_fc.weight.shape[0])
    assert isinstance(twin.act, nn.GELU)
    assert type(module.act).__name__ == "NewGELUActivation"
    assert torch.allclose(twin(x), module(x), atol=1e-5)
    for layer in hf("gpt2").lowered.layers:
        parts = [*layer.mlp.module.children(), layer.mlp.writer, layer.mlp.readers[0][0]]
        assert not any(hasattr(part, "original_component") for part in parts)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_projections_of_what_stands_before_a_norm(family: str, hf: Any) -> None:
    layer = hf(family).lowered.layers[1]
    x = torch.randn(3, 7, layer.attention.W_O.shape[-1])
    inverse = layer.ln1.apart(x)
    with torch.no_grad():
        for kind in KINDS:
            some = [0, 1, 3][: len(layer.attention.W[kind])]
            here = slice(0, len(some))
            expected = layer.attention.project_each(kind, layer.ln1(x[here]), some)
            got = layer.attention.project_apart(kind, layer.ln1, x[here], inverse[here], some)
            assert torch.allclose(got, expected, atol=1e-5 * float(expected.abs().max()))
    assert layer.ln1.hold(x).apart(x) is None
    assert layer.ln1.apart(x.bfloat16()) is None
    assert layer.ln1.apart(x.double()) is None
    assert hf("gpt2").lowered.layers[0].ln1.apart(x) is None


def altered(model: LoweredModel, **fields: Any) -> LoweredModel:
    """Return the model with other values in all its attention layers."""
    layers = tuple(
        dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, **fields))
        for layer in model.layers
    )
    return dataclasses.replace(model, layers=layers)


def _without_post_norm(model: LoweredModel) -> LoweredModel:
    layers = tuple(dataclasses.replace(layer, attention_post=None) for layer in model.layers)
    return dataclasses.replace(model, layers=layers)


def _other_parallel(model: LoweredModel) -> LoweredModel:
    shape = dataclasses.replace(model.shape, parallel=not model.shape.parallel)
    return dataclasses.replace(model, shape=shape)


def _adjacent_rotary(model: LoweredModel) -> LoweredModel:
    rotary = model.layers[0].attention.rotary
    assert rotary is not None
    return altered(model, rotary=dataclasses.replace(rotary, adjacent=True))


def _other_pairs(model: LoweredModel) -> LoweredModel:
    rotary = model.layers[0].attention.rotary
    assert rotary is not None
    return altered(model, rotary=dataclasses.replace(rotary, adjacent=not rotary.adjacent))


def _unscaled_rotary(model: LoweredModel, base: float) -> LoweredModel:
    rotary = model.layers[0].attention.rotary
    assert rotary is not None
    n, width = rotary.cos.shape
    angles = torch.arange(n)[:, None] / base ** (torch.arange(0, width, 2) / width)
    angles = torch.cat((angles, angles), -1)
    return altered(model, rotary=dataclasses.replace(rotary, cos=angles.cos(), sin=angles.sin()))


def _shifted_positions(model: LoweredModel) -> LoweredModel:
    def embed(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        later = torch.cat((tokens, tokens[:, :1]), 1)
        _, positions = model.embed_parts(later)
        assert positions is not None
        return model.embed_parts(tokens)[0], positions[:, 1:]

    return dataclasses.replace(model, embed_parts=embed)


def _shared_of(model: LoweredModel, kind: Kind) -> LoweredModel:
    shared = model.layers[0].attention.shared
    assert set(shared) == {"q", "k"}
    return altered(model, shared={kind: shared[kind]})


def _narrow_rotary(model: LoweredModel) -> LoweredModel:
    rotary = model.layers[0].attention.rotary
    assert rotary is not None
    cos, sin = rotary.cos[:, ::2], rotary.sin[:, ::2]
    return altered(model, rotary=dataclasses.replace(rotary, cos=cos, sin=sin))


def _other_groups(model: LoweredModel) -> LoweredModel:
    """Let head h read key-value head h mod n instead of h div group."""
    attention = model.layers[0].attention
    order = torch.arange(attention.n_heads).view(-1, attention.group).T.flatten()
    layers = tuple(
        dataclasses.replace(
            layer,
            attention=dataclasses.replace(
                layer.attention,
                W=layer.attention.W | {"q": layer.attention.W["q"][order]},
                W_O=layer.attention.W_O[order],
            ),
        )
        for layer in model.layers
    )
    return dataclasses.replace(model, layers=layers)


def _no_bias(kind: str) -> Callable[[LoweredModel], LoweredModel]:
    def change(model: LoweredModel) -> LoweredModel:
        layers = tuple(
            dataclasses.replace(
                layer,
                attention=dataclasses.replace(layer.attention, b=layer.attention.b | {kind: None}),
            )
            for layer in model.layers
        )
        return dataclasses.replace(model, layers=layers)

    return change


PLANTED: list[tuple[str, str, Callable[[LoweredModel], LoweredModel]]] = [
    ("gpt2", "scale", lambda m: altered(m, scale=1.0)),
    ("gpt2", "b_O", lambda m: altered(m, b_O=None)),
    ("gpt2", "b_Q", _no_bias("q")),
    ("gpt2", "b_V", _no_bias("v")),
    ("gpt2", "causal", lambda m: altered(m, causal=False)),
    (
        "gpt2-inverse-layer",
        "scale",
        lambda m: altered(m, scale=m.layers[0].attention.scale),
    ),
    ("gpt-neo", "window", lambda m: altered(m, window=None)),
    ("gpt-neo", "window of all layers", lambda m: altered(m, window=WINDOW)),
    ("gpt-neo", "scale", lambda m: altered(m, scale=8**-0.5)),
    ("neox-parallel", "parallel", _other_parallel),
    ("neox-parallel", "rotary", lambda m: altered(m, rotary=None)),
    ("neox-parallel", "rotary_dim", _narrow_rotary),
    ("neox-sequential", "parallel", _other_parallel),
    ("llama", "rotary pairs", _adjacent_rotary),
    ("llama", "groups", _other_groups),
    ("llama-bias", "b_Q", _no_bias("q")),
    ("llama-bias", "b_O", lambda m: altered(m, b_O=None)),
    ("qwen2", "b_Q", _no_bias("q")),
    ("qwen2-window", "window", lambda m: altered(m, window=None)),
    ("qwen2-window", "window of all layers", lambda m: altered(m, window=WINDOW)),
    ("qwen3", "qk norm", lambda m: altered(m, norm={"q": None, "k": None})),
    ("qwen3", "scale", lambda m: altered(m, scale=8**-0.5)),
    ("mistral", "window", lambda m: altered(m, window=None)),
    ("mistral", "window by one", lambda m: altered(m, window=WINDOW + 1)),
    ("gemma2", "window", lambda m: altered(m, window=None)),
    ("gemma2", "window of all layers", lambda m: altered(m, window=WINDOW)),
    ("gemma2", "soft_cap", lambda m: altered(m, soft_cap=None)),
    ("gemma2", "logit_cap", lambda m: dataclasses.replace(m, logit_cap=None)),
    ("gemma2", "post norm", _without_post_norm),
    ("gemma2", "scale", lambda m: altered(m, scale=16**-0.5)),
    ("llama3", "scaled rotary", lambda m: _unscaled_rotary(m, 500.0)),
    ("llama-linear", "scaled rotary", lambda m: _unscaled_rotary(m, 100.0)),
    ("gptj", "parallel", _other_parallel),
    ("gptj", "rotary pairs", _other_pairs),
    ("gptj", "rotary_dim", _narrow_rotary),
    ("gptj", "scale", lambda m: altered(m, scale=1.0)),
    ("opt", "positions", _shifted_positions),
    ("opt", "b_Q", _no_bias("q")),
    ("opt", "b_O", lambda m: altered(m, b_O=None)),
    ("phi3", "window", lambda m: altered(m, window=None)),
    ("phi3-partial", "rotary_dim", _narrow_rotary),
    ("olmo2", "norm of all heads", lambda m: altered(m, shared={})),
    ("olmo2", "norm of all queries", lambda m: _shared_of(m, "k")),
    ("olmo2", "norm of all keys", lambda m: _shared_of(m, "q")),
    ("olmo2", "post norm", _without_post_norm),
    ("gemma3", "window", lambda m: altered(m, window=None)),
    ("gemma3", "window of all layers", lambda m: altered(m, window=WINDOW)),
    ("gemma3", "qk norm", lambda m: altered(m, norm={"q": None, "k": None})),
    ("gemma3", "one rotary", lambda m: altered(m, rotary=m.layers[0].attention.rotary)),
    ("gemma3", "post norm", _without_post_norm),
    ("gemma3", "scale", lambda m: altered(m, scale=16**-0.5)),
]


@pytest.mark.parametrize(
    ("family", "change"),
    [pytest.param(f, change, id=f"{f}: {feature}") for f, feature, change in PLANTED],
)
def test_every_feature_shows_in_the_logits(
    family: str, change: Callable[[LoweredModel], LoweredModel], hf: Any, tokens: Tensor
) -> None:
    case = hf(family)
    wrong = logits_of(change(case.lowered), tokens)
    assert difference(wrong, case.logits) > 30 * TOLERANCE


def test_grouped_heads_stay_grouped(hf: Any) -> None:
    attention = hf("llama").lowered.layers[0].attention
    assert attention.W["k"].shape == (2, 32, 8)
    assert attention.group == 2
    assert hf("llama").lowered.shape.kv_heads == 2
    assert hf("qwen3").lowered.layers[0].attention.W["q"].shape == (4, 32, 12)
    assert hf("neox-parallel").lowered.layers[0].attention.rotary.cos.shape[1] == 4
    assert hf("neox-parallel").lowered.shape.parallel
    assert hf("gemma2").lowered.has_post_norm


def test_gpt2_with_its_tokenizer(tmp_path: Path, data: Path) -> None:
    for file in (data / "gpt2-tokenizer").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    model = build("gpt2", vocab_size=50257)
    model.save_pretrained(tmp_path)
    lowered, tokenizer = load_model(str(tmp_path))
    assert tokenizer is not None
    ids = torch.tensor([tokenizer.encode("When Mary and John went to the store, John gave")])
    assert tokenizer.decode(ids[0, 1]) == " Mary"
    with torch.no_grad():
        assert difference(logits_of(lowered, ids), model(ids).logits) < TOLERANCE


def test_stories260k(stories: Path) -> None:
    lowered, tokenizer = load_model(str(stories))
    model = transformers.AutoModelForCausalLM.from_pretrained(stories)
    text = "Once upon a time, there was a little girl named Lily."
    ids = torch.tensor([tokenizer.encode(text)])
    got = logits_of(lowered, ids)
    with torch.no_grad():
        assert difference(got, model(ids).logits) < TOLERANCE
    she, he = (tokenizer.convert_tokens_to_ids(word) for word in ("▁She", "▁He"))
    assert got[0, -1].argmax() == she
    assert got[0, -1, she] - got[0, -1, he] > 6


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gemma3", "gptj", "olmo2"])
def test_other_types(family: str, dtype: str, hf: Any, tokens: Tensor) -> None:
    case = hf(family)
    lowered, _ = load_model(str(case.folder), dtype=dtype)
    got = logits_of(lowered, tokens)
    assert got.dtype is getattr(torch, dtype)
    limit = {"float64": TOLERANCE, "bfloat16": 0.2, "float16": 0.02}[dtype]
    assert difference(got.float(), case.logits) < limit


# --- native models ------------------------------------------------------------------------

_NATIVE = {
    "n_layers": 2, "d_model": 24, "d_head": 6, "n_heads": 4, "n_ctx": 32, "d_vocab": VOCAB,
    "d_mlp": 40, "act_fn": "gelu_new", "normalization_type": "LN",
    "positional_embedding_type": "standard",
}  # fmt: skip
_ROTARY = {"positional_embedding_type": "rotary"}

NATIVE: dict[str, dict[str, Any]] = {
    "LN": {},
    "RMS": {"normalization_type": "RMS"},
    "LNPre": {"normalization_type": "LNPre"},
    "RMSPre": {"normalization_type": "RMSPre"},
    "no norm": {"normalization_type": None},
    "final RMS": {"final_rms": True},
    "attention only": {"attn_only": True},
    "gated": {"gated_mlp": True, "act_fn": "silu", "normalization_type": "RMS"},
    "solu_ln": {"act_fn": "solu_ln"},
    "rotary": _ROTARY,
    "partial rotary": _ROTARY | {"rotary_dim": 4, "rotary_base": 100},
    "grouped": {"n_key_value_heads": 2},
    "grouped rotary": _ROTARY | {"n_key_value_heads": 1},
    "bidirectional": {"attention_dir": "bidirectional"},
    "scale": {"attn_scale": 5.0},
    "soft caps": {"attn_scores_soft_cap": 1.0, "output_logits_soft_cap": 2.0},
    "outputs": {"d_vocab_out": 7},
}


def native_state(config: dict[str, Any], *, b_U: bool = True) -> dict[str, Tensor]:
    """Random weights in HookedTransformer layout."""
    generator = torch.Generator().manual_seed(2)
    shapes = expected_shapes(TransformerBridgeConfig(**config))
    state = {key: 0.4 * torch.randn(*s, generator=generator) for key, s in shapes.items()}
    state |= {key: 1 + value for key, value in state.items() if key.endswith(".w")}
    return state if b_U else {k: v for k, v in state.items() if k != "unembed.b_U"}


def save_native(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return folder


def native_bridge(config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    bridge = TransformerBridge.boot_native(TransformerBridgeConfig(**config), device="cpu")
    bridge.load_state_dict(convert_tl_checkpoint(state, bridge.cfg), strict=True)
    return bridge


@pytest.mark.parametrize("kind", NATIVE)
def test_native_equals_the_bridge(kind: str, tmp_path: Path, tokens: Tensor) -> None:
    config = _NATIVE | NATIVE[kind]
    state = native_state(config)
    lowered, tokenizer = load_model(str(save_native(tmp_path, config, state)))
    assert tokenizer is None
    with torch.no_grad():
        expected = native_bridge(config, state)(tokens)
    got = logits_of(lowered, tokens)
    assert difference(got, expected) < TOLERANCE
    if kind == "bidirectional":
        assert difference(logits_of(altered(lowered, causal=True), tokens), expected) > 0.01
    if "rotary" in kind:
        assert difference(logits_of(altered(lowered, rotary=None), tokens), expected) > 0.01


# --- norms --------------------------------------------------------------------------------


def _norms() -> dict[str, Norm]:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    layer_norm, rms, gemma = nn.LayerNorm(10), LlamaRMSNorm(10, 1e-5), Gemma2RMSNorm(10)
    generator = torch.Generator().manual_seed(3)
    for module in (layer_norm, rms, gemma):
        for parameter in module.parameters():
            parameter.data = torch.randn(10, generator=generator)
            parameter.requires_grad_(False)
    bare = nn.LayerNorm(10, elementwise_affine=False)
    modules = {"LN": layer_norm, "RMS": rms, "Gemma": gemma, "bare": bare, "none": nn.Identity()}
    return {
        key: families._norm(SimpleNamespace(original_component=module))
        for key, module in modules.items()
    }


@pytest.mark.parametrize("kind", ["LN", "RMS", "Gemma", "bare", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_products_equal_autograd(kind: str, dtype: torch.dtype) -> None:
    norm = _norms()[kind]
    if isinstance(norm.module, nn.Module):
        norm.module.to(dtype)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(4, 3, 10, generator=generator, dtype=dtype) * 2 + 1
    more = torch.randn(5, 4, 3, 10, generator=generator, dtype=dtype)  # a leading axis
    vjp, jvp = norm.vjp(x, more), norm.jvp(x, more)
    for i, v in enumerate(more):
        pulled = torch.autograd.functional.vjp(norm, x, v)[1]
        pushed = torch.autograd.functional.jvp(norm, x, v)[1]
        limit = 1e-5 if dtype is torch.float32 or kind in ("RMS", "Gemma") else 1e-12
        torch.testing.assert_close(vjp[i], pulled, atol=limit, rtol=limit)
        torch.testing.assert_close(jvp[i], pushed, atol=limit, rtol=limit)


def test_norm_of_another_kind_is_refused() -> None:
    component = SimpleNamespace(original_component=nn.GroupNorm(2, 10))
    with pytest.raises(UnsupportedModelError, match="norm 'GroupNorm' is not supported"):
        families._norm(component)


# --- nodes one by one ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    ["gpt2", "gpt-neo", "qwen3", "mistral", "gemma2", "neox-parallel", "gptj", "olmo2", "gemma3"],
)
def test_single_heads_equal_all_heads(family: str, hf: Any, tokens: Tensor) -> None:
    model = hf(family).lowered
    trace = model.forward(tokens)
    for i, layer in enumerate(model.layers):
        attention = layer.attention
        x = layer.ln1(trace.attention_in[i])
        mask = attention.mask(LENGTH, tokens.device)
        every = slice(0, LENGTH)
        late = torch.tensor([LENGTH - 1, 3])
        for head in range(attention.n_heads):
            kv = head // attention.group
            q = attention.place("q", attention.project_head("q", head, x), every)
            k = attention.place("k", attention.project_head("k", kv, x), every)
            v = attention.place("v", attention.project_head("v", kv, x), every)
            z = attention.attend(q, k, v, mask)
            torch.testing.assert_close(z, trace.z[i][:, head], atol=1e-4, rtol=1e-4)
            some = attention.project_head("q", head, x[:, late])
            some = attention.place("q", some, late)
            z = attention.attend(some, k, v, None if mask is None else mask[late])
            torch.testing.assert_close(z, trace.z[i][:, head][:, late], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "olmo2"])
@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_projections_agree(family: str, kind: Any, hf: Any, tokens: Tensor) -> None:
    model = hf(family).lowered
    attention = model.layers[1].attention
    x = model.forward(tokens).attention_in[1]
    together = attention.project(kind, x)  # (batch, head, pos, d_head)
    heads = together.shape[1]
    per_head = x.flatten(0, 1).expand(heads, -1, -1)
    split = attention.project_split(kind, per_head).unflatten(1, x.shape[:2])
    torch.testing.assert_close(split.transpose(0, 1), together, atol=1e-4, rtol=1e-4)
    for head in range(heads):
        one = attention.project_head(kind, head, x)
        torch.testing.assert_close(one, together[:, head], atol=1e-4, rtol=1e-4)
    leading = attention.project(kind, x[None, None])
    torch.testing.assert_close(leading[0, 0], together, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in POST_NORMS])
@pytest.mark.parametrize("split_embed", [False, True])
def test_senders_sum_to_the_final_stream(
    family: str, split_embed: bool, hf: Any, tokens: Tensor
) -> None:
    model = hf(family).lowered
    shape = dataclasses.replace(model.shape, split_embed=split_embed)
    model = dataclasses.replace(model, shape=shape)
    trace = model.forward(tokens)
    senders = model.senders(trace)
    assert len(senders) == (2 if split_embed else 1) + 2 * (4 + 1)
    biases = [b for layer in model.layers if (b := layer.attention.b_O) is not None]
    total = senders.sum(0) + sum(biases, torch.zeros(model.d_model))
    torch.testing.assert_close(total, trace.final, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3"])
def test_unembedding_of_single_tokens(family: str, hf: Any, tokens: Tensor) -> None:
    model = hf(family).lowered
    final = model.forward(tokens).final[:, -1]
    some = tokens[:, :5]
    expected = model.unembed(final).gather(1, some)
    torch.testing.assert_close(model.unembed(final, some), expected, atol=1e-4, rtol=1e-4)
    more = torch.stack((final, 2 * final))
    stacked = model.unembed(more, some)
    assert stacked.shape == (2, 3, 5)
    torch.testing.assert_close(stacked[0], expected, atol=1e-4, rtol=1e-4)


def test_unembedding_bias(tmp_path: Path, tokens: Tensor) -> None:
    state = native_state(_NATIVE)
    model, _ = load_model(str(save_native(tmp_path, _NATIVE, state)))
    final = model.forward(tokens).final[:, -1]
    by_hand = model.ln_final(final) @ state["unembed.W_U"] + state["unembed.b_U"]
    torch.testing.assert_close(model.unembed(final), by_hand, atol=1e-4, rtol=1e-4)
    expected = by_hand.gather(1, tokens)
    torch.testing.assert_close(model.unembed(final, tokens), expected, atol=1e-4, rtol=1e-4)


# --- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Bloom", "Cohere", "Falcon", "Gemma", "Phi"])
def test_other_architectures_are_refused(name: str, tmp_path: Path) -> None:
    getattr(transformers, f"{name}Config")().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"architecture '{name}ForCausalLM' is not"):
        load_model(str(tmp_path))


def test_bridge_of_another_architecture_is_refused(tokenizer: Any) -> None:
    config = transformers.StableLmConfig(**_SMALL | {"num_hidden_layers": 1})
    config.architectures = ["StableLmForCausalLM"]
    with torch.random.fork_rng(devices=[]):
        model = transformers.StableLmForCausalLM(config)
    bridge = TransformerBridge.boot_transformers(
        "stablelm", hf_model=model, tokenizer=tokenizer, device="cpu"
    )
    with pytest.raises(UnsupportedModelError, match="architecture 'StableLmForCausalLM' is not"):
        lower(bridge)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=false (norms behind the"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim=16 with hidden_size=32 ("),
    ],
)
def test_variants_of_families_are_refused(
    family: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    build(family, **changes).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=re.escape(words)):
        load_model(str(tmp_path))


def test_rotary_positions_that_change_with_length_are_refused(
    tmp_path: Path, tokenizer: Any
) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0} | {
        f"{length}_factor": [1.0] * 4 for length in ("short", "long")
    }
    rope["original_max_position_embeddings"] = 32
    model = build("phi3", rope_parameters=rope)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="rope_type is 'longrope', expected one of default, lin"):
        load_model(str(tmp_path))
    bridge = TransformerBridge.boot_transformers(
        "phi3", hf_model=model, tokenizer=tokenizer, device="cpu"
    )
    with pytest.raises(UnsupportedModelError, match="of the type longrope, whose angles change"):
        lower(bridge)


def test_old_names_of_gemma3(tmp_path: Path, tokens: Tensor) -> None:
    """As its first checkpoints say which layers are local and what they rotate by."""
    rope = {
        _SLIDING: {"rope_type": "default", "rope_theta": 30.0},
        _FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    }
    model = build("gemma3", rope_parameters=rope)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("layer_types") == [_SLIDING, _FULL]
    del config["rope_parameters"]
    config |= {
        "sliding_window_pattern": 2, "rope_local_base_freq": 30.0, "rope_theta": 1000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    }  # fmt: skip
    path.write_text(json.dumps(config))
    lowered, _ = load_model(str(tmp_path))
    assert [layer.attention.window for layer in lowered.layers] == [WINDOW, None]
    with torch.no_grad():
        assert difference(logits_of(lowered, tokens), model(tokens).logits) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "function", "wrong"),
    [("llama", "_hf_scale", 0.1), ("mistral", "_hf_window", None), ("llama", "_hf_rotary", None)],
)
def test_a_feature_that_is_not_read_is_refused(
    family: str, function: str, wrong: Any, hf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hf(family).folder
    monkeypatch.setattr(families, function, lambda *_: wrong)
    with pytest.raises(UnsupportedModelError, match="lowered logits differ from the model's by"):
        load_model(str(folder))


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    state = native_state(_NATIVE)
    state["blocks.0.mlp.b_out"][3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        load_model(str(save_native(tmp_path, _NATIVE, state)))
