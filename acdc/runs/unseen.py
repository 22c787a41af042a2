"""Prompts that discovery has not seen.

A circuit that is measured on the prompts it was found on looks better than it is.  A built-in
task gives others from another seed, without those of the run; of a file there are the rows that
discovery held out or did not ask for (see :mod:`acdc.tasks.split`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count

from acdc.errors import TaskError
from acdc.models.lowering import LoweredModel
from acdc.runs.discover import load_prompts
from acdc.runs.given import same_task, spec_of
from acdc.settings import Settings
from acdc.tasks import Pair, Task, Tokenizer
from acdc.tasks.split import select_pairs

__all__ = ["PromptChoice"]

_MOST_SEEDS = 10
"""Seeds tried before a task counts as exhausted."""


@dataclass(frozen=True)
class PromptChoice:
    """Which prompts a circuit is evaluated on.

    Called, it gives them; then ``task.info["prompts"]`` says in words which they are, and
    ``task.info["seen"]`` whether discovery saw them (None: not known).

    Parameters
    ----------
    discovery
        Settings of the run, its ``n_prompts`` as it was; None if the circuit came alone.
    seen
        Ask for the prompts of discovery itself.
    """

    discovery: Settings | None = None
    seen: bool = False

    def __call__(
        self, settings: Settings, model: LoweredModel, tokenizer: Tokenizer | None
    ) -> Task:
        """Return the prompt pairs; TaskError if there are none that discovery has not seen."""
        run = self.discovery
        if run is None:
            task, says, seen = load_prompts(settings, model, tokenizer), "as given", None
        elif not same_task(settings, run):
            task, says, seen = load_prompts(settings, model, tokenizer), "of another task", False
        elif self.seen:
            settings = replace(settings, seed=run.seed)
            task, says, seen = load_prompts(settings, model, tokenizer), "those of discovery", True
        elif spec_of(settings) is not None:
            return self._drawn(settings, run, model, tokenizer)
        else:
            return self._held_out(settings, run, model, tokenizer)
        return replace(task, info={**task.info, "prompts": says, "seen": seen})

    def _drawn(
        self, settings: Settings, run: Settings, model: LoweredModel, tokenizer: Tokenizer | None
    ) -> Task:
        """Prompts of other seeds, without repeats and without the run's own."""
        own = replace(
            settings, seed=run.seed, n_prompts=run.n_prompts, corruption=run.corruption
        )  # fmt: skip
        known = {pair.clean for pair in load_prompts(own, model, tokenizer).pairs}
        found: list[Pair] = []
        wanted, n_dropped = settings.n_prompts, 0
        used: list[int] = []
        start = settings.seed + (settings.seed == run.seed)
        seeds = (seed for seed in count(start) if seed != run.seed)
        while len(used) < _MOST_SEEDS and (not used or len(found) < (wanted or 0)):
            used.append(next(seeds))
            drawn = load_prompts(replace(settings, seed=used[-1]), model, tokenizer)
            wanted = wanted or len(drawn)
            for pair in drawn.pairs:
                if pair.clean in known:
                    n_dropped += 1
                elif len(found) < wanted:
                    known.add(pair.clean)
                    found.append(pair)
        if not found:
            raise TaskError(
                f"task {settings.task!r}: {_MOST_SEEDS} seeds gave no prompt that discovery has "
                "not seen; evaluate with --seen on those it has"
            )
        return select_pairs(
            drawn,
            tuple(found),
            seed=used[0],
            n_dropped=n_dropped,
            prompts=f"unseen by discovery (seed {used[0]}, not {run.seed})",
            seen=False,
        )

    def _held_out(
        self, settings: Settings, run: Settings, model: LoweredModel, tokenizer: Tokenizer | None
    ) -> Task:
        """The file's rows that the run did not use; those that it did where none are left."""
        of_run = replace(settings, seed=run.seed, holdout=run.holdout, n_prompts=run.n_prompts)
        used = load_prompts(of_run, model, tokenizer)
        known = {pair.clean for pair in used.pairs}
        every = load_prompts(replace(settings, holdout=0.0, n_prompts=None), model, tokenizer)
        left = tuple(pair for pair in every.pairs if pair.clean not in known)
        pairs, seen = (left, False) if left else (used.pairs, True)
        says = "those of discovery, which used the whole file"
        if not seen:
            says = f"rows of the file that discovery has not seen, {len(left)} of {len(every)}"
        return select_pairs(every, pairs[: settings.n_prompts], prompts=says, seen=seen)
