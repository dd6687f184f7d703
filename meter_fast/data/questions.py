"""Micro-batches of questions about pictures, for training and evaluation.

Knows one source of questions, one text pipeline, one image back end and the number of answers. Knows nothing of steps,
ranks or threads: a micro-batch is a pure function of (seed, sample numbers, stream positions), so every division of a
global batch gives the same questions, pictures and replacements. A picture that several questions of a micro-batch ask
about is decoded once, and augmented in one way, as are all questions about it in an optimizer step.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from meter_fast.data.answers import AnswersError
from meter_fast.data.batch import VqaBatch
from meter_fast.data.image_check import DEFAULT_MAX_PIXELS
from meter_fast.data.images import ImageBackend
from meter_fast.data.loader import SplitLoader
from meter_fast.data.order import OrderError, permute
from meter_fast.data.randaugment import RandAugment
from meter_fast.data.samples import Chosen, DecodeFailed, Prepared, SampleReader
from meter_fast.data.sources import Sources
from meter_fast.data.text import TextPipeline

SMALLEST_EVALUATION = 16  # questions; those about one picture are rarely as many
_EVALUATION = 5  # purpose of the permutation that a part of a held-out split is drawn by


class QuestionAssembler:
    """Makes micro-batches. Safe to use from several threads when the image back end is.

    sources: of questions (question_tables.py). answers: their number A. replace: put another question in place of one
    that cannot be used (training); False leaves it out (evaluation). augment: what pictures undergo (training).
    """

    def __init__(
        self,
        sources: Sources,
        text: TextPipeline,
        images: ImageBackend,
        seed: int,
        answers: int,
        max_image_pixels: int = DEFAULT_MAX_PIXELS,
        replace: bool = True,
        augment: RandAugment | None = None,
    ):
        self.sources, self.text, self.answers = sources, text, answers
        self._reader = SampleReader(sources, images, seed, max_image_pixels, replace, augment)

    def micro_batch(self, samples: np.ndarray, positions: np.ndarray) -> Prepared:
        """samples [m] int64 -> the batch of their questions. positions [m]: their step keys the augmentation.

        Raises BadDataError after many unusable samples in a row.
        """
        pictures = self.sources.image_ids(samples).tolist()
        while True:
            skips: list[Any] = []
            tried = [
                self._reader.usable(index, picture, None, skips)
                for index, picture in zip(samples.tolist(), pictures, strict=True)
            ]
            places = [(one, int(position)) for one, position in zip(tried, positions, strict=True) if one is not None]
            if not places:
                return Prepared(None, skips)
            chosen = [one for one, _ in places]
            distinct = list({one.picture: (one, position) for one, position in reversed(places)}.values())[::-1]
            try:
                images = self._reader.decode(*zip(*distinct, strict=True))
            except DecodeFailed:
                continue
            return Prepared(self._batch(chosen, images, [one.picture for one, _ in distinct]), skips)

    def _batch(self, chosen: Sequence[Chosen], images: torch.Tensor, pictures: Sequence[int]) -> VqaBatch:
        place = {picture: row for row, picture in enumerate(pictures)}
        text_ids, text_mask = self.text.pad(self.text.encode([one.text for one in chosen]))
        return VqaBatch(
            images=images,
            image_rows=torch.tensor([place[one.picture] for one in chosen]),
            text_ids=text_ids,
            text_mask=text_mask,
            targets=self._targets(chosen),
            question_ids=torch.tensor([one.sample.question_id for one in chosen]),
            sample_ids=torch.tensor([one.index for one in chosen]),
            text_rows=text_mask.flatten().nonzero().flatten(),
        )

    def _targets(self, chosen: Sequence[Chosen]) -> torch.Tensor:
        """[B,A] float32: the scores of the answers, 0 for those that are not named."""
        targets = torch.zeros(len(chosen), self.answers)
        for row, one in enumerate(chosen):
            if one.sample.labels and not 0 <= min(one.sample.labels) <= max(one.sample.labels) < self.answers:
                raise AnswersError(
                    f"{one.sample.name} has labels {one.sample.labels}, but there are {self.answers} answers: the "
                    "table belongs to another label space"
                )
            targets[row, list(one.sample.labels)] = torch.tensor(one.sample.scores, dtype=torch.float32)
        return targets


def question_split_loader(
    assembler: QuestionAssembler,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    limit: int | None = None,
    seed: int = 0,
    workers: int = 0,
    max_bad_share: float = 0.01,
) -> SplitLoader:
    """Every question of a split once, for evaluation, those about one picture next to each other.

    batch_size: at most so many at once, or SMALLEST_EVALUATION where that is more: a picture that cannot be read then
    leaves others in its batch. limit: so many questions, a fair draw that depends on the seed alone. Each rank gets the
    same number of batches. Raises OrderError when ranks would be left without questions.
    """
    total = len(assembler.sources)
    count = total if limit is None else min(limit, total)
    if count < world:
        raise OrderError(f"evaluation of {count} questions on {world} ranks: each rank needs one; use more")
    samples = np.sort(permute(np.arange(count), total, (seed, _EVALUATION)))
    own = np.array_split(np.arange(count), world)[rank]
    batches = math.ceil(math.ceil(count / world) / max(batch_size, SMALLEST_EVALUATION))
    if len(own) < batches:
        raise OrderError(f"evaluation of {count} questions on {world} ranks in {batches} batches: use more questions")
    return SplitLoader(samples, np.array_split(own, batches), assembler, workers, max_bad_share)
