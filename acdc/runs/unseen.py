"""Prompts that discovery has not seen.

A circuit that is measured on the prompts it was found on looks better than it is.  A built-in
task gives others from another seed, without those of the run; of a file there are the rows that
discovery held out or did not ask for (see :mod:`acdc.tasks.split`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count

from acdc.errors import TaskError
from acdc.models.sizes import Sized
from acdc.runs.given import same_task, spec_of
from acdc.runs.prompts import draw, load_prompts, load_selection
from acdc.settings import Settings
from acdc.tasks import DEFAULT_N_PROMPTS, Task, Tokenizer
from acdc.tasks.split import select_pairs

__all__ = ["PromptChoice"]


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

    def __call__(self, settings: Settings, model: Sized, tokenizer: Tokenizer | None) -> Task:
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

    def _known(
        self, settings: Settings, run: Settings, model: Sized, tokenizer: Tokenizer | None
    ) -> list[Task]:
        """What the run saw: prompts of its search, and those that it chose a size on."""
        own = replace(
            settings,
            seed=run.seed,
            n_prompts=run.n_prompts,
            n_select=run.n_select,
            holdout=run.holdout,
            corruption=run.corruption,
        )
        fit = load_prompts(own, model, tokenizer)
        select = load_selection(own, model, tokenizer, fit) if own.n_select else None
        return [fit] if select is None else [fit, select]

    def _drawn(
        self, settings: Settings, run: Settings, model: Sized, tokenizer: Tokenizer | None
    ) -> Task:
        """Prompts of other seeds, without repeats and without the run's own."""
        tasks = self._known(settings, run, model, tokenizer)
        known = [pair.clean for task in tasks for pair in task.pairs]
        start = settings.seed + (settings.seed == run.seed)
        seeds = (seed for seed in count(start) if seed != run.seed)
        wanted = settings.n_prompts or DEFAULT_N_PROMPTS
        found = draw(settings, model, tokenizer, wanted, known, seeds)
        if found is None:
            raise TaskError(
                f"task {settings.task!r}: other seeds gave no prompt that discovery has not seen; "
                "evaluate with --seen on those it has"
            )
        says = f"unseen by discovery (seed {found.info['seed']}, not {run.seed})"
        return replace(found, info={**found.info, "prompts": says, "seen": False})

    def _held_out(
        self, settings: Settings, run: Settings, model: Sized, tokenizer: Tokenizer | None
    ) -> Task:
        """The file's rows that the run did not use; those that it did where none are left."""
        used = self._known(settings, run, model, tokenizer)
        known = {pair.clean for task in used for pair in task.pairs}
        every = load_prompts(
            replace(settings, holdout=0.0, n_prompts=None, n_select=0), model, tokenizer
        )
        left = tuple(pair for pair in every.pairs if pair.clean not in known)
        pairs, seen = (left, False) if left else (used[0].pairs, True)
        says = "those of discovery, which used the whole file"
        if not seen:
            says = f"rows of the file that discovery has not seen, {len(left)} of {len(every)}"
        return select_pairs(every, pairs[: settings.n_prompts], prompts=says, seen=seen)
