"""False texts for pictures: captions drawn from the data set that do not belong to them.

Knows one sample source. Knows nothing of tokens and batches: what is drawn is a pure function of (seed, position of the
sample in the stream), so every division of a global batch draws the same texts.
Source: METER, `datasets/base_dataset.py` (get_false_text).
"""

from typing import Any

import numpy as np

from meter_fast.data.caption_check import BadCaption, check_caption
from meter_fast.data.order import mix
from meter_fast.data.samples import BadDataError, Chosen, Skip

CHOICES = ("other_picture", "dataset")
_FALSE_TEXT = 8  # purpose of the random numbers; those of a batch are listed in assemble.py
_AT_ONCE, _ROUNDS = 64, 16  # draws looked at together, and how often before it is given up


class FalseTexts:
    """Draws `count` captions for a picture, uniformly over all (picture, caption) items.

    choice: "other_picture", never one of the picture's own captions nor one in the words of the true one; "dataset", as
    published, whatever comes (so once in a while a caption of the picture itself). Safe to use from several threads.
    Raises ValueError for no text or an unknown choice.
    """

    def __init__(self, sources: Any, seed: int, count: int = 15, choice: str = "other_picture"):
        if count < 1:
            raise ValueError(f"objectives.false_texts={count}: give 1 or more")
        if choice not in CHOICES:
            raise ValueError(f"objectives.false_text_choice={choice!r}: choose one of {', '.join(CHOICES)}")
        self.sources, self.seed, self.count, self.choice = sources, seed, count, choice

    def draw(self, own: Chosen, position: int, skips: list[Skip]) -> list[str]:
        """False texts for the picture of `own`, which stands at `position` of the stream; those that are no text are
        passed over and counted in `skips`. Raises BadDataError where there are not enough."""
        found: list[str] = []
        for begin in range(0, _ROUNDS * _AT_ONCE, _AT_ONCE):
            drawn = mix((self.seed, _FALSE_TEXT, position), np.arange(begin, begin + _AT_ONCE))
            drawn = (drawn % np.uint64(len(self.sources))).astype(np.int64)
            pictures = self.sources.image_ids(drawn).tolist()
            for index, picture in zip(drawn.tolist(), pictures, strict=True):
                if self.choice == "other_picture" and picture == own.picture:
                    continue
                sample = self.sources.read(index)
                try:
                    text = check_caption(sample.text)
                except BadCaption as error:
                    skips.append(Skip(error.cause, sample.name))
                    continue
                if self.choice == "other_picture" and text == own.text:
                    continue
                found.append(text)
                if len(found) == self.count:
                    return found
        raise BadDataError(
            f"{own.sample.name}: {_ROUNDS * _AT_ONCE} draws gave {len(found)} false texts of the "
            f"{self.count} of objectives.false_texts: the data hold too few other captions; add pictures"
        )
