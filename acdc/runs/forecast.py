"""What a search will take, from widths, prompts and settings alone: before anything is computed.

The parts are what :mod:`acdc.engine.footprint` says; they are checked against measured peaks in
``benchmarks/results/memory``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from acdc.engine.footprint import MOST_POINTS, Footprint, room_for_scenarios, streams
from acdc.engine.steps import MOST_TOGETHER, prompts_of_part
from acdc.errors import OptionError
from acdc.methods import Method
from acdc.models.devices import free_memory
from acdc.models.sizes import Sizes
from acdc.settings import Settings

__all__ = ["BESIDE", "Forecast", "batch_size_of", "check_room", "foresee", "of_evaluation"]

BESIDE = 64 << 20
"""Bytes of a process beyond tensors: code that the first computations bring in, graphs, lists."""
_FEWEST = 4
"""Prompts that are evaluated together at least."""


@dataclass(frozen=True)
class Forecast:
    """What a search takes, in bytes, and how many passes it makes.

    Parameters
    ----------
    weights
        Of the model; in low precision ``acdc`` also has it in float32.
    least
        What a prompt alone takes beside them.
    state
        What ``acdc`` keeps of all prompts.
    is_streamed
        Whether that lies in files, and is in memory for one batch at a time.
    prompts_at_once
        How many prompts are run together.
    chunk
        What the search takes for these, with the part of the state that is in memory.
    peak
        Most that is held at any time, with the evaluation that follows.
    forwards, backwards
        Passes of the search over all of its prompts; None where that depends on what it finds.
    """

    weights: int
    least: int
    state: int
    is_streamed: bool
    prompts_at_once: int
    chunk: int
    peak: int
    forwards: int | None
    backwards: int | None

    def __str__(self) -> str:
        parts = [f"weights {_size(self.weights)}"]
        if self.state:
            where = "streamed" if self.is_streamed else "in memory"
            parts.append(f"state {_size(self.state)} {where}")
        n = self.prompts_at_once
        parts.append(f"{_size(self.chunk)} for {n} prompt{'s' * (n > 1)} at a time")
        parts.append(f"peak {_size(self.peak)}")
        if self.forwards is not None:
            parts.append(f"{self.forwards} forward and {self.backwards} backward passes")
        return ", ".join(parts)

    def plain(self) -> dict[str, Any]:
        """``forecast`` of a ``run.json``."""
        return asdict(self)


def foresee(
    footprint: Footprint,
    lengths: Sequence[int],
    settings: Settings,
    method: Method,
    memory: int,
    n_others: int | None = None,
) -> Forecast:
    """Foretell what a search takes.

    Parameters
    ----------
    footprint
        Of the model, with the dictionaries that are known.
    lengths
        Tokens of each prompt.
    settings, method
        What is asked for.
    memory
        Bytes that may be taken beside the weights.
    n_others
        Prompts beside them that select and test; None: as many.

    Raises
    ------
    OptionError
        If so few prompts as are run together at least take more.
    """
    counts = Counter(lengths)
    passes = method.counts(method.configured(settings))
    n_batch = min(settings.batch_size, max(counts.values()))
    state = _state(footprint, counts) if method.keeps_state else 0
    is_streamed = streams(state, memory)
    if method.keeps_state:
        each, n_held = footprint.state(max(counts)), len(lengths)
        if is_streamed:
            n_held = n_batch = min(n_batch, footprint.searched_at_once(max(counts), memory))
        n, least = n_batch, _of_search(footprint, max(counts), 1, each, 1, 0)
        held = n * each if is_streamed else state
        chunk = _of_search(footprint, max(counts), n, held, n_held, memory)
    elif method.trains:
        each = footprint.masks(max(counts))
        n = min(prompts_of_part(MOST_TOGETHER, each, memory), max(counts.values()))
        least, chunk = each, n * each
    else:
        n, least, chunk = _of_passes(footprint, max(counts), n_batch, passes, memory)
    _check_prompt(max(counts), least, memory)
    weights = _weights(footprint.sizes, settings, method)
    others = len(lengths) if n_others is None else n_others
    evaluation = of_evaluation(footprint, max(counts), n_batch, len(lengths) + others, memory)
    return Forecast(
        weights=weights,
        least=least,
        state=state,
        is_streamed=is_streamed,
        prompts_at_once=n,
        chunk=chunk,
        peak=weights + footprint.scratch + max(chunk, evaluation) + BESIDE,
        forwards=None if passes is None else passes[0],
        backwards=None if passes is None else passes[1],
    )


def batch_size_of(forecast: Forecast, settings: Settings, lengths: Sequence[int]) -> int:
    """Prompts of a batch: as many as are asked for, or as fit if they are kept in files.

    Where a batch fits it is as it was, and so is every sum over it.
    """
    n, most = forecast.prompts_at_once, max(Counter(lengths).values())
    return n if forecast.is_streamed and n < most else settings.batch_size


def check_room(
    sizes: Sizes, places: Sequence[torch.device], beside: int = 0, weights: int | None = None
) -> None:
    """Refuse a model that the machine has no room for, before its weights are read.

    Parameters
    ----------
    sizes
        Of the model.
    places
        Devices that hold them.
    beside
        Bytes that a computation takes at least beside the weights.
    weights
        What these take; None: as the sizes say.

    Raises
    ------
    OptionError
        Saying how much is lacking.
    """
    weights = weights or sizes.weights
    there = sum(map(free_memory, places))
    if weights + beside > there:
        low = "" if sizes.kept.itemsize < 4 else "--dtype bfloat16, "
        more = f" and a run at least {_size(beside)} beside them" if beside else ""
        raise OptionError(
            f"the model's weights take {_size(weights)}{more}, {' and '.join(map(str, places))} "
            f"has {_size(there)} free: "
            f"choose {low}a smaller model or a larger machine"
        )


def _state(footprint: Footprint, counts: Mapping[int, int]) -> int:
    return sum(n * footprint.state(n_pos) for n_pos, n in counts.items())


def _of_search(
    footprint: Footprint, n_pos: int, n_batch: int, held: int, n_held: int, memory: int
) -> int:
    """What a search takes that keeps a state of which so much is held: at its start, or later.

    It is made of two runs of each batch in turn.  Then something comes to the state of the
    ``n_held`` prompts that it is of, and scenarios take half of what is left.
    """
    later = held + n_held * footprint.moved(n_pos)
    return max(
        held + n_batch * footprint.starting(n_pos), later + room_for_scenarios(memory, later)
    )


def _of_passes(
    footprint: Footprint, n_pos: int, n_batch: int, passes: tuple[int, int] | None, memory: int
) -> tuple[int, int, int]:
    """Prompts at a time of attribution; what one takes, and these together."""
    _, backwards = passes or (2 + MOST_POINTS, MOST_POINTS)
    if not backwards:
        n = min(n_batch, footprint.runs_at_once(n_pos, memory))
        one, all_ = (k * footprint.plain(n_pos) + footprint.rows(k * n_pos) for k in (1, n))
        return n, one, min(all_, n * footprint.plain(n_pos) + memory // 2)
    keeps = passes is None
    together = footprint.points_at_once(n_pos, backwards, keeps_runs=keeps)
    each = footprint.attribution(n_pos, together, keeps_runs=keeps)
    n = min(n_batch, footprint.prompts_at_once(n_pos, memory, together, keeps_runs=keeps))
    one, all_ = (k * each + footprint.products(n_pos, k) for k in (1, n))
    return n, one, all_


def of_evaluation(
    footprint: Footprint, n_pos: int, n_batch: int, n_prompts: int, memory: int
) -> int:
    """What the evaluation of circuits takes, and keeps of one for the next.

    Parameters
    ----------
    footprint, memory
        As of :func:`foresee`.
    n_pos, n_batch, n_prompts
        Tokens of a prompt, prompts of a batch, and of all batches.
    """
    each = footprint.evaluation(n_pos) + footprint.plain(n_pos)
    n = min(n_batch, max(_FEWEST, memory // 2 // each))
    return n * each + min(memory // 2, n_prompts * footprint.kept_runs(n_pos))


def _check_prompt(n_pos: int, least: int, memory: int) -> None:
    if least > memory:
        gib = -(-least // (1 << 26)) / 16
        raise OptionError(
            f"a prompt of {n_pos:,} tokens takes {_size(least)} beside the weights, memory allows "
            f"{_size(memory)}: ask for --memory {gib:g}, or for shorter prompts"
        )


def _weights(sizes: Sizes, settings: Settings, method: Method) -> int:
    """Bytes of the weights, and of those in float32 where close cases are decided so."""
    decides = method.keeps_state and method.over == "circuit" and sizes.used.itemsize < 4
    return sizes.weights * (1 + 4 // sizes.kept.itemsize) if decides else sizes.weights


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.2f} GiB" if n_bytes >= 1 << 30 else f"{n_bytes / 2**20:,.0f} MiB"
