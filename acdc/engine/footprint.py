"""What computations keep in memory beside the weights, from widths and counts alone.

The same formulas decide what is cut into chunks or kept in files, and foretell what a run takes
(:mod:`acdc.runs.forecast`), also before its weights are read.  All are of what is held at once, in
bytes; those of the state are exact, the others were fitted to what autograd keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from acdc.engine.program import Program
from acdc.engine.stages import Transcoder
from acdc.models.lowering.attention import PATTERN_BYTES
from acdc.models.lowering.model import is_long
from acdc.models.sizes import Sizes
from acdc.models.stored import MOST_SCRATCH

__all__ = ["MOST_POINTS", "Footprint", "room_for_scenarios", "streams"]

_CHUNK_BYTES = 8 << 20
"""Gradients of a stage's receivers are mapped back in parts of this size: small enough that the
allocator keeps the memory, and that they are in the cache when they are read again."""
_HOLES = 1.2
"""What many tensors take beyond their size, as allocators cannot use all that was given back."""
_POINT_BYTES = 1 << 30
"""Of one prompt, while gradients at several points are held."""
MOST_POINTS = 5
"""Points whose gradients are added up before products are taken."""
_FEWEST_TOKENS = 4
"""Tokens of one part at least: products with fewer rows are computed otherwise."""


def streams(state: int, memory: int) -> bool:
    """Whether the state of a search is too large to be in memory as a whole, both in bytes."""
    return state > memory // 2


def room_for_scenarios(memory: int, held: int) -> int:
    """Bytes that the scenarios of one evaluation may take beside what is held of the state."""
    return max(0, memory - held) // 2


@dataclass(frozen=True)
class Footprint:
    """What one prompt takes in computations of each kind.

    Parameters
    ----------
    sizes
        Of the model.
    vectors, latents
        Senders that write vectors, and those that write multiples of one direction.
    stages, blocks
        Of :class:`acdc.engine.program.Program`.
    receivers, n_receivers
        Most that a stage has, and all; those of a transcoder, few of them on each token, do not
        count.
    whole_vocab
        Whether the metric reads every logit.
    """

    sizes: Sizes
    vectors: int
    latents: int
    stages: int
    blocks: int
    receivers: int
    n_receivers: int
    whole_vocab: bool

    @classmethod
    def of(cls, program: Program, *, whole_vocab: bool) -> Footprint:
        """Return that of a model that is loaded, with its dictionaries."""
        receivers = [s.n_receivers for s in program.stages if not isinstance(s, Transcoder)]
        return cls(
            sizes=Sizes.of(program.model),
            vectors=sum(len(block) for block in program.blocks if not block.narrow),
            latents=sum(len(block) for block in program.blocks if block.narrow),
            stages=len(program.stages),
            blocks=len(program.blocks),
            receivers=max(receivers),
            n_receivers=sum(receivers),
            whole_vocab=whole_vocab,
        )

    @classmethod
    def of_sizes(cls, sizes: Sizes, *, whole_vocab: bool) -> Footprint:
        """Return that of a model's own graph of heads and MLPs."""
        shape = sizes.shape
        n_blocks = shape.n_layers * (1 + shape.has_mlp)
        sources = 2 if shape.split_embed else 1
        split = shape.n_heads + 2 * shape.kv_heads
        whole = shape.n_heads + (shape.kv_heads if shape.grouped else 0)
        receivers = split if shape.split_qkv else whole
        return cls(
            sizes=sizes,
            vectors=sources + shape.n_layers * (shape.n_heads + shape.has_mlp),
            latents=0,
            stages=n_blocks + 1,
            blocks=n_blocks + 1,
            receivers=receivers,
            n_receivers=shape.n_layers * (receivers + shape.has_mlp) + 1,
            whole_vocab=whole_vocab,
        )

    def state(self, n_pos: int) -> int:
        """What ``acdc`` keeps of a prompt: what every node writes and every receiver reads.

        Senders twice (as they are, and what their ablation changes), one input by stage, what is in
        front of post-norms behind attention, and the placed queries, keys and values of all heads.
        """
        d, sizes = self.sizes.d_model, self.sizes
        numbers = 2 * (self.vectors * d + self.latents) + d * (self.stages + sizes.n_posts)
        return self._bytes((numbers + sizes.shape.n_layers * self._qkv) * n_pos)

    def moved(self, n_pos: int) -> int:
        """What a prompt takes more at the end of a search: an input of each receiver's own.

        At most, as those of a stage share one until something is ablated in front of them.
        """
        behind_posts = self.sizes.n_posts * self.n_receivers  # at most
        return self._bytes((self.n_receivers + behind_posts) * self.sizes.d_model * n_pos)

    def starting(self, n_pos: int) -> int:
        """What a prompt takes beside its state while that is made.

        What is written in both runs, and vectors of one layer's heads; or a run beside the other's.
        """
        shape, differences = self.sizes.shape, self._bytes(self._differences * n_pos)
        vectors = self._bytes(2 * shape.n_heads * self.sizes.d_model * n_pos)
        runs = self.plain(n_pos) + differences - self.state(n_pos)
        return max(2 * differences + vectors, runs)

    def searched_at_once(self, n_pos: int, memory: int) -> int:
        """How many prompts of a streamed search are in memory together: half of it is theirs."""
        each = self.state(n_pos) + max(self.moved(n_pos), self.starting(n_pos))
        return max(1, memory // 2 // each)

    def evaluation(self, n_pos: int, share: float = 1.0) -> int:
        """What one circuit's evaluation keeps of a prompt.

        ``share`` of the senders that are vectors are in the circuit: the others are neither
        computed nor kept.
        """
        numbers = (share * self.vectors + 2 * self.stages + self.blocks) * self.sizes.d_model
        return self._bytes(int((numbers + 2 * self.latents) * n_pos))

    def kept_runs(self, n_pos: int) -> int:
        """What an evaluator keeps of a prompt for the next circuit, see :class:`PlainRuns`."""
        sums = (self.stages + self.blocks) * self.sizes.d_model
        return self._bytes((self._differences + sums) * n_pos)

    def masks(self, n_pos: int) -> int:
        """What a prompt takes until the gradient of edges' weights is taken, roughly.

        Each read keeps the change of every sender that it sees, and each write a copy of the
        senders up to its own; of a receiver's input about three tensors are kept.
        """
        seen = self.stages * (self.vectors + self.latents)  # twice a half of them on average
        numbers = (seen + 3 * self.stages * self.receivers) * self.sizes.d_model
        return self._bytes(numbers * n_pos)

    @property
    def scratch(self) -> int:
        """What casts of weights take that are kept in another type."""
        sizes = self.sizes
        if sizes.kept == sizes.used:
            return 0
        largest = sizes.d_model * max(sizes.d_mlp, sizes.d_vocab_out, self._qkv)
        return self._bytes(min(largest, MOST_SCRATCH))

    def plain(self, n_pos: int) -> int:
        """What an ordinary pass takes for a prompt: all that it leaves, and one layer's work."""
        return self._bytes((self._trace + self._layer(n_pos)) * n_pos + self._logits)

    def gradient(self, n_pos: int) -> int:
        """What a forward and backward pass keeps for a prompt, beside what it leaves.

        Placed queries, keys and values, neurons (and what of these their function keeps), patterns,
        and what the backward pass of one layer takes.
        """
        sizes, shape = self.sizes, self.sizes.shape
        neurons = (3 if sizes.gated else 4) * sizes.d_mlp
        if is_long(n_pos, sizes.d_mlp):  # computed anew, a layer at a time
            neurons = 0
        layer = 3 * shape.n_heads * sizes.d_head + neurons
        backward = 0
        if shape.n_heads * n_pos * n_pos * 4 <= PATTERN_BYTES:
            layer += self._pattern(n_pos)
        else:  # computed anew: scores, patterns and their gradients, of a part of the queries
            backward = 3 * self._pattern(n_pos)
        if sizes.used.itemsize < 4:  # what norms read, in float32
            layer += 4 * sizes.d_model
        work = self._layer(n_pos) + backward
        numbers = (shape.n_layers * layer + work + self._gradients) * n_pos
        return self._bytes(numbers + 3 * self._logits)

    def attribution(self, n_pos: int, together: int = 1, *, keeps_runs: bool = True) -> int:
        """What attribution keeps of a prompt: plain runs, differences and gradients.

        Most is held while a gradient is taken: beside it what is written in the other run, or what
        became of that, the differences.

        Parameters
        ----------
        n_pos
            Its length.
        together
            Points whose gradients are held at once.
        keeps_runs
            Whether plain runs are kept for the points, or their embeddings alone.
        """
        left = self._bytes(self._trace * n_pos)
        found = left + self._bytes(self._gradients * n_pos)
        before = self._bytes(self._differences * n_pos) + (2 * left if keeps_runs else 0)
        return int(_HOLES * (before + (together - 1) * found + left + self.gradient(n_pos)))

    @property
    def tokens_at_once(self) -> int:
        """How many tokens' gradients are mapped back together, whatever the memory."""
        each = self.receivers * self._bytes(self.sizes.d_model)
        return max(_FEWEST_TOKENS, _CHUNK_BYTES // each)

    def tokens_of_part(self, n_pos: int) -> int:
        """The same for prompts of some length: whole prompts, or parts of one."""
        most = self.tokens_at_once
        return most if most < n_pos else most // n_pos * n_pos

    def products(self, n_pos: int, n_prompts: int) -> int:
        """What products of gradients and differences take: vectors of the tokens of one part."""
        numbers = (self.vectors + 2 * self.receivers) * self.sizes.d_model
        return self._bytes(numbers * min(self.tokens_of_part(n_pos), n_prompts * n_pos))

    def points_at_once(self, n_pos: int, n_points: int, *, keeps_runs: bool = True) -> int:
        """At how many points gradients are added up before products are taken.

        As many as there are, up to :data:`MOST_POINTS`; fewer where those of one long prompt take
        more than :data:`_POINT_BYTES`, whatever the memory: so the same is added up together.  One
        where what is read depends on the point (post-norms).
        """
        if self.sizes.n_posts:
            return 1
        for n in range(min(n_points, MOST_POINTS), 1, -1):
            if self.attribution(n_pos, n, keeps_runs=keeps_runs) <= _POINT_BYTES:
                return n
        return 1

    def rows(self, n_tokens: int) -> int:
        """What vectors of all senders take on some tokens, with what is made of them."""
        numbers = (self.vectors + 3 * self.sizes.shape.n_heads) * self.sizes.d_model
        return self._bytes(numbers * n_tokens)

    def runs_at_once(self, n_pos: int, memory: int) -> int:
        """How many prompts are run at once that take half of the memory; vectors the other."""
        return max(1, memory // 2 // self.plain(n_pos))

    def prompts_at_once(
        self, n_pos: int, memory: int, together: int = 1, *, keeps_runs: bool = True
    ) -> int:
        """How many prompts attribution takes at once; parameters as above.

        Of a multiple of those whose gradients are mapped back together: so what is added up
        together is the same whatever the memory.
        """
        each = self.attribution(n_pos, together, keeps_runs=keeps_runs)
        at_once = max(1, self.tokens_at_once // n_pos)
        left = memory - self.products(n_pos, at_once)
        return max(1, left // each // at_once) * at_once

    # Numbers of a token.

    @property
    def _qkv(self) -> int:
        shape = self.sizes.shape
        return (shape.n_heads + 2 * shape.kv_heads) * self.sizes.d_head

    @property
    def _trace(self) -> int:
        """What a pass leaves behind, see :class:`acdc.models.lowering.model.Trace`."""
        shape, d = self.sizes.shape, self.sizes.d_model
        streams = 2 + (0 if not shape.has_mlp else 1 if shape.parallel else 2)
        layer = streams * d + self._qkv + shape.n_heads * self.sizes.d_head
        return shape.n_layers * layer + (self.sizes.n_posts + 2) * d

    @property
    def _gradients(self) -> int:
        """Gradients at what receivers read, as :attr:`Stage.sees_gradients` names them."""
        shape, d = self.sizes.shape, self.sizes.d_model
        return shape.n_layers * (self._qkv + shape.has_mlp * d) + d

    @property
    def _differences(self) -> int:
        """By how much what senders write differs between the runs."""
        shape, d = self.sizes.shape, self.sizes.d_model
        layer = shape.n_heads * self.sizes.d_head + shape.has_mlp * d
        return shape.n_layers * layer + (2 if shape.split_embed else 1) * d + self.latents

    def _layer(self, n_pos: int) -> int:
        """What one layer takes while it is computed."""
        neurons = (3 if self.sizes.gated else 2) * self.sizes.d_mlp
        return max(neurons + 2 * self.sizes.d_model, 2 * self._pattern(n_pos))

    def _pattern(self, n_pos: int) -> int:
        """Patterns of all heads, at least in float32; of long prompts a part at a time."""
        most = PATTERN_BYTES // 4 // n_pos
        numbers = min(self.sizes.shape.n_heads * n_pos, most)
        return numbers if self.sizes.used.itemsize >= 4 else 3 * numbers

    @property
    def _logits(self) -> int:
        """Logits of a scored row, of a prompt."""
        return 2 * self.sizes.d_vocab_out if self.whole_vocab else 0

    def _bytes(self, numbers: int) -> int:
        return numbers * self.sizes.used.itemsize
