"""Fixtures of the data tests. Its place also puts this folder on the import path (see making)."""

import pytest
from making import BAD_PICTURES, caption, picture, sources_of, write_pairs

from meter_fast.data.sources import open_sources
from meter_fast.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A word-piece tokenizer trained on the captions of `making`."""
    return train_tokenizer([caption(n) for n in range(200)], tmp_path_factory.mktemp("tokenizer"), vocab_size=400)


@pytest.fixture
def sound(tmp_path):
    """60 pictures with 2 captions each."""
    write_pairs(tmp_path / "own.arrow", 60, captions_each=2)
    return open_sources(["arrow:own"], tmp_path)


@pytest.fixture
def damaged(tmp_path):
    """As `sound`, with every fifth picture bad, in turn by each cause, and three bad captions."""
    images = [picture(n) for n in range(60)]
    for number, place in enumerate(range(0, 60, 5)):
        images[place] = list(BAD_PICTURES.values())[number % 4]
    captions = [[caption(2 * n), caption(2 * n + 1)] for n in range(60)]
    captions[7][1], captions[8][0], captions[9][0] = "", " \u200b ", "\n"
    return sources_of(tmp_path, images, captions)
