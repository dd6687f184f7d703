"""Which pictures of a run are augmented: those that it trains on, and no others."""

import contextlib
from pathlib import Path

import pytest
import torch
from small_run import MODEL, make_data

from meter_fast.data.tokenizer import load_tokenizer
from meter_fast.recipes import resolve
from meter_fast.training.pairs import open_pairs, open_training_sources
from meter_fast.training.world import World


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def pictures(data: Path, augment: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures of the first step and the held-out ones."""
    config = resolve(
        ["pretrain", "size=tiny", *MODEL, f"data.root={data}", "data.sources=coco", "data.val_sources=coco",
         "engine.global_batch=16", "engine.micro_batch=16", "data.workers=0", f"data.augment={augment}"]
    )  # fmt: skip
    world = World(0, 1, 0, torch.device("cpu"), None)
    sources, folder = open_training_sources(config.data), data / "tokenizer"
    pairs = open_pairs(config, world, sources, load_tokenizer(folder), folder, 1, torch.float32)
    with contextlib.closing(pairs.loader.steps(0, 1)) as steps:
        trained = next(steps)[0].images
    held_out = torch.cat([batch.images for batch in pairs.validation])
    pairs.close()
    return trained, held_out


def test_training_pictures_alone_are_augmented(data: Path) -> None:
    plain, published, corrected = (pictures(data, name) for name in ("none", "randaugment_published", "randaugment"))
    for one, other in ((plain, published), (plain, corrected), (published, corrected)):
        assert not torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert torch.equal(plain[0], pictures(data, "none")[0])
