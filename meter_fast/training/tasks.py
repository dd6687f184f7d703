"""What the trainer does differently for each task, decided in one place from the objectives.

Knows the tasks' data, the module that each trains and how held-out scores compare. Knows nothing of steps, engines or
the files of a run but its export.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from meter_fast.config import DataConfig, RunConfig
from meter_fast.data.answers import Answers
from meter_fast.data.sources import Sources
from meter_fast.evaluate import evaluate_pretraining
from meter_fast.interop import original_name
from meter_fast.models.export import save_export
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import JointLoss
from meter_fast.objectives.reconstruction import score_reconstructions
from meter_fast.score_retrieval import score_held_out
from meter_fast.training.masked_images import fit_heads
from meter_fast.training.pairs import Pairs, open_pairs, open_training_sources
from meter_fast.training.questions import count_draws, fit_answers, open_question_loaders, open_training_questions
from meter_fast.training.ranking import open_ranked_pairs
from meter_fast.training.statements import open_statement_loaders, open_training_statements
from meter_fast.training.tokenizing import (
    make_tokenizer,
    open_pictures,
    show_reconstructions,
    with_loss,
    write_tokenizer,
)
from meter_fast.training.unreached import freeze_unreached

Scores = Mapping[str, Mapping[str, float]]


def make_meter(config: RunConfig, from_files: bool) -> Meter:
    """The model in fp32 on the host; from_files: with the encoders' weights."""
    return Meter(config.model, from_files, config.kernels)


def joint_loss(model: Meter, config: RunConfig) -> JointLoss:
    """What the engine runs; parameters that no objective reaches are frozen."""
    module = JointLoss(model, config.objectives.names)
    if set(config.objectives.names) != {"mlm", "itm"} or config.model.decoder.layers:
        freeze_unreached(module, config.model)
    if "retrieval" in config.objectives.names and model.itm_head is not None:
        model.itm_head.requires_grad_(False)  # as published: the rank head has started from it
    if model.mim_in_batch_head is not None:
        model.mim_in_batch_head.all_ranks = config.objectives.mim_negatives == "all_ranks"
    return module


def write_meter(config: RunConfig, folder: Path, tensors: Mapping[str, Tensor], pairs: Pairs) -> None:
    """The export folder."""
    names = pairs.answers.text() if pairs.answers is not None else None
    inputs = {"transform": config.data.transform, "max_text_length": config.data.max_text_length}
    save_export(Meter(config.model, load_weights=False), folder, pairs.tokenizer_folder, tensors, names, inputs)


@dataclass(frozen=True)
class Task:
    """open_sources: the training samples. fit: the configuration with what the data tell of the model, and the answers
    if the task has any. open_data: loaders of this process. loss: what a held-out score is chosen by, lower is better.
    next_command: what to do with the run directory afterwards. reads_text: whether there is a text tokenizer.

    draws: places of global batches that a pass over the training data takes: one a sample, or one a group of them.
    make: the model. module: what the engine runs, with the model as `model`. score: held-out scores of that module.
    write: the export folder. show: a picture for TensorBoard, where it is not a caption filled in. parameter_name: what
    the optimizer's groups are decided on.
    """

    open_sources: Callable[[DataConfig], Sources]
    fit: Callable[[RunConfig, Sources], tuple[RunConfig, Answers | None]]
    open_data: Callable[..., Pairs]
    loss: Callable[[Scores], float]
    next_command: str
    reads_text: bool = True
    draws: Callable[[DataConfig, Sources], int] = lambda data, sources: len(sources)
    make: Callable[[RunConfig, bool], nn.Module] = make_meter
    module: Callable[[nn.Module, RunConfig], nn.Module] = joint_loss
    score: Callable[..., Scores] = evaluate_pretraining
    write: Callable[[RunConfig, Path, Mapping[str, Tensor], Pairs], None] = write_meter
    show: Callable[..., Tensor] | None = None
    parameter_name: Callable[[str], str] = original_name


PRETRAINING = Task(
    open_sources=open_training_sources,
    fit=lambda config, sources: (fit_heads(config), None),
    open_data=open_pairs,
    loss=lambda scores: sum(part["loss"] for part in scores.values()),
    next_command="meter-fast report {run}",
)
CAPTIONING = replace(PRETRAINING, next_command="meter-fast evaluate {run} caption")


def statement_task(name: str) -> Task:
    """Fine-tuning on statements about pictures."""
    return Task(
        open_sources=partial(open_training_statements, name),
        fit=lambda config, sources: (config, None),
        open_data=partial(open_statement_loaders, name),
        loss=lambda scores: -scores[name]["accuracy"],  # the published choice (METER, val/the_metric)
        next_command=f"meter-fast evaluate {{run}} {name}",
    )


TASKS = {
    "nlvr2": statement_task("nlvr2"),
    "snli_ve": statement_task("snli_ve"),
    "vqa": Task(
        open_sources=open_training_questions,
        fit=fit_answers,
        open_data=open_question_loaders,
        loss=lambda scores: -scores["vqa"]["accuracy"],  # the published choice (METER, val/the_metric)
        next_command="meter-fast evaluate {run} vqa",
        draws=count_draws,
    ),
    "retrieval": Task(
        open_sources=open_training_sources,
        fit=lambda config, sources: (config, None),
        open_data=open_ranked_pairs,
        # the published choice (METER, val/the_metric)
        loss=lambda scores: -(scores["retrieval"]["ir_r1"] + scores["retrieval"]["tr_r1"]),
        next_command="meter-fast evaluate {run} retrieval",
        score=score_held_out,
    ),
    "reconstruction": Task(
        open_sources=open_training_sources,
        fit=lambda config, sources: (config, None),
        open_data=open_pictures,
        loss=lambda scores: scores["reconstruction"]["loss"],
        next_command="meter-fast train pretrain objectives.names=mlm,itm,mim_codes objectives.image_tokenizer={run}",
        reads_text=False,
        make=make_tokenizer,
        module=with_loss,
        score=score_reconstructions,
        write=write_tokenizer,
        show=show_reconstructions,
        parameter_name=lambda name: name,
    ),
}


def task_of(objectives: Sequence[str]) -> Task:
    """The task of objectives.names: that of an objective which trains alone, captioning, or pre-training."""
    if tuple(objectives) == ("caption",):
        return CAPTIONING
    return next((TASKS[name] for name in objectives if name in TASKS), PRETRAINING)
