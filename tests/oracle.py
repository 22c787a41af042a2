"""A slow, obvious implementation that the engine is held against.

Nothing here is shared with ``acdc.engine``, ``acdc.methods`` or ``graphs``:
edges are names, every edge is explicit, every evaluation is a whole forward pass.  Of the
lowered model only its weights, norms, MLPs and embeddings are used.

Below the oracle: builders of small random models and tasks.
"""

from __future__ import annotations

import functools
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from acdc.models.lowering import LoweredLayer, LoweredModel, lower
from acdc.models.lowering.attention import SharedNorm
from acdc.tasks.base import Pair, Task

torch.set_num_threads(1)  # on tensors this small more threads only wait for each other

# --- names, as in DESIGN section 2 and 4 --------------------------------------------------


def sources(shape: Any) -> list[str]:
    return ["tok", "pos"] if shape.split_embed else ["input"]


def receivers_in_acdc_order(shape: Any) -> list[str]:
    """``logits``; per layer from the last: the MLP, then v, k and q of the heads, last first."""
    order = ["logits"]
    for layer in reversed(range(shape.n_layers)):
        if shape.has_mlp:
            order.append(f"m{layer}")
        heads = [f"a{layer}.h{h}" for h in reversed(range(shape.n_heads))]
        shared = heads
        if shape.n_kv_heads != shape.n_heads:
            shared = [f"a{layer}.kv{g}" for g in reversed(range(shape.n_kv_heads))]
        if shape.split_qkv:
            order += [f"{v}<v>" for v in shared] + [f"{v}<k>" for v in shared]
            order += [f"{v}<q>" for v in heads]
        elif shared is heads:
            order += heads
        else:  # not in the paper: by number from the last, a head before its namesake
            numbers = reversed(range(shape.n_heads))
            pairs = ((f"a{layer}.h{i}", f"a{layer}.kv{i}") for i in numbers)
            order += [name for pair in pairs for name in pair if name in heads + shared]
    return order


def senders_in_acdc_order(shape: Any, receiver: str) -> list[str]:
    """From the latest layer: its MLP, then its heads ascending; the embeddings last."""
    if receiver == "logits":
        before, heads_too = shape.n_layers, False
    else:
        before = int(receiver[1:].split(".")[0])
        heads_too = receiver[0] == "m" and not shape.parallel
    order = [f"a{before}.h{h}" for h in range(shape.n_heads)] if heads_too else []
    for layer in reversed(range(before)):
        order += [f"m{layer}"] if shape.has_mlp else []
        order += [f"a{layer}.h{h}" for h in range(shape.n_heads)]
    return order + sources(shape)


def edges_in_acdc_order(shape: Any) -> list[str]:
    return [
        f"{u}->{v}" for v in receivers_in_acdc_order(shape) for u in senders_in_acdc_order(shape, v)
    ]


# --- spans: every edge exists once per span, its ends named as a3.h7@END ------------------


def spans_of(pair: Pair, positions: str) -> list[str]:
    """Return the span of each position of a prompt."""
    if positions == "token":
        return [f"p{i}" for i in range(len(pair.clean))]
    label_of = {at: label for label, ats in pair.spans.items() for at in ats}
    return [label_of.get(i, "rest") for i in range(len(pair.clean))]


def split_edges_in_acdc_order(shape: Any, task: Task, positions: str) -> list[str]:
    """Of each receiver, spans from the last to the first; ``logits`` where some are scored."""
    layouts = [(pair, spans_of(pair, positions)) for pair in task.pairs]
    labels = list(task.pairs[0].spans) if positions == "span" else layouts[0][1]
    there = {span for _, spans in layouts for span in spans}
    scored = {spans[i] for pair, spans in layouts for i in pair.scored}
    order = [span for span in dict.fromkeys(["rest", *labels]) if span in there]
    return [
        f"{u}@{span}->{v}@{span}"
        for v in receivers_in_acdc_order(shape)
        for span in reversed(order)
        if v != "logits" or span in scored
        for u in senders_in_acdc_order(shape, v)
    ]


# --- the forward pass in which every edge is explicit -------------------------------------


class Pass:
    """One forward pass; afterwards ``out`` holds every sender and ``final`` the last stream.

    Parameters
    ----------
    model, tokens
        Lowered model, ``[batch, pos]`` token ids.
    share
        By edge, how much of the ablated value it carries: 1 if it is out, 0 (the default) if
        it is in, between for finite differences; or this for every position, ``[pos]``.
    ablated
        By sender, what an ablated edge carries.
    embeds
        Outputs of the embeddings, if not those of the tokens.
    """

    def __init__(
        self,
        model: LoweredModel,
        tokens: Tensor,
        share: Mapping[str, float | Tensor] = {},
        ablated: Mapping[str, Tensor] = {},
        embeds: list[Tensor] | None = None,
    ) -> None:
        self.model, self.share, self.ablated = model, share, ablated
        embeds = model.embed(tokens) if embeds is None else embeds
        self.out: dict[str, Tensor] = dict(zip(sources(model.shape), embeds, strict=True))
        self.n_attentions = 0  # layers whose heads (and b_O) are in the stream so far
        for i, layer in enumerate(model.layers):
            heads = self._heads(i, layer)
            if layer.mlp is not None and model.shape.parallel:
                mlp = self.mlp(i, layer)
                self._write_heads(heads)
                self.out.update(mlp)
                continue
            self._write_heads(heads)
            if layer.mlp is not None:
                self.out.update(self.mlp(i, layer))
        self.final = self.read("logits")

    def mlp(self, i: int, layer: LoweredLayer) -> dict[str, Tensor]:
        """What the MLP's senders write."""
        assert layer.mlp is not None
        return {f"m{i}": layer.mlp(self.read(f"m{i}"))}

    def _write_heads(self, heads: dict[str, Tensor]) -> None:
        self.out.update(heads)
        self.n_attentions += 1

    def carried(self, u: str, v: str) -> Tensor:
        share = self.share.get(f"{u}->{v}", 0)
        if isinstance(share, Tensor):
            by_position = [
                self._at(slice(i, i + 1), u, float(x)) for i, x in enumerate(share.tolist())
            ]
            return torch.cat(by_position, 1)
        return self._at(slice(None), u, share)

    def _at(self, positions: slice, u: str, share: float) -> Tensor:
        out, ablated = self.out[u][:, positions], self.ablated.get(u)
        if share == 0:
            return out
        assert ablated is not None
        if share == 1:
            return ablated[:, positions]
        return out + share * (ablated[:, positions] - out)

    def read(self, v: str) -> Tensor:
        """Sum what all senders so far bring to receiver ``v``."""
        total = 0
        for u in self.out:
            if u[0] != "a":
                total = total + self.carried(u, v)
        for i in range(self.n_attentions):
            layer = self.model.layers[i]
            written = 0
            for h in range(self.model.shape.n_heads):
                written = written + self.carried(f"a{i}.h{h}", v)
            if layer.attention.b_O is not None:
                written = written + layer.attention.b_O
            if layer.attention_post is not None:
                written = layer.attention_post(written)
            total = total + written
        return total

    def _heads(self, i: int, layer: LoweredLayer) -> dict[str, Tensor]:
        shape, attention = self.model.shape, layer.attention
        group = shape.n_heads // shape.n_kv_heads
        normed: dict[str, Tensor] = {}

        def input_of(node: str, kind: str) -> Tensor:
            v = f"{node}<{kind}>" if shape.split_qkv else node
            if v not in normed:
                normed[v] = layer.ln1(self.read(v))
            return normed[v]

        out, keys, values = {}, {}, {}
        for g in range(shape.n_kv_heads):
            node = f"a{i}.kv{g}" if group > 1 else f"a{i}.h{g}"
            keys[g] = projected(attention, "k", g, input_of(node, "k"))
            values[g] = projected(attention, "v", g, input_of(node, "v"))
        for h in range(shape.n_heads):
            q = projected(attention, "q", h, input_of(f"a{i}.h{h}", "q"))
            z = pattern(attention, q, keys[h // group], h) @ values[h // group]
            out[f"a{i}.h{h}"] = z @ attention.W_O[h]
        return out


def projected(attention: Any, kind: str, head: int, x: Tensor) -> Tensor:
    """``x W + b``, then QK-norm and rotation of queries and keys."""
    read = x
    x = x @ attention.W[kind][head]
    if attention.b[kind] is not None:
        x = x + attention.b[kind][head]
    if kind in attention.shared:
        x = x * inverse_of_all_heads(attention.shared[kind], read)
    if kind != "v" and attention.norm[kind] is not None:
        x = attention.norm[kind](x)
    if kind != "v" and attention.rotary is not None:
        x = rotated(attention.rotary, x)
    return x


def inverse_of_all_heads(shared: Any, read: Tensor) -> Tensor:
    """``1 / root mean square`` of what all heads project of what one of them reads."""
    if not isinstance(shared, SharedNorm):  # a test's own
        return shared.inverse(read)
    every = read @ shared.W
    if shared.b is not None:
        every = every + shared.b
    return (every.square().mean(-1, keepdim=True) + shared.norm.eps).rsqrt()


def rotated(rotary: Any, x: Tensor) -> Tensor:
    """Turn pairs (2i, 2i + 1) or (i, i + n / 2) by the angle of their position."""
    n_pos, n = x.shape[-2], rotary.cos.shape[-1]
    first = torch.arange(0, n, 2) if rotary.adjacent else torch.arange(n // 2)
    second = first + (1 if rotary.adjacent else n // 2)
    cos, sin = rotary.cos[:n_pos, first], rotary.sin[:n_pos, first]
    out = x.clone()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def pattern(attention: Any, q: Tensor, k: Tensor, head: int | None = None) -> Tensor:
    """Softmax of what is seen; with sinks it has to be said whose head's."""
    scores = attention.scale * q @ k.mT
    if attention.soft_cap is not None:
        scores = attention.soft_cap * torch.tanh(scores / attention.soft_cap)
    seen = visible(scores.shape[-1], attention.causal, attention.window)
    scores = scores.masked_fill(~seen, -float("inf"))
    if attention.sinks is None:
        return scores.softmax(-1)
    assert head is not None
    sink = attention.sinks[head].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sink), -1).softmax(-1)[..., :-1]


@functools.cache
def visible(n: int, causal: bool, window: int | None) -> Tensor:
    rows = [
        [(k <= q or not causal) and (window is None or q - k < window) for k in range(n)]
        for q in range(n)
    ]
    return torch.tensor(rows)


# --- metrics of one prompt ----------------------------------------------------------------


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    top = logits.max()
    return logits - top - np.log(np.exp(logits - top).sum())


def kl(logits: np.ndarray, clean: np.ndarray, pair: Pair) -> float:
    p, q = log_probabilities(clean), log_probabilities(logits)
    return float((np.exp(p) * (p - q)).sum())


def logit_diff(logits: np.ndarray, clean: np.ndarray, pair: Pair) -> float:
    right = [logits[t] for t in pair.answers]
    wrong = [logits[t] for t in pair.wrong_answers]
    return float(sum(right) / len(right) - sum(wrong) / len(wrong))


def prob_diff(logits: np.ndarray, clean: np.ndarray, pair: Pair) -> float:
    p = np.exp(log_probabilities(logits))
    return float(sum(p[t] for t in pair.answers) - sum(p[t] for t in pair.wrong_answers))


def nll(logits: np.ndarray, clean: np.ndarray, pair: Pair) -> float:
    return float(-np.logaddexp.reduce(log_probabilities(logits)[list(pair.answers)]))


def mse(logits: np.ndarray, clean: np.ndarray, pair: Pair) -> float:
    return float(sum((x - y) ** 2 for x, y in zip(logits, clean, strict=True)) / len(clean))


METRICS = {"kl": kl, "mse": mse, "logit_diff": logit_diff, "prob_diff": prob_diff, "nll": nll}
LOWER_IS_BETTER = {"kl": True, "mse": True, "logit_diff": False, "prob_diff": False, "nll": True}


# --- experiments --------------------------------------------------------------------------


def plain_outputs(
    model: LoweredModel, prompt: tuple[int, ...], passes: type[Pass] = Pass
) -> dict[str, Tensor]:
    """By sender, ``[pos, d_model]`` of one prompt alone."""
    return {u: x[0] for u, x in passes(model, torch.tensor([prompt])).out.items()}


def mean_outputs(
    model: LoweredModel,
    prompts: list[tuple[int, ...]],
    n_pos: int | None = None,
    passes: type[Pass] = Pass,
) -> dict[str, Tensor]:
    """By sender, the mean over every token of every prompt, ``[1, d_model]``.

    With ``n_pos`` by position, over the prompts of that length, ``[n_pos, d_model]``.
    """
    runs = [plain_outputs(model, p, passes) for p in prompts if n_pos is None or len(p) == n_pos]
    if n_pos is None:
        return {u: torch.cat([run[u] for run in runs]).mean(0, keepdim=True) for u in runs[0]}
    return {u: torch.stack([run[u] for run in runs]).mean(0) for u in runs[0]}


class Oracle:
    """A model on a task, with what ablated edges carry; plain runs are done once.

    With ``positions`` (``token`` or ``span``) edges are split, see :func:`spans_of`.
    ``edges`` are all there are, in the order of a search, where the shape does not say it.
    ``mean_over`` are prompts that means are over; ``constants`` by sender, ``[d_model]``, are what
    edges carry under optimal ablation.
    """

    def __init__(
        self,
        model: LoweredModel,
        task: Task,
        metric: str,
        intervention: str = "resample",
        direction: str = "noising",
        positions: str | None = None,
        mean_over: list[tuple[int, ...]] | None = None,
        constants: Mapping[str, Tensor] = {},
        passes: type[Pass] = Pass,
        edges: list[str] | None = None,
    ) -> None:
        self.passes = passes
        self.model, self.metric_name, self.positions = model, metric, positions
        self.edges = edges or (
            split_edges_in_acdc_order(model.shape, task, positions)
            if positions
            else edges_in_acdc_order(model.shape)
        )
        which = "corrupt" if direction == "noising" else "clean"
        prompts = mean_over or [getattr(pair, which) for pair in task.pairs]
        self.n_rows = sum(len(pair.scored) for pair in task.pairs)
        self.shape = model.shape
        lower_is_better = LOWER_IS_BETTER[metric] == (direction == "noising")
        self.sign = 1 if lower_is_better else -1
        alike: dict[Any, list[Pair]] = defaultdict(list)
        for pair in task.pairs:
            key = spans_of(pair, positions) if positions else [""] * len(pair.clean)
            alike[tuple(key)].append(pair)
        self.spans = list(alike)
        self.groups = []
        with torch.no_grad():
            for pairs in alike.values():
                clean = torch.tensor([pair.clean for pair in pairs])
                corrupt = torch.tensor([pair.corrupt for pair in pairs])
                base, other = (clean, corrupt) if direction == "noising" else (corrupt, clean)
                ablated = dict(passes(model, other).out)
                if intervention == "zero":
                    ablated = {u: torch.zeros_like(x) for u, x in ablated.items()}
                elif intervention != "resample":
                    n_pos = other.shape[1] if intervention == "mean-positional" else None
                    carried = constants or mean_outputs(model, prompts, n_pos, passes)
                    ablated = {u: carried[u].expand_as(x) for u, x in ablated.items()}
                self.groups.append((pairs, base, ablated, self._logits(passes(model, clean))))

    def _logits(self, run: Pass) -> np.ndarray:
        """Logits at every position, ``[batch, pos, vocab]``."""
        return self.model.unembed(run.final).double().numpy()

    @torch.no_grad()
    def metric(self, share: Mapping[str, float]) -> float:
        """Mean metric over prompts and scored positions; ``share`` as in :class:`Pass`."""
        total = 0.0
        for spans, (pairs, base, ablated, clean) in zip(self.spans, self.groups, strict=True):
            here = self._by_position(share, spans) if self.positions else share
            logits = self._logits(self.passes(self.model, base, here, ablated))
            for row, pair in enumerate(pairs):
                for at in pair.scored:
                    total += METRICS[self.metric_name](logits[row, at], clean[row, at], pair)
        return total / self.n_rows

    def _by_position(self, share: Mapping[str, float], spans: Any) -> dict[str, Tensor]:
        """By edge, whatever its span: the share at every position."""
        found: dict[str, Tensor] = {}
        for edge, value in share.items():
            (u, span), (v, _) = (end.split("@") for end in edge.split("->"))
            at = torch.tensor([name == span for name in spans])
            found.setdefault(f"{u}->{v}", torch.zeros(len(spans)))[at] = value
        return found

    def without(self, edges: Any) -> float:
        """Mean metric with these edges ablated and all others in."""
        return self.metric(dict.fromkeys(edges, 1))

    def logit_scale(self) -> float:
        return max(float(np.abs(clean).max()) for _, _, _, clean in self.groups)


def patched_metric(
    model: LoweredModel,
    task: Task,
    metric: str,
    kept: Any,
    intervention: str = "resample",
    direction: str = "noising",
) -> float:
    """Mean metric when only the ``kept`` edges (names) are in."""
    oracle = Oracle(model, task, metric, intervention, direction)
    return oracle.without(set(edges_in_acdc_order(model.shape)) - set(kept))


# --- methods ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequential:
    """What sequential ACDC found.

    Attributes
    ----------
    kept
        Edges that stay.
    changes
        ``m' - m`` by edge, in the order of the decisions.
    metric
        Metric of the circuit, not negated.
    margin
        Smallest ``|change - tau|``.
    """

    kept: set[str]
    changes: dict[str, float]
    metric: float
    margin: float
    two_sided: bool = False

    def decided_before(self, tau: float, guard: float) -> list[str]:
        """Return the edges decided before the first change within ``guard`` of tau."""
        safe = []
        for edge, change in self.changes.items():
            if abs((abs(change) if self.two_sided else change) - tau) < guard:
                break
            safe.append(edge)
        return safe


class Removable(Protocol):
    """What says the metric without some edges: :class:`Oracle`, or whole passes of the engine."""

    edges: list[str]
    sign: int

    def without(self, edges: Any) -> float:
        """Mean metric with these edges ablated."""


def sequential_acdc(
    oracle: Removable, tau: float, order: list[str] | None = None, *, two_sided: bool = False
) -> Sequential:
    """Algorithm 1 of Conmy et al. 2023, one evaluation of the whole model per edge.

    Two-sided, an edge stays out only if the metric changes by less than tau whichever way.
    """
    removed: set[str] = set()
    changes: dict[str, float] = {}
    current = oracle.sign * oracle.without(removed)
    for edge in oracle.edges if order is None else order:
        value = oracle.sign * oracle.without(removed | {edge})
        changes[edge] = value - current
        if -tau < value - current < tau if two_sided else value - current < tau:
            removed.add(edge)
            current = value
    costs = [abs(change) if two_sided else change for change in changes.values()]
    margin = min(abs(cost - tau) for cost in costs)
    return Sequential(set(changes) - removed, changes, oracle.sign * current, margin, two_sided)


def exact_scores(oracle: Oracle) -> dict[str, float]:
    base = oracle.without(())
    return {e: oracle.without({e}) - base for e in oracle.edges}


def edge_scores_by_finite_differences(oracle: Oracle, eps: float = 1e-2) -> dict[str, float]:
    """Derivative of the metric as one edge starts to be ablated, the error of order eps^4."""

    def central(edge: str, step: float) -> float:
        return (oracle.metric({edge: step}) - oracle.metric({edge: -step})) / (2 * step)

    return {edge: (4 * central(edge, eps) - central(edge, 2 * eps)) / 3 for edge in oracle.edges}


# --- small random models and tasks --------------------------------------------------------

VOCAB = 20

_NATIVE = {
    "n_layers": 2, "d_model": 12, "d_head": 4, "n_heads": 2, "n_ctx": 8, "d_vocab": VOCAB,
    "d_mlp": 16, "act_fn": "gelu_new", "normalization_type": "LN", "init_weights": False,
    "positional_embedding_type": "standard",
}  # fmt: skip
_ROTARY = {"positional_embedding_type": "rotary"}
_GATED = {"gated_mlp": True, "act_fn": "silu", "normalization_type": "RMS"}

NATIVE: dict[str, dict[str, Any]] = {
    "LN": {},
    "LNPre": {"normalization_type": "LNPre"},
    "RMS": {"normalization_type": "RMS"},
    "no norm": {"normalization_type": None},
    "attention only": {"attn_only": True},
    "gated rotary": _ROTARY | _GATED,
    "grouped": {"n_key_value_heads": 1},
    "grouped rotary": _ROTARY | _GATED | {"n_key_value_heads": 1},
    "bidirectional": {"attention_dir": "bidirectional"},
    "soft caps": {"attn_scores_soft_cap": 1.0, "output_logits_soft_cap": 4.0},
}
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "GPTNeoX": {"rotary_pct": 0.5, "use_parallel_residual": True},
    "GPTNeo": {"window_size": 2},
    "Qwen3": {"head_dim": 4},
    "Gemma2": {
        "head_dim": 4, "query_pre_attn_scalar": 6, "sliding_window": 3,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0,
    },
    "Gemma3": {
        "head_dim": 4, "query_pre_attn_scalar": 6, "sliding_window": 3, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
        },
    },
    "GPTJ": {"rotary_dim": 2},
    "Olmo2": {"attention_bias": True},
    "OPT": {},
    "Phi3": {"pad_token_id": 0, "sliding_window": 3},
}  # fmt: skip
FAMILIES = (*NATIVE, *HUGGING_FACE)
LATER = ("Gemma3", "GPTJ", "Olmo2", "OPT", "Phi3")
"""Of these: each differs from an earlier one in few things."""


def small_model(
    family: str,
    seed: int,
    *,
    n_layers: int = 2,
    n_heads: int = 2,
    d_model: int = 12,
    dtype: torch.dtype = torch.float32,
    split_qkv: bool = True,
    split_embed: bool = False,
    strength: float = 1.0,
) -> LoweredModel:
    """Lower a random model whose edges matter.

    Models of one architecture share their weights' memory: use one before asking for the next.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge = _bridge(family, n_layers, n_heads, d_model, dtype)
        _fill(bridge.original_model, seed, strength)
        return lower(bridge, split_qkv=split_qkv, split_embed=split_embed, name=family)


@functools.lru_cache(maxsize=64)
def _bridge(family: str, n_layers: int, n_heads: int, d_model: int, dtype: torch.dtype) -> Any:
    import transformer_lens.model_bridge.sources.native  # noqa: F401  (adds boot_native)
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    with torch.random.fork_rng(devices=[]):
        if family in HUGGING_FACE:
            return _hugging_face(family, n_layers, n_heads, dtype)
        config = _NATIVE | {"n_layers": n_layers, "n_heads": n_heads, "d_model": d_model}
        config |= NATIVE[family]
        cfg = TransformerBridgeConfig(**config)
        return TransformerBridge.boot_native(cfg, device="cpu", dtype=dtype)


def _hugging_face(family: str, n_layers: int, n_heads: int, dtype: torch.dtype) -> Any:
    import transformers
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    config = {"vocab_size": VOCAB, "hidden_size": 4 * n_heads, "max_position_embeddings": 8}
    if family == "GPTNeo":
        kinds = [[["global", "local"], (n_layers + 1) // 2]]
        n_layers = 2 * kinds[0][1]
        config |= {"num_layers": n_layers, "num_heads": n_heads, "attention_types": kinds}
    else:
        config |= {"num_hidden_layers": n_layers, "num_attention_heads": n_heads}
        config |= {"intermediate_size": 16}
    if family in ("Qwen3", "Gemma2", "Gemma3", "Olmo2", "Phi3"):
        config["num_key_value_heads"] = 1 if n_heads % 2 else n_heads // 2
    if family == "Gemma3":
        kinds = ["sliding_attention", "full_attention"]
        config["layer_types"] = [kinds[i % 2] for i in range(n_layers)]
    if family == "OPT":
        config |= {"ffn_dim": 16, "word_embed_proj_dim": config["hidden_size"]}
    if family == "GPTJ":
        config |= {"n_embd": config.pop("hidden_size"), "n_inner": config.pop("intermediate_size")}
        config |= {"n_layer": config.pop("num_hidden_layers"), "n_positions": 8}
        config |= {"n_head": config.pop("num_attention_heads")}
        del config["max_position_embeddings"]
    name = f"{family}Text" if family == "Gemma3" else family
    cfg = getattr(transformers, f"{name}Config")(**config | HUGGING_FACE[family])
    cfg._attn_implementation = "eager"
    name = f"{family}ForCausalLM"
    module = getattr(transformers, name)(cfg).eval().to(dtype)
    return build_bridge_from_module(
        module, name, hf_config=cfg, dtype=dtype, device="cpu", model_name=family
    )


@torch.no_grad()
def _fill(module: Any, seed: int, strength: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            wide = "emb" in name or "pos" in name or "wte" in name or "wpe" in name
            parameter.copy_(noise if wide else noise * 1.2 * strength / parameter.shape[1] ** 0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.4 * noise)
        else:
            parameter.copy_(1 + 0.3 * noise)


def small_task(
    seed: int, n_prompts: int = 3, lengths: tuple[int, ...] = (4, 5), most_scored: int = 1
) -> Task:
    """Pairs that differ at some positions (now and then at none), with 1 to 3 answers each.

    Scored is the last position, or with ``most_scored`` > 1 random ones, other ones in each pair.
    """
    rng = np.random.default_rng(seed)
    pairs = [_pair(rng, int(rng.choice(lengths))) for _ in range(n_prompts)]
    if most_scored > 1:
        pairs = [replace(pair, scored=_some(rng, pair, most_scored)) for pair in pairs]
    return Task("random", tuple(pairs))


def labelled(task: Task, seed: int, labels: tuple[str, ...] = ("A", "B")) -> Task:
    """Label random positions, each label at least one; all others are ``rest``, now and then none.

    The last position may have any label, and the order of the spans differs between prompts.
    """
    rng = np.random.default_rng(seed)

    def label(pair: Pair) -> Pair:
        places = rng.permutation(len(pair.clean))
        names = rng.choice([*labels, "rest"], len(places))
        names[: len(labels)] = labels
        spans = {x: tuple(sorted(places[names == x].tolist())) for x in labels}
        return replace(pair, spans=spans)

    return replace(task, pairs=tuple(label(pair) for pair in task.pairs))


def _some(rng: np.random.Generator, pair: Pair, most: int) -> tuple[int, ...]:
    n = rng.integers(1, 1 + min(most, len(pair.clean)))
    return tuple(sorted(rng.permutation(len(pair.clean))[:n].tolist()))


def _pair(rng: np.random.Generator, length: int) -> Pair:
    clean = rng.integers(0, VOCAB, length)
    first = rng.integers(0, length)
    swapped = (rng.random(length) < 0.6) & (np.arange(length) >= first)
    corrupt = np.where(swapped, rng.integers(0, VOCAB, length), clean)
    targets = rng.permutation(VOCAB)[:6].tolist()
    n_right, n_wrong = rng.integers(1, 4, 2).tolist()
    return Pair(
        tuple(clean.tolist()),
        tuple(corrupt.tolist()),
        tuple(targets[:n_right]),
        tuple(targets[3 : 3 + n_wrong]),
    )


def random_states() -> list[int]:
    """Return the global random state of torch and numpy, to compare before and after."""
    numpy_state = np.random.get_state()[1]  # noqa: NPY002
    return [*torch.get_rng_state().tolist(), *numpy_state.tolist()]


def share_of(graph: Any, edges: np.ndarray) -> Iterator[str]:
    """Names of the edges in a mask, in graph order."""
    for edge in np.flatnonzero(edges):
        u, v = graph.edge_sender[edge], graph.edge_receiver[edge]
        yield f"{graph.senders[u]}->{graph.receivers[v]}"
