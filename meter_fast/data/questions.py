"""Micro-batches of questions about pictures. Knows the number of answers; the rest is as for all texts about
pictures."""

from collections.abc import Sequence

import torch

from meter_fast.data.about_pictures import AboutPictures
from meter_fast.data.answers import AnswersError
from meter_fast.data.batch import VqaBatch
from meter_fast.data.by_picture import ByPicture
from meter_fast.data.image_check import DEFAULT_MAX_PIXELS
from meter_fast.data.images import ImageBackend
from meter_fast.data.randaugment import RandAugment
from meter_fast.data.samples import Chosen
from meter_fast.data.sources import Sources
from meter_fast.data.text import TextPipeline


class QuestionAssembler(AboutPictures):
    """Makes micro-batches. sources: of questions (question_tables.py). answers: their number A."""

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
        groups: ByPicture | None = None,
    ):
        super().__init__(sources, text, images, seed, max_image_pixels, replace, augment, groups)
        self.answers = answers

    def batch(self, chosen: Sequence[Chosen], rows: torch.Tensor, shared: dict[str, torch.Tensor]) -> VqaBatch:
        """The batch of the questions."""
        return VqaBatch(
            image_rows=rows.squeeze(1),
            targets=self._targets(chosen),
            question_ids=torch.tensor([one.sample.question_id for one in chosen]),
            **shared,
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
