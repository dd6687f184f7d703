"""What the trainer does differently for each task, decided in one place from the objectives.

Knows the tasks' data and how their held-out scores compare. Knows nothing of steps, engines or files of a run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from meter_fast.config import DataConfig, RunConfig
from meter_fast.data.answers import Answers
from meter_fast.data.sources import Sources
from meter_fast.training.masked_images import fit_heads
from meter_fast.training.pairs import Pairs, open_pairs, open_training_sources
from meter_fast.training.questions import fit_answers, open_question_loaders, open_training_questions

Scores = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Task:
    """open_sources: the training samples. fit: the configuration with what the data tell of the model, and the answers
    if the task has any. open_data: loaders of this process. loss: what a held-out score is chosen by, lower is better.
    next_command: what to do with the run directory afterwards.
    """

    open_sources: Callable[[DataConfig], Sources]
    fit: Callable[[RunConfig, Sources], tuple[RunConfig, Answers | None]]
    open_data: Callable[..., Pairs]
    loss: Callable[[Scores], float]
    next_command: str


PRETRAINING = Task(
    open_sources=open_training_sources,
    fit=lambda config, sources: (fit_heads(config), None),
    open_data=open_pairs,
    loss=lambda scores: sum(part["loss"] for part in scores.values()),
    next_command="meter-fast report {run}",
)
TASKS = {
    "vqa": Task(
        open_sources=open_training_questions,
        fit=fit_answers,
        open_data=open_question_loaders,
        loss=lambda scores: -scores["vqa"]["accuracy"],  # the published choice (METER, val/the_metric)
        next_command="meter-fast evaluate {run} vqa",
    )
}


def task_of(objectives: Sequence[str]) -> Task:
    """The task of objectives.names: that of a fine-tuning objective, or pre-training."""
    return next((TASKS[name] for name in objectives if name in TASKS), PRETRAINING)
