"""What a GPU gives and takes: the answers of the CPU, in which time and memory, in which precision.

Every search runs on the CPU in float32 first; then on every device in every precision, after one
that is not counted.  A row has

=============  =================================================================================
seconds        of the search, the device's queue included
ratio          in units of the model's own passes there (:class:`benchmarks.speed.Passes`): forwards
               for ACDC and evaluation, forwards and backwards together for the others
peak           bytes beside what was there before, on the first device
error          largest difference of a score to the CPU's, as a share of the largest score
differing      edges that are in one circuit and not in the other
=============  =================================================================================

Several GPUs are measured one by one, and together with the layers of the model cut between them
(``cuda:0,cuda:1``); the first also with weights in the memory of the host (``cuda:0, offload
cpu``).

In float32 the scores of attribution have to be those of the CPU to 1e-3, or there is no table.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.errors import DeviceError
from acdc.measure.evaluation import Evaluator
from acdc.methods import METHODS
from acdc.models import load_model
from acdc.models.devices import resolve_placement
from acdc.models.lowering import LoweredModel
from benchmarks.measure import Peak, timed
from benchmarks.results import write_results
from benchmarks.speed import Passes, WrongAnswerError
from benchmarks.subjects import Size, random_folder, random_task
from graphs import Circuit

__all__ = ["Plan", "Row", "cuda_devices", "measure", "run_table", "write"]

FORMAT, VERSION = "acdc-bench-cuda", 1
_EXACT = 1e-3
_ATTRIBUTION = ("eap", "eap-ig")


@dataclass(frozen=True)
class Search:
    """One search.

    Parameters
    ----------
    method, metric
        By name.
    options
        Of :meth:`acdc.methods.Method.find`.
    """

    method: str
    metric: str
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What tables call it."""
        said = ", ".join(f"{name} {value:g}" for name, value in self.options.items())
        return f"{self.method}, {self.metric}, {said}"


_SEARCHES = (
    Search("eap", "logit_diff", {"n_edges": 200}),
    Search("eap-ig", "logit_diff", {"n_edges": 200, "steps": 5}),
    Search("edge-pruning", "kl", {"n_edges": 200, "mask_steps": 20}),
    Search("acdc", "kl", {"threshold": 5e-4}),
    Search("acdc", "logit_diff", {"threshold": 5e-3}),
)


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Parameters
    ----------
    size
        Shape of the random model and its prompts.
    searches
        On it.
    dtypes
        Of every device; the CPU is measured in float32.
    repeats
        How often the model's own passes are timed before and after a search.
    n_circuits
        That are evaluated in one call.
    """

    size: Size = field(default_factory=lambda: Size(scale=2.0))
    searches: tuple[Search, ...] = _SEARCHES
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    repeats: int = 5
    n_circuits: int = 8

    @classmethod
    def quick(cls) -> Plan:
        """Return a plan of seconds, which shows that the benchmark works and nothing else."""
        toy = Size(n_layers=2, d_model=32, n_heads=2, d_vocab=97, scale=4.0, n_prompts=4, n_pos=6)
        few = {"n_edges": 20, "mask_steps": 2, "threshold": 1e-3}
        searches = tuple(
            replace(
                one, options={name: few.get(name, value) for name, value in one.options.items()}
            )
            for one in _SEARCHES
        )
        return cls(toy, searches, repeats=1, n_circuits=2)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One search on one device, see the module."""

    what: str
    device: str
    dtype: str
    seconds: float
    forward_seconds: float
    forward_backward_seconds: float
    ratio: float
    peak_bytes: int | None
    n_kept: int | None
    error: float
    differing: int | None


def cuda_devices() -> list[str]:
    """Return every CUDA device of this machine, and if they are several all of them together.

    Raises
    ------
    DeviceError
        If there is none.
    """
    n = torch.cuda.device_count()
    if not n:
        raise DeviceError(
            "this machine has no CUDA device, or this torch "
            f"({torch.__version__}) cannot use it: name others with --device, as --device cpu"
        )
    each = [f"cuda:{i}" for i in range(n)]
    return each + [",".join(each)] * (n > 1)


def measure(plan: Plan, devices: Sequence[str], offloaded: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of the CPU in float32, then those of every device in every precision.

    Parameters
    ----------
    plan
        What to measure.
    devices
        As ``--device`` takes them, several as one (``cuda:0,cuda:1``) included.
    offloaded
        Those that are measured with weights in the memory of the host.

    Raises
    ------
    DeviceError
        If this machine has not one of the devices.
    WrongAnswerError
        If attribution in float32 does not give what the CPU gives.
    """
    asked = [(device, "none") for device in devices]
    asked += [(device, "cpu") for device in offloaded]
    for device, offload in asked:
        resolve_placement(device, offload)
    wanted: dict[str, Circuit] = {}
    measured: dict[str, list[float]] = {}
    places = [(("cpu", "none"), "float32"), *itertools.product(asked, plan.dtypes)]
    with random_folder(plan.size) as folder:
        for (device, offload), dtype in places:
            models = _models(folder, dtype, {"device": device, "offload": offload})
            where = device if offload == "none" else f"{device}, offload {offload}"
            for search in plan.searches:
                experiment = _experiment(plan.size, search, *models)
                circuit, row = _searched(plan, search, experiment)
                row["device"] = where
                yield _compared(row, circuit, wanted.setdefault(search.name, circuit), search)
            yield replace(_evaluated(plan, experiment, wanted, measured), device=where)


def _models(
    folder: Path, dtype: str, where: Mapping[str, Any]
) -> tuple[LoweredModel, LoweredModel | None]:
    """The model, and in float32, too, if that is another: ACDC decides close cases in it."""
    model, _ = load_model(str(folder), dtype=dtype, **where)
    return model, None if dtype == "float32" else load_model(str(folder), **where)[0]


def _experiment(
    size: Size, search: Search, model: LoweredModel, exact: LoweredModel | None
) -> Experiment:
    experiment = Experiment(model, random_task(size), get_metric(search.metric))
    if exact is None or search.method != "acdc":
        return experiment
    return replace(experiment, in_float32=replace(experiment, model=exact))


def _searched(plan: Plan, search: Search, experiment: Experiment) -> tuple[Circuit, dict[str, Any]]:
    """Run a search after one that is not counted; what was measured of it."""
    passes = Passes(experiment, plan.repeats)
    passes.measure()

    def run() -> Circuit:
        return METHODS[search.method].find(experiment, **search.options).circuit

    run()
    with Peak(passes.device) as peak:
        seconds, circuit = timed(run, passes.device)
    passes.measure()
    both = search.method != "acdc"
    unit = passes.forward_seconds + (passes.forward_backward_seconds if both else 0.0)
    return circuit, {
        **_about(search.name, passes),
        "seconds": seconds,
        "ratio": seconds / unit,
        "peak_bytes": peak.n_bytes,
        "n_kept": circuit.n_edges,
    }


def _about(what: str, passes: Passes) -> dict[str, Any]:
    model = passes.experiment.model
    return {
        "what": what,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "forward_seconds": passes.forward_seconds,
        "forward_backward_seconds": passes.forward_backward_seconds,
    }


def _compared(row: dict[str, Any], circuit: Circuit, wanted: Circuit, search: Search) -> Row:
    error = float(np.abs(circuit.scores - wanted.scores).max() / np.abs(wanted.scores).max())
    if search.method in _ATTRIBUTION and row["dtype"] == "float32" and not error <= _EXACT:
        raise WrongAnswerError(
            f"{search.name} on {row['device']}: relative error {error:.2e}, expected at most "
            f"{_EXACT:g}"
        )
    differing = int((circuit.in_circuit != wanted.in_circuit).sum())
    return Row(**row, error=error, differing=differing)


def _evaluated(
    plan: Plan,
    experiment: Experiment,
    circuits: Mapping[str, Circuit],
    measured: dict[str, list[float]],
) -> Row:
    """Evaluate some circuits of growing size in one call each."""
    scores = np.abs(next(iter(circuits.values())).scores)
    sizes = np.geomspace(1, len(scores), plan.n_circuits).astype(int)
    masks = [scores >= np.sort(scores)[-size] for size in sizes]
    passes = Passes(experiment, plan.repeats)
    passes.measure()
    evaluator = Evaluator(experiment)

    def run() -> list[float]:
        return [evaluator.evaluate(mask).metric_circuit for mask in masks]

    run()
    with Peak(passes.device) as peak:
        seconds, values = timed(run, passes.device)
    passes.measure()
    wanted = np.array(measured.setdefault("evaluate", values))
    seconds /= len(masks)
    return Row(
        **_about(f"evaluate one circuit, {experiment.metric.name}", passes),
        seconds=seconds,
        ratio=seconds / passes.forward_seconds,
        peak_bytes=peak.n_bytes,
        n_kept=None,
        error=float(np.abs(np.array(values) - wanted).max() / np.abs(wanted).max()),
        differing=None,
    )


_COLUMNS = ("what", "device", "dtype", "seconds", "x passes", "times CPU", "peak MiB", "error",
            "kept", "differing")  # fmt: skip


def _cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    base = next(one.seconds for one in rows if one.what == row.what)
    peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}"
    numbers = ("-" if n is None else f"{n:,}" for n in (row.n_kept, row.differing))
    return (
        row.what, row.device, row.dtype, f"{row.seconds:.3g}", f"{row.ratio:.3g}",
        f"{base / row.seconds:.3g}", peak, f"{row.error:.1e}", *numbers,
    )  # fmt: skip


def run_table(rows: Sequence[Row]) -> Table:
    """Return the rows as a table for the terminal."""
    table = Table(title="searches by device and precision", title_justify="left")
    for i, name in enumerate(_COLUMNS):
        table.add_column(name, justify="left" if i < 3 else "right")
    for row in rows:
        table.add_row(*_cells(row, rows))
    return table


def write(folder: Path, rows: Sequence[Row], plan: Plan, device: str) -> list[str]:
    """Write ``results.json`` and ``results.md``; return their names."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---|---|---|" + "---:|" * 7]
    lines += ["| " + " | ".join(_cells(row, rows)) + " |" for row in rows]
    text = f"# {plan.size.name}, {plan.size.n_prompts} prompts of {plan.size.n_pos} tokens\n\n"
    head = {"format": FORMAT, "version": VERSION, "size": asdict(plan.size)}
    text += "\n".join(lines) + "\n"
    return write_results(folder, head, (asdict(row) for row in rows), text, device)
