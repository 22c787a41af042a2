"""A transformer whose every edge can be patched, with gradients.

The engine in ``acdc`` patches edges without gradients; training needs them.  The state dict is
in HookedTransformer layout, so that it is stored as it is and :func:`acdc.load_model` reads it.
Axes: ``batch pos d_model``.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from graphs import Graph, GraphShape, component_graph

__all__ = ["Config", "PatchableTransformer", "Run"]

EMBED_STD = 0.25
WRITE_STD = 0.004
"""Of the weights that write to the stream: nodes start nearly silent."""


@dataclass(frozen=True)
class Config:
    """Sizes of the model; ``d_mlp`` None means attention only, no ``norm`` none at all."""

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_mlp: int | None
    n_ctx: int
    d_vocab: int
    norm: bool = True

    def bridge_fields(self) -> dict[str, object]:
        """Return the TransformerBridgeConfig fields, the content of ``config.json``."""
        sizes = {key: value for key, value in vars(self).items() if value is not None}
        del sizes["norm"]
        return sizes | {
            "act_fn": "gelu_new",
            "normalization_type": "LN" if self.norm else None,
            "attn_only": self.d_mlp is None,
            "gated_mlp": False,
            "positional_embedding_type": "standard",
            "rotary_base": 10000,
            "parallel_attn_mlp": False,
            "eps": 1e-5,
            "attn_scale": math.sqrt(self.d_head),
            "final_rms": False,
        }


@dataclass(frozen=True, eq=False)
class Run:
    """What a forward pass gives.

    Parameters
    ----------
    logits
        ``[batch, d_vocab]`` at each prompt's last position.
    written
        What the senders that were computed wrote, in order of the graph, in parts
        ``[batch, sender, pos, d_model]``.
    names
        Their names.
    """

    logits: Tensor
    written: tuple[Tensor, ...]
    names: tuple[str, ...]

    @cached_property
    def senders(self) -> Tensor:
        """``[batch, sender, pos, d_model]``: the parts together."""
        return torch.cat(self.written, dim=1)

    def sender(self, name: str) -> Tensor:
        """Return what one sender wrote, ``[batch, pos, d_model]``."""
        return self.senders[:, self.names.index(name)]

    def rows(self, rows: slice) -> Run:
        """Return some prompts of the batch."""
        return Run(self.logits[rows], tuple(part[rows] for part in self.written), self.names)


class Embedding(nn.Module):
    """Token embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.W_E = nn.Parameter(EMBED_STD * torch.randn(config.d_vocab, config.d_model))


class Positions(nn.Module):
    """Learned positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.W_pos = nn.Parameter(EMBED_STD * torch.randn(config.n_ctx, config.d_model))


class Unembedding(nn.Module):
    """Unembedding that starts as the transpose of the embedding and is trained by itself."""

    def __init__(self, embed: Embedding) -> None:
        super().__init__()
        self.W_U = nn.Parameter(embed.W_E.detach().T.clone())
        self.b_U = nn.Parameter(torch.zeros(len(embed.W_E)))


class Norm(nn.Module):
    """Layer norm with the parameter names of HookedTransformer."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return nn.functional.layer_norm(x, x.shape[-1:], self.w, self.b, eps=1e-5)


def _norm(config: Config) -> nn.Module:
    return Norm(config.d_model) if config.norm else nn.Identity()


class Attention(nn.Module):
    """Attention whose heads' queries, keys and values may read different streams.

    Every head starts with equal query and key weights, so that like attends to like, which is
    what most heads of these tasks begin with; both are trained by themselves.
    """

    W_Q: Tensor
    W_K: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        heads, d_model, d_head = config.n_heads, config.d_model, config.d_head
        for kind in "QKV":
            weight = torch.randn(heads, d_model, d_head) / math.sqrt(d_model)
            self.register_parameter(f"W_{kind}", nn.Parameter(weight))
            self.register_parameter(f"b_{kind}", nn.Parameter(torch.zeros(heads, d_head)))
        self.W_K.data.copy_(self.W_Q.data)
        self.W_O = nn.Parameter(WRITE_STD * torch.randn(heads, d_head, d_model))
        self.b_O = nn.Parameter(torch.zeros(d_model))

    def forward(self, q_in: Tensor, k_in: Tensor, v_in: Tensor, heads: list[int]) -> Tensor:
        """Return the outputs of some heads, ``[batch, head, pos, d_model]``, without ``b_O``.

        The inputs are normed streams ``[batch, head or 1, pos, d_model]``.
        """
        q, k, v = (
            _by_head(
                x, self.get_parameter(f"W_{kind}")[heads], self.get_parameter(f"b_{kind}")[heads]
            )
            for kind, x in zip("QKV", (q_in, k_in, v_in), strict=True)
        )  # (batch, head, pos, d_head)
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.einsum("bhpe,hed->bhpd", z, self.W_O[heads])


def _by_head(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Project ``x [batch, head or 1, pos, d_model]`` with each head's weight."""
    if x.shape[1] == 1:
        projected = torch.einsum("bpd,hde->bhpe", x[:, 0], weight)
    else:
        projected = torch.einsum("bhpd,hde->bhpe", x, weight)
    return projected + bias[:, None]


class Mlp(nn.Module):
    """One hidden layer."""

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.randn(d_model, d_mlp) / math.sqrt(d_model))
        self.b_in = nn.Parameter(torch.zeros(d_mlp))
        self.W_out = nn.Parameter(WRITE_STD * torch.randn(d_mlp, d_model))
        self.b_out = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., d_model]``."""
        hidden = nn.functional.gelu(x @ self.W_in + self.b_in, approximate="tanh")
        return hidden @ self.W_out + self.b_out


class Block(nn.Module):
    """Attention and, unless the model is attention-only, an MLP."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln1, self.attn = _norm(config), Attention(config)
        if config.d_mlp is not None:
            self.ln2, self.mlp = _norm(config), Mlp(config.d_model, config.d_mlp)


class PatchableTransformer(nn.Module):
    """A decoder (pre-norm, learned positions) that runs with any set of edges patched.

    Parameters
    ----------
    config
        Sizes.
    seed
        Of the initial weights; the global random state is not touched.
    """

    def __init__(self, config: Config, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        shape = GraphShape(config.n_layers, config.n_heads, has_mlp=config.d_mlp is not None)
        self.graph: Graph = component_graph(shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = Embedding(config)
            self.pos_embed = Positions(config)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
            self.ln_final = _norm(config)
            self.unembed = Unembedding(self.embed)

    def forward(
        self,
        tokens: Tensor,
        last: Tensor,
        source: Run | None = None,
        patched: Tensor | None = None,
        computed: Collection[str] | None = None,
    ) -> Run:
        """Run prompts, with some edges carrying what their senders wrote on other prompts.

        Parameters
        ----------
        tokens
            ``[batch, pos]``, padded on the right.
        last
            ``[batch]``: the position whose logits are wanted.
        source
            An undisturbed run on the source prompts.
        patched
            ``[batch, edge]`` bool over ``self.graph``: the edges that carry the source's value.
        computed
            Heads to compute, where every edge that leaves any other head or MLP is patched: these
            are taken from the source instead, which saves most of the work.
        """
        stream = _Stream(self.graph, source, patched)
        embedded = self.embed.W_E[tokens] + self.pos_embed.W_pos[: tokens.shape[1]]
        stream.write(["input"], embedded[:, None])
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            layer_heads = [f"a{layer}.h{head}" for head in range(self.config.n_heads)]
            here = [h for h, name in enumerate(layer_heads) if computed is None or name in computed]
            if here:
                reads = [[f"{layer_heads[head]}<{kind}>" for head in here] for kind in "qkv"]
                inputs = (block.ln1(stream.read(receivers)) for receivers in reads)
                out = block.attn(*inputs, here)
                stream.write([layer_heads[head] for head in here], out)
            stream.borrow([name for head, name in enumerate(layer_heads) if head not in here])
            stream.total = stream.total + block.attn.b_O
            if self.config.d_mlp is not None:
                if computed is None:
                    out = block.mlp(block.ln2(stream.read([f"m{layer}"])))
                    stream.write([f"m{layer}"], out)
                else:
                    stream.borrow([f"m{layer}"])
        final = stream.read(["logits"])[torch.arange(len(tokens)), 0, last]
        logits = self.ln_final(final) @ self.unembed.W_U + self.unembed.b_U
        names = (self.graph.senders[i] for i in stream.senders)
        return Run(logits, tuple(stream.written), tuple(names))


class _Stream:
    """The residual stream: what was written so far, and what each receiver reads of it."""

    def __init__(self, graph: Graph, source: Run | None, patched: Tensor | None) -> None:
        self.graph, self.source, self.patched = graph, source, patched
        self.written: list[Tensor] = []  # (batch, sender, pos, d_model) each
        self.senders: list[int] = []  # those in ``written``
        self.changes: list[Tensor] = []  # source - written, (batch, sender, pos * d_model) each
        self.total: Tensor = torch.zeros(())  # (batch, 1, pos, d_model)

    def write(self, names: list[str], values: Tensor) -> None:
        """Add what senders wrote, ``[batch, sender, pos, d_model]``."""
        index = [self.graph.sender_index[name] for name in names]
        if self.source is not None:
            self.changes.append((self.source.senders[:, index] - values).flatten(2))
        self.written.append(values)
        self.senders += index
        self.total = self.total + values.sum(1, keepdim=True)

    def borrow(self, names: list[str]) -> None:
        """Add what senders wrote on the source."""
        if names:
            assert self.source is not None
            index = [self.graph.sender_index[name] for name in names]
            self.total = self.total + self.source.senders[:, index].sum(1, keepdim=True)

    def read(self, receivers: list[str]) -> Tensor:
        """Return what receivers of the same senders read, ``[batch, receiver, pos, d_model]``.

        Without patching all read the same, and the second axis is 1.
        """
        if self.patched is None:
            return self.total
        starts = self.graph.receiver_start[[self.graph.receiver_index[name] for name in receivers]]
        edges = torch.from_numpy(starts)[:, None] + torch.tensor(self.senders)
        # (batch, receiver, sender) @ (batch, sender, pos * d_model)
        read = self.patched[:, edges].to(self.total.dtype) @ torch.cat(self.changes, dim=1)
        return self.total + read.unflatten(2, self.total.shape[2:])
