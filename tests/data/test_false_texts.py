"""False texts: whose they are, that they depend on nothing but seed and position, refusals."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from meter_fast.data.false_texts import FalseTexts
from meter_fast.data.samples import BadDataError, Chosen


class Captions:
    """Pictures 0..n-1 with three captions each; the first caption of all even pictures is in the same words."""

    def __init__(self, pictures: int, empty: int = -1):
        self.pictures, self.empty = pictures, empty

    def __len__(self) -> int:
        return 3 * self.pictures

    def image_ids(self, indices: np.ndarray) -> np.ndarray:
        return indices // 3

    def read(self, index: int) -> SimpleNamespace:
        picture, place = divmod(index, 3)
        text = "the same words" if place == 0 and picture % 2 == 0 else f"picture {picture} text {place}"
        return SimpleNamespace(text="" if index == self.empty else text, name=f"sample {index}")


def own(sources: Captions, index: int) -> Chosen:
    sample = sources.read(index)
    return Chosen(index, index // 3, np.zeros(1, np.uint8), sample.text, sample)


def test_never_of_the_picture_nor_in_the_words_of_the_true_text():
    sources = Captions(6)
    chosen, skips = own(sources, 0), []
    texts = FalseTexts(sources, 7, 15)
    drawn = [text for position in range(200) for text in texts.draw(chosen, position, skips)]
    assert len(drawn) == 3000 and not skips
    counts = Counter(drawn)
    possible = {sources.read(n).text for n in range(3, 18)} - {"the same words"}
    assert counts.keys() == possible
    assert max(counts.values()) < 1.7 * min(counts.values())  # uniform over items
    elsewhere = [t for p in range(50) for t in texts.draw(own(sources, 1), p, skips)]
    assert "the same words" in elsewhere and not any(text.startswith("picture 0 ") for text in elsewhere)


def test_as_published_anything_of_the_data_set():
    sources = Captions(6)
    texts = FalseTexts(sources, 7, 15, "dataset")
    drawn = Counter(text for position in range(200) for text in texts.draw(own(sources, 0), position, []))
    assert drawn["picture 0 text 1"] > 100 and drawn["the same words"] > 350


def test_a_pure_function_of_seed_and_position():
    sources = Captions(40)
    one, other = FalseTexts(sources, 3), FalseTexts(sources, 3)
    forwards = [one.draw(own(sources, 5), position, []) for position in range(6)]
    backwards = [other.draw(own(sources, 5), position, []) for position in reversed(range(6))]
    assert forwards == backwards[::-1] and len(set(map(tuple, forwards))) == 6
    assert FalseTexts(sources, 4).draw(own(sources, 5), 0, []) != forwards[0]


def test_what_is_no_text_is_passed_over_and_counted():
    sources, skips = Captions(4, empty=9), []
    drawn = FalseTexts(sources, 0, 40).draw(own(sources, 0), 0, skips)
    assert len(drawn) == 40 and "" not in drawn
    assert skips and {(skip.cause, skip.name) for skip in skips} == {("empty caption", "sample 9")}


def test_refusals():
    with pytest.raises(ValueError, match=r"objectives\.false_texts=0"):
        FalseTexts(Captions(2), 0, 0)
    with pytest.raises(
        ValueError, match=r"objectives\.false_text_choice=.batch.: choose one of other_picture, dataset"
    ):
        FalseTexts(Captions(2), 0, 1, "batch")
    with pytest.raises(BadDataError, match=r"sample 0: 1024 draws gave 0 false texts of the 15"):
        FalseTexts(Captions(1), 0).draw(own(Captions(1), 0), 0, [])
