"""Memory that is foretold beside memory that is taken, on random Llamas of several sizes.

Each figure is of a process of its own: the most that it held (``VmHWM``) less what it held after
its imports.  Times are ratios to the model's own passes in the same process, taken in turns with
them, so that other programs on the machine slow both.  An 8-billion model is foretold alone.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from safetensors.torch import save_file

from acdc.engine.allocator import keep_large_pieces_apart
from acdc.engine.experiment import Experiment
from acdc.engine.footprint import Footprint
from acdc.engine.metrics import get_metric
from acdc.engine.work import Work
from acdc.errors import UnknownNameError
from acdc.measure.evaluation import Evaluator
from acdc.methods import METHODS
from acdc.methods.base import Found
from acdc.models import devices, load_model
from acdc.models.described import sizes_of_config
from acdc.runs.forecast import BESIDE, Forecast, foresee, of_evaluation
from acdc.settings import Settings
from benchmarks.results import markdown_table, terminal_table, write_results
from benchmarks.speed import Passes
from benchmarks.subjects import Size, random_task

__all__ = [
    "LLAMAS",
    "Llama",
    "Plan",
    "Row",
    "markdown",
    "measure",
    "process_bytes",
    "run_table",
    "write",
]

FORMAT, VERSION = "acdc-bench-memory", 1

N_PROMPTS, N_POS, N_EDGES = 8, 20, 200
"""Prompts, their tokens, and edges of the circuit that is evaluated."""

SOUGHT = 100
"""Edges that ``acdc`` is asked for."""

_ARITHMETIC = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", True),
    "bfloat16 weights, float32": ("bfloat16", False),
}
"""Type asked for, and whether the CPU is taken for one that computes in it; None: as it is."""


@dataclass(frozen=True)
class Llama:
    """Shape of a random Llama."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool = False
    head_dim: int = 64

    def config(self) -> Any:
        """Return its configuration."""
        from transformers import LlamaConfig

        return LlamaConfig(**asdict(self), max_position_embeddings=4096)

    def shapes(self) -> dict[str, torch.Tensor]:
        """Return its weights without numbers."""
        from transformers import LlamaForCausalLM

        with torch.device("meta"):
            module: Any = LlamaForCausalLM(self.config())
        return dict(module.named_parameters())


LLAMAS = {
    "0.1": Llama(32000, 768, 2048, 12, 12, 4),
    "0.4": Llama(64000, 1024, 2816, 24, 16, 4),
    "1.2": Llama(128256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True),
    "8": Llama(128256, 4096, 14336, 32, 32, 8, head_dim=128),
}
"""By billions of parameters; the last is Llama-3-8B's shape, and is never built."""
PAPER = "8"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Parameters
    ----------
    sizes
        Of :data:`LLAMAS`, those that are built.
    arithmetics
        ``float32``, ``bfloat16`` as CPUs with such instructions compute, and
        ``bfloat16 weights, float32`` as others do.
    memory
        GiB beside the weights.
    repeats
        How often each thing is timed.
    acdc
        Whether ACDC's search for 100 edges is timed, too, once and in float32 alone.

    Raises
    ------
    UnknownNameError
        If a size or an arithmetic is none of these.
    """

    sizes: tuple[str, ...] = ("0.1", "0.4", "1.2")
    arithmetics: tuple[str, ...] = tuple(_ARITHMETIC)
    memory: float = 1.0
    repeats: int = 3
    acdc: bool = False

    def computations(self, arithmetic: str) -> tuple[str, ...]:
        """What is computed in an arithmetic."""
        usual = "eap", "eap-ig", "circuit"
        return (*usual, "acdc") if self.acdc and arithmetic == "float32" else usual

    def __post_init__(self) -> None:
        built = [name for name in LLAMAS if name != PAPER]
        for kind, names, known in (
            ("size", self.sizes, built),
            ("arithmetic", self.arithmetics, list(_ARITHMETIC)),
        ):
            for name in names:
                if name not in known:
                    raise UnknownNameError(kind, name, known)


@dataclass(frozen=True)
class Row:
    """One computation.

    Parameters
    ----------
    model, arithmetic, what
        Billions of parameters, see :class:`Plan`, and ``eap``, ``eap-ig``, ``circuit`` or ``acdc``.
    weights, foretold, measured
        Bytes; of what is not built nothing is measured.
    allowed
        1.3 times the weights, and the memory.
    error
        Of what was foretold, relative.
    ratio, unit
        Time in passes of the model.
    """

    model: str
    arithmetic: str
    what: str
    weights: int
    foretold: int
    measured: int | None
    allowed: int
    error: float | None
    ratio: float | None
    unit: str


def measure(plan: Plan) -> Iterator[Row]:
    """Yield a row for each size, arithmetic and computation, and those of 8 billion on paper."""
    for name in plan.sizes:
        with random_llama(LLAMAS[name]) as folder:
            for arithmetic in plan.arithmetics:
                for what in plan.computations(arithmetic):
                    yield _row(plan, name, arithmetic, what, folder)
    on_paper = replace(plan, memory=2 * plan.memory)
    for arithmetic in plan.arithmetics:
        for what in plan.computations(arithmetic):
            yield _row(on_paper, PAPER, arithmetic, what, None)


@contextmanager
def random_llama(llama: Llama) -> Iterator[Path]:
    """Write a random model in bfloat16 into a temporary folder."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="acdc-bench-") as name:
        folder, weights = Path(name), {}
        for key, shape in llama.shapes().items():
            random = torch.ones(shape.shape) if shape.ndim < 2 else None
            if random is None:
                random = 0.04 * torch.randn(shape.shape, generator=generator)
            weights[key] = random.to(torch.bfloat16)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        del weights
        content = {**llama.config().to_dict(), "architectures": ["LlamaForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(content))
        yield folder


def _row(plan: Plan, name: str, arithmetic: str, what: str, folder: Path | None) -> Row:
    memory = int(plan.memory * 2**30)
    weights, foretold = _foretold(LLAMAS[name], arithmetic, what, memory)
    found: dict[str, Any] = {"peak": None, "ratio": None, "unit": None}
    if folder is not None:
        asked = [str(folder), arithmetic, what, str(memory), str(plan.repeats)]
        code = "import sys; from benchmarks.memory import child; child(*sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", code, *asked], capture_output=True, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
    peak = found["peak"]
    return Row(
        model=name,
        arithmetic=arithmetic,
        what=what,
        weights=weights,
        foretold=foretold,
        measured=peak,
        allowed=int(1.3 * weights) + memory,
        error=None if peak is None else foretold / peak - 1,
        ratio=found["ratio"],
        unit=found["unit"] or _UNITS[what],
    )


_UNITS = {
    "eap": "1 forward + 1 forward and backward",
    "eap-ig": "2 forwards + 5 forwards and backwards",
    "circuit": "forward",
    "acdc": "forward",
}


def _foretold(llama: Llama, arithmetic: str, what: str, memory: int) -> tuple[int, int]:
    """Bytes of the weights, and the peak."""
    dtype, fast = _ARITHMETIC[arithmetic]
    keep = getattr(torch, dtype)
    use = torch.float32 if fast is False else keep
    sizes = sizes_of_config(llama.config(), llama.shapes(), keep, use)
    footprint = Footprint.of_sizes(sizes, whole_vocab=False)
    if what == "circuit":
        beside = of_evaluation(footprint, N_POS, N_PROMPTS, N_PROMPTS, memory)
    else:
        edges = SOUGHT if what == "acdc" else None
        settings = Settings.of("random", method=what, n_edges=edges)
        lengths = [N_POS] * N_PROMPTS
        forecast: Forecast = foresee(footprint, lengths, settings, METHODS[what], memory)
        beside = forecast.chunk
    return sizes.weights, sizes.weights + footprint.scratch + beside + BESIDE


def child(folder: str, arithmetic: str, what: str, memory: str, repeats: str) -> None:
    """Measure one thing in a process of its own, and print it as JSON."""
    from transformer_lens.model_bridge import TransformerBridge  # noqa: F401  (no part of the peak)
    from transformers import LlamaForCausalLM  # noqa: F401  (nor this)

    keep_large_pieces_apart()  # as the command line does
    torch.set_num_threads(1)
    dtype, fast = _ARITHMETIC[arithmetic]
    if fast is not None:
        vars(devices)["computes_fast"] = lambda number: fast or number == torch.float32
    before = process_bytes("VmRSS")
    model, _ = load_model(folder, dtype=dtype)
    task = random_task(Size(d_vocab=model.d_vocab, n_prompts=N_PROMPTS, n_pos=N_POS))
    room = int(memory)
    experiment = Experiment(model, task, get_metric("logit_diff"), memory=room)
    mask = np.zeros(experiment.graph.n_edges, dtype=bool)
    mask[np.random.default_rng(0).choice(len(mask), N_EDGES, replace=False)] = True
    ratio, unit = None, None
    if what == "circuit":
        Evaluator(experiment).evaluate(mask)
    elif what == "acdc":
        ratio, unit = _search(experiment, room)
    else:
        METHODS[what].scores(experiment, None, Work(room))
    peak = process_bytes("VmHWM") - before
    if what != "acdc" and int(repeats):
        ratio = _ratio(experiment, what, room, int(repeats))
    print(json.dumps({"peak": peak, "ratio": ratio, "unit": unit}))


def _search(experiment: Experiment, memory: int) -> tuple[float, str]:
    """Time of all searches for a number of edges in forwards, and what was found."""
    passes = [Passes(experiment, 1) for _ in range(2)]
    passes[0].measure()
    found: list[Found] = []
    seconds = _timed(
        lambda: found.append(METHODS["acdc"].find(experiment, Work(memory), n_edges=SOUGHT))
    )
    passes[1].measure()
    kept, last = found[0].circuit, found[0].details["work"]
    forward = statistics.mean(x.forward_seconds for x in passes)
    return seconds / forward, (
        f"forward; {kept.n_edges} of {kept.graph.n_edges:,} edges kept, "
        f"{last['n_evaluations']:,} scenarios in the last search"
    )


def _ratio(experiment: Experiment, what: str, memory: int, repeats: int) -> float:
    """Time of one computation in passes, the two measured in turns."""
    if what == "circuit":
        found = METHODS["eap"].find(experiment, Work(memory), n_edges=N_EDGES)
        evaluator, mask = Evaluator(experiment), found.circuit.in_circuit
        _ = evaluator.full, evaluator.empty
        call: Callable[[], Any] = partial(evaluator.evaluate, mask)
        forwards, both = 1, 0
    else:
        call = partial(METHODS[what].scores, experiment, None, Work(memory))
        forwards, both = (1, 1) if what == "eap" else (2, 5)
    ratios = []
    for _ in range(repeats):
        passes = Passes(experiment, 1)
        passes.measure()
        seconds = _timed(call)
        passes.measure()
        unit = forwards * passes.forward_seconds + both * passes.forward_backward_seconds
        ratios.append(seconds / unit)
    return statistics.median(ratios)


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def process_bytes(name: str) -> int:
    """Bytes of a line of ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


_COLUMNS = (
    "billions", "arithmetic", "computation", "weights", "foretold", "measured", "error", "allowed",
    "time", "passes",
)  # fmt: skip


def run_table(rows: Sequence[Row]) -> Table:
    """Return the rows as a table."""
    return terminal_table("peak memory, MiB", _COLUMNS, map(_cells, rows), n_texts=3)


def markdown(rows: Sequence[Row], plan: Plan) -> str:
    """Return ``results.md``."""
    n = plan.repeats
    time = f"Time is in the passes named last, median of {n}." if n else "Times were not taken."
    return (
        "# Memory\n\n"
        f"{__doc__}\n"
        f"{N_PROMPTS} prompts of {N_POS} tokens, `--memory {plan.memory:g}` (8 billion: "
        f"{2 * plan.memory:g}), a circuit of {N_EDGES} edges. Bytes in MiB: the weights, the peak "
        "foretold from widths alone, the peak measured, its error, and 1.3 times the weights plus "
        f"the memory. {time} Written by "
        f"`acdc bench memory`.\n\n{markdown_table(_COLUMNS, map(_cells, rows))}"
    )


def _cells(row: Row) -> list[str]:
    def mib(n: int | None) -> str:
        return "" if n is None else f"{n / 2**20:,.0f}"

    return [
        row.model, row.arithmetic, row.what, mib(row.weights), mib(row.foretold),
        mib(row.measured), "" if row.error is None else f"{row.error:+.0%}", mib(row.allowed),
        "" if row.ratio is None else f"{row.ratio:.2f}", row.unit,
    ]  # fmt: skip


def write(folder: Path, rows: Sequence[Row], plan: Plan) -> list[str]:
    """Write ``results.json`` and ``results.md``; return their names."""
    head = {"format": FORMAT, "version": VERSION, "plan": asdict(plan)}
    return write_results(folder, head, map(asdict, rows), markdown(rows, plan), "cpu")
