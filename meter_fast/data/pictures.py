"""Micro-batches of pictures alone, for what learns without texts. Knows one sample source and one image back end; knows
nothing of steps, ranks or threads."""

import math
from typing import Any

import numpy as np
import torch

from meter_fast.data.batch import PictureBatch
from meter_fast.data.image_check import DEFAULT_MAX_PIXELS
from meter_fast.data.images import ImageBackend
from meter_fast.data.loader import SplitLoader
from meter_fast.data.order import OrderError, permute
from meter_fast.data.randaugment import RandAugment
from meter_fast.data.samples import DecodeFailed, Prepared, SampleReader
from meter_fast.data.sources import Sources

_EVALUATION = 7  # purpose of the permutation of a held-out split


class PictureAssembler:
    """Makes micro-batches. Safe to use from several threads when the image back end is.

    sources: of samples with pictures, a picture as often as it has captions, which are not looked at. replace: put
    another sample in place of one that cannot be used (training); False leaves it out (evaluation). augment: what
    pictures undergo (training).
    """

    def __init__(
        self,
        sources: Sources,
        images: ImageBackend,
        seed: int,
        max_image_pixels: int = DEFAULT_MAX_PIXELS,
        replace: bool = True,
        augment: RandAugment | None = None,
    ):
        self.sources = sources
        self._reader = SampleReader(sources, images, seed, max_image_pixels, replace, augment)

    def micro_batch(self, samples: np.ndarray, positions: np.ndarray) -> Prepared:
        """samples [m] int64 -> the batch of their pictures. positions [m]: their step keys the augmentation.

        Raises BadDataError after many unusable samples in a row.
        """
        pictures = self.sources.image_ids(samples).tolist()
        while True:
            skips: list[Any] = []
            tried = [
                self._reader.usable(index, picture, None, skips, captioned=False)
                for index, picture in zip(samples.tolist(), pictures, strict=True)
            ]
            kept = [place for place, one in enumerate(tried) if one is not None]
            if not kept:
                return Prepared(None, skips)
            chosen = [tried[place] for place in kept]
            try:
                images = self._reader.decode(chosen, positions[kept])
            except DecodeFailed:
                continue
            return Prepared(PictureBatch(images, torch.tensor([one.index for one in chosen])), skips)


def picture_split_loader(
    assembler: PictureAssembler,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    limit: int | None = None,
    seed: int = 0,
    workers: int = 0,
    max_bad_share: float = 0.01,
) -> SplitLoader:
    """Every picture of a split once, for evaluation.

    limit: so many pictures, a fair draw that depends on the seed alone. Each rank gets the same number of batches.
    Raises OrderError when ranks would be left without pictures.
    """
    _, distinct = np.unique(assembler.sources.image_ids(np.arange(len(assembler.sources))), return_index=True)
    count = len(distinct) if limit is None else min(limit, len(distinct))
    batches = math.ceil(math.ceil(count / world) / batch_size)
    own = np.array_split(np.arange(count), world)[rank]
    if count < world or len(own) < batches:
        raise OrderError(f"evaluation of {count} pictures on {world} ranks: too few for {batches} batches; use more")
    samples = distinct[permute(np.arange(count), len(distinct), (seed, _EVALUATION))]
    return SplitLoader(samples, np.array_split(own, batches), assembler, workers, max_bad_share)
