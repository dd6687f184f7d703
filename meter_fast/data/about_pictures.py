"""Micro-batches of texts about pictures, for training and evaluation: what those of questions and of statements share.

Knows one source of samples, one text pipeline and one image back end. Knows nothing of steps, ranks or threads: a
micro-batch is a pure function of (seed, sample numbers), so every division of a global batch gives the same texts and
replacements. A picture that is there several times in a micro-batch is decoded once, wherever it lies in the tables.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from meter_fast.data.batch import Batch
from meter_fast.data.image_check import DEFAULT_MAX_PIXELS
from meter_fast.data.images import ImageBackend
from meter_fast.data.loader import SplitLoader
from meter_fast.data.order import OrderError, permute
from meter_fast.data.samples import Chosen, DecodeFailed, Prepared, SampleReader
from meter_fast.data.sources import Sources
from meter_fast.data.text import TextPipeline

SMALLEST_EVALUATION = 16  # texts; those about one picture are rarely as many
PICTURES = 2  # that a text is about, at most
_EVALUATION = 5  # purpose of the permutation that a part of a held-out split is drawn by


class AboutPictures(ABC):
    """Makes micro-batches. Safe to use from several threads when the image back end is.

    replace: put another sample in place of one that cannot be used (training); False leaves it out (evaluation).
    """

    def __init__(
        self,
        sources: Sources,
        text: TextPipeline,
        images: ImageBackend,
        seed: int,
        max_image_pixels: int = DEFAULT_MAX_PIXELS,
        replace: bool = True,
    ):
        self.sources, self.text = sources, text
        self._reader = SampleReader(sources, images, seed, max_image_pixels, replace)

    @abstractmethod
    def batch(self, chosen: Sequence[Chosen], rows: torch.Tensor, shared: dict[str, torch.Tensor]) -> Batch:
        """The micro-batch of B samples of K pictures. rows [B,K] int64: their pictures, rows of shared["images"].
        shared: fields that all these batches have."""

    def micro_batch(self, samples: np.ndarray, positions: np.ndarray) -> Prepared:
        """samples [m] int64 -> the batch of their texts. positions: no chance depends on them.

        Raises BadDataError after many unusable samples in a row.
        """
        rows = self.sources.image_ids(samples).tolist()
        while True:
            skips: list[Any] = []
            tried = [
                self._reader.usable(index, row, None, skips) for index, row in zip(samples.tolist(), rows, strict=True)
            ]
            chosen = [one for one in tried if one is not None]
            if not chosen:
                return Prepared(None, skips)
            places: dict[bytes, int] = {}  # by their bytes: tables repeat pictures from row to row
            distinct: list[Chosen] = []
            found = [[self._place(one, image, places, distinct) for image in one.sample.images] for one in chosen]
            try:
                images = self._reader.decode(distinct)
            except DecodeFailed:
                continue
            text_ids, text_mask = self.text.pad(self.text.encode([one.text for one in chosen]))
            shared = {
                "images": images,
                "text_ids": text_ids,
                "text_mask": text_mask,
                "sample_ids": torch.tensor([one.index for one in chosen]),
                "text_rows": text_mask.flatten().nonzero().flatten(),
            }
            return Prepared(self.batch(chosen, torch.tensor(found), shared), skips)

    @staticmethod
    def _place(one: Chosen, image: np.ndarray, places: dict[bytes, int], distinct: list[Chosen]) -> int:
        """The row of a picture among the distinct ones, which it is added to if it is new."""
        content = image.tobytes()
        if content not in places:
            places[content] = len(distinct)
            distinct.append(dataclasses.replace(one, image=image))
        return places[content]


def most_pictures(batch_size: int) -> int:
    """The most pictures that a micro-batch of so many texts holds, in training and in evaluation."""
    return PICTURES * max(batch_size, SMALLEST_EVALUATION)


def split_loader(
    assembler: AboutPictures,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    limit: int | None = None,
    seed: int = 0,
    workers: int = 0,
    max_bad_share: float = 0.01,
) -> SplitLoader:
    """Every text of a split once, for evaluation, those about one picture next to each other.

    batch_size: at most so many at once, or SMALLEST_EVALUATION where that is more: a picture that cannot be read then
    leaves others in its batch. limit: so many texts, a fair draw that depends on the seed alone. Each rank gets the
    same number of batches. Raises OrderError when ranks would be left without texts.
    """
    total, texts = len(assembler.sources), assembler.sources.tables[0].texts
    count = total if limit is None else min(limit, total)
    if count < world:
        raise OrderError(f"evaluation of {count} {texts} on {world} ranks: each rank needs one; use more")
    samples = np.sort(permute(np.arange(count), total, (seed, _EVALUATION)))
    own = np.array_split(np.arange(count), world)[rank]
    batches = math.ceil(math.ceil(count / world) / max(batch_size, SMALLEST_EVALUATION))
    if len(own) < batches:
        raise OrderError(f"evaluation of {count} {texts} on {world} ranks in {batches} batches: use more {texts}")
    return SplitLoader(samples, np.array_split(own, batches), assembler, workers, max_bad_share)
