"""A model folder with only a circuit left.

Heads and MLPs without a circuit edge are replaced by what ablation says they write
(:mod:`acdc.models.replacing`): a mean over the task's corrupt prompts, a trained constant, or zero.
The folder's model is the run's model with these nodes ablated, to rounding; that is checked before
it is kept.  What it is not: edges between the nodes that stay all stay, since they have no weights,
so its metric is not the circuit's, which ablates edges; the embeddings stay in any case; and the
file is no smaller, as what is gone is zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acdc.engine.experiment import Experiment
from acdc.engine.patched import PatchedModel
from acdc.engine.stages import Heads, Logits, Mlp
from acdc.errors import ModelError, OptionError
from acdc.evidence.what_if import ablating
from acdc.measure.ordinary import docstrings, text_loss
from acdc.models import load_model
from acdc.models.lowering import LoweredModel
from acdc.models.replacing import Replaced, write_replaced
from acdc.runs.discover import fit
from acdc.runs.folder import check_output, versions, write_folder
from acdc.runs.opened import RunLike, open_run
from acdc.runs.reporter import Reporter, Silent
from acdc.runs.unseen import PromptChoice
from acdc.settings import Settings
from acdc.tasks import Tokenizer
from acdc.terminal.shown import Shown
from graphs import Circuit
from graphs.files.whole import MIB, read_text, write_json
from graphs.text import short

__all__ = ["CircuitModel", "export_model"]

_FILE = "circuit-model.json"
_MOST_TEXT = 64 * MIB
_MOST_TOKENS = 8192
_TOLERANCE = 1e-3
"""Of the metric's scale, by which a folder's model may differ from the ablated run."""


@dataclass(frozen=True, eq=False)
class CircuitModel(Shown):
    """What was written.

    Parameters
    ----------
    folder
        Where.
    kept, replaced
        Names of heads and MLPs.
    n_parameters, n_left
        Parameters of the model, and of them those that no longer do anything not counted.
    n_bytes
        Of the folder.
    metric_before, metric_after, metric_circuit
        On the task's clean prompts: of the model, of the folder's model, and with the circuit's
        edges alone.
    loss_before, loss_after
        On ordinary text, nats per token; None for a model without a tokenizer, or that reads both
        ways.
    n_tokens
        Of that text.
    difference
        Largest difference of a prompt's metric from the run with the same nodes ablated.
    about
        Task, model, metric, what stands in a node's place (``intervention``), prompts and text.
    """

    folder: Path
    kept: tuple[str, ...]
    replaced: tuple[str, ...]
    n_parameters: int
    n_left: int
    n_bytes: int
    metric_before: float
    metric_after: float
    metric_circuit: float
    loss_before: float | None
    loss_after: float | None
    n_tokens: int
    difference: float
    about: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """Content of ``circuit-model.json``."""
        values = {name: value for name, value in vars(self).items() if name != "about"}
        values |= {"folder": str(self.folder), "kept": list(self.kept)}
        return {**self.about, **values, "replaced": list(self.replaced), "versions": versions()}

    def __repr__(self) -> str:
        n = len(self.kept) + len(self.replaced)
        return short(f"<CircuitModel in {self.folder}: {len(self.kept)} of {n} heads and MLPs>")


def export_model(
    run: RunLike,
    folder: str | Path,
    *,
    text: str | Path | None = None,
    task: Any = None,
    seen: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **asked: Any,
) -> CircuitModel:
    """Write a model folder in which only the nodes of a circuit are left.

    Parameters
    ----------
    run
        Folder of a run, a circuit file, :class:`acdc.Run` or :class:`graphs.Circuit`, of heads and
        MLPs.
    folder
        To write, in the layout of the run's model; :func:`acdc.load_model` loads it, and
        transformers where the run's model is one of theirs.
    text
        File of ordinary text; None: docstrings of Python's standard library.
    task, seen
        As of :func:`acdc.discover`, None: the run's; and whether on the prompts that it saw.
    overwrite
        Whether to write into a folder that has files.
    reporter
        Told of progress.
    **asked
        Fields of :class:`acdc.settings.Settings` that are to be other than the run's;
        ``intervention`` says what stands in a node's place (of a ``resample`` run: ``mean``).

    Raises
    ------
    OptionError
        If the circuit has nodes that are no heads or MLPs, or constants depend on positions.
    ModelError
        If the model has no place for a constant, or was given as an object.

    Examples
    --------
    >>> import acdc
    >>> acdc.export_model("runs/ioi", "runs/ioi-model").metric_after  # doctest: +SKIP
    """
    folder = check_output(folder, overwrite=overwrite)
    words = docstrings() if text is None else read_text(text, _MOST_TEXT, OptionError)
    reporter = reporter or Silent()
    opened = open_run(run)
    settings = opened.settings(task=task, **asked | {"dtype": "float32"})
    if "model" in settings.given:
        raise ModelError("the run's model was given as an object: name its folder with --model")
    choice = PromptChoice(opened.discovery_with(settings), seen)
    with reporter.phase("load model and task", None):
        circuit, experiment = fit(opened.circuit, settings, choice, opened.constants(settings))
        _check(experiment)
        experiment = ablating(experiment, settings, asked, reporter)
    kept = _kept(circuit)
    replaced = _replaced(experiment, kept)
    found: list[CircuitModel] = []

    def write(new: Path) -> None:
        n_parameters = write_replaced(str(settings.model), replaced, new)
        own = _measured(experiment, circuit, kept, new, folder, n_parameters, settings, words, text)
        write_json(new / _FILE, own.summary())
        found.append(own)

    with reporter.phase("write and measure", None):
        write_folder(folder, write, overwrite=overwrite)
    return found[0]


def _check(experiment: Experiment) -> None:
    """Refuse nodes that are no heads or MLPs."""
    for stage in experiment.program.stages:
        if type(stage) not in (Heads, Mlp, Logits):
            place = experiment.components.senders[experiment.program.senders_written(stage).start]
            raise OptionError(
                f"the circuit has nodes as {place!r}, which are parts of a head or MLP: only whole "
                "heads and MLPs can be left out of a model's weights"
            )


def _kept(circuit: Circuit) -> NDArray[np.bool_]:
    """``[sender of the components]``: embeddings, and those that an edge of the circuit leaves."""
    graph = circuit.graph
    kept = np.zeros(len(graph.components.senders), dtype=bool)
    kept[graph.sender_component[graph.edge_sender[circuit.in_circuit]]] = True
    kept |= graph.components.source[: len(kept)]
    return kept


def _replaced(experiment: Experiment, kept: NDArray[np.bool_]) -> Replaced:
    """Nodes that go, and the constants in their place."""
    constants = experiment.carried
    if constants is None and experiment.intervention != "zero":
        raise OptionError(
            f"intervention {experiment.intervention!r} carries what another run makes, which "
            "weights cannot: ask for --intervention mean or zero"
        )
    if constants is not None and None not in constants.values:
        raise OptionError(
            f"{experiment.intervention} constants depend on the position, which weights do not: "
            "ask for --intervention mean or zero"
        )
    values = None if constants is None else constants.values[None]
    heads: dict[int, tuple[int, ...]] = {}
    mlps: list[int] = []
    attention: dict[int, Tensor] = {}
    mlp: dict[int, Tensor] = {}
    for stage in experiment.program.stages[:-1]:
        (b,) = stage.blocks
        block = experiment.program.blocks[b]
        gone = np.flatnonzero(~kept[block.start : block.stop])
        if not len(gone):
            continue
        where = torch.as_tensor(gone)
        written = None
        if values is not None:
            written = block.some(where).vectors(values[b].double()[where].to(values[b]))
            written = written.double().sum(0).flatten().float().cpu()
        if isinstance(stage, Heads):
            heads[stage.layer] = tuple(gone.tolist())
        else:
            mlps.append(stage.layer)
        if written is not None and written.any():
            (attention if isinstance(stage, Heads) else mlp)[stage.layer] = written
    return Replaced(heads, tuple(mlps), attention, mlp)


def _measured(
    experiment: Experiment,
    circuit: Circuit,
    kept: NDArray[np.bool_],
    new: Path,
    folder: Path,
    n_parameters: int,
    settings: Settings,
    words: str,
    text: str | Path | None,
) -> CircuitModel:
    """Load what was written, check that it is the ablated run, and say what it does."""
    shape = experiment.model.shape
    model, tokenizer = load_model(
        str(new), device=settings.device, offload=settings.offload,
        split_qkv=shape.split_qkv, split_embed=shape.split_embed,
    )  # fmt: skip
    graph, patched = experiment.graph, PatchedModel(experiment)
    wanted = patched.values(kept[graph.sender_component[graph.edge_sender]])
    found = replace(experiment, model=model, constants=None).plain_values("clean")
    difference = float(np.abs(found - wanted).max())
    if not difference <= _TOLERANCE * max(1.0, float(np.abs(wanted).max())):
        raise ModelError(
            f"the model that was written differs by {difference:.2g} in {experiment.metric.name} "
            "from the run with the same nodes ablated: it is not kept"
        )
    names = np.array(experiment.components.senders)
    nodes = ~experiment.components.source[: len(names)]
    ids = _tokens(experiment, tokenizer, words)
    first = _first(experiment, tokenizer)
    losses = [text_loss(one, ids, first) if ids else None for one in (experiment.model, model)]
    about = {
        "task": settings.task,
        "model": str(settings.model),
        "metric": experiment.metric.name,
        "intervention": experiment.intervention,
        "prompts": str(experiment.task.info["prompts"]),
        "text": "docstrings of Python's standard library" if text is None else str(text),
    }
    return CircuitModel(
        folder, tuple(names[kept & nodes].tolist()), tuple(names[~kept].tolist()), n_parameters,
        n_parameters - _n_idle(experiment.model, experiment, kept),
        sum(file.stat().st_size for file in new.iterdir()), experiment.plain("clean"),
        float(found.mean()), float(patched.values(circuit.in_circuit).mean()),
        losses[0], losses[1], len(ids), difference, about,
    )  # fmt: skip


def _first(experiment: Experiment, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The token that says that a text begins, where the task's prompts have it."""
    first = experiment.task.pairs[0].clean[:1]
    return first if tokenizer is not None and first == (tokenizer.bos_token_id,) else ()


def _tokens(experiment: Experiment, tokenizer: Tokenizer | None, words: str) -> list[int]:
    """Ids of a text's first tokens; none where there is no next token to predict."""
    causal = all(layer.attention.causal for layer in experiment.model.layers)
    if tokenizer is None or not causal:
        return []
    ids = tokenizer.encode(words[: 16 * _MOST_TOKENS], add_special_tokens=False)[:_MOST_TOKENS]
    if len(ids) < 2:
        raise OptionError(f"a text of {len(ids)} tokens: give one with at least 2")
    return ids


def _n_idle(model: LoweredModel, experiment: Experiment, kept: NDArray[np.bool_]) -> int:
    """Numbers of the matrices of nodes that go; of shared keys and values where all sharers go."""
    total = 0
    for stage in experiment.program.stages[:-1]:
        (b,) = stage.blocks
        block, layer = experiment.program.blocks[b], model.layers[stage.layer]
        gone = ~kept[block.start : block.stop]
        if isinstance(stage, Heads):
            attention = layer.attention
            groups = gone.reshape(-1, attention.group).all(1)
            n_each = attention.W["q"][0].numel()
            total += int(gone.sum()) * (n_each + attention.W_O[0].numel())
            total += int(groups.sum()) * (attention.W["k"][0].numel() + attention.W["v"][0].numel())
        elif gone.any() and layer.mlp is not None:
            total += layer.mlp.W_out.numel() + sum(W.numel() for _, W in layer.mlp.readers)
    return total
