"""Mixtures of experts whose experts are nodes, against experts and routers written out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import oracle
import pytest
import torch
import transformers
from oracle import Oracle, Pass, exact_scores, sequential_acdc, small_task
from torch import Tensor
from torch.nn.functional import linear, silu

import acdc as package
from acdc.ablations.base import ABLATIONS
from acdc.dictionaries.attach import attach_experts, attach_neurons
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.engine.patched import PatchedModel
from acdc.errors import OptionError, UnsupportedModelError
from acdc.methods.acdc import acdc
from acdc.methods.eap import eap
from acdc.methods.exact import exact
from acdc.methods.gim import gim
from acdc.models.lowering import LoweredModel, lower
from acdc.runs.opened import open_run
from acdc.runs.reopen import reopen
from acdc.settings import Norms, Router
from acdc.tasks.positions import find_positions

FAMILIES = ("Mixtral", "Qwen3Moe", "GptOss")
N_EXPERTS, WIDTH, HEADS = 3, 8, 2
_SMALL = {
    "vocab_size": oracle.VOCAB, "hidden_size": WIDTH, "intermediate_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": 1,
    "max_position_embeddings": 8, "num_experts_per_tok": 2, "head_dim": 4, "pad_token_id": 0,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": N_EXPERTS},
    "Qwen3Moe": {"num_experts": N_EXPERTS, "moe_intermediate_size": 6},
    "GptOss": {
        "num_local_experts": N_EXPERTS, "sliding_window": 3, "swiglu_limit": 1.5,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
}  # fmt: skip


def build(family: str, seed: int = 0) -> tuple[LoweredModel, Any]:
    """Return a small random mixture, lowered, and its twin that nothing was done to."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    inside, module = plain_module(family, seed), plain_module(family, seed)
    bridge = build_bridge_from_module(
        inside, f"{family}ForCausalLM", hf_config=inside.config, dtype=torch.float32, device="cpu",
        model_name=family,
    )  # fmt: skip
    return lower(bridge, name=family), module


def plain_module(family: str, seed: int) -> Any:
    """Return a small random mixture of Hugging Face."""
    cfg = getattr(transformers, f"{family}Config")(**_SMALL | _OWN[family])
    cfg._attn_implementation = cfg._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        module = getattr(transformers, f"{family}ForCausalLM")(cfg).eval()
    oracle._fill(module, seed, 1.0)
    return module


# --- by hand ------------------------------------------------------------------------------


class ByHand(Pass):
    """A pass in which experts and routers are written out, from the module's weights."""

    module: ClassVar[Any]
    family: ClassVar[str]
    free: ClassVar[bool]

    def __init__(self, model: Any, tokens: Tensor, share: Any = None, *rest: Any) -> None:
        self.chosen: dict[int, Tensor] = {}
        self.held = None if self.free or not share else type(self)(model, tokens).chosen
        super().__init__(model, tokens, share or {}, *rest)

    def mlp(self, i: int, layer: Any) -> dict[str, Tensor]:
        names = [f"m{i}.e{e}" for e in range(N_EXPERTS)]
        read = [layer.ln2(self.read(name)) for name in names]
        asked = layer.ln2(self.read(f"m{i}.router")) if self.free else read[0]
        self.chosen[i] = weights = self.route(i, asked) if self.held is None else self.held[i]
        return {
            name: weights[..., e, None] * self.expert(i, e, read[e]) for e, name in enumerate(names)
        }

    def route(self, i: int, y: Tensor) -> Tensor:
        mlp = self.module.model.layers[i].mlp
        router = mlp.router if self.family == "GptOss" else mlp.gate
        scores = linear(y, router.weight, getattr(router, "bias", None))
        if self.family != "GptOss":
            scores = scores.softmax(-1)
        top = scores.sort(-1, descending=True).values[..., 1:2]
        if self.family == "GptOss":
            return scores.masked_fill(scores < top, -torch.inf).softmax(-1)
        kept = scores * (scores >= top)
        return kept if self.family == "Qwen3Moe" else kept / kept.sum(-1, keepdim=True)

    def expert(self, i: int, e: int, y: Tensor) -> Tensor:
        experts = self.module.model.layers[i].mlp.experts
        if self.family != "GptOss":
            gate, up = (y @ experts.gate_up_proj[e].T).chunk(2, -1)
            return (silu(gate) * up) @ experts.down_proj[e].T
        both = y @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
        gate, up = both[..., ::2].clamp(max=1.5), both[..., 1::2].clamp(-1.5, 1.5)
        h = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        return h @ experts.down_proj[e] + experts.down_proj_bias[e]


def edges_of(model: LoweredModel, *, free: bool) -> list[str]:
    """In the order of a search: a layer's router first, then its experts from the last."""
    found = []
    for v in oracle.receivers_in_acdc_order(model.shape):
        readers = [v]
        if v[0] == "m":
            readers = [f"{v}.router"] * free + [f"{v}.e{e}" for e in reversed(range(N_EXPERTS))]
        senders = oracle.senders_in_acdc_order(model.shape, v)
        some = [f"{u}.e{e}" for u in senders for e in range(N_EXPERTS if u[0] == "m" else 0)]
        spread = [[x for x in some if x.startswith(f"{u}.")] or [u] for u in senders]
        found += [f"{u}->{reader}" for reader in readers for each in spread for u in each]
    return found


def both(
    family: str, router: Router, seed: int = 0, metric: str = "logit_diff", **options: Any
) -> tuple[Experiment, Oracle]:
    model, module = build(family, seed)
    free = router == "free"
    own = {"module": module, "family": family, "free": free}
    task = small_task(seed, 2, (4,))
    slow = Oracle(
        model, task, metric, passes=type("Own", (ByHand,), own),
        edges=edges_of(model, free=free), **options,
    )  # fmt: skip
    plain = Experiment(model, task, get_metric(metric), router=router, **options)
    return attach_experts(plain).experiment, slow


def by_name(experiment: Experiment, scores: np.ndarray) -> dict[str, float]:
    return dict(zip(experiment.graph.edge_names(), scores.tolist(), strict=True))


CASES = [(family, router) for family in FAMILIES for router in ("frozen", "free")]


@pytest.mark.parametrize(("family", "router"), CASES)
def test_exact_patching_and_acdc(family: str, router: Router) -> None:
    experiment, slow = both(family, router, 1)
    wanted = exact_scores(slow)
    found = by_name(experiment, exact(experiment))
    assert found.keys() == wanted.keys()
    scale = slow.logit_scale()
    assert max(abs(found[e] - wanted[e]) for e in wanted) < 1e-4 * scale
    reads = [e for e in wanted if "->m" in e and abs(wanted[e]) > 1e-3 * scale]
    assert any(".router" in e for e in reads) == (router == "free"), "the case shows nothing"
    for tau in (0.03,):
        by_hand = sequential_acdc(slow, tau)
        assert by_hand.margin > 1e-4
        circuit, _ = acdc(experiment, tau)
        assert set(circuit.edges()) == by_hand.kept
        assert 3 < circuit.n_edges < circuit.graph.n_edges


@pytest.mark.parametrize(("family", "router"), CASES)
def test_eap_is_the_derivative(family: str, router: Router) -> None:
    direction = "noising" if router == "frozen" else "denoising"
    experiment, slow = both(family, router, direction=direction)
    wanted = oracle.edge_scores_by_finite_differences(slow, 3e-3)
    found = by_name(experiment, eap(experiment))
    largest = max(map(abs, wanted.values()))
    for edge, score in wanted.items():
        assert abs(found[edge] - score) < 2e-3 * largest, edge


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("intervention", [name for name in ABLATIONS if name != "optimal"])
@pytest.mark.parametrize(("family", "router"), [("Mixtral", "free"), ("GptOss", "frozen")])
def test_random_circuits_under_all_ablations(
    family: str, router: Router, intervention: str, direction: str
) -> None:
    options = {"intervention": intervention, "direction": direction}
    experiment, slow = both(family, router, 2, **options)
    model, rng = PatchedModel(experiment), np.random.default_rng(0)
    for share in (0.0, 0.3, 0.7, 1.0):
        kept = rng.random(experiment.graph.n_edges) < share
        wanted = slow.without(set(slow.edges) - set(oracle.share_of(experiment.graph, kept)))
        assert model.metric(kept) == pytest.approx(wanted, abs=1e-4 * slow.logit_scale())


def test_optimal_constants_are_trained() -> None:
    experiment, slow = both("Mixtral", "frozen")
    trained = replace(experiment, intervention="optimal", training_steps=3)
    constants = ABLATIONS["optimal"].carries(trained)
    trained = replace(trained, constants=constants)
    own = {
        name: x
        for block, values in zip(trained.program.blocks, constants.at(4), strict=True)
        for name, x in zip(
            trained.graph.senders[block.start : block.stop],
            block.vectors(values)[:, 0, 0, 0], strict=True,
        )
    }  # fmt: skip
    again = Oracle(
        slow.model, trained.task, "logit_diff", "optimal", passes=slow.passes, edges=slow.edges,
        constants={name: x[None] for name, x in own.items()},
    )  # fmt: skip
    kept = np.random.default_rng(0).random(trained.graph.n_edges) < 0.5
    wanted = again.without(set(slow.edges) - set(oracle.share_of(trained.graph, kept)))
    assert PatchedModel(trained).metric(kept) == pytest.approx(wanted, abs=1e-4)


def test_a_router_is_told_by_its_kind() -> None:
    frozen, _ = both("Mixtral", "frozen")
    free, _ = both("Mixtral", "free")
    assert "m1.router" in free.graph.receivers
    assert "m1.router" not in frozen.graph.receivers
    assert frozen.graph.senders == free.graph.senders
    assert [site.kind for site in free.graph.shape.sites] == ["routed", "routed"]
    whole = np.ones(frozen.graph.n_edges, dtype=bool)
    assert PatchedModel(frozen).metric(whole) == pytest.approx(frozen.plain("clean"), abs=1e-5)


# --- hooks on the model's own modules -----------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_ablated_experts_are_those_of_hooks(family: str) -> None:
    """All edges out of an expert, and those of the embedding into it, with frozen routers."""
    model, module = build(family, 3)
    task = small_task(3, 1, (5,))
    plain = Experiment(model, task, get_metric("logit_diff"))
    experiment = attach_experts(plain).experiment
    patched, names = PatchedModel(experiment), experiment.graph.edge_names()
    (pair,) = task.pairs
    clean, corrupt = torch.tensor([pair.clean]), torch.tensor([pair.corrupt])
    inner = [_Inner(module, i) for i in range(2)]

    @torch.no_grad()
    def run(tokens: Tensor) -> float:
        logits = module(tokens).logits[0, -1].double().numpy()
        return oracle.logit_diff(logits, logits, pair)

    run(corrupt)
    other = [list(layer.written) for layer in inner]
    embedded = module.get_input_embeddings()
    change = (embedded(corrupt) - embedded(clean)).detach()
    base = run(clean)
    for layer in inner:
        layer.freeze()
    for i, layer in enumerate(inner):
        for e in range(N_EXPERTS):
            layer.instead[e] = other[i][e]
            kept = np.array([not name.startswith(f"m{i}.e{e}->") for name in names])
            assert patched.metric(kept) - base == pytest.approx(run(clean) - base, abs=1e-4)
            layer.instead.clear()
            layer.moved[e] = change
            kept = np.array([name != f"input->m{i}.e{e}" for name in names])
            assert patched.metric(kept) - base == pytest.approx(run(clean) - base, abs=1e-4)
            layer.moved.clear()
    for layer in inner:
        layer.remove()


class _Inner:
    """A mixture in a Hugging Face model whose experts can be told what to read or to write."""

    def __init__(self, module: Any, i: int) -> None:
        block = module.model.layers[i]
        self.block, self.mlp = block, block.mlp
        self.experts = block.mlp.experts
        self.written: list[Tensor] = []
        self.instead: dict[int, Tensor] = {}
        self.moved: dict[int, Tensor] = {}
        self.frozen: Any = None
        self.stream: Tensor = torch.empty(0)
        norm = block.post_attention_layernorm
        self.norm = getattr(norm, "original_component", norm)
        self.handles = [
            self.norm.register_forward_pre_hook(self._see),
            self.experts.register_forward_pre_hook(self._route),
            self.experts.register_forward_hook(self._write),
        ]

    def freeze(self) -> None:
        self.frozen = self.last

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, module: Any, given: Any) -> None:
        if not getattr(self, "busy", False):
            self.stream = given[0]

    def _route(self, module: Any, given: Any) -> Any:
        self.last = given[1:]
        return None if self.frozen is None else (given[0], *self.frozen)

    def _write(self, module: Any, given: Any, out: Tensor) -> Tensor:
        x, (which, weights) = given[0], given[1:]
        self.written = []
        for e in range(N_EXPERTS):
            read = x
            if e in self.moved:
                self.busy = True
                read = self.norm(self.stream + self.moved[e]).view_as(x)
                self.busy = False
            weight = (weights * (which == e)).sum(-1, keepdim=True)
            alone = torch.full((len(x), 1), e)
            made = type(module).forward.__wrapped__(module, read, alone, torch.ones(len(x), 1))
            self.written.append(self.instead.get(e, made * weight))
        return torch.stack(self.written).sum(0)


# --- what is refused ----------------------------------------------------------------------


def test_what_experts_cannot_be_asked() -> None:
    model, _ = build("Mixtral")
    experiment = Experiment(model, small_task(0, 2, (5,)), get_metric("logit_diff"))
    with pytest.raises(UnsupportedModelError, match="gim and relp: 'Mixtral' has mixtures of exp"):
        gim(experiment)
    with pytest.raises(UnsupportedModelError, match="neurons: those of the experts of 'Mixtral'"):
        attach_neurons(experiment)
    dense = oracle.small_model("LN", 0)
    with pytest.raises(OptionError, match="experts: 'LN' has no mixtures of experts"):
        attach_experts(replace(experiment, model=dense))


# --- a planted model ----------------------------------------------------------------------

ANSWER, OTHER = 6, 7


def planted(router: Router = "frozen") -> Experiment:
    """Return a Mixtral of one layer with two experts, one of which carries the answer.

    A token's embedding is its own dimension, and so is what unembeds it; attention does nothing,
    and the router sends each token to both experts alike.  Expert 1 reads token 0, which clean
    prompts end in and corrupt ones do not, and writes ANSWER.  Expert 0 reads what all tokens
    have in common and writes token 5, on all prompts alike.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    vocab = width = 8
    cfg = transformers.MixtralConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=8,
        num_local_experts=2, num_experts_per_tok=2, head_dim=2,
    )  # fmt: skip
    cfg._attn_implementation = cfg._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        module = transformers.MixtralForCausalLM(cfg).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        module.model.embed_tokens.weight.copy_(torch.eye(vocab))
        module.model.embed_tokens.weight[:, 4] = 1.0
        module.lm_head.weight.copy_(torch.eye(vocab))
        experts = module.model.layers[0].mlp.experts
        for e, (read, write) in enumerate([(4, 5), (0, ANSWER)]):  # of expert 0, and of expert 1
            experts.gate_up_proj[e, 0, read] = experts.gate_up_proj[e, 4, read] = 2.0
            experts.down_proj[e, write, 0] = 1.0
    bridge = build_bridge_from_module(
        module, "MixtralForCausalLM", hf_config=cfg, dtype=torch.float32, device="cpu",
        model_name="planted",
    )  # fmt: skip
    pairs = tuple(
        oracle.Pair((word, 0), (word, other), (ANSWER,), (OTHER,))
        for word in (1, 2, 3)
        for other in (1, 2)
    )
    task = oracle.Task("planted", pairs)
    plain = Experiment(lower(bridge), task, get_metric("logit_diff"), router=router)
    return attach_experts(plain).experiment


@pytest.mark.parametrize("router", ["frozen", "free"])
def test_a_circuit_names_the_expert_that_carries_the_answer(router: Router) -> None:
    experiment = planted(router)
    circuit, _ = acdc(experiment, 0.01)
    assert circuit.edges() == ["input->m0.e1", "m0.e1->logits"]
    scores = by_name(experiment, exact(experiment))
    assert scores["m0.e1->logits"] < -0.5
    assert scores["m0.e0->logits"] == pytest.approx(0, abs=1e-6)
    estimated = by_name(experiment, eap(experiment))
    assert estimated["m0.e1->logits"] < 0
    assert estimated["m0.e0->logits"] == pytest.approx(0, abs=1e-6)


# --- runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["frozen", "free"])
def test_a_run_says_what_its_router_was(router: Router, tmp_path: Path) -> None:
    longer = {"max_position_embeddings": 32, "vocab_size": 40}
    cfg = transformers.MixtralConfig(**_SMALL | _OWN["Mixtral"] | longer)
    with torch.random.fork_rng(devices=[]):
        transformers.MixtralForCausalLM(cfg).save_pretrained(tmp_path / "model")
    run = package.discover(
        "induction", model=str(tmp_path / "model"), method="eap", n_edges=20, experts=True,
        router=router, n_prompts=6, n_select=0, n_test=6,
    )  # fmt: skip
    run.save(tmp_path / "run")
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    assert said["router"] == router
    assert said["mixtures"]["router"] == {"frozen": "frozen at the clean run"}.get(router, router)
    assert [site["architecture"] for site in said["mixtures"]["sites"]] == ["experts"] * 2
    again = json.loads((tmp_path / "run" / "circuit.json").read_text())
    kinds = {site["kind"] for site in again["cfg"]["sites"]}
    assert kinds == {"routed" if router == "free" else "experts"}
    experiment, _ = reopen(open_run(tmp_path / "run"), run.settings)
    assert experiment.router == router
    assert ("m1.router" in experiment.graph.receivers) == (router == "free")
    value = PatchedModel(experiment).metric(run.circuit.in_circuit)
    assert value == pytest.approx(run.claim.seen.metric_circuit, abs=1e-5)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"router": "free"}, "router 'free': .* has no mixtures of experts; leave it out"),
        ({"experts": True}, "experts: .* has no mixtures of experts; leave --experts out"),
        ({"experts": True, "neurons": True}, "experts beside latents or neurons: give one"),
    ],
)
def test_a_dense_model_has_no_experts(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        package.discover("ioi", method="eap", n_edges=5, n_prompts=4, **asked)


@pytest.mark.parametrize("norms", ["live", "frozen"])
@pytest.mark.parametrize("router", ["frozen", "free"])
def test_experts_by_position(router: Router, norms: Norms) -> None:
    """What is recomputed alone is what whole passes give, token by token."""
    model, _ = build("GptOss", 2)
    task = small_task(2, 2, (4,))
    split = find_positions(task, "token", causal=True)
    plain = Experiment(
        model, task, get_metric("logit_diff"), router=router, positions=split, norms=norms
    )  # fmt: skip
    experiment = attach_experts(plain).experiment
    circuit, _ = acdc(experiment, 0.05)
    patched, kept = PatchedModel(experiment), circuit.in_circuit
    assert 3 < circuit.n_edges < len(kept)
    scores = exact(experiment)
    whole = np.ones(len(kept), dtype=bool)
    base = patched.metric(whole)
    for edge in np.flatnonzero(np.abs(scores) > 0)[::9]:
        whole[edge] = False
        assert patched.metric(whole) - base == pytest.approx(scores[edge], abs=1e-4)
        whole[edge] = True
