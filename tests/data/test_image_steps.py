"""The steps of the CPU back end, one by one, are what it does to a batch, in the decoding threads and bit for bit."""

import pytest
import torch
from odd_pictures import array, encode, smooth

from meter_fast.data.image_check import read_header
from meter_fast.data.images import image_transform, normalise, open_backend
from meter_fast.data.images_torchvision import augment, by_pillow, decode_picture, decode_plain, resize_and_crop
from meter_fast.data.randaugment import Operation

TRANSFORM = image_transform("clip", 40)
PICTURES = [array(encode(smooth(90 + n, 70, seed=n), form)) for n, form in enumerate(("JPEG", "PNG", "JPEG", "GIF"))]
DRAWN = [(Operation("Rotate", 9.0), Operation("Color", 0.64)), (), (Operation("Equalize", 0.0),) * 2, ()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("drawn", [None, DRAWN], ids=["plain", "augmented"])
def test_a_batch_is_its_pictures_normalised_at_once(dtype: torch.dtype, threads: int, drawn: list | None) -> None:
    opened = open_backend("torchvision", TRANSFORM, "cpu", dtype, threads=threads)
    images = opened.decode(PICTURES, drawn)
    opened.close()
    pixels = torch.stack([decode_picture(p, TRANSFORM, o) for p, o in zip(PICTURES, drawn or [()] * 4, strict=True)])
    assert pixels.dtype == torch.uint8
    assert torch.equal(images, normalise(pixels, TRANSFORM, dtype))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_steps_make_a_picture(place: int) -> None:
    picture, header = PICTURES[place], read_header(PICTURES[place])
    whole = decode_plain(picture, header)
    assert whole.shape == (3, header.height, header.width)
    assert augment(whole, ()) is whole
    small = resize_and_crop(augment(whole, DRAWN[place]), TRANSFORM)
    assert torch.equal(small, decode_picture(picture, TRANSFORM, DRAWN[place]))
    slow = by_pillow(picture, header, TRANSFORM, DRAWN[place])  # the same by the other library
    assert (small.int() - slow.int()).abs().max() <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalise_writes_where_it_is_told(dtype: torch.dtype) -> None:
    pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    planes = pixels.permute(2, 0, 1)  # as decoders give it: not contiguous
    rows = torch.zeros(2, 3, 40, 40, dtype=dtype)
    assert normalise(planes, TRANSFORM, dtype, rows[1]).data_ptr() == rows[1].data_ptr()
    alone = normalise(planes, TRANSFORM, dtype)
    assert torch.equal(rows[1], alone)
    assert not rows[0].any()
    assert alone.is_contiguous() and alone.dtype == dtype
    mean, std = torch.tensor(TRANSFORM.mean)[:, None, None], torch.tensor(TRANSFORM.std)[:, None, None]
    expected = (planes.double() / 255 - mean) / std
    assert torch.allclose(alone.double(), expected, atol=1e-6 if dtype == torch.float32 else 2e-2)
