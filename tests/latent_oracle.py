"""A slow, obvious forward pass with dictionaries: nodes by name, every edge explicit.

Nothing here is shared with ``acdc.latents`` or ``graphs``.  Also builders of random dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from oracle import LOWER_IS_BETTER, METRICS, pattern, projected, sources, spans_of
from torch import Tensor

from acdc.dictionaries import Dictionary, Hook
from acdc.dictionaries.activations import width
from acdc.models.lowering import LoweredModel
from acdc.models.lowering.model import FeedForward
from acdc.tasks.base import Task

N_LATENTS = 9
NEURONS = "neurons"
NEURON_INPUTS = "neuron inputs"
"""In place of a dictionary: the neurons of an MLP, or these with receivers of their own."""


def random_dictionary(
    model: LoweredModel, architecture: str, site: str, layer: int, seed: int = 0, **options: Any
) -> Dictionary:
    """Return a dictionary that reads ``site``; a transcoder writes the MLP's output."""
    generator = torch.Generator().manual_seed(1000 * seed + layer)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(model.dtype)

    reads = Hook(layer, site)
    transcoder = architecture.endswith("transcoder")
    writes = Hook(layer, "mlp_out") if transcoder else reads
    d_in, d_out, n = width(model, reads), width(model, writes), N_LATENTS
    tensors = {"W_enc": draw(d_in, n) / d_in**0.5, "W_dec": draw(n, d_out), "b_dec": draw(d_out)}
    if architecture == "gated":
        tensors |= {"b_gate": 0.2 * draw(n), "b_mag": 0.2 * draw(n), "r_mag": 0.3 * draw(n)}
    else:
        tensors["b_enc"] = 0.2 * draw(n)
    if architecture.startswith("jumprelu"):
        tensors["threshold"] = 0.1 * draw(n).abs()
    if "skip" in architecture:
        tensors["W_skip"] = 0.3 * draw(d_out, d_in)
    options.setdefault("apply_b_dec_to_input", not transcoder)
    return Dictionary(architecture, reads, writes, **tensors, **options)


def place(dictionary: Dictionary) -> str:
    """What the nodes of a dictionary begin with."""
    hook = dictionary.writes
    letters = {"mlp_out": "m", "attn_out": "a", "attn_z": "a"}
    if hook.site == "resid_post":
        return f"r{hook.layer + 1}"
    mid = "mid" if hook.site == "resid_mid" else ""
    return f"{letters.get(hook.site, 'r')}{hook.layer}{mid}"


class LatentPass:
    """One forward pass; ``out`` holds every sender, ``edges`` every edge in ACDC's order.

    Parameters
    ----------
    model, tokens
        Lowered model, ``[batch, pos]``.
    dictionaries
        By place: the dictionary, :data:`NEURONS` or :data:`NEURON_INPUTS`, and which of its
        latents are nodes.
    share, ablated
        By edge, how much of the ablated value it carries (0 by default), or that at every
        position, ``[pos, 1]``; by sender, that value.
    """

    def __init__(
        self,
        model: LoweredModel,
        tokens: Tensor,
        dictionaries: Mapping[str, tuple[Any, tuple[int, ...]]],
        share: Mapping[str, Any] = {},
        ablated: Mapping[str, Tensor] = {},
    ) -> None:
        self.model, self.share, self.ablated = model, share, ablated
        self.dictionaries = dictionaries
        self.out: dict[str, Tensor] = dict(
            zip(sources(model.shape), model.embed(tokens), strict=True)
        )
        self.visible: list[list[str]] = [list(self.out)]  # groups, each written at once
        self.attentions: list[int] = []  # layers whose heads are in the stream since the cut
        self.by_receiver: list[list[str]] = []
        for i, layer in enumerate(model.layers):
            self.cut(f"r{i}")
            heads = self.attention(i)
            if layer.mlp is not None and model.shape.parallel:
                mlp = self.mlp(i)
                self.write(heads, i)
                self.write(mlp)
                continue
            self.write(heads, i)
            self.cut(f"r{i}mid")
            if layer.mlp is not None:
                self.write(self.mlp(i))
        self.cut(f"r{len(model.layers)}")
        self.final = self.read("logits")

    @property
    def edges(self) -> list[str]:
        return [edge for edges in reversed(self.by_receiver) for edge in edges]

    def write(self, written: dict[str, Tensor], attention: int | None = None) -> None:
        self.out |= written
        self.visible.append(list(written))
        if attention is not None:
            self.attentions.append(attention)

    def carried(self, u: str, v: str) -> Tensor:
        share = self.share.get(f"{u}->{v}", 0)
        if isinstance(share, int) and share == 0:
            return self.out[u]
        return (1 - share) * self.out[u] + share * self.ablated[u]

    def through_post(self, u: str) -> int | None:
        """Layer through whose post-norm the stream reads a sender."""
        if not u.startswith("a"):
            return None
        name = u.split(".")[0]
        layer = int(name[1:])
        if self.model.layers[layer].attention_post is None:
            return None
        found = self.dictionaries.get(name)
        return None if found and found[0].writes.site == "attn_out" else layer

    def read(self, v: str) -> Tensor:
        self.by_receiver.append([f"{u}->{v}" for group in reversed(self.visible) for u in group])
        total = torch.zeros_like(next(iter(self.out.values())))
        for u in (u for group in self.visible for u in group):
            if self.through_post(u) is None:
                total = total + self.carried(u, v)
        for i in self.attentions:
            block = self.model.layers[i]
            b_O = block.attention.b_O
            inside = [u for g in self.visible for u in g if self.through_post(u) == i]
            if inside:
                written = sum(self.carried(u, v) for u in inside)
                written = written if b_O is None else written + b_O
                total = total + block.attention_post(written)
            elif b_O is not None and block.attention_post is None:
                total = total + b_O
        return total

    def split(self, name: str, x: Tensor, y: Tensor, into: Any = None) -> dict[str, Tensor]:
        """Latents of ``x``, and what they leave of ``y``; ``into`` maps both to the stream."""
        into = into or (lambda vector: vector)
        dictionary, ids = self.dictionaries[name]
        latents = dictionary.encode(x) * dictionary.output_scale(x)
        written, rest = {}, y
        for i in ids:
            part = into(latents[..., i, None] * dictionary.decoder_directions[i])
            written[f"{name}.f{i}"] = part
            rest = rest - part
        return written | {f"{name}.err": rest}

    def cut(self, name: str) -> None:
        if name in self.dictionaries:
            x = self.read(name)
            written = self.split(name, x, x)
            self.visible, self.attentions = [], []
            self.write(written)

    def mlp(self, i: int) -> dict[str, Tensor]:
        name, layer = f"m{i}", self.model.layers[i]
        if name not in self.dictionaries:
            return {name: layer.mlp(self.read(name))}
        dictionary, ids = self.dictionaries[name]
        if dictionary == NEURONS:
            return self.neurons(name, layer.mlp, self.read(name), ids)
        if dictionary == NEURON_INPUTS:
            alone: dict[str, Tensor] = {}
            for j in ids:
                node = f"{name}.n{j}"
                alone[node] = self.neurons(name, layer.mlp, self.read(node), (j,))[node]
            node = f"{name}.err"
            rest = self.neurons(name, layer.mlp, self.read(node), ids)
            return alone | {node: rest[node]}
        if not dictionary.is_transcoder:
            y = layer.mlp(self.read(name))
            return self.split(name, y, y)

        def input_of(x: Tensor) -> Tensor:
            site = dictionary.reads.site
            if site == "ln2_out":
                return layer.ln2(x)
            return layer.ln2.normalized(x) if site == "ln2_normalized" else x

        written = {}
        for j in ids:
            node = f"{name}.f{j}"
            x = input_of(self.read(node))
            written[node] = self.split(name, x, x.new_zeros(*x.shape[:-1], dictionary.d_out))[node]
        x = self.read(f"{name}.err")
        parts = self.split(name, input_of(x), layer.mlp(x))
        return written | {f"{name}.err": parts[f"{name}.err"]}

    def neurons(
        self, name: str, mlp: FeedForward, x: Tensor, ids: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """What neurons write, and what they leave of the MLP's output."""
        seen: list[Tensor] = []
        handle = mlp.writer.register_forward_pre_hook(lambda _, read: seen.append(read[0]))
        rest = mlp(x)
        handle.remove()
        scale: Any = 1
        if mlp.post is not None:  # as in a plain pass: the norm's scale is that of the whole MLP
            out = mlp.module(mlp.norm(x))
            scale = mlp.post.weight / (out.pow(2).mean(-1, keepdim=True) + mlp.post.eps).sqrt()
        written = {}
        for i in ids:
            written[f"{name}.n{i}"] = part = seen[0][..., i, None] * mlp.W_out[i] * scale
            rest = rest - part
        return written | {f"{name}.err": rest}

    def attention(self, i: int) -> dict[str, Tensor]:
        layer, name = self.model.layers[i], f"a{i}"
        shape, attention = self.model.shape, layer.attention
        group = shape.n_heads // shape.n_kv_heads
        shared = "kv" if group > 1 else "h"
        inputs: dict[str, Tensor] = {}
        for kind in "qkv":
            n, letter = (shape.n_heads, "h") if kind == "q" else (shape.n_kv_heads, shared)
            for h in range(n):
                v = f"{name}.{letter}{h}" + (f"<{kind}>" if shape.split_qkv else "")
                if v not in inputs:
                    inputs[v] = layer.ln1(self.read(v))

        def at(kind: str, h: int) -> Tensor:
            g = h if kind == "q" else h // group
            letter = "h" if kind == "q" else shared
            v = f"{name}.{letter}{g}" + (f"<{kind}>" if shape.split_qkv else "")
            return projected(attention, kind, g, inputs[v])

        z = [
            pattern(attention, at("q", h), at("k", h), h) @ at("v", h) for h in range(shape.n_heads)
        ]
        written = {f"{name}.h{h}": z[h] @ attention.W_O[h] for h in range(shape.n_heads)}
        if name not in self.dictionaries:
            return written
        total = sum(written.values())
        if self.dictionaries[name][0].writes.site == "attn_z":
            W_O = attention.W_O.flatten(0, 1)
            return self.split(name, torch.cat(z, -1), total, lambda vector: vector @ W_O)
        y = total if attention.b_O is None else total + attention.b_O
        if layer.attention_post is not None:
            y = total = layer.attention_post(y)
        return self.split(name, y, total)


def split_names(edges: list[str], task: Task, positions: str) -> list[str]:
    """Edges in ACDC's order, of each receiver spans from the last to the first."""
    layouts = [(pair, spans_of(pair, positions)) for pair in task.pairs]
    labels = list(task.pairs[0].spans) if positions == "span" else layouts[0][1]
    there = {span for _, spans in layouts for span in spans}
    scored = {spans[i] for pair, spans in layouts for i in pair.scored}
    order = [span for span in dict.fromkeys(["rest", *labels]) if span in there]
    of_receiver: dict[str, list[str]] = {}
    for edge in edges:
        u, v = edge.split("->")
        of_receiver.setdefault(v, []).append(u)
    return [
        f"{u}@{span}->{v}@{span}"
        for v, senders in of_receiver.items()
        for span in reversed(order)
        if v != "logits" or span in scored
        for u in senders
    ]


class LatentOracle:
    """A model with dictionaries on a task, as :class:`oracle.Oracle`.

    With ``positions`` (``token`` or ``span``) edges are split.
    """

    run = LatentPass

    def __init__(
        self,
        model: LoweredModel,
        task: Task,
        metric: str,
        dictionaries: Mapping[str, tuple[Any, tuple[int, ...]]],
        intervention: str = "resample",
        direction: str = "noising",
        positions: str | None = None,
    ) -> None:
        self.model, self.name, self.task, self.positions = model, metric, task, positions
        self.dictionaries = dictionaries
        lower = LOWER_IS_BETTER[metric] == (direction == "noising")
        self.sign = 1 if lower else -1
        self.prompts = []
        with torch.no_grad():
            for pair in task.pairs:
                clean, corrupt = torch.tensor([pair.clean]), torch.tensor([pair.corrupt])
                base, other = (clean, corrupt) if direction == "noising" else (corrupt, clean)
                run = self.run(model, other, dictionaries)
                ablated = run.out
                if intervention == "zero":
                    ablated = {u: torch.zeros_like(x) for u, x in ablated.items()}
                elif intervention != "resample":
                    ablated = self.means(direction, other.shape[1], intervention)
                plain = self.logits(self.run(model, clean, dictionaries))
                self.prompts.append((pair, base, ablated, plain.double().numpy()))
        self.edges = split_names(run.edges, task, positions) if positions else run.edges

    def means(self, direction: str, n_pos: int, intervention: str) -> dict[str, Tensor]:
        """By sender, the mean over all tokens, or by position over prompts of one length."""
        which = "corrupt" if direction == "noising" else "clean"
        prompts = [getattr(pair, which) for pair in self.task.pairs]
        by_position = intervention == "mean-positional"
        runs = [
            self.run(self.model, torch.tensor([p]), self.dictionaries).out
            for p in prompts
            if not by_position or len(p) == n_pos
        ]
        if by_position:
            return {u: torch.stack([run[u] for run in runs]).mean(0) for u in runs[0]}
        every = {u: torch.cat([run[u][0] for run in runs]) for u in runs[0]}
        return {u: x.mean(0).expand(1, n_pos, -1) for u, x in every.items()}

    def at_positions(self, share: Mapping[str, Tensor], pair: Any) -> dict[str, Tensor]:
        """Shares by edge, whatever its span: at every position of a prompt, ``[pos, 1]``."""
        if self.positions is None:
            return dict(share)
        spans = spans_of(pair, self.positions)
        found: dict[str, Tensor] = {}
        for edge, value in share.items():
            (u, span), (v, _) = (end.split("@") for end in edge.split("->"))
            here = torch.tensor([[name == span] for name in spans]) * value
            found[f"{u}->{v}"] = found.get(f"{u}->{v}", 0) + here
        return found

    def logits(self, run: LatentPass) -> Tensor:
        return self.model.unembed(run.final[:, -1])[0]

    def without(self, edges: Any) -> float:
        """Mean metric with these edges ablated."""
        return self.metric(dict.fromkeys(edges, 1.0))

    def metric(self, shares: Mapping[str, float]) -> float:
        """Mean metric with shares of some edges ablated, as :meth:`oracle.Oracle.metric`."""
        share = {e: torch.tensor(c, dtype=self.model.dtype) for e, c in shares.items()}
        total = 0.0
        with torch.no_grad():
            for pair, base, ablated, clean in self.prompts:
                here = self.at_positions(share, pair)
                run = self.run(self.model, base, self.dictionaries, here, ablated)
                logits = self.logits(run).double().numpy()
                total += METRICS[self.name](logits, clean, pair)
        return total / len(self.prompts)

    def derivatives(self) -> dict[str, float]:
        """Change of the logit difference as each edge starts to be ablated, by autograd."""
        share = {e: torch.zeros((), dtype=self.model.dtype, requires_grad=True) for e in self.edges}
        total: Any = 0.0
        for pair, base, ablated, _ in self.prompts:
            here = self.at_positions(share, pair)
            run = self.run(self.model, base, self.dictionaries, here, ablated)
            logits = self.logits(run)
            total = total + logits[list(pair.answers)].mean()
            total = total - logits[list(pair.wrong_answers)].mean()
        found = torch.autograd.grad(
            total / len(self.prompts), list(share.values()), materialize_grads=True
        )
        return {edge: float(g) for edge, g in zip(share, found, strict=True)}
