"""The data of a run on retrieval: those of pre-training, and held-out pictures to measure the recall on.

Knows settings and the data room. Knows nothing of models and steps.
"""

from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerFast

from meter_fast.config import RunConfig
from meter_fast.data.answers import Answers
from meter_fast.data.sources import Sources, open_sources
from meter_fast.data.text import TextPipeline
from meter_fast.score_retrieval import HeldOutPictures
from meter_fast.training.pairs import Pairs, open_pairs
from meter_fast.training.world import World


def open_ranked_pairs(
    config: RunConfig, world: World, sources: Sources, tokenizer: PreTrainedTokenizerFast, folder, accumulation: int,
    dtype: torch.dtype, answers: Answers | None = None,
) -> Pairs:  # fmt: skip
    """Order, loader and held-out pictures on this process's part of the run. Raises ValueError."""
    data = config.data
    alone = replace(config, data=replace(data, val_sources=()))
    pairs = open_pairs(alone, world, sources, tokenizer, folder, accumulation, dtype, answers)
    if not data.val_sources:
        return pairs
    held_out = open_sources(data.val_sources, data.root, split=data.val_split)
    text = TextPipeline(tokenizer, data.max_text_length)
    asked = HeldOutPictures(held_out, text, pairs.backend, data.val_pairs, data.max_image_pixels)
    return replace(pairs, held_out=held_out, validation=asked)
