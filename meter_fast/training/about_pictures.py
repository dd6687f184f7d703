"""Loaders of texts about pictures on one process's part of a run: what questions and statements share.

Knows settings and the data room. Knows nothing of models, steps, or what a text is about a picture.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from meter_fast.config import RunConfig
from meter_fast.data.about_pictures import AboutPictures, most_pictures, split_loader
from meter_fast.data.by_picture import ByPicture
from meter_fast.data.images import ImageBackend
from meter_fast.data.loader import TrainingLoader
from meter_fast.data.order import SampleOrder, micro_slices
from meter_fast.data.randaugment import RandAugment
from meter_fast.data.sources import Sources
from meter_fast.data.text import TextPipeline
from meter_fast.training.pairs import Pairs, open_augmentation, open_images
from meter_fast.training.world import World


def open_loaders(
    config: RunConfig, world: World, sources: Sources, held_out: Sources | None, tokenizer: PreTrainedTokenizerFast,
    folder: Path, accumulation: int, dtype: torch.dtype,
    assemble: Callable[[Sources, TextPipeline, ImageBackend, bool, RandAugment | None], AboutPictures],
    groups: ByPicture | None = None,
) -> Pairs:  # fmt: skip
    """Order, loader and held-out split. assemble: what makes micro-batches of samples; the last arguments say whether
    those that cannot be used are replaced, and what pictures undergo. groups: of the training samples, if it is by
    group that its micro-batches take them. Raises ValueError."""
    data, engine, run = config.data, config.engine, config.run
    drawn = sources if groups is None else groups
    order = SampleOrder(drawn.sizes, run.seed, engine.global_batch, sources.weights)
    text = TextPipeline(tokenizer, data.max_text_length)
    backend = open_images(config, world, dtype, most_pictures(engine.micro_batch))
    slices = micro_slices(engine.global_batch, world.size, engine.micro_batch, world.rank, accumulation, pairs=False)
    loader = TrainingLoader(
        order, assemble(sources, text, backend, True, open_augmentation(config)), slices, data.workers, data.prefetch,
        data.max_bad_share,
    )  # fmt: skip
    validation = None
    if held_out is not None:
        validation = split_loader(
            assemble(held_out, text, backend, False, None), batch_size=engine.micro_batch, rank=world.rank,
            world=world.size, limit=data.val_pairs, workers=data.workers, max_bad_share=data.max_bad_share,
        )  # fmt: skip
    return Pairs(tokenizer, folder, sources, loader, backend, held_out, validation)
