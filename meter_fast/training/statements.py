"""The data of a run on statements about pictures, NLVR2 or SNLI-VE. Knows settings and the data room; knows nothing of
models or steps."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from meter_fast.config import DataConfig, RunConfig
from meter_fast.data.answers import Answers
from meter_fast.data.images import ImageBackend
from meter_fast.data.sources import Sources
from meter_fast.data.statement_tables import open_statements
from meter_fast.data.statements import StatementAssembler
from meter_fast.data.text import TextPipeline
from meter_fast.training.about_pictures import open_loaders
from meter_fast.training.pairs import Pairs
from meter_fast.training.world import World


def open_training_statements(task: str, data: DataConfig) -> Sources:
    """The statements of training. Raises ValueError naming what is missing."""
    return open_statements(task, data.sources, data.root, "train", data.weights or None)


def open_statement_loaders(
    task: str, config: RunConfig, world: World, sources: Sources, tokenizer: PreTrainedTokenizerFast, folder: Path,
    accumulation: int, dtype: torch.dtype, answers: Answers | None = None,
) -> Pairs:  # fmt: skip
    """Order, loader and held-out split on this process's part of the run. Raises ValueError.

    answers: none here; the argument is there as every task opens its data in the same way.
    """
    data = config.data
    held_out = open_statements(task, data.val_sources, data.root, data.val_split) if data.val_sources else None

    def assemble(said: Sources, text: TextPipeline, images: ImageBackend, replace: bool) -> StatementAssembler:
        return StatementAssembler(said, text, images, config.run.seed, data.max_image_pixels, replace)

    return open_loaders(config, world, sources, held_out, tokenizer, folder, accumulation, dtype, assemble)
