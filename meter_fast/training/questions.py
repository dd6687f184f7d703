"""The data of a run on visual question answering: tables, label space, loaders.

Knows settings and the data room. Knows nothing of models beyond the number of answers, nothing of steps.
"""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from meter_fast.config import ConfigError, DataConfig, RunConfig
from meter_fast.data.answers import Answers, find_answers, read_answers
from meter_fast.data.by_picture import ByPicture
from meter_fast.data.images import ImageBackend
from meter_fast.data.question_tables import open_questions
from meter_fast.data.questions import QuestionAssembler
from meter_fast.data.randaugment import RandAugment
from meter_fast.data.sources import Sources
from meter_fast.data.text import TextPipeline
from meter_fast.models.export import ANSWERS
from meter_fast.training.about_pictures import open_loaders
from meter_fast.training.pairs import Pairs
from meter_fast.training.world import World


def open_training_questions(data: DataConfig) -> Sources:
    """The questions of training, without those that have no answer. Raises ValueError naming what is missing."""
    return open_questions(data.sources, data.root, "train", data.weights or None, answered_only=True)


def group_questions(data: DataConfig, sources: Sources) -> ByPicture | None:
    """The training questions by picture; None where data.questions=single."""
    return ByPicture(sources, data.questions_per_picture) if data.questions == "by_picture" else None


def count_draws(data: DataConfig, sources: Sources) -> int:
    """What a pass over the training data is counted in: questions, or groups of them."""
    groups = group_questions(data, sources)
    return len(sources) if groups is None else len(groups)


def fit_answers(config: RunConfig, sources: Sources) -> tuple[RunConfig, Answers]:
    """The configuration with model.vqa_answers and data.questions_per_picture as the data tell, and the label space.

    Held-out tables name answers, too, as the published label space is one of training and validation. Raises ValueError
    where tables disagree with each other, with model.vqa_answers, or with the label space of run.init.
    """
    data, tables = config.data, list(sources.tables)
    if data.val_sources:
        tables += open_questions(data.val_sources, data.root, data.val_split).tables
    answers = find_answers(tables, data.answers)
    if config.model.vqa_answers not in (0, len(answers)):
        raise ConfigError(
            f"model.vqa_answers={config.model.vqa_answers}: the data have {len(answers)} answers; leave it at 0, or "
            "give the label space by data.answers=FILE"
        )
    before = Path(config.run.init) / ANSWERS
    if config.run.init and before.is_file():
        known = read_answers(before)
        known.check({label: name for label, name in enumerate(answers.names) if name is not None}, "the data")
        answers = known if len(known) == len(answers) else answers
    groups = group_questions(data, sources)
    if groups is not None and data.questions_per_picture == 0:
        data = replace(data, questions_per_picture=groups.largest)  # the same groups
    return replace(config, data=data, model=replace(config.model, vqa_answers=len(answers))), answers


def open_question_loaders(
    config: RunConfig, world: World, sources: Sources, tokenizer: PreTrainedTokenizerFast, folder: Path,
    accumulation: int, dtype: torch.dtype, answers: Answers | None = None,
) -> Pairs:  # fmt: skip
    """Order, loader and held-out split on this process's part of the run. Raises ValueError."""
    data = config.data
    assert answers is not None
    held_out = open_questions(data.val_sources, data.root, data.val_split) if data.val_sources else None

    groups = group_questions(data, sources)

    def assemble(
        asked: Sources, text: TextPipeline, images: ImageBackend, replaced: bool, augment: RandAugment | None
    ) -> QuestionAssembler:
        return QuestionAssembler(
            asked, text, images, config.run.seed, len(answers), data.max_image_pixels, replaced, augment,
            groups if asked is sources else None,
        )  # fmt: skip

    made = open_loaders(config, world, sources, held_out, tokenizer, folder, accumulation, dtype, assemble, groups)
    return replace(made, answers=answers)
