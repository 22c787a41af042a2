"""What can be asked for: one field says name, type, default, bounds and help.

The options of the command line, the arguments of the Python call, their checks, ``run.json`` and
the command that a report names are made from the fields of :class:`Settings` and from those of the
options of a method (:mod:`acdc.methods.base`).  Nothing heavy is imported here, so that the
command line can read it before it runs anything.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

from acdc.ablations.base import ABLATIONS
from acdc.errors import OptionError

__all__ = [
    "DEFAULT_HOLDOUT",
    "GROUPS",
    "MOST_REPEATS",
    "MOST_RESAMPLES",
    "OFFLOADS",
    "POSITIONS",
    "RANKINGS",
    "SELECTIONS",
    "Checked",
    "Direction",
    "Lost",
    "Norms",
    "Option",
    "Settings",
    "check_count",
    "command_line",
    "option",
    "options_of",
]

Direction = Literal["noising", "denoising"]
Norms = Literal["live", "frozen"]
Router = Literal["frozen", "free"]
POSITIONS = ("token", "span")
"""By what nodes and edges can be split."""
OFFLOADS = ("none", "cpu")
"""Whether weights are held in the host's memory, not on the device."""
RANKINGS = ("absolute", "signed")
SELECTIONS = ("top", "greedy", "milp")
"""How scores can be ranked."""
DEFAULT_HOLDOUT = 0.25
"""Share of a file's rows that discovery leaves to evaluation."""

MOST_REPEATS = 10**6
"""How often something may be asked to be done, unless less is said."""
MOST_RESAMPLES = 10**5
"""Of a bootstrap, which keeps a number by resample and prompt."""

GROUPS = ("model", "method", "selection", "prompts", "computing", "ablation", "nodes")
"""Of the fields of :class:`Settings`, as the command line lists them."""

_OBJECTS = ("task", "model", "metric", "method")
"""Settings that may be given as objects."""

_KINDS: dict[str, Any] = {
    "str": str, "int": int, "float": (int, float), "bool": bool, "None": type(None)
}  # fmt: skip


_MOST_TEXT = 10_000
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Option:
    """What a field says of itself beside its name, type and default.

    Parameters
    ----------
    help
        One line for the command line.
    group
        One of :data:`GROUPS`; none for options of a method.
    at_least, above, at_most, below
        Bounds of a number; one that is not finite is never accepted.
    choices
        Texts that it may be, or a table by name.
    listed
        List of ``acdc list`` that names of it are in, for shells that complete them.
    example
        What the message about a bad value gives as a good one.
    flag
        Its name on the command line, where that is another.
    shared
        An option of a method that takes the value of the setting of the same name.
    only
        What has to be there for it to do anything: ``latents``, ``neurons``, ``training`` or
        ``milp``; none: nothing special.
    needs
        Name of another option of the same kind, and the value that it has to have for this one to
        do anything; none: whatever it is.
    """

    help: str
    group: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: Collection[str] = ()
    listed: str = ""
    example: str = ""
    flag: str | None = None
    shared: bool = False
    only: str = ""
    needs: tuple[str, str] | None = None

    def check(self, name: str, value: Any) -> None:
        """Raise OptionError if a value is none of the choices or out of bounds."""
        if self.choices != () and value not in self.choices:
            raise OptionError(f"{name} {value!r}: expected one of {', '.join(self.choices)}")
        if not isinstance(value, int | float) or isinstance(value, bool):
            return
        wanted = self._wanted(value)
        if wanted is not None:
            end = f", as {self.example}" if self.example else ""
            raise OptionError(f"{name} {value}: expected {wanted}{end}")

    def _wanted(self, value: float) -> str | None:
        """What a number should have been, None if it is that."""
        if self.above is not None or self.below is not None:
            low, high = self.above, self.below
            held = (low is None or value > low) and (high is None or value < high)
            held = held and (self.at_least is None or value >= self.at_least)
            said = [f"at least {self.at_least:,}"] if self.at_least is not None else []
            said += [f"a number above {low:,}"] if low is not None else []
            said += [f"below {high:,}"] if high is not None else []
            return None if held and not _endless(value) else " and ".join(said)
        if _endless(value):
            return "a finite number"
        if self.at_least is not None and value < self.at_least:
            return f"at least {self.at_least:,}"
        if self.at_most is not None and value > self.at_most:
            return f"at most {self.at_most:,}"
        return None


def _endless(value: float) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def option(default: Any = MISSING, help: str = "", **says: Any) -> Any:
    """Return a dataclass field that says what :class:`Option` has room for."""
    return field(default=default, metadata={"option": Option(help, **says)})


def check_count(name: str, value: int, *, at_least: int = 1, at_most: int = MOST_REPEATS) -> None:
    """Raise OptionError if a number of things or repetitions is out of bounds."""
    Option("", at_least=at_least, at_most=at_most).check(name, value)


@dataclass(frozen=True)
class Lost:
    """An object that a run was given and that its ``run.json`` only names.

    Parameters
    ----------
    what
        What it was, as "Metric 'gap'".
    """

    what: str


class Checked:
    """A dataclass whose fields are checked: by their type, then as their :class:`Option` says.

    Raises
    ------
    OptionError
        The message has the name, what was got and what was expected.
    """

    def __post_init__(self) -> None:
        for name, kinds, says in options_of(type(self)):
            value = getattr(self, name)
            if not any(_is_of(value, kind) for kind in kinds):
                raise OptionError(f"{name} is {value!r}: expected {' or '.join(kinds)}")
            if value is not None:
                says.check(name, value)


def _is_of(value: Any, kind: str) -> bool:
    """Whether a value is of a kind: true is no number, and a text can be the name of a file."""
    if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
        return False
    if isinstance(value, str):
        return len(value) <= _MOST_TEXT and "\0" not in value and not _SURROGATE.search(value)
    return True


def options_of(kind: type) -> Iterator[tuple[str, list[str], Option]]:
    """Yield name, names of the types and :class:`Option` of every field that has one."""
    for one in fields(kind):  # type: ignore[arg-type]  # a dataclass
        if "option" in one.metadata:
            yield one.name, _kinds(one.type), one.metadata["option"]


def _kinds(annotation: Any) -> list[str]:
    """Names of the types of a field, whether its annotation is a text or not."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return text.split(" | ")


@dataclass(frozen=True)
class Settings(Checked):
    """Everything that decides a run's result.

    Parameters
    ----------
    task
        Built-in task or file.
    model
        Bundled model, folder or Hugging Face name, or NAME@STEP, a checkpoint of it
        (:mod:`acdc.models.steps`); None: the task's bundled model.
    method, metric
        Names, see ``acdc list``; no metric: the task's.
    threshold, n_edges, ranking, select, select_seconds, positive, stable
        How scores become a circuit, see :mod:`acdc.methods.select`.
    n_prompts, batch_size, seed, corruption, prepend_bos
        The prompts.
    n_select, n_test
        Prompts that the size is chosen on, and that faithfulness is told of, see
        :mod:`acdc.runs.prompts`.
    holdout
        Share of a file's rows that discovery leaves to evaluation, see
        :mod:`acdc.tasks.split`; None for a built-in task, which draws others.
    device, offload, dtype
        Where, whether weights stay in the memory of the host, and in which precision.
    intervention, direction
        What ablated edges carry, and from which run the search starts.
    mean_over
        Built-in task or file of prompts that means are taken over (see
        :func:`acdc.tasks.dataset.load_dataset`); None: the prompts of the run that ablated edges
        come from.
    optimal_steps
        Training steps of constants that are trained.
    router
        Whether the weights of experts in patched runs are those of the run that ablation starts
        from, or what the router says of what it reads.
    norms
        Whether norms of patched runs are computed from what they read, or have the scales of the
        run that ablation starts from.
    split_qkv, split_embed
        Granularity of the graph.
    positions
        By what nodes and edges are split, see :mod:`acdc.tasks.positions`: ``none``, ``token`` or
        ``span``.
    trust_remote_code
        Whether the model's folder may run its own code.
    saes, neurons, neuron_inputs, max_latents
        Dictionaries whose latents are nodes (separated by commas, see
        :func:`acdc.dictionaries.sources.load_dictionaries`), or whether the neurons of MLPs are
        (and each a receiver of its own), and how many latents or neurons at most.
    experts
        Whether the experts of mixtures are nodes.
    options
        Those of the method, by name; what is not there is as the method has it.
    given
        Objects given in Python where ``task``, ``model``, ``metric`` or ``method`` have a name,
        see :mod:`acdc.runs.given`; a :class:`Lost` where only ``run.json`` knows of one.
    """

    task: str = option(help="Built-in task (acdc list tasks) or a file of pairs.")
    model: str | None = option(
        None, "Bundled model, folder or Hugging Face name, with @STEP a checkpoint of it (default: "
        "the task's).", group="model", listed="models",
    )  # fmt: skip
    method: str = option(
        "acdc", "See acdc list methods (default: acdc; with latents eap-ig).", group="method",
        listed="methods",
    )  # fmt: skip
    metric: str | None = option(
        None, "See acdc list metrics (default: the task's).", group="method", listed="metrics"
    )
    threshold: float | None = option(
        None, "tau of acdc, or least absolute score.", group="selection", example="0.01"
    )
    n_edges: int | None = option(
        None, "At most so many edges.", group="selection", at_least=1, flag="edges"
    )
    ranking: str | None = option(
        None, "Rank scores by absolute or signed value.", group="selection", choices=RANKINGS
    )
    select: str = option(
        "top", "How scores become a circuit: top (the highest, pruned), greedy (from logits "
        "upwards) or milp (the best connected one).", group="selection", choices=SELECTIONS,
    )  # fmt: skip
    select_seconds: float = option(
        60.0, "Time limit of each integer program of --select milp.", group="selection", above=0,
        example="60", only="milp",
    )  # fmt: skip
    positive: float | None = option(
        None, "Share of the edges whose ablation makes the metric worse; the rest are the others.",
        group="selection", at_least=0, at_most=1, example="0.8",
    )  # fmt: skip
    stable: float | None = option(
        None, "Leave out edges whose score's sign is the same in less than this share of "
        "bootstrap draws of prompts.", group="selection", above=0.5, below=1, example="0.95",
    )  # fmt: skip
    n_prompts: int | None = option(
        None, "Prompt pairs that the search sees (default: 128; of a file all that are left).",
        group="prompts", at_least=1, at_most=10**6,
    )  # fmt: skip
    n_select: int | None = option(
        None, "Others that the size is chosen on (default: 256; of a file a third; 0: the same).",
        group="prompts", at_least=0, at_most=10**6,
    )  # fmt: skip
    n_test: int | None = option(
        None, "Unseen ones that faithfulness is told of (default: 256; of a file those held out).",
        group="prompts", at_least=0, at_most=10**6,
    )  # fmt: skip
    holdout: float | None = option(
        None, "Share of a file's rows left to evaluation (default: 0.25).", group="prompts",
        at_least=0, below=1, example=str(DEFAULT_HOLDOUT),
    )  # fmt: skip
    batch_size: int = option(32, "Prompts run together.", group="computing", at_least=1)
    seed: int = option(
        0, "Seed of a built-in task's prompts and of a method's noise.", group="prompts",
        at_least=0, at_most=2**63 - 1,
    )  # fmt: skip
    corruption: str | None = option(
        None, "How a built-in task corrupts (acdc list tasks).", group="prompts"
    )
    prepend_bos: bool = option(False, "Put BOS before both prompts.", group="prompts")
    device: str = option(
        "cpu", "cpu, cuda, cuda:N, mps, GPUs that share the layers (cuda:0,cuda:1), or auto.",
        group="computing",
    )  # fmt: skip
    offload: str = option(
        "none", "cpu: weights stay in the host's memory, and are brought to the device as they are "
        "used.", group="computing", choices=OFFLOADS,
    )  # fmt: skip
    dtype: str = option("float32", "float32, bfloat16, float16 or float64.", group="computing")
    intervention: str = option(
        "resample", "What ablated edges carry, see acdc list ablations.", group="ablation",
        choices=ABLATIONS, listed="ablations",
    )  # fmt: skip
    direction: str = option(
        "noising", "noising (ablate) or denoising (restore).", group="ablation",
        choices=get_args(Direction),
    )  # fmt: skip
    mean_over: str | None = option(
        None, "Task or file of prompts that means are over (default: those that edges come from).",
        group="ablation",
    )  # fmt: skip
    optimal_steps: int = option(
        50,
        "Training steps of optimal constants.",
        group="ablation",
        at_least=1,
        at_most=10**7,
        only="training",
    )
    router: str = option(
        "frozen", "Of mixtures of experts: frozen (each expert has the weight of the run ablation "
        "starts from) or free.", group="ablation", choices=get_args(Router),
    )  # fmt: skip
    norms: str = option(
        "live", "live, or frozen: every norm has the scale of the run ablation starts from.",
        group="ablation", choices=get_args(Norms),
    )  # fmt: skip
    split_qkv: bool = option(True, "Query, key and value apart.", group="nodes")
    split_embed: bool = option(False, "Token and position apart.", group="nodes")
    positions: str = option(
        "none", "Split nodes and edges: none, by token, or by span of the task.", group="nodes",
        choices=("none", *POSITIONS),
    )  # fmt: skip
    trust_remote_code: bool = option(
        False, "Let the model's folder run its own code.", group="model"
    )
    saes: str | None = option(
        None, "Dictionaries whose latents are nodes, separated by commas: folders, hub names, "
        "bundled or bundled-transcoders.", group="nodes",
    )  # fmt: skip
    neurons: bool = option(False, "The neurons of every MLP are nodes (m3.n12).", group="nodes")
    neuron_inputs: bool = option(
        False, "Each neuron reads for itself: edges into it can be pruned alone.", group="nodes",
        only="neurons",
    )  # fmt: skip
    experts: bool = option(
        False, "The experts of every mixture are nodes (m3.e5), and free routers (m3.router).",
        group="nodes",
    )  # fmt: skip
    max_latents: int | None = option(
        None, "Nodes for at most so many latents (default: active) or neurons (1000).",
        group="nodes", at_least=1, at_most=10**8, only="latents",
    )  # fmt: skip
    options: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, task: str, **asked: Any) -> Settings:
        """Return settings of names in one row: what is no field is an option of the method."""
        own = {one.name for one in fields(cls)}
        options = {**asked.pop("options", {}), **{k: v for k, v in asked.items() if k not in own}}
        return cls(task, **{k: v for k, v in asked.items() if k in own}, options=options)

    @classmethod
    def read(cls, summary: Mapping[str, Any]) -> Settings:
        """Return the settings in the content of a ``run.json``.

        Whether a model's own code may run is not among them: who reads a folder says so, not the
        folder.
        """
        own = {one.name for one in fields(cls)} - {"trust_remote_code", "given"}
        given = summary.get("given", {})
        if not isinstance(given, dict) or not all(
            name in _OBJECTS and _is_of(what, "str") for name, what in given.items()
        ):
            raise OptionError(f"given is {given!r}: expected what was given for {_OBJECTS}")
        return cls(
            **{name: value for name, value in summary.items() if name in own},
            given={name: Lost(what) for name, what in given.items()},
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        values = self.options.items() if isinstance(self.options, dict) else [(None, None)]
        plain = all(
            _is_of(name, "str") and any(_is_of(value, kind) for kind in _KINDS)
            for name, value in values
        )
        if not plain:
            raise OptionError(f"options is {self.options!r}: expected names and plain values")

    def plain(self) -> dict[str, Any]:
        """Return plain values for ``run.json``; of objects what they are, under ``given``."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        given = values.pop("given")
        values["options"] = dict(self.options)
        return values | ({"given": {k: _said(v) for k, v in given.items()}} if given else {})

    def replace(self, **changes: Any) -> Settings:
        """Return the settings with some changed."""
        return dataclasses.replace(self, **changes)


def _said(thing: Any) -> str:
    """What an object is, in a few words."""
    if isinstance(thing, Lost):
        return thing.what
    if isinstance(thing, list):
        return f"a list of {len(thing)} rows"
    thing = thing[0] if isinstance(thing, tuple) else thing  # a model with its tokenizer
    return f"{type(thing).__name__} {thing.name!r}"


def command_line(
    settings: Settings, defaults: Mapping[str, Any] | None = None, command: str = "discover"
) -> str:
    """Return the command that asks for some settings; what is as by default is not said.

    ``defaults`` are those of the method's options.

    Examples
    --------
    >>> command_line(Settings("ioi", model="ioi-small", n_edges=60, prepend_bos=True))
    'acdc discover ioi --model ioi-small --method acdc --edges 60 --prepend-bos'
    """
    words = ["acdc", command, settings.task]
    usual = {one.name: one.default for one in fields(settings)}
    sized = settings.threshold is not None or settings.n_edges is not None
    for name, _, says in options_of(Settings):
        value = getattr(settings, name)
        if name == "n_select" and sized and settings.holdout is None:  # drawn for nothing
            continue
        if name != "task" and (value != usual[name] or name == "method"):
            words += _words(says.flag or name, value)
    for name, value in settings.options.items():
        usual_value = (defaults or {}).get(name)
        words += [] if value in (None, usual_value) else _words(name, value)
    return shlex.join(words)


def _words(name: str, value: Any) -> list[str]:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]
