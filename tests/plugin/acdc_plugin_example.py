"""What a package of somebody else's offers: method, metric, task, ablation and reference."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from acdc.ablations import ablation
from acdc.ablations.mean import mean_constants
from acdc.engine.metrics import Metric
from acdc.methods import Score, method
from acdc.methods.eap import eap
from acdc.settings import Checked, option
from acdc.tasks import Pair
from acdc.tasks.prompts import Generated
from acdc.tasks.spec import TaskSpec


@dataclass(frozen=True)
class Options(Checked):
    """Options of the method."""

    power: float = option(1.0, "Sizes are raised to this power.", above=0, example="0.5")


@method("gradient-size", "sizes of EAP scores", Options, score=Score.MAGNITUDE)
def gradient_size(experiment, options, work):
    """Size of every edge's score, ``[edge]``."""
    return np.abs(eap(experiment, work=work)) ** options.power


@ablation("half", "the mean over both prompts of every pair")
def half(experiment):
    """Means over the clean and the corrupt prompts."""
    prompts = [tokens for pair in experiment.task.pairs for tokens in (pair.clean, pair.corrupt)]
    return mean_constants(experiment, prompts)


ANSWER_LOGIT = Metric(
    "answer_logit", sign=-1, whole_vocab=False, needs_answers=True, needs_wrong=False,
    compares=None, function=lambda logits, targets: (logits * targets.answer_weight).sum(-1),
    description="mean logit of the answers",
)  # fmt: skip


def generate(ids, rng, n_prompts, corruption):
    """Pairs of five token ids; the answer is the first."""
    made = []
    for _ in range(n_prompts):
        first, other, *rest = rng.sample(list(ids), 6)
        pair = Pair((first, *rest), (other, *rest), (first,), (other,))
        made.append(Generated(pair, "echo"))
    return made


ECHO = TaskSpec(
    "echo", "say the first token again", "ioi-small", generate,
    {"other": "the first token is another"}, of_ids=True,
)  # fmt: skip

REFERENCE = Path(__file__).parent / "echo-heads" / "reference.json"
