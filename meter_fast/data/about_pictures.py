"""Micro-batches of texts about pictures, for training and evaluation: what those of questions and of statements share.

Knows one source of samples, one text pipeline and one image back end. Knows nothing of steps, ranks or threads: a
micro-batch is a pure function of (seed, sample numbers, stream positions), so every division of a global batch gives
the same texts, pictures and replacements. A picture that is there several times in a micro-batch is decoded once,
wherever it lies in the tables, and augmented in one way, which its content and the step tell.
"""

import dataclasses
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from meter_fast.data.batch import Batch
from meter_fast.data.by_picture import ByPicture
from meter_fast.data.image_check import DEFAULT_MAX_PIXELS
from meter_fast.data.images import ImageBackend
from meter_fast.data.loader import SplitLoader
from meter_fast.data.order import OrderError, permute
from meter_fast.data.randaugment import RandAugment
from meter_fast.data.samples import (
    BAD_IN_A_ROW,
    REPLACE,
    BadDataError,
    Chosen,
    DecodeFailed,
    Prepared,
    SampleReader,
    Skip,
    describe_skips,
)
from meter_fast.data.sources import Sources
from meter_fast.data.text import TextPipeline

SMALLEST_EVALUATION = 16  # texts; those about one picture are rarely as many
PICTURES = 2  # that a text is about, at most
_EVALUATION = 5  # purpose of the permutation that a part of a held-out split is drawn by


class AboutPictures(ABC):
    """Makes micro-batches. Safe to use from several threads when the image back end is.

    replace: put another sample in place of one that cannot be used (training); False leaves it out (evaluation).
    augment: what pictures undergo (training). groups: samples are read by group, which are then what `micro_batch` is
    asked for. Of a group the samples that cannot be used are left out; one without any other is replaced as a whole.
    """

    def __init__(
        self,
        sources: Sources,
        text: TextPipeline,
        images: ImageBackend,
        seed: int,
        max_image_pixels: int = DEFAULT_MAX_PIXELS,
        replace: bool = True,
        augment: RandAugment | None = None,
        groups: ByPicture | None = None,
    ):
        self.sources, self.text, self.groups = sources, text, groups
        self._reader = SampleReader(sources, images, seed, max_image_pixels, replace and groups is None, augment)

    @abstractmethod
    def batch(self, chosen: Sequence[Chosen], rows: torch.Tensor, shared: dict[str, torch.Tensor]) -> Batch:
        """The micro-batch of B samples of K pictures. rows [B,K] int64: their pictures, rows of shared["images"].
        shared: fields that all these batches have."""

    def micro_batch(self, samples: np.ndarray, positions: np.ndarray) -> Prepared:
        """samples [m] int64, of samples or of groups -> the batch of their texts. positions [m]: their step keys the
        augmentation.

        Raises BadDataError after many unusable samples in a row.
        """
        choose = self._one if self.groups is None else self._group
        while True:
            skips: list[Skip] = []
            asked = zip(samples.tolist(), positions.tolist(), strict=True)
            placed = [(one, position) for number, position in asked for one in choose(number, skips)]
            if not placed:
                return Prepared(None, skips)
            chosen = [one for one, _ in placed]
            places: dict[bytes, int] = {}  # by their bytes: tables repeat pictures from row to row
            distinct: list[tuple[Chosen, int]] = []
            found = [[self._place(*one, image, places, distinct) for image in one[0].sample.images] for one in placed]
            try:
                images = self._reader.decode(*zip(*distinct, strict=True))
            except DecodeFailed as failed:
                for (one, _), rows in zip(placed, found, strict=True):
                    for place in failed.errors.keys() & set(rows):  # of all texts about it, so that it is tried once
                        self._reader.refuse(one, failed.errors[place])
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

    def _one(self, sample: int, skips: list[Skip]) -> list[Chosen]:
        """A sample or its replacement; none where it is left out."""
        found = self._reader.usable(sample, int(self.sources.image_ids(np.array([sample]))[0]), None, skips)
        return [] if found is None else [found]

    def _group(self, group: int, skips: list[Skip]) -> list[Chosen]:
        """The samples of a group that can be used, else those of the first group drawn in its place that has some."""
        assert self.groups is not None
        begin, candidate = len(skips), group
        drawn: Iterator[int] | None = None
        while len(skips) - begin < BAD_IN_A_ROW:
            found = [one for sample in self.groups.samples(candidate) for one in self._one(sample, skips)]
            if found:
                return found
            drawn = drawn or iter(self._reader.draws(REPLACE, group, len(self.groups)))
            candidate = next(drawn)
        bad = skips[begin:]
        raise BadDataError(describe_skips(f"{len(bad)} samples in a row could not be used", bad))

    @staticmethod
    def _place(
        one: Chosen, position: int, image: np.ndarray, places: dict[bytes, int], distinct: list[tuple[Chosen, int]]
    ) -> int:
        """The row of a picture among the distinct ones, which it is added to, with its position, if it is new."""
        content = image.tobytes()
        if content not in places:
            places[content] = len(distinct)
            distinct.append((dataclasses.replace(one, image=image, picture=zlib.crc32(content)), position))
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
