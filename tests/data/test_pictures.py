"""Micro-batches of pictures alone: each as decoded, bad ones replaced or left out, every picture of a split once."""

import numpy as np
import pytest
import torch
from making import BAD_PICTURES, backend, caption, picture, sources_of, write_pairs

from meter_fast.data.loader import TrainingLoader
from meter_fast.data.order import OrderError, SampleOrder, micro_slices
from meter_fast.data.pictures import PictureAssembler, picture_split_loader
from meter_fast.data.sources import open_sources


@pytest.fixture
def sources(tmp_path):
    write_pairs(tmp_path / "own.arrow", 12, captions_each=3)
    return open_sources(["arrow:own"], tmp_path)


def step_of(sources, rank: int = 0, world: int = 1, micro_batch: int = 8) -> list:
    assembler = PictureAssembler(sources, backend(), 3)
    order = SampleOrder(sources.sizes, 3, 8)
    slices = micro_slices(8, world, micro_batch, rank, None, pairs=False)
    return next(TrainingLoader(order, assembler, slices, 0, 1, 0.9).steps(2, 3))


def test_the_same_however_divided(sources) -> None:
    (whole,) = step_of(sources)
    parts = [batch for several in zip(*(step_of(sources, r, 2, 2) for r in range(2)), strict=True) for batch in several]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.sample_ids for part in parts]), whole.sample_ids)
    pixels = backend().decode([sources.read(int(index)).image for index in whole.sample_ids])
    assert torch.equal(whole.images, pixels)
    moved = whole.to("cpu", torch.bfloat16)
    assert len(moved) == 8 and moved.images.dtype == torch.bfloat16 and moved.sample_ids.dtype == torch.int64


def test_captions_are_not_looked_at(tmp_path) -> None:
    empty = sources_of(tmp_path, [picture(n) for n in range(4)], [[" "]] * 4)
    found = PictureAssembler(empty, backend(), 0).micro_batch(np.arange(4), np.arange(4))
    assert len(found.batch) == 4 and not found.skips


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_bad_pictures(kind: str, tmp_path) -> None:
    images = [BAD_PICTURES[kind], *(picture(n) for n in range(5))]
    bad = sources_of(tmp_path, images, [[caption(n)] for n in range(6)])
    replaced = PictureAssembler(bad, backend(), 0).micro_batch(np.arange(6), np.arange(6))
    assert len(replaced.batch) == 6 and 0 not in replaced.batch.sample_ids and len(replaced.skips) >= 1
    left_out = PictureAssembler(bad, backend(), 0, replace=False).micro_batch(np.arange(6), np.arange(6))
    assert left_out.batch.sample_ids.tolist() == [1, 2, 3, 4, 5] and len(left_out.skips) == 1
    alone = PictureAssembler(bad, backend(), 0, replace=False).micro_batch(np.arange(1), np.arange(1))
    assert alone.batch is None


def test_every_picture_of_a_split_once(sources) -> None:
    assembler = PictureAssembler(sources, backend(), 0, replace=False)
    for world in (1, 2):
        loaders = [picture_split_loader(assembler, batch_size=5, rank=rank, world=world) for rank in range(world)]
        assert len({len(loader) for loader in loaders}) == 1
        ids = torch.cat([batch.sample_ids for loader in loaders for batch in loader])
        assert sorted(sources.image_ids(ids.numpy()).tolist()) == list(range(12))
    some = [batch.sample_ids for batch in picture_split_loader(assembler, batch_size=5, limit=7)]
    assert [len(ids) for ids in some] == [4, 3] and len(torch.cat(some).unique()) == 7
    with pytest.raises(OrderError, match=r"evaluation of 1 pictures on 2 ranks"):
        picture_split_loader(assembler, batch_size=4, rank=1, world=2, limit=1)
